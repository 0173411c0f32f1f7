//! Questions that change nothing: List, Explain, Devices.

use std::ffi::CString;
use std::io;

use barlease_ledger::core::LeaseView;
use barlease_ledger::core::State;
use barlease_ledger::core::WaiterView;
use barlease_ledger::policy::Match;
use barlease_ledger::policy::Outcome;
use barlease_ledger::types;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::Peer;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use barlease_ledger::types::What;
use barlease_proto as proto;
use barlease_proto::Refusal;
use nix::unistd::Gid;
use nix::unistd::Uid;
use nix::unistd::User;
use nix::unistd::getgrouplist;
use serde_json::json;

use crate::calls::Failure;
use crate::calls::Then;
use crate::calls::is_administrator;
use crate::calls::message;
use crate::connection::Busy;
use crate::connection::Next;
use crate::server::Server;
use crate::words;

/// Leases and requests that are looked at for a List at a time.
const LOOKED: usize = 4096;
/// Bytes of it that are written at a time, and the rest of the message that is the last.
const WRITTEN: usize = 64 << 10;

/// A part of a List.
struct Part {
    messages: Vec<Vec<u8>>,
    bytes: usize,
    looked: usize,
    /// The last lease that was looked at.
    last: LeaseId,
}

impl Default for Part {
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            bytes: 0,
            looked: 0,
            last: LeaseId(0),
        }
    }
}

impl Part {
    fn is_full(&self) -> bool {
        self.looked >= LOOKED || self.bytes >= WRITTEN
    }

    fn add(
        &mut self,
        lease: Option<proto::LeaseInfo>,
        waiter: Option<proto::Waiter>,
        continues: bool,
    ) {
        let message = message(&proto::Listed { lease, waiter }, continues);
        self.bytes += message.len();
        self.messages.push(message);
    }
}

impl Server<'_> {
    /// Writes the next part of a List: so much at a time that a client that reads slowly costs no
    /// memory, and looks at so much that one who has little of much holds nobody up.
    pub(crate) fn list_on(&mut self, id: ConnectionId) -> io::Result<()> {
        let Some(connection) = self.connections.get(&id) else {
            return Ok(());
        };
        let Some(Busy::List(mut listing)) = connection.busy.clone() else {
            return Ok(());
        };
        let peer = &connection.peer;
        let admin = is_administrator(peer);
        let is_meant = |pool: &str| listing.pool.as_ref().is_none_or(|wanted| wanted == pool);
        let core = self.service.core();
        let mut part = Part::default();
        if let Next::Leases(after) = listing.next {
            let all: &mut dyn Iterator<Item = LeaseView<'_>> = match admin {
                true => &mut core.leases_after(after),
                false => &mut core.own_leases_after(peer, after),
            };
            let mut next = Next::Waiters((0, RequestId(0)));
            for lease in all {
                if part.is_full() {
                    next = Next::Leases(part.last);
                    break;
                }
                part.looked += 1;
                part.last = lease.lease;
                if is_meant(lease.pool) {
                    let usage = listing.usage.as_ref();
                    let usage = usage.and_then(|usage| usage.get(&lease.state.buffer()?).cloned());
                    part.add(Some(info(&lease, usage)), None, true);
                }
            }
            listing.next = next;
        }
        let mut is_over = false;
        if let Next::Waiters(after) = listing.next {
            let mut place = after;
            is_over = true;
            for waiter in core.waiters_after(after) {
                if part.is_full() {
                    is_over = false;
                    break;
                }
                part.looked += 1;
                place = waiter.place;
                if is_meant(waiter.pool) && (admin || peer.is_as(waiter.peer)) {
                    part.add(None, Some(in_line(&waiter)), true);
                }
            }
            listing.next = Next::Waiters(place);
        }
        if is_over {
            part.add(None, None, false);
        }
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.busy = (!is_over).then_some(Busy::List(listing));
        }
        for message in part.messages {
            self.push(id, message, None)?;
        }
        Ok(())
    }

    pub(crate) fn explain(
        &self,
        peer: &Peer,
        admin: bool,
        call: proto::Explain,
    ) -> Result<Then, Failure> {
        let mut peer = peer.clone();
        let other = call.as_uid.is_some_and(|uid| uid != peer.uid)
            || call.as_unit.is_some()
            || call.as_cgroup.is_some()
            || call.as_claim.is_some();
        if other && !admin {
            return Err(Refusal::NotAdministrator {}.into());
        }
        match call.as_uid {
            // Users are looked up in whatever the host has them from, which may take long.
            Some(uid) if admin => become_user(&mut peer, uid),
            Some(_) => {
                peer.unit = "".into();
                peer.cgroup_path = "".into();
            }
            None => {}
        }
        if let Some(unit) = call.as_unit {
            peer.unit = unit.into();
        }
        if let Some(path) = call.as_cgroup {
            peer.cgroup_path = path.into();
        }
        if let Some(claim) = call.as_claim {
            peer.claim = Some(claim.into());
        }
        let ask = words::ask(proto::Acquire {
            pool: call.pool,
            size: call.size,
            device: call.device,
            bar: call.bar,
            ranges: call.ranges,
            access: call.access,
            memory_type: call.memory_type,
            steering_tag: call.steering_tag,
            lifetime: call.lifetime,
            ttl: None,
            wait: None,
        })?;
        let core = self.service.core();
        let told = core.explain(&peer, &ask);
        let rules = told.rules.iter().map(|(place, outcome)| proto::Rule {
            file: place.file.to_string(),
            line: place.line,
            allows: *outcome == Outcome::Allows,
            why: (*outcome != Outcome::Allows).then(|| outcome.to_string()),
        });
        let waiting = told.pool.as_ref().map_or(0, |pool| core.waiting(pool));
        let verdict = told.verdict.map_err(words::refusal);
        let held_by = match &verdict {
            Err(Refusal::Busy { held_by, .. }) => held_by.clone(),
            _ => Vec::new(),
        };
        Ok(Then::Answer(json!(proto::Explained {
            granted: verdict.is_ok(),
            why: verdict.err().map(|refusal| refusal.to_string()),
            pool: told.pool.map(|pool| pool.to_string()),
            rules: rules.collect(),
            held_by,
            waiting: waiting as u64,
        })))
    }

    pub(crate) fn device_list(&self) -> Vec<proto::DeviceInfo> {
        let core = self.service.core();
        let of = |wanted: &barlease_ledger::policy::Device| {
            let device = self.service.device(&wanted.name);
            let bars = core.bars(&wanted.name).unwrap_or_default();
            let is_going = self.going.contains(&wanted.name) || self.closing.contains(&wanted.name);
            let state = match device {
                _ if is_going => "going",
                Some(_) => "open",
                None => "absent",
            };
            let written = match &wanted.matches {
                Match::Address(address) => Some(address.clone()),
                _ => None,
            };
            let pools = core.policy().pools().iter();
            let pools = pools.filter(|pool| pool.device == wanted.name).map(|pool| {
                let (free, size) = core.room(&pool.name).unwrap_or_default();
                let rest = bars[usize::from(pool.bar) % 6].saturating_sub(pool.at);
                proto::PoolInfo {
                    name: pool.name.to_string(),
                    bar: pool.bar,
                    at: pool.at,
                    length: pool.length.unwrap_or(rest),
                    unit: pool.unit,
                    size,
                    free,
                    waiting: core.waiting(&pool.name) as u64,
                }
            });
            proto::DeviceInfo {
                name: wanted.name.to_string(),
                address: device
                    .map(|device| device.address().to_string())
                    .or(written),
                state: state.to_owned(),
                bars: bars.to_vec(),
                pools: pools.collect(),
            }
        };
        core.policy().devices().iter().map(of).collect()
    }
}

/// Has a question asked as if by a user: by no process, from no unit.
fn become_user(peer: &mut Peer, uid: u32) {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let groups = user.as_ref().and_then(|user| {
        let name = CString::new(user.name.as_str()).ok()?;
        getgrouplist(&name, user.gid).ok()
    });
    peer.uid = uid;
    peer.gid = user.map_or(u32::MAX, |user| user.gid.as_raw());
    peer.groups = groups
        .unwrap_or_default()
        .into_iter()
        .map(Gid::as_raw)
        .collect();
    peer.unit = "".into();
    peer.cgroup_path = "".into();
}

fn in_line(waiter: &WaiterView<'_>) -> proto::Waiter {
    let (size, ranges) = match &waiter.ask.what {
        What::Pool { size, .. } => (*size, None),
        What::Ranges { ranges, .. } => (None, Some(ranges.iter().map(words::range).collect())),
    };
    proto::Waiter {
        pool: waiter.pool.to_owned(),
        size,
        ranges,
        access: words::access(waiter.ask.access),
        holder: words::holder(waiter.peer),
        deadline: waiter.deadline.0,
    }
}

/// The state of a lease, in the protocol's words.
pub(crate) struct Told {
    state: proto::State,
    reasons: u32,
    reason: Option<types::EndReason>,
    deadline: Option<u64>,
}

impl Told {
    fn of(state: proto::State) -> Self {
        Self {
            state,
            reasons: 0,
            reason: None,
            deadline: None,
        }
    }

    /// The name of the state, as the protocol writes it.
    pub(crate) fn word(&self) -> &'static str {
        match self.state {
            proto::State::Preparing => "preparing",
            proto::State::Granted => "granted",
            proto::State::Suspended => "suspended",
            proto::State::Orphaned => "orphaned",
            proto::State::Reclaiming => "reclaiming",
            proto::State::Revoking => "revoking",
        }
    }
}

pub(crate) fn state(lease: &LeaseView<'_>) -> Told {
    match *lease.state {
        State::Scrubbing { .. } | State::Exporting { .. } => Told::of(proto::State::Preparing),
        State::Granted {
            reasons, resume_by, ..
        } => Told {
            reasons,
            deadline: words::time(resume_by),
            ..Told::of(match (resume_by, reasons) {
                (Time::NEVER, 0) => proto::State::Granted,
                (Time::NEVER, _) => proto::State::Suspended,
                _ => proto::State::Orphaned,
            })
        },
        State::Reclaiming {
            deadline, reason, ..
        } => Told {
            reason: Some(reason),
            deadline: words::time(deadline),
            ..Told::of(proto::State::Reclaiming)
        },
        State::Cancelled { reason } | State::Revoking { reason, .. } => Told {
            reason: Some(reason),
            ..Told::of(proto::State::Revoking)
        },
    }
}

fn info(lease: &LeaseView<'_>, usage: Option<proto::Usage>) -> proto::LeaseInfo {
    let told = state(lease);
    proto::LeaseInfo {
        lease: lease.lease.0,
        pool: lease.pool.to_owned(),
        device: lease.device.to_owned(),
        bar: lease.bar,
        ranges: lease.ranges.iter().map(words::range).collect(),
        size: lease
            .ranges
            .iter()
            .fold(0, |sum, range: &types::Range| sum + range.length),
        access: words::access(lease.access),
        memory_type: words::memory_type(lease.memory_type),
        lifetime: words::lifetime(lease.lifetime),
        holder: words::holder(lease.peer),
        state: told.state,
        reasons: told.reasons,
        reason: told.reason.map(words::reason),
        since: lease.since.0,
        expires: words::time(lease.expires),
        deadline: told.deadline,
        usage,
    }
}
