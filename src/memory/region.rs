//! Ranges of memory that a ring may write to.

use crate::error::{PipelineError, Result};
use crate::gpu::Gpu;
use crate::sys::cuda::{HostMemory, PinnedMapping, Pointer, host_device_pointer, set_sync_memops};
use crate::sys::mem::Mapping;
use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// What kind of memory a buffer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Host memory (pageable, pinned or huge pages) that the CPU may read and write.
    HostVisible,
    /// A window into a device's memory (a GPU's BAR1): the CPU only takes its address.
    Bar1Peer,
}

/// Keeps a region's memory alive.
enum Keeper {
    /// Mapped by us.
    Mapping(Mapping),
    /// Mapped by us and page-locked by the driver.
    Pinned(#[allow(dead_code, reason = "held for its drop")] PinnedMapping),
    /// Allocated by the driver, page-locked.
    HostMemory(#[allow(dead_code, reason = "held for its drop")] HostMemory),
    /// Anything the caller handed over; dropped with the region.
    Owner(#[allow(dead_code)] Box<dyn Any + Send + Sync>),
    /// Nothing: the constructor's caller vouches for the memory.
    Borrowed,
}

/// Memory with a fixed address, shared by everything that may still write to it.
///
/// Reads in flight and registrations each hold an `Arc` of it, so owned memory outlives them by construction.
pub(crate) struct Region {
    base: NonNull<u8>,
    len: usize,
    device: Option<u64>,
    kind: MemoryKind,
    /// Address of the first byte on each GPU that was named for it.
    on_gpus: Vec<(u32, u64)>,
    keeper: Keeper,
}

// SAFETY: a region is an address range whose validity from any thread its constructors demand or establish; the
// owner, where there is one, is itself Send.
unsafe impl Send for Region {}
// SAFETY: shared access only takes addresses, or goes through `copy_in`, `copy_out` and the unsafe slice functions,
// whose contracts cover concurrent use; the owner is itself Sync.
unsafe impl Sync for Region {}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { base, len, device, kind, .. } = self;
        write!(f, "Region({base:p}+{len:#x}, device {device:x?}, {kind:?})")
    }
}

impl Region {
    /// A region over a mapping of ours.
    pub(crate) fn from_mapping(mapping: Mapping) -> Arc<Self> {
        let (base, len) = (mapping.base(), mapping.len());
        // Without a driver the device address of host memory is its host address.
        let device = Some(base.as_ptr() as u64);
        let (kind, on_gpus) = (MemoryKind::HostVisible, Vec::new());
        Arc::new(Self { base, len, device, kind, on_gpus, keeper: Keeper::Mapping(mapping) })
    }

    /// A region over a mapping of ours that the driver has page-locked, as these GPUs address it.
    pub(crate) fn from_pinned(mapping: PinnedMapping, gpus: &[Gpu]) -> Result<Arc<Self>> {
        let (base, len) = (mapping.base(), mapping.len());
        Self::locked(base, len, Keeper::Pinned(mapping), gpus)
    }

    /// A region over page-locked memory of the driver's, as these GPUs address it.
    pub(crate) fn from_host_memory(memory: HostMemory, len: usize, gpus: &[Gpu]) -> Result<Arc<Self>> {
        Self::locked(memory.base(), len, Keeper::HostMemory(memory), gpus)
    }

    fn locked(base: NonNull<u8>, len: usize, keeper: Keeper, gpus: &[Gpu]) -> Result<Arc<Self>> {
        let on_gpus = gpus.iter().map(|gpu| Ok((gpu.ordinal(), host_device_pointer(gpu.context(), base)?)));
        let on_gpus = on_gpus.collect::<Result<Vec<_>>>()?;
        let device = on_gpus.first().map(|&(_, address)| address);
        Ok(Arc::new(Self { base, len, device, kind: MemoryKind::HostVisible, on_gpus, keeper }))
    }

    /// Whether the driver has locked the memory, as far as this region knows.
    pub(super) fn is_pinned(&self) -> bool {
        !self.on_gpus.is_empty()
    }

    /// A GPU's address of byte `offset`.
    pub(super) fn address_on(&self, gpu: &Gpu, offset: usize) -> Result<u64> {
        debug_assert!(offset <= self.len);
        let known = self.on_gpus.iter().find(|&&(ordinal, _)| ordinal == gpu.ordinal());
        let first = match known {
            Some(&(_, address)) => address,
            // Locked for every context, of those GPUs too that were not named.
            None if self.is_pinned() && self.kind == MemoryKind::HostVisible => {
                host_device_pointer(gpu.context(), self.base)?
            }
            None => {
                return Err(PipelineError::unsupported(
                    format!("the address of this memory on GPU {}", gpu.ordinal()),
                    "it is not page-locked for GPUs: allocate it with MappedOptions::pinning, or check memory pinned \
                     by others with GpuMappedBuffer::on_gpu",
                ));
            }
        };
        Ok(first + offset as u64)
    }

    /// Finds out, or verifies, how a GPU addresses the memory.
    fn look_up(&mut self, gpu: &Gpu) -> Result<()> {
        let host = self.base.as_ptr() as u64;
        let first = match self.kind {
            MemoryKind::HostVisible => {
                let not_pinned = |at: u64| {
                    PipelineError::invalid(
                        format!("host memory at {at:#x} is not page-locked for GPU {}", gpu.ordinal()),
                        "lock all of it first (cuMemHostRegister, cudaHostRegister, cudaHostAlloc)",
                    )
                };
                let (mut covered, mut first) = (0, None);
                while covered < self.len as u64 {
                    let at = host + covered;
                    let pointer = Pointer::look_up(gpu.context(), at)?.filter(|pointer| !pointer.on_device);
                    let pointer = pointer.ok_or_else(|| not_pinned(at))?;
                    let expected = *first.get_or_insert(pointer.device) + covered;
                    if pointer.device != expected {
                        return Err(not_pinned(at));
                    }
                    covered += (pointer.end - pointer.device).max(1);
                }
                first.ok_or_else(|| not_pinned(host))?
            }
            MemoryKind::Bar1Peer => {
                let window = || PipelineError::invalid("peer memory without its address", "pass the device's address");
                let address = self.device.ok_or_else(window)?;
                super::device::verify_device_memory(gpu, address, self.len)?;
                set_sync_memops(gpu.context(), address)?;
                address
            }
        };
        // For host memory a first GPU's address is the one to compare with.
        if self.device.is_some_and(|given| given != first) && self.on_gpus.is_empty() {
            return Err(PipelineError::invalid(
                format!("{:#x} as the device's address of {host:#x}", self.device.unwrap_or(0)),
                format!("GPU {} has it at {first:#x}: pass that, or None to have it looked up", gpu.ordinal()),
            ));
        }
        self.device.get_or_insert(first);
        self.on_gpus.retain(|&(ordinal, _)| ordinal != gpu.ordinal());
        self.on_gpus.push((gpu.ordinal(), first));
        Ok(())
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// Whether anything but the given reference holds the region.
    pub(super) fn is_shared(self: &Arc<Self>) -> bool {
        if Arc::strong_count(self) > 1 {
            return true;
        }
        // What the last other holder did (a ring thread that reaped the read) happens before what the caller does now.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        false
    }

    /// Address of byte `offset`, which may be one past the end.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        debug_assert!(offset <= self.len);
        self.base.as_ptr() as u64 + offset as u64
    }

    /// The GPU's address of byte `offset`, if it has one.
    pub(crate) fn device_address(&self, offset: usize) -> Option<u64> {
        debug_assert!(offset <= self.len);
        self.device.map(|device| device + offset as u64)
    }

    /// Copies `bytes` to `offset`.
    ///
    /// Panics when the range is out of bounds or not host memory: callers have checked both.
    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        assert!(self.kind == MemoryKind::HostVisible);
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len));
        // SAFETY: the range is inside the region (checked above), which its constructor made writable.
        unsafe { store_bytes(self.base.as_ptr().add(offset), bytes) };
    }

    /// Copies from `source` at `source_offset` to this region at `offset`.
    pub(crate) fn copy_from(&self, offset: usize, source: &Region, source_offset: usize, len: usize) {
        assert!(source.kind == MemoryKind::HostVisible);
        assert!(source_offset.checked_add(len).is_some_and(|end| end <= source.len));
        // SAFETY: the range is inside `source` (checked above), and the ring has finished the read that filled it:
        // nobody writes to it until its slot is given back, after this copy.
        let bytes = unsafe { std::slice::from_raw_parts(source.base.as_ptr().add(source_offset), len) };
        self.copy_in(offset, bytes);
    }
}

/// Copies bytes by relaxed atomic stores, so that two streams whose reads overlap (which nobody should want, but safe
/// code can ask for) mix their bytes as two devices would, instead of being a data race.
///
/// # Safety
/// `target` is valid for writing `bytes.len()` bytes.
unsafe fn store_bytes(target: *mut u8, bytes: &[u8]) {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
    let head = target.align_offset(align_of::<AtomicU64>()).min(bytes.len());
    let (head, rest) = bytes.split_at(head);
    let (words, tail) = rest.as_chunks::<8>();
    // SAFETY: the caller's contract, and after `head` the words are aligned.
    unsafe {
        let mut at = target;
        for &byte in head {
            (*at.cast::<AtomicU8>()).store(byte, Ordering::Relaxed);
            at = at.add(1);
        }
        for &word in words {
            (*at.cast::<AtomicU64>()).store(u64::from_ne_bytes(word), Ordering::Relaxed);
            at = at.add(8);
        }
        for &byte in tail {
            (*at.cast::<AtomicU8>()).store(byte, Ordering::Relaxed);
            at = at.add(1);
        }
    }
}

/// A range of memory that a ring may write to: base, length, GPU address and kind.
///
/// Cheap handles to one shared region. The region, and with it memory that ringest owns, lives until the last handle,
/// registration and read in flight is gone. The lifetime `'a` is that of borrowed memory
/// ([`from_host_visible_slice`](Self::from_host_visible_slice)); it is `'static` for everything else.
#[derive(Debug)]
pub struct GpuMappedBuffer<'a> {
    region: Arc<Region>,
    offset: usize,
    len: usize,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> GpuMappedBuffer<'a> {
    pub(crate) fn whole(region: Arc<Region>) -> Self {
        let len = region.len();
        Self { region, offset: 0, len, borrowed: PhantomData }
    }

    /// Wraps host memory borrowed from the caller.
    ///
    /// `device` is the GPU's address of the first byte, `None` when no GPU maps it.
    ///
    /// # Safety
    /// The kernel writes to the slice as long as reads into it are in flight, and may be made to as long as it is
    /// registered with a ring. The caller keeps the memory valid and does not touch it until then, also if the stream that reads into it is leaked (`mem::forget`) or gives up on a
    /// drive that never answers: in those cases the memory must never be reused.
    ///
    /// # Errors
    /// `EINVAL` for an empty slice.
    pub unsafe fn from_host_visible_slice(slice: &'a mut [u8], device: Option<u64>) -> Result<Self> {
        // SAFETY: the caller's contract.
        unsafe { Self::from_host_visible_raw(slice.as_mut_ptr(), slice.len(), device) }
    }

    /// As [`from_host_visible_slice`](Self::from_host_visible_slice), from an address.
    ///
    /// # Safety
    /// `len` bytes at `base` are valid for reads and writes as long as that function's contract demands.
    pub(crate) unsafe fn from_host_visible_raw(base: *mut u8, len: usize, device: Option<u64>) -> Result<Self> {
        Self::wrap(base, len, device, MemoryKind::HostVisible, Keeper::Borrowed)
    }

    fn wrap(base: *mut u8, len: usize, device: Option<u64>, kind: MemoryKind, keeper: Keeper) -> Result<Self> {
        let base = NonNull::new(base)
            .ok_or_else(|| PipelineError::invalid("a null base address", "pass the address of the memory"))?;
        if len == 0 {
            return Err(PipelineError::invalid("a buffer of 0 bytes", "wrap at least one byte"));
        }
        let start = base.as_ptr() as usize;
        let end = start.checked_add(len);
        if isize::try_from(len).is_err() || end.is_none() || device.is_some_and(|d| d.checked_add(len as u64).is_none())
        {
            return Err(PipelineError::OutOfRange {
                what: "a buffer's end in the address space",
                offset: start as u64,
                length: len as u64,
                limit: isize::MAX as u64,
            });
        }
        Ok(Self::whole(Arc::new(Region { base, len, device, kind, on_gpus: Vec::new(), keeper })))
    }

    /// A part of this buffer, sharing its memory.
    ///
    /// # Errors
    /// `ERANGE` when the part does not lie inside.
    pub fn sub_region(self, offset: usize, len: usize) -> Result<Self> {
        PipelineError::check_range("sub-region of a buffer", offset as u64, len as u64, self.len as u64)?;
        Ok(Self { region: self.region, offset: self.offset + offset, len, borrowed: PhantomData })
    }

    /// A second handle to the same memory.
    ///
    /// # Safety
    /// Two handles allow two rings to write to one place at the same time. The caller sees to it that ranges in
    /// flight through different handles do not overlap.
    #[must_use]
    pub unsafe fn duplicate(&self) -> Self {
        self.clone_handle()
    }

    pub(crate) fn clone_handle(&self) -> Self {
        Self { region: Arc::clone(&self.region), offset: self.offset, len: self.len, borrowed: PhantomData }
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes (a sub-region may).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What kind of memory it is.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        self.region.kind
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn as_host_ptr(&self) -> *mut u8 {
        self.region.base.as_ptr().wrapping_add(self.offset)
    }

    /// The GPU's address of the first byte; `None` when no GPU maps it. Without a driver it equals the host address.
    #[must_use]
    pub fn as_device_ptr(&self) -> Option<u64> {
        self.region.device_address(self.offset)
    }

    /// The address of the first byte on a GPU: one that the memory was allocated or checked ([`on_gpu`](Self::on_gpu)) for,
    /// or, for page-locked host memory, any other.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for memory that is not known to be the GPU's or page-locked; the driver's ([`PipelineError::Cuda`]).
    pub fn as_device_ptr_on(&self, gpu: &Gpu) -> Result<u64> {
        self.region.address_on(gpu, self.offset)
    }

    /// Checks memory pinned by others with the driver: the device address that the constructor was given is verified, one
    /// that it was not given is looked up (`cuPointerGetAttribute`). Call it for each GPU that is to use the memory.
    ///
    /// Host memory must be page-locked as a whole. Peer memory must be this GPU's; its SYNC_MEMOPS attribute is set, which
    /// DMA by peers needs.
    ///
    /// # Errors
    /// `EINVAL` when the memory is not so; `EBUSY` when another handle shares it; the driver's ([`PipelineError::Cuda`]).
    pub fn on_gpu(mut self, gpu: &Gpu) -> Result<Self> {
        self.check_gpu(gpu)?;
        Ok(self)
    }

    /// As [`on_gpu`](Self::on_gpu), in place. When it fails the buffer is as before.
    pub(crate) fn check_gpu(&mut self, gpu: &Gpu) -> Result<()> {
        let region = Arc::get_mut(&mut self.region)
            .ok_or_else(|| PipelineError::busy("the buffer's memory", "check it before it is shared or registered"))?;
        region.look_up(gpu)
    }

    /// Copies bytes out, from `offset`, into `target`.
    ///
    /// # Safety
    /// Nothing writes to the range during the call: no read into it is in flight.
    ///
    /// # Errors
    /// `ERANGE` when the range does not lie inside, `EOPNOTSUPP` for memory that the CPU must not read.
    pub unsafe fn copy_out(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        PipelineError::check_range("copy out of a buffer", offset as u64, target.len() as u64, self.len as u64)?;
        // SAFETY: the caller's contract.
        target.copy_from_slice(&unsafe { self.as_slice() }?[offset..offset + target.len()]);
        Ok(())
    }

    /// The bytes, for reading.
    ///
    /// # Safety
    /// Nothing writes to this buffer while the slice lives: no read into it is in flight, and no handle to the same
    /// memory is written through. To look at a part while reads into other parts are in flight, take a
    /// [`sub_region`](Self::sub_region) of that part first.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for memory that the CPU must not read.
    pub unsafe fn as_slice(&self) -> Result<&[u8]> {
        self.require_host()?;
        // SAFETY: the range is inside the region, whose memory is valid while `self` holds it; the caller rules out
        // writers.
        Ok(unsafe { std::slice::from_raw_parts(self.as_host_ptr(), self.len) })
    }

    /// The bytes, for reading and writing.
    ///
    /// # Safety
    /// Nothing else reads or writes this buffer while the slice lives; see [`as_slice`](Self::as_slice).
    ///
    /// # Errors
    /// `EOPNOTSUPP` for memory that the CPU must not touch.
    pub unsafe fn as_mut_slice(&mut self) -> Result<&mut [u8]> {
        self.require_host()?;
        // SAFETY: as in `as_slice`, and the caller rules out other readers.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.as_host_ptr(), self.len) })
    }

    fn require_host(&self) -> Result<()> {
        match self.region.kind {
            MemoryKind::HostVisible => Ok(()),
            MemoryKind::Bar1Peer => Err(PipelineError::unsupported(
                "CPU access to a device's memory window",
                "read it on the device, or use a host-visible buffer",
            )),
        }
    }

    /// Whether anything but this handle still refers to the memory: a read in flight, a registration, another handle.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.region.is_shared()
    }

    /// Whether the memory is the caller's, which nothing here keeps alive.
    pub(crate) fn is_borrowed(&self) -> bool {
        matches!(self.region.keeper, Keeper::Borrowed)
    }

    /// Gives the memory back to its owner.
    ///
    /// # Errors
    /// `EBUSY`, together with the buffer, while [`is_shared`](Self::is_shared).
    pub fn release(self) -> std::result::Result<(), (Self, PipelineError)> {
        if self.is_shared() {
            let error = PipelineError::busy(
                "the buffer's memory",
                "wait for its reads, unregister it and drop its other handles first",
            );
            return Err((self, error));
        }
        Ok(())
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// The bytes of the region that this buffer covers.
    pub(crate) fn span(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

impl GpuMappedBuffer<'static> {
    /// Wraps host memory kept alive by `owner`, which is dropped after the last read, registration and handle.
    ///
    /// # Safety
    /// `base` is valid for reads and writes of `len` bytes for as long as `owner` is not dropped, and moving `owner`
    /// does not move it. Nobody else writes there, or reads what is not yet announced, while reads into it are in
    /// flight. `device`, if given, is the GPU's address of `base`.
    ///
    /// # Errors
    /// `EINVAL` for a null base or no bytes, `ERANGE` when the range leaves the address space.
    pub unsafe fn from_host_visible_owner<T>(base: *mut u8, len: usize, device: Option<u64>, owner: T) -> Result<Self>
    where
        T: Send + Sync + 'static,
    {
        Self::owned(base, len, device, MemoryKind::HostVisible, Box::new(owner))
    }

    /// Wraps a window into device memory (a GPU's BAR1, a drive's controller memory) that drives can write to.
    ///
    /// `device` is the GPU's own address of the first byte.
    ///
    /// # Safety
    /// `base` is an address in this process of `len` bytes of peer memory that stays mapped for as long as `owner` is
    /// not dropped, and `device` names the same bytes. The contract of
    /// [`from_host_visible_owner`](Self::from_host_visible_owner) holds for it otherwise.
    ///
    /// # Errors
    /// As [`from_host_visible_owner`](Self::from_host_visible_owner).
    pub unsafe fn from_bar1_peer_with_owner<T>(base: *mut u8, len: usize, device: u64, owner: T) -> Result<Self>
    where
        T: Send + Sync + 'static,
    {
        Self::owned(base, len, Some(device), MemoryKind::Bar1Peer, Box::new(owner))
    }

    fn owned(
        base: *mut u8,
        len: usize,
        device: Option<u64>,
        kind: MemoryKind,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        Self::wrap(base, len, device, kind, Keeper::Owner(owner))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Keeper::Mapping(mapping) = &self.keeper {
            tracing::trace!(target: "ringest::memory", base = ?mapping.base(), len = self.len, "mapped memory released");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mem::HugePages;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn buffer(len: usize) -> GpuMappedBuffer<'static> {
        GpuMappedBuffer::whole(Region::from_mapping(Mapping::anonymous(len, 1, HugePages::Off).unwrap()))
    }

    #[test]
    fn sub_regions_are_bounds_checked_and_add_up() {
        let part = buffer(8192).sub_region(4096, 4096).unwrap();
        let (host, device) = (part.as_host_ptr() as u64, part.as_device_ptr().unwrap());
        assert_eq!(host, device);
        let part = part.sub_region(96, 4000).unwrap();
        assert_eq!(part.as_device_ptr().unwrap(), device + 96);
        assert_eq!(part.span(), 4192..8192);
        for (offset, len) in [(0, 4001), (4000, 1), (usize::MAX, 1), (1, usize::MAX)] {
            let error = part.clone_handle().sub_region(offset, len).unwrap_err();
            assert_eq!(error.errno(), libc::ERANGE, "{offset} {len}");
        }
        assert!(part.sub_region(4000, 0).unwrap().is_empty());
    }

    #[test]
    fn an_owner_lives_as_long_as_the_last_handle() {
        static DROPPED: AtomicBool = AtomicBool::new(false);
        struct Owner(Box<[u8]>);
        impl Drop for Owner {
            fn drop(&mut self) {
                DROPPED.store(true, Ordering::Relaxed);
            }
        }
        let mut owner = Owner(vec![0; 64].into());
        let base = owner.0.as_mut_ptr();
        // SAFETY: the boxed bytes do not move with `owner`, and nothing else touches them.
        let first = unsafe { GpuMappedBuffer::from_host_visible_owner(base, 64, None, owner) }.unwrap();
        let second = first.clone_handle();
        assert!(first.as_device_ptr().is_none());
        let (first, error) = first.release().unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY);
        drop(first);
        assert!(!DROPPED.load(Ordering::Relaxed));
        second.release().unwrap();
        assert!(DROPPED.load(Ordering::Relaxed));
    }

    #[test]
    fn bad_memory_is_refused() {
        // SAFETY: nothing is ever read or written through these.
        unsafe {
            let null = GpuMappedBuffer::from_host_visible_owner(std::ptr::null_mut(), 64, None, ());
            assert_eq!(null.unwrap_err().errno(), libc::EINVAL);
            assert_eq!(GpuMappedBuffer::from_host_visible_slice(&mut [], None).unwrap_err().errno(), libc::EINVAL);
            let wraps = GpuMappedBuffer::from_host_visible_owner(usize::MAX as *mut u8, 64, None, ());
            assert_eq!(wraps.unwrap_err().errno(), libc::ERANGE);
            let wraps = GpuMappedBuffer::from_bar1_peer_with_owner(4096 as *mut u8, 64, u64::MAX - 8, ());
            assert_eq!(wraps.unwrap_err().errno(), libc::ERANGE);
            let peer = GpuMappedBuffer::from_bar1_peer_with_owner(4096 as *mut u8, 64, 1 << 40, ()).unwrap();
            assert_eq!(peer.as_slice().unwrap_err().errno(), libc::EOPNOTSUPP);
        }
    }
}
