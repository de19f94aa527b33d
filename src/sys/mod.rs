//! Every raw system call, CUDA driver call and memory mapping of the crate. The only `unsafe` code below the C ABI, apart from the
//! memory regions and the one place that hands their addresses to the kernel.

pub(crate) mod cuda;
pub(crate) mod fault;
pub(crate) mod file;
pub(crate) mod mem;
pub(crate) mod thread;
pub(crate) mod uring;

/// A positive errno.
pub(crate) type Errno = i32;

/// The errno of a C library call that returned -1.
pub(crate) fn last_errno() -> Errno {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Turns the -1 convention of the C library into a `Result`.
pub(crate) fn check(value: libc::c_long) -> Result<libc::c_long, Errno> {
    if value == -1 { Err(last_errno()) } else { Ok(value) }
}

/// Orders everything this thread has stored, or seen stored by a device, before the store by which it tells a device.
///
/// Host memory on x86: stores are not reordered, and devices that snoop see them in order, so the release store that
/// follows says it all. On aarch64 a device is an observer outside the inner shareable domain, which a release store
/// (`stlr`) does not order for: `dmb osh` does (Linux: `dma_mb`, arch/arm64/include/asm/barrier.h).
#[inline(always)]
pub(crate) fn publish_barrier() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier touches no memory.
    unsafe {
        std::arch::asm!("dmb osh", options(nostack, preserves_flags));
    }
}
