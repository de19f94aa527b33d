//! Memory of a GPU.

use super::gpu::open;
use super::handle::{Family, Table, create, exclusive, last, shared};
use super::options::{self, Options, known_flags};
use super::{Failure, check_count, elements, status, store, value};
use crate::memory::DeviceBuffer;
use std::ffi::c_void;
use std::os::fd::IntoRawFd;

/// Memory of a GPU that the CPU cannot address: owned, or the caller's.
///
/// Freeing it is the caller's to order after kernels and copies that use it. Calls that change or fill it come from one
/// thread at a time (-EBUSY otherwise).
pub struct ringest_device_buffer {
    _opaque: (),
}

static TABLE: Table<DeviceBuffer> = Table::new(11, "ringest_device_buffer");

impl Family for ringest_device_buffer {
    type Object = DeviceBuffer;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// How a GPU's memory is allocated. All zero (with size set) means defaults.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ringest_device_buffer_options {
    /// sizeof(struct ringest_device_buffer_options).
    pub size: u32,
    /// Zero.
    pub flags: u32,
    /// Bytes that the memory can grow to without changing its address (ringest_device_buffer_grow), at least its
    /// length; 0: it does not grow.
    pub capacity: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

// SAFETY: repr(C), integers only, no padding (4 + 4 + 8 + 16), size first.
unsafe impl Options for ringest_device_buffer_options {}

/// Allocates len bytes of a GPU's memory, with undefined contents, and stores a handle in *out. options may be NULL.
///
/// With a capacity, addresses for all of it are reserved, and memory is put behind the first len bytes (0: none yet); both
/// are rounded up to the GPU's granularity. The driver may wait for running kernels: allocate before a persistent kernel
/// starts.
///
/// Any thread. Free with ringest_device_buffer_free.
///
/// Errors: -EINVAL for len 0 without a capacity, a capacity less than len, unknown flags, or out NULL; -E2BIG for an
/// option struct with unknown fields; -EOPNOTSUPP without a GPU, or for a capacity when it has no virtual memory
/// management; -ENODEV for an ordinal beyond ringest_gpu_count; -ENOMEM; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_device_buffer_create(
    gpu: u32,
    len: usize,
    options: *const ringest_device_buffer_options,
    out: *mut *mut ringest_device_buffer,
) -> i32 {
    // SAFETY: both pointers are null or valid by the C contract.
    status(|| unsafe {
        let options = options::read(options)?;
        known_flags(options.flags, 0)?;
        options::zero(&options.reserved, "ringest_device_buffer_options")?;
        let capacity = usize::try_from(options.capacity).unwrap_or(usize::MAX);
        if len == 0 && capacity == 0 {
            return Err(Failure::new(libc::EINVAL, "a device buffer of 0 bytes: ask for at least one, or a capacity"));
        }
        if capacity != 0 && capacity < len {
            return Err(Failure::new(
                libc::EINVAL,
                format!("a device buffer of {len} bytes that may grow to {capacity}: use at least the length"),
            ));
        }
        store(out, "out", || {
            let gpu = open(gpu)?;
            create::<ringest_device_buffer>(|| {
                Ok(match capacity {
                    0 => DeviceBuffer::alloc(&gpu, len)?,
                    _ => DeviceBuffer::growable(&gpu, len, capacity)?,
                })
            })
        })
    })
}

/// Wraps len bytes of a GPU's memory at address, a CUdeviceptr of the caller's, and stores a handle in *out. The driver is
/// asked whether it is memory of this GPU. It must stay allocated until the handle is freed, which does not free it.
///
/// Any thread. Free with ringest_device_buffer_free.
///
/// Errors: -EINVAL for address or len 0, memory that is not this GPU's, or out NULL; -ERANGE when it does not have that
/// many bytes; -EOPNOTSUPP without a GPU; -ENODEV for an ordinal beyond ringest_gpu_count; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_device_buffer_from_ptr(
    gpu: u32,
    address: u64,
    len: usize,
    out: *mut *mut ringest_device_buffer,
) -> i32 {
    // SAFETY: the C caller vouches for the memory; `out` is null or valid.
    status(|| unsafe {
        if address == 0 || len == 0 {
            return Err(Failure::new(libc::EINVAL, format!("{len} bytes at {address:#x}: wrap memory that exists")));
        }
        store(out, "out", || {
            let gpu = open(gpu)?;
            create::<ringest_device_buffer>(|| Ok(DeviceBuffer::from_raw(&gpu, address, len)?))
        })
    })
}

/// Frees the memory, unless it is the caller's. What the driver does not take back is counted by ringest_gpu_leaks.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_device_buffer_free(buffer: *mut ringest_device_buffer) -> i32 {
    status(|| {
        drop(last(buffer.cast_const())?.take());
        Ok(())
    })
}

/// Stores the GPU's address of the first byte.
///
/// Any thread. Valid until the memory is freed; growth does not change it.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_device_buffer_address(buffer: *const ringest_device_buffer, out: *mut u64) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(buffer)?.as_device_ptr())) })
}

/// Bytes.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_device_buffer_size(buffer: *const ringest_device_buffer) -> i64 {
    value(|| Ok(shared(buffer)?.len() as i64))
}

/// Bytes that it can grow to.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_device_buffer_capacity(buffer: *const ringest_device_buffer) -> i64 {
    value(|| Ok(shared(buffer)?.capacity() as i64))
}

/// Adds memory until there are len bytes or more. Address and contents stay; new bytes are undefined. A running kernel may
/// use them once it has learnt of them. When it fails, the memory is as before.
///
/// Any thread.
///
/// Errors: -EBADF; -EOPNOTSUPP for memory without a capacity to grow to; -ERANGE beyond that; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_device_buffer_grow(buffer: *mut ringest_device_buffer, len: usize) -> i32 {
    status(|| Ok(exclusive(buffer.cast_const())?.grow(len)?))
}

/// Copies len bytes at data to offset in the memory, and waits for it. Running kernels do not hold it up.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when data is NULL and len is not 0; -ERANGE when the range does not lie inside; those of the
/// CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_device_buffer_copy_in(
    buffer: *mut ringest_device_buffer,
    offset: usize,
    data: *const c_void,
    len: usize,
) -> i32 {
    status(|| {
        // SAFETY: `len` bytes at `data` are readable by the C contract.
        let bytes = unsafe { elements(data.cast::<u8>(), len, "data") }?;
        Ok(exclusive(buffer.cast_const())?.copy_in(offset, bytes)?)
    })
}

/// Copies len bytes from offset in the memory to data, and waits for it. Running kernels do not hold it up.
///
/// Any thread.
///
/// Errors: as ringest_device_buffer_copy_in.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_device_buffer_copy_out(
    buffer: *const ringest_device_buffer,
    offset: usize,
    data: *mut c_void,
    len: usize,
) -> i32 {
    status(|| {
        if data.is_null() && len > 0 {
            return Err(Failure::new(libc::EINVAL, format!("data is NULL with a length of {len}")));
        }
        check_count::<u8>(len, "data")?;
        let entered = shared(buffer)?;
        if len == 0 {
            return Ok(entered.copy_out(offset, &mut [])?);
        }
        // SAFETY: `len` bytes at `data` are writable by the C contract; they are written before they are read.
        let bytes = unsafe { std::slice::from_raw_parts_mut(data.cast::<u8>(), len) };
        Ok(entered.copy_out(offset, bytes)?)
    })
}

/// Sets len bytes from offset to value, and waits for it.
///
/// Any thread.
///
/// Errors: -EBADF; -ERANGE when the range does not lie inside; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_device_buffer_fill(
    buffer: *mut ringest_device_buffer,
    offset: usize,
    len: usize,
    value: u8,
) -> i32 {
    status(|| Ok(exclusive(buffer.cast_const())?.fill(offset, len, value)?))
}

/// Returns a new descriptor, the caller's to close: a dma-buf over len bytes from offset, for other drivers to import.
/// Both are multiples of the host's page size.
///
/// Any thread.
///
/// Errors: -EBADF; -ERANGE when the range does not lie inside; -EOPNOTSUPP when GPU or driver cannot; those of the CUDA
/// driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_device_buffer_export_dma_buf(
    buffer: *const ringest_device_buffer,
    offset: usize,
    len: usize,
) -> i32 {
    value(|| Ok(shared(buffer)?.export_dma_buf(offset, len)?.into_raw_fd().into())) as i32
}
