//! The descriptor of a VFIO device with its address, whoever opened it.

use std::borrow::Cow;
use std::fs;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use barlease_abi as abi;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::caps;
use super::region::Region;
use crate::Bdf;
use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::pci::Pci;
use crate::sys::ioctl;
use crate::sys::ioctl::Feature;
use crate::sys::ioctl::Payload;
use crate::sys::ioctl::Words;

/// Longest answer about a region that is believed.
const MAX_REGION_INFO: u32 = 1 << 20;

/// A VFIO device, borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handle<'fd> {
    pub(crate) fd: BorrowedFd<'fd>,
    pub(crate) bdf: Bdf,
}

impl<'fd> Handle<'fd> {
    pub(crate) fn object(self) -> Object {
        Object::Device(self.bdf)
    }

    pub(crate) fn region_object(self, index: u32) -> Object {
        Object::Region {
            bdf: self.bdf,
            index,
        }
    }

    /// `VFIO_DEVICE_GET_INFO`.
    pub(crate) fn info(self) -> Result<vfio::vfio_device_info> {
        let mut info = vfio::vfio_device_info::default();
        ioctl::call(self.fd, ioctl::DEVICE_GET_INFO, &mut info)
            .map_err(|errno| Error::from_errno("get information", self.object(), errno))?;
        Ok(info)
    }

    /// `VFIO_DEVICE_GET_REGION_INFO`, with the capabilities.
    pub(crate) fn region(self, index: u32) -> Result<Region> {
        let failed =
            |errno| Error::from_errno("get region information", self.region_object(index), errno);
        let malformed = |reason: &'static str| {
            Error::malformed("get region information", self.region_object(index), reason)
        };
        let mut info = vfio::vfio_region_info {
            index,
            ..Default::default()
        };
        ioctl::call(self.fd, ioctl::DEVICE_GET_REGION_INFO, &mut info).map_err(failed)?;
        if info.flags & vfio::VFIO_REGION_INFO_FLAG_CAPS == 0 {
            return Ok(Region::new(&info, Vec::new()));
        }

        // The kernel says how long the answer with capabilities is. It can be longer the next time,
        // as when somebody has made an alias meanwhile: then the chain of the shorter one is empty.
        for _ in 0..8 {
            if info.argsz > MAX_REGION_INFO {
                return Err(malformed("the answer is too long"));
            }
            let mut words = Words::zeroed(info.argsz as usize);
            words.put_u32(offset_of!(vfio::vfio_region_info, index), index);
            ioctl::call_bytes(self.fd, ioctl::DEVICE_GET_REGION_INFO, &mut words)
                .map_err(failed)?;
            let needed = words.u32(offset_of!(vfio::vfio_region_info, argsz));
            if needed as usize > words.len() {
                info.argsz = needed;
                continue;
            }
            let first = words.u32(offset_of!(vfio::vfio_region_info, cap_offset));
            let capabilities = caps::parse(&words.to_bytes(), first)
                .map_err(|caps::BadChain| malformed("the capability chain is broken"))?;
            return Ok(Region::new(&info, capabilities));
        }
        Err(malformed("the answer grows each time that it is asked for"))
    }

    /// Reads by system call, from a position in the descriptor.
    pub(crate) fn read_at(self, index: u32, mut position: u64, buffer: &mut [u8]) -> Result<()> {
        let failed = |errno| Error::from_errno("read", self.region_object(index), errno);
        let mut rest = buffer;
        while !rest.is_empty() {
            match rustix::io::pread(self.fd, &mut *rest, position) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
                Ok(0) => return Err(failed(Errno::IO)),
                Ok(count) => {
                    rest = rest.get_mut(count..).unwrap_or(&mut []);
                    position += count as u64;
                }
            }
        }
        Ok(())
    }

    /// Writes by system call, to a position in the descriptor.
    pub(crate) fn write_at(self, index: u32, mut position: u64, buffer: &[u8]) -> Result<()> {
        let failed = |errno| Error::from_errno("write", self.region_object(index), errno);
        let mut rest = buffer;
        while !rest.is_empty() {
            match rustix::io::pwrite(self.fd, rest, position) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
                Ok(0) => return Err(failed(Errno::IO)),
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or(&[]);
                    position += count as u64;
                }
            }
        }
        Ok(())
    }

    /// Asks whether a feature is there for an operation.
    pub(crate) fn probe(self, feature: u16, operation: u32) -> Result<bool> {
        let flags = u32::from(feature) | operation | vfio::VFIO_DEVICE_FEATURE_PROBE;
        match self.feature(flags, ()) {
            Ok(()) => Ok(true),
            Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP | Errno::NODEV) => Ok(false),
            Err(errno) => Err(Error::from_errno("probe features", self.object(), errno)),
        }
    }

    /// Issues a feature whose payload has no pointer in it.
    pub(crate) fn feature<T: Payload + Copy>(self, flags: u32, payload: T) -> Result<T, Errno> {
        let mut argument = Feature::new(flags, payload);
        ioctl::call(self.fd, ioctl::DEVICE_FEATURE, &mut argument)?;
        Ok(argument.payload)
    }

    /// Sorts out what the driver (`ENOTTY`) or the platform (`EOPNOTSUPP`) does not have.
    pub(crate) fn unsupported_or(
        self,
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

    fn driver_remedy(self) -> String {
        let bdf = self.bdf;
        let driver = Pci::system()
            .device(bdf)
            .ok()
            .and_then(|device| device.driver);
        match driver.as_deref() {
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

/// Finds out which function a device's descriptor is of. The kernel says it in
/// `/proc/self/fdinfo`, unless it is an old one.
pub(crate) fn bdf_of(fd: BorrowedFd<'_>) -> Result<Bdf> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(bdf) = crate::fake::bdf_of(fd) {
        return Ok(bdf);
    }
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = fs::read_to_string(&path)
        .map_err(|error| Error::from_io("adopt", Object::file(&path), error))?;
    parse_fdinfo(&text).ok_or_else(|| {
        Error::unsupported(
            "adopt",
            Object::file(&path),
            "it is no open VFIO device of a PCI function, or the kernel, an old one, \
             does not say its address: then say it yourself",
        )
    })
}

/// The address in the last component of the path in sysfs.
fn parse_fdinfo(text: &str) -> Option<Bdf> {
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    path.trim().rsplit('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_fdinfo() {
        let text = "pos:\t0\nflags:\t02100002\nvfio-device-syspath: \
                    /sys/devices/pci0000:00/0000:00:03.0/0000:03:00.1\n";
        assert_eq!(parse_fdinfo(text), Some("0000:03:00.1".parse().unwrap()));
        assert_eq!(parse_fdinfo("pos:\t0\n"), None);
        assert_eq!(
            parse_fdinfo("vfio-device-syspath: /sys/devices/platform/x"),
            None
        );
    }
}
