//! The leases of an open device, over whatever descriptor of it somebody has.

mod id;
mod list;

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use barlease_abi as abi;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::Bdf;
use crate::Error;
use crate::EventFd;
use crate::ExportBuilder;
use crate::Features;
use crate::Lease;
use crate::MemoryType;
use crate::Reasons;
use crate::Result;
use crate::State;
use crate::Status;
use crate::device::Handle;
use crate::device::bdf_of;
use crate::error::Object;

pub use id::LeaseId;
pub use list::LeaseRecord;
pub use list::List;
#[cfg(feature = "fuzzing")]
pub(crate) use list::parse_list;

const GET: u32 = vfio::VFIO_DEVICE_FEATURE_GET;
const SET: u32 = vfio::VFIO_DEVICE_FEATURE_SET;

/// Steering tags of a lease, for peer-to-peer writes to it.
///
/// The 8-bit and the 16-bit tag are separate namespaces; 0 is a valid tag of either.
///
/// # Examples
///
/// ```
/// use barlease::Tph;
///
/// let none = Tph::new();
/// let tagged = Tph::new().steering_tag(7).processing_hint(1);
/// assert_ne!(none, tagged);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tph {
    /// 8-bit tag.
    pub steering_tag: Option<u8>,
    /// 16-bit tag.
    pub steering_tag_ext: Option<u16>,
    /// Processing hint, 0 to 3.
    pub processing_hint: u8,
}

impl Tph {
    /// No tag.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            steering_tag: None,
            steering_tag_ext: None,
            processing_hint: 0,
        }
    }

    /// With this 8-bit tag.
    #[must_use]
    pub const fn steering_tag(mut self, tag: u8) -> Self {
        self.steering_tag = Some(tag);
        self
    }

    /// With this 16-bit tag.
    #[must_use]
    pub const fn steering_tag_ext(mut self, tag: u16) -> Self {
        self.steering_tag_ext = Some(tag);
        self
    }

    /// With this processing hint, 0 to 3.
    #[must_use]
    pub const fn processing_hint(mut self, hint: u8) -> Self {
        self.processing_hint = hint;
        self
    }
}

/// Whether importers are done with a lease that was revoked without waiting for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an importer may still have access"]
pub enum Revoked {
    /// Nobody has access any more.
    Done,
    /// An importer still has access. [`LeaseRecord::draining`] says when it has none, and the
    /// eventfd of [`Leases::events`] is signalled then.
    Draining,
}

/// The leases of an open device: export, list, revoke.
///
/// Nothing but the descriptor of the device is needed, whoever opened it and with whichever crate.
/// [`Device::leases`](crate::Device::leases) gives those of a device that this library opened.
///
/// # Examples
///
/// ```no_run
/// # fn example(vfio_device: std::os::fd::BorrowedFd<'_>) -> barlease::Result<()> {
/// use barlease::Leases;
///
/// let leases = Leases::new(vfio_device)?;
/// let lease = leases.export(0).range(0..0x1000).export()?;
/// for record in leases.list() {
///     let record = record?;
///     println!("{} {:?} {}", record.id, record.name, record.state);
/// }
/// leases.revoke(&lease)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Leases<'fd> {
    handle: Handle<'fd>,
}

impl<'fd> Leases<'fd> {
    /// Those of the device that this descriptor is of.
    ///
    /// Errors: [`Error::Unsupported`]: it is no device, or the kernel, an old one, does not say its
    /// address; then use [`Leases::of`].
    pub fn new(device: BorrowedFd<'fd>) -> Result<Self> {
        Ok(Self::of(device, bdf_of(device)?))
    }

    /// The same, of the function `bdf`. The address is for [`LeaseInfo`](crate::LeaseInfo) and
    /// errors: nothing checks it.
    #[must_use]
    pub fn of(device: BorrowedFd<'fd>, bdf: Bdf) -> Self {
        let handle = Handle { fd: device, bdf };
        Self { handle }
    }

    /// The device.
    #[must_use]
    pub fn bdf(&self) -> Bdf {
        self.handle.bdf
    }

    /// Asks the driver which features it has.
    ///
    /// Errors: [`Error::Io`]. A feature that is not there is no error.
    pub fn features(&self) -> Result<Features> {
        let probe = |feature, operation| self.handle.probe(feature, operation);
        Ok(Features {
            dma_buf: probe(abi::FEATURE_DMA_BUF, GET)?,
            revoke: probe(abi::FEATURE_DMA_BUF_REVOKE, SET)?,
            memory_type: probe(abi::FEATURE_DMA_BUF_MEMATTR, SET)?,
            tph: probe(abi::FEATURE_DMA_BUF_TPH, SET)?,
            alias_region: probe(abi::FEATURE_ALIAS_REGION, GET)?,
            status: probe(abi::FEATURE_DMA_BUF_STATUS, GET)?,
            stock_dma_buf: probe(abi::FEATURE_DMA_BUF_STOCK, GET)?,
            list: probe(abi::FEATURE_DMA_BUF_LIST, GET)?,
            revoke_id: probe(abi::FEATURE_DMA_BUF_REVOKE_ID, SET)?,
            events: probe(abi::FEATURE_EVENTS, SET)?,
        })
    }

    /// Leases ranges of a BAR, 0 to 5: see [`ExportBuilder`].
    pub fn export(&self, bar: u32) -> ExportBuilder<'fd> {
        ExportBuilder::new(self.handle, bar)
    }

    /// The leases of this open of the device, by id, those in it that were passed on included.
    ///
    /// They are asked for page by page while the iterator goes on: a lease that comes or goes
    /// meanwhile may be missing, each other one is there once. The iterator ends after an error.
    ///
    /// A lease that is revoked for good ([`State::Dead`]) is in the list until its last descriptor
    /// and mapping are gone; [`LeaseRecord::internal`] marks an entry that is no lease.
    ///
    /// Errors: [`Error::Unsupported`]: not bound to Barlease's driver, or to an older one;
    /// [`Error::Malformed`]; [`Error::Io`].
    pub fn list(&self) -> List<'fd> {
        List::new(self.handle)
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
        self.handle
            .feature(u32::from(abi::FEATURE_DMA_BUF_REVOKE) | SET, payload)
            .map(drop)
            .map_err(|errno| self.explain("revoke", lease, errno))
    }

    /// As [`Leases::revoke`], for a lease that is known by its id only.
    ///
    /// Errors: [`Error::Dead`]: it was revoked before; [`Error::Io`] with `ENOENT`: this open of
    /// the device has no such lease; [`Error::Invalid`]: a mapping of the BAR, no lease;
    /// [`Error::Unsupported`].
    pub fn revoke_id(&self, id: LeaseId) -> Result<()> {
        self.revoke_by_id(id, 0)
            .map_err(|errno| self.explain_id(id, errno))
    }

    /// As [`Leases::revoke_id`], without waiting for importers: processes have lost it when this
    /// returns, and importers were told.
    ///
    /// Errors: as for [`Leases::revoke_id`].
    pub fn revoke_id_nowait(&self, id: LeaseId) -> Result<Revoked> {
        match self.revoke_by_id(id, abi::REVOKE_NOWAIT) {
            Ok(()) => Ok(Revoked::Done),
            Err(Errno::INPROGRESS) => Ok(Revoked::Draining),
            Err(errno) => Err(self.explain_id(id, errno)),
        }
    }

    fn revoke_by_id(&self, id: LeaseId, flags: u32) -> Result<(), Errno> {
        let payload = abi::DmaBufRevokeId {
            id: id.get(),
            flags,
            reserved: 0,
        };
        let feature = u32::from(abi::FEATURE_DMA_BUF_REVOKE_ID) | SET;
        self.handle.feature(feature, payload).map(drop)
    }

    fn explain_id(&self, id: LeaseId, errno: Errno) -> Error {
        let object = Object::LeaseId(id);
        match errno {
            Errno::BADFD => Error::dead("revoke", object).because(errno),
            Errno::INVAL => {
                Error::invalid("revoke", object, "mappings of the BAR itself, no lease")
                    .because(errno)
            }
            errno => self.handle.unsupported_or("revoke", object, errno),
        }
    }

    /// A new eventfd that is signalled whenever a lease changes its state, has drained or
    /// disappears, and when the memory of the device goes off or on. It takes the place of the one
    /// before: a device has one.
    ///
    /// It says only that [`Leases::list`] or [`Leases::status`] is worth asking.
    ///
    /// Errors: [`Error::Unsupported`]: not bound to Barlease's driver, or to an older one;
    /// [`Error::Io`].
    pub fn events(&self) -> Result<EventFd> {
        let event = EventFd::new()?;
        self.set_events(Some(event.as_fd()))?;
        Ok(event)
    }

    /// As [`Leases::events`], with an eventfd of your own, or none.
    ///
    /// Errors: as for [`Leases::events`]; [`Error::Io`] with `EINVAL`: no eventfd.
    pub fn set_events(&self, event: Option<BorrowedFd<'_>>) -> Result<()> {
        let payload = abi::Events {
            eventfd: event.map_or(-1, |event| event.as_raw_fd()),
            reserved: 0,
        };
        self.handle
            .feature(u32::from(abi::FEATURE_EVENTS) | SET, payload)
            .map(drop)
            .map_err(|errno| {
                let object = self.handle.object();
                self.handle.unsupported_or("set events", object, errno)
            })
    }

    /// State of a lease.
    ///
    /// Errors: [`Error::WrongDevice`]; [`Error::NotALease`]; [`Error::Unsupported`]: not bound to
    /// Barlease's driver.
    pub fn status(&self, lease: &Lease) -> Result<Status> {
        let answer = self
            .raw_status(lease)
            .map_err(|errno| self.explain("status", lease, errno))?;
        let object = || lease.object();
        Ok(Status {
            state: state("status", object, answer.state)?,
            reasons: Reasons::from_bits(answer.reasons),
            memory_type: memory_type("status", object, answer.memattr)?,
            bar: answer.region_index,
            size: answer.size,
            ranges: answer.nr_ranges,
            attachments: answer.nr_attachments,
        })
    }

    fn raw_status(&self, lease: &Lease) -> Result<abi::DmaBufStatus, Errno> {
        let payload = abi::DmaBufStatus {
            dmabuf_fd: lease.as_fd().as_raw_fd(),
            ..Default::default()
        };
        self.handle
            .feature(u32::from(abi::FEATURE_DMA_BUF_STATUS) | GET, payload)
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
        self.handle
            .feature(u32::from(abi::FEATURE_DMA_BUF_MEMATTR) | SET, payload)
            .map_err(|errno| self.explain("set memory type", lease, errno))?;
        lease.note_memory_type(memory_type);
        Ok(())
    }

    /// Replaces the steering tags of a lease. [`Tph::new`] clears them.
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
        self.handle
            .feature(u32::from(abi::FEATURE_DMA_BUF_TPH) | SET, payload)
            .map(drop)
            .map_err(|errno| self.explain("set steering tag", lease, errno))
    }

    /// Makes a further region that maps the same BAR with another memory type, and answers its
    /// index. The same request answers the same index. It lives until the device is closed.
    ///
    /// Errors: [`Error::Unsupported`]: write-combining would not be real here, or not bound to
    /// Barlease's driver; [`Error::Io`] with `EINVAL` (uncached, or an alias of an alias), `ENODEV`
    /// (not an mmap-able BAR of at least a page), `ENOSPC`.
    pub fn alias_region(&self, bar: u32, memory_type: MemoryType) -> Result<u32> {
        let payload = abi::AliasRegion {
            mapping_flags: match memory_type {
                MemoryType::Wc => abi::ALIAS_WC,
                MemoryType::Nc => 0,
            },
            region_index: bar,
            ..Default::default()
        };
        self.handle
            .feature(u32::from(abi::FEATURE_ALIAS_REGION) | GET, payload)
            .map(|answer| answer.alias_index)
            .map_err(|errno| {
                let object = self.handle.region_object(bar);
                self.handle.unsupported_or("alias region", object, errno)
            })
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
            errno => self.handle.unsupported_or(operation, object, errno),
        }
    }
}

impl AsFd for Leases<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.fd
    }
}

fn state(operation: &'static str, object: impl FnOnce() -> Object, value: u32) -> Result<State> {
    State::from_abi(value).ok_or_else(|| unknown(operation, object(), "state", value))
}

fn memory_type(
    operation: &'static str,
    object: impl FnOnce() -> Object,
    value: u32,
) -> Result<MemoryType> {
    MemoryType::from_abi(value).ok_or_else(|| unknown(operation, object(), "memory type", value))
}

fn unknown(operation: &'static str, object: Object, what: &str, value: u32) -> Error {
    Error::malformed(
        operation,
        object,
        format!("the driver answered {what} {value}, which this version does not know"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDevice;

    fn fake() -> FakeDevice {
        FakeDevice::builder().bar(0, 64 << 10).build().unwrap()
    }

    #[test]
    fn a_lease_is_revoked_by_its_id_once() {
        let fake = fake();
        let leases = fake.leases();
        let lease = leases.export(0).range(0..0x1000).export().unwrap();
        let id = LeaseId::of(&lease).unwrap();
        assert!(matches!(
            leases.revoke_id(LeaseId::new(id.get() + 1)),
            Err(error @ Error::Io { .. }) if error.errno() == Some(Errno::NOENT.raw_os_error())
        ));
        leases.revoke_id(id).unwrap();
        assert_eq!(leases.status(&lease).unwrap().state, State::Dead);
        assert!(matches!(leases.revoke_id(id), Err(Error::Dead { .. })));
        assert!(matches!(leases.revoke(&lease), Err(Error::Dead { .. })));
    }

    #[test]
    fn a_revocation_that_does_not_wait_says_that_it_drains() {
        let fake = fake();
        let leases = fake.leases();
        let id = |lease| LeaseId::of(&lease).unwrap();
        let idle = id(leases.export(0).range(0..0x1000).export().unwrap());
        let busy = id(leases.export(0).range(0..0x1000).export().unwrap());
        fake.set_importers(busy, 1);
        assert_eq!(leases.revoke_id_nowait(idle).unwrap(), Revoked::Done);
        assert_eq!(leases.revoke_id_nowait(busy).unwrap(), Revoked::Draining);
        let draining = || leases.list().any(|record| record.unwrap().draining);
        assert!(draining());
        fake.set_importers(busy, 0);
        assert!(!draining());
    }

    #[test]
    fn every_change_of_state_signals_the_eventfd() {
        let fake = fake();
        let leases = fake.leases();
        let event = leases.events().unwrap();
        let lease = leases.export(0).range(0..0x1000).export().unwrap();
        assert_eq!(event.take().unwrap(), 0);
        fake.take_memory(Reasons::MEMORY_OFF);
        assert!(event.take().unwrap() > 0);
        fake.give_memory();
        assert!(event.take().unwrap() > 0);
        leases.revoke(&lease).unwrap();
        assert!(event.take().unwrap() > 0);
        // A new one takes its place.
        leases.set_events(None).unwrap();
        fake.take_memory(Reasons::MEMORY_OFF);
        assert_eq!(event.take().unwrap(), 0);
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(leases.set_events(Some(socket.as_fd())).is_err());
    }

    #[test]
    fn features_are_probed() {
        let features = fake().leases().features().unwrap();
        assert!(features.iter().all(|(_, there)| there), "{features:?}");
    }
}
