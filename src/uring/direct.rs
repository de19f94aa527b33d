//! O_DIRECT geometry: which bytes of a read may go straight to memory, and which through the bounce buffer.
//!
//! A direct command writes whole aligned blocks. What the caller asked for may start or end inside a block, or sit at
//! an address that no shift of the range can align; those bytes are read, as whole blocks, into bounce memory and
//! copied, so nothing outside the caller's range is ever written.

use super::file::DirectAlignment;

/// Most bytes one command reads. The kernel's limit is 2 GiB less a page (MAX_RW_COUNT).
pub(super) const MAX_COMMAND: usize = 1 << 30;

/// The next piece of a contiguous read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// `len` bytes straight into the target.
    Direct { len: usize },
    /// Blocks of `len` bytes from `file_offset` into a bounce slot, of which `want` bytes after `skip` are the read's.
    Bounce { file_offset: u64, len: usize, skip: usize, want: usize },
}

/// The first piece of reading `remaining` > 0 bytes at `file_offset` to `address`, with bounce slots of `slot` bytes
/// (a multiple of the alignment).
pub(super) fn leading_piece(
    file_offset: u64,
    address: u64,
    remaining: usize,
    alignment: DirectAlignment,
    slot: usize,
) -> Piece {
    let block = alignment.offset as usize;
    let skip = (file_offset % block as u64) as usize;
    let to_boundary = (block - skip) % block;
    // Whole blocks can follow the ragged head, if the address after it is aligned too.
    let direct_after = remaining.saturating_sub(to_boundary) >= block
        && (address + to_boundary as u64).is_multiple_of(alignment.memory.into());
    if direct_after && skip == 0 {
        let len = remaining.min(MAX_COMMAND);
        return Piece::Direct { len: len - len % block };
    }
    let want = if direct_after { to_boundary } else { remaining.min(slot - skip) };
    Piece::Bounce { file_offset: file_offset - skip as u64, len: (skip + want).next_multiple_of(block), skip, want }
}

/// Splits a read into up to three parts that can be in flight together: ragged head, aligned middle, ragged tail.
/// Returns (offset in the read, length) pairs; unused ones have length 0.
pub(super) fn split(file_offset: u64, address: u64, len: usize, alignment: DirectAlignment) -> [(usize, usize); 3] {
    let block = alignment.offset as usize;
    let head = (block - (file_offset % block as u64) as usize) % block;
    let aligned = (address + head as u64).is_multiple_of(alignment.memory.into());
    if !aligned || len.saturating_sub(head) < block {
        return [(0, len), (0, 0), (0, 0)];
    }
    let tail = (len - head) % block;
    [(0, head), (head, len - head - tail), (len - tail, tail)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIGNMENTS: [(u32, u32); 4] = [(512, 512), (4, 512), (4096, 4096), (512, 4096)];

    /// Every way to walk a read covers it exactly, with commands the kernel accepts.
    #[test]
    fn pieces_cover_the_read_exactly_and_are_aligned() {
        let slot = 16 << 10;
        for (memory, offset) in ALIGNMENTS {
            let alignment = DirectAlignment { memory, offset };
            let block = u64::from(offset);
            for start in [0, 1, block - 1, block, 3 * block, 3 * block + 7] {
                for address in [1 << 20, (1 << 20) + 1, (1 << 20) + block - 1, (1 << 20) + 512, (1 << 20) + 4] {
                    for len in [1, 511, 512, 4095, 4096, 4097, 20_000, 65_536, 65_537] {
                        let mut done = 0;
                        for (at, len) in split(start, address, len, alignment) {
                            assert!(len == 0 || at == done);
                            let (mut at, end) = (at, at + len);
                            while at < end {
                                let (from, to) = (start + at as u64, address + at as u64);
                                at += check(
                                    leading_piece(from, to, end - at, alignment, slot),
                                    from,
                                    to,
                                    alignment,
                                    slot,
                                );
                            }
                            assert_eq!(at, end);
                            done += len;
                        }
                        assert_eq!(done, len);
                    }
                }
            }
        }
    }

    fn check(piece: Piece, from: u64, to: u64, alignment: DirectAlignment, slot: usize) -> usize {
        let block = u64::from(alignment.offset);
        match piece {
            Piece::Direct { len } => {
                assert!(len > 0 && from.is_multiple_of(block) && (len as u64).is_multiple_of(block));
                assert!(to.is_multiple_of(alignment.memory.into()));
                len
            }
            Piece::Bounce { file_offset, len, skip, want } => {
                assert!(file_offset.is_multiple_of(block) && (len as u64).is_multiple_of(block));
                assert!(len <= slot && want > 0 && skip + want <= len);
                assert_eq!(file_offset + skip as u64, from);
                want
            }
        }
    }

    #[test]
    fn an_aligned_read_is_one_direct_command() {
        let alignment = DirectAlignment { memory: 512, offset: 512 };
        assert_eq!(split(4096, 8192, 65_536, alignment), [(0, 0), (0, 65_536), (65_536, 0)]);
        assert_eq!(leading_piece(4096, 8192, 65_536, alignment, 4096), Piece::Direct { len: 65_536 });
        let huge = 5 * MAX_COMMAND + 512;
        assert_eq!(leading_piece(0, 0, huge, alignment, 4096), Piece::Direct { len: MAX_COMMAND });
    }
}
