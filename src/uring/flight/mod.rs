//! The record of what is in flight: plans each submission's commands, decides what every completion means, and counts
//! the tail.
//!
//! Generic over the [`Queue`] and free of `unsafe`, so the kernel and the simulator run the same code.
//!
//! Submission n lives in `window[n % window]` from its submit until its completion has been taken *and* the tail has
//! passed it. Completions come in any order; `finished` keeps theirs. The tail counts the prefix of submissions that
//! are whole (or were skipped); a failed one holds it until it is resubmitted or skipped.

mod complete;
mod drive;
mod launch;
mod record;

pub use record::{Completion, ReadPath, StreamStats};

use super::file::FileRef;
use super::queue::{Command, Op, Queue, Target};
use super::tail::TailWord;
use crate::error::{PipelineError, Result};
use crate::sys::Errno;
use record::{Record, State};
use std::collections::VecDeque;
use std::time::Duration;

/// Most ranges of one scatter read (IOV_MAX).
pub(crate) const MAX_SEGMENTS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlightOptions {
    /// Most submissions in flight.
    pub(crate) depth: u32,
    /// Most submissions between the tail (or the oldest completion not taken) and the newest; a power of two.
    pub(crate) window: u32,
    /// Retries of one command after EINTR or EAGAIN without progress.
    pub(crate) max_retries: u8,
    /// Wait before the first retry; doubles with each.
    pub(crate) backoff: Duration,
    /// Never leave the registered path once the target is registered.
    pub(crate) strict: bool,
    pub(crate) bounce_slots: u16,
    pub(crate) bounce_slot_bytes: usize,
}

/// A range of the target's region: offset, length.
pub(crate) type Segment = (usize, usize);

/// A read to submit. The caller has checked that the segments lie in the target.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) file: FileRef,
    pub(crate) file_offset: u64,
    /// `None`: the flight's home.
    pub(crate) target: Option<Target>,
    pub(crate) segments: &'a [Segment],
    /// For the record.
    pub(crate) buffer_offset: u64,
    pub(crate) user_data: u64,
    /// Bytes at the end that nobody misses: a read that is short by no more is whole. Only for one range, of whole
    /// blocks if the file is O_DIRECT.
    pub(crate) slack: u32,
}

struct Bounce {
    pool: Target,
    slot_bytes: usize,
    free: Vec<u16>,
}

/// What an op without a command holds.
const NO_COMMAND: Command = Command::Direct { len: 0, slot: None };

/// See the module's text.
pub(crate) struct Flight<'a, Q> {
    pub(crate) queue: Q,
    options: FlightOptions,
    tail_word: TailWord<'a>,
    /// Where reads go unless they say otherwise.
    home: Target,
    window: Box<[Record]>,
    /// Lowest sequence whose record is still needed.
    floor: u64,
    /// First sequence the tail does not cover.
    tail: u64,
    /// Next sequence.
    next: u64,
    /// Records in state Flying.
    flying: u32,
    /// Lowest failed sequence, for a tail that tells of it.
    failed: Option<(u64, Errno)>,
    /// Lowest skipped sequence.
    skipped: Option<(u64, Errno)>,
    /// Sequences that ended and whose completion was not taken.
    finished: VecDeque<u64>,
    /// Ops ready for the queue, which had no room.
    pending: VecDeque<Box<Op>>,
    /// Ops waiting for a bounce slot.
    bounce_wait: VecDeque<Box<Op>>,
    /// Ops waiting to be retried, with the time for it.
    sleeping: Vec<(Duration, Box<Op>)>,
    /// Submissions that are cancelled and have not ended; when to ask the kernel again, and after how long after that.
    cancelling: u32,
    ask_at: Duration,
    ask_every: Duration,
    bounce: Option<Bounce>,
    /// Ops at rest, to be used again. Their target is the home, their file none: they keep nothing else alive.
    #[allow(clippy::vec_box, reason = "boxes are what is used again")]
    rest: Vec<Box<Op>>,
    /// Ops made.
    made: usize,
    stats: StreamStats,
}

impl<'a, Q: Queue> Flight<'a, Q> {
    pub(crate) fn new(queue: Q, tail_word: TailWord<'a>, home: Target, options: FlightOptions) -> Self {
        debug_assert!(options.window.is_power_of_two() && options.depth <= options.window);
        tail_word.open();
        Self {
            queue,
            options,
            tail_word,
            home,
            window: std::iter::repeat_with(Record::default).take(options.window as usize).collect(),
            floor: 0,
            tail: 0,
            next: 0,
            flying: 0,
            failed: None,
            skipped: None,
            finished: VecDeque::with_capacity(options.window as usize),
            pending: VecDeque::new(),
            bounce_wait: VecDeque::new(),
            sleeping: Vec::new(),
            cancelling: 0,
            ask_at: Duration::ZERO,
            ask_every: Duration::ZERO,
            bounce: None,
            rest: Vec::new(),
            made: 0,
            stats: StreamStats::default(),
        }
    }

    pub(crate) fn tail(&self) -> u64 {
        self.tail
    }

    pub(crate) fn submitted(&self) -> u64 {
        self.next
    }

    /// Submissions that have not ended.
    pub(crate) fn in_flight(&self) -> u32 {
        self.flying
    }

    /// Completions that can be taken.
    pub(crate) fn ready(&self) -> usize {
        self.finished.len()
    }

    pub(crate) fn stats(&self) -> StreamStats {
        StreamStats { enters: self.queue.enters(), ..self.stats }
    }

    pub(crate) fn options(&self) -> &FlightOptions {
        &self.options
    }

    /// Bytes of bookkeeping, without the queue's and without bounce memory.
    pub(crate) fn footprint(&self) -> usize {
        let lists: usize = self.window.iter().map(|record| record.segments.capacity() * size_of::<Segment>()).sum();
        let boxes = self.pending.capacity() + self.bounce_wait.capacity() + self.rest.capacity();
        size_of::<Self>()
            + self.window.len() * size_of::<Record>()
            + self.finished.capacity() * size_of::<u64>()
            + self.made * size_of::<Op>()
            + boxes * size_of::<Box<Op>>()
            + self.sleeping.capacity() * size_of::<(Duration, Box<Op>)>()
            + lists
    }

    #[inline]
    fn record(&mut self, sequence: u64) -> &mut Record {
        let index = sequence & (self.window.len() as u64 - 1);
        &mut self.window[index as usize]
    }

    // Submitting

    /// Accepts a read and queues its commands; returns its sequence number.
    #[inline]
    pub(crate) fn submit(&mut self, request: Request<'_>) -> Result<u64> {
        self.require_room()?;
        let sequence = self.next;
        self.next += 1;
        let Request { file, file_offset, target, segments, buffer_offset, user_data, slack } = request;
        let record = self.record(sequence);
        record.segments.clear();
        if segments.len() > 1 {
            record.segments.extend_from_slice(segments);
        }
        record.start = segments.first().map_or(0, |&(start, _)| start);
        record.requested = segments.iter().map(|&(_, len)| len as u64).sum();
        record.user_data = user_data;
        record.file_offset = file_offset;
        record.buffer_offset = buffer_offset;
        record.slack = slack;
        self.queue.count_user(&file, 1);
        self.launch(sequence, file, target.as_ref());
        Ok(sequence)
    }

    fn require_depth(&self) -> Result<()> {
        if self.flying >= self.options.depth {
            return Err(PipelineError::QueueFull {
                queue: "the stream",
                fix: format!("poll for completions ({} in flight)", self.flying).into(),
            });
        }
        Ok(())
    }

    fn require_room(&self) -> Result<()> {
        self.require_depth()?;
        if self.next - self.floor >= u64::from(self.options.window) {
            let fix = if self.tail == self.floor && self.failed_at(self.tail) {
                format!("submission {} failed and holds the tail: resubmit or skip it", self.tail)
            } else {
                format!("take completions: submission {} is the oldest not taken or not whole", self.floor)
            };
            return Err(PipelineError::QueueFull { queue: "the stream's window", fix: fix.into() });
        }
        Ok(())
    }

    fn failed_at(&self, sequence: u64) -> bool {
        let index = sequence & (self.window.len() as u64 - 1);
        sequence < self.next && self.window[index as usize].state == State::Failed
    }

    /// Reads a failed submission once more, from its beginning.
    pub(crate) fn resubmit(&mut self, sequence: u64) -> Result<()> {
        self.require_failed(sequence)?;
        self.require_depth()?;
        let Some(retry) = self.record(sequence).retry.take() else {
            unreachable!("a failed submission keeps what it was");
        };
        let (file, target) = *retry;
        // Before it can fail again.
        self.note_change(sequence);
        self.launch(sequence, file, Some(&target));
        Ok(())
    }

    /// Gives a failed submission up: the tail passes it.
    pub(crate) fn skip(&mut self, sequence: u64) -> Result<()> {
        self.require_failed(sequence)?;
        let record = self.record(sequence);
        record.state = State::Skipped;
        let bad = (sequence, record.errno);
        self.forget_retry(sequence);
        if self.skipped.is_none_or(|(lowest, _)| sequence < lowest) {
            self.skipped = Some(bad);
        }
        self.stats.skipped += 1;
        self.note_change(sequence);
        self.advance();
        Ok(())
    }

    /// A failed submission whose completion has been taken.
    fn require_failed(&mut self, sequence: u64) -> Result<()> {
        let known = (self.floor..self.next).contains(&sequence);
        if known && self.record(sequence).state == State::Failed && self.record(sequence).taken {
            return Ok(());
        }
        Err(PipelineError::invalid(
            format!("submission {sequence}"),
            "only a failed submission whose completion was taken can be resubmitted or skipped",
        ))
    }

    /// A failed submission will not be read again.
    fn forget_retry(&mut self, sequence: u64) {
        if let Some(retry) = self.record(sequence).retry.take() {
            self.queue.count_user(&retry.0, -1);
        }
    }
}
