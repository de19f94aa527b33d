//! Mapped memory.

use super::buffer::BufferObject;
use super::handle::{Family, Table, create, exclusive, last, shared};
use super::options::{self, Options};
use super::{Failure, Outcome, status, store, value};
use crate::memory::{HugePages, MappedBuffer, MappedOptions};
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
}

// SAFETY: repr(C), integers only, no padding (4 + 4 + 8), size first.
unsafe impl Options for ringest_mapped_options {}

/// Allocates len bytes and stores a handle in *out. options may be NULL.
///
/// Any thread. Free with ringest_mapped_free.
///
/// Errors: -EINVAL for len 0, a bad alignment or enum value, or out NULL; -ENOMEM; -E2BIG for an option struct with
/// unknown fields.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_mapped_alloc(
    len: usize,
    options: *const ringest_mapped_options,
    out: *mut *mut ringest_mapped,
) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let options = options::read(options)?;
        let huge_pages = huge_pages(options.huge_pages)?;
        let alignment = usize::try_from(options.alignment).unwrap_or(usize::MAX);
        let options = MappedOptions { alignment, huge_pages, ..MappedOptions::default() };
        store(out, "out", || create::<ringest_mapped>(|| Ok(MappedBuffer::alloc_with(len, options)?)))
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

/// Stores the device's address of the first byte. Without a GPU driver it equals the host's.
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
