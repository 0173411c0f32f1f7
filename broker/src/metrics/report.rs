//! `io.systemd.Metrics`: the numbers for `systemd-report`, on a socket of systemd's.
//!
//! Messages are those of varlink, without descriptors. A collector asks once and goes, so they are
//! answered one after the other.

use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use prometheus::proto::Metric;
use prometheus::proto::MetricFamily;
use prometheus::proto::MetricType;
use serde::Deserialize;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use super::door::MAX_REQUEST;
use super::door::PATIENCE;

/// Before the names of metrics, as in the name of the socket.
const PREFIX: &str = "io.barlease.Leases";
/// Before them for Prometheus.
const PROMETHEUS: &str = "barlease_";
const INTERFACE: &str = "io.systemd.Metrics";
const VARLINK: &str = "org.varlink.service";
/// The part of systemd's interface that is served.
const IDL: &str = "interface io.systemd.Metrics

type MetricFamilyType (counter, gauge, string)

# Each metric in an answer of its own: call it with `more`
method List() -> (name: string, value: object, object: ?string, fields: ?[string]object)

# Each family of metrics in an answer of its own: call it with `more`
method Describe() -> (name: string, description: string, type: MetricFamilyType)

error NoSuchMetric()
";

#[derive(Deserialize)]
struct Call {
    method: String,
    #[serde(default)]
    more: bool,
    #[serde(default)]
    parameters: Value,
}

/// Answers a collector until it goes, or takes too long.
pub(crate) fn answer(
    mut client: UnixStream,
    families: impl Fn() -> Option<Vec<MetricFamily>>,
) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut unread = Vec::new();
    loop {
        let Some(end) = unread.iter().position(|byte| *byte == 0) else {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || unread.len() > MAX_REQUEST {
                return Ok(());
            }
            client.set_read_timeout(Some(left))?;
            let mut bytes = [0; 1024];
            match client.read(&mut bytes)? {
                0 => return Ok(()),
                read => unread.extend(bytes.get(..read).unwrap_or_default()),
            }
            continue;
        };
        let message: Vec<u8> = unread.drain(..=end).collect();
        let call = serde_json::from_slice(message.get(..end).unwrap_or_default());
        let Ok(call) = call else {
            return Ok(());
        };
        let Some(answers) = answers(&call, &families) else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        for answer in answers {
            serde_json::to_writer(&mut bytes, &answer)?;
            bytes.push(0);
        }
        client.write_all(&bytes)?;
    }
}

/// The answers of a call; none if the loop has ended.
fn answers(call: &Call, families: impl Fn() -> Option<Vec<MetricFamily>>) -> Option<Vec<Value>> {
    let one = |parameters: Value| Some(vec![json!({ "parameters": parameters })]);
    let error = |name: &str, parameters: Value| {
        let error = format!("{VARLINK}.{name}");
        Some(vec![json!({ "error": error, "parameters": parameters })])
    };
    let (interface, method) = call.method.rsplit_once('.').unwrap_or_default();
    match (interface, method) {
        (VARLINK, "GetInfo") => one(json!({
            "vendor": "Barlease",
            "product": "barleased",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "",
            "interfaces": [VARLINK, INTERFACE],
        })),
        (VARLINK, "GetInterfaceDescription") => match &call.parameters["interface"] {
            wanted if wanted == INTERFACE => one(json!({ "description": IDL })),
            wanted => error("InterfaceNotFound", json!({ "interface": wanted })),
        },
        (INTERFACE, "List" | "Describe") if !call.more => error("ExpectedMore", json!({})),
        (INTERFACE, "List") => Some(in_a_row(families()?.iter().flat_map(metrics))),
        (INTERFACE, "Describe") => Some(in_a_row(families()?.iter().flat_map(descriptions))),
        _ => error("MethodNotFound", json!({ "method": call.method })),
    }
}

/// Answers of one call, of which the last one says that it is the last.
fn in_a_row(answers: impl Iterator<Item = Value>) -> Vec<Value> {
    let mut row: Vec<_> = answers
        .map(|parameters| json!({ "parameters": parameters, "continues": true }))
        .collect();
    if let Some(last) = row.last_mut() {
        last["continues"] = false.into();
    }
    row
}

/// The names of a family: a histogram has a sum and a count.
fn names(family: &MetricFamily) -> Vec<(String, &'static str)> {
    let name = family.name();
    let name = name.strip_prefix(PROMETHEUS).unwrap_or(name);
    let name = format!("{PREFIX}.{name}");
    match family.get_field_type() {
        MetricType::GAUGE => vec![(name, "gauge")],
        MetricType::HISTOGRAM => ["sum", "count"]
            .map(|part| (format!("{name}_{part}"), "counter"))
            .into(),
        _ => vec![(name, "counter")],
    }
}

fn descriptions(family: &MetricFamily) -> Vec<Value> {
    let describe =
        |(name, kind)| json!({ "name": name, "description": family.help(), "type": kind });
    names(family).into_iter().map(describe).collect()
}

fn metrics(family: &MetricFamily) -> Vec<Value> {
    let mut all = Vec::new();
    for metric in family.get_metric() {
        for ((name, _), value) in names(family).into_iter().zip(values(family, metric)) {
            let mut one = json!({ "name": name, "value": value });
            if !metric.get_label().is_empty() {
                let label = metric.get_label().iter();
                let label = label.map(|pair| (pair.name().to_owned(), pair.value().into()));
                one["fields"] = Value::Object(label.collect::<Map<_, _>>());
            }
            all.push(one);
        }
    }
    all
}

/// By the names of the family. Counts are whole numbers.
fn values(family: &MetricFamily, metric: &Metric) -> Vec<Value> {
    match family.get_field_type() {
        MetricType::GAUGE => vec![json!(metric.get_gauge().get_value() as i64)],
        MetricType::HISTOGRAM => {
            let histogram = metric.get_histogram();
            vec![
                json!(histogram.get_sample_sum()),
                json!(histogram.get_sample_count()),
            ]
        }
        _ => vec![json!(metric.get_counter().get_value() as u64)],
    }
}
