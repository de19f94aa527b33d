// Handles that are NULL, stale, of another kind or made up are -EBADF everywhere, and nothing is touched.
#include "gpu_calls.h"
#include "queue.h"

enum { KINDS = 12 };
enum kind { NONE, MAPPED, BUFFER, FILE_, LINE, RING, STREAM, SHARED, QUEUE, CONSUMER, DRIVER, VMM, RANGE };

static struct world w;
static struct ringest_file *file;
static struct ringest_shared_buffers *shares;
static struct pipeline p;
static struct ringest_ring *spare;

// Calls every function that takes a handle with `h` in its place, but those of the kind that `h` is.
static void every_call(void *h, enum kind kind) {
    struct ringest_mapped *mapped = NULL;
    struct ringest_buffer *buffer = NULL;
    struct ringest_tail_line *line = NULL;
    struct ringest_stream *stream = NULL;
    struct ringest_shared_buffers *shared = NULL;
    struct ringest_io_queue *queue = NULL;
    struct ringest_consumer *consumer = NULL;
    struct ringest_driver *driver = NULL;
    const struct ringest_tail_line_words *words = NULL;
    struct ringest_features features;
    struct ringest_stream_counters stats;
    struct ringest_completion record;
    struct ringest_range range = {0, 1};
    const struct ringest_buffer *list[1];
    uint8_t command[64] = {0};
    uint64_t number = 0;
    uint32_t half = 0;
    int32_t fd = 0;
    void *place = NULL;

    list[0] = (struct ringest_buffer *)h;
    if (kind != MAPPED) {
        struct ringest_mapped *m = (struct ringest_mapped *)h;
        CALL(-EBADF, ringest_mapped_free, m);
        CALL(-EBADF, ringest_mapped_size, m);
        CALL(-EBADF, ringest_mapped_host_ptr, m, &place);
        CALL(-EBADF, ringest_mapped_device_ptr, m, &number);
        CALL(-EBADF, ringest_mapped_device_ptr_on, m, 0, &number);
        CALL(-EBADF, ringest_mapped_pinned, m);
        CALL(-EBADF, ringest_mapped_share, m, &buffer);
    }
    if (kind != BUFFER) {
        struct ringest_buffer *b = (struct ringest_buffer *)h;
        CALL(-EBADF, ringest_buffer_sub_region, b, 0, 1, &buffer);
        CALL(-EBADF, ringest_buffer_duplicate, b, &buffer);
        CALL(-EBADF, ringest_buffer_release, b);
        CALL(-EBADF, ringest_buffer_size, b);
        CALL(-EBADF, ringest_buffer_kind, b);
        CALL(-EBADF, ringest_buffer_host_ptr, b, &place);
        CALL(-EBADF, ringest_buffer_device_ptr, b, &number);
        CALL(-EBADF, ringest_buffer_device_ptr_on, b, 0, &number);
        CALL(-EBADF, ringest_buffer_check_gpu, b, 0);
        CALL(-EBADF, ringest_tail_line_in_buffer, b, 0, &line);
        CALL(-EBADF, ringest_stream_create, w.ring, b, w.line, NULL, &stream);
        CALL(-EBADF, ringest_stream_create_u64, w.ring, b, &number, NULL, &stream);
        CALL(-EBADF, ringest_stream_create_u32, w.ring, b, &half, NULL, &stream);
        CALL(-EBADF, ringest_stream_replace_buffer, w.stream, b);
        CALL(-EBADF, ringest_ring_register_buffers, w.ring, list, 1);
        CALL(-EBADF, ringest_io_queue_create_in, NULL, b, w.buffer, w.buffer, w.buffer, &queue);
        CALL(-EBADF, ringest_io_queue_create_in, NULL, w.buffer, w.buffer, w.buffer, b, &queue);
        if (h) CALL(-EBADF, ringest_ring_update_buffer, w.ring, 0, b);
    }
    if (kind != FILE_) {
        struct ringest_file *f = (struct ringest_file *)h;
        CALL(-EBADF, ringest_file_close, f);
        CALL(-EBADF, ringest_file_size, f);
        CALL(-EBADF, ringest_file_direct, f, &half, &half);
        CALL(-EBADF, ringest_stream_submit_read_file, w.stream, f, 0, 0, 1, 0);
        {
            struct ringest_ingest_request request = from_file(f, 0, 1, 0);
            CALL(-EBADF, ringest_driver_submit, p.driver, &request);
            CALL(-EBADF, ringest_driver_submit_batch, p.driver, &request, 1);
            CALL(-EBADF, ringest_driver_submit_file, p.driver, f, 0, 1, 0);
        }
    }
    if (kind != LINE) {
        struct ringest_tail_line *l = (struct ringest_tail_line *)h;
        CALL(-EBADF, ringest_tail_line_free, l);
        CALL(-EBADF, ringest_tail_line_host_ptr, l, &words);
        CALL(-EBADF, ringest_tail_line_device_ptr, l, &number);
        CALL(-EBADF, ringest_stream_create, w.ring, w.buffer, l, NULL, &stream);
    }
    if (kind != RING) {
        struct ringest_ring *r = (struct ringest_ring *)h;
        list[0] = w.buffer;
        CALL(-EBADF, ringest_ring_destroy, r);
        CALL(-EBADF, ringest_ring_features, r, &features);
        CALL(-EBADF, ringest_ring_fd, r);
        CALL(-EBADF, ringest_ring_register_buffers, r, list, 1);
        CALL(-EBADF, ringest_ring_register_buffers_sparse, r, 1);
        CALL(-EBADF, ringest_ring_update_buffer, r, 0, NULL);
        CALL(-EBADF, ringest_ring_unregister_buffers, r);
        CALL(-EBADF, ringest_ring_share_buffers, r, &shared);
        CALL(-EBADF, ringest_ring_clone_buffers, r, shares);
        CALL(-EBADF, ringest_ring_register_files, r, &fd, 1);
        CALL(-EBADF, ringest_ring_register_files_sparse, r, 1);
        CALL(-EBADF, ringest_ring_update_file, r, 0, -1);
        CALL(-EBADF, ringest_ring_unregister_files, r);
        CALL(-EBADF, ringest_stream_create, r, w.buffer, w.line, NULL, &stream);
        CALL(-EBADF, ringest_stream_create_u64, r, w.buffer, &number, NULL, &stream);
        CALL(-EBADF, ringest_stream_create_u32, r, w.buffer, &half, NULL, &stream);
        CALL(-EBADF, ringest_driver_create, r, p.queue, NULL, &driver);
        CALL(-EBADF, ringest_driver_create_gpudirect, r, p.queue, NULL, &driver);
    }
    if (kind != STREAM) {
        struct ringest_stream *s = (struct ringest_stream *)h;
        CALL(-EBADF, ringest_stream_submit_read, s, 0, 0, 0, 1, 0);
        CALL(-EBADF, ringest_stream_submit_read_file, s, file, 0, 0, 1, 0);
        CALL(-EBADF, ringest_stream_submit_read_fixed_file, s, 0, 0, 0, 1, 0);
        CALL(-EBADF, ringest_stream_submit_read_fixed, s, 0, 0, 0, 0, 1, 0);
        CALL(-EBADF, ringest_stream_submit_read_scatter, s, 0, 0, &range, 1, 0);
        CALL(-EBADF, ringest_stream_submit_nvme_passthrough, s, 0, command, 0);
        CALL(-EBADF, ringest_stream_flush, s);
        CALL(-EBADF, ringest_stream_poll, s);
        CALL(-EBADF, ringest_stream_poll_into, s, &record, 1);
        CALL(-EBADF, ringest_stream_wait, s, 1, -1);
        CALL(-EBADF, ringest_stream_resubmit, s, 0);
        CALL(-EBADF, ringest_stream_skip, s, 0);
        CALL(-EBADF, ringest_stream_cancel, s, 0);
        CALL(-EBADF, ringest_stream_cancel_all, s);
        CALL(-EBADF, ringest_stream_replace_buffer, s, w.buffer);
        CALL(-EBADF, ringest_stream_finish, s);
        CALL(-EBADF, ringest_stream_inflight, s);
        CALL(-EBADF, ringest_stream_tail, s);
        CALL(-EBADF, ringest_stream_is_registered, s);
        CALL(-EBADF, ringest_stream_stats, s, &stats);
        CALL(-EBADF, ringest_stream_close, s, 0);
        CALL(-EBADF, ringest_stream_destroy, s);
    }
    if (kind != SHARED) {
        struct ringest_shared_buffers *s = (struct ringest_shared_buffers *)h;
        CALL(-EBADF, ringest_shared_buffers_free, s);
        CALL(-EBADF, ringest_ring_clone_buffers, w.ring, s);
    }
    if (kind != QUEUE) {
        struct ringest_io_queue *q = (struct ringest_io_queue *)h;
        struct ringest_io_queue_view view;
        struct ringest_slot_data data;
        struct ringest_slot slot;
        memset(&data, 0, sizeof data);
        CALL(-EBADF, ringest_io_queue_destroy, q);
        CALL(-EBADF, ringest_io_queue_device_view, q, &view);
        CALL(-EBADF, ringest_io_queue_device_view_on, q, 0, &view);
        CALL(-EBADF, ringest_io_queue_host_view, q, &view);
        CALL(-EBADF, ringest_io_queue_consumers_stopped, q);
        CALL(-EBADF, ringest_io_queue_reserve, q, &slot);
        CALL(-EBADF, ringest_io_queue_publish, q, 0, &data);
        CALL(-EBADF, ringest_io_queue_finish, q);
        CALL(-EBADF, ringest_io_queue_abort, q, EIO);
        CALL(-EBADF, ringest_io_queue_aborted, q);
        CALL(-EBADF, ringest_io_queue_tail, q);
        CALL(-EBADF, ringest_io_queue_reserved, q);
        CALL(-EBADF, ringest_io_queue_free_slots, q);
        CALL(-EBADF, ringest_consumer_create, q, 0, &consumer);
        CALL(-EBADF, ringest_driver_create, spare, q, NULL, &driver);
        CALL(-EBADF, ringest_driver_create_gpudirect, spare, q, NULL, &driver);
    }
    if (kind != CONSUMER) {
        struct ringest_consumer *c = (struct ringest_consumer *)h;
        every_consumer_call(-EBADF, c);
        CALL(-EBADF, ringest_consumer_destroy, c);
    }
    if (kind != DRIVER) {
        struct ringest_driver *d = (struct ringest_driver *)h;
        every_driver_call(-EBADF, d, file);
        every_driver_look(-EBADF, d);
    }
    if (kind != VMM) every_vmm_call(-EBADF, (struct ringest_vmm *)h);
    if (kind != RANGE) every_range_call(-EBADF, (struct ringest_vmm_range *)h);
    every_device_buffer_call(-EBADF, (struct ringest_device_buffer *)h);
    every_memory_call(-EBADF, (struct ringest_vmm_memory *)h);
    CHECK(!queue && !consumer && !driver);
    CHECK(!mapped && !shared && !buffer && !line && !stream && !words && !number && !half && !place);
    CALL(0, ringest_stream_inflight, w.stream);
    CALL(0, ringest_driver_in_flight, p.driver);
    CALL(0, ringest_io_queue_reserved, p.queue);
}

int main(void) {
    struct world gone;
    struct pipeline over;
    struct ringest_file *closed;
    struct ringest_vmm *vmm, *other_vmm;
    struct ringest_vmm_range *range, *other_range;
    void *live[KINDS], *stale[11], *second[KINDS];
    int fd = data_file(100);
    size_t i;

    open_world(&w, 4096, 0, 0);
    CALL(0, ringest_file_from_fd, fd, 0, &file);
    CALL(0, ringest_ring_register_buffers_sparse, w.ring, 1);
    CALL(0, ringest_ring_share_buffers, w.ring, &shares);
    open_pipeline(&p, 0, 0, 0);
    CALL(0, ringest_ring_create, NULL, &spare);
    CALL(0, ringest_vmm_create, RINGEST_GPU_NONE, &vmm);
    CALL(0, ringest_vmm_reserve, vmm, RINGEST_VMM_PLANNING_GRANULARITY, 4096, 0, &range);
    every_call(NULL, NONE);

    live[0] = w.mapped, live[1] = w.buffer, live[2] = file, live[3] = w.line, live[4] = w.ring, live[5] = w.stream;
    live[6] = shares, live[7] = p.queue, live[8] = p.consumer, live[9] = p.driver, live[10] = vmm, live[11] = range;
    for (i = 0; i < KINDS; i++) every_call(live[i], (enum kind)(i + 1));

    // Destroyed ones, whose places are in use again, and ones to be.
    open_world(&gone, 4096, 0, 0);
    CALL(0, ringest_file_from_fd, fd, 0, &closed);
    stale[0] = gone.mapped, stale[1] = gone.buffer, stale[2] = closed;
    stale[3] = gone.line, stale[4] = gone.ring, stale[5] = gone.stream;
    CALL(0, ringest_vmm_create, RINGEST_GPU_NONE, &other_vmm);
    CALL(0, ringest_vmm_reserve, other_vmm, RINGEST_VMM_PLANNING_GRANULARITY, 4096, 0, &other_range);
    stale[9] = other_vmm, stale[10] = other_range;
    CALL(0, ringest_vmm_destroy, other_vmm);
    CALL(0, ringest_vmm_range_release, other_range);
    open_pipeline(&over, 0, 0, 0);
    stale[6] = over.queue, stale[7] = over.consumer, stale[8] = over.driver;
    close_pipeline(&over);
    close_world(&gone);
    CALL(0, ringest_file_close, closed);
    for (i = 0; i < 11; i++) every_call(stale[i], NONE);
    open_pipeline(&over, 0, 0, 0);
    CALL(0, ringest_vmm_create, RINGEST_GPU_NONE, &other_vmm);
    CALL(0, ringest_vmm_reserve, other_vmm, RINGEST_VMM_PLANNING_GRANULARITY, 4096, 0, &other_range);
    open_world(&gone, 4096, 0, 0);
    CALL(0, ringest_file_from_fd, fd, 0, &closed);
    for (i = 0; i < 11; i++) every_call(stale[i], NONE);
    second[0] = gone.mapped, second[1] = gone.buffer, second[2] = closed;
    second[3] = gone.line, second[4] = gone.ring, second[5] = gone.stream, second[6] = NULL;
    second[7] = over.queue, second[8] = over.consumer, second[9] = over.driver;
    second[10] = other_vmm, second[11] = other_range;

    // Bits that were never a handle, among them pointers, and live handles with one bit changed.
    {
        uint64_t odd[] = {1,          UINT64_MAX, UINT64_C(1) << 63, (uintptr_t)&w, (uintptr_t)main, UINT64_C(0x0100000000ffffff),
                          0x05ffffff, UINT64_C(0x05ffffffffffffff)};
        for (i = 0; i < sizeof odd / sizeof *odd; i++) every_call((void *)(uintptr_t)odd[i], NONE);
        for (i = 0; i < KINDS * 64; i++) {
            uint64_t changed = (uint64_t)(uintptr_t)live[i / 64] ^ (UINT64_C(1) << (i % 64));
            void *h = (void *)(uintptr_t)changed;
            size_t other;
            // Rings are neighbours: one of them may be a bit away.
            if (h == spare || h == p.ring || h == over.ring) continue;
            for (other = 0; other < KINDS && h != live[other] && h != second[other];) other++;
            if (other < KINDS) continue;
            every_call(h, NONE);
        }
    }
    CALL(0, ringest_vmm_range_release, other_range);
    CALL(0, ringest_vmm_destroy, other_vmm);
    CALL(0, ringest_vmm_range_release, range);
    CALL(0, ringest_vmm_destroy, vmm);
    CALL(0, ringest_file_close, closed);
    close_world(&gone);
    close_pipeline(&over);
    close_pipeline(&p);
    CALL(0, ringest_ring_destroy, spare);
    CALL(0, ringest_file_close, file);
    CALL(0, ringest_shared_buffers_free, shares);
    close_world(&w);
    close(fd);
    return 0;
}
