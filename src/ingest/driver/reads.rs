//! What the driver needs of the stream below: the real one, or the simulator's.

use crate::error::Result;
use crate::uring::{AsyncUringStream, Completion, FileRef, StreamStats};
use std::time::Duration;

/// A read into a slot.
#[derive(Debug)]
pub(crate) struct SlotRead {
    /// As `resolve` gave it.
    pub(crate) file: FileRef,
    pub(crate) file_offset: u64,
    /// In the slots.
    pub(crate) offset: usize,
    pub(crate) len: usize,
    /// Bytes at the end that may be missing.
    pub(crate) slack: u32,
    /// What its completion carries.
    pub(crate) user_data: u64,
}

/// Reads in flight, in any order.
pub(crate) trait Reads {
    /// What a file is now: a registered one is looked up in the ring's table.
    fn resolve(&self, file: FileRef) -> Result<FileRef>;
    /// A request that is not submitted yet starts (1) or stops (-1) to depend on a file.
    fn count_user(&mut self, file: &FileRef, change: i32);
    /// Queues a read into the slots; returns its number.
    fn submit(&mut self, read: SlotRead) -> Result<u64>;
    /// Submits what is queued, waits until `min` reads have ended or for `timeout`, and hands over those that have. A
    /// failed one is given up: nothing waits for it. `each` can ask for the time.
    fn turn(
        &mut self,
        min: usize,
        timeout: Option<Duration>,
        each: impl FnMut(&Completion, &dyn Fn() -> Duration),
    ) -> Result<()>;
    /// Asks for a read to be cancelled.
    fn cancel(&mut self, number: u64);
    /// Reads that have not ended.
    fn in_flight(&self) -> usize;
    /// Monotonic time.
    fn now(&self) -> Duration;
    /// Lets time pass.
    fn pause(&mut self, time: Duration);
    /// What was done so far.
    fn stats(&self) -> StreamStats;
}

impl Reads for AsyncUringStream<'_> {
    #[inline]
    fn resolve(&self, file: FileRef) -> Result<FileRef> {
        AsyncUringStream::resolve(self, file)
    }

    fn count_user(&mut self, file: &FileRef, change: i32) {
        AsyncUringStream::count_user(self, file, change);
    }

    #[inline]
    fn submit(&mut self, read: SlotRead) -> Result<u64> {
        let SlotRead { file, file_offset, offset, len, slack, user_data } = read;
        self.submit_resolved(file, file_offset, offset, len, slack, user_data)
    }

    #[inline]
    fn turn(
        &mut self,
        min: usize,
        timeout: Option<Duration>,
        each: impl FnMut(&Completion, &dyn Fn() -> Duration),
    ) -> Result<()> {
        AsyncUringStream::turn(self, min, timeout, each)
    }

    fn cancel(&mut self, number: u64) {
        // It may have ended meanwhile.
        let _ = AsyncUringStream::cancel(self, number);
    }

    #[inline]
    fn in_flight(&self) -> usize {
        self.inflight()
    }

    #[inline]
    fn now(&self) -> Duration {
        AsyncUringStream::now(self)
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    fn stats(&self) -> StreamStats {
        AsyncUringStream::stats(self)
    }
}
