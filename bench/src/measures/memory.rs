//! Memory and allocations of a lease.
//!
//! Counted exactly, from the kernel's trace of allocations of this process; and as a check from
//! `/proc/meminfo`, as the growth of everything that the kernel has (slab, vmalloc, page tables)
//! with many of them.

use std::fs;

use barlease_guest_tests::allocations::{Kept, Trace};
use barlease_guest_tests::vfio::Device;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::export::Payload;
use super::take_away::map_bar;
use super::{Context, MEMORY, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds};

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let limit = Rlimit {
        current: Some(40_000),
        maximum: Some(40_000),
    };
    setrlimit(Resource::Nofile, limit).expect("more file descriptors");
    let trace = Trace::new().expect("a trace of allocations");
    let mut counts = Rounds::new(
        "memory-allocations",
        "Allocations of the kernel that a thing keeps",
        "stock vfio-pci",
        Unit::Count,
    );
    let mut round = 0;
    let bytes = Rounds::new(
        "memory",
        "Memory of the kernel that a thing keeps, from its trace of allocations",
        "stock vfio-pci",
        Unit::Bytes,
    )
    .run(context.rounds(5), |side, batch| {
        let mut number = Batch::default();
        let device = open(MEMORY, side);
        let mut add = |curve: &str, kept: Kept| {
            batch.add(curve, None, kept.bytes as f64);
            number.add(curve, None, kept.allocations as f64);
        };
        for (curve, ranges) in [("lease, 1 range", 1), ("lease, 64 ranges", 64)] {
            let payload = Payload::new(ranges);
            for _ in 0..5 {
                let (lease, kept) = trace.of(|| payload.export(&device));
                add(curve, kept);
                drop(lease);
            }
        }
        for _ in 0..5 {
            let (map, kept) = trace.of(|| map_bar(&device));
            add("mapping of a BAR", kept);
            let (further, kept) = trace.of(|| map_bar(&device));
            add("further mapping of a BAR", kept);
            drop((map, further));
        }
        if round >= 2 {
            counts.add(side, &number);
        }
        round += 1;
    })
    .finish(|curve, _| match curve {
        "further mapping of a BAR" => Some(Goal::AtMost(2.0)),
        curve => curve.starts_with("lease").then_some(Goal::AtMost(1.5)),
    });
    drop(trace);
    let many = Rounds::new(
        "memory-many",
        "Memory of the kernel that many leases keep, from /proc/meminfo",
        "stock vfio-pci",
        Unit::Bytes,
    )
    .axis("leases")
    .run(context.rounds(3), |side, batch| {
        let device = open(MEMORY, side);
        for &count in context.curve(&[30, 300, 3000, 30_000]) {
            batch.add("leases", count, grown(&device, count));
        }
    })
    .finish(|_, count| (count == Some(30_000)).then_some(Goal::AtMost(1.5)));
    vec![bytes, counts.finish(|_, _| None), many]
}

/// How much more memory the kernel has with so many leases.
fn grown(device: &Device, count: u64) -> f64 {
    let payload = Payload::new(1);
    // Memory that the kernel keeps when all are gone again is not theirs.
    let all = || {
        (0..count)
            .map(|_| payload.export(device))
            .collect::<Vec<_>>()
    };
    drop(all());
    let before = kernel_memory();
    let leases = all();
    let after = kernel_memory();
    drop(leases);
    after - before
}

/// Bytes that the kernel uses for itself.
fn kernel_memory() -> f64 {
    let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let fields = [
        "Slab:",
        "VmallocUsed:",
        "PageTables:",
        "Percpu:",
        "KernelStack:",
    ];
    let kib = |field: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.and_then(|number| number.parse().ok()).expect(field)
    };
    1024.0 * fields.iter().map(|field| kib(field)).sum::<f64>()
}
