//! One lease is revoked among others, each mapped and touched. Stock can only take everything away.

use barlease_guest_tests::PAGE;
use barlease_guest_tests::buffers::id_of;
use barlease_guest_tests::cgroup::Cgroup;
use barlease_guest_tests::errno::EINPROGRESS;
use barlease_guest_tests::holder::{self, Slow};
use barlease_guest_tests::importer::Importer;
use barlease_guest_tests::map::Map;

use super::export::Payload;
use super::take_away::map_bar;
use super::{BAR, BIG, Context, MEMORY, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Rounds, Side, nanoseconds};

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let payload = Payload::new(1);
    let measure = Rounds::new(
        "revoke",
        "Revocation of one lease among others, each mapped",
        "stock vfio-pci, which takes all away",
        Unit::Nanoseconds,
    )
    .axis("leases")
    .run(context.rounds(15), |side, batch| {
        let device = open(MEMORY, side);
        let command = device.command();
        for count in [1, 10, 100, 1000] {
            if side == Side::Theirs {
                let leases: Vec<_> = (0..count).map(|_| payload.export(&device)).collect();
                let maps: Vec<_> = leases.iter().map(|_| map_bar(&device)).collect();
                for _ in 0..7 {
                    for map in &maps {
                        map.read(0).expect("memory");
                    }
                    let taken = nanoseconds(|| device.set_command(command & !2));
                    batch.add("mapped", count, taken);
                    device.set_command(command);
                }
                continue;
            }
            let held = || {
                let lease = payload.export(&device);
                let map = Map::new(&lease, PAGE).expect("a mapping");
                map.read(0).expect("memory");
                (lease, map)
            };
            let _others: Vec<_> = (1..count).map(|_| held()).collect();
            for _ in 0..21 {
                let (lease, map) = held();
                let taken = nanoseconds(|| device.revoke(&lease).expect("a revocation"));
                assert!(map.read(0).is_err());
                batch.add("mapped", count, taken);
            }
        }
    })
    .finish(|_, count| (count == Some(1000)).then_some(Goal::AtMost(0.02)));
    let mut measures = vec![measure, without_waiting(context)];
    measures.extend(under_a_tight_holder(context));
    measures
}

/// A hung importer costs an owner that does not wait for it no more than a lease that nobody uses.
fn without_waiting(context: &Context) -> Measure {
    let payload = Payload::new(1);
    let importer = Importer::open();
    Rounds::new(
        "revoke-nowait",
        "REVOKE_ID with NOWAIT of a lease whose importer does not let go",
        "Barlease: REVOKE_ID of an idle lease",
        Unit::Nanoseconds,
    )
    .run(context.rounds(9), |side, batch| {
        let device = open(MEMORY, Side::Ours);
        for _ in 0..21 {
            let lease = payload.export(&device);
            let id = id_of(&lease);
            if side == Side::Theirs {
                let taken = nanoseconds(|| device.revoke_id(id).expect("a revocation"));
                batch.add("revoke", None, taken);
                continue;
            }
            let attachment = importer.attach(&lease).expect("an attachment");
            attachment.hold(true);
            attachment.map().expect("a mapping");
            let taken = nanoseconds(|| {
                assert_eq!(device.revoke_nowait(id), Err(EINPROGRESS));
            });
            batch.add("revoke", None, taken);
            attachment.unmap().expect("the end of a mapping");
        }
    })
    .finish(|_, _| Some(Goal::AtMost(2.0)))
}

/// A holder whose faults sleep for memory delays the owner no more than one whose faults do not:
/// the longest of many times that memory is taken from it. None without a memory controller.
fn under_a_tight_holder(context: &Context) -> Option<Measure> {
    const LEASE: u64 = 256 << 20;
    drop(Cgroup::new("probe")?);
    let times = if context.quick { 50 } else { 340 };
    let measure = Rounds::new(
        "revoke-tight",
        "The longest of many times that memory is taken from a holder above its group's memory.high",
        "Barlease: from the same holder without a limit",
        Unit::Nanoseconds,
    )
    .run(context.rounds(3), |side, batch| {
        let Some(group) = Cgroup::new("holder") else {
            return;
        };
        let device = open(BIG, Side::Ours);
        let fd = device.export(BAR, &[(0, LEASE)]).expect("an export");
        let slow = Slow {
            huge_pages: true,
            skew: PAGE,
            tight: side == Side::Ours,
        };
        let (longest, _) = holder::meanwhile(&group, &fd, LEASE, slow, || {
            let take = |_| {
                let taken = nanoseconds(|| device.set_memory(false));
                device.set_memory(true);
                taken
            };
            (0..times).map(take).fold(0.0, f64::max)
        });
        batch.add("longest", None, longest);
    })
    .finish(|_, _| Some(Goal::AtMost(2.0)));
    Some(measure)
}
