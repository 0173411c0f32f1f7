//! The importer of the documentation (`kmod/examples/`): it maps, lets go when it is told to, and
//! maps again.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    path::Path,
    process::Command,
};

use barlease::{Bdf, Device, Lease, config::Command as Bits, pci::Pci};
use barlease_guest_tests::{
    PAGE,
    errno::{ENODEV, ENXIO, Errno},
    observe,
    pci::{BARLEASE, Function},
};

const MODULE: &str = "barlease_example_importer";
const BAR: u32 = 2;

/// Loads the module, has it drive edu, and opens its file.
fn importer() -> File {
    observe::mark_test();
    if !Path::new("/sys/module").join(MODULE).exists() {
        let file = format!("/lib/modules/{MODULE}.ko");
        let status = Command::new("insmod").arg(file).status();
        assert!(status.expect("insmod").success());
    }
    Function::named("edu").bind("barlease_example");
    let mut options = File::options();
    options.read(true).write(true);
    options.open("/dev/barlease_example").unwrap()
}

fn owner() -> Device {
    let bdf: Bdf = Function::named("memory").bdf.parse().unwrap();
    Pci::system().bind(bdf, BARLEASE).unwrap();
    Device::open(bdf).unwrap()
}

fn import(mut file: &File, lease: &Lease) -> io::Result<()> {
    write!(file, "{}", lease.as_fd().as_raw_fd())
}

/// Lengths of the pieces that the device reaches.
fn pieces(file: &File) -> io::Result<Vec<u64>> {
    let mut text = [0; 4096];
    let length = file.read_at(&mut text, 0)?;
    let text = std::str::from_utf8(&text[..length]).unwrap();
    let pieces = text.lines().map(|line| {
        let (_, length) = line.split_once(" 0x").expect("an address and a length");
        u64::from_str_radix(length, 16).unwrap()
    });
    Ok(pieces.collect())
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: io::Result<T>, errno: Errno) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(errno.0));
}

/// Mappings for DMA of the only lease.
fn mappings(device: &Device) -> u32 {
    let mut records = device.leases().list().map(Result::unwrap);
    let record = records.find(|record| !record.internal).unwrap();
    record.dma_mappings
}

#[test]
fn the_listing_lets_go_and_maps_again() {
    let file = importer();
    let device = owner();
    refused(pieces(&file), ENXIO);
    let page = PAGE;
    let export = device.export(BAR).range(0..page);
    let lease = export.range(0x20_0000..0x20_0000 + 2 * page).export();
    let lease = lease.unwrap();
    import(&file, &lease).unwrap();
    assert_eq!(mappings(&device), 0);
    assert_eq!(pieces(&file).unwrap().iter().sum::<u64>(), 3 * page);
    assert_eq!(mappings(&device), 1);

    let memory = |on| {
        let config = device.config().unwrap();
        let change = |mut bits: Bits| {
            bits.set(Bits::MEMORY, on);
            bits
        };
        config.update_command(change).unwrap();
    };
    memory(false);
    assert_eq!(mappings(&device), 0, "it was told, and has let go");
    refused(pieces(&file), ENODEV);
    memory(true);
    assert_eq!(pieces(&file).unwrap().iter().sum::<u64>(), 3 * page);

    // Waits for the importer, which would be for ever if it did not let go.
    device.revoke(&lease).unwrap();
    assert_eq!(mappings(&device), 0);
    refused(pieces(&file), ENODEV);
    refused(import(&file, &lease), ENODEV);
}

#[test]
fn what_a_process_imports_ends_with_it() {
    let file = importer();
    let device = owner();
    let lease = device.export(BAR).range(0..PAGE).export().unwrap();
    import(&file, &lease).unwrap();
    pieces(&file).unwrap();
    assert_eq!(device.status(&lease).unwrap().attachments, 1);
    drop(file);
    assert_eq!(device.status(&lease).unwrap().attachments, 0);
    // Another driver may have the device again.
    Function::named("edu").unbind();
    let file = File::options().write(true).open("/dev/barlease_example");
    refused(import(&file.unwrap(), &lease), ENODEV);
}
