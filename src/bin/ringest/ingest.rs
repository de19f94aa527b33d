//! `ringest ingest`: files through one stream into a bounded buffer, with a consumer that follows the tail.

use crate::consumer::{Acknowledged, Consumer, Patience};
use crate::measure::Watch;
use crate::progress::Progress;
use crate::report::{self, Failure, FileReport, Outcome, Summary, parse_size};
use clap::ValueEnum;
use ringest::{
    AsyncUringStream, Completion, DirectMode, FileRef, GpuMappedBuffer, InputFile, IoUringState, MappedBuffer,
    PipelineError, RingOptions, SqPoll, StreamOptions, StreamStats, TailLine,
};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Most memory for the buffer: enough to keep any drive busy.
const BUFFER_LIMIT: u64 = 256 << 20;

/// A wait for completions ends at least this often, so that the progress display moves and a dead consumer is noticed.
const LOOK_UP: Duration = Duration::from_millis(250);

/// System calls in a row that may fail for want of resources before the ingest gives up.
const STRIKES: u32 = 10_000;

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
    /// Bytes per read, with an optional suffix K, M or G; 512 to 128M.
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = parse_chunk)]
    chunk: u64,
    /// Reads in flight.
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

/// At most half the buffer, so that reading and consuming overlap.
fn parse_chunk(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        chunk @ 512..=0x0800_0000 => Ok(chunk),
        _ => Err("use 512 to 128M".to_owned()),
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
struct Planned<'a> {
    path: &'a Path,
    len: u64,
    direct: bool,
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
        Ok(Planned { path, len: file.len(), direct: file.direct().is_some() })
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
    let plan = plan(files, how.direct.into())?;
    let mut summary = transfer(&plan, how)?;
    if verify {
        for file in &mut summary.files {
            verify_file(file)?;
        }
    }
    Ok(summary)
}

/// Slots of the buffer: two reads' worth per place in flight, within the limit, and no more than there are reads.
fn slot_count(plan: &[Planned<'_>], how: &How) -> usize {
    let reads: u64 = plan.iter().map(|file| file.len.div_ceil(how.chunk)).sum();
    (u64::from(how.depth) * 2).min(BUFFER_LIMIT / how.chunk).min(reads).max(1) as usize
}

fn ring_options(how: &How) -> RingOptions {
    let sqpoll = how.sqpoll.then_some(SqPoll { idle_ms: 0, cpu: None });
    RingOptions { entries: how.depth, sqpoll, ..RingOptions::default() }
}

/// Runs producer and consumer to their end.
fn transfer(plan: &[Planned<'_>], how: &How) -> Outcome<Summary> {
    let began = Instant::now();
    let slots = slot_count(plan, how);
    let mut memory = MappedBuffer::<u8>::alloc(slots * how.chunk as usize)?;
    let line = TailLine::alloc()?;
    let mut ring = IoUringState::new(ring_options(how))?;
    let features = ring.features();
    // As many entries as slots: see `Producer::open`.
    let files_refusal = ring.register_files_sparse(slots as u32).err();
    let options = StreamOptions { depth: how.depth, ..StreamOptions::default() };
    let stream = AsyncUringStream::with_options(ring, memory.share(), line.clone(), options)?;
    let buffer_refusal = stream.registration_refusal().cloned();

    let acknowledged = Acknowledged::default();
    let lens: Vec<u64> = plan.iter().map(|file| file.len).collect();
    let consumer = Consumer {
        line,
        slots: split(&mut memory, slots, how.chunk as usize)?,
        acknowledged: &acknowledged,
        chunk: how.chunk as usize,
        files: &lens,
    };
    let setup_seconds = began.elapsed().as_secs_f64();
    let watch = Watch::start();
    let (stats, sums) = std::thread::scope(|scope| {
        let consumer = scope.spawn(move || consumer.run());
        let producer = Producer {
            stream,
            plan,
            chunk: how.chunk,
            slots: slots as u64,
            mode: how.direct.into(),
            files_registered: files_refusal.is_none(),
            opened: 0,
            acknowledged: &acknowledged,
            consumer_gone: || consumer.is_finished(),
            progress: Progress::new(lens.iter().sum(), how.json),
            strikes: 0,
        };
        // However it ends, the stream is closed then: the tail line says END or ABORTED and the consumer ends too.
        let produced = producer.run();
        let consumed = consumer.join().map_err(|_| Failure("internal error: the consumer panicked".to_owned()))?;
        // The consumer's own failure first: the producer's is then that the consumer is gone.
        let sums = consumed?;
        Ok::<_, Failure>((produced?, sums))
    })?;
    let elapsed = watch.stop();
    let files = reports(plan, &stats, &sums)?;
    Ok(Summary {
        files,
        elapsed,
        setup_seconds,
        stats,
        features,
        chunk: how.chunk,
        depth: how.depth,
        slots,
        buffer_refusal,
        files_refusal,
    })
}

/// A handle to each slot, for the consumer.
fn split(memory: &mut MappedBuffer<u8>, slots: usize, chunk: usize) -> Outcome<Vec<GpuMappedBuffer<'static>>> {
    let parts = (0..slots).map(|slot| memory.share().sub_region(slot * chunk, chunk));
    Ok(parts.collect::<Result<_, _>>()?)
}

/// Fewer bytes or sums than planned are never a success, whatever the reason.
fn reports(plan: &[Planned<'_>], stats: &StreamStats, sums: &[u32]) -> Outcome<Vec<FileReport>> {
    let expected: u64 = plan.iter().map(|file| file.len).sum();
    if stats.bytes != expected || sums.len() != plan.len() {
        let (read, done, all) = (stats.bytes, sums.len(), plan.len());
        return Err(Failure(format!("{read} of {expected} bytes were read, {done} of {all} files were consumed")));
    }
    let report = |(file, &crc32c): (&Planned<'_>, &u32)| FileReport {
        path: file.path.to_owned(),
        bytes: file.len,
        crc32c,
        direct: (file.len > 0).then_some(file.direct),
        verified: false,
    };
    Ok(plan.iter().zip(sums).map(report).collect())
}

/// Keeps the stream full while the consumer leaves room.
struct Producer<'a, F> {
    stream: AsyncUringStream<'static>,
    plan: &'a [Planned<'a>],
    chunk: u64,
    slots: u64,
    mode: DirectMode,
    files_registered: bool,
    /// Files opened so far: those with bytes.
    opened: u64,
    acknowledged: &'a Acknowledged,
    consumer_gone: F,
    progress: Progress,
    strikes: u32,
}

impl<F: Fn() -> bool> Producer<'_, F> {
    fn run(mut self) -> Outcome<StreamStats> {
        for index in 0..self.plan.len() {
            if self.plan[index].len > 0 {
                self.file(index)?;
            }
        }
        self.stream.finish()?;
        self.drive_until(|this| this.acknowledged.sequences() == this.stream.submitted())?;
        Ok(self.stream.close(StreamOptions::default().close_timeout)?.stats)
    }

    /// Submits every read of one file. The last of them are still in flight when the next file begins.
    fn file(&mut self, index: usize) -> Outcome<()> {
        let Planned { path, len, .. } = self.plan[index];
        self.make_room()?;
        let source = self.open(path)?;
        let mut offset = 0;
        while offset < len {
            self.make_room()?;
            let slot = self.stream.submitted() % self.slots;
            let bytes = self.chunk.min(len - offset);
            let place = (slot * self.chunk) as usize;
            self.stream
                .submit_read_to_gpu_at_with_user_data(source.clone(), offset, place, bytes as usize, index as u64)
                .map_err(|error| Failure::at(path, error))?;
            offset += bytes;
        }
        Ok(())
    }

    /// Opens a file and registers it with the ring, which keeps it open.
    ///
    /// The table has as many entries as the buffer has slots, and there is a free slot: with at least one read per
    /// file, the reads of the file that had this entry before have been acknowledged. Without a table the reads keep
    /// the file open; one at a time then, for it is RLIMIT_NOFILE that forbade the table.
    fn open(&mut self, path: &Path) -> Outcome<FileRef> {
        if !self.files_registered {
            self.drive_until(|this| this.stream.inflight() == 0)?;
            return Ok(FileRef::from(&InputFile::open(path, self.mode)?));
        }
        let file = InputFile::open(path, self.mode)?;
        let entry = (self.opened % self.slots) as u32;
        self.opened += 1;
        self.stream.ring_mut()?.update_file(entry, Some(file.as_fd().as_raw_fd()))?;
        Ok(self.stream.registered_file(entry)?)
    }

    /// Waits for a place in flight and a slot that the consumer is done with.
    fn make_room(&mut self) -> Outcome<()> {
        self.drive_until(|this| {
            let unacknowledged = this.stream.submitted() - this.acknowledged.sequences();
            unacknowledged < this.slots && this.stream.inflight() < this.stream.depth()
        })
    }

    fn drive_until(&mut self, done: impl Fn(&Self) -> bool) -> Outcome<()> {
        let mut patience = Patience::default();
        while !done(self) {
            // In this order: a consumer that finished its work has acknowledged all of it.
            let gone = (self.consumer_gone)();
            if self.stream.inflight() > 0 {
                self.reap()?;
            } else if gone && !done(self) {
                return Err(Failure("internal error: the consumer ended before the data did".to_owned()));
            } else {
                patience.wait();
            }
            self.progress.at(self.acknowledged.bytes());
        }
        Ok(())
    }

    /// Waits for completions and looks at each.
    fn reap(&mut self) -> Outcome<()> {
        let waited = self.stream.wait_for_completion(1, Some(LOOK_UP));
        self.tolerate(waited.map(drop))?;
        let mut completions = [Completion::default(); 64];
        let taken = match self.stream.poll_into(&mut completions) {
            Ok(taken) => taken,
            Err(error) => return self.tolerate(Err(error)),
        };
        for completion in &completions[..taken] {
            self.strikes = 0;
            completion.result().map_err(|error| self.read_failure(completion, error))?;
        }
        Ok(())
    }

    /// A timeout is a look-up; a kernel that is short of resources may have them soon.
    fn tolerate(&mut self, driven: ringest::Result<()>) -> Outcome<()> {
        match driven {
            Err(PipelineError::TimedOut { .. }) | Ok(()) => Ok(()),
            Err(error) if matches!(error.errno(), libc::EAGAIN | libc::EBUSY) && self.strikes < STRIKES => {
                self.strikes += 1;
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn read_failure(&self, completion: &Completion, error: PipelineError) -> Failure {
        let Planned { path, len, .. } = self.plan[completion.user_data as usize];
        match error {
            PipelineError::EndOfFile { file_offset, bytes, .. } => {
                let end = file_offset + bytes;
                Failure::at(path, format!("the file was truncated: it ended at offset {end}, of {len} bytes planned"))
            }
            error => Failure::at(path, error),
        }
    }
}

/// Reads a file once more, in the plainest way, and compares.
fn verify_file(report: &mut FileReport) -> Outcome<()> {
    let (bytes, crc32c) =
        plain_crc(&report.path, report.bytes).map_err(|error| Failure::at(&report.path, format!("verify: {error}")))?;
    if bytes != report.bytes || crc32c != report.crc32c {
        let what = format!(
            "verify: plain reads give {bytes} bytes with CRC32C {crc32c:08x}, the stream {} bytes with {:08x}",
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
