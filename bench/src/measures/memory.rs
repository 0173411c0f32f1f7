//! Memory and allocations of a lease.
//!
//! Counted exactly, from the kernel's trace of allocations of this process; and as a check from `/proc/meminfo`, as the
//! growth of everything that the kernel has (slab, vmalloc, page tables) with many of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use barlease_guest_tests::vfio::Device;
use rustix::process::{Resource, Rlimit, getpid, setrlimit};

use super::export::Payload;
use super::take_away::map_bar;
use super::{Context, MEMORY, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds};

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: [&str; 4] = ["kmalloc", "kmem_cache_alloc", "kfree", "kmem_cache_free"];

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let limit = Rlimit {
        current: Some(40_000),
        maximum: Some(40_000),
    };
    setrlimit(Resource::Nofile, limit).expect("more file descriptors");
    let trace = Trace::new();
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
            drop(map);
        }
        if round >= 2 {
            counts.add(side, &number);
        }
        round += 1;
    })
    .finish(|curve, _| curve.starts_with("lease").then_some(Goal::AtMost(1.5)));
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
    // What the kernel keeps when all are gone again is not theirs.
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

/// The kernel's trace of the allocations of this thread.
struct Trace;

/// What something keeps.
struct Kept {
    allocations: usize,
    bytes: u64,
}

impl Trace {
    fn new() -> Self {
        if !Path::new(TRACING).join("tracing_on").exists() {
            let mut mount = Command::new("mount");
            let status = mount.args(["-t", "tracefs", "tracefs", TRACING]).status();
            assert!(status.expect("mount").success());
        }
        write("tracing_on", "0");
        write("set_event_pid", &getpid().as_raw_nonzero().to_string());
        for event in EVENTS {
            write(&format!("events/kmem/{event}/enable"), "1");
        }
        Self
    }

    /// What of the memory that `make` has the kernel allocate is not freed by its end.
    fn of<T>(&self, make: impl FnOnce() -> T) -> (T, Kept) {
        write("trace", "");
        write("tracing_on", "1");
        let made = make();
        write("tracing_on", "0");
        let text = fs::read_to_string(Path::new(TRACING).join("trace")).expect("a trace");
        (made, kept(&text))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        write("events/kmem/enable", "0");
        write("set_event_pid", "");
    }
}

fn write(file: &str, text: &str) {
    let path = Path::new(TRACING).join(file);
    fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// What of a trace was allocated and not freed.
fn kept(trace: &str) -> Kept {
    let mut live = BTreeMap::new();
    let lines = trace.lines().filter(|line| !line.starts_with('#'));
    for line in lines {
        let field = |name: &str| {
            let word = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name));
            word.map(str::to_owned)
        };
        // Other files of tracing are opened and closed by this process, too.
        let Some(address) = field("ptr=") else {
            continue;
        };
        match field("bytes_alloc=").and_then(|bytes| bytes.parse::<u64>().ok()) {
            Some(bytes) => live.insert(address, bytes),
            None => live.remove(&address),
        };
    }
    Kept {
        allocations: live.len(),
        bytes: live.values().sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_freed_is_not_kept() {
        let trace = "\
            # tracer: nop\n\
            bench-1 [000] ..... 1.0: kmalloc: call_site=a+0x1/0x2 ptr=00000000aa bytes_req=90 bytes_alloc=96 gfp_flags=GFP_KERNEL node=-1 accounted=false\n\
            bench-1 [000] ..... 1.1: kmem_cache_alloc: call_site=b+0x1/0x2 ptr=00000000bb name=filp bytes_req=200 bytes_alloc=256 gfp_flags=GFP_KERNEL node=-1 accounted=true\n\
            bench-1 [000] ..... 1.2: kfree: call_site=c+0x1/0x2 ptr=00000000aa\n\
            bench-1 [000] ..... 1.3: kmem_cache_free: call_site=c+0x1/0x2 ptr=00000000cc name=x\n";
        let kept = kept(trace);
        assert_eq!((kept.allocations, kept.bytes), (1, 256));
    }
}
