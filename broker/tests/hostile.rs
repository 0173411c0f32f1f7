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
use harness::policy;
use harness::rows;
use harness::until;

const RULE: &str = "lifetime = [\"connection\", \"process\", \"holders\"]";

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

/// Lets this process have as many descriptors as it may, and says how many.
fn raise_limit() -> u64 {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    limit.maximum.unwrap_or(u64::MAX)
}

#[test]
fn ten_thousand_idle_connections_hold_nobody_up() {
    let possible = raise_limit().saturating_sub(2500);
    let daemon = Daemon::with(&policy(RULE), 4);
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
    let daemon = Daemon::with(&policy(RULE), 4);
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
    let daemon = Daemon::limited(&policy(RULE), 4, Some(64));
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
    let daemon = Daemon::with(&policy(RULE), 4);
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
    let daemon = Daemon::with(&policy(RULE), 4);
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
    let daemon = Daemon::with(&policy(RULE), 4);
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
    let daemon = Daemon::with(&policy(RULE), 4);
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
    let daemon = Daemon::with(&policy(RULE), 4);
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
    let daemon = Daemon::with(&policy(&format!("{RULE}\nqueue = \"1m\"")), 4);
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

/// A call of a lease of a page, and one that gives a lease back.
fn pipelined(releases: u64) -> Vec<u8> {
    let acquire = r#"{"method":"io.barlease.Leases.Acquire","parameters":
        {"pool":"rows","size":4096,"access":"read"}}"#;
    let release = r#"{"method":"io.barlease.Leases.Release","parameters":{"lease":"#;
    format!("{acquire}\0{release}{releases}}}}}\0").into_bytes()
}

/// Reads so many answers, and closes the descriptors that come with them.
fn read_answers(mut socket: &UnixStream, count: usize) {
    socket.set_read_timeout(Some(A_WHILE)).unwrap();
    let mut ends = 0;
    while ends < count {
        let mut bytes = [0; 256];
        let read = socket.read(&mut bytes).unwrap();
        assert_ne!(read, 0, "{ends} of {count}");
        ends += bytes[..read].iter().filter(|byte| **byte == 0).count();
    }
}

#[test]
fn a_client_gets_no_descriptor_before_it_has_read_the_last_one() {
    let daemon = Daemon::with(&policy(RULE), 4);
    let mut client = daemon.client();
    let mut deaf = UnixStream::connect(claim(&daemon)).unwrap();
    for lease in 1..=50 {
        deaf.write_all(&pipelined(lease)).unwrap();
    }
    until("it has its first lease", || {
        !client.list(None).unwrap().is_empty()
    });
    // Each is a turn, in which it would have one more call.
    for _ in 0..20 {
        assert_eq!(client.list(None).unwrap()[0].lease, 1);
    }
    // It goes on as it reads, without anything else that wakes the daemon.
    read_answers(&deaf, 100);
    assert_eq!(client.list(None).unwrap(), []);
    let (next, _fd) = client.acquire(&rows(PAGE)).unwrap();
    assert_eq!(next.lease, 51);
}

#[test]
fn a_connection_counts_until_its_descriptor_is_read() {
    raise_limit();
    let daemon = Daemon::with(&policy(RULE), 300);
    let mut client = daemon.client();
    let socket = claim(&daemon);
    let acquire = pipelined(0);
    let acquire = acquire.split_inclusive(|byte| *byte == 0).next().unwrap();
    let deaf: Vec<_> = (0..256)
        .map(|_| {
            let mut deaf = UnixStream::connect(&socket).unwrap();
            deaf.write_all(acquire).unwrap();
            deaf
        })
        .collect();
    until("all have leases", || {
        client.list(None).unwrap().len() == 256
    });
    for one in &deaf {
        one.shutdown(std::net::Shutdown::Both).unwrap();
    }
    until("none has one", || client.list(None).unwrap().is_empty());
    let answers = |mut one: UnixStream| {
        one.set_read_timeout(Some(A_WHILE)).unwrap();
        one.write_all(INFO).is_ok() && matches!(one.read(&mut [0; 4096]), Ok(read) if read > 0)
    };
    let connect = || UnixStream::connect(&socket).unwrap();
    assert!(!answers(connect()), "256 of it are unread");
    is_served(&daemon);
    // One reads, another closes.
    let mut deaf = deaf.into_iter();
    read_answers(&deaf.next().unwrap(), 1);
    drop(deaf.next());
    let both = [connect(), connect()];
    assert!(both.into_iter().all(answers));
    assert!(deaf.count() == 254);
}

#[test]
fn an_answer_waits_while_the_kernel_takes_no_descriptors() {
    let daemon = Daemon::limited(&policy(RULE), 4, Some(64));
    let mut client = daemon.client();
    // Descriptors of the same user that nobody reads.
    let null = fs::File::open("/dev/null").unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    for _ in 0..70 {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [null.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(b"x")];
        rustix::net::sendmsg(&ours, &parts, &mut control, SendFlags::NOSIGNAL).unwrap();
    }
    let mut other = daemon.client();
    let asks = thread::spawn(move || other.acquire(&rows(PAGE)).map(|(acquired, _)| acquired));
    until("it has a lease", || client.list(None).unwrap().len() == 1);
    thread::sleep(Duration::from_millis(300));
    assert!(!asks.is_finished());
    // Clients that get no descriptor are served meanwhile.
    assert_eq!(client.list(None).unwrap().len(), 1);
    drop((ours, theirs));
    assert_eq!(asks.join().unwrap().unwrap().lease, 1);
}

/// Not a test: a process that takes a lease that lives by it, as soon as there is one for it.
#[test]
#[ignore = "a client of the other tests"]
fn holder() {
    let Some(directory) = harness::directory() else {
        return;
    };
    let mut client = harness::client_at(&directory.join("socket/leases.sock"));
    let acquire = Acquire {
        lifetime: Some(Lifetime::Process),
        ..rows(PAGE)
    };
    until("it has a lease", || client.acquire(&acquire).is_ok());
    thread::sleep(A_WHILE);
}

#[test]
fn a_process_that_cannot_be_watched_is_not_taken_for_dead() {
    let daemon = Daemon::limited(&policy(RULE), 4, Some(64));
    let mut client = daemon.client();
    // It has its device by then.
    client.list(None).unwrap();
    let before = descriptors(&daemon);
    let limit = |most: usize| {
        let most = Some(most as u64);
        let limit = rustix::process::Rlimit {
            current: most,
            maximum: Some(64),
        };
        let pid = harness::pid(&daemon.child.0);
        rustix::process::prlimit(Some(pid), Resource::Nofile, limit).unwrap();
    };
    let mut holder = harness::start("holder", daemon.directory.path());
    until("it connects", || descriptors(&daemon) > before);
    // As few as the lease needs for itself: none is left for its process.
    let connected = descriptors(&daemon);
    let mut most = connected - 1;
    until("it has a lease", || {
        most += 1;
        limit(most);
        thread::sleep(Duration::from_millis(100));
        !client.list(None).unwrap().is_empty()
    });
    thread::sleep(Duration::from_millis(100));
    assert_eq!(client.list(None).unwrap().len(), 1);
    limit(64);
    // It is watched by and by, so its end is noticed.
    holder.kill().unwrap();
    holder.wait().unwrap();
    until("its lease ends", || client.list(None).unwrap().is_empty());
}

#[test]
fn all_tenants_together_have_so_many_connections() {
    let text = format!("[tenants]\nmax-connections = 3\n{}", policy(RULE));
    let daemon = Daemon::with(&text, 4);
    let sockets = ["one", "two"].map(|claim| {
        let claim = claim.to_owned();
        let opened = daemon.client().call(&proto::OpenClaim { claim }).unwrap();
        std::path::Path::new(&opened.directory).join("sock")
    });
    let connect = |at: usize| UnixStream::connect(&sockets[at]).unwrap();
    let mut all = vec![connect(0), connect(0), connect(1)];
    for mut one in &all {
        one.write_all(INFO).unwrap();
        assert!(one.read(&mut [0; 4096]).unwrap() > 0);
    }
    assert!(is_closed(&connect(0)) && is_closed(&connect(1)));
    is_served(&daemon);
    all.pop();
    until("there is room for one", || {
        let mut one = connect(1);
        one.write_all(INFO).is_ok() && matches!(one.read(&mut [0; 4096]), Ok(read) if read > 0)
    });
}

#[test]
fn long_names_come_into_no_record() {
    let daemon = Daemon::with(&policy(RULE), 4);
    let mut monitor = daemon.raw();
    monitor
        .write_all(b"{\"method\":\"io.barlease.Leases.Monitor\",\"more\":true}\0")
        .unwrap();
    let mut client = daemon.client();
    let named = |length: usize| Acquire::of_pool("x".repeat(length), PAGE, Access::Read);
    for length in [256, 1 << 20] {
        let refused = harness::refusal(client.acquire(&named(length)));
        assert!(
            matches!(refused, proto::Refusal::Invalid { .. }),
            "{refused}"
        );
    }
    let refused = harness::refusal(client.acquire(&named(255)));
    assert!(
        matches!(refused, proto::Refusal::NoSuchPool { .. }),
        "{refused}"
    );
    // Those before it have left nothing long.
    let mut told = Vec::new();
    while !String::from_utf8_lossy(&told).contains("NoSuchPool") {
        let mut bytes = [0; 4096];
        let read = monitor.read(&mut bytes).unwrap();
        told.extend(&bytes[..read]);
    }
    assert!(told.len() < 4096, "{}", told.len());
}

#[test]
fn a_list_comes_in_parts_and_has_everything() {
    raise_limit();
    let daemon = Daemon::with(&policy(&format!("{RULE}\nqueue = \"1m\"")), 1200);
    let mut client = daemon.client();
    let lasting = Acquire {
        lifetime: Some(Lifetime::Holders),
        ..rows(PAGE)
    };
    let held: Vec<_> = (0..1199)
        .map(|_| client.acquire(&lasting).unwrap())
        .collect();
    let mut pod = harness::client_at(&claim(&daemon));
    let (own, _fd) = pod.acquire(&rows(PAGE)).unwrap();
    let wait = br#"{"method":"io.barlease.Leases.Acquire","parameters":
        {"pool":"rows","size":4096,"access":"read","wait":60000}}"#;
    let waiting: Vec<_> = (0..200)
        .map(|_| {
            let mut socket = daemon.raw();
            socket.write_all(wait).unwrap();
            socket.write_all(b"\0").unwrap();
            socket
        })
        .collect();
    until("they wait", || {
        let devices = client.call(&proto::Devices {}).unwrap().devices;
        devices[0].pools[0].waiting == 200
    });
    let ids: Vec<_> = client
        .list(None)
        .unwrap()
        .iter()
        .map(|lease| lease.lease)
        .collect();
    assert_eq!(ids, (1..=1200).collect::<Vec<_>>());
    let ids: Vec<_> = pod
        .list(None)
        .unwrap()
        .iter()
        .map(|lease| lease.lease)
        .collect();
    assert_eq!(ids, [own.lease]);
    assert_eq!(client.list(Some("other".into())).unwrap(), []);
    // Each message, with the requests in line.
    let mut socket = daemon.raw();
    let list = b"{\"method\":\"io.barlease.Leases.List\",\"more\":true}\0";
    socket.write_all(list).unwrap();
    let mut told = Vec::new();
    while !told.ends_with(b"\"waiter\":null}}\0") {
        let mut bytes = [0; 1 << 16];
        let read = socket.read(&mut bytes).unwrap();
        told.extend(&bytes[..read]);
    }
    let messages = told
        .split(|byte| *byte == 0)
        .filter(|text| !text.is_empty());
    let waiters = messages.filter(|text| String::from_utf8_lossy(text).contains("\"waiter\":{"));
    assert_eq!(waiters.count(), 200);
    drop((waiting, held));
}

/// Ticks of the processor that a process has had.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<_> = rest.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_client_that_comes_while_it_stops_keeps_it_from_nothing() {
    let mut daemon = Daemon::with(&policy(&format!("{RULE}\ngrace = \"3s\"")), 4);
    let mut client = daemon.client();
    let pod = claim(&daemon);
    let (_, _fd) = client.acquire(&rows(PAGE)).unwrap();
    let mut watch = daemon.client().watch(true).unwrap();
    daemon.client().list(None).unwrap();
    daemon.signal(rustix::process::Signal::TERM);
    let notice = watch.next().unwrap().unwrap();
    assert_eq!(notice.event, proto::Event::Reclaim);
    let _late = UnixStream::connect(daemon.socket()).unwrap();
    // Nobody listens there any more.
    assert!(UnixStream::connect(pod).is_err());
    let before = ticks(daemon.child.id());
    thread::sleep(Duration::from_secs(1));
    let used = ticks(daemon.child.id()) - before;
    assert!(used < 10, "{used} of 100 ticks");
    assert!(daemon.end().success());
}
