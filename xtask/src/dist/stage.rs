//! A folder that becomes a package.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use barlease_lab::cache;

use super::output;

/// A folder in the making, with modes that do not depend on the user's umask.
#[derive(Debug)]
pub(super) struct Stage {
    root: PathBuf,
}

impl Stage {
    /// An empty folder.
    pub(super) fn new(root: PathBuf) -> Result<Self> {
        cache::remove(&root)?;
        let stage = Self { root };
        stage.folder("")?;
        Ok(stage)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Makes a folder, and those above it.
    pub(super) fn folder(&self, place: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.root.join(place);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        for above in path
            .ancestors()
            .take_while(|above| above.starts_with(&self.root))
        {
            mode(above, 0o755)?;
        }
        Ok(path)
    }

    /// Writes a file.
    pub(super) fn write(&self, place: impl AsRef<Path>, content: impl AsRef<[u8]>) -> Result<()> {
        self.write_as(place, content, 0o644)
    }

    /// Writes a program.
    pub(super) fn program(&self, place: impl AsRef<Path>, content: impl AsRef<[u8]>) -> Result<()> {
        self.write_as(place, content, 0o755)
    }

    /// Copies a file.
    pub(super) fn copy(&self, from: &Path, place: impl AsRef<Path>) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.write(place, content)
    }

    /// Makes a symbolic link.
    pub(super) fn link(&self, to: &str, place: impl AsRef<Path>) -> Result<()> {
        let place = place.as_ref();
        self.folder(place.parent().unwrap_or(Path::new("")))?;
        let path = self.root.join(place);
        std::os::unix::fs::symlink(to, &path).with_context(|| format!("link {}", path.display()))
    }

    /// Copies the files of a folder that a filter wants, and those of the folders in it.
    pub(super) fn copy_tree(
        &self,
        from: &Path,
        place: &Path,
        wanted: &dyn Fn(&Path) -> bool,
    ) -> Result<()> {
        let entries = fs::read_dir(from).with_context(|| format!("read {}", from.display()))?;
        for entry in entries {
            let path = entry?.path();
            let to = place.join(path.file_name().unwrap_or_default());
            if path.is_dir() {
                self.copy_tree(&path, &to, wanted)?;
            } else if wanted(&path) {
                self.copy(&path, to)?;
            }
        }
        Ok(())
    }

    /// Unpacks a tarball, without the times in it.
    pub(super) fn unpack(&self, tarball: &Path) -> Result<()> {
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--touch", "--no-same-owner", "--directory"])
            .arg(&self.root)
            .arg("--file")
            .arg(tarball);
        output(&mut tar, &format!("unpack {}", tarball.display()))?;
        Ok(())
    }

    /// KiB on disk, as `Installed-Size` counts them: each file rounded up, and 1 for each folder.
    pub(super) fn kib(&self) -> Result<u64> {
        kib(&self.root)
    }

    fn write_as(
        &self,
        place: impl AsRef<Path>,
        content: impl AsRef<[u8]>,
        bits: u32,
    ) -> Result<()> {
        let place = place.as_ref();
        self.folder(place.parent().unwrap_or(Path::new("")))?;
        let path = self.root.join(place);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        mode(&path, bits)
    }
}

fn mode(path: &Path, bits: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(bits))
        .with_context(|| format!("set the mode of {}", path.display()))
}

fn kib(folder: &Path) -> Result<u64> {
    let mut sum = 1;
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry?;
        sum += if entry.file_type()?.is_dir() {
            kib(&entry.path())?
        } else {
            entry.metadata()?.len().div_ceil(1024)
        };
    }
    Ok(sum)
}
