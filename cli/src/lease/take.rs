//! `barlease lease take`.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::io::FdFlags;

use crate::args::Source;
use crate::failure::Failure;

/// Becomes the command; returns only on failure.
pub(crate) fn run(socket: &Path, command: &[OsString]) -> Result<(), Failure> {
    let lease = super::receive(&Source::Socket(socket.to_owned()))?;
    let fd = OwnedFd::from(lease);
    rustix::io::fcntl_setfd(fd.as_fd(), FdFlags::empty())
        .map_err(|errno| Failure::new(format!("take: lease: {errno}")))?;

    let Some((program, arguments)) = command.split_first() else {
        return Err(Failure::new("take: no command"));
    };
    let error = Command::new(program)
        .args(arguments)
        .env(barlease::FD_VARIABLE, fd.as_raw_fd().to_string())
        .exec();
    Err(Failure::file("run", Path::new(program), &error))
}
