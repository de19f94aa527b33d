//! Contexts: who works in which, and how a thread finds its own again.

use super::super::thread::Process;
use super::table::{DeviceNumber, Driver, Failure, Object, Outcome};
use super::{giving_back, relaxed};
use crate::error::{PipelineError, Result};
use std::ffi::c_int;

/// A context that calls are made in: a device's primary one, retained, or the caller's.
pub(crate) struct Context {
    driver: &'static Driver,
    raw: Object,
    device: DeviceNumber,
    primary: bool,
    process: Process,
}

// SAFETY: a CUcontext may be made current to any thread, to several at a time.
unsafe impl Send for Context {}
// SAFETY: as above; the value itself is immutable.
unsafe impl Sync for Context {}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.primary { "primary" } else { "caller's" };
        write!(f, "Context(device {}, {kind} {:p})", self.device, self.raw)
    }
}

/// Puts the calling thread back to where it was, also when a panic passes.
struct Entered {
    driver: &'static Driver,
    /// The thread's stream capture mode from before.
    capture_mode: Option<u32>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // A single failure must not leave the caller in our context: ask twice.
        let again = |act: &mut dyn FnMut() -> Outcome<()>| act().or_else(|_| act());
        let mut restored = Ok(());
        if let Some(mode) = self.capture_mode {
            restored = again(&mut || {
                let mut mode = mode;
                // SAFETY: the mode is a valid one, for it was this thread's before.
                unsafe { self.driver.exchange_capture_mode(&mut mode) }
            });
        }
        let mut popped = std::ptr::null_mut();
        // SAFETY: our push is on top of this thread's stack: work in a context pops whatever it pushes.
        let popped = again(&mut || unsafe { self.driver.ctx_pop(&mut popped) });
        if let Err(failure) = restored.and(popped) {
            tracing::error!(target: "ringest::cuda", error = %PipelineError::from(failure), "a thread's context was not restored");
        }
    }
}

impl Context {
    /// Retains the primary context of a device, which the CUDA runtime uses too.
    pub(crate) fn primary(ordinal: u32) -> Result<Self> {
        let process = Process::current();
        let (driver, device) = device(ordinal)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: one pointer is written.
        unsafe { driver.primary_retain(&mut raw, device)? };
        Ok(Self { driver, raw, device, primary: true, process })
    }

    /// Uses a context of the caller's.
    ///
    /// # Safety
    /// `raw` is a CUcontext that outlives the value.
    pub(crate) unsafe fn foreign(raw: Object) -> Result<Self> {
        if raw.is_null() {
            return Err(PipelineError::invalid("a null CUcontext", "pass a context that exists"));
        }
        let driver = Driver::get()?;
        let mut context = Self { driver, raw, device: 0, primary: false, process: Process::current() };
        let mut device = 0;
        // SAFETY: one device number is written.
        context.enter(|driver| unsafe { driver.ctx_get_device(&mut device) })?;
        context.device = device;
        Ok(context)
    }

    /// Does some work with this context current, on any thread, and leaves the thread as it was.
    ///
    /// The thread's stream capture mode is relaxed meanwhile: allocation and the like then neither break a capture that
    /// another thread has begun nor fail because of it (`cuThreadExchangeStreamCaptureMode`).
    pub(crate) fn enter<R>(&self, work: impl FnOnce(&'static Driver) -> Outcome<R>) -> Result<R> {
        if !self.process.is_current() {
            return Err(PipelineError::unsupported(
                "CUDA in a forked child",
                "a context does not survive fork: use the GPU in the parent, or start the child with exec",
            ));
        }
        let _entered = self.entered()?;
        Ok(work(self.driver)?)
    }

    fn entered(&self) -> Outcome<Entered> {
        // SAFETY: the context exists, by `primary_retain` or the contract of `foreign`.
        unsafe { self.driver.ctx_push(self.raw) }?;
        let mut entered = Entered { driver: self.driver, capture_mode: None };
        entered.capture_mode = Some(relaxed(self.driver)?);
        Ok(entered)
    }

    /// Gives something back in this context. `false`: it could not be, and is leaked, counted and logged.
    ///
    /// In a forked child, and once the driver is shut down, there is nothing to give back. The call itself is never
    /// repeated: it may have done its work and report the failure of something else, which CUDA allows.
    pub(crate) fn give_back(&self, what: &'static str, work: impl FnOnce(&'static Driver) -> Outcome<()>) -> bool {
        if !self.process.is_current() {
            return true;
        }
        let entered = self.entered().or_else(|_| self.entered());
        giving_back(what, entered.and_then(|_entered| work(self.driver)))
    }

    pub(crate) fn device(&self) -> DeviceNumber {
        self.device
    }

    pub(crate) fn driver(&self) -> &'static Driver {
        self.driver
    }

    pub(crate) fn raw(&self) -> Object {
        self.raw
    }

    pub(crate) fn is_primary(&self) -> bool {
        self.primary
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.primary && self.process.is_current() {
            // SAFETY: retained once by `primary`; nothing that holds this value is left.
            giving_back("a primary context", unsafe { self.driver.primary_release(self.device) });
        }
    }
}

fn no_such_device(ordinal: u32) -> PipelineError {
    let count = device_count().unwrap_or(0);
    Failure::Code { call: "cuDeviceGet", code: super::table::code::INVALID_DEVICE }
        .into_error_with(format!("there is no GPU {ordinal}: this process sees {count} (CUDA_VISIBLE_DEVICES)"))
}

impl Failure {
    fn into_error_with(self, fix: String) -> PipelineError {
        match PipelineError::from(self) {
            PipelineError::Cuda { call, code, text, .. } => PipelineError::Cuda { call, code, text, fix: fix.into() },
            other => other,
        }
    }
}

/// The driver, and its device with an ordinal.
pub(crate) fn device(ordinal: u32) -> Result<(&'static Driver, c_int)> {
    let driver = Driver::get()?;
    let number = c_int::try_from(ordinal).map_err(|_| no_such_device(ordinal))?;
    let mut device = 0;
    // SAFETY: one int is written.
    unsafe { driver.device_get(&mut device, number) }.map_err(|failure| match failure.code() {
        Some(super::table::code::INVALID_DEVICE) => no_such_device(ordinal),
        _ => failure.into(),
    })?;
    Ok((driver, device))
}

/// GPUs that this process sees.
pub(crate) fn device_count() -> Result<u32> {
    let mut count = 0;
    // SAFETY: one int is written.
    unsafe { Driver::get()?.device_get_count(&mut count) }?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// The device of the context that is current to the calling thread, if any is.
pub(crate) fn current_device() -> Result<Option<u32>> {
    let driver = Driver::get()?;
    let (mut context, mut device) = (std::ptr::null_mut(), 0);
    // SAFETY: each call writes one value to a place of its type.
    unsafe {
        driver.ctx_get_current(&mut context)?;
        if context.is_null() {
            return Ok(None);
        }
        driver.ctx_get_device(&mut device)?;
    }
    Ok(u32::try_from(device).ok())
}
