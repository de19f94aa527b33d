//! The program that uses the driver: requests, turns, cancellation, and one of several ways to end.

mod checks;
mod ending;
mod records;
mod setup;

use super::super::harness::{Check, ensure};
use super::super::rng::Rng;
use super::super::sim::{Sim, SimFile};
use super::reads::SimReads;
use super::world::World;
use super::{DriverSimReport, Fault, Setup};
use crate::error::{PipelineError, Result};
use crate::ingest::{Core, IngestRequest, IoQueue, NvmeGpuIngestTelemetry};
use crate::uring::FileRef;
use crate::wire::state;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(100);

/// A request that was accepted.
#[derive(Debug)]
struct Asked {
    file: usize,
    file_offset: u64,
    len: u32,
    tag: u64,
    timeout: Option<Duration>,
    /// When it was submitted, at the latest.
    at: u64,
    cancel_asked: bool,
    ended: bool,
}

/// Sums since the last reset, to compare with the driver's telemetry.
#[derive(Debug, Default)]
struct Sums {
    since: u64,
    telemetry: NvmeGpuIngestTelemetry,
    latencies: Vec<Duration>,
    /// The world's and the simulator's numbers at the reset.
    published: u64,
    poisoned: u64,
    early: u64,
    short: u64,
    bounced: u64,
}

struct Play {
    rng: Rng,
    core: Core<SimReads>,
    files: Vec<FileRef>,
    setup: Setup,
    max_retries: u8,
    strict: bool,
    bounce_slot_bytes: usize,
    asked: Vec<Asked>,
    /// Records taken.
    taken: u64,
    sums: Sums,
    /// `finish` was called.
    finishing: bool,
    /// The end was announced beside the driver.
    ended_outside: bool,
    deadlines: bool,
    /// Every consumer goes on, so that a wait without a timeout ends.
    lively: bool,
    /// Nothing goes wrong but the deliberate fault.
    gentle: bool,
    errors_before: u64,
    report: DriverSimReport,
    trace: bool,
}

pub(super) fn run(seed: u64, fault: Option<Fault>, trace: bool) -> Check<DriverSimReport> {
    let mut play = Play::new(seed, fault, trace)?;
    let ended = play.play();
    let Play { core, mut report, .. } = play;
    let (reads, queue) = core.into_parts();
    let SimReads { mut flight, mut world, .. } = reads;
    // What was found first, where no error could be returned, explains what was found later.
    let first = flight.queue.violation.take().or(world.violation.take());
    let ended = first.map_or(ended, Err);
    report.commands = flight.queue.commands;
    report.nanoseconds = flight.queue.clock();
    (report.published, report.early, report.pops) = (world.published, world.early, world.pops);
    report.stalls = world.stalls_least;
    report.ends = u64::from(world.state == state::END);
    report.fired = world.mischief.fired;
    drop((flight, world));
    if ended.is_err() {
        queue.consumers_stopped();
    }
    ended?;
    memory_is_back(queue)?;
    Ok(report)
}

/// Nothing but the queue refers to the memory any more, and it can be freed once the consumers are said to have stopped.
fn memory_is_back(queue: Arc<IoQueue>) -> Check {
    ensure!(Arc::strong_count(queue.slot_memory().region()) == 1, "the slots are still referred to");
    let queue = match queue.destroy() {
        Ok(()) => return Err("destroyed while lent out".to_owned()),
        Err((queue, error)) => {
            ensure!(error.errno() == libc::EBUSY, "destroy: {error}");
            queue
        }
    };
    queue.consumers_stopped();
    queue.destroy().map_err(|(_, error)| error.to_string())
}

impl Play {
    fn world(&mut self) -> &mut World {
        &mut self.core.reads.world
    }

    fn sim(&self) -> &Sim<'static> {
        &self.core.reads.flight.queue
    }

    fn clock(&self) -> u64 {
        self.sim().clock()
    }

    fn play(&mut self) -> Check {
        let wanted = if self.rng.chance(30) { self.rng.range(100, 300) } else { self.rng.range(4, 50) };
        self.check()?;
        let mut after = self.rng.below(40);
        for _ in 0..wanted * 6 {
            if self.asked.len() as u64 >= wanted || after == 0 {
                break;
            }
            // A closed queue takes nothing more: soon enough it is clear that it does not.
            after -= u64::from(self.world().words.state() != state::OPEN);
            let choice = self.rng.below(1000);
            self.step(choice)?;
        }
        match self.rng.below(10) {
            0..6 => self.complete()?,
            6..8 => self.shut(LONG)?,
            8 => {
                let hurry = Duration::from_nanos(self.rng.below(30_000));
                self.shut(hurry)?;
            }
            _ => self.drop_elsewhere()?,
        }
        self.afterwards()
    }

    fn begin(&mut self) {
        self.core.reads.flight.queue.begin_step();
        self.errors_before = self.sim().enter_errors;
        self.report.steps += 1;
    }

    /// One call of the driver, or something beside it, and all checks after it.
    fn step(&mut self, choice: u64) -> Check {
        self.begin();
        match choice {
            0..300 => self.submit()?,
            300..360 => self.submit_batch()?,
            360..400 => self.submit_stretch()?,
            400..540 => self.turn(0, None)?,
            540..640 => {
                let min = self.rng.sized(1, 4);
                let timeout = self.timeout();
                self.turn(min, timeout)?;
            }
            640..760 => {
                let count = self.rng.index(6);
                self.take(count)?;
            }
            760..890 => {
                let rounds = self.rng.range(1, 12);
                let SimReads { flight, world, .. } = &mut self.core.reads;
                world.bustle(&flight.queue, rounds)?;
            }
            890..905 if !self.gentle => self.cancel()?,
            905..907 if !self.gentle => self.cancel_all()?,
            907..925 => self.nonsense()?,
            925..935 => self.reset()?,
            935 if !self.gentle => {
                let errno = self.rng.pick(&[libc::EIO, libc::ENODEV, 1]);
                self.world().host_abort(errno)?;
                self.note("abort", errno);
            }
            936..940 if !self.gentle => self.finish()?,
            940 if !self.gentle => self.finish_outside()?,
            941..950 => self.mischief(),
            _ => {
                let time = self.rng.below(60_000);
                self.core.reads.flight.queue.pass(time);
            }
        }
        self.check()
    }

    fn note(&self, what: &str, outcome: impl Debug) {
        if self.trace {
            let (core, world) = (&self.core, &self.core.reads.world);
            eprintln!(
                "{:>12} ns  {what}: {outcome:?}; {} in flight, {} queued, {} ready, {} held, tail {}",
                self.clock(),
                core.in_flight(),
                core.queued(),
                core.ready(),
                core.held(),
                world.words.tail()
            );
        }
    }

    fn timeout(&mut self) -> Option<Duration> {
        let nanoseconds = self.rng.pick(&[0, 100, 10_000, 1_000_000, 20_000_000]);
        (!self.lively || self.rng.chance(700)).then_some(Duration::from_nanos(nanoseconds))
    }

    // Submitting

    fn make_request(&mut self) -> (usize, IngestRequest) {
        let file = self.rng.index(self.files.len());
        let SimFile { size, direct, .. } = self.sim().files[file];
        let slot_bytes = self.setup.queue.slot_bytes;
        let len = match self.rng.below(10) {
            0 => 0,
            1..5 => slot_bytes,
            _ => self.rng.below(u64::from(slot_bytes) + 1) as u32,
        };
        // Most requests are inside the file, some across its end or beyond.
        let mut file_offset = match self.rng.below(12) {
            0 => size.saturating_sub(self.rng.below(slot_bytes.into())),
            1 => size + self.rng.below(600),
            2 => self.rng.below(size + 1),
            _ => self.rng.below(size.saturating_sub(len.into()) + 1),
        };
        if let Some(direct) = direct
            && self.rng.chance(300)
        {
            file_offset -= file_offset % u64::from(direct.offset);
        }
        let mut request = IngestRequest::new(self.files[file].clone(), file_offset, len, self.rng.below(4));
        if self.deadlines && self.rng.chance(600) {
            let nanoseconds = self.rng.pick(&[0, 1_000, 20_000, 200_000, 5_000_000]);
            request.timeout = Some(Duration::from_nanos(nanoseconds));
        }
        (file, request)
    }

    fn asks(&mut self, file: usize, request: &IngestRequest) {
        let &IngestRequest { file_offset, len, tag, timeout, .. } = request;
        let at = self.clock();
        self.asked.push(Asked { file, file_offset, len, tag, timeout, at, cancel_asked: false, ended: false });
        self.sums.telemetry.submitted.reads += 1;
        self.sums.telemetry.submitted.bytes += u64::from(len);
        self.report.requests += 1;
    }

    fn reserved(&self) -> u64 {
        self.core.reads.world.sequences.len() as u64
    }

    /// Most requests whose records were not taken.
    fn capacity(&self) -> usize {
        2 * self.setup.queue.slots as usize + self.setup.queue_limit
    }

    fn unreported(&self) -> usize {
        self.core.in_flight() + self.core.queued() + self.core.ready()
    }

    /// What a submit must say now: an errno, or 0 when it must be accepted.
    fn due(&self) -> i32 {
        let world = &self.core.reads.world;
        match world.words.state() {
            _ if self.finishing => return libc::EBUSY,
            _ if world.words.abort() != 0 => return libc::ECANCELED,
            state::OPEN => {}
            state::END => return libc::EBUSY,
            _ => return libc::ECANCELED,
        }
        if self.unreported() >= self.capacity() {
            return libc::EAGAIN;
        }
        let starts = self.core.queued() == 0 && self.core.reads.flight.in_flight() < self.setup.depth as u32;
        let accepted = starts && world.free(self.reserved()) || self.core.queued() < self.setup.queue_limit;
        if accepted { 0 } else { libc::EAGAIN }
    }

    fn submitted(&mut self, due: i32, found: &Result<u64>, stalls: bool) -> Check {
        match found {
            Ok(number) => {
                ensure!(due == 0, "request {number} was accepted, errno {due} is due");
                ensure!(*number == self.asked.len() as u64, "request {number}, {} is next", self.asked.len());
            }
            Err(error) => {
                ensure!(error.errno() == due, "refused, errno {due} is due: {error}");
                if stalls && due == libc::EAGAIN {
                    self.world().must_stall();
                }
            }
        }
        Ok(())
    }

    /// Whether a refusal now is for want of a slot.
    fn would_stall(&self) -> bool {
        let starts = self.core.queued() == 0 && self.core.reads.flight.in_flight() < self.setup.depth as u32;
        starts && self.unreported() < self.capacity()
    }

    fn submit(&mut self) -> Check {
        let (file, request) = self.make_request();
        let (due, stalls) = (self.due(), self.would_stall());
        let submitted = self.core.submit(request.clone());
        self.note(
            &format!("submit {}+{} tag {} {:?}", request.file_offset, request.len, request.tag, request.timeout),
            &submitted,
        );
        self.submitted(due, &submitted, stalls)?;
        if submitted.is_ok() {
            self.asks(file, &request);
        }
        self.note_queue();
        Ok(())
    }

    fn note_queue(&mut self) {
        let queued = self.core.queued() as u64;
        let most = &mut self.sums.telemetry.max_queued;
        *most = (*most).max(queued);
    }

    fn submit_batch(&mut self) -> Check {
        let count = self.rng.sized(1, 9);
        let requests: Vec<_> = std::iter::repeat_with(|| self.make_request()).take(count).collect();
        let due = self.due();
        let submitted = self.core.submit_batch(requests.iter().map(|(_, request)| request.clone()));
        self.note(&format!("submit a batch of {count}"), &submitted);
        self.batched(due, count, submitted, &requests)
    }

    /// As `NvmeGpuIngestDriver::submit_file` cuts a stretch of a file.
    fn submit_stretch(&mut self) -> Check {
        let (file, first) = self.make_request();
        let piece = self.setup.queue.slot_bytes;
        let count = self.rng.range(1, 6);
        let requests: Vec<_> = (0..count)
            .map(|index| {
                let len = if index + 1 == count { first.len } else { piece };
                let file_offset = first.file_offset + index * u64::from(piece);
                (file, IngestRequest { file_offset, len, ..first.clone() })
            })
            .collect();
        let due = self.due();
        let submitted = self.core.submit_batch(requests.iter().map(|(_, request)| request.clone()));
        self.note(&format!("submit a stretch of {count}"), &submitted);
        self.batched(due, count as usize, submitted, &requests)
    }

    fn batched(
        &mut self,
        due: i32,
        count: usize,
        submitted: Result<usize>,
        requests: &[(usize, IngestRequest)],
    ) -> Check {
        let accepted = match submitted {
            Ok(accepted) => {
                ensure!(due == 0 && (1..=count).contains(&accepted), "{accepted} accepted, errno {due} is due");
                accepted
            }
            Err(error) => {
                ensure!(due == error.errno(), "refused, errno {due} is due: {error}");
                0
            }
        };
        for (file, request) in &requests[..accepted] {
            self.asks(*file, request);
        }
        if accepted > 0 && accepted < count {
            let due = self.due();
            ensure!(due != 0, "the rest of a batch was refused in spite of room");
        }
        self.note_queue();
        Ok(())
    }

    fn nonsense(&mut self) -> Check {
        let (_, request) = self.make_request();
        let slot_bytes = self.setup.queue.slot_bytes;
        for bad in [
            IngestRequest { len: slot_bytes + 1, ..request.clone() },
            IngestRequest { len: u32::MAX, ..request.clone() },
            IngestRequest { file_offset: i64::MAX as u64, len: 1, ..request.clone() },
            IngestRequest { file_offset: u64::MAX, ..request },
        ] {
            let refused = self.core.submit(bad).err().map(|error| error.errno());
            ensure!(refused == Some(libc::ERANGE), "nonsense was answered {refused:?}");
        }
        Ok(())
    }

    // Driving

    fn turn(&mut self, min: usize, timeout: Option<Duration>) -> Check {
        let before = self.clock();
        let turned = self.core.turn(min, timeout);
        self.note(&format!("turn {min} {timeout:?}"), &turned);
        let took = Duration::from_nanos(self.clock() - before);
        if let (Some(timeout), true) = (timeout, min > 0) {
            let limit = timeout + Duration::from_millis(1);
            ensure!(took <= limit, "a wait with timeout {timeout:?} took {took:?}");
        }
        let (ready, left) = (self.core.ready(), self.core.in_flight() + self.core.queued());
        let looked = match turned {
            Ok(()) => {
                ensure!(ready >= min || left == 0, "a wait for {min} ended with {ready} ready and {left} to come");
                true
            }
            Err(PipelineError::TimedOut { .. }) => {
                ensure!(timeout.is_some_and(|timeout| took >= timeout), "timed out after {took:?} of {timeout:?}");
                ensure!(ready < min && left > 0, "timed out with {ready} of {min} ready");
                true
            }
            Err(error) => {
                self.system_error(&error)?;
                false
            }
        };
        if let Err(error) = self.core.settle(0, Ok(())) {
            self.system_error(&error)?;
        }
        if looked {
            // Unless the last it did was to hand over what it had just started: slots may have come free meanwhile.
            let waits = self.core.queued() > 0
                && self.core.reads.flight.in_flight() < self.setup.depth as u32
                && !self.core.reads.was_fresh;
            let world = &mut self.core.reads.world;
            let next = world.sequences.len() as u64;
            if waits && world.words.state() == state::OPEN {
                ensure!(!world.free(next), "a request waits, and sequence {next} has a slot");
                world.must_stall();
            }
            // Whoever's time was over before the turn has ended.
            self.take(usize::MAX)?;
            let late = |asked: &&Asked| {
                !asked.ended
                    && asked
                        .timeout
                        .is_some_and(|timeout| u128::from(before) >= u128::from(asked.at) + timeout.as_nanos())
            };
            if let Some(late) = self.asked.iter().find(late) {
                return Err(format!("its time is over, and it has not ended: {late:?}"));
            }
        }
        Ok(())
    }

    /// A system call's error is allowed only if the simulated kernel answered it in this step.
    fn system_error(&self, error: &PipelineError) -> Check {
        let known = matches!(error.errno(), libc::EAGAIN | libc::EBUSY);
        ensure!(known && self.sim().enter_errors > self.errors_before, "an error out of nowhere: {error}");
        Ok(())
    }

    // Cancellation and ending

    fn cancel_marked(&mut self, wanted: impl Fn(&Asked) -> bool) -> usize {
        let open = self.asked.iter_mut().filter(|asked| !asked.ended && wanted(asked));
        open.map(|asked| asked.cancel_asked = true).count()
    }

    fn cancel(&mut self) -> Check {
        let tag = self.rng.below(5);
        self.take(usize::MAX)?;
        let due = self.cancel_marked(|asked| asked.tag == tag);
        let count = self.core.cancel(tag);
        self.note(&format!("cancel tag {tag}"), count);
        ensure!(count == due, "{count} were cancelled, {due} have the tag");
        Ok(())
    }

    fn cancel_all(&mut self) -> Check {
        self.take(usize::MAX)?;
        let due = self.cancel_marked(|_| true);
        let count = self.core.cancel_all();
        self.note("cancel all", count);
        ensure!(count == due, "{count} were cancelled of {due}");
        Ok(())
    }

    fn finish(&mut self) -> Check {
        let was_closed = self.world().words.state() != state::OPEN;
        self.finishing = true;
        self.world().end_wanted = true;
        self.core.finish();
        self.note("finish", ());
        let closed = self.world().words.state() != state::OPEN;
        ensure!(
            was_closed || closed == (self.core.queued() == 0),
            "finished with {} queued: {closed}",
            self.core.queued()
        );
        Ok(())
    }

    /// Another part of the program ends the queue.
    fn finish_outside(&mut self) -> Check {
        let open = self.world().words.state() == state::OPEN;
        self.world().end_wanted = true;
        let done = self.world().queue.finish();
        self.note("finish beside the driver", done);
        ensure!(done == open, "finish said {done}");
        self.ended_outside = true;
        Ok(())
    }
}
