//! Files to read from, and how O_DIRECT wants them read.

use crate::error::{PipelineError, Result};
use crate::sys::{Errno, file};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

/// Alignment that O_DIRECT reads of a file need, in bytes; both are powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DirectAlignment {
    /// Of the memory address.
    pub memory: u32,
    /// Of file offset and length.
    pub offset: u32,
}

impl DirectAlignment {
    /// What every disk and file system in use accepts, for kernels that do not tell (before 6.1).
    const CONSERVATIVE: Self = Self { memory: 4096, offset: 4096 };
}

/// Whether a file is read around the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirectMode {
    /// O_DIRECT where the file system has it, buffered otherwise.
    #[default]
    Auto,
    /// O_DIRECT or an error.
    On,
    /// Through the page cache.
    Off,
}

/// An open regular file or block device, with its size and O_DIRECT alignment. Cheap to clone.
#[derive(Debug, Clone)]
pub struct InputFile(pub(super) Arc<OpenFile>);

#[derive(Debug)]
pub(super) struct OpenFile {
    fd: OwnedFd,
    direct: Option<DirectAlignment>,
    len: u64,
}

impl InputFile {
    /// Opens a file by path.
    ///
    /// # Errors
    /// The errno of `open`; `EISDIR` for a directory, `ESPIPE` for a FIFO, socket or character device (never opened, so
    /// nothing blocks); `EOPNOTSUPP` when O_DIRECT is demanded and the file system has none.
    pub fn open(path: impl AsRef<Path>, mode: DirectMode) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let anchor = file::open_path(path).map_err(|errno| open_error(&name, errno))?;
        Self::reopen(file::raw(&anchor), &name, mode)
    }

    /// Opens the file behind a descriptor once more. The caller's descriptor and its flags are not touched.
    ///
    /// # Errors
    /// As [`open`](Self::open); `EBADF` for a bad descriptor, `EACCES` when the file may no longer be opened.
    pub fn from_fd(fd: BorrowedFd<'_>, mode: DirectMode) -> Result<Self> {
        Self::reopen(fd.as_raw_fd(), &format!("descriptor {}", fd.as_raw_fd()), mode)
    }

    fn reopen(anchor: RawFd, name: &str, mode: DirectMode) -> Result<Self> {
        let stat = file::stat(anchor).map_err(|errno| open_error(name, errno))?;
        match stat.format {
            libc::S_IFREG | libc::S_IFBLK => {}
            libc::S_IFDIR => return Err(open_error(name, libc::EISDIR)),
            _ => return Err(open_error(name, libc::ESPIPE)),
        }
        let (fd, direct) = match mode {
            DirectMode::Off => (Self::open_flags(anchor, name, 0)?, None),
            DirectMode::On => Self::open_direct(anchor, name)?,
            DirectMode::Auto => match Self::open_direct(anchor, name) {
                Ok((fd, direct)) => (fd, direct),
                Err(PipelineError::NotSupported { .. }) => (Self::open_flags(anchor, name, 0)?, None),
                Err(error) => return Err(error),
            },
        };
        let len = match stat.format {
            libc::S_IFBLK => file::block_device_size(file::raw(&fd)).map_err(|errno| open_error(name, errno))?,
            _ => stat.size,
        };
        Ok(Self(Arc::new(OpenFile { fd, direct, len })))
    }

    fn open_flags(anchor: RawFd, name: &str, flags: libc::c_int) -> Result<OwnedFd> {
        file::reopen(anchor, flags).map_err(|errno| reopen_error(name, errno))
    }

    fn open_direct(anchor: RawFd, name: &str) -> Result<(OwnedFd, Option<DirectAlignment>)> {
        let refused = || {
            PipelineError::unsupported(
                format!("O_DIRECT on {name}"),
                "its file system reads through the page cache only: use DirectMode::Auto or Off",
            )
        };
        let fd = match file::reopen(anchor, libc::O_DIRECT) {
            Err(libc::EINVAL) => return Err(refused()),
            other => other.map_err(|errno| reopen_error(name, errno))?,
        };
        match alignment_of(file::raw(&fd)).map_err(|errno| open_error(name, errno))? {
            Some(alignment) => Ok((fd, Some(alignment))),
            None => Err(refused()),
        }
    }

    /// Bytes in the file when it was opened, by `fstat` (0 for what procfs and sysfs make up while it is read).
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether the file had no bytes when it was opened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// O_DIRECT alignment; `None` when the file is read through the page cache.
    #[must_use]
    pub fn direct(&self) -> Option<DirectAlignment> {
        self.0.direct
    }
}

impl AsFd for InputFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

/// Alignment of a descriptor that is known to be O_DIRECT; `None` when its file system refuses O_DIRECT after all.
fn alignment_of(fd: RawFd) -> std::result::Result<Option<DirectAlignment>, Errno> {
    Ok(match file::direct_support(fd)? {
        file::DirectSupport::Aligned { memory, offset } if memory.is_power_of_two() && offset.is_power_of_two() => {
            Some(DirectAlignment { memory, offset })
        }
        file::DirectSupport::Aligned { .. } | file::DirectSupport::Unknown => Some(DirectAlignment::CONSERVATIVE),
        file::DirectSupport::Unsupported => None,
    })
}

/// Alignment that reads of this descriptor need; `None` when it is not O_DIRECT.
pub(super) fn direct_alignment(fd: RawFd) -> std::result::Result<Option<DirectAlignment>, Errno> {
    if !file::is_direct(fd)? {
        return Ok(None);
    }
    alignment_of(fd)
}

fn open_error(name: &str, errno: Errno) -> PipelineError {
    let fix = match errno {
        libc::EISDIR => "it is a directory: name a file or a block device",
        libc::ESPIPE => "only regular files and block devices have offsets to read at",
        libc::ENOENT => "no such file: check the path",
        libc::EACCES | libc::EPERM => "give this user read permission",
        libc::EMFILE => "raise RLIMIT_NOFILE or close files",
        _ => "see open(2)",
    };
    PipelineError::Syscall { call: "open", what: name.to_owned(), errno, fix: fix.into() }
}

/// The file is there, held by a descriptor; only the way to it can be missing.
fn reopen_error(name: &str, errno: Errno) -> PipelineError {
    if errno != libc::ENOENT {
        return open_error(name, errno);
    }
    let what = format!("{name} through /proc/self/fd");
    PipelineError::Syscall { call: "open", what, errno, fix: "mount /proc in this root or container".into() }
}

/// What a read reads from.
///
/// Made from an [`InputFile`] (which it keeps open), from a registered file of the ring, or from a raw descriptor,
/// which the caller keeps open until the read has completed: a short read goes on with a further command.
#[derive(Debug, Clone)]
pub struct FileRef(pub(super) Source);

#[derive(Debug, Clone)]
pub(super) enum Source {
    Fd(RawFd),
    Open(Arc<OpenFile>),
    Registered { index: u32, direct: Option<DirectAlignment> },
}

impl FileRef {
    pub(super) fn registered(index: u32, direct: Option<DirectAlignment>) -> Self {
        Self(Source::Registered { index, direct })
    }

    /// No file: what an op at rest refers to.
    pub(super) fn none() -> Self {
        Self(Source::Fd(-1))
    }

    /// O_DIRECT alignment as far as it is known. A raw descriptor is asked when the kernel refuses a read with EINVAL.
    pub(crate) fn direct(&self) -> Option<DirectAlignment> {
        match &self.0 {
            Source::Fd(_) => None,
            Source::Open(file) => file.direct,
            Source::Registered { direct, .. } => *direct,
        }
    }

    pub(super) fn registered_index(&self) -> Option<u32> {
        match self.0 {
            Source::Registered { index, .. } => Some(index),
            _ => None,
        }
    }

    /// The descriptor to ask for its alignment, when nobody has yet.
    pub(super) fn unknown_fd(&self) -> Option<RawFd> {
        match &self.0 {
            Source::Fd(fd) => Some(*fd),
            _ => None,
        }
    }

    /// For the simulator: an arbitrary number and alignment.
    #[cfg(feature = "testing")]
    pub(crate) fn simulated(index: u32, direct: Option<DirectAlignment>) -> Self {
        Self::registered(index, direct)
    }

    /// For the simulator: the number given to [`simulated`](Self::simulated).
    #[cfg(feature = "testing")]
    pub(crate) fn index(&self) -> u32 {
        match &self.0 {
            Source::Registered { index, .. } => *index,
            Source::Fd(fd) => *fd as u32,
            Source::Open(file) => file.fd.as_raw_fd() as u32,
        }
    }
}

/// A number, not a promise: should the descriptor be closed meanwhile, the read fails or reads what took its place.
impl From<RawFd> for FileRef {
    fn from(fd: RawFd) -> Self {
        Self(Source::Fd(fd))
    }
}

impl From<&InputFile> for FileRef {
    fn from(file: &InputFile) -> Self {
        Self(Source::Open(Arc::clone(&file.0)))
    }
}

impl OpenFile {
    pub(super) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
