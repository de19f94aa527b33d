// Two threads at one handle: the second is told -EBUSY.
#include "refused.h"
#include <pthread.h>
#include <time.h>

static struct world w;
static struct ringest_file *file;
static int waiting, stop;

static void *wait_long(void *unused) {
    __atomic_store_n(&waiting, 1, __ATOMIC_RELEASE);
    CALL(1, ringest_stream_wait, w.stream, 1, 60 * SECOND);
    return unused;
}

// Hammers on handles with calls that several threads may make at once, while the main thread makes exclusive ones.
static struct ringest_mapped *mapped;
static struct ringest_buffer *buffer;
static struct ringest_tail_line *line;
static struct ringest_file *source;
static struct ringest_shared_buffers *shares;
static struct ringest_ring *target;

static void note_busy(const char *function, int64_t result) {
    if (result == -EBUSY) cover(function, "-EBUSY");
}

static void *hammer(void *unused) {
    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        uint64_t device;
        note_busy("ringest_mapped_size", ringest_mapped_size(__atomic_load_n(&mapped, __ATOMIC_RELAXED)));
        ringest_mapped_device_ptr(__atomic_load_n(&mapped, __ATOMIC_RELAXED), &device);
        ringest_buffer_device_ptr(__atomic_load_n(&buffer, __ATOMIC_RELAXED), &device);
        ringest_tail_line_device_ptr(__atomic_load_n(&line, __ATOMIC_RELAXED), &device);
        ringest_file_size(__atomic_load_n(&source, __ATOMIC_RELAXED));
    }
    return unused;
}

static void *hammer_clone(void *unused) {
    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) ringest_ring_clone_buffers(target, __atomic_load_n(&shares, __ATOMIC_RELAXED));
    return unused;
}

// Until -EBUSY was seen of a call that ends handles: makes one handle after the other.
#define UNTIL_BUSY(seen, function, handle, make)                                                                       \
    if (!(seen)) {                                                                                                     \
        int64_t rc = function(handle);                                                                                 \
        if (rc == -EBUSY) {                                                                                            \
            seen = true;                                                                                               \
            COVER_CALL(function, rc);                                                                                  \
        } else {                                                                                                       \
            CHECK(rc == 0);                                                                                            \
            make;                                                                                                      \
        }                                                                                                              \
    }

int main(void) {
    struct ringest_stream_counters stats;
    struct ringest_features features;
    const struct ringest_buffer *list[1];
    pthread_t thread, other;
    struct timespec pause = {0, 50000000}, start, now;
    bool freed = false, released = false, lined = false, closed = false, shared_once = false, unshared = false, sized;
    int ends[2], fd = data_file(4096);

    // A long call: a wait. Its thread owns the ring, everybody else is too early.
    open_world(&w, 4096, RINGEST_RING_MOVABLE, 0);
    list[0] = w.buffer;
    CALL(0, ringest_ring_register_buffers, w.ring, list, 1);
    CALL(0, ringest_ring_share_buffers, w.ring, &shares);
    CALL(0, ringest_file_from_fd, fd, 0, &file);
    pending_read(&w, ends, 1);
    CHECK(pthread_create(&thread, NULL, wait_long, NULL) == 0);
    while (!__atomic_load_n(&waiting, __ATOMIC_ACQUIRE)) nanosleep(&pause, NULL);
    nanosleep(&pause, NULL);
    every_stream_call(-EBUSY, &w);
    every_submit_of(-EBUSY, &w, file);
    every_ring_call(-EBUSY, &w, shares);
    every_create(-EBUSY, &w, NULL);
    CALL(-EBUSY, ringest_stream_inflight, w.stream);
    CALL(-EBUSY, ringest_stream_tail, w.stream);
    CALL(-EBUSY, ringest_stream_is_registered, w.stream);
    CALL(-EBUSY, ringest_stream_stats, w.stream, &stats);
    CALL(-EBUSY, ringest_ring_features, w.ring, &features);
    CALL(-EBUSY, ringest_ring_fd, w.ring);
    CALL(-EBUSY, ringest_ring_destroy, w.ring);
    CHECK(write(ends[1], "x", 1) == 1);
    CHECK(pthread_join(thread, NULL) == 0);
    CALL(1, ringest_stream_poll, w.stream);
    CHECK(w.data[0] == 'x');

    // Short calls, until they meet.
    CALL(0, ringest_ring_create, NULL, &target);
    CALL(0, ringest_mapped_alloc, 4096, NULL, &mapped);
    CALL(0, ringest_mapped_share, mapped, &buffer);
    CALL(0, ringest_tail_line_alloc, &line);
    CALL(0, ringest_file_from_fd, fd, 0, &source);
    CHECK(pthread_create(&thread, NULL, hammer, NULL) == 0);
    CHECK(pthread_create(&other, NULL, hammer_clone, NULL) == 0);
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        struct ringest_buffer *second;
        int64_t rc = ringest_mapped_share(mapped, &second);
        if (rc == 0) {
            CALL(0, ringest_buffer_release, second);
        } else {
            CHECK(rc == -EBUSY);
            COVER_CALL(ringest_mapped_share, rc);
            shared_once = true;
        }
        UNTIL_BUSY(freed, ringest_mapped_free, mapped, CALL(0, ringest_mapped_alloc, 4096, NULL, &mapped));
        UNTIL_BUSY(released, ringest_buffer_release, buffer, while (ringest_mapped_share(mapped, &buffer) != 0));
        UNTIL_BUSY(lined, ringest_tail_line_free, line, CALL(0, ringest_tail_line_alloc, &line));
        UNTIL_BUSY(closed, ringest_file_close, source, CALL(0, ringest_file_from_fd, fd, 0, &source));
        UNTIL_BUSY(unshared, ringest_shared_buffers_free, shares, CALL(0, ringest_ring_share_buffers, w.ring, &shares));
        clock_gettime(CLOCK_MONOTONIC, &now);
        sized = now.tv_sec - start.tv_sec >= 2;
    } while (now.tv_sec - start.tv_sec < 30 &&
             !(freed && released && lined && closed && shared_once && unshared && sized));
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    CHECK(pthread_join(thread, NULL) == 0 && pthread_join(other, NULL) == 0);
    CALL(0, ringest_ring_destroy, target);
    CALL(0, ringest_shared_buffers_free, shares);
    CALL(0, ringest_file_close, source);
    CALL(0, ringest_tail_line_free, line);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_mapped_free, mapped);
    CALL(0, ringest_file_close, file);
    close_world(&w);
    close(ends[0]);
    close(ends[1]);
    return 0;
}
