use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use serde_json::json;

use super::*;

/// The declarations of the IDL: kind and name, and the names of fields or values.
fn declared() -> BTreeMap<(String, String), BTreeSet<String>> {
    let text: String = IDL
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join(" ");
    let mut all = BTreeMap::new();
    let mut rest = text.as_str();
    while let Some(open) = rest.find('(') {
        let head: Vec<&str> = rest[..open].split_whitespace().collect();
        let close = open + rest[open..].find(')').unwrap();
        let fields = rest[open + 1..close]
            .split(',')
            .map(|field| field.split(':').next().unwrap().trim().to_owned())
            .filter(|field| !field.is_empty())
            .collect();
        let key = match head[..] {
            [.., "->"] => ("reply".to_owned(), last_method(&all)),
            [.., kind, name] => (kind.to_owned(), name.to_owned()),
            _ => panic!("{head:?}"),
        };
        LAST.with(|last| last.replace(key.clone()));
        all.insert(key, fields);
        rest = &rest[close + 1..];
    }
    all
}

thread_local! {
    static LAST: std::cell::RefCell<(String, String)> = const {
        std::cell::RefCell::new((String::new(), String::new()))
    };
}

fn last_method(_: &BTreeMap<(String, String), BTreeSet<String>>) -> String {
    LAST.with(|last| last.borrow().1.clone())
}

fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

fn range() -> Range {
    Range {
        offset: 0x1000,
        length: 0x2000,
    }
}

fn holder() -> Holder {
    Holder {
        uid: 1001,
        gid: 100,
        pid: 7,
        unit: Some("a.service".into()),
        claim: None,
    }
}

fn held() -> HeldBy {
    HeldBy {
        lease: 3,
        holder: holder(),
        range: range(),
        size: 0x2000,
        since: 1,
        expires: None,
        revoked: false,
    }
}

fn acquired() -> Acquired {
    Acquired {
        lease: 7,
        file_descriptor: 0,
        device: "card".into(),
        bar: 2,
        ranges: vec![range()],
        size: 0x2000,
        access: Access::ReadWrite,
        memory_type: MemoryType::Nc,
        expires: None,
        grace: 5000,
    }
}

fn info() -> LeaseInfo {
    LeaseInfo {
        lease: 7,
        pool: "rows".into(),
        device: "card".into(),
        bar: 2,
        ranges: vec![range()],
        size: 0x2000,
        access: Access::Read,
        memory_type: MemoryType::Wc,
        lifetime: Lifetime::Cgroup,
        holder: holder(),
        state: State::Granted,
        reasons: 0,
        reason: None,
        since: 1,
        expires: Some(9),
        deadline: None,
        usage: Some(usage()),
    }
}

fn usage() -> Usage {
    Usage {
        mappings: 2,
        attachments: 1,
    }
}

fn waiter() -> Waiter {
    Waiter {
        pool: "rows".into(),
        size: Some(1),
        ranges: None,
        access: Access::Read,
        holder: holder(),
        deadline: 9,
    }
}

fn record() -> Record {
    Record {
        kind: RecordKind::Granted,
        time: 1,
        message: String::new(),
        lease: Some(7),
        pool: None,
        device: None,
        bar: None,
        size: None,
        holder: Some(holder()),
        reason: None,
        reasons: None,
        deadline: None,
        error: None,
    }
}

fn explain() -> Explain {
    Explain {
        pool: Some("rows".into()),
        size: None,
        device: None,
        bar: None,
        ranges: None,
        access: Access::Read,
        memory_type: None,
        steering_tag: Some(SteeringTag {
            tag: Some(1),
            extended: None,
            hint: 0,
        }),
        lifetime: Some(Lifetime::Holders),
        as_uid: None,
        as_unit: None,
        as_cgroup: None,
        as_claim: None,
    }
}

#[test]
fn the_idl_and_the_types_have_the_same_fields() {
    let declared = declared();
    let mut seen = BTreeSet::new();
    let mut check = |kind: &str, name: &str, value: Value| {
        let key = (kind.to_owned(), name.to_owned());
        assert_eq!(declared.get(&key), Some(&keys(&value)), "{kind} {name}");
        seen.insert(key);
    };
    let value = |value: &dyn erased::Json| value.json();
    let rule = Rule {
        file: String::new(),
        line: 1,
        allows: true,
        why: None,
    };
    let pool = PoolInfo {
        name: String::new(),
        bar: 2,
        at: 0,
        length: 1,
        unit: 1,
        size: 1,
        free: 1,
        waiting: 0,
    };
    let device = DeviceInfo {
        name: String::new(),
        address: None,
        state: String::new(),
        bars: vec![0; 6],
        pools: vec![pool.clone()],
    };
    for (name, json) in [
        ("Range", value(&range())),
        (
            "SteeringTag",
            value(&SteeringTag {
                tag: None,
                extended: None,
                hint: 0,
            }),
        ),
        ("Holder", value(&holder())),
        ("HeldBy", value(&held())),
        ("LeaseInfo", value(&info())),
        ("Usage", value(&usage())),
        ("Waiter", value(&waiter())),
        ("Record", value(&record())),
        ("Rule", value(&rule)),
        ("PoolInfo", value(&pool)),
        ("DeviceInfo", value(&device)),
    ] {
        check("type", name, json);
    }
    let text = String::new;
    let revoke = Revoke {
        lease: None,
        uid: None,
        pid: None,
        unit: None,
        claim: None,
        pool: None,
        all: None,
        grace: None,
    };
    for (name, json) in [
        (
            Acquire::NAME,
            value(&Acquire::of_pool("p", 1, Access::Read)),
        ),
        (Release::NAME, value(&Release { lease: 1 })),
        (
            Renew::NAME,
            value(&Renew {
                lease: 1,
                ttl: None,
            }),
        ),
        (Token::NAME, value(&Token {})),
        (
            Resume::NAME,
            value(&Resume {
                token: String::new(),
            }),
        ),
        (Watch::NAME, value(&Watch { all: None })),
        (
            List::NAME,
            value(&List {
                pool: None,
                usage: None,
            }),
        ),
        (Monitor::NAME, value(&Monitor {})),
        (Explain::NAME, value(&explain())),
        (Revoke::NAME, value(&revoke)),
        (
            Drain::NAME,
            value(&Drain {
                device: None,
                grace: None,
            }),
        ),
        (Reload::NAME, value(&Reload {})),
        (Devices::NAME, value(&Devices {})),
        (OpenClaim::NAME, value(&OpenClaim { claim: text() })),
        (EndClaim::NAME, value(&EndClaim { claim: text() })),
        (Claims::NAME, value(&Claims {})),
        (
            Adopt::NAME,
            value(&Adopt {
                device: String::new(),
                file_descriptor: 0,
            }),
        ),
    ] {
        check("method", name, json);
    }
    let notice = Notice {
        lease: 1,
        event: Event::Reclaim,
        reason: None,
        deadline: None,
        reasons: None,
    };
    let explained = Explained {
        granted: true,
        why: None,
        pool: None,
        rules: vec![rule],
        held_by: vec![held()],
        waiting: 0,
    };
    for (name, json) in [
        ("Acquire", value(&acquired())),
        ("Release", value(&Nothing {})),
        ("Renew", value(&Renewed { expires: None })),
        (
            "Token",
            value(&Secret {
                token: String::new(),
            }),
        ),
        ("Resume", value(&Resumed { leases: vec![1] })),
        ("Watch", value(&notice)),
        (
            "List",
            value(&Listed {
                lease: Some(info()),
                waiter: None,
            }),
        ),
        ("Explain", value(&explained)),
        ("Revoke", value(&Revoked { leases: 1 })),
        ("Drain", value(&Nothing {})),
        ("Reload", value(&Nothing {})),
        (
            "Devices",
            value(&DeviceList {
                devices: vec![device],
                policy_errors: Some(vec![text()]),
            }),
        ),
        ("OpenClaim", value(&Claim { directory: text() })),
        ("EndClaim", value(&Revoked { leases: 1 })),
        ("Claims", value(&ClaimList { claims: vec![] })),
        ("Monitor", value(&Told { record: record() })),
        ("Adopt", value(&Nothing {})),
    ] {
        check("reply", name, json);
    }
    for refusal in refusals() {
        let json = value(&refusal);
        check(
            "error",
            json["error"].as_str().unwrap(),
            json["parameters"].clone(),
        );
    }
    let choices = [
        "Access",
        "MemoryType",
        "Lifetime",
        "Reason",
        "Event",
        "State",
        "RecordKind",
    ];
    for name in choices {
        seen.insert(("type".to_owned(), name.to_owned()));
    }
    let all: BTreeSet<_> = declared.keys().cloned().collect();
    assert_eq!(
        all, seen,
        "something is declared that has no type, or the other way round"
    );
}

/// To have values of many types in one list.
mod erased {
    pub(super) trait Json {
        fn json(&self) -> serde_json::Value;
    }

    impl<T: serde::Serialize> Json for T {
        fn json(&self) -> serde_json::Value {
            serde_json::to_value(self).unwrap()
        }
    }
}

#[test]
fn the_idl_has_every_value_of_every_choice() {
    fn all<T: serde::de::DeserializeOwned>(name: &str) -> usize {
        let values = declared()[&("type".to_owned(), name.to_owned())].clone();
        for value in &values {
            let json = Value::String(value.clone());
            assert!(serde_json::from_value::<T>(json).is_ok(), "{name}: {value}");
        }
        values.len()
    }
    // The numbers are those of the types: a value that the IDL has not would make one more.
    assert_eq!(all::<Access>("Access"), 2);
    assert_eq!(all::<MemoryType>("MemoryType"), 2);
    assert_eq!(all::<Lifetime>("Lifetime"), Lifetime::Holders as usize + 1);
    assert_eq!(all::<Reason>("Reason"), Reason::Inconsistent as usize + 1);
    assert_eq!(all::<Event>("Event"), Event::Ended as usize + 1);
    assert_eq!(all::<State>("State"), State::Revoking as usize + 1);
}

fn refusals() -> Vec<Refusal> {
    let text = String::new;
    vec![
        Refusal::NoSuchPool { pool: text() },
        Refusal::NoSuchDevice { device: text() },
        Refusal::NoSuchLease { lease: 1 },
        Refusal::NoSuchClaim { claim: text() },
        Refusal::OutsidePools {
            device: text(),
            bar: 0,
        },
        Refusal::Invalid { reason: text() },
        Refusal::NotAllowed { pool: text() },
        Refusal::NotOffered {
            pool: text(),
            reason: text(),
        },
        Refusal::LimitReached {
            rule: text(),
            leases: Some(4),
            bytes: None,
            have: 4,
        },
        Refusal::Busy {
            held_by: vec![held()],
            waiting: 1,
            timed_out: false,
        },
        Refusal::QueueFull {},
        Refusal::DeviceGoing { device: text() },
        Refusal::Ending { lease: 1 },
        Refusal::Cancelled {
            reason: Reason::Expired,
        },
        Refusal::Failed {
            operation: text(),
            errno: 5,
        },
        Refusal::NothingToResume {},
        Refusal::NotAdministrator {},
        Refusal::PolicyInvalid { errors: vec![] },
    ]
}

/// A service that answers with these messages, one after each call, and returns the calls.
fn serve(
    answers: Vec<(Vec<u8>, Vec<OwnedFd>)>,
) -> (Client, thread::JoinHandle<Vec<(Value, usize)>>) {
    let (here, there) = UnixStream::pair().unwrap();
    let service = thread::spawn(move || {
        let mut wire = Wire::new(there);
        let mut calls = Vec::new();
        for (answer, fds) in answers {
            let call = wire.receive().unwrap().unwrap();
            calls.push((serde_json::from_slice(&call.json).unwrap(), call.fds.len()));
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let raw: Value = serde_json::from_slice(&answer).unwrap();
            wire.send(&raw, &borrowed).unwrap();
        }
        calls
    });
    // A program may have used the socket for something else before.
    rustix::net::sockopt::set_socket_passcred(&here, true).unwrap();
    (Client::new(here), service)
}

fn reply(parameters: impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(&json!({ "parameters": parameters })).unwrap()
}

fn file(text: &str) -> OwnedFd {
    let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = std::fs::File::from(fd);
    file.write_all(text.as_bytes()).unwrap();
    file.into()
}

fn text(fd: OwnedFd) -> String {
    use std::io::Seek;
    let mut file = std::fs::File::from(fd);
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_lease_comes_with_its_descriptor() {
    let mut second = acquired();
    second.file_descriptor = 1;
    let (mut client, service) = serve(vec![
        (reply(acquired()), vec![file("first")]),
        (reply(&second), vec![file("not this"), file("second")]),
    ]);
    let ask = Acquire::of_ranges("card", 2, vec![range()], Access::ReadWrite);
    let (lease, fd) = client.acquire(&ask).unwrap();
    assert_eq!(lease, acquired());
    let flags = rustix::io::fcntl_getfd(&fd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    assert_eq!(text(fd), "first");
    let (_, fd) = client.acquire(&ask).unwrap();
    assert_eq!(text(fd), "second");
    let calls = service.join().unwrap();
    let call = &calls[0].0;
    assert_eq!(call["method"], "io.barlease.Leases.Acquire");
    assert_eq!(call["parameters"]["ranges"][0]["length"], 0x2000);
    assert_eq!(call.get("more"), None);
}

#[test]
fn a_lease_without_its_descriptor_is_none() {
    let (mut client, _service) = serve(vec![(reply(acquired()), vec![])]);
    let answer = client.acquire(&Acquire::of_pool("rows", 1, Access::Read));
    assert!(matches!(answer, Err(Error::Malformed(_))), "{answer:?}");
}

#[test]
fn every_refusal_is_understood_and_an_unknown_one_is_kept() {
    let refusals = refusals();
    let answer = |refusal: &Refusal| {
        let mut json = serde_json::to_value(refusal).unwrap();
        json["error"] = format!("{INTERFACE}.{}", json["error"].as_str().unwrap()).into();
        (serde_json::to_vec(&json).unwrap(), vec![])
    };
    let mut answers: Vec<_> = refusals.iter().map(answer).collect();
    // Without parameters, as sd-varlink writes it.
    answers.push((
        br#"{"error":"io.barlease.Leases.QueueFull"}"#.to_vec(),
        vec![],
    ));
    let unknown = br#"{"error":"org.varlink.service.MethodNotFound","parameters":{"method":"x"}}"#;
    answers.push((unknown.to_vec(), vec![]));
    let (mut client, _service) = serve(answers);
    for refusal in refusals.into_iter().chain([Refusal::QueueFull {}]) {
        match client.release(1) {
            Err(Error::Refused(answer)) => assert_eq!(*answer, refusal),
            answer => panic!("{answer:?}"),
        }
    }
    match client.release(1) {
        Err(Error::Other { name, parameters }) => {
            assert_eq!(name, "org.varlink.service.MethodNotFound");
            assert_eq!(parameters["method"], "x");
        }
        answer => panic!("{answer:?}"),
    }
}

#[test]
fn a_refusal_says_who_has_it() {
    let busy = Refusal::Busy {
        held_by: vec![held()],
        waiting: 0,
        timed_out: false,
    };
    assert_eq!(
        busy.to_string(),
        "others have it: lease 3 of uid 1001 (pid 7, a.service)"
    );
}

#[test]
fn nothing_at_all_is_as_good_as_empty_parameters() {
    for answer in ["{}", r#"{"parameters":null}"#, r#"{"parameters":{}}"#] {
        let (mut client, _service) = serve(vec![(answer.into(), vec![])]);
        client.release(7).unwrap();
    }
}

#[test]
fn a_list_has_as_many_replies_as_leases() {
    let (here, there) = UnixStream::pair().unwrap();
    let service = thread::spawn(move || {
        let mut wire = Wire::new(there);
        let call = wire.receive().unwrap().unwrap();
        let call: Call = serde_json::from_slice(&call.json).unwrap();
        assert!(call.more);
        for continues in [true, true, false] {
            let parameters = serde_json::to_value(Listed {
                lease: Some(info()),
                waiter: None,
            })
            .unwrap();
            wire.send(
                &Reply {
                    parameters,
                    continues,
                    error: None,
                },
                &[],
            )
            .unwrap();
        }
    });
    let mut client = Client::new(here);
    assert_eq!(client.list(None).unwrap(), vec![info(); 3]);
    service.join().unwrap();
}

#[test]
fn a_device_is_handed_over_with_its_descriptor() {
    let (mut client, service) = serve(vec![(reply(Nothing {}), vec![])]);
    client.adopt("card", file("device")).unwrap();
    let calls = service.join().unwrap();
    assert_eq!(calls[0].1, 1);
    assert_eq!(calls[0].0["parameters"]["fileDescriptor"], 0);
}

#[test]
fn a_service_that_ends_or_talks_nonsense_is_an_error() {
    for (bytes, closed) in [
        (&b""[..], true),
        (&b"{\"parameters\":{}}"[..], true),
        (&b"nonsense\0"[..], false),
        (&b"7\0"[..], false),
        (&b"{\"parameters\":7}\0"[..], false),
    ] {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(bytes).unwrap();
        there.shutdown(std::net::Shutdown::Write).unwrap();
        let answer = Client::new(here).release(1);
        let fits = match answer {
            Err(Error::Closed) => closed,
            Err(Error::Malformed(_)) => !closed,
            _ => false,
        };
        assert!(fits, "{bytes:?}: {answer:?}");
    }
}

#[test]
fn more_descriptors_than_any_message_has_are_refused_and_closed() {
    let (here, there) = UnixStream::pair().unwrap();
    let one = file("x");
    let many: Vec<_> = (0..9).map(|_| one.as_fd()).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&many)));
    let bytes = [std::io::IoSlice::new(b"{}\0")];
    let flags = rustix::net::SendFlags::empty();
    rustix::net::sendmsg(&there, &bytes, &mut control, flags).unwrap();
    assert!(matches!(
        Client::new(here).release(1),
        Err(Error::Malformed(_))
    ));
}

#[test]
fn a_message_that_never_ends_is_refused() {
    let (here, mut there) = UnixStream::pair().unwrap();
    let flood = thread::spawn(move || {
        let chunk = vec![b' '; 1 << 20];
        (0..64).try_for_each(|_| there.write_all(&chunk)).is_err()
    });
    let mut wire = Wire::new(here);
    assert!(matches!(wire.receive(), Err(Error::Malformed(_))));
    drop(wire);
    assert!(flood.join().unwrap(), "the flood was read to its end");
}

#[test]
fn messages_that_come_together_and_in_pieces_are_told_apart() {
    let (here, mut there) = UnixStream::pair().unwrap();
    there.write_all(b"\"a\"\0\"b\"\0\"c").unwrap();
    let mut wire = Wire::new(here);
    let next = |wire: &mut Wire| wire.receive().unwrap().unwrap().json;
    assert_eq!(next(&mut wire), b"\"a\"");
    assert_eq!(next(&mut wire), b"\"b\"");
    wire.socket()
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    assert!(
        matches!(wire.receive(), Err(Error::Io { .. })),
        "a time-out"
    );
    there.write_all(b"\"\0").unwrap();
    assert_eq!(next(&mut wire), b"\"c\"");
    drop(there);
    assert!(wire.receive().unwrap().is_none());
}
