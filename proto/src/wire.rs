//! Messages: JSON, a NUL byte, and descriptors with the first byte.

use std::collections::VecDeque;
use std::io;
use std::io::ErrorKind;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::ReturnFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::Error;
use crate::error::Result;

/// Longest message: one with the most ranges that a lease can have needs a third.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Most descriptors of a message; the interface has methods with one.
const MAX_FDS: usize = 4;

/// A message as it was received.
#[derive(Debug)]
pub struct Message {
    /// JSON.
    pub json: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
    /// Why there are not all of them: this process has as many open as it may have.
    pub lost: Option<io::Error>,
}

/// A call, as it is written.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    /// Full name of the method.
    pub method: String,
    /// Its parameters.
    #[serde(default)]
    pub parameters: Value,
    /// Whether several replies are wanted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// Whether none is.
    #[serde(default, skip_serializing_if = "is_false")]
    pub oneway: bool,
}

/// A reply, as it is written.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// The answer.
    #[serde(default)]
    pub parameters: Value,
    /// Whether further replies come.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
    /// Full name of an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// One end of a connection.
#[derive(Debug)]
pub struct Wire {
    socket: UnixStream,
    /// Bytes that were received, and how many of them have no NUL.
    bytes: Vec<u8>,
    searched: usize,
    fds: VecDeque<OwnedFd>,
    /// Why descriptors of the next message could not be received.
    lost: Option<Errno>,
}

impl Wire {
    /// Talks over a socket. A time-out of the socket's is one of each operation.
    #[must_use]
    pub fn new(socket: UnixStream) -> Self {
        // With it rustix makes an identifier of a process, which cannot be 0, of what the kernel
        // says of a sender of another PID namespace: 0.
        let _ = rustix::net::sockopt::set_socket_passcred(&socket, false);
        Self {
            socket,
            bytes: Vec::new(),
            searched: 0,
            fds: VecDeque::new(),
            lost: None,
        }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a message, with descriptors, of which the receiver gets copies.
    ///
    /// Errors: [`Error::Io`]; the connection is of no use after it.
    pub fn send(&mut self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = serde_json::to_vec(message).map_err(|e| Error::io("send", e.into()))?;
        bytes.push(0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Error::io("send", ErrorKind::InvalidInput.into()));
        }
        // Descriptors go with the first byte that is sent.
        let sent = loop {
            let parts = [IoSlice::new(&bytes)];
            let flags = SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(self.socket.as_fd(), &parts, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::io("send", errno.into())),
                Ok(sent) => break sent,
            }
        };
        let rest = bytes.get(sent..).unwrap_or_default();
        self.socket
            .write_all(rest)
            .map_err(|error| Error::io("send", error))
    }

    /// Receives the next message; `None` at an orderly end.
    ///
    /// The kernel does not say with which byte a descriptor came, only with which call: what has
    /// come when a message is whole is that message's. So nothing may be sent before the peer has
    /// answered, except to who sends no descriptors.
    ///
    /// Errors: [`Error::Io`], a time-out included, after which it can be tried again;
    /// [`Error::Closed`] in the middle of a message; [`Error::Malformed`].
    pub fn receive(&mut self) -> Result<Option<Message>> {
        loop {
            if let Some(json) = self.take()? {
                return Ok(Some(Message {
                    json,
                    fds: self.fds.drain(..).collect(),
                    lost: self.lost.take().map(Into::into),
                }));
            }
            if self.fill()? == 0 {
                return if self.bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(Error::Closed)
                };
            }
        }
    }

    /// A message that is here already.
    fn take(&mut self) -> Result<Option<Vec<u8>>> {
        let fresh = self.bytes.get(self.searched..).unwrap_or_default();
        let Some(at) = fresh.iter().position(|byte| *byte == 0) else {
            self.searched = self.bytes.len();
            if self.searched > MAX_MESSAGE {
                return Err(Error::Malformed(format!("more than {MAX_MESSAGE} bytes")));
            }
            return Ok(None);
        };
        let end = self.searched + at;
        let rest = self.bytes.split_off(end + 1);
        let mut json = std::mem::replace(&mut self.bytes, rest);
        json.truncate(end);
        self.searched = 0;
        Ok(Some(json))
    }

    fn fill(&mut self) -> Result<usize> {
        let mut chunk = [0; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut chunk)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::io("receive", errno.into())),
                Ok(received) => break received,
            }
        };
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = item {
                self.fds.extend(fds);
            }
        }
        let cut = received.flags.contains(ReturnFlags::CTRUNC);
        if cut {
            // Too many for us to have, or for a message.
            self.lost = rustix::io::fcntl_dupfd_cloexec(&self.socket, 0).err();
        }
        if (cut && self.lost.is_none()) || self.fds.len() > MAX_FDS {
            return Err(Error::Malformed(
                "more descriptors than any message has".to_owned(),
            ));
        }
        self.bytes
            .extend(chunk.get(..received.bytes).unwrap_or_default());
        Ok(received.bytes)
    }
}

/// Parameters, where none at all are as good as empty ones.
pub(crate) fn parameters<T: DeserializeOwned>(value: Value) -> Result<T> {
    let value = match value {
        Value::Null => Value::Object(serde_json::Map::new()),
        value => value,
    };
    serde_json::from_value(value).map_err(|error| Error::Malformed(error.to_string()))
}
