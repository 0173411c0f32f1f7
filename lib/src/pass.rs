//! Passing a lease to another process over a unix stream socket.
//!
//! One message: a [record](crate::record) with the descriptor attached to its first byte, as
//! `SCM_RIGHTS`. Messages may follow each other on a connection, and other data may follow them:
//! nothing is read beyond the end of a record.
//!
//! [`Sender`] and [`Receiver`] are what is done at any moment of that, for blocking and
//! non-blocking sockets alike; no byte and no descriptor that has been taken from the socket is
//! lost when the next one is not there yet. [`Lease::send`], [`Lease::receive`] and their siblings
//! with a time-out wait until they have finished.

mod peer;
mod receiver;
mod sender;

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::Error;
use crate::Lease;
use crate::Result;
use crate::error::Object;

pub use peer::Peer;
pub use receiver::Receiver;
pub use sender::Sender;

impl Lease {
    /// Sends the lease, with what is known of it. The receiver gets a descriptor of its own. Waits
    /// until the socket has taken all of it; a blocking socket with a write time-out
    /// (`SO_SNDTIMEO`) may end that.
    ///
    /// After an error the connection is of no more use.
    ///
    /// Errors: [`Error::Io`].
    pub fn send(&self, socket: impl AsFd) -> Result<()> {
        let mut sender = Sender::new(self)?;
        let socket = socket.as_fd();
        finish("send", socket, None, PollFlags::OUT, |flags| {
            sender.step(
                socket,
                if flags {
                    SendFlags::DONTWAIT
                } else {
                    SendFlags::empty()
                },
            )
        })
    }

    /// As [`Lease::send`], but for at most so long, all in all.
    ///
    /// Errors: [`Error::Io`]; [`Error::is_timed_out`] says that the peer is too slow.
    pub fn send_within(&self, socket: impl AsFd, timeout: Duration) -> Result<()> {
        let mut sender = Sender::new(self)?;
        let socket = socket.as_fd();
        finish("send", socket, Some(timeout), PollFlags::OUT, |_| {
            sender.step(socket, SendFlags::DONTWAIT)
        })
    }

    /// Receives a lease that the peer sends with [`Lease::send`]. Waits for it; a blocking socket
    /// with a read time-out (`SO_RCVTIMEO`) may end that.
    ///
    /// After an error the connection is of no more use.
    ///
    /// Errors: [`Error::Malformed`] if the peer sends anything but exactly one well-formed lease
    /// (every descriptor that came along is closed), [`Error::Io`].
    pub fn receive(socket: impl AsFd) -> Result<Self> {
        Receiver::new().receive(socket)
    }

    /// As [`Lease::receive`], but for at most so long, all in all.
    ///
    /// Errors: as for [`Lease::receive`]; [`Error::is_timed_out`] says that the peer is too slow.
    pub fn receive_within(socket: impl AsFd, timeout: Duration) -> Result<Self> {
        Receiver::new().receive_within(socket, timeout)
    }
}

/// Takes steps until there is an answer. A step that is told `true` must not wait.
fn finish<T>(
    operation: &'static str,
    socket: BorrowedFd<'_>,
    timeout: Option<Duration>,
    event: PollFlags,
    mut step: impl FnMut(bool) -> Result<Option<T>>,
) -> Result<T> {
    let failed = |errno| Error::from_errno(operation, Object::Socket, errno);
    let deadline = timeout.map(|timeout| (Instant::now().checked_add(timeout), timeout));
    let mut nonblocking = deadline.is_some();
    loop {
        if let Some(answer) = step(nonblocking)? {
            return Ok(answer);
        }
        if !nonblocking {
            // Either the socket does not block, or its own time-out has passed.
            let flags = rustix::fs::fcntl_getfl(socket).map_err(failed)?;
            if !flags.contains(OFlags::NONBLOCK) {
                return Err(failed(Errno::AGAIN));
            }
            nonblocking = true;
        }
        let left = match deadline {
            // So far away that the clock cannot tell: for ever.
            None | Some((None, _)) => None,
            Some((Some(deadline), _)) => match deadline.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Some(left),
                _ => return Err(failed(Errno::TIMEDOUT)),
            },
        };
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut [PollFd::new(&socket, event)], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BarRange;
    use crate::LeaseInfo;
    use crate::MemoryType;
    use crate::record;
    use crate::record::LONGEST;
    use rustix::net::SendAncillaryBuffer;
    use rustix::net::SendAncillaryMessage;
    use std::io::IoSlice;
    use std::io::Read;
    use std::io::Write;
    use std::mem::MaybeUninit;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    fn file(length: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, length).unwrap();
        fd
    }

    fn info(size: u64) -> LeaseInfo {
        LeaseInfo {
            bdf: "00:05.0".parse().unwrap(),
            bar: 2,
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

    /// A lease whose record is far longer than a socket's buffer.
    fn long_lease() -> Lease {
        let mut info = info(0x1000 * u64::from(barlease_abi::MAX_RANGES));
        info.ranges = (0..u64::from(barlease_abi::MAX_RANGES))
            .map(|n| BarRange {
                offset: n * 0x2000,
                length: 0x1000,
            })
            .collect();
        Lease::with_info(file(info.size), Some(info)).unwrap()
    }

    fn receiver() -> Receiver {
        Receiver::new().any_file()
    }

    fn record(info: Option<&LeaseInfo>) -> Vec<u8> {
        record::encode(info, MemoryType::Nc).unwrap()
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

    fn reason(answer: Result<Lease>) -> String {
        match answer {
            Err(Error::Malformed { reason, .. }) => reason.into_owned(),
            answer => panic!("{answer:?}"),
        }
    }

    fn refused(bytes: &[u8], fds: &[BorrowedFd<'_>]) -> String {
        let (here, there) = UnixStream::pair().unwrap();
        send_raw(&here, bytes, fds);
        drop(here);
        reason(receiver().receive(&there))
    }

    fn timed_out<T>(answer: Result<T>) -> bool {
        answer.is_err_and(|error| error.is_timed_out())
    }

    #[test]
    fn a_lease_arrives_with_its_description_close_on_exec() {
        let (here, there) = UnixStream::pair().unwrap();
        let sent = lease(8192);
        sent.map().unwrap().write(4096, 0xfeed_u16).unwrap();
        sent.send(&here).unwrap();
        sent.send_within(&here, Duration::from_secs(1)).unwrap();
        (&here).write_all(b"and more").unwrap();
        for wait in [None, Some(Duration::from_secs(1))] {
            let received = match wait {
                None => receiver().receive(&there),
                Some(timeout) => receiver().receive_within(&there, timeout),
            };
            let received = received.unwrap();
            assert_eq!(received.info(), Some(info(8192)));
            assert_eq!(received.map().unwrap().read::<u16>(4096).unwrap(), 0xfeed);
            let flags = rustix::io::fcntl_getfd(&received).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
        let mut more = [0; 8];
        (&there).read_exact(&mut more).unwrap();
        assert_eq!(&more, b"and more");
    }

    #[test]
    fn a_lease_arrives_on_a_socket_that_tells_of_the_sender_too() {
        let (here, there) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_passcred(&there, true).unwrap();
        lease(8192).send(&here).unwrap();
        let received = receiver().receive(&there).unwrap();
        assert_eq!(received.info(), Some(info(8192)));
    }

    #[test]
    fn a_lease_without_description_arrives_too() {
        let (here, there) = UnixStream::pair().unwrap();
        Lease::from_fd(file(4096)).unwrap().send(&here).unwrap();
        assert_eq!(receiver().receive(&there).unwrap().info(), None);
    }

    #[test]
    fn only_a_dma_buf_is_received_unless_asked() {
        let (here, there) = UnixStream::pair().unwrap();
        lease(4096).send(&here).unwrap();
        assert!(reason(Lease::receive(&there)).contains("dma-buf"));
    }

    /// Bytes that come one by one, to a socket that does not block.
    #[test]
    fn a_receiver_loses_nothing_between_two_bytes() {
        let (here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let fd = file(8192);
        let bytes = record(Some(&info(8192)));
        let mut receiver = receiver();
        for round in 0..2 {
            assert!(receiver.poll(&there).unwrap().is_none());
            for (n, byte) in bytes.iter().enumerate() {
                let fds = [fd.as_fd()];
                send_raw(&here, &[*byte], if n == 0 { &fds } else { &[] });
                let answer = receiver.poll(&there).unwrap();
                assert_eq!(answer.is_some(), n + 1 == bytes.len(), "{round} {n}");
                if let Some(lease) = answer {
                    assert_eq!(lease.info(), Some(info(8192)));
                }
            }
        }
    }

    #[test]
    fn a_sender_loses_nothing_when_the_socket_is_full() {
        let sent = long_lease();
        for nonblocking in [false, true] {
            let (here, there) = UnixStream::pair().unwrap();
            here.set_nonblocking(nonblocking).unwrap();
            there.set_nonblocking(nonblocking).unwrap();
            let (mut sender, mut receiver) = (Sender::new(&sent).unwrap(), receiver());
            let mut turns = 0;
            let received = loop {
                sender.poll(&here).unwrap();
                turns += 1;
                if let Some(lease) = receiver.poll(&there).unwrap() {
                    break lease;
                }
            };
            assert!(turns > 2, "{turns}");
            assert_eq!(received.info(), sent.info());
        }
    }

    #[test]
    fn a_socket_that_does_not_block_is_waited_for() {
        let sent = long_lease();
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        there.set_nonblocking(true).unwrap();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| receiver().receive(&there).unwrap());
            std::thread::sleep(Duration::from_millis(20));
            sent.send(&here).unwrap();
            assert_eq!(receiver.join().unwrap().info(), sent.info());
        });
    }

    #[test]
    fn a_deadline_is_for_the_whole_message() {
        let (here, there) = UnixStream::pair().unwrap();
        let begin = Instant::now();
        let short = Duration::from_millis(100);
        assert!(timed_out(receiver().receive_within(&there, short)));
        // A peer that drips.
        let bytes = record(None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for byte in &bytes {
                    std::thread::sleep(Duration::from_millis(40));
                    if (&here).write_all(&[*byte]).is_err() {
                        break;
                    }
                }
            });
            assert!(timed_out(receiver().receive_within(&there, short)));
            drop(there);
        });
        // A peer that does not read.
        let (here, _there) = UnixStream::pair().unwrap();
        assert!(timed_out(long_lease().send_within(&here, short)));
        assert!(begin.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn time_outs_of_the_socket_hold() {
        let (here, there) = UnixStream::pair().unwrap();
        let short = Some(Duration::from_millis(50));
        there.set_read_timeout(short).unwrap();
        here.set_write_timeout(short).unwrap();
        for answer in [
            receiver().receive(&there).map(drop),
            long_lease().send(&here),
        ] {
            assert_eq!(
                answer.unwrap_err().errno(),
                Some(Errno::AGAIN.raw_os_error())
            );
        }
    }

    #[test]
    fn more_than_one_descriptor_is_refused_and_all_are_closed() {
        let fds: Vec<_> = (0..6).map(|_| rustix::pipe::pipe().unwrap()).collect();
        for count in [2, 6] {
            let borrowed: Vec<_> = fds.iter().take(count).map(|(_, w)| w.as_fd()).collect();
            refused(&record(None), &borrowed);
        }
        // One with the first byte, another one later.
        let (here, there) = UnixStream::pair().unwrap();
        let bytes = record(None);
        send_raw(&here, &bytes[..9], &[fds[0].1.as_fd()]);
        send_raw(&here, &bytes[9..], &[fds[1].1.as_fd()]);
        assert!(reason(receiver().receive(&there)).contains("several"));
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
        let mut other = record(None);
        other[..12].copy_from_slice(b"GET / HTTP/1");
        assert!(refused(&other, &one).contains("protocol"));
        assert!(refused(&record(None), &[]).contains("no file descriptor"));
        assert!(refused(&record(None)[..5], &one).contains("in the middle"));
        assert!(refused(&[0][..0], &[]).contains("without a lease"));
        let mut huge = record(None);
        huge[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(refused(&huge, &one).contains("too long"));
        let mut short = record(None);
        short[4..8].copy_from_slice(&(LONGEST as u32).to_le_bytes());
        assert!(refused(&short, &one).contains("in the middle"));
    }

    #[test]
    fn a_description_that_does_not_fit_the_descriptor_is_refused() {
        for change in [
            (|info| info.size = 4096) as fn(&mut LeaseInfo),
            |info| info.writable = false,
            |info| info.ranges[0].length = 4096,
            |info| info.ranges[0].length = u64::MAX - 4095,
        ] {
            let mut wrong = info(8192);
            change(&mut wrong);
            let fd = file(8192);
            assert!(refused(&record(Some(&wrong)), &[fd.as_fd()]).contains("does not fit"));
        }
    }

    #[test]
    fn a_datagram_socket_is_refused() {
        let (here, there) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let mut bytes = record(Some(&info(8192)));
        bytes.push(0);
        rustix::net::send(&here, &bytes, SendFlags::empty()).unwrap();
        assert!(reason(receiver().receive(&there)).contains("stream"));
    }

    /// A peer in a PID namespace that this process is not in has no PID here, if one may make one.
    #[test]
    fn a_peer_of_another_pid_namespace_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // This process's peer is one that the child's namespace does not have: the child asks.
        let Ok(mut child) = std::process::Command::new("unshare")
            .args(["--map-root-user", "--pid", "--fork"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "pass::tests::asks_for_its_peer", "--nocapture"])
            .env("BARLEASE_PEER", &path)
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            eprintln!("no unshare: not tried");
            return;
        };
        listener.set_nonblocking(true).unwrap();
        let mut connections = Vec::new();
        let status = loop {
            if let Ok((connection, _)) = listener.accept() {
                lease(8192).send(&connection).unwrap();
                connections.push(connection);
            }
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut text = String::new();
        child.stdout.unwrap().read_to_string(&mut text).unwrap();
        if !text.contains("running") {
            eprintln!("no namespaces: not tried");
            return;
        }
        assert!(status.success(), "{text}");
        assert!(text.contains("pid None, 8192 bytes"), "{text}");
    }

    #[test]
    fn asks_for_its_peer() {
        let Some(path) = std::env::var_os("BARLEASE_PEER") else {
            return;
        };
        let socket = UnixStream::connect(path).unwrap();
        // The kernel tells of the sender by number 0.
        rustix::net::sockopt::set_socket_passcred(&socket, true).unwrap();
        let lease = receiver().receive_within(&socket, Duration::from_secs(60));
        let peer = Peer::of(&socket).unwrap();
        println!("pid {:?}, {} bytes", peer.pid, lease.unwrap().size());
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (here, _there) = UnixStream::pair().unwrap();
        let peer = Peer::of(&here).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert!(Peer::of(file(1)).is_err());
    }
}
