//! The stream: what callers use of one io_uring on one thread.

mod submit;

use super::file::FileRef;
use super::flight::{Completion, Flight, FlightOptions, Segment, StreamStats};
use super::queue::{KernelQueue, Queue, Target};
use super::ring::{IoUringState, RingRegistrations};
use super::tail::TailWord;
use crate::error::{PipelineError, Result};
use crate::memory::GpuMappedBuffer;
use std::sync::Arc;
use std::time::Duration;

/// How a stream behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOptions {
    /// Most submissions in flight; 0 means the ring's submission queue size.
    pub depth: u32,
    /// Most submissions between the tail (or the oldest completion not taken) and the newest: how far completions may
    /// run ahead of a slow or failed one. Rounded up to a power of two; 0 means 4 × `depth`.
    pub window: u32,
    /// Do not register the buffer with the ring: the kernel pins it for each read.
    pub unregistered: bool,
    /// Fail rather than leave the registered path (say, when RLIMIT_MEMLOCK forbids the registration).
    pub strict: bool,
    /// Retries of a command after EINTR or EAGAIN without progress.
    pub max_retries: u8,
    /// Wait before the first of them; doubles with each.
    pub retry_backoff: Duration,
    /// How long drop waits for reads in flight before it leaks ring and memory.
    pub close_timeout: Duration,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            depth: 0,
            window: 0,
            unregistered: false,
            strict: false,
            max_retries: 10,
            retry_backoff: Duration::from_micros(50),
            close_timeout: Duration::from_secs(10),
        }
    }
}

/// Pieces of the bounce buffer, and their size: ragged ends are at most two blocks, whole unaligned reads go piecewise.
const BOUNCE_SLOTS: u16 = 8;
const BOUNCE_SLOT_BYTES: usize = 128 << 10;

/// What a closed stream leaves.
#[derive(Debug)]
pub struct CloseReport {
    /// The ring, to be used again.
    pub ring: IoUringState,
    /// Everything the stream did.
    pub stats: StreamStats,
    /// Submissions made.
    pub submitted: u64,
    /// The tail at the end.
    pub tail: u64,
}

/// Reads from files into one buffer, with a tail word that a consumer follows.
///
/// Driven by the caller: `submit_*` queues, [`flush_submissions`](Self::flush_submissions) hands over,
/// [`poll`](Self::poll) or [`poll_into`](Self::poll_into) reap, submit what is queued, and publish. Completions come in
/// any order; **the tail counts, in submission order, only submissions whose every byte is in place.** A failed one
/// holds the tail until [`resubmit`](Self::resubmit) or [`skip`](Self::skip). With a bare tail word a consumer cannot
/// see that; a [`TailLine`](super::TailLine) tells it.
///
/// The stream owns every command and scatter list; callers keep nothing alive but raw descriptors they passed.
///
/// Belongs to the thread that created its ring: not `Send`. Dropping it cancels what is in flight and waits for it
/// (`StreamOptions::close_timeout`); memory is given back only after the last completion, and leaked, counted
/// ([`leak_stats`](super::leak_stats)) and logged should that never come.
///
/// ```compile_fail
/// # fn moves<T: Send>() {}
/// moves::<ringest::AsyncUringStream<'static>>(); // not Send; ringest::MovableStream is
/// ```
pub struct AsyncUringStream<'a> {
    flight: Option<Flight<'a, KernelQueue>>,
    buffer: GpuMappedBuffer<'a>,
    /// The registration of the flight's home is the stream's own, not one the caller made with the ring.
    attached: bool,
    /// Why the buffer is not registered, where that was wanted.
    refusal: Option<PipelineError>,
    options: StreamOptions,
    /// A system call's error that had to wait because completions came with it.
    deferred: Option<PipelineError>,
    finished: bool,
    /// Scratch for scatter reads.
    segments: Vec<Segment>,
}

impl std::fmt::Debug for AsyncUringStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AsyncUringStream")
            .field("buffer", &self.buffer)
            .field("tail", &self.flight().tail())
            .field("in_flight", &self.flight().in_flight())
            .finish_non_exhaustive()
    }
}

impl<'a> AsyncUringStream<'a> {
    /// A stream over a ring, into `buffer`, publishing to `tail` (a `&AtomicU32`, a `&AtomicU64` or a
    /// [`TailLine`](super::TailLine)), which is set to 0.
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options).
    pub fn new(ring: IoUringState, buffer: GpuMappedBuffer<'a>, tail: impl Into<TailWord<'a>>) -> Result<Self> {
        Self::with_options(ring, buffer, tail, StreamOptions::default())
    }

    /// A stream by options.
    ///
    /// The buffer is registered with the ring, unless the caller has done so already. Where that fails (RLIMIT_MEMLOCK)
    /// reads go unregistered and say so in their path label, unless `strict`.
    ///
    /// # Errors
    /// `EPERM` on a thread that does not own the ring, `EINVAL` for options out of range; when strict also the errors of
    /// [`IoUringState::register_buffers`].
    pub fn with_options(
        ring: IoUringState,
        buffer: GpuMappedBuffer<'a>,
        tail: impl Into<TailWord<'a>>,
        options: StreamOptions,
    ) -> Result<Self> {
        Self::try_new(ring, buffer, tail.into(), options).map_err(|(_, error)| error)
    }

    /// A stream by options, or the ring back.
    pub(crate) fn try_new(
        ring: IoUringState,
        buffer: GpuMappedBuffer<'a>,
        tail: TailWord<'a>,
        options: StreamOptions,
    ) -> std::result::Result<Self, (Box<IoUringState>, PipelineError)> {
        let resolved = ring.check_thread().and_then(|()| resolve(&options, ring.features().sq_entries));
        let (mut ring, flight_options) = match resolved {
            Ok(flight_options) => (ring, flight_options),
            Err(error) => return Err((Box::new(ring), error)),
        };
        match bind(&mut ring, &buffer, &options) {
            Ok(Bound { target, attached, refusal }) => {
                let queue = KernelQueue::new(ring, !options.unregistered);
                let flight = Some(Flight::new(queue, tail, target, flight_options));
                let segments = Vec::new();
                let (deferred, finished) = (None, false);
                Ok(Self { flight, buffer, attached, refusal, options, deferred, finished, segments })
            }
            Err(error) => Err((Box::new(ring), error)),
        }
    }

    // The flight is taken out only by `close`, which consumes the stream, and by drop.
    fn flight(&self) -> &Flight<'a, KernelQueue> {
        match &self.flight {
            Some(flight) => flight,
            None => unreachable!("the stream is closed"),
        }
    }

    #[inline]
    fn flight_mut(&mut self) -> Result<&mut Flight<'a, KernelQueue>> {
        match &mut self.flight {
            Some(flight) => {
                flight.queue.ring().check_thread()?;
                Ok(flight)
            }
            None => unreachable!("the stream is closed"),
        }
    }

    // Driving

    /// Hands all queued commands to the kernel. Returns how many submissions are in flight.
    ///
    /// # Errors
    /// Those of `io_uring_enter(2)`; `EAGAIN` and `EBUSY` mean: poll, then try again. `EPERM` on another thread.
    pub fn flush_submissions(&mut self) -> Result<usize> {
        let flight = self.flight_mut()?;
        flight.flush()?;
        Ok(flight.in_flight() as usize)
    }

    /// Submits what is queued, reaps what has completed, publishes the tail. Returns how many submissions ended whole
    /// since the last poll, up to the first that failed; that one is the error of the next call.
    ///
    /// So no success is hidden by a failure beside it, and each failure is reported once. Which submission failed is in
    /// the error; [`poll_into`](Self::poll_into) gives every record instead.
    ///
    /// # Errors
    /// That of a failed submission, or of the system call. `EPERM` on another thread.
    pub fn poll(&mut self) -> Result<usize> {
        let driven = self.drive(0, None)?;
        let mut count = 0;
        let flight = self.flight_mut()?;
        while flight.peek_status() == Some(0) {
            flight.take();
            count += 1;
        }
        if count == 0
            && let Some(failed) = flight.take()
        {
            self.defer(driven);
            return failed.result().map(|_| 0);
        }
        self.settle(count, driven)
    }

    /// Submits what is queued, reaps what has completed, publishes the tail, and stores the records of ended submissions
    /// in `out`, in the order in which they ended. Returns how many.
    ///
    /// # Errors
    /// That of the system call, when there is no record to return. `EPERM` on another thread.
    pub fn poll_into(&mut self, out: &mut [Completion]) -> Result<usize> {
        let mut places = out.iter_mut();
        self.poll_each(places.len(), |completion| {
            if let Some(place) = places.next() {
                *place = completion;
            }
        })
    }

    /// As [`poll_into`](Self::poll_into), handing at most `max` records to `each`.
    pub(crate) fn poll_each(&mut self, max: usize, mut each: impl FnMut(Completion)) -> Result<usize> {
        let driven = self.drive(0, None)?;
        let flight = self.flight_mut()?;
        let mut count = 0;
        while count < max
            && let Some(completion) = flight.take()
        {
            each(completion);
            count += 1;
        }
        self.settle(count, driven)
    }

    /// Submits what is queued, waits until `min` submissions have ended, and hands all that have to `each`, with a clock; failed
    /// ones are skipped. A wait that runs out of time is no error.
    #[inline]
    pub(crate) fn turn(
        &mut self,
        min: usize,
        timeout: Option<Duration>,
        mut each: impl FnMut(&Completion, &dyn Fn() -> Duration),
    ) -> Result<()> {
        let flight = self.flight_mut()?;
        let driven = flight.drive_for(min, timeout);
        flight.queue.sweep();
        let epoch = flight.queue.epoch();
        flight.take_all(|completion| each(completion, &|| epoch.elapsed()));
        driven.map(drop)
    }

    /// Whether the calling thread owns the stream.
    #[inline]
    pub(crate) fn check_thread(&self) -> Result<()> {
        self.ring().check_thread()
    }

    /// Whether this is a child of the process that made the stream.
    pub(crate) fn is_forked(&self) -> bool {
        self.ring().owner.is_forked()
    }

    /// What a file is now: a registered one is looked up in the ring's table.
    #[inline]
    pub(crate) fn resolve(&self, file: FileRef) -> Result<FileRef> {
        self.ring().files.resolve(file)
    }

    /// Somebody with a read that is not submitted yet starts (1) or stops (-1) to depend on a registered file.
    pub(crate) fn count_user(&mut self, file: &FileRef, change: i32) {
        if let Some(flight) = &mut self.flight {
            flight.queue.count_user(file, change);
        }
    }

    /// Monotonic time, from when the stream was made.
    #[inline]
    pub(crate) fn now(&self) -> Duration {
        self.flight().queue.now()
    }

    /// Submits what is queued and waits until `min` records can be taken (by [`poll`](Self::poll) or
    /// [`poll_into`](Self::poll_into)), or nothing is in flight any more. Returns how many can.
    ///
    /// # Errors
    /// `ETIMEDOUT` when the timeout passes first; the errors of `io_uring_enter(2)`; `EPERM` on another thread.
    pub fn wait_for_completion(&mut self, min: usize, timeout: Option<Duration>) -> Result<usize> {
        self.flight_mut()?;
        if let Some(error) = self.deferred.take() {
            return Err(error);
        }
        self.drive(min, timeout)??;
        Ok(self.flight().ready())
    }

    /// The outer error is `EPERM` on another thread, the inner one that of the system call.
    fn drive(&mut self, min: usize, timeout: Option<Duration>) -> Result<Result<()>> {
        let flight = self.flight_mut()?;
        let driven = flight.drive(min, timeout);
        // Registrations given up earlier (a replaced buffer's) go with the last read that used them.
        flight.queue.sweep();
        Ok(driven)
    }

    /// Completions first: the error of a system call waits for a call that has none.
    fn settle(&mut self, count: usize, driven: Result<()>) -> Result<usize> {
        self.defer(driven);
        match self.deferred.take_if(|_| count == 0) {
            Some(error) => Err(error),
            None => Ok(count),
        }
    }

    fn defer(&mut self, driven: Result<()>) {
        if let (Err(error), None) = (driven, &self.deferred) {
            self.deferred = Some(error);
        }
    }

    // Failed submissions

    /// Reads a failed submission once more, into the same place, from its beginning.
    ///
    /// # Errors
    /// `EINVAL` unless it failed and its record was taken; `EAGAIN` when `depth` are in flight.
    pub fn resubmit(&mut self, sequence: u64) -> Result<()> {
        self.flight_mut()?.resubmit(sequence)
    }

    /// Gives a failed submission up: the tail passes it, and `first_bad` of a tail line says so for good.
    ///
    /// # Errors
    /// `EINVAL` unless it failed and its record was taken.
    pub fn skip(&mut self, sequence: u64) -> Result<()> {
        self.flight_mut()?.skip(sequence)
    }

    /// Asks for a submission to be cancelled. It ends with `ECANCELED`, or whole if its data was already there; reads
    /// that a disk has accepted usually run to their end.
    ///
    /// # Errors
    /// `EINVAL` when it is not in flight.
    pub fn cancel(&mut self, sequence: u64) -> Result<()> {
        self.flight_mut()?.cancel(sequence)
    }

    /// Asks for everything in flight to be cancelled.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn cancel_all(&mut self) -> Result<()> {
        self.flight_mut()?.cancel_all();
        Ok(())
    }

    // The buffer, the ring, the numbers

    /// Reads go to another buffer from now on. Those in flight keep the old one alive. Returns the old handle.
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options); on failure the old buffer stays.
    pub fn replace_buffer(&mut self, buffer: GpuMappedBuffer<'a>) -> Result<GpuMappedBuffer<'a>> {
        let options = self.options;
        let Bound { target, attached, refusal } = bind(self.flight_mut()?.queue.ring_mut(), &buffer, &options)?;
        let was_attached = std::mem::replace(&mut self.attached, attached);
        self.refusal = refusal;
        let flight = self.flight_mut()?;
        if let (Target::Registered(entry), true) = (flight.set_home(target), was_attached) {
            flight.queue.retire(entry);
        }
        Ok(std::mem::replace(&mut self.buffer, buffer))
    }

    /// The buffer reads go to.
    #[must_use]
    pub fn buffer(&self) -> &GpuMappedBuffer<'a> {
        &self.buffer
    }

    /// Whether the buffer is registered with the ring.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        matches!(self.flight().home(), Target::Registered(_))
    }

    /// Why the buffer is not registered, when registration was wanted and refused (RLIMIT_MEMLOCK, a full table, …).
    #[must_use]
    pub fn registration_refusal(&self) -> Option<&PipelineError> {
        self.refusal.as_ref()
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &IoUringState {
        self.flight().queue.ring()
    }

    /// The ring's registrations.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn ring_mut(&mut self) -> Result<RingRegistrations<'_>> {
        Ok(RingRegistrations::new(self.flight_mut()?.queue.ring_mut()))
    }

    /// Submissions that have not ended.
    #[must_use]
    pub fn inflight(&self) -> usize {
        self.flight().in_flight() as usize
    }

    /// Submissions, from the first on, whose every byte is in place (or that were skipped).
    #[must_use]
    pub fn tail(&self) -> u64 {
        self.flight().tail()
    }

    /// Submissions made.
    #[must_use]
    pub fn submitted(&self) -> u64 {
        self.flight().submitted()
    }

    /// Most submissions in flight.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.flight().options().depth as usize
    }

    /// What the stream has done so far.
    #[must_use]
    pub fn stats(&self) -> StreamStats {
        self.flight().stats()
    }

    /// Bytes of bookkeeping the stream holds, without the buffer, the bounce buffer and the kernel's memory: at most 64 KiB
    /// at depth 64, plus 32 bytes for each range of the scatter reads in its window.
    #[must_use]
    pub fn footprint(&self) -> usize {
        let scratch = self.segments.capacity() * size_of::<Segment>();
        size_of::<Self>() + scratch + self.flight().footprint() + self.flight().queue.footprint()
    }

    // Ending

    /// Announces that no submission follows (state END and the number of submissions in a tail line). Those in flight
    /// go on; nothing more can be submitted, but failed submissions can still be resubmitted or skipped.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn finish(&mut self) -> Result<()> {
        self.flight_mut()?.publish_end(0);
        self.finished = true;
        Ok(())
    }

    /// Cancels what is in flight, waits for it, and gives the ring back. A tail line says END if the stream was
    /// finished and everything is in place, ABORTED otherwise.
    ///
    /// # Errors
    /// `ETIMEDOUT` when the device does not give everything back within `timeout`: ring and memory are then leaked.
    /// `EPERM` on another thread: the stream is dropped as on any thread.
    pub fn close(mut self, timeout: Duration) -> Result<CloseReport> {
        self.flight_mut()?;
        let Some(flight) = self.shut(timeout) else {
            unreachable!("the stream is open");
        };
        let (stats, submitted, tail) = (flight.stats(), flight.submitted(), flight.tail());
        match flight.queue.into_ring() {
            Some(ring) => Ok(CloseReport { ring, stats, submitted, tail }),
            None => Err(leaked()),
        }
    }

    /// The calling thread owns the stream from now on, if its ring may move.
    #[inline]
    pub(crate) fn enter(&mut self) -> &mut Self {
        if let Some(flight) = &mut self.flight {
            flight.queue.ring_mut().adopt_if_movable();
        }
        self
    }

    /// Whether the calling thread may close the stream: the owner, or any once the owner has exited.
    pub(crate) fn check_closable(&self) -> Result<()> {
        let owner = &self.ring().owner;
        if owner.is_gone() && !owner.is_forked() { Ok(()) } else { self.ring().check_thread() }
    }

    pub(crate) fn close_timeout(&self) -> Duration {
        self.options.close_timeout
    }

    /// [`close`](Self::close) where `check_closable` allows it. `None`: the owner has exited with nothing in flight, and
    /// the ring went with the stream.
    pub(crate) fn close_anywhere(self, timeout: Duration) -> Result<Option<CloseReport>> {
        if self.ring().check_thread().is_ok() {
            return self.close(timeout).map(Some);
        }
        let held = self.flight().queue.reads();
        drop(self);
        if held == 0 { Ok(None) } else { Err(leaked()) }
    }

    /// Gives up a stream that a panic left half done: consumers are told, and what the kernel may still write to is
    /// leaked, counted and logged.
    pub(crate) fn abandon(mut self) {
        if let Some(flight) = self.flight.take()
            && !flight.queue.ring().owner.is_forked()
        {
            flight.publish_end(libc::ENOTRECOVERABLE);
        }
    }

    /// Ends the flight; afterwards the kernel holds nothing, or what it holds is leaked with the flight's queue.
    fn shut(&mut self, timeout: Duration) -> Option<Flight<'a, KernelQueue>> {
        let mut flight = self.flight.take()?;
        flight.shut(timeout);
        flight.publish_close(self.finished);
        let home = flight.set_home(Target::Plain(Arc::clone(self.buffer.region())));
        if let (Target::Registered(entry), true) = (home, self.attached) {
            flight.queue.retire(entry);
        }
        Some(flight)
    }

    /// A stream that may move to other threads; its ring must have been made with
    /// [`RingOptions::movable`](super::RingOptions).
    ///
    /// # Errors
    /// `EINVAL`, and the stream is dropped, when the ring is bound to its thread.
    pub fn into_movable(self) -> Result<MovableStream<'a>> {
        if !self.ring().is_movable() {
            return Err(PipelineError::invalid("a ring bound to its thread", "create it with RingOptions::movable"));
        }
        Ok(MovableStream(self))
    }
}

impl Drop for AsyncUringStream<'_> {
    fn drop(&mut self) {
        let timeout = self.options.close_timeout;
        let Some(flight) = &mut self.flight else { return };
        let ring = flight.queue.ring_mut();
        ring.adopt_if_movable();
        if ring.check_thread().is_ok() {
            drop(self.shut(timeout));
        } else if !ring.owner.is_forked() {
            // On a thread that does not own the ring nothing can be reaped: the queue's drop leaks what is in flight.
            flight.publish_close(self.finished);
        }
    }
}

/// A stream that may move between threads; one at a time uses it.
///
/// Made by [`AsyncUringStream::into_movable`].
#[derive(Debug)]
pub struct MovableStream<'a>(AsyncUringStream<'a>);

// SAFETY: the ring was made without SINGLE_ISSUER and DEFER_TASKRUN and its descriptor is not registered with a thread,
// so any thread may issue its system calls; `&mut self` allows one at a time. Everything else a stream holds (regions,
// registrations, files) is shared by `Arc` of Send + Sync types. A ring bound to its thread that is swapped in
// through `get` refuses calls elsewhere (EPERM) and is leaked rather than dropped with reads in flight.
unsafe impl Send for MovableStream<'_> {}

impl<'a> MovableStream<'a> {
    /// The stream, owned by the calling thread from now on.
    pub fn get(&mut self) -> &mut AsyncUringStream<'a> {
        self.0.enter()
    }

    /// The plain stream, bound to the calling thread.
    #[must_use]
    pub fn into_inner(mut self) -> AsyncUringStream<'a> {
        self.get();
        self.0
    }
}

fn leaked() -> PipelineError {
    PipelineError::timed_out(
        "closing the stream",
        "the kernel holds on to its reads: ring and memory are leaked so that nothing writes to reused memory",
    )
}

fn resolve(options: &StreamOptions, entries: u32) -> Result<FlightOptions> {
    if options.strict && options.unregistered {
        return Err(PipelineError::invalid(
            "strict and unregistered",
            "strict reads need the registration: choose one",
        ));
    }
    let depth = if options.depth == 0 { entries } else { options.depth };
    if depth > 65_536 {
        return Err(PipelineError::invalid(format!("depth {depth}"), "use at most 65536"));
    }
    let window = if options.window == 0 { depth.saturating_mul(4) } else { options.window };
    if window < depth || window > 1 << 20 {
        return Err(PipelineError::invalid(
            format!("window {window}"),
            format!("use {depth} (the depth) to {}", 1 << 20),
        ));
    }
    Ok(FlightOptions {
        depth,
        window: window.next_power_of_two(),
        max_retries: options.max_retries,
        backoff: options.retry_backoff,
        strict: options.strict,
        bounce_slots: BOUNCE_SLOTS,
        bounce_slot_bytes: BOUNCE_SLOT_BYTES,
    })
}

/// Where reads into a buffer go.
struct Bound {
    target: Target,
    /// Its registration was made here.
    attached: bool,
    /// Why there is none.
    refusal: Option<PipelineError>,
}

fn bind(ring: &mut IoUringState, buffer: &GpuMappedBuffer<'_>, options: &StreamOptions) -> Result<Bound> {
    let plain = |refusal| Bound { target: Target::Plain(Arc::clone(buffer.region())), attached: false, refusal };
    if options.unregistered {
        return Ok(plain(None));
    }
    let IoUringState { ring, buffers, .. } = ring;
    if let Some(entry) = buffers.find(buffer) {
        return Ok(Bound { target: Target::Registered(entry), attached: false, refusal: None });
    }
    match buffers.attach(ring, buffer) {
        Ok(entry) => Ok(Bound { target: Target::Registered(entry), attached: true, refusal: None }),
        Err(error) if options.strict => Err(error),
        Err(error) => {
            tracing::info!(target: "ringest::stream", %error, "buffer not registered, reads go unregistered");
            Ok(plain(Some(error)))
        }
    }
}
