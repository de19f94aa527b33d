//! The ways to end: everything driven to its end, closing, and a drop on another thread; and what must be true afterwards.

use super::super::super::harness::{Check, ensure};
use super::super::reads::SimReads;
use super::{LONG, Play};
use crate::wire::{ConsumeMode, state};
use std::time::Duration;

impl Play {
    /// Drives everything to its end, as a caller does who wants every byte or a decision.
    pub(super) fn complete(&mut self) -> Check {
        if self.rng.chance(800) && !self.finishing {
            self.begin();
            self.finish()?;
            self.check()?;
        }
        let patience = if self.lively { 20_000 } else { 40 };
        for _ in 0..patience {
            let ended = self.taken == self.asked.len() as u64;
            let closed = self.world().words.state() != state::OPEN;
            if ended && (!closed || self.world().all_done()) {
                break;
            }
            self.begin();
            match self.rng.below(8) {
                0..3 => {
                    let timeout = self.timeout();
                    self.turn(1, timeout)?;
                }
                3 => self.turn(0, None)?,
                4 => self.take(64)?,
                5 => self.core.reads.flight.queue.pass(20_000),
                _ => {
                    let SimReads { flight, world, .. } = &mut self.core.reads;
                    let rounds = 4 * u64::from(world.setup.queue.consumers);
                    world.bustle(&flight.queue, rounds)?;
                }
            }
            self.check()?;
        }
        let open = self.asked.iter().filter(|asked| !asked.ended).count();
        ensure!(!self.lively || open == 0, "hang: {open} requests do not end");
        self.check()?;
        self.shut(LONG)
    }

    /// As `close` and drop on the owner's thread.
    pub(super) fn shut(&mut self, limit: Duration) -> Check {
        self.begin();
        self.cancel_marked(|_| true);
        let end_due = self.world().words.state() == state::END;
        self.world().may_abort(libc::ECANCELED);
        let quiet = self.core.shut(limit);
        self.note(&format!("shut {limit:?}"), quiet);
        let held = self.core.reads.flight.in_flight();
        ensure!(quiet == (self.core.held() == 0), "shut says {quiet} with {} held", self.core.held());
        ensure!(quiet || limit < LONG, "the kernel kept {held} reads");
        self.ended_at_once(end_due)
    }

    /// As drop on another thread: nothing can be reaped.
    pub(super) fn drop_elsewhere(&mut self) -> Check {
        self.begin();
        self.cancel_marked(|_| true);
        let end_due = self.world().words.state() == state::END;
        self.world().may_abort(libc::ECANCELED);
        self.core.poison_all();
        self.note("drop on another thread", ());
        self.ended_at_once(end_due)
    }

    fn ended_at_once(&mut self, end_due: bool) -> Check {
        ensure!(self.core.in_flight() + self.core.queued() == 0, "requests are left");
        self.check()?;
        self.take(usize::MAX)?;
        self.check()?;
        ensure!(self.asked.iter().all(|asked| asked.ended), "requests without a record");
        ensure!(self.world().all_published(), "sequences are not published");
        let now = self.world().words.state();
        ensure!(if end_due { now != state::OPEN } else { now == state::ABORTED }, "the state is {now} after the end");
        self.check_telemetry()
    }

    /// The driver is gone: its stream gives up, reads still land, and consumers come to their end.
    pub(super) fn afterwards(&mut self) -> Check {
        let SimReads { flight, world, .. } = &mut self.core.reads;
        let rounds = world.rng.below(8);
        world.bustle(&flight.queue, rounds)?;
        flight.queue.begin_step();
        flight.queue.pass(world.rng.below(50_000));
        let back = flight.shut(LONG);
        ensure!(back && flight.queue.in_kernel_now() == 0, "the kernel holds on to reads");
        world.check_shadows()?;
        world.settle(&flight.queue)?;
        world.look(&flight.queue)?;
        world.check_shadows()?;
        if let Some(what) = flight.queue.violation.take().or(world.violation.take()) {
            return Err(what);
        }
        let mut last = None;
        for (number, sequence) in world.sequences.iter().enumerate() {
            ensure!(sequence.request.is_some(), "sequence {number} carries no request");
            ensure!(sequence.request > last, "sequence {number} carries {:?} after {last:?}", sequence.request);
            last = sequence.request;
        }
        if self.lively && world.state == state::END && world.words.abort() == 0 {
            let due = |number: usize| match world.setup.queue.mode {
                ConsumeMode::Broadcast => world.readers(),
                _ => u32::from(number < world.sequences.len()),
            };
            for (number, sequence) in world.sequences.iter().enumerate() {
                ensure!(sequence.popped == due(number), "sequence {number} was popped {} times", sequence.popped);
            }
        }
        world.actors.clear();
        Ok(())
    }
}
