//! From a lease to its end, and what the kernel says of it meanwhile.

use std::collections::BTreeMap;

use super::Action;
use super::Anchor;
use super::Buffer;
use super::Bug;
use super::Core;
use super::Due;
use super::Facts;
use super::Lease;
use super::News;
use super::Presence;
use super::Refusal;
use super::Reply;
use super::RevokeAnswer;
use super::Selector;
use super::Slot;
use super::State;
use super::Stray;
use super::line::HANGS;
use crate::policy::Question;
use crate::policy::Subject;
use crate::record::Record;
use crate::types::BufferId;
use crate::types::ConnectionId;
use crate::types::EndReason;
use crate::types::LeaseId;
use crate::types::Millis;
use crate::types::RequestId;
use crate::types::Time;

/// How long after a failure a revocation is tried again.
const RETRY: Millis = Millis(1000);

impl Core {
    /// Begins to take a lease back; after that much grace it is revoked. Nothing
    /// undoes that.
    pub(super) fn begin_end(&mut self, slot: Slot, reason: EndReason, grace: Millis) {
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let (id, expires) = (lease.id, lease.expires);
        match lease.state {
            State::Scrubbing { request } | State::Exporting { request } => {
                self.change(slot, State::Cancelled { reason }, expires);
                self.refuse(request, Refusal::Cancelled(reason));
            }
            State::Granted { buffer, .. } | State::Reclaiming { buffer, .. } => {
                if grace == Millis(0) {
                    return self.revoke(slot, buffer, reason);
                }
                let deadline = self.now.after(grace);
                if let State::Reclaiming {
                    deadline: earlier, ..
                } = lease.state
                {
                    if earlier <= deadline {
                        return;
                    }
                }
                self.append(Record::Reclaiming {
                    lease: id,
                    deadline,
                    reason,
                });
                self.change(
                    slot,
                    State::Reclaiming {
                        buffer,
                        deadline,
                        reason,
                    },
                    expires,
                );
                self.tell(slot, News::Reclaim { deadline, reason });
            }
            State::Cancelled { .. } | State::Revoking { .. } => {}
        }
    }

    fn revoke(&mut self, slot: Slot, buffer: BufferId, reason: EndReason) {
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let (id, expires) = (lease.id, lease.expires);
        let deadline = self.now;
        self.append(Record::Reclaiming {
            lease: id,
            deadline,
            reason,
        });
        self.change(slot, revoking(Some(buffer), reason, self.now), expires);
        self.revoke_again(slot);
        self.tell(slot, News::Revoked(reason));
    }

    fn revoke_again(&mut self, slot: Slot) {
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let device = self.devices.get(usize::from(lease.device));
        if let (Some(device), Some(buffer)) = (device, lease.state.buffer()) {
            let device = device.name.clone();
            self.out.push(Action::Revoke { device, buffer });
        }
    }

    /// The revocation of a lease has not ended at once.
    pub(super) fn may_hang(&mut self, slot: Slot) {
        let at = self.leases.get(slot).and_then(hangs_at);
        self.arm(at, Due::Hangs(slot));
    }

    /// Nothing reaches the lease any more: it is gone, and its ranges are free.
    pub(super) fn end(&mut self, slot: Slot, reason: EndReason) {
        self.tell(slot, News::Ended(reason));
        let due = self.leases.get(slot).map(Lease::due);
        self.disarm(due, Due::Lease(slot));
        self.disarm(self.leases.get(slot).and_then(hangs_at), Due::Hangs(slot));
        let Some((lease, last)) = self.leases.remove(slot) else {
            return;
        };
        self.append(Record::Ended { lease: lease.id });
        self.count(&lease, false);
        if let Some(pool) = self.pools.get_mut(lease.pool as usize) {
            for range in lease.ranges.as_slice() {
                pool.placed.remove(&(range.offset, slot));
            }
            if pool.hung.remove(&slot) {
                pool.look_for_room();
            }
        }
        if let Some(device) = self.devices.get_mut(usize::from(lease.device)) {
            device.leases = device.leases.saturating_sub(1);
        }
        self.free_ranges(&lease);
        match lease.anchor() {
            Some(Anchor::Process(process)) if last => {
                self.out.push(Action::UnwatchProcess(process));
            }
            Some(Anchor::Cgroup(cgroup)) if last => self.out.push(Action::UnwatchCgroup(cgroup)),
            _ => {}
        }
    }

    /// The time of a lease has come.
    pub(super) fn lease_due(&mut self, slot: Slot) {
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let (expires, token) = (lease.expires, lease.holder.token);
        match lease.state {
            State::Granted { buffer, .. } if expires <= self.now => {
                self.revoke(slot, buffer, EndReason::Expired);
            }
            State::Granted { buffer, .. } => {
                self.orphans.remove(&token);
                self.revoke(slot, buffer, EndReason::NotResumed);
            }
            State::Reclaiming {
                buffer,
                deadline,
                reason,
            } => {
                let over = deadline <= self.now;
                let reason = if over { reason } else { EndReason::Expired };
                self.revoke(slot, buffer, reason);
            }
            State::Revoking {
                buffer,
                reason,
                since,
                ..
            } => {
                let state = State::Revoking {
                    buffer,
                    reason,
                    since,
                    retry: Time::NEVER,
                };
                self.change(slot, state, expires);
                self.revoke_again(slot);
            }
            State::Scrubbing { .. } | State::Exporting { .. } | State::Cancelled { .. } => {}
        }
    }

    pub(super) fn disconnect(&mut self, connection: ConnectionId) {
        self.leave_all(connection);
        let Some(session) = self.sessions.remove(&connection) else {
            return;
        };
        self.watchers.remove(connection, session.administrator);
        for holder in session.resumed.iter().chain([&session.holder]) {
            self.anchor_gone(&Anchor::Holder(holder.id));
        }
    }

    pub(super) fn anchor_gone(&mut self, anchor: &Anchor) {
        for slot in self.leases.at(anchor) {
            if !self.has(Bug::ForgetPeer) {
                self.begin_end(slot, EndReason::HolderGone, Millis(0));
            }
        }
    }

    /// The slot of a lease of the peer's.
    fn own(&self, connection: ConnectionId, lease: LeaseId) -> Result<Slot, Refusal> {
        let session = self
            .sessions
            .get(&connection)
            .ok_or(Refusal::NotConnected)?;
        let slot = self.leases.slot(lease).ok_or(Refusal::NoLease(lease))?;
        let known = self.leases.get(slot).ok_or(Refusal::NoLease(lease))?;
        if !session.holder.peer.is_as(&known.holder.peer) {
            return Err(Refusal::NoLease(lease));
        }
        Ok(slot)
    }

    pub(super) fn give_back(
        &mut self,
        connection: ConnectionId,
        request: RequestId,
        lease: LeaseId,
    ) {
        match self.own(connection, lease) {
            Ok(slot) => {
                self.begin_end(slot, EndReason::Released, Millis(0));
                self.reply(request, Reply::Released);
            }
            Err(refusal) => self.refuse(request, refusal),
        }
    }

    pub(super) fn renew(
        &mut self,
        connection: ConnectionId,
        request: RequestId,
        lease: LeaseId,
        ttl: Option<Millis>,
    ) {
        match self.renewed(connection, lease, ttl) {
            Ok(expires) => self.reply(request, Reply::Renewed(expires)),
            Err(refusal) => self.refuse(request, refusal),
        }
    }

    fn renewed(
        &mut self,
        connection: ConnectionId,
        id: LeaseId,
        ttl: Option<Millis>,
    ) -> Result<Time, Refusal> {
        let slot = self.own(connection, id)?;
        let lease = self.leases.get(slot).ok_or(Refusal::NoLease(id))?;
        let State::Granted { .. } = lease.state else {
            return Err(Refusal::Ending(id));
        };
        if ttl == Some(Millis(0)) {
            return Err(Refusal::Invalid("a lease that expires at once is none"));
        }
        let not_allowed = |core: &Self| Refusal::NotAllowed {
            pool: core.pools[lease.pool as usize].name.clone(),
        };
        let terms = self.terms_of(lease).ok_or_else(|| not_allowed(self))?;
        let ttl = match (ttl, terms.max_ttl) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        let expires = ttl.map_or(Time::NEVER, |ttl| self.now.after(ttl));
        let state = lease.state;
        self.append(Record::Renewed { lease: id, expires });
        self.change(slot, state, expires);
        Ok(expires)
    }

    /// Today's terms of a lease.
    fn terms_of(&self, lease: &Lease) -> Option<crate::policy::Terms> {
        let pool = self.pools.get(lease.pool as usize)?.place?;
        self.policy.decide(&Question {
            peer: &lease.holder.peer,
            pool,
            access: lease.access,
            lifetime: lease.lifetime,
            steering_tags: lease.tph.is_some(),
        })
    }

    pub(super) fn revoke_what_is_no_longer_allowed(&mut self) {
        for slot in self
            .leases
            .slots_where(|lease| self.terms_of(lease).is_none())
        {
            let grace = self.leases.get(slot).map_or(Millis(0), |lease| lease.grace);
            self.begin_end(slot, EndReason::NoLongerAllowed, grace);
        }
    }

    pub(super) fn resume(&mut self, connection: ConnectionId, request: RequestId, token: u128) {
        let session = self.sessions.get_mut(&connection);
        let orphan = self.orphans.get(&token);
        let (Some(session), Some(orphan)) = (session, orphan) else {
            return self.refuse(request, Refusal::NothingToResume);
        };
        if !session.holder.peer.is_as(&orphan.peer) {
            return self.refuse(request, Refusal::NothingToResume);
        }
        let orphan = orphan.clone();
        session.resumed.push(orphan.clone());
        self.orphans.remove(&token);
        let mut back = Vec::new();
        for slot in self.leases.at(&Anchor::Holder(orphan.id)) {
            let Some(lease) = self.leases.get(slot) else {
                continue;
            };
            let (id, expires) = (lease.id, lease.expires);
            if let State::Granted {
                buffer, reasons, ..
            } = lease.state
            {
                let state = State::Granted {
                    buffer,
                    reasons,
                    resume_by: Time::NEVER,
                };
                self.change(slot, state, expires);
            }
            back.push(id);
        }
        back.sort_unstable();
        self.reply(request, Reply::Resumed(back));
    }

    pub(super) fn revoke_all(
        &mut self,
        request: RequestId,
        selector: &Selector,
        grace: Option<Millis>,
    ) {
        let pools = &self.pools;
        let selected = self.leases.slots_where(|lease| match selector {
            Selector::Lease(id) => lease.id == *id,
            Selector::User(uid) => lease.holder.peer.uid == *uid,
            Selector::Unit(unit) => {
                let wanted = Subject::Unit(unit.clone());
                lease
                    .holder
                    .peer
                    .subjects()
                    .any(|subject| subject == wanted)
            }
            Selector::Pid(pid) => lease.holder.peer.pid == *pid,
            Selector::Claim(claim) => lease.holder.peer.claim.as_ref() == Some(claim),
            Selector::Pool(pool) => pools[lease.pool as usize].name == *pool,
            Selector::All => true,
        });
        for slot in &selected {
            self.begin_end_within(*slot, EndReason::Revoked, grace);
        }
        self.reply(request, Reply::Revoking(selected.len()));
    }

    /// With the lease's own grace, or less.
    fn begin_end_within(&mut self, slot: Slot, reason: EndReason, grace: Option<Millis>) {
        let own = self.leases.get(slot).map_or(Millis(0), |lease| lease.grace);
        self.begin_end(slot, reason, grace.map_or(own, |grace| grace.min(own)));
    }

    pub(super) fn let_go(&mut self, name: &str, grace: Option<Millis>) {
        let Some((number, _)) = self.device(name) else {
            return;
        };
        let device = &mut self.devices[usize::from(number)];
        if device.presence != Presence::Open {
            return;
        }
        device.presence = Presence::Going;
        for slot in self.leases.slots_where(|lease| lease.device == number) {
            self.begin_end_within(slot, EndReason::DeviceGoing, grace);
        }
        self.look_at_lines(name);
    }

    /// Those who wait for a pool of the device are served, or refused.
    fn look_at_lines(&mut self, device: &str) {
        for (number, pool) in (0..).zip(&mut self.pools) {
            let place = pool.place.and_then(|place| self.policy.pools().get(place));
            if place.is_some_and(|pool| &*pool.device == device) {
                pool.afresh = true;
                self.dirty.insert(number);
            }
        }
    }

    pub(super) fn close_devices(&mut self) {
        for device in &mut self.devices {
            if device.presence == Presence::Going && device.leases == 0 {
                device.presence = Presence::Closing;
                self.out.push(Action::CloseDevice(device.name.clone()));
            }
        }
    }

    pub(super) fn closed(&mut self, name: &str) {
        let Some((number, _)) = self.device(name) else {
            return;
        };
        let device = &mut self.devices[usize::from(number)];
        device.presence = Presence::Absent;
        device.strays.clear();
        device.facts = Facts::default();
        self.remake_maps(name);
        for slot in self.leases.slots_where(|lease| lease.device == number) {
            let state = self.leases.get(slot).map(|lease| lease.state);
            if let Some(State::Scrubbing { request } | State::Exporting { request }) = state {
                self.refuse(request, Refusal::Cancelled(EndReason::DeviceClosed));
            }
            self.end(slot, EndReason::DeviceClosed);
        }
        self.look_at_lines(name);
    }

    pub(super) fn revoked(&mut self, buffer: BufferId, answer: RevokeAnswer) {
        let Some(slot) = self.leases.slot_of(buffer) else {
            return self.stray_revoked(buffer, answer);
        };
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let State::Revoking { reason, since, .. } = lease.state else {
            return;
        };
        let (device, expires) = (lease.device, lease.expires);
        let again = |core: &mut Self| {
            let retry = core.now.after(RETRY);
            let state = State::Revoking {
                buffer: Some(buffer),
                reason,
                since,
                retry,
            };
            core.change(slot, state, expires);
        };
        if !matches!(answer, RevokeAnswer::Done | RevokeAnswer::Unknown) {
            self.may_hang(slot);
        }
        match answer {
            RevokeAnswer::Done | RevokeAnswer::Unknown => self.end(slot, reason),
            RevokeAnswer::InProgress if self.has(Bug::FreeBeforeDrained) => self.end(slot, reason),
            RevokeAnswer::InProgress => {}
            RevokeAnswer::Before => {
                again(self);
                let device = self.devices[usize::from(device)].name.clone();
                self.out.push(Action::List(device));
            }
            RevokeAnswer::Failed(_) => again(self),
        }
    }

    fn stray_revoked(&mut self, buffer: BufferId, answer: RevokeAnswer) {
        let strays = |device: &super::DeviceState| device.strays.contains_key(&buffer);
        let Some(number) = self.devices.iter().position(strays) else {
            return;
        };
        match answer {
            RevokeAnswer::Done | RevokeAnswer::Unknown => {
                self.devices[number].strays.remove(&buffer);
                self.strays_gone(number);
            }
            RevokeAnswer::InProgress | RevokeAnswer::Failed(_) => {}
            RevokeAnswer::Before => {
                let device = self.devices[number].name.clone();
                self.out.push(Action::List(device));
            }
        }
    }

    /// Ends the leases that were held for strays that are gone.
    fn strays_gone(&mut self, number: usize) {
        let strays: Vec<Stray> = self.devices[number].strays.values().copied().collect();
        let held = self.leases.slots_where(|lease| {
            usize::from(lease.device) == number
                && matches!(lease.state, State::Revoking { buffer: None, .. })
                && (self.has(Bug::ForgetHeld) || !strays.iter().any(|stray| stray.may_be(lease)))
        });
        for slot in held {
            self.end(slot, EndReason::NeverGranted);
        }
        let name = self.devices[number].name.clone();
        self.look_at_lines(&name);
    }

    /// The kernel is right: takes its list for the truth.
    pub(super) fn listed(&mut self, name: &str, buffers: &[Buffer]) {
        let Some((number, device)) = self.device(name) else {
            return;
        };
        if device.presence == Presence::Absent {
            return;
        }
        let found: BTreeMap<BufferId, &Buffer> =
            buffers.iter().map(|buffer| (buffer.id, buffer)).collect();
        for slot in self.leases.slots_where(|lease| lease.device == number) {
            let state = self.leases.get(slot).map(|lease| lease.state);
            if let Some((state, buffer)) = state.and_then(|state| Some((state, state.buffer()?))) {
                self.lease_listed(slot, state, found.get(&buffer).copied());
            }
        }
        self.strays_listed(number, buffers, &found);
    }

    fn lease_listed(&mut self, slot: Slot, state: State, found: Option<&Buffer>) {
        let Some(expires) = self.leases.get(slot).map(|lease| lease.expires) else {
            return;
        };
        let why = |otherwise| match state {
            State::Reclaiming { reason, .. } | State::Revoking { reason, .. } => reason,
            _ => otherwise,
        };
        let Some(found) = found else {
            if !self.has(Bug::KeepGone) {
                self.end(slot, why(EndReason::Dropped));
            }
            return;
        };
        let reason = why(EndReason::RevokedElsewhere);
        match state {
            _ if found.dead && !found.draining => self.end(slot, reason),
            State::Revoking { .. } if found.dead => {}
            // The answer said that it would be dead; a failure has a time of its own.
            State::Revoking { retry, .. } if retry == Time::NEVER => self.revoke_again(slot),
            _ if found.dead => {
                let id = self.leases.get(slot).map_or(LeaseId(0), |lease| lease.id);
                let deadline = self.now;
                self.append(Record::Reclaiming {
                    lease: id,
                    deadline,
                    reason,
                });
                self.change(slot, revoking(Some(found.id), reason, self.now), expires);
                self.may_hang(slot);
                self.tell(slot, News::Revoked(reason));
            }
            State::Granted {
                buffer,
                reasons,
                resume_by,
            } if reasons != found.reasons => {
                let reasons = found.reasons;
                self.change(
                    slot,
                    State::Granted {
                        buffer,
                        reasons,
                        resume_by,
                    },
                    expires,
                );
                let news = match reasons {
                    0 => News::Resumed,
                    reasons => News::Suspended(reasons),
                };
                self.tell(slot, news);
            }
            _ => {}
        }
    }

    /// Buffers that nobody knows: a lease whose export was cut short, or somebody else's.
    fn strays_listed(
        &mut self,
        number: u16,
        buffers: &[Buffer],
        found: &BTreeMap<BufferId, &Buffer>,
    ) {
        let exporting = self.leases.iter().any(|(_, lease)| {
            let open = matches!(
                lease.state,
                State::Exporting { .. } | State::Cancelled { .. }
            );
            lease.device == number && open
        });
        let held = self.leases.slots_where(|lease| {
            let open = matches!(lease.state, State::Revoking { buffer: None, .. });
            lease.device == number && open
        });
        let place = usize::from(number);
        let name = self.devices[place].name.clone();
        let reaches = |buffer: &Buffer| !buffer.internal && (!buffer.dead || buffer.draining);
        self.devices[place]
            .strays
            .retain(|id, _| found.get(id).is_some_and(|buffer| reaches(buffer)));
        for buffer in buffers {
            let known = self.devices[place].strays.contains_key(&buffer.id);
            let ours = self.leases.slot_of(buffer.id).is_some();
            // While an export has no answer, what is new is its.
            if ours || !reaches(buffer) || self.has(Bug::KeepStrays) || (!known && exporting) {
                continue;
            }
            let mut stray = Stray {
                bar: buffer.bar,
                size: buffer.size,
                nr_ranges: buffer.nr_ranges,
                explained: true,
            };
            stray.explained = held
                .iter()
                .filter_map(|slot| self.leases.get(*slot))
                .any(|lease| stray.may_be(lease));
            self.devices[place].strays.entry(buffer.id).or_insert(stray);
            if !buffer.dead {
                let device = name.clone();
                self.out.push(Action::Revoke {
                    device,
                    buffer: buffer.id,
                });
            }
        }
        self.strays_gone(place);
    }
}

impl Stray {
    fn may_be(&self, lease: &Lease) -> bool {
        let ranges = lease.ranges.as_slice();
        self.bar == lease.bar
            && self.size == lease.ranges.size()
            && usize::try_from(self.nr_ranges) == Ok(ranges.len())
    }
}

/// When the revocation of a lease is taken to hang.
fn hangs_at(lease: &Lease) -> Option<Time> {
    match lease.state {
        State::Revoking { since, .. } => Some(since.after(HANGS)),
        _ => None,
    }
}

fn revoking(buffer: Option<BufferId>, reason: EndReason, since: Time) -> State {
    State::Revoking {
        buffer,
        reason,
        since,
        retry: Time::NEVER,
    }
}
