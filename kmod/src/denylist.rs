// SPDX-License-Identifier: GPL-2.0

//! Functions that must not be given to user space, as stock vfio-pci has them: their errata can be
//! used against the host (`drivers/vfio/pci/vfio_pci.c`, `vfio_pci_dev_in_denylist`).

use crate::sys::{params, vfio_pci::Function};
use kernel::{bindings, prelude::*};

const INTEL: u32 = bindings::PCI_VENDOR_ID_INTEL;

/// QAT C3xxx, C62x, DH895xCC with their virtual functions; DSA and IAX of Sapphire Rapids.
const DENIED: [u32; 8] = [
    0x19e2, 0x19e3, 0x37c8, 0x37c9, 0x0435, 0x0443, 0x0b25, 0x0cfe,
];

/// Whether the function may be bound.
pub(crate) fn accepts(function: &Function<'_>) -> bool {
    let (vendor, device) = function.id();
    if vendor != INTEL || !DENIED.contains(&device) {
        return true;
    }
    let name = function.name();
    if params::disable_denylist() {
        pr_warn!("{name}: denylist disabled: taking {vendor:04x}:{device:04x}\n");
        return true;
    }
    pr_warn!("{name}: {vendor:04x}:{device:04x} is in the denylist of vfio-pci: not taken\n");
    false
}
