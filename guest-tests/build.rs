//! Compiles the example of the C interface, which `tests/capi.rs` is linked with.

use std::env;
use std::path::PathBuf;

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let source = here.join("../capi/examples/lease.c");
    let header = here.join("../capi/include");
    println!("cargo::rerun-if-changed={}", source.display());
    println!("cargo::rerun-if-changed={}", header.display());
    cc::Build::new()
        .file(&source)
        .include(&header)
        .std("c11")
        .opt_level(2)
        .extra_warnings(true)
        .warnings_into_errors(true)
        // The test has a `main` of its own.
        .define("main", "barlease_example_main")
        // Only what refers to it gets it: the test names the library.
        .cargo_metadata(false)
        .compile("barlease_example");
    println!("cargo::rustc-link-search=native={}", out.display());
}
