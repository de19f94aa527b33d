//! Streams.

use super::buffer::ringest_buffer;
use super::file::ringest_file;
use super::handle::{Exclusive, Family, Table, exclusive, last, shared};
use super::options::{self, Options, known_flags};
use super::ring::{self, Place, ringest_ring};
use super::tail::ringest_tail_line;
use super::{Failure, Outcome, check_count, elements, status, store, value};
use crate::uring::{AsyncUringStream, Completion, FileRef, StreamOptions, TailWord};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

/// A stream: reads from files into one buffer, over one ring, with a tail that a consumer follows.
///
/// Driven by the caller: submit queues, flush hands over, poll and wait reap, submit what is queued, and publish.
/// Completions come in any order; the tail counts, in submission order, only submissions whose every byte is in place.
/// A failed one holds the tail until ringest_stream_resubmit or ringest_stream_skip.
///
/// Belongs to the thread that owns its ring: elsewhere every call that drives or changes it is -EPERM and changes
/// nothing; calls that only look say so. With RINGEST_RING_MOVABLE any thread may call, one at a time (-EBUSY
/// otherwise).
pub struct ringest_stream {
    _opaque: (),
}

/// A stream, and the handle that its ring came from and goes back to.
pub(super) struct StreamObject {
    pub(super) stream: AsyncUringStream<'static>,
    ring: *mut ringest_ring,
}

static TABLE: Table<StreamObject> = Table::new(6, "ringest_stream");

impl Family for ringest_stream {
    type Object = StreamObject;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// Do not register the buffer with the ring: the kernel pins it for each read.
pub const RINGEST_STREAM_UNREGISTERED: u32 = 1 << 0;
/// Fail rather than leave the registered path (say, when RLIMIT_MEMLOCK forbids the registration).
pub const RINGEST_STREAM_STRICT: u32 = 1 << 1;
/// Do not retry commands that end with EINTR or EAGAIN.
pub const RINGEST_STREAM_NO_RETRY: u32 = 1 << 2;

/// How a stream behaves. All zero (with size set) means defaults.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_stream_options {
    /// sizeof(struct ringest_stream_options).
    pub size: u32,
    /// RINGEST_STREAM_* bits.
    pub flags: u32,
    /// Most submissions in flight, at most 65536; 0: the ring's submission queue entries.
    pub depth: u32,
    /// Most submissions between the tail (or the oldest completion not taken) and the newest, from depth to 1048576; 0:
    /// four times depth.
    pub window: u32,
    /// Retries of a command after EINTR or EAGAIN without progress, at most 255; 0: 10.
    pub max_retries: u32,
    /// Zero.
    pub reserved: u32,
    /// Wait before the first of them, in nanoseconds; doubles with each; 0: 50 microseconds.
    pub retry_backoff_ns: u64,
    /// How long ringest_stream_destroy waits for reads in flight before it leaks ring and memory, in nanoseconds; 0:
    /// ten seconds.
    pub close_timeout_ns: u64,
}

// SAFETY: repr(C), six u32 and two u64 without padding, size first.
unsafe impl Options for ringest_stream_options {}

fn stream_options(options: &ringest_stream_options) -> Outcome<StreamOptions> {
    known_flags(options.flags, RINGEST_STREAM_UNREGISTERED | RINGEST_STREAM_STRICT | RINGEST_STREAM_NO_RETRY)?;
    options::zero(&[options.reserved.into()], "ringest_stream_options")?;
    let has = |flag| options.flags & flag != 0;
    let defaults = StreamOptions::default();
    Ok(StreamOptions {
        depth: options.depth,
        window: options.window,
        unregistered: has(RINGEST_STREAM_UNREGISTERED),
        strict: has(RINGEST_STREAM_STRICT),
        max_retries: options::retries(has(RINGEST_STREAM_NO_RETRY), options.max_retries, defaults.max_retries)?,
        retry_backoff: options::time(options.retry_backoff_ns, defaults.retry_backoff),
        close_timeout: options::time(options.close_timeout_ns, defaults.close_timeout),
    })
}

/// A range of a buffer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// How a submission ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_completion {
    /// The number the submit call returned; counts submissions of the stream from 0.
    pub sequence: u64,
    /// The caller's value.
    pub user_data: u64,
    /// Where in the buffer the first byte went.
    pub buffer_offset: u64,
    /// Where in the file it came from.
    pub file_offset: u64,
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes in place; equals requested exactly when status is 0.
    pub bytes: u64,
    /// Of these, bytes that went through the bounce buffer.
    pub bounced: u64,
    /// 0, or -errno: -ENODATA at end of file, -ECANCELED, or the kernel's.
    pub status: i32,
    /// enum ringest_read_path: the path that was really taken.
    pub path: u32,
    /// Zero.
    pub reserved: [u64; 4],
}

impl From<Completion> for ringest_completion {
    #[inline]
    fn from(completion: Completion) -> Self {
        let Completion { sequence, user_data, buffer_offset, file_offset, requested, bytes, bounced, status, path } =
            completion;
        let path = path as u32;
        let reserved = [0; 4];
        Self { sequence, user_data, buffer_offset, file_offset, requested, bytes, bounced, status, path, reserved }
    }
}

/// What a stream has done since it was created.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_stream_counters {
    /// Submissions accepted, resubmissions included.
    pub submitted: u64,
    /// Submissions that ended whole.
    pub completed: u64,
    /// Submissions that ended otherwise.
    pub failed: u64,
    /// Of these, at end of file.
    pub end_of_file: u64,
    /// Of these, cancelled.
    pub cancelled: u64,
    /// Submissions given up by ringest_stream_skip.
    pub skipped: u64,
    /// Bytes put in place.
    pub bytes: u64,
    /// Of these, through registered memory.
    pub registered_bytes: u64,
    /// Of these, through memory pinned per read.
    pub plain_bytes: u64,
    /// Of these, copied from the bounce buffer.
    pub bounced_bytes: u64,
    /// Commands handed to the kernel.
    pub commands: u64,
    /// Commands that read less than asked and were continued.
    pub short_reads: u64,
    /// Commands repeated after EINTR or EAGAIN.
    pub retries: u64,
    /// System calls to submit or wait.
    pub enters: u64,
    /// Zero.
    pub reserved: [u64; 10],
}

/// Enters a stream; a movable one belongs to the calling thread from then on.
#[inline(always)]
fn enter(handle: *mut ringest_stream) -> Outcome<Exclusive<StreamObject>> {
    let mut entered = exclusive(handle.cast_const())?;
    entered.stream.enter();
    Ok(entered)
}

fn make(
    ring: *mut ringest_ring,
    buffer: *const ringest_buffer,
    tail: impl FnOnce() -> Outcome<TailWord<'static>>,
    options: *const ringest_stream_options,
    out: *mut *mut ringest_stream,
) -> i32 {
    status(|| {
        // SAFETY: `options` is null or valid by the C contract.
        let options = stream_options(&unsafe { options::read(options) }?)?;
        // SAFETY: `out` is null or valid by the C contract.
        unsafe {
            store(out, "out", || {
                let tail = tail()?;
                // SAFETY: as for ringest_buffer_duplicate, by the C contract.
                let buffer = shared(buffer)?.duplicate();
                ring::lend(ring, Place::Stream, |state| {
                    let stream = AsyncUringStream::try_new(state, buffer, tail, options)?;
                    Ok(StreamObject { stream, ring })
                })
            })
        }
    })
}

/// Creates a stream over a ring, into a buffer, publishing to a tail line, and stores a handle in *out. options may be
/// NULL.
///
/// The buffer is registered with the ring, unless ringest_ring_register_buffers did so already. Where that fails
/// (RLIMIT_MEMLOCK) reads go unregistered and say so in their completions, unless RINGEST_STREAM_STRICT.
///
/// The thread that owns the ring. Close with ringest_stream_close or ringest_stream_destroy. The handles of buffer (if
/// not wrapped memory) and line may be released before that.
///
/// Errors: -EBADF for any of the handles; -EBUSY when another stream or a driver has the ring; -EINVAL for options out
/// of range or out NULL; -E2BIG for an option struct with unknown fields; -EPERM on another thread; -ENODEV when the
/// ring is gone; when strict also those of ringest_ring_register_buffers. On failure the ring stays usable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_stream_create(
    ring: *mut ringest_ring,
    buffer: *const ringest_buffer,
    line: *const ringest_tail_line,
    options: *const ringest_stream_options,
    out: *mut *mut ringest_stream,
) -> i32 {
    make(ring, buffer, || Ok(TailWord::Line(shared(line)?.clone())), options, out)
}

/// As ringest_stream_create, publishing to a bare 64-bit tail word, which cannot tell a waiting consumer of failure.
///
/// tail must be aligned to 8 bytes and stay valid until the stream is closed; it is set to 0.
///
/// Errors: as ringest_stream_create; -EINVAL also for a NULL or unaligned tail.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_stream_create_u64(
    ring: *mut ringest_ring,
    buffer: *const ringest_buffer,
    tail: *mut u64,
    options: *const ringest_stream_options,
    out: *mut *mut ringest_stream,
) -> i32 {
    let word = || {
        check_word(tail)?;
        // SAFETY: aligned, not null, and valid until the stream is closed by the C contract.
        Ok(TailWord::U64(unsafe { AtomicU64::from_ptr(tail) }))
    };
    make(ring, buffer, word, options, out)
}

/// As ringest_stream_create_u64 with a 32-bit word: the tail modulo 2^32.
///
/// Errors: as ringest_stream_create_u64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_stream_create_u32(
    ring: *mut ringest_ring,
    buffer: *const ringest_buffer,
    tail: *mut u32,
    options: *const ringest_stream_options,
    out: *mut *mut ringest_stream,
) -> i32 {
    let word = || {
        check_word(tail)?;
        // SAFETY: aligned, not null, and valid until the stream is closed by the C contract.
        Ok(TailWord::U32(unsafe { AtomicU32::from_ptr(tail) }))
    };
    make(ring, buffer, word, options, out)
}

fn check_word<T>(tail: *mut T) -> Outcome<()> {
    if tail.is_null() || !tail.is_aligned() {
        return Err(Failure::new(libc::EINVAL, format!("tail word at {tail:p}: pass an aligned address")));
    }
    Ok(())
}

/// Reads len bytes at file_offset of descriptor fd to buffer_offset of the stream's buffer. The completion carries
/// user_data.
///
/// Returns the submission's sequence number (from 0). Nothing reaches the kernel before the next flush, poll or wait. A
/// read that cannot work fails as a completion, not here. The descriptor stays open until the completion.
///
/// The owning thread.
///
/// Errors: -EBADF for the stream; -ERANGE outside the buffer or beyond the largest file offset; -EAGAIN when depth
/// submissions are in flight or the window is full; -EBUSY after ringest_stream_finish; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_submit_read(
    stream: *mut ringest_stream,
    fd: i32,
    file_offset: u64,
    buffer_offset: usize,
    len: usize,
    user_data: u64,
) -> i64 {
    submit(stream, |stream| stream.submit_read_to_gpu_at_with_user_data(fd, file_offset, buffer_offset, len, user_data))
}

/// As ringest_stream_submit_read, from a ringest_file, which may be closed right after.
///
/// Errors: as ringest_stream_submit_read; -EBADF also for the file.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_submit_read_file(
    stream: *mut ringest_stream,
    file: *const ringest_file,
    file_offset: u64,
    buffer_offset: usize,
    len: usize,
    user_data: u64,
) -> i64 {
    value(|| {
        let source = FileRef::from(&*shared(file)?);
        let mut entered = enter(stream)?;
        let stream = &mut entered.stream;
        Ok(stream.submit_read_to_gpu_at_with_user_data(source, file_offset, buffer_offset, len, user_data)? as i64)
    })
}

/// As ringest_stream_submit_read, from the file registered with the ring as file_index.
///
/// Errors: as ringest_stream_submit_read; -ERANGE also for an index beyond the table, -EINVAL for an empty entry.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_submit_read_fixed_file(
    stream: *mut ringest_stream,
    file_index: u32,
    file_offset: u64,
    buffer_offset: usize,
    len: usize,
    user_data: u64,
) -> i64 {
    submit(stream, |stream| {
        stream.submit_read_to_gpu_fixed_file(file_index, file_offset, buffer_offset, len, user_data)
    })
}

/// As ringest_stream_submit_read, into the buffer registered with the ring as buffer_index, at buffer_offset of it.
///
/// Errors: as ringest_stream_submit_read; -ERANGE also for an index beyond the table, -EINVAL for an empty entry.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_submit_read_fixed(
    stream: *mut ringest_stream,
    fd: i32,
    file_offset: u64,
    buffer_index: u32,
    buffer_offset: usize,
    len: usize,
    user_data: u64,
) -> i64 {
    submit(stream, |stream| stream.submit_read_fixed_at(fd, file_offset, buffer_index, buffer_offset, len, user_data))
}

/// Reads one contiguous stretch of the file, from file_offset on, into count ranges of the buffer, in order: one
/// submission. The array may be freed right after.
///
/// Errors: as ringest_stream_submit_read; -EINVAL also for ranges NULL, a count of 0 or over 1024, or overlapping
/// ranges.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_stream_submit_read_scatter(
    stream: *mut ringest_stream,
    fd: i32,
    file_offset: u64,
    ranges: *const ringest_range,
    count: u32,
    user_data: u64,
) -> i64 {
    value(|| {
        // SAFETY: `ranges` is null or has `count` elements by the C contract.
        let ranges = unsafe { elements(ranges, count as usize, "ranges") }?;
        let mut entered = enter(stream)?;
        let ranges = ranges.iter().map(|range| (range.offset as usize, range.len as usize));
        Ok(entered.stream.submit_scatter(fd.into(), file_offset, ranges, user_data)? as i64)
    })
}

/// Sends a 64-byte NVMe read command by IORING_OP_URING_CMD.
///
/// Errors: -EBADF for the stream; -EINVAL when command is NULL; -EPERM on another thread; -EOPNOTSUPP: this version of
/// ringest does not have the passthrough path.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_stream_submit_nvme_passthrough(
    stream: *mut ringest_stream,
    fd: i32,
    command: *const u8,
    user_data: u64,
) -> i64 {
    value(|| {
        // SAFETY: `command` is null or has 64 bytes by the C contract.
        let bytes = unsafe { elements(command, 64, "command") }?;
        let mut command = [0; 64];
        command.copy_from_slice(bytes);
        Ok(enter(stream)?.stream.submit_nvme_passthrough(fd, &command, user_data)? as i64)
    })
}

#[inline]
fn submit(
    stream: *mut ringest_stream,
    submit: impl FnOnce(&mut AsyncUringStream<'static>) -> crate::Result<u64>,
) -> i64 {
    value(|| Ok(submit(&mut enter(stream)?.stream)? as i64))
}

/// Hands all queued commands to the kernel. Returns how many submissions are in flight.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread; those of io_uring_enter(2); -EAGAIN and -EBUSY mean: poll, then try again.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_flush(stream: *mut ringest_stream) -> i64 {
    value(|| Ok(enter(stream)?.stream.flush_submissions()? as i64))
}

/// Submits what is queued, reaps what has completed, publishes the tail. Returns how many submissions ended whole since
/// the last poll, up to the first that failed; that one is the error of the next call.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread; those of a failed submission (-ENODATA at end of file, -ECANCELED, the
/// kernel's); those of io_uring_enter(2).
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_poll(stream: *mut ringest_stream) -> i64 {
    value(|| Ok(enter(stream)?.stream.poll()? as i64))
}

/// Submits what is queued, reaps what has completed, publishes the tail, and stores up to max records of ended
/// submissions, in the order in which they ended. Returns how many.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL when completions is NULL and max is not 0; -EPERM on another thread; those of
/// io_uring_enter(2), when there is no record to return. A failed submission is a record, not an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_stream_poll_into(
    stream: *mut ringest_stream,
    completions: *mut ringest_completion,
    max: u32,
) -> i64 {
    value(|| {
        if completions.is_null() && max > 0 {
            return Err(Failure::new(libc::EINVAL, "completions is NULL"));
        }
        check_count::<ringest_completion>(max as usize, "completions")?;
        let mut next = completions;
        let count = enter(stream)?.stream.poll_each(max as usize, |completion| {
            // SAFETY: `completions` has room for `max` records by the C contract, and this is called at most that often.
            unsafe {
                next.write(completion.into());
                next = next.add(1);
            }
        })?;
        Ok(count as i64)
    })
}

/// Submits what is queued and waits until min records can be taken, or nothing is in flight any more. Returns how many
/// can. timeout_ns < 0 waits without limit.
///
/// The owning thread.
///
/// Errors: -EBADF; -ETIMEDOUT; -EPERM on another thread; those of io_uring_enter(2).
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_wait(stream: *mut ringest_stream, min: u32, timeout_ns: i64) -> i64 {
    value(|| Ok(enter(stream)?.stream.wait_for_completion(min as usize, options::timeout(timeout_ns))? as i64))
}

/// Reads a failed submission once more, into the same place, from its beginning.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL unless it failed and its record was taken; -EAGAIN when depth are in flight; -EPERM on
/// another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_resubmit(stream: *mut ringest_stream, sequence: u64) -> i32 {
    status(|| Ok(enter(stream)?.stream.resubmit(sequence)?))
}

/// Gives a failed submission up: the tail passes it, and first_bad of a tail line says so for good.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL unless it failed and its record was taken; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_skip(stream: *mut ringest_stream, sequence: u64) -> i32 {
    status(|| Ok(enter(stream)?.stream.skip(sequence)?))
}

/// Asks for a submission to be cancelled. It ends with -ECANCELED, or whole if its data was already there.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL when it is not in flight; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_cancel(stream: *mut ringest_stream, sequence: u64) -> i32 {
    status(|| Ok(enter(stream)?.stream.cancel(sequence)?))
}

/// Asks for everything in flight to be cancelled.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_cancel_all(stream: *mut ringest_stream) -> i32 {
    status(|| Ok(enter(stream)?.stream.cancel_all()?))
}

/// Sends reads to another buffer from now on. Those in flight keep the old one.
///
/// The owning thread.
///
/// Errors: -EBADF for either handle; -EPERM on another thread; with RINGEST_STREAM_STRICT those of
/// ringest_ring_register_buffers. On failure the old buffer stays.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_replace_buffer(stream: *mut ringest_stream, buffer: *const ringest_buffer) -> i32 {
    status(|| {
        // SAFETY: as for ringest_buffer_duplicate, by the C contract.
        let buffer = unsafe { shared(buffer)?.duplicate() };
        enter(stream)?.stream.replace_buffer(buffer)?;
        Ok(())
    })
}

/// Announces that no submission follows: RINGEST_STATE_END and the number of submissions in a tail line. Those in flight
/// go on; failed ones can still be resubmitted or skipped.
///
/// The owning thread.
///
/// Errors: -EBADF; -EPERM on another thread.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_finish(stream: *mut ringest_stream) -> i32 {
    status(|| Ok(enter(stream)?.stream.finish()?))
}

/// Submissions that have not ended.
///
/// Any thread, while no other is in a call with this stream.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_inflight(stream: *const ringest_stream) -> i64 {
    value(|| Ok(exclusive(stream)?.stream.inflight() as i64))
}

/// Submissions, from the first on, whose every byte is in place (or that were skipped): what the tail word says.
///
/// Any thread, while no other is in a call with this stream.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_tail(stream: *const ringest_stream) -> i64 {
    value(|| Ok(exclusive(stream)?.stream.tail() as i64))
}

/// Whether the buffer is registered with the ring (1) or not (0).
///
/// Any thread, while no other is in a call with this stream.
///
/// Errors: -EBADF; -EBUSY.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_is_registered(stream: *const ringest_stream) -> i32 {
    value(|| Ok(exclusive(stream)?.stream.is_registered().into())) as i32
}

/// Stores what the stream has done so far.
///
/// Any thread, while no other is in a call with this stream.
///
/// Errors: -EBADF; -EBUSY; -EINVAL when stats is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_stream_stats(
    stream: *const ringest_stream,
    stats: *mut ringest_stream_counters,
) -> i32 {
    // SAFETY: `stats` is null or valid by the C contract.
    status(|| unsafe {
        store(stats, "stats", || {
            let stats = exclusive(stream)?.stream.stats();
            Ok(ringest_stream_counters {
                submitted: stats.submitted,
                completed: stats.completed,
                failed: stats.failed,
                end_of_file: stats.end_of_file,
                cancelled: stats.cancelled,
                skipped: stats.skipped,
                bytes: stats.bytes,
                registered_bytes: stats.registered_bytes,
                plain_bytes: stats.plain_bytes,
                bounced_bytes: stats.bounced_bytes,
                commands: stats.commands,
                short_reads: stats.short_reads,
                retries: stats.retries,
                enters: stats.enters,
                reserved: [0; 10],
            })
        })
    })
}

/// Cancels what is in flight, waits for it, and gives the ring back to its handle. A tail line then says END if the
/// stream was finished and everything is in place, ABORTED otherwise. The handle is dead afterwards, also on
/// -ETIMEDOUT. timeout_ns < 0 waits without limit.
///
/// The owning thread; any thread once the owner has exited.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this stream; -ETIMEDOUT when the device does not give
/// everything back in time, or the owner has exited with reads in flight: ring and memory are then leaked, counted and
/// logged, because the device may still write; -EPERM on another thread: nothing changes.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_close(stream: *mut ringest_stream, timeout_ns: i64) -> i32 {
    status(|| close(stream, Some(options::timeout(timeout_ns).unwrap_or(options::FOREVER))))
}

/// As ringest_stream_close with the stream's close_timeout_ns.
///
/// Errors: as ringest_stream_close.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_stream_destroy(stream: *mut ringest_stream) -> i32 {
    status(|| close(stream, None))
}

fn close(handle: *mut ringest_stream, timeout: Option<Duration>) -> Outcome<()> {
    let mut entered = last(handle.cast_const())?;
    if entered.was_poisoned() {
        let StreamObject { stream, ring } = entered.take();
        stream.abandon();
        return ring::give_back(ring, Ok(None));
    }
    entered.stream.enter().check_closable()?;
    let StreamObject { stream, ring } = entered.take();
    let timeout = timeout.unwrap_or(stream.close_timeout());
    ring::give_back(ring, stream.close_anywhere(timeout).map(|report| report.map(|report| report.ring)))
}
