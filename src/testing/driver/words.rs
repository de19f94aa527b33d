//! The queue's shared words and slots as raw memory, read by the layout alone, and written by deliberate faults.

use crate::wire::{Descriptor, IO_QUEUE_DESCRIPTORS, IO_QUEUE_RELEASED, IO_QUEUE_TICKETS, IoQueueView};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawWords {
    view: IoQueueView,
}

impl RawWords {
    /// The memory that a view of this process leads to.
    ///
    /// # Safety
    /// It is valid while the value or a copy is used.
    pub(super) unsafe fn new(view: IoQueueView) -> Self {
        Self { view }
    }

    fn u64(&self, address: u64) -> &AtomicU64 {
        // SAFETY: callers name an aligned word of the queue's blocks, valid by the contract of `new`; others access it
        // by atomics too.
        unsafe { &*(address as *const AtomicU64) }
    }

    fn u32(&self, address: u64) -> &AtomicU32 {
        // SAFETY: as in `u64`.
        unsafe { &*(address as *const AtomicU32) }
    }

    fn place(&self, sequence: u64) -> u64 {
        sequence & u64::from(self.view.slot_count - 1)
    }

    pub(super) fn tail(&self) -> u64 {
        self.u64(self.view.control + 0x80).load(Ordering::Acquire)
    }

    pub(super) fn set_tail(&self, tail: u64) {
        self.u64(self.view.control + 0x80).store(tail, Ordering::Release);
    }

    pub(super) fn first_bad(&self) -> u64 {
        self.u64(self.view.control + 0x88).load(Ordering::Acquire)
    }

    pub(super) fn state(&self) -> u32 {
        self.u32(self.view.control + 0x100).load(Ordering::Acquire)
    }

    pub(super) fn set_state(&self, state: u32) {
        self.u32(self.view.control + 0x100).store(state, Ordering::Release);
    }

    pub(super) fn error(&self) -> i32 {
        self.u32(self.view.control + 0x104).load(Ordering::Acquire) as i32
    }

    pub(super) fn end(&self) -> u64 {
        self.u64(self.view.control + 0x108).load(Ordering::Acquire)
    }

    pub(super) fn abort(&self) -> i32 {
        self.u32(self.view.credit).load(Ordering::Acquire) as i32
    }

    pub(super) fn released(&self, sequence: u64) -> u64 {
        self.released_word(sequence).load(Ordering::Acquire)
    }

    pub(super) fn set_released(&self, sequence: u64) {
        self.released_word(sequence).store(sequence + 1, Ordering::Release);
    }

    fn released_word(&self, sequence: u64) -> &AtomicU64 {
        self.u64(self.view.credit + u64::from(IO_QUEUE_RELEASED) + self.place(sequence) * 8)
    }

    /// The first word of the descriptor of a sequence's slot.
    pub(super) fn seq(&self, sequence: u64) -> u64 {
        self.descriptor_word(sequence, 0).load(Ordering::Acquire)
    }

    pub(super) fn descriptor(&self, sequence: u64) -> Descriptor {
        Descriptor::from_words(std::array::from_fn(|word| self.descriptor_word(sequence, word).load(Ordering::Acquire)))
    }

    pub(super) fn descriptor_word(&self, sequence: u64, word: usize) -> &AtomicU64 {
        let at = u64::from(IO_QUEUE_DESCRIPTORS) + self.place(sequence) * size_of::<Descriptor>() as u64;
        self.u64(self.view.control + at + word as u64 * 8)
    }

    pub(super) fn claim(&self) -> &AtomicU64 {
        self.u64(self.view.device)
    }

    /// Tickets that were handed back.
    pub(super) fn tickets(&self) -> impl Iterator<Item = u64> + '_ {
        (0..u64::from(self.view.consumers))
            .map(|place| self.u64(self.view.device + u64::from(IO_QUEUE_TICKETS) + place * 8).load(Ordering::Acquire))
            .filter(|&ticket| ticket != 0)
            .map(|ticket| ticket - 1)
    }

    /// Address of the slot of a sequence.
    pub(super) fn slot_address(&self, sequence: u64) -> u64 {
        self.view.slots + self.place(sequence) * self.view.slot_stride
    }

    /// The slot of a sequence, all of its stride.
    pub(super) fn slot(&self, sequence: u64) -> &[u8] {
        // SAFETY: within the slots, valid by the contract of `new`. Everything runs on one thread, and what writes to the
        // slots is called between uses of the slice only.
        unsafe { std::slice::from_raw_parts(self.slot_address(sequence) as *const u8, self.view.slot_stride as usize) }
    }

    /// Changes one byte of a slot.
    pub(super) fn spoil(&self, sequence: u64, at: u64) {
        // SAFETY: a byte within the slot; no slice of it is alive.
        let byte = unsafe { &*((self.slot_address(sequence) + at) as *const AtomicU8) };
        byte.fetch_xor(0x10, Ordering::Relaxed);
    }
}
