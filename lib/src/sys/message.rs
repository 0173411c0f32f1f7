//! Bytes from a socket, and the file descriptors that come with them.
//!
//! Not rustix's function of the purpose: it makes an identifier of a process, which cannot be 0, of
//! what the kernel says of the sender where the socket asks for that (`SO_PASSCRED`), and the
//! kernel says 0 of a sender of another PID namespace. It also leaves the descriptor of a process
//! open that comes with `SO_PASSPIDFD`.

use std::mem::MaybeUninit;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use rustix::io::Errno;

/// Room for a few descriptors, so that it is seen when there are several, and for all that can lie
/// before them: the sender's identity, its process and its security context. The kernel closes
/// descriptors that have no room.
const ROOM: usize = 256;

/// `SCM_RIGHTS` and `SCM_PIDFD` of `linux/socket.h`.
const RIGHTS: i32 = libc::SCM_RIGHTS;
const PIDFD: i32 = 4;

/// `struct cmsghdr` as the kernel has it; the C libraries' have padding of their own.
#[repr(C)]
struct Header {
    length: usize,
    level: i32,
    kind: i32,
}

#[repr(C, align(8))]
struct Control([u8; ROOM]);

/// The bytes and files that one call has taken from a socket.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Bytes that were stored.
    pub(crate) bytes: usize,
    /// The descriptors, close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether there was more control data than room: descriptors may be lost.
    pub(crate) control_cut: bool,
    /// Whether the socket has messages, and this one was longer than the buffer.
    pub(crate) message_cut: bool,
}

/// Receives into `buffer`, without waiting if `dont_wait` says so.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    dont_wait: bool,
) -> Result<Received, Errno> {
    let mut control = Control([0; ROOM]);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeroes is a message without a name, without parts and without control data.
    let mut message = unsafe { MaybeUninit::<libc::msghdr>::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = ROOM as _;
    let flags = libc::MSG_CMSG_CLOEXEC | if dont_wait { libc::MSG_DONTWAIT } else { 0 };
    // SAFETY: the kernel writes to the message, to the buffer and to the control data, each at most
    // as long as it is said to be; all three are borrowed or owned by this function.
    let bytes = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let bytes = usize::try_from(bytes).map_err(|_| super::last_errno())?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "its type differs between C libraries"
    )]
    let length = (message.msg_controllen as usize).min(ROOM);
    // SAFETY: the kernel has just put these there, for this process.
    let fds = unsafe { take_fds(control.0.get(..length).unwrap_or_default()) };
    Ok(Received {
        bytes,
        fds,
        control_cut: message.msg_flags & libc::MSG_CTRUNC != 0,
        message_cut: message.msg_flags & libc::MSG_TRUNC != 0,
    })
}

/// The descriptors in control data that were sent. Others, of processes, are closed.
///
/// # Safety
///
/// Nobody owns the descriptors that are named in it.
unsafe fn take_fds(mut control: &[u8]) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    while let Some(item) = split(control) {
        control = item.rest;
        if item.level != libc::SOL_SOCKET || !matches!(item.kind, RIGHTS | PIDFD) {
            continue;
        }
        for number in item.data.chunks_exact(size_of::<RawFd>()) {
            let number = number
                .first_chunk()
                .map(|bytes| RawFd::from_ne_bytes(*bytes));
            let Some(number) = number.filter(|number| *number >= 0) else {
                continue;
            };
            // SAFETY: the caller says that it is ours.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            if item.kind == RIGHTS {
                fds.push(fd);
            }
        }
    }
    fds
}

/// A message of control data, and those behind it.
struct Item<'a> {
    level: i32,
    kind: i32,
    data: &'a [u8],
    rest: &'a [u8],
}

/// The first message of control data.
fn split(control: &[u8]) -> Option<Item<'_>> {
    let header = control.get(..size_of::<Header>())?;
    let word = |at: usize| Some(i32::from_ne_bytes(*header.get(at..)?.first_chunk()?));
    let length = header.get(offset_of!(Header, length)..)?.first_chunk()?;
    let length = usize::from_ne_bytes(*length);
    let data = control.get(size_of::<Header>()..length)?;
    let next = length.checked_next_multiple_of(align_of::<Header>())?;
    Some(Item {
        level: word(offset_of!(Header, level))?,
        kind: word(offset_of!(Header, kind))?,
        data,
        rest: control.get(next..).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::fd::IntoRawFd;

    /// A message of control data, padded.
    fn item(kind: (i32, i32), data: &[u8]) -> Vec<u8> {
        let length = size_of::<Header>() + data.len();
        let mut bytes = Vec::new();
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.0.to_ne_bytes());
        bytes.extend(kind.1.to_ne_bytes());
        bytes.extend(data);
        bytes.resize(length.next_multiple_of(8), 0);
        bytes
    }

    /// A descriptor with a number that no other test gets meanwhile.
    fn number(least: RawFd) -> RawFd {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fd = rustix::io::fcntl_dupfd_cloexec(file.as_fd(), least).unwrap();
        fd.into_raw_fd()
    }

    fn is_open(fd: RawFd) -> bool {
        std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists()
    }

    #[test]
    fn descriptors_are_taken_and_those_of_processes_closed() {
        let (sent, process) = (number(700), number(710));
        let control = [
            // A sender of another PID namespace.
            item((libc::SOL_SOCKET, libc::SCM_CREDENTIALS), &[0; 12]),
            item((libc::SOL_SOCKET, PIDFD), &process.to_ne_bytes()),
            item((libc::SOL_SOCKET, RIGHTS), &sent.to_ne_bytes()),
        ]
        .concat();
        // SAFETY: both were made above, for this.
        let fds = unsafe { take_fds(&control) };
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        assert_eq!(numbers, [sent]);
        assert!(is_open(sent) && !is_open(process));
        drop(fds);
        assert!(!is_open(sent));
    }

    #[test]
    fn control_data_that_lies_about_its_length_names_no_descriptor() {
        let whole = item((libc::SOL_SOCKET, RIGHTS), &[0xff; 4]);
        for length in [0usize, 1, 15, 17, usize::MAX] {
            let mut bytes = whole.clone();
            bytes[..8].copy_from_slice(&length.to_ne_bytes());
            // SAFETY: none is named: -1 is no descriptor.
            assert!(unsafe { take_fds(&bytes) }.is_empty(), "{length}");
        }
        // SAFETY: as above.
        assert!(unsafe { take_fds(&whole[..12]) }.is_empty());
    }
}
