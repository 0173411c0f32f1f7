//! The guest's file system: one archive in memory with busybox, init, modules, and what is to be
//! run.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

const INIT: &str = include_str!("init.sh");

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                      owner:x:1000:1000:owner:/tmp:/bin/sh\n\
                      holder1:x:1001:1001:holder1:/tmp:/bin/sh\n\
                      holder2:x:1002:1002:holder2:/tmp:/bin/sh\n\
                      holder3:x:1003:1003:holder3:/tmp:/bin/sh\n\
                      nobody:x:65534:65534:nobody:/tmp:/bin/sh\n";
const GROUP: &str = "root:x:0:\nowner:x:1000:\nholder1:x:1001:\nholder2:x:1002:\nholder3:x:1003:\nnogroup:x:65534:\n";

/// An archive in the making.
#[derive(Debug)]
pub(crate) struct Initramfs<W: Write> {
    out: W,
    folders: BTreeSet<String>,
    next: u32,
}

impl<W: Write> Initramfs<W> {
    /// Begins with what every guest has.
    pub(crate) fn new(out: W, busybox: &Path) -> Result<Self> {
        let mut archive = Self {
            out,
            folders: BTreeSet::new(),
            next: 0,
        };
        for folder in [
            "dev",
            "proc",
            "sys",
            "root",
            "tmp",
            "run",
            "lab/bin",
            "lib/modules",
        ] {
            archive.folder(folder)?;
        }
        // For the kernel, until init has mounted its own.
        archive.device("dev/console", 5, 1)?;
        archive.device("dev/null", 1, 3)?;
        archive.copy("bin/busybox", busybox)?;
        archive.link("bin/sh", "busybox")?;
        archive.file("init", INIT, 0o755)?;
        archive.file("etc/passwd", PASSWD, 0o644)?;
        archive.file("etc/group", GROUP, 0o644)?;
        Ok(archive)
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, name: &str, content: impl AsRef<[u8]>, mode: u32) -> Result<()> {
        self.entry(name, content.as_ref(), mode, ModeFileType::Regular, (0, 0))
    }

    /// Adds a copy of a file of the host, with its permissions.
    pub(crate) fn copy(&mut self, name: &str, from: &Path) -> Result<()> {
        let read = || -> std::io::Result<_> {
            Ok((fs::read(from)?, fs::metadata(from)?.permissions().mode()))
        };
        let (content, mode) =
            read().with_context(|| format!("read {} to put it into the guest", from.display()))?;
        // Programs of unprivileged users in the guest must reach it, whatever our umask was.
        let mode = if mode & 0o100 == 0 { 0o644 } else { 0o755 };
        self.file(name, content, mode)
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.entry(
            name,
            target.as_bytes(),
            0o777,
            ModeFileType::Symlink,
            (0, 0),
        )
    }

    /// Ends the archive.
    pub(crate) fn finish(self) -> Result<W> {
        let mut out = trailer(self.out).context("end the guest's file system")?;
        out.flush()?;
        Ok(out)
    }

    fn folder(&mut self, name: &str) -> Result<()> {
        if self.folders.insert(name.to_owned()) {
            self.entry(name, &[], 0o755, ModeFileType::Directory, (0, 0))?;
        }
        Ok(())
    }

    fn device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        self.entry(name, &[], 0o600, ModeFileType::Char, (major, minor))
    }

    fn entry(
        &mut self,
        name: &str,
        content: &[u8],
        mode: u32,
        kind: ModeFileType,
        device: (u32, u32),
    ) -> Result<()> {
        let name = name.trim_start_matches('/');
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.folder(parent)?;
        }
        self.next += 1;
        let write = || -> std::io::Result<()> {
            let size = u32::try_from(content.len()).map_err(std::io::Error::other)?;
            let mut entry = Builder::new(name)
                .ino(self.next)
                .nlink(1)
                .mode(mode)
                .rdev_major(device.0)
                .rdev_minor(device.1)
                .set_mode_file_type(kind)
                .write(&mut self.out, size);
            entry.write_all(content)?;
            entry.finish()?;
            Ok(())
        };
        write().with_context(|| format!("put /{name} into the guest's file system"))
    }
}

/// A word as the shell takes it literally.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::Command;

    #[test]
    fn what_is_put_in_comes_out() {
        let folder = tempfile::tempdir().unwrap();
        let busybox = folder.path().join("busybox");
        fs::write(&busybox, "a program").unwrap();
        let mut archive = Initramfs::new(Vec::new(), &busybox).unwrap();
        archive.file("/lab/deep/file", "content", 0o640).unwrap();
        let bytes = archive.finish().unwrap();

        let mut rest = bytes.as_slice();
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut content = String::new();
            reader.read_to_string(&mut content).unwrap();
            found.push((
                reader.entry().name().to_owned(),
                reader.entry().mode(),
                content,
            ));
            rest = reader.finish().unwrap();
        }
        assert!(found.contains(&("lab/deep/file".to_owned(), 0o100_640, "content".to_owned())));
        assert!(
            found
                .iter()
                .any(|entry| entry.0 == "bin/sh" && entry.1 == 0o120_777 && entry.2 == "busybox")
        );
        assert!(
            found
                .iter()
                .any(|entry| entry.0 == "dev/console" && entry.1 == 0o020_600)
        );
        let position = |name: &str| found.iter().position(|entry| entry.0 == name).unwrap();
        assert!(position("lab/deep") < position("lab/deep/file"));
    }

    #[test]
    fn the_shell_takes_quoted_words_literally() {
        for word in ["plain", "two words", "it's", "$HOME `x` \\n \"q\""] {
            let out = Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(out.stdout).unwrap(), word);
        }
    }
}
