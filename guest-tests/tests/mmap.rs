//! mmap of buffers: what is refused, what a mapping shows, which entries it gets, how long it
//! lives.
#![cfg(barlease_guest)]

use std::os::fd::AsFd;

use barlease_abi::REASON_MEMORY_OFF;
use barlease_guest_tests::{
    errno::{Answer, EACCES, EFAULT, EINVAL, ENODEV, Errno},
    huge_size,
    lease::{Request, State},
    map::{How, Map, READ, READ_WRITE, Sigbus},
    observe, page_size,
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
    let map = Map::aligned(&fd, FRAME_BUFFER_LEN).unwrap();
    for page in 0..FRAME_BUFFER_LEN / page_size() {
        map.write(page * page_size(), page as u32).unwrap();
    }
}

/// The number of the page at an offset in a buffer of these ranges.
fn page_at(ranges: &[(u64, u64)], mut offset: u64) -> u32 {
    for &(start, len) in ranges {
        if offset < len {
            return ((start + offset) / page_size()) as u32;
        }
        offset -= len;
    }
    panic!("past the end");
}

fn faults_of_touching(map: &Map) -> i64 {
    // The code is there when it counts.
    let other = Map::anonymous(4 * page_size());
    observe::faults_of(|| other.touch_all().unwrap());
    observe::faults_of(|| map.touch_all().unwrap())
}

// ---- Refusals -----------------------------------------------------------------------------------

#[test]
fn a_private_mapping_is_einval() {
    let device = display();
    for flags in [libc::O_RDWR, libc::O_RDONLY] {
        let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(flags);
        let fd = device.request(&request).unwrap();
        let how = How::shared().private().protection(READ);
        assert_eq!(errno(how.map(&fd, 0, page_size())), EINVAL);
        assert!(
            How::shared()
                .protection(READ)
                .map(&fd, 0, page_size())
                .is_ok()
        );
    }
}

#[test]
fn offset_and_length_past_the_end_are_einval() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 4 * page_size())])
        .unwrap();
    for (offset, len) in [
        (0, 5 * page_size()),
        (page_size(), 4 * page_size()),
        (3 * page_size(), 2 * page_size()),
        (4 * page_size(), page_size()),
        (1 << 40, page_size()),
        ((1 << 63) - page_size(), page_size()),
    ] {
        let answer = How::shared().map(&fd, offset, len);
        assert_eq!(errno(answer), EINVAL, "{offset:#x} {len:#x}");
    }
    assert!(How::shared().map(&fd, 3 * page_size(), page_size()).is_ok());
    // Part of a page counts as all of it.
    assert!(How::shared().map(&fd, 3 * page_size(), 100).is_ok());
}

#[test]
fn a_read_only_fd_is_not_mapped_for_writing() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(libc::O_RDONLY);
    let fd = device.request(&request).unwrap();
    assert_eq!(errno(Map::new(&fd, page_size())), EACCES);
    let map = How::shared()
        .protection(READ)
        .map(&fd, 0, page_size())
        .unwrap();
    assert_eq!(map.protect(0, page_size(), READ_WRITE), Err(EACCES));
    device.write32(FRAME_BUFFER, 0, 99);
    assert_eq!(map.read(0), Ok(99));
}

#[test]
fn a_read_only_mapping_of_a_read_only_fd_is_taken_away_like_any_other() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(libc::O_RDONLY);
    let fd = device.request(&request).unwrap();
    let map = How::shared()
        .protection(READ)
        .map(&fd, 0, page_size())
        .unwrap();
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
    let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(libc::O_WRONLY);
    let fd = device.request(&request).unwrap();
    assert_eq!(errno(Map::new(&fd, page_size())), EACCES);
}

#[test]
fn a_dead_buffer_is_enodev() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    device.revoke(&fd).unwrap();
    assert_eq!(errno(Map::new(&fd, page_size())), ENODEV);
    let how = How::shared().protection(READ);
    assert_eq!(errno(how.map(&fd, 0, page_size())), ENODEV);
}

#[test]
fn a_revoked_buffer_is_mapped_and_gives_sigbus_until_it_is_ok() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, huge_size())]).unwrap();
    device.set_memory(false);
    let map = Map::aligned(&fd, huge_size()).unwrap();
    for _ in 0..3 {
        assert_eq!(map.read(0), Err(Sigbus));
        assert_eq!(map.write(page_size(), 1), Err(Sigbus));
    }
    device.set_memory(true);
    map.write(page_size(), 1).unwrap();
    assert_eq!(map.read(page_size()), Ok(1));
}

#[test]
fn a_touch_that_gives_sigbus_ends_a_process_that_does_not_expect_it() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    device.revoke(&fd).unwrap();
    let mut child = Child::start(&[], |_| {
        let _ = map.read_unprotected(0);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGBUS));
}

#[test]
fn the_kernel_gets_efault_where_a_process_gets_sigbus() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    assert_eq!(map.receive_zeros(), Ok(4));
    device.set_memory(false);
    assert_eq!(map.receive_zeros(), Err(EFAULT));
    device.set_memory(true);
    assert_eq!(map.receive_zeros(), Ok(4));
}

#[test]
fn nobody_pins_pages_of_a_mapping() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, huge_size())]).unwrap();
    let map = Map::aligned(&fd, huge_size()).unwrap();
    map.touch_all().unwrap();
    assert_eq!(Map::anonymous(page_size()).copied_by_pinning(), Ok(4));
    assert_eq!(map.copied_by_pinning(), Err(EFAULT));
}

#[test]
fn files_of_proc_that_walk_page_tables_show_a_mapping() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 2 * huge_size())])
        .unwrap();
    for skew in [0, page_size()] {
        let map = How::shared()
            .align(huge_size())
            .skew(skew)
            .map(&fd, 0, 2 * huge_size())
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

// ---- The memory that a mapping shows ------------------------------------------------------------

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
            (0, page_size()),
            (2 * mib, 3 * mib),
            (page_size(), 7 * page_size()),
        ],
        &[
            (mib, 3 * mib),
            (5 * mib + page_size(), 2 * mib - page_size()),
            (4 * mib, 2 * mib),
        ],
        &[(10 * mib - page_size(), 4 * mib + 2 * page_size())],
    ];
    for ranges in lists {
        let len: u64 = ranges.iter().map(|(_, len)| len).sum();
        let fd = device.export(FRAME_BUFFER, ranges).unwrap();
        for skew in [0, page_size(), mib, huge_size() - page_size()] {
            for offset in [0, page_size(), mib, len - page_size()] {
                // From both ends: what comes in around a fault, before it and behind it, is looked
                // at too.
                for backwards in [false, true] {
                    let how = How::shared().align(huge_size()).skew(skew);
                    let map = how.map(&fd, offset, len - offset).unwrap();
                    let pages = map.len() / page_size();
                    for step in 0..pages {
                        let page = if backwards { pages - 1 - step } else { step };
                        let expected = page_at(ranges, offset + page * page_size());
                        assert_eq!(
                            map.read(page * page_size()),
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
    let fd = device
        .export(FRAME_BUFFER, &[(0, 2 * huge_size())])
        .unwrap();
    let aligned = Map::aligned(&fd, 2 * huge_size()).unwrap();
    let skewed = How::shared()
        .align(huge_size())
        .skew(page_size())
        .map(&fd, huge_size(), huge_size())
        .unwrap();
    aligned.write(huge_size() + 5 * page_size(), 1234).unwrap();
    assert_eq!(skewed.read(5 * page_size()), Ok(1234));
    skewed.write(6 * page_size(), 4321).unwrap();
    assert_eq!(aligned.read(huge_size() + 6 * page_size()), Ok(4321));
}

#[test]
fn proc_maps_shows_the_offset_that_was_asked_for() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(huge_size(), 8 * page_size())])
        .unwrap();
    let map = How::shared()
        .map(&fd, 3 * page_size(), page_size())
        .unwrap();
    let line = observe::maps_line(map.address());
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[1], "rw-s", "{line}");
    assert_eq!(words[2], "00003000", "{line}");
}

// ---- Entries ------------------------------------------------------------------------------------

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
    let map = Map::aligned(&fd, FRAME_BUFFER_LEN).unwrap();
    let entries = FRAME_BUFFER_LEN / huge_size();
    assert_eq!(faults_of_touching(&map), entries as i64);
    let map = Map::aligned(&fd, FRAME_BUFFER_LEN).unwrap();
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
    let ranges = [
        (0, huge_size()),
        (page_size(), page_size()),
        (3 * huge_size(), 2 * huge_size()),
    ];
    let fd = device.export(FRAME_BUFFER, &ranges).unwrap();
    // The third range begins at an address that is a multiple of 2 MiB.
    let how = How::shared()
        .align(huge_size())
        .skew(huge_size() - page_size());
    let map = how
        .map(&fd, huge_size(), page_size() + 2 * huge_size())
        .unwrap();
    assert_eq!(faults_of_touching(&map), 1 + 2);
}

#[test]
fn an_unaligned_mapping_gets_pages_up_to_2_mib_a_fault() {
    let device = display();
    let len = 16 * huge_size();
    let fd = device.export(FRAME_BUFFER, &[(0, len)]).unwrap();
    for skew in [page_size(), huge_size() / 2, huge_size() - page_size()] {
        let how = How::shared().align(huge_size()).skew(skew);
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
    let half = huge_size() / 2;
    let fd = device
        .export(
            FRAME_BUFFER,
            &[(huge_size(), half), (huge_size() + half, half)],
        )
        .unwrap();
    for skew in [0, half] {
        let how = How::shared().align(huge_size()).skew(skew);
        let map = how.map(&fd, 0, huge_size()).unwrap();
        assert_eq!(faults_of_touching(&map), 2, "{skew:#x}");
    }
}

#[test]
fn what_comes_in_around_a_fault_stays_in_the_mapping() {
    let device = display();
    number_pages(&device);
    let fd = device
        .export(FRAME_BUFFER, &[(huge_size(), 4 * huge_size())])
        .unwrap();
    // Memory of the process on both sides, in the same 2 MiB.
    for at in [200 * page_size(), page_size(), 511 * page_size()] {
        let mut memory = Map::anonymous(4 * huge_size());
        let window =
            (memory.address() as u64).next_multiple_of(huge_size()) - memory.address() as u64;
        let lease = How::shared().map_over(
            &mut memory,
            window + at,
            &fd,
            huge_size() + 300 * page_size(),
            page_size(),
        );
        lease.unwrap().touch_all().unwrap();
        for page in (window..window + 2 * huge_size()).step_by(page_size() as usize) {
            if page != window + at {
                assert_eq!(memory.read(page), Ok(0), "{at:#x} {page:#x}");
            }
        }
    }
}

#[test]
fn no_entry_leaves_the_mapping() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 2 * huge_size())])
        .unwrap();
    // 2 MiB of which neither half is behind an aligned address with room for an entry.
    let mut map = Map::aligned(&fd, 2 * huge_size()).unwrap();
    map.unmap(0, page_size());
    map.unmap(2 * huge_size() - page_size(), page_size());
    map.touch(page_size(), 2 * huge_size() - 2 * page_size())
        .unwrap();
    let mut child = Child::start(&[], |_| {
        let _ = map.read_unprotected(0);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGSEGV));
}

#[test]
fn what_is_touched_once_faults_once() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 2 * huge_size())])
        .unwrap();
    for skew in [0, page_size()] {
        let how = How::shared().align(huge_size()).skew(skew);
        let map = how.map(&fd, 0, 2 * huge_size()).unwrap();
        map.touch_all().unwrap();
        assert_eq!(faults_of_touching(&map), 0, "{skew:#x}");
    }
}

// ---- How long a mapping lives -------------------------------------------------------------------

#[test]
fn a_mapping_survives_the_close_of_the_fd() {
    let device = display();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    drop(fd);
    map.write(huge_size(), 5).unwrap();
    assert_eq!(device.read32(FRAME_BUFFER, huge_size()), 5);
    // Entries that are taken away come back too.
    device.set_memory(false);
    assert_eq!(map.read(huge_size()), Err(Sigbus));
    device.set_memory(true);
    assert_eq!(map.read(huge_size()), Ok(5));
    assert_eq!(observe::buffers(device.function()).len(), 1);
    drop(map);
    observe::wait_for_buffers(device.function(), 0);
}

#[test]
fn a_mapping_survives_fork() {
    let device = display();
    let (_fd, map) = device.lease_touched(FRAME_BUFFER);
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
    let (_fd, map) = device.lease_touched(FRAME_BUFFER);
    map.write(huge_size() + page_size(), 7).unwrap();
    let old = map.address();
    let map = map.moved().unwrap();
    assert_ne!(map.address(), old);
    assert_eq!(map.read(huge_size() + page_size()), Ok(7));
    map.touch_all().unwrap();
    device.set_memory(false);
    assert_eq!(map.read(huge_size() + page_size()), Err(Sigbus));
    device.set_memory(true);
    let map = map.moved().unwrap();
    assert_eq!(map.read(huge_size() + page_size()), Ok(7));
    drop(map);
    observe::wait_for_buffers(device.function(), 1);
    assert_eq!(observe::buffers(device.function())[0].get("mmaps"), "0");
}

#[test]
fn a_mapping_does_not_grow() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 8 * page_size())])
        .unwrap();
    let map = Map::new(&fd, 4 * page_size()).unwrap();
    assert_eq!(map.grow(8 * page_size()), Err(EFAULT));
    map.touch_all().unwrap();
}

#[test]
fn a_page_is_unmapped_from_the_middle_of_a_2_mib_entry() {
    let device = display();
    let (_fd, mut map) = device.lease_touched(FRAME_BUFFER);
    for at in [
        huge_size() - page_size(),
        7 * page_size(),
        huge_size() + 100 * page_size(),
    ] {
        map.unmap(at, page_size());
        map.write(at - page_size(), 11).unwrap();
        map.write(at - 2 * page_size(), 12).unwrap();
        assert_eq!(device.read32(FRAME_BUFFER, at - 2 * page_size()), 12);
    }
    map.write(huge_size() + page_size(), 13).unwrap();
    assert_eq!(device.read32(FRAME_BUFFER, huge_size() + page_size()), 13);
    let mut child = Child::start(&[], |_| {
        let _ = map.read_unprotected(7 * page_size());
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGSEGV));
    // Each part is taken away and given back.
    device.set_memory(false);
    for at in [
        0,
        8 * page_size(),
        huge_size() + page_size(),
        huge_size() + 101 * page_size(),
    ] {
        assert_eq!(map.read(at), Err(Sigbus), "{at:#x}");
    }
    device.set_memory(true);
    for at in [
        0,
        8 * page_size(),
        huge_size() + page_size(),
        huge_size() + 101 * page_size(),
    ] {
        map.read(at).unwrap();
    }
}

#[test]
fn a_page_in_the_middle_of_a_2_mib_entry_is_protected() {
    let device = display();
    let (_fd, map) = device.lease_touched(FRAME_BUFFER);
    map.write(9 * page_size(), 90).unwrap();
    map.protect(9 * page_size(), page_size(), READ).unwrap();
    assert_eq!(map.read(9 * page_size()), Ok(90));
    map.write(8 * page_size(), 80).unwrap();
    map.write(10 * page_size(), 100).unwrap();
    let mut child = Child::start(&[], |_| {
        let _ = map.write(9 * page_size(), 91);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGSEGV));
    assert_eq!(device.read32(FRAME_BUFFER, 9 * page_size()), 90);
    map.protect(9 * page_size(), page_size(), READ_WRITE)
        .unwrap();
    map.write(9 * page_size(), 92).unwrap();
    assert_eq!(device.read32(FRAME_BUFFER, 9 * page_size()), 92);
}

#[test]
fn the_buffers_file_counts_mappings() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(0, 4 * page_size())])
        .unwrap();
    let count = || {
        observe::buffers(device.function())[0]
            .get("mmaps")
            .to_owned()
    };
    assert_eq!(count(), "0");
    let mut map = Map::new(&fd, 4 * page_size()).unwrap();
    assert_eq!(count(), "1");
    map.unmap(page_size(), page_size());
    assert_eq!(count(), "2");
    let other = Map::new(&fd, page_size()).unwrap();
    assert_eq!(count(), "3");
    drop(map);
    assert_eq!(count(), "1");
    drop(other);
    assert_eq!(count(), "0");
}

// ---- More than a GiB ----------------------------------------------------------------------------

const GIB: u64 = 1 << 30;

/// Unmaps and protects pages where an entry of 1 GiB would have to be split.
fn split_a_gib(device: &Device, mut map: Map) {
    map.touch(0, 2 * huge_size()).unwrap();
    map.write(GIB - page_size(), 1).unwrap();
    map.write(GIB + 3 * page_size(), 2).unwrap();
    map.unmap(huge_size() + page_size(), page_size());
    map.protect(GIB + huge_size() / 2, page_size(), READ)
        .unwrap();
    map.unmap(2 * GIB - 5 * page_size(), page_size());
    assert_eq!(map.read(GIB - page_size()), Ok(1));
    assert_eq!(map.read(GIB + 3 * page_size()), Ok(2));
    map.write(huge_size() + 2 * page_size(), 3).unwrap();
    map.write(2 * GIB - 4 * page_size(), 4).unwrap();
    map.read(GIB + huge_size() / 2).unwrap();
    assert_eq!(device.read32(2, huge_size() + 2 * page_size()), 3);
    assert_eq!(device.read32(2, 2 * GIB - 4 * page_size()), 4);
    device.set_memory(false);
    assert_eq!(map.read(GIB), Err(Sigbus));
    device.set_memory(true);
    assert_eq!(map.read(GIB - page_size()), Ok(1));
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
    let how = How::shared().align(huge_size());
    let high = how.map(&fd, 7 * GIB + huge_size(), huge_size()).unwrap();
    let low = how.map(&fd, 3 * GIB, 2 * huge_size()).unwrap();
    high.write(page_size(), 21).unwrap();
    assert_eq!(low.read(huge_size() + page_size()), Ok(21));
    assert_eq!(device.read32(2, 3 * GIB + huge_size() + page_size()), 21);
    assert_eq!(device.status(&fd).unwrap().size, 8 * GIB);
}

// ---- Together with the device fd ----------------------------------------------------------------

#[test]
fn a_bar_mapped_through_the_device_fd_shows_the_same() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(3 * page_size(), page_size())])
        .unwrap();
    let lease = Map::new(&fd, page_size()).unwrap();
    let bar = How::shared()
        .map(device.as_fd(), 0, FRAME_BUFFER_LEN)
        .unwrap();
    bar.write(3 * page_size(), 42).unwrap();
    assert_eq!(lease.read(0), Ok(42));
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn what_a_bar_mapping_loses_comes_back() {
    let device = display();
    let bar = How::shared()
        .map(device.as_fd(), 0, 2 * huge_size())
        .unwrap();
    bar.write(huge_size(), 9).unwrap();
    device.set_memory(false);
    assert_eq!(bar.read(huge_size()), Err(Sigbus));
    let mut config = [0; 4];
    assert_eq!(device.read(CONFIG_REGION, 0, &mut config), Ok(4));
    assert_eq!(bar.read(huge_size()), Err(Sigbus));
    device.set_memory(true);
    assert_eq!(bar.read(huge_size()), Ok(9));
    let lease = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    device.set_memory(false);
    assert_eq!(device.state(&lease), State::Revoked(REASON_MEMORY_OFF));
    device.set_memory(true);
}
