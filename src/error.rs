//! What can go wrong, each kind with one errno and a remedy.

use std::borrow::Cow;

/// Result of every fallible call of the crate.
pub type Result<T> = std::result::Result<T, PipelineError>;

/// Text that is usually static.
pub type Text = Cow<'static, str>;

/// An error of the pipeline.
///
/// Each kind maps to one errno ([`errno`](Self::errno)), which is stable; messages are for people and are not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// An io_uring system call failed. The errno is the kernel's.
    #[error("{call} failed: {} (errno {errno}); {fix}", describe(*errno))]
    IoUringSyscall {
        /// The system call, with its opcode where it has one.
        call: &'static str,
        /// The kernel's errno, positive.
        errno: i32,
        /// What to do about it.
        fix: Text,
    },
    /// Another system call failed. The errno is the kernel's.
    #[error("{call} {what}: {} (errno {errno}); {fix}", describe(*errno))]
    Syscall {
        /// The system call.
        call: &'static str,
        /// What it was called on.
        what: String,
        /// The kernel's errno, positive.
        errno: i32,
        /// What to do about it.
        fix: Text,
    },
    /// A CUDA driver call failed.
    ///
    /// Errno by `CUresult`: `ENOMEM` for OUT_OF_MEMORY; `EINVAL` for INVALID_VALUE, INVALID_CONTEXT, INVALID_HANDLE and
    /// HOST_MEMORY_NOT_REGISTERED; `ENODEV` for NO_DEVICE and INVALID_DEVICE; `EBUSY` for DEVICE_UNAVAILABLE,
    /// ALREADY_MAPPED and HOST_MEMORY_ALREADY_REGISTERED; `ENOENT` for NOT_FOUND; `EAGAIN` for NOT_READY; `EPERM` for
    /// NOT_PERMITTED; `ETIMEDOUT` for TIMEOUT; `EOPNOTSUPP` for NOT_SUPPORTED, STUB_LIBRARY, CALL_REQUIRES_NEWER_DRIVER,
    /// NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION, PEER_ACCESS_UNSUPPORTED and SYSTEM_DRIVER_MISMATCH; `EIO` for every
    /// other result, known or not.
    #[error("{call} failed: {text} (CUresult {code}); {fix}")]
    Cuda {
        /// The driver's function.
        call: &'static str,
        /// The `CUresult`.
        code: u32,
        /// The result's name and text, as the driver gives them.
        text: String,
        /// What to do about it.
        fix: Text,
    },
    /// A submitted read ended with an error. The errno is the one in its completion.
    #[error(
        "read of {requested} bytes at file offset {file_offset} (submission {sequence}) failed: {} (errno {errno}); {fix}",
        describe(*errno)
    )]
    ReadFailed {
        /// The submission's sequence number.
        sequence: u64,
        /// Offset in the file, bytes.
        file_offset: u64,
        /// Bytes asked for.
        requested: u64,
        /// The errno of the completion, positive.
        errno: i32,
        /// What to do about it.
        fix: Text,
    },
    /// A queue has no room. `EAGAIN`: reap completions and try again.
    #[error("{queue} is full; {fix}")]
    QueueFull {
        /// Which queue.
        queue: &'static str,
        /// What makes room.
        fix: Text,
    },
    /// A range does not lie inside the memory, the table or the file position space. `ERANGE`.
    #[error("{what}: offset {offset} + length {length} exceeds {limit}; stay within it")]
    OutOfRange {
        /// What the range was meant for.
        what: &'static str,
        /// Start of the range.
        offset: u64,
        /// Length of the range.
        length: u64,
        /// First value that is too large.
        limit: u64,
    },
    /// An argument is wrong in itself. `EINVAL`.
    #[error("invalid argument: {what}; {fix}")]
    InvalidArgument {
        /// The argument and its value.
        what: Text,
        /// What would be valid.
        fix: Text,
    },
    /// NVMe passthrough is not part of this build. `EOPNOTSUPP`.
    #[error("NVMe passthrough is not built into this version of ringest; read through the file system instead")]
    NvmePassthroughDisabled,
    /// This kernel, machine or build cannot do it. `EOPNOTSUPP`.
    #[error("{what} is not supported here: {fix}")]
    NotSupported {
        /// The missing ability.
        what: Text,
        /// Why, and what would provide it.
        fix: Text,
    },
    /// The file ended before the read did. `ENODATA`.
    #[error(
        "end of file: {bytes} of {requested} bytes at file offset {file_offset} (submission {sequence}) exist; submit what \
         the file has, or resubmit once it has grown"
    )]
    EndOfFile {
        /// The submission's sequence number.
        sequence: u64,
        /// Offset in the file, bytes.
        file_offset: u64,
        /// Bytes that exist and are in place.
        bytes: u64,
        /// Bytes asked for.
        requested: u64,
    },
    /// The thing is in use. `EBUSY`.
    #[error("{what} is in use; {fix}")]
    Busy {
        /// What is in use.
        what: Text,
        /// What frees it.
        fix: Text,
    },
    /// Called on a thread (or in a forked child) that does not own the ring. `EPERM`.
    #[error("this ring belongs to the thread that created it; call from there, or create it with RingOptions::movable")]
    WrongThread,
    /// Used in a child of the process that made it, where its memory is absent. `EPERM`.
    #[error("{what} belongs to the process that made it, and its memory is not in a forked child; make another here")]
    Forked {
        /// What was used.
        what: &'static str,
    },
    /// The submission was cancelled. `ECANCELED`.
    #[error("submission {sequence} was cancelled after {bytes} bytes; resubmit it if it is still wanted, or skip it")]
    Cancelled {
        /// The submission's sequence number.
        sequence: u64,
        /// Bytes already in place.
        bytes: u64,
    },
    /// One side of an io_queue gave up. `ECANCELED`.
    #[error("the io_queue was aborted with errno {errno} ({}); close its driver and make a new one", describe(*errno))]
    QueueAborted {
        /// Why.
        errno: i32,
    },
    /// The view is of memory that another io_queue has now. `ESTALE`.
    #[error("the view is of an io_queue whose memory another one has now; pass a view of the queue that lives")]
    StaleView,
    /// The header of an io_queue is not what its view says. `EPROTO`.
    #[error("the header of the io_queue does not match its view: something else has written to its control block")]
    BadHeader,
    /// Time ran out. `ETIMEDOUT`.
    #[error("{what} did not finish in time; {fix}")]
    TimedOut {
        /// What was waited for.
        what: Text,
        /// What can be done.
        fix: Text,
    },
    /// Memory could not be had. `ENOMEM`.
    #[error("no memory for {what} ({bytes} bytes); {fix}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// What to do about it.
        fix: Text,
    },
}

impl PipelineError {
    /// The positive errno of this kind of error.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::IoUringSyscall { errno, .. } | Self::Syscall { errno, .. } | Self::ReadFailed { errno, .. } => *errno,
            Self::Cuda { code, .. } => crate::sys::cuda::errno(*code),
            Self::QueueFull { .. } => libc::EAGAIN,
            Self::OutOfRange { .. } => libc::ERANGE,
            Self::InvalidArgument { .. } => libc::EINVAL,
            Self::NvmePassthroughDisabled | Self::NotSupported { .. } => libc::EOPNOTSUPP,
            Self::EndOfFile { .. } => libc::ENODATA,
            Self::Busy { .. } => libc::EBUSY,
            Self::WrongThread | Self::Forked { .. } => libc::EPERM,
            Self::Cancelled { .. } | Self::QueueAborted { .. } => libc::ECANCELED,
            Self::StaleView => libc::ESTALE,
            Self::BadHeader => libc::EPROTO,
            Self::TimedOut { .. } => libc::ETIMEDOUT,
            Self::OutOfMemory { .. } => libc::ENOMEM,
        }
    }

    pub(crate) fn invalid(what: impl Into<Text>, fix: impl Into<Text>) -> Self {
        Self::InvalidArgument { what: what.into(), fix: fix.into() }
    }

    pub(crate) fn busy(what: impl Into<Text>, fix: impl Into<Text>) -> Self {
        Self::Busy { what: what.into(), fix: fix.into() }
    }

    pub(crate) fn unsupported(what: impl Into<Text>, fix: impl Into<Text>) -> Self {
        Self::NotSupported { what: what.into(), fix: fix.into() }
    }

    pub(crate) fn timed_out(what: impl Into<Text>, fix: impl Into<Text>) -> Self {
        Self::TimedOut { what: what.into(), fix: fix.into() }
    }

    /// Checks that `offset + length <= limit` without overflow.
    pub(crate) fn check_range(what: &'static str, offset: u64, length: u64, limit: u64) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= limit => Ok(()),
            _ => Err(Self::OutOfRange { what, offset, length, limit }),
        }
    }
}

impl From<PipelineError> for std::io::Error {
    fn from(error: PipelineError) -> Self {
        let kind = std::io::Error::from_raw_os_error(error.errno()).kind();
        Self::new(kind, error)
    }
}

/// The C library's text for an errno.
pub(crate) fn describe(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// A remedy for the errno of a read's completion (block layer and file-system errnos: `read(2)`, `io_uring_enter(2)`).
pub(crate) fn read_remedy(errno: i32) -> Text {
    Cow::Borrowed(match errno {
        libc::EIO => "the device could not deliver the data: see the kernel log; resubmit or skip the submission",
        libc::EBADF => {
            "the descriptor or registered-file index is closed or empty: keep the file open until its reads end"
        }
        libc::EFAULT => "the target is not writable memory of this process, or its registration was replaced",
        libc::EINVAL => "offset, address or length is unaligned for this O_DIRECT file, or it cannot be read this way",
        libc::EISDIR => "it is a directory: open a regular file or a block device",
        libc::EAGAIN => "the kernel kept asking to try again: lower the depth and resubmit",
        libc::EOPNOTSUPP => {
            "the file does not support this kind of read on this ring (IOPOLL needs O_DIRECT and poll queues)"
        }
        libc::EREMOTEIO => "the device cannot reach this memory (peer-to-peer DMA refused)",
        libc::ENODEV => "the device is gone",
        _ => "resubmit or skip the submission",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_checks_do_not_wrap() {
        assert!(PipelineError::check_range("x", 4, 4, 8).is_ok());
        assert!(PipelineError::check_range("x", 8, 0, 8).is_ok());
        for (offset, length) in [(5, 4), (u64::MAX, 1), (1, u64::MAX), (9, 0)] {
            let error = PipelineError::check_range("x", offset, length, 8).unwrap_err();
            assert_eq!(error.errno(), libc::ERANGE);
        }
    }

    #[test]
    fn messages_name_the_errno_and_a_remedy() {
        let error = PipelineError::ReadFailed {
            sequence: 3,
            file_offset: 4096,
            requested: 512,
            errno: libc::EIO,
            fix: read_remedy(libc::EIO),
        };
        let text = error.to_string();
        assert!(text.contains("errno 5") && text.contains("offset 4096") && text.contains("kernel log"), "{text}");
        assert_eq!(std::io::Error::from(error).kind(), std::io::Error::from_raw_os_error(libc::EIO).kind());
    }
}
