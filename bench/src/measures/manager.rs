//! The service's manager: what a restart of the service costs systemd, process 1 of a guest of its own.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use barlease_proto::{Access, Acquire, Client, Devices, Lifetime, Reload};
use rustix::process::{Pid, Resource, Signal, getrlimit, setrlimit};

use super::Context;
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds, Side};

const UNIT: &str = "barleased.service";
const SOCKET: &str = "/run/barleased/leases.sock";
const POLICY: &str = "/etc/barlease/policy.d/a.toml";
const PAGE: u64 = 4096;
/// Leases, and the nanoseconds that process 1 may be busy whatever their number.
const LEASES: &[u64] = &[0, 1000, 10_000];
const MOST: f64 = 5e6;
/// After which process 1 has done all that there was to do.
const QUIET: Duration = Duration::from_millis(500);

/// The unit is installed and runs, with a pool `rows`.
pub(super) fn take(context: &Context) -> Vec<Measure> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("a limit");
    allow_many();
    let mut client = client();
    let mut leases = Vec::new();
    let mut rounds = Rounds::new(
        "service-manager",
        "Time that systemd is busy with a kill and a restart of the service",
        "5 ms",
        Unit::Nanoseconds,
    )
    .axis("leases");
    for count in LEASES {
        while (leases.len() as u64) < *count {
            leases.push(client.acquire(&lasting()).expect("a lease").1);
        }
        for _ in 0..context.rounds(9) {
            for (side, value) in [(Side::Ours, restart()), (Side::Theirs, MOST)] {
                let mut batch = Batch::default();
                batch.add("killed", *count, value);
                rounds.add(side, &batch);
            }
            client = self::client();
            let listed = client.list(None).expect("a list").len();
            assert_eq!(listed, leases.len(), "no lease is lost");
        }
    }
    vec![rounds.finish(|_, _| Some(Goal::AtMost(1.0)))]
}

/// The pool of the policy that is there, for as many leases as there are units.
fn allow_many() {
    let policy = fs::read_to_string(POLICY).expect("a policy");
    let many = policy.replace("max-bytes = \"64K\"", "");
    assert_ne!(policy, many, "it had a limit");
    fs::write(POLICY, many).expect("a policy");
    client().call(&Reload {}).expect("it is read");
    let drop_in = format!("/run/systemd/system/{UNIT}.d");
    fs::create_dir_all(&drop_in).expect("a folder");
    fs::write(
        format!("{drop_in}/often.conf"),
        "[Unit]\nStartLimitIntervalSec=0\n",
    )
    .expect("a file");
    systemctl(&["daemon-reload"]);
}

fn lasting() -> Acquire {
    Acquire {
        lifetime: Some(Lifetime::Holders),
        ..Acquire::of_pool("rows", PAGE, Access::ReadWrite)
    }
}

fn client() -> Client {
    let mut client = Client::connect(SOCKET).expect("a socket");
    client.call(&Devices {}).expect("an answer");
    client
}

fn systemctl(words: &[&str]) -> String {
    let output = Command::new("systemctl")
        .args(words)
        .output()
        .expect("systemctl");
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Nanoseconds that process 1 has run.
fn busy() -> f64 {
    let text = fs::read_to_string("/proc/1/schedstat").expect("its times");
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .expect("a number")
}

/// Kills the service, and tells how long process 1 was busy until all was as before.
fn restart() -> f64 {
    let pid = systemctl(&["show", "--value", "--property", "MainPID", UNIT]);
    let pid = Pid::from_raw(pid.parse().expect("a number")).expect("a process");
    thread::sleep(QUIET);
    let before = busy();
    rustix::process::kill_process(pid, Signal::KILL).expect("the service");
    // The socket is systemd's: who connects waits for the next one.
    while Client::connect(SOCKET)
        .and_then(|mut client| client.call(&Devices {}))
        .is_err()
    {
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(QUIET);
    busy() - before
}
