//! A GPU: which one, the context that work is done in, what it can do.
//!
//! libcuda is looked for when the first of these calls is made, and not before: nothing of CUDA is needed to build, link
//! or start a program.

mod kernel;

pub use kernel::{GpuModule, GpuStream, KernelParameters};

use crate::error::{PipelineError, Result};
use crate::sys::cuda::constants::*;
use crate::sys::cuda::{self, Context, Driver, Outcome, Stream};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// A GPU, by its ordinal, and the context that ringest works in.
///
/// Cheap to clone. Any thread may use it: every call makes the context current, does its work, and leaves the thread's
/// current context, device and stream capture mode as they were. Everything made on a GPU keeps it.
#[derive(Debug, Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    attributes: GpuAttributes,
    /// For small synchronous copies; made by the first. Never the legacy default stream, which would wait for a
    /// persistent kernel.
    stream: Mutex<Option<Arc<Stream>>>,
    context: Arc<Context>,
}

/// What a GPU is and can do, as its driver tells.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuAttributes {
    /// The product's name.
    pub name: String,
    /// Compute capability, for example (9, 0).
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Engines that copy beside running kernels.
    pub copy_engines: u32,
    /// Memory, bytes.
    pub memory: u64,
    /// PCI address as in `/sys/bus/pci/devices`.
    pub pci_address: String,
    /// Bytes of memory that the PCI bus can address (BAR1), where sysfs tells.
    pub bar1: Option<u64>,
    /// Whether it shares the host's memory.
    pub integrated: bool,
    /// Whether host memory can be page-locked in place (`cuMemHostRegister`).
    pub host_register: bool,
    /// Whether 64-bit stream writes and waits exist (`cuStreamWriteValue64`).
    pub stream_mem_ops: bool,
    /// Whether address ranges and physical memory can be managed apart ([`VirtualMemoryManager`](crate::VirtualMemoryManager)).
    pub virtual_memory: bool,
    /// Whether physical memory can be exported as a file descriptor.
    pub export_fd: bool,
    /// Whether the virtual memory manager can place memory on the host's NUMA nodes.
    pub host_numa_memory: bool,
    /// The host's NUMA node nearest to the GPU, where there are nodes.
    pub host_numa_node: Option<u32>,
    /// Whether peers can address its memory (GPUDirect RDMA).
    pub rdma: bool,
    /// The same for memory of the virtual memory manager.
    pub rdma_virtual_memory: bool,
    /// How writes by peers can be flushed: bits of `CUflushGPUDirectRDMAWritesOptions` (1: by the host).
    pub rdma_flush_options: u32,
    /// For whom writes by peers are ordered without a flush: `CUGPUDirectRDMAWritesOrdering` (0: nobody, 100: the GPU
    /// itself, 200: all GPUs).
    pub rdma_writes_ordering: u32,
    /// Whether memory can be exported as a dma-buf.
    pub dma_buf: bool,
}

impl GpuAttributes {
    fn of(driver: &Driver, device: i32) -> Outcome<Self> {
        let number = |attribute| driver.attribute(attribute, device).map(|value| u32::try_from(value).unwrap_or(0));
        // Attributes that came after CUDA 11 may be unknown to the driver.
        let newer = |attribute| driver.newer_attribute(attribute, device);
        let flag = |attribute| newer(attribute).map(|value| value != 0);
        let bits = |attribute| newer(attribute).map(|value| u32::try_from(value).unwrap_or(0));
        let (domain, bus, slot) =
            (number(ATTRIBUTE_PCI_DOMAIN)?, number(ATTRIBUTE_PCI_BUS)?, number(ATTRIBUTE_PCI_DEVICE)?);
        let pci_address = format!("{domain:04x}:{bus:02x}:{slot:02x}.0");
        let host_numa_memory = flag(ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY)?;
        Ok(Self {
            name: driver.device_name(device)?,
            compute_capability: (number(ATTRIBUTE_CAPABILITY_MAJOR)?, number(ATTRIBUTE_CAPABILITY_MINOR)?),
            multiprocessors: number(ATTRIBUTE_MULTIPROCESSORS)?,
            copy_engines: number(ATTRIBUTE_COPY_ENGINES)?,
            memory: driver.device_memory(device)?,
            bar1: bar1(&pci_address),
            pci_address,
            integrated: flag(ATTRIBUTE_INTEGRATED)?,
            host_register: flag(ATTRIBUTE_HOST_REGISTER)?,
            stream_mem_ops: flag(ATTRIBUTE_STREAM_MEM_OPS_64)?,
            virtual_memory: flag(ATTRIBUTE_VIRTUAL_MEMORY)?,
            export_fd: flag(ATTRIBUTE_POSIX_FD)?,
            host_numa_memory,
            // Drivers that know no nodes say -1, or do not know the attribute.
            host_numa_node: match driver.attribute(ATTRIBUTE_HOST_NUMA_ID, device) {
                Err(failure) if failure.code() == Some(cuda::code::INVALID_VALUE) => None,
                other => u32::try_from(other?).ok(),
            },
            rdma: flag(ATTRIBUTE_RDMA)?,
            rdma_virtual_memory: flag(ATTRIBUTE_RDMA_VIRTUAL_MEMORY)?,
            rdma_flush_options: bits(ATTRIBUTE_RDMA_FLUSH_OPTIONS)?,
            rdma_writes_ordering: bits(ATTRIBUTE_RDMA_WRITES_ORDERING)?,
            dma_buf: flag(ATTRIBUTE_DMA_BUF)?,
        })
    }
}

/// Size of a PCI device's BAR1: the second region in use of its `resource` file, whose lines are "start end flags" in
/// hexadecimal, two for a 64-bit region.
fn bar1(pci_address: &str) -> Option<u64> {
    second_region(&std::fs::read_to_string(format!("/sys/bus/pci/devices/{pci_address}/resource")).ok()?)
}

fn second_region(resource: &str) -> Option<u64> {
    const REGIONS: usize = 6;
    let sizes = resource.lines().take(REGIONS).filter_map(|line| {
        let mut numbers =
            line.split_whitespace().map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
        let (start, end) = (numbers.next()??, numbers.next()??);
        (end > start).then(|| end - start + 1)
    });
    sizes.into_iter().nth(1)
}

impl Gpu {
    /// GPUs that this process sees (`CUDA_VISIBLE_DEVICES`).
    ///
    /// # Errors
    /// `EOPNOTSUPP` with the reason where there is no driver, or it finds no GPU.
    pub fn count() -> Result<u32> {
        cuda::device_count()
    }

    /// The newest CUDA version that the driver serves, as (major, minor).
    ///
    /// # Errors
    /// As [`count`](Self::count).
    pub fn driver_version() -> Result<(u32, u32)> {
        let version = Driver::get()?.version()?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// A GPU by ordinal, with its primary context, which the CUDA runtime and most frameworks use too. The first use of a
    /// GPU in a process creates that context, which takes some 100 ms and some 100 MB of its memory.
    ///
    /// # Errors
    /// `EOPNOTSUPP` with the reason where there is no driver, or it finds no GPU; `ENODEV` for an ordinal beyond
    /// [`count`](Self::count); the driver's error otherwise ([`PipelineError::Cuda`]).
    pub fn open(ordinal: u32) -> Result<Self> {
        Self::with_context(Context::primary(ordinal)?)
    }

    /// What a GPU is and can do, without opening it: no context is created.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn attributes_of(ordinal: u32) -> Result<GpuAttributes> {
        let (driver, device) = cuda::device(ordinal)?;
        Ok(GpuAttributes::of(driver, device)?)
    }

    /// The GPU of the context that is current to the calling thread, or the first one; with its primary context.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn current() -> Result<Self> {
        Self::open(cuda::current_device()?.unwrap_or(0))
    }

    /// A GPU through a `CUcontext` of the caller's, for programs that do not use primary contexts.
    ///
    /// # Safety
    /// `context` is a `CUcontext` that is not destroyed before the last clone of the result, and everything made on it, is
    /// gone.
    ///
    /// # Errors
    /// `EINVAL` for null; otherwise as [`open`](Self::open).
    pub unsafe fn from_context(context: *mut c_void) -> Result<Self> {
        // SAFETY: the caller's contract: whatever is made on the GPU keeps the context's value.
        Self::with_context(unsafe { Context::foreign(context) }?)
    }

    fn with_context(context: Context) -> Result<Self> {
        let attributes = GpuAttributes::of(context.driver(), context.device())?;
        tracing::debug!(target: "ringest::cuda", ?context, name = attributes.name, "GPU opened");
        Ok(Self { inner: Arc::new(Inner { attributes, stream: Mutex::new(None), context: Arc::new(context) }) })
    }

    /// Its number among the GPUs that this process sees.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.inner.context.device() as u32
    }

    /// What it is and can do.
    #[must_use]
    pub fn attributes(&self) -> &GpuAttributes {
        &self.inner.attributes
    }

    /// Its `CUcontext`, valid as long as `self`.
    #[must_use]
    pub fn as_context(&self) -> *mut c_void {
        self.inner.context.raw()
    }

    /// Whether the context is the GPU's primary one.
    #[must_use]
    pub fn is_primary_context(&self) -> bool {
        self.inner.context.is_primary()
    }

    /// Free and total memory, bytes.
    ///
    /// # Errors
    /// The driver's ([`PipelineError::Cuda`]).
    pub fn memory_info(&self) -> Result<(u64, u64)> {
        self.inner.context.enter(Driver::memory_info)
    }

    /// Whether this GPU can reach the memory of another.
    ///
    /// # Errors
    /// The driver's ([`PipelineError::Cuda`]).
    pub fn can_access(&self, peer: &Self) -> Result<bool> {
        let (device, peer) = (self.inner.context.device(), peer.inner.context.device());
        if device == peer {
            return Ok(true);
        }
        Ok(self.inner.context.driver().can_access_peer(device, peer)?)
    }

    /// Waits for all work queued in the context: a persistent kernel makes it wait for ever.
    ///
    /// # Errors
    /// The driver's ([`PipelineError::Cuda`]), also of work that failed.
    pub fn synchronize(&self) -> Result<()> {
        self.inner.context.enter(Driver::synchronize)
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.inner.context
    }

    /// The stream for small synchronous copies.
    pub(crate) fn copy_stream(&self) -> Result<Arc<Stream>> {
        let mut stream = self.inner.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = &*stream {
            return Ok(Arc::clone(stream));
        }
        let made = Arc::new(Stream::new(&self.inner.context, 0)?);
        *stream = Some(Arc::clone(&made));
        Ok(made)
    }

    pub(crate) fn require(&self, able: bool, what: &'static str) -> Result<()> {
        if able {
            return Ok(());
        }
        let Self { inner } = self;
        let reason = format!("GPU {} ({}) or its driver says it cannot", self.ordinal(), inner.attributes.name);
        Err(PipelineError::unsupported(what, reason))
    }
}

/// Objects of the CUDA driver (memory, registrations, streams) that could not be given back, because a call of the
/// driver failed or its context was gone.
#[must_use]
pub fn gpu_leaks() -> u64 {
    cuda::leaked()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar1_is_the_second_region_however_wide_the_first() {
        let none = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
        let small = "0x00000000fa000000 0x00000000faffffff 0x0000000000040200\n";
        let large = "0x0000100000000000 0x0000103fffffffff 0x000000000014220c\n";
        assert_eq!(second_region(&[small, none, large, none].concat()), Some(256 << 30));
        assert_eq!(second_region(&[small, large, none].concat()), Some(256 << 30));
        assert_eq!(second_region(&[small, none, none].concat()), None);
        assert_eq!(second_region("nonsense"), None);
        assert_eq!(bar1("ffff:ff:ff.7"), None);
    }
}
