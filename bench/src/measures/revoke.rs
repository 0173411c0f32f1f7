//! One lease is revoked among others, each mapped and touched. Stock can only take everything away.

use barlease_guest_tests::PAGE;
use barlease_guest_tests::map::Map;

use super::export::Payload;
use super::take_away::map_bar;
use super::{Context, MEMORY, open};
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
    vec![measure]
}
