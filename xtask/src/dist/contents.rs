//! The files of each package, and their places.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::deb::Deb;
use super::stage::Stage;
use super::{Maker, command, fill, manuals};
use crate::checkout;

/// Where units are in the checkout, and in a package.
pub(super) const UNITS: &str = "dist/systemd";
pub(super) const UNIT_PLACE: &str = "usr/lib/systemd/system";

/// The text that copyright files name.
pub(super) fn licences(stage: &Stage, place: &Path) -> Result<()> {
    let file = "LICENSE-MIT";
    stage.copy(&checkout::top().join(file), place.join(file))
}

/// Licences, changes, how to install, examples.
pub(super) fn documents(stage: &Stage, place: &Path) -> Result<()> {
    let top = checkout::top();
    for file in [
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "CHANGELOG.md",
        "docs/install.md",
    ] {
        let name = Path::new(file).file_name().unwrap_or_default();
        stage.copy(&top.join(file), place.join(name))?;
    }
    stage.copy_tree(&top.join("dist/examples"), &place.join("examples"), &|_| {
        true
    })
}

pub(super) fn copyright(more: &str) -> Result<String> {
    let base = fill(Path::new("debian/copyright"), &[])?;
    if more.is_empty() {
        return Ok(base);
    }
    Ok(base + &fill(Path::new(more), &[])?)
}

pub(super) fn command(maker: &Maker, built: &command::Built) -> Result<PathBuf> {
    let stage = Stage::new(maker.out.join("stage-barlease"))?;
    stage.program("usr/bin/barlease", fs::read(&built.program.file)?)?;
    for page in pages(&built.manuals)? {
        let name = page.file_name().unwrap_or_default().to_string_lossy();
        let place = format!("usr/share/man/man{}/{name}.gz", manuals::SECTION);
        stage.write(place, command::gzip(&page)?)?;
    }
    stage.copy(
        &built.bash,
        "usr/share/bash-completion/completions/barlease",
    )?;
    stage.copy(&built.zsh, "usr/share/zsh/vendor-completions/_barlease")?;
    stage.copy(
        &built.fish,
        "usr/share/fish/vendor_completions.d/barlease.fish",
    )?;
    let unit = "barlease-bind@.service";
    stage.copy(
        &checkout::top().join(UNITS).join(unit),
        Path::new(UNIT_PLACE).join(unit),
    )?;
    let doc = Path::new("usr/share/doc/barlease");
    documents(&stage, doc)?;
    stage.write(
        doc.join("copyright"),
        copyright("debian/copyright-command")?,
    )?;
    stage.write(doc.join("third-party-licences"), &built.program.licences)?;
    Deb::new("barlease", &maker.version).pack(maker, &stage, &[])
}

pub(super) fn pages(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut pages: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    pages.sort();
    Ok(pages)
}
