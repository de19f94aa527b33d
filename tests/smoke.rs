//! A C program, compiled against the committed header and run with the shared and with the static library.

#[path = "common/c.rs"]
mod c;

use c::Link;
use std::path::Path;

fn reads(name: &str, link: Link) {
    let folder = c::Folder::new(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("c_tests/reads.c");
    match c::compile(&source, &folder.0, link) {
        Some(program) => drop(c::run(&program, &folder.0, &[])),
        None => println!("SKIP smoke: there is no C compiler"),
    }
}

#[test]
fn a_c_program_reads_through_the_shared_library() {
    reads("smoke-shared", Link::Shared);
}

#[test]
fn a_c_program_reads_through_the_static_library() {
    reads("smoke-static", Link::Static);
}
