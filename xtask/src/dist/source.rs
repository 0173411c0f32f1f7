//! The source package: the sources of the last commit, the crates that they need, and a `debian/`
//! whose rules call this tool again. So what goes where in each package is said in one place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::report::Step;
use serde_json::Value;

use super::deb::{changelog, maintainer};
use super::stage::Stage;
use super::{Maker, fill, need, output};
use crate::checkout;

/// The binary packages that it makes. The overlay's is not among them: it follows from a kernel's
/// build.
const PACKAGES: &[&str] = &[
    "barlease",
    "barleased",
    "barlease-dkms",
    "barlease-dkms-vfio-pci",
    "barlease-dev",
    "libbarlease0",
    "libbarlease-dev",
];

/// Fields that `dpkg-deb` wants in a control file, and a source package does not.
const OF_BINARY: &[&str] = &["Version:", "Maintainer:", "Installed-Size:", "Source:"];

/// cargo's setting for it.
const VENDORED: &str = r#"
[source.crates-io]
replace-with = "vendored"

[source.vendored]
directory = "vendor"
"#;

pub(super) fn source(maker: &Maker) -> Result<Vec<PathBuf>> {
    need("dpkg-source", "dpkg-dev")?;
    if !checkout::top().join(".git").exists() {
        bail!("a source package is made of a commit, and this is no git checkout");
    }
    let name = format!("barlease-{}", maker.version);
    let stage = Stage::new(maker.out.join("stage-source").join(&name))?;
    sources(&stage)?;
    vendor(&stage)?;
    debian(maker, &stage)?;
    let step = Step::start("packing the sources");
    let mut pack = Command::new("dpkg-source");
    pack.args(["--build", &name])
        .current_dir(maker.out.join("stage-source"));
    output(&mut pack, "pack the sources")?;
    step.done();
    let mut made = Vec::new();
    for kind in ["dsc", "tar.xz"] {
        let file = format!("barlease_{}.{kind}", maker.version);
        let to = maker.out.join(&file);
        fs::rename(maker.out.join("stage-source").join(&file), &to)
            .with_context(|| format!("keep {}", to.display()))?;
        made.push(to);
    }
    cache::remove(&maker.out.join("stage-source"))?;
    Ok(made)
}

/// The files of the last commit.
fn sources(stage: &Stage) -> Result<()> {
    let mut archive = Command::new("git");
    archive
        .args(["archive", "--format=tar", "HEAD"])
        .current_dir(checkout::top());
    let mut archive = archive
        .stdout(Stdio::piped())
        .spawn()
        .context("start git")?;
    let mut unpack = Command::new("tar");
    unpack
        .args(["--extract", "--directory"])
        .arg(stage.root())
        .stdin(archive.stdout.take().map_or_else(Stdio::null, Stdio::from));
    let unpacked = unpack.status().context("start tar")?;
    if !archive.wait()?.success() || !unpacked.success() {
        bail!("git or tar failed for the sources of the last commit");
    }
    Ok(())
}

/// The crates, and the setting that has cargo take them.
fn vendor(stage: &Stage) -> Result<()> {
    let step = Step::start("gathering the crates");
    let mut vendor = checkout::cargo(".");
    vendor
        .args(["vendor", "--quiet", "--locked", "--versioned-dirs"])
        .arg("--manifest-path")
        .arg(stage.root().join("Cargo.toml"))
        .arg("vendor")
        .current_dir(stage.root());
    output(&mut vendor, "gather the crates")?;
    for folder in super::contents::pages(&stage.root().join("vendor"))? {
        forget_left_out(&folder)?;
    }
    let path = stage.root().join(".cargo/config.toml");
    let ours = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    stage.write(".cargo/config.toml", format!("{ours}\n{VENDORED}"))?;
    step.done();
    Ok(())
}

/// Takes the files out of a crate's list of checksums that `dpkg-source` leaves out of its archive.
fn forget_left_out(folder: &Path) -> Result<()> {
    let path = folder.join(".cargo-checksum.json");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let mut list: Value = serde_json::from_str(&text).context("read checksums of a crate")?;
    if let Some(files) = list["files"].as_object_mut() {
        files.retain(|file, _| !file.split('/').any(is_left_out));
    }
    fs::write(&path, list.to_string()).with_context(|| format!("write {}", path.display()))
}

/// Whether `dpkg-source` leaves a file or folder of that name out: what version control, editors
/// and compilers leave behind.
fn is_left_out(name: &str) -> bool {
    let starts = [".git", ".hg", ".bzr", ".svn", ".cvs", ".arch", ".#", ",,"];
    let ends = [".a", ".la", ".o", ".so", ".swp", "~"];
    let names = [
        "CVS", "RCS", "_MTN", "_darcs", "{arch}", ".shelf", ".deps", ".be", "DEADJOE",
    ];
    starts.iter().any(|start| name.starts_with(start))
        || ends.iter().any(|end| name.ends_with(end))
        || names.contains(&name)
}

fn debian(maker: &Maker, stage: &Stage) -> Result<()> {
    let maintainer = maintainer();
    let words = [("MAINTAINER", maintainer.as_str())];
    let mut control = fill(Path::new("source/control"), &words)?;
    for package in PACKAGES {
        let template = Path::new("dist/debian").join(format!("{package}.control"));
        let template = fs::read_to_string(checkout::top().join(&template))
            .with_context(|| format!("read {}", template.display()))?;
        control.push('\n');
        control += &stanza(&template);
    }
    stage.write("debian/control", control)?;
    stage.write(
        "debian/changelog",
        changelog(maker, "barlease", &maker.version)?,
    )?;
    let copyright = super::contents::copyright("source/copyright")?;
    stage.write("debian/copyright", copyright)?;
    stage.write("debian/source/format", "3.0 (native)\n")?;
    stage.program("debian/rules", fill(Path::new("source/rules"), &[])?)
}

/// The entry of a source package for a binary package, from the template of that.
fn stanza(template: &str) -> String {
    let wanted = |line: &&str| !OF_BINARY.iter().any(|field| line.starts_with(field));
    let text: String = template
        .lines()
        .filter(wanted)
        .flat_map(|line| [line, "\n"])
        .collect();
    text.replace("@VERSION@", "${binary:Version}")
        .replace("@DEPENDS@", "${shlibs:Depends}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_of_what_is_packed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".cargo-checksum.json");
        let list = r#"{"files":{"src/a.rs":"1",".gitmodules":"2","lib/x.a":"3",".github/y":"4"}}"#;
        fs::write(&path, list).unwrap();
        forget_left_out(folder.path()).unwrap();
        let left = fs::read_to_string(&path).unwrap();
        assert_eq!(left, r#"{"files":{"src/a.rs":"1"}}"#);
    }

    #[test]
    fn no_word_is_left_in_the_control_file() {
        for package in PACKAGES {
            let path = format!("dist/debian/{package}.control");
            let template = fs::read_to_string(checkout::top().join(path)).unwrap();
            let text = stanza(&template);
            assert!(
                text.starts_with(&format!("Package: {package}\nArch")),
                "{text}"
            );
            assert_eq!(super::super::unfilled(&text), None, "{package}");
        }
    }
}
