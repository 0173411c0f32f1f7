//! Sends a lease, as much at a time as the socket takes.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

use crate::Error;
use crate::Lease;
use crate::Result;
use crate::error::Object;
use crate::record;

/// A lease on its way out, for programs that must not wait.
///
/// # Examples
///
/// ```no_run
/// # fn example(lease: &barlease::Lease, socket: &std::os::unix::net::UnixStream)
/// # -> barlease::Result<()> {
/// let mut sender = barlease::Sender::new(lease)?;
/// while !sender.poll(socket)? {
///     // Do something else until the socket can be written to.
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sender<'a> {
    lease: &'a Lease,
    record: Vec<u8>,
    sent: usize,
}

impl<'a> Sender<'a> {
    /// Begins to send a lease.
    ///
    /// Errors: [`Error::Invalid`]: what is known of it is too long.
    pub fn new(lease: &'a Lease) -> Result<Self> {
        let record = record::encode(lease.described(), lease.memory_type());
        Ok(Self {
            lease,
            record: record.ok_or_else(|| {
                Error::invalid("send", lease.object(), "the description is too long")
            })?,
            sent: 0,
        })
    }

    /// Sends what the socket takes now, without waiting. True: all has been sent. False: call it
    /// again when the socket can be written to.
    ///
    /// Errors: [`Error::Io`]; the connection is of no more use then.
    pub fn poll(&mut self, socket: impl AsFd) -> Result<bool> {
        let answer = self.step(socket.as_fd(), SendFlags::DONTWAIT)?;
        Ok(answer.is_some())
    }

    pub(super) fn step(&mut self, socket: BorrowedFd<'_>, flags: SendFlags) -> Result<Option<()>> {
        while let Some(rest) = self.record.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let fds = [self.lease.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // With the first byte, once.
            if self.sent == 0 && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(Error::from_errno("send", Object::Socket, Errno::NOBUFS));
            }
            let flags = flags | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(socket, &[IoSlice::new(rest)], &mut control, flags) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(Error::from_errno("send", Object::Socket, errno)),
            }
        }
        Ok(Some(()))
    }
}
