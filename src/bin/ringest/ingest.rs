//! `ringest ingest`: files through a driver into an io_queue, and consumer threads, or a kernel on a GPU, that empty it.

use crate::consumer;
use crate::gpu::{self, Running};
use crate::measure::Watch;
use crate::producer::{Produced, Producer};
use crate::progress::Progress;
use crate::report::{self, Failure, FileReport, Outcome, Summary, parse_size};
use crate::sums::Sums;
use clap::ValueEnum;
use ringest::wire::ConsumeMode;
use ringest::{
    DirectMode, DriverOptions, Gpu, InputFile, IoQueue, IoQueueConsumer, IoQueueOptions, IoUringState,
    NvmeGpuIngestDriver, RingOptions, SqPoll,
};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Most memory for slots, unless their number is given: enough to keep any drive busy.
const BUFFER_LIMIT: u64 = 256 << 20;

/// Most memory for slots in any case: it is pinned.
const MEMORY_LIMIT: u64 = 4 << 30;

/// Options of `ringest ingest`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Files or block devices, read in this order.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Read each file again with plain reads afterwards and compare the CRC32C.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    how: How,
}

/// How files are read: what `ingest` and `demo` share.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct How {
    /// Slots, a power of two from 2 to 65536. By default two for each read in flight, in at most 256 MiB, and no more than
    /// there are reads.
    #[arg(long, value_name = "N", value_parser = parse_slots)]
    slots: Option<u32>,
    /// Bytes that a slot takes, and of each read, with an optional suffix K, M or G; 512 to 1G.
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = parse_slot_bytes)]
    slot_bytes: u64,
    /// Consumer threads, or blocks on a GPU. By default one thread, or 32 blocks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    consumers: Option<u32>,
    /// Consume on this GPU, by a kernel that runs from before the first read to the end; its sums are compared with those
    /// of plain reads afterwards. On a machine without a GPU threads do it, and the report says why.
    #[arg(long, value_name = "N")]
    gpu: Option<u32>,
    /// How they share the slots; by default single for one consumer, claimed for more.
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Most reads in flight; never more than there are slots.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    depth: u32,
    /// Read around the page cache (O_DIRECT).
    #[arg(long, value_enum, default_value_t = Direct::Auto)]
    direct: Direct,
    /// Let a kernel thread submit.
    #[arg(long)]
    sqpoll: bool,
    /// Print one JSON object on stdout, and no progress.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `ConsumeMode`, for the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// One consumer takes every slot.
    Single,
    /// Consumer i of C takes slot i of every C.
    Partitioned,
    /// Whoever is free takes the next slot.
    Claimed,
    /// Every consumer takes every slot.
    Broadcast,
}

impl From<Mode> for ConsumeMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Single => Self::Single,
            Mode::Partitioned => Self::Partitioned,
            Mode::Claimed => Self::Claimed,
            Mode::Broadcast => Self::Broadcast,
        }
    }
}

/// `DirectMode`, for the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direct {
    /// Where the file system has it.
    Auto,
    /// Or fail.
    On,
    /// Through the page cache.
    Off,
}

impl From<Direct> for DirectMode {
    fn from(direct: Direct) -> Self {
        match direct {
            Direct::Auto => Self::Auto,
            Direct::On => Self::On,
            Direct::Off => Self::Off,
        }
    }
}

fn parse_slots(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(slots @ 2..=65_536u32) if slots.is_power_of_two() => Ok(slots),
        _ => Err("use a power of two from 2 to 65536".to_owned()),
    }
}

fn parse_slot_bytes(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        bytes @ 512..=0x4000_0000 => Ok(bytes),
        _ => Err("use 512 to 1G".to_owned()),
    }
}

impl How {
    /// How consumers share the slots, unless it cannot be.
    pub(crate) fn mode(&self) -> Outcome<ConsumeMode> {
        let consumers = self.consumers.unwrap_or(1);
        match self.mode {
            Some(Mode::Single) if consumers > 1 => {
                let what = "consumers and --mode single: use another mode, or one consumer";
                Err(Failure(format!("{consumers} {what}")))
            }
            Some(Mode::Broadcast) if self.gpu.is_some() => {
                Err(Failure("--gpu and --mode broadcast: use another mode".to_owned()))
            }
            Some(mode) => Ok(mode.into()),
            None if consumers > 1 => Ok(ConsumeMode::Claimed),
            None => Ok(ConsumeMode::Single),
        }
    }

    /// The same, and how many consumers: where a GPU has them, many unless told otherwise.
    fn sharing(&self, gpu: Option<&Gpu>) -> Outcome<(ConsumeMode, u32)> {
        let Some(gpu) = gpu else { return Ok((self.mode()?, self.consumers.unwrap_or(1))) };
        let all = gpu.attributes().multiprocessors.max(1);
        Ok(match (self.mode, self.consumers) {
            (Some(Mode::Single), None) => (ConsumeMode::Single, 1),
            (None, None) => (ConsumeMode::Claimed, gpu::BLOCKS.min(all)),
            (Some(Mode::Partitioned), Some(consumers)) if consumers > all => {
                // A block that has no place to run would be waited for.
                return Err(Failure(format!("{consumers} partitions on {all} multiprocessors: use at most {all}")));
            }
            (_, consumers) => (self.mode()?, consumers.unwrap_or(gpu::BLOCKS.min(all))),
        })
    }

    fn queue_options(&self, plan: &[Planned<'_>], gpu: Option<&Gpu>) -> Outcome<IoQueueOptions> {
        let (mode, consumers) = self.sharing(gpu)?;
        let options = IoQueueOptions {
            slots: self.slots.unwrap_or_else(|| self.default_slots(plan)),
            slot_bytes: self.slot_bytes as u32,
            // The largest block that O_DIRECT reads whole, or a page.
            alignment: plan.iter().map(|file| file.block).fold(4096, u32::max).min(2 << 20),
            mode,
            consumers,
            ..IoQueueOptions::default()
        };
        let bytes = options.layout()?.slots;
        if bytes > MEMORY_LIMIT {
            let (slots, each, most) = (options.slots, report::size(self.slot_bytes), report::size(MEMORY_LIMIT));
            return Err(Failure(format!("{slots} slots of {each}: use at most {most} of memory")));
        }
        Ok(options)
    }

    /// Twice the reads in flight, so that reading and consuming overlap.
    fn default_slots(&self, plan: &[Planned<'_>]) -> u32 {
        let reads: u64 = plan.iter().map(|file| file.len.div_ceil(self.slot_bytes)).sum();
        let wanted = (u64::from(self.depth) * 2).min(reads).next_power_of_two();
        let fit = 1 << (BUFFER_LIMIT / self.slot_bytes).max(1).ilog2();
        wanted.min(fit).max(2) as u32
    }

    fn ring_options(&self, depth: u32) -> RingOptions {
        let sqpoll = self.sqpoll.then_some(SqPoll { idle_ms: 0, cpu: None });
        RingOptions { entries: depth, sqpoll, ..RingOptions::default() }
    }
}

/// `ringest ingest`.
pub(crate) fn run(args: &Args) -> Outcome<()> {
    let summary = ingest(&args.files, &args.how, args.verify)?;
    match args.how.json {
        true => report::print(&format!("{}\n", summary.json())),
        false => report::print(&summary.text()),
    }
}

/// A file as it was when the ingest began.
pub(crate) struct Planned<'a> {
    pub(crate) path: &'a Path,
    pub(crate) len: u64,
    direct: bool,
    /// Block size of O_DIRECT, 0 without.
    block: u32,
}

/// Looks at every file before the first is read: a bad name costs no time then. They are opened again, one by one,
/// when their turn comes, so their number is not bound by RLIMIT_NOFILE. What a file grows by meanwhile is not read.
fn plan(files: &[PathBuf], mode: DirectMode) -> Outcome<Vec<Planned<'_>>> {
    let look = |path| {
        let file = InputFile::open(path, mode)?;
        if file.is_empty() && has_data(path) {
            let what = "it has data but no size, as files in /proc do: it cannot be read by offset";
            return Err(Failure::at(path, what));
        }
        let direct = file.direct();
        let block = direct.map_or(0, |direct| direct.offset.max(direct.memory));
        Ok(Planned { path, len: file.len(), direct: direct.is_some(), block })
    };
    files.iter().map(|path| look(path.as_path())).collect()
}

/// Whether a file that says it is empty is not. Asked without waiting: some files in /proc give data some day.
fn has_data(path: &Path) -> bool {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.and_then(|mut file| file.read(&mut [0])).is_ok_and(|bytes| bytes > 0)
}

/// Reads `files` and returns what happened.
pub(crate) fn ingest(files: &[PathBuf], how: &How, verify: bool) -> Outcome<Summary> {
    how.mode()?;
    let plan = plan(files, how.direct.into())?;
    let mut summary = transfer(&plan, how)?;
    if verify || summary.gpu.is_some() {
        for file in &mut summary.files {
            verify_file(file)?;
        }
    }
    Ok(summary)
}

/// Runs producer and consumers to their end.
fn transfer(plan: &[Planned<'_>], how: &How) -> Outcome<Summary> {
    let began = Instant::now();
    let (loaded, gpu_refusal) = match how.gpu.map(gpu::open).transpose()? {
        Some(Ok(loaded)) => (Some(loaded), None),
        Some(Err(reason)) => (None, Some(reason)),
        None => (None, None),
    };
    let gpu = loaded.as_ref().map(|loaded| &loaded.gpu);
    let queue_options = how.queue_options(plan, gpu)?;
    let queue = match gpu {
        Some(gpu) => IoQueue::on_gpu(queue_options, gpu)?,
        None => IoQueue::new(queue_options)?,
    };
    let depth = how.depth.min(queue.slots());
    let ring = IoUringState::new(how.ring_options(depth))?;
    let features = ring.features();
    // With requests in line for a slot, the driver waits for consumers, and this thread need not.
    let options = DriverOptions { depth, queue_limit: depth, ..DriverOptions::default() };
    let driver = NvmeGpuIngestDriver::new(ring, Arc::clone(&queue), options)?;
    let buffer_refusal = driver.registration_refusal().cloned();
    let threads = if loaded.is_some() { 0 } else { queue.consumers() };
    let consumers = (0..threads).map(|index| queue.consumer(index)).collect::<Result<Vec<_>, _>>()?;
    let sums = ledgers(plan.len(), &queue);
    let sequences = plan.iter().map(|file| file.len.div_ceil(how.slot_bytes)).sum();
    let kernel = loaded.as_ref().map(|loaded| Running::start(loaded, &queue, sequences)).transpose()?;

    let total = plan.iter().map(|file| file.len).sum();
    let setup_seconds = began.elapsed().as_secs_f64();
    let watch = Watch::start();
    let (produced, mut unfinished) = std::thread::scope(|scope| {
        let spawn = |(index, consumer): (usize, IoQueueConsumer)| {
            let sums = &sums[index % sums.len()];
            scope.spawn(move || consumer::run(consumer, sums))
        };
        let consumers: Vec<_> = consumers.into_iter().enumerate().map(spawn).collect();
        let watcher = kernel.as_ref().map(|kernel| scope.spawn(|| kernel.watch()));
        let progress = Progress::new(total, how.json);
        let producer = Producer { driver, plan, mode: how.direct.into(), progress, bytes: 0, strikes: 0 };
        let produced = producer.run();
        let mut unfinished = false;
        for consumer in consumers {
            let consumed = consumer.join().map_err(|_| Failure("internal error: a consumer panicked".to_owned()))?;
            // A consumer's own failure first: the producer's is then that the consumer gave up.
            let consumed = consumed.map_err(|what| Failure(format!("internal error: {what}")))?;
            unfinished |= !consumed.end || consumed.poisoned > 0;
        }
        if watcher.is_some_and(|watcher| watcher.join().is_err()) {
            return Err(Failure("internal error: the kernel's watcher panicked".to_owned()));
        }
        Ok((produced, unfinished))
    })?;
    let elapsed = watch.stop();
    if let Some(kernel) = kernel {
        let consumed = kernel.finish(&sums[0])?;
        unfinished |= !consumed.end || consumed.poisoned > 0;
    }
    let produced = produced?;
    if unfinished {
        return Err(Failure("internal error: a consumer missed what the driver says it published".to_owned()));
    }
    let files = reports(plan, &produced, sums)?;
    let Produced { telemetry, stream } = produced;
    Ok(Summary {
        files,
        elapsed,
        setup_seconds,
        telemetry,
        stream,
        features,
        queue: queue_options,
        depth,
        buffer_refusal,
        gpu: gpu.cloned(),
        gpu_refusal,
    })
}

/// Where consumers put their sums: one place for all, or one for each where each takes everything.
fn ledgers(files: usize, queue: &IoQueue) -> Vec<Mutex<Sums>> {
    let count = if queue.mode() == ConsumeMode::Broadcast { queue.consumers() } else { 1 };
    (0..count).map(|_| Mutex::new(Sums::new(files, queue.slot_bytes().into()))).collect()
}

/// Fewer bytes or sums than planned are never a success, whatever the reason.
fn reports(plan: &[Planned<'_>], produced: &Produced, sums: Vec<Mutex<Sums>>) -> Outcome<Vec<FileReport>> {
    let expected: u64 = plan.iter().map(|file| file.len).sum();
    let read = produced.telemetry.completed.bytes;
    if read != expected {
        return Err(Failure(format!("{read} of {expected} bytes were read")));
    }
    let mut found = Vec::new();
    for sums in sums {
        let sums = sums.into_inner().map_err(|_| Failure("internal error: a consumer panicked".to_owned()))?;
        found.push(sums.finish(plan.iter().map(|file| file.len))?);
    }
    if found.windows(2).any(|pair| pair[0] != pair[1]) {
        return Err(Failure("internal error: consumers of the same slots found different bytes".to_owned()));
    }
    let report = |(file, crc32c): (&Planned<'_>, u32)| FileReport {
        path: file.path.to_owned(),
        bytes: file.len,
        crc32c,
        direct: (file.len > 0).then_some(file.direct),
        verified: false,
    };
    Ok(plan.iter().zip(found.into_iter().next().unwrap_or_default()).map(report).collect())
}

/// Reads a file once more, in the plainest way, and compares.
fn verify_file(report: &mut FileReport) -> Outcome<()> {
    let (bytes, crc32c) =
        plain_crc(&report.path, report.bytes).map_err(|error| Failure::at(&report.path, format!("verify: {error}")))?;
    if bytes != report.bytes || crc32c != report.crc32c {
        let what = format!(
            "verify: plain reads give {bytes} bytes with CRC32C {crc32c:08x}, the consumers {} bytes with {:08x}",
            report.bytes, report.crc32c
        );
        return Err(Failure::at(&report.path, what));
    }
    report.verified = true;
    Ok(())
}

/// Length and CRC32C of the first `limit` bytes.
fn plain_crc(path: &Path, limit: u64) -> std::io::Result<(u64, u32)> {
    let mut file = File::open(path)?.take(limit);
    let mut block = vec![0; 1 << 20];
    let (mut bytes, mut crc) = (0, 0);
    loop {
        match file.read(&mut block) {
            Ok(0) => return Ok((bytes, crc)),
            Ok(count) => {
                crc = crc32c::crc32c_append(crc, &block[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
