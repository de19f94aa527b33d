//! The driver functions we use: one table, resolved once, each returning a plain `u32`.
//!
//! cudarc's own bindings return an exhaustive enum, which a code unknown to them would make undefined behaviour, and
//! they panic where libcuda or a symbol is missing. Only its loader serves here.

use super::super::fault;
use crate::error::{PipelineError, Result, Text};
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

/// A driver call that did not do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The driver returned this `CUresult`.
    Code { call: &'static str, code: u32 },
    /// This driver has no such function.
    Missing(&'static str),
}

/// What a call under a context comes to.
pub(crate) type Outcome<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn code(self) -> Option<u32> {
        match self {
            Self::Code { code, .. } => Some(code),
            Self::Missing(_) => None,
        }
    }
}

impl From<Failure> for PipelineError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Code { call, code } => {
                Self::Cuda { call, code, text: describe(code), fix: Text::Borrowed(remedy(code)) }
            }
            Failure::Missing(symbol) => Self::unsupported(
                format!("the driver function {symbol}"),
                "this libcuda does not have it: install a newer NVIDIA driver (CUDA 12 or later)",
            ),
        }
    }
}

/// `CUresult` values that are told apart here (cuda.h).
pub(crate) mod code {
    pub(crate) const INVALID_VALUE: u32 = 1;
    pub(crate) const OUT_OF_MEMORY: u32 = 2;
    pub(crate) const DEINITIALIZED: u32 = 4;
    pub(crate) const STUB_LIBRARY: u32 = 34;
    pub(crate) const CALL_REQUIRES_NEWER_DRIVER: u32 = 36;
    pub(crate) const DEVICE_UNAVAILABLE: u32 = 46;
    pub(crate) const NO_DEVICE: u32 = 100;
    pub(crate) const INVALID_DEVICE: u32 = 101;
    pub(crate) const INVALID_CONTEXT: u32 = 201;
    pub(crate) const ALREADY_MAPPED: u32 = 208;
    pub(crate) const NO_BINARY_FOR_GPU: u32 = 209;
    pub(crate) const PEER_ACCESS_UNSUPPORTED: u32 = 217;
    pub(crate) const UNSUPPORTED_PTX_VERSION: u32 = 222;
    pub(crate) const INVALID_HANDLE: u32 = 400;
    pub(crate) const NOT_FOUND: u32 = 500;
    pub(crate) const NOT_READY: u32 = 600;
    pub(crate) const HOST_MEMORY_ALREADY_REGISTERED: u32 = 712;
    pub(crate) const HOST_MEMORY_NOT_REGISTERED: u32 = 713;
    pub(crate) const NOT_PERMITTED: u32 = 800;
    pub(crate) const NOT_SUPPORTED: u32 = 801;
    pub(crate) const SYSTEM_NOT_READY: u32 = 802;
    pub(crate) const SYSTEM_DRIVER_MISMATCH: u32 = 803;
    pub(crate) const TIMEOUT: u32 = 909;
    pub(crate) const UNKNOWN: u32 = 999;
}

/// The errno that stands for a `CUresult`; documented at [`PipelineError::Cuda`].
pub(crate) fn errno(code: u32) -> i32 {
    match code {
        code::INVALID_VALUE | code::INVALID_CONTEXT | code::INVALID_HANDLE | code::HOST_MEMORY_NOT_REGISTERED => {
            libc::EINVAL
        }
        code::OUT_OF_MEMORY => libc::ENOMEM,
        code::NO_DEVICE | code::INVALID_DEVICE => libc::ENODEV,
        code::DEVICE_UNAVAILABLE | code::ALREADY_MAPPED | code::HOST_MEMORY_ALREADY_REGISTERED => libc::EBUSY,
        code::NOT_FOUND => libc::ENOENT,
        code::NOT_READY => libc::EAGAIN,
        code::NOT_PERMITTED => libc::EPERM,
        code::STUB_LIBRARY
        | code::CALL_REQUIRES_NEWER_DRIVER
        | code::NO_BINARY_FOR_GPU
        | code::PEER_ACCESS_UNSUPPORTED
        | code::UNSUPPORTED_PTX_VERSION
        | code::NOT_SUPPORTED
        | code::SYSTEM_DRIVER_MISMATCH => libc::EOPNOTSUPP,
        code::TIMEOUT => libc::ETIMEDOUT,
        _ => libc::EIO,
    }
}

fn remedy(code: u32) -> &'static str {
    match code {
        code::INVALID_VALUE => "an argument is outside what this driver and GPU accept",
        code::OUT_OF_MEMORY => "free GPU or page-locked memory, or ask for less",
        code::DEINITIALIZED => "the process is shutting the driver down: end GPU work before main returns",
        code::STUB_LIBRARY => {
            "a toolkit's stub library was loaded instead of the driver: take its stubs folder off LD_LIBRARY_PATH"
        }
        code::CALL_REQUIRES_NEWER_DRIVER | code::UNSUPPORTED_PTX_VERSION => "install a newer NVIDIA driver",
        code::DEVICE_UNAVAILABLE => "another process holds the GPU exclusively (compute mode), or it must be reset",
        code::NO_DEVICE => "no GPU is visible: check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's devices",
        code::INVALID_DEVICE => "name a GPU that exists and is visible (CUDA_VISIBLE_DEVICES)",
        code::INVALID_CONTEXT => "the context was destroyed: keep it until everything that uses it is gone",
        code::ALREADY_MAPPED => "unmap what is there first",
        code::NO_BINARY_FOR_GPU => "the kernel was not built for this GPU's architecture",
        code::PEER_ACCESS_UNSUPPORTED => "these GPUs cannot reach each other's memory",
        code::HOST_MEMORY_ALREADY_REGISTERED => "the memory is page-locked already: wrap it instead of registering it",
        code::HOST_MEMORY_NOT_REGISTERED => "page-lock the memory first (cuMemHostRegister or cuMemHostAlloc)",
        code::NOT_PERMITTED => "the driver or the system's policy forbids it here",
        code::NOT_SUPPORTED => "this GPU, driver or system cannot do it",
        code::SYSTEM_NOT_READY => "a driver service is not running (on NVSwitch systems: nvidia-fabricmanager)",
        code::SYSTEM_DRIVER_MISMATCH => {
            "libcuda and the kernel module differ in version: reboot, or reinstall the driver"
        }
        code::UNKNOWN => "see the kernel log (dmesg | grep -i nvrm) and nvidia-smi",
        _ => "see the kernel log and nvidia-smi; after a fault of a kernel the process must be restarted",
    }
}

macro_rules! table {
    ($( fn $name:ident = $symbol:literal ( $($argument:ident : $type:ty),* $(,)? ); )*) => {
        /// The functions of libcuda. `None`: this driver lacks it.
        struct Table {
            $( $name: Option<unsafe extern "C" fn($($type),*) -> u32>, )*
        }

        impl Table {
            /// Resolves every function in the loaded libcuda.
            ///
            /// # Safety
            /// libcuda is present: `is_culib_present` has said so.
            unsafe fn resolve() -> Self {
                // SAFETY: the loader does not panic when the library is present. Each symbol of this name has this
                // signature in cuda.h since the version that introduced it; `CUresult` is an int-sized enum.
                unsafe {
                    let library = cudarc::driver::sys::culib();
                    Self { $( $name: library.get(concat!($symbol, "\0").as_bytes()).ok().map(|symbol| *symbol), )* }
                }
            }
        }

        #[allow(clippy::too_many_arguments, reason = "as the driver has them")]
        #[allow(dead_code, reason = "names are asked for by `describe`, and the layers above take more in turn")]
        impl Driver {
            $(
                /// The driver's function, whose contract (cuda.h) the caller keeps.
                pub(super) unsafe fn $name(&self, $($argument: $type),*) -> Outcome<()> {
                    fault::point($symbol).map_err(|code| Failure::Code { call: $symbol, code: code as u32 })?;
                    let Some(function) = self.table.$name else { return Err(Failure::Missing($symbol)) };
                    // SAFETY: by the caller.
                    match unsafe { function($($argument),*) } {
                        0 => Ok(()),
                        code => Err(Failure::Code { call: $symbol, code }),
                    }
                }
            )*
        }
    };
}

/// `CUdeviceptr`.
pub(crate) type DeviceAddress = u64;
/// `CUdevice`.
pub(crate) type DeviceNumber = c_int;
/// Opaque pointers of the driver: `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`, `CUexternalMemory`.
pub(crate) type Object = *mut c_void;
/// `CUmemGenericAllocationHandle`.
pub(crate) type PhysicalHandle = c_ulonglong;
/// `CUhostFn`.
pub(crate) type HostFunction = unsafe extern "C" fn(*mut c_void);

/// `CUmemLocation`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Location {
    pub(crate) kind: c_uint,
    pub(crate) id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Properties {
    pub(crate) kind: c_uint,
    pub(crate) handle_types: c_uint,
    pub(crate) location: Location,
    pub(crate) win32: *mut c_void,
    pub(crate) compression: u8,
    pub(crate) rdma: u8,
    pub(crate) usage: u16,
    pub(crate) reserved: [u8; 4],
}
const _: () = assert!(size_of::<Properties>() == 32);

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    pub(crate) location: Location,
    pub(crate) flags: c_uint,
}
const _: () = assert!(size_of::<Access>() == 12);

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC` with a file descriptor; its union is two pointers wide.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ExternalMemory {
    pub(crate) kind: c_uint,
    /// The union starts at byte 8 and is aligned like a pointer.
    pub(crate) padding: c_uint,
    pub(crate) fd: c_int,
    pub(crate) union_rest: [c_uint; 3],
    pub(crate) size: c_ulonglong,
    pub(crate) flags: c_uint,
    pub(crate) reserved: [c_uint; 16],
    pub(crate) end: c_uint,
}
const _: () = assert!(size_of::<ExternalMemory>() == 104);

/// `CUDA_EXTERNAL_MEMORY_BUFFER_DESC`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ExternalBuffer {
    pub(crate) offset: c_ulonglong,
    pub(crate) size: c_ulonglong,
    pub(crate) flags: c_uint,
    pub(crate) reserved: [c_uint; 16],
    pub(crate) end: c_uint,
}
const _: () = assert!(size_of::<ExternalBuffer>() == 88);

table! {
    fn init = "cuInit"(flags: c_uint);
    fn driver_get_version = "cuDriverGetVersion"(version: *mut c_int);
    fn get_error_name = "cuGetErrorName"(code: u32, name: *mut *const c_char);
    fn get_error_string = "cuGetErrorString"(code: u32, text: *mut *const c_char);

    fn device_get_count = "cuDeviceGetCount"(count: *mut c_int);
    fn device_get = "cuDeviceGet"(device: *mut DeviceNumber, ordinal: c_int);
    fn device_get_name = "cuDeviceGetName"(name: *mut c_char, len: c_int, device: DeviceNumber);
    fn device_get_attribute = "cuDeviceGetAttribute"(value: *mut c_int, attribute: c_uint, device: DeviceNumber);
    fn device_total_mem = "cuDeviceTotalMem_v2"(bytes: *mut usize, device: DeviceNumber);
    fn device_can_access_peer = "cuDeviceCanAccessPeer"(can: *mut c_int, device: DeviceNumber, peer: DeviceNumber);
    fn primary_retain = "cuDevicePrimaryCtxRetain"(context: *mut Object, device: DeviceNumber);
    fn primary_release = "cuDevicePrimaryCtxRelease_v2"(device: DeviceNumber);

    fn ctx_push = "cuCtxPushCurrent_v2"(context: Object);
    fn ctx_pop = "cuCtxPopCurrent_v2"(context: *mut Object);
    fn ctx_get_current = "cuCtxGetCurrent"(context: *mut Object);
    fn ctx_get_device = "cuCtxGetDevice"(device: *mut DeviceNumber);
    fn ctx_synchronize = "cuCtxSynchronize"();
    fn exchange_capture_mode = "cuThreadExchangeStreamCaptureMode"(mode: *mut c_uint);

    fn mem_get_info = "cuMemGetInfo_v2"(free: *mut usize, total: *mut usize);
    fn mem_alloc = "cuMemAlloc_v2"(address: *mut DeviceAddress, bytes: usize);
    fn mem_free = "cuMemFree_v2"(address: DeviceAddress);
    fn mem_host_alloc = "cuMemHostAlloc"(host: *mut *mut c_void, bytes: usize, flags: c_uint);
    fn mem_free_host = "cuMemFreeHost"(host: *mut c_void);
    fn mem_host_register = "cuMemHostRegister_v2"(host: *mut c_void, bytes: usize, flags: c_uint);
    fn mem_host_unregister = "cuMemHostUnregister"(host: *mut c_void);
    fn mem_host_get_device_pointer =
        "cuMemHostGetDevicePointer_v2"(address: *mut DeviceAddress, host: *mut c_void, flags: c_uint);
    fn pointer_get_attribute = "cuPointerGetAttribute"(data: *mut c_void, attribute: c_uint, address: DeviceAddress);
    fn pointer_set_attribute =
        "cuPointerSetAttribute"(value: *const c_void, attribute: c_uint, address: DeviceAddress);

    fn memcpy_h2d_async =
        "cuMemcpyHtoDAsync_v2"(target: DeviceAddress, source: *const c_void, bytes: usize, stream: Object);
    fn memcpy_d2h_async =
        "cuMemcpyDtoHAsync_v2"(target: *mut c_void, source: DeviceAddress, bytes: usize, stream: Object);
    fn memcpy_d2d_async =
        "cuMemcpyDtoDAsync_v2"(target: DeviceAddress, source: DeviceAddress, bytes: usize, stream: Object);
    fn memset_d8_async = "cuMemsetD8Async"(target: DeviceAddress, value: u8, count: usize, stream: Object);

    fn mem_get_granularity =
        "cuMemGetAllocationGranularity"(bytes: *mut usize, properties: *const Properties, option: c_uint);
    fn mem_address_reserve = "cuMemAddressReserve"(
        address: *mut DeviceAddress, bytes: usize, alignment: usize, hint: DeviceAddress, flags: c_ulonglong);
    fn mem_address_free = "cuMemAddressFree"(address: DeviceAddress, bytes: usize);
    fn mem_create = "cuMemCreate"(
        handle: *mut PhysicalHandle, bytes: usize, properties: *const Properties, flags: c_ulonglong);
    fn mem_release = "cuMemRelease"(handle: PhysicalHandle);
    fn mem_map = "cuMemMap"(
        address: DeviceAddress, bytes: usize, offset: usize, handle: PhysicalHandle, flags: c_ulonglong);
    fn mem_unmap = "cuMemUnmap"(address: DeviceAddress, bytes: usize);
    fn mem_set_access = "cuMemSetAccess"(address: DeviceAddress, bytes: usize, access: *const Access, count: usize);
    fn mem_get_access =
        "cuMemGetAccess"(flags: *mut c_ulonglong, location: *const Location, address: DeviceAddress);
    fn mem_export = "cuMemExportToShareableHandle"(
        shareable: *mut c_void, handle: PhysicalHandle, kind: c_uint, flags: c_ulonglong);
    fn mem_import =
        "cuMemImportFromShareableHandle"(handle: *mut PhysicalHandle, shareable: *mut c_void, kind: c_uint);
    fn mem_get_properties =
        "cuMemGetAllocationPropertiesFromHandle"(properties: *mut Properties, handle: PhysicalHandle);
    fn mem_get_range_handle = "cuMemGetHandleForAddressRange"(
        handle: *mut c_void, address: DeviceAddress, bytes: usize, kind: c_uint, flags: c_ulonglong);

    fn stream_create = "cuStreamCreateWithPriority"(stream: *mut Object, flags: c_uint, priority: c_int);
    fn stream_destroy = "cuStreamDestroy_v2"(stream: Object);
    fn stream_synchronize = "cuStreamSynchronize"(stream: Object);
    fn stream_query = "cuStreamQuery"(stream: Object);
    fn stream_wait_event = "cuStreamWaitEvent"(stream: Object, event: Object, flags: c_uint);
    fn stream_write_value_64 =
        "cuStreamWriteValue64_v2"(stream: Object, address: DeviceAddress, value: u64, flags: c_uint);
    fn stream_wait_value_64 =
        "cuStreamWaitValue64_v2"(stream: Object, address: DeviceAddress, value: u64, flags: c_uint);
    fn event_create = "cuEventCreate"(event: *mut Object, flags: c_uint);
    fn event_destroy = "cuEventDestroy_v2"(event: Object);
    fn event_record = "cuEventRecord"(event: Object, stream: Object);
    fn event_query = "cuEventQuery"(event: Object);
    fn event_synchronize = "cuEventSynchronize"(event: Object);
    fn launch_host_function = "cuLaunchHostFunc"(stream: Object, function: HostFunction, data: *mut c_void);

    fn module_load_data = "cuModuleLoadDataEx"(
        module: *mut Object, image: *const c_void, count: c_uint, options: *mut c_uint, values: *mut *mut c_void);
    fn module_unload = "cuModuleUnload"(module: Object);
    fn module_get_function = "cuModuleGetFunction"(function: *mut Object, module: Object, name: *const c_char);
    fn func_load = "cuFuncLoad"(function: Object);
    fn launch_kernel = "cuLaunchKernel"(
        function: Object, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared_bytes: c_uint, stream: Object, parameters: *mut *mut c_void, extra: *mut *mut c_void);

    fn import_external_memory = "cuImportExternalMemory"(memory: *mut Object, description: *const ExternalMemory);
    fn external_memory_get_buffer = "cuExternalMemoryGetMappedBuffer"(
        address: *mut DeviceAddress, memory: Object, description: *const ExternalBuffer);
    fn destroy_external_memory = "cuDestroyExternalMemory"(memory: Object);
    fn flush_gpu_direct_writes = "cuFlushGPUDirectRDMAWrites"(target: c_uint, scope: c_uint);
}

/// libcuda, loaded and initialised.
pub(crate) struct Driver {
    table: Table,
}

static DRIVER: OnceLock<std::result::Result<Driver, Text>> = OnceLock::new();
/// The table, also of a driver whose cuInit failed, for the names of its errors.
static NAMES: OnceLock<[Option<unsafe extern "C" fn(u32, *mut *const c_char) -> u32>; 2]> = OnceLock::new();

impl Driver {
    /// The driver of this process, loaded by the first call.
    ///
    /// # Errors
    /// `EOPNOTSUPP` with the reason where there is no usable driver or no GPU. The answer is remembered.
    pub(crate) fn get() -> Result<&'static Self> {
        match DRIVER.get_or_init(Self::load) {
            Ok(driver) => Ok(driver),
            Err(reason) => Err(PipelineError::unsupported("CUDA", reason.clone())),
        }
    }

    fn load() -> std::result::Result<Self, Text> {
        // SAFETY: loading a library runs its initialisers; libcuda's have no preconditions.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err(
                "no GPU, because libcuda.so.1 cannot be loaded: install the NVIDIA driver, or start the container \
                        with its GPUs (the NVIDIA container toolkit)"
                    .into(),
            );
        }
        // SAFETY: the library was found just now, and stays loaded for the life of the process.
        let driver = Self { table: unsafe { Table::resolve() } };
        let _ = NAMES.set([driver.table.get_error_name, driver.table.get_error_string]);
        // SAFETY: no preconditions.
        match unsafe { driver.init(0) } {
            Ok(()) => {
                tracing::debug!(target: "ringest::cuda", version = ?driver.version(), "driver loaded");
                Ok(driver)
            }
            Err(failure) => Err(format!("no GPU, because {}", PipelineError::from(failure)).into()),
        }
    }

    /// The newest CUDA version the driver serves, as 1000 x major + 10 x minor.
    pub(crate) fn version(&self) -> Outcome<u32> {
        let mut version = 0;
        // SAFETY: one int is written.
        unsafe { self.driver_get_version(&mut version) }?;
        Ok(u32::try_from(version).unwrap_or(0))
    }
}

/// Name and text of a `CUresult`, as the driver knows them.
fn describe(code: u32) -> String {
    let ask = |function: Option<unsafe extern "C" fn(u32, *mut *const c_char) -> u32>| {
        let mut text = std::ptr::null();
        // SAFETY: the function stores a pointer to a string that lives as long as the library, or fails.
        unsafe {
            let known = function.is_some_and(|function| function(code, &mut text) == 0) && !text.is_null();
            known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    let [name, text] = NAMES.get().copied().unwrap_or([None; 2]);
    match (ask(name), ask(text)) {
        (Some(name), Some(text)) => format!("{name}, {text}"),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => "a result this driver has no name for".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_one_errno() {
        let pairs = [
            (1, libc::EINVAL),
            (2, libc::ENOMEM),
            (100, libc::ENODEV),
            (400, libc::EINVAL),
            (600, libc::EAGAIN),
            (712, libc::EBUSY),
            (800, libc::EPERM),
            (801, libc::EOPNOTSUPP),
            (700, libc::EIO),
            (999, libc::EIO),
            (12_345, libc::EIO),
            (u32::MAX, libc::EIO),
        ];
        for (code, expected) in pairs {
            let error = PipelineError::from(Failure::Code { call: "cuTest", code });
            assert_eq!(error.errno(), expected, "{code}");
            assert!(error.to_string().contains("cuTest") && error.to_string().contains(&code.to_string()), "{error}");
        }
        let missing = PipelineError::from(Failure::Missing("cuTest_v9"));
        assert_eq!(missing.errno(), libc::EOPNOTSUPP);
        assert!(missing.to_string().contains("cuTest_v9") && missing.to_string().contains("newer"), "{missing}");
    }
}
