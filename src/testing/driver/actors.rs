//! Consumers of every temper, and what each pop must give.

use super::super::harness::{Check, ensure};
use super::super::rng::Rng;
use super::super::sim::Sim;
use super::Fault;
use super::consumers::{Consumer, Item};
use super::world::World;
use crate::wire::{ConsumeMode, NO_SEQUENCE, Outcome, state};
use std::sync::atomic::Ordering;

/// How a consumer behaves. Chances are per mille, for each time it could act.
#[derive(Debug, Clone)]
pub(super) struct Temper {
    /// That it acts.
    pub(super) pace: u64,
    /// Most slots that it holds.
    pub(super) hold: usize,
    pub(super) release: u64,
    /// Slots are released in any order.
    pub(super) shuffled: bool,
    /// Pops after which it does nothing any more.
    pub(super) stuck_after: u64,
    pub(super) never_releases: bool,
    pub(super) aborts: u64,
    pub(super) hands_back: u64,
    /// Another consumer takes its place.
    pub(super) replaced: u64,
    pub(super) watches_tail: u64,
    /// That a consumer in this place is the device header's.
    pub(super) device: u64,
}

impl Temper {
    pub(super) fn new(rng: &mut Rng, slots: usize) -> Self {
        Self {
            pace: rng.pick(&[1000, 1000, 500, 100]),
            hold: rng.pick(&[1, 1, 2, slots]),
            release: rng.pick(&[900, 500, 100]),
            shuffled: rng.chance(500),
            stuck_after: u64::MAX,
            never_releases: false,
            aborts: 0,
            hands_back: rng.pick(&[0, 30, 300]),
            replaced: rng.pick(&[0, 20, 100]),
            watches_tail: rng.pick(&[0, 100]),
            device: rng.pick(&[0, 500, 1000]),
        }
    }

    pub(super) fn is_lively(&self) -> bool {
        self.stuck_after == u64::MAX && !self.never_releases
    }
}

/// A consumer at work.
pub(super) struct Actor {
    index: u32,
    temper: Temper,
    consumer: Consumer,
    held: Vec<Item>,
    popped: u64,
    /// END or ABORTED.
    pub(super) done: Option<Outcome>,
}

impl Actor {
    pub(super) fn new(world: &mut World, index: u32, temper: Temper) -> Check<Self> {
        let consumer = make(world, index, &temper)?;
        Ok(Self { index, temper, consumer, held: Vec::new(), popped: 0, done: None })
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.popped >= self.temper.stuck_after
    }

    /// The sequence that the next pop must be for; none in claimed mode.
    fn expected(&self, world: &World) -> Option<u64> {
        match world.setup.queue.mode {
            ConsumeMode::Claimed => None,
            ConsumeMode::Partitioned => {
                Some(u64::from(self.index) + self.popped * u64::from(world.setup.queue.consumers))
            }
            ConsumeMode::Single | ConsumeMode::Broadcast => Some(self.popped),
        }
    }

    /// One thing that a consumer may do.
    fn act(&mut self, world: &mut World, hurry: bool) -> Check {
        if self.is_stuck() || !hurry && !world.rng.chance(self.temper.pace) {
            return Ok(());
        }
        let Temper { aborts, hands_back, replaced, watches_tail, release, hold, never_releases, .. } = self.temper;
        if !hurry && self.done.is_none() && world.rng.chance(aborts) {
            return self.abort(world);
        }
        if world.rng.chance(watches_tail) {
            self.watch(world)?;
        }
        if world.rng.chance(hands_back) {
            self.hand_back(world)?;
        }
        if self.held.is_empty() && self.done.is_none() && world.rng.chance(replaced) {
            self.replace(world)?;
        }
        let full = self.held.len() >= hold;
        if !never_releases && !self.held.is_empty() && (full || self.done.is_some() || world.rng.chance(release)) {
            return self.release(world);
        }
        if !full { self.pop(world) } else { Ok(()) }
    }

    fn abort(&mut self, world: &mut World) -> Check {
        let errno = world.rng.pick(&[libc::EIO, libc::ENOSPC, 1, 4095]);
        let before = world.words.abort();
        self.consumer.abort(errno);
        let after = world.words.abort();
        ensure!(after == if before == 0 { -errno } else { before }, "the abort word went from {before} to {after}");
        if before == 0 {
            world.may_abort(errno);
        }
        Ok(())
    }

    fn pop(&mut self, world: &mut World) -> Check {
        let expected = self.expected(world);
        if let Some(expected) = expected {
            ensure!(self.consumer.next() == Some(expected), "waits for {:?}, {expected} is due", self.consumer.next());
        }
        let known = self.consumer.error();
        let (outcome, item) = self.consumer.try_pop()?;
        if world.trace {
            let sequence = item.as_ref().map(|item| item.sequence);
            eprintln!(
                "              consumer {} ({}): {outcome:?} {sequence:?}",
                self.index,
                self.consumer.is_device()
            );
        }
        self.check_pop(world, outcome, item.as_ref(), expected, known).map_err(|what| {
            format!("consumer {} (device: {}) got {outcome:?}: {what}", self.index, self.consumer.is_device())
        })?;
        if let Some(item) = item {
            self.popped += 1;
            world.pops += 1;
            world.sequences[item.sequence as usize].popped += 1;
            self.held.push(item);
            if world.setup.queue.mode == ConsumeMode::Claimed && world.mischief.now(Fault::TicketTwice) {
                world.words.claim().fetch_sub(1, Ordering::Relaxed);
            }
        }
        // One that goes on after END may yet get a ticket that another has handed back.
        self.done = matches!(outcome, Outcome::End | Outcome::Aborted).then_some(outcome);
        Ok(())
    }

    fn check_pop(
        &self,
        world: &World,
        outcome: Outcome,
        item: Option<&Item>,
        expected: Option<u64>,
        known: i32,
    ) -> Check {
        let words = &world.words;
        let aborted = words.abort() != 0 || words.state() == state::ABORTED;
        ensure!(aborted == (outcome == Outcome::Aborted), "aborted is {aborted}");
        match (outcome, item) {
            (Outcome::Ok | Outcome::Poison, Some(item)) => self.check_item(world, outcome, item, expected),
            (Outcome::Aborted, None) => {
                let error = self.consumer.error();
                let theirs = words.abort();
                // A consumer keeps the first error that it saw.
                let wanted = [known, theirs, words.error()].into_iter().find(|&error| error != 0).unwrap_or(0);
                ensure!(error == wanted, "its error is {error}, {wanted} is due");
                ensure!(error < 0, "its error is {error}");
                Ok(())
            }
            (Outcome::End | Outcome::Timeout, None) => {
                let waits = expected.or(self.consumer.next()).ok_or("waits for nothing")?;
                let there = world.sequence(waits).is_some_and(|sequence| sequence.published.is_some());
                // A sequence further back has had the slot since: it was popped.
                ensure!(!there, "sequence {waits} is there");
                let over = words.state() == state::END && waits >= words.end();
                ensure!(over == (outcome == Outcome::End), "waits for {waits}, the end is {}", words.end());
                if world.setup.queue.mode == ConsumeMode::Claimed {
                    let lower = words.tickets().find(|&ticket| ticket < waits);
                    ensure!(lower.is_none(), "waits for {waits}, and nobody for {lower:?}");
                }
                Ok(())
            }
            _ => Err("an item, or none".to_owned()),
        }
    }

    fn check_item(&self, world: &World, outcome: Outcome, item: &Item, expected: Option<u64>) -> Check {
        let number = item.sequence;
        ensure!(expected.is_none_or(|expected| expected == number), "sequence {number} instead of {expected:?}");
        let sequence = world.sequence(number).ok_or("a sequence that nobody reserved")?;
        let published = sequence.published.ok_or_else(|| format!("sequence {number} is not published"))?;
        ensure!(item.descriptor == published, "{:?} instead of {published:?}", item.descriptor);
        ensure!((outcome == Outcome::Poison) == (published.status != 0), "status {}", published.status);
        let taken = if world.setup.queue.mode == ConsumeMode::Broadcast { world.readers() } else { 1 };
        ensure!(sequence.popped < taken, "sequence {number} was popped before");
        let (address, len) = item.payload;
        let place = world.words.slot_address(number) + u64::from(published.data_offset);
        ensure!(
            len == published.bytes as usize && (len == 0 || address == place),
            "the payload is said to be elsewhere"
        );
        world.check_shadow(number)
    }

    fn release(&mut self, world: &mut World) -> Check {
        let index = if self.temper.shuffled { world.rng.index(self.held.len()) } else { 0 };
        let item = self.held.remove(index);
        let number = item.sequence;
        world.check_shadow(number)?;
        let before = world.words.released(number);
        if world.trace {
            eprintln!("              consumer {} releases {number}", self.index);
        }
        self.consumer.release(item)?;
        let readers = world.readers();
        let sequence = &mut world.sequences[number as usize];
        sequence.released += 1;
        ensure!(sequence.released <= readers, "sequence {number} was released too often");
        let due = if sequence.released == readers { number + 1 } else { before };
        let released = world.words.released(number);
        ensure!(released == due, "released is {released}, {due} is due");
        Ok(())
    }

    fn hand_back(&mut self, world: &World) -> Check {
        let ticket = self.consumer.next().filter(|_| world.setup.queue.mode == ConsumeMode::Claimed);
        let done = self.consumer.hand_back();
        // After an abort nobody needs a ticket.
        if self.done != Some(Outcome::Aborted) {
            ensure!(done == ticket.is_some(), "handing {ticket:?} back said {done}");
        }
        ensure!(!done || self.consumer.next().is_none(), "handed back, and still held");
        Ok(())
    }

    fn replace(&mut self, world: &mut World) -> Check {
        self.hand_back(world)?;
        // One at a time has an index: the old one goes first.
        self.consumer = Consumer::device(&world.queue, self.index);
        self.consumer = make(world, self.index, &self.temper)?;
        Ok(())
    }

    fn watch(&mut self, world: &World) -> Check {
        let words = &world.words;
        let tail = words.tail();
        let n = (tail + 2).saturating_sub(world.slots() / 2 + 1);
        let bad = words.first_bad() != NO_SEQUENCE && words.first_bad() <= n;
        let over = words.state() == state::END && n >= words.end();
        let due = if tail > n {
            if bad { Outcome::Poison } else { Outcome::Ok }
        } else if words.abort() != 0 || words.state() == state::ABORTED || self.consumer.error() != 0 {
            Outcome::Aborted
        } else if bad {
            Outcome::Poison
        } else if over {
            Outcome::End
        } else {
            Outcome::Timeout
        };
        let found = self.consumer.look_at_tail(n)?;
        ensure!(found == due, "looked for {n} at tail {tail}: {found:?} instead of {due:?}");
        Ok(())
    }
}

fn make(world: &mut World, index: u32, temper: &Temper) -> Check<Consumer> {
    if world.rng.chance(temper.device) {
        return Ok(Consumer::device(&world.queue, index));
    }
    Consumer::host(&world.queue, index)
}

impl World {
    /// Some consumers do something.
    pub(super) fn bustle(&mut self, sim: &Sim<'_>, rounds: u64) -> Check {
        for _ in 0..rounds {
            let index = self.rng.index(self.actors.len());
            self.act(index, sim, false)?;
        }
        Ok(())
    }

    fn act(&mut self, index: usize, sim: &Sim<'_>, hurry: bool) -> Check {
        self.scan(sim)?;
        let Some(mut actor) = self.actors[index].take() else { return Ok(()) };
        let acted = actor.act(self, hurry);
        self.actors[index] = Some(actor);
        acted
    }

    /// Whether every consumer that is not stuck has come to its end.
    pub(super) fn all_done(&self) -> bool {
        self.actors.iter().flatten().all(|actor| actor.done.is_some() || actor.is_stuck())
    }

    /// With the queue closed and everything published, each consumer comes to its end by itself.
    pub(super) fn settle(&mut self, sim: &Sim<'_>) -> Check {
        // What they hold does not matter: nothing more is waited for.
        for round in 0u64.. {
            if self.all_done() {
                break;
            }
            ensure!(round < 200 + 40 * self.sequences.len() as u64, "hang: consumers do not come to their end");
            for index in 0..self.actors.len() {
                let stubborn = self.actors[index].as_ref().is_some_and(|actor| actor.temper.never_releases);
                if stubborn && let Some(actor) = &mut self.actors[index] {
                    actor.temper.hold = usize::MAX;
                }
                self.act(index, sim, true)?;
            }
        }
        Ok(())
    }
}
