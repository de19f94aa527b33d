//! Who may use a stream: one thread, or one after another; never a forked child.

mod common;

use common::*;
use ringest::{
    AsyncUringStream, Completion, DirectMode, IoUringState, MappedBuffer, PipelineError, RingOptions, TailLine,
    leak_stats,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

fn movable() -> RingOptions {
    RingOptions { movable: true, ..RingOptions::default() }
}

/// Every call that would change something.
fn try_everything(stream: &mut AsyncUringStream<'_>, input: &ringest::InputFile) -> Vec<(&'static str, PipelineError)> {
    let mut memory = MappedBuffer::<u8>::alloc(4096).unwrap();
    let line = |result: ringest::Result<u64>| result.unwrap_err();
    vec![
        ("submit_read_to_gpu", line(stream.submit_read_to_gpu(input, 0, 0, 16))),
        ("submit_read_to_gpu_at", line(stream.submit_read_to_gpu_at(input, 0, 0, 16))),
        ("..._with_user_data", line(stream.submit_read_to_gpu_at_with_user_data(input, 0, 0, 16, 1))),
        ("submit_read_to_gpu_scatter", line(stream.submit_read_to_gpu_scatter(input, 0, &[(0, 8), (8, 8)], 0))),
        ("submit_read_fixed", line(stream.submit_read_fixed(input, 0, 0, 0, 16))),
        ("submit_read_fixed_at", line(stream.submit_read_fixed_at(input, 0, 0, 0, 16, 0))),
        ("submit_read_to_gpu_fixed_file", line(stream.submit_read_to_gpu_fixed_file(0, 0, 0, 16, 0))),
        ("submit_nvme_passthrough", line(stream.submit_nvme_passthrough(input, &[0; 64], 0))),
        ("flush_submissions", stream.flush_submissions().unwrap_err()),
        ("poll", stream.poll().unwrap_err()),
        ("poll_into", stream.poll_into(&mut [Completion::default()]).unwrap_err()),
        ("wait_for_completion", stream.wait_for_completion(1, Some(Duration::ZERO)).unwrap_err()),
        ("resubmit", stream.resubmit(0).unwrap_err()),
        ("skip", stream.skip(0).unwrap_err()),
        ("cancel", stream.cancel(1).unwrap_err()),
        ("cancel_all", stream.cancel_all().unwrap_err()),
        ("replace_buffer", stream.replace_buffer(memory.share()).map(drop).unwrap_err()),
        ("ring_mut", stream.ring_mut().map(drop).unwrap_err()),
        ("finish", stream.finish().unwrap_err()),
    ]
}

/// A stream with one failed submission (0), one in flight (1, on the pipe) and a registered buffer and file.
fn busy_stream<'a>(
    ring: IoUringState,
    memory: &mut MappedBuffer<u8>,
    line: &TailLine,
    pipe: &Pipe,
) -> AsyncUringStream<'a> {
    let mut stream = AsyncUringStream::new(ring, memory.share(), line.clone()).unwrap();
    let handle = memory.share();
    stream.ring_mut().unwrap().register_buffers(&[&handle]).unwrap();
    stream.ring_mut().unwrap().register_files(&[pipe.fd()]).unwrap();
    stream.submit_read_to_gpu(-1, 0, 0, 16).unwrap();
    assert_eq!(take_one(&mut stream).status, -libc::EBADF);
    stream.submit_read_to_gpu(pipe.fd(), 0, 1, 16).unwrap();
    stream.flush_submissions().unwrap();
    stream
}

/// What must be as before: stream, tail line.
fn look(stream: &AsyncUringStream<'_>, line: &TailLine) -> String {
    format!("{stream:?} {:?} {} {:?}", stream.stats(), stream.submitted(), line.words())
}

#[test]
fn another_thread_is_refused_and_nothing_changes() {
    let (pipe, file) = (Pipe::new(), TempFile::new(64));
    let input = file.open(DirectMode::Off);
    let mut memory = filled(4096, 0);
    let line = TailLine::alloc().unwrap();
    let mut stream = busy_stream(ring!(), &mut memory, &line, &pipe);
    let before = look(&stream, &line);
    let errors = elsewhere(|| try_everything(&mut stream, &input));
    for (call, error) in errors {
        assert_eq!((error.errno(), &error), (libc::EPERM, &PipelineError::WrongThread), "{call}");
    }
    assert_eq!(look(&stream, &line), before);
    assert_eq!((stream.inflight(), stream.ring().buffer_count(), stream.ring().file_count()), (1, 1, 1));
    // Here everything goes on.
    pipe.feed(3, 16);
    assert_eq!(take_one(&mut stream).status, 0);
    stream.skip(0).unwrap();
    assert_eq!(stream.tail(), 2);
    check(&bytes(&stream)[16..32], 3);
}

#[test]
fn a_ring_of_another_thread_is_refused() {
    let mut ring = ring!();
    let mut memory = filled(4096, 0);
    let handle = memory.share();
    let errors = elsewhere(|| {
        [
            errno(ring.register_buffers(&[&handle])),
            errno(ring.register_buffers_sparse(1)),
            errno(ring.update_buffer(0, None)),
            errno(ring.unregister_buffers()),
            errno(ring.share_buffers()),
            errno(ring.register_files(&[0])),
            errno(ring.register_files_sparse(1)),
            errno(ring.update_file(0, None)),
            errno(ring.unregister_files()),
        ]
    });
    assert_eq!(errors, [libc::EPERM; 9]);
    let tail = AtomicU64::new(5);
    let refused = elsewhere(|| AsyncUringStream::new(ring, handle, &tail).map(drop));
    assert_eq!(refused.unwrap_err(), PipelineError::WrongThread);
    assert_eq!(tail.load(Ordering::Relaxed), 5);
}

#[test]
fn a_forked_child_is_refused_and_the_parents_reads_complete() {
    in_child("a_forked_child_is_refused_and_the_parents_reads_complete", || {
        for options in [RingOptions::default(), movable()] {
            let (pipe, other_pipe, file) = (Pipe::new(), Pipe::new(), TempFile::new(64));
            let input = file.open(DirectMode::Off);
            let mut memory = filled(4096, 0);
            let line = TailLine::alloc().unwrap();
            let mut stream = busy_stream(ring!(options), &mut memory, &line, &pipe);
            let other = ring!(options);
            let mut moved = match options.movable {
                true => Some(busy_stream(other, &mut memory, &line, &other_pipe).into_movable().unwrap()),
                false => None,
            };
            // SAFETY: this process has no other thread that holds a lock the child needs: the harness waits for us.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // No unwinding, no destructors of the parent's things: exit tells what went wrong.
                let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let all = try_everything(&mut stream, &input).iter().all(|(_, error)| error.errno() == libc::EPERM);
                    all && moved.as_mut().is_none_or(|moved| moved.get().poll() == Err(PipelineError::WrongThread))
                }));
                let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let leaked = leak_stats();
                    drop(stream);
                    drop(moved);
                    leak_stats() == leaked
                }));
                // A ring of the child's own works.
                let own =
                    std::panic::catch_unwind(|| drop(exercise(IoUringState::new(RingOptions::default()).unwrap())));
                let code = i32::from(refused.is_err() || !refused.unwrap()) + 2 * i32::from(!dropped.unwrap_or(false));
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(code + 4 * i32::from(own.is_err())) };
            }
            let mut status = 0;
            // SAFETY: waits for our child.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert!(libc::WIFEXITED(status), "{status:#x}");
            assert_eq!(libc::WEXITSTATUS(status), 0, "1: not refused, 2: bad drop, 4: its own ring failed");
            pipe.feed(9, 16);
            assert_eq!(take_one(&mut stream).status, 0);
            check(&bytes(&stream)[16..32], 9);
            drop(moved);
        }
    });
}

/// The data pages are not in the child: a copy-on-write under DMA would tear the parent's.
#[test]
fn mapped_memory_is_absent_from_a_forked_child() {
    in_child("mapped_memory_is_absent_from_a_forked_child", || {
        let memory = filled(8192, 7);
        // SAFETY: the child only asks about an address and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut present = [0u8; 2];
            // SAFETY: as above; mincore of an unmapped range is ENOMEM.
            unsafe {
                let rc = libc::mincore(memory.as_host_ptr().cast_mut().cast(), 8192, present.as_mut_ptr());
                libc::_exit(i32::from(
                    rc != -1 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ENOMEM),
                ));
            }
        }
        let mut status = 0;
        // SAFETY: waits for our child.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        assert_eq!(memory.as_slice().unwrap()[8191], 7);
    });
}

/// The ring of a thread that is gone never completes again: what was in flight is leaked, counted, and not reused.
#[test]
fn reads_whose_thread_is_gone_are_leaked_and_counted() {
    in_leaking_child("reads_whose_thread_is_gone_are_leaked_and_counted", || {
        let pipe = Pipe::new();
        struct Force<T>(T);
        // SAFETY: the creating thread ends before the value is used again.
        unsafe impl<T> Send for Force<T> {}
        let mut memory = filled(4096, 0);
        let base = memory.as_host_ptr() as usize;
        drop(ring!());
        let (fd, handle) = (pipe.fd(), memory.share());
        let stream = std::thread::spawn(move || {
            let ring = IoUringState::new(RingOptions::default()).unwrap();
            let mut stream = AsyncUringStream::new(ring, handle, TailLine::alloc().unwrap()).unwrap();
            stream.submit_read_to_gpu(fd, 0, 0, 1000).unwrap();
            stream.submit_read_to_gpu(fd, 0, 1, 1000).unwrap();
            stream.flush_submissions().unwrap();
            Force(stream)
        });
        let Force(mut stream) = stream.join().unwrap();
        assert_eq!(stream.poll(), Err(PipelineError::WrongThread));
        assert_eq!(leak_stats().rings, 0);
        drop(stream);
        let leaked = leak_stats();
        assert_eq!((leaked.rings, leaked.reads, leaked.bytes), (1, 2, 2000));
        // The memory is still mapped and still not ours.
        assert_eq!(errno(memory.as_slice().map(drop)), libc::EBUSY);
        drop(memory);
        let mut present = 0u8;
        // SAFETY: asks whether the page is mapped.
        assert_eq!(unsafe { libc::mincore(base as *mut libc::c_void, 4096, &mut present) }, 0, "unmapped under a read");
    });
}

/// Without reads in flight there is nothing to leak, whichever thread drops it.
#[test]
fn an_idle_stream_is_dropped_anywhere() {
    in_child("an_idle_stream_is_dropped_anywhere", || {
        let file = TempFile::new(4096);
        let mut memory = filled(4096, 0);
        let tail = AtomicU64::new(0);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        stream.submit_read_to_gpu(&file.open(DirectMode::Off), 0, 0, 4096).unwrap();
        take_one(&mut stream);
        elsewhere(|| drop(stream));
        assert_eq!(leak_stats().rings, 0);
        check(memory.as_slice().unwrap(), 0);
        // Closing it elsewhere says EPERM, and drops it as well.
        let stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        assert_eq!(elsewhere(|| stream.close(LONG).map(drop)), Err(PipelineError::WrongThread));
        assert_eq!(leak_stats().rings, 0);
    });
}

#[test]
fn only_a_movable_ring_makes_a_movable_stream() {
    let mut memory = filled(4096, 0);
    let tail = AtomicU64::new(0);
    let bound = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    let error = bound.into_movable().unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.to_string().contains("RingOptions::movable"), "{error}");
}

#[test]
fn a_movable_stream_moves_with_reads_in_flight() {
    let sqpoll = Some(ringest::SqPoll { idle_ms: 5, cpu: None });
    for options in [movable(), RingOptions { sqpoll, ..movable() }] {
        let (pipe, file) = (Pipe::new(), TempFile::new(65_536));
        let input = file.open(DirectMode::Auto);
        let mut memory = filled(65_536 * 2, 0);
        let tail = AtomicU64::new(0);
        let mut stream = AsyncUringStream::new(ring!(options), memory.share(), &tail).unwrap();
        stream.submit_read_to_gpu(pipe.fd(), 0, 0, 100).unwrap();
        stream.flush_submissions().unwrap();
        let mut stream = stream.into_movable().unwrap();
        for round in 1..=10 {
            // Submitted on one thread, completed on another.
            std::thread::scope(|scope| {
                scope
                    .spawn(|| stream.get().submit_read_to_gpu_at(&input, round, 65_536, 60_000).unwrap())
                    .join()
                    .unwrap()
            });
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let completion = take_one(stream.get());
                    assert_eq!((completion.sequence, completion.status), (round, 0));
                    check(&bytes(stream.get())[65_536..125_536], round);
                });
            });
        }
        assert_eq!(tail.load(Ordering::Acquire), 0);
        pipe.feed(1, 100);
        let mut stream = stream.into_inner();
        assert_eq!(take_one(&mut stream).status, 0);
        assert_eq!(tail.load(Ordering::Acquire), 11);
        // Plain again, it is bound to this thread.
        assert_eq!(elsewhere(|| stream.poll()), Err(PipelineError::WrongThread));
    }
}

/// The kernel cancels what a thread has in flight when that thread ends: a failure like any other, never a lost read.
#[test]
fn reads_of_a_movable_stream_survive_or_fail_with_their_thread() {
    let pipe = Pipe::new();
    let mut memory = filled(4096, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring!(movable()), memory.share(), &tail).unwrap().into_movable().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stream.get().submit_read_to_gpu(pipe.fd(), 0, 0, 100).unwrap();
            stream.get().flush_submissions().unwrap();
        });
    });
    pipe.feed(0, 100);
    let mut stream = stream.into_inner();
    let completion = take_one(&mut stream);
    if completion.status != 0 {
        assert_eq!(completion.status, -libc::ECANCELED);
        stream.resubmit(0).unwrap();
        assert_eq!(take_one(&mut stream).status, 0);
    }
    check(&bytes(&stream)[..100], 0);
    assert_eq!(tail.load(Ordering::Acquire), 1);
}

#[test]
fn a_movable_stream_is_dropped_on_another_thread_with_reads_in_flight() {
    let pipe = Pipe::new();
    let mut memory = filled(4096, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring!(movable()), memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu(pipe.fd(), 0, 0, 100).unwrap();
    stream.flush_submissions().unwrap();
    let stream = stream.into_movable().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(stream));
    });
    assert!(memory.as_slice().is_ok(), "the read was not given back");
}

#[test]
fn eight_threads_with_a_stream_each() {
    drop(ring!());
    let file = TempFile::new(1 << 20);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let file = &file;
            scope.spawn(move || {
                let input = file.open(if thread % 2 == 0 { DirectMode::Off } else { DirectMode::Auto });
                let ring = IoUringState::new(RingOptions { entries: 16, ..RingOptions::default() }).unwrap();
                let mut memory = filled(16 * 10_000, 0);
                let tail = AtomicU64::new(0);
                let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
                for round in 0..50u64 {
                    let at = |chunk: u64| (thread * 100_003 + round * 1009 + chunk * 13) % 900_000;
                    for chunk in 0..16 {
                        stream.submit_read_to_gpu(&input, at(chunk), chunk as usize, 10_000).unwrap();
                    }
                    assert!(take(&mut stream, 16).iter().all(|completion| completion.status == 0));
                    let got = bytes(&stream);
                    for chunk in 0..16 {
                        check(&got[chunk as usize * 10_000..][..10_000], at(chunk));
                    }
                }
                assert_eq!(tail.load(Ordering::Acquire), 800);
            });
        }
    });
}

/// One thread drives, many consumers follow the same tail.
#[test]
fn consumers_on_many_threads_follow_one_tail() {
    let (ring, file) = (ring!(), TempFile::new(200 * 4096));
    let input = file.open(DirectMode::Auto);
    let line = TailLine::alloc().unwrap();
    let mut memory = filled(200 * 4096, 0);
    let base = memory.as_host_ptr() as usize;
    let stop = AtomicBool::new(false);
    let (ready, started) = mpsc::channel();
    std::thread::scope(|scope| {
        let mut stream = AsyncUringStream::new(ring, memory.share(), line.clone()).unwrap();
        for _ in 0..4 {
            let (line, ready, stop) = (line.clone(), ready.clone(), &stop);
            scope.spawn(move || {
                ready.send(()).unwrap();
                let mut seen = 0;
                while seen < 200 && !stop.load(Ordering::Relaxed) {
                    if line.words().tail.load(Ordering::Acquire) > seen {
                        // SAFETY: the tail covers the chunk: nothing writes to it any more.
                        let chunk =
                            unsafe { std::slice::from_raw_parts((base as *const u8).add(seen as usize * 4096), 4096) };
                        check(chunk, seen * 4096);
                        seen += 1;
                    } else {
                        std::thread::yield_now();
                    }
                }
            });
        }
        (0..4).for_each(|_| started.recv().unwrap());
        for chunk in 0..200 {
            while stream.inflight() == stream.depth() {
                stream.wait_for_completion(1, Some(LONG)).unwrap();
                stream.poll().unwrap();
            }
            stream.submit_read_to_gpu(&input, chunk as u64 * 4096, chunk, 4096).unwrap();
            stream.poll().unwrap();
        }
        eventually("the tail", || {
            stream.poll().unwrap();
            stream.tail() == 200
        });
        drop(stream);
    });
    stop.store(true, Ordering::Relaxed);
}

/// Whoever waits for a stream that had to be leaked is told.
#[test]
fn consumers_of_a_leaked_stream_are_told() {
    let pipe = Pipe::new();
    let line = TailLine::alloc().unwrap();
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), line.clone()).unwrap();
    stream.submit_read_to_gpu_at(pipe.fd(), 0, 0, 8).unwrap();
    stream.flush_submissions().unwrap();
    elsewhere(move || drop(stream));
    assert_eq!(line.words().state.load(Ordering::Acquire), ringest::wire::state::ABORTED);
    std::mem::forget(memory);
}
