//! After a restart: what the ledger says, against what the kernel has.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::Action;
use super::Buffer;
use super::Bug;
use super::Core;
use super::Facts;
use super::Lease;
use super::State;
use super::lease::Links;
use crate::policy::Overlap;
use crate::policy::Policy;
use crate::record::Holder;
use crate::record::Intent;
use crate::record::Record;
use crate::types::Access;
use crate::types::BufferId;
use crate::types::EndReason;
use crate::types::LeaseId;
use crate::types::Lifetime;
use crate::types::Millis;
use crate::types::Time;

/// A device whose descriptor outlived the restart.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name in the policy.
    pub device: Arc<str>,
    /// Its BARs.
    pub facts: Facts,
    /// Its buffers, from LIST.
    pub buffers: Vec<Buffer>,
}

/// A lease, as the ledger tells it.
struct Told {
    intent: Box<Intent>,
    holder: Arc<Holder>,
    buffer: Option<BufferId>,
    end: Option<(Time, EndReason)>,
}

/// The sum of the records.
#[derive(Default)]
struct Story {
    holders: BTreeMap<u64, Arc<Holder>>,
    leases: BTreeMap<LeaseId, Told>,
    last_lease: u64,
}

impl Story {
    fn read(records: Vec<Record>) -> Self {
        let mut story = Self::default();
        for record in records {
            story.add(record);
        }
        story
    }

    fn add(&mut self, record: Record) {
        match record {
            Record::LastLease(lease) => self.last_lease = self.last_lease.max(lease.0),
            Record::Holder(holder) => {
                self.holders.insert(holder.id, holder);
            }
            Record::Intent(intent) => {
                self.last_lease = self.last_lease.max(intent.lease.0);
                // Without its holder a lease is nobody's: its buffer is revoked as unknown.
                if let Some(holder) = self.holders.get(&intent.holder).cloned() {
                    let told = Told {
                        intent,
                        holder,
                        buffer: None,
                        end: None,
                    };
                    self.leases.insert(told.intent.lease, told);
                }
            }
            Record::Granted { lease, buffer } => {
                if let Some(told) = self.leases.get_mut(&lease) {
                    told.buffer = Some(buffer);
                }
            }
            Record::Renewed { lease, expires } => {
                if let Some(told) = self.leases.get_mut(&lease) {
                    told.intent.expires = expires;
                }
            }
            Record::Reclaiming {
                lease,
                deadline,
                reason,
            } => {
                if let Some(told) = self.leases.get_mut(&lease) {
                    told.end = Some((deadline, reason));
                }
            }
            Record::Ended { lease } => {
                self.leases.remove(&lease);
            }
        }
    }
}

impl Core {
    /// A service that goes on after a restart, and what is to be done first.
    ///
    /// | ledger | LIST | the lease |
    /// |---|---|---|
    /// | granted | alive | is kept; one that lives by its connection until `resume` is over |
    /// | granted, end begun | alive | goes on to its end, with the same deadline |
    /// | granted | dead, draining | is revoked: its range stays taken until it has drained |
    /// | granted | dead, or not there | is over |
    /// | intended | a living or draining buffer of that shape that nobody knows | the buffer is revoked, and the range (of each such lease) stays taken until it has drained |
    /// | intended | none | is over |
    /// | nothing | alive or draining | the buffer is revoked; nothing of its BAR is granted until it has drained |
    ///
    /// Leases of devices that are not found are over: their device was closed. Of two leases of the
    /// same bytes, which nothing that is written here leads to, the later one is revoked.
    #[must_use]
    pub fn recover(
        policy: Arc<Policy>,
        records: Vec<Record>,
        found: Vec<Found>,
        now: Time,
        resume: Millis,
    ) -> (Self, Vec<Action>) {
        let core = Self::new(policy, now);
        core.go_on(records, found, resume)
    }

    pub(crate) fn go_on(
        mut self,
        records: Vec<Record>,
        found: Vec<Found>,
        resume: Millis,
    ) -> (Self, Vec<Action>) {
        self.records = records.len();
        let story = Story::read(records);
        self.last_lease = LeaseId(story.last_lease);
        self.last_holder = story.holders.keys().next_back().copied().unwrap_or(0);
        let until = self.now.after(resume);
        for told in story.leases.into_values() {
            self.retell(told, until);
        }
        let here: BTreeSet<Arc<str>> = found.iter().map(|found| found.device.clone()).collect();
        for device in &found {
            self.open(&device.device, device.facts.clone());
        }
        let doubtful = self.doubtful(&found);
        for found in &found {
            self.listed(&found.device, &found.buffers);
        }
        for lease in doubtful {
            if let Some(slot) = self.leases.slot(lease) {
                self.begin_end(slot, EndReason::Inconsistent, Millis(0));
            }
        }
        let names: Vec<_> = self
            .devices
            .iter()
            .map(|device| device.name.clone())
            .collect();
        for gone in names.iter().filter(|name| !here.contains(*name)) {
            self.closed(gone);
        }
        if self.policy.revokes() {
            self.revoke_what_is_no_longer_allowed();
        }
        self.fire();
        self.settle();
        let actions = std::mem::take(&mut self.out);
        (self, actions)
    }

    fn retell(&mut self, told: Told, until: Time) {
        let Told {
            intent,
            holder,
            buffer,
            end,
        } = told;
        let orphan = intent.lifetime == Lifetime::Connection && !self.has(Bug::OrphansForEver);
        let state = match (buffer, end) {
            (None, _) => State::Revoking {
                buffer: None,
                reason: EndReason::NeverGranted,
                since: self.now,
                retry: Time::NEVER,
            },
            (Some(buffer), Some((deadline, reason))) => State::Reclaiming {
                buffer,
                deadline,
                reason,
            },
            (Some(buffer), None) => {
                if orphan && holder.token != 0 {
                    self.orphans.insert(holder.token, holder.clone());
                }
                // Without a secret nobody can come back.
                let resume_by = match (orphan, holder.token) {
                    (true, 0) => self.now,
                    (true, _) => until,
                    (false, _) => Time::NEVER,
                };
                State::Granted {
                    buffer,
                    reasons: 0,
                    resume_by,
                }
            }
        };
        let lease = Lease {
            id: intent.lease,
            holder,
            ranges: intent.ranges,
            state,
            since: intent.since,
            expires: intent.expires,
            grace: intent.grace,
            tph: intent.tph,
            pool: self.pool_entry(&intent.pool),
            device: self.device_named(&intent.device),
            bar: intent.bar,
            access: intent.access,
            memory_type: intent.memory_type,
            lifetime: intent.lifetime,
            links: Links::default(),
        };
        let slot = self.insert(lease);
        self.may_hang(slot);
    }

    /// Leases of whose buffers the kernel says something else than the ledger, and the later ones
    /// of those that share what may not be shared.
    fn doubtful(&self, found: &[Found]) -> BTreeSet<LeaseId> {
        let mut doubtful = BTreeSet::new();
        for (_, buffer) in found.iter().flat_map(|found| {
            found
                .buffers
                .iter()
                .map(move |buffer| (&found.device, buffer))
        }) {
            let lease = self
                .leases
                .slot_of(buffer.id)
                .and_then(|slot| self.leases.get(slot));
            if let Some(lease) = lease {
                let ranges = u32::try_from(lease.ranges.as_slice().len());
                let same = (lease.bar, lease.ranges.size()) == (buffer.bar, buffer.size)
                    && ranges == Ok(buffer.nr_ranges);
                if !same {
                    doubtful.insert(lease.id);
                }
            }
        }
        // By place: who reaches farthest so far, among those that exclude others, and among all.
        let mut placed = Vec::new();
        for (_, lease) in self.leases.iter() {
            let alone = self.excludes(lease);
            let key = (lease.device, lease.bar);
            placed.extend(
                lease
                    .ranges
                    .as_slice()
                    .iter()
                    .map(|range| (key, *range, lease.id, alone)),
            );
        }
        placed.sort_unstable();
        let mut farthest: Option<((u16, u8), u64, LeaseId, bool)> = None;
        for (key, range, lease, alone) in placed {
            if let Some((same, end, other, other_alone)) = farthest {
                if same == key && range.offset < end && (alone || other_alone) && lease != other {
                    doubtful.insert(lease.max(other));
                }
                if same == key && end >= range.end() {
                    continue;
                }
            }
            farthest = Some((key, range.end(), lease, alone));
        }
        doubtful
    }

    fn excludes(&self, lease: &Lease) -> bool {
        let place = self
            .pools
            .get(lease.pool as usize)
            .and_then(|pool| pool.place);
        match place
            .and_then(|place| self.policy.pools().get(place))
            .map(|pool| pool.overlap)
        {
            Some(Overlap::Exclusive) => true,
            Some(Overlap::SharedRead) => lease.access == Access::ReadWrite,
            // Of a pool that is no more nothing is known.
            Some(Overlap::Shared) | None => false,
        }
    }

    /// Records that come to the same as all that were appended so far.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Record> {
        let mut records = vec![Record::LastLease(self.last_lease)];
        let mut holders = BTreeSet::new();
        for (_, lease) in self.leases.iter() {
            if holders.insert(lease.holder.id) {
                records.push(Record::Holder(lease.holder.clone()));
            }
            records.push(Record::Intent(Box::new(self.intent(lease))));
            let id = lease.id;
            if let Some(buffer) = lease.state.buffer() {
                records.push(Record::Granted { lease: id, buffer });
            }
            match lease.state {
                State::Reclaiming {
                    deadline, reason, ..
                } => {
                    records.push(Record::Reclaiming {
                        lease: id,
                        deadline,
                        reason,
                    });
                }
                State::Revoking {
                    buffer: Some(_),
                    reason,
                    since,
                    ..
                } => {
                    let deadline = since;
                    records.push(Record::Reclaiming {
                        lease: id,
                        deadline,
                        reason,
                    });
                }
                _ => {}
            }
        }
        records
    }
}
