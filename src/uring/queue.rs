//! The border to the kernel: reads go out with the memory they write to, and come back with it.
//!
//! An [`Op`] is owned either by the flight (which decides) or by the queue (while the kernel may write). Because the
//! queue owns it, and with it a reference to its memory, until the completion has been reaped, memory outlives every
//! read by construction; a queue dropped earlier leaks what the kernel still holds.

use super::file::{FileRef, Source};
use super::flight::Segment;
use super::registry::BufferEntry;
use super::ring::IoUringState;
use crate::memory::Region;
use crate::sys::Errno;
use io_uring::{opcode, squeue, types};
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Memory that a read writes to.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// Addressed by pointer; the kernel pins it for each read.
    Plain(Arc<Region>),
    /// Registered with the ring.
    Registered(Arc<BufferEntry>),
}

impl Target {
    /// Whether both are the same registration, or the same unregistered memory.
    #[inline]
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Plain(a), Self::Plain(b)) => Arc::ptr_eq(a, b),
            (Self::Registered(a), Self::Registered(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    pub(crate) fn region(&self) -> &Region {
        match self {
            Self::Plain(region) => region,
            Self::Registered(entry) => entry.region(),
        }
    }

    /// Kernel index for the byte at `offset`, and how far it reaches.
    pub(crate) fn slot(&self, offset: usize) -> Option<(u16, usize)> {
        match self {
            Self::Plain(_) => None,
            Self::Registered(entry) => entry.slot(offset),
        }
    }
}

/// The next command of an [`Op`].
#[derive(Debug)]
pub(crate) enum Command {
    /// `len` bytes straight to the op's target, through the registration `slot` if there is one.
    Direct { len: u32, slot: Option<u16> },
    /// `len` bytes from `file_offset` into a bounce slot; `want` of them, after `skip`, are the op's.
    Bounce { file_offset: u64, len: u32, skip: u32, want: u32, slot: BounceSlot },
    /// A whole scatter list at once.
    Vectored { slot: Option<u16> },
}

/// A piece of the bounce buffer, lent to one op.
#[derive(Debug)]
pub(crate) struct BounceSlot {
    pub(crate) pool: Target,
    pub(crate) index: u16,
    /// Bytes of every slot.
    pub(crate) size: u32,
}

impl BounceSlot {
    /// Where in the pool's region the slot starts.
    pub(crate) fn offset(&self) -> usize {
        usize::from(self.index) * self.size as usize
    }

    /// The kernel's index of the slot's registration.
    pub(crate) fn registration(&self) -> Option<u16> {
        self.pool.slot(self.offset()).map(|(slot, _)| slot)
    }
}

/// One contiguous stretch of a submission (or a whole scatter list), read by one command at a time. Boxed, because it
/// changes hands several times, and used again.
#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) sequence: u64,
    pub(crate) file: FileRef,
    /// File position of the next byte.
    pub(crate) file_offset: u64,
    pub(crate) target: Target,
    /// Where in the target's region the next byte goes. Unused by a vectored command.
    pub(crate) target_offset: usize,
    /// Bytes still to come.
    pub(crate) remaining: usize,
    pub(crate) command: Command,
    /// EINTR or EAGAIN since the last progress.
    pub(crate) retries: u8,
    /// Reads that ended inside a block, before the bytes that are wanted of it, since the last progress.
    pub(crate) looks: u8,
    /// O_DIRECT alignment, learned late for raw descriptors.
    pub(crate) direct: Option<super::file::DirectAlignment>,
}

/// An op whose command has completed, with the CQE's `res`.
#[derive(Debug)]
pub(crate) struct Reaped {
    pub(crate) op: Box<Op>,
    pub(crate) result: i32,
}

/// Where reads complete: the kernel, or the simulator.
pub(crate) trait Queue {
    /// Makes room for one command, submitting earlier ones if need be; false when too many are in flight.
    fn make_room(&mut self) -> Result<bool, Errno>;
    /// Queues the op's command; `segments` is the scatter list of a vectored one (offset in the region, length).
    /// `make_room` has just answered true.
    fn push(&mut self, op: Box<Op>, segments: &[Segment]);
    /// Asks for the commands in flight of the wanted submissions to be cancelled, as far as the kernel can.
    fn cancel(&mut self, wanted: impl Fn(u64) -> bool);
    /// Whether commands are queued that the kernel has not been told of.
    fn has_unsubmitted(&mut self) -> bool;
    /// Whether there are such commands, or completions wait for an `enter`.
    fn wants_enter(&mut self) -> bool;
    /// Submits, and waits for `wait` completions or until the timeout.
    fn enter(&mut self, wait: u32, timeout: Option<Duration>) -> Result<(), Errno>;
    /// Takes one completion.
    fn reap(&mut self) -> Option<Reaped>;
    /// Commands, cancellations included, that the kernel has and has not completed.
    fn in_kernel(&self) -> usize;
    /// System calls made to submit or wait.
    fn enters(&self) -> u64 {
        0
    }
    /// Monotonic time.
    fn now(&self) -> Duration;
    /// Lets time pass.
    fn pause(&mut self, _time: Duration) {}
    /// Takes memory of the stream itself (the bounce buffer) into the ring's registrations, if it can.
    fn adopt(&mut self, region: Arc<Region>) -> Target;
    /// Gives memory taken by `adopt` up again.
    fn release(&mut self, _target: Target) {}
    /// A submission starts (1) or stops (-1) to depend on a file.
    fn count_user(&mut self, _file: &FileRef, _change: i32) {}
    /// Whether vectored reads into registered memory are possible.
    fn has_readv_fixed(&self) -> bool;
}

/// Rings and memory that had to be leaked because the kernel never gave them back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeakStats {
    /// Rings leaked.
    pub rings: u64,
    /// Reads that were in flight then.
    pub reads: u64,
    /// Bytes those reads may still write, and those of the queues.
    pub bytes: u64,
    /// io_queues whose memory was leaked because consumers might still use it.
    pub queues: u64,
}

static LEAKED_RINGS: AtomicU64 = AtomicU64::new(0);
static LEAKED_READS: AtomicU64 = AtomicU64::new(0);
static LEAKED_BYTES: AtomicU64 = AtomicU64::new(0);
static LEAKED_QUEUES: AtomicU64 = AtomicU64::new(0);

/// The memory of an io_queue is leaked.
pub(crate) fn count_leaked_queue(bytes: u64) {
    LEAKED_QUEUES.fetch_add(1, Ordering::Relaxed);
    LEAKED_BYTES.fetch_add(bytes, Ordering::Relaxed);
}

/// What this process has leaked so far.
#[must_use]
pub fn leak_stats() -> LeakStats {
    LeakStats {
        rings: LEAKED_RINGS.load(Ordering::Relaxed),
        reads: LEAKED_READS.load(Ordering::Relaxed),
        bytes: LEAKED_BYTES.load(Ordering::Relaxed),
        queues: LEAKED_QUEUES.load(Ordering::Relaxed),
    }
}

/// `user_data` of cancel commands, whose completions are only counted.
const CANCEL: u64 = u64::MAX;

#[derive(Default)]
struct Slot {
    op: Option<Box<Op>>,
    /// Counts uses: a completion for an earlier use is told apart.
    generation: u32,
    /// The scatter list as the kernel reads it.
    iovecs: Vec<libc::iovec>,
}

impl Slot {
    fn token(&self, index: u32) -> u64 {
        u64::from(self.generation) << 32 | u64::from(index)
    }
}

/// The real io_uring.
pub(crate) struct KernelQueue {
    ring: ManuallyDrop<IoUringState>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    cancels: usize,
    /// System calls of the ring before it was taken over.
    enters_before: u64,
    epoch: Instant,
    register: bool,
}

impl KernelQueue {
    /// Takes over a ring. `register`: whether the stream's own memory may be registered.
    pub(crate) fn new(ring: IoUringState, register: bool) -> Self {
        // Commands in flight never exceed what the completion queue can hold; an eighth is kept for cancellations. More
        // of them overflow it, which costs an `enter` and loses nothing (IORING_FEAT_NODROP).
        let room = ring.features().cq_entries as usize;
        let commands = room - (room / 8).min(64);
        Self {
            enters_before: ring.ring.enters(),
            ring: ManuallyDrop::new(ring),
            slots: std::iter::repeat_with(Slot::default).take(commands).collect(),
            free: (0..commands as u32).rev().collect(),
            cancels: 0,
            epoch: Instant::now(),
            register,
        }
    }

    pub(crate) fn ring(&self) -> &IoUringState {
        &self.ring
    }

    pub(crate) fn ring_mut(&mut self) -> &mut IoUringState {
        &mut self.ring
    }

    /// Where its time starts.
    #[inline]
    pub(crate) fn epoch(&self) -> Instant {
        self.epoch
    }

    /// Reads that the kernel has.
    pub(crate) fn reads(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Gives up a registration of the stream's own memory.
    pub(crate) fn retire(&mut self, entry: Arc<BufferEntry>) {
        let IoUringState { ring, buffers, .. } = &mut *self.ring;
        buffers.retire(ring, entry);
    }

    /// Makes room for one SQE, submitting earlier ones if need be.
    #[inline]
    fn make_sq_room(&mut self) -> Result<bool, Errno> {
        if self.ring.ring.sq_room() > 0 {
            return Ok(true);
        }
        self.enter(0, None)?;
        if self.ring.ring.sq_room() == 0 && self.ring.features().sqpoll {
            self.ring.ring.wait_for_sq_room()?;
        }
        Ok(self.ring.ring.sq_room() > 0)
    }

    /// Clears registrations that were given up and that no unfinished read uses any more.
    pub(crate) fn sweep(&mut self) {
        let IoUringState { ring, buffers, .. } = &mut *self.ring;
        buffers.sweep(ring);
    }

    /// Bytes of bookkeeping.
    pub(crate) fn footprint(&self) -> usize {
        let iovecs: usize = self.slots.iter().map(|slot| slot.iovecs.capacity() * size_of::<libc::iovec>()).sum();
        self.slots.capacity() * size_of::<Slot>() + self.free.capacity() * 4 + iovecs
    }

    /// Gives the ring back; `None` when the kernel still has commands, and the ring is leaked.
    pub(crate) fn into_ring(self) -> Option<IoUringState> {
        let mut this = ManuallyDrop::new(self);
        if this.in_kernel() > 0 {
            drop(ManuallyDrop::into_inner(this));
            return None;
        }
        let slots = std::mem::take(&mut this.slots);
        drop((slots, std::mem::take(&mut this.free)));
        // SAFETY: `this` is never used or dropped again, so the ring is taken exactly once.
        Some(unsafe { ManuallyDrop::take(&mut this.ring) })
    }
}

impl Queue for KernelQueue {
    #[inline]
    fn make_room(&mut self) -> Result<bool, Errno> {
        if self.free.is_empty() { Ok(false) } else { self.make_sq_room() }
    }

    #[inline]
    fn push(&mut self, op: Box<Op>, segments: &[Segment]) {
        let Some(index) = self.free.pop() else {
            unreachable!("push without make_room");
        };
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1) & (u32::MAX >> 1);
        let entry = entry(&op, segments, &mut slot.iovecs).user_data(slot.token(index));
        // SAFETY: `entry` checked that the command writes inside the region of `op`'s target (or bounce slot), and
        // reads its scatter list from `slot.iovecs`. The op moves into the slot in the next statement and stays there,
        // holding its region, until its completion is reaped; the slot's vectors are not touched meanwhile. Should
        // the queue be dropped first, `Drop` leaks ring, slots and ops together. The descriptor is the caller's
        // matter: a wrong one reads another file, it does not write elsewhere.
        let pushed = unsafe { self.ring.ring.push(&entry) };
        slot.op = Some(op);
        assert!(pushed, "push without make_room");
    }

    fn cancel(&mut self, wanted: impl Fn(u64) -> bool) {
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if !slot.op.as_deref().is_some_and(|op| wanted(op.sequence)) {
                continue;
            }
            let entry = opcode::AsyncCancel::new(slot.token(index as u32)).build().user_data(CANCEL);
            if self.make_sq_room().is_err() {
                return;
            }
            // SAFETY: a cancel command points to nothing.
            if unsafe { self.ring.ring.push(&entry) } {
                self.cancels += 1;
            }
        }
    }

    #[inline]
    fn has_unsubmitted(&mut self) -> bool {
        self.ring.ring.sq_len() > 0
    }

    #[inline]
    fn wants_enter(&mut self) -> bool {
        let in_kernel = self.in_kernel();
        let ring = &mut self.ring.ring;
        ring.sq_len() > 0 || in_kernel > 0 && ring.needs_enter()
    }

    fn enter(&mut self, wait: u32, timeout: Option<Duration>) -> Result<(), Errno> {
        // The kernel polls an IOPOLL ring until it has what was asked for, whatever the timeout says: with a timeout,
        // ask for what is there, and poll from here.
        let wait = if timeout.is_some() && self.ring.features().iopoll { 0 } else { wait };
        self.ring.ring.enter(wait, timeout)
    }

    #[inline]
    fn reap(&mut self) -> Option<Reaped> {
        loop {
            let cqe = self.ring.ring.pop()?;
            if cqe.user_data == CANCEL {
                self.cancels = self.cancels.saturating_sub(1);
                continue;
            }
            let index = cqe.user_data as u32;
            let slot = self.slots.get_mut(index as usize).filter(|slot| slot.token(index) == cqe.user_data);
            let Some(op) = slot.and_then(|slot| slot.op.take()) else {
                tracing::error!(target: "ringest::ring", user_data = cqe.user_data, "completion of an unknown command");
                continue;
            };
            self.free.push(index);
            return Some(Reaped { op, result: cqe.result });
        }
    }

    fn in_kernel(&self) -> usize {
        self.reads() + self.cancels
    }

    fn enters(&self) -> u64 {
        self.ring.ring.enters() - self.enters_before
    }

    #[inline]
    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    fn adopt(&mut self, region: Arc<Region>) -> Target {
        if self.register {
            let IoUringState { ring, buffers, .. } = &mut *self.ring;
            let whole = crate::memory::GpuMappedBuffer::whole(Arc::clone(&region));
            if let Ok(entry) = buffers.attach(ring, &whole) {
                return Target::Registered(entry);
            }
        }
        Target::Plain(region)
    }

    fn release(&mut self, target: Target) {
        if let Target::Registered(entry) = target {
            self.retire(entry);
        }
    }

    #[inline]
    fn count_user(&mut self, file: &FileRef, change: i32) {
        if let Source::Registered { index, .. } = file.0 {
            self.ring.files.count_user(index, change);
        }
    }

    fn has_readv_fixed(&self) -> bool {
        self.ring.features().readv_fixed
    }
}

impl Drop for KernelQueue {
    fn drop(&mut self) {
        let reads = self.reads();
        if reads == 0 {
            // Cancel commands in flight point to nothing, so the ring may go with them.
            // SAFETY: the ring is dropped only here or taken in `into_ring`, which forgets `self`.
            unsafe { ManuallyDrop::drop(&mut self.ring) };
            return;
        }
        let slots = std::mem::take(&mut self.slots);
        if !self.ring.owner.is_forked() {
            let bytes: usize = slots.iter().filter_map(|slot| slot.op.as_deref()).map(|op| op.remaining).sum();
            LEAKED_RINGS.fetch_add(1, Ordering::Relaxed);
            LEAKED_READS.fetch_add(reads as u64, Ordering::Relaxed);
            LEAKED_BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
            tracing::error!(
                target: "ringest::ring",
                fd = self.ring.fd(), reads, bytes,
                "reads never completed: their ring and memory are leaked, because the device may still write"
            );
        }
        // The ring is in ManuallyDrop and the ops hold their memory: forgetting them leaks both.
        std::mem::forget(slots);
    }
}

/// Builds the SQE of an op's command, checking that it stays inside its memory.
#[inline]
fn entry(op: &Op, segments: &[Segment], iovecs: &mut Vec<libc::iovec>) -> squeue::Entry {
    match &op.command {
        Command::Direct { len, slot } => {
            let address = checked(op.target.region(), op.target_offset, *len as usize);
            read(&op.file, op.file_offset, address, *len, *slot)
        }
        Command::Bounce { file_offset, len, slot, .. } => {
            let address = checked(slot.pool.region(), slot.offset(), *len as usize);
            read(&op.file, *file_offset, address, *len, slot.registration())
        }
        Command::Vectored { slot } => {
            iovecs.clear();
            iovecs.extend(segments.iter().map(|&(offset, len)| libc::iovec {
                iov_base: checked(op.target.region(), offset, len).cast(),
                iov_len: len,
            }));
            let (pointer, count) = (iovecs.as_ptr(), iovecs.len() as u32);
            with_file(&op.file, |fd| match (slot, fd) {
                (Some(slot), Fd::Raw(fd)) => {
                    opcode::ReadvFixed::new(fd, pointer, count, *slot).offset(op.file_offset).build()
                }
                (Some(slot), Fd::Fixed(fd)) => {
                    opcode::ReadvFixed::new(fd, pointer, count, *slot).offset(op.file_offset).build()
                }
                (None, Fd::Raw(fd)) => opcode::Readv::new(fd, pointer, count).offset(op.file_offset).build(),
                (None, Fd::Fixed(fd)) => opcode::Readv::new(fd, pointer, count).offset(op.file_offset).build(),
            })
        }
    }
}

/// The address of `[offset, offset + len)` in the region, which must contain it.
#[inline]
fn checked(region: &Region, offset: usize, len: usize) -> *mut u8 {
    assert!(offset.checked_add(len).is_some_and(|end| end <= region.len()), "read outside its region");
    region.base().as_ptr().wrapping_add(offset)
}

#[inline]
fn read(file: &FileRef, offset: u64, address: *mut u8, len: u32, slot: Option<u16>) -> squeue::Entry {
    with_file(file, |fd| match (slot, fd) {
        (Some(slot), Fd::Raw(fd)) => opcode::ReadFixed::new(fd, address, len, slot).offset(offset).build(),
        (Some(slot), Fd::Fixed(fd)) => opcode::ReadFixed::new(fd, address, len, slot).offset(offset).build(),
        (None, Fd::Raw(fd)) => opcode::Read::new(fd, address, len).offset(offset).build(),
        (None, Fd::Fixed(fd)) => opcode::Read::new(fd, address, len).offset(offset).build(),
    })
}

enum Fd {
    Raw(types::Fd),
    Fixed(types::Fixed),
}

#[inline]
fn with_file(file: &FileRef, build: impl FnOnce(Fd) -> squeue::Entry) -> squeue::Entry {
    build(match &file.0 {
        Source::Fd(fd) => Fd::Raw(types::Fd(*fd)),
        Source::Open(open) => Fd::Raw(types::Fd(open.fd())),
        Source::Registered { index, .. } => Fd::Fixed(types::Fixed(*index)),
    })
}
