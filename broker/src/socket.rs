//! The socket: one daemon a directory.

use std::fs;
use std::fs::File;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// A socket that is removed at the end.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    listener: UnixListener,
    /// Held for as long as the daemon lives: whoever has it may replace a socket that is left.
    _lock: File,
}

impl Socket {
    /// Binds `leases.sock` in a directory, in the place of one that a dead daemon has left.
    ///
    /// # Errors
    ///
    /// `AddrInUse`: a daemon is alive; `AlreadyExists`: something else has the name.
    pub(crate) fn bind(directory: &Path) -> io::Result<Self> {
        let path = directory.join("leases.sock");
        let said = |error: io::Error| {
            io::Error::new(error.kind(), format!("bind {}: {error}", path.display()))
        };
        fs::create_dir_all(directory).map_err(said)?;
        let lock = File::create(directory.join("lock")).map_err(said)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let kind = io::ErrorKind::AddrInUse;
                return Err(said(io::Error::new(kind, "another barleased serves there")));
            }
            Err(errno) => return Err(said(errno.into())),
        }
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
        Ok(Self {
            path,
            listener,
            _lock: lock,
        })
    }

    /// Where clients come from.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // It is replaced by the next daemon if it stays.
        let _ = fs::remove_file(&self.path);
    }
}
