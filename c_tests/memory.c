// Mapped memory and buffers: sizes, addresses, parts, and what is refused while memory is in use.
#include "check.h"

int main(void) {
    struct ringest_mapped *mapped, *none = NULL;
    struct ringest_buffer *buffer, *part, *second, *no_buffer = NULL;
    struct ringest_mapped_options options = {sizeof options, RINGEST_HUGE_PAGES_OFF, 1 << 16, 0, 0, {0}};
    struct ringest_tail_line *line;
    struct ringest_ring *ring;
    struct ringest_stream *stream;
    void *host, *at;
    uint64_t device, word;
    int ends[2];
    uint8_t *own;

    CALL(0, ringest_mapped_alloc, 10000, &options, &mapped);
    CALL(10000, ringest_mapped_size, mapped);
    CALL(0, ringest_mapped_host_ptr, mapped, &host);
    CHECK((uintptr_t)host % (1 << 16) == 0 && ((uint8_t *)host)[9999] == 0);
    CALL(0, ringest_mapped_device_ptr, mapped, &device);
    CHECK(device == (uintptr_t)host);
    CALL(-EINVAL, ringest_mapped_host_ptr, mapped, NULL);
    CALL(-EINVAL, ringest_mapped_device_ptr, mapped, NULL);
    CALL(-EINVAL, ringest_mapped_share, mapped, NULL);
    CALL(-EINVAL, ringest_mapped_alloc, 0, NULL, &none);
    CALL(-EINVAL, ringest_mapped_alloc, 1, NULL, NULL);
    CALL(-ENOMEM, ringest_mapped_alloc, SIZE_MAX, NULL, &none);
    CALL(-ENOMEM, ringest_mapped_alloc, (size_t)1 << 62, NULL, &none);
    options.alignment = 24;
    CALL(-EINVAL, ringest_mapped_alloc, 1, &options, &none);
    options.alignment = UINT64_C(1) << 63;
    CALL(-ENOMEM, ringest_mapped_alloc, 1, &options, &none);
    options.alignment = 0;
    options.huge_pages = 3;
    CALL(-EINVAL, ringest_mapped_alloc, 1, &options, &none);
    options.huge_pages = 0;
    options.pinning = 4;
    CALL(-EINVAL, ringest_mapped_alloc, 1, &options, &none);
    options.pinning = RINGEST_PINNING_AUTO;
    options.gpu = 1;
    CALL(-EINVAL, ringest_mapped_alloc, 1, &options, &none);
    options.pinning = options.gpu = 0;
    options.reserved[1] = 1;
    CALL(-EINVAL, ringest_mapped_alloc, 1, &options, &none);
    CHECK(none == NULL);
    CALL(RINGEST_PINNING_OFF, ringest_mapped_pinned, mapped);

    CALL(0, ringest_mapped_share, mapped, &buffer);
    CALL(10000, ringest_buffer_size, buffer);
    CALL(RINGEST_MEMORY_KIND_HOST_VISIBLE, ringest_buffer_kind, buffer);
    CALL(0, ringest_buffer_host_ptr, buffer, &at);
    CHECK(at == host);
    CALL(-EINVAL, ringest_buffer_host_ptr, buffer, NULL);
    CALL(-EINVAL, ringest_buffer_device_ptr, buffer, NULL);
    CALL(-EINVAL, ringest_buffer_duplicate, buffer, NULL);
    CALL(-EINVAL, ringest_buffer_sub_region, buffer, 0, 1, NULL);
    CALL(0, ringest_buffer_sub_region, buffer, 4096, 1000, &part);
    CALL(-ERANGE, ringest_buffer_sub_region, part, 500, 501, &no_buffer);
    CALL(-ERANGE, ringest_buffer_sub_region, part, SIZE_MAX, 2, &no_buffer);
    CALL(1000, ringest_buffer_size, part);
    CALL(0, ringest_buffer_device_ptr, part, &device);
    CHECK(device == (uintptr_t)host + 4096);
    CALL(0, ringest_buffer_duplicate, part, &second);
    // Mapped memory lives until its last handle is gone, in any order.
    CALL(0, ringest_mapped_free, mapped);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_buffer_release, part);
    CALL(0, ringest_buffer_host_ptr, second, &at);
    *(volatile uint8_t *)at = 1;
    CALL(0, ringest_buffer_release, second);

    // A tail line inside a buffer.
    CALL(0, ringest_mapped_alloc, 4096, NULL, &mapped);
    CALL(0, ringest_mapped_share, mapped, &buffer);
    CALL(-EINVAL, ringest_tail_line_in_buffer, buffer, 64, &line);
    CALL(-EINVAL, ringest_tail_line_in_buffer, buffer, 128, NULL);
    CALL(-ERANGE, ringest_tail_line_in_buffer, buffer, 4096, &line);
    CALL(-ERANGE, ringest_tail_line_in_buffer, buffer, SIZE_MAX - 127, &line);
    CALL(0, ringest_tail_line_in_buffer, buffer, 128, &line);
    CALL(-EINVAL, ringest_tail_line_host_ptr, line, NULL);
    CALL(-EINVAL, ringest_tail_line_device_ptr, line, NULL);
    CALL(-EINVAL, ringest_tail_line_alloc, NULL);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_mapped_free, mapped);
    CALL(0, ringest_tail_line_free, line);

    // Wrapped memory: the last handle stays while anything uses it.
    own = (uint8_t *)mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(own != MAP_FAILED);
    CALL(-EINVAL, ringest_buffer_from_host, NULL, 1, 0, &no_buffer);
    CALL(-EINVAL, ringest_buffer_from_host, own, 0, 0, &no_buffer);
    CALL(-EINVAL, ringest_buffer_from_host, own, 8192, 0, NULL);
    CALL(-ERANGE, ringest_buffer_from_host, own, SIZE_MAX, 0, &no_buffer);
    CALL(-ERANGE, ringest_buffer_from_host, own, 8192, UINT64_MAX - 100, &no_buffer);
    CHECK(no_buffer == NULL);
    CALL(0, ringest_buffer_from_host, own, 8192, 0, &buffer);
    CALL(0, ringest_buffer_device_ptr, buffer, &device);
    CHECK(device == 0);
    CALL(0, ringest_buffer_sub_region, buffer, 0, 4096, &part);
    CALL(0, ringest_buffer_duplicate, part, &second);
    // Handles that are not the last go freely.
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_buffer_release, second);
    CALL(0, ringest_ring_create, NULL, &ring);
    CALL(0, ringest_ring_register_buffers, ring, (const struct ringest_buffer *const *)&part, 1);
    CALL(-EBUSY, ringest_buffer_release, part);
    CALL(0, ringest_ring_unregister_buffers, ring);
    CALL(0, ringest_stream_create_u64, ring, part, &word, NULL, &stream);
    CALL(-EBUSY, ringest_buffer_release, part);
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    CALL(0, ringest_stream_submit_read, stream, ends[0], 0, 0, 64, 0);
    CALL(1, ringest_stream_flush, stream);
    CALL(-EBUSY, ringest_buffer_release, part);
    CALL(0, ringest_stream_destroy, stream);
    CALL(0, ringest_tail_line_in_buffer, part, 0, &line);
    CALL(-EBUSY, ringest_buffer_release, part);
    CALL(0, ringest_tail_line_free, line);
    CALL(0, ringest_buffer_release, part);
    CALL(-EBADF, ringest_buffer_release, part);
    CALL(0, ringest_ring_destroy, ring);
    close(ends[0]);
    close(ends[1]);
    CHECK(munmap(own, 8192) == 0);
    return 0;
}
