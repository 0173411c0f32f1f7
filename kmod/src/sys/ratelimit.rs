// SPDX-License-Identifier: GPL-2.0

//! Limits on how often a message is logged.
//!
//! C header: [`include/linux/ratelimit.h`](srctree/include/linux/ratelimit.h)

use super::bindings;
use kernel::{prelude::*, types::Opaque};

/// Lets through the kernel's default of 10 messages in 5 seconds.
#[pin_data]
pub(crate) struct Ratelimit {
    #[pin]
    state: Opaque<bindings::ratelimit_state>,
}

// SAFETY: `___ratelimit` locks the state itself.
unsafe impl Send for Ratelimit {}
// SAFETY: `___ratelimit` locks the state itself.
unsafe impl Sync for Ratelimit {}

impl Ratelimit {
    /// A new limit, nothing of it used up.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes and stays where it is; all of it is initialized.
            state <- Opaque::ffi_init(|slot| unsafe { bindings::bl_ratelimit_init(slot) }),
        })
    }

    /// Whether one more message may be logged now.
    pub(crate) fn allows(&self) -> bool {
        // SAFETY: The state was initialized by `new` and is pinned; the name is a C string.
        unsafe { bindings::___ratelimit(self.state.get(), c"barlease".as_char_ptr()) != 0 }
    }
}
