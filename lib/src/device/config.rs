//! Config space: registers by width, capabilities, and those that a driver needs typed.
//!
//! Config space is not believed: every chain ends, and every offset is checked.

mod typed;

use std::fmt;

use vfio_bindings::bindings::vfio;

use super::Handle;
use crate::BarRange;
use crate::Error;
use crate::Result;

pub use typed::Express;
pub use typed::ExpressKind;
pub use typed::ExtendedVendorCapability;
pub use typed::Msi;
pub use typed::Msix;
pub use typed::PowerManagement;
pub use typed::VendorCapability;

const INDEX: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;

/// Where the first capability may be, and how many fit in between there and the end.
const FIRST: u16 = 0x40;
const END: u16 = 0x100;
const MOST: usize = (END - FIRST) as usize / 4;
/// The same for extended ones, of which each has 4 bytes at least.
const EXTENDED_FIRST: u16 = 0x100;
const EXTENDED_END: u16 = 0x1000;
const EXTENDED_MOST: usize = (EXTENDED_END - EXTENDED_FIRST) as usize / 4;

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

/// A capability in the first 256 bytes of config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// Its id: see the constants of [`Capability`].
    pub id: u8,
    /// Where it is in config space.
    pub offset: u16,
}

impl Capability {
    /// Power management.
    pub const POWER_MANAGEMENT: u8 = 0x01;
    /// MSI.
    pub const MSI: u8 = 0x05;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Something of the vendor's.
    pub const VENDOR: u8 = 0x09;
    /// Vital Product Data.
    pub const VITAL_PRODUCT_DATA: u8 = 0x03;
    /// Conventional PCI Advanced Features: function-level reset of what has no PCI Express.
    pub const ADVANCED_FEATURES: u8 = 0x13;
    /// Enhanced Allocation: BARs at fixed addresses.
    pub const ENHANCED_ALLOCATION: u8 = 0x14;
}

/// An extended capability, from byte 256 of config space on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExtendedCapability {
    /// Its id: see the constants of [`ExtendedCapability`].
    pub id: u16,
    /// Its version.
    pub version: u8,
    /// Where it is in config space.
    pub offset: u16,
}

impl ExtendedCapability {
    /// Advanced Error Reporting.
    pub const ERROR_REPORTING: u16 = 0x01;
    /// Serial number.
    pub const SERIAL_NUMBER: u16 = 0x03;
    /// Something of the vendor's.
    pub const VENDOR: u16 = 0x0b;
    /// Access Control Services.
    pub const ACCESS_CONTROL: u16 = 0x0d;
    /// Single Root I/O Virtualization.
    pub const SRIOV: u16 = 0x10;
    /// Resizable BAR.
    pub const RESIZABLE_BAR: u16 = 0x15;
    /// TLP Processing Hints requester.
    pub const TPH: u16 = 0x17;
    /// Process Address Space ID.
    pub const PASID: u16 = 0x1b;
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

    /// All capabilities, in the order of the chain.
    ///
    /// Errors: [`Error::Malformed`]: the chain leaves its place or does not end; [`Error::Io`].
    pub fn capabilities(&self) -> Result<Vec<Capability>> {
        if !self.status()?.contains(Status::CAPABILITIES) {
            return Ok(Vec::new());
        }
        let first = self.read_u8(0x34)?;
        let found = walk(first, |at| self.array(at.into()))?;
        found.ok_or_else(|| self.broken("the chain of capabilities is broken"))
    }

    /// Where the first capability with this id is.
    ///
    /// Errors: as for [`ConfigSpace::capabilities`].
    pub fn capability(&self, id: u8) -> Result<Option<u16>> {
        let mut all = self.capabilities()?.into_iter();
        Ok(all.find(|one| one.id == id).map(|one| one.offset))
    }

    /// All extended capabilities, in the order of the chain; none where config space ends at 256
    /// bytes.
    ///
    /// Errors: [`Error::Malformed`]: the chain leaves its place or does not end; [`Error::Io`].
    pub fn extended_capabilities(&self) -> Result<Vec<ExtendedCapability>> {
        if self.size < u64::from(EXTENDED_END) {
            return Ok(Vec::new());
        }
        let found = walk_extended(|at| self.read_u32(at.into()))?;
        found.ok_or_else(|| self.broken("the chain of extended capabilities is broken"))
    }

    /// Where the first extended capability with this id is.
    ///
    /// Errors: as for [`ConfigSpace::extended_capabilities`].
    pub fn extended_capability(&self, id: u16) -> Result<Option<u16>> {
        let mut all = self.extended_capabilities()?.into_iter();
        Ok(all.find(|one| one.id == id).map(|one| one.offset))
    }

    fn broken(&self, reason: &'static str) -> Error {
        Error::malformed(
            "read capabilities",
            self.handle.region_object(INDEX),
            reason,
        )
    }

    /// What of a BAR of `size` bytes has no page in common with the MSI-X table or its pending
    /// bits.
    pub(crate) fn exportable_ranges(&self, bar: u32, size: u64) -> Result<Vec<BarRange>> {
        let msix = self.msix()?;
        Ok(Msix::leaves(msix.as_ref(), bar, size))
    }
}

impl Msix {
    /// `registers`: where the table and the pending bits are.
    fn decode(offset: u16, control: u16, registers: [u32; 2]) -> Self {
        let vectors = (control & 0x7ff) + 1;
        let place = |register: u32, length| {
            let range = BarRange {
                offset: u64::from(register & !0b111),
                length,
            };
            ((register & 0b111) as u8, range)
        };
        let [table, pending] = registers;
        Self {
            offset,
            vectors,
            table: place(table, u64::from(vectors) * 16),
            // A bit a vector, in words of 64.
            pending: place(pending, u64::from(vectors).div_ceil(64) * 8),
            enabled: control & 1 << 15 != 0,
            masked: control & 1 << 14 != 0,
        }
    }

    /// That in the bytes of config space. The outer `None`: they do not tell, since only the header
    /// may be read, or the device is gone.
    pub(crate) fn of_bytes(config: &[u8]) -> Option<Option<Self>> {
        let byte = |at: u16| config.get(usize::from(at)).copied();
        let word = |at: u16| Some(u16::from_le_bytes([byte(at)?, byte(at + 1)?]));
        let long = |at: u16| Some(u32::from(word(at)?) | u32::from(word(at + 2)?) << 16);
        if config.len() < usize::from(END) || byte(0) == Some(0xff) && byte(1) == Some(0xff) {
            return None;
        }
        let first = match word(0x06)? & Status::CAPABILITIES.bits() {
            0 => return Some(None),
            _ => byte(0x34)?,
        };
        // All of it is there, so nothing fails but the chain.
        let list = walk(first, |at| {
            Ok([byte(at).unwrap_or(0), byte(at + 1).unwrap_or(0)])
        });
        let its = |one: &Capability| one.id == Capability::MSIX;
        let Some(at) = list.ok()??.into_iter().find(its).map(|it| it.offset) else {
            return Some(None);
        };
        let registers = [long(at + 4)?, long(at + 8)?];
        Some(Some(Self::decode(at, word(at + 2)?, registers)))
    }

    /// What of a BAR of `size` bytes has no page in common with the table or its pending bits.
    pub(crate) fn leaves(msix: Option<&Self>, bar: u32, size: u64) -> Vec<BarRange> {
        let page = rustix::param::page_size() as u64;
        let taken: Vec<BarRange> = msix
            .into_iter()
            .flat_map(|msix| [msix.table, msix.pending])
            .filter(|(its, _)| u32::from(*its) == bar)
            .map(|(_, range)| range)
            .collect();
        around(size, page, &taken)
    }
}

/// The chain from `first` on: `None` if it is broken.
fn walk(
    first: u8,
    mut read: impl FnMut(u16) -> Result<[u8; 2]>,
) -> Result<Option<Vec<Capability>>> {
    let mut found = Vec::new();
    // The two lowest bits are reserved.
    let mut at = u16::from(first & !0b11);
    while at != 0 {
        if at < FIRST || found.len() == MOST {
            return Ok(None);
        }
        let [id, next] = read(at)?;
        // A device that is gone answers this.
        if (id, next) == (0xff, 0xff) {
            return Ok(None);
        }
        found.push(Capability { id, offset: at });
        at = u16::from(next & !0b11);
    }
    Ok(Some(found))
}

/// The same of the extended ones.
pub(super) fn walk_extended(
    mut read: impl FnMut(u16) -> Result<u32>,
) -> Result<Option<Vec<ExtendedCapability>>> {
    let mut found = Vec::new();
    let mut at = EXTENDED_FIRST;
    loop {
        let header = read(at)?;
        // An empty list begins with zeros, or with ones where VFIO hides what is there.
        if found.is_empty() && (header == 0 || header == u32::MAX) {
            return Ok(Some(found));
        }
        if found.len() == EXTENDED_MOST || header == u32::MAX {
            return Ok(None);
        }
        found.push(ExtendedCapability {
            id: header as u16,
            version: ((header >> 16) & 0xf) as u8,
            offset: at,
        });
        at = ((header >> 20) & 0xffc) as u16;
        if at == 0 {
            return Ok(Some(found));
        }
        if at < EXTENDED_FIRST {
            return Ok(None);
        }
    }
}

/// The whole pages of `size` bytes without those that `taken` touches.
fn around(size: u64, page: u64, taken: &[BarRange]) -> Vec<BarRange> {
    let end = size - size % page;
    let mut holes: Vec<(u64, u64)> = taken
        .iter()
        .map(|range| {
            let last = range.offset.saturating_add(range.length);
            let from = range.offset - range.offset % page;
            (from, last.checked_next_multiple_of(page).unwrap_or(end))
        })
        .collect();
    holes.sort_unstable();
    let mut ranges = Vec::new();
    let mut at = 0;
    for (from, to) in holes.into_iter().chain([(end, end)]) {
        let from = from.min(end);
        if from > at {
            ranges.push(BarRange {
                offset: at,
                length: from - at,
            });
        }
        at = at.max(to);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeDevice;

    fn range(offset: u64, length: u64) -> BarRange {
        BarRange { offset, length }
    }

    #[test]
    fn pages_of_the_table_are_left_out() {
        assert_eq!(around(0x4000, 0x1000, &[]), [range(0, 0x4000)]);
        let table = [range(0x2000, 0x410), range(0x3000, 8)];
        assert_eq!(around(0x4000, 0x1000, &table), [range(0, 0x2000)]);
        assert_eq!(
            around(0x8000, 0x1000, &[range(0x1ff0, 0x20)]),
            [range(0, 0x1000), range(0x3000, 0x5000)]
        );
        assert_eq!(around(0x1000, 0x1000, &[range(0x800, 16)]), []);
        assert_eq!(around(0x100, 0x1000, &[]), []);
        // A table that is said to be past the end, and one that overflows.
        assert_eq!(
            around(0x1000, 0x1000, &[range(0x9000, 16)]),
            [range(0, 0x1000)]
        );
        assert_eq!(
            around(0x2000, 0x1000, &[range(0x1000, u64::MAX)]),
            [range(0, 0x1000)]
        );
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

    proptest! {
        #[test]
        fn no_config_space_panics_or_hangs(
            bytes in proptest::collection::vec(any::<u8>(), 4096),
            first: u8,
        ) {
            let byte = |at: u16| bytes[usize::from(at)];
            let word = |at: u16| Ok([byte(at), byte(at + 1)]);
            if let Some(found) = walk(first, word).unwrap() {
                prop_assert!(found.len() <= MOST);
            }
            let long = |at: u16| Ok(u32::from_le_bytes([0, 1, 2, 3].map(|n| byte(at + n))));
            if let Some(found) = walk_extended(long).unwrap() {
                prop_assert!(found.len() <= EXTENDED_MOST);
            }
        }

        #[test]
        fn what_can_be_exported_touches_no_table(
            size in 0u64..0x2_0000,
            taken in proptest::collection::vec((0u64..0x2_0000, 1u64..0x3000), 0..4),
        ) {
            let taken: Vec<_> = taken.into_iter().map(|(at, len)| range(at, len)).collect();
            let free = around(size, 0x1000, &taken);
            for page in 0..size / 0x1000 {
                let at = page * 0x1000;
                let next = at + 0x1000;
                let end = |one: &BarRange| one.offset + one.length;
                let used = taken.iter().any(|one| one.offset < next && at < end(one));
                let listed = free.iter().any(|one| one.offset <= at && next <= end(one));
                prop_assert_eq!(used, !listed, "page {:#x}", at);
            }
            for one in &free {
                prop_assert!(one.offset + one.length <= size && one.length > 0);
                prop_assert_eq!((one.offset | one.length) % 0x1000, 0);
            }
        }
    }

    #[test]
    fn a_chain_that_loops_is_refused() {
        assert_eq!(walk(0x40, |_| Ok([1, 0x40])).unwrap(), None);
        assert_eq!(walk(0x10, |_| Ok([1, 0])).unwrap(), None);
        assert_eq!(walk_extended(|_| Ok(0x1001_0001)).unwrap(), None);
        assert_eq!(walk_extended(|_| Ok(0)).unwrap(), Some(vec![]));
    }
}
