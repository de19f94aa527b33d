//! Streams, events, kernels and the rest of the driver's wrappers in one run, on a real or a pretended GPU.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::memory::{DeviceBuffer, MappedBuffer};
use crate::sys::cuda::{Driver, Event, External, Module, Parameters, Stream};
use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// A kernel that adds its second parameter to the 64-bit word at its first.
pub const ADD_PTX: &str = "\
.version 7.0
.target sm_70
.address_size 64

.visible .entry ringest_add(.param .u64 address, .param .u64 value)
{
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [address];
    ld.param.u64 %rd2, [value];
    ld.global.u64 %rd3, [%rd1];
    add.u64 %rd3, %rd3, %rd2;
    st.global.u64 [%rd1], %rd3;
    ret;
}
\0";

const LEN: usize = 1 << 20;

unsafe extern "C" fn count(data: *mut c_void) {
    // SAFETY: `run` passes a counter that outlives the stream's work.
    unsafe { &*data.cast::<AtomicU64>() }.fetch_add(1, Ordering::Release);
}

/// Copies, values, waits, events, a host function, a kernel. `foreign`: memory to import from another API, and its size.
///
/// # Errors
/// The first of the driver's; none is left unreported, and nothing is left behind.
///
/// # Panics
/// When the bytes are wrong.
pub fn exercise_streams(gpu: &Gpu, foreign: Option<(OwnedFd, u64)>) -> Result<()> {
    let calls = AtomicU64::new(0);
    let mut host = MappedBuffer::<u64>::alloc_on(gpu, 2 * LEN / 8 + 8)?;
    for (word, i) in host.as_mut_slice()?.iter_mut().zip(0u64..LEN as u64 / 8) {
        *word = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    let device = [DeviceBuffer::alloc(gpu, LEN)?, DeviceBuffer::alloc(gpu, LEN)?];
    let (first, second) = (Stream::new(gpu.context(), 0)?, Stream::new(gpu.context(), 0)?);
    let event = Event::new(gpu.context(), true)?;
    let ran = run(gpu, &calls, &mut host, &device, [&first, &second], &event);
    // Before the memory goes, also after an error. Twice, should the first be the one that fails.
    for stream in [&first, &second] {
        let _ = stream.synchronize().or_else(|_| stream.synchronize());
    }
    ran?;
    assert!(first.is_done()? && second.is_done()? && event.is_done()?);
    assert_eq!(calls.load(Ordering::Acquire), 1);
    let words = host.as_slice()?;
    let (sent, received) = words.split_at(LEN / 8);
    assert!(sent == &received[..LEN / 8], "bytes came back wrong");
    assert_eq!(received[LEN / 8], 5 + 37, "the value, and what the kernel added to it");
    if let Some((fd, bytes)) = foreign {
        let external = External::import(gpu.context(), &fd, bytes)?;
        assert_ne!(external.address(), 0);
    }
    Ok(())
}

fn run(
    gpu: &Gpu,
    calls: &AtomicU64,
    host: &mut MappedBuffer<u64>,
    device: &[DeviceBuffer; 2],
    [first, second]: [&Stream; 2],
    event: &Event,
) -> Result<()> {
    let (source, word) = (host.as_host_ptr_mut().cast::<u8>(), host.as_device_ptr() + 2 * LEN as u64);
    let target = source.wrapping_add(LEN);
    let [a, b] = [device[0].as_device_ptr(), device[1].as_device_ptr()];
    // SAFETY: the buffers outlive the streams' work, for which the caller waits; nobody else touches them meanwhile.
    unsafe {
        first.copy_in(a, source, LEN)?;
        second.fill(b, 0xee, LEN)?;
        second.write_value(word, 5)?;
        event.record(first)?;
        second.wait_for(event)?;
        second.wait_value(word, 5)?;
        second.copy(b, a, LEN)?;
        second.copy_out(target, b, LEN)?;
        // SAFETY: the image is PTX with its NUL.
        let module = Module::load(gpu.context(), ADD_PTX.as_bytes())?;
        let kernel = module.kernel(c"ringest_add")?;
        kernel.launch(second, 1, 1, Parameters::default().with(word).with(37u64))?;
        second.call(count, std::ptr::from_ref(calls).cast_mut().cast())?;
        event.record(second)?;
        // Also after a failure that a wait reports, the module must outlive its kernel.
        event.synchronize().or_else(|_| event.synchronize())?;
    }
    if gpu.attributes().rdma_flush_options & 1 != 0 {
        gpu.context().enter(Driver::flush_peer_writes)?;
    }
    Ok(())
}
