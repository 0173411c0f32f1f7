//! The examples of the library, run as they are.
#![cfg(barlease_guest)]

use std::os::{fd::AsFd, unix::net::UnixStream};

use barlease::pci::Pci;
use barlease_guest_tests::{
    observe,
    pci::{BARLEASE, Function},
    process::Child,
};

#[path = "../../lib/examples/edu.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "it is a program")]
mod edu;
#[path = "../../lib/examples/nic.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "it is a program")]
mod nic;
#[path = "../../lib/examples/nvme.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "it is a program")]
mod nvme;
#[path = "../../lib/examples/vmm.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "it is a program")]
mod vmm;
#[path = "../../lib/examples/wc.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "it is a program")]
mod wc;

/// Bound to our driver.
fn bdf(name: &str) -> String {
    observe::mark_test();
    let bdf = Function::named(name).bdf;
    Pci::system().bind(bdf.parse().unwrap(), BARLEASE).unwrap();
    bdf
}

#[test]
fn edu_computes_and_copies() {
    let bdf = bdf("edu").parse().unwrap();
    assert_eq!(edu::run(bdf, 5).unwrap(), 120);
    assert_eq!(edu::run(bdf, 12).unwrap(), 479_001_600);
}

#[test]
fn an_adapter_tells_its_address_and_interrupts() {
    let found = nic::run(bdf("igb").parse().unwrap()).unwrap();
    // As QEMU gives addresses out.
    assert_eq!(found.address[..5], [0x52, 0x54, 0x00, 0x12, 0x34]);
    assert!(found.status.link(), "{found:?}");
    assert_eq!(found.status.speed(), 2, "{found:?}");
    assert!(found.irq.is_some(), "{found:?}");
}

#[test]
fn a_block_is_read_by_a_doorbell_that_another_process_rings() {
    let bdf = bdf("nvme").parse().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let holder = Child::start(&[theirs.as_fd()], |_| nvme::hold(&theirs).unwrap());
    let (model, block) = nvme::run(bdf, &ours).unwrap();
    assert_eq!(model, "QEMU NVMe Ctrl");
    // The disk of this machine is empty.
    assert_eq!(block, [0; 512]);
    drop(ours);
    holder.join();
}

#[test]
fn an_alias_is_filled_beside_the_bar() {
    let times = wc::run(bdf("display").parse().unwrap(), 0).unwrap();
    assert!(!times.uncached.is_zero() && !times.combining.is_zero());
}

#[test]
fn a_vmm_on_another_crate_leases_its_device() {
    assert_eq!(vmm::run(&bdf("display"), 0).unwrap(), 0x600d);
}
