//! Slots that a running kernel pops from, and the driver that fills them.
//!
//! `words` reaches the words of [`wire`](crate::wire), `producer` and `consumer` are the two sides of the protocol,
//! [`IoQueue`] is the memory they work on, and [`NvmeGpuIngestDriver`] fills it from files.

mod consumer;
mod driver;
mod io_queue;
mod producer;
mod telemetry;
mod words;

#[cfg(test)]
mod model;

pub use driver::{
    DriverOptions, DriverReport, IngestCompletion, IngestRequest, MovableDriver, NativeReadPath, NvmeGpuIngestDriver,
};
pub use io_queue::{
    IoQueue, IoQueueConsumer, IoQueueLayout, IoQueueMemory, IoQueueOptions, IoQueueSlot, IoSlot, SlotData,
};
pub use telemetry::{LatencySummary, NvmeGpuIngestTelemetry, ReadCount};

#[cfg(feature = "testing")]
pub(crate) use driver::{Core, CoreOptions, Reads, SlotRead};
