// Buffers and files registered with a ring.
#include "refused.h"

int main(void) {
    struct ringest_ring_options options = {sizeof options, 0, 8, 0, 0, 0, 2, 0};
    struct ringest_ring *ring, *own;
    struct ringest_shared_buffers *shared, *again;
    struct ringest_mapped *mapped;
    struct ringest_buffer *buffer, *third, *unmapped, *peer, *empty;
    struct ringest_stream *stream, *other;
    struct ringest_stream_options strict = {sizeof strict, RINGEST_STREAM_STRICT, 0, 0, 0, 0, 0, 0};
    struct world w;
    const struct ringest_buffer *list[3];
    int32_t fds[2], bad_fd[2];
    int data = data_file(8192), ends[2];
    uint64_t word, other_word;
    int64_t sequence;
    struct ringest_completion record;
    void *hole = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    CALL(0, ringest_ring_create, &options, &ring);
    CALL(0, ringest_mapped_alloc, 16384, NULL, &mapped);
    CALL(0, ringest_mapped_share, mapped, &buffer);
    CALL(0, ringest_buffer_sub_region, buffer, 4096, 4096, &third);
    CALL(0, ringest_buffer_sub_region, buffer, 0, 0, &empty);
    CALL(0, ringest_buffer_from_host, hole, 4096, 0, &unmapped);
    CALL(0, ringest_buffer_from_bar1_peer, hole, 4096, 1 << 20, free, NULL, &peer);

    // Buffers.
    list[0] = list[1] = list[2] = buffer;
    CALL(-EINVAL, ringest_ring_register_buffers, ring, list, 0);
    CALL(-EINVAL, ringest_ring_register_buffers, ring, NULL, 1);
    CALL(-EAGAIN, ringest_ring_register_buffers, ring, list, 3);
    list[1] = NULL;
    CALL(-EBADF, ringest_ring_register_buffers, ring, list, 2);
    list[1] = unmapped;
    CALL(-EFAULT, ringest_ring_register_buffers, ring, list, 2);
    list[1] = peer;
    CALL(-EOPNOTSUPP, ringest_ring_register_buffers, ring, list, 2);
    CALL(-EINVAL, ringest_ring_unregister_buffers, ring);
    CALL(-ERANGE, ringest_ring_update_buffer, ring, 0, buffer);
    list[1] = third;
    CALL(0, ringest_ring_register_buffers, ring, list, 2);
    CALL(-EBUSY, ringest_ring_register_buffers, ring, list, 2);
    CALL(-EBUSY, ringest_ring_register_buffers_sparse, ring, 2);
    CALL(-ERANGE, ringest_ring_update_buffer, ring, 2, buffer);
    // The kernel's table has two entries; both are taken.
    CALL(-EAGAIN, ringest_ring_update_buffer, ring, 1, third);
    CALL(0, ringest_ring_update_buffer, ring, 1, NULL);
    CALL(-EINVAL, ringest_ring_update_buffer, ring, 1, empty);
    CALL(-EBADF, ringest_ring_update_buffer, ring, 1, (struct ringest_buffer *)ring);
    CALL(-EFAULT, ringest_ring_update_buffer, ring, 1, unmapped);
    CALL(-EOPNOTSUPP, ringest_ring_update_buffer, ring, 1, peer);
    CALL(0, ringest_ring_update_buffer, ring, 1, third);
    CALL(-EAGAIN, ringest_stream_create_u64, ring, unmapped, &word, &strict, &stream);

    CALL(0, ringest_ring_unregister_buffers, ring);
    CALL(-EINVAL, ringest_ring_register_buffers_sparse, ring, 0);
    CALL(-EINVAL, ringest_ring_register_buffers_sparse, ring, UINT32_MAX);
    CALL(0, ringest_ring_register_buffers_sparse, ring, 3);
    CALL(0, ringest_ring_unregister_buffers, ring);

    // Files.
    fds[0] = data;
    fds[1] = -1;
    bad_fd[0] = data;
    bad_fd[1] = 4000;
    CALL(-EINVAL, ringest_ring_register_files, ring, fds, 0);
    CALL(-EINVAL, ringest_ring_register_files, ring, NULL, 1);
    CALL(-EBADF, ringest_ring_register_files, ring, bad_fd, 2);
    CALL(-EINVAL, ringest_ring_unregister_files, ring);
    CALL(-ERANGE, ringest_ring_update_file, ring, 0, data);
    CALL(0, ringest_ring_register_files, ring, fds, 1);
    CALL(-EBUSY, ringest_ring_register_files, ring, fds, 1);
    CALL(-EBUSY, ringest_ring_register_files_sparse, ring, 1);
    CALL(0, ringest_ring_unregister_files, ring);
    CALL(-EINVAL, ringest_ring_register_files_sparse, ring, 0);
    CALL(-EMFILE, ringest_ring_register_files_sparse, ring, UINT32_MAX);
    // Valgrind keeps this limit to itself.
    if (!on_valgrind()) {
        struct rlimit old, few;
        CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
        few = old;
        few.rlim_cur = 64;
        CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
        int32_t many[100];
        for (int i = 0; i < 100; i++) many[i] = data;
        CALL(-EMFILE, ringest_ring_register_files, ring, many, 100);
        CALL(-EMFILE, ringest_ring_register_files_sparse, ring, 100);
        CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
    }
    CALL(0, ringest_ring_register_files_sparse, ring, 4);
    CALL(-EBADF, ringest_ring_update_file, ring, 0, 4000);
    CALL(-ERANGE, ringest_ring_update_file, ring, 4, data);
    CALL(0, ringest_ring_update_file, ring, 3, data);
    CALL(0, ringest_ring_update_file, ring, 3, -1);
    CALL(0, ringest_ring_update_file, ring, 3, ends[0]);

    // While a stream has the ring, its handle still serves; a file that is being read stays.
    CALL(0, ringest_stream_create_u64, ring, buffer, &word, NULL, &stream);
    CALL(-EINVAL, ringest_stream_submit_read_fixed_file, stream, 0, 0, 0, 64, 0);
    CALL(-ERANGE, ringest_stream_submit_read_fixed_file, stream, 4, 0, 0, 64, 0);
    sequence = CALL(0, ringest_stream_submit_read_fixed_file, stream, 3, 0, 0, 5, 0);
    CALL(1, ringest_stream_flush, stream);
    CALL(-EBUSY, ringest_ring_update_file, ring, 3, data);
    CALL(-EBUSY, ringest_ring_unregister_files, ring);
    CALL(0, ringest_ring_update_file, ring, 1, data);
    CHECK(write(ends[1], "12345", 5) == 5);
    record = next_record(stream);
    CHECK(record.sequence == (uint64_t)sequence && record.status == 0 && record.bytes == 5);
    CALL(0, ringest_ring_unregister_files, ring);

    // Registered buffers by index; shared with a second ring while the first is in use.
    CALL(0, ringest_ring_register_buffers_sparse, ring, 2);
    CALL(-EINVAL, ringest_stream_submit_read_fixed, stream, data, 0, 1, 0, 64, 0);
    CALL(-ERANGE, ringest_stream_submit_read_fixed, stream, data, 0, 2, 0, 64, 0);
    CALL(0, ringest_ring_update_buffer, ring, 1, third);
    CALL(-ERANGE, ringest_stream_submit_read_fixed, stream, data, 0, 1, 4000, 97, 0);
    CALL(1, ringest_stream_submit_read_fixed, stream, data, 100, 1, 1, 4000, 0);
    record = next_record(stream);
    CHECK(record.status == 0 && record.path == RINGEST_READ_PATH_REGISTERED_READ && record.buffer_offset == 1);
    CALL(0, ringest_ring_create, &options, &own);
    CALL(-EINVAL, ringest_ring_share_buffers, own, &shared);
    CALL(-EINVAL, ringest_ring_share_buffers, ring, NULL);
    if (ringest_ring_share_buffers(ring, &shared) == -EOPNOTSUPP) skip("this kernel does not share buffers");
    CALL(0, ringest_ring_share_buffers, ring, &again);
    CALL(0, ringest_ring_clone_buffers, own, shared);
    CALL(-EBUSY, ringest_ring_clone_buffers, own, shared);
    CALL(-EBADF, ringest_ring_clone_buffers, own, NULL);
    CALL(0, ringest_stream_create_u64, own, third, &other_word, NULL, &other);
    CALL(0, ringest_stream_submit_read_fixed, other, data, 7, 1, 0, 4096, 0);
    record = next_record(other);
    CHECK(record.status == 0 && record.path == RINGEST_READ_PATH_REGISTERED_READ);
    CALL(0, ringest_stream_destroy, other);
    CALL(0, ringest_ring_unregister_buffers, own);
    // A share is a snapshot.
    CALL(0, ringest_ring_update_buffer, ring, 1, NULL);
    CALL(0, ringest_ring_clone_buffers, own, again);
    CALL(0, ringest_ring_unregister_buffers, own);
    CALL(0, ringest_shared_buffers_free, again);
    CALL(-EBADF, ringest_shared_buffers_free, again);
    CALL(0, ringest_shared_buffers_free, shared);
    CALL(0, ringest_ring_share_buffers, ring, &shared);
    {
        struct rlimit old, none_left;
        CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
        none_left = old;
        int next = dup(data);
        close(next);
        none_left.rlim_cur = (rlim_t)next;
        CHECK(setrlimit(RLIMIT_NOFILE, &none_left) == 0);
        CALL(-EMFILE, ringest_ring_share_buffers, ring, &again);
        CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
    }
    CALL(0, ringest_shared_buffers_free, shared);
    CALL(0, ringest_ring_destroy, own);
    CALL(0, ringest_stream_destroy, stream);
    CALL(0, ringest_ring_destroy, ring);

    // A strict stream fails as a registration does.
    options.buffer_slots = 1;
    memset(&w, 0, sizeof w);
    CALL(0, ringest_ring_create, &options, &w.ring);
    CALL(0, ringest_tail_line_alloc, &w.line);
    w.buffer = unmapped;
    every_create(-EFAULT, &w, &strict);
    w.buffer = peer;
    every_create(-EOPNOTSUPP, &w, &strict);
    w.buffer = empty;
    every_create(-EINVAL, &w, &strict);
    list[0] = third;
    CALL(0, ringest_ring_register_buffers, w.ring, list, 1);
    w.buffer = buffer;
    every_create(-EAGAIN, &w, &strict);
    // Covered by the caller's registration: no further entry is needed.
    CALL(0, ringest_stream_create, w.ring, third, w.line, &strict, &w.stream);
    CALL(1, ringest_stream_is_registered, w.stream);
    CALL(-EAGAIN, ringest_stream_replace_buffer, w.stream, buffer);
    CALL(0, ringest_ring_unregister_buffers, w.ring);
    CALL(0, ringest_stream_destroy, w.stream);
    CALL(0, ringest_stream_create, w.ring, third, w.line, &strict, &w.stream);
    CALL(-EAGAIN, ringest_stream_replace_buffer, w.stream, unmapped);
    CALL(0, ringest_stream_destroy, w.stream);
    options.buffer_slots = 4;
    CALL(0, ringest_ring_destroy, w.ring);
    CALL(0, ringest_ring_create, &options, &w.ring);
    CALL(0, ringest_stream_create, w.ring, third, w.line, &strict, &w.stream);
    CALL(-EFAULT, ringest_stream_replace_buffer, w.stream, unmapped);
    CALL(-EOPNOTSUPP, ringest_stream_replace_buffer, w.stream, peer);
    CALL(-EINVAL, ringest_stream_replace_buffer, w.stream, empty);
    CALL(1, ringest_stream_is_registered, w.stream);
    CALL(0, ringest_stream_destroy, w.stream);
    // Without strict the reads go unregistered.
    CALL(0, ringest_stream_create, w.ring, unmapped, w.line, NULL, &w.stream);
    CALL(0, ringest_stream_is_registered, w.stream);
    CALL(0, ringest_stream_destroy, w.stream);
    CALL(0, ringest_ring_destroy, w.ring);
    CALL(0, ringest_tail_line_free, w.line);

    CALL(0, ringest_buffer_release, empty);
    CALL(0, ringest_buffer_release, third);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_buffer_release, unmapped);
    CALL(0, ringest_buffer_release, peer);
    CALL(0, ringest_mapped_free, mapped);
    munmap(hole, 4096);
    close(data);
    close(ends[0]);
    close(ends[1]);
    return 0;
}
