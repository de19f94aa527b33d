//! Handles: an index and a generation in the shape of a pointer, never dereferenced.
//!
//! A table entry has one state word: generation, and whether it is free, idle, in use (shared or exclusive) or poisoned.
//! A call enters by compare-and-swap against the generation of its handle, so a stale handle can never reach a new
//! object, and an object is never taken out while a call is inside.

use super::{Failure, Outcome};
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// What a handle value looks like: tag in bits 56.., generation in bits 24..56, index in bits 0..24.
const INDEX_BITS: u32 = 24;
const GENERATION_BITS: u32 = 32;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;

/// Low half of a state word.
mod phase {
    /// Readers inside: 0 (idle) up to this.
    pub(super) const READERS: u64 = 0x00ff_ffff;
    /// One caller inside, alone.
    pub(super) const EXCLUSIVE: u64 = 0x0100_0000;
    /// A call panicked inside.
    pub(super) const POISONED: u64 = 0x0200_0000;
    /// No object.
    pub(super) const FREE: u64 = 0x0400_0000;
}

const FIRST_CHUNK: usize = 64;
const CHUNKS: usize = 18;

/// Chunk of an entry, and its place there: chunk i starts at entry FIRST_CHUNK * (2^i - 1).
#[inline(always)]
fn place(index: usize) -> (usize, usize) {
    let chunk = (index / FIRST_CHUNK + 1).ilog2() as usize;
    (chunk, index - FIRST_CHUNK * ((1 << chunk) - 1))
}

struct Slot<T> {
    /// Generation in the high half, phase in the low half.
    state: AtomicU64,
    /// While free: the next free entry, plus one.
    next: AtomicU32,
    object: UnsafeCell<Option<T>>,
}

/// The objects of one handle family. Without locks: a forked child of a process with other threads would inherit one that
/// nobody unlocks.
pub(super) struct Table<T> {
    tag: u8,
    name: &'static str,
    /// Chunk i holds `FIRST_CHUNK << i` entries; entries never move.
    chunks: [AtomicPtr<Slot<T>>; CHUNKS],
    /// The entry freed last, plus one, in the low half (0: none), and a count of changes in the high half, by which a
    /// compare-and-swap tells an entry that was taken and freed meanwhile.
    free: AtomicU64,
    /// Entries handed out at least once.
    used: AtomicU32,
}

// SAFETY: entries are reached under the state protocol only: shared by readers that see `&T`, or by one caller. Objects
// that are bound to a thread (rings, streams) check their owner themselves at every call and on drop, and answer EPERM
// or leak; their types are `!Send` for Rust callers, who get that check at compile time.
unsafe impl<T> Sync for Table<T> {}

/// A handle family's C type and its table.
pub(super) trait Family: Sized + 'static {
    /// What the handle stands for.
    type Object: 'static;
    /// The family's table.
    fn table() -> &'static Table<Self::Object>;
}

impl<T> Table<T> {
    pub(super) const fn new(tag: u8, name: &'static str) -> Self {
        assert!(tag != 0);
        Self {
            tag,
            name,
            chunks: [const { AtomicPtr::new(null_mut()) }; CHUNKS],
            free: AtomicU64::new(0),
            used: AtomicU32::new(0),
        }
    }

    #[cold]
    fn bad(&self, value: u64) -> Failure {
        Failure::new(
            libc::EBADF,
            format!("{value:#x} is not a live {}: it is NULL, was destroyed, or is another kind of handle", self.name),
        )
    }

    #[inline(always)]
    fn slot(&self, index: usize) -> Option<&Slot<T>> {
        let (chunk, at) = place(index);
        // Acquire: the chunk's entries are initialised.
        let entries = self.chunks.get(chunk)?.load(Ordering::Acquire);
        if entries.is_null() {
            return None;
        }
        // SAFETY: a chunk, once published, is never freed or moved, and holds `FIRST_CHUNK << chunk` entries, of which
        // `place` names one.
        Some(unsafe { &*entries.add(at) })
    }

    /// The chunk with this number, made if need be.
    fn make_chunk(&self, chunk: usize) {
        let empty = || Slot {
            state: AtomicU64::new(1 << 32 | phase::FREE),
            next: AtomicU32::new(0),
            object: UnsafeCell::new(None),
        };
        let entries: Box<[Slot<T>]> = std::iter::repeat_with(empty).take(FIRST_CHUNK << chunk).collect();
        let made = Box::into_raw(entries);
        // Release: whoever finds the chunk finds its entries.
        let published =
            self.chunks[chunk].compare_exchange(null_mut(), made.cast(), Ordering::Release, Ordering::Relaxed);
        if published.is_err() {
            // SAFETY: somebody else's chunk is there; ours was seen by nobody.
            drop(unsafe { Box::from_raw(made) });
        }
    }

    /// Takes an entry that is free.
    fn reserve(&self) -> Outcome<u32> {
        let mut head = self.free.load(Ordering::Acquire);
        while let Some(index) = (head as u32).checked_sub(1) {
            let next = self.slot(index as usize).map_or(0, |slot| slot.next.load(Ordering::Relaxed));
            let popped = ((head >> 32) + 1) << 32 | u64::from(next);
            // Acquire: what the last user of the entry did is over.
            match self.free.compare_exchange_weak(head, popped, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Ok(index),
                Err(now) => head = now,
            }
        }
        let index = self.used.fetch_add(1, Ordering::Relaxed);
        let (chunk, _) = place(index as usize);
        if chunk >= CHUNKS {
            self.used.fetch_sub(1, Ordering::Relaxed);
            return Err(Failure::new(libc::EMFILE, format!("too many live handles: {index} of one kind")));
        }
        if self.chunks[chunk].load(Ordering::Relaxed).is_null() {
            self.make_chunk(chunk);
        }
        Ok(index)
    }

    /// Gives an entry back that nobody can reach any more.
    fn give_back(&self, slot: &Slot<T>, index: u32) {
        let mut head = self.free.load(Ordering::Relaxed);
        loop {
            slot.next.store(head as u32, Ordering::Relaxed);
            let pushed = ((head >> 32) + 1) << 32 | u64::from(index + 1);
            // Release: our use of the entry is over before the next.
            match self.free.compare_exchange_weak(head, pushed, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    #[inline(always)]
    fn find(&self, value: u64) -> Outcome<(&Slot<T>, u64)> {
        let generation = value >> INDEX_BITS & GENERATION_MASK;
        if value >> (INDEX_BITS + GENERATION_BITS) != u64::from(self.tag) {
            return Err(self.bad(value));
        }
        match self.slot((value & INDEX_MASK) as usize) {
            Some(slot) => Ok((slot, generation << 32)),
            None => Err(self.bad(value)),
        }
    }

    /// Why an entry with this state cannot be entered.
    #[cold]
    fn refusal(&self, value: u64, generation: u64, state: u64) -> Failure {
        let phase = state & u64::from(u32::MAX);
        if state >> 32 != generation >> 32 || phase & phase::FREE != 0 {
            return self.bad(value);
        }
        if phase & phase::POISONED != 0 {
            return Failure::new(
                libc::ENOTRECOVERABLE,
                format!("an earlier call with this {} panicked: it can only be destroyed", self.name),
            );
        }
        Failure::new(libc::EBUSY, format!("another call is using this {}: call from one thread at a time", self.name))
    }

    /// Puts an object in, which is made only once there is room for it; returns its handle's value.
    fn insert(&self, make: impl FnOnce() -> Outcome<T>) -> Outcome<u64> {
        let index = self.reserve()?;
        let Some(slot) = self.slot(index as usize) else {
            unreachable!("its chunk exists");
        };
        // Relaxed: the free list ordered us after whoever freed the entry.
        let generation = slot.state.load(Ordering::Relaxed) >> 32;
        let value = u64::from(self.tag) << (INDEX_BITS + GENERATION_BITS) | generation << INDEX_BITS | u64::from(index);
        match make() {
            Ok(object) => {
                // SAFETY: a reserved entry is reached by nobody but the caller that took it off the free list.
                unsafe { *slot.object.get() = Some(object) };
                // Release: whoever enters sees the object.
                slot.state.store(generation << 32, Ordering::Release);
                Ok(value)
            }
            Err(failure) => {
                self.give_back(slot, index);
                Err(failure)
            }
        }
    }

    /// Frees an entry that the caller has exclusively.
    fn remove(&self, slot: &Slot<T>, index: u32) -> Option<T> {
        // SAFETY: the caller is alone in the entry.
        let object = unsafe { (*slot.object.get()).take() };
        let generation = (slot.state.load(Ordering::Relaxed) >> 32) + 1;
        // Release: the object is gone before the entry can be taken again.
        slot.state.store((generation & GENERATION_MASK) << 32 | phase::FREE, Ordering::Release);
        // An entry whose generation wraps would accept a handle of long ago: retire it.
        if generation & GENERATION_MASK != 0 {
            self.give_back(slot, index);
        }
        object
    }
}

/// Shared use of an object during a call.
pub(super) struct Shared<T: 'static>(&'static Slot<T>);

/// Use of an object by one call alone.
pub(super) struct Exclusive<T: 'static> {
    table: &'static Table<T>,
    slot: &'static Slot<T>,
    /// As in the state word.
    generation: u64,
    index: u32,
    poisoned: bool,
    not_send: PhantomData<*mut ()>,
}

/// A handle of an object that did not exist before. `make` is called only when there is room for it.
pub(super) fn create<F: Family>(make: impl FnOnce() -> Outcome<F::Object>) -> Outcome<*mut F> {
    Ok(F::table().insert(make)? as usize as *mut F)
}

/// Enters an object together with other readers.
pub(super) fn shared<F: Family>(handle: *const F) -> Outcome<Shared<F::Object>> {
    let value = handle as usize as u64;
    let table = F::table();
    let (slot, generation) = table.find(value)?;
    let mut state = slot.state.load(Ordering::Relaxed);
    loop {
        let readers = state.wrapping_sub(generation);
        if readers >= phase::READERS {
            return Err(table.refusal(value, generation, state));
        }
        // Acquire: what the last exclusive user or the creator did is seen.
        match slot.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => return Ok(Shared(slot)),
            Err(now) => state = now,
        }
    }
}

/// Enters an object alone.
#[inline(always)]
pub(super) fn exclusive<F: Family>(handle: *const F) -> Outcome<Exclusive<F::Object>> {
    let value = handle as usize as u64;
    let table = F::table();
    let (slot, generation) = table.find(value)?;
    // Acquire: what the last user did is seen.
    match slot.state.compare_exchange(generation, generation | phase::EXCLUSIVE, Ordering::Acquire, Ordering::Relaxed) {
        Ok(_) => Ok(Exclusive {
            table,
            slot,
            generation,
            index: (value & INDEX_MASK) as u32,
            poisoned: false,
            not_send: PhantomData,
        }),
        Err(state) => Err(table.refusal(value, generation, state)),
    }
}

/// Enters an object to destroy it: also one that a panic poisoned.
pub(super) fn last<F: Family>(handle: *const F) -> Outcome<Exclusive<F::Object>> {
    let value = handle as usize as u64;
    let table = F::table();
    let (slot, generation) = table.find(value)?;
    let poisoned = generation | phase::POISONED;
    let alone = generation | phase::EXCLUSIVE;
    if slot.state.compare_exchange(poisoned, alone, Ordering::Acquire, Ordering::Relaxed).is_ok() {
        return Ok(Exclusive {
            table,
            slot,
            generation,
            index: (value & INDEX_MASK) as u32,
            poisoned: true,
            not_send: PhantomData,
        });
    }
    exclusive(handle)
}

impl<T> Exclusive<T> {
    /// Whether an earlier call with this object panicked.
    pub(super) fn was_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Takes the object out: its handle is dead from now on.
    pub(super) fn take(self) -> T {
        let this = std::mem::ManuallyDrop::new(self);
        match this.table.remove(this.slot, this.index) {
            Some(object) => object,
            None => unreachable!("a live entry has an object"),
        }
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: while readers are inside nobody has `&mut`, and a live entry has an object.
        unsafe { (*self.0.object.get()).as_ref().unwrap_unchecked() }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // Release: our reads are done before an exclusive user enters.
        self.0.state.fetch_sub(1, Ordering::Release);
    }
}

impl<T> Deref for Exclusive<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: we are alone inside, and a live entry has an object.
        unsafe { (*self.slot.object.get()).as_ref().unwrap_unchecked() }
    }
}

impl<T> DerefMut for Exclusive<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: we are alone inside, and a live entry has an object.
        unsafe { (*self.slot.object.get()).as_mut().unwrap_unchecked() }
    }
}

impl<T> Drop for Exclusive<T> {
    #[inline]
    fn drop(&mut self) {
        let phase = if self.poisoned || std::thread::panicking() { phase::POISONED } else { 0 };
        // Release: what we did is seen by the next user.
        self.slot.state.store(self.generation | phase, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    struct thing;
    static THINGS: Table<u64> = Table::new(0x7f, "thing");
    impl Family for thing {
        type Object = u64;
        fn table() -> &'static Table<u64> {
            &THINGS
        }
    }

    struct other;
    static OTHERS: Table<u64> = Table::new(0x7e, "other");
    impl Family for other {
        type Object = u64;
        fn table() -> &'static Table<u64> {
            &OTHERS
        }
    }

    fn errno<T>(outcome: Outcome<T>) -> i32 {
        outcome.err().map_or(0, |failure| failure.errno())
    }

    #[test]
    fn stale_null_and_foreign_handles_are_ebadf() {
        let handle = create::<thing>(|| Ok(5)).unwrap();
        assert_eq!(*shared(handle).unwrap(), 5);
        assert_eq!(errno(shared::<thing>(std::ptr::null())), libc::EBADF);
        assert_eq!(errno(exclusive::<other>(handle.cast())), libc::EBADF);
        assert_eq!(errno(shared::<thing>(&0u64 as *const u64 as *const thing)), libc::EBADF);
        assert_eq!(exclusive(handle).unwrap().take(), 5);
        assert_eq!(errno(shared(handle)), libc::EBADF);
        assert_eq!(errno(last(handle)), libc::EBADF);
        let again = create::<thing>(|| Ok(6)).unwrap();
        assert_ne!(handle, again);
        assert_eq!(errno(exclusive(handle)), libc::EBADF);
        assert_eq!(exclusive(again).unwrap().take(), 6);
    }

    #[test]
    fn readers_exclude_the_exclusive_and_a_panic_poisons() {
        let handle = create::<thing>(|| Ok(1)).unwrap();
        let (first, second) = (shared(handle).unwrap(), shared(handle).unwrap());
        assert_eq!(errno(exclusive(handle)), libc::EBUSY);
        drop((first, second));
        let alone = exclusive(handle).unwrap();
        assert_eq!(errno(shared(handle)), libc::EBUSY);
        drop(alone);
        let address = handle as usize;
        let panicked = std::thread::spawn(move || {
            let _inside = exclusive(address as *const thing).unwrap();
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(errno(exclusive(handle)), libc::ENOTRECOVERABLE);
        assert_eq!(errno(shared(handle)), libc::ENOTRECOVERABLE);
        assert_eq!(last(handle).unwrap().take(), 1);
    }

    #[test]
    fn concurrent_creates_uses_and_destroys_never_meet() {
        let entered = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let entered = &entered;
                scope.spawn(move || {
                    let mut stale = Vec::new();
                    for round in 0..2_000u64 {
                        let handle = create::<other>(|| Ok(thread << 32 | round)).unwrap();
                        assert_eq!(*exclusive(handle).unwrap(), thread << 32 | round);
                        entered.fetch_add(1, Ordering::Relaxed);
                        assert_eq!(exclusive(handle).unwrap().take(), thread << 32 | round);
                        stale.push(handle);
                        assert!(stale.iter().rev().take(8).all(|&old| errno(shared(old)) == libc::EBADF));
                    }
                });
            }
        });
        assert_eq!(entered.load(Ordering::Relaxed), 8_000);
    }
}
