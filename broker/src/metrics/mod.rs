//! Numbers for Prometheus. [`door`] has the ways out.
//!
//! Counters count as records come; gauges are of the moment that they are asked for. No label has
//! more values than the policy has pools: neither leases nor their holders are labels.

pub(crate) mod door;
mod report;

use std::collections::BTreeMap;
use std::time::Duration;
use std::time::Instant;

use barlease_ledger::core::Core;
use barlease_ledger::core::State;
use barlease_ledger::types::Time;
use barlease_proto::Reason;
use barlease_proto::Record;
use barlease_proto::RecordKind;
use prometheus::Histogram;
use prometheus::HistogramOpts;
use prometheus::IntCounter;
use prometheus::IntCounterVec;
use prometheus::IntGauge;
use prometheus::IntGaugeVec;
use prometheus::Opts;
use prometheus::Registry;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;

use crate::questions;
use crate::records::word;

/// A revoked lease that an importer keeps for longer than this is stuck.
const STUCK: u64 = 10_000;
/// From 50 microseconds to 13 seconds.
const SECONDS: (f64, f64, usize) = (5e-5, 4.0, 10);

/// All of them.
pub(crate) struct Metrics {
    registry: Registry,
    leases: IntGaugeVec,
    bytes: IntGaugeVec,
    pool_bytes: IntGaugeVec,
    queue_length: IntGaugeVec,
    revoke_stuck: IntGauge,
    devices: IntGaugeVec,
    connections: IntGauge,
    restart_recovered: IntGauge,
    grants: IntCounterVec,
    grant_seconds: Histogram,
    revocations: IntCounterVec,
    revoke_seconds: Histogram,
    orphans: IntCounter,
    policy_loads: IntCounterVec,
    policy_is_old: IntGauge,
    records_lost: IntCounter,
    /// When leases were revoked that are not over.
    revoked: BTreeMap<u64, Instant>,
}

impl Metrics {
    /// # Errors
    ///
    /// Never, unless a name is wrong or comes twice.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauge = |name: &str, help: &str| register(&registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| register(&registry, IntCounter::new(name, help));
        let (start, factor, count) = SECONDS;
        let buckets = prometheus::exponential_buckets(start, factor, count)?;
        let seconds = |name: &str, help: &str| {
            let options = HistogramOpts::new(name, help).buckets(buckets.clone());
            register(&registry, Histogram::with_opts(options))
        };
        Ok(Self {
            leases: gauges(
                "barlease_leases",
                "Leases that there are.",
                &["pool", "state"],
            )?,
            bytes: gauges(
                "barlease_bytes",
                "Bytes that are leased.",
                &["pool", "state"],
            )?,
            pool_bytes: gauges(
                "barlease_pool_bytes",
                "Bytes of a pool that can be leased, free or leased.",
                &["pool", "use"],
            )?,
            queue_length: gauges(
                "barlease_queue_length",
                "Requests that wait in line.",
                &["pool"],
            )?,
            revoke_stuck: gauge(
                "barlease_revoke_stuck",
                "Leases that were revoked more than 10 seconds ago, and an importer has not let go.",
            )?,
            devices: gauges("barlease_devices", "Devices of the policy.", &["state"])?,
            connections: gauge("barlease_connections", "Connections of clients.")?,
            restart_recovered: gauge(
                "barlease_restart_recovered",
                "Leases that this process took over when it started.",
            )?,
            grants: counters(
                "barlease_grants_total",
                "Requests for a lease, by their result: granted, or why not.",
                &["pool", "result"],
            )?,
            grant_seconds: seconds(
                "barlease_grant_seconds",
                "Time from the request to the grant, in line too.",
            )?,
            revocations: counters(
                "barlease_revocations_total",
                "Leases that were revoked, by why.",
                &["reason"],
            )?,
            revoke_seconds: seconds(
                "barlease_revoke_seconds",
                "Time from the revocation to the end: until importers have let go.",
            )?,
            orphans: counter(
                "barlease_orphans_total",
                "Leases that a restart left without a holder, and that were revoked.",
            )?,
            policy_loads: counters(
                "barlease_policy_loads_total",
                "Readings of the policy, by their result: loaded, or refused.",
                &["result"],
            )?,
            policy_is_old: gauge(
                "barlease_policy_stale",
                "1 while the policy's files are wrong, and an older one is in force.",
            )?,
            records_lost: counter(
                "barlease_records_lost_total",
                "Records that the journal was too slow for.",
            )?,
            revoked: BTreeMap::new(),
            registry,
        })
    }

    /// Leases of before a restart.
    pub(crate) fn recovered(&self, leases: usize) {
        self.restart_recovered.set(number(leases));
    }

    /// A lease was granted, so long after it was asked for.
    pub(crate) fn granted(&self, took: Duration) {
        self.grant_seconds.observe(took.as_secs_f64());
    }

    /// Counts what a record says. `known`: whether the policy has its pool.
    pub(crate) fn count(&mut self, record: &Record, known: bool) {
        let pool = record.pool.as_deref().filter(|_| known).unwrap_or_default();
        match record.kind {
            RecordKind::Granted => self.grants.with_label_values(&[pool, "granted"]).inc(),
            RecordKind::Refused => {
                let result = snake(record.error.as_deref().unwrap_or_default());
                self.grants.with_label_values(&[pool, &result]).inc();
            }
            RecordKind::Revoked => {
                let reason = record.reason.as_ref().map(word).unwrap_or_default();
                self.revocations.with_label_values(&[&reason]).inc();
                if let Some(lease) = record.lease {
                    self.revoked.insert(lease, Instant::now());
                }
            }
            RecordKind::Ended => {
                let orphan = matches!(
                    record.reason,
                    Some(Reason::NotResumed | Reason::NeverGranted | Reason::Inconsistent)
                );
                self.orphans.inc_by(u64::from(orphan));
                let began = record.lease.and_then(|lease| self.revoked.remove(&lease));
                if let Some(began) = began {
                    self.revoke_seconds.observe(began.elapsed().as_secs_f64());
                }
            }
            RecordKind::PolicyLoaded => self.policy_loads.with_label_values(&["loaded"]).inc(),
            RecordKind::PolicyRefused => self.policy_loads.with_label_values(&["refused"]).inc(),
            _ => {}
        }
    }

    /// All of them.
    pub(crate) fn families(&self, moment: &Moment<'_>) -> Vec<MetricFamily> {
        self.take(moment);
        self.registry.gather()
    }

    fn take(&self, moment: &Moment<'_>) {
        let core = moment.core;
        for gauges in [
            &self.leases,
            &self.bytes,
            &self.pool_bytes,
            &self.queue_length,
        ] {
            gauges.reset();
        }
        self.devices.reset();
        let mut stuck = 0;
        let mut sums: BTreeMap<(&str, &'static str), (i64, i64)> = BTreeMap::new();
        for lease in core.leases() {
            if let State::Revoking { since, .. } = *lease.state {
                stuck += i64::from(moment.now.0.saturating_sub(since.0) > STUCK);
            }
            let state = questions::state(&lease).word();
            let (leases, bytes) = sums.entry((lease.pool, state)).or_default();
            let size: u64 = lease.ranges.iter().map(|range| range.length).sum();
            *leases += 1;
            *bytes = bytes.saturating_add(i64::try_from(size).unwrap_or(i64::MAX));
        }
        for ((pool, state), (leases, bytes)) in sums {
            self.leases.with_label_values(&[pool, state]).set(leases);
            self.bytes.with_label_values(&[pool, state]).set(bytes);
        }
        for pool in core.policy().pools() {
            let (free, size) = core.room(&pool.name).unwrap_or_default();
            for (what, bytes) in [("free", free), ("leased", size.saturating_sub(free))] {
                let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
                self.pool_bytes
                    .with_label_values(&[&pool.name, what])
                    .set(bytes);
            }
            let waiting = number(core.waiting(&pool.name));
            self.queue_length
                .with_label_values(&[&*pool.name])
                .set(waiting);
        }
        self.revoke_stuck.set(stuck);
        let all = core.policy().devices().len();
        let open = number(moment.devices);
        self.devices.with_label_values(&["open"]).set(open);
        self.devices
            .with_label_values(&["absent"])
            .set(number(all) - open);
        self.connections.set(number(moment.connections));
        let lost = moment.lost.saturating_sub(self.records_lost.get());
        self.records_lost.inc_by(lost);
        self.policy_is_old.set(moment.policy_is_old.into());
    }
}

fn register<M: Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<M>,
) -> prometheus::Result<M> {
    let made = made?;
    registry.register(Box::new(made.clone()))?;
    Ok(made)
}

/// The state that gauges are taken of.
pub(crate) struct Moment<'a> {
    pub(crate) core: &'a Core,
    pub(crate) now: Time,
    /// Open ones.
    pub(crate) devices: usize,
    pub(crate) connections: usize,
    /// Records that were lost so far.
    pub(crate) lost: u64,
    pub(crate) policy_is_old: bool,
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// `LikeThis` as `like_this`.
fn snake(name: &str) -> String {
    let mut text = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.push(letter.to_ascii_lowercase());
    }
    text
}
