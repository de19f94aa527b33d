//! The stream's logic against a simulated kernel, by seeds.
//!
//! `RINGEST_SIM_SEEDS` sets how many, `RINGEST_SIM_FIRST` the first of them; `RINGEST_SIM_SEED=n` replays one with a
//! trace.

#![cfg(feature = "testing")]

use ringest::testing::{SimReport, run_stream_seed, trace_stream_seed};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const THREADS: usize = 2;

/// Failures after which no further seeds are run.
const MANY: usize = 20;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

fn failed(seed: u64, what: &str) -> String {
    let release = if cfg!(debug_assertions) { "" } else { "--release " };
    format!(
        "seed {seed}: {what}\nreplay: RINGEST_SIM_SEED={seed} cargo test {release}--features testing \
         --test simulation seeds -- --exact --nocapture"
    )
}

#[test]
fn seeds() {
    if let Some(seed) = number("RINGEST_SIM_SEED") {
        let report = trace_stream_seed(seed).unwrap_or_else(|what| panic!("{}", failed(seed, &what)));
        eprintln!("seed {seed}: {report:?}");
        return;
    }
    let count = number("RINGEST_SIM_SEEDS").unwrap_or(if cfg!(debug_assertions) { 2_000 } else { 100_000 });
    let first = number("RINGEST_SIM_FIRST").unwrap_or(0);
    let (next, failures) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let start = Instant::now();
    let work = || {
        let mut sum = SimReport::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return sum;
            }
            match run_stream_seed(seed) {
                Ok(report) => sum = sum + report,
                Err(what) => {
                    let mut failures = failures.lock().unwrap();
                    failures.push(failed(seed, &what));
                    if failures.len() >= MANY {
                        next.store(first + count, Ordering::Relaxed);
                    }
                }
            }
        }
    };
    let sums: Vec<SimReport> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} seeds failed:\n{}", failures.len(), failures.join("\n"));
    let sum = sums.into_iter().fold(SimReport::default(), |a, b| a + b);
    let seconds = start.elapsed().as_secs_f64();
    println!("{count} seeds in {seconds:.1} s, {:.0} seeds/s: {sum:?}", count as f64 / seconds);
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in 0..50 {
        assert_eq!(run_stream_seed(seed), run_stream_seed(seed), "seed {seed}");
    }
}
