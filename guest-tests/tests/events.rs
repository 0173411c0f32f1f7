//! Config writes, power states and low power: what takes a buffer away, what gives it back, and
//! what leaves it alone.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use barlease_abi::{REASON_LOW_POWER, REASON_MEMORY_OFF};
use barlease_guest_tests::{
    errno::{EINVAL, EIO},
    huge_size,
    lease::State,
    map::{How, Map, Sigbus},
    observe, page_size, process, race,
    vfio::{
        COMMAND, COMMAND_INTX_DISABLE, COMMAND_MASTER, COMMAND_MEMORY, CONFIG_REGION, Device,
        IRQ_ACTION_TRIGGER, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, LOW_POWER_ENTRY,
        LOW_POWER_ENTRY_WITH_WAKEUP, LOW_POWER_EXIT, MSIX_IRQ, PROBE, SET,
    },
    wait,
};

const MEMORY_OFF: State = State::Revoked(REASON_MEMORY_OFF);
const LOW_POWER: State = State::Revoked(REASON_LOW_POWER);

/// A device with a lease of 4 MiB of BAR `bar`, mapped and touched; and another of a page.
struct Leased {
    device: Device,
    bar: u32,
    fd: OwnedFd,
    map: Map,
    page: Map,
}

fn leased(name: &str) -> Leased {
    let device = Device::open(name);
    let bar = if name == "display" { 0 } else { 2 };
    if name == "nvme" {
        enable_cmb(&device);
    }
    let fd = device.export(bar, &[(0, 2 * huge_size())]).unwrap();
    let map = Map::aligned(&fd, 2 * huge_size()).unwrap();
    map.touch_all().unwrap();
    let page = device
        .export(bar, &[(2 * huge_size(), page_size())])
        .unwrap();
    let page = Map::new(page, page_size()).unwrap();
    page.touch_all().unwrap();
    Leased {
        device,
        bar,
        fd,
        map,
        page,
    }
}

/// An NVMe controller's memory buffer is there once it is switched on (NVMe 1.4, 3.1.13: CMBMSC).
fn enable_cmb(device: &Device) {
    device.write32(0, 0x50, 1);
}

impl Leased {
    fn state(&self) -> State {
        self.device.state(&self.fd)
    }

    /// Checks that state and touches agree, for each mapping.
    fn is(&self, expected: State) {
        assert_eq!(self.state(), expected);
        let touches = [
            self.map.read(0),
            self.map.read(2 * huge_size() - 4),
            self.map.write(page_size(), 5).map(|()| 0),
            self.page.read(0),
        ];
        for touch in touches {
            match expected {
                State::Ok => assert!(touch.is_ok()),
                _ => assert_eq!(touch, Err(Sigbus), "{expected:?}"),
            }
        }
        assert_eq!(self.state(), expected);
    }

    /// The page faults that touching everything costs: none as long as nothing was taken away.
    fn faults(&self) -> i64 {
        let other = Map::anonymous(page_size());
        other.touch_all().unwrap();
        observe::faults_of(|| {
            self.map.touch_all().unwrap();
            self.page.touch_all().unwrap();
        })
    }

    fn is_left_alone_by(&self, what: &str, act: impl FnOnce()) {
        self.faults();
        act();
        assert_eq!(self.faults(), 0, "{what} took something away");
        assert_eq!(self.state(), State::Ok, "{what}");
    }
}

// ---- COMMAND ------------------------------------------------------------------------------------

#[test]
fn memory_off_takes_away_and_memory_on_gives_back() {
    let leased = leased("display");
    leased.map.write(8, 0x600d).unwrap();
    leased.is(State::Ok);
    for _ in 0..3 {
        leased.device.set_memory(false);
        leased.is(MEMORY_OFF);
        leased.device.set_memory(true);
        leased.is(State::Ok);
        assert_eq!(leased.map.read(8), Ok(0x600d));
    }
}

#[test]
fn memory_off_twice_is_memory_off() {
    let leased = leased("display");
    leased.device.set_memory(false);
    leased.device.set_memory(false);
    leased.is(MEMORY_OFF);
    leased.device.set_memory(true);
    leased.device.set_memory(true);
    leased.is(State::Ok);
}

#[test]
fn a_command_write_that_leaves_memory_on_gives_everything_back() {
    let leased = leased("display");
    let command = leased.device.command();
    for bits in [
        command | COMMAND_MASTER,
        command & !COMMAND_MASTER,
        command | COMMAND_INTX_DISABLE,
        command,
    ] {
        leased.device.set_command(bits | COMMAND_MEMORY);
        leased.is(State::Ok);
    }
}

#[test]
fn a_command_write_that_leaves_memory_off_gives_nothing_back() {
    let leased = leased("display");
    leased.device.set_memory(false);
    let command = leased.device.command();
    for bits in [command | COMMAND_MASTER, command & !COMMAND_MASTER] {
        leased.device.set_command(bits);
        leased.is(MEMORY_OFF);
    }
}

#[test]
fn a_write_of_any_size_that_covers_command_is_caught() {
    let leased = leased("display");
    let device = &leased.device;
    // Offset and length: alone, with its neighbours, across dwords, and long ones.
    for (offset, len) in [
        (4, 1),
        (4, 2),
        (4, 4),
        (3, 2),
        (2, 4),
        (1, 5),
        (0, 8),
        (3, 9),
        (0, 64),
        (4, 252),
        (0, 256),
    ] {
        for on in [false, true] {
            let mut bytes = [0; 256];
            device.read(CONFIG_REGION, 0, &mut bytes).unwrap();
            let bit = COMMAND_MEMORY as u8;
            let low = &mut bytes[COMMAND as usize];
            *low = if on { *low | bit } else { *low & !bit };
            device.set_config(offset, &bytes[offset as usize..][..len]);
            let memory = device.command() & COMMAND_MEMORY != 0;
            assert_eq!(memory, on, "{offset:#x}+{len}");
            leased.is(if on { State::Ok } else { MEMORY_OFF });
        }
    }
}

#[test]
fn a_write_past_the_end_of_config_space_writes_nothing() {
    let leased = leased("display");
    let device = &leased.device;
    let size = device.function().config().len();
    let mut bytes = vec![0; size + 4];
    device.read(CONFIG_REGION, 0, &mut bytes[..size]).unwrap();
    bytes[COMMAND as usize] &= !(COMMAND_MEMORY as u8);
    assert!(device.write(CONFIG_REGION, 0, &bytes).is_err());
    leased.is(State::Ok);
}

#[test]
fn a_write_from_unreadable_memory_changes_nothing() {
    let leased = leased("display");
    let answer = leased.device.write_config_from_nowhere(COMMAND, 2);
    assert!(answer.is_err());
    leased.is(State::Ok);
    leased.device.set_memory(false);
    assert!(leased.device.write_config_from_nowhere(COMMAND, 2).is_err());
    leased.is(MEMORY_OFF);
}

#[test]
fn a_buffer_exported_while_memory_is_off_is_born_revoked() {
    let leased = leased("display");
    leased.device.set_memory(false);
    let fd = leased.device.export(0, &[(0, huge_size())]).unwrap();
    assert_eq!(leased.device.state(&fd), MEMORY_OFF);
    let map = Map::new(&fd, huge_size()).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
    leased.device.set_memory(true);
    assert_eq!(leased.device.state(&fd), State::Ok);
    map.touch_all().unwrap();
}

#[test]
fn a_bar_mapped_while_memory_is_off_is_there_when_it_is_on() {
    let leased = leased("display");
    leased.device.set_memory(false);
    let bar = How::shared().map(&leased.device, 0, huge_size()).unwrap();
    assert_eq!(bar.read(0), Err(Sigbus));
    leased.device.set_memory(true);
    bar.touch_all().unwrap();
}

#[test]
fn a_device_that_is_opened_has_memory_on() {
    let leased = leased("display");
    leased.device.set_memory(false);
    drop(leased);
    let device = Device::open("display");
    let fd = device.export(0, &[(0, page_size())]).unwrap();
    let on = device.command() & COMMAND_MEMORY != 0;
    let expected = if on { State::Ok } else { MEMORY_OFF };
    assert_eq!(device.state(&fd), expected);
}

// ---- Events that leave buffers alone ------------------------------------------------------------

#[test]
fn events_of_one_device_leave_others_alone() {
    let one = leased("display");
    let other = leased("memory");
    one.is_left_alone_by("another device", || {
        other.device.set_memory(false);
        other.is(MEMORY_OFF);
        other.device.reset().unwrap();
        other.device.function().reset().unwrap();
        other.device.revoke(&other.fd).unwrap();
    });
    one.is_left_alone_by("the close of another device", || drop(other));
}

#[test]
fn config_writes_elsewhere_leave_buffers_alone() {
    for name in ["display", "nvme"] {
        let leased = leased(name);
        let device = &leased.device;
        let size = device.function().config().len() as u64;
        let pmcsr = device.capability(1).map(|at| at + 4);
        // The function that resets is not elsewhere.
        let express = device.capability(0x10).map(|at| at + 8);
        let skip = [Some(COMMAND), pmcsr, express];
        for offset in (0..size.min(256)).step_by(4) {
            if skip.contains(&Some(offset)) {
                continue;
            }
            let bytes: [u8; 4] = device.config(offset);
            leased.is_left_alone_by(&format!("{name}: config write {offset:#x}"), || {
                device.set_config(offset, &bytes);
            });
        }
        // The upper byte of COMMAND has no memory bit; the upper byte of PMCSR no power state.
        let [_, upper]: [u8; 2] = device.config(COMMAND);
        leased.is_left_alone_by("the upper byte of COMMAND", || {
            device.set_config(COMMAND + 1, &[upper]);
        });
        if let Some(pmcsr) = pmcsr {
            let [_, upper]: [u8; 2] = device.config(pmcsr);
            leased.is_left_alone_by("the upper byte of PMCSR", || {
                device.set_config(pmcsr + 1, &[upper]);
            });
        }
        // Everything behind COMMAND and STATUS up to the capabilities, at once.
        let bytes: [u8; 0x38] = device.config(8);
        leased.is_left_alone_by("a long write behind COMMAND", || {
            device.set_config(8, &bytes);
        });
    }
}

#[test]
fn a_write_to_a_bar_register_changes_nothing_of_what_is_mapped() {
    let leased = leased("display");
    let bar: [u8; 4] = leased.device.config(0x10);
    leased.map.write(12, 12).unwrap();
    leased.is_left_alone_by("sizing a BAR", || {
        leased.device.set_config(0x10, &[0xff; 4]);
        let _: [u8; 4] = leased.device.config(0x10);
    });
    assert_eq!(leased.device.read32(0, 12), 12);
    leased.device.set_config(0x10, &bar);
    assert_eq!(leased.map.read(12), Ok(12));
}

#[test]
fn reads_and_other_ioctls_leave_buffers_alone() {
    let leased = leased("nvme");
    let device = &leased.device;
    leased.is_left_alone_by("a config read", || {
        let _: [u8; 256] = device.config(0);
    });
    leased.is_left_alone_by("a BAR read", || {
        let _ = device.read32(leased.bar, 0);
    });
    leased.is_left_alone_by("a BAR write", || device.write32(leased.bar, 0, 1));
    leased.is_left_alone_by("GET_INFO and the like", || {
        device.info().unwrap();
        for region in 0..9 {
            let _ = device.region_info(region);
        }
        for irq in 0..5 {
            let _ = device.irq_info(irq);
        }
        let _ = device.hot_reset_info();
    });
    leased.is_left_alone_by("interrupts", || {
        let event = eventfd();
        let flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
        device
            .set_irqs(MSIX_IRQ, flags, 1, &[event.as_raw_fd()])
            .unwrap();
        let flags = IRQ_DATA_NONE | IRQ_ACTION_TRIGGER;
        device.set_irqs(MSIX_IRQ, flags, 0, &[]).unwrap();
    });
    leased.is_left_alone_by("features", || {
        let other = device.export(leased.bar, &[(0, page_size())]).unwrap();
        device.status(&other).unwrap();
        device.revoke(&other).unwrap();
        for feature in 0..14 {
            let _ = device.feature(PROBE | feature, &mut []);
        }
    });
    leased.is_left_alone_by("an mmap of the BAR", || {
        let bar = How::shared()
            .map(device, u64::from(leased.bar) << 40, huge_size())
            .unwrap();
        bar.touch_all().unwrap();
    });
}

// ---- A process that races itself ----------------------------------------------------------------

/// Flips COMMAND in memory while it is being written: whatever the kernel took, what it says
/// afterwards and what can be touched agree.
fn races_itself(len: usize, offset: u64) {
    let leased = leased("display");
    let device = &leased.device;
    let mut config = [0; 8];
    device.read(CONFIG_REGION, offset, &mut config).unwrap();
    let at = (COMMAND - offset) as usize;
    config[at] |= COMMAND_MEMORY as u8;
    let on = u64::from_le_bytes(config);
    config[at] &= !(COMMAND_MEMORY as u8);
    let off = u64::from_le_bytes(config);
    let value = AtomicU64::new(on);
    let flip = || {
        for word in [off, on] {
            value.store(word, Ordering::Relaxed);
            race::stay();
        }
    };
    let window = race::Window::new();
    let touch = || {
        window.check(|| leased.map.write(0, 1).is_ok());
    };
    let mut seen = [0; 2];
    race::meanwhile(&[&flip, &touch], || {
        let begin = Instant::now();
        let enough = |seen: &[u32; 2]| seen.iter().all(|&seen| seen > 10);
        while begin.elapsed() < Duration::from_millis(1000)
            || (!enough(&seen) && begin.elapsed() < wait::LONG)
        {
            device.write_config_shared(offset, &value, len);
            let [command]: [u8; 1] = device.config(COMMAND);
            let is_on = command & COMMAND_MEMORY as u8 != 0;
            seen[usize::from(is_on)] += 1;
            if !is_on {
                window.shut(|| {
                    assert_eq!(leased.map.read(0), Err(Sigbus));
                    assert_eq!(leased.page.read(0), Err(Sigbus));
                });
            } else {
                assert_eq!(leased.state(), State::Ok);
                leased.page.read(0).unwrap();
            }
        }
    });
    assert!(
        seen.iter().all(|&seen| seen > 0),
        "the race had one end only: {seen:?}"
    );
}

#[test]
fn a_process_that_races_its_2_byte_write_gains_nothing() {
    races_itself(2, COMMAND);
}

#[test]
fn a_process_that_races_its_long_write_gains_nothing() {
    races_itself(8, 0);
}

#[test]
fn writers_that_race_each_other_leave_what_the_last_one_said() {
    let leased = leased("display");
    let command = leased.device.command();
    for _ in 0..100 {
        thread::scope(|scope| {
            for on in [false, true, false] {
                let device = &leased.device;
                let bits = if on {
                    command | COMMAND_MEMORY
                } else {
                    command & !COMMAND_MEMORY
                };
                scope.spawn(move || device.set_command(bits));
            }
        });
        let on = leased.device.command() & COMMAND_MEMORY != 0;
        leased.is(if on { State::Ok } else { MEMORY_OFF });
    }
    leased.device.set_memory(true);
    leased.is(State::Ok);
}

// ---- Power states -------------------------------------------------------------------------------

/// Devices with a power-management capability, with D3hot.
const SLEEPERS: [&str; 1] = ["nvme"];

#[test]
fn d3hot_takes_away_and_d0_gives_back() {
    for name in SLEEPERS {
        let leased = leased(name);
        for _ in 0..2 {
            leased.device.set_power_state(3);
            leased.is(LOW_POWER);
            assert_eq!(leased.device.function().power_state(), "D3hot", "{name}");
            leased.device.set_power_state(0);
            leased.is(State::Ok);
        }
    }
}

#[test]
fn d3hot_of_igb_takes_its_bar_away() {
    let device = Device::open("igb");
    let fd = device.export(0, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    let status = map.read(8).unwrap();
    device.set_power_state(3);
    assert_eq!(device.state(&fd), LOW_POWER);
    assert_eq!(map.read(8), Err(Sigbus));
    device.set_power_state(0);
    assert_eq!(device.state(&fd), State::Ok);
    let _ = status;
    map.read(8).unwrap();
}

#[test]
fn a_write_of_any_size_that_covers_pmcsr_is_caught() {
    let leased = leased("nvme");
    let device = &leased.device;
    let pmcsr = device.pmcsr();
    for (before, len) in [(0, 1), (0, 2), (0, 4), (1, 2), (2, 4), (4, 8), (3, 5)] {
        for state in [3, 0] {
            let offset = pmcsr - before;
            let mut bytes = [0; 8];
            device.read(CONFIG_REGION, offset, &mut bytes).unwrap();
            let low = &mut bytes[before as usize];
            *low = *low & !3 | state;
            device.set_config(offset, &bytes[..len]);
            assert_eq!(device.power_state(), state, "-{before}+{len}");
            leased.is(if state == 0 { State::Ok } else { LOW_POWER });
        }
    }
}

#[test]
fn a_pmcsr_write_that_stays_in_d0_gives_everything_back() {
    let leased = leased("nvme");
    leased.device.set_power_state(0);
    leased.is(State::Ok);
}

#[test]
fn a_power_state_that_the_device_does_not_have_changes_nothing() {
    let leased = leased("nvme");
    let capability = leased.device.capability(1).unwrap();
    let capabilities = u16::from_le_bytes(leased.device.config(capability + 2));
    for (state, bit) in [(1, 1 << 9), (2, 1 << 10)] {
        assert_eq!(capabilities & bit, 0, "the device has D{state}");
        leased.device.set_power_state(state);
        assert_eq!(leased.device.function().power_state(), "D0");
        leased.is(State::Ok);
    }
    // Nor from D3hot.
    leased.device.set_power_state(3);
    leased.is(LOW_POWER);
    leased.device.set_power_state(0);
    leased.is(State::Ok);
}

#[test]
fn d3hot_and_memory_off_are_two_reasons() {
    let leased = leased("nvme");
    leased.device.set_memory(false);
    leased.is(MEMORY_OFF);
    leased.device.set_power_state(3);
    leased.is(State::Revoked(REASON_MEMORY_OFF | REASON_LOW_POWER));
    leased.device.set_power_state(0);
    leased.is(MEMORY_OFF);
    leased.device.set_memory(true);
    leased.is(State::Ok);
}

#[test]
fn memory_on_in_d3hot_gives_nothing_back() {
    let leased = leased("nvme");
    leased.device.set_power_state(3);
    leased.device.set_memory(false);
    leased.device.set_memory(true);
    leased.is(LOW_POWER);
    leased.device.set_power_state(0);
    leased.is(State::Ok);
}

#[test]
fn a_buffer_exported_in_d3hot_is_born_revoked() {
    let leased = leased("nvme");
    leased.device.set_power_state(3);
    let fd = leased.device.export(2, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    assert_eq!(leased.device.state(&fd), LOW_POWER);
    assert_eq!(map.read(0), Err(Sigbus));
    leased.device.set_power_state(0);
    assert_eq!(leased.device.state(&fd), State::Ok);
    map.read(0).unwrap();
}

#[test]
fn a_device_closed_in_d3hot_is_opened_in_d0() {
    let first = leased("nvme");
    first.device.set_power_state(3);
    let Leased { device, map, .. } = first;
    drop(device);
    assert_eq!(map.read(0), Err(Sigbus));
    leased("nvme").is(State::Ok);
    assert_eq!(map.read(0), Err(Sigbus));
}

// ---- Low power ----------------------------------------------------------------------------------

fn eventfd() -> OwnedFd {
    process::eventfd()
}

fn enter_low_power(device: &Device) {
    device.feature(SET | LOW_POWER_ENTRY, &mut []).unwrap();
}

fn leave_low_power(device: &Device) {
    device.feature(SET | LOW_POWER_EXIT, &mut []).unwrap();
}

/// Enters low power with wake-up; the eventfd tells when it is over.
fn enter_low_power_until_wake_up(device: &Device) -> OwnedFd {
    let event = eventfd();
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&event.as_raw_fd().to_ne_bytes());
    let flags = SET | LOW_POWER_ENTRY_WITH_WAKEUP;
    device.feature(flags, &mut payload).unwrap();
    event
}

/// Waits until the device sleeps: the kernel lets it do so a little after the call.
fn wait_until_suspended(device: &Device) {
    wait::until("the device to sleep", || {
        device.function().runtime_status() == "suspended"
    });
}

fn count(event: OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match File::from(event).read(&mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        _ => 0,
    }
}

/// State and reasons in the `buffers` file: reading it is no access through the device fd.
fn states_in_debugfs(device: &Device) -> Vec<(String, String)> {
    observe::buffers(device.function())
        .iter()
        .map(|line| (line.get("state").to_owned(), line.get("reasons").to_owned()))
        .collect()
}

#[test]
fn low_power_takes_away_and_exit_gives_back() {
    for name in ["nvme", "display"] {
        let leased = leased(name);
        for _ in 0..2 {
            enter_low_power(&leased.device);
            leased.is(LOW_POWER);
            leave_low_power(&leased.device);
            leased.is(State::Ok);
        }
    }
}

#[test]
fn an_access_wakes_a_device_in_low_power_for_that_access_only() {
    let leased = leased("nvme");
    enter_low_power(&leased.device);
    wait_until_suspended(&leased.device);
    leased.is(LOW_POWER);
    let _: [u8; 4] = leased.device.config(0);
    wait_until_suspended(&leased.device);
    leased.is(LOW_POWER);
    leave_low_power(&leased.device);
    leased.is(State::Ok);
}

#[test]
fn low_power_with_wake_up_ends_at_the_next_access() {
    let leased = leased("nvme");
    let accesses: [(&str, &dyn Fn()); 5] = [
        ("STATUS", &|| assert_eq!(leased.state(), State::Ok)),
        ("a config read", &|| {
            let _: [u8; 4] = leased.device.config(0);
        }),
        ("a config write", &|| {
            leased.device.set_config(0x3c, &[0]);
        }),
        ("GET_INFO", &|| {
            leased.device.info().unwrap();
        }),
        ("an export", &|| {
            let fd = leased.device.export(2, &[(0, page_size())]).unwrap();
            Map::new(&fd, page_size()).unwrap().read(0).unwrap();
        }),
    ];
    for (what, access) in accesses {
        let event = enter_low_power_until_wake_up(&leased.device);
        wait_until_suspended(&leased.device);
        // No access through the device fd: a touch and a look at debugfs.
        assert_eq!(leased.map.read(0), Err(Sigbus), "{what}");
        for (state, reasons) in states_in_debugfs(&leased.device) {
            assert_eq!(
                (state.as_str(), reasons.as_str()),
                ("REVOKED", "0x4"),
                "{what}"
            );
        }
        access();
        assert_eq!(leased.map.read(0).map(drop), Ok(()), "{what}");
        leased.is(State::Ok);
        assert_eq!(count(event), 1, "{what}");
    }
}

/// Wakes the device as the host's administrator does, without an access through the device fd, and
/// lets it sleep again afterwards.
fn woken_by_the_host<R>(device: &Device, meanwhile: impl FnOnce() -> R) -> R {
    device.function().set_power_control("on");
    assert_eq!(device.function().runtime_status(), "active");
    let result = meanwhile();
    device.function().set_power_control("auto");
    result
}

#[test]
fn low_power_with_wake_up_ends_when_the_host_wakes_the_device() {
    let leased = leased("nvme");
    for _ in 0..3 {
        let event = enter_low_power_until_wake_up(&leased.device);
        wait_until_suspended(&leased.device);
        assert_eq!(leased.map.read(0), Err(Sigbus));
        let touch = woken_by_the_host(&leased.device, || {
            // The holder of a lease has no device fd to access: its touch works without one.
            leased.map.read(0)
        });
        assert_eq!(touch.map(drop), Ok(()));
        // The user learns it from the eventfd.
        assert_eq!(count(event), 1);
        leased.is(State::Ok);
    }
}

#[test]
fn a_wake_up_by_the_host_with_memory_off_gives_nothing_back() {
    let leased = leased("nvme");
    leased.device.set_memory(false);
    let _event = enter_low_power_until_wake_up(&leased.device);
    wait_until_suspended(&leased.device);
    let states = woken_by_the_host(&leased.device, || {
        assert_eq!(leased.map.read(0), Err(Sigbus));
        states_in_debugfs(&leased.device)
    });
    for (state, reasons) in states {
        assert_eq!((state.as_str(), reasons.as_str()), ("REVOKED", "0x1"));
    }
    leased.is(MEMORY_OFF);
    leased.device.set_memory(true);
    leased.is(State::Ok);
}

#[test]
fn a_wake_up_by_the_host_does_not_end_low_power_without_wake_up() {
    let leased = leased("nvme");
    enter_low_power(&leased.device);
    wait_until_suspended(&leased.device);
    woken_by_the_host(&leased.device, || {
        assert_eq!(leased.map.read(0), Err(Sigbus));
        leased.is(LOW_POWER);
    });
    leased.is(LOW_POWER);
    leave_low_power(&leased.device);
    leased.is(State::Ok);
}

#[test]
fn a_device_that_was_bound_again_is_woken_by_the_host_too() {
    let function = Device::open("nvme").function().clone();
    // The driver's operations belong to all its devices: another that is bound meanwhile changes
    // nothing.
    let other = Device::open("display").function().clone();
    function.unbind();
    let leased = leased("nvme");
    other.unbind();
    drop(Device::open("display"));
    let _event = enter_low_power_until_wake_up(&leased.device);
    wait_until_suspended(&leased.device);
    let touch = woken_by_the_host(&leased.device, || leased.map.read(0));
    assert_eq!(touch.map(drop), Ok(()));
}

#[test]
fn low_power_twice_is_refused_and_stays() {
    let leased = leased("nvme");
    enter_low_power(&leased.device);
    let again = leased.device.feature(SET | LOW_POWER_ENTRY, &mut []);
    assert_eq!(again, Err(EINVAL));
    leased.is(LOW_POWER);
    leave_low_power(&leased.device);
    leased.is(State::Ok);
    // An exit without an entry is nothing.
    leave_low_power(&leased.device);
    leased.is(State::Ok);
}

#[test]
fn a_refused_entry_changes_nothing() {
    let leased = leased("nvme");
    let flags = SET | LOW_POWER_ENTRY_WITH_WAKEUP;
    let answer = leased.device.feature(flags, &mut [0xff; 8]);
    assert_eq!(answer, Err(EINVAL));
    leased.is(State::Ok);
    assert_eq!(leased.device.feature(flags, &mut []), Err(EINVAL));
    leased.is(State::Ok);
}

#[test]
fn a_probe_of_low_power_changes_nothing() {
    let leased = leased("nvme");
    for feature in [LOW_POWER_ENTRY, LOW_POWER_ENTRY_WITH_WAKEUP, LOW_POWER_EXIT] {
        leased.is_left_alone_by("a probe", || {
            leased.device.feature(PROBE | feature, &mut []).unwrap();
            leased
                .device
                .feature(PROBE | SET | feature, &mut [])
                .unwrap();
        });
    }
}

#[test]
fn memory_on_in_low_power_gives_nothing_back() {
    let leased = leased("nvme");
    enter_low_power(&leased.device);
    leased.device.set_memory(false);
    leased.is(State::Revoked(REASON_LOW_POWER | REASON_MEMORY_OFF));
    leased.device.set_memory(true);
    leased.is(LOW_POWER);
    leave_low_power(&leased.device);
    leased.is(State::Ok);
}

#[test]
fn leaving_low_power_with_memory_off_gives_nothing_back() {
    let leased = leased("nvme");
    leased.device.set_memory(false);
    enter_low_power(&leased.device);
    leave_low_power(&leased.device);
    leased.is(MEMORY_OFF);
    leased.device.set_memory(true);
    leased.is(State::Ok);
}

#[test]
fn low_power_from_d3hot_and_back() {
    let leased = leased("nvme");
    leased.device.set_power_state(3);
    enter_low_power(&leased.device);
    wait_until_suspended(&leased.device);
    leased.is(LOW_POWER);
    leave_low_power(&leased.device);
    // Sleeping woke the device from D3hot first.
    assert_eq!(leased.device.function().power_state(), "D0");
    leased.is(State::Ok);
}

#[test]
fn a_buffer_exported_in_low_power_is_born_revoked() {
    let leased = leased("nvme");
    enter_low_power(&leased.device);
    let fd = leased.device.export(2, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    assert_eq!(leased.device.state(&fd), LOW_POWER);
    assert_eq!(map.read(0), Err(Sigbus));
    leave_low_power(&leased.device);
    assert_eq!(leased.device.state(&fd), State::Ok);
    map.read(0).unwrap();
}

#[test]
fn a_device_closed_in_low_power_is_opened_awake() {
    let first = leased("nvme");
    enter_low_power(&first.device);
    wait_until_suspended(&first.device);
    let Leased { device, map, .. } = first;
    drop(device);
    assert_eq!(map.read(0), Err(Sigbus));
    leased("nvme").is(State::Ok);
}

/// A write to PMCSR can bring this about when a reset comes in the middle of it: the core writes
/// the state back that it has read before. With the stock driver a device sleeps from then on,
/// though its user has asked for D0 and reads that the kernel says so.
#[test]
fn a_device_that_sleeps_unnoticed_is_woken_by_a_write_of_d0() {
    let leased = leased("nvme");
    leased.map.write(0, 0x5afe).unwrap();
    let device = &leased.device;
    let pmcsr = device.pmcsr();
    let [control]: [u8; 1] = device.config(pmcsr);
    device.function().set_config(pmcsr, &[control | 3]);
    assert_eq!(device.power_state(), 3);
    assert_eq!(device.function().power_state(), "D0");
    device.set_power_state(0);
    assert_eq!(device.power_state(), 0);
    assert_eq!(device.function().power_state(), "D0");
    leased.is(State::Ok);
    assert_eq!(leased.map.read(0), Ok(0x5afe));
}

#[test]
fn revoke_in_low_power_is_for_good() {
    let leased = leased("nvme");
    enter_low_power(&leased.device);
    leased.device.revoke(&leased.fd).unwrap();
    leave_low_power(&leased.device);
    leased.is_dead();
}

/// However many there are, in whatever order they come and go, and whoever came into the place of
/// another.
#[test]
fn leases_by_the_hundred_are_all_taken_away() {
    let device = Device::open("display");
    observe::wait_for_buffers(device.function(), 0);
    let lease = |number: u64| {
        let fd = device
            .export(0, &[(number * page_size(), page_size())])
            .unwrap();
        let map = Map::new(&fd, page_size()).unwrap();
        map.write(0, number as u32).unwrap();
        (number, fd, map)
    };
    // The second time there is room from the first.
    for _ in 0..2 {
        let mut leases: Vec<_> = (0..300).map(lease).collect();
        leases.retain(|(number, ..)| number % 3 != 1);
        leases.extend((300..350).map(lease));
        observe::wait_for_buffers(device.function(), leases.len());
        device.set_memory(false);
        for (number, fd, map) in &leases {
            assert_eq!(map.read(0), Err(Sigbus), "{number}");
            assert_eq!(device.state(fd), MEMORY_OFF, "{number}");
        }
        device.set_memory(true);
        for (number, _, map) in &leases {
            assert_eq!(map.read(0), Ok(*number as u32));
        }
        drop(leases);
        observe::wait_for_buffers(device.function(), 0);
    }
}

/// Whether the system can sleep like this. If so, all is taken away and given back, but for memory
/// that is off.
fn sleeps_and_wakes_up(leased: &Leased, what: &str, sleep: impl Fn() -> bool) -> bool {
    if !sleep() {
        return false;
    }
    assert!(leased.faults() > 0, "{what}: nothing was taken away");
    leased.is(State::Ok);
    leased.device.set_memory(false);
    sleep();
    leased.is(MEMORY_OFF);
    leased.device.set_memory(true);
    leased.is(State::Ok);
    true
}

#[test]
fn system_sleep_takes_away_and_wake_up_gives_back() {
    // Up to where processes are frozen, and back.
    sleeps_and_wakes_up(&leased("display"), "display", observe::pretend_to_sleep);
}

#[test]
fn a_sleep_of_the_devices_too_takes_away_and_wake_up_gives_back() {
    for name in ["display", "nvme"] {
        // The drivers', and the bus's with a power state.
        for step in ["devices", "platform"] {
            let sleep = || observe::pretend_to_sleep_as_far_as(step);
            if !sleeps_and_wakes_up(&leased(name), &format!("{name}, {step}"), sleep) {
                return;
            }
        }
    }
}

#[test]
fn a_real_sleep_takes_away_and_wake_up_gives_back() {
    for name in ["display", "nvme"] {
        let leased = leased(name);
        leased.map.write(8, 0x600d).unwrap();
        assert_eq!(leased.faults(), 0);
        let sleep = || {
            observe::sleep();
            true
        };
        sleeps_and_wakes_up(&leased, name, sleep);
        assert_eq!(leased.map.read(8), Ok(0x600d));
    }
}

#[test]
fn a_device_that_was_in_d3hot_before_a_sleep_is_in_d0_after_it() {
    let leased = leased("nvme");
    leased.map.write(8, 0x600d).unwrap();
    leased.device.set_power_state(3);
    leased.is(LOW_POWER);
    observe::sleep();
    // Before anything that goes through the device fd and might notice it there.
    assert_eq!(leased.map.read(8), Ok(0x600d));
    assert_eq!(leased.device.function().power_state(), "D0");
    leased.is(State::Ok);
}

#[test]
fn a_device_that_was_in_low_power_before_a_sleep_is_in_low_power_after_it() {
    let leased = leased("nvme");
    leased.map.write(8, 0x600d).unwrap();
    enter_low_power(&leased.device);
    wait_until_suspended(&leased.device);
    observe::sleep();
    assert_eq!(leased.map.read(8), Err(Sigbus));
    leased.is(LOW_POWER);
    leave_low_power(&leased.device);
    leased.is(State::Ok);
    assert_eq!(leased.map.read(8), Ok(0x600d));
}

impl Leased {
    fn is_dead(&self) {
        assert_eq!(self.state(), State::Dead);
        assert_eq!(self.map.read(0), Err(Sigbus));
        self.page.read(0).unwrap();
    }
}

#[test]
fn memory_that_is_off_is_off_for_the_device_fd_too() {
    let leased = leased("display");
    leased.device.set_memory(false);
    let mut bytes = [0; 4];
    assert_eq!(leased.device.read(0, 0, &mut bytes), Err(EIO));
}
