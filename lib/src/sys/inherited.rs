//! File descriptors that a parent process left open for us.

use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use rustix::io::Errno;

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
