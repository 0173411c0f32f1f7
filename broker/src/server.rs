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
use std::thread;

use barlease_ledger::core::Event;
use barlease_ledger::core::Reply;
use barlease_ledger::policy;
use barlease_ledger::policy::Subject;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::ProcessId;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::event::epoll::EventData;
use rustix::event::epoll::EventFlags;

use crate::accept::Share;
use crate::accept::counted_as;
use crate::calls;
use crate::cgroup::Cgroups;
use crate::claims::Claims;
use crate::connection::Busy;
use crate::connection::CHUNK;
use crate::connection::Connection;
use crate::connection::Outgoing;
use crate::device::Device;
use crate::finished::Done;
use crate::finished::Finished;
use crate::finished::Inbox;
use crate::manager;
use crate::manager::Manager;
use crate::metrics::Metrics;
use crate::metrics::Moment;
use crate::metrics::door::Door;
use crate::peer;
use crate::records;
use crate::records::Log;
use crate::recovery;
use crate::recovery::Owner;
use crate::service::Effect;
use crate::service::NEWS;
use crate::service::Service;
use crate::service::now;
use crate::words;

/// How long a client may take nothing of what is sent to it.
const PATIENCE: u64 = 10_000;

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
pub(crate) enum Source {
    /// Of a claim, or of the service.
    Listener(Option<Arc<str>>),
    End,
    Reload,
    Finished,
    Metrics,
    Connection(ConnectionId),
    Events(Arc<str>),
    Request(Arc<str>),
    Process(ProcessId),
    Cgroups,
    Owner(Arc<str>),
}

/// Everything.
pub(crate) struct Server<'a> {
    pub(crate) service: Service,
    pub(crate) policy: PathBuf,
    opener: &'a Opener<'a>,
    pub(crate) epoll: OwnedFd,
    pub(crate) listener: Option<UnixListener>,
    pub(crate) claims: Option<Claims>,
    /// Listeners that wait for descriptors to accept with.
    pub(crate) paused: Vec<Option<Arc<str>>>,
    signals: Signals,
    pub(crate) sources: BTreeMap<u64, Source>,
    pub(crate) last_source: u64,
    pub(crate) connections: BTreeMap<ConnectionId, Connection>,
    /// What users and claims have of the daemon.
    pub(crate) subjects: BTreeMap<Subject, Share>,
    /// Connections, by the process that made them.
    pub(crate) callers: BTreeSet<(ProcessId, ConnectionId)>,
    /// The connection that a request is of.
    pub(crate) requests: BTreeMap<RequestId, ConnectionId>,
    last_request: u64,
    /// Connections that may have something to do.
    ready: BTreeSet<ConnectionId>,
    give_ups: BTreeSet<(Time, ConnectionId)>,
    /// Processes that are watched: the source, and the pidfd.
    processes: BTreeMap<ProcessId, (u64, OwnedFd)>,
    cgroups: Cgroups,
    /// Devices that are being closed.
    pub(crate) closing: BTreeSet<Arc<str>>,
    inbox: Inbox,
    finished: Finished,
    /// Devices that are on their way out.
    pub(crate) going: BTreeSet<Arc<str>>,
    /// Drains to be answered when these are closed.
    pub(crate) drains: Vec<(RequestId, BTreeSet<Arc<str>>)>,
    /// Connections that are told all records.
    pub(crate) monitors: BTreeSet<ConnectionId>,
    pub(crate) log: Log,
    pub(crate) metrics: Metrics,
    door: Door,
    stopping: bool,
    /// Where bytes are received.
    chunk: Box<[u8]>,
    at_stop: AtStop,
    pub(crate) manager: Manager,
    /// When the manager is to be told that the service is alive.
    pulse: Option<Time>,
    /// Processes that have handed a device over: the source, and the pidfd.
    pub(crate) owners: BTreeMap<Arc<str>, (u64, OwnedFd, Owner)>,
}

impl<'a> Server<'a> {
    pub(crate) fn new(
        policy: PathBuf,
        service: Service,
        opener: &'a Opener<'a>,
        signals: Signals,
        (inbox, finished): (Inbox, Finished),
        (manager, at_stop, owners): (Manager, AtStop, Vec<(Arc<str>, Owner)>),
        (log, door): (Log, Door),
    ) -> io::Result<Self> {
        let mut server = Self {
            service,
            policy,
            opener,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener: None,
            claims: None,
            paused: Vec::new(),
            signals,
            sources: BTreeMap::new(),
            last_source: 0,
            connections: BTreeMap::new(),
            subjects: BTreeMap::new(),
            callers: BTreeSet::new(),
            requests: BTreeMap::new(),
            last_request: 0,
            ready: BTreeSet::new(),
            give_ups: BTreeSet::new(),
            processes: BTreeMap::new(),
            cgroups: Cgroups::new()?,
            closing: BTreeSet::new(),
            inbox,
            finished,
            going: BTreeSet::new(),
            drains: Vec::new(),
            monitors: BTreeSet::new(),
            log,
            metrics: Metrics::new().map_err(io::Error::other)?,
            door,
            stopping: false,
            chunk: vec![0; CHUNK].into(),
            at_stop,
            pulse: manager.pulse().map(|_| Time(0)),
            manager,
            owners: BTreeMap::new(),
        };
        let end = server.signals.end.try_clone()?;
        let reload = server.signals.reload.try_clone()?;
        let inbox = server.inbox.as_fd().try_clone_to_owned()?;
        server.listen_to(end, Source::End)?;
        server.listen_to(reload, Source::Reload)?;
        server.listen_to(inbox, Source::Finished)?;
        let cgroups = server.cgroups.fd().map(|fd| fd.try_clone_to_owned());
        if let Some(cgroups) = cgroups.transpose()? {
            server.listen_to(cgroups, Source::Cgroups)?;
        }
        let wanted = server.door.event.try_clone().map_err(io::Error::other)?;
        server.listen_to(wanted, Source::Metrics)?;
        for name in server.service.devices() {
            server.listen_to_device(&name)?;
        }
        for (name, owner) in owners {
            server.watch_owner(&name, owner)?;
        }
        server.open_devices()?;
        // Of what the recovery has begun, before clients come.
        server.settle()?;
        Ok(server)
    }

    /// Adds a descriptor, which stays open elsewhere.
    pub(crate) fn listen_to(&mut self, fd: impl AsFd, source: Source) -> io::Result<u64> {
        self.last_source += 1;
        let number = self.last_source;
        let flags = EventFlags::IN | EventFlags::RDHUP;
        epoll::add(&self.epoll, &fd, EventData::new_u64(number), flags)?;
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
            match taken {
                Ok(()) => self.record(records::device_opened(name))?,
                Err(error) => self.record(records::device_absent(name, &error))?,
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
        let leases = self.service.core().leases().count();
        self.metrics.recovered(leases);
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
        if !self.ready.is_empty() {
            return Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            });
        }
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
            Source::Listener(claim) => self.accept(number, claim)?,
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
                // What is wrong is in the record.
                let _ = self.reload()?;
            }
            Source::Finished => {
                for done in self.inbox.take() {
                    match done {
                        Done::Closed(name) => self.device_closed(&name)?,
                        Done::Scrubbed(lease, result) => {
                            self.service.give(Event::Scrubbed { lease, result })?;
                        }
                    }
                }
            }
            Source::Metrics => self.tell_metrics(),
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
            Source::Cgroups => {
                for cgroup in self.cgroups.ended() {
                    self.service.give(Event::CgroupEmpty(cgroup))?;
                }
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
        })?;
        self.service.cancel_scrubs(name);
        Ok(())
    }

    /// Tells whoever wants to know the metrics.
    fn tell_metrics(&self) {
        let _ = self.door.event.take();
        let moment = Moment {
            core: self.service.core(),
            now: now(),
            devices: self.service.devices().len(),
            connections: self.connections.len(),
            lost: self.log.lost(),
        };
        for wish in self.door.wishes.try_iter() {
            // It may have given up.
            let _ = wish.try_send(self.metrics.families(&moment));
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        self.stopping = true;
        // No more clients: the descriptors leave the epoll as they are closed.
        self.listener = None;
        self.claims = None;
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
                self.record(records::policy_loaded(&policy))?;
                self.service.give(Event::PolicyReplaced(Arc::new(policy)))?;
                self.open_devices()?;
                Ok(())
            }
            Err(errors) => {
                self.record(records::policy_refused(&errors))?;
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
        self.record(records::device_closed(name))?;
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
        } else if flags.contains(EventFlags::IN) && !connection.has_input() {
            !matches!(connection.receive(&mut self.chunk), Ok(true))
        } else {
            false
        };
        if ended || !self.weigh(id) {
            return self.gone(id);
        }
        self.ready.insert(id);
        Ok(())
    }

    /// Does what there is to do for connections, and outside of the service: of each connection one
    /// call, so that whoever sends many at once gets no more than others.
    fn settle(&mut self) -> io::Result<()> {
        self.effects()?;
        for begins in [true, false] {
            for id in std::mem::take(&mut self.ready) {
                self.advance(id, begins)?;
                self.effects()?;
            }
        }
        Ok(())
    }

    fn effects(&mut self) -> io::Result<()> {
        while let Some(effect) = self.service.next_effect() {
            self.effect(effect)?;
        }
        Ok(())
    }

    /// Sends what a client takes, and begins its next call, if it may, when there is nothing left
    /// to send.
    fn advance(&mut self, id: ConnectionId, begins: bool) -> io::Result<()> {
        let mut begins = begins;
        loop {
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
            // What is put there from here on is no more than what this does.
            self.ready.remove(&id);
            let lists = matches!(connection.busy, Some(Busy::List { .. }));
            let calls = connection.busy.is_none() && connection.has_input();
            match (sending, std::mem::take(&mut begins)) {
                (false, true) if lists => self.list_on(id)?,
                (false, true) if calls => match connection.next_call() {
                    Ok(Some(call)) => {
                        self.call(id, &call)?;
                        self.effects()?;
                    }
                    Ok(None) => break,
                    Err(_) => return self.gone(id),
                },
                (false, false) if lists || calls => {
                    self.ready.insert(id);
                    break;
                }
                _ => break,
            }
        }
        if !self.weigh(id) {
            return self.gone(id);
        }
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let mut flags = EventFlags::RDHUP;
        flags.set(EventFlags::OUT, connection.is_sending());
        let waits = connection.busy.is_some() || connection.is_sending();
        // What was sent is taken when there is a turn for it, and not before: a client that sends
        // faster than it is served fills its own socket.
        flags.set(EventFlags::IN, !waits && !connection.has_input());
        if connection.armed != flags {
            connection.armed = flags;
            epoll::modify(&self.epoll, connection, EventData::new_u64(id.0), flags)?;
        }
        Ok(())
    }

    /// A client is not there any more, or is not worth it.
    pub(crate) fn gone(&mut self, id: ConnectionId) -> io::Result<()> {
        let Some(connection) = self.connections.remove(&id) else {
            return Ok(());
        };
        self.sources.remove(&id.0);
        self.monitors.remove(&id);
        if let Some(time) = connection.give_up {
            self.give_ups.remove(&(time, id));
        }
        if let Some(request) = connection.request {
            self.requests.remove(&request);
        }
        let peer = &connection.peer;
        if let Some(process) = peer.process {
            self.callers.remove(&(process, id));
        }
        let subject = counted_as(peer);
        if let Some(share) = self.subjects.get_mut(&subject) {
            share.connections -= 1;
            share.bytes -= connection.counted;
            if share.connections == 0 {
                self.subjects.remove(&subject);
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
                self.time_grant(request, answer.is_ok());
                let answer = answer.map_err(|refusal| words::refusal(*refusal));
                if let (Err(refusal), Some(id)) = (&answer, self.requests.get(&request).copied()) {
                    self.record_refusal(id, refusal)?;
                }
                self.answer(request, calls::reply(answer), lease)
            }
            Effect::Notice {
                watch: NEWS,
                lease,
                news,
                about,
            } => self.record(records::news(lease, news, &about)),
            Effect::Notice {
                watch, lease, news, ..
            } => {
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
            Effect::WatchCgroup(cgroup, path) => {
                let Err(error) = self.cgroups.watch(cgroup, &path) else {
                    return Ok(());
                };
                if error.kind() != io::ErrorKind::NotFound {
                    // What cannot be watched would live for ever.
                    eprintln!("barleased: watch the control group {path}: {error}");
                }
                self.service.give(Event::CgroupEmpty(cgroup))
            }
            Effect::UnwatchCgroup(cgroup) => {
                self.cgroups.unwatch(cgroup);
                Ok(())
            }
            Effect::Close(name, device) => {
                self.closing.insert(name.clone());
                let owner = self.unwatch_owner(&name);
                self.manager.remove(&recovery::name_of(&name, owner));
                let barrier = self.manager.barrier();
                let finished = self.finished.clone();
                // Closing waits for importers.
                thread::Builder::new().spawn(move || {
                    drop(device);
                    if let Some(barrier) = barrier {
                        barrier.wait();
                    }
                    finished.tell(Done::Closed(name));
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
        connection.request = None;
        connection.asked = None;
        self.ready.insert(id);
        if oneway {
            return self.undelivered(lease);
        }
        self.push(id, message, lease)
    }

    /// Measures how long an Acquire took.
    fn time_grant(&self, request: RequestId, granted: bool) {
        let id = self.requests.get(&request);
        let connection = id.and_then(|id| self.connections.get(id));
        let asked = connection.and_then(|connection| connection.asked.as_ref());
        if let (Some(asked), true) = (asked, granted) {
            self.metrics.granted(asked.began.elapsed());
        }
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
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.request = Some(request);
        }
        request
    }

    fn watch(&mut self, process: ProcessId) -> io::Result<()> {
        let all = (process, ConnectionId(0))..=(process, ConnectionId(u64::MAX));
        let caller = self.callers.range(all).next();
        let pid = match caller.and_then(|(_, id)| self.connections.get(id)) {
            Some(connection) => Some(connection.peer.pid),
            None => self.service.pid_of(process),
        };
        let Some(pidfd) = pid.and_then(|pid| peer::open(pid, process)) else {
            return self.service.give(Event::ProcessGone(process));
        };
        let number = self.listen_to(&pidfd, Source::Process(process))?;
        self.processes.insert(process, (number, pidfd));
        Ok(())
    }

    fn unwatch(&mut self, process: ProcessId) {
        if let Some((number, _)) = self.processes.remove(&process) {
            self.sources.remove(&number);
        }
    }
}

/// A secret that nobody guesses, and not 0.
pub(crate) fn token() -> io::Result<u128> {
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
