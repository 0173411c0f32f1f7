//! The door for reads and writes through the device fd: shut with EIO while the device's memory may
//! not be touched, and otherwise stock's. Run on the machine `device`.
//!
//! An error that the device reports shuts it too: `aer.rs`. `parity.rs` compares the refusals
//! of the core itself.
#![cfg(barlease_guest)]

use std::{
    thread,
    time::{Duration, Instant},
};

use barlease_abi::{ALIAS_WC, REASON_RESET};
use barlease_guest_tests::{
    errno::{EFAULT, EINVAL, EIO},
    lease::State,
    page_size,
    pci::Function,
    race::meanwhile,
    vfio::{
        CONFIG_REGION, Device, LOW_POWER_ENTRY, LOW_POWER_ENTRY_WITH_WAKEUP, LOW_POWER_EXIT, SET,
    },
    wait::until,
    witness::{self, Witness},
};
use serde_json::json;

/// BAR0: memory, every access to which is in the log.
const MEMORY: u32 = 0;
const MEMORY_LEN: u64 = 16 << 20;

fn setup() -> (Witness, Device, [u32; 2]) {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    let alias = device.alias(MEMORY, ALIAS_WC).unwrap();
    witness.clear();
    (witness, device, [MEMORY, alias])
}

fn accesses(witness: Witness) -> u64 {
    witness.count(&json!({"region": MEMORY}))
}

/// Checks that a shut door is seen after what else is wrong, and that the device sees nothing.
#[track_caller]
fn is_shut(witness: Witness, device: &Device, regions: [u32; 2]) {
    let before = accesses(witness);
    for region in regions {
        let mut bytes = [7; 24];
        for (offset, len) in [(0, 1), (2, 2), (4, 4), (8, 8), (3, 24), (MEMORY_LEN - 4, 4)] {
            let at = format!("region {region}, {offset:#x}+{len}");
            let read = device.read(region, offset, &mut bytes[..len]);
            assert_eq!(read, Err(EIO), "{at}");
            let written = device.write(region, offset, &bytes[..len]);
            assert_eq!(written, Err(EIO), "{at}");
            // The bytes to be written are looked at first, as many as go to the device at once.
            let written = device.write_from_edge(region, offset, 0, len);
            assert_eq!(written, Err(EFAULT), "{at}");
            let read = device.read_to_nowhere(region, offset, len);
            assert_eq!(read, Err(EIO), "{at}");
        }
        assert_eq!(device.write_from_edge(region, 4, 4, 8), Err(EIO));
        assert_eq!(device.write_from_edge(region, 0, 4, 8), Err(EFAULT));
        // Past the end of what there is, before the memory that is missing.
        assert_eq!(
            device.write_from_edge(region, MEMORY_LEN - 4, 4, 8),
            Err(EIO)
        );
        assert_eq!(bytes, [7; 24]);
        assert_eq!(device.read(region, 0, &mut []), Ok(0));
        assert_eq!(device.read(region, MEMORY_LEN, &mut bytes), Err(EINVAL));
        assert_eq!(device.write(region, MEMORY_LEN, &bytes), Err(EINVAL));
    }
    // A BAR that is not there, and regions that are none.
    assert_eq!(device.read(5, 0, &mut [0; 4]), Err(EINVAL));
    assert_eq!(device.read(CONFIG_REGION, 0, &mut [0; 4]), Ok(4));
    assert_eq!(accesses(witness), before);
}

#[track_caller]
fn is_open(witness: Witness, device: &Device, regions: [u32; 2]) {
    for (region, value) in regions.into_iter().zip(1..) {
        let before = accesses(witness);
        device.write32(region, 16, value);
        assert_eq!(device.read32(region, 16), value);
        assert_eq!(accesses(witness), before + 2);
    }
}

#[test]
fn the_door_is_shut_in_d1_d2_and_d3hot() {
    let (witness, device, regions) = setup();
    is_open(witness, &device, regions);
    for state in [1, 2, 3] {
        device.set_power_state(state);
        is_shut(witness, &device, regions);
        device.set_power_state(0);
        is_open(witness, &device, regions);
    }
}

#[test]
fn the_door_is_shut_while_memory_is_off() {
    let (witness, device, regions) = setup();
    device.set_memory(false);
    is_shut(witness, &device, regions);
    device.set_memory(true);
    is_open(witness, &device, regions);
}

#[test]
fn the_door_is_shut_during_a_reset_through_sysfs() {
    let (witness, device, regions) = setup();
    let lease = device.export(MEMORY, &[(0, page_size())]).unwrap();
    // The log cannot be asked during the reset: that takes a read of config space, which waits for
    // its end.
    let before = accesses(witness);
    witness.set(&json!({"reset_fails": true}));
    thread::scope(|scope| {
        let resetting = scope.spawn(|| device.function().reset());
        until(
            "word of the reset",
            || matches!(device.state(&lease), State::Revoked(reasons) if reasons & REASON_RESET != 0),
        );
        let end = Instant::now() + Duration::from_millis(200);
        while Instant::now() < end {
            for region in regions {
                assert_eq!(device.read(region, 8, &mut [0; 4]), Err(EIO));
                assert_eq!(device.write(region, 8, &[0; 4]), Err(EIO));
            }
        }
        assert!(!resetting.is_finished());
        witness.set(&json!({"reset_fails": false}));
        resetting.join().unwrap().unwrap();
        assert_eq!(accesses(witness), before);
    });
    is_open(witness, &device, regions);
}

#[test]
fn resets_through_sysfs_in_a_loop_let_no_more_than_begun_accesses_through() {
    let (witness, device, _) = setup();
    witness::set_reset_method(device.function(), "flr");
    witness.set(&json!({"reset_ms": 20}));
    let read = || {
        let seen = device.read(MEMORY, 8, &mut [0; 4]);
        assert!(matches!(seen, Ok(4) | Err(EIO)), "{seen:?}");
    };
    meanwhile(&[&read], || {
        for _ in 0..20 {
            device.function().reset().unwrap();
        }
    });
    witness::set_reset_method(device.function(), "default");
    let resets = witness.count(&json!({"kind": "reset_begin"}));
    assert!(resets >= 20, "{resets}");
    // One thread has at most one access on its way when a reset begins.
    let within = witness.count(&json!({"region": MEMORY, "reset": true}));
    assert!(within <= resets, "{within} accesses in {resets} resets");
}

#[test]
fn a_config_write_that_leaves_memory_on_refuses_nothing() {
    let (_, device, _) = setup();
    let command = device.command();
    let toggle = || {
        device.set_command(command | 4);
        device.set_command(command & !4);
    };
    let read = || assert_eq!(device.read(MEMORY, 8, &mut [0; 4]), Ok(4));
    meanwhile(&[&toggle, &read], || thread::sleep(Duration::from_secs(5)));
}

fn sleeps(function: &Function) {
    until("the device to sleep", || {
        function.runtime_status() == "suspended"
    });
}

#[test]
fn an_access_in_low_power_wakes_the_device_for_its_duration() {
    let (witness, device, regions) = setup();
    let lease = device.export(MEMORY, &[(0, page_size())]).unwrap();
    assert_eq!(device.feature(SET | LOW_POWER_ENTRY, &mut []), Ok(0));
    for _ in 0..3 {
        sleeps(device.function());
        is_open(witness, &device, regions);
        assert!(matches!(device.state(&lease), State::Revoked(_)));
    }
    // The other causes that shut the door still do.
    device.set_memory(false);
    assert_eq!(device.read(MEMORY, 0, &mut [0; 4]), Err(EIO));
    device.set_memory(true);
    is_open(witness, &device, regions);
    assert_eq!(device.feature(SET | LOW_POWER_EXIT, &mut []), Ok(0));
    assert_eq!(device.state(&lease), State::Ok);
}

#[test]
fn an_access_in_low_power_with_wake_up_ends_it() {
    let (witness, device, regions) = setup();
    let lease = device.export(MEMORY, &[(0, page_size())]).unwrap();
    let event = barlease_guest_tests::process::eventfd();
    let number = std::os::fd::AsRawFd::as_raw_fd(&event);
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&number.to_ne_bytes());
    let entry = SET | LOW_POWER_ENTRY_WITH_WAKEUP;
    assert_eq!(device.feature(entry, &mut payload), Ok(0));
    sleeps(device.function());
    is_open(witness, &device, regions);
    assert_eq!(device.state(&lease), State::Ok);
}
