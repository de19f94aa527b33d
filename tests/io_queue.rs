//! The io_queue by itself: a producer of the test's own, consumers in threads and in other processes.

mod common;

use common::*;
use ringest::wire::{self, ConsumeMode, ControlHeader, IoQueueView, Outcome};
use ringest::{
    DirectMode, DriverOptions, GpuMappedBuffer, IoQueue, IoQueueConsumer, IoQueueMemory, IoQueueOptions, MappedBuffer,
    NvmeGpuIngestDriver, SlotData, leak_stats,
};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_millis(20);

fn options(slots: u32, mode: ConsumeMode, consumers: u32) -> IoQueueOptions {
    IoQueueOptions { slots, slot_bytes: 4096, alignment: 128, mode, consumers, ..IoQueueOptions::default() }
}

fn queue(slots: u32) -> Arc<IoQueue> {
    IoQueue::new(options(slots, ConsumeMode::Single, 1)).unwrap()
}

/// Reserves, fills and publishes one slot whose content follows from its sequence.
fn produce(queue: &IoQueue) -> ringest::Result<u64> {
    let mut slot = queue.reserve()?;
    let sequence = slot.sequence();
    let at = sequence * 1000;
    let (offset, len) = ((at % 128) as usize, 100 + (sequence % 50) as usize);
    slot.as_mut_slice()?[offset..offset + len].copy_from_slice(&pattern(at, len));
    let data = SlotData {
        bytes: len as u32,
        data_offset: offset as u32,
        tag: sequence ^ 0xabcd,
        file_offset: at,
        ..SlotData::default()
    };
    slot.publish(&data)?;
    Ok(sequence)
}

/// Pops what `produce` put there and releases it. Returns the sequence.
fn consume(consumer: &mut IoQueueConsumer, timeout: Duration) -> Result<u64, Outcome> {
    let slot = consumer.wait_pop(timeout)?;
    let sequence = slot.sequence();
    assert_eq!((slot.status(), slot.descriptor().tag), (0, sequence ^ 0xabcd));
    assert_eq!(consumer.payload(&slot).len(), 100 + (sequence % 50) as usize);
    check(consumer.payload(&slot), sequence * 1000);
    consumer.release(slot).unwrap();
    Ok(sequence)
}

#[test]
fn options_out_of_range() {
    let good = options(4, ConsumeMode::Single, 1);
    for bad in [
        IoQueueOptions { slots: 0, ..good },
        IoQueueOptions { slots: 1, ..good },
        IoQueueOptions { slots: 3, ..good },
        IoQueueOptions { slots: 1 << 17, ..good },
        IoQueueOptions { slot_bytes: 0, ..good },
        IoQueueOptions { slot_bytes: (1 << 30) + 1, ..good },
        IoQueueOptions { alignment: 64, ..good },
        IoQueueOptions { alignment: 384, ..good },
        IoQueueOptions { alignment: 4 << 20, ..good },
        IoQueueOptions { consumers: 0, ..good },
        IoQueueOptions { consumers: 2, ..good },
        IoQueueOptions { mode: ConsumeMode::Claimed, consumers: 65_537, ..good },
    ] {
        assert_eq!(errno(bad.layout()), libc::EINVAL, "{bad:?}");
        assert_eq!(errno(IoQueue::new(bad)), libc::EINVAL, "{bad:?}");
    }
    let layout = IoQueueOptions { slots: 2, slot_bytes: 1, alignment: 4096, ..good }.layout().unwrap();
    assert_eq!((layout.slot_stride, layout.slots), (3 * 4096, 6 * 4096));
    let most = IoQueue::new(IoQueueOptions { slots: 65_536, slot_bytes: 1, ..good }).unwrap();
    assert_eq!(most.free_slots(), 65_536);
}

#[test]
fn memory_of_the_callers() {
    let options = options(4, ConsumeMode::Broadcast, 3);
    let layout = options.layout().unwrap();
    let make = || -> IoQueueMemory {
        let part = |bytes: u64| GpuMappedBuffer::from(MappedBuffer::<u8>::alloc(bytes as usize).unwrap());
        IoQueueMemory {
            control: part(layout.control),
            credit: part(layout.credit),
            device: part(layout.device),
            slots: part(layout.slots),
        }
    };
    let whole = || GpuMappedBuffer::from(MappedBuffer::<u8>::alloc(1 << 20).unwrap());
    // SAFETY: nobody else knows the memory; the peer memory below is never touched.
    unsafe {
        assert!(IoQueue::in_memory(options, make()).is_ok());
        let mut memory = make();
        memory.credit = memory.credit.sub_region(0, layout.credit as usize - 1).unwrap();
        assert_eq!(errno(IoQueue::in_memory(options, memory)), libc::ERANGE);
        let mut memory = make();
        memory.slots = whole().sub_region(64, 1 << 19).unwrap();
        assert_eq!(errno(IoQueue::in_memory(options, memory)), libc::EINVAL);
        let mut memory = make();
        let shared = whole();
        memory.credit = shared.duplicate().sub_region(0, 4096).unwrap();
        memory.device = shared.sub_region(128, 4096).unwrap();
        assert_eq!(errno(IoQueue::in_memory(options, memory)), libc::EINVAL);
        // All parts in one buffer.
        let shared = whole();
        let part = |at: usize| shared.duplicate().sub_region(at, 64 << 10).unwrap();
        let memory =
            IoQueueMemory { control: part(0), credit: part(1 << 17), device: part(1 << 18), slots: part(1 << 19) };
        let queue = IoQueue::in_memory(options, memory).unwrap();
        produce(&queue).unwrap();
        // The words of a device cannot be the host's.
        let peer =
            |address: usize| GpuMappedBuffer::from_bar1_peer_with_owner(address as *mut u8, 1 << 20, 1 << 40, ());
        let mut memory = make();
        memory.control = peer(1 << 30).unwrap();
        assert_eq!(errno(IoQueue::in_memory(options, memory)), libc::EOPNOTSUPP);
        // Slots and device block can.
        let mut memory = make();
        (memory.device, memory.slots) = (peer(1 << 30).unwrap(), peer(1 << 31).unwrap());
        let queue = IoQueue::in_memory(options, memory).unwrap();
        assert_eq!(errno(queue.consumer(0)), libc::EOPNOTSUPP);
        assert_eq!(errno(queue.reserve().unwrap().as_mut_slice()), libc::EOPNOTSUPP);
        assert_eq!(queue.view().unwrap().slots, 1 << 40);
        queue.consumers_stopped();
        let checked = NvmeGpuIngestDriver::new(
            ring!(),
            Arc::clone(&queue),
            DriverOptions { crc32c: true, ..DriverOptions::default() },
        );
        assert_eq!(errno(checked), libc::EOPNOTSUPP);
        // Memory that no GPU maps has no view for one.
        let mut bytes = vec![0u8; 1 << 20].into_boxed_slice();
        let base = bytes.as_mut_ptr().add(bytes.as_ptr().align_offset(4096));
        let mut memory = make();
        memory.slots = GpuMappedBuffer::from_host_visible_owner(base, 1 << 19, None, bytes).unwrap();
        let queue = IoQueue::in_memory(options, memory).unwrap();
        assert_eq!(errno(queue.view()), libc::EOPNOTSUPP);
        assert!(!queue.is_lent());
    }
}

#[test]
fn a_header_that_says_what_the_view_says() {
    let queue = IoQueue::new(options(8, ConsumeMode::Partitioned, 5)).unwrap();
    let view = queue.view().unwrap();
    assert_eq!(view, queue.host_view(), "without a GPU both are the host's");
    // SAFETY: the queue lives, and its header does not change.
    let header = unsafe { (view.control as *const ControlHeader).read() };
    assert_eq!((header.magic, header.version, header.header_bytes), (wire::IO_QUEUE_MAGIC, 1, 0x200));
    assert_eq!((header.slot_count, header.slot_bytes, header.epoch), (8, 4096, view.epoch));
    assert_eq!(header.slot_stride, view.slot_stride);
    assert_eq!((view.consumers, view.mode), (5, ConsumeMode::Partitioned as u32));
    assert!(queue.is_lent());
    let (queue, error) = queue.destroy().unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    queue.consumers_stopped();
    queue.destroy().unwrap();
}

#[test]
fn a_lent_queue_is_leaked_not_freed() {
    in_leaking_child("a_lent_queue_is_leaked_not_freed", || {
        let queue = queue(2);
        let view = queue.host_view();
        produce(&queue).unwrap();
        let before = leak_stats();
        drop(queue);
        assert_eq!(leak_stats().queues, before.queues + 1);
        assert!(leak_stats().bytes > before.bytes);
        // SAFETY: its memory was leaked.
        let mut consumer = unsafe { IoQueueConsumer::attach(&view, 0) }.unwrap();
        assert_eq!(consume(&mut consumer, SOON), Ok(0));
    });
}

#[test]
fn sequences_wrap_around_the_slots_in_every_mode() {
    for (mode, consumers) in [
        (ConsumeMode::Single, 1),
        (ConsumeMode::Partitioned, 3),
        (ConsumeMode::Claimed, 2),
        (ConsumeMode::Broadcast, 2),
    ] {
        let queue = IoQueue::new(options(2, mode, consumers)).unwrap();
        let mut all: Vec<_> = (0..consumers).map(|index| queue.consumer(index).unwrap()).collect();
        for sequence in 0..20u64 {
            assert_eq!(produce(&queue).unwrap(), sequence);
            match mode {
                ConsumeMode::Broadcast => {
                    for consumer in &mut all {
                        assert_eq!(consume(consumer, SOON), Ok(sequence));
                    }
                }
                ConsumeMode::Partitioned => {
                    let count = u64::from(consumers);
                    assert_eq!(consume(&mut all[(sequence % count) as usize], SOON), Ok(sequence));
                }
                _ => assert_eq!(consume(&mut all[0], SOON), Ok(sequence)),
            }
        }
        // A consumer that comes later goes on where this one was.
        drop(all);
        if mode == ConsumeMode::Single {
            let mut next = queue.consumer(0).unwrap();
            produce(&queue).unwrap();
            assert_eq!(consume(&mut next, SOON), Ok(20));
        }
        assert_eq!(queue.tail(), queue.reserved());
    }
}

#[test]
fn full_until_released_in_any_order() {
    let queue = queue(4);
    let mut consumer = queue.consumer(0).unwrap();
    for _ in 0..4 {
        produce(&queue).unwrap();
    }
    assert_eq!(errno(produce(&queue)), libc::EAGAIN);
    let mut held: Vec<_> = (0..4).map(|_| consumer.wait_pop(SOON).unwrap()).collect();
    assert_eq!(consumer.try_pop(), Err(Outcome::Timeout));
    // Not the next one's slot.
    consumer.release(held.remove(2)).unwrap();
    assert_eq!((errno(produce(&queue)), queue.free_slots()), (libc::EAGAIN, 0));
    consumer.release(held.remove(0)).unwrap();
    assert_eq!(queue.free_slots(), 1);
    assert_eq!(produce(&queue).unwrap(), 4);
    consumer.release(held.remove(0)).unwrap();
    assert_eq!((produce(&queue).unwrap(), produce(&queue).unwrap()), (5, 6));
    let other = self::queue(4);
    assert_eq!(errno(other.consumer(0).unwrap().release(held.remove(0))), libc::EINVAL);
}

#[test]
fn a_slot_that_is_dropped_is_poison() {
    let queue = queue(2);
    let mut consumer = queue.consumer(0).unwrap();
    drop(queue.reserve().unwrap());
    let slot = consumer.try_pop().unwrap();
    assert_eq!((slot.status(), slot.is_poison()), (-libc::ECANCELED, true));
    assert!(consumer.payload(&slot).is_empty());
    consumer.release(slot).unwrap();
    let slot = queue.reserve().unwrap();
    slot.publish(&SlotData { status: -libc::EIO, nvme_status: 0x281, tag: 4, ..SlotData::default() }).unwrap();
    let slot = consumer.try_pop().unwrap();
    assert_eq!((slot.status(), slot.descriptor().nvme_status, slot.descriptor().tag), (-libc::EIO, 0x281, 4));
    consumer.release(slot).unwrap();
    assert_eq!(consumer.wait_tail(0, SOON), Err(Outcome::Poison));
    // From the first bad one on.
    produce(&queue).unwrap();
    assert_eq!(consumer.wait_tail(2, SOON), Err(Outcome::Poison));
    assert_eq!(consume(&mut consumer, SOON), Ok(2));
}

#[test]
fn what_cannot_be_published() {
    let queue = queue(8);
    let mut consumer = queue.consumer(0).unwrap();
    let good = SlotData { bytes: 16, ..SlotData::default() };
    for (data, expected) in [
        (SlotData { status: 5, ..good }, libc::EINVAL),
        (SlotData { bytes: 4097, ..good }, libc::EINVAL),
        (SlotData { data_offset: 8, ..good }, libc::EINVAL),
        (SlotData { data_offset: 4096 + 256 - 8, file_offset: 8, ..good }, libc::ERANGE),
    ] {
        assert_eq!(errno(queue.reserve().unwrap().publish(&data)), expected, "{data:?}");
        let slot = consumer.try_pop().unwrap();
        assert_eq!(slot.status(), -libc::ECANCELED);
        consumer.release(slot).unwrap();
    }
}

#[test]
fn end_and_abort() {
    let queue = queue(4);
    let mut consumer = queue.consumer(0).unwrap();
    produce(&queue).unwrap();
    let outstanding = queue.reserve().unwrap();
    assert!(queue.finish());
    assert!(!queue.finish());
    assert_eq!(errno(queue.reserve()), libc::EBUSY);
    assert_eq!(consume(&mut consumer, SOON), Ok(0));
    // Sequence 1 may still come.
    assert_eq!(consumer.wait_pop(SOON), Err(Outcome::Timeout));
    assert_eq!(consumer.wait_tail(1, SOON), Err(Outcome::Timeout));
    outstanding.publish(&SlotData::default()).unwrap();
    let slot = consumer.try_pop().unwrap();
    consumer.release(slot).unwrap();
    assert_eq!(consumer.wait_pop(LONG), Err(Outcome::End));
    assert_eq!(consumer.wait_tail(1, SOON), Ok(()));
    assert_eq!(consumer.wait_tail(2, SOON), Err(Outcome::End));

    // The host.
    let queue = self::queue(4);
    let mut consumer = queue.consumer(0).unwrap();
    produce(&queue).unwrap();
    assert!(queue.abort(libc::EIO) && !queue.abort(libc::ENOMEM) && !queue.finish());
    assert_eq!(consumer.try_pop(), Err(Outcome::Aborted), "what was not popped is lost");
    assert_eq!((consumer.error(), queue.aborted()), (-libc::EIO, libc::EIO));
    assert_eq!(errno(queue.reserve()), libc::ECANCELED);

    // A consumer.
    let queue = IoQueue::new(options(4, ConsumeMode::Claimed, 2)).unwrap();
    let (one, mut two) = (queue.consumer(0).unwrap(), queue.consumer(1).unwrap());
    produce(&queue).unwrap();
    one.abort(libc::ENODEV);
    assert_eq!(errno(queue.reserve()), libc::ECANCELED);
    assert_eq!(two.wait_pop(LONG), Err(Outcome::Aborted));
    assert_eq!(two.error(), -libc::ENODEV);
    assert_eq!(queue.aborted(), libc::ENODEV);
    // SAFETY: the queue lives.
    let state = unsafe { AtomicU32::from_ptr((queue.host_view().control as *mut u32).add(0x100 / 4)) };
    assert_eq!(state.load(Ordering::Acquire), wire::state::ABORTED);
    queue.consumers_stopped();
}

#[test]
fn consumers_of_a_queue() {
    let queue = IoQueue::new(options(4, ConsumeMode::Claimed, 2)).unwrap();
    assert_eq!(errno(queue.consumer(2)), libc::ERANGE);
    let mut one = queue.consumer(0).unwrap();
    assert_eq!(errno(queue.consumer(0)), libc::EBUSY);
    assert_eq!(errno(Arc::clone(&queue).destroy().map_err(|(_, error)| error)), libc::EBUSY);
    // A ticket survives a time-out; dropped with its consumer, it goes to the next.
    assert_eq!((one.wait_pop(SOON), one.next()), (Err(Outcome::Timeout), Some(0)));
    let mut two = queue.consumer(1).unwrap();
    assert_eq!((two.wait_pop(SOON), two.next()), (Err(Outcome::Timeout), Some(1)));
    drop(one);
    produce(&queue).unwrap();
    produce(&queue).unwrap();
    let mut popped = [consume(&mut two, SOON).unwrap(), consume(&mut two, SOON).unwrap()];
    popped.sort_unstable();
    assert_eq!(popped, [0, 1]);
    // Nothing to hand back, by a fresh one or in another mode.
    assert!(!queue.consumer(0).unwrap().hand_back());
    assert!(!self::queue(2).consumer(0).unwrap().hand_back());
}

/// Without the trade of tickets the second consumer would wait for ever: the slot of its ticket needs the first one's
/// sequence to be released.
#[test]
fn a_ticket_handed_back_is_taken_by_one_that_waits() {
    let queue = IoQueue::new(options(2, ConsumeMode::Claimed, 2)).unwrap();
    let (mut one, mut two) = (queue.consumer(0).unwrap(), queue.consumer(1).unwrap());
    assert_eq!(one.try_pop(), Err(Outcome::Timeout));
    produce(&queue).unwrap();
    produce(&queue).unwrap();
    assert_eq!(consume(&mut two, SOON), Ok(1));
    // Ticket 2, which needs slot 0.
    let held = one.next();
    assert_eq!(held, Some(0));
    assert!(one.hand_back());
    assert_eq!(consume(&mut two, SOON), Ok(0));
    produce(&queue).unwrap();
    assert_eq!(consume(&mut two, SOON), Ok(2));
}

#[test]
fn views_of_something_else() {
    let queue = queue(4);
    let good = queue.host_view();
    // SAFETY: the memory lives; a view that is wrong in itself is not followed.
    let attach = |view: &IoQueueView, index| errno(unsafe { IoQueueConsumer::attach(view, index) });
    for bad in [
        IoQueueView::default(),
        IoQueueView { magic: 1, ..good },
        IoQueueView { version: 2, ..good },
        IoQueueView { mode: 4, ..good },
        IoQueueView { slot_count: 3, ..good },
        IoQueueView { slot_count: 1 << 17, ..good },
        IoQueueView { consumers: 0, ..good },
        IoQueueView { consumers: 2, ..good },
        IoQueueView { slot_bytes: good.slot_stride + 1, ..good },
        IoQueueView { control: 0, ..good },
        IoQueueView { credit: good.credit + 8, ..good },
    ] {
        assert_eq!(attach(&bad, 0), libc::EINVAL, "{bad:?}");
    }
    assert_eq!(attach(&good, 1), libc::ERANGE);
    assert_eq!(attach(&IoQueueView { epoch: good.epoch + 1, ..good }, 0), libc::ESTALE);
    assert_eq!(attach(&IoQueueView { slot_count: 2, ..good }, 0), libc::EPROTO);
    // A view of a queue whose memory another one has now: noticed at the pop.
    // SAFETY: the memory lives.
    let mut consumer = unsafe { IoQueueConsumer::attach(&good, 0) }.unwrap();
    produce(&queue).unwrap();
    // SAFETY: as above; nobody else looks at the header now.
    unsafe { (*(good.control as *mut ControlHeader)).epoch += 1 };
    assert_eq!((consumer.try_pop(), consumer.error()), (Err(Outcome::Aborted), -libc::ESTALE));
    assert_eq!(queue.aborted(), 0, "the queue that lives is not this consumer's");
    queue.consumers_stopped();
}

#[test]
fn a_credit_that_makes_no_sense_aborts_the_queue() {
    for nonsense in [7u64, 2, u64::MAX, 1 << 63] {
        let queue = queue(2);
        let view = queue.host_view();
        produce(&queue).unwrap();
        produce(&queue).unwrap();
        // SAFETY: the queue lives.
        unsafe { AtomicU64::from_ptr((view.credit + 0x80) as *mut u64) }.store(nonsense, Ordering::Release);
        assert_eq!(errno(queue.reserve()), libc::ECANCELED, "{nonsense}");
        assert_eq!(queue.aborted(), libc::EPROTO);
        queue.consumers_stopped();
    }
}

/// Words of a queue that somebody tramples on: a consumer ends with an outcome and looks at nothing outside.
#[test]
fn trampled_words() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut outcomes, mut executions) = ([0u64; 5], 0u64);
    let modes = [ConsumeMode::Single, ConsumeMode::Partitioned, ConsumeMode::Claimed, ConsumeMode::Broadcast];
    for mode in modes {
        let consumers = if mode == ConsumeMode::Single { 1 } else { 3 };
        let options = options(4, mode, consumers);
        let layout = options.layout().unwrap();
        let queue = IoQueue::new(options).unwrap();
        let view = queue.host_view();
        let blocks = [(view.control, layout.control), (view.credit, layout.credit), (view.device, layout.device)];
        let save = |(base, len): (u64, u64)| -> Vec<u64> {
            // SAFETY: the queue lives, and only this thread uses it.
            (0..len / 8).map(|at| unsafe { ((base + at * 8) as *const u64).read() }).collect()
        };
        for _ in 0..3 {
            produce(&queue).unwrap();
        }
        let saved: Vec<Vec<u64>> = blocks.iter().copied().map(save).collect();
        for _ in 0..20_000 {
            for ((base, _), words) in blocks.iter().zip(&saved) {
                for (at, &word) in words.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { ((base + at as u64 * 8) as *mut u64).write(word) };
                }
            }
            for _ in 0..1 + random() % 4 {
                let (base, len) = blocks[(random() % 3) as usize];
                // The header is what attach checks; the rest is looked at again and again.
                let at = base + (random() % (len / 8)) * 8;
                let word = match random() % 4 {
                    0 => random(),
                    1 => random() % 8,
                    2 => 1 << (random() % 64),
                    _ => u64::MAX - random() % 8,
                };
                // SAFETY: as above.
                unsafe { (at as *mut u64).write(word) };
            }
            // SAFETY: the queue lives.
            let Ok(mut consumer) =
                (unsafe { IoQueueConsumer::attach(&view, (random() % u64::from(consumers)) as u32) })
            else {
                continue;
            };
            executions += 1;
            for _ in 0..8 {
                match consumer.try_pop() {
                    Ok(slot) => {
                        let payload = consumer.payload(&slot);
                        if !payload.is_empty() {
                            let (start, end) =
                                (payload.as_ptr() as u64, payload.as_ptr() as u64 + payload.len() as u64);
                            assert!(start >= view.slots && end <= view.slots + layout.slots);
                        }
                        outcomes[0] += 1;
                        consumer.release(slot).unwrap();
                    }
                    Err(outcome) => {
                        outcomes[outcome as usize] += 1;
                        break;
                    }
                }
            }
            consumer.hand_back();
        }
        queue.consumers_stopped();
    }
    println!("figure: {executions} queues trampled on, outcomes ok/end/aborted/poison/timeout: {outcomes:?}");
    assert!(outcomes[0] > 0 && outcomes[2] > 0 && outcomes[4] > 0);
}

/// Producers and consumers in threads: every byte right, every sequence once.
#[test]
fn stress() {
    const SEQUENCES: u64 = 20_000;
    for (mode, consumers, slots) in [
        (ConsumeMode::Single, 1, 2),
        (ConsumeMode::Partitioned, 3, 4),
        (ConsumeMode::Claimed, 3, 2),
        (ConsumeMode::Claimed, 4, 8),
        (ConsumeMode::Broadcast, 3, 4),
    ] {
        let queue = IoQueue::new(options(slots, mode, consumers)).unwrap();
        let seen: Vec<AtomicU32> = (0..SEQUENCES).map(|_| AtomicU32::new(0)).collect();
        std::thread::scope(|scope| {
            for index in 0..consumers {
                let (queue, seen) = (&queue, &seen);
                scope.spawn(move || {
                    let mut consumer = queue.consumer(index).unwrap();
                    for round in 0u32.. {
                        match consume(&mut consumer, Duration::from_millis(1)) {
                            Ok(sequence) => drop(seen[sequence as usize].fetch_add(1, Ordering::Relaxed)),
                            Err(Outcome::Timeout) if round % 3 == index => drop(consumer.hand_back()),
                            Err(Outcome::Timeout) => {}
                            Err(Outcome::End) => break,
                            Err(outcome) => panic!("{mode:?}: {outcome:?} {}", consumer.error()),
                        }
                    }
                });
            }
            let producers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        loop {
                            match produce(&queue) {
                                Ok(sequence) if sequence + 3 >= SEQUENCES => break,
                                Ok(_) => {}
                                Err(error) if error.errno() == libc::EAGAIN => std::thread::yield_now(),
                                Err(error) => panic!("{error}"),
                            }
                        }
                    })
                })
                .collect();
            // The tail's follower, which knows nothing else.
            let mut follower = {
                let view = queue.host_view();
                // SAFETY: the queue outlives the scope. It pops nothing, so no consumer has its place.
                unsafe { IoQueueConsumer::attach(&view, 0) }.unwrap()
            };
            for n in (0..SEQUENCES - 3).step_by(997) {
                follower.wait_tail(n, LONG).unwrap();
                assert!(queue.tail() > n);
            }
            producers.into_iter().for_each(|producer| producer.join().unwrap());
            queue.finish();
        });
        let readers = if mode == ConsumeMode::Broadcast { consumers } else { 1 };
        let end = queue.reserved() as usize;
        assert!(seen[..end].iter().all(|count| count.load(Ordering::Relaxed) == readers), "{mode:?}");
        assert_eq!(queue.tail(), end as u64);
        queue.consumers_stopped();
        queue.destroy().unwrap();
    }
}

// Other processes

/// A queue in memory that a forked child shares, at the same addresses.
struct Shared {
    base: *mut u8,
    options: IoQueueOptions,
}

const PART: usize = 1 << 20;

impl Shared {
    fn new(options: IoQueueOptions) -> Self {
        // SAFETY: a new mapping touches nothing that exists.
        let base = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), 4 * PART, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self { base: base.cast(), options }
    }

    fn queue(&self) -> Arc<IoQueue> {
        // SAFETY: four parts of a mapping that is never unmapped, for this queue alone.
        unsafe {
            let part = |index: usize| {
                let base = self.base.add(index * PART);
                GpuMappedBuffer::from_host_visible_owner(base, PART, Some(base as u64), ()).unwrap()
            };
            let memory = IoQueueMemory { control: part(0), credit: part(1), device: part(2), slots: part(3) };
            IoQueue::in_memory(self.options, memory).unwrap()
        }
    }
}

/// A child process that runs `body` and never returns.
fn fork(body: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the children are those of a process with one test thread; they end by `_exit` or a signal.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        // SAFETY: ends the process.
        unsafe { libc::_exit(i32::from(ended.is_err())) };
    }
    assert!(pid > 0);
    pid
}

/// Sends a signal, and waits for the child's end if `wait`.
fn signal(pid: libc::pid_t, signal: i32, wait: bool) {
    // SAFETY: a child of this process.
    unsafe {
        assert_eq!(libc::kill(pid, signal), 0);
        if wait {
            assert_eq!(libc::waitpid(pid, std::ptr::null_mut(), 0), pid);
        }
    }
}

/// Memory of a queue is not the child's (MADV_DONTFORK): everything says so, nothing faults.
#[test]
fn a_forked_child() {
    in_leaking_child("a_forked_child", || {
        let queue = queue(4);
        let mut consumer = queue.consumer(0).unwrap();
        for _ in 0..2 {
            produce(&queue).unwrap();
        }
        let slot = consumer.try_pop().unwrap();
        let mut reserved = queue.reserve().unwrap();
        let child = fork(|| {
            assert_eq!((consumer.try_pop(), consumer.error()), (Err(Outcome::Aborted), -libc::EPERM));
            assert_eq!(consumer.wait_tail(0, SOON), Err(Outcome::Aborted));
            assert!(consumer.payload(&slot).is_empty() && !consumer.hand_back());
            consumer.abort(libc::EIO);
            assert_eq!(errno(consumer.release(slot)), libc::EPERM);
            assert_eq!(errno(reserved.as_mut_slice()), libc::EPERM);
            assert_eq!(errno(reserved.publish(&SlotData::default())), libc::EPERM);
            assert_eq!(errno(queue.reserve()), libc::EPERM);
            assert_eq!(errno(queue.consumer(0)), libc::EPERM);
            assert_eq!((queue.finish(), queue.abort(libc::EIO), queue.free_slots()), (false, false, 0));
            assert_eq!(queue.aborted(), libc::EPERM);
            drop((consumer, Arc::clone(&queue)));
        });
        let mut status = -1;
        // SAFETY: a child of this process.
        unsafe { assert_eq!(libc::waitpid(child, &raw mut status, 0), child) };
        assert_eq!(status, 0);
    });
}

#[test]
fn kill_of_the_producer() {
    in_leaking_child("kill_of_the_producer", || {
        drop(ring!());
        let file = TempFile::new(1_000_000);
        for round in 0..20u64 {
            let shared = Shared::new(options(8, ConsumeMode::Single, 1));
            let (mut told, tell) = {
                let pipe = Pipe::new();
                let read = std::fs::File::from(pipe.read.try_clone().unwrap());
                (read, pipe.write.unwrap())
            };
            let producer = fork(|| {
                let queue = shared.queue();
                let view = queue.host_view();
                // SAFETY: plain words.
                let bytes = unsafe { std::slice::from_raw_parts((&raw const view).cast::<u8>(), size_of_val(&view)) };
                (&tell).write_all(bytes).unwrap();
                let input = file.open(DirectMode::Off);
                let ring = ringest::IoUringState::new(ringest::RingOptions::default()).unwrap();
                let mut driver = NvmeGpuIngestDriver::new(ring, queue, DriverOptions::default()).unwrap();
                for offset in (0..900_000).cycle().step_by(4096) {
                    let request = ringest::IngestRequest::new(&input, offset, 4096, 0);
                    while driver.submit(request.clone()).is_err() {
                        driver.poll_completions().unwrap();
                    }
                    driver.poll_completions().unwrap();
                }
            });
            let mut view = IoQueueView::default();
            // SAFETY: plain words.
            let bytes =
                unsafe { std::slice::from_raw_parts_mut((&raw mut view).cast::<u8>(), size_of::<IoQueueView>()) };
            told.read_exact(bytes).unwrap();
            // SAFETY: the memory is mapped here at the same addresses.
            let mut consumer = unsafe { IoQueueConsumer::attach(&view, 0) }.unwrap();
            let mut popped = 0;
            let mut kill_at = 10 + round * 7;
            let started = Instant::now();
            loop {
                match consumer.wait_pop(Duration::from_millis(100)) {
                    Ok(slot) => {
                        assert_eq!(slot.status(), 0);
                        check(consumer.payload(&slot), slot.descriptor().file_offset);
                        consumer.release(slot).unwrap();
                        popped += 1;
                    }
                    Err(outcome) => {
                        assert_eq!(
                            outcome,
                            Outcome::Timeout,
                            "what nobody tells cannot be known: {}",
                            consumer.error()
                        );
                        if kill_at == u64::MAX {
                            break;
                        }
                    }
                }
                if popped >= kill_at {
                    signal(producer, libc::SIGKILL, true);
                    kill_at = u64::MAX;
                }
                assert!(started.elapsed() < LONG);
            }
        }
    });
}

#[test]
fn a_stopped_consumer() {
    in_leaking_child("a_stopped_consumer", || {
        drop(ring!());
        let file = TempFile::new(400_000);
        let shared = Shared::new(options(4, ConsumeMode::Single, 1));
        let queue = shared.queue();
        let view = queue.host_view();
        let consumer = fork(|| {
            // SAFETY: the memory is mapped here at the same addresses.
            let mut consumer = unsafe { IoQueueConsumer::attach(&view, 0) }.unwrap();
            loop {
                match consumer.wait_pop(LONG) {
                    Ok(slot) => {
                        check(consumer.payload(&slot), slot.descriptor().file_offset);
                        consumer.release(slot).unwrap();
                    }
                    Err(outcome) => {
                        assert_eq!(outcome, Outcome::End);
                        return;
                    }
                }
            }
        });
        let input = file.open(DirectMode::Off);
        let options = DriverOptions { queue_limit: 8, ..DriverOptions::default() };
        let mut driver = NvmeGpuIngestDriver::new(ring!(), Arc::clone(&queue), options).unwrap();
        let submit = |driver: &mut NvmeGpuIngestDriver, offset: u64| {
            driver.submit(ringest::IngestRequest::new(&input, offset, 4096, 0)).map_err(|error| error.errno())
        };
        for offset in 0..50 {
            while submit(&mut driver, offset).is_err() {
                driver.poll_completions().unwrap();
            }
        }
        driver.drain(Some(LONG)).unwrap();
        signal(consumer, libc::SIGSTOP, false);
        driver.poll_completions().unwrap();
        let started = Instant::now();
        // It takes a while to stop; then the queue fills up, and nothing waits for longer than it is told to.
        loop {
            driver.poll_completions().unwrap();
            if submit(&mut driver, 1) == Err(libc::EAGAIN)
                && driver.drain(Some(SOON)).is_err_and(|error| error.errno() == libc::ETIMEDOUT)
            {
                break;
            }
            assert!(started.elapsed() < LONG);
        }
        signal(consumer, libc::SIGCONT, false);
        driver.drain(Some(LONG)).unwrap();
        driver.finish().unwrap();
        let mut status = 0;
        // SAFETY: a child of this process.
        unsafe { assert_eq!(libc::waitpid(consumer, &raw mut status, 0), consumer) };
        assert_eq!(status, 0, "the consumer came to its end");
        assert_eq!(driver.telemetry_snapshot().failed, 0);
        drop(driver);
        queue.consumers_stopped();
    });
}
