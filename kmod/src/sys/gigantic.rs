// SPDX-License-Identifier: GPL-2.0

//! Entries of 1 GiB, which have to be gone before a VMA is cut, moved or copied.

use super::{
    flag::peek,
    idle::{self, Gate},
};
use core::marker::PhantomData;
use kernel::sync::atomic::{Acquire, Atomic, Full, Release};

/// The gate of the faults of a buffer, and whether they may insert entries of 1 GiB.
///
/// The kernel inserts such entries in mappings of device memory, protects and removes them. But it
/// oopses when a VMA is cut inside of one, and loses one that is moved without a flush of the TLB
/// (docs/kernel-defects.md). So there must be none in the page tables of any process when
/// that begins. The kernel says so (`may_split`, `open`) without naming the VMA that has the
/// entries, and faults go on meanwhile, in other processes as well. Therefore it is the buffer that
/// has them or not, and once it had to do without, it does for good.
///
/// # Invariants
///
/// - A fault inserts such an entry only while it is inside of `gate`, after it has found `gigantic`
///   to be [`USED`] there, or made it so ([`Permit`]).
/// - `gigantic` leaves [`UNUSED`] and [`USED`] once and for ever.
/// - While it is [`UNUSED`] or [`ENDED`], no page table has such an entry for the buffer.
///
/// The last one holds because it becomes [`ENDED`] either directly from [`UNUSED`], or by a thread
/// that has made it [`ENDING`], has then waited at the gate, and then has taken everything away. A
/// fault that found [`USED`] was inside when the thread looked at the gate, so its entry was there
/// and went: it is counted before it looks, and `gigantic` was changed before the thread looked at
/// the count, with a full barrier on either side.
pub(crate) struct EntryGate {
    gate: Gate,
    gigantic: Atomic<i8>,
}

/// None was inserted so far.
const UNUSED: i8 = 0;
/// There may be some.
const USED: i8 = 1;
/// No more are inserted. Those that there are go.
const ENDING: i8 = 2;
/// There is none, and there will be none.
const ENDED: i8 = 3;

impl EntryGate {
    /// Nobody is inside. `gigantic`: whether entries of 1 GiB are possible at all.
    pub(crate) fn new(gigantic: bool) -> Self {
        // INVARIANT: There is no page table for it yet.
        Self {
            gate: Gate::new(),
            gigantic: Atomic::new(if gigantic { UNUSED } else { ENDED }),
        }
    }

    /// Enters. A full barrier.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<'_> {
        Inside {
            gate: self,
            _inside: self.gate.enter(),
        }
    }

    /// Waits until those that are inside have left, as [`Gate::wait`].
    #[inline]
    pub(crate) fn wait(&self) {
        self.gate.wait();
    }

    /// Whether it makes sense to plan an entry of 1 GiB. [`Inside::permit`] decides.
    #[inline]
    pub(crate) fn may_be_gigantic(&self) -> bool {
        peek(&self.gigantic) <= USED
    }

    /// When this returns, no page table has an entry of 1 GiB, and none will have one: `take_away`
    /// removes all entries of the buffer that were inserted before it was called.
    ///
    /// A thread that comes while another one is about it does all of it itself: it must not go on
    /// before they are gone either.
    pub(crate) fn end_gigantic(&self, take_away: impl FnOnce()) {
        if self.gigantic.load(Acquire) == ENDED {
            return;
        }
        // INVARIANT: There was none up to the exchange, and after it no fault gets a permit.
        if self.gigantic.cmpxchg(UNUSED, ENDED, Full).is_ok() {
            return;
        }
        // Another thread may have come to the end meanwhile. To do it once more does no harm.
        self.gigantic.xchg(ENDING, Full);
        self.gate.wait();
        take_away();
        // INVARIANT: See above.
        self.gigantic.store(ENDED, Release);
    }
}

/// A thread is inside of an [`EntryGate`]; it leaves when this is dropped.
#[must_use]
pub(crate) struct Inside<'a> {
    gate: &'a EntryGate,
    _inside: idle::Inside<'a>,
}

impl Inside<'_> {
    /// The permission to insert an entry of 1 GiB before this thread leaves; `None` when there must
    /// be no more of them.
    #[inline]
    pub(crate) fn permit(&self) -> Option<Permit<'_>> {
        let state = &self.gate.gigantic;
        let used = match peek(state) {
            UNUSED => match state.cmpxchg(UNUSED, USED, Full) {
                Ok(_) => true,
                Err(state) => state == USED,
            },
            state => state == USED,
        };
        // INVARIANT: It was found to be so, inside.
        used.then_some(Permit(PhantomData))
    }
}

/// The permission to insert an entry of 1 GiB.
///
/// # Invariants
///
/// The thread is inside of the [`EntryGate`] as long as this lives, and has found entries of 1 GiB
/// to be allowed there.
pub(crate) struct Permit<'a>(PhantomData<&'a ()>);
