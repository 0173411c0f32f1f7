//! The loop: sockets, signals, devices, processes and time.
//!
//! One thread and one epoll, without a runtime: the work of a call is a system call or two that do
//! not wait, so tasks would have nothing to overlap, and one order of all events is what the core
//! asks for.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use barlease::EventFd;
use barlease_ledger::core::Event;
use barlease_ledger::core::Reply;
use barlease_ledger::policy;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::ProcessId;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::event::epoll::EventData;
use rustix::event::epoll::EventFlags;

use crate::calls;
use crate::connection::Busy;
use crate::connection::Connection;
use crate::connection::Outgoing;
use crate::device::Device;
use crate::manager;
use crate::manager::Manager;
use crate::peer;
use crate::peer::Identity;
use crate::recovery;
use crate::recovery::Owner;
use crate::service::Effect;
use crate::service::Service;
use crate::service::now;

/// How long a client may take nothing of what is sent to it.
const PATIENCE: u64 = 10_000;
/// Most connections of a user that is no administrator.
const MAX_CONNECTIONS: usize = 256;

/// Opens the devices of a policy.
pub type Opener<'a> = dyn Fn(&policy::Device) -> Result<barlease::Device, String> + 'a;

/// Signals, as readable sockets.
#[derive(Debug)]
pub(crate) struct Signals {
    pub(crate) end: UnixStream,
    pub(crate) reload: UnixStream,
}

/// What becomes of leases when the daemon is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AtStop {
    /// They live on, and the next daemon has them.
    Keep,
    /// They are reclaimed, and the devices closed.
    Reclaim,
}

/// The kind of a descriptor in the epoll.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Listener,
    End,
    Reload,
    Closed,
    Connection(ConnectionId),
    Events(Arc<str>),
    Request(Arc<str>),
    Process(ProcessId),
    Owner(Arc<str>),
}

/// Everything.
pub(crate) struct Server<'a> {
    pub(crate) service: Service,
    pub(crate) policy: PathBuf,
    opener: &'a Opener<'a>,
    pub(super) epoll: OwnedFd,
    listener: Option<UnixListener>,
    signals: Signals,
    pub(super) sources: BTreeMap<u64, Source>,
    last_source: u64,
    pub(crate) connections: BTreeMap<ConnectionId, Connection>,
    /// Connections of users.
    users: BTreeMap<u32, usize>,
    /// The connection that a request is of.
    pub(crate) requests: BTreeMap<RequestId, ConnectionId>,
    last_request: u64,
    /// Connections that may have something to do.
    ready: BTreeSet<ConnectionId>,
    give_ups: BTreeSet<(Time, ConnectionId)>,
    /// Processes that are watched: the source, and the pidfd.
    processes: BTreeMap<ProcessId, (u64, OwnedFd)>,
    /// Devices that are being closed.
    pub(crate) closing: BTreeSet<Arc<str>>,
    closed: (mpsc::Sender<Arc<str>>, mpsc::Receiver<Arc<str>>),
    closed_event: EventFd,
    /// Devices that are on their way out.
    pub(crate) going: BTreeSet<Arc<str>>,
    /// Drains to be answered when these are closed.
    pub(crate) drains: Vec<(RequestId, BTreeSet<Arc<str>>)>,
    stopping: bool,
    at_stop: AtStop,
    pub(super) manager: Manager,
    /// When the manager is to be told that the service is alive.
    pulse: Option<Time>,
    /// Processes that have handed a device over: the source, and the pidfd.
    pub(super) owners: BTreeMap<Arc<str>, (u64, OwnedFd, Owner)>,
}

impl<'a> Server<'a> {
    pub(crate) fn new(
        policy: PathBuf,
        service: Service,
        opener: &'a Opener<'a>,
        listener: UnixListener,
        signals: Signals,
        (manager, at_stop): (Manager, AtStop),
        owners: Vec<(Arc<str>, Owner)>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut server = Self {
            service,
            policy,
            opener,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener: None,
            signals,
            sources: BTreeMap::new(),
            last_source: 0,
            connections: BTreeMap::new(),
            users: BTreeMap::new(),
            requests: BTreeMap::new(),
            last_request: 0,
            ready: BTreeSet::new(),
            give_ups: BTreeSet::new(),
            processes: BTreeMap::new(),
            closing: BTreeSet::new(),
            closed: mpsc::channel(),
            closed_event: EventFd::new().map_err(io::Error::other)?,
            going: BTreeSet::new(),
            drains: Vec::new(),
            stopping: false,
            at_stop,
            pulse: manager.pulse().map(|_| Time(0)),
            manager,
            owners: BTreeMap::new(),
        };
        let end = server.signals.end.try_clone()?;
        let reload = server.signals.reload.try_clone()?;
        let closed = server.closed_event.try_clone().map_err(io::Error::other)?;
        server.listen_to(end, Source::End)?;
        server.listen_to(reload, Source::Reload)?;
        server.listen_to(closed, Source::Closed)?;
        for name in server.service.devices() {
            server.listen_to_device(&name)?;
        }
        for (name, owner) in owners {
            server.watch_owner(&name, owner)?;
        }
        server.open_devices()?;
        // Of what the recovery has begun, before clients come.
        server.settle()?;
        server.listen_to(&listener, Source::Listener)?;
        server.listener = Some(listener);
        Ok(server)
    }

    /// Adds a descriptor, which stays open elsewhere.
    pub(super) fn listen_to(&mut self, fd: impl AsFd, source: Source) -> io::Result<u64> {
        self.last_source += 1;
        let number = self.last_source;
        epoll::add(
            &self.epoll,
            &fd,
            EventData::new_u64(number),
            EventFlags::IN | EventFlags::RDHUP,
        )?;
        self.sources.insert(number, source);
        Ok(number)
    }

    /// Opens those devices of the policy that are not open.
    pub(crate) fn open_devices(&mut self) -> io::Result<()> {
        for wanted in self.service.core().policy().devices().to_vec() {
            let name = &wanted.name;
            if self.service.device(name).is_some() || self.closing.contains(name) {
                continue;
            }
            let opened = (self.opener)(&wanted)
                .and_then(|device| Device::new(device).map_err(|e| e.report().to_string()));
            let taken = match opened {
                Ok(device) => self.take(name, device, None)?,
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                eprintln!("barleased: {name} is not leased from: {error}");
            }
        }
        self.tell_status("");
        Ok(())
    }

    /// Serves until it is told to end, and all devices are closed.
    ///
    /// # Errors
    ///
    /// Those that nothing can go on after. The devices are closed then, and all leases dead.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        self.manager.tell("READY=1");
        while !(self.stopping && self.service.devices().is_empty() && self.closing.is_empty()) {
            let timeout = self.timeout();
            let mut events = [const { MaybeUninit::uninit() }; 64];
            let (happened, _) = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            let happened: Vec<_> = happened
                .iter()
                .map(|event| (event.data.u64(), event.flags))
                .collect();
            for (number, flags) in happened {
                if let Some(source) = self.sources.get(&number).cloned()
                    && !self.happened(number, source, flags)?
                {
                    return Ok(());
                }
            }
            self.service.tick()?;
            self.give_up()?;
            self.settle()?;
            self.beat();
        }
        if self.stopping {
            // Nothing is left for another daemon.
            self.manager.remove(recovery::LEDGER);
            self.manager.remove(recovery::LISTENER);
        }
        Ok(())
    }

    /// Whether leases outlive its end.
    pub(crate) fn leaves_leases(&self) -> bool {
        !self.stopping
    }

    /// Tells the manager now and then that it is alive.
    fn beat(&mut self) {
        if let Some(pulse) = self.manager.pulse()
            && self.pulse.is_none_or(|time| time <= now())
        {
            self.manager.tell("WATCHDOG=1");
            self.pulse = Some(now().after(pulse));
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let give_up = self.give_ups.first().map(|(time, _)| *time);
        let due = self.service.due().into_iter().chain(give_up);
        let due = due.chain(self.pulse).min()?;
        let milliseconds = due.0.saturating_sub(now().0).min(3_600_000);
        Some(Timespec {
            tv_sec: i64::try_from(milliseconds / 1000).unwrap_or(0),
            tv_nsec: i64::try_from(milliseconds % 1000 * 1_000_000).unwrap_or(0),
        })
    }

    /// Handles an event; `false`: ends at once.
    fn happened(&mut self, number: u64, source: Source, flags: EventFlags) -> io::Result<bool> {
        match source {
            Source::Listener => self.accept()?,
            Source::End => {
                empty(&self.signals.end);
                self.manager.tell("STOPPING=1");
                if self.stopping || self.at_stop == AtStop::Keep {
                    return Ok(false);
                }
                self.stop()?;
            }
            Source::Reload => {
                empty(&self.signals.reload);
                self.reload()?.unwrap_or_default();
            }
            Source::Closed => {
                let _ = self.closed_event.take();
                while let Ok(name) = self.closed.1.try_recv() {
                    self.device_closed(&name)?;
                }
            }
            Source::Connection(id) => self.stirred(id, flags)?,
            Source::Events(name) => {
                self.service.changed(&name);
                if self.service.device(&name).is_none() {
                    self.sources.remove(&number);
                }
            }
            Source::Request(name) => {
                if let Some(request) = self.service.device(&name).and_then(|d| d.request.as_ref()) {
                    let _ = request.take();
                    self.let_go(&name, None)?;
                } else {
                    self.sources.remove(&number);
                }
            }
            Source::Process(process) => {
                self.unwatch(process);
                self.service.give(Event::ProcessGone(process))?;
            }
            Source::Owner(name) => self.owner_gone(&name)?,
        }
        Ok(true)
    }

    /// Reclaims all leases of a device, and closes it after that.
    pub(crate) fn let_go(&mut self, name: &Arc<str>, grace: Option<u64>) -> io::Result<()> {
        self.going.insert(name.clone());
        self.service.give(Event::DeviceGoing {
            device: name.clone(),
            grace: grace.map(barlease_ledger::types::Millis),
        })
    }

    fn stop(&mut self) -> io::Result<()> {
        self.stopping = true;
        if let Some(listener) = self.listener.take() {
            // It is not there while descriptors are short.
            let _ = epoll::delete(&self.epoll, &listener);
        }
        for name in self.service.devices() {
            self.let_go(&name, None)?;
        }
        Ok(())
    }

    /// Reads the policy again; what is wrong with it leaves the old one in force.
    pub(crate) fn reload(&mut self) -> io::Result<Result<(), Vec<String>>> {
        self.manager.tell(&manager::reloading());
        let read = match crate::policy::read(&self.policy) {
            Ok(policy) => {
                self.service.give(Event::PolicyReplaced(Arc::new(policy)))?;
                self.open_devices()?;
                Ok(())
            }
            Err(errors) => {
                for error in &errors {
                    eprintln!("barleased: the old policy stays in force: {error}");
                }
                self.tell_status("; the policy's files are wrong, an older one is in force");
                Err(errors)
            }
        };
        self.manager.tell("READY=1");
        Ok(read)
    }

    fn device_closed(&mut self, name: &Arc<str>) -> io::Result<()> {
        self.closing.remove(name);
        self.going.remove(name);
        self.service.give(Event::DeviceClosed(name.clone()))?;
        for (_, devices) in &mut self.drains {
            devices.remove(name);
        }
        let (done, rest) = std::mem::take(&mut self.drains)
            .into_iter()
            .partition(|(_, devices)| devices.is_empty());
        self.drains = rest;
        for (request, _) in done {
            self.answer(request, calls::done(), None)?;
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) => {
                let errno = rustix::io::Errno::from_io_error(&error);
                if matches!(
                    errno,
                    Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)
                ) {
                    // Until a connection ends, or this would be told again and again.
                    eprintln!("barleased: no descriptors are left for clients: {error}");
                    epoll::delete(&self.epoll, listener)?;
                    self.sources
                        .retain(|_, source| !matches!(source, Source::Listener));
                }
                return Ok(());
            }
        };
        let Ok(identity) = Identity::of(&socket) else {
            return Ok(());
        };
        let uid = identity.peer.uid;
        let connections = self.users.entry(uid).or_default();
        if *connections >= MAX_CONNECTIONS && !calls::is_administrator(uid) {
            return Ok(());
        }
        *connections += 1;
        // The number that it gets in the epoll.
        let id = ConnectionId(self.last_source + 1);
        let token = token()?;
        let event = Event::Connected {
            connection: id,
            peer: identity.peer.clone(),
            token,
        };
        self.listen_to(&socket, Source::Connection(id))?;
        self.connections
            .insert(id, Connection::new(socket, identity, token));
        self.service.give(event)
    }

    fn stirred(&mut self, id: ConnectionId, flags: EventFlags) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let waits = connection.busy.is_some() || connection.is_sending();
        let ended = if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            true
        } else if waits {
            // Its next call is not read before this one is answered.
            flags.contains(EventFlags::RDHUP)
        } else if flags.contains(EventFlags::IN) {
            !matches!(connection.receive(), Ok(true))
        } else {
            false
        };
        if ended {
            return self.gone(id);
        }
        self.ready.insert(id);
        Ok(())
    }

    /// Does what there is to do for connections, and outside of the service.
    fn settle(&mut self) -> io::Result<()> {
        loop {
            while let Some(effect) = self.service.next_effect() {
                self.effect(effect)?;
            }
            match self.ready.pop_first() {
                Some(id) => self.advance(id)?,
                None => return Ok(()),
            }
        }
    }

    /// Sends what a client takes, and begins its next call if there is nothing left to send.
    fn advance(&mut self, id: ConnectionId) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let Ok(any) = connection.send() else {
            return self.gone(id);
        };
        let sending = connection.is_sending();
        if (any || !sending)
            && let Some(time) = connection.give_up.take()
        {
            self.give_ups.remove(&(time, id));
        }
        if sending && connection.give_up.is_none() {
            let time = Time(now().0 + PATIENCE);
            connection.give_up = Some(time);
            self.give_ups.insert((time, id));
        }
        if !sending {
            if let Some(Busy::List { .. }) = connection.busy {
                self.list_on(id)?;
                self.ready.insert(id);
            } else if connection.busy.is_none() {
                match connection.next_call() {
                    Ok(Some(call)) => {
                        self.call(id, &call)?;
                        self.ready.insert(id);
                    }
                    Ok(None) => {}
                    Err(_) => return self.gone(id),
                }
            }
        }
        let Some(connection) = self.connections.get(&id) else {
            return Ok(());
        };
        let mut flags = EventFlags::RDHUP;
        flags.set(EventFlags::OUT, connection.is_sending());
        let waits = connection.busy.is_some() || connection.is_sending();
        flags.set(EventFlags::IN, !waits);
        epoll::modify(&self.epoll, connection, EventData::new_u64(id.0), flags)?;
        Ok(())
    }

    /// A client is not there any more, or is not worth it.
    pub(crate) fn gone(&mut self, id: ConnectionId) -> io::Result<()> {
        let Some(connection) = self.connections.remove(&id) else {
            return Ok(());
        };
        self.sources.remove(&id.0);
        if let Some(time) = connection.give_up {
            self.give_ups.remove(&(time, id));
        }
        self.requests.retain(|_, connection| *connection != id);
        let uid = connection.identity.peer.uid;
        if let Some(count) = self.users.get_mut(&uid) {
            *count -= 1;
            if *count == 0 {
                self.users.remove(&uid);
            }
        }
        let undelivered: Vec<LeaseId> = connection.undelivered().collect();
        drop(connection);
        for lease in undelivered {
            self.service.give(Event::Undelivered(lease))?;
        }
        self.service.give(Event::PeerGone(id))?;
        self.listen_again()
    }

    fn listen_again(&mut self) -> io::Result<()> {
        let listens = |source: &Source| matches!(source, Source::Listener);
        if self.listener.is_none() || self.sources.values().any(listens) {
            return Ok(());
        }
        if let Some(listener) = self.listener.take() {
            self.listen_to(&listener, Source::Listener)?;
            self.listener = Some(listener);
        }
        Ok(())
    }

    fn give_up(&mut self) -> io::Result<()> {
        while let Some((time, id)) = self.give_ups.first().copied() {
            if time > now() {
                break;
            }
            self.gone(id)?;
        }
        Ok(())
    }

    fn effect(&mut self, effect: Effect) -> io::Result<()> {
        match effect {
            Effect::Answer {
                request,
                answer,
                fd,
            } => {
                let lease = match &answer {
                    Ok(Reply::Granted(grant)) => fd.map(|fd| (grant.lease, fd)),
                    _ => None,
                };
                self.answer(request, calls::reply(answer), lease)
            }
            Effect::Notice { watch, lease, news } => {
                let Some(id) = self.requests.get(&watch).copied() else {
                    return Ok(());
                };
                self.push(id, calls::notice(lease, news), None)
            }
            Effect::WatchProcess(process) => self.watch(process),
            Effect::UnwatchProcess(process) => {
                self.unwatch(process);
                Ok(())
            }
            Effect::NoCgroup(cgroup) => self.service.give(Event::CgroupEmpty(cgroup)),
            Effect::Close(name, device) => {
                self.closing.insert(name.clone());
                let owner = self.unwatch_owner(&name);
                self.manager.remove(&recovery::name_of(&name, owner));
                let barrier = self.manager.barrier();
                let event = self.closed_event.try_clone().map_err(io::Error::other)?;
                let sender = self.closed.0.clone();
                // Closing waits for importers.
                thread::Builder::new().spawn(move || {
                    drop(device);
                    if let Some(barrier) = barrier {
                        barrier.wait();
                    }
                    // The receiver is gone only when the service has ended.
                    let _ = sender.send(name);
                    let _ = event.signal();
                })?;
                Ok(())
            }
        }
    }

    /// Answers a request for good.
    pub(crate) fn answer(
        &mut self,
        request: RequestId,
        message: Vec<u8>,
        lease: Option<(LeaseId, OwnedFd)>,
    ) -> io::Result<()> {
        let id = self.requests.remove(&request);
        let connection = id.and_then(|id| Some((id, self.connections.get_mut(&id)?)));
        let Some((id, connection)) = connection else {
            return self.undelivered(lease);
        };
        let oneway = matches!(connection.busy, Some(Busy::Call { oneway: true }));
        connection.busy = None;
        self.ready.insert(id);
        if oneway {
            return self.undelivered(lease);
        }
        self.push(id, message, lease)
    }

    fn undelivered(&mut self, lease: Option<(LeaseId, OwnedFd)>) -> io::Result<()> {
        match lease {
            Some((lease, _)) => self.service.give(Event::Undelivered(lease)),
            None => Ok(()),
        }
    }

    /// Sends a message.
    pub(crate) fn push(
        &mut self,
        id: ConnectionId,
        bytes: Vec<u8>,
        lease: Option<(LeaseId, OwnedFd)>,
    ) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        self.ready.insert(id);
        match connection.push(Outgoing { bytes, lease }) {
            Ok(()) => Ok(()),
            Err(_) => self.gone(id),
        }
    }

    /// A number for a request of a connection.
    pub(crate) fn request_of(&mut self, id: ConnectionId) -> RequestId {
        self.last_request += 1;
        let request = RequestId(self.last_request);
        self.requests.insert(request, id);
        request
    }

    fn watch(&mut self, process: ProcessId) -> io::Result<()> {
        let pidfd = self
            .connections
            .values()
            .find(|connection| connection.identity.peer.process == Some(process))
            .and_then(|connection| connection.identity.process.as_ref()?.try_clone().ok());
        let before = || peer::open_process(self.service.pid_of(process)?, process);
        let Some(pidfd) = pidfd.or_else(before) else {
            return self.service.give(Event::ProcessGone(process));
        };
        let number = self.listen_to(&pidfd, Source::Process(process))?;
        self.processes.insert(process, (number, pidfd));
        Ok(())
    }

    fn unwatch(&mut self, process: ProcessId) {
        if let Some((number, pidfd)) = self.processes.remove(&process) {
            self.sources.remove(&number);
            // A clone of the descriptor in a connection would keep it in the epoll.
            let _ = epoll::delete(&self.epoll, &pidfd);
        }
    }
}

/// A secret that nobody guesses, and not 0.
fn token() -> io::Result<u128> {
    let mut bytes = [0; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    match got == bytes.len() {
        true => Ok(u128::from_ne_bytes(bytes).max(1)),
        // As long as it is this short it comes at once and whole.
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Empties a socket that signals write to.
pub(crate) fn empty(mut socket: &UnixStream) {
    let _ = io::Read::read(&mut socket, &mut [0; 64]);
}
