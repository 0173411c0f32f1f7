// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Which pages one fault brings in, where only single-page entries are possible.

use super::ranges::{self, Mapping, Misfit, Segment};

/// A run of pages: contiguous in the mapping and in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Address of the first page.
    pub address: u64,
    /// The page of the BAR that is the first one.
    pub page: u64,
    /// Number of pages, not 0.
    pub pages: u64,
}

/// The run around `address`: inside the aligned window of `2^order` pages that holds the address,
/// inside the mapping, and inside one range.
pub fn batch_for(
    segments: &[Segment],
    mapping: &Mapping,
    address: u64,
    order: u32,
    page_shift: u32,
) -> Result<Batch, Misfit> {
    let Some(window) = 1u64.checked_shl(order.saturating_add(page_shift)) else {
        return Err(Misfit::Order);
    };
    if address < mapping.start || address >= mapping.end {
        return Err(Misfit::Outside);
    }
    let page = mapping
        .page_offset
        .checked_add((address - mapping.start) >> page_shift)
        .ok_or(Misfit::Outside)?;
    let place = ranges::find(segments, page).ok_or(Misfit::Outside)?;
    let before = page.saturating_sub(ranges::begin_of(segments, place.segment));

    let window_start = address & !(window - 1);
    let window_end = window_start.saturating_add(window);
    let range_start = address.saturating_sub(bytes(before, page_shift));
    let range_end = address.saturating_add(bytes(place.run, page_shift));
    let first = window_start.max(mapping.start).max(range_start);
    let end = window_end.min(mapping.end).min(range_end);
    Ok(Batch {
        address: first,
        page: place.page.saturating_sub((address - first) >> page_shift),
        pages: end.saturating_sub(first) >> page_shift,
    })
}

/// The bytes of so many pages, at most `u64::MAX`.
fn bytes(pages: u64, page_shift: u32) -> u64 {
    let size = 1u64.checked_shl(page_shift).unwrap_or(u64::MAX);
    pages.saturating_mul(size)
}
