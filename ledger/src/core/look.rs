//! Questions that change nothing.

use super::Core;
use super::Explanation;
use super::Lease;
use super::LeaseView;
use super::WaiterView;
use crate::policy::Policy;
use crate::policy::Question;
use crate::types::Ask;
use crate::types::LeaseId;
use crate::types::Peer;
use crate::types::RequestId;
use crate::types::What;

impl Core {
    /// The leases, by id.
    pub fn leases(&self) -> impl Iterator<Item = LeaseView<'_>> {
        self.leases.iter().map(|(_, lease)| self.view(lease))
    }

    /// Those with a greater id than this one, by id.
    pub fn leases_after(&self, id: LeaseId) -> impl Iterator<Item = LeaseView<'_>> {
        self.leases.after(id).map(|lease| self.view(lease))
    }

    /// Those of them that are as that peer's own (see [`Peer::is_as`]).
    pub fn own_leases_after(
        &self,
        peer: &Peer,
        id: LeaseId,
    ) -> impl Iterator<Item = LeaseView<'_>> + use<'_> {
        let own = self.leases.owned_after(&peer.owner(), id);
        own.map(|lease| self.view(lease))
    }

    /// Those who wait in line, by pool and in their order there.
    pub fn waiters(&self) -> impl Iterator<Item = WaiterView<'_>> {
        self.waiters_after((0, RequestId(0)))
    }

    /// Those behind a place. A request that a new policy has put into another line may be missing.
    pub fn waiters_after(
        &self,
        (pool, request): (usize, RequestId),
    ) -> impl Iterator<Item = WaiterView<'_>> {
        let pools = self.pools.iter().enumerate().skip(pool);
        pools.flat_map(move |(number, state)| {
            let behind = move |request_of: RequestId| number > pool || request_of > request;
            state.queue.iter().filter_map(move |waiter| {
                if !behind(waiter.request) {
                    return None;
                }
                Some(WaiterView {
                    place: (number, waiter.request),
                    pool: &state.name,
                    peer: &self.sessions.get(&waiter.connection)?.holder.peer,
                    ask: &waiter.ask,
                    deadline: waiter.deadline,
                })
            })
        })
    }

    /// The lengths of the BARs of a device that is or was open.
    #[must_use]
    pub fn bars(&self, device: &str) -> Option<[u64; 6]> {
        let state = self.devices.iter().find(|state| &*state.name == device)?;
        Some(state.facts.bars)
    }

    /// A lease.
    #[must_use]
    pub fn lease(&self, id: LeaseId) -> Option<LeaseView<'_>> {
        let slot = self.leases.slot(id)?;
        Some(self.view(self.leases.get(slot)?))
    }

    fn view<'a>(&'a self, lease: &'a Lease) -> LeaseView<'a> {
        let pool = self.pools.get(lease.pool as usize);
        let device = self.devices.get(usize::from(lease.device));
        LeaseView {
            lease: lease.id,
            pool: pool.map_or("", |pool| &pool.name),
            device: device.map_or("", |device| &device.name),
            bar: lease.bar,
            ranges: lease.ranges.as_slice(),
            peer: &lease.holder.peer,
            access: lease.access,
            memory_type: lease.memory_type,
            lifetime: lease.lifetime,
            since: lease.since,
            expires: lease.expires,
            state: &lease.state,
        }
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Bytes of a pool that are free, and all that can be leased; `None` without pool or device.
    #[must_use]
    pub fn room(&self, pool: &str) -> Option<(u64, u64)> {
        let state = self.pools.iter().find(|state| &*state.name == pool)?;
        let map = state.map.as_ref()?;
        Some((map.free_bytes(), map.bytes()))
    }

    /// How many wait for a pool.
    #[must_use]
    pub fn waiting(&self, pool: &str) -> usize {
        let state = self.pools.iter().find(|state| &*state.name == pool);
        state.map_or(0, |state| state.queue.len())
    }

    /// The outcome that a request would have now, with its reasons.
    #[must_use]
    pub fn explain(&self, peer: &Peer, ask: &Ask) -> Explanation {
        let place = match &ask.what {
            What::Pool { pool, .. } => self.policy.pool_named(pool),
            What::Ranges { .. } => self.find_pool(&ask.what).ok().map(|(place, _)| place),
        };
        let question = place.map(|pool| Question {
            peer,
            pool,
            access: ask.access,
            lifetime: ask.lifetime,
            steering_tags: ask.tph.is_some(),
        });
        let rules = question
            .as_ref()
            .map(|question| self.policy.explain(question));
        let terms = question
            .as_ref()
            .and_then(|question| self.policy.decide(question));
        let verdict = self.admit(peer, ask).and_then(|admitted| {
            if self.could_claim(&admitted, ask.access) {
                return Ok(());
            }
            Err(self.busy(&admitted, ask, false))
        });
        Explanation {
            pool: place
                .and_then(|place| self.policy.pools().get(place))
                .map(|pool| pool.name.clone()),
            rules: rules
                .unwrap_or_default()
                .into_iter()
                .map(|(place, outcome)| (place.clone(), outcome))
                .collect(),
            limits: terms.map(|terms| [terms.user, terms.unit, terms.claim]),
            verdict,
        }
    }
}
