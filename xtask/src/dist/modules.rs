//! The module's packages: its sources for DKMS under either name, what Debian's headers lack, and
//! what drivers that import leases are built with.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use barlease_lab::flavour::Flavour;
use barlease_lab::plan::KernelPlan;
use barlease_lab::prepare;

use super::contents::{copyright, documents, licences};
use super::deb::Deb;
use super::stage::Stage;
use super::{Maker, fill, output};
use crate::checkout;

/// The sources of the module. Those of modules for tests (`kmod/importer`, `kmod/probe`) are not
/// among them.
const MODULE: &[&str] = &["kmod/src", "kmod/include", "model/src", "abi/src"];
const MODULE_FILES: &[&str] = &["kmod/Makefile", "kmod/Kbuild", "LICENSE-GPL-2.0"];

/// Sources, and not what a build in the checkout has left beside them.
fn is_source(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let kind = path.extension().unwrap_or_default();
    let generated = name.ends_with("_generated.rs") || name.ends_with(".mod.c");
    !generated && !name.starts_with('.') && ["rs", "c", "h"].iter().any(|known| kind == *known)
}

/// A name that the module is built under.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// Of the package.
    package: &'static str,
    /// DKMS's name for it.
    dkms: &'static str,
    /// The module's file, without `.ko`.
    module: &'static str,
}

/// Beside the stock driver.
pub(super) const BESIDE: Kind = Kind {
    package: "barlease-dkms",
    dkms: "barlease",
    module: "barlease_vfio_pci",
};

/// In the stock driver's place.
pub(super) const AS_STOCK: Kind = Kind {
    package: "barlease-dkms-vfio-pci",
    dkms: "barlease-vfio-pci",
    module: "vfio-pci",
};

impl Kind {
    fn words<'a>(&self, version: &'a str) -> [(&'a str, &'a str); 3] {
        [
            ("DKMS", self.dkms),
            ("MODULE", self.module),
            ("VERSION", version),
        ]
    }
}

/// The module's sources and how DKMS builds them.
pub(super) fn sources(maker: &Maker, stage: &Stage, place: &Path, kind: Kind) -> Result<()> {
    let top = checkout::top();
    for folder in MODULE {
        stage.copy_tree(&top.join(folder), &place.join(folder), &is_source)?;
    }
    for file in MODULE_FILES {
        stage.copy(&top.join(file), place.join(file))?;
    }
    let conf = fill(Path::new("dkms/dkms.conf"), &kind.words(&maker.version))?;
    stage.write(place.join("dkms.conf"), conf)?;
    let check = fill(Path::new("dkms/check-kernel"), &[])?;
    stage.program(place.join("check-kernel"), check)
}

pub(super) fn dkms(maker: &Maker, kind: Kind) -> Result<PathBuf> {
    let stage = Stage::new(maker.out.join(format!("stage-{}", kind.package)))?;
    let place = format!("usr/src/{}-{}", kind.dkms, maker.version);
    sources(maker, &stage, Path::new(&place), kind)?;
    let words = kind.words(&maker.version);
    // After DKMS's own hooks, `dkms`.
    let hook = hook(kind, &maker.version)?;
    let mut conffiles = String::new();
    for when in ["postinst.d", "header_postinst.d"] {
        let place = format!("etc/kernel/{when}/zz-{}", kind.dkms);
        stage.program(&place, &hook)?;
        conffiles += &format!("/{place}\n");
    }
    stage.write("DEBIAN/conffiles", conffiles)?;
    if kind.dkms == AS_STOCK.dkms {
        // DKMS takes no module for newer than one whose version it cannot compare.
        let place = format!("usr/share/dkms/modules_to_force_install/{}", kind.dkms);
        stage.write(place, format!("{}_version-override\n", kind.dkms))?;
    }
    let doc = Path::new("usr/share/doc").join(kind.package);
    documents(&stage, &doc)?;
    stage.write(doc.join("copyright"), copyright("")?)?;
    let deb = Deb {
        scripts: "dkms",
        arch: "all",
        ..Deb::new(kind.package, &maker.version)
    };
    deb.pack(maker, &stage, &words)
}

/// The hook that is called when a kernel is installed.
fn hook(kind: Kind, version: &str) -> Result<String> {
    let words = [&kind.words(version)[..], &[("PACKAGE", kind.package)]].concat();
    fill(Path::new("debian/kernel-hook"), &words)
}

pub(super) fn importers(maker: &Maker) -> Result<PathBuf> {
    let top = checkout::top();
    let stage = Stage::new(maker.out.join("stage-importers"))?;
    let header = "barlease_kernel.h";
    stage.copy(
        &top.join("kmod/include").join(header),
        Path::new("usr/include/barlease").join(header),
    )?;
    stage.copy(
        &top.join("dist/importers/barlease.mk"),
        "usr/share/barlease-dev/barlease.mk",
    )?;
    let doc = Path::new("usr/share/doc/barlease-dev");
    let example = doc.join("examples");
    stage.copy_tree(&top.join("dist/importers/example"), &example, &|_| true)?;
    let file = "barlease_example_importer.c";
    stage.copy(&top.join("kmod/examples").join(file), example.join(file))?;
    stage.copy(&top.join("docs/importers.md"), doc.join("importers.md"))?;
    licences(&stage, doc)?;
    stage.write(
        doc.join("copyright"),
        copyright("debian/copyright-importers")?,
    )?;
    let deb = Deb {
        arch: "all",
        ..Deb::new("barlease-dev", &maker.version)
    };
    deb.pack(maker, &stage, &[])
}

pub(super) fn overlay(maker: &Maker, prepared: &prepare::Prepared) -> Result<PathBuf> {
    let kernel = plan_of(prepared)?;
    let version = overlay_version(maker, &kernel);
    let name = format!("barlease-rust-overlay-{}", kernel.release);
    let stage = Stage::new(maker.out.join("stage-overlay"))?;
    stage.unpack(&prepared.overlay)?;
    // The tarball was made with the umask of whoever made it.
    for folder in folders(stage.root())? {
        stage.folder(folder)?;
    }
    let words = [
        ("RELEASE", kernel.release.as_str()),
        ("KERNEL_VERSION", kernel.version.as_str()),
        ("SOURCE", kernel.source.name.as_str()),
    ];
    let text = fill(Path::new("debian/copyright-overlay"), &words)?;
    stage.write(format!("usr/share/doc/{name}/copyright"), text)?;

    let headers: Vec<_> = kernel
        .headers
        .iter()
        .map(|package| format!("{} (= {})", package.name, package.version))
        .collect();
    let (rustc, after) = rustc_range(&prepared.rustc)?;
    let deb = Deb {
        template: "barlease-rust-overlay",
        scripts: "barlease-rust-overlay",
        compression: "zstd",
        ..Deb::new(&name, &version)
    };
    deb.pack(
        maker,
        &stage,
        &[
            ("RELEASE", kernel.release.as_str()),
            ("HEADERS", &headers.join(", ")),
            ("RUSTC", &rustc),
            ("RUSTC_AFTER", &after),
        ],
    )
}

/// That of the kernel first: the content of the package follows from that, and changes with it. A
/// version without a hyphen is one of Debian's own packages, which this is.
fn overlay_version(maker: &Maker, kernel: &KernelPlan) -> String {
    let kernel = kernel.version.replace('-', "+");
    format!("{kernel}+barlease{}", maker.version)
}

/// The file name of the overlay's package.
pub(super) fn overlay_file(maker: &Maker, prepared: &prepare::Prepared) -> Result<String> {
    let kernel = plan_of(prepared)?;
    let version = overlay_version(maker, &kernel);
    Ok(format!(
        "barlease-rust-overlay-{}_{version}_amd64.deb",
        kernel.release
    ))
}

/// The folders below a folder, by their path in it.
fn folders(root: &Path) -> Result<Vec<PathBuf>> {
    let mut find = Command::new("find");
    find.arg(root).args(["-type", "d", "-printf", "%P\\n"]);
    let text = output(&mut find, "list folders")?;
    Ok(text.lines().map(PathBuf::from).collect())
}

/// The lab's knowledge of the packages of the prepared kernel.
fn plan_of(prepared: &prepare::Prepared) -> Result<KernelPlan> {
    let plans = Flavour::ALL.map(|flavour| prepare::plan_of(&prepared.cache, flavour));
    let kernel = plans
        .into_iter()
        .flatten()
        .flat_map(|plan| plan.kernels)
        .find(|kernel| kernel.release == prepared.kernel.release);
    kernel.context("the cache's plan does not have the kernel that is prepared")
}

/// The versions of the package `rustc` that are this compiler: from `rustc 1.97.1 (…)` to 1.97.1
/// and before 1.97.2.
fn rustc_range(version: &str) -> Result<(String, String)> {
    let number = version.split(' ').nth(1).unwrap_or_default();
    let after = number.rsplit_once('.').and_then(|(front, last)| {
        let last: u32 = last.parse().ok()?;
        Some(format!("{front}.{}~", last + 1))
    });
    let after = after.with_context(|| format!("`{version}` has no version number"))?;
    Ok((number.to_owned(), after))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The hook's message about a kernel, on a host whose root is a folder.
    fn hook(root: &Path) -> String {
        let text = super::hook(BESIDE, "1").unwrap();
        let mut hook = Command::new("sh");
        hook.args(["-c", &text, "hook", "9.9"])
            .env("DPKG_ROOT", root);
        let done = hook.output().unwrap();
        assert!(done.status.success());
        String::from_utf8(done.stderr).unwrap()
    }

    #[test]
    fn a_kernel_without_our_module_is_warned_of() {
        let root = checkout::target().join(format!("hook-{}", std::process::id()));
        let (sources, modules) = (
            root.join("usr/src/barlease-1"),
            root.join("lib/modules/9.9"),
        );
        fs::create_dir_all(modules.join("kernel")).unwrap();
        assert_eq!(hook(&root), "", "the package was removed");

        fs::create_dir_all(&sources).unwrap();
        let check = checkout::top().join("dist/dkms/check-kernel");
        fs::copy(check, sources.join("check-kernel")).unwrap();
        let said = hook(&root);
        assert!(said.contains("9.9 has no module"), "{said}");
        assert!(said.contains("install linux-headers-9.9"), "{said}");

        fs::create_dir_all(modules.join("build")).unwrap();
        let said = hook(&root);
        assert!(said.contains("there is no configured kernel"), "{said}");
        assert!(said.contains("dkms install barlease/1 -k 9.9"), "{said}");

        fs::create_dir_all(modules.join("updates/dkms")).unwrap();
        fs::write(modules.join("updates/dkms/barlease_vfio_pci.ko.xz"), "").unwrap();
        assert_eq!(hook(&root), "", "the module is there");
        fs::remove_dir_all(&root).unwrap();
    }

    /// The check's words about a kernel of that release with these options, on a host without
    /// tools.
    fn check(release: &str, options: &[&str]) -> String {
        let kernel = tempfile::tempdir().unwrap();
        let config: String = options
            .iter()
            .map(|name| format!("CONFIG_{name}=y\n"))
            .collect();
        fs::write(kernel.path().join(".config"), config).unwrap();
        let script = checkout::top().join("dist/dkms/check-kernel");
        let mut check = Command::new("sh");
        check.arg(script).arg(kernel.path()).arg(release);
        let done = check
            .env("RUSTC", "/none")
            .env("BINDGEN", "/none")
            .output()
            .unwrap();
        assert_eq!(done.status.code(), Some(77), "{release}");
        String::from_utf8(done.stderr).unwrap()
    }

    #[test]
    fn the_check_says_what_each_kernel_lacks() {
        let needed = ["RUST", "VFIO_PCI_CORE", "MODULES"];
        for old in ["6.12.9+deb13-amd64", "7.1-rt-amd64", "7.1.20"] {
            let said = check(old, &needed);
            assert!(said.contains("is too old"), "{old}: {said}");
        }
        assert!(check("7.1-rt-amd64", &needed).contains("linux-image-rt-amd64 "));
        for new in [
            "7.2-cloud-amd64",
            "7.2.13+deb14-amd64",
            "7.3-arm64-16k",
            "10.1-amd64",
        ] {
            let said = check(new, &needed);
            assert!(said.contains(&format!("overlay-{new}, ")), "{new}: {said}");
            assert!(!said.contains("too old"), "{new}: {said}");
        }
        let said = check("7.3-amd64", &["RUST", "MODULES"]);
        assert!(said.contains("without CONFIG_VFIO_PCI_CORE"), "{said}");
        assert!(!said.contains("without CONFIG_RUST"), "{said}");
        let said = check("7.3-amd64", &needed);
        assert!(said.contains("note: the kernel 7.3-amd64 was built without CONFIG_PCI_P2PDMA"));
    }

    #[test]
    fn products_and_modules_for_tests_are_not_packaged() {
        for name in [
            "src/leases.rs",
            "src/sys/helpers.c",
            "include/barlease_kernel.h",
        ] {
            assert!(is_source(Path::new(name)), "{name}");
        }
        for name in [
            "a.o",
            ".a.o.cmd",
            "a.mod.c",
            "vfio_generated.rs",
            "a.ko",
            "Module.symvers",
        ] {
            assert!(!is_source(Path::new(name)), "{name}");
        }
        assert!(!MODULE.contains(&"kmod"));
    }

    #[test]
    fn exactly_the_kernels_compiler_is_depended_on() {
        let (from, before) = rustc_range("rustc 1.97.1 (8bab26f4f 2026-07-14)").unwrap();
        assert_eq!((from.as_str(), before.as_str()), ("1.97.1", "1.97.2~"));
        assert!(rustc_range("nonsense").is_err());
    }
}
