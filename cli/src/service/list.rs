//! `barlease lease list`.

use barlease_proto::LeaseInfo;
use barlease_proto::List;
use barlease_proto::Range;
use barlease_proto::Waiter;
use serde::Serialize;

use super::args::ListArgs;
use super::holder::Program;
use super::holder::program;
use super::span;
use super::word;
use crate::failure::Failure;
use crate::output::Output;
use crate::output::or_dash;
use crate::output::print;
use crate::output::table;

/// More ranges than these are counted only, in what is for people.
const SHOWN: usize = 2;

/// A lease, or a request in line, which has no number.
#[derive(Serialize)]
struct Row {
    lease: Option<u64>,
    pool: String,
    device: Option<String>,
    bar: Option<u8>,
    ranges: Vec<Range>,
    size: Option<u64>,
    access: String,
    memory_type: Option<String>,
    lifetime: Option<String>,
    uid: u32,
    gid: u32,
    pid: u32,
    exe: Option<String>,
    command: Option<String>,
    unit: Option<String>,
    claim: Option<String>,
    state: String,
    reasons: Vec<String>,
    reason: Option<String>,
    age_ms: Option<u64>,
    ttl_ms: Option<u64>,
    deadline_ms: Option<u64>,
    mappings: Option<u32>,
    attachments: Option<u32>,
    #[serde(skip)]
    program: Program,
}

impl Row {
    fn of_lease(lease: LeaseInfo, now: u64) -> Self {
        let program = program(&lease.holder, lease.since);
        let until = |time: Option<u64>| time.map(|time| time.saturating_sub(now));
        Self {
            lease: Some(lease.lease),
            pool: lease.pool,
            device: Some(lease.device),
            bar: Some(lease.bar),
            ranges: lease.ranges,
            size: Some(lease.size),
            access: word(&lease.access),
            memory_type: Some(word(&lease.memory_type)),
            lifetime: Some(word(&lease.lifetime)),
            uid: lease.holder.uid,
            gid: lease.holder.gid,
            pid: lease.holder.pid,
            exe: program.exe.clone(),
            command: program.command.clone(),
            unit: lease.holder.unit,
            claim: lease.holder.claim,
            state: word(&lease.state),
            reasons: barlease::Reasons::from_bits(lease.reasons).names(),
            reason: lease.reason.as_ref().map(word),
            age_ms: Some(now.saturating_sub(lease.since)),
            ttl_ms: until(lease.expires),
            deadline_ms: until(lease.deadline),
            mappings: lease.usage.as_ref().map(|usage| usage.mappings),
            attachments: lease.usage.as_ref().map(|usage| usage.attachments),
            program,
        }
    }

    fn of_waiter(waiter: Waiter, now: u64) -> Self {
        let program = program(&waiter.holder, now);
        Self {
            lease: None,
            pool: waiter.pool,
            device: None,
            bar: None,
            ranges: waiter.ranges.unwrap_or_default(),
            size: waiter.size,
            access: word(&waiter.access),
            memory_type: None,
            lifetime: None,
            uid: waiter.holder.uid,
            gid: waiter.holder.gid,
            pid: waiter.holder.pid,
            exe: program.exe.clone(),
            command: program.command.clone(),
            unit: waiter.holder.unit,
            claim: waiter.holder.claim,
            state: "waiting".to_owned(),
            reasons: Vec::new(),
            reason: None,
            age_ms: None,
            ttl_ms: None,
            deadline_ms: Some(waiter.deadline.saturating_sub(now)),
            mappings: None,
            attachments: None,
            program,
        }
    }

    fn cells(&self) -> [String; 15] {
        let group = match (&self.claim, &self.unit) {
            (Some(claim), _) => format!("claim {claim}"),
            (None, unit) => or_dash(unit.as_ref()),
        };
        let mut state = self.state.clone();
        let more = self.reason.iter().chain(&self.reasons).cloned();
        let left = self.deadline_ms.map(|left| format!("{} left", span(left)));
        let more: Vec<String> = more.chain(left).collect();
        if !more.is_empty() {
            state = format!("{state} ({})", more.join(", "));
        }
        [
            or_dash(self.lease),
            self.pool.clone(),
            or_dash(self.device.as_ref()),
            or_dash(self.bar),
            ranges(&self.ranges),
            or_dash(self.size.map(|size| format!("{size:#x}"))),
            self.access.clone(),
            self.uid.to_string(),
            self.pid.to_string(),
            self.program.shown(),
            group,
            or_dash(self.age_ms.map(span)),
            or_dash(self.ttl_ms.map(span)),
            format!("{}/{}", or_dash(self.mappings), or_dash(self.attachments)),
            state,
        ]
    }
}

/// Ranges for people.
pub(crate) fn ranges(ranges: &[Range]) -> String {
    let shown: Vec<String> = ranges
        .iter()
        .take(SHOWN)
        .map(|range| format!("{:#x}+{:#x}", range.offset, range.length))
        .collect();
    match ranges.len() {
        0 => "-".to_owned(),
        1..=SHOWN => shown.join(" "),
        many => format!("{} and {} more", shown.join(" "), many - SHOWN),
    }
}

/// Leases by number, then waiters in line.
pub(crate) fn list(args: &ListArgs, output: Output) -> Result<(), Failure> {
    let socket = &args.service.socket;
    let mut client = super::connect(socket)?;
    let failed = |error| super::failed("list", "leases", error);
    let list = List {
        pool: args.pool.clone(),
        usage: Some(true),
    };
    let mut rows = Vec::new();
    for listed in client.stream(&list).map_err(failed)? {
        let listed = listed.map_err(failed)?;
        let now = super::now();
        rows.extend(listed.lease.map(|lease| Row::of_lease(lease, now)));
        rows.extend(listed.waiter.map(|waiter| Row::of_waiter(waiter, now)));
    }
    if output.is_json() {
        return Ok(output.document(&rows)?);
    }
    let mut table = table([
        "LEASE", "POOL", "DEVICE", "BAR", "RANGES", "SIZE", "ACCESS", "UID", "PID", "PROGRAM",
        "UNIT", "AGE", "TTL", "MAPS/ATT", "STATE",
    ]);
    for row in &rows {
        table.add_row(row.cells());
    }
    Ok(print(&table)?)
}
