//! io_queues: slots and the words by which a running kernel learns that one is filled.

use super::buffer::ringest_buffer;
use super::gpu::open;
use super::handle::{Family, Table, create, last, shared};
use super::mapped::{check_pinning, huge_pages, pinning, ringest_pinning};
use super::options::{self, Options, known_flags};
use super::{Failure, Outcome, status, store, value};
use crate::ingest::{IoQueue, IoQueueMemory, IoQueueOptions, SlotData};
use crate::wire::{ConsumeMode, DESCRIPTOR_CRC32C, IoQueueView};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Slots that a producer fills and that running consumers, on a GPU or on the CPU, take and give back.
///
/// Sequence n (from 0) lives in slot n mod slots. A producer, a driver or the caller, reserves the next sequence, fills
/// its slot and publishes it; consumers find it by its descriptor or by the tail, and release the slot; then it is
/// reserved again. What fails is published too, as poison: nobody waits for what will never come.
///
/// Calls may come from any number of threads at once. In a forked child, which does not have the memory, those that
/// touch it are -EPERM.
pub struct ringest_io_queue {
    _opaque: (),
}

/// A queue, and which of its sequences the C caller may publish: those of drivers are none of its business.
pub(super) struct QueueObject {
    queue: Arc<IoQueue>,
    /// By slot: the sequence that was reserved by C and not published yet, plus one; 0: none.
    reserved: Box<[AtomicU64]>,
}

impl QueueObject {
    fn new(queue: Arc<IoQueue>) -> Self {
        let reserved = std::iter::repeat_with(AtomicU64::default).take(queue.slots() as usize).collect();
        Self { queue, reserved }
    }

    pub(super) fn queue(&self) -> &Arc<IoQueue> {
        &self.queue
    }

    fn place(&self, sequence: u64) -> &AtomicU64 {
        &self.reserved[(sequence & (self.reserved.len() as u64 - 1)) as usize]
    }
}

static TABLE: Table<QueueObject> = Table::new(8, "ringest_io_queue");

impl Family for ringest_io_queue {
    type Object = QueueObject;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// How an io_queue is cut and consumed. All zero (with size set) means defaults.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_io_queue_options {
    /// sizeof(struct ringest_io_queue_options).
    pub size: u32,
    /// Slots, a power of two from 2 to 65536; 0: 64.
    pub slots: u32,
    /// Most bytes of a payload, up to 1 GiB; 0: 1 MiB.
    pub slot_bytes: u32,
    /// Alignment of slots, a power of two from 128 to 2 MiB; 0: 4096. At least the block size of files read with
    /// O_DIRECT, whose reads then go straight into the slot, whatever their offset. Each slot has room for a block on
    /// either side.
    pub alignment: u32,
    /// enum ringest_consume_mode.
    pub mode: u32,
    /// Consumers, up to 65536: readers of every sequence (broadcast), partitions, or most tickets held at a time
    /// (claimed); one for RINGEST_CONSUME_MODE_SINGLE. 0: 1.
    pub consumers: u32,
    /// enum ringest_huge_pages, for the slots.
    pub huge_pages: u32,
    /// enum ringest_pinning, for memory of the queue's own; ringest_io_queue_create_in: RINGEST_PINNING_OFF.
    pub pinning: u32,
    /// The GPU's ordinal, for RINGEST_PINNING_GPU and RINGEST_PINNING_HOST_ALLOC; otherwise 0.
    pub gpu: u32,
    /// Zero.
    pub reserved: [u32; 3],
}

// SAFETY: repr(C), twelve u32, size first.
unsafe impl Options for ringest_io_queue_options {}

fn queue_options(options: &ringest_io_queue_options) -> Outcome<IoQueueOptions> {
    options::zero(&options.reserved.map(u64::from), "ringest_io_queue_options")?;
    check_pinning(options.pinning, options.gpu)?;
    let mode = ConsumeMode::from_wire(options.mode)
        .ok_or_else(|| Failure::new(libc::EINVAL, format!("mode {}: use enum ringest_consume_mode", options.mode)))?;
    let defaults = IoQueueOptions::default();
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    Ok(IoQueueOptions {
        slots: or(options.slots, defaults.slots),
        slot_bytes: or(options.slot_bytes, defaults.slot_bytes),
        alignment: or(options.alignment, defaults.alignment),
        mode,
        consumers: or(options.consumers, defaults.consumers),
        huge_pages: huge_pages(options.huge_pages)?,
    })
}

/// Bytes that the parts of an io_queue take.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_io_queue_sizes {
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
    /// Zero.
    pub reserved: [u64; 3],
}

/// Stores the bytes that the parts of an io_queue with these options take, for ringest_io_queue_create_in. options may
/// be NULL.
///
/// Any thread.
///
/// Errors: -EINVAL for options out of range or out NULL; -E2BIG for an option struct with unknown fields.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_layout(
    options: *const ringest_io_queue_options,
    out: *mut ringest_io_queue_sizes,
) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let layout = queue_options(&options::read(options)?)?.layout()?;
        store(out, "out", || {
            Ok(ringest_io_queue_sizes {
                control: layout.control,
                credit: layout.credit,
                device: layout.device,
                slots: layout.slots,
                slot_stride: layout.slot_stride,
                reserved: [0; 3],
            })
        })
    })
}

/// Creates an io_queue in memory of its own, which the host sees, and GPUs that it is page-locked for, and stores a handle in *out. options may be
/// NULL.
///
/// Any thread. Destroy with ringest_io_queue_destroy.
///
/// Errors: -EINVAL for options out of range or out NULL; -E2BIG for an option struct with unknown fields; -ENOMEM. When a
/// GPU is named: -EOPNOTSUPP where there is no driver, or it finds no GPU; -ENODEV for an ordinal beyond ringest_gpu_count;
/// those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_create(
    options: *const ringest_io_queue_options,
    out: *mut *mut ringest_io_queue,
) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let options = options::read(options)?;
        let cut = queue_options(&options)?;
        cut.layout()?;
        store(out, "out", || {
            let pinning = pinning(options.pinning, options.gpu)?;
            create::<ringest_io_queue>(|| Ok(QueueObject::new(IoQueue::pinned(cut, &pinning)?)))
        })
    })
}

/// Creates an io_queue in the caller's memory, each part of its own kind, and stores a handle in *out. options may be
/// NULL; ringest_io_queue_layout tells how large the parts are.
///
/// The host writes the control block and devices read it; devices write the credit block and the host reads it; only
/// devices use the device block. All parts are aligned to 128 bytes, the slots to the options' alignment. While the
/// queue lives, nothing else may touch the memory. A device block that the CPU cannot write must be zero.
///
/// Any thread. Destroy with ringest_io_queue_destroy. The buffers' handles may be released before that, except those of
/// wrapped memory.
///
/// Errors: -EBADF for any of the buffers; -EINVAL for options out of range, parts that are not aligned or overlap, or
/// out NULL; -E2BIG for an option struct with unknown fields; -ERANGE for a part that is too small; -EOPNOTSUPP for a
/// control or credit block in device memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_create_in(
    options: *const ringest_io_queue_options,
    control: *const ringest_buffer,
    credit: *const ringest_buffer,
    device: *const ringest_buffer,
    slots: *const ringest_buffer,
    out: *mut *mut ringest_io_queue,
) -> i32 {
    // SAFETY: `options` and `out` are null or valid, and the C caller keeps everything else away from the memory.
    status(|| unsafe {
        let options = options::read(options)?;
        if options.pinning != ringest_pinning::Off as u32 {
            return Err(Failure::new(libc::EINVAL, "pinning of memory that is given: page-lock it before, and pass 0"));
        }
        let options = queue_options(&options)?;
        store(out, "out", || {
            let memory = IoQueueMemory {
                control: shared(control)?.duplicate(),
                credit: shared(credit)?.duplicate(),
                device: shared(device)?.duplicate(),
                slots: shared(slots)?.duplicate(),
            };
            create::<ringest_io_queue>(|| Ok(QueueObject::new(IoQueue::in_memory(options, memory)?)))
        })
    })
}

/// Frees an io_queue.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while a view of it is lent out (see ringest_io_queue_consumers_stopped), a driver or a
/// ringest_consumer has it, or another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_destroy(queue: *mut ringest_io_queue) -> i32 {
    status(|| {
        let entered = last(queue.cast_const())?;
        // It stays so: whoever wants to have it needs the handle.
        entered.queue.check_unused()?;
        drop(entered.take());
        Ok(())
    })
}

/// Stores the view for kernels on the device, which they get by value. From now on the memory is lent out.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL; -EOPNOTSUPP when no GPU maps one of the parts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_device_view(queue: *const ringest_io_queue, out: *mut IoQueueView) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(queue)?.queue.view()?)) })
}

/// Stores the view for kernels on one of several GPUs, by its ordinal. From now on the memory is lent out.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL; -EOPNOTSUPP when the GPU is not known to map one of the parts (they are not
/// page-locked), where there is no driver, or it finds no GPU; -ENODEV for an ordinal beyond ringest_gpu_count; those of
/// the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_device_view_on(
    queue: *const ringest_io_queue,
    gpu: u32,
    out: *mut IoQueueView,
) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            let entered = shared(queue)?;
            Ok(entered.queue.view_on(&open(gpu)?)?)
        })
    })
}

/// Stores the view with this process's addresses, for consumers on the CPU that use ringest_device.cuh. From now on the
/// memory is lent out.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_host_view(queue: *const ringest_io_queue, out: *mut IoQueueView) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(queue)?.queue.host_view())) })
}

/// The caller's word that nothing uses a view of this queue any more: all kernels that have one ended.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_consumers_stopped(queue: *mut ringest_io_queue) -> i32 {
    status(|| {
        shared(queue.cast_const())?.queue.consumers_stopped();
        Ok(())
    })
}

/// A reserved sequence and its slot.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ringest_slot {
    /// The sequence.
    pub sequence: u64,
    /// Where the slot begins in the queue's slots, in bytes.
    pub offset: u64,
    /// Its first byte in this process; NULL for slots in device memory.
    pub data: *mut c_void,
    /// Bytes from there to the next slot. A payload takes at most slot_bytes of them.
    pub bytes: u64,
    /// Zero.
    pub reserved: [u64; 4],
}

impl Default for ringest_slot {
    fn default() -> Self {
        Self { sequence: 0, offset: 0, data: null_mut(), bytes: 0, reserved: [0; 4] }
    }
}

/// Reserves the next sequence and stores it and its slot, which the caller fills and publishes by
/// ringest_io_queue_publish. Until then consumers get nothing that comes after it.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL; -EAGAIN while the slot's consumers have not released it, or something may
/// still write to it; -EBUSY after ringest_io_queue_finish; -ECANCELED after an abort by either side; -EPERM in a
/// forked child.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_reserve(queue: *mut ringest_io_queue, out: *mut ringest_slot) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            let entered = shared(queue.cast_const())?;
            let mut slot = entered.queue.reserve()?;
            let (offset, bytes) = (slot.offset(), entered.queue.slot_stride());
            let data = slot.as_mut_slice().map_or(null_mut(), |bytes| bytes.as_mut_ptr().cast());
            let sequence = slot.into_sequence();
            // Relaxed: it orders nothing; the slot's bytes are the caller's matter.
            entered.place(sequence).store(sequence + 1, Ordering::Relaxed);
            Ok(ringest_slot { sequence, offset, data, bytes, reserved: [0; 4] })
        })
    })
}

/// What a producer says of a slot that it filled, or could not fill.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_slot_data {
    /// 0, or -errno: the slot is poisoned.
    pub status: i32,
    /// Bytes in place.
    pub bytes: u32,
    /// Anything.
    pub tag: u64,
    /// Where in a file they came from; the same as data_offset modulo 16.
    pub file_offset: u64,
    /// Where in the slot they begin.
    pub data_offset: u32,
    /// CRC32C of the payload, with RINGEST_DESCRIPTOR_CRC32C.
    pub crc32c: u32,
    /// enum ringest_read_path.
    pub path: u16,
    /// RINGEST_DESCRIPTOR_CRC32C or 0.
    pub flags: u16,
    /// NVMe status of a failed passthrough command.
    pub nvme_status: u32,
    /// Zero.
    pub reserved: [u64; 3],
}

/// Publishes a sequence that ringest_io_queue_reserve gave: every byte of its payload is in place, or it failed.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for data NULL, a sequence that was not reserved by that call or is published already, a
/// status above 0, more bytes than slot_bytes, offsets that differ modulo 16, unknown flags; -ERANGE for a payload
/// outside the slot; -EPERM in a forked child. On failure the sequence stays to be published.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_io_queue_publish(
    queue: *mut ringest_io_queue,
    sequence: u64,
    data: *const ringest_slot_data,
) -> i32 {
    status(|| {
        if data.is_null() {
            return Err(Failure::new(libc::EINVAL, "data is NULL: say what is in the slot"));
        }
        // SAFETY: not null, so valid by the C contract.
        let data = slot_data(unsafe { &*data })?;
        let entered = shared(queue.cast_const())?;
        entered.queue.check_process()?;
        let place = entered.place(sequence);
        // Relaxed: of those who publish the same sequence one wins; the publication itself orders the rest.
        let ours = sequence
            .checked_add(1)
            .is_some_and(|mark| place.compare_exchange(mark, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok());
        if !ours {
            return Err(Failure::new(
                libc::EINVAL,
                format!("sequence {sequence}: only what ringest_io_queue_reserve gave can be published, once"),
            ));
        }
        entered.queue.publish(sequence, &data).map_err(|error| {
            place.store(sequence + 1, Ordering::Relaxed);
            error.into()
        })
    })
}

fn slot_data(data: &ringest_slot_data) -> Outcome<SlotData> {
    let ringest_slot_data { status, bytes, tag, file_offset, data_offset, crc32c, path, flags, .. } = *data;
    let ringest_slot_data { nvme_status, reserved, .. } = *data;
    known_flags(flags.into(), DESCRIPTOR_CRC32C)?;
    options::zero(&reserved, "ringest_slot_data")?;
    let crc32c = (flags != 0).then_some(crc32c);
    Ok(SlotData { status, bytes, data_offset, tag, file_offset, crc32c, path, nvme_status })
}

/// Announces that no sequence follows those reserved: consumers get RINGEST_OUTCOME_END once they have taken these.
/// Returns 1, or 0 when the queue had ended or was aborted before.
///
/// Any thread.
///
/// Errors: -EBADF; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_finish(queue: *mut ringest_io_queue) -> i32 {
    value(|| {
        let entered = shared(queue.cast_const())?;
        entered.queue.check_process()?;
        Ok(entered.queue.finish().into())
    }) as i32
}

/// Gives up with a positive errno: consumers pop nothing more. Returns 1, or 0 when the queue was aborted before.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL for an error that is not 1 to 4095; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_abort(queue: *mut ringest_io_queue, error: i32) -> i32 {
    value(|| {
        let entered = shared(queue.cast_const())?;
        entered.queue.check_process()?;
        Ok(entered.queue.abort(positive_errno(error)?).into())
    }) as i32
}

/// An errno as C callers give it.
pub(super) fn positive_errno(error: i32) -> Outcome<i32> {
    match error {
        1..=4095 => Ok(error),
        _ => Err(Failure::new(libc::EINVAL, format!("error {error}: pass an errno, 1 to 4095"))),
    }
}

/// The errno, positive, with which either side gave up; 0 while none has.
///
/// Any thread.
///
/// Errors: -EBADF; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_aborted(queue: *const ringest_io_queue) -> i32 {
    value(|| {
        let entered = shared(queue)?;
        entered.queue.check_process()?;
        Ok(entered.queue.aborted().into())
    }) as i32
}

/// Sequences, from the first on, that are published.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_tail(queue: *const ringest_io_queue) -> i64 {
    value(|| Ok(shared(queue)?.queue.tail() as i64))
}

/// Sequences reserved so far.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_reserved(queue: *const ringest_io_queue) -> i64 {
    value(|| Ok(shared(queue)?.queue.reserved() as i64))
}

/// Sequences that could be reserved now, one after the other.
///
/// Any thread.
///
/// Errors: -EBADF; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_io_queue_free_slots(queue: *const ringest_io_queue) -> i64 {
    value(|| {
        let entered = shared(queue)?;
        entered.queue.check_process()?;
        Ok(entered.queue.free_slots().into())
    })
}
