//! A panic inside a call of the C ABI stays inside, and what it left is given up without freeing memory under a read.

#![cfg(feature = "testing")]

use ringest::ffi::{buffer, library, mapped, ring, stream, tail};
use ringest::testing::{PANIC, end_fault_plan, plan_fault};
use std::ffi::CStr;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut};

#[test]
fn a_panic_becomes_enotrecoverable_and_the_stream_is_abandoned() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let (mut memory, mut into, mut own, mut line, mut handle) =
        (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
    let mut words = null();
    let mut leaks = library::ringest_leaks::default();
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

        plan_fault(1, PANIC);
        assert_eq!(stream::ringest_stream_wait(handle, 1, 1_000_000), -i64::from(libc::ENOTRECOVERABLE));
        end_fault_plan();
        let message = CStr::from_ptr(library::ringest_last_error()).to_str().unwrap();
        assert!(message.contains("panicked"), "{message}");
        assert_eq!(stream::ringest_stream_poll(handle), -i64::from(libc::ENOTRECOVERABLE));
        assert_eq!((*words).state, tail::ringest_state::Open as u32);

        assert_eq!(stream::ringest_stream_destroy(handle), 0);
        assert_eq!((*words).state, tail::ringest_state::Aborted as u32);
        assert_eq!((*words).error, -libc::ENOTRECOVERABLE);
        assert_eq!(library::ringest_leak_stats(&mut leaks), 0);
        assert_eq!((leaks.rings, leaks.reads), (1, 1));
        assert_eq!(ring::ringest_ring_fd(own), -libc::ENODEV);
        assert_eq!(ring::ringest_ring_destroy(own), 0);
        assert_eq!(buffer::ringest_buffer_release(into), 0);
        assert_eq!(mapped::ringest_mapped_free(memory), 0);
        assert_eq!(tail::ringest_tail_line_free(line), 0);
    }
}
