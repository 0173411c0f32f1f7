//! Devices that go away while they are leased: pulled out of their slot, or asked back.
#![cfg(barlease_guest)]

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use barlease::InterruptKind;
use barlease_abi::{ALIAS_WC, BUFFER_DRAINING};
use barlease_guest_tests::{
    errno::ENODEV,
    importer::{Attachment, Importer, check_that_nothing_is_left},
    lease::{Request, State},
    map::{How, Map, Sigbus},
    observe, page_size,
    process::{self, Child},
    race,
    slot::{DEVICE, Slot, Unproved, ask_back},
    vfio::Device,
    wait::{self, LONG},
};

/// The BAR with its registers, of 4 pages.
const BAR: u32 = 4;
/// Keeps what is written to it (virtio 1.2, 4.1.4.3: device_feature_select).
const SELECT: u64 = 0;

/// The slot, with no order of locks proved: in each test a device is pulled out, or put in.
fn slot() -> (Slot, Unproved) {
    (Slot::new(), Unproved::new())
}

/// A device with everything that can be leased of it: a lease, mappings of it, of the BAR and of an
/// alias, an importer.
struct Scene {
    /// First, since it is dropped first: the close of the device waits for it.
    attachment: Attachment,
    device: Device,
    /// Signalled when the device is wanted back.
    wanted: OwnedFd,
    fd: OwnedFd,
    maps: Vec<Map>,
}

impl Scene {
    fn new() -> Self {
        let device = Device::open(DEVICE);
        let wanted = process::eventfd();
        device.trigger(InterruptKind::Request, &wanted).unwrap();
        let fd = device
            .export(BAR, &[(0, 2 * page_size()), (3 * page_size(), page_size())])
            .unwrap();
        let alias = device.alias(BAR, ALIAS_WC).unwrap();
        let mut maps = vec![Map::new(&fd, 3 * page_size()).unwrap()];
        for region in [BAR, alias] {
            let offset = u64::from(region) << 40;
            maps.push(How::shared().map(&device, offset, 4 * page_size()).unwrap());
        }
        for map in &maps {
            map.touch_all().unwrap();
        }
        let attachment = Importer::open().attach(&fd).unwrap();
        attachment.map().unwrap();
        Self {
            attachment,
            device,
            wanted,
            fd,
            maps,
        }
    }

    fn is_wanted(&self) {
        assert!(process::is_signalled_within(&self.wanted, LONG));
    }

    /// Checks that nothing can be reached, and that everything says so.
    fn is_dead(&self) {
        assert_eq!(self.device.state(&self.fd), State::Dead);
        for map in &self.maps {
            assert_eq!(map.read(0), Err(Sigbus));
            assert_eq!(map.write(page_size(), 1), Err(Sigbus));
        }
        assert_eq!(Map::new(&self.fd, page_size()).map(drop), Err(ENODEV));
        assert_eq!(Importer::open().attach(&self.fd).map(drop), Err(ENODEV));
        assert_eq!(self.attachment.map(), Err(ENODEV));
        let status = self.attachment.status();
        assert_eq!((status.mapped, status.interruptions), (0, 1));
    }
}

#[test]
fn what_is_pulled_out_is_dead_before_its_user_lets_go() {
    let (slot, _unproved) = slot();
    let scene = Scene::new();
    slot.pull();
    scene.is_wanted();
    scene.is_dead();
    // The device fd is still open, and nothing is to be had through it.
    assert_eq!(
        scene.device.export(BAR, &[(0, page_size())]).map(drop),
        Err(ENODEV)
    );
    let request = Request::new(BAR, &[(0, page_size())]);
    assert_eq!(scene.device.stock_export(&request).map(drop), Err(ENODEV));
    let bar = How::shared().map(&scene.device, u64::from(BAR) << 40, page_size());
    assert_eq!(bar.map(drop), Err(ENODEV));
    assert!(
        slot.function.exists(),
        "the kernel did not wait for its user"
    );
    let Scene {
        attachment,
        device,
        fd,
        maps,
        ..
    } = scene;
    drop(device);
    // Mappings through the device fd keep it open.
    assert!(slot.function.exists());
    drop(maps);
    slot.wait_until_empty();
    assert_eq!(Map::new(&fd, page_size()).map(drop), Err(ENODEV));
    drop((attachment, fd));
    slot.plug();
    let again = Scene::new();
    assert_eq!(again.device.state(&again.fd), State::Ok);
}

/// The kernel asks for the device back every 10 seconds, and looks then whether it is still there.
#[test]
fn what_is_pulled_out_while_it_is_wanted_back_is_dead_too() {
    let (slot, _unproved) = slot();
    let scene = Scene::new();
    thread::scope(|scope| {
        scope.spawn(|| slot.function.unbind());
        scene.is_wanted();
        assert_eq!(scene.device.state(&scene.fd), State::Ok);
        slot.pull();
        // The state says it first, then the thread that found the device gone takes away what
        // processes have, and then tells importers.
        wait::until("the kernel to notice", || {
            scene.device.state(&scene.fd) == State::Dead
        });
        for map in &scene.maps {
            wait::until("SIGBUS", || map.read(0) == Err(Sigbus));
        }
        scene.attachment.wait_for_interruption();
        scene.is_dead();
        drop(scene);
    });
    slot.wait_until_empty();
    slot.plug();
}

#[test]
fn a_slow_importer_is_waited_for_and_keeps_nothing_else_alive() {
    let (slot, _unproved) = slot();
    let scene = Scene::new();
    scene.attachment.hold(true);
    let quick_fd = scene.device.export(BAR, &[(0, page_size())]).unwrap();
    let quick = Importer::open().attach(&quick_fd).unwrap();
    quick.map().unwrap();
    slot.pull();
    scene.attachment.wait_for_interruption();
    quick.wait_for_interruption();
    for map in &scene.maps {
        assert_eq!(map.read(0), Err(Sigbus));
    }
    assert_eq!(scene.device.state(&scene.fd), State::Dead);
    assert_eq!(scene.device.state(&quick_fd), State::Dead);
    assert!(scene.attachment.is_mapped());
    assert!(!process::is_signalled_within(&scene.wanted, Duration::ZERO));
    scene.attachment.unmap().unwrap();
    scene.is_wanted();
    scene.is_dead();
    drop((quick, quick_fd, scene));
    slot.wait_until_empty();
    slot.plug();
    drop(Scene::new());
}

/// Of each buffer that drains the owner hears when that is over, not only once all are done.
#[test]
fn each_end_of_draining_signals_while_others_drain() {
    let (slot, _unproved) = slot();
    let scene = Scene::new();
    scene.attachment.hold(true);
    let fd = scene.device.export(BAR, &[(0, page_size())]).unwrap();
    let slow = Importer::open().attach(&fd).unwrap();
    slow.hold(true);
    slow.map().unwrap();
    let events = scene.device.events();
    slot.pull();
    scene.attachment.wait_for_interruption();
    slow.wait_for_interruption();
    assert_eq!(scene.device.state(&fd), State::Dead);
    assert_eq!(scene.device.buffer_flags(&fd), BUFFER_DRAINING);
    events.settle();
    slow.unmap().unwrap();
    events.until("the end of draining", || {
        scene.device.buffer_flags(&fd) == 0
    });
    assert!(scene.attachment.is_mapped());
    scene.attachment.unmap().unwrap();
    scene.is_wanted();
    scene.is_dead();
    drop((slow, fd, scene));
    slot.wait_until_empty();
    slot.plug();
}

/// Somebody else has the lease, and nobody the device.
#[test]
fn a_holder_sees_nothing_but_sigbus() {
    let (slot, _unproved) = slot();
    let device = Device::open(DEVICE);
    let wanted = process::eventfd();
    device.trigger(InterruptKind::Request, &wanted).unwrap();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let child = Child::start(&[fd.as_fd()], |link| {
        let map = Map::new(&fd, page_size()).unwrap();
        map.write(SELECT, 1).unwrap();
        link.send(1);
        link.expect(2);
        assert_eq!(map.read(0), Err(Sigbus));
        assert_eq!(Map::new(&fd, page_size()).map(drop), Err(ENODEV));
        link.send(3);
        link.expect(4);
        assert_eq!(map.read(0), Err(Sigbus));
    });
    child.link.expect(1);
    slot.pull();
    assert!(process::is_signalled_within(&wanted, LONG));
    child.link.send(2);
    child.link.expect(3);
    drop(device);
    slot.wait_until_empty();
    slot.plug();
    let again = Scene::new();
    again.maps[0].write(SELECT, 1).unwrap();
    child.link.send(4);
    child.join();
    assert_eq!(again.maps[0].read(SELECT), Ok(1));
}

#[test]
fn a_device_that_nobody_has_open_is_pulled_out() {
    let (slot, _unproved) = slot();
    let Scene {
        attachment,
        device,
        fd,
        maps,
        ..
    } = Scene::new();
    drop((device, maps));
    slot.pull();
    slot.wait_until_empty();
    assert_eq!(Map::new(&fd, page_size()).map(drop), Err(ENODEV));
    assert_eq!(attachment.map(), Err(ENODEV));
    slot.plug();
    drop(Scene::new());
}

#[test]
fn pulled_out_in_the_midst_of_everything() {
    for _ in 0..3 {
        let (slot, _unproved) = slot();
        let scene = Scene::new();
        let lost = AtomicU32::new(0);
        let touch = || {
            for map in &scene.maps {
                if map.write(2 * page_size(), 1) == Err(Sigbus) {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let lease = || {
            if let Ok(fd) = scene.device.export(BAR, &[(0, page_size())]) {
                let _ = Map::new(&fd, page_size()).map(|map| map.read(0));
                if let Ok(attachment) = Importer::open().attach(&fd) {
                    let _ = attachment.map();
                }
                let _ = scene.device.revoke(&fd);
            }
        };
        let decode = || {
            let mut bytes = [0; 2];
            let _ = scene.device.read(7, 4, &mut bytes);
            for command in [0_u16, 2] {
                let _ = scene.device.write(7, 4, &command.to_le_bytes());
            }
        };
        race::meanwhile(&[&touch, &lease, &decode], || {
            slot.pull();
            scene.is_wanted();
            lost.store(0, Ordering::Relaxed);
            wait::until("SIGBUS", || lost.load(Ordering::Relaxed) > 3);
        });
        assert_eq!(scene.device.state(&scene.fd), State::Dead);
        assert!(!scene.attachment.is_mapped());
        drop(scene);
        slot.wait_until_empty();
        slot.plug();
    }
}

/// Asked back, a device stays what it is until its user closes it, as with the stock driver.
#[test]
fn a_device_that_is_asked_back_is_leased_until_it_is_closed() {
    let (slot, _unproved) = slot();
    let scene = Scene::new();
    ask_back().unwrap();
    scene.is_wanted();
    assert_eq!(scene.device.state(&scene.fd), State::Ok);
    assert_eq!(observe::faults_of(|| scene.maps[0].touch_all().unwrap()), 0);
    assert!(scene.attachment.is_mapped());
    let Scene {
        attachment,
        device,
        fd,
        maps,
        ..
    } = scene;
    let lease = Map::new(&fd, page_size()).unwrap();
    lease.read(0).unwrap();
    drop((device, maps));
    assert_eq!(lease.read(0), Err(Sigbus));
    let status = attachment.status();
    assert_eq!((status.mapped, status.interruptions), (0, 1));
    slot.wait_until_empty();
    drop((attachment, lease, fd));
    slot.plug();
    drop(Scene::new());
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&[DEVICE]);
}
