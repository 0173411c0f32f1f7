//! A guest whose root is a Debian system of its own, with systemd as process 1.
//!
//! ```no_run
//! use barlease_lab::preset::Preset;
//! use barlease_lab::prepare::{Request, prepare};
//! use barlease_lab::system::Root;
//! use barlease_lab::run::Run;
//!
//! # fn main() -> anyhow::Result<()> {
//! let prepared = prepare(&Request::default())?;
//! let root = Root::prepare(&prepared, &["dkms"])?;
//! let disk = root.copy_to("target/disk.img")?;
//! let boot = || Run::new(&prepared, Preset::Full.machine()).system(&disk);
//! boot().command(["sh", "-c", "echo kept >/var/lib/kept"]).run()?;
//! // The next run is what a reboot is: the same disk, and any kernel.
//! let outcome = boot().command(["cat", "/var/lib/kept"]).run()?;
//! assert_eq!(outcome.code, 0);
//! # Ok(())
//! # }
//! ```
//!
//! One run is one boot: what is called with [`Run::system`](crate::run::Run::system) gets files,
//! modules, devices, a command, its output and its exit code as in the small guest. The command
//! starts when systemd has no job left.
//!
//! The packages come from the mirror by the lab's own apt, and are installed in a chroot by their
//! own scripts. As root, or in a user namespace that maps a range of users (`uidmap`), since a
//! system has files of several. The result is an image in the cache, one for each set of packages,
//! that no guest writes to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::guests::emulator::comma_safe;
use crate::kernels::prepare::Prepared;
use crate::packages::apt::{Apt, Package};
use crate::packages::arch::Arch;
use crate::packages::cache::{self, Cache, fingerprint, unfinished};
use crate::packages::command::{self, SYSTEM_PATH, need, tied};
use crate::packages::report::Step;
use crate::packages::sysroot::{Sysroot, logged};

/// The packages of every system. apt counts essential ones as there already.
const BASE: &[&str] = &[
    "apt",
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "coreutils",
    "dash",
    "dbus",
    "debconf",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "init",
    "init-system-helpers",
    "iproute2",
    "kmod",
    "libc-bin",
    "login",
    "mawk",
    "mount",
    "ncurses-base",
    "ncurses-bin",
    "passwd",
    "perl-base",
    "procps",
    "sed",
    "systemd-sysv",
    "sysvinit-utils",
    "tar",
    "udev",
    "util-linux",
];

/// The size of the disk. The file has holes where nothing is.
const SIZE: &str = "12G";

/// Run in new namespaces: the tree, the packages, the image to make, its size, and the names of the
/// packages.
const MAKE: &str = r#"
set -eu
root=$1 archives=$2 image=$3 size=$4; shift 4
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount --bind "$archives" "$root/input"
chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8 sh /system.sh "$@"
for place in input tmp dev proc; do umount -l "$root/$place"; done
rm -f "$root/system.sh"
rmdir "$root/input"
rm -f "$image"
truncate -s "$size" "$image"
mke2fs -q -F -t ext4 -L system -d "$root" "$image"
rm -rf "$root"
"#;

/// Run in new namespaces: the disk, an empty folder to mount it at, a folder for `/mnt`, the
/// release of a kernel, and a script. `uname -r` says that release, as it would where that kernel
/// runs.
const ENTER: &str = r#"
set -eu
disk=$1 root=$2 folder=$3 release=$4 script=$5
mount -o loop "$disk" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mount --bind "$folder" "$root/mnt"
mkdir "$root/run/lab"
cat >"$root/run/lab/uname" <<END
#!/bin/sh
case "\$1" in -r) echo $release ;; *) exec /usr/bin/uname "\$@" ;; esac
END
chmod 755 "$root/run/lab/uname"
code=0
chroot "$root" /usr/bin/env -i PATH=/run/lab:/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8 \
    sh -c "$script" </dev/null || code=$?
# All other processes here are what the script has left behind: they keep the disk in use.
kill -KILL -1 2>/dev/null || true
umount --recursive "$root/dev"
for place in mnt run tmp proc; do umount "$root/$place"; done
umount "$root"
exit $code
"#;

/// The script that the guest runs once it is up.
pub(crate) const AGENT: &str = include_str!("agent.sh");

/// The modules that the kernel needs to have its root on the disk; virtio for PCI is built into it.
pub(crate) const MODULES: &[&str] = &["virtio_blk", "ext4"];

/// MiB that such a guest has at least.
pub(crate) const MEMORY: u32 = 2048;

const SETUP: &str = include_str!("system.sh");

/// A Debian system in the cache, as it is right after its installation.
#[derive(Clone, Debug)]
pub struct Root {
    image: PathBuf,
    /// The names that its packages were resolved from, and the result.
    asked: Vec<String>,
    packages: Vec<Package>,
}

/// The disk that a guest has its root on.
#[derive(Clone, Debug)]
pub struct Disk {
    pub(crate) path: PathBuf,
    /// Whether what a guest writes is there for the next one.
    pub(crate) kept: bool,
}

impl Root {
    /// The system with these packages of Debian sid, and what they depend on, beside a base with
    /// systemd. Kernels are not among what it needs: the lab's are booted.
    ///
    /// A version that was resolved once stays, until the cache is cleaned.
    ///
    /// # Errors
    ///
    /// When a package is unknown, cannot be downloaded or installed, or this host lets us make
    /// no namespace.
    pub fn prepare(prepared: &Prepared, packages: &[&str]) -> Result<Self> {
        let cache = &prepared.cache;
        let folder = cache.path("systems");
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let mut asked: Vec<String> = BASE.iter().chain(packages).map(|&n| n.to_owned()).collect();
        asked.sort();
        asked.dedup();
        let list = folder.join(format!("{}.json", fingerprint(&asked)));
        if let Some(root) =
            cache::read_json(&list).and_then(|list: Vec<Package>| ready(&folder, &asked, &list))
        {
            return Ok(root);
        }
        let _turn = cache.lock("systems", "installing a Debian system")?;
        let (apt, _) = Apt::set_up(cache, Arch::Amd64)?;
        let list: Vec<Package> = match cache::read_json(&list) {
            Some(known) => known,
            None => resolve(&apt, &asked, &list)?,
        };
        if let Some(root) = ready(&folder, &asked, &list) {
            return Ok(root);
        }
        make(cache, &apt, &folder, &asked, &list)
    }

    /// The files of the packages of Debian's that this system lacks to have these installed, too.
    ///
    /// # Errors
    ///
    /// When a package is unknown, or cannot be downloaded.
    pub fn lacks(&self, prepared: &Prepared, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let (apt, _) = Apt::set_up(&prepared.cache, Arch::Amd64)?;
        let mut wanted = self.asked.clone();
        wanted.extend(packages.iter().map(|&name| name.to_owned()));
        let has = |name: &str| self.packages.iter().any(|package| package.name == name);
        let mut lacking = apt.closure(&wanted)?;
        lacking.retain(|package| !has(&package.name));
        apt.download(&lacking, "for a Debian system to install")?;
        Ok(lacking.iter().map(|package| apt.file(package)).collect())
    }

    /// A disk with the system, whose changes are gone after each run.
    #[must_use]
    pub fn disk(&self) -> Disk {
        Disk {
            path: self.image.clone(),
            kept: false,
        }
    }

    /// A disk with the system, which keeps what runs write to it: a new file, in place of what is
    /// there.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn copy_to(&self, path: impl Into<PathBuf>) -> Result<Disk> {
        self.disk().copy_to(path)
    }
}

impl Disk {
    /// A disk that an earlier run has kept.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            kept: true,
        }
    }

    /// A copy of it, which keeps what runs write to it, in place of what is there.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn copy_to(&self, path: impl Into<PathBuf>) -> Result<Self> {
        let copy = Self::at(path);
        let mut command = Command::new("cp");
        command
            .args(["--reflink=auto", "--sparse=always", "--"])
            .args([&self.path, &copy.path]);
        command::run(&mut command, "copy a system's disk")?;
        Ok(copy)
    }

    /// Runs a script in it without a guest, at the speed of the host: in a chroot, as root,
    /// without systemd. Long builds are better done so where a guest is emulated. `/mnt` is a
    /// folder of the host; `uname -r` says the release of that kernel. Returns what the script
    /// said.
    ///
    /// # Errors
    ///
    /// When we are not root, the disk cannot be mounted, or the script fails.
    pub fn enter(&self, folder: &Path, prepared: &Prepared, script: &str) -> Result<String> {
        if !self.kept {
            bail!("what is written to the disk of every guest would be lost");
        }
        let root = self.path.with_extension("mounted");
        fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
        let mut enter = within()?;
        enter
            .args(["/bin/sh", "-c", ENTER, "enter"])
            .args([&self.path, &root])
            .arg(folder)
            .args([&prepared.kernel.release, script])
            .env("PATH", SYSTEM_PATH);
        let log = self.path.with_extension("log");
        logged(&mut enter, &log, "run a script in a Debian system")?;
        fs::remove_dir(&root).with_context(|| format!("remove {}", root.display()))?;
        fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))
    }

    /// Whether [`Disk::enter`] can work: only root may mount a file.
    #[must_use]
    pub fn can_enter() -> bool {
        rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists()
    }

    /// QEMU's arguments for it. `init.sh` knows its address.
    pub(crate) fn arguments(&self) -> [String; 4] {
        let snapshot = if self.kept { "off" } else { "on" };
        let path = comma_safe(&self.path);
        [
            "-drive".to_owned(),
            format!("if=none,id=system,format=raw,cache=unsafe,snapshot={snapshot},file={path}"),
            "-device".to_owned(),
            "virtio-blk-pci,drive=system,bus=pcie.0,addr=1e,romfile=".to_owned(),
        ]
    }
}

fn resolve(apt: &Apt, asked: &[String], list: &Path) -> Result<Vec<Package>> {
    if !apt.has_lists() {
        apt.update()?;
    }
    let packages = apt.closure(asked)?;
    cache::write_json(list, &packages)?;
    Ok(packages)
}

fn image(folder: &Path, packages: &[Package]) -> PathBuf {
    let files = packages.iter().map(Package::file_name);
    let name = fingerprint(files.chain([SETUP, MAKE, SIZE].map(str::to_owned)));
    folder.join(format!("{name}.ext4"))
}

fn ready(folder: &Path, asked: &[String], packages: &[Package]) -> Option<Root> {
    let image = image(folder, packages);
    image.exists().then(|| Root {
        image,
        asked: asked.to_vec(),
        packages: packages.to_vec(),
    })
}

fn make(
    cache: &Cache,
    apt: &Apt,
    folder: &Path,
    asked: &[String],
    packages: &[Package],
) -> Result<Root> {
    let mke2fs = need("mke2fs", "e2fsprogs")?;
    apt.download(packages, "for a Debian system with systemd")?;
    let image = image(folder, packages);
    let tree = image.with_extension("tree");
    let mut clear = within()?;
    clear.args(["rm", "-rf", "--"]).arg(&tree);
    command::run(&mut clear, "remove what an earlier attempt has left")?;
    let sysroot = Sysroot::at(tree.clone());
    let files: Vec<_> = packages.iter().map(|package| apt.file(package)).collect();
    sysroot.unpack(&files, "a Debian system")?;
    for place in ["proc", "dev", "tmp", "input"] {
        fs::create_dir_all(tree.join(place))?;
    }
    fs::write(tree.join("system.sh"), SETUP)?;
    let step = Step::start(format!("installing {} packages", packages.len()));
    let new = unfinished(&image);
    let mut install = within()?;
    install
        .args(["/bin/sh", "-c", MAKE, "make"])
        .arg(&tree)
        .arg(cache.path("archives"))
        .args([new.as_os_str(), SIZE.as_ref()])
        .args(packages.iter().map(Package::file_name))
        .env("PATH", format!("{}:{SYSTEM_PATH}", folder_of(&mke2fs)));
    let log = image.with_extension("log");
    logged(&mut install, &log, "install a Debian system")?;
    fs::rename(&new, &image).with_context(|| format!("keep {}", image.display()))?;
    apt.forget(packages)?;
    step.done();
    ready(folder, asked, packages).context("the image that was just made is not there")
}

fn folder_of(program: &Path) -> String {
    program
        .parent()
        .map_or_else(String::new, |folder| folder.display().to_string())
}

/// A command in namespaces where we are root, with all users that a system has.
fn within() -> Result<Command> {
    let mut command = tied(need("unshare", "util-linux")?);
    if !rustix::process::geteuid().is_root() {
        if command::find("newuidmap").is_none() {
            bail!(
                "a Debian system has files of several users, and only root or a range of users may make them: \
                 apt-get install uidmap (and a line for you in /etc/subuid and /etc/subgid), or run this as root"
            );
        }
        command.args(["--user", "--map-root-user", "--map-auto"]);
    }
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--"]);
    Ok(command)
}
