//! What a run costs, and what several runs say together. Shared with `benches/read.rs`.

use std::time::Instant;

/// Bytes in a GiB, for rates.
pub(crate) const GIB: f64 = (1u64 << 30) as f64;

/// Wall and CPU time of a stretch of work.
pub(crate) struct Watch {
    wall: Instant,
    cpu: f64,
}

/// What a [`Watch`] saw, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Elapsed {
    pub(crate) wall: f64,
    pub(crate) cpu: f64,
}

impl Watch {
    pub(crate) fn start() -> Self {
        // The wall clock last: asking for the CPU time is not part of the work.
        let cpu = cpu_seconds();
        Self { wall: Instant::now(), cpu }
    }

    pub(crate) fn stop(&self) -> Elapsed {
        let wall = self.wall.elapsed().as_secs_f64();
        Elapsed { wall, cpu: cpu_seconds() - self.cpu }
    }
}

/// User and system time of the process so far, its io_uring workers included (they are threads of the process).
fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a valid place for the result, and all-zero bytes are a valid `rusage`.
    let usage = unsafe {
        // Fails only for bad arguments; the zeros then say that nothing is known.
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Median and range.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else { return Self::default() };
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
        Self { median, min, max }
    }
}

/// xorshift64*: repeatable numbers that neither compress nor deduplicate.
pub(crate) struct XorShift(u64);

impl XorShift {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, evenly spread.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes()[..word.len()]);
        }
    }
}
