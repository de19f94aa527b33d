// A close that cannot wait: ring and memory are leaked, counted, and the ring's handle says so.
#include "refused.h"

static int released;
static void release(void *user) {
    (void)user;
    released++;
}

int main(void) {
    struct world w;
    struct ringest_leaks before, after;
    struct ringest_features features;
    struct ringest_stream_options hasty = {sizeof hasty, 0, 0, 0, 0, 0, 0, 1};
    struct ringest_shared_buffers *shared;
    struct ringest_ring *other;
    struct ringest_buffer *own;
    const struct ringest_buffer *list[1];
    uint64_t word;
    int ends[2];
    void *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CALL(0, ringest_leak_stats, &before);
    CHECK(before.rings == 0);
    open_world(&w, 4096, 0, 0);
    CALL(0, ringest_ring_create, NULL, &other);
    list[0] = w.buffer;
    CALL(0, ringest_ring_register_buffers, other, list, 1);
    CALL(0, ringest_ring_share_buffers, other, &shared);
    pending_read(&w, ends, 100);
    CALL(-ETIMEDOUT, ringest_stream_close, w.stream, 0);
    CALL(-EBADF, ringest_stream_close, w.stream, 0);
    CHECK(state_of(&w) == RINGEST_STATE_ABORTED && error_of(&w) == -ECANCELED && end_of(&w) == 1);
    CALL(0, ringest_leak_stats, &after);
    CHECK(after.rings == 1 && after.reads == 1 && after.bytes == 100);
    every_ring_call(-ENODEV, &w, shared);
    every_create(-ENODEV, &w, NULL);
    CALL(-ENODEV, ringest_ring_features, w.ring, &features);
    CALL(-ENODEV, ringest_ring_fd, w.ring);
    w.stream = NULL;
    close_world(&w);
    CALL(0, ringest_shared_buffers_free, shared);
    CALL(0, ringest_ring_destroy, other);

    // Memory with an owner is not given back; wrapped memory stays refused.
    CALL(0, ringest_buffer_from_host_owner, memory, 4096, 0, release, NULL, &own);
    CALL(0, ringest_ring_create, NULL, &w.ring);
    CALL(0, ringest_stream_create_u64, w.ring, own, &word, &hasty, &w.stream);
    CALL(0, ringest_buffer_release, own);
    CALL(0, ringest_stream_submit_read, w.stream, ends[0], 0, 0, 4096, 0);
    CALL(1, ringest_stream_flush, w.stream);
    CALL(-ETIMEDOUT, ringest_stream_destroy, w.stream);
    CALL(0, ringest_ring_destroy, w.ring);
    CHECK(released == 0);
    CALL(0, ringest_leak_stats, &after);
    CHECK(after.rings == 2 && after.reads == 2 && after.bytes == 4196);
    return 0;
}
