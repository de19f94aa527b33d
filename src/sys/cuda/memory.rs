//! Memory of the driver, and host memory that it has locked.

use super::super::mem::Mapping;
use super::constants::*;
use super::context::Context;
use super::table::{DeviceAddress, Driver, Outcome};
use crate::error::Result;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

/// `cuMemAlloc`, freed on drop.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    context: Arc<Context>,
    address: DeviceAddress,
}

impl DeviceMemory {
    pub(crate) fn alloc(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let mut address = 0;
        // SAFETY: one address is written; a context is current.
        context.enter(|driver| unsafe { driver.mem_alloc(&mut address, bytes) })?;
        Ok(Self { context: Arc::clone(context), address })
    }

    pub(crate) fn address(&self) -> DeviceAddress {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let address = self.address;
        // SAFETY: allocated by `alloc` in this context and freed once. Device memory is no memory of Rust's: work that
        // the GPU still does on it is waited for by the driver, or faults there.
        self.context.give_back("device memory", |driver| unsafe { driver.mem_free(address) });
    }
}

const HOST_FLAGS: u32 = HOST_PORTABLE | HOST_DEVICE_MAP;

/// A mapping of ours that the driver has locked for every context; unlocked, then unmapped, on drop.
#[derive(Debug)]
pub(crate) struct PinnedMapping {
    context: Arc<Context>,
    mapping: ManuallyDrop<Mapping>,
}

impl PinnedMapping {
    /// `cuMemHostRegister`.
    pub(crate) fn register(context: &Arc<Context>, mapping: Mapping) -> Result<Self> {
        let (base, len) = (mapping.base().as_ptr().cast(), mapping.len());
        // SAFETY: the range is a mapping that this value owns from here on, and unregisters before it is unmapped.
        context.enter(|driver| unsafe { driver.mem_host_register(base, len, HOST_FLAGS) })?;
        Ok(Self { context: Arc::clone(context), mapping: ManuallyDrop::new(mapping) })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.mapping.base()
    }

    pub(crate) fn len(&self) -> usize {
        self.mapping.len()
    }
}

impl Drop for PinnedMapping {
    fn drop(&mut self) {
        let base = self.mapping.base().as_ptr().cast();
        // SAFETY: registered once by `register`; the region around it is gone, so nothing refers to the memory.
        let unlocked = |driver: &'static Driver| unsafe { driver.mem_host_unregister(base) };
        if self.context.give_back("the page lock of mapped memory", unlocked) {
            // SAFETY: dropped here alone. Memory that a GPU may still reach is never unmapped: it is leaked instead.
            unsafe { ManuallyDrop::drop(&mut self.mapping) };
        }
    }
}

/// `cuMemHostAlloc` for every context, freed on drop.
#[derive(Debug)]
pub(crate) struct HostMemory {
    context: Arc<Context>,
    allocated: *mut c_void,
    base: NonNull<u8>,
}

// SAFETY: plain memory, owned by this value, valid from any thread.
unsafe impl Send for HostMemory {}
// SAFETY: the value itself is immutable.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// `bytes` zeroed bytes at a multiple of `alignment`, a power of two.
    pub(crate) fn alloc(context: &Arc<Context>, bytes: usize, alignment: usize) -> Result<Self> {
        let page = super::super::mem::page_size();
        // What the driver hands out starts a page, so a padding of the rest is enough.
        let no_memory = super::Failure::Code { call: "cuMemHostAlloc", code: super::code::OUT_OF_MEMORY };
        let padded = bytes.checked_add(alignment.saturating_sub(page)).ok_or(no_memory)?;
        let mut allocated = std::ptr::null_mut();
        // SAFETY: one pointer is written; a context is current.
        context.enter(|driver| unsafe { driver.mem_host_alloc(&mut allocated, padded, HOST_FLAGS) })?;
        let start = allocated as usize;
        let aligned = start.next_multiple_of(alignment.max(1));
        let base = NonNull::new(allocated.cast::<u8>().wrapping_add(aligned - start)).ok_or(no_memory)?;
        let memory = Self { context: Arc::clone(context), allocated, base };
        if aligned + bytes > start + padded {
            return Err(no_memory.into());
        }
        // SAFETY: the bytes are inside the allocation (checked above), and nobody else has its address yet.
        unsafe { base.as_ptr().write_bytes(0, bytes) };
        Ok(memory)
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let allocated = self.allocated;
        // SAFETY: allocated by `alloc` and freed once; the region around it is gone, so nothing refers to the memory.
        self.context.give_back("page-locked host memory", |driver| unsafe { driver.mem_free_host(allocated) });
    }
}

/// The context's address of locked host memory.
pub(crate) fn host_device_pointer(context: &Context, base: NonNull<u8>) -> Result<DeviceAddress> {
    let mut address = 0;
    // SAFETY: one address is written; the driver only looks the base up.
    context.enter(|driver| unsafe { driver.mem_host_get_device_pointer(&mut address, base.as_ptr().cast(), 0) })?;
    Ok(address)
}

/// What the driver knows of an address, seen from one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pointer {
    /// The device's address of it.
    pub(crate) device: DeviceAddress,
    /// Whether the memory is a device's.
    pub(crate) on_device: bool,
    /// The device it was allocated or locked on.
    pub(crate) ordinal: i32,
    /// Address just past the allocation or registration it belongs to, in the device's terms.
    pub(crate) end: DeviceAddress,
}

impl Pointer {
    /// Looks an address up. `None`: it is no memory of CUDA's.
    pub(crate) fn look_up(context: &Context, address: u64) -> Result<Option<Self>> {
        let found = context.enter(|driver| {
            let device = match query(driver, POINTER_DEVICE_POINTER, address, 0u64) {
                Err(failure) if failure.code() == Some(super::code::INVALID_VALUE) => return Ok(None),
                other => other?,
            };
            let start = query(driver, POINTER_RANGE_START, address, 0u64)?;
            let size = query(driver, POINTER_RANGE_SIZE, address, 0usize)?;
            let on_device = query(driver, POINTER_MEMORY_TYPE, address, 0u32)? == MEMORY_TYPE_DEVICE;
            let ordinal = query(driver, POINTER_DEVICE_ORDINAL, address, 0i32)?;
            // The range is told in the address's own terms, which for host memory may differ from the device's.
            let ahead = start.saturating_add(size as u64).saturating_sub(address);
            Ok(Some(Self { device, on_device, ordinal, end: device.saturating_add(ahead) }))
        })?;
        Ok(found)
    }
}

/// `cuPointerGetAttribute` for an attribute of type `T`.
fn query<T: Copy>(driver: &Driver, attribute: u32, address: u64, mut value: T) -> Outcome<T> {
    // SAFETY: the caller names the attribute's type (cuda.h), and any bytes are a `T`, for it is an integer.
    unsafe { driver.pointer_get_attribute((&raw mut value).cast(), attribute, address) }?;
    Ok(value)
}

/// Makes synchronous memory operations on this allocation really synchronous, as DMA by peers needs
/// (docs.nvidia.com/cuda/gpudirect-rdma).
pub(crate) fn set_sync_memops(context: &Context, address: DeviceAddress) -> Result<()> {
    let on = 1u32;
    // SAFETY: the attribute takes an unsigned int.
    context
        .enter(|driver| unsafe { driver.pointer_set_attribute((&raw const on).cast(), POINTER_SYNC_MEMOPS, address) })
}
