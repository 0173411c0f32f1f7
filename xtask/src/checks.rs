//! Checks of the crates by tools that are not part of every tool chain.
//!
//! A tool is built once, at a version that is written here, into the cache folder. Where it cannot
//! be had the check is skipped, and the summary says why.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use barlease_lab::cache::Cache;

use crate::checkout;
use crate::steps::Steps;

/// The oldest compiler that the crates promise to build with: `rust-version` in Cargo.toml.
const OLDEST: &str = "1.85.0";

pub(crate) fn host(steps: &mut Steps) {
    dependencies(steps);
    oldest(steps);
    interface(steps);
    book(steps);
}

/// The library with all its features, which nothing else in the workspace turns on.
pub(crate) fn library(steps: &mut Steps) {
    let all = ["-p", "barlease", "--all-features"];
    let clippy = [&["clippy", "--quiet", "--all-targets"], &all[..]].concat();
    let clippy = [&clippy[..], &["--", "-D", "warnings"]].concat();
    steps.cargo("clippy on the library, all features", "", &clippy);
    let test = [&["test", "--no-fail-fast"], &all[..]].concat();
    steps.cargo("tests of the library, all features", "", &test);
    steps.command(
        "documentation of the library, as docs.rs builds it",
        checkout::cargo("")
            .env("RUSTDOCFLAGS", "-D warnings")
            .args(["doc", "--quiet", "--no-deps"])
            .args(all),
    );
}

fn dependencies(steps: &mut Steps) {
    let name = "dependencies (cargo deny)";
    match tool("cargo-deny", "0.20.2", &[]) {
        Ok(program) => steps.command(
            name,
            Command::new(program)
                .current_dir(checkout::top())
                // Advisories need the network, and change without us: `cargo deny check` by hand.
                .args(["deny", "--log-level", "error", "check"])
                .args(["bans", "licenses", "sources"]),
        ),
        Err(error) => steps.skip(name, &format!("{error:#}")),
    }
}

fn oldest(steps: &mut Steps) {
    let name = format!("library, C interface and command with Rust {OLDEST}");
    let cargo = || {
        let mut command = Command::new("rustup");
        command
            .args(["run", OLDEST, "cargo"])
            .current_dir(checkout::top())
            .env_remove("CARGO")
            .env_remove("RUSTC")
            .env_remove("RUSTUP_TOOLCHAIN");
        command
    };
    if !answers(cargo().arg("--version")) {
        steps.skip(
            &name,
            &format!("that tool chain is not here: rustup toolchain install {OLDEST}"),
        );
        return;
    }
    steps.command(
        &name,
        cargo()
            .args(["check", "--quiet", "--all-targets", "--target-dir"])
            .arg(checkout::target().join("oldest"))
            .args([
                "-p",
                "barlease",
                "-p",
                "barlease-capi",
                "-p",
                "barlease-cli",
            ])
            .args(["--features", "barlease/fake,barlease/tokio"]),
    );
}

fn interface(steps: &mut Steps) {
    let name = "the library's interface (cargo semver-checks)";
    match tag() {
        None => steps.skip(name, "no version has been tagged yet"),
        Some(tag) => match tool("cargo-semver-checks", "0.51.0", &[]) {
            Ok(program) => steps.command(
                name,
                Command::new(program)
                    .current_dir(checkout::top())
                    .args(["semver-checks", "--package", "barlease"])
                    .args(["--baseline-rev", &tag]),
            ),
            Err(error) => steps.skip(name, &format!("{error:#}")),
        },
    }
}

/// Its links are a test of this crate.
fn book(steps: &mut Steps) {
    let name = "documentation as a book (mdbook)";
    // Without a web server and a watcher of files.
    match tool("mdbook", "0.5.4", &["--no-default-features"]) {
        Ok(program) => steps.command(
            name,
            Command::new(program)
                .current_dir(checkout::top())
                .args(["build", "docs", "--dest-dir"])
                .arg(checkout::target().join("book")),
        ),
        Err(error) => steps.skip(name, &format!("{error:#}")),
    }
}

/// The last tag that is a version.
fn tag() -> Option<String> {
    let described = Command::new("git")
        .current_dir(checkout::top())
        .args(["describe", "--tags", "--abbrev=0", "--match", "v[0-9]*"])
        .stderr(Stdio::null())
        .output();
    let Output { status, stdout, .. } = described.ok()?;
    let tag = String::from_utf8(stdout).ok()?;
    status.success().then(|| tag.trim().to_owned())
}

fn answers(command: &mut Command) -> bool {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// A program of that crate, built on its first use. Unoptimized: that takes a third of the time.
fn tool(name: &str, version: &str, options: &[&str]) -> Result<PathBuf> {
    let cache = Cache::open()?;
    let _lock = cache.lock(name, "install it")?;
    let root = cache.path(format!("tools/{name}-{version}"));
    let program = root.join("bin").join(name);
    if program.exists() {
        return Ok(program);
    }
    println!("installing {name} {version} into the cache");
    let status = checkout::cargo("")
        .args(["install", "--quiet", "--locked", "--debug", "--version"])
        .args([version, "--root"])
        .arg(&root)
        .args(options)
        .arg(name)
        .env_remove("CARGO_TARGET_DIR")
        .status()
        .context("start cargo")?;
    if !status.success() {
        bail!("{name} {version} cannot be installed here");
    }
    Ok(program)
}
