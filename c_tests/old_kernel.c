// Kernels without sparse buffer tables (before 5.19) and without shared ones (before 6.12), by refusing what they lack.
#include "seccomp.h"

enum { REGISTER_BUFFERS2 = 15, REGISTER_BUFFERS_UPDATE = 16, CLONE_BUFFERS = 30 };

static void before_5_19(void) {
    struct world w;
    struct ringest_features features;
    struct ringest_completion record;
    const struct ringest_buffer *list[1];
    struct ringest_stream_options strict = {sizeof strict, RINGEST_STREAM_STRICT, 0, 0, 0, 0, 0, 0};
    int ends[2], fd = data_file(4096);

    deny(SYS_io_uring_register, REGISTER_BUFFERS2, EINVAL);
    deny(SYS_io_uring_register, REGISTER_BUFFERS_UPDATE, EINVAL);
    memset(&w, 0, sizeof w);
    CALL(0, ringest_ring_create, NULL, &w.ring);
    CALL(0, ringest_ring_features, w.ring, &features);
    CHECK(!(features.flags & RINGEST_FEATURE_SPARSE_BUFFERS));
    CALL(0, ringest_mapped_alloc, 8192, NULL, &w.mapped);
    CALL(0, ringest_mapped_host_ptr, w.mapped, (void **)&w.data);
    CALL(0, ringest_mapped_share, w.mapped, &w.buffer);
    CALL(0, ringest_tail_line_alloc, &w.line);
    CALL(-EOPNOTSUPP, ringest_ring_register_buffers_sparse, w.ring, 4);
    list[0] = w.buffer;
    CALL(0, ringest_ring_register_buffers, w.ring, list, 1);
    CALL(-EOPNOTSUPP, ringest_ring_update_buffer, w.ring, 0, NULL);
    CALL(0, ringest_stream_create, w.ring, w.buffer, w.line, &strict, &w.stream);
    CALL(1, ringest_stream_is_registered, w.stream);
    CALL(0, ringest_stream_submit_read_fixed, w.stream, fd, 0, 0, 0, 4096, 0);
    record = next_record(w.stream);
    CHECK(record.status == 0 && record.path == RINGEST_READ_PATH_REGISTERED_READ && is_pattern(w.data, 0, 4096));
    pending_read(&w, ends, 64);
    CALL(-EBUSY, ringest_ring_unregister_buffers, w.ring);
    CALL(0, ringest_stream_destroy, w.stream);
    CALL(0, ringest_ring_unregister_buffers, w.ring);
    w.stream = NULL;
    close_world(&w);
    unlink(data_path);
}

static void before_6_12(void) {
    struct ringest_ring *ring, *target;
    struct ringest_mapped *mapped;
    struct ringest_buffer *buffer;
    const struct ringest_buffer *list[1];
    struct ringest_shared_buffers *shared = NULL;
    struct ringest_features features;
    int64_t rc;

    CALL(0, ringest_ring_create, NULL, &ring);
    CALL(0, ringest_ring_create, NULL, &target);
    CALL(0, ringest_mapped_alloc, 4096, NULL, &mapped);
    CALL(0, ringest_mapped_share, mapped, &buffer);
    list[0] = buffer;
    CALL(0, ringest_ring_register_buffers, ring, list, 1);
    // A handle from before, so that cloning itself is refused.
    CALL(0, ringest_ring_share_buffers, ring, &shared);
    deny(SYS_io_uring_register, CLONE_BUFFERS, EINVAL);
    CALL(-EOPNOTSUPP, ringest_ring_clone_buffers, target, shared);
    CALL(0, ringest_shared_buffers_free, shared);
    rc = ringest_ring_share_buffers(ring, &shared);
    CHECK(rc == -EOPNOTSUPP);
    COVER_CALL(ringest_ring_share_buffers, rc);
    // The ring that could not take them over still takes its own.
    CALL(0, ringest_ring_register_buffers, target, list, 1);
    CALL(0, ringest_ring_features, target, &features);
    CALL(0, ringest_ring_destroy, target);
    CALL(0, ringest_ring_destroy, ring);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_mapped_free, mapped);
}

int main(void) {
    in_child(before_5_19);
    in_child(before_6_12);
    return 0;
}
