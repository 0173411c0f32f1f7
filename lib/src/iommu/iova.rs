//! Which I/O virtual addresses are free.

use std::collections::BTreeMap;

use super::IovaRange;

/// Hands out addresses, lowest first. It knows which are used; the IOMMU says which are allowed.
#[derive(Debug, Default)]
pub(super) struct Iovas {
    /// First address and last address of what is used. They do not overlap.
    used: BTreeMap<u64, u64>,
}

impl Iovas {
    /// Takes `length` bytes, aligned to `align`, in one of the `allowed` ranges.
    pub(super) fn take(&mut self, allowed: &[IovaRange], length: u64, align: u64) -> Option<u64> {
        let span = length.checked_sub(1)?;
        let mut best: Option<u64> = None;
        for range in allowed {
            // Address 0 is what a register holds that nobody has set.
            let mut at = range.first.max(align).checked_next_multiple_of(align);
            while let Some(first) = at {
                let fits = first.checked_add(span).filter(|last| *last <= range.last);
                let Some(last) = fits else { break };
                match self.overlapping(first, last) {
                    None => {
                        best = Some(best.map_or(first, |best| best.min(first)));
                        break;
                    }
                    Some(used) => {
                        at = used
                            .checked_add(1)
                            .and_then(|next| next.checked_next_multiple_of(align));
                    }
                }
            }
        }
        let first = best?;
        self.used.insert(first, first + span);
        Some(first)
    }

    /// Takes these bytes, if they are free.
    pub(super) fn take_at(&mut self, first: u64, length: u64) -> bool {
        let last = length
            .checked_sub(1)
            .and_then(|span| first.checked_add(span));
        let Some(last) = last else { return false };
        if self.overlapping(first, last).is_some() {
            return false;
        }
        self.used.insert(first, last);
        true
    }

    /// Gives back what begins there.
    pub(super) fn give(&mut self, first: u64) {
        self.used.remove(&first);
    }

    /// The last address of something used that overlaps `first..=last`.
    fn overlapping(&self, first: u64, last: u64) -> Option<u64> {
        let (_, end) = self.used.range(..=last).next_back()?;
        (*end >= first).then_some(*end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange { first, last }
    }

    #[test]
    fn the_lowest_address_that_fits_is_taken_but_never_0() {
        let mut iovas = Iovas::default();
        let allowed = [range(0, 0x2fff), range(0x10000, u64::MAX)];
        let mut take = |length| iovas.take(&allowed, length, 0x1000);
        assert_eq!(take(0x1000), Some(0x1000));
        assert_eq!(take(0x2000), Some(0x10000));
        assert_eq!(take(0x1000), Some(0x2000));
        assert_eq!(take(0), None);
        assert_eq!(take(u64::MAX), None);
        iovas.give(0x10000);
        assert_eq!(iovas.take(&allowed, 0x1000, 0x1000), Some(0x10000));
    }

    #[test]
    fn the_end_of_the_address_space_can_be_taken() {
        let mut iovas = Iovas::default();
        let allowed = [range(u64::MAX - 0xfff, u64::MAX)];
        assert_eq!(iovas.take(&allowed, 0x1000, 0x1000), Some(u64::MAX - 0xfff));
        assert_eq!(iovas.take(&allowed, 0x1000, 0x1000), None);
        assert!(!iovas.take_at(u64::MAX, 1));
        assert!(!iovas.take_at(u64::MAX, 2));
    }

    proptest! {
        #[test]
        fn what_is_handed_out_is_allowed_aligned_and_disjoint(
            steps in proptest::collection::vec((any::<bool>(), 1u64..9, 0u32..4), 1..200),
        ) {
            let allowed = [range(0, 0xffff), range(0x2_0000, 0x2_ffff)];
            let mut iovas = Iovas::default();
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (give, pages, shift) in steps {
                if give && !taken.is_empty() {
                    let (at, _) = taken.swap_remove(pages as usize % taken.len());
                    iovas.give(at);
                    continue;
                }
                let (length, align) = (pages * 0x1000, 0x1000 << shift);
                let free = |at: u64| {
                    let apart = |(start, len): &(u64, u64)| at + length <= *start || start + len <= at;
                    at > 0 && taken.iter().all(apart)
                };
                let possible = allowed.iter().any(|range| {
                    (range.first..=range.last)
                        .step_by(0x1000)
                        .any(|at| at % align == 0 && at + length - 1 <= range.last && free(at))
                });
                match iovas.take(&allowed, length, align) {
                    None => prop_assert!(!possible),
                    Some(at) => {
                        prop_assert!(free(at) && at % align == 0);
                        let last = at + length - 1;
                        prop_assert!(allowed.iter().any(|r| r.first <= at && last <= r.last));
                        taken.push((at, length));
                    }
                }
            }
        }
    }
}
