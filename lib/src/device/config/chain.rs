//! The chains of capabilities. Each ends, whatever the device answers.

use super::ConfigSpace;
use super::INDEX;
use super::Status;
use crate::Error;
use crate::Result;

/// Where the first capability may be, and how many fit in between there and the end.
const FIRST: u16 = 0x40;
pub(super) const END: u16 = 0x100;
const MOST: usize = (END - FIRST) as usize / 4;
/// The same for extended ones, of which each has 4 bytes at least.
const EXTENDED_FIRST: u16 = 0x100;
const EXTENDED_END: u16 = 0x1000;
const EXTENDED_MOST: usize = (EXTENDED_END - EXTENDED_FIRST) as usize / 4;

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

impl ConfigSpace<'_> {
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
}

/// The chain from `first` on: `None` if it is broken.
pub(super) fn walk(
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
pub(in crate::device) fn walk_extended(
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
    }

    #[test]
    fn a_chain_that_loops_is_refused() {
        assert_eq!(walk(0x40, |_| Ok([1, 0x40])).unwrap(), None);
        assert_eq!(walk(0x10, |_| Ok([1, 0])).unwrap(), None);
        assert_eq!(walk_extended(|_| Ok(0x1001_0001)).unwrap(), None);
        assert_eq!(walk_extended(|_| Ok(0)).unwrap(), Some(vec![]));
    }
}
