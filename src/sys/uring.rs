//! The io_uring system calls, over rings that the io-uring crate sets up and maps.
//!
//! `enter` and `register` are issued here rather than by the crate so that a registered ring descriptor is used in
//! every call and so that each call is a fault point. The crate owns the shared rings and their memory ordering.

use super::thread::Process;
use super::{Errno, check, fault};
use io_uring::{IoUring, Probe, cqueue, squeue};
use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

// include/uapi/linux/io_uring.h
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_SQ_WAKEUP: u32 = 1 << 1;
const ENTER_SQ_WAIT: u32 = 1 << 2;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;

/// IORING_SETUP_* flags this crate asks for.
pub(crate) mod setup {
    pub(crate) const IOPOLL: u32 = 1 << 0;
    pub(crate) const SQPOLL: u32 = 1 << 1;
    pub(crate) const SQ_AFF: u32 = 1 << 2;
    pub(crate) const CQSIZE: u32 = 1 << 3;
    pub(crate) const SUBMIT_ALL: u32 = 1 << 7;
    pub(crate) const COOP_TASKRUN: u32 = 1 << 8;
    pub(crate) const TASKRUN_FLAG: u32 = 1 << 9;
    pub(crate) const SQE128: u32 = 1 << 10;
    pub(crate) const CQE32: u32 = 1 << 11;
    pub(crate) const SINGLE_ISSUER: u32 = 1 << 12;
    pub(crate) const DEFER_TASKRUN: u32 = 1 << 13;
}

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct GetEventsArg {
    sigmask: u64,
    sigmask_sz: u32,
    min_wait_usec: u32,
    ts: u64,
}

/// `struct __kernel_timespec`.
#[repr(C)]
struct KernelTimespec {
    sec: i64,
    nsec: i64,
}

/// `struct io_uring_rsrc_update` as IORING_REGISTER_RING_FDS takes it.
#[repr(C)]
struct RingFdUpdate {
    offset: u32,
    resv: u32,
    data: u64,
}

/// What `io_uring_setup` is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SetupParams {
    pub(crate) entries: u32,
    pub(crate) cq_entries: u32,
    /// IORING_SETUP_* flags; CQSIZE is implied.
    pub(crate) flags: u32,
    pub(crate) sq_thread_idle_ms: u32,
    pub(crate) sq_thread_cpu: u32,
}

enum Rings {
    Small(IoUring<squeue::Entry, cqueue::Entry>),
    Big(IoUring<squeue::Entry128, cqueue::Entry32>),
}

macro_rules! each {
    ($rings:expr, $ring:ident => $body:expr) => {
        match $rings {
            Rings::Small($ring) => $body,
            Rings::Big($ring) => $body,
        }
    };
}

/// A completion.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) result: i32,
}

/// One io_uring: its mapped queues and its descriptor.
pub(crate) struct Ring {
    rings: ManuallyDrop<Rings>,
    process: Process,
    flags: u32,
    /// System calls made to submit or wait.
    enters: Cell<u64>,
    /// Index of the registered ring descriptor, valid on the registering thread alone.
    registered: Option<u32>,
}

impl Ring {
    pub(crate) fn setup(params: SetupParams) -> Result<Self, Errno> {
        fault::point("io_uring_setup")?;
        if params.flags & fault::refused_setup_flags() != 0 {
            return Err(libc::EINVAL);
        }
        let rings = if params.flags & (setup::SQE128 | setup::CQE32) != 0 {
            Rings::Big(build(params)?)
        } else {
            Rings::Small(build(params)?)
        };
        Ok(Self {
            rings: ManuallyDrop::new(rings),
            process: Process::current(),
            flags: params.flags,
            enters: Cell::new(0),
            registered: None,
        })
    }

    pub(crate) fn fd(&self) -> RawFd {
        each!(&*self.rings, ring => ring.as_raw_fd())
    }

    /// IORING_SETUP_* flags that the kernel accepted.
    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }

    pub(crate) fn params(&self) -> &io_uring::Parameters {
        each!(&*self.rings, ring => ring.params())
    }

    pub(crate) fn submitter(&self) -> io_uring::Submitter<'_> {
        each!(&*self.rings, ring => ring.submitter())
    }

    /// System calls made to submit or wait.
    pub(crate) fn enters(&self) -> u64 {
        self.enters.get()
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.registered.is_some()
    }

    /// Registers the ring's descriptor for this thread (IORING_REGISTER_RING_FDS, Linux 5.18).
    pub(crate) fn register_ring_fd(&mut self) -> Result<(), Errno> {
        let mut update = RingFdUpdate { offset: u32::MAX, resv: 0, data: self.fd() as u64 };
        self.register_raw(REGISTER_RING_FDS, &mut update)?;
        self.registered = Some(update.offset);
        Ok(())
    }

    /// Forgets the registered descriptor without a system call: for a thread that did not register it.
    pub(crate) fn forget_ring_fd(&mut self) {
        self.registered = None;
    }

    fn unregister_ring_fd(&mut self) {
        if let Some(offset) = self.registered.take() {
            let mut update = RingFdUpdate { offset, resv: 0, data: 0 };
            // Failure leaves an unused slot in this thread's table, which the kernel frees with the thread.
            let _ = self.register_raw(UNREGISTER_RING_FDS, &mut update);
        }
    }

    fn register_raw(&self, opcode: u32, update: &mut RingFdUpdate) -> Result<(), Errno> {
        fault::point("io_uring_register")?;
        let place: *mut RingFdUpdate = update;
        // SAFETY: both opcodes take an array of `nr_args` (1) io_uring_rsrc_update, which `place` points to.
        check(unsafe { libc::syscall(libc::SYS_io_uring_register, self.fd(), opcode, place, 1u32) }).map(drop)
    }

    /// SQEs that can be pushed before the next `enter`.
    #[inline]
    pub(crate) fn sq_room(&mut self) -> usize {
        each!(&mut *self.rings, ring => {
            let sq = ring.submission();
            sq.capacity() - sq.len()
        })
    }

    /// SQEs pushed and not yet consumed by the kernel.
    #[inline]
    pub(crate) fn sq_len(&mut self) -> usize {
        each!(&mut *self.rings, ring => ring.submission().len())
    }

    /// Pushes a complete SQE; false when the queue is full.
    ///
    /// # Safety
    /// Everything the SQE points to stays valid until its completion has been reaped.
    #[inline]
    pub(crate) unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's contract is that of `SubmissionQueue::push`. The crate copies the whole entry, so no
        // stale bits of the slot survive.
        unsafe {
            match &mut *self.rings {
                Rings::Small(ring) => ring.submission().push(entry).is_ok(),
                Rings::Big(ring) => ring.submission().push(&squeue::Entry128::from(entry.clone())).is_ok(),
            }
        }
    }

    /// Takes the next completion.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Cqe> {
        match &mut *self.rings {
            Rings::Small(ring) => {
                let cqe = ring.completion().next()?;
                Some(Cqe { user_data: cqe.user_data(), result: cqe.result() })
            }
            Rings::Big(ring) => {
                let cqe = ring.completion().next()?;
                Some(Cqe { user_data: cqe.user_data(), result: cqe.result() })
            }
        }
    }

    /// Whether an `enter` is needed for completions to appear: task work is pending, the completion queue overflowed,
    /// or completions must be polled for.
    #[inline]
    pub(crate) fn needs_enter(&mut self) -> bool {
        let flagged = each!(&mut *self.rings, ring => {
            let sq = ring.submission();
            sq.taskrun() || sq.cq_overflow()
        });
        // Without TASKRUN_FLAG nothing tells of deferred work: always ask.
        let unflagged = self.flags & setup::DEFER_TASKRUN != 0 && self.flags & setup::TASKRUN_FLAG == 0;
        flagged || unflagged || self.flags & setup::IOPOLL != 0
    }

    /// Submits what was pushed and, if `wait` > 0, waits for that many completions or the timeout.
    ///
    /// EINTR is retried while nothing is waited for. Otherwise EINTR and ETIME are successes: the caller looks at its
    /// clock and at what it waits for (the kernel drops both when it also submitted something, so it must anyway).
    pub(crate) fn enter(&mut self, wait: u32, timeout: Option<Duration>) -> Result<(), Errno> {
        let submit = self.sq_len() as u32;
        let mut flags = ENTER_EXT_ARG;
        let needs_enter = self.needs_enter();
        if wait > 0 || needs_enter {
            flags |= ENTER_GETEVENTS;
        }
        if self.flags & setup::SQPOLL != 0 {
            // The tail store of the last push must be visible to the poller before we read whether it sleeps
            // (io_uring_enter(2), IORING_SQ_NEED_WAKEUP): the kernel does the opposite order with a full barrier.
            fence(Ordering::SeqCst);
            let asleep = each!(&mut *self.rings, ring => ring.submission().need_wakeup_after_intermittent_seqcst());
            if asleep {
                flags |= ENTER_SQ_WAKEUP;
            } else if wait == 0 && !needs_enter {
                return Ok(());
            }
        }
        let timespec = timeout.map(|timeout| KernelTimespec {
            sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            nsec: i64::from(timeout.subsec_nanos()),
        });
        let arg = GetEventsArg {
            sigmask: 0,
            sigmask_sz: 0,
            min_wait_usec: 0,
            ts: timespec.as_ref().map_or(0, |timespec| std::ptr::from_ref(timespec) as u64),
        };
        loop {
            match self.enter_raw(submit, wait, flags, Some(&arg)) {
                Ok(_) | Err(libc::ETIME) => return Ok(()),
                Err(libc::EINTR) if wait == 0 => {}
                Err(libc::EINTR) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Waits until the SQPOLL thread has taken something from a full submission queue.
    pub(crate) fn wait_for_sq_room(&mut self) -> Result<(), Errno> {
        match self.enter_raw(0, 0, ENTER_SQ_WAIT, None) {
            Ok(_) | Err(libc::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn enter_raw(&self, submit: u32, wait: u32, flags: u32, arg: Option<&GetEventsArg>) -> Result<u32, Errno> {
        self.enters.set(self.enters.get() + 1);
        fault::point("io_uring_enter")?;
        let (fd, flags) = match self.registered {
            Some(index) => (index as RawFd, flags | ENTER_REGISTERED_RING),
            None => (self.fd(), flags),
        };
        let (pointer, size) = match arg {
            Some(arg) => (std::ptr::from_ref(arg), size_of::<GetEventsArg>()),
            None => (std::ptr::null(), 0),
        };
        // SAFETY: `arg` and the timespec it points to outlive the call; what the SQEs point to is the contract of
        // `push`.
        let taken = check(unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, submit, wait, flags, pointer, size) })?;
        Ok(taken as u32)
    }

    /// The opcodes this kernel knows (IORING_REGISTER_PROBE).
    pub(crate) fn probe(&self) -> Result<Probe, Errno> {
        let mut probe = Probe::new();
        self.registered_call(|submitter| submitter.register_probe(&mut probe))?;
        Ok(probe)
    }

    /// Runs one registration call of the io-uring crate.
    pub(crate) fn registered_call<T>(
        &self,
        call: impl FnOnce(&io_uring::Submitter<'_>) -> std::io::Result<T>,
    ) -> Result<T, Errno> {
        fault::point("io_uring_register")?;
        call(&self.submitter()).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
    }

    /// Registers buffers in a table of exactly these ranges.
    ///
    /// # Safety
    /// The memory stays mapped until it is unregistered or every request that uses it has completed and the ring is
    /// gone. (The kernel pins the pages, so a violation corrupts data, not the kernel.)
    pub(crate) unsafe fn register_buffers(&self, ranges: &[libc::iovec]) -> Result<(), Errno> {
        // SAFETY: the caller's contract.
        self.registered_call(|submitter| unsafe { submitter.register_buffers(ranges) })
    }

    /// Replaces entries of the buffer table; a null range empties its entry.
    ///
    /// # Safety
    /// As [`register_buffers`](Self::register_buffers).
    pub(crate) unsafe fn update_buffers(&self, first: u32, ranges: &[libc::iovec]) -> Result<(), Errno> {
        // SAFETY: the caller's contract.
        self.registered_call(|submitter| unsafe { submitter.register_buffers_update(first, ranges, None) })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.unregister_ring_fd();
        if self.process.is_current() {
            // SAFETY: dropped only here.
            unsafe { ManuallyDrop::drop(&mut self.rings) };
        } else {
            // A forked child does not have the queues; something else may be in their place there.
            // SAFETY: the descriptor is the ring's own, which nothing uses after this.
            unsafe { libc::close(self.fd()) };
        }
    }
}

fn build<S: squeue::EntryMarker, C: cqueue::EntryMarker>(params: SetupParams) -> Result<IoUring<S, C>, Errno> {
    let mut builder = IoUring::<S, C>::builder();
    builder.dontfork().setup_cqsize(params.cq_entries);
    let has = |flag| params.flags & flag != 0;
    if has(setup::IOPOLL) {
        builder.setup_iopoll();
    }
    if has(setup::SQPOLL) {
        builder.setup_sqpoll(params.sq_thread_idle_ms);
    }
    if has(setup::SQ_AFF) {
        builder.setup_sqpoll_cpu(params.sq_thread_cpu);
    }
    if has(setup::SUBMIT_ALL) {
        builder.setup_submit_all();
    }
    if has(setup::COOP_TASKRUN) {
        builder.setup_coop_taskrun();
    }
    if has(setup::TASKRUN_FLAG) {
        builder.setup_taskrun_flag();
    }
    if has(setup::SINGLE_ISSUER) {
        builder.setup_single_issuer();
    }
    if has(setup::DEFER_TASKRUN) {
        builder.setup_defer_taskrun();
    }
    builder.build(params.entries).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}
