//! First touch of a mapping: one load of each page, and the faults that it takes.
//!
//! Stock is mapped through the device fd, there is no other way; Barlease as a lease. A mapping is
//! *aligned* where address and BAR are multiples of 2 MiB together, so that entries of 2 MiB are
//! possible, *skewed* where they are one page apart, as they are where a program lets the kernel
//! choose the address. *1 GiB aligned* is for the largest entries that the processor has.

use std::os::fd::{AsFd, OwnedFd};

use barlease_guest_tests::map::How;
use barlease_guest_tests::vfio::Device;
use barlease_guest_tests::{HUGE, PAGE, observe};

use super::{BAR, BIG, Context, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds, Side, nanoseconds};

const GIB: u64 = 1 << 30;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let curve = context.curve(&[1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, GIB]);
    let mut faults = Rounds::new(
        "touch-faults",
        "Faults taken by the first touch of every page",
        "stock BAR mapping",
        Unit::Count,
    )
    .axis("bytes");
    let mut round = 0;
    let time = Rounds::new(
        "touch",
        "First touch of every page of a mapping",
        "stock BAR mapping",
        Unit::Nanoseconds,
    )
    .axis("bytes")
    .run(context.rounds(5), |side, batch| {
        let mut counts = Batch::default();
        let device = open(BIG, side);
        let target = Target::of(&device, side);
        for &bytes in curve {
            // The emulator backs a page at the first load, which is no matter of the guest.
            if round < 2 {
                target
                    .map(How::shared(), bytes)
                    .touch_all()
                    .expect("memory");
            }
            for (name, skew) in [("aligned", HUGE), ("skewed", PAGE), ("1 GiB aligned", 0)] {
                if name == "1 GiB aligned" && bytes < GIB {
                    continue;
                }
                let how = How::shared().align(GIB).skew(skew);
                for _ in 0..if bytes < 1 << 24 { 5 } else { 1 } {
                    let map = target.map(how, bytes);
                    let mut taken = 0.0;
                    let count = observe::faults_of(|| {
                        taken = nanoseconds(|| map.touch_all().expect("memory"));
                    });
                    batch.add(name, bytes, taken);
                    counts.add(name, bytes, count as f64);
                }
            }
        }
        if round >= 2 {
            faults.add(side, &counts);
        }
        round += 1;
    })
    .finish(|curve, bytes| {
        let is_whole = bytes == Some(GIB);
        is_whole.then_some(Goal::AtMost(if curve == "skewed" { 0.125 } else { 1.0 }))
    });
    let faults = faults.finish(|curve, bytes| {
        let is_whole = bytes == Some(GIB);
        let most = if curve == "skewed" { 1.0 / 256.0 } else { 1.0 };
        is_whole.then_some(Goal::AtMost(most))
    });
    vec![time, faults]
}

/// The memory that is mapped.
enum Target<'a> {
    /// The BAR, through the device fd.
    Bar(&'a Device),
    /// A lease of all of it.
    Lease(OwnedFd),
}

impl<'a> Target<'a> {
    fn of(device: &'a Device, side: Side) -> Self {
        match side {
            Side::Theirs => Self::Bar(device),
            Side::Ours => Self::Lease(device.export(BAR, &[(0, GIB)]).expect("an export")),
        }
    }

    fn map(&self, how: How, bytes: u64) -> barlease_guest_tests::map::Map {
        let (fd, offset) = match self {
            Self::Bar(device) => (device.as_fd(), u64::from(BAR) << 40),
            Self::Lease(lease) => (lease.as_fd(), 0),
        };
        how.map(fd, offset, bytes).expect("a mapping")
    }
}
