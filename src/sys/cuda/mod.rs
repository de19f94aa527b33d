//! Every CUDA driver call of the crate, with the driver found at run time.
//!
//! `table` resolves the functions, `context` enters and leaves contexts; the other modules own one kind of driver object
//! each and give it back on drop, in the right context, on any thread. Nothing here runs, and libcuda is not looked for,
//! before someone asks for a GPU.

mod context;
mod memory;
mod stream;
mod table;
mod virtual_memory;

pub(crate) use context::{Context, current_device, device, device_count};
pub(crate) use memory::{DeviceMemory, HostMemory, PinnedMapping, Pointer, host_device_pointer, set_sync_memops};
#[cfg_attr(not(feature = "testing"), allow(unused_imports, reason = "the layers above take more of it in turn"))]
pub(crate) use stream::{Event, External, Module, Parameters, Stream};
pub(crate) use table::{Driver, Failure, Location, Outcome, code, errno};
pub(crate) use virtual_memory::{Physical, PhysicalRequest, Reservation, export_dma_buf};

use std::sync::atomic::{AtomicU64, Ordering};

/// Values of cuda.h.
pub(crate) mod constants {
    pub(crate) const CAPTURE_MODE_RELAXED: u32 = 2;
    pub(crate) const HOST_PORTABLE: u32 = 1;
    pub(crate) const HOST_DEVICE_MAP: u32 = 2;
    pub(crate) const LOCATION_DEVICE: u32 = 1;
    pub(crate) const LOCATION_HOST: u32 = 2;
    pub(crate) const LOCATION_HOST_NUMA: u32 = 3;
    pub(crate) const HANDLE_POSIX_FD: u32 = 1;
    pub(crate) const RANGE_DMA_BUF_FD: u32 = 1;
    pub(crate) const STREAM_NON_BLOCKING: u32 = 1;
    pub(crate) const EVENT_BLOCKING_SYNC: u32 = 1;
    pub(crate) const EVENT_DISABLE_TIMING: u32 = 2;
    pub(crate) const WAIT_VALUE_GEQ: u32 = 0;
    pub(crate) const WRITE_VALUE_DEFAULT: u32 = 0;
    pub(crate) const EXTERNAL_OPAQUE_FD: u32 = 1;
    pub(crate) const FLUSH_TO_OWNER: u32 = 100;
    pub(crate) const FLUSH_CURRENT_CONTEXT: u32 = 0;
    pub(crate) const MEMORY_TYPE_DEVICE: u32 = 2;

    pub(crate) const POINTER_MEMORY_TYPE: u32 = 2;
    pub(crate) const POINTER_DEVICE_POINTER: u32 = 3;
    pub(crate) const POINTER_SYNC_MEMOPS: u32 = 6;
    pub(crate) const POINTER_DEVICE_ORDINAL: u32 = 9;
    pub(crate) const POINTER_RANGE_START: u32 = 11;
    pub(crate) const POINTER_RANGE_SIZE: u32 = 12;

    pub(crate) const ATTRIBUTE_MULTIPROCESSORS: u32 = 16;
    pub(crate) const ATTRIBUTE_INTEGRATED: u32 = 18;
    pub(crate) const ATTRIBUTE_PCI_BUS: u32 = 33;
    pub(crate) const ATTRIBUTE_PCI_DEVICE: u32 = 34;
    pub(crate) const ATTRIBUTE_COPY_ENGINES: u32 = 40;
    pub(crate) const ATTRIBUTE_PCI_DOMAIN: u32 = 50;
    pub(crate) const ATTRIBUTE_CAPABILITY_MAJOR: u32 = 75;
    pub(crate) const ATTRIBUTE_CAPABILITY_MINOR: u32 = 76;
    pub(crate) const ATTRIBUTE_HOST_REGISTER: u32 = 99;
    pub(crate) const ATTRIBUTE_VIRTUAL_MEMORY: u32 = 102;
    pub(crate) const ATTRIBUTE_POSIX_FD: u32 = 103;
    pub(crate) const ATTRIBUTE_RDMA_VIRTUAL_MEMORY: u32 = 110;
    pub(crate) const ATTRIBUTE_RDMA: u32 = 116;
    pub(crate) const ATTRIBUTE_RDMA_FLUSH_OPTIONS: u32 = 117;
    pub(crate) const ATTRIBUTE_RDMA_WRITES_ORDERING: u32 = 118;
    pub(crate) const ATTRIBUTE_STREAM_MEM_OPS_64: u32 = 122;
    pub(crate) const ATTRIBUTE_DMA_BUF: u32 = 124;
    pub(crate) const ATTRIBUTE_HOST_NUMA_ID: u32 = 134;
    pub(crate) const ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY: u32 = 141;
}

static LEAKED: AtomicU64 = AtomicU64::new(0);

/// Objects of the driver that could not be given back.
pub(crate) fn leaked() -> u64 {
    LEAKED.load(Ordering::Relaxed)
}

/// Judges the call that gave something back. `false`: it is leaked, counted and logged.
fn giving_back(what: &'static str, result: Outcome<()>) -> bool {
    match result {
        Ok(()) => true,
        // The driver has shut down, and everything of it with it.
        Err(failure) if failure.code() == Some(code::DEINITIALIZED) => true,
        Err(failure) => {
            LEAKED.fetch_add(1, Ordering::Relaxed);
            let error = crate::error::PipelineError::from(failure);
            tracing::warn!(target: "ringest::cuda", %error, "{what} could not be given back and is leaked");
            false
        }
    }
}

/// Relaxes the thread's stream capture mode and returns the one before.
fn relaxed(driver: &'static Driver) -> Outcome<u32> {
    let mut mode = constants::CAPTURE_MODE_RELAXED;
    // SAFETY: the mode is a valid one, and the place takes one.
    unsafe { driver.exchange_capture_mode(&mut mode) }?;
    Ok(mode)
}

impl Driver {
    /// A property of a device.
    pub(crate) fn attribute(&self, attribute: u32, device: i32) -> Outcome<i32> {
        let mut value = 0;
        // SAFETY: one int is written.
        unsafe { self.device_get_attribute(&mut value, attribute, device) }?;
        Ok(value)
    }

    /// A property of a device; 0 where this driver does not know it.
    pub(crate) fn newer_attribute(&self, attribute: u32, device: i32) -> Outcome<i32> {
        match self.attribute(attribute, device) {
            Err(failure) if failure.code() == Some(code::INVALID_VALUE) => Ok(0),
            other => other,
        }
    }

    /// A device's name.
    pub(crate) fn device_name(&self, device: i32) -> Outcome<String> {
        let mut name = [0u8; 256];
        // SAFETY: the driver writes a NUL-terminated string of at most 256 bytes.
        unsafe { self.device_get_name(name.as_mut_ptr().cast(), 256, device) }?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        Ok(String::from_utf8_lossy(&name[..end]).into_owned())
    }

    /// A device's memory in bytes.
    pub(crate) fn device_memory(&self, device: i32) -> Outcome<u64> {
        let mut bytes = 0;
        // SAFETY: one size is written.
        unsafe { self.device_total_mem(&mut bytes, device) }?;
        Ok(bytes as u64)
    }

    /// Whether one device can reach the memory of another.
    pub(crate) fn can_access_peer(&self, device: i32, peer: i32) -> Outcome<bool> {
        let mut can = 0;
        // SAFETY: one int is written.
        unsafe { self.device_can_access_peer(&mut can, device, peer) }?;
        Ok(can != 0)
    }

    /// Free and total memory, in bytes, of the current context's device.
    pub(crate) fn memory_info(&self) -> Outcome<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: two sizes are written.
        unsafe { self.mem_get_info(&mut free, &mut total) }?;
        Ok((free as u64, total as u64))
    }

    /// Waits for all work of the current context.
    pub(crate) fn synchronize(&self) -> Outcome<()> {
        // SAFETY: no preconditions.
        unsafe { self.ctx_synchronize() }
    }

    /// Makes writes that peers made to the current context's memory visible to it.
    #[cfg_attr(not(feature = "testing"), allow(dead_code, reason = "for peer memory"))]
    pub(crate) fn flush_peer_writes(&self) -> Outcome<()> {
        // SAFETY: both values are those of cuda.h.
        unsafe { self.flush_gpu_direct_writes(constants::FLUSH_CURRENT_CONTEXT, constants::FLUSH_TO_OWNER) }
    }
}
