//! Config space: registers by width, capabilities, and those that a driver needs typed.
//!
//! Config space is not believed: every chain ends, and every offset is checked.

mod chain;
mod msix;
mod typed;

use std::fmt;

use vfio_bindings::bindings::vfio;

use super::Handle;
use crate::Error;
use crate::Result;

pub use chain::Capability;
pub use chain::ExtendedCapability;
pub(super) use chain::walk_extended;
pub use typed::Express;
pub use typed::ExpressKind;
pub use typed::ExtendedVendorCapability;
pub use typed::Msi;
pub use typed::Msix;
pub use typed::PowerManagement;
pub use typed::VendorCapability;

const INDEX: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;

bitflags::bitflags! {
    /// The COMMAND register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Command: u16 {
        /// The device answers accesses to its I/O ports.
        const IO = 1 << 0;
        /// The device answers accesses to its memory. Leases are revoked while this is off.
        const MEMORY = 1 << 1;
        /// The device may do DMA, and send MSIs.
        const MASTER = 1 << 2;
        /// Memory Write and Invalidate.
        const INVALIDATE = 1 << 4;
        /// The device reports parity errors.
        const PARITY = 1 << 6;
        /// The device reports errors to the root complex.
        const SERR = 1 << 8;
        /// The device raises no INTx.
        const INTX_DISABLE = 1 << 10;
        // Bits that this version does not know stay as they are.
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// The STATUS register. The errors stay until they are cleared by
    /// [`ConfigSpace::clear_status`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Status: u16 {
        /// The device is ready without the waits of the specification after a reset.
        const IMMEDIATE_READINESS = 1 << 0;
        /// The device wants to raise INTx.
        const INTX = 1 << 3;
        /// There is a chain of capabilities.
        const CAPABILITIES = 1 << 4;
        /// Error: parity, of data that it has asked for.
        const MASTER_PARITY = 1 << 8;
        /// Error: it has ended a request with an abort.
        const SIGNALED_TARGET_ABORT = 1 << 11;
        /// Error: a request of its own was ended with an abort.
        const RECEIVED_TARGET_ABORT = 1 << 12;
        /// Error: nobody has answered a request of its own.
        const RECEIVED_MASTER_ABORT = 1 << 13;
        /// Error: it has reported one to the root complex.
        const SIGNALED_SYSTEM_ERROR = 1 << 14;
        /// Error: parity.
        const PARITY = 1 << 15;
        // Bits that this version does not know stay as they are.
        const _ = !0;
    }
}

impl Status {
    /// Those that are cleared by writing them.
    pub const ERRORS: Self = Self::MASTER_PARITY
        .union(Self::SIGNALED_TARGET_ABORT)
        .union(Self::RECEIVED_TARGET_ABORT)
        .union(Self::RECEIVED_MASTER_ABORT)
        .union(Self::SIGNALED_SYSTEM_ERROR)
        .union(Self::PARITY);
}

/// The identity of a function, as it says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Layout of the header: 0 is a device, 1 a bridge.
    pub header: u8,
    /// Whether its device has other functions.
    pub multi_function: bool,
}

/// Config space of a device, by system calls: [`Device::config`](crate::Device::config).
///
/// Values are in the byte order of the CPU; each access of 1, 2 or 4 bytes is one system call, and
/// no more.
///
/// # Examples
///
/// ```no_run
/// # fn example(device: &barlease::Device) -> barlease::Result<()> {
/// use barlease::config::{Capability, Command};
///
/// let config = device.config()?;
/// println!("{:04x}", config.identity()?.device);
/// config.update_command(|command| command | Command::MEMORY | Command::MASTER)?;
/// if let Some(at) = config.capability(Capability::VENDOR)? {
///     println!("{:#x}", config.read_u32(at.into())?);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy)]
pub struct ConfigSpace<'fd> {
    handle: Handle<'fd>,
    /// Where it begins in the descriptor of the device, and its length.
    start: u64,
    size: u64,
}

impl fmt::Debug for ConfigSpace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("bdf", &self.handle.bdf)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl<'fd> ConfigSpace<'fd> {
    /// That of a device; asks where it is.
    pub(crate) fn new(handle: Handle<'fd>) -> Result<Self> {
        let region = handle.region(INDEX)?;
        Ok(Self::at(handle, region.offset, region.size))
    }

    /// The same where that is known.
    pub(super) fn at(handle: Handle<'fd>, start: u64, size: u64) -> Self {
        Self {
            handle,
            start,
            size,
        }
    }

    /// Its length in bytes: 256, or 4096 with extended capabilities.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    fn position(&self, offset: u64, length: usize) -> Result<u64> {
        offset
            .checked_add(length as u64)
            .filter(|end| *end <= self.size)
            .and_then(|_| self.start.checked_add(offset))
            .ok_or_else(|| Error::OutOfBounds {
                object: self.handle.region_object(INDEX),
                offset,
                length: length as u64,
            })
    }

    /// Reads bytes from `offset` on.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let position = self.position(offset, buffer.len())?;
        self.handle.read_at(INDEX, position, buffer)
    }

    /// Writes bytes from `offset` on. VFIO takes them in pieces of at most 4 bytes.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        let position = self.position(offset, buffer.len())?;
        self.handle.write_at(INDEX, position, buffer)
    }

    fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads 1 byte.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn read_u8(&self, offset: u64) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array(offset)?))
    }

    /// Reads 2 bytes.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn read_u16(&self, offset: u64) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array(offset)?))
    }

    /// Reads 4 bytes.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn read_u32(&self, offset: u64) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(offset)?))
    }

    /// Writes 1 byte.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn write_u8(&self, offset: u64, value: u8) -> Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Writes 2 bytes.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn write_u16(&self, offset: u64, value: u16) -> Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Writes 4 bytes.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Io`].
    pub fn write_u32(&self, offset: u64, value: u32) -> Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// The identity of the function, as it says it.
    ///
    /// Errors: [`Error::Io`].
    pub fn identity(&self) -> Result<Identity> {
        let class = self.read_u32(0x08)?;
        let header = self.read_u8(0x0e)?;
        Ok(Identity {
            vendor: self.read_u16(0x00)?,
            device: self.read_u16(0x02)?,
            subsystem_vendor: self.read_u16(0x2c)?,
            subsystem: self.read_u16(0x2e)?,
            class: class >> 8,
            revision: class as u8,
            header: header & 0x7f,
            multi_function: header & 0x80 != 0,
        })
    }

    /// COMMAND.
    ///
    /// Errors: [`Error::Io`].
    pub fn command(&self) -> Result<Command> {
        Ok(Command::from_bits_retain(self.read_u16(0x04)?))
    }

    /// Writes COMMAND.
    ///
    /// Errors: [`Error::Io`].
    pub fn set_command(&self, command: Command) -> Result<()> {
        self.write_u16(0x04, command.bits())
    }

    /// Reads COMMAND, and writes what `change` makes of it, if that is something else.
    ///
    /// Errors: [`Error::Io`].
    pub fn update_command(&self, change: impl FnOnce(Command) -> Command) -> Result<()> {
        let before = self.command()?;
        let after = change(before);
        if after == before {
            return Ok(());
        }
        self.set_command(after)
    }

    /// STATUS.
    ///
    /// Errors: [`Error::Io`].
    pub fn status(&self) -> Result<Status> {
        Ok(Status::from_bits_retain(self.read_u16(0x06)?))
    }

    /// Clears these [`Status::ERRORS`] of STATUS, and no others.
    ///
    /// Errors: [`Error::Io`].
    pub fn clear_status(&self, errors: Status) -> Result<()> {
        self.write_u16(0x06, (errors & Status::ERRORS).bits())
    }

    /// Sets these bits of COMMAND, and leaves the others as they are.
    ///
    /// Errors: [`Error::Io`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(device: &barlease::Device) -> barlease::Result<()> {
    /// use barlease::config::Command;
    ///
    /// // It may do DMA and send MSIs.
    /// device.config()?.enable(Command::MASTER)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn enable(&self, bits: Command) -> Result<()> {
        self.update_command(|command| command | bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BarRange;
    use crate::fake::FakeDevice;

    fn range(offset: u64, length: u64) -> BarRange {
        BarRange { offset, length }
    }

    #[test]
    fn what_a_device_says_is_typed() {
        let fake = FakeDevice::builder()
            .bar(0, 0x8000)
            .msix(4, (0, 0x2000), (0, 0x3000))
            .build()
            .unwrap();
        let device = fake.device().unwrap();
        let config = device.config().unwrap();
        let msix = config.msix().unwrap().unwrap();
        assert_eq!((msix.vectors, msix.table), (4, (0, range(0x2000, 64))));
        assert_eq!(msix.pending, (0, range(0x3000, 8)));
        assert_eq!(
            device.exportable_ranges(0).unwrap(),
            [range(0, 0x2000), range(0x4000, 0x4000)]
        );
        let lease = device.export(0).export().unwrap();
        assert_eq!(lease.size(), 0x6000);
        assert_eq!(device.export(0).range(..).export().unwrap().size(), 0x8000);
        assert_eq!(
            device.export(0).range(0x7000..).export().unwrap().size(),
            0x1000
        );

        let status = config.status().unwrap();
        assert!(status.contains(Status::CAPABILITIES) && !status.intersects(Status::ERRORS));
        config.clear_status(Status::all()).unwrap();
        assert_eq!(config.read_u16(0x06).unwrap(), Status::ERRORS.bits());
        let identity = config.identity().unwrap();
        assert_eq!((identity.header, identity.multi_function), (0, false));

        config.enable(Command::MASTER).unwrap();
        let both = Command::MASTER | Command::MEMORY;
        assert_eq!(config.command().unwrap(), both);
        assert!(matches!(
            config.read_u32(0x1000 - 2),
            Err(Error::OutOfBounds { .. })
        ));
        assert!(matches!(
            config.read_u8(u64::MAX),
            Err(Error::OutOfBounds { .. })
        ));
    }
}
