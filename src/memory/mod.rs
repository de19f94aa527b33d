//! What bytes land in, and the GPU's address of it.
//!
//! [`MappedBuffer`] owns page-aligned memory, which GPUs address too where it is pinned; [`GpuMappedBuffer`] is a range
//! of any memory that a ring may write to; [`DeviceBuffer`] is a GPU's own. [`VirtualMemoryManager`] keeps a GPU's
//! addresses and memory apart. Without a GPU a mapped buffer's device address is its host address, so the same code runs
//! anywhere.

mod device;
mod mapped;
mod region;
mod virtual_memory;

pub use crate::sys::mem::HugePages;
pub use device::DeviceBuffer;
pub use mapped::{AnyBits, MappedBuffer, MappedOptions, Pinned, Pinning};
pub use region::{GpuMappedBuffer, MemoryKind};
pub use virtual_memory::{
    AccessFlags, MemoryLocation, PLANNING_GRANULARITY, PhysicalAllocation, PhysicalOptions, VirtualAddressRange,
    VirtualMemoryManager,
};

pub(crate) use region::Region;
