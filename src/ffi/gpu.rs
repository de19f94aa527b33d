//! GPUs: how many there are, and what they can do.

use super::{Outcome, status, store, value};
use crate::gpu::{Gpu, GpuAttributes, gpu_leaks};
use std::ffi::c_char;

/// In place of a GPU's ordinal: no GPU.
pub const RINGEST_GPU_NONE: u32 = 0xffff_ffff;

/// Flag of ringest_gpu_info: the GPU shares the host's memory.
pub const RINGEST_GPU_INTEGRATED: u64 = 1 << 0;
/// Flag of ringest_gpu_info: host memory can be page-locked in place (cuMemHostRegister).
pub const RINGEST_GPU_HOST_REGISTER: u64 = 1 << 1;
/// Flag of ringest_gpu_info: 64-bit stream writes and waits exist (cuStreamWriteValue64).
pub const RINGEST_GPU_STREAM_MEM_OPS: u64 = 1 << 2;
/// Flag of ringest_gpu_info: addresses and physical memory can be managed apart (struct ringest_vmm).
pub const RINGEST_GPU_VIRTUAL_MEMORY: u64 = 1 << 3;
/// Flag of ringest_gpu_info: physical memory can be exported as a descriptor.
pub const RINGEST_GPU_EXPORT_FD: u64 = 1 << 4;
/// Flag of ringest_gpu_info: struct ringest_vmm can place memory on the host's NUMA nodes.
pub const RINGEST_GPU_HOST_NUMA_MEMORY: u64 = 1 << 5;
/// Flag of ringest_gpu_info: peers can address the GPU's memory (GPUDirect RDMA).
pub const RINGEST_GPU_RDMA: u64 = 1 << 6;
/// Flag of ringest_gpu_info: the same for memory of struct ringest_vmm.
pub const RINGEST_GPU_RDMA_VIRTUAL_MEMORY: u64 = 1 << 7;
/// Flag of ringest_gpu_info: memory can be exported as a dma-buf.
pub const RINGEST_GPU_DMA_BUF: u64 = 1 << 8;

/// What a GPU is and can do.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ringest_gpu_info {
    /// The product's name, ended by NUL.
    pub name: [c_char; 96],
    /// PCI address as in /sys/bus/pci/devices, ended by NUL.
    pub pci_address: [c_char; 32],
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of memory that the PCI bus can address (BAR1); 0 where sysfs does not tell.
    pub bar1: u64,
    /// RINGEST_GPU_INTEGRATED and others.
    pub flags: u64,
    /// Compute capability, the number before the point.
    pub compute_major: u32,
    /// And that behind it.
    pub compute_minor: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Engines that copy beside running kernels.
    pub copy_engines: u32,
    /// The host's NUMA node nearest to the GPU; -1 where there are no nodes.
    pub host_numa_node: i32,
    /// How writes by peers can be flushed: bits of CUflushGPUDirectRDMAWritesOptions.
    pub rdma_flush_options: u32,
    /// For whom writes by peers are ordered without a flush: CUGPUDirectRDMAWritesOrdering.
    pub rdma_writes_ordering: u32,
    /// Zero.
    pub reserved: [u32; 19],
}

impl ringest_gpu_info {
    fn new(attributes: &GpuAttributes) -> Self {
        let flags = [
            (attributes.integrated, RINGEST_GPU_INTEGRATED),
            (attributes.host_register, RINGEST_GPU_HOST_REGISTER),
            (attributes.stream_mem_ops, RINGEST_GPU_STREAM_MEM_OPS),
            (attributes.virtual_memory, RINGEST_GPU_VIRTUAL_MEMORY),
            (attributes.export_fd, RINGEST_GPU_EXPORT_FD),
            (attributes.host_numa_memory, RINGEST_GPU_HOST_NUMA_MEMORY),
            (attributes.rdma, RINGEST_GPU_RDMA),
            (attributes.rdma_virtual_memory, RINGEST_GPU_RDMA_VIRTUAL_MEMORY),
            (attributes.dma_buf, RINGEST_GPU_DMA_BUF),
        ];
        Self {
            name: text(&attributes.name),
            pci_address: text(&attributes.pci_address),
            memory: attributes.memory,
            bar1: attributes.bar1.unwrap_or(0),
            flags: flags.iter().filter(|(set, _)| *set).fold(0, |bits, (_, flag)| bits | flag),
            compute_major: attributes.compute_capability.0,
            compute_minor: attributes.compute_capability.1,
            multiprocessors: attributes.multiprocessors,
            copy_engines: attributes.copy_engines,
            host_numa_node: attributes.host_numa_node.and_then(|node| i32::try_from(node).ok()).unwrap_or(-1),
            rdma_flush_options: attributes.rdma_flush_options,
            rdma_writes_ordering: attributes.rdma_writes_ordering,
            reserved: [0; 19],
        }
    }
}

/// As much of a text as fits before a NUL.
fn text<const N: usize>(from: &str) -> [c_char; N] {
    let mut to = [0; N];
    for (to, from) in to.iter_mut().take(N - 1).zip(from.bytes()) {
        *to = from as c_char;
    }
    to
}

/// The GPU that a call names. Opened for as long as something uses it: the first use in a process creates its primary
/// context.
pub(super) fn open(ordinal: u32) -> Outcome<Gpu> {
    Ok(Gpu::open(ordinal)?)
}

/// GPUs that this process sees (CUDA_VISIBLE_DEVICES). The first call that needs a GPU looks for the CUDA driver.
///
/// Any thread.
///
/// Errors: -EOPNOTSUPP where there is no driver, or it finds no GPU; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_gpu_count() -> i32 {
    value(|| Ok(Gpu::count()?.into())) as i32
}

/// The newest CUDA version that the driver serves, as 1000 * major + 10 * minor.
///
/// Any thread.
///
/// Errors: as ringest_gpu_count.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_gpu_driver_version() -> i32 {
    value(|| {
        let (major, minor) = Gpu::driver_version()?;
        Ok(i64::from(major) * 1000 + i64::from(minor) * 10)
    }) as i32
}

/// Stores what a GPU, by its ordinal, is and can do. No context is created for it.
///
/// Any thread.
///
/// Errors: -EINVAL when out is NULL; -EOPNOTSUPP where there is no driver, or it finds no GPU; -ENODEV for an ordinal
/// beyond ringest_gpu_count; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_gpu_info(gpu: u32, out: *mut ringest_gpu_info) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(ringest_gpu_info::new(&Gpu::attributes_of(gpu)?))) })
}

/// Objects of the CUDA driver (memory, registrations, streams) that could not be given back, because a call of the driver
/// failed or its context was gone.
///
/// Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_gpu_leaks() -> i64 {
    i64::try_from(gpu_leaks()).unwrap_or(i64::MAX)
}
