//! Exporting ranges of a BAR as a lease.

use std::os::fd::AsFd;

use barlease_abi as abi;
use rustix::fs::OFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::Device;
use crate::BarRange;
use crate::Error;
use crate::Lease;
use crate::LeaseInfo;
use crate::MemoryType;
use crate::Result;
use crate::sys::ioctl;
use crate::sys::ioctl::Words;

/// Bytes of `struct vfio_device_feature`, of its payload, and of a range.
const HEADER: usize = 8;
const FIXED: usize = size_of::<abi::DmaBufGet>();
const RANGE: usize = size_of::<abi::DmaRange>();

/// Leases ranges of a BAR.
///
/// Without a range the whole BAR is leased. The lease is the concatenation of the ranges, which
/// may be in any order, overlap and repeat; it is writable unless [`ExportBuilder::read_only`] is
/// called.
///
/// # Examples
///
/// ```no_run
/// # fn example(device: &barlease::Device) -> barlease::Result<()> {
/// let lease = device
///     .export(0)
///     .range(0x0, 0x1000)
///     .range(0x10_0000, 0x4000)
///     .export()?;
/// assert_eq!(lease.size(), 0x5000);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is leased before `export` is called"]
pub struct ExportBuilder<'a> {
    device: &'a Device,
    region: u32,
    ranges: Vec<BarRange>,
    writable: bool,
    stock: bool,
}

impl<'a> ExportBuilder<'a> {
    pub(super) fn new(device: &'a Device, region: u32) -> Self {
        Self {
            device,
            region,
            ranges: Vec::new(),
            writable: true,
            stock: false,
        }
    }

    /// Adds a range: offset in the BAR and length in bytes, both multiples of the page size.
    pub fn range(mut self, offset: u64, length: u64) -> Self {
        self.ranges.push(BarRange { offset, length });
        self
    }

    /// Adds ranges.
    pub fn ranges(mut self, ranges: impl IntoIterator<Item = BarRange>) -> Self {
        self.ranges.extend(ranges);
        self
    }

    /// The lease can be mapped for reading only. (An importer may write all the same.)
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// The lease can be mapped for writing: the default.
    pub fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// Has the kernel's own exporter make the dma-buf: for iommufd, which imports no other. It
    /// can be neither mapped nor revoked.
    pub fn stock(mut self) -> Self {
        self.stock = true;
        self
    }

    /// Makes the lease. If the device's memory is off or in reset, the lease is born revoked.
    ///
    /// Errors: [`Error::Unsupported`]: the driver cannot export; [`Error::Denied`]: a range
    /// overlaps the MSI-X table; [`Error::Io`] with `EINVAL` (a range that is empty, not page
    /// aligned or past the end), `E2BIG` (more than 65,536 ranges), `ENODEV` (not a BAR, or one
    /// that is absent or smaller than a page), `EOVERFLOW`, `EMFILE`.
    pub fn export(self) -> Result<Lease> {
        let ranges = self.ranges_or_all()?;
        let mut argument = self.argument(&ranges);
        let fd = ioctl::get_dma_buf(self.device.as_fd(), &mut argument)
            .map_err(|errno| self.explain(errno))?;
        let info = LeaseInfo {
            bdf: self.device.bdf(),
            bar: self.region,
            size: LeaseInfo::sum(&ranges).unwrap_or(u64::MAX),
            ranges,
            memory_type: MemoryType::Nc,
            writable: self.writable,
        };
        Ok(Lease::made(fd, info))
    }

    fn ranges_or_all(&self) -> Result<Vec<BarRange>> {
        if !self.ranges.is_empty() {
            return Ok(self.ranges.clone());
        }
        let length = self.device.region(self.region)?.size;
        Ok(vec![BarRange { offset: 0, length }])
    }

    /// Header, fixed part, ranges.
    fn argument(&self, ranges: &[BarRange]) -> Words {
        let feature = if self.stock {
            abi::FEATURE_DMA_BUF_STOCK
        } else {
            abi::FEATURE_DMA_BUF
        };
        let access = if self.writable {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let mut words = Words::zeroed(HEADER + FIXED + ranges.len() * RANGE);
        let flags = u32::from(feature) | vfio::VFIO_DEVICE_FEATURE_GET;
        words.put_u32(
            std::mem::offset_of!(vfio::vfio_device_feature, flags),
            flags,
        );
        let mut put = |field: usize, value| words.put_u32(HEADER + field, value);
        put(
            std::mem::offset_of!(abi::DmaBufGet, region_index),
            self.region,
        );
        put(
            std::mem::offset_of!(abi::DmaBufGet, open_flags),
            (access | OFlags::CLOEXEC).bits(),
        );
        put(
            std::mem::offset_of!(abi::DmaBufGet, nr_ranges),
            u32::try_from(ranges.len()).unwrap_or(u32::MAX),
        );
        for (n, range) in ranges.iter().enumerate() {
            let at = HEADER + FIXED + n * RANGE;
            words.put_u64(
                at + std::mem::offset_of!(abi::DmaRange, offset),
                range.offset,
            );
            words.put_u64(
                at + std::mem::offset_of!(abi::DmaRange, length),
                range.length,
            );
        }
        words
    }

    fn explain(&self, errno: Errno) -> Error {
        let object = self.device.region_object(self.region);
        self.device
            .unsupported_or("export", object, errno)
            .with_remedy(
                "the range overlaps the MSI-X table, with which a holder could raise interrupts: \
                 the parameter allow_msix_export of barlease_vfio_pci permits it",
            )
    }
}
