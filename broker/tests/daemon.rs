//! The daemon as a process of its own, on a device of the library's feature `fake`, and clients.

mod harness;

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

use barlease::Lease;
use barlease_proto as proto;
use barlease_proto::Access;
use barlease_proto::Acquire;
use barlease_proto::Client;
use barlease_proto::Error;
use barlease_proto::Lifetime;
use barlease_proto::Reason;
use barlease_proto::Refusal;
use rustix::process::Signal;

use harness::A_WHILE;
use harness::CARD;
use harness::Daemon;
use harness::PAGE;
use harness::pid;
use harness::policy;
use harness::refusal;
use harness::rows;
use harness::start;
use harness::until;

/// Four units, of which one may have three.
const RULE: &str = r#"
max-bytes = "16K"
max-leases = 3
lifetime = ["connection", "process", "holders"]
queue = "30s"
"#;

/// Not a test: the process that the tests start as the daemon.
#[test]
#[ignore = "the daemon of the other tests"]
fn daemon() {
    harness::serve();
}

fn begin() -> Daemon {
    Daemon::with(&policy(RULE), 4)
}

/// Not a test: a process that has a lease for as long as it lives, and no connection.
#[test]
#[ignore = "a client of the other tests"]
fn holder() {
    let Some(directory) = harness::directory() else {
        return;
    };
    let mut client = Client::connect(directory.join("socket/leases.sock")).unwrap();
    let acquire = Acquire {
        lifetime: Some(Lifetime::Process),
        ..rows(PAGE)
    };
    let (_, _fd) = client.acquire(&acquire).unwrap();
    drop(client);
    println!("has it");
    thread::sleep(A_WHILE);
}

#[test]
fn a_lease_is_mapped_and_given_back() {
    let daemon = begin();
    let mut client = daemon.client();
    let (acquired, fd) = client.acquire(&rows(2 * PAGE)).unwrap();
    assert_eq!(acquired.size, 2 * PAGE);
    let lease = Lease::from_fd(fd).unwrap();
    let mapping = lease.map().unwrap();
    mapping.write(PAGE as usize, 7_u32).unwrap();
    assert_eq!(mapping.read::<u32>(PAGE as usize).unwrap(), 7);
    let listed = client.list(Some("rows".into())).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].lease, listed[0].holder.pid, listed[0].state),
        (acquired.lease, std::process::id(), proto::State::Granted)
    );
    client.release(acquired.lease).unwrap();
    assert_eq!(client.list(None).unwrap(), []);
    let again = refusal(client.release(acquired.lease));
    assert_eq!(again, Refusal::NoSuchLease { lease: 1 });
}

#[test]
fn a_refusal_names_the_holder_or_the_limit() {
    let daemon = begin();
    let (mut one, mut other) = (daemon.client(), daemon.client());
    let (all, _fd) = one.acquire(&rows(4 * PAGE)).unwrap();
    match refusal(other.acquire(&rows(PAGE))) {
        Refusal::LimitReached { bytes, have, .. } => {
            assert_eq!((bytes, have), (Some(4 * PAGE), 4 * PAGE));
        }
        other => panic!("{other}"),
    }
    one.release(all.lease).unwrap();
    let ranges = |offset| {
        let range = proto::Range {
            offset,
            length: PAGE,
        };
        Acquire::of_ranges("card", 2, vec![range], Access::ReadWrite)
    };
    let (first, _fd) = one.acquire(&ranges(0)).unwrap();
    match refusal(other.acquire(&ranges(0))) {
        Refusal::Busy { held_by, .. } => {
            assert_eq!(held_by.len(), 1);
            assert_eq!(held_by[0].lease, first.lease);
            assert_eq!(held_by[0].holder.pid, std::process::id());
        }
        other => panic!("{other}"),
    }
}

#[test]
fn whoever_waits_in_line_gets_what_a_connection_leaves() {
    let daemon = begin();
    let mut one = daemon.client();
    let range = proto::Range {
        offset: 0,
        length: PAGE,
    };
    let acquire = Acquire {
        wait: Some(60_000),
        ..Acquire::of_ranges("card", 2, vec![range], Access::Read)
    };
    let (_, _fd) = one.acquire(&acquire).unwrap();
    let mut other = daemon.client();
    let waiter = thread::spawn(move || other.acquire(&acquire).map(|(acquired, _)| acquired));
    until("somebody waits", || {
        let devices = daemon.client().call(&proto::Devices {}).unwrap().devices;
        devices[0].pools[0].waiting == 1
    });
    drop(one);
    assert_eq!(waiter.join().unwrap().unwrap().ranges, [range_at(0)]);
}

fn range_at(offset: u64) -> proto::Range {
    proto::Range {
        offset,
        length: PAGE,
    }
}

#[test]
fn the_death_of_a_process_ends_its_lease() {
    let daemon = begin();
    let mut holder = start("holder", daemon.directory.path());
    until("it has a lease", || daemon.leases().len() == 1);
    // Its connection is closed, or about to be: its lease does not end with that.
    until("its connection is closed", || {
        let mut said = vec![0; 4096];
        let read = holder.stdout.as_mut().unwrap().read(&mut said).unwrap();
        String::from_utf8_lossy(&said[..read]).contains("has it")
    });
    let mut watch = daemon.client().watch(true).unwrap();
    assert_eq!(daemon.leases().len(), 1);
    rustix::process::kill_process(pid(&holder), Signal::KILL).unwrap();
    let notice = watch.next().unwrap().unwrap();
    assert_eq!(notice.reason, Some(Reason::HolderGone));
    until("it is gone", || daemon.leases().is_empty());
    assert_eq!(holder.wait().unwrap().signal(), Some(9));
}

#[test]
fn silence_garbage_and_halves_hold_nobody_up() {
    let daemon = begin();
    let _silent = daemon.raw();
    let mut half = daemon.raw();
    half.write_all(br#"{"method":"io.barlease.Le"#).unwrap();
    for garbage in [&b"\0"[..], b"no JSON\0", b"[1]\0", b"\xff\xfe\0"] {
        let mut socket = daemon.raw();
        socket.write_all(garbage).unwrap();
        let mut nothing = Vec::new();
        // The end may come as a reset, for what it did not read.
        let _ = socket.read_to_end(&mut nothing);
        assert_eq!(nothing, b"");
    }
    // Calls without end, by somebody that never reads.
    let mut deaf = daemon.raw();
    deaf.set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let call = br#"{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"io.barlease.Leases"}}"#;
    let calls = [&call[..], b"\0"].concat().repeat(1000);
    while deaf.write_all(&calls).is_ok() {}
    let (_, _fd) = daemon.client().acquire(&rows(PAGE)).unwrap();
    // The half becomes a whole.
    half.write_all(b"ases.List\",\"more\":true}\0").unwrap();
    let mut answer = [0; 32];
    assert!(half.read(&mut answer).unwrap() > 0);
}

#[test]
fn more_bytes_than_a_call_has_end_the_connection() {
    let daemon = begin();
    let mut socket = daemon.raw();
    let chunk = vec![b' '; 1 << 20];
    let sent = (0..64).take_while(|_| socket.write_all(&chunk).is_ok());
    assert!(sent.count() < 64);
}

#[test]
fn a_lease_that_nobody_wants_is_taken_back() {
    let daemon = begin();
    let mut socket = daemon.raw();
    let call = r#"{"method":"io.barlease.Leases.Acquire","oneway":true,"parameters":
        {"pool":"rows","size":4096,"access":"read","lifetime":"holders"}}"#;
    socket.write_all(call.as_bytes()).unwrap();
    socket
        .write_all(b"\0{\"method\":\"org.varlink.service.GetInfo\"}\0")
        .unwrap();
    let mut answer = [0; 4096];
    let read = socket.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(answer.contains("barleased"), "{answer}");
    assert!(daemon.leases().is_empty());
}

#[test]
fn unknown_methods_are_errors_of_varlink() {
    let daemon = begin();
    for (method, error) in [
        ("io.barlease.Leases.Lend", "MethodNotFound"),
        ("io.barlease.Leases.Resume", "io.barlease.Leases.Invalid"),
        ("io.barlease.Leases.List", "ExpectedMore"),
        ("io.example.Leases.List", "InterfaceNotFound"),
        ("nonsense", "InterfaceNotFound"),
        ("io.barlease.Leases.Release", "io.barlease.Leases.Invalid"),
    ] {
        let mut socket = daemon.raw();
        write!(socket, "{{\"method\":\"{method}\"}}\0").unwrap();
        let mut answer = [0; 4096];
        let read = socket.read(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer[..read]);
        assert!(answer.contains(error), "{method}: {answer}");
    }
}

#[test]
fn administrators_explain_renew_revoke_and_drain() {
    let daemon = begin();
    let mut client = daemon.client();
    let explain = proto::Explain {
        pool: Some("rows".into()),
        size: Some(8 * PAGE),
        device: None,
        bar: None,
        ranges: None,
        access: Access::Read,
        memory_type: None,
        steering_tag: None,
        lifetime: None,
        as_uid: Some(4_000_000),
        as_unit: None,
        as_cgroup: None,
        as_claim: None,
    };
    let told = client.call(&explain).unwrap();
    assert!(!told.granted && told.rules[0].allows, "{told:?}");
    assert!(told.rules[0].file.ends_with("policy/a.toml"));
    let (one, _fd) = client.acquire(&rows(PAGE)).unwrap();
    let renewed = client.call(&proto::Renew {
        lease: one.lease,
        ttl: Some(60_000),
    });
    assert!(renewed.unwrap().expires.is_some());
    let mut revoke = proto::Revoke {
        lease: None,
        uid: None,
        pid: Some(std::process::id()),
        unit: None,
        claim: None,
        pool: None,
        all: None,
        grace: Some(0),
    };
    let other = &mut daemon.client();
    assert_eq!(other.call(&revoke).unwrap().leases, 1);
    assert!(daemon.leases().is_empty());
    revoke.all = Some(true);
    assert!(matches!(
        refusal(other.call(&revoke)),
        Refusal::Invalid { .. }
    ));
    let (_, _fd) = client.acquire(&rows(PAGE)).unwrap();
    let mut drain = proto::Drain {
        device: Some("disk".into()),
        grace: None,
    };
    let unknown = refusal(other.call(&drain));
    let disk = "disk".to_owned();
    assert_eq!(unknown, Refusal::NoSuchDevice { device: disk });
    drain.device = Some("card".into());
    other.call(&drain).unwrap();
    let state = |client: &mut Client| client.call(&proto::Devices {}).unwrap().devices[0].clone();
    assert_eq!(state(other).state, "absent");
    assert!(daemon.leases().is_empty());
    assert!(client.acquire(&rows(PAGE)).is_err());
    other.call(&proto::Reload {}).unwrap();
    assert_eq!(state(other).state, "open");
    client.acquire(&rows(PAGE)).unwrap();
}

#[test]
fn a_policy_that_is_wrong_leaves_the_old_one_in_force() {
    let daemon = begin();
    let file = daemon.directory.path().join("policy/a.toml");
    fs::write(&file, "[pool.rows]\ndevice = 7\n").unwrap();
    match refusal(daemon.client().call(&proto::Reload {})) {
        Refusal::PolicyInvalid { errors } => assert!(errors[0].contains("a.toml"), "{errors:?}"),
        other => panic!("{other}"),
    }
    daemon.signal(Signal::HUP);
    daemon.client().acquire(&rows(PAGE)).unwrap();
    // Now to one that allows nothing.
    fs::write(&file, CARD).unwrap();
    daemon.signal(Signal::HUP);
    until("the new policy is in force", || {
        matches!(
            daemon.client().acquire(&rows(PAGE)),
            Err(Error::Refused(refusal)) if matches!(*refusal, Refusal::NotAllowed { .. })
        )
    });
}

#[test]
fn one_daemon_serves_and_what_a_dead_one_left_is_replaced() {
    let mut daemon = begin();
    let second = daemon.second();
    let output = second.wait_with_output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another barleased serves there"), "{said}");
    daemon.client().acquire(&rows(PAGE)).unwrap();
    daemon.signal(Signal::KILL);
    daemon.end();
    assert!(daemon.socket().exists());
    daemon.again();
    daemon.client().acquire(&rows(PAGE)).unwrap();
}

#[test]
fn the_end_is_told_to_holders() {
    let mut daemon = begin();
    let mut client = daemon.client();
    let (acquired, _fd) = client.acquire(&rows(PAGE)).unwrap();
    let watch = daemon.client().watch(false).unwrap();
    // Its answer is that of the watch, too.
    daemon.client().list(None).unwrap();
    daemon.signal(Signal::TERM);
    assert!(daemon.end().success());
    assert!(!daemon.socket().exists());
    let told: Vec<_> = watch.map_while(Result::ok).collect();
    let is_told = |notice: &proto::Notice| {
        notice.lease == acquired.lease && notice.reason == Some(Reason::DeviceGoing)
    };
    assert!(told.iter().any(is_told), "{told:?}");
}

#[test]
fn a_device_that_says_nothing_of_itself_is_not_the_end_of_the_service() {
    let daemon = begin();
    let mut client = daemon.client();
    let drain = proto::Drain {
        device: None,
        grace: None,
    };
    client.call(&drain).unwrap();
    let broken = daemon.directory.path().join("broken");
    fs::write(&broken, "").unwrap();
    client.call(&proto::Reload {}).unwrap();
    let state = |client: &mut Client| client.call(&proto::Devices {}).unwrap().devices[0].clone();
    assert_eq!(state(&mut client).state, "absent");
    fs::remove_file(&broken).unwrap();
    client.call(&proto::Reload {}).unwrap();
    client.acquire(&rows(PAGE)).unwrap();
}
