// GPUs and their memory: without one everything says why not, and planning works; with one (or a stand-in for its driver)
// all of it does.
#include "gpu_calls.h"
#include <dlfcn.h>

#define MIB (UINT64_C(1) << 20)
#define GRANULE RINGEST_VMM_PLANNING_GRANULARITY

struct later_device {
    struct ringest_device_buffer_options known;
    uint64_t more[2];
};
struct later_memory {
    struct ringest_vmm_memory_options known;
    uint64_t more[2];
};

static struct ringest_mapped_options mapped_options(uint32_t pinning, uint32_t gpu) {
    struct ringest_mapped_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.pinning = pinning;
    options.gpu = gpu;
    return options;
}

static struct ringest_io_queue_options queue_options(uint32_t pinning, uint32_t gpu) {
    struct ringest_io_queue_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.slots = 4;
    options.slot_bytes = 4096;
    options.pinning = pinning;
    options.gpu = gpu;
    return options;
}

static struct ringest_device_buffer_options with_capacity(uint64_t capacity) {
    struct ringest_device_buffer_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.capacity = capacity;
    return options;
}

static struct ringest_vmm_memory_options memory_options(uint32_t flags) {
    struct ringest_vmm_memory_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.flags = flags;
    return options;
}

// What names a GPU, with one that does not exist: -EOPNOTSUPP where there is none at all, -ENODEV where there are others.
static void every_call_of_a_gpu(int64_t expected, uint32_t gpu) {
    struct ringest_mapped_options pinned = mapped_options(RINGEST_PINNING_GPU, gpu);
    struct ringest_io_queue_options queues = queue_options(RINGEST_PINNING_HOST_ALLOC, gpu);
    struct ringest_mapped *none = NULL;
    struct ringest_io_queue *queue = NULL;
    struct ringest_device_buffer *device = NULL;
    struct ringest_vmm *vmm = NULL;
    struct ringest_gpu_info info;
    CALL(expected, ringest_gpu_info, gpu, &info);
    CALL(expected, ringest_mapped_alloc, 4096, &pinned, &none);
    pinned.pinning = RINGEST_PINNING_HOST_ALLOC;
    CALL(expected, ringest_mapped_alloc, 4096, &pinned, &none);
    CALL(expected, ringest_io_queue_create, &queues, &queue);
    CALL(expected, ringest_device_buffer_create, gpu, 4096, NULL, &device);
    CALL(expected, ringest_device_buffer_from_ptr, gpu, 4096, 4096, &device);
    CALL(expected, ringest_vmm_create, gpu, &vmm);
    CHECK(!none && !queue && !device && !vmm);
}

static void on_handles(int64_t expected, uint32_t gpu, struct ringest_mapped *mapped, struct ringest_buffer *buffer,
                       struct ringest_io_queue *queue) {
    struct ringest_io_queue_view view;
    uint64_t address = 0;
    CALL(expected, ringest_mapped_device_ptr_on, mapped, gpu, &address);
    CALL(expected, ringest_buffer_device_ptr_on, buffer, gpu, &address);
    CALL(expected, ringest_buffer_check_gpu, buffer, gpu);
    CALL(expected, ringest_io_queue_device_view_on, queue, gpu, &view);
    CHECK(!address);
}

// Arguments that are refused with and without a GPU, before one is looked for.
static void arguments(void) {
    struct ringest_mapped *mapped;
    struct ringest_buffer *buffer;
    struct ringest_io_queue *queue = NULL;
    struct ringest_io_queue_options queues = queue_options(RINGEST_PINNING_GPU, 0);
    struct ringest_device_buffer *device = NULL;
    struct ringest_device_buffer_options options = with_capacity(4096);
    struct later_device later;
    struct ringest_mapped_options plain = mapped_options(RINGEST_PINNING_AUTO, 0);

    CALL(-EINVAL, ringest_gpu_info, 0, NULL);
    CALL(DONE, ringest_gpu_leaks);
    CALL(-EINVAL, ringest_device_buffer_create, 0, 0, NULL, &device);
    CALL(-EINVAL, ringest_device_buffer_create, 0, 4096, NULL, NULL);
    CALL(-EINVAL, ringest_device_buffer_create, 0, 4097, &options, &device);
    options.flags = 1;
    CALL(-EINVAL, ringest_device_buffer_create, 0, 4096, &options, &device);
    options.flags = 0;
    options.reserved[1] = 1;
    CALL(-EINVAL, ringest_device_buffer_create, 0, 4096, &options, &device);
    memset(&later, 0, sizeof later);
    later.known.size = sizeof later;
    later.more[1] = 1;
    CALL(-E2BIG, ringest_device_buffer_create, 0, 4096, &later.known, &device);
    CALL(-EINVAL, ringest_device_buffer_from_ptr, 0, 0, 1, &device);
    CALL(-EINVAL, ringest_device_buffer_from_ptr, 0, 4096, 0, &device);
    CALL(-EINVAL, ringest_device_buffer_from_ptr, 0, 4096, 1, NULL);
    CALL(-EINVAL, ringest_vmm_create, RINGEST_GPU_NONE, NULL);
    CHECK(!device);

    // Wanted, not demanded: there is memory either way.
    CALL(0, ringest_mapped_alloc, 4096, &plain, &mapped);
    CALL(DONE, ringest_mapped_pinned, mapped);
    CALL(0, ringest_mapped_share, mapped, &buffer);
    CALL(-EINVAL, ringest_mapped_device_ptr_on, mapped, 0, NULL);
    CALL(-EINVAL, ringest_buffer_device_ptr_on, buffer, 0, NULL);
    // Memory that is given is as it is.
    CALL(-EINVAL, ringest_io_queue_create_in, &queues, buffer, buffer, buffer, buffer, &queue);
    queues.pinning = RINGEST_PINNING_OFF;
    CALL(0, ringest_io_queue_create, &queues, &queue);
    CALL(-EINVAL, ringest_io_queue_device_view_on, queue, 0, NULL);
    CALL(0, ringest_io_queue_destroy, queue);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_mapped_free, mapped);
    every_device_buffer_call(-EBADF, NULL);
    every_vmm_call(-EBADF, NULL);
    every_range_call(-EBADF, NULL);
    every_memory_call(-EBADF, NULL);
}

// Arguments of a manager that is there, of a GPU or not.
static void reserve(struct ringest_vmm *vmm) {
    struct ringest_vmm_memory_options options = memory_options(0);
    struct ringest_vmm_range *range, *none = NULL;
    struct ringest_vmm_memory *memory = NULL;
    struct later_memory later;
    uint64_t address;

    CALL(-EINVAL, ringest_vmm_reserve, vmm, 0, 4096, 0, &none);
    CALL(-EINVAL, ringest_vmm_reserve, vmm, GRANULE, 0, 0, &none);
    CALL(-EINVAL, ringest_vmm_reserve, vmm, GRANULE, 3, 0, &none);
    CALL(-EINVAL, ringest_vmm_reserve, vmm, GRANULE, 2 * GRANULE, 0, &none);
    CALL(-EINVAL, ringest_vmm_reserve, vmm, GRANULE + 4096, 4096, 0, &none);
    CALL(-EINVAL, ringest_vmm_reserve, vmm, GRANULE, 4096, 1, &none);
    CALL(-EINVAL, ringest_vmm_reserve, vmm, GRANULE, 4096, 0, NULL);
    CHECK(!none);
    CALL(0, ringest_vmm_reserve, vmm, 16 * GRANULE, 4 * GRANULE, 0, &range);
    CALL(16 * GRANULE, ringest_vmm_range_size, range);
    CALL(0, ringest_vmm_range_mapped, range);
    CALL(0, ringest_vmm_range_address, range, &address);
    CHECK(address && address % (4 * GRANULE) == 0);
    CALL(-EINVAL, ringest_vmm_range_address, range, NULL);
    CALL(0, ringest_vmm_range_release, range);
    every_range_call(-EBADF, range);

    CALL(-EINVAL, ringest_vmm_granularity, vmm, NULL, 2);
    options.location = 4;
    CALL(-EINVAL, ringest_vmm_granularity, vmm, &options, 0);
    CALL(-EINVAL, ringest_vmm_alloc_physical, vmm, GRANULE, &options, &memory);
    options.location = RINGEST_VMM_LOCATION_OWN;
    options.id = 1;
    CALL(-EINVAL, ringest_vmm_alloc_physical, vmm, GRANULE, &options, &memory);
    options.id = 0;
    options.flags = 4;
    CALL(-EINVAL, ringest_vmm_alloc_physical, vmm, GRANULE, &options, &memory);
    options.flags = 0;
    options.reserved[0] = 1;
    CALL(-EINVAL, ringest_vmm_granularity, vmm, &options, 0);
    memset(&later, 0, sizeof later);
    later.known.size = sizeof later;
    later.more[0] = 1;
    CALL(-E2BIG, ringest_vmm_granularity, vmm, &later.known, 0);
    CALL(-E2BIG, ringest_vmm_alloc_physical, vmm, GRANULE, &later.known, &memory);
    CALL(-EINVAL, ringest_vmm_alloc_physical, vmm, 0, NULL, &memory);
    CALL(-EINVAL, ringest_vmm_alloc_physical, vmm, GRANULE, NULL, NULL);
    CALL(-EBADF, ringest_vmm_import_fd, vmm, -1, GRANULE, &memory);
    CALL(-EINVAL, ringest_vmm_import_fd, vmm, 0, 0, &memory);
    CALL(-EINVAL, ringest_vmm_import_fd, vmm, 0, GRANULE, NULL);
    CHECK(!memory);
}

// A manager without a GPU: addresses with nothing behind them.
static void planning(void) {
    struct ringest_vmm_grant grant = {RINGEST_VMM_LOCATION_OWN, 0, RINGEST_VMM_ACCESS_READ, 0};
    struct ringest_vmm *vmm;
    struct ringest_vmm_range *range;
    struct ringest_vmm_memory *memory = NULL;

    CALL(0, ringest_vmm_create, RINGEST_GPU_NONE, &vmm);
    reserve(vmm);
    range = NULL;
    CALL(-ENOMEM, ringest_vmm_reserve, vmm, SIZE_MAX - GRANULE + 1, 4096, 0, &range);
    CHECK(!range);
    CALL(0, ringest_vmm_reserve, vmm, GRANULE, 4096, 0, &range);
    CALL(-EOPNOTSUPP, ringest_vmm_granularity, vmm, NULL, 0);
    CALL(-EOPNOTSUPP, ringest_vmm_alloc_physical, vmm, GRANULE, NULL, &memory);
    CALL(-EOPNOTSUPP, ringest_vmm_import_fd, vmm, 0, GRANULE, &memory);
    CALL(-EOPNOTSUPP, ringest_vmm_range_unmap, range, 0, GRANULE);
    CALL(-EOPNOTSUPP, ringest_vmm_range_set_access, range, 0, GRANULE, &grant, 1);
    CALL(-EOPNOTSUPP, ringest_vmm_range_access, range, 0, RINGEST_VMM_LOCATION_HOST, 0);
    CALL(-EOPNOTSUPP, ringest_vmm_range_export_dma_buf, range, 0, GRANULE);
    CHECK(!memory && strstr(ringest_last_error(), "plan"));
    // Ranges outlive their manager.
    CALL(0, ringest_vmm_destroy, vmm);
    every_vmm_call(-EBADF, vmm);
    CALL(GRANULE, ringest_vmm_range_size, range);
    CALL(0, ringest_vmm_range_release, range);
}

static void without(void) {
    struct ringest_mapped *mapped;
    struct ringest_buffer *buffer;
    struct ringest_io_queue *queue;
    struct ringest_io_queue_options options = queue_options(RINGEST_PINNING_AUTO, 0);

    CHECK(strlen(ringest_last_error()) > 20);
    CALL(-EOPNOTSUPP, ringest_gpu_driver_version);
    every_call_of_a_gpu(-EOPNOTSUPP, 0);
    CALL(0, ringest_mapped_alloc, 4096, NULL, &mapped);
    CALL(RINGEST_PINNING_OFF, ringest_mapped_pinned, mapped);
    CALL(0, ringest_mapped_share, mapped, &buffer);
    CALL(0, ringest_io_queue_create, &options, &queue);
    on_handles(-EOPNOTSUPP, 0, mapped, buffer, queue);
    CALL(0, ringest_io_queue_destroy, queue);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_mapped_free, mapped);
}

// Page-locked memory, of ringest's own and of others.
static void host_memory(int count) {
    static uint8_t plain[4096];
    struct ringest_mapped_options options = mapped_options(RINGEST_PINNING_GPU, 0);
    struct ringest_io_queue_options queues = queue_options(RINGEST_PINNING_GPU, 0);
    struct ringest_io_queue_view view, here;
    struct ringest_mapped *mapped, *allocated, *unlocked, *none = NULL;
    struct ringest_buffer *buffer, *wrapped, *wrong;
    struct ringest_io_queue *queue, *unlocked_queue;
    uint64_t device, on, there;
    void *host;

    CALL(0, ringest_mapped_alloc, 3 * MIB, &options, &mapped);
    CALL(RINGEST_PINNING_GPU, ringest_mapped_pinned, mapped);
    CALL(0, ringest_mapped_device_ptr, mapped, &device);
    CALL(0, ringest_mapped_device_ptr_on, mapped, 0, &on);
    CHECK(device && on == device);
    CALL(0, ringest_mapped_host_ptr, mapped, &host);
    options.pinning = RINGEST_PINNING_HOST_ALLOC;
    CALL(0, ringest_mapped_alloc, 4096, &options, &allocated);
    CALL(RINGEST_PINNING_HOST_ALLOC, ringest_mapped_pinned, allocated);
    CALL(0, ringest_mapped_free, allocated);
    options.huge_pages = RINGEST_HUGE_PAGES_REQUIRE;
    CALL(-EINVAL, ringest_mapped_alloc, 4096, &options, &none);
    CHECK(!none);

    CALL(0, ringest_mapped_share, mapped, &buffer);
    CALL(0, ringest_buffer_device_ptr_on, buffer, 0, &on);
    CHECK(on == device);
    CALL(-EBUSY, ringest_buffer_check_gpu, buffer, 0);
    CALL(0, ringest_buffer_from_host, (uint8_t *)host + 4096, 4096, 0, &wrapped);
    CALL(-EOPNOTSUPP, ringest_buffer_device_ptr_on, wrapped, 0, &on);
    CALL(0, ringest_buffer_check_gpu, wrapped, 0);
    CALL(0, ringest_buffer_device_ptr, wrapped, &on);
    CHECK(on == device + 4096);
    CALL(0, ringest_buffer_device_ptr_on, wrapped, 0, &on);
    CHECK(on == device + 4096);
    CALL(0, ringest_buffer_from_host, plain, sizeof plain, 0, &wrong);
    CALL(-EINVAL, ringest_buffer_check_gpu, wrong, 0);
    CALL(0, ringest_buffer_device_ptr, wrong, &on);
    CHECK(on == 0);
    CALL(0, ringest_buffer_release, wrong);

    CALL(0, ringest_io_queue_create, &queues, &queue);
    CALL(0, ringest_io_queue_device_view, queue, &view);
    CALL(0, ringest_io_queue_device_view_on, queue, 0, &here);
    CHECK(memcmp(&view, &here, sizeof view) == 0);
    CALL(-EBUSY, ringest_io_queue_destroy, queue);
    CALL(0, ringest_io_queue_consumers_stopped, queue);
    queues.pinning = RINGEST_PINNING_OFF;
    CALL(0, ringest_io_queue_create, &queues, &unlocked_queue);
    CALL(-EOPNOTSUPP, ringest_io_queue_device_view_on, unlocked_queue, 0, &here);
    CALL(0, ringest_mapped_alloc, 4096, NULL, &unlocked);
    CALL(-EOPNOTSUPP, ringest_mapped_device_ptr_on, unlocked, 0, &on);
    on_handles(-ENODEV, (uint32_t)count, mapped, buffer, queue);
    if (count > 1) {
        // Locked for one, known to all.
        CALL(0, ringest_mapped_device_ptr_on, mapped, 1, &on);
        CALL(0, ringest_buffer_device_ptr_on, buffer, 1, &there);
        CHECK(on && there == on);
        CALL(0, ringest_io_queue_device_view_on, queue, 1, &here);
        CHECK(here.slots && here.control && here.slots - here.control == view.slots - view.control);
        CALL(0, ringest_io_queue_consumers_stopped, queue);
    }
    CALL(0, ringest_mapped_free, unlocked);
    CALL(0, ringest_io_queue_destroy, unlocked_queue);
    CALL(0, ringest_io_queue_destroy, queue);
    CALL(0, ringest_buffer_release, wrapped);
    CALL(0, ringest_buffer_release, buffer);
    CALL(0, ringest_mapped_free, mapped);
}

static void device_memory(const struct ringest_gpu_info *info) {
    static uint8_t bytes[10000], back[10000];
    struct ringest_device_buffer_options options = with_capacity(8 * MIB);
    struct ringest_device_buffer *owned, *wrapped, *growing, *none = NULL;
    uint64_t address, after;
    int64_t size, capacity, fd;
    pid_t child;
    int ended;
    size_t i;

    for (i = 0; i < sizeof bytes; i++) bytes[i] = pattern(i);
    CALL(-ENOMEM, ringest_device_buffer_create, 0, (size_t)1 << 50, NULL, &none);
    CALL(0, ringest_device_buffer_create, 0, 2 * MIB, NULL, &owned);
    CALL(2 * MIB, ringest_device_buffer_size, owned);
    CALL(2 * MIB, ringest_device_buffer_capacity, owned);
    CALL(-EINVAL, ringest_device_buffer_address, owned, NULL);
    CALL(0, ringest_device_buffer_address, owned, &address);
    CALL(0, ringest_device_buffer_copy_in, owned, 77, bytes, sizeof bytes);
    CALL(0, ringest_device_buffer_fill, owned, 78, 2, 0xee);
    CALL(0, ringest_device_buffer_copy_out, owned, 77, back, sizeof back);
    CHECK(back[0] == bytes[0] && back[1] == 0xee && back[2] == 0xee && !memcmp(back + 3, bytes + 3, sizeof back - 3));
    CALL(-EINVAL, ringest_device_buffer_copy_in, owned, 0, NULL, 1);
    CALL(-EINVAL, ringest_device_buffer_copy_out, owned, 0, NULL, 1);
    CALL(0, ringest_device_buffer_copy_in, owned, 2 * MIB, NULL, 0);
    CALL(0, ringest_device_buffer_copy_out, owned, 2 * MIB, NULL, 0);
    CALL(-ERANGE, ringest_device_buffer_copy_in, owned, 2 * MIB - 1, bytes, 2);
    CALL(-ERANGE, ringest_device_buffer_copy_out, owned, SIZE_MAX, back, 2);
    CALL(-ERANGE, ringest_device_buffer_fill, owned, 0, 2 * MIB + 1, 0);
    CALL(-EOPNOTSUPP, ringest_device_buffer_grow, owned, 4 * MIB);
    if (info->flags & RINGEST_GPU_DMA_BUF) {
        CALL(-ERANGE, ringest_device_buffer_export_dma_buf, owned, 0, 4 * MIB);
        fd = CALL(DONE, ringest_device_buffer_export_dma_buf, owned, 0, 2 * MIB);
        CHECK(close((int)fd) == 0);
    } else {
        CALL(-EOPNOTSUPP, ringest_device_buffer_export_dma_buf, owned, 0, 2 * MIB);
    }

    CALL(0, ringest_device_buffer_from_ptr, 0, address + 77, 100, &wrapped);
    CALL(0, ringest_device_buffer_copy_out, wrapped, 3, back, 97);
    CHECK(!memcmp(back, bytes + 3, 97));
    // A child has no GPU; what it gives up stays its parent's.
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CALL(-EOPNOTSUPP, ringest_device_buffer_fill, owned, 0, 1, 0);
        CALL(2 * MIB, ringest_device_buffer_size, owned);
        CALL(0, ringest_device_buffer_free, owned);
        _exit(0);
    }
    CHECK(waitpid(child, &ended, 0) == child && WIFEXITED(ended) && WEXITSTATUS(ended) == 0);
    CALL(0, ringest_device_buffer_free, wrapped);
    every_device_buffer_call(-EBADF, wrapped);
    CALL(-ERANGE, ringest_device_buffer_from_ptr, 0, address, (size_t)1 << 40, &none);
    CALL(-EINVAL, ringest_device_buffer_from_ptr, 0, (uintptr_t)bytes, 100, &none);
    CALL(0, ringest_device_buffer_free, owned);
    CHECK(!none);

    if (!(info->flags & RINGEST_GPU_VIRTUAL_MEMORY)) {
        CALL(-EOPNOTSUPP, ringest_device_buffer_create, 0, 0, &options, &none);
        return;
    }
    CALL(0, ringest_device_buffer_create, 0, 0, &options, &growing);
    CALL(0, ringest_device_buffer_size, growing);
    capacity = CALL(DONE, ringest_device_buffer_capacity, growing);
    CHECK(capacity >= (int64_t)(8 * MIB));
    CALL(0, ringest_device_buffer_address, growing, &address);
    CALL(0, ringest_device_buffer_grow, growing, sizeof bytes);
    size = CALL(DONE, ringest_device_buffer_size, growing);
    CHECK(size >= (int64_t)sizeof bytes);
    CALL(0, ringest_device_buffer_copy_in, growing, 0, bytes, sizeof bytes);
    CALL(0, ringest_device_buffer_grow, growing, (size_t)capacity);
    CALL(-ERANGE, ringest_device_buffer_grow, growing, (size_t)capacity + 1);
    CALL(0, ringest_device_buffer_address, growing, &after);
    CALL(0, ringest_device_buffer_copy_out, growing, 0, back, sizeof back);
    CHECK(after == address && !memcmp(back, bytes, sizeof back));
    CALL(0, ringest_device_buffer_free, growing);
}

static void virtual_memory(const struct ringest_gpu_info *info) {
    const bool exports = info->flags & RINGEST_GPU_EXPORT_FD;
    const bool peers = info->flags & RINGEST_GPU_RDMA_VIRTUAL_MEMORY;
    struct ringest_vmm_memory_options options =
        memory_options((exports ? RINGEST_VMM_EXPORTABLE : 0) | (peers ? RINGEST_VMM_RDMA : 0));
    struct ringest_vmm_grant grant = {RINGEST_VMM_LOCATION_OWN, 0, RINGEST_VMM_ACCESS_READ_WRITE, 0}, bad = grant;
    struct ringest_vmm *vmm, *plan;
    struct ringest_vmm_range *range, *planned;
    struct ringest_vmm_memory *memory, *private_memory, *imported, *none = NULL;
    struct ringest_device_buffer *window;
    uint8_t byte = 0;
    uint64_t address;
    size_t unit;
    int64_t fd;

    if (!(info->flags & RINGEST_GPU_VIRTUAL_MEMORY)) {
        CALL(-EOPNOTSUPP, ringest_vmm_create, 0, &vmm);
        return;
    }
    CALL(0, ringest_vmm_create, 0, &vmm);
    reserve(vmm);
    unit = (size_t)CALL(DONE, ringest_vmm_granularity, vmm, &options, 0);
    CALL(DONE, ringest_vmm_granularity, vmm, NULL, 1);
    CALL(-EINVAL, ringest_vmm_alloc_physical, vmm, unit + 1, NULL, &none);
    CALL(-ENOMEM, ringest_vmm_alloc_physical, vmm, (size_t)1 << 50, NULL, &none);
    CHECK(!none);
    CALL(0, ringest_vmm_reserve, vmm, 4 * unit, unit, 0, &range);
    CALL(0, ringest_vmm_alloc_physical, vmm, unit, &options, &memory);
    CALL(0, ringest_vmm_alloc_physical, vmm, unit, NULL, &private_memory);
    CALL((int64_t)unit, ringest_vmm_memory_size, memory);
    CALL(0, ringest_vmm_memory_is_mapped, memory);

    CALL(-EBADF, ringest_vmm_range_map, range, 0, unit, NULL, 0);
    CALL(-EINVAL, ringest_vmm_range_map, range, 0, 0, memory, 0);
    CALL(-EINVAL, ringest_vmm_range_map, range, 1, unit, memory, 0);
    CALL(-ERANGE, ringest_vmm_range_map, range, 4 * unit, unit, memory, 0);
    CALL(-ERANGE, ringest_vmm_range_map, range, 0, 2 * unit, memory, 0);
    CALL(0, ringest_vmm_range_map, range, unit, unit, memory, 0);
    CALL(-EBUSY, ringest_vmm_range_map, range, unit, unit, private_memory, 0);
    CALL(0, ringest_vmm_range_map, range, 2 * unit, unit, private_memory, 0);
    CALL((int64_t)(2 * unit), ringest_vmm_range_mapped, range);
    CALL(1, ringest_vmm_memory_is_mapped, memory);
    CALL(-EBUSY, ringest_vmm_memory_free, memory);
    CALL(-EBUSY, ringest_vmm_range_release, range);

    CALL(-EINVAL, ringest_vmm_range_set_access, range, unit, unit, &grant, 0);
    CALL(-EINVAL, ringest_vmm_range_set_access, range, unit, unit, NULL, 1);
    CALL(-EINVAL, ringest_vmm_range_set_access, range, 0, 2 * unit, &grant, 1);
    CALL(-ERANGE, ringest_vmm_range_set_access, range, 0, 5 * unit, &grant, 1);
    bad.access = 3;
    CALL(-EINVAL, ringest_vmm_range_set_access, range, unit, unit, &bad, 1);
    bad = grant;
    bad.location = 4;
    CALL(-EINVAL, ringest_vmm_range_set_access, range, unit, unit, &bad, 1);
    bad = grant;
    bad.reserved = 1;
    CALL(-EINVAL, ringest_vmm_range_set_access, range, unit, unit, &bad, 1);
    CALL(0, ringest_vmm_range_set_access, range, unit, 2 * unit, &grant, 1);
    CALL(RINGEST_VMM_ACCESS_READ_WRITE, ringest_vmm_range_access, range, unit, RINGEST_VMM_LOCATION_GPU, 0);
    CALL(-EINVAL, ringest_vmm_range_access, range, 0, RINGEST_VMM_LOCATION_OWN, 0);
    CALL(-EINVAL, ringest_vmm_range_access, range, unit, RINGEST_VMM_LOCATION_HOST, 1);
    CALL(-ERANGE, ringest_vmm_range_access, range, 4 * unit, RINGEST_VMM_LOCATION_OWN, 0);

    // It is memory.
    CALL(0, ringest_vmm_range_address, range, &address);
    CALL(0, ringest_device_buffer_from_ptr, 0, address + unit, 2 * unit, &window);
    CALL(0, ringest_device_buffer_fill, window, 0, 2 * unit, 0x5a);
    CALL(0, ringest_device_buffer_copy_out, window, 2 * unit - 1, &byte, 1);
    CHECK(byte == 0x5a);
    CALL(0, ringest_device_buffer_free, window);

    if (info->flags & RINGEST_GPU_DMA_BUF) {
        fd = CALL(DONE, ringest_vmm_range_export_dma_buf, range, unit, unit);
        CHECK(close((int)fd) == 0);
        CALL(-EINVAL, ringest_vmm_range_export_dma_buf, range, 0, unit);
        CALL(-ERANGE, ringest_vmm_range_export_dma_buf, range, 4 * unit, unit);
    } else {
        CALL(-EOPNOTSUPP, ringest_vmm_range_export_dma_buf, range, unit, unit);
    }
    CALL(-EINVAL, ringest_vmm_memory_export_fd, private_memory);
    if (exports) {
        fd = CALL(DONE, ringest_vmm_memory_export_fd, memory);
        CALL(0, ringest_vmm_import_fd, vmm, (int)fd, unit, &imported);
        CALL(-EINVAL, ringest_vmm_import_fd, vmm, (int)fd, unit + 1, &none);
        CHECK(!none && close((int)fd) == 0);
        CALL(0, ringest_vmm_range_map, range, 0, unit, imported, 0);
        CALL(0, ringest_vmm_range_set_access, range, 0, unit, &grant, 1);
        CALL(0, ringest_device_buffer_from_ptr, 0, address, unit, &window);
        CALL(0, ringest_device_buffer_copy_out, window, 5, &byte, 1);
        CHECK(byte == 0x5a);
        CALL(0, ringest_device_buffer_free, window);
        CALL(0, ringest_vmm_range_unmap, range, 0, unit);
        CALL(0, ringest_vmm_memory_free, imported);
    } else {
        options = memory_options(RINGEST_VMM_EXPORTABLE);
        CALL(-EOPNOTSUPP, ringest_vmm_alloc_physical, vmm, unit, &options, &none);
    }

    CALL(0, ringest_vmm_create, RINGEST_GPU_NONE, &plan);
    CALL(0, ringest_vmm_reserve, plan, GRANULE, 4096, 0, &planned);
    CALL(-EOPNOTSUPP, ringest_vmm_range_map, planned, 0, GRANULE, memory, 0);
    CALL(0, ringest_vmm_range_release, planned);
    CALL(0, ringest_vmm_destroy, plan);

    CALL(-EINVAL, ringest_vmm_range_unmap, range, 0, 2 * unit);
    CALL(-EINVAL, ringest_vmm_range_unmap, range, unit, 0);
    CALL(-ERANGE, ringest_vmm_range_unmap, range, 4 * unit, unit);
    CALL(0, ringest_vmm_destroy, vmm);
    CALL(0, ringest_vmm_range_unmap, range, unit, 2 * unit);
    CALL(0, ringest_vmm_memory_is_mapped, memory);
    CALL(0, ringest_vmm_memory_free, memory);
    every_memory_call(-EBADF, memory);
    CALL(0, ringest_vmm_memory_free, private_memory);
    CALL(0, ringest_vmm_range_release, range);
}

static void with(int count) {
    struct ringest_gpu_info info;
    int version = ringest_gpu_driver_version();
    COVER_CALL(ringest_gpu_driver_version, version);
    CHECK(version >= 11000);
    CALL(0, ringest_gpu_info, 0, &info);
    CHECK(info.name[0] && !info.name[sizeof info.name - 1] && strlen(info.pci_address) == 12 && info.memory >= 256 * MIB);
    CHECK(info.multiprocessors && info.compute_major >= 5 && !info.reserved[0] && !info.reserved[18]);
    printf("%d GPUs, CUDA %d, %s at %s, %llu MiB, flags %#llx\n", count, version, info.name, info.pci_address,
           (unsigned long long)(info.memory / MIB), (unsigned long long)info.flags);
    every_call_of_a_gpu(-ENODEV, (uint32_t)count);
    every_call_of_a_gpu(-ENODEV, RINGEST_GPU_NONE - 1);
    host_memory(count);
    device_memory(&info);
    virtual_memory(&info);
    CALL(0, ringest_gpu_leaks);
}

// A stand-in keeps books: nothing was left behind, and its calls were made as they must be.
static void books(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    long (*live)(void), (*misuses)(void);
    if (!driver) return;
    *(void **)&live = dlsym(driver, "fake_cuda_live");
    *(void **)&misuses = dlsym(driver, "fake_cuda_misuses");
    if (live && misuses) CHECK(live() == 0 && misuses() == 0);
}

int main(void) {
    int count = ringest_gpu_count();
    COVER_CALL(ringest_gpu_count, count);
    if (count < 0) {
        CHECK(count == -EOPNOTSUPP);
        printf("no GPU: %s\n", ringest_last_error());
        without();
    } else {
        with(count);
    }
    arguments();
    planning();
    books();
    return 0;
}
