//! REVOKE_ID: REVOKE of a buffer that the owner has no fd of, with and without a wait for
//! importers.
#![cfg(barlease_guest)]

use std::{os::fd::OwnedFd, thread, time::Duration};

use barlease_abi::{
    BUFFER_DRAINING, BUFFER_INTERNAL, FEATURE_DMA_BUF_REVOKE_ID, REASON_MEMORY_OFF, REVOKE_NOWAIT,
    STATE_DEAD,
};
use barlease_guest_tests::{
    buffers::id_of,
    errno::{Answer, EBADFD, EFAULT, EINPROGRESS, EINVAL, ENODEV, ENOENT},
    importer::{Attachment, EDU, Importer, KernelLog, check_that_nothing_is_left},
    lease::{self, State},
    map::{How, Map, Sigbus},
    page_size,
    pci::Function,
    process::Child,
    race,
    vfio::{Device, GET, PROBE, SET},
    wait::{self, A_WHILE, at_once, waits_for},
};

/// BAR2 of the memory device.
const BAR: u32 = 2;
const BAR_LEN: u64 = 64 << 20;
fn two() -> [(u64, u64); 2] {
    [
        (8 * page_size(), page_size()),
        (4 * page_size(), page_size()),
    ]
}
const FEATURE: u32 = SET | FEATURE_DMA_BUF_REVOKE_ID as u32;

fn open() -> Device {
    Device::open("memory")
}

fn export(device: &Device) -> OwnedFd {
    device.export(BAR, &two()).expect("an export")
}

/// A lease, a mapping of it that was touched, and an importer that has mapped it and does not let
/// go.
fn held(device: &Device) -> (OwnedFd, Map, Attachment) {
    let fd = export(device);
    let map = Map::new(&fd, 2 * page_size()).expect("an mmap");
    map.touch_all().unwrap();
    let attachment = Importer::open().attach(&fd).expect("an attachment");
    attachment.hold(true);
    attachment.map().expect("a mapping");
    (fd, map, attachment)
}

/// Whether it is dead for everybody.
fn is_dead(device: &Device, fd: &OwnedFd, map: &Map) {
    assert_eq!(map.read(0), Err(Sigbus));
    assert_eq!(map.write(page_size(), 1), Err(Sigbus));
    assert_eq!(device.state(fd), State::Dead);
    assert_eq!(device.record(fd).state, STATE_DEAD);
    assert_eq!(Map::new(fd, page_size()).unwrap_err(), ENODEV);
    let attach = Importer::open().attach(fd);
    assert_eq!(attach.unwrap_err(), ENODEV);
}

// ---- The request --------------------------------------------------------------------------------

#[test]
fn a_probe_is_truthful() {
    let device = open();
    let feature = FEATURE_DMA_BUF_REVOKE_ID;
    assert_eq!(device.probe(feature, SET), Ok(()));
    assert_eq!(device.probe(feature, GET), Err(EINVAL));
    let get = GET | u32::from(feature);
    assert_eq!(device.feature(get, &mut [0; 16]), Err(EINVAL));
    assert_eq!(device.feature(get | PROBE, &mut [0; 16]), Err(EINVAL));
}

#[test]
fn what_is_not_defined_is_refused_and_revokes_nothing() {
    let device = open();
    let fd = export(&device);
    let id = id_of(&fd);
    for flags in [2, 3, 1 << 31, u32::MAX] {
        assert_eq!(
            device.revoke_id_raw(id, flags, 0),
            Err(EINVAL),
            "{flags:#x}"
        );
    }
    for reserved in [1, u32::MAX] {
        assert_eq!(device.revoke_id_raw(id, 0, reserved), Err(EINVAL));
        assert_eq!(
            device.revoke_id_raw(id, REVOKE_NOWAIT, reserved),
            Err(EINVAL)
        );
    }
    // An error of the payload comes before an error of the buffer.
    assert_eq!(device.revoke_id_raw(u64::MAX, 2, 0), Err(EINVAL));
    assert_eq!(device.revoke_id_raw(u64::MAX, 0, 1), Err(EINVAL));
    let mut payload = [0; 16];
    payload[..8].copy_from_slice(&id.to_ne_bytes());
    for argsz in 0..24 {
        let answer = device.feature_sized(FEATURE, &mut payload, argsz);
        assert_eq!(answer, Err(EINVAL), "argsz {argsz}");
    }
    for readable in [0, 7, 8, 15] {
        let answer = device.feature_at_edge(FEATURE, &payload[..readable], 16);
        assert_eq!(answer, Err(EFAULT), "{readable} bytes");
    }
    assert_eq!(device.state(&fd), State::Ok);
    // Nothing is written back.
    assert_eq!(device.feature_read_only(FEATURE, &payload), Ok(0));
    assert_eq!(device.state(&fd), State::Dead);
}

#[test]
fn an_id_that_this_open_has_no_buffer_of_is_enoent() {
    let device = open();
    let other = Device::open("pair0");
    let elsewhere = export(&other);
    let fd = export(&device);
    let id = id_of(&fd);
    let unknown = [0, 1 << 40, u64::MAX, id_of(&elsewhere)];
    for flags in [0, REVOKE_NOWAIT] {
        for id in unknown {
            assert_eq!(device.revoke_id_raw(id, flags, 0), Err(ENOENT), "{id}");
        }
    }
    assert_eq!(other.state(&elsewhere), State::Ok);
    drop(device);
    let device = open();
    for flags in [0, REVOKE_NOWAIT] {
        assert_eq!(
            device.revoke_id_raw(id, flags, 0),
            Err(ENOENT),
            "an earlier open"
        );
    }
    let now = export(&device);
    let now_id = id_of(&now);
    drop(now);
    wait::until("its end", || device.find_record(now_id).is_none());
    assert_eq!(
        device.revoke_id(now_id),
        Err(ENOENT),
        "a buffer that is gone"
    );
    drop(fd);
}

#[test]
fn a_mapping_of_a_bar_cannot_be_revoked() {
    let device = open();
    let at = u64::from(BAR) << 40;
    let map = How::shared().map(&device, at, page_size()).unwrap();
    map.touch_all().unwrap();
    let records = device.records();
    assert!(!records.is_empty());
    for record in records {
        assert_eq!(record.flags, BUFFER_INTERNAL);
        for flags in [0, REVOKE_NOWAIT] {
            assert_eq!(device.revoke_id_raw(record.id, flags, 0), Err(EINVAL));
        }
    }
    map.touch_all().unwrap();
}

// ---- Its effects --------------------------------------------------------------------------------

#[test]
fn revoke_by_id_is_revoke() {
    let device = open();
    for flags in [0, REVOKE_NOWAIT] {
        let (fd, other) = (export(&device), export(&device));
        let [map, other_map] = [&fd, &other].map(|fd| Map::new(fd, 2 * page_size()).unwrap());
        map.touch_all().unwrap();
        other_map.touch_all().unwrap();
        let attachment = Importer::open().attach(&fd).unwrap();
        attachment.map().unwrap();
        assert_eq!(device.revoke_id_raw(id_of(&fd), flags, 0), Ok(()));
        assert!(!attachment.is_mapped());
        assert_eq!(attachment.translate(0), None);
        assert_eq!(attachment.map(), Err(ENODEV));
        is_dead(&device, &fd, &map);
        assert_eq!(device.buffer_flags(&fd), 0);
        // The other one, which overlaps, is not.
        assert_eq!(other_map.touch_all(), Ok(()));
        assert_eq!(device.state(&other), State::Ok);
        for flags in [0, REVOKE_NOWAIT] {
            assert_eq!(device.revoke_id_raw(id_of(&fd), flags, 0), Err(EBADFD));
        }
        assert_eq!(device.revoke(&fd), Err(EBADFD));
    }
}

#[test]
fn revoke_by_id_needs_no_fd() {
    let device = open();
    let fd = export(&device);
    let id = id_of(&fd);
    let child = Child::start(&[], |link| {
        let map = Map::new(link.receive_fd(), 2 * page_size()).unwrap();
        map.touch_all().unwrap();
        link.send(1);
        link.expect(2);
        assert_eq!(map.read(0), Err(Sigbus));
    });
    child.link.send_fd(&fd);
    child.link.expect(1);
    drop(fd);
    assert_eq!(device.revoke_id(id), Ok(()));
    child.link.send(2);
    child.join();
    // Its holder has ended: nothing is left of it.
    wait::until("its end", || device.find_record(id).is_none());
}

#[test]
fn a_buffer_that_was_revoked_by_fd_is_ebadfd() {
    let device = open();
    let fd = export(&device);
    device.revoke(&fd).unwrap();
    for flags in [0, REVOKE_NOWAIT] {
        assert_eq!(device.revoke_id_raw(id_of(&fd), flags, 0), Err(EBADFD));
    }
}

#[test]
fn a_revoked_buffer_becomes_dead_at_once() {
    let device = open();
    device.set_memory(false);
    for flags in [0, REVOKE_NOWAIT] {
        let fd = export(&device);
        assert_eq!(device.state(&fd), State::Revoked(REASON_MEMORY_OFF));
        assert_eq!(device.revoke_id_raw(id_of(&fd), flags, 0), Ok(()));
        assert_eq!(device.state(&fd), State::Dead);
    }
    device.set_memory(true);
}

#[test]
fn revoke_by_id_waits_for_a_slow_importer() {
    let device = open();
    let (fd, map, slow) = held(&device);
    let answer = waits_for(
        || device.revoke_id(id_of(&fd)),
        || {
            slow.wait_for_interruption();
            is_dead(&device, &fd, &map);
            assert_eq!(device.revoke_nowait(id_of(&fd)), Err(EBADFD));
        },
        || slow.unmap().unwrap(),
    );
    assert_eq!(answer, Ok(()));
}

// ---- Without a wait -----------------------------------------------------------------------------

#[test]
fn nowait_of_an_idle_buffer_leaves_nothing_to_wait_for() {
    let device = open();
    let fd = export(&device);
    let map = Map::new(&fd, 2 * page_size()).unwrap();
    map.touch_all().unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    attachment.fence().unwrap();
    attachment.signal().unwrap();
    attachment.unmap().unwrap();
    assert_eq!(device.revoke_nowait(id_of(&fd)), Ok(()));
    is_dead(&device, &fd, &map);
    assert_eq!(device.buffer_flags(&fd), 0);
    assert_eq!(attachment.status().interruptions, 0);
}

/// Looks at what NOWAIT left of a buffer that somebody still has, until `let_go`.
fn drains(
    device: &Device,
    (fd, map): (&OwnedFd, &Map),
    mappings: u32,
    let_go: impl FnOnce() -> Answer<()>,
) {
    let id = id_of(fd);
    let events = device.events();
    let answer = at_once("REVOKE_ID", || device.revoke_nowait(id));
    assert_eq!(answer, Err(EINPROGRESS));
    is_dead(device, fd, map);
    let record = device.record(fd);
    assert_eq!(
        (record.flags, record.nr_mappings),
        (BUFFER_DRAINING, mappings)
    );
    for flags in [0, REVOKE_NOWAIT] {
        let again = at_once("REVOKE_ID", || device.revoke_id_raw(id, flags, 0));
        assert_eq!(again, Err(EBADFD));
    }
    events.expect("a dead buffer");
    events.settle();
    assert_eq!(device.buffer_flags(fd), BUFFER_DRAINING);
    let_go().unwrap();
    events.until("the end of draining", || device.buffer_flags(fd) == 0);
    assert_eq!(device.record(fd).nr_mappings, 0);
    is_dead(device, fd, map);
}

#[test]
fn nowait_does_not_wait_for_a_mapping() {
    let device = open();
    let (fd, map, slow) = held(&device);
    drains(&device, (&fd, &map), 1, || slow.unmap());
    assert_eq!(slow.status().interruptions, 1);
}

/// A process can have an importer keep that lock for long, as by a mapping of many ranges.
#[test]
fn nowait_does_not_wait_for_a_reservation_lock_that_an_importer_keeps() {
    let device = open();
    let (fd, map, slow) = held(&device);
    let id = id_of(&fd);
    slow.occupied(|| {
        let answer = at_once("REVOKE_ID", || device.revoke_nowait(id));
        assert_eq!(answer, Err(EINPROGRESS));
        assert_eq!(map.read(0), Err(Sigbus));
        let record = at_once("LIST", || device.record(&fd));
        let draining = record.flags & BUFFER_DRAINING != 0;
        assert_eq!((record.state, draining), (STATE_DEAD, true));
        // The importers of others are told meanwhile.
        let (other, _map, attachment) = held(&device);
        let answer = at_once("REVOKE_ID", || device.revoke_nowait(id_of(&other)));
        assert_eq!(answer, Err(EINPROGRESS));
        assert_eq!(attachment.status().interruptions, 1);
        attachment.unmap().unwrap();
    });
    // It is told when that can be done.
    slow.wait_for_interruption();
    assert_eq!(device.buffer_flags(&fd), BUFFER_DRAINING);
    slow.unmap().unwrap();
    wait::until("the end of draining", || device.buffer_flags(&fd) == 0);
    is_dead(&device, &fd, &map);
}

#[test]
fn nowait_does_not_wait_for_a_fence() {
    let device = open();
    let (fd, map, attachment) = held(&device);
    attachment.hold(false);
    attachment.fence().unwrap();
    drains(&device, (&fd, &map), 0, || attachment.signal());
    assert!(!attachment.is_mapped());
}

#[test]
fn nowait_does_not_wait_for_the_fence_of_an_importer_without_a_mapping() {
    let device = open();
    let (fd, map, attachment) = held(&device);
    attachment.unmap().unwrap();
    attachment.fence().unwrap();
    drains(&device, (&fd, &map), 0, || attachment.signal());
}

#[test]
fn what_is_left_is_both_a_fence_and_a_mapping() {
    let device = open();
    let (fd, map, slow) = held(&device);
    let fence = slow.add_fence(0, Duration::ZERO).unwrap();
    drains(&device, (&fd, &map), 1, || {
        slow.unmap()?;
        thread::sleep(A_WHILE);
        assert_eq!(
            device.buffer_flags(&fd),
            BUFFER_DRAINING,
            "the fence is left"
        );
        slow.signal_number(fence)
    });
    let (fd, map, slow) = held(&device);
    let fence = slow.add_fence(0, Duration::ZERO).unwrap();
    drains(&device, (&fd, &map), 1, || {
        slow.signal_number(fence)?;
        thread::sleep(A_WHILE);
        assert_eq!(
            device.buffer_flags(&fd),
            BUFFER_DRAINING,
            "the mapping is left"
        );
        slow.unmap()
    });
}

#[test]
fn a_fence_that_is_added_later_drains_nothing() {
    let device = open();
    let (fd, map, attachment) = held(&device);
    attachment.hold(false);
    let first = attachment.add_fence(0, Duration::ZERO).unwrap();
    drains(&device, (&fd, &map), 0, || {
        attachment.add_fence(0, Duration::ZERO)?;
        attachment.signal_number(first)
    });
}

#[test]
fn nowait_drains_many_buffers_at_once() {
    let device = open();
    let all: Vec<_> = (0..20).map(|_| held(&device)).collect();
    let events = device.events();
    for (fd, ..) in &all {
        let answer = at_once("REVOKE_ID", || device.revoke_nowait(id_of(fd)));
        assert_eq!(answer, Err(EINPROGRESS));
    }
    events.settle();
    for (number, (fd, map, slow)) in all.iter().enumerate() {
        is_dead(&device, fd, map);
        slow.unmap().unwrap();
        events.until("the end of draining", || device.buffer_flags(fd) == 0);
        let draining = device.records().iter().filter(|r| r.flags != 0).count();
        assert_eq!(draining, all.len() - number - 1);
    }
}

#[test]
fn what_nowait_left_is_warned_of() {
    let device = open();
    let (fd, _map, slow) = held(&device);
    lease::set_name(&fd, "left-behind").unwrap();
    let mut log = KernelLog::from_now();
    assert_eq!(device.revoke_nowait(id_of(&fd)), Err(EINPROGRESS));
    let bdfs = ["memory", EDU].map(|name| Function::named(name).bdf);
    for _ in 0..2 {
        let mut line = String::new();
        wait::until("a warning", || {
            let lines = log.lines().into_iter();
            line = lines.filter(|line| line.contains("left-behind")).collect();
            !line.is_empty()
        });
        assert!(bdfs.iter().all(|bdf| line.contains(bdf)), "{line}");
    }
    slow.unmap().unwrap();
}

/// A holder whose mappings are refused makes lines of the log, too.
#[test]
fn refusals_keep_no_warning_out_of_the_log() {
    let device = open();
    let whole = (0, BAR_LEN);
    let too_long = device.export(BAR, &[whole, whole, whole]).unwrap();
    let refused = Importer::open().attach(&too_long).unwrap();
    let (fd, _map, slow) = held(&device);
    lease::set_name(&fd, "shouted-down").unwrap();
    let mut log = KernelLog::from_now();
    assert_eq!(device.revoke_nowait(id_of(&fd)), Err(EINPROGRESS));
    let (mut refusals, mut warned) = (false, false);
    wait::until("a warning", || {
        for _ in 0..100 {
            assert_eq!(refused.map(), Err(EINVAL));
        }
        for line in log.lines() {
            refusals |= line.contains("more than twice");
            warned |= line.contains("shouted-down");
        }
        warned
    });
    assert!(refusals);
    slow.unmap().unwrap();
}

#[test]
fn what_nowait_left_is_waited_for_by_events() {
    let device = open();
    let (fd, map, slow) = held(&device);
    assert_eq!(device.revoke_nowait(id_of(&fd)), Err(EINPROGRESS));
    waits_for(
        || device.set_memory(false),
        || is_dead(&device, &fd, &map),
        || slow.unmap().unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn what_nowait_left_is_waited_for_by_the_close_of_the_device() {
    let device = open();
    let (fd, map, slow) = held(&device);
    assert_eq!(device.revoke_nowait(id_of(&fd)), Err(EINPROGRESS));
    waits_for(
        || drop(device),
        || assert_eq!(map.read(0), Err(Sigbus)),
        || slow.unmap().unwrap(),
    );
}

#[test]
fn what_nowait_left_keeps_others_from_nothing() {
    let device = open();
    let (fd, _map, slow) = held(&device);
    let second = export(&device);
    let second_map = Map::new(&second, 2 * page_size()).unwrap();
    assert_eq!(device.revoke_nowait(id_of(&fd)), Err(EINPROGRESS));
    at_once("a touch", || second_map.touch_all().unwrap());
    at_once("REVOKE of another", || device.revoke(&second).unwrap());
    at_once("an export", || drop(export(&device)));
    at_once("the importer's end", || slow.unmap().unwrap());
}

#[test]
fn the_range_of_a_draining_buffer_can_be_exported_again() {
    let device = open();
    let (fd, _map, slow) = held(&device);
    assert_eq!(device.revoke_nowait(id_of(&fd)), Err(EINPROGRESS));
    let again = export(&device);
    assert_ne!(id_of(&again), id_of(&fd));
    Map::new(&again, 2 * page_size())
        .unwrap()
        .touch_all()
        .unwrap();
    let attachment = Importer::open().attach(&again).unwrap();
    attachment.map().unwrap();
    slow.unmap().unwrap();
    assert!(attachment.is_mapped());
}

#[test]
fn one_of_many_that_revoke_the_same_is_the_first() {
    let device = open();
    for _ in 0..50 {
        let fd = export(&device);
        let id = id_of(&fd);
        let first = std::sync::atomic::AtomicU32::new(0);
        let count = |answer: Answer<()>| match answer {
            Ok(()) => drop(first.fetch_add(1, std::sync::atomic::Ordering::SeqCst)),
            Err(errno) => assert_eq!(errno, EBADFD),
        };
        let [by_id, by_fd, nowait] = [
            &(|| count(device.revoke_id(id))) as race::Loop<'_>,
            &|| count(device.revoke(&fd)),
            &|| count(device.revoke_nowait(id)),
        ];
        race::meanwhile(&[by_id, by_fd, nowait], || ());
        assert_eq!(first.into_inner(), 1);
        assert_eq!(device.state(&fd), State::Dead);
    }
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    let log = KernelLog::whole().lines();
    let complaint = log.iter().find(|line| line.contains("deprecated"));
    assert!(complaint.is_none(), "{complaint:?}");
    check_that_nothing_is_left(&["memory", "pair0"]);
}
