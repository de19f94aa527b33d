//! Streams, events, copies, kernels and imported memory.
#![cfg_attr(not(feature = "testing"), allow(dead_code, reason = "the layers above take more of it in turn"))]

use super::super::file;
use super::constants::*;
use super::context::Context;
use super::table::{DeviceAddress, ExternalBuffer, ExternalMemory, Failure, HostFunction, Object};
use crate::error::{PipelineError, Result};
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

/// A stream that does not wait for the legacy default stream, destroyed on drop.
#[derive(Debug)]
pub(crate) struct Stream {
    context: Arc<Context>,
    raw: Object,
}

// SAFETY: a CUstream may be used from any thread, by several at a time.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// `priority`: 0 is the least; lower numbers are more urgent.
    pub(crate) fn new(context: &Arc<Context>, priority: i32) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: one handle is written; a context is current.
        context.enter(|driver| unsafe { driver.stream_create(&mut raw, STREAM_NON_BLOCKING, priority) })?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Queues a copy from host memory.
    ///
    /// # Safety
    /// `bytes` at `source` stay readable and unchanged, and the target stays allocated, until the copy is over.
    pub(crate) unsafe fn copy_in(&self, target: DeviceAddress, source: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: by the caller.
        self.context.enter(|driver| unsafe { driver.memcpy_h2d_async(target, source.cast(), bytes, self.raw) })
    }

    /// Queues a copy to host memory.
    ///
    /// # Safety
    /// `bytes` at `target` stay writable and are not touched, and the source stays allocated, until the copy is over.
    pub(crate) unsafe fn copy_out(&self, target: *mut u8, source: DeviceAddress, bytes: usize) -> Result<()> {
        // SAFETY: by the caller.
        self.context.enter(|driver| unsafe { driver.memcpy_d2h_async(target.cast(), source, bytes, self.raw) })
    }

    /// Queues a copy between addresses of devices (locked host memory has one too).
    ///
    /// # Safety
    /// Both ranges stay allocated until the copy is over, and host memory behind them as for `copy_in`, `copy_out`.
    pub(crate) unsafe fn copy(&self, target: DeviceAddress, source: DeviceAddress, bytes: usize) -> Result<()> {
        // SAFETY: by the caller.
        self.context.enter(|driver| unsafe { driver.memcpy_d2d_async(target, source, bytes, self.raw) })
    }

    /// Queues the setting of bytes.
    ///
    /// # Safety
    /// The range stays allocated until it is over, and is no host memory that anyone else touches.
    pub(crate) unsafe fn fill(&self, target: DeviceAddress, value: u8, bytes: usize) -> Result<()> {
        // SAFETY: by the caller.
        self.context.enter(|driver| unsafe { driver.memset_d8_async(target, value, bytes, self.raw) })
    }

    /// Queues the store of a 64-bit word, after everything queued before is visible to the whole system (the default
    /// flag fences).
    ///
    /// # Safety
    /// The word is 8-byte aligned device-accessible memory that stays allocated until then.
    pub(crate) unsafe fn write_value(&self, target: DeviceAddress, value: u64) -> Result<()> {
        self.context.enter(|driver| {
            // SAFETY: by the caller.
            unsafe { driver.stream_write_value_64(self.raw, target, value, WRITE_VALUE_DEFAULT) }
        })
    }

    /// Queues a wait until the 64-bit word is `value` or more (cyclically).
    ///
    /// # Safety
    /// As for `write_value`.
    pub(crate) unsafe fn wait_value(&self, source: DeviceAddress, value: u64) -> Result<()> {
        // SAFETY: by the caller.
        self.context.enter(|driver| unsafe { driver.stream_wait_value_64(self.raw, source, value, WAIT_VALUE_GEQ) })
    }

    /// Queues a call on a thread of the driver's.
    ///
    /// # Safety
    /// The function may be called with `data` from another thread until the stream is through; it calls no CUDA function,
    /// and does not unwind.
    pub(crate) unsafe fn call(&self, function: HostFunction, data: *mut c_void) -> Result<()> {
        // SAFETY: by the caller.
        self.context.enter(|driver| unsafe { driver.launch_host_function(self.raw, function, data) })
    }

    /// Makes what is queued from now on wait for an event.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<()> {
        // SAFETY: both handles are held by their values.
        self.context.enter(|driver| unsafe { driver.stream_wait_event(self.raw, event.raw, 0) })
    }

    /// Waits until all that is queued is done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the handle is held by `self`.
        self.context.enter(|driver| unsafe { driver.stream_synchronize(self.raw) })
    }

    /// Whether all that is queued is done.
    pub(crate) fn is_done(&self) -> Result<bool> {
        // SAFETY: the handle is held by `self`.
        self.context.enter(|driver| ready(unsafe { driver.stream_query(self.raw) }))
    }
}

/// NOT_READY is an answer, not an error.
fn ready(result: super::Outcome<()>) -> super::Outcome<bool> {
    match result {
        Err(failure) if failure.code() == Some(super::code::NOT_READY) => Ok(false),
        other => other.map(|()| true),
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let raw = self.raw;
        // SAFETY: created by `new` and destroyed once; the driver finishes what is queued.
        self.context.give_back("a stream", |driver| unsafe { driver.stream_destroy(raw) });
    }
}

/// A place in a stream that can be waited for, without timing; destroyed on drop.
#[derive(Debug)]
pub(crate) struct Event {
    context: Arc<Context>,
    raw: Object,
}

// SAFETY: a CUevent may be used from any thread, by several at a time.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// `blocking`: a thread that waits for it sleeps instead of spinning.
    pub(crate) fn new(context: &Arc<Context>, blocking: bool) -> Result<Self> {
        let flags = EVENT_DISABLE_TIMING | if blocking { EVENT_BLOCKING_SYNC } else { 0 };
        let mut raw = std::ptr::null_mut();
        // SAFETY: one handle is written; a context is current.
        context.enter(|driver| unsafe { driver.event_create(&mut raw, flags) })?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Marks what is queued in the stream so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both handles are held by their values.
        self.context.enter(|driver| unsafe { driver.event_record(self.raw, stream.raw) })
    }

    /// Whether what it marked is done.
    pub(crate) fn is_done(&self) -> Result<bool> {
        // SAFETY: the handle is held by `self`.
        self.context.enter(|driver| ready(unsafe { driver.event_query(self.raw) }))
    }

    /// Waits until what it marked is done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the handle is held by `self`.
        self.context.enter(|driver| unsafe { driver.event_synchronize(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let raw = self.raw;
        // SAFETY: created by `new` and destroyed once.
        self.context.give_back("an event", |driver| unsafe { driver.event_destroy(raw) });
    }
}

/// A loaded module, unloaded on drop.
#[derive(Debug)]
pub(crate) struct Module {
    context: Arc<Context>,
    raw: Object,
}

// SAFETY: a CUmodule may be used from any thread, by several at a time.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel of a module.
#[derive(Debug)]
pub(crate) struct Kernel<'a> {
    module: &'a Module,
    raw: Object,
}

/// Values of a kernel's parameters, in order.
#[derive(Debug, Default)]
pub(crate) struct Parameters {
    values: Vec<Value>,
}

/// Aligned like the strictest type a kernel takes by value.
#[derive(Debug)]
#[repr(C, align(16))]
struct Value([u8; 128]);

impl Parameters {
    /// Adds a parameter: a plain number, an address, or a struct of at most 128 bytes.
    pub(crate) fn with<T: Copy + 'static>(mut self, value: T) -> Self {
        const { assert!(size_of::<T>() <= 128 && align_of::<T>() <= 16) };
        let mut bytes = Value([0; 128]);
        // SAFETY: the value fits (asserted above); its bytes are only copied onward.
        unsafe { bytes.0.as_mut_ptr().cast::<T>().write(value) };
        self.values.push(bytes);
        self
    }
}

impl Module {
    /// Loads PTX (NUL-terminated) or a cubin.
    ///
    /// # Safety
    /// `image` is a whole image: PTX text with its terminating NUL, or a cubin or fat binary.
    pub(crate) unsafe fn load(context: &Arc<Context>, image: &[u8]) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let none = std::ptr::null_mut::<c_void>();
        context.enter(|driver| {
            // SAFETY: one handle is written; the image is whole by the caller; there are no options.
            unsafe { driver.module_load_data(&mut raw, image.as_ptr().cast(), 0, none.cast(), none.cast()) }
        })?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// A kernel by name, loaded now: a persistent kernel would make a lazy load wait for ever.
    pub(crate) fn kernel(&self, name: &CStr) -> Result<Kernel<'_>> {
        let mut raw = std::ptr::null_mut();
        self.context.enter(|driver| {
            // SAFETY: one handle is written; the module is held by `self`.
            unsafe { driver.module_get_function(&mut raw, self.raw, name.as_ptr()) }?;
            // SAFETY: the function is of this module.
            match unsafe { driver.func_load(raw) } {
                // Before CUDA 12.4; the module's loading mode then decides.
                Err(Failure::Missing(_)) => Ok(()),
                other => other,
            }
        })?;
        Ok(Kernel { module: self, raw })
    }
}

impl Kernel<'_> {
    /// Queues the kernel: `grid` blocks of `block` threads.
    ///
    /// # Safety
    /// The parameters are those that the kernel declares, and everything they point to stays valid until it ends.
    pub(crate) unsafe fn launch(
        &self,
        stream: &Stream,
        grid: u32,
        block: u32,
        mut parameters: Parameters,
    ) -> Result<()> {
        let mut pointers: Vec<*mut c_void> =
            parameters.values.iter_mut().map(|value| value.0.as_mut_ptr().cast()).collect();
        let extra = std::ptr::null_mut();
        self.module.context.enter(|driver| {
            // SAFETY: by the caller; the driver copies the parameters before it returns.
            unsafe {
                let parameters = pointers.as_mut_ptr();
                driver.launch_kernel(self.raw, grid, 1, 1, block, 1, 1, 0, stream.raw, parameters, extra)
            }
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let raw = self.raw;
        // SAFETY: loaded by `load` and unloaded once; kernels borrow the module.
        self.context.give_back("a module", |driver| unsafe { driver.module_unload(raw) });
    }
}

/// Memory of another API (Vulkan), imported and mapped; given back on drop.
#[derive(Debug)]
pub(crate) struct External {
    context: Arc<Context>,
    raw: Object,
    address: DeviceAddress,
    _not_sync: PhantomData<*mut ()>,
}

// SAFETY: its handle may be used from any thread.
unsafe impl Send for External {}

impl External {
    /// Imports `bytes` of memory exported as an opaque descriptor.
    pub(crate) fn import(context: &Arc<Context>, fd: &OwnedFd, bytes: u64) -> Result<Self> {
        // The driver takes a descriptor over when it succeeds, and (580, M) also closes one that it refuses. So it gets
        // one of its own, which is closed here only while it still is the same file.
        let given = file::duplicate(fd.as_raw_fd()).map_err(|errno| PipelineError::Syscall {
            call: "fcntl",
            what: "duplicating a descriptor of memory to import".to_owned(),
            errno,
            fix: "raise RLIMIT_NOFILE, or pass a descriptor that is open".into(),
        })?;
        let given = given.into_raw_fd();
        let description = ExternalMemory { kind: EXTERNAL_OPAQUE_FD, fd: given, size: bytes, ..Default::default() };
        let mut raw = std::ptr::null_mut();
        // SAFETY: one handle is written, one struct read.
        let imported = context.enter(|driver| unsafe { driver.import_external_memory(&mut raw, &description) });
        if let Err(error) = imported {
            if file::is_same_file(given, fd.as_raw_fd()) {
                // SAFETY: it is the duplicate made above, which the driver has not closed.
                drop(unsafe { OwnedFd::from_raw_fd(given) });
            }
            return Err(error);
        }
        let mut external = Self { context: Arc::clone(context), raw, address: 0, _not_sync: PhantomData };
        let buffer = ExternalBuffer { size: bytes, ..Default::default() };
        let mut address = 0;
        // SAFETY: one address is written, one struct read; the handle is held by `external`.
        context.enter(|driver| unsafe { driver.external_memory_get_buffer(&mut address, external.raw, &buffer) })?;
        external.address = address;
        Ok(external)
    }

    pub(crate) fn address(&self) -> DeviceAddress {
        self.address
    }
}

impl Drop for External {
    fn drop(&mut self) {
        let (raw, address) = (self.raw, self.address);
        self.context.give_back("imported memory", |driver| {
            // SAFETY: the mapped buffer (freed by cuMemFree) and the import are this value's, and given back once.
            unsafe {
                let freed = if address == 0 { Ok(()) } else { driver.mem_free(address) };
                driver.destroy_external_memory(raw).and(freed)
            }
        });
    }
}
