// SPDX-License-Identifier: GPL-2.0

//! Waiting until nothing is under way.
//!
//! The kernel finds the threads that wait by the address of the count, so a count costs four bytes.
//!
//! C header: [`include/linux/wait_bit.h`](srctree/include/linux/wait_bit.h)

use super::bindings;
use kernel::{
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full},
    types::{NotThreadSafe, Opaque},
};

/// The number of things that are under way.
pub(crate) struct Outstanding(Opaque<bindings::atomic_t>);

// SAFETY: A number, which belongs to no thread.
unsafe impl Send for Outstanding {}
// SAFETY: All that is done with the count are atomic operations.
unsafe impl Sync for Outstanding {}

impl Outstanding {
    /// None.
    pub(crate) fn none() -> Self {
        Self(Opaque::new(bindings::atomic_t { counter: 0 }))
    }

    /// One more.
    pub(crate) fn begin(&self) {
        // SAFETY: The count is valid.
        unsafe { bindings::bl_count_up(self.0.get()) };
    }

    /// One less. A thread that then finds none sees all that it did.
    pub(crate) fn end(&self) {
        // SAFETY: The count is valid.
        unsafe { bindings::bl_count_down(self.0.get()) };
    }

    /// Whether there is any now.
    pub(crate) fn any(&self) -> bool {
        // SAFETY: The count is valid.
        unsafe { bindings::bl_count_any(self.0.get()) }
    }

    /// How many there are now.
    pub(crate) fn count(&self) -> u32 {
        // SAFETY: The count is valid.
        unsafe { bindings::bl_count_read(self.0.get()) }
    }

    /// Waits until there is none, or `milliseconds`: whether there is none. `EINTR` when a fatal
    /// signal comes meanwhile; no other signal matters.
    pub(crate) fn wait_killable(&self, milliseconds: u32) -> Result<bool> {
        // SAFETY: The count is valid while it is waited for.
        match unsafe { bindings::bl_count_wait_killable(self.0.get(), milliseconds) } {
            ..0 => Err(EINTR),
            0 => Ok(false),
            1.. => Ok(true),
        }
    }

    /// Waits until there is none, or `milliseconds`: whether there is none. Cannot be interrupted.
    pub(crate) fn wait(&self, milliseconds: u32) -> bool {
        // SAFETY: The count is valid while it is waited for.
        unsafe { bindings::bl_count_wait(self.0.get(), milliseconds) }
    }
}

/// A section that threads are inside of for a moment, without sleeping there.
///
/// A thread that shuts a door, and then waits until nobody is inside, knows that whoever saw the
/// door open has left: a thread enters before it looks at the door, the door is shut before this
/// one looks whether somebody is inside, and between the two there is a full barrier on either
/// side. Threads that come later keep nobody waiting if they look at the door before they enter,
/// too.
pub(crate) struct Gate(Atomic<i32>);

/// A thread is inside of a [`Gate`]; it leaves when this is dropped.
///
/// # Invariants
///
/// This thread was counted when it entered.
#[must_use]
pub(crate) struct Inside<'a>(&'a Gate, NotThreadSafe);

impl Gate {
    /// Nobody is inside.
    pub(crate) fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Enters. A full barrier.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<'_> {
        self.0.fetch_add(1, Full);
        // INVARIANT: Just counted.
        Inside(self, NotThreadSafe)
    }

    /// Waits until those that are inside have left, and sees all that they did. A full barrier must
    /// come before it.
    #[inline]
    pub(crate) fn wait(&self) {
        if self.0.load(Acquire) != 0 {
            // SAFETY: The count is valid while it is waited for.
            unsafe { bindings::bl_count_wait_for_none(self.as_raw()) };
        }
    }

    fn as_raw(&self) -> *mut bindings::atomic_t {
        // An `atomic_t` is its counter.
        self.0.as_ptr().cast()
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: The count is valid; by the type invariant this thread is counted.
        unsafe { bindings::bl_count_down(self.0.as_raw()) };
    }
}
