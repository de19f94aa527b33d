// Whose ring it is: another thread is refused and changes nothing; a movable ring moves; an owner may exit.
#include "refused.h"
#include <pthread.h>

static struct world w;
static struct ringest_file *file;
static struct ringest_shared_buffers *shared;

static void *elsewhere(void *unused) {
    struct ringest_stream_counters stats;
    struct ringest_features features;
    every_stream_call(-EPERM, &w);
    every_submit_of(-EPERM, &w, file);
    every_ring_call(-EPERM, &w, shared);
    // What any thread may ask.
    CALL(1, ringest_stream_inflight, w.stream);
    CALL(1, ringest_stream_tail, w.stream);
    CALL(1, ringest_stream_is_registered, w.stream);
    CALL(0, ringest_stream_stats, w.stream, &stats);
    CALL(0, ringest_ring_features, w.ring, &features);
    CALL(DONE, ringest_ring_fd, w.ring);
    return unused;
}

static void *create_elsewhere(void *unused) {
    every_create(-EPERM, &w, NULL);
    return unused;
}

static int fd, ends[2];

// A movable ring: every step on a thread of its own.
static void *step(void *number) {
    struct ringest_completion record;
    switch ((int)(intptr_t)number) {
        case 0: CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, NULL, &w.stream); break;
        case 1: CALL(0, ringest_stream_submit_read, w.stream, fd, 5, 0, 4000, 0); break;
        case 2: CALL(1, ringest_stream_flush, w.stream); break;
        case 3:
            record = next_record(w.stream);
            CHECK(record.status == 0 && is_pattern(w.data, 5, 4000));
            break;
        case 4: CALL(0, ringest_ring_register_files, w.ring, &fd, 1); break;
        case 5: CALL(0, ringest_stream_close, w.stream, SECOND); break;
        default: CALL(0, ringest_ring_destroy, w.ring); break;
    }
    return NULL;
}

static void *leave_open(void *reading) {
    open_world(&w, 4096, 0, 0);
    if (reading) {
        CALL(0, ringest_stream_submit_read, w.stream, ends[0], 0, 0, 64, 0);
        CALL(1, ringest_stream_flush, w.stream);
    } else {
        CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, 64, 0);
        next_record(w.stream);
    }
    return NULL;
}

static void on_thread(void *(*body)(void *), void *argument) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, body, argument) == 0 && pthread_join(thread, NULL) == 0);
}

int main(void) {
    const struct ringest_buffer *list[1];
    struct ringest_completion record;
    struct ringest_leaks leaked;
    struct ringest_ring_options options = {sizeof options, RINGEST_RING_MOVABLE, 0, 0, 0, 0, 0, 0};
    int i;

    fd = data_file(8192);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    CALL(0, ringest_file_from_fd, fd, 0, &file);

    // Another thread, while the owner has one read done and one in flight.
    open_world(&w, 8192, 0, 0);
    list[0] = w.buffer;
    CALL(0, ringest_ring_register_buffers, w.ring, list, 1);
    CALL(0, ringest_ring_register_files, w.ring, &fd, 1);
    CALL(0, ringest_ring_share_buffers, w.ring, &shared);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, 4096, 0);
    next_record(w.stream);
    CALL(1, ringest_stream_submit_read, w.stream, ends[0], 0, 0, 4, 9);
    CALL(1, ringest_stream_flush, w.stream);
    on_thread(elsewhere, NULL);
    CHECK(write(ends[1], "data", 4) == 4);
    record = next_record(w.stream);
    CHECK(record.sequence == 1 && record.status == 0 && memcmp(w.data, "data", 4) == 0 && tail_of(&w) == 2);
    CHECK(state_of(&w) == RINGEST_STATE_OPEN);
    CALL(0, ringest_shared_buffers_free, shared);
    CALL(0, ringest_stream_destroy, w.stream);
    on_thread(create_elsewhere, NULL);
    // Still there for its owner; and any thread may destroy it.
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, NULL, &w.stream);
    close_world(&w);

    memset(&w, 0, sizeof w);
    CALL(0, ringest_ring_create, &options, &w.ring);
    CALL(0, ringest_mapped_alloc, 8192, NULL, &w.mapped);
    CALL(0, ringest_mapped_host_ptr, w.mapped, (void **)&w.data);
    CALL(0, ringest_mapped_share, w.mapped, &w.buffer);
    CALL(0, ringest_tail_line_alloc, &w.line);
    CALL(0, ringest_tail_line_host_ptr, w.line, &w.words);
    for (i = 0; i < 7; i++) on_thread(step, (void *)(intptr_t)i);
    CHECK(tail_of(&w) == 1);
    CALL(0, ringest_buffer_release, w.buffer);
    CALL(0, ringest_mapped_free, w.mapped);
    CALL(0, ringest_tail_line_free, w.line);

    // The owner has exited with nothing in flight: any thread may close, nothing is lost, and the consumer is told.
    on_thread(leave_open, NULL);
    CALL(-EPERM, ringest_stream_poll, w.stream);
    CALL(0, ringest_stream_close, w.stream, SECOND);
    CALL(-EBADF, ringest_stream_close, w.stream, SECOND);
    CHECK(state_of(&w) == RINGEST_STATE_ABORTED);
    w.stream = NULL;
    close_world(&w);
    CALL(0, ringest_leak_stats, &leaked);
    CHECK(leaked.rings == 0);

    // With a read in flight the ring and its memory have to be leaked.
    on_thread(leave_open, &w);
    CALL(-ETIMEDOUT, ringest_stream_destroy, w.stream);
    CALL(-EBADF, ringest_stream_destroy, w.stream);
    CHECK(state_of(&w) == RINGEST_STATE_ABORTED);
    CALL(0, ringest_leak_stats, &leaked);
    CHECK(leaked.rings == 1 && leaked.reads == 1 && leaked.bytes == 64);
    CALL(-ENODEV, ringest_ring_fd, w.ring);
    w.stream = NULL;
    close_world(&w);
    CALL(0, ringest_file_close, file);
    return 0;
}
