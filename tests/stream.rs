//! The rules of the stream: order, completions, failures, queues, ends.

mod common;

use common::*;
use ringest::wire::{NO_SEQUENCE, state};
use ringest::{
    AsyncUringStream, Completion, DirectMode, InputFile, MappedBuffer, PipelineError, ReadPath, RingOptions,
    StreamOptions, TailLine, leak_stats,
};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn small_ring(entries: u32) -> RingOptions {
    RingOptions { entries, ..RingOptions::default() }
}

fn depth(depth: u32) -> StreamOptions {
    StreamOptions { depth, ..StreamOptions::default() }
}

#[test]
fn whole_files_arrive_both_ways() {
    let file = TempFile::new(3_000_001);
    for mode in [DirectMode::Off, DirectMode::Auto] {
        let input = file.open(mode);
        let mut memory = filled(3_000_001, 0);
        let tail = AtomicU64::new(9);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        assert_eq!(tail.load(Ordering::Relaxed), 0);
        let chunk = 100_003;
        let count = 3_000_001usize.div_ceil(chunk);
        for i in 0..count {
            let len = chunk.min(3_000_001 - i * chunk);
            stream.submit_read_to_gpu_at(&input, (i * chunk) as u64, i * chunk, len).unwrap();
        }
        let done = take(&mut stream, count);
        assert!(done.iter().all(|c| c.status == 0 && c.bytes == c.requested && c.file_offset == c.buffer_offset));
        assert_eq!(tail.load(Ordering::Acquire), count as u64);
        let stats = stream.stats();
        assert_eq!((stats.submitted, stats.completed, stats.failed), (count as u64, count as u64, 0));
        assert_eq!(stats.bytes, 3_000_001);
        assert_eq!(stats.registered_bytes + stats.plain_bytes, stats.bytes);
        drop(stream);
        check(memory.as_slice().unwrap(), 0);
    }
}

// The tail

/// "Tail = count of completions" would run ahead of the unfinished first read.
#[test]
fn the_tail_follows_submission_order_not_completion_order() {
    let file = TempFile::new(10_000);
    let input = file.open(DirectMode::Off);
    let pipe = Pipe::new();
    let mut memory = filled(20_000, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu_at_with_user_data(pipe.fd(), 0, 10_000, 100, 1000).unwrap();
    for chunk in 0..10 {
        stream.submit_read_to_gpu_at_with_user_data(&input, chunk * 1000, chunk as usize * 1000, 1000, chunk).unwrap();
    }
    let early = take(&mut stream, 10);
    // Each record is its own submission's, whatever the order ("completions paired FIFO").
    for completion in &early {
        assert_eq!((completion.status, completion.sequence), (0, completion.user_data + 1));
        assert_eq!(completion.file_offset, completion.user_data * 1000);
    }
    assert_eq!((tail.load(Ordering::Acquire), stream.tail(), stream.inflight()), (0, 0, 1));
    check(&bytes_of(&memory, 0, 10_000), 0);
    pipe.feed(77, 100);
    let last = take_one(&mut stream);
    assert_eq!((last.sequence, last.user_data, last.bytes), (0, 1000, 100));
    assert_eq!(tail.load(Ordering::Acquire), 11);
    check(&bytes(&stream)[10_000..10_100], 77);
}

/// Bytes of memory that is shared but not being written to.
fn bytes_of(memory: &MappedBuffer<u8>, at: usize, len: usize) -> Vec<u8> {
    // SAFETY: inside the buffer; the tests see to it that no read into the range is in flight.
    unsafe { std::slice::from_raw_parts(memory.as_host_ptr().add(at), len) }.to_vec()
}

/// A consumer that follows the tail on another thread finds every byte of every chunk the tail covers.
#[test]
fn a_consumer_on_another_thread_sees_the_bytes_before_the_tail() {
    const CHUNK: usize = 5000;
    const COUNT: usize = 600;
    let file = TempFile::new(CHUNK * COUNT);
    for mode in [DirectMode::Off, DirectMode::Auto] {
        let input = file.open(mode);
        let mut memory = filled(CHUNK * COUNT, 0);
        let base = memory.as_host_ptr() as usize;
        let tail = AtomicU64::new(0);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut seen = 0;
                while seen < COUNT {
                    let now = tail.load(Ordering::Acquire) as usize;
                    assert!(seen <= now && now <= COUNT, "the tail went from {seen} to {now}");
                    for chunk in seen..now {
                        // SAFETY: the tail says that nothing writes to this chunk any more.
                        let bytes = unsafe { std::slice::from_raw_parts((base + chunk * CHUNK) as *const u8, CHUNK) };
                        check(bytes, (chunk * CHUNK) as u64);
                    }
                    seen = now;
                    std::thread::yield_now();
                }
            });
            let mut next = 0;
            while stream.tail() < COUNT as u64 {
                while next < COUNT {
                    match stream.submit_read_to_gpu(&input, (next * CHUNK) as u64, next, CHUNK) {
                        Ok(_) => next += 1,
                        Err(error) => {
                            assert_eq!(error.errno(), libc::EAGAIN);
                            break;
                        }
                    }
                }
                stream.wait_for_completion(1, Some(LONG)).unwrap();
                stream.poll().unwrap();
            }
        });
    }
}

#[test]
fn a_u32_tail_and_a_line_follow_as_well() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let word = AtomicU32::new(5);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &word).unwrap();
    assert_eq!(word.load(Ordering::Relaxed), 0);
    for round in 1..=300 {
        stream.submit_read_to_gpu(&input, 0, 0, 64).unwrap();
        take_one(&mut stream);
        assert_eq!(word.load(Ordering::Acquire), round);
    }
    drop(stream);
    let line = TailLine::alloc().unwrap();
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), line.clone()).unwrap();
    stream.submit_read_to_gpu(&input, 0, 0, 64).unwrap();
    take_one(&mut stream);
    let words = line.words();
    assert_eq!(words.tail.load(Ordering::Acquire), 1);
    assert_eq!(words.first_bad.load(Ordering::Acquire), NO_SEQUENCE);
    assert_eq!(words.state.load(Ordering::Acquire), state::OPEN);
}

// Failures

/// "Short and EOF reads counted as success", "good completions dropped when one fails".
#[test]
fn a_failed_submission_holds_the_tail_until_it_is_read_again_or_skipped() {
    let file = TempFile::new(4000);
    let input = file.open(DirectMode::Off);
    let line = TailLine::alloc().unwrap();
    let words = line.words();
    let mut memory = filled(16_384, 0xee);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), line.clone()).unwrap();
    stream.submit_read_to_gpu(&input, 0, 0, 2048).unwrap(); // whole
    stream.submit_read_to_gpu(&input, 2048, 1, 2048).unwrap(); // ends at 4000
    stream.submit_read_to_gpu(&input, 0, 2, 2048).unwrap(); // whole
    stream.submit_read_to_gpu(&input, 9999, 3, 2048).unwrap(); // wholly beyond
    stream.submit_read_to_gpu(&input, 0, 4, 2048).unwrap(); // whole
    let mut done = take(&mut stream, 5);
    done.sort_by_key(|completion| completion.sequence);
    let status: Vec<_> = done.iter().map(|c| (c.status, c.bytes)).collect();
    assert_eq!(status, [(0, 2048), (-libc::ENODATA, 1952), (0, 2048), (-libc::ENODATA, 0), (0, 2048)]);
    assert!(matches!(done[1].result(), Err(PipelineError::EndOfFile { bytes: 1952, requested: 2048, .. })));
    assert_eq!(words.tail.load(Ordering::Acquire), 1);
    assert_eq!(words.first_bad.load(Ordering::Acquire), 1);
    assert_eq!(words.error.load(Ordering::Acquire), -libc::ENODATA);
    let got = bytes(&stream);
    check(&got[2048..4000], 2048);
    assert!(got[4000..4096].iter().all(|&byte| byte == 0xee), "beyond the end of the file nothing is written");
    check(&got[4096..6144], 0);

    // Only what failed, and whose record was taken, can be resubmitted or skipped.
    for sequence in [0, 2, 5, u64::MAX] {
        assert_eq!(errno(stream.resubmit(sequence)), libc::EINVAL);
        assert_eq!(errno(stream.skip(sequence)), libc::EINVAL);
    }
    // Resubmitted without change: fails again.
    stream.resubmit(1).unwrap();
    assert_eq!(errno(stream.resubmit(1)), libc::EINVAL);
    assert_eq!(take_one(&mut stream).status, -libc::ENODATA);
    // Grown, it completes from its beginning, and the tail goes on to the next hole.
    {
        use std::os::unix::fs::FileExt;
        file.writable().write_all_at(&pattern(4000, 4000), 4000).unwrap();
    }
    stream.resubmit(1).unwrap();
    let again = take_one(&mut stream);
    assert_eq!((again.status, again.sequence, again.bytes, again.user_data), (0, 1, 2048, 1));
    check(&bytes(&stream)[2048..4096], 2048);
    assert_eq!(words.tail.load(Ordering::Acquire), 3);
    assert_eq!(words.first_bad.load(Ordering::Acquire), 3);
    stream.skip(3).unwrap();
    assert_eq!(errno(stream.skip(3)), libc::EINVAL);
    assert_eq!(words.tail.load(Ordering::Acquire), 5);
    assert_eq!(words.first_bad.load(Ordering::Acquire), 3, "a skipped submission stays bad");
    let stats = stream.stats();
    assert_eq!((stats.submitted, stats.completed, stats.failed), (7, 4, 3));
    assert_eq!((stats.end_of_file, stats.skipped), (3, 1));
}

#[test]
fn an_empty_file_is_end_of_file_and_never_published() {
    let file = TempFile::new(0);
    for mode in [DirectMode::Off, DirectMode::Auto] {
        let input = file.open(mode);
        assert!(input.is_empty());
        let tail = AtomicU64::new(0);
        let mut memory = filled(4096, 0xee);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        stream.submit_read_to_gpu(&input, 0, 0, 4096).unwrap();
        let completion = take_one(&mut stream);
        assert_eq!((completion.status, completion.bytes, completion.path), (-libc::ENODATA, 0, ReadPath::None));
        assert_eq!(tail.load(Ordering::Acquire), 0);
        assert!(bytes(&stream).iter().all(|&byte| byte == 0xee));
    }
}

#[test]
fn first_bad_is_the_lowest_and_is_withdrawn() {
    let file = TempFile::new(1000);
    let input = file.open(DirectMode::Off);
    let line = TailLine::alloc().unwrap();
    let words = line.words();
    let first_bad = || words.first_bad.load(Ordering::Acquire);
    let mut memory = filled(8000, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), line.clone()).unwrap();
    let pipe = Pipe::new();
    stream.submit_read_to_gpu(pipe.fd(), 0, 0, 1000).unwrap();
    stream.submit_read_to_gpu(&input, 2000, 1, 1000).unwrap();
    stream.submit_read_to_gpu(-1, 0, 2, 1000).unwrap();
    let done = take(&mut stream, 2);
    assert_eq!(first_bad(), 1);
    assert_eq!(words.error.load(Ordering::Acquire), -libc::ENODATA);
    assert!(done.iter().any(|c| c.status == -libc::EBADF));
    // A lower one that fails later takes over ...
    stream.cancel(0).unwrap();
    assert_eq!(take_one(&mut stream).status, -libc::ECANCELED);
    assert_eq!(first_bad(), 0);
    assert_eq!(words.error.load(Ordering::Acquire), -libc::ECANCELED);
    // ... and while it is read again it is not bad.
    stream.resubmit(0).unwrap();
    assert_eq!(first_bad(), 1);
    pipe.feed(0, 1000);
    assert_eq!(take_one(&mut stream).status, 0);
    assert_eq!((stream.tail(), first_bad()), (1, 1));
    stream.skip(2).unwrap();
    assert_eq!((stream.tail(), first_bad()), (1, 1));
    file.writable().set_len(3000).unwrap();
    stream.resubmit(1).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
    assert_eq!((stream.tail(), first_bad()), (3, 2));
    assert_eq!(words.error.load(Ordering::Acquire), -libc::EBADF);
}

#[test]
fn poll_counts_successes_before_it_reports_the_failure() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    assert_eq!(stream.poll().unwrap(), 0);
    // Zero-length reads end at once, so the order of ends is the order of submissions.
    for offset in [0, 0] {
        stream.submit_read_to_gpu_at(&input, offset, 0, 0).unwrap();
    }
    stream.submit_read_to_gpu_at(&input, 4096, 0, 16).unwrap();
    stream.submit_read_to_gpu_at(-1, 0, 0, 16).unwrap();
    stream.wait_for_completion(4, Some(LONG)).unwrap();
    stream.submit_read_to_gpu_at(&input, 0, 0, 0).unwrap();
    assert_eq!(stream.poll().unwrap(), 2);
    let mut failures = vec![stream.poll().unwrap_err(), stream.poll().unwrap_err()];
    failures.sort_by_key(PipelineError::errno);
    assert!(matches!(failures[0], PipelineError::ReadFailed { sequence: 3, errno: libc::EBADF, .. }), "{failures:?}");
    assert!(matches!(failures[1], PipelineError::EndOfFile { sequence: 2, bytes: 0, .. }), "{failures:?}");
    assert_eq!(stream.poll().unwrap(), 1);
    assert_eq!(stream.poll().unwrap(), 0);
    assert_eq!(tail.load(Ordering::Acquire), 2);
}

#[test]
fn poll_into_hands_out_records_as_room_allows() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    for i in 0..7 {
        stream.submit_read_to_gpu_at_with_user_data(&input, i * 8, i as usize * 8, 8, 100 + i).unwrap();
    }
    assert_eq!(stream.poll_into(&mut []).unwrap(), 0);
    stream.wait_for_completion(7, Some(LONG)).unwrap();
    // The tail does not wait for records to be taken.
    assert_eq!((tail.load(Ordering::Acquire), stream.inflight()), (7, 0));
    let mut seen = Vec::new();
    let mut out = [Completion::default(); 3];
    for expected in [3, 3, 1, 0] {
        let count = stream.poll_into(&mut out).unwrap();
        assert_eq!(count, expected);
        seen.extend(out[..count].iter().map(|c| (c.sequence, c.user_data)));
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..7).map(|i| (i, 100 + i)).collect::<Vec<_>>());
}

#[test]
fn waiting_ends_at_its_timeout_or_when_nothing_is_left() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let pipe = Pipe::new();
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    // Nothing in flight: nothing to wait for.
    assert_eq!(stream.wait_for_completion(1, None).unwrap(), 0);
    stream.submit_read_to_gpu(&input, 0, 0, 16).unwrap();
    assert_eq!(stream.wait_for_completion(50, None).unwrap(), 1);
    stream.submit_read_to_gpu(pipe.fd(), 0, 1, 16).unwrap();
    assert_eq!(stream.wait_for_completion(0, None).unwrap(), 1);
    assert_eq!(stream.wait_for_completion(1, Some(Duration::ZERO)).unwrap(), 1);
    // A relative timeout, not an absolute one: it takes about as long as it says.
    let start = Instant::now();
    let error = stream.wait_for_completion(2, Some(Duration::from_millis(30))).unwrap_err();
    let took = start.elapsed();
    assert_eq!(error.errno(), libc::ETIMEDOUT);
    assert!(error.to_string().contains("1 are there, 1 reads are in flight"), "{error}");
    assert!(took >= Duration::from_millis(30) && took < LONG, "{took:?}");
    assert_eq!(errno(stream.wait_for_completion(2, Some(Duration::ZERO))), libc::ETIMEDOUT);
    assert_eq!(take(&mut stream, 1)[0].status, 0);
    pipe.feed(0, 16);
    // A timeout beyond what the clock can hold is none.
    assert_eq!(stream.wait_for_completion(1, Some(Duration::MAX)).unwrap(), 1);
}

// Queues

#[test]
fn full_queues_say_what_makes_room() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let pipe = Pipe::new();
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let options = StreamOptions { depth: 2, window: 4, ..StreamOptions::default() };
    let mut stream = AsyncUringStream::with_options(ring!(), memory.share(), &tail, options).unwrap();
    assert_eq!(stream.depth(), 2);
    let full = |result: ringest::Result<u64>, fix: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.errno(), libc::EAGAIN);
        assert!(error.to_string().contains(fix), "{error}");
    };
    stream.submit_read_to_gpu(pipe.fd(), 0, 0, 8).unwrap();
    stream.submit_read_to_gpu(pipe.fd(), 0, 1, 8).unwrap();
    full(stream.submit_read_to_gpu(&input, 0, 2, 8), "poll for completions (2 in flight)");
    assert_eq!((stream.submitted(), stream.inflight()), (2, 2));
    pipe.feed(0, 16);
    stream.wait_for_completion(2, Some(LONG)).unwrap();
    stream.submit_read_to_gpu(&input, 0, 2, 8).unwrap();
    stream.submit_read_to_gpu(&input, 5000, 3, 8).unwrap();
    stream.wait_for_completion(4, Some(LONG)).unwrap();
    // Nothing in flight, but nobody took the records.
    full(stream.submit_read_to_gpu(&input, 0, 4, 8), "submission 0 is the oldest not taken");
    assert_eq!(take(&mut stream, 4).iter().filter(|c| c.status != 0).count(), 1);
    for chunk in 4..7 {
        stream.submit_read_to_gpu(&input, 0, chunk, 8).unwrap();
        take_one(&mut stream);
    }
    full(stream.submit_read_to_gpu(&input, 0, 7, 8), "submission 3 failed and holds the tail: resubmit or skip it");
    assert_eq!(stream.tail(), 3);
    stream.skip(3).unwrap();
    assert_eq!(stream.tail(), 7);
    stream.submit_read_to_gpu(&input, 0, 7, 8).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
}

#[test]
fn options_out_of_range_are_refused() {
    let tail = AtomicU64::new(3);
    let mut memory = filled(4096, 0);
    for (depth, window) in [(65_537, 0), (64, 63), (64, (1 << 20) + 1), (1, u32::MAX), (u32::MAX, 0)] {
        let options = StreamOptions { depth, window, ..StreamOptions::default() };
        let refused = AsyncUringStream::with_options(ring!(), memory.share(), &tail, options);
        assert_eq!(errno(refused.map(drop)), libc::EINVAL, "{depth} {window}");
    }
    assert_eq!(tail.load(Ordering::Relaxed), 3);
}

/// "CQ overflow stuck for ever."
#[test]
fn more_submissions_than_the_queues_hold() {
    let file = TempFile::new(64 * 512);
    let mut inputs = vec![file.open(DirectMode::Off)];
    inputs.extend(InputFile::open(file.path(), DirectMode::On));
    for (entries, window) in [(2, 0), (1, 64), (16, 256)] {
        for input in &inputs {
            let tail = AtomicU64::new(0);
            let mut memory = filled(64 * 512, 0);
            let options = StreamOptions { window, ..depth(64) };
            let mut stream =
                AsyncUringStream::with_options(ring!(small_ring(entries)), memory.share(), &tail, options).unwrap();
            for chunk in 0..64 {
                stream.submit_read_to_gpu(input, chunk as u64 * 512, chunk, 512).unwrap();
            }
            assert_eq!(errno(stream.submit_read_to_gpu(input, 0, 0, 1)), libc::EAGAIN);
            assert_eq!(stream.flush_submissions().unwrap(), 64);
            // By polling alone: what the queues could not take goes out as completions make room.
            let mut done = 0;
            eventually("64 completions", || {
                done += stream.poll().unwrap();
                done == 64
            });
            assert_eq!(tail.load(Ordering::Acquire), 64);
            check(&bytes(&stream), 0);
        }
    }
}

/// A wait must not wait in the kernel for more completions than can come before it has to hand out more commands.
#[test]
fn waiting_beyond_the_queue_size_goes_on_beside_a_read_that_never_ends() {
    let file = TempFile::new(64 * 512);
    let mut inputs = vec![file.open(DirectMode::Off)];
    inputs.extend(InputFile::open(file.path(), DirectMode::On));
    for (entries, input) in [2, 64].into_iter().flat_map(|entries| inputs.iter().map(move |input| (entries, input))) {
        let pipe = Pipe::new();
        let tail = AtomicU64::new(0);
        let mut memory = filled(64 * 512, 0);
        let mut stream =
            AsyncUringStream::with_options(ring!(small_ring(entries)), memory.share(), &tail, depth(64)).unwrap();
        stream.submit_read_to_gpu_at(pipe.fd(), 0, 0, 1).unwrap();
        for chunk in 1..64 {
            // Unaligned for O_DIRECT: through the bounce buffer's few slots.
            stream.submit_read_to_gpu_at(input, chunk as u64 * 500 + 1, chunk * 500, 500).unwrap();
        }
        assert!(take(&mut stream, 63).iter().all(|c| c.status == 0));
        assert_eq!((stream.inflight(), tail.load(Ordering::Acquire)), (1, 0));
        pipe.feed(0, 1);
        assert_eq!(take_one(&mut stream).status, 0);
        assert_eq!(tail.load(Ordering::Acquire), 64);
        check(&bytes(&stream)[500..32_000], 501);
    }
}

// Kinds of reads

#[test]
fn a_read_of_zero_bytes_is_whole() {
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0xee);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    let file = TempFile::new(10);
    let input = file.open(DirectMode::Auto);
    for (offset, at) in [(0, 0), (10, 4096), (1 << 40, 17)] {
        stream.submit_read_to_gpu_at(&input, offset, at, 0).unwrap();
        let completion = take_one(&mut stream);
        assert_eq!((completion.status, completion.bytes, completion.path), (0, 0, ReadPath::None));
    }
    stream.submit_read_to_gpu_scatter(&input, 0, &[(0, 0), (4096, 0)], 3).unwrap();
    assert_eq!(take_one(&mut stream).user_data, 3);
    assert_eq!((tail.load(Ordering::Acquire), stream.stats().commands), (4, 0));
}

/// "Offsets cut to 32 bits."
#[test]
fn offsets_are_64_bits_wide() {
    const FAR: u64 = (5 << 30) + 4096;
    let file = TempFile::sparse(6 << 30, &[(FAR, 20_000)]);
    let tail = AtomicU64::new(0);
    let mut memory = filled(65_536, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    for mode in [DirectMode::Off, DirectMode::Auto] {
        let input = file.open(mode);
        assert_eq!(input.len(), 6 << 30);
        stream.submit_read_to_gpu_at(&input, FAR + 3, 5, 19_000).unwrap();
        stream.submit_read_to_gpu_scatter(&input, FAR, &[(30_000, 5), (40_000, 4096)], 0).unwrap();
        assert!(take(&mut stream, 2).iter().all(|c| c.status == 0));
        let got = bytes(&stream);
        check(&got[5..19_005], FAR + 3);
        check(&got[30_000..30_005], FAR);
        check(&got[40_000..44_096], FAR + 5);
        // SAFETY: nothing is in flight.
        unsafe { std::ptr::write_bytes(stream.buffer().as_host_ptr(), 0, 65_536) };
    }
}

#[test]
fn scatter_reads_land_range_by_range() {
    let file = TempFile::new(1 << 20);
    let mut inputs = vec![file.open(DirectMode::Off)];
    inputs.extend(InputFile::open(file.path(), DirectMode::On));
    let raw = file.raw(libc::O_DIRECT);
    for unregistered in [false, true] {
        let tail = AtomicU64::new(0);
        let mut memory = filled(1 << 20, 0xee);
        let options = StreamOptions { unregistered, ..StreamOptions::default() };
        let mut stream = AsyncUringStream::with_options(ring!(), memory.share(), &tail, options).unwrap();
        assert_eq!(stream.is_registered(), !unregistered);
        let path = if unregistered { ReadPath::PlainRead } else { ReadPath::RegisteredRead };
        let most: Vec<_> = (0..1024).map(|i| ((1023 - i) * 1000 + i % 7, 1 + i % 900)).collect();
        let lists: [(u64, &[(usize, usize)]); 7] = [
            (0, &[(0, 4096), (8192, 4096)]),                  // aligned all through
            (512, &[(16_384, 512), (0, 8192)]),               // backwards
            (1, &[(3, 1)]),                                   // one byte
            (4096, &[(10, 0), (20, 5), (30, 0), (40, 9000)]), // with empty ranges
            (777, &[(1, 4095), (5000, 4097), (70_001, 512)]), // ragged
            (0, &[(0, 300_000), (300_001, 500_000)]),         // large
            (99, &most),
        ];
        let sources: Vec<ringest::FileRef> =
            inputs.iter().map(Into::into).chain(raw.as_ref().ok().map(|raw| raw.as_raw_fd().into())).collect();
        for source in &sources {
            for (offset, ranges) in lists {
                stream.submit_read_to_gpu_scatter(source.clone(), offset, ranges, 42).unwrap();
                let completion = take_one(&mut stream);
                let total: usize = ranges.iter().map(|&(_, len)| len).sum();
                assert_eq!((completion.status, completion.bytes), (0, total as u64), "{completion:?}");
                assert_eq!((completion.user_data, completion.buffer_offset), (42, ranges[0].0 as u64));
                if completion.bounced == 0 {
                    assert_eq!(completion.path, path, "{source:?} {offset} {ranges:?}");
                }
                let got = bytes(&stream);
                let (mut at, mut covered) = (offset, vec![false; 1 << 20]);
                for &(start, len) in ranges {
                    check(&got[start..start + len], at);
                    covered[start..start + len].fill(true);
                    at += len as u64;
                }
                assert!((0..1 << 20).all(|i| covered[i] || got[i] == 0xee), "bytes beside the ranges were written");
                // SAFETY: nothing is in flight.
                unsafe { std::ptr::write_bytes(stream.buffer().as_host_ptr(), 0xee, 1 << 20) };
            }
        }
        assert_eq!(stream.tail(), stream.submitted());
    }
}

#[test]
fn scatter_lists_that_cannot_work_are_refused() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    let many = vec![(0, 0); 1025];
    let bad: [(&[(usize, usize)], i32); 7] = [
        (&[], libc::EINVAL),
        (&many, libc::EINVAL),
        (&[(0, 10), (9, 1)], libc::EINVAL),
        (&[(100, 10), (50, 51)], libc::EINVAL),
        (&[(0, 1), (4096, 1)], libc::ERANGE),
        (&[(usize::MAX, 2)], libc::ERANGE),
        (&[(1, usize::MAX)], libc::ERANGE),
    ];
    for (ranges, expected) in bad {
        assert_eq!(errno(stream.submit_read_to_gpu_scatter(&input, 0, ranges, 0)), expected, "{ranges:?}");
    }
    assert_eq!((stream.submitted(), stream.inflight()), (0, 0));
    assert_eq!(errno(stream.submit_read_to_gpu_scatter(&input, i64::MAX as u64, &[(0, 1)], 0)), libc::ERANGE);
}

#[test]
fn a_scatter_read_that_meets_the_end_of_the_file_says_how_far_it_came() {
    let file = TempFile::new(1000);
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0xee);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    for mode in [DirectMode::Off, DirectMode::Auto] {
        let input = file.open(mode);
        stream.submit_read_to_gpu_scatter(&input, 100, &[(2000, 600), (0, 600)], 0).unwrap();
        let completion = take_one(&mut stream);
        assert_eq!((completion.status, completion.bytes), (-libc::ENODATA, 900), "{mode:?}");
        let got = bytes(&stream);
        check(&got[2000..2600], 100);
        check(&got[..300], 700);
        assert!(got[300..600].iter().all(|&byte| byte == 0xee));
        stream.skip(completion.sequence).unwrap();
    }
}

#[test]
fn short_reads_are_continued() {
    let pipe = Pipe::new();
    let tail = AtomicU64::new(0);
    let mut memory = filled(8192, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu_at(pipe.fd(), 0, 10, 1000).unwrap();
    let mut fed = 0;
    for len in [1, 99, 400, 500] {
        stream.poll().unwrap();
        assert_eq!(tail.load(Ordering::Acquire), 0);
        pipe.feed(fed, len);
        fed += len as u64;
        // The kernel has taken the piece when the stream has counted it.
        eventually("the piece", || {
            stream.wait_for_completion(0, None).unwrap();
            stream.stats().bytes == fed || stream.poll().unwrap() == 1
        });
    }
    eventually("the end", || stream.tail() == 1 || stream.poll().unwrap() == 1);
    assert_eq!((stream.stats().short_reads, stream.stats().bytes), (3, 1000));
    check(&bytes(&stream)[10..1010], 0);
    // The same into several ranges: the rest goes on in the middle of one.
    stream.submit_read_to_gpu_scatter(pipe.fd(), 0, &[(5000, 300), (2000, 300)], 0).unwrap();
    stream.poll().unwrap();
    pipe.feed(0, 350);
    eventually("the piece", || {
        stream.poll().unwrap();
        stream.stats().bytes == 1350
    });
    pipe.feed(350, 250);
    assert_eq!(take_one(&mut stream).bytes, 600);
    check(&bytes(&stream)[5000..5300], 0);
    check(&bytes(&stream)[2000..2300], 300);
}

/// A pipe whose writer goes away is an end of file.
#[test]
fn a_pipe_without_writers_ends() {
    let mut pipe = Pipe::new();
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu(pipe.fd(), 0, 0, 100).unwrap();
    stream.flush_submissions().unwrap();
    pipe.feed(0, 60);
    pipe.close_writer();
    let completion = take_one(&mut stream);
    assert_eq!((completion.status, completion.bytes), (-libc::ENODATA, 60));
    check(&bytes(&stream)[..60], 0);
}

/// The kernel waits for data by itself, also where O_NONBLOCK is set.
#[test]
fn a_nonblocking_pipe_is_waited_for() {
    let pipe = Pipe::with_flags(libc::O_NONBLOCK);
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu(pipe.fd(), 0, 0, 100).unwrap();
    assert_eq!(errno(stream.wait_for_completion(1, Some(Duration::from_millis(3)))), libc::ETIMEDOUT);
    pipe.feed(9, 100);
    assert_eq!(take_one(&mut stream).status, 0);
    check(&bytes(&stream)[..100], 9);
}

#[test]
fn passthrough_is_refused_and_says_so() {
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    let error = stream.submit_nvme_passthrough(0, &[0; 64], 0).unwrap_err();
    assert_eq!(error, PipelineError::NvmePassthroughDisabled);
    assert_eq!((error.errno(), stream.submitted()), (libc::EOPNOTSUPP, 0));
}

// The buffer

#[test]
fn a_replaced_buffer_lives_until_its_reads_end() {
    let pipe = Pipe::new();
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    for unregistered in [false, true] {
        let tail = AtomicU64::new(0);
        let (mut old, mut new) = (filled(4096, 1), filled(8192, 2));
        let options = StreamOptions { unregistered, ..StreamOptions::default() };
        let ring = ring!(RingOptions { buffer_slots: 2, ..small_ring(8) });
        let mut stream = AsyncUringStream::with_options(ring, old.share(), &tail, options).unwrap();
        stream.submit_read_to_gpu(pipe.fd(), 0, 0, 4096).unwrap();
        stream.flush_submissions().unwrap();
        let handle = stream.replace_buffer(new.share()).unwrap();
        assert_eq!(handle.len(), 4096);
        drop(handle);
        assert_eq!(stream.is_registered(), !unregistered);
        // New reads go to the new buffer, with its bounds.
        stream.submit_read_to_gpu(&input, 0, 1, 4096).unwrap();
        assert_eq!(take_one(&mut stream).sequence, 1);
        assert_eq!(errno(old.as_slice().map(drop)), libc::EBUSY);
        pipe.feed(11, 4096);
        assert_eq!(take_one(&mut stream).status, 0);
        // The last read has ended: the old memory is the caller's again.
        check(old.as_slice().unwrap(), 11);
        check(&bytes(&stream)[4096..], 0);
        assert!(bytes(&stream)[..4096].iter().all(|&byte| byte == 2));
        // And its entry of the ring's table is free again.
        let _ = stream.replace_buffer(old.share()).unwrap();
        let _ = stream.replace_buffer(new.share()).unwrap();
        assert_eq!(stream.is_registered(), !unregistered);
    }
}

// Ending

#[test]
fn a_finished_stream_takes_no_more_but_can_be_made_whole() {
    let file = TempFile::new(100);
    let input = file.open(DirectMode::Off);
    let line = TailLine::alloc().unwrap();
    let words = line.words();
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), line.clone()).unwrap();
    stream.submit_read_to_gpu(&input, 0, 0, 100).unwrap();
    stream.submit_read_to_gpu(&input, 100, 1, 100).unwrap();
    stream.finish().unwrap();
    assert_eq!((words.state.load(Ordering::Acquire), words.end.load(Ordering::Acquire)), (state::END, 2));
    assert_eq!(errno(stream.submit_read_to_gpu(&input, 0, 0, 100)), libc::EBUSY);
    assert_eq!(stream.submitted(), 2);
    take(&mut stream, 2);
    file.writable().set_len(200).unwrap();
    stream.resubmit(1).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
    let report = stream.close(LONG).unwrap();
    assert_eq!((report.tail, report.submitted, report.stats.completed), (2, 2, 2));
    assert_eq!(words.state.load(Ordering::Acquire), state::END);
    assert_eq!(words.first_bad.load(Ordering::Acquire), NO_SEQUENCE);
}

#[test]
fn a_stream_that_ends_early_says_aborted() {
    let pipe = Pipe::new();
    for (finish, submit) in [(false, false), (false, true), (true, true)] {
        let line = TailLine::alloc().unwrap();
        let words = line.words();
        let mut memory = filled(4096, 0);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), line.clone()).unwrap();
        if submit {
            stream.submit_read_to_gpu(pipe.fd(), 0, 0, 100).unwrap();
        }
        if finish {
            stream.finish().unwrap();
        }
        drop(stream);
        assert_eq!(words.state.load(Ordering::Acquire), state::ABORTED);
        assert_eq!(words.error.load(Ordering::Acquire), -libc::ECANCELED);
        assert_eq!(words.end.load(Ordering::Acquire), u64::from(submit));
        assert_eq!(words.tail.load(Ordering::Acquire), 0);
        assert!(memory.as_slice().is_ok());
    }
}

/// As many reads in flight as there can be, more of them than cancel commands fit beside them.
#[test]
fn closing_cancels_everything_in_flight() {
    let pipe = Pipe::new();
    for entries in [1, 2, 4, 64] {
        for flushed in [true, false] {
            let tail = AtomicU64::new(0);
            let mut memory = filled(4096, 0);
            let mut stream =
                AsyncUringStream::with_options(ring!(small_ring(entries)), memory.share(), &tail, depth(64)).unwrap();
            for chunk in 0..64 {
                stream.submit_read_to_gpu(pipe.fd(), 0, chunk, 64).unwrap();
            }
            if flushed {
                stream.flush_submissions().unwrap();
            }
            let start = Instant::now();
            let report = stream.close(Duration::from_secs(20)).unwrap();
            assert!(start.elapsed() < Duration::from_secs(10), "{entries}: {:?}", start.elapsed());
            assert_eq!((report.submitted, report.tail, report.stats.cancelled), (64, 0, 64));
            drop(exercise(report.ring));
            assert!(memory.as_slice().is_ok());
        }
    }
}

#[test]
fn every_submission_in_flight_can_be_cancelled() {
    let pipe = Pipe::new();
    for entries in [2, 64] {
        let tail = AtomicU64::new(0);
        let mut memory = filled(4096, 0);
        let mut stream =
            AsyncUringStream::with_options(ring!(small_ring(entries)), memory.share(), &tail, depth(64)).unwrap();
        for chunk in 0..64 {
            stream.submit_read_to_gpu(pipe.fd(), 0, chunk, 64).unwrap();
        }
        stream.flush_submissions().unwrap();
        stream.cancel(3).unwrap();
        let completion = take_one(&mut stream);
        assert_eq!((completion.sequence, completion.status), (3, -libc::ECANCELED));
        assert_eq!(errno(stream.cancel(3)), libc::EINVAL);
        assert_eq!(errno(stream.cancel(64)), libc::EINVAL);
        stream.cancel_all().unwrap();
        let mut rest: Vec<_> = take(&mut stream, 63).iter().map(|c| (c.sequence, c.status)).collect();
        rest.sort_unstable();
        let expected: Vec<_> = (0..64).filter(|&n| n != 3).map(|n| (n, -libc::ECANCELED)).collect();
        assert_eq!(rest, expected);
        assert_eq!((tail.load(Ordering::Acquire), stream.stats().cancelled), (0, 64));
        // A cancelled one can be read again.
        stream.resubmit(0).unwrap();
        pipe.feed(0, 64);
        assert_eq!(take_one(&mut stream).status, 0);
        assert_eq!(tail.load(Ordering::Acquire), 1);
    }
}

/// "Drop with reads in flight: the kernel kept writing into freed memory."
#[test]
fn dropping_waits_for_reads_in_flight_and_leaks_nothing() {
    let pipe = Pipe::new();
    let file = TempFile::new(1 << 20);
    let input = file.open(DirectMode::Auto);
    let tail = AtomicU64::new(0);
    let mut memory = filled(1 << 21, 0);
    let before = leak_stats();
    let mut stream = AsyncUringStream::with_options(ring!(), memory.share(), &tail, depth(64)).unwrap();
    for chunk in 0..60 {
        match chunk % 2 {
            0 => stream.submit_read_to_gpu_at(pipe.fd(), 0, (1 << 20) + chunk, 1).unwrap(),
            _ => stream.submit_read_to_gpu_at(&input, chunk as u64 * 1001, chunk * 10_000, 9999).unwrap(),
        };
    }
    stream.flush_submissions().unwrap();
    drop(stream);
    assert_eq!(leak_stats(), before);
    memory.as_mut_slice().unwrap().fill(0xaa);
    pipe.feed(0, 1000);
    assert!(memory.as_slice().unwrap().iter().all(|&byte| byte == 0xaa));
}

#[test]
fn debug_output_names_what_matters() {
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    let text = format!("{stream:?}");
    assert!(text.contains("tail: 0") && text.contains("in_flight: 0"), "{text}");
    assert!(stream.footprint() > 0 && stream.ring().fd() > 0);
}

/// Completions of reads and of their cancellations together are more than the queue holds.
#[test]
fn polling_alone_sees_a_completion_queue_that_overflowed() {
    let ring = ring!(RingOptions { entries: 64, ..RingOptions::default() });
    let pipe = Pipe::new();
    let tail = AtomicU64::new(0);
    let mut memory = filled(1 << 16, 0);
    let options = StreamOptions { depth: 112, window: 256, ..StreamOptions::default() };
    let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, options).unwrap();
    for i in 0..112 {
        stream.submit_read_to_gpu_at(pipe.fd(), 0, i * 64, 64).unwrap();
    }
    stream.flush_submissions().unwrap();
    stream.cancel_all().unwrap();
    let mut out = [Completion::default(); 16];
    let (mut ended, start) = (0, std::time::Instant::now());
    while ended < 112 {
        assert!(start.elapsed() < LONG, "{ended} of 112 ended");
        let count = stream.poll_into(&mut out).unwrap();
        assert!(out[..count].iter().all(|completion| completion.status == -libc::ECANCELED));
        ended += count;
    }
}

#[test]
fn closing_without_time_finds_what_has_completed() {
    let file = TempFile::new(65_536);
    let input = file.open(DirectMode::Off);
    let before = leak_stats();
    for submitted in [0, 4] {
        let tail = AtomicU64::new(0);
        let mut memory = filled(65_536, 0);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        for i in 0..submitted {
            stream.submit_read_to_gpu(&input, i * 4096, i as usize, 4096).unwrap();
        }
        stream.flush_submissions().unwrap();
        stream.close(Duration::ZERO).unwrap();
    }
    assert_eq!(leak_stats(), before);
}

#[test]
fn strict_and_unregistered_exclude_each_other() {
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let options = StreamOptions { strict: true, unregistered: true, ..StreamOptions::default() };
    let refused = AsyncUringStream::with_options(ring!(), memory.share(), &tail, options);
    assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
}

/// The count of system calls is that of system calls, those for room in a small queue included.
#[cfg(feature = "testing")]
#[test]
fn system_calls_are_counted_as_they_are_made() {
    use ringest::testing::{end_fault_plan, plan_fault};
    let file = TempFile::new(65_536);
    let input = file.open(DirectMode::Off);
    let tail = AtomicU64::new(0);
    let mut memory = filled(65_536, 0);
    let options = StreamOptions { depth: 32, ..StreamOptions::default() };
    let ring = ring!(RingOptions { entries: 2, ..RingOptions::default() });
    let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, options).unwrap();
    plan_fault(0, 0);
    for i in 0..32u64 {
        stream.submit_read_to_gpu_at(&input, i * 2048, i as usize * 2048, 2048).unwrap();
    }
    stream.wait_for_completion(32, Some(LONG)).unwrap();
    let calls = end_fault_plan().iter().filter(|&&call| call == "io_uring_enter").count();
    assert!(calls > 1);
    assert_eq!(stream.stats().enters, calls as u64);
}
