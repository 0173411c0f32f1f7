//! The cache folder: where it is, its locks, and how results get into it.
//!
//! A result is made under a temporary name and renamed when it is complete, then a stamp says what
//! it was made from. So a run that is interrupted anywhere loses at most the step it was in, and
//! nothing half-made is ever used.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The layout's generation: folders of another one are never looked at.
const GENERATION: &str = "v1";

/// The cache folder.
#[derive(Clone, Debug)]
pub struct Cache {
    top: PathBuf,
}

/// A lock on something in the cache, given back when dropped (or when the process ends, however
/// that happens).
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Cache {
    /// Opens the cache at `BARLEASE_CACHE`, `$XDG_CACHE_HOME/barlease` or `~/.cache/barlease`,
    /// whichever is set first.
    ///
    /// # Errors
    ///
    /// When none of these is set, or the folder cannot be made.
    pub fn open() -> Result<Self> {
        let top = location(|name| std::env::var_os(name))?.join(GENERATION);
        fs::create_dir_all(&top).with_context(|| {
            format!(
                "make the cache folder {} (BARLEASE_CACHE chooses another place)",
                top.display()
            )
        })?;
        Ok(Self { top })
    }

    /// The path of a thing in the cache.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.top.join(name)
    }

    /// Takes the lock called `name` for oneself, waiting for its holder and saying so.
    ///
    /// # Errors
    ///
    /// When the lock file cannot be opened or locked.
    pub fn lock(&self, name: &str, purpose: &str) -> Result<Lock> {
        let path = self.top.join(format!("{name}.lock"));
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("open the lock {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            eprintln!(
                "waiting for {}, which holds {}",
                holder_name(&holder),
                path.display()
            );
            flock(&file, FlockOperation::LockExclusive)
                .with_context(|| format!("lock {}", path.display()))?;
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "process {} ({purpose})", std::process::id())?;
        Ok(Lock { _file: file })
    }

    /// Says that this process uses what is in the cache, so that nobody removes it meanwhile.
    ///
    /// # Errors
    ///
    /// When the lock file cannot be opened or locked.
    pub fn in_use(&self) -> Result<Lock> {
        self.use_lock(
            FlockOperation::NonBlockingLockShared,
            FlockOperation::LockShared,
        )
    }

    /// Waits until nobody uses the cache.
    ///
    /// # Errors
    ///
    /// When the lock file cannot be opened or locked.
    pub fn exclusively(&self) -> Result<Lock> {
        self.use_lock(
            FlockOperation::NonBlockingLockExclusive,
            FlockOperation::LockExclusive,
        )
    }

    fn use_lock(&self, now: FlockOperation, wait: FlockOperation) -> Result<Lock> {
        let path = self.top.join("use.lock");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("open the lock {}", path.display()))?;
        if flock(&file, now).is_err() {
            eprintln!(
                "waiting for other users of the cache {}",
                self.top.display()
            );
            flock(&file, wait).with_context(|| format!("lock {}", path.display()))?;
        }
        Ok(Lock { _file: file })
    }

    /// Removes everything in the cache.
    ///
    /// # Errors
    ///
    /// When something cannot be removed.
    pub fn clean(&self) -> Result<()> {
        let _alone = self.exclusively()?;
        for entry in fs::read_dir(&self.top)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "lock") {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

fn holder_name(text: &str) -> &str {
    match text.trim() {
        "" => "another process",
        text => text,
    }
}

fn location(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let set = |name| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let place = set("BARLEASE_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|path| path.join("barlease")))
        .or_else(|| set("HOME").map(|path| path.join(".cache/barlease")));
    match place {
        Some(path) if path.is_absolute() => Ok(path),
        Some(path) => Ok(std::env::current_dir()?.join(path)),
        None => bail!("no place for the cache: set BARLEASE_CACHE, XDG_CACHE_HOME or HOME"),
    }
}

/// The name under which something that will be `path` is made.
#[must_use]
pub fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".unfinished");
    path.with_file_name(name)
}

/// A part of a name that no other process and no other thread has.
#[must_use]
pub fn unique() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("{}-{number}", std::process::id())
}

/// Writes a file so that it has either its old content or all of the new.
///
/// # Errors
///
/// When it cannot be written.
pub fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    // Two processes or threads may write the same thing at once: the last one wins, neither is
    // torn.
    let new = unfinished(path).with_extension(unique());
    fs::write(&new, content)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("write {}", path.display()))
}

/// Writes a value as JSON, as [`write()`] does.
///
/// # Errors
///
/// When it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write(path, serde_json::to_vec_pretty(value)?)
}

/// Reads a value from JSON; `None` when the file is absent or of an older make.
#[must_use]
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The inputs that a step was made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    made_from: Vec<String>,
}

impl Stamp {
    pub(crate) fn of(parts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            made_from: parts.into_iter().map(Into::into).collect(),
        }
    }

    /// Whether the file has it.
    pub(crate) fn fits(&self, path: &Path) -> bool {
        read_json::<Self>(path).as_ref() == Some(self)
    }
}

/// Removes a file or a whole folder, if it is there.
///
/// # Errors
///
/// When it cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    result.with_context(|| format!("remove {}", path.display()))
}

/// A short name for some content, the same on every machine.
#[must_use]
pub fn fingerprint(parts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.as_ref().len() as u64).to_le_bytes());
        hash.update(part.as_ref());
    }
    hash.finalize()
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(pairs: &[(&str, &str)]) -> Result<PathBuf> {
        location(|name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn a_file_that_many_threads_write_is_whole() {
        let folder = std::env::temp_dir().join(format!("barlease-cache-{}", unique()));
        fs::create_dir(&folder).unwrap();
        let path = folder.join("file");
        std::thread::scope(|scope| {
            for byte in b'a'..b'i' {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..200 {
                        write(path, vec![byte; 10_000]).unwrap();
                    }
                });
            }
        });
        let content = fs::read(&path).unwrap();
        assert_eq!(content, vec![content[0]; 10_000]);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn the_first_variable_that_is_set_decides() {
        let home = ("HOME", "/home/u");
        assert_eq!(at(&[home]).unwrap(), Path::new("/home/u/.cache/barlease"));
        assert_eq!(
            at(&[home, ("XDG_CACHE_HOME", "/x")]).unwrap(),
            Path::new("/x/barlease")
        );
        assert_eq!(
            at(&[home, ("XDG_CACHE_HOME", "/x"), ("BARLEASE_CACHE", "/b")]).unwrap(),
            Path::new("/b")
        );
        assert_eq!(
            at(&[home, ("BARLEASE_CACHE", "")]).unwrap(),
            Path::new("/home/u/.cache/barlease")
        );
        assert!(at(&[]).is_err());
    }

    #[test]
    fn a_fingerprint_tells_parts_apart() {
        assert_ne!(fingerprint(["ab", "c"]), fingerprint(["a", "bc"]));
        assert_eq!(fingerprint(["ab"]).len(), 12);
    }

    #[test]
    fn a_value_survives_writing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("value.json");
        write_json(&path, &vec![1, 2]).unwrap();
        assert_eq!(read_json::<Vec<i32>>(&path), Some(vec![1, 2]));
        assert_eq!(read_json::<String>(&path), None);
        assert!(!unfinished(&path).exists());
    }
}
