//! Kernels from PTX, launched on streams of their own: enough to put a persistent consumer on a GPU, and no more.
//!
//! Programs that use the CUDA runtime launch by its means; this is for those that do not link it.

use super::Gpu;
use crate::error::{PipelineError, Result};
use crate::sys::cuda::{Module, Parameters, Stream};
use std::ffi::CStr;

/// A queue of work for a GPU. It does not wait for the legacy default stream, nor that for it, so that a kernel that runs
/// for long stops nobody else.
///
/// Any thread may use it, several at a time.
#[derive(Debug)]
pub struct GpuStream {
    inner: Stream,
}

impl GpuStream {
    /// A new stream.
    ///
    /// # Errors
    /// The driver's ([`PipelineError::Cuda`]).
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self { inner: Stream::new(gpu.context(), 0)? })
    }

    /// Whether everything queued has ended. Does not wait.
    ///
    /// # Errors
    /// The driver's, also those of kernels that failed: these stay, and nothing more runs in the context.
    pub fn is_done(&self) -> Result<bool> {
        self.inner.is_done()
    }

    /// Waits until everything queued has ended. The calling thread spins.
    ///
    /// # Errors
    /// As [`is_done`](Self::is_done).
    pub fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
}

/// The values of a kernel's parameters, in the order that it declares them.
#[derive(Debug, Default)]
pub struct KernelParameters {
    inner: Parameters,
}

impl KernelParameters {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one: a plain number, a device address (`u64`), or a `#[repr(C)]` struct of at most 128 bytes, such as an
    /// [`IoQueueView`](crate::wire::IoQueueView).
    #[must_use]
    pub fn with<T: Copy + 'static>(self, value: T) -> Self {
        Self { inner: self.inner.with(value) }
    }
}

/// Kernels that were loaded from PTX, unloaded on drop.
///
/// Any thread may use it, several at a time.
#[derive(Debug)]
pub struct GpuModule {
    inner: Module,
}

impl GpuModule {
    /// Loads PTX, which the driver compiles for the GPU. The driver may wait for running kernels: load before a persistent
    /// kernel starts.
    ///
    /// # Errors
    /// `EINVAL` for what is not text; the driver's ([`PipelineError::Cuda`]), when it does not understand it.
    pub fn from_ptx(gpu: &Gpu, ptx: &CStr) -> Result<Self> {
        // Binary images carry their own length, beyond which the driver would look.
        if !ptx.to_bytes().iter().all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~')) {
            return Err(PipelineError::invalid(
                "PTX that is not text",
                "pass PTX, which is ASCII, and no binary image",
            ));
        }
        // SAFETY: text with its NUL.
        Ok(Self { inner: unsafe { Module::load(gpu.context(), ptx.to_bytes_with_nul()) }? })
    }

    /// Queues a kernel: `grid` blocks of `block` threads. It is loaded to the GPU before this returns.
    ///
    /// # Safety
    /// There is a kernel of this name only with these parameters: their number, order, sizes and types. All memory that it
    /// uses stays allocated, and the module loaded, until it has ended ([`GpuStream::is_done`]), and meanwhile nobody
    /// touches that memory but as the kernel expects. Stream and module are of the same GPU and context.
    ///
    /// # Errors
    /// The driver's ([`PipelineError::Cuda`]): there is no such kernel, or it cannot run so.
    pub unsafe fn launch(
        &self,
        name: &CStr,
        stream: &GpuStream,
        grid: u32,
        block: u32,
        parameters: KernelParameters,
    ) -> Result<()> {
        let kernel = self.inner.kernel(name)?;
        // SAFETY: by the caller.
        unsafe { kernel.launch(&stream.inner, grid, block, parameters.inner) }
    }
}
