//! Rings.

use super::buffer::ringest_buffer;
use super::driver::{DriverObject, ringest_driver};
use super::handle::{Exclusive, Family, Shared, Table, create, exclusive, last, shared};
use super::options::{self, Options, known_flags};
use super::stream::{StreamObject, ringest_stream};
use super::{Failure, Outcome, elements, status, store, value};
use crate::error::PipelineError;
use crate::memory::GpuMappedBuffer;
use crate::uring::{IoUringState, RingOptions, RingRegistrations, SharedBuffers, SqPoll};

/// An io_uring with its registered buffers and files. Belongs to the thread that created it, unless movable; one call at a
/// time (-EBUSY otherwise).
///
/// A stream or a driver takes it over (ringest_stream_create, ringest_driver_create); the handle then still serves for
/// registrations, and has the ring back when that is closed. Closed without its ring (the kernel kept reads, or the
/// owner had exited), the ring is gone.
pub struct ringest_ring {
    _opaque: (),
}

/// Where the ring of a handle is.
pub(super) enum Place {
    /// Free to be taken over.
    Here(Box<IoUringState>),
    /// In this stream.
    Stream(*mut ringest_stream),
    /// In this driver.
    Driver(*mut ringest_driver),
    /// Gone with what had it: leaked, or its thread had exited.
    Gone,
}

impl Place {
    /// Why the ring cannot be taken over.
    fn refusal(&self) -> Failure {
        let (errno, message) = match self {
            Self::Here(_) => unreachable!("it can"),
            Self::Stream(_) => (libc::EBUSY, "a stream has the ring: close the stream first"),
            Self::Driver(_) => (libc::EBUSY, "a driver has the ring: close the driver first"),
            Self::Gone => (libc::ENODEV, "the ring went with what had it and could not give it back: create another"),
        };
        Failure::new(errno, message)
    }
}

/// Makes something that takes a ring over, and its handle. When that fails, the ring stays with its own.
pub(super) fn lend<F: Family>(
    ring: *mut ringest_ring,
    holder: fn(*mut F) -> Place,
    make: impl FnOnce(IoUringState) -> Result<F::Object, (Box<IoUringState>, PipelineError)>,
) -> Outcome<*mut F> {
    let mut place = exclusive(ring.cast_const())?;
    let mut state = match std::mem::replace(&mut *place, Place::Gone) {
        Place::Here(state) => state,
        other => {
            let refusal = other.refusal();
            *place = other;
            return Err(refusal);
        }
    };
    state.adopt_if_movable();
    let mut back = Some(state);
    let handle = create::<F>(|| {
        let Some(state) = back.take() else { unreachable!("called once") };
        make(*state).map_err(|(state, error)| {
            back = Some(state);
            error.into()
        })
    });
    *place = match (&handle, back) {
        (Ok(handle), _) => holder(*handle),
        (Err(_), Some(state)) => Place::Here(state),
        (Err(_), None) => Place::Gone,
    };
    handle
}

/// Puts a ring back behind its handle, which cannot be destroyed meanwhile; `None` and an error: it is gone. A call that
/// looks at the handle is over at once: it finds a stream or driver that is no more.
pub(super) fn give_back(ring: *mut ringest_ring, left: crate::Result<Option<IoUringState>>) -> Outcome<()> {
    let (place, outcome) = match left {
        Ok(Some(state)) => (Place::Here(Box::new(state)), Ok(())),
        Ok(None) => (Place::Gone, Ok(())),
        Err(error) => (Place::Gone, Err(error.into())),
    };
    let mut place = Some(place);
    while let Some(returned) = place.take() {
        match exclusive(ring.cast_const()) {
            Ok(mut entry) => *entry = returned,
            Err(failure) if failure.errno() == libc::EBUSY => {
                std::thread::yield_now();
                place = Some(returned);
            }
            Err(_) => {}
        }
    }
    outcome
}

static TABLE: Table<Place> = Table::new(5, "ringest_ring");

impl Family for ringest_ring {
    type Object = Place;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// A kernel thread polls the submission queue.
pub const RINGEST_RING_SQPOLL: u32 = 1 << 0;
/// It is bound to sqpoll_cpu.
pub const RINGEST_RING_SQPOLL_CPU: u32 = 1 << 1;
/// Completions are polled for (O_DIRECT on devices with poll queues).
pub const RINGEST_RING_IOPOLL: u32 = 1 << 2;
/// Any thread may use the ring and what has it, one at a time.
pub const RINGEST_RING_MOVABLE: u32 = 1 << 3;
/// 128-byte SQEs and 32-byte CQEs, which NVMe passthrough needs.
pub const RINGEST_RING_BIG_ENTRIES: u32 = 1 << 4;

/// What a ring is asked for. All zero (with size set) means defaults.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_ring_options {
    /// sizeof(struct ringest_ring_options).
    pub size: u32,
    /// RINGEST_RING_* bits.
    pub flags: u32,
    /// Submission queue entries, rounded up to a power of two, at most 32768; 0: 64.
    pub entries: u32,
    /// Completion queue entries, at least entries, at most 65536; 0: twice entries.
    pub cq_entries: u32,
    /// With RINGEST_RING_SQPOLL: milliseconds without work before the thread sleeps; 0: one second.
    pub sqpoll_idle_ms: u32,
    /// With RINGEST_RING_SQPOLL_CPU: the CPU.
    pub sqpoll_cpu: u32,
    /// Entries of the kernel's buffer table, one per started GiB of each registered buffer, at most 16384; 0: 64.
    pub buffer_slots: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: repr(C), eight u32, size first.
unsafe impl Options for ringest_ring_options {}

fn ring_options(options: &ringest_ring_options) -> Outcome<RingOptions> {
    let &ringest_ring_options { flags, entries, cq_entries, sqpoll_idle_ms, sqpoll_cpu, buffer_slots, .. } = options;
    known_flags(
        flags,
        RINGEST_RING_SQPOLL
            | RINGEST_RING_SQPOLL_CPU
            | RINGEST_RING_IOPOLL
            | RINGEST_RING_MOVABLE
            | RINGEST_RING_BIG_ENTRIES,
    )?;
    options::zero(&[options.reserved.into()], "ringest_ring_options")?;
    let has = |flag| flags & flag != 0;
    if has(RINGEST_RING_SQPOLL_CPU) && !has(RINGEST_RING_SQPOLL) {
        return Err(Failure::new(libc::EINVAL, "RINGEST_RING_SQPOLL_CPU without RINGEST_RING_SQPOLL"));
    }
    let defaults = RingOptions::default();
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    Ok(RingOptions {
        entries: or(entries, defaults.entries),
        cq_entries,
        sqpoll: has(RINGEST_RING_SQPOLL)
            .then(|| SqPoll { idle_ms: sqpoll_idle_ms, cpu: has(RINGEST_RING_SQPOLL_CPU).then_some(sqpoll_cpu) }),
        iopoll: has(RINGEST_RING_IOPOLL),
        movable: has(RINGEST_RING_MOVABLE),
        big_entries: has(RINGEST_RING_BIG_ENTRIES),
        buffer_slots: or(buffer_slots, defaults.buffer_slots),
    })
}

/// The kernel knows that one thread submits.
pub const RINGEST_FEATURE_SINGLE_ISSUER: u64 = 1 << 0;
/// Completion work runs when the owning thread asks for it.
pub const RINGEST_FEATURE_DEFER_TASKRUN: u64 = 1 << 1;
/// Completion work does not interrupt the thread.
pub const RINGEST_FEATURE_COOP_TASKRUN: u64 = 1 << 2;
/// The kernel flags pending completion work.
pub const RINGEST_FEATURE_TASKRUN_FLAG: u64 = 1 << 3;
/// A failing command does not stop a batch.
pub const RINGEST_FEATURE_SUBMIT_ALL: u64 = 1 << 4;
/// A kernel thread submits.
pub const RINGEST_FEATURE_SQPOLL: u64 = 1 << 5;
/// Completions are polled for.
pub const RINGEST_FEATURE_IOPOLL: u64 = 1 << 6;
/// 128-byte SQEs and 32-byte CQEs.
pub const RINGEST_FEATURE_BIG_ENTRIES: u64 = 1 << 7;
/// The ring's descriptor is registered with its thread.
pub const RINGEST_FEATURE_REGISTERED_RING: u64 = 1 << 8;
/// Buffer tables can be sparse and updated.
pub const RINGEST_FEATURE_SPARSE_BUFFERS: u64 = 1 << 9;
/// Vectored reads into registered memory.
pub const RINGEST_FEATURE_READV_FIXED: u64 = 1 << 10;
/// An optional flag was refused by the kernel and left out.
pub const RINGEST_FEATURE_FELL_BACK: u64 = 1 << 11;

/// What a ring really got.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_features {
    /// Submission queue entries.
    pub sq_entries: u32,
    /// Completion queue entries.
    pub cq_entries: u32,
    /// RINGEST_FEATURE_* bits.
    pub flags: u64,
    /// Zero.
    pub reserved: [u64; 6],
}

/// The ring of a handle, wherever it is, during a call.
enum Entered {
    Here(Exclusive<Place>),
    Stream(Exclusive<StreamObject>),
    Driver(Exclusive<DriverObject>),
}

impl Entered {
    fn new(handle: *const ringest_ring) -> Outcome<Self> {
        let place = exclusive(handle)?;
        let closing = |failure: Failure| match failure.errno() {
            libc::EBADF => Failure::new(libc::EBUSY, "what has the ring is being closed: wait for that"),
            _ => failure,
        };
        match *place {
            Place::Here(_) => Ok(Self::Here(place)),
            Place::Stream(stream) => exclusive(stream.cast_const()).map(Self::Stream).map_err(closing),
            Place::Driver(driver) => exclusive(driver.cast_const()).map(Self::Driver).map_err(closing),
            Place::Gone => Err(place.refusal()),
        }
    }

    fn ring(&self) -> &IoUringState {
        match self {
            Self::Here(place) => match &**place {
                Place::Here(ring) => ring,
                _ => unreachable!("checked on entry"),
            },
            Self::Stream(stream) => stream.stream.ring(),
            Self::Driver(driver) => driver.driver.ring(),
        }
    }

    fn ring_mut(&mut self) -> Outcome<RingRegistrations<'_>> {
        let ring = match self {
            Self::Here(place) => match &mut **place {
                Place::Here(ring) => ring,
                _ => unreachable!("checked on entry"),
            },
            Self::Stream(stream) => return Ok(stream.stream.enter().ring_mut()?),
            Self::Driver(driver) => return Ok(driver.driver.enter().ring_mut()?),
        };
        ring.adopt_if_movable();
        Ok(RingRegistrations::new(ring))
    }
}

/// Sets up a ring and stores a handle in *out. options may be NULL.
///
/// Flags that only make it faster are left out when the kernel refuses them (ringest_ring_features tells); what the
/// options ask for is not.
///
/// The calling thread owns the ring, unless RINGEST_RING_MOVABLE. Destroy with ringest_ring_destroy.
///
/// Errors: -EINVAL for options out of range or refused by the kernel, or out NULL; -E2BIG for an option struct with
/// unknown fields; -EPERM or -ENOSYS when io_uring is forbidden or not built in (the message names the cause);
/// -ENOMEM; -EMFILE; -EOPNOTSUPP on kernels before 5.11.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_ring_create(options: *const ringest_ring_options, out: *mut *mut ringest_ring) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let options = ring_options(&options::read(options)?)?;
        store(out, "out", || create(|| Ok(Place::Here(Box::new(IoUringState::new(options)?)))))
    })
}

/// Destroys a ring that is in no stream and no driver.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while a stream or driver has it, or another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_destroy(ring: *mut ringest_ring) -> i32 {
    status(|| {
        let place = last(ring)?;
        if matches!(*place, Place::Stream(_) | Place::Driver(_)) {
            return Err(place.refusal());
        }
        drop(place.take());
        Ok(())
    })
}

/// Stores what the ring really got.
///
/// Any thread, while no other is in a call with this ring or with what has it.
///
/// Errors: -EBADF; -EBUSY; -EINVAL when features is NULL; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_ring_features(ring: *const ringest_ring, features: *mut ringest_features) -> i32 {
    // SAFETY: `features` is null or valid by the C contract.
    status(|| unsafe {
        store(features, "features", || {
            let got = Entered::new(ring)?.ring().features();
            let bits = got.names().into_iter().enumerate().map(|(bit, (_, has))| u64::from(has) << bit);
            Ok(ringest_features {
                sq_entries: got.sq_entries,
                cq_entries: got.cq_entries,
                flags: bits.sum(),
                reserved: [0; 6],
            })
        })
    })
}

/// The ring's file descriptor, for poll(2) and the like. Not to be closed.
///
/// Any thread, while no other is in a call with this ring or with what has it.
///
/// Errors: -EBADF; -EBUSY; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_fd(ring: *const ringest_ring) -> i32 {
    value(|| Ok(Entered::new(ring)?.ring().fd().into())) as i32
}

/// Registers count buffers; the i-th gets index i. Their pages are pinned and count against RLIMIT_MEMLOCK.
///
/// The owning thread. The buffers' handles may be released afterwards, except those of wrapped memory.
///
/// Errors: -EBADF for any of the handles; -EBUSY when buffers are registered already; -EINVAL for none or buffers
/// NULL; -ENOMEM over RLIMIT_MEMLOCK; -EFAULT for file-backed, read-only or unmapped memory; -EOPNOTSUPP for device
/// memory; -EAGAIN when buffer_slots is too small; -EPERM on another thread; -ENODEV when the ring is gone. On
/// failure nothing is registered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_ring_register_buffers(
    ring: *mut ringest_ring,
    buffers: *const *const ringest_buffer,
    count: u32,
) -> i32 {
    status(|| {
        // SAFETY: `buffers` is null or has `count` elements by the C contract.
        let handles = unsafe { elements(buffers, count as usize, "buffers") }?;
        let entered = handles.iter().map(|&handle| shared(handle)).collect::<Outcome<Vec<Shared<_>>>>()?;
        let buffers: Vec<&GpuMappedBuffer<'static>> = entered.iter().map(|buffer| &***buffer).collect();
        Ok(Entered::new(ring)?.ring_mut()?.register_buffers(&buffers)?)
    })
}

/// Makes room for count buffers without registering any (Linux 5.19).
///
/// The owning thread.
///
/// Errors: -EBADF; -EBUSY when buffers are registered already; -EINVAL for 0 or more than 16384; -EOPNOTSUPP on older
/// kernels; -EPERM on another thread; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_register_buffers_sparse(ring: *mut ringest_ring, count: u32) -> i32 {
    status(|| Ok(Entered::new(ring)?.ring_mut()?.register_buffers_sparse(count)?))
}

/// Replaces the buffer at an index, or empties it (buffer NULL). Reads in flight keep the old memory.
///
/// The owning thread.
///
/// Errors: -EBADF; -ERANGE for an index beyond the table; those of ringest_ring_register_buffers. On failure the old
/// buffer stays.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_update_buffer(
    ring: *mut ringest_ring,
    index: u32,
    buffer: *const ringest_buffer,
) -> i32 {
    status(|| {
        let buffer = if buffer.is_null() { None } else { Some(shared(buffer)?) };
        Ok(Entered::new(ring)?.ring_mut()?.update_buffer(index, buffer.as_deref().map(|buffer| &**buffer))?)
    })
}

/// Unregisters all buffers. Reads in flight keep theirs until they end.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL when none are registered; -EBUSY before Linux 5.19 while reads use them; -EPERM on another
/// thread; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_unregister_buffers(ring: *mut ringest_ring) -> i32 {
    status(|| Ok(Entered::new(ring)?.ring_mut()?.unregister_buffers()?))
}

/// One ring's registered buffers, to be taken over by rings of other threads. Holds the registrations and the memory,
/// also when the ring is gone.
pub struct ringest_shared_buffers {
    _opaque: (),
}

static SHARED: Table<SharedBuffers> = Table::new(7, "ringest_shared_buffers");

impl Family for ringest_shared_buffers {
    type Object = SharedBuffers;
    fn table() -> &'static Table<Self::Object> {
        &SHARED
    }
}

/// Makes a handle by which rings of other threads can share this ring's registered buffers (Linux 6.12), and stores it
/// in *out. It takes a small ring of its own.
///
/// The owning thread. Free with ringest_shared_buffers_free.
///
/// Errors: -EBADF; -EINVAL when no buffers are registered or out is NULL; -EOPNOTSUPP on older kernels; -EMFILE; -ENOMEM;
/// -EPERM on another thread; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_ring_share_buffers(
    ring: *const ringest_ring,
    out: *mut *mut ringest_shared_buffers,
) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            create::<ringest_shared_buffers>(|| Ok(Entered::new(ring)?.ring_mut()?.share_buffers()?))
        })
    })
}

/// Gives the handle up. Rings that took the registrations over keep them.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY while another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_shared_buffers_free(buffers: *mut ringest_shared_buffers) -> i32 {
    status(|| {
        drop(last(buffers.cast_const())?.take());
        Ok(())
    })
}

/// Takes over the registered buffers of another ring under the same indices. The pages are pinned, and charged to
/// RLIMIT_MEMLOCK, once.
///
/// The owning thread.
///
/// Errors: -EBADF for either handle; -EBUSY when ring has buffers;
/// -EOPNOTSUPP on kernels before 6.12; -EPERM on another thread; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_clone_buffers(ring: *mut ringest_ring, source: *const ringest_shared_buffers) -> i32 {
    status(|| {
        let source = shared(source)?;
        Ok(Entered::new(ring)?.ring_mut()?.clone_buffers(&source)?)
    })
}

/// Registers count files by descriptor; the i-th gets index i. The kernel keeps them open.
///
/// The owning thread.
///
/// Errors: -EBADF for the ring or a descriptor; -EBUSY when files are registered already; -EINVAL for none or fds
/// NULL; -EMFILE over RLIMIT_NOFILE; -EPERM on another thread; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_ring_register_files(ring: *mut ringest_ring, fds: *const i32, count: u32) -> i32 {
    status(|| {
        // SAFETY: `fds` is null or has `count` elements by the C contract.
        let fds = unsafe { elements(fds, count as usize, "fds") }?;
        Ok(Entered::new(ring)?.ring_mut()?.register_files(fds)?)
    })
}

/// Makes room for count files without registering any.
///
/// The owning thread.
///
/// Errors: -EBADF; -EBUSY when files are registered already; -EINVAL for 0; -EMFILE over RLIMIT_NOFILE; -EPERM on
/// another thread; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_register_files_sparse(ring: *mut ringest_ring, count: u32) -> i32 {
    status(|| Ok(Entered::new(ring)?.ring_mut()?.register_files_sparse(count)?))
}

/// Replaces the file at an index, or empties it (fd -1).
///
/// The owning thread.
///
/// Errors: -EBADF for the ring or the descriptor; -ERANGE for an index beyond the table; -EBUSY while a read of the old
/// file is unfinished; -EPERM on another thread; -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_update_file(ring: *mut ringest_ring, index: u32, fd: i32) -> i32 {
    status(|| Ok(Entered::new(ring)?.ring_mut()?.update_file(index, (fd != -1).then_some(fd))?))
}

/// Unregisters all files.
///
/// The owning thread.
///
/// Errors: -EBADF; -EINVAL when none are registered; -EBUSY while a read of one is unfinished; -EPERM on another thread;
/// -ENODEV when the ring is gone.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_ring_unregister_files(ring: *mut ringest_ring) -> i32 {
    status(|| Ok(Entered::new(ring)?.ring_mut()?.unregister_files()?))
}
