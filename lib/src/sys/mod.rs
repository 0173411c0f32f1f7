//! System calls that need `unsafe`, behind safe functions. No decision is taken here.

#[allow(unsafe_code, reason = "instructions that are barriers")]
pub(crate) mod barrier;

#[allow(
    unsafe_code,
    reason = "ioctls: the kernel reads and writes through a pointer"
)]
pub(crate) mod ioctl;

#[allow(
    unsafe_code,
    reason = "mmap, munmap and mremap change the address space"
)]
pub(crate) mod memory;

#[allow(unsafe_code, reason = "a file descriptor that is known by number only")]
pub(crate) mod inherited;

#[allow(
    unsafe_code,
    reason = "a socket option that rustix does not have as is"
)]
pub(crate) mod credentials;

#[allow(
    unsafe_code,
    reason = "control data, which rustix reads as what it need not be"
)]
pub(crate) mod message;

/// The errno of the last call of the C library's that failed.
pub(crate) fn last_errno() -> rustix::io::Errno {
    let error = std::io::Error::last_os_error();
    rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::INVAL)
}
