//! A terminal with a shell that controls jobs.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// Both ends of a pseudo terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The side whose input is what a person types.
    pub keyboard: File,
    /// The side that programs have.
    pub program: OwnedFd,
}

fn checked(answer: i32, what: &str) -> i32 {
    assert!(answer >= 0, "{what}: {}", io::Error::last_os_error());
    answer
}

fn owned(answer: RawFd, what: &str) -> OwnedFd {
    let fd = checked(answer, what);
    // SAFETY: The kernel has just made it for the caller, and nobody else has its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Terminal {
    /// A new one, which controls no process yet.
    ///
    /// # Panics
    ///
    /// When the system has none left.
    #[must_use]
    pub fn new() -> Self {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: Has no argument that is memory.
        let keyboard = owned(unsafe { libc::posix_openpt(flags) }, "posix_openpt");
        // SAFETY: The same.
        let unlocked = unsafe { libc::unlockpt(keyboard.as_raw_fd()) };
        checked(unlocked, "unlockpt");
        // SAFETY: The argument is flags.
        let program = unsafe { libc::ioctl(keyboard.as_raw_fd(), libc::TIOCGPTPEER, flags) };
        Self {
            keyboard: keyboard.into(),
            program: owned(program, "TIOCGPTPEER"),
        }
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes this process, a child, the shell in the foreground of the terminal.
///
/// # Panics
///
/// When it leads a process group, or the terminal has a shell.
pub fn become_shell(terminal: impl AsFd) {
    // SAFETY: Has no argument.
    checked(unsafe { libc::setsid() }, "setsid");
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: The argument is a number.
    checked(unsafe { libc::ioctl(fd, libc::TIOCSCTTY, 0) }, "TIOCSCTTY");
}

/// Makes this process, a child of the shell, a job in the background that reads from the terminal.
///
/// # Panics
///
/// When the kernel refuses.
pub fn become_job(terminal: impl AsFd, output: impl AsFd) {
    // SAFETY: The arguments are numbers.
    checked(unsafe { libc::setpgid(0, 0) }, "setpgid");
    for (fd, number) in [(terminal.as_fd(), 0), (output.as_fd(), 1)] {
        // SAFETY: Standard input and output belong to the whole process, and this is its only
        // thread.
        checked(unsafe { libc::dup2(fd.as_raw_fd(), number) }, "dup2");
    }
}

/// Puts a job into the foreground, as `fg` does.
///
/// # Panics
///
/// When the caller is not the shell in the foreground.
pub fn foreground(terminal: impl AsFd, job: i32) {
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: The arguments are numbers.
    checked(unsafe { libc::tcsetpgrp(fd, job) }, "tcsetpgrp");
}
