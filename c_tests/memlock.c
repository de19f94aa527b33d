// An ordinary user over RLIMIT_MEMLOCK: registrations fail, reads go unregistered unless that is forbidden.
#include "refused.h"

enum { SIZE = 1 << 20 };

int main(void) {
    struct rlimit little = {256 << 10, 256 << 10};
    struct ringest_stream_options strict = {sizeof strict, RINGEST_STREAM_STRICT, 0, 0, 0, 0, 0, 0};
    struct world w;
    struct ringest_buffer *part;
    struct ringest_completion record;
    const struct ringest_buffer *list[1];
    int fd = data_file(SIZE);
    int64_t rc;

    unlink(data_path);
    cover("ringest_version", "ok");
    if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)) skip("root that cannot become another user");
    CHECK(setrlimit(RLIMIT_MEMLOCK, &little) == 0);
    memset(&w, 0, sizeof w);
    CALL(0, ringest_mapped_alloc, SIZE, NULL, &w.mapped);
    CALL(0, ringest_mapped_host_ptr, w.mapped, (void **)&w.data);
    CALL(0, ringest_mapped_share, w.mapped, &w.buffer);
    CALL(0, ringest_tail_line_alloc, &w.line);
    rc = ringest_ring_create(NULL, &w.ring);
    if (rc == -EPERM) skip("io_uring is not for ordinary users here");
    CHECK(rc == 0);
    list[0] = w.buffer;
    CALL(-ENOMEM, ringest_ring_register_buffers, w.ring, list, 1);
    CHECK(strstr(ringest_last_error(), "RLIMIT_MEMLOCK"));
    CALL(0, ringest_ring_register_buffers_sparse, w.ring, 1);
    CALL(-ENOMEM, ringest_ring_update_buffer, w.ring, 0, w.buffer);
    CALL(0, ringest_ring_unregister_buffers, w.ring);
    every_create(-ENOMEM, &w, &strict);
    {
        struct ringest_driver_options strictly = {sizeof strictly, RINGEST_DRIVER_STRICT, 0, 0, 0, 0, 0, 0, 0};
        struct ringest_io_queue *queue;
        struct ringest_driver *driver = NULL;
        CALL(0, ringest_io_queue_create, NULL, &queue);
        CALL(-ENOMEM, ringest_driver_create, w.ring, queue, &strictly, &driver);
        CHECK(!driver);
        CALL(0, ringest_driver_create, w.ring, queue, NULL, &driver);
        CALL(0, ringest_driver_is_registered, driver);
        CALL(0, ringest_driver_destroy, driver);
        CALL(0, ringest_io_queue_destroy, queue);
    }
    // Not strict: it goes unregistered, and says so.
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, NULL, &w.stream);
    CALL(0, ringest_stream_is_registered, w.stream);
    CALL(0, ringest_stream_submit_read, w.stream, fd, 0, 0, SIZE, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.path == RINGEST_READ_PATH_PLAIN_READ && is_pattern(w.data, 0, SIZE));
    CALL(0, ringest_stream_destroy, w.stream);
    CALL(0, ringest_buffer_sub_region, w.buffer, 0, 4096, &part);
    CALL(0, ringest_stream_create, w.ring, part, w.line, &strict, &w.stream);
    CALL(-ENOMEM, ringest_stream_replace_buffer, w.stream, w.buffer);
    CALL(1, ringest_stream_is_registered, w.stream);
    CALL(0, ringest_buffer_release, part);
    close_world(&w);
    return 0;
}
