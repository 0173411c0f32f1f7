//! A fault in a buffer of many ranges: the look-up of the range that an offset is in.
//!
//! Each fault brings in one page, through a mapping of its own, so that nothing differs but the
//! look-up.

use barlease_guest_tests::PAGE;
use barlease_guest_tests::map::{How, Map};

use super::export::Payload;
use super::{BAR, Context, MEMORY, MEMORY_SIZE, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Rounds, Side, nanoseconds};

/// Mappings a sample.
const MAPPINGS: u64 = 128;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let device = open(MEMORY, Side::Ours);
    let whole = device.export(BAR, &[(0, MEMORY_SIZE)]).expect("an export");
    let curve = context.curve(&[16, 256, 4096, 65536]);
    let leases = curve
        .iter()
        .map(|&count| (count, Payload::new(count).export(&device)));
    let leases: Vec<_> = leases.collect();
    let measure = Rounds::new(
        "lookup",
        "A fault in a buffer of many ranges",
        "a buffer of one range",
        Unit::Nanoseconds,
    )
    .axis("ranges")
    .run(context.rounds(15), |side, batch| {
        for (count, lease) in &leases {
            let (lease, pages) = match side {
                Side::Ours => (lease, *count),
                Side::Theirs => (&whole, MEMORY_SIZE / PAGE),
            };
            for _ in 0..5 {
                let maps: Vec<Map> = (0..MAPPINGS)
                    .map(|number| {
                        // All over the buffer, in no order.
                        let page = (number * 0x9e37_79b1) % pages;
                        let map = How::shared().map(lease, page * PAGE, PAGE);
                        map.expect("a mapping")
                    })
                    .collect();
                let taken = nanoseconds(|| {
                    for map in &maps {
                        map.read(0).expect("memory");
                    }
                });
                batch.add("fault", *count, taken / MAPPINGS as f64);
            }
        }
    })
    .finish(|_, _| Some(Goal::AtMost(1.5)));
    vec![measure]
}
