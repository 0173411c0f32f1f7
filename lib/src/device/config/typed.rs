//! Capabilities that a driver needs, typed.

use super::Capability;
use super::ConfigSpace;
use super::ExtendedCapability;
use crate::BarRange;
use crate::Result;

/// The kind of a PCI Express function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpressKind {
    /// An endpoint.
    Endpoint,
    /// A legacy endpoint.
    LegacyEndpoint,
    /// An endpoint that is part of the root complex.
    IntegratedEndpoint,
    /// Something else, with the number that the capability has.
    Other(u8),
}

/// The PCI Express capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Express {
    /// Where it is in config space.
    pub offset: u16,
    /// Version of the capability.
    pub version: u8,
    /// The kind of the function.
    pub kind: ExpressKind,
    /// Most bytes of payload that the function can take, 128 to 4096.
    pub max_payload_supported: u16,
    /// Most bytes of payload that it sends now.
    pub max_payload: u16,
    /// Most bytes that it asks for in one read.
    pub max_read_request: u16,
    /// Whether it can be reset by itself.
    pub function_level_reset: bool,
    /// Speed of its link now: 1 is 2.5 GT/s, 2 is 5 GT/s, 3 is 8 GT/s and so on. 0: no link.
    pub link_speed: u8,
    /// Lanes of its link now. 0: no link.
    pub link_width: u8,
    /// Whether it completes requests with 8-bit steering tags, and with 16-bit ones.
    pub tph_completer: (bool, bool),
}

/// The power-management capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PowerManagement {
    /// Where it is in config space.
    pub offset: u16,
    /// Version of the capability.
    pub version: u8,
    /// Whether it has the states D1 and D2.
    pub d1_d2: (bool, bool),
    /// Its state now: D0 to D3hot are 0 to 3.
    pub state: u8,
    /// Whether going from D3hot to D0 leaves it as it was, instead of resetting it.
    pub no_soft_reset: bool,
}

/// The MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Msi {
    /// Where it is in config space.
    pub offset: u16,
    /// Its length in bytes, which depends on what follows.
    pub length: u8,
    /// Number of vectors that the function can send: 1 to 32.
    pub vectors: u8,
    /// Number of vectors that it may send now. This and the next are as they were written through
    /// config space: [`Device::enable_interrupts`](crate::Device::enable_interrupts) does not show
    /// in it.
    pub vectors_enabled: u8,
    /// Whether it is on.
    pub enabled: bool,
    /// Whether it can write to addresses above 4 GiB.
    pub wide_addresses: bool,
    /// Whether single vectors can be masked.
    pub maskable: bool,
}

/// A capability that its vendor defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VendorCapability {
    /// Where it is in config space.
    pub offset: u16,
    /// Its length in bytes, with the 3 of its header, as it says itself.
    pub length: u8,
}

/// An extended capability that its vendor defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExtendedVendorCapability {
    /// Where it is in config space.
    pub offset: u16,
    /// The vendor's name for it.
    pub id: u16,
    /// The vendor's revision of it.
    pub revision: u8,
    /// Its length in bytes, with the 8 of its headers, as it says itself.
    pub length: u16,
}

/// The MSI-X capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Msix {
    /// Where it is in config space.
    pub offset: u16,
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// The BAR that has the table, and where in it, in bytes.
    pub table: (u8, BarRange),
    /// The BAR that has the pending bits, and where in it, in bytes.
    pub pending: (u8, BarRange),
    /// Whether it is on, as it was written through config space: see [`Msi::vectors_enabled`].
    pub enabled: bool,
    /// Whether all vectors are masked.
    pub masked: bool,
}

impl ConfigSpace<'_> {
    /// The PCI Express capability.
    ///
    /// Errors: as for [`ConfigSpace::capabilities`].
    pub fn express(&self) -> Result<Option<Express>> {
        let Some(offset) = self.capability(Capability::EXPRESS)? else {
            return Ok(None);
        };
        let at = u64::from(offset);
        let flags = self.read_u16(at + 2)?;
        let supported = self.read_u32(at + 4)?;
        let control = self.read_u16(at + 8)?;
        let version = (flags & 0xf) as u8;
        // Of an integrated endpoint, and of version 1, these registers need not be there.
        let kind = match (flags >> 4) & 0xf {
            0 => ExpressKind::Endpoint,
            1 => ExpressKind::LegacyEndpoint,
            9 => ExpressKind::IntegratedEndpoint,
            other => ExpressKind::Other(other as u8),
        };
        let link = match kind {
            ExpressKind::IntegratedEndpoint => 0,
            _ => self.read_u16(at + 0x12)?,
        };
        let supported_2 = if version >= 2 {
            self.read_u32(at + 0x24)?
        } else {
            0
        };
        let tph = (supported_2 >> 12) & 0b11;
        Ok(Some(Express {
            offset,
            version,
            kind,
            max_payload_supported: 128 << (supported & 0b111).min(5),
            max_payload: 128 << ((control >> 5) & 0b111).min(5),
            max_read_request: 128 << ((control >> 12) & 0b111).min(5),
            function_level_reset: supported & 1 << 28 != 0,
            link_speed: (link & 0xf) as u8,
            link_width: ((link >> 4) & 0x3f) as u8,
            tph_completer: (tph & 1 != 0, tph == 0b11),
        }))
    }

    /// The MSI-X capability.
    ///
    /// Errors: as for [`ConfigSpace::capabilities`].
    pub fn msix(&self) -> Result<Option<Msix>> {
        let Some(offset) = self.capability(Capability::MSIX)? else {
            return Ok(None);
        };
        let at = u64::from(offset);
        let registers = [self.read_u32(at + 4)?, self.read_u32(at + 8)?];
        Ok(Some(Msix::decode(
            offset,
            self.read_u16(at + 2)?,
            registers,
        )))
    }

    /// The power-management capability.
    ///
    /// Errors: as for [`ConfigSpace::capabilities`].
    pub fn power_management(&self) -> Result<Option<PowerManagement>> {
        let Some(offset) = self.capability(Capability::POWER_MANAGEMENT)? else {
            return Ok(None);
        };
        let capabilities = self.read_u16(u64::from(offset) + 2)?;
        let control = self.read_u16(u64::from(offset) + 4)?;
        Ok(Some(PowerManagement {
            offset,
            version: (capabilities & 0b111) as u8,
            d1_d2: (capabilities & 1 << 9 != 0, capabilities & 1 << 10 != 0),
            state: (control & 0b11) as u8,
            no_soft_reset: control & 1 << 3 != 0,
        }))
    }

    /// The MSI capability.
    ///
    /// Errors: as for [`ConfigSpace::capabilities`].
    pub fn msi(&self) -> Result<Option<Msi>> {
        let Some(offset) = self.capability(Capability::MSI)? else {
            return Ok(None);
        };
        let control = self.read_u16(u64::from(offset) + 2)?;
        let wide_addresses = control & 1 << 7 != 0;
        let maskable = control & 1 << 8 != 0;
        // 6 and 7 are reserved.
        let vectors = |shift: u32| 1 << ((control >> shift) & 0b111).min(5);
        Ok(Some(Msi {
            offset,
            length: match (wide_addresses, maskable) {
                (false, false) => 0x0c,
                (true, false) => 0x10,
                (false, true) => 0x14,
                (true, true) => 0x18,
            },
            vectors: vectors(1),
            vectors_enabled: vectors(4),
            enabled: control & 1 != 0,
            wide_addresses,
            maskable,
        }))
    }

    /// All capabilities that the vendor defines: devices have several.
    ///
    /// Errors: as for [`ConfigSpace::capabilities`].
    pub fn vendor_capabilities(&self) -> Result<Vec<VendorCapability>> {
        let all = self.capabilities()?.into_iter();
        all.filter(|one| one.id == Capability::VENDOR)
            .map(|one| {
                Ok(VendorCapability {
                    offset: one.offset,
                    length: self.read_u8(u64::from(one.offset) + 2)?,
                })
            })
            .collect()
    }

    /// All extended capabilities that the vendor defines.
    ///
    /// Errors: as for [`ConfigSpace::extended_capabilities`].
    pub fn extended_vendor_capabilities(&self) -> Result<Vec<ExtendedVendorCapability>> {
        let all = self.extended_capabilities()?.into_iter();
        all.filter(|one| one.id == ExtendedCapability::VENDOR)
            .map(|one| {
                let header = self.read_u32(u64::from(one.offset) + 4)?;
                Ok(ExtendedVendorCapability {
                    offset: one.offset,
                    id: header as u16,
                    revision: ((header >> 16) & 0xf) as u8,
                    length: (header >> 20) as u16,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDevice;

    #[test]
    fn capabilities_are_taken_apart_as_the_specification_has_them() {
        let fake = FakeDevice::builder()
            // Behind those of the builder: PCI Express at 0x40 begins the chain.
            .config(0x41, &[0xc0])
            // Power management 3, with D2 but not D1; D3hot, and it stays as it was.
            .config(0xc0, &[0x01, 0xd0, 0x03, 0x04, 0x0b, 0x00])
            // MSI: 64 bits, masks; 8 vectors, of which 2 are on.
            .config(0xd0, &[0x05, 0xe0, 0x97, 0x01])
            // Two of the vendor's.
            .config(0xe0, &[0x09, 0xf0, 0x10])
            .config(0xf0, &[0x09, 0x00, 0x04])
            // The same among the extended ones.
            .config(0x100, &[0x0b, 0x00, 0x01, 0x00, 0x34, 0x12, 0x85, 0x01])
            .build()
            .unwrap();
        let device = fake.device().unwrap();
        let config = device.config().unwrap();
        let express = config.express().unwrap().unwrap();
        assert_eq!(express.kind, ExpressKind::Endpoint);
        assert!(express.function_level_reset);

        let power = config.power_management().unwrap().unwrap();
        assert_eq!((power.offset, power.version), (0xc0, 3));
        assert_eq!((power.d1_d2, power.state), ((false, true), 3));
        assert!(power.no_soft_reset);

        let msi = config.msi().unwrap().unwrap();
        assert_eq!((msi.offset, msi.length), (0xd0, 0x18));
        assert_eq!((msi.vectors, msi.vectors_enabled), (8, 2));
        assert!(msi.enabled && msi.wide_addresses && msi.maskable);

        let vendor = config.vendor_capabilities().unwrap();
        let found: Vec<_> = vendor.iter().map(|one| (one.offset, one.length)).collect();
        assert_eq!(found, [(0xe0, 0x10), (0xf0, 4)]);
        let [vendor] = config.extended_vendor_capabilities().unwrap()[..] else {
            panic!("not one");
        };
        assert_eq!((vendor.offset, vendor.id), (0x100, 0x1234));
        assert_eq!((vendor.revision, vendor.length), (5, 0x18));
        assert_eq!(config.msix().unwrap(), None);
    }
}
