// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Ranges of a BAR: validation, and the look-up from an offset in a buffer to a page.
//!
//! A buffer is the concatenation of its ranges. It is kept as one [`Segment`] a range with prefix
//! sums, so that a look-up is a binary search. Units: everything that comes from user space is in
//! bytes; segments count pages. No address is kept: pages are counted from the beginning of the
//! BAR, and only the code that makes a page-table entry or a DMA mapping adds where that is.

/// Why a list of ranges is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// A length is 0.
    Empty,
    /// An offset or a length is not a multiple of the page size.
    Unaligned,
    /// The sum of the lengths overflows, or reaches into the bit that the DMA API keeps for itself.
    TooLong,
    /// Offset plus BAR address overflows.
    AddressOverflow,
    /// A range ends past the end of the BAR.
    PastEnd,
}

/// Top bit of a size in the DMA API (`DMA_IOVA_USE_SWIOTLB`, `include/linux/dma-mapping.h`).
const SIZE_RESERVED_BIT: u64 = 1 << 63;

/// Whether `[a, a + a_len)` and `[b, b + b_len)` share a byte. Sums past the end of `u64` saturate.
pub fn overlaps(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    a_len != 0 && b_len != 0 && a < b.saturating_add(b_len) && b < a.saturating_add(a_len)
}

/// A BAR: physical address and length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// CPU physical address of its first byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

impl Bar {
    /// The physical address of a range of this BAR.
    pub fn place(&self, offset: u64, length: u64) -> Result<u64, RangeError> {
        let address = self
            .start
            .checked_add(offset)
            .ok_or(RangeError::AddressOverflow)?;
        let end = address
            .checked_add(length)
            .ok_or(RangeError::AddressOverflow)?;
        // As differences: the BAR itself may end at the very end of the address space.
        if end - self.start > self.length {
            return Err(RangeError::PastEnd);
        }
        Ok(address)
    }
}

/// Whether `count` pages from `page` on, at least one, are among the first `pages` pages of a BAR.
#[inline]
pub fn holds(pages: u64, page: u64, count: u64) -> bool {
    count != 0 && pages.checked_sub(count).is_some_and(|last| page <= last)
}

/// One range of a buffer, in pages.
///
/// # Invariants of a list of segments
///
/// `end` is strictly increasing; segment `i` holds the pages `ends[i - 1]..ends[i]` of the buffer
/// (from 0 for the first), which are the pages of the BAR from `page` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The page of the buffer after the last of this segment.
    pub end: u64,
    /// The page of the BAR that is the first one.
    pub page: u64,
}

/// Ranges of a BAR, one after the other, as they become the segments of a buffer.
///
/// Mistakes in the shape of any range, then in the sum, come before mistakes in
/// the place of one: the stock exporter looks at all shapes first. One pass does both, since a
/// range that is out of place is only remembered.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    bar: Bar,
    page_shift: u32,
    /// Bytes of the BAR whose address, and the one after it, are addresses.
    reach: u64,
    /// Pages so far, or more than any buffer has.
    pages: u64,
    misplaced: Option<RangeError>,
}

impl Placement {
    /// No ranges yet. Pages have `2^page_shift` bytes, fewer than 2^64.
    pub fn new(bar: Bar, page_shift: u32) -> Self {
        Self {
            bar,
            page_shift: page_shift & (u64::BITS - 1),
            reach: bar.length.min(u64::MAX - bar.start),
            pages: 0,
            misplaced: None,
        }
    }

    /// The segment of the next range. It counts for nothing when [`Self::finish`] fails.
    #[inline]
    pub fn next(&mut self, offset: u64, length: u64) -> Result<Segment, RangeError> {
        if length == 0 {
            return Err(RangeError::Empty);
        }
        let in_page = (1u64 << self.page_shift) - 1;
        if (offset | length) & in_page != 0 {
            return Err(RangeError::Unaligned);
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.reach => {}
            _ => self.misplace(offset, length),
        }
        self.pages = self.pages.saturating_add(length >> self.page_shift);
        Ok(Segment {
            end: self.pages,
            page: offset >> self.page_shift,
        })
    }

    #[cold]
    fn misplace(&mut self, offset: u64, length: u64) {
        if self.misplaced.is_none() {
            self.misplaced = self.bar.place(offset, length).err();
        }
    }

    /// The length of the buffer in bytes.
    pub fn finish(self) -> Result<u64, RangeError> {
        if self.pages >= SIZE_RESERVED_BIT >> self.page_shift {
            return Err(RangeError::TooLong);
        }
        match self.misplaced {
            Some(error) => Err(error),
            None => Ok(self.pages << self.page_shift),
        }
    }
}

/// Where a page of a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the segment.
    pub segment: usize,
    /// The page of the BAR.
    pub page: u64,
    /// Pages from here to the end of the segment, this one included.
    pub run: u64,
}

/// Finds page `page` of a buffer; `None` past its end. O(log n).
///
/// The sums saturate only where `segments` breaks its invariants: the result is wrong then, but
/// nothing panics.
pub fn find(segments: &[Segment], page: u64) -> Option<Place> {
    let segment = segments.partition_point(|s| s.end <= page);
    let found = segments.get(segment)?;
    let begin = begin_of(segments, segment);
    Some(Place {
        segment,
        page: found.page.saturating_add(page.saturating_sub(begin)),
        run: found.end.saturating_sub(page),
    })
}

/// The page of the buffer at which segment `index` begins.
pub fn begin_of(segments: &[Segment], index: usize) -> u64 {
    match index.checked_sub(1).and_then(|before| segments.get(before)) {
        Some(before) => before.end,
        None => 0,
    }
}

/// A mapping of a buffer into an address space. Addresses in bytes, page aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last byte.
    pub end: u64,
    /// Page of the buffer that `start` maps.
    pub page_offset: u64,
}

/// Why a fault cannot be served with an entry of the order asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// An entry of this order would leave the mapping or the range, or is not aligned: a smaller
    /// one may do.
    Order,
    /// The address is outside the mapping or the buffer.
    Outside,
}

/// The first page of the BAR for a page-table entry of `2^order` pages that covers `address`.
///
/// Such an entry lies inside the mapping and inside one range, and its frame number is a multiple
/// of `2^order`: it never spans two ranges, even if they touch. `first_frame` is the frame number
/// of the BAR's first page, which may be less aligned than the entry.
pub fn entry_for(
    segments: &[Segment],
    mapping: &Mapping,
    address: u64,
    order: u32,
    page_shift: u32,
    first_frame: u64,
) -> Result<u64, Misfit> {
    let Some(entry_size) = 1u64.checked_shl(order.saturating_add(page_shift)) else {
        return Err(Misfit::Order);
    };
    if address < mapping.start || address >= mapping.end {
        return Err(Misfit::Outside);
    }
    let first = address & !(entry_size - 1);
    let last = first.checked_add(entry_size - 1).ok_or(Misfit::Order)?;
    if first < mapping.start || last >= mapping.end {
        return Err(Misfit::Order);
    }
    let page = mapping
        .page_offset
        .checked_add((first - mapping.start) >> page_shift)
        .ok_or(Misfit::Outside)?;
    let place = find(segments, page).ok_or(Misfit::Outside)?;
    let pages = 1u64 << order;
    if place.run < pages || first_frame.wrapping_add(place.page) & (pages - 1) != 0 {
        return Err(Misfit::Order);
    }
    Ok(place.page)
}

/// Pages of a BAR that are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub page: u64,
    /// How many.
    pub pages: u64,
}

/// The segments as runs of pages of the BAR, those that touch as one.
pub fn runs(segments: &[Segment]) -> impl Iterator<Item = Run> + Clone + '_ {
    let mut index = 0;
    core::iter::from_fn(move || {
        let first = segments.get(index)?;
        let begin = begin_of(segments, index);
        let mut end = first.end;
        index += 1;
        while let Some(next) = segments.get(index) {
            if next.page != first.page.saturating_add(end.saturating_sub(begin)) {
                break;
            }
            end = next.end;
            index += 1;
        }
        Some(Run {
            page: first.page,
            pages: end.saturating_sub(begin),
        })
    })
}
