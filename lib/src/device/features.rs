//! The features of a device, and those that are not about leases.

use std::mem::offset_of;

use vfio_bindings::bindings::vfio;

use super::Device;
use super::VfToken;
use crate::Error;
use crate::Lease;
use crate::Leases;
use crate::MemoryType;
use crate::Result;
use crate::Status;
use crate::Tph;
use crate::sys::ioctl;
use crate::sys::ioctl::Words;

const SET: u32 = vfio::VFIO_DEVICE_FEATURE_SET;

/// Which features a device's driver has, as it says itself when probed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Features {
    /// Export of BAR ranges as dma-buf ([`Leases::export`]).
    pub dma_buf: bool,
    /// Revocation of one lease ([`Leases::revoke`]).
    pub revoke: bool,
    /// Memory type of mmaps ([`Leases::set_memory_type`]).
    pub memory_type: bool,
    /// TPH steering tags ([`Leases::set_tph`]).
    pub tph: bool,
    /// Region aliases ([`Leases::alias_region`]).
    pub alias_region: bool,
    /// State of a lease ([`Leases::status`]).
    pub status: bool,
    /// The kernel's own exporter beside ours
    /// ([`ExportBuilder::stock`](super::ExportBuilder::stock)).
    pub stock_dma_buf: bool,
    /// List of all leases ([`Leases::list`]).
    pub list: bool,
    /// Revocation by id ([`Leases::revoke_id`]).
    pub revoke_id: bool,
    /// An eventfd for changes of leases ([`Leases::events`]).
    pub events: bool,
}

impl Features {
    /// Name of each, and whether it is there.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, bool)> + use<> {
        [
            ("dma_buf", self.dma_buf),
            ("revoke", self.revoke),
            ("memory_type", self.memory_type),
            ("tph", self.tph),
            ("alias_region", self.alias_region),
            ("status", self.status),
            ("stock_dma_buf", self.stock_dma_buf),
            ("list", self.list),
            ("revoke_id", self.revoke_id),
            ("events", self.events),
        ]
        .into_iter()
    }
}

/// The operation on a feature of VFIO: for [`Device::has_feature`] and [`Device::feature`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeatureOperation {
    /// `VFIO_DEVICE_FEATURE_GET`.
    Get,
    /// `VFIO_DEVICE_FEATURE_SET`.
    Set,
}

impl FeatureOperation {
    fn flag(self) -> u32 {
        match self {
            Self::Get => vfio::VFIO_DEVICE_FEATURE_GET,
            Self::Set => vfio::VFIO_DEVICE_FEATURE_SET,
        }
    }
}

impl Device {
    /// The leases of this device: list, revocation by id, events, and all the rest about leases.
    #[must_use]
    pub fn leases(&self) -> Leases<'_> {
        let handle = self.handle();
        Leases::of(handle.fd, handle.bdf)
    }

    /// See [`Leases::features`].
    pub fn features(&self) -> Result<Features> {
        self.leases().features()
    }

    /// See [`Leases::revoke`].
    pub fn revoke(&self, lease: &Lease) -> Result<()> {
        self.leases().revoke(lease)
    }

    /// See [`Leases::status`].
    pub fn status(&self, lease: &Lease) -> Result<Status> {
        self.leases().status(lease)
    }

    /// See [`Leases::set_memory_type`].
    pub fn set_memory_type(&self, lease: &Lease, memory_type: MemoryType) -> Result<()> {
        self.leases().set_memory_type(lease, memory_type)
    }

    /// See [`Leases::set_tph`].
    pub fn set_tph(&self, lease: &Lease, tph: Tph) -> Result<()> {
        self.leases().set_tph(lease, tph)
    }

    /// See [`Leases::alias_region`].
    pub fn alias_region(&self, bar: u32, memory_type: MemoryType) -> Result<u32> {
        self.leases().alias_region(bar, memory_type)
    }

    /// Puts the device into low power (`VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY`). Leases are revoked
    /// until [`Device::exit_low_power`].
    ///
    /// Errors: [`Error::Unsupported`], [`Error::Io`].
    pub fn enter_low_power(&self) -> Result<()> {
        let feature = vfio::VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY;
        self.simple_feature(feature, (), "enter low power")
    }

    /// Wakes the device (`VFIO_DEVICE_FEATURE_LOW_POWER_EXIT`).
    ///
    /// Errors: [`Error::Unsupported`], [`Error::Io`].
    pub fn exit_low_power(&self) -> Result<()> {
        let feature = vfio::VFIO_DEVICE_FEATURE_LOW_POWER_EXIT;
        self.simple_feature(feature, (), "exit low power")
    }

    /// Sets the token without which no virtual function of this physical function is opened
    /// (`VFIO_DEVICE_FEATURE_PCI_VF_TOKEN`); see
    /// [`OpenOptions::vf_token`](super::OpenOptions::vf_token). It holds as long as the physical
    /// function is open.
    ///
    /// Errors: [`Error::Unsupported`]: no virtual functions; [`Error::Io`].
    pub fn set_vf_token(&self, token: VfToken) -> Result<()> {
        let feature = vfio::VFIO_DEVICE_FEATURE_PCI_VF_TOKEN;
        self.simple_feature(feature, token.to_bytes(), "set the token")
    }

    fn simple_feature<T: ioctl::Payload + Copy>(
        &self,
        feature: u32,
        payload: T,
        operation: &'static str,
    ) -> Result<()> {
        let handle = self.handle();
        let answer = handle.feature(feature | SET, payload).map(drop);
        answer.map_err(|errno| handle.unsupported_or(operation, handle.object(), errno))
    }

    /// Whether the driver has feature `index` (`VFIO_DEVICE_FEATURE_*`) for an operation.
    ///
    /// Errors: [`Error::Io`].
    pub fn has_feature(&self, index: u16, operation: FeatureOperation) -> Result<bool> {
        self.handle().probe(index, operation.flag())
    }

    /// Issues a feature that this library does not wrap: `VFIO_DEVICE_FEATURE` with index,
    /// operation and the payload behind the header, which gets what the driver answers. The result
    /// is that of the ioctl, of some features a new file descriptor.
    ///
    /// Errors: [`Error::Unsupported`], [`Error::Invalid`] (the payload is too long),
    /// [`Error::Denied`], [`Error::Io`].
    ///
    /// # Safety
    ///
    /// Every address in the payload must be one that the kernel may follow, and write to where the
    /// feature does; and the feature must do nothing to memory of this process that is not known to
    /// whoever uses it. A feature without addresses in its payload is safe.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(device: &barlease::Device) -> barlease::Result<()> {
    /// use barlease::FeatureOperation;
    ///
    /// // VFIO_DEVICE_FEATURE_MIGRATION: 8 bytes of flags.
    /// let mut flags = [0; 8];
    /// // SAFETY: the payload has no address in it.
    /// unsafe { device.feature(1, FeatureOperation::Get, &mut flags) }?;
    /// # Ok(())
    /// # }
    /// ```
    #[allow(
        unsafe_code,
        reason = "what an unknown feature does is known to its caller only"
    )]
    pub unsafe fn feature(
        &self,
        index: u16,
        operation: FeatureOperation,
        payload: &mut [u8],
    ) -> Result<i32> {
        const HEADER: usize = 8;
        let handle = self.handle();
        if payload.len() > 1 << 20 {
            let reason = "the payload is longer than 1 MiB";
            return Err(Error::invalid("feature", handle.object(), reason));
        }
        let mut words = Words::zeroed(HEADER + payload.len());
        words.put_u32(
            offset_of!(vfio::vfio_device_feature, flags),
            u32::from(index) | operation.flag(),
        );
        words.put_bytes(HEADER, payload);
        // SAFETY: the caller knows what the feature does with the payload.
        let answer = unsafe { ioctl::feature(handle.fd, &mut words) };
        let answer =
            answer.map_err(|errno| handle.unsupported_or("feature", handle.object(), errno))?;
        for (byte, new) in payload.iter_mut().zip(words.bytes().skip(HEADER)) {
            *byte = new;
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use barlease_abi as abi;
    use rustix::io::Errno;

    use super::*;
    use crate::fake::FakeDevice;

    #[test]
    fn a_feature_that_is_not_wrapped_gets_its_payload_and_answers_it() {
        let fake = FakeDevice::builder().bar(0, 0x10000).build().unwrap();
        let device = fake.device().unwrap();
        let lease = device.export(0).range(0..0x3000).export().unwrap();
        let mut payload = [0; 40];
        payload[..4].copy_from_slice(&std::os::fd::AsRawFd::as_raw_fd(&fd(&lease)).to_ne_bytes());
        assert!(
            device
                .has_feature(abi::FEATURE_DMA_BUF_STATUS, FeatureOperation::Get)
                .unwrap()
        );
        #[allow(unsafe_code, reason = "the payload has no address")]
        // SAFETY: the payload has no address in it.
        let answer = unsafe {
            device.feature(
                abi::FEATURE_DMA_BUF_STATUS,
                FeatureOperation::Get,
                &mut payload,
            )
        };
        assert_eq!(answer.unwrap(), 0);
        assert_eq!(payload[24..32], 0x3000u64.to_ne_bytes());
        assert!(!device.has_feature(0x1234, FeatureOperation::Get).unwrap());
        #[allow(unsafe_code, reason = "the payload has no address")]
        // SAFETY: as above.
        let answer = unsafe { device.feature(0x1234, FeatureOperation::Get, &mut []) };
        let error = answer.unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOTTY.raw_os_error()));
        assert!(matches!(error, Error::Unsupported { .. }));
    }

    fn fd(lease: &Lease) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(lease)
    }
}
