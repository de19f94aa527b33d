//! The driver: reads from files into the slots of an io_queue, driven by the caller.

mod core;
mod ledger;
mod reads;

pub(crate) use self::core::{Core, CoreOptions};
#[cfg(feature = "testing")]
pub(crate) use reads::{Reads, SlotRead};

use super::io_queue::IoQueue;
use super::telemetry::NvmeGpuIngestTelemetry;
use crate::error::{PipelineError, Result, read_remedy};
use crate::memory::MemoryKind;
use crate::uring::{
    AsyncUringStream, FileRef, IoUringState, ReadPath, RingRegistrations, StreamOptions, StreamStats, TailWord,
};
use crate::wire::{IoQueueView, NO_SEQUENCE};
use std::sync::Arc;
use std::time::Duration;

/// How a driver's bytes get from the drive into the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
#[non_exhaustive]
pub enum NativeReadPath {
    /// IORING_OP_READ_FIXED into slots registered with the ring; any file system.
    #[default]
    RegisteredMappedRead = 0,
    /// NVMe read commands by IORING_OP_URING_CMD; the drive writes GPU memory.
    GpuDirectNvmePassthrough = 1,
}

/// How a driver behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverOptions {
    /// Most reads in flight; 0: as many as the ring has submission queue entries, at most one for each slot.
    pub depth: u32,
    /// Most requests that wait for a slot; at most 1,048,576. 0: a submit without a free slot is `EAGAIN`.
    pub queue_limit: u32,
    /// Put the CRC32C of each payload into its descriptor. The CPU reads every byte for it.
    pub crc32c: bool,
    /// Time between two looks for released slots, while nothing else can make progress.
    pub credit_poll: Duration,
    /// Do not register the slots with the ring.
    pub unregistered: bool,
    /// Fail rather than leave the registered path.
    pub strict: bool,
    /// Retries of a command after EINTR or EAGAIN without progress.
    pub max_retries: u8,
    /// Wait before the first of them; doubles with each.
    pub retry_backoff: Duration,
    /// How long drop waits for reads in flight before it leaks ring and memory.
    pub close_timeout: Duration,
}

impl Default for DriverOptions {
    fn default() -> Self {
        let StreamOptions { max_retries, retry_backoff, close_timeout, .. } = StreamOptions::default();
        Self {
            depth: 0,
            queue_limit: 0,
            crc32c: false,
            credit_poll: Duration::from_micros(50),
            unregistered: false,
            strict: false,
            max_retries,
            retry_backoff,
            close_timeout,
        }
    }
}

/// A read into the next slot: any offset, any length up to a slot's.
#[derive(Debug, Clone)]
pub struct IngestRequest {
    /// What to read from.
    pub file: FileRef,
    /// Where, in bytes.
    pub file_offset: u64,
    /// Bytes; 0 publishes an empty slot.
    pub len: u32,
    /// The caller's value: in the slot's descriptor, in the record, and to cancel by.
    pub tag: u64,
    /// Time from submit after which the request fails with `ETIMEDOUT`, whatever its read does.
    pub timeout: Option<Duration>,
}

impl IngestRequest {
    /// A request without a deadline.
    pub fn new(file: impl Into<FileRef>, file_offset: u64, len: u32, tag: u64) -> Self {
        Self { file: file.into(), file_offset, len, tag, timeout: None }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IngestCompletion {
    /// The number `submit` returned; counts the driver's requests from 0.
    pub request: u64,
    /// The sequence that carries it to consumers; [`NO_SEQUENCE`] when it ended without a slot.
    pub sequence: u64,
    /// The caller's value.
    pub tag: u64,
    /// Where in the file it began.
    pub file_offset: u64,
    /// Bytes asked for.
    pub requested: u32,
    /// Bytes in place: all when `status` is 0; at end of file, those that exist.
    pub bytes: u32,
    /// Bytes that went through the bounce buffer.
    pub bounced: u64,
    /// 0, or -errno: -ENODATA at end of file, -ECANCELED, -ETIMEDOUT at its deadline, or the kernel's.
    pub status: i32,
    /// The path that was really taken.
    pub path: ReadPath,
    /// From submit to publication (or to its end, without a slot).
    pub latency: Duration,
}

impl Default for IngestCompletion {
    fn default() -> Self {
        Self {
            request: 0,
            sequence: NO_SEQUENCE,
            tag: 0,
            file_offset: 0,
            requested: 0,
            bytes: 0,
            bounced: 0,
            status: 0,
            path: ReadPath::None,
            latency: Duration::ZERO,
        }
    }
}

impl IngestCompletion {
    /// The bytes read, or the error.
    ///
    /// # Errors
    /// What `status` says.
    pub fn result(&self) -> Result<u32> {
        let Self { request, file_offset, requested, bytes, status, .. } = *self;
        let (sequence, requested, landed) = (request, u64::from(requested), u64::from(bytes));
        match -status {
            0 => Ok(bytes),
            libc::ENODATA => Err(PipelineError::EndOfFile { sequence, file_offset, bytes: landed, requested }),
            libc::ECANCELED => Err(PipelineError::Cancelled { sequence, bytes: landed }),
            libc::ETIMEDOUT => Err(PipelineError::timed_out(
                format!("request {request} ({requested} bytes at offset {file_offset})"),
                "submit it again, with more time",
            )),
            errno => {
                Err(PipelineError::ReadFailed { sequence, file_offset, requested, errno, fix: read_remedy(errno) })
            }
        }
    }
}

/// What a closed driver leaves.
#[derive(Debug)]
pub struct DriverReport {
    /// The ring, to be used again; the error when the kernel kept reads, and ring and memory were leaked.
    pub ring: Result<IoUringState>,
    /// The queue, for its consumers to come to their end.
    pub queue: Arc<IoQueue>,
    /// Everything the driver counted.
    pub telemetry: NvmeGpuIngestTelemetry,
    /// Records that were not taken.
    pub completions: Vec<IngestCompletion>,
}

/// Fills the slots of an [`IoQueue`] from files; consumers that have its view, a running kernel or threads, take them.
///
/// Driven by the caller: [`submit`](Self::submit) takes the next slot and queues a read into it,
/// [`poll_completions`](Self::poll_completions) and [`wait`](Self::wait) hand reads to the kernel, reap them, and publish
/// their slots. **Every request ends exactly once**, and every slot that was given to one is published: whole, or as
/// poison with its errno. A slot is filled again when its consumers have released it and nothing can write to it any
/// more; without a free slot a submit is `EAGAIN`, or the request waits in a queue with a bound.
///
/// Belongs to the thread that created its ring, like the stream below it: not `Send`. Dropping it cancels what is in
/// flight, waits for it ([`DriverOptions::close_timeout`]), and tells the consumers.
///
/// ```
/// use ringest::{DirectMode, DriverOptions, IngestRequest, InputFile, IoQueue, IoQueueOptions};
/// use ringest::{IoUringState, NvmeGpuIngestDriver, RingOptions};
/// use std::time::Duration;
///
/// # fn main() -> ringest::Result<()> {
/// # std::fs::write("/tmp/ringest-doc-driver", [7u8; 8192]).unwrap();
/// let file = InputFile::open("/tmp/ringest-doc-driver", DirectMode::Auto)?;
/// let queue = IoQueue::new(IoQueueOptions { slots: 4, slot_bytes: 4096, ..IoQueueOptions::default() })?;
/// let mut consumer = queue.consumer(0)?; // on a GPU: queue.view(), to the kernel by value
///
/// let ring = IoUringState::new(RingOptions::default())?;
/// let mut driver = NvmeGpuIngestDriver::new(ring, queue, DriverOptions::default())?;
/// driver.submit(IngestRequest::new(&file, 100, 5000 - 1000, 42))?;
/// driver.finish()?;
/// assert_eq!(driver.wait(1, Some(Duration::from_secs(10)))?, 1);
///
/// let slot = consumer.wait_pop(Duration::from_secs(10)).unwrap();
/// assert_eq!(slot.descriptor().tag, 42);
/// assert!(consumer.payload(&slot).iter().all(|&byte| byte == 7));
/// consumer.release(slot)?;
/// # Ok(())
/// # }
/// ```
pub struct NvmeGpuIngestDriver {
    core: Option<Core<AsyncUringStream<'static>>>,
    close_timeout: Duration,
}

impl std::fmt::Debug for NvmeGpuIngestDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NvmeGpuIngestDriver")
            .field("queue", self.core().queue())
            .field("in_flight", &self.in_flight())
            .field("queued", &self.queued())
            .finish_non_exhaustive()
    }
}

impl NvmeGpuIngestDriver {
    /// A driver by registered mapped reads.
    ///
    /// The slots are registered with the ring. Where that fails (RLIMIT_MEMLOCK) reads go unregistered and say so in
    /// their records, unless `strict`.
    ///
    /// # Errors
    /// `EPERM` on a thread that does not own the ring, `EBUSY` while another driver fills the queue, `EINVAL` for options
    /// out of range, `EOPNOTSUPP` for checksums of memory that the CPU cannot read; when strict also those of
    /// [`IoUringState::register_buffers`](crate::IoUringState::register_buffers).
    pub fn new(ring: IoUringState, queue: Arc<IoQueue>, options: DriverOptions) -> Result<Self> {
        Self::try_new(ring, queue, options).map_err(|(_, error)| error)
    }

    /// A driver by NVMe passthrough: the drive writes the slots, which may be memory of a GPU.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: this version of ringest does not have that path.
    pub fn new_gpudirect(_ring: IoUringState, _queue: Arc<IoQueue>, _options: DriverOptions) -> Result<Self> {
        Err(PipelineError::NvmePassthroughDisabled)
    }

    /// A driver by registered mapped reads, or the ring back.
    pub(crate) fn try_new(
        ring: IoUringState,
        queue: Arc<IoQueue>,
        options: DriverOptions,
    ) -> std::result::Result<Self, (Box<IoUringState>, PipelineError)> {
        let (core_options, stream_options) = match resolve(&options, &queue, ring.features().sq_entries) {
            Ok(resolved) => resolved,
            Err(error) => return Err((Box::new(ring), error)),
        };
        if let Err(error) = queue.take_for_driver() {
            return Err((Box::new(ring), error));
        }
        let slots = queue.slot_memory().clone_handle();
        // Consumers follow the queue's tail, not the stream's.
        let stream = AsyncUringStream::try_new(ring, slots, TailWord::None, stream_options);
        let stream = stream.inspect_err(|_| queue.leave())?;
        Ok(Self { core: Some(Core::new(stream, queue, core_options)), close_timeout: options.close_timeout })
    }

    // The core is taken out only by `close` and `abandon`, which consume the driver.
    #[inline]
    fn core(&self) -> &Core<AsyncUringStream<'static>> {
        match &self.core {
            Some(core) => core,
            None => unreachable!("the driver is closed"),
        }
    }

    /// On the thread that owns the ring.
    #[inline]
    fn core_mut(&mut self) -> Result<&mut Core<AsyncUringStream<'static>>> {
        match &mut self.core {
            Some(core) => {
                core.reads.check_thread()?;
                Ok(core)
            }
            None => unreachable!("the driver is closed"),
        }
    }

    // Submitting

    /// Accepts a read into the next slot; returns the request's number. Nothing reaches the kernel before the next poll
    /// or wait. A read that cannot work fails as a completion, and as a poisoned slot.
    ///
    /// # Errors
    /// `EAGAIN` without a free slot (or with `depth` reads in flight) and with no room in the queue, or when the records of
    /// twice as many requests as there are slots, and of a full queue, were not taken; `ERANGE` for more bytes than a slot
    /// takes or beyond the largest file offset; `EBUSY` after [`finish`](Self::finish); `ECANCELED` after an abort by
    /// either side; `EPERM` on another thread.
    #[inline]
    pub fn submit(&mut self, request: IngestRequest) -> Result<u64> {
        self.core_mut()?.submit(request)
    }

    /// Accepts requests in order, as many as there is room for; how many.
    ///
    /// # Errors
    /// That of the first request, when none is accepted.
    pub fn submit_batch(&mut self, requests: impl IntoIterator<Item = IngestRequest>) -> Result<usize> {
        self.core_mut()?.submit_batch(requests.into_iter())
    }

    /// Accepts a stretch of a file, cut into reads of a slot's size, as far as there is room; returns the bytes accepted,
    /// like `write(2)`: of 0 bytes nothing. All carry the tag; their file offsets tell them apart.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), when nothing is accepted.
    pub fn submit_file(&mut self, file: impl Into<FileRef>, file_offset: u64, len: u64, tag: u64) -> Result<u64> {
        let core = self.core_mut()?;
        PipelineError::check_range("file offset", file_offset, len, i64::MAX as u64)?;
        let piece = u64::from(core.queue().slot_bytes());
        if len == 0 {
            return Ok(0);
        }
        let file = file.into();
        let pieces = (0..len.div_ceil(piece)).map(|index| {
            let start = index * piece;
            IngestRequest::new(file.clone(), file_offset + start, (len - start).min(piece) as u32, tag)
        });
        Ok((core.submit_batch(pieces)? as u64 * piece).min(len))
    }

    /// Announces that no request follows: consumers get END once they have taken everything.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn finish(&mut self) -> Result<()> {
        self.core_mut()?.finish();
        Ok(())
    }

    /// Asks for the requests with this tag to be cancelled; returns how many there are. Those without a slot end at once.
    /// The others end with `ECANCELED`, or whole if the data was already there.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn cancel(&mut self, tag: u64) -> Result<usize> {
        Ok(self.core_mut()?.cancel(tag))
    }

    /// Asks for every request to be cancelled; returns how many there are.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn cancel_all(&mut self) -> Result<usize> {
        Ok(self.core_mut()?.cancel_all())
    }

    // Driving

    /// Hands over what is queued, publishes what has ended, and returns how many requests ended whole since the last
    /// poll, up to the first that failed; that one is the error of the next call.
    ///
    /// # Errors
    /// That of a failed request, or of the system call. `EPERM` on another thread.
    pub fn poll_completions(&mut self) -> Result<usize> {
        let core = self.core_mut()?;
        let driven = core.turn(0, None);
        let mut count = 0;
        while core.peek_status() == Some(0) {
            core.take();
            count += 1;
        }
        let failed = if count == 0 { core.take() } else { None };
        let reported = core.settle(count + usize::from(failed.is_some()), driven)?;
        failed.map_or(Ok(reported), |failed| failed.result().map(|_| 0))
    }

    /// Hands over what is queued, publishes what has ended, and stores the records of requests that ended in `out`, in
    /// the order in which they did. Returns how many.
    ///
    /// # Errors
    /// That of the system call, when there is no record to return. `EPERM` on another thread.
    pub fn poll_completions_into(&mut self, out: &mut [IngestCompletion]) -> Result<usize> {
        let mut places = out.iter_mut();
        self.poll_each(places.len(), |completion| {
            if let Some(place) = places.next() {
                *place = *completion;
            }
        })
    }

    /// As [`poll_completions_into`](Self::poll_completions_into), handing at most `max` records to `each`.
    pub(crate) fn poll_each(&mut self, max: usize, each: impl FnMut(&IngestCompletion)) -> Result<usize> {
        self.wait_each(max, 0, None, each)
    }

    /// Goes on until `min` records can be taken or nothing is left that could end. Returns how many can.
    ///
    /// # Errors
    /// `ETIMEDOUT` when the timeout passes first; the errors of `io_uring_enter(2)`, when there is no record; `EPERM` on
    /// another thread.
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> Result<usize> {
        let core = self.core_mut()?;
        match core.turn(min, timeout) {
            Err(error @ PipelineError::TimedOut { .. }) => Err(error),
            driven => core.settle(core.ready(), driven),
        }
    }

    /// Goes on until `min` records can be taken (at most `out` has room for), as [`wait`](Self::wait) does, and stores them
    /// in `out`. Returns how many: fewer than `min` when the timeout passed or nothing is left that could end.
    ///
    /// # Errors
    /// Those of [`wait`](Self::wait), when there is no record to return.
    pub fn wait_into(&mut self, out: &mut [IngestCompletion], min: usize, timeout: Option<Duration>) -> Result<usize> {
        let mut places = out.iter_mut();
        self.wait_each(places.len(), min, timeout, |completion| {
            if let Some(place) = places.next() {
                *place = *completion;
            }
        })
    }

    /// As [`wait_into`](Self::wait_into), handing at most `max` records to `each`.
    pub(crate) fn wait_each(
        &mut self,
        max: usize,
        min: usize,
        timeout: Option<Duration>,
        each: impl FnMut(&IngestCompletion),
    ) -> Result<usize> {
        let core = self.core_mut()?;
        let driven = core.turn(min.min(max), timeout);
        let count = core.hand_over(max, each);
        core.settle(count, driven)
    }

    /// Goes on until every request has ended. Their records can be taken afterwards.
    ///
    /// # Errors
    /// `ETIMEDOUT` when the timeout passes first: slow reads, or consumers that release no slot for requests in the
    /// queue; otherwise as [`wait`](Self::wait).
    pub fn drain(&mut self, timeout: Option<Duration>) -> Result<()> {
        self.core_mut()?.turn(usize::MAX, timeout)
    }

    // Numbers

    /// Requests that have a slot and have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core().in_flight()
    }

    /// Requests that wait for a slot.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.core().queued()
    }

    /// Slots that could be given to requests now, one after the other.
    #[must_use]
    pub fn free_slots(&self) -> u32 {
        self.queue().free_slots()
    }

    /// Slots poisoned at a deadline whose reads have not ended.
    #[must_use]
    pub fn held_slots(&self) -> usize {
        self.core().held()
    }

    /// The path that the driver was made for. Each completion says which one was really taken.
    #[must_use]
    pub fn read_path(&self) -> NativeReadPath {
        NativeReadPath::RegisteredMappedRead
    }

    /// Whether the slots are registered with the ring.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        self.core().reads.is_registered()
    }

    /// Why they are not, when registration was wanted and refused.
    #[must_use]
    pub fn registration_refusal(&self) -> Option<&PipelineError> {
        self.core().reads.registration_refusal()
    }

    /// The queue.
    #[must_use]
    pub fn queue(&self) -> &Arc<IoQueue> {
        self.core().queue()
    }

    /// The view for kernels on the device; see [`IoQueue::view`].
    ///
    /// # Errors
    /// As [`IoQueue::view`].
    pub fn megakernel_io_queue(&self) -> Result<IoQueueView> {
        self.queue().view()
    }

    /// What the driver has done.
    #[must_use]
    pub fn telemetry_snapshot(&self) -> NvmeGpuIngestTelemetry {
        self.core().telemetry()
    }

    /// What the stream below has done, since it was made.
    #[must_use]
    pub fn stream_stats(&self) -> StreamStats {
        self.core().reads.stats()
    }

    /// Starts the telemetry over; gauges stay.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn reset_telemetry(&mut self) -> Result<()> {
        self.core_mut()?.reset_telemetry();
        Ok(())
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &IoUringState {
        self.core().reads.ring()
    }

    /// The ring's registrations.
    ///
    /// # Errors
    /// `EPERM` on another thread.
    pub fn ring_mut(&mut self) -> Result<RingRegistrations<'_>> {
        self.core_mut()?.reads.ring_mut()
    }

    /// The file registered with the ring as `index`, for requests.
    ///
    /// # Errors
    /// `ERANGE` for an index beyond the table, `EINVAL` for an empty entry.
    pub fn registered_file(&self, index: u32) -> Result<FileRef> {
        self.core().reads.registered_file(index)
    }

    // Ending

    /// Cancels what has not ended, waits for the kernel to give it back, and gives the ring and the queue back. Every
    /// request ends. Consumers get END if [`finish`](Self::finish) was called and everything had a slot, ABORTED
    /// (`ECANCELED`) otherwise.
    ///
    /// When the device does not give everything back within `timeout`, `ring` of the report is `ETIMEDOUT`, and ring and
    /// memory are leaked.
    ///
    /// # Errors
    /// `EPERM` on another thread: the driver is dropped as on any thread.
    pub fn close(mut self, timeout: Duration) -> Result<DriverReport> {
        self.core_mut()?;
        let Some(mut core) = self.core.take() else { unreachable!("the driver is open") };
        core.shut(timeout);
        let completions = std::iter::from_fn(|| core.take()).collect();
        let (ring, queue, telemetry) = dismantle(core);
        let ring = ring.map(|ring| ring.unwrap_or_else(|| unreachable!("its owner is here")));
        Ok(DriverReport { ring, queue, telemetry, completions })
    }

    /// [`close`](Self::close) where `check_closable` allows it, without the records. A ring of `None`: its owner has
    /// exited with nothing in flight, and it went with the driver.
    pub(crate) fn close_anywhere(
        mut self,
        timeout: Duration,
    ) -> (Result<Option<IoUringState>>, NvmeGpuIngestTelemetry) {
        let Some(mut core) = self.core.take() else { unreachable!("the driver is open") };
        if core.reads.check_thread().is_ok() {
            core.shut(timeout);
        } else {
            core.poison_all();
        }
        let (ring, _, telemetry) = dismantle(core);
        (ring, telemetry)
    }

    /// The calling thread owns the driver from now on, if its ring may move.
    #[inline]
    pub(crate) fn enter(&mut self) -> &mut Self {
        if let Some(core) = &mut self.core {
            core.reads.enter();
        }
        self
    }

    /// Whether the calling thread may close the driver: the owner, or any once the owner has exited.
    pub(crate) fn check_closable(&self) -> Result<()> {
        self.core().reads.check_closable()
    }

    /// How long drop waits.
    pub(crate) fn close_timeout(&self) -> Duration {
        self.close_timeout
    }

    /// Gives up a driver that a panic left half done: consumers are told, and what the kernel may still write to is
    /// leaked.
    pub(crate) fn abandon(mut self) {
        if let Some(core) = self.core.take() {
            let (reads, queue) = core.into_parts();
            if !reads.is_forked() {
                queue.abort(libc::ENOTRECOVERABLE);
            }
            reads.abandon();
        }
    }

    /// A driver that may move to other threads; its ring must have been made with
    /// [`RingOptions::movable`](crate::RingOptions).
    ///
    /// # Errors
    /// `EINVAL`, and the driver is dropped, when the ring is bound to its thread.
    pub fn into_movable(self) -> Result<MovableDriver> {
        if !self.ring().is_movable() {
            return Err(PipelineError::invalid("a ring bound to its thread", "create it with RingOptions::movable"));
        }
        Ok(MovableDriver(self))
    }
}

impl Drop for NvmeGpuIngestDriver {
    fn drop(&mut self) {
        let timeout = self.close_timeout;
        let Some(core) = &mut self.core else { return };
        core.reads.enter();
        if core.reads.check_thread().is_ok() {
            core.shut(timeout);
        } else if !core.reads.is_forked() {
            // On a thread that does not own the ring nothing can be reaped: the stream's drop leaks what is in flight.
            core.poison_all();
        }
    }
}

/// A driver that may move between threads; one at a time uses it.
///
/// Made by [`NvmeGpuIngestDriver::into_movable`].
#[derive(Debug)]
pub struct MovableDriver(NvmeGpuIngestDriver);

// SAFETY: as for `MovableStream`: the ring may be driven by any thread, `&mut self` allows one at a time, and what else a
// driver holds is Send.
unsafe impl Send for MovableDriver {}

impl MovableDriver {
    /// The driver, owned by the calling thread from now on.
    pub fn get(&mut self) -> &mut NvmeGpuIngestDriver {
        self.0.enter()
    }

    /// The plain driver, bound to the calling thread.
    #[must_use]
    pub fn into_inner(mut self) -> NvmeGpuIngestDriver {
        self.get();
        self.0
    }
}

/// What a driver leaves that has waited for what could be waited for.
fn dismantle(
    core: Core<AsyncUringStream<'static>>,
) -> (Result<Option<IoUringState>>, Arc<IoQueue>, NvmeGpuIngestTelemetry) {
    let mut telemetry = core.telemetry();
    let (reads, queue) = core.into_parts();
    let left = reads.inflight() as u64;
    let ring = reads.close_anywhere(Duration::ZERO).map(|report| report.map(|report| report.ring));
    telemetry.leaked_reads = if ring.is_ok() { 0 } else { left };
    (ring, queue, telemetry)
}

fn resolve(options: &DriverOptions, queue: &IoQueue, entries: u32) -> Result<(CoreOptions, StreamOptions)> {
    if options.queue_limit > 1 << 20 {
        return Err(PipelineError::invalid(format!("queue_limit {}", options.queue_limit), "use at most 1048576"));
    }
    if options.crc32c && queue.slot_memory().kind() != MemoryKind::HostVisible {
        return Err(PipelineError::unsupported(
            "checksums of slots in device memory",
            "leave crc32c off, or use host-visible slots",
        ));
    }
    let depth = match options.depth {
        0 => entries.min(queue.slots()),
        depth if depth > queue.slots() => {
            return Err(PipelineError::invalid(
                format!("depth {depth}"),
                format!("use at most one read for each of the {} slots", queue.slots()),
            ));
        }
        depth => depth,
    };
    let core = CoreOptions {
        depth: depth as usize,
        queue_limit: options.queue_limit as usize,
        credit_poll: options.credit_poll.max(Duration::from_micros(1)),
        crc32c: options.crc32c,
    };
    let stream = StreamOptions {
        depth,
        // A slot is not used again before its read has ended, so no read is this far ahead of another.
        window: queue.slots(),
        unregistered: options.unregistered,
        strict: options.strict,
        max_retries: options.max_retries,
        retry_backoff: options.retry_backoff,
        close_timeout: options.close_timeout,
    };
    Ok((core, stream))
}
