//! A consumer's side of the io_queue protocol: what `include/ringest_device.cuh` does on a device, for host threads.
//!
//! Free of `unsafe` and generic over [`Words`]. The steps are those of the device header, in the same order; the model
//! checker runs them against `producer`.

use super::words::{Word, Words};
use crate::wire::{ConsumeMode, Descriptor, IoQueueView, Outcome, state};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// A sequence that was popped, to be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Popped {
    pub(crate) sequence: u64,
    pub(crate) descriptor: Descriptor,
}

/// What a pop found.
pub(crate) type Pop = Result<Popped, Outcome>;

/// What a look at the sequence wanted found.
enum Look {
    Ready(Popped),
    /// Nothing yet; `true`: nothing ever, for the sequence is beyond the end.
    NotReady(bool),
    Aborted(i32),
}

/// See the module's text. One thread at a time.
#[derive(Debug)]
pub(crate) struct Consumer<W> {
    words: W,
    mode: ConsumeMode,
    mask: u64,
    slot_bytes: u64,
    slot_stride: u64,
    epoch: u64,
    consumers: u32,
    index: u32,
    /// Sequences popped so far (claimed: unused).
    popped: u64,
    /// The ticket held (claimed).
    ticket: Option<u64>,
    /// Errno of the abort that was seen; 0: none.
    aborted: i32,
}

impl<W: Words> Consumer<W> {
    /// Consumer `index` of the view's. The caller has checked the view.
    pub(crate) fn new(words: W, view: &IoQueueView, mode: ConsumeMode, index: u32) -> Self {
        let popped = if mode == ConsumeMode::Claimed { 0 } else { words.ticket(index).load(Relaxed) };
        Self {
            mode,
            mask: u64::from(view.slot_count) - 1,
            slot_bytes: view.slot_bytes,
            slot_stride: view.slot_stride,
            epoch: view.epoch,
            consumers: view.consumers,
            index,
            popped,
            ticket: None,
            aborted: 0,
            words,
        }
    }

    /// -errno after ABORTED, 0 before.
    pub(crate) fn error(&self) -> i32 {
        -self.aborted
    }

    /// The sequence that the next pop waits for; `None`: no ticket is held.
    pub(crate) fn next(&self) -> Option<u64> {
        match self.mode {
            ConsumeMode::Claimed => self.ticket,
            ConsumeMode::Partitioned => {
                Some(self.popped.saturating_mul(self.consumers.into()).saturating_add(self.index.into()))
            }
            ConsumeMode::Single | ConsumeMode::Broadcast => Some(self.popped),
        }
    }

    /// Looks once. `Err` is END, ABORTED or TIMEOUT.
    pub(crate) fn try_pop(&mut self) -> Pop {
        if self.aborted != 0 {
            return Err(Outcome::Aborted);
        }
        let mut sequence = match self.next() {
            Some(sequence) => sequence,
            None => self.claim(),
        };
        loop {
            match self.look(sequence) {
                Look::Ready(popped) => {
                    self.advance();
                    return Ok(popped);
                }
                Look::Aborted(errno) => return Err(self.give_up(errno)),
                Look::NotReady(never) => match self.swap(sequence) {
                    Some(lower) => sequence = lower,
                    None => return Err(if never { Outcome::End } else { Outcome::Timeout }),
                },
            }
        }
    }

    fn advance(&mut self) {
        if self.mode == ConsumeMode::Claimed {
            self.ticket = None;
        } else {
            self.popped += 1;
            // One writer: this consumer. For whoever goes on in its place, after a hand-over of its own.
            self.words.ticket(self.index).store(self.popped, Relaxed);
        }
    }

    fn look(&self, sequence: u64) -> Look {
        // Cursors and tickets come from memory that others write.
        if sequence >> 63 != 0 {
            return Look::Aborted(self.corrupt());
        }
        let slot = (sequence & self.mask) as u32;
        // Acquire: the payload and the other words are those of this sequence.
        let seq = self.words.descriptor(slot, 0).load(Acquire);
        let abort = self.words.abort().load(Relaxed) as i32;
        if abort != 0 {
            return Look::Aborted(errno(abort));
        }
        // Acquire: `end` and `error` were stored before it.
        let state = self.words.state().load(Acquire);
        if state == state::ABORTED {
            return Look::Aborted(errno(self.words.error().load(Relaxed) as i32));
        }
        if seq == sequence + 1 {
            return self.check(sequence, slot);
        }
        // An earlier sequence of the slot, or none.
        let earlier = seq == 0 || seq <= sequence && (sequence + 1 - seq) & self.mask == 0;
        match state {
            state::OPEN if earlier => Look::NotReady(false),
            state::END if earlier => Look::NotReady(sequence >= self.words.end().load(Relaxed)),
            _ => Look::Aborted(self.corrupt()),
        }
    }

    /// A published sequence, unless what is there makes no sense.
    fn check(&self, sequence: u64, slot: u32) -> Look {
        // Relaxed: seq was acquired, and nobody changes the words before the slot is released.
        let words = std::array::from_fn(|index| match index {
            0 => sequence + 1,
            _ => self.words.descriptor(slot, index).load(Relaxed),
        });
        let descriptor = Descriptor::from_words(words);
        if self.words.epoch().load(Relaxed) != self.epoch {
            return Look::Aborted(libc::ESTALE);
        }
        let bytes = u64::from(descriptor.bytes);
        let inside = bytes <= self.slot_bytes && u64::from(descriptor.data_offset) + bytes <= self.slot_stride;
        match inside && descriptor.status <= 0 {
            true => Look::Ready(Popped { sequence, descriptor }),
            false => Look::Aborted(self.corrupt()),
        }
    }

    /// What is in memory is not the protocol's: everybody is told.
    fn corrupt(&self) -> i32 {
        self.abort(libc::EPROTO);
        libc::EPROTO
    }

    /// The memory belongs to another queue: nothing is written to it.
    fn is_anothers(&self) -> bool {
        self.aborted == libc::ESTALE
    }

    /// This consumer pops nothing more.
    pub(crate) fn give_up(&mut self, errno: i32) -> Outcome {
        self.aborted = errno;
        Outcome::Aborted
    }

    /// Gives a popped slot back. The caller's loads from it are done.
    pub(crate) fn release(&self, sequence: u64) {
        if self.is_anothers() {
            return;
        }
        let slot = (sequence & self.mask) as u32;
        if self.mode == ConsumeMode::Broadcast {
            // `pending` counts down from 0, so zeroed memory is right at first. Acquire and release: the other readers'
            // loads are done before the last one gives the slot back.
            let before = self.words.pending(slot).fetch_sub(1, AcqRel);
            if before != 1u32.wrapping_sub(self.consumers) {
                return;
            }
            // Seen by the slot's next readers: they acquire a seq that the host stores after it acquired `released`.
            self.words.pending(slot).store(0, Relaxed);
        }
        // Release: the loads are done before the host reuses the slot.
        self.words.released(slot).store(sequence + 1, Release);
    }

    /// Gives up: nobody pops anything more.
    pub(crate) fn abort(&self, errno: i32) {
        if self.is_anothers() {
            return;
        }
        let _ = self.words.abort().compare_exchange(0, errno.wrapping_neg() as u32, Release, Relaxed);
    }

    // Tickets. They carry no data, so everything is relaxed: the compare-and-swap alone decides who has one.

    /// A ticket: one that was handed back, or the next.
    fn claim(&mut self) -> u64 {
        let ticket = self.handed_back().unwrap_or_else(|| self.words.claim().fetch_add(1, Relaxed));
        self.ticket = Some(ticket);
        ticket
    }

    fn handed_back(&self) -> Option<u64> {
        if self.words.handed().load(Relaxed) == 0 {
            return None;
        }
        for place in 0..self.consumers {
            let held = self.words.ticket(place).load(Relaxed);
            if held != 0 && self.words.ticket(place).compare_exchange(held, 0, Relaxed, Relaxed).is_ok() {
                self.words.handed().fetch_sub(1, Relaxed);
                return Some(held - 1);
            }
        }
        None
    }

    /// Trades the ticket for a lower one that was handed back. Without this a consumer could wait for ever for a slot
    /// whose last sequence nobody holds.
    fn swap(&mut self, own: u64) -> Option<u64> {
        if self.mode != ConsumeMode::Claimed || self.words.handed().load(Relaxed) == 0 {
            return None;
        }
        for place in 0..self.consumers {
            let held = self.words.ticket(place).load(Relaxed);
            if held != 0
                && held <= own
                && self.words.ticket(place).compare_exchange(held, own + 1, Relaxed, Relaxed).is_ok()
            {
                self.ticket = Some(held - 1);
                return self.ticket;
            }
        }
        None
    }

    /// Gives a ticket that was not popped back, for another consumer. False: none is held, or there is no place for it
    /// (more consumers than the view says).
    pub(crate) fn hand_back(&mut self) -> bool {
        let Some(ticket) = self.ticket.filter(|_| !self.is_anothers()) else { return false };
        let next = ticket.wrapping_add(1);
        let newest = self.words.claim().compare_exchange(next, ticket, Relaxed, Relaxed).is_ok();
        let handed = newest
            || (0..self.consumers).any(|place| {
                let done = self.words.ticket(place).compare_exchange(0, next, Relaxed, Relaxed).is_ok();
                if done {
                    self.words.handed().fetch_add(1, Relaxed);
                }
                done
            });
        if handed {
            self.ticket = None;
        }
        handed
    }

    /// Whether sequence `n` and all before it are in place, by the tail alone. `Err` is END, ABORTED, POISON or TIMEOUT.
    pub(crate) fn look_at_tail(&mut self, n: u64) -> Result<(), Outcome> {
        // Acquire: every payload below the tail is in place, and `first_bad` is told.
        let tail = self.words.tail().load(Acquire);
        let bad = self.words.first_bad().load(Relaxed) <= n;
        if self.words.epoch().load(Relaxed) != self.epoch {
            return Err(self.give_up(libc::ESTALE));
        }
        if tail > n {
            return if bad { Err(Outcome::Poison) } else { Ok(()) };
        }
        let abort = self.words.abort().load(Relaxed) as i32;
        let state = self.words.state().load(Acquire);
        if abort != 0 || state == state::ABORTED {
            let word = if abort != 0 { abort } else { self.words.error().load(Relaxed) as i32 };
            return Err(self.give_up(errno(word)));
        }
        if bad {
            return Err(Outcome::Poison);
        }
        Err(match state {
            state::OPEN => Outcome::Timeout,
            state::END if n >= self.words.end().load(Relaxed) => Outcome::End,
            state::END => Outcome::Timeout,
            _ => self.give_up(self.corrupt()),
        })
    }
}

/// The errno of a word that should hold -errno.
fn errno(word: i32) -> i32 {
    match word.checked_neg() {
        Some(errno @ 1..=4095) => errno,
        _ => libc::EPROTO,
    }
}
