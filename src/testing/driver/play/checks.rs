//! What must hold after every step, the driver's telemetry, and the faults that need no help of the driver.

use super::super::super::harness::{Check, ensure};
use super::super::Fault;
use super::super::reads::SimReads;
use super::super::world::World;
use super::{Play, Sums};
use crate::ingest::NvmeGpuIngestTelemetry;
use crate::wire::state;
use std::sync::atomic::Ordering;
use std::time::Duration;

impl Play {
    pub(super) fn reset(&mut self) -> Check {
        self.take(usize::MAX)?;
        self.check_telemetry()?;
        self.core.reset_telemetry();
        let short = self.short_reads();
        let (since, bounced, reading) = (self.clock(), self.bounced(), self.core.in_flight() as u64);
        let world = &mut self.core.reads.world;
        // A stall that goes on counts; here it may have ended.
        world.stalls_most = u64::from(world.stalled_most == Some(world.sequences.len() as u64));
        (world.stalls_least, world.stalled_least) = (0, None);
        world.max_in_flight = reading;
        self.sums = Sums {
            since,
            published: world.published,
            poisoned: world.poisoned,
            early: world.early,
            short,
            bounced,
            ..Sums::default()
        };
        self.sums.telemetry.max_queued = self.core.queued() as u64;
        Ok(())
    }

    /// Faults that need no help of the driver.
    pub(super) fn mischief(&mut self) {
        let world = &mut self.core.reads.world;
        let words = world.words;
        let tail = words.tail();
        let reserved = world.sequences.len() as u64;
        let last = (reserved.saturating_sub(world.slots())..reserved).rev();
        let last: Vec<u64> = last
            .filter(|&number| {
                let sequence = &world.sequences[number as usize];
                sequence.published.is_some() && !sequence.early()
            })
            .collect();
        // The next slot to be filled.
        let mut held = last.iter().rev().filter(|&&number| world.sequences[number as usize].released < world.readers());
        if let Some(&number) = held.next()
            && world.mischief.now(Fault::CreditForged)
        {
            words.set_released(number);
        }
        if let Some(&number) = last.first() {
            if world.mischief.now(Fault::SlotSpoiled) {
                words.spoil(number, world.rng.below(world.setup.stride));
            }
            if world.mischief.now(Fault::DescriptorSpoiled) {
                words.descriptor_word(number, 2).fetch_xor(1, Ordering::Relaxed);
            }
        }
        if world.mischief.now(Fault::TailAhead) {
            words.set_tail(tail + 1);
        }
        if tail > 0 && world.mischief.now(Fault::TailBack) {
            words.set_tail(tail - 1);
        }
        if words.state() == state::OPEN && world.mischief.now(Fault::EndTooSoon) {
            words.set_state(state::END);
        }
    }

    // Checks

    pub(super) fn check(&mut self) -> Check {
        let SimReads { flight, world, .. } = &mut self.core.reads;
        if let Some(what) = flight.queue.violation.take().or(world.violation.take()) {
            return Err(what);
        }
        world.note_stall(flight);
        world.look(&flight.queue)?;
        if world.rng.chance(300) {
            world.check_shadows()?;
        }
        let (reading, held) = (self.core.in_flight(), self.core.held());
        let known = world_counts(&self.core.reads.world);
        ensure!((reading, held) == known, "{reading} in flight and {held} held, {known:?} are due");
        let flight = &self.core.reads.flight;
        let flying = flight.in_flight() as usize;
        // A read that needs no command has ended before the driver is told.
        let reads = flying + flight.ready();
        ensure!(reads == reading + held, "{reads} reads for {reading} in flight and {held} held");
        ensure!(flying <= self.setup.depth, "{flying} reads in flight");
        let sum = (reading + self.core.queued() + self.core.ready()) as u64 + self.taken;
        ensure!(sum == self.asked.len() as u64, "{sum} requests of {}", self.asked.len());
        ensure!(self.core.queued() <= self.setup.queue_limit, "{} queued", self.core.queued());
        Ok(())
    }

    fn bounced(&self) -> u64 {
        let sequences = self.core.reads.world.sequences.iter();
        sequences.filter_map(|sequence| sequence.told).map(|told| told.bounced).sum()
    }

    fn short_reads(&self) -> u64 {
        self.sim().attempts.iter().map(|attempt| attempt.short).sum()
    }

    /// All records are taken.
    pub(super) fn check_telemetry(&mut self) -> Check {
        let found = self.core.telemetry();
        let (bounced, short) = (self.bounced(), self.short_reads());
        let world = &self.core.reads.world;
        let sums = &mut self.sums;
        let most = u64::from(world.stalls_most > 0);
        ensure!(
            (world.stalls_least..=world.stalls_most).contains(&found.credit_stalls),
            "{} stalls, {} to {} are due",
            found.credit_stalls,
            world.stalls_least,
            world.stalls_most
        );
        let passed = Duration::from_nanos(self.core.reads.flight.queue.clock() - sums.since);
        ensure!(
            found.credit_stall_time <= passed * most as u32,
            "stalled for {:?} of {passed:?}",
            found.credit_stall_time
        );
        let retries = self.core.reads.flight.queue.attempts.iter().map(|attempt| attempt.errors.len() as u64).sum();
        ensure!(found.retries <= retries, "{} retries of {retries}", found.retries);
        let latency = found.latency;
        sums.latencies.sort_unstable();
        let rank = |per_mille: usize| {
            let rank = (sums.latencies.len() * per_mille).div_ceil(1000);
            sums.latencies.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        for (quantile, exact) in [(latency.p50, rank(500)), (latency.p99, rank(990)), (latency.p999, rank(999))] {
            ensure!(quantile >= exact && quantile <= exact + exact / 16, "a quantile of {exact:?} is {quantile:?}");
        }
        ensure!(latency.max == rank(1000), "the slowest took {:?}", rank(1000));
        ensure!(latency.count == sums.latencies.len() as u64, "{} latencies", latency.count);
        let due = NvmeGpuIngestTelemetry {
            bounce_bytes: bounced - sums.bounced,
            short_reads: short - sums.short,
            retries: found.retries,
            published_slots: world.published - sums.published,
            poisoned_slots: world.poisoned - sums.poisoned,
            early_poisoned_slots: world.early - sums.early,
            held_slots: self.core.held() as u64,
            leaked_reads: 0,
            credit_stalls: found.credit_stalls,
            credit_stall_time: found.credit_stall_time,
            in_flight: self.core.in_flight() as u64,
            max_in_flight: world.max_in_flight,
            queued: self.core.queued() as u64,
            latency,
            ..sums.telemetry
        };
        ensure!(found == due, "the driver counted\n{found:?}, due is\n{due:?}");
        Ok(())
    }
}

/// Reads in flight, and slots held.
fn world_counts(world: &World) -> (usize, usize) {
    let first = world.sequences.len().saturating_sub(world.slots() as usize);
    let recent = &world.sequences[first..];
    let reading = recent.iter().filter(|sequence| sequence.published.is_none()).count();
    (reading, recent.iter().filter(|sequence| sequence.held()).count())
}
