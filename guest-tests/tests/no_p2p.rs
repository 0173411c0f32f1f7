//! Where the kernel gives no P2P provider: leases serve the CPU, and importers are refused.
#![cfg(barlease_guest)]

use std::os::fd::OwnedFd;

use barlease_abi::{ALIAS_WC, MEMATTR_WC, REASON_MEMORY_OFF};
use barlease_guest_tests::{
    errno::{EBADFD, EINVAL, ENODEV, ENOTTY, EOPNOTSUPP},
    importer::{self, Importer, check_that_nothing_is_left},
    lease::{Request, State},
    map::{How, Map, Sigbus},
    observe, page_size,
    probe::Played,
    vfio::Device,
};

const BAR: u32 = 2;
fn ranges() -> [(u64, u64); 2] {
    [(4 * page_size(), page_size()), (0, 2 * page_size())]
}

/// While there is one, the kernel gives no provider.
enum NoProvider {
    /// It was built so.
    Ever,
    Played(Played),
}

impl NoProvider {
    /// `None` where it gives one, and cannot be told not to.
    fn new() -> Option<Self> {
        if observe::kernel_lacks("PCI_P2PDMA") {
            return Some(Self::Ever);
        }
        Played::new("no_p2p=1").map(Self::Played)
    }
}

fn lease(device: &Device) -> (OwnedFd, Map) {
    let fd = device.export(BAR, &ranges()).expect("an export");
    let map = Map::new(&fd, 3 * page_size()).expect("a mapping");
    (fd, map)
}

#[test]
fn a_lease_serves_the_cpu() {
    let Some(_none) = NoProvider::new() else {
        return;
    };
    let device = Device::open("memory");
    let (fd, map) = lease(&device);
    let bar = How::shared()
        .map(&device, u64::from(BAR) << 40, 5 * page_size())
        .unwrap();
    let alias = device.alias(BAR, ALIAS_WC).unwrap();
    let alias = How::shared()
        .map(&device, u64::from(alias) << 40, 5 * page_size())
        .unwrap();
    for (offset, behind) in [
        (0, 4 * page_size()),
        (page_size(), 0),
        (2 * page_size(), page_size()),
    ] {
        map.write(offset, 7 + offset as u32).unwrap();
        assert_eq!(bar.read(behind), Ok(7 + offset as u32));
        assert_eq!(alias.read(behind), Ok(7 + offset as u32));
    }
    device.memattr(&fd, MEMATTR_WC).unwrap();
    Map::new(&fd, page_size()).unwrap().touch_all().unwrap();
    // It is taken away and given back as any other.
    device.set_memory(false);
    assert_eq!(device.state(&fd), State::Revoked(REASON_MEMORY_OFF));
    for map in [&map, &bar, &alias] {
        assert_eq!(map.read(0), Err(Sigbus));
    }
    device.set_memory(true);
    assert_eq!(map.read(0), Ok(7));
    device.reset().unwrap();
    assert_eq!(map.read(0), Ok(7));
    device.revoke(&fd).unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
    assert_eq!(device.revoke(&fd), Err(EBADFD));
    bar.touch_all().unwrap();
    drop((device, bar, alias));
    assert_eq!(map.read(0), Err(Sigbus));
}

#[test]
fn an_importer_is_refused() {
    let Some(none) = NoProvider::new() else {
        return;
    };
    let device = Device::open("memory");
    let (fd, map) = lease(&device);
    let importer = Importer::open();
    for _ in 0..3 {
        assert_eq!(importer.attach(&fd).unwrap_err(), EOPNOTSUPP);
    }
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
    // The stock exporter says it at the export; a kernel that was built so has none.
    let stock = importer::stock(&device, &Request::new(BAR, &[(0, page_size())]));
    let expected = match none {
        NoProvider::Ever => ENOTTY,
        NoProvider::Played(_) => EINVAL,
    };
    assert_eq!(stock.map(drop), Err(expected));
    map.touch_all().unwrap();
    // The answers about device and platform come before the state of the buffer, except that a dead
    // one is dead.
    device.set_memory(false);
    assert_eq!(importer.attach(&fd).unwrap_err(), EOPNOTSUPP);
    device.revoke(&fd).unwrap();
    assert_eq!(importer.attach(&fd).unwrap_err(), ENODEV);
}

#[test]
fn an_importer_is_served_once_the_device_is_opened_with_a_provider() {
    let Some(NoProvider::Played(none)) = NoProvider::new() else {
        return;
    };
    let device = Device::open("memory");
    let (fd, _map) = lease(&device);
    drop(none);
    let importer = Importer::open();
    assert_eq!(importer.attach(&fd).unwrap_err(), EOPNOTSUPP);
    drop(device);
    let device = Device::open("memory");
    let (fd, map) = lease(&device);
    map.write(0, 0x600d).unwrap();
    let attachment = importer.attach(&fd).unwrap();
    attachment.map().unwrap();
    assert_eq!(attachment.read(0, 4).unwrap(), 0x600d_u32.to_ne_bytes());
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory"]);
}
