//! Fault points: with the feature `testing`, the k-th system or CUDA driver call of a thread can be made to fail. For a
//! driver call the planned errno stands for a `CUresult`.
//!
//! Without the feature both functions vanish.

#[cfg(feature = "testing")]
pub use enabled::*;

/// Called before a system call; an `Err` takes the place of the call's own failure.
#[cfg(not(feature = "testing"))]
#[inline(always)]
pub(crate) fn point(_call: &'static str) -> Result<(), super::Errno> {
    Ok(())
}

/// Setup flags that the kernel is to be thought to refuse.
#[cfg(not(feature = "testing"))]
#[inline(always)]
pub(crate) fn refused_setup_flags() -> u32 {
    0
}

#[cfg(feature = "testing")]
mod enabled {
    use super::super::Errno;
    use std::cell::{Cell, RefCell};

    struct Plan {
        fail_at: u64,
        errno: Errno,
        calls: Vec<&'static str>,
    }

    thread_local! {
        static PLAN: RefCell<Option<Plan>> = const { RefCell::new(None) };
        static REFUSED: Cell<u32> = const { Cell::new(0) };
    }

    /// As an errno of [`plan_fault`]: panic.
    pub const PANIC: i32 = i32::MIN;

    /// Makes the `k`-th system call of this thread (from 1) fail with `errno`; 0 only counts.
    pub fn plan_fault(k: u64, errno: i32) {
        PLAN.with(|plan| *plan.borrow_mut() = Some(Plan { fail_at: k, errno, calls: Vec::new() }));
    }

    /// Ends the plan and returns the calls that were made under it, in order.
    pub fn end_fault_plan() -> Vec<&'static str> {
        PLAN.with(|plan| plan.borrow_mut().take().map_or_else(Vec::new, |plan| plan.calls))
    }

    /// Makes `io_uring_setup` on this thread answer EINVAL when any of these flags is asked for.
    pub fn refuse_setup_flags(flags: u32) {
        REFUSED.with(|refused| refused.set(flags));
    }

    pub(crate) fn refused_setup_flags() -> u32 {
        REFUSED.with(Cell::get)
    }

    pub(crate) fn point(call: &'static str) -> Result<(), Errno> {
        PLAN.with(|plan| {
            let mut plan = plan.borrow_mut();
            let Some(plan) = plan.as_mut() else { return Ok(()) };
            plan.calls.push(call);
            match plan.calls.len() as u64 == plan.fail_at {
                true if plan.errno == PANIC => panic!("a planned panic in {call}"),
                true => Err(plan.errno),
                false => Ok(()),
            }
        })
    }
}
