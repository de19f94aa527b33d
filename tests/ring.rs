//! Rings: options, what the kernel grants, and what is registered.

mod common;

use common::*;
use ringest::{
    AsyncUringStream, DirectMode, GpuMappedBuffer, IoUringState, MappedBuffer, ReadPath, RingOptions, SqPoll,
    StreamOptions,
};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

fn options(entries: u32) -> RingOptions {
    RingOptions { entries, ..RingOptions::default() }
}

#[test]
fn options_out_of_range_are_refused_with_what_would_do() {
    let bad = [
        (options(0), "32768"),
        (options(32_769), "32768"),
        (options(u32::MAX), "32768"),
        (RingOptions { cq_entries: 63, ..options(64) }, "64"),
        (RingOptions { cq_entries: 65_537, ..options(64) }, "65536"),
        (RingOptions { buffer_slots: 0, ..options(64) }, "16384"),
        (RingOptions { buffer_slots: 16_385, ..options(64) }, "16384"),
    ];
    for (options, fix) in bad {
        let error = IoUringState::new(options).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{options:?}");
        assert!(error.to_string().contains(fix), "{error}");
    }
    let offline = SqPoll { idle_ms: 1, cpu: Some(100_000) };
    let error = IoUringState::new(RingOptions { sqpoll: Some(offline), ..options(4) }).unwrap_err();
    assert!([libc::EINVAL, libc::EPERM, libc::ENOSYS].contains(&error.errno()), "{error}");
}

#[test]
fn features_are_those_of_this_kernel() {
    let ring = ring!();
    let (features, kernel) = (ring.features(), kernel());
    assert_eq!((features.sq_entries, features.cq_entries), (64, 128));
    assert_eq!((features.single_issuer, features.defer_taskrun), (kernel >= (6, 0), kernel >= (6, 1)), "{features}");
    assert_eq!((features.submit_all, features.registered_ring), (kernel >= (5, 18), kernel >= (5, 18)), "{features}");
    assert_eq!(features.taskrun_flag, kernel >= (5, 19), "{features}");
    assert_eq!(features.sparse_buffers, kernel >= (5, 19), "{features}");
    assert_eq!(features.readv_fixed, kernel >= (6, 15), "{features}");
    assert_eq!(features.fell_back, kernel < (6, 1), "{features}");
    assert!(!features.sqpoll && !features.iopoll && !features.big_entries && !features.coop_taskrun, "{features}");
    let text = features.to_string();
    assert!(text.starts_with("sq=64 cq=128"), "{text}");
    for (name, got) in features.names() {
        assert_eq!(text.split(' ').any(|word| word == name), got, "{name} in {text}");
    }
    assert!(format!("{ring:?}").contains("features"));
    assert!(ring.fd() >= 0 && !ring.is_movable());
}

#[test]
fn sizes_are_rounded_up_to_powers_of_two() {
    for (entries, cq_entries, got) in [(1, 0, (1, 2)), (5, 0, (8, 16)), (5, 9, (8, 16)), (64, 4096, (64, 4096))] {
        let ring = ring!(RingOptions { cq_entries, ..options(entries) });
        assert_eq!((ring.features().sq_entries, ring.features().cq_entries), got);
    }
}

#[test]
fn reads_work_with_every_combination_of_options() {
    for sqpoll in [None, Some(SqPoll { idle_ms: 1000, cpu: None }), Some(SqPoll { idle_ms: 0, cpu: Some(0) })] {
        for movable in [false, true] {
            for big_entries in [false, true] {
                let ring = ring!(RingOptions { sqpoll, movable, big_entries, ..options(8) });
                let features = ring.features();
                assert_eq!((features.sqpoll, features.big_entries), (sqpoll.is_some(), big_entries));
                assert!(!(movable || sqpoll.is_some()) || !features.defer_taskrun, "{features}");
                assert!(!movable || !features.single_issuer && !features.registered_ring, "{features}");
                assert_eq!(ring.is_movable(), movable);
                drop(exercise(ring));
            }
        }
    }
}

#[test]
fn reads_work_with_the_smallest_rings() {
    for (entries, cq_entries) in [(1, 1), (1, 2), (2, 2), (2, 4)] {
        drop(exercise_deep(ring!(RingOptions { cq_entries, ..options(entries) })));
    }
}

/// More in flight than either queue holds.
fn exercise_deep(ring: IoUringState) -> IoUringState {
    let file = TempFile::new(64 * 1000);
    let mut memory = filled(64 * 1000, 0);
    let tail = AtomicU64::new(0);
    let options = StreamOptions { depth: 64, ..StreamOptions::default() };
    let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, options).unwrap();
    let input = file.open(DirectMode::Off);
    for chunk in 0..64 {
        stream.submit_read_to_gpu(&input, chunk as u64 * 1000, chunk, 1000).unwrap();
    }
    assert!(take(&mut stream, 64).iter().all(|completion| completion.status == 0));
    check(&bytes(&stream), 0);
    stream.close(LONG).unwrap().ring
}

#[test]
fn a_ring_serves_one_stream_after_another() {
    let mut ring = ring!(RingOptions { buffer_slots: 3, ..options(8) });
    for _ in 0..10 {
        ring = exercise(ring);
        assert_eq!(ring.buffer_count(), 0);
    }
    // Nothing of the earlier streams is left in the ring's buffer table.
    let mut memory = [filled(4096, 0), filled(4096, 0), filled(4096, 0)];
    let handles: Vec<_> = memory.iter_mut().map(MappedBuffer::share).collect();
    ring.register_buffers(&handles.iter().collect::<Vec<_>>()).unwrap();
}

/// A poller that went to sleep must be woken, or the read is never seen ("SQPOLL sleeps for ever").
#[test]
fn a_sleeping_sqpoll_thread_is_woken() {
    let ring = ring!(RingOptions { sqpoll: Some(SqPoll { idle_ms: 1, cpu: None }), ..options(8) });
    let file = TempFile::new(65_536);
    let mut memory = filled(65_536, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    let input = file.open(DirectMode::Off);
    for round in 0..8 {
        std::thread::sleep(Duration::from_millis(30)); // not synchronisation: gives the poller time to fall asleep
        stream.submit_read_to_gpu(&input, round * 8192, round as usize, 8192).unwrap();
        if round % 2 == 0 {
            assert_eq!(take_one(&mut stream).status, 0);
        } else {
            // By polling alone, as a caller with other work would.
            stream.flush_submissions().unwrap();
            eventually("the completion", || stream.poll().unwrap() == 1);
        }
    }
    assert_eq!(tail.load(Ordering::Acquire), 8);
    check(&bytes(&stream), 0);
}

/// Cancel commands of a poller ring may still be under way when the reads are back.
#[test]
fn closing_a_sqpoll_stream_at_once_gives_the_ring_back() {
    let mut ring = ring!(RingOptions { sqpoll: Some(SqPoll { idle_ms: 1000, cpu: None }), ..options(16) });
    let file = TempFile::new(65_536);
    let input = file.open(DirectMode::Off);
    for _ in 0..200 {
        let mut memory = filled(65_536, 0);
        let tail = AtomicU64::new(0);
        let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
        for chunk in 0..8 {
            stream.submit_read_to_gpu(&input, 0, chunk, 4096).unwrap();
        }
        stream.flush_submissions().unwrap();
        ring = stream.close(LONG).unwrap().ring;
    }
}

#[test]
fn iopoll_reads_or_fails_cleanly() {
    let ring = ring!(RingOptions { iopoll: true, ..options(8) });
    assert!(ring.features().iopoll);
    let file = TempFile::new(65_536);
    let input = direct!(file);
    let mut memory = filled(65_536, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu(&input, 0, 0, 65_536).unwrap();
    let completion = take_one(&mut stream);
    if completion.status == 0 {
        check(&bytes(&stream), 0);
    } else {
        assert_eq!(completion.status, -libc::EOPNOTSUPP);
        assert!(completion.result().unwrap_err().to_string().contains("IOPOLL"));
    }
    // Through the page cache nothing can be polled for.
    stream.submit_read_to_gpu(&file.open(DirectMode::Off), 0, 0, 4096).unwrap();
    assert!([-libc::EOPNOTSUPP, -libc::EINVAL].contains(&take_one(&mut stream).status));
    stream.close(LONG).unwrap();
}

#[test]
fn reads_work_at_every_rung_of_the_fallback_ladder() {
    #[cfg(not(feature = "testing"))]
    skip!("built without the feature testing");
    #[cfg(feature = "testing")]
    {
        const SUBMIT_ALL: u32 = 1 << 7;
        const COOP: u32 = 1 << 8;
        const TASKRUN_FLAG: u32 = 1 << 9;
        const SINGLE_ISSUER: u32 = 1 << 12;
        const DEFER: u32 = 1 << 13;
        drop(ring!());
        let all = SUBMIT_ALL | COOP | TASKRUN_FLAG | SINGLE_ISSUER | DEFER;
        for (refused, single, coop, submit_all) in [
            (DEFER, true, true, true),
            (SINGLE_ISSUER, false, true, true),
            (SINGLE_ISSUER | COOP, false, false, true),
            (all, false, false, false),
        ] {
            ringest::testing::refuse_setup_flags(refused);
            for movable in [false, true] {
                let ring = IoUringState::new(RingOptions { movable, ..options(8) }).unwrap();
                let features = ring.features();
                assert!(!features.defer_taskrun, "{features}");
                assert_eq!(features.single_issuer, single && !movable, "{features}");
                assert_eq!((features.coop_taskrun, features.submit_all), (coop && !movable, submit_all), "{features}");
                assert!(movable || features.fell_back, "{features}");
                drop(exercise(ring));
            }
            let sqpoll = Some(SqPoll { idle_ms: 10, cpu: None });
            let ring = IoUringState::new(RingOptions { sqpoll, ..options(8) }).unwrap();
            assert!(ring.features().sqpoll);
            drop(exercise(ring));
        }
        // What was asked for explicitly is never left out.
        ringest::testing::refuse_setup_flags(1 << 1);
        let error = IoUringState::new(RingOptions { sqpoll: Some(SqPoll { idle_ms: 1, cpu: None }), ..options(8) });
        assert_eq!(error.unwrap_err().errno(), libc::EINVAL);
        ringest::testing::refuse_setup_flags(0);
    }
}

// Buffers

#[test]
fn registered_buffers_are_read_through_by_index() {
    let mut ring = ring!();
    let file = TempFile::new(65_536);
    let input = file.open(DirectMode::Off);
    let mut memory = [filled(16_384, 0), filled(8192, 0)];
    let handles = [memory[0].share(), memory[1].share()];
    ring.register_buffers(&[&handles[0], &handles[1]]).unwrap();
    assert_eq!(ring.buffer_count(), 2);
    assert_eq!(errno(ring.register_buffers(&[&handles[0]])), libc::EBUSY);
    assert_eq!(errno(ring.register_buffers_sparse(2)), libc::EBUSY);
    let tail = AtomicU64::new(0);
    let mut own = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring, own.share(), &tail).unwrap();
    stream.submit_read_fixed(&input, 100, 0, 1, 8192).unwrap();
    stream.submit_read_fixed_at(&input, 7, 1, 1000, 7192, 77).unwrap();
    let done = take(&mut stream, 2);
    for completion in &done {
        assert_eq!((completion.status, completion.path), (0, ReadPath::RegisteredRead));
    }
    assert_eq!((done[0].user_data, done[1].user_data), (0, 77));
    assert_eq!((done[0].buffer_offset, done[1].buffer_offset), (8192, 1000));
    // Ranges are checked against the registered buffer, not the stream's own.
    assert_eq!(errno(stream.submit_read_fixed(&input, 0, 0, 2, 8192)), libc::ERANGE);
    assert_eq!(errno(stream.submit_read_fixed(&input, 0, 0, usize::MAX, 8192)), libc::ERANGE);
    assert_eq!(errno(stream.submit_read_fixed_at(&input, 0, 1, 8192, 1, 0)), libc::ERANGE);
    assert_eq!(errno(stream.submit_read_fixed_at(&input, 0, 1, usize::MAX, 1, 0)), libc::ERANGE);
    for index in [2, 64, u32::MAX] {
        assert_eq!(errno(stream.submit_read_fixed(&input, 0, index, 0, 16)), libc::ERANGE);
    }
    assert_eq!((stream.submitted(), stream.inflight()), (2, 0));
    let mut ring = stream.close(LONG).unwrap().ring;
    ring.unregister_buffers().unwrap();
    assert_eq!(errno(ring.unregister_buffers()), libc::EINVAL);
    drop(handles);
    check(&memory[0].as_slice().unwrap()[8192..], 100);
    check(&memory[1].as_slice().unwrap()[1000..], 7);
    assert!(memory[0].as_slice().unwrap()[..8192].iter().all(|&byte| byte == 0));
    assert!(memory[1].as_slice().unwrap()[..1000].iter().all(|&byte| byte == 0));
}

/// "READ_FIXED sent with another opcode, so nothing was ever fixed; buffers never registered": pages that are pinned are
/// written although their mapping forbids it by now; a read by address fails there.
#[test]
fn registered_reads_really_use_the_registration() {
    const LEN: usize = 65_536;
    let file = TempFile::new(LEN);
    let mut inputs = vec![file.open(DirectMode::Off)];
    inputs.extend(ringest::InputFile::open(file.path(), DirectMode::On));
    for input in &inputs {
        for unregistered in [false, true] {
            let map = Map::new(LEN, libc::PROT_READ | libc::PROT_WRITE);
            // SAFETY: the mapping outlives the stream, and nothing else touches it while reads are in flight.
            let buffer = unsafe { GpuMappedBuffer::from_host_visible_owner(map.base, LEN, None, ()) }.unwrap();
            let tail = AtomicU64::new(0);
            let options = StreamOptions { unregistered, ..StreamOptions::default() };
            let mut stream = AsyncUringStream::with_options(ring!(), buffer, &tail, options).unwrap();
            map.protect(0, LEN, libc::PROT_NONE);
            stream.submit_read_to_gpu_at(input, 0, 0, 32_768).unwrap();
            stream.submit_read_to_gpu_scatter(input, 32_768, &[(40_960, 4096), (32_768, 8192)], 0).unwrap();
            let features = stream.ring().features();
            for completion in take(&mut stream, 2) {
                let fixed = !unregistered && (completion.sequence == 0 || features.readv_fixed);
                assert_eq!(completion.status, if fixed { 0 } else { -libc::EFAULT }, "{completion:?}");
            }
            map.protect(0, LEN, libc::PROT_READ);
            if !unregistered && features.readv_fixed {
                let got = bytes(&stream);
                check(&got[..32_768], 0);
                check(&got[40_960..45_056], 32_768);
                check(&got[32_768..40_960], 36_864);
            }
            drop(stream);
        }
    }
}

#[test]
fn sparse_tables_are_filled_emptied_and_bounds_checked() {
    let mut ring = ring!(RingOptions { buffer_slots: 3, ..options(8) });
    if !ring.features().sparse_buffers {
        skip!("buffer tables of this kernel cannot be sparse (Linux 5.19)");
    }
    let mut memory = filled(4096, 0);
    let handle = memory.share();
    assert_eq!(errno(ring.register_buffers(&[])), libc::EINVAL);
    assert_eq!(errno(ring.register_buffers_sparse(0)), libc::EINVAL);
    assert_eq!(errno(ring.update_buffer(0, Some(&handle))), libc::ERANGE);
    assert_eq!(errno(ring.share_buffers()), libc::EINVAL);
    ring.register_buffers_sparse(8).unwrap();
    assert_eq!(ring.buffer_count(), 8);
    assert_eq!(errno(ring.update_buffer(8, Some(&handle))), libc::ERANGE);
    assert_eq!(errno(ring.update_buffer(u32::MAX, None)), libc::ERANGE);
    let empty = memory.share().sub_region(5, 0).unwrap();
    assert_eq!(errno(ring.update_buffer(0, Some(&empty))), libc::EINVAL);
    // Three entries of the kernel's table: the fourth buffer does not fit, and an emptied one makes room.
    for index in [7, 0, 3] {
        ring.update_buffer(index, Some(&handle)).unwrap();
    }
    let full = ring.update_buffer(1, Some(&handle)).unwrap_err();
    assert_eq!(full.errno(), libc::EAGAIN);
    assert!(full.to_string().contains("buffer_slots"), "{full}");
    ring.update_buffer(7, None).unwrap();
    ring.update_buffer(7, None).unwrap();
    ring.update_buffer(1, Some(&handle)).unwrap();
    let tail = AtomicU64::new(0);
    // The stream's buffer is the registered one: no further entry is needed.
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    assert!(stream.is_registered());
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    assert_eq!(errno(stream.submit_read_fixed(&input, 0, 7, 0, 4096)), libc::EINVAL);
    stream.submit_read_fixed(&input, 0, 1, 0, 4096).unwrap();
    assert_eq!(take_one(&mut stream).path, ReadPath::RegisteredRead);
    check(&bytes(&stream), 0);
    // Unregistered, the stream's own target works on, still registered, until the stream lets go of it.
    stream.ring_mut().unwrap().unregister_buffers().unwrap();
    assert_eq!(errno(stream.submit_read_fixed(&input, 0, 1, 0, 4096)), libc::ERANGE);
    stream.submit_read_to_gpu(&input, 0, 0, 4096).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
}

#[test]
fn an_updated_buffer_entry_keeps_its_old_memory_for_reads_in_flight() {
    let mut ring = ring!();
    if !ring.features().sparse_buffers {
        skip!("buffer tables of this kernel cannot be updated (Linux 5.19)");
    }
    let (mut old, mut new, mut own) = (filled(4096, 1), filled(4096, 2), filled(4096, 3));
    let (old_handle, new_handle) = (old.share(), new.share());
    ring.register_buffers(&[&old_handle]).unwrap();
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, own.share(), &tail).unwrap();
    let pipe = Pipe::new();
    stream.submit_read_fixed_at(pipe.fd(), 0, 0, 0, 4096, 0).unwrap();
    stream.flush_submissions().unwrap();
    // Half now: the second command of the read is issued after the update.
    pipe.feed(0, 2000);
    stream.poll().unwrap();
    stream.ring_mut().unwrap().update_buffer(0, Some(&new_handle)).unwrap();
    drop(old_handle);
    assert_eq!(errno(old.as_slice().map(drop)), libc::EBUSY);
    pipe.feed(2000, 2096);
    let completion = take_one(&mut stream);
    assert_eq!((completion.status, completion.path), (0, ReadPath::RegisteredRead));
    // The entry's last read has ended, so nothing holds the old memory any more.
    check(old.as_slice().unwrap(), 0);
    stream.submit_read_fixed_at(pipe.fd(), 0, 0, 0, 4096, 0).unwrap();
    pipe.feed(50, 4096);
    assert_eq!(take_one(&mut stream).path, ReadPath::RegisteredRead);
    // SAFETY: nothing is in flight.
    check(unsafe { new_handle.as_slice() }.unwrap(), 50);
    drop(stream);
    assert!(own.as_slice().unwrap().iter().all(|&byte| byte == 3));
}

#[test]
fn a_failed_registration_leaves_nothing_behind() {
    let mut ring = ring!(RingOptions { buffer_slots: 4, ..options(8) });
    let read_only = Map::new(8192, libc::PROT_READ);
    let base = read_only.base;
    // SAFETY: the kernel refuses to write there, which is the point; nobody else does.
    let bad = unsafe { GpuMappedBuffer::from_host_visible_owner(base, 8192, None, read_only) }.unwrap();
    let mut memory = [filled(4096, 0), filled(4096, 0), filled(4096, 0), filled(4096, 0)];
    let good: Vec<_> = memory.iter_mut().map(MappedBuffer::share).collect();
    let error = ring.register_buffers(&[&good[0], &good[1], &bad]).unwrap_err();
    assert_eq!(error.errno(), libc::EFAULT);
    assert!(error.to_string().contains("io_uring_register"), "{error}");
    assert_eq!(ring.buffer_count(), 0);
    bad.release().unwrap();
    // All four entries are free again.
    ring.register_buffers(&good.iter().collect::<Vec<_>>()).unwrap();
    ring.unregister_buffers().unwrap();
    drop(good);
    assert!(memory.iter().all(|memory| memory.as_slice().is_ok()), "an unregistered buffer is still held");
}

/// 1 GiB is the most that one entry of the kernel's table takes: a read across the split is two commands, one record.
#[test]
fn a_read_across_a_registration_split_is_one_record() {
    const GIB: usize = 1 << 30;
    const LEN: usize = 2 * GIB + 65_536;
    let ring = ring!(RingOptions { buffer_slots: 4, ..options(8) });
    let Ok(mut memory) = MappedBuffer::<u8>::alloc(LEN) else { skip!("no 2 GiB of address space") };
    let tail = AtomicU64::new(0);
    let stream = AsyncUringStream::with_options(
        ring,
        memory.share(),
        &tail,
        StreamOptions { strict: true, ..StreamOptions::default() },
    );
    let mut stream = match stream {
        Err(error) if error.errno() == libc::ENOMEM => skip!("2 GiB cannot be registered: {error}"),
        other => other.unwrap(),
    };
    let file = TempFile::new(300_000);
    let at = |offset: usize, len: usize| {
        // SAFETY: called while nothing is in flight.
        unsafe { std::slice::from_raw_parts(stream_base(&memory).add(offset), len) }
    };
    let mut inputs = vec![file.open(DirectMode::Off)];
    inputs.extend(ringest::InputFile::open(file.path(), DirectMode::On));
    for input in &inputs {
        for (offset, len, commands) in
            [(GIB - 65_536, 131_072, 2), (GIB - 65_536, 65_536, 1), (2 * GIB, 65_536, 1), (2 * GIB - 4096, 65_536, 2)]
        {
            let before = stream.stats().commands;
            stream.submit_read_to_gpu_at(input, 8192, offset, len).unwrap();
            let completion = take_one(&mut stream);
            assert_eq!((completion.status, completion.bytes), (0, len as u64), "{completion:?}");
            assert_eq!(completion.path, ReadPath::RegisteredRead);
            assert_eq!(stream.stats().commands - before, commands, "{offset:#x}+{len}");
            check(at(offset, len), 8192);
        }
        // Ragged, so that no command boundary falls on the split by itself.
        stream.submit_read_to_gpu_at(input, 1, GIB - 4095, 200_001).unwrap();
        assert_eq!(take_one(&mut stream).bytes, 200_001);
        check(at(GIB - 4095, 200_001), 1);
        // A scatter list on both sides of it.
        stream.submit_read_to_gpu_scatter(input, 5, &[(2 * GIB - 9, 9), (GIB - 3, 6), (0, 10)], 0).unwrap();
        assert_eq!(take_one(&mut stream).status, 0);
        check(at(2 * GIB - 9, 9), 5);
        check(at(GIB - 3, 6), 14);
        check(at(0, 10), 20);
    }
    assert_eq!(tail.load(Ordering::Acquire), stream.submitted());
}

fn stream_base(memory: &MappedBuffer<u8>) -> *const u8 {
    memory.as_host_ptr()
}

#[test]
fn rings_on_two_threads_share_one_registration() {
    let mut ring = ring!();
    let file = TempFile::new(65_536);
    let mut memory = filled(65_536, 0);
    let handle = memory.share();
    ring.register_buffers(&[&handle]).unwrap();
    let shared = ring.share_buffers().unwrap();
    // SAFETY: the two streams read into different halves.
    let (lower, upper) = unsafe { (handle.duplicate(), handle.duplicate()) };
    let upper = upper.sub_region(32_768, 32_768).unwrap();
    let refused = std::thread::scope(|scope| {
        let clone = scope.spawn(|| {
            let mut ring = IoUringState::new(RingOptions::default()).unwrap();
            match ring.clone_buffers(&shared) {
                Err(error) if error.errno() == libc::EOPNOTSUPP => return Some(error),
                other => other.unwrap(),
            }
            assert_eq!(ring.buffer_count(), 1);
            assert_eq!(errno(ring.clone_buffers(&shared)), libc::EBUSY);
            let tail = AtomicU64::new(0);
            let mut stream = AsyncUringStream::new(ring, upper, &tail).unwrap();
            assert!(stream.is_registered());
            stream.submit_read_to_gpu(&file.open(DirectMode::Off), 32_768, 0, 32_768).unwrap();
            assert_eq!(take_one(&mut stream).path, ReadPath::RegisteredRead);
            None
        });
        let tail = AtomicU64::new(0);
        let mut stream = AsyncUringStream::new(ring, lower.sub_region(0, 32_768).unwrap(), &tail).unwrap();
        stream.submit_read_to_gpu(&file.open(DirectMode::Off), 0, 0, 32_768).unwrap();
        assert_eq!(take_one(&mut stream).path, ReadPath::RegisteredRead);
        clone.join().unwrap()
    });
    if let Some(error) = refused {
        skip!("{error}");
    }
    drop((handle, shared));
    check(memory.as_slice().unwrap(), 0);
}

#[test]
fn a_share_is_a_snapshot() {
    let (mut first, mut second) = (ring!(), ring!());
    if kernel() < (6, 12) {
        skip!("buffers cannot be cloned before Linux 6.12");
    }
    let mut memory = [filled(4096, 0), filled(4096, 0)];
    let handles = [memory[0].share(), memory[1].share()];
    first.register_buffers(&[&handles[0]]).unwrap();
    let shared = first.share_buffers().unwrap();
    // What the first ring does afterwards, the memory of its stream included, is not in it.
    first.update_buffer(0, Some(&handles[1])).unwrap();
    let mut own = filled(1 << 16, 0);
    let tail = AtomicU64::new(0);
    let stream = AsyncUringStream::new(first, own.share(), &tail).unwrap();
    let later = stream.ring().share_buffers().unwrap();
    second.clone_buffers(&shared).unwrap();
    assert_eq!(errno(second.clone_buffers(&shared)), libc::EBUSY);
    let registered = |ring: &IoUringState| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", ring.fd())).unwrap();
        let bufs = info.split("UserBufs:").nth(1).unwrap_or_default().split("PollList").next().unwrap_or_default();
        (bufs.contains(&format!("{:x}/4096", handles[0].as_host_ptr() as usize)), bufs.contains("/65536"))
    };
    let seen = registered(&second);
    if seen.0 {
        assert!(!seen.1, "the stream's own memory was shared");
        let mut third = ring!();
        third.clone_buffers(&later).unwrap();
        assert_eq!(registered(&third), (false, false));
    }
    drop(stream);
    drop(exercise(second));
}

/// A ring of a kernel before 5.19, whose buffer table can only be made and dropped as a whole.
#[test]
fn without_sparse_tables_a_ring_serves_one_stream_after_the_other() {
    #[cfg(not(feature = "testing"))]
    skip!("built without the feature testing");
    #[cfg(feature = "testing")]
    {
        use ringest::testing::{end_fault_plan, plan_fault};
        plan_fault(0, 0);
        let whole = ring!();
        let calls = end_fault_plan();
        drop(whole);
        let sparse = calls.iter().rposition(|&call| call == "io_uring_register").unwrap() as u64 + 1;
        plan_fault(sparse, libc::EINVAL);
        let ring = ring!();
        end_fault_plan();
        assert!(!ring.features().sparse_buffers);
        let (mut first, mut second) = (filled(4096, 0), filled(8192, 0));
        let tail = AtomicU64::new(0);
        let stream = AsyncUringStream::new(ring, first.share(), &tail).unwrap();
        assert!(stream.is_registered());
        let mut ring = stream.close(LONG).unwrap().ring;
        assert!(first.as_slice().is_ok(), "the memory is held");
        let handle = second.share();
        ring.register_buffers(&[&handle]).unwrap();
        ring.unregister_buffers().unwrap();
        drop(handle);
        let stream = AsyncUringStream::new(ring, second.share(), &tail).unwrap();
        assert!(stream.is_registered());
    }
}

// Files

#[test]
fn registered_files_are_read_replaced_and_bounds_checked() {
    let mut ring = ring!();
    let files = [TempFile::new(8192), TempFile::with_content(&pattern(100_000, 8192))];
    let inputs = [files[0].open(DirectMode::Off), files[1].open(DirectMode::Off)];
    let fds = [inputs[0].as_fd().as_raw_fd(), inputs[1].as_fd().as_raw_fd()];
    assert_eq!(errno(ring.register_files(&[])), libc::EINVAL);
    assert_eq!(errno(ring.register_files_sparse(0)), libc::EINVAL);
    assert_eq!(errno(ring.register_files(&[fds[0], -1])), libc::EBADF);
    assert_eq!(errno(ring.register_files(&[1_000_000])), libc::EBADF);
    assert_eq!(errno(ring.update_file(0, None)), libc::ERANGE);
    assert_eq!(errno(ring.unregister_files()), libc::EINVAL);
    ring.register_files_sparse(3).unwrap();
    assert_eq!((ring.file_count(), errno(ring.register_files(&fds))), (3, libc::EBUSY));
    ring.update_file(2, Some(fds[0])).unwrap();
    assert_eq!(errno(ring.update_file(2, Some(1_000_000))), libc::EBADF);
    assert_eq!(errno(ring.update_file(3, Some(fds[0]))), libc::ERANGE);
    let mut memory = filled(8192, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    assert_eq!(errno(stream.submit_read_to_gpu_fixed_file(0, 0, 0, 16, 0)), libc::EINVAL);
    assert_eq!(errno(stream.submit_read_to_gpu_fixed_file(3, 0, 0, 16, 0)), libc::ERANGE);
    assert_eq!(errno(stream.registered_file(u32::MAX).map(drop)), libc::ERANGE);
    stream.submit_read_to_gpu_fixed_file(2, 5, 1000, 4000, 9).unwrap();
    assert_eq!((take_one(&mut stream).user_data, stream.submitted()), (9, 1));
    check(&bytes(&stream)[1000..5000], 5);
    // The failed update to a bad descriptor left the old file; a good one replaces it.
    stream.ring_mut().unwrap().update_file(2, Some(fds[1])).unwrap();
    stream.submit_read_to_gpu_fixed_file(2, 0, 0, 8192, 0).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
    check(&bytes(&stream), 100_000);
    stream.ring_mut().unwrap().update_file(2, None).unwrap();
    assert_eq!(errno(stream.submit_read_to_gpu_fixed_file(2, 0, 0, 16, 0)), libc::EINVAL);
    stream.ring_mut().unwrap().unregister_files().unwrap();
    assert_eq!(stream.ring().file_count(), 0);
}

#[test]
fn a_registered_file_survives_its_descriptor() {
    let mut ring = ring!();
    let file = TempFile::new(4096);
    let raw = file.raw(0).unwrap();
    ring.register_files(&[raw.as_raw_fd()]).unwrap();
    drop(raw);
    let mut memory = filled(4096, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu_fixed_file(0, 0, 0, 4096, 0).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
    check(&bytes(&stream), 0);
}

#[test]
fn a_file_in_use_cannot_be_replaced() {
    let mut ring = ring!();
    let pipe = Pipe::new();
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    ring.register_files(&[pipe.fd()]).unwrap();
    let mut memory = filled(4096, 0);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu_fixed_file(0, 0, 0, 100, 0).unwrap();
    stream.flush_submissions().unwrap();
    let fd = input.as_fd().as_raw_fd();
    assert_eq!(errno(stream.ring_mut().unwrap().update_file(0, Some(fd))), libc::EBUSY);
    assert_eq!(errno(stream.ring_mut().unwrap().unregister_files()), libc::EBUSY);
    pipe.feed(0, 100);
    assert_eq!(take_one(&mut stream).status, 0);
    // A reference names the index, not the file.
    let by_index = stream.registered_file(0).unwrap();
    stream.ring_mut().unwrap().update_file(0, Some(fd)).unwrap();
    stream.submit_read_to_gpu_at(by_index.clone(), 0, 0, 4096).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
    check(&bytes(&stream), 0);
    stream.ring_mut().unwrap().update_file(0, None).unwrap();
    assert_eq!(errno(stream.submit_read_to_gpu_at(by_index, 0, 0, 4096)), libc::EINVAL);
}

/// A registered-file flag must not survive in a queue entry that a plain descriptor uses next (or the other way round).
#[test]
fn registered_and_plain_files_do_not_mix_in_reused_queue_entries() {
    let mut ring = ring!(options(4));
    let (first, second) = (TempFile::new(65_536), TempFile::with_content(&pattern(1 << 20, 65_536)));
    let (registered, plain) = (first.open(DirectMode::Off), second.open(DirectMode::Off));
    ring.register_files(&[registered.as_fd().as_raw_fd()]).unwrap();
    let (mut memory, mut other) = (filled(65_536, 0), filled(65_536, 0));
    let unregistered = other.share();
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    for round in 0..64u64 {
        let at = round * 1000;
        if round % 3 == 0 {
            stream.submit_read_to_gpu_fixed_file(0, at, 0, 1000, round).unwrap();
        } else {
            stream.submit_read_to_gpu_at_with_user_data(&plain, at, 0, 1000, round).unwrap();
        }
        let completion = take_one(&mut stream);
        assert_eq!((completion.user_data, completion.status), (round, 0));
        check(&bytes(&stream)[..1000], if round % 3 == 0 { at } else { (1 << 20) + at });
    }
    drop(stream.replace_buffer(unregistered).unwrap());
}
