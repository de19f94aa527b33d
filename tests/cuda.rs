//! GPUs, and memory that they address: on a machine without a driver, on a real GPU, and on a fake one whose every call can
//! fail.

mod common;

use common::gpu::{Fake, both, driver_function, fake, gpu};
use common::*;
use ringest::{
    AsyncUringStream, DeviceBuffer, DirectMode, Gpu, GpuMappedBuffer, HugePages, MappedBuffer, MappedOptions,
    MemoryKind, Pinned, Pinning, PipelineError, VirtualMemoryManager, gpu_leaks,
};
use std::ffi::c_void;
use std::sync::atomic::AtomicU64;

fn pinned(gpu: &Gpu, len: usize) -> MappedBuffer<u8> {
    MappedBuffer::alloc_on(gpu, len).unwrap()
}

fn libcuda_is_loaded() -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains("libcuda")
}

/// The context that is current to this thread.
fn current_context() -> *mut c_void {
    // SAFETY: the type is that of cuda.h.
    let get = unsafe { driver_function::<unsafe extern "C" fn(*mut *mut c_void) -> u32>("cuCtxGetCurrent") };
    let mut context = std::ptr::null_mut();
    // SAFETY: one pointer is written.
    assert_eq!(unsafe { get.unwrap()(&mut context) }, 0);
    context
}

#[test]
fn without_a_driver_there_is_no_gpu_and_everything_says_why() {
    let error = match Gpu::count() {
        Ok(_) => skip!("there is a driver"),
        Err(error) => error,
    };
    if !error.to_string().contains("cannot be loaded") {
        skip!("there is a libcuda: {error}");
    }
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    assert!(error.to_string().contains("libcuda.so.1") && error.to_string().contains("install"), "{error}");
    assert_eq!(errno(Gpu::open(0)), libc::EOPNOTSUPP);
    assert_eq!(errno(Gpu::attributes_of(0)), libc::EOPNOTSUPP);
    assert_eq!(errno(Gpu::current()), libc::EOPNOTSUPP);
    assert_eq!(errno(Gpu::driver_version()), libc::EOPNOTSUPP);
    // SAFETY: refused before it is used.
    assert_eq!(errno(unsafe { Gpu::from_context(64 as *mut c_void) }), libc::EOPNOTSUPP);
    let options = MappedOptions { pinning: Pinning::Auto, ..MappedOptions::default() };
    let memory = MappedBuffer::<u8>::alloc_with(100, options).unwrap();
    let Pinned::No { reason } = memory.pinned() else { panic!("{:?}", memory.pinned()) };
    assert!(reason.contains("libcuda.so.1"), "{reason}");
    assert_eq!(memory.as_device_ptr(), memory.as_host_ptr() as u64);
    let none = MappedOptions { pinning: Pinning::Gpus(Vec::new()), ..MappedOptions::default() };
    assert_eq!(errno(MappedBuffer::<u8>::alloc_with(100, none)), libc::EINVAL);
    let none = MappedOptions { pinning: Pinning::HostAlloc(Vec::new()), ..MappedOptions::default() };
    assert_eq!(errno(MappedBuffer::<u8>::alloc_with(100, none)), libc::EINVAL);
    assert!(VirtualMemoryManager::detect().gpu().is_none());
    assert_eq!(gpu_leaks(), 0);
}

both! {
    fn attributes_need_no_context(gpu: &Gpu) {
        assert_eq!(&Gpu::attributes_of(gpu.ordinal()).unwrap(), gpu.attributes());
        assert_eq!(errno(Gpu::attributes_of(Gpu::count().unwrap())), libc::ENODEV);
        assert_eq!(errno(Gpu::attributes_of(u32::MAX)), libc::ENODEV);
        let Some(fake) = Fake::find() else { return };
        fake.fail(0, 0);
        Gpu::attributes_of(0).unwrap();
        let calls: Vec<_> = (1..=fake.calls()).map(|k| fake.call(k)).collect();
        assert!(!calls.is_empty() && calls.iter().all(|name| name.starts_with("cuDevice") && !name.contains("Ctx")));
    }
}

#[test]
fn libcuda_is_not_looked_for_until_a_gpu_is_asked_for() {
    fake!(test_name!(), &[], &[], {
        let file = TempFile::new(4096);
        let mut memory = filled(4096, 0);
        assert_eq!(memory.pinned(), &Pinned::No { reason: "not asked for".into() });
        if let Ok(ring) = ringest::IoUringState::new(ringest::RingOptions::default()) {
            let tail = AtomicU64::new(0);
            let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
            stream.submit_read_to_gpu(&file.open(DirectMode::Auto), 0, 0, 4096).unwrap();
            take_one(&mut stream);
        }
        let _ = VirtualMemoryManager::planning().reserve(2 << 20, 4096).unwrap();
        assert!(!libcuda_is_loaded());
        assert_eq!(Gpu::count().unwrap(), 1);
        assert!(libcuda_is_loaded());
    });
}

/// (test, what cuInit returns, what the reason says)
macro_rules! failing_init {
    ($($name:ident: $code:literal, $says:literal;)*) => { $(
        #[test]
        fn $name() {
            fake!(test_name!(), &[], &[("FAKE_CUDA_INIT", stringify!($code))], {
                for _ in 0..2 {
                    let error = Gpu::open(0).unwrap_err();
                    assert_eq!(error.errno(), libc::EOPNOTSUPP);
                    assert!(error.to_string().contains($says), "{error}");
                    assert!(error.to_string().contains(concat!("CUresult ", stringify!($code))), "{error}");
                }
                assert_eq!(Fake::get().calls(), 1, "the answer is remembered");
            });
        }
    )* };
}
failing_init! {
    no_device_is_a_reason: 100, "CUDA_VISIBLE_DEVICES";
    an_unknown_failure_of_the_driver_is_a_reason: 999, "CUDA_ERROR_UNKNOWN";
    a_stub_library_is_a_reason: 34, "LD_LIBRARY_PATH";
    a_result_nobody_knows_is_a_reason: 12345, "no name";
}

#[test]
fn a_driver_without_a_function_says_which() {
    let lacking = ["cuMemCreate", "cuFuncLoad", "cuMemHostRegister_v2"];
    fake!(test_name!(), &lacking, &[], {
        let gpu = Gpu::open(0).unwrap();
        let error = MappedBuffer::<u8>::alloc_on(&gpu, 4096).unwrap_err();
        assert_eq!(error.errno(), libc::EOPNOTSUPP);
        assert!(error.to_string().contains("cuMemHostRegister_v2") && error.to_string().contains("newer"), "{error}");
        let manager = VirtualMemoryManager::new(&gpu).unwrap();
        let error = manager.alloc_physical(2 << 20, Default::default()).unwrap_err();
        assert!(error.errno() == libc::EOPNOTSUPP && error.to_string().contains("cuMemCreate"), "{error}");
        // What does not need them works.
        let options = MappedOptions { pinning: Pinning::HostAlloc(vec![gpu.clone()]), ..MappedOptions::default() };
        MappedBuffer::<u8>::alloc_with(4096, options).unwrap();
        DeviceBuffer::alloc(&gpu, 4096).unwrap();
    });
}

#[test]
fn a_driver_that_cannot_relax_captures_is_refused_work_and_left_even() {
    fake!(test_name!(), &["cuThreadExchangeStreamCaptureMode"], &[], {
        let gpu = Gpu::open(0).unwrap();
        let error = DeviceBuffer::alloc(&gpu, 4096).unwrap_err();
        assert!(error.to_string().contains("cuThreadExchangeStreamCaptureMode"), "{error}");
    });
}

both! {
    fn a_gpu_is_opened_and_described(gpu: &Gpu) {
        let before = current_context();
        let attributes = gpu.attributes();
        println!("{attributes:#?}");
        println!("driver {:?}, {} GPUs", Gpu::driver_version().unwrap(), Gpu::count().unwrap());
        assert_eq!(gpu.ordinal(), 0);
        assert!(gpu.is_primary_context() && !gpu.as_context().is_null());
        assert!(!attributes.name.is_empty() && attributes.compute_capability >= (5, 0));
        let (free, total) = gpu.memory_info().unwrap();
        assert!(free <= total && total <= attributes.memory && total > 0);
        assert!(gpu.can_access(&gpu.clone()).unwrap());
        gpu.synchronize().unwrap();
        let error = Gpu::open(Gpu::count().unwrap()).unwrap_err();
        assert_eq!(error.errno(), libc::ENODEV);
        assert!(error.to_string().contains("CUDA_VISIBLE_DEVICES"), "{error}");
        assert_eq!(errno(Gpu::open(u32::MAX)), libc::ENODEV);
        // SAFETY: null is refused.
        assert_eq!(errno(unsafe { Gpu::from_context(std::ptr::null_mut()) }), libc::EINVAL);
        let again = Gpu::current().unwrap();
        assert_eq!((again.ordinal(), again.as_context()), (0, gpu.as_context()));
        assert_eq!(current_context(), before);
    }
}

both! {
    fn mapped_memory_is_locked_and_addressed(gpu: &Gpu) {
        let before = current_context();
        for (len, huge_pages) in [
            (1, HugePages::Advise),
            (4097, HugePages::Off),
            ((5 << 20) + 1, HugePages::Advise),
            (200 << 20, HugePages::Advise),
        ] {
            for alignment in [0, 1 << 16, 4 << 20] {
                let pinning = Pinning::Gpus(vec![gpu.clone()]);
                let mut memory = MappedBuffer::<u8>::alloc_with(len, MappedOptions { alignment, huge_pages, pinning }).unwrap();
                assert_eq!(memory.pinned(), &Pinned::Registered);
                assert_eq!(memory.as_host_ptr() as usize % alignment.max(4096), 0);
                assert_eq!(memory.as_device_ptr_on(gpu).unwrap(), memory.as_device_ptr());
                let slice = memory.as_mut_slice().unwrap();
                assert!(slice.iter().step_by(509).all(|&byte| byte == 0), "not zeroed");
                slice[len - 1] = 1;
                let part = memory.share().sub_region(len - 1, 1).unwrap();
                assert_eq!(part.as_device_ptr().unwrap(), memory.as_device_ptr() + len as u64 - 1);
                assert_eq!(part.as_device_ptr_on(gpu).unwrap(), part.as_device_ptr().unwrap());
                assert_eq!(part.kind(), MemoryKind::HostVisible);
            }
        }
        let options = MappedOptions { pinning: Pinning::Auto, ..MappedOptions::default() };
        assert_eq!(MappedBuffer::<u8>::alloc_with(4096, options).unwrap().pinned(), &Pinned::Registered);
        let plain = MappedBuffer::<u8>::alloc(4096).unwrap();
        assert_eq!(errno(plain.as_device_ptr_on(gpu)), libc::EOPNOTSUPP);
        assert_eq!(current_context(), before);
    }
}

both! {
    fn the_driver_allocates_host_memory_by_option(gpu: &Gpu) {
        for (len, alignment) in [(1, 0), (4096, 4096), (10_000, 1 << 16), (3 << 20, 2 << 20)] {
            let pinning = Pinning::HostAlloc(vec![gpu.clone()]);
            let options = MappedOptions { alignment, pinning, ..MappedOptions::default() };
            let mut memory = MappedBuffer::<u8>::alloc_with(len, options).unwrap();
            assert_eq!(memory.pinned(), &Pinned::HostAlloc);
            assert_eq!(memory.as_host_ptr() as usize % alignment.max(4096), 0);
            assert_eq!(memory.as_device_ptr_on(gpu).unwrap(), memory.as_device_ptr());
            let slice = memory.as_mut_slice().unwrap();
            assert!(slice.iter().all(|&byte| byte == 0), "not zeroed");
            slice.fill(7);
        }
        let pinning = Pinning::HostAlloc(vec![gpu.clone()]);
        let options = MappedOptions { huge_pages: HugePages::Require, pinning, ..MappedOptions::default() };
        assert_eq!(errno(MappedBuffer::<u8>::alloc_with(4096, options)), libc::EINVAL);
        let pinning = Pinning::HostAlloc(vec![gpu.clone()]);
        let options = MappedOptions { alignment: 1 << 62, pinning, ..MappedOptions::default() };
        assert_eq!(errno(MappedBuffer::<u8>::alloc_with(1 << 62, options)), libc::ENOMEM);
    }
}

both! {
    fn rings_read_into_locked_memory(gpu: &Gpu) {
        let Ok(ring) = ringest::IoUringState::new(ringest::RingOptions::default()) else { return };
        let file = TempFile::new(1 << 20);
        let mut memory = pinned(gpu, 1 << 20);
        let mut device = DeviceBuffer::alloc(gpu, 1 << 20).unwrap();
        let tail = AtomicU64::new(0);
        let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
        for chunk in 0..4usize {
            let offset = (chunk as u64) << 18;
            stream.submit_read_to_gpu(&file.open(DirectMode::Auto), offset, chunk, 1 << 18).unwrap();
        }
        for completion in take(&mut stream, 4) {
            assert_eq!(completion.status, 0, "{completion:?}");
        }
        drop(stream);
        device.copy_in(0, memory.as_slice().unwrap()).unwrap();
        let mut back = vec![0; 1 << 20];
        device.copy_out(0, &mut back).unwrap();
        check(&back, 0);
    }
}

both! {
    /// "Drop with reads in flight": the lock stays until the last user is gone.
    fn locked_memory_outlives_its_last_user(gpu: &Gpu) {
        let Ok(ring) = ringest::IoUringState::new(ringest::RingOptions::default()) else { return };
        let pipe = Pipe::new();
        let tail = AtomicU64::new(0);
        let mut memory = pinned(gpu, 4096);
        let (host, address) = (memory.as_host_ptr() as usize, memory.as_device_ptr());
        let mut stream = AsyncUringStream::new(ring, memory.share(), &tail).unwrap();
        stream.submit_read_to_gpu(pipe.fd(), 0, 0, 4096).unwrap();
        stream.flush_submissions().unwrap();
        drop(memory);
        // Still locked: the driver finds it. The wrapper is only measured.
        // SAFETY: nothing is read or written through it.
        let look = || unsafe { GpuMappedBuffer::from_host_visible_owner(host as *mut u8, 4096, None, ()) }.unwrap().on_gpu(gpu);
        assert_eq!(look().unwrap().as_device_ptr(), Some(address));
        pipe.feed(0, 4096);
        assert_eq!(take_one(&mut stream).status, 0);
        check(&bytes(&stream), 0);
        drop(stream);
        assert_eq!(errno(look().map(drop)), libc::EINVAL);
    }
}

both! {
    fn memory_pinned_by_others_is_verified(gpu: &Gpu) {
        let memory = pinned(gpu, 1 << 20);
        let (base, address) = (memory.as_host_ptr().cast_mut(), memory.as_device_ptr());
        let wrap = |offset: usize, len, device| {
            // SAFETY: `memory` outlives the wrappers, which are only measured.
            unsafe { GpuMappedBuffer::from_host_visible_owner(base.wrapping_add(offset), len, device, ()) }.unwrap()
        };
        let whole = wrap(0, 1 << 20, None);
        assert_eq!(errno(whole.as_device_ptr_on(gpu)), libc::EOPNOTSUPP, "not before it was checked");
        let whole = whole.on_gpu(gpu).unwrap();
        assert_eq!((whole.as_device_ptr(), whole.as_device_ptr_on(gpu).unwrap()), (Some(address), address));
        let part = wrap(4097, 100, Some(address + 4097)).on_gpu(gpu).unwrap();
        assert_eq!(part.as_device_ptr_on(gpu).unwrap(), address + 4097);
        let again = part.on_gpu(gpu).unwrap().sub_region(50, 50).unwrap();
        assert_eq!(again.as_device_ptr_on(gpu).unwrap(), address + 4147);
        let error = wrap(4097, 100, Some(address)).on_gpu(gpu).unwrap_err();
        assert!(error.errno() == libc::EINVAL && error.to_string().contains("None"), "{error}");
        assert_eq!(errno(wrap(1 << 19, 1 << 20, None).on_gpu(gpu).map(drop)), libc::EINVAL, "half of it is not locked");
        let mut plain = vec![0u8; 8192];
        // SAFETY: only looked up.
        let plain = unsafe { GpuMappedBuffer::from_host_visible_slice(&mut plain, None) }.unwrap();
        let error = plain.on_gpu(gpu).unwrap_err();
        assert!(error.errno() == libc::EINVAL && error.to_string().contains("cuMemHostRegister"), "{error}");
        let whole = wrap(0, 4096, None);
        // SAFETY: only measured.
        let second = unsafe { whole.duplicate() };
        assert_eq!(errno(whole.on_gpu(gpu).map(drop)), libc::EBUSY);
        drop(second);
    }
}

both! {
    fn peer_memory_is_verified_and_made_synchronous(gpu: &Gpu) {
        let memory = DeviceBuffer::alloc(gpu, 1 << 20).unwrap();
        let peer = |device, len| {
            // SAFETY: the window does not exist, and is never touched.
            unsafe { GpuMappedBuffer::from_bar1_peer_with_owner(4096 as *mut u8, len, device, ()) }.unwrap()
        };
        let address = memory.as_device_ptr();
        let window = peer(address, 1 << 20).on_gpu(gpu).unwrap();
        assert_eq!(window.as_device_ptr_on(gpu).unwrap(), address);
        if let Some(fake) = Fake::find() {
            assert_eq!(fake.sync_memops(), address);
        }
        assert_eq!(errno(peer(address, 1 << 40).on_gpu(gpu).map(drop)), libc::ERANGE);
        assert_eq!(errno(peer(4096, 4096).on_gpu(gpu).map(drop)), libc::EINVAL);
        let host = pinned(gpu, 4096);
        assert_eq!(errno(peer(host.as_device_ptr(), 4096).on_gpu(gpu).map(drop)), libc::EINVAL);
    }
}

both! {
    fn device_memory_is_copied_and_filled(gpu: &Gpu) {
        let before = current_context();
        let mut memory = DeviceBuffer::alloc(gpu, 100_003).unwrap();
        assert_eq!((memory.len(), memory.is_empty(), memory.is_borrowed(), memory.capacity()), (100_003, false, false, 100_003));
        assert_eq!(memory.gpu().ordinal(), gpu.ordinal());
        memory.fill(0, 100_003, 0x5a).unwrap();
        memory.copy_in(17, &pattern(17, 50_000)).unwrap();
        memory.fill(100_002, 1, 9).unwrap();
        let mut back = vec![0; 100_003];
        memory.copy_out(0, &mut back).unwrap();
        check(&back[17..50_017], 17);
        assert!(back[..17].iter().chain(&back[50_017..100_002]).all(|&byte| byte == 0x5a));
        assert_eq!(back[100_002], 9);
        memory.copy_in(100_003, &[]).unwrap();
        for (offset, len) in [(100_003, 1), (100_000, 4), (usize::MAX, 2)] {
            assert_eq!(errno(memory.copy_in(offset, &vec![0; len])), libc::ERANGE);
            assert_eq!(errno(memory.copy_out(offset, &mut vec![0; len])), libc::ERANGE);
            assert_eq!(errno(memory.fill(offset, len, 0)), libc::ERANGE);
        }
        assert_eq!(errno(memory.grow(200_000)), libc::EOPNOTSUPP);
        memory.grow(1000).unwrap();
        assert_eq!(errno(DeviceBuffer::alloc(gpu, 0)), libc::EINVAL);
        assert_eq!(errno(DeviceBuffer::alloc(gpu, 1 << 50)), libc::ENOMEM);

        // SAFETY: `memory` outlives the wrappers, and is not used through both at a time.
        unsafe {
            let mut part = DeviceBuffer::from_raw(gpu, memory.as_device_ptr() + 17, 1000).unwrap();
            assert!(part.is_borrowed());
            part.copy_out(0, &mut back[..1000]).unwrap();
            check(&back[..1000], 17);
            part.fill(999, 1, 1).unwrap();
            let wrap = |address, len| DeviceBuffer::from_raw(gpu, address, len).map(drop);
            assert_eq!(errno(wrap(memory.as_device_ptr(), 0)), libc::EINVAL);
            assert_eq!(errno(wrap(0, 10)), libc::EINVAL);
            assert_eq!(errno(wrap(memory.as_device_ptr(), 1 << 40)), libc::ERANGE);
            assert_eq!(errno(wrap(memory.as_device_ptr(), usize::MAX)), libc::ERANGE);
            let host = pinned(gpu, 4096);
            let error = wrap(host.as_device_ptr(), 4096).unwrap_err();
            assert!(error.errno() == libc::EINVAL && error.to_string().contains("page-locked"), "{error}");
            let own = [0u8; 64];
            assert_eq!(errno(wrap(own.as_ptr() as u64, 64)), libc::EINVAL);
        }
        assert_eq!(current_context(), before);
    }
}

both! {
    fn device_memory_grows_in_place(gpu: &Gpu) {
        let mut memory = DeviceBuffer::growable(gpu, 100, 100 << 20).unwrap();
        let (address, granule) = (memory.as_device_ptr(), memory.len());
        assert!(granule >= 100 && memory.capacity() >= 100 << 20 && !memory.is_borrowed());
        memory.fill(0, granule, 1).unwrap();
        memory.grow(10 << 20).unwrap();
        assert_eq!(memory.as_device_ptr(), address);
        assert!(memory.len() >= 10 << 20 && memory.len() < (10 << 20) + granule);
        let len = memory.len();
        memory.fill(granule, len - granule, 2).unwrap();
        let mut back = vec![0; len];
        memory.copy_out(0, &mut back).unwrap();
        assert!(back[..granule].iter().all(|&byte| byte == 1) && back[granule..].iter().all(|&byte| byte == 2));
        assert_eq!(errno(memory.grow(memory.capacity() + 1)), libc::ERANGE);
        memory.grow(memory.capacity()).unwrap();
        assert_eq!(memory.len(), memory.capacity());
        let mut empty = DeviceBuffer::growable(gpu, 0, 1).unwrap();
        assert!(empty.is_empty());
        empty.copy_out(0, &mut []).unwrap();
        assert_eq!(errno(empty.fill(0, 1, 0)), libc::ERANGE);
        empty.grow(1).unwrap();
        assert_eq!(errno(DeviceBuffer::growable(gpu, 0, 0)), libc::EINVAL);
        assert_eq!(errno(DeviceBuffer::growable(gpu, 2, 1)), libc::EINVAL);
    }
}

both! {
    fn every_thread_may_call_and_finds_its_context_again(gpu: &Gpu) {
        let before = current_context();
        std::thread::scope(|scope| {
            for i in 0..6u8 {
                scope.spawn(move || {
                    assert!(current_context().is_null());
                    for round in 0..10 {
                        let mut memory = DeviceBuffer::alloc(gpu, 10_000).unwrap();
                        memory.fill(0, 10_000, i).unwrap();
                        memory.copy_in(round, &[i + 100]).unwrap();
                        let mut back = vec![0; 10_000];
                        memory.copy_out(0, &mut back).unwrap();
                        assert!(back.iter().enumerate().all(|(at, &byte)| byte == if at == round { i + 100 } else { i }));
                        drop(pinned(gpu, 4096));
                    }
                    assert!(current_context().is_null());
                    if let Some(fake) = Fake::find() {
                        assert_eq!((fake.depth(), fake.capture_mode()), (0, 0));
                    }
                });
            }
        });
        assert_eq!(current_context(), before);
        // What one thread made, another gives back.
        let (memory, host) = (DeviceBuffer::alloc(gpu, 4096).unwrap(), pinned(gpu, 4096));
        std::thread::spawn(move || drop((memory, host))).join().unwrap();
    }
}

both! {
    fn a_context_of_the_callers_is_worked_in(gpu: &Gpu) {
        type Create = unsafe extern "C" fn(*mut *mut c_void, u32, i32) -> u32;
        type Destroy = unsafe extern "C" fn(*mut c_void) -> u32;
        // SAFETY: the types are those of cuda.h.
        let (create, destroy) = unsafe {
            (driver_function::<Create>("cuCtxCreate_v2").unwrap(), driver_function::<Destroy>("cuCtxDestroy_v2").unwrap())
        };
        let mut context = std::ptr::null_mut();
        // SAFETY: one pointer is written; the context is destroyed after everything that uses it.
        let own = unsafe {
            assert_eq!(create(&mut context, 0, 0), 0);
            Gpu::from_context(context).unwrap()
        };
        assert_eq!(current_context(), context, "it is current, and stays so");
        assert!(!own.is_primary_context() && own.as_context() == context && own.ordinal() == gpu.ordinal());
        let mut memory = DeviceBuffer::alloc(&own, 4096).unwrap();
        memory.fill(0, 4096, 3).unwrap();
        let host = pinned(&own, 4096);
        assert_eq!(host.as_device_ptr_on(gpu).unwrap(), host.as_device_ptr(), "portable: every context has it");
        drop(pinned(gpu, 4096));
        assert_eq!(current_context(), context);
        drop((memory, host, own));
        // SAFETY: nothing uses it any more.
        assert_eq!(unsafe { destroy(context) }, 0);
    }
}

#[test]
fn a_capture_on_another_thread_is_not_broken() {
    let (gpu, _alone) = gpu!(test_name!());
    type Handle = *mut c_void;
    type Begin = unsafe extern "C" fn(Handle, u32) -> u32;
    type End = unsafe extern "C" fn(Handle, *mut Handle) -> u32;
    type Create = unsafe extern "C" fn(*mut Handle, u32) -> u32;
    type One = unsafe extern "C" fn(Handle) -> u32;
    type Alloc = unsafe extern "C" fn(*mut u64, usize) -> u32;
    // SAFETY: the types are those of cuda.h; every handle is used as it was made, in the GPU's context.
    unsafe {
        let (push, create) = (
            driver_function::<One>("cuCtxPushCurrent_v2").unwrap(),
            driver_function::<Create>("cuStreamCreate").unwrap(),
        );
        let (begin, end) = (
            driver_function::<Begin>("cuStreamBeginCapture_v2").unwrap(),
            driver_function::<End>("cuStreamEndCapture").unwrap(),
        );
        let alloc = driver_function::<Alloc>("cuMemAlloc_v2").unwrap();
        let (mut stream, mut graph, mut address) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        assert_eq!(push(gpu.as_context()), 0);
        assert_eq!(create(&mut stream, 1), 0);
        let work = || {
            let mut memory = DeviceBuffer::alloc(&gpu, 1 << 20).unwrap();
            memory.fill(0, 1 << 20, 1).unwrap();
            drop(pinned(&gpu, 1 << 20));
            let mut memory = DeviceBuffer::growable(&gpu, 1, 8 << 20).unwrap();
            memory.grow(4 << 20).unwrap();
        };
        const GLOBAL: u32 = 0;
        assert_eq!(begin(stream, GLOBAL), 0);
        std::thread::scope(|scope| scope.spawn(work).join().unwrap());
        // And on the capturing thread itself.
        work();
        assert_eq!(end(stream, &mut graph), 0, "the capture was broken");
        assert!(!graph.is_null());
        // The check can fail: a plain allocation is refused, and breaks the capture.
        assert_eq!(begin(stream, GLOBAL), 0);
        assert_ne!(alloc(&mut address, 4096), 0);
        assert_ne!(end(stream, &mut graph), 0);
    }
}

#[test]
fn several_gpus_have_addresses_of_their_own() {
    fake!(test_name!(), &[], &[("FAKE_CUDA_DEVICES", "3")], {
        assert_eq!(Gpu::count().unwrap(), 3);
        let gpus: Vec<_> = (0..3).map(|ordinal| Gpu::open(ordinal).unwrap()).collect();
        let pinning = Pinning::Gpus(vec![gpus[1].clone(), gpus[0].clone()]);
        let mut memory = MappedBuffer::<u8>::alloc_with(8192, MappedOptions { pinning, ..Default::default() }).unwrap();
        let on = |gpu: usize| memory.as_device_ptr_on(&gpus[gpu]).unwrap();
        let (host, addresses) = (memory.as_host_ptr() as u64, [on(0), on(1), on(2)]);
        assert_eq!(addresses, [host, host + (1 << 46), host + (2 << 46)], "the third was not named, and has one");
        assert_eq!(memory.as_device_ptr(), addresses[1], "the first named");
        let part = memory.share().sub_region(100, 100).unwrap();
        assert_eq!(part.as_device_ptr_on(&gpus[0]).unwrap(), addresses[0] + 100);
        assert!(gpus[0].can_access(&gpus[1]).unwrap());
        // SAFETY: only measured.
        let wrapped = unsafe { GpuMappedBuffer::from_host_visible_owner(host as *mut u8, 8192, None, ()) }.unwrap();
        let wrapped = wrapped.on_gpu(&gpus[2]).unwrap().on_gpu(&gpus[0]).unwrap();
        assert_eq!(wrapped.as_device_ptr(), Some(addresses[2]));
        assert_eq!(wrapped.as_device_ptr_on(&gpus[0]).unwrap(), addresses[0]);
        let there = DeviceBuffer::alloc(&gpus[2], 4096).unwrap();
        // SAFETY: refused.
        let error = unsafe { DeviceBuffer::from_raw(&gpus[0], there.as_device_ptr(), 4096) }.unwrap_err();
        assert!(error.errno() == libc::EINVAL && error.to_string().contains("memory of GPU 2"), "{error}");
    });
}

#[test]
fn automatic_pinning_falls_back_and_says_so() {
    fake!(test_name!(), &[], &[], {
        let gpu = Gpu::open(0).unwrap();
        let fake = Fake::get();
        fake.fail(0, 0);
        let options = || MappedOptions { pinning: Pinning::Auto, ..MappedOptions::default() };
        MappedBuffer::<u8>::alloc_with(4096, options()).unwrap();
        let names: Vec<_> = (1..=fake.calls()).map(|k| fake.call(k)).collect();
        let at = 1 + names.iter().position(|name| name == "cuMemHostRegister_v2").unwrap() as u64;
        fake.fail(at, 2);
        let mut memory = MappedBuffer::<u8>::alloc_with(4096, options()).unwrap();
        let Pinned::No { reason } = memory.pinned() else { panic!("{:?}", memory.pinned()) };
        assert!(reason.contains("cuMemHostRegister_v2") && reason.contains("OUT_OF_MEMORY"), "{reason}");
        memory.as_mut_slice().unwrap()[4095] = 1;
        assert_eq!(errno(memory.as_device_ptr_on(&gpu)), libc::EOPNOTSUPP);
    });
}

#[test]
fn a_forked_child_leaves_the_driver_alone() {
    fake!(test_name!(), &[], &[], {
        let gpu = Gpu::open(0).unwrap();
        let (memory, host) = (DeviceBuffer::alloc(&gpu, 4096).unwrap(), pinned(&gpu, 4096));
        // SAFETY: the child calls nothing but what is looked at here, and exits.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                let refused = DeviceBuffer::alloc(&gpu, 4096).is_err_and(|error| error.errno() == libc::EOPNOTSUPP);
                Fake::get().fail(0, 0);
                drop((memory, host, gpu));
                libc::_exit(i32::from(!refused || Fake::get().calls() != 0));
            }
            let mut status = -1;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            assert_eq!(status, 0);
        }
        drop((memory, host, gpu));
    });
}

both! {
    fn a_queue_for_kernels_of_one_gpu_has_its_device_block_there(gpu: &Gpu) {
        use ringest::{IoQueue, IoQueueOptions};
        let queue = IoQueue::on_gpu(IoQueueOptions::default(), gpu).unwrap();
        assert_eq!(errno(queue.consumer(0)), libc::EOPNOTSUPP);
        let view = queue.view_on(gpu).unwrap();
        assert_eq!(view, queue.view().unwrap());
        let mut words = [7; 128];
        // SAFETY: the block is memory of this GPU, which the queue holds.
        let block = unsafe { DeviceBuffer::from_raw(gpu, view.device, words.len()) }.unwrap();
        block.copy_out(0, &mut words).unwrap();
        assert_eq!(words, [0; 128]);
        queue.reserve().unwrap().publish(&ringest::SlotData::default()).unwrap();
        assert!(queue.tail() == 1 && queue.finish());
        queue.consumers_stopped();
        IoQueue::destroy(queue).unwrap();
    }
}

#[cfg(feature = "testing")]
both! {
    fn kernels_are_loaded_from_text_and_launched_by_name(gpu: &Gpu) {
        use ringest::gpu::{GpuModule, GpuStream, KernelParameters};
        use std::ffi::CStr;
        let ptx = CStr::from_bytes_with_nul(ringest::testing::ADD_PTX.as_bytes()).unwrap();
        let module = GpuModule::from_ptx(gpu, ptx).unwrap();
        let stream = GpuStream::new(gpu).unwrap();
        let mut word = MappedBuffer::<u64>::alloc_on(gpu, 1).unwrap();
        word.as_mut_slice().unwrap()[0] = 5;
        let parameters = |value: u64| KernelParameters::new().with(word.as_device_ptr()).with(value);
        // SAFETY: these are its parameters; the word outlives it.
        unsafe { module.launch(c"ringest_add", &stream, 1, 1, parameters(37)).unwrap() };
        stream.synchronize().unwrap();
        assert!(stream.is_done().unwrap());
        // SAFETY: there is no such kernel.
        assert!(unsafe { module.launch(c"ringest_sub", &stream, 1, 1, parameters(1)) }.is_err());
        assert_eq!(word.as_slice().unwrap(), [42]);
        assert!(matches!(GpuModule::from_ptx(gpu, c"no PTX"), Err(PipelineError::Cuda { .. })));
        assert_eq!(errno(GpuModule::from_ptx(gpu, c"\x7fELF")), libc::EINVAL);
    }
}

#[cfg(feature = "testing")]
mod failures {
    use super::*;
    use ringest::testing::{end_fault_plan, exercise_streams, plan_fault};
    use ringest::{AccessFlags, MemoryLocation, PhysicalOptions, Result};
    use std::fmt::Write;
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};

    /// Calls that give something back: when one of them fails, what it was for is leaked, and counted.
    const GIVING_BACK: [&str; 11] = [
        "cuMemFree_v2",
        "cuMemFreeHost",
        "cuMemHostUnregister",
        "cuMemAddressFree",
        "cuMemRelease",
        "cuMemUnmap",
        "cuStreamDestroy_v2",
        "cuEventDestroy_v2",
        "cuModuleUnload",
        "cuDestroyExternalMemory",
        "cuDevicePrimaryCtxRelease_v2",
    ];

    fn memfd(len: i64) -> OwnedFd {
        // SAFETY: the descriptor is new.
        unsafe {
            let fd = libc::memfd_create(c"ringest-test".as_ptr(), libc::MFD_CLOEXEC);
            assert_eq!(libc::ftruncate(fd, len), 0);
            OwnedFd::from_raw_fd(fd)
        }
    }

    /// Everything that calls the driver.
    fn script(fake: bool) -> Result<()> {
        let gpu = Gpu::open(0)?;
        Gpu::driver_version()?;
        gpu.memory_info()?;
        gpu.synchronize()?;
        let options = |pinning| MappedOptions { pinning, ..MappedOptions::default() };
        let memory = MappedBuffer::<u8>::alloc_on(&gpu, 10_000)?;
        let allocated = MappedBuffer::<u8>::alloc_with(10_000, options(Pinning::HostAlloc(vec![gpu.clone()])))?;
        let automatic = MappedBuffer::<u8>::alloc_with(10_000, options(Pinning::Auto))?;
        if automatic.pinned() != &Pinned::Registered {
            let Pinned::No { reason } = automatic.pinned() else { panic!() };
            assert!(reason.contains("cu") || reason.contains("no memory"), "{reason}");
        }
        let base = memory.as_host_ptr().cast_mut();
        // SAFETY: only measured, while `memory` lives.
        unsafe { GpuMappedBuffer::from_host_visible_owner(base, 10_000, None, ()) }?.on_gpu(&gpu)?;
        let mut device = DeviceBuffer::alloc(&gpu, 10_000)?;
        device.copy_in(1, &[7; 100])?;
        device.fill(50, 10, 8)?;
        let mut back = [0; 100];
        device.copy_out(1, &mut back)?;
        assert!(back.iter().enumerate().all(|(at, &byte)| byte == if (49..59).contains(&at) { 8 } else { 7 }));
        // SAFETY: the window is not touched; the memory outlives both.
        unsafe {
            GpuMappedBuffer::from_bar1_peer_with_owner(4096 as *mut u8, 10_000, device.as_device_ptr(), ())?
                .on_gpu(&gpu)?;
            DeviceBuffer::from_raw(&gpu, device.as_device_ptr(), 10_000)?;
        }
        let mut growing = DeviceBuffer::growable(&gpu, 1, 16 << 20)?;
        let address = growing.as_device_ptr();
        growing.fill(0, 100, 1)?;
        growing.grow(6 << 20)?;
        growing.copy_out(0, &mut back)?;
        assert!(growing.as_device_ptr() == address && back == [1; 100]);
        exercise_streams(&gpu, fake.then(|| (memfd(4096), 4096)))?;
        drop((memory, allocated, automatic, device, growing));
        virtual_memory(&gpu)
    }

    fn virtual_memory(gpu: &Gpu) -> Result<()> {
        let manager = VirtualMemoryManager::new(gpu)?;
        let exportable = PhysicalOptions { exportable: gpu.attributes().export_fd, ..PhysicalOptions::default() };
        let granule = manager.granularity(exportable, false)?;
        manager.granularity(exportable, true)?;
        let mut range = manager.reserve(8 * granule, granule)?;
        let first = manager.alloc_physical(granule, exportable)?;
        let second = manager.alloc_physical(2 * granule, PhysicalOptions::default())?;
        manager.map(&mut range, 0, granule, &first, 0)?;
        manager.map(&mut range, granule, 2 * granule, &second, 0)?;
        let all = [(MemoryLocation::from(gpu), AccessFlags::ReadWrite)];
        manager.set_access(&mut range, 0, 3 * granule, &all)?;
        assert_eq!(manager.access(&range, granule, gpu.into())?, AccessFlags::ReadWrite);
        if exportable.exportable {
            let imported = manager.import_fd(manager.export_fd(&first)?.as_fd(), granule)?;
            manager.map(&mut range, 4 * granule, granule, &imported, 0)?;
            manager.set_access(&mut range, 4 * granule, granule, &all)?;
            manager.unmap(&mut range, 4 * granule, granule)?;
            manager.free_physical(imported).map_err(|(_, error)| error)?;
        }
        if gpu.attributes().dma_buf {
            manager.export_dma_buf(&range, 0, granule)?;
        }
        manager.unmap(&mut range, 0, granule)?;
        manager.free_physical(first).map_err(|(_, error)| error)?;
        let (range, error) = manager.release(range).unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY);
        drop(second);
        // Dropped with a mapping.
        drop(range);
        let range = manager.reserve(granule, granule)?;
        manager.release(range).map_err(|(_, error)| error)
    }

    fn open_files() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn every_driver_call_may_fail_once() {
        let name = "failures::every_driver_call_may_fail_once";
        let ran = common::gpu::with_fake(name, &[], &[], || {
            Gpu::count().unwrap();
            let fake = Fake::get();
            script(true).unwrap();
            fake.assert_even();
            fake.fail(0, 0);
            script(true).unwrap();
            let (calls, files) = (fake.calls(), open_files());
            let (mut problems, mut cases, mut tolerated) = (String::new(), 0, 0);
            for code in [1, 2, 201, 700, 801, 999, 12_345, u32::MAX] {
                for k in 1..=calls {
                    let (live, leaks) = (fake.live(), gpu_leaks());
                    fake.fail(k, code);
                    let result = std::panic::catch_unwind(|| script(true));
                    let name = fake.call(k);
                    fake.fail(0, 0);
                    cases += 1;
                    let mut problem =
                        |what: String| writeln!(problems, "call {k} ({name}), code {code}: {what}").unwrap();
                    match &result {
                        Err(_) => problem("panicked".to_owned()),
                        Ok(Ok(())) => tolerated += 1,
                        // An unknown value of an attribute is no failure, so another call may be the one that fails.
                        Ok(Err(PipelineError::Cuda { code: now, call, text, .. })) => {
                            if *now != code || *call != name {
                                problem(format!("became {call} failing with {now}"));
                            }
                            if code > 10_000 && !text.contains("no name") {
                                problem(format!("was called {text}"));
                            }
                        }
                        // What a driver is asked before the GPU is used decides what is supported.
                        Ok(Err(PipelineError::NotSupported { .. })) if name == "cuDeviceGetAttribute" && code == 1 => {}
                        Ok(Err(error))
                            if error.errno() == libc::EINVAL && name == "cuPointerGetAttribute" && code == 1 => {}
                        Ok(Err(error)) => problem(format!("ended with {error}")),
                    }
                    let (left, counted) = (fake.live() - live, gpu_leaks() - leaks);
                    if GIVING_BACK.contains(&name.as_str()) {
                        if (left != 0) != (counted != 0) {
                            problem(format!("{left} objects left, {counted} counted as leaked"));
                        }
                    } else if left != 0 || counted != 0 {
                        problem(format!("{left} objects left ({}), {counted} counted", fake.report()));
                    }
                    if fake.misuses().0 != 0 {
                        problem(format!("misuse: {:?}", fake.misuses()));
                        break;
                    }
                    if (fake.depth(), fake.capture_mode()) != (0, 0) {
                        problem("the thread is not as it was".to_owned());
                        break;
                    }
                    if open_files() > files + (fake.live() as usize) {
                        problem(format!("{} descriptors instead of {files}", open_files()));
                    }
                }
            }
            println!("{cases} failures of {calls} calls, {tolerated} tolerated");
            assert!(problems.is_empty(), "\n{problems}");
        });
        if let Err(reason) = ran {
            common::print_skip(name, &reason);
        }
    }

    /// On a real driver, by the fault points in front of its calls.
    #[test]
    fn every_driver_call_may_fail_once_on_a_gpu() {
        let (gpu, _alone) = gpu!(test_name!());
        script(false).unwrap();
        plan_fault(0, 0);
        script(false).unwrap();
        let calls = end_fault_plan().len() as u64;
        let (files, (free, _)) = (open_files(), gpu.memory_info().unwrap());
        let (mut tolerated, mut leaks) = (0, 0);
        for code in [2, 12_345] {
            for k in 1..=calls {
                let before = gpu_leaks();
                plan_fault(k, code);
                let result = script(false);
                let names = end_fault_plan();
                let name = names.get(k as usize - 1).copied().unwrap_or("(not reached)");
                match result {
                    Ok(()) => tolerated += 1,
                    Err(PipelineError::Cuda { code: now, .. }) if now == code as u32 => {}
                    Err(error) if !name.starts_with("cu") => assert_eq!(error.errno(), libc::ENOMEM, "{name}: {error}"),
                    Err(error) => panic!("call {k} ({name}), code {code}: {error}"),
                }
                if gpu_leaks() != before {
                    assert!(GIVING_BACK.contains(&name), "{name} leaked");
                    leaks += 1;
                }
                assert!(current_context().is_null());
            }
        }
        let (left, _) = gpu.memory_info().unwrap();
        println!(
            "{} failures, {tolerated} tolerated, {leaks} leaks, {} MiB less",
            2 * calls,
            free.saturating_sub(left) >> 20
        );
        assert!(open_files() <= files + leaks);
        // A release that is not made leaks its megabytes; nothing else does.
        assert!(free.saturating_sub(left) <= leaks as u64 * (8 << 20));
    }

    #[test]
    fn streams_events_and_kernels_work_on_a_gpu() {
        let (gpu, _alone) = gpu!(test_name!());
        for _ in 0..20 {
            exercise_streams(&gpu, None).unwrap();
        }
        // What is no memory of Vulkan's is refused, and closed.
        let files = open_files();
        let error = exercise_streams(&gpu, Some((memfd(1 << 20), 1 << 20))).unwrap_err();
        println!("{error}");
        assert_eq!(open_files(), files);
    }
}
