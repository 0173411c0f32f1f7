//! The calls of every user of a VFIO device: open and close, config space, BARs by read and write.

use barlease_guest_tests::pci::Function;
use barlease_guest_tests::vfio::{CONFIG_REGION, Group};

use super::{BAR, Context, MEMORY, driver, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::Rounds;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let measure = Rounds::new(
        "descriptor",
        "The device fd",
        "stock vfio-pci",
        Unit::Nanoseconds,
    )
    .run(context.rounds(21), |side, batch| {
        let function = Function::named(MEMORY);
        function.bind(driver(side));
        let group = Group::open(&function);
        batch.time("open and close", None, 5, 1, || {
            drop(group.device(&function).expect("a device"));
        });
        drop(group);

        let device = open(MEMORY, side);
        let mut bytes = [0; 4];
        batch.time("config read, 4 bytes", None, 9, 20, || {
            device.read(CONFIG_REGION, 0, &mut bytes).expect("a read");
        });
        let mut header = [0; 64];
        batch.time("config read, 64 bytes", None, 9, 5, || {
            device.read(CONFIG_REGION, 0, &mut header).expect("a read");
        });
        // The interrupt line register belongs to nobody.
        batch.time("config write, 1 byte", None, 9, 20, || {
            device.write(CONFIG_REGION, 0x3c, &[0]).expect("a write");
        });
        batch.time("BAR read, 4 bytes", None, 9, 50, || {
            device.read(BAR, 0, &mut bytes).expect("a read");
        });
        batch.time("BAR write, 4 bytes", None, 9, 50, || {
            device.write(BAR, 0, &bytes).expect("a write");
        });
        let mut page = [0; 4096];
        batch.time("BAR read, 4 KiB", None, 9, 10, || {
            device.read(BAR, 0, &mut page).expect("a read");
        });
    })
    .finish(|_, _| Some(Goal::AtMost(1.02)));
    vec![measure]
}
