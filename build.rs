//! Gives the shared library its soname and keeps it loaded: rings and their memory must not vanish under DMA.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let major = env!("CARGO_PKG_VERSION_MAJOR");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libringest.so.{major}");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    #[cfg(feature = "testing")]
    device_consumer();
}

/// The device header's consumer as host code, for the simulator.
#[cfg(feature = "testing")]
fn device_consumer() {
    for source in ["src/testing/pop.cpp", "include/ringest_device.cuh", "include/ringest_wire.h"] {
        println!("cargo::rerun-if-changed={source}");
    }
    cc::Build::new()
        .cpp(true)
        // The header needs nothing of the C++ library.
        .cpp_link_stdlib(None)
        .std("c++17")
        .flag("-fno-exceptions")
        .flag("-fno-rtti")
        .include("include")
        .file("src/testing/pop.cpp")
        .compile("ringest_testing_pop");
}
