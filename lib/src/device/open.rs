//! Opening a device: through its character device and an iommufd, or its group and a container.

use std::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::Device;
use crate::Bdf;
use crate::Error;
use crate::Iommu;
use crate::Result;
use crate::error::Object;
use crate::pci::Pci;
use crate::pci::PciDevice;
use crate::sys::ioctl;

/// How a device is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backend {
    /// `/dev/vfio/GROUP` and the container `/dev/vfio/vfio`, type 1 version 2.
    Group,
    /// `/dev/vfio/devices/vfioN` and `/dev/iommu`.
    Cdev,
}

/// The token that the owner of a physical function has set, and without which its virtual functions
/// are not opened: a UUID.
///
/// # Examples
///
/// ```
/// use barlease::VfToken;
///
/// let token: VfToken = "14d63f20-8445-11ea-8900-1f9ce7d5650d".parse()?;
/// assert_eq!(token.to_string(), "14d63f20-8445-11ea-8900-1f9ce7d5650d");
/// # Ok::<(), barlease::ParseVfTokenError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VfToken([u8; 16]);

/// The text is not a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a UUID: expected xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx in hexadecimal")]
pub struct ParseVfTokenError;

impl VfToken {
    /// That with these bytes, in the order in which they are written.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&n) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for VfToken {
    /// It is a secret of its kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VfToken(..)")
    }
}

impl FromStr for VfToken {
    type Err = ParseVfTokenError;

    fn from_str(text: &str) -> Result<Self, ParseVfTokenError> {
        let lengths = text.split('-').map(str::len);
        if !lengths.eq([8, 4, 4, 4, 12]) {
            return Err(ParseVfTokenError);
        }
        let digits: Vec<u8> = text
            .chars()
            .filter(|digit| *digit != '-')
            .map(|digit| digit.to_digit(16).map(|digit| digit as u8))
            .collect::<Option<_>>()
            .ok_or(ParseVfTokenError)?;
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = pair.iter().fold(0, |value, digit| value << 4 | digit);
        }
        Ok(Self(bytes))
    }
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
    backend: Option<Backend>,
    iommu: Option<Iommu>,
    token: Option<VfToken>,
    noiommu: bool,
    attached: bool,
    sysfs: PathBuf,
    dev: PathBuf,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            backend: None,
            iommu: None,
            token: None,
            noiommu: false,
            attached: true,
            sysfs: "/sys".into(),
            dev: "/dev".into(),
        }
    }
}

impl OpenOptions {
    /// The defaults: by its character device if this system has it and may be opened, else by its
    /// group; in an address space of its own.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reach the device like this, and no other way.
    #[must_use]
    pub fn backend(mut self, backend: impl Into<Option<Backend>>) -> Self {
        self.backend = backend.into();
        self
    }

    /// Open it in this address space, in which other devices may be, functions of the same IOMMU
    /// group too. It says how the device is reached.
    #[must_use]
    pub fn iommu(mut self, iommu: &Iommu) -> Self {
        self.iommu = Some(iommu.clone());
        self
    }

    /// Open a virtual function with the token of its physical function
    /// ([`Device::set_vf_token`]).
    #[must_use]
    pub fn vf_token(mut self, token: VfToken) -> Self {
        self.token = Some(token);
        self
    }

    /// Open a device that is bound to the iommufd and in no address space yet: it does no DMA
    /// before [`Device::attach_page_table`]. No effect on devices that are opened by their group,
    /// which are in that of the container.
    #[must_use]
    pub fn unattached(mut self) -> Self {
        self.attached = false;
        self
    }

    /// Open a device that no IOMMU isolates (`/dev/vfio/noiommu-N`), if it is one.
    ///
    /// # Safety
    ///
    /// Such a device reaches all memory of the host at its physical addresses: what is written to
    /// its registers, by any safe function of this library, must never make it touch memory that is
    /// not meant for it.
    #[must_use]
    #[allow(
        unsafe_code,
        reason = "with such a device every write to a register may be unsound"
    )]
    pub unsafe fn noiommu(mut self) -> Self {
        self.noiommu = true;
        self
    }

    /// Where sysfs is mounted. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn sysfs(mut self, root: impl Into<PathBuf>) -> Self {
        self.sysfs = root.into();
        self
    }

    /// Where the device nodes are. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn dev(mut self, root: impl Into<PathBuf>) -> Self {
        self.dev = root.into();
        self
    }

    /// Opens a device.
    ///
    /// Errors: [`Error::NoDevice`], [`Error::NotBound`], [`Error::NoIommuGroup`],
    /// [`Error::GroupNotViable`], [`Error::Denied`] (names the file, its owner and mode; or the
    /// token of a virtual function is missing), [`Error::Busy`], [`Error::Unsupported`] (the
    /// backend asked for does not exist here), [`Error::Io`].
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
        let wanted = match &self.iommu {
            Some(iommu) => Some(iommu.backend()),
            None => self.backend,
        };
        match (wanted, self.cdev(&device)) {
            (Some(Backend::Cdev), None) => Err(Error::unsupported(
                "open",
                Object::Device(bdf),
                "this kernel has no VFIO character devices or no iommufd: use the group backend",
            )),
            (Some(Backend::Cdev), Some(node)) => self.open_cdev(&device, &node, &pci),
            (None, Some(node)) => match self.open_cdev(&device, &node, &pci) {
                // A process that may open the group only need not know of the rest.
                Err(Error::Denied { .. }) if self.group_node(group).1.exists() => {
                    self.open_group(&device, group, &pci)
                }
                answer => answer,
            },
            (None | Some(Backend::Group), _) => self.open_group(&device, group, &pci),
        }
    }

    /// The device's character device, if this system can use it.
    fn cdev(&self, device: &PciDevice) -> Option<PathBuf> {
        let node = self.dev.join("vfio/devices").join(device.vfio.as_ref()?);
        let name = node.file_name()?.to_str()?;
        // One without an IOMMU is called `noiommu-vfioN`.
        let usable = self.dev.join("iommu").exists() && !name.starts_with("noiommu");
        (node.exists() && usable).then_some(node)
    }

    /// Whether a group has no IOMMU, and its node.
    fn group_node(&self, number: u32) -> (bool, PathBuf) {
        let place = self.dev.join("vfio");
        let unsafe_node = place.join(format!("noiommu-{number}"));
        if unsafe_node.exists() {
            return (true, unsafe_node);
        }
        (false, place.join(number.to_string()))
    }

    fn open_cdev(&self, device: &PciDevice, node: &Path, pci: &Pci) -> Result<Device> {
        let bdf = device.bdf;
        let failed = |errno| Error::from_errno("open", Object::Device(bdf), errno);
        let fd = open_node(node)?;
        let iommu = match &self.iommu {
            Some(iommu) => iommu.clone(),
            None => Iommu::iommufd_at(&self.dev)?,
        };
        let token = self.token.map(VfToken::to_bytes);
        let bound = iommu.bind(fd.as_fd(), token.as_ref()).and_then(|id| {
            if self.attached {
                iommu.attach(fd.as_fd())?;
            }
            Ok(id)
        });
        let id = bound.map_err(|errno| match errno {
            // `vfio_df_open` answers so for a device that is open; so does a device that cannot
            // be enabled.
            Errno::INVAL if pci.is_enabled(bdf) == Some(true) => failed(Errno::BUSY),
            errno => self.explain_denied(failed(errno)),
        })?;
        let opened = Device::new(bdf, fd, Some(iommu), device.driver.clone())?;
        Ok(opened.bound_as(id))
    }

    fn open_group(&self, device: &PciDevice, number: u32, pci: &Pci) -> Result<Device> {
        let bdf = device.bdf;
        let failed = |errno| Error::from_errno("open", Object::Device(bdf), errno);
        let (noiommu, path) = self.group_node(number);
        if noiommu && !self.noiommu {
            return Err(Error::NoIommuGroup { bdf });
        }
        let iommu = match &self.iommu {
            Some(iommu) => iommu.clone(),
            None if noiommu => Iommu::noiommu_at(&self.dev)?,
            None => Iommu::container_at(&self.dev)?,
        };
        let group = iommu.group(number, || {
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
            Ok(group)
        })?;

        let name = match self.token {
            Some(token) => format!("{bdf} vf_token={token}"),
            None => bdf.to_string(),
        };
        let fd = retry(|| Iommu::device_of(group.as_fd(), &name))
            .map_err(|errno| self.explain_denied(failed(errno)))?;
        Device::new(bdf, fd, Some(iommu), device.driver.clone())
    }

    /// Says what may be missing when the nodes could be opened and the device not.
    fn explain_denied(&self, error: Error) -> Error {
        error.if_denied(match self.token {
            Some(_) => {
                "the token is not that of the physical function, or it is no virtual function"
            }
            None => {
                "of a virtual function: say the token that the owner of its physical function has \
                 set (`vf_token`); otherwise: the device, or another of its group, is in another \
                 address space: open both with the same Iommu"
            }
        })
    }
}

/// Tries again while the kernel is still about to make the device known to its group, which it is
/// for a moment after it was bound.
fn retry<T>(mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 0..20 {
        match attempt() {
            Err(Errno::NODEV) => std::thread::sleep(Duration::from_millis(5)),
            answer => return answer,
        }
    }
    attempt()
}

/// Opens a device node. A refusal names owner and mode.
pub(crate) fn open_node(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        Error::from_errno("open", Object::file(path), errno).if_denied(permission_remedy(path))
    })
}

/// Says who may open a file, and what to do about it.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_uuid() {
        let text = "14d63f20-8445-11ea-8900-1f9ce7d5650d";
        let token: VfToken = text.parse().unwrap();
        assert_eq!(token.to_bytes()[..4], [0x14, 0xd6, 0x3f, 0x20]);
        assert_eq!(token.to_string(), text);
        assert_eq!(format!("{token:?}"), "VfToken(..)");
        for bad in [
            "",
            "14d63f20",
            "14d63f20844511ea89001f9ce7d5650d",
            "14d63f20-8445-11ea-8900-1f9ce7d5650g",
            "14d63f2-08445-11ea-8900-1f9ce7d5650d",
            "14d63f20-8445-11ea-8900-1f9ce7d5650d-",
        ] {
            assert_eq!(bad.parse::<VfToken>(), Err(ParseVfTokenError), "{bad}");
        }
    }
}
