//! How an importer reaches a lease when both are below one switch: by the addresses of the bus, past
//! the IOMMU, unless the switch has to ask.
//!
//! Two of its ports have no ACS, so what is below them is one IOMMU group: the IOMMU could not keep
//! them apart, whatever the kernel did. In such a group a driver that uses DMA keeps VFIO out, so
//! the importer is told to share its group. Then the group's IOMMU domain is the owner's. An
//! emulated switch sends all DMA up to the IOMMU: the owner leads the addresses of the BAR to the
//! BAR there, which a switch of hardware does by itself. No other memory is led anywhere, so the
//! importer copies from one place of the lease to another.
//!
//! A third port has ACS, and redirects: what is below it is a group of its own.
#![cfg(barlease_guest)]

use std::{fs, os::fd::OwnedFd, path::Path};

use barlease::DmaAccess;
use barlease_guest_tests::{
    calls::Calls,
    errno::{EINVAL, ENODEV},
    importer::{self, Attachment, EDU, ISOLATED, Importer, abi, check_that_nothing_is_left},
    map::{How, Map},
    page_size,
    pci::{self, BARLEASE, Function},
    probe,
    vfio::Device,
};

/// BAR2 of both devices: 64 MiB.
const BAR: u32 = 2;
/// PCI Express Extended Capability: Access Control Services.
const ACS: u16 = 0x0d;
/// What maps a page to find out a route.
const STOCK_MAP: &str = "dma_buf_phys_vec_to_sgt";

/// The bytes of a BAR that the tests lease from.
fn part() -> u64 {
    16 * page_size()
}

/// The importer with the device that is below a port without ACS.
fn ordinary() -> Importer {
    Function::named(ISOLATED).unbind();
    Importer::open()
}

/// The same, which leaves its group to others.
fn sharing() -> Importer {
    Function::named(ISOLATED).unbind();
    importer::load();
    let edu = Function::named(EDU);
    edu.unbind();
    if !Path::new("/sys/module/barlease_probe").exists() {
        probe::share_groups_of(abi::DRIVER);
    }
    edu.bind(abi::DRIVER);
    Importer::open()
}

/// Ranges that are mapped by one run, and by two that are not in order.
fn shapes() -> [Vec<(u64, u64)>; 2] {
    [
        vec![(3 * page_size(), 2 * page_size())],
        vec![
            (8 * page_size(), page_size()),
            (5 * page_size(), page_size()),
        ],
    ]
}

/// Has the importer's mapping of `ranges` be addresses of the bus, and use them.
fn by_the_bus(device: &Device, importer: &Importer, ranges: &[(u64, u64)]) {
    let (bar, _) = device.function().bar(BAR);
    let group = device.group();
    let whole = How::shared()
        .map(device, u64::from(BAR) << 40, part())
        .unwrap();
    let fd = device.export(BAR, ranges).unwrap();
    let map = Map::new(&fd, 2 * page_size()).unwrap();
    let attachment = importer.attach(&fd).unwrap();
    for round in 0..3u32 {
        attachment.map().unwrap();
        let entries = attachment.entries();
        let expected = ranges
            .iter()
            .map(|&(offset, length)| (bar + offset, length));
        let seen = entries.iter().map(|entry| (entry.address, entry.length));
        assert!(seen.eq(expected), "{ranges:?}: {entries:?}");
        // Nothing of it is in the tables of the importer's IOMMU.
        assert_eq!(attachment.translate(0), None, "{ranges:?}");
        // Not before the importer's way was found: the group's domain is asked for it.
        let led = group
            .map_dma(DmaAccess::ReadWrite, whole.address(), bar, part())
            .unwrap();
        for (from, to) in [(8, page_size() + 8), (page_size() + 16, 16)] {
            map.write(from, 0x5eed + round).unwrap();
            map.write(to, 0).unwrap();
            attachment.copy(from, to, 4).unwrap();
            assert_eq!(map.read(to), Ok(0x5eed + round), "{ranges:?}");
        }
        drop(led);
        attachment.unmap().unwrap();
    }
    // The switch asks nobody: that the importer gives its addresses up is all that ends it.
    attachment.map().unwrap();
    device.revoke(&fd).unwrap();
    assert!(!attachment.is_mapped(), "{ranges:?}");
    assert_eq!(attachment.map(), Err(ENODEV), "{ranges:?}");
}

fn lease(device: &Device, importer: &Importer) -> (OwnedFd, Attachment) {
    let fd = device
        .export(BAR, &[(page_size(), 2 * page_size())])
        .expect("an export");
    let attachment = importer.attach(&fd).expect("an attachment");
    (fd, attachment)
}

/// An importer reaches `device` not at all while the kernel does not know the host bridge, and else
/// through it and the IOMMU.
fn by_the_iommu(device: &Device, importer: &Importer) {
    let (bar, _) = device.function().bar(BAR);
    let (fd, attachment) = lease(device, importer);
    if cfg!(target_arch = "aarch64") {
        importer::know_host(false);
        for _ in 0..3 {
            assert_eq!(attachment.map(), Err(EINVAL));
            assert!(!attachment.is_mapped());
        }
        importer::know_host(true);
    }
    let map = Map::new(&fd, 2 * page_size()).unwrap();
    for _ in 0..3 {
        attachment.map().unwrap();
        let entries = attachment.entries();
        assert_ne!(entries[0].address, bar + page_size(), "{entries:?}");
        let last = 2 * page_size() - 4;
        for offset in [0, last] {
            assert_eq!(
                attachment.translate(offset),
                Some(bar + page_size() + offset)
            );
        }
        map.write(last, 0x5eed).unwrap();
        attachment.copy(last, 0, 4).unwrap();
        assert_eq!(map.read(0), Ok(0x5eed));
        attachment.unmap().unwrap();
        assert_eq!(attachment.translate(0), None);
    }
    attachment.map().unwrap();
    device.revoke(&fd).unwrap();
    assert_eq!(attachment.translate(0), None);
    assert_eq!(attachment.map(), Err(ENODEV));
}

/// Else the tests below show nothing.
#[test]
fn a_the_ports_are_what_the_machine_says() {
    let has_acs = |name| {
        Function::named(name)
            .port()
            .extended_capability(ACS)
            .is_some()
    };
    assert!(!has_acs("memory") && !has_acs(EDU));
    assert!(has_acs(ISOLATED) && has_acs("apart"));
    let group = |name| Function::named(name).group();
    assert_eq!(group("memory"), group(EDU));
    assert_ne!(group("memory"), group(ISOLATED));
    assert_ne!(group("memory"), group("apart"));
    let above = |name| Function::named(name).port().port();
    assert_eq!(above("memory"), above(EDU));
    assert_eq!(above("memory"), above(ISOLATED));
}

#[test]
fn a_port_that_redirects_has_the_iommu_translate() {
    let importer = Importer::open_isolated();
    // VFIO has the group of "memory" only if no other driver uses DMA in it.
    let device = Device::open("memory");
    let calls = Calls::of(STOCK_MAP);
    by_the_iommu(&device, &importer);
    // There is a bridge above both: that no bus address comes of it is found by mapping a page.
    if let Some(calls) = calls {
        assert!(calls.count() > 0);
    }
}

#[test]
fn another_root_port_has_the_iommu_translate() {
    let importer = ordinary();
    let device = Device::open("apart");
    by_the_iommu(&device, &importer);
}

#[test]
fn devices_below_one_switch_use_the_addresses_of_the_bus() {
    let importer = sharing();
    let device = Device::open("memory");
    let (bar, length) = device.function().bar(BAR);
    assert!(bar + length <= 1 << 32, "edu does not reach {bar:#x}");
    for ranges in shapes() {
        by_the_bus(&device, &importer, &ranges);
    }
}

/// Without translation the addresses of the bus are those of the CPU, whichever way they are found.
#[test]
fn so_they_do_where_no_iommu_translates() {
    let importer = sharing();
    let edu = Function::named(EDU);
    let memory = Function::named("memory");
    drop(importer);
    let set = |kind: &str| {
        edu.unbind();
        memory.unbind();
        let path = format!("/sys/kernel/iommu_groups/{}/type", edu.group());
        pci::write(Path::new(&path), kind).expect("change the domain");
        assert_eq!(fs::read_to_string(path).unwrap().trim(), kind);
    };
    set("identity");
    {
        let importer = sharing();
        memory.bind(BARLEASE);
        let device = Device::open("memory");
        for ranges in shapes() {
            by_the_bus(&device, &importer, &ranges);
        }
    }
    set("DMA");
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "apart"]);
}
