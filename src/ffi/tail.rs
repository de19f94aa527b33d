//! Tail lines.

use super::buffer::ringest_buffer;
use super::handle::{Family, Table, create, last, shared};
use super::{status, store};
use crate::uring::TailLine;
use crate::wire::TailLineLayout;

/// A tail line: the words by which a consumer follows a stream, learns of failure, and of the end.
///
/// The memory lives until this handle is freed and the stream that publishes to it is closed.
pub struct ringest_tail_line {
    _opaque: (),
}

static TABLE: Table<TailLine> = Table::new(4, "ringest_tail_line");

impl Family for ringest_tail_line {
    type Object = TailLine;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// Allocates a tail line in memory of its own and stores a handle in *out.
///
/// Any thread. Free with ringest_tail_line_free.
///
/// Errors: -ENOMEM; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_tail_line_alloc(out: *mut *mut ringest_tail_line) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || create::<ringest_tail_line>(|| Ok(TailLine::alloc()?))) })
}

/// Places a tail line at offset (a multiple of 128 bytes in memory) of a buffer and stores a handle in *out. Nothing else
/// may write to these 128 bytes while the line is in use.
///
/// Any thread. Free with ringest_tail_line_free; the buffer's handle may be released before.
///
/// Errors: -EBADF; -ERANGE outside the buffer; -EINVAL when not aligned or out is NULL; -EOPNOTSUPP for device memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_tail_line_in_buffer(
    buffer: *const ringest_buffer,
    offset: usize,
    out: *mut *mut ringest_tail_line,
) -> i32 {
    // SAFETY: the C caller keeps other writers away from the line; `out` is null or valid.
    status(|| unsafe {
        store(out, "out", || create::<ringest_tail_line>(|| Ok(TailLine::in_buffer(&*shared(buffer)?, offset)?)))
    })
}

/// Gives the handle up.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_tail_line_free(line: *mut ringest_tail_line) -> i32 {
    status(|| {
        drop(last(line)?.take());
        Ok(())
    })
}

/// Stores the address of the words in this process.
///
/// Any thread. Valid until the handle is freed and its stream closed.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_tail_line_host_ptr(
    line: *const ringest_tail_line,
    out: *mut *const TailLineLayout,
) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(std::ptr::from_ref(shared(line)?.words()).cast())) })
}

/// Stores the device's address of the words; 0 when no GPU maps them.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_tail_line_device_ptr(line: *const ringest_tail_line, out: *mut u64) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(line)?.as_device_ptr().unwrap_or(0))) })
}
