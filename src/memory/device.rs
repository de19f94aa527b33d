//! Memory of a GPU that the CPU cannot address.

use super::virtual_memory::{AccessFlags, MemoryLocation, PhysicalOptions, VirtualAddressRange, VirtualMemoryManager};
use crate::error::{PipelineError, Result};
use crate::gpu::Gpu;
use crate::sys::cuda::{DeviceMemory, Pointer, Stream, export_dma_buf};
use std::os::fd::OwnedFd;

/// Memory of a GPU: owned (`cuMemAlloc`, or addresses that memory can be added to), or the caller's.
///
/// Rings cannot read into it. Dropping it frees what it owns: that is the caller's to order after kernels and copies.
#[derive(Debug)]
pub struct DeviceBuffer {
    keeper: Keeper,
    address: u64,
    len: usize,
    gpu: Gpu,
}

/// What keeps the memory.
#[derive(Debug)]
enum Keeper {
    Owned(#[allow(dead_code, reason = "held for its drop")] DeviceMemory),
    Virtual { range: VirtualAddressRange, manager: VirtualMemoryManager },
    Borrowed,
}

impl DeviceBuffer {
    /// Allocates `len` bytes (`cuMemAlloc`), with undefined contents. The driver may wait for running kernels: allocate
    /// before a persistent kernel starts.
    ///
    /// # Errors
    /// `EINVAL` for 0 bytes; the driver's ([`PipelineError::Cuda`]): `ENOMEM` when there is no such memory.
    pub fn alloc(gpu: &Gpu, len: usize) -> Result<Self> {
        if len == 0 {
            return Err(PipelineError::invalid("a device buffer of 0 bytes", "ask for at least one"));
        }
        let memory = DeviceMemory::alloc(gpu.context(), len)?;
        Ok(Self { address: memory.address(), keeper: Keeper::Owned(memory), len, gpu: gpu.clone() })
    }

    /// Reserves addresses for `capacity` bytes and puts memory behind the first `len` (0 for none); both are rounded up to
    /// the granularity. [`grow`](Self::grow) adds more, and the address stays.
    ///
    /// # Errors
    /// `EINVAL` for a capacity of 0 or less than `len`; `EOPNOTSUPP` when the GPU has no virtual memory management; the
    /// driver's ([`PipelineError::Cuda`]).
    pub fn growable(gpu: &Gpu, len: usize, capacity: usize) -> Result<Self> {
        if capacity == 0 || len > capacity {
            return Err(PipelineError::invalid(
                format!("a device buffer of {len} bytes that may grow to {capacity}"),
                "use a capacity of at least one byte and at least the length",
            ));
        }
        let manager = VirtualMemoryManager::new(gpu)?;
        let granularity = manager.granularity(PhysicalOptions::default(), false)?;
        let capacity = capacity.checked_next_multiple_of(granularity).ok_or(PipelineError::OutOfMemory {
            what: "a range of addresses",
            bytes: capacity as u64,
            fix: "ask for less".into(),
        })?;
        let range = manager.reserve(capacity, granularity)?;
        let address = range.address();
        let mut buffer = Self { keeper: Keeper::Virtual { range, manager }, address, len: 0, gpu: gpu.clone() };
        buffer.grow(len)?;
        Ok(buffer)
    }

    /// Takes a range over, of whose addresses the first `len` bytes are mapped, and open to the manager's GPU for reading
    /// and writing.
    ///
    /// # Errors
    /// Together with the range: `EOPNOTSUPP` when the manager only plans, `EINVAL` for 0 bytes or when they are not so.
    #[allow(clippy::result_large_err, reason = "the range comes back")]
    pub fn from_range(
        manager: &VirtualMemoryManager,
        range: VirtualAddressRange,
        len: usize,
    ) -> std::result::Result<Self, (VirtualAddressRange, PipelineError)> {
        let Some(gpu) = manager.gpu().cloned() else {
            return Err((
                range,
                PipelineError::unsupported("a device buffer without a GPU", "this manager only plans"),
            ));
        };
        if len == 0 || len > range.size() || !range.allows(0, len, (&gpu).into(), AccessFlags::ReadWrite) {
            let error = PipelineError::invalid(
                format!("a device buffer over the first {len} of {} bytes of addresses", range.size()),
                "map them all and give the GPU read and write access (set_access) first",
            );
            return Err((range, error));
        }
        let (address, manager) = (range.address(), manager.clone());
        Ok(Self { keeper: Keeper::Virtual { range, manager }, address, len, gpu })
    }

    /// Wraps memory of the caller's, a `CUdeviceptr`. The driver is asked whether it is memory of this GPU.
    ///
    /// # Safety
    /// `len` bytes at `address` stay allocated as long as the result lives, and copies and fills through it do not
    /// collide with what else uses them.
    ///
    /// # Errors
    /// `EINVAL` for no bytes, or when this is not device memory of this GPU; `ERANGE` when it does not have that many
    /// bytes; the driver's ([`PipelineError::Cuda`]).
    pub unsafe fn from_raw(gpu: &Gpu, address: u64, len: usize) -> Result<Self> {
        if len == 0 || address == 0 {
            return Err(PipelineError::invalid(
                format!("a device buffer of {len} bytes at {address:#x}"),
                "wrap at least one byte of memory that exists",
            ));
        }
        verify_device_memory(gpu, address, len)?;
        Ok(Self { keeper: Keeper::Borrowed, address, len, gpu: gpu.clone() })
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes (yet).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The GPU's address of the first byte.
    #[must_use]
    pub fn as_device_ptr(&self) -> u64 {
        self.address
    }

    /// The GPU.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether the memory is the caller's.
    #[must_use]
    pub fn is_borrowed(&self) -> bool {
        matches!(self.keeper, Keeper::Borrowed)
    }

    /// Bytes it can grow to.
    #[must_use]
    pub fn capacity(&self) -> usize {
        match &self.keeper {
            Keeper::Virtual { range, .. } => range.size(),
            _ => self.len,
        }
    }

    /// Adds memory until there are `len` bytes or more (whole granules). The address and the contents stay; new bytes are
    /// undefined. A kernel that runs may use the new bytes once it has learnt of them.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for memory that is not [`growable`](Self::growable); `ERANGE` beyond its
    /// [`capacity`](Self::capacity); the driver's ([`PipelineError::Cuda`]). The buffer is as before then.
    pub fn grow(&mut self, len: usize) -> Result<()> {
        if len <= self.len {
            return Ok(());
        }
        let location = MemoryLocation::from(&self.gpu);
        let Keeper::Virtual { range, manager } = &mut self.keeper else {
            return Err(PipelineError::unsupported(
                "growth of this device buffer",
                "make it by DeviceBuffer::growable",
            ));
        };
        PipelineError::check_range("growth of a device buffer", 0, len as u64, range.size() as u64)?;
        // A range of the caller's may have more behind its addresses than the buffer was made of.
        let start = range.mapped_from_start();
        if !range.allows(0, start.min(len), location, AccessFlags::ReadWrite) {
            return Err(PipelineError::invalid(
                format!("growth of a device buffer to {len} bytes"),
                "what is mapped there already is not open to the GPU (set_access)",
            ));
        }
        if start >= len {
            self.len = len;
            return Ok(());
        }
        let granularity = manager.granularity(PhysicalOptions::default(), false)?;
        let size = (len - start).next_multiple_of(granularity);
        let physical = manager.alloc_physical(size, PhysicalOptions::default())?;
        manager.map(range, start, size, &physical, 0)?;
        if let Err(error) = manager.set_access(range, start, size, &[(location, AccessFlags::ReadWrite)]) {
            let _ = manager.unmap(range, start, size);
            return Err(error);
        }
        self.len = start + size;
        Ok(())
    }

    /// Copies `bytes` to `offset`, and waits for it.
    ///
    /// # Errors
    /// `ERANGE` when the range does not lie inside; the driver's ([`PipelineError::Cuda`]).
    pub fn copy_in(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let target = self.range("copy into a device buffer", offset, bytes.len())?;
        // SAFETY: the target is inside the buffer; the source outlives the copy, which is waited for.
        self.do_and_wait(bytes.len(), |stream| unsafe { stream.copy_in(target, bytes.as_ptr(), bytes.len()) })
    }

    /// Copies from `offset` to `bytes`, and waits for it.
    ///
    /// # Errors
    /// `ERANGE` when the range does not lie inside; the driver's ([`PipelineError::Cuda`]).
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let (source, len) = (self.range("copy out of a device buffer", offset, bytes.len())?, bytes.len());
        // SAFETY: the source is inside the buffer; the target outlives the copy, which is waited for.
        self.do_and_wait(len, |stream| unsafe { stream.copy_out(bytes.as_mut_ptr(), source, len) })
    }

    /// Sets `len` bytes from `offset` to `value`, and waits for it.
    ///
    /// # Errors
    /// `ERANGE` when the range does not lie inside; the driver's ([`PipelineError::Cuda`]).
    pub fn fill(&mut self, offset: usize, len: usize, value: u8) -> Result<()> {
        let target = self.range("fill of a device buffer", offset, len)?;
        // SAFETY: the target is inside the buffer, which is device memory.
        self.do_and_wait(len, |stream| unsafe { stream.fill(target, value, len) })
    }

    /// A dma-buf over a part, for other drivers to import: whole host pages.
    ///
    /// # Errors
    /// `ERANGE` when the part does not lie inside; `EOPNOTSUPP` when GPU or driver cannot; the driver's
    /// ([`PipelineError::Cuda`]): `EINVAL` off the pages.
    pub fn export_dma_buf(&self, offset: usize, len: usize) -> Result<OwnedFd> {
        self.gpu.require(self.gpu.attributes().dma_buf, "export of GPU memory as a dma-buf")?;
        let address = self.range("export of a device buffer", offset, len)?;
        export_dma_buf(self.gpu.context(), address, len)
    }

    fn range(&self, what: &'static str, offset: usize, len: usize) -> Result<u64> {
        PipelineError::check_range(what, offset as u64, len as u64, self.len as u64)?;
        Ok(self.address + offset as u64)
    }

    fn do_and_wait(&self, len: usize, queue: impl FnOnce(&Stream) -> Result<()>) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let stream = self.gpu.copy_stream()?;
        queue(&stream)?;
        // Asked twice: the caller's memory is in the copy engine's hands. What fails twice is a lost context, whose
        // engines have stopped.
        stream.synchronize().or_else(|_| stream.synchronize())
    }
}

/// Asks the driver whether these bytes are memory of this GPU.
pub(super) fn verify_device_memory(gpu: &Gpu, address: u64, len: usize) -> Result<()> {
    let end = address.checked_add(len as u64).ok_or(PipelineError::OutOfRange {
        what: "device memory",
        offset: address,
        length: len as u64,
        limit: u64::MAX,
    })?;
    let mut at = address;
    while at < end {
        let found = Pointer::look_up(gpu.context(), at)?;
        let Some(pointer) = found.filter(|p| p.on_device && p.ordinal == gpu.ordinal() as i32) else {
            if at > address {
                return PipelineError::check_range("device memory", address, len as u64, at);
            }
            let is = match found {
                None => "no memory of CUDA's".to_owned(),
                Some(p) if !p.on_device => "page-locked host memory".to_owned(),
                Some(p) => format!("memory of GPU {}", p.ordinal),
            };
            return Err(PipelineError::invalid(
                format!("{address:#x} is {is}"),
                format!("pass an address of memory allocated on GPU {}", gpu.ordinal()),
            ));
        };
        // What lies side by side may be several allocations or mappings.
        at = pointer.end.max(at + 1);
    }
    Ok(())
}
