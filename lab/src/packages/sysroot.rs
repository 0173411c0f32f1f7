//! A tree of unpacked Debian packages, and programs run from it.
//!
//! Packages are unpacked without running their maintainer scripts, so making the tree needs no
//! privileges. There are two ways to run what is in it:
//!
//! - [`Sysroot::program`]: through the tree's own dynamic loader, in the host's file system.
//!   Good for anything that does not care where its files are; needs nothing at all.
//! - [`Sysroot::enter`]: in a chroot with private mounts. Kernel builds need it, because the
//!   headers packages name absolute paths. As root, or in a user namespace.
//!
//! The mounts belong to a mount namespace that goes away with its last process, and that process
//! goes away with us. So nothing is ever left mounted, and removing the tree is always safe.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};

use crate::packages::command::{self, SYSTEM_PATH, need, tied};
use crate::packages::report::Step;

/// Run inside the new namespaces: `$1` the tree, then pairs of folders to bind, `--`, and the
/// command.
const ENTER: &str = r#"
set -eu
root=$1; shift
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
while [ "$1" != -- ]; do
    mount --bind "$1" "$root$2"
    shift 2
done
shift
exec chroot "$root" /usr/bin/env -i PATH=/usr/bin:/usr/sbin HOME=/root LC_ALL=C.UTF-8 "$@"
"#;

/// Folders that are bound over, by name inside the tree.
const MOUNT_POINTS: &[&str] = &["proc", "dev", "tmp", "work", "input"];

/// An unpacked tree.
#[derive(Clone, Debug)]
pub struct Sysroot {
    root: PathBuf,
}

impl Sysroot {
    /// The tree at that path; it is not looked at.
    #[must_use]
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The path of something in the tree.
    #[must_use]
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.root.join(inside)
    }

    /// Unpacks packages into the tree.
    pub(crate) fn unpack(&self, packages: &[PathBuf], what: &str) -> Result<()> {
        let step = Step::count(format!("unpacking {what}"), packages.len());
        fs::create_dir_all(&self.root).with_context(|| format!("make {}", self.root.display()))?;
        // It has the links of the merged /usr, which must be there before anything else.
        let is_base = |path: &&PathBuf| file_name(path).starts_with("base-files_");
        if let Some(base) = packages.iter().find(is_base) {
            unpack_one(base, &self.root)?;
        }
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        thread::scope(|scope| {
            let workers = thread::available_parallelism()
                .map_or(2, usize::from)
                .min(8);
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(package) = packages.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = unpack_one(package, &self.root) {
                            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                            next.store(packages.len(), Ordering::Relaxed);
                        }
                        step.at(next.load(Ordering::Relaxed).min(packages.len()) as u64);
                    }
                });
            }
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        step.done();
        Ok(())
    }

    /// The work of maintainer scripts, as far as builds need it.
    pub(crate) fn finish(&self) -> Result<()> {
        for folder in MOUNT_POINTS {
            fs::create_dir_all(self.path(folder))?;
        }
        let awk = self.path("usr/bin/awk");
        if fs::symlink_metadata(&awk).is_err() {
            std::os::unix::fs::symlink("gawk", &awk).context("link awk to gawk")?;
        }
        Ok(())
    }

    /// A program of the tree, run in the host's own file system.
    #[must_use]
    pub fn program(&self, inside: &str) -> Command {
        let mut command = tied(self.path("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(self.path("usr/lib/x86_64-linux-gnu"))
            .arg(self.path(inside));
        command
    }

    /// A command inside the tree, with folders of the host bound at `/work` or `/input`.
    ///
    /// # Errors
    ///
    /// When this host lets us make no namespaces; the message says what to change.
    pub fn enter(&self, binds: &[(&Path, &str)]) -> Result<Command> {
        let way = way_in()?;
        let mut command = tied(need("unshare", "util-linux")?);
        command
            .args(way.flags())
            .args(["--", "/bin/sh", "-c", ENTER, "enter"])
            .arg(&self.root);
        for (from, to) in binds {
            command.arg(from).arg(to);
        }
        command.arg("--").env("PATH", SYSTEM_PATH);
        Ok(command)
    }
}

/// How to get into a chroot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Root,
    UserNamespace,
}

impl Way {
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Root => &["--mount", "--pid", "--fork", "--kill-child"],
            Self::UserNamespace => &[
                "--user",
                "--map-root-user",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
            ],
        }
    }

    fn works(self) -> Result<()> {
        let mut command = Command::new(need("unshare", "util-linux")?);
        command
            .args(self.flags())
            .args(["--", "/bin/sh", "-c", "mount -t tmpfs tmpfs /tmp"])
            .env("PATH", SYSTEM_PATH);
        command::run(&mut command, "try a private mount")
    }
}

fn way_in() -> Result<Way> {
    let root = rustix::process::geteuid().is_root();
    if root && Way::Root.works().is_ok() {
        return Ok(Way::Root);
    }
    match Way::UserNamespace.works() {
        Ok(()) => Ok(Way::UserNamespace),
        Err(error) => Err(refused(root, &error)),
    }
}

/// Says which of the usual switches is off.
fn refused(root: bool, error: &anyhow::Error) -> anyhow::Error {
    let off =
        |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let remedy = if root {
        "this root may not mount (a container without CAP_SYS_ADMIN?): give the container that capability, for example \
         with `--privileged` or `--cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined`"
    } else if off("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "user namespaces are switched off for users: `sysctl kernel.unprivileged_userns_clone=1` as root, or run this as root"
    } else if off("/proc/sys/user/max_user_namespaces", "0") {
        "the number of user namespaces is limited to none: `sysctl user.max_user_namespaces=10000` as root, or run this as root"
    } else if off(
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
    ) {
        "AppArmor restricts user namespaces: `sysctl kernel.apparmor_restrict_unprivileged_userns=0` as root, or run this as root"
    } else {
        "user namespaces do not work here: run this as root"
    };
    anyhow!(
        "modules are built in a chroot with private mounts, which this host refuses: {remedy}\n{error:#}"
    )
}

fn unpack_one(package: &Path, root: &Path) -> Result<()> {
    let what = format!("unpack {}", file_name(package));
    command::run(
        tied("dpkg-deb").arg("--extract").arg(package).arg(root),
        &what,
    )
    .with_context(|| {
        format!(
            "when the file is damaged, remove {} and start again",
            package.display()
        )
    })
}

/// The last part of a path, to show or to compare.
pub(crate) fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

/// Runs a prepared command with its output into a log; on failure shows the log's end.
pub(crate) fn logged(command: &mut Command, log: &Path, what: &str) -> Result<()> {
    let file = fs::File::create(log).with_context(|| format!("make the log {}", log.display()))?;
    let status = command
        .stdin(std::process::Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("{what}: start the command"))?;
    if !status.success() {
        let text = fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        bail!(
            "{what}: ended with {status}; from {}:\n{}",
            log.display(),
            reason(&text)
        );
    }
    Ok(())
}

/// The part of a build's log that says why it failed: parallel jobs write on after the first error.
pub(crate) fn reason(text: &str) -> String {
    const LINES: usize = 25;
    match text.lines().position(|line| line.contains(": *** [")) {
        Some(at) => command::tail(
            &text.lines().take(at + 1).collect::<Vec<_>>().join("\n"),
            LINES,
        ),
        None => command::tail(text, LINES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_runs_through_the_loader_of_its_tree() {
        let command = Sysroot::at(PathBuf::from("/tree")).program("usr/bin/xz");
        let words: Vec<_> = command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let line = words.join(" ");
        assert!(line.ends_with(
            "/tree/usr/lib64/ld-linux-x86-64.so.2 --library-path /tree/usr/lib/x86_64-linux-gnu /tree/usr/bin/xz"
        ) || line.ends_with("--library-path /tree/usr/lib/x86_64-linux-gnu /tree/usr/bin/xz"));
    }

    #[test]
    fn the_first_error_of_make_is_the_reason() {
        let text = "  CC a.o\nno python\nmake[4]: *** [Makefile:1: x] Error 127\n  CC b.o\nmake: *** [Makefile:2: y] Error 2\n";
        assert!(reason(text).ends_with("no python\nmake[4]: *** [Makefile:1: x] Error 127"));
        assert_eq!(reason("no make at all\n"), "no make at all");
    }

    #[test]
    fn a_refusal_says_what_to_change() {
        let text = format!("{:#}", refused(true, &anyhow!("no")));
        assert!(text.contains("CAP_SYS_ADMIN"), "{text}");
        let text = format!("{:#}", refused(false, &anyhow!("no")));
        assert!(text.contains("as root"), "{text}");
    }
}
