//! The ioctls of address spaces: containers and iommufd.

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use iommufd_bindings as iommufd;
use rustix::io::Errno;
use rustix::ioctl::Opcode;
use rustix::ioctl::opcode;
use vfio_bindings::bindings::vfio;

use super::Request;
use super::call;
use super::call_integer;
use super::issue;
use super::vfio_opcode;

/// `_IO(IOMMUFD_TYPE, number)`.
const fn iommufd_opcode(number: u32) -> Opcode {
    opcode::none(iommufd::IOMMUFD_TYPE, number as u8)
}

const VFIO_GET_API_VERSION: Opcode = vfio_opcode(0);
const VFIO_CHECK_EXTENSION: Opcode = vfio_opcode(1);
const VFIO_SET_IOMMU: Opcode = vfio_opcode(2);
const VFIO_GROUP_SET_CONTAINER: Opcode = vfio_opcode(4);

// INVARIANT: `linux/vfio.h` and `linux/iommufd.h` say of each of these what `Request` asks for.
/// `VFIO_IOMMU_GET_INFO`, of a container.
pub(crate) const TYPE1_GET_INFO: Request = Request(vfio_opcode(12));
/// `VFIO_IOMMU_UNMAP_DMA`, of a container.
const TYPE1_UNMAP_DMA: Request = Request(vfio_opcode(14));
/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
const DEVICE_ATTACH_IOMMUFD_PT: Request = Request(vfio_opcode(19));
/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
const DEVICE_DETACH_IOMMUFD_PT: Request = Request(vfio_opcode(20));
/// `IOMMU_IOAS_ALLOC`.
pub(crate) const IOAS_ALLOC: Request = Request(iommufd_opcode(iommufd::IOMMUFD_CMD_IOAS_ALLOC));
/// `IOMMU_DESTROY`.
const IOMMUFD_DESTROY: Request = Request(iommufd_opcode(iommufd::IOMMUFD_CMD_DESTROY));
/// `IOMMU_IOAS_MAP_FILE`.
const IOAS_MAP_FILE: Request = Request(iommufd_opcode(iommufd::IOMMUFD_CMD_IOAS_MAP_FILE));
/// `IOMMU_IOAS_UNMAP`.
const IOAS_UNMAP: Request = Request(iommufd_opcode(iommufd::IOMMUFD_CMD_IOAS_UNMAP));

// These have a pointer in their argument, so that their functions below are the only ones to issue
// them.
// INVARIANT: of the argument itself the kernel touches no more than its length.
/// `VFIO_DEVICE_BIND_IOMMUFD`.
const DEVICE_BIND_IOMMUFD: Request = Request(vfio_opcode(18));
/// `VFIO_IOMMU_MAP_DMA`, of a container.
const TYPE1_MAP_DMA: Request = Request(vfio_opcode(13));
/// `IOMMU_IOAS_MAP`.
const IOAS_MAP: Request = Request(iommufd_opcode(iommufd::IOMMUFD_CMD_IOAS_MAP));
/// `IOMMU_IOAS_IOVA_RANGES`.
const IOAS_IOVA_RANGES: Request = Request(iommufd_opcode(iommufd::IOMMUFD_CMD_IOAS_IOVA_RANGES));

/// `VFIO_GET_API_VERSION`.
pub(crate) fn api_version(container: BorrowedFd<'_>) -> Result<i32, Errno> {
    call_integer(container, VFIO_GET_API_VERSION, 0)
}

/// `VFIO_CHECK_EXTENSION`.
pub(crate) fn check_extension(container: BorrowedFd<'_>, extension: u32) -> Result<bool, Errno> {
    Ok(call_integer(container, VFIO_CHECK_EXTENSION, extension as usize)? > 0)
}

/// `VFIO_SET_IOMMU`.
pub(crate) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> Result<(), Errno> {
    call_integer(container, VFIO_SET_IOMMU, kind as usize).map(drop)
}

/// `VFIO_DEVICE_BIND_IOMMUFD`: the id of the device in the iommufd.
pub(crate) fn bind_iommufd(
    device: BorrowedFd<'_>,
    iommufd: BorrowedFd<'_>,
    token: Option<&[u8; 16]>,
) -> Result<u32, Errno> {
    let mut bind = vfio::vfio_device_bind_iommufd {
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    if let Some(token) = token {
        // The kernel reads 16 bytes there, which are borrowed until the call has returned.
        bind.flags = vfio::VFIO_DEVICE_BIND_FLAG_TOKEN;
        bind.token_uuid_ptr = std::ptr::from_ref(token).expose_provenance() as u64;
    }
    call(device, DEVICE_BIND_IOMMUFD, &mut bind)?;
    Ok(bind.out_devid)
}

/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: the whole device, or what it does for one address space of a
/// process.
pub(crate) fn attach(
    device: BorrowedFd<'_>,
    page_table: u32,
    pasid: Option<u32>,
) -> Result<(), Errno> {
    let mut attach = vfio::vfio_device_attach_iommufd_pt {
        flags: pasid.map_or(0, |_| vfio::VFIO_DEVICE_ATTACH_PASID),
        pt_id: page_table,
        pasid: pasid.unwrap_or(0),
        ..Default::default()
    };
    call(device, DEVICE_ATTACH_IOMMUFD_PT, &mut attach).map(drop)
}

/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`, as [`attach`].
pub(crate) fn detach(device: BorrowedFd<'_>, pasid: Option<u32>) -> Result<(), Errno> {
    let mut detach = vfio::vfio_device_detach_iommufd_pt {
        flags: pasid.map_or(0, |_| vfio::VFIO_DEVICE_DETACH_PASID),
        pasid: pasid.unwrap_or(0),
        ..Default::default()
    };
    call(device, DEVICE_DETACH_IOMMUFD_PT, &mut detach).map(drop)
}

/// `VFIO_IOMMU_MAP_DMA`: `length` bytes of this process's memory at `address`, for devices at
/// `iova`.
///
/// # Safety
///
/// Until it is unmapped, devices may read the memory, and write it if `flags` say so.
pub(crate) unsafe fn type1_map(
    container: BorrowedFd<'_>,
    flags: u32,
    address: *mut u8,
    length: u64,
    iova: u64,
) -> Result<(), Errno> {
    let mut map = vfio::vfio_iommu_type1_dma_map {
        flags,
        vaddr: address.expose_provenance() as u64,
        iova,
        size: length,
        ..Default::default()
    };
    call(container, TYPE1_MAP_DMA, &mut map).map(drop)
}

/// `VFIO_IOMMU_UNMAP_DMA`: how many bytes were mapped there.
pub(crate) fn type1_unmap(container: BorrowedFd<'_>, iova: u64, length: u64) -> Result<u64, Errno> {
    let mut unmap = vfio::vfio_iommu_type1_dma_unmap {
        iova,
        size: length,
        ..Default::default()
    };
    call(container, TYPE1_UNMAP_DMA, &mut unmap)?;
    Ok(unmap.size)
}

/// `IOMMU_IOAS_MAP` at a fixed IOVA.
///
/// # Safety
///
/// As for [`type1_map`].
pub(crate) unsafe fn ioas_map(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    flags: u32,
    address: *mut u8,
    length: u64,
    iova: u64,
) -> Result<(), Errno> {
    let mut map = iommufd::iommu_ioas_map {
        flags: flags | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
        ioas_id: ioas,
        user_va: address.expose_provenance() as u64,
        length,
        iova,
        ..Default::default()
    };
    call(iommufd, IOAS_MAP, &mut map).map(drop)
}

/// `IOMMU_IOAS_MAP_FILE` at a fixed IOVA: `length` bytes of a memfd or dma-buf from `start` on.
pub(crate) fn ioas_map_file(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    flags: u32,
    (file, start): (BorrowedFd<'_>, u64),
    length: u64,
    iova: u64,
) -> Result<(), Errno> {
    let mut map = iommufd::iommu_ioas_map_file {
        flags: flags | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
        ioas_id: ioas,
        fd: file.as_raw_fd(),
        start,
        length,
        iova,
        ..Default::default()
    };
    call(iommufd, IOAS_MAP_FILE, &mut map).map(drop)
}

/// `IOMMU_IOAS_UNMAP`: how many bytes were mapped there.
pub(crate) fn ioas_unmap(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    length: u64,
) -> Result<u64, Errno> {
    let mut unmap = iommufd::iommu_ioas_unmap {
        ioas_id: ioas,
        iova,
        length,
        ..Default::default()
    };
    call(iommufd, IOAS_UNMAP, &mut unmap)?;
    Ok(unmap.length)
}

/// `IOMMU_DESTROY`.
pub(crate) fn iommufd_destroy(iommufd: BorrowedFd<'_>, id: u32) -> Result<(), Errno> {
    let mut destroy = iommufd::iommu_destroy {
        id,
        ..Default::default()
    };
    call(iommufd, IOMMUFD_DESTROY, &mut destroy).map(drop)
}

/// `IOMMU_IOAS_IOVA_RANGES`: first and last IOVA of each allowed range, and what IOVAs must be
/// aligned to.
pub(crate) fn ioas_ranges(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
) -> Result<(Vec<(u64, u64)>, u64), Errno> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = crate::fake::iova_ranges(iommufd) {
        return Ok(answer);
    }
    let mut ranges = vec![iommufd::iommu_iova_range::default(); 16];
    // A device that is attached meanwhile can make more ranges of them.
    for _ in 0..8 {
        let mut query = iommufd::iommu_ioas_iova_ranges {
            ioas_id: ioas,
            num_iovas: u32::try_from(ranges.len()).map_err(|_| Errno::NOMEM)?,
            // The kernel writes as many there as `num_iovas` says, exclusively borrowed.
            allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        match call(iommufd, IOAS_IOVA_RANGES, &mut query) {
            Err(Errno::MSGSIZE) if query.num_iovas <= 1 << 16 => {
                ranges.resize(query.num_iovas as usize, Default::default());
            }
            Err(errno) => return Err(errno),
            Ok(_) => {
                ranges.truncate(query.num_iovas as usize);
                let ranges = ranges.iter().map(|range| (range.start, range.last));
                return Ok((ranges.collect(), query.out_iova_alignment));
            }
        }
    }
    Err(Errno::AGAIN)
}

/// `VFIO_GROUP_SET_CONTAINER`.
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut fd: i32 = container.as_fd().as_raw_fd();
    let argument = std::ptr::from_mut(&mut fd).cast();
    // SAFETY: the kernel reads one `int` through the pointer, which is to a live one.
    unsafe { issue(group, VFIO_GROUP_SET_CONTAINER, argument, size_of::<i32>()) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(IOAS_ALLOC.0, 0x3b81);
        assert_eq!(IOAS_MAP_FILE.0, 0x3b8f);
        assert_eq!(TYPE1_MAP_DMA.0, 0x3b71);
        assert_eq!(TYPE1_UNMAP_DMA.0, 0x3b72);
    }
}
