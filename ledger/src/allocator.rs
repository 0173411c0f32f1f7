//! Which units of a pool are in use.
//!
//! A bit a unit, and a bit for each word of those that is full. No lease is ever moved, so there is
//! no compaction.

/// A run of units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// The first unit.
    pub first: u64,
    /// How many; not 0 in what an allocator answers.
    pub count: u64,
}

impl Run {
    fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// Units in use.
///
/// # Invariants
///
/// - `free` is the number of clear bits of `used` below `units`; bits from `units` on are set.
/// - A bit of `full` is set exactly if the word of `used` with that index has no clear bit; bits
///   beyond the last word are set.
/// - `cursor <= units`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Allocator {
    units: u64,
    free: u64,
    cursor: u64,
    used: Vec<u64>,
    full: Vec<u64>,
}

/// Bits of a word.
const WORD: u64 = u64::BITS as u64;

/// Most units of an allocator: 2 MiB of bits. A BAR of 64 GiB has so many pages.
pub const MAX_UNITS: u64 = 1 << 24;

/// The bits of word `index` that lie in `run`.
fn mask(run: Run, index: u64) -> u64 {
    let begin = run.first.saturating_sub(index * WORD).min(WORD);
    let end = run.end().saturating_sub(index * WORD).min(WORD);
    let below = |bit: u64| match bit {
        WORD.. => u64::MAX,
        _ => (1 << bit) - 1,
    };
    below(end) & !below(begin)
}

impl Allocator {
    /// All units are free. More than [`MAX_UNITS`] are not made.
    #[must_use]
    pub fn new(units: u64) -> Self {
        let units = units.min(MAX_UNITS);
        let words = units.div_ceil(WORD);
        let mut new = Self {
            units,
            free: units,
            cursor: 0,
            used: vec![0; words as usize],
            full: vec![0; words.div_ceil(WORD) as usize],
        };
        let tail = Run {
            first: units,
            count: words * WORD - units,
        };
        if tail.count != 0 {
            new.used[words as usize - 1] |= mask(tail, words - 1);
        }
        let beyond = Run {
            first: words,
            count: new.full.len() as u64 * WORD - words,
        };
        if let Some(last) = new.full.last_mut() {
            *last |= mask(beyond, words.div_ceil(WORD) - 1);
        }
        new
    }

    /// All units.
    #[must_use]
    pub fn units(&self) -> u64 {
        self.units
    }

    /// Units that are free.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Whether no unit of the run is in use, and all are units of this pool.
    #[must_use]
    pub fn is_free(&self, run: Run) -> bool {
        run.count == 0
            || (run.end() <= self.units
                && self.next(run.first, true).is_none_or(|at| at >= run.end()))
    }

    /// Takes the run if it is free.
    pub fn take(&mut self, run: Run) -> bool {
        let free = self.is_free(run);
        if free {
            self.set(run, true);
        }
        free
    }

    /// Marks all units of the run as used that are units of this pool, whether they are free or
    /// not.
    pub fn occupy(&mut self, run: Run) {
        self.set(self.clipped(run), true);
    }

    /// Marks all units of the run as free that are units of this pool.
    pub fn release(&mut self, run: Run) {
        self.set(self.clipped(run), false);
    }

    /// Takes any `count` units, as runs in ascending order from the one after the last that was
    /// taken, round to the beginning. `None`, and takes nothing, where not so many are free or they
    /// lie in more than `most_runs` runs.
    pub fn allocate(&mut self, count: u64, most_runs: usize) -> Option<Vec<Run>> {
        if count == 0 || count > self.free {
            return None;
        }
        let mut runs = Vec::new();
        let mut wanted = count;
        let mut at = self.cursor;
        let mut wrapped = false;
        while wanted > 0 {
            let Some(first) = self.next(at, false) else {
                if wrapped {
                    // `free` says that there are enough; this line keeps a wrong count from a loop.
                    return None;
                }
                wrapped = true;
                at = 0;
                continue;
            };
            let end = self.next(first, true).unwrap_or(self.units);
            let taken = Run {
                first,
                count: (end - first).min(wanted),
            };
            if runs.len() == most_runs {
                return None;
            }
            runs.push(taken);
            wanted -= taken.count;
            at = taken.end();
        }
        for run in &runs {
            self.set(*run, true);
        }
        self.cursor = at;
        runs.sort_unstable();
        merge(&mut runs);
        Some(runs)
    }

    /// Takes `count` units in one run: the first whose `first + offset` is a multiple of `align`,
    /// else the first of all. `None` exactly if there is no such run.
    pub fn allocate_run(&mut self, count: u64, align: u64, offset: u64) -> Option<Run> {
        if count == 0 || count > self.free {
            return None;
        }
        let run = self
            .first_run(count, align, offset)
            .or_else(|| self.first_run(count, 1, 0))?;
        self.set(run, true);
        Some(run)
    }

    /// Whether so many units are free in one run.
    #[must_use]
    pub fn has_run(&self, count: u64) -> bool {
        count != 0 && self.first_run(count, 1, 0).is_some()
    }

    fn first_run(&self, count: u64, align: u64, offset: u64) -> Option<Run> {
        let mut at = 0;
        loop {
            let free = self.next(at, false)?;
            let first = free
                .checked_add(offset)?
                .checked_next_multiple_of(align)?
                .checked_sub(offset)?;
            let run = Run { first, count };
            if run.end() > self.units {
                return None;
            }
            match self.next(first, true) {
                Some(used) if used < run.end() => at = used,
                _ => return Some(run),
            }
        }
    }

    /// The first unit from `from` on that is used, or that is free.
    fn next(&self, from: u64, used: bool) -> Option<u64> {
        if from >= self.units {
            return None;
        }
        let invert = if used { 0 } else { u64::MAX };
        let mut index = from / WORD;
        let mut word = (self.used[index as usize] ^ invert) & (u64::MAX << (from % WORD));
        while word == 0 {
            index += 1;
            if !used {
                index = self.next_not_full(index)?;
            }
            word = self.used.get(index as usize)? ^ invert;
        }
        let found = index * WORD + u64::from(word.trailing_zeros());
        (found < self.units).then_some(found)
    }

    /// The first word from `index` on that has a clear bit.
    fn next_not_full(&self, index: u64) -> Option<u64> {
        let mut at = index / WORD;
        let mut word = !self.full.get(at as usize)? & (u64::MAX << (index % WORD));
        while word == 0 {
            at += 1;
            word = !*self.full.get(at as usize)?;
        }
        Some(at * WORD + u64::from(word.trailing_zeros()))
    }

    fn clipped(&self, run: Run) -> Run {
        let first = run.first.min(self.units);
        Run {
            first,
            count: run.end().min(self.units) - first,
        }
    }

    /// The run lies in the pool.
    fn set(&mut self, run: Run, used: bool) {
        if run.count == 0 {
            return;
        }
        for index in run.first / WORD..=(run.end() - 1) / WORD {
            let word = &mut self.used[index as usize];
            let before = word.count_ones();
            let bits = mask(run, index);
            *word = if used { *word | bits } else { *word & !bits };
            let after = word.count_ones();
            self.free = self.free + u64::from(before) - u64::from(after);
            let full = &mut self.full[(index / WORD) as usize];
            let bit = 1 << (index % WORD);
            if *word == u64::MAX {
                *full |= bit;
            } else {
                *full &= !bit;
            }
        }
    }
}

/// Joins those that touch. They are sorted.
fn merge(runs: &mut Vec<Run>) {
    runs.dedup_by(|next, before| {
        let touch = before.end() == next.first;
        if touch {
            before.count += next.count;
        }
        touch
    });
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn bits(allocator: &Allocator) -> Vec<bool> {
        (0..allocator.units)
            .map(|unit| {
                !allocator.is_free(Run {
                    first: unit,
                    count: 1,
                })
            })
            .collect()
    }

    fn check_invariants(allocator: &Allocator) {
        let used = bits(allocator).iter().filter(|used| **used).count() as u64;
        assert_eq!(allocator.free + used, allocator.units);
        assert!(allocator.cursor <= allocator.units);
        for (index, word) in allocator.used.iter().enumerate() {
            let full = allocator.full[index / 64] >> (index % 64) & 1 == 1;
            assert_eq!(full, *word == u64::MAX, "word {index}");
        }
    }

    fn units_of(runs: &[Run]) -> Vec<u64> {
        runs.iter().flat_map(|run| run.first..run.end()).collect()
    }

    /// Whether some aligned run of `count` is free, told the slow way.
    fn has_run(used: &[bool], count: u64) -> bool {
        used.windows(count as usize)
            .any(|window| !window.contains(&true))
    }

    /// Every state of up to 7 units that any operations lead to, and every operation in each of
    /// them.
    #[test]
    fn in_every_state_of_a_small_pool_every_operation_does_what_it_says() {
        for units in 0..=7 {
            let mut seen = HashSet::new();
            let mut open = vec![Allocator::new(units)];
            while let Some(state) = open.pop() {
                if !seen.insert(state.clone()) {
                    continue;
                }
                check_invariants(&state);
                let before = bits(&state);
                for count in 0..=units + 1 {
                    for most_runs in [1, 2, 7] {
                        open.extend(any_units(&state, &before, count, most_runs));
                    }
                    for align in [1, 2, 4] {
                        for offset in 0..align {
                            open.extend(one_run(&state, &before, count, align, offset));
                        }
                    }
                    for first in 0..=units + 1 {
                        let run = Run { first, count };
                        let mut next = state.clone();
                        let free = first + count <= units
                            && !before[first as usize..(first + count) as usize].contains(&true);
                        assert_eq!(next.take(run), free || count == 0);
                        open.push(next);
                        let mut next = state.clone();
                        next.release(run);
                        let expected: Vec<_> = (0..units)
                            .map(|unit| {
                                before[unit as usize] && !(first..first + count).contains(&unit)
                            })
                            .collect();
                        assert_eq!(bits(&next), expected);
                        open.push(next);
                    }
                }
            }
            assert!(seen.len() as u64 >= 1 << units, "{} of {units}", seen.len());
        }
    }

    fn any_units(state: &Allocator, before: &[bool], count: u64, most: usize) -> Option<Allocator> {
        let mut next = state.clone();
        let Some(runs) = next.allocate(count, most) else {
            assert_eq!(&next, state, "a refusal takes nothing");
            assert!(
                count == 0 || count > state.free || most < 7,
                "refused though free"
            );
            return None;
        };
        assert!(runs.len() <= most.max(1));
        let units = units_of(&runs);
        assert_eq!(units.len() as u64, count);
        assert!(
            runs.windows(2).all(|pair| pair[0].end() < pair[1].first),
            "sorted and merged"
        );
        assert!(
            units.iter().all(|unit| !before[*unit as usize]),
            "none has two owners"
        );
        assert_eq!(next.free, state.free - count);
        Some(next)
    }

    fn one_run(
        state: &Allocator,
        before: &[bool],
        count: u64,
        align: u64,
        offset: u64,
    ) -> Option<Allocator> {
        let mut next = state.clone();
        let aligned = (0..before.len() as u64).any(|first| {
            (first + offset) % align == 0
                && count > 0
                && before
                    .get(first as usize..(first + count) as usize)
                    .is_some_and(|window| !window.contains(&true))
        });
        let Some(run) = next.allocate_run(count, align, offset) else {
            assert_eq!(&next, state);
            assert!(count == 0 || !has_run(before, count), "refused though free");
            return None;
        };
        assert_eq!(run.count, count);
        assert!(!before[run.first as usize..run.end() as usize].contains(&true));
        assert_eq!(
            (run.first + offset) % align == 0,
            aligned,
            "aligned where that can be"
        );
        Some(next)
    }

    proptest! {
        /// Across words, and words of words: never two owners, free and used are all, and what is
        /// rebuilt from who has what is the same.
        #[test]
        fn owners_never_share_and_a_rebuilt_map_is_the_same(
            units in 1u64..9000,
            steps in prop::collection::vec((0u8..4, 1u64..700, any::<prop::sample::Index>()), 1..60),
        ) {
            let mut allocator = Allocator::new(units);
            let mut owners: Vec<Vec<Run>> = Vec::new();
            for (kind, count, which) in steps {
                match kind {
                    0 => owners.extend(allocator.allocate(count, usize::MAX)),
                    1 => owners.extend(
                        allocator
                            .allocate_run(count, count.next_power_of_two(), 3)
                            .map(|run| vec![run]),
                    ),
                    2 => {
                        let run = Run { first: which.index(units as usize) as u64, count };
                        if allocator.take(run) {
                            owners.push(vec![run]);
                        }
                    }
                    _ if !owners.is_empty() => {
                        for run in owners.swap_remove(which.index(owners.len())) {
                            allocator.release(run);
                        }
                    }
                    _ => {}
                }
                let mut all: Vec<_> = owners.iter().flat_map(|runs| units_of(runs)).collect();
                let held = all.len() as u64;
                all.sort_unstable();
                all.dedup();
                prop_assert_eq!(all.len() as u64, held, "two owners");
                prop_assert_eq!(allocator.free() + held, units);
            }
            check_invariants(&allocator);
            let mut rebuilt = Allocator::new(units);
            for run in owners.iter().flatten() {
                rebuilt.occupy(*run);
            }
            rebuilt.cursor = allocator.cursor;
            prop_assert_eq!(rebuilt, allocator);
        }
    }
}
