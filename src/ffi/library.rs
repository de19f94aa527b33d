//! The library as a whole: version, errors, leaks.

use super::{elements, last_error, status};
use crate::uring::{ReadPath, leak_stats};
use std::ffi::{c_char, c_void};

/// The version of the library that is loaded, as text: `RINGEST_VERSION_STRING` of the header it was built with.
///
/// Any thread. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_version() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    TEXT.as_ptr().cast()
}

/// The message of the last call on this thread that failed: what was tried, with which values, why it failed, and what
/// to do. Messages are for people and may change; the errno of each call is stable.
///
/// Valid until the next failing call on this thread. Never NULL; empty when nothing has failed.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_last_error() -> *const c_char {
    last_error()
}

/// What a process has leaked because the kernel never gave it back.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_leaks {
    /// Rings leaked.
    pub rings: u64,
    /// Reads that were in flight then.
    pub reads: u64,
    /// Bytes those reads may still write, and those of the io_queues.
    pub bytes: u64,
    /// io_queues whose memory was leaked because consumers might still use it.
    pub queues: u64,
}

/// Stores what this process has leaked so far.
///
/// Any thread.
///
/// Errors: -EINVAL when stats is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_leak_stats(stats: *mut ringest_leaks) -> i32 {
    // SAFETY: `stats` is null or valid by the C contract.
    status(|| unsafe {
        super::store(stats, "stats", || {
            let leaked = leak_stats();
            Ok(ringest_leaks { rings: leaked.rings, reads: leaked.reads, bytes: leaked.bytes, queues: leaked.queues })
        })
    })
}

/// How bytes really got into memory: the path of a completion.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_read_path {
    /// No command was needed (a read of 0 bytes), or none succeeded.
    None = 0,
    /// Every command wrote to memory registered with the ring.
    RegisteredRead = 1,
    /// At least one command wrote to memory that the kernel pinned for it.
    PlainRead = 2,
}

const _: () = {
    assert!(ringest_read_path::None as u16 == ReadPath::None as u16);
    assert!(ringest_read_path::RegisteredRead as u16 == ReadPath::RegisteredRead as u16);
    assert!(ringest_read_path::PlainRead as u16 == ReadPath::PlainRead as u16);
};

/// A short name for a path (enum ringest_read_path), for logs and reports; "unknown" for other values.
///
/// Any thread. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_read_path_name(path: u32) -> *const c_char {
    let name = match path {
        0 => c"none",
        1 => c"registered read",
        2 => c"plain read",
        _ => c"unknown",
    };
    name.as_ptr()
}

/// CRC32C (Castagnoli) of len bytes at data, continuing from crc; start with 0. What ringest's own checks use.
///
/// Any thread.
///
/// Errors: -EINVAL when data is NULL and len is not 0, or result is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_crc32c(crc: u32, data: *const c_void, len: usize, result: *mut u32) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let bytes = elements(data.cast::<u8>(), len, "data")?;
        super::store(result, "result", || Ok(crc32c::crc32c_append(crc, bytes)))
    })
}
