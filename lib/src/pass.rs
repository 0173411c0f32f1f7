//! Passing a lease to another process over a unix stream socket.
//!
//! One message: a header of 12 bytes, which carries the descriptor as `SCM_RIGHTS`, and the
//! [`LeaseInfo`] as JSON.
//!
//! | offset | bytes | content |
//! |---|---|---|
//! | 0 | 4 | `BRLS` |
//! | 4 | 2 | version, 1, little-endian |
//! | 6 | 2 | 0 |
//! | 8 | 4 | length of the JSON, little-endian, at most 4 MiB; 0: nothing is known |
//!
//! JSON, because members can be added and a person can read it; the bound has room for the 65,536
//! ranges that a lease can have.

use std::io::ErrorKind;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::io::Read;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
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

use crate::Error;
use crate::Lease;
use crate::LeaseInfo;
use crate::Result;
use crate::error::Object;

const MAGIC: [u8; 4] = *b"BRLS";
const VERSION: u16 = 1;
const HEADER: usize = 12;
const MAX_INFO: usize = 4 << 20;

impl Lease {
    /// Sends the lease, with what is known of it. The receiver gets a descriptor of its own.
    ///
    /// Errors: [`Error::Io`].
    pub fn send(&self, socket: &UnixStream) -> Result<()> {
        // Room for a description of a few ranges.
        let mut message = Vec::with_capacity(HEADER + 256);
        message.resize(HEADER, 0);
        if let Some(info) = self.info() {
            serde_json::to_writer(&mut message, &info)
                .map_err(|error| Error::from_io("send", Object::Socket, error.into()))?;
        }
        let header = header(message.len() - HEADER)?;
        if let Some(place) = message.first_chunk_mut() {
            *place = header;
        }
        // All at once: the receiver is woken once.
        send_with_fd(socket, &message, self)
    }

    /// Receives a lease that the peer sends with [`Lease::send`]. Waits for it, as long as the
    /// socket's read time-out says.
    ///
    /// Errors: [`Error::Malformed`] if the peer sends anything but exactly one well-formed lease
    /// (every descriptor that came along is closed), [`Error::Io`].
    pub fn receive(socket: &UnixStream) -> Result<Self> {
        let mut header = [0; HEADER];
        let fds = receive_with_fds(socket, &mut header)?;
        let length = parse_header(&header)?;
        let fd = exactly_one(fds)?;

        let mut body = vec![0; length];
        let mut socket = socket;
        socket
            .read_exact(&mut body)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => {
                    malformed("the peer closed the connection in the middle")
                }
                _ => Error::from_io("receive", Object::Socket, error),
            })?;
        if body.is_empty() {
            return Self::from_fd(fd);
        }
        let info: LeaseInfo = serde_json::from_slice(&body)
            .map_err(|error| malformed(&format!("the description is not understood: {error}")))?;
        checked(Self::with_info(fd, Some(info))?)
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

fn malformed(reason: &str) -> Error {
    Error::malformed("receive", Object::Socket, reason.to_owned())
}

fn header(length: usize) -> Result<[u8; HEADER]> {
    let length = u32::try_from(length)
        .ok()
        .filter(|length| *length as usize <= MAX_INFO)
        .ok_or_else(|| {
            Error::invalid(
                "send",
                Object::Socket,
                format!("the description has {length} bytes, at most {MAX_INFO} are possible"),
            )
        })?;
    let [m0, m1, m2, m3] = MAGIC;
    let [v0, v1] = VERSION.to_le_bytes();
    let [l0, l1, l2, l3] = length.to_le_bytes();
    Ok([m0, m1, m2, m3, v0, v1, 0, 0, l0, l1, l2, l3])
}

/// Length of the body.
fn parse_header(header: &[u8; HEADER]) -> Result<usize> {
    let [m0, m1, m2, m3, v0, v1, r0, r1, l0, l1, l2, l3] = *header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(malformed("the peer does not speak the barlease protocol"));
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION || [r0, r1] != [0, 0] {
        return Err(malformed(&format!(
            "the peer speaks version {version} of the protocol, this is version {VERSION}"
        )));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_INFO {
        return Err(malformed(&format!(
            "the description has {length} bytes, at most {MAX_INFO} are possible"
        )));
    }
    Ok(length)
}

fn exactly_one(mut fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    match (fds.pop(), fds.len()) {
        (Some(fd), 0) => Ok(fd),
        (None, _) => Err(malformed("the peer sent no file descriptor")),
        (Some(_), more) => Err(malformed(&format!(
            "the peer sent {} file descriptors, not one",
            more + 1
        ))),
    }
}

/// Sends a message with the descriptor attached to its first byte.
fn send_with_fd(socket: &UnixStream, message: &[u8], fd: impl AsFd) -> Result<()> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Error::from_errno("send", Object::Socket, Errno::NOBUFS));
    }
    let sent = loop {
        let answer = rustix::net::sendmsg(
            socket,
            &[IoSlice::new(message)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        match answer {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::from_errno("send", Object::Socket, errno)),
            Ok(sent) => break sent,
        }
    };
    let mut socket = socket;
    socket
        .write_all(message.get(sent..).unwrap_or(&[]))
        .map_err(|error| Error::from_io("send", Object::Socket, error))
}

/// Fills `header` and collects the descriptors that come with it.
fn receive_with_fds(socket: &UnixStream, header: &mut [u8; HEADER]) -> Result<Vec<OwnedFd>> {
    let mut fds = Vec::new();
    let mut filled = 0;
    while let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // Room for more than one, to see that there are more; the kernel closes what has no room.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let answer = rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(rest)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let message = match answer {
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(Error::from_errno("receive", Object::Socket, errno)),
            Ok(message) => message,
        };
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = item {
                fds.extend(received);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(malformed(
                "the peer sent more control data than a lease has",
            ));
        }
        if message.bytes == 0 {
            return Err(malformed("the peer closed the connection without a lease"));
        }
        filled += message.bytes;
    }
    Ok(fds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BarRange;
    use crate::MemoryType;
    use std::os::fd::BorrowedFd;

    fn file(length: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, length).unwrap();
        fd
    }

    fn info(size: u64) -> LeaseInfo {
        LeaseInfo {
            bdf: "00:05.0".parse().unwrap(),
            region: 2,
            ranges: vec![BarRange {
                offset: 0x1000,
                length: size,
            }],
            size,
            memory_type: MemoryType::Nc,
            writable: true,
        }
    }

    fn lease(size: u64) -> Lease {
        Lease::with_info(file(size), Some(info(size))).unwrap()
    }

    fn send_raw(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        rustix::net::sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
    }

    fn refused(bytes: &[u8], fds: &[BorrowedFd<'_>]) -> String {
        let (here, there) = UnixStream::pair().unwrap();
        send_raw(&here, bytes, fds);
        drop(here);
        match Lease::receive(&there) {
            Err(Error::Malformed { reason, .. }) => reason.into_owned(),
            answer => panic!("{answer:?}"),
        }
    }

    #[test]
    fn a_lease_arrives_with_its_description_close_on_exec() {
        let (here, there) = UnixStream::pair().unwrap();
        let sent = lease(8192);
        sent.map().unwrap().write(4096, 0xfeed_u16).unwrap();
        sent.send(&here).unwrap();
        sent.send(&here).unwrap();
        for _ in 0..2 {
            let received = Lease::receive(&there).unwrap();
            assert_eq!(received.info(), Some(info(8192)));
            assert_eq!(received.map().unwrap().read::<u16>(4096).unwrap(), 0xfeed);
            let flags = rustix::io::fcntl_getfd(&received).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn a_lease_without_description_arrives_too() {
        let (here, there) = UnixStream::pair().unwrap();
        Lease::from_fd(file(4096)).unwrap().send(&here).unwrap();
        assert_eq!(Lease::receive(&there).unwrap().info(), None);
    }

    #[test]
    fn the_largest_description_fits() {
        let ranges = vec![
            BarRange {
                offset: u64::MAX - 0xfff,
                length: 0x1000,
            };
            barlease_abi::MAX_RANGES as usize
        ];
        let json = serde_json::to_vec(&ranges).unwrap();
        assert!(json.len() + 1024 < MAX_INFO, "{}", json.len());
    }

    #[test]
    fn more_than_one_descriptor_is_refused_and_all_are_closed() {
        let fds: Vec<_> = (0..6).map(|_| rustix::pipe::pipe().unwrap()).collect();
        for count in [2, 6] {
            let borrowed: Vec<_> = fds.iter().take(count).map(|(_, w)| w.as_fd()).collect();
            refused(&header(0).unwrap(), &borrowed);
        }
        // A reader sees the end when no descriptor of the writing end is left anywhere.
        for (reader, writer) in fds {
            drop(writer);
            assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
        }
    }

    #[test]
    fn anything_but_a_lease_is_refused() {
        let fd = file(4096);
        let one = [fd.as_fd()];
        assert!(refused(b"GET / HTTP/1", &one).contains("protocol"));
        assert!(refused(&header(0).unwrap(), &[]).contains("no file descriptor"));
        assert!(refused(&header(0).unwrap()[..5], &one).contains("closed"));

        let mut other = header(0).unwrap();
        other[4] = 2;
        assert!(refused(&other, &one).contains("version 2"));
        let mut huge = header(0).unwrap();
        huge[8..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(refused(&huge, &one).contains("at most"));

        let mut short = header(100).unwrap().to_vec();
        short.extend(b"{}");
        assert!(refused(&short, &one).contains("in the middle"));
        let mut nonsense = header(2).unwrap().to_vec();
        nonsense.extend(b"{}");
        assert!(refused(&nonsense, &one).contains("not understood"));
    }

    #[test]
    fn a_description_that_does_not_fit_the_descriptor_is_refused() {
        for change in [
            (|info| info.size = 4096) as fn(&mut LeaseInfo),
            |info| info.writable = false,
            |info| info.ranges[0].length = 4096,
            |info| info.ranges[0].length = u64::MAX,
        ] {
            let mut wrong = info(8192);
            change(&mut wrong);
            let body = serde_json::to_vec(&wrong).unwrap();
            let mut bytes = header(body.len()).unwrap().to_vec();
            bytes.extend(&body);
            let fd = file(8192);
            assert!(refused(&bytes, &[fd.as_fd()]).contains("does not fit"));
        }
    }
}
