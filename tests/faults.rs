//! Bad input and real faults: each is one clean failure, and everything beside it goes on.

mod common;

use common::*;
use ringest::{
    AsyncUringStream, DirectMode, GpuMappedBuffer, InputFile, PipelineError, ReadPath, RingOptions, StreamOptions,
};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[test]
fn what_cannot_be_read_at_offsets_is_not_opened() {
    let dir = std::env::temp_dir();
    let fifo = fresh_path();
    let name = CString::new(fifo.as_os_str().as_bytes()).unwrap();
    // SAFETY: a NUL-terminated path.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let missing = fresh_path();
    let start = Instant::now();
    for (path, expected) in [
        (missing.as_path(), libc::ENOENT),
        (dir.as_path(), libc::EISDIR),
        (fifo.as_path(), libc::ESPIPE), // opening it would block
        ("/dev/null".as_ref(), libc::ESPIPE),
        ("/dev/zero".as_ref(), libc::ESPIPE),
        ("/nul\0byte".as_ref(), libc::EINVAL),
        ("".as_ref(), libc::ENOENT),
    ] {
        for mode in [DirectMode::Auto, DirectMode::On, DirectMode::Off] {
            let error = InputFile::open(path, mode).unwrap_err();
            assert_eq!(error.errno(), expected, "{error}");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            assert!(matches!(error, PipelineError::Syscall { call: "open", .. }));
        }
    }
    assert!(start.elapsed() < LONG);
    std::fs::remove_file(fifo).unwrap();
    let pipe = Pipe::new();
    assert_eq!(errno(InputFile::from_fd(pipe.read.as_fd(), DirectMode::Auto)), libc::ESPIPE);
}

#[test]
fn a_file_without_read_permission_is_refused() {
    if is_root() {
        skip!("root may read everything");
    }
    use std::os::unix::fs::PermissionsExt;
    let file = TempFile::new(10);
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o200)).unwrap();
    let error = InputFile::open(file.path(), DirectMode::Auto).unwrap_err();
    assert_eq!(error.errno(), libc::EACCES);
    assert!(error.to_string().contains("read permission"), "{error}");
}

#[test]
fn ranges_outside_buffer_or_file_space_are_refused_without_effect() {
    let file = TempFile::new(4096);
    let input = file.open(DirectMode::Off);
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    for (offset, len) in [(4096, 1), (0, 4097), (1, usize::MAX), (usize::MAX, 1), (usize::MAX, 0)] {
        let error = stream.submit_read_to_gpu_at(&input, 0, offset, len).unwrap_err();
        assert_eq!(error.errno(), libc::ERANGE);
        assert!(error.to_string().contains("4096"), "{error}");
    }
    for (chunk, len) in [(1, 4096), (usize::MAX, 2), (2, usize::MAX), (4097, 1)] {
        assert_eq!(errno(stream.submit_read_to_gpu(&input, 0, chunk, len)), libc::ERANGE);
    }
    let top = i64::MAX as u64;
    for (offset, len) in [(u64::MAX, 1), (u64::MAX, 0), (top, 1), (top - 15, 16 + 1), (1 << 63, 16)] {
        let error = stream.submit_read_to_gpu_at(&input, offset, 0, len).unwrap_err();
        assert_eq!(error.errno(), libc::ERANGE, "{offset} {len}");
        assert!(error.to_string().contains("file offset"), "{error}");
    }
    assert_eq!((stream.submitted(), stream.inflight(), stream.stats().commands), (0, 0, 0));
    // The largest offsets that exist are beyond every file's end.
    for mode in [DirectMode::Off, DirectMode::Auto] {
        stream.submit_read_to_gpu_at(&file.open(mode), top - 16, 0, 16).unwrap();
        let completion = take_one(&mut stream);
        assert!([-libc::ENODATA, -libc::EINVAL, -libc::EOVERFLOW].contains(&completion.status), "{completion:?}");
        stream.skip(completion.sequence).unwrap();
    }
    // And a read inside works on.
    stream.submit_read_to_gpu_at(&input, 0, 0, 4096).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
}

#[test]
fn bad_descriptors_fail_as_completions() {
    let file = TempFile::new(4096);
    let write_only = file.writable();
    let directory = std::fs::File::open(std::env::temp_dir()).unwrap();
    // SAFETY: opens a path that exists without opening the file.
    let path_only = unsafe { libc::open(c"/".as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
    // A number that no descriptor of this process has.
    let closed = 1_000_003;
    let tail = AtomicU64::new(0);
    let mut memory = filled(4096, 0xee);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    for (fd, expected) in [
        (closed, libc::EBADF),
        (-1, libc::EBADF),
        (i32::MIN, libc::EBADF),
        (write_only.as_raw_fd(), libc::EBADF),
        (path_only, libc::EBADF),
        (directory.as_raw_fd(), libc::EISDIR),
    ] {
        // One whole read on each side: neither is lost.
        stream.submit_read_to_gpu_at(&file.open(DirectMode::Off), 0, 0, 16).unwrap();
        let bad = stream.submit_read_to_gpu_at(fd, 0, 16, 16).unwrap();
        stream.submit_read_to_gpu_at(&file.open(DirectMode::Off), 0, 32, 16).unwrap();
        for completion in take(&mut stream, 3) {
            let expected = if completion.sequence == bad { -expected } else { 0 };
            assert_eq!(completion.status, expected, "{completion:?}");
        }
        assert_eq!(tail.load(Ordering::Acquire), bad);
        stream.skip(bad).unwrap();
    }
    // SAFETY: our descriptor, closed once.
    unsafe { libc::close(path_only) };
    assert!(bytes(&stream)[16..32].iter().all(|&byte| byte == 0xee));
}

/// A raw descriptor closed between submission and hand-over.
#[test]
fn a_descriptor_closed_too_early_fails_and_can_be_skipped() {
    in_child("a_descriptor_closed_too_early_fails_and_can_be_skipped", || {
        let file = TempFile::new(4096);
        let tail = AtomicU64::new(0);
        let mut memory = filled(4096, 0);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        let fd = file.raw(0).unwrap().into_raw_fd();
        stream.submit_read_to_gpu(fd, 0, 0, 4096).unwrap();
        // SAFETY: our descriptor, closed once; nothing else in this process opens one meanwhile.
        unsafe { libc::close(fd) };
        let completion = take_one(&mut stream);
        assert_eq!(completion.status, -libc::EBADF);
        assert!(completion.result().unwrap_err().to_string().contains("keep the file open"));
        // An InputFile is held by its reads and cannot be closed too early.
        let input = file.open(DirectMode::Off);
        stream.submit_read_to_gpu(&input, 0, 0, 4096).unwrap();
        drop(input);
        assert_eq!(take_one(&mut stream).status, 0);
    });
}

#[test]
fn a_file_that_shrinks_or_grows_meanwhile_is_told_truthfully() {
    let file = TempFile::new(8192);
    for mode in [DirectMode::Off, DirectMode::Auto] {
        let input = file.open(mode);
        let tail = AtomicU64::new(0);
        let mut memory = filled(8192, 0xee);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        assert_eq!(input.len(), 8192);
        let writable = file.writable();
        writable.set_len(3000).unwrap();
        stream.submit_read_to_gpu(&input, 0, 0, 8192).unwrap();
        let completion = take_one(&mut stream);
        assert_eq!((completion.status, completion.bytes), (-libc::ENODATA, 3000));
        check(&bytes(&stream)[..3000], 0);
        writable.write_all_at(&pattern(3000, 5192), 3000).unwrap();
        writable.sync_all().unwrap();
        stream.resubmit(0).unwrap();
        assert_eq!(take_one(&mut stream).status, 0);
        check(&bytes(&stream), 0);
        assert_eq!(tail.load(Ordering::Acquire), 1);
    }
}

/// Truncated and extended by another thread all the time: whole reads are whole, the others end at the file's end.
#[test]
fn a_file_truncated_while_being_read_never_yields_a_false_success() {
    const LEN: usize = 400_000;
    let file = TempFile::new(LEN);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ring = ring!();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let writable = file.writable();
            let content = pattern(0, LEN);
            while !stop.load(Ordering::Relaxed) {
                writable.set_len(100_000).unwrap();
                writable.write_all_at(&content[100_000..], 100_000).unwrap();
            }
        });
        let tail = AtomicU64::new(0);
        let mut memory = filled(LEN, 0);
        let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
        let input = file.open(DirectMode::Off);
        for _ in 0..300 {
            let sequence = stream.submit_read_to_gpu_at(&input, 1, 0, LEN - 1).unwrap();
            let completion = take_one(&mut stream);
            // Bytes below the truncation never change; those above are the file's or, mid-write, not yet there.
            check(&bytes(&stream)[..99_999], 1);
            match completion.status {
                0 => assert_eq!(completion.bytes, LEN as u64 - 1),
                status => {
                    assert_eq!(status, -libc::ENODATA);
                    assert!((99_999..LEN as u64 - 1).contains(&completion.bytes), "{completion:?}");
                    stream.skip(sequence).unwrap();
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn memory_that_cannot_be_written_is_a_failed_read() {
    let file = TempFile::new(8192);
    let input = file.open(DirectMode::Off);
    let map = Map::new(16_384, libc::PROT_READ | libc::PROT_WRITE);
    map.protect(4096, 12_288, libc::PROT_READ);
    let base = map.base;
    let wrap = |owner: Map| {
        // SAFETY: the kernel refuses to write to the protected part, which is the point; nobody else writes there.
        unsafe { GpuMappedBuffer::from_host_visible_owner(base, 16_384, None, owner) }.unwrap()
    };
    let tail = AtomicU64::new(0);
    let strict = StreamOptions { strict: true, ..StreamOptions::default() };
    let buffer = wrap(map);
    // SAFETY: one of the two is only used after the other is gone.
    let error = AsyncUringStream::with_options(ring!(), unsafe { buffer.duplicate() }, &tail, strict).unwrap_err();
    assert_eq!(error.errno(), libc::EFAULT);
    assert!(error.to_string().contains("not writable"), "{error}");
    let mut stream = AsyncUringStream::new(ring!(), buffer, &tail).unwrap();
    assert!(!stream.is_registered());
    // The writable part works, unregistered and labelled so.
    stream.submit_read_to_gpu_at(&input, 0, 0, 4096).unwrap();
    let completion = take_one(&mut stream);
    assert_eq!((completion.status, completion.path), (0, ReadPath::PlainRead));
    check(&bytes(&stream)[..4096], 0);
    // Wholly and partly protected.
    stream.submit_read_to_gpu_at(&input, 0, 4096, 4096).unwrap();
    let completion = take_one(&mut stream);
    assert_eq!((completion.status, completion.bytes, completion.path), (-libc::EFAULT, 0, ReadPath::None));
    stream.submit_read_to_gpu_at(&input, 100, 0, 8000).unwrap();
    let completion = take_one(&mut stream);
    assert_eq!((completion.status, completion.bytes), (-libc::EFAULT, 4096));
    check(&bytes(&stream)[..4096], 100);
    stream.submit_read_to_gpu_scatter(&input, 7, &[(0, 100), (5000, 100)], 0).unwrap();
    assert_eq!(take_one(&mut stream).status, -libc::EFAULT);
    assert_eq!(tail.load(Ordering::Acquire), 1);
    if let Ok(direct) = InputFile::open(file.path(), DirectMode::On) {
        stream.submit_read_to_gpu_at(&direct, 0, 4096, 4096).unwrap();
        assert_eq!(take_one(&mut stream).status, -libc::EFAULT);
    }
    assert!(bytes(&stream)[4096..].iter().all(|&byte| byte == 0));
}

/// A file-backed shared mapping cannot be registered for good, but can be read into.
#[test]
fn file_backed_memory_falls_back_to_plain_reads() {
    let backing = TempFile::new(8192);
    let file = TempFile::with_content(&pattern(999, 8192));
    let descriptor = OpenOptions::new().read(true).write(true).open(backing.path()).unwrap();
    // SAFETY: a new mapping of a file of ours.
    let base = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), 8192, protection, libc::MAP_SHARED, descriptor.as_raw_fd(), 0)
    };
    assert_ne!(base, libc::MAP_FAILED);
    let map = Map { base: base.cast(), len: 8192 };
    // SAFETY: the mapping is the owner's, and only the stream uses it.
    let buffer = unsafe { GpuMappedBuffer::from_host_visible_owner(map.base, 8192, None, map) }.unwrap();
    let mut ring = ring!();
    let refused = ring.register_buffers(&[&buffer]);
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring, buffer, &tail).unwrap();
    stream.submit_read_to_gpu(&file.open(DirectMode::Off), 0, 0, 8192).unwrap();
    let completion = take_one(&mut stream);
    assert_eq!(completion.status, 0);
    match refused {
        Err(error) => {
            assert!([libc::EFAULT, libc::EOPNOTSUPP].contains(&error.errno()), "{error}");
            assert_eq!((completion.path, stream.is_registered()), (ReadPath::PlainRead, false));
        }
        // tmpfs is anonymous memory to the kernel.
        Ok(()) => assert_eq!(completion.path, ReadPath::RegisteredRead),
    }
    check(&bytes(&stream), 999);
}

/// Unmapped under the stream's feet (a broken promise): an error, not a crash.
#[test]
fn unmapped_memory_is_a_failed_read() {
    in_child("unmapped_memory_is_a_failed_read", || {
        let file = TempFile::new(4096);
        let input = file.open(DirectMode::Off);
        let map = Map::new(8192, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the promise is broken on purpose below; nothing else maps memory there in this child.
        let buffer = unsafe { GpuMappedBuffer::from_host_visible_owner(map.base, 8192, None, ()) }.unwrap();
        let options = StreamOptions { unregistered: true, ..StreamOptions::default() };
        let tail = AtomicU64::new(0);
        let mut stream = AsyncUringStream::with_options(ring!(), buffer, &tail, options).unwrap();
        map.protect(0, 8192, libc::PROT_NONE);
        stream.submit_read_to_gpu(&input, 0, 0, 4096).unwrap();
        let error = take_one(&mut stream).result().unwrap_err();
        assert_eq!(error.errno(), libc::EFAULT);
        assert!(error.to_string().contains("not writable memory"), "{error}");
    });
}

/// EINTR must not end a wait ("EINTR fatal").
#[test]
fn signals_do_not_end_a_wait() {
    extern "C" fn nothing(_: libc::c_int) {}
    in_child("signals_do_not_end_a_wait", || {
        // SAFETY: an empty handler, without SA_RESTART so that system calls are interrupted.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
        }
        let pipe = Pipe::new();
        let tail = AtomicU64::new(0);
        let mut memory = filled(4096, 0);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        stream.submit_read_to_gpu(pipe.fd(), 0, 0, 64).unwrap();
        // SAFETY: no preconditions.
        let waiter = unsafe { libc::pthread_self() } as usize;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..50 {
                    // SAFETY: the thread waits below until this one has fed the pipe.
                    unsafe { libc::pthread_kill(waiter as libc::pthread_t, libc::SIGUSR1) };
                    std::thread::sleep(Duration::from_millis(1)); // spreads the signals over the wait
                }
                pipe.feed(0, 64);
            });
            assert_eq!(stream.wait_for_completion(1, Some(LONG)).unwrap(), 1);
        });
        // A timeout is kept in spite of them, too.
        stream.submit_read_to_gpu(pipe.fd(), 0, 0, 64).unwrap();
        let start = Instant::now();
        assert_eq!(errno(stream.wait_for_completion(2, Some(Duration::from_millis(20)))), libc::ETIMEDOUT);
        assert!(start.elapsed() >= Duration::from_millis(20));
    });
}

/// The ring's descriptor closed behind the library's back: errors, no crash, no hang.
#[test]
fn a_ring_whose_descriptor_was_closed_fails_cleanly() {
    in_leaking_child("a_ring_whose_descriptor_was_closed_fails_cleanly", || {
        let file = TempFile::new(4096);
        let tail = AtomicU64::new(0);
        let mut memory = filled(4096, 0);
        // Movable: a registered ring descriptor would keep working.
        let ring = ring!(RingOptions { movable: true, ..RingOptions::default() });
        let options = StreamOptions { close_timeout: Duration::from_millis(50), ..StreamOptions::default() };
        let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, options).unwrap();
        let fd = stream.ring().fd();
        // SAFETY: breaks the library's descriptor on purpose; a duplicate takes its number, so that nothing else does.
        unsafe {
            let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY);
            assert_eq!(libc::dup2(null, fd), fd);
        }
        stream.submit_read_to_gpu(&file.open(DirectMode::Off), 0, 0, 4096).unwrap();
        let error = stream.wait_for_completion(1, Some(Duration::from_secs(1))).unwrap_err();
        assert!(matches!(error, PipelineError::IoUringSyscall { call: "io_uring_enter", .. }), "{error:?}");
        assert!(error.to_string().contains("descriptor was closed"), "{error}");
        let start = Instant::now();
        drop(stream);
        assert!(start.elapsed() < LONG);
        assert_eq!(ringest::leak_stats().rings, 1);
    });
}

#[test]
fn errors_convert_to_io_errors_and_name_their_errno() {
    let file = TempFile::new(10);
    let tail = AtomicU64::new(0);
    let mut memory = filled(64, 0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu(&file.open(DirectMode::Off), 0, 0, 20).unwrap();
    let error = take_one(&mut stream).result().unwrap_err();
    assert!(error.to_string().starts_with("end of file: 10 of 20 bytes at file offset 0 (submission 0) exist; "));
    let io: std::io::Error = error.clone().into();
    assert_eq!(io.get_ref().unwrap().to_string(), error.to_string());
    assert_eq!(error.errno(), libc::ENODATA);
}
