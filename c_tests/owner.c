// Memory with a release function: called once, and only after the last handle, registration and read.
#include "check.h"

static int released;
static void release(void *user) {
    CHECK(user == &released);
    __atomic_add_fetch(&released, 1, __ATOMIC_SEQ_CST);
}
static int count(void) { return __atomic_load_n(&released, __ATOMIC_SEQ_CST); }

int main(void) {
    struct ringest_buffer *buffer, *part, *none = NULL, *other;
    struct ringest_mapped *spare;
    struct ringest_ring *ring;
    struct ringest_stream *stream;
    struct ringest_tail_line *line;
    const struct ringest_buffer *list[1];
    struct ringest_completion record;
    uint64_t word = 0, device;
    int ends[2];
    uint8_t *memory = (uint8_t *)mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);

    // A call that fails does not take the memory over.
    CALL(-EINVAL, ringest_buffer_from_host_owner, NULL, 64, 0, release, &released, &none);
    CALL(-EINVAL, ringest_buffer_from_host_owner, memory, 0, 0, release, &released, &none);
    CALL(-EINVAL, ringest_buffer_from_host_owner, memory, 64, 0, NULL, &released, &none);
    CALL(-EINVAL, ringest_buffer_from_host_owner, memory, 64, 0, release, &released, NULL);
    CALL(-ERANGE, ringest_buffer_from_host_owner, memory, SIZE_MAX, 0, release, &released, &none);
    CALL(-EINVAL, ringest_buffer_from_bar1_peer, memory, 64, 0, release, &released, &none);
    CALL(-EINVAL, ringest_buffer_from_bar1_peer, NULL, 64, 1, release, &released, &none);
    CALL(-ERANGE, ringest_buffer_from_bar1_peer, memory, 64, UINT64_MAX - 8, release, &released, &none);
    CHECK(count() == 0 && none == NULL);

    CALL(0, ringest_buffer_from_host_owner, memory, 8192, UINT64_C(1) << 40, release, &released, &buffer);
    CALL(0, ringest_buffer_sub_region, buffer, 4096, 4096, &part);
    CALL(0, ringest_buffer_device_ptr, part, &device);
    CHECK(device == (UINT64_C(1) << 40) + 4096);
    CALL(0, ringest_ring_create, NULL, &ring);
    list[0] = buffer;
    CALL(0, ringest_ring_register_buffers, ring, list, 1);
    CALL(0, ringest_stream_create_u64, ring, part, &word, NULL, &stream);
    CALL(1, ringest_stream_is_registered, stream);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_buffer_release, part);
    CHECK(count() == 0);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    CALL(0, ringest_stream_submit_read, stream, ends[0], 0, 0, 5, 0);
    CALL(1, ringest_stream_flush, stream);
    // Nothing but the read in flight holds the memory any more.
    CALL(0, ringest_ring_unregister_buffers, ring);
    CALL(0, ringest_mapped_alloc, 4096, NULL, &spare);
    CALL(0, ringest_mapped_share, spare, &other);
    CALL(0, ringest_stream_replace_buffer, stream, other);
    CHECK(count() == 0);
    CHECK(write(ends[1], "hello", 5) == 5);
    record = next_record(stream);
    CHECK(record.status == 0 && record.bytes == 5 && memcmp(memory + 4096, "hello", 5) == 0);
    CALL(0, ringest_stream_destroy, stream);
    CALL(0, ringest_ring_destroy, ring);
    CHECK(count() == 1);
    CALL(0, ringest_buffer_release, other);
    CALL(0, ringest_mapped_free, spare);

    // Device memory: a kind of its own, which the CPU and the buffer table cannot take.
    CALL(0, ringest_buffer_from_bar1_peer, memory, 8192, UINT64_C(1) << 41, release, &released, &buffer);
    CALL(RINGEST_MEMORY_KIND_BAR1_PEER, ringest_buffer_kind, buffer);
    CALL(-EOPNOTSUPP, ringest_tail_line_in_buffer, buffer, 0, &line);
    CALL(0, ringest_buffer_release, buffer);
    CHECK(count() == 2);
    close(ends[0]);
    close(ends[1]);
    CHECK(munmap(memory, 8192) == 0);
    return 0;
}
