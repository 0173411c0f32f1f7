//! Which bytes of a pool who may have, by how it is shared.

use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::ops;
use std::sync::Arc;

use rangemap::RangeMap;
use rangemap::RangeSet;

use super::Slot;
use crate::allocator::Allocator;
use crate::allocator::MAX_UNITS;
use crate::allocator::Run;
use crate::policy::Overlap;
use crate::policy::Policy;
use crate::policy::Pool;
use crate::policy::Subject;
use crate::types::Access;
use crate::types::Ask;
use crate::types::ConnectionId;
use crate::types::MAX_RANGES;
use crate::types::Range;
use crate::types::RequestId;
use crate::types::Time;
use crate::types::What;

/// A request in line.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(super) struct Waiter {
    pub(super) connection: ConnectionId,
    pub(super) request: RequestId,
    /// The subject whose share of the line it takes.
    pub(super) share: Subject,
    /// The subject whose leases are its own.
    pub(super) owner: Subject,
    pub(super) ask: Ask,
    pub(super) deadline: Time,
    /// Whether it stands aside: leases of its own, or some whose revocation hangs, are in its way,
    /// so that nobody else can make room for it. `None`: to be found out, since these leases or the
    /// pool have changed.
    pub(super) aside: Option<bool>,
}

impl Waiter {
    /// Ranges that it names.
    pub(super) fn ranges(&self) -> usize {
        match &self.ask.what {
            What::Pool { .. } => 0,
            What::Ranges { ranges, .. } => ranges.len(),
        }
    }
}

/// A pool that is, or was when leases of today were granted.
///
/// # Invariants
///
/// - `map` is `Some` exactly if the policy has the pool and its device is open.
/// - `placed` has each range of each lease that was granted of this pool: its offset, and the
///   lease's slot.
/// - In `map` a unit is free exactly if no lease of the device has a byte of it that excludes
///   others, and it is not reserved. If `loose`, a lease is not counted there by units of its own:
///   when one ends the map is made anew.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(super) struct PoolState {
    pub(super) name: Arc<str>,
    /// Place in the policy.
    pub(super) place: Option<usize>,
    pub(super) map: Option<Map>,
    pub(super) loose: bool,
    /// Whether the map is to be made anew before anybody is served.
    pub(super) stale: bool,
    /// Whether the map, the device or the policy is another one since the line was last served:
    /// all in line are looked at, and not only the first.
    pub(super) afresh: bool,
    pub(super) placed: BTreeSet<(u64, Slot)>,
    /// Leases whose revocation hangs.
    pub(super) hung: BTreeSet<Slot>,
    pub(super) queue: VecDeque<Waiter>,
}

impl PoolState {
    pub(super) fn new(name: Arc<str>) -> Self {
        Self {
            name,
            place: None,
            map: None,
            loose: false,
            stale: false,
            afresh: false,
            placed: BTreeSet::new(),
            hung: BTreeSet::new(),
            queue: VecDeque::new(),
        }
    }

    /// Forgets which requests stand aside, so that each is looked at anew.
    pub(super) fn look_for_room(&mut self) {
        for waiter in &mut self.queue {
            waiter.aside = None;
        }
    }

    pub(super) fn is_exclusive(&self, policy: &Policy) -> bool {
        let written = self.place.and_then(|place| policy.pools().get(place));
        written.is_some_and(|pool| pool.overlap == Overlap::Exclusive) && !self.loose
    }
}

/// A demand for units of a pool.
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    /// So many units, wherever.
    Units(u64),
    /// These, in this order.
    Named(Vec<Run>),
}

/// The units of a pool.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
pub(super) struct Map {
    at: u64,
    unit: u64,
    contiguous: bool,
    overlap: Overlap,
    /// Units that may not be leased now: reserved, or of a lease that excludes others.
    used: Allocator,
    /// Units that may never be leased.
    reserved: Allocator,
    /// How many leases for reading have a unit, where that is counted. Not by unit: a pool may have
    /// millions.
    readers: RangeMap<u64, u32>,
}

/// Units that those further ahead in line have named, and nobody behind them gets.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept {
    units: RangeSet<u64>,
    /// Units in use and units that are kept, once somebody wants any units at all.
    taken: Option<Allocator>,
}

impl Kept {
    pub(super) fn add(&mut self, runs: &[Run]) {
        for run in runs {
            self.units.insert(units(*run));
            if let Some(taken) = &mut self.taken {
                taken.occupy(*run);
            }
        }
    }

    fn has(&self, run: Run) -> bool {
        self.units.overlaps(&units(run))
    }
}

/// As the range that it is.
fn units(run: Run) -> ops::Range<u64> {
    run.first..run.first + run.count
}

fn run_of(units: &ops::Range<u64>) -> Run {
    Run {
        first: units.start,
        count: units.end - units.start,
    }
}

impl Map {
    /// Of a pool of a BAR of that length. `None` if it does not fit there.
    pub(super) fn new(pool: &Pool, bar: u64, reserved: &[(u8, Range)]) -> Option<Self> {
        let room = bar.checked_sub(pool.at)?;
        let length = pool.length.unwrap_or(room - room % pool.unit);
        if length == 0 || length > room || length / pool.unit > MAX_UNITS {
            return None;
        }
        let none = Allocator::new(length / pool.unit);
        let mut new = Self {
            at: pool.at,
            unit: pool.unit,
            contiguous: pool.contiguous,
            overlap: pool.overlap,
            used: none.clone(),
            reserved: none,
            readers: RangeMap::new(),
        };
        for (bar, range) in reserved {
            if *bar == pool.bar {
                if let Some(run) = new.covering(range) {
                    new.used.occupy(run);
                    new.reserved.occupy(run);
                }
            }
        }
        Some(new)
    }

    /// Bytes that can be leased.
    pub(super) fn bytes(&self) -> u64 {
        self.reserved.free() * self.unit
    }

    /// Bytes of those that can be leased and are not.
    pub(super) fn free_bytes(&self) -> u64 {
        self.used.free() * self.unit
    }

    pub(super) fn unit(&self) -> u64 {
        self.unit
    }

    /// Whether so much can ever be had.
    pub(super) fn can_ever(&self, wanted: &Wanted) -> bool {
        match wanted {
            Wanted::Units(count) if self.contiguous => self.reserved.has_run(*count),
            Wanted::Units(count) => *count != 0 && *count <= self.reserved.free(),
            Wanted::Named(runs) => runs.iter().all(|run| self.reserved.is_free(*run)),
        }
    }

    /// Units of a size; all that can be leased without one.
    pub(super) fn units(&self, size: Option<u64>) -> Option<u64> {
        match size {
            None => Some(self.reserved.free()),
            Some(size) => (size != 0 && size % self.unit == 0).then_some(size / self.unit),
        }
    }

    /// Whether the range is one of the pool's, and of whole units.
    pub(super) fn run(&self, range: &Range) -> Option<Run> {
        let offset = range.offset.checked_sub(self.at)?;
        if offset % self.unit != 0 || range.length % self.unit != 0 || range.length == 0 {
            return None;
        }
        let run = Run {
            first: offset / self.unit,
            count: range.length / self.unit,
        };
        let end = run.first.checked_add(run.count)?;
        (end <= self.used.units()).then_some(run)
    }

    /// Whether the range lies in the pool.
    pub(super) fn contains(&self, range: &Range) -> bool {
        range.offset >= self.at && range.end() <= self.at + self.used.units() * self.unit
    }

    /// The units of which the range has a byte.
    fn covering(&self, range: &Range) -> Option<Run> {
        let begin = range.offset.max(self.at) - self.at;
        let end = range.end().checked_sub(self.at)?;
        let first = begin / self.unit;
        let count = end
            .div_ceil(self.unit)
            .min(self.used.units())
            .checked_sub(first)?;
        (count != 0).then_some(Run { first, count })
    }

    fn range(&self, run: Run) -> Range {
        Range {
            offset: self.at + run.first * self.unit,
            length: run.count * self.unit,
        }
    }

    /// The units that a request is for; `None` if they are not whole units of the pool.
    pub(super) fn wanted(&self, what: &What) -> Option<Wanted> {
        match what {
            What::Pool { size, .. } => Some(Wanted::Units(self.units(*size)?)),
            What::Ranges { ranges, .. } => {
                let runs = ranges.iter().map(|range| self.run(range));
                Some(Wanted::Named(runs.collect::<Option<Vec<_>>>()?))
            }
        }
    }

    /// Whether it is worth to try [`Map::claim`]: named units are there exactly if it says so, of
    /// others there may be too many pieces.
    pub(super) fn may_have(&self, wanted: &Wanted, access: Access, kept: &mut Kept) -> bool {
        match wanted {
            Wanted::Named(runs) => runs
                .iter()
                .all(|run| !kept.has(*run) && self.can_have(*run, access)),
            Wanted::Units(count) if self.overlap == Overlap::Shared => {
                *count <= self.reserved.free()
            }
            Wanted::Units(count) => {
                let used = self.taken(kept).map_or(&self.used, |taken| taken);
                match self.contiguous {
                    true => used.has_run(*count),
                    false => *count <= used.free(),
                }
            }
        }
    }

    /// Units in use or kept, if any are kept.
    fn taken<'a>(&self, kept: &'a mut Kept) -> Option<&'a mut Allocator> {
        if kept.units.is_empty() {
            return None;
        }
        if kept.taken.is_none() {
            let mut taken = self.used.clone();
            for units in kept.units.iter() {
                taken.occupy(run_of(units));
            }
            kept.taken = Some(taken);
        }
        kept.taken.as_mut()
    }

    /// Takes what is wanted, and nothing that is kept. `None`, and takes nothing, if it is not to
    /// be had now.
    pub(super) fn claim(
        &mut self,
        wanted: &Wanted,
        access: Access,
        kept: &mut Kept,
    ) -> Option<Vec<Range>> {
        let runs = match wanted {
            Wanted::Named(runs) => {
                let all = self.may_have(wanted, access, kept);
                all.then(|| runs.clone())?
            }
            Wanted::Units(count) if self.overlap == Overlap::Shared => {
                self.reserved.clone().allocate(*count, MAX_RANGES)?
            }
            Wanted::Units(count) => {
                let (at, unit, contiguous) = (self.at, self.unit, self.contiguous);
                let used = match self.taken(kept) {
                    Some(taken) => taken,
                    None => &mut self.used,
                };
                if contiguous {
                    // Beyond 1 GiB no page-table entry gains by it.
                    let most = ((1 << 30) / unit).max(1);
                    let align = count.checked_next_power_of_two()?.min(most);
                    vec![used.allocate_run(*count, align, at / unit)?]
                } else {
                    used.allocate(*count, MAX_RANGES)?
                }
            }
        };
        for run in &runs {
            self.occupy(*run, access);
            if let Some(taken) = &mut kept.taken {
                taken.occupy(*run);
            }
        }
        Some(runs.iter().map(|run| self.range(*run)).collect())
    }

    /// Whether these leases, each a range and its rights, are in the way of what is wanted: it
    /// could not be had if nobody had any other.
    pub(super) fn stands_aside(
        &self,
        wanted: &Wanted,
        access: Access,
        these: &[(Range, Access)],
    ) -> bool {
        let excludes = |other: Access| match self.overlap {
            Overlap::Exclusive => true,
            Overlap::SharedRead => access == Access::ReadWrite || other == Access::ReadWrite,
            Overlap::Shared => false,
        };
        let these = these.iter().filter(|(_, other)| excludes(*other));
        let these = these.filter_map(|(range, _)| self.covering(range));
        match wanted {
            Wanted::Named(runs) => {
                let these: RangeSet<u64> = these.map(units).collect();
                runs.iter().any(|run| these.overlaps(&units(*run)))
            }
            Wanted::Units(count) => {
                // Wherever a unit is in use it is not given for a count, to readers neither.
                let mut alone = self.reserved.clone();
                these.for_each(|run| alone.occupy(run));
                match self.contiguous {
                    true => !alone.has_run(*count),
                    false => alone.free() < *count,
                }
            }
        }
    }

    fn can_have(&self, run: Run, access: Access) -> bool {
        self.reserved.is_free(run)
            && match (self.overlap, access) {
                (Overlap::Shared, _) => true,
                (Overlap::SharedRead, Access::Read) => self
                    .readers
                    .gaps(&units(run))
                    .all(|gap| self.used.is_free(run_of(&gap))),
                _ => self.used.is_free(run),
            }
    }

    fn occupy(&mut self, run: Run, access: Access) {
        match self.overlap {
            Overlap::Shared => return,
            Overlap::SharedRead if access == Access::Read => {
                let more = self.counted(run, |readers| readers.saturating_add(1));
                let first: Vec<_> = self.readers.gaps(&units(run)).collect();
                for (units, readers) in more {
                    self.readers.insert(units, readers);
                }
                for units in first {
                    self.readers.insert(units, 1);
                }
            }
            _ => {}
        }
        self.used.occupy(run);
    }

    /// The parts of a run that have readers, with another count of them.
    fn counted(&self, run: Run, count: fn(u32) -> u32) -> Vec<(ops::Range<u64>, u32)> {
        let run = units(run);
        let parts = self.readers.overlapping(&run);
        let clipped = |units: &ops::Range<u64>| units.start.max(run.start)..units.end.min(run.end);
        parts
            .map(|(units, readers)| (clipped(units), count(*readers)))
            .collect()
    }

    /// Gives the range of a lease back, which [`Map::claim`] took or [`Map::restore`] found.
    pub(super) fn release(&mut self, range: &Range, access: Access) {
        let Some(run) = self.run(range) else {
            return;
        };
        match self.overlap {
            Overlap::Shared => {}
            Overlap::SharedRead if access == Access::Read => {
                for (units, readers) in self.counted(run, |readers| readers.saturating_sub(1)) {
                    if readers == 0 {
                        self.used.release(run_of(&units));
                        self.readers.remove(units);
                    } else {
                        self.readers.insert(units, readers);
                    }
                }
            }
            _ => self.used.release(run),
        }
    }

    /// Takes the range of a lease that exists. False if it is not one that this map would have
    /// given it: then each unit of which it has a byte is taken from everybody.
    pub(super) fn restore(&mut self, range: &Range, access: Access, ours: bool) -> bool {
        let run = self.run(range);
        if let Some(run) = run.filter(|run| ours && self.can_have(*run, access)) {
            self.occupy(run, access);
            return true;
        }
        let covering = self.covering(range);
        if let Some(run) = covering {
            self.used.occupy(run);
        }
        covering.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Scrub;
    use crate::types::MemoryType;

    fn pool(overlap: Overlap, contiguous: bool) -> Pool {
        Pool {
            name: "p".into(),
            device: "d".into(),
            bar: 2,
            at: 0x2000,
            length: Some(0x8000),
            unit: 0x1000,
            contiguous,
            memory_types: vec![MemoryType::Uncached],
            writable: true,
            scrub: Scrub::None,
            overlap,
        }
    }

    fn range(offset: u64, length: u64) -> Range {
        Range { offset, length }
    }

    #[test]
    fn reserved_units_are_never_leased_whatever_the_way_to_share() {
        for overlap in [Overlap::Exclusive, Overlap::SharedRead, Overlap::Shared] {
            // Half a page of a table: the whole page. One of another BAR: nothing.
            let reserved = [(2, range(0x3800, 0x10)), (0, range(0, 0x10000))];
            let mut map = Map::new(&pool(overlap, false), 0x10000, &reserved).unwrap();
            assert_eq!(map.bytes(), 0x7000);
            let table = Wanted::Named(vec![Run { first: 1, count: 1 }]);
            assert!(!map.can_ever(&table));
            assert_eq!(map.claim(&table, Access::Read, &mut Kept::default()), None);
            let all = Wanted::Units(map.units(None).unwrap());
            let given = map
                .claim(&all, Access::ReadWrite, &mut Kept::default())
                .unwrap();
            assert_eq!(given, [range(0x2000, 0x1000), range(0x4000, 0x6000)]);
        }
    }

    #[test]
    fn nothing_is_to_be_had_of_a_pool_that_is_all_reserved() {
        let reserved = [(2, range(0, 0x10000))];
        for contiguous in [false, true] {
            let pool = pool(Overlap::Exclusive, contiguous);
            let map = Map::new(&pool, 0x10000, &reserved).unwrap();
            let all = Wanted::Units(map.units(None).unwrap());
            assert!(!map.can_ever(&all));
        }
    }

    #[test]
    fn readers_share_and_a_writer_does_not() {
        let mut map = Map::new(&pool(Overlap::SharedRead, false), 0x10000, &[]).unwrap();
        let some = Wanted::Named(vec![Run { first: 2, count: 2 }]);
        assert!(
            map.claim(&some, Access::Read, &mut Kept::default())
                .is_some()
        );
        assert!(
            map.claim(&some, Access::Read, &mut Kept::default())
                .is_some()
        );
        assert_eq!(
            map.claim(&some, Access::ReadWrite, &mut Kept::default()),
            None
        );
        map.release(&range(0x4000, 0x2000), Access::Read);
        assert_eq!(
            map.claim(&some, Access::ReadWrite, &mut Kept::default()),
            None,
            "one reads still"
        );
        map.release(&range(0x4000, 0x2000), Access::Read);
        assert!(
            map.claim(&some, Access::ReadWrite, &mut Kept::default())
                .is_some()
        );
        assert_eq!(map.claim(&some, Access::Read, &mut Kept::default()), None);
    }

    #[test]
    fn readers_of_millions_of_units_are_a_few_ranges() {
        let large = Pool {
            length: None,
            ..pool(Overlap::SharedRead, false)
        };
        let mut map = Map::new(&large, 64 << 30, &[]).unwrap();
        let all = range(0x2000, (64 << 30) - 0x2000);
        let most = map.run(&all).unwrap().count;
        for (first, count) in [(0, most), (7, most / 2), (0, most), (9, 1)] {
            let run = Wanted::Named(vec![Run { first, count }]);
            assert!(
                map.claim(&run, Access::Read, &mut Kept::default())
                    .is_some()
            );
        }
        assert!(map.readers.len() <= 7, "{}", map.readers.len());
        map.release(&all, Access::Read);
        assert_eq!(map.free_bytes(), 0, "one has all of it still");
        map.release(&all, Access::Read);
        assert_eq!(map.readers.len(), 3);
        assert_eq!(map.free_bytes(), (most - most / 2) * 0x1000);
    }

    proptest::proptest! {
        /// Against a count for each unit.
        #[test]
        fn readers_are_counted_as_if_by_unit(
            steps in proptest::collection::vec((0_u64..8, 1_u64..=8, proptest::bool::ANY), 0..40),
        ) {
            let mut map = Map::new(&pool(Overlap::SharedRead, false), 0x10000, &[]).unwrap();
            let mut counts = [0_u32; 8];
            let mut had: Vec<Run> = Vec::new();
            for (first, count, gives_back) in steps {
                let count = count.min(8 - first);
                if gives_back && !had.is_empty() {
                    let run = had.swap_remove(first as usize % had.len());
                    map.release(&map.range(run), Access::Read);
                    (run.first..run.first + run.count).for_each(|unit| counts[unit as usize] -= 1);
                } else {
                    let run = Run { first, count };
                    let wanted = Wanted::Named(vec![run]);
                    assert!(map.claim(&wanted, Access::Read, &mut Kept::default()).is_some());
                    had.push(run);
                    (first..first + count).for_each(|unit| counts[unit as usize] += 1);
                }
                for (unit, count) in (0..).zip(counts) {
                    assert_eq!(map.readers.get(&unit).copied().unwrap_or(0), count);
                    let run = Run { first: unit, count: 1 };
                    assert_eq!(map.used.is_free(run), count == 0);
                }
            }
        }
    }

    #[test]
    fn a_run_is_aligned_in_the_bar() {
        let mut map = Map::new(&pool(Overlap::Exclusive, true), 0x10000, &[]).unwrap();
        let given = map
            .claim(&Wanted::Units(4), Access::Read, &mut Kept::default())
            .unwrap();
        assert_eq!(given, [range(0x4000, 0x4000)]);
        assert!(!map.can_ever(&Wanted::Units(9)));
    }

    #[test]
    fn a_pool_that_the_bar_does_not_have_is_none() {
        let pool = pool(Overlap::Exclusive, false);
        assert!(Map::new(&pool, 0x9fff, &[]).is_none());
        assert!(Map::new(&pool, 0, &[]).is_none());
        let rest = Pool {
            length: None,
            ..pool
        };
        assert_eq!(Map::new(&rest, 0x5800, &[]).unwrap().bytes(), 0x3000);
        assert!(Map::new(&rest, 0x2800, &[]).is_none());
    }

    #[test]
    fn a_lease_of_other_geometry_takes_every_unit_that_it_touches() {
        let mut map = Map::new(&pool(Overlap::Exclusive, false), 0x10000, &[]).unwrap();
        assert!(!map.restore(&range(0x1000, 0x1800), Access::Read, false));
        assert_eq!(map.free_bytes(), 0x7000);
        assert!(
            map.restore(&range(0xa000, 0x1000), Access::Read, false),
            "beyond it"
        );
        assert!(map.restore(&range(0x4000, 0x1000), Access::Read, true));
        assert!(
            !map.restore(&range(0x4000, 0x1000), Access::Read, true),
            "two owners"
        );
        assert_eq!(map.free_bytes(), 0x6000);
    }
}
