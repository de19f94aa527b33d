//! Files.

use super::handle::{Family, Table, create, last, shared};
use super::{Failure, Outcome, status, store, value};
use crate::uring::{DirectMode, InputFile};
use std::ffi::{CStr, OsStr, c_char};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;

/// An open regular file or block device, with its size and O_DIRECT alignment.
///
/// Reads that were submitted keep the file open; the handle may be closed right after.
pub struct ringest_file {
    _opaque: (),
}

static TABLE: Table<InputFile> = Table::new(3, "ringest_file");

impl Family for ringest_file {
    type Object = InputFile;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// Whether a file is read around the page cache.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_direct {
    /// O_DIRECT where the file system has it, buffered otherwise.
    Auto = 0,
    /// O_DIRECT or an error.
    On = 1,
    /// Through the page cache.
    Off = 2,
}

fn mode(direct: u32) -> Outcome<DirectMode> {
    match direct {
        0 => Ok(DirectMode::Auto),
        1 => Ok(DirectMode::On),
        2 => Ok(DirectMode::Off),
        other => Err(Failure::new(libc::EINVAL, format!("direct {other}: use enum ringest_direct"))),
    }
}

/// Opens a file by path and stores a handle in *out. direct is an enum ringest_direct.
///
/// Any thread. Close with ringest_file_close.
///
/// Errors: those of open(2); -EISDIR for a directory; -ESPIPE for a FIFO, socket or character device, which are not
/// opened, so nothing blocks; -EOPNOTSUPP when O_DIRECT is demanded and the file system has none; -EINVAL for a NULL
/// path, a bad mode or out NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_file_open(path: *const c_char, direct: u32, out: *mut *mut ringest_file) -> i32 {
    status(|| {
        if path.is_null() {
            return Err(Failure::new(libc::EINVAL, "path is NULL"));
        }
        // SAFETY: not null, so a NUL-terminated string by the C contract.
        let path = OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes());
        let mode = mode(direct)?;
        // SAFETY: `out` is null or valid by the C contract.
        unsafe { store(out, "out", || create::<ringest_file>(|| Ok(InputFile::open(path, mode)?))) }
    })
}

/// Opens the file behind a descriptor once more and stores a handle in *out. The descriptor and its flags are not
/// touched; it may be closed afterwards.
///
/// Any thread. Close with ringest_file_close.
///
/// Errors: -EBADF for a bad descriptor; otherwise as ringest_file_open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_file_from_fd(fd: i32, direct: u32, out: *mut *mut ringest_file) -> i32 {
    status(|| {
        if fd < 0 {
            return Err(Failure::new(libc::EBADF, format!("descriptor {fd}")));
        }
        let mode = mode(direct)?;
        // SAFETY: the C caller passes a descriptor that stays open during the call; a bad one makes fstat fail.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // SAFETY: `out` is null or valid by the C contract.
        unsafe { store(out, "out", || create::<ringest_file>(|| Ok(InputFile::from_fd(fd, mode)?))) }
    })
}

/// Gives the handle up. The file stays open for reads that were submitted.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_file_close(file: *mut ringest_file) -> i32 {
    status(|| {
        drop(last(file)?.take());
        Ok(())
    })
}

/// Bytes in the file when it was opened.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_file_size(file: *const ringest_file) -> i64 {
    value(|| Ok(i64::try_from(shared(file)?.len()).unwrap_or(i64::MAX)))
}

/// 1 when the file is read with O_DIRECT, 0 when through the page cache. Stores the alignment that O_DIRECT reads need to
/// avoid the bounce buffer, in bytes: of memory, and of offset and length; 0 each when buffered. Either may be NULL.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_file_direct(file: *const ringest_file, memory: *mut u32, offset: *mut u32) -> i32 {
    value(|| {
        let direct = shared(file)?.direct();
        let alignment = direct.map_or((0, 0), |alignment| (alignment.memory, alignment.offset));
        for (place, value) in [(memory, alignment.0), (offset, alignment.1)] {
            if !place.is_null() {
                // SAFETY: not null, so valid by the C contract.
                unsafe { place.write(value) };
            }
        }
        Ok(i64::from(direct.is_some()))
    }) as i32
}
