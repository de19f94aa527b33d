//! Addresses and memory of a GPU, apart.

use super::gpu::{RINGEST_GPU_NONE, open};
use super::handle::{Family, Table, create, exclusive, last, shared};
use super::options::{self, Options, known_flags};
use super::{Failure, Outcome, elements, status, store, value};
use crate::memory::{
    AccessFlags, MemoryLocation, PLANNING_GRANULARITY, PhysicalAllocation, PhysicalOptions, VirtualAddressRange,
    VirtualMemoryManager,
};
use std::os::fd::{BorrowedFd, IntoRawFd};

/// Manages the virtual memory of a GPU: addresses are reserved, physical memory is allocated, and put behind them.
///
/// Nothing here waits for kernels: unmapping what a running kernel uses makes the kernel fault, and with it the context.
pub struct ringest_vmm {
    _opaque: (),
}

/// Reserved addresses, and what is mapped there. Calls that change it come from one thread at a time (-EBUSY otherwise).
pub struct ringest_vmm_range {
    _opaque: (),
}

/// Physical memory, kept by this handle and by what it is mapped to.
pub struct ringest_vmm_memory {
    _opaque: (),
}

/// A range; none only after a call panicked while it gave it up.
pub(super) struct RangeObject {
    manager: VirtualMemoryManager,
    range: Option<VirtualAddressRange>,
}

impl RangeObject {
    fn parts(&mut self) -> Outcome<(&VirtualMemoryManager, &mut VirtualAddressRange)> {
        match &mut self.range {
            Some(range) => Ok((&self.manager, range)),
            None => Err(gone()),
        }
    }

    fn range(&self) -> Outcome<&VirtualAddressRange> {
        self.range.as_ref().ok_or_else(gone)
    }
}

/// Physical memory; none only after a call panicked while it gave it up.
pub(super) struct MemoryObject {
    manager: VirtualMemoryManager,
    memory: Option<PhysicalAllocation>,
}

impl MemoryObject {
    fn memory(&self) -> Outcome<&PhysicalAllocation> {
        self.memory.as_ref().ok_or_else(gone)
    }
}

#[cold]
fn gone() -> Failure {
    Failure::new(libc::ENOTRECOVERABLE, "an earlier call with this handle panicked: it can only be given up")
}

static MANAGERS: Table<VirtualMemoryManager> = Table::new(12, "ringest_vmm");
static RANGES: Table<RangeObject> = Table::new(13, "ringest_vmm_range");
static MEMORY: Table<MemoryObject> = Table::new(14, "ringest_vmm_memory");

impl Family for ringest_vmm {
    type Object = VirtualMemoryManager;
    fn table() -> &'static Table<Self::Object> {
        &MANAGERS
    }
}

impl Family for ringest_vmm_range {
    type Object = RangeObject;
    fn table() -> &'static Table<Self::Object> {
        &RANGES
    }
}

impl Family for ringest_vmm_memory {
    type Object = MemoryObject;
    fn table() -> &'static Table<Self::Object> {
        &MEMORY
    }
}

/// Granularity of ranges without a GPU.
pub const RINGEST_VMM_PLANNING_GRANULARITY: u64 = 2097152;

const _: () = assert!(RINGEST_VMM_PLANNING_GRANULARITY == PLANNING_GRANULARITY as u64);

/// Flag of ringest_vmm_memory_options: peers (network cards, drives) are to address the memory by GPUDirect RDMA.
pub const RINGEST_VMM_RDMA: u32 = 1 << 0;
/// Flag of ringest_vmm_memory_options: the memory is to be exported as a descriptor.
pub const RINGEST_VMM_EXPORTABLE: u32 = 1 << 1;

/// Where physical memory is, and who accesses it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_vmm_location {
    /// The manager's GPU; the id is 0.
    Own = 0,
    /// A GPU, by its ordinal.
    Gpu = 1,
    /// A NUMA node of the host, by its number. As who accesses, it stands for all of the host's processors.
    HostNuma = 2,
    /// The host, wherever; the id is 0.
    Host = 3,
}

/// What an access right allows.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_vmm_access {
    /// Nothing.
    None = 0,
    /// Loads.
    Read = 1,
    /// Loads and stores.
    ReadWrite = 2,
}

/// What physical memory is wanted. All zero (with size set) means defaults.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_vmm_memory_options {
    /// sizeof(struct ringest_vmm_memory_options).
    pub size: u32,
    /// RINGEST_VMM_RDMA and RINGEST_VMM_EXPORTABLE.
    pub flags: u32,
    /// enum ringest_vmm_location: where.
    pub location: u32,
    /// Which of those.
    pub id: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

// SAFETY: repr(C), integers only, no padding (4 * 4 + 16), size first.
unsafe impl Options for ringest_vmm_memory_options {}

/// Who may access memory, and how.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_vmm_grant {
    /// enum ringest_vmm_location: who.
    pub location: u32,
    /// Which of those.
    pub id: u32,
    /// enum ringest_vmm_access.
    pub access: u32,
    /// Zero.
    pub reserved: u32,
}

fn location(kind: u32, id: u32) -> Outcome<Option<MemoryLocation>> {
    let found = match (kind, id) {
        (0, 0) => None,
        (1, ordinal) => Some(MemoryLocation::Gpu(ordinal)),
        (2, node) => Some(MemoryLocation::HostNuma(node)),
        (3, 0) => Some(MemoryLocation::Host),
        (0 | 3, _) => return Err(Failure::new(libc::EINVAL, format!("id {id}: a location of kind {kind} has none"))),
        _ => return Err(Failure::new(libc::EINVAL, format!("location {kind}: use enum ringest_vmm_location"))),
    };
    Ok(found)
}

/// Who accesses: without a GPU of the manager's own it does not matter which.
fn accessor(manager: &VirtualMemoryManager, kind: u32, id: u32) -> Outcome<MemoryLocation> {
    Ok(location(kind, id)?.unwrap_or_else(|| manager.gpu().map_or(MemoryLocation::Host, Into::into)))
}

/// # Safety
/// As for [`options::read`].
unsafe fn memory_options(options: *const ringest_vmm_memory_options) -> Outcome<PhysicalOptions> {
    // SAFETY: the caller's contract.
    let options = unsafe { options::read(options) }?;
    known_flags(options.flags, RINGEST_VMM_RDMA | RINGEST_VMM_EXPORTABLE)?;
    options::zero(&options.reserved, "ringest_vmm_memory_options")?;
    Ok(PhysicalOptions {
        location: location(options.location, options.id)?,
        rdma: options.flags & RINGEST_VMM_RDMA != 0,
        exportable: options.flags & RINGEST_VMM_EXPORTABLE != 0,
    })
}

/// Makes a manager of a GPU's memory, by its ordinal, and stores a handle in *out.
///
/// With RINGEST_GPU_NONE it only plans: ranges have addresses that are really this process's, and nothing behind them.
///
/// Any thread. Destroy with ringest_vmm_destroy.
///
/// Errors: -EINVAL when out is NULL; -EOPNOTSUPP without a GPU, or when it has no virtual memory management; -ENODEV for
/// an ordinal beyond ringest_gpu_count; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_vmm_create(gpu: u32, out: *mut *mut ringest_vmm) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            let manager = match gpu {
                RINGEST_GPU_NONE => VirtualMemoryManager::planning(),
                ordinal => VirtualMemoryManager::new(&open(ordinal)?)?,
            };
            create::<ringest_vmm>(|| Ok(manager))
        })
    })
}

/// Gives the handle up. Ranges and memory made by it stay.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_destroy(vmm: *mut ringest_vmm) -> i32 {
    status(|| {
        drop(last(vmm.cast_const())?.take());
        Ok(())
    })
}

/// What sizes and offsets of such memory are multiples of; with recommended 1 what is best instead of what is least.
/// options may be NULL.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for a bad location, unknown flags, or recommended other than 0 and 1; -E2BIG for an option
/// struct with unknown fields; -EOPNOTSUPP without a GPU, or for memory that it cannot have; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_vmm_granularity(
    vmm: *const ringest_vmm,
    options: *const ringest_vmm_memory_options,
    recommended: u32,
) -> i64 {
    value(|| {
        // SAFETY: `options` is null or valid by the C contract.
        let options = unsafe { memory_options(options) }?;
        if recommended > 1 {
            return Err(Failure::new(libc::EINVAL, format!("recommended {recommended}: use 0 or 1")));
        }
        Ok(shared(vmm)?.granularity(options, recommended == 1)? as i64)
    })
}

/// Reserves size bytes of addresses at a multiple of alignment, near address if that is free (0: anywhere), and stores a
/// handle in *out.
///
/// Any thread. Release with ringest_vmm_range_release.
///
/// Errors: -EBADF; -EINVAL for size 0, an alignment that is no power of two, a size that is no multiple of the alignment
/// or the granularity, an address that is no multiple of the alignment, or out NULL; -ENOMEM; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_vmm_reserve(
    vmm: *const ringest_vmm,
    size: usize,
    alignment: usize,
    address: u64,
    out: *mut *mut ringest_vmm_range,
) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            let manager = shared(vmm)?.clone();
            create::<ringest_vmm_range>(|| {
                let range = Some(manager.reserve_near(size, alignment, address)?);
                Ok(RangeObject { manager, range })
            })
        })
    })
}

/// Gives the addresses back.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while anything is mapped there; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_range_release(range: *mut ringest_vmm_range) -> i32 {
    status(|| {
        let mut entered = last(range.cast_const())?;
        if let Some(range) = entered.range.take()
            && let Err((range, error)) = entered.manager.release(range)
        {
            entered.range = Some(range);
            return Err(error.into());
        }
        drop(entered.take());
        Ok(())
    })
}

/// Stores the first address.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_vmm_range_address(range: *const ringest_vmm_range, out: *mut u64) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(range)?.range()?.address())) })
}

/// Bytes of addresses.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_range_size(range: *const ringest_vmm_range) -> i64 {
    value(|| Ok(shared(range)?.range()?.size() as i64))
}

/// Bytes that are mapped.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_range_mapped(range: *const ringest_vmm_range) -> i64 {
    value(|| Ok(shared(range)?.range()?.mapped() as i64))
}

/// Puts size bytes of physical memory, from memory_offset in it, behind the addresses from offset in the range. Nobody may
/// access them before ringest_vmm_range_set_access. Memory may be mapped at several places.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for size 0, or a size or offset that is no multiple of the memory's granularity; -ERANGE when
/// the part does not lie inside the range or the memory; -EBUSY when something is mapped there; -EOPNOTSUPP for a range
/// without a GPU; those of the CUDA driver, which from CUDA 13 on maps only whole memory from its beginning.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_range_map(
    range: *mut ringest_vmm_range,
    offset: usize,
    size: usize,
    memory: *const ringest_vmm_memory,
    memory_offset: usize,
) -> i32 {
    status(|| {
        let memory = shared(memory)?;
        let mut entered = exclusive(range.cast_const())?;
        let (manager, range) = entered.parts()?;
        Ok(manager.map(range, offset, size, memory.memory()?, memory_offset)?)
    })
}

/// Undoes the mappings that make up exactly these addresses.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for size 0, or addresses that cut a mapping or have none; -ERANGE when they do not lie inside;
/// -EOPNOTSUPP without a GPU; those of the CUDA driver: the mappings before the one that it failed on are gone then.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_range_unmap(range: *mut ringest_vmm_range, offset: usize, size: usize) -> i32 {
    status(|| {
        let mut entered = exclusive(range.cast_const())?;
        let (manager, range) = entered.parts()?;
        Ok(manager.unmap(range, offset, size)?)
    })
}

/// Says who may access the mappings that make up exactly these addresses, and how: count grants. Who is not named keeps
/// what it has; a new mapping starts without access.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for size 0, no grants, grants NULL, a bad grant, or addresses that cut a mapping or have none;
/// -ERANGE when they do not lie inside; -EOPNOTSUPP without a GPU; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_vmm_range_set_access(
    range: *mut ringest_vmm_range,
    offset: usize,
    size: usize,
    grants: *const ringest_vmm_grant,
    count: u32,
) -> i32 {
    status(|| {
        // SAFETY: `count` grants are readable by the C contract.
        let grants = unsafe { elements(grants, count as usize, "grants") }?;
        let mut entered = exclusive(range.cast_const())?;
        let (manager, range) = entered.parts()?;
        let access = grants.iter().map(|grant| {
            options::zero(&[grant.reserved.into()], "ringest_vmm_grant")?;
            Ok((accessor(manager, grant.location, grant.id)?, access(grant.access)?))
        });
        let access = access.collect::<Outcome<Vec<_>>>()?;
        Ok(manager.set_access(range, offset, size, &access)?)
    })
}

fn access(value: u32) -> Outcome<AccessFlags> {
    match value {
        0 => Ok(AccessFlags::None),
        1 => Ok(AccessFlags::Read),
        2 => Ok(AccessFlags::ReadWrite),
        other => Err(Failure::new(libc::EINVAL, format!("access {other}: use enum ringest_vmm_access"))),
    }
}

/// The access (enum ringest_vmm_access) that a location (enum ringest_vmm_location, and which of those) has to the mapping
/// at offset, as the driver says.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for a bad location, or when nothing is mapped there; -ERANGE outside; -EOPNOTSUPP without a
/// GPU; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_range_access(
    range: *const ringest_vmm_range,
    offset: usize,
    location: u32,
    id: u32,
) -> i32 {
    value(|| {
        let entered = shared(range)?;
        let who = accessor(&entered.manager, location, id)?;
        Ok(match entered.manager.access(entered.range()?, offset, who)? {
            AccessFlags::None => ringest_vmm_access::None,
            AccessFlags::Read => ringest_vmm_access::Read,
            AccessFlags::ReadWrite => ringest_vmm_access::ReadWrite,
        } as i64)
    }) as i32
}

/// Returns a new descriptor, the caller's to close: a dma-buf over mappings that make up exactly these addresses, for other
/// drivers to import.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for size 0, or addresses that cut a mapping or have none; -ERANGE when they do not lie inside;
/// -EOPNOTSUPP without a GPU, or when it or the driver cannot; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_range_export_dma_buf(range: *const ringest_vmm_range, offset: usize, size: usize) -> i32 {
    value(|| {
        let entered = shared(range)?;
        Ok(entered.manager.export_dma_buf(entered.range()?, offset, size)?.into_raw_fd().into())
    }) as i32
}

/// Allocates size bytes of physical memory and stores a handle in *out. options may be NULL.
///
/// Any thread. Free with ringest_vmm_memory_free.
///
/// Errors: -EBADF; -EINVAL for size 0 or no multiple of ringest_vmm_granularity, a bad location, unknown flags, or out
/// NULL; -E2BIG for an option struct with unknown fields; -EOPNOTSUPP without a GPU, or for memory that it cannot have;
/// -ENOMEM; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_vmm_alloc_physical(
    vmm: *const ringest_vmm,
    size: usize,
    options: *const ringest_vmm_memory_options,
    out: *mut *mut ringest_vmm_memory,
) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let options = memory_options(options)?;
        store(out, "out", || {
            let manager = shared(vmm)?.clone();
            create::<ringest_vmm_memory>(|| {
                let memory = Some(manager.alloc_physical(size, options)?);
                Ok(MemoryObject { manager, memory })
            })
        })
    })
}

/// Makes physical memory of a descriptor that ringest_vmm_memory_export_fd returned, perhaps in another process, and stores
/// a handle in *out. size is what was allocated. The descriptor stays the caller's.
///
/// Any thread. Free with ringest_vmm_memory_free.
///
/// Errors: -EBADF, also for a negative descriptor; -EINVAL for size 0 or off the granularity, or out NULL; -EOPNOTSUPP
/// without a GPU; those of the CUDA driver, also for a descriptor of another kind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_vmm_import_fd(
    vmm: *const ringest_vmm,
    fd: i32,
    size: usize,
    out: *mut *mut ringest_vmm_memory,
) -> i32 {
    // SAFETY: `out` is null or valid by the C contract; the C caller's descriptor stays open during the call, and one
    // that is not open is refused by the driver.
    status(|| unsafe {
        if fd < 0 {
            return Err(Failure::new(libc::EBADF, format!("descriptor {fd}")));
        }
        store(out, "out", || {
            let manager = shared(vmm)?.clone();
            create::<ringest_vmm_memory>(|| {
                let memory = Some(manager.import_fd(BorrowedFd::borrow_raw(fd), size)?);
                Ok(MemoryObject { manager, memory })
            })
        })
    })
}

/// Frees physical memory.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while it is mapped somewhere; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_memory_free(memory: *mut ringest_vmm_memory) -> i32 {
    status(|| {
        let mut entered = last(memory.cast_const())?;
        if let Some(memory) = entered.memory.take()
            && let Err((memory, error)) = entered.manager.free_physical(memory)
        {
            entered.memory = Some(memory);
            return Err(error.into());
        }
        drop(entered.take());
        Ok(())
    })
}

/// Bytes.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_memory_size(memory: *const ringest_vmm_memory) -> i64 {
    value(|| Ok(shared(memory)?.memory()?.size() as i64))
}

/// 1 while it is mapped somewhere, else 0.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_memory_is_mapped(memory: *const ringest_vmm_memory) -> i32 {
    value(|| Ok(shared(memory)?.memory()?.is_mapped().into())) as i32
}

/// Returns a new descriptor, the caller's to close, for memory that was allocated with RINGEST_VMM_EXPORTABLE, to be sent to
/// another process.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for memory that is not exportable (what was imported is not); those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_vmm_memory_export_fd(memory: *const ringest_vmm_memory) -> i32 {
    value(|| {
        let entered = shared(memory)?;
        Ok(entered.manager.export_fd(entered.memory()?)?.into_raw_fd().into())
    }) as i32
}
