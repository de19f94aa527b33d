//! Consumers on the CPU, for C: what `ringest_device.cuh` is for C++ and CUDA.

use super::handle::{Exclusive, Family, Table, create, exclusive, last, shared};
use super::io_queue::{positive_errno, ringest_io_queue};
use super::{Failure, Outcome, options, status, store, value};
use crate::ingest::{IoQueue, IoQueueConsumer, IoQueueSlot};
use crate::wire::{Descriptor, Outcome as Found};
use std::ffi::c_void;
use std::ptr::null;
use std::sync::Arc;
use std::time::Duration;

/// A consumer of an io_queue in this process.
///
/// One thread at a time (-EBUSY otherwise); any thread. In a forked child, which does not have the queue's memory,
/// every call but ringest_consumer_destroy is -EPERM.
pub struct ringest_consumer {
    _opaque: (),
}

/// A consumer, and what it has popped and not released.
pub(super) struct ConsumerObject {
    consumer: IoQueueConsumer,
    queue: Arc<IoQueue>,
    /// By slot: the sequence that is held, plus one; 0: none.
    held: Box<[u64]>,
}

impl ConsumerObject {
    /// Where it is noted that a sequence is held.
    fn place(&mut self, sequence: u64) -> &mut u64 {
        let slots = self.held.len() as u64;
        &mut self.held[(sequence & (slots - 1)) as usize]
    }
}

static TABLE: Table<ConsumerObject> = Table::new(9, "ringest_consumer");

impl Family for ringest_consumer {
    type Object = ConsumerObject;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

fn enter(consumer: *const ringest_consumer) -> Outcome<Exclusive<ConsumerObject>> {
    let entered = exclusive(consumer)?;
    entered.queue.check_process()?;
    Ok(entered)
}

/// Attaches consumer index (from 0) to an io_queue and stores a handle in *out. It keeps the queue's memory.
///
/// Any thread. Destroy with ringest_consumer_destroy.
///
/// Errors: -EBADF; -ERANGE for an index beyond the queue's consumers; -EBUSY while a consumer with this index is
/// attached; -EOPNOTSUPP when slots or device block are in device memory; -EINVAL when out is NULL; -EPERM in a forked
/// child; -ESTALE when the memory was made another queue's; -EPROTO when its header was overwritten.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_consumer_create(
    queue: *const ringest_io_queue,
    index: u32,
    out: *mut *mut ringest_consumer,
) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            let entered = shared(queue)?;
            let queue = entered.queue();
            create::<ringest_consumer>(|| {
                let consumer = queue.consumer(index)?;
                let held = vec![0; queue.slots() as usize].into();
                Ok(ConsumerObject { consumer, queue: Arc::clone(queue), held })
            })
        })
    })
}

/// A slot that was popped.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ringest_popped {
    /// The sequence, for ringest_consumer_release.
    pub sequence: u64,
    /// The payload, readable until the release; NULL when there is none.
    pub data: *const c_void,
    /// Bytes there; of a poisoned slot those that are in place.
    pub bytes: u64,
    /// Zero.
    pub reserved: [u64; 5],
    /// Status, tag, offset in the file and the rest.
    pub descriptor: Descriptor,
}

impl Default for ringest_popped {
    fn default() -> Self {
        Self { sequence: 0, data: null(), bytes: 0, reserved: [0; 5], descriptor: Descriptor::default() }
    }
}

/// Looks once for the next slot. Returns an enum ringest_outcome; the slot is stored on RINGEST_OUTCOME_OK and
/// RINGEST_OUTCOME_POISON, and then to be released. RINGEST_OUTCOME_TIMEOUT: nothing yet.
///
/// Any thread, one at a time.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle; -EINVAL when popped is NULL; -EPERM in a
/// forked child.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_consumer_try_pop(consumer: *mut ringest_consumer, popped: *mut ringest_popped) -> i32 {
    // SAFETY: `popped` is null or valid by the C contract.
    value(|| unsafe { pop(consumer, popped, IoQueueConsumer::try_pop) }) as i32
}

/// Waits for the next slot: a short spin, then naps. As ringest_consumer_try_pop; RINGEST_OUTCOME_TIMEOUT once the time
/// is over. timeout_ns < 0 waits without limit.
///
/// Any thread, one at a time; ringest_io_queue_abort from another ends the wait.
///
/// Errors: as ringest_consumer_try_pop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_consumer_wait_pop(
    consumer: *mut ringest_consumer,
    timeout_ns: i64,
    popped: *mut ringest_popped,
) -> i32 {
    // SAFETY: `popped` is null or valid by the C contract.
    value(|| unsafe { pop(consumer, popped, |consumer| consumer.wait_pop(patience(timeout_ns))) }) as i32
}

fn patience(timeout_ns: i64) -> Duration {
    options::timeout(timeout_ns).unwrap_or(Duration::MAX)
}

/// # Safety
/// `popped` is null or valid for writing.
unsafe fn pop(
    consumer: *mut ringest_consumer,
    popped: *mut ringest_popped,
    look: impl FnOnce(&mut IoQueueConsumer) -> Result<IoQueueSlot, Found>,
) -> Outcome<i64> {
    if popped.is_null() {
        return Err(Failure::new(libc::EINVAL, "popped is NULL: pass a place for the slot"));
    }
    let mut entered = enter(consumer.cast_const())?;
    let slot = match look(&mut entered.consumer) {
        Ok(slot) => slot,
        Err(outcome) => return Ok(outcome as i64),
    };
    let payload = entered.consumer.payload(&slot);
    let (data, bytes) = if payload.is_empty() { (null(), 0) } else { (payload.as_ptr().cast(), payload.len() as u64) };
    let (sequence, descriptor) = (slot.sequence(), *slot.descriptor());
    let outcome = if slot.is_poison() { Found::Poison } else { Found::Ok };
    *entered.place(sequence) = sequence + 1;
    // SAFETY: not null, so valid by contract.
    unsafe { popped.write(ringest_popped { sequence, data, bytes, reserved: [0; 5], descriptor }) };
    Ok(outcome as i64)
}

/// Gives a slot back to be filled again. Its data must not be touched any more.
///
/// Any thread, one at a time.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle; -EINVAL for a sequence that this consumer
/// has not popped, or has released already; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_consumer_release(consumer: *mut ringest_consumer, sequence: u64) -> i32 {
    status(|| {
        let mut entered = enter(consumer.cast_const())?;
        let place = entered.place(sequence);
        if sequence.checked_add(1) != Some(*place) {
            return Err(Failure::new(
                libc::EINVAL,
                format!("sequence {sequence}: this consumer has not popped it, or has released it already"),
            ));
        }
        *place = 0;
        entered.consumer.release_sequence(sequence);
        Ok(())
    })
}

/// Waits until a sequence and all before it are in place, by the tail alone: nothing is popped. Returns an enum
/// ringest_outcome; RINGEST_OUTCOME_POISON when it or one before it failed. timeout_ns < 0 waits without limit.
///
/// Any thread, one at a time.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_consumer_wait_tail(consumer: *mut ringest_consumer, sequence: u64, timeout_ns: i64) -> i32 {
    value(|| {
        let waited = enter(consumer.cast_const())?.consumer.wait_tail(sequence, patience(timeout_ns));
        Ok(waited.err().unwrap_or(Found::Ok) as i64)
    }) as i32
}

/// Hands the ticket that this consumer waits with to the others (RINGEST_CONSUME_MODE_CLAIMED). Returns 1, or 0 when it
/// has none or there is no place for it.
///
/// Any thread, one at a time.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_consumer_hand_back(consumer: *mut ringest_consumer) -> i32 {
    value(|| Ok(enter(consumer.cast_const())?.consumer.hand_back().into())) as i32
}

/// Gives up with a positive errno: no consumer pops anything more, and the producer learns.
///
/// Any thread, one at a time.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle; -EINVAL for an error that is not 1 to
/// 4095; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_consumer_abort(consumer: *mut ringest_consumer, error: i32) -> i32 {
    status(|| {
        let entered = enter(consumer.cast_const())?;
        entered.consumer.abort(positive_errno(error)?);
        Ok(())
    })
}

/// The errno, positive, that RINGEST_OUTCOME_ABORTED stood for; 0 before.
///
/// Any thread, one at a time.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle; -EPERM in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_consumer_error(consumer: *const ringest_consumer) -> i32 {
    value(|| Ok((-enter(consumer)?.consumer.error()).into())) as i32
}

/// Detaches a consumer. Slots that it has popped are released, and a ticket is handed back: their data must not be
/// touched any more.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_consumer_destroy(consumer: *mut ringest_consumer) -> i32 {
    status(|| {
        let ConsumerObject { consumer, queue, held } = last(consumer.cast_const())?.take();
        if queue.check_process().is_ok() {
            held.iter().filter(|&&mark| mark != 0).for_each(|mark| consumer.release_sequence(mark - 1));
        }
        Ok(())
    })
}
