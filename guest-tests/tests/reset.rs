//! Resets of every kind: what is leased is REVOKED from before until after, and then what it was.
#![cfg(barlease_guest)]

use std::{
    os::fd::OwnedFd,
    sync::atomic::{AtomicU32, Ordering},
};

use barlease_abi::{REASON_LOW_POWER, REASON_MEMORY_OFF, REASON_RESET};
use barlease_guest_tests::{
    errno::EINVAL,
    huge_size,
    lease::State,
    map::{How, Map, Sigbus},
    observe, page_size,
    pci::{BARLEASE, Function, STOCK},
    race,
    vfio::{Device, Group, LOW_POWER_ENTRY, LOW_POWER_EXIT, SET},
    wait,
};

/// All of them have their memory in BAR2.
const BAR: u32 = 2;

/// A lease of 4 MiB and its mapping, and a mapping of the same through the device fd.
struct Leased {
    fd: OwnedFd,
    lease: Map,
    bar: Map,
}

fn lease(device: &Device) -> Leased {
    let fd = device
        .export(BAR, &[(huge_size(), 2 * huge_size())])
        .unwrap();
    let lease = Map::aligned(&fd, 2 * huge_size()).unwrap();
    let offset = u64::from(BAR) << 40 | huge_size();
    let bar = How::shared().map(device, offset, 2 * huge_size()).unwrap();
    lease.touch_all().unwrap();
    bar.touch_all().unwrap();
    Leased { fd, lease, bar }
}

fn open(name: &str) -> (Device, Leased) {
    let device = Device::open(name);
    if name == "nvme" {
        // The controller memory buffer is there once it is switched on.
        device.write32(0, 0x50, 1);
    }
    let leased = lease(&device);
    (device, leased)
}

impl Leased {
    /// Checks that state and touches agree.
    fn is(&self, device: &Device, expected: State) {
        assert_eq!(device.state(&self.fd), expected);
        for map in [&self.lease, &self.bar] {
            let touches = [map.read(0).map(drop), map.write(2 * huge_size() - 4, 3)];
            for touch in touches {
                let expected = if expected == State::Ok {
                    Ok(())
                } else {
                    Err(Sigbus)
                };
                assert_eq!(touch, expected);
            }
        }
    }

    /// Whether touching it costs a fault: it was taken away.
    fn was_taken_away(&self) -> bool {
        let taken = |map: &Map| observe::faults_of(|| map.touch_all().unwrap()) > 0;
        let lease = taken(&self.lease);
        taken(&self.bar) && lease
    }
}

/// The pattern in the memory of ivshmem, which a reset leaves alone.
const MAGIC: u32 = 0x3a61_c001;

/// Runs `reset` and meanwhile touches and asks: both must see the reset. A touch that comes through
/// must reach the device: in reset it does not answer, and something else is read.
fn is_seen_by_everybody(device: &Device, leased: &Leased, reset: impl Fn()) {
    let [lease, bar, reasons] = [0; 3].map(AtomicU32::new);
    // The memory buffer of NVMe is off after a reset.
    let keeps_memory = device.function() != &Function::named("nvme");
    leased.lease.write(page_size(), MAGIC).unwrap();
    let touch = |map: &Map, lost: &AtomicU32| match map.read(page_size()) {
        Ok(seen) if keeps_memory => assert_eq!(seen, MAGIC, "a touch reached the device in reset"),
        Ok(_) => {}
        Err(Sigbus) => drop(lost.fetch_add(1, Ordering::Relaxed)),
    };
    let ask = || {
        if let State::Revoked(now) = device.state(&leased.fd) {
            reasons.fetch_or(now, Ordering::Relaxed);
        }
    };
    // A reset can be over before a slow toucher's turn comes: then there is another.
    wait::until(
        "a touch of lease and BAR, and a question, in a reset",
        || {
            race::meanwhile(
                &[
                    &|| touch(&leased.lease, &lease),
                    &|| touch(&leased.bar, &bar),
                    &ask,
                ],
                &reset,
            );
            [&lease, &bar, &reasons].map(|seen| seen.load(Ordering::Relaxed) != 0) == [true; 3]
        },
    );
    assert_eq!(reasons.into_inner() & REASON_RESET, REASON_RESET);
}

/// Function-level reset by config space: bit 15 of Device Control.
fn function_level_reset(device: &Device) {
    let control = device.capability(0x10).expect("PCI Express") + 8;
    let [low, high]: [u8; 2] = device.config(control);
    device.set_config(control, &[low, high | 0x80]);
}

// ---- VFIO_DEVICE_RESET --------------------------------------------------------------------------

#[test]
fn vfio_reset_takes_away_and_gives_back() {
    for name in ["memory", "nvme"] {
        let (device, leased) = open(name);
        device.reset().unwrap();
        if name == "nvme" {
            device.write32(0, 0x50, 1);
        }
        assert!(leased.was_taken_away(), "{name}");
        leased.is(&device, State::Ok);
    }
}

#[test]
fn vfio_reset_is_seen_by_who_touches_meanwhile() {
    let (device, leased) = open("memory");
    leased.lease.write(2 * page_size(), 0x1234).unwrap();
    is_seen_by_everybody(&device, &leased, || device.reset().unwrap());
    leased.is(&device, State::Ok);
    assert_eq!(leased.lease.read(2 * page_size()), Ok(0x1234));
}

#[test]
fn vfio_reset_with_memory_off_gives_nothing_back() {
    let (device, leased) = open("memory");
    device.set_memory(false);
    device.reset().unwrap();
    leased.is(&device, State::Revoked(REASON_MEMORY_OFF));
    device.set_memory(true);
    leased.is(&device, State::Ok);
}

#[test]
fn vfio_reset_in_d3hot_wakes_the_device() {
    let (device, leased) = open("nvme");
    device.set_power_state(3);
    device.reset().unwrap();
    assert_eq!(device.function().power_state(), "D0");
    leased.is(&device, State::Ok);
}

#[test]
fn vfio_reset_in_low_power_gives_nothing_back() {
    let (device, leased) = open("nvme");
    device.feature(SET | LOW_POWER_ENTRY, &mut []).unwrap();
    device.reset().unwrap();
    leased.is(&device, State::Revoked(REASON_LOW_POWER));
    device.feature(SET | LOW_POWER_EXIT, &mut []).unwrap();
    leased.is(&device, State::Ok);
}

#[test]
fn vfio_reset_of_igb_takes_its_registers_away() {
    let device = Device::open("igb");
    let fd = device.export(0, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    map.read(8).unwrap();
    device.reset().unwrap();
    assert_eq!(observe::faults_of(|| map.touch_all().unwrap()), 1);
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn a_reset_that_the_device_cannot_do_changes_nothing() {
    let device = Device::open("display");
    assert!(!device.function().can_reset());
    let fd = device.export(0, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    assert_eq!(device.reset(), Err(EINVAL));
    map.read(0).unwrap();
    assert_eq!(device.state(&fd), State::Ok);
}

// ---- Function-level reset through config space --------------------------------------------------

#[test]
fn a_function_level_reset_takes_away_and_gives_back() {
    let (device, leased) = open("nvme");
    function_level_reset(&device);
    device.write32(0, 0x50, 1);
    assert!(leased.was_taken_away());
    leased.is(&device, State::Ok);
}

#[test]
fn a_function_level_reset_is_seen_by_who_touches_meanwhile() {
    let (device, leased) = open("nvme");
    is_seen_by_everybody(&device, &leased, || function_level_reset(&device));
    leased.is(&device, State::Ok);
}

#[test]
fn a_function_level_reset_of_igb_takes_its_registers_away() {
    let device = Device::open("igb");
    let fd = device.export(0, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    map.read(8).unwrap();
    function_level_reset(&device);
    assert_eq!(observe::faults_of(|| map.touch_all().unwrap()), 1);
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn a_function_level_reset_with_memory_off_gives_nothing_back() {
    let (device, leased) = open("nvme");
    device.set_memory(false);
    function_level_reset(&device);
    leased.is(&device, State::Revoked(REASON_MEMORY_OFF));
    device.set_memory(true);
    leased.is(&device, State::Ok);
}

// ---- Through sysfs ------------------------------------------------------------------------------

#[test]
fn a_sysfs_reset_takes_away_and_gives_back() {
    for name in ["memory", "nvme"] {
        let (device, leased) = open(name);
        leased.lease.write(page_size(), 77).unwrap();
        device.function().reset().unwrap();
        if name == "nvme" {
            device.write32(0, 0x50, 1);
        }
        assert!(leased.was_taken_away(), "{name}");
        leased.is(&device, State::Ok);
        if name == "memory" {
            assert_eq!(leased.lease.read(page_size()), Ok(77));
        }
    }
}

#[test]
fn a_sysfs_reset_is_seen_by_who_touches_meanwhile() {
    for name in ["memory", "nvme"] {
        let (device, leased) = open(name);
        is_seen_by_everybody(&device, &leased, || device.function().reset().unwrap());
        leased.is(&device, State::Ok);
    }
}

#[test]
fn a_sysfs_reset_with_memory_off_gives_nothing_back() {
    let (device, leased) = open("memory");
    device.set_memory(false);
    device.function().reset().unwrap();
    leased.is(&device, State::Revoked(REASON_MEMORY_OFF));
    device.set_memory(true);
    leased.is(&device, State::Ok);
}

#[test]
fn a_sysfs_reset_in_d3hot_wakes_the_device() {
    let (device, leased) = open("nvme");
    device.set_power_state(3);
    leased.is(&device, State::Revoked(REASON_LOW_POWER));
    device.function().reset().unwrap();
    assert_eq!(device.function().power_state(), "D0");
    // Before anything that goes through the device fd and might notice it there.
    assert!(leased.lease.read(0).is_ok());
    leased.is(&device, State::Ok);
}

#[test]
fn a_sysfs_reset_in_low_power_gives_nothing_back() {
    let (device, leased) = open("nvme");
    device.feature(SET | LOW_POWER_ENTRY, &mut []).unwrap();
    device.function().reset().unwrap();
    leased.is(&device, State::Revoked(REASON_LOW_POWER));
    device.feature(SET | LOW_POWER_EXIT, &mut []).unwrap();
    leased.is(&device, State::Ok);
}

#[test]
fn a_sysfs_reset_of_a_device_that_is_not_open_is_no_harm() {
    let function = Function::named("memory");
    function.bind(BARLEASE);
    function.reset().unwrap();
    let (device, leased) = open("memory");
    leased.is(&device, State::Ok);
    drop(device);
    // The mapping through the device fd keeps it open.
    assert!(leased.bar.read(0).is_ok());
    drop(leased.bar);
    function.reset().unwrap();
    assert_eq!(leased.lease.read(0), Err(Sigbus));
}

#[test]
fn a_buffer_exported_during_a_reset_is_ok_after_it() {
    let (device, leased) = open("memory");
    let exported = AtomicU32::new(0);
    let export = || {
        let fd = device.export(BAR, &[(0, page_size())]).unwrap();
        let map = Map::new(&fd, page_size()).unwrap();
        if device.state(&fd) == State::Revoked(REASON_RESET) {
            exported.fetch_add(1, Ordering::Relaxed);
        }
        let _ = map.read(0);
        // A BAR is mapped meanwhile as with stock.
        let bar = How::shared()
            .map(&device, u64::from(BAR) << 40, page_size())
            .unwrap();
        let _ = bar.read(0);
    };
    // A reset can be over before an export's turn comes: then there is another.
    wait::until("a buffer born in a reset", || {
        race::meanwhile(&[&export], || device.function().reset().unwrap());
        exported.load(Ordering::Relaxed) > 0
    });
    leased.is(&device, State::Ok);
}

#[test]
fn revoke_during_a_reset_is_for_good() {
    let (device, leased) = open("memory");
    let fds: Vec<_> = (0..200)
        .map(|page| {
            device
                .export(BAR, &[(page * page_size(), page_size())])
                .unwrap()
        })
        .collect();
    let reset = || device.function().reset().unwrap();
    race::meanwhile(&[&reset], || {
        for fd in &fds {
            device.revoke(fd).unwrap();
            assert_eq!(device.state(fd), State::Dead);
        }
    });
    for fd in &fds {
        assert_eq!(device.state(fd), State::Dead);
    }
    leased.is(&device, State::Ok);
}

// ---- Hot reset ----------------------------------------------------------------------------------

fn pair() -> [Function; 2] {
    ["pair0", "pair1"].map(Function::named)
}

fn open_pair() -> ([Device; 2], [Leased; 2]) {
    let functions = pair();
    functions
        .iter()
        .for_each(|function| function.bind(BARLEASE));
    let group = Group::open(&functions[0]);
    let devices = functions.map(|function| group.device(&function).unwrap());
    let leases = [lease(&devices[0]), lease(&devices[1])];
    (devices, leases)
}

#[test]
fn a_hot_reset_takes_from_every_function_of_the_set() {
    let (devices, leases) = open_pair();
    assert_eq!(devices[0].hot_reset_info().unwrap().len(), 2);
    leases[1].lease.write(page_size(), 0xcafe).unwrap();
    devices[0].hot_reset(&[devices[0].group()]).unwrap();
    for (device, leased) in devices.iter().zip(&leases) {
        assert!(leased.was_taken_away());
        leased.is(device, State::Ok);
    }
    assert_eq!(leases[1].lease.read(page_size()), Ok(0xcafe));
}

#[test]
fn a_hot_reset_is_seen_by_who_touches_the_other_function() {
    let (devices, leases) = open_pair();
    is_seen_by_everybody(&devices[1], &leases[1], || {
        devices[0].hot_reset(&[devices[0].group()]).unwrap();
    });
    leases[0].is(&devices[0], State::Ok);
    leases[1].is(&devices[1], State::Ok);
}

#[test]
fn a_hot_reset_gives_back_to_each_function_what_it_had() {
    let (devices, leases) = open_pair();
    devices[1].set_memory(false);
    devices[0].hot_reset(&[devices[0].group()]).unwrap();
    leases[0].is(&devices[0], State::Ok);
    leases[1].is(&devices[1], State::Revoked(REASON_MEMORY_OFF));
    devices[1].set_memory(true);
    leases[1].is(&devices[1], State::Ok);
}

/// With the stock driver they are lost: what run-time power management saves when a function falls
/// asleep in the middle of the reset is what is restored after it.
#[test]
fn functions_that_fall_asleep_in_a_bus_reset_keep_their_bars() {
    let (devices, leases) = open_pair();
    leases[1].lease.write(page_size(), 0xcafe).unwrap();
    let bars = || {
        devices
            .each_ref()
            .map(|device| device.function().config()[0x10..0x28].to_vec())
    };
    let before = bars();
    let port = devices[0].function().port();
    let sleeps = AtomicU32::new(0);
    let doze = || {
        let device = &devices[1];
        device.feature(SET | LOW_POWER_ENTRY, &mut []).unwrap();
        sleeps.fetch_add(1, Ordering::Relaxed);
        device.feature(SET | LOW_POWER_EXIT, &mut []).unwrap();
    };
    race::meanwhile(&[&doze], || {
        for _ in 0..30 {
            race::whatever(port.reset_subordinate());
            assert_eq!(bars(), before);
        }
    });
    assert_ne!(sleeps.load(Ordering::Relaxed), 0);
    leases[1].is(&devices[1], State::Ok);
    assert_eq!(leases[1].lease.read(page_size()), Ok(0xcafe));
}

#[test]
fn a_hot_reset_that_is_refused_changes_nothing() {
    let (devices, leases) = open_pair();
    assert_eq!(devices[0].hot_reset(&[]), Err(EINVAL));
    let other = Device::open("memory");
    assert_eq!(devices[0].hot_reset(&[other.group()]), Err(EINVAL));
    for (device, leased) in devices.iter().zip(&leases) {
        leased.is(device, State::Ok);
    }
}

#[test]
fn a_hot_reset_while_the_other_function_is_not_open() {
    let functions = pair();
    functions
        .iter()
        .for_each(|function| function.bind(BARLEASE));
    let device = Group::open(&functions[0]).device(&functions[0]).unwrap();
    let leased = lease(&device);
    device.hot_reset(&[device.group()]).unwrap();
    assert!(leased.was_taken_away());
    leased.is(&device, State::Ok);
    // It is opened later, and in order.
    let other = device.group().device(&functions[1]).unwrap();
    lease(&other).is(&other, State::Ok);
}

#[test]
fn a_hot_reset_while_the_other_function_was_open_before() {
    let ([device, other], [leased, gone]) = open_pair();
    drop(gone.bar);
    drop(other);
    device.hot_reset(&[device.group()]).unwrap();
    leased.is(&device, State::Ok);
    assert_eq!(gone.lease.read(0), Err(Sigbus));
}

#[test]
fn a_hot_reset_while_the_other_function_belongs_to_stock_vfio_pci() {
    let functions = pair();
    functions[0].bind(BARLEASE);
    functions[1].bind(STOCK);
    let group = Group::open(&functions[0]);
    let device = group.device(&functions[0]).unwrap();
    let leased = lease(&device);
    device.hot_reset(&[&group]).unwrap();
    leased.is(&device, State::Ok);
    // Open too, and the reset asked for on either.
    let stock = group.device(&functions[1]).unwrap();
    device.hot_reset(&[&group]).unwrap();
    leased.is(&device, State::Ok);
    is_seen_by_everybody(&device, &leased, || stock.hot_reset(&[&group]).unwrap());
    leased.is(&device, State::Ok);
    drop((stock, device, leased, group));
    functions[1].bind(BARLEASE);
}

#[test]
fn a_hot_reset_while_the_other_function_has_no_driver() {
    let functions = pair();
    functions[0].bind(BARLEASE);
    functions[1].unbind();
    let device = Group::open(&functions[0]).device(&functions[0]).unwrap();
    let leased = lease(&device);
    // Whether it is done or refused is the core's to say.
    let _ = device.hot_reset(&[device.group()]);
    leased.is(&device, State::Ok);
    drop((device, leased));
    functions[1].bind(BARLEASE);
}

#[test]
fn a_reset_of_the_bus_through_sysfs_takes_from_every_function() {
    let (devices, leases) = open_pair();
    let port = devices[0].function().port();
    is_seen_by_everybody(&devices[0], &leases[0], || {
        port.reset_subordinate().unwrap();
    });
    for (device, leased) in devices.iter().zip(&leases) {
        leased.is(device, State::Ok);
    }
    port.reset_subordinate().unwrap();
    for (device, leased) in devices.iter().zip(&leases) {
        assert!(leased.was_taken_away());
        leased.is(device, State::Ok);
    }
}
