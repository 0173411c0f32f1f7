//! A client's connection, which never waits: what was received of a call, and what is left to send.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use barlease_ledger::types::BufferId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::Peer;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use barlease_proto::MAX_MESSAGE;
use barlease_proto::Usage;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

use crate::calls;
use crate::unread;

/// Bytes that wait to be sent, above which a client that is told news is given up.
const MAX_UNSENT: usize = MAX_MESSAGE;
/// Bytes that are read at a time: a client that sends without end gets its turn like all others.
pub(crate) const CHUNK: usize = 64 << 10;
/// Descriptors of a call; the interface has methods with one.
const MAX_FILES: usize = 4;

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
    /// Leases and requests in line.
    List(Listing),
}

/// A List that is being answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    /// The next step.
    pub(crate) next: Next,
    /// Of this pool only.
    pub(crate) pool: Option<String>,
    /// How leases are used, if that was asked for.
    pub(crate) usage: Option<Arc<BTreeMap<BufferId, Usage>>>,
}

/// The part of a List that is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Leases after this one, and all requests in line.
    Leases(LeaseId),
    /// Requests in line after this place.
    Waiters((usize, RequestId)),
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
    pub(crate) peer: Peer,
    /// The secret with which its client comes back after a restart.
    pub(crate) token: u128,
    pub(crate) busy: Option<Busy>,
    /// The request that it waits for.
    pub(crate) request: Option<RequestId>,
    pub(crate) asked: Option<Asked>,
    input: Vec<u8>,
    /// Descriptors that came with the next call.
    files: Vec<OwnedFd>,
    /// Bytes of it that have no NUL.
    searched: usize,
    output: VecDeque<Outgoing>,
    /// Bytes of the first of them that are sent.
    sent: usize,
    unsent: usize,
    /// Whether a descriptor was sent, and may not be read yet.
    unread: bool,
    /// Whether the kernel has no room for what is to be sent, so that it is tried again later.
    pub(crate) stalled: bool,
    /// The value of [`Connection::weight`] when it was counted.
    pub(crate) counted: usize,
    /// The events that the epoll has for it.
    pub(crate) armed: EventFlags,
    /// When it is given up unless it takes something.
    pub(crate) give_up: Option<Time>,
}

impl Connection {
    pub(crate) fn new(socket: UnixStream, peer: Peer, token: u128) -> Self {
        Self {
            socket,
            peer,
            token,
            files: Vec::new(),
            busy: None,
            request: None,
            asked: None,
            input: Vec::new(),
            searched: 0,
            output: VecDeque::new(),
            sent: 0,
            unsent: 0,
            unread: false,
            stalled: false,
            counted: 0,
            armed: EventFlags::IN | EventFlags::RDHUP,
            give_up: None,
        }
    }

    /// Receives what is there, up to a limit; `false`: the client sends no more.
    ///
    /// Descriptors are asked for from administrators only: else the kernel closes those that come.
    pub(crate) fn receive(&mut self, chunk: &mut [u8]) -> io::Result<bool> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = match calls::is_administrator(&self.peer) {
            true => RecvAncillaryBuffer::new(&mut space),
            false => RecvAncillaryBuffer::default(),
        };
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(chunk)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        );
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                let room = MAX_FILES - self.files.len();
                self.files.extend(files.take(room));
            }
        }
        match received {
            Ok(received) => {
                self.input.extend_from_slice(&chunk[..received.bytes]);
                Ok(received.bytes != 0)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Bytes that are kept of what it sent, and for it.
    pub(crate) fn weight(&self) -> usize {
        self.input.len() + self.unsent
    }

    /// Whether a call may be there that was not begun.
    pub(crate) fn has_input(&self) -> bool {
        self.searched < self.input.len()
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

    /// The descriptors that came with the call that was taken.
    pub(crate) fn take_files(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.files)
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
        self.stalled = false;
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
                    self.unread |= !fds.is_empty();
                    self.sent += sent;
                    self.unsent -= sent;
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                // Descriptors of others are on their way, or memory is short.
                Err(Errno::TOOMANYREFS | Errno::NOBUFS | Errno::NOMEM) => {
                    self.stalled = true;
                    break;
                }
                Err(errno) => return Err(errno.into()),
            }
            if self.sent == first.bytes.len() {
                self.output.pop_front();
                self.sent = 0;
            }
        }
        Ok(any)
    }

    /// Whether the client has read all descriptors that it was sent.
    pub(crate) fn has_read(&mut self) -> bool {
        self.unread = self.unread && unread::is_there(&self.socket);
        !self.unread
    }

    /// Whether its next call waits for it to read a descriptor.
    pub(crate) fn is_deaf(&mut self) -> bool {
        self.busy.is_none() && self.has_input() && !self.has_read()
    }

    /// Whether its next call is not read before something else has happened.
    pub(crate) fn waits(&self) -> bool {
        self.busy.is_some() || self.is_sending()
    }

    /// The socket, if a descriptor is left to read at its other end.
    pub(crate) fn into_unread(mut self) -> Option<UnixStream> {
        if self.has_read() {
            return None;
        }
        // It finds out that this is the end.
        let _ = self.socket.shutdown(Shutdown::Both);
        Some(self.socket)
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
