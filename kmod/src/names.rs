// SPDX-License-Identifier: GPL-2.0

//! The names that dma-bufs have at first.

use crate::sys::{dma_buf::NAME_LEN, vma::MemoryType};
use kernel::prelude::*;

/// The names of a function's dma-bufs: `barlease:<BDF>/<bar>`, with `+wc` behind it where it is
/// that; cut where such a name ends.
pub(crate) struct Names {
    /// Their beginning.
    start: [u8; NAME_LEN],
    length: usize,
}

impl Names {
    /// Those of the function `bdf`.
    pub(crate) fn new(bdf: &CStr) -> Self {
        let mut this = Self {
            start: [0; NAME_LEN],
            length: 0,
        };
        let parts = [b"barlease:", bdf.to_bytes(), b"/"];
        // Not the last: it stays NUL.
        let places = this.start.iter_mut().take(NAME_LEN - 1);
        for (place, byte) in places.zip(parts.into_iter().flatten()) {
            *place = *byte;
            this.length += 1;
        }
        this
    }

    /// That of a buffer of `bar`.
    pub(crate) fn of(&self, bar: u32, memory_type: MemoryType) -> [u8; NAME_LEN] {
        let suffix: &[u8] = match memory_type {
            MemoryType::Uncached => b"",
            MemoryType::WriteCombining => b"+wc",
        };
        let mut name = self.start;
        if let Some(place) = name.get_mut(self.length) {
            // A BAR has one digit.
            *place = b'0'.wrapping_add(bar as u8);
        }
        let places = name.iter_mut().skip(self.length + 1);
        for (place, byte) in places.zip(suffix) {
            *place = *byte;
        }
        name
    }
}
