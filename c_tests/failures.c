// Reads that fail: what the record, the return values and the tail line say, and what resubmit, skip and cancel do.
#include "check.h"

int main(void) {
    struct world w;
    struct ringest_completion record, records[4];
    struct ringest_stream_options small = {sizeof small, 0, 2, 4, 0, 0, 0, 0};
    struct ringest_stream_counters stats;
    int fd = data_file(1000), ends[2], i, path;
    FILE *grown;

    open_world(&w, 65536, 0, 0);
    // End of file: the bytes there are, and the tail holds.
    CALL(0, ringest_stream_submit_read, w.stream, fd, 900, 0, 200, 5);
    CALL(1, ringest_stream_submit_read, w.stream, fd, 0, 200, 100, 6);
    CALL(2, ringest_stream_wait, w.stream, 2, 10 * SECOND);
    CHECK(tail_of(&w) == 0 && first_bad_of(&w) == 0 && error_of(&w) == -ENODATA && state_of(&w) == RINGEST_STATE_OPEN);
    // Its record was not taken yet.
    CALL(-EINVAL, ringest_stream_resubmit, w.stream, 0);
    CALL(-EINVAL, ringest_stream_skip, w.stream, 0);
    CALL(2, ringest_stream_poll_into, w.stream, records, 4);
    for (i = 0; i < 2; i++) {
        if (records[i].sequence == 0)
            CHECK(records[i].status == -ENODATA && records[i].bytes == 100 && records[i].user_data == 5);
        else
            CHECK(records[i].status == 0 && records[i].sequence == 1 && records[i].user_data == 6);
    }
    CHECK(is_pattern(w.data, 900, 100));
    CALL(-EINVAL, ringest_stream_skip, w.stream, 1);
    CALL(-EINVAL, ringest_stream_skip, w.stream, 2);
    CALL(-EINVAL, ringest_stream_resubmit, w.stream, UINT64_MAX);
    CALL(-EINVAL, ringest_stream_cancel, w.stream, 0);
    CALL(-EINVAL, ringest_stream_cancel, w.stream, 99);

    // Read again once the file has grown: withdrawn, and the tail passes both.
    grown = fopen(data_path, "ab");
    CHECK(grown);
    for (i = 1000; i < 1100; i++) fputc(pattern((uint64_t)i), grown);
    CHECK(fclose(grown) == 0);
    CALL(0, ringest_stream_resubmit, w.stream, 0);
    CALL(-EINVAL, ringest_stream_resubmit, w.stream, 0);
    record = next_record(w.stream);
    CHECK(record.sequence == 0 && record.status == 0 && record.bytes == 200 && is_pattern(w.data, 900, 200));
    CHECK(tail_of(&w) == 2 && first_bad_of(&w) == UINT64_MAX);

    // poll reports successes first, then the failure, once.
    CALL(2, ringest_stream_submit_read, w.stream, fd, 5000, 0, 10, 0);
    CALL(1, ringest_stream_wait, w.stream, 1, 10 * SECOND);
    CALL(-ENODATA, ringest_stream_poll, w.stream);
    CHECK(strstr(ringest_last_error(), "submission 2"));
    CALL(0, ringest_stream_poll, w.stream);
    CALL(0, ringest_stream_skip, w.stream, 2);
    CHECK(tail_of(&w) == 3 && first_bad_of(&w) == 2 && error_of(&w) == -ENODATA);
    CALL(-EINVAL, ringest_stream_skip, w.stream, 2);

    // A descriptor that is not open fails as a completion.
    CALL(3, ringest_stream_submit_read, w.stream, 4000, 0, 0, 10, 0);
    record = next_record(w.stream);
    CHECK(record.status == -EBADF && record.bytes == 0 && record.path == RINGEST_READ_PATH_NONE);
    CALL(0, ringest_stream_skip, w.stream, 3);
    CHECK(tail_of(&w) == 4 && first_bad_of(&w) == 2);
    CALL(4, ringest_stream_submit_read, w.stream, -1, 0, 0, 10, 0);
    CALL(1, ringest_stream_wait, w.stream, 1, 10 * SECOND);
    CALL(-EBADF, ringest_stream_poll, w.stream);
    CALL(0, ringest_stream_skip, w.stream, 4);
    path = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CALL(5, ringest_stream_submit_read, w.stream, path, 0, 0, 10, 0);
    record = next_record(w.stream);
    CHECK(record.status == -EISDIR);
    CALL(0, ringest_stream_skip, w.stream, 5);
    close(path);

    // Cancelled: in the kernel, and before it got there.
    pending_read(&w, ends, 100);
    CALL(-ETIMEDOUT, ringest_stream_wait, w.stream, 1, 1000000);
    CALL(-ETIMEDOUT, ringest_stream_wait, w.stream, 1, 0);
    CALL(0, ringest_stream_wait, w.stream, 0, 0);
    CALL(0, ringest_stream_cancel, w.stream, 6);
    record = next_record(w.stream);
    CHECK(record.sequence == 6 && record.status == -ECANCELED && record.bytes == 0 && record.user_data == 77);
    CHECK(first_bad_of(&w) == 2 && tail_of(&w) == 6);
    CALL(0, ringest_stream_resubmit, w.stream, 6);
    CALL(7, ringest_stream_submit_read, w.stream, ends[0], 0, 0, 100, 0);
    CALL(0, ringest_stream_cancel_all, w.stream);
    CALL(2, ringest_stream_wait, w.stream, 2, 10 * SECOND);
    CALL(-ECANCELED, ringest_stream_poll, w.stream);
    CALL(-ECANCELED, ringest_stream_poll, w.stream);
    CALL(0, ringest_stream_cancel_all, w.stream);
    CALL(0, ringest_stream_stats, w.stream, &stats);
    CHECK(stats.skipped == 4 && stats.cancelled == 3 && stats.end_of_file == 2);
    CALL(0, ringest_stream_inflight, w.stream);

    // Finished with failures open: closing says ABORTED unless they are settled.
    CALL(0, ringest_stream_finish, w.stream);
    CHECK(state_of(&w) == RINGEST_STATE_END && end_of(&w) == 8);
    CALL(0, ringest_stream_skip, w.stream, 6);
    CALL(0, ringest_stream_skip, w.stream, 7);
    CALL(0, ringest_stream_close, w.stream, 0);
    CHECK(state_of(&w) == RINGEST_STATE_END && tail_of(&w) == 8);

    // depth and window.
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, &small, &w.stream);
    CALL(0, ringest_stream_submit_read, w.stream, -1, 0, 0, 10, 0);
    record = next_record(w.stream);
    CALL(1, ringest_stream_submit_read, w.stream, ends[0], 0, 0, 10, 0);
    CALL(2, ringest_stream_submit_read, w.stream, ends[0], 0, 0, 10, 0);
    CALL(-EAGAIN, ringest_stream_submit_read, w.stream, ends[0], 0, 0, 10, 0);
    CALL(-EAGAIN, ringest_stream_resubmit, w.stream, 0);
    CALL(0, ringest_stream_cancel_all, w.stream);
    CALL(2, ringest_stream_wait, w.stream, 2, 10 * SECOND);
    CALL(2, ringest_stream_poll_into, w.stream, records, 4);
    CALL(3, ringest_stream_submit_read, w.stream, -1, 0, 0, 10, 0);
    record = next_record(w.stream);
    CALL(-EAGAIN, ringest_stream_submit_read, w.stream, fd, 0, 0, 10, 0);
    CHECK(strstr(ringest_last_error(), "skip"));
    CALL(0, ringest_stream_skip, w.stream, 0);
    CALL(4, ringest_stream_submit_read, w.stream, fd, 0, 0, 10, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && tail_of(&w) == 1);
    CALL(0, ringest_stream_close, w.stream, SECOND);
    CHECK(state_of(&w) == RINGEST_STATE_ABORTED);
    w.stream = NULL;
    close_world(&w);

    // The system call itself fails: something else is behind the ring's descriptor (which a movable ring uses).
    {
        int null = open("/dev/null", O_RDONLY | O_CLOEXEC), ring;
        open_world(&w, 4096, RINGEST_RING_MOVABLE, 0);
        ring = (int)CALL(DONE, ringest_ring_fd, w.ring);
        // What follows is queued and never reaches a kernel.
        int spare = fcntl(ring, F_DUPFD_CLOEXEC, 0);
        CHECK(dup3(null, ring, O_CLOEXEC) == ring);
        CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, 64, 0);
        CALL(-EOPNOTSUPP, ringest_stream_flush, w.stream);
        CHECK(strstr(ringest_last_error(), "io_uring_enter"));
        COVER(ringest_stream_flush, "io_uring_enter(2)");
        CALL(-EOPNOTSUPP, ringest_stream_poll, w.stream);
        COVER(ringest_stream_poll, "io_uring_enter(2)");
        CALL(-EOPNOTSUPP, ringest_stream_poll_into, w.stream, records, 4);
        COVER(ringest_stream_poll_into, "io_uring_enter(2)");
        CALL(-EOPNOTSUPP, ringest_stream_wait, w.stream, 1, SECOND);
        COVER(ringest_stream_wait, "io_uring_enter(2)");
        CHECK(dup3(spare, ring, O_CLOEXEC) == ring);
        close(spare);
        record = next_record(w.stream);
        CHECK(record.status == 0);
        close(null);
        close_world(&w);
    }
    close(ends[0]);
    close(ends[1]);
    close(fd);
    return 0;
}
