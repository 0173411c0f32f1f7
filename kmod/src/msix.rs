// SPDX-License-Identifier: GPL-2.0

//! The MSI-X table and PBA: parts of a BAR that a lease must not hold, since who writes the table
//! decides where the device's interrupts go (PCI Local Bus 3.0, 6.8.2).

use crate::{abi, model::ranges, sys::vfio_pci::Function};
use kernel::{bindings, prelude::*};

/// An area of a BAR, in bytes.
#[derive(Clone, Copy)]
struct Area {
    name: &'static str,
    bar: u32,
    offset: u64,
    length: u64,
}

/// The table and the PBA, where there are any.
pub(crate) struct Protected([Option<Area>; 2]);

impl Protected {
    /// Reads the function's MSI-X capability.
    pub(crate) fn of(function: &Function<'_>) -> Result<Self> {
        let Some(capability) = function.msix_capability() else {
            return Ok(Self([None, None]));
        };
        let at = |register: u32| function.config_dword(i32::from(capability) + register as i32);
        // The upper half of the first dword is Message Control.
        let vectors = u64::from((at(0)? >> 16) & bindings::PCI_MSIX_FLAGS_QSIZE) + 1;
        let table = at(bindings::PCI_MSIX_TABLE)?;
        let pba = at(bindings::PCI_MSIX_PBA)?;
        Ok(Self([
            Some(Area::at("the MSI-X table", table, vectors * 16)),
            Some(Area::at("the MSI-X PBA", pba, vectors.div_ceil(64) * 8)),
        ]))
    }

    /// Whether anything of it is in `bar`.
    pub(crate) fn has(&self, bar: u32) -> bool {
        self.0.iter().flatten().any(|area| area.bar == bar)
    }

    /// What one of `ranges` of `bar` overlaps.
    pub(crate) fn hit(&self, bar: u32, ranges: &[abi::DmaRange]) -> Option<&'static str> {
        let overlaps = |area: &&Area| {
            area.bar == bar
                && ranges.iter().any(|range| {
                    ranges::overlaps(range.offset, range.length, area.offset, area.length)
                })
        };
        self.0.iter().flatten().find(overlaps).map(|area| area.name)
    }
}

impl Area {
    /// `register` holds a BAR number in its low 3 bits and an offset in the others.
    fn at(name: &'static str, register: u32, length: u64) -> Self {
        Self {
            name,
            bar: register & bindings::PCI_MSIX_TABLE_BIR,
            offset: u64::from(register & bindings::PCI_MSIX_TABLE_OFFSET),
            length,
        }
    }
}
