//! Opening files for reading and asking how O_DIRECT wants them read.

use super::{Errno, check, fault, last_errno};
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What `fstat` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    /// `st_mode & S_IFMT`.
    pub(crate) format: libc::mode_t,
    /// Bytes; 0 for a block device.
    pub(crate) size: u64,
}

/// Opens `path` without side effects (O_PATH): no FIFO blocks, no device reacts.
pub(crate) fn open_path(path: &Path) -> Result<OwnedFd, Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| libc::EINVAL)?;
    open(&path, libc::O_PATH | libc::O_CLOEXEC)
}

/// Opens the file behind a descriptor once more for reading, with flags of its own.
pub(crate) fn reopen(fd: RawFd, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    let path = CString::new(format!("/proc/self/fd/{fd}")).map_err(|_| libc::EINVAL)?;
    open(&path, libc::O_RDONLY | libc::O_CLOEXEC | flags)
}

fn open(path: &CString, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    loop {
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        let opened = fault::point("open").and_then(|()| check(unsafe { libc::open(path.as_ptr(), flags) }.into()));
        match opened {
            // SAFETY: the descriptor was just made and belongs to nobody else.
            Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
            Err(libc::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

pub(crate) fn stat(fd: RawFd) -> Result<Stat, Errno> {
    fault::point("fstat")?;
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: `stat` is a valid place for the result, and all-zero bytes are a valid `stat`.
    let stat = unsafe {
        check(libc::fstat(fd, stat.as_mut_ptr()).into())?;
        stat.assume_init()
    };
    Ok(Stat { format: stat.st_mode & libc::S_IFMT, size: u64::try_from(stat.st_size).unwrap_or(0) })
}

/// Whether two descriptors stand for the same file; not when either is closed.
#[cfg_attr(not(feature = "testing"), allow(dead_code, reason = "for imports from other APIs"))]
pub(crate) fn is_same_file(a: RawFd, b: RawFd) -> bool {
    let identity = |fd| {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: `stat` is a valid place for the result, and all-zero bytes are a valid `stat`.
        let stat = unsafe { (libc::fstat(fd, stat.as_mut_ptr()) == 0).then(|| stat.assume_init()) }?;
        Some((stat.st_dev, stat.st_ino))
    };
    identity(a).is_some_and(|a| identity(b) == Some(a))
}

/// Size of a block device in bytes (`BLKGETSIZE64`).
pub(crate) fn block_device_size(fd: RawFd) -> Result<u64, Errno> {
    // _IOR(0x12, 114, size_t), linux/fs.h
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    fault::point("ioctl")?;
    let mut size = 0u64;
    // SAFETY: the ioctl writes one u64 to the given place.
    check(unsafe { libc::ioctl(fd, BLKGETSIZE64 as _, &mut size) }.into())?;
    Ok(size)
}

/// Whether the descriptor was opened with O_DIRECT.
pub(crate) fn is_direct(fd: RawFd) -> Result<bool, Errno> {
    fault::point("fcntl")?;
    // SAFETY: F_GETFL takes no argument.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) }.into())?;
    Ok(flags & libc::c_long::from(libc::O_DIRECT) != 0)
}

/// How O_DIRECT reads of a file must be aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirectSupport {
    /// Alignment of memory and of offset and length, in bytes.
    Aligned { memory: u32, offset: u32 },
    /// The file system refuses O_DIRECT on this file.
    Unsupported,
    /// The kernel does not say (before 6.1, or a file system that does not report).
    Unknown,
}

/// `statx` with STATX_DIOALIGN (Linux 6.1) and STATX_DIO_READ_ALIGN (6.14).
pub(crate) fn direct_support(fd: RawFd) -> Result<DirectSupport, Errno> {
    fault::point("statx")?;
    let mut x = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let mask = libc::STATX_DIOALIGN | libc::STATX_DIO_READ_ALIGN;
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor itself; `x` is a valid place for the result, and
    // all-zero bytes are a valid `statx`.
    let x = unsafe {
        if libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, x.as_mut_ptr()) == -1 {
            return Err(last_errno());
        }
        x.assume_init()
    };
    if x.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(if is_memory(fd)? { DirectSupport::Unsupported } else { DirectSupport::Unknown });
    }
    if x.stx_dio_offset_align == 0 || x.stx_dio_mem_align == 0 {
        return Ok(DirectSupport::Unsupported);
    }
    let read = if x.stx_mask & libc::STATX_DIO_READ_ALIGN != 0 { x.stx_dio_read_offset_align } else { 0 };
    let offset = if read != 0 { read } else { x.stx_dio_offset_align };
    Ok(DirectSupport::Aligned { memory: x.stx_dio_mem_align, offset })
}

/// Whether the file lives in the page cache alone. Such file systems take the O_DIRECT flag and ignore it.
fn is_memory(fd: RawFd) -> Result<bool, Errno> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    fault::point("fstatfs")?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `stat` is a valid place for the result, and all-zero bytes are a valid `statfs`.
    let stat = unsafe {
        check(libc::fstatfs(fd, stat.as_mut_ptr()).into())?;
        stat.assume_init()
    };
    Ok([libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&stat.f_type))
}

/// Duplicates a descriptor (close-on-exec).
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    fault::point("fcntl")?;
    // SAFETY: F_DUPFD_CLOEXEC takes the lowest wanted number; the result is a new descriptor that we own.
    unsafe {
        let fd = check(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0).into())?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// A field of the calling thread's `/proc/.../status`, trimmed.
pub(crate) fn thread_status(field: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// `kernel.io_uring_disabled`; `None` where the kernel has no such setting.
pub(crate) fn io_uring_disabled() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?.trim().parse().ok()
}

/// The raw number of an owned descriptor.
pub(crate) fn raw(fd: &OwnedFd) -> RawFd {
    fd.as_raw_fd()
}
