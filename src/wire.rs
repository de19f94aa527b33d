//! Words shared with consumers on the device: the only place their layout is written.

use std::mem::offset_of;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

/// "No sequence number": what `first_bad` holds while nothing has failed.
pub const NO_SEQUENCE: u64 = u64::MAX;

/// Values of a state word.
pub mod state {
    /// Submissions may follow.
    pub const OPEN: u32 = 0;
    /// No submission follows `end`.
    pub const END: u32 = 1;
    /// The producer gave up; `error` says why.
    pub const ABORTED: u32 = 2;
}

/// A stream's tail line: one cache line pair, little-endian, written by the stream alone.
///
/// A consumer that waits for submission n loads `tail` (acquire). While it is ≤ n the consumer looks at `first_bad`
/// (≤ n: it may never come) and `state`. When it is > n the data is in place unless `first_bad` ≤ n, loaded after.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct TailLineWords {
    /// Submissions, from the first on, whose every byte is in place (or that were skipped).
    pub tail: AtomicU64,
    /// Lowest submission that failed or was skipped; [`NO_SEQUENCE`] when there is none. Withdrawn when a failed
    /// submission succeeds on resubmission; final once it was skipped.
    pub first_bad: AtomicU64,
    /// One of [`state`].
    pub state: AtomicU32,
    /// -errno of `first_bad` while there is one, or of an abort.
    pub error: AtomicI32,
    /// Number of submissions; valid once `state` is not OPEN.
    pub end: AtomicU64,
    reserved: [AtomicU64; 12],
}

const _: () = {
    assert!(size_of::<TailLineWords>() == 128 && align_of::<TailLineWords>() == 128);
    assert!(offset_of!(TailLineWords, tail) == 0);
    assert!(offset_of!(TailLineWords, first_bad) == 8);
    assert!(offset_of!(TailLineWords, state) == 16);
    assert!(offset_of!(TailLineWords, error) == 20);
    assert!(offset_of!(TailLineWords, end) == 24);
};

impl TailLineWords {
    /// Empty and open. Only before a consumer looks at it.
    pub(crate) fn reset(&self) {
        self.tail.store(0, Ordering::Relaxed);
        self.end.store(0, Ordering::Relaxed);
        self.error.store(0, Ordering::Relaxed);
        self.first_bad.store(NO_SEQUENCE, Ordering::Relaxed);
        self.state.store(state::OPEN, Ordering::Release);
    }
}
