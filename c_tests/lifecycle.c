// The whole of it once, every handle given up; a ring serves one stream after another.
#include "check.h"

int main(void) {
    struct world w;
    struct ringest_features features;
    struct ringest_leaks leaked;
    int round, fd = data_file(65536);
    uint64_t word = 5, device;
    uint32_t half = 5;

    open_world(&w, 65536, 0, 0);
    CALL(0, ringest_ring_features, w.ring, &features);
    CHECK(features.sq_entries == 64 && features.cq_entries == 128);
    for (round = 0; round < 6; round++) CHECK(features.reserved[round] == 0);
    CHECK(fcntl((int)CALL(DONE, ringest_ring_fd, w.ring), F_GETFD) >= 0);
    CALL(-EBUSY, ringest_ring_destroy, w.ring);
    CALL(-EBUSY, ringest_stream_create, w.ring, w.buffer, w.line, NULL, &w.stream);
    CALL(-EBUSY, ringest_stream_create_u64, w.ring, w.buffer, &word, NULL, &w.stream);
    CALL(-EBUSY, ringest_stream_create_u32, w.ring, w.buffer, &half, NULL, &w.stream);
    CHECK(word == 5 && half == 5);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, 65536, 1);
    CHECK(tail_of(&w) == 0 && state_of(&w) == RINGEST_STATE_OPEN && first_bad_of(&w) == UINT64_MAX);
    CALL(1, ringest_stream_wait, w.stream, 1, -1);
    CALL(1, ringest_stream_poll, w.stream);
    CHECK(tail_of(&w) == 1 && is_pattern(w.data, 0, 65536));
    CALL(0, ringest_stream_finish, w.stream);
    CHECK(state_of(&w) == RINGEST_STATE_END && end_of(&w) == 1);
    CALL(0, ringest_stream_close, w.stream, SECOND);
    CHECK(state_of(&w) == RINGEST_STATE_END && end_of(&w) == 1);

    // The ring again, with bare words; the buffer's and the file's handles are not needed meanwhile.
    CALL(0, ringest_stream_create_u64, w.ring, w.buffer, &word, NULL, &w.stream);
    CHECK(word == 0);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 4096, 0, 4096, 2);
    CALL(1, ringest_stream_wait, w.stream, 1, -1);
    CALL(1, ringest_stream_poll, w.stream);
    CHECK(__atomic_load_n(&word, __ATOMIC_ACQUIRE) == 1 && is_pattern(w.data, 4096, 4096));
    CALL(0, ringest_stream_destroy, w.stream);
    CALL(0, ringest_stream_create_u32, w.ring, w.buffer, &half, NULL, &w.stream);
    CHECK(half == 0);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, 0, 3);
    CALL(1, ringest_stream_poll, w.stream);
    CHECK(__atomic_load_n(&half, __ATOMIC_ACQUIRE) == 1);
    CALL(0, ringest_stream_close, w.stream, -1);

    // A stream that was closed with work undone says so. Mapped memory and the line live as long as the stream.
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, NULL, &w.stream);
    CHECK(state_of(&w) == RINGEST_STATE_OPEN && tail_of(&w) == 0);
    CALL(0, ringest_tail_line_device_ptr, w.line, &device);
    CHECK(device == (uint64_t)(uintptr_t)w.words);
    CALL(0, ringest_buffer_release, w.buffer);
    CALL(0, ringest_mapped_free, w.mapped);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, 4096, 0);
    CALL(1, ringest_stream_wait, w.stream, 1, -1);
    CHECK(is_pattern(w.data, 0, 4096));
    CALL(1, ringest_stream_poll, w.stream);
    CALL(0, ringest_stream_destroy, w.stream);
    CHECK(state_of(&w) == RINGEST_STATE_ABORTED && error_of(&w) == -ECANCELED);
    CALL(0, ringest_tail_line_free, w.line);
    CALL(0, ringest_ring_destroy, w.ring);

    // Many rings, one after the other, leave nothing behind.
    for (round = 0; round < 50; round++) {
        open_world(&w, 4096, 0, 0);
        close_world(&w);
    }
    CALL(0, ringest_leak_stats, &leaked);
    CHECK(leaked.rings == 0 && leaked.reads == 0 && leaked.bytes == 0);
    CALL(-EINVAL, ringest_leak_stats, NULL);
    close(fd);
    return 0;
}
