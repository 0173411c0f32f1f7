//! Debian's kernels for another architecture, made ready on this one.
//!
//! Their headers cannot be used here: the programs in them (`modpost`, the procedural macros) are
//! the other machine's. So what modules are built against is made from `linux-source`, with the
//! configuration and the symbols of the headers package. The guard of the [overlay](super::overlay)
//! holds here, too: what the rebuilt `rust/` exports is what the kernel does.
//!
//! | path | what |
//! |---|---|
//! | `usr/lib/modules/<release>/` | image, modules |
//! | `usr/bin/busybox` | the programs of the guest |
//! | `build/` | what modules are built against |
//! | `stamp.json` | what it was made from |
//!
//! Rust's standard library for programs of the guest is laid into the tool chain.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernels::overlay;
use crate::kernels::source::SourceBuild;
use crate::packages::apt::{Apt, Package};
use crate::packages::arch::Arch;
use crate::packages::cache::{self, Cache, Stamp, fingerprint, unfinished};
use crate::packages::extra::Extra;
use crate::packages::plan::{KernelPlan, Plan};
use crate::packages::report::Step;
use crate::packages::sysroot::{Sysroot, logged};

/// `$1` the release, then what make is told. The compat vDSO needs a compiler for 32 bits, and no
/// module needs it: without that compiler its option goes off.
const COMPILE: &str = r#"
set -eu
release=$1; shift
cd /work/src
headers=/work/headers/usr/src/linux-headers-$release
cp "$headers/.config" "$headers/Module.symvers" .
make "$@" KERNELRELEASE="$release" olddefconfig
if ! grep -qx CONFIG_RUST=y .config; then
    echo 'CONFIG_RUST did not survive the configuration:'
    make "$@" rustavailable
    exit 1
fi
make -j"$(nproc)" "$@" KERNELRELEASE="$release" modules_prepare
echo "$release" >include/config/kernel.release
"#;

/// `$1` the folder of `arch/`.
const TRIM: &str = r#"
set -eu
cd /work/src
out=/work/build
rm -rf "$out"
mkdir "$out"
{
    printf '%s\n' .config Kbuild Makefile Module.symvers include "arch/$1/include" .clippy.toml
    find "arch/$1" -maxdepth 1 -name 'Makefile*'
    find tools/objtool -maxdepth 1 -name objtool
    find scripts \( -name dtc -o -name kconfig -o -name package -o -name coccinelle \) -prune -o ! -type d -print
    find rust \( -name '*.rmeta' -o -name '*.so' -o -name 'generated_*.rs' -o -name Makefile -o -name bindgen_parameters \) -print
} | tar --create --exclude='*.o' --exclude='.*.cmd' --files-from - | tar --extract --directory "$out"
"#;

/// The package with the programs of the guest.
fn busybox(kernel: &KernelPlan) -> impl Iterator<Item = &Package> {
    let userland = kernel.userland.iter();
    userland.filter(|package| !package.name.starts_with("libstd-"))
}

/// Unpacks it into the folder of a kernel.
pub(crate) fn add_busybox(kernel: &KernelPlan, theirs: &Apt, folder: &Path) -> Result<()> {
    let packages: Vec<_> = busybox(kernel).cloned().collect();
    theirs.download(&packages, "for guests of another architecture")?;
    let files: Vec<_> = packages
        .iter()
        .map(|package| theirs.file(package))
        .collect();
    Sysroot::at(folder.to_owned()).unpack(&files, "busybox")?;
    theirs.forget(&packages)
}

/// A kernel of another architecture.
pub(crate) struct Foreign<'a> {
    pub(crate) cache: &'a Cache,
    pub(crate) plan: &'a Plan,
    pub(crate) kernel: &'a KernelPlan,
    pub(crate) sysroot: &'a Sysroot,
    pub(crate) arch: Arch,
}

impl Foreign<'_> {
    fn folder(&self) -> PathBuf {
        self.cache.path("kernels").join(&self.kernel.release)
    }

    /// The tree that modules are built against.
    pub(crate) fn tree(&self) -> PathBuf {
        self.folder().join("build")
    }

    /// The file that says what it was made from.
    pub(crate) fn stamp_file(&self) -> PathBuf {
        self.folder().join("stamp.json")
    }

    /// Says that the standard library is in the tool chain.
    fn library_stamp(&self) -> PathBuf {
        let name = format!("rust-library-{}.json", self.arch.name());
        self.sysroot.path(name)
    }

    /// The kernel's folder, when it is complete.
    pub(crate) fn ready(&self) -> Option<PathBuf> {
        let added = self.tools().added()?;
        let complete = self.stamp(&added).fits(&self.stamp_file())
            && self.library().fits(&self.library_stamp());
        complete.then(|| self.folder())
    }

    /// Whether what runs its guests and builds their programs is there.
    pub(crate) fn has_tools(&self) -> bool {
        self.tools().added().is_some() && self.library().fits(&self.library_stamp())
    }

    /// Adds what is missing of that; `theirs` has the packages of that architecture.
    pub(crate) fn add_tools(&self, ours: &Apt, theirs: &Apt) -> Result<Vec<Package>> {
        let added = self.tools().add(ours)?;
        if !self.library().fits(&self.library_stamp()) {
            let packages: Vec<_> = self.libraries().cloned().collect();
            theirs.download(&packages, "to build programs for guests")?;
            let files: Vec<_> = packages
                .iter()
                .map(|package| theirs.file(package))
                .collect();
            self.sysroot.unpack(&files, "Rust's standard library")?;
            theirs.forget(&packages)?;
            cache::write_json(&self.library_stamp(), &self.library())?;
        }
        Ok(added)
    }

    /// Makes what is missing.
    pub(crate) fn make(&self, ours: &Apt, theirs: &Apt) -> Result<()> {
        let added = self.add_tools(ours, theirs)?;
        if self.stamp(&added).fits(&self.stamp_file()) {
            return Ok(());
        }
        eprintln!(
            "chosen: kernel {} ({})",
            self.kernel.release, self.kernel.version
        );
        let build = SourceBuild {
            folder: self.cache.path("build").join(&self.kernel.release),
            log: self
                .cache
                .path(format!("kernel-{}.log", self.kernel.release)),
            sysroot: self.sysroot,
            name: &self.kernel.release,
            left_out: &overlay::left_out(),
        };
        build.fetch(theirs, &self.kernel.source, "to build modules for it")?;
        let packages: Vec<_> = self.packages().cloned().collect();
        theirs.download(&packages, &format!("for kernel {}", self.kernel.release))?;
        let new = unfinished(&self.folder());
        cache::remove(&new)?;
        let image: Vec<_> = packages[1..]
            .iter()
            .map(|package| theirs.file(package))
            .collect();
        Sysroot::at(new.clone()).unpack(&image, "image, modules and busybox")?;
        let headers = build.folder.join("headers");
        cache::remove(&headers)?;
        Sysroot::at(headers).unpack(&[theirs.file(&packages[0])], "kernel headers")?;

        let step = Step::start(format!(
            "building what modules for {} are built against (some minutes, once)",
            self.kernel.release
        ));
        let compiled = self.run(&build, COMPILE, &self.kernel.release);
        if compiled.is_err() {
            build.distrust()?;
        }
        compiled?;
        overlay::guard(&build.folder.join("src"), &self.kernel.release)?;
        self.run(&build, TRIM, self.arch.source_folder())?;
        let rename = |from: PathBuf, to: PathBuf| {
            fs::rename(&from, &to).with_context(|| format!("keep {}", to.display()))
        };
        rename(build.folder.join("build"), new.join("build"))?;
        cache::write_json(&new.join("stamp.json"), &self.stamp(&added))?;
        cache::remove(&self.folder())?;
        rename(new, self.folder())?;
        step.done();
        theirs.forget(&packages)?;
        cache::remove(&build.folder)
    }

    fn run(&self, build: &SourceBuild<'_>, script: &str, first: &str) -> Result<()> {
        let mut command = build.command(script)?;
        command.arg(first).args(self.arch.make_arguments());
        let what = format!("build rust/ of {}", self.kernel.release);
        logged(&mut command, &build.log, &what)
    }

    fn tools(&self) -> Extra<'_> {
        Extra {
            plan: self.plan,
            sysroot: self.sysroot,
            names: self.arch.tools(),
            note: match self.arch {
                Arch::Amd64 => "amd64-tools.json",
                Arch::Arm64 => "arm64-tools.json",
            },
            what: "cross compiler and emulator",
            purpose: "to build for another architecture and to emulate it",
        }
    }

    /// Rust's standard library, which is laid into the tool chain.
    fn libraries(&self) -> impl Iterator<Item = &Package> {
        let userland = self.kernel.userland.iter();
        userland.filter(|package| package.name.starts_with("libstd-"))
    }

    /// Headers first, then what the kernel's folder has.
    fn packages(&self) -> impl Iterator<Item = &Package> {
        let headers = self.kernel.headers.iter().take(1);
        headers
            .chain(&self.kernel.image)
            .chain(busybox(self.kernel))
    }

    fn library(&self) -> Stamp {
        Stamp::of(self.libraries().map(Package::file_name))
    }

    fn stamp(&self, added: &[Package]) -> Stamp {
        let packages = added.iter().chain(self.packages()).map(Package::file_name);
        Stamp::of(packages.chain([
            self.kernel.source.file_name(),
            self.plan.rustc.clone(),
            fingerprint([COMPILE, TRIM]),
        ]))
    }
}
