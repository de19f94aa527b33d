//! The `ringest` command: read files into an io_queue, show that it works, measure it.

mod bench;
mod consumer;
mod demo;
mod fio;
mod gpu;
mod ingest;
mod measure;
mod producer;
mod progress;
mod reading;
mod report;
mod sums;

use clap::{Parser, Subcommand};
use report::Failure;
use std::io::Write;
use std::process::ExitCode;

/// Bytes from NVMe drives and files into memory that a GPU can address, handed to running consumers.
#[derive(Debug, Parser)]
#[command(name = "ringest", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Read whole files into the slots of an io_queue; consumer threads pop them and compute each file's CRC32C.
    Ingest(ingest::Args),
    /// Make a 256 MiB file, ingest and verify it, remove it: does ringest work here?
    Demo(demo::Args),
    /// Measure.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        Command::Ingest(args) => ingest::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(text)) => {
            // `eprintln!` panics when nobody reads stderr; there is nobody left to tell then.
            let _ = writeln!(std::io::stderr(), "ringest: {text}");
            ExitCode::FAILURE
        }
    }
}
