//! What every completion means, and how the tail follows.

use super::super::file::direct_alignment;
use super::super::queue::{Command, Op, Queue};
use super::record::{Completion, ReadPath, State};
use super::{Flight, NO_COMMAND, Segment};
use crate::sys::Errno;

/// How often blocks that end too early are read again before that counts as the end of the file.
const LOOKS: u8 = 3;

impl<Q: Queue> Flight<'_, Q> {
    /// What a completion of the op's command means.
    #[inline]
    pub(super) fn complete(&mut self, mut op: Box<Op>, result: i32) {
        let (landed, asked, path) = match &op.command {
            Command::Direct { len, slot } => (result, *len as usize, path_of(slot.is_some())),
            Command::Vectored { slot } => (result, op.remaining, path_of(slot.is_some())),
            Command::Bounce { skip, want, slot, .. } => {
                let path = path_of(slot.registration().is_some());
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
            // Blocks that end before the bytes the op wants: the file ends there, or the read was short. Looked at
            // again, the end of a file stays where it is.
            if result > 0 && op.looks < LOOKS {
                op.looks += 1;
                self.stats.short_reads += 1;
                return self.proceed(op);
            }
            return self.end_op(op, libc::ENODATA);
        }
        let landed = (landed as usize).min(asked);
        self.landed(&op, landed as u64, path);
        (op.retries, op.looks) = (0, 0);
        op.file_offset += landed as u64;
        op.remaining -= landed;
        if landed < asked {
            if op.remaining <= self.record(op.sequence).slack as usize {
                return self.end_op(op, 0);
            }
            self.stats.short_reads += 1;
        }
        if op.remaining == 0 {
            return self.end_op(op, 0);
        }
        self.go_on(op, landed);
    }

    /// Goes on with what a command left after it brought `landed` bytes.
    pub(super) fn go_on(&mut self, mut op: Box<Op>, landed: usize) {
        if is_vectored(&op) {
            self.split_scatter(op, landed);
        } else {
            op.target_offset += landed;
            self.proceed(op);
        }
    }

    /// Copies what a bounce read brought and gives its slot to the next op in line.
    pub(super) fn unbounce(&mut self, op: &mut Op, landed: i32) {
        let Command::Bounce { skip, slot, .. } = std::mem::replace(&mut op.command, NO_COMMAND) else {
            return;
        };
        if landed > 0 {
            let from = slot.offset() + skip as usize;
            op.target.region().copy_from(op.target_offset, slot.pool.region(), from, landed as usize);
            self.stats.bounced_bytes += landed as u64;
            self.record(op.sequence).bounced += landed as u64;
        }
        self.give_bounce_slot(slot);
    }

    #[inline(always)]
    pub(super) fn landed(&mut self, op: &Op, bytes: u64, path: ReadPath) {
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
    #[inline(always)]
    pub(super) fn lost(&mut self, sequence: u64) -> Errno {
        let record = self.record(sequence);
        match record.errno {
            _ if record.cancelled => libc::ECANCELED,
            libc::ENODATA => 0,
            errno => errno,
        }
    }

    /// Issues the next command of an op, the same scatter list again or the next stretch, unless its submission is lost
    /// already.
    pub(super) fn proceed(&mut self, op: Box<Op>) {
        match self.lost(op.sequence) {
            0 if is_vectored(&op) => self.issue(op),
            0 => self.stage(op),
            errno => self.end_op(op, errno),
        }
    }

    /// Goes on with what a vectored command left, range by range: the rest may start anywhere.
    pub(super) fn split_scatter(&mut self, op: Box<Op>, mut done: usize) {
        let segments = std::mem::take(&mut self.record(op.sequence).segments);
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
        self.record(op.sequence).segments = segments;
        self.end_op(op, lost);
    }

    pub(super) fn launch_rest(&mut self, op: &Op, file_offset: u64, (target_offset, remaining): Segment) {
        self.record(op.sequence).parts += 1;
        let mut rest = self.new_op(Some(&op.target));
        (rest.sequence, rest.file, rest.direct) = (op.sequence, op.file.clone(), op.direct);
        (rest.file_offset, rest.target_offset, rest.remaining) = (file_offset, target_offset, remaining);
        self.stage(rest);
    }

    /// A command ended with an errno.
    pub(super) fn refused(&mut self, mut op: Box<Op>, errno: Errno) {
        // Whatever became of the command: a cancelled submission says so, another keeps its first errno.
        let lost = self.lost(op.sequence);
        if lost != 0 {
            return self.end_op(op, lost);
        }
        match errno {
            libc::EINTR | libc::EAGAIN if op.retries < self.options.max_retries => {
                let wait = self.options.backoff.saturating_mul(1 << op.retries.min(10));
                op.retries += 1;
                self.stats.retries += 1;
                self.sleeping.push((self.queue.now().saturating_add(wait), op));
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
    #[inline]
    pub(super) fn end_op(&mut self, op: Box<Op>, errno: Errno) {
        let sequence = op.sequence;
        if errno != 0 {
            let record = self.record(sequence);
            // The first errno counts, but the end of the file hides no failure: its byte count would be wrong.
            if matches!(record.errno, 0 | libc::ENODATA) {
                record.errno = errno;
            }
            if record.retry.is_none() {
                record.retry = Some(Box::new((op.file.clone(), op.target.clone())));
            }
        } else if self.record(sequence).parts == 1 && self.record(sequence).errno == 0 {
            self.queue.count_user(&op.file, -1);
        }
        self.lay(op);
        self.end_part(sequence);
    }

    #[inline(always)]
    pub(super) fn end_part(&mut self, sequence: u64) {
        let record = self.record(sequence);
        record.parts -= 1;
        if record.parts == 0 {
            self.finish(sequence);
        }
    }

    /// All parts of a submission have ended.
    #[inline(always)]
    pub(super) fn finish(&mut self, sequence: u64) {
        let record = self.record(sequence);
        debug_assert_eq!(record.state, State::Flying);
        let errno = record.errno;
        debug_assert!(errno != 0 || record.landed + u64::from(record.slack) >= record.requested);
        record.state = if errno == 0 { State::Whole } else { State::Failed };
        let cancelled = record.cancelled;
        self.cancelling -= u32::from(cancelled);
        self.flying -= 1;
        self.finished.push_back(sequence);
        match errno {
            0 => self.stats.completed += 1,
            _ => {
                self.stats.failed += 1;
                self.stats.end_of_file += u64::from(errno == libc::ENODATA);
                self.stats.cancelled += u64::from(errno == libc::ECANCELED);
                if self.tail_word.tells_of_failure() {
                    self.note_failure(sequence, errno);
                }
            }
        }
        self.advance();
    }

    /// Moves the tail over every whole or skipped submission.
    #[inline]
    pub(super) fn advance(&mut self) {
        let before = self.tail;
        while self.tail < self.next && matches!(self.record(self.tail).state, State::Whole | State::Skipped) {
            self.tail += 1;
        }
        if self.tail != before {
            self.tail_word.publish(self.tail);
            self.advance_floor();
        }
    }

    #[inline(always)]
    pub(super) fn advance_floor(&mut self) {
        while self.floor < self.tail && self.record(self.floor).taken {
            self.record(self.floor).state = State::Free;
            self.floor += 1;
        }
    }

    /// A submission has failed: consumers learn of the lowest.
    pub(super) fn note_failure(&mut self, sequence: u64, errno: Errno) {
        if self.failed.is_none_or(|(lowest, _)| sequence < lowest) {
            self.failed = Some((sequence, errno));
            self.publish_bad();
        }
    }

    /// A submission is failed no longer: resubmitted or skipped.
    pub(super) fn note_change(&mut self, sequence: u64) {
        if self.failed.is_some_and(|(lowest, _)| lowest == sequence) {
            let next = (sequence + 1..self.next).find(|&sequence| self.failed_at(sequence));
            self.failed = next.map(|sequence| (sequence, self.record(sequence).errno));
        }
        self.publish_bad();
    }

    fn publish_bad(&self) {
        self.tail_word.publish_bad(self.failed.into_iter().chain(self.skipped).min());
    }

    /// Takes the completion of the submission that ended first.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<Completion> {
        let sequence = self.finished.pop_front()?;
        let completion = self.describe(sequence);
        self.record(sequence).taken = true;
        self.advance_floor();
        Some(completion)
    }

    /// Takes every completion there is; failed submissions are skipped.
    #[inline]
    pub(crate) fn take_all(&mut self, mut each: impl FnMut(&Completion)) {
        while let Some(completion) = self.take() {
            if completion.status != 0 && self.skip(completion.sequence).is_err() {
                unreachable!("a failed submission whose completion was just taken can be skipped");
            }
            each(&completion);
        }
    }

    /// Status of the completion that `take` would return.
    pub(crate) fn peek_status(&mut self) -> Option<i32> {
        let sequence = *self.finished.front()?;
        Some(-self.record(sequence).errno)
    }

    #[inline]
    pub(super) fn describe(&mut self, sequence: u64) -> Completion {
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
}

/// Whether the op's command reads a whole scatter list.
fn is_vectored(op: &Op) -> bool {
    matches!(op.command, Command::Vectored { .. })
}

fn path_of(registered: bool) -> ReadPath {
    if registered { ReadPath::RegisteredRead } else { ReadPath::PlainRead }
}
