//! Memory for DMA.

use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
use rustix::io::Errno;

use super::DmaAccess;
use super::DmaMapping;
use super::Iommu;
use crate::Error;
use crate::Lease;
use crate::Mapping;
use crate::Result;
use crate::error::Object;
use crate::sys::memory;

/// Options of a [`DmaBuffer`].
///
/// # Examples
///
/// ```no_run
/// # fn example(iommu: &barlease::Iommu) -> barlease::Result<()> {
/// // For a device that has 32 address lines.
/// let ring = barlease::DmaOptions::new()
///     .below(1 << 32)
///     .allocate(iommu, 4096)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DmaOptions {
    iova: Option<u64>,
    below: Option<u64>,
    access: DmaAccess,
    huge: bool,
}

impl Default for DmaOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl DmaOptions {
    /// The defaults: any address, to be read and written, ordinary pages.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            iova: None,
            below: None,
            access: DmaAccess::ReadWrite,
            huge: false,
        }
    }

    /// Where devices are to find it: a multiple of [`Iommu::page_size`].
    #[must_use]
    pub const fn iova(mut self, iova: u64) -> Self {
        self.iova = Some(iova);
        self
    }

    /// All of it is to be below this address, as for a device that has 32 address lines. No effect
    /// together with [`DmaOptions::iova`].
    #[must_use]
    pub const fn below(mut self, limit: u64) -> Self {
        self.below = Some(limit);
        self
    }

    /// The access that devices have to it.
    #[must_use]
    pub const fn access(mut self, access: DmaAccess) -> Self {
        self.access = access;
        self
    }

    /// Takes huge pages (of 2 MiB, with pages of 4 KiB), of which the host must have reserved
    /// enough (`/proc/sys/vm/nr_hugepages`).
    #[must_use]
    pub const fn huge_pages(mut self) -> Self {
        self.huge = true;
        self
    }

    /// Allocates at least `length` bytes of zeros, whole pages, and maps them.
    ///
    /// Errors: as for [`Iommu::map_file`]; [`Error::Io`] with `ENOMEM`: no memory, no huge pages,
    /// or over the limit of locked memory (`ulimit -l`); with `EFBIG`: over that of files
    /// (`ulimit -f`).
    pub fn allocate(&self, iommu: &Iommu, length: u64) -> Result<DmaBuffer> {
        let failed = |errno| Error::from_errno("allocate memory for DMA", Object::Iommu, errno);
        let huge = memory::huge();
        let page = iommu
            .page_size()?
            .max(if self.huge { huge as u64 } else { 1 });
        let length = length
            .checked_next_multiple_of(page)
            .filter(|length| i64::try_from(*length).is_ok())
            .ok_or_else(|| failed(Errno::NOMEM))?;

        let mut flags = MemfdFlags::ALLOW_SEALING;
        if self.huge {
            // The size is said by its power of two, from bit 26 on (`MFD_HUGE_SHIFT`).
            flags |= MemfdFlags::HUGETLB;
            flags |= MemfdFlags::from_bits_retain(huge.trailing_zeros() << 26);
        }
        let file = memory::memfd("barlease-dma", length, flags).map_err(failed)?;
        // Nobody who gets the descriptor can cut it under our feet.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(failed)?;

        // Of a container, the memory is mapped by its address here.
        let place = match self.below {
            Some(0) => return Err(failed(Errno::NOMEM)),
            Some(limit) => iommu.place_within(length, self.iova, limit - 1)?,
            None => iommu.place_within(length, self.iova, u64::MAX)?,
        };
        let memory =
            Lease::from_fd(file.try_clone().map_err(|error| {
                Error::from_io("allocate memory for DMA", Object::Iommu, error)
            })?)?
            .map()?;
        if !place.map_file((file.as_fd(), 0), self.access)? {
            place.map_shared(&memory, self.access)?;
        }
        Ok(DmaBuffer {
            mapping: place.mapped(None),
            memory,
            file,
        })
    }
}

/// Memory that this process and devices share.
///
/// It begins with zeros, and dereferences to a [`Mapping`], whose accesses are volatile: nothing
/// that a device writes meanwhile is undefined. Dropping it takes it from the devices first. Stop
/// them before: a device that still uses the address then gets a fault of the IOMMU.
///
/// [`dma::write_barrier`](crate::dma::write_barrier) orders a write here before a later one to a
/// register.
///
/// # Examples
///
/// ```no_run
/// # fn example(device: &barlease::Device, registers: &barlease::Mapping) -> barlease::Result<()> {
/// use barlease::{DmaBuffer, dma};
///
/// let buffer = DmaBuffer::new(device.require_iommu()?, 4096)?;
/// buffer.write(0, 0x600d_u32)?;
/// dma::write_barrier();
/// registers.write(0x80, buffer.iova())?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DmaBuffer {
    // Dropped in this order.
    mapping: DmaMapping,
    memory: Mapping,
    file: OwnedFd,
}

impl DmaBuffer {
    /// Allocates at least `length` bytes with the default [`DmaOptions`]; see
    /// [`DmaOptions::allocate`].
    pub fn new(iommu: &Iommu, length: u64) -> Result<Self> {
        DmaOptions::new().allocate(iommu, length)
    }

    /// Where devices find it.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.mapping.iova()
    }
}

impl Deref for DmaBuffer {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.memory
    }
}

impl AsFd for DmaBuffer {
    /// A sealed memfd: another process that is sent it shares the memory too.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeIommu;

    #[test]
    fn a_buffer_is_shared_with_devices_until_it_is_dropped() {
        let fake = FakeIommu::new().unwrap();
        let iommu = fake.iommu().unwrap();
        let buffer = DmaBuffer::new(&iommu, 5000).unwrap();
        assert_eq!(buffer.len(), 8192);
        let at = buffer.iova();
        buffer.write(0x1010, 0x600d_u32).unwrap();
        let mut back = [0; 4];
        fake.read(at + 0x1010, &mut back).unwrap();
        assert_eq!(back, 0x600d_u32.to_ne_bytes());
        fake.write(at, &[7; 8]).unwrap();
        assert_eq!(buffer.read::<u64>(0).unwrap(), u64::from_ne_bytes([7; 8]));
        // Nobody cuts it.
        assert!(rustix::fs::ftruncate(&buffer, 0).is_err());
        let other = DmaBuffer::new(&iommu, 1).unwrap();
        assert_ne!(other.iova(), at);
        drop(buffer);
        assert!(fake.read(at, &mut back).is_err());
        assert_eq!(DmaBuffer::new(&iommu, 8192).unwrap().iova(), at);
    }

    #[test]
    fn a_buffer_is_below_the_limit_or_not_at_all() {
        let fake = FakeIommu::new().unwrap();
        let iommu = fake.iommu().unwrap();
        let options = DmaOptions::new().below(0x4000);
        let buffers: Vec<_> = (0..3)
            .map(|_| options.allocate(&iommu, 4096).unwrap())
            .collect();
        assert!(buffers.iter().all(|buffer| buffer.iova() + 4096 <= 0x4000));
        let error = options.allocate(&iommu, 4096).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOMEM.raw_os_error()));
        for length in [0, u64::MAX] {
            assert!(DmaBuffer::new(&iommu, length).is_err());
        }
        // Aligned to large pages where that is possible.
        let huge = memory::huge() as u64;
        let large = DmaBuffer::new(&iommu, huge).unwrap();
        assert_eq!(large.iova() % huge, 0);
        let tight = DmaOptions::new()
            .below(huge + huge / 2)
            .allocate(&iommu, huge);
        assert!(tight.unwrap_err().errno() == Some(Errno::NOMEM.raw_os_error()));
        drop((large, buffers));
        let _high = DmaOptions::new().iova(huge).allocate(&iommu, 4096).unwrap();
        let low = DmaOptions::new()
            .below(2 * huge + 0x1_0000)
            .allocate(&iommu, huge);
        assert_eq!(low.unwrap().iova(), huge + 0x1000);
        let fixed = DmaOptions::new().iova(0x10_0000).allocate(&iommu, 4096);
        assert_eq!(fixed.unwrap().iova(), 0x10_0000);
    }
}
