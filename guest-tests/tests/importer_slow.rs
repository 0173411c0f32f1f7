//! Devices as lease holders: importers that take their time, and who waits for them.
#![cfg(barlease_guest)]

use std::{
    os::fd::{AsFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use barlease_abi::REASON_MEMORY_OFF;
use barlease_guest_tests::{
    errno::{Answer, ENODEV},
    importer::{Attachment, EDU, Importer, KernelLog, check_that_nothing_is_left},
    lease::{self, State},
    map::{How, Map, Sigbus},
    observe, page_size,
    pci::Function,
    process::Child,
    vfio::{CONFIG_REGION, Device},
    wait::{self, at_once, waits_for},
};

/// BAR2 of the memory device.
const BAR: u32 = 2;

/// A mapping of one range goes through the kernel's own helper, one of several through ours.
fn one() -> [(u64, u64); 1] {
    [(0, 2 * page_size())]
}

fn two() -> [(u64, u64); 2] {
    [
        (8 * page_size(), page_size()),
        (4 * page_size(), page_size()),
    ]
}

fn open() -> Device {
    Device::open("memory")
}

/// A lease that an importer has mapped that does not let go.
fn held(device: &Device, ranges: &[(u64, u64)]) -> (OwnedFd, Attachment) {
    let fd = device.export(BAR, ranges).expect("an export");
    let attachment = Importer::open().attach(&fd).expect("an attachment");
    attachment.hold(true);
    attachment.map().expect("a mapping");
    (fd, attachment)
}

#[test]
fn revoke_waits_for_a_slow_importer_warns_and_keeps_nobody_else_waiting() {
    let device = open();
    let (fd, slow) = held(&device, &two());
    lease::set_name(&fd, "the-slow-one").unwrap();
    let map = Map::new(&fd, 2 * page_size()).unwrap();
    map.touch_all().unwrap();
    let second = device.export(BAR, &one()).unwrap();
    let second_map = Map::new(&second, 2 * page_size()).unwrap();
    let third = device.export(BAR, &two()).unwrap();
    let quick = Importer::open().attach(&third).unwrap();
    quick.map().unwrap();
    let mut log = KernelLog::from_now();
    let started = Instant::now();

    let answer = waits_for(
        || device.revoke(&fd),
        || {
            slow.wait_for_interruption();
            assert_eq!(device.state(&fd), State::Dead);
            at_once("a touch of the buffer", || {
                assert_eq!(map.read(0), Err(Sigbus));
            });
            at_once("attach and map of the buffer", || {
                let answer = Importer::open().attach(&fd);
                assert_eq!(answer.unwrap_err(), ENODEV);
            });
            at_once("a fault of another", || second_map.touch_all().unwrap());
            at_once("an export", || {
                let fd = device.export(BAR, &two()).unwrap();
                Map::new(&fd, 2 * page_size()).unwrap().touch_all().unwrap();
                let attachment = Importer::open().attach(&fd).unwrap();
                attachment.map().unwrap();
                attachment.detach().unwrap();
            });
            at_once("REVOKE of another with an importer", || {
                device.revoke(&third).unwrap();
                assert!(!quick.is_mapped());
            });
            at_once("REVOKE of another without one", || {
                device.revoke(&second).unwrap();
            });
            at_once("mmap of the BAR", || {
                let map = How::shared().map(&device, u64::from(BAR) << 40, page_size());
                map.unwrap().touch_all().unwrap();
            });
            at_once("config space", || device.command());
            at_once("debugfs", || {
                assert!(observe::buffers(device.function()).len() >= 3);
            });
            at_once("the end of a buffer", || drop(second));
            assert!(slow.is_mapped());
            wait::until("a warning", || lines_of(&mut log, "the-slow-one"));
            let waited = started.elapsed();
            assert!(
                waited >= Duration::from_secs(10),
                "it came early: {waited:?}"
            );
            assert!(slow.is_mapped());
        },
        || slow.unmap().unwrap(),
    );
    assert_eq!(answer, Ok(()));
}

/// Whether there is a warning that names the device, the buffer and the importer.
fn lines_of(log: &mut KernelLog, name: &str) -> bool {
    let [device, importer] = ["memory", EDU].map(|name| Function::named(name).bdf);
    log.lines().iter().any(|line| {
        [device.as_str(), name, importer.as_str()]
            .iter()
            .all(|word| line.contains(word))
    })
}

/// Its name, and how it is brought about.
type Event = (&'static str, fn(&Device));

#[test]
fn every_event_waits_for_a_slow_importer() {
    let events: [Event; 4] = [
        ("memory off", |device| device.set_memory(false)),
        ("a reset by ioctl", |device| device.reset().unwrap()),
        ("a reset through sysfs", |device| {
            device.function().reset().unwrap()
        }),
        ("the same again", |device| device.set_memory(false)),
    ];
    for ((name, event), ranges) in events.into_iter().zip([&one()[..], &two(), &one(), &two()]) {
        let device = open();
        let (_fd, slow) = held(&device, ranges);
        println!("{name}");
        waits_for(
            || event(&device),
            || slow.wait_for_interruption(),
            || slow.unmap().unwrap(),
        );
        device.set_memory(true);
    }
}

#[test]
fn the_close_of_the_device_waits_for_a_slow_importer() {
    let device = open();
    let (_fd, slow) = held(&device, &two());
    waits_for(
        || drop(device),
        || slow.wait_for_interruption(),
        || slow.unmap().unwrap(),
    );
    assert_eq!(slow.map(), Err(ENODEV));
}

#[test]
fn an_event_costs_the_slowest_importer_and_not_the_sum() {
    let device = open();
    let (_fd1, first) = held(&device, &one());
    let (_fd2, second) = held(&device, &two());
    let fd3 = device.export(BAR, &one()).unwrap();
    let map3 = Map::new(&fd3, 2 * page_size()).unwrap();
    map3.touch_all().unwrap();
    waits_for(
        || device.set_memory(false),
        || {
            // Both are told, whoever is first, while none of them has let go.
            first.wait_for_interruption();
            second.wait_for_interruption();
            assert!(first.is_mapped() && second.is_mapped());
            // Neither memory nor time for anybody else.
            at_once("a touch of another buffer", || {
                assert_eq!(map3.read(0), Err(Sigbus));
            });
            at_once("an export", || device.export(BAR, &one()).unwrap());
            at_once("REVOKE of a buffer without importers", || {
                device.revoke(&fd3).unwrap();
            });
            second.unmap().unwrap();
        },
        || first.unmap().unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn an_event_does_not_wait_for_a_revocation_before_it_tells_the_others() {
    let device = open();
    let (fd1, first) = held(&device, &one());
    let (_fd2, second) = held(&device, &two());
    thread::scope(|scope| {
        let revoke = scope.spawn(|| device.revoke(&fd1));
        first.wait_for_interruption();
        waits_for(
            || device.set_memory(false),
            || {
                second.wait_for_interruption();
                assert!(first.is_mapped() && !revoke.is_finished());
                second.unmap().unwrap();
            },
            // The event waits for all importers, those of a revocation too.
            || first.unmap().unwrap(),
        );
        assert_eq!(revoke.join().unwrap(), Ok(()));
    });
    device.set_memory(true);
}

#[test]
fn revoke_of_a_revoked_buffer_does_not_wait_a_second_time() {
    let device = open();
    let (fd, slow) = held(&device, &two());
    waits_for(
        || device.set_memory(false),
        || slow.wait_for_interruption(),
        || slow.unmap().unwrap(),
    );
    assert_eq!(device.state(&fd), State::Revoked(REASON_MEMORY_OFF));
    at_once("REVOKE", || device.revoke(&fd).unwrap());
    assert_eq!(slow.status().invalidations, 1);
    device.set_memory(true);
    assert_eq!(device.state(&fd), State::Dead);
    assert_eq!(slow.map(), Err(ENODEV));
}

#[test]
fn revoke_during_an_event_waits_for_the_same_importer_and_no_longer() {
    let device = open();
    let (fd, slow) = held(&device, &two());
    thread::scope(|scope| {
        let event = scope.spawn(|| device.set_memory(false));
        waits_for(
            || device.revoke(&fd),
            || {
                slow.wait_for_interruption();
                assert!(!event.is_finished());
            },
            || slow.unmap().unwrap(),
        )
        .unwrap();
    });
    device.set_memory(true);
}

#[test]
fn the_death_of_the_importing_process_lets_go() {
    let device = open();
    drop(Importer::open());
    let fd = device.export(BAR, &two()).unwrap();
    let child = Child::start(&[fd.as_fd()], |link| {
        let attachment = Importer::open().attach(&fd).unwrap();
        attachment.hold(true);
        attachment.fence().unwrap();
        attachment.map().unwrap();
        link.send(1);
        let _ = link.receive();
    });
    child.link.expect(1);
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 1);
    let answer = waits_for(|| device.revoke(&fd), || {}, || drop(child));
    assert_eq!(answer, Ok(()));
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
}

#[test]
fn the_revoking_process_can_be_killed_out_of_its_wait_and_the_buffer_is_dead() {
    let device = open();
    let (fd, slow) = held(&device, &one());
    let child = Child::start(&[device.as_fd(), fd.as_fd()], |_| {
        device.revoke(&fd).unwrap();
    });
    slow.wait_for_interruption();
    at_once("the end of the process", || drop(child));
    assert_eq!(device.state(&fd), State::Dead);
    assert!(slow.is_mapped());
    // An event waits for what the revocation has left.
    waits_for(
        || device.set_memory(false),
        || assert!(slow.is_mapped()),
        || slow.unmap().unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn closing_the_importer_lets_go() {
    let device = open();
    let (fd, slow) = held(&device, &two());
    waits_for(
        || device.revoke(&fd),
        || wait::until("a dead lease", || device.state(&fd) == State::Dead),
        || drop(slow),
    )
    .unwrap();
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
}

#[test]
fn unbinding_the_importing_device_lets_go() {
    let device = open();
    let (fd, slow) = held(&device, &two());
    waits_for(
        || device.revoke(&fd),
        || slow.wait_for_interruption(),
        || Function::named(EDU).unbind(),
    )
    .unwrap();
}

// ---- Fences -------------------------------------------------------------------------------------

#[test]
fn revoke_waits_for_a_fence_that_signals_late() {
    let device = open();
    let fd = device.export(BAR, &two()).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    attachment.fence().unwrap();
    let answer = waits_for(
        || device.revoke(&fd),
        || {
            attachment.wait_for_interruption();
            assert!(!attachment.is_mapped());
            assert_eq!(device.state(&fd), State::Dead);
        },
        || attachment.signal().unwrap(),
    );
    assert_eq!(answer, Ok(()));
}

#[test]
fn an_event_waits_for_the_latest_of_fences_and_mappings() {
    let device = open();
    let (fd, slow) = held(&device, &one());
    slow.fence().unwrap();
    waits_for(
        || device.set_memory(false),
        || {
            slow.wait_for_interruption();
            slow.unmap().unwrap();
        },
        || slow.signal().unwrap(),
    );
    device.set_memory(true);
    slow.map().unwrap();
    slow.fence().unwrap();
    waits_for(
        || device.set_memory(false),
        || {
            wait::until("the event", || device.state(&fd) != State::Ok);
            slow.signal().unwrap();
        },
        || slow.unmap().unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn an_event_does_not_wait_for_a_fence_of_one_revocation_before_it_tells_the_others() {
    let device = open();
    let fd1 = device.export(BAR, &one()).unwrap();
    let first = Importer::open().attach(&fd1).unwrap();
    first.map().unwrap();
    first.fence().unwrap();
    let (_fd2, second) = held(&device, &two());
    thread::scope(|scope| {
        scope.spawn(|| device.revoke(&fd1).unwrap());
        first.wait_for_interruption();
        scope.spawn(|| device.set_memory(false));
        // Told although the fence of the first is still pending.
        let told = std::panic::catch_unwind(|| second.wait_for_interruption());
        first.signal().unwrap();
        second.unmap().unwrap();
        assert!(told.is_ok());
    });
    device.set_memory(true);
}

#[test]
fn a_signalled_fence_is_not_waited_for() {
    let device = open();
    let fd = device.export(BAR, &one()).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    for _ in 0..100 {
        attachment.fence().unwrap();
        attachment.signal().unwrap();
    }
    attachment.map().unwrap();
    at_once("REVOKE", || device.revoke(&fd).unwrap());
}

// ---- Nothing is waited for that need not be -----------------------------------------------------

#[test]
fn other_config_writes_do_not_wait_for_importers() {
    let device = open();
    let (_fd, slow) = held(&device, &one());
    at_once("a write to the latency timer", || {
        let _: Answer<usize> = device.write(CONFIG_REGION, 0x0d, &[0]);
    });
    assert_eq!(slow.status().invalidations, 0);
    slow.unmap().unwrap();
}

#[test]
fn another_device_does_not_wait() {
    let device = open();
    let other = Device::open("display");
    let fd = other.export(0, &two()).unwrap();
    let (_fd, slow) = held(&device, &one());
    waits_for(
        || device.set_memory(false),
        || {
            slow.wait_for_interruption();
            at_once("memory off of another device", || other.set_memory(false));
            at_once("memory on of another device", || other.set_memory(true));
            at_once("REVOKE on another device", || other.revoke(&fd).unwrap());
        },
        || slow.unmap().unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "display"]);
}
