//! Defects of the kernel that stock vfio-pci meets and our driver does not: each test fails with
//! `STOCK` on a kernel that has the defect, so these are ignored; `docs/kernel-defects.md` says
//! what was seen. `cargo xtask test` runs each of them in a guest of its own, and says what came of
//! it (`xtask/src/guest_tests/defects.rs`). Their twins, with our driver, are run always.
#![cfg(barlease_guest)]

use std::{fs, os::fd::AsFd};

use barlease_guest_tests::{
    map::{How, Map},
    observe, page_size,
    pci::{BARLEASE, STOCK},
    probe,
    process::{self, Child, End},
    vfio::Device,
};

/// A BAR of 4 GiB.
const BIG: (&str, u32) = ("big", 2);
const GIB: u64 = 1 << 30;

/// The first 2 GiB of the BAR, with an entry of 1 GiB where there are such.
fn map(device: &Device) -> Map {
    let offset = device.region_info(BIG.1).unwrap().offset;
    let map = How::shared()
        .align(GIB)
        .map(device, offset, 2 * GIB)
        .unwrap();
    map.touch(0, page_size()).unwrap();
    let entry = probe::entry(&map, 0).expect("an entry");
    assert_eq!(entry.size == GIB, observe::has_entries_of_1_gib());
    map
}

/// Moves all of a mapping, and looks whether the kernel took the entry of 1 GiB for a broken table.
///
/// It clears such an entry without a TLB flush, and nothing flushes it later.
fn a_mapping_is_moved_with_its_entries(driver: &str) {
    let device = Device::open_with(BIG.0, driver);
    let map = map(&device);
    let bad = || observe::kernel_log().matches("bad pud").count();
    let before = bad();
    let place = map.place_at(GIB, 0);
    let moved = map
        .moved_to(&place)
        .unwrap_or_else(|(_, errno)| panic!("mremap: {errno:?}"));
    moved.touch(0, page_size()).unwrap();
    assert_eq!(
        bad(),
        before,
        "{driver}: an entry was cleared as a bad table"
    );
}

/// Unmaps one page in the middle of an entry of 1 GiB, which oopses a kernel that looks for a table
/// of entries below it.
fn a_page_is_unmapped_inside_of_a_gib(driver: &str) {
    let device = Device::open_with(BIG.0, driver);
    let mut child = Child::start(&[device.as_fd()], |_| {
        let mut map = map(&device);
        map.unmap(5 * page_size(), page_size());
        map.touch(6 * page_size(), page_size())
            .expect("the rest is mapped");
    });
    assert_eq!(child.wait(), End::Code(0), "{driver}");
}

/// Stores while the kernel keeps track of stores: the fault must end.
fn a_store_is_served_while_stores_are_tracked(driver: &str) {
    let device = Device::open_with(BIG.0, driver);
    let mut child = Child::start(&[device.as_fd()], |_| {
        process::end_after(20);
        let offset = device.region_info(BIG.1).unwrap().offset;
        let map = How::shared().align(GIB).map(&device, offset, GIB).unwrap();
        fs::write("/proc/self/clear_refs", "4").expect("clear_refs");
        map.write(0, 1).expect("a store");
    });
    assert_eq!(child.wait(), End::Code(0), "{driver}");
}

#[test]
#[ignore = "the stock driver meets a defect of the kernel"]
fn stock_moves_a_mapping_with_its_entries() {
    a_mapping_is_moved_with_its_entries(STOCK);
}

#[test]
#[ignore = "the stock driver meets a defect of the kernel, which oopses"]
fn stock_unmaps_a_page_inside_of_a_gib() {
    a_page_is_unmapped_inside_of_a_gib(STOCK);
}

#[test]
#[ignore = "the stock driver meets a defect of the kernel"]
fn stock_serves_a_store_while_stores_are_tracked() {
    a_store_is_served_while_stores_are_tracked(STOCK);
}

#[test]
fn ours_moves_a_mapping_with_its_entries() {
    a_mapping_is_moved_with_its_entries(BARLEASE);
}

#[test]
fn ours_unmaps_a_page_inside_of_a_gib() {
    a_page_is_unmapped_inside_of_a_gib(BARLEASE);
}

#[test]
fn ours_serves_a_store_while_stores_are_tracked() {
    a_store_is_served_while_stores_are_tracked(BARLEASE);
}
