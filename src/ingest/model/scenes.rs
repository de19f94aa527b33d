//! The programs that the checker runs: each a few threads at one queue.
//!
//! Two threads that wait for a third would keep the checker busy with each other for ever. So where there are more than
//! two, all but one look a few times; what is left is done once they have come to their end, when nothing has to be
//! waited for.

use super::super::producer::Refusal;
use super::super::words::{Word, Words};
use super::Scene;
use super::queue::{Queue, SLOTS, bad, good, join, publishers, spawn};
use crate::wire::{ConsumeMode, NO_SEQUENCE, Outcome, state};
use loom::thread::{self, yield_now};
use std::sync::atomic::Ordering::Relaxed;

/// A host thread publishes, a consumer pops.
pub(super) const POP: Scene = Scene {
    name: "pop",
    preemptions: 9,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let sequence = queue.producer.reserve().unwrap();
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || (reader.try_take(2), reader));
        queue.fill_and_publish(sequence);
        let (taken, reader) = join(consumer);
        assert_eq!(taken + queue.finish_at(1, &mut [reader]), 1);
    },
};

/// Two host threads publish in either order; a consumer follows by the tail alone.
pub(super) const TAIL: Scene = Scene {
    name: "tail",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let publishers = publishers(&queue);
        let mut reader = queue.consumer(0);
        assert_eq!(reader.wait_tail(1), Ok(()));
        (0..2).for_each(|sequence| queue.check_payload(sequence));
        publishers.into_iter().for_each(join);
        queue.check_told(2, NO_SEQUENCE, state::OPEN);
    },
};

/// The same, for a host thread that follows by the host's own tail.
pub(super) const HOST_TAIL: Scene = Scene {
    name: "host tail",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let publishers = publishers(&queue);
        while queue.producer.tail() < 2 {
            yield_now();
        }
        (0..2).for_each(|sequence| queue.check_payload(sequence));
        publishers.into_iter().for_each(join);
    },
};

/// Two publish; the tail passes both and never falls back.
pub(super) const TAIL_OF_TWO: Scene = Scene {
    name: "tail of two",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        publishers(&queue).into_iter().for_each(join);
        queue.check_told(2, NO_SEQUENCE, state::OPEN);
    },
};

fn wrap(first: u64) {
    let queue = Queue::starting_at(ConsumeMode::Single, 1, first);
    let mut reader = queue.consumer(0);
    let consumer = thread::spawn(move || (reader.try_take(3), reader));
    (0..4).for_each(|_| queue.try_publish());
    let (taken, reader) = join(consumer);
    assert_eq!(taken + queue.finish_at(first + 5, &mut [reader]), 5);
}

/// A slot's second sequence.
pub(super) const WRAP: Scene = Scene { name: "wrap", preemptions: 9, run: || wrap(0) };
/// A queue that begins at its last slot.
pub(super) const WRAP_AT_1: Scene = Scene { name: "wrap, from 1", preemptions: 9, run: || wrap(1) };
/// Sequences beyond 32 bits.
pub(super) const WRAP_AT_U32: Scene =
    Scene { name: "wrap, from 2^32 - 2", preemptions: 9, run: || wrap(u64::from(u32::MAX) - 1) };

/// Two threads reserve while a consumer gives back: there is a slot for both, and nothing is wrong.
pub(super) const RESERVE: Scene = Scene {
    name: "reserve",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || reader.take());
        let other = spawn(&queue, |queue| {
            let sequence = queue.producer.reserve().expect("a slot for both");
            queue.fill_and_publish(sequence);
        });
        let sequence = queue.producer.reserve().expect("a slot for both");
        queue.fill_and_publish(sequence);
        join(other);
        assert_eq!(join(consumer), Ok(0));
        queue.check_told(2, NO_SEQUENCE, state::OPEN);
    },
};

/// Counting what is free disturbs nothing.
pub(super) const FREE_SLOTS: Scene = Scene {
    name: "free slots",
    preemptions: 9,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || (reader.try_take(1), reader));
        let other = spawn(&queue, |queue| {
            let sequence = queue.producer.reserve().unwrap();
            queue.fill_and_publish(sequence);
        });
        assert!(queue.producer.free_slots() <= SLOTS);
        join(other);
        let (taken, reader) = join(consumer);
        assert_eq!(taken + queue.finish_at(1, &mut [reader]), 1);
    },
};

/// The end is announced while sequences are still to be published: they come first.
pub(super) const END_WITH_DATA: Scene = Scene {
    name: "end with data outstanding",
    preemptions: 2,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let publishers = publishers(&queue);
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || reader.take_all());
        assert!(queue.producer.finish());
        assert_eq!(queue.producer.reserve(), Err(Refusal::Ended));
        publishers.into_iter().for_each(join);
        assert_eq!(join(consumer), (2, Outcome::End));
        queue.check_told(2, NO_SEQUENCE, state::END);
    },
};

/// The end is announced while another thread reserves: what was reserved is before it, nothing after.
pub(super) const FINISH_RACES_RESERVE: Scene = Scene {
    name: "finish races with reserve",
    preemptions: 9,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let reserver = spawn(&queue, |queue| {
            let mut reserved = 0;
            while let Ok(sequence) = queue.reserve() {
                queue.fill_and_publish(sequence);
                reserved += 1;
                if reserved == 2 {
                    break;
                }
            }
            reserved
        });
        let mut reader = queue.consumer(0);
        assert!(queue.producer.finish());
        let (taken, outcome) = reader.take_all();
        assert_eq!(outcome, Outcome::End);
        assert_eq!(join(reserver), taken);
        assert_eq!(queue.words.end().load(Relaxed), taken);
        queue.check_told(taken, NO_SEQUENCE, state::END);
    },
};

/// The host gives up while it publishes.
pub(super) const ABORT_BY_HOST: Scene = Scene {
    name: "abort by the host",
    preemptions: 2,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let publishers = publishers(&queue);
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || (reader.take_all().1, reader.consumer.error()));
        assert!(queue.producer.abort(libc::ENODEV));
        assert!(!queue.producer.abort(libc::EIO));
        assert_eq!(queue.producer.reserve(), Err(Refusal::Aborted(libc::ENODEV)));
        assert_eq!(join(consumer), (Outcome::Aborted, -libc::ENODEV));
        publishers.into_iter().for_each(join);
        queue.check_told(2, NO_SEQUENCE, state::ABORTED);
    },
};

/// A consumer gives up while the host publishes: the host and the other consumer learn it.
pub(super) const ABORT_BY_READER: Scene = Scene {
    name: "abort by a consumer",
    preemptions: 4,
    run: || {
        let queue = Queue::new(ConsumeMode::Broadcast, 2);
        let [first, mut second] = [0, 1].map(|index| queue.consumer(index));
        let aborter = thread::spawn(move || first.consumer.abort(libc::EIO));
        let consumer = thread::spawn(move || (second.take_all().1, second.consumer.error()));
        let sequence = queue.producer.reserve().unwrap();
        queue.fill_and_publish(sequence);
        let seen = queue.producer.check_abort();
        assert!(seen == 0 || seen == libc::EIO);
        join(aborter);
        assert_eq!(queue.producer.check_abort(), libc::EIO);
        assert_eq!(join(consumer), (Outcome::Aborted, -libc::EIO));
        queue.check_told(1, NO_SEQUENCE, state::ABORTED);
        assert_eq!(queue.words.error().load(Relaxed), (-libc::EIO) as u32);
    },
};

/// The end and an abort at once: an abort that took place is told, and stays.
pub(super) const FINISH_RACES_ABORT: Scene = Scene {
    name: "finish races with abort",
    preemptions: 4,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let finisher = spawn(&queue, |queue| queue.producer.finish());
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || (reader.take(), reader.consumer.error()));
        assert!(queue.producer.abort(libc::ENODEV));
        let finished = join(finisher);
        match join(consumer) {
            (Err(Outcome::End), 0) => assert!(finished),
            other => assert_eq!(other, (Err(Outcome::Aborted), -libc::ENODEV)),
        }
        queue.check_told(0, NO_SEQUENCE, state::ABORTED);
    },
};

/// Two threads publish failures in either order: the first is the lower, and told before the tail passes it.
pub(super) const POISON: Scene = Scene {
    name: "poison",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let sequences = [0, 1].map(|_| queue.producer.reserve().unwrap());
        let publishers = sequences
            .map(|sequence| spawn(&queue, move |queue| assert!(queue.producer.publish(sequence, &bad(sequence)))));
        let mut reader = queue.consumer(0);
        assert_eq!(reader.wait_tail(1), Err(Outcome::Poison));
        assert_eq!(reader.wait_tail(0), Err(Outcome::Poison));
        publishers.into_iter().for_each(join);
        queue.check_told(2, 0, state::OPEN);
    },
};

/// The tail crosses poison, and who follows it knows what is before and what is after.
pub(super) const POISON_AFTER_GOOD: Scene = Scene {
    name: "poison after a good one",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let sequences = [0, 1].map(|_| queue.producer.reserve().unwrap());
        let poisoner = spawn(&queue, move |queue| assert!(queue.producer.publish(sequences[1], &bad(1))));
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || {
            assert_eq!(reader.wait_tail(0), Ok(()));
            reader.queue.check_payload(0);
            assert_eq!(reader.wait_tail(1), Err(Outcome::Poison));
        });
        queue.fill_and_publish(sequences[0]);
        join(poisoner);
        join(consumer);
        queue.check_told(2, 1, state::OPEN);
    },
};

/// A read that was given up still writes to its slot: its next sequence waits until it has ended.
pub(super) const EARLY_POISON: Scene = Scene {
    name: "early poison",
    preemptions: 9,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let sequences = [0, 1].map(|_| queue.producer.reserve().unwrap());
        queue.fill_and_publish(sequences[1]);
        let read = spawn(&queue, |queue| {
            queue.fill(0);
            queue.producer.land(0);
        });
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || (0..3).for_each(|sequence| assert_eq!(reader.take(), Ok(sequence))));
        assert!(queue.producer.poison_early(0, &bad(0)));
        assert_eq!(queue.reserve(), Ok(2));
        queue.fill_and_publish(2);
        join(read);
        join(consumer);
        queue.check_told(3, 0, state::OPEN);
    },
};

/// A deadline and the completion meet: one of them publishes, and the slot waits for the completion.
pub(super) const DEADLINE: Scene = Scene {
    name: "deadline races with completion",
    preemptions: 4,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let _both = [0, 1].map(|_| queue.producer.reserve().unwrap());
        let completion = spawn(&queue, |queue| {
            queue.fill(0);
            let published = queue.producer.publish(0, &good(0));
            if !published {
                queue.producer.land(0);
            }
            published
        });
        let deadline = spawn(&queue, |queue| queue.producer.poison_early(0, &bad(0)));
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || reader.take());
        let early = queue.producer.reserve();
        if early.is_ok() {
            queue.fill(2);
        }
        assert_ne!(join(completion), join(deadline));
        assert_eq!(join(consumer), Ok(0));
        assert_eq!(early.or_else(|_| queue.producer.reserve()), Ok(2));
        queue.fill(2);
    },
};

/// Two consumers claim what the host publishes.
pub(super) const CLAIMED: Scene = Scene {
    name: "claimed",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Claimed, 2);
        let consumers = [0, 1].map(|index| {
            let mut reader = queue.consumer(index);
            thread::spawn(move || (reader.try_take(2), reader))
        });
        queue.publish_up_to(3);
        let [(first, one), (second, two)] = consumers.map(join);
        assert_eq!(first + second + queue.finish_at(3, &mut [one, two]), 3);
    },
};

/// A consumer holds a ticket for a slot's next sequence while the one who should take its last hands the ticket back.
pub(super) const SWAP: Scene = Scene {
    name: "a swap of tickets",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Claimed, 2);
        let [mut first, mut second] = [0, 1].map(|index| queue.consumer(index));
        let sequences = [0, 1].map(|_| queue.producer.reserve().unwrap());
        assert_eq!(first.consumer.try_pop(), Err(Outcome::Timeout));
        queue.fill_and_publish(sequences[1]);
        assert_eq!(second.take(), Ok(1));
        assert_eq!(second.consumer.try_pop(), Err(Outcome::Timeout));
        assert_eq!((first.consumer.next(), second.consumer.next()), (Some(0), Some(2)));

        let leaver = thread::spawn(move || {
            let taken = first.try_take(1);
            assert!(taken == 1 || first.consumer.hand_back());
            taken
        });
        let consumer = thread::spawn(move || (second.try_take(2), second));
        queue.fill_and_publish(sequences[0]);
        queue.publish_up_to(3);
        let (taken, second) = join(consumer);
        assert_eq!(join(leaver) + taken + queue.finish_at(3, &mut [second]), 2);
    },
};

/// Two consumers hand their tickets back at once, a third takes everything.
pub(super) const HAND_BACK: Scene = Scene {
    name: "tickets handed back",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Claimed, 3);
        let mut readers = [0, 1, 2].map(|index| queue.consumer(index));
        for reader in &mut readers {
            assert_eq!(reader.consumer.try_pop(), Err(Outcome::Timeout));
        }
        let [first, second, mut third] = readers;
        queue.publish_up_to(2);
        let leavers = [first, second].map(|mut reader| thread::spawn(move || assert!(reader.consumer.hand_back())));
        let taken = third.try_take(3);
        leavers.into_iter().for_each(join);
        assert_eq!(taken + queue.finish_at(3, &mut [third]), 3);
        assert_eq!(queue.words.handed().load(Relaxed), 0);
    },
};

/// Two readers of every sequence: the last to release a slot gives it back.
pub(super) const BROADCAST: Scene = Scene {
    name: "broadcast",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Broadcast, 2);
        let consumers = [0, 1].map(|index| {
            let mut reader = queue.consumer(index);
            thread::spawn(move || (reader.try_take(2), reader))
        });
        queue.publish_up_to(3);
        let [(first, one), (second, two)] = consumers.map(join);
        // To the fifth: the first slot's releases are counted three times.
        assert_eq!(first + second + queue.finish_at(5, &mut [one, two]), 2 * 5);
    },
};

/// Everybody twice: host threads, consumers, slots.
pub(super) const TWO_BY_TWO: Scene = Scene {
    name: "two host threads, two consumers",
    preemptions: 2,
    run: || {
        let queue = Queue::new(ConsumeMode::Claimed, 2);
        let publishers = [1, 2].map(|times| spawn(&queue, move |queue| (0..times).for_each(|_| queue.try_publish())));
        let mut reader = queue.consumer(1);
        let consumer = thread::spawn(move || (reader.try_take(1), reader));
        let mut one = queue.consumer(0);
        let first = one.try_take(1);
        publishers.into_iter().for_each(join);
        let (second, two) = join(consumer);
        assert_eq!(first + second + queue.finish_at(3, &mut [one, two]), 3);
    },
};

/// A sequence is popped and its slot free before the tail has passed it.
pub(super) const LAGGING_TAIL: Scene = Scene {
    name: "a tail that lags",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let sequences = [0, 1].map(|_| queue.producer.reserve().unwrap());
        let publisher = spawn(&queue, move |queue| queue.fill_and_publish(sequences[0]));
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || (reader.try_take(2), reader));
        queue.fill_and_publish(sequences[1]);
        queue.try_publish();
        join(publisher);
        let (taken, reader) = join(consumer);
        assert_eq!(taken + queue.finish_at(3, &mut [reader]), 3);
    },
};

/// The end, for a consumer that follows by the tail alone.
pub(super) const END_BY_TAIL: Scene = Scene {
    name: "end, by the tail",
    preemptions: 3,
    run: || {
        let queue = Queue::new(ConsumeMode::Single, 1);
        let sequence = queue.producer.reserve().unwrap();
        let publisher = spawn(&queue, move |queue| queue.fill_and_publish(sequence));
        let mut reader = queue.consumer(0);
        let consumer = thread::spawn(move || {
            assert_eq!(reader.wait_tail(0), Ok(()));
            reader.queue.check_payload(0);
            assert_eq!(reader.wait_tail(1), Err(Outcome::End));
        });
        assert!(queue.producer.finish());
        join(publisher);
        join(consumer);
    },
};

macro_rules! holds {
    ($($test:ident: $scene:ident,)*) => {
        $(
            #[test]
            fn $test() {
                $scene.holds();
            }
        )*
    };
}

holds! {
    a_payload_is_whole_once_popped: POP,
    payloads_below_the_tail_are_whole: TAIL,
    payloads_below_the_hosts_tail_are_whole: HOST_TAIL,
    the_tail_never_falls_back: TAIL_OF_TWO,
    a_slot_is_reused_once_released: WRAP,
    a_queue_may_begin_at_its_last_slot: WRAP_AT_1,
    sequences_pass_32_bits: WRAP_AT_U32,
    a_reservation_finds_the_slot_that_is_there: RESERVE,
    free_slots_may_be_counted_at_any_time: FREE_SLOTS,
    a_slot_waits_for_the_tail: LAGGING_TAIL,
    the_end_comes_after_the_data: END_WITH_DATA,
    the_end_comes_after_the_tail: END_BY_TAIL,
    a_reservation_is_before_the_end_or_refused: FINISH_RACES_RESERVE,
    an_abort_beats_the_end: FINISH_RACES_ABORT,
    consumers_learn_that_the_host_aborted: ABORT_BY_HOST,
    everybody_learns_that_a_consumer_aborted: ABORT_BY_READER,
    the_lowest_failure_is_told: POISON,
    the_tail_crosses_poison: POISON_AFTER_GOOD,
    a_slot_poisoned_early_waits_for_its_read: EARLY_POISON,
    a_deadline_or_the_completion_publishes: DEADLINE,
    a_sequence_is_claimed_once: CLAIMED,
    nobody_waits_behind_a_ticket_that_was_handed_back: SWAP,
    tickets_handed_back_are_taken: HAND_BACK,
    the_last_reader_gives_the_slot_back: BROADCAST,
    two_host_threads_and_two_consumers: TWO_BY_TWO,
}
