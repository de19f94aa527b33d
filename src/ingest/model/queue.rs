//! A queue under the model checker, its readers, and what they check of what they see.

use super::super::consumer::{Consumer, Pop};
use super::super::producer::{Producer, Refusal};
use super::super::words::{Word, Words};
use super::words::LoomWords;
use crate::wire::{ConsumeMode, Descriptor, IoQueueView, NO_SEQUENCE, Outcome, state};
use loom::thread::{self, JoinHandle, yield_now};
use std::rc::Rc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

const EPOCH: u64 = 77;
pub(super) const SLOTS: u32 = 2;

/// A queue of two slots. What is in a slot, and the tag, tell the sequence.
pub(super) struct Queue {
    pub(super) producer: Producer<LoomWords>,
    pub(super) words: LoomWords,
    view: IoQueueView,
    mode: ConsumeMode,
}

impl Queue {
    pub(super) fn new(mode: ConsumeMode, consumers: u32) -> Rc<Self> {
        Self::starting_at(mode, consumers, 0)
    }

    pub(super) fn starting_at(mode: ConsumeMode, consumers: u32, first: u64) -> Rc<Self> {
        let words = LoomWords::new(SLOTS as usize, consumers as usize, EPOCH, first);
        for consumer in 0..consumers {
            let begin = if mode == ConsumeMode::Claimed { 0 } else { first };
            words.ticket(consumer).store(begin, Relaxed);
        }
        let view = IoQueueView {
            slot_count: SLOTS,
            slot_stride: 64,
            slot_bytes: 64,
            epoch: EPOCH,
            consumers,
            ..IoQueueView::default()
        };
        Rc::new(Self { producer: Producer::new(words.clone(), SLOTS, first), words, view, mode })
    }

    pub(super) fn consumer(self: &Rc<Self>, index: u32) -> Reader {
        let consumer = Consumer::new(self.words.clone(), &self.view, self.mode, index);
        Reader { consumer, queue: self.clone() }
    }

    pub(super) fn fill(&self, sequence: u64) {
        self.words.fill((sequence % u64::from(SLOTS)) as usize, sequence);
    }

    /// That a sequence's payload is whole.
    pub(super) fn check_payload(&self, sequence: u64) {
        assert_eq!(self.words.payload((sequence % u64::from(SLOTS)) as usize), sequence, "another sequence's payload");
    }

    /// Reserves, waiting for credit.
    pub(super) fn reserve(&self) -> Result<u64, Refusal> {
        loop {
            match self.producer.reserve() {
                Err(Refusal::NoCredit | Refusal::Held) => yield_now(),
                other => return other,
            }
        }
    }

    pub(super) fn fill_and_publish(&self, sequence: u64) {
        self.fill(sequence);
        assert!(self.producer.publish(sequence, &good(sequence)));
    }

    /// Publishes what there is a slot for, up to a sequence.
    pub(super) fn publish_up_to(&self, end: u64) {
        (self.producer.reserved()..end).for_each(|_| self.try_publish());
    }

    /// Publishes a sequence, if there is a slot.
    pub(super) fn try_publish(&self) {
        if let Ok(sequence) = self.producer.reserve() {
            self.fill_and_publish(sequence);
        }
    }

    /// Publishes the rest up to a sequence and the end, and has the readers take all; how many that were. Every other
    /// thread has come to its end.
    pub(super) fn finish_at(&self, end: u64, readers: &mut [Reader]) -> u64 {
        let mut taken = 0;
        loop {
            self.publish_up_to(end);
            match readers.iter_mut().map(|reader| reader.try_take(1)).sum() {
                0 => break,
                some => taken += some,
            }
        }
        assert_eq!(self.producer.reserved(), end, "a slot is never given back");
        assert!(self.producer.finish());
        for reader in readers {
            assert_eq!(reader.consumer.try_pop(), Err(Outcome::End));
        }
        self.check_told(end, NO_SEQUENCE, state::END);
        taken
    }

    /// What every word of the host's says once all is over.
    pub(super) fn check_told(&self, tail: u64, first_bad: u64, state: u32) {
        assert_eq!(self.producer.tail(), tail, "the host's tail");
        assert_eq!(self.words.tail().load(Acquire), tail, "the tail word");
        assert_eq!(self.words.first_bad().load(Relaxed), first_bad, "first_bad");
        assert_eq!(self.words.state().load(Acquire), state, "the state word");
    }
}

pub(super) struct Reader {
    pub(super) consumer: Consumer<LoomWords>,
    pub(super) queue: Rc<Queue>,
}

impl Reader {
    /// Pops, waiting; what was popped is whole.
    pub(super) fn pop(&mut self) -> Pop {
        loop {
            match self.consumer.try_pop() {
                Err(Outcome::Timeout) => yield_now(),
                other => return other.inspect(|popped| self.check(popped.sequence, &popped.descriptor)),
            }
        }
    }

    pub(super) fn check(&self, sequence: u64, descriptor: &Descriptor) {
        assert_eq!(descriptor.tag, sequence, "another sequence's descriptor");
        if descriptor.status == 0 {
            self.queue.check_payload(sequence);
        }
    }

    /// Pops one and releases it.
    pub(super) fn take(&mut self) -> Result<u64, Outcome> {
        let popped = self.pop()?;
        self.consumer.release(popped.sequence);
        Ok(popped.sequence)
    }

    /// Takes what is there, in so many looks; how many those were.
    pub(super) fn try_take(&mut self, looks: u32) -> u64 {
        let mut taken = 0;
        for _ in 0..looks {
            if let Ok(popped) = self.consumer.try_pop() {
                self.check(popped.sequence, &popped.descriptor);
                self.consumer.release(popped.sequence);
                taken += 1;
            }
        }
        taken
    }

    /// Takes what comes until nothing does; how many those were, and why nothing more.
    pub(super) fn take_all(&mut self) -> (u64, Outcome) {
        let mut taken = 0;
        loop {
            match self.take() {
                Ok(_) => taken += 1,
                Err(outcome) => return (taken, outcome),
            }
        }
    }

    /// Waits for the tail.
    pub(super) fn wait_tail(&mut self, sequence: u64) -> Result<(), Outcome> {
        loop {
            match self.consumer.look_at_tail(sequence) {
                Err(Outcome::Timeout) => yield_now(),
                other => return other,
            }
        }
    }
}

pub(super) fn good(sequence: u64) -> Descriptor {
    Descriptor { bytes: 8, tag: sequence, ..Descriptor::default() }
}

pub(super) fn bad(sequence: u64) -> Descriptor {
    Descriptor { status: -libc::EIO, tag: sequence, ..Descriptor::default() }
}

pub(super) fn spawn<R: 'static>(queue: &Rc<Queue>, run: impl FnOnce(&Rc<Queue>) -> R + 'static) -> JoinHandle<R> {
    let queue = queue.clone();
    thread::spawn(move || run(&queue))
}

/// A thread each for the first two sequences.
pub(super) fn publishers(queue: &Rc<Queue>) -> [JoinHandle<()>; 2] {
    let sequences = [0, 1].map(|_| queue.producer.reserve().unwrap());
    sequences.map(|sequence| spawn(queue, move |queue| queue.fill_and_publish(sequence)))
}

pub(super) fn join<R>(thread: JoinHandle<R>) -> R {
    thread.join().expect("a thread's end")
}
