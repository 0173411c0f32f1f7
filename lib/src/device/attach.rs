//! Page tables of an iommufd that a device is put into: for nested translation, and for address
//! spaces of processes (PASID).

use rustix::io::Errno;

use super::Device;
use crate::Error;
use crate::Result;
use crate::sys::ioctl;

/// The reason in errors about such a number.
const REASON: &str = "the device was not opened by its character device, or the iommufd has no \
                      such page table for it";

impl Device {
    pub(super) fn bound_as(mut self, id: u32) -> Self {
        self.iommufd_id = Some(id);
        self
    }

    /// Its id in the iommufd that it is bound to, as other requests of iommufd want it
    /// (`IOMMU_HWPT_ALLOC`, `IOMMU_VIOMMU_ALLOC`). `None`: it was opened by its group, or somebody
    /// else has bound it.
    #[must_use]
    pub fn iommufd_id(&self) -> Option<u32> {
        self.iommufd_id
    }

    /// Puts the device into a page table of its iommufd, in the place of the one that it is in: an
    /// I/O address space, or a page table of hardware's that was made with `IOMMU_HWPT_ALLOC`.
    ///
    /// Such objects are made on the descriptor of the [`Iommu`](crate::Iommu), with the crate
    /// `iommufd-ioctls` for one. [`DmaBuffer`](crate::DmaBuffer) and
    /// [`Iommu::map_file`](crate::Iommu::map_file) map memory in
    /// [`Iommu::ioas`](crate::Iommu::ioas), and the device reaches it through that or through a
    /// page table above it.
    ///
    /// Errors: [`Error::Invalid`]; [`Error::Io`].
    pub fn attach_page_table(&self, id: u32) -> Result<()> {
        self.paging("attach", ioctl::iommu::attach(self.handle().fd, id, None))
    }

    /// Takes the device out of the page table that it is in: it does no DMA then. See also
    /// [`OpenOptions::unattached`](crate::OpenOptions::unattached).
    ///
    /// Errors: as for [`Device::attach_page_table`].
    pub fn detach_page_table(&self) -> Result<()> {
        self.paging("detach", ioctl::iommu::detach(self.handle().fd, None))
    }

    /// Has DMA of the device that names the address space `pasid` go through a page table of its
    /// own.
    ///
    /// Errors: [`Error::Unsupported`]: device, IOMMU or kernel (6.15) cannot; as for
    /// [`Device::attach_page_table`].
    pub fn attach_pasid(&self, pasid: u32, id: u32) -> Result<()> {
        self.paging(
            "attach",
            ioctl::iommu::attach(self.handle().fd, id, Some(pasid)),
        )
    }

    /// Ends [`Device::attach_pasid`].
    ///
    /// Errors: as for [`Device::attach_pasid`].
    pub fn detach_pasid(&self, pasid: u32) -> Result<()> {
        self.paging(
            "detach",
            ioctl::iommu::detach(self.handle().fd, Some(pasid)),
        )
    }

    fn paging(&self, operation: &'static str, answer: Result<(), Errno>) -> Result<()> {
        let object = self.object();
        answer.map_err(|errno| match errno {
            Errno::INVAL | Errno::NOTTY | Errno::NOENT => {
                Error::invalid(operation, object, REASON).because(errno)
            }
            Errno::OPNOTSUPP => Error::unsupported(
                operation,
                object,
                "device, IOMMU or driver has no address spaces of processes",
            )
            .because(errno),
            errno => Error::from_errno(operation, object, errno),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDevice;
    use crate::fake::FakeIommu;

    #[test]
    fn a_device_goes_from_one_page_table_to_another() {
        let fake = FakeDevice::builder().bar(0, 0x1000).build().unwrap();
        let iommu = FakeIommu::new().unwrap().iommu().unwrap();
        let device = Device::from_cdev(fake.fd().unwrap(), &iommu).unwrap();
        assert_eq!(fake.page_table(None), iommu.ioas());
        assert_eq!(device.iommufd_id(), Some(fake.iommufd_id()));

        device.attach_page_table(77).unwrap();
        assert_eq!(fake.page_table(None), Some(77));
        device.attach_pasid(5, 78).unwrap();
        assert_eq!(fake.page_table(Some(5)), Some(78));
        assert_eq!(fake.page_table(None), Some(77));
        device.detach_pasid(5).unwrap();
        device.detach_page_table().unwrap();
        assert_eq!(
            (fake.page_table(Some(5)), fake.page_table(None)),
            (None, None)
        );
        let error = device.detach_pasid(5).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        let error = device.attach_page_table(0).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    }
}
