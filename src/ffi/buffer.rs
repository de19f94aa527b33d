//! Buffers: ranges of memory that a ring may write to.

use super::gpu::open;
use super::handle::{Family, Table, create, exclusive, last, shared};
use super::options::UserPointer;
use super::{Failure, Outcome, status, store, value};
use crate::memory::{GpuMappedBuffer, MemoryKind};
use std::ffi::c_void;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A range of memory that a ring may write to: base, length, GPU address, kind.
///
/// Several handles may refer to the same memory.
pub struct ringest_buffer {
    _opaque: (),
}

/// A buffer, and how many handles refer to its memory.
pub(super) struct BufferObject {
    buffer: GpuMappedBuffer<'static>,
    handles: Arc<AtomicUsize>,
}

impl BufferObject {
    /// The first handle to some memory.
    pub(super) fn first(buffer: GpuMappedBuffer<'static>) -> Self {
        Self { buffer, handles: Arc::new(AtomicUsize::new(1)) }
    }

    /// One more handle to the memory of this one.
    fn further(&self, buffer: GpuMappedBuffer<'static>) -> Self {
        self.handles.fetch_add(1, Ordering::Relaxed);
        Self { buffer, handles: Arc::clone(&self.handles) }
    }

    /// Counts this handle out, unless it is the last.
    fn leave(&self) -> bool {
        let others = |handles: usize| (handles > 1).then(|| handles - 1);
        self.handles.fetch_update(Ordering::Relaxed, Ordering::Relaxed, others).is_ok()
    }
}

impl Deref for BufferObject {
    type Target = GpuMappedBuffer<'static>;
    fn deref(&self) -> &Self::Target {
        &self.buffer
    }
}

static TABLE: Table<BufferObject> = Table::new(2, "ringest_buffer");

impl Family for ringest_buffer {
    type Object = BufferObject;
    fn table() -> &'static Table<Self::Object> {
        &TABLE
    }
}

/// What kind of memory a buffer is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ringest_memory_kind {
    /// Host memory that the CPU may read and write.
    HostVisible = 0,
    /// A window into a device's memory (a GPU's BAR1).
    Bar1Peer = 1,
}

/// Called once, when ringest no longer needs memory that the caller owns. From any thread. It must not call ringest, throw or
/// longjmp.
pub type ringest_release_fn = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// Calls the C owner's function when the last reference to its memory is gone.
struct Owner {
    release: unsafe extern "C" fn(*mut c_void),
    user: UserPointer,
}

impl Drop for Owner {
    fn drop(&mut self) {
        // SAFETY: the C caller passed a function that takes this pointer, once, from any thread.
        unsafe { (self.release)(self.user.0) }
    }
}

/// `device` as C passes it: 0 stands for "no GPU maps it".
fn device_address(device: u64) -> Option<u64> {
    (device != 0).then_some(device)
}

/// Wraps len bytes of host memory at base that the caller keeps valid, and stores a handle in *out.
///
/// device is the GPU's address of the first byte, 0 when no GPU maps it.
///
/// The kernel writes there while reads are in flight: until the handle was released (which is refused with -EBUSY
/// before), the memory must stay valid, and ranges being read must not be touched. If a stream had to be leaked
/// (ringest_leak_stats), the memory must never be reused.
///
/// Any thread. Release with ringest_buffer_release.
///
/// Errors: -EINVAL for a NULL base, len 0 or out NULL; -ERANGE when the range leaves the address space.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_from_host(
    base: *mut c_void,
    len: usize,
    device: u64,
    out: *mut *mut ringest_buffer,
) -> i32 {
    // SAFETY: the C caller vouches for the memory; `out` is null or valid.
    status(|| unsafe {
        store(out, "out", || {
            let buffer = GpuMappedBuffer::from_host_visible_raw(base.cast(), len, device_address(device))?;
            create::<ringest_buffer>(|| Ok(BufferObject::first(buffer)))
        })
    })
}

/// Wraps len bytes of host memory at base and calls release(user) once no handle, registration or read needs it.
///
/// device is the GPU's address of the first byte, 0 when no GPU maps it. When this call fails, release is not called.
///
/// Any thread; release may be called from any thread.
///
/// Errors: as ringest_buffer_from_host; -EINVAL also when release is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_from_host_owner(
    base: *mut c_void,
    len: usize,
    device: u64,
    release: ringest_release_fn,
    user: *mut c_void,
    out: *mut *mut ringest_buffer,
) -> i32 {
    // SAFETY: the C caller vouches for the memory and the function; `out` is null or valid.
    status(|| unsafe {
        let owned = |owner| GpuMappedBuffer::from_host_visible_owner(base.cast(), len, device_address(device), owner);
        adopt(out, base, len, device, release, user, owned)
    })
}

/// Wraps len bytes of a device's memory, mapped at base in this process (a GPU's BAR1), that drives can write to.
///
/// device is the GPU's own address of the first byte. release(user) is called once nothing needs the window any more;
/// not when this call fails.
///
/// Any thread; release may be called from any thread.
///
/// Errors: as ringest_buffer_from_host_owner; -EINVAL also when device is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_from_bar1_peer(
    base: *mut c_void,
    len: usize,
    device: u64,
    release: ringest_release_fn,
    user: *mut c_void,
    out: *mut *mut ringest_buffer,
) -> i32 {
    // SAFETY: the C caller vouches for the window and the function; `out` is null or valid.
    status(|| unsafe {
        if device == 0 {
            return Err(Failure::new(libc::EINVAL, "device is 0: pass the GPU's address of the window"));
        }
        let owned = |owner| GpuMappedBuffer::from_bar1_peer_with_owner(base.cast(), len, device, owner);
        adopt(out, base, len, device, release, user, owned)
    })
}

/// Makes a buffer whose owner is a C function, which is not called when that fails.
///
/// # Safety
/// `out` is null or valid for writing a handle.
unsafe fn adopt(
    out: *mut *mut ringest_buffer,
    base: *mut c_void,
    len: usize,
    device: u64,
    release: ringest_release_fn,
    user: *mut c_void,
    make: impl FnOnce(Owner) -> crate::Result<GpuMappedBuffer<'static>>,
) -> Outcome<()> {
    let Some(release) = release else {
        return Err(Failure::new(libc::EINVAL, "release is NULL: pass the function that gives the memory back"));
    };
    // The same checks as the constructor's, before there is an owner whose drop would call `release`.
    // SAFETY: the buffer is dropped at once; nothing is read or written through it.
    drop(unsafe { GpuMappedBuffer::from_host_visible_raw(base.cast(), len, device_address(device)) }?);
    // SAFETY: `out` is null or valid by contract.
    unsafe {
        store(out, "out", || {
            create::<ringest_buffer>(|| Ok(BufferObject::first(make(Owner { release, user: UserPointer(user) })?)))
        })
    }
}

/// Makes a buffer of a part of another, sharing its memory, and stores its handle in *out.
///
/// Any thread. Release with ringest_buffer_release.
///
/// Errors: -EBADF; -ERANGE when the part does not lie inside; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_sub_region(
    buffer: *const ringest_buffer,
    offset: usize,
    len: usize,
    out: *mut *mut ringest_buffer,
) -> i32 {
    // SAFETY: C callers keep ranges in flight through different handles apart, as for `duplicate`; `out` is null or
    // valid.
    status(|| unsafe {
        store(out, "out", || {
            let whole = shared(buffer)?;
            let part = whole.duplicate().sub_region(offset, len)?;
            create::<ringest_buffer>(|| Ok(whole.further(part)))
        })
    })
}

/// Makes a second handle to the same memory and stores it in *out. Reads in flight through different handles must not
/// overlap.
///
/// Any thread. Release with ringest_buffer_release.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_duplicate(buffer: *const ringest_buffer, out: *mut *mut ringest_buffer) -> i32 {
    // SAFETY: the C contract is that of `duplicate`; `out` is null or valid.
    status(|| unsafe {
        store(out, "out", || {
            let first = shared(buffer)?;
            create::<ringest_buffer>(|| Ok(first.further(first.duplicate())))
        })
    })
}

/// Gives a handle up.
///
/// Memory that ringest keeps alive (mapped, or with a release function) outlives its reads by itself. Memory wrapped
/// by ringest_buffer_from_host cannot: its last handle is refused while anything still uses the memory.
///
/// Any thread.
///
/// Errors: -EBADF; -EBUSY for the last handle to wrapped memory while a stream, a tail line, a registration or a read in
/// flight uses it, or while another thread is in a call with this handle.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_buffer_release(buffer: *mut ringest_buffer) -> i32 {
    status(|| {
        let entered = last(buffer)?;
        if entered.is_borrowed() && !entered.leave() && entered.is_shared() {
            return Err(Failure::new(
                libc::EBUSY,
                "the wrapped memory is in use: close its streams, free its tail lines and unregister it first",
            ));
        }
        drop(entered.take());
        Ok(())
    })
}

/// Bytes.
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_buffer_size(buffer: *const ringest_buffer) -> i64 {
    value(|| Ok(shared(buffer)?.len() as i64))
}

/// The kind of memory (enum ringest_memory_kind).
///
/// Any thread.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_buffer_kind(buffer: *const ringest_buffer) -> i32 {
    value(|| {
        Ok(match shared(buffer)?.kind() {
            MemoryKind::HostVisible => ringest_memory_kind::HostVisible,
            MemoryKind::Bar1Peer => ringest_memory_kind::Bar1Peer,
        } as i64)
    }) as i32
}

/// Stores the address of the first byte in this process.
///
/// Any thread. Valid until the memory is gone.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_host_ptr(buffer: *const ringest_buffer, out: *mut *mut c_void) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(buffer)?.as_host_ptr().cast())) })
}

/// Stores the GPU's address of the first byte; 0 when no GPU maps it.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_device_ptr(buffer: *const ringest_buffer, out: *mut u64) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe { store(out, "out", || Ok(shared(buffer)?.as_device_ptr().unwrap_or(0))) })
}

/// Stores the address of the first byte on a GPU, by its ordinal: one that the memory was page-locked or checked
/// (ringest_buffer_check_gpu) for, or, for memory that ringest page-locked, any other.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when out is NULL; -EOPNOTSUPP for memory that is not known to be the GPU's or page-locked, where
/// there is no driver, or it finds no GPU; -ENODEV for an ordinal beyond ringest_gpu_count; those of the CUDA driver.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ringest_buffer_device_ptr_on(buffer: *const ringest_buffer, gpu: u32, out: *mut u64) -> i32 {
    // SAFETY: `out` is null or valid by the C contract.
    status(|| unsafe {
        store(out, "out", || {
            let entered = shared(buffer)?;
            Ok(entered.as_device_ptr_on(&open(gpu)?)?)
        })
    })
}

/// Checks memory pinned by others with the driver: the device address that was given is verified, one that was not is
/// looked up. Call it for each GPU, by its ordinal, that is to use the memory, before it is shared or registered.
///
/// Host memory must be page-locked as a whole. A device's window must be this GPU's; its SYNC_MEMOPS attribute is set, which
/// DMA by peers needs. When it fails, the buffer is as before.
///
/// Any thread.
///
/// Errors: -EBADF; -EINVAL when the memory is not so; -EBUSY when anything else shares the memory; -EOPNOTSUPP where there
/// is no driver, or it finds no GPU; -ENODEV for an ordinal beyond ringest_gpu_count; those of the CUDA driver.
#[unsafe(no_mangle)]
pub extern "C" fn ringest_buffer_check_gpu(buffer: *mut ringest_buffer, gpu: u32) -> i32 {
    status(|| {
        let mut entered = exclusive(buffer.cast_const())?;
        Ok(entered.buffer.check_gpu(&open(gpu)?)?)
    })
}
