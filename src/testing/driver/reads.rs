//! The driver's reads against the simulated kernel, with consumers at work whenever the driver waits.

use super::super::sim::{Attempt, Sim};
use super::Fault;
use super::world::World;
use crate::error::{PipelineError, Result};
use crate::ingest::{Reads, SlotRead};
use crate::uring::{Completion, FileRef, Flight, Queue, Request, StreamStats};
use std::time::Duration;

/// See the module's text.
pub(super) struct SimReads {
    pub(super) flight: Flight<'static, Sim<'static>>,
    pub(super) world: World,
    /// Reads whose end was told too early, by a deliberate fault.
    told_early: Vec<u64>,
    /// Reads were started since the last turn; and before the last one.
    fresh: bool,
    pub(super) was_fresh: bool,
}

impl SimReads {
    pub(super) fn new(flight: Flight<'static, Sim<'static>>, world: World) -> Self {
        Self { flight, world, told_early: Vec::new(), fresh: false, was_fresh: false }
    }

    /// Consumers, and the rest of the host's program, go on beside the driver.
    fn bustle(&mut self) {
        let Self { flight, world, .. } = self;
        world.note_stall(flight);
        let rounds = world.rng.below(4);
        let done = world.bustle(&flight.queue, rounds);
        let done = done.and_then(|()| match world.setup.host_abort > 0 && world.rng.chance(world.setup.host_abort) {
            true => world.host_abort(libc::ESHUTDOWN),
            false => Ok(()),
        });
        let done = done.and_then(|()| world.scan(&flight.queue));
        world.keep(done);
    }

    /// Tells the driver of an end that has not come.
    fn tell_early(&mut self, fault: Fault, each: &mut impl FnMut(&Completion, &dyn Fn() -> Duration)) {
        let Self { flight, world, told_early, .. } = self;
        let held = fault == Fault::LandEarly;
        for (number, sequence) in world.sequences.iter().enumerate() {
            let Ok(read) = sequence.number else { continue };
            if sequence.told.is_some() || sequence.early() != held || told_early.contains(&read) || sequence.len == 0 {
                continue;
            }
            if flight.queue.attempts[read as usize].landed == 0 && world.mischief.now(fault) {
                told_early.push(read);
                let bytes = sequence.len as u64;
                let early = Completion { sequence: read, user_data: number as u64, bytes, ..Completion::default() };
                let now = flight.queue.now();
                return each(&early, &|| now);
            }
        }
    }
}

impl World {
    /// Keeps the first thing found wrong.
    pub(super) fn keep(&mut self, found: std::result::Result<(), String>) {
        if let (Err(what), None) = (found, &self.violation) {
            self.violation = Some(what);
        }
    }
}

impl Reads for SimReads {
    fn resolve(&self, file: FileRef) -> Result<FileRef> {
        Ok(file)
    }

    fn count_user(&mut self, file: &FileRef, change: i32) {
        self.flight.queue.count_user(file, change);
    }

    fn submit(&mut self, read: SlotRead) -> Result<u64> {
        self.fresh = true;
        let Self { flight, world, .. } = self;
        let begun = world.begin(&read, &flight.queue);
        let begun_well = begun.is_ok();
        world.keep(begun);
        let refused = PipelineError::invalid("a read", "the simulator refuses it");
        if !begun_well || world.rng.chance(world.setup.refuse) {
            if let Some(sequence) = world.sequences.last_mut() {
                sequence.number = Err(refused.errno());
            }
            return Err(refused);
        }
        let SlotRead { file, file_offset, offset, len, slack, user_data } = read;
        let segments = [(offset, len)];
        flight.queue.attempts.push(Attempt {
            file: world.sequences[user_data as usize].file,
            file_offset,
            region: flight.home().region().address(0),
            segments: segments.to_vec(),
            requested: len as u64,
            slack,
            ..Attempt::default()
        });
        // Noise: bytes that never come cannot be right by chance.
        let mut noise = vec![0; len];
        world.rng.fill(&mut noise);
        flight.home().region().copy_in(offset, &noise);
        let request =
            Request { file, file_offset, target: None, segments: &segments, buffer_offset: 0, user_data, slack };
        let submitted = flight.submit(request);
        match &submitted {
            Ok(number) => world.sequences[user_data as usize].number = Ok(*number),
            Err(error) => world.keep(Err(format!("the stream refused a read: {error}"))),
        }
        world.note_stall(flight);
        submitted
    }

    fn turn(
        &mut self,
        min: usize,
        timeout: Option<Duration>,
        mut each: impl FnMut(&Completion, &dyn Fn() -> Duration),
    ) -> Result<()> {
        self.was_fresh = std::mem::take(&mut self.fresh);
        self.bustle();
        self.tell_early(Fault::PublishEarly, &mut each);
        self.tell_early(Fault::LandEarly, &mut each);
        let driven = self.flight.drive(min, timeout);
        let Self { flight, world, told_early, .. } = self;
        let now = flight.queue.now();
        flight.take_all(|completion| {
            let mut told = *completion;
            if told_early.contains(&completion.sequence) || world.mischief.now(Fault::EndLost) {
                return;
            }
            let ended = world.ended(completion);
            world.keep(ended);
            if told.status != 0 && world.mischief.now(Fault::ErrnoLost) {
                told.status = 0;
            }
            each(&told, &|| now);
        });
        // As if they had worked meanwhile; what has just ended is not published yet.
        let done = world.bustle(&flight.queue, 1);
        world.keep(done);
        match driven {
            Err(PipelineError::TimedOut { .. }) => Ok(()),
            other => other,
        }
    }

    fn cancel(&mut self, number: u64) {
        let _ = self.flight.cancel(number);
    }

    fn in_flight(&self) -> usize {
        self.flight.in_flight() as usize
    }

    fn now(&self) -> Duration {
        self.flight.queue.now()
    }

    fn pause(&mut self, time: Duration) {
        Queue::pause(&mut self.flight.queue, time);
        self.bustle();
    }

    fn stats(&self) -> StreamStats {
        self.flight.stats()
    }
}
