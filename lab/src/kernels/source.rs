//! A build from a kernel's source, as Debian packages it.
//!
//! The package is unpacked into a folder of the cache, which is `/work` in the tool chain; the
//! source is in `/work/src`. The work is kept when the build is interrupted: Kbuild trusts no
//! file whose command it has not noted as done.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::packages::apt::{Apt, Package};
use crate::packages::cache::{self, Cache, fingerprint};
use crate::packages::command;
use crate::packages::report::Step;
use crate::packages::sysroot::{Sysroot, file_name, logged};

/// The arguments are patterns, relative to the top of the source, of what is left in the archive.
const UNPACK: &str = r#"
set -eu
rm -rf /work/src
mkdir /work/src
cd /work/src
archive=$(echo /work/usr/src/linux-source-*.tar.xz)
top=$(basename "$archive" .tar.xz)
for pattern; do
    shift
    set -- "$@" --exclude="$top/$pattern"
done
tar --extract --file "$archive" --strip-components=1 --no-same-owner "$@"
rm -rf /work/usr
touch /work/unpacked
"#;

/// A build in progress.
pub(crate) struct SourceBuild<'a> {
    /// Where it happens.
    pub(crate) folder: PathBuf,
    /// The output of its last command.
    pub(crate) log: PathBuf,
    pub(crate) sysroot: &'a Sysroot,
    /// The kernel.
    pub(crate) name: &'a str,
    /// Patterns of what the build does not need.
    pub(crate) left_out: &'a [String],
}

impl<'a> SourceBuild<'a> {
    /// A build that goes by its own name in the cache, and not by that of a kernel.
    pub(crate) fn of_tools(
        cache: &Cache,
        sysroot: &'a Sysroot,
        name: &'a str,
        left_out: &'a [String],
    ) -> Self {
        Self {
            folder: cache.path("build").join(name),
            log: cache.path(format!("{name}.log")),
            sysroot,
            name,
            left_out,
        }
    }

    /// Whether this source was unpacked before, for this tool chain.
    pub(crate) fn is_unpacked(&self, package: &str) -> bool {
        fs::read_to_string(self.stamp()).is_ok_and(|text| text == self.made_from(package))
            && self.unpacked().exists()
    }

    /// Downloads the source package and begins anew with it, unless that was done before.
    pub(crate) fn fetch(&self, apt: &Apt, source: &Package, purpose: &str) -> Result<()> {
        if self.is_unpacked(&source.file_name()) {
            return Ok(());
        }
        let sources = std::slice::from_ref(source);
        apt.download(sources, purpose)?;
        self.unpack(&apt.file(source))?;
        apt.forget(sources)
    }

    /// Begins anew, with the source package in the file `package`.
    pub(crate) fn unpack(&self, package: &Path) -> Result<()> {
        cache::remove(&self.folder)?;
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("make {}", self.folder.display()))?;
        cache::write(&self.stamp(), self.made_from(&file_name(package)))?;
        let step = Step::start(format!("unpacking the source of {}", self.name));
        let mut extract = command::tied("dpkg-deb");
        extract.arg("--extract").arg(package).arg(&self.folder);
        command::run(&mut extract, "unpack the source package")?;
        let mut unpack = self.command(UNPACK)?;
        unpack.args(self.left_out);
        logged(&mut unpack, &self.log, "unpack the kernel's source")?;
        step.done();
        Ok(())
    }

    /// Has the next build begin with [`Self::unpack`].
    pub(crate) fn distrust(&self) -> Result<()> {
        cache::remove(&self.unpacked())
    }

    /// A shell script to run in the tool chain. Arguments can be added.
    pub(crate) fn command(&self, script: &str) -> Result<Command> {
        let mut command = self.sysroot.enter(&[(&self.folder, "/work")])?;
        command.args(["sh", "-c", script, "sh"]);
        Ok(command)
    }

    fn stamp(&self) -> PathBuf {
        self.folder.join("made-from")
    }

    fn unpacked(&self) -> PathBuf {
        self.folder.join("unpacked")
    }

    fn made_from(&self, package: &str) -> String {
        let sysroot = self.sysroot.path("").display().to_string();
        let ours = [package, &sysroot, UNPACK];
        fingerprint(
            ours.into_iter()
                .chain(self.left_out.iter().map(String::as_str)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_goes_on_with_the_same_source_tools_and_patterns_only() {
        let folder = tempfile::tempdir().unwrap();
        let (sysroot, other) = (Sysroot::at("/a".into()), Sysroot::at("/b".into()));
        let (few, more) = (["x/*".to_owned()], ["x/*".to_owned(), "y/*".to_owned()]);
        let build = |sysroot, left_out| SourceBuild {
            folder: folder.path().to_owned(),
            log: folder.path().join("log"),
            sysroot,
            name: "7.3",
            left_out,
        };
        let first = build(&sysroot, &few);
        assert!(!first.is_unpacked("a.deb"));
        fs::write(first.stamp(), first.made_from("a.deb")).unwrap();
        assert!(!first.is_unpacked("a.deb"), "it was interrupted");
        fs::write(first.unpacked(), "").unwrap();
        assert!(first.is_unpacked("a.deb"));
        assert!(!first.is_unpacked("b.deb"));
        assert!(!build(&other, &few).is_unpacked("a.deb"));
        assert!(!build(&sysroot, &more).is_unpacked("a.deb"));
        first.distrust().unwrap();
        assert!(!first.is_unpacked("a.deb"));
    }
}
