//! The features of a device, and the operations that need them.

use std::borrow::Cow;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;

use barlease_abi as abi;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::Device;
use crate::Error;
use crate::Lease;
use crate::MemoryType;
use crate::Reasons;
use crate::Result;
use crate::State;
use crate::Status;
use crate::error::Object;
use crate::sys::ioctl;
use crate::sys::ioctl::Feature;
use crate::sys::ioctl::Payload;

const GET: u32 = vfio::VFIO_DEVICE_FEATURE_GET;
const SET: u32 = vfio::VFIO_DEVICE_FEATURE_SET;
const PROBE: u32 = vfio::VFIO_DEVICE_FEATURE_PROBE;

/// Which features a device's driver has, as it says itself when probed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Features {
    /// Export of BAR ranges as dma-buf ([`Device::export`]).
    pub dma_buf: bool,
    /// Revocation of one lease ([`Device::revoke`]).
    pub revoke: bool,
    /// Memory type of mmaps ([`Device::set_memory_type`]).
    pub memory_type: bool,
    /// TPH steering tags ([`Device::set_tph`]).
    pub tph: bool,
    /// Region aliases ([`Device::alias_region`]).
    pub alias_region: bool,
    /// State of a lease ([`Device::status`]).
    pub status: bool,
    /// The kernel's own exporter beside ours ([`ExportBuilder::stock`](super::ExportBuilder::stock)).
    pub stock_dma_buf: bool,
}

impl Features {
    /// Name, and whether it is there.
    #[must_use]
    pub fn list(&self) -> [(&'static str, bool); 7] {
        [
            ("dma_buf", self.dma_buf),
            ("revoke", self.revoke),
            ("memory_type", self.memory_type),
            ("tph", self.tph),
            ("alias_region", self.alias_region),
            ("status", self.status),
            ("stock_dma_buf", self.stock_dma_buf),
        ]
    }
}

/// Steering tags of a lease, for peer-to-peer writes to it.
///
/// The 8-bit and the 16-bit tag are separate namespaces; 0 is a valid tag of either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tph {
    /// 8-bit tag.
    pub steering_tag: Option<u8>,
    /// 16-bit tag.
    pub steering_tag_ext: Option<u16>,
    /// Processing hint, 0 to 3.
    pub processing_hint: u8,
}

impl Device {
    /// Asks the driver which features it has.
    ///
    /// Errors: [`Error::Io`]. A feature that is not there is no error.
    pub fn features(&self) -> Result<Features> {
        Ok(Features {
            dma_buf: self.probe(abi::FEATURE_DMA_BUF, GET)?,
            revoke: self.probe(abi::FEATURE_DMA_BUF_REVOKE, SET)?,
            memory_type: self.probe(abi::FEATURE_DMA_BUF_MEMATTR, SET)?,
            tph: self.probe(abi::FEATURE_DMA_BUF_TPH, SET)?,
            alias_region: self.probe(abi::FEATURE_ALIAS_REGION, GET)?,
            status: self.probe(abi::FEATURE_DMA_BUF_STATUS, GET)?,
            stock_dma_buf: self.probe(abi::FEATURE_DMA_BUF_STOCK, GET)?,
        })
    }

    fn probe(&self, feature: u16, operation: u32) -> Result<bool> {
        let mut argument = Feature::new(u32::from(feature) | operation | PROBE, ());
        match ioctl::call(self.as_fd(), ioctl::DEVICE_FEATURE, &mut argument) {
            Ok(_) => Ok(true),
            Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP | Errno::NODEV) => Ok(false),
            Err(errno) => Err(Error::from_errno(
                "probe features",
                Object::Device(self.bdf()),
                errno,
            )),
        }
    }

    /// Issues a feature that is not about a lease.
    fn feature<T: Payload + Copy>(&self, flags: u32, payload: T) -> Result<T, Errno> {
        let mut argument = Feature::new(flags, payload);
        ioctl::call(self.as_fd(), ioctl::DEVICE_FEATURE, &mut argument)?;
        Ok(argument.payload)
    }

    /// Revokes a lease, at once and for good. When this returns, no process and no importer can
    /// reach the range through it any more. Waits for importers without a time-out. The range can
    /// be leased again at once.
    ///
    /// Errors: [`Error::Dead`]: it was revoked before; [`Error::WrongDevice`];
    /// [`Error::NotALease`]; [`Error::Unsupported`]: not bound to Barlease's driver.
    pub fn revoke(&self, lease: &Lease) -> Result<()> {
        let payload = abi::DmaBufRevoke {
            dmabuf_fd: lease.as_fd().as_raw_fd(),
        };
        self.feature(u32::from(abi::FEATURE_DMA_BUF_REVOKE) | SET, payload)
            .map(drop)
            .map_err(|errno| self.explain("revoke", lease, errno))
    }

    /// State of a lease.
    ///
    /// Errors: [`Error::WrongDevice`]; [`Error::NotALease`]; [`Error::Unsupported`]: not bound to
    /// Barlease's driver.
    pub fn status(&self, lease: &Lease) -> Result<Status> {
        let answer = self
            .raw_status(lease)
            .map_err(|errno| self.explain("status", lease, errno))?;
        let unknown = |what: &str, value: u32| {
            Error::malformed(
                "status",
                lease.object(),
                format!("the driver answered {what} {value}, which this version does not know"),
            )
        };
        Ok(Status {
            state: State::from_abi(answer.state).ok_or_else(|| unknown("state", answer.state))?,
            reasons: Reasons::from_bits(answer.reasons),
            memory_type: MemoryType::from_abi(answer.memattr)
                .ok_or_else(|| unknown("memory type", answer.memattr))?,
            region: answer.region_index,
            size: answer.size,
            nr_ranges: answer.nr_ranges,
            attachments: answer.nr_attachments,
        })
    }

    fn raw_status(&self, lease: &Lease) -> Result<abi::DmaBufStatus, Errno> {
        let payload = abi::DmaBufStatus {
            dmabuf_fd: lease.as_fd().as_raw_fd(),
            ..Default::default()
        };
        self.feature(u32::from(abi::FEATURE_DMA_BUF_STATUS) | GET, payload)
    }

    /// Sets the memory type that later mmaps of a lease get. Mappings that exist keep theirs.
    ///
    /// Errors: [`Error::Dead`]; [`Error::WrongDevice`]; [`Error::NotALease`];
    /// [`Error::Unsupported`]: write-combining would not be real here, or not bound to Barlease's
    /// driver.
    pub fn set_memory_type(&self, lease: &Lease, memory_type: MemoryType) -> Result<()> {
        let payload = abi::DmaBufMemattr {
            dmabuf_fd: lease.as_fd().as_raw_fd(),
            memattr: memory_type.to_abi(),
        };
        self.feature(u32::from(abi::FEATURE_DMA_BUF_MEMATTR) | SET, payload)
            .map_err(|errno| self.explain("set memory type", lease, errno))?;
        lease.note_memory_type(memory_type);
        Ok(())
    }

    /// Replaces the steering tags of a lease. The default of [`Tph`] clears them.
    ///
    /// Errors: [`Error::Invalid`]: a processing hint over 3; [`Error::Dead`];
    /// [`Error::WrongDevice`]; [`Error::NotALease`]; [`Error::Unsupported`]: the device does not
    /// complete TPH, or not bound to Barlease's driver.
    pub fn set_tph(&self, lease: &Lease, tph: Tph) -> Result<()> {
        if tph.processing_hint > 3 {
            return Err(Error::invalid(
                "set steering tag",
                lease.object(),
                format!("the processing hint {} is over 3", tph.processing_hint),
            ));
        }
        let flag = |set, flag| if set { flag } else { 0 };
        let payload = abi::DmaBufTph {
            dmabuf_fd: lease.as_fd().as_raw_fd(),
            flags: flag(tph.steering_tag.is_some(), abi::TPH_ST)
                | flag(tph.steering_tag_ext.is_some(), abi::TPH_ST_EXT),
            steering_tag_ext: tph.steering_tag_ext.unwrap_or_default(),
            steering_tag: tph.steering_tag.unwrap_or_default(),
            ph: tph.processing_hint,
        };
        self.feature(u32::from(abi::FEATURE_DMA_BUF_TPH) | SET, payload)
            .map(drop)
            .map_err(|errno| self.explain("set steering tag", lease, errno))
    }

    /// Makes a further region that maps the same BAR with another memory type, and answers its
    /// index. The same request answers the same index. It lives until the device is closed.
    ///
    /// Errors: [`Error::Unsupported`]: write-combining would not be real here, or not bound to
    /// Barlease's driver; [`Error::Io`] with `EINVAL` (uncached, or an alias of an alias), `ENODEV`
    /// (not an mmap-able BAR of at least a page), `ENOSPC`.
    pub fn alias_region(&self, region: u32, memory_type: MemoryType) -> Result<u32> {
        let payload = abi::AliasRegion {
            mapping_flags: match memory_type {
                MemoryType::Wc => abi::ALIAS_WC,
                MemoryType::Nc => 0,
            },
            region_index: region,
            ..Default::default()
        };
        self.feature(u32::from(abi::FEATURE_ALIAS_REGION) | GET, payload)
            .map(|answer| answer.alias_index)
            .map_err(|errno| self.unsupported_or("alias region", self.region_object(region), errno))
    }

    /// Puts the device into low power (`VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY`). Leases are revoked
    /// until [`Device::exit_low_power`].
    ///
    /// Errors: [`Error::Unsupported`], [`Error::Io`].
    pub fn enter_low_power(&self) -> Result<()> {
        self.low_power(vfio::VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, "enter low power")
    }

    /// Wakes the device (`VFIO_DEVICE_FEATURE_LOW_POWER_EXIT`).
    ///
    /// Errors: [`Error::Unsupported`], [`Error::Io`].
    pub fn exit_low_power(&self) -> Result<()> {
        self.low_power(vfio::VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, "exit low power")
    }

    fn low_power(&self, feature: u32, operation: &'static str) -> Result<()> {
        self.feature(feature | SET, ())
            .map_err(|errno| self.unsupported_or(operation, Object::Device(self.bdf()), errno))
    }

    /// Sorts the errnos of the operations on a lease.
    fn explain(&self, operation: &'static str, lease: &Lease, errno: Errno) -> Error {
        let object = lease.object();
        match errno {
            Errno::BADFD => Error::dead(operation, object).because(errno),
            Errno::INVAL => Error::not_a_lease(operation, object).because(errno),
            // Both a dead lease and one of another device: only the latter has no status here.
            Errno::NODEV => match self.raw_status(lease) {
                Ok(status) if status.state == abi::STATE_DEAD => {
                    Error::dead(operation, object).because(errno)
                }
                _ => Error::wrong_device(operation, object).because(errno),
            },
            errno => self.unsupported_or(operation, object, errno),
        }
    }

    /// Sorts out what the driver (`ENOTTY`) or the platform (`EOPNOTSUPP`) does not have.
    pub(super) fn unsupported_or(
        &self,
        operation: &'static str,
        object: Object,
        errno: Errno,
    ) -> Error {
        let remedy = match errno {
            Errno::NOTTY => self.driver_remedy().into(),
            Errno::OPNOTSUPP => {
                Cow::from("the driver has it, but not for this device on this platform")
            }
            errno => return Error::from_errno(operation, object, errno),
        };
        Error::unsupported(operation, object, remedy).because(errno)
    }

    fn driver_remedy(&self) -> String {
        let bdf = self.bdf();
        match self.driver() {
            Some(abi::DRIVER_NAME) => {
                "the loaded barlease_vfio_pci does not have it: update the module".to_owned()
            }
            driver => format!(
                "bound to {}; `barlease device bind {bdf}` binds it to {}",
                driver.unwrap_or("an unknown driver"),
                abi::DRIVER_NAME
            ),
        }
    }
}
