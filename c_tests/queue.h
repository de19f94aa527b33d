// What the programs about io_queues share: a queue, a consumer and a driver.
#ifndef RINGEST_QUEUE_H
#define RINGEST_QUEUE_H

#include "check.h"

#define SLOTS 4u
#define SLOT_BYTES 10000u

// A queue of SLOTS slots with a consumer on it, and a driver over a ring of its own.
struct pipeline {
    struct ringest_io_queue *queue;
    struct ringest_consumer *consumer;
    struct ringest_ring *ring;
    struct ringest_driver *driver;
};

UNUSED struct ringest_io_queue *small_queue(uint32_t mode, uint32_t consumers) {
    struct ringest_io_queue_options options;
    struct ringest_io_queue *queue;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.slots = SLOTS;
    options.slot_bytes = SLOT_BYTES;
    options.mode = mode;
    options.consumers = consumers;
    CALL(0, ringest_io_queue_create, &options, &queue);
    return queue;
}

UNUSED struct ringest_driver_options driver_options(uint32_t flags, uint32_t queue_limit) {
    struct ringest_driver_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.flags = flags;
    options.queue_limit = queue_limit;
    return options;
}

UNUSED void open_pipeline(struct pipeline *p, uint32_t ring_flags, uint32_t flags, uint32_t queue_limit) {
    struct ringest_ring_options ring;
    struct ringest_driver_options options = driver_options(flags, queue_limit);
    memset(&ring, 0, sizeof ring);
    ring.size = sizeof ring;
    ring.flags = ring_flags;
    p->queue = small_queue(RINGEST_CONSUME_MODE_SINGLE, 1);
    CALL(0, ringest_consumer_create, p->queue, 0, &p->consumer);
    CALL(0, ringest_ring_create, &ring, &p->ring);
    CALL(0, ringest_driver_create, p->ring, p->queue, &options, &p->driver);
}

UNUSED void close_pipeline(struct pipeline *p) {
    if (p->driver) CALL(0, ringest_driver_destroy, p->driver);
    CALL(0, ringest_ring_destroy, p->ring);
    if (p->consumer) CALL(0, ringest_consumer_destroy, p->consumer);
    CALL(0, ringest_io_queue_destroy, p->queue);
}

UNUSED struct ringest_ingest_request from_file(const struct ringest_file *file, uint64_t at, uint32_t len,
                                               uint64_t tag) {
    struct ringest_ingest_request request;
    memset(&request, 0, sizeof request);
    request.file = file;
    request.file_offset = at;
    request.len = len;
    request.tag = tag;
    return request;
}

UNUSED struct ringest_ingest_request from_fd(int fd, uint64_t at, uint32_t len, uint64_t tag) {
    struct ringest_ingest_request request = from_file(NULL, at, len, tag);
    request.source = RINGEST_INGEST_SOURCE_DESCRIPTOR;
    request.fd = fd;
    return request;
}

// Waits for one more record and takes it.
UNUSED struct ringest_ingest_completion next_end(struct ringest_driver *driver) {
    struct ringest_ingest_completion record;
    CALL(1, ringest_driver_wait_into, driver, &record, 1, 1, 10 * SECOND);
    return record;
}

// Publishes `len` bytes of the pattern from `at` on by hand.
UNUSED uint64_t publish_pattern(struct ringest_io_queue *queue, uint64_t at, uint32_t len) {
    struct ringest_slot slot;
    struct ringest_slot_data data;
    uint32_t i;
    CALL(0, ringest_io_queue_reserve, queue, &slot);
    memset(&data, 0, sizeof data);
    data.bytes = len;
    data.file_offset = at;
    data.data_offset = (uint32_t)(at % 16);
    data.tag = at;
    for (i = 0; i < len; i++) ((uint8_t *)slot.data)[data.data_offset + i] = pattern(at + i);
    CALL(0, ringest_io_queue_publish, queue, slot.sequence, &data);
    return slot.sequence;
}

// Pops the next slot, which is whole, checks it and releases it.
UNUSED uint64_t pop_pattern(struct ringest_consumer *consumer, uint64_t at, size_t len) {
    struct ringest_popped popped;
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_wait_pop, consumer, 10 * SECOND, &popped);
    CHECK(popped.descriptor.seq == popped.sequence + 1 && popped.descriptor.status == 0);
    CHECK(popped.descriptor.file_offset == at && popped.bytes == len && popped.descriptor.bytes == len);
    CHECK(is_pattern((const uint8_t *)popped.data, at, len));
    CALL(0, ringest_consumer_release, consumer, popped.sequence);
    return popped.sequence;
}

UNUSED void every_driver_call(int64_t expected, struct ringest_driver *driver, const struct ringest_file *file) {
    struct ringest_ingest_request request = from_file(file, 0, 64, 0);
    struct ringest_ingest_completion record;
    struct ringest_driver_counters counters;
    CALL(expected, ringest_driver_submit, driver, &request);
    CALL(expected, ringest_driver_submit_batch, driver, &request, 1);
    CALL(expected, ringest_driver_submit_file, driver, file, 0, 64, 0);
    CALL(expected, ringest_driver_poll, driver);
    CALL(expected, ringest_driver_poll_into, driver, &record, 1);
    CALL(expected, ringest_driver_wait, driver, 1, 0);
    CALL(expected, ringest_driver_wait_into, driver, &record, 1, 1, 0);
    CALL(expected, ringest_driver_drain, driver, 0);
    CALL(expected, ringest_driver_finish, driver);
    CALL(expected, ringest_driver_cancel, driver, 0);
    CALL(expected, ringest_driver_cancel_all, driver);
    CALL(expected, ringest_driver_reset_telemetry, driver);
    CALL(expected, ringest_driver_close, driver, 0, &counters);
    CALL(expected, ringest_driver_destroy, driver);
}

// Calls that only look.
UNUSED void every_driver_look(int64_t expected, struct ringest_driver *driver) {
    struct ringest_driver_counters counters;
    struct ringest_io_queue_view view;
    CALL(expected, ringest_driver_in_flight, driver);
    CALL(expected, ringest_driver_queued, driver);
    CALL(expected, ringest_driver_free_slots, driver);
    CALL(expected, ringest_driver_held_slots, driver);
    CALL(expected, ringest_driver_read_path, driver);
    CALL(expected, ringest_driver_is_registered, driver);
    CALL(expected, ringest_driver_telemetry, driver, &counters);
    CALL(expected, ringest_driver_device_view, driver, &view);
}

UNUSED void every_consumer_call(int64_t expected, struct ringest_consumer *consumer) {
    struct ringest_popped popped;
    CALL(expected, ringest_consumer_try_pop, consumer, &popped);
    CALL(expected, ringest_consumer_wait_pop, consumer, 0, &popped);
    CALL(expected, ringest_consumer_release, consumer, 0);
    CALL(expected, ringest_consumer_wait_tail, consumer, 0, 0);
    CALL(expected, ringest_consumer_hand_back, consumer);
    CALL(expected, ringest_consumer_abort, consumer, EIO);
    CALL(expected, ringest_consumer_error, consumer);
}

#endif
