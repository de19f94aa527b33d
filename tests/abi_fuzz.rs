//! Random call sequences over the whole C ABI, against a model: no crash, no hang, only documented errors, dead handles
//! stay dead, owners are told exactly once.
//!
//! `RINGEST_FUZZ_SEQUENCES` sets how many; `RINGEST_FUZZ_SEED` (printed on failure) replays one.

mod common;

use common::test_name;
use ringest::ffi::buffer::*;
use ringest::ffi::consumer::*;
use ringest::ffi::device_buffer::*;
use ringest::ffi::driver::*;
use ringest::ffi::file::*;
use ringest::ffi::gpu::*;
use ringest::ffi::io_queue::*;
use ringest::ffi::library::*;
use ringest::ffi::log::*;
use ringest::ffi::mapped::*;
use ringest::ffi::ring::*;
use ringest::ffi::stream::*;
use ringest::ffi::tail::*;
use ringest::ffi::vmm::*;
use ringest::wire::{IoQueueView, NO_SEQUENCE};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{CStr, CString, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

// What the header documents

/// Errnos by name, as far as the header or the manual pages that it names speak of them.
const ERRNOS: [(&str, i32); 33] = [
    ("E2BIG", libc::E2BIG),
    ("EACCES", libc::EACCES),
    ("EAGAIN", libc::EAGAIN),
    ("EBADF", libc::EBADF),
    ("EBUSY", libc::EBUSY),
    ("ECANCELED", libc::ECANCELED),
    ("EFAULT", libc::EFAULT),
    ("EINTR", libc::EINTR),
    ("EINVAL", libc::EINVAL),
    ("EIO", libc::EIO),
    ("EISDIR", libc::EISDIR),
    ("ELOOP", libc::ELOOP),
    ("EMFILE", libc::EMFILE),
    ("ENAMETOOLONG", libc::ENAMETOOLONG),
    ("ENODATA", libc::ENODATA),
    ("EDEADLK", libc::EDEADLK),
    ("ENODEV", libc::ENODEV),
    ("ENOENT", libc::ENOENT),
    ("ENOMEM", libc::ENOMEM),
    ("ENOSYS", libc::ENOSYS),
    ("ENOTDIR", libc::ENOTDIR),
    ("ENOTRECOVERABLE", libc::ENOTRECOVERABLE),
    ("ENXIO", libc::ENXIO),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("EPERM", libc::EPERM),
    ("EPIPE", libc::EPIPE),
    ("EPROTO", libc::EPROTO),
    ("ERANGE", libc::ERANGE),
    ("EREMOTEIO", libc::EREMOTEIO),
    ("EROFS", libc::EROFS),
    ("ESPIPE", libc::ESPIPE),
    ("ESTALE", libc::ESTALE),
    ("ETIMEDOUT", libc::ETIMEDOUT),
];

/// What may come from where the header only names the source.
const SOURCES: [(&str, &[i32]); 4] = [
    (
        "those of open(2)",
        &[libc::ENOENT, libc::EACCES, libc::ENOTDIR, libc::ELOOP, libc::ENAMETOOLONG, libc::EMFILE, libc::ENXIO],
    ),
    (
        "of the CUDA driver",
        &[
            libc::EINVAL,
            libc::ENOMEM,
            libc::ENODEV,
            libc::EBUSY,
            libc::ENOENT,
            libc::EAGAIN,
            libc::EPERM,
            libc::EOPNOTSUPP,
            libc::ETIMEDOUT,
            libc::EIO,
        ],
    ),
    ("those of io_uring_enter(2)", &[libc::EAGAIN, libc::EBUSY, libc::EINTR]),
    (
        "those of a failed submission",
        &[
            libc::EBADF,
            libc::EISDIR,
            libc::EINVAL,
            libc::EFAULT,
            libc::ESPIPE,
            libc::EOPNOTSUPP,
            libc::EIO,
            libc::ENOMEM,
        ],
    ),
];

fn errnos(text: &str) -> BTreeSet<i32> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '-');
    let named = words.filter_map(|word| word.strip_prefix("-E"));
    named
        .map(|name| ERRNOS.iter().find(|(known, _)| known[1..] == *name).unwrap_or_else(|| panic!("-E{name}")).1)
        .collect()
}

/// Every function of the header with the errnos that its comment, those it refers to, and its handle's type document.
fn documented() -> BTreeMap<String, BTreeSet<i32>> {
    let header = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/ringest.h")).unwrap();
    let (mut comments, mut first, mut types) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut comment = String::new();
    for line in header.lines() {
        if let Some(text) = line.strip_prefix("//") {
            comment += text;
            continue;
        }
        let name = |text: &str| -> Option<String> {
            let from = text.find("ringest_")?;
            let length = text[from..].find(|letter: char| !letter.is_alphanumeric() && letter != '_')?;
            Some(text[from..from + length].to_owned())
        };
        if line.contains('(') && !line.starts_with(['#', ' ']) && !line.starts_with("typedef") {
            let function = name(line).unwrap();
            let parameters = &line[line.find('(').unwrap()..];
            first.insert(function.clone(), name(parameters));
            comments.insert(function, std::mem::take(&mut comment));
        } else if line.starts_with("struct ") && line.ends_with(';') {
            types.insert(name(line).unwrap(), errnos(&comment));
        }
        comment.clear();
    }
    fn resolve(name: &str, comments: &BTreeMap<String, String>, depth: usize) -> BTreeSet<i32> {
        let Some((_, text)) = comments.get(name).and_then(|comment| comment.split_once("Errors:")) else {
            return BTreeSet::new();
        };
        let mut found = errnos(text);
        for (source, known) in SOURCES {
            if text.contains(source) {
                found.extend(known);
            }
        }
        for word in text.split(|letter: char| !letter.is_alphanumeric() && letter != '_') {
            if word.starts_with("ringest_") && depth < 4 {
                found.extend(resolve(word, comments, depth + 1));
            }
        }
        found
    }
    let of = |name: &String| {
        let mut found = resolve(name, &comments, 0);
        if let Some(Some(kind)) = first.get(name) {
            found.extend(types.get(kind).into_iter().flatten());
        }
        (name.clone(), found)
    };
    comments.keys().map(of).collect()
}

// Randomness

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

// The world that all sequences share

struct Shared {
    documented: BTreeMap<String, BTreeSet<i32>>,
    file: std::fs::File,
    direct: Option<std::fs::File>,
    folder: std::fs::File,
    pipe: (OwnedFd, OwnedFd),
    paths: Vec<CString>,
    directory: PathBuf,
    calls: AtomicU64,
    /// Functions with the results they gave: 0 for any success.
    seen: Mutex<BTreeSet<(String, i32)>>,
}

impl Shared {
    fn new() -> Self {
        let directory = std::env::temp_dir().join(format!("ringest-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("data");
        std::fs::write(&path, (0..300_000u32).map(|i| i as u8).collect::<Vec<_>>()).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        use std::os::unix::fs::OpenOptionsExt;
        let direct = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).ok();
        let mut ends = [0; 2];
        // SAFETY: the array has room for two descriptors, which nobody else owns.
        let pipe = unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK), 0);
            use std::os::fd::FromRawFd;
            (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
        };
        // Reads of an empty pipe shall stay in flight: only its other end must never block.
        // SAFETY: plain fcntl on our own descriptor.
        unsafe { libc::fcntl(ends[0], libc::F_SETFL, 0) };
        let path = path.to_str().unwrap();
        let names = [path, path, "/", "/no/such/file", "", "/dev/null", "/proc/self/maps", "/etc/shadow/x"];
        let paths = names.map(|name| CString::new(name).unwrap()).into();
        let folder = std::fs::File::open(&directory).unwrap();
        Self {
            documented: documented(),
            file,
            direct,
            folder,
            pipe,
            paths,
            directory,
            calls: AtomicU64::new(0),
            seen: Mutex::default(),
        }
    }
}

/// Memory of a page that is never freed, so that a write to it that comes too late is seen and does no harm.
fn page(bytes: usize) -> *mut u8 {
    // SAFETY: a new anonymous mapping touches no memory that exists.
    let raw = unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(null_mut(), bytes, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    assert_ne!(raw, libc::MAP_FAILED);
    raw.cast()
}

const GRANULE: usize = RINGEST_VMM_PLANNING_GRANULARITY as usize;
const OWNED: usize = 32 << 10;
const RELEASED: u8 = 0xa5;

struct Owner {
    memory: *mut u8,
    released: AtomicU32,
    adopted: bool,
}

unsafe extern "C" fn release(user: *mut c_void) {
    // SAFETY: `user` is an `Owner` that is never freed; its memory is ours again, for good.
    unsafe {
        let owner = &*user.cast::<Owner>();
        owner.memory.write_bytes(RELEASED, OWNED);
        owner.released.fetch_add(1, Ordering::SeqCst);
    }
}

unsafe extern "C" fn take_log(_: *mut c_void, _: u32, _: *const std::ffi::c_char, _: *const std::ffi::c_char) {}

// The model

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    Mapped,
    Buffer,
    File,
    Line,
    Ring,
    Stream,
    Shares,
    Queue,
    Consumer,
    Driver,
    Device,
    Vmm,
    Range,
    Memory,
}
use Family::*;

const FAMILIES: [Family; 14] =
    [Mapped, Buffer, File, Line, Ring, Stream, Shares, Queue, Consumer, Driver, Device, Vmm, Range, Memory];

#[derive(Default)]
struct Pool {
    live: Vec<usize>,
    dead: Vec<usize>,
}

#[derive(Default)]
struct StreamModel {
    submitted: u64,
    tail: u64,
}

#[derive(Default)]
struct QueueModel {
    /// Reserved by hand and not published.
    reserved: Vec<u64>,
    tail: u64,
    /// Its words are in memory that others may write to.
    exposed: bool,
}

#[derive(Default)]
struct ConsumerModel {
    held: Vec<u64>,
    queue: usize,
}

#[derive(Default)]
struct DriverModel {
    /// Requests accepted, at least: a stretch of a file may be more than one.
    least: u64,
    /// Requests whose end was reported.
    reported: BTreeSet<u64>,
    /// Its telemetry was started over.
    reset: bool,
}

struct Model<'a> {
    random: Random,
    shared: &'a Shared,
    pools: [Pool; 14],
    streams: HashMap<usize, StreamModel>,
    queues: HashMap<usize, QueueModel>,
    consumers: HashMap<usize, ConsumerModel>,
    drivers: HashMap<usize, DriverModel>,
    owners: Vec<&'static Owner>,
    /// Leaked before this sequence, and by it.
    leaked_before: u64,
    leaks: u64,
    log: Vec<String>,
}

/// Runs on threads of its own: handles are numbers.
struct Anywhere<'a, 'b>(&'a mut Model<'b>);
// SAFETY: the other thread is joined before the model is used again.
unsafe impl Send for Anywhere<'_, '_> {}

impl Anywhere<'_, '_> {
    fn step(self) {
        self.0.step();
    }
}

/// An option struct of random size, with as many readable bytes as it says.
#[repr(C, align(8))]
struct Raw([u8; 4096]);

impl Model<'_> {
    fn pool(&mut self, family: Family) -> &mut Pool {
        &mut self.pools[family as usize]
    }

    /// A handle for a parameter of this family, and whether it is live.
    fn pick<T>(&mut self, family: Family) -> (*mut T, bool) {
        let live = self.pools[family as usize].live.clone();
        let value = match self.random.below(16) {
            0 => 0,
            1 => {
                let dead = &self.pools[family as usize].dead;
                if dead.is_empty() { 0 } else { dead[self.random.below(dead.len())] }
            }
            2 => {
                let other = self.random.of(&FAMILIES);
                self.pools[other as usize].live.first().copied().unwrap_or(7)
            }
            3 => match self.random.below(3) {
                0 => self.random.next() as usize,
                1 => live.first().map_or(0, |handle| handle ^ 1 << self.random.below(64)),
                _ => &raw const *self as usize,
            },
            _ if live.is_empty() => 0,
            _ => live[self.random.below(live.len())],
        };
        (value as *mut T, live.contains(&value))
    }

    fn born<T>(&mut self, family: Family, rc: i64, handle: *mut T) {
        let value = handle as usize;
        if rc >= 0 {
            let pool = self.pool(family);
            assert!(value != 0 && !pool.live.contains(&value) && !pool.dead.contains(&value), "a handle twice");
            pool.live.push(value);
        } else {
            assert!(handle.is_null(), "a failed call stored a handle");
        }
    }

    fn died<T>(&mut self, family: Family, handle: *mut T) {
        let pool = self.pool(family);
        let at = pool.live.iter().position(|&live| live == handle as usize).expect("a dead handle died");
        pool.live.swap_remove(at);
        pool.dead.push(handle as usize);
    }

    /// Judges a result: `valid` is whether every handle and pointer was in order.
    fn judge(&mut self, name: &str, rc: i64, valid: bool) -> i64 {
        self.shared.calls.fetch_add(1, Ordering::Relaxed);
        self.log.push(format!("{name} = {rc}"));
        self.shared.seen.lock().unwrap().insert((name.to_owned(), rc.min(0) as i32));
        if rc >= 0 {
            assert!(valid, "{name} took a handle that is not live, or NULL");
            return rc;
        }
        let errno = -rc as i32;
        let documented = self.shared.documented.get(name).unwrap_or_else(|| panic!("{name} is not in the header"));
        // SAFETY: never NULL, and valid until the next failing call.
        let message = unsafe { CStr::from_ptr(ringest_last_error()) }.to_string_lossy().into_owned();
        assert!(documented.contains(&errno), "{name} gave undocumented errno {errno}: {message}");
        assert!(!message.is_empty(), "{name}: no message");
        rc
    }

    /// As `judge`, of a call that cannot fail when it is valid.
    fn sure(&mut self, name: &str, rc: i64, valid: bool) -> i64 {
        assert!(!valid || rc >= 0, "{name} failed with {rc}");
        self.judge(name, rc, valid)
    }

    fn fd(&mut self) -> i32 {
        let ring = self.pools[Ring as usize].live.first().map_or(-1, |&ring| ringest_ring_fd(ring as *const _));
        let direct = self.shared.direct.as_ref().map_or(-1, |file| file.as_raw_fd());
        let file = self.shared.file.as_raw_fd();
        let (read, write) = (self.shared.pipe.0.as_raw_fd(), self.shared.pipe.1.as_raw_fd());
        self.random.of(&[
            file,
            file,
            file,
            direct,
            direct,
            read,
            read,
            write,
            self.shared.folder.as_raw_fd(),
            -1,
            9999,
            ring,
        ])
    }

    fn offset(&mut self) -> u64 {
        let small = self.random.next() % 10_000;
        self.random.of(&[0, 0, 4096, small, small, 299_990, 1 << 40, i64::MAX as u64, u64::MAX])
    }

    fn length(&mut self) -> usize {
        let small = self.random.below(20_000);
        self.random.of(&[0, 1, 512, 4096, small, small, 70_000, 1 << 30, usize::MAX])
    }

    fn place(&mut self) -> usize {
        let small = self.random.below(8192);
        self.random.of(&[0, 0, 0, 4096, small, 1 << 30, usize::MAX])
    }

    fn options(&mut self, known: usize, mut field: impl FnMut(&mut Random, usize) -> u32) -> Raw {
        let mut raw = Raw([0; 4096]);
        for at in (4..known).step_by(4) {
            if self.random.one_in(3) {
                let value = field(&mut self.random, at);
                raw.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            }
        }
        if self.random.one_in(8) {
            let at = known + self.random.below(64);
            raw.0[at] = self.random.of(&[0, 1]);
        }
        let exact = known as u32;
        let sizes = [exact, exact, exact, exact, exact, 0, 3, 4, 8, 12, exact + 8, exact + 64, 4096, 4097, u32::MAX];
        let size = self.random.of(&sizes);
        raw.0[..4].copy_from_slice(&size.to_ne_bytes());
        raw
    }

    fn step(&mut self) {
        // SAFETY: handles may be anything; every other pointer is NULL or a valid place, and memory that reads go to
        // is mapped by ringest or never freed.
        unsafe {
            match self.random.below(70) {
                0..=3 => self.mapped(),
                4..=8 => self.buffers(),
                9..=10 => self.files(),
                11..=12 => self.lines(),
                13..=15 => self.rings(),
                16..=20 => self.registrations(),
                21..=23 => self.create_stream(),
                24..=30 => self.submit(),
                31..=37 => self.drive(),
                38 => self.end_stream(),
                39 => self.library(),
                40..=41 => self.create_queue(),
                42..=47 => self.use_queue(),
                48..=53 => self.consume(),
                54..=55 => self.create_driver(),
                56..=58 => self.request(),
                59..=62 => self.drive_driver(),
                63 => self.end_driver(),
                64..=65 => self.device_buffers(),
                66 => self.gpus(),
                _ => self.virtual_memory(),
            }
        }
    }

    unsafe fn mapped(&mut self) {
        let (handle, live) = self.pick::<ringest_mapped>(Mapped);
        let mut number = 0u64;
        let mut host = null_mut();
        let no_out = self.random.one_in(12);
        let ok = live && !no_out;
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(if self.pools[Mapped as usize].live.is_empty() { 1 } else { 10 }) {
                0 => {
                    let raw = self.options(40, |random, at| match at {
                        4 => random.of(&[0, 1, 2, 3]),
                        8 => random.of(&[1, 24, 4096, 65536, 1 << 31]),
                        12 => random.of(&[0, 0, 0, 256]),
                        16 => random.of(&[0, 1, 2, 3, 4]),
                        20 => random.of(&[0, 0, 0, 1, u32::MAX]),
                        _ => random.of(&[0, 0, 0, 0, 0, 0, 1]),
                    });
                    let options = if self.random.one_in(2) { null() } else { (&raw const raw).cast() };
                    let len = self.random.of(&[1, 4096, 65536, 65536, 300_000, 3 << 20, 0, 1 << 62, usize::MAX]);
                    let mut out = null_mut();
                    let rc = ringest_mapped_alloc(len, options, if no_out { null_mut() } else { &mut out });
                    let rc = self.judge("ringest_mapped_alloc", rc.into(), !no_out);
                    self.born(Mapped, rc, out);
                }
                1 => drop(self.sure("ringest_mapped_size", ringest_mapped_size(handle), live)),
                2 => {
                    let rc = ringest_mapped_host_ptr(handle, if no_out { null_mut() } else { &mut host });
                    self.sure("ringest_mapped_host_ptr", rc.into(), ok);
                }
                3 => {
                    let rc = ringest_mapped_device_ptr(handle, if no_out { null_mut() } else { &mut number });
                    self.sure("ringest_mapped_device_ptr", rc.into(), ok);
                }
                5 => drop(self.sure("ringest_mapped_pinned", ringest_mapped_pinned(handle).into(), live)),
                6 => {
                    let gpu = self.gpu();
                    let rc = ringest_mapped_device_ptr_on(handle, gpu, if no_out { null_mut() } else { &mut number });
                    self.judge("ringest_mapped_device_ptr_on", rc.into(), ok);
                }
                4 => {
                    if self.sure("ringest_mapped_free", ringest_mapped_free(handle).into(), live) == 0 {
                        self.died(Mapped, handle);
                    }
                }
                _ => {
                    let mut out = null_mut();
                    let rc = ringest_mapped_share(handle, if no_out { null_mut() } else { &mut out });
                    let rc = self.sure("ringest_mapped_share", rc.into(), ok);
                    self.born(Buffer, rc, out);
                }
            }
        }
    }

    unsafe fn buffers(&mut self) {
        let (handle, live) = self.pick::<ringest_buffer>(Buffer);
        let no_out = self.random.one_in(12);
        let ok = live && !no_out;
        let mut out: *mut ringest_buffer = null_mut();
        let place: *mut *mut ringest_buffer = if no_out { null_mut() } else { &mut out };
        let mut number = 0u64;
        let mut host = null_mut();
        let device = self.random.of(&[0, 1 << 40, u64::MAX - 100]);
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(13) {
                0 => {
                    let base = if self.random.one_in(8) { null_mut() } else { page(OWNED) };
                    let len = self.random.of(&[OWNED, OWNED, 1, 5000, 0]);
                    let rc = ringest_buffer_from_host(base.cast(), len, device, place);
                    let rc = self.judge("ringest_buffer_from_host", rc.into(), !no_out && !base.is_null() && len > 0);
                    self.born(Buffer, rc, out);
                }
                kind @ 1..=2 => {
                    let mut owner =
                        Box::new(Owner { memory: page(OWNED), released: AtomicU32::new(0), adopted: false });
                    let base = if self.random.one_in(8) { null_mut() } else { owner.memory.cast() };
                    let len = self.random.of(&[OWNED, OWNED, 1, 5000, 0]);
                    let function: ringest_release_fn = if self.random.one_in(8) { None } else { Some(release) };
                    let user = (&raw mut *owner).cast();
                    let (name, rc) = if kind == 1 {
                        let rc = ringest_buffer_from_host_owner(base, len, device, function, user, place);
                        ("ringest_buffer_from_host_owner", rc)
                    } else {
                        let rc = ringest_buffer_from_bar1_peer(base, len, device, function, user, place);
                        ("ringest_buffer_from_bar1_peer", rc)
                    };
                    owner.adopted = rc == 0;
                    self.owners.push(Box::leak(owner));
                    let valid =
                        !no_out && !base.is_null() && len > 0 && function.is_some() && (kind == 1 || device > 0);
                    let rc = self.judge(name, rc.into(), valid);
                    self.born(Buffer, rc, out);
                }
                3 => {
                    let (offset, len) = (self.place(), self.length());
                    let rc = ringest_buffer_sub_region(handle, offset, len, place);
                    let rc = self.judge("ringest_buffer_sub_region", rc.into(), ok);
                    self.born(Buffer, rc, out);
                }
                4 => {
                    let rc = self.sure("ringest_buffer_duplicate", ringest_buffer_duplicate(handle, place).into(), ok);
                    self.born(Buffer, rc, out);
                }
                5 => drop(self.sure("ringest_buffer_size", ringest_buffer_size(handle), live)),
                6 => drop(self.sure("ringest_buffer_kind", ringest_buffer_kind(handle).into(), live)),
                7 => {
                    let rc = ringest_buffer_host_ptr(handle, if no_out { null_mut() } else { &mut host });
                    self.sure("ringest_buffer_host_ptr", rc.into(), ok);
                }
                8 => {
                    let rc = ringest_buffer_device_ptr(handle, if no_out { null_mut() } else { &mut number });
                    self.sure("ringest_buffer_device_ptr", rc.into(), ok);
                }
                9 => {
                    let gpu = self.gpu();
                    let rc = ringest_buffer_device_ptr_on(handle, gpu, if no_out { null_mut() } else { &mut number });
                    self.judge("ringest_buffer_device_ptr_on", rc.into(), ok);
                }
                10 => {
                    let rc = ringest_buffer_check_gpu(handle, self.gpu());
                    self.judge("ringest_buffer_check_gpu", rc.into(), live);
                }
                _ => {
                    if self.judge("ringest_buffer_release", ringest_buffer_release(handle).into(), live) == 0 {
                        self.died(Buffer, handle);
                    }
                }
            }
        }
    }

    unsafe fn files(&mut self) {
        let (handle, live) = self.pick::<ringest_file>(File);
        let no_out = self.random.one_in(12);
        let mut out = null_mut();
        let place = if no_out { null_mut() } else { &raw mut out };
        let mode = self.random.of(&[0, 0, 1, 2, 3, u32::MAX]);
        let (mut memory, mut offset) = (0, 0);
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(6) {
                0 => {
                    let path = self.random.below(self.shared.paths.len() + 1);
                    let path = self.shared.paths.get(path).map_or(null(), |path| path.as_ptr());
                    let rc = ringest_file_open(path, mode, place);
                    let rc = self.judge("ringest_file_open", rc.into(), !no_out && !path.is_null() && mode <= 2);
                    self.born(File, rc, out);
                }
                1..=2 => {
                    let rc = ringest_file_from_fd(self.fd(), mode, place);
                    let rc = self.judge("ringest_file_from_fd", rc.into(), !no_out && mode <= 2);
                    self.born(File, rc, out);
                }
                3 => drop(self.sure("ringest_file_size", ringest_file_size(handle), live)),
                4 => {
                    let rc = ringest_file_direct(handle, if no_out { null_mut() } else { &mut memory }, &mut offset);
                    self.sure("ringest_file_direct", rc.into(), live);
                }
                _ => {
                    if self.sure("ringest_file_close", ringest_file_close(handle).into(), live) == 0 {
                        self.died(File, handle);
                    }
                }
            }
        }
    }

    unsafe fn lines(&mut self) {
        let (handle, live) = self.pick::<ringest_tail_line>(Line);
        let no_out = self.random.one_in(12);
        let ok = live && !no_out;
        let mut out = null_mut();
        let place = if no_out { null_mut() } else { &raw mut out };
        let (mut words, mut number) = (null(), 0u64);
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(6) {
                0 => {
                    let rc = self.sure("ringest_tail_line_alloc", ringest_tail_line_alloc(place).into(), !no_out);
                    self.born(Line, rc, out);
                }
                1..=2 => {
                    let (buffer, valid) = self.pick::<ringest_buffer>(Buffer);
                    let offset = self.random.of(&[0, 0, 128, 4096, 64, 1, usize::MAX - 127]);
                    let rc = ringest_tail_line_in_buffer(buffer, offset, place);
                    let rc = self.judge("ringest_tail_line_in_buffer", rc.into(), valid && !no_out);
                    self.born(Line, rc, out);
                }
                3 => {
                    let rc = ringest_tail_line_host_ptr(handle, if no_out { null_mut() } else { &mut words });
                    self.sure("ringest_tail_line_host_ptr", rc.into(), ok);
                }
                4 => {
                    let rc = ringest_tail_line_device_ptr(handle, if no_out { null_mut() } else { &mut number });
                    self.sure("ringest_tail_line_device_ptr", rc.into(), ok);
                }
                _ => {
                    if self.sure("ringest_tail_line_free", ringest_tail_line_free(handle).into(), live) == 0 {
                        self.died(Line, handle);
                    }
                }
            }
        }
    }

    unsafe fn rings(&mut self) {
        let (handle, live) = self.pick::<ringest_ring>(Ring);
        let no_out = self.random.one_in(12);
        let mut out = null_mut();
        let mut features = ringest_features::default();
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(6) {
                0..=2 => {
                    let raw = self.options(32, |random, at| match at {
                        // Polled rings are dear: a thread each.
                        4 if random.one_in(8) => random.of(&[1, 3, 2, 4, 32, u32::MAX]),
                        4 => random.of(&[0, 8, 8, 16, 24]),
                        8 => random.of(&[1, 2, 8, 100, 512, 32_769, u32::MAX]),
                        12 => random.of(&[1, 16, 128, 256, 4096, 65_537, u32::MAX]),
                        16 => random.of(&[1, 10]),
                        20 => random.of(&[0, 1, 100_000]),
                        24 => random.of(&[1, 2, 8, 16_384, 16_385]),
                        _ => random.of(&[0, 0, 0, 1]),
                    });
                    let options = if self.random.one_in(3) { null() } else { (&raw const raw).cast() };
                    let rc = ringest_ring_create(options, if no_out { null_mut() } else { &mut out });
                    let rc = self.judge("ringest_ring_create", rc.into(), !no_out);
                    self.born(Ring, rc, out);
                }
                3 => {
                    let rc = ringest_ring_features(handle, if no_out { null_mut() } else { &mut features });
                    self.judge("ringest_ring_features", rc.into(), live && !no_out);
                }
                4 => drop(self.judge("ringest_ring_fd", ringest_ring_fd(handle).into(), live)),
                _ => {
                    if self.judge("ringest_ring_destroy", ringest_ring_destroy(handle).into(), live) == 0 {
                        self.died(Ring, handle);
                    }
                }
            }
        }
    }

    unsafe fn registrations(&mut self) {
        let (ring, live) = self.pick::<ringest_ring>(Ring);
        let index = self.random.of(&[0, 0, 1, 2, 7, u32::MAX]);
        let mut out = null_mut();
        let no_out = self.random.one_in(12);
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(12) {
                0..=1 => {
                    let count = self.random.below(4);
                    let picked: Vec<_> = (0..count).map(|_| self.pick::<ringest_buffer>(Buffer)).collect();
                    let handles: Vec<_> = picked.iter().map(|&(handle, _)| handle.cast_const()).collect();
                    let list = if self.random.one_in(12) { null() } else { handles.as_ptr() };
                    let valid = live && count > 0 && !list.is_null() && picked.iter().all(|&(_, live)| live);
                    let rc = ringest_ring_register_buffers(ring, list, count as u32);
                    self.judge("ringest_ring_register_buffers", rc.into(), valid);
                }
                2 => {
                    let count = self.random.of(&[0, 1, 4, 8, 16_384, 16_385, u32::MAX]);
                    let rc = ringest_ring_register_buffers_sparse(ring, count);
                    self.judge("ringest_ring_register_buffers_sparse", rc.into(), live && count > 0);
                }
                3..=4 => {
                    let (buffer, valid) = self.pick::<ringest_buffer>(Buffer);
                    let rc = ringest_ring_update_buffer(ring, index, buffer);
                    self.judge("ringest_ring_update_buffer", rc.into(), live && (valid || buffer.is_null()));
                }
                5 => {
                    let rc = ringest_ring_unregister_buffers(ring);
                    self.judge("ringest_ring_unregister_buffers", rc.into(), live);
                }
                6 => {
                    let rc = ringest_ring_share_buffers(ring, if no_out { null_mut() } else { &mut out });
                    let rc = self.judge("ringest_ring_share_buffers", rc.into(), live && !no_out);
                    self.born(Shares, rc, out);
                }
                7 => {
                    let (source, valid) = self.pick::<ringest_shared_buffers>(Shares);
                    if self.random.one_in(3) {
                        let rc = ringest_shared_buffers_free(source);
                        if self.sure("ringest_shared_buffers_free", rc.into(), valid) == 0 {
                            self.died(Shares, source);
                        }
                    } else {
                        let rc = ringest_ring_clone_buffers(ring, source);
                        self.judge("ringest_ring_clone_buffers", rc.into(), live && valid);
                    }
                }
                8 => {
                    let fds: Vec<i32> = (0..self.random.below(4)).map(|_| self.fd()).collect();
                    let list = if self.random.one_in(12) { null() } else { fds.as_ptr() };
                    let rc = ringest_ring_register_files(ring, list, fds.len() as u32);
                    self.judge("ringest_ring_register_files", rc.into(), live && !fds.is_empty() && !list.is_null());
                }
                9 => {
                    let count = self.random.of(&[0, 1, 4, 8, 1 << 20, u32::MAX]);
                    let rc = ringest_ring_register_files_sparse(ring, count);
                    self.judge("ringest_ring_register_files_sparse", rc.into(), live && count > 0);
                }
                10 => {
                    let rc = ringest_ring_update_file(ring, index, self.fd());
                    self.judge("ringest_ring_update_file", rc.into(), live);
                }
                _ => {
                    let rc = ringest_ring_unregister_files(ring);
                    self.judge("ringest_ring_unregister_files", rc.into(), live);
                }
            }
        }
    }

    unsafe fn create_stream(&mut self) {
        let (ring, ring_live) = self.pick::<ringest_ring>(Ring);
        let (buffer, buffer_live) = self.pick::<ringest_buffer>(Buffer);
        let (line, line_live) = self.pick::<ringest_tail_line>(Line);
        let no_out = self.random.one_in(16);
        let raw = self.options(40, |random, at| match at {
            4 => random.of(&[0, 1, 2, 3, 4, 7, 8]),
            8 => random.of(&[1, 2, 8, 64, 4096, 65_537]),
            12 => random.of(&[1, 4, 64, 4096, 1 << 21]),
            16 => random.of(&[1, 255, 256]),
            20 => random.of(&[0, 0, 0, 1]),
            24 => random.of(&[1, 1000]),
            32 => random.of(&[1, 1_000_000]),
            _ => random.of(&[0, 0, 1]),
        });
        let options = if self.random.one_in(2) { null() } else { (&raw const raw).cast() };
        let mut out = null_mut();
        let place = if no_out { null_mut() } else { &raw mut out };
        // Words are never freed: a leaked stream may hold on to one.
        let word = page(64);
        let word = self.random.of(&[word, word, word, word, word.wrapping_add(1), null_mut()]);
        let aligned = !word.is_null() && (word as usize).is_multiple_of(8);
        // SAFETY: see `step`.
        let (name, rc, valid) = unsafe {
            match self.random.below(3) {
                0 => {
                    let rc = ringest_stream_create(ring, buffer, line, options, place);
                    ("ringest_stream_create", rc, line_live)
                }
                1 => {
                    let rc = ringest_stream_create_u64(ring, buffer, word.cast(), options, place);
                    ("ringest_stream_create_u64", rc, aligned)
                }
                _ => {
                    let rc = ringest_stream_create_u32(ring, buffer, word.cast(), options, place);
                    ("ringest_stream_create_u32", rc, aligned)
                }
            }
        };
        let rc = self.judge(name, rc.into(), valid && ring_live && buffer_live && !no_out);
        self.born(Stream, rc, out);
        if rc == 0 {
            self.streams.insert(out as usize, StreamModel::default());
        }
    }

    unsafe fn submit(&mut self) {
        let (stream, live) = self.pick::<ringest_stream>(Stream);
        let (fd, at, place, len) = (self.fd(), self.offset(), self.place(), self.length());
        let user = self.random.next();
        let index = self.random.of(&[0, 0, 1, 3, u32::MAX]);
        // SAFETY: see `step`.
        let (name, rc, valid) = unsafe {
            match self.random.below(7) {
                0..=1 => {
                    ("ringest_stream_submit_read", ringest_stream_submit_read(stream, fd, at, place, len, user), true)
                }
                2 => {
                    let (file, valid) = self.pick::<ringest_file>(File);
                    let rc = ringest_stream_submit_read_file(stream, file, at, place, len, user);
                    ("ringest_stream_submit_read_file", rc, valid)
                }
                3 => {
                    let rc = ringest_stream_submit_read_fixed_file(stream, index, at, place, len, user);
                    ("ringest_stream_submit_read_fixed_file", rc, true)
                }
                4 => {
                    let rc = ringest_stream_submit_read_fixed(stream, fd, at, index, place, len, user);
                    ("ringest_stream_submit_read_fixed", rc, true)
                }
                5 => {
                    let count = self.random.of(&[0, 1, 2, 3, 40, 1024, 1025]);
                    let range = |model: &mut Self, i: usize| ringest_range {
                        offset: if model.random.one_in(30) { model.place() as u64 } else { i as u64 * 16 },
                        len: if model.random.one_in(60) {
                            model.length() as u64
                        } else {
                            model.random.below(17) as u64
                        },
                    };
                    let ranges: Vec<_> = (0..count).map(|i| range(self, i)).collect();
                    let list = if self.random.one_in(12) { null() } else { ranges.as_ptr() };
                    let rc = ringest_stream_submit_read_scatter(stream, fd, at, list, count as u32, user);
                    let valid = !list.is_null() && (1..=1024).contains(&count);
                    ("ringest_stream_submit_read_scatter", rc, valid)
                }
                _ => {
                    let command = [0u8; 64];
                    let command = if self.random.one_in(4) { null() } else { command.as_ptr() };
                    let rc = ringest_stream_submit_nvme_passthrough(stream, fd, command, user);
                    ("ringest_stream_submit_nvme_passthrough", rc, false)
                }
            }
        };
        let rc = self.judge(name, rc, live && valid);
        if rc >= 0 {
            let model = self.streams.get_mut(&(stream as usize)).unwrap();
            assert_eq!(rc as u64, model.submitted, "sequence numbers count submissions");
            model.submitted += 1;
        }
    }

    unsafe fn drive(&mut self) {
        let (stream, live) = self.pick::<ringest_stream>(Stream);
        let submitted = self.streams.get(&(stream as usize)).map_or(0, |model| model.submitted);
        let near = self.random.next() % (submitted + 1);
        let sequence = self.random.of(&[near, near, near, 0, u64::MAX]);
        let no_out = self.random.one_in(12);
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(18) {
                0..=1 => drop(self.judge("ringest_stream_flush", ringest_stream_flush(stream), live)),
                2..=3 => drop(self.judge("ringest_stream_poll", ringest_stream_poll(stream), live)),
                4..=7 => {
                    let max = self.random.of(&[0, 1, 2, 16]);
                    let mut records = [ringest_completion::default(); 16];
                    let null = no_out && max > 0;
                    let place = if null { null_mut() } else { records.as_mut_ptr() };
                    let rc = ringest_stream_poll_into(stream, place, max);
                    let rc = self.judge("ringest_stream_poll_into", rc, live && !null);
                    assert!(rc <= i64::from(max));
                    for record in &records[..rc.max(0) as usize] {
                        assert!(record.sequence < submitted && record.bytes <= record.requested, "{record:?}");
                        assert_eq!(record.status == 0, record.bytes == record.requested, "{record:?}");
                        assert!(record.status <= 0 && record.bounced <= record.bytes && record.reserved == [0; 4]);
                    }
                }
                8..=9 => {
                    let min = self.random.of(&[0, 1, 2, u32::MAX]);
                    let time = self.random.of(&[0, 1, 200_000]);
                    self.judge("ringest_stream_wait", ringest_stream_wait(stream, min, time), live);
                }
                10 => {
                    let rc = ringest_stream_resubmit(stream, sequence);
                    self.judge("ringest_stream_resubmit", rc.into(), live && sequence < submitted);
                }
                11 => {
                    let rc = ringest_stream_skip(stream, sequence);
                    self.judge("ringest_stream_skip", rc.into(), live && sequence < submitted);
                }
                12 => {
                    let rc = ringest_stream_cancel(stream, sequence);
                    self.judge("ringest_stream_cancel", rc.into(), live && sequence < submitted);
                }
                13 => {
                    if self.random.one_in(2) {
                        self.judge("ringest_stream_cancel_all", ringest_stream_cancel_all(stream).into(), live);
                    } else if self.random.one_in(4) {
                        self.judge("ringest_stream_finish", ringest_stream_finish(stream).into(), live);
                    }
                }
                14 => {
                    let (buffer, valid) = self.pick::<ringest_buffer>(Buffer);
                    let rc = ringest_stream_replace_buffer(stream, buffer);
                    self.judge("ringest_stream_replace_buffer", rc.into(), live && valid);
                }
                15 => {
                    let inflight = self.sure("ringest_stream_inflight", ringest_stream_inflight(stream), live);
                    assert!(inflight <= submitted as i64);
                    self.sure("ringest_stream_is_registered", ringest_stream_is_registered(stream).into(), live);
                }
                16 => {
                    let tail = self.sure("ringest_stream_tail", ringest_stream_tail(stream), live);
                    if tail >= 0 {
                        let model = self.streams.get_mut(&(stream as usize)).unwrap();
                        assert!(
                            (model.tail..=model.submitted).contains(&(tail as u64)),
                            "the tail went back or too far"
                        );
                        model.tail = tail as u64;
                    }
                }
                _ => {
                    let mut stats = ringest_stream_counters::default();
                    let rc = ringest_stream_stats(stream, if no_out { null_mut() } else { &mut stats });
                    let rc = self.sure("ringest_stream_stats", rc.into(), live && !no_out);
                    if rc == 0 {
                        assert_eq!(stats.bytes, stats.registered_bytes + stats.plain_bytes);
                        assert!(stats.submitted >= submitted && stats.submitted >= stats.completed + stats.failed);
                    }
                }
            }
        }
    }

    unsafe fn end_stream(&mut self) {
        let (stream, live) = self.pick::<ringest_stream>(Stream);
        let time = if self.random.one_in(12) { 0 } else { self.random.of(&[-1, 1_000_000_000, i64::MIN]) };
        let (name, rc) = if self.random.one_in(8) {
            ("ringest_stream_destroy", ringest_stream_destroy(stream))
        } else {
            ("ringest_stream_close", ringest_stream_close(stream, time))
        };
        self.closed(name, stream, rc, live);
    }

    fn closed(&mut self, name: &str, stream: *mut ringest_stream, rc: i32, live: bool) {
        self.judge(name, rc.into(), live);
        if rc == 0 || rc == -libc::ETIMEDOUT {
            self.died(Stream, stream);
            self.streams.remove(&(stream as usize));
            self.leaks += u64::from(rc != 0);
        }
    }

    unsafe fn create_queue(&mut self) {
        let no_out = self.random.one_in(16);
        let raw = self.options(48, |random, at| match at {
            4 => random.of(&[2, 4, 8, 3, 131_072]),
            8 => random.of(&[1, 100, 4096, 10_000, u32::MAX]),
            12 => random.of(&[128, 4096, 64, 4 << 20]),
            16 => random.of(&[0, 1, 2, 3, 4]),
            20 => random.of(&[1, 1, 2, 3, 65_537]),
            24 => random.of(&[0, 1, 3]),
            28 => random.of(&[0, 0, 0, 1, 2, 3, 4]),
            32 => random.of(&[0, 0, 0, 0, 1]),
            _ => random.of(&[0, 0, 0, 0, 0, 1]),
        });
        let options = if self.random.one_in(4) { null() } else { (&raw const raw).cast() };
        let mut out = null_mut();
        let place = if no_out { null_mut() } else { &raw mut out };
        let mut sizes = ringest_io_queue_sizes::default();
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(6) {
                0 => {
                    let rc = ringest_io_queue_layout(options, if no_out { null_mut() } else { &mut sizes });
                    self.judge("ringest_io_queue_layout", rc.into(), !no_out);
                }
                1..=2 => {
                    let parts: Vec<_> = (0..4).map(|_| self.pick::<ringest_buffer>(Buffer)).collect();
                    let [control, credit, device, slots] = std::array::from_fn(|part| parts[part].0.cast_const());
                    let rc = ringest_io_queue_create_in(options, control, credit, device, slots, place);
                    let valid = !no_out && parts.iter().all(|&(_, live)| live);
                    let rc = self.judge("ringest_io_queue_create_in", rc.into(), valid);
                    self.born(Queue, rc, out);
                }
                _ => {
                    let rc = ringest_io_queue_create(options, place);
                    let rc = self.judge("ringest_io_queue_create", rc.into(), !no_out);
                    self.born(Queue, rc, out);
                }
            }
        }
        if !out.is_null() {
            // Memory of buffers is also what reads and other queues write to.
            let exposed = self.log.last().is_some_and(|call| call.starts_with("ringest_io_queue_create_in"));
            self.queues.insert(out as usize, QueueModel { exposed, ..QueueModel::default() });
        }
    }

    unsafe fn use_queue(&mut self) {
        let (queue, live) = self.pick::<ringest_io_queue>(Queue);
        let no_out = self.random.one_in(12);
        let ok = live && !no_out;
        let key = queue as usize;
        let mut view = IoQueueView::default();
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(20) {
                0 if self.random.one_in(3) => {
                    let gpu = self.gpu();
                    let rc = ringest_io_queue_device_view_on(queue, gpu, if no_out { null_mut() } else { &mut view });
                    self.judge("ringest_io_queue_device_view_on", rc.into(), ok);
                }
                0 => {
                    let rc = ringest_io_queue_device_view(queue, if no_out { null_mut() } else { &mut view });
                    self.judge("ringest_io_queue_device_view", rc.into(), ok);
                }
                1 => {
                    let rc = ringest_io_queue_host_view(queue, if no_out { null_mut() } else { &mut view });
                    self.sure("ringest_io_queue_host_view", rc.into(), ok);
                }
                2..=3 => {
                    let rc = ringest_io_queue_consumers_stopped(queue);
                    self.sure("ringest_io_queue_consumers_stopped", rc.into(), live);
                }
                4..=7 => {
                    let mut slot = ringest_slot::default();
                    let rc = ringest_io_queue_reserve(queue, if no_out { null_mut() } else { &mut slot });
                    if self.judge("ringest_io_queue_reserve", rc.into(), ok) == 0 {
                        let model = self.queues.get_mut(&key).unwrap();
                        assert!(!model.reserved.contains(&slot.sequence), "a sequence twice");
                        model.reserved.push(slot.sequence);
                        assert!(slot.bytes > 0 && slot.reserved == [0; 4]);
                        if !slot.data.is_null() {
                            slot.data.cast::<u8>().write_bytes(slot.sequence as u8, slot.bytes as usize);
                        }
                    }
                }
                8..=11 => {
                    let waiting = self.queues.get(&key).map_or(Vec::new(), |model| model.reserved.clone());
                    let sequence = match self.random.below(8) {
                        0 => self.random.of(&[0, 1, 7, u64::MAX]),
                        _ if waiting.is_empty() => 0,
                        _ => waiting[self.random.below(waiting.len())],
                    };
                    let file_offset = self.offset();
                    let data = ringest_slot_data {
                        status: self.random.of(&[0, 0, 0, -5, 1, i32::MIN]),
                        bytes: self.random.of(&[0, 1, 100, 100, 20_000, u32::MAX]),
                        tag: self.random.next(),
                        file_offset,
                        data_offset: self.random.of(&[file_offset as u32 % 16, 0, 5, u32::MAX]),
                        flags: self.random.of(&[0, 0, 1, 2]),
                        ..ringest_slot_data::default()
                    };
                    let place = if no_out { null() } else { &raw const data };
                    let rc = ringest_io_queue_publish(queue, sequence, place);
                    if self.judge("ringest_io_queue_publish", rc.into(), ok && waiting.contains(&sequence)) == 0 {
                        self.queues.get_mut(&key).unwrap().reserved.retain(|&other| other != sequence);
                    }
                }
                12 => {
                    if self.random.one_in(4) {
                        let rc = ringest_io_queue_finish(queue);
                        assert!(self.sure("ringest_io_queue_finish", rc.into(), live) <= 1);
                    }
                }
                13 => {
                    if self.random.one_in(4) {
                        let error = self.random.of(&[5, 4095, 0, -5, 4096]);
                        let rc = ringest_io_queue_abort(queue, error);
                        self.sure("ringest_io_queue_abort", rc.into(), live && (1..=4095).contains(&error));
                    }
                }
                14 => {
                    let rc = ringest_io_queue_aborted(queue);
                    assert!(self.sure("ringest_io_queue_aborted", rc.into(), live) <= 4095);
                }
                15..=16 => {
                    let reserved = self.sure("ringest_io_queue_reserved", ringest_io_queue_reserved(queue), live);
                    let tail = self.sure("ringest_io_queue_tail", ringest_io_queue_tail(queue), live);
                    if live {
                        let model = self.queues.get_mut(&key).unwrap();
                        assert!(
                            (model.tail..=reserved as u64).contains(&(tail as u64)),
                            "the tail went back or too far"
                        );
                        assert!(model.reserved.iter().all(|&sequence| sequence >= tail as u64), "past what is open");
                        model.tail = tail as u64;
                    }
                }
                17 => drop(self.sure("ringest_io_queue_free_slots", ringest_io_queue_free_slots(queue), live)),
                _ => {
                    let rc = ringest_io_queue_destroy(queue);
                    if self.judge("ringest_io_queue_destroy", rc.into(), live) == 0 {
                        assert!(self.consumers.values().all(|consumer| consumer.queue != key), "a consumer has it");
                        self.died(Queue, queue);
                        self.queues.remove(&key);
                    }
                }
            }
        }
    }

    unsafe fn consume(&mut self) {
        let (consumer, live) = self.pick::<ringest_consumer>(Consumer);
        let no_out = self.random.one_in(12);
        let key = consumer as usize;
        let time = self.random.of(&[0, 1, 100_000]);
        let held = self.consumers.get(&key).map_or(Vec::new(), |model| model.held.clone());
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(if self.pools[Consumer as usize].live.is_empty() { 3 } else { 20 }) {
                0..=1 => {
                    let (queue, valid) = self.pick::<ringest_io_queue>(Queue);
                    let index = self.random.of(&[0, 0, 0, 1, 2, u32::MAX]);
                    let mut out = null_mut();
                    let rc = ringest_consumer_create(queue, index, if no_out { null_mut() } else { &mut out });
                    let rc = self.judge("ringest_consumer_create", rc.into(), valid && !no_out);
                    self.born(Consumer, rc, out);
                    if rc == 0 {
                        let queue = queue as usize;
                        self.consumers.insert(out as usize, ConsumerModel { queue, ..ConsumerModel::default() });
                    }
                }
                2..=9 => {
                    let mut popped = ringest_popped::default();
                    let place = if no_out { null_mut() } else { &raw mut popped };
                    let (name, rc) = if self.random.one_in(2) {
                        ("ringest_consumer_try_pop", ringest_consumer_try_pop(consumer, place))
                    } else {
                        ("ringest_consumer_wait_pop", ringest_consumer_wait_pop(consumer, time, place))
                    };
                    let rc = self.sure(name, rc.into(), live && !no_out);
                    assert!(rc <= 4, "no outcome");
                    if rc == 0 || rc == 3 {
                        let model = self.consumers.get_mut(&key).unwrap();
                        let exposed = self.queues[&model.queue].exposed;
                        let descriptor = popped.descriptor;
                        assert!(!model.held.contains(&popped.sequence) || exposed, "a sequence twice");
                        model.held.retain(|&other| other != popped.sequence);
                        model.held.push(popped.sequence);
                        assert_eq!((rc == 3, popped.bytes), (descriptor.status != 0, descriptor.bytes.into()));
                        assert_eq!((popped.data.is_null(), popped.reserved), (popped.bytes == 0, [0; 5]));
                        if !popped.data.is_null() {
                            // Every byte is readable.
                            let data = std::slice::from_raw_parts(popped.data.cast::<u8>(), popped.bytes as usize);
                            std::hint::black_box(data.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)));
                        }
                    }
                }
                10..=14 => {
                    let sequence = match self.random.below(6) {
                        0 => self.random.of(&[0, 1, 7, u64::MAX]),
                        _ if held.is_empty() => 3,
                        _ => held[self.random.below(held.len())],
                    };
                    let rc = ringest_consumer_release(consumer, sequence);
                    let valid = live && held.contains(&sequence);
                    // In memory that others write to, one slot may have been popped twice.
                    let exposed = self.consumers.get(&key).is_some_and(|model| self.queues[&model.queue].exposed);
                    assert!(rc == 0 || !valid || exposed, "not released: {rc}");
                    if self.judge("ringest_consumer_release", rc.into(), valid) == 0 || valid {
                        self.consumers.get_mut(&key).unwrap().held.retain(|&other| other != sequence);
                    }
                }
                15 => {
                    let n = self.random.of(&[0, 1, 5, NO_SEQUENCE]);
                    let rc = ringest_consumer_wait_tail(consumer, n, time);
                    assert!(self.sure("ringest_consumer_wait_tail", rc.into(), live) <= 4);
                }
                16 => {
                    let rc = ringest_consumer_hand_back(consumer);
                    assert!(self.sure("ringest_consumer_hand_back", rc.into(), live) <= 1);
                }
                17 => {
                    let rc = ringest_consumer_error(consumer);
                    assert!(self.sure("ringest_consumer_error", rc.into(), live) <= 4095);
                    if self.random.one_in(8) {
                        let error = self.random.of(&[5, 0, -1, 4096]);
                        let rc = ringest_consumer_abort(consumer, error);
                        self.sure("ringest_consumer_abort", rc.into(), live && error == 5);
                    }
                }
                _ => {
                    let rc = ringest_consumer_destroy(consumer);
                    if self.sure("ringest_consumer_destroy", rc.into(), live) == 0 {
                        self.died(Consumer, consumer);
                        self.consumers.remove(&key);
                    }
                }
            }
        }
    }

    unsafe fn create_driver(&mut self) {
        let (ring, ring_live) = self.pick::<ringest_ring>(Ring);
        let (queue, queue_live) = self.pick::<ringest_io_queue>(Queue);
        let no_out = self.random.one_in(16);
        let raw = self.options(48, |random, at| match at {
            4 => random.of(&[0, 1, 2, 3, 4, 8, 16]),
            8 => random.of(&[1, 2, 8, 64, 65_537]),
            12 => random.of(&[1, 4, 64, 1 << 21]),
            16 => random.of(&[1, 255, 256]),
            20 => random.of(&[0, 0, 0, 1]),
            24 | 32 => random.of(&[1, 1000]),
            40 => random.of(&[1, 1_000_000]),
            _ => random.of(&[0, 0, 1]),
        });
        // Not its times: nobody waits for years.
        let options = if self.random.one_in(2) { null() } else { (&raw const raw).cast() };
        let mut out = null_mut();
        let place = if no_out { null_mut() } else { &raw mut out };
        let valid = ring_live && queue_live && !no_out;
        // SAFETY: see `step`.
        unsafe {
            if self.random.one_in(8) {
                let rc = ringest_driver_create_gpudirect(ring, queue, options, place);
                self.judge("ringest_driver_create_gpudirect", rc.into(), false);
                return;
            }
            let rc = ringest_driver_create(ring, queue, options, place);
            let rc = self.judge("ringest_driver_create", rc.into(), valid);
            self.born(Driver, rc, out);
        }
        if !out.is_null() {
            self.drivers.insert(out as usize, DriverModel::default());
        }
    }

    fn a_request(&mut self) -> (ringest_ingest_request, bool) {
        let (file, live) = self.pick::<ringest_file>(File);
        let source = self.random.of(&[0, 0, 1, 1, 2, 3]);
        let request = ringest_ingest_request {
            file,
            file_offset: self.offset(),
            tag: self.random.next() % 4,
            timeout_ns: self.random.of(&[0, 0, 0, 1, 100_000, u64::MAX]),
            len: self.random.of(&[0, 1, 100, 4096, 9000, u32::MAX]),
            source,
            fd: self.fd(),
            file_index: self.random.of(&[0, 0, 1, u32::MAX]),
            reserved: self.random.of(&[[0; 2], [0; 2], [0; 2], [0, 1]]),
        };
        (request, request.reserved == [0; 2] && source <= 2 && (live || source != 0))
    }

    unsafe fn request(&mut self) {
        let (driver, live) = self.pick::<ringest_driver>(Driver);
        let least = self.drivers.get(&(driver as usize)).map_or(0, |model| model.least);
        let no_list = self.random.one_in(12);
        // SAFETY: see `step`.
        let next = unsafe {
            match self.random.below(4) {
                0..=1 => {
                    let (request, valid) = self.a_request();
                    let rc = ringest_driver_submit(driver, if no_list { null() } else { &request });
                    let rc = self.judge("ringest_driver_submit", rc, live && valid && !no_list);
                    assert!(rc < 0 || rc as u64 >= least, "numbers count requests");
                    if rc < 0 { least } else { rc as u64 + 1 }
                }
                2 => {
                    let requests: Vec<_> = (0..self.random.below(6)).map(|_| self.a_request()).collect();
                    let list: Vec<_> = requests.iter().map(|&(request, _)| request).collect();
                    let from = if no_list { null() } else { list.as_ptr() };
                    let rc = ringest_driver_submit_batch(driver, from, list.len() as u32);
                    let first = requests.first().is_none_or(|&(_, valid)| valid);
                    let valid = live && first && (!no_list || list.is_empty());
                    let rc = self.judge("ringest_driver_submit_batch", rc, valid).max(0);
                    assert!(requests.iter().take(rc as usize).all(|&(_, valid)| valid), "took what is wrong");
                    least + rc as u64
                }
                _ => {
                    let (file, valid) = self.pick::<ringest_file>(File);
                    let (at, len) = (self.offset(), self.random.of(&[0, 1, 10_000, 300_000, 1 << 40, u64::MAX]));
                    let rc = ringest_driver_submit_file(driver, file, at, len, 1);
                    let rc = self.judge("ringest_driver_submit_file", rc, live && valid);
                    assert!(rc < 0 || rc as u64 <= len);
                    least + u64::from(rc > 0)
                }
            }
        };
        if let Some(model) = self.drivers.get_mut(&(driver as usize)) {
            model.least = next;
        }
    }

    fn reported(&mut self, driver: *mut ringest_driver, records: &[ringest_ingest_completion]) {
        for record in records {
            let model = self.drivers.get_mut(&(driver as usize)).unwrap();
            assert!(model.reported.insert(record.request), "a request ended twice: {record:?}");
            assert!(record.bytes <= record.requested && record.status <= 0, "{record:?}");
            assert!(record.status < 0 || record.bytes == record.requested, "{record:?}");
            assert!(record.sequence != NO_SEQUENCE || record.status < 0, "whole without a slot: {record:?}");
            assert_eq!(record.reserved, [0; 4]);
        }
    }

    unsafe fn drive_driver(&mut self) {
        let (driver, live) = self.pick::<ringest_driver>(Driver);
        let no_out = self.random.one_in(12);
        let (min, max) = (self.random.of(&[0, 1, 2, u32::MAX]), self.random.of(&[0, 1, 2, 16]));
        let time = self.random.of(&[0, 1, 200_000]);
        let mut records = [ringest_ingest_completion::default(); 16];
        let null = no_out && max > 0;
        let place = if null { null_mut() } else { records.as_mut_ptr() };
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(20) {
                0..=1 => drop(self.judge("ringest_driver_poll", ringest_driver_poll(driver), live)),
                2..=6 => {
                    let rc = ringest_driver_poll_into(driver, place, max);
                    let rc = self.judge("ringest_driver_poll_into", rc, live && !null);
                    assert!(rc <= i64::from(max));
                    self.reported(driver, &records[..rc.max(0) as usize]);
                }
                7..=8 => drop(self.judge("ringest_driver_wait", ringest_driver_wait(driver, min, time), live)),
                9..=10 => {
                    let rc = ringest_driver_wait_into(driver, place, max, min, time);
                    let rc = self.judge("ringest_driver_wait_into", rc, live && !null);
                    assert!(rc <= i64::from(max));
                    self.reported(driver, &records[..rc.max(0) as usize]);
                }
                11 => drop(self.judge("ringest_driver_drain", ringest_driver_drain(driver, time).into(), live)),
                12 => {
                    let rc = ringest_driver_cancel(driver, self.random.next() % 4);
                    self.judge("ringest_driver_cancel", rc, live);
                }
                13 => drop(self.judge("ringest_driver_cancel_all", ringest_driver_cancel_all(driver), live)),
                14 => {
                    if self.random.one_in(4) {
                        self.judge("ringest_driver_finish", ringest_driver_finish(driver).into(), live);
                    }
                }
                15 => {
                    self.sure("ringest_driver_in_flight", ringest_driver_in_flight(driver), live);
                    self.sure("ringest_driver_queued", ringest_driver_queued(driver), live);
                    self.sure("ringest_driver_free_slots", ringest_driver_free_slots(driver), live);
                    self.sure("ringest_driver_held_slots", ringest_driver_held_slots(driver), live);
                    self.sure("ringest_driver_read_path", ringest_driver_read_path(driver).into(), live);
                    self.sure("ringest_driver_is_registered", ringest_driver_is_registered(driver).into(), live);
                }
                16..=17 => {
                    let mut counters = ringest_driver_counters::default();
                    let rc = ringest_driver_telemetry(driver, if no_out { null_mut() } else { &mut counters });
                    if self.sure("ringest_driver_telemetry", rc.into(), live && !no_out) == 0 {
                        let model = &self.drivers[&(driver as usize)];
                        let ended = counters.completed + counters.failed;
                        let open = counters.in_flight + counters.queued;
                        assert!(
                            model.reset || counters.submitted == ended + open,
                            "requests went missing: {counters:?}"
                        );
                        assert!(model.reset || counters.submitted >= model.least);
                        assert_eq!(counters.path_reads.iter().sum::<u64>(), counters.completed);
                        assert!(counters.poisoned_slots <= counters.published_slots);
                    }
                }
                18 => {
                    let rc = ringest_driver_reset_telemetry(driver);
                    if self.judge("ringest_driver_reset_telemetry", rc.into(), live) == 0 {
                        self.drivers.get_mut(&(driver as usize)).unwrap().reset = true;
                    }
                }
                _ => {
                    let mut view = IoQueueView::default();
                    let rc = ringest_driver_device_view(driver, if no_out { null_mut() } else { &mut view });
                    self.judge("ringest_driver_device_view", rc.into(), live && !no_out);
                }
            }
        }
    }

    unsafe fn end_driver(&mut self) {
        let (driver, live) = self.pick::<ringest_driver>(Driver);
        let time = if self.random.one_in(12) { 0 } else { self.random.of(&[-1, 1_000_000_000, i64::MIN]) };
        let mut counters = ringest_driver_counters::default();
        let place = if self.random.one_in(2) { null_mut() } else { &raw mut counters };
        // SAFETY: the place is one, or NULL.
        let (name, rc) = unsafe {
            if self.random.one_in(8) {
                ("ringest_driver_destroy", ringest_driver_destroy(driver))
            } else {
                ("ringest_driver_close", ringest_driver_close(driver, time, place))
            }
        };
        self.driver_closed(name, driver, rc, live);
        if name == "ringest_driver_close" && rc == 0 {
            assert!(counters.in_flight + counters.queued + counters.leaked_reads == 0, "{counters:?}");
        }
    }

    fn driver_closed(&mut self, name: &str, driver: *mut ringest_driver, rc: i32, live: bool) {
        self.judge(name, rc.into(), live);
        if rc == 0 || rc == -libc::ETIMEDOUT {
            self.died(Driver, driver);
            self.drivers.remove(&(driver as usize));
            self.leaks += u64::from(rc != 0);
        }
    }

    fn gpu(&mut self) -> u32 {
        self.random.of(&[0, 0, 0, 0, 1, 99, RINGEST_GPU_NONE])
    }

    unsafe fn gpus(&mut self) {
        let gpu = self.gpu();
        let mut info = std::mem::MaybeUninit::<ringest_gpu_info>::uninit();
        let no_out = self.random.one_in(4);
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(4) {
                0 => drop(self.judge("ringest_gpu_count", ringest_gpu_count().into(), true)),
                1 => drop(self.judge("ringest_gpu_driver_version", ringest_gpu_driver_version().into(), true)),
                2 => {
                    let rc = ringest_gpu_info(gpu, if no_out { null_mut() } else { info.as_mut_ptr() });
                    self.judge("ringest_gpu_info", rc.into(), !no_out);
                }
                _ => assert_eq!(ringest_gpu_leaks(), 0),
            }
        }
    }

    unsafe fn device_buffers(&mut self) {
        let (handle, live) = self.pick::<ringest_device_buffer>(Device);
        let no_out = self.random.one_in(12);
        let ok = live && !no_out;
        let mut out = null_mut();
        let place = if no_out { null_mut() } else { &raw mut out };
        let mut number = 0u64;
        let mut bytes = [3u8; 100];
        let data = if no_out { null_mut() } else { bytes.as_mut_ptr().cast() };
        let (gpu, offset, len) = (self.gpu(), self.place(), self.random.of(&[0, 1, 100]));
        let length = self.random.of(&[0, 1, 5000, 3 << 20, 1 << 60, usize::MAX]);
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(12) {
                0..=1 => {
                    let raw = self.options(32, |random, at| match at {
                        8 => random.of(&[1, 5000, 16 << 20]),
                        12 => random.of(&[0, 0, 0, 256]),
                        _ => random.of(&[0, 0, 0, 0, 1]),
                    });
                    let options = if self.random.one_in(2) { null() } else { (&raw const raw).cast() };
                    let rc = ringest_device_buffer_create(gpu, length, options, place);
                    let rc = self.judge("ringest_device_buffer_create", rc.into(), !no_out);
                    self.born(Device, rc, out);
                }
                2 => {
                    // Of memory that nobody else frees, there is none but what is not a GPU's.
                    let address = self.random.of(&[0, 1, 4096, &raw const bytes as u64, u64::MAX]);
                    let rc = ringest_device_buffer_from_ptr(gpu, address, length, place);
                    let rc = self.judge("ringest_device_buffer_from_ptr", rc.into(), false);
                    self.born(Device, rc, out);
                }
                3 => {
                    let rc = ringest_device_buffer_address(handle, if no_out { null_mut() } else { &mut number });
                    self.sure("ringest_device_buffer_address", rc.into(), ok);
                }
                4 => {
                    let size = self.sure("ringest_device_buffer_size", ringest_device_buffer_size(handle), live);
                    let capacity = ringest_device_buffer_capacity(handle);
                    assert!(self.sure("ringest_device_buffer_capacity", capacity, live) >= size || !live);
                }
                5 => {
                    let rc = ringest_device_buffer_grow(handle, length.min(64 << 20));
                    self.judge("ringest_device_buffer_grow", rc.into(), live);
                }
                6..=7 => {
                    let rc = ringest_device_buffer_copy_in(handle, offset, data, len);
                    self.judge("ringest_device_buffer_copy_in", rc.into(), live && (!no_out || len == 0));
                    let rc = ringest_device_buffer_copy_out(handle, offset, data, len);
                    self.judge("ringest_device_buffer_copy_out", rc.into(), live && (!no_out || len == 0));
                }
                8 => {
                    let rc = ringest_device_buffer_fill(handle, offset, len, 9);
                    self.judge("ringest_device_buffer_fill", rc.into(), live);
                }
                9 => {
                    let rc = ringest_device_buffer_export_dma_buf(handle, offset, 4096);
                    self.descriptor("ringest_device_buffer_export_dma_buf", rc, live);
                }
                _ => {
                    let rc = ringest_device_buffer_free(handle);
                    if self.sure("ringest_device_buffer_free", rc.into(), live) == 0 {
                        self.died(Device, handle);
                    }
                }
            }
        }
    }

    /// Judges a result that is a new descriptor, and closes it.
    fn descriptor(&mut self, name: &str, rc: i32, valid: bool) {
        if self.judge(name, rc.into(), valid) >= 0 {
            use std::os::fd::FromRawFd;
            // SAFETY: it is the caller's, and nobody else has it.
            drop(unsafe { OwnedFd::from_raw_fd(rc) });
        }
    }

    unsafe fn virtual_memory(&mut self) {
        let (vmm, vmm_live) = self.pick::<ringest_vmm>(Vmm);
        let (range, range_live) = self.pick::<ringest_vmm_range>(Range);
        let (memory, memory_live) = self.pick::<ringest_vmm_memory>(Memory);
        let no_out = self.random.one_in(12);
        let mut number = 0u64;
        let at = self.random.of(&[0, 0, GRANULE, 2 * GRANULE, 1, 1 << 40, usize::MAX]);
        let size = self.random.of(&[GRANULE, GRANULE, GRANULE, 2 * GRANULE, 0, 4096, usize::MAX & !(GRANULE - 1)]);
        let (kind, id) = (self.random.of(&[0, 0, 1, 1, 2, 3, 4]), self.random.of(&[0, 0, 0, 1, u32::MAX]));
        let raw = self.options(32, |random, at| match at {
            4 => random.of(&[0, 1, 2, 3, 4]),
            8 => random.of(&[0, 1, 2, 3, 4]),
            _ => random.of(&[0, 0, 0, 0, 1]),
        });
        let options = if self.random.one_in(2) { null() } else { (&raw const raw).cast() };
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(24) {
                0..=1 => {
                    let gpu = self.random.of(&[RINGEST_GPU_NONE, RINGEST_GPU_NONE, 0, 0, 1, 99]);
                    let mut out = null_mut();
                    let rc = ringest_vmm_create(gpu, if no_out { null_mut() } else { &mut out });
                    let rc = self.judge("ringest_vmm_create", rc.into(), !no_out);
                    self.born(Vmm, rc, out);
                }
                2 => {
                    if self.sure("ringest_vmm_destroy", ringest_vmm_destroy(vmm).into(), vmm_live) == 0 {
                        self.died(Vmm, vmm);
                    }
                }
                3 => {
                    let rc = ringest_vmm_granularity(vmm, options, self.random.of(&[0, 1, 2]));
                    self.judge("ringest_vmm_granularity", rc, vmm_live);
                }
                4..=6 => {
                    let alignment = self.random.of(&[1, 4096, GRANULE, 2 * GRANULE, 0, 3]);
                    let mut out = null_mut();
                    let place = if no_out { null_mut() } else { &raw mut out };
                    let rc = ringest_vmm_reserve(vmm, size.wrapping_mul(2), alignment, 0, place);
                    let rc = self.judge("ringest_vmm_reserve", rc.into(), vmm_live && !no_out);
                    self.born(Range, rc, out);
                }
                7 => {
                    let mapped = ringest_vmm_range_mapped(range);
                    let rc = ringest_vmm_range_release(range);
                    if self.judge("ringest_vmm_range_release", rc.into(), range_live) == 0 {
                        self.died(Range, range);
                    }
                    assert_eq!(rc == -libc::EBUSY, mapped > 0, "released {mapped} bytes of mappings: {rc}");
                }
                8 => {
                    let size = self.sure("ringest_vmm_range_size", ringest_vmm_range_size(range), range_live);
                    let mapped = self.sure("ringest_vmm_range_mapped", ringest_vmm_range_mapped(range), range_live);
                    assert!(mapped <= size);
                }
                9 => {
                    let rc = ringest_vmm_range_address(range, if no_out { null_mut() } else { &mut number });
                    self.sure("ringest_vmm_range_address", rc.into(), range_live && !no_out);
                }
                10..=12 => {
                    let from = self.random.of(&[0, 0, 0, GRANULE, 1]);
                    let rc = ringest_vmm_range_map(range, at, size, memory, from);
                    self.judge("ringest_vmm_range_map", rc.into(), range_live && memory_live);
                }
                13 => {
                    let rc = ringest_vmm_range_unmap(range, at, size);
                    self.judge("ringest_vmm_range_unmap", rc.into(), range_live);
                }
                14..=15 => {
                    let access = self.random.of(&[0, 1, 2, 3]);
                    let grants = [ringest_vmm_grant { location: kind, id, access, reserved: 0 }; 2];
                    let list = if no_out { null() } else { grants.as_ptr() };
                    let count = self.random.of(&[0, 1, 1, 2]);
                    let rc = ringest_vmm_range_set_access(range, at, size, list, count);
                    self.judge("ringest_vmm_range_set_access", rc.into(), range_live && !no_out && count > 0);
                }
                16 => {
                    let rc = ringest_vmm_range_access(range, at, kind, id);
                    assert!(self.judge("ringest_vmm_range_access", rc.into(), range_live) <= 2);
                }
                17 => {
                    let rc = ringest_vmm_range_export_dma_buf(range, at, size);
                    self.descriptor("ringest_vmm_range_export_dma_buf", rc, range_live);
                }
                18..=19 => {
                    let mut out = null_mut();
                    let rc = ringest_vmm_alloc_physical(vmm, size, options, if no_out { null_mut() } else { &mut out });
                    let rc = self.judge("ringest_vmm_alloc_physical", rc.into(), vmm_live && !no_out);
                    self.born(Memory, rc, out);
                }
                20 => {
                    // Of no memory: what the driver would do with it is its own matter.
                    let fd = self.random.of(&[-1, i32::MIN, self.shared.file.as_raw_fd()]);
                    let mut out = null_mut();
                    let rc = ringest_vmm_import_fd(vmm, fd, size, if no_out { null_mut() } else { &mut out });
                    let rc = self.judge("ringest_vmm_import_fd", rc.into(), vmm_live && !no_out && fd >= 0);
                    self.born(Memory, rc, out);
                }
                21 => {
                    self.sure("ringest_vmm_memory_size", ringest_vmm_memory_size(memory), memory_live);
                    let rc = ringest_vmm_memory_export_fd(memory);
                    self.descriptor("ringest_vmm_memory_export_fd", rc, memory_live);
                }
                _ => {
                    let mapped = ringest_vmm_memory_is_mapped(memory);
                    self.sure("ringest_vmm_memory_is_mapped", mapped.into(), memory_live);
                    let rc = ringest_vmm_memory_free(memory);
                    if self.judge("ringest_vmm_memory_free", rc.into(), memory_live) == 0 {
                        self.died(Memory, memory);
                    }
                    assert_eq!(rc == -libc::EBUSY, mapped == 1, "freed while mapped: {rc}");
                }
            }
        }
    }

    unsafe fn library(&mut self) {
        let mut stats = ringest_leaks::default();
        let mut crc = 0;
        let no_out = self.random.one_in(4);
        let data = [1u8; 100];
        // SAFETY: see `step`.
        unsafe {
            match self.random.below(4) {
                0 => {
                    let rc = ringest_leak_stats(if no_out { null_mut() } else { &mut stats });
                    if self.sure("ringest_leak_stats", rc.into(), !no_out) == 0 {
                        assert_eq!(stats.rings, self.leaked_before + self.leaks, "rings leaked");
                        assert_eq!(stats.queues, 0, "queues leaked");
                    }
                }
                1 => {
                    let place = if no_out { null_mut() } else { &raw mut crc };
                    let (from, len) =
                        self.random.of(&[(data.as_ptr(), 100), (data.as_ptr(), 0), (null(), 0), (null(), 1)]);
                    let rc = ringest_crc32c(7, from.cast(), len, place);
                    self.sure("ringest_crc32c", rc.into(), !no_out && (!from.is_null() || len == 0));
                }
                2 => {
                    let callback: ringest_log_fn = if self.random.one_in(2) { None } else { Some(take_log) };
                    let level = self.random.of(&[0, 1, 5, 6, u32::MAX]);
                    let rc = ringest_log_set_callback(callback, null_mut(), level);
                    self.judge("ringest_log_set_callback", rc.into(), level <= 5);
                }
                _ => {
                    let path = self.random.next() as u32;
                    assert!(!ringest_version().is_null() && !ringest_read_path_name(path).is_null());
                }
            }
        }
    }

    /// Gives everything up; nothing may stay behind.
    fn finish(&mut self) {
        for stream in self.pools[Stream as usize].live.clone() {
            let rc = ringest_stream_close(stream as *mut _, 20_000_000_000);
            self.closed("ringest_stream_close", stream as *mut _, rc, true);
            assert!(rc == 0 || rc == -libc::ETIMEDOUT);
        }
        for driver in self.pools[Driver as usize].live.clone() {
            // SAFETY: there is no place for telemetry.
            let rc = unsafe { ringest_driver_close(driver as *mut _, 20_000_000_000, null_mut()) };
            self.driver_closed("ringest_driver_close", driver as *mut _, rc, true);
            assert!(rc == 0 || rc == -libc::ETIMEDOUT);
        }
        for &queue in &self.pools[Queue as usize].live {
            assert_eq!(ringest_io_queue_consumers_stopped(queue as *mut _), 0);
        }
        let end = |family: Family, call: &dyn Fn(usize) -> i32| {
            for handle in self.pools[family as usize].live.clone() {
                let rc = call(handle);
                let held = family == Buffer && self.leaks > 0 && rc == -libc::EBUSY;
                assert!(rc == 0 || held, "{family:?} could not be given up: {rc}");
            }
            for pool in [&self.pools[family as usize].dead, &self.pools[family as usize].live] {
                let last = pool.iter().rev().take(4);
                last.for_each(|&handle| assert!(call(handle) == -libc::EBADF || self.leaks > 0));
            }
        };
        for &range in &self.pools[Range as usize].live {
            let size = ringest_vmm_range_size(range as *mut _) as usize;
            for at in (0..size).step_by(GRANULE).take(8) {
                let whole = |granules| ringest_vmm_range_unmap(range as *mut _, at, granules * GRANULE);
                let _ = (whole(1), whole(2));
            }
        }
        end(Device, &|handle| ringest_device_buffer_free(handle as *mut _));
        end(Range, &|handle| ringest_vmm_range_release(handle as *mut _));
        end(Memory, &|handle| ringest_vmm_memory_free(handle as *mut _));
        end(Vmm, &|handle| ringest_vmm_destroy(handle as *mut _));
        end(Consumer, &|handle| ringest_consumer_destroy(handle as *mut _));
        end(Queue, &|handle| ringest_io_queue_destroy(handle as *mut _));
        end(Ring, &|handle| ringest_ring_destroy(handle as *mut _));
        end(Line, &|handle| ringest_tail_line_free(handle as *mut _));
        end(Shares, &|handle| ringest_shared_buffers_free(handle as *mut _));
        end(File, &|handle| ringest_file_close(handle as *mut _));
        end(Buffer, &|handle| ringest_buffer_release(handle as *mut _));
        end(Mapped, &|handle| ringest_mapped_free(handle as *mut _));
        for owner in &self.owners {
            let released = owner.released.load(Ordering::SeqCst);
            let expected = u32::from(owner.adopted);
            let held = self.leaks > 0 && released == 0;
            assert!(released == expected || held, "an owner was told {released} times, not {expected}");
            if released > 0 {
                // SAFETY: the page is never unmapped, and nobody writes there any more.
                let bytes = unsafe { std::slice::from_raw_parts(owner.memory, OWNED) };
                assert!(bytes.iter().all(|&byte| byte == RELEASED), "written to after its release");
            }
            if !held {
                // SAFETY: given back, and nobody refers to it any more.
                unsafe { libc::munmap(owner.memory.cast(), OWNED) };
            }
        }
    }
}

fn sequence(shared: &Shared, seed: u64, leaked: &mut u64, log: &mut Vec<String>) {
    let mut model = Model {
        random: Random(seed),
        shared,
        pools: Default::default(),
        streams: HashMap::new(),
        queues: HashMap::new(),
        consumers: HashMap::new(),
        drivers: HashMap::new(),
        owners: Vec::new(),
        leaked_before: *leaked,
        leaks: 0,
        log: std::mem::take(log),
    };
    model.log.clear();
    let steps = 20 + model.random.below(180);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // Most sequences start with what reads need.
        if !model.random.one_in(8) {
            let (mut ring, mut mapped, mut buffer, mut stream) = (null_mut(), null_mut(), null_mut(), null_mut());
            // SAFETY: every out pointer is a valid place; the word is never freed.
            unsafe {
                assert_eq!(ringest_ring_create(null(), &mut ring), 0);
                assert_eq!(ringest_mapped_alloc(100_000, null(), &mut mapped), 0);
                assert_eq!(ringest_mapped_share(mapped, &mut buffer), 0);
                assert_eq!(ringest_stream_create_u64(ring, buffer, page(64).cast(), null(), &mut stream), 0);
            }
            model.born(Ring, 0, ring);
            model.born(Mapped, 0, mapped);
            model.born(Buffer, 0, buffer);
            model.born(Stream, 0, stream);
            model.streams.insert(stream as usize, StreamModel::default());
        }
        if model.random.one_in(2) {
            let (mut ring, mut queue, mut consumer, mut driver) = (null_mut(), null_mut(), null_mut(), null_mut());
            let size = size_of::<ringest_io_queue_options>() as u32;
            let options = ringest_io_queue_options { size, slots: 4, slot_bytes: 9000, ..Default::default() };
            // SAFETY: every out pointer is a valid place.
            unsafe {
                assert_eq!(ringest_ring_create(null(), &mut ring), 0);
                assert_eq!(ringest_io_queue_create(&options, &mut queue), 0);
                assert_eq!(ringest_consumer_create(queue, 0, &mut consumer), 0);
                assert_eq!(ringest_driver_create(ring, queue, null(), &mut driver), 0);
            }
            model.born(Ring, 0, ring);
            model.born(Queue, 0, queue);
            model.born(Consumer, 0, consumer);
            model.born(Driver, 0, driver);
            model.queues.insert(queue as usize, QueueModel::default());
            let queue = queue as usize;
            model.consumers.insert(consumer as usize, ConsumerModel { queue, ..ConsumerModel::default() });
            model.drivers.insert(driver as usize, DriverModel::default());
        }
        if model.random.one_in(3) {
            let (mut vmm, mut range, mut memory) = (null_mut(), null_mut(), null_mut());
            // SAFETY: every out pointer is a valid place.
            unsafe {
                if ringest_vmm_create(0, &mut vmm) != 0 {
                    assert_eq!(ringest_vmm_create(RINGEST_GPU_NONE, &mut vmm), 0);
                }
                assert_eq!(ringest_vmm_reserve(vmm, 4 * GRANULE, GRANULE, 0, &mut range), 0);
                model.born(Vmm, 0, vmm);
                model.born(Range, 0, range);
                if ringest_vmm_alloc_physical(vmm, GRANULE, null(), &mut memory) == 0 {
                    model.born(Memory, 0, memory);
                }
            }
        }
        for _ in 0..steps {
            if model.random.one_in(24) {
                model.log.push("on another thread:".to_owned());
                let anywhere = Anywhere(&mut model);
                let joined = std::thread::scope(|scope| scope.spawn(move || anywhere.step()).join());
                joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            } else if model.random.one_in(20) {
                // Something for the reads of the pipe.
                let bytes = [9u8; 100];
                // SAFETY: the bytes are readable; the pipe does not block.
                unsafe { libc::write(shared.pipe.1.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
            } else {
                model.step();
            }
        }
        model.finish();
    }));
    *leaked += model.leaks;
    *log = std::mem::take(&mut model.log);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        }
        .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

#[test]
fn random_call_sequences_keep_the_contract() {
    fuzz(1);
}

#[test]
fn random_call_sequences_keep_the_contract_with_gpus() {
    let name = test_name!();
    let environment = [("FAKE_CUDA_DEVICES", "2")];
    let outcome = common::gpu::with_fake(name, &[], &environment, || {
        fuzz(4);
        assert_eq!(common::gpu::Fake::get().misuses(), (0, String::new()));
    });
    if let Err(reason) = outcome {
        common::print_skip(name, &reason);
    }
}

/// As many sequences as are wanted, or a part of them.
fn fuzz(part: u64) {
    let mut ring = null_mut();
    // SAFETY: `ring` is a place for a handle.
    if unsafe { ringest_ring_create(null(), &mut ring) } != 0 {
        // SAFETY: never NULL.
        println!("SKIP abi fuzz: {}", unsafe { CStr::from_ptr(ringest_last_error()) }.to_string_lossy());
        return;
    }
    assert_eq!(ringest_ring_destroy(ring), 0);
    let unoptimised =
        std::env::current_exe().is_ok_and(|path| path.components().any(|part| part.as_os_str() == "debug"));
    let count = number("RINGEST_FUZZ_SEQUENCES").unwrap_or(if unoptimised { 300 } else { 3000 });
    let replay = number("RINGEST_FUZZ_SEED");
    let base = replay.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
    });
    let shared = Shared::new();
    let current = AtomicU64::new(base);
    let done = std::sync::atomic::AtomicBool::new(false);
    let started = Instant::now();
    let sequences = if replay.is_some() { 1 } else { count / part };
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            // The watchdog: no sequence takes this long.
            let (mut seen, mut since) = (current.load(Ordering::Relaxed), Instant::now());
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
                let now = current.load(Ordering::Relaxed);
                if now != seen {
                    (seen, since) = (now, Instant::now());
                } else if since.elapsed() > Duration::from_secs(60) {
                    eprintln!("hang in RINGEST_FUZZ_SEED={now:#x}");
                    std::process::abort();
                }
            }
        });
        let mut leaked = 0;
        let mut log = Vec::new();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for number in 0..sequences {
                let seed = if number == 0 { base } else { Random(base.wrapping_add(number)).next() };
                current.store(seed, Ordering::Relaxed);
                sequence(&shared, seed, &mut leaked, &mut log);
            }
        }));
        done.store(true, Ordering::Relaxed);
        if outcome.is_err() {
            let from = log.len().saturating_sub(30);
            eprintln!("the last calls:\n{}", log[from..].join("\n"));
            eprintln!("replay with RINGEST_FUZZ_SEED={:#x}", current.load(Ordering::Relaxed));
        }
        outcome
    });
    std::fs::remove_dir_all(&shared.directory).unwrap();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    let calls = shared.calls.load(Ordering::Relaxed);
    let seen = shared.seen.lock().unwrap().len();
    let seconds = started.elapsed().as_secs_f64();
    println!("figure: abi fuzz {sequences} sequences, {calls} calls, {seen} different results, {seconds:.1} s");
}
