//! One deliberate fault in the protocol's code, named by the source line that it is in.
//!
//! Every access to a word knows the line that makes it. So a fault needs no hook in the code that is checked, and a
//! fault whose line is gone says so.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::panic::Location;
use std::sync::atomic::Ordering;

const PRODUCER: &str = include_str!("../producer.rs");
const CONSUMER: &str = include_str!("../consumer.rs");

/// What is wrong with an access.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    /// Its order is another one (compare-and-swap: when it succeeds).
    Order(Ordering),
    /// A compare-and-swap that fails has another order.
    OnFailure(Ordering),
    /// It finds this, whatever is there.
    Finds(u64),
    /// It finds what was last stored to the word of this name and the same index, if anything was.
    FindsLatest(&'static str),
    /// It does nothing, and seems to succeed.
    Skips,
    /// A store that is done after the next one in a line: function and text.
    After(&'static str, &'static str),
}

/// The fault: in the producer or consumer, the only line with the text `at` of a function is wrong.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mutation {
    pub(super) function: &'static str,
    pub(super) at: &'static str,
    pub(super) change: Change,
}

impl Mutation {
    pub(super) fn site(&self) -> Site {
        site(self.function, self.at)
    }
}

/// A line of the code that is checked.
pub(super) type Site = (&'static str, u32);

/// The fault that is in place.
#[derive(Debug, Clone, Copy)]
struct Active {
    at: Site,
    /// Where a store that is late is made up for.
    then: Option<Site>,
    change: Change,
}

thread_local! {
    // The threads of a model are coroutines of one thread, so these are one model's.
    static ACTIVE: Cell<Option<Active>> = const { Cell::new(None) };
    static LATEST: RefCell<HashMap<(&'static str, usize), u64>> = RefCell::default();
    static DELAYED: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
    static FIELDS: RefCell<HashMap<u32, (&'static str, usize)>> = RefCell::default();
}

/// The lines of the code that is checked, each with its place and the function that it is in. No comments.
pub(super) fn lines() -> impl Iterator<Item = (Site, &'static str, &'static str)> {
    [("producer.rs", PRODUCER), ("consumer.rs", CONSUMER)].into_iter().flat_map(|(file, text)| {
        let lines = text.lines().enumerate().scan("", move |function, (index, line)| {
            if let Some((_, name)) = line.split_once("fn ") {
                *function = name.split_once(['(', '<']).map_or("", |(name, _)| name);
            }
            Some(((file, index as u32 + 1), *function, line.trim()))
        });
        lines.filter(|(_, _, line)| !line.starts_with("//"))
    })
}

/// The one line of a function with a text.
fn site(function: &str, text: &str) -> Site {
    let mut found = lines().filter(|&(_, name, line)| name == function && line.contains(text));
    let (Some((site, ..)), None) = (found.next(), found.next()) else {
        panic!("not one line of `{function}` in producer.rs and consumer.rs has {text:?}");
    };
    site
}

fn is(site: Site, caller: &Location<'_>) -> bool {
    site.1 == caller.line() && caller.file().ends_with(site.0)
}

/// Runs something with a fault in the code.
pub(super) fn with<R>(mutation: Mutation, run: impl FnOnce() -> R) -> R {
    let then = if let Change::After(function, text) = mutation.change { Some(site(function, text)) } else { None };
    ACTIVE.set(Some(Active { at: mutation.site(), then, change: mutation.change }));
    let result = run();
    ACTIVE.set(None);
    result
}

/// Forgets what was made and stored: another execution begins.
pub(super) fn forget() {
    LATEST.with_borrow_mut(HashMap::clear);
    DELAYED.set(None);
    FIELDS.with_borrow_mut(|fields| fields.values_mut().for_each(|(_, made)| *made = 0));
}

/// The field that a line of the producer makes, and how often it did before.
pub(super) fn field(caller: &Location<'_>) -> (&'static str, usize) {
    FIELDS.with_borrow_mut(|fields| {
        let (name, made) = fields.entry(caller.line()).or_insert_with(|| {
            let line = lines().find(|&(site, ..)| is(site, caller)).map_or("", |(_, _, line)| line);
            (line.split_once(':').map_or("", |(name, _)| name), 0)
        });
        *made += 1;
        (*name, *made - 1)
    })
}

/// What is wrong with the access of this line.
pub(super) fn change(caller: &Location<'_>) -> Option<Change> {
    ACTIVE.get().filter(|active| is(active.at, caller)).map(|active| active.change)
}

/// What was last stored to a word, unless it is 0 still.
pub(super) fn latest(name: &'static str, index: usize) -> Option<u64> {
    LATEST.with_borrow(|latest| latest.get(&(name, index)).copied().filter(|&value| value != 0))
}

/// A word was stored to.
pub(super) fn stored(name: &'static str, index: usize, value: u64) {
    if ACTIVE.get().is_some() {
        LATEST.with_borrow_mut(|latest| latest.insert((name, index), value));
    }
}

/// Puts a store off.
pub(super) fn delay(store: impl FnOnce() + 'static) {
    DELAYED.set(Some(Box::new(store)));
}

/// Does the store that was put off, if it waited for this line.
pub(super) fn catch_up(caller: &Location<'_>) {
    let due = ACTIVE.get().and_then(|active| active.then).is_some_and(|then| is(then, caller));
    if due && let Some(store) = DELAYED.take() {
        store();
    }
}
