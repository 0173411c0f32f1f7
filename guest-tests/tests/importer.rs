//! Devices as lease holders: who may attach and map, and where the mapping leads.
#![cfg(barlease_guest)]

use std::{collections::HashMap, os::fd::OwnedFd};

use barlease_guest_tests::{
    errno::{EACCES, EBUSY, EINVAL, ENODEV, ENXIO, EOPNOTSUPP},
    importer::{
        Attachment, Domain, EDU, Importer,
        abi::{self, Entry},
        check_that_nothing_is_left,
    },
    lease::Request,
    map::{How, Map, READ, READ_WRITE, Sigbus},
    observe, page_size,
    pci::{self, Function},
    vfio::Device,
};

/// BAR2 of the memory device: 64 MiB.
const BAR: u32 = 2;
const BAR_LEN: u64 = 64 << 20;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Most bytes of an entry of a scatter table.
fn max_entry() -> u64 {
    u64::from(u32::MAX) + 1 - page_size()
}

fn memory() -> Device {
    Device::open("memory")
}

fn attached(device: &Device, ranges: &[(u64, u64)]) -> (OwnedFd, Attachment) {
    let fd = device.export(BAR, ranges).expect("an export");
    let attachment = Importer::open().attach(&fd).expect("an attachment");
    (fd, attachment)
}

fn mapped(device: &Device, ranges: &[(u64, u64)]) -> (OwnedFd, Attachment) {
    let (fd, attachment) = attached(device, ranges);
    attachment.map().expect("a mapping");
    (fd, attachment)
}

/// Where each page of a buffer of these ranges is, as an offset in the BAR.
fn pages(ranges: &[(u64, u64)]) -> Vec<u64> {
    let page =
        |&(offset, length): &(u64, u64)| (offset..offset + length).step_by(page_size() as usize);
    ranges.iter().flat_map(page).collect()
}

/// A sequence of numbers that look random, the same each time.
fn numbers(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        state >> 33
    })
}

/// Four bytes that tell where in the BAR they are, and in which round they were written.
fn word(offset: u64, round: u32) -> u32 {
    (offset as u32 / 4).wrapping_mul(0x9e37_79b1) ^ round.wrapping_mul(0x85eb_ca6b)
}

fn fill(bar: &Map, pages: impl IntoIterator<Item = u64>, round: u32) {
    for page in pages {
        for offset in (page..page + page_size()).step_by(4) {
            bar.write(offset, word(offset, round)).expect("a BAR");
        }
    }
}

/// The bytes of a part of a buffer whose pages are those, as `fill` wrote them.
fn expected(pages: &[u64], at: u64, length: usize, round: u32) -> Vec<u8> {
    let byte = |at: u64| {
        let offset = pages[(at / page_size()) as usize] + at % page_size();
        word(offset & !3, round).to_le_bytes()[(offset % 4) as usize]
    };
    (at..at + length as u64).map(byte).collect()
}

fn bytes_of(bar: &Map, page: u64) -> Vec<u8> {
    let words = (page..page + page_size()).step_by(4);
    words
        .flat_map(|offset| bar.read(offset).expect("a BAR").to_le_bytes())
        .collect()
}

// ---- Attach -------------------------------------------------------------------------------------

#[test]
fn an_importer_that_cannot_do_peer_to_peer_is_refused() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let answer = Importer::open().attach_as(&fd, abi::ATTACH_INVALIDATE);
    assert_eq!(answer.unwrap_err(), EOPNOTSUPP);
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
}

#[test]
fn an_importer_that_cannot_be_told_to_let_go_is_refused() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let answer = Importer::open().attach_as(&fd, abi::ATTACH_P2P);
    assert_eq!(answer.unwrap_err(), EOPNOTSUPP);
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
}

#[test]
fn an_importer_of_the_old_kind_is_refused() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let importer = Importer::open();
    for flags in [abi::ATTACH_STATIC, 0] {
        let answer = importer.attach_as(&fd, flags);
        assert_eq!(answer.unwrap_err(), EOPNOTSUPP, "{flags}");
    }
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
}

#[test]
fn what_an_importer_cannot_do_comes_before_the_state_of_the_buffer() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    device.set_memory(false);
    let answer = Importer::open().attach_as(&fd, abi::ATTACH_P2P);
    assert_eq!(answer.unwrap_err(), EOPNOTSUPP);
    device.set_memory(true);
}

#[test]
fn attaching_to_a_revoked_buffer_is_enodev_until_it_is_ok_again() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let importer = Importer::open();
    device.set_memory(false);
    assert_eq!(importer.attach(&fd).unwrap_err(), ENODEV);
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
    device.set_memory(true);
    importer.attach(&fd).unwrap().map().unwrap();
}

#[test]
fn attaching_to_a_buffer_after_revoke_is_enodev() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    device.revoke(&fd).unwrap();
    assert_eq!(Importer::open().attach(&fd).unwrap_err(), ENODEV);
}

#[test]
fn attaching_to_a_buffer_after_the_close_of_its_device_is_enodev() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    drop(device);
    let importer = Importer::open();
    assert_eq!(importer.attach(&fd).unwrap_err(), ENODEV);
    let _device = memory();
    assert_eq!(importer.attach(&fd).unwrap_err(), ENODEV);
}

#[test]
fn attachments_are_counted() {
    let device = memory();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let other = device.export(BAR, &[(0, page_size())]).unwrap();
    let importer = Importer::open();
    let check = |number: u32| {
        assert_eq!(device.status(&fd).unwrap().nr_attachments, number);
        assert_eq!(device.status(&other).unwrap().nr_attachments, 0);
        let lines = observe::buffers(device.function());
        let mut columns: Vec<_> = lines.iter().map(|line| line.get("attachments")).collect();
        columns.sort_unstable();
        assert_eq!(columns, ["0", &number.to_string()]);
    };
    check(0);
    let first = importer.attach(&fd).unwrap();
    check(1);
    let second = importer.attach(&fd).unwrap();
    check(2);
    first.map().unwrap();
    check(2);
    first.detach().unwrap();
    check(1);
    device.revoke(&fd).unwrap();
    check(1);
    drop(second);
    check(0);
}

#[test]
fn attaching_and_mapping_a_thousand_times_leaves_nothing() {
    let device = memory();
    let fd = device
        .export(BAR, &[(8 * page_size(), page_size()), (0, 2 * page_size())])
        .unwrap();
    let importer = Importer::open();
    for _ in 0..1000 {
        let attachment = importer.attach(&fd).unwrap();
        attachment.map().unwrap();
        attachment.unmap().unwrap();
        attachment.map().unwrap();
        attachment.detach().unwrap();
    }
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
    device.revoke(&fd).unwrap();
}

#[test]
fn a_lease_holder_may_pin() {
    let device = memory();
    let (fd, attachment) = attached(&device, &[(0, page_size())]);
    attachment.pin().unwrap();
    attachment.map().unwrap();
    attachment.unmap().unwrap();
    attachment.unpin().unwrap();
    device.revoke(fd).unwrap();
}

// ---- Map ----------------------------------------------------------------------------------------

#[test]
fn mapping_a_revoked_buffer_is_enodev_until_it_is_ok_again() {
    let device = memory();
    let (_fd, attachment) = attached(&device, &[(0, page_size())]);
    device.set_memory(false);
    assert_eq!(attachment.map(), Err(ENODEV));
    device.set_memory(true);
    attachment.map().unwrap();
}

#[test]
fn mapping_a_buffer_after_revoke_is_enodev() {
    let device = memory();
    let (fd, attachment) = attached(&device, &[(0, page_size())]);
    device.revoke(&fd).unwrap();
    assert_eq!(attachment.map(), Err(ENODEV));
    device.set_memory(false);
    device.set_memory(true);
    assert_eq!(attachment.map(), Err(ENODEV));
}

#[test]
fn mapping_a_buffer_after_the_close_of_its_device_is_enodev() {
    let device = memory();
    let (_fd, attachment) = attached(&device, &[(0, page_size())]);
    drop(device);
    assert_eq!(attachment.map(), Err(ENODEV));
    let _device = memory();
    assert_eq!(attachment.map(), Err(ENODEV));
}

#[test]
fn a_buffer_can_be_mapped_in_each_direction_and_by_several_importers() {
    let device = memory();
    let (fd, first) = mapped(&device, &[(0, page_size())]);
    let importer = Importer::open();
    assert_eq!(first.map(), Err(EBUSY));
    for direction in [abi::BIDIRECTIONAL, abi::TO_DEVICE, abi::FROM_DEVICE] {
        let attachment = importer.attach(&fd).unwrap();
        attachment.map_for(direction).unwrap();
        attachment.unmap().unwrap();
        attachment.map_for(direction).unwrap();
    }
    assert!(first.is_mapped());
    assert_eq!(first.translate(0), Some(device.function().bar(BAR).0));
    first.unmap().unwrap();
    assert_eq!(first.unmap(), Err(ENXIO));
    assert_eq!(first.translate(0), None);
}

/// The file of the importer can be written to; that of the lease decides.
#[test]
fn a_read_only_lease_is_not_mapped_for_writing_through_a_file_of_its_importer() {
    let device = memory();
    let request = Request::new(BAR, &[(0, page_size())]).open_flags(libc::O_RDONLY);
    let read_only = device.request(&request).unwrap();
    let attachment = Importer::open().attach(&read_only).unwrap();
    assert_eq!(
        attachment.mmap(How::shared(), page_size()).err(),
        Some(EACCES)
    );
    let map = attachment
        .mmap(How::shared().protection(READ), page_size())
        .unwrap();
    assert_eq!(map.protect(0, page_size(), READ_WRITE), Err(EACCES));

    let (_fd, attachment) = attached(&device, &[(0, page_size())]);
    let writable = attachment.mmap(How::shared(), page_size()).unwrap();
    writable.write(0, 77).unwrap();
    assert_eq!(map.read(0), Ok(77));
    device.revoke(&read_only).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
    assert_eq!(writable.read(0), Ok(77));
}

/// A mapping for reading only: what edu writes must not land.
#[test]
fn a_mapping_that_is_for_reading_cannot_be_written_through() {
    let device = memory();
    let bar = Map::new(
        device.export(BAR, &[(0, page_size())]).unwrap(),
        page_size(),
    )
    .unwrap();
    fill(&bar, [0], 1);
    let (_fd, attachment) = attached(&device, &[(0, page_size())]);
    attachment.map_for(abi::TO_DEVICE).unwrap();
    let read = attachment.read(0, 256).unwrap();
    assert_eq!(read, expected(&[0], 0, 256, 1));
    attachment.write(0, &[0x55; 256]).unwrap();
    assert_eq!(
        bytes_of(&bar, 0),
        expected(&[0], 0, page_size() as usize, 1)
    );
}

// ---- Where the mapping leads --------------------------------------------------------------------

/// Checks each page of a mapping against where it must lead, and that the table is right: its
/// entries add up, none is larger than can be, and together they are one run of addresses.
fn check_translation(device: &Device, attachment: &Attachment, ranges: &[(u64, u64)]) {
    let bar = device.function().bar(BAR).0;
    let pages = pages(ranges);
    for (index, page) in pages.iter().enumerate() {
        let translated = attachment.translate(index as u64 * page_size());
        assert_eq!(translated, Some(bar + page), "page {index}");
    }
    let entries = attachment.entries();
    let size: u64 = ranges.iter().map(|range| range.1).sum();
    assert_eq!(entries.iter().map(|entry| entry.length).sum::<u64>(), size);
    assert!(entries.iter().all(|entry| entry.length <= max_entry()));
    for pair in entries.windows(2) {
        assert_eq!(pair[0].address + pair[0].length, pair[1].address);
    }
}

/// Checks that nothing but the mapping is left of it once it is undone.
fn check_gone(attachment: &Attachment, ranges: &[(u64, u64)]) {
    attachment.unmap().unwrap();
    for index in 0..pages(ranges).len() {
        assert_eq!(
            attachment.translate(index as u64 * page_size()),
            None,
            "{index}"
        );
    }
}

/// Sets of ranges: one; two and three out of order; overlapping; repeated; neighbours both ways.
fn few() -> Vec<Vec<(u64, u64)>> {
    vec![
        vec![(0, page_size())],
        vec![(BAR_LEN - page_size(), page_size())],
        vec![(5 * page_size(), 7 * page_size())],
        vec![(0, page_size()), (4 * page_size(), page_size())],
        vec![(4 * page_size(), page_size()), (0, page_size())],
        vec![
            (9 * page_size(), 2 * page_size()),
            (BAR_LEN - page_size(), page_size()),
            (0, 3 * page_size()),
        ],
        vec![(0, 3 * page_size()), (page_size(), 3 * page_size())],
        vec![
            (3 * page_size(), page_size()),
            (3 * page_size(), page_size()),
            (3 * page_size(), page_size()),
        ],
        vec![
            (0, page_size()),
            (page_size(), page_size()),
            (2 * page_size(), 2 * page_size()),
        ],
        vec![
            (2 * page_size(), page_size()),
            (page_size(), page_size()),
            (0, page_size()),
        ],
        vec![
            (0, page_size()),
            (page_size(), page_size()),
            (8 * page_size(), page_size()),
            (9 * page_size(), page_size()),
        ],
        vec![(2 << 20, 4 << 20), (32 << 20, 2 << 20)],
    ]
}

/// So many ranges of one to three pages anywhere.
fn many(count: usize, seed: u64) -> Vec<(u64, u64)> {
    let mut numbers = numbers(seed);
    let mut ranges = Vec::new();
    for _ in 0..count {
        let length = 1 + numbers.next().unwrap() % 3;
        let first = numbers.next().unwrap() % (BAR_LEN / page_size() - length);
        ranges.push((first * page_size(), length * page_size()));
    }
    ranges
}

#[test]
fn every_page_of_a_few_ranges_leads_where_it_must() {
    let device = memory();
    for ranges in few() {
        let (_fd, attachment) = mapped(&device, &ranges);
        check_translation(&device, &attachment, &ranges);
        check_gone(&attachment, &ranges);
        attachment.map().unwrap();
        check_translation(&device, &attachment, &ranges);
    }
}

#[test]
fn every_page_of_many_ranges_leads_where_it_must() {
    let device = memory();
    for (count, seed) in [(2, 1), (3, 2), (64, 3), (64, 4), (4096, 5)] {
        let ranges = many(count, seed);
        let (_fd, attachment) = mapped(&device, &ranges);
        check_translation(&device, &attachment, &ranges);
        check_gone(&attachment, &ranges);
    }
}

#[test]
fn as_many_ranges_as_there_may_be_can_be_mapped() {
    let device = Device::open("big");
    // Each other page, from the end: no two touch.
    let count = u64::from(barlease_abi::MAX_RANGES);
    let ranges: Vec<_> = (0..count)
        .map(|index| ((count - 1 - index) * 2 * page_size(), page_size()))
        .collect();
    let (_fd, attachment) = mapped(&device, &ranges);
    let bar = device.function().bar(BAR).0;
    for index in (0..count).step_by(997).chain([0, count - 1]) {
        let translated = attachment.translate(index * page_size());
        assert_eq!(translated, Some(bar + ranges[index as usize].0));
    }
    assert_eq!(attachment.entries()[0].length, count * page_size());
}

#[test]
fn a_bar_of_4_gib_is_mapped_in_entries_that_a_table_can_hold() {
    let device = Device::open("big");
    let bar = device.function().bar(BAR).0;
    let importer = Importer::open();
    let _mask = importer.mask(64);
    let sets: [&[(u64, u64)]; 4] = [
        &[(0, 4 * GIB)],
        &[(0, 4 * GIB - page_size())],
        &[(2 * GIB, 2 * GIB), (0, 2 * GIB)],
        &[(0, 4 * GIB), (GIB, 3 * GIB), (0, page_size())],
    ];
    for ranges in sets {
        let fd = device.export(BAR, ranges).unwrap();
        let attachment = importer.attach(&fd).unwrap();
        attachment.map().unwrap();
        let entries = attachment.entries();
        let size: u64 = ranges.iter().map(|range| range.1).sum();
        assert_eq!(
            entries.len() as u64,
            size.div_ceil(max_entry()),
            "{ranges:?}"
        );
        assert!(entries.iter().all(|entry| entry.length <= max_entry()));
        assert_eq!(entries.iter().map(|entry| entry.length).sum::<u64>(), size);
        let mut at = 0;
        for &(offset, length) in ranges {
            for inside in [0, length / 2, length - page_size()] {
                let translated = attachment.translate(at + inside);
                assert_eq!(translated, Some(bar + offset + inside));
            }
            at += length;
        }
        attachment.unmap().unwrap();
        assert_eq!(attachment.translate(0), None);
        assert_eq!(attachment.translate(size - page_size()), None);
    }
}

#[test]
fn what_does_not_fit_into_the_addresses_of_a_device_is_refused_and_leaves_nothing() {
    let device = Device::open("big");
    let importer = Importer::open();
    for ranges in [
        &[(0, 4 * GIB)][..],
        // The first two fit.
        &[(0, 512 * MIB), (2 * GIB, 256 * MIB), (0, 4 * GIB)],
    ] {
        let fd = device.export(BAR, ranges).unwrap();
        let attachment = importer.attach(&fd).unwrap();
        for _ in 0..8 {
            assert!(attachment.map().is_err(), "{ranges:?}");
            assert!(!attachment.is_mapped());
        }
        // Nor would this fit if something were left.
        let fd = device.export(BAR, &in_pieces()).unwrap();
        importer.attach(&fd).unwrap().map().unwrap();
        device.revoke(&fd).unwrap();
    }
}

/// Ranges that have no place together among the addresses that edu has, of which the windows of the
/// host bridge take most: 1 GiB would be needed at a multiple of that. Each for itself has one.
fn in_pieces() -> [(u64, u64); 5] {
    [
        (2 * GIB, 512 * MIB),
        (GIB, 128 * MIB),
        (GIB + 128 * MIB, 128 * MIB),
        (7 * page_size(), page_size()),
        (3 * page_size(), 2 * page_size()),
    ]
}

#[test]
fn what_does_not_fit_in_one_piece_is_mapped_in_several() {
    let device = Device::open("big");
    let bar = device.function().bar(BAR).0;
    let importer = Importer::open();
    let fd = device.export(BAR, &in_pieces()).unwrap();
    let attachment = importer.attach(&fd).unwrap();
    for _ in 0..3 {
        attachment.map().unwrap();
        let lengths: Vec<_> = attachment.entries().iter().map(|it| it.length).collect();
        // Neighbours are one.
        assert_eq!(
            lengths,
            [512 * MIB, 256 * MIB, page_size(), 2 * page_size()]
        );
        let mut places = Vec::new();
        let mut at = 0;
        for (offset, length) in in_pieces() {
            for inside in [0, (length / 2) & !(page_size() - 1), length - page_size()] {
                let translated = attachment.translate(at + inside);
                assert_eq!(translated, Some(bar + offset + inside));
                places.push(at + inside);
            }
            at += length;
        }
        attachment.unmap().unwrap();
        for place in places {
            assert_eq!(attachment.translate(place), None, "{place:#x}");
        }
    }
    // Bytes, from the end of a piece into the next.
    attachment.map().unwrap();
    let map = Map::new(
        device.export(BAR, &[(0, 16 * page_size())]).unwrap(),
        16 * page_size(),
    )
    .unwrap();
    fill(&map, [3 * page_size(), 4 * page_size(), 7 * page_size()], 5);
    let pages = [7 * page_size(), 3 * page_size(), 4 * page_size()];
    let tail: u64 = in_pieces()[..3].iter().map(|range| range.1).sum();
    let read = attachment
        .read(tail + page_size() / 2, page_size() as usize)
        .unwrap();
    assert_eq!(
        read,
        expected(&pages, page_size() / 2, page_size() as usize, 5)
    );
    attachment
        .write(tail + page_size() - 8, &[0x5A; 16])
        .unwrap();
    assert_eq!(bytes_of(&map, 7 * page_size())[4088..], [0x5A; 8]);
    assert_eq!(bytes_of(&map, 3 * page_size())[..8], [0x5A; 8]);
}

/// Entries for each run of neighbours, those that are too long in parts.
fn runs(bar: u64, ranges: &[(u64, u64)]) -> Vec<Entry> {
    let mut runs: Vec<Entry> = Vec::new();
    for &(offset, length) in ranges {
        let address = bar + offset;
        match runs.last_mut() {
            Some(last) if last.address + last.length == address => last.length += length,
            _ => runs.push(Entry { address, length }),
        }
    }
    let parts = |run: Entry| {
        let starts = (0..run.length).step_by(max_entry() as usize);
        starts.map(move |start| Entry {
            address: run.address + start,
            length: max_entry().min(run.length - start),
        })
    };
    runs.into_iter().flat_map(parts).collect()
}

#[test]
fn a_device_without_translation_gets_entries_for_each_run_of_neighbours() {
    let _domain = Domain::set("identity");
    let importer = Importer::open();
    let _mask = importer.mask(64);
    let mut small = few();
    small.push(many(64, 6));
    small.push(many(4096, 7));
    let large = vec![
        vec![(0, 4 * GIB)],
        vec![(0, 4 * GIB), (0, page_size())],
        vec![
            (GIB, 3 * GIB),
            (0, 4 * GIB),
            (page_size(), GIB - page_size()),
        ],
    ];
    for (name, sets) in [("memory", small), ("big", large)] {
        let device = Device::open(name);
        let bar = device.function().bar(BAR).0;
        for ranges in sets {
            let fd = device.export(BAR, &ranges).unwrap();
            let attachment = importer.attach(&fd).unwrap();
            for _ in 0..2 {
                attachment.map().unwrap();
                assert_eq!(attachment.entries(), runs(bar, &ranges));
                attachment.unmap().unwrap();
            }
        }
    }
}

/// Pages that hold the tables of IOMMUs.
fn iommu_pages() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").expect("vmstat");
    let number = text
        .lines()
        .find_map(|line| line.strip_prefix("nr_iommu_pages "));
    number.expect("nr_iommu_pages").parse().expect("a number")
}

/// A buffer may be as long as one likes, but what an importer maps takes tables that nobody is
/// charged for.
#[test]
fn a_buffer_that_is_longer_than_twice_its_bar_is_not_mapped_for_an_importer() {
    let device = memory();
    let importer = Importer::open();
    let _mask = importer.mask(48);
    let whole = (0, BAR_LEN);
    let fd = device.export(BAR, &[whole, whole]).unwrap();
    importer.attach(&fd).unwrap().map().unwrap();

    let fd = device
        .export(BAR, &[whole, (0, page_size()), whole])
        .unwrap();
    let attachment = importer.attach(&fd).unwrap();
    assert_eq!(attachment.map(), Err(EINVAL));
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 1);
    // Processes map what they like.
    let map = Map::new(&fd, 2 * BAR_LEN + page_size()).unwrap();
    map.read(2 * BAR_LEN).unwrap();

    // 64 GiB, of which none but the first page is where an entry above a page could be: 128 MiB of
    // tables.
    let mut ranges = vec![(0, page_size())];
    ranges.extend([whole; 1024]);
    let fd = device.export(BAR, &ranges).unwrap();
    let attachment = importer.attach(&fd).unwrap();
    let before = iommu_pages();
    for _ in 0..3 {
        assert_eq!(attachment.map(), Err(EINVAL));
    }
    assert_eq!(iommu_pages(), before);
    assert!(!attachment.is_mapped());
    device.revoke(&fd).unwrap();
}

/// A lease that begins in the middle of a large page is not one of pages for that: its IOVA begins
/// there, too.
#[test]
fn memory_that_is_not_aligned_takes_as_few_tables_as_memory_that_is() {
    let device = Device::open("big");
    let tables = |offset: u64| {
        // An SMMU's tables stay when their pages are unmapped, and are freed when an entry above a
        // page takes their place. So each time there is a new domain, without any.
        drop(Domain::set("identity"));
        let importer = Importer::open();
        let _mask = importer.mask(48);
        let fd = device.export(BAR, &[(offset, 512 * MIB)]).unwrap();
        let attachment = importer.attach(&fd).unwrap();
        let before = iommu_pages();
        attachment.map().unwrap();
        let after = iommu_pages();
        let bar = device.function().bar(BAR).0;
        for at in [
            0,
            5 * page_size(),
            2 * MIB,
            300 * MIB,
            512 * MIB - page_size(),
        ] {
            assert_eq!(attachment.translate(at), Some(bar + offset + at));
        }
        assert_eq!(attachment.entries()[0].length, 512 * MIB);
        after - before
    };
    let aligned = tables(0);
    // At either end a table more, and those above. Tables of all pages are 256.
    for offset in [page_size(), GIB + 3 * page_size(), MIB] {
        let skewed = tables(offset);
        assert!(
            skewed <= aligned + 8,
            "{offset:#x}: {skewed}, not {aligned}"
        );
    }
}

/// Without translation a device that has 32 bits of address cannot name memory above: the kernel
/// would warn of the try.
#[test]
fn what_a_device_without_translation_cannot_name_is_refused() {
    let _domain = Domain::set("identity");
    let importer = Importer::open();
    let device = Device::open("big");
    let (start, _) = device.function().bar(BAR);
    assert!(start > u64::from(u32::MAX), "{start:#x}");
    let fd = device
        .export(BAR, &[(0, page_size()), (2 * page_size(), page_size())])
        .unwrap();
    let attachment = importer.attach(&fd).unwrap();
    assert_eq!(attachment.map(), Err(EINVAL));
    // It is not remembered: the mask is the importer's to change.
    let mask = importer.mask(64);
    attachment.map().unwrap();
    assert_eq!(attachment.entries()[1].address, start + 2 * page_size());
    attachment.unmap().unwrap();
    drop(mask);
    assert_eq!(attachment.map(), Err(EINVAL));
    // Nor is it the first page that counts: up to bit 32 more than the beginning, and the end is
    // beyond.
    let bits = 64 - start.leading_zeros();
    let _mask = importer.mask(bits);
    let beyond = (1u64 << bits)
        .checked_sub(start)
        .filter(|&left| left < 4 * GIB);
    if let Some(left) = beyond {
        let fd = device.export(BAR, &[(0, left + page_size())]).unwrap();
        assert_eq!(importer.attach(&fd).unwrap().map(), Err(EINVAL));
    }
    attachment.map().unwrap();
}

// ---- Bytes --------------------------------------------------------------------------------------

#[test]
fn edu_reads_and_writes_one_range() {
    let device = memory();
    let around = 16 * page_size()..24 * page_size();
    let bar = Map::new(
        device.export(BAR, &[(0, 32 * page_size())]).unwrap(),
        32 * page_size(),
    )
    .unwrap();
    fill(&bar, around.clone().step_by(page_size() as usize), 1);
    let ranges = [(18 * page_size(), 4 * page_size())];
    let (_fd, attachment) = mapped(&device, &ranges);
    let pages = pages(&ranges);

    for (at, length) in [
        (0, page_size() as usize),
        (page_size() / 2, page_size() as usize),
        (3 * page_size(), page_size() as usize),
        (1, 1),
        (page_size() - 3, 7),
    ] {
        let read = attachment.read(at, length).unwrap();
        assert_eq!(read, expected(&pages, at, length, 1), "{at:#x}");
    }

    // Across a page's end, and nothing around it.
    let at = 2 * page_size() - 100;
    attachment.write(at, &[0xA5; 200]).unwrap();
    let mut after: Vec<u8> = Vec::new();
    for page in around.clone().step_by(page_size() as usize) {
        after.extend(bytes_of(&bar, page));
    }
    let all: Vec<_> = around.clone().step_by(page_size() as usize).collect();
    let mut wanted = expected(&all, 0, after.len(), 1);
    let from = (18 * page_size() + at - around.start) as usize;
    wanted[from..from + 200].fill(0xA5);
    assert!(after == wanted);

    let pages_end = 4 * page_size();
    assert_eq!(attachment.read(pages_end - 1, 2), Err(EINVAL));
}

/// Lets edu read and write a page at each of these offsets, across the ends of ranges, and compares
/// all bytes of the pages that it touches, and of those beside them in the BAR.
fn check_bytes(ranges: &[(u64, u64)], transfers: &[u64]) {
    let device = memory();
    let bar = Map::new(device.export(BAR, &[(0, BAR_LEN)]).unwrap(), BAR_LEN).unwrap();
    let (_fd, attachment) = mapped(&device, ranges);
    let pages = pages(ranges);
    // The contents of the BAR: the pages that are touched, and those beside them.
    let mut shadow: HashMap<u64, Vec<u8>> = HashMap::new();
    for at in transfers.iter().flat_map(|&at| [at, at + page_size() - 1]) {
        let page = pages[(at / page_size()) as usize];
        let after = (page + page_size()).min(BAR_LEN - page_size());
        for near in [page.saturating_sub(page_size()), page, after] {
            fill(&bar, [near], 2);
            shadow.insert(near, expected(&[near], 0, page_size() as usize, 2));
        }
    }
    let length = page_size() as usize;
    for (round, &at) in transfers.iter().enumerate() {
        let place = |at: u64| {
            (
                pages[(at / page_size()) as usize],
                (at % page_size()) as usize,
            )
        };
        let read = attachment.read(at, length).unwrap();
        for (index, byte) in read.into_iter().enumerate() {
            let (page, inside) = place(at + index as u64);
            assert_eq!(
                byte,
                shadow[&page][inside],
                "offset {:#x}",
                at + index as u64
            );
        }
        let written: Vec<u8> = numbers(round as u64 + 99)
            .take(length)
            .map(|number| number as u8)
            .collect();
        attachment.write(at, &written).unwrap();
        for (index, &byte) in written.iter().enumerate() {
            let (page, inside) = place(at + index as u64);
            shadow.get_mut(&page).unwrap()[inside] = byte;
        }
    }
    for (page, bytes) in shadow {
        assert!(bytes_of(&bar, page) == bytes, "page {page:#x} of the BAR");
    }
}

#[test]
fn edu_reads_and_writes_two_and_three_ranges() {
    let half = page_size() / 2;
    check_bytes(&[(4 * page_size(), page_size()), (0, page_size())], &[half]);
    let three = [
        (9 * page_size(), page_size()),
        (BAR_LEN - page_size(), page_size()),
        (0, page_size()),
    ];
    check_bytes(&three, &[half, page_size() + half]);
}

#[test]
fn edu_reads_and_writes_ranges_that_overlap_and_repeat() {
    let ranges = [
        (page_size(), 2 * page_size()),
        (2 * page_size(), page_size()),
        (page_size(), page_size()),
    ];
    // Twice the same bytes of the BAR, at two places of the buffer.
    check_bytes(&ranges, &[page_size(), 2 * page_size(), 3 * page_size()]);
}

#[test]
fn edu_reads_and_writes_64_ranges() {
    let ranges: Vec<_> = many(64, 8)
        .iter()
        .map(|range| (range.0, page_size()))
        .collect();
    // Each second end of a range: both sides of it are touched.
    let ends: Vec<_> = (0..32)
        .map(|n| n * 2 * page_size() + page_size() / 2)
        .collect();
    check_bytes(&ranges, &ends[..8]);
    check_bytes(&ranges, &[ends[31]]);
}

#[test]
fn edu_reads_and_writes_4096_ranges() {
    let ranges = many(4096, 9);
    let size: u64 = ranges.iter().map(|range| range.1).sum();
    let mut numbers = numbers(10);
    let mut transfers: Vec<_> = (0..6)
        .map(|_| numbers.next().unwrap() % (size / page_size() - 1) * page_size() + page_size() / 2)
        .collect();
    transfers.push(size - page_size());
    check_bytes(&ranges, &transfers);
}

// ---- Between processes, and the ends of things --------------------------------------------------

#[test]
fn an_attachment_keeps_the_buffer_when_its_fd_is_closed() {
    let device = memory();
    let (fd, attachment) = mapped(&device, &[(0, page_size()), (2 * page_size(), page_size())]);
    drop(fd);
    assert_eq!(observe::buffers(device.function()).len(), 1);
    assert!(attachment.translate(page_size()).is_some());
    drop(attachment);
    observe::wait_for_buffers(device.function(), 0);
}

#[test]
fn an_attachment_does_not_keep_the_device_open() {
    let device = memory();
    let (_fd, attachment) = mapped(&device, &[(0, page_size())]);
    let function = device.function().clone();
    drop(device);
    assert!(!attachment.is_mapped());
    // Would wait for a device that is open.
    function.unbind();
    function.bind(pci::BARLEASE);
    assert_eq!(attachment.map(), Err(ENODEV));
}

#[test]
fn unbinding_the_importing_device_undoes_its_mappings() {
    let device = memory();
    let (fd, attachment) = mapped(&device, &[(0, page_size()), (2 * page_size(), page_size())]);
    Function::named(EDU).unbind();
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
    assert_eq!(attachment.map(), Err(barlease_guest_tests::errno::ENOENT));
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "big", "display"]);
}
