//! LIST: the buffers of an open of the device, and what is said of each; and their identity.
#![cfg(barlease_guest)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use barlease_abi::{
    ALIAS_WC, BUFFER_DRAINING, BUFFER_INTERNAL, BUFFER_NAME_BUSY, DmaBufRecord,
    FEATURE_DMA_BUF_LIST, MAX_RECORDS, MEMATTR_NC, MEMATTR_WC, REASON_LOW_POWER, REASON_MEMORY_OFF,
    STATE_DEAD, STATE_OK, STATE_REVOKED,
};
use barlease_guest_tests::{
    buffers::{HEAD, List, RECORD, id_of, name, wait_until_gone},
    errno::{EFAULT, EINVAL},
    huge_size,
    importer::{Importer, check_that_nothing_is_left},
    lease::{self, Request},
    map::{How, Map, READ, Sigbus},
    observe, page_size,
    process::Child,
    race,
    vfio::{Device, GET, LOW_POWER_ENTRY, LOW_POWER_EXIT, PROBE, SET},
    wait::{self, at_once, waits_for},
};

/// BAR2 of the memory device.
const BAR: u32 = 2;
const LIST: u32 = GET | FEATURE_DMA_BUF_LIST as u32;

fn open() -> Device {
    Device::open("memory")
}

fn page(device: &Device) -> OwnedFd {
    device.export(BAR, &[(0, page_size())]).expect("an export")
}

/// A mapping of the BAR, or of an alias, through the device fd.
fn bar(device: &Device, region: u32, offset: u64, len: u64) -> Map {
    let at = u64::from(region) << 40 | offset;
    How::shared().map(device, at, len).expect("an mmap")
}

fn leases(device: &Device) -> Vec<DmaBufRecord> {
    let all = device.records().into_iter();
    all.filter(|record| record.flags & BUFFER_INTERNAL == 0)
        .collect()
}

fn ids(records: &[DmaBufRecord]) -> Vec<u64> {
    records.iter().map(|record| record.id).collect()
}

// ---- The request --------------------------------------------------------------------------------

#[test]
fn a_probe_is_truthful() {
    let device = open();
    assert_eq!(device.probe(FEATURE_DMA_BUF_LIST, GET), Ok(()));
    assert_eq!(device.probe(FEATURE_DMA_BUF_LIST, SET), Err(EINVAL));
    assert_eq!(device.probe(FEATURE_DMA_BUF_LIST, GET | SET), Err(EINVAL));
    let set = SET | u32::from(FEATURE_DMA_BUF_LIST);
    let mut payload = List::new(0, 1).bytes(0);
    assert_eq!(device.feature(set, &mut payload), Err(EINVAL));
    assert_eq!(device.feature(set | PROBE, &mut []), Err(EINVAL));
}

#[test]
fn nothing_is_leased_at_first() {
    let device = open();
    let listed = device.list(&List::new(0, 4)).unwrap();
    let head = listed.head;
    assert_eq!(
        (head.after, head.nr_records, head.record_size),
        (0, 0, RECORD)
    );
    assert!(listed.bytes.iter().all(|&byte| byte == 0xa5));
}

#[test]
fn no_records_copy_nothing_and_say_whether_there_is_more() {
    let device = open();
    let after = |after: u64| {
        let listed = device.list(&List::new(after, 0)).unwrap();
        assert_eq!(listed.head.nr_records, 0);
        assert_eq!(listed.head.record_size, RECORD);
        listed.head.after
    };
    assert_eq!(after(0), 0);
    let fd = page(&device);
    let id = id_of(&fd);
    assert_ne!(after(0), 0);
    assert_ne!(after(id - 1), 0);
    assert_eq!(after(id), 0);
    assert_eq!(after(u64::MAX), 0);
}

#[test]
fn a_record_may_be_larger_than_the_kernel_s_and_not_smaller() {
    let device = open();
    let fds = [page(&device), page(&device)];
    for size in [0, 1, 64, 95] {
        for number in [0, 1, 2] {
            let list = List::new(0, number).record_size(size);
            assert_eq!(device.list(&list).unwrap_err(), EINVAL, "{size} bytes");
        }
    }
    for size in [96, 97, 100, 104, 4096] {
        let list = List::new(0, 3).record_size(size);
        let listed = device.list(&list).unwrap();
        assert_eq!(listed.head.record_size, RECORD, "of the kernel");
        assert_eq!(listed.head.nr_records, 2);
        assert_eq!(listed.head.after, 0);
        let records = listed.records(size);
        assert_eq!(ids(&records), fds.each_ref().map(id_of));
        let (filled, rest) = listed.bytes.split_at(2 * size as usize);
        for record in filled.chunks(size as usize) {
            assert!(record[RECORD as usize..].iter().all(|&byte| byte == 0));
        }
        assert!(rest.iter().all(|&byte| byte == 0xa5), "past the records");
    }
}

#[test]
fn room_that_is_announced_and_not_there_is_refused() {
    let device = open();
    let _fd = page(&device);
    for (number, room) in [(2, 1), (1, 0), (5000, 4999)] {
        let list = List::new(0, number).room(room);
        assert_eq!(device.list(&list).unwrap_err(), EINVAL);
    }
    // A sum that overflows 32 bits.
    for (number, size) in [(u32::MAX, RECORD), (1 << 26, 64 << 1), (1, u32::MAX)] {
        let mut list = List::new(0, 0);
        list.head.nr_records = number;
        list.head.record_size = size;
        list.room = 0;
        assert_eq!(
            device.list(&list).unwrap_err(),
            EINVAL,
            "{number} of {size}"
        );
    }
    for argsz in 0..8 + HEAD as u32 {
        let mut payload = List::new(0, 0).bytes(0);
        let answer = device.feature_sized(LIST, &mut payload, argsz);
        assert_eq!(answer, Err(EINVAL), "argsz {argsz}");
    }
    let mut payload = List::new(0, 1).bytes(0);
    let short = 8 + payload.len() as u32 - 1;
    assert_eq!(device.feature_sized(LIST, &mut payload, short), Err(EINVAL));
    assert_eq!(device.feature_sized(LIST, &mut payload, short + 1), Ok(0));
}

#[test]
fn memory_that_cannot_be_read_or_written_is_efault() {
    let device = open();
    let _fds = [page(&device), page(&device)];
    let good = List::new(0, 2).bytes(0);
    let announced = good.len() as u32;
    for readable in [0, 4, HEAD - 1, HEAD, HEAD + 1, HEAD + RECORD as usize] {
        let answer = device.feature_at_edge(LIST, &good[..readable], announced);
        assert_eq!(answer, Err(EFAULT), "{readable} bytes");
    }
    assert_eq!(device.feature_at_edge(LIST, &good, announced), Ok(0));
    assert_eq!(device.feature_read_only(LIST, &good), Err(EFAULT));
    // The memory of records that are announced and not needed need not be there.
    let none = List::new(u64::MAX, 2).bytes(0);
    let answer = device.feature_at_edge(LIST, &none[..HEAD], announced);
    assert!(answer == Ok(0) || answer == Err(EFAULT), "{answer:?}");
    assert_eq!(device.records().len(), 2);
}

// ---- The records --------------------------------------------------------------------------------

#[test]
fn a_record_says_what_was_exported() {
    let device = open();
    let many: Vec<_> = (0..300)
        .map(|i| (2 * i * page_size(), page_size()))
        .collect();
    for (ranges, flags, access) in [
        (&[(0, page_size())][..], libc::O_RDWR, libc::O_RDWR),
        (
            &[
                (huge_size(), 3 * page_size()),
                (0, page_size()),
                (0, page_size()),
            ],
            libc::O_RDONLY,
            libc::O_RDONLY,
        ),
        (&many, libc::O_RDWR | libc::O_CLOEXEC, libc::O_RDWR),
        (
            &[(0, huge_size())],
            libc::O_WRONLY | libc::O_CLOEXEC,
            libc::O_WRONLY,
        ),
    ] {
        let request = Request::new(BAR, ranges).open_flags(flags);
        let fd = device.request(&request).unwrap();
        let size = ranges.iter().map(|(_, length)| length).sum();
        let mut name = [0; 32];
        let text = format!("barlease:{}/{BAR}", device.function().bdf);
        name[..text.len()].copy_from_slice(text.as_bytes());
        let expected = DmaBufRecord {
            id: id_of(&fd),
            size,
            region_index: BAR,
            nr_ranges: ranges.len() as u32,
            memattr: MEMATTR_NC,
            state: STATE_OK,
            access: access as u32,
            name,
            ..DmaBufRecord::default()
        };
        assert_eq!(device.record(&fd), expected);
        assert_eq!(lease::size(&fd), size);
    }
}

#[test]
fn a_record_follows_what_becomes_of_the_buffer() {
    let device = open();
    let importer = Importer::open();
    let fd = device.export(BAR, &[(0, 4 * page_size())]).unwrap();
    let is = |what: &str, change: &dyn Fn(&mut DmaBufRecord)| {
        let plain = DmaBufRecord {
            id: id_of(&fd),
            size: 4 * page_size(),
            region_index: BAR,
            nr_ranges: 1,
            access: libc::O_RDWR as u32,
            ..DmaBufRecord::default()
        };
        let mut expected = plain;
        change(&mut expected);
        let mut seen = device.record(&fd);
        seen.name = [0; 32];
        assert_eq!(seen, expected, "{what}");
        let status = device.status(&fd).unwrap();
        assert_eq!(
            (
                status.state,
                status.reasons,
                status.memattr,
                status.region_index
            ),
            (seen.state, seen.reasons, seen.memattr, seen.region_index)
        );
        assert_eq!(
            (status.size, status.nr_ranges, status.nr_attachments),
            (seen.size, seen.nr_ranges, seen.nr_attachments)
        );
    };
    is("new", &|_| {});
    let map = Map::new(&fd, 4 * page_size()).unwrap();
    is("mapped", &|record| record.nr_vmas = 1);
    device.memattr(&fd, MEMATTR_WC).unwrap();
    let combining = How::shared().map(&fd, page_size(), page_size()).unwrap();
    is("write-combining, too", &|record| {
        (record.memattr, record.nr_vmas, record.nr_wc_vmas) = (MEMATTR_WC, 2, 1);
    });
    map.protect(page_size(), page_size(), READ).unwrap();
    is("split", &|record| {
        (record.memattr, record.nr_vmas, record.nr_wc_vmas) = (MEMATTR_WC, 4, 1);
    });
    device.memattr(&fd, MEMATTR_NC).unwrap();
    drop(map);
    is("write-combining alone", &|record| {
        (record.nr_vmas, record.nr_wc_vmas) = (1, 1);
    });
    let child = Child::start(&[], |link| link.expect(1));
    is("in two processes", &|record| {
        (record.nr_vmas, record.nr_wc_vmas) = (2, 2);
    });
    child.link.send(1);
    child.join();
    drop(combining);
    is("not mapped any more", &|_| {});
    let first = importer.attach(&fd).unwrap();
    let second = importer.attach(&fd).unwrap();
    is("attached", &|record| record.nr_attachments = 2);
    first.map().unwrap();
    is("mapped by one", &|record| {
        (record.nr_attachments, record.nr_mappings) = (2, 1);
    });
    second.map().unwrap();
    is("mapped by two", &|record| {
        (record.nr_attachments, record.nr_mappings) = (2, 2);
    });
    first.detach().unwrap();
    is("mapped by the second", &|record| {
        (record.nr_attachments, record.nr_mappings) = (1, 1);
    });
    device.set_memory(false);
    is("memory off", &|record| {
        (record.state, record.reasons) = (STATE_REVOKED, REASON_MEMORY_OFF);
        record.nr_attachments = 1;
    });
    device.set_memory(true);
    is("memory on", &|record| record.nr_attachments = 1);
    device.revoke(&fd).unwrap();
    is("revoked", &|record| {
        (record.state, record.nr_attachments) = (STATE_DEAD, 1);
    });
    drop(second);
    device.set_memory(false);
    is("dead whatever the device does", &|record| {
        record.state = STATE_DEAD
    });
    device.set_memory(true);
}

#[test]
fn low_power_is_seen_and_not_ended_by_list() {
    let device = open();
    let fd = page(&device);
    device.feature(SET | LOW_POWER_ENTRY, &mut []).unwrap();
    for _ in 0..2 {
        let record = device.record(&fd);
        assert_eq!(
            (record.state, record.reasons),
            (STATE_REVOKED, REASON_LOW_POWER)
        );
    }
    device.feature(SET | LOW_POWER_EXIT, &mut []).unwrap();
    assert_eq!(device.record(&fd).state, STATE_OK);
}

#[test]
fn names_are_those_of_the_kernel() {
    let device = open();
    let fd = page(&device);
    let set = |text: &str| {
        lease::set_name(&fd, text).unwrap();
        let record = device.record(&fd);
        assert_eq!(record.flags & BUFFER_NAME_BUSY, 0);
        let mut filled = [0; 32];
        filled[..text.len()].copy_from_slice(text.as_bytes());
        assert_eq!(record.name, filled, "{text}");
    };
    set("frame buffer of tenant 7");
    // Nothing is left of a longer one.
    set("short");
    set("");
    set("with\ta tab, a \\ and \u{00e4}");
    set(&"x".repeat(31));
}

#[test]
fn mappings_of_a_bar_are_internal_buffers() {
    let device = Device::open("display");
    let alias = device.alias(0, ALIAS_WC).unwrap();
    assert_eq!(device.records(), []);
    let maps = [
        bar(&device, 0, 0, page_size()),
        bar(&device, 0, 8 * page_size(), 2 * page_size()),
    ];
    let internal = device.records();
    assert!(!internal.is_empty());
    let vmas: u32 = internal.iter().map(|record| record.nr_vmas).sum();
    assert_eq!(vmas, 2);
    let (_, bar_length) = device.function().bar(0);
    for record in &internal {
        assert_eq!(record.flags, BUFFER_INTERNAL);
        assert_eq!(record.region_index, 0);
        assert!(record.size <= bar_length && record.nr_ranges == 1);
        assert_eq!((record.state, record.nr_wc_vmas), (STATE_OK, 0));
        assert_eq!(
            name(record),
            format!("barlease:{}/0", device.function().bdf)
        );
        assert_eq!(device.revoke_id(record.id), Err(EINVAL));
    }
    let combining = bar(&device, alias, 0, page_size());
    let more = device.records();
    let wc: Vec<_> = more.iter().filter(|record| record.nr_wc_vmas > 0).collect();
    assert_eq!(wc.len(), 1);
    assert_eq!((wc[0].memattr, wc[0].flags), (MEMATTR_WC, BUFFER_INTERNAL));
    assert_eq!(
        name(wc[0]),
        format!("barlease:{}/0+wc", device.function().bdf)
    );
    // Their ids are those in `/proc/self/maps`.
    let listed: BTreeSet<_> = ids(&more).into_iter().collect();
    let shown = maps.iter().chain([&combining]).map(inode_of);
    assert!(shown.collect::<BTreeSet<_>>().is_subset(&listed));
    device.set_memory(false);
    let all = device.records();
    assert!(all.iter().all(|record| record.reasons == REASON_MEMORY_OFF));
    device.set_memory(true);
    drop((maps, combining));
    wait::until("internal buffers to go", || device.records().is_empty());
}

/// The inode column of a mapping.
fn inode_of(map: &Map) -> u64 {
    let line = observe::maps_line(map.address());
    let column = line.split_whitespace().nth(4).expect("an inode");
    column.parse().expect("a number")
}

// ---- Identity -----------------------------------------------------------------------------------

/// `ino:` of an fd in `/proc/self/fdinfo`.
fn fdinfo_inode(fd: &OwnedFd) -> u64 {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = fs::read_to_string(path).expect("fdinfo");
    let line = text.lines().find_map(|line| line.strip_prefix("ino:"));
    line.expect("ino").trim().parse().expect("a number")
}

#[test]
fn an_id_is_the_inode_wherever_that_is_shown() {
    let device = open();
    let fd = page(&device);
    let map = Map::new(&fd, page_size()).unwrap();
    let id = id_of(&fd);
    assert_eq!(fdinfo_inode(&fd), id);
    assert_eq!(inode_of(&map), id);
    assert_eq!(id_of(lease::duplicate(&fd)), id);
    assert_eq!(ids(&device.records()), [id]);
    let child = Child::start(&[fd.as_fd()], |link| link.send(id_of(&fd)));
    child.link.expect(id);
    child.join();
    // It lasts, for as long as somebody maps it.
    drop(fd);
    assert_eq!(ids(&device.records()), [id]);
    assert_eq!(device.find_record(id).unwrap().nr_vmas, 1);
    device.revoke_id(id).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
}

#[test]
fn an_id_is_never_used_again() {
    let device = open();
    let mut seen = BTreeSet::new();
    for round in 0..3000 {
        let fd = page(&device);
        let id = id_of(&fd);
        assert!(id != 0 && seen.insert(id), "{id} came again");
        if round % 50 == 0 {
            drop(fd);
            wait_until_gone(&device, id);
        }
    }
    drop(device);
    let device = open();
    assert!(seen.insert(id_of(page(&device))));
    let other = Device::open("pair0");
    assert!(seen.insert(id_of(page(&other))));
}

#[test]
fn a_buffer_disappears_with_its_last_reference() {
    let device = open();
    let fd = page(&device);
    let id = id_of(&fd);
    let attachment = Importer::open().attach(&fd).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    drop(fd);
    assert!(device.find_record(id).is_some());
    drop(map);
    assert_eq!(device.find_record(id).unwrap().nr_vmas, 0);
    drop(attachment);
    wait_until_gone(&device, id);
    assert_eq!(device.records(), []);
}

#[test]
fn nothing_of_an_earlier_open_or_of_another_device_is_listed() {
    let device = open();
    let before = page(&device);
    let map = Map::new(&before, page_size()).unwrap();
    let other = Device::open("pair0");
    let elsewhere = page(&other);
    assert_eq!(ids(&device.records()), [id_of(&before)]);
    assert_eq!(ids(&other.records()), [id_of(&elsewhere)]);
    drop(device);
    let device = open();
    assert_eq!(device.records(), []);
    let now = page(&device);
    assert_eq!(ids(&device.records()), [id_of(&now)]);
    drop((before, map));
    assert_eq!(ids(&device.records()), [id_of(&now)]);
}

// ---- Many ---------------------------------------------------------------------------------------

#[test]
fn pages_of_any_size_have_each_buffer_once_and_in_order() {
    let device = open();
    let fds: Vec<_> = (0..70).map(|_| page(&device)).collect();
    let mut expected: Vec<_> = fds.iter().map(id_of).collect();
    expected.sort_unstable();
    for at_a_time in [1, 2, 3, 7, 8, 9, 64, 69, 70, 71, 4096] {
        assert_eq!(
            ids(&device.records_by(at_a_time)),
            expected,
            "{at_a_time} at a time"
        );
    }
    // From any id on, one that there is or not.
    for (at, id) in expected.iter().enumerate() {
        let listed = device.list(&List::new(*id, 100)).unwrap();
        assert_eq!(ids(&listed.records(RECORD)), expected[at + 1..]);
        let listed = device.list(&List::new(*id - 1, 2)).unwrap();
        let some = ids(&listed.records(RECORD));
        assert!(expected[at..].starts_with(&some) && some.len() == 2.min(expected.len() - at));
        assert_eq!(listed.head.after == 0, at + 2 >= expected.len());
    }
}

#[test]
fn more_than_a_call_copies_come_in_several() {
    const NUMBER: usize = MAX_RECORDS as usize + 300;
    let device = open();
    // A program that keeps no fd needs no more of them than others.
    let mut maps = Vec::new();
    for _ in 0..NUMBER {
        let fd = page(&device);
        maps.push(Map::new(&fd, page_size()).unwrap());
    }
    let listed = device.list(&List::new(0, NUMBER as u32 + 100)).unwrap();
    assert_eq!(listed.head.nr_records, MAX_RECORDS);
    assert_ne!(listed.head.after, 0);
    let first = ids(&listed.records(RECORD));
    let rest = device
        .list(&List::new(listed.head.after, NUMBER as u32))
        .unwrap();
    assert_eq!(rest.head.nr_records as usize, NUMBER - MAX_RECORDS as usize);
    assert_eq!(rest.head.after, 0);
    let mut all = first;
    all.extend(ids(&rest.records(RECORD)));
    let shown: BTreeSet<_> = maps.iter().map(inode_of_fast()).collect();
    assert!(all.is_sorted_by(|one, next| one < next));
    assert!(all.into_iter().collect::<BTreeSet<_>>() == shown);
    drop(maps);
    observe::wait_for_buffers(device.function(), 0);
    assert_eq!(device.records(), []);
}

/// [`inode_of`] of many mappings, which reads `/proc/self/maps` once.
fn inode_of_fast() -> impl Fn(&Map) -> u64 {
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    let by_start: BTreeMap<usize, u64> = maps
        .lines()
        .filter_map(|line| {
            let (start, _) = line.split_once('-')?;
            let inode = line.split_whitespace().nth(4)?;
            Some((usize::from_str_radix(start, 16).ok()?, inode.parse().ok()?))
        })
        .collect();
    move |map| by_start[&map.address()]
}

#[test]
fn a_walk_while_buffers_come_and_go_has_each_lasting_one_once() {
    let device = open();
    let lasting: Vec<_> = (0..100)
        .map(|_| {
            drop(page(&device));
            page(&device)
        })
        .collect();
    let mut ids_of_lasting: Vec<_> = lasting.iter().map(id_of).collect();
    ids_of_lasting.sort_unstable();
    let fds: Mutex<Vec<OwnedFd>> = Mutex::default();
    let over = AtomicBool::new(false);
    let come = || {
        let mut fds = fds.lock().unwrap();
        if !over.load(Ordering::Relaxed) && fds.len() < 60 {
            fds.push(page(&device));
        }
    };
    let go = || {
        let fd = fds.lock().unwrap().pop();
        drop(fd);
    };
    let map = || drop(bar(&device, BAR, 0, page_size()));
    race::meanwhile(&[&come, &go, &map], || {
        for round in 0..40 {
            let seen = ids(&device.records_by(1 + round % 9));
            let found = seen.iter().filter(|id| ids_of_lasting.contains(id));
            assert!(found.eq(&ids_of_lasting), "round {round}");
        }
        over.store(true, Ordering::Relaxed);
    });
}

// ---- While others wait --------------------------------------------------------------------------

#[test]
fn list_does_not_wait_for_who_has_the_reservation_lock() {
    let device = open();
    let fd = page(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.occupied(|| {
        let record = at_once("LIST", || device.record(&fd));
        assert_eq!((record.id, record.nr_attachments), (id_of(&fd), 1));
        at_once("an export", || drop(page(&device)));
    });
    assert_eq!(device.record(&fd).flags, 0);
}

#[test]
fn list_says_that_a_buffer_is_draining_while_revoke_waits() {
    let device = open();
    let fd = page(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.hold(true);
    attachment.map().unwrap();
    let other = page(&device);
    let answer = waits_for(
        || device.revoke(&fd),
        || {
            attachment.wait_for_interruption();
            let record = at_once("LIST", || device.record(&fd));
            assert_eq!((record.state, record.nr_mappings), (STATE_DEAD, 1));
            assert_eq!(record.flags, BUFFER_DRAINING);
            let other = at_once("LIST", || device.record(&other));
            assert_eq!((other.state, other.flags), (STATE_OK, 0));
            assert_eq!(leases(&device).len(), 2);
        },
        || attachment.unmap().unwrap(),
    );
    assert_eq!(answer, Ok(()));
    assert_eq!(device.record(&fd).flags, 0);
}

#[test]
fn list_says_that_a_buffer_is_draining_while_its_fence_is_waited_for() {
    let device = open();
    let fd = page(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    attachment.fence().unwrap();
    let answer = waits_for(
        || device.revoke(&fd),
        || {
            attachment.wait_for_interruption();
            let record = at_once("LIST", || device.record(&fd));
            assert_eq!((record.state, record.nr_mappings), (STATE_DEAD, 0));
            assert_eq!(record.flags, BUFFER_DRAINING);
        },
        || attachment.signal().unwrap(),
    );
    assert_eq!(answer, Ok(()));
    assert_eq!(device.record(&fd).flags, 0);
}

#[test]
fn list_says_that_a_buffer_is_draining_before_its_importers_were_told() {
    let device = open();
    let fd = page(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    let revoking = thread::scope(|scope| {
        let revoking = attachment.occupied(|| {
            let revoking = scope.spawn(|| device.revoke(&fd));
            // REVOKE has the buffer locked while it waits for the importer's lock.
            wait::until("REVOKE before the reservation lock", || {
                let record = at_once("LIST", || device.record(&fd));
                let draining = record.flags & BUFFER_DRAINING != 0;
                assert_eq!(record.state == STATE_DEAD, draining, "{record:?}");
                assert_eq!(record.name == [0; 32], record.flags & BUFFER_NAME_BUSY != 0);
                record.flags == BUFFER_DRAINING | BUFFER_NAME_BUSY
            });
            revoking
        });
        revoking.join().unwrap()
    });
    assert_eq!(revoking, Ok(()));
    let record = device.record(&fd);
    assert_eq!((record.state, record.flags), (STATE_DEAD, 0));
    assert!(name(&record).starts_with("barlease:"));
}

#[test]
fn what_an_event_takes_away_is_not_draining() {
    let device = open();
    let fd = page(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.hold(true);
    attachment.map().unwrap();
    waits_for(
        || device.set_memory(false),
        || {
            attachment.wait_for_interruption();
            let record = at_once("LIST", || device.record(&fd));
            assert_eq!((record.state, record.nr_mappings), (STATE_REVOKED, 1));
            assert_eq!(record.flags, 0);
        },
        || attachment.unmap().unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "pair0", "display"]);
}
