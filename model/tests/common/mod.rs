// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Pages and segments, for tests of ranges.

use barlease_model::ranges::Segment;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const SHIFT: u32 = 12;

/// The segments of ranges given as (first page of the BAR, pages).
pub(crate) fn segments(ranges: &[(u64, u64)]) -> Vec<Segment> {
    let mut end = 0;
    let segment = |&(page, pages): &(u64, u64)| {
        end += pages;
        Segment { end, page }
    };
    ranges.iter().map(segment).collect()
}
