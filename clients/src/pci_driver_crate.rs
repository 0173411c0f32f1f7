//! As a driver in user space does.

use std::os::fd::AsRawFd;
use std::path::Path;

use pci_driver::backends::vfio::VfioPciDevice;
use pci_driver::config::caps::Capability;
use pci_driver::device::PciDevice;
use pci_driver::regions::{MappedOwningPciRegion, PciRegion, Permissions};
use vmm_sys_util::eventfd::EventFd;

use crate::{IOVA, Page, Result};

pub fn run(path: &Path, bar: u32) -> Result {
    let device = VfioPciDevice::open(path)?;
    let config = device.config();
    println!(
        "function: {:04x}:{:04x}",
        config.vendor_id().read()?,
        config.device_id().read()?
    );
    for capability in config.capabilities()?.iter() {
        println!(
            "capability: {:?}",
            capability.header().capability_id().read()?
        );
    }
    for index in 0..6 {
        match device.bar(index) {
            None => println!("BAR {index}: none"),
            Some(bar) => println!(
                "BAR {index}: {:#x} bytes, {:?}",
                bar.len(),
                bar.permissions()
            ),
        }
    }
    config.command().memory_space_enable().write(true)?;
    config.command().bus_master_enable().write(true)?;

    let region = device.bar(bar as usize).ok_or("no such BAR")?;
    let mapped: MappedOwningPciRegion = region.map(..4096, Permissions::ReadWrite)?;
    mapped.write_le_u32(0x40, 0x8765_4321)?;
    println!(
        "written through a mapping: {:#x} there, {:#x} through the fd",
        mapped.read_le_u32(0x40)?,
        region.read_le_u32(0x40)?
    );

    let iommu = device.iommu();
    println!(
        "DMA: alignment {:#x}, ranges {:x?}",
        iommu.alignment(),
        iommu.valid_iova_ranges()
    );
    let page = Box::new(Page([0; 4096]));
    // SAFETY: the page lives until it is unmapped below, and no device is told of it.
    unsafe {
        iommu.map(
            IOVA,
            size_of::<Page>(),
            page.0.as_ptr(),
            Permissions::ReadWrite,
        )?;
    }
    iommu.unmap(IOVA, size_of::<Page>())?;
    println!("mapped and unmapped");

    let interrupts = device.interrupts();
    let kinds = [
        ("INTx", interrupts.intx()),
        ("MSI", interrupts.msi()),
        ("MSI-X", interrupts.msi_x()),
    ];
    for (name, mechanism) in kinds {
        println!("{name}: {}", mechanism.max());
        if mechanism.max() > 0 {
            let event = EventFd::new(0)?;
            mechanism.enable(&[event.as_raw_fd()])?;
            mechanism.disable()?;
        }
    }
    println!("reset: {:?}", device.reset().map_err(|error| error.kind()));
    Ok(())
}
