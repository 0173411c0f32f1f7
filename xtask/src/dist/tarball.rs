//! The tarball for distributions without packages of ours: command and module.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::report::Step;

use super::contents::{documents, pages};
use super::modules::{BESIDE, sources};
use super::stage::Stage;
use super::{Maker, command, fill};
use crate::checkout;

pub(super) fn make(maker: &Maker, built: &command::Built) -> Result<PathBuf> {
    let name = format!("barlease-{}", maker.version);
    let stage = Stage::new(maker.out.join("stage-tarball"))?;
    let top = Path::new(&name);
    stage.program(top.join("bin/barlease"), fs::read(&built.program.file)?)?;
    for page in pages(&built.manuals)? {
        stage.copy(
            &page,
            top.join("man").join(page.file_name().unwrap_or_default()),
        )?;
    }
    for file in [&built.bash, &built.zsh, &built.fish] {
        let place = top.join("completions");
        stage.copy(file, place.join(file.file_name().unwrap_or_default()))?;
    }
    let header = checkout::top().join("abi/include/barlease.h");
    stage.copy(&header, top.join("include/barlease.h"))?;
    sources(maker, &stage, &top.join("module"), BESIDE)?;
    documents(&stage, &top.join("doc"))?;
    stage.write(
        top.join("doc/third-party-licences.txt"),
        &built.program.licences,
    )?;
    let makefile = fill(
        Path::new("tarball/Makefile"),
        &[("VERSION", &maker.version)],
    )?;
    stage.write(top.join("Makefile"), makefile)?;
    pack(maker, &stage, &name)
}

fn pack(maker: &Maker, stage: &Stage, name: &str) -> Result<PathBuf> {
    let file = maker.out.join(format!("{name}.tar.zst"));
    let new = cache::unfinished(&file);
    let step = Step::start(format!("packing {name}.tar.zst"));
    let mut tar = Command::new("tar")
        .args(["--create", "--format=gnu", "--sort=name", "--numeric-owner"])
        .args(["--owner=0", "--group=0"])
        .arg(format!("--mtime=@{}", maker.epoch))
        .arg("--directory")
        .arg(stage.root())
        .arg(name)
        .stdout(Stdio::piped())
        .spawn()
        .context("start tar")?;
    let mut zstd = Command::new("zstd");
    zstd.args(["-q", "-19", "--force", "-o"])
        .arg(&new)
        .stdin(tar.stdout.take().map_or_else(Stdio::null, Stdio::from));
    let status = zstd.status().context("start zstd")?;
    if !tar.wait()?.success() || !status.success() {
        bail!("tar or zstd failed for {}", file.display());
    }
    fs::rename(&new, &file)?;
    cache::remove(stage.root())?;
    step.done();
    Ok(file)
}
