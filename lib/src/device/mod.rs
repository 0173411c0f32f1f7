//! A PCI device that this process owns through VFIO.

mod adopt;
mod attach;
mod caps;
pub mod config;
mod export;
mod features;
mod handle;
mod interrupts;
mod open;
mod region;
mod reset;
pub(crate) mod serial;

use std::ops::Bound;
use std::ops::RangeBounds;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use barlease_abi as abi;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::BarRange;
use crate::Bdf;
use crate::DmaBuffer;
use crate::Error;
use crate::GuardedMapping;
use crate::Iommu;
use crate::MapOptions;
use crate::Mapping;
use crate::Result;
use crate::error::Object;
use crate::mapping::Source;

pub use adopt::DeviceParts;
pub use caps::RegionCapability;
use config::ConfigSpace;
pub use export::ExportBuilder;
pub use features::FeatureOperation;
pub use features::Features;
pub(crate) use handle::Handle;
pub(crate) use handle::bdf_of;
pub use interrupts::InterruptInfo;
pub use interrupts::InterruptKind;
pub use open::Backend;
pub use open::OpenOptions;
pub use open::ParseVfTokenError;
pub use open::VfToken;
pub(crate) use open::open_node;
pub(crate) use open::permission_remedy;
pub use region::DeviceInfo;
pub use region::Region;
pub use region::RegionKind;
pub use reset::ResetMember;

/// For `fuzzing`.
#[cfg(feature = "fuzzing")]
pub(crate) fn parse_capabilities(answer: &[u8], first: u32) -> Option<usize> {
    Some(caps::parse(answer, first).ok()?.len())
}

/// Index of config space.
const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;

/// Regions that every device has, be it with size 0; aliases come after them.
const FIXED_REGIONS: usize = vfio::VFIO_PCI_NUM_REGIONS as usize;

/// An open PCI device.
///
/// It owns the VFIO device: config space, BARs, reset, and the leases that it exports. Dropping it
/// closes the device, and every lease of it is dead then; mappings that were made with
/// [`Device::map_region`] keep it open until they are dropped too. All threads may share it.
///
/// # Examples
///
/// ```no_run
/// use barlease::Device;
///
/// let device = Device::open("0000:00:05.0".parse()?)?;
/// for region in device.regions()? {
///     println!("{} {:#x}", region.kind, region.size);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Device {
    // Closed in this order.
    fd: OwnedFd,
    iommu: Option<Iommu>,
    bdf: Bdf,
    driver: Option<String>,
    /// Its id in its iommufd, if we have bound it.
    iommufd_id: Option<u32>,
    /// Whether the driver was asked about aliases: before that, no BAR says that it can have one.
    asked: OnceLock<()>,
    /// Where the fixed regions are, as far as they were asked for: it does not change.
    places: [OnceLock<Place>; FIXED_REGIONS],
}

/// Where a region is in the device's descriptor.
#[derive(Clone, Copy, Debug)]
struct Place {
    start: u64,
    size: u64,
}

impl Device {
    /// Opens a device with the default [`OpenOptions`]; see [`OpenOptions::open`].
    pub fn open(bdf: Bdf) -> Result<Self> {
        OpenOptions::new().open(bdf)
    }

    fn new(bdf: Bdf, fd: OwnedFd, iommu: Option<Iommu>, driver: Option<String>) -> Result<Self> {
        let device = Self {
            fd,
            iommu,
            bdf,
            driver,
            iommufd_id: None,
            asked: OnceLock::new(),
            places: Default::default(),
        };
        // Asked for once here, so that a descriptor that is no VFIO device is noticed now.
        device.info()?;
        Ok(device)
    }

    pub(crate) fn handle(&self) -> Handle<'_> {
        Handle {
            fd: self.fd.as_fd(),
            bdf: self.bdf,
        }
    }

    /// Its address.
    #[must_use]
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The driver that it was bound to when it was opened.
    #[must_use]
    pub fn driver(&self) -> Option<&str> {
        self.driver.as_deref()
    }

    /// How it was opened; `None`: by somebody else, and its address space is not known.
    #[must_use]
    pub fn backend(&self) -> Option<Backend> {
        self.iommu.as_ref().map(Iommu::backend)
    }

    /// The address space that it does DMA in. `None`: somebody else has opened the device, and
    /// nobody has [said](Device::with_iommu) which it is.
    #[must_use]
    pub fn iommu(&self) -> Option<&Iommu> {
        self.iommu.as_ref()
    }

    /// As [`Device::iommu`], for who cannot do without.
    ///
    /// Errors: [`Error::Unsupported`].
    pub fn require_iommu(&self) -> Result<&Iommu> {
        self.iommu().ok_or_else(|| {
            Error::unsupported(
                "map memory for DMA",
                self.object(),
                "the device was adopted: say with `with_iommu` which address space it is in",
            )
        })
    }

    /// Memory for DMA in its address space: [`DmaBuffer::new`] with [`Device::require_iommu`].
    ///
    /// Errors: as for these.
    pub fn dma_buffer(&self, length: u64) -> Result<DmaBuffer> {
        DmaBuffer::new(self.require_iommu()?, length)
    }

    fn object(&self) -> Object {
        self.handle().object()
    }

    fn region_object(&self, index: u32) -> Object {
        self.handle().region_object(index)
    }

    /// VFIO's description of it.
    ///
    /// Errors: [`Error::Io`].
    pub fn info(&self) -> Result<DeviceInfo> {
        let info = self.handle().info()?;
        Ok(DeviceInfo {
            num_regions: info.num_regions,
            num_irqs: info.num_irqs,
            resettable: info.flags & vfio::VFIO_DEVICE_FLAGS_RESET != 0,
        })
    }

    /// Its regions, aliases not included. Regions that the device does not have are of size 0.
    ///
    /// Errors: [`Error::Io`], [`Error::Malformed`].
    pub fn regions(&self) -> Result<Vec<Region>> {
        let mut regions = Vec::new();
        for index in 0..self.info()?.num_regions.min(1 << 16) {
            match self.region(index) {
                Ok(region) => regions.push(region),
                // VGA of a device that is no VGA adapter.
                Err(error) if error.errno() == Some(Errno::INVAL.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(regions)
    }

    /// One region. Aliases have information too.
    ///
    /// From the first call on, the driver adds to what it says of a BAR that it can be aliased, to
    /// others too that share the descriptor of an adopted device.
    ///
    /// Errors: [`Error::Io`] (`EINVAL`: no such region), [`Error::Malformed`].
    pub fn region(&self, index: u32) -> Result<Region> {
        self.asked.get_or_init(|| {
            // A driver that has no aliases says nothing of them.
            let _ = self.has_feature(abi::FEATURE_ALIAS_REGION, FeatureOperation::Get);
        });
        self.handle().region(index)
    }

    /// Leases ranges of a BAR: see [`ExportBuilder`].
    pub fn export(&self, bar: u32) -> ExportBuilder<'_> {
        ExportBuilder::new(self.handle(), bar)
    }

    /// The parts of a BAR that can be leased without handing out interrupts: all whole pages but
    /// those of the MSI-X table and of its pending bits.
    ///
    /// Errors: [`Error::Malformed`], [`Error::Io`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(device: &barlease::Device) -> barlease::Result<()> {
    /// for range in device.exportable_ranges(0)? {
    ///     let lease = device.export(0).ranges([range]).export()?;
    ///     println!("{range}: {:#x} bytes", lease.size());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn exportable_ranges(&self, bar: u32) -> Result<Vec<BarRange>> {
        let size = self.place(bar)?.size;
        self.config()?.exportable_ranges(bar, size)
    }

    /// Config space.
    ///
    /// Errors: [`Error::Io`].
    pub fn config(&self) -> Result<ConfigSpace<'_>> {
        let place = self.place(CONFIG)?;
        Ok(ConfigSpace::at(self.handle(), place.start, place.size))
    }

    /// Maps bytes of a BAR or an alias through the device's own descriptor; `..` is all of it. The
    /// mapping keeps the device open.
    ///
    /// Errors: [`Error::Invalid`], [`Error::Io`].
    pub fn map_region(&self, index: u32, range: impl RangeBounds<u64>) -> Result<Mapping> {
        let region = self.handle().region(index)?;
        let options = map_options(&region, range);
        options.map_source(&self.source(&region))
    }

    /// As [`Device::map_region`], guarded: see [`GuardedMapping`].
    pub fn map_region_guarded(
        &self,
        index: u32,
        range: impl RangeBounds<u64>,
    ) -> Result<GuardedMapping> {
        let region = self.handle().region(index)?;
        let options = map_options(&region, range);
        options.map_source_guarded(&self.source(&region))
    }

    fn source(&self, region: &Region) -> Source<'_> {
        Source {
            fd: self.as_fd(),
            file_offset: region.offset,
            size: region.size,
            writable: region.writable,
            object: self.region_object(region.index),
            ranges: &[],
            explain: Error::from_errno,
        }
    }

    /// Reads `buffer.len()` bytes of a region at `offset`, by system call.
    ///
    /// Errors: [`Error::OutOfBounds`]; [`Error::Io`] (`EIO`: memory of the device is off).
    pub fn read_region(&self, index: u32, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let position = self.position(index, offset, buffer.len())?;
        self.handle().read_at(index, position, buffer)
    }

    /// Writes `buffer` to a region at `offset`, by system call.
    ///
    /// Errors: [`Error::OutOfBounds`]; [`Error::Io`] (`EIO`: memory of the device is off).
    pub fn write_region(&self, index: u32, offset: u64, buffer: &[u8]) -> Result<()> {
        let position = self.position(index, offset, buffer.len())?;
        self.handle().write_at(index, position, buffer)
    }

    /// Where a region is.
    fn place(&self, index: u32) -> Result<Place> {
        let cache = self.places.get(index as usize);
        if let Some(place) = cache.and_then(OnceLock::get) {
            return Ok(*place);
        }
        let region = self.handle().region(index)?;
        let place = Place {
            start: region.offset,
            size: region.size,
        };
        if let Some(cache) = cache {
            // Another thread has found the same.
            let _ = cache.set(place);
        }
        Ok(place)
    }

    /// Where in the device's descriptor these bytes of a region are.
    fn position(&self, index: u32, offset: u64, length: usize) -> Result<u64> {
        let place = self.place(index)?;
        offset
            .checked_add(length as u64)
            .filter(|end| *end <= place.size)
            .and_then(|_| place.start.checked_add(offset))
            .ok_or_else(|| Error::OutOfBounds {
                object: self.region_object(index),
                offset,
                length: length as u64,
            })
    }
}

/// Bytes of a region as a range with two ends.
fn map_options(region: &Region, range: impl RangeBounds<u64>) -> MapOptions {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => region.size,
    };
    MapOptions::new().range(start..end)
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
