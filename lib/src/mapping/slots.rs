//! The table of guarded mappings, which the SIGBUS handler searches, and the state of each.
//!
//! The table is a list of chunks that only grows; slots are used again. Nothing in it is ever
//! freed, so a reference into it stays valid whatever the handler interrupts.
//!
//! # Which mapping was hit
//!
//! A slot publishes its address range under a sequence number: even while the range is valid, odd
//! while it is not (slot free, or changing). [`find`] reads number, range, number; if the two
//! numbers are not equal and even it goes on to the next slot. It need not try again: the slot of
//! the mapping that the faulting access goes through does not change during that access, because
//! the accessor borrows the mapping and only its drop changes the slot. A range becomes valid
//! after it was mapped and invalid before it is unmapped, so at any instant valid ranges are
//! disjoint, and the slot found is the one that was hit.
//!
//! # Whether an access was lost
//!
//! Each slot has an epoch, which only grows, through four phases over and over:
//!
//! | epoch mod 4 | phase | what is mapped |
//! |---|---|---|
//! | 0 | `LIVE` | the lease |
//! | 1 | `LOSING` | the lease or scratch memory: one handler is replacing it |
//! | 2 | `LOST` | scratch memory |
//! | 3 | `RECOVERING` | scratch memory or the lease: one `recover` is replacing it |
//!
//! The steps and who may take them: 0 to 1 by compare-and-swap in a handler, *before* it maps
//! scratch memory; 1 to 2 by that handler after it has; 2 to 3 by compare-and-swap in `recover`,
//! *before* it maps the lease; 3 to 4 by it after it has (back to 2 if the lease could not be
//! mapped). So whoever sees epoch and mapping in one instant never sees scratch memory in phase
//! `LIVE`.
//!
//! An access ([`Slot::access`]) reads the epoch, which must be `LIVE`, accesses, and reads the
//! epoch again. If both are equal then the epoch had that value all the time between, since it
//! never returns to an earlier value other than from `RECOVERING` to `LOST`; so the access went to
//! the lease. If not equal the access is reported as lost, though it may have reached the device.
//! It follows that an access to scratch memory is never reported as done, whatever other threads,
//! handlers and recoveries do meanwhile.
//!
//! "In one instant" needs order between the CPU's accesses. The first epoch load is an acquire, so
//! the access is not made before it. Behind a store stands a full fence, as the second epoch load
//! could otherwise be made while the store waits; behind loads an acquire fence suffices. The
//! store to scratch memory comes after the epoch's step to `LOSING` because a system call that
//! changed the page tables lies between; the fence carries that order to the second load. On the
//! same thread a handler runs between two instructions, and the fences keep the compiler from
//! moving the access out from between the epoch loads.
//!
//! A handler that finds `LOSING` or `RECOVERING` returns: the access is made again and faults
//! again until whoever is replacing the mapping has finished. That one is another thread: the same
//! thread would have seen a phase that is not `LIVE` before its access. A handler that finds
//! `LOST` returns too: the access faulted before scratch memory was in place.

use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

const SLOTS_PER_CHUNK: usize = 64;

/// The lease is mapped.
const LIVE: u64 = 0;
/// A handler is putting scratch memory in its place.
const LOSING: u64 = 1;
/// Scratch memory is mapped.
const LOST: u64 = 2;
/// `recover` is mapping the lease again.
const RECOVERING: u64 = 3;
const PHASES: u64 = 4;

struct Chunk {
    slots: [Slot; SLOTS_PER_CHUNK],
    next: OnceLock<Box<Chunk>>,
}

impl Chunk {
    const fn new() -> Self {
        Self {
            slots: [const { Slot::new() }; SLOTS_PER_CHUNK],
            next: OnceLock::new(),
        }
    }
}

static TABLE: Chunk = Chunk::new();

fn chunks() -> impl Iterator<Item = &'static Chunk> {
    // `OnceLock::get` is one atomic load: safe in a signal handler.
    std::iter::successors(Some(&TABLE), |chunk| chunk.next.get().map(Box::as_ref))
}

/// State of one guarded mapping. See the module's documentation.
#[derive(Debug)]
pub(super) struct Slot {
    taken: AtomicBool,
    sequence: AtomicUsize,
    start: AtomicUsize,
    length: AtomicUsize,
    epoch: AtomicU64,
    /// Scratch memory could not be mapped: faults are not ours to handle any more.
    broken: AtomicBool,
}

/// What the epoch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// This caller has to put scratch memory in place, then call [`Slot::lost`].
    Ours,
    /// Somebody else does, or did.
    Theirs,
    /// Nobody can.
    Hopeless,
}

/// Answer of [`Slot::begin_recovery`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recovery {
    /// The mapping is not lost.
    NotNeeded,
    /// This caller has to map the lease, then call [`Slot::end_recovery`].
    Ours,
    /// A handler or another recovery is at work: ask again.
    Wait,
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            sequence: AtomicUsize::new(1),
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            epoch: AtomicU64::new(LIVE),
            broken: AtomicBool::new(false),
        }
    }

    /// Address range, if it is valid.
    fn range(&self) -> Option<(usize, usize)> {
        let before = self.sequence.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let length = self.length.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let after = self.sequence.load(Ordering::Relaxed);
        (before == after && before % 2 == 0).then_some((start, length))
    }

    /// Runs `access`, which touches the mapping, and tells whether it reached the lease. `order` is
    /// `SeqCst` where `access` stores and may be `Acquire` where it only loads.
    #[inline(always)]
    fn access<R>(&self, order: Ordering, access: impl FnOnce() -> R) -> Option<R> {
        let before = self.epoch.load(Ordering::Acquire);
        if before % PHASES != LIVE {
            return None;
        }
        let result = access();
        fence(order);
        let after = self.epoch.load(Ordering::Relaxed);
        (before == after).then_some(result)
    }

    /// Runs `access`, which only loads from the mapping. `None`: lost.
    #[inline(always)]
    pub(super) fn load<R>(&self, access: impl FnOnce() -> R) -> Option<R> {
        self.access(Ordering::Acquire, access)
    }

    /// Runs `access`, which stores to the mapping. `None`: lost.
    #[inline(always)]
    pub(super) fn store<R>(&self, access: impl FnOnce() -> R) -> Option<R> {
        self.access(Ordering::SeqCst, access)
    }

    /// Whether the lease is mapped as far as is known: nothing was touched.
    pub(super) fn is_live(&self) -> bool {
        self.epoch.load(Ordering::Acquire) % PHASES == LIVE
    }

    /// For the handler: the mapping was hit by a fault.
    pub(super) fn lose(&self) -> Loss {
        if self.broken.load(Ordering::Acquire) {
            return Loss::Hopeless;
        }
        let epoch = self.epoch.load(Ordering::Acquire);
        if epoch % PHASES != LIVE {
            return Loss::Theirs;
        }
        let swapped = self.epoch.compare_exchange(
            epoch,
            epoch + (LOSING - LIVE),
            Ordering::SeqCst,
            Ordering::Relaxed,
        );
        match swapped {
            Ok(_) => Loss::Ours,
            Err(_) => Loss::Theirs,
        }
    }

    /// For the handler that was told [`Loss::Ours`]: scratch memory is in place, or could not be
    /// put there.
    pub(super) fn lost(&self, in_place: bool) {
        if !in_place {
            self.broken.store(true, Ordering::Release);
        }
        // Nobody else moves the epoch in that phase.
        self.epoch.fetch_add(LOST - LOSING, Ordering::SeqCst);
    }

    /// Begins to map the lease again.
    pub(super) fn begin_recovery(&self) -> Recovery {
        let epoch = self.epoch.load(Ordering::Acquire);
        match epoch % PHASES {
            LIVE => Recovery::NotNeeded,
            LOST => {
                let swapped = self.epoch.compare_exchange(
                    epoch,
                    epoch + (RECOVERING - LOST),
                    Ordering::SeqCst,
                    Ordering::Relaxed,
                );
                match swapped {
                    Ok(_) => Recovery::Ours,
                    Err(_) => Recovery::Wait,
                }
            }
            _ => Recovery::Wait,
        }
    }

    /// For the caller that was told [`Recovery::Ours`]: the lease is mapped, or scratch memory
    /// still is.
    pub(super) fn end_recovery(&self, mapped: bool) {
        // Nobody else moves the epoch in that phase. Going back is harmless: accesses compare with
        // LIVE epochs only.
        if mapped {
            self.epoch
                .fetch_add(PHASES + LIVE - RECOVERING, Ordering::SeqCst);
        } else {
            self.epoch.fetch_sub(RECOVERING - LOST, Ordering::SeqCst);
        }
    }

    /// For the test that plays both sides.
    #[cfg(test)]
    fn phase(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst) % PHASES
    }
}

/// A slot in use. Dropping it makes the handler forget the range.
#[derive(Debug)]
pub(super) struct Claim {
    slot: &'static Slot,
}

impl Claim {
    /// Announces `[start, start + length)`, which is mapped and ours until the claim is dropped.
    pub(super) fn new(start: usize, length: usize) -> Self {
        Self::on(free_slot(), start, length)
    }

    /// As `new`, on a slot that nobody else has.
    fn on(slot: &'static Slot, start: usize, length: usize) -> Self {
        // Nobody else has the slot, so plain stores suffice. The epoch goes on growing: from
        // whatever phase the last user left to the next LIVE.
        let epoch = slot.epoch.load(Ordering::Relaxed);
        let live = (epoch | (PHASES - 1)).wrapping_add(1);
        slot.broken.store(false, Ordering::Relaxed);
        slot.epoch.store(live, Ordering::Relaxed);
        slot.start.store(start, Ordering::Relaxed);
        slot.length.store(length, Ordering::Relaxed);
        let odd = slot.sequence.load(Ordering::Relaxed);
        // Release: whoever sees the even number sees the range and the epoch.
        slot.sequence.store(odd.wrapping_add(1), Ordering::Release);
        Self { slot }
    }

    /// The slot.
    #[inline(always)]
    pub(super) fn slot(&self) -> &Slot {
        self.slot
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let even = self.slot.sequence.load(Ordering::Relaxed);
        self.slot
            .sequence
            .store(even.wrapping_add(1), Ordering::Relaxed);
        // A reader that sees a range stored by the next user sees the odd number, or a later one.
        fence(Ordering::Release);
        self.slot.taken.store(false, Ordering::Release);
    }
}

/// Takes a free slot, appending a chunk when there is none.
fn free_slot() -> &'static Slot {
    let mut chunk = &TABLE;
    loop {
        let free = chunk.slots.iter().find(|slot| {
            !slot.taken.load(Ordering::Relaxed) && !slot.taken.swap(true, Ordering::Acquire)
        });
        if let Some(slot) = free {
            return slot;
        }
        chunk = chunk.next.get_or_init(|| Box::new(Chunk::new()));
    }
}

/// The slot whose range has `address`, with the range. Async-signal-safe: loads only.
pub(super) fn find(address: usize) -> Option<(&'static Slot, usize, usize)> {
    chunks().flat_map(|chunk| &chunk.slots).find_map(|slot| {
        let (start, length) = slot.range()?;
        (address.wrapping_sub(start) < length).then_some((slot, start, length))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses that no mapping of the other tests has.
    const BASE: usize = usize::MAX - (1 << 30);

    #[test]
    fn a_claimed_range_is_found_until_the_claim_is_dropped() {
        let claim = Claim::new(BASE, 0x2000);
        for address in [BASE, BASE + 0x1fff] {
            let (slot, start, length) = find(address).unwrap();
            assert!(std::ptr::eq(slot, claim.slot()));
            assert_eq!((start, length), (BASE, 0x2000));
        }
        assert!(find(BASE + 0x2000).is_none());
        assert!(find(BASE - 1).is_none());
        drop(claim);
        assert!(find(BASE).is_none());
    }

    #[test]
    fn the_table_grows_past_a_chunk_and_slots_are_used_again() {
        let place = |n: usize| BASE + 0x100_0000 + n * 0x1000;
        for _ in 0..3 {
            let claims: Vec<Claim> = (0..3 * SLOTS_PER_CHUNK)
                .map(|n| Claim::new(place(n), 0x1000))
                .collect();
            for (n, claim) in claims.iter().enumerate() {
                let (slot, start, _) = find(place(n) + 5).unwrap();
                assert!(std::ptr::eq(slot, claim.slot()));
                assert_eq!(start, place(n));
            }
        }
        // Other tests hold some; without reuse there would be nine chunks.
        assert!(chunks().count() <= 5);
    }

    #[test]
    fn epochs_grow_over_reuse_and_start_live() {
        let slot: &'static Slot = Box::leak(Box::new(Slot::new()));
        let mut last = 0;
        for steps in 0..4 {
            let claim = Claim::on(slot, BASE, 0x1000);
            assert!(slot.is_live());
            assert!(slot.epoch.load(Ordering::SeqCst) > last);
            slot.epoch.fetch_add(steps, Ordering::SeqCst);
            last = slot.epoch.load(Ordering::SeqCst);
            drop(claim);
            assert_eq!(slot.range(), None);
        }
    }

    #[test]
    fn an_access_during_which_the_mapping_was_lost_and_recovered_is_lost() {
        let slot = Slot::new();
        assert_eq!(slot.store(|| 7), Some(7));
        let answer = slot.store(|| {
            assert_eq!(slot.lose(), Loss::Ours);
            assert_eq!(slot.lose(), Loss::Theirs);
            slot.lost(true);
            assert_eq!(slot.begin_recovery(), Recovery::Ours);
            assert_eq!(slot.begin_recovery(), Recovery::Wait);
            slot.end_recovery(true);
        });
        assert_eq!(answer, None);
        assert!(slot.is_live());
        assert_eq!(slot.load(|| 7), Some(7));
    }

    #[test]
    fn a_lost_mapping_is_not_touched_until_it_is_recovered() {
        let slot = Slot::new();
        assert_eq!(slot.begin_recovery(), Recovery::NotNeeded);
        assert_eq!(slot.lose(), Loss::Ours);
        assert_eq!(slot.phase(), LOSING);
        assert_eq!(slot.begin_recovery(), Recovery::Wait);
        slot.lost(true);
        assert_eq!(slot.phase(), LOST);
        assert_eq!(slot.load(|| panic!("touched")), None::<()>);
        assert_eq!(slot.begin_recovery(), Recovery::Ours);
        assert_eq!(slot.phase(), RECOVERING);
        slot.end_recovery(false);
        assert_eq!(slot.phase(), LOST);
    }

    #[test]
    fn a_mapping_that_cannot_be_replaced_is_not_ours_any_more() {
        let slot = Slot::new();
        assert_eq!(slot.lose(), Loss::Ours);
        slot.lost(false);
        assert_eq!(slot.lose(), Loss::Hopeless);
        assert_eq!(slot.load(|| ()), None);
    }
}
