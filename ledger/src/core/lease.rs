//! Leases, where they are kept, and the threads that run through them.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

use crate::policy::Subject;
use crate::record::Holder;
use crate::types::Access;
use crate::types::BufferId;
use crate::types::CgroupId;
use crate::types::EndReason;
use crate::types::LeaseId;
use crate::types::Lifetime;
use crate::types::MemoryType;
use crate::types::Millis;
use crate::types::ProcessId;
use crate::types::Ranges;
use crate::types::RequestId;
use crate::types::Time;
use crate::types::Tph;

/// Where a lease is kept: used again when it is gone.
pub(super) type Slot = u32;

/// No slot.
const NONE: Slot = Slot::MAX;

/// Where a lease is between request and end. There is no state for a lease that ended: it is gone,
/// and so its ranges are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Its ranges are being cleared.
    Scrubbing {
        /// The request that waits for it.
        request: RequestId,
    },
    /// It is being exported.
    Exporting {
        /// The request that waits for it.
        request: RequestId,
    },
    /// It is being cleared or exported, and is not wanted any more.
    Cancelled {
        /// Why.
        reason: EndReason,
    },
    /// A holder has it.
    Granted {
        /// Its buffer.
        buffer: BufferId,
        /// Why it is inaccessible for now, in the kernel's bits; 0 if it is not.
        reasons: u32,
        /// When it is revoked unless its holder has come back; [`Time::NEVER`] with a holder.
        resume_by: Time,
    },
    /// A holder has it, and was told to give it back.
    Reclaiming {
        /// Its buffer.
        buffer: BufferId,
        /// When it is revoked.
        deadline: Time,
        /// Why.
        reason: EndReason,
    },
    /// It is revoked, and its ranges may still be reached by an importer.
    Revoking {
        /// Its buffer; `None` where an export was cut short by a restart, and one of the buffers
        /// that nobody knows may be its.
        buffer: Option<BufferId>,
        /// Why.
        reason: EndReason,
        /// Since when.
        since: Time,
        /// When it is tried again; [`Time::NEVER`] unless the kernel failed to.
        retry: Time,
    },
}

impl State {
    /// Its buffer, if it has one.
    #[must_use]
    pub fn buffer(&self) -> Option<BufferId> {
        match *self {
            Self::Granted { buffer, .. } | Self::Reclaiming { buffer, .. } => Some(buffer),
            Self::Revoking { buffer, .. } => buffer,
            Self::Scrubbing { .. } | Self::Exporting { .. } | Self::Cancelled { .. } => None,
        }
    }
}

/// A lease.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) holder: Arc<Holder>,
    pub(super) ranges: Ranges,
    pub(super) state: State,
    pub(super) since: Time,
    pub(super) expires: Time,
    pub(super) grace: Millis,
    pub(super) tph: Option<Tph>,
    pub(super) pool: u32,
    pub(super) device: u16,
    pub(super) bar: u8,
    pub(super) access: Access,
    pub(super) memory_type: MemoryType,
    pub(super) lifetime: Lifetime,
    pub(super) links: Links,
}

/// The leases before and after a lease at the same anchor.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(super) struct Links {
    before: Slot,
    after: Slot,
}

impl Default for Links {
    fn default() -> Self {
        Self {
            before: NONE,
            after: NONE,
        }
    }
}

impl Lease {
    /// The next time at which it asks for something.
    pub(super) fn due(&self) -> Time {
        match self.state {
            State::Granted { resume_by, .. } => self.expires.min(resume_by),
            State::Reclaiming { deadline, .. } => self.expires.min(deadline),
            State::Revoking { retry, .. } => retry,
            _ => Time::NEVER,
        }
    }

    /// The thing that it lives by, but for its time; `None` where only the kernel knows.
    pub(super) fn anchor(&self) -> Option<Anchor> {
        let peer = &self.holder.peer;
        match self.lifetime {
            Lifetime::Connection => Some(Anchor::Holder(self.holder.id)),
            Lifetime::Process => peer.process.map(Anchor::Process),
            Lifetime::Cgroup => peer.cgroup.map(Anchor::Cgroup),
            Lifetime::Claim => peer.claim.clone().map(Anchor::Claim),
            Lifetime::Holders => None,
        }
    }
}

/// A thing that leases live by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Anchor {
    /// A connection, by the number of its holder.
    Holder(u64),
    Process(ProcessId),
    Cgroup(CgroupId),
    Claim(Arc<str>),
}

/// All leases.
///
/// # Invariants
///
/// - `ids` has the slot of each lease, and `free` each slot without one.
/// - `buffers` has the slot of each lease whose state has a buffer.
/// - `anchors` has the first lease of each anchor that a lease has; from it on, `before` and
///   `after` are a list of all leases with that anchor.
/// - `owned` has the leases of each owner that has any.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(super) struct Leases {
    slots: Vec<Option<Lease>>,
    free: Vec<Slot>,
    ids: BTreeMap<LeaseId, Slot>,
    buffers: BTreeMap<BufferId, Slot>,
    anchors: BTreeMap<Anchor, Slot>,
    owned: BTreeMap<Subject, BTreeSet<LeaseId>>,
}

impl Leases {
    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&Lease> {
        self.slots.get(slot as usize)?.as_ref()
    }

    fn get_mut(&mut self, slot: Slot) -> Option<&mut Lease> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    pub(super) fn slot(&self, id: LeaseId) -> Option<Slot> {
        self.ids.get(&id).copied()
    }

    pub(super) fn slot_of(&self, buffer: BufferId) -> Option<Slot> {
        self.buffers.get(&buffer).copied()
    }

    /// All, by id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Slot, &Lease)> {
        self.ids
            .values()
            .filter_map(|slot| Some((*slot, self.get(*slot)?)))
    }

    /// Those behind an id, by id.
    pub(super) fn after(&self, id: LeaseId) -> impl Iterator<Item = &Lease> {
        let behind = (Bound::Excluded(id), Bound::Unbounded);
        self.ids
            .range(behind)
            .filter_map(|(_, slot)| self.get(*slot))
    }

    /// Those of an owner behind an id, by id.
    pub(super) fn owned_after(
        &self,
        owner: &Subject,
        id: LeaseId,
    ) -> impl Iterator<Item = &Lease> + use<'_> {
        let behind = (Bound::Excluded(id), Bound::Unbounded);
        let owned = self.owned.get(owner).into_iter();
        let ids = owned.flat_map(move |owned| owned.range(behind));
        ids.filter_map(|id| self.get(self.slot(*id)?))
    }

    /// The slots of those of which that is true, by id.
    pub(super) fn slots_where(&self, mut is: impl FnMut(&Lease) -> bool) -> Vec<Slot> {
        let found = self.iter().filter(|(_, lease)| is(lease));
        found.map(|(slot, _)| slot).collect()
    }

    /// Those at an anchor, the newest first.
    pub(super) fn at(&self, anchor: &Anchor) -> Vec<Slot> {
        let mut slots = Vec::new();
        let mut next = self.anchors.get(anchor).copied().unwrap_or(NONE);
        while let Some(lease) = self.get(next) {
            slots.push(next);
            next = lease.links.after;
        }
        slots
    }

    /// Adds a lease. True if it is the first at its anchor.
    pub(super) fn insert(&mut self, mut lease: Lease) -> (Slot, bool) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            // Ranges of a device are fewer.
            Slot::try_from(self.slots.len() - 1).unwrap_or(NONE)
        });
        let mut first = false;
        if let Some(anchor) = lease.anchor() {
            let head = self.anchors.insert(anchor, slot);
            first = head.is_none();
            lease.links.after = head.unwrap_or(NONE);
            if let Some(head) = self.get_mut(lease.links.after) {
                head.links.before = slot;
            }
        }
        self.ids.insert(lease.id, slot);
        let owner = lease.holder.peer.owner();
        self.owned.entry(owner).or_default().insert(lease.id);
        if let Some(buffer) = lease.state.buffer() {
            self.buffers.insert(buffer, slot);
        }
        self.slots[slot as usize] = Some(lease);
        (slot, first)
    }

    /// Changes state and end of a lease.
    pub(super) fn change(&mut self, slot: Slot, state: State, expires: Time) {
        let Some(lease) = self.get_mut(slot) else {
            return;
        };
        let before = std::mem::replace(&mut lease.state, state);
        lease.expires = expires;
        if before.buffer() != state.buffer() {
            if let Some(buffer) = before.buffer() {
                self.buffers.remove(&buffer);
            }
            if let Some(buffer) = state.buffer() {
                self.buffers.insert(buffer, slot);
            }
        }
    }

    /// Removes a lease. True if it was the last at its anchor.
    pub(super) fn remove(&mut self, slot: Slot) -> Option<(Lease, bool)> {
        let lease = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        self.ids.remove(&lease.id);
        let owner = lease.holder.peer.owner();
        if let Some(owned) = self.owned.get_mut(&owner) {
            owned.remove(&lease.id);
            if owned.is_empty() {
                self.owned.remove(&owner);
            }
        }
        if let Some(buffer) = lease.state.buffer() {
            self.buffers.remove(&buffer);
        }
        let mut last = false;
        if let Some(anchor) = lease.anchor() {
            if let Some(after) = self.get_mut(lease.links.after) {
                after.links.before = lease.links.before;
            }
            if let Some(before) = self.get_mut(lease.links.before) {
                before.links.after = lease.links.after;
            } else if lease.links.after == NONE {
                self.anchors.remove(&anchor);
                last = true;
            } else {
                self.anchors.insert(anchor, lease.links.after);
            }
        }
        Some((lease, last))
    }
}
