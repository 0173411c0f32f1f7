// SPDX-License-Identifier: GPL-2.0

//! The MSI-X table and PBA: parts of a BAR that a lease holds only where the host is safe from
//! them, since a write to the table decides where the device's interrupts go (PCI Local Bus 3.0,
//! 6.8.2).

use crate::{
    abi,
    model::ranges,
    sys::{
        params::{self, MsixExport},
        vfio_pci::{BARS, Function},
    },
};
use kernel::bindings;

/// An area of a BAR, in bytes.
#[derive(Clone, Copy)]
struct Area {
    name: &'static str,
    bar: u32,
    offset: u64,
    length: u64,
}

/// The parts of an open device's BARs that a lease holds only where the parameter `msix_export` lets
/// it.
#[derive(Clone, Copy)]
pub(crate) struct Protected {
    areas: Areas,
    /// Whether a write to the table can raise the device's own interrupts only.
    isolated: bool,
}

/// The table and the PBA.
#[derive(Clone, Copy)]
enum Areas {
    /// Those that there are.
    Known([Option<Area>; 2]),
    /// The device does not say where they are, so they may be anywhere.
    Anywhere,
}

impl Protected {
    /// Of a device that is not open.
    pub(crate) const fn nothing() -> Self {
        Self {
            areas: Areas::Known([None, None]),
            isolated: false,
        }
    }

    /// Reads the function's MSI-X capability.
    pub(crate) fn of(function: &Function<'_>) -> Self {
        let Some(capability) = function.msix_capability() else {
            return Self::nothing();
        };
        Self {
            areas: Areas::read(function, capability).unwrap_or(Areas::Anywhere),
            isolated: function.has_isolated_msi(),
        }
    }

    /// The BARs that anything of it may be in, a bit each.
    pub(crate) fn bars(&self) -> u32 {
        match self.areas {
            Areas::Known(areas) => areas
                .iter()
                .flatten()
                .fold(0, |bars, area| bars | bit(area.bar)),
            Areas::Anywhere => u32::MAX,
        }
    }

    /// Whether it must not be exported.
    pub(crate) fn is_refused(&self) -> bool {
        match params::msix_export() {
            MsixExport::Auto => !self.isolated,
            MsixExport::Always => false,
            MsixExport::Never => true,
        }
    }

    /// The name of the area that one of `ranges` of `bar` overlaps.
    pub(crate) fn hit(&self, bar: u32, ranges: &[abi::DmaRange]) -> Option<&'static str> {
        let Areas::Known(areas) = &self.areas else {
            return Some("an MSI-X table that the device does not tell the place of");
        };
        let overlaps = |area: &&Area| {
            area.bar == bar
                && ranges.iter().any(|range| {
                    ranges::overlaps(range.offset, range.length, area.offset, area.length)
                })
        };
        areas.iter().flatten().find(overlaps).map(|area| area.name)
    }
}

/// The bit of a BAR in [`Protected::bars`].
pub(crate) fn bit(bar: u32) -> u32 {
    1u32.checked_shl(bar).unwrap_or(0)
}

impl Areas {
    /// Reads the capability at this offset of config space; `None` for a device that does not
    /// answer, or names no BAR.
    fn read(function: &Function<'_>, capability: u8) -> Option<Self> {
        let at = |register: u32| {
            // CAST: An offset in config space.
            let offset = i32::from(capability) + register as i32;
            let value = function.config_dword(offset).ok()?;
            (value != u32::MAX).then_some(value)
        };
        // The upper half of the first dword is Message Control.
        let vectors = u64::from((at(0)? >> 16) & bindings::PCI_MSIX_FLAGS_QSIZE) + 1;
        let table = at(bindings::PCI_MSIX_TABLE)?;
        let pba = at(bindings::PCI_MSIX_PBA)?;
        Some(Self::Known([
            Some(Area::at("the MSI-X table", table, vectors * 16)?),
            Some(Area::at("the MSI-X PBA", pba, vectors.div_ceil(64) * 8)?),
        ]))
    }
}

impl Area {
    /// `register` holds a BAR number in its low 3 bits and an offset in the others. `None` if there
    /// is no such BAR.
    fn at(name: &'static str, register: u32, length: u64) -> Option<Self> {
        let bar = register & bindings::PCI_MSIX_TABLE_BIR;
        (bar < BARS).then_some(Self {
            name,
            bar,
            offset: u64::from(register & bindings::PCI_MSIX_TABLE_OFFSET),
            length,
        })
    }
}
