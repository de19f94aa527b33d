// A fork with reads in flight: the child is refused everything, the parent's reads complete.
#include "refused.h"

int main(void) {
    struct world w;
    struct ringest_shared_buffers *shared;
    struct ringest_file *file;
    struct ringest_ring *spare;
    struct ringest_mapped *unused;
    struct ringest_completion record;
    const struct ringest_buffer *list[1];
    int status, ends[2], fd = data_file(4096);
    pid_t child;

    CALL(0, ringest_ring_create, NULL, &spare);
    CALL(0, ringest_mapped_alloc, 8192, NULL, &unused);
    open_world(&w, 8192, 0, 0);
    list[0] = w.buffer;
    CALL(0, ringest_file_from_fd, fd, 0, &file);
    CALL(0, ringest_ring_register_buffers, w.ring, list, 1);
    CALL(0, ringest_ring_register_files, w.ring, &fd, 1);
    CALL(0, ringest_ring_share_buffers, w.ring, &shared);
    pending_read(&w, ends, 5);
    CALL(1, ringest_stream_submit_read, w.stream, fd, 0, 4096, 4096, 0);

    CHECK((child = fork()) >= 0);
    if (child == 0) {
        every_stream_call(-EPERM, &w);
        every_submit_of(-EPERM, &w, file);
        every_ring_call(-EPERM, &w, shared);
        CALL(2, ringest_stream_inflight, w.stream);
        CALL(DONE, ringest_ring_fd, w.ring);
        CALL(-EBUSY, ringest_ring_destroy, w.ring);
        // A ring of the child's own.
        struct world own;
        open_world(&own, 4096, 0, 0);
        CALL(0, ringest_stream_submit_read, own.stream, fd, 0, 0, 4096, 0);
        record = next_record(own.stream);
        CHECK(record.status == 0 && is_pattern(own.data, 0, 4096));
        close_world(&own);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(write(ends[1], "again", 5) == 5);
    CALL(2, ringest_stream_wait, w.stream, 2, 10 * SECOND);
    CALL(2, ringest_stream_poll, w.stream);
    CHECK(memcmp(w.data, "again", 5) == 0 && is_pattern(w.data + 4096, 0, 4096) && tail_of(&w) == 2);

    // In a child, memory of the parent's rings and streams is not there, and something else may be in its place: giving the
    // parent's handles up must not take that away.
    CHECK((child = fork()) >= 0);
    if (child == 0) {
        struct world own[8];
        size_t i;
        for (i = 0; i < 8; i++) open_world(&own[i], i % 2 ? 4096 : 8192, 0, 0);
        CALL(0, ringest_buffer_release, w.buffer);
        CALL(0, ringest_mapped_free, w.mapped);
        CALL(0, ringest_tail_line_free, w.line);
        CALL(0, ringest_ring_destroy, spare);
        CALL(0, ringest_mapped_free, unused);
        for (i = 0; i < 8; i++) {
            memset(own[i].data, 1, 4096);
            CALL(0, ringest_stream_submit_read, own[i].stream, fd, 0, 0, 4096, 0);
            record = next_record(own[i].stream);
            CHECK(record.status == 0 && is_pattern(own[i].data, 0, 4096));
            close_world(&own[i]);
        }
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);

    // A child that gives up handles of idle things, or simply exits, does not disturb the parent.
    CHECK((child = fork()) >= 0);
    if (child == 0) {
        CALL(0, ringest_file_close, file);
        CALL(0, ringest_shared_buffers_free, shared);
        CALL(0, ringest_tail_line_free, w.line);
        CALL(0, ringest_buffer_release, w.buffer);
        CALL(0, ringest_mapped_free, w.mapped);
        exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CALL(2, ringest_stream_submit_read_file, w.stream, file, 0, 0, 4096, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(w.data, 0, 4096));
    CALL(0, ringest_stream_close, w.stream, SECOND);
    w.stream = NULL;

    // So it is with an idle ring that the child destroys.
    CHECK((child = fork()) >= 0);
    if (child == 0) {
        every_create(-EPERM, &w, NULL);
        CALL(0, ringest_ring_destroy, w.ring);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, NULL, &w.stream);
    CALL(0, ringest_stream_submit_read_fixed, w.stream, fd, 0, 0, 0, 4096, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.path == RINGEST_READ_PATH_REGISTERED_READ);
    CALL(0, ringest_shared_buffers_free, shared);
    CALL(0, ringest_file_close, file);
    CALL(0, ringest_ring_destroy, spare);
    CALL(0, ringest_mapped_free, unused);
    close_world(&w);
    return 0;
}
