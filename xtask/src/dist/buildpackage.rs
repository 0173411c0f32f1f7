//! Builds the packages from the source package as Debian does: in a fresh Debian sid that has what
//! the package says it needs and no more, without a network. lintian, where it is installed, reads
//! the result.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::prepare::{Prepared, Request, prepare};
use barlease_lab::report::seconds;
use barlease_lab::system::{Disk, Root};

use super::{Maker, output};

/// The package that every build of a Debian package may rely on.
const ESSENTIAL: &str = "build-essential";

const SCRIPT: &str = r#"
set -eu
mkdir /build
cd /build
dpkg-source --extract /mnt/*.dsc sources
cd sources
dpkg-checkbuilddeps
unshare --net dpkg-buildpackage --no-sign --build=binary
cp ../*.deb ../*.changes ../*.buildinfo /mnt/
echo done
"#;

/// Builds from these files of a source package, and returns what that gives.
pub(super) fn run(maker: &Maker, source: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if !Disk::can_enter() {
        bail!("only root may mount the disk of the system that builds: run this as root");
    }
    let start = Instant::now();
    let folder = maker.out.join("built");
    cache::remove(&folder)?;
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    for file in source {
        let to = folder.join(file.file_name().unwrap_or_default());
        fs::copy(file, &to).with_context(|| format!("write {}", to.display()))?;
    }
    let prepared = prepare(&Request::default())?;
    let disk = system(&prepared, source)?.copy_to(maker.out.join("build.img"))?;
    let said = disk.enter(&folder, &prepared, SCRIPT)?;
    if !said.trim_end().ends_with("done") {
        bail!("the build has not come to its end:\n{said}");
    }
    cache::remove(&maker.out.join("build.img"))?;
    let mut made = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        made.push(entry?.path());
    }
    made.sort();
    eprintln!(
        "built from the source package in {}",
        seconds(start.elapsed())
    );
    Ok(made)
}

/// A system with what the source package says that it needs.
fn system(prepared: &Prepared, source: &[PathBuf]) -> Result<Root> {
    let is_description = |file: &&PathBuf| file.extension().is_some_and(|kind| kind == "dsc");
    let description = source.iter().find(is_description);
    let description = description.context("a source package has a .dsc")?;
    let needed = needed(description)?;
    let mut names = vec![ESSENTIAL];
    names.extend(needed.iter().map(String::as_str));
    Root::prepare(prepared, &names)
}

fn needed(description: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(description)
        .with_context(|| format!("read {}", description.display()))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Build-Depends:"));
    Ok(super::install::names(line.unwrap_or_default()).collect())
}

/// Has lintian read files, if it is there. All that it reports is an error here: it is mended or
/// overridden with a reason.
pub(super) fn lint(files: &[PathBuf]) -> Result<()> {
    if super::need("lintian", "lintian").is_err() {
        eprintln!("lintian is not installed: nothing was linted");
        return Ok(());
    }
    let mut lint = Command::new("lintian");
    lint.args(["--fail-on", "error,warning", "--tag-display-limit", "0"]);
    let is_read = |file: &&PathBuf| {
        let kind = file.extension().unwrap_or_default();
        ["changes", "dsc", "deb"].iter().any(|read| kind == *read)
    };
    lint.arg("--allow-root").args(files.iter().filter(is_read));
    print!("{}", output(&mut lint, "lintian")?);
    Ok(())
}
