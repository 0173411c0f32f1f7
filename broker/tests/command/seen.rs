//! The sights that operators have of the daemon: metrics, the dashboard, the journal.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;
use serde_json::json;

use super::A_WHILE;
use super::Daemon;
use super::until;

/// A daemon that has granted, refused, revoked, read its policy; one holds something, one waits.
fn busy() -> (Daemon, [super::Running; 2]) {
    let daemon = Daemon::start();
    daemon.text(&["lease", "acquire", "rows", "--", "true"]);
    until("it is taken back", || daemon.leases().is_empty());
    let mut holder = daemon.spawn(&["lease", "acquire", "rows", "32K"]);
    assert!(holder.line().starts_with("granted"));
    let waiter = daemon.spawn(&["lease", "acquire", "rows", "64K", "--wait", "1m"]);
    until("one waits", || daemon.leases().len() == 2);
    for refused in ["doorbells", "no-such-pool"] {
        assert_eq!(daemon.failure(&["lease", "acquire", refused, "4K"]).0, 1);
    }
    daemon.text(&["broker", "reload"]);
    (daemon, [holder, waiter])
}

fn get(daemon: &Daemon, request: &str) -> String {
    get_at(daemon, "metrics.sock", request)
}

fn get_at(daemon: &Daemon, socket: &str, request: &str) -> String {
    let path = daemon.directory.path().join(socket);
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(A_WHILE)).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

fn scrape(daemon: &Daemon) -> String {
    let answer = get(daemon, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("Content-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(
        head.contains(&format!("Content-Length: {}\r\n", body.len())),
        "{head}"
    );
    body.to_owned()
}

/// Samples by name and labels; each has a type, and a help, before it.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut typed = BTreeSet::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(about) = line.strip_prefix("# ") {
            let mut words = about.splitn(3, ' ');
            let (kind, name) = (words.next().unwrap(), words.next().unwrap());
            assert!(!words.next().unwrap().is_empty(), "{line}");
            typed.insert((kind.to_owned(), name.to_owned()));
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        let family = name.split('{').next().unwrap();
        let ends = ["", "_bucket", "_sum", "_count"];
        let of = ends.iter().find_map(|end| {
            let family = family.strip_suffix(end)?;
            let has = |kind: &str| typed.contains(&(kind.to_owned(), family.to_owned()));
            (has("TYPE") && has("HELP")).then_some(())
        });
        assert!(of.is_some(), "no type of {line}");
        let before = samples.insert(name.to_owned(), value.parse().unwrap());
        assert!(before.is_none(), "twice: {line}");
    }
    samples
}

#[test]
fn metrics_tell_what_happened_and_how_it_is() {
    let (daemon, [holder, waiter]) = busy();
    let text = scrape(&daemon);
    let samples = samples(&text);
    for (name, value) in [
        (r#"barlease_leases{pool="rows",state="granted"}"#, 1.0),
        (r#"barlease_bytes{pool="rows",state="granted"}"#, 32768.0),
        (r#"barlease_pool_bytes{pool="rows",use="free"}"#, 32768.0),
        (r#"barlease_queue_length{pool="rows"}"#, 1.0),
        (r#"barlease_queue_length{pool="doorbells"}"#, 0.0),
        (
            r#"barlease_grants_total{pool="rows",result="granted"}"#,
            2.0,
        ),
        (
            r#"barlease_grants_total{pool="doorbells",result="not_allowed"}"#,
            1.0,
        ),
        // Names that anybody can make up are no labels.
        (
            r#"barlease_grants_total{pool="",result="no_such_pool"}"#,
            1.0,
        ),
        (r#"barlease_revocations_total{reason="holder_gone"}"#, 1.0),
        ("barlease_grant_seconds_count", 2.0),
        ("barlease_revoke_seconds_count", 1.0),
        ("barlease_revoke_stuck", 0.0),
        (r#"barlease_devices{state="open"}"#, 1.0),
        (r#"barlease_policy_loads_total{result="loaded"}"#, 1.0),
        ("barlease_orphans_total", 0.0),
        ("barlease_records_lost_total", 0.0),
        ("barlease_restart_recovered", 0.0),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name} in\n{text}");
    }
    // The waiter and its watch, the holder and its watch.
    assert_eq!(samples.get("barlease_connections"), Some(&4.0));
    holder.signal(Signal::TERM);
    waiter.signal(Signal::TERM);
}

/// All answers of the socket for systemd-report to a call.
fn report(daemon: &Daemon, call: &Value) -> Vec<Value> {
    let path = daemon.directory.path().join("report.activated");
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(A_WHILE)).unwrap();
    // In two pieces, as streams may have it.
    let message = format!("{call}\0");
    let (one, other) = message.split_at(message.len() / 2);
    for piece in [one, other] {
        socket.write_all(piece.as_bytes()).unwrap();
        socket.flush().unwrap();
    }
    let mut answers = Vec::new();
    let mut unread = Vec::new();
    loop {
        let mut bytes = [0; 4096];
        let read = socket.read(&mut bytes).unwrap();
        assert_ne!(read, 0, "it hung up");
        unread.extend(&bytes[..read]);
        while let Some(end) = unread.iter().position(|byte| *byte == 0) {
            let message: Vec<u8> = unread.drain(..=end).collect();
            answers.push(serde_json::from_slice::<Value>(&message[..end]).unwrap());
        }
        let last = answers.last().filter(|_| unread.is_empty());
        if last.is_some_and(|last| last["continues"] != true) {
            return answers;
        }
    }
}

#[test]
fn systemd_report_is_told_the_same() {
    let (daemon, [holder, waiter]) = busy();
    let call = |method: &str, more: bool| {
        report(
            &daemon,
            &json!({"method": method, "more": more, "parameters": {}}),
        )
    };
    let listed = call("io.systemd.Metrics.List", true);
    let told = |name: &str, fields: Value| {
        let name = format!("io.barlease.Leases.{name}");
        let mut answers = listed.iter().map(|answer| &answer["parameters"]);
        let found = answers.find(|one| one["name"] == name && one["fields"] == fields);
        found.unwrap_or_else(|| panic!("{name} {fields} in {listed:?}"))["value"].clone()
    };
    for (name, fields, value) in [
        ("leases", json!({"pool": "rows", "state": "granted"}), 1),
        ("bytes", json!({"pool": "rows", "state": "granted"}), 32768),
        (
            "grants_total",
            json!({"pool": "rows", "result": "granted"}),
            2,
        ),
        ("grant_seconds_count", Value::Null, 2),
        ("revoke_stuck", Value::Null, 0),
    ] {
        assert_eq!(told(name, fields), value, "{name}");
    }
    assert!(told("grant_seconds_sum", Value::Null).as_f64().unwrap() > 0.0);
    // Each that is listed is described, once.
    let described = call("io.systemd.Metrics.Describe", true);
    let names = |answers: &[Value]| -> Vec<String> {
        let name = |answer: &Value| answer["parameters"]["name"].as_str().unwrap().to_owned();
        answers.iter().map(name).collect()
    };
    let all: BTreeSet<String> = names(&described).into_iter().collect();
    assert_eq!(all.len(), described.len());
    assert!(names(&listed).iter().all(|name| all.contains(name)));
    for answer in &described {
        let family = &answer["parameters"];
        assert!(["counter", "gauge"].contains(&family["type"].as_str().unwrap()));
        assert!(family["description"].as_str().unwrap().ends_with('.'));
    }
    for (method, more, error) in [
        ("io.systemd.Metrics.List", false, "ExpectedMore"),
        ("io.barlease.Leases.List", true, "MethodNotFound"),
        ("org.varlink.service.GetInfo", false, ""),
    ] {
        let answer = &call(method, more)[0];
        let said = answer["error"].as_str().unwrap_or_default();
        assert_eq!(said.trim_start_matches("org.varlink.service."), error);
    }
    holder.signal(Signal::TERM);
    waiter.signal(Signal::TERM);
}

#[test]
fn metrics_come_out_of_a_socket_of_systemds() {
    let daemon = Daemon::start();
    for _ in 0..2 {
        let answer = get_at(
            &daemon,
            "metrics.activated",
            "GET /metrics HTTP/1.0\r\n\r\n",
        );
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[test]
fn metrics_are_a_file_and_what_is_no_scrape_is_refused() {
    let daemon = Daemon::start();
    let file = daemon.directory.path().join("metrics.prom");
    until("there is a file", || file.exists());
    assert!(!samples(&fs::read_to_string(&file).unwrap()).is_empty());
    for (request, status) in [
        ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", "200"),
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "405"),
    ] {
        let answer = get(&daemon, request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(1 << 20));
    let mut socket = UnixStream::connect(daemon.directory.path().join("metrics.sock")).unwrap();
    // It is not read to its end.
    let _ = socket.write_all(long.as_bytes());
    let mut answer = String::new();
    let _ = socket.read_to_string(&mut answer);
    assert_eq!(answer, "");
    // A scraper that says nothing keeps no client waiting.
    let _silent = UnixStream::connect(daemon.directory.path().join("metrics.sock")).unwrap();
    daemon.text(&["lease", "acquire", "rows", "--", "true"]);
}

/// Debian's package `prometheus` has it. Where it is not to be had, `samples` judges alone.
#[test]
fn promtool_finds_nothing() {
    let promtool = std::env::var_os("PROMTOOL").unwrap_or_else(|| "promtool".into());
    if Command::new(&promtool).arg("--version").output().is_err() {
        return;
    }
    let (daemon, running) = busy();
    let mut check = Command::new(&promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let text = scrape(&daemon);
    check
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = check.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
    drop(running);
}

fn dist(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../dist")
        .join(name);
    fs::read_to_string(path).unwrap()
}

/// The metrics in an expression, without what a histogram adds.
fn named(expression: &str) -> BTreeSet<String> {
    let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    expression
        .split(|letter| !is_of_name(letter))
        .filter(|word| word.starts_with("barlease_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_dashboard_names_metrics_that_exist_and_all_of_them() {
    let (daemon, running) = busy();
    let samples = samples(&scrape(&daemon));
    let exist: BTreeSet<_> = samples
        .keys()
        .map(|name| name.split('{').next().unwrap().to_owned())
        .collect();
    let dashboard: Value = serde_json::from_str(&dist("grafana/barleased.json")).unwrap();
    let mut shown = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let names = named(target["expr"].as_str().unwrap());
            assert!(!names.is_empty(), "{target}");
            shown.extend(names);
        }
    }
    assert_eq!(
        shown.difference(&exist).collect::<Vec<_>>(),
        Vec::<&String>::new()
    );
    let ends = ["_sum", "_count"];
    let hidden = exist.difference(&shown);
    let hidden = hidden.filter(|name| !ends.iter().any(|end| name.ends_with(end)));
    assert_eq!(hidden.collect::<Vec<_>>(), Vec::<&String>::new());
    drop(running);
}

/// The fields of an entry of the journal.
fn fields(mut bytes: &[u8]) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'=' | b'\n')) {
        let name = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let value;
        if bytes[end] == b'=' {
            let length = bytes[end..].iter().position(|byte| *byte == b'\n').unwrap();
            value = &bytes[end + 1..end + length];
            bytes = &bytes[end + length + 1..];
        } else {
            let start = end + 9;
            let length = u64::from_le_bytes(bytes[end + 1..start].try_into().unwrap());
            let stop = start + usize::try_from(length).unwrap();
            value = &bytes[start..stop];
            assert_eq!(bytes[stop], b'\n');
            bytes = &bytes[stop + 1..];
        }
        let before = fields.insert(name, String::from_utf8(value.to_vec()).unwrap());
        assert!(before.is_none());
    }
    assert!(bytes.is_empty());
    fields
}

#[test]
fn the_journal_has_an_entry_with_fields_and_the_catalog_explains_it() {
    let directory = tempfile::tempdir().unwrap();
    let journal = UnixDatagram::bind(directory.path().join("journal")).unwrap();
    journal.set_read_timeout(Some(A_WHILE)).unwrap();
    let daemon = Daemon::start_in(directory);
    daemon.text(&["lease", "acquire", "rows", "4K", "--", "true"]);
    let injected = "x\nBARLEASE_UID=0";
    assert_eq!(daemon.failure(&["lease", "acquire", injected, "4K"]).0, 1);
    let file = daemon.directory.path().join("policy/a.toml");
    fs::write(&file, "nonsense").unwrap();
    assert_eq!(daemon.failure(&["broker", "reload"]).0, 1);
    let catalog = dist("journal/barleased.catalog");
    let uid = rustix::process::geteuid().as_raw().to_string();
    let mut entries: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    while !entries.contains_key("policy_refused") {
        let mut bytes = vec![0; 1 << 16];
        let length = journal.recv(&mut bytes).unwrap();
        let entry = fields(&bytes[..length]);
        assert!(
            catalog.contains(&format!("-- {}\n", entry["MESSAGE_ID"])),
            "{entry:?}"
        );
        assert_eq!(entry["SYSLOG_IDENTIFIER"], "barleased");
        entries.insert(entry["BARLEASE_KIND"].clone(), entry);
    }
    let granted = &entries["granted"];
    for (field, value) in [
        ("BARLEASE_LEASE", "1"),
        ("BARLEASE_POOL", "rows"),
        ("BARLEASE_DEVICE", "card"),
        ("BARLEASE_SIZE", "4096"),
        ("BARLEASE_UID", &uid),
        ("PRIORITY", "6"),
    ] {
        assert_eq!(granted[field], value, "{field}");
    }
    let refused = &entries["refused"];
    assert_eq!(refused["BARLEASE_ERROR"], "NoSuchPool");
    assert_eq!(
        (&refused["BARLEASE_POOL"][..], &refused["BARLEASE_UID"]),
        (injected, &uid)
    );
    assert_eq!(entries["ended"]["BARLEASE_REASON"], "holder_gone");
    assert!(entries["policy_refused"]["MESSAGE"].contains("a.toml"));
    assert!(entries.contains_key("device_opened") && entries.contains_key("revoked"));
}
