//! What a stream costs in memory: nothing per request, and little at all.

mod common;

use common::*;
use ringest::{
    AsyncUringStream, Completion, DirectMode, DriverOptions, FileRef, IngestCompletion, IngestRequest, InputFile,
    IoQueue, IoQueueOptions, NvmeGpuIngestDriver, StreamOptions,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::AtomicU64;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Counts the allocations of each thread.
struct Counting;

fn count() {
    // Gone only while the thread ends.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: hands everything to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(body: impl FnOnce()) -> u64 {
    let before = COUNT.with(Cell::get);
    body();
    COUNT.with(Cell::get) - before
}

/// Reads at full depth, `rounds` times.
fn drive(stream: &mut AsyncUringStream<'_>, source: &FileRef, rounds: u64, ragged: usize) {
    let mut out = [Completion::default(); 64];
    for round in 0..rounds {
        for chunk in 0..64 {
            let offset = chunk as u64 * 4096 + ragged as u64 * (round % 7);
            stream.submit_read_to_gpu_at(source.clone(), offset, chunk * 8192 + ragged, 4096).unwrap();
        }
        stream.wait_for_completion(64, Some(LONG)).unwrap();
        assert_eq!(stream.poll_into(&mut out).unwrap(), 64);
        assert!(out.iter().all(|completion| completion.status == 0));
    }
}

/// (name, source, ragged) for every kind of contiguous read.
fn sources(stream: &mut AsyncUringStream<'_>, file: &TempFile) -> Vec<(&'static str, FileRef, usize)> {
    let buffered = file.open(DirectMode::Off);
    let direct = InputFile::open(file.path(), DirectMode::On).ok();
    let mut fds = vec![buffered.as_fd().as_raw_fd()];
    fds.extend(direct.iter().map(|direct| direct.as_fd().as_raw_fd()));
    stream.ring_mut().unwrap().register_files(&fds).unwrap();
    let mut sources = vec![
        ("buffered", FileRef::from(&buffered), 0),
        ("buffered, registered file", stream.registered_file(0).unwrap(), 0),
    ];
    if let Some(direct) = &direct {
        sources.push(("direct", direct.into(), 0));
        sources.push(("direct, registered file", stream.registered_file(1).unwrap(), 0));
        sources.push(("direct, unaligned", direct.into(), 5));
    }
    sources
}

#[test]
fn nothing_is_allocated_per_request() {
    let file = TempFile::new(300_000);
    for unregistered in [false, true] {
        let tail = AtomicU64::new(0);
        let mut memory = filled(65 * 8192, 0);
        let options = StreamOptions { unregistered, ..StreamOptions::default() };
        let mut stream = AsyncUringStream::with_options(ring!(), memory.share(), &tail, options).unwrap();
        for (name, source, ragged) in sources(&mut stream, &file) {
            drive(&mut stream, &source, 3, ragged);
            let count = allocations(|| drive(&mut stream, &source, 50, ragged));
            assert_eq!(count, 0, "{name}, unregistered: {unregistered}: {count} allocations in 3200 requests");
        }
        let source = Pipe::new();
        // Reads that wait, one after the other, by polling.
        let mut one = || {
            stream.submit_read_to_gpu_at(source.fd(), 0, 0, 8).unwrap();
            stream.poll().unwrap();
            source.feed(0, 8);
            while stream.poll().unwrap() == 0 {}
        };
        one();
        let feed = allocations(|| source.feed(0, 8));
        let mut sink = [0; 8];
        // SAFETY: reads what was just written.
        assert_eq!(unsafe { libc::read(source.fd(), sink.as_mut_ptr().cast(), 8) }, 8);
        assert_eq!(allocations(|| (0..100).for_each(|_| one())), 100 * feed);
    }
}

#[test]
fn nothing_is_allocated_per_scatter_read() {
    let file = TempFile::new(300_000);
    let input = file.open(DirectMode::Off);
    let tail = AtomicU64::new(0);
    let mut memory = filled(1 << 20, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    let ranges: Vec<_> = (0..200).map(|i| (i * 5000, 1000)).collect();
    let mut one = || {
        stream.submit_read_to_gpu_scatter(&input, 0, &ranges, 0).unwrap();
        stream.wait_for_completion(1, Some(LONG)).unwrap();
        assert_eq!(stream.poll().unwrap(), 1);
    };
    (0..300).for_each(|_| one());
    let count = allocations(|| (0..100).for_each(|_| one()));
    assert_eq!(count, 0, "in 100 scatter reads");
}

/// Through a driver: submit, read, publish, pop, release, with requests that wait for a slot.
#[test]
fn nothing_is_allocated_per_slot() {
    let file = TempFile::new(300_000);
    let options = IoQueueOptions { slots: 16, slot_bytes: 4096, ..IoQueueOptions::default() };
    let queue = IoQueue::new(options).unwrap();
    let mut consumer = queue.consumer(0).unwrap();
    let options = DriverOptions { queue_limit: 16, crc32c: true, ..DriverOptions::default() };
    let mut driver = NvmeGpuIngestDriver::new(ring!(), queue, options).unwrap();
    let inputs = [file.open(DirectMode::Off), file.open(DirectMode::Auto)];
    let mut out = [IngestCompletion::default(); 16];
    let mut rounds = |rounds: u64| {
        for round in 0..rounds {
            let mut popped = 0;
            for tag in 0..32u64 {
                let offset = (round * 32 + tag) * 117 % 290_000;
                let timeout = (tag % 4 == 0).then_some(LONG);
                let input = &inputs[tag as usize % 2];
                driver.submit(IngestRequest { timeout, ..IngestRequest::new(input, offset, 4096, tag) }).unwrap();
            }
            while popped < 32 {
                driver.wait(1, Some(LONG)).unwrap();
                driver.poll_completions_into(&mut out).unwrap();
                while let Ok(slot) = consumer.try_pop() {
                    assert_eq!(slot.status(), 0);
                    consumer.release(slot).unwrap();
                    popped += 1;
                }
            }
            while driver.poll_completions_into(&mut out).unwrap() > 0 {}
        }
    };
    rounds(3);
    assert_eq!(allocations(|| rounds(50)), 0, "in 1600 requests");
}

#[test]
fn a_stream_of_depth_64_stays_within_64_kib() {
    let file = TempFile::new(300_000);
    let tail = AtomicU64::new(0);
    let mut memory = filled(65 * 8192, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    assert_eq!(stream.depth(), 64);
    let fresh = stream.footprint();
    let mut seen = vec![("fresh", fresh)];
    for (name, source, ragged) in sources(&mut stream, &file) {
        drive(&mut stream, &source, 10, ragged);
        seen.push((name, stream.footprint()));
    }
    println!("footprint: {seen:?}");
    assert!(seen.iter().all(|&(_, bytes)| bytes <= 64 << 10), "{seen:?}");
}

/// Deep unaligned scatter reads cost what their lists need, once, and no more however long it goes on.
#[test]
fn bookkeeping_does_not_grow_with_use() {
    let file = TempFile::new(300_000);
    let tail = AtomicU64::new(0);
    let mut memory = filled(1 << 20, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    let inputs = [file.open(DirectMode::Off), file.open(DirectMode::Auto)];
    let round = |stream: &mut AsyncUringStream<'_>| {
        for i in 0..32usize {
            let base = i * 32_768;
            let ranges = [(base, 1000), (base + 2000, 512), (base + 5001, 3000)];
            stream.submit_read_to_gpu_scatter(&inputs[i % 2], i as u64 * 3, &ranges, 0).unwrap();
            stream.submit_read_to_gpu_at(&inputs[(i + 1) % 2], 400_000, base + 9000, 100).unwrap();
        }
        for completion in take(stream, 64) {
            if completion.status != 0 {
                stream.skip(completion.sequence).unwrap();
            }
        }
    };
    (0..50).for_each(|_| round(&mut stream));
    let settled = stream.footprint();
    (0..300).for_each(|_| round(&mut stream));
    // A queue's peak may come late; 19,200 submissions that each left something behind would show.
    assert!(stream.footprint() <= settled + 4096, "{settled} became {}", stream.footprint());
}
