// SPDX-License-Identifier: GPL-2.0

//! Waiting until nothing is under way.
//!
//! The kernel finds the threads that wait by the address of the count, so a count costs four bytes.
//!
//! C header: [`include/linux/wait_bit.h`](srctree/include/linux/wait_bit.h)

use super::bindings;
use kernel::{prelude::*, types::Opaque};

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
