//! For ringest's own tests: fault points, and the stream's logic against a simulated kernel. Not part of the API.

mod harness;
#[cfg(test)]
mod regressions;
mod rng;
mod sim;

pub use crate::sys::fault::{PANIC, end_fault_plan, plan_fault, refuse_setup_flags};
pub use harness::{SimReport, run_stream_seed, trace_stream_seed};
