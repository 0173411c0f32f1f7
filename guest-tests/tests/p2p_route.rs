//! How an importer reaches a lease when each is behind a host bridge of its own.
//!
//! The importer's IOMMU then may use any address, those of the exporter's BARs included: what is an
//! address of the bus to one is an I/O virtual address to the other.
#![cfg(barlease_guest)]

use std::os::fd::OwnedFd;

use barlease_guest_tests::{
    faults,
    importer::{Attachment, EDU, Importer, check_that_nothing_is_left},
    map::Map,
    page_size,
    pci::Function,
    vfio::Device,
};

/// BAR2 of both devices: 64 MiB.
const BAR: u32 = 2;
const BAR_LEN: u64 = 64 << 20;

/// The number of the host bridge that a function is behind, as the kernel names it.
fn host_bridge(function: &Function) -> String {
    let path = format!("/sys/bus/pci/devices/{}", function.bdf);
    let path = std::fs::canonicalize(path).expect("a function");
    let bridge = path
        .iter()
        .find(|part| part.to_string_lossy().starts_with("pci"));
    bridge
        .expect("a host bridge")
        .to_string_lossy()
        .into_owned()
}

/// Takes addresses of the importer's until the next one is an address of `bar`, and says which.
/// They stay taken as long as `taken` lives.
fn take_addresses(
    filler: &Device,
    importer: &Importer,
    bar: u64,
    taken: &mut Vec<(OwnedFd, Attachment)>,
) -> u64 {
    let mut take = |length: u64| {
        let fd = filler.export(BAR, &[(0, length)]).expect("an export");
        let attachment = importer.attach(&fd).expect("an attachment");
        attachment.map().expect("a mapping");
        let address = attachment.entries()[0].address;
        taken.push((fd, attachment));
        address
    };
    for _ in 0..1000 {
        // The first may be one that was given back before. New ones are given downwards.
        take(page_size());
        let next = take(page_size()) - page_size();
        if (bar..bar + BAR_LEN).contains(&next) {
            return next;
        }
        assert!(next >= bar, "{next:#x} is below the BAR at {bar:#x}");
        take(BAR_LEN / 8);
    }
    panic!("no address of the BAR at {bar:#x} was given");
}

#[test]
fn an_address_that_is_one_of_the_bar_is_translated_all_the_same() {
    faults::stay_on_this_cpu();
    let device = Device::open("memory");
    let filler = Device::open("filler");
    let importer = Importer::open();
    let function = device.function();
    assert_ne!(host_bridge(function), host_bridge(&Function::named(EDU)));
    let (bar, length) = function.bar(BAR);
    assert_eq!(length, BAR_LEN);
    assert!(bar + length <= 1 << 32, "the BAR is at {bar:#x}");

    let mut taken = Vec::new();
    let address = take_addresses(&filler, &importer, bar, &mut taken);
    // A page whose physical address is the one that the importer is given next.
    let page = address - bar;
    let fd = device.export(BAR, &[(page, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    map.write(0, 0x5eed).unwrap();

    for round in 0..3 {
        let attachment = importer.attach(&fd).unwrap();
        attachment.map().unwrap();
        if round == 0 {
            // Else this test has shown nothing.
            assert_eq!(attachment.entries()[0].address, address);
        }
        assert_eq!(attachment.translate(0), Some(bar + page), "{round}");
        assert_eq!(attachment.read(0, 4).unwrap(), 0x5eedu32.to_le_bytes());
        attachment.write(8, &[0x5a; 4]).unwrap();
        assert_eq!(map.read(8), Ok(0x5a5a_5a5a));
        map.write(8, 0).unwrap();
        // Where it led it leads no more.
        attachment.unmap().unwrap();
        assert_eq!(attachment.translate(0), None, "{round}");
    }
    device.revoke(&fd).unwrap();
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "filler"]);
}
