//! From a request to a lease.

use std::sync::Arc;

use super::Action;
use super::Bug;
use super::Core;
use super::Due;
use super::Errno;
use super::Export;
use super::Grant;
use super::HeldBy;
use super::Lease;
use super::Limit;
use super::News;
use super::Presence;
use super::Refusal;
use super::Reply;
use super::Session;
use super::State;
use super::lease::Links;
use super::pool::Kept;
use super::pool::Waiter;
use super::pool::Wanted;
use crate::policy::Limits;
use crate::policy::Pool;
use crate::policy::Question;
use crate::policy::Scrub;
use crate::policy::Subject;
use crate::policy::Terms;
use crate::record::Holder;
use crate::record::Intent;
use crate::record::Record;
use crate::types::Access;
use crate::types::Ask;
use crate::types::BufferId;
use crate::types::ConnectionId;
use crate::types::EndReason;
use crate::types::LeaseId;
use crate::types::Lifetime;
use crate::types::MAX_RANGES;
use crate::types::Millis;
use crate::types::Peer;
use crate::types::Range;
use crate::types::Ranges;
use crate::types::RequestId;
use crate::types::Time;
use crate::types::What;

/// Most holders that a refusal names, and most ranges that are looked at to find them.
const MAX_NAMED: (usize, usize) = (8, 4096);

/// A request that may be granted as soon as there is room.
pub(super) struct Admitted {
    pub(super) pool: u32,
    pub(super) wanted: Wanted,
    pub(super) terms: Terms,
}

impl Core {
    pub(super) fn connect(
        &mut self,
        connection: ConnectionId,
        peer: Peer,
        token: u128,
        administrator: bool,
    ) {
        self.last_holder += 1;
        let holder = Arc::new(Holder {
            id: self.last_holder,
            peer,
            token,
        });
        let session = Session {
            holder,
            recorded: false,
            resumed: Vec::new(),
            waiting: 0,
            administrator,
        };
        self.sessions.insert(connection, session);
    }

    pub(super) fn acquire(&mut self, connection: ConnectionId, request: RequestId, ask: Ask) {
        let Some(session) = self.sessions.get(&connection) else {
            return self.refuse(request, Refusal::NotConnected);
        };
        let holder = session.holder.clone();
        let peer = &holder.peer;
        let admitted = self.admit(peer, &ask);
        let admitted = match admitted {
            Ok(admitted) => admitted,
            Err(refusal) => return self.refuse(request, refusal),
        };
        if let Err(refusal) = self.room_for_a_lease(connection) {
            return self.refuse(request, refusal);
        }
        if let Some(mut kept) = self.behind(admitted.pool) {
            if let Some(ranges) = self.claim(&admitted, ask.access, &mut kept) {
                return self.reserve(connection, request, &ask, &admitted, ranges);
            }
        }
        let patience = ask.wait.min(admitted.terms.wait);
        if patience == Millis(0) {
            let busy = self.busy(&admitted, &ask, false);
            return self.refuse(request, busy);
        }
        let deadline = self.now.after(patience);
        let waiter = Waiter {
            connection,
            request,
            share: admitted.terms.share(peer),
            owner: peer.owner(),
            ask,
            deadline,
            aside: None,
        };
        if let Err(refusal) = self.room_in_line(admitted.pool, &waiter) {
            return self.refuse(request, refusal);
        }
        if let Some(session) = self.sessions.get_mut(&connection) {
            session.waiting += 1;
        }
        self.pools[admitted.pool as usize].queue.push_back(waiter);
        self.arm(Some(deadline), Due::Waiter(admitted.pool, request));
    }

    /// Whether it may be granted, whatever others have.
    pub(super) fn admit(&self, peer: &Peer, ask: &Ask) -> Result<Admitted, Refusal> {
        let (place, pool) = self.find_pool(&ask.what)?;
        // The policy comes first: a refusal tells nothing of what one may not have.
        let question = Question {
            peer,
            pool: place,
            access: ask.access,
            lifetime: ask.lifetime,
            steering_tags: ask.tph.is_some(),
        };
        let name = || pool.name.clone();
        let terms = self
            .policy
            .decide(&question)
            .ok_or_else(|| Refusal::NotAllowed { pool: name() })?;
        if ask.access == Access::ReadWrite && !pool.writable {
            return Err(Refusal::NotOffered {
                pool: name(),
                what: "for writing",
            });
        }
        if !pool.memory_types.contains(&ask.memory_type) {
            return Err(Refusal::NotOffered {
                pool: name(),
                what: "with this memory type",
            });
        }
        if ask.tph.is_some_and(|tph| tph.hint > 3) {
            return Err(Refusal::Invalid("a processing hint is 0 to 3"));
        }
        if ask.ttl == Some(Millis(0)) {
            return Err(Refusal::Invalid("a lease that expires at once is none"));
        }
        let known = match ask.lifetime {
            Lifetime::Process => peer.process.is_some(),
            Lifetime::Cgroup => peer.cgroup.is_some(),
            Lifetime::Claim => peer.claim.is_some(),
            Lifetime::Connection | Lifetime::Holders => true,
        };
        if !known {
            return Err(Refusal::NoIdentity(ask.lifetime));
        }
        let no_device = || Refusal::NoDevice(pool.device.clone());
        let (_, device) = self.device(&pool.device).ok_or_else(no_device)?;
        match device.presence {
            Presence::Open => {}
            Presence::Absent => return Err(no_device()),
            Presence::Going | Presence::Closing => {
                return Err(Refusal::DeviceGoing(pool.device.clone()));
            }
        }
        let entry = self.pools.iter().position(|state| state.name == pool.name);
        let entry = entry.ok_or_else(|| Refusal::NoPool(name()))?;
        // The BAR is shorter than the policy says.
        let map = self.pools[entry]
            .map
            .as_ref()
            .ok_or_else(|| Refusal::TooLarge {
                pool: name(),
                bytes: 0,
            })?;
        let not_units = || Refusal::NotUnits {
            pool: name(),
            unit: map.unit(),
        };
        let wanted = map.wanted(&ask.what).ok_or_else(not_units)?;
        let too_large = || Refusal::TooLarge {
            pool: name(),
            bytes: map.bytes(),
        };
        if !map.can_ever(&wanted) {
            return Err(too_large());
        }
        let units = match &wanted {
            Wanted::Units(count) => *count,
            Wanted::Named(runs) => runs.iter().map(|run| run.count).sum(),
        };
        let bytes = units.checked_mul(map.unit()).ok_or_else(too_large)?;
        let pool = u32::try_from(entry).unwrap_or(u32::MAX);
        self.within_limits(peer, pool, bytes, &terms)?;
        Ok(Admitted {
            pool,
            wanted,
            terms,
        })
    }

    pub(super) fn find_pool(&self, what: &What) -> Result<(usize, &Pool), Refusal> {
        let (device, bar, ranges) = match what {
            What::Pool { pool, .. } => {
                let place = self.policy.pool_named(pool);
                let found = place.and_then(|place| Some((place, self.policy.pools().get(place)?)));
                return found.ok_or_else(|| Refusal::NoPool(pool.clone()));
            }
            What::Ranges {
                device,
                bar,
                ranges,
            } => (device, *bar, ranges),
        };
        if ranges.is_empty() || ranges.len() > MAX_RANGES {
            return Err(Refusal::Invalid("a lease has 1 to 65536 ranges"));
        }
        let mut sorted = ranges.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
            return Err(Refusal::Invalid("the ranges overlap each other"));
        }
        if ranges
            .iter()
            .any(|range| range.length == 0 || range.end() == u64::MAX)
        {
            return Err(Refusal::Invalid(
                "a range is empty, or past the end of any BAR",
            ));
        }
        let there = self.device(device).map(|(_, device)| device.presence);
        if matches!(there, None | Some(Presence::Absent)) {
            return Err(Refusal::NoDevice(device.clone()));
        }
        let has = |pool: &&(usize, &Pool)| {
            let entry = self.pools.iter().find(|state| state.place == Some(pool.0));
            let map = entry.and_then(|state| state.map.as_ref());
            let all = |map: &super::Map| ranges.iter().all(|range| map.contains(range));
            pool.1.device == *device && pool.1.bar == bar && map.is_some_and(all)
        };
        let pools: Vec<_> = self.policy.pools().iter().enumerate().collect();
        let outside = || Refusal::OutsidePools {
            device: device.clone(),
            bar,
        };
        pools.iter().find(has).copied().ok_or_else(outside)
    }

    fn within_limits(
        &self,
        peer: &Peer,
        pool: u32,
        bytes: u64,
        terms: &Terms,
    ) -> Result<(), Refusal> {
        for subject in peer.subjects() {
            let limits: &[&Limits] = match subject {
                Subject::User(_) => &[&terms.user],
                Subject::Unit(_) => &[&terms.unit],
                // It counts as nothing else, so all of them are for it.
                Subject::Claim(_) => &[&terms.claim, &terms.unit, &terms.user],
            };
            let usage = self
                .usage
                .get(&(pool, subject))
                .copied()
                .unwrap_or_default();
            let refuse = |rule: u32, limit, have| {
                let place = self.policy.place_of(rule).cloned();
                let place = place.unwrap_or_else(|| crate::policy::Place {
                    file: "".into(),
                    line: 0,
                });
                Err(Refusal::Limit { place, limit, have })
            };
            for limits in limits {
                if let Some((most, rule)) = limits.leases {
                    if usage.leases >= most {
                        return refuse(rule, Limit::Leases(most), usage.leases.into());
                    }
                }
                if let Some((most, rule)) = limits.bytes {
                    if usage.bytes.saturating_add(bytes) > most {
                        return refuse(rule, Limit::Bytes(most), usage.bytes);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes room for it, if there is some now that is not kept.
    pub(super) fn claim(
        &mut self,
        admitted: &Admitted,
        access: Access,
        kept: &mut Kept,
    ) -> Option<Ranges> {
        if self.is_blocked(admitted.pool) {
            return None;
        }
        let pool = self.pools.get_mut(admitted.pool as usize)?;
        Ranges::from_list(pool.map.as_mut()?.claim(&admitted.wanted, access, kept)?)
    }

    /// Whether it could be had now, by the last in line.
    pub(super) fn could_claim(&self, admitted: &Admitted, access: Access) -> bool {
        let map = self.pools.get(admitted.pool as usize);
        let map = map.and_then(|pool| pool.map.clone());
        let (Some(mut map), Some(mut kept)) = (map, self.behind(admitted.pool)) else {
            return false;
        };
        let room = map.claim(&admitted.wanted, access, &mut kept).is_some();
        room && !self.is_blocked(admitted.pool)
    }

    /// Whether a buffer that nobody knows may be anywhere in the BAR of the pool.
    pub(super) fn is_blocked(&self, pool: u32) -> bool {
        let place = self.pools.get(pool as usize).and_then(|pool| pool.place);
        let Some(pool) = place.and_then(|place| self.policy.pools().get(place)) else {
            return true;
        };
        let Some((_, device)) = self.device(&pool.device) else {
            return true;
        };
        let mut strays = device.strays.values();
        strays.any(|stray| stray.bar == pool.bar && !stray.explained)
    }

    /// The room is taken: makes the lease, and begins to export it.
    pub(super) fn reserve(
        &mut self,
        connection: ConnectionId,
        request: RequestId,
        ask: &Ask,
        admitted: &Admitted,
        ranges: Ranges,
    ) {
        let place = self.pools[admitted.pool as usize].place.unwrap_or_default();
        let policy = self.policy.clone();
        let (Some(written), Some(session)) = (
            policy.pools().get(place),
            self.sessions.get_mut(&connection),
        ) else {
            return;
        };
        let holder = session.holder.clone();
        if !std::mem::replace(&mut session.recorded, true) {
            self.append(Record::Holder(holder.clone()));
        }
        self.last_lease.0 += 1;
        let terms = &admitted.terms;
        let ttl = match (ask.ttl, terms.max_ttl) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        let state = match written.scrub {
            Scrub::None => State::Exporting { request },
            Scrub::Pattern(_) => State::Scrubbing { request },
        };
        let lease = Lease {
            id: self.last_lease,
            holder,
            ranges,
            state,
            since: self.now,
            expires: ttl.map_or(Time::NEVER, |ttl| self.now.after(ttl)),
            grace: terms.grace,
            tph: ask.tph,
            pool: admitted.pool,
            device: self.device_named(&written.device),
            bar: written.bar,
            access: ask.access,
            memory_type: ask.memory_type,
            lifetime: ask.lifetime,
            links: Links::default(),
        };
        let intent = Record::Intent(Box::new(self.intent(&lease)));
        self.append(intent);
        let (id, bar, ranges) = (lease.id, lease.bar, lease.ranges.clone());
        let slot = self.insert(lease);
        match written.scrub {
            Scrub::None => self.export(slot),
            Scrub::Pattern(pattern) => self.out.push(Action::Scrub {
                lease: id,
                device: written.device.clone(),
                bar,
                ranges,
                pattern,
            }),
        }
    }

    /// The record that a lease is about to be, or was.
    pub(super) fn intent(&self, lease: &Lease) -> Intent {
        let name = |name: Option<&Arc<str>>| name.cloned().unwrap_or_else(|| "".into());
        let device = self.devices.get(usize::from(lease.device));
        Intent {
            lease: lease.id,
            holder: lease.holder.id,
            pool: name(self.pools.get(lease.pool as usize).map(|pool| &pool.name)),
            device: name(device.map(|device| &device.name)),
            bar: lease.bar,
            ranges: lease.ranges.clone(),
            access: lease.access,
            memory_type: lease.memory_type,
            tph: lease.tph,
            lifetime: lease.lifetime,
            since: lease.since,
            expires: lease.expires,
            grace: lease.grace,
        }
    }

    fn export(&mut self, slot: u32) {
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let Some(device) = self.devices.get(usize::from(lease.device)) else {
            return;
        };
        self.out.push(Action::Export(Box::new(Export {
            lease: lease.id,
            device: device.name.clone(),
            bar: lease.bar,
            ranges: lease.ranges.clone(),
            access: lease.access,
            memory_type: lease.memory_type,
            tph: lease.tph,
        })));
    }

    pub(super) fn scrubbed(&mut self, id: LeaseId, result: Result<(), Errno>) {
        let Some(slot) = self.leases.slot(id) else {
            return;
        };
        let Some((state, expires)) = self
            .leases
            .get(slot)
            .map(|lease| (lease.state, lease.expires))
        else {
            return;
        };
        match (state, result) {
            (State::Scrubbing { request }, Ok(())) => {
                self.change(slot, State::Exporting { request }, expires);
                self.export(slot);
            }
            (State::Scrubbing { request }, Err(errno)) => {
                self.refuse(request, Refusal::Scrub(errno));
                self.end(slot, EndReason::NeverGranted);
            }
            (State::Cancelled { reason }, _) => self.end(slot, reason),
            _ => {}
        }
    }

    pub(super) fn exported(&mut self, id: LeaseId, result: Result<BufferId, Errno>) {
        let Some(slot) = self.leases.slot(id) else {
            return;
        };
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let (state, expires) = (lease.state, lease.expires);
        match (state, result) {
            (State::Exporting { request }, Ok(buffer)) => {
                let early = self.has(Bug::AnswerBeforeRecord);
                if !early {
                    self.append(Record::Granted { lease: id, buffer });
                }
                let granted = State::Granted {
                    buffer,
                    reasons: 0,
                    resume_by: Time::NEVER,
                };
                self.change(slot, granted, expires);
                self.tell(slot, News::Granted);
                if let Some(grant) = self.grant(slot, buffer) {
                    self.reply(request, Reply::Granted(Box::new(grant)));
                }
                if early {
                    self.append(Record::Granted { lease: id, buffer });
                }
            }
            (State::Exporting { request }, Err(errno)) => {
                self.refuse(request, Refusal::Export(errno));
                self.end(slot, EndReason::NeverGranted);
            }
            (State::Cancelled { reason }, Ok(buffer)) => {
                self.append(Record::Granted { lease: id, buffer });
                let granted = State::Granted {
                    buffer,
                    reasons: 0,
                    resume_by: Time::NEVER,
                };
                self.change(slot, granted, expires);
                self.begin_end(slot, reason, Millis(0));
            }
            (State::Cancelled { reason }, Err(_)) => self.end(slot, reason),
            _ => {}
        }
    }

    fn grant(&self, slot: u32, buffer: BufferId) -> Option<Grant> {
        let lease = self.leases.get(slot)?;
        Some(Grant {
            lease: lease.id,
            buffer,
            device: self.devices.get(usize::from(lease.device))?.name.clone(),
            bar: lease.bar,
            ranges: lease.ranges.clone(),
            access: lease.access,
            memory_type: lease.memory_type,
            expires: lease.expires,
            grace: lease.grace,
        })
    }

    /// The refusal that names the holders of the bytes that were asked for.
    pub(super) fn busy(&self, admitted: &Admitted, ask: &Ask, timed_out: bool) -> Refusal {
        let whole = [Range {
            offset: 0,
            length: u64::MAX,
        }];
        let ranges = match &ask.what {
            What::Pool { .. } => &whole[..],
            What::Ranges { ranges, .. } => ranges,
        };
        let mut holders: Vec<HeldBy> = Vec::new();
        let pool = &self.pools[admitted.pool as usize];
        let mut looks = 0;
        'ranges: for range in ranges {
            // From the end of the range backwards: the first that begins before it may reach into
            // it.
            for (offset, slot) in pool.placed.range(..(range.end(), 0)).rev() {
                looks += 1;
                if looks > MAX_NAMED.1 || holders.len() == MAX_NAMED.0 {
                    break 'ranges;
                }
                let Some(lease) = self.leases.get(*slot) else {
                    continue;
                };
                let known = holders.iter().any(|held| held.lease == lease.id);
                if !known && super::overlap(lease.ranges.as_slice(), range) {
                    holders.push(held_by(lease));
                } else if *offset < range.offset && !known && pool.is_exclusive(&self.policy) {
                    break;
                }
            }
        }
        Refusal::Busy {
            holders,
            waiting: pool.queue.len(),
            timed_out,
        }
    }
}

fn held_by(lease: &Lease) -> HeldBy {
    HeldBy {
        lease: lease.id,
        peer: lease.holder.peer.clone(),
        range: lease.ranges.as_slice().first().copied().unwrap_or(Range {
            offset: 0,
            length: 0,
        }),
        bytes: lease.ranges.size(),
        since: lease.since,
        expires: lease.expires,
        revoked: matches!(lease.state, State::Revoking { .. }),
    }
}
