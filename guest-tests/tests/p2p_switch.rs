//! How an importer reaches a lease when both are below one switch: by the addresses of the bus,
//! past the IOMMU, unless the switch has to ask.
//!
//! Two of its ports have no ACS: the switch sends from one to the other what has an address of the
//! BAR, and the kernel gives importers these addresses. It takes what is below them for two IOMMU
//! groups all the same (Linux 7.2 and 7.3), so VFIO has the one while another driver has the other.
//! A third port has ACS and redirects: what it sends up is translated.
//!
//! An emulated switch sends everything up. So DMA by the addresses of the bus is seen where the
//! importer's IOMMU does not translate; where it does, the addresses are.
#![cfg(barlease_guest)]

use std::os::fd::OwnedFd;

use barlease_guest_tests::{
    calls::Calls,
    errno::{EINVAL, ENODEV},
    importer::{self, Attachment, Domain, EDU, ISOLATED, Importer, check_that_nothing_is_left},
    map::Map,
    page_size,
    pci::Function,
    vfio::Device,
};

/// BAR2 of both devices: 64 MiB.
const BAR: u32 = 2;
/// PCI Express Extended Capability: Access Control Services.
const ACS: u16 = 0x0d;
/// The function that maps a page to find out a route.
const STOCK_MAP: &str = "dma_buf_phys_vec_to_sgt";

/// The importer with the device that is below a port without ACS.
fn ordinary() -> Importer {
    Function::named(ISOLATED).unbind();
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

/// Has the importer's mapping of `ranges` be addresses of the bus. `is_seen`: DMA is seen to land.
fn by_the_bus(device: &Device, importer: &Importer, ranges: &[(u64, u64)], is_seen: bool) {
    let (bar, _) = device.function().bar(BAR);
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
        // Nothing of it is in the tables of an IOMMU that has some.
        let led = is_seen.then_some(bar + ranges[0].0);
        assert_eq!(attachment.translate(0), led, "{ranges:?}");
        for (from, to) in [(8, page_size() + 8), (page_size() + 16, 16)] {
            if is_seen {
                map.write(from, 0x5eed + round).unwrap();
                map.write(to, 0).unwrap();
                attachment.copy(from, to, 4).unwrap();
                assert_eq!(map.read(to), Ok(0x5eed + round), "{ranges:?}");
            }
        }
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

/// An importer reaches the device `name` through the host bridge and the IOMMU.
fn by_the_iommu(name: &str, importer: &Importer) {
    let device = Device::open(name);
    let (bar, _) = device.function().bar(BAR);
    let (fd, attachment) = lease(&device, importer);
    let map = Map::new(&fd, 2 * page_size()).unwrap();
    for _ in 0..3 {
        attachment.map().unwrap();
        let entries = attachment.entries();
        assert_ne!(entries[0].address, bar + page_size(), "{entries:?}");
        let last = 2 * page_size() - 4;
        for offset in [0, last] {
            let behind = bar + page_size() + offset;
            assert_eq!(attachment.translate(offset), Some(behind));
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

/// It is refused while the kernel does not know the host bridge.
fn refused_by_the_host(name: &str, importer: &Importer) {
    if cfg!(target_arch = "x86_64") {
        return;
    }
    // The kernel remembers what it has found for as long as the function is bound.
    let function = Function::named(name);
    function.unbind();
    importer::know_host(false);
    {
        let device = Device::open(name);
        let (_fd, attachment) = lease(&device, importer);
        for _ in 0..3 {
            assert_eq!(attachment.map(), Err(EINVAL));
            assert!(!attachment.is_mapped());
        }
    }
    function.unbind();
    importer::know_host(true);
}

/// Else the tests below show nothing.
#[test]
fn a_the_ports_are_what_the_machine_says() {
    let has_acs = |name| {
        let port = Function::named(name).port();
        port.extended_capability(ACS).is_some()
    };
    assert!(!has_acs("memory") && !has_acs(EDU));
    assert!(has_acs(ISOLATED) && has_acs("apart"));
    let above = |name| Function::named(name).port().port();
    assert_eq!(above("memory"), above(EDU));
    assert_eq!(above("memory"), above(ISOLATED));
}

#[test]
fn a_port_that_redirects_has_the_iommu_translate() {
    let importer = Importer::open_isolated();
    refused_by_the_host("memory", &importer);
    let calls = Calls::of(STOCK_MAP);
    by_the_iommu("memory", &importer);
    // There is a bridge above both: that no bus address comes of it is found by mapping a page.
    if let Some(calls) = calls {
        assert!(calls.count() > 0);
    }
}

#[test]
fn another_root_port_has_the_iommu_translate() {
    let importer = ordinary();
    refused_by_the_host("apart", &importer);
    by_the_iommu("apart", &importer);
}

#[test]
fn devices_below_one_switch_use_the_addresses_of_the_bus() {
    let importer = ordinary();
    let device = Device::open("memory");
    let (bar, length) = device.function().bar(BAR);
    assert!(bar + length <= 1 << 32, "edu does not reach {bar:#x}");
    for ranges in shapes() {
        by_the_bus(&device, &importer, &ranges, false);
    }
}

#[test]
fn so_they_do_where_no_iommu_translates() {
    Function::named(ISOLATED).unbind();
    let _identity = Domain::set("identity");
    let importer = Importer::open();
    let device = Device::open("memory");
    for ranges in shapes() {
        by_the_bus(&device, &importer, &ranges, true);
    }
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "apart"]);
}
