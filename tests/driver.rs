//! The driver over real files: every request ends once, every slot is whole or poisoned, and telemetry counts it all.

mod common;

use common::*;
use ringest::wire::{ConsumeMode, DESCRIPTOR_EARLY, NO_SEQUENCE, Outcome};
use ringest::{
    DirectMode, DriverOptions, FileRef, IngestCompletion, IngestRequest, InputFile, IoQueue, IoQueueConsumer,
    IoQueueOptions, IoUringState, NativeReadPath, NvmeGpuIngestDriver, ReadPath, RingOptions, leak_stats,
};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_millis(20);

fn queue(slots: u32, slot_bytes: u32) -> Arc<IoQueue> {
    IoQueue::new(IoQueueOptions { slots, slot_bytes, ..IoQueueOptions::default() }).unwrap()
}

fn driver(ring: IoUringState, queue: &Arc<IoQueue>) -> NvmeGpuIngestDriver {
    with(ring, queue, DriverOptions::default())
}

fn with(ring: IoUringState, queue: &Arc<IoQueue>, options: DriverOptions) -> NvmeGpuIngestDriver {
    NvmeGpuIngestDriver::new(ring, Arc::clone(queue), options).unwrap()
}

/// Records of requests that have ended.
#[track_caller]
fn records(driver: &mut NvmeGpuIngestDriver, count: usize) -> Vec<IngestCompletion> {
    let mut out = vec![IngestCompletion::default(); count];
    let taken = driver.wait_into(&mut out, count, Some(LONG)).unwrap();
    assert_eq!(taken, count);
    out
}

/// Pops a slot that must be whole, compares it with the file, and releases it. Returns its tag.
#[track_caller]
fn pop(consumer: &mut IoQueueConsumer) -> u64 {
    let slot = consumer.wait_pop(LONG).unwrap();
    let descriptor = *slot.descriptor();
    assert_eq!(descriptor.status, 0);
    assert_eq!(u64::from(descriptor.data_offset) % 16, descriptor.file_offset % 16);
    let payload = consumer.payload(&slot);
    assert_eq!(payload.len(), descriptor.bytes as usize);
    check(payload, descriptor.file_offset);
    consumer.release(slot).unwrap();
    descriptor.tag
}

/// Pops a slot that must be poisoned and releases it. Returns its errno and the bytes in place.
#[track_caller]
fn pop_poison(consumer: &mut IoQueueConsumer) -> (i32, Vec<u8>) {
    let slot = consumer.wait_pop(LONG).unwrap();
    assert!(slot.is_poison());
    let poison = (-slot.status(), consumer.payload(&slot).to_vec());
    consumer.release(slot).unwrap();
    poison
}

#[test]
fn any_offset_and_length_arrives_whole_and_without_a_bounce() {
    const LEN: u64 = 1_000_003;
    let file = TempFile::new(LEN as usize);
    for alignment in [128, 512, 4096] {
        for input in [file.open(DirectMode::Auto), file.open(DirectMode::Off)] {
            let options = IoQueueOptions { slots: 8, slot_bytes: 10_000, alignment, ..IoQueueOptions::default() };
            let queue = IoQueue::new(options).unwrap();
            let mut consumer = queue.consumer(0).unwrap();
            let mut driver = driver(ring!(), &queue);
            let shapes =
                [(0, 1), (0, 0), (1, 9_999), (511, 2), (512, 512), (4095, 4098), (LEN - 7, 7), (65_537, 10_000)];
            for (index, &(offset, len)) in shapes.iter().enumerate() {
                driver.submit(IngestRequest::new(&input, offset, len, index as u64)).unwrap();
            }
            driver.drain(Some(LONG)).unwrap();
            for (index, &(offset, len)) in shapes.iter().enumerate() {
                let slot = consumer.wait_pop(LONG).unwrap();
                assert_eq!((slot.status(), slot.descriptor().tag), (0, index as u64));
                assert_eq!(slot.descriptor().file_offset, offset);
                assert_eq!(consumer.payload(&slot).len(), len as usize);
                check(consumer.payload(&slot), offset);
                consumer.release(slot).unwrap();
            }
            let telemetry = driver.telemetry_snapshot();
            assert_eq!((telemetry.completed.reads, telemetry.failed), (shapes.len() as u64, 0));
            let fits = input.direct().is_none_or(|direct| direct.offset.max(direct.memory) <= alignment);
            if fits {
                assert_eq!((telemetry.bounce_bytes, telemetry.short_reads), (0, 0), "{alignment} {input:?}");
            } else {
                assert!(telemetry.bounce_bytes > 0);
            }
        }
    }
}

#[test]
fn a_whole_file_in_pieces_with_checksums() {
    const LEN: u64 = 3_000_001;
    let file = TempFile::new(LEN as usize);
    let input = file.open(DirectMode::Auto);
    let queue = queue(4, 64 << 10);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { crc32c: true, queue_limit: 3, ..DriverOptions::default() });
    let (mut accepted, mut seen) = (0, 0);
    while accepted < LEN {
        match driver.submit_file(&input, accepted, LEN - accepted, 9) {
            Ok(bytes) => accepted += bytes,
            Err(error) => assert_eq!(error.errno(), libc::EAGAIN, "{error}"),
        }
        driver.wait(1, Some(LONG)).unwrap();
        driver.poll_completions().unwrap();
        while let Ok(slot) = consumer.try_pop() {
            assert_eq!(slot.descriptor().file_offset, seen);
            assert_eq!(slot.descriptor().crc32c, crc32c::crc32c(consumer.payload(&slot)));
            check(consumer.payload(&slot), seen);
            seen += u64::from(slot.descriptor().bytes);
            consumer.release(slot).unwrap();
        }
    }
    driver.finish().unwrap();
    assert_eq!(errno(driver.submit(IngestRequest::new(&input, 0, 1, 0))), libc::EBUSY);
    while seen < LEN {
        driver.poll_completions().unwrap();
        match consumer.wait_pop(SOON) {
            Ok(slot) => {
                check(consumer.payload(&slot), seen);
                seen += u64::from(slot.descriptor().bytes);
                consumer.release(slot).unwrap();
            }
            Err(outcome) => assert_eq!(outcome, Outcome::Timeout),
        }
    }
    driver.drain(Some(LONG)).unwrap();
    assert_eq!(consumer.wait_pop(LONG), Err(Outcome::End));
    let report = driver.close(LONG).unwrap();
    assert_eq!(report.telemetry.submitted.bytes, LEN);
    assert_eq!(consumer.try_pop(), Err(Outcome::End));
}

#[test]
fn what_lies_beyond_the_end_of_the_file_is_poison_with_the_bytes_that_exist() {
    let file = TempFile::new(10_000);
    for input in [file.open(DirectMode::Auto), file.open(DirectMode::Off)] {
        let queue = queue(4, 8192);
        let mut consumer = queue.consumer(0).unwrap();
        let mut driver = driver(ring!(), &queue);
        for (offset, len) in [(9_000, 5_000), (10_000, 1), (50_000, 100)] {
            driver.submit(IngestRequest::new(&input, offset, len, 0)).unwrap();
        }
        let records = records(&mut driver, 3);
        let mut bytes: Vec<_> = records.iter().map(|record| (record.request, record.status, record.bytes)).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, [(0, -libc::ENODATA, 1_000), (1, -libc::ENODATA, 0), (2, -libc::ENODATA, 0)]);
        assert_eq!(records[0].result().unwrap_err().errno(), libc::ENODATA);
        let (errno, payload) = pop_poison(&mut consumer);
        assert_eq!((errno, payload.len()), (libc::ENODATA, 1_000));
        check(&payload, 9_000);
        assert_eq!(consumer.wait_tail(0, SOON), Err(Outcome::Poison));
        let telemetry = driver.telemetry_snapshot();
        assert_eq!((telemetry.failed, telemetry.end_of_file, telemetry.poisoned_slots), (3, 3, 3));
    }
}

#[test]
fn a_descriptor_whose_alignment_is_learned_is_read_through_the_bounce_buffer() {
    let file = TempFile::new(100_000);
    let _ = direct!(file);
    let raw = file.raw(libc::O_DIRECT).unwrap();
    let queue = queue(4, 16_384);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = driver(ring!(), &queue);
    driver.submit(IngestRequest::new(raw.as_raw_fd(), 777, 10_000, 1)).unwrap();
    let record = records(&mut driver, 1)[0];
    assert!(record.bounced > 0 && record.bounced < 10_000, "{record:?}");
    assert_eq!(driver.telemetry_snapshot().bounce_bytes, record.bounced);
    assert_eq!(pop(&mut consumer), 1);
}

#[test]
fn a_request_that_cannot_work_fails_as_a_completion() {
    let queue = queue(4, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = driver(ring!(), &queue);
    let request = driver.submit(IngestRequest::new(-1, 0, 100, 5)).unwrap();
    let record = records(&mut driver, 1)[0];
    assert_eq!((record.request, record.tag, record.status), (request, 5, -libc::EBADF));
    assert_eq!(pop_poison(&mut consumer).0, libc::EBADF);
    // Whereas what is wrong by itself is refused.
    assert_eq!(errno(driver.submit(IngestRequest::new(0, 0, 4097, 0))), libc::ERANGE);
    assert_eq!(errno(driver.submit(IngestRequest::new(0, i64::MAX as u64, 1, 0))), libc::ERANGE);
    assert_eq!(errno(driver.submit_file(0, u64::MAX, 1, 0)), libc::ERANGE);
    assert_eq!(driver.in_flight(), 0);
}

#[test]
fn poll_reports_successes_first_and_each_failure_once() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(4, 4096);
    let mut driver = driver(ring!(), &queue);
    driver.submit(IngestRequest::new(&input, 0, 100, 0)).unwrap();
    driver.submit(IngestRequest::new(-1, 0, 100, 1)).unwrap();
    driver.submit(IngestRequest::new(&input, 100, 100, 2)).unwrap();
    driver.drain(Some(LONG)).unwrap();
    let mut outcomes: Vec<_> = (0..4).map(|_| driver.poll_completions().map_err(|error| error.errno())).collect();
    outcomes.sort_unstable_by_key(|outcome| outcome.err());
    assert_eq!(outcomes.iter().flatten().sum::<usize>(), 2);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Err(libc::EBADF)).count(), 1);
}

#[test]
fn without_a_free_slot_a_submit_is_eagain_or_queued_up_to_the_bound() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    for limit in [0u32, 3] {
        let queue = queue(2, 4096);
        let mut consumer = queue.consumer(0).unwrap();
        let options = DriverOptions { queue_limit: limit, ..DriverOptions::default() };
        let mut driver = with(ring!(), &queue, options);
        for tag in 0..2 + u64::from(limit) {
            driver.submit(IngestRequest::new(&input, tag, 10, tag)).unwrap();
        }
        let full = driver.submit(IngestRequest::new(&input, 0, 10, 99)).unwrap_err();
        assert_eq!(full.errno(), libc::EAGAIN);
        // Nobody takes the records: their number is bounded too.
        while driver.in_flight() > 0 {
            driver.wait(1, Some(LONG)).unwrap();
        }
        assert_eq!((driver.queued(), driver.free_slots()), (limit as usize, 0));
        assert_eq!(errno(driver.submit(IngestRequest::new(&input, 0, 10, 99))), libc::EAGAIN);
        if limit > 0 {
            let timed_out = driver.drain(Some(SOON)).unwrap_err();
            assert_eq!(timed_out.errno(), libc::ETIMEDOUT);
            assert!(timed_out.to_string().contains("3 requests wait for a slot"), "{timed_out}");
        }
        for tag in 0..2 + u64::from(limit) {
            // Those that waited start as slots come back.
            eventually("the next slot", || driver.poll_completions().is_ok() && queue.tail() > tag);
            assert_eq!(pop(&mut consumer), tag);
        }
        driver.drain(Some(LONG)).unwrap();
        let telemetry = driver.telemetry_snapshot();
        assert!(telemetry.credit_stalls >= 1 && telemetry.credit_stall_time > Duration::ZERO, "{telemetry:?}");
        assert_eq!((telemetry.max_in_flight, telemetry.max_queued), (2, limit.into()));
        driver.reset_telemetry().unwrap();
        let telemetry = driver.telemetry_snapshot();
        assert_eq!((telemetry.submitted.reads, telemetry.credit_stalls, telemetry.latency.count), (0, 0, 0));
    }
}

#[test]
fn records_that_nobody_takes_are_bounded() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(4, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = driver(ring!(), &queue);
    let mut accepted = 0;
    let refused = loop {
        match driver.submit(IngestRequest::new(&input, 0, 10, 0)) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
        driver.drain(Some(LONG)).unwrap();
        pop(&mut consumer);
    };
    assert_eq!((refused.errno(), accepted), (libc::EAGAIN, 8));
    assert!(refused.to_string().contains("take completions"), "{refused}");
    assert_eq!(driver.poll_completions().unwrap(), 8);
    driver.submit(IngestRequest::new(&input, 0, 10, 0)).unwrap();
}

#[test]
fn a_deadline_poisons_the_slot_and_never_frees_it_early() {
    let pipe = Pipe::new();
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(2, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = driver(ring!(), &queue);
    let started = Instant::now();
    let request = IngestRequest { timeout: Some(SOON), ..IngestRequest::new(pipe.fd(), 0, 100, 7) };
    driver.submit(request).unwrap();
    let record = records(&mut driver, 1)[0];
    assert!(started.elapsed() >= SOON);
    assert_eq!((record.status, record.bytes, record.tag), (-libc::ETIMEDOUT, 0, 7));
    assert_eq!(record.result().unwrap_err().errno(), libc::ETIMEDOUT);
    let slot = consumer.wait_pop(LONG).unwrap();
    assert_eq!(slot.status(), -libc::ETIMEDOUT);
    assert_eq!(u32::from(slot.descriptor().flags), DESCRIPTOR_EARLY);
    assert!(consumer.payload(&slot).is_empty());
    consumer.release(slot).unwrap();
    // The read is cancelled, which a pipe's heeds; the slot is free once it has ended.
    eventually("the read's end", || {
        driver.poll_completions().unwrap();
        driver.held_slots() == 0
    });
    let telemetry = driver.telemetry_snapshot();
    assert_eq!((telemetry.timed_out, telemetry.early_poisoned_slots, telemetry.poisoned_slots), (1, 1, 1));
    // The slot's bytes of later sequences are theirs alone.
    for tag in 0..4 {
        driver.submit(IngestRequest::new(&input, tag, 100, tag)).unwrap();
        driver.drain(Some(LONG)).unwrap();
        assert_eq!(pop(&mut consumer), tag);
        assert_eq!(driver.poll_completions().unwrap(), 1);
    }
    // A deadline that does not come.
    let request = IngestRequest { timeout: Some(LONG), ..IngestRequest::new(&input, 0, 100, 8) };
    driver.submit(request).unwrap();
    assert_eq!(records(&mut driver, 1)[0].status, 0);
}

#[test]
fn a_deadline_also_ends_a_request_without_a_slot() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(2, 4096);
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 4, ..DriverOptions::default() });
    for tag in 0..4 {
        let timeout = (tag == 3).then_some(SOON);
        driver.submit(IngestRequest { timeout, ..IngestRequest::new(&input, 0, 10, tag) }).unwrap();
    }
    let records = records(&mut driver, 3);
    assert_eq!((records[2].tag, records[2].status, records[2].sequence), (3, -libc::ETIMEDOUT, NO_SEQUENCE));
    assert_eq!(driver.queued(), 1);
}

#[test]
fn cancel_by_tag() {
    let pipe = Pipe::new();
    let queue = queue(2, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 4, ..DriverOptions::default() });
    for tag in [1, 2, 1, 2] {
        driver.submit(IngestRequest::new(pipe.fd(), 0, 100, tag)).unwrap();
    }
    driver.poll_completions().unwrap();
    assert_eq!(driver.cancel(3).unwrap(), 0);
    assert_eq!(driver.cancel(1).unwrap(), 2);
    let gone = records(&mut driver, 2);
    assert!(gone.iter().all(|record| record.status == -libc::ECANCELED && record.tag == 1), "{gone:?}");
    assert_eq!(gone.iter().filter(|record| record.sequence == NO_SEQUENCE).count(), 1);
    assert_eq!(pop_poison(&mut consumer).0, libc::ECANCELED);
    pipe.feed(0, 200);
    driver.drain(Some(LONG)).unwrap();
    assert_eq!(driver.poll_completions().unwrap(), 2);
    assert_eq!(driver.telemetry_snapshot().cancelled, 2);
    for _ in 0..2 {
        let slot = consumer.wait_pop(LONG).unwrap();
        assert_eq!((slot.descriptor().tag, consumer.payload(&slot).len()), (2, 100));
        consumer.release(slot).unwrap();
    }
    driver.submit(IngestRequest::new(pipe.fd(), 0, 100, 1)).unwrap();
    driver.poll_completions().unwrap();
    assert_eq!(driver.cancel_all().unwrap(), 1);
    assert_eq!(records(&mut driver, 1)[0].status, -libc::ECANCELED);
}

#[test]
fn close_with_reads_in_flight() {
    let pipe = Pipe::new();
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(4, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 4, ..DriverOptions::default() });
    driver.submit(IngestRequest::new(&input, 0, 10, 0)).unwrap();
    for tag in 1..6 {
        driver.submit(IngestRequest::new(pipe.fd(), 0, 100, tag)).unwrap();
    }
    driver.wait(1, Some(LONG)).unwrap();
    let before = leak_stats();
    let report = driver.close(LONG).unwrap();
    assert_eq!(leak_stats(), before);
    let ring = report.ring.unwrap();
    assert_eq!(report.completions.len(), 6);
    assert_eq!(report.completions.iter().filter(|record| record.status == 0).count(), 1);
    assert_eq!((report.telemetry.cancelled, report.telemetry.in_flight, report.telemetry.leaked_reads), (5, 0, 0));
    // Not finished: what was not popped is lost.
    assert_eq!(consumer.try_pop(), Err(Outcome::Aborted));
    assert_eq!(consumer.error(), -libc::ECANCELED);
    drop((consumer, report.queue));
    queue.destroy().unwrap();
    exercise(ring);
}

#[test]
fn close_after_finish_leaves_the_end() {
    let pipe = Pipe::new();
    let queue = queue(4, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = driver(ring!(), &queue);
    driver.submit(IngestRequest::new(pipe.fd(), 0, 100, 0)).unwrap();
    driver.finish().unwrap();
    drop(driver);
    assert_eq!(pop_poison(&mut consumer).0, libc::ECANCELED);
    assert_eq!(consumer.try_pop(), Err(Outcome::End));
}

#[test]
fn dropped_on_another_thread() {
    in_leaking_child("dropped_on_another_thread", || {
        let pipe = Pipe::new();
        let queue = queue(2, 4096);
        let mut consumer = queue.consumer(0).unwrap();
        let mut driver = driver(ring!(), &queue);
        driver.submit(IngestRequest::new(pipe.fd(), 0, 100, 0)).unwrap();
        driver.poll_completions().unwrap();
        let mut driver = elsewhere(move || {
            assert_eq!(errno(driver.poll_completions()), libc::EPERM);
            assert_eq!(errno(driver.submit(IngestRequest::new(0, 0, 1, 0))), libc::EPERM);
            assert_eq!(errno(driver.cancel_all()), libc::EPERM);
            driver
        });
        assert_eq!(driver.poll_completions().unwrap(), 0);
        elsewhere(move || drop(driver));
        // Told all the same, although the read may still land.
        assert_eq!(consumer.try_pop(), Err(Outcome::Aborted));
        assert_eq!(leak_stats().reads, 1);
    });
}

#[test]
fn a_movable_driver_goes_from_thread_to_thread() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(2, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let ring = ring!(RingOptions { movable: true, ..RingOptions::default() });
    let mut driver = driver(ring, &queue).into_movable().unwrap();
    let submit = || driver.get().submit(IngestRequest::new(&input, 0, 100, 3)).unwrap();
    std::thread::scope(|scope| scope.spawn(submit).join().unwrap());
    let drain = || driver.get().drain(Some(LONG)).unwrap();
    std::thread::scope(|scope| scope.spawn(drain).join().unwrap());
    assert_eq!(pop(&mut consumer), 3);
    let mut driver = driver.into_inner();
    assert_eq!(driver.poll_completions().unwrap(), 1);
    let bound = self::driver(ring!(), &self::queue(2, 64));
    assert_eq!(errno(bound.into_movable()), libc::EINVAL);
}

#[test]
fn an_abort_of_a_consumer_ends_everything() {
    let pipe = Pipe::new();
    let queue = queue(2, 4096);
    let consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 2, ..DriverOptions::default() });
    for tag in 0..4 {
        driver.submit(IngestRequest::new(pipe.fd(), 0, 100, tag)).unwrap();
    }
    driver.poll_completions().unwrap();
    consumer.abort(libc::EIO);
    driver.drain(Some(LONG)).unwrap();
    let refused = driver.submit(IngestRequest::new(pipe.fd(), 0, 100, 0)).unwrap_err();
    assert_eq!(refused.errno(), libc::ECANCELED);
    assert!(refused.to_string().contains("errno 5"), "{refused}");
    assert_eq!((driver.in_flight(), driver.queued()), (0, 0));
    let ended = records(&mut driver, 4);
    assert!(ended.iter().all(|record| record.status == -libc::ECANCELED), "{ended:?}");
    assert_eq!(queue.aborted(), libc::EIO);
}

#[test]
fn a_consumer_that_never_releases_stops_nothing_but_itself() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(2, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 1, ..DriverOptions::default() });
    for tag in 0..3 {
        driver.submit(IngestRequest::new(&input, 0, 10, tag)).unwrap();
    }
    let slots = [consumer.wait_pop(Duration::ZERO), Err(Outcome::Timeout)];
    drop(slots);
    assert_eq!(errno(driver.drain(Some(SOON))), libc::ETIMEDOUT);
    let report = driver.close(LONG).unwrap();
    assert!(report.ring.is_ok());
    assert_eq!(report.completions.len(), 3);
    assert_eq!(consumer.wait_pop(LONG), Err(Outcome::Aborted));
}

#[test]
fn files_by_every_name() {
    let file = TempFile::new(100_000);
    let input = file.open(DirectMode::Auto);
    let buffered = file.open(DirectMode::Off);
    let queue = queue(8, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = driver(ring!(), &queue);
    let fds = [input.as_fd().as_raw_fd(), buffered.as_fd().as_raw_fd()];
    driver.ring_mut().unwrap().register_files(&fds).unwrap();
    let sources = [
        FileRef::from(&input),
        FileRef::from(&buffered),
        FileRef::from(fds[1]),
        driver.registered_file(0).unwrap(),
        driver.registered_file(1).unwrap(),
    ];
    assert_eq!(errno(driver.registered_file(2)), libc::ERANGE);
    let requests = sources.iter().enumerate();
    let requests = requests.map(|(tag, source)| IngestRequest::new(source.clone(), 777, 4000, tag as u64));
    assert_eq!(driver.submit_batch(requests).unwrap(), sources.len());
    driver.drain(Some(LONG)).unwrap();
    for tag in 0..sources.len() as u64 {
        assert_eq!(pop(&mut consumer), tag);
    }
}

#[test]
fn the_path_is_the_one_taken() {
    let file = TempFile::new(8192);
    let input = file.open(DirectMode::Off);
    for (unregistered, path) in [(false, ReadPath::RegisteredRead), (true, ReadPath::PlainRead)] {
        let queue = queue(2, 4096);
        let mut driver = with(ring!(), &queue, DriverOptions { unregistered, ..DriverOptions::default() });
        assert_eq!(driver.read_path(), NativeReadPath::RegisteredMappedRead);
        assert_eq!((driver.is_registered(), driver.registration_refusal().is_none()), (!unregistered, true));
        driver.submit(IngestRequest::new(&input, 0, 4096, 0)).unwrap();
        assert_eq!(records(&mut driver, 1)[0].path, path);
        let telemetry = driver.telemetry_snapshot();
        assert_eq!((telemetry.path(path).reads, telemetry.path(path).bytes), (1, 4096));
        assert_eq!(telemetry.paths.iter().map(|count| count.reads).sum::<u64>(), 1);
    }
}

#[test]
fn options_out_of_range() {
    let queue = queue(4, 4096);
    for (options, expected) in [
        (DriverOptions { depth: 5, ..DriverOptions::default() }, libc::EINVAL),
        (DriverOptions { queue_limit: (1 << 20) + 1, ..DriverOptions::default() }, libc::EINVAL),
        (DriverOptions { strict: true, unregistered: true, ..DriverOptions::default() }, libc::EINVAL),
    ] {
        let refused = NvmeGpuIngestDriver::new(ring!(), Arc::clone(&queue), options).unwrap_err();
        assert_eq!(refused.errno(), expected, "{options:?}");
    }
    let refused = NvmeGpuIngestDriver::new_gpudirect(ring!(), Arc::clone(&queue), DriverOptions::default());
    assert_eq!(errno(refused), libc::EOPNOTSUPP);
    assert_eq!(Arc::strong_count(&queue), 1);
}

#[test]
fn telemetry_is_the_sum_of_the_records() {
    let file = TempFile::new(100_000);
    let input = file.open(DirectMode::Off);
    let queue = queue(8, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 8, ..DriverOptions::default() });
    let mut all = Vec::new();
    for round in 0..50u64 {
        for request in 0..8 {
            let offset = (round * 8 + request) * 251;
            let len = (offset * 7 % 4096) as u32;
            let _ = driver.submit(IngestRequest::new(&input, offset, len, round));
        }
        driver.wait(4, Some(LONG)).unwrap();
        while let Ok(slot) = consumer.try_pop() {
            consumer.release(slot).unwrap();
        }
        driver.poll_each_for_test(&mut all);
    }
    loop {
        while let Ok(slot) = consumer.try_pop() {
            consumer.release(slot).unwrap();
        }
        driver.poll_each_for_test(&mut all);
        if driver.in_flight() + driver.queued() == 0 {
            break;
        }
    }
    let telemetry = driver.telemetry_snapshot();
    let whole: Vec<_> = all.iter().filter(|record| record.status == 0).collect();
    assert_eq!(telemetry.submitted.reads, all.len() as u64);
    assert_eq!(telemetry.completed.reads, whole.len() as u64);
    assert_eq!(telemetry.completed.bytes, whole.iter().map(|record| u64::from(record.bytes)).sum::<u64>());
    assert_eq!(telemetry.published_slots, all.len() as u64);
    assert_eq!((telemetry.in_flight, telemetry.queued, telemetry.held_slots), (0, 0, 0));
    assert_eq!(telemetry.latency.count, whole.len() as u64);
    let slowest = whole.iter().map(|record| record.latency).max().unwrap();
    assert_eq!(telemetry.latency.max, slowest);
    assert!(telemetry.latency.p50 <= telemetry.latency.p99 && telemetry.latency.p999 <= slowest);
    // Every request once.
    let mut requests: Vec<_> = all.iter().map(|record| record.request).collect();
    requests.sort_unstable();
    assert!(requests.iter().enumerate().all(|(index, &request)| index as u64 == request));
}

trait Collect {
    fn poll_each_for_test(&mut self, all: &mut Vec<IngestCompletion>);
}

impl Collect for NvmeGpuIngestDriver {
    fn poll_each_for_test(&mut self, all: &mut Vec<IngestCompletion>) {
        let mut out = [IngestCompletion::default(); 5];
        loop {
            match self.poll_completions_into(&mut out).unwrap() {
                0 => return,
                count => all.extend(&out[..count]),
            }
        }
    }
}

/// Four consumers in threads, every mode, a file many times the queue.
#[test]
fn consumers_in_threads() {
    const LEN: u64 = 4_000_037;
    let file = TempFile::new(LEN as usize);
    for (mode, consumers) in [
        (ConsumeMode::Single, 1),
        (ConsumeMode::Partitioned, 3),
        (ConsumeMode::Claimed, 4),
        (ConsumeMode::Broadcast, 2),
    ] {
        let options = IoQueueOptions { slots: 8, slot_bytes: 20_000, mode, consumers, ..IoQueueOptions::default() };
        let queue = IoQueue::new(options).unwrap();
        let input = file.open(DirectMode::Auto);
        let threads: Vec<_> = (0..consumers)
            .map(|index| {
                let mut consumer = queue.consumer(index).unwrap();
                std::thread::spawn(move || {
                    let mut bytes = 0;
                    loop {
                        match consumer.wait_pop(LONG) {
                            Ok(slot) => {
                                assert_eq!(slot.status(), 0);
                                check(consumer.payload(&slot), slot.descriptor().file_offset);
                                bytes += u64::from(slot.descriptor().bytes);
                                consumer.release(slot).unwrap();
                            }
                            Err(outcome) => break (bytes, outcome),
                        }
                    }
                })
            })
            .collect();
        let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 16, ..DriverOptions::default() });
        let mut offset = 0;
        while offset < LEN {
            match driver.submit_file(&input, offset, LEN - offset, 0) {
                Ok(accepted) => offset += accepted,
                Err(error) => assert_eq!(error.errno(), libc::EAGAIN, "{error}"),
            }
            driver.wait(1, Some(LONG)).unwrap();
            driver.poll_completions().unwrap();
        }
        driver.finish().unwrap();
        driver.drain(Some(LONG)).unwrap();
        let sums: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(sums.iter().all(|&(_, outcome)| outcome == Outcome::End), "{mode:?}: {sums:?}");
        let readers = if mode == ConsumeMode::Broadcast { consumers.into() } else { 1 };
        assert_eq!(sums.iter().map(|&(bytes, _)| bytes).sum::<u64>(), readers * LEN, "{mode:?}");
    }
}

#[test]
fn from_a_file_that_is_closed_and_gone() {
    let file = TempFile::new(50_000);
    let input = InputFile::open(file.path(), DirectMode::Off).unwrap();
    drop(file);
    let queue = queue(4, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 8, ..DriverOptions::default() });
    for tag in 0..8 {
        driver.submit(IngestRequest::new(&input, tag * 4096, 4096, tag)).unwrap();
    }
    drop(input);
    for tag in 0..8 {
        driver.wait(1, Some(LONG)).unwrap();
        assert_eq!(pop(&mut consumer), tag);
    }
    driver.drain(Some(LONG)).unwrap();
}

#[test]
fn a_registered_file_stays_what_it_is_until_its_requests_are_read() {
    let (old, new) = (TempFile::new(8192), TempFile::with_content(&[0xee; 8192]));
    let (old, new) = (old.open(DirectMode::Off), new.open(DirectMode::Off));
    let queue = queue(2, 4096);
    let mut consumer = queue.consumer(0).unwrap();
    let mut driver = with(ring!(), &queue, DriverOptions { queue_limit: 4, ..DriverOptions::default() });
    driver.ring_mut().unwrap().register_files(&[old.as_fd().as_raw_fd()]).unwrap();
    let file = driver.registered_file(0).unwrap();
    for tag in 0..4 {
        driver.submit(IngestRequest::new(file.clone(), tag * 512, 512, tag)).unwrap();
    }
    driver.wait(2, Some(LONG)).unwrap();
    assert_eq!((driver.in_flight(), driver.queued()), (0, 2));
    let busy = |driver: &mut NvmeGpuIngestDriver| {
        let mut ring = driver.ring_mut().unwrap();
        let update = errno(ring.update_file(0, Some(new.as_fd().as_raw_fd())));
        (update, errno(ring.update_file(0, None)), errno(ring.unregister_files()))
    };
    assert_eq!(busy(&mut driver), (libc::EBUSY, libc::EBUSY, libc::EBUSY));
    // One ends without a slot, the other is read.
    assert_eq!(driver.cancel(3).unwrap(), 1);
    assert_eq!(busy(&mut driver), (libc::EBUSY, libc::EBUSY, libc::EBUSY));
    for tag in 0..3 {
        eventually("the next slot", || driver.poll_completions().is_ok() && queue.tail() > tag);
        assert_eq!(pop(&mut consumer), tag);
    }
    driver.drain(Some(LONG)).unwrap();
    driver.ring_mut().unwrap().update_file(0, Some(new.as_fd().as_raw_fd())).unwrap();
    // A request names the file that is there when it is accepted.
    driver.submit(IngestRequest::new(file.clone(), 0, 512, 9)).unwrap();
    driver.drain(Some(LONG)).unwrap();
    let slot = consumer.wait_pop(LONG).unwrap();
    assert!(consumer.payload(&slot).iter().all(|&byte| byte == 0xee));
    consumer.release(slot).unwrap();
    driver.ring_mut().unwrap().update_file(0, None).unwrap();
    assert_eq!(errno(driver.submit(IngestRequest::new(file, 0, 512, 9))), libc::EINVAL);
}

/// Nothing ends the read; the abort must end the wait.
#[test]
fn an_abort_ends_a_wait_for_a_read_that_hangs() {
    for by_consumer in [false, true] {
        let pipe = Pipe::new();
        let queue = queue(2, 4096);
        let consumer = queue.consumer(0).unwrap();
        let mut driver = driver(ring!(), &queue);
        driver.submit(IngestRequest::new(pipe.fd(), 0, 100, 0)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(SOON);
                match by_consumer {
                    true => consumer.abort(libc::EIO),
                    false => drop(queue.abort(libc::EIO)),
                }
            });
            assert_eq!(driver.wait(1, Some(LONG)).unwrap(), 1);
        });
        assert_eq!(records(&mut driver, 1)[0].status, -libc::ECANCELED);
    }
}

#[test]
fn a_submit_sees_what_a_consumer_said() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let queue = queue(2, 4096);
    let mut driver = driver(ring!(), &queue);
    for tag in 0..2 {
        driver.submit(IngestRequest::new(&input, 0, 10, tag)).unwrap();
    }
    driver.drain(Some(LONG)).unwrap();
    assert_eq!(errno(driver.submit(IngestRequest::new(&input, 0, 10, 2))), libc::EAGAIN);
    assert_eq!(driver.telemetry_snapshot().credit_stalls, 1);
    queue.consumer(0).unwrap().abort(libc::EIO);
    assert_eq!(errno(driver.submit(IngestRequest::new(&input, 0, 10, 2))), libc::ECANCELED);
    // No slot will come, so nothing stalls any more.
    driver.drain(Some(LONG)).unwrap();
    let before = driver.telemetry_snapshot().credit_stall_time;
    std::thread::sleep(SOON);
    assert_eq!(driver.telemetry_snapshot().credit_stall_time, before);
}

#[test]
fn one_driver_fills_a_queue() {
    let queue = queue(2, 4096);
    let first = driver(ring!(), &queue);
    let second = NvmeGpuIngestDriver::new(ring!(), Arc::clone(&queue), DriverOptions::default());
    assert_eq!(errno(second), libc::EBUSY);
    drop(first);
    // Its end was the queue's.
    let mut third = driver(ring!(), &queue);
    assert_eq!(errno(third.submit(IngestRequest::new(0, 0, 1, 0))), libc::ECANCELED);
}

#[test]
fn latency_ends_with_the_publication() {
    const SLOT: u32 = 4 << 20;
    let file = TempFile::new(8 * SLOT as usize);
    let input = file.open(DirectMode::Off);
    let queue = queue(8, SLOT);
    let mut driver = with(ring!(), &queue, DriverOptions { crc32c: true, ..DriverOptions::default() });
    let started = Instant::now();
    driver.submit_file(&input, 0, 8 * u64::from(SLOT), 0).unwrap();
    driver.drain(Some(LONG)).unwrap();
    let took = started.elapsed();
    let slowest = driver.telemetry_snapshot().latency.max;
    // The last one's checksum and publication are in it.
    assert!(slowest <= took && slowest > took / 4, "{slowest:?} of {took:?}");
}
