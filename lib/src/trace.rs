//! Tells the crate `log` what the library does to the system (feature `log`): writes to files at
//! level `debug`, ioctls at level `trace`.

use std::path::Path;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

const VFIO: u32 = vfio::VFIO_TYPE as u32;
const BASE: u32 = vfio::VFIO_BASE;

/// A write to a file of the kernel's.
pub(crate) fn write(path: &Path, text: &str) {
    log::debug!("write {:?} to {}", text.trim_end(), path.display());
}

/// An ioctl, with the second word of its argument where it has one: its flags, in most of them.
pub(crate) fn ioctl(opcode: u32, second: Option<u32>, answer: &Result<i32, Errno>) {
    let name = name(opcode);
    let flags = second.map_or_else(String::new, |flags| format!(", {flags:#x}"));
    match answer {
        Ok(answer) => log::trace!("ioctl {name}{flags} = {answer}"),
        Err(errno) => log::trace!("ioctl {name}{flags} = {errno:?}: {errno}"),
    }
}

/// Some numbers mean another thing for a container than for a device.
fn name(opcode: u32) -> String {
    let (kind, number) = ((opcode >> 8) & 0xff, opcode & 0xff);
    let name = match (kind, number.wrapping_sub(BASE)) {
        (VFIO, 0) => "VFIO_GET_API_VERSION",
        (VFIO, 1) => "VFIO_CHECK_EXTENSION",
        (VFIO, 2) => "VFIO_SET_IOMMU",
        (VFIO, 3) => "VFIO_GROUP_GET_STATUS",
        (VFIO, 4) => "VFIO_GROUP_SET_CONTAINER",
        (VFIO, 6) => "VFIO_GROUP_GET_DEVICE_FD",
        (VFIO, 7) => "VFIO_DEVICE_GET_INFO",
        (VFIO, 8) => "VFIO_DEVICE_GET_REGION_INFO",
        (VFIO, 9) => "VFIO_DEVICE_GET_IRQ_INFO",
        (VFIO, 10) => "VFIO_DEVICE_SET_IRQS",
        (VFIO, 11) => "VFIO_DEVICE_RESET",
        (VFIO, 12) => "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO or VFIO_IOMMU_GET_INFO",
        (VFIO, 13) => "VFIO_DEVICE_PCI_HOT_RESET or VFIO_IOMMU_MAP_DMA",
        (VFIO, 14) => "VFIO_IOMMU_UNMAP_DMA",
        (VFIO, 17) => "VFIO_DEVICE_FEATURE",
        (VFIO, 18) => "VFIO_DEVICE_BIND_IOMMUFD",
        (VFIO, 19) => "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
        (VFIO, _) if (0x80..0x90).contains(&number) => return format!("iommufd {number:#x}"),
        _ => return format!("{opcode:#x}"),
    };
    name.to_owned()
}
