//! The ways to submit a read.

use super::super::file::FileRef;
use super::super::flight::{MAX_SEGMENTS, Request, Segment};
use super::super::queue::Target;
use super::AsyncUringStream;
use crate::error::{PipelineError, Result};
use std::sync::Arc;

impl AsyncUringStream<'_> {
    /// Reads `len` bytes at `file_offset` into slot `chunk_idx` of the buffer, that is at `chunk_idx * len`.
    /// `user_data` is the sequence number.
    ///
    /// Returns the submission's sequence number. Nothing reaches the kernel before the next flush, poll or wait. A
    /// request that cannot work fails as a completion; only a full queue and bad ranges fail here.
    ///
    /// # Errors
    /// `ERANGE` when the slot is outside the buffer or the read ends beyond the largest file offset; `EAGAIN` when
    /// `depth` submissions are in flight or the window is full (reap, resubmit or skip); `EBUSY` after
    /// [`finish`](Self::finish); `EPERM` on another thread.
    pub fn submit_read_to_gpu(
        &mut self,
        file: impl Into<FileRef>,
        file_offset: u64,
        chunk_idx: usize,
        len: usize,
    ) -> Result<u64> {
        let buffer_offset = slot_offset(chunk_idx, len, self.buffer.len())?;
        self.submit_read_to_gpu_at(file, file_offset, buffer_offset, len)
    }

    /// Reads `len` bytes at `file_offset` to `buffer_offset`. `user_data` is the sequence number.
    ///
    /// # Errors
    /// As [`submit_read_to_gpu`](Self::submit_read_to_gpu).
    pub fn submit_read_to_gpu_at(
        &mut self,
        file: impl Into<FileRef>,
        file_offset: u64,
        buffer_offset: usize,
        len: usize,
    ) -> Result<u64> {
        let user_data = self.flight().submitted();
        self.submit_read_to_gpu_at_with_user_data(file, file_offset, buffer_offset, len, user_data)
    }

    /// Reads `len` bytes at `file_offset` to `buffer_offset`; the completion carries `user_data`.
    ///
    /// # Errors
    /// As [`submit_read_to_gpu`](Self::submit_read_to_gpu).
    pub fn submit_read_to_gpu_at_with_user_data(
        &mut self,
        file: impl Into<FileRef>,
        file_offset: u64,
        buffer_offset: usize,
        len: usize,
        user_data: u64,
    ) -> Result<u64> {
        PipelineError::check_range("read target", buffer_offset as u64, len as u64, self.buffer.len() as u64)?;
        let segment = (self.buffer.span().start + buffer_offset, len);
        self.submit(file.into(), file_offset, None, &[segment], buffer_offset, user_data)
    }

    /// The same for a file that [`resolve`](Self::resolve) gave, where the last `slack` bytes may be missing: they are there
    /// to make whole blocks. The record then says how many bytes came.
    #[inline]
    pub(crate) fn submit_resolved(
        &mut self,
        file: FileRef,
        file_offset: u64,
        buffer_offset: usize,
        len: usize,
        slack: u32,
        user_data: u64,
    ) -> Result<u64> {
        PipelineError::check_range("read target", buffer_offset as u64, len as u64, self.buffer.len() as u64)?;
        PipelineError::check_range("file offset", file_offset, len as u64, i64::MAX as u64)?;
        let segments = [(self.buffer.span().start + buffer_offset, len)];
        let (target, segments, buffer_offset) = (None, &segments[..], buffer_offset as u64);
        let request = Request { file, file_offset, target, segments, buffer_offset, user_data, slack };
        self.flight_mut()?.submit(request)
    }

    /// Reads one contiguous stretch of the file, from `file_offset` on, into several ranges (offset, length) of the
    /// buffer, in order: one submission, and one command where the kernel can.
    ///
    /// # Errors
    /// As [`submit_read_to_gpu`](Self::submit_read_to_gpu); `EINVAL` for no ranges, more than 1024, or overlapping ones.
    pub fn submit_read_to_gpu_scatter(
        &mut self,
        file: impl Into<FileRef>,
        file_offset: u64,
        ranges: &[(usize, usize)],
        user_data: u64,
    ) -> Result<u64> {
        self.submit_scatter(file.into(), file_offset, ranges.iter().copied(), user_data)
    }

    pub(crate) fn submit_scatter(
        &mut self,
        file: FileRef,
        file_offset: u64,
        ranges: impl ExactSizeIterator<Item = Segment> + Clone,
        user_data: u64,
    ) -> Result<u64> {
        let count = ranges.len();
        let first = match ranges.clone().next() {
            Some((first, _)) if count <= MAX_SEGMENTS => first,
            _ => return Err(PipelineError::invalid(format!("{count} ranges"), "pass 1 to 1024")),
        };
        let len = self.buffer.len() as u64;
        ranges.clone().try_for_each(|(offset, bytes)| {
            PipelineError::check_range("read target", offset as u64, bytes as u64, len)
        })?;
        let start = self.buffer.span().start;
        let mut segments = std::mem::take(&mut self.segments);
        segments.clear();
        segments.extend(ranges.filter(|&(_, len)| len > 0).map(|(offset, len)| (start + offset, len)));
        // The upper half is scratch: the same ranges by address.
        let count = segments.len();
        segments.extend_from_within(..);
        let (segments_in_order, by_address) = segments.split_at_mut(count);
        by_address.sort_unstable();
        let result = if by_address.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            Err(PipelineError::invalid("overlapping ranges", "each byte of the buffer can take one byte of the file"))
        } else {
            self.submit(file, file_offset, None, segments_in_order, first, user_data)
        };
        self.segments = segments;
        result
    }

    /// Reads `len` bytes at `file_offset` into slot `chunk_idx` (at `chunk_idx * len`) of the buffer registered with
    /// the ring as `buffer_index`. Never falls back to an unregistered read of the whole.
    ///
    /// # Errors
    /// As [`submit_read_to_gpu`](Self::submit_read_to_gpu); `ERANGE` for an index beyond the table, `EINVAL` for an
    /// empty entry.
    pub fn submit_read_fixed(
        &mut self,
        file: impl Into<FileRef>,
        file_offset: u64,
        buffer_index: u32,
        chunk_idx: usize,
        len: usize,
    ) -> Result<u64> {
        self.flight_mut()?;
        let size = self.ring().buffers.get(buffer_index)?.len();
        let offset = slot_offset(chunk_idx, len, size)?;
        let user_data = self.flight().submitted();
        self.submit_read_fixed_at(file, file_offset, buffer_index, offset, len, user_data)
    }

    /// Reads `len` bytes at `file_offset` to `buffer_offset` of the buffer registered as `buffer_index`.
    ///
    /// # Errors
    /// As [`submit_read_fixed`](Self::submit_read_fixed).
    pub fn submit_read_fixed_at(
        &mut self,
        file: impl Into<FileRef>,
        file_offset: u64,
        buffer_index: u32,
        buffer_offset: usize,
        len: usize,
        user_data: u64,
    ) -> Result<u64> {
        self.flight_mut()?;
        let entry = Arc::clone(self.ring().buffers.get(buffer_index)?);
        let what = "read target in a registered buffer";
        PipelineError::check_range(what, buffer_offset as u64, len as u64, entry.len() as u64)?;
        let segment = (entry.start() + buffer_offset, len);
        self.submit(file.into(), file_offset, Some(Target::Registered(entry)), &[segment], buffer_offset, user_data)
    }

    /// Reads from the file registered with the ring as `file_index`; otherwise as
    /// [`submit_read_to_gpu_at_with_user_data`](Self::submit_read_to_gpu_at_with_user_data).
    ///
    /// # Errors
    /// As [`submit_read_to_gpu`](Self::submit_read_to_gpu); `ERANGE` for an index beyond the table, `EINVAL` for an
    /// empty entry.
    pub fn submit_read_to_gpu_fixed_file(
        &mut self,
        file_index: u32,
        file_offset: u64,
        buffer_offset: usize,
        len: usize,
        user_data: u64,
    ) -> Result<u64> {
        let file = FileRef::registered(file_index, None);
        self.submit_read_to_gpu_at_with_user_data(file, file_offset, buffer_offset, len, user_data)
    }

    /// The file registered with the ring as `index`, for any `submit_*`.
    ///
    /// It names the index: each read goes to the file that is registered there when it is submitted.
    ///
    /// # Errors
    /// `ERANGE` for an index beyond the table, `EINVAL` for an empty entry.
    pub fn registered_file(&self, index: u32) -> Result<FileRef> {
        self.ring().files.get(index)
    }

    /// Sends a 64-byte NVMe read command by IORING_OP_URING_CMD.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: this version of ringest does not have the passthrough path.
    pub fn submit_nvme_passthrough(
        &mut self,
        _file: impl Into<FileRef>,
        _command: &[u8; 64],
        _user_data: u64,
    ) -> Result<u64> {
        self.flight_mut()?;
        Err(PipelineError::NvmePassthroughDisabled)
    }

    #[inline]
    fn submit(
        &mut self,
        file: FileRef,
        file_offset: u64,
        target: Option<Target>,
        segments: &[Segment],
        buffer_offset: usize,
        user_data: u64,
    ) -> Result<u64> {
        let finished = self.finished;
        let flight = self.flight_mut()?;
        let len: u64 = segments.iter().map(|&(_, len)| len as u64).sum();
        PipelineError::check_range("file offset", file_offset, len, i64::MAX as u64)?;
        if finished {
            return Err(PipelineError::busy("the stream", "it was finished: make a new one"));
        }
        // The table knows what the file at an index is now.
        let file = flight.queue.ring().files.resolve(file)?;
        let buffer_offset = buffer_offset as u64;
        flight.submit(Request { file, file_offset, target, segments, buffer_offset, user_data, slack: 0 })
    }
}

fn slot_offset(chunk_idx: usize, len: usize, size: usize) -> Result<usize> {
    chunk_idx.checked_mul(len).ok_or(PipelineError::OutOfRange {
        what: "slot of the buffer",
        offset: chunk_idx as u64,
        length: len as u64,
        limit: size as u64,
    })
}
