//! `barlease lease watch` and `barlease monitor`.

use std::io;
use std::io::Write;

use barlease_proto::Notice;
use serde_json::json;

use super::args::Service;
use super::args::WatchArgs;
use super::span;
use super::word;
use crate::failure::Failure;
use crate::output::Output;

/// News of a lease as a line.
pub(crate) fn line(notice: &Notice, output: Output) -> String {
    let left = notice.deadline.map(|at| at.saturating_sub(super::now()));
    let reason = notice.reason.as_ref().map(word);
    let reasons = barlease::Reasons::from_bits(notice.reasons.unwrap_or(0)).names();
    let event = word(&notice.event);
    let told = json!({
        "event": event,
        "lease": notice.lease,
        "reason": reason,
        "reasons": reasons,
        "deadline_ms": left,
    });
    let mut text = format!("lease {} {event}", notice.lease);
    if let Some(reason) = &reason {
        text.push_str(&format!(": {reason}"));
    }
    if !reasons.is_empty() {
        text.push_str(&format!(": {}", reasons.join(",")));
    }
    if let Some(left) = left {
        text.push_str(&format!(", revoked in {}", span(left)));
    }
    output.line(&told, &text)
}

/// Until the service ends, or nobody reads.
pub(crate) fn watch(args: &WatchArgs, output: Output) -> Result<(), Failure> {
    let client = super::connect(&args.service.socket)?;
    let failed = |error| super::failed("watch", "leases", error);
    for notice in client.watch(args.all).map_err(failed)? {
        let notice = notice.map_err(failed)?;
        writeln!(io::stdout(), "{}", line(&notice, output))?;
    }
    Ok(())
}

/// All that happens, as JSON lines.
pub(crate) fn monitor(service: &Service) -> Result<(), Failure> {
    let client = super::connect(&service.socket)?;
    let failed = |error| super::failed("monitor", "leases", error);
    for record in client.monitor().map_err(failed)? {
        let record = record.map_err(failed)?;
        let holder = record.holder.as_ref();
        let told = json!({
            "kind": word(&record.kind),
            "time_ms": record.time,
            "message": record.message,
            "lease": record.lease,
            "pool": record.pool,
            "device": record.device,
            "bar": record.bar,
            "size": record.size,
            "uid": holder.map(|holder| holder.uid),
            "gid": holder.map(|holder| holder.gid),
            "pid": holder.map(|holder| holder.pid),
            "unit": holder.and_then(|holder| holder.unit.as_ref()),
            "claim": holder.and_then(|holder| holder.claim.as_ref()),
            "reason": record.reason.as_ref().map(word),
            "reasons": barlease::Reasons::from_bits(record.reasons.unwrap_or(0)).names(),
            "deadline_ms": record.deadline,
            "error": record.error,
        });
        writeln!(io::stdout(), "{told}")?;
    }
    Ok(())
}
