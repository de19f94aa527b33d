//! The `ringest` command: read files through streams, show that it works, measure it.

mod bench;
mod consumer;
mod demo;
mod fio;
mod ingest;
mod measure;
mod progress;
mod reading;
mod report;

use clap::{Parser, Subcommand};
use report::Failure;
use std::io::Write;
use std::process::ExitCode;

/// Bytes from NVMe drives and files into mapped memory, announced by a tail word.
#[derive(Debug, Parser)]
#[command(name = "ringest", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Read whole files into mapped memory; a consumer thread that follows only the tail computes their CRC32C.
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
