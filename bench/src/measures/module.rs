//! The module itself: its size and the time to load it.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use barlease_guest_tests::importer;
use barlease_guest_tests::pci::Function;
use rustix::system::{delete_module, finit_module};

use super::{BIG, Context, MEMORY};
use crate::report::{Measure, Unit};
use crate::rounds::{Rounds, Side, nanoseconds};

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let mut sizes = Rounds::new("module-size", "Size of the module", "vfio-pci", Unit::Bytes);
    // It calls ours.
    if importer::is_loaded() {
        importer::unload().expect("the importer unloaded");
    }
    for name in [MEMORY, BIG, "interrupts"] {
        Function::named(name).unbind();
    }
    let mut round = 0;
    let time = Rounds::new(
        "module",
        "Loading and unloading the module",
        "vfio-pci",
        Unit::Nanoseconds,
    )
    .run(context.rounds(9), |side, batch| {
        let name = module(side);
        let path = format!("/lib/modules/{name}.ko");
        let file = File::open(&path).expect("the module");
        // Files of earlier measures are closed a little after the call that closed them.
        let patience = Instant::now() + Duration::from_secs(10);
        while importer::references(name) != 0 {
            assert!(Instant::now() < patience, "{name} is in use");
            thread::sleep(Duration::from_millis(1));
        }
        let c_name = std::ffi::CString::new(name).expect("a name");
        let taken = nanoseconds(|| delete_module(&c_name, 0).expect("unloaded"));
        batch.add("unload", None, taken);
        let taken = nanoseconds(|| finit_module(&file, c"", 0).expect("loaded"));
        batch.add("load", None, taken);
        if round >= 2 {
            let mut size = crate::rounds::Batch::default();
            let bytes = file.metadata().expect("its size").len();
            size.add("file", None, bytes as f64);
            size.add("in memory", None, core_size(name));
            sizes.add(side, &size);
        }
        round += 1;
    })
    .finish(|_, _| None);
    vec![time, sizes.finish(|_, _| None)]
}

fn module(side: Side) -> &'static str {
    match side {
        Side::Ours => barlease_abi::MODULE_NAME,
        Side::Theirs => "vfio_pci",
    }
}

/// Bytes of memory that a loaded module takes.
fn core_size(name: &str) -> f64 {
    let path = format!("/sys/module/{name}/coresize");
    let text = fs::read_to_string(path).expect("its size");
    text.trim().parse().expect("a number")
}
