//! How an importer reaches a lease when both are below one switch: by the addresses of the bus,
//! past the IOMMU.
//!
//! The ports of the lab's switch have no ACS, so importer and exporter are one IOMMU group: the
//! IOMMU could not keep them apart, whatever the kernel did. In such a group a driver that uses DMA
//! keeps VFIO out, so the importer is told to share its group. Then the group's IOMMU domain is the
//! owner's. An emulated switch sends all DMA up to the IOMMU: the owner leads the addresses of the
//! BAR to the BAR there, which a switch of hardware does by itself.
#![cfg(barlease_guest)]

use barlease_guest_tests::{
    errno::{EINVAL, ENODEV},
    importer::{self, EDU, Importer, abi},
    map::{How, Map},
    page_size,
    pci::Function,
    probe,
    vfio::{DMA_READ, DMA_WRITE, Device},
};

/// BAR2 of both devices: 64 MiB.
const BAR: u32 = 2;
const BAR_LEN: u64 = 64 << 20;

/// The importer, which leaves its group to others.
fn sharing() -> Importer {
    importer::load();
    let edu = Function::named(EDU);
    edu.unbind();
    probe::share_groups_of(abi::DRIVER);
    edu.bind(abi::DRIVER);
    Importer::open()
}

/// While the importer uses DMA in the ordinary way: another device is reached through the host
/// bridge, translated by the IOMMU, or not at all where the kernel knows no such bridge.
fn apart() {
    let device = Device::open("apart");
    let (bar, _) = device.function().bar(BAR);
    let fd = device.export(BAR, &[(page_size(), page_size())]).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    match attachment.map() {
        Ok(()) => {
            let address = bar + page_size();
            assert_ne!(attachment.entries()[0].address, address);
            assert_eq!(attachment.translate(0), Some(address));
        }
        Err(errno) => {
            assert_eq!(errno, EINVAL);
            assert!(cfg!(target_arch = "aarch64"), "x86: EPYC is known");
        }
    }
}

#[test]
fn devices_below_one_switch_use_the_addresses_of_the_bus() {
    apart();
    let importer = sharing();
    let device = Device::open("memory");
    let function = device.function();
    assert_eq!(function.group(), Function::named(EDU).group());
    let (bar, length) = function.bar(BAR);
    assert_eq!(length, BAR_LEN);
    assert!(bar + length <= 1 << 32, "edu does not reach {bar:#x}");
    let both = How::shared()
        .map(&device, u64::from(BAR) << 40, BAR_LEN)
        .unwrap();
    let group = device.group();
    let both_ways = DMA_READ | DMA_WRITE;

    for ranges in [
        &[(3 * page_size(), 2 * page_size())][..],
        &[
            (8 * page_size(), page_size()),
            (5 * page_size(), page_size()),
        ],
    ] {
        let fd = device.export(BAR, ranges).unwrap();
        let map = Map::new(&fd, 2 * page_size()).unwrap();
        let attachment = importer.attach(&fd).unwrap();
        for round in 0..3u8 {
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
            group
                .map_dma(both_ways, both.address(), bar, BAR_LEN)
                .unwrap();
            for at in [0, page_size()] {
                map.write(at, 0x5eed).unwrap();
                assert_eq!(attachment.read(at, 4).unwrap(), 0x5eedu32.to_le_bytes());
                attachment.write(at + 8, &[round + 1; 4]).unwrap();
                let written = u32::from_le_bytes([round + 1; 4]);
                assert_eq!(map.read(at + 8), Ok(written), "{ranges:?}");
            }
            assert_eq!(group.unmap_dma(bar, BAR_LEN), Ok(BAR_LEN));
            attachment.unmap().unwrap();
        }
        // The switch asks nobody: that the importer gives its addresses up is all that ends it.
        attachment.map().unwrap();
        device.revoke(&fd).unwrap();
        assert!(!attachment.is_mapped(), "{ranges:?}");
        assert_eq!(attachment.map(), Err(ENODEV), "{ranges:?}");
    }
}
