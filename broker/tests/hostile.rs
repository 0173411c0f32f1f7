//! Clients that mean harm, or do it without meaning to: each hurts itself, and nobody else.

mod harness;

use std::fs;
use std::io::IoSlice;
use std::io::Read;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use barlease_proto as proto;
use barlease_proto::Access;
use barlease_proto::Acquire;
use barlease_proto::Lifetime;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::process::Resource;

use harness::A_WHILE;
use harness::Daemon;
use harness::PAGE;
use harness::rows;
use harness::until;

const POLICY: &str = r#"
[device.card]
match = "0000:00:01.0"

[pool.rows]
device = "card"
bar = 2
unit = "4K"
contents = "memory"

[[allow]]
pools = ["rows"]
who = { user = "*" }
access = "read-write"
lifetime = ["connection", "holders"]
"#;

const INFO: &[u8] = b"{\"method\":\"org.varlink.service.GetInfo\"}\0";
const IDL: &[u8] = b"{\"method\":\"org.varlink.service.GetInterfaceDescription\",\
    \"parameters\":{\"interface\":\"io.barlease.Leases\"}}\0";

/// Not a test: the daemon.
#[test]
#[ignore = "the daemon of the other tests"]
fn daemon() {
    harness::serve();
}

/// Descriptors that the daemon has open.
fn descriptors(daemon: &Daemon) -> usize {
    let path = format!("/proc/{}/fd", daemon.child.id());
    fs::read_dir(path).unwrap().count()
}

/// Somebody else gets a lease, and gives it back.
fn is_served(daemon: &Daemon) {
    let mut client = daemon.client();
    let (acquired, _fd) = client.acquire(&rows(PAGE)).unwrap();
    client.release(acquired.lease).unwrap();
}

/// Whether the daemon has closed a connection, or does so in a while.
fn is_closed(mut socket: &UnixStream) -> bool {
    socket.set_read_timeout(Some(A_WHILE)).unwrap();
    let mut bytes = vec![0; 1 << 16];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

/// A socket of somebody that is no administrator, whatever user the tests run as.
fn claim(daemon: &Daemon) -> std::path::PathBuf {
    let claim = "pod".to_owned();
    let opened = daemon.client().call(&proto::OpenClaim { claim }).unwrap();
    std::path::Path::new(&opened.directory).join("sock")
}

#[test]
fn ten_thousand_idle_connections_hold_nobody_up() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    let possible = limit.maximum.unwrap_or(u64::MAX).saturating_sub(500);
    let daemon = Daemon::with(POLICY, 4);
    is_served(&daemon);
    let before = descriptors(&daemon);
    let idle: Vec<_> = (0..possible.min(10_000)).map(|_| daemon.raw()).collect();
    assert!(
        idle.len() >= 500,
        "{possible} descriptors are too few for this test"
    );
    is_served(&daemon);
    assert!(descriptors(&daemon) >= idle.len());
    drop(idle);
    until("all are gone", || descriptors(&daemon) <= before);
    is_served(&daemon);
}

#[test]
fn a_subject_has_256_connections_and_others_have_theirs() {
    let daemon = Daemon::with(POLICY, 4);
    let socket = claim(&daemon);
    let connect = || UnixStream::connect(&socket).unwrap();
    let answers = |mut one: &UnixStream| {
        one.set_read_timeout(Some(A_WHILE)).unwrap();
        one.write_all(INFO).is_ok() && matches!(one.read(&mut [0; 4096]), Ok(read) if read > 0)
    };
    let mut all: Vec<_> = (0..256).map(|_| connect()).collect();
    assert!(all.iter().all(answers));
    assert!(is_closed(&connect()));
    is_served(&daemon);
    all.pop();
    until("there is room for one", || answers(&connect()));
}

#[test]
fn a_daemon_without_descriptors_serves_the_clients_that_it_has() {
    let daemon = Daemon::limited(POLICY, 4, Some(64));
    let mut early = daemon.client();
    let many: Vec<_> = (0..100).map(|_| daemon.raw()).collect();
    // Those that do not fit wait, those that do are served.
    assert_eq!(early.list(None).unwrap(), []);
    let mut waiting = many.last().unwrap();
    waiting.write_all(INFO).unwrap();
    waiting
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    assert!(waiting.read(&mut [0; 64]).is_err());
    let refused = harness::refusal(early.acquire(&rows(PAGE)));
    assert!(
        matches!(refused, proto::Refusal::Failed { errno: 24, .. }),
        "{refused}"
    );
    assert_eq!(early.list(None).unwrap(), []);
    // As soon as there is room the last of them is.
    waiting.set_read_timeout(Some(A_WHILE)).unwrap();
    let (last, others) = many.split_last().unwrap();
    for one in others {
        one.shutdown(std::net::Shutdown::Both).unwrap();
    }
    assert!({ last }.read(&mut [0; 64]).unwrap() > 0);
    is_served(&daemon);
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let daemon = Daemon::with(POLICY, 4);
    is_served(&daemon);
    let mut flood = daemon.raw();
    flood.write_all(INFO).unwrap();
    assert!(flood.read(&mut [0; 4096]).unwrap() > 0);
    let before = descriptors(&daemon);
    let null = fs::File::open("/dev/null").unwrap();
    let fds = [null.as_fd(); 200];
    let mut most = 0;
    for _ in 0..50 {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(INFO)];
        rustix::net::sendmsg(&flood, &parts, &mut control, SendFlags::NOSIGNAL).unwrap();
        assert!(flood.read(&mut [0; 4096]).unwrap() > 0);
        most = most.max(descriptors(&daemon));
    }
    assert_eq!(most, before);
    is_served(&daemon);
}

#[test]
fn whoever_does_not_read_is_given_up_and_loses_what_it_had() {
    let daemon = Daemon::with(POLICY, 4);
    let mut deaf = daemon.raw();
    let acquire = br#"{"method":"io.barlease.Leases.Acquire","parameters":
        {"pool":"rows","size":4096,"access":"read"}}"#;
    deaf.write_all(acquire).unwrap();
    deaf.write_all(b"\0").unwrap();
    until("it has a lease", || daemon.leases().len() == 1);
    let began = Instant::now();
    deaf.set_nonblocking(true).unwrap();
    let calls = IDL.repeat(100);
    // Until neither side takes any more.
    let mut stuck = 0;
    while stuck < 20 {
        if matches!(deaf.write(&calls), Ok(written) if written > 0) {
            stuck = 0;
        } else {
            stuck += 1;
            thread::sleep(Duration::from_millis(10));
        }
    }
    is_served(&daemon);
    let mut other = daemon.client();
    until("its lease is taken back", || {
        other.list(None).unwrap().is_empty()
    });
    // Not sooner: a client that is slow is none that does not read.
    assert!(
        began.elapsed() > Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    deaf.set_nonblocking(false).unwrap();
    assert!(is_closed(&deaf));
}

#[test]
fn a_call_of_10_mib_is_answered_and_holds_nobody_up() {
    let daemon = Daemon::with(POLICY, 4);
    let mut large = daemon.raw();
    let half = vec![b' '; 5 << 20];
    large.write_all(&half).unwrap();
    is_served(&daemon);
    large.write_all(&half).unwrap();
    large.write_all(INFO).unwrap();
    assert!(large.read(&mut [0; 4096]).unwrap() > 0);
}

#[test]
fn a_subject_is_kept_so_many_bytes_for_and_no_more() {
    let daemon = Daemon::with(POLICY, 4);
    let socket = claim(&daemon);
    let half = vec![b' '; 12 << 20];
    let mut kept = Vec::new();
    // 12 MiB of half a call each: five fit.
    for _ in 0..8 {
        let mut socket = UnixStream::connect(&socket).unwrap();
        socket.set_write_timeout(Some(A_WHILE)).unwrap();
        if socket.write_all(&half).is_ok() {
            kept.push(socket);
        }
    }
    assert!((4..=6).contains(&kept.len()), "{}", kept.len());
    is_served(&daemon);
}

#[test]
fn whoever_sends_many_calls_at_once_gets_its_turn_like_others() {
    let daemon = Daemon::with(POLICY, 4);
    // Each has some hundred calls in one read.
    let floods: Vec<_> = (0..32)
        .map(|_| {
            let mut flood = daemon.raw();
            thread::spawn(move || {
                let calls = INFO.repeat(1500);
                let mut reader = flood.try_clone().unwrap();
                let drain = thread::spawn(move || {
                    let mut bytes = vec![0; 1 << 16];
                    while matches!(reader.read(&mut bytes), Ok(read) if read > 0) {}
                });
                for _ in 0..4 {
                    let _ = flood.write_all(&calls);
                }
                let _ = flood.shutdown(std::net::Shutdown::Write);
                let _ = drain.join();
            })
        })
        .collect();
    for _ in 0..20 {
        is_served(&daemon);
    }
    for flood in floods {
        flood.join().unwrap();
    }
}

#[test]
fn ten_thousand_requests_in_line_are_bounded() {
    let daemon = Daemon::with(&format!("{POLICY}queue = \"1m\"\n"), 4);
    let mut owner = daemon.client();
    let (_, _fd) = owner.acquire(&rows(4 * PAGE)).unwrap();
    let call = r#"{"method":"io.barlease.Leases.Acquire","parameters":
        {"pool":"rows","size":4096,"access":"read","wait":60000}}"#;
    let waiting: Vec<_> = (0..300)
        .map(|_| {
            let mut socket = daemon.raw();
            socket.write_all(call.as_bytes()).unwrap();
            socket.write_all(b"\0").unwrap();
            socket
        })
        .collect();
    // A user has 256 of them.
    let mut answer = [0; 4096];
    let read = { waiting.last().unwrap() }.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(answer.contains("QueueFull"), "{answer}");
    drop(waiting);
    until("nobody waits", || {
        let devices = daemon.client().call(&proto::Devices {}).unwrap().devices;
        devices[0].pools[0].waiting == 0
    });
    drop(owner);
    until("it is taken back", || daemon.leases().is_empty());
    let lasting = Acquire {
        lifetime: Some(Lifetime::Holders),
        ..Acquire::of_pool("rows", PAGE, Access::Read)
    };
    daemon.client().acquire(&lasting).unwrap();
}
