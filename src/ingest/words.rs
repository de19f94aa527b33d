//! How the protocol's words are reached: by one trait, so that real memory, the model checker and the tests run the same
//! logic.

use crate::sys::publish_barrier;
use crate::wire::{
    self, ControlBlock, Descriptor, IO_QUEUE_DESCRIPTORS, IO_QUEUE_RELEASED, IO_QUEUE_TICKETS, IoQueueView,
};
use std::fmt::Debug;
use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// An atomic word. The methods are those of the standard library's atomics.
pub(crate) trait Word<T>: Debug {
    fn new(value: T) -> Self;
    fn load(&self, order: Ordering) -> T;
    fn store(&self, value: T, order: Ordering);
    fn fetch_add(&self, value: T, order: Ordering) -> T;
    fn fetch_sub(&self, value: T, order: Ordering) -> T;
    fn compare_exchange(&self, current: T, new: T, success: Ordering, failure: Ordering) -> Result<T, T>;
}

macro_rules! word {
    ($atomic:ty, $value:ty) => {
        impl Word<$value> for $atomic {
            #[inline(always)]
            fn new(value: $value) -> Self {
                <$atomic>::new(value)
            }
            #[inline(always)]
            fn load(&self, order: Ordering) -> $value {
                <$atomic>::load(self, order)
            }
            #[inline(always)]
            fn store(&self, value: $value, order: Ordering) {
                <$atomic>::store(self, value, order);
            }
            #[inline(always)]
            fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                <$atomic>::fetch_add(self, value, order)
            }
            #[inline(always)]
            fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                <$atomic>::fetch_sub(self, value, order)
            }
            #[inline(always)]
            fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                <$atomic>::compare_exchange(self, current, new, success, failure)
            }
        }
    };
}
word!(AtomicU32, u32);
word!(AtomicU64, u64);

/// The shared words of one io_queue, and the kind of word that host-private ones are made of.
///
/// `slot` is below the queue's slot count, `consumer` below its consumers.
pub(crate) trait Words {
    type U32: Word<u32>;
    type U64: Word<u64>;

    // Control block: the host writes.
    fn epoch(&self) -> &Self::U64;
    fn tail(&self) -> &Self::U64;
    fn first_bad(&self) -> &Self::U64;
    fn state(&self) -> &Self::U32;
    fn error(&self) -> &Self::U32;
    fn end(&self) -> &Self::U64;
    /// Word `word` (0 to 7) of a slot's descriptor.
    fn descriptor(&self, slot: u32, word: usize) -> &Self::U64;

    // Credit block: consumers write.
    fn abort(&self) -> &Self::U32;
    fn released(&self, slot: u32) -> &Self::U64;

    // Device block: only consumers.
    fn claim(&self) -> &Self::U64;
    fn handed(&self) -> &Self::U32;
    fn ticket(&self, consumer: u32) -> &Self::U64;
    fn pending(&self, slot: u32) -> &Self::U32;

    /// Between the bytes and words that are published and the release store that publishes them.
    fn publish_barrier(&self);
}

/// The words in real memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MappedWords {
    control: NonNull<u8>,
    credit: NonNull<u8>,
    device: NonNull<u8>,
    /// Where `pending` begins in the device block.
    pending: usize,
}

// SAFETY: an address range whose validity from any thread `MappedWords::new` demands; all access is by atomics.
unsafe impl Send for MappedWords {}
// SAFETY: as for Send.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// The words at a view's addresses.
    ///
    /// # Safety
    /// The view's addresses are addresses of this process: control, credit and device block of the sizes that
    /// [`wire`] gives for its slot count and consumers, aligned to 128 bytes, valid for reads and (credit, device; for
    /// the producer control too) writes from any thread while the value or a copy is used.
    pub(crate) unsafe fn new(view: &IoQueueView) -> Self {
        let address = |value: u64| NonNull::new(value as *mut u8).unwrap_or(NonNull::dangling());
        Self {
            control: address(view.control),
            credit: address(view.credit),
            device: address(view.device),
            pending: wire::pending_offset(view.consumers) as usize,
        }
    }

    #[inline(always)]
    fn u64(block: &NonNull<u8>, offset: usize) -> &AtomicU64 {
        // SAFETY: callers name an aligned word inside the block, which is valid by the contract of `new`; every bit
        // pattern is a value, and all access is atomic.
        unsafe { block.add(offset).cast::<AtomicU64>().as_ref() }
    }

    #[inline(always)]
    fn u32(block: &NonNull<u8>, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `u64`.
        unsafe { block.add(offset).cast::<AtomicU32>().as_ref() }
    }
}

impl Words for MappedWords {
    type U32 = AtomicU32;
    type U64 = AtomicU64;

    #[inline(always)]
    fn epoch(&self) -> &AtomicU64 {
        Self::u64(&self.control, offset_of!(ControlBlock, header) + offset_of!(wire::ControlHeader, epoch))
    }
    #[inline(always)]
    fn tail(&self) -> &AtomicU64 {
        Self::u64(&self.control, offset_of!(ControlBlock, tail))
    }
    #[inline(always)]
    fn first_bad(&self) -> &AtomicU64 {
        Self::u64(&self.control, offset_of!(ControlBlock, first_bad))
    }
    #[inline(always)]
    fn state(&self) -> &AtomicU32 {
        Self::u32(&self.control, offset_of!(ControlBlock, state))
    }
    #[inline(always)]
    fn error(&self) -> &AtomicU32 {
        Self::u32(&self.control, offset_of!(ControlBlock, error))
    }
    #[inline(always)]
    fn end(&self) -> &AtomicU64 {
        Self::u64(&self.control, offset_of!(ControlBlock, end))
    }
    #[inline(always)]
    fn descriptor(&self, slot: u32, word: usize) -> &AtomicU64 {
        let base = IO_QUEUE_DESCRIPTORS as usize + slot as usize * size_of::<Descriptor>();
        Self::u64(&self.control, base + word * size_of::<u64>())
    }
    #[inline(always)]
    fn abort(&self) -> &AtomicU32 {
        Self::u32(&self.credit, 0)
    }
    #[inline(always)]
    fn released(&self, slot: u32) -> &AtomicU64 {
        Self::u64(&self.credit, IO_QUEUE_RELEASED as usize + slot as usize * size_of::<u64>())
    }
    #[inline(always)]
    fn claim(&self) -> &AtomicU64 {
        Self::u64(&self.device, 0)
    }
    #[inline(always)]
    fn handed(&self) -> &AtomicU32 {
        Self::u32(&self.device, 8)
    }
    #[inline(always)]
    fn ticket(&self, consumer: u32) -> &AtomicU64 {
        Self::u64(&self.device, IO_QUEUE_TICKETS as usize + consumer as usize * size_of::<u64>())
    }
    #[inline(always)]
    fn pending(&self, slot: u32) -> &AtomicU32 {
        Self::u32(&self.device, self.pending + slot as usize * size_of::<u32>())
    }
    #[inline(always)]
    fn publish_barrier(&self) {
        publish_barrier();
    }
}
