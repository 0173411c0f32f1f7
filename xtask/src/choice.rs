//! Options that several tasks have: which kernel, and which machine.

use anyhow::Result;
use barlease_lab::prepare::{Prepared, Request, prepare};
use barlease_lab::preset::Preset;
use clap::Args;

/// Which kernel.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct KernelChoice {
    /// The newest kernel whose release begins so, such as 7.2; `rt`, `cloud`, `arm64` or
    /// `arm64-16k` for these flavours, `debug` for the one with KASAN and lockdep [default: the
    /// newest of Debian's]
    #[arg(
        long,
        value_name = "RELEASE",
        env = "BARLEASE_KERNEL",
        hide_env_values = true
    )]
    pub(crate) kernel: Option<String>,
}

/// Which kernel, on which machine.
#[derive(Args, Clone, Debug)]
pub(crate) struct MachineChoice {
    #[command(flatten)]
    pub(crate) kernel: KernelChoice,
    /// The machine, see `cargo xtask vm list`
    #[arg(
        long,
        default_value = "full",
        env = "BARLEASE_PRESET",
        hide_env_values = true
    )]
    pub(crate) preset: Preset,
}

impl MachineChoice {
    pub(crate) fn prepare(&self) -> Result<Prepared> {
        prepare(&Request {
            kernel: self.kernel.kernel.clone(),
            update: false,
        })
    }
}
