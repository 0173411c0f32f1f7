//! The measures: a file each.

mod descriptor;
mod export;
mod importer;
mod interrupt;
mod library;
mod lookup;
mod manager;
mod memory;
mod module;
mod passing;
mod revoke;
mod service;
mod take_away;
mod throughput;
mod touch;

use barlease_guest_tests::pci::{BARLEASE, STOCK};
use barlease_guest_tests::vfio::Device;
use rustix::thread::{CpuSet, sched_setaffinity};

pub use self::service::DAEMON;
use crate::report::Measure;
use crate::rounds::Side;

/// How a run is made.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Fewer rounds, shorter curves.
    pub quick: bool,
}

/// Measures that are taken together.
#[derive(Clone, Copy, Debug)]
pub struct Set {
    /// Its name for `--only`; the names of its measures begin with it.
    pub name: &'static str,
    /// Takes them.
    pub take: fn(&Context) -> Vec<Measure>,
}

impl Set {
    const fn new(name: &'static str, take: fn(&Context) -> Vec<Measure>) -> Self {
        Self { name, take }
    }
}

/// All of them that are taken in a guest, in the order of a report.
pub const ALL: &[Set] = &[
    Set::new("export", export::take),
    Set::new("importer", importer::take),
    Set::new("touch", touch::take),
    Set::new("take-away", take_away::take),
    Set::new("revoke", revoke::take),
    Set::new("throughput", throughput::take),
    Set::new("lookup", lookup::take),
    Set::new("descriptor", descriptor::take),
    Set::new("interrupt", interrupt::take),
    Set::new("memory", memory::take),
    Set::new("passing", passing::take),
    Set::new("service", service::take),
    Set::new("module", module::take),
];

/// All of them that are taken in a guest with systemd, where the service's unit is installed.
pub const SYSTEM: &[Set] = &[Set::new("service-manager", manager::take)];

/// All of them that are taken on the host.
pub const NATIVE: &[Set] = &[Set::new("library", library::take)];

impl Context {
    /// So many rounds, fewer in a short run.
    fn rounds(&self, rounds: u32) -> u32 {
        if self.quick {
            (rounds / 3).max(3)
        } else {
            rounds
        }
    }

    /// A curve; in a short run without what takes longest.
    fn curve(&self, points: &'static [u64]) -> &'static [u64] {
        if self.quick && points.len() > 3 {
            &points[..points.len() - 1]
        } else {
            points
        }
    }
}

/// The clock that the values of a side are measured with.
fn driver(side: Side) -> &'static str {
    match side {
        Side::Ours => BARLEASE,
        Side::Theirs => STOCK,
    }
}

/// Opens the machine's device `name` with the driver of a side.
fn open(name: &str, side: Side) -> Device {
    Device::open_with(name, driver(side))
}

/// Keeps this thread, and what it starts, on one processor.
pub fn pin(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    sched_setaffinity(None, &set).expect("a processor");
}

/// The device with 64 MiB of memory in BAR 2.
const MEMORY: &str = "memory";
/// The device with 1 GiB of memory in BAR 2.
const BIG: &str = "big";
/// The BAR of memory of both.
const BAR: u32 = 2;
/// Bytes of that BAR of [`MEMORY`].
const MEMORY_SIZE: u64 = 64 << 20;
