//! EVENTS: an eventfd that says that the list of buffers, or a state in it, is another now.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    panic::{self, AssertUnwindSafe},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use barlease_abi::{
    BUFFER_DRAINING, FEATURE_EVENTS, REASON_LOW_POWER, REASON_MEMORY_OFF, STATE_OK, STATE_REVOKED,
};
use barlease_guest_tests::{
    buffers::{Events, id_of},
    errno::{EBADF, EFAULT, EINVAL},
    importer::{Importer, check_that_nothing_is_left},
    lease::{self, State, no_such_fd},
    map::{How, Map},
    page_size,
    pci::{BARLEASE, Function},
    process::{self, Child},
    race,
    vfio::{Device, GET, Group, LOW_POWER_ENTRY, LOW_POWER_EXIT, PROBE, SET},
    wait::{self, A_WHILE, at_once, waits_for},
};

/// BAR2 of the memory device.
const BAR: u32 = 2;
const FEATURE: u32 = SET | FEATURE_EVENTS as u32;

fn open() -> Device {
    Device::open("memory")
}

fn export(device: &Device) -> OwnedFd {
    device.export(BAR, &[(0, page_size())]).expect("an export")
}

/// Has something happen, and waits for the event.
fn signals<R>(events: &Events, what: &str, act: impl FnOnce() -> R) -> R {
    println!("{what}");
    events.settle();
    let result = act();
    events.expect(what);
    result
}

fn low_power(device: &Device, feature: u32) {
    device.feature(SET | feature, &mut []).expect("low power");
}

// ---- The request --------------------------------------------------------------------------------

#[test]
fn a_probe_is_truthful() {
    let device = open();
    assert_eq!(device.probe(FEATURE_EVENTS, SET), Ok(()));
    assert_eq!(device.probe(FEATURE_EVENTS, GET), Err(EINVAL));
    let get = GET | u32::from(FEATURE_EVENTS);
    assert_eq!(device.feature(get, &mut [0; 8]), Err(EINVAL));
    assert_eq!(device.feature(get | PROBE, &mut [0; 8]), Err(EINVAL));
}

#[test]
fn what_is_no_eventfd_is_refused_and_changes_nothing() {
    let device = open();
    let events = device.events();
    let lease = export(&device);
    let null = File::open("/dev/null").unwrap();
    let good = process::eventfd();
    for fd in [null.as_fd(), lease.as_fd(), device.as_fd()] {
        assert_eq!(device.events_number(fd.as_raw_fd(), 0), Err(EINVAL));
    }
    for number in [no_such_fd(), -2, i32::MIN, i32::MAX] {
        assert_eq!(device.events_number(number, 0), Err(EBADF), "{number}");
    }
    for reserved in [1, u32::MAX] {
        for number in [good.as_raw_fd(), -1, no_such_fd(), null.as_raw_fd()] {
            assert_eq!(device.events_number(number, reserved), Err(EINVAL));
        }
    }
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&good.as_raw_fd().to_ne_bytes());
    for argsz in 0..16 {
        let answer = device.feature_sized(FEATURE, &mut payload, argsz);
        assert_eq!(answer, Err(EINVAL), "argsz {argsz}");
    }
    for readable in [0, 4, 7] {
        let answer = device.feature_at_edge(FEATURE, &payload[..readable], 8);
        assert_eq!(answer, Err(EFAULT));
    }
    signals(&events, "memory off", || device.set_memory(false));
    signals(&events, "memory on", || device.set_memory(true));
    assert!(!process::is_signalled_within(&good, A_WHILE));
    assert_eq!(device.feature_read_only(FEATURE, &payload), Ok(0));
    signals(&Events(good), "memory off", || device.set_memory(false));
    device.set_memory(true);
}

#[test]
fn a_new_eventfd_replaces_the_old_one_and_none_ends_it() {
    let device = open();
    let _fd = export(&device);
    let old = device.events();
    signals(&old, "memory off", || device.set_memory(false));
    let new = device.events();
    old.settle();
    signals(&new, "memory on", || device.set_memory(true));
    old.expect_none("what is another's");
    assert_eq!(device.events_number(-1, 0), Ok(()));
    new.settle();
    device.set_memory(false);
    device.set_memory(true);
    new.expect_none("what is nobody's");
    assert_eq!(device.events_number(-1, 0), Ok(()));
    device.events_number(old.0.as_raw_fd(), 0).unwrap();
    device.events_number(old.0.as_raw_fd(), 0).unwrap();
    signals(&old, "memory off", || device.set_memory(false));
    device.set_memory(true);
}

#[test]
fn an_eventfd_whose_fds_are_closed_is_no_harm() {
    let device = open();
    let fd = export(&device);
    drop(device.events());
    device.set_memory(false);
    device.set_memory(true);
    device.revoke(&fd).unwrap();
    drop(device.events());
}

// ---- Changes that signal ------------------------------------------------------------------------

#[test]
fn every_change_of_a_buffer_signals() {
    let device = open();
    let events = device.events();
    let fd = export(&device);
    let is = |state: State| assert_eq!(device.state(&fd), state);
    signals(&events, "memory off", || device.set_memory(false));
    is(State::Revoked(REASON_MEMORY_OFF));
    signals(&events, "low power", || low_power(&device, LOW_POWER_ENTRY));
    is(State::Revoked(REASON_MEMORY_OFF | REASON_LOW_POWER));
    signals(&events, "its end", || low_power(&device, LOW_POWER_EXIT));
    is(State::Revoked(REASON_MEMORY_OFF));
    signals(&events, "memory on", || device.set_memory(true));
    is(State::Ok);
    signals(&events, "a reset by ioctl", || device.reset().unwrap());
    let function = device.function();
    signals(&events, "a reset through sysfs", || {
        function.reset().unwrap()
    });
    is(State::Ok);
    let second = export(&device);
    signals(&events, "REVOKE", || device.revoke(&fd).unwrap());
    is(State::Dead);
    signals(&events, "REVOKE_ID", || {
        device.revoke_id(id_of(&second)).unwrap()
    });
    let third = export(&device);
    let id = id_of(&third);
    signals(&events, "REVOKE_ID without a wait", || {
        device.revoke_nowait(id).unwrap();
    });
}

#[test]
fn the_power_state_of_a_device_signals() {
    let device = Device::open("nvme");
    // An NVMe controller's memory buffer is there once it is switched on.
    device.write32(0, 0x50, 1);
    let fd = export(&device);
    let events = device.events();
    signals(&events, "D3hot", || device.set_power_state(3));
    assert_eq!(device.state(&fd), State::Revoked(REASON_LOW_POWER));
    signals(&events, "D0", || device.set_power_state(0));
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn a_hot_reset_signals_to_who_has_the_other_function() {
    let functions = ["pair0", "pair1"].map(Function::named);
    functions
        .iter()
        .for_each(|function| function.bind(BARLEASE));
    let group = Group::open(&functions[0]);
    let [first, second] = functions.map(|function| group.device(&function).unwrap());
    let all = [first.events(), second.events()];
    let _fds = [export(&first), export(&second)];
    all.iter().for_each(Events::settle);
    first.hot_reset(&[&group]).unwrap();
    all.iter().for_each(|events| events.expect("a hot reset"));
}

#[test]
fn the_memory_of_a_device_without_leases_signals() {
    let device = open();
    let events = device.events();
    assert_eq!(device.records(), []);
    signals(&events, "memory off", || device.set_memory(false));
    signals(&events, "memory on", || device.set_memory(true));
    signals(&events, "low power", || low_power(&device, LOW_POWER_ENTRY));
    signals(&events, "its end", || low_power(&device, LOW_POWER_EXIT));
    signals(&events, "a reset", || device.reset().unwrap());
    let function = device.function();
    signals(&events, "a reset through sysfs", || {
        function.reset().unwrap()
    });
}

#[test]
fn the_end_of_a_buffer_signals_once_it_has_disappeared() {
    let device = open();
    let events = device.events();
    let end = |what: &str, id: u64, act: &mut dyn FnMut()| {
        events.settle();
        act();
        events.until(what, || device.find_record(id).is_none());
    };
    let fd = export(&device);
    let id = id_of(&fd);
    let copy = lease::duplicate(&fd);
    drop(fd);
    let mut copy = Some(copy);
    end("close", id, &mut || drop(copy.take()));
    let fd = export(&device);
    let id = id_of(&fd);
    let mut map = Map::new(fd, page_size()).ok();
    assert!(map.is_some());
    end("munmap", id, &mut || drop(map.take()));
    let fd = export(&device);
    let id = id_of(&fd);
    let mut attachment = Importer::open().attach(fd).ok();
    assert!(attachment.is_some());
    end("detach", id, &mut || drop(attachment.take()));
    let fd = export(&device);
    let id = id_of(&fd);
    let mut child = Some(Child::start(&[fd.as_fd()], |link| link.expect(1)));
    drop(fd);
    end("the holder's end", id, &mut || drop(child.take()));
    // A dead one, too.
    let fd = export(&device);
    let id = id_of(&fd);
    device.revoke(&fd).unwrap();
    let mut fd = Some(fd);
    end("close of a dead one", id, &mut || drop(fd.take()));
    // And a mapping of the BAR.
    let at = u64::from(BAR) << 40;
    let mut map = How::shared().map(&device, at, page_size()).ok();
    let id = device.records().first().expect("an internal buffer").id;
    end("munmap of the BAR", id, &mut || drop(map.take()));
}

#[test]
fn what_waits_for_an_importer_signals_before_and_after() {
    let device = open();
    let fd = export(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.hold(true);
    attachment.map().unwrap();
    let events = device.events();
    waits_for(
        || device.set_memory(false),
        || {
            events.until("an end of access", || device.state(&fd) != State::Ok);
            events.settle();
        },
        || attachment.unmap().unwrap(),
    );
    device.set_memory(true);
    events.settle();
    attachment.map().unwrap();
    waits_for(
        || device.revoke(&fd).unwrap(),
        || {
            events.until("a dead buffer", || device.state(&fd) == State::Dead);
            events.settle();
        },
        || {
            attachment.unmap().unwrap();
            events.until("the end of draining", || device.buffer_flags(&fd) == 0);
        },
    );
}

#[test]
fn the_end_of_a_fence_signals() {
    let device = open();
    let fd = export(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    attachment.fence().unwrap();
    let events = device.events();
    let answer = waits_for(
        || device.revoke(&fd),
        || {
            attachment.wait_for_interruption();
            events.settle();
            assert_eq!(device.buffer_flags(&fd), BUFFER_DRAINING);
        },
        || {
            attachment.signal().unwrap();
            events.until("the end of draining", || device.buffer_flags(&fd) == 0);
        },
    );
    assert_eq!(answer, Ok(()));
}

#[test]
fn revoke_signals_before_it_can_tell_an_importer() {
    let device = open();
    let fd = export(&device);
    let attachment = Importer::open().attach(&fd).unwrap();
    let events = device.events();
    thread::scope(|scope| {
        let revoking = attachment.occupied(|| {
            let revoking = scope.spawn(|| device.revoke(&fd));
            events.until("a dead buffer", || device.state(&fd) == State::Dead);
            assert!(!revoking.is_finished());
            revoking
        });
        assert_eq!(revoking.join().unwrap(), Ok(()));
    });
}

#[test]
fn nothing_that_changes_is_missed_by_who_looks_after_each_signal_only() {
    const ROUNDS: u32 = 100;
    let device = open();
    let fd = export(&device);
    let events = device.events();
    let seen = AtomicU32::new(u32::MAX);
    let over = AtomicU32::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while over.load(Ordering::SeqCst) == 0 {
                if process::is_signalled_within(&events.0, A_WHILE) && events.taken() > 0 {
                    seen.store(device.record(&fd).state, Ordering::SeqCst);
                }
            }
        });
        let result = panic::catch_unwind(AssertUnwindSafe(|| {
            for round in 0..ROUNDS {
                for (on, state) in [(false, STATE_REVOKED), (true, STATE_OK)] {
                    device.set_memory(on);
                    let what = format!("round {round}, memory {on}");
                    wait::until(&what, || seen.load(Ordering::SeqCst) == state);
                }
            }
        }));
        over.store(1, Ordering::SeqCst);
        if let Err(panic) = result {
            panic::resume_unwind(panic);
        }
    });
}

#[test]
fn other_devices_signal_nothing() {
    let device = open();
    let other = Device::open("display");
    let fd = other.export(0, &[(0, page_size())]).unwrap();
    let events = device.events();
    events.settle();
    other.set_memory(false);
    other.set_memory(true);
    other.revoke(&fd).unwrap();
    drop(fd);
    events.expect_none("what is another device's");
}

// ---- The eventfd --------------------------------------------------------------------------------

#[test]
fn a_counter_at_its_end_blocks_nobody() {
    let device = open();
    for blocking in [false, true] {
        let fd = export(&device);
        let events = device.events();
        process::set_blocking(&events.0, blocking);
        // The most that it takes: one more would block who adds it.
        let mut file = File::from(lease::duplicate(&events.0));
        if process::is_signalled_within(&events.0, A_WHILE) {
            let _ = events.taken();
        }
        file.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        at_once("memory off", || device.set_memory(false));
        at_once("memory on", || device.set_memory(true));
        at_once("a reset", || device.reset().unwrap());
        at_once("an export and its end", || drop(export(&device)));
        at_once("REVOKE", || device.revoke(&fd).unwrap());
        assert!(events.taken() >= u64::MAX - 1);
        process::set_blocking(&events.0, false);
        signals(&events, "memory off", || device.set_memory(false));
        signals(&events, "memory on", || device.set_memory(true));
    }
}

#[test]
fn a_process_that_has_the_device_too_replaces_the_eventfd() {
    let device = open();
    let events = device.events();
    let theirs = process::eventfd();
    let child = Child::start(&[device.as_fd(), theirs.as_fd()], |link| {
        device.events_number(theirs.as_raw_fd(), 0).unwrap();
        link.send(1);
        link.expect(2);
    });
    child.link.expect(1);
    events.settle();
    let theirs = Events(theirs);
    signals(&theirs, "memory off", || device.set_memory(false));
    events.expect_none("what is another's");
    // It is of the open, not of the process.
    child.link.send(2);
    child.join();
    signals(&theirs, "memory on", || device.set_memory(true));
}

#[test]
fn it_ends_with_the_open() {
    let device = open();
    let fd = export(&device);
    let events = device.events();
    let copy = lease::duplicate(&device);
    drop(device);
    // Not with an fd of several.
    events.settle();
    let function = Function::named("memory");
    signals(&events, "a reset through sysfs", || {
        function.reset().unwrap()
    });
    drop(copy);
    events.settle();
    let device = open();
    let now = export(&device);
    device.set_memory(false);
    device.set_memory(true);
    device.revoke(&now).unwrap();
    drop((now, fd));
    events.expect_none("what is of a later open");
    let events = device.events();
    signals(&events, "memory off", || device.set_memory(false));
    device.set_memory(true);
}

#[test]
fn eventfds_that_come_and_go_while_everything_changes() {
    let device = open();
    let set = || drop(device.events());
    let unset = || device.events_number(-1, 0).unwrap();
    let memory = || {
        device.set_memory(false);
        device.set_memory(true);
    };
    let lease = || {
        let fd = export(&device);
        race::whatever(device.revoke_nowait(id_of(&fd)));
    };
    let reset = || race::whatever(device.reset());
    race::meanwhile(&[&set, &unset, &lease, &reset, &lease, &set], || {
        (0..60).for_each(|_| memory());
    });
    let events = device.events();
    signals(&events, "memory off", || device.set_memory(false));
    device.set_memory(true);
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "display", "nvme", "pair0", "pair1"]);
}
