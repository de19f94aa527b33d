//! The logic of stream and driver against a simulated kernel, by seeds.
//!
//! `RINGEST_SIM_SEEDS` sets how many, `RINGEST_SIM_FIRST` the first of them; `RINGEST_SIM_SEED=n` replays one with a
//! trace.

#![cfg(feature = "testing")]

use ringest::testing::{run_driver_seed, run_stream_seed, trace_driver_seed, trace_stream_seed};
use std::fmt::Debug;
use std::ops::Add;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

const THREADS: usize = 2;

static TURN: Mutex<()> = Mutex::new(());

/// Failures after which no further seeds are run.
const MANY: usize = 20;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

fn failed(test: &str, seed: u64, what: &str) -> String {
    let release = if cfg!(debug_assertions) { "" } else { "--release " };
    format!(
        "seed {seed}: {what}\nreplay: RINGEST_SIM_SEED={seed} cargo test {release}--features testing \
         --test simulation {test} -- --exact --nocapture"
    )
}

/// Runs as many seeds as the environment says; a failure names its seed.
fn sweep<R>(test: &str, run: fn(u64) -> Result<R, String>, trace: fn(u64) -> Result<R, String>)
where
    R: Default + Debug + Send + Add<Output = R>,
{
    if let Some(seed) = number("RINGEST_SIM_SEED") {
        let report = trace(seed).unwrap_or_else(|what| panic!("{}", failed(test, seed, &what)));
        eprintln!("seed {seed}: {report:?}");
        return;
    }
    let count = number("RINGEST_SIM_SEEDS").unwrap_or(if cfg!(debug_assertions) { 2_000 } else { 100_000 });
    let first = number("RINGEST_SIM_FIRST").unwrap_or(0);
    // One after the other, so that the figures mean something.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (next, failures) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let start = Instant::now();
    let work = || {
        let mut sum = R::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return sum;
            }
            match run(seed) {
                Ok(report) => sum = sum + report,
                Err(what) => {
                    let mut failures = failures.lock().unwrap();
                    failures.push(failed(test, seed, &what));
                    if failures.len() >= MANY {
                        next.store(first + count, Ordering::Relaxed);
                    }
                }
            }
        }
    };
    let sums: Vec<R> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} seeds failed:\n{}", failures.len(), failures.join("\n"));
    let sum = sums.into_iter().fold(R::default(), |a, b| a + b);
    let seconds = start.elapsed().as_secs_f64();
    println!("figure: {test}: {count} seeds in {seconds:.1} s, {:.0} seeds/s", count as f64 / seconds);
    println!("{test}: {sum:?}");
}

#[test]
fn stream_seeds() {
    sweep("stream_seeds", run_stream_seed, trace_stream_seed);
}

#[test]
fn driver_seeds() {
    sweep("driver_seeds", run_driver_seed, trace_driver_seed);
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in 0..50 {
        assert_eq!(run_stream_seed(seed), run_stream_seed(seed), "stream seed {seed}");
        assert_eq!(run_driver_seed(seed), run_driver_seed(seed), "driver seed {seed}");
    }
}
