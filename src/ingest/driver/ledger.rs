//! The account of slots and requests: what each slot is read for, what the end of a read means, and the records.

use super::super::io_queue::IoQueue;
use super::super::telemetry::{Histogram, NvmeGpuIngestTelemetry};
use super::{IngestCompletion, IngestRequest};
use crate::memory::MemoryKind;
use crate::uring::Completion;
use crate::wire::{DESCRIPTOR_CRC32C, DESCRIPTOR_EARLY, Descriptor};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Stage {
    #[default]
    Idle,
    /// Its read is in flight.
    Reading,
    /// Published as poison; its read is still in flight.
    Held,
}

/// The read that has a slot.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Reading {
    pub(super) stage: Stage,
    pub(super) sequence: u64,
    pub(super) request: u64,
    pub(super) tag: u64,
    pub(super) file_offset: u64,
    pub(super) len: u32,
    /// Where in the slot the payload begins.
    pub(super) data_offset: u32,
    /// Bytes read before it, for O_DIRECT.
    pub(super) lead: u32,
    /// The stream's number of the read.
    pub(super) number: u64,
    pub(super) at: Duration,
    pub(super) deadline: Duration,
}

/// See the module's text.
pub(super) struct Ledger {
    pub(super) queue: Arc<IoQueue>,
    /// By slot.
    pub(super) readings: Box<[Reading]>,
    /// Slots in stage Reading, and Held.
    pub(super) reading: usize,
    pub(super) held: usize,
    /// Records not taken.
    pub(super) ended: VecDeque<IngestCompletion>,
    /// Of these, the last whose slots are published without a word to the tail, nor a time.
    unsettled: usize,
    /// Most requests whose records were not taken: there is room for all.
    pub(super) capacity: usize,
    /// Put the payload's CRC32C into each descriptor.
    checksums: bool,
    pub(super) counts: NvmeGpuIngestTelemetry,
    pub(super) latency: Histogram,
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.queue.leave();
    }
}

impl Ledger {
    pub(super) fn new(queue: Arc<IoQueue>, queue_limit: usize, checksums: bool) -> Self {
        let slots = queue.slots() as usize;
        // Every slot may have a request that ended and one that has not.
        let capacity = 2 * slots + queue_limit;
        Self {
            readings: vec![Reading::default(); slots].into(),
            reading: 0,
            held: 0,
            ended: VecDeque::with_capacity(capacity),
            unsettled: 0,
            capacity,
            checksums,
            counts: NvmeGpuIngestTelemetry::default(),
            latency: Histogram::new(),
            queue,
        }
    }

    #[inline(always)]
    pub(super) fn slot_of(&self, sequence: u64) -> usize {
        (sequence & (self.readings.len() as u64 - 1)) as usize
    }

    /// A slot is read for a request from now on.
    #[inline]
    pub(super) fn begin(&mut self, slot: usize, reading: Reading) {
        self.readings[slot] = reading;
        self.reading += 1;
        self.counts.max_in_flight = self.counts.max_in_flight.max(self.reading as u64);
    }

    /// A read ended.
    #[inline]
    pub(super) fn on_read(&mut self, completion: &Completion, clock: &dyn Fn() -> Duration) {
        let slot = self.slot_of(completion.user_data);
        debug_assert_eq!(self.readings[slot].sequence, completion.user_data);
        match self.readings[slot].stage {
            Stage::Reading => {
                self.end(slot, completion);
                if self.checksums {
                    // Nobody waits for the next one's checksum.
                    self.settle(clock());
                }
            }
            Stage::Held => {
                self.queue.producer().land(completion.user_data);
                self.counts.bounce_bytes += completion.bounced;
                self.readings[slot].stage = Stage::Idle;
                self.held -= 1;
            }
            Stage::Idle => debug_assert!(false, "the read of sequence {} ended twice", completion.user_data),
        }
    }

    /// Publishes a slot whose read has ended, and records the request's end, but for what [`settle`](Self::settle) adds.
    #[inline]
    pub(super) fn end(&mut self, slot: usize, completion: &Completion) {
        let reading = &self.readings[slot];
        // Whole blocks were read: what lies before and behind the payload does not count, and may be missing.
        let landed = completion.bytes.saturating_sub(reading.lead.into()).min(reading.len.into()) as u32;
        let (status, bytes) = match -completion.status {
            0 => (0, reading.len),
            libc::ENODATA if landed == reading.len => (0, reading.len),
            // The bytes up to the end of the file are in place; after other errors nobody knows which are.
            libc::ENODATA => (-libc::ENODATA, landed),
            errno => (-errno, 0),
        };
        let checked = self.checksums && bytes > 0;
        let descriptor = Descriptor {
            status,
            bytes,
            tag: reading.tag,
            file_offset: reading.file_offset,
            data_offset: reading.data_offset,
            crc32c: if checked { self.crc32c(slot, reading.data_offset, bytes) } else { 0 },
            path: completion.path as u16,
            flags: if checked { DESCRIPTOR_CRC32C as u16 } else { 0 },
            ..Descriptor::default()
        };
        let published = self.queue.producer().publish_untold(reading.sequence, &descriptor);
        debug_assert!(published, "sequence {} was published by somebody else", reading.sequence);
        let record = IngestCompletion {
            request: reading.request,
            sequence: reading.sequence,
            tag: reading.tag,
            file_offset: reading.file_offset,
            requested: reading.len,
            bytes,
            bounced: completion.bounced,
            status,
            path: completion.path,
            // When it began; `settle` makes a latency of it.
            latency: reading.at,
        };
        self.readings[slot].stage = Stage::Idle;
        self.reading -= 1;
        self.counts.published_slots += 1;
        self.counts.poisoned_slots += u64::from(status != 0);
        self.counts.bounce_bytes += completion.bounced;
        self.record(record);
        self.unsettled += 1;
    }

    /// Whether there are slots that are published without a word to the tail, nor a time.
    pub(super) fn has_unsettled(&self) -> bool {
        self.unsettled > 0
    }

    /// Has the tail follow what was published, once for all of it, and notes how long it took.
    pub(super) fn settle(&mut self, now: Duration) {
        self.queue.producer().settle();
        let first = self.ended.len() - std::mem::take(&mut self.unsettled);
        for completion in self.ended.range_mut(first..) {
            completion.latency = now.saturating_sub(completion.latency);
            if completion.status == 0 {
                self.latency.record(completion.latency);
            }
        }
    }

    #[cold]
    fn crc32c(&self, slot: usize, data_offset: u32, bytes: u32) -> u32 {
        let memory = self.queue.slot_memory();
        debug_assert_eq!(memory.kind(), MemoryKind::HostVisible);
        let offset = slot * self.queue.slot_stride() as usize + data_offset as usize;
        let payload = memory.clone_handle().sub_region(offset, bytes as usize);
        payload.map_or(0, |payload| {
            // SAFETY: the read into the slot has ended, and the slot is not published: nobody writes to it. The memory
            // is the CPU's to read: the driver's options were checked against it.
            unsafe { payload.as_slice() }.map_or(0, crc32c::crc32c)
        })
    }

    /// Counts the end of a request and keeps its record.
    #[inline(always)]
    fn record(&mut self, completion: IngestCompletion) {
        match -completion.status {
            0 => {
                self.counts.completed.add(completion.bytes.into());
                self.counts.paths[completion.path as usize].add(completion.bytes.into());
            }
            errno => {
                self.counts.failed += 1;
                self.counts.end_of_file += u64::from(errno == libc::ENODATA);
                self.counts.cancelled += u64::from(errno == libc::ECANCELED);
                self.counts.timed_out += u64::from(errno == libc::ETIMEDOUT);
            }
        }
        debug_assert!(self.ended.len() < self.capacity);
        self.ended.push_back(completion);
    }

    /// Ends a request that never had a slot.
    pub(super) fn end_without_slot(
        &mut self,
        number: u64,
        request: &IngestRequest,
        at: Duration,
        errno: i32,
        now: Duration,
    ) {
        self.record(IngestCompletion {
            request: number,
            tag: request.tag,
            file_offset: request.file_offset,
            requested: request.len,
            status: -errno,
            latency: now.saturating_sub(at),
            ..IngestCompletion::default()
        });
    }

    /// Publishes a slot as poison while its read goes on; the slot stays taken until that has ended.
    pub(super) fn poison_early(&mut self, slot: usize, errno: i32, now: Duration) {
        let reading = self.readings[slot];
        let descriptor = Descriptor {
            status: -errno,
            tag: reading.tag,
            file_offset: reading.file_offset,
            data_offset: reading.data_offset,
            flags: DESCRIPTOR_EARLY as u16,
            ..Descriptor::default()
        };
        self.queue.producer().poison_early(reading.sequence, &descriptor);
        self.readings[slot].stage = Stage::Held;
        self.reading -= 1;
        self.held += 1;
        self.counts.published_slots += 1;
        self.counts.poisoned_slots += 1;
        self.counts.early_poisoned_slots += 1;
        self.record(IngestCompletion {
            request: reading.request,
            sequence: reading.sequence,
            tag: reading.tag,
            file_offset: reading.file_offset,
            requested: reading.len,
            status: -errno,
            latency: now.saturating_sub(reading.at),
            ..IngestCompletion::default()
        });
    }
}
