//! Those who are told.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::About;
use super::Action;
use super::Core;
use super::News;
use super::Refusal;
use super::Slot;
use crate::types::ConnectionId;
use crate::types::Peer;
use crate::types::RequestId;

/// Most watches of a connection.
const MAX_WATCHES: usize = 16;

/// The leases that a watcher is told of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Scope {
    All,
    User(u32),
    Claim(Arc<str>),
}

impl Scope {
    fn of(peer: &Peer) -> Self {
        match &peer.claim {
            Some(claim) => Self::Claim(claim.clone()),
            None => Self::User(peer.uid),
        }
    }
}

#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(super) struct Watchers {
    scopes: BTreeMap<Scope, BTreeSet<RequestId>>,
    connections: BTreeMap<ConnectionId, Vec<(Scope, RequestId)>>,
    /// Watches of those who are no administrators.
    tenants: usize,
}

impl Watchers {
    pub(super) fn remove(&mut self, connection: ConnectionId, administrator: bool) {
        for (scope, request) in self.connections.remove(&connection).unwrap_or_default() {
            self.tenants -= usize::from(!administrator);
            if let Some(requests) = self.scopes.get_mut(&scope) {
                requests.remove(&request);
                if requests.is_empty() {
                    self.scopes.remove(&scope);
                }
            }
        }
    }
}

impl Core {
    pub(super) fn watch(&mut self, connection: ConnectionId, request: RequestId, all: bool) {
        let Some(session) = self.sessions.get(&connection) else {
            return self.refuse(request, Refusal::NotConnected);
        };
        let watches = self
            .watchers
            .connections
            .get(&connection)
            .map_or(0, Vec::len);
        if watches >= MAX_WATCHES {
            return self.refuse(request, Refusal::QueueFull);
        }
        let (most, have) = (self.policy.totals().watches, self.watchers.tenants);
        if !session.administrator && have >= most as usize {
            let key = "max-watches";
            let have = have as u64;
            return self.refuse(request, Refusal::Total { key, most, have });
        }
        self.watchers.tenants += usize::from(!session.administrator);
        let scope = if all {
            Scope::All
        } else {
            Scope::of(&session.holder.peer)
        };
        let watchers = &mut self.watchers;
        watchers
            .scopes
            .entry(scope.clone())
            .or_default()
            .insert(request);
        watchers
            .connections
            .entry(connection)
            .or_default()
            .push((scope, request));
    }

    pub(super) fn tell(&mut self, slot: Slot, news: News) {
        if self.watchers.scopes.is_empty() {
            return;
        }
        let Some(lease) = self.leases.get(slot) else {
            return;
        };
        let id = lease.id;
        let pool = self.pools.get(lease.pool as usize);
        let device = self.devices.get(usize::from(lease.device));
        let about = Arc::new(About {
            holder: lease.holder.clone(),
            pool: pool.map_or_else(|| "".into(), |pool| pool.name.clone()),
            device: device.map_or_else(|| "".into(), |device| device.name.clone()),
            bar: lease.bar,
            bytes: lease.ranges.size(),
        });
        for scope in [Scope::of(&lease.holder.peer), Scope::All] {
            for watch in self.watchers.scopes.get(&scope).into_iter().flatten() {
                self.out.push(Action::Notify {
                    watch: *watch,
                    lease: id,
                    news,
                    about: about.clone(),
                });
            }
        }
    }
}
