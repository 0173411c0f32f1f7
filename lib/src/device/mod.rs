//! A PCI device that this process owns through VFIO.

mod caps;
mod export;
mod features;
mod open;
mod region;

use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::Bdf;
use crate::Error;
use crate::GuardedMapping;
use crate::MapOptions;
use crate::Mapping;
use crate::Result;
use crate::error::Object;
use crate::mapping::Source;
use crate::sys::ioctl;
use crate::sys::ioctl::Words;

pub use caps::RegionCapability;
pub use export::ExportBuilder;
pub use features::Features;
pub use features::Tph;
pub use open::Backend;
use open::Keep;
pub use open::OpenOptions;
pub(crate) use open::permission_remedy;
pub use region::DeviceInfo;
pub use region::Region;
pub use region::RegionKind;

/// For `fuzzing`.
#[cfg(feature = "fuzzing")]
pub(crate) fn parse_capabilities(answer: &[u8], first: u32) -> Option<usize> {
    Some(caps::parse(answer, first).ok()?.len())
}

/// Index of config space.
const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;

/// Longest answer about a region that is believed.
const MAX_REGION_INFO: u32 = 1 << 20;

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
    keep: Keep,
    bdf: Bdf,
    driver: Option<String>,
}

impl Device {
    /// Opens a device with the default [`OpenOptions`]; see [`OpenOptions::open`].
    pub fn open(bdf: Bdf) -> Result<Self> {
        OpenOptions::new().open(bdf)
    }

    fn new(bdf: Bdf, fd: OwnedFd, keep: Keep, driver: Option<String>) -> Result<Self> {
        let device = Self {
            fd,
            keep,
            bdf,
            driver,
        };
        // Asked for once here, so that a descriptor that is no VFIO device is noticed now.
        device.info()?;
        Ok(device)
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

    /// How it was opened: never [`Backend::Auto`].
    #[must_use]
    pub fn backend(&self) -> Backend {
        match self.keep {
            Keep::Group { .. } => Backend::Group,
            Keep::Cdev { .. } => Backend::Cdev,
        }
    }

    fn object(&self) -> Object {
        Object::Device(self.bdf)
    }

    fn region_object(&self, index: u32) -> Object {
        Object::Region {
            bdf: self.bdf,
            index,
        }
    }

    /// What VFIO says about it.
    ///
    /// Errors: [`Error::Io`].
    pub fn info(&self) -> Result<DeviceInfo> {
        let mut info = vfio::vfio_device_info::default();
        ioctl::call(self.as_fd(), ioctl::DEVICE_GET_INFO, &mut info)
            .map_err(|errno| Error::from_errno("get information", self.object(), errno))?;
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
    /// Errors: [`Error::Io`] (`EINVAL`: no such region), [`Error::Malformed`].
    pub fn region(&self, index: u32) -> Result<Region> {
        let failed =
            |errno| Error::from_errno("get region information", self.region_object(index), errno);
        let malformed = |reason: &'static str| {
            Error::malformed("get region information", self.region_object(index), reason)
        };
        let mut info = vfio::vfio_region_info {
            index,
            ..Default::default()
        };
        ioctl::call(self.as_fd(), ioctl::DEVICE_GET_REGION_INFO, &mut info).map_err(failed)?;
        if info.flags & vfio::VFIO_REGION_INFO_FLAG_CAPS == 0 {
            return Ok(Region::new(&info, Vec::new()));
        }

        // The kernel says how long the answer with capabilities is.
        if info.argsz > MAX_REGION_INFO {
            return Err(malformed("the answer is too long"));
        }
        let mut words = Words::zeroed(info.argsz as usize);
        words.put_u32(offset_of!(vfio::vfio_region_info, index), index);
        ioctl::call_bytes(self.as_fd(), ioctl::DEVICE_GET_REGION_INFO, &mut words)
            .map_err(failed)?;
        let bytes = words.to_bytes();
        let first = bytes
            .get(offset_of!(vfio::vfio_region_info, cap_offset)..)
            .and_then(|rest| rest.first_chunk())
            .map_or(0, |offset| u32::from_ne_bytes(*offset));
        let capabilities = caps::parse(&bytes, first)
            .map_err(|caps::BadChain| malformed("the capability chain is broken"))?;
        Ok(Region::new(&info, capabilities))
    }

    /// Leases ranges of a BAR: see [`ExportBuilder`].
    pub fn export(&self, region: u32) -> ExportBuilder<'_> {
        ExportBuilder::new(self, region)
    }

    /// Maps the bytes of `range` of a BAR through the device's own descriptor. The mapping keeps
    /// the device open.
    ///
    /// Errors: [`Error::Invalid`], [`Error::Io`].
    pub fn map_region(&self, index: u32, range: Range<u64>) -> Result<Mapping> {
        let region = self.region(index)?;
        MapOptions::new()
            .range(range)
            .map_source(&self.source(&region))
    }

    /// As [`Device::map_region`], guarded: see [`GuardedMapping`].
    pub fn map_region_guarded(&self, index: u32, range: Range<u64>) -> Result<GuardedMapping> {
        let region = self.region(index)?;
        MapOptions::new()
            .range(range)
            .map_source_guarded(&self.source(&region))
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
        let mut position = self.position(index, offset, buffer.len())?;
        let mut rest = buffer;
        while !rest.is_empty() {
            match rustix::io::pread(self.as_fd(), &mut *rest, position) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("read", index, errno)),
                Ok(0) => return Err(self.failed("read", index, Errno::IO)),
                Ok(count) => {
                    rest = rest.get_mut(count..).unwrap_or(&mut []);
                    position += count as u64;
                }
            }
        }
        Ok(())
    }

    /// Writes `buffer` to a region at `offset`, by system call.
    ///
    /// Errors: [`Error::OutOfBounds`]; [`Error::Io`] (`EIO`: memory of the device is off).
    pub fn write_region(&self, index: u32, offset: u64, buffer: &[u8]) -> Result<()> {
        let mut position = self.position(index, offset, buffer.len())?;
        let mut rest = buffer;
        while !rest.is_empty() {
            match rustix::io::pwrite(self.as_fd(), rest, position) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("write", index, errno)),
                Ok(0) => return Err(self.failed("write", index, Errno::IO)),
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or(&[]);
                    position += count as u64;
                }
            }
        }
        Ok(())
    }

    fn failed(&self, operation: &'static str, index: u32, errno: Errno) -> Error {
        Error::from_errno(operation, self.region_object(index), errno)
    }

    /// Where in the device's descriptor these bytes of a region are.
    fn position(&self, index: u32, offset: u64, length: usize) -> Result<u64> {
        let region = self.region(index)?;
        offset
            .checked_add(length as u64)
            .filter(|end| *end <= region.size)
            .and_then(|_| region.offset.checked_add(offset))
            .ok_or_else(|| Error::OutOfBounds {
                object: self.region_object(index),
                offset,
                length: length as u64,
            })
    }

    /// Reads 2 bytes of config space.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn read_config_u16(&self, offset: u64) -> Result<u16> {
        let mut bytes = [0; 2];
        self.read_region(CONFIG, offset, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Reads 4 bytes of config space.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn read_config_u32(&self, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read_region(CONFIG, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads bytes of config space.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn read_config(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.read_region(CONFIG, offset, buffer)
    }

    /// Writes bytes of config space, in one system call.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn write_config(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.write_region(CONFIG, offset, buffer)
    }

    /// Writes 2 bytes of config space.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn write_config_u16(&self, offset: u64, value: u16) -> Result<()> {
        self.write_config(offset, &value.to_le_bytes())
    }

    /// Resets it (`VFIO_DEVICE_RESET`). Leases are revoked for the time of it.
    ///
    /// Errors: [`Error::Unsupported`]: it has no way to be reset; [`Error::Io`].
    pub fn reset(&self) -> Result<()> {
        ioctl::device_reset(self.as_fd()).map_err(|errno| match errno {
            Errno::INVAL | Errno::NOTTY => {
                Error::unsupported("reset", self.object(), "the device has no reset of its own")
                    .because(errno)
            }
            errno => Error::from_errno("reset", self.object(), errno),
        })
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
