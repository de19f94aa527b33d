// Every way to submit a read, checked byte by byte.
#include "check.h"

enum { SIZE = 1 << 20 };

int main(void) {
    struct world w;
    struct ringest_completion record, records[40];
    struct ringest_stream_counters stats;
    struct ringest_file *file;
    struct ringest_range ranges[3] = {{100, 1000}, {5000, 1}, {3000, 1500}}, many[2] = {{0, 10}, {9, 10}};
    struct ringest_range *thousand;
    struct ringest_mapped *second;
    struct ringest_buffer *other;
    const struct ringest_buffer *list[1];
    uint8_t *place, command[64] = {0};
    int32_t fds[1];
    int i, n, fd = data_file(SIZE);

    fds[0] = fd;
    open_world(&w, SIZE, 0, 0);
    list[0] = w.buffer;
    CALL(0, ringest_ring_register_buffers, w.ring, list, 1);
    CALL(0, ringest_ring_register_files, w.ring, fds, 1);

    // Nothing reaches the kernel before a flush.
    CALL(0, ringest_stream_submit_read, w.stream, fd, 7, 11, 4096, 0xabc);
    CALL(1, ringest_stream_inflight, w.stream);
    CALL(1, ringest_stream_flush, w.stream);
    record = next_record(w.stream);
    CHECK(record.sequence == 0 && record.user_data == 0xabc && record.buffer_offset == 11 && record.file_offset == 7);
    CHECK(record.requested == 4096 && record.bytes == 4096 && record.status == 0 && record.bounced == 0);
    CHECK(record.path == RINGEST_READ_PATH_REGISTERED_READ);
    for (i = 0; i < 4; i++) CHECK(record.reserved[i] == 0);
    CHECK(is_pattern(w.data + 11, 7, 4096) && tail_of(&w) == 1);
    CALL(1, ringest_stream_tail, w.stream);
    CALL(0, ringest_stream_inflight, w.stream);

    // From a file whose handle is closed at once.
    memset(w.data, 0, SIZE);
    CALL(0, ringest_file_from_fd, fd, RINGEST_DIRECT_OFF, &file);
    CALL(1, ringest_stream_submit_read_file, w.stream, file, 0, 0, SIZE, 1);
    CALL(0, ringest_file_close, file);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.bytes == SIZE && is_pattern(w.data, 0, SIZE));

    // A registered file, a registered buffer.
    memset(w.data, 0, SIZE);
    CALL(2, ringest_stream_submit_read_fixed_file, w.stream, 0, 12345, 1, 50000, 2);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(w.data + 1, 12345, 50000));
    memset(w.data, 0, SIZE);
    CALL(3, ringest_stream_submit_read_fixed, w.stream, fd, 999, 0, 500, 70000, 3);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(w.data + 500, 999, 70000) && w.data[499] == 0);

    // Scatter: one submission, in the order given.
    memset(w.data, 0, SIZE);
    CALL(4, ringest_stream_submit_read_scatter, w.stream, fd, 50, ranges, 3, 4);
    memset(ranges, 0xff, sizeof ranges);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.bytes == 2501 && record.buffer_offset == 100);
    CHECK(is_pattern(w.data + 100, 50, 1000) && w.data[5000] == pattern(1050) && is_pattern(w.data + 3000, 1051, 1500));
    CALL(-ERANGE, ringest_stream_submit_read_scatter, w.stream, fd, 0, ranges, 1, 0);
    CALL(-EINVAL, ringest_stream_submit_read_scatter, w.stream, fd, 0, many, 2, 0);
    CALL(-EINVAL, ringest_stream_submit_read_scatter, w.stream, fd, 0, many, 0, 0);
    CALL(-EINVAL, ringest_stream_submit_read_scatter, w.stream, fd, 0, NULL, 1, 0);
    thousand = (struct ringest_range *)calloc(1025, sizeof *thousand);
    for (i = 0; i < 1025; i++) thousand[i].offset = (uint64_t)i * 16, thousand[i].len = 3;
    CALL(-EINVAL, ringest_stream_submit_read_scatter, w.stream, fd, 0, thousand, 1025, 0);
    memset(w.data, 0, SIZE);
    CALL(5, ringest_stream_submit_read_scatter, w.stream, fd, 0, thousand, 1024, 0);
    free(thousand);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.bytes == 3072);
    for (i = 0; i < 1024; i++) CHECK(is_pattern(w.data + i * 16, (uint64_t)i * 3, 3) && w.data[i * 16 + 3] == 0);

    // A read of nothing is whole at once, and needs no command.
    CALL(6, ringest_stream_submit_read, w.stream, -5, 0, SIZE, 0, 0);
    CALL(1, ringest_stream_poll_into, w.stream, &record, 1);
    CHECK(record.status == 0 && record.path == RINGEST_READ_PATH_NONE && record.bytes == 0);

    // Ranges that cannot be.
    CALL(-ERANGE, ringest_stream_submit_read, w.stream, fd, 0, SIZE, 1, 0);
    CALL(-ERANGE, ringest_stream_submit_read, w.stream, fd, 0, SIZE_MAX, 2, 0);
    CALL(-ERANGE, ringest_stream_submit_read, w.stream, fd, INT64_MAX, 0, 1, 0);
    CALL(0, ringest_file_from_fd, fd, RINGEST_DIRECT_OFF, &file);
    CALL(-ERANGE, ringest_stream_submit_read_file, w.stream, file, UINT64_MAX, 0, 1, 0);
    CALL(-EOPNOTSUPP, ringest_stream_submit_nvme_passthrough, w.stream, fd, command, 0);
    CALL(-EINVAL, ringest_stream_submit_nvme_passthrough, w.stream, fd, NULL, 0);
    CALL(-EINVAL, ringest_stream_poll_into, w.stream, NULL, 1);
    CALL(0, ringest_stream_poll_into, w.stream, NULL, 0);

    // Many at once, until the depth says stop; taken in two portions.
    for (n = 0; n < 64; n++)
        CALL(7 + n, ringest_stream_submit_read, w.stream, fd, (uint64_t)n * 4096, (size_t)n * 4096, 4096, (uint64_t)n);
    {
        struct ringest_range one = {0, 64};
        CALL(-EAGAIN, ringest_stream_submit_read, w.stream, fd, 0, 0, 64, 0);
        CALL(-EAGAIN, ringest_stream_submit_read_file, w.stream, file, 0, 0, 64, 0);
        CALL(-EAGAIN, ringest_stream_submit_read_fixed_file, w.stream, 0, 0, 0, 64, 0);
        CALL(-EAGAIN, ringest_stream_submit_read_fixed, w.stream, fd, 0, 0, 0, 64, 0);
        CALL(-EAGAIN, ringest_stream_submit_read_scatter, w.stream, fd, 0, &one, 1, 0);
    }
    CALL(64, ringest_stream_wait, w.stream, 64, 10 * SECOND);
    CALL(40, ringest_stream_poll_into, w.stream, records, 40);
    CALL(24, ringest_stream_poll, w.stream);
    CALL(0, ringest_stream_poll, w.stream);
    CHECK(tail_of(&w) == 71 && is_pattern(w.data, 0, 64 * 4096));

    // Into another buffer from now on.
    CALL(0, ringest_mapped_alloc, 4096, NULL, &second);
    CALL(0, ringest_mapped_host_ptr, second, (void **)&place);
    CALL(0, ringest_mapped_share, second, &other);
    CALL(0, ringest_stream_replace_buffer, w.stream, other);
    CALL(1, ringest_stream_is_registered, w.stream);
    CALL(-ERANGE, ringest_stream_submit_read, w.stream, fd, 0, 4096, 1, 0);
    CALL(71, ringest_stream_submit_read, w.stream, fd, 4096, 0, 4096, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(place, 4096, 4096));

    CALL(0, ringest_stream_stats, w.stream, &stats);
    CHECK(stats.submitted == 72 && stats.completed == 72 && stats.failed == 0 && stats.enters > 0);
    CHECK(stats.bytes == stats.registered_bytes + stats.plain_bytes && stats.commands >= 71);
    CALL(-EINVAL, ringest_stream_stats, w.stream, NULL);
    CALL(-EINVAL, ringest_ring_features, w.ring, NULL);

    // Nothing follows the end.
    CALL(0, ringest_stream_finish, w.stream);
    {
        struct ringest_range one = {0, 64};
        CALL(-EBUSY, ringest_stream_submit_read, w.stream, fd, 0, 0, 64, 0);
        CALL(-EBUSY, ringest_stream_submit_read_file, w.stream, file, 0, 0, 64, 0);
        CALL(-EBUSY, ringest_stream_submit_read_fixed_file, w.stream, 0, 0, 0, 64, 0);
        CALL(-EBUSY, ringest_stream_submit_read_fixed, w.stream, fd, 0, 0, 0, 64, 0);
        CALL(-EBUSY, ringest_stream_submit_read_scatter, w.stream, fd, 0, &one, 1, 0);
    }
    CALL(0, ringest_file_close, file);
    CALL(0, ringest_buffer_release, other);
    CALL(0, ringest_mapped_free, second);
    close_world(&w);

    // The same bytes without a registration, with big ring entries, and over a movable ring with a polling thread.
    open_world(&w, SIZE, RINGEST_RING_BIG_ENTRIES, RINGEST_STREAM_UNREGISTERED);
    CALL(0, ringest_stream_is_registered, w.stream);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 3, 0, SIZE - 3, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.path == RINGEST_READ_PATH_PLAIN_READ && is_pattern(w.data, 3, SIZE - 3));
    close_world(&w);
    open_world(&w, SIZE, RINGEST_RING_SQPOLL | RINGEST_RING_MOVABLE, 0);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, SIZE, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(w.data, 0, SIZE));
    close_world(&w);

    {
        uint32_t crc = 0;
        CALL(0, ringest_crc32c, 0, (const uint8_t *)"123456789", 9, &crc);
        CHECK(crc == 0xe3069283);
        CALL(0, ringest_crc32c, 0, (const uint8_t *)"1234", 4, &crc);
        CALL(0, ringest_crc32c, crc, (const uint8_t *)"56789", 5, &crc);
        CHECK(crc == 0xe3069283);
        CALL(0, ringest_crc32c, 5, NULL, 0, &crc);
        CHECK(crc == 5);
        CALL(-EINVAL, ringest_crc32c, 0, NULL, 1, &crc);
        CALL(-EINVAL, ringest_crc32c, 0, (const uint8_t *)"1", 1, NULL);
        CHECK(!strcmp(ringest_read_path_name(RINGEST_READ_PATH_REGISTERED_READ), "registered read"));
        CHECK(!strcmp(ringest_read_path_name(99), "unknown"));
        COVER(ringest_read_path_name, "ok");
    }
    close(fd);
    return 0;
}
