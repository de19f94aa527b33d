//! A kernel in virtual time: a [`Queue`] whose every choice comes from a seed.
//!
//! It keeps what io_uring promises and no more: commands are consumed from a bounded submission queue, finish in any
//! order, read less than asked, fail, are or are not cancelled; completions may need an `enter` to appear, and those
//! beyond the completion queue's capacity wait for one. Bytes reach the target at some moment between submission and
//! completion, sometimes after garbage, and a short or failed read may leave garbage in the rest of its range.
//!
//! It also keeps the books that the harness compares the flight with: which bytes and errnos were delivered to which
//! submission, and so which tail is due.

use super::rng::{Rng, mix};
use crate::memory::{GpuMappedBuffer, Region};
use crate::sys::Errno;
use crate::uring::{BounceSlot, BufferEntry, Command, DirectAlignment, Op, Queue, Reaped, Segment, TailWord, Target};
use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Calls of the queue in one step of the harness, beyond which the flight spins.
const MAX_CALLS: u32 = 200_000;

/// Reads that ended inside a block, before the bytes wanted of it, after which that counts as the end of the file.
const LOOKS: u8 = 3;

/// What a stray write leaves; shorter than the gap between destinations.
const STRAY: [u8; 6] = [0xa5, 0x5a, 0xa5, 0x5a, 0xa5, 0x5a];

/// A file of the simulated disk.
#[derive(Debug, Clone)]
pub(super) struct SimFile {
    /// What `FileRef::index` gives.
    pub(super) id: u32,
    pub(super) key: u64,
    pub(super) size: u64,
    /// The size from a moment on.
    pub(super) truncated: Option<(u64, u64)>,
    pub(super) direct: Option<DirectAlignment>,
    /// O_DIRECT, and the flight does not know before the first EINVAL.
    pub(super) late: bool,
    /// Reads that touch it fail with EIO.
    pub(super) bad: Range<u64>,
}

impl SimFile {
    pub(super) fn size_at(&self, now: u64) -> u64 {
        match self.truncated {
            Some((at, size)) if at <= now => size,
            _ => self.size,
        }
    }

    /// The file's bytes from `offset` on: a pure function of file and position.
    pub(super) fn content(&self, offset: u64, out: &mut [u8]) {
        let (mut at, mut done) = (offset, 0);
        while done < out.len() {
            let word = mix(self.key ^ (at >> 3)).to_le_bytes();
            let from = (at & 7) as usize;
            let count = (8 - from).min(out.len() - done);
            out[done..done + count].copy_from_slice(&word[from..from + count]);
            done += count;
            at += count as u64;
        }
    }
}

/// A deliberate fault of the simulator, of which the checks must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mutation {
    ShortAsFull,
    LostCompletion,
    DuplicateCompletion,
    MissingData,
    StrayByte,
    WrongByte,
    EarlyTail,
    TailGoesBack,
    KeptMemory,
    FalseEndOfFile,
}

/// How the kernel of one seed behaves. Chances are per mille.
#[derive(Debug, Clone)]
pub(super) struct Nature {
    pub(super) sq_entries: usize,
    pub(super) cq_entries: usize,
    /// Most commands in the kernel.
    pub(super) commands: usize,
    /// Completions appear in an `enter` only.
    pub(super) deferred: bool,
    pub(super) readv_fixed: bool,
    /// The bounce buffer can be registered.
    pub(super) adopts: bool,
    pub(super) short: u64,
    pub(super) interrupted: u64,
    pub(super) again: u64,
    pub(super) error: u64,
    pub(super) garbage: u64,
    pub(super) enter_fails: u64,
    pub(super) cancel_works: u64,
    /// Typical service time of a command, ns.
    pub(super) service: u64,
}

/// What the flight has been told of one submission since it was last launched, and what it is to read.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    pub(super) file: usize,
    pub(super) file_offset: u64,
    pub(super) region: u64,
    pub(super) segments: Vec<Segment>,
    pub(super) requested: u64,
    /// Bytes at the end that may be missing.
    pub(super) slack: u32,
    pub(super) skipped: bool,
    pub(super) landed: u64,
    pub(super) bounced: u64,
    pub(super) errors: Vec<Errno>,
    /// Commands that read less than asked and had to be continued.
    pub(super) short: u64,
    pub(super) plain: bool,
    pub(super) registered: bool,
}

impl Attempt {
    pub(super) fn whole(&self) -> bool {
        self.landed == self.requested
    }

    pub(super) fn relaunch(&mut self) {
        self.landed = 0;
        self.bounced = 0;
        self.errors.clear();
        (self.plain, self.registered) = (false, false);
    }
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Full,
    Short(u64),
    Fail(Errno),
}

#[derive(Debug)]
struct Live {
    op: Box<Op>,
    outcome: Outcome,
    /// The CQE's result once the data was moved.
    result: i32,
    /// Bytes that really were moved: `result` unless it is an errno or a lie.
    moved: i32,
    flying: bool,
    moved_yet: bool,
    done: bool,
}

#[derive(Debug, Clone, Copy)]
enum Sqe {
    Read(usize),
    Cancel(usize, u32),
}

#[derive(Debug, Clone, Copy)]
enum Cqe {
    Read(usize),
    Cancel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Garbage,
    Data,
    Done,
    CancelDone,
}

/// Time, command, its generation, what happens.
type Event = Reverse<(u64, usize, u32, Stage)>;

/// See the module's text.
pub(super) struct Sim<'a> {
    pub(super) nature: Nature,
    pub(super) files: Vec<SimFile>,
    pub(super) attempts: Vec<Attempt>,
    pub(super) violation: Option<String>,
    /// Errors that `enter` has answered.
    pub(super) enter_errors: u64,
    pub(super) commands: u64,
    pub(super) completions: u64,
    pub(super) strict: bool,
    pub(super) mutation: Option<Mutation>,
    pub(super) fired: bool,
    pub(super) trace: bool,
    fuse: u64,
    errors_in_a_row: u32,
    rng: Rng,
    tail: TailWord<'a>,
    /// First submission that is neither whole nor skipped.
    prefix: usize,
    /// The tail that was due before the completion reaped last.
    settled: u64,
    now: Cell<u64>,
    calls: Cell<u32>,
    slots: Vec<(u32, Option<Live>)>,
    free: Vec<usize>,
    sq: VecDeque<Sqe>,
    cq: VecDeque<Cqe>,
    /// Beyond the completion queue's capacity.
    backlog: VecDeque<Cqe>,
    /// Done, and waiting for an `enter` to say so.
    deferred: VecDeque<Cqe>,
    events: BinaryHeap<Event>,
    cancels: usize,
    duplicate: Option<Reaped>,
    /// The bounce buffer, once the flight gave it up.
    released: Option<Target>,
    scratch: Vec<u8>,
}

impl<'a> Sim<'a> {
    pub(super) fn new(rng: Rng, nature: Nature, files: Vec<SimFile>, tail: TailWord<'a>) -> Self {
        let commands = nature.commands;
        let mut rng = rng;
        Self {
            nature,
            files,
            attempts: Vec::new(),
            violation: None,
            enter_errors: 0,
            commands: 0,
            completions: 0,
            strict: false,
            mutation: None,
            fired: false,
            trace: false,
            fuse: rng.below(6),
            errors_in_a_row: 0,
            rng,
            tail,
            prefix: 0,
            settled: 0,
            now: Cell::new(0),
            calls: Cell::new(0),
            slots: std::iter::repeat_with(|| (0, None)).take(commands).collect(),
            free: (0..commands).rev().collect(),
            sq: VecDeque::new(),
            cq: VecDeque::new(),
            backlog: VecDeque::new(),
            deferred: VecDeque::new(),
            events: BinaryHeap::new(),
            cancels: 0,
            duplicate: None,
            released: None,
            scratch: Vec::new(),
        }
    }

    pub(super) fn violate(&mut self, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(what());
        }
    }

    /// Everything works, if only in pieces and late.
    pub(super) fn be_gentle(&mut self) {
        self.nature =
            Nature { interrupted: 0, again: 0, error: 0, enter_fails: 0, adopts: true, ..self.nature.clone() };
        for file in &mut self.files {
            (file.truncated, file.bad) = (None, 0..0);
        }
    }

    /// A new step of the harness begins: its calls are counted anew.
    pub(super) fn begin_step(&mut self) {
        self.calls.set(0);
    }

    /// Nanoseconds.
    pub(super) fn clock(&self) -> u64 {
        self.now.get()
    }

    /// Lets time pass outside the flight.
    pub(super) fn pass(&mut self, nanoseconds: u64) {
        self.run_until(self.clock() + nanoseconds);
    }

    pub(super) fn read_tail(&self) -> u64 {
        match &self.tail {
            TailWord::U32(word) => word.load(Ordering::Acquire).into(),
            TailWord::U64(word) => word.load(Ordering::Acquire),
            TailWord::Line(line) => line.words().tail.load(Ordering::Acquire),
            TailWord::None => 0,
        }
    }

    fn write_tail(&self, tail: u64) {
        match &self.tail {
            TailWord::U32(word) => word.store(tail as u32, Ordering::Release),
            TailWord::U64(word) => word.store(tail, Ordering::Release),
            TailWord::Line(line) => line.words().tail.store(tail, Ordering::Release),
            TailWord::None => {}
        }
    }

    /// The tail that is due: everything before it was delivered whole or was skipped.
    pub(super) fn due_tail(&mut self) -> u64 {
        while self.attempts.get(self.prefix).is_some_and(|attempt| attempt.whole() || attempt.skipped) {
            self.prefix += 1;
        }
        self.prefix as u64
    }

    /// Whether a mutation is to be done now; each is done once, at an opportunity that the seed chooses.
    fn mutate(&mut self, mutation: Mutation) -> bool {
        if self.mutation != Some(mutation) || self.fired {
            return false;
        }
        self.fired = self.fuse == 0;
        self.fuse = self.fuse.saturating_sub(1);
        self.fired
    }

    /// Every call costs time, and too many in one step are a hang. The unwinding passes the panic hook by: the harness
    /// catches and reports it.
    fn tick(&self) {
        self.now.set(self.now.get() + 40);
        self.calls.set(self.calls.get() + 1);
        if self.calls.get() > MAX_CALLS {
            std::panic::resume_unwind(Box::new(format!("hang: {MAX_CALLS} calls of the queue in one step")));
        }
    }

    /// Commands that the kernel has, cancellations included.
    pub(super) fn in_kernel_now(&self) -> usize {
        self.reads() + self.cancels
    }

    pub(super) fn reads(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn check_tail(&mut self) {
        if matches!(self.tail, TailWord::None) {
            return;
        }
        // The flight may still be about to count the completion that it reaped last.
        let (settled, due, published) = (self.settled, self.due_tail(), self.read_tail());
        if !(settled..=due).contains(&published) {
            self.violate(|| format!("tail {published} is published in mid-step, {settled} to {due} is due"));
        }
    }

    // Commands

    /// What the real kernel would refuse, and what it would not but the caller would not like.
    fn check_push(&mut self, op: &Op, segments: &[Segment]) {
        if let Some(what) = self.objection(op, segments) {
            self.violate(|| format!("{what}: {op:?}"));
        }
    }

    fn objection(&self, op: &Op, segments: &[Segment]) -> Option<&'static str> {
        let Some(attempt) = self.attempts.get(op.sequence as usize) else {
            return Some("command of an unknown submission");
        };
        if attempt.skipped || op.sequence < self.read_tail() {
            return Some("command of a submission that the tail covers");
        }
        if op.remaining == 0 || op.target.region().address(0) != attempt.region {
            return Some("command without bytes or into another region");
        }
        if self.files.get(attempt.file).is_none_or(|file| file.id != op.file.index()) {
            return Some("command reads another file");
        }
        match &op.command {
            Command::Direct { len, slot } => {
                let len = *len as usize;
                if len == 0 || len > op.remaining {
                    return Some("direct command of a wrong length");
                }
                let registered = op.target.slot(op.target_offset);
                if *slot != registered.map(|(slot, _)| slot) || registered.is_some_and(|(_, reach)| len > reach) {
                    return Some("direct command leaves its registration");
                }
                self.place_objection(attempt, op, len)
            }
            Command::Bounce { file_offset, len, skip, want, slot } => {
                let (len, skip, want) = (*len as usize, *skip as usize, *want as usize);
                if want == 0 || want > op.remaining || skip + want > len || file_offset + skip as u64 != op.file_offset
                {
                    return Some("bounce command of a wrong length");
                }
                let lent = |live: &Live| matches!(&live.op.command, Command::Bounce { slot: other, .. } if overlap(slot, other, len));
                if self.slots.iter().filter_map(|(_, live)| live.as_ref()).any(lent) {
                    return Some("bounce slot lent twice");
                }
                let leaves = slot.registration().is_none() && op.target.slot(op.target_offset).is_some();
                if self.strict && leaves {
                    return Some("strict, and bounced through unregistered memory");
                }
                if slot.offset() + len > slot.pool.region().len() {
                    return Some("bounce command outside the bounce buffer");
                }
                self.place_objection(attempt, op, want)
            }
            Command::Vectored { slot } => {
                let whole = op.file_offset == attempt.file_offset && op.remaining as u64 == attempt.requested;
                if segments != attempt.segments || !whole {
                    return Some("vectored command of other segments");
                }
                let within = |&(at, len): &Segment| {
                    op.target.slot(at).is_some_and(|(index, reach)| Some(index) == *slot && len <= reach)
                };
                if slot.is_some() && !segments.iter().all(within) {
                    return Some("vectored command leaves its registration");
                }
                if self.strict && matches!(op.target, Target::Registered(_)) && slot.is_none() {
                    return Some("strict, and not by the registration");
                }
                if slot.is_some() && !self.nature.readv_fixed {
                    return Some("READV_FIXED on a kernel without it");
                }
                None
            }
        }
    }

    /// The op's bytes must go to where the submission wants exactly those bytes of the file.
    fn place_objection(&self, attempt: &Attempt, op: &Op, len: usize) -> Option<&'static str> {
        let mut at = attempt.file_offset;
        let fits = attempt.segments.iter().any(|&(start, size)| {
            let here = op.target_offset >= start
                && op.target_offset + len <= start + size
                && op.file_offset == at + (op.target_offset - start) as u64;
            at += size as u64;
            here
        });
        if !fits {
            return Some("command outside the submission's ranges");
        }
        let mine =
            |live: &&Live| live.op.sequence == op.sequence && !matches!(live.op.command, Command::Vectored { .. });
        let clash = self.slots.iter().filter_map(|(_, live)| live.as_ref()).filter(mine).any(|live| {
            live.op.target_offset < op.target_offset + len
                && op.target_offset < live.op.target_offset + command_len(&live.op).1
        });
        clash.then_some("two commands in flight to one place")
    }

    /// Whether an O_DIRECT file takes the command.
    fn aligned(op: &Op, segments: &[Segment], direct: DirectAlignment) -> bool {
        let (block, memory) = (u64::from(direct.offset), u64::from(direct.memory));
        let fits = |offset: u64, len: usize, address: u64| {
            offset.is_multiple_of(block) && (len as u64).is_multiple_of(block) && address.is_multiple_of(memory)
        };
        match &op.command {
            Command::Direct { len, .. } => {
                fits(op.file_offset, *len as usize, op.target.region().address(op.target_offset))
            }
            Command::Bounce { file_offset, len, slot, .. } => {
                fits(*file_offset, *len as usize, slot.pool.region().address(slot.offset()))
            }
            Command::Vectored { .. } => {
                segments.iter().all(|&(offset, len)| fits(op.file_offset, len, op.target.region().address(offset)))
            }
        }
    }

    /// The kernel takes a command from the submission queue.
    fn start(&mut self, index: usize) {
        let outcome = self.choose(index);
        let nature = &self.nature;
        let (service, garbage) = (nature.service, nature.garbage);
        let mut span = 1 + self.rng.below(service);
        if self.rng.chance(20) {
            span *= 40;
        }
        let now = self.clock();
        let data = now + self.rng.range(1, span);
        let done = data + if self.rng.chance(500) { 0 } else { self.rng.below(span) };
        let slot = &mut self.slots[index];
        let generation = slot.0;
        if let Some(live) = &mut slot.1 {
            live.outcome = outcome;
            live.flying = true;
        }
        if self.rng.chance(garbage) {
            let at = self.rng.range(now, data);
            self.events.push(Reverse((at, index, generation, Stage::Garbage)));
        }
        self.events.push(Reverse((data, index, generation, Stage::Data)));
        self.events.push(Reverse((done, index, generation, Stage::Done)));
    }

    fn choose(&mut self, index: usize) -> Outcome {
        let Some(live) = &self.slots[index].1 else { return Outcome::Full };
        let op = &live.op;
        let attempt = &self.attempts[op.sequence as usize];
        let file = &self.files[attempt.file];
        let (from, len, _) = command_range(op);
        if let Some(direct) = file.direct
            && !Self::aligned(op, &attempt.segments, direct)
        {
            if !file.late || op.direct.is_some() {
                let what = format!("misaligned O_DIRECT command: {op:?}");
                self.violate(|| what);
            }
            return Outcome::Fail(libc::EINVAL);
        }
        if from < file.bad.end && from + len as u64 > file.bad.start {
            return Outcome::Fail(libc::EIO);
        }
        let Nature { short, interrupted, again, error, .. } = self.nature;
        let mut dice = self.rng.below(1000);
        for (chance, outcome) in [
            (short, Outcome::Short(self.rng.next())),
            (interrupted, Outcome::Fail(libc::EINTR)),
            (again, Outcome::Fail(libc::EAGAIN)),
            (error, Outcome::Fail([libc::EIO, libc::EIO, libc::EFAULT, libc::ENOMEM][(dice & 3) as usize])),
        ] {
            if dice < chance {
                return outcome;
            }
            dice -= chance;
        }
        Outcome::Full
    }

    fn happen(&mut self, index: usize, generation: u32, stage: Stage) {
        if stage == Stage::CancelDone {
            return self.post(Cqe::Cancel);
        }
        if self.slots[index].0 != generation {
            return;
        }
        let Some(mut live) = self.slots[index].1.take() else { return };
        // A cancelled command has two sets of events; each thing happens once.
        let mut ended = false;
        match stage {
            Stage::Garbage if !live.moved_yet => {
                let len = command_range(&live.op).1;
                let from = self.rng.index(len);
                let count = self.rng.sized(1, len - from);
                self.garbage(&live.op, from, count);
            }
            Stage::Data if !live.moved_yet => self.transfer(&mut live),
            Stage::Done if !live.done => {
                live.done = true;
                ended = true;
            }
            _ => {}
        }
        self.slots[index].1 = Some(live);
        if ended {
            self.post(Cqe::Read(index));
        }
    }

    /// The device writes.
    fn transfer(&mut self, live: &mut Live) {
        let op = &live.op;
        let file = &self.files[self.attempts[op.sequence as usize].file];
        let (from, len, _) = command_range(op);
        let available = file.size_at(self.now.get()).saturating_sub(from).min(len as u64);
        let landed = match live.outcome {
            Outcome::Fail(errno) => {
                live.result = -errno;
                0
            }
            Outcome::Full => available,
            Outcome::Short(random) => match file.direct {
                // A prefix that is not empty and not all; whole blocks by O_DIRECT.
                None if available > 1 => 1 + random % (available - 1),
                Some(direct) if available > u64::from(direct.offset) => {
                    let block = u64::from(direct.offset);
                    (1 + random % ((available - 1) / block)) * block
                }
                _ => available,
            },
        } as usize;
        live.moved_yet = true;
        live.moved = live.result.min(0);
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.resize(landed, 0);
        file.content(from, &mut bytes);
        if landed < len && self.rng.chance(self.nature.garbage / 2) {
            self.garbage(op, landed, len - landed);
        }
        let useful = landed >= 8 && !matches!(op.command, Command::Bounce { .. });
        if useful && self.mutate(Mutation::WrongByte) {
            bytes[landed / 2] ^= 0x10;
        }
        if !useful || !self.mutate(Mutation::MissingData) {
            write(op, &self.attempts[op.sequence as usize].segments, 0, &bytes);
        }
        if self.may_stray(op) && self.mutate(Mutation::StrayByte) {
            op.target.region().copy_in(op.target_offset + len, &STRAY);
        }
        self.scratch = bytes;
        if live.result < 0 {
            return;
        }
        (live.result, live.moved) = (landed as i32, landed as i32);
        if landed > 0 && landed < len && available > landed as u64 && self.mutate(Mutation::ShortAsFull) {
            live.result = len as i32;
        }
        if landed > 0 && available == len as u64 && self.mutate(Mutation::FalseEndOfFile) {
            live.result = 0;
        }
    }

    fn garbage(&mut self, op: &Op, from: usize, len: usize) {
        let mut bytes = vec![0; len];
        self.rng.fill(&mut bytes);
        write(op, &self.attempts[op.sequence as usize].segments, from, &bytes);
    }

    /// Whether the bytes after the command are nobody's: a direct one that ends where its submission's range does.
    fn may_stray(&self, op: &Op) -> bool {
        let end = op.target_offset + command_range(op).1;
        let segments = &self.attempts[op.sequence as usize].segments;
        matches!(op.command, Command::Direct { .. })
            && segments.iter().any(|&(start, len)| start + len == end)
            && !segments.iter().any(|&(start, _)| (end..end + STRAY.len()).contains(&start))
    }

    // Completions

    fn post(&mut self, cqe: Cqe) {
        match self.nature.deferred {
            true => self.deferred.push_back(cqe),
            false => self.show(cqe),
        }
    }

    fn show(&mut self, cqe: Cqe) {
        match self.cq.len() < self.nature.cq_entries && self.backlog.is_empty() {
            true => self.cq.push_back(cqe),
            false => self.backlog.push_back(cqe),
        }
    }

    fn run_until(&mut self, time: u64) {
        while let Some(&Reverse((at, index, generation, stage))) = self.events.peek() {
            if at > time {
                break;
            }
            self.events.pop();
            self.now.set(self.now.get().max(at));
            self.happen(index, generation, stage);
        }
        self.now.set(self.now.get().max(time));
    }

    /// What an `enter` does about completions.
    fn task_work(&mut self) {
        while self.cq.len() < self.nature.cq_entries
            && let Some(cqe) = self.backlog.pop_front()
        {
            self.cq.push_back(cqe);
        }
        while let Some(cqe) = self.deferred.pop_front() {
            self.show(cqe);
        }
    }

    fn wait(&mut self, wait: usize, deadline: Option<u64>) {
        let wait = wait.min(self.nature.cq_entries);
        loop {
            self.task_work();
            // A signal may end any wait early.
            if self.cq.len() >= wait || self.rng.chance(5) {
                return;
            }
            let next = self.events.peek().map(|&Reverse((at, ..))| at.max(self.clock()));
            match (next, deadline) {
                (Some(next), Some(deadline)) if next > deadline => return self.run_until(deadline),
                (Some(next), _) => self.run_until(next),
                (None, Some(deadline)) => return self.run_until(deadline),
                (None, None) => {
                    let what = format!(
                        "hang: waits for {wait} completions without a timeout, {} are there and none can come",
                        self.cq.len()
                    );
                    return self.violate(|| what);
                }
            }
        }
    }

    fn consume(&mut self) -> bool {
        let all = self.sq.len();
        let count = if all > 1 && self.rng.chance(30) { self.rng.sized(1, all - 1) } else { all };
        for _ in 0..count {
            match self.sq.pop_front() {
                Some(Sqe::Read(index)) => self.start(index),
                Some(Sqe::Cancel(index, generation)) => self.cancel_now(index, generation),
                None => {}
            }
        }
        count == all
    }

    fn cancel_now(&mut self, index: usize, generation: u32) {
        let now = self.clock();
        let works = self.rng.chance(self.nature.cancel_works);
        let slot = &mut self.slots[index];
        if works
            && slot.0 == generation
            && let Some(live) = slot.1.as_mut().filter(|live| live.flying && !live.moved_yet)
        {
            // Work on a kernel thread is interrupted, other work cancelled.
            live.outcome = Outcome::Fail(if self.rng.chance(250) { libc::EINTR } else { libc::ECANCELED });
            let at = now + self.rng.below(2_000);
            self.events.push(Reverse((at, index, generation, Stage::Data)));
            // The old events of the generation come later, and are void then: the transfer happens once.
            self.events.push(Reverse((at + 1, index, generation, Stage::Done)));
        }
        let at = now + self.rng.below(3_000);
        self.events.push(Reverse((at, 0, 0, Stage::CancelDone)));
    }

    fn account(&mut self, op: &Op, result: i32) {
        let (useful, bounced, registered) = match &op.command {
            Command::Direct { slot, .. } | Command::Vectored { slot } => (result, false, slot.is_some()),
            Command::Bounce { skip, want, slot, .. } => {
                let useful = if result < 0 { result } else { (result - *skip as i32).clamp(0, *want as i32) };
                (useful, true, slot.registration().is_some())
            }
        };
        let asked = match &op.command {
            Command::Direct { len, .. } => *len as usize,
            Command::Bounce { want, .. } => *want as usize,
            Command::Vectored { .. } => op.remaining,
        };
        let attempt = &mut self.attempts[op.sequence as usize];
        let cut = match useful {
            0 => result > 0 && op.looks < LOOKS,
            _ => useful > 0 && (useful as usize) < asked && op.remaining - useful as usize > attempt.slack as usize,
        };
        attempt.short += u64::from(cut);
        match useful {
            0 => attempt.errors.push(libc::ENODATA),
            errno if errno < 0 => attempt.errors.push(-errno),
            landed => {
                attempt.landed += landed as u64;
                attempt.bounced += if bounced { landed as u64 } else { 0 };
                attempt.registered |= registered;
                attempt.plain |= !registered;
            }
        }
    }
}

impl Queue for Sim<'_> {
    fn make_room(&mut self) -> Result<bool, Errno> {
        self.tick();
        if self.free.is_empty() {
            return Ok(false);
        }
        if self.sq.len() >= self.nature.sq_entries {
            self.enter(0, None)?;
        }
        Ok(self.sq.len() < self.nature.sq_entries)
    }

    fn push(&mut self, op: Box<Op>, segments: &[Segment]) {
        self.tick();
        self.check_push(&op, segments);
        if self.mutate(Mutation::KeptMemory) {
            std::mem::forget(op.target.clone());
        }
        if self.mutate(Mutation::EarlyTail) {
            self.write_tail(self.read_tail() + 1);
        }
        let Some(index) = self.free.pop().filter(|_| self.sq.len() < self.nature.sq_entries) else {
            return self.violate(|| "push without make_room".to_owned());
        };
        self.commands += 1;
        let slot = &mut self.slots[index];
        slot.0 += 1;
        slot.1 = Some(Live {
            op,
            outcome: Outcome::Full,
            result: 0,
            moved: 0,
            flying: false,
            moved_yet: false,
            done: false,
        });
        self.sq.push_back(Sqe::Read(index));
    }

    fn cancel(&mut self, wanted: impl Fn(u64) -> bool) {
        self.tick();
        for index in 0..self.slots.len() {
            let (generation, live) = &self.slots[index];
            let generation = *generation;
            if !live.as_ref().is_some_and(|live| wanted(live.op.sequence)) {
                continue;
            }
            if self.sq.len() >= self.nature.sq_entries && self.enter(0, None).is_err() {
                return;
            }
            if self.sq.len() < self.nature.sq_entries {
                self.cancels += 1;
                self.sq.push_back(Sqe::Cancel(index, generation));
            }
        }
    }

    fn has_unsubmitted(&mut self) -> bool {
        self.tick();
        !self.sq.is_empty()
    }

    fn wants_enter(&mut self) -> bool {
        self.tick();
        self.run_until(self.clock());
        !self.sq.is_empty() || !self.deferred.is_empty() || !self.backlog.is_empty()
    }

    fn enter(&mut self, wait: u32, timeout: Option<Duration>) -> Result<(), Errno> {
        self.tick();
        self.check_tail();
        if self.read_tail() > 0 && self.mutate(Mutation::TailGoesBack) {
            self.write_tail(self.read_tail() - 1);
        }
        let now = self.clock();
        let cost = self.rng.below(1_000);
        self.run_until(now + cost);
        if self.errors_in_a_row < 3 && self.rng.chance(self.nature.enter_fails) {
            self.errors_in_a_row += 1;
            self.enter_errors += 1;
            return Err(self.rng.pick(&[libc::EAGAIN, libc::EBUSY]));
        }
        self.errors_in_a_row = 0;
        let deadline = timeout.map(|timeout| now.saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)));
        if self.consume() && wait > 0 {
            self.wait(wait as usize, deadline);
        } else {
            self.task_work();
        }
        Ok(())
    }

    fn reap(&mut self) -> Option<Reaped> {
        self.tick();
        self.settled = self.due_tail();
        self.run_until(self.clock());
        if let Some(duplicate) = self.duplicate.take() {
            return Some(duplicate);
        }
        loop {
            let index = match self.cq.pop_front()? {
                Cqe::Cancel => {
                    self.cancels -= 1;
                    continue;
                }
                Cqe::Read(index) => index,
            };
            if self.mutate(Mutation::LostCompletion) {
                continue;
            }
            let Some(Live { op, result, moved, .. }) = self.slots[index].1.take() else {
                self.violate(|| "the simulator completed a command twice".to_owned());
                continue;
            };
            self.free.push(index);
            self.completions += 1;
            self.account(&op, moved);
            if self.trace {
                eprintln!("{:>12} ns  cqe {result} for {op:?}", self.clock());
            }
            if result > 0 && matches!(op.command, Command::Direct { .. }) && self.mutate(Mutation::DuplicateCompletion)
            {
                self.duplicate = Some(Reaped { op: Box::new(twin(&op)), result });
            }
            return Some(Reaped { op, result });
        }
    }

    fn in_kernel(&self) -> usize {
        self.in_kernel_now()
    }

    fn now(&self) -> Duration {
        self.tick();
        Duration::from_nanos(self.now.get())
    }

    fn adopt(&mut self, region: Arc<Region>) -> Target {
        match self.nature.adopts {
            true => Target::Registered(BufferEntry::simulated(&GpuMappedBuffer::whole(region), 40_000)),
            false => Target::Plain(region),
        }
    }

    fn pause(&mut self, time: Duration) {
        self.tick();
        self.pass(time.as_nanos() as u64);
    }

    fn release(&mut self, target: Target) {
        if self.released.replace(target).is_some() {
            self.violate(|| "the bounce buffer was given up twice".to_owned());
        }
    }

    fn has_readv_fixed(&self) -> bool {
        self.nature.readv_fixed
    }
}

/// File offset and length of a command, and whether it goes through the bounce buffer.
fn command_range(op: &Op) -> (u64, usize, bool) {
    match &op.command {
        Command::Direct { len, .. } => (op.file_offset, *len as usize, false),
        Command::Bounce { file_offset, len, .. } => (*file_offset, *len as usize, true),
        Command::Vectored { .. } => (op.file_offset, op.remaining, false),
    }
}

/// File offset, and bytes of the target that the command will fill.
fn command_len(op: &Op) -> (u64, usize) {
    match &op.command {
        Command::Bounce { want, .. } => (op.file_offset, *want as usize),
        _ => (op.file_offset, command_range(op).1),
    }
}

fn overlap(a: &BounceSlot, b: &BounceSlot, len: usize) -> bool {
    a.index == b.index || a.offset().abs_diff(b.offset()) < len
}

/// Writes into a command's range, `from` bytes after its start.
fn write(op: &Op, segments: &[Segment], from: usize, bytes: &[u8]) {
    match &op.command {
        Command::Direct { .. } => op.target.region().copy_in(op.target_offset + from, bytes),
        Command::Bounce { slot, .. } => slot.pool.region().copy_in(slot.offset() + from, bytes),
        Command::Vectored { .. } => {
            let (mut skip, mut rest) = (from, bytes);
            for &(offset, len) in segments {
                let here = len.saturating_sub(skip).min(rest.len());
                if here > 0 {
                    op.target.region().copy_in(offset + skip, &rest[..here]);
                    rest = &rest[here..];
                }
                skip = skip.saturating_sub(len);
            }
        }
    }
}

/// A second copy of an op with a direct command.
fn twin(op: &Op) -> Op {
    let (len, slot) = match &op.command {
        Command::Direct { len, slot } => (*len, *slot),
        _ => (0, None),
    };
    Op {
        sequence: op.sequence,
        file: op.file.clone(),
        file_offset: op.file_offset,
        target: op.target.clone(),
        target_offset: op.target_offset,
        remaining: op.remaining,
        command: Command::Direct { len, slot },
        retries: op.retries,
        looks: op.looks,
        direct: op.direct,
    }
}
