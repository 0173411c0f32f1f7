//! Opening a device: through its character device and iommufd, or its group and a container.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use iommufd_bindings::iommu_ioas_alloc;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::Device;
use crate::Bdf;
use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::pci::Pci;
use crate::pci::PciDevice;
use crate::sys::ioctl;

/// How to reach the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backend {
    /// `Cdev` if this system has it, else `Group`.
    #[default]
    Auto,
    /// `/dev/vfio/GROUP` and the container `/dev/vfio/vfio`, type 1 version 2.
    Group,
    /// `/dev/vfio/devices/vfioN` and `/dev/iommu`.
    Cdev,
}

/// How to open a device.
///
/// # Examples
///
/// ```no_run
/// use barlease::{Backend, OpenOptions};
///
/// let device = OpenOptions::new()
///     .backend(Backend::Group)
///     .open("0000:00:05.0".parse()?)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct OpenOptions {
    backend: Backend,
    sysfs: PathBuf,
    dev: PathBuf,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            sysfs: "/sys".into(),
            dev: "/dev".into(),
        }
    }
}

/// What keeps the device usable: closed after the device.
#[derive(Debug)]
pub(super) enum Keep {
    /// The group and its container.
    Group {
        _group: OwnedFd,
        _container: OwnedFd,
    },
    /// The iommufd that the device is bound to.
    Cdev { _iommufd: OwnedFd },
}

impl OpenOptions {
    /// The defaults: [`Backend::Auto`], `/sys`, `/dev`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Choose how to reach the device.
    #[must_use]
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Where sysfs is mounted.
    #[must_use]
    pub fn sysfs(mut self, root: impl Into<PathBuf>) -> Self {
        self.sysfs = root.into();
        self
    }

    /// Where the device nodes are.
    #[must_use]
    pub fn dev(mut self, root: impl Into<PathBuf>) -> Self {
        self.dev = root.into();
        self
    }

    /// Opens a device.
    ///
    /// Errors: [`Error::NoDevice`], [`Error::NotBound`], [`Error::NoIommuGroup`],
    /// [`Error::GroupNotViable`], [`Error::Denied`] (names the file, its owner and mode),
    /// [`Error::Busy`], [`Error::Unsupported`] (the backend asked for does not exist here),
    /// [`Error::Io`].
    pub fn open(&self, bdf: Bdf) -> Result<Device> {
        let pci = Pci::at(&self.sysfs);
        let device = pci.device(bdf)?;
        if !device.is_vfio() {
            return Err(Error::NotBound {
                bdf,
                driver: device.driver,
            });
        }
        let group = device.iommu_group.ok_or(Error::NoIommuGroup { bdf })?;

        let cdev = self.cdev(&device);
        match (self.backend, cdev) {
            (Backend::Auto | Backend::Cdev, Some(node)) => {
                self.open_cdev(bdf, device.driver, &node, &pci)
            }
            (Backend::Cdev, None) => Err(Error::unsupported(
                "open",
                Object::Device(bdf),
                "this kernel has no VFIO character devices or no iommufd: use the group backend",
            )),
            (Backend::Auto | Backend::Group, _) => self.open_group(bdf, device.driver, group, &pci),
        }
    }

    /// The device's character device, if this system can use it.
    fn cdev(&self, device: &PciDevice) -> Option<PathBuf> {
        let node = self.dev.join("vfio/devices").join(device.vfio.as_ref()?);
        (node.exists() && self.dev.join("iommu").exists()).then_some(node)
    }

    fn open_cdev(
        &self,
        bdf: Bdf,
        driver: Option<String>,
        node: &Path,
        pci: &Pci,
    ) -> Result<Device> {
        let failed = |errno| Error::from_errno("open", Object::Device(bdf), errno);
        let fd = open_node(node)?;
        let iommufd = open_node(&self.dev.join("iommu"))?;

        let mut bind = vfio::vfio_device_bind_iommufd {
            iommufd: iommufd.as_raw_fd(),
            ..Default::default()
        };
        let bound = ioctl::call(fd.as_fd(), ioctl::DEVICE_BIND_IOMMUFD, &mut bind);
        bound.map_err(|errno| match errno {
            // `vfio_df_open` answers so for a device that is open; so does a device that cannot be
            // enabled.
            Errno::INVAL if pci.is_enabled(bdf) == Some(true) => failed(Errno::BUSY),
            _ => failed(errno),
        })?;
        let mut ioas = iommu_ioas_alloc::default();
        ioctl::call(iommufd.as_fd(), ioctl::IOAS_ALLOC, &mut ioas).map_err(failed)?;
        let mut attach = vfio::vfio_device_attach_iommufd_pt {
            pt_id: ioas.out_ioas_id,
            ..Default::default()
        };
        ioctl::call(fd.as_fd(), ioctl::DEVICE_ATTACH_IOMMUFD_PT, &mut attach).map_err(failed)?;

        Device::new(bdf, fd, Keep::Cdev { _iommufd: iommufd }, driver)
    }

    fn open_group(
        &self,
        bdf: Bdf,
        driver: Option<String>,
        number: u32,
        pci: &Pci,
    ) -> Result<Device> {
        let failed = |errno| Error::from_errno("open", Object::Device(bdf), errno);
        let path = self.dev.join("vfio").join(number.to_string());
        let container_path = self.dev.join("vfio/vfio");

        let container = open_node(&container_path)?;
        let version = ioctl::api_version(container.as_fd()).map_err(failed)?;
        let type1 = ioctl::check_extension(container.as_fd(), vfio::VFIO_TYPE1v2_IOMMU);
        if version != vfio::VFIO_API_VERSION as i32 || type1 != Ok(true) {
            return Err(Error::unsupported(
                "open",
                Object::file(container_path),
                "load the module vfio_iommu_type1",
            ));
        }

        let group = open_node(&path)?;
        let mut status = vfio::vfio_group_status::default();
        ioctl::call(group.as_fd(), ioctl::GROUP_GET_STATUS, &mut status).map_err(failed)?;
        if status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(Error::GroupNotViable {
                bdf,
                group: number,
                others: pci.group_obstacles(number),
            });
        }
        ioctl::set_container(group.as_fd(), container.as_fd()).map_err(|errno| {
            Error::from_errno("attach to container", Object::file(&path), errno)
        })?;
        ioctl::set_iommu(container.as_fd(), vfio::VFIO_TYPE1v2_IOMMU).map_err(|errno| {
            Error::from_errno("set up the IOMMU", Object::file(&path), errno).with_remedy(
                "the platform has no interrupt remapping; the parameter \
                 allow_unsafe_interrupts of vfio_iommu_type1 does without, at a risk",
            )
        })?;

        let name = CString::new(bdf.to_string()).map_err(|_| failed(Errno::INVAL))?;
        let fd = ioctl::group_device(group.as_fd(), &name).map_err(failed)?;
        let keep = Keep::Group {
            _group: group,
            _container: container,
        };
        Device::new(bdf, fd, keep, driver)
    }
}

/// Opens a device node. A refusal names owner and mode.
fn open_node(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        Error::from_errno("open", Object::file(path), errno).with_remedy(permission_remedy(path))
    })
}

/// Who may open a file, and what to do about it.
pub(crate) fn permission_remedy(path: &Path) -> String {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(metadata) => format!(
            "it belongs to uid {} gid {} with mode {:04o}, you are uid {}: run as root, or \
             `chown {} {shown}`",
            metadata.uid(),
            metadata.gid(),
            metadata.mode() & 0o7777,
            rustix::process::geteuid().as_raw(),
            rustix::process::geteuid().as_raw(),
        ),
        Err(_) => format!("run as root: {shown} cannot be looked at"),
    }
}
