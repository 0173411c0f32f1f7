//! All that happens, as records: for the journal, for those who monitor, and for the metrics.

mod journal;

use std::io;

use barlease_ledger::core::About;
use barlease_ledger::core::News;
use barlease_ledger::policy::Policy;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::Peer;
use barlease_proto as proto;
use barlease_proto::Holder;
use barlease_proto::Record;
use barlease_proto::RecordKind;
use barlease_proto::Refusal;

pub(crate) use self::journal::Log;
pub(crate) use self::journal::SOCKET as JOURNAL;
use crate::calls;
use crate::server::Server;
use crate::service::now;
use crate::words;

fn record(kind: RecordKind, message: String) -> Record {
    Record {
        kind,
        time: now().0,
        message,
        lease: None,
        pool: None,
        device: None,
        bar: None,
        size: None,
        holder: None,
        reason: None,
        reasons: None,
        deadline: None,
        error: None,
    }
}

/// News of a lease.
pub(crate) fn news(lease: LeaseId, news: News, about: &About) -> Record {
    let notice = words::notice(lease, news);
    let (kind, what) = match news {
        News::Granted => (RecordKind::Granted, "granted".to_owned()),
        News::Reclaim { .. } => (RecordKind::Reclaim, "is to be given back".to_owned()),
        News::Suspended(_) => (RecordKind::Suspended, "is inaccessible for now".to_owned()),
        News::Resumed => (RecordKind::Resumed, "is accessible again".to_owned()),
        News::Revoked(_) => (RecordKind::Revoked, "revoked".to_owned()),
        News::Ended(_) => (RecordKind::Ended, "ended".to_owned()),
    };
    let why = notice.reason.map(|reason| format!(": {}", word(&reason)));
    let holder = words::holder(&about.holder.peer);
    let message = format!(
        "lease {lease} of {} bytes of {} {what}{}, {}",
        about.bytes,
        about.pool,
        why.unwrap_or_default(),
        person(&holder)
    );
    Record {
        lease: Some(lease.0),
        pool: Some(about.pool.to_string()),
        device: Some(about.device.to_string()),
        bar: Some(about.bar),
        size: Some(about.bytes),
        holder: Some(holder),
        reason: notice.reason,
        reasons: notice.reasons,
        deadline: notice.deadline,
        ..record(kind, message)
    }
}

pub(crate) fn policy_loaded(policy: &Policy) -> Record {
    let (devices, pools) = (policy.devices().len(), policy.pools().len());
    let message = format!("a policy of {devices} devices and {pools} pools is in force");
    record(RecordKind::PolicyLoaded, message)
}

pub(crate) fn policy_refused(errors: &[String]) -> Record {
    let message = format!("the old policy stays in force: {}", errors.join("; "));
    record(RecordKind::PolicyRefused, message)
}

fn of_device(kind: RecordKind, name: &str, message: String) -> Record {
    Record {
        device: Some(name.to_owned()),
        ..record(kind, message)
    }
}

pub(crate) fn device_opened(name: &str) -> Record {
    let message = format!("{name} is leased from");
    of_device(RecordKind::DeviceOpened, name, message)
}

pub(crate) fn device_absent(name: &str, error: &str) -> Record {
    let message = format!("{name} is not leased from: {error}");
    of_device(RecordKind::DeviceAbsent, name, message)
}

pub(crate) fn device_closed(name: &str) -> Record {
    let message = format!("{name} is closed");
    of_device(RecordKind::DeviceClosed, name, message)
}

/// An administrator wants leases back.
pub(crate) fn revoke_asked(peer: &Peer, revoke: &proto::Revoke) -> Record {
    let given = [
        revoke.lease.map(|lease| format!("lease {lease}")),
        revoke.uid.map(|uid| format!("the leases of uid {uid}")),
        revoke.pid.map(|pid| format!("the leases of pid {pid}")),
        revoke.unit.as_ref().map(|it| format!("the leases of {it}")),
        revoke
            .claim
            .as_ref()
            .map(|it| format!("the leases of claim {it}")),
        revoke.pool.as_ref().map(|it| format!("the leases of {it}")),
        revoke.all.map(|_| "all leases".to_owned()),
    ];
    let what: Vec<_> = given.into_iter().flatten().collect();
    let holder = words::holder(peer);
    let message = format!("{} revokes {}", person(&holder), what.join(", "));
    Record {
        lease: revoke.lease,
        pool: revoke.pool.clone(),
        holder: Some(holder),
        ..record(RecordKind::RevokeAsked, message)
    }
}

/// An administrator wants devices closed.
pub(crate) fn drain_asked(peer: &Peer, drain: &proto::Drain) -> Record {
    let holder = words::holder(peer);
    let what = drain.device.as_deref().unwrap_or("all devices");
    let message = format!("{} drains {what}", person(&holder));
    Record {
        device: drain.device.clone(),
        holder: Some(holder),
        ..record(RecordKind::DrainAsked, message)
    }
}

/// A holder in a message.
fn person(holder: &Holder) -> String {
    let mut text = format!("uid {} pid {}", holder.uid, holder.pid);
    for more in [&holder.unit, &holder.claim].into_iter().flatten() {
        text.push(' ');
        text.push_str(more);
    }
    text
}

/// A value of an enumeration as the protocol writes it.
pub(crate) fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        _ => String::new(),
    }
}

/// The name of a refusal.
pub(crate) fn name(refusal: &Refusal) -> String {
    let written = serde_json::to_value(refusal).unwrap_or_default();
    written["error"].as_str().unwrap_or_default().to_owned()
}

impl Server<'_> {
    /// Records that something happened.
    pub(crate) fn record(&mut self, record: Record) -> io::Result<()> {
        if !self.monitors.is_empty() {
            let told = proto::Told {
                record: record.clone(),
            };
            let message = calls::message(&told, true);
            for id in self.monitors.clone() {
                self.push(id, message.clone(), None)?;
            }
        }
        let pool = record.pool.as_deref();
        let policy = self.service.core().policy();
        let known = pool.is_some_and(|pool| policy.pool_named(pool).is_some());
        self.metrics.count(&record, known);
        self.log.add(record);
        Ok(())
    }

    /// Records a refusal, if it is that of an Acquire.
    pub(crate) fn record_refusal(&mut self, id: ConnectionId, refusal: &Refusal) -> io::Result<()> {
        let Some(connection) = self.connections.get(&id) else {
            return Ok(());
        };
        let Some(asked) = connection.asked.clone() else {
            return Ok(());
        };
        let holder = words::holder(&connection.peer);
        let of = asked.pool.as_ref().or(asked.device.as_ref());
        let message = format!(
            "refused a lease of {}, {}: {refusal}",
            of.map_or("nothing", |of| of),
            person(&holder)
        );
        self.record(Record {
            pool: asked.pool,
            device: asked.device,
            bar: asked.bar,
            size: asked.size,
            holder: Some(holder),
            error: Some(name(refusal)),
            ..record(RecordKind::Refused, message)
        })
    }
}
