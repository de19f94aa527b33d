//! Drivers: reads from files into the slots of an io_queue.

use super::file::ringest_file;
use super::handle::{Exclusive, Family, Table, exclusive, last, shared};
use super::io_queue::ringest_io_queue;
use super::options::{self, Options, known_flags};
use super::ring::{self, Place, ringest_ring};
use super::{Failure, Outcome, check_count, elements, status, store, value};
use crate::error::PipelineError;
use crate::ingest::{
    DriverOptions, IngestCompletion, IngestRequest, IoQueue, NativeReadPath, NvmeGpuIngestDriver,
    NvmeGpuIngestTelemetry,
};
use crate::uring::{FileRef, IoUringState};
use crate::wire::IoQueueView;
use std::ptr::null;
use std::sync::Arc;
use std::time::Duration;

/// A driver: fills the slots of an io_queue from files; consumers that have the queue's view take them.
///
/// Driven by the caller: submit takes the next slot and queues a read into it, poll and wait hand reads to the kernel,
/// reap them, and publish their slots. Every request ends exactly once, and every slot that was given to one is
/// published: whole, or as poison with its errno. A slot is filled again when its consumers have released it and
/// nothing can write to it any more.
///
/// Belongs to the thread that owns its ring: elsewhere every call that drives or changes it is -EPERM and changes
/// nothing; calls that only look say so. With RINGEST_RING_MOVABLE any thread may call, one at a time (-EBUSY
/// otherwise).
pub struct ringest_driver {
    _opaque: (),
}

/// A driver, and the handle that its ring came from and goes back to.
pub(super) struct DriverObject {
    pub(super) driver: NvmeGpuIngestDriver,
    ring: *mut ringest_ring,
}

static TABLE: Table<DriverObject> = Table::new(10, "ringest_driver");

impl Family for ringest_driver {
    type Object = DriverObject;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// Do not register the slots with the ring: the kernel pins them for each read.
pub const RINGEST_DRIVER_UNREGISTERED: u32 = 1 << 0;
/// Fail rather than leave the registered path (say, when RLIMIT_MEMLOCK forbids the registration).
pub const RINGEST_DRIVER_STRICT: u32 = 1 << 1;
/// Do not retry commands that end with EINTR or EAGAIN.
pub const RINGEST_DRIVER_NO_RETRY: u32 = 1 << 2;
/// Put the CRC32C of each payload into its descriptor. The CPU reads every byte for it.
pub const RINGEST_DRIVER_CRC32C: u32 = 1 << 3;

/// How a driver behaves. All zero (with size set) means defaults.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_driver_options {
    /// sizeof(struct ringest_driver_options).
    pub size: u32,
    /// RINGEST_DRIVER_* bits.
    pub flags: u32,
    /// Most reads in flight, at most one for each slot; 0: the ring's submission queue entries, or the slots.
    pub depth: u32,
    /// Most requests that wait for a slot, at most 1048576. 0: none, a submit without a free slot is -EAGAIN.
    pub queue_limit: u32,
    /// Retries of a command after EINTR or EAGAIN without progress, at most 255; 0: 10.
    pub max_retries: u32,
    /// Zero.
    pub reserved: u32,
    /// Wait before the first of them, in nanoseconds; doubles with each; 0: 50 microseconds.
    pub retry_backoff_ns: u64,
    /// Time between two looks for released slots, while nothing else can make progress, in nanoseconds; 0: 50
    /// microseconds.
    pub credit_poll_ns: u64,
    /// How long ringest_driver_destroy waits for reads in flight before it leaks ring and memory, in nanoseconds; 0:
    /// ten seconds.
    pub close_timeout_ns: u64,
}

// SAFETY: repr(C), six u32 and three u64 without padding, size first.
unsafe impl Options for ringest_driver_options {}

fn driver_options(options: &ringest_driver_options) -> Outcome<DriverOptions> {
    known_flags(
        options.flags,
        RINGEST_DRIVER_UNREGISTERED | RINGEST_DRIVER_STRICT | RINGEST_DRIVER_NO_RETRY | RINGEST_DRIVER_CRC32C,
    )?;
    options::zero(&[options.reserved.into()], "ringest_driver_options")?;
    let has = |flag| options.flags & flag != 0;
    let defaults = DriverOptions::default();
    Ok(DriverOptions {
        depth: options.depth,
        queue_limit: options.queue_limit,
        crc32c: has(RINGEST_DRIVER_CRC32C),
        credit_poll: options::time(options.credit_poll_ns, defaults.credit_poll),
        unregistered: has(RINGEST_DRIVER_UNREGISTERED),
        strict: has(RINGEST_DRIVER_STRICT),
        max_retries: options::retries(has(RINGEST_DRIVER_NO_RETRY), options.max_retries, defaults.max_retries)?,
        retry_backoff: options::time(options.retry_backoff_ns, defaults.retry_backoff),
        close_timeout: options::time(options.close_timeout_ns, defaults.close_timeout),
    })
}

/// What a request reads from: values of ringest_ingest_request.source.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_ingest_source {
    /// The ringest_file in file, whose handle may be closed right after.
    File = 0,
    /// The descriptor fd, which stays open until the completion.
    Descriptor = 1,
    /// The file registered with the ring as file_index.
    FixedFile = 2,
}

/// A read into the next slot: any offset, any length up to a slot's. Zero all fields first.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ringest_ingest_request {
    /// With RINGEST_INGEST_SOURCE_FILE: the file.
    pub file: *const ringest_file,
    /// Where in the file it begins, in bytes.
    pub file_offset: u64,
    /// The caller's value: in the slot's descriptor, in the completion, and to cancel by.
    pub tag: u64,
    /// Time from submit after which the request fails with -ETIMEDOUT, whatever its read does, in nanoseconds; 0: none.
    pub timeout_ns: u64,
    /// Bytes; 0 publishes an empty slot.
    pub len: u32,
    /// enum ringest_ingest_source.
    pub source: u32,
    /// With RINGEST_INGEST_SOURCE_DESCRIPTOR: the descriptor.
    pub fd: i32,
    /// With RINGEST_INGEST_SOURCE_FIXED_FILE: the index.
    pub file_index: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

impl Default for ringest_ingest_request {
    fn default() -> Self {
        Self {
            file: null(),
            file_offset: 0,
            tag: 0,
            timeout_ns: 0,
            len: 0,
            source: 0,
            fd: 0,
            file_index: 0,
            reserved: [0; 2],
        }
    }
}

impl ringest_ingest_request {
    fn file(&self, driver: &NvmeGpuIngestDriver) -> Outcome<FileRef> {
        match self.source {
            0 => Ok(FileRef::from(&*shared(self.file)?)),
            1 => Ok(FileRef::from(self.fd)),
            2 => Ok(driver.registered_file(self.file_index)?),
            other => Err(Failure::new(libc::EINVAL, format!("source {other}: use enum ringest_ingest_source"))),
        }
    }

    fn submit(&self, driver: &mut NvmeGpuIngestDriver) -> Outcome<u64> {
        options::zero(&self.reserved, "ringest_ingest_request")?;
        let &Self { file_offset, len, tag, timeout_ns, .. } = self;
        let timeout = (timeout_ns != 0).then(|| Duration::from_nanos(timeout_ns));
        let file = self.file(driver)?;
        Ok(driver.submit(IngestRequest { file, file_offset, len, tag, timeout })?)
    }
}

/// How a request ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_ingest_completion {
    /// The number the submit call returned; counts the driver's requests from 0.
    pub request: u64,
    /// The sequence that carries it to consumers; UINT64_MAX when it ended without a slot.
    pub sequence: u64,
    /// The caller's value.
    pub tag: u64,
    /// Where in the file it began.
    pub file_offset: u64,
    /// Bytes that went through the bounce buffer.
    pub bounced: u64,
    /// From submit to publication (or to its end, without a slot), in nanoseconds.
    pub latency_ns: u64,
    /// Bytes asked for.
    pub requested: u32,
    /// Bytes in place: all when status is 0; at end of file, those that exist.
    pub bytes: u32,
    /// 0, or -errno: -ENODATA at end of file, -ECANCELED, -ETIMEDOUT at its deadline, or the kernel's.
    pub status: i32,
    /// enum ringest_read_path: the path that was really taken.
    pub path: u32,
    /// Zero.
    pub reserved: [u64; 4],
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl From<IngestCompletion> for ringest_ingest_completion {
    #[inline]
    fn from(completion: IngestCompletion) -> Self {
        let IngestCompletion { request, sequence, tag, file_offset, requested, bytes, bounced, status, path, latency } =
            completion;
        let (path, latency_ns, reserved) = (path as u32, nanoseconds(latency), [0; 4]);
        Self { request, sequence, tag, file_offset, bounced, latency_ns, requested, bytes, status, path, reserved }
    }
}

/// What a driver has done since it was made, or since ringest_driver_reset_telemetry; some say how things are "now".
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ringest_driver_counters {
    /// Requests accepted.
    pub submitted: u64,
    /// Bytes they asked for.
    pub submitted_bytes: u64,
    /// Requests that ended whole.
    pub completed: u64,
    /// Their bytes.
    pub completed_bytes: u64,
    /// Requests that did not end whole, for whatever reason.
    pub failed: u64,
    /// Of these, at the end of the file.
    pub end_of_file: u64,
    /// Of these, cancelled.
    pub cancelled: u64,
    /// Of these, at their deadline.
    pub timed_out: u64,
    /// Requests that ended whole, by enum ringest_read_path.
    pub path_reads: [u64; 8],
    /// Their bytes.
    pub path_bytes: [u64; 8],
    /// Bytes that went through the bounce buffer, those of requests that failed in the end included.
    pub bounce_bytes: u64,
    /// Commands that read less than asked and were continued.
    pub short_reads: u64,
    /// Commands repeated after EINTR or EAGAIN.
    pub retries: u64,
    /// Slots published, poisoned ones included.
    pub published_slots: u64,
    /// Of these, poisoned.
    pub poisoned_slots: u64,
    /// Of these, before their read had ended.
    pub early_poisoned_slots: u64,
    /// Slots poisoned early whose read has still not ended, now.
    pub held_slots: u64,
    /// Reads that the kernel never gave back when the driver was closed; their memory was leaked.
    pub leaked_reads: u64,
    /// Times a request found no free slot.
    pub credit_stalls: u64,
    /// Nanoseconds from such a moment to the driver's next look that finds one free (or the queue aborted), summed up; a
    /// stall that goes on included.
    pub credit_stall_ns: u64,
    /// Requests with a slot that have not ended, now.
    pub in_flight: u64,
    /// Most of them at a time.
    pub max_in_flight: u64,
    /// Requests waiting for a slot, now.
    pub queued: u64,
    /// Most of them at a time.
    pub max_queued: u64,
    /// Latencies counted: from submit to publication, of requests that ended whole.
    pub latency_count: u64,
    /// Half were at most this long, in nanoseconds; this and the next two are at most 1/16 above the real value.
    pub latency_p50_ns: u64,
    /// 99 of 100.
    pub latency_p99_ns: u64,
    /// 999 of 1000.
    pub latency_p999_ns: u64,
    /// The longest.
    pub latency_max_ns: u64,
    /// Zero.
    pub reserved: [u64; 21],
}

impl From<NvmeGpuIngestTelemetry> for ringest_driver_counters {
    fn from(telemetry: NvmeGpuIngestTelemetry) -> Self {
        Self {
            submitted: telemetry.submitted.reads,
            submitted_bytes: telemetry.submitted.bytes,
            completed: telemetry.completed.reads,
            completed_bytes: telemetry.completed.bytes,
            failed: telemetry.failed,
            end_of_file: telemetry.end_of_file,
            cancelled: telemetry.cancelled,
            timed_out: telemetry.timed_out,
            path_reads: telemetry.paths.map(|count| count.reads),
            path_bytes: telemetry.paths.map(|count| count.bytes),
            bounce_bytes: telemetry.bounce_bytes,
            short_reads: telemetry.short_reads,
            retries: telemetry.retries,
            published_slots: telemetry.published_slots,
            poisoned_slots: telemetry.poisoned_slots,
            early_poisoned_slots: telemetry.early_poisoned_slots,
            held_slots: telemetry.held_slots,
            leaked_reads: telemetry.leaked_reads,
            credit_stalls: telemetry.credit_stalls,
            credit_stall_ns: nanoseconds(telemetry.credit_stall_time),
            in_flight: telemetry.in_flight,
            max_in_flight: telemetry.max_in_flight,
            queued: telemetry.queued,
            max_queued: telemetry.max_queued,
            latency_count: telemetry.latency.count,
            latency_p50_ns: nanoseconds(telemetry.latency.p50),
            latency_p99_ns: nanoseconds(telemetry.latency.p99),
            latency_p999_ns: nanoseconds(telemetry.latency.p999),
            latency_max_ns: nanoseconds(telemetry.latency.max),
            reserved: [0; 21],
        }
    }
}

impl Default for ringest_driver_counters {
    fn default() -> Self {
        NvmeGpuIngestTelemetry::default().into()
    }
}

/// Enters a driver; a movable one belongs to the calling thread from then on.
#[inline(always)]
fn enter(handle: *mut ringest_driver) -> Outcome<Exclusive<DriverObject>> {
    let mut entered = exclusive(handle.cast_const())?;
    entered.driver.enter();
    Ok(entered)
}

type Made = Result<NvmeGpuIngestDriver, (Box<IoUringState>, PipelineError)>;

/// # Safety
/// `options` and `out` are null or valid.
unsafe fn make(
    ring: *mut ringest_ring,
    queue: *const ringest_io_queue,
    options: *const ringest_driver_options,
    out: *mut *mut ringest_driver,
    new: fn(IoUringState, Arc<IoQueue>, DriverOptions) -> Made,
) -> Outcome<()> {
    // SAFETY: the caller's contract.
    unsafe {
        let options = driver_options(&options::read(options)?)?;
        store(out, "out", || {
            let queue = Arc::clone(shared(queue)?.queue());
            ring::lend(ring, Place::Driver, |state| Ok(DriverObject { driver: new(state, queue, options)?, ring }))
        })
    }
}

/// Creates a driver over a ring that fills an io_queue by registered reads, and stores a handle in *out. options may be
/// NULL.
///
/// The slots are registered with the ring, unless ringest_ring_register_buffers did so already. Where that fails
/// (RLIMIT_MEMLOCK) reads go unregistered and say so in their completions, unless RINGEST_DRIVER_STRICT.
///
/// The thread that owns the ring. Close with ringest_driver_close or ringest_driver_destroy. It keeps the queue.
///
/// Errors: -EBADF for either handle; -EBUSY when a stream or another driver has the ring, or another driver fills the
/// queue; -EINVAL for options out of range or out NULL; -E2BIG for an option struct with unknown fields; -EPERM on another thread; -ENODEV when the ring
/// is gone; -EOPNOTSUPP for checksums of slots in device memory; when strict also those of
/// ringest_ring_register_buffers. On failure the ring stays usable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_create(
    ring: *mut ringest_ring,
    queue: *const ringest_io_queue,
    options: *const ringest_driver_options,
    out: *mut *mut ringest_driver,
) -> i32 {
    // SAFETY: `options` and `out` are null or valid by the C contract.
    status(|| unsafe { make(ring, queue, options, out, NvmeGpuIngestDriver::try_new) })
}

/// Creates a driver that fills an io_queue by NVMe passthrough: the drive writes the slots, which may be memory of a
/// GPU.
///
/// Errors: -EBADF for either handle; -EBUSY when a stream or another driver has the ring; -EINVAL for options out of
/// range or out NULL; -E2BIG for an option struct with unknown fields; -ENODEV when the ring is gone; -EOPNOTSUPP: this
/// version of ringest does not have that path. On failure the ring stays usable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_create_gpudirect(
    ring: *mut ringest_ring,
    queue: *const ringest_io_queue,
    options: *const ringest_driver_options,
    out: *mut *mut ringest_driver,
) -> i32 {
    let refuse = |state, _, _| Err((Box::new(state), PipelineError::NvmePassthroughDisabled));
    // SAFETY: `options` and `out` are null or valid by the C contract.
    status(|| unsafe { make(ring, queue, options, out, refuse) })
}

/// Accepts a read into the next slot. Returns the request's number (from 0). Nothing reaches the kernel before the next
/// poll or wait. A read that cannot work fails as a completion and as a poisoned slot, not here.
///
/// The owning thread.
///
/// Errors: -EBADF for the driver or the request's file; -EINVAL when request is NULL, for an unknown source, reserved
/// fields that are not 0, or an empty entry of the ring's files; -ERANGE for more bytes than a slot takes, beyond the
/// largest file offset, or an index beyond the ring's files; -EAGAIN without a free slot (or with depth reads in
/// flight) and with no room in the queue, or when completions must be taken first; -EBUSY after ringest_driver_finish
/// or ringest_io_queue_finish; -ECANCELED after an abort by either side; -EPERM on another thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_submit(
    driver: *mut ringest_driver,
    request: *const ringest_ingest_request,
) -> i64 {
    value(|| {
        // SAFETY: `request` is null or valid by the C contract.
        let requests = unsafe { elements(request, 1, "request") }?;
        Ok(requests[0].submit(&mut enter(driver)?.driver)? as i64)
    })
}

/// Accepts requests in order, as many as there is room for, up to the first that is refused. Returns how many.
///
/// The owning thread. The array may be freed right after.
///
/// Errors: those of ringest_driver_submit for the first request, when none is accepted; -EINVAL also for requests NULL
/// with a count that is not 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_submit_batch(
    driver: *mut ringest_driver,
    requests: *const ringest_ingest_request,
    count: u32,
) -> i64 {
    value(|| {
        // SAFETY: `requests` is null or has `count` elements by the C contract.
        let requests = unsafe { elements(requests, count as usize, "requests") }?;
        let mut entered = enter(driver)?;
        let mut accepted = 0;
        for request in requests {
            match request.submit(&mut entered.driver) {
                Ok(_) => accepted += 1,
                Err(failure) if accepted == 0 => return Err(failure),
                Err(_) => break,
            }
        }
        Ok(accepted)
    })
}

/// Accepts a stretch of a file, cut into reads of a slot's size, as far as there is room. Returns the bytes accepted: of 0
/// bytes nothing. All carry the tag; their file offsets tell them apart.
///
/// The owning thread. The file's handle may be closed right after.
///
/// Errors: -EBADF for either handle; -ERANGE beyond the largest file offset; -EPERM on another thread; when nothing is
/// accepted also -EAGAIN, -EBUSY and -ECANCELED, for the reasons that a single request has.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_submit_file(
    driver: *mut ringest_driver,
    file: *const ringest_file,
    file_offset: u64,
    len: u64,
    tag: u64,
) -> i64 {
    value(|| {
        let file = FileRef::from(&*shared(file)?);
        Ok(enter(driver)?.driver.submit_file(file, file_offset, len, tag)? as i64)
    })
}

/// Hands over what is queued, publishes what has ended. Returns how many requests ended whole since the last poll, up
/// to the first that failed; that one is the error of the next call.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread; those of a failed submission (-ENODATA at end of file, -ECANCELED,
/// -ETIMEDOUT at its deadline, the kernel's); those of io_uring_enter(2).
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_poll(driver: *mut ringest_driver) -> i64 {
    value(|| Ok(enter(driver)?.driver.poll_completions()? as i64))
}

/// A place for at most `max` records: what hands them over, one by one.
///
/// # Safety
/// `out` is null or has room for `max` records; what is returned is called at most that often.
unsafe fn records(out: *mut ringest_ingest_completion, max: u32) -> Outcome<impl FnMut(&IngestCompletion)> {
    if out.is_null() && max > 0 {
        return Err(Failure::new(libc::EINVAL, "completions is NULL"));
    }
    check_count::<ringest_ingest_completion>(max as usize, "completions")?;
    let mut next = out;
    Ok(move |completion: &IngestCompletion| {
        // SAFETY: there is room for `max` records by contract, and this is called at most that often.
        unsafe {
            next.write((*completion).into());
            next = next.add(1);
        }
    })
}

/// Hands over what is queued, publishes what has ended, and stores up to max records of requests that ended, in the
/// order in which they did. Returns how many.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL when completions is NULL and max is not 0; -EPERM on another thread; those of
/// io_uring_enter(2), when there is no record to return. A failed request is a record, not an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_poll_into(
    driver: *mut ringest_driver,
    completions: *mut ringest_ingest_completion,
    max: u32,
) -> i64 {
    value(|| {
        // SAFETY: `completions` is null or has room for `max` records by the C contract; poll_each keeps to that.
        let each = unsafe { records(completions, max) }?;
        Ok(enter(driver)?.driver.poll_each(max as usize, each)? as i64)
    })
}

/// Goes on until min records can be taken or nothing is left that could end. Returns how many can. timeout_ns < 0 waits
/// without limit.
///
/// The owning thread.
///
/// Errors: -EBADF; -ETIMEDOUT; -EPERM on another thread; those of io_uring_enter(2).
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_wait(driver: *mut ringest_driver, min: u32, timeout_ns: i64) -> i64 {
    value(|| Ok(enter(driver)?.driver.wait(min as usize, options::timeout(timeout_ns))? as i64))
}

/// As ringest_driver_wait for at most max records, which it stores. Returns how many: fewer than min when the time
/// passed or nothing is left that could end.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL when completions is NULL and max is not 0; -EPERM on another thread; when there is no record
/// to return also -ETIMEDOUT and those of io_uring_enter(2). A failed request is a record, not an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_wait_into(
    driver: *mut ringest_driver,
    completions: *mut ringest_ingest_completion,
    max: u32,
    min: u32,
    timeout_ns: i64,
) -> i64 {
    value(|| {
        // SAFETY: `completions` is null or has room for `max` records by the C contract; wait_each keeps to that.
        let each = unsafe { records(completions, max) }?;
        let timeout = options::timeout(timeout_ns);
        Ok(enter(driver)?.driver.wait_each(max as usize, min as usize, timeout, each)? as i64)
    })
}

/// Goes on until every request has ended. Their records can be taken afterwards. timeout_ns < 0 waits without limit.
///
/// The owning thread.
///
/// Errors: -EBADF; -ETIMEDOUT: slow reads, or consumers that release no slot for requests in the queue; -EPERM on
/// another thread; those of io_uring_enter(2).
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_drain(driver: *mut ringest_driver, timeout_ns: i64) -> i32 {
    status(|| Ok(enter(driver)?.driver.drain(options::timeout(timeout_ns))?))
}

/// Announces that no request follows: consumers get RINGEST_OUTCOME_END once they have taken everything.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_finish(driver: *mut ringest_driver) -> i32 {
    status(|| Ok(enter(driver)?.driver.finish()?))
}

/// Asks for the requests with this tag to be cancelled. Returns how many there are. Those without a slot end at once;
/// the others end with -ECANCELED, or whole if the data was already there.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_cancel(driver: *mut ringest_driver, tag: u64) -> i64 {
    value(|| Ok(enter(driver)?.driver.cancel(tag)? as i64))
}

/// Asks for every request to be cancelled. Returns how many there are.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_cancel_all(driver: *mut ringest_driver) -> i64 {
    value(|| Ok(enter(driver)?.driver.cancel_all()? as i64))
}

/// Requests that have a slot and have not ended.
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_in_flight(driver: *const ringest_driver) -> i64 {
    value(|| Ok(exclusive(driver)?.driver.in_flight() as i64))
}

/// Requests that wait for a slot.
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_queued(driver: *const ringest_driver) -> i64 {
    value(|| Ok(exclusive(driver)?.driver.queued() as i64))
}

/// Slots that could be given to requests now, one after the other.
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY; -EPERM in a forked child, which does not have the queue's memory.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_free_slots(driver: *const ringest_driver) -> i64 {
    value(|| {
        let entered = exclusive(driver)?;
        entered.driver.queue().check_process()?;
        Ok(entered.driver.free_slots().into())
    })
}

/// Slots poisoned at a deadline whose reads have not ended.
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_held_slots(driver: *const ringest_driver) -> i64 {
    value(|| Ok(exclusive(driver)?.driver.held_slots() as i64))
}

/// How a driver's bytes get from the drive into the slots.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_native_read_path {
    /// Reads into slots that are registered with the ring; any file system.
    RegisteredMappedRead = 0,
    /// NVMe read commands; the drive writes GPU memory.
    GpuDirectNvmePassthrough = 1,
}

const _: () = {
    use ringest_native_read_path as path;
    assert!(path::RegisteredMappedRead as u32 == NativeReadPath::RegisteredMappedRead as u32);
    assert!(path::GpuDirectNvmePassthrough as u32 == NativeReadPath::GpuDirectNvmePassthrough as u32);
};

/// The path that the driver was made for (enum ringest_native_read_path). Each completion says which one was really
/// taken.
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_read_path(driver: *const ringest_driver) -> i32 {
    value(|| Ok(exclusive(driver)?.driver.read_path() as i64)) as i32
}

/// Whether the slots are registered with the ring (1) or not (0).
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_is_registered(driver: *const ringest_driver) -> i32 {
    value(|| Ok(exclusive(driver)?.driver.is_registered().into())) as i32
}

/// Stores what the driver has done.
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY; -EINVAL when telemetry is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_telemetry(
    driver: *const ringest_driver,
    telemetry: *mut ringest_driver_counters,
) -> i32 {
    // SAFETY: `telemetry` is null or valid by the C contract.
    status(|| unsafe { store(telemetry, "telemetry", || Ok(exclusive(driver)?.driver.telemetry_snapshot().into())) })
}

/// Starts the telemetry over; what says how things are now stays.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_reset_telemetry(driver: *mut ringest_driver) -> i32 {
    status(|| Ok(enter(driver)?.driver.reset_telemetry()?))
}

/// As ringest_io_queue_device_view of the driver's queue.
///
/// Any thread, while no other is in a call with this driver.
///
/// Errors: -EBADF; -EBUSY; -EINVAL when out is NULL; -EOPNOTSUPP when no GPU maps one of the parts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_device_view(driver: *const ringest_driver, out: *mut IoQueueView) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(exclusive(driver)?.driver.megakernel_io_queue()?)) })
}

/// Cancels what has not ended, waits for the kernel to give it back, and gives the ring back to its handle. Every
/// request ends; records that were not taken are gone. Consumers get RINGEST_OUTCOME_END if the driver was finished and
/// everything had a slot, RINGEST_OUTCOME_ABORTED (ECANCELED) otherwise. The handle is dead afterwards, also on
/// -ETIMEDOUT. timeout_ns < 0 waits without limit.
///
/// Unless telemetry is NULL, everything the driver counted is stored there, also on -ETIMEDOUT.
///
/// The owning thread; any thread once the owner has exited.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this driver; -ETIMEDOUT when the device does not give
/// everything back in time, or the owner has exited with reads in flight: ring and memory are then leaked, counted and
/// logged, because the device may still write; -EPERM on another thread: nothing changes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_driver_close(
    driver: *mut ringest_driver,
    timeout_ns: i64,
    telemetry: *mut ringest_driver_counters,
) -> i32 {
    // SAFETY: `telemetry` is null or valid by the C contract.
    status(|| unsafe { close(driver, Some(options::timeout(timeout_ns).unwrap_or(options::FOREVER)), telemetry) })
}

/// As ringest_driver_close with the driver's close_timeout_ns.
///
/// Errors: as ringest_driver_close.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_driver_destroy(driver: *mut ringest_driver) -> i32 {
    // SAFETY: there is no place for telemetry.
    status(|| unsafe { close(driver, None, std::ptr::null_mut()) })
}

/// # Safety
/// `out` is null or valid for writing.
unsafe fn close(
    handle: *mut ringest_driver,
    timeout: Option<Duration>,
    out: *mut ringest_driver_counters,
) -> Outcome<()> {
    let mut entered = last(handle.cast_const())?;
    let poisoned = entered.was_poisoned();
    if !poisoned {
        entered.driver.enter().check_closable()?;
    }
    let DriverObject { driver, ring } = entered.take();
    let (left, telemetry) = if poisoned {
        driver.abandon();
        (Ok(None), NvmeGpuIngestTelemetry::default())
    } else {
        let timeout = timeout.unwrap_or(driver.close_timeout());
        driver.close_anywhere(timeout)
    };
    if !out.is_null() {
        // SAFETY: not null, so valid by contract.
        unsafe { out.write(telemetry.into()) };
    }
    ring::give_back(ring, left)
}
