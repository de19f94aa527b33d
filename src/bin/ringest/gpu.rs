//! The consumers on a GPU: a persistent kernel (kernel.cu), started before the first read, and what it found.

use crate::consumer::Consumed;
use crate::report::{Failure, Outcome};
use crate::sums::Sums;
use ringest::gpu::{GpuModule, GpuStream, KernelParameters};
use ringest::{Gpu, IoQueue, MappedBuffer, wire};
use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const PTX: &str = concat!(include_str!("kernel.ptx"), "\0");
const KERNEL: &CStr = c"ringest_consume";

/// Threads of a block: what the kernel is compiled for.
pub(crate) const THREADS: u32 = 512;

/// Blocks, unless their number is given: enough for all that a GPU can read from the host's memory.
pub(crate) const BLOCKS: u32 = 32;

/// So long the kernel waits for a slot before it gives up: whatever happens to this process, the GPU is free again then.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at the kernel.
const LOOK_UP: Duration = Duration::from_micros(200);

/// Most memory for records: it is pinned.
const RECORDS_LIMIT: u64 = 1 << 30;

/// What the kernel says of a sequence: `record` in kernel.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Record {
    tag: u64,
    file_offset: u64,
    bytes: u32,
    crc32c: u32,
    status: i32,
    written: u32,
}

/// What a block says when it ends: `ending` in kernel.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Ending {
    slots: u64,
    bytes: u64,
    outcome: u32,
    error: i32,
}

const RECORD_WORDS: usize = size_of::<Record>() / 8;
const ENDING_WORDS: usize = size_of::<Ending>() / 8;

/// A GPU with the kernel loaded.
pub(crate) struct Loaded {
    pub(crate) gpu: Gpu,
    module: GpuModule,
    stream: GpuStream,
}

/// Opens a GPU. `Err` in the inner result: there is none, and why.
pub(crate) fn open(ordinal: u32) -> Outcome<Result<Loaded, String>> {
    let gpu = match Gpu::open(ordinal) {
        Err(error) if error.errno() == libc::EOPNOTSUPP => return Ok(Err(error.to_string())),
        gpu => gpu?,
    };
    let ptx = CStr::from_bytes_with_nul(PTX.as_bytes()).map_err(|error| Failure(format!("internal error: {error}")))?;
    let module = GpuModule::from_ptx(&gpu, ptx)?;
    let stream = GpuStream::new(&gpu)?;
    Ok(Ok(Loaded { gpu, module, stream }))
}

/// A kernel that runs. Dropping it waits for its end, for which the queue has to have ended, or been aborted, or else
/// the kernel's patience.
pub(crate) struct Running<'a> {
    loaded: &'a Loaded,
    queue: &'a IoQueue,
    records: MappedBuffer<u64>,
    endings: MappedBuffer<u64>,
    ended: bool,
}

impl<'a> Running<'a> {
    /// Starts the kernel: a block for each of the queue's consumers, with a place for so many sequences.
    pub(crate) fn start(loaded: &'a Loaded, queue: &'a IoQueue, sequences: u64) -> Outcome<Self> {
        let bytes = sequences.saturating_mul(size_of::<Record>() as u64);
        if bytes > RECORDS_LIMIT {
            return Err(Failure(format!("{sequences} slots for a GPU to report: use larger ones (--slot-bytes)")));
        }
        let (gpu, blocks) = (&loaded.gpu, queue.consumers());
        // Everything is allocated before the kernel runs: the driver may wait for it otherwise.
        let records = MappedBuffer::<u64>::alloc_on(gpu, (sequences.max(1) as usize) * RECORD_WORDS)?;
        let endings = MappedBuffer::<u64>::alloc_on(gpu, blocks as usize * ENDING_WORDS)?;
        let parameters = KernelParameters::new()
            .with(queue.view_on(gpu)?)
            .with(records.as_device_ptr())
            .with(sequences)
            .with(endings.as_device_ptr())
            .with(PATIENCE.as_nanos() as u64);
        let mut running = Self { loaded, queue, records, endings, ended: true };
        // SAFETY: these are the kernel's parameters; `running` holds their memory, and the caller the queue's and the
        // module, until the kernel has ended; nobody reads records and endings before.
        let launched = unsafe { loaded.module.launch(KERNEL, &loaded.stream, blocks, THREADS, parameters) };
        if let Err(error) = launched {
            queue.consumers_stopped();
            return Err(error.into());
        }
        running.ended = false;
        Ok(running)
    }

    /// Waits for the kernel's end. If it fails before the queue has ended, the producer is told: nobody would release
    /// slots any more.
    pub(crate) fn watch(&self) {
        loop {
            match self.loaded.stream.is_done() {
                Ok(false) => std::thread::sleep(LOOK_UP),
                Ok(true) => {
                    // END is what the producer said last; anything else is the kernel's own decision.
                    if self.endings().any(|ending| ending.outcome != wire::Outcome::End as u32) {
                        self.queue.abort(libc::ECANCELED);
                    }
                    return;
                }
                Err(_) => {
                    self.queue.abort(libc::EIO);
                    return;
                }
            }
        }
    }

    /// What the blocks said. Only when the kernel has ended.
    fn endings(&self) -> impl Iterator<Item = Ending> {
        let base = self.endings.as_host_ptr().cast::<Ending>();
        // SAFETY: the memory holds one for each block, zero or written by the kernel, which has ended.
        (0..self.queue.consumers() as usize).map(move |block| unsafe { base.add(block).read() })
    }

    /// The kernel's sums, by file, once it has ended. What the blocks did together, as one consumer.
    pub(crate) fn finish(mut self, sums: &Mutex<Sums>) -> Outcome<Consumed> {
        let waited = self.wait();
        let name = &self.loaded.gpu.attributes().name;
        waited.map_err(|error| Failure(format!("the kernel on the GPU ({name}) failed: {error}")))?;
        let mut consumed = Consumed { end: true, ..Consumed::default() };
        for (block, ending) in self.endings().enumerate() {
            consumed.slots += ending.slots;
            if ending.outcome == wire::Outcome::Timeout as u32 {
                return Err(Failure(format!("block {block} of the kernel had no slot for {PATIENCE:?}, and gave up")));
            }
            if matches!(-ending.error, libc::EPROTO | libc::ESTALE) {
                return Err(Failure(format!("internal error: block {block}: the io_queue's words make no sense")));
            }
            consumed.end &= ending.outcome == wire::Outcome::End as u32;
        }
        let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
        let places = self.records.len() / RECORD_WORDS;
        let base = self.records.as_host_ptr().cast::<Record>();
        for place in 0..places {
            // SAFETY: the memory holds one for each place, zero or written by the kernel, which has ended.
            let Record { tag, file_offset, bytes, crc32c, status, written } = unsafe { base.add(place).read() };
            if written == 0 {
                continue;
            }
            if status != 0 {
                consumed.poisoned += 1;
            } else if !sums.add(tag, file_offset, bytes.into(), crc32c) {
                let what = format!("slot {place}: {bytes} bytes at offset {file_offset} of file {tag} are not wanted");
                return Err(Failure(format!("internal error: {what}")));
            }
        }
        Ok(consumed)
    }

    fn wait(&mut self) -> ringest::Result<()> {
        let waited = self.loaded.stream.synchronize();
        self.ended = true;
        self.queue.consumers_stopped();
        waited
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.queue.abort(libc::ECANCELED);
            let _ = self.wait();
        }
    }
}
