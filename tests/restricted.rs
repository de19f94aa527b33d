//! Where io_uring is forbidden, hidden or short of memory: the error says why, and what would help.

mod common;

use common::*;
use ringest::{AsyncUringStream, DirectMode, IoUringState, MappedBuffer, ReadPath, RingOptions, StreamOptions};
use std::os::unix::process::CommandExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Makes a system call fail with `errno`, for this process and for good (seccomp(2)).
fn forbid(call: libc::c_long, errno: i32) {
    const RET_ALLOW: u32 = 0x7fff_0000;
    const RET_ERRNO: u32 = 0x0005_0000;
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // seccomp_data.nr
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, RET_ERRNO | errno as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: `program` outlives the calls, which copy it. TSYNC: the filter holds for every thread.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let rc =
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_TSYNC, &program);
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    }
}

#[test]
fn a_seccomp_filter_that_forbids_io_uring_is_named() {
    drop(ring!());
    in_child("a_seccomp_filter_that_forbids_io_uring_is_named", || {
        forbid(libc::SYS_io_uring_setup, libc::EPERM);
        let error = IoUringState::new(RingOptions::default()).unwrap_err();
        assert_eq!(error.errno(), libc::EPERM);
        let text = error.to_string();
        for word in ["io_uring_setup", "seccomp", "io_uring_enter", "io_uring_register", "profile", "errno 1"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        let io = std::io::Error::from(error);
        assert_eq!(io.kind(), std::io::ErrorKind::PermissionDenied);
    });
}

#[test]
fn a_seccomp_filter_that_hides_io_uring_is_named() {
    drop(ring!());
    in_child("a_seccomp_filter_that_hides_io_uring_is_named", || {
        forbid(libc::SYS_io_uring_setup, libc::ENOSYS);
        let error = IoUringState::new(RingOptions::default()).unwrap_err();
        assert_eq!(error.errno(), libc::ENOSYS);
        assert!(error.to_string().contains("seccomp filter hides io_uring"), "{error}");
    });
}

/// A filter that allows the setup alone: nothing hangs, nothing is reported as read, nothing is freed under a read.
#[test]
fn a_filter_that_forbids_submitting_fails_cleanly() {
    drop(ring!());
    in_leaking_child("a_filter_that_forbids_submitting_fails_cleanly", || {
        let file = TempFile::new(4096);
        let tail = AtomicU64::new(0);
        let mut memory = filled(4096, 0);
        let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
        forbid(libc::SYS_io_uring_enter, libc::EPERM);
        stream.submit_read_to_gpu(&file.open(DirectMode::Off), 0, 0, 4096).unwrap();
        for _ in 0..3 {
            let error = stream.wait_for_completion(1, Some(LONG)).unwrap_err();
            assert_eq!(error.errno(), libc::EPERM);
            assert!(error.to_string().contains("io_uring_enter"), "{error}");
        }
        assert_eq!(errno(stream.poll()), libc::EPERM);
        assert_eq!(errno(stream.flush_submissions()), libc::EPERM);
        assert_eq!((stream.inflight(), tail.load(Ordering::Acquire)), (1, 0));
        drop(stream);
        assert_eq!(tail.load(Ordering::Acquire), 0);
    });
}

/// Registration refused altogether: reads go unregistered, and say so.
#[test]
fn a_filter_that_forbids_registering_falls_back_to_plain_reads() {
    drop(ring!());
    in_child("a_filter_that_forbids_registering_falls_back_to_plain_reads", || {
        forbid(libc::SYS_io_uring_register, libc::EPERM);
        let ring = IoUringState::new(RingOptions::default()).unwrap();
        let features = ring.features();
        assert!(!features.sparse_buffers && !features.registered_ring && !features.readv_fixed, "{features}");
        plain_reads(ring);
        let ring = IoUringState::new(RingOptions::default()).unwrap();
        assert_eq!(errno(strict(ring)), libc::EPERM);
    });
}

/// Reads through a stream whose buffer cannot be registered.
fn plain_reads(ring: IoUringState) {
    let file = TempFile::new(500_000);
    let tail = AtomicU64::new(0);
    let mut memory = filled(512_000, 0);
    let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
    assert!(!stream.is_registered());
    for mode in [DirectMode::Off, DirectMode::Auto] {
        let input = file.open(mode);
        stream.submit_read_to_gpu_at(&input, 0, 0, 4096).unwrap();
        stream.submit_read_to_gpu_at(&input, 3, 5000, 400_000).unwrap();
        stream.submit_read_to_gpu_scatter(&input, 0, &[(450_000, 512), (500_000, 512)], 0).unwrap();
        for completion in take(&mut stream, 3) {
            assert_eq!((completion.status, completion.path), (0, ReadPath::PlainRead), "{completion:?}");
        }
        let got = bytes(&stream);
        check(&got[..4096], 0);
        check(&got[5000..405_000], 3);
        check(&got[500_000..500_512], 512);
    }
    assert_eq!(stream.stats().registered_bytes, 0);
    assert_eq!(tail.load(Ordering::Acquire), 6);
}

fn strict(ring: IoUringState) -> ringest::Result<()> {
    let tail = AtomicU64::new(0);
    let mut memory = filled(512_000, 0);
    let options = StreamOptions { strict: true, ..StreamOptions::default() };
    AsyncUringStream::with_options(ring, memory.share(), &tail, options).map(drop)
}

/// A ring where memory is scarce. The kernel charges rings to RLIMIT_MEMLOCK too, per user, and gives the charge of a
/// ring that is gone back a little later.
fn scarce_ring() -> IoUringState {
    let start = Instant::now();
    loop {
        match IoUringState::new(RingOptions { entries: 8, ..RingOptions::default() }) {
            Err(error) if error.errno() == libc::ENOMEM && start.elapsed() < LONG => std::thread::yield_now(),
            other => return other.unwrap(),
        }
    }
}

/// Runs the body in a child that is an ordinary user (root is exempt from RLIMIT_MEMLOCK) with this limit, one at a
/// time: the charges are the user's.
fn with_memlock(name: &str, limit: u64, body: impl FnOnce()) {
    static TURN: Mutex<u32> = Mutex::new(65_534);
    let mut turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Users that nobody has: what an earlier child still owes does not count.
    let (user, group) = (*turn, 65_534);
    *turn -= 1;
    in_child_with(
        name,
        |command| {
            let set = move || {
                let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
                // SAFETY: between fork and exec, system calls only.
                unsafe {
                    if libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                    if libc::geteuid() == 0
                        && (libc::setgroups(0, std::ptr::null()) != 0
                            || libc::setgid(group) != 0
                            || libc::setuid(user) != 0)
                    {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            };
            // SAFETY: `set` makes only async-signal-safe calls.
            unsafe { command.pre_exec(set) };
        },
        body,
    );
}

/// Whether io_uring is there at all. Asked in the child too, where memory for a ring may be short for a moment.
fn io_uring() -> Result<(), String> {
    match IoUringState::new(RingOptions { entries: 8, ..RingOptions::default() }) {
        Err(error) if error.errno() != libc::ENOMEM => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// Whether an ordinary user could execute this test.
fn reachable() -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let binary = std::env::current_exe().unwrap();
    for part in binary.ancestors() {
        let mode = part.metadata().map_err(|error| error.to_string())?.permissions().mode();
        if is_root() && mode & 0o001 == 0 {
            return Err(format!("{} is closed to other users", part.display()));
        }
    }
    Ok(())
}

#[test]
fn without_locked_memory_reads_are_plain_and_say_so() {
    if let Err(reason) = io_uring() {
        skip!("{reason}");
    }
    if let Err(reason) = reachable() {
        skip!("{reason}");
    }
    with_memlock("without_locked_memory_reads_are_plain_and_say_so", 64 << 10, || {
        assert!(!is_root());
        plain_reads(scarce_ring());
        // What fits the limit is registered all the same.
        let mut ring = scarce_ring();
        let mut memory = MappedBuffer::<u8>::alloc(4096).unwrap();
        let handle = memory.share();
        ring.register_buffers(&[&handle]).unwrap();
    });
}

#[test]
fn without_locked_memory_strict_fails_and_names_the_limit() {
    if let Err(reason) = io_uring() {
        skip!("{reason}");
    }
    if let Err(reason) = reachable() {
        skip!("{reason}");
    }
    with_memlock("without_locked_memory_strict_fails_and_names_the_limit", 64 << 10, || {
        let error = strict(scarce_ring()).unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM);
        let text = error.to_string();
        for word in ["RLIMIT_MEMLOCK is 65536 bytes", "ulimit -l", "CAP_IPC_LOCK"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        // A caller's own registration fails alike, and leaves the ring usable.
        let mut ring = scarce_ring();
        let mut memory = filled(512_000, 0);
        let handle = memory.share();
        assert_eq!(errno(ring.register_buffers(&[&handle])), libc::ENOMEM);
        assert_eq!(ring.buffer_count(), 0);
        drop(handle);
        drop(exercise(ring));
    });
}

/// Two rings that share a registration are charged for it once.
#[test]
fn a_shared_registration_is_charged_once() {
    if let Err(reason) = io_uring() {
        skip!("{reason}");
    }
    if kernel() < (6, 12) {
        skip!("buffers cannot be cloned before Linux 6.12");
    }
    if let Err(reason) = reachable() {
        skip!("{reason}");
    }
    with_memlock("a_shared_registration_is_charged_once", 8 << 20, || {
        let mut memory = filled(5 << 20, 0);
        let handle = memory.share();
        let (mut first, mut second, mut third) = (scarce_ring(), scarce_ring(), scarce_ring());
        first.register_buffers(&[&handle]).unwrap();
        assert_eq!(errno(second.register_buffers(&[&handle])), libc::ENOMEM);
        third.clone_buffers(&first.share_buffers().unwrap()).unwrap();
        assert_eq!(third.buffer_count(), 1);
        drop(handle);
        drop(exercise(third));
    });
}

#[test]
fn too_few_descriptors_are_named() {
    drop(ring!());
    in_leaking_child("too_few_descriptors_are_named", || {
        let file = TempFile::new(10);
        // SAFETY: duplicates of our own descriptor, until there are no more.
        unsafe {
            let limit = libc::rlimit { rlim_cur: 32, rlim_max: 32 };
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
            while libc::dup(0) != -1 {}
        }
        let error = IoUringState::new(RingOptions::default()).unwrap_err();
        assert_eq!(error.errno(), libc::EMFILE);
        assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
        let error = ringest::InputFile::open(file.path(), DirectMode::Off).unwrap_err();
        assert_eq!(error.errno(), libc::EMFILE);
        assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
    });
}
