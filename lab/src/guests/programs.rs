//! Programs for guests of another architecture: cargo and a cross compiler, both in the tool chain.
//!
//! The checkout, cargo's home and the folder for build products are bound into the tool chain. The
//! host's own cargo fetches the crates that are needed before: inside, nothing is downloaded.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::kernels::prepare::Prepared;

/// Where they are in the tool chain.
const CHECKOUT: &str = "/work";
const CARGO_HOME: &str = "/input";
const TARGET: &str = "/home";

/// The folders of the host that cargo in the tool chain works on.
#[derive(Clone, Copy, Debug)]
pub struct Folders<'a> {
    /// The checkout.
    pub checkout: &'a Path,
    /// Cargo's home, with the crates.
    pub cargo_home: &'a Path,
    /// For build products; has a folder for each architecture.
    pub target: &'a Path,
}

/// Cargo in the tool chain, in a folder of the checkout, for the architecture of a kernel. Its
/// subcommand is to be added first, then `--target` as [`crate::arch::Arch::rust_target`] says it.
///
/// # Errors
///
/// When the tool chain cannot be entered, or has no cargo.
pub fn cargo(prepared: &Prepared, folders: Folders<'_>, inside: &str) -> Result<Command> {
    let arch = prepared.kernel.arch();
    if !prepared.sysroot.path("usr/bin/cargo").exists() {
        bail!("the tool chain has no cargo: it is there for guests of another architecture only");
    }
    let target = folders.target.join(arch.name());
    std::fs::create_dir_all(&target).with_context(|| format!("make {}", target.display()))?;
    let mut command = prepared.sysroot.enter(&[
        (folders.checkout, CHECKOUT),
        (folders.cargo_home, CARGO_HOME),
        (&target, TARGET),
    ])?;
    command
        .args(["env", "--chdir"])
        .arg(Path::new(CHECKOUT).join(inside))
        .arg(format!("CARGO_HOME={CARGO_HOME}"))
        .arg(format!("CARGO_TARGET_DIR={TARGET}"))
        // Nobody has chosen which compiler `cc` is.
        .args([
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=gcc",
            "HOST_CC=gcc",
        ])
        .args(["CARGO_NET_OFFLINE=true", "cargo"]);
    Ok(command)
}

/// The path on the host of what cargo in the tool chain has named.
#[must_use]
pub fn outside(prepared: &Prepared, folders: Folders<'_>, path: &Path) -> std::path::PathBuf {
    let target = folders.target.join(prepared.kernel.arch().name());
    path.strip_prefix(TARGET)
        .map_or_else(|_| path.to_owned(), |inside| target.join(inside))
}

/// Whether a program asks for a dynamic loader, which no guest has.
#[must_use]
pub fn needs_libraries(program: &[u8]) -> bool {
    /// The type of the program header that names the loader.
    const INTERPRETER: u32 = 3;
    let word = |at: usize| {
        Some(u16::from_le_bytes(
            program.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let long = |at: usize| {
        Some(u32::from_le_bytes(
            program.get(at..at + 4)?.try_into().ok()?,
        ))
    };
    let read = || -> Option<bool> {
        // A 64-bit ELF file: header table at 32, size of an entry at 54, number of entries at 56.
        if !program.starts_with(b"\x7fELF\x02") {
            return None;
        }
        let table = long(32)? as usize;
        let (size, count) = (usize::from(word(54)?), usize::from(word(56)?));
        Some((0..count).any(|entry| long(table + entry * size) == Some(INTERPRETER)))
    };
    read().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn this_test_needs_libraries_and_a_script_does_not() {
        let this = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(needs_libraries(&this), !cfg!(target_feature = "crt-static"));
        assert!(!needs_libraries(b"#!/bin/sh\n"));
        assert!(!needs_libraries(b"\x7fELF\x02"));
    }
}
