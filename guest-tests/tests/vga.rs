//! VGA's own addresses, which a display adapter decodes beside its BARs: the parameter
//! `disable_vga`.
#![cfg(barlease_guest)]

use barlease_guest_tests::{
    errno::EINVAL,
    importer::check_that_nothing_is_left,
    pci::{self, Function, STOCK},
    vfio::Device,
};

/// Index of the region of these addresses, and its size.
const VGA_REGION: u32 = 8;
const VGA_LEN: u64 = 0xc_0000;

/// Whether the region is offered.
fn is_offered(device: &Device) -> bool {
    match device.region_info(VGA_REGION) {
        Ok(info) => {
            assert_eq!(info.size, VGA_LEN);
            true
        }
        Err(errno) => {
            assert_eq!(errno, EINVAL);
            false
        }
    }
}

#[test]
fn disable_vga_keeps_vga_s_addresses_from_users() {
    let function = Function::named("vga");
    let stock = is_offered(&Device::open_with("vga", STOCK));
    assert_eq!(is_offered(&Device::open("vga")), stock);
    if !stock {
        // A kernel without CONFIG_VFIO_PCI_VGA.
        return;
    }
    function.unbind();
    pci::unload_module().unwrap();
    pci::load_module("disable_vga=1");
    assert!(!is_offered(&Device::open("vga")));
    function.unbind();
    pci::unload_module().unwrap();
    pci::load_module("");
    assert!(is_offered(&Device::open("vga")));
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["vga"]);
}
