//! Handles under fire: a ring looked at while its stream or driver closes, a queue given up while consumers come and go,
//! and a fork beside threads that make and end handles.

use ringest::ffi::{buffer, consumer, driver, io_queue, mapped, ring, stream, tail};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Runs `body` while another thread asks for the ring's descriptor, which is there or busy, never gone.
fn while_a_thread_looks_at(own: *const ring::ringest_ring, body: impl FnOnce()) {
    let (over, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    let address = own as usize;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let fd = ring::ringest_ring_fd(address as *const ring::ringest_ring);
                assert!(fd >= 0 || fd == -libc::EBUSY, "{fd}");
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        body();
        over.store(true, Ordering::Relaxed);
    });
    assert!(looks.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_ring_whose_stream_is_closing_is_busy_never_gone() {
    let (mut memory, mut into, mut own) = (null_mut(), null_mut(), null_mut());
    let mut word = 0u64;
    // SAFETY: all out pointers are valid.
    unsafe {
        assert_eq!(mapped::ringest_mapped_alloc(4096, null(), &mut memory), 0);
        assert_eq!(mapped::ringest_mapped_share(memory, &mut into), 0);
        if ring::ringest_ring_create(null(), &mut own) < 0 {
            println!("SKIP a_ring_whose_stream_is_closing_is_busy_never_gone: no io_uring");
            return;
        }
    }
    while_a_thread_looks_at(own, || {
        for _ in 0..2_000 {
            let mut handle = null_mut();
            loop {
                // SAFETY: the out pointers and the word are valid.
                match unsafe { stream::ringest_stream_create_u64(own, into, &mut word, null(), &mut handle) } {
                    0 => break,
                    rc => assert_eq!(rc, -libc::EBUSY),
                }
            }
            while stream::ringest_stream_close(handle, -1) == -libc::EBUSY {}
        }
    });
    while ring::ringest_ring_destroy(own) == -libc::EBUSY {}
    assert_eq!(buffer::ringest_buffer_release(into), 0);
    assert_eq!(mapped::ringest_mapped_free(memory), 0);
}

#[test]
fn a_ring_whose_driver_is_closing_is_busy_never_gone() {
    let (mut queue, mut own) = (null_mut(), null_mut());
    // SAFETY: all out pointers are valid.
    unsafe {
        assert_eq!(io_queue::ringest_io_queue_create(null(), &mut queue), 0);
        if ring::ringest_ring_create(null(), &mut own) < 0 {
            println!("SKIP a_ring_whose_driver_is_closing_is_busy_never_gone: no io_uring");
            return;
        }
    }
    while_a_thread_looks_at(own, || {
        for _ in 0..500 {
            let mut handle = null_mut();
            loop {
                // SAFETY: the out pointer is valid.
                match unsafe { driver::ringest_driver_create(own, queue, null(), &mut handle) } {
                    0 => break,
                    rc => assert_eq!(rc, -libc::EBUSY),
                }
            }
            assert_eq!(io_queue::ringest_io_queue_destroy(queue), -libc::EBUSY);
            while driver::ringest_driver_destroy(handle) == -libc::EBUSY {}
        }
    });
    while ring::ringest_ring_destroy(own) == -libc::EBUSY {}
    assert_eq!(io_queue::ringest_io_queue_destroy(queue), 0);
}

#[test]
fn a_queue_is_never_destroyed_under_a_consumer() {
    for _ in 0..200 {
        let mut queue = null_mut();
        // SAFETY: the out pointer is valid; NULL means defaults.
        assert_eq!(unsafe { io_queue::ringest_io_queue_create(null(), &mut queue) }, 0);
        let address = queue as usize;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                loop {
                    let mut handle = null_mut();
                    let queue = address as *const io_queue::ringest_io_queue;
                    // SAFETY: the out pointer is valid.
                    match unsafe { consumer::ringest_consumer_create(queue, 0, &mut handle) } {
                        0 => {}
                        rc if rc == -libc::EBUSY => continue,
                        rc => return assert_eq!(rc, -libc::EBADF),
                    }
                    let mut popped = consumer::ringest_popped::default();
                    // SAFETY: the place is valid.
                    assert_eq!(unsafe { consumer::ringest_consumer_try_pop(handle, &mut popped) }, TIMEOUT);
                    assert_eq!(consumer::ringest_consumer_destroy(handle), 0);
                }
            });
            loop {
                match io_queue::ringest_io_queue_destroy(queue) {
                    0 => break,
                    rc => assert_eq!(rc, -libc::EBUSY),
                }
            }
        });
    }
}

const TIMEOUT: i32 = ringest::wire::Outcome::Timeout as i32;

#[test]
fn a_child_forked_beside_busy_threads_can_make_handles() {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    make_and_end();
                }
            });
        }
        for round in 0..200 {
            // SAFETY: the child makes handles, whose table has no locks and whose memory comes from glibc's malloc, which
            // may be used after fork, and ends by _exit.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: see above; the alarm ends a child that hangs.
                unsafe { libc::alarm(20) };
                make_and_end();
                // SAFETY: as above.
                unsafe { libc::_exit(0) };
            }
            let mut status = 0;
            // SAFETY: waits for the child just made.
            unsafe { libc::waitpid(child, &mut status, 0) };
            // The others end whatever happens here.
            over.store(status != 0, Ordering::Relaxed);
            assert_eq!(status, 0, "child {round}");
        }
        over.store(true, Ordering::Relaxed);
    });
}

fn make_and_end() {
    let mut line = null_mut();
    // SAFETY: the out pointer is valid.
    assert_eq!(unsafe { tail::ringest_tail_line_alloc(&mut line) }, 0);
    assert_eq!(tail::ringest_tail_line_free(line), 0);
}
