//! Where the checkout is, and how cargo is called in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The top folder of the checkout.
pub(crate) fn top() -> PathBuf {
    // cargo says where the package is now; the compiler only knew where it was.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let package = package.filter(|path| path.join("src/checkout.rs").exists());
    let package = package.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    package
        .parent()
        .map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// The folder for build products.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| top().join("target"), PathBuf::from)
}

/// cargo, in a folder of the checkout, without what the cargo that runs us has set for us.
pub(crate) fn cargo(folder: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(top().join(folder));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_")
            || text.starts_with("CARGO_MANIFEST_")
            || text == "CARGO_ENCODED_RUSTFLAGS"
        {
            command.env_remove(&name);
        }
    }
    command
}

/// Builds a program of the workspace so that it runs in a guest, and returns its path.
pub(crate) fn guest_program(package: &str, program: &str) -> Result<PathBuf> {
    build_for_guests(package, "--bin", program)
}

/// The same, of an example of the package.
pub(crate) fn guest_example(package: &str, example: &str) -> Result<PathBuf> {
    build_for_guests(package, "--example", example)
}

fn build_for_guests(package: &str, kind: &str, name: &str) -> Result<PathBuf> {
    // That folder's settings link statically.
    let mut build = cargo("guest-tests");
    build.args(["build", "--quiet", "--release", "--package", package]);
    build.args([kind, name]);
    let status = build.status().context("start cargo")?;
    if !status.success() {
        bail!("`{name}` does not build for guests");
    }
    let folder = target().join("x86_64-unknown-linux-gnu/release");
    Ok(match kind {
        "--example" => folder.join("examples").join(name),
        _ => folder.join(name),
    })
}
