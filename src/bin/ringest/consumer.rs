//! The other side of the tail: a thread that learns of data by the tail line alone, as a kernel on a GPU would.

use crate::report::{Failure, Outcome};
use ringest::wire::{TailLineWords, state};
use ringest::{GpuMappedBuffer, TailLine};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Looks at the tail before a sleep: data usually arrives within microseconds.
const SPINS: u32 = 2000;

/// Then a core is not worth the wait.
const NAP: Duration = Duration::from_micros(50);

/// Waits in ever less eager steps: first spinning, then short sleeps.
#[derive(Default)]
pub(crate) struct Patience(u32);

impl Patience {
    pub(crate) fn wait(&mut self) {
        if self.0 < SPINS {
            self.0 += 1;
            std::hint::spin_loop();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

/// What the consumer tells the producer.
#[derive(Default)]
pub(crate) struct Acknowledged {
    /// Sequences, from the first on, that the consumer is done with: their slots may be overwritten.
    sequences: AtomicU64,
    /// The bytes in them, for the progress display.
    bytes: AtomicU64,
}

impl Acknowledged {
    /// Acquire: the consumer's last look at the slots happens before what the producer does with them next.
    pub(crate) fn sequences(&self) -> u64 {
        self.sequences.load(Ordering::Acquire)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn advance(&self, bytes: u64) {
        // One writer, so plain loads and stores do. Release: see `sequences`.
        self.bytes.store(self.bytes() + bytes, Ordering::Relaxed);
        self.sequences.store(self.sequences.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}

/// What the consumer needs.
pub(crate) struct Consumer<'a> {
    pub(crate) line: TailLine,
    /// Sequence n lives in `slots[n % slots.len()]`. Only the consumer looks into them, only the stream writes.
    pub(crate) slots: Vec<GpuMappedBuffer<'static>>,
    pub(crate) acknowledged: &'a Acknowledged,
    pub(crate) chunk: usize,
    /// Bytes of each file, in order of reading.
    pub(crate) files: &'a [u64],
}

impl Consumer<'_> {
    /// CRC32C of every file, or of those that were whole before the stream gave up.
    pub(crate) fn run(self) -> Outcome<Vec<u32>> {
        let mut sums = Vec::with_capacity(self.files.len());
        let mut sequence = 0;
        let mut seen = 0;
        for &len in self.files {
            let mut crc = 0;
            let mut rest = len;
            while rest > 0 {
                if sequence == seen {
                    match wait_beyond(self.line.words(), sequence) {
                        Some(tail) => seen = tail,
                        None => return Ok(sums),
                    }
                }
                let bytes = rest.min(self.chunk as u64);
                crc = crc32c::crc32c_append(crc, self.look(sequence, bytes as usize)?);
                self.acknowledged.advance(bytes);
                sequence += 1;
                rest -= bytes;
            }
            sums.push(crc);
        }
        Ok(sums)
    }

    /// The bytes of a sequence that the tail covers and that is not yet acknowledged.
    fn look(&self, sequence: u64, len: usize) -> Outcome<&[u8]> {
        let slot = &self.slots[(sequence % self.slots.len() as u64) as usize];
        // SAFETY: the tail, loaded by acquire, covers the sequence: its read has ended. The producer submits the next
        // read into this slot only after `advance`, which `run` calls when the slice is no longer used. Nobody else
        // writes to the slot.
        let bytes = unsafe { slot.as_slice() }?;
        bytes.get(..len).ok_or_else(|| Failure(format!("internal error: {len} bytes in a slot of {}", bytes.len())))
    }
}

/// Waits for the tail to pass `sequence` and returns it; `None` when it never will: the submission failed (nothing is
/// resubmitted here), or the stream ended before it.
fn wait_beyond(line: &TailLineWords, sequence: u64) -> Option<u64> {
    let mut patience = Patience::default();
    loop {
        let tail = line.tail.load(Ordering::Acquire);
        // After the tail: a tail that has passed a bad submission announces no data for it.
        let bad = line.first_bad.load(Ordering::Acquire);
        if tail.min(bad) > sequence {
            return Some(tail.min(bad));
        }
        let over = match line.state.load(Ordering::Acquire) {
            state::OPEN => false,
            state::END => line.end.load(Ordering::Relaxed) <= sequence,
            _ => true,
        };
        if over || bad <= sequence {
            return None;
        }
        patience.wait();
    }
}
