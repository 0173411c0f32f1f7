//! Exporting ranges of a BAR as a lease.

use std::ops::Bound;
use std::ops::RangeBounds;

use barlease_abi as abi;
use rustix::fs::OFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::Handle;
use super::config::ConfigSpace;
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
/// The lease is the concatenation of the ranges, which may be in any order, overlap and repeat.
/// Without a range it is all that [`exportable_ranges`] has of the BAR: the whole of it, but for
/// the pages of an MSI-X table. It is writable unless [`ExportBuilder::read_only`] is called.
///
/// [`exportable_ranges`]: crate::Device::exportable_ranges
///
/// # Examples
///
/// ```no_run
/// # fn example(device: &barlease::Device) -> barlease::Result<()> {
/// let lease = device
///     .export(0)
///     .range(0x0..0x1000)
///     .range(0x10_0000..0x10_4000)
///     .export()?;
/// assert_eq!(lease.size(), 0x5000);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is leased before `export` is called"]
pub struct ExportBuilder<'fd> {
    handle: Handle<'fd>,
    bar: u32,
    ranges: Vec<Wanted>,
    writable: bool,
    stock: bool,
}

/// A range as it was asked for.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Exactly(BarRange),
    /// From an offset to the end of the BAR.
    From(u64),
}

impl<'fd> ExportBuilder<'fd> {
    pub(crate) fn new(handle: Handle<'fd>, bar: u32) -> Self {
        Self {
            handle,
            bar,
            ranges: Vec::new(),
            writable: true,
            stock: false,
        }
    }

    /// Adds a range of bytes of the BAR, both ends multiples of the page size. `..` is all of it,
    /// an MSI-X table included.
    pub fn range(mut self, range: impl RangeBounds<u64>) -> Self {
        let offset = match range.start_bound() {
            Bound::Included(start) => *start,
            // Where this saturates the offset is not aligned, and refused.
            Bound::Excluded(start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => Some(end.saturating_add(1)),
            Bound::Excluded(end) => Some(*end),
            Bound::Unbounded => None,
        };
        self.ranges.push(match end {
            // One that is backwards is empty, and refused.
            Some(end) => Wanted::Exactly(BarRange {
                offset,
                length: end.saturating_sub(offset),
            }),
            None => Wanted::From(offset),
        });
        self
    }

    /// Adds ranges.
    pub fn ranges(mut self, ranges: impl IntoIterator<Item = BarRange>) -> Self {
        self.ranges.extend(ranges.into_iter().map(Wanted::Exactly));
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
        let ranges = self.resolve()?;
        let mut argument = self.argument(&ranges);
        let fd = ioctl::get_dma_buf(self.handle.fd, &mut argument)
            .map_err(|errno| self.explain(errno))?;
        let info = LeaseInfo {
            bdf: self.handle.bdf,
            bar: self.bar,
            size: LeaseInfo::sum(&ranges).unwrap_or(u64::MAX),
            ranges,
            memory_type: MemoryType::Nc,
            writable: self.writable,
        };
        Ok(Lease::made(fd, info))
    }

    fn resolve(&self) -> Result<Vec<BarRange>> {
        if self.ranges.is_empty() {
            return self.all();
        }
        let mut size = None;
        let mut ranges = Vec::with_capacity(self.ranges.len());
        for range in &self.ranges {
            ranges.push(match *range {
                Wanted::Exactly(range) => range,
                Wanted::From(offset) => {
                    let size = match size {
                        Some(size) => size,
                        None => *size.insert(self.handle.region(self.bar)?.size),
                    };
                    BarRange {
                        offset,
                        length: size.saturating_sub(offset),
                    }
                }
            });
        }
        Ok(ranges)
    }

    fn all(&self) -> Result<Vec<BarRange>> {
        let size = self.handle.region(self.bar)?.size;
        let whole = BarRange {
            offset: 0,
            length: size,
        };
        let ranges = ConfigSpace::new(self.handle)?.exportable_ranges(self.bar, size)?;
        // Nothing is left where the table fills the BAR: the driver says why not.
        Ok(if ranges.is_empty() {
            vec![whole]
        } else {
            ranges
        })
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
        put(std::mem::offset_of!(abi::DmaBufGet, region_index), self.bar);
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
        let object = self.handle.region_object(self.bar);
        let page = rustix::param::page_size() as u64;
        // The errno of a device that was pulled out, too: that one tells no size.
        if errno == Errno::NODEV && self.handle.region(self.bar).is_ok_and(|it| it.size < page) {
            let remedy = "the BAR has no memory, or less than a page of it: `barlease device show` \
                          lists what can be leased";
            return Error::unsupported("export", object, remedy).because(errno);
        }
        self.handle
            .unsupported_or("export", object, errno)
            .if_denied(
                "the range overlaps the MSI-X table, with which a holder could raise interrupts: \
                 lease what `exportable_ranges` answers; the parameter msix_export of \
                 barlease_vfio_pci permits the rest",
            )
    }
}
