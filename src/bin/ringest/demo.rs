//! `ringest demo`: the shortest way to see that ringest works on a machine.

use crate::ingest::{How, ingest};
use crate::measure::XorShift;
use crate::report::{self, Failure, Outcome};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const DEMO_BYTES: u64 = 256 << 20;

/// Options of `ringest demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to make the file; the system's directory for temporary files by default.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    how: How,
}

/// `ringest demo`.
pub(crate) fn run(args: &Args) -> Outcome<()> {
    args.how.mode()?;
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let path = dir.join(format!("ringest-demo-{}.bin", std::process::id()));
    create(&path, DEMO_BYTES)?;
    let file = Temporary(path);
    let summary = ingest(std::slice::from_ref(&file.0), &args.how, true)?;
    drop(file);
    if args.how.json {
        let mut value = summary.json();
        value["demo"] = "OK".into();
        return report::print(&format!("{value}\n"));
    }
    report::print(&format!("{}demo: OK\n", summary.text()))
}

/// A file that goes away however the demo ends.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes a file of pseudo-random bytes. On failure nothing stays.
pub(crate) fn create(path: &Path, bytes: u64) -> Outcome<()> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(|error| Failure::at(path, format!("making the file: {error}")))?;
    fill(file, bytes).map_err(|error| {
        let _ = std::fs::remove_file(path);
        Failure::at(path, format!("writing {bytes} bytes: {error}"))
    })
}

fn fill(mut file: File, bytes: u64) -> std::io::Result<()> {
    let mut random = XorShift::new(0x7269_6e67_6573_7431);
    let mut block = vec![0; 1 << 20];
    let mut rest = bytes;
    while rest > 0 {
        let count = rest.min(block.len() as u64) as usize;
        random.fill(&mut block[..count]);
        file.write_all(&block[..count])?;
        rest -= count as u64;
    }
    // A direct read would write dirty pages back first, in the middle of what is timed.
    file.sync_data()
}
