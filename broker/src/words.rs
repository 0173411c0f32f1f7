//! The words of the protocol as those of the core, and back.

use barlease_ledger::core as ledger;
use barlease_ledger::core::Limit;
use barlease_ledger::types;
use barlease_ledger::types::EndReason;
use barlease_ledger::types::Time;
use barlease_proto as proto;
use barlease_proto::Reason;

/// The request that a client's parameters mean.
///
/// # Errors
///
/// [`proto::Refusal::Invalid`]: they name neither a pool nor ranges of a device, or both.
pub fn ask(call: proto::Acquire) -> Result<types::Ask, proto::Refusal> {
    let what = match (call.pool, call.device, call.bar, call.ranges) {
        (Some(pool), None, None, None) => types::What::Pool {
            pool: pool.into(),
            size: call.size,
        },
        (None, Some(device), Some(bar), Some(ranges)) if call.size.is_none() => {
            types::What::Ranges {
                device: device.into(),
                bar,
                ranges: ranges
                    .iter()
                    .map(|range| types::Range {
                        offset: range.offset,
                        length: range.length,
                    })
                    .collect(),
            }
        }
        _ => {
            return Err(proto::Refusal::Invalid {
                reason: "say a pool, with a size or without, or else device, bar and ranges"
                    .to_owned(),
            });
        }
    };
    Ok(types::Ask {
        what,
        access: match call.access {
            proto::Access::Read => types::Access::Read,
            proto::Access::ReadWrite => types::Access::ReadWrite,
        },
        memory_type: match call.memory_type {
            None | Some(proto::MemoryType::Nc) => types::MemoryType::Uncached,
            Some(proto::MemoryType::Wc) => types::MemoryType::WriteCombining,
        },
        tph: call.steering_tag.map(|tag| types::Tph {
            tag: tag.tag,
            extended: tag.extended,
            hint: tag.hint,
        }),
        lifetime: match call.lifetime {
            None | Some(proto::Lifetime::Connection) => types::Lifetime::Connection,
            Some(proto::Lifetime::Process) => types::Lifetime::Process,
            Some(proto::Lifetime::Cgroup) => types::Lifetime::Cgroup,
            Some(proto::Lifetime::Claim) => types::Lifetime::Claim,
            Some(proto::Lifetime::Holders) => types::Lifetime::Holders,
        },
        ttl: call.ttl.map(types::Millis),
        wait: types::Millis(call.wait.unwrap_or(0)),
    })
}

/// A refusal of the core's, for the client.
#[must_use]
pub fn refusal(refusal: ledger::Refusal) -> proto::Refusal {
    use ledger::Refusal as From;
    use proto::Refusal as To;
    match refusal {
        From::NoPool(pool) => To::NoSuchPool {
            pool: pool.to_string(),
        },
        From::OutsidePools { device, bar } => To::OutsidePools {
            device: device.to_string(),
            bar,
        },
        From::NotAllowed { pool } => To::NotAllowed {
            pool: pool.to_string(),
        },
        From::NotOffered { pool, what } => To::NotOffered {
            pool: pool.to_string(),
            reason: format!("it is not leased {what}"),
        },
        From::Limit { place, limit, have } => To::LimitReached {
            rule: place.to_string(),
            leases: match limit {
                Limit::Leases(leases) => Some(leases),
                Limit::Bytes(_) => None,
            },
            bytes: match limit {
                Limit::Leases(_) => None,
                Limit::Bytes(bytes) => Some(bytes),
            },
            have,
        },
        From::Busy {
            holders,
            waiting,
            timed_out,
        } => To::Busy {
            held_by: holders.iter().map(held_by).collect(),
            waiting: waiting as u64,
            timed_out,
        },
        From::QueueFull => To::QueueFull {},
        From::Total { key, most, have } => To::LimitReached {
            rule: format!("all tenants together (`{key}` of [tenants] in the policy, {most})"),
            leases: (key == "max-leases").then_some(most),
            bytes: None,
            have,
        },
        From::NoDevice(device) => To::NoSuchDevice {
            device: device.to_string(),
        },
        From::DeviceGoing(device) => To::DeviceGoing {
            device: device.to_string(),
        },
        From::NoLease(lease) => To::NoSuchLease { lease: lease.0 },
        From::Ending(lease) => To::Ending { lease: lease.0 },
        From::Cancelled(why) => To::Cancelled {
            reason: reason(why),
        },
        From::Export(errno) => failed("export", errno),
        From::Scrub(errno) => failed("clear", errno),
        From::NothingToResume => To::NothingToResume {},
        From::NotConnected
        | From::Invalid(_)
        | From::NotUnits { .. }
        | From::TooLarge { .. }
        | From::NoIdentity(_) => To::Invalid {
            reason: refusal.to_string(),
        },
    }
}

fn failed(operation: &str, errno: i32) -> proto::Refusal {
    proto::Refusal::Failed {
        operation: operation.to_owned(),
        errno,
    }
}

/// News of a lease, for a client that watches.
#[must_use]
pub fn notice(lease: types::LeaseId, news: ledger::News) -> proto::Notice {
    use ledger::News;
    use proto::Event;
    let (event, why, deadline, reasons) = match news {
        News::Granted => (Event::Granted, None, None, None),
        News::Reclaim { deadline, reason } => (Event::Reclaim, Some(reason), Some(deadline), None),
        News::Suspended(reasons) => (Event::Suspended, None, None, Some(reasons)),
        News::Resumed => (Event::Resumed, None, None, None),
        News::Revoked(reason) => (Event::Revoked, Some(reason), None, None),
        News::Ended(reason) => (Event::Ended, Some(reason), None, None),
    };
    proto::Notice {
        lease: lease.0,
        event,
        reason: why.map(reason),
        deadline: deadline.and_then(time),
        reasons,
    }
}

/// A time, unless it is never.
#[must_use]
pub fn time(time: Time) -> Option<u64> {
    (time != Time::NEVER).then_some(time.0)
}

fn held_by(held: &ledger::HeldBy) -> proto::HeldBy {
    proto::HeldBy {
        lease: held.lease.0,
        holder: holder(&held.peer),
        range: range(&held.range),
        size: held.bytes,
        since: held.since.0,
        expires: time(held.expires),
        revoked: held.revoked,
    }
}

/// A range.
#[must_use]
pub fn range(range: &types::Range) -> proto::Range {
    proto::Range {
        offset: range.offset,
        length: range.length,
    }
}

/// Rights.
#[must_use]
pub fn access(access: types::Access) -> proto::Access {
    match access {
        types::Access::Read => proto::Access::Read,
        types::Access::ReadWrite => proto::Access::ReadWrite,
    }
}

/// A memory type.
#[must_use]
pub fn memory_type(memory_type: types::MemoryType) -> proto::MemoryType {
    match memory_type {
        types::MemoryType::Uncached => proto::MemoryType::Nc,
        types::MemoryType::WriteCombining => proto::MemoryType::Wc,
    }
}

/// The end that a lease has by itself.
#[must_use]
pub fn lifetime(lifetime: types::Lifetime) -> proto::Lifetime {
    match lifetime {
        types::Lifetime::Connection => proto::Lifetime::Connection,
        types::Lifetime::Process => proto::Lifetime::Process,
        types::Lifetime::Cgroup => proto::Lifetime::Cgroup,
        types::Lifetime::Claim => proto::Lifetime::Claim,
        types::Lifetime::Holders => proto::Lifetime::Holders,
    }
}

/// A holder, as others may know of it.
#[must_use]
pub fn holder(peer: &types::Peer) -> proto::Holder {
    proto::Holder {
        uid: peer.uid,
        gid: peer.gid,
        pid: peer.pid,
        unit: (!peer.unit.is_empty()).then(|| peer.unit.to_string()),
        claim: peer.claim.as_ref().map(ToString::to_string),
    }
}

/// Why a lease ends.
#[must_use]
pub fn reason(reason: EndReason) -> Reason {
    match reason {
        EndReason::Released => Reason::Released,
        EndReason::Dropped => Reason::Dropped,
        EndReason::Expired => Reason::Expired,
        EndReason::HolderGone => Reason::HolderGone,
        EndReason::NotResumed => Reason::NotResumed,
        EndReason::Revoked => Reason::Revoked,
        EndReason::DeviceGoing => Reason::DeviceGoing,
        EndReason::DeviceClosed => Reason::DeviceClosed,
        EndReason::NoLongerAllowed => Reason::NoLongerAllowed,
        EndReason::Undelivered => Reason::Undelivered,
        EndReason::RevokedElsewhere => Reason::RevokedElsewhere,
        EndReason::NeverGranted => Reason::NeverGranted,
        EndReason::Inconsistent => Reason::Inconsistent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_a_pool_or_ranges_and_not_both() {
        let pool = proto::Acquire::of_pool("rows", 4096, proto::Access::Read);
        assert_eq!(
            ask(pool.clone()).unwrap().what,
            types::What::Pool {
                pool: "rows".into(),
                size: Some(4096)
            }
        );
        let ranges = proto::Acquire::of_ranges("card", 2, vec![], proto::Access::Read);
        assert!(ask(ranges.clone()).is_ok());
        for wrong in [
            proto::Acquire {
                device: Some("card".into()),
                ..pool.clone()
            },
            proto::Acquire { pool: None, ..pool },
            proto::Acquire {
                size: Some(4096),
                ..ranges
            },
        ] {
            assert!(matches!(ask(wrong), Err(proto::Refusal::Invalid { .. })));
        }
    }

    #[test]
    fn a_refusal_keeps_what_it_says() {
        let units = ledger::Refusal::NotUnits {
            pool: "rows".into(),
            unit: 0x1000,
        };
        let text = units.to_string();
        assert_eq!(refusal(units), proto::Refusal::Invalid { reason: text });
        let never = ledger::News::Reclaim {
            deadline: Time(9),
            reason: EndReason::Expired,
        };
        let told = notice(types::LeaseId(3), never);
        assert_eq!(
            (told.deadline, told.reason),
            (Some(9), Some(Reason::Expired))
        );
        assert_eq!(time(Time::NEVER), None);
    }
}
