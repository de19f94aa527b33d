//! `ringest bench`: what the stream does, without a consumer, and beside fio.

use crate::demo::create;
use crate::fio;
use crate::ingest::Direct;
use crate::measure::{GIB, Spread};
use crate::reading::{Order, Reads, Run, warm, with_stream};
use crate::report::{self, Failure, Outcome, parse_size, per, size};
use clap::{Subcommand, ValueEnum};
use ringest::InputFile;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;

/// Options of `ringest bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Reads of a file into registered memory.
    Read(ReadArgs),
}

/// Options of `ringest bench read`.
#[derive(Debug, clap::Args)]
struct ReadArgs {
    /// The file, or block device, to read.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Order of the blocks; rand draws them independently, by a fixed seed.
    #[arg(long, value_enum, default_value_t = Pattern::Seq)]
    pattern: Pattern,
    /// Bytes per read.
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = parse_block)]
    block: u64,
    /// Reads in flight.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    depth: u32,
    /// Bytes per run, in whole blocks; the file's size by default.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// Runs.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Read around the page cache (O_DIRECT).
    #[arg(long, value_enum, default_value_t = Direct::Auto)]
    direct: Direct,
    /// Make the file, of this size, if it does not exist. It is kept.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    file_size: Option<u64>,
    /// Run another program with the same parameters after each run, and compare.
    #[arg(long, value_enum)]
    vs: Option<Versus>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pattern {
    Seq,
    Rand,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Versus {
    Fio,
}

fn parse_block(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        block @ 512..=0x4000_0000 => Ok(block),
        _ => Err("use 512 to 1G".to_owned()),
    }
}

/// `ringest bench`.
pub(crate) fn run(args: &Args) -> Outcome<()> {
    let What::Read(args) = &args.what;
    let results = measure(args)?;
    match args.json {
        true => report::print(&format!("{}\n", results.json())),
        false => report::print(&results.text()),
    }
}

/// Everything a bench found out.
struct Results<'a> {
    args: &'a ReadArgs,
    direct: bool,
    runs: Vec<Run>,
    fio: Option<(String, Vec<Run>)>,
}

fn measure(args: &ReadArgs) -> Outcome<Results<'_>> {
    if let Some(bytes) = args.file_size
        && !args.file.exists()
    {
        create(&args.file, bytes)?;
    }
    let fio_version = args.vs.map(|Versus::Fio| fio::version()).transpose()?;
    let file = InputFile::open(&args.file, args.direct.into())?;
    let direct = file.direct().is_some();
    let order = if args.pattern == Pattern::Rand { Order::Random } else { Order::Sequential };
    let bytes = args.size.unwrap_or(file.len());
    let reads = Reads::plan(order, file.len(), args.block as usize, args.depth as usize, bytes)
        .map_err(|error| Failure::at(&args.file, error))?;
    if !direct {
        warm(&args.file).map_err(|error| Failure::at(&args.file, error))?;
    }
    let mut memory = reads.memory()?;
    let (mut runs, mut others) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        runs.push(with_stream(&file, &mut memory, &reads).map_err(|error| Failure::at(&args.file, error))?);
        if fio_version.is_some() {
            others.push(fio::run(&args.file, order, direct, &reads)?);
        }
    }
    Ok(Results { args, direct, runs, fio: fio_version.map(|version| (version, others)) })
}

fn gb_per_s(run: &Run) -> f64 {
    per(run.bytes as f64 / 1e9, run.elapsed.wall)
}

fn iops(run: &Run) -> f64 {
    per(run.reads as f64, run.elapsed.wall)
}

fn cpu_per_gib(run: &Run) -> f64 {
    per(run.elapsed.cpu, run.bytes as f64 / GIB)
}

fn run_json(run: &Run) -> Value {
    json!({
        "seconds": run.elapsed.wall,
        "bytes": run.bytes,
        "gb_per_s": gb_per_s(run),
        "iops": iops(run),
        "cpu_s_per_gib": cpu_per_gib(run),
        "system_calls": run.system_calls,
        "registered": run.registered,
    })
}

fn spread_json(runs: &[Run], value: impl Fn(&Run) -> f64) -> Value {
    let Spread { median, min, max } = Spread::of(runs.iter().map(value));
    json!({ "median": median, "min": min, "max": max })
}

impl Results<'_> {
    fn cache(&self) -> &'static str {
        if self.direct { "bypassed (O_DIRECT)" } else { "warm" }
    }

    fn pattern(&self) -> &'static str {
        if self.args.pattern == Pattern::Rand { "random" } else { "sequential" }
    }

    /// Throughput of each run by that of the fio run after it.
    fn ratios(&self) -> Option<Spread> {
        let (_, others) = self.fio.as_ref()?;
        Some(Spread::of(self.runs.iter().zip(others).map(|(own, other)| per(gb_per_s(own), gb_per_s(other)))))
    }

    fn json(&self) -> Value {
        let args = self.args;
        let mut value = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "file": args.file.to_string_lossy(),
            "pattern": self.pattern(),
            "block": args.block,
            "depth": args.depth,
            "direct": self.direct,
            "page_cache": self.cache(),
            "runs": self.runs.iter().map(run_json).collect::<Vec<_>>(),
            "seconds": spread_json(&self.runs, |run| run.elapsed.wall),
            "gb_per_s": spread_json(&self.runs, gb_per_s),
            "iops": spread_json(&self.runs, iops),
            "cpu_s_per_gib": spread_json(&self.runs, cpu_per_gib),
            "system_calls": spread_json(&self.runs, |run| run.system_calls as f64),
        });
        if let (Some((version, others)), Some(ratio)) = (&self.fio, self.ratios()) {
            value["fio"] = json!({
                "version": version,
                "gb_per_s": spread_json(others, gb_per_s),
                "iops": spread_json(others, iops),
                "runs": others.iter().map(gb_per_s).collect::<Vec<_>>(),
                "ratio": { "median": ratio.median, "min": ratio.min, "max": ratio.max },
            });
        }
        value
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        let (args, pattern) = (self.args, self.pattern());
        let bytes = self.runs.first().map_or(0, |run| run.bytes);
        writeln!(out, "{}: {pattern} reads of {}, depth {}", args.file.display(), size(args.block), args.depth)?;
        writeln!(out, "{} per run; page cache: {}", size(bytes), self.cache())?;
        if self.runs.iter().any(|run| !run.registered) {
            writeln!(out, "not all reads went to registered memory (RLIMIT_MEMLOCK, perhaps: see ulimit -l)")?;
        }
        writeln!(
            out,
            "{:>4} {:>9} {:>8} {:>10} {:>9} {:>9}",
            "run", "seconds", "GB/s", "IOPS", "cpu s/GiB", "syscalls"
        )?;
        for (index, run) in self.runs.iter().enumerate() {
            let (number, wall, calls) = (index + 1, run.elapsed.wall, run.system_calls);
            let (rate, iops, cpu) = (gb_per_s(run), iops(run), cpu_per_gib(run));
            writeln!(out, "{number:>4} {wall:>9.4} {rate:>8.3} {iops:>10.0} {cpu:>9.4} {calls:>9}")?;
        }
        self.write_spreads(out)
    }

    fn write_spreads(&self, out: &mut String) -> std::fmt::Result {
        let line = |out: &mut String, name: &str, spread: Spread| {
            let Spread { median, min, max } = spread;
            writeln!(out, "{name:<10} median {median:.4}, {min:.4}..{max:.4}")
        };
        line(out, "GB/s", Spread::of(self.runs.iter().map(gb_per_s)))?;
        line(out, "cpu s/GiB", Spread::of(self.runs.iter().map(cpu_per_gib)))?;
        if let (Some((version, others)), Some(ratio)) = (&self.fio, self.ratios()) {
            line(out, "fio GB/s", Spread::of(others.iter().map(gb_per_s)))?;
            line(out, "ratio", ratio)?;
            writeln!(out, "({version}; ratio: ringest / fio, pair by pair)")?;
        }
        Ok(())
    }
}
