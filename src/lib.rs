//! Bytes from NVMe drives and files into GPU memory, announced to a running kernel.
//!
//! Each layer is usable alone and is written only with those below it:
//!
//! | layer | what it is | module |
//! |---|---|---|
//! | memory | what bytes land in, and the GPU's address of it | [`memory`] |
//! | stream | one io_uring, one thread, driven by the caller: submit, poll, a tail word | [`uring`] |
//! | driver | slots and the device-visible io_queue, filled from files, still driven by the caller | [`ingest`] |
//!
//! [`gpu`] finds GPUs at run time, [`wire`] holds the words shared with consumers, [`error`] what can go wrong; every raw
//! system call and every call of the CUDA driver is in the private module `sys`.
//!
//! ```
//! use ringest::{AsyncUringStream, DirectMode, InputFile, IoUringState, MappedBuffer, RingOptions};
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! # fn main() -> ringest::Result<()> {
//! # std::fs::write("/tmp/ringest-doc", [7u8; 8192]).unwrap();
//! let file = InputFile::open("/tmp/ringest-doc", DirectMode::Auto)?;
//! let mut memory = MappedBuffer::<u8>::alloc(8192)?;
//! let tail = AtomicU64::new(0); // what a consumer, on the CPU or the GPU, follows
//!
//! let mut stream = AsyncUringStream::new(IoUringState::new(RingOptions::default())?, memory.share(), &tail)?;
//! stream.submit_read_to_gpu(&file, 0, 0, 4096)?;
//! stream.submit_read_to_gpu(&file, 4096, 1, 4096)?;
//! stream.wait_for_completion(2, None)?;
//! assert_eq!(stream.poll()?, 2);
//! assert_eq!(tail.load(Ordering::Acquire), 2);
//! drop(stream);
//! assert!(memory.as_slice()?.iter().all(|&byte| byte == 7));
//! # Ok(())
//! # }
//! ```

pub mod error;
#[doc(hidden)]
pub mod ffi;
pub mod gpu;
pub mod ingest;
pub mod memory;
mod sys;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod testing;
pub mod uring;
pub mod wire;

pub use error::{PipelineError, Result};
pub use gpu::{Gpu, GpuAttributes, gpu_leaks};
pub use ingest::{
    DriverOptions, DriverReport, IngestCompletion, IngestRequest, IoQueue, IoQueueConsumer, IoQueueLayout,
    IoQueueMemory, IoQueueOptions, IoQueueSlot, IoSlot, LatencySummary, MovableDriver, NativeReadPath,
    NvmeGpuIngestDriver, NvmeGpuIngestTelemetry, ReadCount, SlotData,
};
pub use memory::{
    AccessFlags, AnyBits, DeviceBuffer, GpuMappedBuffer, HugePages, MappedBuffer, MappedOptions, MemoryKind,
    MemoryLocation, PhysicalAllocation, PhysicalOptions, Pinned, Pinning, VirtualAddressRange, VirtualMemoryManager,
};
pub use uring::{
    AsyncUringStream, CloseReport, Completion, DirectAlignment, DirectMode, FileRef, InputFile, IoUringState,
    LeakStats, MovableStream, ReadPath, RingFeatures, RingOptions, RingRegistrations, SharedBuffers, SqPoll,
    StreamOptions, StreamStats, TailLine, TailWord, leak_stats,
};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("ringest needs 64-bit pointers: handles of the C ABI are 64 bits wide");
#[cfg(not(target_os = "linux"))]
compile_error!("ringest drives io_uring and needs Linux");

/// Compiles and runs the README's code.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
