//! The process at the other end of a connection.

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

/// `SO_PEERCRED`: PID, uid and gid as plain integers.
///
/// Not rustix's function of the purpose: its PID cannot be 0, and the kernel answers 0 for a
/// process of another PID namespace.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> Result<(i32, u32, u32), Errno> {
    let mut credentials = MaybeUninit::<libc::ucred>::zeroed();
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, for which there is room, and the length.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            credentials.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if answer != 0 {
        return Err(super::last_errno());
    }
    // SAFETY: three integers, for which zeroes are valid as well.
    let credentials = unsafe { credentials.assume_init() };
    Ok((credentials.pid, credentials.uid, credentials.gid))
}
