// SPDX-License-Identifier: GPL-2.0

//! The mappings of BARs through the device fd.

use crate::sys::{
    dma_buf::DmaBuf,
    vfio_pci::BARS,
    vma::{MemoryType, OpenFile},
};

/// The mappings of a BAR through the device fd.
pub(crate) struct BarMap {
    /// Its internal buffer, which these VMAs map.
    pub(crate) dmabuf: DmaBuf,
    /// Keeps the device open while there are any.
    pub(crate) _device_file: OpenFile,
}

/// The mappings through the device fd, by BAR and memory type: one internal buffer for all of a
/// kind.
///
/// One that no VMA maps any more goes away.
#[derive(Default)]
pub(crate) struct BarMaps([[Option<BarMap>; 2]; BARS as usize]);

impl BarMaps {
    /// The place of those of a BAR and memory type; `None` where there is no such BAR.
    pub(crate) fn place(
        &mut self,
        bar: u32,
        memory_type: MemoryType,
    ) -> Option<&mut Option<BarMap>> {
        let [uncached, write_combining] = self.0.get_mut(bar as usize)?;
        Some(match memory_type {
            MemoryType::Uncached => uncached,
            MemoryType::WriteCombining => write_combining,
        })
    }
}
