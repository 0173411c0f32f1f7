//! Devices as lease holders: what takes a buffer away takes it from devices too, before it returns.
#![cfg(barlease_guest)]

use std::{
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use barlease_guest_tests::{
    errno::{ENODEV, ENOMEM},
    importer::{
        Attachment, Domain, EDU, Importer, KernelLog,
        abi::{FROM_DEVICE, TO_DEVICE},
        check_that_nothing_is_left,
    },
    lease::State,
    map::{Map, Sigbus},
    observe, page_size,
    pci::{BARLEASE, Function},
    race,
    vfio::{COMMAND_MASTER, Device, Group, LOW_POWER_ENTRY, LOW_POWER_EXIT, SET},
    wait,
};

/// The BAR that is memory, in all devices that are used here.
const BAR: u32 = 2;

/// Where the leases are in the BAR.
fn place() -> u64 {
    16 * page_size()
}

/// A mapping of one range goes through the kernel's own helper, one of several through ours.
fn shapes() -> [Vec<(u64, u64)>; 2] {
    [
        vec![(place(), 2 * page_size())],
        vec![(place() + page_size(), page_size()), (place(), page_size())],
    ]
}

/// The pattern that the CPU writes.
const PATTERN: u32 = 0x600d_f00d;
/// The pattern that edu writes.
const INTRUDER: u8 = 0x66;
/// Bytes that are moved.
const LENGTH: usize = 512;

/// A lease that edu has mapped, with a pattern in it.
struct Scene {
    device: Device,
    fd: OwnedFd,
    attachment: Attachment,
}

fn open(name: &str) -> Device {
    let device = Device::open(name);
    if name == "nvme" {
        enable_cmb(&device);
    }
    device
}

/// An NVMe controller's memory buffer is there once it is switched on (NVMe 1.4, 3.1.13: CMBMSC).
fn enable_cmb(device: &Device) {
    device.write32(0, 0x50, 1);
}

impl Scene {
    fn new(device: Device, ranges: &[(u64, u64)]) -> Self {
        let fd = device.export(BAR, ranges).expect("an export");
        let attachment = Importer::open().attach(&fd).expect("an attachment");
        attachment.map().expect("a mapping");
        let scene = Self {
            device,
            fd,
            attachment,
        };
        fill(&scene.device);
        assert_eq!(scene.attachment.read(0, LENGTH).unwrap(), pattern());
        scene
    }

    /// Checks that edu has nothing any more, and cannot get at anything.
    fn is_taken_away(&self) {
        let status = self.attachment.status();
        assert_eq!((status.mapped, status.interruptions), (0, 1));
        for at in [0, page_size(), 2 * page_size() - 1] {
            assert_eq!(self.attachment.translate(at), None, "offset {at:#x}");
        }
        assert_eq!(self.attachment.map(), Err(ENODEV));
        self.tries_to_intrude();
    }

    /// Lets edu use the addresses that it had.
    fn tries_to_intrude(&self) {
        self.attachment.write_stale(0, &[INTRUDER; LENGTH]);
        let read = self.attachment.read_stale(0, LENGTH);
        assert!(read.chunks(4).all(|word| word != PATTERN.to_le_bytes()));
    }

    /// Checks that what edu tried did not land, not even now that the memory is there again, and
    /// that it can map again.
    fn is_given_back(&self) {
        assert_eq!(self.device.state(&self.fd), State::Ok);
        check_pattern(&self.device);
        self.tries_to_intrude();
        check_pattern(&self.device);
        self.attachment.map().expect("mapped again");
        let bytes = [0x77; LENGTH];
        self.attachment.write(page_size(), &bytes).unwrap();
        assert_eq!(self.attachment.read(page_size(), LENGTH).unwrap(), bytes);
        assert_eq!(self.attachment.status().interruptions, 1);
    }
}

fn pattern() -> Vec<u8> {
    PATTERN.to_le_bytes().repeat(LENGTH / 4)
}

fn bar(device: &Device) -> Map {
    Map::new(
        device.export(BAR, &[(place(), 2 * page_size())]).unwrap(),
        2 * page_size(),
    )
    .unwrap()
}

fn fill(device: &Device) {
    let bar = bar(device);
    for offset in (0..2 * page_size()).step_by(4) {
        bar.write(offset, PATTERN).unwrap();
    }
}

fn check_pattern(device: &Device) {
    let bar = bar(device);
    for offset in (0..2 * page_size()).step_by(4) {
        assert_eq!(bar.read(offset), Ok(PATTERN), "offset {offset:#x}");
    }
}

/// An event that takes away, and what gives back.
fn check(name: &str, event: impl Fn(&Device), undo: impl Fn(&Device)) {
    for ranges in shapes() {
        let scene = Scene::new(open(name), &ranges);
        event(&scene.device);
        scene.is_taken_away();
        undo(&scene.device);
        scene.is_given_back();
    }
}

/// An event that is over when it returns.
fn check_passing(name: &str, event: impl Fn(&Device)) {
    for ranges in shapes() {
        let scene = Scene::new(open(name), &ranges);
        event(&scene.device);
        if name == "nvme" {
            enable_cmb(&scene.device);
        }
        let status = scene.attachment.status();
        assert_eq!((status.mapped, status.interruptions), (0, 1));
        scene.is_given_back();
    }
}

#[test]
fn revoke_takes_away_from_devices_for_good() {
    for ranges in shapes() {
        let scene = Scene::new(open("memory"), &ranges);
        scene.device.revoke(&scene.fd).unwrap();
        scene.is_taken_away();
        check_pattern(&scene.device);
        scene.device.set_memory(false);
        scene.device.set_memory(true);
        assert_eq!(scene.attachment.map(), Err(ENODEV));
        scene.tries_to_intrude();
        check_pattern(&scene.device);
    }
}

#[test]
fn revoke_leaves_other_buffers_of_the_same_range_mapped() {
    let scene = Scene::new(open("memory"), &shapes()[1]);
    let other = scene.device.export(BAR, &shapes()[1]).unwrap();
    scene.device.revoke(&other).unwrap();
    let status = scene.attachment.status();
    assert_eq!((status.mapped, status.invalidations), (1, 0));
    let other = scene.device.export(BAR, &shapes()[1]).unwrap();
    let attachment = Importer::open().attach(&other).unwrap();
    attachment.map().unwrap();
    scene.device.revoke(&scene.fd).unwrap();
    assert!(attachment.is_mapped());
    attachment.write(0, &[3; LENGTH]).unwrap();
    assert_eq!(attachment.read(0, LENGTH).unwrap(), [3; LENGTH]);
}

#[test]
fn memory_off_takes_away_from_devices_until_it_is_on() {
    check(
        "memory",
        |device| device.set_memory(false),
        |device| device.set_memory(true),
    );
}

#[test]
fn blocked_dma_is_a_fault_in_the_log() {
    let scene = Scene::new(open("memory"), &shapes()[1]);
    let function = Function::named(EDU);
    let mut log = KernelLog::from_now();
    scene.device.revoke(&scene.fd).unwrap();
    let (_, slot) = function.bdf.split_once(':').unwrap();
    let kinds = ["DMA Write", "DMA Read"];
    let mut lines = Vec::new();
    // The kernel logs ten faults of all devices in five seconds, and tests before this one had
    // many.
    wait::until("faults of both kinds in the log", || {
        scene.tries_to_intrude();
        lines.extend(log.lines());
        let fault = |kind| {
            let of_it = |line: &String| line.contains(kind) && line.contains(slot);
            lines.iter().any(of_it)
        };
        kinds.into_iter().all(fault)
    });
}

#[test]
fn d3hot_takes_away_from_devices_until_d0() {
    check(
        "nvme",
        |device| device.set_power_state(3),
        |device| {
            device.set_power_state(0);
            device.set_memory(true);
            enable_cmb(device);
        },
    );
}

#[test]
fn low_power_takes_away_from_devices_until_its_exit() {
    check(
        "nvme",
        |device| {
            device.feature(SET | LOW_POWER_ENTRY, &mut []).unwrap();
        },
        |device| {
            device.feature(SET | LOW_POWER_EXIT, &mut []).unwrap();
            enable_cmb(device);
        },
    );
}

#[test]
fn a_reset_by_ioctl_takes_away_from_devices() {
    check_passing("memory", |device| device.reset().unwrap());
}

#[test]
fn a_reset_through_sysfs_takes_away_from_devices() {
    check_passing("memory", |device| device.function().reset().unwrap());
}

#[test]
fn a_reset_through_config_space_takes_away_from_devices() {
    check_passing("nvme", |device| {
        let control = device.capability(0x10).expect("PCI Express") + 8;
        let before = u16::from_le_bytes(device.config(control));
        device.set_config(control, &(before | 0x8000).to_le_bytes());
    });
}

#[test]
fn a_hot_reset_by_another_function_takes_away_from_devices() {
    for ranges in shapes() {
        let functions = ["pair0", "pair1"].map(Function::named);
        functions
            .iter()
            .for_each(|function| function.bind(BARLEASE));
        let group = Group::open(&functions[0]);
        let [device, other] = functions.map(|function| group.device(&function).unwrap());
        let scene = Scene::new(device, &ranges);
        other.hot_reset(&[&group]).unwrap();
        let status = scene.attachment.status();
        assert_eq!((status.mapped, status.interruptions), (0, 1));
        scene.is_given_back();
    }
}

#[test]
fn system_sleep_takes_away_from_devices() {
    check_passing("memory", |_| {
        assert!(observe::pretend_to_sleep(), "this kernel cannot pretend");
    });
}

#[test]
fn a_real_system_sleep_takes_away_from_devices() {
    check_passing("memory", |_| observe::sleep());
}

#[test]
fn the_close_of_the_device_takes_away_from_devices_for_good() {
    for ranges in shapes() {
        let Scene {
            device,
            fd,
            attachment,
        } = Scene::new(open("memory"), &ranges);
        drop(device);
        let status = attachment.status();
        assert_eq!((status.mapped, status.interruptions), (0, 1));
        let device = open("memory");
        let scene = Scene {
            device,
            fd,
            attachment,
        };
        scene.is_taken_away();
        check_pattern(&scene.device);
    }
}

/// Maps. The addresses of earlier mappings are free again a little later where the IOMMU is lazy.
fn map_when_there_are_addresses(attachment: &Attachment) {
    wait::until("addresses", || match attachment.map() {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error, ENOMEM);
            false
        }
    });
}

/// A device that forgets late what it may reach: DMA that is under way when REVOKE comes must be
/// over or blocked when it returns.
#[test]
fn no_dma_lands_after_revoke_where_the_iommu_is_lazy() {
    const MARK: u32 = 0x1111_1111;
    let _domain = Domain::set("DMA-FQ");
    let importer = Importer::open();
    // A buffer that has no place in one piece, see
    // `what_does_not_fit_in_one_piece_is_mapped_in_several`.
    let pieces: &[(u64, u64)] = &[(2 << 30, 512 << 20), (1 << 30, 256 << 20)];
    let cases = [
        ("memory", &shapes()[0][..], 1),
        ("memory", &shapes()[1], 1),
        ("big", pieces, 2),
    ];
    for (name, ranges, entries) in cases {
        let device = open(name);
        let first_page = device.export(BAR, &[(ranges[0].0, page_size())]).unwrap();
        let first_page = Map::new(first_page, page_size()).unwrap();
        // The engine reaches the lease some 0.2 s after it was started.
        for delay in (182..202).step_by(2).map(Duration::from_millis) {
            let fd = device.export(BAR, ranges).unwrap();
            let attachment = importer.attach(&fd).unwrap();
            map_when_there_are_addresses(&attachment);
            assert_eq!(attachment.entries().len(), entries);
            // Now the IOMMU knows the addresses.
            attachment.read(0, 64).unwrap();
            let started = Instant::now();
            thread::scope(|scope| {
                scope.spawn(|| attachment.write_stale(0, &[INTRUDER; 64]));
                thread::sleep(delay.saturating_sub(started.elapsed()));
                device.revoke(&fd).unwrap();
                first_page.write(0, MARK).unwrap();
            });
            assert_eq!(first_page.read(0), Ok(MARK), "{ranges:?}, {delay:?}");
        }
    }
}

#[test]
fn an_event_takes_from_all_importers_of_all_buffers() {
    let device = open("memory");
    let importer = Importer::open();
    let fds: Vec<_> = (0..8)
        .map(|n| {
            device
                .export(BAR, &[(n * page_size(), page_size()), (0, page_size())])
                .unwrap()
        })
        .collect();
    let attachments: Vec<_> = fds
        .iter()
        .flat_map(|fd| [importer.attach(fd).unwrap(), importer.attach(fd).unwrap()])
        .collect();
    for (round, attachment) in attachments.iter().enumerate() {
        attachment
            .map_for([TO_DEVICE, FROM_DEVICE][round % 2])
            .unwrap();
    }
    device.set_memory(false);
    for attachment in &attachments {
        let status = attachment.status();
        assert_eq!((status.mapped, status.interruptions), (0, 1));
        assert_eq!(attachment.translate(page_size()), None);
    }
    device.set_memory(true);
    for attachment in &attachments {
        attachment.map().unwrap();
    }
}

#[test]
fn an_importer_without_a_mapping_is_not_told() {
    let device = open("memory");
    let fd = device.export(BAR, &shapes()[1]).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    device.set_memory(false);
    device.set_memory(true);
    device.revoke(&fd).unwrap();
    assert_eq!(attachment.status().invalidations, 0);
}

#[test]
fn a_pinned_importer_is_told_and_lets_go() {
    let device = open("memory");
    let fd = device.export(BAR, &shapes()[1]).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.pin().unwrap();
    attachment.map().unwrap();
    device.revoke(&fd).unwrap();
    let status = attachment.status();
    assert_eq!((status.mapped, status.interruptions), (0, 1));
    attachment.unpin().unwrap();
}

/// The two come in any order: when the memory is off, nobody has a mapping.
#[test]
fn no_mapping_is_left_when_mapping_and_memory_off_race() {
    let device = open("memory");
    let fds = shapes().map(|ranges| device.export(BAR, &ranges).unwrap());
    let importer = Importer::open();
    let attachments = [0, 1].map(|n| importer.attach(&fds[n]).unwrap());
    let window = race::Window::new();
    let [first, second] = [0, 1].map(|n| {
        let (attachment, window) = (&attachments[n], &window);
        move || {
            // EBUSY is a mapping, too; ENODEV is none.
            window.check(|| attachment.map() != Err(ENODEV));
        }
    });
    let interrupted = |attachment: &Attachment| attachment.status().interruptions > 0;
    let (mut rounds, mut mapped) = (0, 0);
    race::meanwhile(&[&first, &second], || {
        // On a busy machine the others may come late.
        while rounds < 300 || mapped == 0 || !attachments.iter().all(interrupted) {
            rounds += 1;
            device.set_memory(false);
            window.shut(|| {
                for attachment in &attachments {
                    assert!(!attachment.is_mapped());
                }
            });
            device.set_memory(true);
            mapped += usize::from(attachments.iter().any(Attachment::is_mapped));
        }
    });
}

#[test]
fn no_mapping_is_left_when_mapping_and_revoke_race() {
    let device = open("memory");
    let importer = Importer::open();
    let (mut round, mut interrupted) = (0, 0);
    while round < 200 || interrupted == 0 {
        round += 1;
        let fd = device.export(BAR, &shapes()[round % 2]).unwrap();
        let attachment = importer.attach(&fd).unwrap();
        let maps = || {
            let _ = attachment.map();
        };
        race::meanwhile(&[&maps], || {
            if round % 4 > 1 {
                std::thread::yield_now();
            }
            device.revoke(&fd).unwrap();
            assert!(!attachment.is_mapped());
        });
        assert!(!attachment.is_mapped());
        interrupted += attachment.status().interruptions;
    }
}

#[test]
fn a_command_write_that_leaves_memory_on_ends_with_a_mapping_that_works() {
    let scene = Scene::new(open("memory"), &shapes()[1]);
    let command = scene.device.command();
    scene.device.set_command(command ^ COMMAND_MASTER);
    scene.device.set_command(command);
    // Taken away or not: it can be had again.
    if !scene.attachment.is_mapped() {
        scene.attachment.map().unwrap();
    }
    scene.attachment.write(0, &[9; LENGTH]).unwrap();
    assert_eq!(scene.attachment.read(0, LENGTH).unwrap(), [9; LENGTH]);
}

/// Both sides, always together.
#[test]
fn what_is_taken_from_devices_is_taken_from_processes() {
    let scene = Scene::new(open("memory"), &shapes()[1]);
    let map = Map::new(&scene.fd, 2 * page_size()).unwrap();
    map.touch_all().unwrap();
    scene.device.set_memory(false);
    assert_eq!(map.read(0), Err(Sigbus));
    assert!(!scene.attachment.is_mapped());
    scene.device.set_memory(true);
    assert!(map.read(0).is_ok());
    scene.attachment.map().unwrap();
    scene.device.revoke(&scene.fd).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
    assert!(!scene.attachment.is_mapped());
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "nvme", "pair0", "pair1"]);
}
