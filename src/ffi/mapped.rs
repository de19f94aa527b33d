//! Mapped memory.

use super::buffer::BufferObject;
use super::gpu::open;
use super::handle::{Family, Table, create, exclusive, last, shared};
use super::options::{self, Options};
use super::{Failure, Outcome, status, store, value};
use crate::memory::{HugePages, MappedBuffer, MappedOptions, Pinned, Pinning};
use std::ffi::c_void;

/// Page-aligned memory that ringest owns and both CPU and GPU address.
///
/// Zeroed at birth and kept out of forked children (MADV_DONTFORK: touching it there is a fault). The memory lives until
/// this handle, every buffer made from it and every read into it is gone.
pub struct ringest_mapped {
    _opaque: (),
}

static TABLE: Table<MappedBuffer<u8>> = Table::new(1, "ringest_mapped");

impl Family for ringest_mapped {
    type Object = MappedBuffer<u8>;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// Values of ringest_mapped_options.huge_pages.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_huge_pages {
    /// Transparent huge pages are asked for when the memory holds at least one.
    Advise = 0,
    /// Base pages only.
    Off = 1,
    /// Pages from the kernel's huge-page pool (2 MiB).
    Require = 2,
}

pub(super) fn huge_pages(value: u32) -> Outcome<HugePages> {
    match value {
        0 => Ok(HugePages::Advise),
        1 => Ok(HugePages::Off),
        2 => Ok(HugePages::Require),
        other => Err(Failure::new(libc::EINVAL, format!("huge_pages {other}: use enum ringest_huge_pages"))),
    }
}

/// Whether and how memory is page-locked, so that GPUs address it.
///
/// Opening a GPU costs time and memory of its own, so none is touched unless it is asked for here.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_pinning {
    /// Plain memory. No GPU can use it; its device address is the host address.
    Off = 0,
    /// Page-locked for the GPU of the thread's current context, or else the first; plain memory where that cannot be had.
    Auto = 1,
    /// Page-locked in place (cuMemHostRegister) for a GPU, or an error.
    Gpu = 2,
    /// Allocated by the driver (cuMemHostAlloc), which takes several times as long and leaves huge pages to it.
    HostAlloc = 3,
}

/// Refuses what is no pinning, without a look at any GPU.
pub(super) fn check_pinning(value: u32, gpu: u32) -> Outcome<()> {
    match (value, gpu) {
        (0 | 1, 0) | (2 | 3, _) => Ok(()),
        (0 | 1, gpu) => Err(Failure::new(libc::EINVAL, format!("gpu {gpu}: this pinning names no GPU, pass 0"))),
        (other, _) => Err(Failure::new(libc::EINVAL, format!("pinning {other}: use enum ringest_pinning"))),
    }
}

pub(super) fn pinning(value: u32, gpu: u32) -> Outcome<Pinning> {
    check_pinning(value, gpu)?;
    Ok(match value {
        0 => Pinning::Off,
        1 => Pinning::Auto,
        2 => Pinning::Gpus(vec![open(gpu)?]),
        _ => Pinning::HostAlloc(vec![open(gpu)?]),
    })
}

/// How mapped memory is allocated. All zero (with size set) means defaults.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_mapped_options {
    /// sizeof(struct ringest_mapped_options).
    pub size: u32,
    /// enum ringest_huge_pages.
    pub huge_pages: u32,
    /// Alignment of the first byte, a power of two; 0: the page size, which is also the least.
    pub alignment: u64,
    /// enum ringest_pinning.
    pub pinning: u32,
    /// The GPU's ordinal, for RINGEST_PINNING_GPU and RINGEST_PINNING_HOST_ALLOC; otherwise 0.
    pub gpu: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

// SAFETY: repr(C), integers only, no padding (4 + 4 + 8 + 4 + 4 + 16), size first.
unsafe impl Options for ringest_mapped_options {}

/// Allocates len bytes and stores a handle in *out. options may be NULL.
///
/// Any thread. Free with ringest_mapped_free.
///
/// Errors: -EINVAL for len 0, a bad alignment or enum value, a GPU where none is used, huge pages of the pool from
/// RINGEST_PINNING_HOST_ALLOC, or out NULL; -ENOMEM; -E2BIG for an option struct with unknown fields. When a GPU is named:
/// -EOPNOTSUPP where there is no driver, or it finds no GPU; -ENODEV for an ordinal beyond ringest_gpu_count; those of the
/// CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_mapped_alloc(
    len: usize,
    options: *const ringest_mapped_options,
    out: *mut *mut ringest_mapped,
) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let options = options::read(options)?;
        options::zero(&options.reserved, "ringest_mapped_options")?;
        check_pinning(options.pinning, options.gpu)?;
        let huge_pages = huge_pages(options.huge_pages)?;
        let alignment = usize::try_from(options.alignment).unwrap_or(usize::MAX);
        store(out, "out", || {
            let options = MappedOptions { alignment, huge_pages, pinning: pinning(options.pinning, options.gpu)? };
            create::<ringest_mapped>(|| Ok(MappedBuffer::alloc_with(len, options)?))
        })
    })
}

/// Gives the handle up. The memory itself goes when the last buffer made from it and the last read into it are gone.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_mapped_free(mapped: *mut ringest_mapped) -> i32 {
    status(|| {
        drop(last(mapped)?.take());
        Ok(())
    })
}

/// Bytes.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while another thread frees it.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_mapped_size(mapped: *const ringest_mapped) -> i64 {
    value(|| Ok(shared(mapped)?.byte_size() as i64))
}

/// Stores the host's address of the first byte.
///
/// Any thread. Valid until the memory is gone.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_mapped_host_ptr(mapped: *const ringest_mapped, out: *mut *mut c_void) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(mapped)?.as_host_ptr().cast_mut().cast())) })
}

/// Whether and how the memory is page-locked for GPUs: RINGEST_PINNING_OFF, RINGEST_PINNING_GPU (in place) or
/// RINGEST_PINNING_HOST_ALLOC. What stood in the way of RINGEST_PINNING_AUTO is logged.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_mapped_pinned(mapped: *const ringest_mapped) -> i32 {
    value(|| {
        Ok(match shared(mapped)?.pinned() {
            Pinned::No { .. } => ringest_pinning::Off,
            Pinned::Registered => ringest_pinning::Gpu,
            Pinned::HostAlloc => ringest_pinning::HostAlloc,
        } as i64)
    }) as i32
}

/// Stores the address of the first byte on a GPU, by its ordinal: page-locked memory has one on every GPU.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL; -EOPNOTSUPP for plain memory, where there is no driver, or it finds no GPU;
/// -ENODEV for an ordinal beyond ringest_gpu_count; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_mapped_device_ptr_on(mapped: *const ringest_mapped, gpu: u32, out: *mut u64) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            let entered = shared(mapped)?;
            Ok(entered.as_device_ptr_on(&open(gpu)?)?)
        })
    })
}

/// Stores the device's address of the first byte: that of the GPU it is page-locked for; of plain memory, the host's address,
/// which no GPU can use.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_mapped_device_ptr(mapped: *const ringest_mapped, out: *mut u64) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(mapped)?.as_device_ptr())) })
}

/// Makes a buffer over the whole memory, for streams to read into, and stores its handle in *out.
///
/// Any thread. Release with ringest_buffer_release.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_mapped_share(
    mapped: *mut ringest_mapped,
    out: *mut *mut super::buffer::ringest_buffer,
) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || create(|| Ok(BufferObject::first(exclusive(mapped)?.share())))) })
}
