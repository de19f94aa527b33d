//! What the integration tests share: files with known content, pipes that hold reads in flight, skips, children.
#![allow(dead_code, unused_macros, unused_imports, unreachable_pub)]

pub mod gpu;

use ringest::{
    AsyncUringStream, Completion, DirectMode, FileRef, GpuMappedBuffer, InputFile, IoUringState, MappedBuffer,
    RingOptions, StreamOptions, TailWord,
};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longer than anything here should take on the slowest machine: what exceeds it hangs.
pub const LONG: Duration = Duration::from_secs(60);

/// Name of the test that calls it.
macro_rules! test_name {
    () => {{
        fn here() {}
        common::short_name(std::any::type_name_of_val(&here))
    }};
}

/// Ends the test with one line on stderr (past libtest's capture) that scripts count.
macro_rules! skip {
    ($($reason:tt)*) => {{
        common::print_skip(test_name!(), &format!($($reason)*));
        return;
    }};
}

/// A ring with these options; a skip where io_uring is forbidden or missing.
macro_rules! ring {
    () => {
        ring!(ringest::RingOptions::default())
    };
    ($options:expr) => {
        match ringest::IoUringState::new($options) {
            Ok(ring) => ring,
            Err(error) if [libc::EPERM, libc::ENOSYS].contains(&error.errno()) => skip!("no io_uring: {error}"),
            Err(error) => panic!("{error}"),
        }
    };
}

/// An `InputFile` with O_DIRECT; a skip where the file system has none.
macro_rules! direct {
    ($file:expr) => {
        match ringest::InputFile::open($file.path(), ringest::DirectMode::On) {
            Ok(input) => input,
            Err(error) if error.errno() == libc::EOPNOTSUPP => skip!("{error}"),
            Err(error) => panic!("{error}"),
        }
    };
}

pub(crate) use {direct, ring, skip, test_name};

pub fn short_name(path: &'static str) -> &'static str {
    let path = path.strip_suffix("::here").unwrap_or(path).trim_end_matches("::{{closure}}").trim_end_matches("::body");
    path.rsplit("::").next().unwrap_or(path)
}

pub fn print_skip(name: &str, reason: &str) {
    let line = format!("SKIP {name}: {}\n", reason.replace('\n', " "));
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Runs `body` in a process of its own: this test binary once more, with only the named test.
pub fn in_child(name: &str, body: impl FnOnce()) {
    in_child_with(name, |_| {}, body);
}

/// As `in_child`, for a body after which a leak checker would find what was leaked on purpose (or could not run).
pub fn in_leaking_child(name: &str, body: impl FnOnce()) {
    let prepare = |command: &mut Command| {
        command.env("ASAN_OPTIONS", "detect_leaks=0");
    };
    in_child_with(name, prepare, body);
}

pub fn in_child_with(name: &str, prepare: impl FnOnce(&mut Command), body: impl FnOnce()) {
    const MARK: &str = "RINGEST_TEST_CHILD";
    if std::env::var(MARK).is_ok_and(|child| child == name) {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(MARK, name);
    prepare(&mut command);
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    for line in err.lines().filter(|line| line.starts_with("SKIP ")) {
        std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
    }
    assert!(output.status.success(), "child of {name}: {}\n--- stdout\n{out}\n--- stderr\n{err}", output.status);
    assert!(out.contains("1 passed"), "no test named {name} ran in the child:\n{out}");
}

/// Byte `at` of every test file.
pub fn byte(at: u64) -> u8 {
    let word = (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> (8 * (at % 8))) as u8
}

pub fn pattern(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(byte).collect()
}

/// Asserts that `bytes` are those of a test file from `at` on.
#[track_caller]
pub fn check(bytes: &[u8], at: u64) {
    if let Some(bad) = (0..bytes.len()).find(|&i| bytes[i] != byte(at + i as u64)) {
        panic!("byte {bad} of {} (file offset {}) is {:#x}", bytes.len(), at + bad as u64, bytes[bad]);
    }
}

/// A file of `len` known bytes, removed on drop.
pub struct TempFile {
    path: PathBuf,
}

impl TempFile {
    pub fn new(len: usize) -> Self {
        Self::with_content(&pattern(0, len))
    }

    pub fn with_content(content: &[u8]) -> Self {
        let this = Self { path: fresh_path() };
        std::fs::write(&this.path, content).unwrap();
        // O_DIRECT reads of pages not yet written back would fall back or wait at random.
        File::open(&this.path).unwrap().sync_all().unwrap();
        this
    }

    /// A hole of `len` bytes, of which single ranges hold known bytes.
    pub fn sparse(len: u64, ranges: &[(u64, usize)]) -> Self {
        let this = Self { path: fresh_path() };
        let file = File::create(&this.path).unwrap();
        file.set_len(len).unwrap();
        for &(at, len) in ranges {
            file.write_all_at(&pattern(at, len), at).unwrap();
        }
        file.sync_all().unwrap();
        this
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn open(&self, mode: DirectMode) -> InputFile {
        InputFile::open(&self.path, mode).unwrap()
    }

    /// A descriptor of the test's own.
    pub fn raw(&self, flags: i32) -> std::io::Result<File> {
        OpenOptions::new().read(true).custom_flags(flags).open(&self.path)
    }

    pub fn writable(&self) -> File {
        OpenOptions::new().write(true).open(&self.path).unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A path nobody else uses.
pub fn fresh_path() -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("ringest-test-{}-{count}", std::process::id()))
}

/// A read of the read end stays in flight until bytes are written.
pub struct Pipe {
    pub read: OwnedFd,
    pub write: Option<File>,
}

impl Pipe {
    pub fn new() -> Self {
        Self::with_flags(0)
    }

    pub fn with_flags(flags: i32) -> Self {
        let mut fds = [0; 2];
        // SAFETY: `fds` takes the two descriptors, which then belong to nobody else.
        let (read, write) = unsafe {
            assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | flags), 0);
            (OwnedFd::from_raw_fd(fds[0]), File::from_raw_fd(fds[1]))
        };
        Self { read, write: Some(write) }
    }

    pub fn fd(&self) -> RawFd {
        self.read.as_raw_fd()
    }

    /// Writes the bytes that a test file holds at `at`.
    pub fn feed(&self, at: u64, len: usize) {
        self.write.as_ref().unwrap().write_all(&pattern(at, len)).unwrap();
    }

    pub fn close_writer(&mut self) {
        self.write = None;
    }
}

/// Memory filled with `fill`.
pub fn filled(len: usize, fill: u8) -> MappedBuffer<u8> {
    let mut memory = MappedBuffer::alloc(len).unwrap();
    memory.as_mut_slice().unwrap().fill(fill);
    memory
}

/// Waits until `count` completions have come and takes them.
#[track_caller]
pub fn take(stream: &mut AsyncUringStream<'_>, count: usize) -> Vec<Completion> {
    let mut out = vec![Completion::default(); count];
    let ready = stream.wait_for_completion(count, Some(LONG)).unwrap();
    assert!(ready >= count, "{ready} of {count} completions");
    assert_eq!(stream.poll_into(&mut out).unwrap(), count);
    out
}

/// Waits for one completion and takes it.
#[track_caller]
pub fn take_one(stream: &mut AsyncUringStream<'_>) -> Completion {
    take(stream, 1)[0]
}

/// The errno of a result that must be an error.
#[track_caller]
pub fn errno<T: std::fmt::Debug>(result: ringest::Result<T>) -> i32 {
    result.unwrap_err().errno()
}

/// What the stream's buffer holds.
///
/// Only while no read is in flight into it.
pub fn bytes(stream: &AsyncUringStream<'_>) -> Vec<u8> {
    // SAFETY: the tests call it with no read in flight into the buffer.
    unsafe { stream.buffer().as_slice() }.unwrap().to_vec()
}

/// Polls until `done` or `LONG` has passed.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what} did not happen");
        std::thread::yield_now();
    }
}

/// (major, minor) of the running kernel.
pub fn kernel() -> (u32, u32) {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

pub fn is_root() -> bool {
    // SAFETY: no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// Anonymous memory of the test's own, unmapped on drop.
pub struct Map {
    pub base: *mut u8,
    pub len: usize,
}

// SAFETY: plain memory.
unsafe impl Send for Map {}
// SAFETY: as above; the tests order their accesses.
unsafe impl Sync for Map {}

impl Map {
    pub fn new(len: usize, protection: i32) -> Self {
        // SAFETY: a new mapping touches nothing that exists.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self { base: base.cast(), len }
    }

    pub fn protect(&self, at: usize, len: usize, protection: i32) {
        // SAFETY: inside the mapping; the tests do not touch what they made inaccessible.
        assert_eq!(unsafe { libc::mprotect(self.base.add(at).cast(), len, protection) }, 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Runs a closure on another thread although what it uses is bound to this one.
pub fn elsewhere<R>(body: impl FnOnce() -> R) -> R {
    struct Force<T>(T);
    // SAFETY: the calling thread waits for the other one, so nothing is used by two at once. What is bound to its
    // thread is used elsewhere on purpose: the library must refuse it.
    unsafe impl<T> Send for Force<T> {}
    impl<T> Force<T> {
        fn into(self) -> T {
            self.0
        }
    }
    let body = Force(body);
    std::thread::scope(|scope| scope.spawn(move || Force(body.into()())).join().unwrap().into())
}

/// Reads of every kind through a new stream over `ring`, which comes back.
pub fn exercise(ring: IoUringState) -> IoUringState {
    const LEN: usize = 300_000;
    let file = TempFile::new(LEN);
    let mut memory = filled(1 << 20, 0);
    let tail = AtomicU64::new(7);
    let options = StreamOptions { depth: 8, ..StreamOptions::default() };
    let mut stream = AsyncUringStream::with_options(ring, memory.share(), &tail, options).unwrap();
    let mut files = vec![file.open(DirectMode::Off)];
    files.extend(InputFile::open(file.path(), DirectMode::On));
    for input in &files {
        for registered in [false, true] {
            let source = match registered {
                false => FileRef::from(input),
                true => {
                    use std::os::fd::AsFd;
                    stream.ring_mut().unwrap().register_files(&[input.as_fd().as_raw_fd()]).unwrap();
                    stream.registered_file(0).unwrap()
                }
            };
            let first = stream.submitted();
            stream.submit_read_to_gpu_at(source.clone(), 4096, 0, 65_536).unwrap();
            stream.submit_read_to_gpu_at(source.clone(), 4097, 100_001, 99_999).unwrap();
            stream.submit_read_to_gpu_scatter(source, 8192, &[(300_000, 777), (400_000, 4096)], 1).unwrap();
            for completion in take(&mut stream, 3) {
                assert_eq!(completion.status, 0, "{completion:?}");
            }
            assert_eq!(tail.load(Ordering::Acquire), first + 3);
            let got = bytes(&stream);
            check(&got[..65_536], 4096);
            check(&got[100_001..200_000], 4097);
            check(&got[300_000..300_777], 8192);
            check(&got[400_000..404_096], 8192 + 777);
            // SAFETY: nothing is in flight.
            unsafe { std::ptr::write_bytes(stream.buffer().as_host_ptr(), 0, 1 << 20) };
            if registered {
                stream.ring_mut().unwrap().unregister_files().unwrap();
            }
        }
    }
    // A read that stays in flight across a wait, and is completed from outside.
    let pipe = Pipe::new();
    stream.submit_read_to_gpu_at(pipe.fd(), 0, 0, 1000).unwrap();
    assert_eq!(errno(stream.wait_for_completion(1, Some(Duration::from_millis(5)))), libc::ETIMEDOUT);
    pipe.feed(5, 1000);
    assert_eq!(take_one(&mut stream).bytes, 1000);
    check(&bytes(&stream)[..1000], 5);
    stream.close(LONG).unwrap().ring
}
