//! Compiles the example of the C interface, which `tests/capi.rs` is linked with.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let source = here.join("../capi/examples/lease.c");
    let header = here.join("../capi/include");
    println!("cargo::rerun-if-changed={}", source.display());
    println!("cargo::rerun-if-changed={}", header.display());
    let object = out.join("lease.o");
    let status = Command::new("cc")
        .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-c"])
        // The test has a `main` of its own.
        .arg("-Dmain=barlease_example_main")
        .arg("-I")
        .arg(&header)
        .arg("-o")
        .arg(&object)
        .arg(&source)
        .status()
        .expect("a C compiler");
    assert!(status.success(), "{} does not compile", source.display());
    let archive = out.join("libbarlease_example.a");
    let status = Command::new("ar")
        .arg("crs")
        .arg(&archive)
        .arg(&object)
        .status()
        .expect("ar, of the C compiler");
    assert!(status.success(), "{} is not made", archive.display());
    // Only what refers to it gets it: the test names the library.
    println!("cargo::rustc-link-search=native={}", out.display());
}
