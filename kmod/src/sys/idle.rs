// SPDX-License-Identifier: GPL-2.0

//! Waiting until nothing is in use.
//!
//! C header: [`include/linux/completion.h`](srctree/include/linux/completion.h)

use super::bindings;
use kernel::{prelude::*, time::msecs_to_jiffies, types::Opaque};

/// Something that is idle or busy. Users say which, one at a time.
#[pin_data]
pub(crate) struct Idle {
    #[pin]
    completion: Opaque<bindings::completion>,
}

// SAFETY: Completions may be used from any thread.
unsafe impl Send for Idle {}
// SAFETY: Completions may be used from any thread.
unsafe impl Sync for Idle {}

impl Idle {
    /// Idle.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes and stays where it is; all of it is initialized.
            completion <- Opaque::ffi_init(|slot| unsafe { bindings::bl_init_completed(slot) }),
        })
    }

    /// Busy from now on. Nobody may be waiting, nor begin to before `set_idle`.
    pub(crate) fn set_busy(&self) {
        // SAFETY: The completion was initialized by `new`.
        unsafe { bindings::bl_reinit_completion(self.completion.get()) };
    }

    /// Idle from now on.
    pub(crate) fn set_idle(&self) {
        // SAFETY: The completion was initialized by `new`.
        unsafe { bindings::complete_all(self.completion.get()) };
    }

    /// Whether it is idle now. A wait of no time would sleep to the next tick of the clock.
    pub(crate) fn is_idle(&self) -> bool {
        // SAFETY: The completion was initialized by `new`.
        unsafe { bindings::completion_done(self.completion.get()) }
    }

    /// Waits until it is idle, or `milliseconds`: whether it is. Cannot be interrupted.
    pub(crate) fn wait(&self, milliseconds: u32) -> bool {
        let timeout = msecs_to_jiffies(milliseconds);
        // SAFETY: The completion was initialized by `new`.
        unsafe { bindings::wait_for_completion_timeout(self.completion.get(), timeout) != 0 }
    }
}
