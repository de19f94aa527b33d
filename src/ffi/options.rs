//! Option structs that can grow: the rule of `clone3(2)` and `openat2(2)`.

use super::{Failure, Outcome};
use std::ffi::c_void;
use std::time::Duration;

/// Largest option struct that is looked at.
const LARGEST: u32 = 4096;

/// A `repr(C)` struct whose first field is `size: u32` and for which all-zero bytes mean "all defaults".
///
/// # Safety
/// Every bit pattern is a value, there is no padding, and the first field is the size.
pub(super) unsafe trait Options: Copy + Default {}

/// Reads an option struct of the caller's size: NULL means defaults, a short one is extended with zeros, a longer one
/// may only have zeros where this version of ringest knows no field.
///
/// # Safety
/// `pointer` is null or points to as many readable bytes as its first four, a `uint32_t`, say.
pub(super) unsafe fn read<T: Options>(pointer: *const T) -> Outcome<T> {
    let mut options = T::default();
    if pointer.is_null() {
        return Ok(options);
    }
    // SAFETY: by contract at least the size field is readable. Unaligned: C callers may have packed it.
    let size = unsafe { pointer.cast::<u32>().read_unaligned() };
    if (size as usize) < size_of::<u32>() {
        return Err(Failure::new(libc::EINVAL, format!("option struct of size {size}: set size to sizeof(struct)")));
    }
    if size > LARGEST {
        return Err(Failure::new(libc::E2BIG, format!("option struct of {size} bytes: set size to sizeof(struct)")));
    }
    let size = size as usize;
    let known = size.min(size_of::<T>());
    // SAFETY: `size` bytes are readable by contract; every bit pattern of `T` is a value, and `options` is one.
    let tail_is_zero = unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut options).cast::<u8>(), known);
        let base = pointer.cast::<u8>();
        (known..size).all(|at| base.add(at).read() == 0)
    };
    if tail_is_zero {
        return Ok(options);
    }
    Err(Failure::new(
        libc::E2BIG,
        format!("option struct of {size} bytes has fields this version does not know (it knows {known})"),
    ))
}

/// Refuses flag bits that have no meaning.
pub(super) fn known_flags(flags: u32, known: u32) -> Outcome<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Failure::new(libc::EINVAL, format!("unknown flag bits {unknown:#x}"))),
    }
}

/// Refuses values in fields that must be zero.
pub(super) fn zero(reserved: &[u64], name: &str) -> Outcome<()> {
    if reserved.iter().all(|&word| word == 0) {
        return Ok(());
    }
    Err(Failure::new(libc::EINVAL, format!("reserved fields of {name} must be 0")))
}

/// Nanoseconds of an option, 0 for its default.
pub(super) fn time(ns: u64, default: Duration) -> Duration {
    if ns == 0 { default } else { Duration::from_nanos(ns) }
}

/// Retries of an option: 0 stands for the default, unless a flag says that there are none.
pub(super) fn retries(none: bool, retries: u32, default: u8) -> Outcome<u8> {
    match (none, retries) {
        (true, _) => Ok(0),
        (false, 0) => Ok(default),
        (false, retries) => u8::try_from(retries)
            .map_err(|_| Failure::new(libc::EINVAL, format!("max_retries {retries}: use at most 255"))),
    }
}

/// How long a call may wait: without limit when negative.
pub(super) fn timeout(ns: i64) -> Option<Duration> {
    u64::try_from(ns).ok().map(Duration::from_nanos)
}

/// Longer than anybody waits, and no problem for a `timespec`.
pub(super) const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// A pointer that C hands to a callback.
#[derive(Clone, Copy)]
pub(super) struct UserPointer(pub(super) *mut c_void);

// SAFETY: ringest only passes the value on; the C caller vouches for its use on other threads.
unsafe impl Send for UserPointer {}
// SAFETY: as for Send.
unsafe impl Sync for UserPointer {}
