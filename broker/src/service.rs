//! The core, with what it decides about: ledger, devices and time. An event goes in, and all that
//! comes of it is carried out before the next one.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use barlease_ledger::core::About;
use barlease_ledger::core::Action;
use barlease_ledger::core::Core;
use barlease_ledger::core::Event;
use barlease_ledger::core::Found;
use barlease_ledger::core::LeaseView;
use barlease_ledger::core::News;
use barlease_ledger::core::Refusal;
use barlease_ledger::core::Reply;
use barlease_ledger::core::RevokeAnswer;
use barlease_ledger::policy::Policy;
use barlease_ledger::record::Record;
use barlease_ledger::types::BufferId;
use barlease_ledger::types::CgroupId;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::Millis;
use barlease_ledger::types::Peer;
use barlease_ledger::types::ProcessId;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use barlease_proto::Usage;
use rustix::time::ClockId;

use crate::device::Device;
use crate::finished::Done;
use crate::finished::Finished;
use crate::recovery::Kept;
use crate::scrub::Job;
use crate::scrub::Scrubber;
use crate::store::Store;

/// Shortest time between two LISTs of a device that are asked for by its events.
const LIST_PAUSE: u64 = 10;
/// And as a multiple of the time that the last one took.
const LIST_SHARE: u64 = 4;
/// The watch of the service itself; those of clients are above.
pub(crate) const NEWS: RequestId = RequestId(0);
/// `ENODEV`: an export from a device that is closed.
const ENODEV: i32 = 19;

/// Something to do outside of the service.
#[derive(Debug)]
pub(crate) enum Effect {
    /// The answer of a request, with the descriptor of its lease if it is granted.
    Answer {
        request: RequestId,
        answer: Result<Reply, Box<Refusal>>,
        fd: Option<OwnedFd>,
    },
    /// News for a watch.
    Notice {
        watch: RequestId,
        lease: LeaseId,
        news: News,
        about: Arc<About>,
    },
    WatchProcess(ProcessId),
    UnwatchProcess(ProcessId),
    WatchCgroup(CgroupId, Arc<str>),
    UnwatchCgroup(CgroupId),
    /// To be dropped where that may take long; then [`Event::DeviceClosed`].
    Close(Arc<str>, Option<Box<Open>>),
}

/// A device that is open.
#[derive(Debug)]
pub(crate) struct Open {
    /// Dropped before the device, of which its thread has the other reference.
    scrubber: Option<Scrubber>,
    device: Arc<Device>,
    /// When its events were last answered by a LIST, which may be repeated from then on.
    list_from: Time,
    list_wanted: bool,
}

impl Open {
    fn new(device: Device) -> Self {
        Self {
            scrubber: None,
            device: Arc::new(device),
            list_from: Time(0),
            list_wanted: false,
        }
    }
}

/// The service, without its clients.
pub(crate) struct Service {
    core: Core,
    store: Store,
    devices: BTreeMap<Arc<str>, Open>,
    /// Descriptors of leases whose requests are not answered.
    exported: BTreeMap<LeaseId, OwnedFd>,
    timer: Option<Time>,
    /// How leases were used when it was asked for last, and until when that is enough.
    usage: Option<(Time, Arc<BTreeMap<BufferId, Usage>>)>,
    effects: VecDeque<Effect>,
    done: Finished,
    /// Numbers of the processes that had leases before the restart.
    pids: BTreeMap<ProcessId, u32>,
    /// Called before each action.
    before_action: Box<dyn Fn()>,
}

/// Now.
pub(crate) fn now() -> Time {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    Time(seconds * 1000 + nanoseconds / 1_000_000)
}

/// Whether an action does something at once that the ledger must be ahead of. Messages to clients,
/// and watching, wait until all actions are carried out.
fn reaches_the_kernel(action: &Action) -> bool {
    matches!(
        action,
        Action::Scrub { .. } | Action::Export(_) | Action::Revoke { .. } | Action::CloseDevice(_)
    )
}

impl Service {
    /// Goes on with what an earlier daemon has left: its ledger, which is empty for the first one,
    /// and its devices.
    pub(crate) fn recover(
        policy: Policy,
        (store, records): (Store, Vec<Record>),
        kept: Vec<Kept>,
        resume: Millis,
        before_action: Box<dyn Fn()>,
        done: Finished,
    ) -> io::Result<Self> {
        let mut found: Vec<Found> = Vec::new();
        let mut devices = BTreeMap::new();
        for kept in kept {
            devices.insert(kept.found.device.clone(), Open::new(kept.device));
            found.push(kept.found);
        }
        let (core, actions) = Core::recover(Arc::new(policy), records, found, now(), resume);
        let known = |lease: LeaseView<'_>| Some((lease.peer.process?, lease.peer.pid));
        let pids = core.leases().filter_map(known).collect();
        let mut service = Self {
            core,
            store,
            devices,
            exported: BTreeMap::new(),
            timer: None,
            usage: None,
            effects: VecDeque::new(),
            pids,
            before_action,
            done,
        };
        service.watch_all()?;
        service.carry_out_all(actions.into())?;
        Ok(service)
    }

    /// The number of a process that had a lease before the restart.
    pub(crate) fn pid_of(&self, process: ProcessId) -> Option<u32> {
        self.pids.get(&process).copied()
    }

    /// Has all news told under [`NEWS`]: they are what is recorded.
    fn watch_all(&mut self) -> io::Result<()> {
        let connection = ConnectionId(0);
        let nobody = Peer {
            uid: u32::MAX,
            gid: u32::MAX,
            groups: Arc::new([]),
            pid: 0,
            process: None,
            cgroup: None,
            cgroup_path: "".into(),
            unit: "".into(),
            claim: None,
        };
        self.give(Event::Connected {
            connection,
            peer: nobody,
            token: 0,
            administrator: true,
        })?;
        self.give(Event::Watch {
            connection,
            request: NEWS,
            all: true,
        })
    }

    /// How the leases of the open devices are used, as the kernel tells.
    ///
    /// It takes as long as there are leases, and so it is asked for again only after a multiple of
    /// that time, however many want to know.
    pub(crate) fn usage(&mut self) -> Arc<BTreeMap<BufferId, Usage>> {
        let began = now();
        if let Some((until, usage)) = &self.usage
            && began < *until
        {
            return usage.clone();
        }
        let devices = self.devices.values();
        // A device that goes away tells nothing.
        let listed = devices.filter_map(|open| open.device.usage().ok());
        let usage: Arc<BTreeMap<_, _>> = Arc::new(listed.flatten().collect());
        let took = now().0.saturating_sub(began.0);
        self.usage = Some((Time(now().0 + took * LIST_SHARE), usage.clone()));
        usage
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    /// An open device.
    pub(crate) fn device(&self, name: &str) -> Option<&Device> {
        self.devices.get(name).map(|open| &*open.device)
    }

    /// Names of the open devices.
    pub(crate) fn devices(&self) -> Vec<Arc<str>> {
        self.devices.keys().cloned().collect()
    }

    /// Leases from a device from now on.
    pub(crate) fn open(&mut self, name: &Arc<str>, device: Device) -> io::Result<()> {
        let facts = device
            .facts()
            .map_err(|error| io::Error::other(error.report().to_string()))?;
        self.devices.insert(name.clone(), Open::new(device));
        self.give(Event::DeviceOpened {
            device: name.clone(),
            facts,
        })
    }

    /// A device has signalled that its list has changed.
    pub(crate) fn changed(&mut self, name: &str) {
        if let Some(open) = self.devices.get_mut(name) {
            // One that cannot be read is asked for LIST, which does no harm.
            let _ = open.device.events.take();
            open.list_wanted = true;
        }
    }

    /// When [`Service::tick`] is due.
    pub(crate) fn due(&self) -> Option<Time> {
        let wanted = self.devices.values().filter(|open| open.list_wanted);
        wanted.map(|open| open.list_from).chain(self.timer).min()
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self) -> io::Result<()> {
        let time = now();
        let due = |open: &Open| open.list_wanted && open.list_from <= time;
        let devices: Vec<_> = self
            .devices
            .iter()
            .filter(|(_, open)| due(open))
            .map(|(name, _)| name.clone())
            .collect();
        for name in devices {
            self.list(name)?;
        }
        if self.timer.is_some_and(|timer| timer <= time) {
            self.give(Event::Tick)?;
        }
        Ok(())
    }

    /// Actions to carry out outside, in their order.
    pub(crate) fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Gives an event to the core, and carries out all that comes of it.
    ///
    /// # Errors
    ///
    /// The ledger cannot be written to: nothing may go on, since a lease that is not in it would
    /// outlive the service unknown.
    pub(crate) fn give(&mut self, event: Event) -> io::Result<()> {
        let actions = self.core.handle(now(), event);
        self.carry_out_all(actions.into())
    }

    fn carry_out_all(&mut self, mut actions: VecDeque<Action>) -> io::Result<()> {
        let mut lists = BTreeSet::new();
        loop {
            let answer = match actions.pop_front() {
                Some(action) => self.carry_out(action, &mut lists)?,
                None => match lists.pop_first() {
                    Some(device) => self.ask_list(device),
                    None => break,
                },
            };
            if let Some(answer) = answer {
                actions.extend(self.core.handle(now(), answer));
            }
        }
        // Before anything is told to clients, which is what is left to do.
        self.store.flush()?;
        // Those of leases that ended before they were granted.
        self.exported.clear();
        Ok(())
    }

    /// Compares a device's leases with the kernel's.
    pub(crate) fn list(&mut self, device: Arc<str>) -> io::Result<()> {
        match self.ask_list(device) {
            Some(listed) => self.give(listed),
            None => Ok(()),
        }
    }

    fn ask_list(&mut self, device: Arc<str>) -> Option<Event> {
        let open = self.devices.get_mut(&device)?;
        open.list_wanted = false;
        let began = now();
        let listed = open.device.list();
        let took = now().0.saturating_sub(began.0);
        open.list_from = Time(now().0 + LIST_PAUSE.max(took * LIST_SHARE));
        match listed {
            Ok(buffers) => Some(Event::Listed { device, buffers }),
            Err(error) => {
                // The device is going away, or memory is short: its next event asks again.
                eprintln!("barleased: {device}: {}", error.report());
                None
            }
        }
    }

    /// Has a device's thread clear something; `false`: there is no such device or thread.
    fn begin_scrub(&mut self, device: &str, job: Job) -> bool {
        let Some(open) = self.devices.get_mut(device) else {
            return false;
        };
        if open.scrubber.is_none() {
            let done = self.done.clone();
            let told = move |lease, result| done.tell(Done::Scrubbed(lease, result));
            match Scrubber::start(open.device.clone(), Box::new(told)) {
                Ok(scrubber) => open.scrubber = Some(scrubber),
                Err(error) => eprintln!("barleased: {device}: start a thread: {error}"),
            }
        }
        let scrubber = open.scrubber.as_ref();
        scrubber.is_some_and(|scrubber| scrubber.add(job).is_ok())
    }

    /// Ends the clearing of what nobody will get: a device is let go.
    pub(crate) fn cancel_scrubs(&self, device: &str) {
        let open = self.devices.get(device);
        if let Some(scrubber) = open.and_then(|open| open.scrubber.as_ref()) {
            scrubber.cancel();
        }
    }

    /// Carries out an action, and gives its answer.
    fn carry_out(
        &mut self,
        action: Action,
        lists: &mut BTreeSet<Arc<str>>,
    ) -> io::Result<Option<Event>> {
        (self.before_action)();
        if reaches_the_kernel(&action) {
            // Records of actions in a row are written in one go.
            self.store.flush()?;
        }
        match action {
            Action::Append(record) => self.store.add(&record),
            Action::Compact(records) => self.store.compact(&records)?,
            Action::Scrub {
                lease,
                device,
                bar,
                ranges,
                pattern,
            } => {
                let job = Job {
                    lease,
                    bar,
                    ranges,
                    pattern,
                };
                return Ok(match self.begin_scrub(&device, job) {
                    true => None,
                    false => Some(Event::Scrubbed {
                        lease,
                        result: Err(ENODEV),
                    }),
                });
            }
            Action::Export(export) => {
                let lease = export.lease;
                let exported = match self.device(&export.device) {
                    Some(device) => device.export(&export),
                    None => Err(ENODEV),
                };
                let result = exported.map(|(buffer, fd)| {
                    self.exported.insert(lease, fd);
                    buffer
                });
                return Ok(Some(Event::Exported { lease, result }));
            }
            Action::Revoke { device, buffer } => {
                let answer = match self.device(&device) {
                    Some(device) => device.revoke(buffer),
                    None => RevokeAnswer::Unknown,
                };
                return Ok(Some(Event::Revoked { buffer, answer }));
            }
            Action::List(device) => {
                lists.insert(device);
            }
            Action::Reply { request, reply } => {
                let fd = match &reply {
                    Reply::Granted(grant) => self.exported.remove(&grant.lease),
                    _ => None,
                };
                self.effects.push_back(Effect::Answer {
                    request,
                    answer: Ok(reply),
                    fd,
                });
            }
            Action::Refuse { request, refusal } => self.effects.push_back(Effect::Answer {
                request,
                answer: Err(refusal),
                fd: None,
            }),
            Action::Notify {
                watch,
                lease,
                news,
                about,
            } => self.effects.push_back(Effect::Notice {
                watch,
                lease,
                news,
                about,
            }),
            Action::WatchProcess(process) => {
                self.effects.push_back(Effect::WatchProcess(process));
            }
            Action::UnwatchProcess(process) => {
                self.effects.push_back(Effect::UnwatchProcess(process));
            }
            Action::WatchCgroup(cgroup, path) => {
                self.effects.push_back(Effect::WatchCgroup(cgroup, path));
            }
            Action::UnwatchCgroup(cgroup) => {
                self.effects.push_back(Effect::UnwatchCgroup(cgroup));
            }
            Action::CloseDevice(name) => {
                let open = self.devices.remove(&name).map(Box::new);
                self.effects.push_back(Effect::Close(name, open));
            }
            Action::SetTimer(time) => self.timer = time,
        }
        Ok(None)
    }
}
