//! Addresses and memory of a GPU, apart: reserve a large range once, put memory behind it as it is needed.
//!
//! The CUDA virtual memory management API, with its rules kept by bookkeeping of ours: what would be undefined or only
//! found by the driver is refused first, and nothing is given back while something else stands on it.

use crate::error::{PipelineError, Result, Text};
use crate::gpu::Gpu;
use crate::sys::cuda::constants::{LOCATION_DEVICE, LOCATION_HOST, LOCATION_HOST_NUMA};
use crate::sys::cuda::{Location, Physical, PhysicalRequest, Reservation, export_dma_buf};
use crate::sys::mem::AddressSpace;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// What an access right allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AccessFlags {
    /// Nothing.
    #[default]
    None,
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

impl AccessFlags {
    fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Read => 1,
            Self::ReadWrite => 3,
        }
    }

    fn from_bits(bits: u64) -> Self {
        match bits {
            0 => Self::None,
            1 => Self::Read,
            _ => Self::ReadWrite,
        }
    }
}

/// Where physical memory is, and who accesses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryLocation {
    /// A GPU, by its ordinal.
    Gpu(u32),
    /// A NUMA node of the host, by its number. As who accesses, it stands for all of the host's processors.
    HostNuma(u32),
    /// The host, wherever.
    Host,
}

impl MemoryLocation {
    fn raw(self) -> Location {
        let id = |id: u32| i32::try_from(id).unwrap_or(-1);
        match self {
            Self::Gpu(ordinal) => Location { kind: LOCATION_DEVICE, id: id(ordinal) },
            Self::HostNuma(node) => Location { kind: LOCATION_HOST_NUMA, id: id(node) },
            Self::Host => Location { kind: LOCATION_HOST, id: 0 },
        }
    }

    fn from_raw(raw: Location) -> Self {
        match raw.kind {
            LOCATION_HOST_NUMA => Self::HostNuma(raw.id as u32),
            LOCATION_HOST => Self::Host,
            _ => Self::Gpu(raw.id as u32),
        }
    }
}

impl From<&Gpu> for MemoryLocation {
    fn from(gpu: &Gpu) -> Self {
        Self::Gpu(gpu.ordinal())
    }
}

/// What physical memory is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PhysicalOptions {
    /// Where; `None`: on the manager's GPU.
    pub location: Option<MemoryLocation>,
    /// Whether peers (network cards, drives) are to address it by GPUDirect RDMA.
    pub rdma: bool,
    /// Whether it is to be exported as a file descriptor.
    pub exportable: bool,
}

/// Manages the virtual memory of a GPU.
///
/// [`reserve`](Self::reserve) takes addresses, [`alloc_physical`](Self::alloc_physical) memory;
/// [`map`](Self::map) puts memory behind addresses and [`set_access`](Self::set_access) says who may use them.
/// Both are owned: a [`VirtualAddressRange`] unmaps and returns its addresses when dropped, physical memory lives until
/// its [`PhysicalAllocation`] and its last mapping are gone.
///
/// Nothing here waits for kernels: unmapping what a running kernel uses makes the kernel fault, and with it the context.
///
/// Without a driver ([`planning`](Self::planning), or [`detect`](Self::detect) where there is none), `reserve` yields a
/// planning range: addresses that are really this process's, with nothing behind them. The rest is `EOPNOTSUPP`.
#[derive(Debug, Clone)]
pub struct VirtualMemoryManager {
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    Gpu { gpu: Gpu, granularity: usize },
    Planning(Text),
}

/// Granularity of planning ranges: that of every GPU with this API so far.
pub const PLANNING_GRANULARITY: usize = 2 << 20;

impl VirtualMemoryManager {
    /// A manager of this GPU's memory.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the GPU cannot; the driver's ([`PipelineError::Cuda`]).
    pub fn new(gpu: &Gpu) -> Result<Self> {
        gpu.require(gpu.attributes().virtual_memory, "virtual memory management")?;
        let request = PhysicalRequest { location: MemoryLocation::from(gpu).raw(), rdma: false, exportable: false };
        let granularity = sound_granularity(request.granularity(gpu.context(), false)?)?;
        Ok(Self { state: State::Gpu { gpu: gpu.clone(), granularity } })
    }

    /// A manager without a GPU, for planning.
    #[must_use]
    pub fn planning() -> Self {
        Self { state: State::Planning("this manager only plans".into()) }
    }

    /// A manager of the first GPU's memory; one that only plans where there is none, with the reason in its errors.
    #[must_use]
    pub fn detect() -> Self {
        Gpu::current().and_then(|gpu| Self::new(&gpu)).unwrap_or_else(|error| {
            let reason = match error {
                PipelineError::NotSupported { fix, .. } => fix,
                other => other.to_string().into(),
            };
            Self { state: State::Planning(reason) }
        })
    }

    /// The GPU; `None`: it only plans.
    #[must_use]
    pub fn gpu(&self) -> Option<&Gpu> {
        match &self.state {
            State::Gpu { gpu, .. } => Some(gpu),
            State::Planning(_) => None,
        }
    }

    fn require_gpu(&self) -> Result<&Gpu> {
        match &self.state {
            State::Gpu { gpu, .. } => Ok(gpu),
            State::Planning(reason) => {
                Err(PipelineError::unsupported("GPU virtual memory beyond planning", reason.clone()))
            }
        }
    }

    /// What sizes and offsets of such memory are multiples of; `recommended`: what is best instead of what is least.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without a driver, or for memory that the GPU cannot have; the driver's ([`PipelineError::Cuda`]).
    pub fn granularity(&self, options: PhysicalOptions, recommended: bool) -> Result<usize> {
        let (gpu, request) = self.request(options)?;
        sound_granularity(request.granularity(gpu.context(), recommended)?)
    }

    fn request(&self, options: PhysicalOptions) -> Result<(&Gpu, PhysicalRequest)> {
        let gpu = self.require_gpu()?;
        let attributes = gpu.attributes();
        let location = options.location.unwrap_or_else(|| gpu.into());
        if !matches!(location, MemoryLocation::Gpu(_)) {
            gpu.require(attributes.host_numa_memory, "GPU virtual memory on the host's nodes")?;
        }
        if options.rdma {
            gpu.require(attributes.rdma_virtual_memory, "RDMA to memory of the virtual memory manager")?;
        }
        if options.exportable {
            gpu.require(attributes.export_fd, "export of physical memory as a file descriptor")?;
        }
        Ok((gpu, PhysicalRequest { location: location.raw(), rdma: options.rdma, exportable: options.exportable }))
    }

    /// Reserves `size` bytes of addresses at a multiple of `alignment`.
    ///
    /// # Errors
    /// `EINVAL`, before the driver is asked, for a size of 0, an alignment that is 0 or no power of two, a size that is
    /// no multiple of the alignment or of the granularity; `ENOMEM` when there is no such range; the driver's
    /// ([`PipelineError::Cuda`]).
    pub fn reserve(&self, size: usize, alignment: usize) -> Result<VirtualAddressRange> {
        self.reserve_near(size, alignment, 0)
    }

    /// As [`reserve`](Self::reserve), near an address if that is free (0: anywhere).
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve); `EINVAL` also for an address that is no multiple of the alignment.
    pub fn reserve_near(&self, size: usize, alignment: usize, address: u64) -> Result<VirtualAddressRange> {
        let granularity = match self.state {
            State::Gpu { granularity, .. } => granularity,
            State::Planning(_) => PLANNING_GRANULARITY,
        };
        if size == 0 {
            return Err(PipelineError::invalid("a range of 0 bytes", "reserve at least one granule"));
        }
        if !alignment.is_power_of_two() {
            return Err(PipelineError::invalid(format!("alignment {alignment}"), "use a power of two"));
        }
        for (unit, name) in [(alignment, "alignment"), (granularity, "granularity")] {
            if !size.is_multiple_of(unit) {
                let what = format!("a range of {size} bytes, no multiple of the {name} {unit}");
                return Err(PipelineError::invalid(what, "round it up"));
            }
        }
        if !address.is_multiple_of(alignment as u64) {
            return Err(PipelineError::invalid(format!("address {address:#x}"), "use a multiple of the alignment"));
        }
        let alignment = alignment.max(granularity);
        let (base, space) = match &self.state {
            State::Gpu { gpu, .. } => {
                let reservation = Reservation::new(gpu.context(), size, alignment, address)?;
                (reservation.address(), Space::Reserved(reservation))
            }
            State::Planning(reason) => {
                let space = AddressSpace::reserve(size, alignment).map_err(|_| PipelineError::OutOfMemory {
                    what: "a range of addresses",
                    bytes: size as u64,
                    fix: "reserve less".into(),
                })?;
                (space.address(), Space::Planned { _space: space, reason: reason.clone() })
            }
        };
        Ok(VirtualAddressRange { space: Some(space), base, size, mappings: BTreeMap::new() })
    }

    /// Gives the addresses of a range back.
    ///
    /// # Errors
    /// Together with the range: `EBUSY` while anything is mapped in it; the driver's ([`PipelineError::Cuda`]).
    #[allow(clippy::result_large_err, reason = "the range comes back")]
    pub fn release(
        &self,
        mut range: VirtualAddressRange,
    ) -> std::result::Result<(), (VirtualAddressRange, PipelineError)> {
        if !range.mappings.is_empty() {
            let error = PipelineError::busy("the address range", "unmap everything in it first");
            return Err((range, error));
        }
        match range.space.take() {
            Some(Space::Reserved(reservation)) => reservation.free().map_err(|(reservation, error)| {
                range.space = Some(Space::Reserved(reservation));
                (range, error)
            }),
            _ => Ok(()),
        }
    }

    /// Allocates `size` bytes of physical memory.
    ///
    /// # Errors
    /// `EINVAL`, before the driver is asked, for a size of 0 or no multiple of the [`granularity`](Self::granularity);
    /// `EOPNOTSUPP` without a driver, or for memory that the GPU cannot have; the driver's ([`PipelineError::Cuda`]):
    /// `ENOMEM` when there is no such memory.
    pub fn alloc_physical(&self, size: usize, options: PhysicalOptions) -> Result<PhysicalAllocation> {
        if size == 0 {
            return Err(PipelineError::invalid("physical memory of 0 bytes", "allocate at least one granule"));
        }
        let granularity = self.granularity(options, false)?;
        check_multiple("physical memory of this many bytes", size, granularity)?;
        let (gpu, request) = self.request(options)?;
        let physical = Physical::create(gpu.context(), size, request)?;
        Ok(PhysicalAllocation { inner: Arc::new(Block { physical, size, granularity, request }) })
    }

    /// Frees physical memory.
    ///
    /// # Errors
    /// Together with the allocation: `EBUSY` while it is mapped somewhere; the driver's ([`PipelineError::Cuda`]).
    pub fn free_physical(
        &self,
        allocation: PhysicalAllocation,
    ) -> std::result::Result<(), (PhysicalAllocation, PipelineError)> {
        let block = Arc::try_unwrap(allocation.inner).map_err(|inner| {
            let error = PipelineError::busy("the physical memory", "unmap it everywhere first");
            (PhysicalAllocation { inner }, error)
        })?;
        let Block { physical, size, granularity, request } = block;
        physical.free().map_err(|(physical, error)| {
            let inner = Arc::new(Block { physical, size, granularity, request });
            (PhysicalAllocation { inner }, error)
        })
    }

    /// Puts `size` bytes of physical memory, from `physical_offset` in it, behind the addresses from `offset` in the range.
    ///
    /// Nobody can access them before [`set_access`](Self::set_access). One allocation may be mapped at several places.
    ///
    /// # Errors
    /// `EINVAL` for a size of 0, or a size or offset that is no multiple of the memory's granularity; `ERANGE` when either
    /// range does not lie inside; `EBUSY` when something is mapped there already; `EOPNOTSUPP` for a planning range; the
    /// driver's ([`PipelineError::Cuda`]): drivers of CUDA 13 answer `EOPNOTSUPP` to anything but a whole allocation from
    /// physical offset 0.
    pub fn map(
        &self,
        range: &mut VirtualAddressRange,
        offset: usize,
        size: usize,
        allocation: &PhysicalAllocation,
        physical_offset: usize,
    ) -> Result<()> {
        self.require_gpu()?;
        let block = &allocation.inner;
        range.check(offset, size)?;
        for (what, value) in [
            ("a mapping of this many bytes", size),
            ("a mapping at this offset", offset),
            ("a mapping from this physical offset", physical_offset),
        ] {
            check_multiple(what, value, block.granularity)?;
        }
        PipelineError::check_range("physical memory", physical_offset as u64, size as u64, block.size as u64)?;
        if let Some(there) = range.overlapping(offset, size) {
            return Err(PipelineError::busy(
                format!("the address range at offset {there}"),
                "unmap what is mapped there first",
            ));
        }
        range.reservation()?.map(offset, size, &block.physical, physical_offset)?;
        let mapping = Mapping { size, block: Arc::clone(block), access: Vec::new() };
        range.mappings.insert(offset, mapping);
        Ok(())
    }

    /// Undoes the mappings that make up exactly these addresses. The physical memory goes when nothing else holds it.
    ///
    /// # Errors
    /// `EINVAL` for a size of 0, or a range that cuts a mapping or holds addresses without one; `ERANGE` when it does not
    /// lie inside; `EOPNOTSUPP` for a planning range; the driver's ([`PipelineError::Cuda`]): the mappings before the
    /// one it failed on are gone then.
    pub fn unmap(&self, range: &mut VirtualAddressRange, offset: usize, size: usize) -> Result<()> {
        self.require_gpu()?;
        for at in range.run(offset, size)? {
            let size = range.mappings[&at].size;
            range.reservation()?.unmap(at, size)?;
            range.mappings.remove(&at);
        }
        Ok(())
    }

    /// Says who may access the mappings that make up exactly these addresses, and how. Locations not named keep what they
    /// have; a new mapping starts without access.
    ///
    /// # Errors
    /// `EINVAL` for a size of 0, no locations, or a range that cuts a mapping or holds addresses without one; `ERANGE` when
    /// it does not lie inside; `EOPNOTSUPP` for a planning range; the driver's ([`PipelineError::Cuda`]): `ENODEV` or
    /// `EINVAL` for a location that does not exist or cannot reach the memory.
    pub fn set_access(
        &self,
        range: &mut VirtualAddressRange,
        offset: usize,
        size: usize,
        access: &[(MemoryLocation, AccessFlags)],
    ) -> Result<()> {
        self.require_gpu()?;
        if access.is_empty() {
            return Err(PipelineError::invalid("access for no location", "name at least one"));
        }
        let run = range.run(offset, size)?;
        let raw: Vec<_> = access.iter().map(|(location, flags)| (location.raw(), flags.bits())).collect();
        range.reservation()?.set_access(offset, size, &raw)?;
        for at in run {
            let Some(mapping) = range.mappings.get_mut(&at) else { continue };
            for &(location, flags) in access {
                mapping.access.retain(|&(known, _)| known != location);
                mapping.access.push((location, flags));
            }
        }
        Ok(())
    }

    /// The access that a location has to the mapping at `offset`, as the driver says.
    ///
    /// # Errors
    /// `EINVAL` where nothing is mapped; `ERANGE` outside; `EOPNOTSUPP` for a planning range; the driver's.
    pub fn access(&self, range: &VirtualAddressRange, offset: usize, location: MemoryLocation) -> Result<AccessFlags> {
        self.require_gpu()?;
        range.check(offset, 1)?;
        if range.overlapping(offset, 1).is_none() {
            return Err(PipelineError::invalid(format!("offset {offset}"), "nothing is mapped there"));
        }
        Ok(AccessFlags::from_bits(range.reservation()?.access(offset, location.raw())?))
    }

    /// A file descriptor for physical memory that was allocated as exportable, to be sent to another process.
    ///
    /// # Errors
    /// `EINVAL` for memory that is not exportable (what was imported is not); `EOPNOTSUPP` without a driver; the driver's ([`PipelineError::Cuda`]).
    pub fn export_fd(&self, allocation: &PhysicalAllocation) -> Result<OwnedFd> {
        self.require_gpu()?;
        if !allocation.inner.request.exportable {
            return Err(PipelineError::invalid(
                "export of physical memory that is not exportable",
                "allocate it with PhysicalOptions::exportable",
            ));
        }
        allocation.inner.physical.export()
    }

    /// Physical memory behind a descriptor that [`export_fd`](Self::export_fd) made, perhaps in another process.
    ///
    /// `size` is what was allocated; the driver refuses to map anything else. The descriptor stays the caller's.
    ///
    /// # Errors
    /// `EINVAL` for a size of 0 or off the granularity; `EOPNOTSUPP` without a driver; the driver's
    /// ([`PipelineError::Cuda`]), also for a descriptor of another kind.
    pub fn import_fd(&self, fd: impl AsFd, size: usize) -> Result<PhysicalAllocation> {
        if size == 0 {
            return Err(PipelineError::invalid("physical memory of 0 bytes", "pass the size it was allocated with"));
        }
        let gpu = self.require_gpu()?;
        let physical = Physical::import(gpu.context(), fd.as_fd())?;
        let request = physical.request()?;
        let granularity = sound_granularity(request.granularity(gpu.context(), false)?)?;
        check_multiple("physical memory of this many bytes", size, granularity)?;
        Ok(PhysicalAllocation { inner: Arc::new(Block { physical, size, granularity, request }) })
    }

    /// A dma-buf over mappings that make up exactly these addresses, for other drivers to import.
    ///
    /// # Errors
    /// `EINVAL` for a size of 0, or a range that cuts a mapping or holds addresses without one; `ERANGE` when it does not
    /// lie inside; `EOPNOTSUPP` for a planning range, or a GPU or driver that cannot; the driver's
    /// ([`PipelineError::Cuda`]).
    pub fn export_dma_buf(&self, range: &VirtualAddressRange, offset: usize, size: usize) -> Result<OwnedFd> {
        let gpu = self.require_gpu()?;
        gpu.require(gpu.attributes().dma_buf, "export of GPU memory as a dma-buf")?;
        range.run(offset, size)?;
        export_dma_buf(range.reservation()?.context(), range.base + offset as u64, size)
    }
}

/// Divisions by what a driver says are not to fail.
fn sound_granularity(bytes: usize) -> Result<usize> {
    match bytes.is_power_of_two() {
        true => Ok(bytes),
        false => Err(PipelineError::unsupported(
            "virtual memory management",
            format!("the driver names a granularity of {bytes} bytes, no power of two"),
        )),
    }
}

fn check_multiple(what: &'static str, value: usize, granularity: usize) -> Result<()> {
    if value.is_multiple_of(granularity) {
        return Ok(());
    }
    Err(PipelineError::invalid(
        format!("{what}: {value}, no multiple of the granularity {granularity}"),
        "round it to VirtualMemoryManager::granularity",
    ))
}

/// Reserved addresses, and what is mapped there. Dropped, it unmaps everything and gives the addresses back.
#[derive(Debug)]
pub struct VirtualAddressRange {
    /// `None` only while the range is taken apart.
    space: Option<Space>,
    base: u64,
    size: usize,
    /// By offset; they do not overlap.
    mappings: BTreeMap<usize, Mapping>,
}

#[derive(Debug)]
enum Space {
    Reserved(Reservation),
    Planned { _space: AddressSpace, reason: Text },
}

#[derive(Debug)]
struct Mapping {
    size: usize,
    #[allow(dead_code, reason = "keeps the physical memory")]
    block: Arc<Block>,
    access: Vec<(MemoryLocation, AccessFlags)>,
}

impl VirtualAddressRange {
    /// First address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base
    }

    /// Bytes of addresses.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The address of byte `offset`.
    ///
    /// # Errors
    /// `ERANGE` beyond the end.
    pub fn address_of(&self, offset: usize) -> Result<u64> {
        PipelineError::check_range("an address range", offset as u64, 0, self.size as u64)?;
        Ok(self.base + offset as u64)
    }

    /// Whether nothing can ever be mapped here, because there is no driver.
    #[must_use]
    pub fn is_planning(&self) -> bool {
        matches!(self.space, Some(Space::Planned { .. }))
    }

    /// What is mapped: (offset, bytes), in order.
    pub fn mappings(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.mappings.iter().map(|(&offset, mapping)| (offset, mapping.size))
    }

    /// Bytes mapped.
    #[must_use]
    pub fn mapped(&self) -> usize {
        self.mappings.values().map(|mapping| mapping.size).sum()
    }

    /// Bytes mapped from the start on, without a gap.
    pub(crate) fn mapped_from_start(&self) -> usize {
        self.mappings().fold(0, |end, (at, size)| if at == end { at + size } else { end })
    }

    /// Whether a location was granted this access to every byte of a part.
    pub(crate) fn allows(&self, offset: usize, size: usize, location: MemoryLocation, access: AccessFlags) -> bool {
        let end = offset + size;
        let mut covered = offset;
        for (&at, mapping) in self.mappings.range(..end) {
            if at + mapping.size <= covered {
                continue;
            }
            if at > covered || !mapping.access.contains(&(location, access)) {
                return false;
            }
            covered = at + mapping.size;
        }
        covered >= end
    }

    fn reservation(&self) -> Result<&Reservation> {
        match &self.space {
            Some(Space::Reserved(reservation)) => Ok(reservation),
            Some(Space::Planned { reason, .. }) => {
                Err(PipelineError::unsupported("mapping in a planning range", reason.clone()))
            }
            None => Err(PipelineError::unsupported("an address range that was given back", "reserve another")),
        }
    }

    fn check(&self, offset: usize, size: usize) -> Result<()> {
        if size == 0 {
            return Err(PipelineError::invalid("a part of 0 bytes", "name at least one granule"));
        }
        PipelineError::check_range("an address range", offset as u64, size as u64, self.size as u64)
    }

    /// Offset of a mapping that shares bytes with this part.
    fn overlapping(&self, offset: usize, size: usize) -> Option<usize> {
        let (&at, mapping) = self.mappings.range(..offset + size).next_back()?;
        (at + mapping.size > offset).then_some(at)
    }

    /// Offsets of the mappings that make up exactly this part.
    fn run(&self, offset: usize, size: usize) -> Result<Vec<usize>> {
        self.check(offset, size)?;
        let (mut at, mut run) = (offset, Vec::new());
        while at < offset + size {
            let Some(mapping) = self.mappings.get(&at) else { break };
            run.push(at);
            at += mapping.size;
        }
        if at != offset + size {
            return Err(PipelineError::invalid(
                format!("the part at offset {offset} of {size} bytes is not made of whole mappings"),
                "name whole mappings that lie side by side (VirtualAddressRange::mappings)",
            ));
        }
        Ok(run)
    }
}

impl Drop for VirtualAddressRange {
    fn drop(&mut self) {
        let Some(Space::Reserved(reservation)) = self.space.take() else { return };
        let mut stuck = false;
        while let Some((at, mapping)) = self.mappings.pop_first() {
            if !reservation.give_back_mapping(at, mapping.size) {
                // Counted and logged. The memory behind it stays, and so do the addresses.
                std::mem::forget(mapping);
                stuck = true;
            }
        }
        if stuck {
            std::mem::forget(reservation);
        }
    }
}

/// Physical memory, freed when it and its last mapping are gone.
#[derive(Debug)]
pub struct PhysicalAllocation {
    inner: Arc<Block>,
}

#[derive(Debug)]
struct Block {
    physical: Physical,
    size: usize,
    granularity: usize,
    request: PhysicalRequest,
}

impl PhysicalAllocation {
    /// Bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.inner.size
    }

    /// Sizes and offsets of its mappings are multiples of it.
    #[must_use]
    pub fn granularity(&self) -> usize {
        self.inner.granularity
    }

    /// Where it is.
    #[must_use]
    pub fn location(&self) -> MemoryLocation {
        MemoryLocation::from_raw(self.inner.request.location)
    }

    /// Whether peers can address it by GPUDirect RDMA.
    #[must_use]
    pub fn is_rdma_capable(&self) -> bool {
        self.inner.request.rdma
    }

    /// Whether it is mapped somewhere.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        Arc::strong_count(&self.inner) > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planning_checks_its_arguments_first() {
        let manager = VirtualMemoryManager::planning();
        let refused = |size, alignment| manager.reserve(size, alignment).unwrap_err().errno();
        for (size, alignment) in
            [(0, 4096), (2 << 20, 0), (2 << 20, 3), (2 << 20, 4 << 20), (4096, 4096), ((2 << 20) + 1, 1), (3 << 20, 1)]
        {
            assert_eq!(refused(size, alignment), libc::EINVAL, "{size} {alignment}");
        }
        assert_eq!(manager.reserve_near(2 << 20, 4096, 1).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(refused(usize::MAX & !((2 << 20) - 1), 1), libc::ENOMEM);
        assert_eq!(manager.alloc_physical(0, PhysicalOptions::default()).unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn a_planning_range_has_addresses_and_nothing_behind_them() {
        let manager = VirtualMemoryManager::planning();
        let wide = manager.reserve(1 << 34, 1 << 30).unwrap();
        let other = manager.reserve(2 << 20, 1).unwrap();
        assert!(wide.is_planning() && wide.address().is_multiple_of(1 << 30) && wide.size() == 1 << 34);
        assert!(other.address().is_multiple_of(2 << 20), "at least the granularity");
        let (a, b) = (wide.address()..wide.address_of(1 << 34).unwrap(), other.address());
        assert!(!a.contains(&b));
        assert_eq!(wide.address_of((1 << 34) + 1).unwrap_err().errno(), libc::ERANGE);
        assert_eq!((wide.mapped(), wide.mappings().count()), (0, 0));
        assert_eq!(manager.granularity(PhysicalOptions::default(), false).unwrap_err().errno(), libc::EOPNOTSUPP);
        let error = manager.alloc_physical(2 << 20, PhysicalOptions::default()).unwrap_err();
        assert_eq!(error.errno(), libc::EOPNOTSUPP);
        manager.release(wide).unwrap();
    }

    #[test]
    fn parts_outside_or_without_mappings_are_refused() {
        let range = VirtualMemoryManager::planning().reserve(1 << 30, 1).unwrap();
        assert_eq!(range.check(0, 0).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(range.check(1 << 30, 1).unwrap_err().errno(), libc::ERANGE);
        assert_eq!(range.check(usize::MAX, 2).unwrap_err().errno(), libc::ERANGE);
        assert_eq!(range.run(0, 2 << 20).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(range.overlapping(0, 1 << 30), None);
        assert!(!range.allows(0, 1, MemoryLocation::Gpu(0), AccessFlags::ReadWrite));
    }
}
