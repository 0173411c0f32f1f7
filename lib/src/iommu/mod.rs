//! The address space that devices do DMA in.

mod buffer;
mod iova;
mod limits;
mod mapping;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use iommufd_bindings as iommufd;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::Backend;
use crate::Error;
use crate::Result;
use crate::device::open_node;
use crate::error::Object;
use crate::sys::ioctl;

pub use buffer::DmaBuffer;
pub use buffer::DmaOptions;
use iova::Iovas;
use limits::Limits;
use limits::type1_limits;
pub use mapping::DmaMapping;

/// A range of I/O virtual addresses, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IovaRange {
    /// The first address.
    pub first: u64,
    /// The last address.
    pub last: u64,
}

/// The access that devices have to memory that is mapped for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DmaAccess {
    /// Read and write it.
    #[default]
    ReadWrite,
    /// Read it only.
    Read,
    /// Write it only, where the IOMMU can tell this apart.
    Write,
}

impl DmaAccess {
    fn flags(self, read: u32, write: u32) -> u32 {
        match self {
            Self::ReadWrite => read | write,
            Self::Read => read,
            Self::Write => write,
        }
    }
}

/// An address space for DMA: a VFIO container, or an I/O address space of an iommufd.
///
/// It has the devices that were opened with it ([`OpenOptions::iommu`](crate::OpenOptions::iommu)),
/// several functions of one IOMMU group among them; all reach the same memory at the same
/// addresses. [`Device::open`](crate::Device::open) makes one for the device alone:
/// [`Device::iommu`](crate::Device::iommu).
///
/// Clones are the same address space. A container keeps the groups that are in it until the last
/// clone is dropped, and with it the last [`DmaBuffer`] and [`DmaMapping`]: memory stays mapped
/// while a device is closed and opened again.
///
/// # Examples
///
/// ```no_run
/// use barlease::{DmaBuffer, Iommu, OpenOptions};
///
/// let iommu = Iommu::new()?;
/// let gpu = OpenOptions::new().iommu(&iommu).open("0000:01:00.0".parse()?)?;
/// let audio = OpenOptions::new().iommu(&iommu).open("0000:01:00.1".parse()?)?;
/// let buffer = DmaBuffer::new(&iommu, 64 << 10)?;
/// println!("both reach it at {:#x}", buffer.iova());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Iommu {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    // Closed in this order.
    /// Groups that are in the container, by number.
    groups: Mutex<BTreeMap<u32, Arc<OwnedFd>>>,
    kind: Kind,
    iovas: Mutex<Iovas>,
}

#[derive(Debug)]
enum Kind {
    Container {
        fd: OwnedFd,
        /// `VFIO_TYPE1v2_IOMMU` or `VFIO_NOIOMMU_IOMMU`.
        model: u32,
    },
    Iommufd {
        fd: OwnedFd,
        ioas: u32,
        /// Whether it is ours to destroy.
        ours: bool,
    },
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Kind::Iommufd {
            fd,
            ioas,
            ours: true,
        } = &self.kind
        {
            // Another process may have the iommufd. An address space
            // that a device of somebody else still uses is busy and stays.
            let _ = ioctl::iommu::iommufd_destroy(fd.as_fd(), *ioas);
        }
    }
}

/// A thread that panicked has left the maps whole: each change is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(operation: &'static str, errno: Errno) -> Error {
    Error::from_errno(operation, Object::Iommu, errno)
}

impl Iommu {
    /// A new one: an iommufd where this system has that and VFIO's character devices, else a
    /// container.
    ///
    /// Errors: as for [`Iommu::iommufd`] and [`Iommu::container`].
    pub fn new() -> Result<Self> {
        Self::of_system(Path::new("/dev"))
    }

    pub(crate) fn of_system(dev: &Path) -> Result<Self> {
        if dev.join("iommu").exists() && dev.join("vfio/devices").exists() {
            Self::iommufd_at(dev)
        } else {
            Self::container_at(dev)
        }
    }

    /// A new container (`/dev/vfio/vfio`), type 1 version 2: for devices that are opened through
    /// their groups.
    ///
    /// Errors: [`Error::Unsupported`]: no type 1; [`Error::Denied`]; [`Error::Io`].
    pub fn container() -> Result<Self> {
        Self::container_at(Path::new("/dev"))
    }

    pub(crate) fn container_at(dev: &Path) -> Result<Self> {
        let fd = open_node(&dev.join("vfio/vfio"))?;
        Self::checked_container(fd, vfio::VFIO_TYPE1v2_IOMMU)
    }

    /// A container without an IOMMU, for groups that have none. DMA is not mapped with it.
    pub(crate) fn noiommu_at(dev: &Path) -> Result<Self> {
        let fd = open_node(&dev.join("vfio/vfio"))?;
        Self::checked_container(fd, vfio::VFIO_NOIOMMU_IOMMU)
    }

    /// A new iommufd (`/dev/iommu`) with an I/O address space of its own: for devices that are
    /// opened through their character devices.
    ///
    /// Errors: [`Error::Denied`]; [`Error::Io`] (`ENOENT`: this kernel has no iommufd).
    pub fn iommufd() -> Result<Self> {
        Self::iommufd_at(Path::new("/dev"))
    }

    pub(crate) fn iommufd_at(dev: &Path) -> Result<Self> {
        Self::from_iommufd(open_node(&dev.join("iommu"))?, None)
    }

    /// Takes over a container that somebody else opened, as a service manager or a VMM. Its IOMMU
    /// may have been set, and groups and memory may be in it; keep addresses that others use from
    /// being handed out with [`Iommu::reserve`].
    ///
    /// Errors: [`Error::Unsupported`]: no container with type 1.
    pub fn from_container(fd: impl Into<OwnedFd>) -> Result<Self> {
        Self::checked_container(fd.into(), vfio::VFIO_TYPE1v2_IOMMU)
    }

    fn checked_container(fd: OwnedFd, model: u32) -> Result<Self> {
        let version = ioctl::iommu::api_version(fd.as_fd());
        let has = ioctl::iommu::check_extension(fd.as_fd(), model);
        if version != Ok(vfio::VFIO_API_VERSION as i32) || has != Ok(true) {
            return Err(Error::unsupported(
                "open",
                Object::Iommu,
                if model == vfio::VFIO_NOIOMMU_IOMMU {
                    "the parameter enable_unsafe_noiommu_mode of vfio is off"
                } else {
                    "load the module vfio_iommu_type1"
                },
            ));
        }
        Ok(Self::of_kind(Kind::Container { fd, model }))
    }

    /// Takes over an iommufd that somebody else opened, with the I/O address space `ioas` in it, or
    /// with a new one.
    ///
    /// Errors: [`Error::Unsupported`]: no iommufd; [`Error::Io`] (`ENOENT`: no such address space).
    pub fn from_iommufd(fd: impl Into<OwnedFd>, ioas: Option<u32>) -> Result<Self> {
        let fd = fd.into();
        let explain = |errno| match errno {
            Errno::NOTTY => {
                Error::unsupported("adopt", Object::Iommu, "not an iommufd").because(errno)
            }
            errno => failed("adopt", errno),
        };
        let (ioas, ours) = match ioas {
            Some(ioas) => {
                ioctl::iommu::ioas_ranges(fd.as_fd(), ioas).map_err(explain)?;
                (ioas, false)
            }
            None => {
                let mut alloc = iommufd::iommu_ioas_alloc::default();
                ioctl::call(fd.as_fd(), ioctl::iommu::IOAS_ALLOC, &mut alloc).map_err(explain)?;
                (alloc.out_ioas_id, true)
            }
        };
        Ok(Self::of_kind(Kind::Iommufd { fd, ioas, ours }))
    }

    fn of_kind(kind: Kind) -> Self {
        Self {
            inner: Arc::new(Inner {
                groups: Mutex::default(),
                kind,
                iovas: Mutex::default(),
            }),
        }
    }

    /// How devices of it are opened.
    #[must_use]
    pub fn backend(&self) -> Backend {
        match &self.inner.kind {
            Kind::Container { .. } => Backend::Group,
            Kind::Iommufd { .. } => Backend::Cdev,
        }
    }

    /// The id of its I/O address space, if it is one of an iommufd.
    #[must_use]
    pub fn ioas(&self) -> Option<u32> {
        match &self.inner.kind {
            Kind::Container { .. } => None,
            Kind::Iommufd { ioas, .. } => Some(*ioas),
        }
    }

    /// The groups that are in the container, by number, as for KVM's own VFIO device
    /// (`KVM_DEV_VFIO_FILE_ADD`). None of an iommufd: there KVM takes the descriptor of the device.
    #[must_use]
    pub fn groups(&self) -> Vec<(u32, Arc<OwnedFd>)> {
        let groups = lock(&self.inner.groups);
        groups
            .iter()
            .map(|(number, group)| (*number, Arc::clone(group)))
            .collect()
    }

    /// Puts an open group into the container. Of the first one, also sets the IOMMU.
    ///
    /// For a group that somebody else opened. Groups of devices that this library opens are in it
    /// already.
    ///
    /// Errors: [`Error::Invalid`]: an iommufd has no groups; [`Error::Denied`]; [`Error::Io`]
    /// (`EINVAL`: it is in a container, or not viable).
    pub fn add_group(&self, number: u32, group: impl Into<OwnedFd>) -> Result<()> {
        self.group(number, || Ok(group.into())).map(drop)
    }

    /// The group with this number, which `open` opens if it is not in the container yet.
    pub(crate) fn group(
        &self,
        number: u32,
        open: impl FnOnce() -> Result<OwnedFd>,
    ) -> Result<Arc<OwnedFd>> {
        let Kind::Container { fd, model } = &self.inner.kind else {
            let reason = "an iommufd has no groups: open the character device";
            return Err(Error::invalid("add a group", Object::Iommu, reason));
        };
        let mut groups = lock(&self.inner.groups);
        if let Some(group) = groups.get(&number) {
            return Ok(Arc::clone(group));
        }
        let group = open()?;
        let attached = match ioctl::iommu::set_container(group.as_fd(), fd.as_fd()) {
            // An adopted group may be in this container already; it then tells of no other.
            Err(Errno::INVAL) if is_attached(group.as_fd()) => Ok(()),
            answer => answer,
        };
        attached.map_err(|errno| failed("add a group", errno))?;
        match ioctl::iommu::set_iommu(fd.as_fd(), *model) {
            Ok(()) => {}
            // Set before, by us or by whoever had the container.
            Err(Errno::INVAL) if has_iommu(fd.as_fd(), *model) => {}
            Err(errno) => {
                return Err(failed("set up the IOMMU", errno).if_denied(
                    "the platform has no interrupt remapping; the parameter \
                     allow_unsafe_interrupts of vfio_iommu_type1 does without, at a risk",
                ));
            }
        }
        let group = Arc::new(group);
        groups.insert(number, Arc::clone(&group));
        Ok(group)
    }

    /// Opens a device of a group that is in the container.
    pub(crate) fn device_of(group: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        ioctl::group_device(group, &name)
    }

    /// Binds a character device to the iommufd, and answers its id there.
    pub(crate) fn bind(
        &self,
        device: BorrowedFd<'_>,
        token: Option<&[u8; 16]>,
    ) -> Result<u32, Errno> {
        let Kind::Iommufd { fd, .. } = &self.inner.kind else {
            return Err(Errno::INVAL);
        };
        ioctl::iommu::bind_iommufd(device, fd.as_fd(), token)
    }

    /// Attaches a character device that is bound to the iommufd to the address space.
    pub(crate) fn attach(&self, device: BorrowedFd<'_>) -> Result<(), Errno> {
        let ioas = self.ioas().ok_or(Errno::INVAL)?;
        ioctl::iommu::attach(device, ioas, None)
    }

    /// Addresses that can be mapped, as the IOMMU and the devices that are in it now allow.
    ///
    /// Errors: [`Error::Unsupported`]: there is no IOMMU, or no device is open yet in a container;
    /// [`Error::Malformed`]; [`Error::Io`].
    pub fn allowed_ranges(&self) -> Result<Vec<IovaRange>> {
        Ok(self.limits()?.ranges)
    }

    /// Addresses and lengths must be multiples of this, in bytes.
    ///
    /// Errors: as for [`Iommu::allowed_ranges`].
    pub fn page_size(&self) -> Result<u64> {
        Ok(self.limits()?.page)
    }

    /// How many more mappings the IOMMU takes, each of them a [`DmaBuffer`] or [`DmaMapping`]
    /// (parameter `dma_entry_limit` of vfio_iommu_type1). `None`: there is no such limit, as of an
    /// iommufd.
    ///
    /// Errors: as for [`Iommu::allowed_ranges`].
    pub fn available_mappings(&self) -> Result<Option<u32>> {
        Ok(self.limits()?.available)
    }

    fn limits(&self) -> Result<Limits> {
        match &self.inner.kind {
            Kind::Container { fd, model } => {
                if *model == vfio::VFIO_NOIOMMU_IOMMU {
                    return Err(Error::unsupported(
                        "map",
                        Object::Iommu,
                        "without an IOMMU nothing is mapped: devices use physical addresses",
                    ));
                }
                type1_limits(fd.as_fd())
            }
            Kind::Iommufd { fd, ioas, .. } => {
                let (ranges, align) = ioctl::iommu::ioas_ranges(fd.as_fd(), *ioas)
                    .map_err(|errno| failed("ask for allowed addresses", errno))?;
                let ranges = ranges
                    .into_iter()
                    .map(|(first, last)| IovaRange { first, last });
                Ok(Limits {
                    ranges: ranges.collect(),
                    page: align.max(rustix::param::page_size() as u64),
                    available: None,
                })
            }
        }
    }

    /// Keeps addresses from being handed out, as those at which somebody else maps memory in an
    /// adopted container. Answers whether they were free.
    pub fn reserve(&self, first: u64, length: u64) -> bool {
        lock(&self.inner.iovas).take_at(first, length)
    }
}

impl AsFd for Iommu {
    /// The container, or the iommufd.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.inner.kind {
            Kind::Container { fd, .. } | Kind::Iommufd { fd, .. } => fd.as_fd(),
        }
    }
}

/// Whether a group is in a container.
fn is_attached(group: BorrowedFd<'_>) -> bool {
    let mut status = vfio::vfio_group_status::default();
    ioctl::call(group, ioctl::GROUP_GET_STATUS, &mut status).is_ok()
        && status.flags & vfio::VFIO_GROUP_FLAGS_CONTAINER_SET != 0
}

/// Whether the IOMMU of a container is set.
fn has_iommu(container: BorrowedFd<'_>, model: u32) -> bool {
    let mut info = vfio::vfio_iommu_type1_info::default();
    // One that is no IOMMU has no information, and answers ENOTTY; without any it is EINVAL.
    match ioctl::call(container, ioctl::iommu::TYPE1_GET_INFO, &mut info) {
        Ok(_) => true,
        Err(errno) => model == vfio::VFIO_NOIOMMU_IOMMU && errno == Errno::NOTTY,
    }
}
