//! Faults, each with a scene that finds it: so every order and every rule is there for a reason.

use super::Scene;
use super::mutation::{self, Change, Mutation};
use super::scenes::*;
use Change::{After, Finds, FindsLatest, OnFailure, Order, Skips};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

const fn fault(function: &'static str, at: &'static str, change: Change) -> Mutation {
    Mutation { function, at, change }
}

/// What a scene says that found its fault.
const RACE: &str = "Causality violation";
/// The same, for a loop that waits for what never comes.
const STUCK: &str = "exceeded maximum number of branches";
/// The same, where all threads have come to their end.
const STALLED: &str = "a slot is never given back";

fn finds(scene: &Scene, mutation: Mutation, how: &str) {
    let verdict = mutation::with(mutation, || scene.check());
    let failure = verdict.failure.unwrap_or_else(|| panic!("{} does not find {mutation:?}", scene.name));
    let line = failure.lines().next().unwrap_or_default();
    println!("figure: loom {mutation:?}: {} finds it in execution {}: {line}", scene.name, verdict.executions);
    assert!(failure.contains(how), "{mutation:?} is found otherwise: {failure}");
}

type Found = (Mutation, &'static Scene, &'static str);

/// Every order stronger than relaxed, made weaker.
const ORDERS: &[Found] = &[
    (fault("tail", "self.tail.load", Order(Relaxed)), &HOST_TAIL, RACE),
    (fault("free", "self.tail.load", Order(Relaxed)), &RESERVE, "a slot for both"),
    (fault("free", "landed.load", Order(Relaxed)), &EARLY_POISON, RACE),
    (fault("released", "let released", Order(Relaxed)), &WRAP, RACE),
    (fault("land", "landed.store", Order(Relaxed)), &EARLY_POISON, RACE),
    (fault("announce", "landed.store", Order(Relaxed)), &RESERVE, "a slot for both"),
    (fault("announce", "descriptor(slot, 0).store", Order(Relaxed)), &POP, RACE),
    (fault("announce", "published.store", Order(Relaxed)), &TAIL, RACE),
    (fault("changed", "fetch_add", Order(Acquire)), &POISON, "the host's tail"),
    (fault("changed", "fetch_add", Order(Release)), &POISON, "the host's tail"),
    (fault("changed", "compare_exchange", Order(Acquire)), &POISON, "the host's tail"),
    (fault("changed", "compare_exchange", OnFailure(Relaxed)), &POISON, "the host's tail"),
    (fault("tell", "published.load", Order(Relaxed)), &TAIL, RACE),
    (fault("tell", "self.words.tail().store", Order(Relaxed)), &TAIL, RACE),
    (fault("tell", "self.tail.store", Order(Relaxed)), &HOST_TAIL, RACE),
    (fault("tell_state", "state().store", Order(Relaxed)), &END_WITH_DATA, "left == right"),
    (fault("look", "let seq", Order(Relaxed)), &POP, RACE),
    (fault("look", "let state", Order(Relaxed)), &END_WITH_DATA, "left == right"),
    (fault("release", "fetch_sub", Order(Acquire)), &BROADCAST, RACE),
    (fault("release", "fetch_sub", Order(Release)), &BROADCAST, RACE),
    (fault("release", "released(slot).store", Order(Relaxed)), &WRAP, RACE),
    (fault("look_at_tail", "let tail", Order(Relaxed)), &TAIL, RACE),
    (fault("look_at_tail", "let state", Order(Relaxed)), &END_BY_TAIL, "left == right"),
];

/// Orders that nothing of the protocol needs, with scenes that hold without them.
const UNNEEDED: &[(Mutation, &[&Scene])] = &[
    // The consumers get to know of the queue later, by an order of its own.
    (fault("new", "state().store", Order(Relaxed)), &[&POP]),
    // An errno is all that an abort tells, and it is in the word; `changes` orders it for the tail's owner.
    (fault("closed", "aborted.load", Order(Relaxed)), &[&ABORT_BY_HOST, &FINISH_RACES_ABORT]),
    (fault("abort", "self.aborted.compare_exchange", Order(Relaxed)), &[&ABORT_BY_HOST, &FINISH_RACES_ABORT]),
    (fault("tell", "aborted.load", Order(Relaxed)), &[&ABORT_BY_HOST, &FINISH_RACES_ABORT]),
    (fault("check_abort", "self.words.abort().load", Order(Relaxed)), &[&ABORT_BY_READER]),
    (fault("abort", "self.words.abort().compare_exchange", Order(Relaxed)), &[&ABORT_BY_READER]),
    // Who gives the tail up looks at nothing more.
    (fault("changed", "compare_exchange", Order(Release)), &[&POISON, &TAIL, &RESERVE]),
];

/// Every rule, dropped.
const RULES: &[Found] = &[
    // A slot is taken before its consumers have released it, while a read may write to it, before the tail has passed.
    (fault("released", "let released", FindsLatest("seq")), &WRAP, "left == right"),
    (fault("free", "landed.load", FindsLatest("seq")), &EARLY_POISON, RACE),
    (fault("free", "self.tail.load", FindsLatest("next")), &LAGGING_TAIL, "the host's tail"),
    // Two take the same sequence, two publish the same.
    (fault("reserve", "next.compare_exchange", Skips), &RESERVE, RACE),
    (fault("claim", "stage.compare_exchange", Skips), &DEADLINE, "left != right"),
    // The end of a late read is not told.
    (fault("land", "landed.store", Skips), &EARLY_POISON, STUCK),
    // What a word tells of comes after it.
    (fault("tell", "end().store", After("tell_state", "state().store")), &END_WITH_DATA, "left == right"),
    (fault("tell", "error().store", After("tell_state", "state().store")), &ABORT_BY_HOST, "left == right"),
    (fault("tell", "first_bad().store", After("tell", "self.words.tail().store")), &POISON_AFTER_GOOD, "left == right"),
    // A second failure is told as the first.
    (fault("tell", "bad_told.store", Skips), &POISON, "first_bad"),
    // The tail has two owners.
    (fault("changed", "fetch_add", Finds(0)), &TAIL_OF_TWO, "the tail word"),
    // Somebody reserves after the end.
    (fault("finish", "next.compare_exchange", Skips), &END_WITH_DATA, "left == right"),
    // A ticket handed back is not traded for, or lost.
    (fault("swap", "handed().load", Finds(0)), &SWAP, STALLED),
    (fault("hand_back", "compare_exchange(0", Skips), &SWAP, STALLED),
    // The first of two readers gives the slot back; the readers are not counted anew.
    (fault("release", "fetch_sub", Finds(u32::MAX as u64)), &BROADCAST, STALLED),
    (fault("release", "pending(slot).store", Skips), &BROADCAST, STALLED),
];

#[test]
fn a_weaker_order_is_found() {
    ORDERS.iter().for_each(|&(mutation, scene, how)| finds(scene, mutation, how));
}

#[test]
fn a_dropped_rule_is_found() {
    RULES.iter().for_each(|&(mutation, scene, how)| finds(scene, mutation, how));
}

#[test]
fn orders_that_nothing_needs() {
    for &(mutation, scenes) in UNNEEDED {
        scenes.iter().for_each(|scene| mutation::with(mutation, || scene.holds()));
    }
}

/// No order is left out above.
#[test]
fn every_order_is_in_the_lists() {
    let known: Vec<_> = ORDERS.iter().map(|found| found.0).chain(UNNEEDED.iter().map(|known| known.0)).collect();
    let ordering = |word: &str| matches!(word, "Acquire" | "Release" | "AcqRel" | "SeqCst");
    for (site, _, line) in mutation::lines().filter(|(_, _, line)| !line.starts_with("use ")) {
        if line.split(|letter: char| !letter.is_alphanumeric()).any(ordering) {
            assert!(known.iter().any(|mutation| mutation.site() == site), "{site:?} {line}");
        }
    }
}
