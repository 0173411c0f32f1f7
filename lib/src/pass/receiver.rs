//! Receives a lease, piece by piece: nothing that has come is lost.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::finish;
use crate::Error;
use crate::Lease;
use crate::LeaseInfo;
use crate::Result;
use crate::error::Object;
use crate::record;
use crate::record::SHORTEST;
use crate::sys;

/// Most bytes that are asked for at once, and room made for, beyond what has come.
const STEP: usize = 64 << 10;

/// A lease on its way in, for programs that must not wait, and for those that receive something
/// else than leases.
///
/// # Examples
///
/// ```no_run
/// # fn example(socket: &std::os::unix::net::UnixStream) -> barlease::Result<()> {
/// let mut receiver = barlease::Receiver::new();
/// let lease = loop {
///     if let Some(lease) = receiver.poll(socket)? {
///         break lease;
///     }
///     // Do something else until the socket can be read from.
/// };
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Receiver {
    record: Vec<u8>,
    fd: Option<OwnedFd>,
    any_file: bool,
}

impl Receiver {
    /// Begins to receive a lease.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes any file with a size for a lease. By default the descriptor must be a dma-buf, as the
    /// peer could truncate any other file at will, or serve it itself and let an access wait for
    /// ever. For tests.
    #[must_use]
    pub fn any_file(mut self) -> Self {
        self.any_file = true;
        self
    }

    /// Waits for the rest of the lease; see [`Lease::receive`].
    ///
    /// Errors: as for [`Lease::receive`].
    pub fn receive(mut self, socket: impl AsFd) -> Result<Lease> {
        let socket = socket.as_fd();
        finish("receive", socket, None, PollFlags::IN, |dont_wait| {
            self.step(socket, dont_wait)
        })
    }

    /// Waits for the rest of the lease, for at most so long; see [`Lease::receive_within`].
    ///
    /// Errors: as for [`Lease::receive_within`].
    pub fn receive_within(mut self, socket: impl AsFd, timeout: Duration) -> Result<Lease> {
        let socket = socket.as_fd();
        finish("receive", socket, Some(timeout), PollFlags::IN, |_| {
            self.step(socket, true)
        })
    }

    /// Takes what is there, without waiting. `None`: call it again when the socket can be read
    /// from. A receiver that has answered a lease is ready for the next one.
    ///
    /// Errors: as for [`Lease::receive`]; the connection is of no more use then.
    pub fn poll(&mut self, socket: impl AsFd) -> Result<Option<Lease>> {
        self.step(socket.as_fd(), true)
    }

    fn step(&mut self, socket: BorrowedFd<'_>, dont_wait: bool) -> Result<Option<Lease>> {
        loop {
            let wanted = match self.record.first_chunk() {
                None => SHORTEST,
                Some(head) => record::length(head).map_err(|bad| malformed(bad.0))?,
            };
            let missing = wanted - self.record.len();
            if missing == 0 {
                return self.complete().map(Some);
            }
            if !self.take(socket, missing.min(STEP), dont_wait)? {
                return Ok(None);
            }
        }
    }

    /// Takes at most `missing` bytes. False: there are none now.
    fn take(&mut self, socket: BorrowedFd<'_>, missing: usize, dont_wait: bool) -> Result<bool> {
        let have = self.record.len();
        self.record.resize(have + missing, 0);
        let answer = loop {
            let rest = self.record.get_mut(have..).unwrap_or_default();
            match sys::message::receive(socket, rest, dont_wait) {
                Err(Errno::INTR) => {}
                answer => break answer,
            }
        };
        let count = answer.as_ref().map_or(0, |received| received.bytes);
        self.record.truncate(have + count);
        let received = match answer {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(Error::from_errno("receive", Object::Socket, errno)),
        };
        if received.control_cut {
            // The kernel says the same when this process has as many descriptors as it may have.
            rustix::io::fcntl_dupfd_cloexec(socket, 0)
                .map_err(|errno| Error::from_errno("receive", Object::Socket, errno))?;
            return Err(malformed(
                "the peer sent more control data than a lease has",
            ));
        }
        if received.message_cut {
            return Err(malformed("the socket is not a stream"));
        }
        for fd in received.fds {
            if self.fd.replace(fd).is_some() {
                return Err(malformed("the peer sent several file descriptors, not one"));
            }
        }
        match (count, have) {
            (0, 0) => Err(malformed(
                "the peer closed the connection without a lease: it is for other users, or has ended",
            )),
            (0, _) => Err(malformed("the peer closed the connection in the middle")),
            _ => Ok(true),
        }
    }

    /// Makes a lease of a whole record.
    fn complete(&mut self) -> Result<Lease> {
        let record = std::mem::take(&mut self.record);
        let fd = self.fd.take();
        let fd = fd.ok_or_else(|| malformed("the peer sent no file descriptor"))?;
        let info = record::decode(&record).map_err(|bad| malformed(bad.0))?;
        let lease = Lease::with_info(fd, info)?;
        if !lease.is_dma_buf() && !self.any_file {
            return Err(malformed("the file descriptor is not one of a dma-buf"));
        }
        checked(lease)
    }
}

/// The description must fit the descriptor.
fn checked(lease: Lease) -> Result<Lease> {
    let size = lease.size();
    let fits = lease.described().is_none_or(|info| {
        info.size == size
            && info.writable == lease.is_writable()
            && (info.ranges.is_empty() || LeaseInfo::sum(&info.ranges) == Some(size))
    });
    if fits {
        return Ok(lease);
    }
    Err(malformed(
        "the description does not fit the file descriptor",
    ))
}

fn malformed(reason: &'static str) -> Error {
    Error::malformed("receive", Object::Socket, reason)
}
