//! Closing a stream while system calls fail.

#![cfg(feature = "testing")]

use ringest::testing::{end_fault_plan, plan_fault};
use ringest::{AsyncUringStream, IoUringState, MappedBuffer, RingOptions, StreamOptions, leak_stats};
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

const ERRNOS: [i32; 6] = [libc::EIO, libc::ENOMEM, libc::EINVAL, libc::EPERM, libc::EAGAIN, libc::EINTR];

/// Reads that only end by cancellation are given back whichever system call fails while they are.
#[test]
fn a_close_survives_any_failure_of_its_calls() {
    let before = leak_stats();
    for errno in ERRNOS {
        for k in 1..=12 {
            let (reader, _writer) = std::io::pipe().unwrap();
            let mut memory = MappedBuffer::<u8>::alloc(4096).unwrap();
            let tail = AtomicU64::new(0);
            let ring = match IoUringState::new(RingOptions { entries: 1, cq_entries: 8, ..RingOptions::default() }) {
                Ok(ring) => ring,
                Err(error) => return eprintln!("SKIP a_close_survives_any_failure_of_its_calls: {error}"),
            };
            let options = StreamOptions { depth: 4, ..StreamOptions::default() };
            let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, options).unwrap();
            for i in 0..4 {
                stream.submit_read_to_gpu_at(reader.as_raw_fd(), 0, i * 8, 8).unwrap();
            }
            stream.flush_submissions().unwrap();
            plan_fault(k, errno);
            let closed = stream.close(Duration::from_secs(20));
            let calls = end_fault_plan();
            assert!(closed.is_ok(), "call {k} of {calls:?} failing with {errno}: {closed:?}");
        }
    }
    assert_eq!(leak_stats(), before);
}
