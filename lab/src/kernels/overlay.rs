//! The Rust overlay: what Debian's kernel headers lack to build modules in Rust.
//!
//! The headers packages have no metadata of the `kernel` crate (`rust/*.rmeta`), no procedural
//! macros (`rust/*.so`), no target description and no `rust/Makefile`. They follow from the
//! kernel's source, its configuration and the very `rustc` that built it; so they are made from
//! `linux-source` and laid over the installed headers. Then `make -C
//! /usr/lib/modules/<release>/build M=…` builds modules in Rust, which is all that DKMS needs, too:
//! the overlay is also kept as a tarball that unpacks over `/`.
//!
//! Guard: symbol names contain hashes of the crates. The symbols that the rebuilt `rust/` exports
//! must be those that the kernel's `Module.symvers` has; else a module would not load, and the
//! overlay is refused.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::kernels::source::SourceBuild;
use crate::packages::cache::{self, Cache, unfinished};
use crate::packages::command;
use crate::packages::plan::KernelPlan;
use crate::packages::report::Step;
use crate::packages::sysroot::{Sysroot, file_name, logged};

/// Only what configuration, scripts and `rust/` need is unpacked: no driver's code.
const LEFT_OUT: &[&str] = &[
    "Documentation/*.rst",
    "Documentation/*.yaml",
    "drivers/*.[cS]",
    "drivers/gpu/drm/amd/include/*",
    "sound/*.[cS]",
    "fs/*.[cS]",
    "net/*.[cS]",
    "arch/*.dts*",
];

/// `$1` the release.
const COMPILE: &str = r#"
set -eu
headers=/usr/src/linux-headers-$1
cd /work/src
cp "$headers/.config" "$headers/.kernelvariables" "$headers/Module.symvers" .
make olddefconfig
if ! grep -qx CONFIG_RUST=y .config; then
    echo 'CONFIG_RUST did not survive the configuration:'
    make rustavailable
    exit 1
fi
make -j"$(nproc)" modules_prepare
"#;

/// `$1` the release. The tarball has the paths of the installed headers.
const PACK: &str = r#"
set -eu
release=$1
source=/usr/src/linux-headers-$release
common=$(realpath "/usr/lib/modules/$release/source")
scripts=$(realpath "$source/scripts")
out=/work/overlay
rm -rf "$out"
mkdir -p "$out$source/rust/kernel" "$out$common/rust" "$out$scripts"
cd /work/src
cp rust/*.rmeta rust/*.so "$out$source/rust/"
cp rust/kernel/generated_*.rs "$out$source/rust/kernel/"
cp rust/Makefile rust/bindgen_parameters "$out$source/rust/"
cp rust/Makefile rust/bindgen_parameters "$out$common/rust/"
cp .clippy.toml "$out$common/"
cp scripts/target.json "$out$scripts/"
tar --create --directory "$out" --owner=0 --group=0 --sort=name . | zstd -q -T0 -10 --force -o /work/overlay.tar.zst
"#;

/// The same as strings.
pub(crate) fn left_out() -> Vec<String> {
    LEFT_OUT.iter().map(|&pattern| pattern.to_owned()).collect()
}

/// Where the tarball of a kernel's overlay is.
pub(crate) fn tarball(cache: &Cache, kernel: &KernelPlan) -> PathBuf {
    cache.path(format!("rust-overlay-{}.tar.zst", kernel.release))
}

/// Builds the tarball, from a `linux-source` package.
pub(crate) fn build(
    cache: &Cache,
    sysroot: &Sysroot,
    kernel: &KernelPlan,
    source: &Path,
) -> Result<()> {
    let left_out = left_out();
    let work = Work {
        build: SourceBuild {
            folder: cache.path("build").join(&kernel.release),
            log: cache.path(format!("rust-overlay-{}.log", kernel.release)),
            sysroot,
            name: &kernel.release,
            left_out: &left_out,
        },
    };
    if !work.build.is_unpacked(&file_name(source)) {
        work.build.unpack(source)?;
    }
    work.compile()?;
    guard(&work.build.folder.join("src"), &kernel.release)?;
    work.pack(&tarball(cache, kernel))?;
    cache::remove(&work.build.folder)
}

/// A build in progress.
struct Work<'a> {
    build: SourceBuild<'a>,
}

impl Work<'_> {
    fn compile(&self) -> Result<()> {
        let step = Step::start(format!(
            "building the Rust parts that the headers of {} lack (some minutes, once)",
            self.build.name
        ));
        let result = self.run(COMPILE, &format!("build rust/ of {}", self.build.name));
        if result.is_err() {
            self.build.distrust()?;
        }
        result?;
        step.done();
        Ok(())
    }

    fn pack(&self, tarball: &Path) -> Result<()> {
        let step = Step::start(format!("packing the overlay of {}", self.build.name));
        self.run(PACK, "pack the Rust overlay")?;
        let new = unfinished(tarball);
        fs::rename(self.build.folder.join("overlay.tar.zst"), &new)
            .and_then(|()| fs::rename(&new, tarball))
            .with_context(|| format!("keep {}", tarball.display()))?;
        step.done();
        Ok(())
    }

    fn run(&self, script: &str, what: &str) -> Result<()> {
        let mut command = self.build.command(script)?;
        command.arg(self.build.name);
        logged(&mut command, &self.build.log, what)
    }
}

/// Lays the tarball over the headers in the sysroot.
pub(crate) fn lay(cache: &Cache, sysroot: &Sysroot, kernel: &KernelPlan) -> Result<()> {
    let tarball = tarball(cache, kernel);
    let step = Step::start(format!(
        "laying the overlay over the headers of {}",
        kernel.release
    ));
    let folder = tarball.parent().unwrap_or(Path::new("/"));
    let mut command = sysroot.enter(&[(folder, "/input")])?;
    command.args([
        "tar",
        "--extract",
        "--zstd",
        "--no-same-owner",
        "--keep-directory-symlink",
        "--directory",
        "/",
    ]);
    command
        .arg("--file")
        .arg(Path::new("/input").join(tarball.file_name().unwrap_or_default()));
    command::run(&mut command, "unpack the Rust overlay")?;
    step.done();
    Ok(())
}

/// Compares what the rebuilt `rust/` exports with what the kernel exports.
pub(crate) fn guard(tree: &Path, release: &str) -> Result<()> {
    let read = |name: &str| {
        let path = tree.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let mut ours = BTreeSet::new();
    for part in ["core", "helpers", "bindings", "kernel"] {
        ours.extend(exported(&read(&format!(
            "rust/exports_{part}_generated.h"
        ))?));
    }
    compare(&ours, &read("Module.symvers")?, release)
}

fn compare(ours: &BTreeSet<String>, symvers: &str, release: &str) -> Result<()> {
    let all = kernel_symbols(symvers);
    let kernels: BTreeSet<_> = all
        .iter()
        .filter(|symbol| is_rust(symbol))
        .cloned()
        .collect();
    if kernels.is_empty() {
        bail!(
            "{release} exports no Rust symbol at all: its Module.symvers is not that of a kernel with CONFIG_RUST"
        );
    }
    let lost: Vec<_> = kernels.difference(ours).collect();
    let new: Vec<_> = ours.difference(&all).collect();
    if lost.is_empty() && new.is_empty() {
        return Ok(());
    }
    let examples: Vec<_> = lost
        .iter()
        .chain(&new)
        .take(6)
        .map(|symbol| format!("  {symbol}"))
        .collect();
    bail!(
        "the rebuilt rust/ of {release} does not match the kernel: of its {} Rust symbols {} are missing, and {} are new:\n{}\n\
         The compiler is not the one that built the kernel. Choose another kernel with --kernel, or wait until the mirror has \
         a matching pair and run `cargo xtask vm prepare --update`.",
        kernels.len(),
        lost.len(),
        new.len(),
        examples.join("\n")
    );
}

/// The symbols in lines `EXPORT_SYMBOL_RUST_GPL(symbol);`.
fn exported(header: &str) -> impl Iterator<Item = String> + '_ {
    header
        .lines()
        .filter_map(|line| {
            line.strip_prefix("EXPORT_SYMBOL_RUST_GPL(")?
                .split_once(')')
        })
        .map(|(symbol, _)| symbol.to_owned())
}

/// The symbols that the kernel itself exports, without its modules.
fn kernel_symbols(symvers: &str) -> BTreeSet<String> {
    symvers
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('\t');
            let (symbol, module) = (fields.nth(1)?, fields.next()?);
            (module == "vmlinux").then(|| symbol.to_owned())
        })
        .collect()
}

/// Mangled names and the C helpers made for Rust. (A few functions written in Rust have names like
/// those of C.)
fn is_rust(symbol: &str) -> bool {
    symbol.starts_with("_R") || symbol.starts_with("rust_helper_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "EXPORT_SYMBOL_RUST_GPL(_RNvCsx_6kernel5thing);\n\
                          EXPORT_SYMBOL_RUST_GPL(rust_helper_lock);\n\
                          EXPORT_SYMBOL_RUST_GPL(rust_fmt_argument);\n";
    const SYMVERS: &str = "0x0\t_RNvCsx_6kernel5thing\tvmlinux\tEXPORT_SYMBOL_GPL\t\n\
                           0x0\trust_helper_lock\tvmlinux\tEXPORT_SYMBOL_GPL\t\n\
                           0x0\trust_fmt_argument\tvmlinux\tEXPORT_SYMBOL_GPL\t\n\
                           0x0\t_RNvCsy_3mod5thing\tdrivers/mod\tEXPORT_SYMBOL_GPL\t\n\
                           0x0\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n";

    #[test]
    fn the_compiler_of_the_kernel_is_accepted() {
        let ours: BTreeSet<_> = exported(HEADER).collect();
        assert_eq!(ours.len(), 3);
        compare(&ours, SYMVERS, "7.3-amd64").unwrap();
    }

    #[test]
    fn another_compiler_is_refused() {
        let ours: BTreeSet<_> = exported(HEADER).collect();
        let other = SYMVERS.replace("Csx_6kernel", "CsOTHER_6kernel");
        let text = compare(&ours, &other, "7.3-amd64").unwrap_err().to_string();
        assert!(text.contains("1 are missing, and 1 are new"), "{text}");
    }

    #[test]
    fn a_kernel_without_rust_is_refused() {
        let text = compare(&BTreeSet::new(), "", "7.3-amd64")
            .unwrap_err()
            .to_string();
        assert!(text.contains("no Rust symbol"), "{text}");
    }
}
