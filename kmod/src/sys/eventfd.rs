// SPDX-License-Identifier: GPL-2.0

//! Telling user space that something has changed.
//!
//! C header: [`include/linux/eventfd.h`](srctree/include/linux/eventfd.h)

use super::bindings;
use kernel::{error::to_result, prelude::*, types::Opaque};

/// A place for an eventfd.
///
/// # Invariants
///
/// `inner` is initialized.
#[pin_data(PinnedDrop)]
pub(crate) struct EventSlot {
    #[pin]
    inner: Opaque<bindings::bl_event_slot>,
}

// SAFETY: A spin lock guards what is in the slot, which may be used from any thread.
unsafe impl Send for EventSlot {}
// SAFETY: As above.
unsafe impl Sync for EventSlot {}

impl EventSlot {
    /// Empty.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes and stays where it is; all of it is initialized.
            inner <- Opaque::ffi_init(|slot| unsafe { bindings::bl_event_slot_init(slot) }),
        })
    }

    /// Puts the eventfd `fd` of the current process into the place of what was there. `EBADF` no
    /// such fd, `EINVAL` something else.
    pub(crate) fn set(&self, fd: i32) -> Result {
        // SAFETY: By the type invariant the slot is initialized; any number may be asked for.
        to_result(unsafe { bindings::bl_event_slot_set(self.inner.get(), fd) })
    }

    /// Leaves it empty.
    pub(crate) fn clear(&self) {
        // SAFETY: By the type invariant the slot is initialized.
        unsafe { bindings::bl_event_slot_clear(self.inner.get()) };
    }

    /// Whether there is an eventfd.
    #[inline]
    pub(crate) fn is_set(&self) -> bool {
        // SAFETY: Computes an address inside of the slot.
        let place = unsafe { &raw const (*self.inner.get()).ctx };
        // SAFETY: The slot is valid; the pointer may change at any time, so it is read once.
        !unsafe { place.read_volatile() }.is_null()
    }

    /// Adds 1 to the eventfd, if there is one. Allocates nothing and does not sleep; may be called
    /// in any context but that of a non-maskable interrupt.
    #[inline]
    pub(crate) fn signal(&self) {
        if self.is_set() {
            // SAFETY: By the type invariant the slot is initialized.
            unsafe { bindings::bl_event_slot_signal(self.inner.get()) };
        }
    }
}

#[pinned_drop]
impl PinnedDrop for EventSlot {
    fn drop(self: Pin<&mut Self>) {
        self.clear();
    }
}
