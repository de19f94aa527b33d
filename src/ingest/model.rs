//! The io_queue protocol under a model checker.
//!
//! [`loom`] runs the code of `producer` and `consumer` in every order of its threads' steps (up to a number of
//! preemptions) and with every value that the language lets a relaxed load find. `scenes` are the programs, `mutants`
//! the faults that they must find; so an order or a rule that nothing needs is known to be one.

mod mutants;
mod mutation;
mod queue;
mod scenes;
mod words;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

// The checker is not complete: it remembers the last access to a word alone, so of two threads that load a word before
// one of them stores to it, it may not try the other's load after the store. Hence several scenes for each rule.

/// A program to be checked.
#[derive(Debug, Clone, Copy)]
struct Scene {
    name: &'static str,
    /// Most switches away from a thread that could go on.
    preemptions: usize,
    run: fn(),
}

/// What the checker found.
struct Verdict {
    executions: u32,
    seconds: f32,
    failure: Option<String>,
}

impl Scene {
    fn check(&self) -> Verdict {
        let executions = Arc::new(AtomicU32::new(0));
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(self.preemptions);
        builder.max_branches = 2_000;
        let run = self.run;
        let counter = executions.clone();
        let begin = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| {
            builder.check(move || {
                counter.fetch_add(1, Ordering::Relaxed);
                mutation::forget();
                run();
            });
        }));
        let failure = result.err().map(|panic| match panic.downcast_ref::<String>() {
            Some(text) => text.clone(),
            None => panic.downcast_ref::<&str>().map_or_else(String::new, ToString::to_string),
        });
        Verdict { executions: executions.load(Ordering::Relaxed), seconds: begin.elapsed().as_secs_f32(), failure }
    }

    /// Checks the scene, which must hold.
    fn holds(&self) {
        let verdict = self.check();
        let Verdict { executions, seconds, failure } = verdict;
        println!("figure: loom {}: {executions} executions, {seconds:.1} s", self.name);
        assert_eq!(failure, None, "{}", self.name);
    }
}
