//! The module built under the name of the stock one (`make -C kmod NAME=vfio-pci`) takes its place,
//! and programs that know no other name find all that they look for.
#![cfg(barlease_guest)]

use std::{collections::BTreeSet, fs, os::fd::AsFd, path::Path};

use barlease_abi::FEATURE_DMA_BUF_LIST;
use barlease_guest_tests::{
    PAGE,
    errno::EBADFD,
    map::{How, READ_WRITE},
    parity::{Line, answers, compare},
    pci::{BARLEASE, Function, STOCK, insert, is_module_loaded, unload, unload_module},
    vfio::{Device, GET, PROBE},
};

/// The stock module, and ours in its place: the name in sysfs.
const MODULE: &str = "vfio_pci";
/// The file of ours.
const FILE: &str = "barlease_as_vfio_pci";
/// Devices that are compared.
const DEVICES: [&str; 3] = ["display", "edu", "igb"];

fn parameters() -> BTreeSet<String> {
    let folder = Path::new("/sys/module").join(MODULE).join("parameters");
    fs::read_dir(folder)
        .expect("parameters")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

/// One test: each step needs the one before.
#[test]
fn the_stock_modules_place_is_taken() {
    if !Path::new("/sys/module")
        .join(MODULE)
        .join("refcnt")
        .exists()
    {
        eprintln!("the stock driver is built into this kernel: its place cannot be taken");
        return;
    }
    let stock: Vec<Vec<Line>> = DEVICES.iter().map(|name| answers(name, STOCK)).collect();
    let of_stock = parameters();

    // Neither while the stock module is there, nor beside ours under its own name.
    assert!(!insert(FILE, ""), "two modules of one name");
    for name in [
        "display", "memory", "edu", "igb", "nvme", "pair0", "testdev", "big",
    ] {
        let function = Function::named(name);
        if let Some(STOCK | BARLEASE) = function.driver().as_deref() {
            function.unbind();
        }
    }
    unload(MODULE).expect("the stock module goes");
    assert!(is_module_loaded());
    assert!(!insert(FILE, ""), "both export barlease_dma_buf_get_tph");
    unload_module().expect("ours goes");

    // A wrong entry does not keep out the others. edu has vendor 1234, device 11e8.
    let edu = Function::named("edu");
    edu.set_override("");
    assert_eq!(edu.driver(), None);
    assert!(insert(
        FILE,
        "ids=nonsense,1234:11e8,,1234 msix_export=auto"
    ));
    assert_eq!(edu.driver().as_deref(), Some(STOCK), "bound by ids");
    let missing: Vec<_> = of_stock.difference(&parameters()).cloned().collect();
    assert!(missing.is_empty(), "parameters of stock's: {missing:?}");

    // It answers as stock does, and leases.
    for (name, stock) in DEVICES.iter().zip(&stock) {
        compare(name, stock, &answers(name, STOCK));
    }
    let device = Device::open_with("display", STOCK);
    device
        .feature(PROBE | GET | u32::from(FEATURE_DMA_BUF_LIST), &mut [])
        .expect("a feature of ours");
    let lease = device.export(0, &[(0, PAGE)]).expect("a lease");
    let map = How::shared()
        .protection(READ_WRITE)
        .map(lease.as_fd(), 0, PAGE)
        .expect("mmap");
    map.write(0, 7).expect("a store");
    device.revoke(&lease).expect("REVOKE");
    assert!(map.read(0).is_err(), "it was taken away");
    assert_eq!(device.revoke(&lease), Err(EBADFD));
}
