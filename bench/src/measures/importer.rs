//! The calls of an importer: attach, map, unmap, detach, by the number of ranges.
//!
//! The importer is that of the tests, QEMU's `edu` behind an IOMMU. Stock buffers of several ranges
//! cannot be mapped through an IOVA on Linux 7.3-rc7, so there is nothing to compare with.

use barlease_guest_tests::importer::Importer;

use super::export::Payload;
use super::{Context, MEMORY, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Rounds, Side};

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let curve = context.curve(&[1, 4, 16, 64, 256, 1024, 4096]);
    let importer = Importer::open();
    let measure = Rounds::new(
        "importer",
        "Attach, map, unmap and detach by an importer",
        "stock vfio-pci; several ranges cannot be mapped there",
        Unit::Nanoseconds,
    )
    .axis("ranges")
    .run(context.rounds(15), |side, batch| {
        let device = open(MEMORY, side);
        for &count in curve {
            if side == Side::Theirs && count > 1 {
                break;
            }
            let lease = Payload::new(count).export(&device);
            let calls = (64 / count).clamp(1, 10) as u32;
            batch.time("attach, map, unmap, detach", count, 7, calls, || {
                let attachment = importer.attach(&lease).expect("an attachment");
                attachment.map().expect("a mapping");
                attachment.unmap().expect("the end of a mapping");
                attachment.detach().expect("the end of an attachment");
            });
        }
    })
    .finish(|_, count| (count == Some(1)).then_some(Goal::AtMost(1.0)));
    vec![measure]
}
