//! Names of leases and BAR mappings, and what else a mapping of a BAR through the device fd has in
//! common with stock's.
#![cfg(barlease_guest)]

use std::{fs, os::fd::AsFd};

use barlease_abi::{ALIAS_WC, MEMATTR_WC};
use barlease_guest_tests::{
    errno::{EINVAL, Errno},
    huge_size,
    lease::set_name,
    map::{How, Map, READ, Sigbus},
    observe, page_size,
    pci::{BARLEASE, STOCK},
    probe,
    process::Child,
    vfio::{CONFIG_REGION, Device, ROM_REGION, VGA_REGION},
};

const FRAME_BUFFER: u32 = 0;

fn display() -> Device {
    Device::open("display")
}

/// Permissions, offset and name of a mapping in `/proc/self/maps`.
fn shown(map: &Map) -> (String, u64, String) {
    let line = observe::maps_line(map.address());
    let words: Vec<_> = line.split_whitespace().collect();
    let offset = u64::from_str_radix(words[2], 16).unwrap();
    (words[1].to_owned(), offset, words[5..].join(" "))
}

#[track_caller]
fn assert_named(map: &Map, name: &str) {
    let (_, _, shown) = shown(map);
    assert!(
        shown.ends_with(&format!(":{name}")) || shown == name,
        "{shown} is not {name}"
    );
}

fn map_bar(device: &Device, region: u32, offset: u64, len: u64) -> Map {
    let at = u64::from(region) << 40 | offset;
    How::shared().map(device.as_fd(), at, len).unwrap()
}

// ---- Names --------------------------------------------------------------------------------------

#[test]
fn a_lease_is_named_after_device_and_bar() {
    for (name, bar) in [("display", 0), ("memory", 2)] {
        let device = Device::open(name);
        let fd = device.export(bar, &[(0, 4 * page_size())]).unwrap();
        let map = How::shared().map(&fd, page_size(), page_size()).unwrap();
        let bdf = &device.function().bdf;
        assert_named(&map, &format!("barlease:{bdf}/{bar}"));
        assert_eq!(shown(&map).1, page_size());
    }
}

#[test]
fn a_bar_mapping_and_one_of_an_alias_have_their_names() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    let uncached = map_bar(&device, FRAME_BUFFER, 0, 2 * page_size());
    let combining = map_bar(&device, alias, 0, 2 * page_size());
    let registers = map_bar(&device, 2, 0, page_size());
    let bdf = &device.function().bdf;
    assert_named(&uncached, &format!("barlease:{bdf}/0"));
    assert_named(&combining, &format!("barlease:{bdf}/0+wc"));
    assert_named(&registers, &format!("barlease:{bdf}/2"));
}

#[test]
fn a_name_that_the_user_sets_is_shown() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let before = Map::new(&fd, page_size()).unwrap();
    set_name(&fd, "screen of tenant 7").unwrap();
    let after = Map::new(&fd, page_size()).unwrap();
    for map in [&before, &after] {
        assert_named(map, "screen of tenant 7");
    }
    // Also of a write-combining buffer, and of a dead one.
    device.memattr(&fd, MEMATTR_WC).unwrap();
    assert_named(&Map::new(&fd, page_size()).unwrap(), "screen of tenant 7");
    device.revoke(&fd).unwrap();
    assert_named(&before, "screen of tenant 7");
}

#[test]
fn another_process_sees_the_names() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    let bdf = device.function().bdf.clone();
    let child = Child::start(&[], |link| {
        map.read(0).unwrap();
        link.send(0);
        link.expect(1);
    });
    child.link.expect(0);
    let maps = fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
    assert!(maps.contains(&format!("barlease:{bdf}/0")), "{maps}");
    child.link.send(1);
    child.join();
}

#[test]
fn bufinfo_lists_leases_with_exporter_size_and_name() {
    let device = display();
    let named = device
        .export(FRAME_BUFFER, &[(0, 3 * page_size())])
        .unwrap();
    set_name(&named, "bl-named").unwrap();
    let _fresh = device
        .export(FRAME_BUFFER, &[(0, 5 * page_size())])
        .unwrap();
    let text = fs::read_to_string("/sys/kernel/debug/dma_buf/bufinfo").unwrap();
    let line = |wanted: &str| {
        let found = text.lines().find(|line| line.ends_with(wanted));
        found
            .unwrap_or_else(|| panic!("no {wanted} in:\n{text}"))
            .to_owned()
    };
    let size = |line: &str| {
        line.split_whitespace()
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let bdf = &device.function().bdf;
    assert_eq!(size(&line("bl-named")), 3 * page_size());
    let fresh = line(&format!("barlease:{bdf}/0"));
    assert_eq!(size(&fresh), 5 * page_size());
    assert!(fresh.contains("barlease"), "{fresh}");
}

#[test]
fn debugfs_shows_names_and_marks_bar_mappings() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    set_name(&fd, "tenant-7").unwrap();
    let _map = map_bar(&device, FRAME_BUFFER, 0, page_size());
    let text = observe::buffers_text(device.function());
    assert!(text.contains("tenant-7"), "{text}");
    let bdf = &device.function().bdf;
    let names: Vec<_> = observe::buffers(device.function())
        .iter()
        .map(|line| line.get("name").to_owned())
        .collect();
    assert_eq!(names, ["tenant-7", &format!("barlease:{bdf}/0[mmap]")]);
}

#[test]
fn a_name_cannot_forge_lines_or_columns_of_debugfs() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    for name in [
        "a b c",
        "a\nb 0 1",
        "x[mmap]",
        "tab\tbell\x07",
        "\u{fc}",
        "",
    ] {
        set_name(&fd, name).unwrap();
        // Fails when a line has other columns than the header.
        let lines = observe::buffers(device.function());
        assert_eq!(lines.len(), 1, "{name:?}");
        assert_eq!(lines[0].get("size"), "0x1000", "{name:?}");
        // That marks mappings through the device fd.
        let shown = lines[0].get("name");
        assert!(!shown.ends_with("[mmap]"), "{shown}");
    }
}

// ---- mmap through the device fd -----------------------------------------------------------------

#[test]
fn the_offset_that_is_shown_is_the_one_that_was_asked_for() {
    // The same lines but for the name.
    let lines = |driver: &str| -> Vec<_> {
        let device = Device::open_with("display", driver);
        [
            (0, 0, page_size()),
            (0, 5 * page_size(), huge_size()),
            (2, 0, page_size()),
        ]
        .map(|(bar, offset, len)| {
            let map = map_bar(&device, bar, offset, len);
            let (permissions, at, _) = shown(&map);
            assert_eq!(at, u64::from(bar) << 40 | offset);
            (permissions, at)
        })
        .into()
    };
    assert_eq!(lines(BARLEASE), lines(STOCK));
}

#[test]
fn a_part_that_was_split_off_shows_its_own_offset() {
    let device = display();
    let mut map = map_bar(&device, FRAME_BUFFER, 8 * page_size(), 8 * page_size());
    map.touch_all().unwrap();
    map.unmap(3 * page_size(), page_size());
    let line = observe::maps_line(map.address() + 4 * page_size() as usize);
    let offset = line.split_whitespace().nth(2).unwrap();
    assert_eq!(u64::from_str_radix(offset, 16).unwrap(), 12 * page_size());
    device.set_memory(false);
    device.set_memory(true);
    // The page that faults in again is the right one.
    let (start, _) = device.function().bar(FRAME_BUFFER);
    map.touch(4 * page_size(), 4 * page_size()).unwrap();
    assert_eq!(
        probe::entry(&map, 4 * page_size()).unwrap().physical,
        start + 12 * page_size()
    );
}

/// The answers of mmap of the device fd to many requests.
fn answers(name: &str, driver: &str) -> Vec<(String, Result<(), Errno>)> {
    let device = Device::open_with(name, driver);
    let mut answers = Vec::new();
    let regions = [
        0,
        1,
        2,
        3,
        4,
        5,
        ROM_REGION,
        CONFIG_REGION,
        VGA_REGION,
        9,
        10,
        0x7f_ffff,
    ];
    for region in regions {
        let size = device.region_info(region).map_or(0, |info| info.size);
        for (offset, len) in [
            (0, page_size()),
            (0, size.max(1)),
            (0, size + page_size()),
            (size & !(page_size() - 1), page_size()),
            (
                size.saturating_sub(page_size()) & !(page_size() - 1),
                2 * page_size(),
            ),
            ((1 << 40) - page_size(), 2 * page_size()),
        ] {
            let at = u64::from(region) << 40 | offset;
            let shared = How::shared();
            for (what, how) in [
                ("shared", shared),
                ("private", shared.private()),
                ("shared read-only", shared.protection(READ)),
                ("private read-only", shared.private().protection(READ)),
            ] {
                let answer = how.map(device.as_fd(), at, len).map(drop);
                let question = format!("{name} {what} region {region}: {offset:#x} {len:#x}");
                answers.push((question, answer));
            }
        }
    }
    answers
}

#[test]
fn what_stock_refuses_to_map_is_refused_and_what_it_maps_is_mapped() {
    for name in ["display", "memory", "nvme", "igb", "testdev", "edu"] {
        let ours = answers(name, BARLEASE);
        let stock = answers(name, STOCK);
        for (ours, stock) in ours.iter().zip(&stock) {
            assert_eq!(ours, stock);
        }
        assert!(stock.iter().any(|(_, answer)| answer.is_ok()), "{name}");
        assert!(
            stock.iter().any(|(_, answer)| *answer == Err(EINVAL)),
            "{name}"
        );
    }
}

#[test]
fn a_bar_smaller_than_a_page_is_mapped_as_stock_does() {
    let shown_by = |driver: &str| {
        let device = Device::open_with("memory", driver);
        let info = device.region_info(0).unwrap();
        let answer = How::shared().map(device.as_fd(), 0, page_size());
        let read = answer.map(|map| map.read(8).map(drop));
        (info.size, info.flags & 4, read)
    };
    assert_eq!(shown_by(BARLEASE), shown_by(STOCK));
}

#[test]
fn a_bar_mapping_keeps_the_device_open() {
    let device = display();
    let function = device.function().clone();
    let group = device.group().clone();
    let lease = device
        .export(FRAME_BUFFER, &[(page_size(), page_size())])
        .unwrap();
    let lease_map = Map::new(&lease, page_size()).unwrap();
    let map = map_bar(&device, FRAME_BUFFER, 0, 2 * page_size());
    map.touch_all().unwrap();
    drop(device);
    // So leases live on as well.
    map.write(page_size(), 21).unwrap();
    assert_eq!(lease_map.read(0), Ok(21));
    drop(map);
    // The last reference is given up a little after.
    observe::wait_for_buffers(&function, 1);
    assert_eq!(lease_map.read(0), Err(Sigbus));
    drop((lease, lease_map));
    drop(group);
    drop(display());
}

#[test]
fn a_bar_mapping_is_faulted_in_after_the_device_fd_was_closed() {
    let device = display();
    let group = device.group().clone();
    let function = device.function().clone();
    let map = How::shared()
        .align(huge_size())
        .map(device.as_fd(), 0, 2 * huge_size())
        .unwrap();
    drop(device);
    map.touch_all().unwrap();
    // Another fd of the same open device takes it away, too.
    let device = group.device(&function).unwrap();
    device.set_memory(false);
    assert_eq!(map.read(0), Err(Sigbus));
    device.set_memory(true);
    map.touch_all().unwrap();
}

#[test]
fn a_child_keeps_the_device_open_by_a_bar_mapping() {
    let device = display();
    let function = device.function().clone();
    let map = map_bar(&device, FRAME_BUFFER, 0, page_size());
    let child = Child::start(&[], |link| {
        link.send(0);
        link.expect(1);
        map.write(0, 7).unwrap();
        link.send(2);
        link.expect(3);
    });
    child.link.expect(0);
    drop(map);
    drop(device);
    child.link.send(1);
    child.link.expect(2);
    assert_eq!(observe::buffers(&function).len(), 1);
    child.link.send(3);
    child.join();
    observe::wait_for_buffers(&function, 0);
}
