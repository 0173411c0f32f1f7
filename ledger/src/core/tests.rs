//! Promises of the core, one by one. `world.rs` has every order of a small world.

mod line;

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::policy::NoNames;
use crate::policy::Outcome;
use crate::types::Access;
use crate::types::Ask;
use crate::types::CgroupId;
use crate::types::Lifetime;
use crate::types::MemoryType;
use crate::types::Peer;
use crate::types::ProcessId;
use crate::types::What;

/// News that somebody is told.
fn told(action: &Action) -> Option<(RequestId, LeaseId, News)> {
    match action {
        Action::Notify {
            watch, lease, news, ..
        } => Some((*watch, *lease, *news)),
        _ => None,
    }
}

const POLICY: &str = r#"
[device.card]
match = "0000:01:00.0"

[pool.rows]
device = "card"
bar = 2
length = "64K"
unit = "4K"
contents = "memory"
memory-type = ["nc", "wc"]

[pool.clean]
device = "card"
bar = 2
at = "64K"
length = "16K"
unit = "4K"
contents = "memory"
scrub = "0x55"

[pool.doorbells]
device = "card"
bar = 0
unit = "4K"
writable = false

[[allow]]
pools = ["*"]
who = { user = "*" }
access = "read-write"
lifetime = ["connection", "process", "cgroup", "claim", "holders"]
max-ttl = "1h"
max-leases = 5
grace = "5s"
queue = "30s"
"#;

fn policy(text: &str) -> Arc<Policy> {
    let policy = Policy::parse(&[("p.toml", text)], &NoNames);
    Arc::new(policy.unwrap_or_else(|errors| panic!("{errors:?}")))
}

fn card() -> Arc<str> {
    "card".into()
}

fn facts() -> Facts {
    Facts {
        bars: [0x4000, 0, 0x40000, 0, 0, 0],
        reserved: vec![(
            0,
            Range {
                offset: 0,
                length: 8,
            },
        )],
    }
}

fn peer(uid: u32) -> Peer {
    Peer {
        uid,
        gid: uid,
        groups: [].into(),
        pid: uid,
        process: Some(ProcessId(uid.into())),
        cgroup: Some(CgroupId(uid.into())),
        cgroup_path: "/x".into(),
        unit: "".into(),
        claim: None,
    }
}

fn ask(pool: &str, size: u64) -> Ask {
    Ask {
        what: What::Pool {
            pool: pool.into(),
            size: Some(size),
        },
        access: Access::ReadWrite,
        memory_type: MemoryType::Uncached,
        tph: None,
        lifetime: Lifetime::Connection,
        ttl: None,
        wait: Millis(0),
    }
}

/// A core, and a daemon that does at once what it is told.
struct Service {
    core: Core,
    now: u64,
    ledger: Vec<Record>,
    buffers: Vec<Buffer>,
    next_buffer: u64,
    next_request: u64,
    /// Whether an importer holds whatever is revoked.
    importer: bool,
    /// All actions since the last look.
    seen: Vec<Action>,
}

impl Service {
    fn new(text: &str) -> Self {
        let mut service = Self {
            core: Core::new(policy(text), Time(1000)),
            now: 1000,
            ledger: Vec::new(),
            buffers: Vec::new(),
            next_buffer: 0,
            next_request: 0,
            importer: false,
            seen: Vec::new(),
        };
        service.give(Event::DeviceOpened {
            device: card(),
            facts: facts(),
        });
        service
    }

    fn give(&mut self, event: Event) {
        let actions = self.core.handle(Time(self.now), event);
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.seen.push(action.clone());
            match action {
                Action::Append(record) => self.ledger.push(record),
                Action::Compact(records) => self.ledger = records,
                Action::Export(export) => {
                    self.next_buffer += 1;
                    let id = BufferId(self.next_buffer);
                    self.buffers.push(Buffer {
                        id,
                        bar: export.bar,
                        size: export.ranges.size(),
                        nr_ranges: export.ranges.as_slice().len() as u32,
                        dead: false,
                        draining: false,
                        reasons: 0,
                        internal: false,
                    });
                    self.give(Event::Exported {
                        lease: export.lease,
                        result: Ok(id),
                    });
                }
                Action::Scrub { lease, .. } => {
                    self.give(Event::Scrubbed {
                        lease,
                        result: Ok(()),
                    });
                }
                Action::Revoke { buffer, .. } => {
                    let importer = self.importer;
                    let answer = match self.buffer(buffer) {
                        None => RevokeAnswer::Unknown,
                        Some(known) => {
                            known.dead = true;
                            known.draining = importer;
                            if importer {
                                RevokeAnswer::InProgress
                            } else {
                                RevokeAnswer::Done
                            }
                        }
                    };
                    self.give(Event::Revoked { buffer, answer });
                }
                Action::List(_) => self.list(),
                _ => {}
            }
        }
    }

    fn buffer(&mut self, id: BufferId) -> Option<&mut Buffer> {
        self.buffers.iter_mut().find(|buffer| buffer.id == id)
    }

    fn list(&mut self) {
        self.give(Event::Listed {
            device: card(),
            buffers: self.buffers.clone(),
        });
    }

    fn connect(&mut self, connection: u64, peer: Peer) -> ConnectionId {
        self.connect_as(connection, peer, false)
    }

    fn connect_as(&mut self, connection: u64, peer: Peer, administrator: bool) -> ConnectionId {
        let connection = ConnectionId(connection);
        let token = u128::from(connection.0) + 100;
        self.give(Event::Connected {
            connection,
            peer,
            token,
            administrator,
        });
        connection
    }

    fn request(&mut self) -> RequestId {
        self.next_request += 1;
        RequestId(self.next_request)
    }

    /// The answer to a request that was made just now.
    fn answer(&mut self, request: RequestId) -> Option<Result<Reply, Refusal>> {
        self.seen.iter().find_map(|action| match action {
            Action::Reply { request: to, reply } if *to == request => Some(Ok(reply.clone())),
            Action::Refuse {
                request: to,
                refusal,
            } if *to == request => Some(Err((**refusal).clone())),
            _ => None,
        })
    }

    fn acquire(&mut self, connection: ConnectionId, ask: Ask) -> Result<Grant, Refusal> {
        let request = self.request();
        self.give(Event::Acquire {
            connection,
            request,
            ask,
        });
        self.granted(request).unwrap()
    }

    fn granted(&mut self, request: RequestId) -> Option<Result<Grant, Refusal>> {
        Some(match self.answer(request)? {
            Ok(Reply::Granted(grant)) => Ok(*grant),
            Ok(other) => panic!("{other:?}"),
            Err(refusal) => Err(refusal),
        })
    }

    fn wait_in_line(&mut self, connection: ConnectionId, ask: Ask) -> RequestId {
        let request = self.request();
        let ask = Ask {
            wait: Millis(60_000),
            ..ask
        };
        self.give(Event::Acquire {
            connection,
            request,
            ask,
        });
        assert_eq!(self.answer(request), None);
        request
    }

    fn release(&mut self, connection: ConnectionId, lease: LeaseId) -> Result<Reply, Refusal> {
        let request = self.request();
        self.give(Event::Release {
            connection,
            request,
            lease,
        });
        self.answer(request).unwrap()
    }

    fn free(&self, pool: &str) -> u64 {
        self.core.room(pool).unwrap().0
    }

    fn restart(&mut self, text: &str) {
        let found = Found {
            device: card(),
            facts: facts(),
            buffers: self.buffers.clone(),
        };
        let records = self.ledger.clone();
        let (core, actions) = Core::recover(
            policy(text),
            records,
            vec![found],
            Time(self.now),
            Millis(10_000),
        );
        self.core = core;
        self.seen.clear();
        self.carry_out(actions);
    }

    fn pass(&mut self, span: u64) {
        self.now += span;
        self.give(Event::Tick);
    }

    fn alive(&mut self, id: BufferId) -> bool {
        self.buffer(id).is_some_and(|buffer| !buffer.dead)
    }
}

#[test]
fn a_grant_is_recorded_before_it_is_made_and_before_it_is_told() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    service.seen.clear();
    service.acquire(one, ask("rows", 0x2000)).unwrap();
    let place = |is: &dyn Fn(&Action) -> bool| service.seen.iter().position(is).unwrap();
    let intent = place(&|action| matches!(action, Action::Append(Record::Intent(_))));
    let export = place(&|action| matches!(action, Action::Export(_)));
    let granted = place(&|action| matches!(action, Action::Append(Record::Granted { .. })));
    let reply = place(&|action| matches!(action, Action::Reply { .. }));
    assert!(
        intent < export && export < granted && granted < reply,
        "{:#?}",
        service.seen
    );
}

#[test]
fn a_range_is_cleared_before_each_grant_where_the_pool_says_so_and_nowhere_else() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    service.seen.clear();
    let lease = service.acquire(one, ask("clean", 0x1000)).unwrap();
    let scrubbed = |service: &Service| {
        service
            .seen
            .iter()
            .filter(|action| matches!(action, Action::Scrub { .. }))
            .count()
    };
    match &service.seen[..] {
        [
            ..,
            Action::Append(Record::Intent(_)),
            Action::Scrub {
                ranges,
                pattern: 0x55,
                ..
            },
            Action::Export(_),
            Action::Append(_),
            Action::Reply { .. },
            Action::SetTimer(_),
        ] => {
            assert_eq!(*ranges, lease.ranges);
        }
        other => panic!("{other:#?}"),
    }
    service.release(one, lease.lease).unwrap();
    service.acquire(one, ask("clean", 0x1000)).unwrap();
    assert_eq!(scrubbed(&service), 2);
    service.acquire(one, ask("rows", 0x1000)).unwrap();
    assert_eq!(scrubbed(&service), 2);
}

#[test]
fn a_refusal_says_who_has_what_was_asked_for() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let two = service.connect(2, peer(2));
    service.acquire(one, ask("rows", 0x3000)).unwrap();
    let mine = service.acquire(two, ask("rows", 0x1000)).unwrap();
    let range = mine.ranges.as_slice()[0];
    let named = |ranges: Vec<Range>| Ask {
        what: What::Ranges {
            device: card(),
            bar: 2,
            ranges,
        },
        ..ask("", 0)
    };
    let Err(Refusal::Busy { holders, .. }) = service.acquire(one, named(vec![range])) else {
        panic!();
    };
    assert_eq!(holders.len(), 1);
    assert_eq!((holders[0].lease, holders[0].peer.uid), (mine.lease, 2));
    // All of the pool: both.
    let Err(Refusal::Busy { holders, .. }) = service.acquire(one, ask("rows", 0x10000)) else {
        panic!();
    };
    let mut uids: Vec<_> = holders.iter().map(|held| held.peer.uid).collect();
    uids.sort_unstable();
    assert_eq!(uids, [1, 2]);
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let range = |offset, length| Range { offset, length };
    let named = |bar, ranges: &[Range]| Ask {
        what: What::Ranges {
            device: card(),
            bar,
            ranges: ranges.to_vec(),
        },
        ..ask("", 0)
    };
    let read = |ask: Ask| Ask {
        access: Access::Read,
        ..ask
    };
    for (ask, fits) in [
        (
            ask("x", 4096),
            (|r| matches!(r, Refusal::NoPool(_))) as fn(&Refusal) -> bool,
        ),
        (ask("rows", 100), |r| matches!(r, Refusal::NotUnits { .. })),
        (ask("rows", 0), |r| matches!(r, Refusal::NotUnits { .. })),
        (ask("rows", 0x20000), |r| {
            matches!(r, Refusal::TooLarge { .. })
        }),
        (ask("doorbells", 4096), |r| {
            matches!(r, Refusal::NotOffered { .. })
        }),
        (
            Ask {
                memory_type: MemoryType::WriteCombining,
                ..read(ask("doorbells", 4096))
            },
            |r| matches!(r, Refusal::NotOffered { .. }),
        ),
        (named(2, &[]), |r| matches!(r, Refusal::Invalid(_))),
        (named(2, &[range(0, 0)]), |r| {
            matches!(r, Refusal::Invalid(_))
        }),
        (named(2, &[range(0, 0x2000), range(0x1000, 0x1000)]), |r| {
            matches!(r, Refusal::Invalid(_))
        }),
        (named(2, &[range(u64::MAX - 4095, 4096)]), |r| {
            matches!(r, Refusal::Invalid(_) | Refusal::OutsidePools { .. })
        }),
        (named(2, &[range(0xf000, 0x2000)]), |r| {
            matches!(r, Refusal::OutsidePools { .. })
        }),
        (named(3, &[range(0, 0x1000)]), |r| {
            matches!(r, Refusal::OutsidePools { .. })
        }),
        (
            Ask {
                what: What::Ranges {
                    device: "other".into(),
                    bar: 2,
                    ranges: vec![range(0, 0x1000)],
                },
                ..ask("", 0)
            },
            |r| matches!(r, Refusal::NoDevice(_)),
        ),
        (named(2, &[range(0x800, 0x1000)]), |r| {
            matches!(r, Refusal::NotUnits { .. })
        }),
        // The page with the table.
        (read(named(0, &[range(0, 0x1000)])), |r| {
            matches!(r, Refusal::TooLarge { .. })
        }),
        (
            Ask {
                lifetime: Lifetime::Claim,
                ..ask("rows", 4096)
            },
            |r| matches!(r, Refusal::NoIdentity(Lifetime::Claim)),
        ),
        (
            Ask {
                tph: Some(crate::types::Tph::default()),
                ..ask("rows", 4096)
            },
            |r| matches!(r, Refusal::NotAllowed { .. }),
        ),
        (
            Ask {
                ttl: Some(Millis(0)),
                ..ask("rows", 4096)
            },
            |r| matches!(r, Refusal::Invalid(_)),
        ),
    ] {
        let refusal = service.acquire(one, ask.clone()).unwrap_err();
        assert!(fits(&refusal), "{ask:?}: {refusal:?}");
    }
    assert_eq!(service.core.leases().count(), 0);
    assert_eq!(service.ledger, []);
}

#[test]
fn a_limit_counts_what_one_has_and_names_its_rule() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let again = service.connect(2, peer(1));
    for _ in 0..5 {
        service.acquire(one, ask("rows", 4096)).unwrap();
    }
    // Another connection of the same user is the same user.
    let refusal = service.acquire(again, ask("rows", 4096)).unwrap_err();
    assert!(
        matches!(&refusal, Refusal::Limit { limit: Limit::Leases(5), have: 5, place } if &*place.file == "p.toml"),
        "{refusal:?}"
    );
    let other = service.connect(3, peer(3));
    service.acquire(other, ask("rows", 4096)).unwrap();
    service.give(Event::PeerGone(one));
    service.acquire(again, ask("rows", 4096)).unwrap();
}

#[test]
fn each_lifetime_ends_with_what_it_lives_by() {
    let ends = [
        (Lifetime::Connection, Event::PeerGone(ConnectionId(1))),
        (Lifetime::Process, Event::ProcessGone(ProcessId(1))),
        (Lifetime::Cgroup, Event::CgroupEmpty(CgroupId(1))),
        (Lifetime::Claim, Event::ClaimEnded("c".into())),
    ];
    for (lifetime, end) in &ends {
        let mut service = Service::new(POLICY);
        let one = service.connect(
            1,
            Peer {
                claim: Some("c".into()),
                ..peer(1)
            },
        );
        let lease = service
            .acquire(
                one,
                Ask {
                    lifetime: *lifetime,
                    ..ask("rows", 4096)
                },
            )
            .unwrap();
        for (other, event) in &ends {
            if other != lifetime && *other != Lifetime::Connection {
                service.give(event.clone());
                assert!(service.alive(lease.buffer), "{lifetime:?} {other:?}");
            }
        }
        service.give(end.clone());
        assert!(!service.alive(lease.buffer), "{lifetime:?}");
        assert_eq!(service.free("rows"), 0x10000);
    }
    let mut service = Service::new(POLICY);
    let one = service.connect(
        1,
        Peer {
            claim: Some("c".into()),
            ..peer(1)
        },
    );
    let lease = service
        .acquire(
            one,
            Ask {
                lifetime: Lifetime::Holders,
                ..ask("rows", 4096)
            },
        )
        .unwrap();
    for (_, event) in ends {
        service.give(event);
    }
    assert!(service.alive(lease.buffer));
    service.buffers.clear();
    service.list();
    assert_eq!(service.free("rows"), 0x10000);
}

#[test]
fn what_is_watched_is_what_leases_live_by() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let process = Ask {
        lifetime: Lifetime::Process,
        ..ask("rows", 4096)
    };
    let first = service.acquire(one, process.clone()).unwrap();
    let second = service.acquire(one, process).unwrap();
    service.release(one, first.lease).unwrap();
    let watches = |service: &Service, action: &Action| {
        service.seen.iter().filter(|seen| *seen == action).count()
    };
    let (watch, unwatch) = (
        Action::WatchProcess(ProcessId(1)),
        Action::UnwatchProcess(ProcessId(1)),
    );
    assert_eq!(
        (watches(&service, &watch), watches(&service, &unwatch)),
        (1, 0)
    );
    service.release(one, second.lease).unwrap();
    assert_eq!(
        (watches(&service, &watch), watches(&service, &unwatch)),
        (1, 1)
    );
}

#[test]
fn a_lease_expires_at_its_time_unless_it_is_renewed() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let short = Ask {
        ttl: Some(Millis(100)),
        ..ask("rows", 4096)
    };
    let lease = service.acquire(one, short.clone()).unwrap();
    let other = service.acquire(one, short).unwrap();
    assert_eq!(lease.expires, Time(service.now + 100));
    assert!(
        service
            .seen
            .contains(&Action::SetTimer(Some(lease.expires)))
    );
    service.pass(60);
    let request = service.request();
    let ttl = Some(Millis(100));
    service.give(Event::Renew {
        connection: one,
        request,
        lease: lease.lease,
        ttl,
    });
    let renewed = service.answer(request);
    assert_eq!(renewed, Some(Ok(Reply::Renewed(Time(service.now + 100)))));
    service.pass(60);
    assert!(service.alive(lease.buffer) && !service.alive(other.buffer));
    service.pass(60);
    assert!(!service.alive(lease.buffer));
    // More than the policy allows: as much as it allows.
    let long = Ask {
        ttl: Some(Millis(u64::MAX)),
        ..ask("rows", 4096)
    };
    let lease = service.acquire(one, long).unwrap();
    assert_eq!(lease.expires, Time(service.now + 3_600_000));
}

#[test]
fn those_in_line_are_served_in_their_order_and_nobody_jumps_it() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let two = service.connect(2, peer(2));
    let three = service.connect(3, peer(3));
    let first = service.acquire(one, ask("rows", 0x8000)).unwrap();
    let large = service.wait_in_line(two, ask("rows", 0x10000));
    let small = service.wait_in_line(three, ask("rows", 0x1000));
    // There is room for it, and somebody before it.
    assert!(matches!(
        service.acquire(three, ask("rows", 0x1000)),
        Err(Refusal::Busy { waiting: 2, .. })
    ));
    service.release(one, first.lease).unwrap();
    let granted = service.granted(large).unwrap().unwrap();
    assert_eq!(service.answer(small), None);
    service.release(two, granted.lease).unwrap();
    service.granted(small).unwrap().unwrap();
}

#[test]
fn whoever_waits_too_long_or_leaves_is_out_of_the_line() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let two = service.connect(2, peer(2));
    let three = service.connect(3, peer(3));
    let all = service.acquire(one, ask("rows", 0x10000)).unwrap();
    let gone = service.wait_in_line(two, ask("rows", 0x1000));
    let late = service.wait_in_line(three, ask("rows", 0x1000));
    service.give(Event::PeerGone(two));
    assert_eq!(service.core.waiting("rows"), 1);
    // The policy's 30 s, not the client's 60.
    service.pass(29_999);
    assert_eq!(service.answer(late), None);
    service.pass(1);
    let refusal = service.granted(late).unwrap().unwrap_err();
    let Refusal::Busy {
        holders,
        timed_out: true,
        ..
    } = refusal
    else {
        panic!("{refusal:?}");
    };
    assert_eq!(holders[0].lease, all.lease);
    assert_eq!(service.answer(gone), None);
}

#[test]
fn nobody_fills_the_line() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    service.acquire(one, ask("rows", 0x10000)).unwrap();
    let hostile = service.connect(2, peer(2));
    for _ in 0..16 {
        service.wait_in_line(hostile, ask("rows", 0x1000));
    }
    let request = service.request();
    let ask = Ask {
        wait: Millis(1),
        ..ask("rows", 0x1000)
    };
    service.give(Event::Acquire {
        connection: hostile,
        request,
        ask,
    });
    assert_eq!(service.answer(request), Some(Err(Refusal::QueueFull)));
}

#[test]
fn nobody_watches_without_end() {
    let mut service = Service::new(POLICY);
    let hostile = service.connect(1, peer(1));
    let mut watch = || {
        let request = service.request();
        service.give(Event::Watch {
            connection: hostile,
            request,
            all: false,
        });
        service.answer(request)
    };
    for _ in 0..16 {
        assert_eq!(watch(), None);
    }
    assert_eq!(watch(), Some(Err(Refusal::QueueFull)));
}

#[test]
fn a_range_stays_taken_until_its_importer_has_let_go() {
    let mut service = Service::new(POLICY);
    service.importer = true;
    let one = service.connect(1, peer(1));
    let all = service.acquire(one, ask("rows", 0x10000)).unwrap();
    assert_eq!(service.release(one, all.lease), Ok(Reply::Released));
    let Err(Refusal::Busy { holders, .. }) = service.acquire(one, ask("rows", 0x1000)) else {
        panic!();
    };
    assert!(holders[0].revoked);
    service.list();
    assert_eq!(service.free("rows"), 0);
    service.buffer(all.buffer).unwrap().draining = false;
    service.list();
    assert_eq!(service.free("rows"), 0x10000);
}

#[test]
fn a_revocation_that_fails_is_tried_again_and_frees_nothing() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let lease = service.acquire(one, ask("rows", 0x1000)).unwrap();
    let actions = service.core.handle(
        Time(service.now),
        Event::Release {
            connection: one,
            request: RequestId(99),
            lease: lease.lease,
        },
    );
    assert!(actions.contains(&Action::Revoke {
        device: card(),
        buffer: lease.buffer
    }));
    let failed = Event::Revoked {
        buffer: lease.buffer,
        answer: RevokeAnswer::Failed(5),
    };
    service.give(failed);
    service.list();
    assert_eq!(service.free("rows"), 0xf000);
    service.pass(1000);
    assert!(!service.alive(lease.buffer));
    assert_eq!(service.free("rows"), 0x10000);
}

#[test]
fn a_holder_is_told_and_has_its_grace_when_the_device_goes() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let other = service.connect(2, peer(2));
    let watch = service.request();
    service.give(Event::Watch {
        connection: one,
        request: watch,
        all: false,
    });
    let lease = service.acquire(one, ask("rows", 0x1000)).unwrap();
    service.acquire(other, ask("rows", 0x1000)).unwrap();
    let waits = service.wait_in_line(other, ask("rows", 0x10000));
    service.seen.clear();
    service.give(Event::DeviceGoing {
        device: card(),
        grace: None,
    });
    let deadline = Time(service.now + 5000);
    let news = News::Reclaim {
        deadline,
        reason: EndReason::DeviceGoing,
    };
    let told: Vec<_> = service.seen.iter().filter_map(told).collect();
    assert_eq!(told, [(watch, lease.lease, news)], "of one's own only");
    assert_eq!(
        service.answer(waits),
        Some(Err(Refusal::DeviceGoing(card())))
    );
    assert_eq!(
        service.acquire(one, ask("rows", 0x1000)),
        Err(Refusal::DeviceGoing(card()))
    );
    service.release(one, lease.lease).unwrap();
    service.pass(4999);
    assert!(!service.seen.contains(&Action::CloseDevice(card())));
    service.pass(1);
    let closes = service
        .seen
        .iter()
        .filter(|action| **action == Action::CloseDevice(card()));
    assert_eq!(closes.count(), 1);
    service.give(Event::DeviceClosed(card()));
    assert_eq!(service.core.room("rows"), None);
    service.give(Event::DeviceOpened {
        device: card(),
        facts: facts(),
    });
    service.acquire(one, ask("rows", 0x10000)).unwrap();
}

#[test]
fn a_device_that_is_pulled_out_ends_everything_at_once() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    service.acquire(one, ask("rows", 0x10000)).unwrap();
    let waits = service.wait_in_line(one, ask("rows", 0x1000));
    service.give(Event::DeviceClosed(card()));
    assert_eq!(service.core.leases().count(), 0);
    assert_eq!(service.answer(waits), Some(Err(Refusal::NoDevice(card()))));
}

#[test]
fn only_those_who_have_a_lease_can_do_something_with_it() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let again = service.connect(2, peer(1));
    let other = service.connect(3, peer(2));
    // The same user, in a container with a claim.
    let contained = service.connect(
        4,
        Peer {
            claim: Some("c".into()),
            ..peer(1)
        },
    );
    let lease = service.acquire(one, ask("rows", 0x1000)).unwrap().lease;
    for stranger in [other, contained] {
        assert_eq!(
            service.release(stranger, lease),
            Err(Refusal::NoLease(lease))
        );
    }
    assert_eq!(service.release(again, lease), Ok(Reply::Released));
}

#[test]
fn what_the_kernel_suspends_is_told_and_comes_back() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let lease = service.acquire(one, ask("rows", 0x1000)).unwrap();
    let watch = service.request();
    service.give(Event::Watch {
        connection: one,
        request: watch,
        all: false,
    });
    for (reasons, news) in [(1, News::Suspended(1)), (0, News::Resumed)] {
        service.seen.clear();
        service.buffer(lease.buffer).unwrap().reasons = reasons;
        service.list();
        service.list();
        let [action] = &service.seen[..] else {
            panic!("{:?}", service.seen);
        };
        assert_eq!(told(action), Some((watch, lease.lease, news)));
        let Action::Notify { about, .. } = action else {
            unreachable!("it is one");
        };
        assert_eq!((&*about.pool, &*about.device), ("rows", "card"));
        assert_eq!(about.holder.peer, peer(1));
    }
}

#[test]
fn a_new_policy_takes_nothing_away_unless_it_says_so() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let lease = service.acquire(one, ask("rows", 0x1000)).unwrap();
    let without = POLICY.replace(
        "[[allow]]\npools = [\"*\"]",
        "[[allow]]\npools = [\"clean\"]",
    );
    service.give(Event::PolicyReplaced(policy(&without)));
    assert!(service.alive(lease.buffer));
    assert!(matches!(
        service.acquire(one, ask("rows", 0x1000)),
        Err(Refusal::NotAllowed { .. })
    ));
    let revokes = format!("revoke-what-is-no-longer-allowed = true\n{without}");
    service.give(Event::PolicyReplaced(policy(&revokes)));
    assert!(service.alive(lease.buffer), "within its grace");
    service.pass(5000);
    assert!(!service.alive(lease.buffer));
}

#[test]
fn pools_that_are_cut_anew_leave_leases_where_they_are() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let lease = service.acquire(one, ask("rows", 0x3000)).unwrap();
    let anew = POLICY.replace(
        "length = \"64K\"\nunit = \"4K\"",
        "length = \"64K\"\nunit = \"8K\"",
    );
    assert_ne!(anew, POLICY);
    service.give(Event::PolicyReplaced(policy(&anew)));
    // 12 KiB touch two units of 8.
    assert_eq!(service.free("rows"), 0xc000);
    let all = service.acquire(one, ask("rows", 0xc000)).unwrap();
    let touches = |range: &Range| overlap(lease.ranges.as_slice(), range);
    assert!(!all.ranges.as_slice().iter().any(touches));
    service.release(one, lease.lease).unwrap();
    assert_eq!(service.free("rows"), 0x4000);
}

#[test]
fn what_was_granted_lives_on_after_a_restart_as_it_was() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let mut ids = Vec::new();
    for lifetime in [Lifetime::Connection, Lifetime::Process, Lifetime::Cgroup] {
        let ask = Ask {
            lifetime,
            ttl: Some(Millis(20_000)),
            ..ask("rows", 0x2000)
        };
        ids.push(service.acquire(one, ask).unwrap());
    }
    let views = |service: &Service| {
        let view = |lease: LeaseView<'_>| {
            (
                lease.lease,
                lease.ranges.to_vec(),
                lease.peer.clone(),
                lease.expires,
                lease.lifetime,
            )
        };
        service.core.leases().map(view).collect::<Vec<_>>()
    };
    let before = views(&service);
    service.restart(POLICY);
    assert_eq!(views(&service), before);
    assert_eq!(service.free("rows"), 0xa000);
    for action in [
        Action::WatchProcess(ProcessId(1)),
        Action::WatchCgroup(CgroupId(1), "/x".into()),
    ] {
        assert!(service.seen.contains(&action), "{action:?}");
    }
    // Nobody comes back: the one that lives by its connection ends, and the others at their time.
    service.pass(10_000);
    let alive = |service: &mut Service| {
        ids.iter()
            .map(|g| service.alive(g.buffer))
            .collect::<Vec<_>>()
    };
    assert_eq!(alive(&mut service), [false, true, true]);
    service.pass(10_000);
    assert_eq!(alive(&mut service), [false; 3]);
    // Ids are never used again.
    let two = service.connect(2, peer(2));
    let fresh = service.acquire(two, ask("rows", 0x1000)).unwrap();
    assert!(before.iter().all(|(id, ..)| *id < fresh.lease));
}

#[test]
fn whoever_comes_back_with_its_secret_has_its_leases_again() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let lease = service.acquire(one, ask("rows", 0x2000)).unwrap();
    service.restart(POLICY);
    let resume = |service: &mut Service, connection, token| {
        let request = service.request();
        service.give(Event::Resume {
            connection,
            request,
            token,
        });
        service.answer(request).unwrap()
    };
    let thief = service.connect(7, peer(2));
    assert_eq!(
        resume(&mut service, thief, 101),
        Err(Refusal::NothingToResume)
    );
    let back = service.connect(8, peer(1));
    assert_eq!(
        resume(&mut service, back, 55),
        Err(Refusal::NothingToResume)
    );
    assert_eq!(
        resume(&mut service, back, 101),
        Ok(Reply::Resumed(vec![lease.lease]))
    );
    assert_eq!(
        resume(&mut service, back, 101),
        Err(Refusal::NothingToResume),
        "once"
    );
    service.pass(100_000);
    assert!(service.alive(lease.buffer));
    service.give(Event::PeerGone(back));
    assert!(!service.alive(lease.buffer));
}

#[test]
fn an_end_that_has_begun_is_not_forgotten_in_a_restart() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let ask = Ask {
        lifetime: Lifetime::Process,
        ..ask("rows", 0x2000)
    };
    let lease = service.acquire(one, ask).unwrap();
    let request = service.request();
    let selector = Selector::Lease(lease.lease);
    service.give(Event::Revoke {
        request,
        selector,
        grace: None,
    });
    assert_eq!(service.answer(request), Some(Ok(Reply::Revoking(1))));
    service.pass(3000);
    service.restart(POLICY);
    service.pass(1999);
    assert!(service.alive(lease.buffer));
    service.pass(1);
    assert!(!service.alive(lease.buffer));
}

#[test]
fn a_buffer_that_nobody_knows_is_revoked_and_its_bar_waits_for_it() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    service
        .acquire(
            one,
            Ask {
                lifetime: Lifetime::Process,
                ..ask("rows", 0x1000)
            },
        )
        .unwrap();
    let stray = Buffer {
        id: BufferId(777),
        bar: 2,
        size: 0x5000,
        nr_ranges: 1,
        dead: false,
        draining: false,
        reasons: 0,
        internal: false,
    };
    service.buffers.push(stray);
    // A mapping of the owner's is none.
    service.buffers.push(Buffer {
        id: BufferId(778),
        internal: true,
        ..stray
    });
    service.importer = true;
    service.restart(POLICY);
    assert!(!service.alive(stray.id) && service.alive(BufferId(778)));
    let two = service.connect(2, peer(2));
    assert!(matches!(
        service.acquire(two, ask("rows", 0x1000)),
        Err(Refusal::Busy { .. })
    ));
    let read = Ask {
        access: Access::Read,
        ..ask("doorbells", 0x1000)
    };
    service.acquire(two, read).unwrap();
    service.buffer(stray.id).unwrap().draining = false;
    service.list();
    service.acquire(two, ask("rows", 0x1000)).unwrap();
}

#[test]
fn leases_that_the_kernel_tells_otherwise_or_that_share_are_revoked() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let process = Ask {
        lifetime: Lifetime::Process,
        ..ask("rows", 0x1000)
    };
    let good = service.acquire(one, process.clone()).unwrap();
    let wrong = service.acquire(one, process.clone()).unwrap();
    let double = service.acquire(one, process).unwrap();
    service.buffer(wrong.buffer).unwrap().size = 0x9000;
    for record in &mut service.ledger {
        if let Record::Intent(intent) = record {
            if intent.lease == double.lease {
                intent.ranges = good.ranges.clone();
            }
        }
    }
    service.restart(POLICY);
    assert!(service.alive(good.buffer));
    assert!(!service.alive(wrong.buffer) && !service.alive(double.buffer));
    assert_eq!(service.free("rows"), 0xf000);
}

#[test]
fn leases_of_a_device_that_is_not_there_any_more_are_over() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    service
        .acquire(
            one,
            Ask {
                lifetime: Lifetime::Process,
                ..ask("rows", 0x1000)
            },
        )
        .unwrap();
    let records = service.ledger.clone();
    let (core, actions) = Core::recover(policy(POLICY), records, vec![], Time(1), Millis(1));
    assert_eq!(core.leases().count(), 0);
    assert!(
        actions
            .iter()
            .any(|action| matches!(action, Action::Append(Record::Ended { .. })))
    );
}

#[test]
fn explaining_changes_nothing_and_says_what_an_acquire_would() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let before = service.core.clone();
    let told = service.core.explain(&peer(1), &ask("rows", 0x1000));
    assert_eq!(told.verdict, Ok(()));
    assert_eq!(told.rules.len(), 1);
    assert_eq!(told.rules[0].1, Outcome::Allows);
    assert_eq!(service.core, before);
    let all = service.acquire(one, ask("rows", 0x10000)).unwrap();
    let told = service.core.explain(&peer(2), &ask("rows", 0x1000));
    let Err(Refusal::Busy { holders, .. }) = told.verdict else {
        panic!();
    };
    assert_eq!(holders[0].lease, all.lease);
}

#[test]
fn the_ledger_is_compacted_and_says_the_same() {
    let mut service = Service::new(POLICY);
    let one = service.connect(1, peer(1));
    let kept = service
        .acquire(
            one,
            Ask {
                lifetime: Lifetime::Process,
                ..ask("rows", 0x1000)
            },
        )
        .unwrap();
    for _ in 0..3000 {
        let lease = service.acquire(one, ask("rows", 0x1000)).unwrap();
        service.release(one, lease.lease).unwrap();
        service.buffers.retain(|buffer| !buffer.dead);
        service.seen.clear();
    }
    assert!(service.ledger.len() < 5000, "{}", service.ledger.len());
    service.restart(POLICY);
    assert_eq!(
        service
            .core
            .leases()
            .map(|lease| lease.lease)
            .collect::<Vec<_>>(),
        [kept.lease]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Requests come in any order: exclusive ranges are in one lease, what is free and what
    /// is leased are all, and a restart finds the same.
    #[test]
    fn any_order_of_events_keeps_the_books(
        steps in prop::collection::vec((0u8..12, 1u64..4, 1u64..9), 1..120),
        importer in any::<bool>(),
    ) {
        let mut service = Service::new(POLICY);
        service.importer = importer;
        for connection in 1..4 {
            service.connect(connection, peer(connection as u32));
        }
        for (kind, who, amount) in steps {
            let connection = ConnectionId(who);
            let request = service.request();
            match kind {
                0..=3 => {
                    let pool = if kind == 0 { "clean" } else { "rows" };
                    let lifetime = [Lifetime::Connection, Lifetime::Process, Lifetime::Holders];
                    let ask = Ask {
                        lifetime: lifetime[amount as usize % 3],
                        wait: Millis(amount % 2 * 50),
                        ttl: (amount == 5).then_some(Millis(70)),
                        ..ask(pool, amount * 4096)
                    };
                    service.give(Event::Acquire { connection, request, ask });
                }
                4 | 5 => {
                    let nth = service.core.leases().nth(amount as usize).map(|lease| lease.lease);
                    if let Some(lease) = nth {
                        service.give(Event::Release { connection, request, lease });
                    }
                }
                6 => {
                    service.give(Event::PeerGone(connection));
                    service.connect(who, peer(who as u32));
                }
                7 => service.pass(amount * 10),
                8 => {
                    // Somebody closes a descriptor, or an importer lets go.
                    if let Some(buffer) = service.buffers.get_mut(amount as usize) {
                        buffer.draining = false;
                    }
                    if amount % 2 == 0 && !service.buffers.is_empty() {
                        service.buffers.remove(0);
                    }
                    service.list();
                }
                9 => service.give(Event::ProcessGone(ProcessId(who))),
                10 if amount == 1 => {
                    service.buffers.clear();
                    service.give(Event::DeviceClosed(card()));
                    service.give(Event::DeviceOpened { device: card(), facts: facts() });
                }
                11 if amount < 3 => {
                    service.restart(POLICY);
                    for connection in 1..4 {
                        service.connect(connection, peer(connection as u32));
                    }
                }
                _ => {}
            }
            let mut ranges: Vec<Range> = Vec::new();
            for lease in service.core.leases() {
                ranges.extend(lease.ranges);
            }
            ranges.sort_unstable();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].offset));
            let leased: u64 = ranges.iter().map(|range| range.length).sum();
            prop_assert_eq!(service.free("rows") + service.free("clean") + leased, 0x14000);
        }
        // The books that are kept by small changes are those that are made anew.
        let mut anew = service.core.clone();
        for pool in 0..anew.pools.len() {
            anew.make_map(pool);
        }
        let free = |core: &Core| core.pools.iter().map(|pool| {
            pool.map.as_ref().map(|map| map.free_bytes())
        }).collect::<Vec<_>>();
        prop_assert_eq!(free(&anew), free(&service.core));
        let usage = std::mem::take(&mut anew.usage);
        let leases: Vec<_> = anew.leases.iter().map(|(_, lease)| lease.clone()).collect();
        for lease in &leases {
            anew.count(lease, true);
        }
        prop_assert_eq!(&anew.usage, &usage);
        let due: BTreeSet<_> = anew.leases.iter()
            .filter(|(_, lease)| lease.due() != Time::NEVER)
            .map(|(slot, lease)| (lease.due(), Due::Lease(slot)))
            .collect();
        let armed: BTreeSet<_> = anew.timers.iter()
            .filter(|(_, due)| matches!(due, Due::Lease(_)))
            .copied()
            .collect();
        prop_assert_eq!(due, armed);
    }
}
