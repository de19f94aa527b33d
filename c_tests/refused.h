// Every call that only the owner of a ring may make.
#ifndef RINGEST_REFUSED_H
#define RINGEST_REFUSED_H

#include "check.h"

// Calls all of them on a world whose ring has a buffer and a file registered as index 0, demanding one errno.
UNUSED void every_ring_call(int64_t expected, struct world *w, const struct ringest_shared_buffers *shared) {
    struct ringest_shared_buffers *none = NULL;
    int32_t fd = 0;
    const struct ringest_buffer *buffer = w->buffer;
    CALL(expected, ringest_ring_register_buffers, w->ring, &buffer, 1);
    CALL(expected, ringest_ring_register_buffers_sparse, w->ring, 4);
    CALL(expected, ringest_ring_update_buffer, w->ring, 0, NULL);
    CALL(expected, ringest_ring_unregister_buffers, w->ring);
    CALL(expected, ringest_ring_share_buffers, w->ring, &none);
    CALL(expected, ringest_ring_clone_buffers, w->ring, shared);
    CALL(expected, ringest_ring_register_files, w->ring, &fd, 1);
    CALL(expected, ringest_ring_register_files_sparse, w->ring, 4);
    CALL(expected, ringest_ring_update_file, w->ring, 0, -1);
    CALL(expected, ringest_ring_unregister_files, w->ring);
}

UNUSED void every_stream_call(int64_t expected, struct world *w) {
    struct ringest_completion record;
    struct ringest_range range = {0, 64};
    static uint8_t command[64];
    CALL(expected, ringest_stream_submit_read, w->stream, 0, 0, 0, 64, 0);
    CALL(expected, ringest_stream_submit_read_fixed_file, w->stream, 0, 0, 0, 64, 0);
    CALL(expected, ringest_stream_submit_read_fixed, w->stream, 0, 0, 0, 0, 64, 0);
    CALL(expected, ringest_stream_submit_read_scatter, w->stream, 0, 0, &range, 1, 0);
    CALL(expected, ringest_stream_submit_nvme_passthrough, w->stream, 0, command, 0);
    CALL(expected, ringest_stream_flush, w->stream);
    CALL(expected, ringest_stream_poll, w->stream);
    CALL(expected, ringest_stream_poll_into, w->stream, &record, 1);
    CALL(expected, ringest_stream_wait, w->stream, 0, 0);
    CALL(expected, ringest_stream_resubmit, w->stream, 0);
    CALL(expected, ringest_stream_skip, w->stream, 0);
    CALL(expected, ringest_stream_cancel, w->stream, 0);
    CALL(expected, ringest_stream_cancel_all, w->stream);
    CALL(expected, ringest_stream_replace_buffer, w->stream, w->buffer);
    CALL(expected, ringest_stream_finish, w->stream);
    CALL(expected, ringest_stream_close, w->stream, 0);
    CALL(expected, ringest_stream_destroy, w->stream);
}

UNUSED void every_submit_of(int64_t expected, struct world *w, struct ringest_file *file) {
    struct ringest_range range = {0, 64};
    CALL(expected, ringest_stream_submit_read, w->stream, 0, 0, 0, 64, 0);
    CALL(expected, ringest_stream_submit_read_file, w->stream, file, 0, 0, 64, 0);
    CALL(expected, ringest_stream_submit_read_fixed_file, w->stream, 0, 0, 0, 64, 0);
    CALL(expected, ringest_stream_submit_read_fixed, w->stream, 0, 0, 0, 0, 64, 0);
    CALL(expected, ringest_stream_submit_read_scatter, w->stream, 0, 0, &range, 1, 0);
}

UNUSED void every_create(int64_t expected, struct world *w, const struct ringest_stream_options *options) {
    struct ringest_stream *none = NULL;
    uint64_t word = 9;
    uint32_t half = 9;
    CALL(expected, ringest_stream_create, w->ring, w->buffer, w->line, options, &none);
    CALL(expected, ringest_stream_create_u64, w->ring, w->buffer, &word, options, &none);
    CALL(expected, ringest_stream_create_u32, w->ring, w->buffer, &half, options, &none);
    CHECK(!none && word == 9 && half == 9);
}

#endif
