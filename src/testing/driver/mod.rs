//! Runs the driver's logic, over a real io_queue in plain memory, against the simulated kernel and consumers of every
//! temper, on one thread, and checks every promise after every step.
//!
//! `reads` is the driver's stream, `consumers` and `actors` are the other side of the queue, `world` knows what the shared
//! words must say and looks at each slot as it is published, and the play below is the program that uses the driver.

mod actors;
mod consumers;
#[cfg(test)]
mod faults;
mod play;
mod reads;
#[cfg(test)]
mod regressions;
mod words;
mod world;

use super::harness::{Check, catching};
use crate::ingest::IoQueueOptions;

/// What a seed of the driver did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DriverSimReport {
    /// Calls of the driver.
    pub steps: u64,
    /// Requests accepted.
    pub requests: u64,
    /// Of these, that did not end whole.
    pub failures: u64,
    /// Slots published.
    pub published: u64,
    /// Of these, poisoned before their read had ended.
    pub early: u64,
    /// Slots popped.
    pub pops: u64,
    /// Times that no slot was to be had.
    pub stalls: u64,
    /// Commands that the simulated kernel took.
    pub commands: u64,
    /// Queues that came to END; the others were aborted.
    pub ends: u64,
    /// Virtual time that passed, ns.
    pub nanoseconds: u64,
    /// A deliberate fault was done (mutation tests).
    pub(super) fired: bool,
}

impl std::ops::Add for DriverSimReport {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            steps: self.steps + other.steps,
            requests: self.requests + other.requests,
            failures: self.failures + other.failures,
            published: self.published + other.published,
            early: self.early + other.early,
            pops: self.pops + other.pops,
            stalls: self.stalls + other.stalls,
            commands: self.commands + other.commands,
            ends: self.ends + other.ends,
            nanoseconds: self.nanoseconds + other.nanoseconds,
            fired: self.fired || other.fired,
        }
    }
}

/// A deliberate fault, of which the checks must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "asked for by tests alone"))]
enum Fault {
    /// A read's end is told before its bytes are in place.
    PublishEarly,
    /// The same of a read that holds a slot poisoned early, which is then filled again.
    LandEarly,
    /// A read's end is never told.
    EndLost,
    /// A failed read is told as whole.
    ErrnoLost,
    /// A slot that a consumer holds is said to be released.
    CreditForged,
    /// One byte of a published slot changes.
    SlotSpoiled,
    /// A published descriptor changes.
    DescriptorSpoiled,
    TailAhead,
    TailBack,
    EndTooSoon,
    /// Two consumers get the same ticket.
    TicketTwice,
    RecordLost,
    RecordTwice,
}

/// What a seed has chosen for all of its run.
#[derive(Debug, Clone)]
struct Setup {
    queue: IoQueueOptions,
    stride: u64,
    depth: usize,
    queue_limit: usize,
    crc32c: bool,
    /// Chance, per mille, that the stream refuses a read.
    refuse: u64,
    /// Chance, per mille, that another thread of the host aborts the queue while the driver waits.
    host_abort: u64,
}

/// Runs one seed of the driver; an `Err` names the promise that was broken.
///
/// # Errors
/// What was wrong, in words.
pub fn run_driver_seed(seed: u64) -> Check<DriverSimReport> {
    catching(|| play::run(seed, None, false))
}

/// Runs one seed of the driver and prints every step, pop and completion to stderr.
///
/// # Errors
/// As [`run_driver_seed`].
pub fn trace_driver_seed(seed: u64) -> Check<DriverSimReport> {
    catching(|| play::run(seed, None, true))
}
