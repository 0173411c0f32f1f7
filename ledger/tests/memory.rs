//! The memory of a lease. A file of its own: other tests of the same process would count,
//! too.

use std::sync::Arc;

use barlease_ledger::core::Action;
use barlease_ledger::core::Core;
use barlease_ledger::core::Event;
use barlease_ledger::core::Facts;
use barlease_ledger::policy::NoNames;
use barlease_ledger::policy::Policy;
use barlease_ledger::types::Access;
use barlease_ledger::types::Ask;
use barlease_ledger::types::BufferId;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::Lifetime;
use barlease_ledger::types::MemoryType;
use barlease_ledger::types::Millis;
use barlease_ledger::types::Peer;
use barlease_ledger::types::ProcessId;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use barlease_ledger::types::What;

const LEASES: u64 = 100_000;
/// The goal, for each lease.
const MOST: u64 = 400;

const POLICY: &str = r#"
[device.card]
match = "0000:01:00.0"
[pool.rows]
device = "card"
bar = 2
unit = "4K"
contents = "memory"
[[allow]]
pools = ["rows"]
who = { user = "*" }
access = "read-write"
max-ttl = "1h"
lifetime = ["process"]
"#;

/// Bytes of memory that the process has for itself.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// Leases of a page, with a time limit, of so many connections; bytes of memory for each.
fn each(connections: u64) -> u64 {
    let policy = Policy::parse(&[("p", POLICY)], &NoNames).unwrap();
    let mut core = Core::new(Arc::new(policy), Time(1));
    let facts = Facts {
        bars: [0, 0, LEASES * 4096, 0, 0, 0],
        reserved: Vec::new(),
    };
    core.handle(
        Time(1),
        Event::DeviceOpened {
            device: "card".into(),
            facts,
        },
    );
    let before = resident();
    for number in 0..LEASES {
        let connection = ConnectionId(number % connections);
        if number < connections {
            let peer = Peer {
                uid: 1000,
                gid: 1000,
                groups: [].into(),
                pid: 1,
                process: Some(ProcessId(number)),
                cgroup: None,
                cgroup_path: "".into(),
                unit: "".into(),
                claim: None,
            };
            core.handle(
                Time(1),
                Event::Connected {
                    connection,
                    peer,
                    token: 1,
                    administrator: false,
                },
            );
        }
        let ask = Ask {
            what: What::Pool {
                pool: "rows".into(),
                size: Some(4096),
            },
            access: Access::ReadWrite,
            memory_type: MemoryType::Uncached,
            tph: None,
            lifetime: Lifetime::Process,
            ttl: None,
            wait: Millis(0),
        };
        let request = RequestId(number);
        // Each expires at another time.
        let now = Time(1 + number);
        for action in core.handle(
            now,
            Event::Acquire {
                connection,
                request,
                ask,
            },
        ) {
            if let Action::Export(export) = action {
                let result = Ok(BufferId(number));
                core.handle(
                    now,
                    Event::Exported {
                        lease: export.lease,
                        result,
                    },
                );
            }
        }
    }
    let after = resident();
    assert_eq!(core.leases().count() as u64, LEASES);
    (after - before) / LEASES
}

#[test]
fn a_lease_takes_no_more_than_400_bytes_when_there_are_100_000() {
    let bytes = each(1000);
    println!("{bytes} bytes each, of 1,000 connections");
    assert!(bytes <= MOST, "{bytes}");
}
