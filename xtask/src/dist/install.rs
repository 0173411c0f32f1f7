//! Installs, upgrades and removes the packages as a user does, on a disk with a fresh Debian sid
//! and systemd.
//!
//! It has the older of two kernels, its headers, and what our packages depend on, no more; ours
//! come from an apt repository on the disk. [`PARTS`] one after the other: the module, with a
//! kernel's metadata that comes late; use; upgrades of Barlease and of the kernel; use in that;
//! with Secure Boot, before DKMS's key is enrolled and after; the module in the stock one's place;
//! removal. Then the files of the disk that no package has are compared with those of before.
//!
//! Steps that need a running kernel or systemd run in a guest, each time a boot of that disk. Parts
//! that have DKMS build run in a chroot of the disk where we may mount it, since an emulated
//! processor takes some ten times as long; else in a guest, too. The lab boots each kernel by
//! itself, so boot loader and initramfs of the host have no part in it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::prepare::{Prepared, Request, prepare};
use barlease_lab::preset::Preset;
use barlease_lab::report::seconds;
use barlease_lab::run::{Output, Run};
use barlease_lab::secure_boot::Firmware;
use barlease_lab::system::{Disk, Root};
use clap::ValueEnum;

use super::{Built, Maker, What, modules, need, output};

/// The kernel that is installed first. The second is that which the packages are made for.
const FIRST: &str = "7.2";

/// The disk, and the repositories of the older and the newer version.
const DISK: &str = "disk.img";
const REPOSITORIES: [&str; 2] = ["repository-old", "repository-new"];

/// Where a part finds the repository that it takes.
const REPOSITORY: &str = "/mnt";

/// Packages that a host has anyway.
const HOST: &[&str] = &["initramfs-tools", "openssl"];

/// For the kernel's command line. Where an emulated processor shares a busy machine, a unit may
/// take longer to start, and to say that it is well, than on any host. `cargo xtask vm system
/// --check` tests the service's watchdog.
const PATIENCE: [&str; 2] = [
    "systemd.default_timeout_start_sec=15min",
    "systemd.service_watchdogs=no",
];

const COMMON: &str = include_str!("install/common.sh");

/// A part of the test.
pub(super) struct Part {
    script: &'static str,
    way: Way,
    /// Which of the two kernels runs.
    kernel: usize,
    /// Which repository it takes the packages from, if it takes one.
    repository: Option<usize>,
}

/// Where a part runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// In a chroot where we may mount the disk: it needs no running kernel and no systemd.
    Chroot,
    /// In a guest.
    Guest,
    /// In a guest whose firmware has Secure Boot on, and maybe the key that an earlier part has
    /// printed.
    SecureBoot { enrolled: bool },
}

pub(super) const PARTS: [Part; 8] = [
    Part {
        script: include_str!("install/1-install.sh"),
        way: Way::Chroot,
        kernel: 0,
        repository: Some(0),
    },
    Part {
        script: include_str!("install/2-use.sh"),
        way: Way::Guest,
        kernel: 0,
        repository: None,
    },
    Part {
        script: include_str!("install/3-upgrade.sh"),
        way: Way::Chroot,
        kernel: 0,
        repository: Some(1),
    },
    Part {
        script: include_str!("install/4-reboot.sh"),
        way: Way::Guest,
        kernel: 1,
        repository: None,
    },
    Part {
        script: include_str!("install/5-locked.sh"),
        way: Way::SecureBoot { enrolled: false },
        kernel: 1,
        repository: None,
    },
    Part {
        script: include_str!("install/6-enrolled.sh"),
        way: Way::SecureBoot { enrolled: true },
        kernel: 1,
        repository: None,
    },
    Part {
        script: include_str!("install/7-as-stock.sh"),
        way: Way::Chroot,
        kernel: 1,
        repository: None,
    },
    Part {
        script: include_str!("install/8-purge.sh"),
        way: Way::Guest,
        kernel: 1,
        repository: None,
    },
];

/// Files that may be on the disk after a purge and were not there before, and why.
const LEFT: &[(&str, &str)] = &[
    (
        "/boot/initrd.img-",
        "a kernel's, made when it was installed",
    ),
    (
        "/etc/systemd/system/",
        "links that deb-systemd-helper and systemctl make for units of others",
    ),
    ("/usr/lib/modules/", "lists that depmod makes"),
    ("/var/cache/", "apt's and ldconfig's"),
    ("/var/lib/apt/", "apt's lists"),
    (
        "/var/lib/dkms",
        "the key that DKMS signs with, and its folder",
    ),
    ("/var/lib/dpkg/", "dpkg's notes about packages"),
    ("/var/lib/initramfs-tools/", "a kernel's"),
    ("/var/lib/systemd/", "systemd's own state"),
    ("/var/log/", "logs of apt, dpkg and systemd"),
];

/// Packages of one version, and what they are for.
struct Set {
    version: String,
    files: Vec<PathBuf>,
}

impl Set {
    /// All of ours, with the metadata of both kernels.
    fn make(maker: &Maker, built: &Built, before: &Prepared) -> Result<Self> {
        let all = What::value_variants().iter();
        let mut files = vec![modules::overlay(maker, before)?];
        for what in all.filter(|what| !matches!(what, What::Source | What::Tarball)) {
            files.extend(built.package(maker, *what)?);
        }
        Ok(Self {
            version: maker.version.clone(),
            files,
        })
    }

    /// The packages that they depend on and that are neither ours nor of a kernel.
    fn depends(&self) -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for file in &self.files {
            let mut ask = Command::new("dpkg-deb");
            ask.arg("--field").arg(file).arg("Depends");
            all.extend(names(&output(&mut ask, "read what a package depends on")?));
        }
        all.retain(|name| !name.contains("barlease") && !name.starts_with("linux-"));
        Ok(all)
    }
}

/// The first alternative of each dependency.
pub(super) fn names(depends: &str) -> impl Iterator<Item = String> + '_ {
    let is_end = |c: char| c.is_whitespace() || c == '(' || c == '|' || c == ':';
    depends
        .split(',')
        .filter_map(move |one| one.trim().split(is_end).next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
}

/// Runs all parts, or those from one on, by its number.
pub(super) fn run(maker: &Maker, built: &Built, from: Option<usize>) -> Result<()> {
    need("dpkg-scanpackages", "dpkg-dev")?;
    let start = Instant::now();
    let next = built.prepared()?;
    let before = prepare(&Request {
        kernel: Some(FIRST.to_owned()),
        update: false,
    })?;
    if before.kernel.release == next.kernel.release {
        bail!("the packages are made for {FIRST}, and an upgrade needs two kernels: --kernel");
    }
    let folder = maker.out.join("install");
    // The disk as it was before a part.
    let saved = |part: usize| folder.join(format!("before-{part}.img"));
    let from = from.filter(|part| *part > 1);
    match from {
        None => cache::remove(&folder)?,
        Some(part) if !saved(part).exists() => {
            bail!(
                "no run has failed in part {part}: {} is not there",
                saved(part).display()
            )
        }
        Some(_) => {}
    }
    let (disk, repositories) = match from {
        None => set_up(maker, built, [&before, next], &folder)?,
        Some(part) => {
            let disk = Disk::at(saved(part)).copy_to(folder.join(DISK))?;
            (
                disk,
                REPOSITORIES.map(|name| Repository::at(&folder.join(name))),
            )
        }
    };
    let kernels = [&before, next];
    let nothing = Repository::empty(&folder.join("nothing"))?;
    let key = folder.join("mok.der");
    let mut said = String::new();
    for (number, part) in (1..).zip(&PARTS).skip(from.unwrap_or(1) - 1) {
        // Where a run begins again, that copy is the one that it has come from.
        if from != Some(number) {
            disk.copy_to(saved(number))?;
            cache::remove(&saved(number - 1))?;
        }
        let kernel = kernels[part.kernel];
        let repository = part.repository.map_or(&nothing, |it| &repositories[it]);
        let script = format!("{COMMON}\n{}", part.script);
        said = match part.way {
            Way::Chroot if Disk::can_enter() => {
                let said = disk.enter(&repository.folder, kernel, &script)?;
                print!("{said}");
                said
            }
            Way::Chroot | Way::Guest => boot(kernel, &disk, repository, None, &script)?,
            Way::SecureBoot { enrolled } => {
                let mut firmware = Firmware::prepare(kernel)?;
                if enrolled {
                    firmware = firmware.enrol(&key);
                }
                boot(kernel, &disk, repository, Some(&firmware), &script)?
            }
        };
        if !said.trim_end().ends_with("done") {
            bail!("part {number} of the test has not come to its end");
        }
        keep_key(&said, &key)?;
    }
    judge(&said)?;
    eprintln!(
        "installed, upgraded and removed in {}",
        seconds(start.elapsed())
    );
    cache::remove(&folder)
}

/// The disk, and the packages of two versions, as part 1 finds them. The kernels are the first and
/// the second.
fn set_up(
    maker: &Maker,
    built: &Built,
    [before, next]: [&Prepared; 2],
    folder: &Path,
) -> Result<(Disk, [Repository; 2])> {
    let at = |name: &str, version: String| -> Result<Set> {
        let out = folder.join(name);
        fs::create_dir_all(&out).with_context(|| format!("make {}", out.display()))?;
        let maker = Maker {
            out,
            version,
            ..maker.clone()
        };
        Set::make(&maker, built, before)
    };
    let first = at("old", maker.version.clone())?;
    let second = at("new", format!("{}+again", maker.version))?;

    let packages: Vec<String> = first
        .depends()?
        .into_iter()
        .chain(HOST.iter().map(|&name| name.to_owned()))
        .chain(kernel_packages(before))
        .collect();
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    let root = Root::prepare(before, &packages)?;
    let disk = root.copy_to(folder.join(DISK))?;
    let kernel = kernel_packages(next);
    let kernel = root.lacks(before, &kernel.each_ref().map(String::as_str))?;

    let [old, new] = REPOSITORIES.map(|name| folder.join(name));
    let old = Repository::make(&old, &first.files)?;
    let files: Vec<_> = second.files.iter().chain(&kernel).cloned().collect();
    let new = Repository::make(&new, &files)?;
    new.note("new-version", &second.version)?;
    new.note("next-release", &next.kernel.release)?;
    Ok((disk, [old, new]))
}

fn kernel_packages(prepared: &Prepared) -> [String; 2] {
    let release = &prepared.kernel.release;
    [
        format!("linux-image-{release}"),
        format!("linux-headers-{release}"),
    ]
}

/// An apt repository.
struct Repository {
    folder: PathBuf,
}

impl Repository {
    /// One that was made before.
    fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    fn empty(folder: &Path) -> Result<Self> {
        cache::remove(folder)?;
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn make(folder: &Path, packages: &[PathBuf]) -> Result<Self> {
        let made = Self::empty(folder)?;
        for package in packages {
            let to = folder.join(package.file_name().unwrap_or_default());
            if fs::hard_link(package, &to).is_err() {
                fs::copy(package, &to).with_context(|| format!("write {}", to.display()))?;
            }
        }
        let mut scan = Command::new("dpkg-scanpackages");
        scan.args(["--multiversion", "."]).current_dir(folder);
        let done = scan.output().context("start dpkg-scanpackages")?;
        if !done.status.success() {
            bail!(
                "dpkg-scanpackages: {}\n{}",
                done.status,
                String::from_utf8_lossy(&done.stderr)
            );
        }
        fs::write(folder.join("Packages"), done.stdout)?;
        Ok(made)
    }

    /// Adds a file for the guest's script to read.
    fn note(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.folder.join(name), text).with_context(|| format!("write {name}"))
    }
}

/// One boot of the disk; returns what was said.
fn boot(
    prepared: &Prepared,
    disk: &Disk,
    repository: &Repository,
    firmware: Option<&Firmware>,
    script: &str,
) -> Result<String> {
    let mut machine = Preset::Full.machine();
    // The repository comes through memory.
    machine.memory = 4096;
    machine.append.extend(PATIENCE.map(str::to_owned));
    let mut run = Run::new(prepared, machine).without_modules().system(disk);
    if let Some(firmware) = firmware {
        run = run.firmware(firmware);
    }
    for entry in fs::read_dir(&repository.folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let place = format!("{REPOSITORY}/{name}");
        run = run.file(&path, place);
    }
    let said = Arc::new(Mutex::new(String::new()));
    let into = said.clone();
    let outcome = run
        .timeout(Duration::from_secs(3600))
        .output(Output::Lines(Box::new(move |line| {
            println!("{line}");
            let mut text = into.lock().unwrap_or_else(PoisonError::into_inner);
            text.push_str(line);
            text.push('\n');
        })))
        .command(["sh", "-c", script])
        .run()?;
    let said = said.lock().unwrap_or_else(PoisonError::into_inner);
    if outcome.code != 0 {
        bail!("the test of an installation ended with {}", outcome.code);
    }
    Ok(said.clone())
}

/// Makes a file of the certificate that a part has printed, if it has printed one.
fn keep_key(said: &str, to: &Path) -> Result<()> {
    let Some((_, rest)) = said.split_once("-- key\n") else {
        return Ok(());
    };
    let (text, _) = rest.split_once("-- end").context("the key has no end")?;
    let from = to.with_extension("base64");
    fs::write(&from, text).with_context(|| format!("write {}", from.display()))?;
    let mut decode = Command::new("base64");
    let done = decode.arg("--decode").arg(&from).output();
    let done = done.context("start base64")?;
    if !done.status.success() {
        bail!("what was printed as a key is none");
    }
    fs::write(to, done.stdout).with_context(|| format!("write {}", to.display()))
}

/// Finds what nobody has a reason to leave.
fn judge(said: &str) -> Result<()> {
    let (_, rest) = said
        .split_once("-- new files")
        .context("no list of files was printed")?;
    let (list, _) = rest.split_once("-- end").context("the list has no end")?;
    let left: Vec<&str> = list
        .lines()
        .skip(1)
        .map(str::trim)
        .filter(|path| !path.is_empty() && !LEFT.iter().any(|(start, _)| path.starts_with(start)))
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    bail!("a purge leaves:\n{}", left.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_alternative_is_what_apt_takes() {
        let text = "dkms (>= 3.1.5), systemd | systemd-standalone-sysusers, python3:any, make\n";
        let found: Vec<_> = names(text).collect();
        assert_eq!(found, ["dkms", "systemd", "python3", "make"]);
    }

    #[test]
    fn what_nobody_expects_is_found() {
        let said = |file| format!("x\n-- new files that no package has:\n{file}\n-- end\n");
        judge(&said("/var/log/apt/history.log")).unwrap();
        let error = judge(&said("/usr/src/barlease-1/x")).unwrap_err();
        assert!(error.to_string().contains("/usr/src/barlease-1/x"));
        assert!(judge("nothing").is_err());
    }
}
