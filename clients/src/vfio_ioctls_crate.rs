//! As a VMM of rust-vmm's does.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use vfio_ioctls::{VfioContainer, VfioDevice, VfioOps, VfioRegionDmaRange};
use vmm_sys_util::eventfd::EventFd;

use crate::{IOVA, Page, Result};

/// Of `VFIO_PCI_*_IRQ_INDEX` and `VFIO_PCI_*_REGION_INDEX`.
const INTERRUPTS: std::ops::RangeInclusive<u32> = 0..=4;
const CONFIG: u32 = 7;

pub fn run(path: &Path, bar: u32) -> Result {
    let container = Arc::new(VfioContainer::new(None)?);
    let device = VfioDevice::new(path, Arc::clone(&container) as Arc<dyn VfioOps>, true)?;
    for region in 0..9 {
        println!(
            "region {region}: {:#x} bytes, flags {:#x}, {:?}",
            device.get_region_size(region),
            device.get_region_flags(region),
            device.get_region_caps(region)
        );
    }
    for index in INTERRUPTS {
        println!("interrupts {index}: {:?}", device.get_irq_info(index));
    }

    // Memory on, mastering on; the BAR keeps what is written to it.
    let mut command = [0; 2];
    device.region_read(CONFIG, &mut command, 4);
    device.region_write(CONFIG, &(u16::from_le_bytes(command) | 6).to_le_bytes(), 4);
    device.region_write(bar, &0x1234_5678_u32.to_le_bytes(), 0x40);
    let mut word = [0; 4];
    device.region_read(bar, &mut word, 0x40);
    println!("read back: {:#x}", u32::from_le_bytes(word));

    let page = Box::new(Page([0; 4096]));
    let address = page.0.as_ptr().cast_mut();
    // SAFETY: the page lives until it is unmapped below, and no device is told of it.
    unsafe { container.vfio_dma_map(IOVA, size_of::<Page>(), address)? };
    container.vfio_dma_unmap(IOVA, size_of::<Page>())?;
    println!("mapped and unmapped");

    let vectors = device.max_interrupts();
    println!("vectors: {vectors}");
    if device.get_irq_info(2).is_some_and(|irq| irq.count > 0) {
        let event = EventFd::new(0)?;
        device.enable_msix(vec![&event])?;
        device.trigger_irq(2, 0)?;
        println!("MSI-X: {}", event.read()?);
        device.disable_msix()?;
    }
    device.reset();
    device.region_write(CONFIG, &6_u16.to_le_bytes(), 4);

    let range = VfioRegionDmaRange {
        offset: 0,
        length: 4096,
    };
    match device.export_dma_buf(bar, &[range], 0x8_0002)? {
        None => println!("no dma-buf"),
        Some(file) => {
            let info = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
            let mut text = String::new();
            File::open(info)?.read_to_string(&mut text)?;
            let of_it = text
                .lines()
                .filter(|line| ["flags:", "size:"].iter().any(|key| line.starts_with(key)));
            println!("dma-buf: {}", of_it.collect::<Vec<_>>().join(", "));
        }
    }
    Ok(())
}
