//! What bytes land in, and the GPU's address of it.
//!
//! [`MappedBuffer`] owns page-aligned memory; [`GpuMappedBuffer`] is a range of any memory that a ring may write to.
//! Without a GPU a buffer's device address is its host address, so the same code runs anywhere.

mod mapped;
mod region;

pub use crate::sys::mem::HugePages;
pub use mapped::{AnyBits, MappedBuffer, MappedOptions};
pub use region::{GpuMappedBuffer, MemoryKind};

pub(crate) use region::Region;
