// Drivers: every source, what fails and how it is told, cancellation, deadlines, the queue of requests, and the end.
#include "queue.h"

enum { SIZE = 1 << 20 };

static int fd;

// Every way to name a file; every record checked against the slot that it published.
static void requests(void) {
    struct pipeline p;
    struct ringest_file *file;
    struct ringest_ingest_request request, batch[8];
    struct ringest_ingest_completion record, records[8];
    struct ringest_driver_counters counters;
    struct ringest_io_queue_view view;
    struct ringest_popped popped;
    uint64_t done;
    int64_t rc;
    int i;

    open_pipeline(&p, 0, RINGEST_DRIVER_CRC32C, 0);
    CALL(-EBUSY, ringest_ring_destroy, p.ring);
    CALL(-EBUSY, ringest_io_queue_destroy, p.queue);
    CALL(0, ringest_file_from_fd, fd, RINGEST_DIRECT_AUTO, &file);
    CALL(0, ringest_ring_register_files, p.ring, &fd, 1);
    CALL(1, ringest_driver_is_registered, p.driver);
    CALL(RINGEST_NATIVE_READ_PATH_REGISTERED_MAPPED_READ, ringest_driver_read_path, p.driver);
    CALL(SLOTS, ringest_driver_free_slots, p.driver);
    CALL(0, ringest_driver_device_view, p.driver, &view);
    CHECK(view.slot_count == SLOTS && view.magic == RINGEST_IO_QUEUE_MAGIC);
    CALL(-EINVAL, ringest_driver_device_view, p.driver, NULL);
    CALL(0, ringest_io_queue_consumers_stopped, p.queue);

    request = from_file(file, 12345, 6789, 42);
    CALL(0, ringest_driver_submit, p.driver, &request);
    CALL(1, ringest_driver_in_flight, p.driver);
    record = next_end(p.driver);
    CHECK(record.request == 0 && record.sequence == 0 && record.tag == 42 && record.file_offset == 12345);
    CHECK(record.requested == 6789 && record.bytes == 6789 && record.status == 0 && record.latency_ns > 0);
    CHECK(record.path == RINGEST_READ_PATH_REGISTERED_READ);
    for (i = 0; i < 4; i++) CHECK(record.reserved[i] == 0);
    CALL(RINGEST_OUTCOME_OK, ringest_consumer_try_pop, p.consumer, &popped);
    {
        uint32_t crc;
        CALL(0, ringest_crc32c, 0, popped.data, popped.bytes, &crc);
        CHECK(popped.descriptor.flags == RINGEST_DESCRIPTOR_CRC32C && popped.descriptor.crc32c == crc);
        CHECK(popped.descriptor.tag == 42 && popped.descriptor.path == record.path);
        CHECK((uintptr_t)popped.data % 16 == 12345 % 16 && is_pattern((const uint8_t *)popped.data, 12345, 6789));
    }
    CALL(0, ringest_consumer_release, p.consumer, popped.sequence);

    request = from_fd(fd, 7, SLOT_BYTES, 1);
    CALL(1, ringest_driver_submit, p.driver, &request);
    request = from_file(NULL, 100001, 5000, 2);
    request.source = RINGEST_INGEST_SOURCE_FIXED_FILE;
    CALL(2, ringest_driver_submit, p.driver, &request);
    request = from_file(file, 5, 0, 3); // nothing is a slot, too
    CALL(3, ringest_driver_submit, p.driver, &request);
    CALL(3, ringest_driver_wait, p.driver, 3, 10 * SECOND);
    CALL(3, ringest_driver_poll, p.driver);
    CALL(0, ringest_driver_poll, p.driver);
    pop_pattern(p.consumer, 7, SLOT_BYTES);
    pop_pattern(p.consumer, 100001, 5000);
    pop_pattern(p.consumer, 5, 0);

    // What cannot be accepted.
    CALL(-EINVAL, ringest_driver_submit, p.driver, NULL);
    request = from_file(NULL, 0, 1, 0);
    CALL(-EBADF, ringest_driver_submit, p.driver, &request);
    request.source = 3;
    CALL(-EINVAL, ringest_driver_submit, p.driver, &request);
    request.source = RINGEST_INGEST_SOURCE_FIXED_FILE;
    request.file_index = 1;
    CALL(-ERANGE, ringest_driver_submit, p.driver, &request);
    CALL(0, ringest_ring_update_file, p.ring, 0, -1);
    request.file_index = 0;
    CALL(-EINVAL, ringest_driver_submit, p.driver, &request);
    request = from_file(file, 0, SLOT_BYTES + 1, 0);
    CALL(-ERANGE, ringest_driver_submit, p.driver, &request);
    request = from_file(file, INT64_MAX, 1, 0);
    CALL(-ERANGE, ringest_driver_submit, p.driver, &request);
    request = from_file(file, 0, 1, 0);
    request.reserved[1] = 1;
    CALL(-EINVAL, ringest_driver_submit, p.driver, &request);

    // Batches: as far as there is room, up to the first that is refused.
    CALL(0, ringest_driver_submit_batch, p.driver, NULL, 0);
    CALL(-EINVAL, ringest_driver_submit_batch, p.driver, NULL, 1);
    for (i = 0; i < 8; i++) batch[i] = from_file(file, (uint64_t)i * 10000, 10000, (uint64_t)i);
    batch[2].source = 9;
    CALL(2, ringest_driver_submit_batch, p.driver, batch, 8);
    CALL(-EINVAL, ringest_driver_submit_batch, p.driver, batch + 2, 6);
    batch[2].source = RINGEST_INGEST_SOURCE_FILE;
    batch[2].file = NULL;
    CALL(-EBADF, ringest_driver_submit_batch, p.driver, batch + 2, 6);
    batch[2].file = file;
    batch[2].len = SLOT_BYTES + 1;
    CALL(-ERANGE, ringest_driver_submit_batch, p.driver, batch + 2, 6);
    batch[2].len = SLOT_BYTES;
    CALL(2, ringest_driver_submit_batch, p.driver, batch + 2, 6);
    CALL(-EAGAIN, ringest_driver_submit_batch, p.driver, batch + 4, 4);
    CALL(-EAGAIN, ringest_driver_submit, p.driver, batch + 4);
    CALL(-EAGAIN, ringest_driver_submit_file, p.driver, file, 0, 1, 0);
    CALL(-EINVAL, ringest_driver_poll_into, p.driver, NULL, 1);
    CALL(-EINVAL, ringest_driver_wait_into, p.driver, NULL, 1, 1, 0);
    CALL(0, ringest_driver_poll_into, p.driver, NULL, 0);
    CALL(0, ringest_driver_wait_into, p.driver, NULL, 0, 5, -1);
    CALL(0, ringest_driver_drain, p.driver, 10 * SECOND);
    CALL(3, ringest_driver_poll_into, p.driver, records, 3);
    CALL(1, ringest_driver_wait_into, p.driver, records, 8, UINT32_MAX, -1);
    CALL(0, ringest_driver_wait_into, p.driver, records, 8, 1, -1);
    // Only the consumer can make progress now.
    CALL(-EAGAIN, ringest_driver_submit, p.driver, batch + 4);
    CHECK(strstr(ringest_last_error(), "release"));
    for (i = 0; i < 4; i++) pop_pattern(p.consumer, (uint64_t)i * 10000, 10000);

    // A whole file.
    CALL(-EBADF, ringest_driver_submit_file, p.driver, NULL, 0, 1, 0);
    CALL(-ERANGE, ringest_driver_submit_file, p.driver, file, INT64_MAX, 1, 0);
    for (done = 0; done < SIZE;) {
        uint64_t at;
        rc = CALL(DONE, ringest_driver_submit_file, p.driver, file, done, SIZE - done, 5);
        CALL(0, ringest_driver_drain, p.driver, -1);
        CALL(DONE, ringest_driver_poll, p.driver);
        for (at = done; at < done + (uint64_t)rc; at += SLOT_BYTES)
            pop_pattern(p.consumer, at, SIZE - at < SLOT_BYTES ? SIZE - at : SLOT_BYTES);
        done += (uint64_t)rc;
    }

    CALL(0, ringest_driver_telemetry, p.driver, &counters);
    CHECK(counters.submitted == 8 + (SIZE + SLOT_BYTES - 1) / SLOT_BYTES && counters.failed == 0);
    CHECK(counters.completed == counters.submitted && counters.completed_bytes == counters.submitted_bytes);
    CHECK(counters.path_reads[RINGEST_READ_PATH_REGISTERED_READ] + counters.path_reads[RINGEST_READ_PATH_NONE] ==
          counters.completed);
    CHECK(counters.latency_count == counters.completed && counters.latency_p50_ns <= counters.latency_p99_ns);
    CHECK(counters.latency_p99_ns <= counters.latency_p999_ns && counters.latency_p999_ns <= counters.latency_max_ns);
    CHECK(counters.max_in_flight == SLOTS && counters.in_flight == 0 && counters.credit_stalls > 0);
    for (i = 0; i < 21; i++) CHECK(counters.reserved[i] == 0);
    CALL(-EINVAL, ringest_driver_telemetry, p.driver, NULL);
    CALL(0, ringest_driver_reset_telemetry, p.driver);
    CALL(0, ringest_driver_telemetry, p.driver, &counters);
    CHECK(counters.submitted == 0 && counters.latency_count == 0);

    // The end; then the ring serves another.
    request = from_file(file, 3, 100, 0);
    CALL(DONE, ringest_driver_submit, p.driver, &request);
    CALL(0, ringest_driver_finish, p.driver);
    CALL(-EBUSY, ringest_driver_submit, p.driver, &request);
    CALL(-EBUSY, ringest_driver_submit_batch, p.driver, &request, 1);
    CALL(-EBUSY, ringest_driver_submit_file, p.driver, file, 0, 1, 0);
    CALL(0, ringest_driver_drain, p.driver, 10 * SECOND);
    CALL(0, ringest_driver_close, p.driver, SECOND, &counters);
    CHECK(counters.submitted == 1 && counters.completed == 1 && counters.leaked_reads == 0);
    pop_pattern(p.consumer, 3, 100);
    CALL(RINGEST_OUTCOME_END, ringest_consumer_wait_pop, p.consumer, -1, &popped);
    CALL(0, ringest_driver_create, p.ring, p.queue, NULL, &p.driver);
    CALL(-EBUSY, ringest_driver_submit, p.driver, &request);
    CALL(0, ringest_file_close, file);
    close_pipeline(&p);
}

// A request that fails is a record and a poisoned slot, and nothing waits for it.
static void failures(void) {
    struct pipeline p;
    struct ringest_ingest_request request;
    struct ringest_ingest_completion record;
    struct ringest_driver_counters counters;
    struct ringest_popped popped;
    struct ringest_slot slot;
    int ends[2], folder;

    open_pipeline(&p, 0, 0, 2);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    request = from_fd(fd, SIZE - 10, 100, 1);
    CALL(0, ringest_driver_submit, p.driver, &request);
    record = next_end(p.driver);
    CHECK(record.status == -ENODATA && record.bytes == 10 && record.requested == 100);
    CALL(RINGEST_OUTCOME_POISON, ringest_consumer_try_pop, p.consumer, &popped);
    CHECK(popped.descriptor.status == -ENODATA && popped.bytes == 10);
    CHECK(is_pattern((const uint8_t *)popped.data, SIZE - 10, 10));
    CALL(0, ringest_consumer_release, p.consumer, 0);
    request = from_fd(-1, 0, 100, 1);
    CALL(1, ringest_driver_submit, p.driver, &request);
    CALL(1, ringest_driver_wait, p.driver, 1, 10 * SECOND);
    CALL(-EBADF, ringest_driver_poll, p.driver);
    folder = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    request = from_fd(folder, 0, 100, 1);
    CALL(2, ringest_driver_submit, p.driver, &request);
    record = next_end(p.driver);
    CHECK(record.status == -EISDIR);
    close(folder);
    request = from_fd(fd, SIZE, 100, 1);
    CALL(3, ringest_driver_submit, p.driver, &request);
    CALL(1, ringest_driver_wait, p.driver, 1, 10 * SECOND);
    CALL(-ENODATA, ringest_driver_poll, p.driver);
    while (ringest_consumer_try_pop(p.consumer, &popped) == RINGEST_OUTCOME_POISON)
        CALL(0, ringest_consumer_release, p.consumer, popped.sequence);

    // Cancelled: with and without a slot.
    for (int i = 0; i < 6; i++) {
        request = from_fd(ends[0], 0, 8, i % 2 ? 7 : 8);
        CALL(4 + i, ringest_driver_submit, p.driver, &request);
    }
    CALL(-EAGAIN, ringest_driver_submit, p.driver, &request);
    CALL(4, ringest_driver_in_flight, p.driver);
    CALL(2, ringest_driver_queued, p.driver);
    CALL(0, ringest_driver_free_slots, p.driver);
    CALL(-ETIMEDOUT, ringest_driver_wait, p.driver, 1, 1000000);
    CALL(-ETIMEDOUT, ringest_driver_wait_into, p.driver, &record, 1, 1, 1000000);
    CALL(-ETIMEDOUT, ringest_driver_drain, p.driver, 1000000);
    CALL(3, ringest_driver_cancel, p.driver, 7);
    CALL(3, ringest_driver_wait, p.driver, 3, 10 * SECOND);
    CALL(-ECANCELED, ringest_driver_poll, p.driver);
    record = next_end(p.driver);
    CHECK(record.status == -ECANCELED && record.tag == 7);
    record = next_end(p.driver);
    CHECK(record.status == -ECANCELED && record.tag == 7);
    CALL(0, ringest_driver_cancel, p.driver, 7);
    CALL(3, ringest_driver_cancel_all, p.driver);
    CALL(0, ringest_driver_drain, p.driver, 10 * SECOND);
    while (ringest_driver_poll_into(p.driver, &record, 1) == 1) CHECK(record.status == -ECANCELED && record.tag == 8);
    while (ringest_consumer_try_pop(p.consumer, &popped) == RINGEST_OUTCOME_POISON)
        CALL(0, ringest_consumer_release, p.consumer, popped.sequence);

    // A deadline: the slot is poisoned at once; free when its read has ended.
    CALL(0, ringest_driver_reset_telemetry, p.driver);
    request = from_fd(ends[0], 0, 8, 9);
    request.timeout_ns = 2000000;
    CALL(10, ringest_driver_submit, p.driver, &request);
    CALL(1, ringest_driver_wait, p.driver, 1, 10 * SECOND);
    CALL(-ETIMEDOUT, ringest_driver_poll, p.driver);
    CALL(RINGEST_OUTCOME_POISON, ringest_consumer_wait_pop, p.consumer, 10 * SECOND, &popped);
    CHECK(popped.descriptor.status == -ETIMEDOUT && popped.descriptor.flags == RINGEST_DESCRIPTOR_EARLY);
    CHECK(!popped.data);
    CALL(0, ringest_consumer_release, p.consumer, popped.sequence);
    while (CALL(DONE, ringest_driver_held_slots, p.driver) > 0) CALL(DONE, ringest_driver_poll, p.driver);
    CALL(SLOTS, ringest_driver_free_slots, p.driver);
    CALL(0, ringest_driver_telemetry, p.driver, &counters);
    CHECK(counters.timed_out == 1 && counters.failed == 1 && counters.early_poisoned_slots == 1);

    // Either side gives up.
    CALL(0, ringest_consumer_abort, p.consumer, ENOSPC);
    CALL(0, ringest_driver_poll, p.driver);
    CALL(-ECANCELED, ringest_driver_submit, p.driver, &request);
    CALL(-ECANCELED, ringest_driver_submit_batch, p.driver, &request, 1);
    {
        struct ringest_file *file;
        CALL(0, ringest_file_from_fd, fd, RINGEST_DIRECT_OFF, &file);
        CALL(-ECANCELED, ringest_driver_submit_file, p.driver, file, 0, 1, 0);
        CALL(0, ringest_file_close, file);
    }
    CALL(-ECANCELED, ringest_io_queue_reserve, p.queue, &slot);
    CALL(0, ringest_driver_close, p.driver, SECOND, NULL);
    p.driver = NULL;
    close_pipeline(&p);

    // Closed with work undone: consumers are told.
    open_pipeline(&p, 0, RINGEST_DRIVER_UNREGISTERED | RINGEST_DRIVER_NO_RETRY, 2);
    CALL(0, ringest_driver_is_registered, p.driver);
    for (int i = 0; i < 6; i++) {
        request = from_fd(ends[0], 0, 8, 0);
        CALL(i, ringest_driver_submit, p.driver, &request);
    }
    CALL(0, ringest_driver_poll, p.driver);
    CALL(0, ringest_driver_close, p.driver, 10 * SECOND, &counters);
    CHECK(counters.cancelled == 6 && counters.leaked_reads == 0 && counters.in_flight == 0 && counters.queued == 0);
    CALL(RINGEST_OUTCOME_ABORTED, ringest_consumer_try_pop, p.consumer, &popped);
    CALL(ECANCELED, ringest_consumer_error, p.consumer);
    CALL(DONE, ringest_ring_fd, p.ring);
    p.driver = NULL;
    close_pipeline(&p);

    // A publication by hand cannot take a sequence that a driver has.
    open_pipeline(&p, 0, 0, 0);
    request = from_fd(ends[0], 0, 8, 0);
    CALL(0, ringest_driver_submit, p.driver, &request);
    {
        struct ringest_slot_data data;
        memset(&data, 0, sizeof data);
        CALL(-EINVAL, ringest_io_queue_publish, p.queue, 0, &data);
    }
    close_pipeline(&p);
    close(ends[0]);
    close(ends[1]);
}

static void creation(void) {
    struct later {
        struct ringest_driver_options known;
        uint64_t more[2];
    } later;
    struct ringest_driver_options bad, strict = driver_options(RINGEST_DRIVER_STRICT, 0);
    struct ringest_ring_options one = {sizeof one, 0, 0, 0, 0, 0, 1, 0};
    struct ringest_io_queue *queue = small_queue(RINGEST_CONSUME_MODE_SINGLE, 1), *holed;
    struct ringest_io_queue_options options;
    struct ringest_io_queue_sizes sizes;
    struct ringest_driver *driver = NULL, *second;
    struct ringest_ring *ring, *narrow;
    struct ringest_mapped *mapped;
    struct ringest_buffer *words, *part[3], *hole;
    const struct ringest_buffer *list[1];
    struct ringest_io_queue_view view;
    struct world w;
    int i;

    CALL(0, ringest_ring_create, NULL, &ring);
    for (i = 0; i < 8; i++) {
        bad = driver_options(0, 0);
        if (i == 0) bad.size = 2;
        if (i == 1) bad.flags = 16;
        if (i == 2) bad.depth = SLOTS + 1;
        if (i == 3) bad.queue_limit = (1 << 20) + 1;
        if (i == 4) bad.max_retries = 256;
        if (i == 5) bad.reserved = 1;
        if (i == 6) bad.flags = RINGEST_DRIVER_STRICT | RINGEST_DRIVER_UNREGISTERED;
        if (i == 7) bad.flags = UINT32_MAX;
        CALL(-EINVAL, ringest_driver_create, ring, queue, &bad, &driver);
    }
    bad = driver_options(16, 0);
    CALL(-EINVAL, ringest_driver_create_gpudirect, ring, queue, &bad, &driver);
    memset(&later, 0, sizeof later);
    later.known.size = sizeof later;
    later.more[1] = 1;
    CALL(-E2BIG, ringest_driver_create, ring, queue, &later.known, &driver);
    CALL(-E2BIG, ringest_driver_create_gpudirect, ring, queue, &later.known, &driver);
    CALL(-EINVAL, ringest_driver_create, ring, queue, NULL, NULL);
    CALL(-EINVAL, ringest_driver_create_gpudirect, ring, queue, NULL, NULL);
    CALL(-EOPNOTSUPP, ringest_driver_create_gpudirect, ring, queue, NULL, &driver);
    CHECK(strstr(ringest_last_error(), "passthrough"));
    CHECK(!driver);
    // Extremes that are allowed.
    bad = driver_options(0, 1 << 20);
    bad.depth = SLOTS;
    bad.max_retries = 255;
    bad.credit_poll_ns = bad.retry_backoff_ns = bad.close_timeout_ns = UINT64_MAX;
    CALL(0, ringest_driver_create, ring, queue, &bad, &driver);
    second = NULL;
    CALL(-EBUSY, ringest_driver_create, ring, queue, NULL, &second);
    CALL(-EBUSY, ringest_driver_create_gpudirect, ring, queue, NULL, &second);
    memset(&w, 0, sizeof w);
    CALL(0, ringest_mapped_alloc, 4096, NULL, &w.mapped);
    CALL(0, ringest_mapped_share, w.mapped, &w.buffer);
    CALL(0, ringest_tail_line_alloc, &w.line);
    CALL(-EBUSY, ringest_stream_create, ring, w.buffer, w.line, NULL, &w.stream);
    CALL(0, ringest_driver_destroy, driver);
    // The ring is back, and serves a stream.
    CALL(0, ringest_stream_create, ring, w.buffer, w.line, NULL, &w.stream);
    CALL(-EBUSY, ringest_driver_create, ring, queue, NULL, &second);
    CALL(0, ringest_stream_destroy, w.stream);
    CALL(0, ringest_tail_line_free, w.line);
    CALL(0, ringest_buffer_release, w.buffer);
    CALL(0, ringest_mapped_free, w.mapped);
    CHECK(!second);
    CALL(0, ringest_io_queue_destroy, queue);

    // A strict driver fails as a registration does.
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.slots = SLOTS;
    options.slot_bytes = SLOT_BYTES;
    CALL(0, ringest_io_queue_layout, &options, &sizes);
    CALL(0, ringest_mapped_alloc, 3 * 4096, NULL, &mapped);
    CALL(0, ringest_mapped_share, mapped, &words);
    for (i = 0; i < 3; i++) CALL(0, ringest_buffer_sub_region, words, (size_t)i * 4096, 4096, &part[i]);
    {
        void *nothing = mmap(NULL, sizes.slots, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(nothing != MAP_FAILED);
        CALL(0, ringest_buffer_from_host, nothing, sizes.slots, 0, &hole);
        CALL(0, ringest_io_queue_create_in, &options, part[0], part[1], part[2], hole, &holed);
        CALL(0, ringest_driver_create, ring, holed, NULL, &driver);
        CALL(0, ringest_driver_is_registered, driver);
        // No GPU maps the slots.
        CALL(-EOPNOTSUPP, ringest_driver_device_view, driver, &view);
        CALL(0, ringest_driver_destroy, driver);
        CALL(0, ringest_ring_create, &one, &narrow);
        CALL(-EFAULT, ringest_driver_create, narrow, holed, &strict, &driver);
        list[0] = words;
        CALL(0, ringest_ring_register_buffers, narrow, list, 1);
        CALL(-EAGAIN, ringest_driver_create, narrow, holed, &strict, &driver);
        CALL(0, ringest_ring_destroy, narrow);
        CALL(0, ringest_io_queue_destroy, holed);
        CALL(0, ringest_buffer_release, hole);
        munmap(nothing, sizes.slots);
    }
    for (i = 0; i < 3; i++) CALL(0, ringest_buffer_release, part[i]);
    CALL(0, ringest_buffer_release, words);
    CALL(0, ringest_mapped_free, mapped);
    CALL(0, ringest_ring_destroy, ring);
}

// The system call itself fails: something else is behind the ring's descriptor (which a movable ring uses).
static void broken_ring(void) {
    struct pipeline p;
    struct ringest_ingest_request request = from_fd(fd, 0, 64, 0);
    struct ringest_ingest_completion record;
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC), ring, spare;

    open_pipeline(&p, RINGEST_RING_MOVABLE, 0, 0);
    ring = (int)CALL(DONE, ringest_ring_fd, p.ring);
    spare = fcntl(ring, F_DUPFD_CLOEXEC, 0);
    CHECK(dup3(null, ring, O_CLOEXEC) == ring);
    CALL(0, ringest_driver_submit, p.driver, &request);
    CALL(-EOPNOTSUPP, ringest_driver_poll, p.driver);
    COVER(ringest_driver_poll, "io_uring_enter(2)");
    CALL(-EOPNOTSUPP, ringest_driver_poll_into, p.driver, &record, 1);
    COVER(ringest_driver_poll_into, "io_uring_enter(2)");
    CALL(-EOPNOTSUPP, ringest_driver_wait, p.driver, 1, SECOND);
    COVER(ringest_driver_wait, "io_uring_enter(2)");
    CALL(-EOPNOTSUPP, ringest_driver_wait_into, p.driver, &record, 1, 1, SECOND);
    COVER(ringest_driver_wait_into, "io_uring_enter(2)");
    CALL(-EOPNOTSUPP, ringest_driver_drain, p.driver, SECOND);
    COVER(ringest_driver_drain, "io_uring_enter(2)");
    CHECK(dup3(spare, ring, O_CLOEXEC) == ring);
    close(spare);
    record = next_end(p.driver);
    CHECK(record.status == 0);
    close(null);
    close_pipeline(&p);
}

int main(void) {
    struct ringest_leaks leaked;
    fd = data_file(SIZE);
    requests();
    failures();
    creation();
    broken_ring();
    CALL(0, ringest_leak_stats, &leaked);
    CHECK(leaked.rings == 0 && leaked.reads == 0 && leaked.queues == 0 && leaked.bytes == 0);
    close(fd);
    return 0;
}
