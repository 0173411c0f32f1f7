//! The ioctls of VFIO, iommufd and dma-buf.
//!
//! Nearly all of them take a structure whose first field is its length in bytes, `argsz` (iommufd:
//! `size`), and touch nothing behind that length. So one function suffices, [`call`], and its
//! proof is: the pointer is to at least `argsz` bytes that we may write.

pub(crate) mod iommu;
mod words;

use std::ffi::CStr;
use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;

use barlease_abi as abi;
use iommufd_bindings as iommufd;
use rustix::io::Errno;
use rustix::ioctl::Ioctl;
use rustix::ioctl::IoctlOutput;
use rustix::ioctl::Opcode;
use rustix::ioctl::opcode;
use vfio_bindings::bindings::vfio;

pub(crate) use words::Words;

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`.
const fn vfio_opcode(number: u8) -> Opcode {
    opcode::none(vfio::VFIO_TYPE, vfio::VFIO_BASE as u8 + number)
}

const VFIO_GROUP_GET_DEVICE_FD: Opcode = vfio_opcode(6);
const VFIO_DEVICE_RESET: Opcode = vfio_opcode(11);
/// Of a device; of a container 12 is `VFIO_IOMMU_GET_INFO`, and 13 `VFIO_IOMMU_MAP_DMA`.
const VFIO_DEVICE_PCI_HOT_RESET: u8 = 13;

/// `DMA_BUF_SET_NAME_B`: `_IOW('b', 1, __u64)`.
const DMA_BUF_SET_NAME: Opcode = opcode::write::<u64>(b'b', 1);

/// An ioctl whose argument starts with its length.
///
/// # Invariants
///
/// The kernel's handler of the number reads and writes at most the number of bytes that the first
/// `u32` of the argument says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request(Opcode);

// INVARIANT: `linux/vfio.h` and `linux/iommufd.h` say so of each of these.
/// `VFIO_GROUP_GET_STATUS`.
pub(crate) const GROUP_GET_STATUS: Request = Request(vfio_opcode(3));
/// `VFIO_DEVICE_GET_INFO`.
pub(crate) const DEVICE_GET_INFO: Request = Request(vfio_opcode(7));
/// `VFIO_DEVICE_GET_REGION_INFO`.
pub(crate) const DEVICE_GET_REGION_INFO: Request = Request(vfio_opcode(8));
/// `VFIO_DEVICE_FEATURE`.
pub(crate) const DEVICE_FEATURE: Request = Request(vfio_opcode(17));
/// `VFIO_DEVICE_GET_IRQ_INFO`.
pub(crate) const DEVICE_GET_IRQ_INFO: Request = Request(vfio_opcode(9));
/// `VFIO_DEVICE_SET_IRQS`.
pub(crate) const DEVICE_SET_IRQS: Request = Request(vfio_opcode(10));
/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`.
pub(crate) const DEVICE_HOT_RESET_INFO: Request = Request(vfio_opcode(12));
/// `VFIO_DEVICE_PCI_HOT_RESET`.
pub(crate) const DEVICE_HOT_RESET: Request = Request(vfio_opcode(VFIO_DEVICE_PCI_HOT_RESET));

/// The argument of a [`Request`].
///
/// # Safety
///
/// The type is `repr(C)`, its first field is the length as a `u32`, which [`Argument::set_length`]
/// sets, and every bit pattern is a valid value.
pub(crate) unsafe trait Argument {
    /// Stores the length in bytes in the first field.
    fn set_length(&mut self, length: u32);
}

macro_rules! arguments {
    ($($type:ty: $field:ident),+ $(,)?) => {$(
        // SAFETY: bindgen made the type from the kernel's header, `repr(C)` and of integers only,
        // and the named field is its first.
        unsafe impl Argument for $type {
            fn set_length(&mut self, length: u32) {
                const { assert!(std::mem::offset_of!($type, $field) == 0) };
                self.$field = length;
            }
        }
    )+};
}

arguments! {
    vfio::vfio_group_status: argsz,
    vfio::vfio_device_info: argsz,
    vfio::vfio_region_info: argsz,
    vfio::vfio_irq_info: argsz,
    vfio::vfio_device_bind_iommufd: argsz,
    vfio::vfio_device_attach_iommufd_pt: argsz,
    vfio::vfio_device_detach_iommufd_pt: argsz,
    vfio::vfio_iommu_type1_info: argsz,
    vfio::vfio_iommu_type1_dma_map: argsz,
    vfio::vfio_iommu_type1_dma_unmap: argsz,
    iommufd::iommu_ioas_alloc: size,
    iommufd::iommu_destroy: size,
    iommufd::iommu_ioas_map: size,
    iommufd::iommu_ioas_map_file: size,
    iommufd::iommu_ioas_unmap: size,
    iommufd::iommu_ioas_iova_ranges: size,
}

/// The payload of a `VFIO_DEVICE_FEATURE`.
///
/// # Safety
///
/// The type is `repr(C)` and every bit pattern is a valid value.
pub(crate) unsafe trait Payload {}

macro_rules! payloads {
    ($($type:ty),+ $(,)?) => {$(
        // SAFETY: `repr(C)` and of integers only.
        unsafe impl Payload for $type {}
    )+};
}

payloads! {
    (),
    abi::DmaBufRevoke,
    abi::DmaBufMemattr,
    abi::DmaBufTph,
    abi::AliasRegion,
    abi::DmaBufStatus,
    abi::DmaBufRevokeId,
    abi::Events,
    [u8; 16],
}

/// `struct vfio_device_feature` with its payload.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Feature<T> {
    argsz: u32,
    flags: u32,
    /// The bytes behind the header.
    pub(crate) payload: T,
}

impl<T: Payload> Feature<T> {
    /// `flags` is the index and one or more of `VFIO_DEVICE_FEATURE_GET`, `_SET`, `_PROBE`.
    pub(crate) fn new(flags: u32, payload: T) -> Self {
        Self {
            argsz: 0,
            flags,
            payload,
        }
    }
}

// SAFETY: `repr(C)`, the length is first, and the rest is valid for every bit pattern.
unsafe impl<T: Payload> Argument for Feature<T> {
    fn set_length(&mut self, length: u32) {
        self.argsz = length;
    }
}

/// An ioctl with a pointer argument.
struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the kernel gets the opcode and the pointer as given; whether they fit each other is for
// the callers of `rustix::ioctl::ioctl` below to prove, one by one.
unsafe impl Ioctl for Call {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// Issues an ioctl.
///
/// # Safety
///
/// `argument` points to `length` bytes that are exclusively ours, all initialised, which may get
/// any value, and the kernel touches no memory behind them that it must not.
unsafe fn issue(
    fd: BorrowedFd<'_>,
    opcode: Opcode,
    argument: *mut c_void,
    length: usize,
) -> Result<i32, Errno> {
    #[cfg(feature = "log")]
    let second = (length >= 8).then(|| {
        let words = argument.cast::<u32>();
        // SAFETY: the caller says that eight bytes and more are initialised and ours.
        unsafe { words.wrapping_add(1).read_unaligned() }
    });
    // SAFETY: the caller says that the kernel may use the argument.
    let answer = unsafe { rustix::ioctl::ioctl(fd, Call { opcode, argument }) };
    #[cfg(feature = "log")]
    crate::trace::ioctl(opcode, second, &answer);
    #[cfg(any(test, feature = "fake"))]
    if answer == Err(Errno::NOTTY) {
        // SAFETY: the caller says that these bytes are exclusively ours.
        let bytes = unsafe { std::slice::from_raw_parts_mut(argument.cast::<u8>(), length) };
        return crate::fake::ioctl(fd, opcode as u8, bytes).unwrap_or(answer);
    }
    let _ = length;
    answer
}

/// Issues `request` with `argument`, whose length field it sets.
pub(crate) fn call<T: Argument>(
    fd: BorrowedFd<'_>,
    request: Request,
    argument: &mut T,
) -> Result<i32, Errno> {
    let length = size_of::<T>();
    argument.set_length(u32::try_from(length).map_err(|_| Errno::INVAL)?);
    let argument = std::ptr::from_mut(argument).cast();
    // SAFETY: by the invariant of `Request` the kernel touches at most the bytes of the length
    // field, which are those of `argument`, exclusively borrowed; it may store any bytes there, by
    // the contract of `Argument`.
    unsafe { issue(fd, request.0, argument, length) }
}

/// As [`call`], for an argument with a variable length: `argument` starts with the length field.
pub(crate) fn call_bytes(
    fd: BorrowedFd<'_>,
    request: Request,
    argument: &mut Words,
) -> Result<i32, Errno> {
    let length = argument.len();
    argument.put_u32(0, u32::try_from(length).map_err(|_| Errno::INVAL)?);
    let argument = argument.as_mut_ptr().cast();
    // SAFETY: by the invariant of `Request` the kernel touches at most the bytes of the length
    // field, which are those of `argument`, exclusively borrowed.
    unsafe { issue(fd, request.0, argument, length) }
}

/// Turns the answer of an ioctl that makes a file descriptor into its owner.
///
/// # Safety
///
/// `answer` is the answer of an ioctl that returned a new descriptor, and nobody else owns it.
unsafe fn new_fd(answer: i32) -> OwnedFd {
    // SAFETY: the caller says that the descriptor is open and that we are its owner.
    unsafe { OwnedFd::from_raw_fd(answer) }
}

/// `VFIO_DEVICE_FEATURE` with GET of a feature that answers a new descriptor: feature 11 and
/// `BARLEASE_FEATURE_DMA_BUF_STOCK`. `argument` is the header, [`abi::DmaBufGet`] and the ranges.
pub(crate) fn get_dma_buf(device: BorrowedFd<'_>, argument: &mut Words) -> Result<OwnedFd, Errno> {
    let answer = call_bytes(device, DEVICE_FEATURE, argument)?;
    // SAFETY: both features answer a new descriptor.
    Ok(unsafe { new_fd(answer) })
}

/// Issues an ioctl whose argument is an integer.
fn call_integer(fd: BorrowedFd<'_>, opcode: Opcode, argument: usize) -> Result<i32, Errno> {
    let call = Call {
        opcode,
        argument: std::ptr::without_provenance_mut(argument),
    };
    // SAFETY: every caller passes an opcode for which the kernel takes the argument as a number
    // and follows no pointer.
    let answer = unsafe { rustix::ioctl::ioctl(fd, call) };
    #[cfg(feature = "log")]
    crate::trace::ioctl(opcode, None, &answer);
    #[cfg(any(test, feature = "fake"))]
    if answer == Err(Errno::NOTTY) {
        let mut bytes = (argument as u64).to_ne_bytes();
        return crate::fake::ioctl(fd, opcode as u8, &mut bytes).unwrap_or(answer);
    }
    answer
}

/// `VFIO_DEVICE_RESET`.
pub(crate) fn device_reset(device: BorrowedFd<'_>) -> Result<(), Errno> {
    call_integer(device, VFIO_DEVICE_RESET, 0).map(drop)
}

/// `VFIO_DEVICE_FEATURE` with whatever payload follows the header: `argument` is header and
/// payload.
///
/// # Safety
///
/// The kernel may follow all pointers that the feature has in its payload, and write through them
/// where the feature does.
pub(crate) unsafe fn feature(device: BorrowedFd<'_>, argument: &mut Words) -> Result<i32, Errno> {
    call_bytes(device, DEVICE_FEATURE, argument)
}

/// `VFIO_GROUP_GET_DEVICE_FD`.
pub(crate) fn group_device(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let call = Call {
        opcode: VFIO_GROUP_GET_DEVICE_FD,
        argument: name.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads a NUL-terminated string through the pointer and writes nothing.
    let answer = unsafe { rustix::ioctl::ioctl(group, call) }?;
    // SAFETY: the ioctl answers a new descriptor.
    Ok(unsafe { new_fd(answer) })
}

/// `DMA_BUF_SET_NAME`, on a descriptor of a dma-buf.
pub(crate) fn set_name(dma_buf: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let call = Call {
        opcode: DMA_BUF_SET_NAME,
        argument: name.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads a NUL-terminated string through the pointer and writes nothing: the
    // caller has made sure that the descriptor is one of a dma-buf.
    unsafe { rustix::ioctl::ioctl(dma_buf, call) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(DEVICE_FEATURE.0, 0x3b75);
        assert_eq!(DEVICE_GET_REGION_INFO.0, 0x3b6c);
        assert_eq!(DEVICE_SET_IRQS.0, 0x3b6e);
        assert_eq!(DEVICE_HOT_RESET.0, 0x3b71);
        assert_eq!(VFIO_DEVICE_RESET, 0x3b6f);
        assert_eq!(DMA_BUF_SET_NAME, 0x4008_6201);
    }

    #[test]
    fn our_copy_of_the_dma_buf_structures_equals_the_stock_one() {
        assert_eq!(
            size_of::<abi::DmaBufGet>(),
            size_of::<vfio::vfio_device_feature_dma_buf>()
        );
        assert_eq!(
            size_of::<abi::DmaRange>(),
            size_of::<vfio::vfio_region_dma_range>()
        );
        assert_eq!(
            u32::from(abi::FEATURE_DMA_BUF),
            vfio::VFIO_DEVICE_FEATURE_DMA_BUF
        );
        assert_eq!(
            offset_of!(abi::DmaBufGet, nr_ranges),
            offset_of!(vfio::vfio_device_feature_dma_buf, nr_ranges)
        );
    }

    #[test]
    fn the_payload_follows_the_header_at_once() {
        assert_eq!(offset_of!(Feature<abi::DmaBufStatus>, payload), 8);
        assert_eq!(size_of::<Feature<abi::DmaBufStatus>>(), 48);
        assert_eq!(offset_of!(Feature<abi::AliasRegion>, payload), 8);
        assert_eq!(size_of::<Feature<abi::DmaBufRevoke>>(), 12);
        assert_eq!(size_of::<Feature<()>>(), 8);
    }
}
