// O_DIRECT: aligned, unaligned (through the bounce buffer), by handle and by raw descriptor.
#include "check.h"

enum { SIZE = 1 << 20 };

int main(void) {
    struct world w;
    struct ringest_completion record;
    struct ringest_file *file;
    struct ringest_stream_counters stats;
    struct ringest_range ranges[2] = {{1, 5000}, {9000, 7777}};
    uint32_t memory, offset;
    int fd = data_file(SIZE), raw;
    int64_t rc = ringest_file_open(data_path, RINGEST_DIRECT_ON, &file);

    if (rc == -EOPNOTSUPP) skip("this file system has no O_DIRECT");
    CHECK(rc == 0);
    CALL(1, ringest_file_direct, file, &memory, &offset);
    open_world(&w, SIZE, 0, 0);
    CALL(0, ringest_stream_submit_read_file, w.stream, file, 0, 0, SIZE, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.bytes == SIZE && record.bounced == 0 && is_pattern(w.data, 0, SIZE));
    memset(w.data, 0, SIZE);
    CALL(1, ringest_stream_submit_read_file, w.stream, file, 4097, 3, 300001, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.bounced == 300001 && is_pattern(w.data + 3, 4097, 300001));
    CHECK(w.data[2] == 0 && w.data[300004] == 0);
    // Aligned but for its ends: these alone are bounced.
    memset(w.data, 0, SIZE);
    CALL(2, ringest_stream_submit_read_file, w.stream, file, offset - 1, offset - 1, 3 * offset, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.bounced < 2 * offset && is_pattern(w.data + offset - 1, offset - 1, 3 * offset));
    memset(w.data, 0, SIZE);
    raw = open(data_path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    CALL(3, ringest_stream_submit_read, w.stream, raw, 513, 77, 99999, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(w.data + 77, 513, 99999));
    memset(w.data, 0, SIZE);
    CALL(0, ringest_ring_register_files, w.ring, &raw, 1);
    CALL(4, ringest_stream_submit_read_fixed_file, w.stream, 0, 1, 0, 70000, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(w.data, 1, 70000));
    memset(w.data, 0, SIZE);
    CALL(5, ringest_stream_submit_read_scatter, w.stream, raw, 11, ranges, 2, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && is_pattern(w.data + 1, 11, 5000) && is_pattern(w.data + 9000, 5011, 7777));
    // The end of the file, unaligned.
    CALL(6, ringest_stream_submit_read_file, w.stream, file, SIZE - 1000, 0, 1001, 0);
    record = next_record(w.stream);
    CHECK(record.status == -ENODATA && record.bytes == 1000 && is_pattern(w.data, SIZE - 1000, 1000));
    CALL(0, ringest_stream_stats, w.stream, &stats);
    CHECK(stats.bounced_bytes > 300001 && stats.end_of_file == 1);
    CALL(0, ringest_file_close, file);
    close_world(&w);
    close(raw);
    close(fd);
    return 0;
}
