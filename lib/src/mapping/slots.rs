//! The table of scratch mappings, which the SIGBUS handler searches, and the state of each.
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
//! the access borrows the mapping and only its drop changes the slot. A range becomes valid after
//! it was mapped and invalid before it is unmapped or given up, so at any instant valid ranges are
//! disjoint, and the slot found is the one that was hit.
//!
//! # Whether a section was lost
//!
//! See [`super::state`].
//!
//! # Waiting
//!
//! A handler that finds `LOSING` or `RECOVERING` sleeps on a futex until the state changes, then
//! returns: the access is made again, and faults again or not. It does not spin, so that a
//! real-time thread does not starve the ordinary one that it waits for. The one that it waits for
//! is another thread: the same thread would have seen a phase that is not `LIVE` before its access.

use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use rustix::thread::futex;

use super::state::Loss;
use super::state::Recovery;
use super::state::State;
use crate::sys::memory;

const SLOTS_PER_CHUNK: usize = 64;

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

/// State of one scratch mapping. See the module's documentation.
#[derive(Debug)]
pub(super) struct Slot {
    taken: AtomicBool,
    sequence: AtomicUsize,
    start: AtomicUsize,
    length: AtomicUsize,
    state: State,
    /// Address of the memory that a handler puts in place; 0 while it is there, or has never been.
    reserve: AtomicUsize,
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            sequence: AtomicUsize::new(1),
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            state: State(AtomicU32::new(0)),
            reserve: AtomicUsize::new(0),
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

    /// Sleeps until the state is no longer this one; may return early.
    fn wait(&self, state: u32) {
        let _ = futex::wait(&self.state.0, futex::Flags::PRIVATE, state, None);
    }

    fn wake(&self) {
        let _ = futex::wake(&self.state.0, futex::Flags::PRIVATE, i32::MAX as u32);
    }
}

/// A slot in use. Dropping it makes the handler forget the range.
#[derive(Debug)]
pub(super) struct Claim {
    slot: &'static Slot,
}

impl Claim {
    /// Announces `[start, start + length)`.
    ///
    /// # Safety
    ///
    /// The range is an area's, until the claim is dropped or told to give up. `reserve` is 0 or the
    /// address of an [`memory::Area::reserve`] of the same length that is given away.
    pub(super) unsafe fn new(start: usize, length: usize, reserve: usize) -> Self {
        Self::on(free_slot(), start, length, reserve)
    }

    /// As `new`, on a slot that nobody else has.
    fn on(slot: &'static Slot, start: usize, length: usize, reserve: usize) -> Self {
        // Nobody else has the slot, so plain stores suffice.
        slot.state.renew();
        slot.start.store(start, Ordering::Relaxed);
        slot.length.store(length, Ordering::Relaxed);
        slot.reserve.store(reserve, Ordering::Relaxed);
        let odd = slot.sequence.load(Ordering::Relaxed);
        // Release: a thread that sees the even number sees the range and the state.
        slot.sequence.store(odd.wrapping_add(1), Ordering::Release);
        Self { slot }
    }

    /// The state.
    pub(super) fn state(&self) -> &State {
        &self.slot.state
    }

    /// Maps the lease again with `map`, which answers the address of a new reserve, if the mapping
    /// is lost.
    pub(super) fn recover<E>(&self, map: impl FnOnce() -> Result<usize, E>) -> Result<(), E> {
        loop {
            match self.slot.state.begin_recovery() {
                Recovery::NotNeeded => return Ok(()),
                Recovery::Ours => break,
                Recovery::Wait(state) => self.slot.wait(state),
            }
        }
        let answer = map().map(|reserve| self.slot.reserve.store(reserve, Ordering::Release));
        self.slot.state.end_recovery(answer.is_ok());
        self.slot.wake();
        answer
    }

    /// Makes the handler forget the range: it is not ours any more. For the caller of `recover`,
    /// inside.
    pub(super) fn give_up(&self) {
        let sequence = self.slot.sequence.load(Ordering::Relaxed);
        if sequence % 2 == 0 {
            let odd = sequence.wrapping_add(1);
            self.slot.sequence.store(odd, Ordering::SeqCst);
        }
    }

    /// The reserve, if no handler has put it in place. It belongs to the caller then.
    pub(super) fn take_reserve(&self) -> Option<usize> {
        match self.slot.reserve.swap(0, Ordering::AcqRel) {
            0 => None,
            reserve => Some(reserve),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.give_up();
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
fn find(address: usize) -> Option<(&'static Slot, usize, usize)> {
    chunks().flat_map(|chunk| &chunk.slots).find_map(|slot| {
        let (start, length) = slot.range()?;
        (address.wrapping_sub(start) < length).then_some((slot, start, length))
    })
}

/// For the handler: an access of `address` faulted. True if it can be made again.
pub(super) fn lose(address: usize) -> bool {
    let Some((slot, start, length)) = find(address) else {
        return false;
    };
    match slot.state.begin_loss() {
        Loss::Done => true,
        Loss::Wait(state) => {
            slot.wait(state);
            true
        }
        Loss::Ours => {
            let reserve = slot.reserve.swap(0, Ordering::AcqRel);
            // SAFETY: both are areas, by the contract of `Claim::new`; that of the range is alive,
            // as the faulting access borrows it, and not abandoned, as the slot still has it.
            let in_place = reserve != 0 && unsafe { memory::put_scratch(reserve, start, length) };
            if !in_place {
                // Nobody can do it: the process dies of this fault, and of those that wait.
                let odd = slot.sequence.load(Ordering::Relaxed).wrapping_add(1);
                slot.sequence.store(odd, Ordering::SeqCst);
            }
            slot.state.end_loss();
            slot.wake();
            in_place
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses that no mapping of the other tests has.
    const BASE: usize = usize::MAX - (1 << 30);

    fn claim(start: usize, length: usize) -> Claim {
        // SAFETY: nothing faults at such an address.
        unsafe { Claim::new(start, length, 0) }
    }

    #[test]
    fn a_claimed_range_is_found_until_the_claim_is_dropped() {
        let claim = claim(BASE, 0x2000);
        for address in [BASE, BASE + 0x1fff] {
            let (slot, start, length) = find(address).unwrap();
            assert!(std::ptr::eq(slot, claim.slot));
            assert_eq!((start, length), (BASE, 0x2000));
        }
        assert!(find(BASE + 0x2000).is_none());
        assert!(find(BASE - 1).is_none());
        drop(claim);
        assert!(find(BASE).is_none());
    }

    #[test]
    fn a_range_that_is_given_up_is_found_no_more() {
        let claim = self::claim(BASE + 0x10_0000, 0x1000);
        claim.give_up();
        assert!(find(BASE + 0x10_0000).is_none());
        drop(claim);
        let again = self::claim(BASE + 0x10_0000, 0x1000);
        assert!(find(BASE + 0x10_0000).is_some());
        drop(again);
    }

    #[test]
    fn the_table_grows_past_a_chunk_and_slots_are_used_again() {
        let place = |n: usize| BASE + 0x100_0000 + n * 0x1000;
        for _ in 0..3 {
            let claims: Vec<Claim> = (0..3 * SLOTS_PER_CHUNK)
                .map(|n| claim(place(n), 0x1000))
                .collect();
            for (n, claim) in claims.iter().enumerate() {
                let (slot, start, _) = find(place(n) + 5).unwrap();
                assert!(std::ptr::eq(slot, claim.slot));
                assert_eq!(start, place(n));
            }
        }
        // Other tests hold some; without reuse there would be nine chunks.
        assert!(chunks().count() <= 5);
    }

    #[test]
    fn states_grow_over_reuse_and_start_live() {
        let slot: &'static Slot = Box::leak(Box::new(Slot::new()));
        let mut last = 0;
        for steps in 0..4 {
            let claim = Claim::on(slot, BASE, 0x1000, 0);
            assert!(slot.state.is_live());
            assert!(slot.state.0.load(Ordering::SeqCst) > last);
            slot.state.0.fetch_add(steps, Ordering::SeqCst);
            last = slot.state.0.load(Ordering::SeqCst);
            drop(claim);
            assert_eq!(slot.range(), None);
        }
    }

    #[test]
    fn a_section_during_which_the_mapping_was_lost_and_recovered_is_lost() {
        let state = State(AtomicU32::new(0));
        assert_eq!(state.section(|| 7), Some(7));
        let answer = state.section(|| {
            assert_eq!(state.begin_loss(), Loss::Ours);
            assert_eq!(state.begin_loss(), Loss::Wait(1));
            state.end_loss();
            assert_eq!(state.begin_loss(), Loss::Done);
            assert_eq!(state.begin_recovery(), Recovery::Ours);
            assert_eq!(state.begin_recovery(), Recovery::Wait(3));
            assert_eq!(state.begin_loss(), Loss::Wait(3));
            state.end_recovery(true);
        });
        assert_eq!(answer, None);
        assert!(state.is_live());
        assert_eq!(state.section(|| 7), Some(7));
    }

    #[test]
    fn a_lost_mapping_is_not_touched_until_it_is_recovered() {
        let state = State(AtomicU32::new(0));
        assert_eq!(state.begin_recovery(), Recovery::NotNeeded);
        assert_eq!(state.begin_loss(), Loss::Ours);
        assert_eq!(state.begin_recovery(), Recovery::Wait(1));
        state.end_loss();
        assert_eq!(state.section(|| panic!("touched")), None::<()>);
        assert_eq!(state.begin_recovery(), Recovery::Ours);
        state.end_recovery(false);
        assert_eq!(state.begin_loss(), Loss::Done);
        assert!(!state.is_live());
    }

    #[test]
    fn a_waiting_thread_sleeps_and_is_woken() {
        let slot = Slot::new();
        assert_eq!(slot.state.begin_loss(), Loss::Ours);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                while let Loss::Wait(state) = slot.state.begin_loss() {
                    slot.wait(state);
                }
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiter.is_finished());
            slot.state.end_loss();
            slot.wake();
        });
    }
}
