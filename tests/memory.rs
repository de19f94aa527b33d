//! Memory: sizes, alignment, bounds, and who keeps it alive.

mod common;

use common::*;
use ringest::{
    AnyBits, AsyncUringStream, DirectMode, GpuMappedBuffer, HugePages, MappedBuffer, MappedOptions, MemoryKind,
    StreamOptions, TailLine,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn sized<T: AnyBits>(len: usize) {
    let mut buffer = MappedBuffer::<T>::alloc(len).unwrap();
    assert_eq!((buffer.len(), buffer.byte_size(), buffer.is_empty()), (len, len * size_of::<T>(), false));
    assert_eq!(buffer.as_host_ptr() as usize % 4096, 0);
    assert_eq!(buffer.as_device_ptr(), buffer.as_host_ptr_mut() as u64, "without a GPU the addresses are the same");
    assert_eq!(buffer.share().len(), buffer.byte_size());
    // SAFETY: zeroed bytes of a type without invalid patterns.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.as_host_ptr().cast::<u8>(), buffer.byte_size()) };
    assert!(bytes.iter().all(|&byte| byte == 0), "not zeroed");
    let first = buffer.as_slice().unwrap()[0];
    buffer.as_mut_slice().unwrap()[len - 1] = first;
}

#[test]
fn buffers_hold_whole_elements_of_any_plain_type() {
    sized::<u8>(1);
    sized::<u16>(4097);
    sized::<f64>(1000);
    sized::<u128>(3);
    sized::<[u32; 3]>(1001);
    sized::<[[u8; 5]; 7]>(99);
    sized::<u8>((5 << 20) + 1);
}

#[test]
fn sizes_that_overflow_or_are_zero_are_refused() {
    assert_eq!(errno(MappedBuffer::<u8>::alloc(0).map(drop)), libc::EINVAL);
    assert_eq!(errno(MappedBuffer::<[u64; 0]>::alloc(7).map(drop)), libc::EINVAL);
    for len in [usize::MAX, usize::MAX / 8 + 1, usize::MAX / 16, isize::MAX as usize / 8 + 1, isize::MAX as usize / 8] {
        let error = MappedBuffer::<u64>::alloc(len).unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM, "{len}: {error}");
    }
    for alignment in [3, 24, 4097, usize::MAX] {
        let options = MappedOptions { alignment, ..MappedOptions::default() };
        assert_eq!(errno(MappedBuffer::<u8>::alloc_with(1, options).map(drop)), libc::EINVAL, "{alignment}");
    }
    let options = MappedOptions { alignment: 1 << 63, ..MappedOptions::default() };
    assert_eq!(errno(MappedBuffer::<u8>::alloc_with(1, options).map(drop)), libc::ENOMEM);
}

#[test]
fn alignments_are_kept_for_every_kind_of_page() {
    for huge_pages in [HugePages::Advise, HugePages::Off] {
        for alignment in [0, 1, 8, 4096, 8192, 1 << 16, 2 << 20, 16 << 20] {
            for len in [1, 4096, 4097, (2 << 20) - 1, 2 << 20, (3 << 20) + 5] {
                let options = MappedOptions { alignment, huge_pages, ..MappedOptions::default() };
                let mut buffer = MappedBuffer::<u8>::alloc_with(len, options).unwrap();
                assert_eq!(buffer.as_host_ptr() as usize % alignment.max(4096), 0);
                let slice = buffer.as_mut_slice().unwrap();
                assert_eq!(slice.len(), len);
                (slice[0], slice[len - 1]) = (1, 2);
            }
        }
    }
}

#[test]
fn huge_pages_come_from_the_pool_or_not_at_all() {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let options = MappedOptions { huge_pages: HugePages::Require, ..MappedOptions::default() };
    let buffer = MappedBuffer::<u8>::alloc_with(3 << 20, options);
    if field("HugePages_Free:").unwrap_or(0) >= 2 && field("Hugepagesize:") == Some(2048) {
        assert_eq!(buffer.unwrap().as_host_ptr() as usize % (2 << 20), 0);
    } else {
        let error = buffer.unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM);
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
        assert!(MappedBuffer::<u8>::alloc(3 << 20).is_ok(), "advice alone needs no pool");
    }
}

#[test]
fn sub_regions_and_copies_are_bounds_checked() {
    let mut memory = MappedBuffer::<u8>::alloc(8192).unwrap();
    for (i, byte) in memory.as_mut_slice().unwrap().iter_mut().enumerate() {
        *byte = (i / 64) as u8;
    }
    let whole = memory.share();
    assert_eq!((whole.len(), whole.kind(), whole.is_empty()), (8192, MemoryKind::HostVisible, false));
    let part = memory.share().sub_region(4096, 1000).unwrap();
    assert_eq!(part.as_host_ptr() as usize, whole.as_host_ptr() as usize + 4096);
    assert_eq!(part.as_device_ptr().unwrap(), whole.as_device_ptr().unwrap() + 4096);
    let mut out = [0; 64];
    // SAFETY: nothing is in flight in this test, and nothing else touches the memory.
    unsafe {
        part.copy_out(64, &mut out).unwrap();
        assert_eq!(out, [65; 64]);
        assert_eq!(part.as_slice().unwrap().len(), 1000);
        for offset in [937, 1000, usize::MAX] {
            assert_eq!(errno(part.copy_out(offset, &mut out)), libc::ERANGE);
        }
        part.copy_out(1000, &mut []).unwrap();
        let mut again = part.duplicate();
        again.as_mut_slice().unwrap()[0] = 0xcc;
        part.copy_out(0, &mut out[..1]).unwrap();
        assert_eq!(out[0], 0xcc);
    }
    let part = part.sub_region(10, 900).unwrap();
    for (offset, len) in [(0, 901), (900, 1), (901, 0), (usize::MAX, 1), (1, usize::MAX), (usize::MAX, usize::MAX)] {
        // SAFETY: the duplicate is only measured.
        let error = unsafe { part.duplicate() }.sub_region(offset, len).unwrap_err();
        assert_eq!(error.errno(), libc::ERANGE, "{offset} {len}");
    }
    assert!(part.sub_region(900, 0).unwrap().is_empty());
}

#[test]
fn wrapped_memory_is_checked_and_reads_land_in_it() {
    let file = TempFile::new(4096);
    let mut array = vec![0u8; 10_000];
    let tail = AtomicU64::new(0);
    // SAFETY: nobody touches the slice while the stream lives, and the stream is dropped, not leaked.
    let buffer = unsafe { GpuMappedBuffer::from_host_visible_slice(&mut array, Some(1 << 50)) }.unwrap();
    assert_eq!((buffer.as_device_ptr(), buffer.len()), (Some(1 << 50), 10_000));
    let part = buffer.sub_region(123, 4096).unwrap();
    assert_eq!(part.as_device_ptr(), Some((1 << 50) + 123));
    let mut stream = AsyncUringStream::new(ring!(), part, &tail).unwrap();
    stream.submit_read_to_gpu(&file.open(DirectMode::Auto), 0, 0, 4096).unwrap();
    assert_eq!(take_one(&mut stream).status, 0);
    drop(stream);
    check(&array[123..123 + 4096], 0);
    assert!(array[..123].iter().chain(&array[123 + 4096..]).all(|&byte| byte == 0));
    // SAFETY: only the checks are exercised.
    unsafe {
        assert_eq!(errno(GpuMappedBuffer::from_host_visible_slice(&mut [], None)), libc::EINVAL);
        let wrap = |base: usize, len, device| {
            errno(GpuMappedBuffer::from_host_visible_owner(base as *mut u8, len, device, ()).map(drop))
        };
        assert_eq!(wrap(0, 16, None), libc::EINVAL);
        assert_eq!(wrap(4096, 0, None), libc::EINVAL);
        assert_eq!(wrap(usize::MAX - 8, 16, None), libc::ERANGE);
        assert_eq!(wrap(4096, usize::MAX, None), libc::ERANGE);
        assert_eq!(wrap(4096, isize::MAX as usize + 1, None), libc::ERANGE);
        assert_eq!(wrap(4096, 16, Some(u64::MAX - 8)), libc::ERANGE);
        assert_eq!(errno(GpuMappedBuffer::from_bar1_peer_with_owner(std::ptr::null_mut(), 16, 0, ())), libc::EINVAL);
    }
}

#[test]
fn peer_memory_is_addressed_but_not_touched() {
    // SAFETY: never dereferenced.
    let mut peer = unsafe { GpuMappedBuffer::from_bar1_peer_with_owner(4096 as *mut u8, 256, 1 << 40, ()) }.unwrap();
    assert_eq!((peer.kind(), peer.as_device_ptr()), (MemoryKind::Bar1Peer, Some(1 << 40)));
    // SAFETY: refused before any access.
    unsafe {
        assert_eq!(errno(peer.as_slice().map(drop)), libc::EOPNOTSUPP);
        assert_eq!(errno(peer.as_mut_slice().map(drop)), libc::EOPNOTSUPP);
        assert_eq!(errno(peer.copy_out(0, &mut [0; 4])), libc::EOPNOTSUPP);
        assert_eq!(errno(TailLine::in_buffer(&peer, 0)), libc::EOPNOTSUPP);
    }
    let _moved: GpuMappedBuffer<'static> = peer.sub_region(252, 4).unwrap();
}

#[test]
fn a_tail_line_lives_inside_a_buffer_as_long_as_its_clones() {
    let buffer = GpuMappedBuffer::from(filled(4096, 0xff));
    // SAFETY: nothing else uses the line's bytes.
    let line = unsafe {
        for (offset, expected) in [
            (64, libc::EINVAL),
            (1, libc::EINVAL),
            (3969, libc::ERANGE),
            (4096, libc::ERANGE),
            (usize::MAX, libc::ERANGE),
        ] {
            assert_eq!(errno(TailLine::in_buffer(&buffer, offset)), expected, "{offset}");
        }
        TailLine::in_buffer(&buffer, 3968).unwrap()
    };
    assert_eq!(line.as_device_ptr(), buffer.as_device_ptr().map(|device| device + 3968));
    let (buffer, error) = buffer.release().unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    let mut memory = filled(64, 0);
    drop(AsyncUringStream::new(ring!(), memory.share(), line.clone()).unwrap());
    assert_eq!(line.words().tail.load(Ordering::Relaxed), 0, "a stream resets its line");
    assert_eq!(line.words().first_bad.load(Ordering::Relaxed), ringest::wire::NO_SEQUENCE);
    drop(line);
    buffer.release().unwrap();
}

/// Sets a flag when dropped; owns memory.
struct Owner {
    map: Map,
    dropped: Arc<AtomicBool>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Make sure that a late write by the kernel would be seen as a fault, not as a use of someone's memory.
        assert!(!self.map.base.is_null());
        self.dropped.store(true, Ordering::SeqCst);
    }
}

fn owned(len: usize) -> (GpuMappedBuffer<'static>, Arc<AtomicBool>) {
    let dropped = Arc::new(AtomicBool::new(false));
    let map = Map::new(len, libc::PROT_READ | libc::PROT_WRITE);
    let base = map.base;
    let owner = Owner { map, dropped: Arc::clone(&dropped) };
    // SAFETY: the mapping lives as long as its owner, and only streams write to it.
    (unsafe { GpuMappedBuffer::from_host_visible_owner(base, len, None, owner) }.unwrap(), dropped)
}

/// "Drop with reads in flight": an owner outlives every read into its memory, whatever else is dropped.
#[test]
fn an_owner_outlives_its_reads_in_flight() {
    for unregistered in [false, true] {
        let (buffer, dropped) = owned(4096);
        let (other, _) = owned(4096);
        let pipe = Pipe::new();
        let tail = AtomicU64::new(0);
        let options = StreamOptions { unregistered, ..StreamOptions::default() };
        let mut stream = AsyncUringStream::with_options(ring!(), buffer, &tail, options).unwrap();
        stream.submit_read_to_gpu(pipe.fd(), 0, 0, 4096).unwrap();
        stream.flush_submissions().unwrap();
        let handle = stream.replace_buffer(other).unwrap();
        let (handle, error) = handle.release().unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY);
        assert!(handle.is_shared());
        drop(handle);
        assert!(!dropped.load(Ordering::SeqCst), "dropped under a read in flight");
        pipe.feed(0, 4096);
        assert_eq!(take_one(&mut stream).status, 0);
        stream.poll().unwrap();
        assert!(dropped.load(Ordering::SeqCst), "kept after the last read");
    }
}

#[test]
fn an_owner_goes_with_its_stream() {
    let (buffer, dropped) = owned(4096);
    let pipe = Pipe::new();
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring!(), buffer, &tail).unwrap();
    stream.submit_read_to_gpu(pipe.fd(), 0, 0, 4096).unwrap();
    stream.flush_submissions().unwrap();
    assert!(!dropped.load(Ordering::SeqCst));
    drop(stream);
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn releasing_is_refused_while_registered_or_shared() {
    let mut ring = ring!();
    let (buffer, dropped) = owned(4096);
    ring.register_buffers(&[&buffer]).unwrap();
    let (buffer, error) = buffer.release().unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    assert!(error.to_string().contains("unregister"), "{error}");
    ring.unregister_buffers().unwrap();
    // SAFETY: neither handle is read into.
    let second = unsafe { buffer.duplicate() };
    let (buffer, _) = buffer.release().unwrap_err();
    drop(second);
    assert!(!dropped.load(Ordering::SeqCst));
    buffer.release().unwrap();
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn slices_of_a_mapped_buffer_wait_for_everything_that_may_write() {
    let mut memory = MappedBuffer::<u8>::alloc(4096).unwrap();
    let pipe = Pipe::new();
    let tail = AtomicU64::new(0);
    let mut stream = AsyncUringStream::new(ring!(), memory.share(), &tail).unwrap();
    stream.submit_read_to_gpu(pipe.fd(), 0, 0, 4096).unwrap();
    assert_eq!(errno(memory.as_slice().map(drop)), libc::EBUSY);
    assert_eq!(errno(memory.as_mut_slice().map(drop)), libc::EBUSY);
    pipe.feed(0, 4096);
    take_one(&mut stream);
    assert_eq!(errno(memory.as_slice().map(drop)), libc::EBUSY);
    drop(stream);
    check(memory.as_slice().unwrap(), 0);
    // A buffer turned into a handle lives on in it.
    let handle = GpuMappedBuffer::from(memory);
    // SAFETY: nothing is in flight.
    check(unsafe { handle.as_slice() }.unwrap(), 0);
}
