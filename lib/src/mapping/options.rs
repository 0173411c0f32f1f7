//! How to map.

use std::ops::Bound;
use std::ops::RangeBounds;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::GuardedMapping;
use super::Mapping;
use super::ScratchMapping;
use crate::Error;
use crate::Lease;
use crate::Result;
use crate::error::Object;
use crate::sys::memory::Area;
use crate::sys::memory::Request;
use crate::sys::memory::Residue;
use crate::sys::memory::gigantic;
use crate::sys::memory::huge;

/// Options of a mapping: which bytes, and whether for writing.
///
/// By default all of the lease, writable if the lease is, at an address that lets the kernel use
/// huge page-table entries (2 MiB, with pages of 4 KiB; 1 GiB on x86-64) where the range allows it.
///
/// # Examples
///
/// ```no_run
/// # fn example(lease: &barlease::Lease) -> barlease::Result<()> {
/// let status = barlease::MapOptions::new()
///     .range(0x10000..0x12000)
///     .read_only()
///     .map(lease)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MapOptions {
    range: (Bound<u64>, Bound<u64>),
    read_only: bool,
    any_address: bool,
}

/// Something that can be mapped.
pub(crate) struct Source<'a> {
    /// The file.
    pub(crate) fd: BorrowedFd<'a>,
    /// Where in the file offset 0 of the lease or BAR is.
    pub(crate) file_offset: u64,
    /// Bytes that can be mapped.
    pub(crate) size: u64,
    /// Whether it can be mapped for writing.
    pub(crate) writable: bool,
    /// For errors.
    pub(crate) object: Object,
    /// The ranges of the BAR that make it up, where known: the kernel needs addresses congruent
    /// with these, not with offsets in the lease. None is one that starts where the BAR does.
    pub(crate) ranges: &'a [crate::BarRange],
    /// Sorts the errnos that mean something of their own here.
    pub(crate) explain: fn(&'static str, Object, Errno) -> Error,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl MapOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self {
            range: (Bound::Unbounded, Bound::Unbounded),
            read_only: false,
            any_address: false,
        }
    }

    /// Map only these bytes of the lease. Both ends are multiples of the page size.
    #[must_use]
    pub fn range(mut self, range: impl RangeBounds<u64>) -> Self {
        self.range = (range.start_bound().cloned(), range.end_bound().cloned());
        self
    }

    /// Map for reading only, even if the lease is writable.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Take any address, without care for large page-table entries.
    #[must_use]
    pub fn any_address(mut self) -> Self {
        self.any_address = true;
        self
    }

    /// Maps a lease.
    ///
    /// Errors: [`Error::Dead`] (`ENODEV`), [`Error::Unsupported`] (`EINVAL`: an exporter that
    /// cannot be mapped, such as stock vfio-pci's), [`Error::Denied`], [`Error::Invalid`] for a
    /// range that is empty, not page aligned or past the end. A lease that is revoked for a time
    /// can be mapped; touching it raises SIGBUS.
    pub fn map(&self, lease: &Lease) -> Result<Mapping> {
        self.map_source(&lease.source()?)
    }

    /// Maps a lease so that losing it is an error and not a signal; see [`GuardedMapping`].
    ///
    /// Errors as for [`MapOptions::map`]; [`Error::Busy`] if others have installed SIGBUS handlers
    /// over the guard's more than a dozen times, [`Error::Unsupported`] on a CPU that is neither
    /// x86-64 nor aarch64.
    pub fn map_guarded(&self, lease: &Lease) -> Result<GuardedMapping> {
        self.map_source_guarded(&lease.source()?)
    }

    /// Maps a lease for code that accesses it by its address, so that losing it does not end the
    /// process; see [`ScratchMapping`].
    ///
    /// Errors as for [`MapOptions::map_guarded`].
    pub fn map_scratch(&self, lease: &Lease) -> Result<ScratchMapping> {
        let source = lease.source()?;
        ScratchMapping::new(self.request(&source)?, &source)
    }

    pub(crate) fn map_source(&self, source: &Source<'_>) -> Result<Mapping> {
        let request = self.request(source)?;
        let area = Area::map(source.fd, request)
            .map_err(|errno| (source.explain)("map", source.object.clone(), errno))?;
        let offset = request.offset - source.file_offset;
        Ok(Mapping::new(area, offset, request.writable))
    }

    pub(crate) fn map_source_guarded(&self, source: &Source<'_>) -> Result<GuardedMapping> {
        super::guarded::arm(source)?;
        self.map_source(source).map(GuardedMapping::new)
    }

    fn request(&self, source: &Source<'_>) -> Result<Request> {
        let invalid = |reason: String| Error::invalid("map", source.object.clone(), reason);
        let start = match self.range.0 {
            Bound::Included(start) => start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match self.range.1 {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => end,
            Bound::Unbounded => source.size,
        };
        let page = rustix::param::page_size() as u64;
        if start >= end {
            return Err(invalid(format!("the range {start:#x}..{end:#x} is empty")));
        }
        // The last page of a BAR that is smaller than a page is all there is.
        let whole = start == 0 && end == source.size;
        if start % page != 0 || (end % page != 0 && !whole) {
            return Err(invalid(format!(
                "the range {start:#x}..{end:#x} is not aligned to pages of {page:#x} bytes"
            )));
        }
        if end > source.size {
            return Err(invalid(format!(
                "the range {start:#x}..{end:#x} goes past the end, {:#x}",
                source.size
            )));
        }
        Ok(Request {
            offset: source
                .file_offset
                .checked_add(start)
                .ok_or_else(|| invalid("the offset overflows".to_owned()))?,
            length: usize::try_from(end - start)
                .map_err(|_| invalid("the range is larger than the address space".to_owned()))?,
            writable: source.writable && !self.read_only,
            residue: (!self.any_address)
                .then(|| {
                    let sizes = [gigantic(), Some(huge())].into_iter().flatten();
                    sizes.into_iter().find_map(|modulus| {
                        let value = residue(modulus as u64, source.ranges, start, end)?;
                        Some(Residue { value, modulus })
                    })
                })
                .flatten(),
        })
    }
}

/// Where to place bytes `start..end` of a lease so that `huge` bytes of it can be one page-table
/// entry: the address modulo `huge`. `None` if no placement helps.
///
/// An entry needs an address and a BAR offset that are both multiples of its size. (A BAR is
/// aligned to its size, so its offsets and its bus addresses agree, as far as it has that much at
/// all.) The first range that holds such a piece decides.
fn residue(huge: u64, ranges: &[crate::BarRange], start: u64, end: u64) -> Option<usize> {
    let whole = [crate::BarRange {
        offset: 0,
        length: end,
    }];
    let ranges = if ranges.is_empty() { &whole } else { ranges };

    // Where in the lease the range begins.
    let mut begin = 0u64;
    for range in ranges {
        let next = begin.checked_add(range.length)?;
        let from = begin.max(start);
        let to = next.min(end);
        if from < to {
            let bar = range.offset.checked_add(from - begin)?;
            let aligned = bar.checked_next_multiple_of(huge)?;
            if aligned - bar + huge <= to - from {
                return usize::try_from(bar.wrapping_sub(from - start) % huge).ok();
            }
        }
        begin = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BarRange;

    const MIB: u64 = 1 << 20;

    fn ranges(list: &[(u64, u64)]) -> Vec<BarRange> {
        list.iter()
            .map(|&(offset, length)| BarRange { offset, length })
            .collect()
    }

    #[test]
    fn placement_is_congruent_with_the_bar() {
        // Unknown ranges: the lease is taken to start aligned.
        assert_eq!(residue(2 * MIB, &[], 0, 2 * MIB), Some(0));
        assert_eq!(residue(2 * MIB, &[], MIB, 4 * MIB), Some(MIB as usize));
        // With pages of 16 KiB.
        assert_eq!(residue(32 * MIB, &[], MIB, 4 * MIB), None);
        assert_eq!(residue(32 * MIB, &[], MIB, 64 * MIB), Some(MIB as usize));
        // A lease that starts in the middle of 2 MiB.
        let off = ranges(&[(MIB, 4 * MIB)]);
        assert_eq!(residue(2 * MIB, &off, 0, 4 * MIB), Some(MIB as usize));
        // 3 MiB around one boundary only: no whole 2 MiB piece.
        let around = ranges(&[(MIB, 2 * MIB)]);
        assert_eq!(residue(2 * MIB, &around, 0, 2 * MIB), None);
    }

    #[test]
    fn the_first_range_with_a_whole_piece_decides() {
        let list = ranges(&[(0, 4096), (8 * MIB, 2 * MIB)]);
        let expected = (8 * MIB).wrapping_sub(4096) % (2 * MIB);
        assert_eq!(
            residue(2 * MIB, &list, 0, 2 * MIB + 4096),
            Some(expected as usize)
        );
    }

    #[test]
    fn short_mappings_are_placed_anywhere() {
        assert_eq!(residue(2 * MIB, &[], 0, 4096), None);
        assert_eq!(residue(2 * MIB, &[], 0, MIB), None);
    }
}
