//! The protocol's words, and its slots, as the model checker's cells.

use super::super::words::{Word, Words};
use super::mutation::{self, Change};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64};
use std::panic::Location;
use std::rc::Rc;
use std::sync::atomic::Ordering;

/// A word under the model checker.
#[derive(Debug, Clone)]
pub(super) struct LoomWord<A, T> {
    name: &'static str,
    index: usize,
    /// `Err`: a word that never holds anything else, of no interest to the checker.
    atomic: Result<Rc<A>, T>,
}

macro_rules! loom_word {
    ($atomic:ty, $value:ty) => {
        impl LoomWord<$atomic, $value> {
            fn named(name: &'static str, index: usize, value: $value) -> Self {
                mutation::stored(name, index, value.into());
                Self { name, index, atomic: Ok(Rc::new(<$atomic>::new(value))) }
            }

            /// What an access finds instead of what is there.
            fn lie(&self, change: Option<Change>) -> Option<$value> {
                match change? {
                    Change::Finds(value) => Some(value as $value),
                    Change::FindsLatest(name) => mutation::latest(name, self.index).map(|value| value as $value),
                    _ => None,
                }
            }
        }

        impl Word<$value> for LoomWord<$atomic, $value> {
            #[track_caller]
            fn new(value: $value) -> Self {
                let (name, index) = mutation::field(Location::caller());
                Self::named(name, index, value)
            }

            #[track_caller]
            fn load(&self, order: Ordering) -> $value {
                let atomic = match &self.atomic {
                    Ok(atomic) => atomic,
                    Err(constant) => return *constant,
                };
                let change = mutation::change(Location::caller());
                let found = atomic.load(weaker(order, change));
                self.lie(change).unwrap_or(found)
            }

            #[track_caller]
            fn store(&self, value: $value, order: Ordering) {
                let atomic = match &self.atomic {
                    Ok(atomic) => atomic,
                    Err(constant) => return assert_eq!(value, *constant),
                };
                let caller = Location::caller();
                let change = mutation::change(caller);
                match change {
                    Some(Change::Skips) => return,
                    Some(Change::After(..)) => {
                        let atomic = atomic.clone();
                        return mutation::delay(move || atomic.store(value, order));
                    }
                    _ => mutation::stored(self.name, self.index, value.into()),
                }
                atomic.store(value, weaker(order, change));
                mutation::catch_up(caller);
            }

            #[track_caller]
            fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                let change = mutation::change(Location::caller());
                let found = self.moving().fetch_add(value, weaker(order, change));
                mutation::stored(self.name, self.index, found.wrapping_add(value).into());
                self.lie(change).unwrap_or(found)
            }

            #[track_caller]
            fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                let change = mutation::change(Location::caller());
                let found = self.moving().fetch_sub(value, weaker(order, change));
                mutation::stored(self.name, self.index, found.wrapping_sub(value).into());
                self.lie(change).unwrap_or(found)
            }

            #[track_caller]
            fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                let change = mutation::change(Location::caller());
                if matches!(change, Some(Change::Skips)) {
                    return Ok(current);
                }
                let failure = if let Some(Change::OnFailure(order)) = change { order } else { failure };
                let result = self.moving().compare_exchange(current, new, weaker(success, change), failure);
                if result.is_ok() {
                    mutation::stored(self.name, self.index, new.into());
                }
                result
            }
        }

        impl LoomWord<$atomic, $value> {
            fn moving(&self) -> &$atomic {
                self.atomic.as_ref().expect("a word that changes")
            }
        }
    };
}
loom_word!(AtomicU32, u32);
loom_word!(AtomicU64, u64);

fn weaker(order: Ordering, change: Option<Change>) -> Ordering {
    if let Some(Change::Order(weaker)) = change { weaker } else { order }
}

/// An io_queue's words and slots.
#[derive(Debug, Clone)]
pub(super) struct LoomWords(Rc<Memory>);

#[derive(Debug)]
struct Memory {
    epoch: U64,
    tail: U64,
    first_bad: U64,
    state: U32,
    error: U32,
    end: U64,
    descriptors: Vec<[U64; 8]>,
    abort: U32,
    released: Vec<U64>,
    claim: U64,
    handed: U32,
    tickets: Vec<U64>,
    pending: Vec<U32>,
    payloads: Vec<UnsafeCell<u64>>,
}

type U32 = LoomWord<AtomicU32, u32>;
type U64 = LoomWord<AtomicU64, u64>;

impl LoomWords {
    /// Memory as it is before a producer is made. `first` is the sequence that the consumers' tickets begin with.
    pub(super) fn new(slots: usize, consumers: usize, epoch: u64, first: u64) -> Self {
        let slot_words = |name, value| (0..slots).map(|slot| U64::named(name, slot, value)).collect();
        Self(Rc::new(Memory {
            epoch: constant("epoch", epoch),
            tail: U64::named("shared tail", 0, 0),
            first_bad: U64::named("first_bad", 0, 0),
            state: U32::named("state", 0, 0),
            error: U32::named("error", 0, 0),
            end: U64::named("end", 0, 0),
            descriptors: (0..slots).map(descriptor).collect(),
            abort: U32::named("abort", 0, 0),
            released: slot_words("released", 0),
            claim: U64::named("claim", 0, first),
            handed: U32::named("handed", 0, 0),
            tickets: (0..consumers).map(|place| U64::named("ticket", place, 0)).collect(),
            pending: (0..slots).map(|slot| U32::named("pending", slot, 0)).collect(),
            payloads: (0..slots).map(|_| UnsafeCell::new(0)).collect(),
        }))
    }

    /// Fills a slot. Any access to it that is not ordered before or after is a failure.
    pub(super) fn fill(&self, slot: usize, value: u64) {
        // SAFETY: the checker fails, before the access, unless it is ordered with every other.
        self.0.payloads[slot].with_mut(|payload| unsafe { *payload = value });
    }

    /// What a slot holds. Any write to it that is not ordered before or after is a failure.
    pub(super) fn payload(&self, slot: usize) -> u64 {
        // SAFETY: as in `fill`.
        self.0.payloads[slot].with(|payload| unsafe { *payload })
    }
}

fn constant(name: &'static str, value: u64) -> U64 {
    LoomWord { name, index: 0, atomic: Err(value) }
}

/// Status and tag stand for the words that `seq` publishes; in the models the rest are 0.
fn descriptor(slot: usize) -> [U64; 8] {
    std::array::from_fn(|word| match word {
        0 => U64::named("seq", slot, 0),
        1 | 2 => U64::named("descriptor", slot, 0),
        _ => constant("descriptor", 0),
    })
}

impl Words for LoomWords {
    type U32 = U32;
    type U64 = U64;

    fn epoch(&self) -> &U64 {
        &self.0.epoch
    }
    fn tail(&self) -> &U64 {
        &self.0.tail
    }
    fn first_bad(&self) -> &U64 {
        &self.0.first_bad
    }
    fn state(&self) -> &U32 {
        &self.0.state
    }
    fn error(&self) -> &U32 {
        &self.0.error
    }
    fn end(&self) -> &U64 {
        &self.0.end
    }
    fn descriptor(&self, slot: u32, word: usize) -> &U64 {
        &self.0.descriptors[slot as usize][word]
    }
    fn abort(&self) -> &U32 {
        &self.0.abort
    }
    fn released(&self, slot: u32) -> &U64 {
        &self.0.released[slot as usize]
    }
    fn claim(&self) -> &U64 {
        &self.0.claim
    }
    fn handed(&self) -> &U32 {
        &self.0.handed
    }
    fn ticket(&self, consumer: u32) -> &U64 {
        &self.0.tickets[consumer as usize]
    }
    fn pending(&self, slot: u32) -> &U32 {
        &self.0.pending[slot as usize]
    }
    /// The checker knows the language's order alone: what processors need beyond it is nothing to it.
    fn publish_barrier(&self) {}
}
