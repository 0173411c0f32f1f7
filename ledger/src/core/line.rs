//! The line for a pool.
//!
//! Requests are looked at from the first to the last. One that fits is granted. Of one that does
//! not fit
//!
//! - the named ranges are kept: nobody behind it gets a unit of them, everybody else what is left;
//! - a count of units stops all that are behind it, or those who want less would take what becomes
//!   free again and again, and a large request would never have its turn;
//! - nothing of both is true if it stands aside: with leases that its owner has itself, and those
//!   whose revocation hangs, it cannot be served, whatever others give back. As soon as these are
//!   gone it counts again. A revocation hangs when an importer has not let go for [`HANGS`].

use super::Bug;
use super::Core;
use super::Due;
use super::Refusal;
use super::Slot;
use super::pool::Kept;
use super::pool::Waiter;
use super::pool::Wanted;
use crate::allocator::Run;
use crate::types::Access;
use crate::types::ConnectionId;
use crate::types::LeaseId;
use crate::types::Millis;
use crate::types::Range;
use crate::types::RequestId;

/// How long an importer may take to let go; the kernel then says in its log that it has not.
pub(super) const HANGS: Millis = Millis(10_000);
/// Most leases at a time.
const MAX_LEASES: u32 = 1 << 22;
/// Most requests in line for a pool, of one whom the policy names for a pool, of a connection.
const MAX_WAITING: (usize, usize, u32) = (4096, 256, 16);
/// Most ranges that are named by requests in line for a pool, and by those of one.
const MAX_WAITED_FOR: (usize, usize) = (16_384, 4096);

/// The prospects of a request in line.
enum Prospect {
    /// There may be room.
    Room,
    /// None, and leases are in the way that nobody else can give back.
    Aside,
    /// None, and these are kept for it.
    Keeps(Vec<Run>),
    /// None, and nobody behind it is served.
    Stops,
}

impl Core {
    /// Grants what can be granted, and refuses what cannot be any more.
    pub(super) fn serve(&mut self, pool: u32) {
        let place = pool as usize;
        let Some(state) = self.pools.get_mut(place) else {
            return;
        };
        let afresh = std::mem::take(&mut state.afresh);
        let mut kept = Kept::default();
        let mut stopped = false;
        let mut at = 0;
        while let Some(waiter) = self.pools[place].queue.get(at) {
            let (request, connection) = (waiter.request, waiter.connection);
            let session = self.sessions.get(&connection);
            let Some(holder) = session.map(|session| session.holder.clone()) else {
                self.leave(pool, request);
                continue;
            };
            let (mut prospect, aside) = match stopped {
                true => (Prospect::Stops, waiter.aside),
                false => self.prospect(pool, waiter, &mut kept),
            };
            self.pools[place].queue[at].aside = aside;
            // Of those who are passed over the policy is not asked each time.
            if afresh || matches!(prospect, Prospect::Room | Prospect::Stops) {
                match self.admit(&holder.peer, &self.pools[place].queue[at].ask) {
                    Err(refusal) => {
                        self.leave(pool, request);
                        self.refuse(request, refusal);
                        continue;
                    }
                    Ok(admitted) if admitted.pool != pool => {
                        // The policy has cut the pools anew.
                        if let Some(waiter) = self.leave(pool, request) {
                            self.acquire(connection, request, waiter.ask);
                        }
                        continue;
                    }
                    Ok(admitted) if matches!(prospect, Prospect::Room) => {
                        if let Err(refusal) = self.room_for_a_lease(connection) {
                            self.leave(pool, request);
                            self.refuse(request, refusal);
                            continue;
                        }
                        let access = self.pools[place].queue[at].ask.access;
                        if let Some(ranges) = self.claim(&admitted, access, &mut kept) {
                            if let Some(waiter) = self.leave(pool, request) {
                                self.reserve(connection, request, &waiter.ask, &admitted, ranges);
                            }
                            continue;
                        }
                        prospect = Prospect::Stops;
                    }
                    Ok(_) => {}
                }
            }
            match &prospect {
                Prospect::Keeps(runs) => kept.add(runs),
                Prospect::Aside => {}
                Prospect::Room | Prospect::Stops => stopped = true,
            }
            if stopped && !afresh {
                return;
            }
            at += 1;
        }
    }

    /// The units that are kept from whoever comes last; `None`: nobody is served behind those who
    /// are in line.
    pub(super) fn behind(&self, pool: u32) -> Option<Kept> {
        let mut kept = Kept::default();
        for waiter in &self.pools.get(pool as usize)?.queue {
            match self.prospect(pool, waiter, &mut kept).0 {
                Prospect::Keeps(runs) => kept.add(&runs),
                Prospect::Aside => {}
                Prospect::Room | Prospect::Stops => return None,
            }
        }
        Some(kept)
    }

    /// With what [`Waiter::aside`] is to be.
    fn prospect(&self, pool: u32, waiter: &Waiter, kept: &mut Kept) -> (Prospect, Option<bool>) {
        let map = self
            .pools
            .get(pool as usize)
            .and_then(|pool| pool.map.as_ref());
        let wanted = map.and_then(|map| Some((map, map.wanted(&waiter.ask.what)?)));
        let Some((map, wanted)) = wanted else {
            // It is refused, or the device is on its way.
            return (Prospect::Stops, waiter.aside);
        };
        if self.is_blocked(pool) {
            return (Prospect::Stops, waiter.aside);
        }
        let access = waiter.ask.access;
        if map.may_have(&wanted, access, kept) {
            return (Prospect::Room, waiter.aside);
        }
        let aside = waiter.aside.unwrap_or_else(|| {
            let stay = self.leases_that_stay(pool, waiter);
            !stay.is_empty() && map.stands_aside(&wanted, access, &stay)
        });
        let prospect = match wanted {
            _ if aside && !self.has(Bug::NeverAside) => Prospect::Aside,
            _ if self.has(Bug::Overtakes) => Prospect::Aside,
            Wanted::Named(runs) if !self.has(Bug::NeverAside) => Prospect::Keeps(runs),
            _ => Prospect::Stops,
        };
        (prospect, Some(aside))
    }

    /// The ranges of the pool that nobody but the owner of a request can give back.
    fn leases_that_stay(&self, pool: u32, waiter: &Waiter) -> Vec<(Range, Access)> {
        let own = self.leases.owned_after(&waiter.owner, LeaseId(0));
        let own = own.filter(|lease| lease.pool == pool);
        let state = self.pools.get(pool as usize);
        let hung = state.into_iter().flat_map(|state| &state.hung);
        let hung = hung.filter_map(|slot| self.leases.get(*slot));
        own.chain(hung)
            .flat_map(|lease| {
                let ranges = lease.ranges.as_slice().iter();
                ranges.map(|range| (*range, lease.access))
            })
            .collect()
    }

    /// A revocation was to have ended by now: those who wait for its ranges hold nobody up, if it
    /// has not.
    pub(super) fn hangs(&mut self, slot: Slot) {
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let pool = lease.pool;
        if let Some(state) = self.pools.get_mut(pool as usize) {
            if state.hung.insert(slot) {
                state.look_for_room();
                self.dirty.insert(pool);
            }
        }
    }

    /// Takes a request out of the line.
    pub(super) fn leave(&mut self, pool: u32, request: RequestId) -> Option<Waiter> {
        let queue = &mut self.pools.get_mut(pool as usize)?.queue;
        let place = queue.iter().position(|waiter| waiter.request == request)?;
        let waiter = queue.remove(place)?;
        self.disarm(Some(waiter.deadline), Due::Waiter(pool, request));
        if let Some(session) = self.sessions.get_mut(&waiter.connection) {
            session.waiting = session.waiting.saturating_sub(1);
        }
        // Those behind it may fit now.
        self.dirty.insert(pool);
        Some(waiter)
    }

    /// The patience of whoever waits is over.
    pub(super) fn time_out(&mut self, pool: u32, request: RequestId) {
        let Some(waiter) = self.leave(pool, request) else {
            return;
        };
        let session = self.sessions.get(&waiter.connection);
        let Some(holder) = session.map(|session| session.holder.clone()) else {
            return;
        };
        let refusal = match self.admit(&holder.peer, &waiter.ask) {
            Ok(admitted) => self.busy(&admitted, &waiter.ask, true),
            Err(refusal) => refusal,
        };
        self.refuse(request, refusal);
    }

    /// Takes a connection out of every line.
    pub(super) fn leave_all(&mut self, connection: ConnectionId) {
        let session = self.sessions.get(&connection);
        if session.is_none_or(|session| session.waiting == 0) {
            return;
        }
        let mut requests = Vec::new();
        for (number, pool) in (0..).zip(&self.pools) {
            let mine = |waiter: &&Waiter| waiter.connection == connection;
            let mine = pool.queue.iter().filter(mine);
            requests.extend(mine.map(|waiter| (number, waiter.request)));
        }
        for (pool, request) in requests {
            self.leave(pool, request);
        }
    }

    /// Whether one more lease may be, of all tenants together.
    pub(super) fn room_for_a_lease(&self, connection: ConnectionId) -> Result<(), Refusal> {
        let session = self.sessions.get(&connection);
        let most = match session.is_some_and(|session| session.administrator) {
            true => MAX_LEASES,
            false => self.policy.totals().leases.min(MAX_LEASES),
        };
        let (key, have) = ("max-leases", self.leases.len() as u64);
        match have < u64::from(most) {
            true => Ok(()),
            false => Err(Refusal::Total { key, most, have }),
        }
    }

    /// Whether one more may wait in a line.
    pub(super) fn room_in_line(&self, pool: u32, new: &Waiter) -> Result<(), Refusal> {
        let queue = &self.pools[pool as usize].queue;
        let (mut ranges, mut own, mut own_ranges) = (new.ranges(), 0, new.ranges());
        for waiter in queue {
            ranges += waiter.ranges();
            if waiter.share == new.share {
                own += 1;
                own_ranges += waiter.ranges();
            }
        }
        let session = self.sessions.get(&new.connection);
        let waiting = session.map_or(0, |session| session.waiting);
        let full = queue.len() >= MAX_WAITING.0
            || own >= MAX_WAITING.1
            || waiting >= MAX_WAITING.2
            || ranges > MAX_WAITED_FOR.0
            || own_ranges > MAX_WAITED_FOR.1;
        if full {
            return Err(Refusal::QueueFull);
        }
        let all: usize = self.pools.iter().map(|pool| pool.queue.len()).sum();
        let (key, most, have) = ("max-waiting", self.policy.totals().waiting, all as u64);
        let administrator = session.is_some_and(|session| session.administrator);
        match administrator || have < u64::from(most) {
            true => Ok(()),
            false => Err(Refusal::Total { key, most, have }),
        }
    }
}
