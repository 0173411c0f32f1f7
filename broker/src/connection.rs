//! A client's connection, which never waits: what was received of a call, and what is left to send.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use barlease_ledger::types::BufferId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::Time;
use barlease_proto::MAX_MESSAGE;
use barlease_proto::Usage;
use rustix::io::Errno;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

use crate::peer::Identity;

/// Bytes that wait to be sent, above which a client that is told news is given up.
const MAX_UNSENT: usize = MAX_MESSAGE;
/// Bytes that are read at a time: a client that sends without end gets its turn like all others.
const CHUNK: usize = 64 << 10;

/// A message to be sent.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) bytes: Vec<u8>,
    /// The descriptor of a lease, which goes with the first byte.
    pub(crate) lease: Option<(LeaseId, OwnedFd)>,
}

/// The call that a connection is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Busy {
    /// One answer, which nobody wants if it is one-way.
    Call { oneway: bool },
    /// News, until the connection ends.
    Watch,
    /// The leases after this one.
    List(Listing),
}

/// A List that is being answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    /// The last lease that was told.
    pub(crate) after: LeaseId,
    /// Of this pool only.
    pub(crate) pool: Option<String>,
    /// How leases are used, if that was asked for.
    pub(crate) usage: Option<Arc<BTreeMap<BufferId, Usage>>>,
}

/// The object of an Acquire that is not answered.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) began: Instant,
    pub(crate) pool: Option<String>,
    pub(crate) device: Option<String>,
    pub(crate) bar: Option<u8>,
    pub(crate) size: Option<u64>,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: UnixStream,
    pub(crate) identity: Identity,
    pub(crate) busy: Option<Busy>,
    pub(crate) asked: Option<Asked>,
    input: Vec<u8>,
    /// Bytes of it that have no NUL.
    searched: usize,
    output: VecDeque<Outgoing>,
    /// Bytes of the first of them that are sent.
    sent: usize,
    unsent: usize,
    /// When it is given up unless it takes something.
    pub(crate) give_up: Option<Time>,
}

impl Connection {
    pub(crate) fn new(socket: UnixStream, identity: Identity) -> Self {
        Self {
            socket,
            identity,
            busy: None,
            asked: None,
            input: Vec::new(),
            searched: 0,
            output: VecDeque::new(),
            sent: 0,
            unsent: 0,
            give_up: None,
        }
    }

    /// Receives what is there, up to a limit; `false`: the client sends no more.
    ///
    /// Descriptors are not asked for: the kernel closes those that come.
    pub(crate) fn receive(&mut self) -> io::Result<bool> {
        let start = self.input.len();
        self.input.resize(start + CHUNK, 0);
        let mut control = RecvAncillaryBuffer::default();
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut self.input[start..])],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        );
        let bytes = received.as_ref().map_or(0, |received| received.bytes);
        self.input.truncate(start + bytes);
        match received {
            Ok(_) => Ok(bytes != 0),
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next call, if all of it is there.
    ///
    /// # Errors
    ///
    /// `InvalidData`: longer than any call.
    pub(crate) fn next_call(&mut self) -> io::Result<Option<Vec<u8>>> {
        let fresh = &self.input[self.searched..];
        let Some(at) = fresh.iter().position(|byte| *byte == 0) else {
            self.searched = self.input.len();
            if self.searched > MAX_MESSAGE {
                return Err(io::ErrorKind::InvalidData.into());
            }
            return Ok(None);
        };
        let end = self.searched + at;
        let rest = self.input.split_off(end + 1);
        let mut call = std::mem::replace(&mut self.input, rest);
        call.truncate(end);
        self.searched = 0;
        Ok(Some(call))
    }

    /// Puts a message behind those that are to be sent.
    ///
    /// # Errors
    ///
    /// `OutOfMemory`: the client does not read.
    pub(crate) fn push(&mut self, message: Outgoing) -> io::Result<()> {
        self.unsent += message.bytes.len();
        self.output.push_back(message);
        if self.unsent > MAX_UNSENT {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }

    /// Sends what the socket takes, and says whether that was anything.
    pub(crate) fn send(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some(first) = self.output.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = match &first.lease {
                Some((_, fd)) if self.sent == 0 => vec![fd.as_fd()],
                _ => Vec::new(),
            };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let parts = [IoSlice::new(&first.bytes[self.sent..])];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.socket, &parts, &mut control, flags) {
                Ok(sent) => {
                    any = true;
                    self.sent += sent;
                    self.unsent -= sent;
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
            if self.sent == first.bytes.len() {
                self.output.pop_front();
                self.sent = 0;
            }
        }
        Ok(any)
    }

    /// Whether anything is left to send.
    pub(crate) fn is_sending(&self) -> bool {
        !self.output.is_empty()
    }

    /// The leases whose answers were not sent to their end.
    pub(crate) fn undelivered(&self) -> impl Iterator<Item = LeaseId> + '_ {
        self.output
            .iter()
            .filter_map(|message| Some(message.lease.as_ref()?.0))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
