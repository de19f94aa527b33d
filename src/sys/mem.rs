//! Anonymous, page-aligned memory.

use super::thread::Process;
use super::{Errno, check, fault};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How a mapping wants its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Transparent huge pages are asked for (`MADV_HUGEPAGE`) when the buffer holds at least one; base pages otherwise.
    #[default]
    Advise,
    /// Base pages only.
    Off,
    /// Pages from the kernel's huge-page pool (`MAP_HUGETLB`, 2 MiB); ENOMEM when the pool is empty.
    Require,
}

/// Size of a huge page that `HugePages` speaks of.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Size of a base page.
pub(crate) fn page_size() -> usize {
    // The C library knows it without a system call; a `OnceLock` could be caught half done by a fork.
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// An owned anonymous mapping; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    process: Process,
}

// SAFETY: a mapping is plain memory, owned by this value, valid from any thread of the process.
unsafe impl Send for Mapping {}
// SAFETY: the value itself is immutable; access to the bytes goes through raw pointers whose users carry the proof.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes (rounded up to whole pages) at a multiple of `align`, a power of two.
    ///
    /// The memory is zeroed and kept out of forked children (`MADV_DONTFORK`): a copy-on-write of a page under DMA
    /// would tear the parent's data.
    pub(crate) fn anonymous(len: usize, align: usize, huge: HugePages) -> Result<Self, Errno> {
        debug_assert!(align.is_power_of_two() && len > 0);
        let (page, flags) = match huge {
            HugePages::Require => (HUGE_PAGE, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB),
            _ => (page_size(), 0),
        };
        let align = if huge == HugePages::Advise && len >= HUGE_PAGE { align.max(HUGE_PAGE) } else { align }.max(page);
        let len = len.checked_next_multiple_of(page).ok_or(libc::ENOMEM)?;
        let padded = len.checked_add(align - page).ok_or(libc::ENOMEM)?;
        if isize::try_from(padded).is_err() {
            return Err(libc::ENOMEM);
        }
        fault::point("mmap")?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                padded,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(super::last_errno());
        }
        let start = raw as usize;
        let aligned = start.next_multiple_of(align);
        let base = NonNull::new(raw.cast::<u8>().wrapping_add(aligned - start)).ok_or(libc::ENOMEM)?;
        // From here on the mapping is owned: every early return unmaps what is left of it.
        let mapping = Self { base, len, process: Process::current() };
        // SAFETY: both ranges are the unused ends of the mapping made above.
        unsafe {
            if aligned > start {
                libc::munmap(raw, aligned - start);
            }
            let tail = padded - (aligned - start) - len;
            if tail > 0 {
                libc::munmap(base.as_ptr().add(len).cast(), tail);
            }
        }
        mapping.advise(libc::MADV_DONTFORK)?;
        if huge == HugePages::Advise && len >= HUGE_PAGE {
            // A kernel without transparent huge pages refuses; base pages serve as well.
            let _ = mapping.advise(libc::MADV_HUGEPAGE);
        }
        Ok(mapping)
    }

    fn advise(&self, advice: libc::c_int) -> Result<(), Errno> {
        fault::point("madvise")?;
        // SAFETY: the range is exactly this mapping, and neither advice used here discards its contents.
        check(unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) }.into()).map(drop)
    }

    /// Gives every page its memory now, by several threads when there is much of it, so that the driver or the kernel
    /// finds all pages present when it locks them. For a mapping that nobody else knows of yet: it is all zero, and stays.
    ///
    /// By stores: MADV_POPULATE_WRITE gets slower with every thread beyond four (M, 1 GiB, 16 cores, Linux 6.18: 130 ms
    /// against 20 ms).
    pub(crate) fn populate(&self) {
        /// What a thread is worth starting for: some 5 ms of zeroing.
        const SHARE: usize = 32 << 20;
        /// More threads than this only wait for memory.
        const MOST: usize = 16;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.len.div_ceil(SHARE).min(cores).clamp(1, MOST);
        let (next, page) = (AtomicUsize::new(0), page_size());
        // Whoever is done first takes the next piece, so a thread that could not be had is not missed.
        let work = || loop {
            let start = next.fetch_add(HUGE_PAGE, Ordering::Relaxed);
            if start >= self.len {
                return;
            }
            for offset in (start..self.len.min(start + HUGE_PAGE)).step_by(page) {
                // SAFETY: inside the mapping, which is writable and which nobody else uses yet.
                unsafe { self.base.as_ptr().add(offset).write_volatile(0) };
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                let _ = std::thread::Builder::new().name("ringest-touch".to_owned()).spawn_scoped(scope, work);
            }
            work();
        });
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Length in bytes, whole pages.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.process.is_current() {
            // A forked child does not have it; something else may be in its place there.
            return;
        }
        // SAFETY: the mapping is owned and nothing refers to it any more: regions keep it behind an `Arc` that every
        // read in flight holds.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Addresses without memory, given back on drop.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    start: NonNull<u8>,
    padded: usize,
    address: u64,
    process: Process,
}

// SAFETY: nothing can be read or written there.
unsafe impl Send for AddressSpace {}
// SAFETY: as above.
unsafe impl Sync for AddressSpace {}

impl AddressSpace {
    /// `len` bytes of addresses at a multiple of `align`, a power of two.
    pub(crate) fn reserve(len: usize, align: usize) -> Result<Self, Errno> {
        let padded = len.checked_add(align).filter(|&padded| isize::try_from(padded).is_ok()).ok_or(libc::ENOMEM)?;
        fault::point("mmap")?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let raw = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), padded, libc::PROT_NONE, flags, -1, 0)
        };
        if raw == libc::MAP_FAILED {
            return Err(super::last_errno());
        }
        let start = NonNull::new(raw.cast()).ok_or(libc::ENOMEM)?;
        let address = (raw as usize).next_multiple_of(align) as u64;
        Ok(Self { start, padded, address, process: Process::current() })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        if self.process.is_current() {
            // SAFETY: owned, and nothing was ever put there.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.padded) };
        }
    }
}

/// Soft RLIMIT_MEMLOCK of this process in bytes; `None` when unlimited.
pub(crate) fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the result.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    (rc == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_aligned_zeroed_and_whole_pages() {
        for (len, align) in [(1, 1), (4097, 4096), (3 << 20, 1), (4096, 1 << 20), (8192, 2 << 20)] {
            let mapping = Mapping::anonymous(len, align, HugePages::Advise).unwrap();
            assert!((mapping.base().as_ptr() as usize).is_multiple_of(align.max(page_size())));
            assert!(mapping.len() >= len && mapping.len().is_multiple_of(page_size()));
            // SAFETY: the mapping is `len` readable bytes or more.
            let last = unsafe { mapping.base().as_ptr().add(len - 1).read() };
            assert_eq!(last, 0);
        }
    }

    #[test]
    fn populated_memory_is_present_and_zero() {
        for (len, huge) in [(1, HugePages::Off), (4096 * 3, HugePages::Advise), (130 << 20, HugePages::Advise)] {
            let mapping = Mapping::anonymous(len, 1, huge).unwrap();
            mapping.populate();
            let pages = mapping.len() / page_size();
            let mut present = vec![0u8; pages];
            // SAFETY: one byte for each page of the mapping, all of which is readable.
            let bytes = unsafe {
                assert_eq!(libc::mincore(mapping.base().as_ptr().cast(), mapping.len(), present.as_mut_ptr()), 0);
                std::slice::from_raw_parts(mapping.base().as_ptr(), mapping.len())
            };
            assert!(present.iter().all(|&page| page & 1 == 1));
            assert!(bytes.iter().step_by(1021).all(|&byte| byte == 0));
        }
    }

    #[test]
    fn reserved_addresses_are_aligned_and_apart() {
        let spaces: Vec<_> = (12..30).map(|bits| AddressSpace::reserve(1 << 30, 1 << bits).unwrap()).collect();
        let mut starts: Vec<_> = spaces.iter().map(AddressSpace::address).collect();
        assert!(starts.iter().zip(12..).all(|(start, bits)| start % (1 << bits) == 0));
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 1 << 30));
        assert_eq!(AddressSpace::reserve(usize::MAX, 4096).unwrap_err(), libc::ENOMEM);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        for len in [usize::MAX, usize::MAX - 4096, isize::MAX as usize] {
            assert_eq!(Mapping::anonymous(len, 1, HugePages::Off).unwrap_err(), libc::ENOMEM);
        }
    }
}
