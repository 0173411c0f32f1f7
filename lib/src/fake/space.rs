//! An address space without an IOMMU.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;

use iommufd_bindings as iommufd;
use rustix::io::Errno;

use super::Argument;
use super::Thing;
use super::duplicate;
use super::failed;
use super::lock;
use super::memfd;
use super::register;
use crate::Error;
use crate::Iommu;
use crate::Result;
use crate::error::Object;

/// An address space for DMA without an IOMMU: the test does the DMA.
///
/// # Examples
///
/// ```
/// use barlease::{DmaBuffer, fake::FakeIommu};
///
/// let fake = FakeIommu::new()?;
/// let buffer = DmaBuffer::new(&fake.iommu()?, 4096)?;
/// fake.write(buffer.iova(), b"completed")?;
/// assert_eq!(buffer.read::<u8>(0)?, b'c');
/// # Ok::<(), barlease::Error>(())
/// ```
#[derive(Debug)]
pub struct FakeIommu {
    thing: Arc<Thing>,
    fd: OwnedFd,
}

#[derive(Debug, Default)]
pub(super) struct FakeSpace {
    state: Mutex<Space>,
}

#[derive(Debug, Default)]
struct Space {
    /// By first address.
    mapped: BTreeMap<u64, Mapped>,
    /// The error of the next `map` or `unmap`.
    fails: Option<Errno>,
}

#[derive(Debug)]
struct Mapped {
    length: u64,
    file: OwnedFd,
    start: u64,
    readable: bool,
    writable: bool,
}

impl FakeIommu {
    /// Makes one. It allows all addresses but the highest page, and those of interrupts on x86.
    ///
    /// Errors: [`Error::Io`].
    pub fn new() -> Result<Self> {
        let fd = memfd("barlease-fake-iommu", 0).map_err(failed)?;
        let thing = register(fd.as_fd(), Thing::Iommu(FakeSpace::default()))?;
        Ok(Self { thing, fd })
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        match &*self.thing {
            Thing::Iommu(space) => lock(&space.state),
            Thing::Device(_) => unreachable!("made as an address space"),
        }
    }

    /// The address space that a driver is to be tested with.
    ///
    /// Errors: [`Error::Io`].
    pub fn iommu(&self) -> Result<Iommu> {
        let fd = self.fd.try_clone();
        let fd = fd.map_err(|error| Error::from_io("duplicate", Object::Process, error))?;
        Iommu::from_iommufd(fd, None)
    }

    /// Reads what the device would read at an address.
    ///
    /// Errors: [`Error::Io`] with `EFAULT`: nothing is mapped there, or not for reading.
    pub fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<()> {
        let space = self.space();
        let (mapped, position) = space.find(iova, buffer.len(), |mapped| mapped.readable)?;
        let answer = rustix::io::pread(&mapped.file, buffer, position);
        answer.map(drop).map_err(dma_failed)
    }

    /// Writes what the device would write at an address.
    ///
    /// Errors: [`Error::Io`] with `EFAULT`: nothing is mapped there, or not for writing.
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Result<()> {
        let space = self.space();
        let (mapped, position) = space.find(iova, bytes.len(), |mapped| mapped.writable)?;
        let answer = rustix::io::pwrite(&mapped.file, bytes, position);
        answer.map(drop).map_err(dma_failed)
    }

    /// Has the next map or unmap fail with this error number.
    pub fn fail_next(&self, errno: i32) {
        self.space().fails = Some(Errno::from_raw_os_error(errno));
    }
}

fn dma_failed(errno: Errno) -> Error {
    Error::from_errno("DMA", Object::Iommu, errno)
}

impl Space {
    fn find(
        &self,
        iova: u64,
        length: usize,
        allowed: impl Fn(&Mapped) -> bool,
    ) -> Result<(&Mapped, u64)> {
        let (first, mapped) = self
            .mapped
            .range(..=iova)
            .next_back()
            .ok_or_else(|| dma_failed(Errno::FAULT))?;
        let within = iova - first;
        let end = within.checked_add(length as u64);
        if !allowed(mapped) || end.is_none_or(|end| end > mapped.length) {
            return Err(dma_failed(Errno::FAULT));
        }
        Ok((mapped, mapped.start + within))
    }
}

impl FakeSpace {
    pub(super) fn ioctl(&self, number: u8, bytes: &mut [u8]) -> Result<i32, Errno> {
        let mut space = lock(&self.state);
        let mut argument = Argument(bytes);
        match u32::from(number) {
            iommufd::IOMMUFD_CMD_DESTROY => Ok(0),
            iommufd::IOMMUFD_CMD_IOAS_ALLOC => {
                argument.put_u32(offset_of!(iommufd::iommu_ioas_alloc, out_ioas_id), 1);
                Ok(0)
            }
            iommufd::IOMMUFD_CMD_IOAS_MAP_FILE => {
                space.fails.take().map_or(Ok(()), Err)?;
                map_file(&mut space, &argument)
            }
            iommufd::IOMMUFD_CMD_IOAS_UNMAP => {
                space.fails.take().map_or(Ok(()), Err)?;
                let iova = argument.u64(offset_of!(iommufd::iommu_ioas_unmap, iova));
                let mapped = space.mapped.remove(&iova).ok_or(Errno::NOENT)?;
                argument.put_u64(offset_of!(iommufd::iommu_ioas_unmap, length), mapped.length);
                Ok(0)
            }
            _ => Err(Errno::NOTTY),
        }
    }
}

fn map_file(space: &mut Space, argument: &Argument<'_>) -> Result<i32, Errno> {
    type Map = iommufd::iommu_ioas_map_file;
    let flags = argument.u32(offset_of!(Map, flags));
    let iova = argument.u64(offset_of!(Map, iova));
    let length = argument.u64(offset_of!(Map, length));
    let end = iova.checked_add(length).ok_or(Errno::OVERFLOW)?;
    let clash = space
        .mapped
        .range(..end)
        .next_back()
        .is_some_and(|(first, mapped)| first + mapped.length > iova);
    if clash {
        return Err(Errno::EXIST);
    }
    let mapped = Mapped {
        length,
        file: duplicate(argument.i32(offset_of!(Map, fd)))?,
        start: argument.u64(offset_of!(Map, start)),
        readable: flags & iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE != 0,
        writable: flags & iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE != 0,
    };
    space.mapped.insert(iova, mapped);
    Ok(0)
}
