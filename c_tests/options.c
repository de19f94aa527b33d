// Option structs of other versions, and values out of range.
#include "refused.h"

struct later_ring {
    struct ringest_ring_options known;
    uint64_t more[4];
};
struct later_stream {
    struct ringest_stream_options known;
    uint64_t more[4];
};
struct later_mapped {
    struct ringest_mapped_options known;
    uint64_t more[4];
};

static void ring(int64_t expected, struct ringest_ring_options options) {
    struct ringest_ring *ring = NULL;
    CALL(expected, ringest_ring_create, &options, &ring);
    if (expected < 0) CHECK(ring == NULL);
    if (ring) CALL(0, ringest_ring_destroy, ring);
}

int main(void) {
    struct ringest_ring_options r = {sizeof r, 0, 0, 0, 0, 0, 0, 0};
    struct later_ring long_ring = {{sizeof long_ring, 0, 0, 0, 0, 0, 0, 0}, {0}};
    struct later_stream long_stream = {{sizeof long_stream, 0, 0, 0, 0, 0, 0, 0}, {0}};
    struct later_mapped long_mapped = {{sizeof long_mapped, 0, 0, 0, 0, {0}}, {0}};
    struct ringest_features features;
    struct ringest_ring *made;
    struct ringest_mapped *mapped, *none = NULL;
    struct ringest_stream_options s = {sizeof s, 0, 0, 0, 0, 0, 0, 0}, bad;
    struct world w;
    uint64_t word, words[2];
    uint32_t halves[2];
    uint32_t *short_options;
    uint8_t *page;
    int i;

    // Rings.
    ring(0, r);
    for (i = 0; i < 4; i++) {
        r.size = (uint32_t)i;
        ring(-EINVAL, r);
    }
    r.size = 5000;
    ring(-E2BIG, r);
    r.size = sizeof r;
    r.flags = 1u << 5;
    ring(-EINVAL, r);
    r.flags = RINGEST_RING_SQPOLL_CPU;
    ring(-EINVAL, r);
    r.flags = 0;
    r.reserved = 1;
    ring(-EINVAL, r);
    r.reserved = 0;
    r.entries = 32769;
    ring(-EINVAL, r);
    r.entries = 64;
    r.cq_entries = 63;
    ring(-EINVAL, r);
    r.cq_entries = 65537;
    ring(-EINVAL, r);
    r.cq_entries = 0;
    r.buffer_slots = 16385;
    ring(-EINVAL, r);
    CALL(-EINVAL, ringest_ring_create, NULL, NULL);
    // The kernel refuses a CPU that does not exist.
    r = (struct ringest_ring_options){sizeof r, RINGEST_RING_SQPOLL | RINGEST_RING_SQPOLL_CPU, 0, 0, 0, 100000, 0, 0};
    ring(-EINVAL, r);

    // A short struct ends at the last readable byte: what is missing is zero.
    page = (uint8_t *)mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED && mprotect(page + 4096, 4096, PROT_NONE) == 0);
    short_options = (uint32_t *)(page + 4096) - 3;
    short_options[0] = 12;
    short_options[1] = 0;
    short_options[2] = 16;
    CALL(0, ringest_ring_create, (struct ringest_ring_options *)short_options, &made);
    CALL(0, ringest_ring_features, made, &features);
    CHECK(features.sq_entries == 16 && features.cq_entries == 32);
    CALL(0, ringest_ring_destroy, made);
    short_options[2] = 4;
    CALL(0, ringest_mapped_alloc, 10, (struct ringest_mapped_options *)(short_options + 2), &mapped);
    CALL(0, ringest_mapped_free, mapped);

    // A longer one may only hold zeros where we know nothing.
    CALL(0, ringest_ring_create, &long_ring.known, &made);
    long_ring.more[3] = UINT64_C(1) << 63;
    CALL(-E2BIG, ringest_ring_create, &long_ring.known, &made);
    CALL(0, ringest_mapped_alloc, 10, &long_mapped.known, &mapped);
    long_mapped.more[0] = 1;
    CALL(-E2BIG, ringest_mapped_alloc, 10, &long_mapped.known, &none);
    long_mapped.known.size = 3;
    CALL(-EINVAL, ringest_mapped_alloc, 10, &long_mapped.known, &none);
    CHECK(none == NULL);

    // Streams.
    memset(&w, 0, sizeof w);
    w.ring = made;
    w.mapped = mapped;
    CALL(0, ringest_mapped_share, mapped, &w.buffer);
    CALL(0, ringest_tail_line_alloc, &w.line);
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, &long_stream.known, &w.stream);
    CALL(0, ringest_stream_destroy, w.stream);
    w.stream = NULL;
    long_stream.more[2] = 1;
    every_create(-E2BIG, &w, &long_stream.known);
    for (i = 0; i < 7; i++) {
        bad = s;
        if (i == 0) bad.size = 0;
        if (i == 1) bad.flags = 8;
        if (i == 2) bad.depth = 65537;
        if (i == 3) bad.depth = 8, bad.window = 7;
        if (i == 4) bad.max_retries = 256;
        if (i == 5) bad.reserved = 1;
        if (i == 6) bad.flags = UINT32_MAX;
        every_create(-EINVAL, &w, &bad);
    }
    CALL(-EINVAL, ringest_stream_create, w.ring, w.buffer, w.line, NULL, NULL);
    CALL(-EINVAL, ringest_stream_create_u64, w.ring, w.buffer, &word, NULL, NULL);
    CALL(-EINVAL, ringest_stream_create_u32, w.ring, w.buffer, halves, NULL, NULL);
    CALL(-EINVAL, ringest_stream_create_u64, w.ring, w.buffer, NULL, NULL, &w.stream);
    CALL(-EINVAL, ringest_stream_create_u32, w.ring, w.buffer, NULL, NULL, &w.stream);
    CALL(-EINVAL, ringest_stream_create_u64, w.ring, w.buffer, (uint64_t *)((uintptr_t)words + 4), NULL, &w.stream);
    CALL(-EINVAL, ringest_stream_create_u32, w.ring, w.buffer, (uint32_t *)((uintptr_t)halves + 2), NULL, &w.stream);
    CHECK(w.stream == NULL);
    // Extremes that are allowed.
    bad = s;
    bad.depth = bad.window = 65536;
    bad.max_retries = 255;
    bad.retry_backoff_ns = bad.close_timeout_ns = UINT64_MAX;
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, &bad, &w.stream);
    CALL(0, ringest_stream_submit_read, w.stream, -1, 0, 0, 1, 0);
    CALL(1, ringest_stream_wait, w.stream, UINT32_MAX, INT64_MAX);
    CALL(0, ringest_stream_destroy, w.stream);
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, NULL, &w.stream);
    CALL(0, ringest_stream_close, w.stream, INT64_MIN);
    w.stream = NULL;
    close_world(&w);
    munmap(page, 8192);
    return 0;
}
