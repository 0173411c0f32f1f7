//! The memory type of mappings: what is asked for is what the page-table entry has, read back.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
    time::Duration,
};

use barlease_abi::{FEATURE_DMA_BUF_MEMATTR, MEMATTR_NC, MEMATTR_WC};
use barlease_guest_tests::{
    errno::{EBADF, EINVAL, ENODEV, ENOENT},
    huge_size,
    lease::{Request, no_such_fd},
    map::{How, Map, READ, READ_WRITE, Sigbus},
    observe, page_size,
    pci::STOCK,
    probe::{self, Entry, MemoryType},
    process::Child,
    race::meanwhile,
    vfio::{Device, GET, SET},
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;
const FRAME_BUFFER_LEN: u64 = 64 << 20;

fn display() -> Device {
    Device::open("display")
}

fn buffer(device: &Device, ranges: &[(u64, u64)], memattr: u32) -> OwnedFd {
    let fd = device.export(FRAME_BUFFER, ranges).unwrap();
    device.memattr(&fd, memattr).unwrap();
    fd
}

/// A write-combining buffer of that range, mapped at a multiple of 2 MiB.
fn wc(device: &Device, offset: u64, len: u64) -> (OwnedFd, Map) {
    let fd = buffer(device, &[(offset, len)], MEMATTR_WC);
    let map = Map::aligned(&fd, len).unwrap();
    (fd, map)
}

#[track_caller]
fn present(map: &Map, offset: u64) -> Entry {
    probe::entry(map, offset).unwrap_or_else(|| panic!("no entry at {offset:#x}"))
}

/// Asserts that all pages of a part have entries of that type, each of the right page of the BAR.
#[track_caller]
fn assert_type(device: &Device, map: &Map, part: (u64, u64), in_bar: u64, wanted: MemoryType) {
    let (start, _) = device.function().bar(FRAME_BUFFER);
    for at in (part.0..part.0 + part.1).step_by(page_size() as usize) {
        let entry = present(map, at);
        assert_eq!(entry.memory_type, wanted, "at {at:#x}: {entry:?}");
        assert_eq!(entry.physical, start + in_bar + at, "at {at:#x}: {entry:?}");
        assert!(
            entry.special || entry.size > page_size(),
            "at {at:#x}: {entry:?}"
        );
    }
}

#[track_caller]
fn assert_wc(device: &Device, map: &Map, in_bar: u64) {
    let part = (0, map.len());
    assert_type(device, map, part, in_bar, MemoryType::WriteCombining);
}

/// Each event that takes memory away and gives it back, with a name.
fn take_and_give(device: &Device) {
    device.set_memory(false);
    device.set_memory(true);
}

// ---- The request --------------------------------------------------------------------------------

#[test]
fn probe_says_that_it_can_be_set() {
    let device = display();
    assert_eq!(device.probe(FEATURE_DMA_BUF_MEMATTR, SET), Ok(()));
    assert_eq!(device.probe(FEATURE_DMA_BUF_MEMATTR, 0), Ok(()));
    assert_eq!(device.probe(FEATURE_DMA_BUF_MEMATTR, GET), Err(EINVAL));
    let get = GET | u32::from(FEATURE_DMA_BUF_MEMATTR);
    assert_eq!(device.feature(get, &mut [0; 8]), Err(EINVAL));
}

#[test]
fn a_payload_that_is_too_small_is_einval() {
    let device = display();
    let set = SET | u32::from(FEATURE_DMA_BUF_MEMATTR);
    for length in [0, 4, 7] {
        assert_eq!(
            device.feature(set, &mut vec![0; length]),
            Err(EINVAL),
            "{length}"
        );
    }
}

#[test]
fn an_unknown_attribute_is_enoent_whatever_the_fd() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    for memattr in [2, 3, u32::MAX] {
        assert_eq!(device.memattr(&fd, memattr), Err(ENOENT), "{memattr}");
        assert_eq!(device.memattr_number(no_such_fd(), memattr), Err(ENOENT));
    }
    assert_eq!(device.status(&fd).unwrap().memattr, MEMATTR_NC);
}

#[test]
fn an_fd_that_is_no_buffer_of_this_device_is_refused() {
    let device = display();
    for memattr in [MEMATTR_NC, MEMATTR_WC] {
        assert_eq!(device.memattr_number(no_such_fd(), memattr), Err(EBADF));
        assert_eq!(device.memattr_number(-1, memattr), Err(EBADF));
        let zero = File::open("/dev/zero").unwrap();
        assert_eq!(device.memattr(&zero, memattr), Err(EINVAL));
        assert_eq!(device.memattr(device.as_fd(), memattr), Err(EINVAL));
    }
    let stock = device.stock_export(&Request::new(FRAME_BUFFER, &[(0, page_size())]));
    assert_eq!(device.memattr(stock.unwrap(), MEMATTR_WC), Err(EINVAL));
    let other = Device::open("testdev");
    let foreign = other.export(2, &[(0, page_size())]).unwrap();
    assert_eq!(device.memattr(&foreign, MEMATTR_WC), Err(ENODEV));
    assert_eq!(other.memattr(&foreign, MEMATTR_WC), Ok(()));
}

#[test]
fn a_dead_buffer_is_enodev() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    device.revoke(&fd).unwrap();
    for memattr in [MEMATTR_NC, MEMATTR_WC] {
        assert_eq!(device.memattr(&fd, memattr), Err(ENODEV));
    }
    assert_eq!(device.memattr(&fd, 2), Err(ENOENT));
}

#[test]
fn a_buffer_of_an_earlier_open_is_enodev() {
    let fd = display().export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    assert_eq!(display().memattr(&fd, MEMATTR_WC), Err(ENODEV));
}

#[test]
fn a_revoked_buffer_takes_an_attribute() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    device.set_memory(false);
    assert_eq!(device.memattr(&fd, MEMATTR_WC), Ok(()));
    let map = Map::new(&fd, page_size()).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
    device.set_memory(true);
    map.read(0).unwrap();
    assert_wc(&device, &map, 0);
}

#[test]
fn status_says_what_the_next_mapping_gets() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    assert_eq!(device.status(&fd).unwrap().memattr, MEMATTR_NC);
    for memattr in [MEMATTR_WC, MEMATTR_WC, MEMATTR_NC, MEMATTR_WC] {
        device.memattr(&fd, memattr).unwrap();
        assert_eq!(device.status(&fd).unwrap().memattr, memattr);
    }
}

// ---- The page-table entries ---------------------------------------------------------------------

#[test]
fn a_mapping_is_uncached_unless_asked() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(huge_size(), 2 * huge_size())])
        .unwrap();
    for (skew, size) in [(0, huge_size()), (page_size(), page_size())] {
        let how = How::shared().align(huge_size()).skew(skew);
        let map = how.map(&fd, 0, 2 * huge_size()).unwrap();
        assert_eq!(probe::entry(&map, 0), None);
        map.touch_all().unwrap();
        let part = (0, map.len());
        assert_type(&device, &map, part, huge_size(), MemoryType::Uncached);
        assert_eq!(present(&map, 5 * page_size()).size, size);
    }
}

#[test]
fn a_bar_mapping_of_the_device_fd_is_uncached() {
    let device = display();
    let map = How::shared()
        .align(huge_size())
        .map(device.as_fd(), 0, huge_size())
        .unwrap();
    map.touch_all().unwrap();
    assert_type(&device, &map, (0, huge_size()), 0, MemoryType::Uncached);
}

#[test]
fn write_combining_is_real_from_the_first_fault_on() {
    let device = display();
    for (offset, len) in [
        (0, page_size()),
        (3 * page_size(), 2 * page_size()),
        (0, huge_size()),
        (huge_size(), 3 * huge_size()),
    ] {
        let (_fd, map) = wc(&device, offset, len);
        assert_eq!(probe::entry(&map, 0), None);
        map.write(0, 17).unwrap();
        // So do the entries that come in around the fault.
        let batch = len.min(huge_size());
        let part = (0, batch);
        assert_type(&device, &map, part, offset, MemoryType::WriteCombining);
        map.touch_all().unwrap();
        assert_wc(&device, &map, offset);
        assert_eq!(map.read(0), Ok(17));
        assert_eq!(device.read32(FRAME_BUFFER, offset), 17);
    }
}

#[test]
fn a_read_only_mapping_is_write_combining_too() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, 2 * page_size())]).open_flags(libc::O_RDONLY);
    let fd = device.request(&request).unwrap();
    device.memattr(&fd, MEMATTR_WC).unwrap();
    let map = How::shared()
        .protection(READ)
        .map(&fd, 0, 2 * page_size())
        .unwrap();
    map.touch_all().unwrap();
    assert_wc(&device, &map, 0);
    assert!(!present(&map, 0).writable);
}

#[test]
fn ranges_in_any_order_are_all_write_combining() {
    let device = display();
    let (start, _) = device.function().bar(FRAME_BUFFER);
    let ranges = [
        (4 * huge_size(), huge_size()),
        (page_size(), 3 * page_size()),
        (huge_size(), huge_size()),
        (page_size(), page_size()),
    ];
    let fd = buffer(&device, &ranges, MEMATTR_WC);
    let len = ranges.iter().map(|range| range.1).sum();
    let map = How::shared()
        .align(huge_size())
        .skew(page_size())
        .map(&fd, 0, len)
        .unwrap();
    map.touch_all().unwrap();
    let pages = ranges
        .iter()
        .flat_map(|&(from, len)| (from..from + len).step_by(page_size() as usize));
    for (at, page) in (0..).step_by(page_size() as usize).zip(pages) {
        let entry = present(&map, at);
        assert_eq!(entry.memory_type, MemoryType::WriteCombining, "{at:#x}");
        assert_eq!(entry.physical, start + page, "{at:#x}");
    }
}

#[test]
fn it_is_write_combining_again_after_it_was_taken_away() {
    let device = display();
    for len in [page_size(), 2 * huge_size()] {
        let (_fd, map) = wc(&device, 0, len);
        for _ in 0..3 {
            map.touch_all().unwrap();
            assert_wc(&device, &map, 0);
            device.set_memory(false);
            assert_eq!(probe::entry(&map, 0), None);
            assert_eq!(map.read(0), Err(Sigbus));
            assert_eq!(probe::entry(&map, 0), None);
            device.set_memory(true);
            assert_eq!(probe::entry(&map, 0), None);
        }
    }
}

#[test]
fn it_is_write_combining_again_after_a_reset() {
    // BAR2 of each: memory, of which the nvme's may be enabled first.
    let device = Device::open("memory");
    let (start, _) = device.function().bar(2);
    let fd = device.export(2, &[(0, 2 * huge_size())]).unwrap();
    device.memattr(&fd, MEMATTR_WC).unwrap();
    let map = Map::aligned(&fd, 2 * huge_size()).unwrap();
    type Reset = fn(&Device);
    let resets: [Reset; 3] = [
        |device| device.reset().unwrap(),
        |device| device.function().reset().unwrap(),
        |device| device.hot_reset(&[device.group()]).unwrap(),
    ];
    for reset in resets {
        map.touch_all().unwrap();
        reset(&device);
        assert_eq!(probe::entry(&map, 0), None);
        map.touch_all().unwrap();
        for at in [0, page_size(), huge_size(), 2 * huge_size() - page_size()] {
            let entry = present(&map, at);
            assert_eq!(entry.memory_type, MemoryType::WriteCombining, "{at:#x}");
            assert_eq!(entry.physical, start + at);
        }
    }
}

#[test]
fn it_is_write_combining_in_a_child() {
    let device = display();
    let (_fd, map) = wc(&device, 0, huge_size() + 3 * page_size());
    map.touch_all().unwrap();
    // Loads the probe's module before there is a child.
    assert_wc(&device, &map, 0);
    let child = Child::start(&[], |link| {
        for round in 0..3 {
            map.touch_all().unwrap();
            assert_wc(&device, &map, 0);
            map.write(huge_size(), round).unwrap();
            link.send(0);
            link.expect(1);
            assert_eq!(probe::entry(&map, huge_size()), None);
        }
    });
    for round in 0..3 {
        child.link.expect(0);
        assert_eq!(map.read(huge_size()), Ok(round));
        assert_wc(&device, &map, 0);
        take_and_give(&device);
        child.link.send(1);
        map.touch_all().unwrap();
    }
    child.join();
}

#[test]
fn it_is_write_combining_after_a_page_was_unmapped() {
    let device = display();
    let (_fd, mut map) = wc(&device, huge_size(), 2 * huge_size());
    map.touch_all().unwrap();
    map.unmap(7 * page_size(), page_size());
    map.unmap(huge_size(), 2 * page_size());
    let parts = [
        (0, 7 * page_size()),
        (8 * page_size(), huge_size() - 8 * page_size()),
        (huge_size() + 2 * page_size(), huge_size() - 2 * page_size()),
    ];
    for _ in 0..2 {
        for part in parts {
            map.touch(part.0, part.1).unwrap();
            assert_type(&device, &map, part, huge_size(), MemoryType::WriteCombining);
        }
        take_and_give(&device);
    }
}

#[test]
fn it_is_write_combining_after_a_page_was_protected() {
    let device = display();
    for touched in [false, true] {
        let (_fd, map) = wc(&device, 0, huge_size());
        if touched {
            map.touch_all().unwrap();
        }
        map.protect(9 * page_size(), page_size(), READ).unwrap();
        for _ in 0..2 {
            map.touch_all().unwrap();
            assert_wc(&device, &map, 0);
            assert!(!present(&map, 9 * page_size()).writable);
            assert!(present(&map, 8 * page_size()).writable);
            take_and_give(&device);
        }
        map.protect(9 * page_size(), page_size(), READ_WRITE)
            .unwrap();
        map.write(9 * page_size(), 5).unwrap();
        map.touch_all().unwrap();
        assert_wc(&device, &map, 0);
    }
}

#[test]
fn it_is_write_combining_after_it_was_moved() {
    let device = display();
    let (_fd, map) = wc(&device, huge_size(), huge_size());
    map.touch_all().unwrap();
    let map = map.moved().unwrap();
    assert_wc(&device, &map, huge_size());
    take_and_give(&device);
    let map = map.moved().unwrap();
    assert_eq!(probe::entry(&map, 0), None);
    map.touch_all().unwrap();
    assert_wc(&device, &map, huge_size());
}

#[test]
fn an_uncached_mapping_of_the_same_range_stays_uncached() {
    let device = display();
    let uncached = device.export(FRAME_BUFFER, &[(0, huge_size())]).unwrap();
    let before = Map::aligned(&uncached, huge_size()).unwrap();
    before.touch_all().unwrap();
    let (_fd, combining) = wc(&device, 0, huge_size());
    combining.touch_all().unwrap();
    let after = Map::aligned(&uncached, huge_size()).unwrap();
    let skewed = How::shared()
        .align(huge_size())
        .skew(page_size())
        .map(&uncached, 0, huge_size())
        .unwrap();
    let bar = How::shared()
        .align(huge_size())
        .map(device.as_fd(), 0, huge_size())
        .unwrap();
    for _ in 0..3 {
        for map in [&before, &after, &skewed, &bar] {
            map.touch_all().unwrap();
            assert_type(&device, map, (0, huge_size()), 0, MemoryType::Uncached);
        }
        combining.touch_all().unwrap();
        assert_wc(&device, &combining, 0);
        take_and_give(&device);
    }
}

#[test]
fn mappings_keep_what_they_had_and_later_ones_get_the_new() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 2 * page_size())])
        .unwrap();
    let mut maps = Vec::new();
    for memattr in [MEMATTR_NC, MEMATTR_WC, MEMATTR_NC, MEMATTR_WC] {
        device.memattr(&fd, memattr).unwrap();
        maps.push((memattr, Map::new(&fd, 2 * page_size()).unwrap()));
    }
    for _ in 0..2 {
        for (memattr, map) in &maps {
            map.touch_all().unwrap();
            let wanted = match *memattr {
                MEMATTR_WC => MemoryType::WriteCombining,
                _ => MemoryType::Uncached,
            };
            assert_type(&device, map, (0, 2 * page_size()), 0, wanted);
        }
        take_and_give(&device);
    }
}

#[test]
fn other_buffers_of_the_range_are_not_changed() {
    let device = display();
    let first = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let second = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    device.memattr(&first, MEMATTR_WC).unwrap();
    assert_eq!(device.status(&second).unwrap().memattr, MEMATTR_NC);
    let map = Map::new(&second, page_size()).unwrap();
    map.touch_all().unwrap();
    assert_type(&device, &map, (0, page_size()), 0, MemoryType::Uncached);
}

#[test]
fn revocation_takes_a_write_combining_mapping_too() {
    let device = display();
    let (fd, map) = wc(&device, 0, huge_size() + page_size());
    map.touch_all().unwrap();
    device.revoke(&fd).unwrap();
    for at in [0, page_size(), huge_size()] {
        assert_eq!(probe::entry(&map, at), None);
        assert_eq!(map.write(at, 1), Err(Sigbus));
    }
    assert_eq!(How::shared().map(&fd, 0, page_size()).unwrap_err(), ENODEV);
}

// ---- Faults -------------------------------------------------------------------------------------

fn faults_of_touching(map: &Map) -> u64 {
    // The code is there when it counts.
    let other = Map::anonymous(4 * page_size());
    observe::faults_of(|| other.touch_all().unwrap());
    observe::faults_of(|| map.touch_all().unwrap()) as u64
}

#[test]
fn a_fault_brings_in_2_mib_write_combining() {
    let device = display();
    for (skew, limit) in [(0, 32), (page_size(), 33), (huge_size() / 2, 33)] {
        let fd = buffer(&device, &[(0, FRAME_BUFFER_LEN)], MEMATTR_WC);
        let how = How::shared().align(huge_size()).skew(skew);
        let map = how.map(&fd, 0, FRAME_BUFFER_LEN).unwrap();
        assert_eq!(faults_of_touching(&map), limit, "{skew:#x}");
        assert_eq!(faults_of_touching(&map), 0);
    }
}

#[test]
fn a_batch_ends_with_its_range_and_its_mapping() {
    let device = display();
    // Eight ranges that touch: a batch could go on from one to the next.
    let ranges: Vec<_> = (0..8)
        .map(|i| (i * 8 * page_size(), 8 * page_size()))
        .collect();
    let fd = buffer(&device, &ranges, MEMATTR_WC);
    let map = Map::aligned(&fd, 64 * page_size()).unwrap();
    map.read(17 * page_size()).unwrap();
    for page in 0..64 {
        let there = probe::entry(&map, page * page_size()).is_some();
        assert_eq!(there, (16..24).contains(&page), "{page}");
    }
    let part = How::shared()
        .align(huge_size())
        .map(&fd, 10 * page_size(), 4 * page_size())
        .unwrap();
    part.read(3 * page_size()).unwrap();
    for page in 0..4 {
        assert!(probe::entry(&part, page * page_size()).is_some(), "{page}");
    }
}

#[test]
fn a_batch_leaves_what_is_there() {
    let device = display();
    let (_fd, map) = wc(&device, 0, huge_size());
    map.touch_all().unwrap();
    // Each part that was split off is filled by itself; what is there does not change.
    map.protect(100 * page_size(), page_size(), READ).unwrap();
    map.touch_all().unwrap();
    assert!(!present(&map, 100 * page_size()).writable);
    assert_wc(&device, &map, 0);
}

/// Faults of touching a BAR mapping of the device fd, bound to `driver`.
fn faults_of_bar(driver: &str, skew: u64) -> u64 {
    let device = Device::open_with("display", driver);
    let how = How::shared().align(huge_size()).skew(skew);
    let map = how.map(device.as_fd(), 0, FRAME_BUFFER_LEN).unwrap();
    faults_of_touching(&map)
}

#[test]
fn a_bar_mapping_takes_far_fewer_faults_than_stock_when_skewed_and_as_many_when_aligned() {
    let pages = FRAME_BUFFER_LEN / page_size();
    let skewed = faults_of_bar("barlease-vfio-pci", page_size());
    let aligned = faults_of_bar("barlease-vfio-pci", 0);
    let stock_skewed = faults_of_bar(STOCK, page_size());
    let stock_aligned = faults_of_bar(STOCK, 0);
    eprintln!(
        "faults for {pages} pages: skewed {skewed} (stock {stock_skewed}), aligned {aligned} (stock {stock_aligned})"
    );
    assert!(skewed <= pages / 256, "{skewed}");
    assert!(8 * skewed <= stock_skewed, "{skewed} {stock_skewed}");
    assert_eq!(aligned, FRAME_BUFFER_LEN / huge_size());
    assert!(aligned <= stock_aligned, "{aligned} {stock_aligned}");
}

// ---- Races --------------------------------------------------------------------------------------

/// Touches all of a mapping until it fails, and looks at the entries on the way.
fn touch_and_look(map: &Map, wanted: MemoryType) {
    for at in (0..map.len()).step_by(61 * page_size() as usize) {
        let _ = map.write(at, 1);
        if let Some(found) = probe::memory_type(map, at) {
            assert_eq!(found, wanted, "{at:#x}");
        }
    }
}

#[test]
fn threads_that_fault_while_memory_comes_and_goes_see_one_type_each() {
    let device = display();
    let (_fd, combining) = wc(&device, 0, 2 * huge_size());
    let uncached = device
        .export(FRAME_BUFFER, &[(0, 2 * huge_size())])
        .unwrap();
    let uncached = How::shared()
        .align(huge_size())
        .skew(page_size())
        .map(&uncached, 0, 2 * huge_size())
        .unwrap();
    let combine = || touch_and_look(&combining, MemoryType::WriteCombining);
    let leave = || touch_and_look(&uncached, MemoryType::Uncached);
    meanwhile(&[&combine, &combine, &leave], || {
        for _ in 0..200 {
            device.set_memory(false);
            for map in [&combining, &uncached] {
                assert_eq!(probe::entry(map, 0), None);
                assert_eq!(probe::entry(map, 61 * page_size()), None);
            }
            device.set_memory(true);
            thread::yield_now();
        }
    });
    combining.touch_all().unwrap();
    assert_wc(&device, &combining, 0);
}

#[test]
fn threads_that_fault_during_resets_find_write_combining_after_each() {
    let device = Device::open("memory");
    let fd = device.export(2, &[(0, 2 * huge_size())]).unwrap();
    device.memattr(&fd, MEMATTR_WC).unwrap();
    let map = Map::aligned(&fd, 2 * huge_size()).unwrap();
    let touch = || touch_and_look(&map, MemoryType::WriteCombining);
    meanwhile(&[&touch, &touch, &touch], || {
        for _ in 0..3 {
            device.reset().unwrap();
            device.function().reset().unwrap();
            thread::sleep(Duration::from_millis(5));
            map.touch_all().unwrap();
        }
    });
}

#[test]
fn no_entry_is_left_when_a_revocation_returns_that_races_with_faults() {
    let device = display();
    for round in 0..40 {
        let (fd, map) = wc(&device, 0, 2 * huge_size());
        let touch = || touch_and_look(&map, MemoryType::WriteCombining);
        meanwhile(&[&touch, &touch], || {
            thread::sleep(Duration::from_micros(100 * round));
            device.revoke(&fd).unwrap();
            for at in (0..map.len()).step_by(61 * page_size() as usize) {
                assert_eq!(probe::entry(&map, at), None, "round {round}, {at:#x}");
            }
        });
        assert_eq!(map.read(0), Err(Sigbus));
    }
}

#[test]
fn a_mapping_that_is_made_while_the_attribute_changes_is_of_one_type() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 8 * page_size())])
        .unwrap();
    let number = fd.as_raw_fd();
    let toggle = || {
        for memattr in [MEMATTR_WC, MEMATTR_NC] {
            device.memattr_number(number, memattr).unwrap();
        }
    };
    meanwhile(&[&toggle], || {
        for _ in 0..300 {
            let map = Map::new(&fd, 8 * page_size()).unwrap();
            map.touch_all().unwrap();
            let first = present(&map, 0).memory_type;
            assert!(matches!(
                first,
                MemoryType::WriteCombining | MemoryType::Uncached
            ));
            assert_type(&device, &map, (0, 8 * page_size()), 0, first);
        }
    });
}
