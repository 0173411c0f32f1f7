//! The MSI-X table, and the pages of a BAR that have nothing of it.

use super::Capability;
use super::ConfigSpace;
use super::Msix;
use super::Status;
use super::chain::END;
use super::chain::walk;
use crate::BarRange;
use crate::Result;

impl ConfigSpace<'_> {
    /// The parts of a BAR of `size` bytes that have no page in common with the MSI-X table or its
    /// pending bits.
    pub(crate) fn exportable_ranges(&self, bar: u32, size: u64) -> Result<Vec<BarRange>> {
        let msix = self.msix()?;
        Ok(Msix::leaves(msix.as_ref(), bar, size))
    }
}

impl Msix {
    /// `registers`: where the table and the pending bits are.
    pub(super) fn decode(offset: u16, control: u16, registers: [u32; 2]) -> Self {
        let vectors = (control & 0x7ff) + 1;
        let place = |register: u32, length| {
            let range = BarRange {
                offset: u64::from(register & !0b111),
                length,
            };
            ((register & 0b111) as u8, range)
        };
        let [table, pending] = registers;
        Self {
            offset,
            vectors,
            table: place(table, u64::from(vectors) * 16),
            // A bit a vector, in words of 64.
            pending: place(pending, u64::from(vectors).div_ceil(64) * 8),
            enabled: control & 1 << 15 != 0,
            masked: control & 1 << 14 != 0,
        }
    }

    /// That in the bytes of config space. The outer `None`: they do not tell, since only the header
    /// may be read, or the device is gone.
    pub(crate) fn of_bytes(config: &[u8]) -> Option<Option<Self>> {
        let byte = |at: u16| config.get(usize::from(at)).copied();
        let word = |at: u16| Some(u16::from_le_bytes([byte(at)?, byte(at + 1)?]));
        let long = |at: u16| Some(u32::from(word(at)?) | u32::from(word(at + 2)?) << 16);
        if config.len() < usize::from(END) || byte(0) == Some(0xff) && byte(1) == Some(0xff) {
            return None;
        }
        let first = match word(0x06)? & Status::CAPABILITIES.bits() {
            0 => return Some(None),
            _ => byte(0x34)?,
        };
        // All of it is there, so nothing fails but the chain.
        let list = walk(first, |at| {
            Ok([byte(at).unwrap_or(0), byte(at + 1).unwrap_or(0)])
        });
        let its = |one: &Capability| one.id == Capability::MSIX;
        let Some(at) = list.ok()??.into_iter().find(its).map(|it| it.offset) else {
            return Some(None);
        };
        let registers = [long(at + 4)?, long(at + 8)?];
        Some(Some(Self::decode(at, word(at + 2)?, registers)))
    }

    /// The parts of a BAR of `size` bytes that have no page in common with the table or its pending
    /// bits.
    pub(crate) fn leaves(msix: Option<&Self>, bar: u32, size: u64) -> Vec<BarRange> {
        let page = rustix::param::page_size() as u64;
        let taken: Vec<BarRange> = msix
            .into_iter()
            .flat_map(|msix| [msix.table, msix.pending])
            .filter(|(its, _)| u32::from(*its) == bar)
            .map(|(_, range)| range)
            .collect();
        around(size, page, &taken)
    }
}

/// The whole pages of `size` bytes without those that `taken` touches.
fn around(size: u64, page: u64, taken: &[BarRange]) -> Vec<BarRange> {
    let end = size - size % page;
    let mut holes: Vec<(u64, u64)> = taken
        .iter()
        .map(|range| {
            let last = range.offset.saturating_add(range.length);
            let from = range.offset - range.offset % page;
            (from, last.checked_next_multiple_of(page).unwrap_or(end))
        })
        .collect();
    holes.sort_unstable();
    let mut ranges = Vec::new();
    let mut at = 0;
    for (from, to) in holes.into_iter().chain([(end, end)]) {
        let from = from.min(end);
        if from > at {
            ranges.push(BarRange {
                offset: at,
                length: from - at,
            });
        }
        at = at.max(to);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(offset: u64, length: u64) -> BarRange {
        BarRange { offset, length }
    }

    #[test]
    fn pages_of_the_table_are_left_out() {
        assert_eq!(around(0x4000, 0x1000, &[]), [range(0, 0x4000)]);
        let table = [range(0x2000, 0x410), range(0x3000, 8)];
        assert_eq!(around(0x4000, 0x1000, &table), [range(0, 0x2000)]);
        assert_eq!(
            around(0x8000, 0x1000, &[range(0x1ff0, 0x20)]),
            [range(0, 0x1000), range(0x3000, 0x5000)]
        );
        assert_eq!(around(0x1000, 0x1000, &[range(0x800, 16)]), []);
        assert_eq!(around(0x100, 0x1000, &[]), []);
        // A table that is said to be past the end, and one that overflows.
        assert_eq!(
            around(0x1000, 0x1000, &[range(0x9000, 16)]),
            [range(0, 0x1000)]
        );
        assert_eq!(
            around(0x2000, 0x1000, &[range(0x1000, u64::MAX)]),
            [range(0, 0x1000)]
        );
    }

    proptest! {
        #[test]
        fn what_can_be_exported_touches_no_table(
            size in 0u64..0x2_0000,
            taken in proptest::collection::vec((0u64..0x2_0000, 1u64..0x3000), 0..4),
        ) {
            let taken: Vec<_> = taken.into_iter().map(|(at, len)| range(at, len)).collect();
            let free = around(size, 0x1000, &taken);
            for page in 0..size / 0x1000 {
                let at = page * 0x1000;
                let next = at + 0x1000;
                let end = |one: &BarRange| one.offset + one.length;
                let used = taken.iter().any(|one| one.offset < next && at < end(one));
                let listed = free.iter().any(|one| one.offset <= at && next <= end(one));
                prop_assert_eq!(used, !listed, "page {:#x}", at);
            }
            for one in &free {
                prop_assert!(one.offset + one.length <= size && one.length > 0);
                prop_assert_eq!((one.offset | one.length) % 0x1000, 0);
            }
        }
    }
}
