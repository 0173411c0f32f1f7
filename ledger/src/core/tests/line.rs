//! The line for a pool: nobody in it holds others up without need, and nobody is overtaken for
//! ever.

use super::*;
use crate::policy::Subject;

/// Sixteen units, and any number of leases and requests.
const OPEN: &str = r#"
[device.card]
match = "0000:01:00.0"

[pool.rows]
device = "card"
bar = 2
length = "64K"
unit = "4K"
contents = "memory"

[[allow]]
pools = ["*"]
who = { user = "*" }
access = "read-write"
lifetime = ["connection", "holders"]
queue = "30s"
"#;

const UNIT: u64 = 0x1000;

fn named(units: &[u64]) -> Ask {
    let range = |unit: &u64| Range {
        offset: unit * UNIT,
        length: UNIT,
    };
    Ask {
        what: What::Ranges {
            device: card(),
            bar: 2,
            ranges: units.iter().map(range).collect(),
        },
        ..ask("rows", 0)
    }
}

fn units(grant: &Grant) -> Vec<u64> {
    let ranges = grant.ranges.as_slice().iter();
    let units = ranges.flat_map(|range| range.offset / UNIT..range.end() / UNIT);
    units.collect()
}

#[test]
fn whoever_waits_for_what_it_has_itself_holds_nobody_up() {
    for own in [named(&[3]), named(&[3, 4]), ask("rows", 16 * UNIT)] {
        let mut service = Service::new(OPEN);
        let [one, other, third] = [1, 2, 3].map(|n| service.connect(n.into(), peer(n)));
        let had = service.acquire(one, named(&[3])).unwrap();
        let waits = service.wait_in_line(one, own.clone());
        // At once, and in line, by count and by name.
        let grant = service.acquire(other, ask("rows", 2 * UNIT)).unwrap();
        service.acquire(other, named(&[9])).unwrap();
        let behind = service.wait_in_line(third, ask("rows", 15 * UNIT));
        service.release(other, grant.lease).unwrap();
        assert_eq!(service.granted(behind), None, "14 units are free");
        // As soon as it has nothing any more it is the first again.
        service.release(one, had.lease).unwrap();
        let all = matches!(own.what, What::Pool { .. });
        assert_eq!(service.granted(waits).is_some(), !all, "{own:?}");
        assert_eq!(service.granted(behind), None);
    }
}

#[test]
fn readers_that_share_are_not_in_their_own_way() {
    let text = OPEN.replace("contents", "overlap = \"shared-read\"\ncontents");
    let mut service = Service::new(&text);
    let [one, other] = [1, 2].map(|n| service.connect(n.into(), peer(n)));
    let reads = Ask {
        access: Access::Read,
        ..named(&[3, 4])
    };
    service
        .acquire(
            one,
            Ask {
                access: Access::Read,
                ..named(&[3])
            },
        )
        .unwrap();
    let writer = service.acquire(other, named(&[4])).unwrap();
    let waits = service.wait_in_line(one, reads);
    // The line keeps for it what it waits for.
    let late = service.wait_in_line(other, named(&[3]));
    service.release(other, writer.lease).unwrap();
    assert!(service.granted(waits).unwrap().is_ok());
    assert_eq!(service.granted(late), None);
}

#[test]
fn named_units_are_kept_for_whoever_waits_for_them_and_no_others() {
    let mut service = Service::new(OPEN);
    let [one, two, three] = [1, 2, 3].map(|n| service.connect(n.into(), peer(n)));
    let had = service.acquire(one, named(&[0])).unwrap();
    let first = service.wait_in_line(two, named(&[0, 1]));
    // Unit 1 is free, and not theirs.
    let second = service.wait_in_line(three, named(&[1]));
    let given = service.acquire(three, ask("rows", 14 * UNIT)).unwrap();
    assert_eq!(units(&given), (2..16).collect::<Vec<_>>());
    let explained = service.core.explain(&peer(3), &ask("rows", UNIT));
    assert!(explained.verdict.is_err(), "{explained:?}");
    service.release(one, had.lease).unwrap();
    let grant = service.granted(first).unwrap().unwrap();
    assert_eq!(units(&grant), [0, 1]);
    assert_eq!(service.granted(second), None);
    service.release(two, grant.lease).unwrap();
    assert!(service.granted(second).unwrap().is_ok());
}

#[test]
fn a_large_request_is_not_overtaken_by_small_ones() {
    let mut service = Service::new(OPEN);
    let [one, two, three] = [1, 2, 3].map(|n| service.connect(n.into(), peer(n)));
    let held: Vec<_> = (0..16)
        .map(|unit| service.acquire(one, named(&[unit])).unwrap())
        .collect();
    let large = service.wait_in_line(two, ask("rows", 3 * UNIT));
    let small = service.wait_in_line(three, ask("rows", UNIT));
    let by_name = service.wait_in_line(three, named(&[1]));
    for lease in &held[..2] {
        service.release(one, lease.lease).unwrap();
        let busy = service.acquire(three, ask("rows", UNIT));
        assert!(matches!(busy, Err(Refusal::Busy { .. })), "{busy:?}");
        assert_eq!(service.granted(small), None);
        assert_eq!(service.granted(by_name), None);
    }
    service.release(one, held[2].lease).unwrap();
    let grant = service.granted(large).unwrap().unwrap();
    assert_eq!(units(&grant), [0, 1, 2]);
    assert_eq!(service.granted(small), None);
    service.release(one, held[3].lease).unwrap();
    assert!(service.granted(small).unwrap().is_ok());
}

#[test]
fn whoever_waits_for_a_range_that_an_importer_does_not_let_go_holds_nobody_up() {
    for wanted in [ask("rows", 16 * UNIT), named(&[2, 3])] {
        let mut service = Service::new(OPEN);
        let [one, two, three] = [1, 2, 3].map(|n| service.connect(n.into(), peer(n)));
        let had = service.acquire(one, named(&[3])).unwrap();
        service.importer = true;
        service.release(one, had.lease).unwrap();
        let first = service.wait_in_line(two, wanted.clone());
        let small = service.wait_in_line(three, named(&[2]));
        // An importer may take its time.
        service.pass(9_999);
        assert_eq!(service.granted(small), None, "{wanted:?}");
        service.pass(1);
        assert!(service.granted(small).unwrap().is_ok(), "{wanted:?}");
        let grant = service.acquire(three, ask("rows", 14 * UNIT)).unwrap();
        assert_eq!(service.granted(first), None);
        // From when it lets go on, nobody overtakes again.
        let buffer = service.buffers.iter_mut().find(|buffer| buffer.draining);
        buffer.unwrap().draining = false;
        service.list();
        let late = service.wait_in_line(three, named(&[3]));
        assert_eq!(service.granted(late), None, "{wanted:?}");
        service.importer = false;
        service.release(three, grant.lease).unwrap();
        assert_eq!(service.granted(late), None, "{wanted:?}");
    }
}

#[test]
fn the_line_of_a_device_that_goes_is_refused_to_its_end() {
    let mut service = Service::new(OPEN);
    let [one, two] = [1, 2].map(|n| service.connect(n.into(), peer(n)));
    service.acquire(one, named(&[0])).unwrap();
    let waits = [
        named(&[0]),
        named(&[0, 1]),
        ask("rows", 16 * UNIT),
        ask("rows", UNIT),
    ];
    let waits = waits.map(|ask| service.wait_in_line(two, ask.clone()));
    service.give(Event::DeviceGoing {
        device: card(),
        grace: None,
    });
    for request in waits {
        let answer = service.answer(request);
        assert!(matches!(answer, Some(Err(_))), "{answer:?}");
    }
}

/// 256 requests of one whom the rules name, and then one more of it and one of another.
fn shares(who: &str, share: impl Fn(u32) -> Peer, another: Peer) {
    let text = OPEN.replace("user = \"*\"", who);
    let mut service = Service::new(&text);
    let owner = service.connect(1, share(0));
    service.acquire(owner, ask("rows", 16 * UNIT)).unwrap();
    for n in 0..256_u32 {
        let connection = service.connect(u64::from(n) + 10, share(n));
        service.wait_in_line(connection, ask("rows", UNIT));
    }
    let late = service.connect(1000, share(256));
    let wait = Ask {
        wait: Millis(1000),
        ..ask("rows", UNIT)
    };
    assert_eq!(
        service.acquire(late, wait),
        Err(Refusal::QueueFull),
        "{who}"
    );
    let other = service.connect(1001, another);
    service.wait_in_line(other, ask("rows", UNIT));
}

#[test]
fn a_line_is_shared_by_those_whom_the_policy_names() {
    let claim = |name: &str, uid| Peer {
        claim: Some(name.into()),
        ..peer(uid)
    };
    // A container has any users; another one has its own share, though it is the same user.
    shares(
        "claim = \"pod-*\"",
        |n| claim("pod-1", n),
        claim("pod-2", 0),
    );
    let group = |path: &str| Peer {
        cgroup_path: path.into(),
        ..peer(7)
    };
    shares(
        "cgroup = \"/docker/*\"",
        |_| group("/docker/1"),
        group("/docker/2"),
    );
    shares("user = \"*\"", |_| group("/docker/1"), peer(8));
    // Subordinate users in a session of one.
    let rootless = |n| Peer {
        cgroup_path: "/user.slice/user-1000.slice/user@1000.service/app.slice/pod".into(),
        ..peer(100_000 + n)
    };
    shares("user = \"*\"", rootless, peer(1001));
}

#[test]
fn a_tenant_is_a_claim_or_the_user_of_its_session() {
    let of = |path: &str| Peer {
        cgroup_path: path.into(),
        ..peer(5)
    };
    for (path, uid) in [
        ("/user.slice/user-1000.slice/session-3.scope", 1000),
        ("/user.slice/user-1000.slice", 1000),
        ("/system.slice/a.service", 5),
        ("/x/user.slice/user-1000.slice", 5),
        ("/user.slice/user-x.slice/a", 5),
        ("/user.slice", 5),
        ("", 5),
    ] {
        assert_eq!(of(path).tenant(), Subject::User(uid), "{path}");
    }
    let claim = Peer {
        claim: Some("pod".into()),
        ..of("/user.slice/user-1000.slice/session-3.scope")
    };
    assert_eq!(claim.tenant(), Subject::Claim("pod".into()));
}

#[test]
fn ranges_that_are_named_in_line_are_bounded() {
    let text = OPEN
        .replace("length = \"64K\"", "")
        .replace("bar = 2", "bar = 0");
    let mut service = Service::new(&text);
    service.give(Event::DeviceOpened {
        device: card(),
        facts: Facts {
            bars: [8192 * UNIT, 0, 0, 0, 0, 0],
            reserved: Vec::new(),
        },
    });
    let one = service.connect(1, peer(1));
    service.acquire(one, ask("rows", 8192 * UNIT)).unwrap();
    let many = |count: u64| {
        let all: Vec<_> = (0..count).map(|unit| unit * 2).collect();
        let What::Ranges { device, ranges, .. } = named(&all).what else {
            unreachable!()
        };
        Ask {
            what: What::Ranges {
                device,
                bar: 0,
                ranges,
            },
            wait: Millis(1000),
            ..ask("rows", 0)
        }
    };
    for uid in 2..6 {
        let full = service.connect(uid.into(), peer(uid));
        service.wait_in_line(full, many(4000));
        assert_eq!(service.acquire(full, many(100)), Err(Refusal::QueueFull));
        service.wait_in_line(full, many(50));
    }
    let late = service.connect(9, peer(9));
    assert_eq!(service.acquire(late, many(300)), Err(Refusal::QueueFull));
}

#[test]
fn all_tenants_together_have_so_much_and_administrators_more() {
    let tenants = "[tenants]\nmax-leases = 3\nmax-waiting = 2\nmax-watches = 2\n";
    let mut service = Service::new(&format!("{tenants}{OPEN}"));
    let tenants: Vec<_> = (1..4).map(|n| service.connect(n.into(), peer(n))).collect();
    let root = service.connect_as(9, peer(0), true);
    let total = |refusal: Refusal| match refusal {
        Refusal::Total { key, most, have } => (key, most, have),
        other => panic!("{other}"),
    };
    let watch = |service: &mut Service, connection| {
        let request = service.request();
        service.give(Event::Watch {
            connection,
            request,
            all: false,
        });
        service.answer(request)
    };
    assert_eq!(watch(&mut service, tenants[0]), None);
    assert_eq!(watch(&mut service, tenants[1]), None);
    let refused = watch(&mut service, tenants[2]).unwrap().unwrap_err();
    assert_eq!(total(refused), ("max-watches", 2, 2));
    assert_eq!(watch(&mut service, root), None);
    service.give(Event::PeerGone(tenants[1]));
    assert_eq!(watch(&mut service, tenants[2]), None);
    let all = service.acquire(root, ask("rows", 16 * UNIT)).unwrap();
    let late = Ask {
        wait: Millis(1000),
        ..ask("rows", UNIT)
    };
    let waits = service.wait_in_line(tenants[0], ask("rows", UNIT));
    service.wait_in_line(tenants[2], ask("rows", UNIT));
    let refused = service.acquire(tenants[0], late).unwrap_err();
    assert_eq!(total(refused), ("max-waiting", 2, 2));
    let admins = service.wait_in_line(root, ask("rows", UNIT));
    // It waits for a lease that it cannot have then.
    service.acquire(root, ask("rows", 0x1000)).unwrap_err();
    service.release(root, all.lease).unwrap();
    assert!(service.granted(waits).unwrap().is_ok());
    assert!(service.granted(admins).unwrap().is_ok());
    let refused = service.acquire(tenants[0], ask("rows", UNIT)).unwrap_err();
    assert_eq!(total(refused), ("max-leases", 3, 3));
    service.acquire(root, ask("rows", UNIT)).unwrap();
}

#[test]
fn who_waits_is_told_in_parts() {
    let mut service = Service::new(OPEN);
    let one = service.connect(1, peer(1));
    service.acquire(one, ask("rows", 16 * UNIT)).unwrap();
    for uid in 2..20 {
        let connection = service.connect(uid.into(), peer(uid));
        service.wait_in_line(connection, ask("rows", UNIT));
    }
    let all: Vec<_> = service
        .core
        .waiters()
        .map(|waiter| waiter.peer.uid)
        .collect();
    assert_eq!(all.len(), 18);
    let mut parts = Vec::new();
    let mut place = (0, RequestId(0));
    loop {
        let part: Vec<_> = service.core.waiters_after(place).take(5).collect();
        let Some(last) = part.last() else { break };
        place = last.place;
        parts.extend(part.iter().map(|waiter| waiter.peer.uid));
    }
    assert_eq!(parts, all);
}
