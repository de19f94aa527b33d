//! The driver's logic: when a request gets a slot, when it is given up, and what to wait for.
//!
//! Generic over [`Reads`], so the kernel and the simulator run the same code. One thread.

use super::super::io_queue::IoQueue;
use super::super::producer::Refusal;
use super::super::telemetry::NvmeGpuIngestTelemetry;
use super::ledger::{Ledger, Reading, Stage};
use super::reads::{Reads, SlotRead};
use super::{IngestCompletion, IngestRequest};
use crate::error::{PipelineError, Result};
use crate::uring::{Completion, StreamStats};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Looks for a credit before a nap.
const SPINS: u32 = 200;
/// Yields after them.
const YIELDS: u32 = 200;

/// Longest wait for a read without a look whether one side gave up.
const ABORT_POLL: Duration = Duration::from_millis(10);

/// What the core needs of the driver's options.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CoreOptions {
    /// Most reads in flight.
    pub(crate) depth: usize,
    /// Most requests waiting for a slot.
    pub(crate) queue_limit: usize,
    /// Time between two looks while only consumers can make progress.
    pub(crate) credit_poll: Duration,
    /// Put the payload's CRC32C into each descriptor.
    pub(crate) crc32c: bool,
}

/// A request without a slot.
#[derive(Debug)]
struct Waiting {
    number: u64,
    request: IngestRequest,
    at: Duration,
    deadline: Duration,
}

/// What the next request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blocked {
    /// None waits.
    No,
    /// A read in flight to end.
    Depth,
    /// Consumers to release a slot.
    Credit,
    /// Nothing: the queue takes no more.
    Closed,
}

/// See the module's text.
pub(crate) struct Core<R> {
    pub(crate) reads: R,
    ledger: Ledger,
    options: CoreOptions,
    waiting: VecDeque<Waiting>,
    requests: u64,
    /// No deadline is before this.
    earliest: Duration,
    /// Since when no slot was to be had.
    stalled: Option<Duration>,
    finishing: bool,
    /// Everything was cancelled because one side aborted.
    abort_seen: bool,
    /// A system call's error that had to wait because records came with it.
    deferred: Option<PipelineError>,
    /// The stream's numbers at the last reset.
    before: StreamStats,
}

impl<R: Reads> Core<R> {
    pub(crate) fn new(reads: R, queue: Arc<IoQueue>, options: CoreOptions) -> Self {
        Self {
            ledger: Ledger::new(queue, options.queue_limit, options.crc32c),
            waiting: VecDeque::with_capacity(options.queue_limit),
            requests: 0,
            earliest: Duration::MAX,
            stalled: None,
            finishing: false,
            abort_seen: false,
            deferred: None,
            before: reads.stats(),
            options,
            reads,
        }
    }

    pub(crate) fn queue(&self) -> &Arc<IoQueue> {
        &self.ledger.queue
    }

    /// Requests that have a slot and have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.ledger.reading
    }

    /// Requests without a slot.
    pub(crate) fn queued(&self) -> usize {
        self.waiting.len()
    }

    /// Records that can be taken.
    pub(crate) fn ready(&self) -> usize {
        self.ledger.ended.len()
    }

    /// Slots whose reads outlive their deadline.
    pub(crate) fn held(&self) -> usize {
        self.ledger.held
    }

    fn outstanding(&self) -> usize {
        self.ledger.reading + self.waiting.len()
    }

    // Submitting

    /// Accepts a request; returns its number.
    #[inline]
    pub(crate) fn submit(&mut self, request: IngestRequest) -> Result<u64> {
        let now = self.reads.now();
        self.submit_at(request, now)
    }

    /// Accepts requests in order; how many. The error is that of the first, when none was accepted.
    pub(crate) fn submit_batch(&mut self, requests: impl Iterator<Item = IngestRequest>) -> Result<usize> {
        let now = self.reads.now();
        let mut accepted = 0;
        for request in requests {
            // An error is made in words only to be returned.
            if accepted > 0 && !self.has_room() {
                break;
            }
            match self.submit_at(request, now) {
                Ok(_) => accepted += 1,
                Err(error) if accepted == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(accepted)
    }

    /// Whether one more request can be accepted.
    #[inline]
    fn has_room(&self) -> bool {
        let starts = || {
            let depth = self.reads.in_flight() < self.options.depth;
            self.waiting.is_empty() && depth && self.ledger.queue.producer().has_free()
        };
        self.outstanding() + self.ledger.ended.len() < self.ledger.capacity
            && (self.waiting.len() < self.options.queue_limit || starts())
    }

    #[inline]
    fn submit_at(&mut self, mut request: IngestRequest, now: Duration) -> Result<u64> {
        let IngestRequest { file_offset, len, timeout, .. } = request;
        PipelineError::check_range("a read into a slot", 0, len.into(), self.ledger.queue.slot_bytes().into())?;
        PipelineError::check_range("file offset", file_offset, len.into(), i64::MAX as u64)?;
        if self.finishing {
            return Err(PipelineError::busy("the driver", "it was finished: make a new one"));
        }
        let producer = self.ledger.queue.producer();
        // The consumers' word too, which nothing else has looked at yet.
        producer.check_abort();
        if let Some(refusal) = producer.closed() {
            return Err(self.ledger.queue.refusal(refusal));
        }
        if self.outstanding() + self.ledger.ended.len() >= self.ledger.capacity {
            return Err(PipelineError::QueueFull {
                queue: "the driver",
                fix: format!("take completions: {} records wait", self.ledger.ended.len()).into(),
            });
        }
        let deadline = timeout.map_or(Duration::MAX, |timeout| now.saturating_add(timeout));
        request.file = self.reads.resolve(request.file)?;
        let number = self.requests;
        let sequence = if self.waiting.is_empty() { self.slot() } else { Err(Blocked::Credit) };
        match sequence {
            Ok(sequence) => self.start(sequence, number, request, now, deadline),
            Err(blocked) if blocked != Blocked::Closed && self.waiting.len() < self.options.queue_limit => {
                // What is registered stays what it is until the request is read.
                self.reads.count_user(&request.file, 1);
                self.waiting.push_back(Waiting { number, request, at: now, deadline });
                self.ledger.counts.max_queued = self.ledger.counts.max_queued.max(self.waiting.len() as u64);
            }
            Err(_) => return Err(self.full()),
        }
        self.requests += 1;
        self.ledger.counts.submitted.add(len.into());
        self.earliest = self.earliest.min(deadline);
        Ok(number)
    }

    #[cold]
    fn full(&self) -> PipelineError {
        let flying = self.reads.in_flight();
        let fix = match flying >= self.options.depth {
            true => format!("poll for completions ({flying} in flight)"),
            false => format!("wait for consumers to release one of the {} slots", self.ledger.queue.slots()),
        };
        PipelineError::QueueFull { queue: "the io_queue", fix: fix.into() }
    }

    /// The next sequence, if a read into its slot can start.
    #[inline]
    fn slot(&mut self) -> std::result::Result<u64, Blocked> {
        if self.reads.in_flight() >= self.options.depth {
            return Err(Blocked::Depth);
        }
        match self.ledger.queue.producer().reserve() {
            Ok(sequence) => {
                if self.stalled.is_some() {
                    let now = self.reads.now();
                    self.end_stall(now);
                }
                Ok(sequence)
            }
            Err(Refusal::NoCredit | Refusal::Held) => {
                if self.stalled.is_none() {
                    self.stalled = Some(self.reads.now());
                    self.ledger.counts.credit_stalls += 1;
                }
                Err(Blocked::Credit)
            }
            Err(Refusal::Ended | Refusal::Aborted(_)) => {
                // No slot will come.
                let now = self.reads.now();
                self.end_stall(now);
                Err(Blocked::Closed)
            }
        }
    }

    fn end_stall(&mut self, now: Duration) {
        if let Some(since) = self.stalled.take() {
            self.ledger.counts.credit_stall_time += now.saturating_sub(since);
        }
    }

    /// Starts the read of a request that has a sequence.
    #[inline]
    fn start(&mut self, sequence: u64, request: u64, wanted: IngestRequest, at: Duration, deadline: Duration) {
        let IngestRequest { file, file_offset, len, tag, .. } = wanted;
        let slot = self.ledger.slot_of(sequence);
        let alignment = u64::from(self.ledger.queue.alignment());
        // The same as the file's offset modulo every block size there is room for, so that O_DIRECT reads whole blocks
        // around the payload straight into the slot; and modulo 16, for bulk copies.
        let data_offset = file_offset & (alignment - 1);
        let mut lead = 0;
        let mut read = u64::from(len);
        if let Some(direct) = file.direct()
            && u64::from(direct.offset.max(direct.memory)) <= alignment
            && len > 0
        {
            let block = u64::from(direct.offset) - 1;
            let end = (file_offset + read + block) & !block;
            if end <= i64::MAX as u64 {
                lead = file_offset & block;
                read = end - (file_offset - lead);
            }
        }
        let offset = slot as u64 * self.ledger.queue.slot_stride() + data_offset - lead;
        let number = self.reads.submit(SlotRead {
            file,
            file_offset: file_offset - lead,
            offset: offset as usize,
            len: read as usize,
            slack: (read - lead - u64::from(len)) as u32,
            user_data: sequence,
        });
        let stage = Stage::Reading;
        let (data_offset, lead) = (data_offset as u32, lead as u32);
        let (number, refused) = number.map_or_else(|error| (0, Some(error)), |number| (number, None));
        self.ledger.begin(
            slot,
            Reading { stage, sequence, request, tag, file_offset, len, data_offset, lead, number, at, deadline },
        );
        if let Some(error) = refused {
            // A request that cannot work fails as a completion, like any other.
            let failed = Completion { status: -error.errno(), ..Completion::default() };
            self.ledger.end(slot, &failed);
            self.ledger.settle(at);
        }
    }

    /// Starts requests that wait, in order, as far as slots and depth go.
    fn start_waiting(&mut self) -> Blocked {
        while !self.waiting.is_empty() {
            // Also while the depth is used up: a read that hangs must not keep them.
            let closed = self.ledger.queue.producer().closed().map(|_| Blocked::Closed);
            match closed.map_or_else(|| self.slot(), Err) {
                Ok(sequence) => {
                    if let Some(Waiting { number, request, at, deadline }) = self.waiting.pop_front() {
                        // The read counts for itself at once.
                        self.reads.count_user(&request.file, -1);
                        self.start(sequence, number, request, at, deadline);
                    }
                }
                Err(Blocked::Closed) => {
                    // Whoever ended the queue beside the driver wants nothing more.
                    self.end_waiting_where(|_| true, libc::ECANCELED);
                }
                Err(blocked) => return blocked,
            }
        }
        let producer = self.ledger.queue.producer();
        if self.stalled.is_some() && (producer.has_free() || producer.closed().is_some()) {
            let now = self.reads.now();
            self.end_stall(now);
        }
        if self.finishing {
            // The number of sequences is known only now.
            self.ledger.queue.finish();
        }
        Blocked::No
    }

    /// No request follows. END is published once all that wait have a slot.
    pub(crate) fn finish(&mut self) {
        self.finishing = true;
        self.start_waiting();
    }

    // Ends

    /// Ends requests whose deadline has passed.
    fn expire(&mut self) {
        if self.earliest == Duration::MAX {
            return;
        }
        let now = self.reads.now();
        if now < self.earliest {
            return;
        }
        self.earliest = Duration::MAX;
        for slot in 0..self.ledger.readings.len() {
            let Reading { stage, deadline, number, .. } = self.ledger.readings[slot];
            if stage != Stage::Reading {
                continue;
            }
            if deadline <= now {
                self.ledger.poison_early(slot, libc::ETIMEDOUT, now);
                self.reads.cancel(number);
            } else {
                self.earliest = self.earliest.min(deadline);
            }
        }
        self.end_waiting_where(|request| request.deadline <= now, libc::ETIMEDOUT);
        self.earliest = self.waiting.iter().map(|request| request.deadline).fold(self.earliest, Duration::min);
    }

    /// Ends the requests without a slot that are wanted; how many.
    fn end_waiting_where(&mut self, wanted: impl Fn(&Waiting) -> bool, errno: i32) -> usize {
        let before = self.waiting.len();
        let now = self.reads.now();
        for _ in 0..before {
            let Some(request) = self.waiting.pop_front() else { break };
            if wanted(&request) {
                self.reads.count_user(&request.request.file, -1);
                self.ledger.end_without_slot(request.number, &request.request, request.at, errno, now);
            } else {
                self.waiting.push_back(request);
            }
        }
        before - self.waiting.len()
    }

    /// Asks for the requests with a tag to be cancelled; how many there are.
    pub(crate) fn cancel(&mut self, tag: u64) -> usize {
        self.cancel_where(|other| other == tag)
    }

    /// Asks for everything to be cancelled.
    pub(crate) fn cancel_all(&mut self) -> usize {
        self.cancel_where(|_| true)
    }

    fn cancel_where(&mut self, wanted: impl Fn(u64) -> bool) -> usize {
        let mut count = self.end_waiting_where(|waiting| wanted(waiting.request.tag), libc::ECANCELED);
        for slot in 0..self.ledger.readings.len() {
            let Reading { stage, tag, number, .. } = self.ledger.readings[slot];
            if stage == Stage::Reading && wanted(tag) {
                self.reads.cancel(number);
                count += 1;
            }
        }
        count
    }

    // Driving

    /// Hands over to the kernel, publishes what has ended, and goes on until `min` records can be taken, nothing is left
    /// that could end, or the time is over (`ETIMEDOUT`).
    pub(crate) fn turn(&mut self, min: usize, timeout: Option<Duration>) -> Result<()> {
        let timeout = timeout.filter(|_| min > 0);
        let until = timeout.map(|timeout| self.reads.now().saturating_add(timeout));
        let (mut looks, mut reaped) = (0, false);
        loop {
            self.look_at_abort();
            let waiting = self.waiting.len();
            let blocked = self.start_waiting();
            reaped &= self.waiting.len() == waiting;
            let satisfied = self.ledger.ended.len() >= min || self.outstanding() == 0;
            let left = until.map(|until| until.saturating_sub(self.reads.now()));
            if satisfied || left == Some(Duration::ZERO) {
                if satisfied && reaped {
                    return Ok(());
                }
                // Even without time to wait, what is queued is handed over and what is done is found.
                self.reap(0, None)?;
                self.expire();
                let waiting = self.waiting.len();
                self.start_waiting();
                if self.waiting.len() < waiting {
                    self.reap(0, None)?;
                }
                if satisfied || self.ledger.ended.len() >= min || self.outstanding() == 0 {
                    return Ok(());
                }
                return Err(PipelineError::timed_out(
                    format!("waiting for {min} completions"),
                    format!(
                        "{} are there, {} reads are in flight, {} requests wait for a slot: wait again or cancel",
                        self.ledger.ended.len(),
                        self.ledger.reading,
                        self.waiting.len()
                    ),
                ));
            }
            let deadline = (self.earliest != Duration::MAX).then(|| self.earliest.saturating_sub(self.reads.now()));
            // No store of a consumer, and no abort, ends a wait in the kernel: it is taken up again now and then.
            let poll = Some(if blocked == Blocked::Credit { self.options.credit_poll } else { ABORT_POLL });
            let limit = left.into_iter().chain(deadline).chain(poll).min();
            if self.reads.in_flight() > 0 {
                // What the page cache has ends while it is handed over: no wait, and no timer for it.
                if !std::mem::replace(&mut reaped, true) {
                    self.reap(0, None)?;
                } else {
                    self.reap(1, limit)?;
                }
            } else if self.ledger.reading + self.ledger.held > 0 {
                // They ended without the kernel: reads of no bytes, or cancelled before they were handed over.
                self.reap(0, None)?;
            } else if looks < SPINS + YIELDS {
                // Only consumers can make progress, and no store of theirs wakes us: a short spin, then naps.
                looks += 1;
                match looks < SPINS {
                    true => std::hint::spin_loop(),
                    // A consumer may need this very core.
                    false => std::thread::yield_now(),
                }
                self.reap(0, None)?;
            } else {
                self.reads.pause(limit.unwrap_or(self.options.credit_poll));
            }
            self.expire();
            // Records are there, but too few: a ring that errs for good brings no more.
            if let Some(error) = self.deferred.take() {
                return Err(error);
            }
        }
    }

    fn reap(&mut self, min: usize, limit: Option<Duration>) -> Result<()> {
        let Self { reads, ledger, .. } = self;
        let driven = reads.turn(min, limit, |completion, clock| ledger.on_read(completion, clock));
        if ledger.has_unsettled() {
            ledger.settle(reads.now());
        }
        match driven {
            // Records first: the error waits for a call that has none.
            Err(error) if self.ledger.ended.is_empty() => Err(error),
            Err(error) => {
                self.deferred.get_or_insert(error);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// When one side gave up, nothing that is read now is wanted.
    fn look_at_abort(&mut self) {
        if !self.abort_seen && self.ledger.queue.producer().check_abort() != 0 {
            self.abort_seen = true;
            self.cancel_all();
        }
    }

    /// Takes the record of the request that ended first.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<IngestCompletion> {
        self.ledger.ended.pop_front()
    }

    /// Hands over at most `max` records, in the order in which their requests ended; how many.
    #[inline]
    pub(crate) fn hand_over(&mut self, max: usize, each: impl FnMut(&IngestCompletion)) -> usize {
        let count = max.min(self.ledger.ended.len());
        self.ledger.ended.range(..count).for_each(each);
        self.ledger.ended.drain(..count);
        count
    }

    pub(crate) fn peek_status(&self) -> Option<i32> {
        self.ledger.ended.front().map(|completion| completion.status)
    }

    /// What a call returns that has `count` records: these first. The error of a system call waits for one that has none;
    /// that time ran out is forgotten.
    pub(crate) fn settle(&mut self, count: usize, driven: Result<()>) -> Result<usize> {
        match driven {
            Err(error) if count == 0 => return Err(error),
            Err(PipelineError::TimedOut { .. }) | Ok(()) => {}
            Err(error) => drop(self.deferred.get_or_insert(error)),
        }
        match self.deferred.take_if(|_| count == 0) {
            Some(error) => Err(error),
            None => Ok(count),
        }
    }

    /// Cancels everything and waits until every read has ended, or for `limit`. Every request has ended afterwards, and
    /// every sequence is published. Whether every read has ended, too.
    pub(crate) fn shut(&mut self, limit: Duration) -> bool {
        let until = self.reads.now().saturating_add(limit);
        self.cancel_all();
        let mut errors = 0;
        loop {
            // Records beyond the capacity cannot come: each request has one.
            let failed = self.reap(0, None).is_err() || self.deferred.take().is_some();
            if self.ledger.reading + self.ledger.held == 0 {
                break;
            }
            let left = until.saturating_sub(self.reads.now());
            errors += u32::from(failed);
            if left.is_zero() || errors > 100 {
                break;
            }
            if self.reap(1, Some(left)).is_err() || self.deferred.take().is_some() {
                self.reads.pause(left.min(Duration::from_millis(1)));
            }
        }
        self.poison_all();
        self.ledger.reading + self.ledger.held == 0
    }

    /// Publishes every slot that is being read into as poison, and tells consumers how it ended.
    pub(crate) fn poison_all(&mut self) {
        let now = self.reads.now();
        self.end_waiting_where(|_| true, libc::ECANCELED);
        for slot in 0..self.ledger.readings.len() {
            if self.ledger.readings[slot].stage == Stage::Reading {
                self.ledger.poison_early(slot, libc::ECANCELED, now);
            }
        }
        if !matches!(self.ledger.queue.producer().closed(), Some(Refusal::Ended)) {
            self.ledger.queue.abort(libc::ECANCELED);
        }
    }

    pub(crate) fn into_parts(self) -> (R, Arc<IoQueue>) {
        (self.reads, Arc::clone(&self.ledger.queue))
    }

    // Numbers

    pub(crate) fn telemetry(&self) -> NvmeGpuIngestTelemetry {
        let stats = self.reads.stats();
        let stall = self.stalled.map_or(Duration::ZERO, |since| self.reads.now().saturating_sub(since));
        NvmeGpuIngestTelemetry {
            short_reads: stats.short_reads - self.before.short_reads,
            retries: stats.retries - self.before.retries,
            credit_stall_time: self.ledger.counts.credit_stall_time + stall,
            held_slots: self.ledger.held as u64,
            in_flight: self.ledger.reading as u64,
            queued: self.waiting.len() as u64,
            latency: self.ledger.latency.summary(),
            ..self.ledger.counts
        }
    }

    pub(crate) fn reset_telemetry(&mut self) {
        self.before = self.reads.stats();
        self.ledger.latency.clear();
        self.ledger.counts = NvmeGpuIngestTelemetry {
            max_in_flight: self.ledger.reading as u64,
            max_queued: self.waiting.len() as u64,
            ..NvmeGpuIngestTelemetry::default()
        };
        if self.stalled.is_some() {
            self.stalled = Some(self.reads.now());
            self.ledger.counts.credit_stalls = 1;
        }
    }
}
