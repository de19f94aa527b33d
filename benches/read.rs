//! The committed comparison: ringest's stream beside a bare io_uring loop and fio, on the same reads.
//!
//! ```sh
//! cargo bench --bench read -- [--dir DIR] [--pairs 9] [--quick] [--keep]
//! ```
//!
//! **How it is made fair.** The stream and the bare loop alternate within one process: they share the file descriptor,
//! the list of offsets and the very memory they read into (so page sizes and placement are equal, which fresh
//! processes would draw anew), each run has a ring of its own, and only the reads are timed, not set-up and
//! registration. Which of them goes first changes from pair to pair, so that drift and after-effects fall on both. fio
//! can only be a process of its own; it runs between the pairs, and its rate is by its own clock, start-up not
//! included. Ratios are taken within a pair, and their median is reported.

use clap::Parser;
use io_uring::{IoUring, opcode, types};
use measure::{GIB, Spread, Watch, XorShift};
use reading::{Order, Reads, Run};
use ringest::{DirectMode, InputFile, MappedBuffer};
use std::error::Error;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

#[path = "../src/bin/ringest/fio.rs"]
mod fio;
#[path = "../src/bin/ringest/measure.rs"]
mod measure;
#[path = "../src/bin/ringest/reading.rs"]
mod reading;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Compare ringest's stream with a bare io_uring loop and with fio.
#[derive(Debug, Parser)]
struct Args {
    /// Where the test file is made (or found); Cargo's directory for temporary files by default.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Pairs of runs per case.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// One pair with a small file: does it run at all?
    #[arg(long)]
    quick: bool,
    /// Keep the test file.
    #[arg(long)]
    keep: bool,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

struct Case {
    name: &'static str,
    order: Order,
    block: usize,
    direct: bool,
}

const DEPTH: usize = 32;

const CASES: [Case; 3] = [
    Case { name: "1 MiB sequential, O_DIRECT", order: Order::Sequential, block: 1 << 20, direct: true },
    Case { name: "128 KiB sequential, O_DIRECT", order: Order::Sequential, block: 128 << 10, direct: true },
    Case { name: "4 KiB random, page cache", order: Order::Random, block: 4 << 10, direct: false },
];

/// All runs of a case, pair by pair.
#[derive(Default)]
struct Runs {
    own: Vec<Run>,
    bare: Vec<Run>,
    fio: Vec<Run>,
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    let dir = args.dir.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    std::fs::create_dir_all(&dir)?;
    let bytes = if args.quick { 64 << 20 } else { 1 << 30 };
    let path = dir.join(format!("ringest-bench-{}m.bin", bytes >> 20));
    create(&path, bytes)?;
    let compared = compare(&path, if args.quick { 1 } else { args.pairs });
    if !args.keep {
        std::fs::remove_file(&path)?;
    }
    compared
}

/// Makes the file unless one of this size is there.
fn create(path: &Path, bytes: u64) -> Outcome<()> {
    if std::fs::metadata(path).is_ok_and(|file| file.len() == bytes) {
        return Ok(());
    }
    let mut file = std::fs::File::create(path)?;
    let mut random = XorShift::new(1);
    let mut block = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        random.fill(&mut block);
        file.write_all(&block)?;
    }
    // Otherwise the first direct reads would write dirty pages back.
    file.sync_all()?;
    Ok(())
}

fn compare(path: &Path, pairs: u32) -> Outcome<()> {
    let fio_version = fio::version();
    match &fio_version {
        Ok(version) => println!("{}: {pairs} pairs, depth {DEPTH}, {version}", path.display()),
        Err(reason) => println!("{}: {pairs} pairs, depth {DEPTH}, without fio: {reason}", path.display()),
    }
    let mut table = Vec::new();
    for case in &CASES {
        match run_case(path, case, pairs, fio_version.is_ok()) {
            Ok(runs) => table.push((case.name, runs)),
            Err(error) => println!("{}: left out: {error}", case.name),
        }
    }
    print_table(&table);
    if table.len() < CASES.len() { Err("not every case could be run".into()) } else { Ok(()) }
}

fn run_case(path: &Path, case: &Case, pairs: u32, with_fio: bool) -> Outcome<Runs> {
    let mode = if case.direct { DirectMode::On } else { DirectMode::Off };
    let file = InputFile::open(path, mode)?;
    let reads = Reads::plan(case.order, file.len(), case.block, DEPTH, file.len())?;
    let mut memory = reads.memory()?;
    if !case.direct {
        reading::warm(path)?;
    }
    // Unmeasured: the first runs fault the memory in and wake the drive.
    reading::with_stream(&file, &mut memory, &reads)?;
    bare(&file, &mut memory, &reads)?;
    let mut runs = Runs::default();
    for pair in 0..pairs {
        if pair % 2 == 0 {
            runs.own.push(reading::with_stream(&file, &mut memory, &reads)?);
            runs.bare.push(bare(&file, &mut memory, &reads)?);
        } else {
            runs.bare.push(bare(&file, &mut memory, &reads)?);
            runs.own.push(reading::with_stream(&file, &mut memory, &reads)?);
        }
        if with_fio {
            runs.fio.push(fio::run(path, case.order, case.direct, &reads)?);
        }
    }
    let work = |run: &Run| (run.reads, run.bytes);
    if runs.own.iter().chain(&runs.bare).chain(&runs.fio).any(|run| work(run) != work(&runs.own[0])) {
        return Err("the programs did not read the same".into());
    }
    if runs.own.iter().any(|run| !run.registered) {
        println!("{}: RLIMIT_MEMLOCK kept the stream from registering its buffer", case.name);
    }
    Ok(runs)
}

/// The least code that reads the same: what the stream's bookkeeping is measured against. It sets the two flags that
/// matter and leaves the rest as the crate has it: the ring's descriptor is not registered, which costs each system
/// call a lookup that the stream's do not pay.
fn bare(file: &InputFile, memory: &mut MappedBuffer<u8>, reads: &Reads) -> Outcome<Run> {
    let mut ring: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(reads.depth as u32)?;
    let base = memory.as_host_ptr_mut();
    let whole = libc::iovec { iov_base: base.cast(), iov_len: memory.len() };
    // SAFETY: the memory outlives the ring. Should `drive_bare` fail with reads in flight, the kernel keeps the pages
    // pinned until they end, and nobody looks at their contents.
    unsafe { ring.submitter().register_buffers(&[whole])? };
    ring.submitter().register_files(&[file.as_fd().as_raw_fd()])?;
    let watch = Watch::start();
    let driven = drive_bare(&mut ring, base, reads);
    let elapsed = watch.stop();
    let system_calls = driven?;
    Ok(Run { elapsed, bytes: reads.bytes(), reads: reads.offsets.len() as u64, system_calls, registered: true })
}

/// Keeps `depth` reads in flight; returns the number of system calls.
fn drive_bare(ring: &mut IoUring, base: *mut u8, reads: &Reads) -> Outcome<u64> {
    let mut free: Vec<usize> = (0..reads.depth).rev().collect();
    let mut offsets = reads.offsets.iter().copied();
    let (mut flying, mut calls, mut failed) = (0, 0, None);
    loop {
        // After a failure only what is in flight is awaited: the kernel still writes to the memory.
        while let (None, Some(&slot)) = (failed, free.last()) {
            let Some(offset) = offsets.next() else { break };
            let address = base.wrapping_add(slot * reads.block);
            let entry = opcode::ReadFixed::new(types::Fixed(0), address, reads.block as u32, 0);
            let entry = entry.offset(offset).build().user_data(slot as u64);
            // SAFETY: the slot lies in the registered memory, see `bare`.
            unsafe { ring.submission().push(&entry)? };
            free.pop();
            flying += 1;
        }
        if flying == 0 {
            break;
        }
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
            _ => calls += 1,
        }
        for completion in ring.completion() {
            if completion.result() != reads.block as i32 {
                failed = Some(completion.result());
            }
            free.push(completion.user_data() as usize);
            flying -= 1;
        }
    }
    match failed {
        None => Ok(calls),
        Some(result) => Err(format!("a bare read returned {result}").into()),
    }
}

fn gb_per_s(run: &Run) -> f64 {
    run.bytes as f64 / 1e9 / run.elapsed.wall
}

fn cpu_per_gib(run: &Run) -> f64 {
    run.elapsed.cpu / (run.bytes as f64 / GIB)
}

/// Median of the pairwise ratios of a value.
fn ratio(own: &[Run], other: &[Run], value: fn(&Run) -> f64) -> Spread {
    Spread::of(own.iter().zip(other).map(|(own, other)| value(own) / value(other)))
}

fn print_table(table: &[(&str, Runs)]) {
    println!(
        "\n{:<30} {:<8} {:>7} {:>17} {:>13} {:>10} {:>9}",
        "case", "program", "GB/s", "min..max", "ringest/this", "cpu s/GiB", "syscalls"
    );
    for (name, runs) in table {
        for (program, list) in [("ringest", &runs.own), ("bare", &runs.bare), ("fio", &runs.fio)] {
            if !list.is_empty() {
                print_line(name, program, &runs.own, list);
            }
        }
        let cpu = ratio(&runs.own, &runs.bare, cpu_per_gib);
        println!("{name:<30} cpu s/GiB ringest/bare: {:.3} ({:.3}..{:.3})", cpu.median, cpu.min, cpu.max);
    }
    println!("\nMedians; ringest/this: median of the pairwise ratios of GB/s. fio's CPU time is its own report.");
}

fn print_line(name: &str, program: &str, own: &[Run], list: &[Run]) {
    let rate = Spread::of(list.iter().map(gb_per_s));
    let range = format!("{:.3}..{:.3}", rate.min, rate.max);
    let against = ratio(own, list, gb_per_s).median;
    let cpu = Spread::of(list.iter().map(cpu_per_gib)).median;
    let calls = Spread::of(list.iter().map(|run| run.system_calls as f64)).median;
    let calls = if calls > 0.0 { format!("{calls:.0}") } else { "-".to_owned() };
    println!("{name:<30} {program:<8} {:>7.3} {range:>17} {against:>13.3} {cpu:>10.4} {calls:>9}", rate.median);
}
