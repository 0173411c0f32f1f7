//! `cargo xtask random`: the random test, for as long as is wanted.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::checkout;
use crate::choice::KernelChoice;

/// The time that a guest takes besides, on a kernel that watches itself and a machine that does
/// other things: to boot, to end.
const BESIDES: u64 = 900;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    kernel: KernelChoice,
    /// Draw the same steps again [default: a fresh seed, which is printed]
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// How long, in minutes
    #[arg(long, default_value = "2", value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..100_000))]
    minutes: u64,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let seconds = options.minutes * 60;
    let mut cargo = checkout::cargo("guest-tests");
    cargo.args(["test", "--test", "random", "--", "--nocapture"]);
    cargo.env("BARLEASE_TEST_SECONDS", seconds.to_string());
    cargo.env("BARLEASE_TIMEOUT", (seconds + BESIDES).to_string());
    if let Some(seed) = options.seed {
        cargo.env("BARLEASE_TEST_SEED", seed.to_string());
    }
    if let Some(kernel) = &options.kernel.kernel {
        cargo.env("BARLEASE_KERNEL", kernel);
    }
    let status = cargo.status().context("start cargo")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
