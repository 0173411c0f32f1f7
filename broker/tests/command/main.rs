//! The command `barlease` with the daemon, each a process of its own, on a fake device.

#[path = "../harness/mod.rs"]
mod harness;
mod seen;
mod top;

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::Output;
use std::process::Stdio;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;

use barlease::fake::FakeDevice;
use barleased::Passed;
use barleased::Surroundings;
use rustix::process::Pid;
use rustix::process::Signal;
use serde_json::Value;

use harness::A_WHILE;
use harness::DIRECTORY;
use harness::PAGE;
use harness::until;

const POLICY: &str = r#"
[device.card]
match = "0000:00:01.0"

[pool.rows]
device = "card"
bar = 2
length = "64K"
unit = "4K"
contents = "memory"

[pool.doorbells]
device = "card"
bar = 0
unit = "4K"

[[allow]]
pools = ["rows"]
who = { user = "*" }
access = "read-write"
max-bytes = "1M"
max-ttl = "1h"
lifetime = ["connection", "process", "holders"]
grace = "5s"
queue = "1min"
"#;

const ARGUMENTS: &str = "BARLEASED_TEST_ARGUMENTS";
/// How many descriptors the command may have.
const FILES: &str = "BARLEASED_TEST_FILES";
/// The output of the test harness comes before it, that of the command behind it.
const MARK: char = '\u{1e}';

/// Not a test: the process that the tests start as the daemon.
#[test]
#[ignore = "the daemon of the other tests"]
fn daemon() {
    let Some(directory) = harness::directory() else {
        return;
    };
    let card = FakeDevice::builder()
        .bar(0, 4 * PAGE)
        .bar(2, 32 * PAGE)
        .build()
        .unwrap();
    let directory = directory.to_str().unwrap();
    let args = [
        "barleased",
        "--policy",
        &format!("{directory}/policy"),
        "--socket",
        directory,
        "--journal",
        &format!("{directory}/journal"),
        "--metrics-file",
        &format!("{directory}/metrics.prom"),
        "--metrics-socket",
        &format!("{directory}/metrics.sock"),
    ];
    // As systemd makes them.
    let passed = ["report", "metrics"].map(|name| {
        let listener = UnixListener::bind(format!("{directory}/{name}.activated")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let name = name.to_owned();
        Passed {
            name,
            fd: listener.into(),
        }
    });
    let open = |_: &barlease_ledger::policy::Device| card.device().map_err(|e| e.to_string());
    let surroundings = Surroundings {
        passed: passed.into(),
        ..Surroundings::new(&open)
    };
    let code = barleased::run_in(args, surroundings);
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

/// Not a test: the process that the tests start as the command.
#[test]
#[ignore = "the command of the other tests"]
fn command() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else {
        return;
    };
    let arguments: Vec<String> = serde_json::from_str(&arguments).unwrap();
    if let Ok(files) = std::env::var(FILES) {
        let most = files.parse().ok();
        let limit = rustix::process::Rlimit {
            current: most,
            maximum: most,
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    }
    print!("{MARK}");
    std::io::Write::flush(&mut std::io::stdout()).unwrap();
    let code = barlease_cli::run([vec!["barlease".to_owned()], arguments].concat());
    // The code of a process cannot be read: it is asked for by what can be.
    let is = |number: u8| format!("{code:?}") == format!("{:?}", ExitCode::from(number));
    std::process::exit(
        (0..=u8::MAX)
            .find(|number| is(*number))
            .unwrap_or(255)
            .into(),
    );
}

fn start(name: &str) -> Command {
    // The command blocks signals in its first thread; the harness has threads of its own by then.
    let mut command = Command::new("env");
    command
        .arg("--block-signal=TERM")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

struct Daemon {
    directory: tempfile::TempDir,
    _child: harness::Running,
}

impl Daemon {
    fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    fn start_in(directory: tempfile::TempDir) -> Self {
        fs::create_dir(directory.path().join("policy")).unwrap();
        fs::write(directory.path().join("policy/a.toml"), POLICY).unwrap();
        let child = start("daemon")
            .env(DIRECTORY, directory.path())
            .spawn()
            .unwrap();
        let daemon = Self {
            directory,
            _child: harness::Running(child),
        };
        until("it serves", || daemon.run(&["broker"]).status.success());
        daemon
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = start("command");
        command
            .env(ARGUMENTS, serde_json::to_string(arguments).unwrap())
            .env("BARLEASE_SOCKET", self.directory.path().join("leases.sock"))
            // The leases of a fake are no dma-bufs.
            .env("BARLEASE_ANY_FILE", "1");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut output = self.command(arguments).output().unwrap();
        output.stdout = said(&output.stdout).into_bytes();
        output
    }

    /// The text of a command that succeeds.
    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.text(arguments)).unwrap()
    }

    /// The exit code and the message of a command that fails.
    fn failure(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.run(arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), message)
    }

    fn spawn(&self, arguments: &[&str]) -> Running {
        let mut child = self.command(arguments).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        lines.read_until(MARK as u8, &mut Vec::new()).unwrap();
        Running { child, lines }
    }

    fn leases(&self) -> Vec<Value> {
        let list = self.json(&["lease", "list", "--json"]);
        list.as_array().unwrap().clone()
    }
}

/// A command that runs.
struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }

    fn json(&mut self) -> Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self) -> (i32, String) {
        let mut said = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        (self.child.wait().unwrap().code().unwrap(), said)
    }
}

fn said(stdout: &[u8]) -> String {
    let text = String::from_utf8_lossy(stdout);
    let (_, text) = text.split_once(MARK).unwrap_or_default();
    text.to_owned()
}

#[test]
fn a_command_runs_with_a_lease_that_ends_with_it() {
    let daemon = Daemon::start();
    let script = "test -e /proc/self/fd/$BARLEASE_FD && echo lease $BARLEASE_LEASE && cat";
    let mut command = daemon.command(&[
        "lease", "acquire", "rows", "8K", "--ttl", "10m", "--", "sh", "-c", script,
    ]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    lines.read_until(MARK as u8, &mut Vec::new()).unwrap();
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "lease 1\n");
    let leases = daemon.leases();
    let lease = &leases[0];
    assert_eq!(leases.len(), 1);
    for (key, value) in [
        ("lease", Value::from(1)),
        ("pool", "rows".into()),
        ("bar", 2.into()),
        ("size", 8192.into()),
        ("access", "read-write".into()),
        ("pid", child.id().into()),
        ("state", "granted".into()),
        ("command", "sh".into()),
        ("mappings", 0.into()),
        ("attachments", 0.into()),
    ] {
        assert_eq!(lease[key], value, "{key}");
    }
    assert!((1..=600_000).contains(&lease["ttl_ms"].as_u64().unwrap()));
    // It reads to the end of its input.
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    until("its lease ends", || daemon.leases().is_empty());
}

#[test]
fn a_lease_that_finds_no_room_for_its_descriptor_is_given_back_and_that_is_said() {
    let daemon = Daemon::start();
    let mut told = 0;
    for files in 4..40 {
        let arguments = ["lease", "acquire", "rows", "8K", "--", "true"];
        let mut command = daemon.command(&arguments);
        let output = command.env(FILES, files.to_string()).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!error.contains("not understood"), "{files}: {error}");
        told += usize::from(error.contains("receive the descriptor of a lease: "));
        until("its lease is given back", || daemon.leases().is_empty());
        if output.status.success() {
            assert!(told > 0, "{files} descriptors are enough");
            return;
        }
        // Of the command, or of what loads the program that it runs.
        assert!(error.contains("rror 24"), "{files}: {error}");
    }
    panic!("no number of descriptors is enough");
}

#[test]
fn a_lease_is_held_renewed_and_given_back() {
    let daemon = Daemon::start();
    let mut one = daemon.spawn(&["lease", "acquire", "rows", "--json"]);
    let granted = one.json();
    assert_eq!(granted["event"], "granted");
    assert_eq!(granted["size"], 64 << 10);
    let renewed = daemon.json(&["lease", "renew", "1", "--ttl", "10m", "-j"]);
    assert!(renewed["ttl_ms"].as_u64().unwrap() <= 600_000);
    // Somebody waits, and gets it when it is given back.
    let mut other = daemon.spawn(&["lease", "acquire", "rows", "4K", "--wait", "1m"]);
    until("somebody waits", || daemon.leases().len() == 2);
    let waiter = &daemon.leases()[1];
    assert_eq!(
        (&waiter["state"], &waiter["lease"]),
        (&"waiting".into(), &Value::Null)
    );
    assert_eq!(waiter["pid"], other.child.id());
    assert_eq!(daemon.json(&["broker", "-j"])[0]["pools"][1]["waiting"], 1);
    one.signal(Signal::TERM);
    assert_eq!(one.end(), (0, String::new()));
    let line = other.line();
    assert!(
        line.starts_with("granted lease 2 of card BAR 2 0x0+0x1000"),
        "{line}"
    );
    let table = daemon.text(&["lease", "list", "--pool", "rows"]);
    let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..6], ["2", "rows", "card", "2", "0x0+0x1000", "0x1000"]);
    assert_eq!(daemon.text(&["lease", "release", "2"]), "");
    let (code, said) = other.end();
    assert_eq!(code, 1);
    assert!(said.contains("lease 2: released"), "{said}");
}

#[test]
fn refusals_say_whose_it_is_in_text_and_json() {
    let daemon = Daemon::start();
    let mut holder = daemon.spawn(&["lease", "acquire", "rows"]);
    assert!(holder.line().starts_with("granted"));
    let (code, said) = daemon.failure(&["lease", "acquire", "rows", "4K", "--", "true"]);
    assert_eq!(code, 1);
    let pid = holder.child.id();
    assert!(said.contains("acquire: rows: others have it"), "{said}");
    assert!(said.contains(&format!("(pid {pid}")), "{said}");
    let output = daemon.run(&["lease", "acquire", "rows", "4K", "-j"]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["exit_code"], 1);
    assert_eq!(told["details"]["error"], "Busy");
    let held = &told["details"]["parameters"]["heldBy"][0];
    assert_eq!(held["holder"]["pid"], pid);
    let (code, said) = daemon.failure(&["lease", "acquire", "doorbells", "4K"]);
    assert_eq!(code, 1);
    assert!(said.contains("no rule allows it: pool doorbells"), "{said}");
    assert!(said.contains("barlease policy explain"), "{said}");
    for wrong in [
        &["lease", "acquire"][..],
        &["lease", "acquire", "rows", "--device", "card"],
        &["lease", "acquire", "--device", "card", "--bar", "2"],
        &["lease", "revoke"],
        &["lease", "revoke", "7", "--all"],
    ] {
        assert_eq!(daemon.failure(wrong).0, 2, "{wrong:?}");
    }
}

#[test]
fn what_is_reclaimed_is_told_with_its_deadline() {
    let daemon = Daemon::start();
    let mut watch = daemon.spawn(&["lease", "watch", "-j"]);
    let mut monitor = daemon.spawn(&["monitor"]);
    // Their answers begin with what comes next, so something comes until they have begun.
    let begun = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !begun.load(Ordering::Relaxed) {
                daemon.text(&["lease", "acquire", "rows", "4K", "--", "true"]);
            }
        });
        watch.json();
        monitor.json();
        begun.store(true, Ordering::Relaxed);
    });
    until("those leases end", || daemon.leases().is_empty());
    let device = [
        "lease",
        "acquire",
        "--device",
        "card",
        "--bar",
        "2",
        "--range",
        "4K+8K",
        "--read-only",
    ];
    let mut holder = daemon.spawn(&device);
    let line = holder.line();
    assert!(
        line.contains("0x1000+0x2000 (0x2000 bytes, nc, read)"),
        "{line}"
    );
    let lease: u64 = line.split(' ').nth(2).unwrap().parse().unwrap();
    let of_it = |running: &mut Running| loop {
        let told = running.json();
        if told["lease"] == lease || told["kind"] == "revoke-asked" {
            break told;
        }
    };
    assert_eq!(of_it(&mut watch)["event"], "granted");
    let text = daemon.text(&["lease", "revoke", "--pool", "rows"]);
    assert_eq!(text, "revoking 1 leases\n");
    let notice = watch.json();
    assert_eq!(
        (&notice["event"], &notice["reason"]),
        (&"reclaim".into(), &"revoked".into())
    );
    let left = notice["deadline_ms"].as_u64().unwrap();
    assert!((1..=5000).contains(&left), "{left}");
    let line = holder.line();
    let expected = format!("lease {lease} reclaim: revoked, revoked in ");
    assert!(line.starts_with(&expected), "{line}");
    // No grace any more.
    daemon.text(&["lease", "revoke", &lease.to_string(), "--grace", "0"]);
    assert_eq!(watch.json()["event"], "revoked");
    let (code, said) = holder.end();
    assert_eq!(code, 1);
    assert!(
        said.contains(&format!("acquire: lease {lease}: revoked")),
        "{said}"
    );
    let mut kinds = Vec::new();
    while kinds.last().is_none_or(|kind| kind != "ended") {
        let record = of_it(&mut monitor);
        assert!(!record["message"].as_str().unwrap().is_empty());
        if record["kind"] == "granted" {
            assert_eq!(
                (&record["pool"], &record["size"]),
                (&"rows".into(), &8192.into())
            );
            assert_eq!(record["uid"], rustix::process::geteuid().as_raw());
        }
        kinds.push(record["kind"].as_str().unwrap().to_owned());
    }
    let expected = [
        "granted",
        "revoke-asked",
        "reclaim",
        "revoke-asked",
        "revoked",
        "ended",
    ];
    assert_eq!(kinds, expected);
    watch.signal(Signal::KILL);
    monitor.signal(Signal::KILL);
}

#[test]
fn administrators_drain_and_reload() {
    let daemon = Daemon::start();
    let table = daemon.text(&["broker"]);
    let row: Vec<&str> = table.lines().nth(2).unwrap().split_whitespace().collect();
    let expected = [
        "card",
        "0000:00:00.0",
        "open",
        "rows",
        "2",
        "0x0+0x10000",
        "0x1000",
        "0x10000",
        "0x10000",
        "0",
    ];
    assert_eq!(row[0], expected[0]);
    assert_eq!(row[2..], expected[2..]);
    let mut holder = daemon.spawn(&["lease", "acquire", "rows"]);
    assert!(holder.line().starts_with("granted"));
    daemon.text(&["broker", "drain", "card", "--grace", "0"]);
    let (code, said) = holder.end();
    assert_eq!((code, said.contains("device-going")), (1, true), "{said}");
    assert_eq!(daemon.json(&["broker", "-j"])[0]["state"], "absent");
    let (code, said) = daemon.failure(&["broker", "drain", "disk"]);
    assert_eq!(code, 1);
    assert!(
        said.contains("drain: disk: there is no device disk"),
        "{said}"
    );
    daemon.text(&["broker", "reload"]);
    assert_eq!(daemon.json(&["broker", "-j"])[0]["state"], "open");
    let file = daemon.directory.path().join("policy/a.toml");
    fs::write(&file, "[pool.rows]\ndevice = \"none\"\nbar = 9\nunit = 1\n").unwrap();
    let (code, said) = daemon.failure(&["broker", "reload"]);
    assert_eq!(code, 1);
    assert!(said.contains("the old one stays in force"), "{said}");
    assert!(
        said.contains("a.toml:2: pool.rows.device: there is no device none"),
        "{said}"
    );
    daemon.text(&["lease", "acquire", "rows", "--", "true"]);
}

#[test]
fn the_service_explains_and_knows_who_has_it() {
    let daemon = Daemon::start();
    let explain = |more: &[&str]| {
        let arguments = [&["policy", "explain", "--as-uid", "4000000", "-j"], more].concat();
        let output = daemon.run(&arguments);
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), told)
    };
    let (code, told) = explain(&["rows", "4K"]);
    assert_eq!((code, &told["granted"]), (Some(0), &true.into()));
    let file = told["rules"][0]["file"].as_str().unwrap();
    assert!(file.ends_with("policy/a.toml"), "{file}");
    let mut holder = daemon.spawn(&["lease", "acquire", "rows"]);
    assert!(holder.line().starts_with("granted"));
    let (code, told) = explain(&["rows", "4K"]);
    assert_eq!((code, &told["granted"]), (Some(1), &false.into()));
    assert_eq!(told["held_by"][0]["holder"]["pid"], holder.child.id());
    let (code, told) = explain(&["doorbells", "--unit", "a.service"]);
    assert_eq!((code, &told["rules"]), (Some(1), &Value::Array(vec![])));
}

#[test]
fn a_service_that_is_not_there_is_said_with_a_remedy() {
    let daemon = Daemon::start();
    for arguments in [
        &["lease", "list"][..],
        &["lease", "acquire", "rows"],
        &["lease", "watch"],
        &["lease", "revoke", "--all"],
        &["broker"],
        &["monitor"],
    ] {
        let arguments = [arguments, &["--service", "/nonexistent/leases.sock"]].concat();
        let (code, said) = daemon.failure(&arguments);
        assert_eq!(code, 1);
        assert!(said.contains("connect: /nonexistent/leases.sock"), "{said}");
        assert!(said.contains("systemctl status barleased"), "{said}");
    }
}
