//! The process that connected, as the kernel tells of it.

use std::fs;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use barlease_ledger::types::Peer;
use barlease_ledger::types::ProcessId;
use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::sockopt::PeerPidfd;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Pid;
use rustix::process::PidfdFlags;

use crate::cgroup;

/// The other end of a socket, which speaks for a claim or not. Credentials are those of
/// `connect()`.
pub(crate) fn of(socket: &UnixStream, claim: Option<Arc<str>>) -> nix::Result<Peer> {
    let credentials = getsockopt(socket, PeerCredentials)?;
    // 0: a process that has no number here.
    let pid = u32::try_from(credentials.pid()).unwrap_or(0);
    let process = match getsockopt(socket, PeerPidfd) {
        Ok(process) => Some(process).filter(|_| pid != 0),
        // Another than it is, it would have the rights of another.
        Err(error @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) => return Err(error),
        // Not from kernels before 6.5; not of a process that is gone.
        Err(_) => None,
    };
    let mut peer = Peer {
        uid: credentials.uid(),
        gid: credentials.gid(),
        groups: Arc::new([]),
        pid,
        process: process.as_ref().and_then(id),
        cgroup: None,
        cgroup_path: "".into(),
        unit: "".into(),
        claim,
    };
    // A number that is read through is another process's once this one is gone.
    if let Some(process) = &process {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let path = cgroup_path(&cgroup);
        let id = cgroup::id(path);
        if is_running(process) {
            peer.groups = groups(&status);
            peer.cgroup = id;
            peer.unit = unit(path).into();
            peer.cgroup_path = path.into();
        }
    }
    Ok(peer)
}

/// The pidfd of a process of that number, if it is still the process of that id. None is kept for
/// each connection: there may be many.
///
/// # Errors
///
/// Descriptors or memory are short: nothing is known of the process.
pub(crate) fn open(pid: u32, process: ProcessId) -> rustix::io::Result<Option<OwnedFd>> {
    use rustix::io::Errno;
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(None);
    };
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd).filter(|pidfd| id(pidfd) == Some(process))),
        // The number is that of no process, or of a thread by now.
        Err(Errno::SRCH | Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The number of a process that is unique until the next boot: of kernels from 6.9 on, where all
/// pidfds of a process are one inode of a file system of their own.
fn id(process: &OwnedFd) -> Option<ProcessId> {
    const PIDFS: i64 = 0x5049_4446;
    let system = rustix::fs::fstatfs(process).ok()?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "its type is another on other machines"
    )]
    let is_pidfs = system.f_type as i64 == PIDFS;
    let inode = rustix::fs::fstat(process).ok()?.st_ino;
    is_pidfs.then_some(ProcessId(inode))
}

fn is_running(process: &OwnedFd) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut poll, Some(&at_once)) == Ok(0)
}

fn groups(status: &str) -> Arc<[u32]> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Groups:"))
        .unwrap_or_default();
    line.split_whitespace()
        .filter_map(|group| group.parse().ok())
        .collect()
}

/// The path in the hierarchy of version 2.
fn cgroup_path(cgroup: &str) -> &str {
    cgroup
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or_default()
}

/// The unit of the system's manager: the first that is no slice; below it may be those of a user's
/// manager. Groups that somebody else has made have none, whatever is called like one below them.
fn unit(path: &str) -> &str {
    let is_unit = |part: &&str| part.ends_with(".service") || part.ends_with(".scope");
    let mut parts = path.split('/').skip(1);
    let first = parts.find(|part| !part.ends_with(".slice"));
    first.filter(is_unit).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_told_by_its_socket() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = of(&one, None).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::getuid().as_raw());
        // Of kernels from 6.9 on.
        if let Some(process) = peer.process {
            assert!(is_running(&open(peer.pid, process).unwrap().unwrap()));
            // The number is another process's.
            let other = ProcessId(process.0 + 1);
            for (pid, process) in [(peer.pid, other), (0, process), (u32::MAX, process)] {
                assert!(open(pid, process).unwrap().is_none());
            }
        }
    }

    #[test]
    fn the_unit_is_that_of_the_systems_manager() {
        let user = "/user.slice/user-1000.slice/user@1000.service/app.slice/a.service";
        for (path, found) in [
            ("/system.slice/render@1.service/part", "render@1.service"),
            (user, "user@1000.service"),
            ("/machine.slice/box.scope", "box.scope"),
            ("/docker/0123/render@1.service", ""),
            ("/system.slice", ""),
            ("/", ""),
        ] {
            assert_eq!(unit(path), found);
        }
        assert_eq!(cgroup_path("1:name=systemd:/x\n0::/y\n"), "/y");
        assert_eq!(groups("Uid:\t1\nGroups:\t4 27 \n")[..], [4, 27]);
    }
}
