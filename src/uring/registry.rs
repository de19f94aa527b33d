//! What is registered with a ring: buffers, split at 1 GiB behind one logical index, and files.

use super::file::{DirectAlignment, FileRef, direct_alignment};
use crate::error::{PipelineError, Result, Text};
use crate::memory::{GpuMappedBuffer, MemoryKind, Region};
use crate::sys::mem::memlock_limit;
use crate::sys::uring::{Ring, SetupParams, setup};
use crate::sys::{Errno, file};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// Most bytes the kernel takes in one registered buffer (`io_uring/rsrc.c`, io_buffer_validate: SZ_1G).
pub(crate) const SPLIT: usize = 1 << 30;

/// Most buffers and files the kernel registers with one ring (IORING_MAX_REG_BUFFERS, IORING_MAX_FIXED_FILES).
const MAX_BUFFERS: u32 = 1 << 14;
const MAX_FILES: u32 = 1 << 20;

/// One registered buffer: a run of entries in the kernel's table.
///
/// A read that uses it holds an `Arc`, so its entries are not given to another buffer while the read may still issue
/// commands.
#[derive(Debug)]
pub(crate) struct BufferEntry {
    region: Arc<Region>,
    start: usize,
    len: usize,
    first: u16,
}

impl BufferEntry {
    /// For the simulator: a registration that no kernel knows of.
    #[cfg(feature = "testing")]
    pub(crate) fn simulated(buffer: &GpuMappedBuffer<'_>, first: u16) -> Arc<Self> {
        let span = buffer.span();
        Arc::new(Self { region: Arc::clone(buffer.region()), start: span.start, len: span.len(), first })
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    /// The kernel's index for the byte at `offset` of the region, and how many bytes from there on it covers.
    /// `None` outside the registered range.
    pub(super) fn slot(&self, offset: usize) -> Option<(u16, usize)> {
        let relative = offset.checked_sub(self.start).filter(|&relative| relative < self.len)?;
        let index = relative / SPLIT;
        let end = ((index + 1) * SPLIT).min(self.len);
        Some((self.first + index as u16, end - relative))
    }

    /// Bytes registered.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where in the region the registration starts.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    fn covers(&self, buffer: &GpuMappedBuffer<'_>) -> bool {
        let span = buffer.span();
        std::ptr::eq(Arc::as_ptr(&self.region), Arc::as_ptr(buffer.region()))
            && self.start <= span.start
            && span.end <= self.start + self.len
    }

    fn slots(&self) -> usize {
        self.len.div_ceil(SPLIT)
    }

    fn ranges(&self) -> impl Iterator<Item = libc::iovec> + '_ {
        (0..self.slots()).map(|index| {
            let at = index * SPLIT;
            libc::iovec {
                iov_base: self.region.base().as_ptr().wrapping_add(self.start + at).cast(),
                iov_len: (self.len - at).min(SPLIT),
            }
        })
    }
}

/// The buffers of one ring.
pub(super) struct BufferTable {
    /// Whether the kernel's table is sparse and can be updated (Linux 5.19).
    sparse: bool,
    /// Which entries of the kernel's table are taken.
    used: Vec<bool>,
    /// The caller's table, once there is one.
    logical: Option<Vec<Option<Arc<BufferEntry>>>>,
    /// Entries no longer reachable that unfinished reads may still use.
    retired: Vec<Arc<BufferEntry>>,
}

impl BufferTable {
    pub(super) fn new(ring: &Ring, slots: u32) -> Self {
        let sparse = ring.registered_call(|submitter| submitter.register_buffers_sparse(slots)).is_ok();
        Self { sparse, used: vec![false; slots as usize], logical: None, retired: Vec::new() }
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.sparse
    }

    pub(super) fn len(&self) -> u32 {
        self.logical.as_ref().map_or(0, Vec::len) as u32
    }

    pub(super) fn get(&self, index: u32) -> Result<&Arc<BufferEntry>> {
        let table = self.logical.as_deref().unwrap_or_default();
        match table.get(index as usize) {
            Some(Some(entry)) => Ok(entry),
            Some(None) => Err(PipelineError::invalid(
                format!("registered buffer {index}"),
                "its table entry is empty: fill it with update_buffer",
            )),
            None => Err(out_of_table("registered buffer index", index, table.len())),
        }
    }

    /// A registration of the caller's that contains the buffer.
    pub(super) fn find(&self, buffer: &GpuMappedBuffer<'_>) -> Option<Arc<BufferEntry>> {
        self.logical.iter().flatten().flatten().find(|entry| entry.covers(buffer)).map(Arc::clone)
    }

    pub(super) fn register(&mut self, ring: &Ring, buffers: &[&GpuMappedBuffer<'_>]) -> Result<()> {
        self.require_unregistered()?;
        if buffers.is_empty() {
            return Err(PipelineError::invalid("0 buffers", "register at least one"));
        }
        if !self.sparse {
            self.logical = Some(self.register_table(ring, buffers)?);
            return Ok(());
        }
        let mut entries = Vec::with_capacity(buffers.len());
        for buffer in buffers {
            match self.attach(ring, buffer) {
                Ok(entry) => entries.push(Some(entry)),
                Err(error) => {
                    entries.into_iter().flatten().for_each(|entry| self.retire(ring, entry));
                    return Err(error);
                }
            }
        }
        self.logical = Some(entries);
        Ok(())
    }

    /// Before Linux 5.19: one table, registered at once.
    fn register_table(
        &mut self,
        ring: &Ring,
        buffers: &[&GpuMappedBuffer<'_>],
    ) -> Result<Vec<Option<Arc<BufferEntry>>>> {
        if self.used.contains(&true) {
            return Err(not_sparse());
        }
        let mut entries = Vec::with_capacity(buffers.len());
        let mut ranges = Vec::new();
        for buffer in buffers {
            let entry = new_entry(buffer, ranges.len())?;
            ranges.extend(entry.ranges());
            entries.push(Some(Arc::new(entry)));
        }
        if ranges.len() > self.used.len() {
            return Err(self.too_small());
        }
        // SAFETY: each entry holds its region, and this table keeps the entries until it is unregistered or the ring
        // is gone.
        unsafe { ring.register_buffers(&ranges) }
            .map_err(|errno| register_error("io_uring_register(BUFFERS)", errno))?;
        self.used[..ranges.len()].fill(true);
        Ok(entries)
    }

    pub(super) fn register_sparse(&mut self, count: u32) -> Result<()> {
        self.require_unregistered()?;
        if count == 0 {
            return Err(PipelineError::invalid("0 buffers", "make room for at least one"));
        }
        if count > MAX_BUFFERS {
            return Err(PipelineError::invalid(format!("{count} buffers"), format!("use at most {MAX_BUFFERS}")));
        }
        if !self.sparse {
            return Err(not_sparse());
        }
        self.logical = Some(vec![None; count as usize]);
        Ok(())
    }

    pub(super) fn update(&mut self, ring: &Ring, index: u32, buffer: Option<&GpuMappedBuffer<'_>>) -> Result<()> {
        let len = self.len() as usize;
        if index as usize >= len {
            return Err(out_of_table("registered buffer index", index, len));
        }
        if !self.sparse {
            return Err(not_sparse());
        }
        self.sweep(ring);
        let entry = buffer.map(|buffer| self.attach(ring, buffer)).transpose()?;
        let place = self.logical.as_mut().and_then(|table| table.get_mut(index as usize));
        if let Some(old) = place.and_then(|place| std::mem::replace(place, entry)) {
            self.retire(ring, old);
        }
        Ok(())
    }

    pub(super) fn unregister(&mut self, ring: &Ring) -> Result<()> {
        let Some(table) = self.logical.take() else {
            return Err(PipelineError::invalid("unregistering buffers", "none are registered"));
        };
        if self.sparse {
            table.into_iter().flatten().for_each(|entry| self.retire(ring, entry));
            return Ok(());
        }
        if table.iter().flatten().any(|entry| Arc::strong_count(entry) > 1) {
            self.logical = Some(table);
            return Err(PipelineError::busy("a registered buffer", "wait for the reads that use it"));
        }
        if let Err(errno) = ring.registered_call(|submitter| submitter.unregister_buffers()) {
            self.logical = Some(table);
            return Err(register_error("io_uring_register(UNREGISTER_BUFFERS)", errno));
        }
        self.used.fill(false);
        Ok(())
    }

    /// Registers one buffer outside the caller's table.
    pub(super) fn attach(&mut self, ring: &Ring, buffer: &GpuMappedBuffer<'_>) -> Result<Arc<BufferEntry>> {
        self.sweep(ring);
        if !self.sparse {
            return self.attach_alone(ring, buffer);
        }
        let slots = buffer.len().div_ceil(SPLIT).max(1);
        let first = self.free_run(slots).ok_or_else(|| self.too_small())?;
        let entry = Arc::new(new_entry(buffer, first)?);
        // One entry at a time: the kernel answers a partly failed update of several with the count it managed, which
        // reads as success.
        for (index, range) in entry.ranges().enumerate() {
            // SAFETY: the entry holds its region; it is dropped only after its kernel entries were emptied.
            if let Err(errno) = unsafe { ring.update_buffers((first + index) as u32, &[range]) } {
                self.clear(ring, first, index);
                return Err(register_error("io_uring_register(BUFFERS_UPDATE)", errno));
            }
            self.used[first + index] = true;
        }
        Ok(entry)
    }

    /// Before Linux 5.19: the only registration of the ring.
    fn attach_alone(&mut self, ring: &Ring, buffer: &GpuMappedBuffer<'_>) -> Result<Arc<BufferEntry>> {
        let mut entries = self.register_table(ring, &[buffer])?;
        match entries.pop() {
            Some(Some(entry)) => Ok(entry),
            _ => unreachable!("one buffer makes one entry"),
        }
    }

    /// Gives an entry up; the kernel's table is cleared as soon as no unfinished read uses it.
    pub(super) fn retire(&mut self, ring: &Ring, entry: Arc<BufferEntry>) {
        self.retired.push(entry);
        self.sweep(ring);
    }

    /// Clears what unfinished reads no longer use.
    pub(super) fn sweep(&mut self, ring: &Ring) {
        if !self.sparse {
            return self.sweep_whole(ring);
        }
        let mut index = 0;
        while index < self.retired.len() {
            if Arc::strong_count(&self.retired[index]) == 1 {
                let entry = self.retired.swap_remove(index);
                self.clear(ring, usize::from(entry.first), entry.slots());
            } else {
                index += 1;
            }
        }
    }

    /// Before Linux 5.19 a table goes as a whole, once nothing uses any of it.
    fn sweep_whole(&mut self, ring: &Ring) {
        let unused = self.retired.iter().all(|entry| Arc::strong_count(entry) == 1);
        if self.retired.is_empty() || self.logical.is_some() || !unused {
            return;
        }
        if ring.registered_call(|submitter| submitter.unregister_buffers()).is_ok() {
            self.retired.clear();
            self.used.fill(false);
        }
    }

    fn clear(&mut self, ring: &Ring, first: usize, count: usize) {
        for slot in first..first + count {
            match empty_slot(ring, slot) {
                Ok(()) => self.used[slot] = false,
                // The entry stays taken and its pages pinned until the ring is closed; nothing can be read into it.
                Err(errno) => tracing::warn!(target: "ringest::ring", slot, errno, "buffer entry could not be cleared"),
            }
        }
    }

    fn free_run(&self, count: usize) -> Option<usize> {
        let mut run = 0;
        for (slot, used) in self.used.iter().enumerate() {
            run = if *used { 0 } else { run + 1 };
            if run == count {
                return Some(slot + 1 - count);
            }
        }
        None
    }

    pub(super) fn share(&self, ring: &Ring) -> Result<SharedBuffers> {
        let Some(table) = &self.logical else {
            return Err(PipelineError::invalid("sharing buffers", "none are registered"));
        };
        let mut used = vec![false; self.used.len()];
        for entry in table.iter().flatten() {
            used[usize::from(entry.first)..][..entry.slots()].fill(true);
        }
        // What the ring has besides the caller's table (a stream's own memory) is not for others.
        let strays = (0..used.len()).filter(|&slot| self.used[slot] && !used[slot]);
        Ok(SharedBuffers { fd: hub(ring, strays)?, table: table.clone(), used })
    }

    pub(super) fn clone_from_shared(&mut self, ring: &Ring, shared: &SharedBuffers) -> Result<()> {
        self.sweep(ring);
        if self.logical.is_some() || self.used.contains(&true) {
            return Err(PipelineError::busy(
                "this ring's buffer table",
                "clone into a ring without registered buffers",
            ));
        }
        if self.sparse {
            // Cloning fills a ring without a table; ours is empty, so nothing is lost.
            ring.registered_call(|submitter| submitter.unregister_buffers())
                .map_err(|errno| register_error("io_uring_register(UNREGISTER_BUFFERS)", errno))?;
        }
        let source = shared.fd.as_raw_fd();
        let cloned = ring.registered_call(|submitter| submitter.register_buffers_clone(source));
        if let Err(errno) = cloned {
            let slots = self.used.len() as u32;
            self.sparse =
                self.sparse && ring.registered_call(|submitter| submitter.register_buffers_sparse(slots)).is_ok();
            return Err(clone_error(errno));
        }
        self.used.clone_from(&shared.used);
        self.logical = Some(shared.table.iter().map(|entry| entry.as_deref().map(BufferEntry::twin)).collect());
        Ok(())
    }

    fn require_unregistered(&self) -> Result<()> {
        if self.logical.is_some() {
            return Err(PipelineError::busy(
                "the buffer table",
                "unregister the buffers first, or update single entries",
            ));
        }
        Ok(())
    }

    fn too_small(&self) -> PipelineError {
        PipelineError::QueueFull {
            queue: "the ring's buffer table",
            fix: format!("raise RingOptions::buffer_slots ({} now, one per started GiB)", self.used.len()).into(),
        }
    }
}

impl BufferEntry {
    /// The same registration as seen from a ring that cloned it.
    fn twin(&self) -> Arc<Self> {
        let Self { region, start, len, first } = self;
        Arc::new(Self { region: Arc::clone(region), start: *start, len: *len, first: *first })
    }
}

/// Empties an entry of a ring's buffer table.
fn empty_slot(ring: &Ring, slot: usize) -> std::result::Result<(), Errno> {
    let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    // SAFETY: an empty range refers to no memory.
    unsafe { ring.update_buffers(slot as u32, &[empty]) }
}

/// A ring that only holds clones of this one's registrations. The kernel lets no other thread clone from a
/// SINGLE_ISSUER ring (`io_register_clone_buffers`: EEXIST), but from one without an issuer any thread may.
fn hub(ring: &Ring, strays: impl Iterator<Item = usize>) -> Result<OwnedFd> {
    let params =
        SetupParams { entries: 1, cq_entries: 1, flags: setup::CQSIZE, sq_thread_idle_ms: 0, sq_thread_cpu: 0 };
    let hub = Ring::setup(params).map_err(|errno| PipelineError::IoUringSyscall {
        call: "io_uring_setup",
        errno,
        fix: "sharing buffers takes a small ring of its own: raise RLIMIT_NOFILE or the memory limits".into(),
    })?;
    let source = ring.fd();
    hub.registered_call(|submitter| submitter.register_buffers_clone(source)).map_err(clone_error)?;
    for slot in strays {
        empty_slot(&hub, slot).map_err(|errno| register_error("io_uring_register(BUFFERS_UPDATE)", errno))?;
    }
    file::duplicate(hub.fd()).map_err(|errno| PipelineError::Syscall {
        call: "fcntl",
        what: "F_DUPFD_CLOEXEC of a ring".to_owned(),
        errno,
        fix: "raise RLIMIT_NOFILE".into(),
    })
}

fn clone_error(errno: Errno) -> PipelineError {
    match errno {
        libc::EINVAL => PipelineError::unsupported(
            "sharing registered buffers between rings",
            "IORING_REGISTER_CLONE_BUFFERS needs Linux 6.12: register the buffers with each ring",
        ),
        errno => register_error("io_uring_register(CLONE_BUFFERS)", errno),
    }
}

fn new_entry(buffer: &GpuMappedBuffer<'_>, first: usize) -> Result<BufferEntry> {
    if buffer.kind() != MemoryKind::HostVisible {
        return Err(PipelineError::unsupported(
            "registering a device's memory window with io_uring",
            "the kernel does not pin peer memory for long (FOLL_LONGTERM): read into it unregistered",
        ));
    }
    if buffer.is_empty() {
        return Err(PipelineError::invalid("a buffer of 0 bytes", "register at least one byte"));
    }
    let span = buffer.span();
    Ok(BufferEntry { region: Arc::clone(buffer.region()), start: span.start, len: span.len(), first: first as u16 })
}

fn not_sparse() -> PipelineError {
    PipelineError::unsupported(
        "a sparse or updated buffer table",
        "it needs Linux 5.19: register all buffers in one call",
    )
}

fn out_of_table(what: &'static str, index: u32, len: usize) -> PipelineError {
    PipelineError::OutOfRange { what, offset: index.into(), length: 1, limit: len as u64 }
}

fn register_error(call: &'static str, errno: Errno) -> PipelineError {
    let fix: Text = match errno {
        libc::ENOMEM => match memlock_limit() {
            Some(limit) => format!(
                "RLIMIT_MEMLOCK is {limit} bytes and counts all registered memory of this user: raise it (ulimit -l, \
                 LimitMEMLOCK=), grant CAP_IPC_LOCK, or read unregistered"
            )
            .into(),
            None => "the kernel has no memory for the registration".into(),
        },
        libc::EFAULT => {
            "the memory is not mapped, not writable, file-backed or a device's: register anonymous memory".into()
        }
        libc::EBADF => "a descriptor is not open".into(),
        libc::EMFILE => "raise RLIMIT_NOFILE: registered files count against it".into(),
        libc::EEXIST => "another thread owns the ring".into(),
        libc::EACCES => "the ring's restrictions or a security module forbid it".into(),
        _ => "see io_uring_register(2)".into(),
    };
    PipelineError::IoUringSyscall { call, errno, fix }
}

/// One ring's registered buffers, to be taken over by others ([`clone_buffers`](super::IoUringState::clone_buffers)).
///
/// Holds the registrations and the buffers' memory, also when the first ring is gone.
#[derive(Debug)]
pub struct SharedBuffers {
    fd: OwnedFd,
    table: Vec<Option<Arc<BufferEntry>>>,
    used: Vec<bool>,
}

/// One registered file.
#[derive(Debug, Clone)]
struct FileEntry {
    direct: Option<DirectAlignment>,
    /// Submissions that may still issue commands for it.
    users: u32,
}

/// The files of one ring.
#[derive(Default)]
pub(super) struct FileTable {
    entries: Option<Vec<Option<FileEntry>>>,
}

impl FileTable {
    pub(super) fn len(&self) -> u32 {
        self.entries.as_ref().map_or(0, Vec::len) as u32
    }

    #[inline]
    pub(super) fn get(&self, index: u32) -> Result<FileRef> {
        let table = self.entries.as_deref().unwrap_or_default();
        match table.get(index as usize) {
            Some(Some(entry)) => Ok(FileRef::registered(index, entry.direct)),
            Some(None) => Err(PipelineError::invalid(
                format!("registered file {index}"),
                "its table entry is empty: fill it with update_file",
            )),
            None => Err(out_of_table("registered file index", index, table.len())),
        }
    }

    /// What a file is now: a registered one is looked up.
    #[inline]
    pub(super) fn resolve(&self, file: FileRef) -> Result<FileRef> {
        match file.registered_index() {
            Some(index) => self.get(index),
            None => Ok(file),
        }
    }

    /// A submission starts (1) or stops (-1) to depend on the file at an index.
    pub(super) fn count_user(&mut self, index: u32, change: i32) {
        let entry = self.entries.as_mut().and_then(|table| table.get_mut(index as usize)?.as_mut());
        if let Some(entry) = entry {
            entry.users = entry.users.saturating_add_signed(change);
        }
    }

    pub(super) fn register(&mut self, ring: &Ring, fds: &[RawFd]) -> Result<()> {
        self.require_unregistered()?;
        if fds.is_empty() {
            return Err(PipelineError::invalid("0 files", "register at least one"));
        }
        let entries = fds.iter().map(|&fd| new_file(fd).map(Some));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        ring.registered_call(|submitter| submitter.register_files(fds))
            .map_err(|errno| register_error("io_uring_register(FILES)", errno))?;
        self.entries = Some(entries);
        Ok(())
    }

    pub(super) fn register_sparse(&mut self, ring: &Ring, count: u32) -> Result<()> {
        self.require_unregistered()?;
        if count == 0 {
            return Err(PipelineError::invalid("0 files", "make room for at least one"));
        }
        if count > MAX_FILES {
            return Err(register_error("io_uring_register(FILES)", libc::EMFILE));
        }
        // IORING_FILE_INDEX sparse tables are Linux 5.19; a table of -1 says the same to every kernel.
        let empty = vec![-1; count as usize];
        ring.registered_call(|submitter| submitter.register_files(&empty))
            .map_err(|errno| register_error("io_uring_register(FILES)", errno))?;
        self.entries = Some(vec![None; count as usize]);
        Ok(())
    }

    pub(super) fn update(&mut self, ring: &Ring, index: u32, fd: Option<RawFd>) -> Result<()> {
        let len = self.len() as usize;
        let Some(place) = self.entries.as_mut().and_then(|table| table.get_mut(index as usize)) else {
            return Err(out_of_table("registered file index", index, len));
        };
        if place.as_ref().is_some_and(|entry| entry.users > 0) {
            return Err(file_busy());
        }
        let entry = fd.map(new_file).transpose()?;
        ring.registered_call(|submitter| submitter.register_files_update(index, &[fd.unwrap_or(-1)]))
            .map_err(|errno| register_error("io_uring_register(FILES_UPDATE)", errno))?;
        *place = entry;
        Ok(())
    }

    pub(super) fn unregister(&mut self, ring: &Ring) -> Result<()> {
        let Some(entries) = &self.entries else {
            return Err(PipelineError::invalid("unregistering files", "none are registered"));
        };
        if entries.iter().flatten().any(|entry| entry.users > 0) {
            return Err(file_busy());
        }
        ring.registered_call(|submitter| submitter.unregister_files())
            .map_err(|errno| register_error("io_uring_register(UNREGISTER_FILES)", errno))?;
        self.entries = None;
        Ok(())
    }

    fn require_unregistered(&self) -> Result<()> {
        if self.entries.is_some() {
            return Err(PipelineError::busy("the file table", "unregister the files first, or update single entries"));
        }
        Ok(())
    }
}

fn new_file(fd: RawFd) -> Result<FileEntry> {
    let direct = direct_alignment(fd).map_err(|errno| PipelineError::Syscall {
        call: "fcntl",
        what: format!("F_GETFL of descriptor {fd}"),
        errno,
        fix: "register descriptors that are open".into(),
    })?;
    Ok(FileEntry { direct, users: 0 })
}

fn file_busy() -> PipelineError {
    PipelineError::busy("a registered file", "wait for the reads that use it")
}
