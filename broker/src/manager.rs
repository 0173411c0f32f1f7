//! Messages of the service to its manager (systemd, or the parent that `--keep` makes), and the
//! descriptors that it leaves with it.
//!
//! The protocol is that of `sd_notify(3)`. The crate sd-notify sends descriptors by way of a second
//! crate and has no barrier; what is needed of it is one `sendmsg`.

use std::collections::BTreeSet;
use std::env;
use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use barlease_ledger::types::Millis;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::pipe::PipeFlags;

/// Longest name of a stored descriptor.
const LONGEST_NAME: usize = 255;
/// How long the manager may take to have handled what it was told.
const PATIENCE: Duration = Duration::from_secs(5);

/// A descriptor that the manager has passed.
#[derive(Debug)]
pub struct Passed {
    /// The name that it has in the socket's unit, or was stored by.
    pub name: String,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// The manager of this process, if it has one.
#[derive(Debug, Default)]
pub(crate) struct Manager {
    socket: Option<UnixDatagram>,
    /// How many descriptors it stores.
    limit: usize,
    stored: BTreeSet<String>,
    /// The manager takes a service for hung that has not said anything for so long.
    watchdog: Option<Millis>,
}

impl Manager {
    /// The one that the environment tells of.
    ///
    /// # Errors
    ///
    /// Those of connecting to its socket.
    pub(crate) fn of_environment() -> io::Result<Self> {
        let Some(path) = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Ok(Self::default());
        };
        let said = |error: io::Error| {
            io::Error::new(error.kind(), format!("connect to NOTIFY_SOCKET: {error}"))
        };
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&path),
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address.map_err(said)?).map_err(said)?;
        let number = |name| {
            env::var(name)
                .ok()
                .and_then(|text| text.parse::<u64>().ok())
        };
        let own = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|_| own);
        Ok(Self {
            socket: Some(socket),
            limit: number("FDSTORE").map_or(0, |limit| usize::try_from(limit).unwrap_or(0)),
            stored: BTreeSet::new(),
            watchdog: watchdog.map(|microseconds| Millis((microseconds / 1000).max(2))),
        })
    }

    /// Whether it stores descriptors: else a restart ends all leases.
    pub(crate) fn stores(&self) -> bool {
        self.limit > 0
    }

    /// How often it is to be told that the service is alive.
    pub(crate) fn pulse(&self) -> Option<Millis> {
        self.watchdog.map(|time| Millis(time.0 / 2))
    }

    /// Tells it something. One that does not listen is nothing that a service could mend.
    pub(crate) fn tell(&self, state: &str) {
        let _ = self.send(state, &[]);
    }

    /// It has stored a descriptor of this name, as it has said itself by passing it.
    pub(crate) fn has(&mut self, name: &str) {
        self.stored.insert(name.to_owned());
    }

    /// Leaves a duplicate with it, unless it has one of that name.
    ///
    /// # Errors
    ///
    /// Text for the administrator: it has no room, or the name is none for it.
    pub(crate) fn store(&mut self, name: &str, fd: impl AsFd) -> Result<(), String> {
        if !self.stores() || self.stored.contains(name) {
            return Ok(());
        }
        let fits = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b':';
        if name.len() > LONGEST_NAME || !name.bytes().all(fits) {
            return Err(format!(
                "{name:?} cannot be the name of a stored descriptor"
            ));
        }
        if self.stored.len() >= self.limit {
            return Err(format!(
                "the store for descriptors is full with {}: raise FileDescriptorStoreMax",
                self.limit
            ));
        }
        self.send(
            &format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"),
            &[fd.as_fd()],
        )
        .map_err(|error| format!("the store for descriptors: {error}"))?;
        self.stored.insert(name.to_owned());
        Ok(())
    }

    /// Has it close what it stores by this name.
    pub(crate) fn remove(&mut self, name: &str) {
        if self.stored.remove(name) {
            self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
        }
    }

    /// Something to wait for until it has handled all that it was told.
    pub(crate) fn barrier(&self) -> Option<Barrier> {
        self.socket.as_ref()?;
        let (end, other) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).ok()?;
        self.send("BARRIER=1", &[other.as_fd()]).ok()?;
        Some(Barrier(end))
    }

    fn send(&self, state: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let parts = [IoSlice::new(state.as_bytes())];
        rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// See [`Manager::barrier`].
#[derive(Debug)]
pub(crate) struct Barrier(OwnedFd);

impl Barrier {
    /// Waits until the manager has closed its end, for some seconds at most.
    pub(crate) fn wait(&self) {
        let mut poll = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::empty())];
        let patience = Timespec::try_from(PATIENCE).ok();
        while rustix::event::poll(&mut poll, patience.as_ref()) == Err(rustix::io::Errno::INTR) {}
    }
}

/// Milliseconds of the clock that systemd compares, for RELOADING.
pub(crate) fn reloading() -> String {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
    format!("RELOADING=1\nMONOTONIC_USEC={microseconds}")
}
