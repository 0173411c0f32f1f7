//! Devices as lease holders: the kernel's own exporter beside ours, what neither exports, and
//! steering tags.
#![cfg(barlease_guest)]

use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
};

use barlease_abi::{FEATURE_DMA_BUF, FEATURE_DMA_BUF_STOCK, FEATURE_DMA_BUF_TPH};
use barlease_guest_tests::{
    errno::{Answer, EBADF, EINVAL, ENODEV, ENXIO, EOPNOTSUPP, EPERM},
    importer::{self, DYNAMIC, Importer, abi, check_that_nothing_is_left},
    lease::{Request, no_such_fd},
    map::Map,
    page_size,
    pci::Parameter,
    vfio::{Device, GET, PROBE, SET},
};

/// BAR2 of the memory device.
const BAR: u32 = 2;
/// NVMe has its registers and, behind them, its MSI-X table in BAR0.
const REGISTERS: u32 = 0;

fn open() -> Device {
    Device::open("memory")
}

fn stock(device: &Device, bar: u32, ranges: &[(u64, u64)]) -> Answer<OwnedFd> {
    importer::stock(device, &Request::new(bar, ranges))
}

// ---- The stock exporter -------------------------------------------------------------------------

#[test]
fn the_stock_exporter_is_there_for_get() {
    let device = open();
    let operations = [
        (0, Ok(())),
        (GET, Ok(())),
        (SET, Err(EINVAL)),
        (GET | SET, Err(EINVAL)),
    ];
    for (operation, answer) in operations {
        let ours = device.probe(FEATURE_DMA_BUF_STOCK, operation);
        assert_eq!(ours, answer, "{operation:#x}");
        let stock = device.feature(PROBE | operation | u32::from(FEATURE_DMA_BUF), &mut []);
        assert_eq!(stock.map(drop), answer, "{operation:#x}");
    }
}

#[test]
fn edu_reads_and_writes_what_the_stock_exporter_exports() {
    let device = open();
    let fd = stock(&device, BAR, &[(4 * page_size(), 2 * page_size())]).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    let bar = device.function().bar(BAR).0;
    assert_eq!(
        attachment.translate(page_size()),
        Some(bar + 5 * page_size())
    );
    let bytes: Vec<u8> = (0..512).map(|n| (n * 7 + n / 256) as u8).collect();
    attachment.write(page_size() - 256, &bytes).unwrap();
    let map = Map::new(
        device.export(BAR, &[(0, 8 * page_size())]).unwrap(),
        8 * page_size(),
    )
    .unwrap();
    for (word, expected) in (0..).step_by(4).zip(bytes.chunks(4)) {
        let value = map.read(5 * page_size() - 256 + word).unwrap();
        assert_eq!(value.to_le_bytes(), expected);
    }
    assert_eq!(attachment.read(page_size() - 256, 512).unwrap(), bytes);
}

#[test]
fn the_core_takes_stock_buffers_away() {
    let device = open();
    let fd = stock(&device, BAR, &[(0, page_size())]).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    device.set_memory(false);
    assert!(!attachment.is_mapped());
    assert_eq!(attachment.translate(0), None);
    assert_eq!(attachment.map(), Err(ENODEV));
    device.set_memory(true);
    attachment.map().unwrap();
    drop(device);
    assert!(!attachment.is_mapped());
    assert_eq!(attachment.map(), Err(ENODEV));
}

#[test]
fn the_features_of_leases_refuse_stock_buffers() {
    let device = open();
    let fd = stock(&device, BAR, &[(0, page_size())]).unwrap();
    assert_eq!(device.revoke(&fd), Err(EINVAL));
    assert_eq!(device.status(&fd).unwrap_err(), EINVAL);
    // A region that has no mmap.
    assert_eq!(Map::new(&fd, page_size()).unwrap_err(), EINVAL);
}

#[test]
fn revoking_a_lease_leaves_a_stock_buffer_of_the_same_range() {
    let device = open();
    let stock = stock(&device, BAR, &[(0, page_size())]).unwrap();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let attachment = Importer::open().attach(&stock).unwrap();
    attachment.map().unwrap();
    device.revoke(&fd).unwrap();
    assert!(attachment.is_mapped());
}

#[test]
fn a_parameter_makes_feature_11_the_stock_exporters() {
    let export = |device: &Device| device.export(BAR, &[(0, page_size())]).unwrap();
    let device = open();
    let parameter = Parameter::set("stock_dma_buf", "Y").unwrap();
    // A device that is open goes on as it was opened.
    device.status(export(&device)).unwrap();
    drop(device);
    let device = open();
    drop(parameter);
    assert_eq!(device.probe(FEATURE_DMA_BUF, GET), Ok(()));
    let fd = export(&device);
    assert_eq!(device.status(&fd).unwrap_err(), EINVAL);
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    drop((attachment, fd, device));
    let device = open();
    device.status(export(&device)).unwrap();
}

// ---- The MSI-X table ----------------------------------------------------------------------------

/// The pages of BAR0 in which the MSI-X table and the pending bits are.
fn protected_pages(device: &Device) -> Vec<u64> {
    let at = device.capability(0x11).expect("MSI-X");
    let control = u16::from_le_bytes(device.config(at + 2));
    let vectors = u64::from(control & 0x7ff) + 1;
    let areas = [(at + 4, vectors * 16), (at + 8, vectors.div_ceil(64) * 8)];
    let mut pages = Vec::new();
    for (place, size) in areas {
        let place = u32::from_le_bytes(device.config(place));
        assert_eq!(place & 7, REGISTERS);
        let start = u64::from(place & !7);
        pages.extend(
            (start / page_size()..(start + size).div_ceil(page_size()))
                .map(|page| page * page_size()),
        );
    }
    pages.sort_unstable();
    pages.dedup();
    pages
}

type Export<'a> = &'a dyn Fn(&[(u64, u64)]) -> Answer<OwnedFd>;

#[test]
fn neither_exporter_exports_the_msix_table_where_it_is_told_not_to() {
    let device = Device::open("nvme");
    let protected = protected_pages(&device);
    assert!(!protected.is_empty());
    let (_, length) = device.function().bar(REGISTERS);
    let check = |name: &str, export: Export<'_>| {
        for page in (0..length).step_by(page_size() as usize) {
            let answer = export(&[(page, page_size())]).map(drop);
            let expected = if protected.contains(&page) {
                Err(EPERM)
            } else {
                Ok(())
            };
            assert_eq!(answer, expected, "{name}, page {page:#x}");
        }
        assert_eq!(export(&[(0, length)]).unwrap_err(), EPERM, "{name}");
        let last = [(0, page_size()), (protected[0], page_size())];
        assert_eq!(export(&last).unwrap_err(), EPERM, "{name}");
    };
    let both = |device: &Device| {
        check("ours", &|ranges| device.export(REGISTERS, ranges));
        check("stock", &|ranges| stock(device, REGISTERS, ranges));
    };
    let never = Parameter::set("msix_export", "never").unwrap();
    both(&device);
    drop(device);
    let parameter = Parameter::set("stock_dma_buf", "Y").unwrap();
    let device = Device::open("nvme");
    drop(parameter);
    check("feature 11", &|ranges| device.export(REGISTERS, ranges));
    drop((device, never));

    // The IOMMU of this machine isolates interrupts.
    let device = Device::open("nvme");
    for policy in ["auto", "always"] {
        let _parameter = Parameter::set("msix_export", policy).unwrap();
        device.export(REGISTERS, &[(0, length)]).unwrap();
        stock(&device, REGISTERS, &[(0, length)]).unwrap();
    }
}

// ---- Steering tags ------------------------------------------------------------------------------

#[test]
fn there_is_no_steering_tag_where_none_was_set() {
    let device = open();
    let importer = Importer::open();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let attachment = importer.attach(&fd).unwrap();
    let none = || {
        for extended in [false, true] {
            assert_eq!(importer.steering_tag(&fd, extended), Err(EOPNOTSUPP));
        }
    };
    none();
    attachment.map().unwrap();
    none();
    device.set_memory(false);
    none();
    device.set_memory(true);
    device.revoke(&fd).unwrap();
    none();
    drop(device);
    none();
}

#[test]
fn a_foreign_dma_buf_has_no_steering_tag() {
    let device = open();
    let importer = Importer::open();
    let fd = stock(&device, BAR, &[(0, page_size())]).unwrap();
    for extended in [false, true] {
        assert_eq!(importer.steering_tag(&fd, extended), Err(EOPNOTSUPP));
        let file = fs::File::open("/dev/null").unwrap();
        assert_eq!(importer.steering_tag(&file, extended), Err(EINVAL));
    }
}

/// No device of the machine completes TPH.
#[test]
fn steering_tags_cannot_be_set_on_these_devices() {
    for (name, bar) in [("memory", BAR), ("nvme", BAR), ("display", 0)] {
        let device = Device::open(name);
        assert_eq!(device.probe(FEATURE_DMA_BUF_TPH, SET), Err(EOPNOTSUPP));
        let fd = device.export(bar, &[(0, page_size())]).unwrap();
        let mut payload = [0; 12];
        payload[..4].copy_from_slice(&fd.as_raw_fd().to_ne_bytes());
        payload[4] = 1;
        let answer = device.feature(SET | u32::from(FEATURE_DMA_BUF_TPH), &mut payload);
        assert_eq!(answer, Err(EOPNOTSUPP), "{name}");
        let answer = Importer::open().steering_tag(&fd, false);
        assert_eq!(answer, Err(EOPNOTSUPP), "{name}");
    }
}

// ---- The importer itself ------------------------------------------------------------------------

#[test]
fn the_importer_refuses_what_it_does_not_know() {
    let device = open();
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let importer = Importer::open();
    for flags in [abi::ATTACH_STATIC | DYNAMIC, 1 << 3, u32::MAX] {
        assert_eq!(importer.attach_as(&fd, flags).unwrap_err(), EINVAL);
    }
    let attachment = importer.attach(&fd).unwrap();
    assert_eq!(attachment.map_for(3), Err(EINVAL));
    assert_eq!(attachment.read(0, 1).unwrap_err(), ENXIO);
    let null = fs::File::open("/dev/null").unwrap();
    assert_eq!(importer.attach(&null).unwrap_err(), EINVAL);
    assert_eq!(device.revoke_number(no_such_fd()), Err(EBADF));
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "nvme", "display"]);
}
