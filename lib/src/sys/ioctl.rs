//! The ioctls of VFIO, iommufd and dma-buf.
//!
//! Nearly all of them take a structure whose first field is its length in bytes, `argsz` (iommufd:
//! `size`), and touch nothing behind that length. So one function suffices, [`call`], and its
//! proof is: the pointer is to at least `argsz` bytes that we may write.

use std::ffi::CStr;
use std::ffi::c_void;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
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

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`.
const fn vfio_opcode(number: u8) -> Opcode {
    opcode::none(vfio::VFIO_TYPE, vfio::VFIO_BASE as u8 + number)
}

/// `_IO(IOMMUFD_TYPE, number)`.
const fn iommufd_opcode(number: u32) -> Opcode {
    opcode::none(iommufd::IOMMUFD_TYPE, number as u8)
}

const VFIO_GET_API_VERSION: Opcode = vfio_opcode(0);
const VFIO_CHECK_EXTENSION: Opcode = vfio_opcode(1);
const VFIO_SET_IOMMU: Opcode = vfio_opcode(2);
const VFIO_GROUP_SET_CONTAINER: Opcode = vfio_opcode(4);
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
    /// What follows the header.
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
    let argument = argument.0.as_mut_ptr().cast();
    // SAFETY: by the invariant of `Request` the kernel touches at most the bytes of the length
    // field, which are those of `argument`, exclusively borrowed.
    unsafe { issue(fd, request.0, argument, length) }
}

/// Bytes, aligned for any structure of the kernel, with fields in native byte order.
#[derive(Clone, Debug)]
pub(crate) struct Words(Vec<u64>);

impl Words {
    /// `len` bytes of 0, rounded up to a multiple of 8.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self(vec![0; len.div_ceil(8)])
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.len() * 8
    }

    /// Stores `value` at a byte offset that is a multiple of 4. Nothing happens past the end.
    pub(crate) fn put_u32(&mut self, offset: usize, value: u32) {
        let Some(word) = self.0.get_mut(offset / 8) else {
            return;
        };
        let mut bytes = word.to_ne_bytes();
        if let Some(field) = bytes.get_mut(offset % 8..offset % 8 + 4) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
        *word = u64::from_ne_bytes(bytes);
    }

    /// Stores `value` at a byte offset that is a multiple of 8. Nothing happens past the end.
    pub(crate) fn put_u64(&mut self, offset: usize, value: u64) {
        if let Some(word) = self.0.get_mut(offset / 8) {
            *word = value;
        }
    }

    /// The `u32` at a byte offset that is a multiple of 4; 0 past the end.
    pub(crate) fn u32(&self, offset: usize) -> u32 {
        let bytes = self.0.get(offset / 8).map(|word| word.to_ne_bytes());
        bytes
            .as_ref()
            .and_then(|bytes| bytes.get(offset % 8..)?.first_chunk())
            .map_or(0, |field| u32::from_ne_bytes(*field))
    }

    /// The `u64` at a byte offset that is a multiple of 8; 0 past the end.
    pub(crate) fn u64(&self, offset: usize) -> u64 {
        self.0.get(offset / 8).copied().unwrap_or(0)
    }

    /// Stores bytes at an offset that is a multiple of 8. Nothing happens past the end.
    pub(crate) fn put_bytes(&mut self, offset: usize, bytes: &[u8]) {
        for (n, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word.iter_mut()
                .zip(chunk)
                .for_each(|(to, from)| *to = *from);
            self.put_u64(offset + n * 8, u64::from_ne_bytes(word));
        }
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> impl Iterator<Item = u8> + '_ {
        self.0.iter().flat_map(|word| word.to_ne_bytes())
    }

    /// The bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.bytes().collect()
    }
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
        assert_eq!(IOAS_ALLOC.0, 0x3b81);
        assert_eq!(IOAS_MAP_FILE.0, 0x3b8f);
        assert_eq!(DEVICE_SET_IRQS.0, 0x3b6e);
        assert_eq!(DEVICE_HOT_RESET.0, 0x3b71);
        assert_eq!(TYPE1_MAP_DMA.0, 0x3b71);
        assert_eq!(TYPE1_UNMAP_DMA.0, 0x3b72);
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

    #[test]
    fn words_hold_fields_in_native_order() {
        let mut words = Words::zeroed(17);
        assert_eq!(words.len(), 24);
        words.put_u32(0, 1);
        words.put_u32(4, 2);
        words.put_u64(8, 3);
        words.put_u32(4096, 9);
        let bytes = words.to_bytes();
        assert_eq!(bytes[..4], 1u32.to_ne_bytes());
        assert_eq!(bytes[4..8], 2u32.to_ne_bytes());
        assert_eq!(bytes[8..16], 3u64.to_ne_bytes());
    }
}
