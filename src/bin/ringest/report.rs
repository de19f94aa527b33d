//! What the tool says: failures, sizes, and the summary of an ingest.

use crate::measure::{Elapsed, GIB};
use ringest::{PipelineError, RingFeatures, StreamStats};
use serde_json::{Value, json};
use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::path::{Path, PathBuf};

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
    /// From the first submission until the consumer was done.
    pub(crate) elapsed: Elapsed,
    /// Before that: ring, buffer, registrations.
    pub(crate) setup_seconds: f64,
    pub(crate) stats: StreamStats,
    pub(crate) features: RingFeatures,
    pub(crate) chunk: u64,
    pub(crate) depth: u32,
    pub(crate) slots: usize,
    pub(crate) buffer_refusal: Option<PipelineError>,
    pub(crate) files_refusal: Option<PipelineError>,
}

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

    /// One object, for programs.
    pub(crate) fn json(&self) -> Value {
        let stats = &self.stats;
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
            "cpu_scope": "user + system time of the whole process, the consumer's CRC32C included",
            "chunk": self.chunk,
            "depth": self.depth,
            "buffer_slots": self.slots,
            "buffer_registered": self.buffer_refusal.is_none(),
            "files_registered": self.files_refusal.is_none(),
            "paths": {
                "registered_bytes": stats.registered_bytes,
                "plain_bytes": stats.plain_bytes,
                "bounced_bytes": stats.bounced_bytes,
            },
            "ring": {
                "sq_entries": self.features.sq_entries,
                "cq_entries": self.features.cq_entries,
                "features": features,
            },
            "reads": stats.completed,
            "commands": stats.commands,
            "short_reads": stats.short_reads,
            "retries": stats.retries,
            "system_calls": stats.enters,
            "files": self.files.iter().map(FileReport::json).collect::<Vec<_>>(),
        })
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
        let stats = &self.stats;
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
            "cpu        {:.3} s/GiB (user + system time of the process, the consumer's CRC32C included)",
            self.cpu_per_gib()
        )?;
        writeln!(
            out,
            "paths      registered {}, plain {}; of these bounced {}",
            size(stats.registered_bytes),
            size(stats.plain_bytes),
            size(stats.bounced_bytes)
        )?;
        if let Some(error) = &self.buffer_refusal {
            writeln!(out, "           the buffer is not registered, reads went plain: {error}")?;
        }
        if let Some(error) = &self.files_refusal {
            writeln!(out, "           the files are not registered: {error}")?;
        }
        writeln!(out, "buffer     {} slots of {}, depth {}", self.slots, size(self.chunk), self.depth)?;
        writeln!(out, "ring       {}", self.features)?;
        writeln!(
            out,
            "calls      {} system calls for {} reads, {} commands; short reads {}, retries {}",
            stats.enters, stats.completed, stats.commands, stats.short_reads, stats.retries
        )
    }
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
    fn sizes_are_printed() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (4096, "4 KiB"), (1536, "1.50 KiB"), (1 << 30, "1 GiB")];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
    }
}
