//! Page faults of a holder that has set everything up to make them slow, or to have them never end.
#![cfg(barlease_guest)]

use std::{
    fs,
    time::{Duration, Instant},
};

use barlease_abi::MEMATTR_WC;
use barlease_guest_tests::{
    cgroup::Cgroup,
    holder::{self, Slow},
    huge_size,
    importer::check_that_nothing_is_left,
    map::{How, Map, READ, READ_WRITE},
    observe, page_size,
    probe::{self, MemoryType},
    process::{self, Child, End},
    vfio::Device,
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;

// ---- Entries that are read-only although the mapping is not -------------------------------------

/// Each kind of mapping of the first 4 MiB of a BAR, with a name.
fn kinds(device: &Device) -> Vec<(&'static str, Map)> {
    let len = 2 * huge_size();
    let lease = || device.export(FRAME_BUFFER, &[(0, len)]).unwrap();
    let aligned = How::shared().align(huge_size());
    let wc = lease();
    device.memattr(&wc, MEMATTR_WC).unwrap();
    let bar = device.region_info(FRAME_BUFFER).unwrap().offset;
    vec![
        ("2 MiB", aligned.map(lease(), 0, len).unwrap()),
        (
            "pages",
            aligned.skew(page_size()).map(lease(), 0, len).unwrap(),
        ),
        ("write-combining", aligned.map(wc, 0, len).unwrap()),
        ("BAR", aligned.map(device, bar, len).unwrap()),
        (
            "BAR in pages",
            aligned.skew(page_size()).map(device, bar, len).unwrap(),
        ),
    ]
}

/// While the kernel keeps track of what is written to, an entry is made read-only so that the first
/// store faults. Such a fault must end.
#[test]
fn a_store_is_served_while_the_kernel_keeps_track_of_stores() {
    let device = Device::open("display");
    for (name, map) in kinds(&device) {
        let mut child = Child::start(&[], |_| {
            process::end_after(20);
            fs::write("/proc/self/clear_refs", "4").expect("clear_refs");
            // Where nothing is yet, where a load was before, and where the protection was changed.
            assert_eq!(map.write(0, 1), Ok(()));
            map.read(huge_size()).expect("a load");
            let faults = observe::faults_of(|| assert_eq!(map.write(huge_size(), 2), Ok(())));
            assert_eq!(
                faults, 0,
                "{name}: the load brought in an entry that is writable"
            );
            map.protect(0, map.len(), READ).expect("mprotect");
            map.protect(0, map.len(), READ_WRITE).expect("mprotect");
            assert_eq!(map.write(huge_size() + page_size(), 3), Ok(()));
            // The kernel stores, too.
            map.receive_zeros().expect("read(2)");
        });
        assert_eq!(child.wait(), End::Code(0), "{name}");
    }
}

/// KVM takes what a fault has brought in as it is: read-only means read-only to it.
#[test]
fn entries_are_writable_while_the_kernel_keeps_track_of_stores() {
    let device = Device::open("display");
    for (name, map) in kinds(&device) {
        fs::write("/proc/self/clear_refs", "4").expect("clear_refs");
        map.read(0).expect("a load");
        let entry = probe::entry(&map, 0).expect("an entry");
        assert!(entry.writable, "{name}: {entry:?}");
        let wanted = if name == "write-combining" {
            MemoryType::WriteCombining
        } else {
            MemoryType::Uncached
        };
        assert_eq!(entry.memory_type, wanted, "{name}: {entry:?}");
    }
}

// ---- Huge pages turned off ----------------------------------------------------------------------

/// The switch is for memory that is made of pages; device memory is not. So it makes no difference,
/// and no table of pages is made where an entry above it could be.
#[test]
fn a_process_that_has_turned_off_huge_pages_gets_large_entries_of_device_memory() {
    let device = Device::open("display");
    let fd = device
        .export(FRAME_BUFFER, &[(0, 4 * huge_size())])
        .unwrap();
    let map = Map::aligned(&fd, 4 * huge_size()).unwrap();
    Child::start(&[], |_| {
        process::turn_off_huge_pages();
        let faults = observe::faults_of(|| map.touch_all().expect("a load"));
        // And some of the child's own memory, which it shares with its parent at first.
        assert!((4..32).contains(&faults), "{faults} faults");
        for at in [0, huge_size() + page_size(), 4 * huge_size() - page_size()] {
            let entry = probe::entry(&map, at).expect("an entry");
            let size = if observe::has_entries_above_pages() {
                huge_size()
            } else {
                page_size()
            };
            assert_eq!(entry.size, size, "{entry:?}");
        }
    })
    .join();
}

// ---- A holder whose memory is short -------------------------------------------------------------

/// BAR2 of the big device is 4 GiB.
const BIG_BAR: u32 = 2;
const LEASE: u64 = 1 << 30;

/// A longer wait than any that the owner should see; with a page-table allocation inside of what
/// the owner waits for it is 2 s.
const LONG: Duration = Duration::from_millis(1000);

/// Has a process map a lease again and again, at a place that takes many page tables, in a control
/// group that is above its limit: the kernel has it sleep for 2 s where it allocates. Meanwhile the
/// owner takes memory away.
fn memory_is_taken_from_a_holder_that_sleeps(huge_pages: bool, skew: u64) {
    let Some(group) = Cgroup::new("holder") else {
        return;
    };
    let device = Device::open("big");
    let fd = device.export(BIG_BAR, &[(0, LEASE)]).unwrap();
    let slow = Slow {
        huge_pages,
        skew,
        tight: true,
    };
    let (longest, rounds) = holder::meanwhile(&group, &fd, LEASE, slow, || longest_wait(&device));
    assert!(rounds > 0);
    assert!(
        group.events("high") > 0,
        "the holder was never above its limit"
    );
    assert!(longest < LONG, "the owner waited {longest:?}");
}

/// The longest time that it takes to take memory away, of some.
fn longest_wait(device: &Device) -> Duration {
    let mut longest = Duration::ZERO;
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        let before = Instant::now();
        device.set_memory(false);
        longest = longest.max(before.elapsed());
        device.set_memory(true);
        // So that the holder comes far.
        std::thread::sleep(Duration::from_millis(200));
    }
    longest
}

#[test]
fn a_holder_that_sleeps_for_page_tables_does_not_delay_the_owner() {
    memory_is_taken_from_a_holder_that_sleeps(true, page_size());
}

/// One page of each place where a large entry could be, so that the kernel asks for pages.
#[test]
fn a_holder_without_huge_pages_does_not_delay_the_owner_either() {
    memory_is_taken_from_a_holder_that_sleeps(false, 0);
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["display", "big"]);
}
