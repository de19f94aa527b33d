//! CRC32C of files whose pieces come in any order.

use std::collections::BTreeMap;

/// What putting zeros behind a message does to its CRC32C: a linear map, by columns.
///
/// The CRC32C of A followed by B is that of A, moved by B's length, xor that of B. Finding the map for a length takes
/// microseconds, using it nanoseconds: nearly all pieces of an ingest are of one length.
struct Shift {
    len: u64,
    columns: [u32; 32],
}

impl Shift {
    fn new(len: u64) -> Self {
        Self { len, columns: std::array::from_fn(|bit| crc32c::crc32c_combine(1 << bit, 0, len as usize)) }
    }

    fn apply(&self, crc: u32) -> u32 {
        let column = |(bit, &column): (usize, &u32)| if crc >> bit & 1 == 1 { column } else { 0 };
        self.columns.iter().enumerate().map(column).fold(0, |sum, column| sum ^ column)
    }
}

/// A piece of a file.
#[derive(Debug, Clone, Copy)]
struct Piece {
    len: u64,
    crc: u32,
}

/// How far a file is.
#[derive(Debug, Default)]
struct File {
    /// Bytes from its beginning on, and their CRC32C.
    end: u64,
    crc: u32,
    /// Pieces beyond, by where they begin: never more than an io_queue has slots.
    ahead: BTreeMap<u64, Piece>,
}

/// The sums of all files of an ingest.
pub(crate) struct Sums {
    files: Vec<File>,
    whole: Shift,
}

impl Sums {
    /// For so many files, most of whose pieces have `piece` bytes.
    pub(crate) fn new(files: usize, piece: u64) -> Self {
        Self { files: std::iter::repeat_with(File::default).take(files).collect(), whole: Shift::new(piece) }
    }

    /// Adds the CRC32C of `len` bytes at `offset`. False: there is no such file, or it had these bytes before.
    pub(crate) fn add(&mut self, file: u64, offset: u64, len: u64, crc: u32) -> bool {
        let Some(file) = usize::try_from(file).ok().and_then(|file| self.files.get_mut(file)) else { return false };
        if offset < file.end || file.ahead.contains_key(&offset) {
            return false;
        }
        file.ahead.insert(offset, Piece { len, crc });
        while let Some(Piece { len, crc }) = file.ahead.remove(&file.end) {
            let moved = match len == self.whole.len {
                true => self.whole.apply(file.crc) ^ crc,
                false => crc32c::crc32c_combine(file.crc, crc, len as usize),
            };
            (file.crc, file.end) = (moved, file.end + len);
        }
        true
    }

    /// The sum of each file; an error where one is not `lens` long.
    pub(crate) fn finish(&self, lens: impl ExactSizeIterator<Item = u64>) -> Result<Vec<u32>, String> {
        if lens.len() != self.files.len() {
            return Err(format!("{} files were consumed, of {}", self.files.len(), lens.len()));
        }
        let sum = |(file, len): (&File, u64)| match file.end == len && file.ahead.is_empty() {
            true => Ok(file.crc),
            false => Err(format!("{} of {len} bytes of a file were consumed", file.end)),
        };
        self.files.iter().zip(lens).map(sum).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::XorShift;

    #[test]
    fn pieces_in_any_order_give_the_sum_of_the_whole() {
        let mut random = XorShift::new(7);
        let mut data = vec![0; 10_007];
        random.fill(&mut data);
        for piece in [1, 512, 1000, 10_006, 10_007, 20_000] {
            let mut pieces: Vec<(u64, &[u8])> =
                data.chunks(piece).enumerate().map(|(index, bytes)| ((index * piece) as u64, bytes)).collect();
            for at in (1..pieces.len()).rev() {
                pieces.swap(at, random.below(at as u64 + 1) as usize);
            }
            let mut sums = Sums::new(2, piece as u64);
            for (offset, bytes) in pieces {
                assert!(sums.add(1, offset, bytes.len() as u64, crc32c::crc32c(bytes)));
                assert!(!sums.add(1, offset, bytes.len() as u64, 0), "twice");
            }
            assert_eq!(sums.finish([0, 10_007].into_iter()), Ok(vec![0, crc32c::crc32c(&data)]));
            assert!(sums.finish([0, 10_008].into_iter()).is_err());
            assert!(sums.finish([10_007].into_iter()).is_err());
            assert!(!sums.add(2, 0, 1, 0), "no such file");
        }
    }
}
