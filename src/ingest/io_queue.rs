//! The io_queue: slots and the words by which a running kernel learns that one is filled.

use super::consumer::{Consumer, Popped};
use super::producer::{Producer, Refusal};
use super::words::MappedWords;
use crate::error::{PipelineError, Result};
use crate::gpu::Gpu;
use crate::memory::{DeviceBuffer, GpuMappedBuffer, HugePages, MappedBuffer, MappedOptions, MemoryKind, Pinning};
use crate::sys::thread::Process;
use crate::uring::count_leaked_queue;
use crate::wire::{
    self, ConsumeMode, ControlHeader, Descriptor, IO_QUEUE_ALIGNMENT, IO_QUEUE_DESCRIPTORS, IO_QUEUE_MAGIC,
    IO_QUEUE_MAX_CONSUMERS, IO_QUEUE_MAX_SLOTS, IO_QUEUE_MIN_SLOTS, IO_QUEUE_VERSION, IoQueueView, Outcome,
};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How an [`IoQueue`] is cut and consumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoQueueOptions {
    /// Slots: a power of two from 2 to 65,536.
    pub slots: u32,
    /// Most bytes of a payload, up to 1 GiB.
    pub slot_bytes: u32,
    /// Alignment of slots, a power of two from 128 to 2 MiB: at least the block size of files read with O_DIRECT, whose
    /// reads then go straight into the slot, whatever their offset. Each slot has room for a block on either side.
    pub alignment: u32,
    /// How consumers share the queue.
    pub mode: ConsumeMode,
    /// Consumers: readers of every sequence (broadcast), partitions, or most tickets held at a time (claimed); 1 for
    /// [`ConsumeMode::Single`].
    pub consumers: u32,
    /// Page size wanted for the slots.
    pub huge_pages: HugePages,
}

impl Default for IoQueueOptions {
    fn default() -> Self {
        Self {
            slots: 64,
            slot_bytes: 1 << 20,
            alignment: 4096,
            mode: ConsumeMode::Single,
            consumers: 1,
            huge_pages: HugePages::default(),
        }
    }
}

/// Bytes that the parts of an [`IoQueue`] take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoQueueLayout {
    /// Of the control block.
    pub control: u64,
    /// Of the credit block.
    pub credit: u64,
    /// Of the device block.
    pub device: u64,
    /// Of all slots.
    pub slots: u64,
    /// From one slot to the next.
    pub slot_stride: u64,
}

impl IoQueueOptions {
    /// Bytes that the queue's parts take.
    ///
    /// # Errors
    /// `EINVAL` for options out of range.
    pub fn layout(&self) -> Result<IoQueueLayout> {
        let Self { slots, slot_bytes, alignment, mode, consumers, .. } = *self;
        let refuse = |what: String, fix: &'static str| Err(PipelineError::invalid(what, fix));
        if !slots.is_power_of_two() || !(IO_QUEUE_MIN_SLOTS..=IO_QUEUE_MAX_SLOTS).contains(&slots) {
            return refuse(format!("{slots} slots"), "use a power of two from 2 to 65536");
        }
        if slot_bytes == 0 || slot_bytes > 1 << 30 {
            return refuse(format!("slots of {slot_bytes} bytes"), "use 1 byte to 1 GiB");
        }
        if !alignment.is_power_of_two() || !(IO_QUEUE_ALIGNMENT..=2 << 20).contains(&alignment) {
            return refuse(format!("slots aligned to {alignment} bytes"), "use a power of two from 128 to 2 MiB");
        }
        let most = if mode == ConsumeMode::Single { 1 } else { IO_QUEUE_MAX_CONSUMERS };
        if !(1..=most).contains(&consumers) {
            return refuse(format!("{consumers} consumers, {mode:?}"), "use 1 (single) or up to 65536");
        }
        let alignment = u64::from(alignment);
        // A block before and one after the payload, which begins anywhere in the first one.
        let slot_stride = (u64::from(slot_bytes) + 2 * alignment).next_multiple_of(alignment);
        Ok(IoQueueLayout {
            control: wire::control_bytes(slots),
            credit: wire::credit_bytes(slots),
            device: wire::device_bytes(consumers, slots),
            slots: slot_stride * u64::from(slots),
            slot_stride,
        })
    }
}

/// Memory for the parts of an [`IoQueue`], at least as large as [`IoQueueOptions::layout`] says and aligned to 128 bytes
/// (the slots as the options say), in the host's and in the device's address space.
#[derive(Debug)]
pub struct IoQueueMemory {
    /// Host writes, devices read. Host-visible.
    pub control: GpuMappedBuffer<'static>,
    /// Devices write, the host reads. Host-visible.
    pub credit: GpuMappedBuffer<'static>,
    /// Devices only.
    pub device: GpuMappedBuffer<'static>,
    /// The slots.
    pub slots: GpuMappedBuffer<'static>,
}

/// Slots that a producer fills and that running consumers, on a GPU or on the CPU, take and give back.
///
/// Sequence n (from 0) lives in slot n mod `slots`. A producer [`reserve`](Self::reserve)s the next sequence, fills its
/// slot and publishes it; consumers find it by its descriptor or by the tail, and release the slot; then it is
/// reserved again. What fails is published too, as poison: nobody waits for what will never come. The protocol is in the
/// manual.
///
/// Any thread may reserve, publish and end. Memory that consumers may still look at is never freed: see
/// [`consumers_stopped`](Self::consumers_stopped).
pub struct IoQueue {
    producer: Producer<MappedWords>,
    memory: IoQueueMemory,
    /// With the host's addresses.
    view: IoQueueView,
    /// Of the slots.
    alignment: u32,
    /// A view was given out and the consumers that have it may still run.
    lent: AtomicBool,
    /// A driver fills it.
    driven: AtomicBool,
    /// Which consumers of this process are attached.
    attached: Mutex<Vec<u32>>,
    /// Whose memory it is: none of it is in forked children.
    process: Process,
}

impl std::fmt::Debug for IoQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoQueue")
            .field("view", &self.view)
            .field("tail", &self.producer.tail())
            .field("reserved", &self.producer.reserved())
            .finish_non_exhaustive()
    }
}

impl IoQueue {
    /// A queue in plain memory of its own, for consumers on the CPU.
    ///
    /// # Errors
    /// `EINVAL` for options out of range, `ENOMEM`.
    pub fn new(options: IoQueueOptions) -> Result<Arc<Self>> {
        Self::pinned(options, &Pinning::Off)
    }

    /// A queue in page-locked memory of its own, which the host and GPUs see.
    ///
    /// # Errors
    /// As [`new`](Self::new), and those of the [`Pinning`].
    pub fn pinned(options: IoQueueOptions, pinning: &Pinning) -> Result<Arc<Self>> {
        let memory = Self::parts(&options, pinning)?;
        // SAFETY: the memory is fresh, zeroed, and known to nobody else.
        unsafe { Self::in_memory(options, memory) }
    }

    /// A queue for kernels of one GPU alone: page-locked like that of [`pinned`](Self::pinned), with the device block,
    /// which its blocks work on by atomics, in the GPU's own memory. The CPU cannot consume it: [`consumer`](Self::consumer)
    /// is refused, and [`host_view`](Self::host_view) of no use.
    ///
    /// # Errors
    /// As [`pinned`](Self::pinned), and those of [`DeviceBuffer::alloc`].
    pub fn on_gpu(options: IoQueueOptions, gpu: &Gpu) -> Result<Arc<Self>> {
        let mut memory = Self::parts(&options, &Pinning::Gpus(vec![gpu.clone()]))?;
        let len = options.layout()?.device as usize;
        let mut device = DeviceBuffer::alloc(gpu, len)?;
        device.fill(0, len, 0)?;
        let address = device.as_device_ptr();
        // SAFETY: the owner keeps the memory. The CPU's address stands for it in comparisons only: nothing reads or writes
        // there, because the kind says that the CPU cannot, and no ring is given it.
        let device = unsafe {
            let base = std::ptr::without_provenance_mut(address as usize);
            GpuMappedBuffer::from_bar1_peer_with_owner(base, len, address, device)
        };
        memory.device = device?.on_gpu(gpu)?;
        // SAFETY: the memory is fresh, zeroed, and known to nobody else.
        unsafe { Self::in_memory(options, memory) }
    }

    fn parts(options: &IoQueueOptions, pinning: &Pinning) -> Result<IoQueueMemory> {
        let layout = options.layout()?;
        let alloc = |bytes: u64, alignment: u32, huge_pages| {
            let options = MappedOptions { alignment: alignment as usize, huge_pages, pinning: pinning.clone() };
            MappedBuffer::<u8>::alloc_with(bytes as usize, options).map(GpuMappedBuffer::from)
        };
        let words = |bytes| alloc(bytes, 0, HugePages::Off);
        Ok(IoQueueMemory {
            control: words(layout.control)?,
            credit: words(layout.credit)?,
            device: words(layout.device)?,
            slots: alloc(layout.slots, options.alignment, options.huge_pages)?,
        })
    }

    /// A queue in the caller's memory, each part of its own kind.
    ///
    /// # Safety
    /// While the queue or a consumer lives, nothing but the protocol touches the memory: no other read goes into it, no
    /// host slice of it is made. A device block that the CPU cannot write is zero. What the CPU writes is write-back
    /// memory, not write-combined.
    ///
    /// # Errors
    /// `EINVAL` for options out of range, parts not aligned or overlapping; `ERANGE` for parts too small; `EOPNOTSUPP` for
    /// a control or credit block that the CPU cannot address.
    pub unsafe fn in_memory(options: IoQueueOptions, memory: IoQueueMemory) -> Result<Arc<Self>> {
        let layout = options.layout()?;
        let line = u64::from(IO_QUEUE_ALIGNMENT);
        let parts = [
            ("control block", &memory.control, layout.control, line, true),
            ("credit block", &memory.credit, layout.credit, line, true),
            ("device block", &memory.device, layout.device, line, false),
            ("slots of an io_queue", &memory.slots, layout.slots, u64::from(options.alignment), false),
        ];
        for (what, buffer, bytes, alignment, host) in parts {
            PipelineError::check_range(what, 0, bytes, buffer.len() as u64)?;
            let device = buffer.as_device_ptr().unwrap_or(0);
            // The device's view of the slots needs what its bulk copies need, and no more.
            if !(buffer.as_host_ptr() as u64).is_multiple_of(alignment) || !device.is_multiple_of(line) {
                return Err(PipelineError::invalid(
                    format!("{what} at {:p}, device {device:#x}", buffer.as_host_ptr()),
                    format!("align it to {alignment} bytes"),
                ));
            }
            if host && buffer.kind() != MemoryKind::HostVisible {
                return Err(PipelineError::unsupported(
                    format!("a {what} in device memory"),
                    "use host-visible memory: the CPU works on it",
                ));
            }
        }
        let mut ranges: Vec<_> = parts.iter().map(|part| (part.1.as_host_ptr() as u64, part.2)).collect();
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            return Err(PipelineError::invalid("parts of an io_queue that overlap", "give each its own memory"));
        }
        let view = IoQueueView {
            magic: IO_QUEUE_MAGIC,
            version: IO_QUEUE_VERSION,
            mode: options.mode as u32,
            slot_count: options.slots,
            slot_stride: layout.slot_stride,
            slot_bytes: options.slot_bytes.into(),
            epoch: new_epoch(),
            consumers: options.consumers,
            control: memory.control.as_host_ptr() as u64,
            credit: memory.credit.as_host_ptr() as u64,
            device: memory.device.as_host_ptr() as u64,
            slots: memory.slots.as_host_ptr() as u64,
            ..IoQueueView::default()
        };
        // SAFETY: ranges and alignment were checked, the memory lives as long as the queue, and nobody else touches it.
        let words = unsafe {
            memory.control.as_host_ptr().write_bytes(0, layout.control as usize);
            memory.credit.as_host_ptr().write_bytes(0, layout.credit as usize);
            if memory.device.kind() == MemoryKind::HostVisible {
                memory.device.as_host_ptr().write_bytes(0, layout.device as usize);
            }
            memory.control.as_host_ptr().cast::<ControlHeader>().write(ControlHeader {
                magic: view.magic,
                version: view.version,
                header_bytes: IO_QUEUE_DESCRIPTORS,
                slot_count: view.slot_count,
                slot_stride: view.slot_stride,
                slot_bytes: view.slot_bytes,
                epoch: view.epoch,
                ..ControlHeader::default()
            });
            MappedWords::new(&view)
        };
        Ok(Arc::new(Self {
            producer: Producer::new(words, options.slots, 0),
            memory,
            view,
            alignment: options.alignment,
            lent: AtomicBool::new(false),
            driven: AtomicBool::new(false),
            attached: Mutex::new(Vec::new()),
            process: Process::current(),
        }))
    }

    // For consumers

    /// What a kernel on the device gets: the view with the device's addresses. From now on the memory is lent out.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when no GPU maps one of the parts.
    pub fn view(&self) -> Result<IoQueueView> {
        self.lend(|what, buffer| {
            buffer.as_device_ptr().ok_or_else(|| {
                PipelineError::unsupported(
                    format!("a device's view of the {what}"),
                    "no GPU maps it: give its device address when wrapping the memory",
                )
            })
        })
    }

    /// The same for one of several GPUs.
    ///
    /// # Errors
    /// Those of [`GpuMappedBuffer::as_device_ptr_on`]: `EOPNOTSUPP` when this GPU does not map one of the parts.
    pub fn view_on(&self, gpu: &Gpu) -> Result<IoQueueView> {
        self.lend(|_, buffer| buffer.as_device_ptr_on(gpu))
    }

    fn lend(&self, address: impl Fn(&'static str, &GpuMappedBuffer<'static>) -> Result<u64>) -> Result<IoQueueView> {
        let view = IoQueueView {
            control: address("control block", &self.memory.control)?,
            credit: address("credit block", &self.memory.credit)?,
            device: address("device block", &self.memory.device)?,
            slots: address("slots", &self.memory.slots)?,
            ..self.view
        };
        self.lent.store(true, Ordering::Relaxed);
        Ok(view)
    }

    /// The view with this process's addresses, for consumers on the CPU. From now on the memory is lent out.
    #[must_use]
    pub fn host_view(&self) -> IoQueueView {
        self.lent.store(true, Ordering::Relaxed);
        self.view
    }

    /// The caller's word that nothing uses a view of this queue any more: all kernels that have one ended.
    pub fn consumers_stopped(&self) {
        self.lent.store(false, Ordering::Relaxed);
    }

    /// Whether a view was given out since the last [`consumers_stopped`](Self::consumers_stopped).
    #[must_use]
    pub fn is_lent(&self) -> bool {
        self.lent.load(Ordering::Relaxed)
    }

    /// A consumer in this process, which keeps the queue's memory.
    ///
    /// # Errors
    /// `ERANGE` for an index beyond the consumers, `EBUSY` while a consumer with this index is attached,
    /// `EOPNOTSUPP` when the CPU cannot read the slots or the device block, `EPERM` in a forked child.
    pub fn consumer(self: &Arc<Self>, index: u32) -> Result<IoQueueConsumer> {
        self.check_process()?;
        PipelineError::check_range("consumer of an io_queue", index.into(), 1, self.view.consumers.into())?;
        let host = |buffer: &GpuMappedBuffer<'_>| buffer.kind() == MemoryKind::HostVisible;
        if !host(&self.memory.slots) || !host(&self.memory.device) {
            return Err(PipelineError::unsupported(
                "a consumer on the CPU of memory of a device",
                "pop on the device, or use host-visible memory",
            ));
        }
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if attached.contains(&index) {
            return Err(PipelineError::busy(format!("consumer {index}"), "drop it first, or take another index"));
        }
        // SAFETY: the view is ours, its addresses are those of this process, and the queue is kept.
        let mut consumer = unsafe { IoQueueConsumer::attach(&self.view, index) }?;
        attached.push(index);
        consumer.queue = Some(Arc::clone(self));
        Ok(consumer)
    }

    // For producers

    /// Reserves the next sequence and its slot.
    ///
    /// # Errors
    /// `EAGAIN` while the slot's consumers have not released it, or something may still write to it; `EBUSY` after
    /// [`finish`](Self::finish); `ECANCELED` after an abort; `EPERM` in a forked child.
    pub fn reserve(&self) -> Result<IoSlot<'_>> {
        self.check_process()?;
        self.producer.check_abort();
        match self.producer.reserve() {
            Ok(sequence) => Ok(IoSlot { queue: self, sequence, done: false }),
            Err(refusal) => Err(self.refusal(refusal)),
        }
    }

    pub(super) fn refusal(&self, refusal: Refusal) -> PipelineError {
        match refusal {
            Refusal::NoCredit => PipelineError::QueueFull {
                queue: "the io_queue",
                fix: format!("wait for consumers to release one of its {} slots", self.view.slot_count).into(),
            },
            Refusal::Held => PipelineError::QueueFull {
                queue: "the io_queue",
                fix: "poll: a read that was given up still holds the next slot".into(),
            },
            Refusal::Ended => PipelineError::busy("the io_queue", "its end was announced: make a new one"),
            Refusal::Aborted(errno) => PipelineError::QueueAborted { errno },
        }
    }

    /// A driver takes the queue; its end is the queue's.
    pub(super) fn take_for_driver(&self) -> Result<()> {
        match self.driven.swap(true, Ordering::Relaxed) {
            true => Err(PipelineError::busy("the io_queue", "another driver fills it: give each driver its own queue")),
            false => Ok(()),
        }
    }

    /// The driver is gone.
    pub(super) fn leave(&self) {
        self.driven.store(false, Ordering::Relaxed);
    }

    pub(super) fn producer(&self) -> &Producer<MappedWords> {
        &self.producer
    }

    /// Publishes a reserved sequence by its number; see [`IoSlot`], which cannot be misused.
    pub(crate) fn publish(&self, sequence: u64, data: &SlotData) -> Result<()> {
        self.check_process()?;
        let SlotData { status, bytes, data_offset, .. } = *data;
        if status > 0 || bytes > self.slot_bytes() {
            return Err(PipelineError::invalid(
                format!("a slot with status {status} and {bytes} bytes"),
                format!("use 0 or -errno, and at most {} bytes", self.view.slot_bytes),
            ));
        }
        let room = self.view.slot_stride;
        PipelineError::check_range("payload of a slot", data_offset.into(), bytes.into(), room)?;
        if u64::from(data_offset) % 16 != data.file_offset % 16 {
            return Err(PipelineError::invalid(
                format!("data offset {data_offset} for file offset {}", data.file_offset),
                "they must be the same modulo 16",
            ));
        }
        let descriptor = Descriptor {
            status,
            bytes,
            tag: data.tag,
            file_offset: data.file_offset,
            data_offset,
            crc32c: data.crc32c.unwrap_or(0),
            path: data.path,
            flags: data.crc32c.map_or(0, |_| wire::DESCRIPTOR_CRC32C as u16),
            nvme_status: data.nvme_status,
            ..Descriptor::default()
        };
        if self.producer.publish(sequence, &descriptor) {
            return Ok(());
        }
        Err(PipelineError::invalid(format!("sequence {sequence}"), "only one that is reserved can be published, once"))
    }

    /// Announces that no sequence follows those reserved: consumers get END once they have taken these. Whether it was
    /// this call that did; never in a forked child.
    pub fn finish(&self) -> bool {
        self.check_process().is_ok() && self.producer.finish()
    }

    /// Gives up: consumers pop nothing more. Whether it was this call that did; never in a forked child.
    pub fn abort(&self, errno: i32) -> bool {
        self.check_process().is_ok() && self.producer.abort(errno)
    }

    /// Errno of an abort by either side; 0 without one. `EPERM` in a forked child, which does not have the memory.
    #[must_use]
    pub fn aborted(&self) -> i32 {
        self.check_process().map_or_else(|error| error.errno(), |()| self.producer.check_abort())
    }

    // Numbers

    /// Sequences, from the first on, that are published.
    #[must_use]
    pub fn tail(&self) -> u64 {
        self.producer.tail()
    }

    /// Sequences reserved so far.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.producer.reserved()
    }

    /// Sequences that could be reserved now, one after the other; none in a forked child.
    #[must_use]
    pub fn free_slots(&self) -> u32 {
        self.check_process().map_or(0, |()| self.producer.free_slots())
    }

    /// Slots.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.view.slot_count
    }

    /// Most bytes of a payload.
    #[must_use]
    pub fn slot_bytes(&self) -> u32 {
        self.view.slot_bytes as u32
    }

    /// Bytes from one slot to the next.
    #[must_use]
    pub fn slot_stride(&self) -> u64 {
        self.view.slot_stride
    }

    /// Alignment of the slots in bytes.
    #[must_use]
    pub fn alignment(&self) -> u32 {
        self.alignment
    }

    /// How consumers share the queue.
    #[must_use]
    pub fn mode(&self) -> ConsumeMode {
        ConsumeMode::from_wire(self.view.mode).unwrap_or_default()
    }

    /// Consumers.
    #[must_use]
    pub fn consumers(&self) -> u32 {
        self.view.consumers
    }

    /// The slots' memory.
    pub(crate) fn slot_memory(&self) -> &GpuMappedBuffer<'static> {
        &self.memory.slots
    }

    /// Frees the queue.
    ///
    /// # Errors
    /// `EBUSY`, together with the queue, while a view of it is lent out or something else (a driver, a consumer) has it.
    pub fn destroy(self: Arc<Self>) -> std::result::Result<(), (Arc<Self>, PipelineError)> {
        if let Err(error) = self.check_unused() {
            return Err((self, error));
        }
        Arc::try_unwrap(self).map(drop).map_err(|queue| (queue, in_use()))
    }

    /// Whether nothing but the caller has the queue.
    pub(crate) fn check_unused(self: &Arc<Self>) -> Result<()> {
        if self.is_lent() {
            return Err(PipelineError::busy("the io_queue", "stop its consumers and say so by consumers_stopped"));
        }
        if Arc::strong_count(self) > 1 { Err(in_use()) } else { Ok(()) }
    }

    /// Whether the queue's memory is there: not in a child of the process that made it.
    #[inline]
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.process.is_current() { Ok(()) } else { Err(PipelineError::Forked { what: "the io_queue" }) }
    }
}

fn in_use() -> PipelineError {
    PipelineError::busy("the io_queue", "close its driver and drop its consumers first")
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        if !self.is_lent() {
            return;
        }
        let IoQueueMemory { control, credit, device, slots } = &self.memory;
        let bytes: usize = [control, credit, device, slots].iter().map(|part| part.len()).sum();
        count_leaked_queue(bytes as u64);
        tracing::error!(
            target: "ringest::queue", bytes,
            "io_queue dropped while its view is lent out: its memory is leaked, because consumers may still use it"
        );
        for part in [control, credit, device, slots] {
            std::mem::forget(part.clone_handle());
        }
    }
}

/// Another number for each queue, also in the next process that maps the same memory.
fn new_epoch() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    RandomState::new().hash_one(COUNT.fetch_add(1, Ordering::Relaxed)).max(1)
}

/// What a producer says of a slot that it filled, or could not fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlotData {
    /// 0, or -errno: the slot is poisoned.
    pub status: i32,
    /// Bytes in place.
    pub bytes: u32,
    /// Where in the slot they begin; the same as `file_offset` modulo 16.
    pub data_offset: u32,
    /// Anything.
    pub tag: u64,
    /// Where in the file they came from.
    pub file_offset: u64,
    /// CRC32C of the payload, for consumers that check it.
    pub crc32c: Option<u32>,
    /// The path that was really taken, a [`ReadPath`](crate::ReadPath) as a number.
    pub path: u16,
    /// NVMe status of a failed passthrough command.
    pub nvme_status: u32,
}

/// A reserved slot: to be filled and published. Dropped instead, it is published as poison (`ECANCELED`).
#[derive(Debug)]
#[must_use]
pub struct IoSlot<'q> {
    queue: &'q IoQueue,
    sequence: u64,
    done: bool,
}

impl IoSlot<'_> {
    /// The sequence.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Where the slot begins in the queue's slots, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        (self.sequence & u64::from(self.queue.view.slot_count - 1)) * self.queue.view.slot_stride
    }

    /// The slot's bytes, all of its stride.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for memory that the CPU must not touch, `EPERM` in a forked child.
    pub fn as_mut_slice(&mut self) -> Result<&mut [u8]> {
        self.queue.check_process()?;
        let memory = &self.queue.memory.slots;
        if memory.kind() != MemoryKind::HostVisible {
            return Err(PipelineError::unsupported("CPU access to a slot in device memory", "have a device fill it"));
        }
        let (offset, stride) = (self.offset() as usize, self.queue.view.slot_stride as usize);
        // SAFETY: slot and stride lie in the slots' memory, which the queue holds. Between reserve and publish the slot
        // is this value's alone: its last consumers have released it, and the next look only at what is published.
        Ok(unsafe { std::slice::from_raw_parts_mut(memory.as_host_ptr().add(offset), stride) })
    }

    /// Publishes the slot; every byte of its payload is in place.
    ///
    /// # Errors
    /// `EINVAL` for a status above 0, more bytes than a slot takes, or offsets that differ modulo 16; `ERANGE` for a
    /// payload outside the slot. The slot is then poisoned.
    pub fn publish(mut self, data: &SlotData) -> Result<()> {
        let published = self.queue.publish(self.sequence, data);
        self.done = published.is_ok();
        published
    }

    /// Gives the slot out of the value's care: whoever has the number publishes it.
    pub(crate) fn into_sequence(mut self) -> u64 {
        self.done = true;
        self.sequence
    }
}

impl Drop for IoSlot<'_> {
    fn drop(&mut self) {
        if !self.done {
            let _ = self.queue.publish(self.sequence, &SlotData { status: -libc::ECANCELED, ..SlotData::default() });
        }
    }
}

/// A slot that a consumer popped: its descriptor says what is in it. To be given to [`IoQueueConsumer::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a slot that is not released is never filled again"]
pub struct IoQueueSlot {
    popped: Popped,
    epoch: u64,
}

impl IoQueueSlot {
    /// The sequence.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.popped.sequence
    }

    /// Status, bytes, tag and the rest.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        &self.popped.descriptor
    }

    /// -errno of a read that failed; 0 otherwise.
    #[must_use]
    pub fn status(&self) -> i32 {
        self.popped.descriptor.status
    }

    /// Whether the slot is poisoned.
    #[must_use]
    pub fn is_poison(&self) -> bool {
        self.status() != 0
    }
}

/// A consumer on the CPU: what `ringest_device.cuh` is for a kernel. One thread at a time.
#[derive(Debug)]
pub struct IoQueueConsumer {
    consumer: Consumer<MappedWords>,
    view: IoQueueView,
    index: u32,
    /// What keeps the memory, where it is not the contract of `attach`.
    queue: Option<Arc<IoQueue>>,
}

/// Looks before a nap: data usually arrives within microseconds.
const SPINS: u32 = 256;
/// Then others may need the core, the producer among them: a nap costs twice its length, by the timer's slack, and in that
/// time a producer fills a small queue and naps in turn.
const YIELDS: Duration = Duration::from_micros(200);
/// Then a core is not worth the wait.
const NAP: Duration = Duration::from_micros(50);

impl IoQueueConsumer {
    /// A consumer that knows nothing but a view.
    ///
    /// # Safety
    /// The view is one of an [`IoQueue`], with addresses of this process, whose memory stays valid while the consumer
    /// lives. No other consumer has the same index (any may, when claimed).
    ///
    /// # Errors
    /// `EINVAL` for what is no view, `ERANGE` for an index beyond its consumers, `ESTALE` when the memory now belongs to
    /// another queue, `EPROTO` when it makes no sense.
    pub unsafe fn attach(view: &IoQueueView, index: u32) -> Result<Self> {
        let aligned = |address: u64| address != 0 && address.is_multiple_of(IO_QUEUE_ALIGNMENT.into());
        let mode = ConsumeMode::from_wire(view.mode).filter(|&mode| {
            view.magic == IO_QUEUE_MAGIC
                && view.version == IO_QUEUE_VERSION
                && view.slot_count.is_power_of_two()
                && (IO_QUEUE_MIN_SLOTS..=IO_QUEUE_MAX_SLOTS).contains(&view.slot_count)
                && (1..=IO_QUEUE_MAX_CONSUMERS).contains(&view.consumers)
                && (mode != ConsumeMode::Single || view.consumers == 1)
                && view.slot_bytes <= view.slot_stride
                && [view.control, view.credit, view.device, view.slots].into_iter().all(aligned)
        });
        let Some(mode) = mode else {
            return Err(PipelineError::invalid("a view of no io_queue", "pass what IoQueue::view gave"));
        };
        if mode != ConsumeMode::Claimed {
            PipelineError::check_range("consumer of an io_queue", index.into(), 1, view.consumers.into())?;
        }
        // SAFETY: the address is that of a control block by the caller's contract; its header does not change.
        let header = unsafe { (view.control as *const ControlHeader).read() };
        if header.epoch != view.epoch {
            return Err(PipelineError::StaleView);
        }
        if (header.magic, header.version, header.slot_count) != (view.magic, view.version, view.slot_count)
            || (header.slot_stride, header.slot_bytes) != (view.slot_stride, view.slot_bytes)
        {
            return Err(PipelineError::BadHeader);
        }
        // SAFETY: the caller's contract.
        let words = unsafe { MappedWords::new(view) };
        Ok(Self { consumer: Consumer::new(words, view, mode, index), view: *view, index, queue: None })
    }

    /// The next slot, if it is there: whole, or poisoned.
    ///
    /// # Errors
    /// [`Outcome::Timeout`]: nothing yet; [`Outcome::End`]; [`Outcome::Aborted`]: see [`error`](Self::error).
    pub fn try_pop(&mut self) -> std::result::Result<IoQueueSlot, Outcome> {
        self.check_process()?;
        let popped = self.consumer.try_pop()?;
        Ok(IoQueueSlot { popped, epoch: self.view.epoch })
    }

    /// The next slot, waited for: a short spin, then naps.
    ///
    /// # Errors
    /// As [`try_pop`](Self::try_pop); [`Outcome::Timeout`] once the time is over.
    pub fn wait_pop(&mut self, timeout: Duration) -> std::result::Result<IoQueueSlot, Outcome> {
        self.wait(timeout, Self::try_pop)
    }

    /// Waits until sequence `n` and all before it are in place, by the tail alone: nothing is popped.
    ///
    /// # Errors
    /// [`Outcome::Poison`] when `n` or one before it failed; otherwise as [`wait_pop`](Self::wait_pop).
    pub fn wait_tail(&mut self, n: u64, timeout: Duration) -> std::result::Result<(), Outcome> {
        self.check_process()?;
        self.wait(timeout, |this| this.consumer.look_at_tail(n))
    }

    /// Whether the memory is there: a consumer that a queue gave has none in a forked child (`EPERM`).
    #[inline]
    fn check_process(&mut self) -> std::result::Result<(), Outcome> {
        match self.is_forked() {
            true => Err(self.consumer.give_up(libc::EPERM)),
            false => Ok(()),
        }
    }

    #[inline]
    fn is_forked(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.check_process().is_err())
    }

    fn wait<T>(
        &mut self,
        timeout: Duration,
        mut look: impl FnMut(&mut Self) -> std::result::Result<T, Outcome>,
    ) -> std::result::Result<T, Outcome> {
        let mut began: Option<Instant> = None;
        for round in 0u32.. {
            match look(self) {
                Err(Outcome::Timeout) => {}
                found => return found,
            }
            if round < SPINS {
                std::hint::spin_loop();
                // The clock costs more than a look: read it now and then.
                if round % 64 != 0 {
                    continue;
                }
            }
            let now = Instant::now();
            let waited = now.duration_since(*began.get_or_insert(now));
            if waited >= timeout {
                break;
            }
            match round {
                0..SPINS => {}
                _ if waited < YIELDS => std::thread::yield_now(),
                _ => std::thread::sleep((timeout - waited).min(NAP)),
            }
        }
        Err(Outcome::Timeout)
    }

    /// The payload of a popped slot: the bytes that are in place.
    #[must_use]
    pub fn payload<'a>(&'a self, slot: &'a IoQueueSlot) -> &'a [u8] {
        let Descriptor { bytes, data_offset, .. } = slot.popped.descriptor;
        if slot.epoch != self.view.epoch || bytes == 0 || self.is_forked() {
            return &[];
        }
        let index = slot.popped.sequence & u64::from(self.view.slot_count - 1);
        let address = self.view.slots + index * self.view.slot_stride + u64::from(data_offset);
        // SAFETY: the pop checked that offset and length lie in the slot, which is memory of this process by the contract
        // of `attach`. Its bytes were in place before its seq was stored, which the pop acquired. Nothing writes to it
        // before its release, which takes the slot that this slice borrows.
        unsafe { std::slice::from_raw_parts(address as *const u8, bytes as usize) }
    }

    /// Gives a slot back to be filled again.
    ///
    /// # Errors
    /// `EINVAL` for a slot of another queue, `EPERM` in a forked child.
    pub fn release(&self, slot: IoQueueSlot) -> Result<()> {
        if self.is_forked() {
            return Err(PipelineError::Forked { what: "the io_queue" });
        }
        if slot.epoch != self.view.epoch {
            return Err(PipelineError::invalid("a slot of another io_queue", "release it where it was popped"));
        }
        self.consumer.release(slot.popped.sequence);
        Ok(())
    }

    /// The same by the sequence's number, which the caller knows to be popped and not released.
    pub(crate) fn release_sequence(&self, sequence: u64) {
        self.consumer.release(sequence);
    }

    /// Hands the ticket that this consumer waits with to the others (claimed mode). False: it has none, or there is no
    /// place for it.
    ///
    /// Whoever pops next takes it. Consumers that have already come to the END do so only if they pop once more: the last
    /// to leave should hand nothing back that is still to come.
    pub fn hand_back(&mut self) -> bool {
        !self.is_forked() && self.consumer.hand_back()
    }

    /// Gives up: no consumer pops anything more, and the host learns.
    pub fn abort(&self, errno: i32) {
        if !self.is_forked() {
            self.consumer.abort(errno);
        }
    }

    /// -errno after [`Outcome::Aborted`], 0 before.
    #[must_use]
    pub fn error(&self) -> i32 {
        self.consumer.error()
    }

    /// The sequence that the next pop waits for; `None` when claimed and no ticket is held.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        self.consumer.next()
    }
}

impl Drop for IoQueueConsumer {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.as_ref().filter(|queue| queue.check_process().is_ok()) {
            // A ticket that nobody has would keep the others waiting.
            self.consumer.hand_back();
            let mut attached = queue.attached.lock().unwrap_or_else(PoisonError::into_inner);
            attached.retain(|&index| index != self.index);
        }
    }
}
