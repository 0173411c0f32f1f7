//! The source package: the sources of the last commit, the crates that they need, and a `debian/`
//! whose rules call this tool again. So what goes where in each package is said in one place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::report::Step;

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
    let path = stage.root().join(".cargo/config.toml");
    let ours = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    stage.write(".cargo/config.toml", format!("{ours}\n{VENDORED}"))?;
    step.done();
    Ok(())
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

/// What a source package says of a binary package, from the template of that.
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
