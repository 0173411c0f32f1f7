//! `cargo xtask demo`: the main job, in a guest, with something to look at.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use barlease_lab::prepare::{Request, prepare};
use barlease_lab::preset::Preset;
use barlease_lab::report::seconds;
use barlease_lab::run::Run;
use clap::Args;

use crate::choice::KernelChoice;
use crate::{checkout, kmod};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    kernel: KernelChoice,
}

/// More than ten times what it takes in software emulation.
const LIMIT: Duration = Duration::from_secs(240);

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    let prepared = prepare(&Request {
        kernel: options.kernel.kernel.clone(),
        update: false,
    })?;
    let module = kmod::build(&prepared, false)?;
    let program = checkout::guest_program(&prepared, "barlease-demo", "barlease-demo")?;
    let pictures = checkout::target().join("demo");
    std::fs::create_dir_all(&pictures)
        .with_context(|| format!("make the folder {}", pictures.display()))?;

    println!(
        "\nA guest with the unmodified kernel {} and a display adapter boots; in it one process holds\n\
         the adapter through VFIO and leases parts of its frame buffer to processes of other users; then a daemon does, by a policy.",
        prepared.kernel.release
    );
    let outcome = Run::new(&prepared, Preset::Display.machine())
        .module(module)
        .file(&program, "/lab/bin/barlease-demo")
        .screenshots(&pictures)
        .timeout(LIMIT)
        .command(["/lab/bin/barlease-demo"])
        .run()?;

    println!("\nWhat the guest's display showed:");
    for (picture, caption) in outcome.screenshots.iter().zip([
        "before: two tenants draw, each in its own rows",
        "revoked: the rows of the first are the owner's again, the other tenant goes on",
        "after: the same rows, leased to somebody else",
        "tenants of the daemon: two draw, one waits for more rows than are free",
        "the first was killed: the third has its rows, and those that were free",
    ]) {
        println!("  {}\n      {caption}", picture.display());
    }
    println!(
        "\nKernel log: {} (no warning in it, or this would have failed)\nAll of it took {}, the guest {}.",
        outcome.log.display(),
        seconds(start.elapsed()),
        seconds(outcome.total)
    );
    Ok(ExitCode::from(
        u8::try_from(outcome.code).unwrap_or(u8::MAX),
    ))
}
