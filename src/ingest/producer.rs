//! The host's side of the io_queue protocol: which sequence may have a slot, how one is published, and who tells the tail.
//!
//! Free of `unsafe` and generic over [`Words`]. Any number of threads may reserve and publish; none waits for another.

use super::words::{Word, Words};
use crate::wire::{Descriptor, NO_SEQUENCE, state};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// In a mark's `published`: the sequence failed. Sequences stay below it.
const BAD: u64 = 1 << 63;

/// In `next`: nothing is reserved any more.
const CLOSED: u64 = 1 << 63;

/// Why no sequence could be reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The slot's consumers have not released it.
    NoCredit,
    /// The slot is released, but a read that was given up may still write to it, or the tail has not passed it yet.
    Held,
    /// The end was announced.
    Ended,
    /// One side gave up, with this errno.
    Aborted(i32),
}

/// What the host knows of a slot: its own account, never read back from shared memory.
struct Mark<W: Words> {
    /// Of the sequence n that has the slot: 2n while reserved, 2n + 1 once somebody publishes it.
    stage: W::U64,
    /// n + 1 once n is published, with `BAD` for a failed one.
    published: W::U64,
    /// n + 1 once no agent can write to the slot for n any more.
    landed: W::U64,
}

/// See the module's text.
pub(crate) struct Producer<W: Words> {
    words: W,
    mask: u64,
    marks: Box<[Mark<W>]>,
    /// Next sequence to reserve, with `CLOSED` once the end was announced: so that no reservation slips in beside it.
    next: W::U64,
    /// First sequence not published: what the tail word holds. Written by the tail's owner.
    tail: W::U64,
    /// The first failed sequence has been told. Written by the tail's owner: 0 or 1.
    bad_told: W::U32,
    /// What the state word holds. Written by the tail's owner.
    state_told: W::U32,
    /// Errno of an abort, 0 before.
    aborted: W::U32,
    /// Changes that the tail's owner has not yet looked at, the owner's own included; 0: nobody owns the tail.
    changes: W::U32,
}

impl<W: Words> Producer<W> {
    /// A producer at sequence `first`: 0, or anything a test wants. Sets up the words that move, before any consumer looks.
    pub(crate) fn new(words: W, slot_count: u32, first: u64) -> Self {
        debug_assert!(slot_count.is_power_of_two());
        words.tail().store(first, Relaxed);
        words.first_bad().store(NO_SEQUENCE, Relaxed);
        words.error().store(0, Relaxed);
        words.end().store(0, Relaxed);
        words.state().store(state::OPEN, Release);
        let mask = u64::from(slot_count) - 1;
        let mark = |slot: u64| {
            // The last sequence before `first` that lived in the slot, had it been there.
            let before = (first + slot.wrapping_sub(first) % u64::from(slot_count)).wrapping_sub(u64::from(slot_count));
            let over = before.wrapping_add(1);
            words.released(slot as u32).store(if over > first { 0 } else { over }, Relaxed);
            Mark {
                stage: W::U64::new(before.wrapping_mul(2).wrapping_add(1)),
                published: W::U64::new(over & !BAD),
                landed: W::U64::new(over),
            }
        };
        Self {
            mask,
            marks: (0..u64::from(slot_count)).map(mark).collect(),
            next: W::U64::new(first),
            tail: W::U64::new(first),
            bad_told: W::U32::new(0),
            state_told: W::U32::new(state::OPEN),
            aborted: W::U32::new(0),
            changes: W::U32::new(0),
            words,
        }
    }

    #[inline(always)]
    fn slot(&self, sequence: u64) -> u32 {
        (sequence & self.mask) as u32
    }

    #[inline(always)]
    fn mark(&self, sequence: u64) -> &Mark<W> {
        &self.marks[self.slot(sequence) as usize]
    }

    /// Sequences, from the first on, that are published.
    pub(crate) fn tail(&self) -> u64 {
        self.tail.load(Acquire)
    }

    /// Sequences reserved so far.
    pub(crate) fn reserved(&self) -> u64 {
        self.next.load(Relaxed) & !CLOSED
    }

    /// Why nothing can be reserved any more, if so.
    pub(crate) fn closed(&self) -> Option<Refusal> {
        match self.aborted.load(Acquire) {
            0 => (self.next.load(Relaxed) & CLOSED != 0).then_some(Refusal::Ended),
            errno => Some(Refusal::Aborted(errno as i32)),
        }
    }

    /// Takes the next sequence, once its slot is free: the consumers of its last sequence have released it, and nothing
    /// can still write to it.
    #[inline]
    pub(crate) fn reserve(&self) -> Result<u64, Refusal> {
        loop {
            if let Some(refusal) = self.closed() {
                return Err(refusal);
            }
            let sequence = self.reserved();
            if let Err(refusal) = self.free(sequence) {
                // Somebody else may have taken the sequence since, and its slot may have moved on; what told so was
                // acquired, so this load sees that `next` moved.
                if self.reserved() != sequence {
                    continue;
                }
                if let Refusal::Aborted(errno) = refusal {
                    self.abort(errno);
                }
                return Err(refusal);
            }
            // Only a reservation makes a free slot unfree, and that moves `next`. Relaxed: what must come before the new
            // writes, `free` has acquired.
            if self.next.compare_exchange(sequence, sequence + 1, Relaxed, Relaxed).is_ok() {
                self.mark(sequence).stage.store(sequence << 1, Relaxed);
                return Ok(sequence);
            }
        }
    }

    /// Whether the slot for a sequence is free. `Aborted`: its consumers broke the protocol, unless the sequence was taken
    /// meanwhile.
    #[inline]
    fn free(&self, sequence: u64) -> Result<(), Refusal> {
        // The tail's owner may lag: while it has not passed the slot's last sequence, its mark must stay.
        if sequence.wrapping_sub(self.tail.load(Acquire)) > self.mask {
            return match self.released(sequence) {
                Released::Before => Err(Refusal::NoCredit),
                _ => Err(Refusal::Held),
            };
        }
        match self.released(sequence) {
            Released::Last => {}
            Released::Before => return Err(Refusal::NoCredit),
            Released::Nonsense => return Err(Refusal::Aborted(libc::EPROTO)),
        }
        // Acquire: the last writes to the slot are over before the next ones begin.
        let last = sequence.wrapping_sub(self.mask);
        if self.mark(sequence).landed.load(Acquire) == last { Ok(()) } else { Err(Refusal::Held) }
    }

    /// Whether the next sequence could be reserved now.
    pub(crate) fn has_free(&self) -> bool {
        self.free(self.reserved()).is_ok()
    }

    /// Sequences that could be reserved now, one after the other.
    pub(crate) fn free_slots(&self) -> u32 {
        let next = self.reserved();
        if self.closed().is_some() {
            return 0;
        }
        (0..=self.mask).take_while(|&ahead| self.free(next + ahead).is_ok()).count() as u32
    }

    /// How far the consumers are with the slot of a sequence.
    #[inline(always)]
    fn released(&self, sequence: u64) -> Released {
        // The slot's last sequence, plus one; 0 or a wrapped number when it had none.
        let last = sequence.wrapping_sub(self.mask);
        // Acquire: the consumers' last look at the slot is over before anything writes to it again.
        let released = self.words.released(self.slot(sequence)).load(Acquire);
        let first = sequence <= self.mask;
        if released == if first { 0 } else { last } {
            return Released::Last;
        }
        let earlier = released < last && (released == 0 || (last - released) & self.mask == 0);
        if earlier && !first { Released::Before } else { Released::Nonsense }
    }

    /// Publishes a reserved sequence whose every byte is in place, or that failed; nothing can write to its slot any
    /// more. False: it was not reserved, or published already.
    #[inline]
    pub(crate) fn publish(&self, sequence: u64, descriptor: &Descriptor) -> bool {
        let published = self.claim(sequence) && self.announce(sequence, descriptor, true);
        self.changed();
        published
    }

    /// The same by the only one who knows the sequence, and the tail does not move before the caller's next
    /// [`settle`](Self::settle): one for many.
    #[inline]
    pub(crate) fn publish_untold(&self, sequence: u64, descriptor: &Descriptor) -> bool {
        let stage = &self.mark(sequence).stage;
        if stage.load(Relaxed) != sequence << 1 {
            return false;
        }
        stage.store(sequence << 1 | 1, Relaxed);
        self.announce(sequence, descriptor, true)
    }

    /// Has the tail follow what was published.
    #[inline]
    pub(crate) fn settle(&self) {
        self.changed();
    }

    /// Publishes a reserved sequence as failed while its read may still write to the slot, which stays taken until
    /// [`land`](Self::land). False: it was not reserved, or published already.
    pub(crate) fn poison_early(&self, sequence: u64, descriptor: &Descriptor) -> bool {
        debug_assert!(descriptor.status < 0);
        let published = self.claim(sequence) && self.announce(sequence, descriptor, false);
        self.changed();
        published
    }

    /// The read of a sequence that was poisoned early has ended.
    pub(crate) fn land(&self, sequence: u64) {
        // Release: its writes are over before the slot is taken again.
        self.mark(sequence).landed.store(sequence + 1, Release);
    }

    /// Whether the caller is to publish a sequence: of those who try, one is.
    #[inline(always)]
    fn claim(&self, sequence: u64) -> bool {
        let reserved = sequence << 1;
        // Relaxed: it orders nothing else.
        self.mark(sequence).stage.compare_exchange(reserved, reserved | 1, Relaxed, Relaxed).is_ok()
    }

    #[inline(always)]
    fn announce(&self, sequence: u64, descriptor: &Descriptor, landed: bool) -> bool {
        let mark = self.mark(sequence);
        let slot = self.slot(sequence);
        let words = descriptor.to_words();
        // The last two words are zero for ever.
        for (index, &word) in words.iter().enumerate().take(6).skip(1) {
            self.words.descriptor(slot, index).store(word, Relaxed);
        }
        if landed {
            mark.landed.store(sequence + 1, Release);
        }
        // Release: whoever loads this seq by acquire sees the words above and the payload. The payload's last writer is
        // this thread, or the kernel or a device whose completion this thread has acquired.
        self.words.publish_barrier();
        self.words.descriptor(slot, 0).store(sequence + 1, Release);
        let bad = if descriptor.status == 0 { 0 } else { BAD };
        // Release: the tail's owner, who acquires the mark, stores the tail after all of it.
        mark.published.store((sequence + 1) | bad, Release);
        true
    }

    /// Announces that no sequence follows those reserved, which stay to be published. False: it was announced or aborted
    /// before.
    pub(crate) fn finish(&self) -> bool {
        let mut next = self.next.load(Relaxed);
        while next & CLOSED == 0 && self.aborted.load(Relaxed) == 0 {
            match self.next.compare_exchange(next, next | CLOSED, Relaxed, Relaxed) {
                Ok(_) => {
                    self.changed();
                    return true;
                }
                Err(now) => next = now,
            }
        }
        false
    }

    /// Gives up with an errno: consumers pop nothing more. False: somebody else did before.
    pub(crate) fn abort(&self, errno: i32) -> bool {
        let first = self.aborted.compare_exchange(0, errno.max(1) as u32, Release, Relaxed).is_ok();
        if first {
            self.changed();
        }
        first
    }

    /// Looks whether a consumer gave up, and gives up too. The errno of an abort by either side, 0 without.
    #[inline]
    pub(crate) fn check_abort(&self) -> i32 {
        let ours = self.aborted.load(Relaxed) as i32;
        if ours != 0 {
            return ours;
        }
        let theirs = self.words.abort().load(Acquire) as i32;
        if theirs == 0 {
            return 0;
        }
        self.abort(match theirs.checked_neg() {
            Some(errno @ 1..=4095) => errno,
            _ => libc::EPROTO,
        });
        self.aborted.load(Relaxed) as i32
    }

    /// Has the control block's tail and state lines brought up to date: by this thread, or by the one that is at it.
    ///
    /// Who moves `changes` off 0 owns the tail until it moves it back, which fails while there are changes that it has
    /// not counted. So every change is looked at by somebody after it was made, nobody waits, and both lines have one
    /// writer at a time. Acquire and release on `changes` hand over from one owner to the next, and from each change to
    /// the owner that looks at it.
    #[inline]
    fn changed(&self) {
        if self.changes.fetch_add(1, AcqRel) != 0 {
            return;
        }
        let mut counted = 1;
        loop {
            self.tell();
            match self.changes.compare_exchange(counted, 0, AcqRel, Acquire) {
                Ok(_) => return,
                Err(now) => counted = now,
            }
        }
    }

    /// Brings the tail and state lines up to date. Only the tail's owner.
    #[inline]
    fn tell(&self) {
        let before = self.tail.load(Relaxed);
        let mut tail = before;
        loop {
            // Acquire: pairs with the mark's store, so that the tail below is stored after the sequence's bytes.
            let published = self.mark(tail).published.load(Acquire);
            if published & !BAD != tail + 1 {
                break;
            }
            if published & BAD != 0 && self.bad_told.load(Relaxed) == 0 {
                self.bad_told.store(1, Relaxed);
                // Before the tail that passes it.
                self.words.first_bad().store(tail, Relaxed);
            }
            tail += 1;
        }
        if tail != before {
            self.words.publish_barrier();
            // Release: everything below the tail, and `first_bad`, is in place for whoever acquires it.
            self.words.tail().store(tail, Release);
            // Release: a thread that reserves beyond may change the marks only after they were looked at.
            self.tail.store(tail, Release);
        }
        let told = self.state_told.load(Relaxed);
        let errno = self.aborted.load(Acquire);
        if errno != 0 && told != state::ABORTED {
            self.words.error().store(errno.wrapping_neg(), Relaxed);
            self.tell_state(state::ABORTED);
        } else if told == state::OPEN {
            let next = self.next.load(Relaxed);
            if next & CLOSED != 0 {
                self.words.end().store(next & !CLOSED, Relaxed);
                self.tell_state(state::END);
            }
        }
    }

    fn tell_state(&self, value: u32) {
        self.state_told.store(value, Relaxed);
        self.words.publish_barrier();
        // Release: `end` and `error` come before it.
        self.words.state().store(value, Release);
    }
}

enum Released {
    /// The slot's last sequence was released, or there was none.
    Last,
    /// An earlier one was.
    Before,
    /// No consumer that keeps to the protocol stores this.
    Nonsense,
}
