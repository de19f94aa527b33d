//! The record of what is in flight: plans each submission's commands, decides what every completion means, and counts
//! the tail.
//!
//! Generic over the [`Queue`] and free of `unsafe`, so the kernel and the simulator run the same code.
//!
//! Submission n lives in `window[n % window]` from its submit until its completion has been taken *and* the tail has
//! passed it. Completions come in any order; `finished` keeps theirs. The tail counts the prefix of submissions that
//! are whole (or were skipped); a failed one holds it until it is resubmitted or skipped.

use super::direct::{MAX_COMMAND, Piece, leading_piece, split};
use super::file::{FileRef, direct_alignment};
use super::queue::{BounceSlot, Command, Op, Queue, Reaped, Target};
use super::tail::TailWord;
use crate::error::{PipelineError, Result, read_remedy};
use crate::memory::{MappedBuffer, MemoryKind};
use crate::sys::Errno;
use std::collections::VecDeque;
use std::time::Duration;

/// Most ranges of one scatter read (IOV_MAX).
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// How bytes really got into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u16)]
#[non_exhaustive]
pub enum ReadPath {
    /// No command was needed (a read of 0 bytes), or none succeeded.
    #[default]
    None = 0,
    /// Every command wrote to memory registered with the ring (IORING_OP_READ_FIXED, READV_FIXED).
    RegisteredRead = 1,
    /// At least one command wrote to memory that the kernel pinned for it (IORING_OP_READ, READV).
    PlainRead = 2,
}

impl ReadPath {
    /// A short name, for logs and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::RegisteredRead => "registered read",
            Self::PlainRead => "plain read",
        }
    }

    /// The path of a submission whose parts took both.
    fn and(self, other: Self) -> Self {
        if other as u16 > self as u16 { other } else { self }
    }
}

/// How a submission ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Completion {
    /// The number `submit_*` returned; counts submissions of the stream from 0.
    pub sequence: u64,
    /// The caller's value.
    pub user_data: u64,
    /// Where in the stream's buffer the first byte went.
    pub buffer_offset: u64,
    /// Where in the file it came from.
    pub file_offset: u64,
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes in place. Equals `requested` exactly when `status` is 0; at end of file, the bytes that exist.
    pub bytes: u64,
    /// Of these, bytes that went through the bounce buffer.
    pub bounced: u64,
    /// 0, or -errno: -ENODATA at end of file, -ECANCELED, or the kernel's.
    pub status: i32,
    /// The path that was really taken.
    pub path: ReadPath,
}

impl Completion {
    /// The bytes read, or the error.
    ///
    /// # Errors
    /// What `status` says.
    pub fn result(&self) -> Result<u64> {
        let Self { sequence, file_offset, requested, bytes, status, .. } = *self;
        match -status {
            0 => Ok(bytes),
            libc::ENODATA => Err(PipelineError::EndOfFile { sequence, file_offset, bytes, requested }),
            libc::ECANCELED => Err(PipelineError::Cancelled { sequence, bytes }),
            errno => {
                Err(PipelineError::ReadFailed { sequence, file_offset, requested, errno, fix: read_remedy(errno) })
            }
        }
    }
}

/// What a stream has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamStats {
    /// Submissions accepted, resubmissions included.
    pub submitted: u64,
    /// Submissions that ended whole.
    pub completed: u64,
    /// Submissions that ended otherwise (end of file, error, cancelled).
    pub failed: u64,
    /// Of these, end of file.
    pub end_of_file: u64,
    /// Of these, cancelled.
    pub cancelled: u64,
    /// Submissions given up by `skip`.
    pub skipped: u64,
    /// Bytes put in place.
    pub bytes: u64,
    /// Of these, through registered memory.
    pub registered_bytes: u64,
    /// Of these, through memory pinned per read.
    pub plain_bytes: u64,
    /// Of these, copied from the bounce buffer.
    pub bounced_bytes: u64,
    /// Commands handed to the kernel.
    pub commands: u64,
    /// Commands that read less than asked and were continued.
    pub short_reads: u64,
    /// Commands repeated after EINTR or EAGAIN.
    pub retries: u64,
    /// System calls to submit or wait.
    pub enters: u64,
}

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
    pub(crate) target: Target,
    pub(crate) segments: &'a [Segment],
    /// For the record.
    pub(crate) buffer_offset: u64,
    pub(crate) user_data: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Free,
    Flying,
    Whole,
    Failed,
    Skipped,
}

#[derive(Debug, Default)]
struct Record {
    state: State,
    /// Its completion has been taken.
    taken: bool,
    cancelled: bool,
    path: ReadPath,
    /// Errno of the first part that failed.
    errno: Errno,
    /// Ops not yet ended.
    parts: u32,
    user_data: u64,
    file_offset: u64,
    buffer_offset: u64,
    requested: u64,
    landed: u64,
    bounced: u64,
    /// First range of the target.
    segment: Segment,
    /// All ranges of a scatter read.
    segments: Vec<Segment>,
    /// What a resubmission needs, while failed.
    retry: Option<(FileRef, Target)>,
}

struct Bounce {
    pool: Target,
    slot_bytes: usize,
    free: Vec<u16>,
}

/// See the module's text.
pub(crate) struct Flight<'a, Q> {
    pub(crate) queue: Q,
    options: FlightOptions,
    tail_word: TailWord<'a>,
    window: Box<[Record]>,
    /// Lowest sequence whose record is still needed.
    floor: u64,
    /// First sequence the tail does not cover.
    tail: u64,
    /// Next sequence.
    next: u64,
    /// Records in state Flying.
    flying: u32,
    /// Lowest skipped sequence.
    skipped: Option<(u64, Errno)>,
    /// Sequences that ended and whose completion was not taken.
    finished: VecDeque<u64>,
    /// Ops ready for the queue, which had no room.
    pending: VecDeque<Op>,
    /// Ops waiting for a bounce slot.
    bounce_wait: VecDeque<Op>,
    /// Ops waiting to be retried, with the time for it.
    sleeping: Vec<(Duration, Op)>,
    bounce: Option<Bounce>,
    /// Segment lists to reuse.
    spare: Vec<Vec<Segment>>,
    stats: StreamStats,
}

impl<'a, Q: Queue> Flight<'a, Q> {
    pub(crate) fn new(queue: Q, tail_word: TailWord<'a>, options: FlightOptions) -> Self {
        debug_assert!(options.window.is_power_of_two() && options.depth <= options.window);
        tail_word.open();
        Self {
            queue,
            options,
            tail_word,
            window: std::iter::repeat_with(Record::default).take(options.window as usize).collect(),
            floor: 0,
            tail: 0,
            next: 0,
            flying: 0,
            skipped: None,
            finished: VecDeque::with_capacity(options.window as usize),
            pending: VecDeque::new(),
            bounce_wait: VecDeque::new(),
            sleeping: Vec::new(),
            bounce: None,
            spare: Vec::new(),
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
        self.stats
    }

    pub(crate) fn options(&self) -> &FlightOptions {
        &self.options
    }

    /// Bytes of bookkeeping, without the queue's and without bounce memory.
    pub(crate) fn footprint(&self) -> usize {
        let op = size_of::<Op>();
        let segments = |list: &Vec<Segment>| list.capacity() * size_of::<Segment>();
        let lists: usize = self.window.iter().map(|record| segments(&record.segments)).sum::<usize>()
            + self.spare.iter().map(segments).sum::<usize>();
        size_of::<Self>()
            + self.window.len() * size_of::<Record>()
            + self.finished.capacity() * size_of::<u64>()
            + (self.pending.capacity() + self.bounce_wait.capacity()) * op
            + self.sleeping.capacity() * size_of::<(Duration, Op)>()
            + lists
    }

    fn record(&mut self, sequence: u64) -> &mut Record {
        let index = sequence & (self.window.len() as u64 - 1);
        &mut self.window[index as usize]
    }

    // Submitting

    /// Accepts a read and queues its commands; returns its sequence number.
    pub(crate) fn submit(&mut self, request: Request<'_>) -> Result<u64> {
        self.require_room()?;
        let sequence = self.next;
        self.next += 1;
        let Request { file, file_offset, target, segments, buffer_offset, user_data } = request;
        let record = self.record(sequence);
        let mut list = std::mem::take(&mut record.segments);
        list.clear();
        if segments.len() > 1 {
            list.extend_from_slice(segments);
        }
        *record = Record {
            user_data,
            file_offset,
            buffer_offset,
            requested: segments.iter().map(|&(_, len)| len as u64).sum(),
            segment: segments.first().copied().unwrap_or_default(),
            segments: list,
            ..Record::default()
        };
        self.launch(sequence, file, target);
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
        let record = self.record(sequence);
        let Some((file, target)) = record.retry.take() else {
            return Err(PipelineError::invalid(format!("submission {sequence}"), "its first attempt has not ended"));
        };
        let segments = std::mem::take(&mut record.segments);
        *record = Record {
            user_data: record.user_data,
            file_offset: record.file_offset,
            buffer_offset: record.buffer_offset,
            requested: record.requested,
            segment: record.segment,
            segments,
            ..Record::default()
        };
        self.launch(sequence, file, target);
        self.publish_bad();
        Ok(())
    }

    /// Gives a failed submission up: the tail passes it.
    pub(crate) fn skip(&mut self, sequence: u64) -> Result<()> {
        self.require_failed(sequence)?;
        let record = self.record(sequence);
        record.state = State::Skipped;
        record.retry = None;
        let bad = (sequence, record.errno);
        if self.skipped.is_none_or(|(lowest, _)| sequence < lowest) {
            self.skipped = Some(bad);
        }
        self.stats.skipped += 1;
        self.publish_bad();
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

    fn launch(&mut self, sequence: u64, file: FileRef, target: Target) {
        self.stats.submitted += 1;
        self.flying += 1;
        let record = self.record(sequence);
        record.state = State::Flying;
        let (file_offset, segment) = (record.file_offset, record.segment);
        if record.requested == 0 {
            record.retry = Some((file, target));
            return self.finish(sequence);
        }
        // Holds the record open until every part of it is staged, should the first ones end at once.
        record.parts = 1;
        if record.segments.is_empty() {
            self.launch_range(sequence, &file, file_offset, &target, segment);
        } else {
            self.launch_scatter(sequence, &file, file_offset, &target);
        }
        self.end_part(sequence, file, target);
    }

    fn launch_scatter(&mut self, sequence: u64, file: &FileRef, file_offset: u64, target: &Target) {
        let mut segments = self.spare.pop().unwrap_or_default();
        segments.clear();
        segments.extend_from_slice(&self.record(sequence).segments);
        match self.vectored(file, file_offset, target, &segments) {
            Some(command) => {
                let remaining = segments.iter().map(|&(_, len)| len).sum();
                self.record(sequence).parts += 1;
                self.issue(Op {
                    sequence,
                    direct: file.direct(),
                    file: file.clone(),
                    file_offset,
                    target: target.clone(),
                    target_offset: 0,
                    remaining,
                    segments,
                    command,
                    retries: 0,
                });
            }
            None => {
                self.launch_each(sequence, file, file_offset, target, &segments);
                self.spare.push(segments);
            }
        }
    }

    fn launch_each(&mut self, sequence: u64, file: &FileRef, file_offset: u64, target: &Target, segments: &[Segment]) {
        let mut at = file_offset;
        for &segment in segments {
            self.launch_range(sequence, file, at, target, segment);
            at += segment.1 as u64;
        }
    }

    /// The one command for a whole scatter list, where one will do.
    fn vectored(&self, file: &FileRef, file_offset: u64, target: &Target, segments: &[Segment]) -> Option<Command> {
        let total: usize = segments.iter().map(|&(_, len)| len).sum();
        if total > MAX_COMMAND {
            return None;
        }
        if let Some(direct) = file.direct() {
            let block = direct.offset as usize;
            let aligned = |&(offset, len): &Segment| {
                len.is_multiple_of(block) && target.region().address(offset).is_multiple_of(direct.memory.into())
            };
            if !file_offset.is_multiple_of(block as u64) || !segments.iter().all(aligned) {
                return None;
            }
        }
        let slot_of =
            |&(offset, len): &Segment| target.slot(offset).filter(|&(_, reach)| len <= reach).map(|(slot, _)| slot);
        let first = segments.first().and_then(slot_of);
        let one_slot = first.is_some() && segments.iter().all(|segment| slot_of(segment) == first);
        match first {
            Some(_) if one_slot && self.queue.has_readv_fixed() => Some(Command::Vectored { slot: first }),
            // Cut into ranges, each of which stays in the registration.
            _ if self.options.strict && segments.iter().any(|&(offset, _)| target.slot(offset).is_some()) => None,
            _ => Some(Command::Vectored { slot: None }),
        }
    }

    /// Queues the parts of one contiguous range.
    fn launch_range(&mut self, sequence: u64, file: &FileRef, file_offset: u64, target: &Target, segment: Segment) {
        let (start, len) = segment;
        let direct = file.direct();
        let parts = match direct {
            Some(alignment) => split(file_offset, target.region().address(start), len, alignment),
            None => [(0, len), (0, 0), (0, 0)],
        };
        for (at, len) in parts {
            if len == 0 {
                continue;
            }
            self.record(sequence).parts += 1;
            self.stage(Op {
                sequence,
                file: file.clone(),
                file_offset: file_offset + at as u64,
                target: target.clone(),
                target_offset: start + at,
                remaining: len,
                segments: Vec::new(),
                command: Command::Vectored { slot: None },
                retries: 0,
                direct,
            });
        }
    }

    /// Decides the next command of a contiguous op and hands it over.
    fn stage(&mut self, mut op: Op) {
        debug_assert!(op.segments.is_empty() && op.remaining > 0);
        let piece = match op.direct {
            None => Piece::Direct { len: op.remaining.min(MAX_COMMAND) },
            Some(alignment) => {
                let address = op.target.region().address(op.target_offset);
                let slot = self.bounce_slot_bytes(alignment.offset as usize);
                leading_piece(op.file_offset, address, op.remaining, alignment, slot)
            }
        };
        let piece = within_registration(&op, piece);
        op.command = match piece {
            Piece::Direct { len } => {
                Command::Direct { len: len as u32, slot: op.target.slot(op.target_offset).map(|(slot, _)| slot) }
            }
            Piece::Bounce { file_offset, len, skip, want } => {
                if op.target.region().kind() != MemoryKind::HostVisible {
                    return self.end_op(op, libc::EINVAL);
                }
                let slot = match self.take_bounce_slot(len) {
                    Ok(Some(slot)) => slot,
                    Ok(None) => return self.bounce_wait.push_back(op),
                    Err(errno) => return self.end_op(op, errno),
                };
                let leaves_path = slot.pool.slot(slot.offset).is_none() && op.target.slot(op.target_offset).is_some();
                if self.options.strict && leaves_path {
                    self.give_bounce_slot(slot);
                    return self.end_op(op, libc::ENOMEM);
                }
                Command::Bounce { file_offset, len: len as u32, skip: skip as u32, want: want as u32, slot }
            }
        };
        self.issue(op);
    }

    fn issue(&mut self, op: Op) {
        // An error of the submission system call is reported by the next `drive`; the op waits meanwhile.
        if self.pending.is_empty() && matches!(self.queue.make_room(), Ok(true)) {
            self.stats.commands += 1;
            self.queue.push(op);
        } else {
            self.pending.push_back(op);
        }
    }

    // The bounce buffer

    fn bounce_slot_bytes(&self, block: usize) -> usize {
        let bytes = self.bounce.as_ref().map_or(self.options.bounce_slot_bytes, |bounce| bounce.slot_bytes);
        bytes.max(block)
    }

    /// `None`: all are lent.
    fn take_bounce_slot(&mut self, len: usize) -> std::result::Result<Option<BounceSlot>, Errno> {
        if self.bounce.is_none() {
            let slots = self.options.bounce_slots;
            let slot_bytes = len.max(self.options.bounce_slot_bytes).next_power_of_two();
            let memory = MappedBuffer::<u8>::alloc(slot_bytes * usize::from(slots)).map_err(|error| error.errno())?;
            let region = std::sync::Arc::clone(crate::memory::GpuMappedBuffer::from(memory).region());
            let pool = self.queue.adopt(region);
            self.bounce = Some(Bounce { pool, slot_bytes, free: (0..slots).rev().collect() });
        }
        let Some(bounce) = &mut self.bounce else { return Ok(None) };
        if len > bounce.slot_bytes {
            // A later file with blocks larger than a slot.
            return Err(libc::EINVAL);
        }
        Ok(bounce.free.pop().map(|index| BounceSlot {
            pool: bounce.pool.clone(),
            offset: usize::from(index) * bounce.slot_bytes,
            index,
        }))
    }

    fn give_bounce_slot(&mut self, slot: BounceSlot) {
        if let Some(bounce) = &mut self.bounce {
            bounce.free.push(slot.index);
        }
        // One in line that is lost takes no slot: the next must not wait for another to be given back.
        while self.bounce.as_ref().is_some_and(|bounce| !bounce.free.is_empty())
            && let Some(op) = self.bounce_wait.pop_front()
        {
            self.proceed(op);
        }
    }

    // Completing

    /// What a completion of the op's command means.
    fn complete(&mut self, mut op: Op, result: i32) {
        let (landed, asked, path) = match &op.command {
            Command::Direct { len, slot } => (result, *len as usize, path_of(slot.is_some())),
            Command::Vectored { slot } => (result, op.remaining, path_of(slot.is_some())),
            Command::Bounce { skip, want, slot, .. } => {
                let path = path_of(slot.pool.slot(slot.offset).is_some());
                // Whole blocks were read: only what lies in the op's range counts.
                let usable = if result < 0 { result } else { (result - *skip as i32).clamp(0, *want as i32) };
                (usable, *want as usize, path)
            }
        };
        if matches!(op.command, Command::Bounce { .. }) {
            self.unbounce(&mut op, landed);
        }
        if landed < 0 {
            return self.refused(op, -landed);
        }
        if landed == 0 {
            return self.end_op(op, libc::ENODATA);
        }
        let landed = (landed as usize).min(asked);
        self.landed(&op, landed as u64, path);
        op.retries = 0;
        op.file_offset += landed as u64;
        op.remaining -= landed;
        if landed < asked {
            self.stats.short_reads += 1;
        }
        if op.remaining == 0 {
            return self.end_op(op, 0);
        }
        self.go_on(op, landed);
    }

    /// Goes on with what a command left after it brought `landed` bytes.
    fn go_on(&mut self, mut op: Op, landed: usize) {
        if op.segments.is_empty() {
            op.target_offset += landed;
            self.proceed(op);
        } else {
            self.split_scatter(op, landed);
        }
    }

    /// Copies what a bounce read brought and gives its slot to the next op in line.
    fn unbounce(&mut self, op: &mut Op, landed: i32) {
        let Command::Bounce { skip, slot, .. } = std::mem::replace(&mut op.command, Command::Vectored { slot: None })
        else {
            return;
        };
        if landed > 0 {
            let from = slot.offset + skip as usize;
            op.target.region().copy_from(op.target_offset, slot.pool.region(), from, landed as usize);
            self.stats.bounced_bytes += landed as u64;
            self.record(op.sequence).bounced += landed as u64;
        }
        self.give_bounce_slot(slot);
    }

    fn landed(&mut self, op: &Op, bytes: u64, path: ReadPath) {
        self.stats.bytes += bytes;
        match path {
            ReadPath::RegisteredRead => self.stats.registered_bytes += bytes,
            _ => self.stats.plain_bytes += bytes,
        }
        let record = self.record(op.sequence);
        record.landed += bytes;
        record.path = record.path.and(path);
    }

    /// Why no further command of a submission should be issued; 0 when there is no reason.
    ///
    /// The end of the file in one part is none: the parts before it still have bytes, which are to be in place.
    fn lost(&mut self, sequence: u64) -> Errno {
        let record = self.record(sequence);
        match record.errno {
            _ if record.cancelled => libc::ECANCELED,
            libc::ENODATA => 0,
            errno => errno,
        }
    }

    /// Stages the next command of a contiguous op, unless its submission is lost already.
    fn proceed(&mut self, op: Op) {
        match self.lost(op.sequence) {
            0 => self.stage(op),
            errno => self.end_op(op, errno),
        }
    }

    /// Goes on with what a vectored command left, range by range: the rest may start anywhere.
    fn split_scatter(&mut self, mut op: Op, mut done: usize) {
        let segments = std::mem::take(&mut op.segments);
        let lost = self.lost(op.sequence);
        if lost == 0 {
            let mut at = op.file_offset;
            for &(offset, len) in &segments {
                let skip = done.min(len);
                done -= skip;
                if skip < len {
                    let rest = (offset + skip, len - skip);
                    // `launch_range` looks at the file's alignment; what was learned about this op counts more.
                    self.launch_rest(&op, at, rest);
                    at += rest.1 as u64;
                }
            }
        }
        self.spare.push(segments);
        self.end_op(op, lost);
    }

    fn launch_rest(&mut self, op: &Op, file_offset: u64, (target_offset, remaining): Segment) {
        self.record(op.sequence).parts += 1;
        self.stage(Op {
            sequence: op.sequence,
            file: op.file.clone(),
            file_offset,
            target: op.target.clone(),
            target_offset,
            remaining,
            segments: Vec::new(),
            command: Command::Vectored { slot: None },
            retries: 0,
            direct: op.direct,
        });
    }

    /// A command ended with an errno.
    fn refused(&mut self, mut op: Op, errno: Errno) {
        // Whatever became of the command: a cancelled submission says so, another keeps its first errno.
        let lost = self.lost(op.sequence);
        if lost != 0 {
            return self.end_op(op, lost);
        }
        match errno {
            libc::EINTR | libc::EAGAIN if op.retries < self.options.max_retries => {
                let wait = self.options.backoff * (1 << op.retries.min(10));
                op.retries += 1;
                self.stats.retries += 1;
                self.sleeping.push((self.queue.now() + wait, op));
            }
            libc::EINVAL if op.direct.is_none() => match op.file.unknown_fd().map(direct_alignment) {
                // The caller's descriptor is O_DIRECT and the read is not aligned for it: go by its rules.
                Some(Ok(Some(alignment))) => {
                    op.direct = Some(alignment);
                    self.go_on(op, 0)
                }
                _ => self.end_op(op, errno),
            },
            _ => self.end_op(op, errno),
        }
    }

    /// One op has ended, whole (0) or not.
    fn end_op(&mut self, mut op: Op, errno: Errno) {
        if !op.segments.is_empty() {
            self.spare.push(std::mem::take(&mut op.segments));
        }
        let record = self.record(op.sequence);
        // The first errno counts, but the end of the file hides no failure: its byte count would be wrong.
        if record.errno == 0 || record.errno == libc::ENODATA && errno != 0 {
            record.errno = errno;
        }
        self.end_part(op.sequence, op.file, op.target);
    }

    fn end_part(&mut self, sequence: u64, file: FileRef, target: Target) {
        let record = self.record(sequence);
        record.parts -= 1;
        if record.parts == 0 {
            if record.errno != 0 {
                record.retry = Some((file, target));
            }
            self.finish(sequence);
        }
    }

    /// All parts of a submission have ended.
    fn finish(&mut self, sequence: u64) {
        let record = self.record(sequence);
        debug_assert_eq!(record.state, State::Flying);
        let errno = record.errno;
        debug_assert!(errno != 0 || record.landed == record.requested);
        record.state = if errno == 0 { State::Whole } else { State::Failed };
        if errno == 0 {
            record.retry = None;
        }
        self.flying -= 1;
        self.finished.push_back(sequence);
        match errno {
            0 => self.stats.completed += 1,
            _ => {
                self.stats.failed += 1;
                self.stats.end_of_file += u64::from(errno == libc::ENODATA);
                self.stats.cancelled += u64::from(errno == libc::ECANCELED);
                self.publish_bad();
            }
        }
        self.advance();
    }

    /// Moves the tail over every whole or skipped submission.
    fn advance(&mut self) {
        let before = self.tail;
        while self.tail < self.next && matches!(self.record(self.tail).state, State::Whole | State::Skipped) {
            self.tail += 1;
        }
        if self.tail != before {
            self.tail_word.publish(self.tail);
            self.advance_floor();
        }
    }

    fn advance_floor(&mut self) {
        while self.floor < self.tail && self.record(self.floor).taken {
            self.record(self.floor).state = State::Free;
            self.floor += 1;
        }
    }

    fn publish_bad(&mut self) {
        let failed = (self.floor..self.next).find(|&sequence| self.failed_at(sequence));
        let failed = failed.map(|sequence| (sequence, self.record(sequence).errno));
        self.tail_word.publish_bad(failed.into_iter().chain(self.skipped).min());
    }

    /// Takes the completion of the submission that ended first.
    pub(crate) fn take(&mut self) -> Option<Completion> {
        let sequence = self.finished.pop_front()?;
        let completion = self.describe(sequence);
        self.record(sequence).taken = true;
        self.advance_floor();
        Some(completion)
    }

    /// Status of the completion that `take` would return.
    pub(crate) fn peek_status(&mut self) -> Option<i32> {
        let sequence = *self.finished.front()?;
        Some(-self.record(sequence).errno)
    }

    fn describe(&mut self, sequence: u64) -> Completion {
        let record = self.record(sequence);
        Completion {
            sequence,
            user_data: record.user_data,
            buffer_offset: record.buffer_offset,
            file_offset: record.file_offset,
            requested: record.requested,
            bytes: record.landed,
            bounced: record.bounced,
            status: -record.errno,
            path: record.path,
        }
    }

    // Driving

    /// Submits what is queued and reaps what has completed; with `min` > 0, waits until that many completions can be
    /// taken, the timeout passes (`ETIMEDOUT`), or nothing is left that could complete.
    pub(crate) fn drive(&mut self, min: usize, timeout: Option<Duration>) -> Result<()> {
        let deadline = timeout.filter(|_| min > 0).map(|timeout| self.queue.now().saturating_add(timeout));
        let mut looked = false;
        loop {
            self.reap_all();
            self.wake()?;
            let satisfied = self.ready() >= min;
            if satisfied || self.queue.in_kernel() + self.sleeping.len() + self.pending.len() == 0 {
                // A poll also runs deferred completion work; a satisfied wait only submits what is queued.
                if if min == 0 { self.queue.wants_enter() } else { self.queue.has_unsubmitted() } {
                    self.enter(0, None)?;
                    self.reap_all();
                }
                // Nothing left to wait for, unless reaping just now queued more.
                if satisfied || self.ready() >= min || self.flying == 0 {
                    return Ok(());
                }
                continue;
            }
            let now = self.queue.now();
            let left = deadline.map(|deadline| deadline.saturating_sub(now));
            if left == Some(Duration::ZERO) {
                // Even without time to wait, what is queued is submitted and what is done is found.
                if !std::mem::replace(&mut looked, true) && self.queue.wants_enter() {
                    self.enter(0, None)?;
                    continue;
                }
                return Err(PipelineError::timed_out(
                    format!("waiting for {min} completions"),
                    format!("{} are there, {} reads are in flight: wait again or cancel", self.ready(), self.flying),
                ));
            }
            let nap = self.sleeping.iter().map(|(wake, _)| wake.saturating_sub(now)).min();
            let limit = left.into_iter().chain(nap).min();
            let wait = (min - self.ready()).min(self.queue.in_kernel().max(1)) as u32;
            // Ops outside the kernel go in as others come out, and a nap ends alone: do not ask for more than could
            // come before that.
            let outside = nap.is_some() || !self.pending.is_empty() || !self.bounce_wait.is_empty();
            self.enter(if outside { 1 } else { wait }, limit)?;
        }
    }

    /// Hands all queued commands to the kernel, without reaping.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.wake()?;
        if self.queue.has_unsubmitted() { self.enter(0, None) } else { Ok(()) }
    }

    fn enter(&mut self, wait: u32, timeout: Option<Duration>) -> Result<()> {
        self.stats.enters += 1;
        self.queue.enter(wait, timeout).map_err(|errno| enter_error(errno, self.flying))
    }

    fn reap_all(&mut self) {
        while let Some(Reaped { op, result }) = self.queue.reap() {
            self.complete(op, result);
        }
    }

    /// Hands over ops whose time has come or whose room has.
    fn wake(&mut self) -> Result<()> {
        if !self.sleeping.is_empty() {
            let now = self.queue.now();
            let mut index = 0;
            while index < self.sleeping.len() {
                if self.sleeping[index].0 <= now {
                    let (_, op) = self.sleeping.swap_remove(index);
                    self.retry(op);
                } else {
                    index += 1;
                }
            }
        }
        while !self.pending.is_empty() {
            match self.queue.make_room() {
                Ok(true) => {}
                Ok(false) => break,
                Err(errno) => return Err(enter_error(errno, self.flying)),
            }
            if let Some(op) = self.pending.pop_front() {
                self.stats.commands += 1;
                self.queue.push(op);
            }
        }
        Ok(())
    }

    /// Repeats the command of an op.
    fn retry(&mut self, op: Op) {
        if op.segments.is_empty() {
            return self.proceed(op);
        }
        match self.lost(op.sequence) {
            0 => self.issue(op),
            errno => self.end_op(op, errno),
        }
    }

    // Cancelling and closing

    /// Cancels a submission that has not ended: parts not handed to the kernel end now, the kernel is asked for the
    /// others.
    pub(crate) fn cancel(&mut self, sequence: u64) -> Result<()> {
        let known = (self.floor..self.next).contains(&sequence);
        if !known || self.record(sequence).state != State::Flying {
            return Err(PipelineError::invalid(
                format!("submission {sequence}"),
                "only one in flight can be cancelled",
            ));
        }
        self.record(sequence).cancelled = true;
        self.drop_waiting(|op| op.sequence == sequence);
        if self.record(sequence).state == State::Flying {
            self.queue.cancel(sequence);
        }
        Ok(())
    }

    /// Cancels everything in flight.
    pub(crate) fn cancel_all(&mut self) {
        for sequence in self.floor..self.next {
            if self.record(sequence).state == State::Flying {
                self.record(sequence).cancelled = true;
            }
        }
        self.drop_waiting(|_| true);
        for sequence in self.floor..self.next {
            if self.record(sequence).state == State::Flying {
                self.queue.cancel(sequence);
            }
        }
    }

    fn drop_waiting(&mut self, matches: impl Fn(&Op) -> bool) {
        let mut ended = Vec::new();
        for waiting in [&mut self.pending, &mut self.bounce_wait] {
            let (gone, kept) = std::mem::take(waiting).into_iter().partition(&matches);
            *waiting = kept;
            let gone: VecDeque<Op> = gone;
            ended.extend(gone);
        }
        let (gone, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.sleeping).into_iter().partition(|(_, op)| matches(op));
        self.sleeping = kept;
        ended.extend(gone.into_iter().map(|(_, op)| op));
        for mut op in ended {
            if let Command::Bounce { slot, .. } = std::mem::replace(&mut op.command, Command::Vectored { slot: None }) {
                self.give_bounce_slot(slot);
            }
            self.end_op(op, libc::ECANCELED);
        }
    }

    /// Cancels what is in flight and waits for the kernel to give it back, and the stream's own registrations up.
    /// Whether the kernel did. Nothing is submitted afterwards.
    pub(crate) fn shut(&mut self, limit: Duration) -> bool {
        let deadline = self.queue.now().saturating_add(limit);
        self.cancel_all();
        // Errors of the system call do not end the wait: memory is at stake. Each costs a turn of a bounded number,
        // lest a ring that only ever errs keeps us spinning.
        let mut errors = 0;
        while self.queue.in_kernel() > 0 && errors < 100 {
            let left = deadline.saturating_sub(self.queue.now());
            if left.is_zero() {
                break;
            }
            if self.enter(1, Some(left)).is_err() {
                errors += 1;
            }
            self.reap_all();
            self.drop_waiting(|_| true);
        }
        if let Some(Bounce { pool, .. }) = self.bounce.take() {
            self.queue.release(pool);
        }
        self.queue.in_kernel() == 0
    }

    /// Tells consumers how it ended.
    pub(crate) fn publish_end(&self, errno: Errno) {
        match errno {
            0 => self.tail_word.publish_end(self.next),
            errno => self.tail_word.publish_abort(self.next, errno),
        }
    }
}

/// Cuts a direct piece where the target's registration is split. A block that straddles the split is bounced.
fn within_registration(op: &Op, piece: Piece) -> Piece {
    let (Piece::Direct { len }, Some((_, reach))) = (piece, op.target.slot(op.target_offset)) else {
        return piece;
    };
    let block = op.direct.map_or(1, |alignment| alignment.offset as usize);
    let inside = len.min(reach);
    match inside - inside % block {
        0 => Piece::Bounce { file_offset: op.file_offset, len: block, skip: 0, want: block },
        inside => Piece::Direct { len: inside },
    }
}

fn path_of(registered: bool) -> ReadPath {
    if registered { ReadPath::RegisteredRead } else { ReadPath::PlainRead }
}

fn enter_error(errno: Errno, flying: u32) -> PipelineError {
    let fix = match errno {
        libc::EAGAIN | libc::EBUSY => {
            format!("the kernel is short of resources ({flying} reads in flight): poll again")
        }
        libc::EEXIST => "another thread owns the ring".to_owned(),
        libc::EBADF | libc::ENXIO | libc::EOPNOTSUPP => "the ring's descriptor was closed".to_owned(),
        libc::EBADR => "the kernel dropped completions: close the stream".to_owned(),
        _ => "poll again, or close the stream".to_owned(),
    };
    PipelineError::IoUringSyscall { call: "io_uring_enter", errno, fix: fix.into() }
}
