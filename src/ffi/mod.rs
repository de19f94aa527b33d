//! The C ABI: one file per handle family, each export a few lines.
//!
//! Every export takes handles out of a table (`handle`), so a null, stale or foreign handle is `EBADF` and never
//! dereferenced; turns errors into `-errno` and a message for `ringest_last_error`; and stops panics at the boundary.
//! Doc comments of exports are written for the reader of the C header.

#![allow(
    non_camel_case_types,
    // Their documentation is the header's, which speaks of contracts in the C way.
    clippy::missing_safety_doc,
    // Handles are numbers in the shape of pointers; nothing dereferences them.
    clippy::not_unsafe_ptr_arg_deref
)]

pub mod buffer;
pub mod consumer;
pub mod device_buffer;
pub mod driver;
pub mod file;
pub mod gpu;
mod handle;
pub mod io_queue;
pub mod library;
pub mod log;
pub mod mapped;
mod options;
pub mod ring;
pub mod stream;
pub mod tail;
pub mod vmm;

use crate::error::PipelineError;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// An error on its way to C: a positive errno and the message for `ringest_last_error`. Boxed, so that results stay
/// small on the way that succeeds.
#[derive(Debug)]
pub(crate) struct Failure(Box<(i32, String)>);

impl Failure {
    #[cold]
    fn new(errno: i32, message: impl Into<String>) -> Self {
        Self(Box::new((errno, message.into())))
    }

    /// Positive.
    fn errno(&self) -> i32 {
        self.0.0
    }
}

impl From<PipelineError> for Failure {
    fn from(error: PipelineError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

type Outcome<T> = Result<T, Failure>;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

fn set_last_error(message: &str) {
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // A thread that is being torn down has nobody left to read the message.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = message);
}

fn last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs an export's body: a value, or -errno with the message kept. A panic becomes `ENOTRECOVERABLE`.
#[inline(always)]
fn value(body: impl FnOnce() -> Outcome<i64>) -> i64 {
    // Unwind safety: what a panic may leave half done is a table entry, which its guard then marks as poisoned.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(failure)) => report(&failure),
        Err(_) => report(&Failure::new(
            libc::ENOTRECOVERABLE,
            "ringest panicked; this is a bug: the handle used in this call can only be destroyed",
        )),
    }
}

#[cold]
fn report(failure: &Failure) -> i64 {
    set_last_error(&failure.0.1);
    -i64::from(failure.errno())
}

/// Like [`value`], for exports that return 0 or -errno.
#[inline]
fn status(body: impl FnOnce() -> Outcome<()>) -> i32 {
    value(|| body().map(|()| 0)) as i32
}

/// Stores a result through an out pointer.
///
/// # Safety
/// `out` is null or valid for writing a `T`.
unsafe fn store<T>(out: *mut T, name: &str, make: impl FnOnce() -> Outcome<T>) -> Outcome<()> {
    if out.is_null() {
        return Err(Failure::new(libc::EINVAL, format!("{name} is NULL: pass a place for the result")));
    }
    let made = make()?;
    // SAFETY: not null, so valid by contract.
    unsafe { out.write(made) };
    Ok(())
}

/// The `count` elements at `pointer`.
///
/// # Safety
/// `pointer` is valid for reading `count` elements while the slice lives, unless it is null or `count` is 0.
unsafe fn elements<'a, T>(pointer: *const T, count: usize, name: &str) -> Outcome<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(Failure::new(libc::EINVAL, format!("{name} is NULL with a count of {count}")));
    }
    check_count::<T>(count, name)?;
    // SAFETY: not null, so valid by contract.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

fn check_count<T>(count: usize, name: &str) -> Outcome<()> {
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(Failure::new(libc::EINVAL, format!("{name}: a count of {count} exceeds the address space"))),
    }
}
