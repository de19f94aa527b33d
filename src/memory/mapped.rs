//! Page-aligned memory that ringest owns and both CPU and GPU address.

use super::region::{GpuMappedBuffer, Region};
use crate::error::{PipelineError, Result, Text};
use crate::gpu::Gpu;
use crate::sys::cuda::{HostMemory, PinnedMapping};
use crate::sys::mem::{HugePages, Mapping, memlock_limit, page_size};
use std::marker::PhantomData;
use std::sync::Arc;

/// Types for which every bit pattern is a value, so that a device may write them.
///
/// # Safety
/// The type has no invalid bit pattern, no padding, no pointers and no interior mutability.
pub unsafe trait AnyBits: Copy + Send + Sync + 'static {}

macro_rules! any_bits {
    ($($t:ty)*) => { $(
        // SAFETY: a primitive number: all bit patterns are values, no padding.
        unsafe impl AnyBits for $t {}
    )* };
}
any_bits!(u8 i8 u16 i16 u32 i32 u64 i64 u128 i128 usize isize f32 f64);

// SAFETY: an array adds no padding to its elements.
unsafe impl<T: AnyBits, const N: usize> AnyBits for [T; N] {}

/// Whether and how memory is page-locked, so that GPUs address it.
///
/// Opening a GPU costs time and memory of its own, so none is touched unless it is asked for here.
#[derive(Debug, Clone, Default)]
pub enum Pinning {
    /// Plain memory. No GPU can use it; its "device pointer" is the host pointer.
    #[default]
    Off,
    /// Page-locked for the GPU of the thread's current context, or else the first; plain memory where that cannot be had.
    /// [`MappedBuffer::pinned`] tells which, and why.
    Auto,
    /// Page-locked in place (`cuMemHostRegister`) and mapped for these GPUs, at least one; an error where that cannot be
    /// had. The first one's address is [`MappedBuffer::as_device_ptr`].
    Gpus(Vec<Gpu>),
    /// Allocated by the driver instead (`cuMemHostAlloc`), which takes several times as long and leaves huge pages to it.
    HostAlloc(Vec<Gpu>),
}

/// Whether and how memory was page-locked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pinned {
    /// It is plain memory.
    No {
        /// Why: it was not asked for, or ([`Pinning::Auto`]) what stood in the way.
        reason: Text,
    },
    /// Mapped by ringest, page-locked by `cuMemHostRegister`.
    Registered,
    /// Allocated by `cuMemHostAlloc`.
    HostAlloc,
}

/// How a [`MappedBuffer`] is allocated.
#[derive(Debug, Clone, Default)]
pub struct MappedOptions {
    /// Alignment of the first byte: a power of two; 0 means the page size, which is also the least.
    pub alignment: usize,
    /// Page size wanted.
    pub huge_pages: HugePages,
    /// Which GPUs are to address it.
    pub pinning: Pinning,
}

/// Owned, page-aligned, zero-copy memory: a host pointer and a device pointer to the same bytes.
///
/// Zeroed at birth, kept out of forked children. By default it is plain memory, and the device pointer is the host
/// pointer; [`MappedOptions::pinning`] page-locks it for GPUs, and it then stays so until the last handle to it and the
/// last read into it are gone.
///
/// Host slices are only given out while no [`GpuMappedBuffer`] shares the memory, because a ring may write through
/// those at any time.
#[derive(Debug)]
pub struct MappedBuffer<T: AnyBits> {
    region: Arc<Region>,
    len: usize,
    pinned: Pinned,
    element: PhantomData<T>,
}

impl<T: AnyBits> MappedBuffer<T> {
    /// Memory for `len` elements.
    ///
    /// # Errors
    /// `EINVAL` for no bytes, `ENOMEM` when the system has no such memory.
    pub fn alloc(len: usize) -> Result<Self> {
        Self::alloc_with(len, MappedOptions::default())
    }

    /// Memory for `len` elements that a GPU addresses too, or an error.
    ///
    /// # Errors
    /// As [`alloc_with`](Self::alloc_with).
    pub fn alloc_on(gpu: &Gpu, len: usize) -> Result<Self> {
        Self::alloc_with(len, MappedOptions { pinning: Pinning::Gpus(vec![gpu.clone()]), ..MappedOptions::default() })
    }

    /// Memory for `len` elements, by options.
    ///
    /// # Errors
    /// `EINVAL` for no bytes, an alignment that is not a power of two, pinning for no GPU, or huge pages of the pool from
    /// `cuMemHostAlloc`; `ENOMEM` when the system has no such memory (with [`HugePages::Require`]: when the huge-page pool
    /// is empty); the driver's ([`PipelineError::Cuda`]) when it does not lock it, unless pinning is [`Pinning::Auto`].
    pub fn alloc_with(len: usize, options: MappedOptions) -> Result<Self> {
        let out_of_memory =
            |bytes, fix: &'static str| PipelineError::OutOfMemory { what: "a mapped buffer", bytes, fix: fix.into() };
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| isize::try_from(bytes).is_ok());
        let bytes = bytes.ok_or_else(|| out_of_memory(u64::MAX, "the size overflows the address space"))?;
        if bytes == 0 {
            return Err(PipelineError::invalid("a mapped buffer of 0 bytes", "ask for at least one element"));
        }
        let alignment = options.alignment.max(align_of::<T>());
        if !alignment.is_power_of_two() {
            return Err(PipelineError::invalid(
                format!("alignment {alignment}"),
                "use a power of two, or 0 for the page size",
            ));
        }
        let plain = || {
            Mapping::anonymous(bytes, alignment, options.huge_pages).map_err(|_| {
                out_of_memory(
                    bytes as u64,
                    match options.huge_pages {
                        HugePages::Require => "reserve huge pages (vm.nr_hugepages) or use HugePages::Advise",
                        _ => "ask for less, or raise the process's memory limits",
                    },
                )
            })
        };
        let locked = |gpu: &Gpu| {
            let mapping = plain()?;
            mapping.populate();
            PinnedMapping::register(gpu.context(), mapping)
        };
        let (region, pinned) = match &options.pinning {
            Pinning::Off => (Region::from_mapping(plain()?), Pinned::No { reason: "not asked for".into() }),
            Pinning::Gpus(gpus) => (Region::from_pinned(locked(first(gpus)?)?, gpus)?, Pinned::Registered),
            Pinning::HostAlloc(gpus) => {
                if options.huge_pages == HugePages::Require {
                    return Err(PipelineError::invalid(
                        "huge pages of the pool from cuMemHostAlloc",
                        "use Pinning::Gpus, or leave the pages to the driver",
                    ));
                }
                let len = bytes.checked_next_multiple_of(page_size());
                let len = len.ok_or_else(|| out_of_memory(u64::MAX, "the size overflows the address space"))?;
                let memory = HostMemory::alloc(first(gpus)?.context(), len, alignment)?;
                (Region::from_host_memory(memory, len, gpus)?, Pinned::HostAlloc)
            }
            Pinning::Auto => match Gpu::current().and_then(|gpu| Region::from_pinned(locked(&gpu)?, &[gpu])) {
                Ok(region) => (region, Pinned::Registered),
                Err(error) => {
                    tracing::info!(target: "ringest::memory", %error, "memory is not page-locked");
                    (Region::from_mapping(plain()?), Pinned::No { reason: error.to_string().into() })
                }
            },
        };
        tracing::trace!(target: "ringest::memory", bytes, ?pinned, limit = ?memlock_limit(), "mapped memory allocated");
        Ok(Self { region, len, pinned, element: PhantomData })
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a buffer has at least one element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the elements.
    #[must_use]
    pub fn byte_size(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Whether and how it is page-locked for GPUs.
    #[must_use]
    pub fn pinned(&self) -> &Pinned {
        &self.pinned
    }

    /// A GPU's address of the first element: page-locked memory has one on every GPU.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for plain memory; the driver's ([`PipelineError::Cuda`]).
    pub fn as_device_ptr_on(&self, gpu: &Gpu) -> Result<u64> {
        self.region.address_on(gpu, 0)
    }

    /// The device's address of the first element: that of the first GPU it is pinned for; for plain memory, the host's
    /// address, which no GPU can use.
    #[must_use]
    pub fn as_device_ptr(&self) -> u64 {
        // A region over a mapping always has one.
        self.region.device_address(0).unwrap_or_else(|| self.region.address(0))
    }

    /// The host's address of the first element.
    #[must_use]
    pub fn as_host_ptr(&self) -> *const T {
        self.region.base().as_ptr().cast()
    }

    /// The host's address of the first element, for writing.
    #[must_use]
    pub fn as_host_ptr_mut(&mut self) -> *mut T {
        self.region.base().as_ptr().cast()
    }

    /// The elements.
    ///
    /// # Errors
    /// `EBUSY` while a [`GpuMappedBuffer`], a registration or a read in flight shares the memory.
    pub fn as_slice(&self) -> Result<&[T]> {
        self.require_exclusive()?;
        // SAFETY: the region holds `len` elements of a type without invalid bit patterns. No other handle exists, and
        // while the slice borrows `self` none can be made: `share` takes `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(self.as_host_ptr(), self.len) })
    }

    /// The elements, for writing.
    ///
    /// # Errors
    /// `EBUSY` while a [`GpuMappedBuffer`], a registration or a read in flight shares the memory.
    pub fn as_mut_slice(&mut self) -> Result<&mut [T]> {
        self.require_exclusive()?;
        // SAFETY: as in `as_slice`, and `&mut self` rules out other slices.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.as_host_ptr_mut(), self.len) })
    }

    fn require_exclusive(&self) -> Result<()> {
        if !self.region.is_shared() {
            return Ok(());
        }
        Err(PipelineError::busy("the mapped buffer", "drop its GpuMappedBuffer and let its reads finish first"))
    }

    /// A handle that rings may write through. The memory lives until the last handle and read is gone.
    #[must_use]
    pub fn share(&mut self) -> GpuMappedBuffer<'static> {
        self.view()
    }

    fn view(&self) -> GpuMappedBuffer<'static> {
        let whole = GpuMappedBuffer::whole(Arc::clone(&self.region));
        match whole.sub_region(0, self.byte_size()) {
            Ok(view) => view,
            Err(_) => unreachable!("the region was made for byte_size bytes"),
        }
    }
}

fn first(gpus: &[Gpu]) -> Result<&Gpu> {
    gpus.first().ok_or_else(|| {
        PipelineError::invalid("pinning for no GPU", "name at least one, or use Pinning::Off or Pinning::Auto")
    })
}

impl<T: AnyBits> From<MappedBuffer<T>> for GpuMappedBuffer<'static> {
    fn from(buffer: MappedBuffer<T>) -> Self {
        buffer.view()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_alignment() {
        let buffer = MappedBuffer::<u32>::alloc_with(1000, MappedOptions { alignment: 1 << 16, ..Default::default() });
        let mut buffer = buffer.unwrap();
        assert_eq!((buffer.len(), buffer.byte_size(), buffer.is_empty()), (1000, 4000, false));
        assert_eq!(buffer.as_host_ptr() as usize % (1 << 16), 0);
        assert_eq!(buffer.as_device_ptr(), buffer.as_host_ptr_mut() as u64);
        assert!(buffer.as_slice().unwrap().iter().all(|&word| word == 0));
        buffer.as_mut_slice().unwrap()[999] = 7;
        assert_eq!(buffer.as_slice().unwrap()[999], 7);
    }

    #[test]
    fn bad_sizes_are_refused() {
        assert_eq!(MappedBuffer::<u8>::alloc(0).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(MappedBuffer::<[u8; 0]>::alloc(5).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(MappedBuffer::<u64>::alloc(usize::MAX / 4).unwrap_err().errno(), libc::ENOMEM);
        assert_eq!(MappedBuffer::<u8>::alloc(isize::MAX as usize).unwrap_err().errno(), libc::ENOMEM);
        let options = MappedOptions { alignment: 24, ..Default::default() };
        assert_eq!(MappedBuffer::<u8>::alloc_with(8, options).unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn slices_are_refused_while_shared() {
        let mut buffer = MappedBuffer::<u8>::alloc(4096).unwrap();
        let shared = buffer.share();
        assert_eq!(shared.len(), 4096);
        assert_eq!(buffer.as_slice().unwrap_err().errno(), libc::EBUSY);
        assert_eq!(buffer.as_mut_slice().unwrap_err().errno(), libc::EBUSY);
        drop(shared);
        assert!(buffer.as_slice().is_ok());
    }
}
