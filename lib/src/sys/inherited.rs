//! File descriptors that a parent process left open for us.

use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use rustix::io::Errno;
use rustix::io::FdFlags;

/// Duplicates the descriptor number `fd`, close-on-exec. The original stays open.
///
/// `EBADF`: no such descriptor.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: `fd` is not -1. The borrow ends within this function, and its only use is one
    // `fcntl(F_DUPFD_CLOEXEC)`, which answers EBADF where the number names no open file.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 3)
}

/// Has descriptor number `fd` closed on `exec`.
///
/// `EBADF`: no such descriptor.
pub(crate) fn close_on_exec(fd: RawFd) -> Result<(), Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: `fd` is not -1. The borrow ends within this function, and its uses are `F_GETFD` and
    // `F_SETFD`, which answer EBADF where the number names no open file.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = rustix::io::fcntl_getfd(borrowed)?;
    rustix::io::fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)
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
