//! What the simulation knows of an io_queue: each sequence's life, and what the shared words must say.

use super::super::harness::{Check, ensure};
use super::super::rng::Rng;
use super::super::sim::Sim;
use super::actors::Actor;
use super::words::RawWords;
use super::{Fault, Setup};
use crate::ingest::{IoQueue, SlotRead};
use crate::uring::{Completion, Flight, ReadPath};
use crate::wire::{ConsumeMode, DESCRIPTOR_CRC32C, DESCRIPTOR_EARLY, Descriptor, NO_SEQUENCE, state};
use std::sync::Arc;

/// The flight's number of a read, or the errno with which it was refused.
pub(super) type Read = std::result::Result<u64, i32>;

/// A sequence that was reserved and whose read was started.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) file: usize,
    /// Of the read, which may begin before the payload.
    pub(super) file_offset: u64,
    pub(super) offset: usize,
    pub(super) len: usize,
    pub(super) slack: u32,
    /// The flight's number; none: it was refused, with this errno.
    pub(super) number: Read,
    /// The driver was told that the read has ended.
    pub(super) told: Option<Completion>,
    pub(super) published: Option<Descriptor>,
    pub(super) popped: u32,
    pub(super) released: u32,
    /// The request that it carries, once its record was taken.
    pub(super) request: Option<u64>,
}

impl Sequence {
    /// Nothing writes to the slot for it any more.
    pub(super) fn landed(&self) -> bool {
        self.number.is_err() || self.told.is_some()
    }

    pub(super) fn early(&self) -> bool {
        self.published.is_some_and(|descriptor| u32::from(descriptor.flags) & DESCRIPTOR_EARLY != 0)
    }

    pub(super) fn held(&self) -> bool {
        self.early() && !self.landed()
    }
}

/// Faults that were asked for, and whether they were done.
#[derive(Debug)]
pub(super) struct Mischief {
    pub(super) fault: Option<Fault>,
    pub(super) fired: bool,
    fuse: u64,
}

impl Mischief {
    pub(super) fn new(fault: Option<Fault>, rng: &mut Rng) -> Self {
        Self { fault, fired: false, fuse: rng.below(5) }
    }

    /// Whether to do it now; once, at an opportunity that the seed chooses.
    pub(super) fn now(&mut self, fault: Fault) -> bool {
        if self.fault != Some(fault) || self.fired {
            return false;
        }
        self.fired = self.fuse == 0;
        self.fuse = self.fuse.saturating_sub(1);
        self.fired
    }
}

/// See the module's text.
pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) queue: Arc<IoQueue>,
    pub(super) words: RawWords,
    pub(super) setup: Setup,
    pub(super) sequences: Vec<Sequence>,
    pub(super) actors: Vec<Option<Actor>>,
    pub(super) mischief: Mischief,
    /// What was found wrong where no error can be returned.
    pub(super) violation: Option<String>,
    /// Sequences without a published descriptor, ascending.
    unpublished: Vec<u64>,
    /// What each slot held when it was published.
    shadows: Vec<Vec<u8>>,
    /// First sequence that is not published, and the lowest failed one below it.
    tail: u64,
    first_bad: u64,
    pub(super) state: u32,
    pub(super) reserved_at_end: Option<u64>,
    /// Errnos that an abort may carry.
    pub(super) abort_causes: Vec<i32>,
    /// The host has aborted: the state must say so at once.
    pub(super) aborted: bool,
    /// An end was asked for.
    pub(super) end_wanted: bool,
    /// Most reads in flight since the last reset of telemetry.
    pub(super) max_in_flight: u64,
    /// Stalls: at most, at least, and the sequences of the last ones counted.
    pub(super) stalls_most: u64,
    pub(super) stalls_least: u64,
    pub(super) stalled_most: Option<u64>,
    pub(super) stalled_least: Option<u64>,
    pub(super) pops: u64,
    pub(super) early: u64,
    pub(super) published: u64,
    pub(super) poisoned: u64,
    bytes: Vec<u8>,
    pub(super) trace: bool,
}

impl World {
    pub(super) fn new(rng: Rng, queue: Arc<IoQueue>, words: RawWords, setup: Setup, mischief: Mischief) -> Self {
        let slots = queue.slots() as usize;
        Self {
            rng,
            words,
            setup,
            sequences: Vec::new(),
            actors: Vec::new(),
            mischief,
            violation: None,
            unpublished: Vec::new(),
            shadows: vec![Vec::new(); slots],
            tail: 0,
            first_bad: NO_SEQUENCE,
            state: state::OPEN,
            reserved_at_end: None,
            abort_causes: Vec::new(),
            aborted: false,
            end_wanted: false,
            max_in_flight: 0,
            stalls_most: 0,
            stalls_least: 0,
            stalled_most: None,
            stalled_least: None,
            pops: 0,
            early: 0,
            published: 0,
            poisoned: 0,
            bytes: Vec::new(),
            trace: false,
            queue,
        }
    }

    pub(super) fn slots(&self) -> u64 {
        u64::from(self.queue.slots())
    }

    /// Releases that give a slot back.
    pub(super) fn readers(&self) -> u32 {
        if self.setup.queue.mode == ConsumeMode::Broadcast { self.setup.queue.consumers } else { 1 }
    }

    pub(super) fn sequence(&self, sequence: u64) -> Option<&Sequence> {
        self.sequences.get(usize::try_from(sequence).ok()?)
    }

    /// Whether the slot of a sequence not reserved yet is free.
    pub(super) fn free(&self, sequence: u64) -> bool {
        let Some(before) = sequence.checked_sub(self.slots()) else { return true };
        self.sequence(before).is_some_and(|before| before.landed() && before.released == self.readers())
    }

    fn free_slots(&self) -> u32 {
        if self.state != state::OPEN {
            return 0;
        }
        let next = self.sequences.len() as u64;
        (next..next + self.slots()).take_while(|&sequence| self.free(sequence)).count() as u32
    }

    // Stalls

    /// The driver may have looked for a slot and found none.
    pub(super) fn note_stall(&mut self, flight: &Flight<'static, Sim<'static>>) {
        let next = self.sequences.len() as u64;
        let blocked = (flight.in_flight() as usize) < self.setup.depth && !self.free(next);
        if blocked && self.stalled_most != Some(next) {
            self.stalled_most = Some(next);
            self.stalls_most += 1;
        }
    }

    /// It certainly has.
    pub(super) fn must_stall(&mut self) {
        let next = self.sequences.len() as u64;
        if self.stalled_least != Some(next) {
            self.stalled_least = Some(next);
            self.stalls_least += 1;
        }
    }

    // Reads

    /// The driver starts a read: into which slot, and may it?
    pub(super) fn begin(&mut self, read: &SlotRead, sim: &Sim<'_>) -> Check {
        self.scan(sim)?;
        let SlotRead { file, file_offset, offset, len, slack, user_data } = read;
        let next = self.sequences.len() as u64;
        ensure!(*user_data == next, "a read for sequence {user_data}, {next} is next");
        ensure!(self.queue.reserved() == next + 1, "{} reserved, a read for {next}", self.queue.reserved());
        ensure!(self.state != state::ABORTED, "a read for {next} after an abort");
        ensure!(self.reserved_at_end.is_none(), "a read for {next} after the end");
        let stride = self.setup.stride as usize;
        let base = (next % self.slots()) as usize * stride;
        ensure!(
            *offset >= base && offset + len <= base + stride,
            "a read of {len} bytes to {offset} leaves the slot at {base}"
        );
        if let Some(before) = next.checked_sub(self.slots()) {
            let last = &self.sequences[before as usize];
            ensure!(last.published.is_some(), "the slot of {before}, which is not published, is filled for {next}");
            ensure!(last.landed(), "the slot of {before}, whose read has not ended, is filled for {next}");
            ensure!(
                last.released == self.readers(),
                "the slot of {before}, released by {} of {}, is filled for {next}",
                last.released,
                self.readers()
            );
            self.check_shadow(before)?;
        }
        let known = sim.files.iter().position(|known| known.id == file.index());
        let slot = (next % self.slots()) as usize;
        self.shadows[slot].clear();
        self.sequences.push(Sequence {
            file: known.ok_or("a read of an unknown file")?,
            file_offset: *file_offset,
            offset: *offset,
            len: *len,
            slack: *slack,
            number: Err(0),
            told: None,
            published: None,
            popped: 0,
            released: 0,
            request: None,
        });
        self.unpublished.push(next);
        let reading = self.unpublished.len() as u64;
        self.max_in_flight = self.max_in_flight.max(reading);
        Ok(())
    }

    /// The driver is told that a read has ended.
    pub(super) fn ended(&mut self, completion: &Completion) -> Check {
        let number = completion.sequence;
        let sequence = self.sequences.get_mut(completion.user_data as usize).ok_or("an unknown read ended")?;
        ensure!(sequence.number == Ok(number), "the read of {} has another number", completion.user_data);
        ensure!(sequence.told.is_none(), "the read of {} ended twice", completion.user_data);
        sequence.told = Some(*completion);
        Ok(())
    }

    // Publication

    /// Looks for sequences that were published, and checks each.
    pub(super) fn scan(&mut self, sim: &Sim<'_>) -> Check {
        let mut index = 0;
        while index < self.unpublished.len() {
            let sequence = self.unpublished[index];
            let seq = self.words.seq(sequence);
            if seq == sequence + 1 {
                self.unpublished.remove(index);
                self.publication(sequence, sim).map_err(|what| {
                    format!("{what}: {:?} for {:?}", self.words.descriptor(sequence), self.sequences[sequence as usize])
                })?;
                continue;
            }
            let before = (sequence + 1).saturating_sub(self.slots());
            ensure!(seq == before, "seq of sequence {sequence}'s slot is {seq}");
            index += 1;
        }
        let tail = self.unpublished.first().copied().unwrap_or(self.sequences.len() as u64);
        for sequence in self.tail..tail {
            let bad = self.sequences[sequence as usize].published.is_some_and(|descriptor| descriptor.status != 0);
            if bad && self.first_bad == NO_SEQUENCE {
                self.first_bad = sequence;
            }
        }
        self.tail = tail;
        Ok(())
    }

    fn publication(&mut self, number: u64, sim: &Sim<'_>) -> Check {
        let found = self.words.descriptor(number);
        let sequence = &mut self.sequences[number as usize];
        sequence.published = Some(found);
        let Descriptor { status, bytes, file_offset, data_offset, .. } = found;
        let flags = u32::from(found.flags);
        let early = sequence.early();
        ensure!(found.reserved == [0, 0] && found.nvme_status == 0, "words that should be zero are not");
        ensure!(flags & !(DESCRIPTOR_CRC32C | DESCRIPTOR_EARLY) == 0, "unknown flags");
        ensure!(bytes <= self.setup.queue.slot_bytes, "more bytes than a slot takes");
        ensure!(u64::from(data_offset) % 16 == file_offset % 16, "data offset and file offset differ modulo 16");
        let end = (u64::from(data_offset) + u64::from(bytes)).next_multiple_of(16);
        ensure!(end <= self.setup.stride, "the payload's enclosing 16-byte range leaves the slot");
        // Where the read put the payload is where the descriptor says it is.
        let lead = file_offset.checked_sub(sequence.file_offset).ok_or("the payload begins before its read")?;
        let base = (number % u64::from(self.queue.slots())) * self.setup.stride;
        ensure!(sequence.offset as u64 + lead == base + u64::from(data_offset), "the payload lies elsewhere");
        ensure!(
            lead + u64::from(bytes) + u64::from(sequence.slack) <= sequence.len as u64,
            "more bytes than were read"
        );
        ensure!(early != sequence.landed(), "early, or not, and its read has ended, or not");
        self.published += 1;
        self.poisoned += u64::from(status != 0);
        if early {
            self.early += 1;
            ensure!(matches!(-status, libc::ETIMEDOUT | libc::ECANCELED), "poisoned early for no reason");
            ensure!(bytes == 0 && found.crc32c == 0 && found.path == 0, "an early poison with a payload");
            ensure!(flags & DESCRIPTOR_CRC32C == 0, "a checksum of what nobody has read");
            return Ok(());
        }
        let path = match sequence.number {
            Err(errno) => {
                ensure!(status == -errno && bytes == 0, "the read was refused with {errno}");
                ReadPath::None
            }
            Ok(read) => {
                let attempt = &sim.attempts[read as usize];
                let told = sequence.told.unwrap_or_default();
                let want = sequence.len as u64 - u64::from(sequence.slack);
                match status {
                    0 => ensure!(attempt.landed >= want, "{} of {want} bytes have landed", attempt.landed),
                    _ => ensure!(status == told.status, "the read ended with {}", told.status),
                }
                let reaches = attempt.landed.saturating_sub(lead).min(want - lead);
                let landed = if matches!(-status, 0 | libc::ENODATA) { reaches } else { 0 };
                ensure!(u64::from(bytes) == landed, "{landed} bytes are in place");
                match (attempt.plain, attempt.registered) {
                    (true, _) => ReadPath::PlainRead,
                    (_, true) => ReadPath::RegisteredRead,
                    _ => ReadPath::None,
                }
            }
        };
        ensure!(found.path == path as u16, "the path was {path:?}");
        let file = &sim.files[sequence.file];
        // Of a file that was cut off meanwhile only what is left is certain to be a prefix.
        let exact = match status {
            0 => u64::from(bytes),
            _ => u64::from(bytes).min(file.size_at(sim.clock()).saturating_sub(file_offset)),
        };
        self.bytes.resize(exact as usize, 0);
        file.content(file_offset, &mut self.bytes);
        let slot = self.words.slot(number);
        let payload = &slot[data_offset as usize..][..bytes as usize];
        ensure!(payload[..exact as usize] == self.bytes[..], "wrong bytes");
        let checked = self.setup.crc32c && bytes > 0;
        ensure!((flags & DESCRIPTOR_CRC32C != 0) == checked, "a checksum is there, or not");
        ensure!(found.crc32c == if checked { crc32c::crc32c(payload) } else { 0 }, "a wrong checksum");
        let shadow = &mut self.shadows[(number % u64::from(self.queue.slots())) as usize];
        shadow.clear();
        shadow.extend_from_slice(slot);
        Ok(())
    }

    /// A slot is what it was when its sequence was published, unless that was early.
    pub(super) fn check_shadow(&self, number: u64) -> Check {
        let sequence = &self.sequences[number as usize];
        if sequence.early() || sequence.published.is_none() {
            return Ok(());
        }
        let shadow = &self.shadows[(number % self.slots()) as usize];
        ensure!(self.words.slot(number) == &shadow[..], "the slot of {number} was written to after its publication");
        let found = self.words.descriptor(number);
        ensure!(Some(found) == sequence.published, "the descriptor of {number} has become {found:?}");
        Ok(())
    }

    /// All slots whose last sequence is published.
    pub(super) fn check_shadows(&self) -> Check {
        let reserved = self.sequences.len() as u64;
        (reserved.saturating_sub(self.slots())..reserved).try_for_each(|number| self.check_shadow(number))
    }

    // Words

    /// The control block against what is known.
    pub(super) fn look(&mut self, sim: &Sim<'_>) -> Check {
        self.scan(sim)?;
        let reserved = self.sequences.len() as u64;
        ensure!(self.queue.reserved() == reserved, "{} reserved, {reserved} started", self.queue.reserved());
        let (tail, bad) = (self.words.tail(), self.words.first_bad());
        ensure!(tail == self.tail && self.queue.tail() == tail, "the tail is {tail}, {} is due", self.tail);
        ensure!(bad == self.first_bad, "first_bad is {bad}, {} is due", self.first_bad);
        let (before, now) = (self.state, self.words.state());
        self.state = now;
        match (before, now) {
            (state::OPEN, state::OPEN) => ensure!(!self.aborted, "aborted, and the state says open"),
            (state::OPEN, state::END) => {
                ensure!(self.end_wanted, "an end that nobody announced");
                ensure!(self.words.end() == reserved, "the end is {}, {reserved} are reserved", self.words.end());
                self.reserved_at_end = Some(reserved);
            }
            (state::END, state::END) => {
                ensure!(!self.aborted, "aborted, and the state says end");
                ensure!(Some(reserved) == self.reserved_at_end, "sequences after the end");
                ensure!(self.words.end() == reserved, "the end has moved");
            }
            (state::OPEN | state::END, state::ABORTED) => {
                let errno = -self.words.error();
                ensure!(self.abort_causes.contains(&errno), "aborted with {errno}: {:?}", self.abort_causes);
                self.abort_causes = vec![errno];
                self.aborted = true;
            }
            (state::ABORTED, state::ABORTED) => {
                let error = self.words.error();
                ensure!(self.abort_causes == [-error], "the abort's error has become {error}");
            }
            _ => return Err(format!("the state went from {before} to {now}")),
        }
        let free = self.queue.free_slots();
        ensure!(free == self.free_slots(), "{free} free slots, {} are due", self.free_slots());
        Ok(())
    }

    /// The host gives up.
    pub(super) fn host_abort(&mut self, errno: i32) -> Check {
        let before = self.words.state();
        if before != state::ABORTED {
            self.abort_causes = vec![errno];
        }
        let first = self.queue.abort(errno);
        ensure!(first == (before != state::ABORTED), "abort said {first} in state {before}");
        self.aborted = true;
        Ok(())
    }

    /// From now on an abort may carry this errno, unless there was one.
    pub(super) fn may_abort(&mut self, errno: i32) {
        if !self.aborted {
            self.abort_causes.push(errno);
        }
    }

    pub(super) fn all_published(&self) -> bool {
        self.unpublished.is_empty()
    }
}
