//! A panic inside a call of the C ABI stays inside, and what it left is given up without freeing memory under a read.

#![cfg(feature = "testing")]

use ringest::ffi::{buffer, consumer, driver, io_queue, library, mapped, ring, stream, tail};
use ringest::testing::{PANIC, end_fault_plan, plan_fault};
use ringest::wire::{Outcome, state};
use std::ffi::CStr;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut};
use std::sync::Mutex;

/// What is leaked is counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_panic_becomes_enotrecoverable_and_the_stream_is_abandoned() {
    let _alone = ALONE.lock().unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let (mut memory, mut into, mut own, mut line, mut handle) =
        (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
    let mut words = null();
    let (mut before, mut leaks) = (library::ringest_leaks::default(), library::ringest_leaks::default());
    // SAFETY: all out pointers are valid.
    unsafe {
        assert_eq!(mapped::ringest_mapped_alloc(4096, null(), &mut memory), 0);
        assert_eq!(mapped::ringest_mapped_share(memory, &mut into), 0);
        assert_eq!(tail::ringest_tail_line_alloc(&mut line), 0);
        assert_eq!(tail::ringest_tail_line_host_ptr(line, &mut words), 0);
        if ring::ringest_ring_create(null(), &mut own) < 0 {
            println!("SKIP a_panic_becomes_enotrecoverable_and_the_stream_is_abandoned: no io_uring");
            return;
        }
        assert_eq!(stream::ringest_stream_create(own, into, line, null(), &mut handle), 0);
        assert_eq!(stream::ringest_stream_submit_read(handle, reader.as_raw_fd(), 0, 0, 8, 0), 0);
        assert_eq!(stream::ringest_stream_flush(handle), 1);
        assert_eq!(library::ringest_leak_stats(&mut before), 0);

        plan_fault(1, PANIC);
        assert_eq!(stream::ringest_stream_wait(handle, 1, 1_000_000), -i64::from(libc::ENOTRECOVERABLE));
        end_fault_plan();
        let message = CStr::from_ptr(library::ringest_last_error()).to_str().unwrap();
        assert!(message.contains("panicked"), "{message}");
        assert_eq!(stream::ringest_stream_poll(handle), -i64::from(libc::ENOTRECOVERABLE));
        assert_eq!((*words).state, state::OPEN);

        assert_eq!(stream::ringest_stream_destroy(handle), 0);
        assert_eq!((*words).state, state::ABORTED);
        assert_eq!((*words).error, -libc::ENOTRECOVERABLE);
        assert_eq!(library::ringest_leak_stats(&mut leaks), 0);
        assert_eq!((leaks.rings - before.rings, leaks.reads - before.reads), (1, 1));
        assert_eq!(ring::ringest_ring_fd(own), -libc::ENODEV);
        assert_eq!(ring::ringest_ring_destroy(own), 0);
        assert_eq!(buffer::ringest_buffer_release(into), 0);
        assert_eq!(mapped::ringest_mapped_free(memory), 0);
        assert_eq!(tail::ringest_tail_line_free(line), 0);
    }
}

#[test]
fn a_driver_that_panicked_is_abandoned_and_its_consumers_learn() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let (mut queue, mut own, mut handle, mut pops) = (null_mut(), null_mut(), null_mut(), null_mut());
    let (mut before, mut leaks) = (library::ringest_leaks::default(), library::ringest_leaks::default());
    let mut popped = consumer::ringest_popped::default();
    let _alone = ALONE.lock().unwrap();
    // SAFETY: all out pointers are valid.
    unsafe {
        assert_eq!(io_queue::ringest_io_queue_create(null(), &mut queue), 0);
        assert_eq!(consumer::ringest_consumer_create(queue, 0, &mut pops), 0);
        if ring::ringest_ring_create(null(), &mut own) < 0 {
            println!("SKIP a_driver_that_panicked_is_abandoned_and_its_consumers_learn: no io_uring");
            return;
        }
        assert_eq!(driver::ringest_driver_create(own, queue, null(), &mut handle), 0);
        let request = driver::ringest_ingest_request {
            source: driver::ringest_ingest_source::Descriptor as u32,
            fd: reader.as_raw_fd(),
            len: 8,
            ..Default::default()
        };
        assert_eq!(driver::ringest_driver_submit(handle, &request), 0);
        assert_eq!(driver::ringest_driver_poll(handle), 0);
        assert_eq!(library::ringest_leak_stats(&mut before), 0);

        plan_fault(1, PANIC);
        assert_eq!(driver::ringest_driver_wait(handle, 1, 1_000_000), -i64::from(libc::ENOTRECOVERABLE));
        end_fault_plan();
        assert_eq!(driver::ringest_driver_poll(handle), -i64::from(libc::ENOTRECOVERABLE));
        assert_eq!(driver::ringest_driver_in_flight(handle), -i64::from(libc::ENOTRECOVERABLE));
        assert_eq!(ring::ringest_ring_fd(own), -libc::ENOTRECOVERABLE);
        assert_eq!(consumer::ringest_consumer_try_pop(pops, &mut popped), Outcome::Timeout as i32);

        let mut counters = driver::ringest_driver_counters { submitted: 9, ..Default::default() };
        assert_eq!(driver::ringest_driver_close(handle, 0, &mut counters), 0);
        assert_eq!(counters.submitted, 0);
        assert_eq!(driver::ringest_driver_destroy(handle), -libc::EBADF);
        assert_eq!(consumer::ringest_consumer_wait_pop(pops, -1, &mut popped), Outcome::Aborted as i32);
        assert_eq!(consumer::ringest_consumer_error(pops), libc::ENOTRECOVERABLE);
        assert_eq!(library::ringest_leak_stats(&mut leaks), 0);
        assert_eq!((leaks.rings - before.rings, leaks.reads - before.reads), (1, 1));
        assert_eq!(ring::ringest_ring_fd(own), -libc::ENODEV);
        assert_eq!(ring::ringest_ring_destroy(own), 0);
        assert_eq!(consumer::ringest_consumer_destroy(pops), 0);
        assert_eq!(io_queue::ringest_io_queue_destroy(queue), 0);
    }
}
