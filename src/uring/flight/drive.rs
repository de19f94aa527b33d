//! Turning the wheel: submit, wait, reap; cancel and close.

use super::super::queue::{Command, Op, Queue, Reaped};
use super::record::State;
use super::{Bounce, Flight, NO_COMMAND};
use crate::error::{PipelineError, Result};
use crate::sys::Errno;
use std::collections::VecDeque;
use std::time::Duration;

/// How long after a cancellation the kernel is asked once more.
const FIRST_ASK: Duration = Duration::from_millis(5);

impl<Q: Queue> Flight<'_, Q> {
    /// Submits what is queued and reaps what has completed; with `min` > 0, waits until that many completions can be
    /// taken, the timeout passes (`ETIMEDOUT`), or nothing is left that could complete.
    pub(crate) fn drive(&mut self, min: usize, timeout: Option<Duration>) -> Result<()> {
        if self.drive_for(min, timeout)? {
            return Ok(());
        }
        Err(PipelineError::timed_out(
            format!("waiting for {min} completions"),
            format!("{} are there, {} reads are in flight: wait again or cancel", self.ready(), self.flying),
        ))
    }

    /// As [`drive`](Self::drive); false when the timeout passed.
    pub(crate) fn drive_for(&mut self, min: usize, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.filter(|_| min > 0).map(|timeout| self.queue.now().saturating_add(timeout));
        let mut looked = false;
        loop {
            let again = self.ask_again();
            self.reap_all();
            self.wake()?;
            let satisfied = self.ready() >= min;
            if satisfied || self.queue.in_kernel() + self.sleeping.len() + self.pending.len() == 0 {
                // With nothing to report, a poll also runs deferred completion work; otherwise it only submits.
                let nothing = self.ready() == 0;
                if self.queue.has_unsubmitted() || nothing && self.queue.wants_enter() {
                    self.enter(0, None)?;
                    self.reap_all();
                }
                // Nothing left to wait for, unless reaping just now queued more.
                if satisfied || self.ready() >= min || self.flying == 0 {
                    return Ok(true);
                }
                continue;
            }
            // The clock is only looked at when something depends on it.
            let timed = deadline.is_some() || !self.sleeping.is_empty();
            let now = if timed { self.queue.now() } else { Duration::ZERO };
            let left = deadline.map(|deadline| deadline.saturating_sub(now));
            if left == Some(Duration::ZERO) {
                // Even without time to wait, what is queued is submitted and what is done is found.
                if !std::mem::replace(&mut looked, true) && self.queue.wants_enter() {
                    self.enter(0, None)?;
                    continue;
                }
                return Ok(false);
            }
            let nap = self.sleeping.iter().map(|(wake, _)| wake.saturating_sub(now)).min();
            let limit = left.into_iter().chain(nap).chain(again).min();
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

    pub(super) fn enter(&mut self, wait: u32, timeout: Option<Duration>) -> Result<()> {
        self.queue.enter(wait, timeout).map_err(|errno| enter_error(errno, self.flying))
    }

    pub(super) fn reap_all(&mut self) {
        while let Some(Reaped { op, result }) = self.queue.reap() {
            self.complete(op, result);
        }
    }

    /// Hands over ops whose time has come or whose room has.
    pub(super) fn wake(&mut self) -> Result<()> {
        if !self.sleeping.is_empty() {
            let now = self.queue.now();
            let mut index = 0;
            while index < self.sleeping.len() {
                if self.sleeping[index].0 <= now {
                    let (_, op) = self.sleeping.swap_remove(index);
                    self.proceed(op);
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
                self.push(op);
            }
        }
        Ok(())
    }

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
        self.mark_cancelled(sequence);
        self.drop_waiting(|op| op.sequence == sequence);
        if self.record(sequence).state == State::Flying {
            self.queue.cancel(|other| other == sequence);
            self.asked();
        }
        Ok(())
    }

    pub(super) fn mark_cancelled(&mut self, sequence: u64) {
        let record = self.record(sequence);
        let newly = record.state == State::Flying && !std::mem::replace(&mut record.cancelled, true);
        self.cancelling += u32::from(newly);
    }

    /// The kernel has just been asked for the first time.
    fn asked(&mut self) {
        (self.ask_at, self.ask_every) = (self.queue.now() + FIRST_ASK, FIRST_ASK);
    }

    /// Repeats cancellations that the kernel has not heeded: it finds no command that is just on its way between its
    /// queues. Returns how long until the next time.
    pub(super) fn ask_again(&mut self) -> Option<Duration> {
        if self.cancelling == 0 {
            return None;
        }
        let now = self.queue.now();
        if self.ask_at <= now {
            let (window, mask) = (&self.window, self.window.len() as u64 - 1);
            self.queue.cancel(|sequence| window[(sequence & mask) as usize].cancelled);
            self.ask_every = (self.ask_every * 2).min(Duration::from_secs(1));
            self.ask_at = now + self.ask_every;
        }
        Some(self.ask_at.saturating_sub(now))
    }

    /// Cancels everything in flight.
    pub(crate) fn cancel_all(&mut self) {
        (self.floor..self.next).for_each(|sequence| self.mark_cancelled(sequence));
        self.drop_waiting(|_| true);
        self.queue.cancel(|_| true);
        self.asked();
    }

    pub(super) fn drop_waiting(&mut self, matches: impl Fn(&Box<Op>) -> bool) {
        let mut ended = Vec::new();
        for waiting in [&mut self.pending, &mut self.bounce_wait] {
            let (gone, kept) = std::mem::take(waiting).into_iter().partition(&matches);
            *waiting = kept;
            let gone: VecDeque<Box<Op>> = gone;
            ended.extend(gone);
        }
        let (gone, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.sleeping).into_iter().partition(|(_, op)| matches(op));
        self.sleeping = kept;
        ended.extend(gone.into_iter().map(|(_, op)| op));
        for mut op in ended {
            if let Command::Bounce { slot, .. } = std::mem::replace(&mut op.command, NO_COMMAND) {
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
        // However short the time, what has completed is found.
        let _ = self.enter(0, None);
        self.reap_all();
        self.drop_waiting(|_| true);
        // Errors of the system call do not end the wait: memory is at stake. Want of resources passes; a ring that errs
        // otherwise is tried a number of times.
        let mut errors = 0;
        while self.queue.in_kernel() > 0 && errors < 100 {
            let left = deadline.saturating_sub(self.queue.now());
            if left.is_zero() {
                break;
            }
            let again = self.ask_again().unwrap_or(left);
            if let Err(error) = self.enter(1, Some(left.min(again))) {
                errors += u32::from(!matches!(error.errno(), libc::EAGAIN | libc::EBUSY));
                self.queue.pause(left.min(Duration::from_millis(1)));
            }
            self.reap_all();
            self.drop_waiting(|_| true);
        }
        for sequence in self.floor..self.next {
            self.forget_retry(sequence);
        }
        self.rest.clear();
        if let Some(Bounce { pool, .. }) = self.bounce.take() {
            self.queue.release(pool);
        }
        self.queue.in_kernel() == 0
    }

    /// Tells consumers that no more comes: END if that was announced and everything is in place.
    pub(crate) fn publish_close(&self, finished: bool) {
        self.publish_end(if finished && self.tail == self.next { 0 } else { libc::ECANCELED });
    }

    /// Tells consumers how it ended.
    pub(crate) fn publish_end(&self, errno: Errno) {
        match errno {
            0 => self.tail_word.publish_end(self.next),
            errno => self.tail_word.publish_abort(self.next, errno),
        }
    }
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
