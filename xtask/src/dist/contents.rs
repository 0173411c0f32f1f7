//! The files of each package, and their places.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::plan::KernelPlan;
use barlease_lab::prepare;
use barlease_lab::report::Step;

use super::deb::Deb;
use super::stage::Stage;
use super::{Maker, command, fill, manuals, output};
use crate::checkout;

/// The sources of the module. Modules for tests (`kmod/importer`, `kmod/probe`) are not among it.
const MODULE: &[&str] = &["kmod/src", "kmod/include", "model/src", "abi/src"];
const MODULE_FILES: &[&str] = &["kmod/Makefile", "kmod/Kbuild", "LICENSE-GPL-2.0"];

/// Sources, and not what a build in the checkout has left beside them.
fn is_source(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let kind = path.extension().unwrap_or_default();
    let generated = name.ends_with("_generated.rs") || name.ends_with(".mod.c");
    !generated && !name.starts_with('.') && ["rs", "c", "h"].iter().any(|known| kind == *known)
}

/// The module's sources and how DKMS builds them.
fn module(maker: &Maker, stage: &Stage, place: &Path) -> Result<()> {
    let top = checkout::top();
    for folder in MODULE {
        stage.copy_tree(&top.join(folder), &place.join(folder), &is_source)?;
    }
    for file in MODULE_FILES {
        stage.copy(&top.join(file), place.join(file))?;
    }
    let conf = fill(Path::new("dkms/dkms.conf"), &[("VERSION", &maker.version)])?;
    stage.write(place.join("dkms.conf"), conf)?;
    let check = fill(Path::new("dkms/check-kernel"), &[])?;
    stage.program(place.join("check-kernel"), check)
}

/// Licences, changes, how to install, examples.
fn documents(stage: &Stage, place: &Path) -> Result<()> {
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

fn copyright(more: &str) -> Result<String> {
    let base = fill(Path::new("debian/copyright"), &[])?;
    if more.is_empty() {
        return Ok(base);
    }
    Ok(base + &fill(Path::new(more), &[])?)
}

pub(super) fn command(maker: &Maker) -> Result<PathBuf> {
    let built = maker.command()?;
    let stage = Stage::new(maker.out.join("stage-barlease"))?;
    stage.program("usr/bin/barlease", fs::read(&built.program)?)?;
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
    let header = checkout::top().join("abi/include/barlease.h");
    stage.copy(&header, "usr/include/barlease.h")?;
    let doc = Path::new("usr/share/doc/barlease");
    documents(&stage, doc)?;
    stage.write(
        doc.join("copyright"),
        copyright("debian/copyright-command")?,
    )?;
    stage.write(doc.join("third-party-licences"), &built.licences)?;
    let deb = Deb {
        template: "barlease",
        name: "barlease",
        version: &maker.version,
        arch: "amd64",
        compression: "xz",
    };
    deb.pack(maker, &stage, &[("VERSION", &maker.version)])
}

pub(super) fn dkms(maker: &Maker) -> Result<PathBuf> {
    let stage = Stage::new(maker.out.join("stage-dkms"))?;
    let sources = format!("usr/src/barlease-{}", maker.version);
    module(maker, &stage, Path::new(&sources))?;
    // After DKMS's own hooks, `dkms`.
    let hook = fill(
        Path::new("debian/kernel-hook"),
        &[("VERSION", &maker.version)],
    )?;
    let mut conffiles = String::new();
    for when in ["postinst.d", "header_postinst.d"] {
        let place = format!("etc/kernel/{when}/zz-barlease");
        stage.program(&place, &hook)?;
        conffiles += &format!("/{place}\n");
    }
    stage.write("DEBIAN/conffiles", conffiles)?;
    let doc = Path::new("usr/share/doc/barlease-dkms");
    documents(&stage, doc)?;
    stage.write(doc.join("copyright"), copyright("")?)?;
    let deb = Deb {
        template: "barlease-dkms",
        name: "barlease-dkms",
        version: &maker.version,
        arch: "all",
        compression: "xz",
    };
    deb.pack(maker, &stage, &[("VERSION", &maker.version)])
}

pub(super) fn overlay(maker: &Maker) -> Result<PathBuf> {
    let prepared = maker.prepared()?;
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
        name: &name,
        version: &version,
        arch: "amd64",
        compression: "zstd",
    };
    deb.pack(
        maker,
        &stage,
        &[
            ("RELEASE", kernel.release.as_str()),
            ("OVERLAY_VERSION", &version),
            ("HEADERS", &headers.join(", ")),
            ("RUSTC", &rustc),
            ("RUSTC_AFTER", &after),
        ],
    )
}

/// That of the kernel first: what is in the package follows from that, and changes with it.
fn overlay_version(maker: &Maker, kernel: &KernelPlan) -> String {
    format!("{}+barlease{}", kernel.version, maker.version)
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

pub(super) fn tarball(maker: &Maker) -> Result<PathBuf> {
    let built = maker.command()?;
    let name = format!("barlease-{}", maker.version);
    let stage = Stage::new(maker.out.join("stage-tarball"))?;
    let top = Path::new(&name);
    stage.program(top.join("bin/barlease"), fs::read(&built.program)?)?;
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
    module(maker, &stage, &top.join("module"))?;
    documents(&stage, &top.join("doc"))?;
    stage.write(top.join("doc/third-party-licences.txt"), &built.licences)?;
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

fn pages(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut pages: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    pages.sort();
    Ok(pages)
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
    let plan = prepare::plan(&prepared.cache).context("the cache has lost its plan")?;
    let kernel = plan
        .kernels
        .into_iter()
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
    use super::*;

    /// The hook's words about a kernel, on a host whose root is a folder.
    fn hook(root: &Path) -> String {
        let text = fill(Path::new("debian/kernel-hook"), &[("VERSION", "1")]).unwrap();
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
