//! The machine: an event and the time go in, actions come out.

mod api;
mod end;
mod grant;
mod lease;
mod line;
mod look;
mod pool;
mod recover;
mod watch;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

pub use self::api::*;
use self::lease::Anchor;
use self::lease::Lease;
use self::lease::Leases;
use self::lease::Slot;
pub use self::lease::State;
use self::pool::Map;
use self::pool::PoolState;
use self::pool::Waiter;
pub use self::recover::Found;
use self::watch::Watchers;
use crate::policy::Policy;
use crate::policy::Subject;
use crate::record::Holder;
use crate::record::Record;
use crate::types::BufferId;
use crate::types::ConnectionId;
use crate::types::EndReason;
use crate::types::LeaseId;
use crate::types::Millis;
use crate::types::Range;
use crate::types::RequestId;
use crate::types::Time;

/// A device that the service has, had, or knows leases of.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
struct DeviceState {
    name: Arc<str>,
    facts: Facts,
    presence: Presence,
    /// Buffers of it that are no lease of ours, and are not known to be gone.
    strays: BTreeMap<BufferId, Stray>,
    /// How many leases there are of it.
    leases: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
enum Presence {
    /// Not open.
    Absent,
    /// Open, and leased from.
    Open,
    /// Open, and let go as soon as its leases are gone.
    Going,
    /// [`Action::CloseDevice`] was given.
    Closing,
}

/// A buffer that nobody knows. LIST does not say where it is in its BAR.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
struct Stray {
    bar: u8,
    size: u64,
    nr_ranges: u32,
    /// Whether it is that of a lease whose export was cut short. If not, nothing is granted of the
    /// BAR.
    explained: bool,
}

/// A connection.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
struct Session {
    holder: Arc<Holder>,
    /// Whether the ledger has the holder.
    recorded: bool,
    /// Holders of before a restart, as whom the client came back.
    resumed: Vec<Arc<Holder>>,
    /// How often it waits in line.
    waiting: u32,
    administrator: bool,
}

/// The leases of a subject in a pool.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
struct Usage {
    leases: u32,
    bytes: u64,
}

/// The object of a timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Due {
    Lease(Slot),
    Waiter(u32, RequestId),
    /// A revocation that has not ended by now hangs.
    Hangs(Slot),
}

/// The core.
///
/// # Invariants
///
/// - A byte of an exclusive pool is in one lease at most, and no lease is without a record.
/// - A lease leaves `leases` only when the kernel has no living or draining buffer of it: its
///   revocation has drained, its buffer is gone, or its device was closed.
/// - `timers` has exactly the time at which each lease is due, if it ever is, the end of the
///   patience of each waiter, and when a revocation that has not ended at once is taken to hang.
/// - `usage` is the sum over `leases`.
/// - `dirty` is empty between two events: whoever is in line cannot be served, by the rule at the
///   top of the crate.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub struct Core {
    now: Time,
    policy: Arc<Policy>,
    devices: Vec<DeviceState>,
    pools: Vec<PoolState>,
    leases: Leases,
    sessions: BTreeMap<ConnectionId, Session>,
    /// Holders whose connections a restart has ended, by secret.
    orphans: BTreeMap<u128, Arc<Holder>>,
    usage: BTreeMap<(u32, Subject), Usage>,
    timers: BTreeSet<(Time, Due)>,
    armed: Option<Time>,
    watchers: Watchers,
    dirty: BTreeSet<u32>,
    last_lease: LeaseId,
    last_holder: u64,
    /// Records since the ledger was compacted.
    records: usize,
    out: Vec<Action>,
    #[cfg(test)]
    bug: Option<Bug>,
    /// Whether a few records are enough to compact them.
    #[cfg(test)]
    compacts_often: bool,
}

/// Mistakes that the checker of every order must find (`world.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(dead_code, reason = "made by tests only")]
pub(crate) enum Bug {
    /// A range is free as soon as it is revoked, drained or not.
    FreeBeforeDrained,
    /// The answer comes before the record of the grant.
    AnswerBeforeRecord,
    /// A buffer without a record is left alone.
    KeepStrays,
    /// A range whose export was cut short is free, whatever the kernel has.
    ForgetHeld,
    /// Nobody has to come back after a restart.
    OrphansForEver,
    /// A lease that the kernel has no more stays.
    KeepGone,
    /// Leases of before a restart take no room.
    EmptyMap,
    /// The end of a connection ends nothing.
    ForgetPeer,
    /// A holder whose record was compacted away is taken for one that has a record.
    StaysRecorded,
    /// Nothing ends the old records in the file before the new ones are written behind them.
    NoGap,
    /// A request whose own leases are in its way stops all behind it.
    NeverAside,
    /// A request that does not fit stops nobody behind it.
    Overtakes,
}

/// Most records between two compactions, for each lease and on top.
const RECORDS: (usize, usize) = (4, 4096);

impl Core {
    /// A service without devices.
    #[must_use]
    pub fn new(policy: Arc<Policy>, now: Time) -> Self {
        let mut core = Self {
            now,
            policy,
            devices: Vec::new(),
            pools: Vec::new(),
            leases: Leases::default(),
            sessions: BTreeMap::new(),
            orphans: BTreeMap::new(),
            usage: BTreeMap::new(),
            timers: BTreeSet::new(),
            armed: None,
            watchers: Watchers::default(),
            dirty: BTreeSet::new(),
            last_lease: LeaseId(0),
            last_holder: 0,
            records: 0,
            out: Vec::new(),
            #[cfg(test)]
            bug: None,
            #[cfg(test)]
            compacts_often: false,
        };
        core.place_pools();
        core.settle();
        core
    }

    /// Says what to do about an event. A time before that of an earlier event counts as that one.
    pub fn handle(&mut self, now: Time, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        self.fire();
        self.dispatch(event);
        self.settle();
        std::mem::take(&mut self.out)
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Connected {
                connection,
                peer,
                token,
                administrator,
            } => self.connect(connection, peer, token, administrator),
            Event::Resume {
                connection,
                request,
                token,
            } => self.resume(connection, request, token),
            Event::PeerGone(connection) => self.disconnect(connection),
            Event::ProcessGone(process) => self.anchor_gone(&Anchor::Process(process)),
            Event::CgroupEmpty(cgroup) => self.anchor_gone(&Anchor::Cgroup(cgroup)),
            Event::ClaimEnded(claim) => self.anchor_gone(&Anchor::Claim(claim)),
            Event::Acquire {
                connection,
                request,
                ask,
            } => self.acquire(connection, request, ask),
            Event::Release {
                connection,
                request,
                lease,
            } => {
                self.give_back(connection, request, lease);
            }
            Event::Renew {
                connection,
                request,
                lease,
                ttl,
            } => {
                self.renew(connection, request, lease, ttl);
            }
            Event::Watch {
                connection,
                request,
                all,
            } => self.watch(connection, request, all),
            Event::Scrubbed { lease, result } => self.scrubbed(lease, result),
            Event::Exported { lease, result } => self.exported(lease, result),
            Event::Undelivered(lease) => {
                if let Some(slot) = self.leases.slot(lease) {
                    self.begin_end(slot, EndReason::Undelivered, Millis(0));
                }
            }
            Event::Revoked { buffer, answer } => self.revoked(buffer, answer),
            Event::Listed { device, buffers } => self.listed(&device, &buffers),
            Event::DeviceOpened { device, facts } => self.open(&device, facts),
            Event::DeviceGoing { device, grace } => self.let_go(&device, grace),
            Event::DeviceClosed(device) => self.closed(&device),
            Event::Revoke {
                request,
                selector,
                grace,
            } => self.revoke_all(request, &selector, grace),
            Event::PolicyReplaced(policy) => self.replace_policy(policy),
            Event::Tick => {}
        }
    }

    /// Does what is due.
    fn fire(&mut self) {
        while let Some((time, due)) = self.timers.first().copied() {
            if time > self.now {
                return;
            }
            match due {
                Due::Lease(slot) => self.lease_due(slot),
                Due::Waiter(pool, request) => self.time_out(pool, request),
                Due::Hangs(slot) => self.hangs(slot),
            }
            // The call above has put the timer somewhere else; nothing is due for ever.
            self.timers.remove(&(time, due));
        }
    }

    /// Serves whoever waits, closes what is to be closed, and says when to be woken.
    fn settle(&mut self) {
        while let Some(pool) = self.dirty.pop_first() {
            if self.pools.get(pool as usize).is_some_and(|pool| pool.stale) {
                self.make_map(pool as usize);
            }
            self.serve(pool);
        }
        self.close_devices();
        let next = self.timers.first().map(|(time, _)| *time);
        if next != self.armed {
            self.armed = next;
            self.out.push(Action::SetTimer(next));
        }
        if self.records > self.most_records() {
            self.records = 0;
            let records = self.snapshot();
            self.forget_holders(&records);
            self.out.push(Action::Compact(records));
        }
    }

    /// Holders that have no lease now are not in the ledger any more: their next lease says them
    /// again.
    fn forget_holders(&mut self, records: &[Record]) {
        let holder = |record: &Record| match record {
            Record::Holder(holder) => Some(holder.id),
            _ => None,
        };
        let holders: BTreeSet<_> = records.iter().filter_map(holder).collect();
        let all = self.has(Bug::StaysRecorded);
        for session in self.sessions.values_mut() {
            session.recorded &= all || holders.contains(&session.holder.id);
        }
    }

    fn most_records(&self) -> usize {
        #[cfg(test)]
        if self.compacts_often {
            return 2 + RECORDS.0 * self.leases.len();
        }
        RECORDS.0 * self.leases.len() + RECORDS.1
    }

    fn append(&mut self, record: Record) {
        self.records += 1;
        self.out.push(Action::Append(record));
    }

    /// Changes a lease, and its timer with it.
    fn change(&mut self, slot: Slot, state: State, expires: Time) {
        let before = self.leases.get(slot).map(Lease::due);
        self.leases.change(slot, state, expires);
        let after = self.leases.get(slot).map(Lease::due);
        if before != after {
            self.disarm(before, Due::Lease(slot));
            self.arm(after, Due::Lease(slot));
        }
    }

    fn arm(&mut self, time: Option<Time>, due: Due) {
        if let Some(time) = time.filter(|time| *time != Time::NEVER) {
            self.timers.insert((time, due));
        }
    }

    fn disarm(&mut self, time: Option<Time>, due: Due) {
        if let Some(time) = time {
            self.timers.remove(&(time, due));
        }
    }

    /// The device of that name, which is made if need be.
    fn device_named(&mut self, name: &Arc<str>) -> u16 {
        let known = self.devices.iter().position(|device| device.name == *name);
        let place = known.unwrap_or_else(|| {
            self.devices.push(DeviceState {
                name: name.clone(),
                facts: Facts::default(),
                presence: Presence::Absent,
                strays: BTreeMap::new(),
                leases: 0,
            });
            self.devices.len() - 1
        });
        u16::try_from(place).unwrap_or(u16::MAX)
    }

    fn device(&self, name: &str) -> Option<(u16, &DeviceState)> {
        (0..)
            .zip(&self.devices)
            .find(|(_, device)| &*device.name == name)
    }

    /// The pool of that name, which is made if need be.
    fn pool_entry(&mut self, name: &Arc<str>) -> u32 {
        let known = self.pools.iter().position(|pool| pool.name == *name);
        let place = known.unwrap_or_else(|| {
            self.pools.push(PoolState::new(name.clone()));
            self.pools.len() - 1
        });
        u32::try_from(place).unwrap_or(u32::MAX)
    }

    /// Makes the pools those of the policy.
    fn place_pools(&mut self) {
        for pool in &mut self.pools {
            pool.place = None;
        }
        let policy = self.policy.clone();
        for (place, pool) in policy.pools().iter().enumerate() {
            self.device_named(&pool.device);
            let entry = self.pool_entry(&pool.name);
            self.pools[entry as usize].place = Some(place);
        }
        for (number, pool) in (0..).zip(&mut self.pools) {
            pool.stale = true;
            self.dirty.insert(number);
        }
    }

    /// Makes the map of a pool from the leases that there are.
    fn make_map(&mut self, pool: usize) {
        let Some(state) = self.pools.get(pool) else {
            return;
        };
        let written = state.place.and_then(|place| self.policy.pools().get(place));
        let mut map = None;
        let mut loose = false;
        if let Some(written) = written {
            let open = self
                .device(&written.device)
                .filter(|(_, device)| device.presence != Presence::Absent);
            map = open.and_then(|(_, device)| {
                let bar = device.facts.bars.get(usize::from(written.bar))?;
                Map::new(written, *bar, &device.facts.reserved)
            });
            if let (Some(map), Some((number, _))) = (&mut map, open) {
                for (_, lease) in self.leases.iter() {
                    let here = lease.device == number && lease.bar == written.bar;
                    if here && !self.has(Bug::EmptyMap) {
                        let ours = lease.pool as usize == pool;
                        for range in lease.ranges.as_slice() {
                            loose |= !map.restore(range, lease.access, ours);
                        }
                    }
                }
            }
        }
        let state = &mut self.pools[pool];
        state.map = map;
        state.loose = loose;
        state.stale = false;
        state.afresh = true;
        state.look_for_room();
    }

    /// Gives the ranges of a lease that is gone back to the maps.
    fn free_ranges(&mut self, lease: &Lease) {
        for (number, pool) in (0..).zip(&mut self.pools) {
            let ours = lease.pool == number;
            if pool.loose {
                // Until it is made anew it has too much in use, never too little.
                pool.stale = true;
                self.dirty.insert(number);
            } else if let (true, Some(map)) = (ours, &mut pool.map) {
                for range in lease.ranges.as_slice() {
                    map.release(range, lease.access);
                }
            }
        }
        self.dirty.insert(lease.pool);
    }

    fn open(&mut self, name: &Arc<str>, facts: Facts) {
        let number = self.device_named(name);
        if let Some(device) = self.devices.get_mut(usize::from(number)) {
            device.facts = facts;
            device.presence = Presence::Open;
        }
        self.remake_maps(name);
    }

    fn remake_maps(&mut self, device: &str) {
        for pool in 0..self.pools.len() {
            let place = self.pools[pool].place;
            let of = place.and_then(|place| self.policy.pools().get(place));
            if of.is_some_and(|of| &*of.device == device) {
                self.make_map(pool);
                self.dirty.extend(u32::try_from(pool).ok());
            }
        }
    }

    fn replace_policy(&mut self, policy: Arc<Policy>) {
        self.policy = policy;
        self.place_pools();
        if self.policy.revokes() {
            self.revoke_what_is_no_longer_allowed();
        }
    }

    fn refuse(&mut self, request: RequestId, refusal: Refusal) {
        let refusal = Box::new(refusal);
        self.out.push(Action::Refuse { request, refusal });
    }

    fn reply(&mut self, request: RequestId, reply: Reply) {
        self.out.push(Action::Reply { request, reply });
    }

    /// Adds a lease to the sums of its subjects, or takes it out of them.
    fn count(&mut self, lease: &Lease, more: bool) {
        if let Some(pool) = self.pools.get_mut(lease.pool as usize) {
            if !pool.queue.is_empty() {
                let owner = lease.holder.peer.owner();
                let own = |waiter: &&mut Waiter| waiter.owner == owner;
                pool.queue.iter_mut().filter(own).for_each(|waiter| {
                    waiter.aside = None;
                });
            }
        }
        let bytes = lease.ranges.size();
        for subject in lease.holder.peer.subjects() {
            let key = (lease.pool, subject);
            let usage = self.usage.entry(key.clone()).or_default();
            if more {
                usage.leases += 1;
                usage.bytes = usage.bytes.saturating_add(bytes);
            } else {
                usage.leases = usage.leases.saturating_sub(1);
                usage.bytes = usage.bytes.saturating_sub(bytes);
                if usage.leases == 0 {
                    self.usage.remove(&key);
                }
            }
        }
    }

    /// Puts a lease in its place, without a look at what is free.
    fn insert(&mut self, lease: Lease) -> Slot {
        self.count(&lease, true);
        let anchor = lease.anchor();
        let path = lease.holder.peer.cgroup_path.clone();
        let pool = lease.pool;
        let due = lease.due();
        let offsets: Vec<u64> = lease
            .ranges
            .as_slice()
            .iter()
            .map(|range| range.offset)
            .collect();
        if let Some(device) = self.devices.get_mut(usize::from(lease.device)) {
            device.leases += 1;
        }
        let (slot, first) = self.leases.insert(lease);
        if let Some(pool) = self.pools.get_mut(pool as usize) {
            pool.placed
                .extend(offsets.iter().map(|offset| (*offset, slot)));
        }
        self.arm(Some(due), Due::Lease(slot));
        match anchor {
            Some(Anchor::Process(process)) if first => {
                self.out.push(Action::WatchProcess(process));
            }
            Some(Anchor::Cgroup(cgroup)) if first => {
                self.out.push(Action::WatchCgroup(cgroup, path));
            }
            _ => {}
        }
        slot
    }

    #[cfg(test)]
    pub(crate) fn plant(&mut self, bug: Option<Bug>) {
        self.bug = bug;
    }

    #[cfg(test)]
    pub(crate) fn compact_often(&mut self) {
        self.compacts_often = true;
    }

    #[cfg(test)]
    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, reason = "as with tests")]
    fn has(&self, _: Bug) -> bool {
        false
    }
}

/// Whether they share a byte with one of the ranges.
fn overlap(ranges: &[Range], one: &Range) -> bool {
    ranges.iter().any(|range| range.overlaps(one))
}

#[cfg(test)]
mod tests;
