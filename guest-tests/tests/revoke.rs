//! REVOKE and STATUS.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use barlease_abi::{
    DmaBufStatus, FEATURE_DMA_BUF_REVOKE, FEATURE_DMA_BUF_STATUS, MEMATTR_NC, REASON_MEMORY_OFF,
    STATE_DEAD, STATE_OK, STATE_REVOKED,
};
use barlease_guest_tests::{
    errno::{EBADF, EBADFD, EFAULT, EINVAL, ENODEV},
    huge_size,
    lease::{self, State},
    map::{How, Map, Sigbus},
    observe, page_size,
    pci::{BARLEASE, STOCK},
    process::Child,
    vfio::{Device, GET, SET},
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;

const REVOKE: u32 = FEATURE_DMA_BUF_REVOKE as u32;
const STATUS: u32 = FEATURE_DMA_BUF_STATUS as u32;

fn display() -> Device {
    Device::open("display")
}

fn export(device: &Device) -> OwnedFd {
    device
        .export(FRAME_BUFFER, &[(0, 2 * huge_size())])
        .unwrap()
}

fn map(fd: impl AsFd) -> Map {
    let map = Map::aligned(fd, 2 * huge_size()).unwrap();
    map.touch_all().unwrap();
    map
}

fn is_gone(map: &Map) {
    for at in [0, page_size(), 2 * huge_size() - page_size()] {
        assert_eq!(map.read(at), Err(Sigbus));
        assert_eq!(map.write(at, 1), Err(Sigbus));
    }
}

// ---- PROBE and sizes ----------------------------------------------------------------------------

#[test]
fn probe_says_that_revoke_is_set_and_status_is_get() {
    let device = display();
    let [revoke, status] = [FEATURE_DMA_BUF_REVOKE, FEATURE_DMA_BUF_STATUS];
    for operations in [0, SET] {
        assert_eq!(device.probe(revoke, operations), Ok(()));
    }
    for operations in [0, GET] {
        assert_eq!(device.probe(status, operations), Ok(()));
    }
    for operations in [GET, GET | SET] {
        assert_eq!(device.probe(revoke, operations), Err(EINVAL));
    }
    for operations in [SET, GET | SET] {
        assert_eq!(device.probe(status, operations), Err(EINVAL));
    }
}

#[test]
fn the_other_operation_is_einval_and_does_nothing() {
    let device = display();
    let fd = export(&device);
    let mut payload = fd.as_raw_fd().to_ne_bytes();
    assert_eq!(device.feature(GET | REVOKE, &mut payload), Err(EINVAL));
    assert_eq!(device.feature(REVOKE, &mut payload), Err(EINVAL));
    let mut payload = [0; size_of::<DmaBufStatus>()];
    payload[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    assert_eq!(device.feature(SET | STATUS, &mut payload), Err(EINVAL));
    assert_eq!(device.feature(STATUS, &mut payload), Err(EINVAL));
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn an_argsz_that_is_too_small_is_einval_and_does_nothing() {
    let device = display();
    let fd = export(&device);
    let mut payload = [0; size_of::<DmaBufStatus>()];
    payload[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    for bytes in 0..4 {
        let answer = device.feature_sized(SET | REVOKE, &mut payload, 8 + bytes);
        assert_eq!(answer, Err(EINVAL), "REVOKE, {bytes} bytes");
    }
    for bytes in 0..40 {
        let answer = device.feature_sized(GET | STATUS, &mut payload, 8 + bytes);
        assert_eq!(answer, Err(EINVAL), "STATUS, {bytes} bytes");
    }
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn a_payload_that_is_not_there_is_efault_and_does_nothing() {
    let device = display();
    let fd = export(&device);
    assert_eq!(device.feature_at_edge(SET | REVOKE, &[], 4), Err(EFAULT));
    assert_eq!(device.feature_at_edge(GET | STATUS, &[], 40), Err(EFAULT));
    let bytes = fd.as_raw_fd().to_ne_bytes();
    let answer = device.feature_at_edge(SET | REVOKE, &bytes[..2], 4);
    assert_eq!(answer, Err(EFAULT));
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn a_status_that_cannot_be_written_is_efault() {
    let device = display();
    let fd = export(&device);
    let mut payload = [0; size_of::<DmaBufStatus>()];
    payload[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    let answer = device.feature_read_only(GET | STATUS, &payload);
    assert_eq!(answer, Err(EFAULT));
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn a_larger_argsz_is_fine() {
    let device = display();
    let fd = export(&device);
    let mut payload = [0; 64];
    payload[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    assert_eq!(device.feature(GET | STATUS, &mut payload), Ok(0));
    let mut payload = [0; 64];
    payload[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    assert_eq!(device.feature(SET | REVOKE, &mut payload), Ok(0));
    assert_eq!(device.state(&fd), State::Dead);
}

// ---- The fd in the payload ----------------------------------------------------------------------

#[test]
fn no_such_fd_is_ebadf() {
    let device = display();
    for fd in [-1, -2, i32::MIN, i32::MAX, lease::no_such_fd()] {
        assert_eq!(device.revoke_number(fd), Err(EBADF), "{fd}");
        let answer = device.status_number(fd, 0);
        assert_eq!(answer.map(drop), Err(EBADF), "{fd}");
    }
    let closed = export(&device).as_raw_fd();
    assert_eq!(device.revoke_number(closed), Err(EBADF));
}

#[test]
fn an_fd_that_is_no_dma_buf_is_einval() {
    let device = display();
    let null = File::open("/dev/null").unwrap();
    let fds = [null.as_fd(), device.as_fd(), device.group().as_fd()];
    for fd in fds {
        assert_eq!(device.revoke(fd), Err(EINVAL));
        assert_eq!(device.status(fd).map(drop), Err(EINVAL));
    }
}

#[test]
fn a_dma_buf_of_stock_vfio_pci_is_einval() {
    let device = display();
    let stock = Device::open_with("testdev", STOCK);
    let fd = stock.export(2, &[(0, page_size())]).unwrap();
    assert_eq!(device.revoke(&fd), Err(EINVAL));
    assert_eq!(device.status(&fd).map(drop), Err(EINVAL));
    drop(fd);
    let function = stock.function().clone();
    drop(stock);
    function.bind(BARLEASE);
}

#[test]
fn a_buffer_of_another_device_is_enodev_and_unharmed() {
    let device = display();
    let other = Device::open("testdev");
    let fd = other.export(2, &[(0, 2 * huge_size())]).unwrap();
    let map = map(&fd);
    assert_eq!(device.revoke(&fd), Err(ENODEV));
    assert_eq!(device.status(&fd).map(drop), Err(ENODEV));
    assert_eq!(other.state(&fd), State::Ok);
    map.touch_all().unwrap();
    // Dead or not, it is another's.
    other.revoke(&fd).unwrap();
    assert_eq!(device.revoke(&fd), Err(ENODEV));
}

// ---- Revocation ---------------------------------------------------------------------------------

#[test]
fn a_revoked_buffer_is_gone_for_good() {
    let device = display();
    let fd = export(&device);
    let map = map(&fd);
    device.revoke(&fd).unwrap();
    is_gone(&map);
    assert_eq!(device.state(&fd), State::Dead);
    assert_eq!(Map::new(&fd, page_size()).map(drop), Err(ENODEV));
    // Nothing that happens to the device brings it back.
    device.set_memory(false);
    device.set_memory(true);
    is_gone(&map);
    assert_eq!(device.state(&fd), State::Dead);
    assert_eq!(lease::size(&fd), 2 * huge_size());
}

#[test]
fn a_second_revoke_is_ebadfd() {
    let device = display();
    let fd = export(&device);
    device.revoke(&fd).unwrap();
    for _ in 0..3 {
        assert_eq!(device.revoke(&fd), Err(EBADFD));
    }
    assert_eq!(device.state(&fd), State::Dead);
}

#[test]
fn a_buffer_that_is_revoked_by_an_event_becomes_dead() {
    let device = display();
    let fd = export(&device);
    let map = map(&fd);
    device.set_memory(false);
    assert_eq!(device.state(&fd), State::Revoked(REASON_MEMORY_OFF));
    device.revoke(&fd).unwrap();
    assert_eq!(device.state(&fd), State::Dead);
    assert_eq!(device.revoke(&fd), Err(EBADFD));
    device.set_memory(true);
    assert_eq!(device.state(&fd), State::Dead);
    is_gone(&map);
}

#[test]
fn a_buffer_that_nobody_ever_mapped_is_revoked() {
    let device = display();
    let fd = export(&device);
    device.revoke(&fd).unwrap();
    assert_eq!(Map::new(&fd, page_size()).map(drop), Err(ENODEV));
}

#[test]
fn every_mapping_of_a_buffer_is_gone() {
    let device = display();
    let fd = export(&device);
    let maps: Vec<_> = [0, page_size(), huge_size() / 2]
        .into_iter()
        .map(|skew| {
            let how = How::shared().align(huge_size()).skew(skew);
            let map = how.map(&fd, 0, 2 * huge_size()).unwrap();
            map.touch_all().unwrap();
            map
        })
        .collect();
    let part = How::shared().map(&fd, huge_size(), huge_size()).unwrap();
    part.touch_all().unwrap();
    let untouched = Map::new(&fd, 2 * huge_size()).unwrap();
    device.revoke(&fd).unwrap();
    maps.iter().for_each(is_gone);
    is_gone(&untouched);
    assert_eq!(part.read(0), Err(Sigbus));
}

#[test]
fn other_buffers_are_untouched() {
    let device = display();
    let fd = export(&device);
    let map_of_fd = map(&fd);
    // The same, overlapping, beside it, with its pages in between.
    let others: Vec<_> = [
        &[(0, 2 * huge_size())][..],
        &[(huge_size(), 2 * huge_size())],
        &[(2 * huge_size(), 2 * huge_size())],
        &[(0, huge_size()), (8 * huge_size(), huge_size())],
    ]
    .into_iter()
    .map(|ranges| {
        let fd = device.export(FRAME_BUFFER, ranges).unwrap();
        let map = map(&fd);
        (fd, map)
    })
    .collect();
    let warm = || others.iter().for_each(|(_, map)| map.touch_all().unwrap());
    warm();
    let faults = observe::faults_of(|| {
        device.revoke(&fd).unwrap();
        warm();
    });
    assert_eq!(faults, 0, "a mapping of another buffer was taken away");
    for (other, _) in &others {
        assert_eq!(device.state(other), State::Ok);
    }
    is_gone(&map_of_fd);
}

#[test]
fn bar_mappings_are_untouched() {
    let device = display();
    let fd = export(&device);
    let map = map(&fd);
    let bar = Map::aligned(&device, 4 * huge_size()).unwrap();
    bar.touch_all().unwrap();
    let faults = observe::faults_of(|| {
        device.revoke(&fd).unwrap();
        bar.touch_all().unwrap();
    });
    assert_eq!(faults, 0);
    is_gone(&map);
    bar.write(0, 3).unwrap();
    assert_eq!(device.read32(FRAME_BUFFER, 0), 3);
}

#[test]
fn the_range_is_exported_again_at_once() {
    let device = display();
    let mut gone = Vec::new();
    for round in 0..20 {
        let fd = export(&device);
        let map = map(&fd);
        map.write(4, round).unwrap();
        device.revoke(&fd).unwrap();
        is_gone(&map);
        gone.push((fd, map));
    }
    let fd = export(&device);
    let map = map(&fd);
    assert_eq!(map.read(4), Ok(19));
    map.write(4, 20).unwrap();
    for (_, map) in &gone {
        is_gone(map);
    }
}

#[test]
fn a_buffer_is_revoked_through_any_of_its_fds() {
    let device = display();
    for revoke_original in [false, true] {
        let fd = export(&device);
        let duplicate = lease::duplicate(&fd);
        let maps = [map(&fd), map(&duplicate)];
        device
            .revoke(if revoke_original { &fd } else { &duplicate })
            .unwrap();
        for (fd, map) in [&fd, &duplicate].into_iter().zip(&maps) {
            is_gone(map);
            assert_eq!(device.state(fd), State::Dead);
            assert_eq!(device.revoke(fd), Err(EBADFD));
        }
    }
}

#[test]
fn a_buffer_that_was_passed_to_another_process_is_revoked_there() {
    let device = display();
    let holder = Child::start(&[], |link| {
        let fd = link.receive_fd();
        let map = map(&fd);
        map.write(8, 0x5eed).unwrap();
        link.send(0);
        link.expect(1);
        is_gone(&map);
        assert_eq!(Map::new(&fd, page_size()).map(drop), Err(ENODEV));
        // The holder goes on, and gets another.
        let fd = link.receive_fd();
        let again = self::map(&fd);
        again.write(12, 0xfeed).unwrap();
        is_gone(&map);
        link.send(2);
    });
    let fd = export(&device);
    holder.link.send_fd(&fd);
    holder.link.expect(0);
    assert_eq!(device.read32(FRAME_BUFFER, 8), 0x5eed);
    device.revoke(&fd).unwrap();
    holder.link.send(1);
    holder.link.send_fd(export(&device));
    holder.link.expect(2);
    assert_eq!(device.read32(FRAME_BUFFER, 12), 0xfeed);
    holder.join();
}

#[test]
fn a_buffer_of_which_only_the_holder_has_an_fd_is_out_of_reach_until_close() {
    let device = display();
    let holder = Child::start(&[], |link| {
        let map = map(link.receive_fd());
        link.send(0);
        link.expect(1);
        is_gone(&map);
    });
    holder.link.send_fd(export(&device));
    holder.link.expect(0);
    assert_eq!(observe::buffers(device.function()).len(), 1);
    drop(device);
    holder.link.send(1);
    holder.join();
}

#[test]
fn a_mapping_that_was_forked_is_gone_in_both_processes() {
    let device = display();
    let fd = export(&device);
    let map = map(&fd);
    let child = Child::start(&[], |link| {
        map.touch_all().unwrap();
        link.send(0);
        link.expect(1);
        is_gone(&map);
    });
    child.link.expect(0);
    device.revoke(&fd).unwrap();
    is_gone(&map);
    child.link.send(1);
    child.join();
}

// ---- STATUS -------------------------------------------------------------------------------------

#[test]
fn status_tells_all_of_a_buffer() {
    let device = display();
    let fd = device
        .export(
            FRAME_BUFFER,
            &[
                (0, 3 * page_size()),
                (huge_size(), page_size()),
                (0, page_size()),
            ],
        )
        .unwrap();
    let expected = DmaBufStatus {
        dmabuf_fd: fd.as_raw_fd(),
        reserved: 0,
        state: STATE_OK,
        reasons: 0,
        memattr: MEMATTR_NC,
        region_index: FRAME_BUFFER,
        size: 5 * page_size(),
        nr_ranges: 3,
        nr_attachments: 0,
    };
    assert_eq!(device.status(&fd), Ok(expected));
    device.set_memory(false);
    let revoked = DmaBufStatus {
        state: STATE_REVOKED,
        reasons: REASON_MEMORY_OFF,
        ..expected
    };
    assert_eq!(device.status(&fd), Ok(revoked));
    device.revoke(&fd).unwrap();
    let dead = DmaBufStatus {
        state: STATE_DEAD,
        ..expected
    };
    // Dead for no reason of the device, though one holds.
    assert_eq!(device.status(&fd), Ok(dead));
    device.set_memory(true);
    assert_eq!(device.status(&fd), Ok(dead));
}

#[test]
fn status_tells_the_bar() {
    let device = display();
    let fd = device.export(2, &[(0, page_size())]).unwrap();
    let status = device.status(&fd).unwrap();
    assert_eq!((status.region_index, status.size), (2, page_size()));
}

#[test]
fn a_reserved_field_that_is_not_0_is_einval() {
    let device = display();
    let fd = export(&device);
    for reserved in [1, 1 << 31, u32::MAX] {
        let answer = device.status_number(fd.as_raw_fd(), reserved);
        assert_eq!(answer.map(drop), Err(EINVAL));
        // Before the fd is looked at.
        let answer = device.status_number(-1, reserved);
        assert_eq!(answer.map(drop), Err(EINVAL));
    }
}

#[test]
fn status_overwrites_what_is_out_only() {
    let device = display();
    let fd = export(&device);
    let mut payload = [0xff; 48];
    payload[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
    payload[4..8].fill(0);
    assert_eq!(device.feature(GET | STATUS, &mut payload), Ok(0));
    let status = lease::status(payload[..40].try_into().unwrap());
    assert_eq!(status, device.status(&fd).unwrap());
    assert_eq!(payload[40..], [0xff; 8]);
}

#[test]
fn status_changes_nothing() {
    let device = display();
    let fd = export(&device);
    let map = map(&fd);
    let faults = observe::faults_of(|| {
        for _ in 0..10 {
            device.status(&fd).unwrap();
        }
        map.touch_all().unwrap();
    });
    assert_eq!(faults, 0);
}
