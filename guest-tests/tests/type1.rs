//! Mappings of BARs that are mapped for DMA by their address (`VFIO_IOMMU_MAP_DMA` of the type1
//! backend): what works with stock vfio-pci works with us, and what stock does not take away we do
//! not either.
#![cfg(barlease_guest)]

use std::{os::fd::AsFd, sync::Arc};

use barlease::DmaAccess;
use barlease_abi::{ALIAS_WC, MEMATTR_WC};
use barlease_guest_tests::{
    errno::{EFAULT, EPERM},
    huge_size,
    map::{How, Map, READ, Sigbus},
    page_size,
    pci::{BARLEASE, Function, STOCK},
    probe::{self, MemoryType},
    race,
    vfio::{COMMAND_MASTER, Device, Group},
    wait::until,
};

/// BAR2 of the memory device.
const BAR: u32 = 2;
fn length() -> u64 {
    2 * huge_size()
}
/// Where edu finds it: it has 32 bits.
const IOVA: u64 = 0x4000_0000;

/// edu, driven through its registers by a process that has it by vfio-pci.
struct Edu(Device);

impl Edu {
    const SOURCE: u64 = 0x80;
    const DESTINATION: u64 = 0x88;
    const COUNT: u64 = 0x90;
    const COMMAND: u64 = 0x98;
    const START: u32 = 1;
    const FROM_EDU: u32 = 2;
    /// Its buffer, as its DMA engine sees it.
    const BUFFER: u32 = 0x4_0000;

    /// In the container of another device.
    fn beside(group: &Arc<Group>) -> Self {
        let function = Function::named("edu");
        function.bind(STOCK);
        Self::new(group.beside(&function).device(&function).unwrap())
    }

    /// In a container of its own.
    fn alone() -> Self {
        Self::new(Device::open_with("edu", STOCK))
    }

    fn new(device: Device) -> Self {
        device.set_command(device.command() | COMMAND_MASTER);
        Self(device)
    }

    fn run(&self, source: u32, destination: u32, command: u32) {
        self.0.write32(0, Self::SOURCE, source);
        self.0.write32(0, Self::DESTINATION, destination);
        self.0.write32(0, Self::COUNT, 4);
        self.0.write32(0, Self::COMMAND, command);
        until("a transfer", || {
            self.0.read32(0, Self::COMMAND) & Self::START == 0
        });
    }

    /// Copies four bytes from one place to another.
    fn copy(&self, from: u64, to: u64) {
        self.run(from as u32, Self::BUFFER, Self::START);
        self.run(Self::BUFFER, to as u32, Self::START | Self::FROM_EDU);
    }
}

impl Drop for Edu {
    fn drop(&mut self) {
        self.0.set_command(self.0.command() & !COMMAND_MASTER);
    }
}

/// The ways to map a BAR through the device fd: where 2 MiB entries are possible, and where not.
fn layouts() -> [How; 2] {
    [
        How::shared().align(huge_size()),
        How::shared().align(huge_size()).skew(page_size()),
    ]
}

fn bar(device: &Device, how: How, region: u32) -> Map {
    how.map(device.as_fd(), u64::from(region) << 40, length())
        .unwrap()
}

/// Asserts that DMA through `IOVA` reaches what the mapping shows.
fn assert_reaches(edu: &Edu, map: &Map, value: u32) {
    let (from, to) = (page_size() + 4, length() - page_size() + 8);
    map.write(from, value).unwrap();
    map.write(to, 0).unwrap();
    // It has arrived.
    assert_eq!(map.read(to), Ok(0));
    edu.copy(IOVA + from, IOVA + to);
    assert_eq!(map.read(to), Ok(value));
}

#[test]
fn a_bar_that_is_mapped_through_the_device_fd_is_mapped_for_dma_as_with_stock() {
    for driver in [STOCK, BARLEASE] {
        let device = Device::open_with("memory", driver);
        let edu = Edu::beside(device.group());
        for (touched, how) in layouts().into_iter().enumerate() {
            let map = bar(&device, how, BAR);
            if touched == 1 {
                map.touch_all().unwrap();
            }
            let group = device.group();
            let mapped = group
                .map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length())
                .unwrap();
            assert_reaches(&edu, &map, 0x1234_0000 + touched as u32);
            mapped.unmap().unwrap();
        }
    }
}

#[test]
fn a_read_only_mapping_is_mapped_for_reading_only_as_with_stock() {
    for driver in [STOCK, BARLEASE] {
        let device = Device::open_with("memory", driver);
        let how = How::shared().protection(READ);
        let map = bar(&device, how, BAR);
        let group = device.group();
        let answer = group.map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length());
        assert!(
            matches!(answer, Err(EFAULT | EPERM)),
            "{driver}: {answer:?}"
        );
        let mapped = group
            .map_dma(DmaAccess::Read, map.address(), IOVA, length())
            .unwrap();
        mapped.unmap().unwrap();
    }
}

#[test]
fn what_is_left_of_a_mapping_that_was_split_is_mapped_for_dma_as_with_stock() {
    for driver in [STOCK, BARLEASE] {
        let device = Device::open_with("memory", driver);
        let edu = Edu::beside(device.group());
        let mut map = bar(&device, How::shared().align(huge_size()), BAR);
        map.touch_all().unwrap();
        map.protect(huge_size(), page_size(), READ).unwrap();
        map.unmap(huge_size() / 2, page_size());
        let group = device.group();
        // A page that may be read only, a hole, and what is behind them.
        let refused = group.map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length());
        assert_eq!(refused.map(drop), Err(EFAULT), "{driver}");
        let (start, len) = (huge_size() + page_size(), huge_size() - page_size());
        let address = map.address() + start as usize;
        let mapped = group
            .map_dma(DmaAccess::ReadWrite, address, IOVA, len)
            .unwrap();
        map.write(start, 0x77).unwrap();
        map.write(start + 4, 0).unwrap();
        edu.copy(IOVA, IOVA + 4);
        assert_eq!(map.read(start + 4), Ok(0x77), "{driver}");
        mapped.unmap().unwrap();
    }
}

#[test]
fn write_combining_mappings_and_leases_are_mapped_for_dma_too() {
    let device = Device::open("memory");
    let edu = Edu::beside(device.group());
    let alias = device.alias(BAR, ALIAS_WC).unwrap();
    let fd = device.export(BAR, &[(0, length())]).unwrap();
    let lease = Map::aligned(&fd, length()).unwrap();
    device.memattr(&fd, MEMATTR_WC).unwrap();
    let combining = How::shared().map(&fd, 0, length()).unwrap();
    let maps = [
        (
            bar(&device, How::shared(), alias),
            MemoryType::WriteCombining,
        ),
        (combining, MemoryType::WriteCombining),
        (lease, MemoryType::Uncached),
    ];
    for (n, (map, memory_type)) in maps.iter().enumerate() {
        let group = device.group();
        let mapped = group
            .map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length())
            .unwrap();
        // The entries that the kernel faulted in for it are of the mapping's own type.
        for at in [0, length() - page_size()] {
            assert_eq!(probe::memory_type(map, at), Some(*memory_type), "{n}");
        }
        assert_reaches(&edu, map, 0x600d_0000 + n as u32);
        mapped.unmap().unwrap();
    }
}

#[test]
fn what_is_taken_away_is_not_mapped_for_dma_as_with_stock() {
    for driver in [STOCK, BARLEASE] {
        let device = Device::open_with("memory", driver);
        let map = bar(&device, How::shared().align(huge_size()), BAR);
        map.touch_all().unwrap();
        device.set_memory(false);
        let group = device.group();
        let refused = group.map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length());
        assert_eq!(refused.map(drop), Err(EFAULT), "{driver}");
        device.set_memory(true);
        let mapped = group
            .map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length())
            .unwrap();
        mapped.unmap().unwrap();
    }
    let device = Device::open("memory");
    let fd = device.export(BAR, &[(0, length())]).unwrap();
    let map = Map::new(&fd, length()).unwrap();
    map.touch_all().unwrap();
    device.revoke(&fd).unwrap();
    let answer = device
        .group()
        .map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length());
    assert_eq!(answer.map(drop), Err(EFAULT));
}

/// The kernel has looked the address up once, and keeps the frames: `docs/threat-model.md` says so.
#[test]
fn what_was_mapped_for_dma_stays_so_until_it_is_unmapped_as_with_stock() {
    for driver in [STOCK, BARLEASE] {
        let device = Device::open_with("memory", driver);
        let edu = Edu::beside(device.group());
        let map = bar(&device, How::shared().align(huge_size()), BAR);
        let group = device.group();
        let mapped = group
            .map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length())
            .unwrap();
        assert_reaches(&edu, &map, 0x11);
        device.set_memory(false);
        assert_eq!(map.read(0), Err(Sigbus), "{driver}");
        device.set_memory(true);
        assert_reaches(&edu, &map, 0x22);
        device.reset().unwrap();
        assert_reaches(&edu, &map, 0x33);
        // Without any mapping in a process.
        drop(map);
        device.write32(BAR, 0x100, 0x44);
        device.write32(BAR, 0x104, 0);
        edu.copy(IOVA + 0x100, IOVA + 0x104);
        assert_eq!(device.read32(BAR, 0x104), 0x44, "{driver}");
        mapped.unmap().unwrap();
        device.write32(BAR, 0x104, 0);
        edu.copy(IOVA + 0x100, IOVA + 0x104);
        assert_eq!(device.read32(BAR, 0x104), 0, "{driver}");
    }
}

/// A holder that has a device of its own can do that: `docs/threat-model.md`.
#[test]
fn a_lease_that_was_mapped_for_dma_by_its_address_stays_so_after_a_revocation() {
    let device = Device::open("memory");
    let edu = Edu::alone();
    let fd = device.export(BAR, &[(0, length())]).unwrap();
    let map = Map::new(&fd, length()).unwrap();
    let group = edu.0.group();
    let mapped = group
        .map_dma(DmaAccess::ReadWrite, map.address(), IOVA, length())
        .unwrap();
    device.revoke(&fd).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
    device.write32(BAR, 0, 0x55);
    device.write32(BAR, 4, 0);
    edu.copy(IOVA, IOVA + 4);
    assert_eq!(device.read32(BAR, 4), 0x55);
    mapped.unmap().unwrap();
}

/// A large guest's memory, while leases are made and taken away beside it.
#[test]
fn memory_is_mapped_for_dma_while_leases_come_and_go() {
    const ROUNDS: u64 = 30;
    let device = Device::open("memory");
    let memory = Map::anonymous(64 * huge_size());
    let leases = || {
        let fd = device.export(BAR, &[(0, length())]).unwrap();
        let map = Map::new(&fd, length()).unwrap();
        map.touch_all().unwrap();
        device.revoke(&fd).unwrap();
        assert_eq!(map.read(0), Err(Sigbus));
    };
    let map_dma = |map: &Map, iova| {
        let group = device.group();
        group.map_dma(DmaAccess::ReadWrite, map.address(), iova, map.len())
    };
    race::meanwhile(&[&leases], || {
        for round in 0..ROUNDS {
            let mapped = map_dma(&memory, IOVA).expect("memory can be mapped at any time");
            let fd = device.export(BAR, &[(length(), length())]).unwrap();
            let lease = Map::new(&fd, length()).unwrap();
            let beside = map_dma(&lease, IOVA + memory.len()).expect("the lease is OK");
            if round % 2 == 0 {
                drop(beside);
                device.revoke(&fd).unwrap();
                let dead = map_dma(&lease, IOVA + memory.len());
                assert_eq!(dead.map(drop), Err(EFAULT));
            }
            drop(mapped);
        }
    });
}
