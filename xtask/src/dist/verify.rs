//! Uses what was packaged: the module is built from the sources in its package as DKMS builds them,
//! against the headers and the overlay in its package, and is loaded in a guest, where the packaged
//! command leases with it.
//!
//! [`install`](super::install) runs the maintainer scripts, and DKMS itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::kmod::{DRIVER, MODULE};
use barlease_lab::prepare::Prepared;
use barlease_lab::preset::Preset;
use barlease_lab::report::{Step, seconds};
use barlease_lab::run::{Output, Run};

use super::{Maker, VERSION, output};

/// As DKMS does: reads `dkms.conf`, runs the check, runs make. `$1` the kernel's build folder, `$2`
/// its release.
const BUILD: &str = r#"
set -eu
kernel_source_dir=$1 kernelver=$2
. ./dkms.conf
./$PRE_BUILD
eval "${MAKE[0]/#make/make KERNELRELEASE=$kernelver}"
"#;

/// A user's first commands, in a guest where all devices are bound.
const USE: &str = r#"
set -e
barlease --version
barlease device
barlease doctor 0000:01:00.0
barlease lease grant 0000:01:00.0 --bar 2 --range 4K+8K --name packaged --socket /tmp/lease --once &
while [ ! -S /tmp/lease ]; do sleep 0.1; done
barlease lease take /tmp/lease -- sh -c '
    barlease lease write fd:$BARLEASE_FD 0 0x6c656173
    barlease lease dump fd:$BARLEASE_FD --range 0+16'
barlease lease show
"#;

pub(super) fn run(maker: &Maker, prepared: &Prepared) -> Result<()> {
    let folder = maker.out.join("verify");
    cache::remove(&folder)?;
    let release = &prepared.kernel.release;
    let version = &maker.version;
    let dkms = extract(maker, &folder, &format!("barlease-dkms_{version}_all.deb"))?;
    let command = extract(maker, &folder, &format!("barlease_{version}_amd64.deb"))?;
    compare(maker, prepared)?;
    let module = build(prepared, &dkms.join(format!("usr/src/barlease-{version}")))?;

    let step = Step::start(format!("leasing in a guest with {release}"));
    let outcome = Run::new(prepared, Preset::Full.machine())
        .module(module)
        .file(command.join("usr/bin/barlease"), "/lab/bin/barlease")
        .bind(DRIVER)
        .timeout(Duration::from_secs(120))
        .output(Output::Capture)
        .command(["sh", "-c", USE])
        .run()?;
    step.done();
    let said = String::from_utf8_lossy(&outcome.output);
    print!("{said}");
    let version = format!("barlease {VERSION}");
    for expected in [version.as_str(), DRIVER, "packaged", "73 61 65 6c"] {
        if outcome.code != 0 || !said.contains(expected) {
            bail!(
                "the packaged command ended with {} and should have printed `{expected}`",
                outcome.code
            );
        }
    }
    eprintln!(
        "verified on {release}: built from the package, loaded, leased; the guest took {}",
        seconds(outcome.total)
    );
    cache::remove(&folder)
}

fn extract(maker: &Maker, folder: &Path, name: &str) -> Result<PathBuf> {
    let to = folder.join(name);
    fs::create_dir_all(&to).with_context(|| format!("make {}", to.display()))?;
    let mut extract = Command::new("dpkg-deb");
    extract.arg("--extract").arg(maker.out.join(name)).arg(&to);
    output(&mut extract, &format!("unpack {name}"))?;
    Ok(to)
}

/// The lab's headers have the overlay laid over them: what is in the package must be exactly that.
fn compare(maker: &Maker, prepared: &Prepared) -> Result<()> {
    let name = super::modules::overlay_file(maker, prepared)?;
    let step = Step::start(format!("comparing {name} with the headers"));
    let mut files = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(maker.out.join(&name))
        .stdout(Stdio::piped())
        .spawn()
        .context("start dpkg-deb")?;
    let mut compare = Command::new("tar");
    compare
        .args([
            "--extract",
            "--to-command",
            COMPARE,
            "--exclude=./usr/share/doc",
            "--exclude=./usr/share/lintian",
        ])
        .env("SYSROOT", prepared.sysroot.path(""))
        .stdin(files.stdout.take().map_or_else(Stdio::null, Stdio::from));
    let status = compare.status().context("start tar")?;
    if !files.wait()?.success() || !status.success() {
        bail!("{name} is not what the module was tested with");
    }
    step.done();
    Ok(())
}

/// Compares content only: owners and times differ.
const COMPARE: &str = r#"cmp - "$SYSROOT/$TAR_FILENAME""#;

fn build(prepared: &Prepared, sources: &Path) -> Result<PathBuf> {
    let release = &prepared.kernel.release;
    let step = Step::start(format!(
        "building the module for {release} from its package"
    ));
    let mut make = prepared.sysroot.enter(&[(sources, "/work")])?;
    make.args([
        "sh",
        "-c",
        "cd /work && exec bash -c \"$@\"",
        "sh",
        BUILD,
        "build",
    ])
    .arg(prepared.kernel.build_folder())
    .arg(release);
    output(&mut make, "build the module")?;
    step.done();
    Ok(sources.join("kmod").join(MODULE))
}
