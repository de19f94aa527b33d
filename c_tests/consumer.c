// Consumers on the CPU: every mode, what a pop gives, and what a consumer must have popped to release it.
#include "queue.h"
#include <pthread.h>
#include <time.h>

static void single(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_SINGLE, 1);
    struct ringest_consumer *consumer;
    struct ringest_popped popped, untouched;
    struct ringest_slot slot;
    struct ringest_slot_data data;
    struct timespec before, after;
    uint32_t i;

    CALL(0, ringest_consumer_create, queue, 0, &consumer);
    CALL(-EINVAL, ringest_consumer_try_pop, consumer, NULL);
    CALL(-EINVAL, ringest_consumer_wait_pop, consumer, 0, NULL);
    memset(&popped, 0xab, sizeof popped);
    untouched = popped;
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, consumer, &popped);
    clock_gettime(CLOCK_MONOTONIC, &before);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_wait_pop, consumer, SECOND / 20, &popped);
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK((after.tv_sec - before.tv_sec) * SECOND + after.tv_nsec - before.tv_nsec >= SECOND / 20);
    CHECK(memcmp(&popped, &untouched, sizeof popped) == 0);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_wait_tail, consumer, 0, 0);

    for (i = 0; i < 3; i++) publish_pattern(queue, 100 * i, 100);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_wait_tail, consumer, 2, SECOND);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_wait_tail, consumer, 3, 1000);
    CALL(-EINVAL, ringest_consumer_release, consumer, 0);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_try_pop, consumer, &popped);
    for (i = 0; i < 5; i++) CHECK(popped.reserved[i] == 0);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_try_pop, consumer, &popped);
    // In any order, once each, nothing else.
    CALL(0, ringest_consumer_release, consumer, 1);
    CALL(-EINVAL, ringest_consumer_release, consumer, 1);
    CALL(-EINVAL, ringest_consumer_release, consumer, 2);
    CALL(-EINVAL, ringest_consumer_release, consumer, 4);
    CALL(-EINVAL, ringest_consumer_release, consumer, 5);
    CALL(-EINVAL, ringest_consumer_release, consumer, UINT64_MAX);
    CALL(0, ringest_consumer_release, consumer, 0);
    CALL(0, ringest_consumer_hand_back, consumer);

    // What failed is there too, with the bytes that are in place.
    CALL(0, ringest_io_queue_reserve, queue, &slot);
    memset(&data, 0, sizeof data);
    data.status = -ENODATA;
    data.bytes = 3;
    memcpy(slot.data, "abc", 3);
    CALL(0, ringest_io_queue_publish, queue, slot.sequence, &data);
    CALL(RINGEST_OUTCOME_POISON, ringest_consumer_wait_tail, consumer, 3, SECOND);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_wait_tail, consumer, 2, SECOND);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_wait_pop, consumer, -1, &popped);
    CALL(0, ringest_consumer_release, consumer, 2);
    CALL(RINGEST_OUTCOME_POISON, ringest_consumer_wait_pop, consumer, -1, &popped);
    CHECK(popped.sequence == 3 && popped.descriptor.status == -ENODATA && popped.bytes == 3);
    CHECK(memcmp(popped.data, "abc", 3) == 0);
    CALL(0, ringest_consumer_error, consumer);

    // Destroyed with a slot in hand: it is released, and another consumer goes on behind it.
    CALL(3, ringest_io_queue_free_slots, queue);
    CALL(0, ringest_consumer_destroy, consumer);
    CALL(-EBADF, ringest_consumer_destroy, consumer);
    CALL(4, ringest_io_queue_free_slots, queue);
    CALL(0, ringest_consumer_create, queue, 0, &consumer);
    CHECK(publish_pattern(queue, 5, 7) == 4);
    CHECK(pop_pattern(consumer, 5, 7) == 4);
    CALL(1, ringest_io_queue_finish, queue);
    CALL(RINGEST_OUTCOME_END, ringest_consumer_wait_pop, consumer, -1, &popped);
    // After a failure the tail alone tells nothing good any more.
    CALL(RINGEST_OUTCOME_POISON, ringest_consumer_wait_tail, consumer, 5, -1);
    CALL(0, ringest_consumer_destroy, consumer);
    CALL(0, ringest_io_queue_destroy, queue);
}

static void partitioned(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_PARTITIONED, 2);
    struct ringest_consumer *even, *odd;
    struct ringest_popped popped;
    uint64_t n;

    CALL(0, ringest_consumer_create, queue, 0, &even);
    CALL(0, ringest_consumer_create, queue, 1, &odd);
    for (n = 0; n < 10; n += 2) {
        publish_pattern(queue, n, 50);
        CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, odd, &popped);
        publish_pattern(queue, n + 1, 50);
        CHECK(pop_pattern(odd, n + 1, 50) == n + 1);
        // It is the other's.
        CALL(-EINVAL, ringest_consumer_release, odd, n);
        CHECK(pop_pattern(even, n, 50) == n);
    }
    CALL(1, ringest_io_queue_finish, queue);
    CALL(RINGEST_OUTCOME_END, ringest_consumer_try_pop, even, &popped);
    CALL(RINGEST_OUTCOME_END, ringest_consumer_try_pop, odd, &popped);
    CALL(RINGEST_OUTCOME_END, ringest_consumer_wait_tail, even, 10, SECOND);
    CALL(0, ringest_consumer_destroy, even);
    CALL(0, ringest_consumer_destroy, odd);
    CALL(0, ringest_io_queue_destroy, queue);
}

static void claimed(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_CLAIMED, 2);
    struct ringest_consumer *first, *second;
    struct ringest_popped popped;

    CALL(0, ringest_consumer_create, queue, 0, &first);
    CALL(0, ringest_consumer_create, queue, 1, &second);
    CALL(0, ringest_consumer_hand_back, first);
    // Each has a ticket: for 0 and for 1.
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, first, &popped);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, second, &popped);
    publish_pattern(queue, 0, 50);
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, second, &popped);
    CALL(1, ringest_consumer_hand_back, first);
    CALL(0, ringest_consumer_hand_back, first);
    // Who waits takes the lower one over.
    CHECK(pop_pattern(second, 0, 50) == 0);
    publish_pattern(queue, 1, 50);
    CHECK(pop_pattern(first, 1, 50) == 1);
    // A ticket goes back with its consumer.
    CALL(RINGEST_OUTCOME_TIMEOUT, ringest_consumer_try_pop, first, &popped);
    CALL(0, ringest_consumer_destroy, first);
    publish_pattern(queue, 2, 50);
    CHECK(pop_pattern(second, 2, 50) == 2);
    CALL(0, ringest_consumer_destroy, second);
    CALL(0, ringest_io_queue_destroy, queue);
}

static void broadcast(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_BROADCAST, 2);
    struct ringest_consumer *first, *second;
    struct ringest_slot slot;
    uint64_t n;

    CALL(0, ringest_consumer_create, queue, 0, &first);
    CALL(0, ringest_consumer_create, queue, 1, &second);
    for (n = 0; n < 12; n += SLOTS) {
        uint64_t i;
        for (i = n; i < n + SLOTS; i++) publish_pattern(queue, i, 50);
        for (i = n; i < n + SLOTS; i++) CHECK(pop_pattern(first, i, 50) == i);
        // The other has not released them.
        CALL(-EAGAIN, ringest_io_queue_reserve, queue, &slot);
        for (i = n; i < n + SLOTS; i++) CHECK(pop_pattern(second, i, 50) == i);
        CALL(SLOTS, ringest_io_queue_free_slots, queue);
    }
    CALL(0, ringest_consumer_destroy, first);
    CALL(0, ringest_consumer_destroy, second);
    CALL(0, ringest_io_queue_destroy, queue);
}

static void give_up(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_PARTITIONED, 2);
    struct ringest_consumer *first, *second;
    struct ringest_popped popped;

    CALL(0, ringest_consumer_create, queue, 0, &first);
    CALL(0, ringest_consumer_create, queue, 1, &second);
    CALL(-EINVAL, ringest_consumer_abort, first, 0);
    CALL(-EINVAL, ringest_consumer_abort, first, 5000);
    CALL(0, ringest_consumer_abort, first, ENOSPC);
    CALL(0, ringest_consumer_abort, second, EIO);
    CALL(0, ringest_consumer_error, second);
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_wait_pop, second, -1, &popped);
    CALL(ENOSPC, ringest_consumer_error, second);
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_wait_tail, first, 0, -1);
    CALL(ENOSPC, ringest_io_queue_aborted, queue);
    CALL(0, ringest_consumer_destroy, first);
    CALL(0, ringest_consumer_destroy, second);
    CALL(0, ringest_io_queue_destroy, queue);
}

// One thread waits with a consumer; others are told so, and end its wait by the queue.
static struct ringest_consumer *watched;
static int waiting;

static void *wait_long(void *unused) {
    struct ringest_popped popped;
    __atomic_store_n(&waiting, 1, __ATOMIC_RELEASE);
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_wait_pop, watched, -1, &popped);
    CALL(EPIPE, ringest_consumer_error, watched);
    return unused;
}

static void busy(void) {
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_SINGLE, 1);
    struct timespec pause = {0, 20000000};
    pthread_t thread;

    CALL(0, ringest_consumer_create, queue, 0, &watched);
    CHECK(pthread_create(&thread, NULL, wait_long, NULL) == 0);
    while (!__atomic_load_n(&waiting, __ATOMIC_ACQUIRE)) nanosleep(&pause, NULL);
    nanosleep(&pause, NULL);
    every_consumer_call(-EBUSY, watched);
    CALL(-EBUSY, ringest_consumer_destroy, watched);
    CALL(1, ringest_io_queue_abort, queue, EPIPE);
    CHECK(pthread_join(thread, NULL) == 0);
    CALL(0, ringest_consumer_destroy, watched);
    CALL(0, ringest_io_queue_destroy, queue);
}

int main(void) {
    single();
    partitioned();
    claimed();
    broadcast();
    give_up();
    if (!on_valgrind()) busy();
    return 0;
}
