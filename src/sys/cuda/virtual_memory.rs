//! Address ranges and physical memory of the driver, apart.

use super::constants::*;
use super::context::Context;
use super::table::{Access, DeviceAddress, Location, PhysicalHandle, Properties};
use crate::error::Result;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// What physical memory is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PhysicalRequest {
    pub(crate) location: Location,
    pub(crate) rdma: bool,
    pub(crate) exportable: bool,
}

impl PhysicalRequest {
    fn properties(self) -> Properties {
        const PINNED: u32 = 1;
        Properties {
            kind: PINNED,
            handle_types: if self.exportable { HANDLE_POSIX_FD } else { 0 },
            location: self.location,
            win32: std::ptr::null_mut(),
            compression: 0,
            rdma: self.rdma.into(),
            usage: 0,
            reserved: [0; 4],
        }
    }

    /// Sizes, offsets and addresses of such memory are multiples of it.
    pub(crate) fn granularity(self, context: &Context, recommended: bool) -> Result<usize> {
        let (mut bytes, properties) = (0, self.properties());
        let option = u32::from(recommended);
        // SAFETY: one size is written, one struct read.
        context.enter(|driver| unsafe { driver.mem_get_granularity(&mut bytes, &properties, option) })?;
        Ok(bytes)
    }
}

/// A reserved range of addresses, given back on drop.
#[derive(Debug)]
pub(crate) struct Reservation {
    context: Arc<Context>,
    address: DeviceAddress,
    bytes: usize,
    live: bool,
}

impl Reservation {
    pub(crate) fn new(context: &Arc<Context>, bytes: usize, alignment: usize, hint: DeviceAddress) -> Result<Self> {
        let mut address = 0;
        // SAFETY: one address is written.
        context.enter(|driver| unsafe { driver.mem_address_reserve(&mut address, bytes, alignment, hint, 0) })?;
        Ok(Self { context: Arc::clone(context), address, bytes, live: true })
    }

    pub(crate) fn address(&self) -> DeviceAddress {
        self.address
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Maps `bytes` of `physical` from `physical_offset` at `offset`. Nothing can access them yet.
    pub(crate) fn map(&self, offset: usize, bytes: usize, physical: &Physical, physical_offset: usize) -> Result<()> {
        let (address, handle) = (self.address + offset as u64, physical.handle);
        // SAFETY: the handle is held by `physical`; the driver checks the range against its reservations, and maps
        // device addresses, which no reference of Rust's points to.
        self.context.enter(|driver| unsafe { driver.mem_map(address, bytes, physical_offset, handle, 0) })
    }

    /// Undoes one `map`.
    pub(crate) fn unmap(&self, offset: usize, bytes: usize) -> Result<()> {
        let address = self.address + offset as u64;
        // SAFETY: the range was mapped, and is device memory, which no reference of Rust's points to.
        self.context.enter(|driver| unsafe { driver.mem_unmap(address, bytes) })
    }

    /// As `unmap`, when there is nobody to tell. `false`: leaked.
    pub(crate) fn give_back_mapping(&self, offset: usize, bytes: usize) -> bool {
        let address = self.address + offset as u64;
        // SAFETY: as in `unmap`.
        self.context.give_back("a mapping of GPU memory", |driver| unsafe { driver.mem_unmap(address, bytes) })
    }

    /// Grants or takes access, for each location in turn.
    pub(crate) fn set_access(&self, offset: usize, bytes: usize, access: &[(Location, u32)]) -> Result<()> {
        let address = self.address + offset as u64;
        let access: Vec<_> = access.iter().map(|&(location, flags)| Access { location, flags }).collect();
        // SAFETY: as many structs are read as there are.
        self.context.enter(|driver| unsafe { driver.mem_set_access(address, bytes, access.as_ptr(), access.len()) })
    }

    /// The access that a location has to the byte at `offset`.
    pub(crate) fn access(&self, offset: usize, location: Location) -> Result<u64> {
        let (mut flags, address) = (0, self.address + offset as u64);
        // SAFETY: one word is written, one struct read.
        self.context.enter(|driver| unsafe { driver.mem_get_access(&mut flags, &location, address) })?;
        Ok(flags)
    }

    /// Gives the addresses back; the reservation comes back when the driver refuses.
    pub(crate) fn free(mut self) -> std::result::Result<(), (Self, crate::error::PipelineError)> {
        let (address, bytes) = (self.address, self.bytes);
        // SAFETY: reserved once by `new`; nothing is mapped there: the range above has seen to it.
        match self.context.enter(|driver| unsafe { driver.mem_address_free(address, bytes) }) {
            Ok(()) => {
                self.live = false;
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.live {
            let (address, bytes) = (self.address, self.bytes);
            // SAFETY: as in `free`.
            let free = |driver: &'static super::Driver| unsafe { driver.mem_address_free(address, bytes) };
            self.context.give_back("reserved addresses", free);
        }
    }
}

/// Physical memory, released on drop. The driver keeps what is mapped until it is unmapped too.
#[derive(Debug)]
pub(crate) struct Physical {
    context: Arc<Context>,
    handle: PhysicalHandle,
    live: bool,
}

impl Physical {
    pub(crate) fn create(context: &Arc<Context>, bytes: usize, request: PhysicalRequest) -> Result<Self> {
        let (mut handle, properties) = (0, request.properties());
        // SAFETY: one handle is written, one struct read.
        context.enter(|driver| unsafe { driver.mem_create(&mut handle, bytes, &properties, 0) })?;
        Ok(Self { context: Arc::clone(context), handle, live: true })
    }

    /// A further handle to memory that another process (or this one) has exported.
    pub(crate) fn import(context: &Arc<Context>, fd: BorrowedFd<'_>) -> Result<Self> {
        let mut handle = 0;
        let shareable = std::ptr::without_provenance_mut(fd.as_raw_fd() as usize);
        // SAFETY: for this kind of handle the pointer argument is the descriptor's number; one handle is written.
        context.enter(|driver| unsafe { driver.mem_import(&mut handle, shareable, HANDLE_POSIX_FD) })?;
        Ok(Self { context: Arc::clone(context), handle, live: true })
    }

    /// What it was created as.
    pub(crate) fn request(&self) -> Result<PhysicalRequest> {
        let mut properties =
            PhysicalRequest { location: Location::default(), rdma: false, exportable: false }.properties();
        let handle = self.handle;
        // SAFETY: the struct is filled in; its fields are plain integers and a pointer that is not followed.
        self.context.enter(|driver| unsafe { driver.mem_get_properties(&mut properties, handle) })?;
        Ok(PhysicalRequest {
            location: properties.location,
            rdma: properties.rdma != 0,
            exportable: properties.handle_types & HANDLE_POSIX_FD != 0,
        })
    }

    /// A file descriptor that stands for the memory.
    pub(crate) fn export(&self) -> Result<OwnedFd> {
        let (mut fd, handle): (RawFd, _) = (-1, self.handle);
        self.context
            // SAFETY: for this kind of handle an int is written.
            .enter(|driver| unsafe { driver.mem_export((&raw mut fd).cast(), handle, HANDLE_POSIX_FD, 0) })?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Releases the memory; it comes back when the driver refuses.
    pub(crate) fn free(mut self) -> std::result::Result<(), (Self, crate::error::PipelineError)> {
        let handle = self.handle;
        // SAFETY: created or imported once.
        match self.context.enter(|driver| unsafe { driver.mem_release(handle) }) {
            Ok(()) => {
                self.live = false;
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        if self.live {
            let handle = self.handle;
            // SAFETY: created or imported once.
            self.context.give_back("physical GPU memory", |driver| unsafe { driver.mem_release(handle) });
        }
    }
}

/// A dma-buf over a range of device memory, whole host pages.
pub(crate) fn export_dma_buf(context: &Context, address: DeviceAddress, bytes: usize) -> Result<OwnedFd> {
    let mut fd: RawFd = -1;
    context.enter(|driver| {
        // SAFETY: for this kind of handle an int is written; the driver checks the range.
        unsafe { driver.mem_get_range_handle((&raw mut fd).cast(), address, bytes, RANGE_DMA_BUF_FD, 0) }
    })?;
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
