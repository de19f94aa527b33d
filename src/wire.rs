//! Words shared with consumers on the device: the only place their layout is written.
//!
//! Version 1, little-endian. `include/ringest_wire.h` is made of this file by cbindgen; C, C++ and CUDA assert the same
//! sizes and offsets. Who writes which word, and in which order, is in the manual's chapter "The protocol"; the code is
//! in `ingest::producer` and `ingest::consumer`.

use std::mem::offset_of;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

#[cfg(target_endian = "big")]
compile_error!("the words shared with devices are little-endian");

/// "No sequence number": what `first_bad` holds while nothing has failed.
pub const NO_SEQUENCE: u64 = u64::MAX;

/// First word of a control block and of a view: "RNGQ".
pub const IO_QUEUE_MAGIC: u32 = 0x5147_4e52;
/// Version of the layout and of the protocol.
pub const IO_QUEUE_VERSION: u32 = 1;
/// Where descriptors begin in a control block, in bytes.
pub const IO_QUEUE_DESCRIPTORS: u32 = 0x200;
/// Where `released` begins in a credit block, in bytes.
pub const IO_QUEUE_RELEASED: u32 = 0x80;
/// Where the tickets begin in a device block, in bytes.
pub const IO_QUEUE_TICKETS: u32 = 0x80;
/// Alignment of the four parts of an io_queue, in bytes, in the host's and in the device's address space.
pub const IO_QUEUE_ALIGNMENT: u32 = 128;
/// Fewest slots of an io_queue.
pub const IO_QUEUE_MIN_SLOTS: u32 = 2;
/// Most slots of an io_queue.
pub const IO_QUEUE_MAX_SLOTS: u32 = 65_536;
/// Most consumers of an io_queue.
pub const IO_QUEUE_MAX_CONSUMERS: u32 = 65_536;

/// Descriptor flag: `crc32c` holds the CRC32C of the payload.
pub const DESCRIPTOR_CRC32C: u32 = 1 << 0;
/// Descriptor flag: poisoned before its read had ended. The device may still write to the slot: do not look at its bytes.
pub const DESCRIPTOR_EARLY: u32 = 1 << 1;

/// Values of a state word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum State {
    /// Submissions may follow.
    Open = 0,
    /// No submission follows `end`.
    End = 1,
    /// One side gave up; `error` says why.
    Aborted = 2,
}

/// The same values, for loads and stores.
pub mod state {
    /// Submissions may follow.
    pub const OPEN: u32 = super::State::Open as u32;
    /// No submission follows `end`.
    pub const END: u32 = super::State::End as u32;
    /// One side gave up; `error` says why.
    pub const ABORTED: u32 = super::State::Aborted as u32;
}

/// How the consumers of an io_queue share it; fixed in its view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub enum ConsumeMode {
    /// One consumer takes every sequence.
    #[default]
    Single = 0,
    /// Consumer i of C takes the sequences n with n mod C = i.
    Partitioned = 1,
    /// Whoever is free claims the next sequence, by a ticket.
    Claimed = 2,
    /// Every consumer takes every sequence; the last to release a slot gives it back.
    Broadcast = 3,
}

impl ConsumeMode {
    /// The mode of a view.
    #[must_use]
    pub fn from_wire(value: u32) -> Option<Self> {
        [Self::Single, Self::Partitioned, Self::Claimed, Self::Broadcast].into_iter().find(|&mode| mode as u32 == value)
    }
}

/// What a pop or a wait gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub enum Outcome {
    /// A slot: its payload is in place, whole. To be released.
    Ok = 0,
    /// No sequence this consumer could take follows.
    End = 1,
    /// One side gave up, or the queue's memory makes no sense (-EPROTO) or is another queue's (-ESTALE).
    Aborted = 2,
    /// A slot whose read failed. To be released.
    Poison = 3,
    /// Nothing yet.
    Timeout = 4,
}

/// A stream's tail line for Rust: the words of [`TailLineLayout`], little-endian, written by the stream alone.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct TailLineWords {
    /// Submissions, from the first on, whose every byte is in place (or that were skipped).
    pub tail: AtomicU64,
    /// Lowest submission that failed or was skipped; [`NO_SEQUENCE`] when there is none. Withdrawn when a failed
    /// submission succeeds on resubmission; final once it was skipped.
    pub first_bad: AtomicU64,
    /// One of [`state`].
    pub state: AtomicU32,
    /// -errno of `first_bad` while there is one, or of an abort.
    pub error: AtomicI32,
    /// Number of submissions; valid once state is not OPEN.
    pub end: AtomicU64,
    reserved: [AtomicU64; 12],
}

/// The words of a tail line, 128 bytes at a multiple of 128. Written by the stream alone; read them atomically.
///
/// A consumer that waits for submission n loads tail (acquire). While it is <= n the consumer looks at first_bad (<= n:
/// it may never come) and state. When it is > n the data is in place, unless first_bad, loaded after, is <= n.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct TailLineLayout {
    /// Submissions, from the first on, whose every byte is in place (or that were skipped).
    pub tail: u64,
    /// Lowest submission that failed or was skipped; UINT64_MAX when there is none. Withdrawn when a failed submission
    /// succeeds on resubmission; final once it was skipped.
    pub first_bad: u64,
    /// enum ringest_state.
    pub state: u32,
    /// -errno of first_bad while there is one, or of an abort.
    pub error: i32,
    /// Number of submissions; valid once state is not RINGEST_STATE_OPEN.
    pub end: u64,
    /// Zero.
    pub reserved: [u64; 12],
}

/// First 128 bytes of a control block: written before the first consumer may look, never changed.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct ControlHeader {
    /// RINGEST_IO_QUEUE_MAGIC.
    pub magic: u32,
    /// RINGEST_IO_QUEUE_VERSION.
    pub version: u32,
    /// Bytes before the descriptors: RINGEST_IO_QUEUE_DESCRIPTORS.
    pub header_bytes: u32,
    /// A power of two.
    pub slot_count: u32,
    /// Bytes from one slot to the next.
    pub slot_stride: u64,
    /// Most bytes of a payload.
    pub slot_bytes: u64,
    /// Another value in each queue.
    pub epoch: u64,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub reserved: [u32; 21],
}

/// Everything but the descriptors of a control block. The host writes it, devices only read.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ControlBlock {
    /// At 0x000.
    pub header: ControlHeader,
    /// At 0x080: sequences, from the first on, that are published, failed ones included.
    pub tail: u64,
    /// Lowest sequence below tail that failed; UINT64_MAX: none. Stored before the tail that passes it.
    pub first_bad: u64,
    /// Zero.
    pub reserved_tail: [u64; 14],
    /// At 0x100: enum ringest_state; stored after error and end.
    pub state: u32,
    /// -errno of an abort.
    pub error: i32,
    /// Number of sequences, once state is RINGEST_STATE_END.
    pub end: u64,
    /// Zero.
    pub reserved_state: [u64; 30],
}

/// What became of a sequence: a slot's descriptor, at RINGEST_IO_QUEUE_DESCRIPTORS + 64 * slot of the control block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Descriptor {
    /// Sequence + 1, stored last; what it was before, or 0, until then.
    pub seq: u64,
    /// 0, or -errno: the slot is poisoned.
    pub status: i32,
    /// Bytes in place, from data_offset of the slot on.
    pub bytes: u32,
    /// The submitter's value.
    pub tag: u64,
    /// Where in the file the payload begins.
    pub file_offset: u64,
    /// Where in the slot the payload begins; the same as file_offset modulo 16.
    pub data_offset: u32,
    /// CRC32C of the payload, where flags has RINGEST_DESCRIPTOR_CRC32C.
    pub crc32c: u32,
    /// enum ringest_read_path: the path that was really taken.
    pub path: u16,
    /// RINGEST_DESCRIPTOR_* bits.
    pub flags: u16,
    /// NVMe status of a failed passthrough command; 0 otherwise.
    pub nvme_status: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

impl Descriptor {
    /// The descriptor as the eight words that are stored.
    #[must_use]
    pub fn to_words(&self) -> [u64; 8] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            self.seq,
            pair(self.status as u32, self.bytes),
            self.tag,
            self.file_offset,
            pair(self.data_offset, self.crc32c),
            u64::from(self.path) | u64::from(self.flags) << 16 | u64::from(self.nvme_status) << 32,
            self.reserved[0],
            self.reserved[1],
        ]
    }

    /// The descriptor that these words are.
    #[must_use]
    pub fn from_words(words: [u64; 8]) -> Self {
        let high = |word: u64| (word >> 32) as u32;
        Self {
            seq: words[0],
            status: words[1] as u32 as i32,
            bytes: high(words[1]),
            tag: words[2],
            file_offset: words[3],
            data_offset: words[4] as u32,
            crc32c: high(words[4]),
            path: words[5] as u16,
            flags: (words[5] >> 16) as u16,
            nvme_status: high(words[5]),
            reserved: [words[6], words[7]],
        }
    }
}

/// What a kernel gets, by value: where an io_queue is and how it is cut. One for each device.
///
/// Geometry comes from here, never from memory that others can write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct IoQueueView {
    /// RINGEST_IO_QUEUE_MAGIC.
    pub magic: u32,
    /// RINGEST_IO_QUEUE_VERSION.
    pub version: u32,
    /// enum ringest_consume_mode.
    pub mode: u32,
    /// A power of two.
    pub slot_count: u32,
    /// Bytes from one slot to the next.
    pub slot_stride: u64,
    /// Most bytes of a payload.
    pub slot_bytes: u64,
    /// The queue's, as in its control block.
    pub epoch: u64,
    /// Consumers: readers of every sequence (broadcast), partitions, or most tickets held at a time (claimed).
    pub consumers: u32,
    /// Zero.
    pub flags: u32,
    /// Address of the control block, for the reader of this view.
    pub control: u64,
    /// Address of the credit block.
    pub credit: u64,
    /// Address of the device block.
    pub device: u64,
    /// Address of the first slot.
    pub slots: u64,
    /// Zero.
    pub reserved: [u64; 6],
}

const fn up(value: u64, alignment: u64) -> u64 {
    value.next_multiple_of(alignment)
}

/// Bytes of a control block.
#[must_use]
pub const fn control_bytes(slot_count: u32) -> u64 {
    IO_QUEUE_DESCRIPTORS as u64 + slot_count as u64 * size_of::<Descriptor>() as u64
}

/// Bytes of a credit block: `i32 abort` at 0, `u64 released[slot_count]` at 0x80.
#[must_use]
pub const fn credit_bytes(slot_count: u32) -> u64 {
    up(IO_QUEUE_RELEASED as u64 + slot_count as u64 * 8, IO_QUEUE_ALIGNMENT as u64)
}

/// Where `u32 pending[slot_count]` begins in a device block.
#[must_use]
pub const fn pending_offset(consumers: u32) -> u64 {
    up(IO_QUEUE_TICKETS as u64 + consumers as u64 * 8, IO_QUEUE_ALIGNMENT as u64)
}

/// Bytes of a device block: `u64 claim` at 0, `u32 handed` at 8, `u64 tickets[consumers]` at 0x80, then `pending`. All
/// zero at first.
#[must_use]
pub const fn device_bytes(consumers: u32, slot_count: u32) -> u64 {
    up(pending_offset(consumers) + slot_count as u64 * 4, IO_QUEUE_ALIGNMENT as u64)
}

const _: () = {
    assert!(size_of::<TailLineWords>() == 128 && align_of::<TailLineWords>() == 128);
    assert!(offset_of!(TailLineWords, tail) == 0);
    assert!(offset_of!(TailLineWords, first_bad) == 8);
    assert!(offset_of!(TailLineWords, state) == 16);
    assert!(offset_of!(TailLineWords, error) == 20);
    assert!(offset_of!(TailLineWords, end) == 24);

    assert!(size_of::<TailLineLayout>() == 128);
    assert!(offset_of!(TailLineLayout, tail) == 0);
    assert!(offset_of!(TailLineLayout, first_bad) == 8);
    assert!(offset_of!(TailLineLayout, state) == 16);
    assert!(offset_of!(TailLineLayout, error) == 20);
    assert!(offset_of!(TailLineLayout, end) == 24);

    assert!(size_of::<ControlHeader>() == 128);
    assert!(offset_of!(ControlHeader, magic) == 0);
    assert!(offset_of!(ControlHeader, version) == 4);
    assert!(offset_of!(ControlHeader, header_bytes) == 8);
    assert!(offset_of!(ControlHeader, slot_count) == 12);
    assert!(offset_of!(ControlHeader, slot_stride) == 16);
    assert!(offset_of!(ControlHeader, slot_bytes) == 24);
    assert!(offset_of!(ControlHeader, epoch) == 32);
    assert!(offset_of!(ControlHeader, flags) == 40);

    assert!(size_of::<ControlBlock>() == IO_QUEUE_DESCRIPTORS as usize);
    assert!(offset_of!(ControlBlock, tail) == 0x80);
    assert!(offset_of!(ControlBlock, first_bad) == 0x88);
    assert!(offset_of!(ControlBlock, state) == 0x100);
    assert!(offset_of!(ControlBlock, error) == 0x104);
    assert!(offset_of!(ControlBlock, end) == 0x108);

    assert!(size_of::<Descriptor>() == 64);
    assert!(offset_of!(Descriptor, seq) == 0);
    assert!(offset_of!(Descriptor, status) == 8);
    assert!(offset_of!(Descriptor, bytes) == 12);
    assert!(offset_of!(Descriptor, tag) == 16);
    assert!(offset_of!(Descriptor, file_offset) == 24);
    assert!(offset_of!(Descriptor, data_offset) == 32);
    assert!(offset_of!(Descriptor, crc32c) == 36);
    assert!(offset_of!(Descriptor, path) == 40);
    assert!(offset_of!(Descriptor, flags) == 42);
    assert!(offset_of!(Descriptor, nvme_status) == 44);
    assert!(offset_of!(Descriptor, reserved) == 48);

    assert!(size_of::<IoQueueView>() == 128);
    assert!(offset_of!(IoQueueView, magic) == 0);
    assert!(offset_of!(IoQueueView, version) == 4);
    assert!(offset_of!(IoQueueView, mode) == 8);
    assert!(offset_of!(IoQueueView, slot_count) == 12);
    assert!(offset_of!(IoQueueView, slot_stride) == 16);
    assert!(offset_of!(IoQueueView, slot_bytes) == 24);
    assert!(offset_of!(IoQueueView, epoch) == 32);
    assert!(offset_of!(IoQueueView, consumers) == 40);
    assert!(offset_of!(IoQueueView, flags) == 44);
    assert!(offset_of!(IoQueueView, control) == 48);
    assert!(offset_of!(IoQueueView, credit) == 56);
    assert!(offset_of!(IoQueueView, device) == 64);
    assert!(offset_of!(IoQueueView, slots) == 72);
};

impl TailLineWords {
    /// Empty and open. Only before a consumer looks at it.
    pub(crate) fn reset(&self) {
        self.tail.store(0, Ordering::Relaxed);
        self.end.store(0, Ordering::Relaxed);
        self.error.store(0, Ordering::Relaxed);
        self.first_bad.store(NO_SEQUENCE, Ordering::Relaxed);
        self.state.store(state::OPEN, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_its_words() {
        let words = std::array::from_fn(|index| 0x0102_0304_0506_0708u64.rotate_left(index as u32 * 8) ^ index as u64);
        let descriptor = Descriptor::from_words(words);
        assert_eq!(descriptor.to_words(), words);
        // SAFETY: both are 64 bytes without padding, and every bit pattern is a value of either.
        let stored: [u64; 8] = unsafe { std::mem::transmute(descriptor) };
        assert_eq!(stored, words);
    }

    #[test]
    fn sizes_of_blocks() {
        assert_eq!(control_bytes(2), 0x280);
        assert_eq!(credit_bytes(2), 0x100);
        assert_eq!(credit_bytes(65_536), 0x80 + 65_536 * 8);
        assert_eq!((pending_offset(1), device_bytes(1, 2)), (0x100, 0x180));
        assert_eq!((pending_offset(17), device_bytes(17, 64)), (0x180, 0x280));
    }
}
