//! Compiling and running C programs against the library that cargo has just built.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What the static library needs from the system.
const SYSTEM: [&str; 6] = ["-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-lgcc_s"];

/// The newest library of this name beside this test's executable or one folder up: cargo puts it in either.
fn library(name: &str) -> PathBuf {
    let executable = std::env::current_exe().unwrap();
    let places = executable.ancestors().skip(1).take(2);
    let found = places.map(|folder| folder.join(name)).filter(|path| path.is_file());
    let newest = found.max_by_key(|path| std::fs::metadata(path).and_then(|data| data.modified()).ok());
    newest.unwrap_or_else(|| panic!("cargo builds {name} with the crate"))
}

/// How a program is linked.
#[derive(Clone, Copy)]
pub(crate) enum Link {
    Shared,
    #[allow(dead_code, reason = "not every test links both ways")]
    Static,
}

/// A folder that is gone with the value.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("ringest-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Compiles `source` (C11, or C++17 by its extension) with warnings as errors into `folder`. `None`: no compiler.
pub(crate) fn compile(source: &Path, folder: &Path, link: Link) -> Option<PathBuf> {
    let cpp = source.extension().is_some_and(|extension| extension == "cpp");
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut build = cc::Build::new();
    build.cpp(cpp).cargo_metadata(false).target(&target).host(&target).opt_level(1).out_dir(folder);
    let mut command = Command::new(build.try_get_compiler().ok()?.path());
    Command::new(command.get_program()).arg("--version").output().ok()?;
    let program = folder.join(source.file_stem().unwrap());
    command.arg(if cpp { "-std=c++17" } else { "-std=gnu11" }).args(["-Wall", "-Wextra", "-Werror", "-pthread", "-o"]);
    command.arg(&program).arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include")).arg(source);
    match link {
        Link::Shared => {
            // By its soname, the program looks for libringest.so.0: a link in the program's folder.
            let library = library("libringest.so");
            let _ = std::os::unix::fs::symlink(&library, folder.join("libringest.so.0"));
            command.arg(library).arg(format!("-Wl,-rpath,{}", folder.display()));
        }
        Link::Static => {
            command.arg(library("libringest.a")).args(SYSTEM);
        }
    }
    let compiled = command.output().unwrap();
    assert!(compiled.status.success(), "{command:?}: {}", String::from_utf8_lossy(&compiled.stderr));
    Some(program)
}

/// Runs a program in `folder`, which must succeed.
pub(crate) fn run(program: &Path, folder: &Path, arguments: &[&Path]) -> Output {
    let ran = Command::new(program).current_dir(folder).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{}: {}: {said}", program.display(), ran.status);
    ran
}
