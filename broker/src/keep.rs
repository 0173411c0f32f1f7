//! A parent for hosts without systemd: it keeps the descriptors of the daemon, its child, and
//! starts it again when it has failed.
//!
//! It is the part of `sd_notify(3)` that the daemon uses: FDSTORE, FDSTOREREMOVE, BARRIER, READY
//! and WATCHDOG. It reads nothing that comes from clients. It hands the descriptors that it keeps
//! to each child over the child's standard input, as a message for each descriptor, with the name.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::ExitStatus;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;

use crate::Signals;
use crate::manager::Passed;
use crate::server::empty;

/// Most descriptors that are kept.
const LIMIT: usize = 64;
/// The time after which a silent child is killed.
const WATCHDOG: Duration = Duration::from_secs(30);
/// A child that lived for so long was not started in vain.
const STEADY: Duration = Duration::from_secs(10);
/// Longest message of either side.
const LONGEST: usize = 4096;

/// Makes the command of a child.
pub type Make<'a> = Box<dyn Fn() -> io::Result<Command> + 'a>;

/// The parent.
pub struct Keeper<'a> {
    command: Make<'a>,
    path: PathBuf,
    socket: UnixDatagram,
    kept: BTreeMap<String, OwnedFd>,
    signals: Signals,
    /// How long it waits before it starts a child again: the first time, and at most.
    pub pause: (Duration, Duration),
    /// A child that has not said anything for so long is hung.
    pub watchdog: Duration,
    /// Descriptors stored by names that begin with this are not kept: tests have an older daemon by
    /// it.
    pub forgets: Option<String>,
    /// Whether the child has said that it is ready since it was started, and when it last spoke.
    ready: bool,
    heard: Instant,
}

impl std::fmt::Debug for Keeper<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper")
            .field("kept", &self.kept.keys())
            .finish_non_exhaustive()
    }
}

impl<'a> Keeper<'a> {
    /// A parent that is told things in a directory, which is made if need be.
    ///
    /// # Errors
    ///
    /// Those of making the socket `keep.sock` there. That of a parent that is gone is replaced.
    pub fn new(directory: &Path, command: Make<'a>) -> io::Result<Self> {
        let path = directory.join("keep.sock");
        let said = |error: io::Error| {
            io::Error::new(error.kind(), format!("bind {}: {error}", path.display()))
        };
        fs::create_dir_all(directory).map_err(said)?;
        if UnixDatagram::unbound()?.connect(&path).is_ok() {
            let kind = io::ErrorKind::AddrInUse;
            return Err(said(io::Error::new(
                kind,
                "another barleased --keep is there",
            )));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(said(error)),
            _ => {}
        }
        let socket = UnixDatagram::bind(&path).map_err(said)?;
        // A process that wrote to it before this could only have it keep something.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(said)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            command,
            path,
            socket,
            kept: BTreeMap::new(),
            signals: crate::signals()?,
            watchdog: WATCHDOG,
            forgets: None,
            pause: (Duration::from_millis(20), Duration::from_secs(10)),
            ready: false,
            heard: Instant::now(),
        })
    }

    /// Has a child until one ends as it should, or is told to; then ends as it did. A child that
    /// fails before it was ever ready, with nothing that is kept for it, is not started again.
    ///
    /// # Errors
    ///
    /// A child cannot be started.
    pub fn run(mut self) -> io::Result<ExitCode> {
        let mut pause = self.pause.0;
        loop {
            let began = Instant::now();
            let mut child = self.start()?;
            let (status, told) = self.watch(&mut child)?;
            let in_vain = !self.ready && !self.kept.keys().any(|name| name.starts_with("device-"));
            if told || status.success() || in_vain {
                return Ok(code(status));
            }
            if began.elapsed() >= STEADY {
                pause = self.pause.0;
            }
            eprintln!("barleased: the daemon has ended ({status}), and is started again");
            thread::sleep(pause);
            pause = (pause * 2).min(self.pause.1);
        }
    }

    fn start(&mut self) -> io::Result<Child> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, its) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        for (name, fd) in &self.kept {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let parts = [IoSlice::new(name.as_bytes())];
            // A socket takes more of them than are kept.
            rustix::net::sendmsg(&ours, &parts, &mut control, SendFlags::DONTWAIT)?;
        }
        self.ready = false;
        self.heard = Instant::now();
        (self.command)()?
            .env("NOTIFY_SOCKET", &self.path)
            .env("FDSTORE", LIMIT.to_string())
            .env("WATCHDOG_USEC", self.watchdog.as_micros().to_string())
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::from(its))
            .spawn()
    }

    /// Hears a child until it has ended, and says whether it was told to.
    fn watch(&mut self, child: &mut Child) -> io::Result<(ExitStatus, bool)> {
        let pid = Pid::from_child(child);
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let mut told = false;
        loop {
            let silence = self.watchdog.saturating_sub(self.heard.elapsed());
            let silence = Timespec::try_from(silence).map_err(io::Error::other)?;
            let mut poll = [
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(&process, PollFlags::IN),
                PollFd::new(&self.signals.end, PollFlags::IN),
                PollFd::new(&self.signals.reload, PollFlags::IN),
            ];
            match rustix::event::poll(&mut poll, Some(&silence)) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            let happened = poll.map(|one| !one.revents().is_empty());
            // Its last messages count, too.
            while self.hear()? {}
            if happened[1] {
                return Ok((child.wait()?, told));
            }
            for (happened, signal, socket) in [
                (happened[2], Signal::TERM, &self.signals.end),
                (happened[3], Signal::HUP, &self.signals.reload),
            ] {
                if happened {
                    empty(socket);
                    told |= signal == Signal::TERM;
                    rustix::process::pidfd_send_signal(&process, signal)?;
                }
            }
            if self.heard.elapsed() >= self.watchdog && !told {
                eprintln!("barleased: the daemon hangs, and is killed");
                rustix::process::pidfd_send_signal(&process, Signal::KILL)?;
                self.heard = Instant::now();
            }
        }
    }

    /// Takes a message; `false`: there is none.
    fn hear(&mut self) -> io::Result<bool> {
        let Some((text, mut fds)) = receive_from(&self.socket)? else {
            return Ok(false);
        };
        self.heard = Instant::now();
        let value = |key: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        let name = value("FDNAME").unwrap_or("stored");
        if value("READY") == Some("1") {
            self.ready = true;
        }
        if value("FDSTOREREMOVE") == Some("1") {
            self.kept.remove(name);
        } else if value("FDSTORE") == Some("1")
            && self.kept.len() < LIMIT
            && !self
                .forgets
                .as_ref()
                .is_some_and(|begin| name.starts_with(&**begin))
            && let Some(fd) = fds.pop()
        {
            self.kept.insert(name.to_owned(), fd);
        }
        // A barrier is closed now.
        Ok(true)
    }
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        // The next one replaces it if it stays.
        let _ = fs::remove_file(&self.path);
    }
}

fn code(status: ExitStatus) -> ExitCode {
    let signal = status.signal().map(|signal| 128 + signal);
    let code = status.code().or(signal).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// A message, with its descriptors; `None`: there is none now, or there will be none.
fn receive_from(socket: impl AsFd) -> io::Result<Option<(String, Vec<OwnedFd>)>> {
    let mut bytes = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match rustix::net::recvmsg(&socket, parts, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            received => break received?,
        }
    };
    let length = received.bytes;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if length == 0 {
        return Ok(None);
    }
    let text = bytes.get(..length).unwrap_or_default();
    Ok(Some((String::from_utf8_lossy(text).into_owned(), fds)))
}

/// Has the child end with its parent. One that is gone already does not listen on its socket, which
/// is to be connected to after this.
pub(crate) fn end_with_parent() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
    Ok(())
}

/// The descriptors that the parent has kept, in the child.
pub(crate) fn receive() -> io::Result<Vec<Passed>> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut passed = Vec::new();
    while let Some((name, mut fds)) = receive_from(&socket)? {
        if let Some(fd) = fds.pop() {
            passed.push(Passed { name, fd });
        }
    }
    Ok(passed)
}
