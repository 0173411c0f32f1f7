// SPDX-License-Identifier: GPL-2.0

//! Device memory that may be mapped.

use crate::model::ranges;
use kernel::page::{PAGE_SHIFT, PAGE_SIZE};

/// The memory of one BAR.
///
/// Only [`Device::bar`](super::vfio_pci::Device::bar) makes one. So whoever has it can map pages of
/// that BAR, counted from its beginning, and nothing else, whatever numbers are passed: the
/// functions that make page-table entries and DMA mappings ask [`Self::frame_of`].
///
/// It says what the BAR was when it was asked for. That the BAR is the function's no longer, once
/// that was unbound, is known to the state of the buffer ([`leases`](crate::leases)).
///
/// # Invariants
///
/// The first [`Self::pages`] pages from `start` on are memory of a BAR that the core has claimed,
/// and of nothing else.
#[derive(Clone, Copy)]
pub(crate) struct Bar {
    index: u8,
    alone: bool,
    start: u64,
    length: u64,
}

impl Bar {
    /// # Safety
    ///
    /// The bytes must be those of BAR `index`, which the core has claimed. Where that is less than
    /// a page, `alone` must say whether nothing else is in that page.
    pub(super) unsafe fn new(index: u32, start: u64, length: u64, alone: bool) -> Self {
        // INVARIANT: By the caller.
        Self {
            // CAST: A function has six BARs and a ROM.
            index: index as u8,
            alone,
            start,
            length,
        }
    }

    /// Which BAR it is.
    pub(crate) fn index(&self) -> u32 {
        self.index.into()
    }

    /// Bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Where it is, to check ranges against.
    pub(crate) fn extent(&self) -> ranges::Bar {
        ranges::Bar {
            start: self.start,
            length: self.length,
        }
    }

    /// The frame number of its first page.
    pub(crate) fn first_frame(&self) -> u64 {
        self.start >> PAGE_SHIFT
    }

    /// How many pages may be mapped. A part of a page at the end is left out; a BAR that is smaller
    /// than a page has one if it is alone in it.
    #[inline]
    fn pages(&self) -> u64 {
        let page = PAGE_SIZE as u64;
        if self.start & (page - 1) != 0 {
            0
        } else if self.length < page {
            self.alone.into()
        } else {
            self.length >> PAGE_SHIFT
        }
    }

    /// The frame number of `page`, if it and those after it, `pages` in all and at least one, are
    /// in the BAR.
    #[inline]
    pub(super) fn frame_of(&self, page: u64, pages: u64) -> Option<u64> {
        ranges::holds(self.pages(), page, pages).then(|| self.first_frame().wrapping_add(page))
    }
}
