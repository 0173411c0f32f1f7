// SPDX-License-Identifier: GPL-2.0

//! The MSI-X table and PBA: parts of a BAR that a lease must not hold, since who writes the table
//! decides where the device's interrupts go (PCI Local Bus 3.0, 6.8.2).

use crate::{abi, model::ranges, sys::vfio_pci::Function};
use kernel::{bindings, prelude::*};

/// An area of a BAR, in bytes.
#[derive(Clone, Copy)]
struct Area {
    bar: u32,
    offset: u64,
    length: u64,
}

/// The table and the PBA, where there are any.
pub(crate) struct Protected([Option<Area>; 2]);

impl Protected {
    /// What the areas are called, by the index that `hit` gives.
    pub(crate) const NAMES: [&'static str; 2] = ["the MSI-X table", "the MSI-X PBA"];

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
            Some(Area::at(table, vectors * 16)),
            Some(Area::at(pba, vectors.div_ceil(64) * 8)),
        ]))
    }

    /// The index of an area that one of `ranges` of `bar` overlaps.
    pub(crate) fn hit(&self, bar: u32, ranges: &[abi::DmaRange]) -> Option<usize> {
        self.0.iter().position(|area| match area {
            Some(area) if area.bar == bar => ranges.iter().any(|range| {
                ranges::overlaps(range.offset, range.length, area.offset, area.length)
            }),
            _ => false,
        })
    }
}

impl Area {
    /// `register` holds a BAR number in its low 3 bits and an offset in the others.
    fn at(register: u32, length: u64) -> Self {
        Self {
            bar: register & bindings::PCI_MSIX_TABLE_BIR,
            offset: u64::from(register & bindings::PCI_MSIX_TABLE_OFFSET),
            length,
        }
    }
}
