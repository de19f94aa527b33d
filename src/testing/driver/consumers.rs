//! The two consumers of an io_queue behind one face: the Rust one, and the device header's compiled for the host.

use super::super::harness::{Check, text};
use crate::ingest::{IoQueue, IoQueueConsumer, IoQueueSlot};
use crate::wire::{Descriptor, IoQueueView, Outcome};
use std::sync::Arc;
use std::time::Duration;

/// `ringest::device::slot`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct DeviceSlot {
    sequence: u64,
    data: *const u8,
    bytes: u32,
    status: i32,
    tag: u64,
    file_offset: u64,
    data_offset: u32,
    crc32c: u32,
    path: u16,
    flags: u16,
    nvme_status: u32,
}

const _: () = assert!(size_of::<DeviceSlot>() == 56);

/// Room for `ringest::device::consumer`.
type Storage = [u64; 32];

// What `pop.cpp` makes of the header.
unsafe extern "C" {
    fn ringest_testing_consumer_make(storage: *mut Storage, view: *const IoQueueView, index: u32);
    fn ringest_testing_consumer_end(storage: *mut Storage);
    fn ringest_testing_try_pop(storage: *mut Storage, item: *mut DeviceSlot) -> i32;
    fn ringest_testing_release(storage: *mut Storage, item: *const DeviceSlot);
    fn ringest_testing_hand_back(storage: *mut Storage) -> bool;
    fn ringest_testing_error(storage: *const Storage) -> i32;
    fn ringest_testing_next(storage: *const Storage) -> u64;
    fn ringest_testing_look_at_tail(view: *const IoQueueView, n: u64) -> i32;
    fn ringest_testing_abort(view: *const IoQueueView, error: i32);
}

/// The device header's consumer. Made by `Consumer::device`, whose caller keeps the queue until it is dropped.
pub(super) struct DeviceConsumer {
    storage: Box<Storage>,
    view: IoQueueView,
}

impl Drop for DeviceConsumer {
    fn drop(&mut self) {
        // SAFETY: the storage holds a consumer since `Consumer::device`, and nobody uses it afterwards.
        unsafe { ringest_testing_consumer_end(&mut *self.storage) };
    }
}

/// A consumer of either kind.
pub(super) enum Consumer {
    Host(IoQueueConsumer),
    Device(DeviceConsumer),
}

/// A popped slot.
pub(super) struct Item {
    pub(super) sequence: u64,
    pub(super) descriptor: Descriptor,
    /// Address and length of the payload.
    pub(super) payload: (u64, usize),
    slot: Slot,
}

enum Slot {
    Host(IoQueueSlot),
    Device(DeviceSlot),
}

fn outcome(value: i32) -> Check<Outcome> {
    let known = [Outcome::Ok, Outcome::End, Outcome::Aborted, Outcome::Poison, Outcome::Timeout];
    known.into_iter().find(|&outcome| outcome as i32 == value).ok_or_else(|| format!("the header's outcome is {value}"))
}

impl Consumer {
    pub(super) fn host(queue: &Arc<IoQueue>, index: u32) -> Check<Self> {
        queue.consumer(index).map(Self::Host).map_err(text)
    }

    /// The device header's. The queue outlives it.
    pub(super) fn device(queue: &Arc<IoQueue>, index: u32) -> Self {
        let view = queue.host_view();
        let mut storage = Box::new([0; 32]);
        // SAFETY: the storage is large and aligned enough (asserted in pop.cpp); the view's addresses are this process's
        // and its memory is lent out, so that the queue's drop would rather leak it than leave it dangling.
        unsafe { ringest_testing_consumer_make(&mut *storage, &view, index) };
        Self::Device(DeviceConsumer { storage, view })
    }

    pub(super) fn is_device(&self) -> bool {
        matches!(self, Self::Device(_))
    }

    pub(super) fn try_pop(&mut self) -> Check<(Outcome, Option<Item>)> {
        match self {
            Self::Host(consumer) => Ok(match consumer.try_pop() {
                Ok(slot) => {
                    let outcome = if slot.is_poison() { Outcome::Poison } else { Outcome::Ok };
                    let payload = consumer.payload(&slot);
                    let payload = (payload.as_ptr() as u64, payload.len());
                    let (sequence, descriptor) = (slot.sequence(), *slot.descriptor());
                    (outcome, Some(Item { sequence, descriptor, payload, slot: Slot::Host(slot) }))
                }
                Err(outcome) => (outcome, None),
            }),
            Self::Device(consumer) => {
                let mut item = DeviceSlot {
                    sequence: u64::MAX,
                    data: std::ptr::null(),
                    bytes: 0,
                    status: 0,
                    tag: 0,
                    file_offset: 0,
                    data_offset: 0,
                    crc32c: 0,
                    path: 0,
                    flags: 0,
                    nvme_status: 0,
                };
                // SAFETY: a consumer is in the storage; the item has the header's layout.
                let outcome = outcome(unsafe { ringest_testing_try_pop(&mut *consumer.storage, &mut item) })?;
                if !matches!(outcome, Outcome::Ok | Outcome::Poison) {
                    return Ok((outcome, None));
                }
                let descriptor = Descriptor {
                    seq: item.sequence + 1,
                    status: item.status,
                    bytes: item.bytes,
                    tag: item.tag,
                    file_offset: item.file_offset,
                    data_offset: item.data_offset,
                    crc32c: item.crc32c,
                    path: item.path,
                    flags: item.flags,
                    nvme_status: item.nvme_status,
                    reserved: [0; 2],
                };
                let payload = (item.data as u64, item.bytes as usize);
                Ok((outcome, Some(Item { sequence: item.sequence, descriptor, payload, slot: Slot::Device(item) })))
            }
        }
    }

    pub(super) fn release(&mut self, item: Item) -> Check {
        match (self, item.slot) {
            (Self::Host(consumer), Slot::Host(slot)) => consumer.release(slot).map_err(text),
            (Self::Device(consumer), Slot::Device(slot)) => {
                // SAFETY: a consumer is in the storage; the item is one that it popped.
                unsafe { ringest_testing_release(&mut *consumer.storage, &slot) };
                Ok(())
            }
            _ => Err("a slot of another kind of consumer".to_owned()),
        }
    }

    pub(super) fn hand_back(&mut self) -> bool {
        match self {
            Self::Host(consumer) => consumer.hand_back(),
            // SAFETY: a consumer is in the storage.
            Self::Device(consumer) => unsafe { ringest_testing_hand_back(&mut *consumer.storage) },
        }
    }

    pub(super) fn error(&self) -> i32 {
        match self {
            Self::Host(consumer) => consumer.error(),
            // SAFETY: a consumer is in the storage.
            Self::Device(consumer) => unsafe { ringest_testing_error(&*consumer.storage) },
        }
    }

    pub(super) fn next(&self) -> Option<u64> {
        match self {
            Self::Host(consumer) => consumer.next(),
            Self::Device(consumer) => {
                // SAFETY: a consumer is in the storage.
                let next = unsafe { ringest_testing_next(&*consumer.storage) };
                (next != u64::MAX).then_some(next)
            }
        }
    }

    pub(super) fn look_at_tail(&mut self, n: u64) -> Check<Outcome> {
        match self {
            Self::Host(consumer) => Ok(consumer.wait_tail(n, Duration::ZERO).err().unwrap_or(Outcome::Ok)),
            // SAFETY: the view's memory is the queue's, which lives.
            Self::Device(consumer) => outcome(unsafe { ringest_testing_look_at_tail(&consumer.view, n) }),
        }
    }

    pub(super) fn abort(&mut self, errno: i32) {
        match self {
            Self::Host(consumer) => consumer.abort(errno),
            // SAFETY: as in `look_at_tail`.
            Self::Device(consumer) => unsafe { ringest_testing_abort(&consumer.view, -errno) },
        }
    }
}
