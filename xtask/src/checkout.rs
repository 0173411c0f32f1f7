//! Where the checkout is, and how cargo is called in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use barlease_lab::prepare::Prepared;
use barlease_lab::programs::{self, Folders};
use serde_json::Value;

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

/// Cargo in `guest-tests/`, whose settings link statically, for guests with that kernel: this
/// machine's own, or, for another architecture, that of the tool chain.
///
/// # Errors
///
/// When crates cannot be fetched, or the tool chain cannot be entered.
pub(crate) fn guest_cargo(prepared: &Prepared, subcommand: &str) -> Result<Command> {
    let arch = prepared.kernel.arch();
    if arch.is_native() {
        let mut command = cargo("guest-tests");
        command.arg(subcommand);
        return Ok(command);
    }
    let for_guests = ["--target", arch.rust_target()];
    let mut fetch = cargo("guest-tests");
    let status = fetch.args(["fetch", "--quiet"]).args(for_guests).status();
    if !status.context("start cargo")?.success() {
        bail!("`cargo fetch` failed");
    }
    let (top, products, home) = (top(), target(), cargo_home()?);
    let folders = folders(&top, &home, &products);
    let mut command = programs::cargo(prepared, folders, "guest-tests")?;
    command.arg(subcommand).args(for_guests);
    Ok(command)
}

/// Where on the host a file is that [`guest_cargo`] has named.
pub(crate) fn outside(prepared: &Prepared, path: &Path) -> Result<PathBuf> {
    let (top, products, home) = (top(), target(), cargo_home()?);
    let folders = folders(&top, &home, &products);
    Ok(if prepared.kernel.arch().is_native() {
        path.to_owned()
    } else {
        programs::outside(prepared, folders, path)
    })
}

fn folders<'a>(checkout: &'a Path, cargo_home: &'a Path, target: &'a Path) -> Folders<'a> {
    Folders {
        checkout,
        cargo_home,
        target,
    }
}

/// Where cargo keeps what it has downloaded.
fn cargo_home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let default = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"));
    home.or_else(default)
        .context("neither CARGO_HOME nor HOME says where cargo keeps its crates")
}

/// The path of the program among what building it has said, as cargo's messages in JSON.
fn executable(messages: &str) -> Option<PathBuf> {
    let named = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    };
    messages.lines().rev().find_map(named)
}

/// Builds a program of the workspace so that it runs in a guest with that kernel, and returns its
/// path.
pub(crate) fn guest_program(prepared: &Prepared, package: &str, program: &str) -> Result<PathBuf> {
    build_for_guests(prepared, package, "--bin", program)
}

/// The same, of an example of the package.
pub(crate) fn guest_example(prepared: &Prepared, package: &str, example: &str) -> Result<PathBuf> {
    build_for_guests(prepared, package, "--example", example)
}

fn build_for_guests(prepared: &Prepared, package: &str, kind: &str, name: &str) -> Result<PathBuf> {
    let mut build = guest_cargo(prepared, "build")?;
    build.args([
        "--quiet",
        "--release",
        "--message-format",
        "json-render-diagnostics",
        "--package",
        package,
        kind,
        name,
    ]);
    build.stderr(Stdio::inherit());
    let output = build.output().context("start cargo")?;
    let path = executable(&String::from_utf8_lossy(&output.stdout));
    match path.filter(|_| output.status.success()) {
        Some(path) => outside(prepared, &path),
        None => bail!("`{name}` does not build for guests"),
    }
}
