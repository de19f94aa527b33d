//! An io_uring: set up with what the kernel grants, and what is registered with it.

use super::registry::{BufferTable, FileTable, SharedBuffers};
use crate::error::{PipelineError, Result, Text};
use crate::memory::GpuMappedBuffer;
use crate::sys::mem::memlock_limit;
use crate::sys::thread::Owner;
use crate::sys::uring::{Ring, SetupParams, setup};
use crate::sys::{Errno, file};
use io_uring::opcode;
use std::marker::PhantomData;
use std::os::fd::RawFd;

/// A kernel thread that polls the submission queue (IORING_SETUP_SQPOLL).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqPoll {
    /// Milliseconds without work before the thread sleeps; 0 means the kernel's default of one second.
    pub idle_ms: u32,
    /// The CPU it is bound to, if any.
    pub cpu: Option<u32>,
}

/// What a ring is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingOptions {
    /// Submission queue entries, rounded up to a power of two; 1 to 32,768.
    pub entries: u32,
    /// Completion queue entries; 0 means twice `entries`. At least `entries`.
    pub cq_entries: u32,
    /// A kernel thread submits. Excludes deferred task work.
    pub sqpoll: Option<SqPoll>,
    /// Completions are polled for (O_DIRECT on devices with poll queues).
    pub iopoll: bool,
    /// Leaves out SINGLE_ISSUER and the task-work flags, so that a stream over the ring can move to another thread
    /// ([`AsyncUringStream::into_movable`](super::AsyncUringStream::into_movable)). The kernel still cancels what a
    /// thread submitted when that thread exits.
    pub movable: bool,
    /// 128-byte SQEs and 32-byte CQEs, which NVMe passthrough needs.
    pub big_entries: bool,
    /// Entries of the kernel's buffer table: one per started GiB of each registered buffer. 1 to 16,384.
    pub buffer_slots: u32,
}

impl Default for RingOptions {
    fn default() -> Self {
        Self {
            entries: 64,
            cq_entries: 0,
            sqpoll: None,
            iopoll: false,
            movable: false,
            big_entries: false,
            buffer_slots: 64,
        }
    }
}

/// What a ring really got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingFeatures {
    /// Submission queue entries.
    pub sq_entries: u32,
    /// Completion queue entries.
    pub cq_entries: u32,
    /// The kernel knows that one thread submits (Linux 6.0).
    pub single_issuer: bool,
    /// Completion work runs when this thread asks for it (6.1).
    pub defer_taskrun: bool,
    /// Completion work does not interrupt the thread (5.19).
    pub coop_taskrun: bool,
    /// The kernel flags pending completion work (5.19).
    pub taskrun_flag: bool,
    /// A failing SQE does not stop a batch (5.18).
    pub submit_all: bool,
    /// A kernel thread submits.
    pub sqpoll: bool,
    /// Completions are polled for.
    pub iopoll: bool,
    /// 128-byte SQEs and 32-byte CQEs (5.19).
    pub big_entries: bool,
    /// The ring's descriptor is registered with its thread (5.18).
    pub registered_ring: bool,
    /// Buffer tables can be sparse and updated (5.19).
    pub sparse_buffers: bool,
    /// Vectored reads into registered memory (6.15).
    pub readv_fixed: bool,
    /// Any flag was refused and left out.
    pub fell_back: bool,
}

impl std::fmt::Display for RingFeatures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sq={} cq={}", self.sq_entries, self.cq_entries)?;
        for (name, got) in self.names() {
            if got {
                write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}

impl RingFeatures {
    /// Every feature by name, and whether the ring has it.
    #[must_use]
    pub fn names(&self) -> [(&'static str, bool); 12] {
        [
            ("single_issuer", self.single_issuer),
            ("defer_taskrun", self.defer_taskrun),
            ("coop_taskrun", self.coop_taskrun),
            ("taskrun_flag", self.taskrun_flag),
            ("submit_all", self.submit_all),
            ("sqpoll", self.sqpoll),
            ("iopoll", self.iopoll),
            ("big_entries", self.big_entries),
            ("registered_ring", self.registered_ring),
            ("sparse_buffers", self.sparse_buffers),
            ("readv_fixed", self.readv_fixed),
            ("fell_back", self.fell_back),
        ]
    }
}

/// An io_uring instance with its registered buffers and files.
///
/// Belongs to the thread that created it. A stream takes it over
/// ([`AsyncUringStream::new`](super::AsyncUringStream::new)) and gives access to it for registrations.
///
/// ```compile_fail
/// # use ringest::{IoUringState, RingOptions};
/// let ring = IoUringState::new(RingOptions::default()).unwrap();
/// std::thread::spawn(move || drop(ring)); // not Send
/// ```
pub struct IoUringState {
    pub(super) ring: Ring,
    pub(super) buffers: BufferTable,
    pub(super) files: FileTable,
    pub(super) owner: Owner,
    features: RingFeatures,
    movable: bool,
    not_send: PhantomData<*mut ()>,
}

impl std::fmt::Debug for IoUringState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoUringState").field("fd", &self.ring.fd()).field("features", &self.features).finish()
    }
}

impl IoUringState {
    /// Sets up a ring.
    ///
    /// Flags that only make it faster are left out one after the other when the kernel refuses them;
    /// [`features`](Self::features) tells. What the options ask for explicitly is never left out.
    ///
    /// # Errors
    /// `EINVAL` for options out of range or refused by the kernel, `EPERM` or `ENOSYS` when io_uring is forbidden or not
    /// built in, `ENOMEM`, `EOPNOTSUPP` on kernels before 5.11. The message names cause and remedy.
    pub fn new(options: RingOptions) -> Result<Self> {
        let params = validate(&options)?;
        let (mut ring, fell_back) = set_up(params, options.movable)?;
        let granted = ring.params().clone();
        if !(granted.is_feature_ext_arg() && granted.is_feature_nodrop() && granted.is_feature_submit_stable()) {
            return Err(PipelineError::unsupported(
                "io_uring of this kernel",
                "ringest needs Linux 5.11 or newer (IORING_FEAT_EXT_ARG)",
            ));
        }
        if !options.movable {
            // Without it every call looks the descriptor up: slower, not wrong.
            let _ = ring.register_ring_fd();
        }
        let readv_fixed = ring.probe().is_ok_and(|probe| probe.is_supported(opcode::ReadvFixed::CODE));
        let buffers = BufferTable::new(&ring, options.buffer_slots);
        let has = |flag| ring.flags() & flag != 0;
        let features = RingFeatures {
            sq_entries: granted.sq_entries(),
            cq_entries: granted.cq_entries(),
            single_issuer: has(setup::SINGLE_ISSUER),
            defer_taskrun: has(setup::DEFER_TASKRUN),
            coop_taskrun: has(setup::COOP_TASKRUN),
            taskrun_flag: has(setup::TASKRUN_FLAG),
            submit_all: has(setup::SUBMIT_ALL),
            sqpoll: has(setup::SQPOLL),
            iopoll: has(setup::IOPOLL),
            big_entries: has(setup::SQE128),
            registered_ring: ring.is_registered(),
            sparse_buffers: buffers.is_sparse(),
            readv_fixed,
            fell_back,
        };
        tracing::debug!(target: "ringest::ring", fd = ring.fd(), %features, "ring created");
        Ok(Self {
            ring,
            buffers,
            files: FileTable::default(),
            owner: Owner::current(),
            features,
            movable: options.movable,
            not_send: PhantomData,
        })
    }

    /// What the ring really got.
    #[must_use]
    pub fn features(&self) -> RingFeatures {
        self.features
    }

    /// Whether streams over this ring may move to another thread.
    #[must_use]
    pub fn is_movable(&self) -> bool {
        self.movable
    }

    /// The ring's file descriptor.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.ring.fd()
    }

    pub(super) fn check_thread(&self) -> Result<()> {
        if self.owner.is_current() { Ok(()) } else { Err(PipelineError::WrongThread) }
    }

    /// Makes the calling thread the owner, if the ring may move.
    #[inline]
    pub(crate) fn adopt_if_movable(&mut self) {
        if self.movable && !self.owner.is_current() && !self.owner.is_forked() {
            self.owner = Owner::current();
        }
    }

    /// Registers buffers; the i-th gets logical index i.
    ///
    /// Each started GiB takes an entry of the kernel's table (`RingOptions::buffer_slots`). The pages are pinned and
    /// count against RLIMIT_MEMLOCK.
    ///
    /// # Errors
    /// `EBUSY` when buffers are registered already, `EINVAL` for none, `ENOMEM` over RLIMIT_MEMLOCK, `EFAULT` for
    /// file-backed, read-only or device memory, `EAGAIN` when the table is too small. On failure nothing is registered.
    pub fn register_buffers(&mut self, buffers: &[&GpuMappedBuffer<'static>]) -> Result<()> {
        self.check_thread()?;
        self.buffers.register(&self.ring, buffers)
    }

    /// Makes room for `count` logical buffers without registering any; see [`update_buffer`](Self::update_buffer).
    ///
    /// # Errors
    /// `EBUSY` when buffers are registered already, `EINVAL` for 0, `EOPNOTSUPP` before Linux 5.19.
    pub fn register_buffers_sparse(&mut self, count: u32) -> Result<()> {
        self.check_thread()?;
        self.buffers.register_sparse(count)
    }

    /// Replaces the buffer at a logical index, or empties it.
    ///
    /// Reads in flight keep the old memory; its entries are freed when they end.
    ///
    /// # Errors
    /// `ERANGE` for an index beyond the table, `EOPNOTSUPP` before Linux 5.19, and those of
    /// [`register_buffers`](Self::register_buffers). On failure the old buffer stays.
    pub fn update_buffer(&mut self, index: u32, buffer: Option<&GpuMappedBuffer<'static>>) -> Result<()> {
        self.check_thread()?;
        self.buffers.update(&self.ring, index, buffer)
    }

    /// Unregisters all buffers. Reads in flight keep theirs until they end.
    ///
    /// # Errors
    /// `EINVAL` when none are registered; before Linux 5.19 also `EBUSY` while reads use them.
    pub fn unregister_buffers(&mut self) -> Result<()> {
        self.check_thread()?;
        self.buffers.unregister(&self.ring)
    }

    /// Logical buffers in the table, empty ones included.
    #[must_use]
    pub fn buffer_count(&self) -> u32 {
        self.buffers.len()
    }

    /// A handle by which rings on other threads can share this ring's registered buffers (Linux 6.12).
    ///
    /// # Errors
    /// `EINVAL` when no buffers are registered; `EOPNOTSUPP` on older kernels; that of `io_uring_setup(2)` for the small
    /// ring that the handle holds (`EMFILE`, `ENOMEM`).
    pub fn share_buffers(&self) -> Result<SharedBuffers> {
        self.check_thread()?;
        self.buffers.share(&self.ring)
    }

    /// Takes over the registrations of another ring (IORING_REGISTER_CLONE_BUFFERS, Linux 6.12) under the same logical
    /// indices. The pages are pinned, and charged to RLIMIT_MEMLOCK, once.
    ///
    /// # Errors
    /// `EBUSY` when this ring has buffers; `EOPNOTSUPP` on older kernels.
    pub fn clone_buffers(&mut self, shared: &SharedBuffers) -> Result<()> {
        self.check_thread()?;
        self.buffers.clone_from_shared(&self.ring, shared)
    }

    /// Registers files; the i-th gets index i. The kernel holds them until they are replaced.
    ///
    /// How O_DIRECT descriptors want to be read is looked up now, once.
    ///
    /// # Errors
    /// `EBUSY` when files are registered already, `EINVAL` for none, `EBADF` for a bad descriptor, `EMFILE` over
    /// RLIMIT_NOFILE.
    pub fn register_files(&mut self, fds: &[RawFd]) -> Result<()> {
        self.check_thread()?;
        self.files.register(&self.ring, fds)
    }

    /// Makes room for `count` files without registering any; see [`update_file`](Self::update_file).
    ///
    /// # Errors
    /// `EBUSY` when files are registered already, `EINVAL` for 0, and the kernel's (`EMFILE` over RLIMIT_NOFILE).
    pub fn register_files_sparse(&mut self, count: u32) -> Result<()> {
        self.check_thread()?;
        self.files.register_sparse(&self.ring, count)
    }

    /// Replaces the file at an index, or empties it.
    ///
    /// # Errors
    /// `ERANGE` for an index beyond the table, `EBUSY` while a read of the old file is unfinished, `EBADF`.
    pub fn update_file(&mut self, index: u32, fd: Option<RawFd>) -> Result<()> {
        self.check_thread()?;
        self.files.update(&self.ring, index, fd)
    }

    /// Unregisters all files.
    ///
    /// # Errors
    /// `EINVAL` when none are registered, `EBUSY` while a read of one is unfinished.
    pub fn unregister_files(&mut self) -> Result<()> {
        self.check_thread()?;
        self.files.unregister(&self.ring)
    }

    /// Files in the table, empty entries included.
    #[must_use]
    pub fn file_count(&self) -> u32 {
        self.files.len()
    }
}

/// Registrations of a ring that a stream has taken over ([`AsyncUringStream::ring_mut`](super::AsyncUringStream)).
///
/// The ring itself stays where it is: its completions are the stream's alone.
#[derive(Debug)]
pub struct RingRegistrations<'r>(&'r mut IoUringState);

impl<'r> RingRegistrations<'r> {
    pub(crate) fn new(ring: &'r mut IoUringState) -> Self {
        Self(ring)
    }
}

impl std::ops::Deref for RingRegistrations<'_> {
    type Target = IoUringState;
    fn deref(&self) -> &IoUringState {
        self.0
    }
}

macro_rules! forward {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
        impl RingRegistrations<'_> { $(
            #[doc = concat!("As [`IoUringState::", stringify!($name), "`].\n\n# Errors\nThe same.")]
            pub fn $name(&mut self, $($argument: $kind),*) -> Result<()> {
                self.0.$name($($argument),*)
            }
        )* }
    };
}

forward! {
    register_buffers(buffers: &[&GpuMappedBuffer<'static>]);
    register_buffers_sparse(count: u32);
    update_buffer(index: u32, buffer: Option<&GpuMappedBuffer<'static>>);
    unregister_buffers();
    clone_buffers(shared: &SharedBuffers);
    register_files(fds: &[RawFd]);
    register_files_sparse(count: u32);
    update_file(index: u32, fd: Option<RawFd>);
    unregister_files();
}

impl Drop for IoUringState {
    fn drop(&mut self) {
        if !self.owner.is_current() {
            // Another thread's table of registered rings is not ours to touch; the kernel frees it with that thread.
            self.ring.forget_ring_fd();
        }
    }
}

fn validate(options: &RingOptions) -> Result<SetupParams> {
    if !(1..=32_768).contains(&options.entries) {
        return Err(PipelineError::invalid(format!("{} ring entries", options.entries), "use 1 to 32768"));
    }
    let entries = options.entries.next_power_of_two();
    let cq_entries = if options.cq_entries == 0 { entries * 2 } else { options.cq_entries };
    if !(entries..=65_536).contains(&cq_entries) {
        return Err(PipelineError::invalid(
            format!("{cq_entries} completion queue entries"),
            format!("use {entries} (the submission queue's size) to 65536"),
        ));
    }
    if !(1..=16_384).contains(&options.buffer_slots) {
        return Err(PipelineError::invalid(format!("{} buffer slots", options.buffer_slots), "use 1 to 16384"));
    }
    let mut flags = 0;
    let mut set = |wanted: bool, flag: u32| flags |= if wanted { flag } else { 0 };
    set(options.iopoll, setup::IOPOLL);
    set(options.sqpoll.is_some(), setup::SQPOLL);
    set(options.sqpoll.is_some_and(|sqpoll| sqpoll.cpu.is_some()), setup::SQ_AFF);
    set(options.big_entries, setup::SQE128 | setup::CQE32);
    Ok(SetupParams {
        entries,
        cq_entries,
        flags: flags | setup::CQSIZE,
        sq_thread_idle_ms: options.sqpoll.map_or(0, |sqpoll| sqpoll.idle_ms),
        sq_thread_cpu: options.sqpoll.and_then(|sqpoll| sqpoll.cpu).unwrap_or(0),
    })
}

/// Sets of optional flags, best first. A kernel refuses what it does not know with EINVAL.
fn ladder(params: &SetupParams, movable: bool) -> Vec<u32> {
    let sqpoll = params.flags & setup::SQPOLL != 0;
    let cooperative = setup::COOP_TASKRUN | setup::TASKRUN_FLAG;
    let steps: &[u32] = match (sqpoll, movable) {
        // SQPOLL completes in the kernel thread: EINVAL together with the *_TASKRUN flags.
        (true, false) => &[setup::SUBMIT_ALL | setup::SINGLE_ISSUER, setup::SUBMIT_ALL],
        // Task work that waits for the submitting thread to enter the kernel would wait for one that has moved on.
        (_, true) => &[setup::SUBMIT_ALL],
        (false, false) => &[
            setup::SUBMIT_ALL | setup::SINGLE_ISSUER | setup::DEFER_TASKRUN | setup::TASKRUN_FLAG,
            setup::SUBMIT_ALL | setup::SINGLE_ISSUER | cooperative,
            setup::SUBMIT_ALL | cooperative,
            setup::SUBMIT_ALL,
        ],
    };
    steps.iter().copied().chain([0]).collect()
}

fn set_up(params: SetupParams, movable: bool) -> Result<(Ring, bool)> {
    let mut refused = 0;
    for (step, optional) in ladder(&params, movable).into_iter().enumerate() {
        match Ring::setup(SetupParams { flags: params.flags | optional, ..params }) {
            Ok(ring) => return Ok((ring, step > 0)),
            Err(libc::EINVAL) => refused = libc::EINVAL,
            Err(errno) => return Err(setup_error(errno)),
        }
        tracing::debug!(target: "ringest::ring", flags = params.flags | optional, "setup flags refused, falling back");
    }
    Err(setup_error(refused))
}

fn setup_error(errno: Errno) -> PipelineError {
    PipelineError::IoUringSyscall { call: "io_uring_setup", errno, fix: setup_remedy(errno) }
}

/// Why a kernel refuses to set up a ring, as far as this process can see.
fn setup_remedy(errno: Errno) -> Text {
    let seccomp = file::thread_status("Seccomp").is_some_and(|mode| mode == "2");
    match errno {
        libc::EPERM | libc::EACCES => match file::io_uring_disabled() {
            Some(2) => "io_uring is disabled on this system: set sysctl kernel.io_uring_disabled to 0 or 1".into(),
            Some(1) => "io_uring is restricted: run with CAP_SYS_ADMIN, join the group in sysctl \
                        kernel.io_uring_group, or set kernel.io_uring_disabled=0"
                .into(),
            _ if seccomp => "a seccomp filter forbids io_uring (Docker's and Kubernetes' default profiles do): allow \
                             io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
                .into(),
            _ => "a security module forbids io_uring for this process: see the audit log".into(),
        },
        libc::ENOSYS if seccomp => "a seccomp filter hides io_uring: allow io_uring_setup, io_uring_enter and \
                                    io_uring_register in the container's seccomp profile"
            .into(),
        libc::ENOSYS => "this kernel is built without io_uring (CONFIG_IO_URING) or older than 5.1".into(),
        libc::ENOMEM => format!(
            "memory for the ring is short{}: use fewer entries or raise the memory limits",
            memlock_limit().map_or_else(String::new, |limit| format!(" (RLIMIT_MEMLOCK is {limit} bytes)"))
        )
        .into(),
        libc::EMFILE | libc::ENFILE => "too many open files: raise RLIMIT_NOFILE".into(),
        libc::EINVAL => "the kernel refuses the ring's options even without optional flags: SQPOLL on an offline CPU, \
                         IOPOLL, big entries (Linux 5.19) or a size"
            .into(),
        _ => "see io_uring_setup(2)".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_out_of_range_are_refused() {
        let bad = [
            RingOptions { entries: 0, ..Default::default() },
            RingOptions { entries: 40_000, ..Default::default() },
            RingOptions { entries: 64, cq_entries: 32, ..Default::default() },
            RingOptions { cq_entries: 100_000, ..Default::default() },
            RingOptions { buffer_slots: 0, ..Default::default() },
            RingOptions { buffer_slots: 20_000, ..Default::default() },
        ];
        for options in bad {
            assert_eq!(validate(&options).unwrap_err().errno(), libc::EINVAL, "{options:?}");
        }
    }

    #[test]
    fn every_ladder_ends_with_no_optional_flag_and_keeps_sqpoll_clear_of_taskrun() {
        let taskrun = setup::DEFER_TASKRUN | setup::COOP_TASKRUN | setup::TASKRUN_FLAG;
        for sqpoll in [None, Some(SqPoll { idle_ms: 1, cpu: Some(0) })] {
            for movable in [false, true] {
                let params = validate(&RingOptions { sqpoll, ..Default::default() }).unwrap();
                let steps = ladder(&params, movable);
                assert_eq!(steps.last(), Some(&0));
                assert!(sqpoll.is_none() || steps.iter().all(|flags| flags & taskrun == 0));
                assert!(!movable || steps.iter().all(|flags| flags & (setup::SINGLE_ISSUER | taskrun) == 0));
            }
        }
    }
}
