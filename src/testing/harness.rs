//! Runs the stream's logic against the simulated kernel and checks every promise after every step.
//!
//! The harness keeps a shadow of the memory: outside the destinations of unfinished submissions every byte must equal
//! it, and a submission that ends whole puts the file's bytes into it. So a byte in the wrong place, too early, too
//! late or not at all shows in the next comparison, whichever submission it belongs to.

use super::rng::{Rng, mix};
use super::sim::{Attempt, Mutation, Nature, Sim, SimFile};
use crate::error::{PipelineError, Result};
use crate::memory::{GpuMappedBuffer, HugePages, MappedBuffer, MappedOptions};
use crate::uring::{
    BufferEntry, Completion, DirectAlignment, DirectMode, FileRef, Flight, FlightOptions, InputFile, ReadPath, Request,
    SPLIT, Segment, TailLine, TailWord, Target,
};
use crate::wire::{NO_SEQUENCE, state};
use std::fmt::Debug;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

pub(super) type Check<T = ()> = std::result::Result<T, String>;

/// What a seed did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SimReport {
    /// Calls of the stream.
    pub steps: u64,
    /// Submissions.
    pub submissions: u64,
    /// Attempts that did not end whole.
    pub failures: u64,
    /// Commands that the simulated kernel took.
    pub commands: u64,
    /// Virtual time that passed, ns.
    pub nanoseconds: u64,
    /// A deliberate fault was done (mutation tests).
    pub(super) fired: bool,
}

impl std::ops::Add for SimReport {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            steps: self.steps + other.steps,
            submissions: self.submissions + other.submissions,
            failures: self.failures + other.failures,
            commands: self.commands + other.commands,
            nanoseconds: self.nanoseconds + other.nanoseconds,
            fired: self.fired || other.fired,
        }
    }
}

/// Runs one seed; an `Err` names the promise that was broken.
///
/// # Errors
/// What was wrong, in words.
pub fn run_stream_seed(seed: u64) -> Check<SimReport> {
    guarded(seed, None, false)
}

/// Runs one seed and prints every step and completion to stderr.
///
/// # Errors
/// As [`run_stream_seed`].
pub fn trace_stream_seed(seed: u64) -> Check<SimReport> {
    guarded(seed, None, true)
}

fn guarded(seed: u64, mutation: Option<Mutation>, trace: bool) -> Check<SimReport> {
    catching(|| run(seed, mutation, trace))
}

/// A panic is a failure like any other.
pub(super) fn catching<T>(run: impl FnOnce() -> Check<T>) -> Check<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}
pub(super) use ensure;

/// Guard bytes between destinations, at least.
const GAP: usize = 8;

/// A stretch of an arena that one submission at a time reads into.
struct Place {
    arena: usize,
    start: usize,
    len: usize,
    free: bool,
}

/// Memory that submissions read into, of which the harness watches a window.
struct Arena {
    memory: MappedBuffer<u8>,
    target: Target,
    window: usize,
    shadow: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Its completion has not been taken.
    Open,
    Whole,
    Failed(i32),
    Skipped(i32),
}

#[derive(Debug)]
struct Submission {
    arena: usize,
    place: Option<usize>,
    file: usize,
    file_offset: u64,
    buffer_offset: u64,
    segments: Vec<Segment>,
    requested: u64,
    user_data: u64,
    phase: Phase,
    /// Seen whole, and compared with the file.
    settled: bool,
    cancel_asked: bool,
    attempts: u32,
    /// It was announced as bad before its completion was taken.
    announced: bool,
}

struct Harness<'a> {
    rng: Rng,
    flight: Flight<'a, Sim<'a>>,
    options: FlightOptions,
    line: Option<TailLine>,
    files: Vec<FileRef>,
    arenas: Vec<Arena>,
    places: Vec<Place>,
    submissions: Vec<Submission>,
    open: Vec<u64>,
    failed: Vec<u64>,
    scratch: MappedBuffer<u8>,
    expected: Vec<u8>,
    last_tail: u64,
    /// First submission that is not both taken and below the tail.
    floor: u64,
    skipped: Option<(u64, i32)>,
    largest: usize,
    errors_before: u64,
    /// No cancellation, and everything is driven to its end.
    gentle: bool,
    taken: Taken,
    report: SimReport,
    trace: bool,
}

/// Sums over the completions taken, to compare with the stream's own.
#[derive(Debug, Default, PartialEq, Eq)]
struct Taken {
    submitted: u64,
    completed: u64,
    failed: u64,
    end_of_file: u64,
    cancelled: u64,
    skipped: u64,
    bytes: u64,
    bounced: u64,
}

fn run(seed: u64, mutation: Option<Mutation>, trace: bool) -> Check<SimReport> {
    let mut rng = Rng::new(seed);
    let (narrow, wide) = (AtomicU32::new(7), AtomicU64::new(7));
    let line = TailLine::alloc().map_err(text)?;
    let (tail, line) = match rng.below(4) {
        0 => (TailWord::from(&narrow), None),
        1 => (TailWord::from(&wide), None),
        _ => (TailWord::from(line.clone()), Some(line)),
    };
    let mut harness = Harness::new(rng, tail, line, trace)?;
    if mutation.is_some() {
        // What goes wrong otherwise may hide the fault rightly: nobody looks at the bytes of a failed read.
        harness.gentle = true;
        harness.flight.queue.be_gentle();
        harness.flight.queue.mutation = mutation;
    }
    let ended = harness.play();
    let Harness { flight, arenas, mut report, .. } = harness;
    report.fired = flight.queue.fired;
    report.commands = flight.queue.commands;
    report.nanoseconds = flight.queue.clock();
    drop(flight);
    ended?;
    memory_is_back(arenas)?;
    Ok(report)
}

/// Nothing but the harness refers to the memory any more.
fn memory_is_back(arenas: Vec<Arena>) -> Check {
    for Arena { memory, target, .. } in arenas {
        if let Target::Registered(entry) = &target {
            ensure!(Arc::strong_count(entry) == 1, "a registration is still referred to");
        }
        drop(target);
        ensure!(memory.as_slice().is_ok(), "memory is still referred to");
    }
    Ok(())
}

pub(super) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A real O_DIRECT descriptor, for reads whose alignment is learned from the first EINVAL. Nothing is read from it.
fn late_file() -> Option<&'static InputFile> {
    static FILE: OnceLock<Option<InputFile>> = OnceLock::new();
    FILE.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("ringest-sim-{}", std::process::id()));
        std::fs::write(&path, [0; 4096]).ok()?;
        let file = InputFile::open(&path, DirectMode::On).ok();
        let _ = std::fs::remove_file(&path);
        file
    })
    .as_ref()
}

impl<'a> Harness<'a> {
    fn new(mut rng: Rng, tail: TailWord<'a>, line: Option<TailLine>, trace: bool) -> Check<Self> {
        let largest = rng.pick(&[40, 700, 700, 2_500, 2_500, 9_000]);
        let (files, sim_files): (Vec<_>, Vec<_>) =
            (0..rng.range(1, 4)).map(|id| make_file(&mut rng, id, largest)).unzip();
        let block = sim_files.iter().filter_map(|file| file.direct).map(|direct| direct.offset as usize).max();
        let depth = rng.pick(&[1, 2, 4, 7, 16, 24]);
        let mut slot_bytes = rng.pick(&[512, 1024, 4096, 8192]);
        if !rng.chance(60) {
            slot_bytes = slot_bytes.max(block.unwrap_or(1));
        }
        let options = FlightOptions {
            depth,
            window: (depth * rng.pick(&[1, 2, 4])).next_power_of_two(),
            max_retries: rng.pick(&[0, 1, 3, 10]),
            backoff: Duration::from_nanos(rng.pick(&[0, 1_000, 50_000])),
            strict: rng.chance(300),
            bounce_slots: rng.pick(&[1, 1, 2, 8]),
            bounce_slot_bytes: slot_bytes,
        };
        let nature = make_nature(&mut rng);
        let mut sim = Sim::new(Rng::new(rng.next()), nature, sim_files, tail.clone());
        sim.strict = options.strict;
        sim.trace = trace;
        let (arenas, places) = make_memory(&mut rng, largest)?;
        let scratch = arenas.iter().map(|arena| arena.shadow.len()).max().unwrap_or(1);
        if trace {
            eprintln!("{options:?}\n{:?}\n{:?}", sim.nature, sim.files);
        }
        Ok(Self {
            rng,
            flight: Flight::new(sim, tail, arenas[0].target.clone(), options),
            options,
            line,
            files,
            arenas,
            places,
            submissions: Vec::new(),
            open: Vec::new(),
            failed: Vec::new(),
            scratch: MappedBuffer::alloc(scratch).map_err(text)?,
            expected: Vec::new(),
            last_tail: 0,
            floor: 0,
            skipped: None,
            largest,
            errors_before: 0,
            gentle: false,
            taken: Taken::default(),
            report: SimReport::default(),
            trace,
        })
    }

    fn play(&mut self) -> Check {
        let wanted = if self.rng.chance(30) { self.rng.range(60, 200) } else { self.rng.range(8, 50) };
        ensure!(self.flight.queue.read_tail() == 0, "the tail does not start at 0");
        for _ in 0..wanted * 8 {
            if self.flight.submitted() >= wanted {
                break;
            }
            let step = self.rng.below(100);
            self.step(step)?;
        }
        if !self.gentle && self.rng.chance(250) {
            self.shut()?
        } else {
            self.complete()?
        };
        self.final_checks()
    }

    /// One call of the stream and all checks after it.
    fn step(&mut self, choice: u64) -> Check {
        self.flight.queue.begin_step();
        self.errors_before = self.flight.queue.enter_errors;
        self.report.steps += 1;
        match choice {
            0..40 => self.submit()?,
            40..46 => {
                let flushed = self.flight.flush();
                self.note("flush", &flushed);
                self.system_error(flushed)?;
            }
            46..58 => self.drive(0, None)?,
            58..68 => {
                let min = self.rng.sized(1, 4);
                let timeout = self.timeout();
                self.drive(min, timeout)?;
            }
            68..80 => {
                let count = self.rng.index(6);
                self.take(count)?;
            }
            80..91 => self.answer_failure()?,
            91..93 if !self.gentle => self.cancel()?,
            93 if !self.gentle => self.cancel_all_or_nonsense()?,
            _ => {
                let time = self.rng.below(60_000);
                self.flight.queue.pass(time);
            }
        }
        self.check()
    }

    fn note(&self, what: &str, outcome: impl Debug) {
        if self.trace {
            eprintln!(
                "{:>12} ns  {what}: {outcome:?}, tail {}",
                self.flight.queue.clock(),
                self.flight.queue.read_tail()
            );
        }
    }

    fn timeout(&mut self) -> Option<Duration> {
        let nanoseconds = [0, 100, 10_000, 1_000_000, 1_000_000_000][self.rng.index(5)];
        self.rng.chance(700).then_some(Duration::from_nanos(nanoseconds))
    }

    /// A system call's error is allowed only if the simulated kernel answered it in this step.
    fn system_error(&self, result: Result<()>) -> Check {
        match result {
            Ok(()) => Ok(()),
            Err(error) => {
                let known = matches!(error.errno(), libc::EAGAIN | libc::EBUSY);
                let given = self.flight.queue.enter_errors > self.errors_before;
                ensure!(known && given, "an error out of nowhere: {error}");
                Ok(())
            }
        }
    }

    fn drive(&mut self, min: usize, timeout: Option<Duration>) -> Check {
        let before = self.flight.queue.clock();
        let driven = self.flight.drive(min, timeout);
        self.note(&format!("drive {min} {timeout:?}"), &driven);
        let took = Duration::from_nanos(self.flight.queue.clock() - before);
        if let Some(timeout) = timeout {
            let limit = timeout + Duration::from_millis(1);
            ensure!(took <= limit, "a wait with timeout {timeout:?} took {took:?}");
        }
        if let Err(PipelineError::TimedOut { .. }) = driven {
            ensure!(timeout.is_some_and(|timeout| took >= timeout), "timed out after {took:?} of {timeout:?}");
            ensure!(self.flight.ready() < min, "timed out with {} of {min} ready", self.flight.ready());
            return Ok(());
        }
        if driven.is_ok() {
            let (ready, flying) = (self.flight.ready(), self.flight.in_flight());
            ensure!(ready >= min || flying == 0, "a wait for {min} ended with {ready} ready and {flying} in flight");
        }
        self.system_error(driven)
    }

    // Submitting

    fn submit(&mut self) -> Check {
        let file = self.rng.index(self.files.len());
        let direct = self.flight.queue.files[file].direct;
        let free: Vec<usize> = (0..self.places.len()).filter(|&place| self.places[place].free).collect();
        let place = if free.is_empty() || self.rng.chance(40) { None } else { Some(self.rng.pick(&free)) };
        let (arena, segments) = match place {
            Some(place) => (self.places[place].arena, self.make_segments(place, direct)),
            None if free.is_empty() && self.rng.chance(800) => return Ok(()),
            None => {
                let arena = self.rng.index(self.arenas.len());
                (arena, self.make_empty(arena))
            }
        };
        let size = self.flight.queue.files[file].size;
        let mut file_offset = match self.rng.below(8) {
            0 => size.saturating_sub(self.rng.below(self.largest as u64)),
            1 => size + self.rng.below(600),
            _ => self.rng.below(size + 1),
        };
        if let Some(direct) = direct
            && self.rng.chance(600)
        {
            file_offset -= file_offset % u64::from(direct.offset);
        }
        let requested = segments.iter().map(|&(_, len)| len as u64).sum();
        let attempt = Attempt {
            file,
            file_offset,
            region: self.arenas[arena].target.region().address(0),
            segments: segments.clone(),
            requested,
            ..Attempt::default()
        };
        let sequence = self.flight.submitted();
        let (user_data, buffer_offset) = (self.rng.next(), self.rng.next());
        self.flight.queue.attempts.push(attempt);
        let has_room =
            self.flight.in_flight() < self.options.depth && sequence - self.floor < u64::from(self.options.window);
        self.scribble(arena, &segments);
        let submitted = self.flight.submit(Request {
            file: self.files[file].clone(),
            file_offset,
            target: (arena > 0).then(|| self.arenas[arena].target.clone()),
            segments: &segments,
            buffer_offset,
            user_data,
            slack: 0,
        });
        self.note(&format!("submit file {file}+{file_offset} to {arena}:{segments:?}"), &submitted);
        match submitted {
            Ok(number) => {
                ensure!(has_room, "submission {number} was accepted beyond depth or window");
                ensure!(number == sequence, "submission {number} instead of {sequence}");
            }
            Err(error) => {
                ensure!(!has_room && error.errno() == libc::EAGAIN, "submission refused in spite of room: {error}");
                self.flight.queue.attempts.pop();
                return Ok(());
            }
        }
        if let Some(place) = place {
            self.places[place].free = false;
        }
        self.submissions.push(Submission {
            arena,
            place,
            file,
            file_offset,
            buffer_offset,
            segments,
            requested,
            user_data,
            phase: Phase::Open,
            settled: false,
            cancel_asked: false,
            attempts: 1,
            announced: false,
        });
        self.open.push(sequence);
        self.taken.submitted += 1;
        self.report.submissions += 1;
        Ok(())
    }

    /// Noise in a destination before it is read into: bytes that never come cannot be right by chance.
    fn scribble(&mut self, arena: usize, segments: &[Segment]) {
        let Arena { target, window, shadow, .. } = &mut self.arenas[arena];
        for &(start, len) in segments {
            let at = start - *window;
            self.rng.fill(&mut shadow[at..at + len]);
            target.region().copy_in(start, &shadow[at..at + len]);
        }
    }

    fn make_empty(&mut self, arena: usize) -> Vec<Segment> {
        let arena = &self.arenas[arena];
        if self.rng.chance(500) { vec![(arena.window, 0)] } else { Vec::new() }
    }

    /// Where in a place a read goes: one range, or several in any order with gaps between.
    fn make_segments(&mut self, place: usize, direct: Option<DirectAlignment>) -> Vec<Segment> {
        let &Place { arena, start, len: room, .. } = &self.places[place];
        let rng = &mut self.rng;
        let grain = match direct {
            Some(direct) if rng.chance(650) => direct.offset as usize,
            _ => 1,
        };
        // Ranges of whole grains, at addresses that are a multiple of one.
        let base = self.arenas[arena].target.region().address(0) as usize;
        let first = (base + start).next_multiple_of(grain) - base;
        let room = (start + room).saturating_sub(first);
        if room < grain {
            return vec![(start, rng.sized(1, self.places[place].len))];
        }
        let grains = room / grain;
        let len = grain * rng.sized(1, grains);
        if !rng.chance(300) || len == grain {
            let shift = rng.sized(0, grains - len / grain) * grain;
            return vec![(first + shift, len)];
        }
        let mut segments = Vec::new();
        let mut at = first;
        while at < first + room && segments.len() < 6 {
            let left = (first + room - at) / grain;
            if left == 0 {
                break;
            }
            let len = rng.sized(1, left.div_ceil(2)) * grain;
            segments.push((at, len));
            at += len + rng.pick(&[0, 0, grain]);
        }
        for index in (1..segments.len()).rev() {
            segments.swap(index, rng.index(index + 1));
        }
        segments
    }

    // Completions

    fn take(&mut self, count: usize) -> Check {
        for _ in 0..count {
            let ready = self.flight.ready();
            let status = self.flight.peek_status();
            let Some(completion) = self.flight.take() else {
                ensure!(ready == 0 && status.is_none(), "no completion although {ready} are ready");
                break;
            };
            self.note("take", completion);
            ensure!(status == Some(completion.status), "peeked {status:?} before {completion:?}");
            self.completed(completion).map_err(|what| format!("{what}: {completion:?}"))?;
        }
        Ok(())
    }

    fn completed(&mut self, completion: Completion) -> Check {
        let Completion { sequence, bytes, status, .. } = completion;
        let index = self.open.iter().position(|&open| open == sequence);
        let index = index.ok_or("a completion that nobody waits for")?;
        self.open.swap_remove(index);
        let submission = &self.submissions[sequence as usize];
        let attempt = &self.flight.queue.attempts[sequence as usize];
        ensure!(completion.user_data == submission.user_data, "another submission's user data");
        ensure!(
            (completion.file_offset, completion.buffer_offset, completion.requested)
                == (submission.file_offset, submission.buffer_offset, submission.requested),
            "another submission's record"
        );
        ensure!(bytes == attempt.landed, "{bytes} bytes reported, {} landed", attempt.landed);
        ensure!(completion.bounced == attempt.bounced, "{} bytes were bounced", attempt.bounced);
        let path = match (attempt.plain, attempt.registered) {
            (true, _) => ReadPath::PlainRead,
            (_, true) => ReadPath::RegisteredRead,
            _ => ReadPath::None,
        };
        ensure!(completion.path == path, "the path was {path:?}");
        ensure!((status == 0) == attempt.whole(), "status and bytes disagree");
        self.plausible(sequence, -status, bytes)?;
        // From now on its destination does not change any more.
        self.settle(sequence, bytes, status)?;
        let submission = &mut self.submissions[sequence as usize];
        ensure!(!submission.announced || status != 0, "announced as bad, and whole");
        submission.announced = false;
        self.taken.bytes += bytes;
        self.taken.bounced += completion.bounced;
        match status {
            0 => {
                submission.phase = Phase::Whole;
                self.taken.completed += 1;
                self.free_place(sequence);
            }
            _ => {
                submission.phase = Phase::Failed(-status);
                self.taken.failed += 1;
                self.taken.end_of_file += u64::from(status == -libc::ENODATA);
                self.taken.cancelled += u64::from(status == -libc::ECANCELED);
                self.report.failures += 1;
                self.failed.push(sequence);
            }
        }
        Ok(())
    }

    /// Whether what the kernel did explains the status.
    fn plausible(&self, sequence: u64, errno: i32, bytes: u64) -> Check {
        let submission = &self.submissions[sequence as usize];
        let queue = &self.flight.queue;
        let attempt = &queue.attempts[sequence as usize];
        let file = &queue.files[submission.file];
        let soft = |&&errno: &&i32| {
            matches!(errno, libc::ENODATA | libc::EINTR | libc::EAGAIN) || file.late && errno == libc::EINVAL
        };
        match errno {
            0 => {}
            libc::ENODATA => {
                ensure!(attempt.errors.contains(&errno), "the file did not end");
                let hard = attempt.errors.iter().find(|errno| !soft(errno));
                ensure!(hard.is_none(), "end of file hides errno {hard:?}");
                let exist = |size: u64| size.saturating_sub(submission.file_offset).min(submission.requested);
                let least = exist(file.size_at(queue.clock()));
                let most = exist(file.size);
                ensure!((least..=most).contains(&bytes), "{least} to {most} bytes exist");
            }
            libc::ECANCELED => ensure!(submission.cancel_asked, "nobody cancelled it"),
            libc::EINTR | libc::EAGAIN => {
                let count = attempt.errors.iter().filter(|&&it| it == libc::EINTR || it == libc::EAGAIN).count();
                ensure!(count > usize::from(self.options.max_retries), "given up after {count} tries");
                ensure!(attempt.errors.contains(&errno), "the kernel never said so");
            }
            libc::EINVAL => {
                // A file whose blocks are larger than the slots that an earlier one made.
                let large = |file: &SimFile| {
                    file.direct.is_some_and(|direct| direct.offset as usize > self.options.bounce_slot_bytes)
                };
                ensure!(queue.files.iter().any(large), "nothing was wrong with the command");
            }
            // Bounce memory that cannot be registered is refused by a strict stream.
            libc::ENOMEM if self.options.strict && !queue.nature.adopts => {}
            errno => ensure!(attempt.errors.contains(&errno), "the kernel never said so"),
        }
        Ok(())
    }

    /// Compares the bytes of a submission that ended with the file, and takes its destination into the shadow.
    fn settle(&mut self, sequence: u64, bytes: u64, status: i32) -> Check {
        let submission = &self.submissions[sequence as usize];
        let arena = &mut self.arenas[submission.arena];
        let file = &self.flight.queue.files[submission.file];
        let exact = match status {
            0 => bytes,
            // Of a file that was cut off meanwhile only what is left is certain to be a prefix.
            _ if status == -libc::ENODATA => {
                bytes.min(file.size_at(self.flight.queue.clock()).saturating_sub(submission.file_offset))
            }
            _ => 0,
        };
        snapshot(&mut self.scratch, arena);
        let now = self.scratch.as_slice().map_err(text)?;
        self.expected.resize(exact as usize, 0);
        file.content(submission.file_offset, &mut self.expected);
        let mut done = 0;
        for &(start, len) in &submission.segments {
            let at = start - arena.window;
            let here = len.min(self.expected.len() - done);
            ensure!(
                now[at..at + here] == self.expected[done..done + here],
                "submission {sequence}: wrong bytes in {start}+{here}"
            );
            arena.shadow[at..at + len].copy_from_slice(&now[at..at + len]);
            done += here;
        }
        self.submissions[sequence as usize].settled = true;
        Ok(())
    }

    fn free_place(&mut self, sequence: u64) {
        if let Some(place) = self.submissions[sequence as usize].place {
            self.places[place].free = true;
        }
    }

    // Failures and cancellation

    fn answer_failure(&mut self) -> Check {
        if self.failed.is_empty() {
            return Ok(());
        }
        let index = self.rng.index(self.failed.len());
        let sequence = self.failed[index];
        let attempts = self.submissions[sequence as usize].attempts;
        if attempts < 4 && self.rng.chance(700) {
            return self.resubmit(index, sequence);
        }
        self.failed.swap_remove(index);
        let skipped = self.flight.skip(sequence);
        self.note(&format!("skip {sequence}"), &skipped);
        skipped.map_err(text)?;
        self.flight.queue.attempts[sequence as usize].skipped = true;
        let submission = &mut self.submissions[sequence as usize];
        if let Phase::Failed(errno) = submission.phase {
            submission.phase = Phase::Skipped(errno);
            if self.skipped.is_none_or(|(lowest, _)| sequence < lowest) {
                self.skipped = Some((sequence, errno));
            }
        }
        self.taken.skipped += 1;
        self.free_place(sequence);
        Ok(())
    }

    fn resubmit(&mut self, index: usize, sequence: u64) -> Check {
        let has_room = self.flight.in_flight() < self.options.depth;
        if has_room {
            self.flight.queue.attempts[sequence as usize].relaunch();
            let submission = &self.submissions[sequence as usize];
            self.scribble(submission.arena, &submission.segments.clone());
        }
        let resubmitted = self.flight.resubmit(sequence);
        self.note(&format!("resubmit {sequence}"), &resubmitted);
        match resubmitted {
            Ok(()) => ensure!(has_room, "resubmission {sequence} was accepted beyond the depth"),
            Err(error) => {
                ensure!(!has_room && error.errno() == libc::EAGAIN, "resubmission refused in spite of room: {error}");
                return Ok(());
            }
        }
        self.failed.swap_remove(index);
        let submission = &mut self.submissions[sequence as usize];
        submission.phase = Phase::Open;
        submission.settled = false;
        submission.cancel_asked = false;
        submission.attempts += 1;
        self.open.push(sequence);
        self.taken.submitted += 1;
        Ok(())
    }

    fn cancel(&mut self) -> Check {
        if self.open.is_empty() {
            return Ok(());
        }
        let sequence = self.rng.pick(&self.open);
        let before = self.flight.in_flight();
        let cancelled = self.flight.cancel(sequence);
        self.note(&format!("cancel {sequence}"), &cancelled);
        match cancelled {
            Ok(()) => self.submissions[sequence as usize].cancel_asked = true,
            // It has ended, and its completion was not taken yet.
            Err(error) => {
                ensure!(error.errno() == libc::EINVAL && self.flight.ready() > 0, "cancel: {error}");
                ensure!(before == self.flight.in_flight(), "a refused cancel ended something");
            }
        }
        Ok(())
    }

    fn cancel_all_or_nonsense(&mut self) -> Check {
        let next = self.flight.submitted();
        match self.rng.below(3) {
            0 => {
                self.flight.cancel_all();
                self.note("cancel all", ());
                for &sequence in &self.open {
                    self.submissions[sequence as usize].cancel_asked = true;
                }
            }
            _ => {
                let sequence = self.rng.below(next + 3);
                let known = self.submissions.get(sequence as usize).map(|submission| submission.phase);
                if !matches!(known, Some(Phase::Open | Phase::Failed(_))) {
                    ensure!(self.flight.resubmit(sequence).is_err(), "resubmitted {sequence}, which is {known:?}");
                    ensure!(self.flight.skip(sequence).is_err(), "skipped {sequence}, which is {known:?}");
                }
                if known != Some(Phase::Open) {
                    ensure!(self.flight.cancel(sequence).is_err(), "cancelled {sequence}, which is {known:?}");
                }
            }
        }
        Ok(())
    }

    // Checks

    fn check(&mut self) -> Check {
        if let Some(what) = self.flight.queue.violation.take() {
            return Err(what);
        }
        let tail = self.flight.queue.read_tail();
        ensure!(tail >= self.last_tail, "the tail went back from {} to {tail}", self.last_tail);
        let due = self.flight.queue.due_tail();
        ensure!(tail == due, "the tail is {tail}, {due} is due");
        ensure!(tail == self.flight.tail(), "the tail is {tail}, the flight says {}", self.flight.tail());
        for index in 0..self.open.len() {
            let sequence = self.open[index];
            let attempt = &self.flight.queue.attempts[sequence as usize];
            if attempt.whole() && !self.submissions[sequence as usize].settled {
                let bytes = attempt.landed;
                self.settle(sequence, bytes, 0)?;
            }
        }
        for sequence in self.last_tail..tail {
            let submission = &self.submissions[sequence as usize];
            let fine = submission.settled && matches!(submission.phase, Phase::Open | Phase::Whole)
                || matches!(submission.phase, Phase::Skipped(_));
            ensure!(fine, "the tail covers submission {sequence}: {submission:?}");
        }
        self.last_tail = tail;
        while self.floor < tail && self.submissions[self.floor as usize].phase != Phase::Open {
            self.floor += 1;
        }
        self.check_numbers()?;
        self.check_line()?;
        self.check_memory()
    }

    fn check_numbers(&mut self) -> Check {
        let (flying, ready) = (self.flight.in_flight() as usize, self.flight.ready());
        let open = self.open.len();
        ensure!(flying + ready == open, "{flying} in flight and {ready} ready make {open} open");
        ensure!(flying <= self.options.depth as usize, "{flying} in flight");
        let held = self.flight.queue.reads();
        ensure!(held <= self.flight.queue.nature.commands, "{held} commands in the kernel");
        ensure!(flying > 0 || held == 0, "{held} commands in the kernel, and nothing in flight");
        Ok(())
    }

    /// What a tail line says about failures.
    fn check_line(&mut self) -> Check {
        let Some(line) = &self.line else { return Ok(()) };
        let words = line.words();
        let (bad, error) = (words.first_bad.load(Ordering::Acquire), words.error.load(Ordering::Relaxed));
        let failed = |&sequence: &u64| match self.submissions[sequence as usize].phase {
            Phase::Failed(errno) => Some((sequence, errno)),
            _ => None,
        };
        let known = self.failed.iter().filter_map(failed).chain(self.skipped).min().unwrap_or((NO_SEQUENCE, 0));
        // Without a bad submission `error` means nothing.
        if (bad, if bad == NO_SEQUENCE { 0 } else { -error }) == known {
            return Ok(());
        }
        // Otherwise one below whose completion waits to be taken; it has to say the same then.
        let early = bad < known.0 && self.open.contains(&bad) && self.flight.ready() > 0;
        ensure!(early, "first_bad is {bad} with error {error}, {known:?} is due");
        let submission = &mut self.submissions[bad as usize];
        ensure!(!submission.settled, "first_bad is {bad}, which is whole");
        submission.announced = true;
        Ok(())
    }

    fn check_memory(&mut self) -> Check {
        for index in 0..self.arenas.len() {
            let arena = &self.arenas[index];
            snapshot(&mut self.scratch, arena);
            let now = self.scratch.as_slice().map_err(text)?;
            let unsettled = self.open.iter().map(|&sequence| &self.submissions[sequence as usize]);
            let unsettled = unsettled.filter(|submission| submission.arena == index && !submission.settled);
            let mut ranges: Vec<Segment> =
                unsettled.flat_map(|submission| submission.segments.iter().copied()).collect();
            ranges.push((arena.window + arena.shadow.len(), 0));
            ranges.sort_unstable();
            let mut at = 0;
            for (start, len) in ranges {
                let start = (start - arena.window).max(at);
                if now[at..start] != arena.shadow[at..start] {
                    let byte = (at..start).find(|&byte| now[byte] != arena.shadow[byte]).unwrap_or(at);
                    return Err(format!("byte {byte} of arena {index} was changed by nobody"));
                }
                at = at.max(start + len);
            }
        }
        Ok(())
    }

    // Ending

    /// Drives everything to its end, as a caller does who wants every byte or a decision.
    fn complete(&mut self) -> Check {
        // Some callers never wait, and must get there too.
        let impatient = self.rng.chance(100);
        for _ in 0..20_000 {
            if self.open.is_empty() && self.failed.is_empty() {
                ensure!(self.last_tail == self.flight.submitted(), "all ended, and the tail is {}", self.last_tail);
                return Ok(());
            }
            self.flight.queue.begin_step();
            self.errors_before = self.flight.queue.enter_errors;
            self.report.steps += 1;
            match self.rng.below(8) {
                0..4 if impatient => {
                    self.drive(1, Some(Duration::ZERO))?;
                    self.flight.queue.pass(20_000);
                }
                0..3 => {
                    let timeout = self.timeout();
                    self.drive(1, timeout)?;
                }
                3 => self.drive(0, None)?,
                4..7 => self.take(64)?,
                _ => self.answer_failure()?,
            }
            self.check()?;
        }
        Err(format!("hang: submissions {:?} do not end, {:?} failed", self.open, self.failed))
    }

    fn shut(&mut self) -> Check {
        self.flight.queue.begin_step();
        self.note("shut", ());
        for &sequence in &self.open {
            self.submissions[sequence as usize].cancel_asked = true;
        }
        let hurried = self.rng.chance(100).then(|| self.rng.below(3_000));
        if let Some(limit) = hurried {
            let back = self.flight.shut(Duration::from_nanos(limit));
            let held = self.flight.queue.in_kernel_now();
            ensure!(back == (held == 0), "shut says {back} with {held} commands in the kernel");
            self.check()?;
        }
        self.flight.queue.begin_step();
        let back = self.flight.shut(Duration::from_secs(100));
        let held = self.flight.queue.in_kernel_now();
        ensure!(back && held == 0, "shut says {back} with {held} commands in the kernel");
        self.check()?;
        self.take(usize::MAX)?;
        ensure!(self.open.is_empty(), "submissions {:?} never ended", self.open);
        self.check()
    }

    fn final_checks(&mut self) -> Check {
        let stats = self.flight.stats();
        let sums = Taken {
            submitted: stats.submitted,
            completed: stats.completed,
            failed: stats.failed,
            end_of_file: stats.end_of_file,
            cancelled: stats.cancelled,
            skipped: stats.skipped,
            bytes: stats.bytes,
            bounced: stats.bounced_bytes,
        };
        ensure!(sums == self.taken, "the stream counted {sums:?}, the harness {:?}", self.taken);
        ensure!(stats.registered_bytes + stats.plain_bytes == stats.bytes, "bytes by path do not add up: {stats:?}");
        let queue = &self.flight.queue;
        ensure!(stats.commands == queue.commands, "{} commands counted, {} made", stats.commands, queue.commands);
        ensure!(queue.completions == queue.commands, "{} of {} commands ended", queue.completions, queue.commands);
        let whole = self.last_tail == self.flight.submitted();
        self.flight.publish_end(if whole { 0 } else { libc::ECANCELED });
        let Some(line) = &self.line else { return Ok(()) };
        let words = line.words();
        let (end, now) = (words.end.load(Ordering::Relaxed), words.state.load(Ordering::Acquire));
        ensure!(end == self.flight.submitted(), "the line's end is {end}");
        ensure!(now == if whole { state::END } else { state::ABORTED }, "the line's state is {now}");
        ensure!(whole || words.error.load(Ordering::Relaxed) != 0, "aborted without an error");
        self.check_memory()
    }
}

fn snapshot(scratch: &mut MappedBuffer<u8>, arena: &Arena) {
    // The handle is gone when the scratch memory is looked at.
    let view = scratch.share();
    view.region().copy_from(0, arena.target.region(), arena.window, arena.shadow.len());
}

pub(super) fn make_file(rng: &mut Rng, id: u64, largest: usize) -> (FileRef, SimFile) {
    let aligned = |memory, offset| Some(DirectAlignment { memory, offset });
    let direct =
        rng.pick(&[None, None, None, aligned(512, 512), aligned(512, 512), aligned(4, 512), aligned(4096, 4096)]);
    let size = match rng.below(6) {
        0 => rng.below(10),
        1 => rng.range(1, 8) * 512,
        _ => rng.below(largest as u64 * 5 + 600),
    };
    let bad = rng.below(size + 1);
    let mut file = SimFile {
        id: id as u32,
        key: mix(id + 1),
        size,
        truncated: rng.chance(80).then(|| (rng.below(400_000), rng.below(size + 1))),
        direct,
        late: false,
        bad: if rng.chance(80) { bad..bad + rng.below(300) } else { 0..0 },
    };
    if rng.chance(80)
        && let Some(late) = late_file()
    {
        let fd = late.as_fd().as_raw_fd();
        file = SimFile { id: fd as u32, direct: late.direct(), late: true, ..file };
        return (FileRef::from(fd), file);
    }
    (FileRef::simulated(file.id, direct), file)
}

pub(super) fn make_nature(rng: &mut Rng) -> Nature {
    let commands = rng.pick(&[1, 2, 3, 8, 14, 28, 56]);
    Nature {
        sq_entries: rng.pick(&[1, 2, 4, 8, 32]),
        cq_entries: if rng.chance(250) { rng.sized(1, commands) } else { commands + commands.div_ceil(8) },
        commands,
        deferred: rng.chance(500),
        readv_fixed: rng.chance(500),
        adopts: rng.chance(700),
        short: rng.pick(&[0, 50, 300, 850]),
        interrupted: rng.pick(&[0, 0, 20, 200]),
        again: rng.pick(&[0, 0, 20, 200]),
        error: rng.pick(&[0, 0, 10, 80]),
        garbage: rng.pick(&[0, 300, 1000]),
        enter_fails: rng.pick(&[0, 0, 30, 250]),
        cancel_works: rng.pick(&[0, 500, 1000]),
        service: rng.pick(&[2_000, 30_000, 300_000]),
    }
}

/// One or two arenas, filled with noise and divided into places with guard bytes around each.
fn make_memory(rng: &mut Rng, largest: usize) -> Check<(Vec<Arena>, Vec<Place>)> {
    let (mut arenas, mut places) = (Vec::new(), Vec::new());
    for arena in 0..rng.sized(1, 2) {
        let mut at = rng.sized(GAP, 600);
        for _ in 0..rng.sized(2, if largest > 5_000 { 4 } else { 10 }) {
            if rng.chance(400) {
                at = at.next_multiple_of(512);
            }
            places.push(Place { arena, start: at, len: largest, free: true });
            at += largest + rng.sized(GAP, 40);
        }
        let len = at + GAP;
        let registered = rng.chance(500);
        // A registration is split at each GiB; the window then lies across a split. Only touched pages cost memory.
        let split = registered && rng.chance(60);
        let window = if split { SPLIT - rng.index(len) } else { 0 };
        let options = MappedOptions { huge_pages: HugePages::Off, ..MappedOptions::default() };
        let mut memory = MappedBuffer::<u8>::alloc_with(window + len + GAP, options).map_err(text)?;
        for place in places.iter_mut().filter(|place| place.arena == arena) {
            place.start += window;
        }
        let mut shadow = vec![0; len];
        rng.fill(&mut shadow);
        let view = memory.share();
        view.region().copy_in(window, &shadow);
        let target = if registered {
            // Not always all of the region: offsets in the registration differ from those in the region then.
            let skip = if split { 0 } else { rng.index(GAP) };
            let part = GpuMappedBuffer::whole(Arc::clone(view.region())).sub_region(skip, window + len - skip);
            Target::Registered(BufferEntry::simulated(&part.map_err(text)?, arena as u16 * 100 + 3))
        } else {
            Target::Plain(Arc::clone(view.region()))
        };
        drop(view);
        arenas.push(Arena { memory, target, window, shadow });
    }
    Ok((arenas, places))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs seeds with a deliberate fault until `wanted` of them had the opportunity; returns how many were noticed.
    fn noticed(mutation: Mutation, wanted: usize) -> usize {
        let (mut fired, mut noticed) = (0, 0);
        for seed in 0..20_000 {
            match guarded(seed, Some(mutation), false) {
                Ok(report) if !report.fired => continue,
                Ok(_) => {}
                Err(_) => noticed += 1,
            }
            fired += 1;
            if fired == wanted {
                println!("{mutation:?}: {noticed} of {fired} noticed");
                return noticed;
            }
        }
        panic!("{mutation:?} had {fired} opportunities only");
    }

    #[test]
    fn a_short_read_reported_as_full_is_noticed() {
        assert_eq!(noticed(Mutation::ShortAsFull, 100), 100);
    }

    #[test]
    fn a_lost_completion_is_noticed() {
        assert_eq!(noticed(Mutation::LostCompletion, 30), 30);
    }

    #[test]
    fn a_duplicate_completion_is_noticed() {
        assert_eq!(noticed(Mutation::DuplicateCompletion, 100), 100);
    }

    #[test]
    fn a_completion_without_its_data_is_noticed() {
        assert_eq!(noticed(Mutation::MissingData, 100), 100);
    }

    #[test]
    fn one_wrong_byte_is_noticed() {
        assert_eq!(noticed(Mutation::WrongByte, 100), 100);
    }

    #[test]
    fn a_write_outside_the_destination_is_noticed() {
        assert_eq!(noticed(Mutation::StrayByte, 100), 100);
    }

    /// Unless the flight publishes the right tail before anybody looks.
    #[test]
    fn a_tail_published_early_is_noticed() {
        assert!(noticed(Mutation::EarlyTail, 100) >= 90);
    }

    #[test]
    fn a_tail_that_goes_back_is_noticed() {
        assert!(noticed(Mutation::TailGoesBack, 100) >= 70);
    }

    #[test]
    fn memory_that_is_kept_is_noticed() {
        assert_eq!(noticed(Mutation::KeptMemory, 100), 100);
    }

    #[test]
    fn a_false_end_of_file_is_noticed() {
        assert_eq!(noticed(Mutation::FalseEndOfFile, 100), 100);
    }
}
