// Whose driver it is: other threads, a busy one, an owner that exits, a forked child, reads that do not come back.
#include "queue.h"
#include <pthread.h>
#include <time.h>

static struct pipeline p;
static struct ringest_file *file;
static int fd, ends[2], waiting;

static void on_thread(void *(*body)(void *)) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, body, NULL) == 0 && pthread_join(thread, NULL) == 0);
}

static void *elsewhere(void *unused) {
    every_driver_call(-EPERM, p.driver, file);
    every_driver_look(DONE, p.driver);
    CALL(0, ringest_io_queue_consumers_stopped, p.queue);
    return unused;
}

static void *create_elsewhere(void *unused) {
    struct ringest_driver *none = NULL;
    CALL(-EPERM, ringest_driver_create, p.ring, p.queue, NULL, &none);
    CHECK(!none);
    return unused;
}

static void *wait_long(void *unused) {
    __atomic_store_n(&waiting, 1, __ATOMIC_RELEASE);
    CALL(1, ringest_driver_wait, p.driver, 1, 60 * SECOND);
    return unused;
}

static void *move_on(void *unused) {
    struct ringest_ingest_request request = from_fd(fd, 9, 100, 0);
    CALL(DONE, ringest_driver_submit, p.driver, &request);
    CHECK(next_end(p.driver).status == 0);
    return unused;
}

static void *leave_open(void *unused) {
    open_pipeline(&p, 0, 0, 0);
    return unused;
}

static void *leave_reading(void *unused) {
    struct ringest_ingest_request request = from_fd(ends[0], 0, 64, 0);
    open_pipeline(&p, 0, 0, 0);
    CALL(0, ringest_driver_submit, p.driver, &request);
    CALL(0, ringest_driver_poll, p.driver);
    return unused;
}

static void busy(void) {
    struct ringest_ingest_request request = from_fd(ends[0], 0, 4, 0);
    struct ringest_features features;
    struct ringest_driver *none = NULL;
    struct timespec pause = {0, 20000000};
    pthread_t thread;

    open_pipeline(&p, RINGEST_RING_MOVABLE, 0, 0);
    CALL(0, ringest_driver_submit, p.driver, &request);
    CHECK(pthread_create(&thread, NULL, wait_long, NULL) == 0);
    while (!__atomic_load_n(&waiting, __ATOMIC_ACQUIRE)) nanosleep(&pause, NULL);
    nanosleep(&pause, NULL);
    every_driver_call(-EBUSY, p.driver, file);
    every_driver_look(-EBUSY, p.driver);
    CALL(-EBUSY, ringest_ring_features, p.ring, &features);
    CALL(-EBUSY, ringest_ring_fd, p.ring);
    CALL(-EBUSY, ringest_ring_unregister_files, p.ring);
    CALL(-EBUSY, ringest_driver_create, p.ring, p.queue, NULL, &none);
    CHECK(write(ends[1], "data", 4) == 4);
    CHECK(pthread_join(thread, NULL) == 0);
    CALL(1, ringest_driver_poll, p.driver);
    // A movable ring's driver goes from thread to thread.
    on_thread(move_on);
    on_thread(move_on);
    close_pipeline(&p);
}

static void forked(void) {
    struct ringest_ingest_request request = from_fd(ends[0], 0, 4, 0);
    struct ringest_ingest_completion record;
    struct ringest_io_queue *spare = small_queue(RINGEST_CONSUME_MODE_CLAIMED, 1);
    struct ringest_consumer *ticket, *none = NULL;
    struct ringest_popped popped;
    struct ringest_slot_data data;
    struct ringest_slot slot;
    int status;
    pid_t child;

    open_pipeline(&p, 0, 0, 0);
    CALL(0, ringest_consumer_create, spare, 0, &ticket);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, ticket, &popped);
    CALL(0, ringest_driver_submit, p.driver, &request);
    CALL(0, ringest_driver_poll, p.driver);
    CHECK((child = fork()) >= 0);
    if (child == 0) {
        memset(&data, 0, sizeof data);
        every_driver_call(-EPERM, p.driver, file);
        CALL(1, ringest_driver_in_flight, p.driver);
        CALL(-EPERM, ringest_driver_free_slots, p.driver);
        every_consumer_call(-EPERM, p.consumer);
        CALL(-EPERM, ringest_consumer_create, spare, 0, &none);
        CALL(-EPERM, ringest_io_queue_reserve, p.queue, &slot);
        CALL(-EPERM, ringest_io_queue_publish, p.queue, 0, &data);
        CALL(-EPERM, ringest_io_queue_finish, p.queue);
        CALL(-EPERM, ringest_io_queue_abort, p.queue, EIO);
        CALL(-EPERM, ringest_io_queue_aborted, p.queue);
        CALL(-EPERM, ringest_io_queue_free_slots, p.queue);
        CALL(1, ringest_io_queue_reserved, p.queue);
        // Given up, they leave the parent's alone.
        CALL(0, ringest_consumer_destroy, p.consumer);
        CALL(-EBUSY, ringest_io_queue_destroy, p.queue);
        CALL(0, ringest_consumer_destroy, ticket);
        CALL(0, ringest_io_queue_destroy, spare);
        // And what the child makes works.
        open_pipeline(&p, 0, 0, 0);
        move_on(NULL);
        close_pipeline(&p);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(write(ends[1], "more", 4) == 4);
    record = next_end(p.driver);
    CHECK(record.status == 0);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_try_pop, p.consumer, &popped);
    CHECK(memcmp(popped.data, "more", 4) == 0);
    publish_pattern(spare, 0, 10);
    pop_pattern(ticket, 0, 10);
    CALL(0, ringest_consumer_destroy, ticket);
    CALL(0, ringest_io_queue_destroy, spare);
    close_pipeline(&p);
}

int main(void) {
    struct ringest_driver_counters counters;
    struct ringest_driver *none = NULL;
    struct ringest_popped popped;
    struct ringest_leaks leaked;
    struct ringest_ingest_request request;

    fd = data_file(4096);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    CALL(0, ringest_file_from_fd, fd, 0, &file);

    // Another thread, while a read is in flight.
    open_pipeline(&p, 0, 0, 0);
    request = from_fd(ends[0], 0, 4, 0);
    CALL(0, ringest_driver_submit, p.driver, &request);
    CALL(0, ringest_driver_poll, p.driver);
    on_thread(elsewhere);
    CHECK(write(ends[1], "data", 4) == 4);
    CHECK(next_end(p.driver).status == 0);
    CALL(0, ringest_driver_destroy, p.driver);
    on_thread(create_elsewhere);
    CALL(0, ringest_driver_create, p.ring, p.queue, NULL, &p.driver);
    close_pipeline(&p);

    if (!on_valgrind()) {
        busy();
        forked();
    }

    // The owner has exited with nothing in flight: any thread may close, and the consumer is told.
    on_thread(leave_open);
    CALL(-EPERM, ringest_driver_poll, p.driver);
    CALL(0, ringest_driver_close, p.driver, SECOND, &counters);
    CALL(-EBADF, ringest_driver_close, p.driver, SECOND, NULL);
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_try_pop, p.consumer, &popped);
    CALL(-ENODEV, ringest_driver_create, p.ring, p.queue, NULL, &none);
    CALL(-ENODEV, ringest_driver_create_gpudirect, p.ring, p.queue, NULL, &none);
    p.driver = NULL;
    close_pipeline(&p);
    CALL(0, ringest_leak_stats, &leaked);
    CHECK(leaked.rings == 0 && leaked.reads == 0);

    // With a read in flight ring and memory have to be leaked.
    on_thread(leave_reading);
    CALL(-ETIMEDOUT, ringest_driver_destroy, p.driver);
    CALL(-EBADF, ringest_driver_destroy, p.driver);
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_try_pop, p.consumer, &popped);
    CALL(-ENODEV, ringest_ring_fd, p.ring);
    p.driver = NULL;
    close_pipeline(&p);

    // What was counted is told nevertheless.
    on_thread(leave_reading);
    CALL(-ETIMEDOUT, ringest_driver_close, p.driver, SECOND, &counters);
    CHECK(counters.leaked_reads == 1 && counters.cancelled == 1 && counters.early_poisoned_slots == 1);
    p.driver = NULL;
    close_pipeline(&p);
    CALL(0, ringest_leak_stats, &leaked);
    CHECK(leaked.rings == 2 && leaked.reads == 2 && leaked.queues == 0);
    CALL(0, ringest_file_close, file);
    return 0;
}
