//! mmap of buffers: what is refused, what a mapping shows, which entries it gets, how long it
//! lives.
#![cfg(barlease_guest)]

use std::os::fd::{AsFd, OwnedFd};

use barlease_abi::REASON_MEMORY_OFF;
use barlease_guest_tests::{
    HUGE, PAGE,
    errno::{Answer, EACCES, EFAULT, EINVAL, ENODEV, Errno},
    lease::{Request, State},
    map::{How, Map, READ, READ_WRITE, Sigbus},
    observe,
    process::{Child, End},
    vfio::{CONFIG_REGION, Device},
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;
const FRAME_BUFFER_LEN: u64 = 64 << 20;

fn display() -> Device {
    Device::open("display")
}

fn errno(answer: Answer<Map>) -> Errno {
    match answer {
        Ok(_) => panic!("not refused"),
        Err(errno) => errno,
    }
}

/// Writes the number of each page of the frame buffer into its first bytes.
fn number_pages(device: &Device) {
    let fd = device
        .export(FRAME_BUFFER, &[(0, FRAME_BUFFER_LEN)])
        .unwrap();
    let map = How::shared()
        .align(HUGE)
        .map(&fd, 0, FRAME_BUFFER_LEN)
        .unwrap();
    for page in 0..FRAME_BUFFER_LEN / PAGE {
        map.write(page * PAGE, page as u32).unwrap();
    }
}

/// The number of the page at an offset in a buffer of these ranges.
fn page_at(ranges: &[(u64, u64)], mut offset: u64) -> u32 {
    for &(start, len) in ranges {
        if offset < len {
            return ((start + offset) / PAGE) as u32;
        }
        offset -= len;
    }
    panic!("past the end");
}

fn faults_of_touching(map: &Map) -> i64 {
    // The code is there when it counts.
    let other = Map::anonymous(4 * PAGE);
    observe::faults_of(|| other.touch_all().unwrap());
    observe::faults_of(|| map.touch_all().unwrap())
}

// ---- What is refused
// ------------------------------------------------------------------------------

#[test]
fn a_private_mapping_is_einval() {
    let device = display();
    for flags in [libc::O_RDWR, libc::O_RDONLY] {
        let request = Request::new(FRAME_BUFFER, &[(0, PAGE)]).open_flags(flags);
        let fd = device.request(&request).unwrap();
        let how = How::shared().private().protection(READ);
        assert_eq!(errno(how.map(&fd, 0, PAGE)), EINVAL);
        assert!(How::shared().protection(READ).map(&fd, 0, PAGE).is_ok());
    }
}

#[test]
fn offset_and_length_past_the_end_are_einval() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, 4 * PAGE)]).unwrap();
    for (offset, len) in [
        (0, 5 * PAGE),
        (PAGE, 4 * PAGE),
        (3 * PAGE, 2 * PAGE),
        (4 * PAGE, PAGE),
        (1 << 40, PAGE),
        ((1 << 63) - PAGE, PAGE),
    ] {
        let answer = How::shared().map(&fd, offset, len);
        assert_eq!(errno(answer), EINVAL, "{offset:#x} {len:#x}");
    }
    assert!(How::shared().map(&fd, 3 * PAGE, PAGE).is_ok());
    // Part of a page counts as all of it.
    assert!(How::shared().map(&fd, 3 * PAGE, 100).is_ok());
}

#[test]
fn a_read_only_fd_is_not_mapped_for_writing() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, PAGE)]).open_flags(libc::O_RDONLY);
    let fd = device.request(&request).unwrap();
    assert_eq!(errno(Map::new(&fd, PAGE)), EACCES);
    let map = How::shared().protection(READ).map(&fd, 0, PAGE).unwrap();
    assert_eq!(map.protect(0, PAGE, READ_WRITE), Err(EACCES));
    device.write32(FRAME_BUFFER, 0, 99);
    assert_eq!(map.read(0), Ok(99));
}

#[test]
fn a_read_only_mapping_of_a_read_only_fd_is_taken_away_like_any_other() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, PAGE)]).open_flags(libc::O_RDONLY);
    let fd = device.request(&request).unwrap();
    let map = How::shared().protection(READ).map(&fd, 0, PAGE).unwrap();
    map.read(0).unwrap();
    device.set_memory(false);
    assert_eq!(map.read(0), Err(Sigbus));
    device.set_memory(true);
    map.read(0).unwrap();
    device.revoke(&fd).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
}

#[test]
fn a_write_only_fd_is_not_mapped() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, PAGE)]).open_flags(libc::O_WRONLY);
    let fd = device.request(&request).unwrap();
    assert_eq!(errno(Map::new(&fd, PAGE)), EACCES);
}

#[test]
fn a_dead_buffer_is_enodev() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, PAGE)]).unwrap();
    device.revoke(&fd).unwrap();
    assert_eq!(errno(Map::new(&fd, PAGE)), ENODEV);
    let how = How::shared().protection(READ);
    assert_eq!(errno(how.map(&fd, 0, PAGE)), ENODEV);
}

#[test]
fn a_revoked_buffer_is_mapped_and_gives_sigbus_until_it_is_ok() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, HUGE)]).unwrap();
    device.set_memory(false);
    let map = How::shared().align(HUGE).map(&fd, 0, HUGE).unwrap();
    for _ in 0..3 {
        assert_eq!(map.read(0), Err(Sigbus));
        assert_eq!(map.write(PAGE, 1), Err(Sigbus));
    }
    device.set_memory(true);
    map.write(PAGE, 1).unwrap();
    assert_eq!(map.read(PAGE), Ok(1));
}

#[test]
fn a_touch_that_gives_sigbus_ends_a_process_that_does_not_expect_it() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, PAGE)]).unwrap();
    let map = Map::new(&fd, PAGE).unwrap();
    device.revoke(&fd).unwrap();
    let mut child = Child::start(&[], |_| {
        let _ = map.read_unprotected(0);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGBUS));
}

#[test]
fn the_kernel_gets_efault_where_a_process_gets_sigbus() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, PAGE)]).unwrap();
    let map = Map::new(&fd, PAGE).unwrap();
    assert_eq!(map.receive_zeros(), Ok(4));
    device.set_memory(false);
    assert_eq!(map.receive_zeros(), Err(EFAULT));
    device.set_memory(true);
    assert_eq!(map.receive_zeros(), Ok(4));
}

#[test]
fn nobody_pins_pages_of_a_mapping() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, HUGE)]).unwrap();
    let map = How::shared().align(HUGE).map(&fd, 0, HUGE).unwrap();
    map.touch_all().unwrap();
    assert_eq!(Map::anonymous(PAGE).copied_by_pinning(), Ok(4));
    assert_eq!(map.copied_by_pinning(), Err(EFAULT));
}

#[test]
fn files_of_proc_that_walk_page_tables_show_a_mapping() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, 2 * HUGE)]).unwrap();
    for skew in [0, PAGE] {
        let map = How::shared()
            .align(HUGE)
            .skew(skew)
            .map(&fd, 0, 2 * HUGE)
            .unwrap();
        map.touch_all().unwrap();
        for file in ["smaps", "smaps_rollup", "numa_maps", "maps"] {
            // Not every kernel has each of them.
            let text = std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
            let shown = text.contains(&format!("{:x}", map.address()));
            assert!(shown || file != "smaps");
        }
        std::fs::write("/proc/self/clear_refs", "1").unwrap();
        map.touch_all().unwrap();
    }
}

// ---- What a mapping shows
// -------------------------------------------------------------------------

#[test]
fn every_page_is_the_right_one_whatever_the_ranges_and_the_alignment() {
    let device = display();
    number_pages(&device);
    let mib = 1 << 20;
    let lists: [&[(u64, u64)]; 6] = [
        &[(0, 6 * mib)],
        // Touching, and together what one entry could map.
        &[(2 * mib, mib), (3 * mib, mib), (4 * mib, 2 * mib)],
        &[(8 * mib, 2 * mib), (4 * mib, 2 * mib), (8 * mib, 2 * mib)],
        &[
            (63 * mib, mib),
            (0, PAGE),
            (2 * mib, 3 * mib),
            (PAGE, 7 * PAGE),
        ],
        &[
            (mib, 3 * mib),
            (5 * mib + PAGE, 2 * mib - PAGE),
            (4 * mib, 2 * mib),
        ],
        &[(10 * mib - PAGE, 4 * mib + 2 * PAGE)],
    ];
    for ranges in lists {
        let len: u64 = ranges.iter().map(|(_, len)| len).sum();
        let fd = device.export(FRAME_BUFFER, ranges).unwrap();
        for skew in [0, PAGE, mib, HUGE - PAGE] {
            for offset in [0, PAGE, mib, len - PAGE] {
                // From both ends: what comes in around a fault, before it and behind it, is looked
                // at too.
                for backwards in [false, true] {
                    let how = How::shared().align(HUGE).skew(skew);
                    let map = how.map(&fd, offset, len - offset).unwrap();
                    let pages = map.len() / PAGE;
                    for step in 0..pages {
                        let page = if backwards { pages - 1 - step } else { step };
                        let expected = page_at(ranges, offset + page * PAGE);
                        assert_eq!(
                            map.read(page * PAGE),
                            Ok(expected),
                            "{ranges:x?} {skew:#x} {offset:#x} {page:#x}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn two_mappings_of_one_buffer_show_the_same() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, 2 * HUGE)]).unwrap();
    let aligned = How::shared().align(HUGE).map(&fd, 0, 2 * HUGE).unwrap();
    let skewed = How::shared()
        .align(HUGE)
        .skew(PAGE)
        .map(&fd, HUGE, HUGE)
        .unwrap();
    aligned.write(HUGE + 5 * PAGE, 1234).unwrap();
    assert_eq!(skewed.read(5 * PAGE), Ok(1234));
    skewed.write(6 * PAGE, 4321).unwrap();
    assert_eq!(aligned.read(HUGE + 6 * PAGE), Ok(4321));
}

#[test]
fn proc_maps_shows_the_offset_that_was_asked_for() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(HUGE, 8 * PAGE)]).unwrap();
    let map = How::shared().map(&fd, 3 * PAGE, PAGE).unwrap();
    let line = observe::maps_line(map.address());
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[1], "rw-s", "{line}");
    assert_eq!(words[2], "00003000", "{line}");
}

// ---- Entries
// --------------------------------------------------------------------------------------

/// KiB of page tables that touching all of a mapping costs.
fn page_tables_of_touching(map: &Map) -> u64 {
    let before = observe::page_tables();
    map.touch_all().unwrap();
    observe::page_tables() - before
}

#[test]
fn an_aligned_mapping_gets_2_mib_entries() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, FRAME_BUFFER_LEN)])
        .unwrap();
    let map = How::shared()
        .align(HUGE)
        .map(&fd, 0, FRAME_BUFFER_LEN)
        .unwrap();
    let entries = FRAME_BUFFER_LEN / HUGE;
    assert_eq!(faults_of_touching(&map), entries as i64);
    let map = How::shared()
        .align(HUGE)
        .map(&fd, 0, FRAME_BUFFER_LEN)
        .unwrap();
    // Smaller entries need a table of 4 KiB for each 2 MiB.
    let tables = page_tables_of_touching(&map);
    if observe::has_entries_above_pages() {
        assert!(tables <= 8, "{tables} KiB");
    } else {
        assert!(tables >= 4 * entries, "{tables} KiB");
    }
}

#[test]
fn a_range_that_is_aligned_in_the_bar_gets_them_wherever_it_is_in_the_buffer() {
    let device = display();
    let ranges = [(0, HUGE), (PAGE, PAGE), (3 * HUGE, 2 * HUGE)];
    let fd = device.export(FRAME_BUFFER, &ranges).unwrap();
    // The third range begins at an address that is a multiple of 2 MiB.
    let how = How::shared().align(HUGE).skew(HUGE - PAGE);
    let map = how.map(&fd, HUGE, PAGE + 2 * HUGE).unwrap();
    assert_eq!(faults_of_touching(&map), 1 + 2);
}

#[test]
fn an_unaligned_mapping_gets_pages_up_to_2_mib_a_fault() {
    let device = display();
    let len = 16 * HUGE;
    let fd = device.export(FRAME_BUFFER, &[(0, len)]).unwrap();
    for skew in [PAGE, HUGE / 2, HUGE - PAGE] {
        let how = How::shared().align(HUGE).skew(skew);
        let map = how.map(&fd, 0, len).unwrap();
        assert_eq!(faults_of_touching(&map), 17, "{skew:#x}");
        let map = how.map(&fd, 0, len).unwrap();
        let tables = page_tables_of_touching(&map);
        assert!(tables >= 16 * 4, "{skew:#x}: {tables} KiB");
    }
}

#[test]
fn no_entry_and_no_batch_spans_two_ranges() {
    let device = display();
    // Together they are 2 MiB that one entry could map.
    let half = HUGE / 2;
    let fd = device
        .export(FRAME_BUFFER, &[(HUGE, half), (HUGE + half, half)])
        .unwrap();
    for skew in [0, half] {
        let how = How::shared().align(HUGE).skew(skew);
        let map = how.map(&fd, 0, HUGE).unwrap();
        assert_eq!(faults_of_touching(&map), 2, "{skew:#x}");
    }
}

#[test]
fn what_comes_in_around_a_fault_stays_in_the_mapping() {
    let device = display();
    number_pages(&device);
    let fd = device.export(FRAME_BUFFER, &[(HUGE, 4 * HUGE)]).unwrap();
    // Memory of the process on both sides, in the same 2 MiB.
    for at in [200 * PAGE, PAGE, 511 * PAGE] {
        let mut memory = Map::anonymous(4 * HUGE);
        let window = (memory.address() as u64).next_multiple_of(HUGE) - memory.address() as u64;
        let lease = How::shared().map_over(&mut memory, window + at, &fd, HUGE + 300 * PAGE, PAGE);
        lease.unwrap().touch_all().unwrap();
        for page in (window..window + 2 * HUGE).step_by(PAGE as usize) {
            if page != window + at {
                assert_eq!(memory.read(page), Ok(0), "{at:#x} {page:#x}");
            }
        }
    }
}

#[test]
fn no_entry_leaves_the_mapping() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, 2 * HUGE)]).unwrap();
    // 2 MiB of which neither half is behind an aligned address with room for an entry.
    let mut map = How::shared().align(HUGE).map(&fd, 0, 2 * HUGE).unwrap();
    map.unmap(0, PAGE);
    map.unmap(2 * HUGE - PAGE, PAGE);
    map.touch(PAGE, 2 * HUGE - 2 * PAGE).unwrap();
    let mut child = Child::start(&[], |_| {
        let _ = map.read_unprotected(0);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGSEGV));
}

#[test]
fn what_is_touched_once_faults_once() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, 2 * HUGE)]).unwrap();
    for skew in [0, PAGE] {
        let how = How::shared().align(HUGE).skew(skew);
        let map = how.map(&fd, 0, 2 * HUGE).unwrap();
        map.touch_all().unwrap();
        assert_eq!(faults_of_touching(&map), 0, "{skew:#x}");
    }
}

// ---- How long a mapping lives
// ---------------------------------------------------------------------

fn huge_map(device: &Device) -> (OwnedFd, Map) {
    let fd = device.export(FRAME_BUFFER, &[(0, 2 * HUGE)]).unwrap();
    let map = How::shared().align(HUGE).map(&fd, 0, 2 * HUGE).unwrap();
    map.touch_all().unwrap();
    (fd, map)
}

#[test]
fn a_mapping_survives_the_close_of_the_fd() {
    let device = display();
    let (fd, map) = huge_map(&device);
    drop(fd);
    map.write(HUGE, 5).unwrap();
    assert_eq!(device.read32(FRAME_BUFFER, HUGE), 5);
    // Entries that are taken away come back too.
    device.set_memory(false);
    assert_eq!(map.read(HUGE), Err(Sigbus));
    device.set_memory(true);
    assert_eq!(map.read(HUGE), Ok(5));
    assert_eq!(observe::buffers(device.function()).len(), 1);
    drop(map);
    observe::wait_for_buffers(device.function(), 0);
}

#[test]
fn a_mapping_survives_fork() {
    let device = display();
    let (_fd, map) = huge_map(&device);
    map.write(0, 1).unwrap();
    let child = Child::start(&[], |link| {
        assert_eq!(map.read(0), Ok(1));
        map.write(4, 2).unwrap();
        link.send(0);
        link.expect(1);
        assert_eq!(map.read(0), Err(Sigbus));
        link.send(2);
        link.expect(3);
        assert_eq!(map.read(4), Ok(2));
        map.write(8, 3).unwrap();
    });
    child.link.expect(0);
    assert_eq!(map.read(4), Ok(2));
    let [line] = &observe::buffers(device.function())[..] else {
        panic!("one buffer");
    };
    assert_eq!(line.get("mmaps"), "2");
    // A take-away takes memory from the child too.
    device.set_memory(false);
    child.link.send(1);
    child.link.expect(2);
    device.set_memory(true);
    // The child's mapping is its own.
    drop(map);
    child.link.send(3);
    child.join();
    assert_eq!(device.read32(FRAME_BUFFER, 8), 3);
}

#[test]
fn a_mapping_survives_mremap() {
    let device = display();
    let (_fd, map) = huge_map(&device);
    map.write(HUGE + PAGE, 7).unwrap();
    let old = map.address();
    let map = map.moved().unwrap();
    assert_ne!(map.address(), old);
    assert_eq!(map.read(HUGE + PAGE), Ok(7));
    map.touch_all().unwrap();
    device.set_memory(false);
    assert_eq!(map.read(HUGE + PAGE), Err(Sigbus));
    device.set_memory(true);
    let map = map.moved().unwrap();
    assert_eq!(map.read(HUGE + PAGE), Ok(7));
    drop(map);
    observe::wait_for_buffers(device.function(), 1);
    assert_eq!(observe::buffers(device.function())[0].get("mmaps"), "0");
}

#[test]
fn a_mapping_does_not_grow() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, 8 * PAGE)]).unwrap();
    let map = Map::new(&fd, 4 * PAGE).unwrap();
    assert_eq!(map.grow(8 * PAGE), Err(EFAULT));
    map.touch_all().unwrap();
}

#[test]
fn a_page_is_unmapped_from_the_middle_of_a_2_mib_entry() {
    let device = display();
    let (_fd, mut map) = huge_map(&device);
    for at in [HUGE - PAGE, 7 * PAGE, HUGE + 100 * PAGE] {
        map.unmap(at, PAGE);
        map.write(at - PAGE, 11).unwrap();
        map.write(at - 2 * PAGE, 12).unwrap();
        assert_eq!(device.read32(FRAME_BUFFER, at - 2 * PAGE), 12);
    }
    map.write(HUGE + PAGE, 13).unwrap();
    assert_eq!(device.read32(FRAME_BUFFER, HUGE + PAGE), 13);
    let mut child = Child::start(&[], |_| {
        let _ = map.read_unprotected(7 * PAGE);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGSEGV));
    // Each part is taken away and given back.
    device.set_memory(false);
    for at in [0, 8 * PAGE, HUGE + PAGE, HUGE + 101 * PAGE] {
        assert_eq!(map.read(at), Err(Sigbus), "{at:#x}");
    }
    device.set_memory(true);
    for at in [0, 8 * PAGE, HUGE + PAGE, HUGE + 101 * PAGE] {
        map.read(at).unwrap();
    }
}

#[test]
fn a_page_in_the_middle_of_a_2_mib_entry_is_protected() {
    let device = display();
    let (_fd, map) = huge_map(&device);
    map.write(9 * PAGE, 90).unwrap();
    map.protect(9 * PAGE, PAGE, READ).unwrap();
    assert_eq!(map.read(9 * PAGE), Ok(90));
    map.write(8 * PAGE, 80).unwrap();
    map.write(10 * PAGE, 100).unwrap();
    let mut child = Child::start(&[], |_| {
        let _ = map.write(9 * PAGE, 91);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGSEGV));
    assert_eq!(device.read32(FRAME_BUFFER, 9 * PAGE), 90);
    map.protect(9 * PAGE, PAGE, READ_WRITE).unwrap();
    map.write(9 * PAGE, 92).unwrap();
    assert_eq!(device.read32(FRAME_BUFFER, 9 * PAGE), 92);
}

#[test]
fn the_buffers_file_counts_mappings() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, 4 * PAGE)]).unwrap();
    let count = || {
        observe::buffers(device.function())[0]
            .get("mmaps")
            .to_owned()
    };
    assert_eq!(count(), "0");
    let mut map = Map::new(&fd, 4 * PAGE).unwrap();
    assert_eq!(count(), "1");
    map.unmap(PAGE, PAGE);
    assert_eq!(count(), "2");
    let other = Map::new(&fd, PAGE).unwrap();
    assert_eq!(count(), "3");
    drop(map);
    assert_eq!(count(), "1");
    drop(other);
    assert_eq!(count(), "0");
}

// ---- More than a GiB
// ------------------------------------------------------------------------------

const GIB: u64 = 1 << 30;

/// Unmaps and protects pages where an entry of 1 GiB would have to be split.
fn split_a_gib(device: &Device, mut map: Map) {
    map.touch(0, 2 * HUGE).unwrap();
    map.write(GIB - PAGE, 1).unwrap();
    map.write(GIB + 3 * PAGE, 2).unwrap();
    map.unmap(HUGE + PAGE, PAGE);
    map.protect(GIB + HUGE / 2, PAGE, READ).unwrap();
    map.unmap(2 * GIB - 5 * PAGE, PAGE);
    assert_eq!(map.read(GIB - PAGE), Ok(1));
    assert_eq!(map.read(GIB + 3 * PAGE), Ok(2));
    map.write(HUGE + 2 * PAGE, 3).unwrap();
    map.write(2 * GIB - 4 * PAGE, 4).unwrap();
    map.read(GIB + HUGE / 2).unwrap();
    assert_eq!(device.read32(2, HUGE + 2 * PAGE), 3);
    assert_eq!(device.read32(2, 2 * GIB - 4 * PAGE), 4);
    device.set_memory(false);
    assert_eq!(map.read(GIB), Err(Sigbus));
    device.set_memory(true);
    assert_eq!(map.read(GIB - PAGE), Ok(1));
}

#[test]
fn a_page_is_unmapped_from_a_buffer_of_4_gib() {
    let device = Device::open("big");
    let fd = device.export(2, &[(0, 4 * GIB)]).unwrap();
    let map = How::shared().align(GIB).map(&fd, 0, 4 * GIB).unwrap();
    split_a_gib(&device, map);
}

#[test]
fn a_page_is_unmapped_from_a_bar_of_4_gib() {
    let device = Device::open("big");
    let how = How::shared().align(GIB);
    let map = how.map(device.as_fd(), 2 << 40, 4 * GIB).unwrap();
    split_a_gib(&device, map);
}

#[test]
fn offsets_over_4_gib_are_kept_apart() {
    let device = Device::open("big");
    // 8 GiB of buffer: the BAR twice.
    let fd = device.export(2, &[(0, 4 * GIB), (0, 4 * GIB)]).unwrap();
    let how = How::shared().align(HUGE);
    let high = how.map(&fd, 7 * GIB + HUGE, HUGE).unwrap();
    let low = how.map(&fd, 3 * GIB, 2 * HUGE).unwrap();
    high.write(PAGE, 21).unwrap();
    assert_eq!(low.read(HUGE + PAGE), Ok(21));
    assert_eq!(device.read32(2, 3 * GIB + HUGE + PAGE), 21);
    assert_eq!(device.status(&fd).unwrap().size, 8 * GIB);
}

// ---- Together with the device fd
// ------------------------------------------------------------------

#[test]
fn a_bar_mapped_through_the_device_fd_shows_the_same() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(3 * PAGE, PAGE)]).unwrap();
    let lease = Map::new(&fd, PAGE).unwrap();
    let bar = How::shared()
        .map(device.as_fd(), 0, FRAME_BUFFER_LEN)
        .unwrap();
    bar.write(3 * PAGE, 42).unwrap();
    assert_eq!(lease.read(0), Ok(42));
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn what_a_bar_mapping_loses_comes_back() {
    let device = display();
    let bar = How::shared().map(device.as_fd(), 0, 2 * HUGE).unwrap();
    bar.write(HUGE, 9).unwrap();
    device.set_memory(false);
    assert_eq!(bar.read(HUGE), Err(Sigbus));
    let mut config = [0; 4];
    assert_eq!(device.read(CONFIG_REGION, 0, &mut config), Ok(4));
    assert_eq!(bar.read(HUGE), Err(Sigbus));
    device.set_memory(true);
    assert_eq!(bar.read(HUGE), Ok(9));
    let lease = device.export(FRAME_BUFFER, &[(0, PAGE)]).unwrap();
    device.set_memory(false);
    assert_eq!(device.state(&lease), State::Revoked(REASON_MEMORY_OFF));
    device.set_memory(true);
}
