//! What the tool says: failures, sizes, and the summary of an ingest.

use crate::gpu;
use crate::measure::{Elapsed, GIB};
use ringest::{
    Gpu, IoQueueOptions, LatencySummary, NvmeGpuIngestTelemetry, PipelineError, ReadCount, ReadPath, RingFeatures,
    StreamStats,
};
use serde_json::{Value, json};
use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a command failed: the line that the user reads.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

pub(crate) type Outcome<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure that has to do with a file.
    pub(crate) fn at(path: &Path, what: impl Display) -> Self {
        Self(format!("{}: {what}", path.display()))
    }
}

impl From<PipelineError> for Failure {
    fn from(error: PipelineError) -> Self {
        Self(error.to_string())
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Writes a finished text to stdout. `println!` would panic on a closed pipe.
pub(crate) fn print(text: &str) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure(format!("writing to stdout: {error}")))
}

/// A size as people write it: a number with an optional suffix K, M, G or T (powers of 1024; "KiB" and "KB" too).
pub(crate) fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("unknown suffix {suffix:?}: use K, M, G or T")),
    };
    let number: u64 = number.parse().map_err(|_| "a size is a whole number with an optional suffix".to_owned())?;
    number.checked_mul(1 << shift).filter(|&size| size <= i64::MAX as u64).ok_or_else(|| "too large".to_owned())
}

/// Bytes for people, exact where a unit divides them.
pub(crate) fn size(bytes: u64) -> String {
    let unit = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)].into_iter().find(|&(_, bits)| bytes >> bits > 0);
    match unit {
        None => format!("{bytes} B"),
        Some((name, bits)) if bytes.trailing_zeros() >= bits => format!("{} {name}", bytes >> bits),
        Some((name, bits)) => format!("{:.2} {name}", bytes as f64 / (1u64 << bits) as f64),
    }
}

/// `a / b`, and 0 rather than NaN or infinity: nothing was read, or in no time.
pub(crate) fn per(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// What became of one file.
#[derive(Debug, Clone)]
pub(crate) struct FileReport {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) crc32c: u32,
    /// `None` for an empty file, which is not read.
    pub(crate) direct: Option<bool>,
    pub(crate) verified: bool,
}

/// What an ingest did.
#[derive(Debug)]
pub(crate) struct Summary {
    pub(crate) files: Vec<FileReport>,
    /// From the first submission until the consumers were done.
    pub(crate) elapsed: Elapsed,
    /// Before that: ring, slots, registrations.
    pub(crate) setup_seconds: f64,
    pub(crate) telemetry: NvmeGpuIngestTelemetry,
    pub(crate) stream: StreamStats,
    pub(crate) features: RingFeatures,
    pub(crate) queue: IoQueueOptions,
    pub(crate) depth: u32,
    pub(crate) buffer_refusal: Option<PipelineError>,
    /// Where the consumers were, if not threads.
    pub(crate) gpu: Option<Gpu>,
    /// Why they were not where they should have been.
    pub(crate) gpu_refusal: Option<String>,
}

/// The paths by their names in JSON.
const PATHS: [(&str, ReadPath); 3] =
    [("none", ReadPath::None), ("registered", ReadPath::RegisteredRead), ("plain", ReadPath::PlainRead)];

impl Summary {
    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    fn gb_per_s(&self) -> f64 {
        per(self.bytes() as f64 / 1e9, self.elapsed.wall)
    }

    fn cpu_per_gib(&self) -> f64 {
        per(self.elapsed.cpu, self.bytes() as f64 / GIB)
    }

    fn mode(&self) -> String {
        format!("{:?}", self.queue.mode).to_ascii_lowercase()
    }

    /// One object, for programs.
    pub(crate) fn json(&self) -> Value {
        let features: serde_json::Map<_, _> =
            self.features.names().into_iter().map(|(name, got)| (name.to_owned(), got.into())).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "bytes": self.bytes(),
            "seconds": self.elapsed.wall,
            "gb_per_s": self.gb_per_s(),
            "setup_seconds": self.setup_seconds,
            "cpu_seconds": self.elapsed.cpu,
            "cpu_s_per_gib": self.cpu_per_gib(),
            "cpu_scope": match self.gpu {
                Some(_) => "user + system time of the whole process, not the kernel's on the GPU",
                None => "user + system time of the whole process, the consumers' CRC32C included",
            },
            "slots": self.queue.slots,
            "slot_bytes": self.queue.slot_bytes,
            "slot_alignment": self.queue.alignment,
            "mode": self.mode(),
            "consumers": self.queue.consumers,
            "depth": self.depth,
            "slots_registered": self.buffer_refusal.is_none(),
            "ring": {
                "sq_entries": self.features.sq_entries,
                "cq_entries": self.features.cq_entries,
                "features": features,
            },
            "gpu": self.gpu_json(),
            "commands": self.stream.commands,
            "system_calls": self.stream.enters,
            "telemetry": telemetry_json(&self.telemetry),
            "files": self.files.iter().map(FileReport::json).collect::<Vec<_>>(),
        })
    }

    /// Null where none was asked for.
    fn gpu_json(&self) -> Value {
        match (&self.gpu, &self.gpu_refusal) {
            (Some(gpu), _) => json!({
                "ordinal": gpu.ordinal(),
                "name": gpu.attributes().name,
                "blocks": self.queue.consumers,
                "threads": gpu::THREADS,
            }),
            (None, Some(reason)) => json!({ "refused": reason }),
            (None, None) => Value::Null,
        }
    }

    /// The same, for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        for file in &self.files {
            writeln!(out, "{file}")?;
        }
        writeln!(
            out,
            "read       {} ({} bytes) in {:.3} s: {:.2} GB/s (after {:.3} s of set-up)",
            size(self.bytes()),
            self.bytes(),
            self.elapsed.wall,
            self.gb_per_s(),
            self.setup_seconds
        )?;
        writeln!(
            out,
            "cpu        {:.3} s/GiB (user + system time of the process{})",
            self.cpu_per_gib(),
            if self.gpu.is_some() { "" } else { ", the consumers' CRC32C included" }
        )?;
        if let Some(gpu) = &self.gpu {
            let (ordinal, name, blocks) = (gpu.ordinal(), &gpu.attributes().name, self.queue.consumers);
            let threads = gpu::THREADS;
            writeln!(out, "gpu        {name} (GPU {ordinal}): {blocks} blocks of {threads} threads found the CRC32C")?;
        }
        if let Some(reason) = &self.gpu_refusal {
            writeln!(out, "gpu        not used, the consumers were threads: {reason}")?;
        }
        let (queue, some) = (&self.queue, if self.queue.consumers == 1 { "consumer" } else { "consumers" });
        writeln!(
            out,
            "queue      {} slots of {}, {} {some} ({}), depth {}",
            queue.slots,
            size(queue.slot_bytes.into()),
            queue.consumers,
            self.mode(),
            self.depth
        )?;
        self.write_telemetry(out)?;
        if let Some(error) = &self.buffer_refusal {
            writeln!(out, "           the slots are not registered, reads went plain: {error}")?;
        }
        let StreamStats { enters, commands, .. } = self.stream;
        writeln!(out, "calls      {enters} system calls, {commands} commands")?;
        writeln!(out, "ring       {}", self.features)
    }

    fn write_telemetry(&self, out: &mut String) -> std::fmt::Result {
        let NvmeGpuIngestTelemetry { completed, latency, .. } = self.telemetry;
        let NvmeGpuIngestTelemetry { published_slots, poisoned_slots, credit_stalls, .. } = self.telemetry;
        let NvmeGpuIngestTelemetry { short_reads, retries, bounce_bytes, .. } = self.telemetry;
        let NvmeGpuIngestTelemetry { max_in_flight, max_queued, .. } = self.telemetry;
        writeln!(
            out,
            "slots      {published_slots} published, {poisoned_slots} poisoned; none free {credit_stalls} times, for {}",
            time(self.telemetry.credit_stall_time)
        )?;
        let LatencySummary { p50, p99, p999, max, .. } = latency;
        writeln!(
            out,
            "latency    p50 {}, p99 {}, p99.9 {}, max {}, from submit to publication",
            time(p50),
            time(p99),
            time(p999),
            time(max)
        )?;
        writeln!(
            out,
            "reads      {}; at most {max_in_flight} in flight and {max_queued} in line; {short_reads} short, {retries} retried",
            completed.reads
        )?;
        let path = |path| size(self.telemetry.path(path).bytes);
        writeln!(
            out,
            "paths      registered {}, plain {}; of these bounced {}",
            path(ReadPath::RegisteredRead),
            path(ReadPath::PlainRead),
            size(bounce_bytes)
        )
    }
}

/// A duration for people, in three or four digits.
fn time(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match duration.as_nanos() {
        0..1_000_000 => format!("{:.1} us", seconds * 1e6),
        1_000_000..1_000_000_000 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.2} s"),
    }
}

fn count_json(count: ReadCount) -> Value {
    let ReadCount { reads, bytes } = count;
    json!({ "reads": reads, "bytes": bytes })
}

/// All of it. Taken apart by name, so that what is added is not forgotten here.
fn telemetry_json(telemetry: &NvmeGpuIngestTelemetry) -> Value {
    let NvmeGpuIngestTelemetry {
        submitted,
        completed,
        paths: _,
        bounce_bytes,
        short_reads,
        retries,
        failed,
        end_of_file,
        cancelled,
        timed_out,
        published_slots,
        poisoned_slots,
        early_poisoned_slots,
        held_slots,
        leaked_reads,
        credit_stalls,
        credit_stall_time,
        in_flight,
        max_in_flight,
        queued,
        max_queued,
        latency: LatencySummary { count, p50, p99, p999, max },
    } = *telemetry;
    let paths: serde_json::Map<_, _> =
        PATHS.iter().map(|&(name, path)| (name.to_owned(), count_json(telemetry.path(path)))).collect();
    json!({
        "submitted": count_json(submitted),
        "completed": count_json(completed),
        "paths": paths,
        "bounce_bytes": bounce_bytes,
        "short_reads": short_reads,
        "retries": retries,
        "failed": failed,
        "end_of_file": end_of_file,
        "cancelled": cancelled,
        "timed_out": timed_out,
        "published_slots": published_slots,
        "poisoned_slots": poisoned_slots,
        "early_poisoned_slots": early_poisoned_slots,
        "held_slots": held_slots,
        "leaked_reads": leaked_reads,
        "credit_stalls": credit_stalls,
        "credit_stall_seconds": credit_stall_time.as_secs_f64(),
        "in_flight": in_flight,
        "max_in_flight": max_in_flight,
        "queued": queued,
        "max_queued": max_queued,
        "latency": {
            "count": count,
            "p50_seconds": p50.as_secs_f64(),
            "p99_seconds": p99.as_secs_f64(),
            "p999_seconds": p999.as_secs_f64(),
            "max_seconds": max.as_secs_f64(),
        },
    })
}

impl FileReport {
    fn json(&self) -> Value {
        json!({
            "path": self.path.to_string_lossy(),
            "bytes": self.bytes,
            "crc32c": format!("{:08x}", self.crc32c),
            "direct": self.direct,
            "verified": self.verified,
        })
    }
}

impl Display for FileReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = match self.direct {
            Some(true) => "O_DIRECT",
            Some(false) => "page cache",
            None => "empty",
        };
        let verified = if self.verified { ", verified" } else { "" };
        write!(f, "{}: crc32c {:08x}, {} bytes, {how}{verified}", self.path.display(), self.crc32c, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        let good =
            [("0", 0), ("512", 512), ("7b", 7), ("4k", 4096), ("1MiB", 1 << 20), ("2GB", 2 << 30), ("1T", 1 << 40)];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "1x", "-1", "1.5M", "1 M", "i", "1ib", "9999999999T", "18446744073709551616"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_printed() {
        let cases = [(0, "0.0 us"), (1500, "1.5 us"), (2_000_000, "2.0 ms"), (1_234_000_000, "1.23 s")];
        for (nanoseconds, text) in cases {
            assert_eq!(time(Duration::from_nanos(nanoseconds)), text);
        }
    }

    #[test]
    fn sizes_are_printed() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (4096, "4 KiB"), (1536, "1.50 KiB"), (1 << 30, "1 GiB")];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
    }
}
