//! How another shell has a lease revoked: a socket beside that of the lease.
//!
//! The owner's socket for holders cannot serve for it: it sends before anybody asks, and it is gone
//! once a lease has had its only holder. This one is for the user that grants, and for root, and
//! lasts as long as the lease. It takes the line `revoke` and answers with lines of JSON, of which
//! the last one has no `draining`.

use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use barlease::Peer;
use serde::Deserialize;
use serde::Serialize;

use super::Socket;

/// The request.
pub(crate) const REVOKE: &str = "revoke";
/// How long somebody may take to ask.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections at a time; they are of the same user.
pub(crate) const MOST: usize = 32;

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Answer {
    /// An importer has still to let go; another answer follows.
    Draining,
    Revoked {
        microseconds: u64,
    },
    /// Its driver cannot revoke it: it ends with the device.
    Closed {
        reason: String,
    },
    Failed {
        reason: String,
    },
}

/// The socket that belongs to that of a lease.
pub(crate) fn path(lease: &Path) -> PathBuf {
    let mut path = lease.as_os_str().to_owned();
    path.push(".control");
    path.into()
}

/// Somebody that asks.
pub(super) struct Asked {
    pub(crate) granted: usize,
    pub(crate) stream: UnixStream,
    line: Vec<u8>,
    deadline: Instant,
    /// It has asked, and waits for the end.
    pub(crate) waits: bool,
    told: bool,
}

impl Asked {
    /// A connection, if there is one by somebody that may ask.
    pub(super) fn accept(socket: &Socket, granted: usize) -> io::Result<Option<Self>> {
        let (stream, _) = match socket.listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            answer => answer?,
        };
        stream.set_nonblocking(true)?;
        // The mode of the file says so already; it can be changed.
        let us = rustix::process::geteuid().as_raw();
        let may = Peer::of(&stream).is_ok_and(|peer| peer.uid == us || peer.uid == 0);
        Ok(may.then(|| Self {
            granted,
            stream,
            line: Vec::new(),
            deadline: Instant::now() + PATIENCE,
            waits: false,
            told: false,
        }))
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        (!self.waits).then_some(self.deadline)
    }

    /// Reads what there is. Whether to keep the connection.
    pub(crate) fn read(&mut self) -> bool {
        // More than is understood: unread bytes would reset the connection, answer and all.
        let mut bytes = [0; 256];
        match self.stream.read(&mut bytes) {
            Ok(0) => return false,
            Ok(count) => self.line.extend(bytes.iter().take(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return self.deadline > Instant::now();
            }
            Err(_) => return false,
        }
        self.waits = self.line == format!("{REVOKE}\n").as_bytes();
        if !self.waits && (self.line.ends_with(b"\n") || self.line.len() > REVOKE.len()) {
            let reason = format!("only {REVOKE:?} is understood");
            self.tell(&Answer::Failed { reason });
            return false;
        }
        true
    }

    /// Whether it waits for more.
    pub(crate) fn tell(&mut self, answer: &Answer) -> bool {
        let draining = *answer == Answer::Draining;
        if draining && self.told {
            return true;
        }
        self.told = true;
        // It is short: there is room for it. A peer that is gone does not want to know.
        let text = serde_json::to_string(answer).unwrap_or_default();
        let sent = self.stream.write_all(format!("{text}\n").as_bytes());
        draining && sent.is_ok()
    }
}
