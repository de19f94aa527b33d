//! What a driver counts.

use crate::uring::ReadPath;
use std::time::Duration;

/// Values of [`ReadPath`] that there is room for.
pub(crate) const PATHS: usize = 8;

/// Reads and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReadCount {
    /// Reads.
    pub reads: u64,
    /// Bytes.
    pub bytes: u64,
}

impl ReadCount {
    pub(super) fn add(&mut self, bytes: u64) {
        self.reads += 1;
        self.bytes += bytes;
    }
}

/// How long reads took from submit to publication.
///
/// Quantiles are at most 1/16 above the real value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LatencySummary {
    /// Reads.
    pub count: u64,
    /// Half were faster.
    pub p50: Duration,
    /// 99 of 100 were faster.
    pub p99: Duration,
    /// 999 of 1000 were faster.
    pub p999: Duration,
    /// The slowest.
    pub max: Duration,
}

/// What a driver has done since it was made, or since
/// [`reset_telemetry`](super::NvmeGpuIngestDriver::reset_telemetry); gauges are marked "now".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NvmeGpuIngestTelemetry {
    /// Requests accepted.
    pub submitted: ReadCount,
    /// Requests that ended whole.
    pub completed: ReadCount,
    /// Of these, by the path that was really taken; see [`path`](Self::path).
    pub paths: [ReadCount; PATHS],
    /// Bytes that went through the bounce buffer, those of requests that failed in the end included.
    pub bounce_bytes: u64,
    /// Commands that read less than asked and were continued.
    pub short_reads: u64,
    /// Commands repeated after EINTR or EAGAIN.
    pub retries: u64,
    /// Requests that did not end whole, for whatever reason.
    pub failed: u64,
    /// Of these, at the end of the file.
    pub end_of_file: u64,
    /// Of these, cancelled.
    pub cancelled: u64,
    /// Of these, at their deadline.
    pub timed_out: u64,
    /// Slots published, poisoned ones included.
    pub published_slots: u64,
    /// Of these, poisoned.
    pub poisoned_slots: u64,
    /// Of these, before their read had ended.
    pub early_poisoned_slots: u64,
    /// Slots poisoned early whose read has still not ended, now.
    pub held_slots: u64,
    /// Reads that the kernel never gave back when the driver was closed; their memory was leaked.
    pub leaked_reads: u64,
    /// Times a request found no free slot.
    pub credit_stalls: u64,
    /// Time from such a moment to the driver's next look that finds one free (or the queue aborted), summed up; a stall
    /// that goes on included.
    pub credit_stall_time: Duration,
    /// Requests with a slot that have not ended, now.
    pub in_flight: u64,
    /// Most of them at a time.
    pub max_in_flight: u64,
    /// Requests waiting for a slot, now.
    pub queued: u64,
    /// Most of them at a time.
    pub max_queued: u64,
    /// From submit to publication, of requests that ended whole.
    pub latency: LatencySummary,
}

impl NvmeGpuIngestTelemetry {
    /// What came this way.
    #[must_use]
    pub fn path(&self, path: ReadPath) -> ReadCount {
        self.paths.get(path as usize).copied().unwrap_or_default()
    }
}

/// Sixteenths: how finely each power of two is divided.
const SUB_BITS: u32 = 4;
const BUCKETS: usize = ((64 - SUB_BITS as usize) + 1) << SUB_BITS;

/// Counts of durations in buckets that are 1/16 of their value wide.
#[derive(Debug)]
pub(crate) struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    count: u64,
    max: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { counts: Box::new([0; BUCKETS]), count: 0, max: 0 }
    }

    fn bucket(nanoseconds: u64) -> usize {
        let exponent = (nanoseconds | ((1 << SUB_BITS) - 1)).ilog2();
        if exponent < SUB_BITS {
            return nanoseconds as usize;
        }
        let shift = exponent - SUB_BITS;
        (((shift + 1) as usize) << SUB_BITS) + ((nanoseconds >> shift) as usize & ((1 << SUB_BITS) - 1))
    }

    /// The largest value of a bucket.
    fn highest(bucket: usize) -> u64 {
        let Some(shift) = (bucket >> SUB_BITS).checked_sub(1) else { return bucket as u64 };
        let sub = (bucket & ((1 << SUB_BITS) - 1)) as u64 + (1 << SUB_BITS);
        (sub << shift) + ((1u64 << shift) - 1)
    }

    #[inline]
    pub(crate) fn record(&mut self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[Self::bucket(nanoseconds)] += 1;
        self.count += 1;
        self.max = self.max.max(nanoseconds);
    }

    pub(crate) fn clear(&mut self) {
        self.counts.fill(0);
        (self.count, self.max) = (0, 0);
    }

    /// The value that `per_mille` of 1000 do not exceed.
    fn quantile(&self, per_mille: u64) -> Duration {
        let rank = (u128::from(self.count) * u128::from(per_mille)).div_ceil(1000) as u64;
        let mut seen = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank && count > 0 {
                return Duration::from_nanos(Self::highest(bucket).min(self.max));
            }
        }
        Duration::ZERO
    }

    pub(crate) fn summary(&self) -> LatencySummary {
        LatencySummary {
            count: self.count,
            p50: self.quantile(500),
            p99: self.quantile(990),
            p999: self.quantile(999),
            max: Duration::from_nanos(self.max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_every_value_and_are_a_sixteenth_wide() {
        let mut values: Vec<u64> =
            (0..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + (1 << bit >> 3)]).collect();
        values.push(u64::MAX);
        for value in values {
            let bucket = Histogram::bucket(value);
            assert!(bucket < BUCKETS, "{value}");
            let highest = Histogram::highest(bucket);
            assert!(highest >= value && highest - value <= value / 16, "{value} {highest}");
            assert!(bucket == 0 || Histogram::highest(bucket - 1) < value, "{value}");
        }
    }

    #[test]
    fn quantiles_of_a_known_distribution() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.summary(), LatencySummary::default());
        for value in 1..=10_000 {
            histogram.record(Duration::from_nanos(value));
        }
        let LatencySummary { count, p50, p99, p999, max } = histogram.summary();
        assert_eq!((count, max), (10_000, Duration::from_nanos(10_000)));
        for (quantile, exact) in [(p50, 5_000), (p99, 9_900), (p999, 9_990)] {
            let value = quantile.as_nanos();
            assert!((exact..=exact + exact / 16).contains(&value), "{value} {exact}");
        }
        histogram.clear();
        assert_eq!(histogram.summary(), LatencySummary::default());
    }
}
