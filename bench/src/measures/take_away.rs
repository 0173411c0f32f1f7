//! All of a device's memory is taken away: its owner clears the memory bit of COMMAND.
//!
//! By the number of leases: *bare* ones that nobody uses, *mapped* ones, each of whose mappings was
//! touched, and *imported* ones, each mapped by an importer. Stock buffers cannot be mapped by
//! processes, so stock has as many mappings of the device fd beside its exports.

use barlease_guest_tests::PAGE;
use barlease_guest_tests::importer::Importer;
use barlease_guest_tests::map::{How, Map};
use barlease_guest_tests::vfio::Device;

use super::export::Payload;
use super::{BAR, Context, MEMORY, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Rounds, Side, nanoseconds};

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let importer = Importer::open();
    let measure = Rounds::new(
        "take-away",
        "Memory of the device turned off in COMMAND",
        "stock vfio-pci, as many exports, mappings and importers",
        Unit::Nanoseconds,
    )
    .axis("leases")
    .run(context.rounds(11), |side, batch| {
        let device = open(MEMORY, side);
        let command = device.command();
        let mut take_away = |curve: &str, count: u64, use_all: &dyn Fn()| {
            for _ in 0..if count < 1000 { 7 } else { 3 } {
                use_all();
                let taken = nanoseconds(|| device.set_command(command & !2));
                batch.add(curve, count, taken);
                device.set_command(command);
            }
        };
        for count in [1, 10, 100, 1000] {
            let payload = Payload::new(1);
            let leases: Vec<_> = (0..count).map(|_| payload.export(&device)).collect();
            take_away("bare", count, &|| ());

            let maps: Vec<_> = match side {
                Side::Ours => leases
                    .iter()
                    .map(|lease| Map::new(lease, PAGE).expect("a mapping"))
                    .collect(),
                Side::Theirs => (0..count).map(|_| map_bar(&device)).collect(),
            };
            let touch = || {
                for map in &maps {
                    map.read(0).expect("memory");
                }
            };
            take_away("mapped", count, &touch);
            drop(maps);

            let attachments: Vec<_> = leases
                .iter()
                .map(|lease| importer.attach(lease).expect("an attachment"))
                .collect();
            let map = || {
                for attachment in &attachments {
                    attachment.map().expect("an importer's mapping");
                }
            };
            take_away("imported", count, &map);
        }
    })
    .finish(|_, _| Some(Goal::AtMost(1.0)));
    vec![measure]
}

/// Maps a page of the BAR through the device fd.
pub(super) fn map_bar(device: &Device) -> Map {
    let offset = u64::from(BAR) << 40;
    How::shared().map(device, offset, PAGE).expect("a mapping")
}
