//! For ringest's own tests: fault points, and the logic of stream and driver against a simulated kernel. Not part of the
//! API.

mod cuda;
mod driver;
mod harness;
#[cfg(test)]
mod regressions;
mod rng;
mod sim;

pub use crate::sys::fault::{PANIC, end_fault_plan, plan_fault, refuse_setup_flags};
pub use cuda::{ADD_PTX, exercise_streams};
pub use driver::{DriverSimReport, run_driver_seed, trace_driver_seed};
pub use harness::{SimReport, run_stream_seed, trace_stream_seed};
