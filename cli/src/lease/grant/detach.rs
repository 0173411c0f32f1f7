//! `--detach`: the command goes to the background once everything is granted.
//!
//! A child does all of it. The parent waits for the word that it is done, or for the child's end,
//! whose exit code is then its own. So whatever fails before is said in the shell, by the child.
#![allow(
    unsafe_code,
    reason = "fork: nothing safe leaves a child that goes on with what it has opened"
)]

use std::fs;
use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::fork;

use crate::failure::Failure;

/// Which process this is.
pub(super) enum Side {
    /// That of the shell, with what it ends with.
    Shell(ExitCode),
    Background(Waiting),
}

/// The shell that waits.
pub(super) struct Waiting(UnixStream);

/// Makes the child. Before anything is opened, and before there is another thread.
pub(super) fn split() -> Result<Side, Failure> {
    let failed = |reason: &str| Failure::new(format!("grant: detach: {reason}"));
    let (ours, theirs) = UnixStream::pair().map_err(|error| failed(&error.to_string()))?;
    let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(failed(
            "/proc does not say that this process has one thread",
        ));
    }
    // SAFETY: This is the only thread, as was just counted, so nobody else can have started one
    // since, and no lock or allocator is in the hands of a thread that the child will lack.
    let answer = unsafe { fork() };
    match answer.map_err(|errno| failed(errno.desc()))? {
        ForkResult::Child => {
            drop(ours);
            Ok(Side::Background(Waiting(theirs)))
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            wait(ours, child).map(Side::Shell)
        }
    }
}

fn wait(mut word: UnixStream, child: Pid) -> Result<ExitCode, Failure> {
    if word.read_exact(&mut [0]).is_ok() {
        return Ok(ExitCode::SUCCESS);
    }
    match waitpid(child, None) {
        // It has said why.
        Ok(WaitStatus::Exited(_, code)) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        answer => Err(Failure::new(format!(
            "grant: detach: its process is gone before everything was granted: {answer:?}"
        ))),
    }
}

impl Waiting {
    /// Leaves the terminal and what nobody will read, and lets the shell go on.
    pub(super) fn release(mut self) -> Result<(), Failure> {
        let failed = |reason: &str| Failure::new(format!("grant: detach: {reason}"));
        let nothing = File::options().read(true).write(true).open("/dev/null");
        let nothing = nothing.map_err(|error| failed(&format!("/dev/null: {error}")))?;
        rustix::process::setsid().map_err(|errno| failed(&errno.to_string()))?;
        let replace = || {
            rustix::stdio::dup2_stdin(&nothing)?;
            if !is_file(rustix::stdio::stdout()) {
                rustix::stdio::dup2_stdout(&nothing)?;
            }
            if !is_file(rustix::stdio::stderr()) {
                rustix::stdio::dup2_stderr(&nothing)?;
            }
            Ok(())
        };
        replace().map_err(|errno: rustix::io::Errno| failed(&errno.to_string()))?;
        self.0
            .write_all(&[1])
            .map_err(|_| failed("the shell that it was started from is gone"))
    }
}

/// A log, unlike a terminal or a pipe, goes on.
fn is_file(fd: impl AsFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
    })
}
