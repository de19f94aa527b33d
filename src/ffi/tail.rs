//! Tail lines.

use super::buffer::ringest_buffer;
use super::handle::{Family, Table, create, last, shared};
use super::{status, store};
use crate::uring::TailLine;
use crate::wire::TailLineWords;
use std::mem::offset_of;

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

/// The words of a tail line, 128 bytes at a multiple of 128. Written by the stream alone; read them atomically.
///
/// A consumer that waits for submission n loads tail (acquire). While it is <= n the consumer looks at first_bad (<= n:
/// it may never come) and state. When it is > n the data is in place, unless first_bad, loaded after, is <= n.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_tail_line_words {
    /// Submissions, from the first on, whose every byte is in place (or that were skipped).
    pub tail: u64,
    /// Lowest submission that failed or was skipped; UINT64_MAX when there is none. Withdrawn when a failed submission
    /// succeeds on resubmission; final once it was skipped.
    pub first_bad: u64,
    /// enum ringest_state.
    pub state: u32,
    /// -errno of first_bad while there is one, or of an abort.
    pub error: i32,
    /// Number of submissions; valid once state is not RINGEST_STATE_OPEN.
    pub end: u64,
    /// Zero.
    pub reserved: [u64; 12],
}

/// Values of a state word.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_state {
    /// Submissions may follow.
    Open = 0,
    /// No submission follows `end`.
    End = 1,
    /// The producer gave up; `error` says why.
    Aborted = 2,
}

const _: () = {
    use crate::wire::state;
    assert!(size_of::<ringest_tail_line_words>() == size_of::<TailLineWords>());
    assert!(offset_of!(ringest_tail_line_words, tail) == offset_of!(TailLineWords, tail));
    assert!(offset_of!(ringest_tail_line_words, first_bad) == offset_of!(TailLineWords, first_bad));
    assert!(offset_of!(ringest_tail_line_words, state) == offset_of!(TailLineWords, state));
    assert!(offset_of!(ringest_tail_line_words, error) == offset_of!(TailLineWords, error));
    assert!(offset_of!(ringest_tail_line_words, end) == offset_of!(TailLineWords, end));
    assert!(ringest_state::Open as u32 == state::OPEN);
    assert!(ringest_state::End as u32 == state::END);
    assert!(ringest_state::Aborted as u32 == state::ABORTED);
};

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
    out: *mut *const ringest_tail_line_words,
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
