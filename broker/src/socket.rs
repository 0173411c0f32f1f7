//! The socket: one daemon a directory.

use std::fs;
use std::fs::File;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// The right to serve a directory: whoever has it may replace a socket that is left.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "held")] File);

impl Lock {
    /// Takes it, and makes the directory if need be.
    ///
    /// # Errors
    ///
    /// `AddrInUse`: a daemon is alive.
    pub(crate) fn take(directory: &Path) -> io::Result<Self> {
        let said = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("lock {}: {error}", directory.display()),
            )
        };
        fs::create_dir_all(directory).map_err(said)?;
        // Nobody else may open it: who waits for a lock has it when we end.
        let mut options = File::options();
        let lock = options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(directory.join("lock"))
            .map_err(said)?;
        lock.set_permissions(Permissions::from_mode(0o600))
            .map_err(said)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(lock)),
            Err(Errno::WOULDBLOCK) => {
                let kind = io::ErrorKind::AddrInUse;
                Err(said(io::Error::new(kind, "another barleased serves there")))
            }
            Err(errno) => Err(said(errno.into())),
        }
    }
}

/// The socket.
#[derive(Debug)]
pub(crate) struct Socket {
    /// Where it is removed at the end.
    path: Option<PathBuf>,
    listener: UnixListener,
}

impl Socket {
    /// Binds `leases.sock` in a directory, in the place of one that a dead daemon has left.
    ///
    /// # Errors
    ///
    /// `AlreadyExists`: something else has the name.
    pub(crate) fn bind(directory: &Path, _lock: &Lock) -> io::Result<Self> {
        let path = directory.join("leases.sock");
        let said = |error: io::Error| {
            io::Error::new(error.kind(), format!("bind {}: {error}", path.display()))
        };
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(said(error)),
            Ok(old) if old.file_type().is_socket() => fs::remove_file(&path).map_err(said)?,
            Ok(_) => {
                let kind = io::ErrorKind::AlreadyExists;
                return Err(said(io::Error::new(kind, "it is no socket: remove it")));
            }
        }
        let listener = UnixListener::bind(&path).map_err(said)?;
        // Policy says which user may have which range.
        fs::set_permissions(&path, Permissions::from_mode(0o666)).map_err(said)?;
        let path = Some(path);
        Ok(Self { path, listener })
    }

    /// Goes on with one that an earlier daemon has bound there, unless somebody has removed it.
    pub(crate) fn again(directory: &Path, listener: UnixListener) -> Option<Self> {
        let path = directory.join("leases.sock");
        let there = fs::symlink_metadata(&path).is_ok_and(|file| file.file_type().is_socket());
        let path = Some(path);
        there.then_some(Self { path, listener })
    }

    /// One that the manager has made, and removes.
    pub(crate) fn activated(listener: UnixListener) -> Self {
        Self {
            path: None,
            listener,
        }
    }

    /// Where clients come from.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// Leaves it for the next daemon.
    pub(crate) fn leave(&mut self) {
        self.path = None;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It is replaced by the next daemon if it stays.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_can_open_the_lock_and_so_keep_it() {
        let place = tempfile::tempdir().unwrap();
        // As an older daemon has left it.
        let path = place.path().join("lock");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let lock = Lock::take(place.path()).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = Lock::take(place.path()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        drop(lock);
        Lock::take(place.path()).unwrap();
    }
}
