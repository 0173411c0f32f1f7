//! The shares of tenants in the daemon itself: connections, and bytes that are kept for them.
//!
//! A connection counts until it is over and its client has read every descriptor that was sent to
//! it. Since a client gets no second one before it has read the first (see `clients`), there are
//! never more unread descriptors than connections, and of those fewer than the kernel lets the
//! daemon have.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;

use barlease_ledger::policy::Subject;
use barlease_ledger::types::Peer;
use barlease_ledger::types::Time;
use nix::sys::resource::Resource;
use nix::sys::resource::getrlimit;

use crate::calls::is_administrator;
use crate::service::now;
use crate::unread;

/// Most connections of a tenant.
const MAX_CONNECTIONS: usize = 256;

/// Most bytes that are kept for a tenant: of calls that are not there to their end, and of answers
/// that are not read.
const MAX_BYTES: usize = 64 << 20;

/// Time between two looks whether what is unread was read.
const PAUSE: u64 = 1000;

/// The share of a tenant.
#[derive(Debug, Default)]
struct Share {
    connections: usize,
    bytes: usize,
    /// Connections that are over, whose clients have a descriptor to read.
    unread: Vec<UnixStream>,
}

impl Share {
    fn all(&self) -> usize {
        self.connections + self.unread.len()
    }

    /// Forgets those that were read, and says how many they were.
    fn look(&mut self) -> usize {
        let before = self.unread.len();
        self.unread.retain(|socket| unread::is_there(socket));
        before - self.unread.len()
    }
}

/// The shares of all tenants. Administrators do not count.
#[derive(Debug)]
pub(crate) struct Shares {
    shares: BTreeMap<Subject, Share>,
    /// The connections of all of them.
    connections: usize,
    /// The most that there may be, whatever the policy says: the rest is for administrators,
    /// devices and processes that are watched.
    most: usize,
    look_at: Option<Time>,
}

impl Shares {
    /// For a process that may open so many descriptors.
    pub(crate) fn new() -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(now, _)| now);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Self {
            shares: BTreeMap::new(),
            connections: 0,
            most: limit / 4 * 3,
            look_at: None,
        }
    }

    /// Counts a connection; `false`: there are too many already. All tenants may have as many as
    /// the policy says.
    pub(crate) fn connect(&mut self, peer: &Peer, all: u32) -> bool {
        if is_administrator(peer) {
            return true;
        }
        let most = self.most.min(usize::try_from(all).unwrap_or(usize::MAX));
        let share = self.shares.entry(peer.tenant()).or_default();
        if share.all() >= MAX_CONNECTIONS {
            self.connections -= share.look();
        }
        let has_room = share.all() < MAX_CONNECTIONS;
        if self.connections >= most {
            self.look();
        }
        if !has_room || self.connections >= most {
            self.forget(&peer.tenant());
            return false;
        }
        self.shares.entry(peer.tenant()).or_default().connections += 1;
        self.connections += 1;
        true
    }

    /// A connection is over, with what its client has still to read.
    pub(crate) fn disconnect(&mut self, peer: &Peer, bytes: usize, unread: Option<UnixStream>) {
        let tenant = peer.tenant();
        let Some(share) = self
            .shares
            .get_mut(&tenant)
            .filter(|_| !is_administrator(peer))
        else {
            return;
        };
        share.connections -= 1;
        share.bytes -= bytes;
        match unread {
            Some(socket) => {
                share.unread.push(socket);
                self.look_at.get_or_insert(Time(now().0 + PAUSE));
            }
            None => self.connections -= 1,
        }
        self.forget(&tenant);
    }

    /// Counts bytes in the place of others; `false`: the tenant has too many.
    pub(crate) fn weigh(&mut self, peer: &Peer, before: usize, bytes: usize) -> bool {
        if is_administrator(peer) {
            return true;
        }
        let Some(share) = self.shares.get_mut(&peer.tenant()) else {
            return true;
        };
        share.bytes = share.bytes - before + bytes;
        share.bytes <= MAX_BYTES || bytes <= before
    }

    /// When it wants to look.
    pub(crate) fn due(&self) -> Option<Time> {
        self.look_at
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self) {
        if self.look_at.is_some_and(|time| time <= now()) {
            self.look();
        }
    }

    fn look(&mut self) {
        let mut left = false;
        for share in self.shares.values_mut() {
            self.connections -= share.look();
            left |= !share.unread.is_empty();
        }
        self.shares.retain(|_, share| share.all() != 0);
        self.look_at = left.then(|| Time(now().0 + PAUSE));
    }

    fn forget(&mut self, tenant: &Subject) {
        if self
            .shares
            .get(tenant)
            .is_some_and(|share| share.all() == 0)
        {
            self.shares.remove(tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;

    fn claim(name: &str) -> Peer {
        Peer {
            uid: 0,
            gid: 0,
            groups: Arc::new([]),
            pid: 0,
            process: None,
            cgroup: None,
            cgroup_path: "".into(),
            unit: "".into(),
            claim: Some(name.into()),
        }
    }

    #[test]
    fn all_tenants_together_have_so_many_connections_and_administrators_more() {
        let mut shares = Shares::new();
        for n in 0..6 {
            assert!(shares.connect(&claim(&n.to_string()), 6));
        }
        assert!(!shares.connect(&claim("6"), 6));
        let root = Peer {
            claim: None,
            ..claim("")
        };
        assert!(shares.connect(&root, 6));
        shares.disconnect(&root, 0, None);
        assert!(!shares.connect(&claim("6"), 6));
        shares.disconnect(&claim("0"), 0, None);
        assert!(shares.connect(&claim("6"), 6));
        // This limit holds beside those of the policy.
        shares.most = 6;
        assert!(!shares.connect(&claim("7"), 1000));
    }

    #[test]
    fn what_is_unread_counts_until_it_is_read() {
        let mut shares = Shares::new();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"x").unwrap();
        assert!(shares.connect(&claim("a"), 1));
        shares.disconnect(&claim("a"), 0, Some(ours));
        assert!(shares.due().is_some());
        assert!(!shares.connect(&claim("b"), 1));
        drop(theirs);
        assert!(shares.connect(&claim("b"), 1));
        assert!(shares.shares.len() == 1 && shares.due().is_none());
    }
}
