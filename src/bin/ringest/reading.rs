//! The measured loop: a stream kept full, nothing else. Shared with `benches/read.rs`.

use crate::measure::{Elapsed, Watch, XorShift};
use ringest::{
    AsyncUringStream, Completion, InputFile, IoUringState, MappedBuffer, PipelineError, RingOptions, StreamOptions,
};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Order in which blocks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Sequential,
    /// Independent draws, as fio's `norandommap`: a block may come twice.
    Random,
}

/// Most reads in a run: their offsets are listed beforehand, 8 bytes each.
const MAX_READS: u64 = 1 << 27;

/// Most memory for the reads in flight: it is pinned.
const MAX_MEMORY: u64 = 4 << 30;

/// Which reads a run makes: the same for every program that is compared.
pub(crate) struct Reads {
    pub(crate) offsets: Vec<u64>,
    pub(crate) block: usize,
    pub(crate) depth: usize,
    /// Whole blocks of the file, in bytes.
    pub(crate) span: u64,
}

impl Reads {
    /// `size` bytes in whole blocks. A sequential run goes on from the file's start when it has reached its end.
    pub(crate) fn plan(order: Order, file: u64, block: usize, depth: usize, size: u64) -> Result<Self, String> {
        let (blocks, count) = (file / block as u64, size / block as u64);
        if blocks == 0 || count == 0 {
            return Err(format!("no whole block of {block} bytes in {}", file.min(size)));
        }
        if count > MAX_READS {
            return Err(format!("{count} reads in a run: use at most {MAX_READS} (larger blocks, or a smaller size)"));
        }
        if block as u64 * depth as u64 > MAX_MEMORY {
            return Err(format!("{depth} blocks of {block} bytes: use at most {MAX_MEMORY} bytes of memory"));
        }
        let mut random = XorShift::new(0x5eed_0f7e_57ed_b10c);
        let at = |index| match order {
            Order::Sequential => index % blocks,
            Order::Random => random.below(blocks),
        };
        let offsets = (0..count).map(at).map(|index| index * block as u64).collect();
        Ok(Self { offsets, block, depth, span: blocks * block as u64 })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.offsets.len() as u64 * self.block as u64
    }

    /// Memory for the reads in flight: one slot each.
    pub(crate) fn memory(&self) -> ringest::Result<MappedBuffer<u8>> {
        MappedBuffer::alloc(self.block * self.depth)
    }
}

/// What one run took.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Run {
    pub(crate) elapsed: Elapsed,
    pub(crate) bytes: u64,
    pub(crate) reads: u64,
    pub(crate) system_calls: u64,
    /// Every byte went through registered memory.
    pub(crate) registered: bool,
}

/// Reads everything once through a fresh stream. Set-up and registration are not timed.
pub(crate) fn with_stream(
    file: &InputFile,
    memory: &mut MappedBuffer<u8>,
    reads: &Reads,
) -> Result<Run, PipelineError> {
    let mut ring = IoUringState::new(RingOptions { entries: reads.depth as u32, ..RingOptions::default() })?;
    ring.register_files(&[file.as_fd().as_raw_fd()])?;
    let tail = AtomicU64::new(0);
    let options = StreamOptions { depth: reads.depth as u32, ..StreamOptions::default() };
    let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, options)?;
    let watch = Watch::start();
    drive(&mut stream, reads)?;
    let elapsed = watch.stop();
    let stats = stream.close(Duration::from_secs(10))?.stats;
    Ok(Run {
        elapsed,
        bytes: stats.bytes,
        reads: stats.completed,
        system_calls: stats.enters,
        registered: stats.plain_bytes == 0,
    })
}

/// A new read goes into the slot of each that has completed.
fn drive(stream: &mut AsyncUringStream<'_>, reads: &Reads) -> Result<(), PipelineError> {
    let mut completions = vec![Completion::default(); reads.depth];
    let mut free: Vec<usize> = (0..reads.depth).rev().collect();
    let mut offsets = reads.offsets.iter().copied().peekable();
    loop {
        while let (Some(&slot), Some(&offset)) = (free.last(), offsets.peek()) {
            match stream.submit_read_to_gpu_fixed_file(0, offset, slot * reads.block, reads.block, slot as u64) {
                Ok(_) => {}
                // The window is full behind a late read: it must complete first.
                Err(PipelineError::QueueFull { .. }) if stream.inflight() > 0 => break,
                Err(error) => return Err(error),
            }
            free.pop();
            offsets.next();
        }
        if stream.inflight() == 0 && offsets.peek().is_none() {
            return Ok(());
        }
        stream.wait_for_completion(1, None)?;
        let taken = stream.poll_into(&mut completions)?;
        for completion in &completions[..taken] {
            completion.result()?;
            free.push(completion.user_data as usize);
        }
    }
}

/// Reads the file through the page cache so that later reads hit it.
pub(crate) fn warm(path: &Path) -> std::io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    let mut block = vec![0; 1 << 20];
    while file.read(&mut block)? > 0 {}
    Ok(())
}
