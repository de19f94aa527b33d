//! What the driver and its io_queue add to the stream below them.
//!
//! ```sh
//! cargo bench --bench queue -- [--dir DIR] [--pairs 9] [--quick] [--keep]
//! ```
//!
//! Each result is a line that begins with `figure: `.
//!
//! **Throughput.** The same reads of a file in the page cache, once by the stream alone and once by the driver, whose slots
//! a consumer pops and releases. Both run in one process and take turns at going first; they share file descriptor, ring
//! options, depth and the very slots they read into, which they fill in the same order; set-up is not timed. Ratios are
//! taken within a pair. The consumer runs on a thread of its own (which needs a second core: the reads are copies and
//! keep one busy), or on the driver's.
//!
//! **Publish cost.** On one thread: all slots reserved and published, then all popped and released, no reads. The clock is
//! looked at between the two, not for each slot.
//!
//! **Submit to publish.** One read at a time: submit, wait, take the record. When the record is there, the slot is
//! published, so a driver's read minus a stream's is what reserving a slot, keeping its record and publishing it cost;
//! minus the same read through a bare ring, it is all that the layers cost. The record's own latency, from submit to
//! publication, minus the bare ring's time from submit to completion, is what a consumer waits beyond that. The three
//! alternate in batches of one round of slots, a few dozen microseconds, so that whatever else the machine does falls on
//! all; consumers empty the slots between batches, untimed. Batches with 0 bytes, which need no system call, show the
//! bookkeeping alone.

use clap::Parser;
use io_uring::{IoUring, opcode, types};
use measure::{Spread, XorShift};
use ringest::{
    AsyncUringStream, Completion, DirectMode, DriverOptions, FileRef, IngestCompletion, IngestRequest, InputFile,
    IoQueue, IoQueueConsumer, IoQueueMemory, IoQueueOptions, IoUringState, MappedBuffer, MappedOptions,
    NvmeGpuIngestDriver, PipelineError, RingOptions, SlotData, StreamOptions, wire,
};
use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

#[path = "../src/bin/ringest/measure.rs"]
#[allow(dead_code, reason = "shared with programs that measure more")]
mod measure;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Measure what the driver and its io_queue add to the stream.
#[derive(Debug, Parser)]
struct Args {
    /// Where the test file is made (or found); Cargo's directory for temporary files by default.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Pairs of runs per case.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// One pair with a small file: does it run at all?
    #[arg(long)]
    quick: bool,
    /// Throughput alone, and only of cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Keep the test file.
    #[arg(long)]
    keep: bool,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

const DEPTH: u32 = 32;
/// Two for each read in flight, so that reading and consuming overlap.
const SLOTS: u32 = 2 * DEPTH;

/// Who empties the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// A thread that pops and releases.
    Thread,
    /// A thread that computes each payload's CRC32C, too.
    Checksum,
    /// The driver's thread, between two waits.
    Driver,
}

struct Case {
    name: &'static str,
    block: u32,
    who: Who,
    goal: Option<f64>,
}

const CASES: [Case; 4] = [
    Case { name: "1 MiB slots, a thread pops and releases", block: 1 << 20, who: Who::Thread, goal: Some(0.95) },
    Case { name: "1 MiB slots, a thread checksums", block: 1 << 20, who: Who::Checksum, goal: None },
    Case { name: "4 KiB slots, a thread pops and releases", block: 4096, who: Who::Thread, goal: Some(0.9) },
    Case { name: "4 KiB slots, the driver's thread does", block: 4096, who: Who::Driver, goal: None },
];

fn main() -> Outcome<()> {
    let args = Args::parse();
    let dir = args.dir.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    std::fs::create_dir_all(&dir)?;
    let bytes: u64 = if args.quick { 32 << 20 } else { 512 << 20 };
    let path = dir.join(format!("ringest-queue-{}m.bin", bytes >> 20));
    create(&path, bytes)?;
    let measured = measure(&path, &args);
    if !args.keep {
        std::fs::remove_file(&path)?;
    }
    measured
}

fn measure(path: &Path, args: &Args) -> Outcome<()> {
    let (pairs, batches) = if args.quick { (1, 20) } else { (args.pairs, 2000) };
    let cores = std::thread::available_parallelism()?;
    println!("{}, page cache: {pairs} pairs, {SLOTS} slots, depth {DEPTH}, {cores} cores", path.display());
    if cores.get() < 3 {
        println!(
            "no core is left beside the driver's and the consumer's: whatever else runs here slows one of them down"
        );
    }
    let file = InputFile::open(path, DirectMode::Off)?;
    let wanted = |case: &&Case| args.only.as_ref().is_none_or(|text| case.name.contains(text));
    for case in CASES.iter().filter(wanted) {
        throughput(&file, case, pairs)?;
    }
    if args.only.is_some() {
        return Ok(());
    }
    publish_cost(batches)?;
    submit_to_publish(&file, 4096, batches)?;
    submit_to_publish(&file, 0, batches)
}

/// Makes the file unless one of this size is there, and reads it into the page cache.
fn create(path: &Path, bytes: u64) -> Outcome<()> {
    let mut block = vec![0; 1 << 20];
    if !std::fs::metadata(path).is_ok_and(|file| file.len() == bytes) {
        let mut file = std::fs::File::create(path)?;
        let mut random = XorShift::new(1);
        for _ in 0..bytes >> 20 {
            random.fill(&mut block);
            file.write_all(&block)?;
        }
        file.sync_all()?;
    }
    let mut file = std::fs::File::open(path)?;
    while file.read(&mut block)? > 0 {}
    Ok(())
}

/// The parts of an io_queue, for one queue after the other; the stream reads into the same slots.
struct Parts {
    options: IoQueueOptions,
    stride: usize,
    control: MappedBuffer<u8>,
    credit: MappedBuffer<u8>,
    device: MappedBuffer<u8>,
    slots: MappedBuffer<u8>,
}

impl Parts {
    fn new(slot_bytes: u32) -> Outcome<Self> {
        let options = IoQueueOptions { slots: SLOTS, slot_bytes, ..IoQueueOptions::default() };
        let layout = options.layout()?;
        let slots = MappedOptions {
            alignment: options.alignment as usize,
            huge_pages: options.huge_pages,
            ..MappedOptions::default()
        };
        Ok(Self {
            options,
            stride: layout.slot_stride as usize,
            control: MappedBuffer::alloc(layout.control as usize)?,
            credit: MappedBuffer::alloc(layout.credit as usize)?,
            device: MappedBuffer::alloc(layout.device as usize)?,
            slots: MappedBuffer::alloc_with(layout.slots as usize, slots)?,
        })
    }

    fn queue(&mut self) -> Outcome<Arc<IoQueue>> {
        let memory = IoQueueMemory {
            control: self.control.share(),
            credit: self.credit.share(),
            device: self.device.share(),
            slots: self.slots.share(),
        };
        // SAFETY: the last queue in this memory, its consumer and the last stream are gone: each run drops its own.
        Ok(unsafe { IoQueue::in_memory(self.options, memory) }?)
    }
}

fn ring(file: &InputFile, depth: u32) -> ringest::Result<IoUringState> {
    let mut ring = IoUringState::new(RingOptions { entries: depth, ..RingOptions::default() })?;
    ring.register_files(&[file.as_fd().as_raw_fd()])?;
    Ok(ring)
}

fn stream<'a>(file: &InputFile, parts: &mut Parts, depth: u32, tail: &'a AtomicU64) -> Outcome<AsyncUringStream<'a>> {
    let options = StreamOptions { depth, ..StreamOptions::default() };
    Ok(AsyncUringStream::with_options(ring(file, depth)?, parts.slots.share(), tail, options)?)
}

fn driver(file: &InputFile, queue: &Arc<IoQueue>, depth: u32, queue_limit: u32) -> Outcome<NvmeGpuIngestDriver> {
    let options = DriverOptions { depth, queue_limit, ..DriverOptions::default() };
    Ok(NvmeGpuIngestDriver::new(ring(file, depth)?, Arc::clone(queue), options)?)
}

/// The file, block by block.
struct Blocks {
    block: u32,
    count: u64,
}

impl Blocks {
    fn of(file: &InputFile, block: u32) -> Self {
        Self { block, count: file.len() / u64::from(block) }
    }

    fn offset(&self, index: u64) -> u64 {
        index * u64::from(self.block)
    }
}

fn slot(index: u64) -> usize {
    (index % u64::from(SLOTS)) as usize
}

// Throughput

fn throughput(file: &InputFile, case: &Case, pairs: u32) -> Outcome<()> {
    let mut parts = Parts::new(case.block)?;
    let blocks = Blocks::of(file, case.block);
    // Unmeasured: the first runs fault the memory in.
    by_stream(file, &mut parts, &blocks)?;
    by_driver(file, &mut parts, &blocks, case.who)?;
    let (mut alone, mut queued) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        if pair % 2 == 0 {
            alone.push(by_stream(file, &mut parts, &blocks)?);
            queued.push(by_driver(file, &mut parts, &blocks, case.who)?);
        } else {
            queued.push(by_driver(file, &mut parts, &blocks, case.who)?);
            alone.push(by_stream(file, &mut parts, &blocks)?);
        }
    }
    let ratio = Spread::of(alone.iter().zip(&queued).map(|(alone, queued)| alone / queued));
    let reads = |seconds: &[f64]| blocks.count as f64 / Spread::of(seconds.iter().copied()).median;
    let rate = |seconds: &[f64]| match case.block {
        4096 => format!("{:.0} reads/s", reads(seconds)),
        block => format!("{:.2} GB/s", reads(seconds) * f64::from(block) / 1e9),
    };
    let goal = case.goal.map(|goal| format!(", goal >= {goal}")).unwrap_or_default();
    println!(
        "figure: {}: driver/stream {:.3} ({:.3}..{:.3}){goal}; driver {}, stream {}",
        case.name,
        ratio.median,
        ratio.min,
        ratio.max,
        rate(&queued),
        rate(&alone)
    );
    Ok(())
}

/// Seconds that the stream takes for all blocks.
fn by_stream(file: &InputFile, parts: &mut Parts, blocks: &Blocks) -> Outcome<f64> {
    let tail = AtomicU64::new(0);
    let mut stream = stream(file, parts, DEPTH, &tail)?;
    let mut completions = [Completion::default(); DEPTH as usize];
    let mut busy = [false; SLOTS as usize];
    let mut next = 0;
    let start = Instant::now();
    loop {
        while next < blocks.count && stream.inflight() < DEPTH as usize && !busy[slot(next)] {
            let (offset, place) = (blocks.offset(next), slot(next) * parts.stride);
            stream.submit_read_to_gpu_fixed_file(0, offset, place, blocks.block as usize, next)?;
            busy[slot(next)] = true;
            next += 1;
        }
        if next == blocks.count && stream.inflight() == 0 {
            break;
        }
        stream.wait_for_completion(1, None)?;
        let taken = stream.poll_into(&mut completions)?;
        for completion in &completions[..taken] {
            completion.result()?;
            busy[slot(completion.user_data)] = false;
        }
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds that driver and consumer take for all blocks.
fn by_driver(file: &InputFile, parts: &mut Parts, blocks: &Blocks, who: Who) -> Outcome<f64> {
    let queue = parts.queue()?;
    let consumer = queue.consumer(0)?;
    // With requests in line for a slot, the driver waits for the consumer rather than its caller.
    let mut driver = driver(file, &queue, DEPTH, DEPTH)?;
    if who == Who::Driver {
        let mut consumer = consumer;
        let start = Instant::now();
        let mut popped = 0;
        drive(&mut driver, blocks, || popped += pop_all(&mut consumer))?;
        popped += pop_all(&mut consumer);
        let elapsed = start.elapsed().as_secs_f64();
        return if popped == blocks.count { Ok(elapsed) } else { Err("slots were lost".into()) };
    }
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        let consuming = scope.spawn(|| {
            ready.wait();
            consume(consumer, who)
        });
        ready.wait();
        let start = Instant::now();
        let driven = drive(&mut driver, blocks, || {});
        if driven.is_err() {
            queue.abort(libc::ECANCELED);
        }
        let popped = consuming.join().map_err(|_| "the consumer panicked")?;
        let elapsed = start.elapsed().as_secs_f64();
        driven?;
        if popped == blocks.count { Ok(elapsed) } else { Err("slots were lost".into()) }
    })
}

/// Submits a read of every block and sees each end; `between` runs whenever records were taken.
fn drive(driver: &mut NvmeGpuIngestDriver, blocks: &Blocks, mut between: impl FnMut()) -> Outcome<()> {
    let file = driver.registered_file(0)?;
    let mut records = [IngestCompletion::default(); DEPTH as usize];
    let (mut next, mut ended) = (0, 0);
    while ended < blocks.count {
        let rest = (next..blocks.count)
            .map(|index| IngestRequest::new(file.clone(), blocks.offset(index), blocks.block, index));
        match driver.submit_batch(rest) {
            Ok(accepted) => next += accepted as u64,
            Err(PipelineError::QueueFull { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let taken = driver.wait_into(&mut records, 1, None)?;
        for record in &records[..taken] {
            record.result()?;
        }
        ended += taken as u64;
        between();
    }
    Ok(driver.finish()?)
}

fn pop_all(consumer: &mut IoQueueConsumer) -> u64 {
    let mut popped = 0;
    while let Ok(slot) = consumer.try_pop() {
        if consumer.release(slot).is_ok() {
            popped += 1;
        }
    }
    popped
}

/// Pops until the queue has ended; how many slots.
fn consume(mut consumer: IoQueueConsumer, who: Who) -> u64 {
    let mut popped = 0;
    loop {
        match consumer.wait_pop(Duration::from_secs(1)) {
            Ok(slot) => {
                if who == Who::Checksum {
                    std::hint::black_box(crc32c::crc32c(consumer.payload(&slot)));
                }
                popped += u64::from(consumer.release(slot).is_ok());
            }
            Err(wire::Outcome::Timeout) => {}
            Err(_) => return popped,
        }
    }
}

// Publish cost

fn publish_cost(rounds: u32) -> Outcome<()> {
    let queue = Parts::new(4096)?.queue()?;
    let mut consumer = queue.consumer(0)?;
    let (mut publish, mut pop) = (Vec::new(), Vec::new());
    for round in 0..rounds * 10 {
        let start = Instant::now();
        for index in 0..SLOTS {
            let data = SlotData { bytes: 4096, tag: index.into(), ..SlotData::default() };
            queue.reserve()?.publish(&data)?;
        }
        let published = Instant::now();
        let popped = pop_all(&mut consumer);
        let end = Instant::now();
        if popped != SLOTS.into() {
            return Err(format!("round {round}: {popped} slots were popped").into());
        }
        publish.push(per_slot(published - start));
        pop.push(per_slot(end - published));
    }
    let both: Vec<f64> = publish.iter().zip(&pop).map(|(publish, pop)| publish + pop).collect();
    figure("one thread, reserve + publish", &mut publish, ", goal <= 100");
    figure("one thread, pop + release", &mut pop, "");
    figure("one thread, all four", &mut both.clone(), "");
    Ok(())
}

fn per_slot(time: Duration) -> f64 {
    time.as_nanos() as f64 / f64::from(SLOTS)
}

/// Median and the middle nine tenths: what lies beyond is the machine's.
fn figure(name: &str, nanoseconds: &mut [f64], goal: &str) {
    nanoseconds.sort_by(f64::total_cmp);
    let at = |part: f64| nanoseconds[((nanoseconds.len() - 1) as f64 * part) as usize];
    println!("figure: {name}: p50 {:.0} ns a slot (p5 {:.0}, p95 {:.0}){goal}", at(0.5), at(0.05), at(0.95));
}

// Submit to publish

fn submit_to_publish(file: &InputFile, bytes: u32, batches: u32) -> Outcome<()> {
    let (mut parts, mut queue_parts) = (Parts::new(4096)?, Parts::new(4096)?);
    let tail = AtomicU64::new(0);
    let mut stream = stream(file, &mut parts, 1, &tail)?;
    let queue = queue_parts.queue()?;
    let mut consumer = queue.consumer(0)?;
    let mut driver = driver(file, &queue, 1, 0)?;
    let registered = driver.registered_file(0)?;
    let mut bare = Bare::new(file, 4096)?;
    let (mut by_driver, mut by_stream, mut by_bare) = (Vec::new(), Vec::new(), Vec::new());
    let mut latencies = Vec::new();
    for batch in 0..batches {
        let first = u64::from(batch) * u64::from(SLOTS) % (file.len() / 4096 - u64::from(SLOTS));
        for turn in 0..3 {
            match (batch + turn) % 3 {
                0 => {
                    let mut latency = 0.0;
                    by_driver.push(time(|| {
                        latency = driver_batch(&mut driver, &registered, first, bytes)?;
                        Ok(())
                    })?);
                    latencies.push(latency);
                }
                1 => by_stream.push(time(|| stream_batch(&mut stream, parts.stride, first, bytes))?),
                _ if bytes > 0 => by_bare.push(time(|| bare.batch(first, bytes))?),
                _ => {}
            }
        }
        if pop_all(&mut consumer) != SLOTS.into() {
            return Err("slots were lost".into());
        }
    }
    let by_latency = std::mem::take(&mut latencies);
    let over_cqe = by_latency.iter().zip(&by_bare).map(|(own, other)| own - other).collect::<Vec<_>>();
    let over = |other: &[f64]| by_driver.iter().zip(other).map(|(own, other)| own - other).collect::<Vec<_>>();
    let (over_stream, over_bare) = (over(&by_stream), over(&by_bare));
    let what = if bytes == 0 { "0 bytes".to_owned() } else { format!("{bytes} bytes in the page cache") };
    for (name, mut times, goal) in [
        ("submit to publish - bare ring's submit to completion", over_cqe, ", goal <= 300"),
        ("driver - stream", over_stream, ""),
        ("driver - bare ring", over_bare, ""),
        ("driver", by_driver, ""),
        ("stream", by_stream, ""),
        ("bare ring", by_bare, ""),
    ] {
        if !times.is_empty() {
            figure(&format!("one read at a time, {what}, {name}"), &mut times, goal);
        }
    }
    Ok(())
}

fn time(batch: impl FnOnce() -> Outcome<()>) -> Outcome<f64> {
    let start = Instant::now();
    batch()?;
    Ok(per_slot(start.elapsed()))
}

/// Returns the mean of the records' latencies, in nanoseconds.
fn driver_batch(driver: &mut NvmeGpuIngestDriver, file: &FileRef, first: u64, bytes: u32) -> Outcome<f64> {
    let mut sum = Duration::ZERO;
    let mut record = [IngestCompletion::default()];
    for index in 0..u64::from(SLOTS) {
        driver.submit(IngestRequest::new(file.clone(), (first + index) * 4096, bytes, index))?;
        if driver.wait_into(&mut record, 1, None)? != 1 {
            return Err("no record".into());
        }
        record[0].result()?;
        sum += record[0].latency;
    }
    Ok(per_slot(sum))
}

fn stream_batch(stream: &mut AsyncUringStream<'_>, stride: usize, first: u64, bytes: u32) -> Outcome<()> {
    let mut record = [Completion::default()];
    for index in 0..u64::from(SLOTS) {
        let (offset, place) = ((first + index) * 4096, slot(index) * stride);
        stream.submit_read_to_gpu_fixed_file(0, offset, place, bytes as usize, index)?;
        stream.wait_for_completion(1, None)?;
        if stream.poll_into(&mut record)? != 1 {
            return Err("no record".into());
        }
        record[0].result()?;
    }
    Ok(())
}

/// The least code that makes the same reads, for what a completion costs by itself.
struct Bare {
    // Before the memory: fields are dropped in this order, and the ring's end ends its reads.
    ring: IoUring,
    memory: MappedBuffer<u8>,
    stride: usize,
}

impl Bare {
    fn new(file: &InputFile, slot_bytes: u32) -> Outcome<Self> {
        let Parts { slots: mut memory, stride, .. } = Parts::new(slot_bytes)?;
        let ring: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(1)?;
        let whole = libc::iovec { iov_base: memory.as_host_ptr_mut().cast(), iov_len: memory.len() };
        // SAFETY: the memory outlives the ring, and nobody looks at its contents.
        unsafe { ring.submitter().register_buffers(&[whole])? };
        ring.submitter().register_files(&[file.as_fd().as_raw_fd()])?;
        Ok(Self { ring, memory, stride })
    }

    fn batch(&mut self, first: u64, bytes: u32) -> Outcome<()> {
        let base = self.memory.as_host_ptr_mut();
        for index in 0..u64::from(SLOTS) {
            let address = base.wrapping_add(slot(index) * self.stride);
            let entry =
                opcode::ReadFixed::new(types::Fixed(0), address, bytes, 0).offset((first + index) * 4096).build();
            // SAFETY: the slot lies in the registered memory, and holds `bytes`.
            unsafe { self.ring.submission().push(&entry)? };
            self.ring.submit_and_wait(1)?;
            let result = self.ring.completion().next().map(|completion| completion.result());
            if result != Some(bytes as i32) {
                return Err(format!("a bare read gave {result:?}").into());
            }
        }
        Ok(())
    }
}
