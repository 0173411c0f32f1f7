//! Virtual functions (SR-IOV): leases of them, and what takes these away.
#![cfg(barlease_guest)]

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use barlease::InterruptKind;
use barlease_guest_tests::{
    errno::{Answer, EACCES, EBADFD, ENODEV, ENOENT},
    importer::{Attachment, Importer, check_that_nothing_is_left},
    lease::{self, State},
    map::{How, Map, Sigbus},
    observe, page_size,
    pci::{self, BARLEASE, Function, STOCK},
    process,
    vfio::{COMMAND_MEMORY, Device, Group, SET, VF_TOKEN},
    wait::{self, LONG},
    witness::sysfs,
};

/// Every function that may be opened with it is opened with it.
const TOKEN: &str = "3f8a1c52-90d7-4b6e-8e21-5ac4d07b9f16";

/// Registers of a virtual function, and of the physical one.
const BAR: u32 = 0;
/// igb, VTRDBAL (Intel 82576 Datasheet, 8.26): the lower half of an address, which reads as what
/// was written.
const REGISTER: u64 = 0x2800;
/// Bytes that are leased.
fn bytes() -> u64 {
    3 * page_size()
}

/// The physical function with this driver, open, and so many virtual functions of it. These are
/// gone when it is dropped.
struct Physical {
    device: Device,
    functions: Vec<Function>,
    parameter: PathBuf,
}

fn token_bytes() -> Vec<u8> {
    let digits: String = TOKEN.chars().filter(|&digit| digit != '-').collect();
    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    (0..32).step_by(2).map(byte).collect()
}

fn set_number(function: &Function, number: u32) -> Answer<()> {
    pci::write(&sysfs(function, "sriov_numvfs"), &number.to_string())
}

impl Physical {
    fn with(driver: &str, number: u32) -> Self {
        let device = Device::open_with("igb", driver);
        device.feature(SET | VF_TOKEN, &mut token_bytes()).unwrap();
        let module = driver.replace('-', "_");
        let parameter = format!("/sys/module/{module}/parameters/enable_sriov");
        pci::write(Path::new(&parameter), "1").unwrap();
        let mut this = Self {
            device,
            functions: Vec::new(),
            parameter: parameter.into(),
        };
        this.make(number);
        this
    }

    fn new(number: u32) -> Self {
        Self::with(BARLEASE, number)
    }

    fn make(&mut self, number: u32) {
        let physical = self.device.function();
        set_number(physical, number).unwrap();
        let nth = |n: u32| {
            let link = fs::read_link(sysfs(physical, &format!("virtfn{n}"))).unwrap();
            let bdf = link.file_name().unwrap().to_string_lossy().into_owned();
            Function { bdf }
        };
        self.functions = (0..number).map(nth).collect();
    }

    fn group(&self, function: &Function) -> Arc<Group> {
        if function.group() == self.device.function().group() {
            Arc::clone(self.device.group())
        } else {
            Group::open(function)
        }
    }

    fn open(&self, n: usize) -> Device {
        let function = &self.functions[n];
        let group = self.group(function);
        group.device_with_token(function, TOKEN).unwrap()
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // Waits for who has one of them open.
        let _ = set_number(self.device.function(), 0);
        let _ = pci::write(&self.parameter, "0");
    }
}

/// A virtual function that is open, with a lease of its registers, and everything that can reach
/// them.
struct Virtual {
    /// First, since it is dropped first: the close of the device waits for it.
    attachment: Attachment,
    device: Device,
    /// Signalled when the device is wanted back.
    wanted: OwnedFd,
    fd: OwnedFd,
    map: Map,
    bar: Map,
}

impl Virtual {
    fn of(physical: &Physical, n: usize) -> Self {
        let device = physical.open(n);
        let wanted = process::eventfd();
        device.trigger(InterruptKind::Request, &wanted).unwrap();
        let fd = device.export(BAR, &[(0, bytes())]).unwrap();
        let map = Map::new(&fd, bytes()).unwrap();
        let bar = How::shared().map(&device, 0, bytes()).unwrap();
        let attachment = Importer::open().attach(&fd).unwrap();
        let this = Self {
            attachment,
            device,
            wanted,
            fd,
            map,
            bar,
        };
        this.is_ok();
        this.reaches_its_registers();
        this.attachment.map().unwrap();
        this
    }

    fn is_ok(&self) {
        assert_eq!(self.device.state(&self.fd), State::Ok);
        self.map.touch_all().unwrap();
        self.bar.touch_all().unwrap();
    }

    fn reaches_its_registers(&self) {
        for (map, value) in [(&self.map, 0x1234_5000), (&self.bar, 0x0fed_c000)] {
            map.write(REGISTER, value).unwrap();
            assert_eq!(self.map.read(REGISTER), Ok(value));
            assert_eq!(self.device.read32(BAR, REGISTER), value);
        }
    }

    /// How often a device lost its way to the registers, and how many of the mappings a process
    /// did.
    fn losses(&self) -> (u32, i64) {
        let interruptions = self.attachment.status().interruptions;
        let touch = || {
            self.map.read(REGISTER).unwrap();
            self.bar.read(REGISTER).unwrap();
        };
        (interruptions, observe::faults_of(touch))
    }

    /// Everybody lost what they had, and can have it again.
    fn is_taken_away_and_given_back_by<R>(&self, act: impl FnOnce(&Device) -> R) -> R {
        self.is_ok();
        let (before, faults) = self.losses();
        assert_eq!(faults, 0);
        let result = act(&self.device);
        assert_eq!(self.losses(), (before + 1, 2));
        assert!(!self.attachment.is_mapped());
        self.is_ok();
        self.attachment.map().unwrap();
        result
    }

    /// Nobody notices.
    fn is_left_alone_by<R>(&self, act: impl FnOnce() -> R) -> R {
        self.is_ok();
        let (before, _) = self.losses();
        let result = act();
        assert_eq!(self.losses(), (before, 0));
        assert!(self.attachment.is_mapped());
        self.is_ok();
        result
    }
}

fn is_dead(fd: &OwnedFd, map: &Map) {
    assert_eq!(map.read(0), Err(Sigbus));
    assert_eq!(map.write(REGISTER, 0), Err(Sigbus));
    assert_eq!(Map::new(fd, page_size()).map(drop), Err(ENODEV));
    assert_eq!(lease::size(fd), bytes());
}

// ---- Making and opening -------------------------------------------------------------------------

#[test]
fn virtual_functions_are_made_where_the_module_parameter_allows_it() {
    for driver in [STOCK, BARLEASE] {
        let device = Device::open_with("igb", driver);
        assert_eq!(set_number(device.function(), 1), Err(ENOENT), "{driver}");
        drop(device);
        let physical = Physical::with(driver, 2);
        for function in &physical.functions {
            assert_eq!(function.driver().as_deref(), Some(driver));
        }
    }
}

#[test]
fn virtual_functions_are_opened_with_the_token_of_the_physical_one() {
    for driver in [STOCK, BARLEASE] {
        let physical = Physical::with(driver, 1);
        let function = &physical.functions[0];
        let group = physical.group(function);
        let other = TOKEN.replace('3', "4");
        let refused = [
            group.device(function),
            group.device_with_token(function, &other),
        ];
        for answer in refused {
            assert_eq!(answer.map(drop), Err(EACCES), "{driver}");
        }
        let device = group.device_with_token(function, TOKEN).unwrap();
        device.info().unwrap();
    }
}

// ---- Leases -------------------------------------------------------------------------------------

#[test]
fn a_lease_of_a_virtual_function_is_revoked_alone() {
    let physical = Physical::new(2);
    let [first, second] = [0, 1].map(|n| Virtual::of(&physical, n));
    let beside = first.device.export(BAR, &[(0, page_size())]).unwrap();
    let beside = Map::new(&beside, page_size()).unwrap();
    beside.touch_all().unwrap();
    second.is_left_alone_by(|| first.device.revoke(&first.fd).unwrap());
    is_dead(&first.fd, &first.map);
    assert!(!first.attachment.is_mapped());
    assert_eq!(first.attachment.map(), Err(ENODEV));
    assert_eq!(first.device.revoke(&first.fd), Err(EBADFD));
    beside.touch_all().unwrap();
    first.bar.touch_all().unwrap();
    // It is another device's.
    assert_eq!(second.device.revoke(&first.fd), Err(ENODEV));
}

#[test]
fn a_reset_of_a_virtual_function_takes_its_leases_away_and_gives_them_back() {
    let physical = Physical::new(2);
    let [first, second] = [0, 1].map(|n| Virtual::of(&physical, n));
    second.is_left_alone_by(|| {
        first.is_taken_away_and_given_back_by(|device| device.reset().unwrap());
        first.is_taken_away_and_given_back_by(|device| device.function().reset().unwrap());
    });
    first.reaches_its_registers();
}

/// The memory bit of its COMMAND means nothing (SR-IOV, 9.3.4.1.3); what its user reads is the
/// kernel's invention. Stock's mappings stay, too. An emulated one has the bit, and does not answer
/// without it.
#[test]
fn a_virtual_function_whose_memory_bit_is_cleared_stays_accessible() {
    for driver in [STOCK, BARLEASE] {
        let physical = Physical::with(driver, 1);
        let device = physical.open(0);
        let bar = How::shared().map(&device, 0, bytes()).unwrap();
        assert_ne!(device.command() & COMMAND_MEMORY, 0, "{driver}");
        for on in [false, true] {
            device.set_memory(on);
            assert_eq!(device.command() & COMMAND_MEMORY != 0, on, "{driver}");
            assert!(bar.touch_all().is_ok(), "{driver}");
        }
    }
    let physical = Physical::new(1);
    let leased = Virtual::of(&physical, 0);
    for on in [false, false, true] {
        leased.is_taken_away_and_given_back_by(|device| device.set_memory(on));
    }
    leased.reaches_its_registers();
}

/// Stock's mappings of virtual functions stay, too. Their answers meanwhile are their own affair.
#[test]
fn a_reset_of_the_physical_function_leaves_virtual_ones_alone() {
    for driver in [STOCK, BARLEASE] {
        let physical = Physical::with(driver, 1);
        let device = physical.open(0);
        let bar = How::shared().map(&device, 0, bytes()).unwrap();
        bar.touch_all().unwrap();
        let faults = observe::faults_of(|| {
            physical.device.reset().unwrap();
            assert!(bar.touch_all().is_ok(), "{driver}");
        });
        assert_eq!(faults, 0, "{driver}");
    }
    let physical = Physical::new(1);
    let own = physical.device.export(BAR, &[(0, page_size())]).unwrap();
    let own = Map::new(&own, page_size()).unwrap();
    own.touch_all().unwrap();
    let leased = Virtual::of(&physical, 0);
    leased.is_left_alone_by(|| physical.device.reset().unwrap());
    assert_eq!(observe::faults_of(|| own.touch_all().unwrap()), 1);
    // An emulated one has lost its memory bit.
    leased.is_taken_away_and_given_back_by(|device| device.set_memory(true));
    leased.reaches_its_registers();
}

#[test]
fn memory_off_of_the_physical_function_leaves_virtual_ones_alone() {
    let physical = Physical::new(1);
    let own = physical.device.export(BAR, &[(0, page_size())]).unwrap();
    let own = Map::new(&own, page_size()).unwrap();
    let leased = Virtual::of(&physical, 0);
    leased.is_left_alone_by(|| physical.device.set_memory(false));
    assert_eq!(own.read(0), Err(Sigbus));
    leased.reaches_its_registers();
    physical.device.set_memory(true);
    own.touch_all().unwrap();
}

/// The core keeps it in D0 (`vfio_pci_set_power_state`).
#[test]
fn a_physical_function_that_has_virtual_ones_does_not_sleep() {
    let physical = Physical::new(1);
    let own = physical.device.export(BAR, &[(0, page_size())]).unwrap();
    let map = Map::new(&own, page_size()).unwrap();
    let leased = Virtual::of(&physical, 0);
    leased.is_left_alone_by(|| physical.device.set_power_state(3));
    assert_eq!(physical.device.function().power_state(), "D0");
    assert_eq!(physical.device.state(&own), State::Ok);
    map.touch_all().unwrap();
}

/// Making virtual functions wakes the physical one: it is what it says, D0.
#[test]
fn a_physical_function_that_was_woken_for_virtual_ones_is_accessible() {
    let mut physical = Physical::new(0);
    let own = physical.device.export(BAR, &[(0, page_size())]).unwrap();
    let map = Map::new(&own, page_size()).unwrap();
    physical.device.set_power_state(3);
    assert_eq!(map.read(0), Err(Sigbus));
    physical.make(1);
    assert_eq!(physical.device.function().power_state(), "D0");
    // Before any access through the device fd, which would notice.
    map.touch_all().unwrap();
    assert_eq!(physical.device.state(&own), State::Ok);
}

// ---- The end ------------------------------------------------------------------------------------

/// Virtual functions go; `act` makes them. They are leased until their owner, who is asked to,
/// closes them.
fn ends_when_the_owner_closes_it(physical: &Physical, act: impl FnOnce() + Send) {
    let leased = Virtual::of(physical, 0);
    // The holder is not asked, nor is an importer that lets go when it is told.
    let Virtual {
        attachment,
        device,
        wanted,
        fd,
        map,
        bar,
    } = leased;
    let opened = Mutex::new(Some((device, bar)));
    let meanwhile = || {
        assert!(process::is_signalled_within(&wanted, LONG));
        let opened = opened.lock().unwrap();
        let (device, bar) = opened.as_ref().unwrap();
        assert_eq!(device.state(&fd), State::Ok);
        map.touch_all().unwrap();
        bar.touch_all().unwrap();
        assert!(attachment.is_mapped());
        let another = device.export(BAR, &[(0, page_size())]).unwrap();
        Map::new(&another, page_size())
            .unwrap()
            .touch_all()
            .unwrap();
    };
    wait::waits_for(act, meanwhile, || drop(opened.lock().unwrap().take()));
    is_dead(&fd, &map);
    assert!(!attachment.is_mapped());
    assert_eq!(attachment.status().interruptions, 1);
    assert_eq!(attachment.map(), Err(ENODEV));
}

#[test]
fn virtual_functions_that_are_to_go_are_leased_until_their_owner_closes_them() {
    let mut physical = Physical::new(2);
    let function = physical.device.function().clone();
    for _ in 0..2 {
        ends_when_the_owner_closes_it(&physical, || set_number(&function, 0).unwrap());
        assert!(!physical.functions[0].exists());
        physical.make(2);
        drop(Virtual::of(&physical, 0));
    }
    drop(physical);
    check_that_nothing_is_left(&["igb"]);
}

#[test]
fn a_lease_of_a_virtual_function_that_is_gone_stays_dead_when_it_is_made_again() {
    let mut physical = Physical::new(1);
    let Virtual {
        attachment,
        device,
        fd,
        map,
        bar,
        ..
    } = Virtual::of(&physical, 0);
    drop((device, bar));
    set_number(physical.device.function(), 0).unwrap();
    is_dead(&fd, &map);
    physical.make(1);
    let again = Virtual::of(&physical, 0);
    is_dead(&fd, &map);
    assert_eq!(attachment.map(), Err(ENODEV));
    assert_eq!(again.device.revoke(&fd), Err(ENODEV));
    again.is_ok();
}
