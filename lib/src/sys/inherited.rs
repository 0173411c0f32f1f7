//! File descriptors that a parent process left open for us.

use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use rustix::io::Errno;

/// Duplicates the descriptor number `fd`, close-on-exec. The original stays open.
///
/// `EBADF`: no such descriptor.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: it takes two numbers, and answers EBADF where the first names no open file.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(super::last_errno());
    }
    // SAFETY: the call has just made it, for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Has descriptor number `fd` closed on `exec`.
///
/// `EBADF`: no such descriptor.
pub(crate) fn close_on_exec(fd: RawFd) -> Result<(), Errno> {
    // There is no other flag.
    // SAFETY: it takes numbers, and answers EBADF where the first names no open file.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } {
        0 => Ok(()),
        _ => Err(super::last_errno()),
    }
}

/// Takes over descriptor number `fd`.
///
/// # Safety
///
/// It is open, and nothing else in the process owns it.
pub(crate) unsafe fn take(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller says so.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Removes variables from the environment.
///
/// # Safety
///
/// No other thread reads or changes the environment meanwhile.
pub(crate) unsafe fn remove_variables(names: &[&str]) {
    for name in names {
        // SAFETY: the caller says so.
        unsafe { std::env::remove_var(name) };
    }
}
