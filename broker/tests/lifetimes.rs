//! Leases that live by a control group or by a claim.

mod harness;

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use barlease_proto as proto;
use barlease_proto::Acquire;
use barlease_proto::Client;
use barlease_proto::Error;
use barlease_proto::Lifetime;
use barlease_proto::Reason;
use barlease_proto::Refusal;
use rustix::process::Pid;
use rustix::process::Signal;

use harness::Daemon;
use harness::PAGE;
use harness::client_at;
use harness::policy;
use harness::refusal;
use harness::rows;
use harness::until;

const RULES: &str = r#"
lifetime = ["connection", "cgroup", "claim"]

[[allow]]
pools = ["rows"]
who = { claim = "pod-*" }
access = "read-write"
lifetime = ["claim", "connection"]
max-leases = 2
"#;

const GROUP: &str = "BARLEASED_TEST_GROUP";

/// Not a test: the daemon.
#[test]
#[ignore = "the daemon of the other tests"]
fn daemon() {
    harness::serve();
}

/// Not a test: a process that moves to a control group, takes a lease that lives by it, and ends.
/// A process that it has started stays.
#[test]
#[ignore = "a client of the other tests"]
#[allow(
    clippy::zombie_processes,
    reason = "the test that started this kills it"
)]
fn member() {
    let (Some(directory), Some(group)) = (harness::directory(), std::env::var_os(GROUP)) else {
        return;
    };
    let processes = Path::new(&group).join("cgroup.procs");
    fs::write(processes, std::process::id().to_string()).unwrap();
    let mut client = Client::connect(directory.join("socket/leases.sock")).unwrap();
    client.acquire(&by(Lifetime::Cgroup)).unwrap();
    let null = || std::process::Stdio::null();
    let helper = Command::new("sleep")
        .arg("1000")
        .stdin(null())
        .stdout(null())
        .stderr(null())
        .spawn();
    println!("helper {}.", helper.unwrap().id());
}

fn by(lifetime: Lifetime) -> Acquire {
    Acquire {
        lifetime: Some(lifetime),
        ..rows(PAGE)
    }
}

/// A control group of version 2 of our own, if this host lets us make one.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut mounts = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mounts.find(|fields| fields[2] == "cgroup2")?[1].to_owned();
        let path = Path::new(&root).join(format!("barleased-{name}-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It has processes if the test has failed.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_lease_lives_as_long_as_anybody_in_its_control_group() {
    let daemon = Daemon::with(&policy(RULES), 4);
    let Some(group) = Group::new("lives") else {
        // No group but the root: then the refusal says what is missing.
        match refusal(daemon.client().acquire(&by(Lifetime::Cgroup))) {
            Refusal::Invalid { reason } => assert!(reason.contains("version 2"), "{reason}"),
            other => panic!("{other}"),
        }
        return;
    };
    let mut member = harness::command("member", daemon.directory.path());
    let output = member.env(GROUP, &group.0).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said} {output:?}");
    let (_, helper) = said.split_once("helper ").unwrap();
    let helper: i32 = helper.split_once('.').unwrap().0.parse().unwrap();
    // The process that asked is gone, and its connection.
    let leases = daemon.client().list(None).unwrap();
    assert_eq!((leases.len(), leases[0].lifetime), (1, Lifetime::Cgroup));
    let mut watch = daemon.client().watch(true).unwrap();
    // The watch has begun when the next call is answered.
    assert_eq!(daemon.leases().len(), 1);
    let helper = Pid::from_raw(helper).unwrap();
    rustix::process::kill_process(helper, Signal::KILL).unwrap();
    assert_eq!(
        watch.next().unwrap().unwrap().reason,
        Some(Reason::HolderGone)
    );
    until("it is gone", || daemon.leases().is_empty());
}

#[test]
fn a_group_that_is_removed_at_once_ends_its_leases() {
    let daemon = Daemon::with(&policy(RULES), 4);
    let Some(group) = Group::new("removed") else {
        return;
    };
    for _ in 0..2 {
        // The second is another group of the same path.
        let mut member = harness::command("member", daemon.directory.path());
        assert!(
            member
                .env(GROUP, &group.0)
                .output()
                .unwrap()
                .status
                .success()
        );
        assert_eq!(daemon.leases().len(), 1);
        fs::write(group.0.join("cgroup.kill"), "1").unwrap();
        until("it can be removed", || fs::remove_dir(&group.0).is_ok());
        until("its lease is gone", || daemon.leases().is_empty());
        fs::create_dir(&group.0).unwrap();
    }
}

fn open_claim(daemon: &Daemon, claim: &str) -> PathBuf {
    let claim = claim.to_owned();
    let opened = daemon.client().call(&proto::OpenClaim { claim }).unwrap();
    Path::new(&opened.directory).join("sock")
}

fn end_claim(daemon: &Daemon, claim: &str) -> Result<u64, Error> {
    let claim = claim.to_owned();
    let ended = daemon.client().call(&proto::EndClaim { claim });
    ended.map(|ended| ended.leases)
}

#[test]
fn a_claim_has_its_leases_until_it_ends() {
    let daemon = Daemon::with(&policy(RULES), 4);
    let socket = open_claim(&daemon, "pod-1");
    assert_eq!(open_claim(&daemon, "pod-1"), socket);
    let mut client = client_at(&socket);
    let (lasting, _fd) = client.acquire(&by(Lifetime::Claim)).unwrap();
    drop(client);
    let mut client = client_at(&socket);
    let listed = client.list(None).unwrap();
    assert_eq!(listed[0].lease, lasting.lease);
    assert_eq!(listed[0].holder.claim.as_deref(), Some("pod-1"));
    // Another connection of the claim is the same one.
    let (_, _fd) = client.acquire(&by(Lifetime::Connection)).unwrap();
    let limit = refusal(client.acquire(&by(Lifetime::Claim)));
    assert!(
        matches!(
            limit,
            Refusal::LimitReached {
                leases: Some(2),
                ..
            }
        ),
        "{limit}"
    );
    assert_eq!(end_claim(&daemon, "pod-1").unwrap(), 2);
    assert!(daemon.leases().is_empty());
    assert!(matches!(
        client.list(None),
        Err(Error::Closed | Error::Io { .. })
    ));
    assert!(UnixStream::connect(&socket).is_err());
    match end_claim(&daemon, "pod-1") {
        Err(Error::Refused(refusal)) => assert_eq!(refusal.to_string(), "there is no claim pod-1"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_claim_is_nobody_but_itself() {
    let daemon = Daemon::with(&policy(RULES), 4);
    let one = open_claim(&daemon, "pod-1");
    let (acquired, _fd) = client_at(&one).acquire(&by(Lifetime::Claim)).unwrap();
    let mut other = client_at(&open_claim(&daemon, "pod-2"));
    assert_eq!(other.list(None).unwrap(), []);
    let lease = acquired.lease;
    assert_eq!(
        refusal(other.release(lease)),
        Refusal::NoSuchLease { lease }
    );
    // The user is the daemon's own, which makes an administrator of whoever comes by its socket.
    let all = [
        refusal(other.call(&proto::Devices {})),
        refusal(other.call(&proto::Claims {})),
        refusal(other.call(&proto::EndClaim {
            claim: "pod-1".into(),
        })),
    ];
    assert_eq!(all, [const { Refusal::NotAdministrator {} }; 3]);
    let claims = daemon.client().call(&proto::Claims {}).unwrap().claims;
    assert_eq!(claims, ["pod-1", "pod-2"]);
    for name in ["", "..", "a/b", "*", &"x".repeat(65)] {
        let call = proto::OpenClaim {
            claim: name.to_owned(),
        };
        let refused = refusal(daemon.client().call(&call));
        assert!(
            matches!(refused, Refusal::Invalid { .. }),
            "{name}: {refused}"
        );
    }
    let unclaimed = refusal(daemon.client().acquire(&by(Lifetime::Claim)));
    assert!(
        unclaimed.to_string().contains("socket of a claim"),
        "{unclaimed}"
    );
}

#[test]
fn the_socket_of_a_claim_is_there_again_after_a_kill() {
    let mut daemon = Daemon::with(&policy(RULES), 4);
    let socket = open_claim(&daemon, "pod-1");
    let mut waiting = UnixStream::connect(&socket).unwrap();
    // A container has the directory.
    let inside = fs::File::open(socket.parent().unwrap()).unwrap();
    daemon.signal(Signal::KILL);
    daemon.end();
    let mut nothing = Vec::new();
    let _ = waiting.read_to_end(&mut nothing);
    daemon.again();
    let mounted = rustix::fs::fstat(&inside).unwrap().st_ino;
    let now = rustix::fs::stat(socket.parent().unwrap()).unwrap().st_ino;
    assert_eq!(mounted, now);
    let mut client = client_at(&socket);
    client.acquire(&by(Lifetime::Claim)).unwrap();
    assert_eq!(
        client.list(None).unwrap()[0].holder.claim.as_deref(),
        Some("pod-1")
    );
}
