//! How submissions end, and the record of one.

use super::super::file::FileRef;
use super::super::queue::Target;
use super::Segment;
use crate::error::{PipelineError, Result, read_remedy};
use crate::sys::Errno;

/// How bytes really got into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u16)]
#[non_exhaustive]
pub enum ReadPath {
    /// No command was needed (a read of 0 bytes), or none succeeded.
    #[default]
    None = 0,
    /// Every command wrote to memory registered with the ring (IORING_OP_READ_FIXED, READV_FIXED).
    RegisteredRead = 1,
    /// At least one command wrote to memory that the kernel pinned for it (IORING_OP_READ, READV).
    PlainRead = 2,
}

impl ReadPath {
    /// A short name, for logs and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::RegisteredRead => "registered read",
            Self::PlainRead => "plain read",
        }
    }

    /// The path of a submission whose parts took both.
    pub(super) fn and(self, other: Self) -> Self {
        if other as u16 > self as u16 { other } else { self }
    }
}

/// How a submission ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Completion {
    /// The number `submit_*` returned; counts submissions of the stream from 0.
    pub sequence: u64,
    /// The caller's value.
    pub user_data: u64,
    /// Where in the stream's buffer the first byte went.
    pub buffer_offset: u64,
    /// Where in the file it came from.
    pub file_offset: u64,
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes in place. Equals `requested` exactly when `status` is 0; at end of file, the bytes that exist.
    pub bytes: u64,
    /// Of these, bytes that went through the bounce buffer.
    pub bounced: u64,
    /// 0, or -errno: -ENODATA at end of file, -ECANCELED, or the kernel's.
    pub status: i32,
    /// The path that was really taken.
    pub path: ReadPath,
}

impl Completion {
    /// The bytes read, or the error.
    ///
    /// # Errors
    /// What `status` says.
    pub fn result(&self) -> Result<u64> {
        let Self { sequence, file_offset, requested, bytes, status, .. } = *self;
        match -status {
            0 => Ok(bytes),
            libc::ENODATA => Err(PipelineError::EndOfFile { sequence, file_offset, bytes, requested }),
            libc::ECANCELED => Err(PipelineError::Cancelled { sequence, bytes }),
            errno => {
                Err(PipelineError::ReadFailed { sequence, file_offset, requested, errno, fix: read_remedy(errno) })
            }
        }
    }
}

/// What a stream has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamStats {
    /// Submissions accepted, resubmissions included.
    pub submitted: u64,
    /// Submissions that ended whole.
    pub completed: u64,
    /// Submissions that ended otherwise (end of file, error, cancelled).
    pub failed: u64,
    /// Of these, end of file.
    pub end_of_file: u64,
    /// Of these, cancelled.
    pub cancelled: u64,
    /// Submissions given up by `skip`.
    pub skipped: u64,
    /// Bytes put in place.
    pub bytes: u64,
    /// Of these, through registered memory.
    pub registered_bytes: u64,
    /// Of these, through memory pinned per read.
    pub plain_bytes: u64,
    /// Of these, copied from the bounce buffer.
    pub bounced_bytes: u64,
    /// Commands handed to the kernel.
    pub commands: u64,
    /// Commands that read less than asked and were continued.
    pub short_reads: u64,
    /// Commands repeated after EINTR or EAGAIN.
    pub retries: u64,
    /// System calls to submit or wait.
    pub enters: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum State {
    #[default]
    Free,
    Flying,
    Whole,
    Failed,
    Skipped,
}

#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) state: State,
    /// Its completion has been taken.
    pub(super) taken: bool,
    pub(super) cancelled: bool,
    pub(super) path: ReadPath,
    /// Errno of the first part that failed.
    pub(super) errno: Errno,
    /// Ops not yet ended: at most three for each of 1024 ranges, and one.
    pub(super) parts: u16,
    pub(super) user_data: u64,
    pub(super) file_offset: u64,
    pub(super) buffer_offset: u64,
    pub(super) requested: u64,
    pub(super) landed: u64,
    pub(super) bounced: u64,
    /// Bytes at the end that may be missing.
    pub(super) slack: u32,
    /// Where in the target's region the first byte goes.
    pub(super) start: usize,
    /// All ranges of a scatter read.
    pub(super) segments: Vec<Segment>,
    /// What a resubmission needs, while failed.
    pub(super) retry: Option<Box<(FileRef, Target)>>,
}
