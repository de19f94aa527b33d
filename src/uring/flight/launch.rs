//! From a submission to commands: its parts, their geometry, and the bounce buffer.

use super::super::direct::{MAX_COMMAND, Piece, leading_piece, split};
use super::super::file::FileRef;
use super::super::queue::{BounceSlot, Command, Op, Queue, Target};
use super::record::{ReadPath, State};
use super::{Bounce, Flight, NO_COMMAND, Segment};
use crate::memory::{MappedBuffer, MemoryKind};
use crate::sys::Errno;

impl<Q: Queue> Flight<'_, Q> {
    #[inline]
    pub(super) fn launch(&mut self, sequence: u64, file: FileRef, target: Option<&Target>) {
        self.stats.submitted += 1;
        self.flying += 1;
        let record = self.record(sequence);
        record.state = State::Flying;
        (record.taken, record.cancelled) = (false, false);
        record.path = ReadPath::None;
        record.errno = 0;
        (record.landed, record.bounced) = (0, 0);
        // Holds the record open until every part of it is staged, should the first ones end at once.
        record.parts = 1;
        let (file_offset, requested) = (record.file_offset, record.requested);
        if requested == 0 {
            self.queue.count_user(&file, -1);
        } else if record.segments.is_empty() {
            let segment = (record.start, requested as usize);
            self.launch_range(sequence, file, file_offset, target, segment);
        } else {
            self.launch_scatter(sequence, file, file_offset, target);
        }
        self.end_part(sequence);
    }

    pub(super) fn launch_scatter(&mut self, sequence: u64, file: FileRef, file_offset: u64, target: Option<&Target>) {
        let segments = std::mem::take(&mut self.record(sequence).segments);
        let direct = file.direct();
        let place = target.unwrap_or(&self.home);
        match self.vectored(&file, file_offset, place, &segments) {
            Some(command) => {
                let mut op = self.new_op(target);
                (op.sequence, op.file, op.file_offset, op.direct) = (sequence, file, file_offset, direct);
                op.remaining = segments.iter().map(|&(_, len)| len).sum();
                op.command = command;
                let record = self.record(sequence);
                record.parts += 1;
                record.segments = segments;
                return self.issue(op);
            }
            None => {
                let mut at = file_offset;
                for &segment in &segments {
                    self.launch_range(sequence, file.clone(), at, target, segment);
                    at += segment.1 as u64;
                }
            }
        }
        self.record(sequence).segments = segments;
    }

    /// The one command for a whole scatter list, where one will do.
    pub(super) fn vectored(
        &self,
        file: &FileRef,
        file_offset: u64,
        target: &Target,
        segments: &[Segment],
    ) -> Option<Command> {
        let total: usize = segments.iter().map(|&(_, len)| len).sum();
        if total > MAX_COMMAND {
            return None;
        }
        if let Some(direct) = file.direct() {
            let block = direct.offset as usize;
            let aligned = |&(offset, len): &Segment| {
                len.is_multiple_of(block) && target.region().address(offset).is_multiple_of(direct.memory.into())
            };
            if !file_offset.is_multiple_of(block as u64) || !segments.iter().all(aligned) {
                return None;
            }
        }
        let slot_of =
            |&(offset, len): &Segment| target.slot(offset).filter(|&(_, reach)| len <= reach).map(|(slot, _)| slot);
        let first = segments.first().and_then(slot_of);
        let one_slot = first.is_some() && segments.iter().all(|segment| slot_of(segment) == first);
        match first {
            Some(_) if one_slot && self.queue.has_readv_fixed() => Some(Command::Vectored { slot: first }),
            // Cut into ranges, each of which stays in the registration.
            _ if self.options.strict && segments.iter().any(|&(offset, _)| target.slot(offset).is_some()) => None,
            _ => Some(Command::Vectored { slot: None }),
        }
    }

    /// An op whose target is set; the caller sets the rest.
    #[inline(always)]
    pub(super) fn new_op(&mut self, target: Option<&Target>) -> Box<Op> {
        let mut op = self.rest.pop().unwrap_or_else(|| {
            self.made += 1;
            Box::new(Op {
                sequence: 0,
                file: FileRef::none(),
                file_offset: 0,
                target: self.home.clone(),
                target_offset: 0,
                remaining: 0,
                command: NO_COMMAND,
                retries: 0,
                looks: 0,
                direct: None,
            })
        });
        (op.retries, op.looks) = (0, 0);
        if let Some(target) = target
            && !target.is(&op.target)
        {
            op.target = target.clone();
        }
        op
    }

    /// Lays an op to rest.
    #[inline(always)]
    pub(super) fn lay(&mut self, mut op: Box<Op>) {
        op.file = FileRef::none();
        if !op.target.is(&self.home) {
            op.target = self.home.clone();
        }
        self.rest.push(op);
    }

    /// Reads go to another target from now on; those in flight keep theirs. Returns the old one.
    pub(crate) fn set_home(&mut self, home: Target) -> Target {
        for op in &mut self.rest {
            op.target = home.clone();
        }
        std::mem::replace(&mut self.home, home)
    }

    /// Where reads go unless they say otherwise.
    pub(crate) fn home(&self) -> &Target {
        &self.home
    }

    /// Queues the parts of one contiguous range.
    #[inline]
    pub(super) fn launch_range(
        &mut self,
        sequence: u64,
        file: FileRef,
        file_offset: u64,
        target: Option<&Target>,
        (start, len): Segment,
    ) {
        let Some(alignment) = file.direct() else {
            return self.launch_part(sequence, file, file_offset, target, (start, len));
        };
        let address = target.unwrap_or(&self.home).region().address(start);
        let [head, middle, tail] = split(file_offset, address, len, alignment);
        for (at, len) in [head, tail] {
            if len > 0 {
                self.launch_part(sequence, file.clone(), file_offset + at as u64, target, (start + at, len));
            }
        }
        if let (at, len @ 1..) = middle {
            self.launch_part(sequence, file, file_offset + at as u64, target, (start + at, len));
        }
    }

    #[inline(always)]
    pub(super) fn launch_part(
        &mut self,
        sequence: u64,
        file: FileRef,
        file_offset: u64,
        target: Option<&Target>,
        (start, len): Segment,
    ) {
        self.record(sequence).parts += 1;
        let mut op = self.new_op(target);
        op.direct = file.direct();
        (op.sequence, op.file, op.file_offset) = (sequence, file, file_offset);
        (op.target_offset, op.remaining) = (start, len);
        self.stage(op);
    }

    /// Decides the next command of a contiguous op and hands it over.
    #[inline]
    pub(super) fn stage(&mut self, mut op: Box<Op>) {
        debug_assert!(op.remaining > 0);
        if op.direct.is_some() {
            return self.stage_direct(op);
        }
        let len = op.remaining.min(MAX_COMMAND);
        let (len, slot) = match op.target.slot(op.target_offset) {
            Some((slot, reach)) => (len.min(reach), Some(slot)),
            None => (len, None),
        };
        op.command = Command::Direct { len: len as u32, slot };
        self.issue(op);
    }

    /// The same for O_DIRECT, whose commands read whole blocks.
    fn stage_direct(&mut self, mut op: Box<Op>) {
        let Some(alignment) = op.direct else { return };
        let address = op.target.region().address(op.target_offset);
        let slot = self.bounce_slot_bytes(alignment.offset as usize);
        let piece = leading_piece(op.file_offset, address, op.remaining, alignment, slot);
        let piece = within_registration(&op, piece, alignment.offset as usize);
        op.command = match piece {
            Piece::Direct { len } => {
                Command::Direct { len: len as u32, slot: op.target.slot(op.target_offset).map(|(slot, _)| slot) }
            }
            Piece::Bounce { file_offset, len, skip, want } => {
                if op.target.region().kind() != MemoryKind::HostVisible {
                    return self.end_op(op, libc::EINVAL);
                }
                let slot = match self.take_bounce_slot(len) {
                    Ok(Some(slot)) => slot,
                    Ok(None) => {
                        // It waits without a command, whatever its last was.
                        op.command = NO_COMMAND;
                        return self.bounce_wait.push_back(op);
                    }
                    Err(errno) => return self.end_op(op, errno),
                };
                let leaves_path = slot.registration().is_none() && op.target.slot(op.target_offset).is_some();
                if self.options.strict && leaves_path {
                    // Straight back: nobody can be in line for a slot that was free.
                    if let Some(bounce) = &mut self.bounce {
                        bounce.free.push(slot.index);
                    }
                    return self.end_op(op, libc::ENOMEM);
                }
                Command::Bounce { file_offset, len: len as u32, skip: skip as u32, want: want as u32, slot }
            }
        };
        self.issue(op);
    }

    #[inline(always)]
    pub(super) fn issue(&mut self, op: Box<Op>) {
        // An error of the submission system call is reported by the next `drive`; the op waits meanwhile.
        if self.pending.is_empty() && matches!(self.queue.make_room(), Ok(true)) {
            self.push(op);
        } else {
            self.pending.push_back(op);
        }
    }

    /// Hands an op to the queue, which has room.
    #[inline(always)]
    pub(super) fn push(&mut self, op: Box<Op>) {
        self.stats.commands += 1;
        let index = op.sequence & (self.window.len() as u64 - 1);
        self.queue.push(op, &self.window[index as usize].segments);
    }

    // The bounce buffer

    pub(super) fn bounce_slot_bytes(&self, block: usize) -> usize {
        let bytes = self.bounce.as_ref().map_or(self.options.bounce_slot_bytes, |bounce| bounce.slot_bytes);
        bytes.max(block)
    }

    /// `None`: all are lent.
    pub(super) fn take_bounce_slot(&mut self, len: usize) -> std::result::Result<Option<BounceSlot>, Errno> {
        if self.bounce.is_none() {
            let slots = self.options.bounce_slots;
            let slot_bytes = len.max(self.options.bounce_slot_bytes).next_power_of_two();
            let memory = MappedBuffer::<u8>::alloc(slot_bytes * usize::from(slots)).map_err(|error| error.errno())?;
            let region = std::sync::Arc::clone(crate::memory::GpuMappedBuffer::from(memory).region());
            let pool = self.queue.adopt(region);
            self.bounce = Some(Bounce { pool, slot_bytes, free: (0..slots).rev().collect() });
        }
        let Some(bounce) = &mut self.bounce else { return Ok(None) };
        if len > bounce.slot_bytes {
            // A later file with blocks larger than a slot.
            return Err(libc::EINVAL);
        }
        Ok(bounce.free.pop().map(|index| BounceSlot {
            pool: bounce.pool.clone(),
            index,
            size: bounce.slot_bytes as u32,
        }))
    }

    pub(super) fn give_bounce_slot(&mut self, slot: BounceSlot) {
        if let Some(bounce) = &mut self.bounce {
            bounce.free.push(slot.index);
        }
        // One in line that is lost takes no slot: the next must not wait for another to be given back.
        while self.bounce.as_ref().is_some_and(|bounce| !bounce.free.is_empty())
            && let Some(op) = self.bounce_wait.pop_front()
        {
            self.proceed(op);
        }
    }
}

/// Cuts a direct piece where the target's registration is split. A block that straddles the split is bounced.
fn within_registration(op: &Op, piece: Piece, block: usize) -> Piece {
    let (Piece::Direct { len }, Some((_, reach))) = (piece, op.target.slot(op.target_offset)) else {
        return piece;
    };
    let inside = len.min(reach);
    match inside - inside % block {
        0 => Piece::Bounce { file_offset: op.file_offset, len: block, skip: 0, want: block },
        inside => Piece::Direct { len: inside },
    }
}
