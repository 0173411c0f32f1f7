//! `cargo xtask kmod`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use anyhow::{Context, Result, bail};
use barlease_lab::kmod::{self, Built, Task};
use barlease_lab::prepare::{Prepared, Request, prepare};
use clap::{Args, Subcommand};

use crate::checkout;
use crate::choice::KernelChoice;

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    kernel: KernelChoice,
    /// Fail when there is a warning
    #[arg(long, global = true)]
    deny_warnings: bool,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Build it (the default)
    Build,
    /// Build it under the name of the stock module, vfio-pci, whose place it then takes
    AsStock,
    /// Check it with clippy, with the kernel's own settings
    Clippy,
    /// Format it
    Fmt {
        /// Only say whether it is formatted
        #[arg(long)]
        check: bool,
    },
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if let Some(What::Fmt { check }) = options.what {
        kmod::format(&checkout::top(), check)?;
        return Ok(ExitCode::SUCCESS);
    }
    let prepared = prepare(&Request {
        kernel: options.kernel.kernel.clone(),
        update: false,
    })?;
    match options.what {
        Some(What::Clippy) => clippy(&prepared, options.deny_warnings)?,
        Some(What::AsStock) => {
            println!(
                "{}",
                build_as_stock(&prepared, options.deny_warnings)?.display()
            );
        }
        _ => println!("{}", build(&prepared, options.deny_warnings)?.display()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the module and copies it into the target folder; returns its path there.
pub(crate) fn build(prepared: &Prepared, deny_warnings: bool) -> Result<PathBuf> {
    let built = kmod::build(prepared, &checkout::top(), Task::Build)?;
    refuse_warnings(&built, deny_warnings)?;
    let folder = products(prepared)?;
    let mut copies = Vec::new();
    for module in [&built.module].into_iter().chain(&built.others) {
        let to = folder.join(module.file_name().unwrap_or_default());
        place(module, &to).with_context(|| format!("copy the module to {}", to.display()))?;
        copies.push(to);
    }
    Ok(copies.swap_remove(0))
}

/// The same for the module that takes the stock one's place. Its file has a name of its own there:
/// a guest has the stock one, too.
pub(crate) fn build_as_stock(prepared: &Prepared, deny_warnings: bool) -> Result<PathBuf> {
    let built = kmod::build(prepared, &checkout::top(), Task::BuildAsStock)?;
    refuse_warnings(&built, deny_warnings)?;
    let to = products(prepared)?.join("barlease_as_vfio_pci.ko");
    place(&built.module, &to).with_context(|| format!("copy the module to {}", to.display()))?;
    Ok(to)
}

/// The folder of the modules for a kernel.
fn products(prepared: &Prepared) -> Result<PathBuf> {
    let folder = checkout::target().join("kmod").join(&prepared.kernel.name);
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// Copies a file unless it is there: another guest may be about to load it.
fn place(from: &Path, to: &Path) -> io::Result<()> {
    let content = fs::read(from)?;
    if fs::read(to).is_ok_and(|there| there == content) {
        return Ok(());
    }
    let new = to.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, content)?;
    fs::rename(new, to)
}

/// Checks the module with clippy.
pub(crate) fn clippy(prepared: &Prepared, deny_warnings: bool) -> Result<()> {
    let built = kmod::build(prepared, &checkout::top(), Task::Clippy)?;
    refuse_warnings(&built, deny_warnings)
}

fn refuse_warnings(built: &Built, deny: bool) -> Result<()> {
    if deny && !built.warnings.is_empty() {
        bail!(
            "{} warnings, which --deny-warnings forbids",
            built.warnings.len()
        );
    }
    Ok(())
}
