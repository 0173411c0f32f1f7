//! Whether accesses of a scratch mapping were lost.
//!
//! Each scratch mapping has a state, which only grows, through four phases over and over:
//!
//! | state mod 4 | phase | what is mapped |
//! |---|---|---|
//! | 0 | `LIVE` | the lease |
//! | 1 | `LOSING` | the lease or scratch memory: one handler is replacing it |
//! | 2 | `LOST` | scratch memory |
//! | 3 | `RECOVERING` | scratch memory or the lease: one `recover` is replacing it |
//!
//! The steps: 0 to 1 by compare-and-swap in a handler, *before* it puts scratch memory in place; 1
//! to 2 by that handler after it has; 2 to 3 by compare-and-swap in `recover`, *before* it maps the
//! lease; 3 to 4 by it after it has (back to 2 if the lease could not be mapped). So a thread that
//! saw state and mapping in one instant would never see scratch memory in phase `LIVE`.
//!
//! A section ([`State::section`]) reads the state, which must be `LIVE`, accesses the mapping, and
//! reads the state again. If both are equal then the state had that value all the time between,
//! since it never returns to an earlier value other than from `RECOVERING` to `LOST`; so the
//! accesses went to the lease. (It would take 2^30 losses and recoveries during one section to be
//! mistaken.) It follows that a section that used scratch memory is never reported as done.
//!
//! "In one instant" needs order between the CPU's accesses. The first load of the state is an
//! acquire, so that no access is made before it. Behind the accesses stands a full fence, as the
//! second load could otherwise be made while a store waits. A store to scratch memory comes after
//! the step to `LOSING` because a system call that changed the page tables lies between; the fence
//! carries that order to the second load. On the same thread a handler runs between two
//! instructions, and the fences keep the compiler from moving an access out from between the loads.

use super::atomic::AtomicU32;
use super::atomic::Ordering;
use super::atomic::fence;

/// The lease is mapped.
const LIVE: u32 = 0;
/// A handler is putting scratch memory in its place.
const LOSING: u32 = 1;
/// Scratch memory is mapped.
const LOST: u32 = 2;
/// `recover` is mapping the lease again.
const RECOVERING: u32 = 3;
const PHASES: u32 = 4;

/// The state of one scratch mapping. See the module's documentation.
#[derive(Debug)]
pub(super) struct State(pub(super) AtomicU32);

/// Answer of [`State::begin_loss`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// This caller has to put scratch memory in place, then call [`State::end_loss`].
    Ours,
    /// It is in place.
    Done,
    /// Somebody else is at work, and the state is this.
    Wait(u32),
}

/// Answer of [`State::begin_recovery`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recovery {
    /// The mapping is not lost.
    NotNeeded,
    /// This caller has to map the lease, then call [`State::end_recovery`].
    Ours,
    /// Somebody else is at work, and the state is this.
    Wait(u32),
}

impl State {
    /// Runs `access`, which touches the mapping. `None`: some or all of it was lost.
    pub(super) fn section<R>(&self, access: impl FnOnce() -> R) -> Option<R> {
        let before = self.0.load(Ordering::Acquire);
        if before % PHASES != LIVE {
            return None;
        }
        let result = access();
        fence(Ordering::SeqCst);
        let after = self.0.load(Ordering::Relaxed);
        (before == after).then_some(result)
    }

    /// Whether the lease is mapped as far as is known: nothing was touched.
    pub(super) fn is_live(&self) -> bool {
        self.0.load(Ordering::Acquire) % PHASES == LIVE
    }

    /// For the handler: the mapping was hit by a fault.
    pub(super) fn begin_loss(&self) -> Loss {
        let state = self.0.load(Ordering::Acquire);
        match state % PHASES {
            LIVE => match self.step(state, LOSING) {
                Ok(()) => Loss::Ours,
                Err(now) => Loss::Wait(now),
            },
            LOST => Loss::Done,
            _ => Loss::Wait(state),
        }
    }

    /// For the handler that was told [`Loss::Ours`]: scratch memory is in place.
    pub(super) fn end_loss(&self) {
        // Nobody else moves the state in that phase.
        self.0.fetch_add(LOST - LOSING, Ordering::SeqCst);
    }

    /// Begins to map the lease again.
    pub(super) fn begin_recovery(&self) -> Recovery {
        let state = self.0.load(Ordering::Acquire);
        match state % PHASES {
            LIVE => Recovery::NotNeeded,
            LOST => match self.step(state, RECOVERING) {
                Ok(()) => Recovery::Ours,
                Err(now) => Recovery::Wait(now),
            },
            _ => Recovery::Wait(state),
        }
    }

    /// For the caller that was told [`Recovery::Ours`]: the lease is mapped, or scratch memory
    /// still is.
    pub(super) fn end_recovery(&self, mapped: bool) {
        // Nobody else moves the state in that phase. Going back is harmless: sections compare with
        // LIVE states only.
        if mapped {
            self.0
                .fetch_add(PHASES + LIVE - RECOVERING, Ordering::SeqCst);
        } else {
            self.0.fetch_sub(RECOVERING - LOST, Ordering::SeqCst);
        }
    }

    /// From `state` to the next phase, unless somebody else has moved it, to what is answered.
    fn step(&self, state: u32, phase: u32) -> Result<(), u32> {
        let next = state.wrapping_add(phase.wrapping_sub(state % PHASES));
        self.0
            .compare_exchange(state, next, Ordering::SeqCst, Ordering::Acquire)
            .map(drop)
    }

    /// Begins anew, for another mapping: from whatever phase the last one left to the next LIVE.
    /// Nobody else has it.
    pub(super) fn renew(&self) {
        let state = self.0.load(Ordering::Relaxed);
        let live = (state | (PHASES - 1)).wrapping_add(1);
        self.0.store(live, Ordering::Relaxed);
    }
}
