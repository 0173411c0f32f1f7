//! The process at the other end of a socket.

use std::os::fd::AsFd;

use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::sys;

/// The process at the other end of a connection, as it was when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// Its process. `None` if that is of a PID namespace that this one does not see into.
    pub pid: Option<u32>,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

impl Peer {
    /// Asks the kernel who is at the other end of a unix socket.
    ///
    /// Errors: [`Error::Io`].
    pub fn of(socket: impl AsFd) -> Result<Self> {
        let (pid, uid, gid) = sys::credentials::peer(socket.as_fd())
            .map_err(|errno| Error::from_errno("ask for the peer", Object::Socket, errno))?;
        Ok(Self {
            pid: u32::try_from(pid).ok().filter(|pid| *pid != 0),
            uid,
            gid,
        })
    }
}
