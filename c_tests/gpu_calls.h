// Every call that takes a handle of the CUDA memory layer.
#ifndef RINGEST_GPU_CALLS_H
#define RINGEST_GPU_CALLS_H

#include "check.h"

UNUSED void every_device_buffer_call(int64_t expected, struct ringest_device_buffer *d) {
    uint64_t address = 0;
    uint8_t byte = 1;
    CALL(expected, ringest_device_buffer_free, d);
    CALL(expected, ringest_device_buffer_address, d, &address);
    CALL(expected, ringest_device_buffer_size, d);
    CALL(expected, ringest_device_buffer_capacity, d);
    CALL(expected, ringest_device_buffer_grow, d, 1);
    CALL(expected, ringest_device_buffer_copy_in, d, 0, &byte, 1);
    CALL(expected, ringest_device_buffer_copy_out, d, 0, &byte, 1);
    CALL(expected, ringest_device_buffer_fill, d, 0, 1, 0);
    CALL(expected, ringest_device_buffer_export_dma_buf, d, 0, 4096);
    CHECK(!address && byte == 1);
}

UNUSED void every_vmm_call(int64_t expected, struct ringest_vmm *v) {
    struct ringest_vmm_range *range = NULL;
    struct ringest_vmm_memory *memory = NULL;
    CALL(expected, ringest_vmm_granularity, v, NULL, 0);
    CALL(expected, ringest_vmm_reserve, v, RINGEST_VMM_PLANNING_GRANULARITY, 4096, 0, &range);
    CALL(expected, ringest_vmm_alloc_physical, v, RINGEST_VMM_PLANNING_GRANULARITY, NULL, &memory);
    CALL(expected, ringest_vmm_import_fd, v, 0, RINGEST_VMM_PLANNING_GRANULARITY, &memory);
    CALL(expected, ringest_vmm_destroy, v);
    CHECK(!range && !memory);
}

UNUSED void every_range_call(int64_t expected, struct ringest_vmm_range *r) {
    struct ringest_vmm_grant grant = {RINGEST_VMM_LOCATION_OWN, 0, RINGEST_VMM_ACCESS_READ, 0};
    uint64_t address = 0;
    CALL(expected, ringest_vmm_range_release, r);
    CALL(expected, ringest_vmm_range_address, r, &address);
    CALL(expected, ringest_vmm_range_size, r);
    CALL(expected, ringest_vmm_range_mapped, r);
    CALL(expected, ringest_vmm_range_map, r, 0, RINGEST_VMM_PLANNING_GRANULARITY, NULL, 0);
    CALL(expected, ringest_vmm_range_unmap, r, 0, RINGEST_VMM_PLANNING_GRANULARITY);
    CALL(expected, ringest_vmm_range_set_access, r, 0, RINGEST_VMM_PLANNING_GRANULARITY, &grant, 1);
    CALL(expected, ringest_vmm_range_access, r, 0, RINGEST_VMM_LOCATION_OWN, 0);
    CALL(expected, ringest_vmm_range_export_dma_buf, r, 0, RINGEST_VMM_PLANNING_GRANULARITY);
    CHECK(!address);
}

UNUSED void every_memory_call(int64_t expected, struct ringest_vmm_memory *m) {
    CALL(expected, ringest_vmm_memory_free, m);
    CALL(expected, ringest_vmm_memory_size, m);
    CALL(expected, ringest_vmm_memory_is_mapped, m);
    CALL(expected, ringest_vmm_memory_export_fd, m);
}

#endif
