//! Virtual memory of GPUs: planned without a driver, real on a GPU, and on a fake one; against a model, and misused.

mod common;

use common::gpu::{both, driver_function, fake, gpu};
use common::*;
use ringest::memory::PLANNING_GRANULARITY;
use ringest::{
    AccessFlags, DeviceBuffer, Gpu, GpuMappedBuffer, MappedBuffer, MappedOptions, MemoryLocation, PhysicalAllocation,
    PhysicalOptions, Pinning, PipelineError, Result, VirtualAddressRange, VirtualMemoryManager, gpu_leaks,
};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

fn manager(gpu: &Gpu) -> VirtualMemoryManager {
    VirtualMemoryManager::new(gpu).unwrap()
}

fn granule(manager: &VirtualMemoryManager) -> usize {
    manager.granularity(PhysicalOptions::default(), false).unwrap()
}

fn read_write(gpu: &Gpu) -> [(MemoryLocation, AccessFlags); 1] {
    [(gpu.into(), AccessFlags::ReadWrite)]
}

/// The errno of a refusal that gives the thing back.
#[track_caller]
fn refused<T, R: std::fmt::Debug>(result: std::result::Result<R, (T, PipelineError)>) -> (T, i32) {
    let (back, error) = result.map_err(|(back, error)| (Some(back), error)).unwrap_err();
    (back.unwrap(), error.errno())
}

/// A buffer over mapped addresses, which must outlive it.
fn view(gpu: &Gpu, range: &VirtualAddressRange, offset: usize, len: usize) -> Result<DeviceBuffer> {
    // SAFETY: the callers keep the range, and use one view at a time.
    unsafe { DeviceBuffer::from_raw(gpu, range.address() + offset as u64, len) }
}

fn write(gpu: &Gpu, range: &VirtualAddressRange, offset: usize, bytes: &[u8]) -> Result<()> {
    view(gpu, range, offset, bytes.len())?.copy_in(0, bytes)
}

fn read<const N: usize>(gpu: &Gpu, range: &VirtualAddressRange, offset: usize) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    view(gpu, range, offset, N)?.copy_out(0, &mut bytes)?;
    Ok(bytes)
}

#[test]
fn without_a_driver_ranges_are_planned_and_the_rest_says_why() {
    let manager = VirtualMemoryManager::detect();
    if manager.gpu().is_some() {
        skip!("there is a GPU");
    }
    let mut range = manager.reserve(64 << 30, 2 << 20).unwrap();
    assert!(range.is_planning() && range.address().is_multiple_of(2 << 20));
    assert_eq!(range.address_of(5 << 30).unwrap(), range.address() + (5 << 30));
    assert_eq!(errno(manager.reserve(PLANNING_GRANULARITY + 4096, 4096)), libc::EINVAL);
    let error = manager.alloc_physical(PLANNING_GRANULARITY, PhysicalOptions::default()).unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    assert!(error.to_string().contains("libcuda") || error.to_string().contains("GPU"), "{error}");
    assert_eq!(errno(manager.unmap(&mut range, 0, 2 << 20)), libc::EOPNOTSUPP);
    let all = [(MemoryLocation::Gpu(0), AccessFlags::ReadWrite)];
    assert_eq!(errno(manager.set_access(&mut range, 0, 2 << 20, &all)), libc::EOPNOTSUPP);
    assert_eq!(errno(manager.access(&range, 0, MemoryLocation::Gpu(0))), libc::EOPNOTSUPP);
    assert_eq!(errno(manager.export_dma_buf(&range, 0, 2 << 20)), libc::EOPNOTSUPP);
    let pipe = Pipe::new();
    assert_eq!(errno(manager.import_fd(pipe.read.as_fd(), 2 << 20)), libc::EOPNOTSUPP);
    let (range, errno) = refused(DeviceBuffer::from_range(&manager, range, 2 << 20));
    assert_eq!(errno, libc::EOPNOTSUPP);
    manager.release(range).map_err(|(_, error)| error).unwrap();
}

#[test]
fn planning_ranges_never_overlap_and_come_back() {
    let manager = VirtualMemoryManager::planning();
    for _ in 0..50 {
        // Sixteen terabytes at a time: addresses that were not given back would run out.
        let ranges: Vec<_> = (0..4).map(|i| manager.reserve(4 << 40, (2 << 20) << (3 * i)).unwrap()).collect();
        let mut starts: Vec<_> = ranges.iter().map(VirtualAddressRange::address).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 4 << 40));
    }
}

both! {
    fn sizes_and_alignments_are_checked_before_the_driver_is_asked(gpu: &Gpu) {
        let manager = manager(gpu);
        let granule = granule(&manager);
        assert!(granule.is_power_of_two());
        assert!(manager.granularity(PhysicalOptions::default(), true).unwrap().is_multiple_of(granule));
        for (size, alignment) in [
            (0, granule), (granule, 0), (granule, 3), (granule, 2 * granule), (granule + 1, 1), (granule / 2, 1),
            (3 * granule, 2 * granule), (4096, 4096),
        ] {
            assert_eq!(errno(manager.reserve(size, alignment)), libc::EINVAL, "{size} {alignment}");
        }
        assert_eq!(errno(manager.reserve_near(granule, granule, 4096)), libc::EINVAL);
        for size in [0, 1, granule - 1, granule + 1, granule / 2] {
            assert_eq!(errno(manager.alloc_physical(size, PhysicalOptions::default())), libc::EINVAL, "{size}");
        }
        assert_eq!(errno(manager.alloc_physical(1 << 50, PhysicalOptions::default())), libc::ENOMEM);
        for alignment in [1, 4096, granule, 16 * granule, 64 << 20] {
            let range = manager.reserve(64 << 20, alignment).unwrap();
            assert!(range.address().is_multiple_of(alignment.max(granule) as u64) && !range.is_planning());
            assert_eq!((range.size(), range.mapped()), (64 << 20, 0));
        }
        assert_eq!(errno(manager.alloc_physical(granule, PhysicalOptions {
            location: Some(MemoryLocation::Gpu(99)), ..Default::default()
        })), libc::ENODEV);
    }
}

both! {
    fn misuse_is_refused_with_an_errno_and_changes_nothing(gpu: &Gpu) {
        let manager = manager(gpu);
        let g = granule(&manager);
        let mut range = manager.reserve(16 * g, g).unwrap();
        let two = manager.alloc_physical(2 * g, PhysicalOptions::default()).unwrap();
        let one = manager.alloc_physical(g, PhysicalOptions::default()).unwrap();
        assert_eq!((two.size(), two.granularity(), two.location(), two.is_mapped()), (2 * g, g, gpu.into(), false));
        manager.map(&mut range, 2 * g, 2 * g, &two, 0).unwrap();
        assert!(two.is_mapped() && !one.is_mapped());

        // Double map.
        for (offset, size, physical) in [(2 * g, 2 * g, &two), (3 * g, g, &one), (2 * g, g, &one), (g, 2 * g, &two)] {
            assert_eq!(errno(manager.map(&mut range, offset, size, physical, 0)), libc::EBUSY, "{offset} {size}");
        }
        // Sizes and offsets off the granularity, of 0, and outside.
        for (offset, size, from, expected) in [
            (0, 0, 0, libc::EINVAL), (0, g / 2, 0, libc::EINVAL), (g / 2, g, 0, libc::EINVAL), (0, g, g / 2, libc::EINVAL),
            (0, 3 * g, 0, libc::ERANGE), (0, g, 2 * g, libc::ERANGE), (16 * g, g, 0, libc::ERANGE),
            (15 * g, 2 * g, 0, libc::ERANGE), (usize::MAX, g, 0, libc::ERANGE), (0, usize::MAX, 0, libc::ERANGE),
            (0, g, usize::MAX - g + 1, libc::ERANGE),
        ] {
            assert_eq!(errno(manager.map(&mut range, offset, size, &two, from)), expected, "{offset} {size} {from}");
        }
        // Half a mapping, a hole, nothing, outside.
        for (offset, size, expected) in [
            (2 * g, g, libc::EINVAL), (3 * g, g, libc::EINVAL), (g, 3 * g, libc::EINVAL), (2 * g, 3 * g, libc::EINVAL),
            (0, g, libc::EINVAL), (2 * g, 0, libc::EINVAL), (2 * g + 1, g, libc::EINVAL), (15 * g, 2 * g, libc::ERANGE),
            (usize::MAX, 1, libc::ERANGE),
        ] {
            assert_eq!(errno(manager.unmap(&mut range, offset, size)), expected, "unmap {offset} {size}");
            let access = manager.set_access(&mut range, offset, size, &read_write(gpu));
            assert_eq!(errno(access), expected, "access {offset} {size}");
            assert_eq!(errno(manager.export_dma_buf(&range, offset, size)), expected, "export {offset} {size}");
        }
        assert_eq!(errno(manager.set_access(&mut range, 2 * g, 2 * g, &[])), libc::EINVAL);
        let nowhere = [(MemoryLocation::Gpu(99), AccessFlags::ReadWrite)];
        let error = manager.set_access(&mut range, 2 * g, 2 * g, &nowhere).unwrap_err();
        assert!([libc::ENODEV, libc::EINVAL].contains(&error.errno()), "{error}");
        assert_eq!(errno(manager.access(&range, 0, gpu.into())), libc::EINVAL);
        assert_eq!(errno(manager.access(&range, 16 * g, gpu.into())), libc::ERANGE);
        assert_eq!(errno(manager.export_fd(&one)), libc::EINVAL, "not exportable");

        // Free while mapped, release while mapped.
        let (two, code) = refused(manager.free_physical(two));
        assert_eq!(code, libc::EBUSY);
        let (range, code) = refused(manager.release(range));
        assert_eq!(code, libc::EBUSY);
        // A buffer over what is not mapped, or not open to the GPU.
        let (range, code) = refused(DeviceBuffer::from_range(&manager, range, g));
        assert_eq!(code, libc::EINVAL);
        let (mut range, code) = refused(DeviceBuffer::from_range(&manager, range, usize::MAX));
        assert_eq!(code, libc::EINVAL);

        // Nothing of it changed anything.
        assert_eq!(range.mappings().collect::<Vec<_>>(), [(2 * g, 2 * g)]);
        assert_eq!(manager.access(&range, 2 * g, gpu.into()).unwrap(), AccessFlags::None);
        manager.set_access(&mut range, 2 * g, 2 * g, &read_write(gpu)).unwrap();
        assert_eq!(manager.access(&range, 3 * g, gpu.into()).unwrap(), AccessFlags::ReadWrite);
        write(gpu, &range, 2 * g, b"still here").unwrap();
        assert_eq!(&read::<10>(gpu, &range, 2 * g).unwrap(), b"still here");
        manager.unmap(&mut range, 2 * g, 2 * g).unwrap();
        manager.release(range).map_err(|(_, error)| error).unwrap();
        manager.free_physical(two).map_err(|(_, error)| error).unwrap();
        manager.free_physical(one).map_err(|(_, error)| error).unwrap();
        assert_eq!(gpu_leaks(), 0);
    }
}

both! {
    /// A physical offset is passed on: the driver decides.
    fn a_physical_offset_is_the_drivers_to_judge(gpu: &Gpu) {
        let manager = manager(gpu);
        let g = granule(&manager);
        let mut range = manager.reserve(4 * g, g).unwrap();
        let physical = manager.alloc_physical(2 * g, PhysicalOptions::default()).unwrap();
        match manager.map(&mut range, 0, g, &physical, g) {
            Ok(()) => println!("this driver maps from an offset"),
            Err(error) => {
                assert!([libc::EOPNOTSUPP, libc::EINVAL].contains(&error.errno()), "{error}");
                assert_eq!(range.mapped(), 0);
            }
        }
        // Less than all of it, from its start.
        match manager.map(&mut range, g, g, &physical, 0) {
            Ok(()) => println!("this driver maps a part"),
            Err(error) => {
                assert!([libc::EOPNOTSUPP, libc::EINVAL].contains(&error.errno()), "{error}");
            }
        }
    }
}

both! {
    fn one_allocation_at_two_places_is_the_same_memory(gpu: &Gpu) {
        let manager = manager(gpu);
        let g = granule(&manager);
        let mut range = manager.reserve(8 * g, g).unwrap();
        let mut other = manager.reserve(2 * g, g).unwrap();
        let physical = manager.alloc_physical(2 * g, PhysicalOptions::default()).unwrap();
        manager.map(&mut range, 0, 2 * g, &physical, 0).unwrap();
        manager.map(&mut range, 2 * g, 2 * g, &physical, 0).unwrap();
        manager.map(&mut other, 0, 2 * g, &physical, 0).unwrap();
        // A run of two whole mappings.
        manager.set_access(&mut range, 0, 4 * g, &read_write(gpu)).unwrap();
        manager.set_access(&mut other, 0, 2 * g, &read_write(gpu)).unwrap();
        write(gpu, &range, g + 5, b"aliased").unwrap();
        assert_eq!(&read::<7>(gpu, &range, 3 * g + 5).unwrap(), b"aliased");
        assert_eq!(&read::<7>(gpu, &other, g + 5).unwrap(), b"aliased");
        // The memory outlives its handle, and one of its mappings the others.
        drop(physical);
        manager.unmap(&mut range, 0, 4 * g).unwrap();
        assert_eq!(range.mapped(), 0);
        assert_eq!(&read::<7>(gpu, &other, g + 5).unwrap(), b"aliased");
    }
}

both! {
    fn growth_in_place_keeps_addresses_and_contents(gpu: &Gpu) {
        let manager = manager(gpu);
        let g = granule(&manager);
        let mut range = manager.reserve(1 << 40, g).unwrap();
        let address = range.address();
        for i in 0..20 {
            let physical = manager.alloc_physical((1 + i % 3) * g, PhysicalOptions::default()).unwrap();
            let at = range.mapped();
            manager.map(&mut range, at, physical.size(), &physical, 0).unwrap();
            manager.set_access(&mut range, at, physical.size(), &read_write(gpu)).unwrap();
            write(gpu, &range, at, &[i as u8; 64]).unwrap();
        }
        assert_eq!(range.address(), address);
        let starts: Vec<_> = range.mappings().map(|(at, _)| at).collect();
        for (i, at) in starts.into_iter().enumerate() {
            assert_eq!(read::<64>(gpu, &range, at).unwrap(), [i as u8; 64]);
        }
        let len = range.mapped() - 7;
        let mut buffer = DeviceBuffer::from_range(&manager, range, len).map_err(|(_, error)| error).unwrap();
        assert_eq!((buffer.as_device_ptr(), buffer.len(), buffer.capacity()), (address, len, 1 << 40));
        buffer.grow(len + 7).unwrap();
        assert_eq!(buffer.len(), len + 7, "what is mapped already is taken first");
        buffer.grow(len + 8).unwrap();
        assert_eq!(buffer.len(), len + 7 + g);
        buffer.fill(len, g, 3).unwrap();
        let mut back = [0; 64];
        buffer.copy_out(0, &mut back).unwrap();
        assert_eq!(back, [0; 64]);
    }
}

both! {
    fn access_is_granted_narrowed_and_taken(gpu: &Gpu) {
        let manager = manager(gpu);
        let g = granule(&manager);
        let mut range = manager.reserve(2 * g, g).unwrap();
        let physical = manager.alloc_physical(g, PhysicalOptions::default()).unwrap();
        manager.map(&mut range, 0, g, &physical, 0).unwrap();
        assert!(write(gpu, &range, 0, &[1; 16]).is_err(), "no access yet");
        manager.set_access(&mut range, 0, g, &read_write(gpu)).unwrap();
        write(gpu, &range, 0, &[1; 16]).unwrap();
        for (flags, writable) in [(AccessFlags::Read, false), (AccessFlags::ReadWrite, true)] {
            match manager.set_access(&mut range, 0, g, &[(gpu.into(), flags)]) {
                Ok(()) => {
                    assert_eq!(manager.access(&range, 0, gpu.into()).unwrap(), flags);
                    assert_eq!(read::<16>(gpu, &range, 0).unwrap(), [1; 16]);
                    let written = write(gpu, &range, 0, &[1; 16]);
                    println!("{flags:?}: {written:?}");
                    assert!(written.is_ok() || !writable);
                }
                Err(error) => println!("{flags:?}: {error}"),
            }
        }
        match manager.set_access(&mut range, 0, g, &[(gpu.into(), AccessFlags::None)]) {
            Ok(()) => {
                assert_eq!(manager.access(&range, 0, gpu.into()).unwrap(), AccessFlags::None);
                assert!(write(gpu, &range, 0, &[2; 16]).is_err(), "access was taken");
            }
            Err(error) => println!("None: {error}"),
        }
        manager.set_access(&mut range, 0, g, &read_write(gpu)).unwrap();
        assert_eq!(read::<16>(gpu, &range, 0).unwrap(), [1; 16]);
    }
}

both! {
    fn physical_memory_travels_as_a_descriptor(gpu: &Gpu) {
        let manager = manager(gpu);
        let options = PhysicalOptions { exportable: true, ..PhysicalOptions::default() };
        let g = manager.granularity(options, false).unwrap();
        let mut range = manager.reserve(4 * g, g).unwrap();
        let physical = manager.alloc_physical(2 * g, options).unwrap();
        manager.map(&mut range, 0, 2 * g, &physical, 0).unwrap();
        manager.set_access(&mut range, 0, 2 * g, &read_write(gpu)).unwrap();
        write(gpu, &range, g, b"exported").unwrap();
        let fd = manager.export_fd(&physical).unwrap();
        assert!(fd.as_raw_fd() > 2);
        let imported = manager.import_fd(&fd, 2 * g).unwrap();
        drop(fd);
        assert_eq!((imported.size(), imported.location()), (2 * g, gpu.into()));
        assert_eq!(errno(manager.export_fd(&imported)), libc::EINVAL, "what was imported is not exported again");
        manager.map(&mut range, 2 * g, 2 * g, &imported, 0).unwrap();
        manager.set_access(&mut range, 2 * g, 2 * g, &read_write(gpu)).unwrap();
        assert_eq!(&read::<8>(gpu, &range, 3 * g).unwrap(), b"exported");
        let again = manager.export_fd(&physical).unwrap();
        // It lives on in the importer.
        manager.unmap(&mut range, 0, 2 * g).unwrap();
        manager.free_physical(physical).map_err(|(_, error)| error).unwrap();
        assert_eq!(&read::<8>(gpu, &range, 3 * g).unwrap(), b"exported");
        // What no one exported is refused.
        let pipe = Pipe::new();
        let error = manager.import_fd(pipe.read.as_fd(), 2 * g).unwrap_err();
        println!("import of a pipe: {error}");
        assert_eq!(errno(manager.import_fd(&again, 0)), libc::EINVAL);
        assert_eq!(errno(manager.import_fd(&again, g + 1)), libc::EINVAL);
        // More than was allocated: found when it is mapped.
        let larger = manager.import_fd(&again, 4 * g).unwrap();
        let mut wide = manager.reserve(4 * g, g).unwrap();
        let error = manager.map(&mut wide, 0, 4 * g, &larger, 0).unwrap_err();
        assert!([libc::EOPNOTSUPP, libc::EINVAL].contains(&error.errno()), "{error}");
    }
}

both! {
    fn memory_is_exported_as_a_dma_buf(gpu: &Gpu) {
        if !gpu.attributes().dma_buf {
            skip!("no dma-buf");
        }
        let manager = manager(gpu);
        let options = PhysicalOptions { rdma: gpu.attributes().rdma_virtual_memory, ..PhysicalOptions::default() };
        let g = manager.granularity(options, false).unwrap();
        let mut range = manager.reserve(4 * g, g).unwrap();
        let physical = manager.alloc_physical(2 * g, options).unwrap();
        assert_eq!(physical.is_rdma_capable(), options.rdma);
        manager.map(&mut range, 0, 2 * g, &physical, 0).unwrap();
        manager.set_access(&mut range, 0, 2 * g, &read_write(gpu)).unwrap();
        let describe = |fd: &OwnedFd| {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            assert!(link.to_string_lossy().contains("dma"), "{link:?}");
        };
        describe(&manager.export_dma_buf(&range, 0, 2 * g).unwrap());
        let memory = DeviceBuffer::alloc(gpu, 4 << 20).unwrap();
        describe(&memory.export_dma_buf(0, 4 << 20).unwrap());
        assert_eq!(errno(memory.export_dma_buf(0, 8 << 20)), libc::ERANGE);
        assert_eq!(errno(memory.export_dma_buf(1, 4096)), libc::EINVAL);
    }
}

both! {
    fn memory_of_the_hosts_nodes_is_mapped_too(gpu: &Gpu) {
        let manager = manager(gpu);
        let node = gpu.attributes().host_numa_node;
        let location = MemoryLocation::HostNuma(node.unwrap_or(0));
        let options = PhysicalOptions { location: Some(location), ..PhysicalOptions::default() };
        if !gpu.attributes().host_numa_memory || node.is_none() {
            let error = manager.granularity(options, false).map(drop);
            skip!("no host nodes: {error:?}");
        }
        let g = match manager.granularity(options, false) {
            Ok(granule) => granule,
            Err(error) => skip!("the driver refuses: {error}"),
        };
        assert!(g.is_multiple_of(granule(&manager)));
        let mut range = manager.reserve(g, 1).unwrap();
        let physical = manager.alloc_physical(g, options).unwrap();
        assert_eq!(physical.location(), location);
        manager.map(&mut range, 0, g, &physical, 0).unwrap();
        let both = [(gpu.into(), AccessFlags::ReadWrite), (location, AccessFlags::ReadWrite)];
        manager.set_access(&mut range, 0, g, &both).unwrap();
        // SAFETY: the host was given access; nothing is in flight, and nothing else uses the memory.
        unsafe { std::ptr::copy_nonoverlapping(b"by the host".as_ptr(), range.address() as *mut u8, 11) };
        let mut buffer = DeviceBuffer::from_range(&manager, range, g).map_err(|(_, error)| error).unwrap();
        let mut bytes = [0; 11];
        buffer.copy_out(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"by the host");
        buffer.copy_in(3, b"GPU").unwrap();
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_device_ptr() as *const u8, 11) };
        assert_eq!(bytes, b"by GPU host");
    }
}

#[test]
fn several_gpus_share_a_mapping_as_they_are_allowed() {
    fake!(test_name!(), &[], &[("FAKE_CUDA_DEVICES", "3")], {
        let gpus: Vec<_> = (0..3).map(|ordinal| Gpu::open(ordinal).unwrap()).collect();
        several(&gpus);
    });
}

#[test]
fn two_gpus_share_a_mapping_as_they_are_allowed() {
    let (first, _alone) = gpu!(test_name!());
    if Gpu::count().unwrap() < 2 {
        skip!("one GPU");
    }
    let second = Gpu::open(1).unwrap();
    if !second.can_access(&first).unwrap() {
        skip!("the GPUs cannot reach each other");
    }
    several(&[first, second]);
}

fn several(gpus: &[Gpu]) {
    let manager = manager(&gpus[0]);
    let g = granule(&manager);
    let mut range = manager.reserve(2 * g, g).unwrap();
    let physical = manager.alloc_physical(2 * g, PhysicalOptions::default()).unwrap();
    manager.map(&mut range, 0, 2 * g, &physical, 0).unwrap();
    manager.set_access(&mut range, 0, 2 * g, &read_write(&gpus[0])).unwrap();
    write(&gpus[0], &range, 0, b"shared").unwrap();
    let there = VirtualMemoryManager::new(&gpus[1]).unwrap();
    assert_eq!(there.access(&range, 0, (&gpus[1]).into()).unwrap(), AccessFlags::None);
    let (range_back, code) = refused(DeviceBuffer::from_range(&there, range, 2 * g));
    assert_eq!(code, libc::EINVAL, "access from the wrong device");
    range = range_back;
    let both = [(MemoryLocation::from(&gpus[0]), AccessFlags::ReadWrite), ((&gpus[1]).into(), AccessFlags::ReadWrite)];
    manager.set_access(&mut range, 0, 2 * g, &both).unwrap();
    let mut buffer = DeviceBuffer::from_range(&there, range, 2 * g).map_err(|(_, error)| error).unwrap();
    let mut bytes = [0; 6];
    buffer.copy_out(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"shared");
    buffer.fill(0, 6, 1).unwrap();
}

#[test]
fn a_gpu_that_cannot_is_told_before_it_is_asked() {
    for (attribute, what) in
        [("102", "manager"), ("103", "export"), ("110", "rdma"), ("124", "dma-buf"), ("141", "node")]
    {
        let name = test_name!();
        let ran = common::gpu::with_fake(name, &[], &[("FAKE_CUDA_LACKING_ATTRIBUTE", attribute)], || {
            // The child does not know which of the loop's rounds it is.
            let attribute = std::env::var("FAKE_CUDA_LACKING_ATTRIBUTE").unwrap();
            let gpu = Gpu::open(0).unwrap();
            let made = VirtualMemoryManager::new(&gpu);
            if attribute == "102" {
                assert_eq!(errno(made), libc::EOPNOTSUPP);
                assert_eq!(errno(DeviceBuffer::growable(&gpu, 1, 1)), libc::EOPNOTSUPP);
                assert!(VirtualMemoryManager::detect().gpu().is_none());
                return;
            }
            let manager = made.unwrap();
            let alloc = |options| manager.alloc_physical(2 << 20, options).map(drop);
            let plain = PhysicalOptions::default();
            alloc(plain).unwrap();
            let refused = match attribute.as_str() {
                "103" => alloc(PhysicalOptions { exportable: true, ..plain }),
                "110" => alloc(PhysicalOptions { rdma: true, ..plain }),
                "141" => alloc(PhysicalOptions { location: Some(MemoryLocation::HostNuma(0)), ..plain }),
                _ => DeviceBuffer::alloc(&gpu, 4096).unwrap().export_dma_buf(0, 4096).map(drop),
            };
            let error = refused.unwrap_err();
            assert!(error.errno() == libc::EOPNOTSUPP && error.to_string().contains("Fake GPU 0"), "{error}");
        });
        if let Err(reason) = ran {
            skip!("{what}: {reason}");
        }
    }
}

/// A small generator of random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

/// What the model knows of a mapping.
#[derive(Clone, Copy)]
struct Mapped {
    size: usize,
    physical: usize,
    open: bool,
}

struct Range {
    real: VirtualAddressRange,
    granules: usize,
    mapped: std::collections::BTreeMap<usize, Mapped>,
}

struct Memory {
    id: usize,
    real: PhysicalAllocation,
    granules: usize,
}

/// 10,000 random operations, legal and not, each compared with a model: the same answer, the same mappings, the same bytes.
fn random_operations(gpu: &Gpu, seed: u64, operations: usize) {
    let manager = manager(gpu);
    let g = granule(&manager);
    let all = read_write(gpu);
    let mut random = Random(seed);
    let mut ranges: Vec<Range> = Vec::new();
    let mut memories: Vec<Memory> = Vec::new();
    // By id and granule: what was written there last. Memory without a handle may live on in a mapping.
    let mut words = std::collections::HashMap::<(usize, usize), u64>::new();
    let (mut next_id, mut next_word, mut done, mut refusals) = (0, 1u64, 0, 0);
    while done < operations {
        done += 1;
        let context = format!("seed {seed}, operation {done}");
        match random.below(12) {
            0 if ranges.len() < 8 => {
                let granules = 1 + random.below(24);
                let real = manager.reserve(granules * g, g).unwrap();
                assert!(ranges.iter().all(|other| {
                    let (a, b) = (real.address(), other.real.address());
                    a + (granules * g) as u64 <= b || b + (other.granules * g) as u64 <= a
                }));
                ranges.push(Range { real, granules, mapped: Default::default() });
            }
            1 if memories.len() < 12 => {
                let granules = 1 + random.below(4);
                let real = manager.alloc_physical(granules * g, PhysicalOptions::default()).unwrap();
                memories.push(Memory { id: next_id, real, granules });
                next_id += 1;
            }
            2 if !memories.is_empty() && random.below(3) == 0 => {
                let memory = memories.swap_remove(random.below(memories.len()));
                let mapped = ranges.iter().any(|range| range.mapped.values().any(|m| m.physical == memory.id));
                assert_eq!(memory.real.is_mapped(), mapped, "{context}");
                match manager.free_physical(memory.real) {
                    Ok(()) => assert!(!mapped, "{context}"),
                    Err((real, error)) => {
                        assert!(mapped && error.errno() == libc::EBUSY, "{context}: {error}");
                        refusals += 1;
                        // Sometimes the handle goes, and the mapping keeps the memory.
                        if random.below(2) == 0 {
                            memories.push(Memory { real, ..memory });
                        }
                    }
                }
            }
            3 if !ranges.is_empty() && random.below(4) == 0 => {
                let range = ranges.swap_remove(random.below(ranges.len()));
                // Sometimes it is dropped with all its mappings.
                if random.below(2) == 0 {
                    match manager.release(range.real) {
                        Ok(()) => assert!(range.mapped.is_empty(), "{context}"),
                        Err((real, error)) => {
                            assert!(!range.mapped.is_empty() && error.errno() == libc::EBUSY, "{context}: {error}");
                            refusals += 1;
                            ranges.push(Range { real, ..range });
                        }
                    }
                }
            }
            4..7 if !ranges.is_empty() && !memories.is_empty() => {
                let (count, which) = (ranges.len(), random.below(memories.len()));
                let (range, memory) = (&mut ranges[random.below(count)], &memories[which]);
                let (at, size) =
                    (random.below(range.granules + 1), memory.granules + usize::from(random.below(10) == 0));
                let odd = [0, g / 2, 1][random.below(12).min(2) * usize::from(random.below(12) == 0)];
                let result = manager.map(&mut range.real, at * g + odd, size * g, &memory.real, 0);
                let taken = |(&from, m): (&usize, &Mapped)| from < at + size && at < from + m.size;
                let expected = match () {
                    () if at * g + odd + size * g > range.granules * g => libc::ERANGE,
                    () if odd != 0 => libc::EINVAL,
                    () if size > memory.granules => libc::ERANGE,
                    () if range.mapped.iter().any(taken) => libc::EBUSY,
                    () => 0,
                };
                assert_eq!(result.map_or_else(|error| error.errno(), |()| 0), expected, "{context}: map {at}+{size}");
                if expected == 0 {
                    range.mapped.insert(at, Mapped { size, physical: memory.id, open: false });
                } else {
                    refusals += 1;
                }
            }
            7..10 if !ranges.is_empty() => {
                let count = ranges.len();
                let range = &mut ranges[random.below(count)];
                // Mostly whole mappings side by side, sometimes anything.
                let (at, size) = match range.mapped.iter().nth(random.below(range.mapped.len() + 1)) {
                    Some((&at, mapped)) if random.below(5) != 0 => {
                        let next = range.mapped.get(&(at + mapped.size)).map_or(0, |next| next.size);
                        (at, mapped.size + if random.below(2) == 0 { next } else { 0 })
                    }
                    _ => (random.below(range.granules + 1), random.below(4)),
                };
                let (mut end, mut run) = (at, Vec::new());
                while let Some(mapped) = range.mapped.get(&end).filter(|_| end < at + size) {
                    run.push(end);
                    end += mapped.size;
                }
                let expected = match () {
                    () if size == 0 => libc::EINVAL,
                    () if at + size > range.granules => libc::ERANGE,
                    () if end != at + size => libc::EINVAL,
                    () => 0,
                };
                let unmap = random.below(3) == 0;
                let result = match unmap {
                    true => manager.unmap(&mut range.real, at * g, size * g),
                    false => manager.set_access(&mut range.real, at * g, size * g, &all),
                };
                assert_eq!(result.map_or_else(|error| error.errno(), |()| 0), expected, "{context}: {at}+{size}");
                refusals += usize::from(expected != 0);
                for at in run.into_iter().filter(|_| expected == 0) {
                    match unmap {
                        true => drop(range.mapped.remove(&at)),
                        false => range.mapped.get_mut(&at).unwrap().open = true,
                    }
                }
            }
            _ if !ranges.is_empty() => {
                let range = &ranges[random.below(ranges.len())];
                let Some((&at, mapped)) = range.mapped.iter().nth(random.below(range.mapped.len().max(1))) else {
                    continue;
                };
                let (granule, offset) = (random.below(mapped.size), 8 * random.below(g / 8));
                let place = (at + granule) * g;
                if !mapped.open {
                    let access = manager.access(&range.real, place, gpu.into()).unwrap();
                    assert_eq!(access, AccessFlags::None, "{context}");
                    continue;
                }
                // A word at the granule's start stands for the granule; one at random shows that all of it is there.
                if random.below(2) == 0 {
                    write(gpu, &range.real, place, &next_word.to_le_bytes()).unwrap();
                    if offset != 0 {
                        write(gpu, &range.real, place + offset, &next_word.to_le_bytes()).unwrap();
                    }
                    words.insert((mapped.physical, granule), next_word);
                    next_word += 1;
                } else if let Some(&word) = words.get(&(mapped.physical, granule)) {
                    let found = u64::from_le_bytes(read(gpu, &range.real, place).unwrap());
                    assert_eq!(found, word, "{context}: memory {} granule {granule}", mapped.physical);
                }
            }
            _ => {}
        }
        if done % 97 == 0 {
            for range in &ranges {
                let real: Vec<_> = range.real.mappings().collect();
                let model: Vec<_> = range.mapped.iter().map(|(&at, m)| (at * g, m.size * g)).collect();
                assert_eq!(real, model, "{context}");
            }
        }
    }
    println!("seed {seed}: {done} operations, {refusals} refused as they should be, {} words written", next_word - 1);
    assert!(refusals > operations / 50 && next_word as usize > operations / 50);
}

both! {
    fn ten_thousand_random_operations_do_as_a_model_says(gpu: &Gpu) {
        let free = gpu.memory_info().unwrap().0;
        for seed in 1..=2 {
            random_operations(gpu, seed, 10_000);
        }
        let left = gpu.memory_info().unwrap().0;
        assert_eq!(gpu_leaks(), 0);
        // Page tables and pools of the driver may stay.
        assert!(free.saturating_sub(left) < 64 << 20, "{} MiB less", (free - left) >> 20);
    }
}

/// Times of 1 GiB, printed; `cargo test --release --test virtual_memory -- --ignored --nocapture`.
#[test]
#[ignore = "prints figures"]
fn figures() {
    const GIB: usize = 1 << 30;
    let (gpu, _alone) = gpu!(test_name!());
    /// Of five: making a thing, and giving it back.
    fn time<T>(what: &str, mut make: impl FnMut() -> T) {
        let milliseconds = |start: std::time::Instant| start.elapsed().as_secs_f64() * 1e3;
        let (mut made, mut gone): (Vec<_>, Vec<_>) = (0..5)
            .map(|_| {
                let start = std::time::Instant::now();
                let thing = make();
                let (made, start) = (milliseconds(start), std::time::Instant::now());
                drop(thing);
                (made, milliseconds(start))
            })
            .unzip();
        made.sort_unstable_by(f64::total_cmp);
        gone.sort_unstable_by(f64::total_cmp);
        println!("{what}: median {:.2} ms, {:.2} to {:.2}; back {:.2} ms", made[2], made[0], made[4], gone[2]);
    }
    let lock = |pinning: Pinning, register: bool| {
        let mut memory = MappedBuffer::<u8>::alloc_with(GIB, MappedOptions { pinning, ..Default::default() }).unwrap();
        let ring = ringest::IoUringState::new(ringest::RingOptions::default()).ok().filter(|_| register);
        let ring = ring.map(|mut ring| {
            ring.register_buffers(&[&memory.share()]).unwrap();
            ring
        });
        (ring, memory)
    };
    for register in [false, true] {
        let with = if register { " and io_uring" } else { "" };
        time(&format!("mapped, cuMemHostRegister{with}"), || lock(Pinning::Gpus(vec![gpu.clone()]), register));
        time(&format!("cuMemHostAlloc, zeroed{with}"), || lock(Pinning::HostAlloc(vec![gpu.clone()]), register));
    }
    // What a program without this library does.
    type Alloc = unsafe extern "C" fn(*mut *mut std::ffi::c_void, usize, u32) -> u32;
    type Free = unsafe extern "C" fn(*mut std::ffi::c_void) -> u32;
    type Push = unsafe extern "C" fn(*mut std::ffi::c_void) -> u32;
    struct Bare(*mut std::ffi::c_void, Free);
    impl Drop for Bare {
        fn drop(&mut self) {
            // SAFETY: allocated once, and nothing uses it any more.
            unsafe { (self.1)(self.0) };
        }
    }
    // SAFETY: the types are those of cuda.h; the context is the GPU's.
    let (alloc, free) = unsafe {
        assert_eq!(driver_function::<Push>("cuCtxPushCurrent_v2").unwrap()(gpu.as_context()), 0);
        (driver_function::<Alloc>("cuMemHostAlloc").unwrap(), driver_function::<Free>("cuMemFreeHost").unwrap())
    };
    time("bare cuMemHostAlloc and io_uring", || {
        let mut host = std::ptr::null_mut();
        // SAFETY: one pointer is written; the memory lives longer than its registration.
        unsafe {
            assert_eq!(alloc(&mut host, GIB, 3), 0);
            let memory = Bare(host, free);
            let buffer = GpuMappedBuffer::from_host_visible_owner(host.cast(), GIB, None, ()).unwrap();
            let ring = ringest::IoUringState::new(ringest::RingOptions::default()).ok();
            let ring = ring.map(|mut ring| {
                ring.register_buffers(&[&buffer]).unwrap();
                ring
            });
            (ring, buffer, memory)
        }
    });
    time("cuMemAlloc", || DeviceBuffer::alloc(&gpu, GIB).unwrap());
    let manager = manager(&gpu);
    let g = granule(&manager);
    time("reserve 1 TiB", || manager.reserve(1 << 40, g).unwrap());
    time("reserve, allocate, map, open 1 GiB", || DeviceBuffer::growable(&gpu, GIB, GIB).unwrap());
    time("grow by 16 times 64 MiB", || {
        let mut memory = DeviceBuffer::growable(&gpu, 0, GIB).unwrap();
        (1..=16).for_each(|i| memory.grow(i * (64 << 20)).unwrap());
        memory
    });
    let mut memory = DeviceBuffer::growable(&gpu, 0, GIB).unwrap();
    let granules = GIB / g;
    let start = std::time::Instant::now();
    (1..=granules).for_each(|i| memory.grow(i * g).unwrap());
    println!("grow by {g} bytes: {:.1} us each", start.elapsed().as_secs_f64() * 1e6 / granules as f64);
    let mut word = [0; 8];
    let start = std::time::Instant::now();
    (0..1000).for_each(|_| memory.copy_out(0, &mut word).unwrap());
    println!("copy of 8 bytes: {:.1} us each", start.elapsed().as_secs_f64() * 1e3);
    let start = std::time::Instant::now();
    (0..10_000).for_each(|_| assert!(gpu.memory_info().is_ok()));
    println!("a call in the context: {:.2} us each", start.elapsed().as_secs_f64() * 1e2);
}
