//! GPUs for tests: the real one where there is a driver, and a pretended one (`tests/fake_cuda`) everywhere else.
//!
//! A test on the fake runs in a process of its own, which finds the fake as libcuda.
#![allow(dead_code, unused_imports, unused_macros, unreachable_pub)]

use super::in_child_with;
use std::ffi::{CStr, CString, c_char, c_long, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Code that is to hold on a real GPU and on the fake: two tests.
macro_rules! both {
    ($(#[$about:meta])* fn $name:ident($gpu:ident: &Gpu) $body:block) => {
        $(#[$about])*
        mod $name {
            use super::*;

            fn body($gpu: &ringest::Gpu) $body

            #[test]
            fn on_a_gpu() {
                let (gpu, _alone) = gpu!(concat!(stringify!($name), "::on_a_gpu"));
                body(&gpu);
            }

            #[test]
            fn on_the_fake() {
                fake!(concat!(stringify!($name), "::on_the_fake"), &[], &[], {
                    body(&ringest::Gpu::open(0).unwrap());
                });
            }
        }
    };
}

/// The first real GPU; a skip where there is none. Tests on it run one at a time: they compare what is free and what an
/// address is known as.
macro_rules! gpu {
    ($name:expr) => {
        match ringest::Gpu::open(0) {
            Ok(gpu) => (gpu, common::gpu::alone()),
            Err(error) => {
                common::print_skip($name, &error.to_string());
                return;
            }
        }
    };
}

/// Runs a block in a process whose libcuda is the fake, without some functions, with an environment; the fake's books must
/// be even at the end. A skip where there is no C compiler.
macro_rules! fake {
    ($name:expr, $lacking:expr, $environment:expr, $body:block) => {
        if let Err(reason) = common::gpu::with_fake($name, $lacking, $environment, || {
            $body;
            common::gpu::Fake::get().assert_even();
        }) {
            common::print_skip($name, &reason);
        }
    };
}

pub(crate) use {both, fake, gpu};

pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_cuda/fake_cuda.c");

/// Folders with fakes made by this process, by what they lack.
static MADE: Mutex<Vec<(String, PathBuf)>> = Mutex::new(Vec::new());

/// Builds the fake, once for each set of lacking functions.
fn build(lacking: &[&str]) -> Result<PathBuf, String> {
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let key = lacking.join("-");
    if let Some((_, folder)) = made.iter().find(|(other, _)| *other == key) {
        return Ok(folder.clone());
    }
    if !Path::new(SOURCE).is_file() {
        return Err(format!("no source of the fake at {SOURCE}"));
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fake_cuda-{key}"));
    std::fs::create_dir_all(&folder).unwrap();
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut compiler = cc::Build::new();
    compiler.cargo_metadata(false).target(&target).host(&target).opt_level(1).out_dir(&folder);
    let compiler = compiler.try_get_compiler().map_err(|error| format!("no C compiler: {error}"))?;
    // Another process may be running from the same folder: what is new takes the place of the old at once.
    let id = std::process::id();
    let (library, script) = (folder.join(format!("new-{id}.so")), folder.join(format!("new-{id}.exports")));
    let hidden: String = lacking.iter().map(|name| format!("{name}; ")).collect();
    std::fs::write(&script, format!("{{ global: *; local: nothing_at_all; {hidden}}};")).unwrap();
    let mut command = Command::new(compiler.path());
    command.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-pthread"]);
    command.arg(format!("-Wl,-soname,libcuda.so.1,--version-script={}", script.display()));
    let output =
        command.arg("-o").arg(&library).arg(SOURCE).output().map_err(|error| format!("no C compiler: {error}"))?;
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_file(&script).unwrap();
    std::fs::rename(&library, folder.join("libcuda.so")).unwrap();
    let _ = std::os::unix::fs::symlink("libcuda.so", folder.join("libcuda.so.1"));
    made.push((key, folder.clone()));
    Ok(folder)
}

pub fn with_fake(
    name: &str,
    lacking: &[&str],
    environment: &[(&str, &str)],
    body: impl FnOnce(),
) -> Result<(), String> {
    // The child has the fake already.
    let folder = if std::env::var_os("RINGEST_TEST_CHILD").is_some() { PathBuf::new() } else { build(lacking)? };
    let prepare = |command: &mut Command| {
        command.env("LD_LIBRARY_PATH", &folder).envs(environment.iter().copied());
        // The driver keeps its library, and what the sanitizer sees of it, to the end.
        command.env("ASAN_OPTIONS", "detect_leaks=0");
    };
    in_child_with(name, prepare, body);
    Ok(())
}

/// A function of the libcuda that is loaded.
///
/// # Safety
/// `F` is the type of a pointer to the function of this name.
pub unsafe fn driver_function<F: Copy>(name: &str) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    let name = CString::new(name).unwrap();
    // SAFETY: the library's initialisers have run, or have no preconditions; the caller vouches for the type.
    unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        if library.is_null() {
            return None;
        }
        let found = libc::dlsym(library, name.as_ptr());
        (!found.is_null()).then(|| std::mem::transmute_copy(&found))
    }
}

/// The fake's controls and books.
#[derive(Clone, Copy)]
pub struct Fake {
    fail: unsafe extern "C" fn(c_long, c_uint),
    calls: unsafe extern "C" fn() -> c_long,
    call: unsafe extern "C" fn(c_long) -> *const c_char,
    live: unsafe extern "C" fn() -> c_long,
    report: unsafe extern "C" fn() -> *const c_char,
    misuses: unsafe extern "C" fn() -> c_long,
    misuse: unsafe extern "C" fn() -> *const c_char,
    depth: unsafe extern "C" fn() -> c_long,
    capture_mode: unsafe extern "C" fn() -> c_uint,
    sync_memops: unsafe extern "C" fn() -> u64,
}

impl Fake {
    /// The fake this process has loaded.
    pub fn get() -> Self {
        Self::find().expect("the fake is loaded")
    }

    pub fn find() -> Option<Self> {
        // SAFETY: the types are those of fake_cuda.c.
        unsafe {
            Some(Self {
                fail: driver_function("fake_cuda_fail")?,
                calls: driver_function("fake_cuda_calls")?,
                call: driver_function("fake_cuda_call")?,
                live: driver_function("fake_cuda_live")?,
                report: driver_function("fake_cuda_report")?,
                misuses: driver_function("fake_cuda_misuses")?,
                misuse: driver_function("fake_cuda_misuse")?,
                depth: driver_function("fake_cuda_depth")?,
                capture_mode: driver_function("fake_cuda_capture_mode")?,
                sync_memops: driver_function("fake_cuda_sync_memops")?,
            })
        }
    }

    /// Makes the `k`-th call from now fail (0: none), and counts from 0.
    pub fn fail(&self, k: u64, code: u32) {
        // SAFETY: no preconditions, here and below; the texts live as long as the library.
        unsafe { (self.fail)(k as c_long, code) }
    }

    pub fn calls(&self) -> u64 {
        // SAFETY: as above.
        unsafe { (self.calls)() as u64 }
    }

    /// Name of the `k`-th call.
    pub fn call(&self, k: u64) -> String {
        // SAFETY: as above.
        unsafe { CStr::from_ptr((self.call)(k as c_long)) }.to_string_lossy().into_owned()
    }

    pub fn live(&self) -> i64 {
        // SAFETY: as above.
        unsafe { (self.live)() }
    }

    pub fn report(&self) -> String {
        // SAFETY: as above.
        unsafe { CStr::from_ptr((self.report)()) }.to_string_lossy().into_owned()
    }

    /// How often the driver was misused, and how first.
    pub fn misuses(&self) -> (i64, String) {
        // SAFETY: as above.
        unsafe { ((self.misuses)(), CStr::from_ptr((self.misuse)()).to_string_lossy().into_owned()) }
    }

    /// Contexts on this thread's stack.
    pub fn depth(&self) -> i64 {
        // SAFETY: as above.
        unsafe { (self.depth)() }
    }

    pub fn capture_mode(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (self.capture_mode)() }
    }

    /// The address whose SYNC_MEMOPS was set last.
    pub fn sync_memops(&self) -> u64 {
        // SAFETY: as above.
        unsafe { (self.sync_memops)() }
    }

    #[track_caller]
    pub fn assert_even(&self) {
        assert_eq!(self.misuses(), (0, String::new()));
        assert_eq!(self.live(), 0, "left behind: {}", self.report());
        assert_eq!((self.depth(), self.capture_mode()), (0, 0));
    }
}
