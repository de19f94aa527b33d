//! Publication: the words by which a consumer learns what is in place.

use crate::error::{PipelineError, Result};
use crate::memory::{GpuMappedBuffer, MappedBuffer, MemoryKind, Region};
use crate::wire::{NO_SEQUENCE, TailLineWords, state};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A [`TailLineWords`] in memory that host and device see: tail, first_bad, state, error, end.
///
/// A bare tail word cannot tell a waiting consumer that its data will never come. This line can: the consumer checks
/// `first_bad` and `state` while it waits. Cheap to clone; the memory lives until the last clone is gone.
#[derive(Debug, Clone)]
pub struct TailLine {
    region: Arc<Region>,
    offset: usize,
}

impl TailLine {
    /// A line in memory of its own.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn alloc() -> Result<Self> {
        let buffer = MappedBuffer::<u8>::alloc(size_of::<TailLineWords>())?;
        // SAFETY: the memory is fresh, so nothing else writes to the line.
        unsafe { Self::in_buffer(&GpuMappedBuffer::from(buffer), 0) }
    }

    /// A line inside a buffer, at a multiple of 128 bytes. The words are reset, and again by a stream that publishes to
    /// it.
    ///
    /// # Safety
    /// While the line is in use nothing else writes to these 128 bytes: no read is submitted into them, and no host
    /// slice of the buffer is made.
    ///
    /// # Errors
    /// `ERANGE` outside the buffer, `EINVAL` when not aligned, `EOPNOTSUPP` for memory the CPU cannot address.
    pub unsafe fn in_buffer(buffer: &GpuMappedBuffer<'static>, offset: usize) -> Result<Self> {
        let size = size_of::<TailLineWords>();
        PipelineError::check_range("tail line in a buffer", offset as u64, size as u64, buffer.len() as u64)?;
        if buffer.kind() != MemoryKind::HostVisible {
            return Err(PipelineError::unsupported("a tail line in device memory", "use host-visible memory"));
        }
        let offset = buffer.span().start + offset;
        let line = Self { region: Arc::clone(buffer.region()), offset };
        if !line.region.address(offset).is_multiple_of(align_of::<TailLineWords>() as u64) {
            return Err(PipelineError::invalid(format!("tail line at offset {offset}"), "align it to 128 bytes"));
        }
        line.words().reset();
        Ok(line)
    }

    /// The words, for a consumer on the host.
    #[must_use]
    pub fn words(&self) -> &TailLineWords {
        // SAFETY: `in_buffer` checked range and alignment, the region lives as long as `self`, every bit pattern is a
        // valid line, and all fields are atomics.
        unsafe { self.region.base().add(self.offset).cast::<TailLineWords>().as_ref() }
    }

    /// The device's address of the line; `None` when no GPU maps it.
    #[must_use]
    pub fn as_device_ptr(&self) -> Option<u64> {
        self.region.device_address(self.offset)
    }
}

/// Where a stream publishes its tail: the number of submissions, from the first on, whose every byte is in place.
#[derive(Debug, Clone)]
pub enum TailWord<'a> {
    /// 32 bits: the tail modulo 2^32. Consumers compare by wrapping subtraction.
    U32(&'a AtomicU32),
    /// 64 bits, never wraps.
    U64(&'a AtomicU64),
    /// A whole line, which also tells of failure and end.
    Line(TailLine),
    /// Nowhere: the stream's user takes every completion and publishes by itself.
    None,
}

impl<'a> From<&'a AtomicU32> for TailWord<'a> {
    fn from(word: &'a AtomicU32) -> Self {
        Self::U32(word)
    }
}

impl<'a> From<&'a AtomicU64> for TailWord<'a> {
    fn from(word: &'a AtomicU64) -> Self {
        Self::U64(word)
    }
}

impl From<TailLine> for TailWord<'_> {
    fn from(line: TailLine) -> Self {
        Self::Line(line)
    }
}

impl TailWord<'_> {
    /// Whether consumers can be told of failure.
    pub(super) fn tells_of_failure(&self) -> bool {
        matches!(self, Self::Line(_))
    }

    /// Starts over: nothing submitted, nothing bad.
    pub(super) fn open(&self) {
        match self {
            Self::Line(line) => line.words().reset(),
            word => word.publish(0),
        }
    }

    /// Publishes the tail.
    ///
    /// Release: the bytes of every submission below `tail` are in place before it. The kernel (or a device) wrote them
    /// before it stored the CQ tail by release, which the reaping thread, the caller, loaded by acquire; bytes that
    /// came through the bounce buffer were copied by this thread. A consumer that loads the tail by acquire therefore
    /// sees them all. There is one writer: the stream.
    #[inline]
    pub(super) fn publish(&self, tail: u64) {
        match self {
            Self::U32(word) => word.store(tail as u32, Ordering::Release),
            Self::U64(word) => word.store(tail, Ordering::Release),
            Self::Line(line) => line.words().tail.store(tail, Ordering::Release),
            Self::None => {}
        }
    }

    /// Announces the lowest submission that failed or was skipped (`None`: there is none), and its errno.
    ///
    /// Stored before the tail may cross a skipped submission: a consumer that sees the tail beyond it (acquire) sees
    /// `first_bad` too.
    pub(super) fn publish_bad(&self, bad: Option<(u64, i32)>) {
        if let Self::Line(line) = self {
            let words = line.words();
            if let Some((_, errno)) = bad {
                words.error.store(-errno, Ordering::Relaxed);
            }
            words.first_bad.store(bad.map_or(NO_SEQUENCE, |(sequence, _)| sequence), Ordering::Release);
        }
    }

    /// Announces that no submission follows `end`. `end` and `error` are stored before `state`.
    pub(super) fn publish_end(&self, end: u64) {
        if let Self::Line(line) = self {
            line.words().end.store(end, Ordering::Relaxed);
            line.words().state.store(state::END, Ordering::Release);
        }
    }

    /// Announces that the stream gave up with this errno.
    pub(super) fn publish_abort(&self, end: u64, errno: i32) {
        if let Self::Line(line) = self {
            let words = line.words();
            words.end.store(end, Ordering::Relaxed);
            if words.first_bad.load(Ordering::Relaxed) == NO_SEQUENCE {
                words.error.store(-errno, Ordering::Relaxed);
            }
            words.state.store(state::ABORTED, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_checked_and_reset() {
        let buffer = GpuMappedBuffer::from(MappedBuffer::<u8>::alloc(4096).unwrap());
        // SAFETY: nothing else writes to the buffer.
        unsafe {
            assert_eq!(TailLine::in_buffer(&buffer, 4096).unwrap_err().errno(), libc::ERANGE);
            assert_eq!(TailLine::in_buffer(&buffer, 64).unwrap_err().errno(), libc::EINVAL);
            let line = TailLine::in_buffer(&buffer, 128).unwrap();
            TailWord::from(line.clone()).open();
            assert_eq!(line.as_device_ptr(), buffer.as_device_ptr().map(|device| device + 128));
            assert_eq!(line.words().first_bad.load(Ordering::Relaxed), NO_SEQUENCE);
        }
    }

    #[test]
    fn the_u32_view_wraps() {
        let word = AtomicU32::new(0);
        let tail = TailWord::from(&word);
        tail.publish(u64::from(u32::MAX));
        assert_eq!(word.load(Ordering::Relaxed), u32::MAX);
        tail.publish(u64::from(u32::MAX) + 3);
        assert_eq!(word.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn end_error_and_state() {
        let line = TailLine::alloc().unwrap();
        let tail = TailWord::from(line.clone());
        tail.open();
        tail.publish_bad(Some((7, libc::EIO)));
        assert_eq!(line.words().first_bad.load(Ordering::Acquire), 7);
        assert_eq!(line.words().error.load(Ordering::Relaxed), -libc::EIO);
        tail.publish_bad(None);
        tail.publish_end(9);
        assert_eq!(line.words().state.load(Ordering::Acquire), state::END);
        assert_eq!(line.words().end.load(Ordering::Relaxed), 9);
        tail.publish_abort(9, libc::ECANCELED);
        assert_eq!(line.words().error.load(Ordering::Relaxed), -libc::ECANCELED);
    }
}
