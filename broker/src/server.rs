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
use std::sync::Arc;
use std::thread;

use barlease_ledger::core::Event;
use barlease_ledger::core::Reply;
use barlease_ledger::policy;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::ProcessId;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::event::epoll::EventData;
use rustix::event::epoll::EventFlags;

use crate::calls;
use crate::cgroup::Cgroups;
use crate::claims::Claims;
use crate::connection::CHUNK;
use crate::connection::Connection;
use crate::finished::Done;
use crate::finished::Finished;
use crate::finished::Inbox;
use crate::manager::Manager;
use crate::metrics::Metrics;
use crate::metrics::Moment;
use crate::metrics::door::Door;
use crate::policy::Written;
use crate::records;
use crate::records::Log;
use crate::recovery;
use crate::recovery::Owner;
use crate::service::Effect;
use crate::service::NEWS;
use crate::service::Service;
use crate::service::now;
use crate::shares::Shares;
use crate::watched::Unwatched;
use crate::words;

/// Opens the devices of a policy.
pub type Opener<'a> = dyn Fn(&policy::Device) -> Result<barlease::Device, String> + 'a;

/// Signals, as readable sockets.
#[derive(Debug)]
pub(crate) struct Signals {
    pub(crate) end: UnixStream,
    pub(crate) reload: UnixStream,
}

/// Leases are kept or reclaimed when the daemon is told to end.
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
    pub(crate) opener: &'a Opener<'a>,
    pub(crate) epoll: OwnedFd,
    pub(crate) listener: Option<UnixListener>,
    pub(crate) claims: Option<Claims>,
    /// Listeners that wait for descriptors to accept with.
    pub(crate) paused: Vec<Option<Arc<str>>>,
    signals: Signals,
    pub(crate) sources: BTreeMap<u64, Source>,
    pub(crate) last_source: u64,
    pub(crate) connections: BTreeMap<ConnectionId, Connection>,
    pub(crate) shares: Shares,
    /// A descriptor that is given up when one is needed for a moment and none is left.
    pub(crate) spare: Option<OwnedFd>,
    /// Connections, by the process that made them.
    pub(crate) callers: BTreeSet<(ProcessId, ConnectionId)>,
    /// The connection that a request is of.
    pub(crate) requests: BTreeMap<RequestId, ConnectionId>,
    pub(crate) last_request: u64,
    /// Connections that may have something to do.
    pub(crate) ready: BTreeSet<ConnectionId>,
    pub(crate) give_ups: BTreeSet<(Time, ConnectionId)>,
    /// Connections for which the kernel has no room, and when it is asked again.
    pub(crate) stalled: BTreeSet<ConnectionId>,
    pub(crate) send_again: Option<Time>,
    /// Processes that are watched: the source, and the pidfd.
    pub(crate) processes: BTreeMap<ProcessId, (u64, OwnedFd)>,
    pub(crate) cgroups: Cgroups,
    /// Processes and groups that could not be watched, and when that is tried again.
    pub(crate) unwatched: Vec<Unwatched>,
    pub(crate) watch_again: Option<Time>,
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
    pub(crate) stopping: bool,
    /// Where bytes are received.
    pub(crate) chunk: Box<[u8]>,
    at_stop: AtStop,
    pub(crate) manager: Manager,
    /// When the manager is to be told that the service is alive.
    pulse: Option<Time>,
    /// Processes that have handed a device over; the source and the pidfd, if it is watched.
    pub(crate) owners: BTreeMap<Arc<str>, (Option<WatchedOwner>, Owner)>,
    pub(crate) written: Written,
}

/// The source and the pidfd of a process that has handed a device over.
type WatchedOwner = (u64, OwnedFd);

impl<'a> Server<'a> {
    pub(crate) fn new(
        written: Written,
        service: Service,
        opener: &'a Opener<'a>,
        signals: Signals,
        (inbox, finished): (Inbox, Finished),
        (manager, at_stop, owners): (Manager, AtStop, Vec<(Arc<str>, Owner)>),
        (log, door): (Log, Door),
    ) -> io::Result<Self> {
        let mut server = Self {
            service,
            opener,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener: None,
            claims: None,
            paused: Vec::new(),
            signals,
            sources: BTreeMap::new(),
            last_source: 0,
            connections: BTreeMap::new(),
            shares: Shares::new(),
            spare: None,
            callers: BTreeSet::new(),
            requests: BTreeMap::new(),
            last_request: 0,
            ready: BTreeSet::new(),
            give_ups: BTreeSet::new(),
            stalled: BTreeSet::new(),
            send_again: None,
            processes: BTreeMap::new(),
            cgroups: Cgroups::new()?,
            unwatched: Vec::new(),
            watch_again: None,
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
            written,
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
        server.begin_policy()?;
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
            self.shares.tick();
            self.send_again();
            self.watch_again()?;
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
        let due = due.chain(self.pulse).chain(self.shares.due());
        let due = due.chain(self.send_again).chain(self.watch_again).min()?;
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
                // The record has the fault.
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

    /// Tells whoever wants to know the metrics.
    fn tell_metrics(&self) {
        let _ = self.door.event.take();
        let moment = Moment {
            core: self.service.core(),
            now: now(),
            devices: self.service.devices().len(),
            connections: self.connections.len(),
            lost: self.log.lost(),
            policy_is_old: !self.written.errors.is_empty(),
        };
        for wish in self.door.wishes.try_iter() {
            // It may have given up.
            let _ = wish.try_send(self.metrics.families(&moment));
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        self.stopping = true;
        self.listen_no_more();
        for name in self.service.devices() {
            self.let_go(&name, None)?;
        }
        Ok(())
    }

    pub(crate) fn effect(&mut self, effect: Effect) -> io::Result<()> {
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
            Effect::WatchCgroup(cgroup, path) => self.watch_cgroup(cgroup, path),
            Effect::UnwatchCgroup(cgroup) => {
                self.unwatch_cgroup(cgroup);
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
