//! Devices that somebody else opened: a VMM, a service manager, another crate.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::path::Path;

use super::Device;
use super::bdf_of;
use crate::Bdf;
use crate::Error;
use crate::Iommu;
use crate::Result;
use crate::error::Object;
use crate::pci::Pci;

/// The parts of a [`Device`]: see [`Device::into_parts`].
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceParts {
    /// The descriptor of the device.
    pub fd: OwnedFd,
    /// Its address.
    pub bdf: Bdf,
    /// The address space that it is in, if that is known. Dropping the last clone of it closes
    /// group and container, or the iommufd; the device stays in its group and in its container, or
    /// bound, as long as its descriptor is open.
    pub iommu: Option<Iommu>,
}

impl Device {
    /// Takes over the descriptor of an open device: one that `VFIO_GROUP_GET_DEVICE_FD` answered,
    /// or a character device that is bound to an iommufd and attached. Its address is asked of the
    /// kernel.
    ///
    /// A device whose descriptor others keep is one they can still drive: share it on purpose only.
    /// For DMA say also [`Device::with_iommu`]. If no IOMMU isolates the device, the requirements
    /// of [`OpenOptions::noiommu`](crate::OpenOptions::noiommu) hold, which the code that opened it
    /// has accepted.
    ///
    /// Errors: [`Error::Unsupported`]: it is no open device of VFIO's, or the kernel, an old
    /// one, does not say its address; then use [`Device::from_fd_of`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(theirs: std::os::fd::BorrowedFd<'_>) -> Result<(), Box<dyn std::error::Error>> {
    /// use barlease::Device;
    ///
    /// let device = Device::from_fd(theirs.try_clone_to_owned()?)?;
    /// println!("{}", device.bdf());
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_fd(fd: impl Into<OwnedFd>) -> Result<Self> {
        let fd = fd.into();
        let bdf = bdf_of(fd.as_fd())?;
        Self::from_fd_of(fd, bdf)
    }

    /// Duplicates descriptor number `fd`, which a parent process left open or another crate owns,
    /// and takes the duplicate over; as [`Device::from_fd`].
    ///
    /// Errors: [`Error::Io`] with `EBADF` if there is none; as for [`Device::from_fd`].
    pub fn from_inherited(fd: RawFd) -> Result<Self> {
        let owned = crate::sys::inherited::duplicate(fd).map_err(|errno| {
            Error::from_errno("inherit", Object::file(format!("/dev/fd/{fd}")), errno)
        })?;
        Self::from_fd(owned)
    }

    /// The same, of the function `bdf`, which nothing checks.
    ///
    /// Errors: [`Error::Io`] (`ENOTTY`: no device of VFIO's).
    pub fn from_fd_of(fd: impl Into<OwnedFd>, bdf: Bdf) -> Result<Self> {
        let driver = Pci::system()
            .device(bdf)
            .ok()
            .and_then(|device| device.driver);
        Self::new(bdf, fd.into(), None, driver)
    }

    /// Takes over a character device (`/dev/vfio/devices/vfioN`) that was opened and no more, as by
    /// a service manager; binds it to the iommufd of `iommu` and attaches it.
    ///
    /// Errors: [`Error::Invalid`]: `iommu` is a container; [`Error::Unsupported`]: no IOMMU
    /// isolates the device (`noiommu-vfioN`); as for [`Device::from_fd`].
    pub fn from_cdev(fd: impl Into<OwnedFd>, iommu: &Iommu) -> Result<Self> {
        let fd = fd.into();
        refuse_noiommu(fd.as_fd(), Path::new("/sys/dev/char"))?;
        let id = adopted(iommu.bind(fd.as_fd(), None))?;
        adopted(iommu.attach(fd.as_fd()))?;
        Ok(Self::from_fd(fd)?.with_iommu(iommu).bound_as(id))
    }

    /// Takes over a character device that is bound to the iommufd of `iommu`, as a VMM leaves it;
    /// attaches it to the address space of `iommu`, in the place of the one that it is in.
    ///
    /// Errors: as for [`Device::from_cdev`].
    pub fn from_bound_cdev(fd: impl Into<OwnedFd>, iommu: &Iommu) -> Result<Self> {
        let fd = fd.into();
        refuse_noiommu(fd.as_fd(), Path::new("/sys/dev/char"))?;
        adopted(iommu.attach(fd.as_fd()))?;
        Ok(Self::from_fd(fd)?.with_iommu(iommu))
    }

    /// Says which address space an adopted device is in: a container that has its group, or the
    /// I/O address space that it is attached to. Nothing checks it; memory that is mapped in
    /// another one is not there for the device.
    #[must_use]
    pub fn with_iommu(mut self, iommu: &Iommu) -> Self {
        self.iommu = Some(iommu.clone());
        self
    }

    /// Takes it apart, without closing it.
    #[must_use]
    pub fn into_parts(self) -> DeviceParts {
        DeviceParts {
            fd: self.fd,
            bdf: self.bdf,
            iommu: self.iommu,
        }
    }
}

/// Refuses a character device that no IOMMU isolates. It reaches all memory of the host, and every
/// function that drives it would be unsafe. Only its name, which is in the folder `names` by the
/// number of the device, tells that.
fn refuse_noiommu(fd: BorrowedFd<'_>, names: &Path) -> Result<()> {
    let number = rustix::fs::fstat(fd)
        .map_err(|errno| Error::from_errno("adopt", Object::file("/dev/vfio/devices"), errno))?
        .st_rdev;
    let link = format!(
        "{}:{}",
        rustix::fs::major(number),
        rustix::fs::minor(number)
    );
    // Without a name it is no character device, which the next call says.
    let Ok(place) = names.join(link).read_link() else {
        return Ok(());
    };
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    if !name.starts_with("noiommu-") {
        return Ok(());
    }
    Err(Error::unsupported(
        "adopt",
        Object::file(Path::new("/dev/vfio/devices").join(&*name)),
        "no IOMMU isolates the device: open it by its group, with `OpenOptions::noiommu`",
    ))
}

fn adopted<T>(answer: Result<T, rustix::io::Errno>) -> Result<T> {
    answer.map_err(|errno| match errno {
        rustix::io::Errno::INVAL => Error::invalid(
            "adopt",
            Object::Iommu,
            "a container takes no character devices, or the device is bound to another iommufd",
        )
        .because(errno),
        errno => Error::from_errno("adopt", Object::Iommu, errno),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDevice;
    use crate::fake::FakeIommu;

    #[test]
    fn a_device_is_taken_over_and_taken_apart() {
        let fake = FakeDevice::builder().bar(0, 0x1000).build().unwrap();
        let device = Device::from_fd(fake.fd().unwrap()).unwrap();
        assert_eq!(device.bdf(), fake.bdf());
        assert!(device.iommu().is_none() && device.backend().is_none());
        assert!(matches!(
            device.require_iommu(),
            Err(Error::Unsupported { .. })
        ));
        let iommu = FakeIommu::new().unwrap();
        let iommu = iommu.iommu().unwrap();
        let parts = device.with_iommu(&iommu).into_parts();
        let other = Device::from_inherited(std::os::fd::AsRawFd::as_raw_fd(&parts.fd)).unwrap();
        assert_eq!(other.bdf(), fake.bdf());
        assert!(Device::from_inherited(-1).is_err());
        let again = Device::from_fd_of(parts.fd, parts.bdf).unwrap();
        assert_eq!(again.regions().unwrap().len(), 9);
        let bound = Device::from_cdev(fake.fd().unwrap(), &iommu).unwrap();
        assert_eq!(bound.iommu().and_then(Iommu::ioas), iommu.ioas());
    }

    #[test]
    fn a_character_device_without_an_iommu_is_refused_by_its_name() {
        // Character device 1:3, under names of VFIO's.
        let file = std::fs::File::open("/dev/null").unwrap();
        let names = tempfile::tempdir().unwrap();
        let refused = |name: &str| {
            let link = names.path().join("1:3");
            std::fs::remove_file(&link).ok();
            let place = format!("../../devices/pci0000:00/0000:00:03.0/vfio-dev/{name}");
            std::os::unix::fs::symlink(place, link).unwrap();
            refuse_noiommu(file.as_fd(), names.path()).err()
        };
        assert!(refused("vfio0").is_none());
        let error = refused("noiommu-vfio0").unwrap();
        assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
        assert!(error.to_string().contains("/noiommu-vfio0"), "{error}");
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(
            Device::from_fd(socket),
            Err(Error::Unsupported { .. })
        ));
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let bdf = "0000:00:01.0".parse().unwrap();
        assert!(Device::from_fd_of(socket, bdf).is_err());
    }
}
