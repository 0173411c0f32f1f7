//! Errors that a device reports (AER): what is leased is REVOKED until recovery succeeds, and then
//! what the device says.
#![cfg(barlease_guest)]

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use barlease::InterruptKind;
use barlease_abi::{ALIAS_WC, REASON_ERROR, REASON_MEMORY_OFF};
use barlease_guest_tests::{
    aer::{
        BAR, DEVICE, FATAL, NEIGHBOUR, NON_FATAL, end_of_recovery, inject, report_corrected,
        wait_for_recovery,
    },
    errno::{EIO, ENODEV},
    importer::{Attachment, Importer, KernelLog, check_that_nothing_is_left},
    lease::State,
    map::{How, Map, Sigbus},
    observe, page_size,
    pci::{self, BARLEASE, Function},
    process, race,
    vfio::{Device, IRQ_ACTION_TRIGGER, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, MSIX_IRQ},
    wait::{self, LONG},
};

/// Offset of feature bits (virtio 1.2, 4.1.4.3): neither all zeroes nor all ones while the device
/// answers.
const FEATURES: u64 = 4;

const ERROR: State = State::Revoked(REASON_ERROR);
const MEMORY_OFF: State = State::Revoked(REASON_MEMORY_OFF);

/// An open device, a lease of it in processes and in edu, and mappings through the device fd.
struct Scene {
    /// First, since it is dropped first: the close of the device waits for it.
    attachment: Attachment,
    device: Device,
    /// Signalled when the core is told of an error.
    told: OwnedFd,
    fd: OwnedFd,
    maps: [Map; 3],
    /// The value that is read at [`FEATURES`].
    features: u32,
}

impl Scene {
    fn new() -> Self {
        // Recovery wants that each function has a driver that takes part.
        Function::named(NEIGHBOUR).bind(BARLEASE);
        let device = Device::open(DEVICE);
        let told = process::eventfd();
        device.trigger(InterruptKind::Error, &told).unwrap();
        let fd = device.export(BAR, &[(0, 2 * page_size())]).unwrap();
        let alias = device.alias(BAR, ALIAS_WC).unwrap();
        let through_fd = |region: u32| {
            let offset = u64::from(region) << 40;
            How::shared().map(&device, offset, 2 * page_size()).unwrap()
        };
        let maps = [
            Map::new(&fd, 2 * page_size()).unwrap(),
            through_fd(BAR),
            through_fd(alias),
        ];
        let attachment = Importer::open().attach(&fd).unwrap();
        attachment.map().unwrap();
        let features = maps[0].read(FEATURES).unwrap();
        assert!(![0, u32::MAX].contains(&features), "{features:#x}");
        let scene = Self {
            device,
            told,
            fd,
            maps,
            attachment,
            features,
        };
        scene.is(State::Ok);
        scene
    }

    fn state(&self) -> State {
        self.device.state(&self.fd)
    }

    /// Checks that state and touches agree.
    fn is(&self, expected: State) {
        assert_eq!(self.state(), expected);
        for map in &self.maps {
            match expected {
                State::Ok => assert_eq!(map.read(FEATURES), Ok(self.features)),
                _ => assert_eq!(map.read(FEATURES), Err(Sigbus)),
            }
        }
    }

    /// The faults of touching everything: none as long as nothing was taken away.
    fn faults(&self) -> [i64; 3] {
        Map::anonymous(page_size()).touch_all().unwrap();
        [0, 1, 2].map(|n| observe::faults_of(|| assert!(self.maps[n].read(FEATURES).is_ok())))
    }

    /// The user is told.
    fn is_told(&self) {
        assert!(process::is_signalled_within(&self.told, LONG));
    }

    /// Injects an error that edu lets go at, and waits until it was handled.
    fn survives(&self, error: &str) {
        let mut log = KernelLog::from_now();
        inject(error);
        self.is_told();
        wait_for_recovery(&mut log);
    }

    /// Checks that everything was taken away once, and is there again.
    fn was_taken_away_and_given_back(&self) {
        let status = self.attachment.status();
        assert_eq!((status.mapped, status.interruptions), (0, 1));
        assert!(self.faults().iter().all(|&faults| faults > 0));
        self.is(State::Ok);
        self.attachment.map().unwrap();
    }
}

#[test]
fn an_error_takes_away_and_recovery_gives_back() {
    let scene = Scene::new();
    assert_eq!(scene.faults(), [0; 3]);
    scene.survives(NON_FATAL);
    scene.was_taken_away_and_given_back();
}

/// Opens another function, which may be in the group of one that is open.
fn open_beside(device: &Device, name: &str) -> Device {
    let function = Function::named(name);
    function.bind(BARLEASE);
    if function.group() != device.function().group() {
        return Device::open(name);
    }
    device.group().device(&function).unwrap()
}

/// Something that keeps recovery between its phases: a reset of the other function has that
/// function's device lock, and waits for an importer.
struct Stall {
    attachment: Attachment,
    device: Device,
}

impl Stall {
    fn new(scene: &Scene) -> Self {
        let device = open_beside(&scene.device, NEIGHBOUR);
        let fd = device.export(BAR, &[(0, page_size())]).unwrap();
        let attachment = Importer::open().attach(&fd).unwrap();
        attachment.map().unwrap();
        attachment.hold(true);
        Self { attachment, device }
    }

    /// Lets an error be detected, and runs `body` before recovery goes on.
    fn hold_up(&self, scene: &Scene, error: &str, body: impl FnOnce()) {
        wait::waits_for(
            || self.device.function().reset().unwrap(),
            || {
                self.attachment.wait_for_interruption();
                inject(error);
                scene.is_told();
                body();
            },
            || self.attachment.unmap().unwrap(),
        );
    }
}

#[test]
fn until_recovery_nobody_reaches_the_device() {
    let scene = Scene::new();
    let stall = Stall::new(&scene);
    let mut log = KernelLog::from_now();
    let mut late = None;
    stall.hold_up(&scene, NON_FATAL, || {
        scene.is(ERROR);
        assert_eq!(scene.attachment.status().mapped, 0);
        // A buffer that is exported now is born REVOKED; an mmap works, an attachment does not.
        let fd = scene.device.export(BAR, &[(0, page_size())]).unwrap();
        assert_eq!(scene.device.state(&fd), ERROR);
        let map = Map::new(&fd, page_size()).unwrap();
        assert_eq!(map.read(FEATURES), Err(Sigbus));
        assert_eq!(Importer::open().attach(&fd).unwrap_err(), ENODEV);
        // Neither a COMMAND write nor a reset gives anything back.
        scene.device.set_command(scene.device.command());
        scene.is(ERROR);
        scene.device.reset().unwrap();
        scene.is(ERROR);
        late = Some(map);
    });
    wait_for_recovery(&mut log);
    scene.is(State::Ok);
    late.unwrap().read(FEATURES).unwrap();
    scene.attachment.map().unwrap();
}

/// The kernel calls with a lock that every hot-plug takes: who does not let go delays nobody.
#[test]
fn importers_are_told_of_an_error_and_not_waited_for() {
    let scene = Scene::new();
    scene.attachment.hold(true);
    wait::at_once("recovery", || scene.survives(NON_FATAL));
    let status = scene.attachment.status();
    assert_eq!((status.mapped, status.interruptions), (1, 1));
    // CPU mappings were taken away all the same.
    assert!(scene.faults().iter().all(|&faults| faults > 0));
    scene.is(State::Ok);
    // Another event waits for it.
    wait::waits_for(
        || scene.device.set_memory(false),
        || scene.attachment.wait_for_interruption(),
        || scene.attachment.unmap().unwrap(),
    );
    scene.is(MEMORY_OFF);
}

/// A process can make an importer keep the lock for long, as by a mapping of many ranges.
#[test]
fn an_error_does_not_wait_for_a_reservation_lock_that_an_importer_keeps() {
    let scene = Scene::new();
    let mut log = KernelLog::from_now();
    scene.attachment.occupied(|| {
        wait::at_once("recovery", || {
            inject(FATAL);
            wait_for_recovery(&mut log);
        });
    });
    // It is told when that can be done.
    scene.attachment.wait_for_interruption();
    scene.is(MEMORY_OFF);
}

/// Importers that could not be told at once are told later, those of each lease as soon as
/// possible.
#[test]
fn a_reservation_lock_that_is_kept_keeps_no_other_importer_from_being_told_of_an_error() {
    let scene = Scene::new();
    let other = scene.device.export(BAR, &[(0, page_size())]).unwrap();
    let attachment = Importer::open().attach(&other).unwrap();
    attachment.map().unwrap();
    let mut log = KernelLog::from_now();
    scene.attachment.occupied(|| {
        attachment.occupied(|| {
            wait::at_once("recovery", || {
                inject(FATAL);
                wait_for_recovery(&mut log);
            });
        });
        attachment.wait_for_interruption();
    });
    scene.attachment.wait_for_interruption();
    scene.is(MEMORY_OFF);
}

/// Opening enables and resets the function; the other one, and the link, may still be in recovery.
#[test]
fn opening_the_device_does_not_end_a_recovery() {
    let scene = Scene::new();
    let stall = Stall::new(&scene);
    let mut log = KernelLog::from_now();
    wait::waits_for(
        || stall.device.function().reset().unwrap(),
        || {
            stall.attachment.wait_for_interruption();
            inject(NON_FATAL);
            scene.is_told();
            drop(scene);
            let device = open_beside(&stall.device, DEVICE);
            let fd = device.export(BAR, &[(0, page_size())]).unwrap();
            assert_eq!(device.state(&fd), ERROR);
            let map = Map::new(&fd, page_size()).unwrap();
            assert_eq!(map.read(FEATURES), Err(Sigbus));
        },
        || stall.attachment.unmap().unwrap(),
    );
    wait_for_recovery(&mut log);
    drop(stall);
    Scene::new().is(State::Ok);
}

#[test]
fn each_of_several_errors_takes_away() {
    let scene = Scene::new();
    for round in 1..=3 {
        scene.survives(NON_FATAL);
        assert_eq!(scene.attachment.status().interruptions, round);
        scene.is(State::Ok);
        scene.attachment.map().unwrap();
    }
}

#[test]
fn a_corrected_error_takes_nothing_away() {
    let scene = Scene::new();
    report_corrected();
    // Errors are handled one after the other.
    scene.survives(NON_FATAL);
    assert_eq!(scene.attachment.status().interruptions, 1);
}

#[test]
fn recovery_with_memory_off_gives_nothing_back() {
    let scene = Scene::new();
    scene.device.set_memory(false);
    scene.survives(NON_FATAL);
    scene.is(MEMORY_OFF);
    scene.device.set_memory(true);
    scene.is(State::Ok);
}

/// Finds the device anew when dropped. A reset of the link turns off the reporting of errors, and
/// nobody else turns it on again.
struct Anew;

impl Drop for Anew {
    fn drop(&mut self) {
        for name in [DEVICE, NEIGHBOUR] {
            Function::named(name).remove();
        }
        pci::rescan();
    }
}

/// Recovery resets the link and leaves it to the driver to restore config space. The core leaves it
/// to the user, who reads a COMMAND that is as it was; the device decodes nothing until COMMAND is
/// written.
#[test]
fn after_a_reset_of_the_link_memory_is_off_until_command_is_written() {
    let _anew = Anew;
    let scene = Scene::new();
    scene.survives(FATAL);
    scene.is(MEMORY_OFF);
    assert_eq!(scene.attachment.map(), Err(ENODEV));
    scene.device.set_memory(true);
    scene.was_taken_away_and_given_back();
}

/// Setting up interrupts turns memory on for a moment, and off again.
#[test]
fn what_an_error_took_is_not_given_back_by_setting_up_interrupts() {
    let _anew = Anew;
    let scene = Scene::new();
    scene.survives(FATAL);
    scene.is(MEMORY_OFF);
    interrupts_give_nothing_back(&scene.device, || scene.is(MEMORY_OFF));
    scene.device.set_memory(true);
    scene.was_taken_away_and_given_back();
}

/// The same without an error: a function that loses its config space in D3hot gets back what it had
/// then.
#[test]
fn what_a_sleep_took_is_not_given_back_by_setting_up_interrupts() {
    let device = Device::open("igb");
    let [control]: [u8; 1] = device.config(device.pmcsr());
    assert_eq!(control & NO_SOFT_RESET, 0, "the device keeps what it has");
    let fd = device.export(0, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    device.set_memory(false);
    device.set_power_state(3);
    device.set_memory(true);
    device.set_power_state(0);
    let is = |expected: State| {
        assert_eq!(device.state(&fd), expected);
        assert_eq!(map.read(0).is_ok(), expected == State::Ok);
    };
    is(MEMORY_OFF);
    interrupts_give_nothing_back(&device, || is(MEMORY_OFF));
    // Nor by the end of a write that leaves things as they are.
    interrupts_give_nothing_back(&device, || {
        device.set_power_state(0);
        is(MEMORY_OFF);
    });
    device.set_memory(true);
    is(State::Ok);
}

/// Of PMCSR: a way from D3hot to D0 is no reset.
const NO_SOFT_RESET: u8 = 1 << 3;

/// Sets up interrupts and takes them down while others ask about the device and `check` is called.
fn interrupts_give_nothing_back(device: &Device, check: impl Fn()) {
    let event = process::eventfd();
    let interrupts = || {
        let on = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
        let _ = device.set_irqs(MSIX_IRQ, on, 1, &[event.as_raw_fd()]);
        let off = IRQ_DATA_NONE | IRQ_ACTION_TRIGGER;
        let _ = device.set_irqs(MSIX_IRQ, off, 0, &[]);
    };
    let ask = || device.info().map(drop).unwrap();
    race::meanwhile(&[&interrupts, &ask], || {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(2) {
            check();
        }
    });
    check();
}

#[test]
fn a_reset_by_ioctl_after_a_reset_of_the_link_does_not_give_back_what_is_not_there() {
    let _anew = Anew;
    let scene = Scene::new();
    scene.survives(FATAL);
    // The kernel saves and restores what the error has left.
    scene.device.reset().unwrap();
    scene.is(MEMORY_OFF);
    scene.device.set_memory(true);
    scene.was_taken_away_and_given_back();
}

#[test]
fn an_error_that_nobody_recovers_from_lasts_until_the_device_is_opened_again() {
    let _anew = Anew;
    let scene = Scene::new();
    Function::named(NEIGHBOUR).unbind();
    let mut log = KernelLog::from_now();
    inject(NON_FATAL);
    scene.is_told();
    assert_eq!(end_of_recovery(&mut log), "failed");
    scene.is(ERROR);
    scene.device.set_memory(false);
    scene.device.set_memory(true);
    scene.device.reset().unwrap();
    scene.is(ERROR);
    assert_eq!(scene.attachment.map(), Err(ENODEV));
    drop(scene);
    Scene::new().is(State::Ok);
}

#[test]
fn an_error_of_one_function_takes_away_from_the_other() {
    let scene = Scene::new();
    let other = open_beside(&scene.device, NEIGHBOUR);
    let told = process::eventfd();
    other.trigger(InterruptKind::Error, &told).unwrap();
    let fd = other.export(BAR, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    let features = map.read(FEATURES);
    scene.survives(NON_FATAL);
    assert!(process::is_signalled_within(&told, LONG));
    let status = attachment.status();
    assert_eq!((status.mapped, status.interruptions), (0, 1));
    assert_eq!(other.state(&fd), State::Ok);
    let touch = || assert_eq!(map.read(FEATURES), features);
    assert!(observe::faults_of(touch) > 0);
}

#[test]
fn an_error_leaves_other_devices_alone() {
    let scene = Scene::new();
    let other = Device::open("memory");
    let fd = other.export(2, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    map.read(0).unwrap();
    scene.survives(NON_FATAL);
    assert_eq!(attachment.status().interruptions, 0);
    assert_eq!(observe::faults_of(|| assert!(map.read(0).is_ok())), 0);
}

#[test]
fn an_error_of_a_device_that_is_not_open_does_not_outlast_it() {
    drop(Scene::new());
    let mut log = KernelLog::from_now();
    inject(NON_FATAL);
    wait_for_recovery(&mut log);
    drop(Scene::new());
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&[DEVICE, NEIGHBOUR, "memory", "igb"]);
}

/// A fatal error leaves the device reset and not restored: it decodes nothing, which stock vfio-pci
/// does not look at.
#[test]
fn reads_and_writes_are_refused_until_the_device_is_restored() {
    let _anew = Anew;
    let scene = Scene::new();
    let alias = scene.device.alias(BAR, ALIAS_WC).unwrap();
    let reads = || {
        [BAR, alias].map(|region| {
            let mut bytes = [0; 4];
            let read = scene.device.read(region, FEATURES, &mut bytes);
            read.map(|_| u32::from_ne_bytes(bytes))
        })
    };
    assert_eq!(reads(), [Ok(scene.features); 2]);
    scene.survives(FATAL);
    scene.is(MEMORY_OFF);
    assert_eq!(reads(), [Err(EIO); 2]);
    let written = scene.device.write(BAR, FEATURES, &[0; 4]);
    assert_eq!(written, Err(EIO));
    scene.device.set_memory(true);
    assert_eq!(reads(), [Ok(scene.features); 2]);
}
