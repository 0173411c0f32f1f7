//! Whether the other end of a socket has read all that was sent to it.
//!
//! A descriptor that was sent and not received counts against the user of the daemon until it is
//! received or the other end is closed: beyond as many as the daemon may open, the kernel takes no
//! more from it, for whomever (`ETOOMANYREFS`).

#![allow(unsafe_code, reason = "no crate has this request as a safe function")]

use std::ffi::c_int;
use std::os::fd::AsFd;

use nix::libc::TIOCOUTQ;
use rustix::io::Result;
use rustix::ioctl;
use rustix::ioctl::Getter;
use rustix::ioctl::Opcode;

/// The number of the socket's request SIOCOUTQ, which terminals have, too.
const SIOCOUTQ: Opcode = TIOCOUTQ as Opcode;

/// Less than the memory of any message. The kernel says that a message is read when a byte of it
/// is still counted.
const LEAST: c_int = 128;

/// Whether anything is left to read, at the other end of a unix stream socket.
pub(crate) fn is_there(socket: impl AsFd) -> bool {
    // SAFETY: the request writes one `int` for each kind of descriptor that has it.
    let request = unsafe { Getter::<SIOCOUTQ, c_int>::new() };
    // SAFETY: the request only writes what `Getter` has room for.
    let bytes: Result<c_int> = unsafe { ioctl::ioctl(socket, request) };
    // A file without such a request was not sent anything.
    bytes.is_ok_and(|bytes| bytes >= LEAST)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_was_sent_is_there_until_it_is_read_or_its_reader_is_gone() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert!(!is_there(&ours));
        ours.write_all(b"ab").unwrap();
        assert!(is_there(&ours));
        theirs.read_exact(&mut [0; 1]).unwrap();
        assert!(is_there(&ours));
        theirs.read_exact(&mut [0; 1]).unwrap();
        assert!(!is_there(&ours));
        ours.write_all(b"c").unwrap();
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(is_there(&ours));
        drop(theirs);
        assert!(!is_there(&ours));
    }
}
