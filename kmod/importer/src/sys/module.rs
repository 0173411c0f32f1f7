// SPDX-License-Identifier: GPL-2.0

//! References to this module.

use kernel::prelude::*;

extern "C" {
    fn bli_module_get() -> bool;
    fn bli_module_put();
}

/// Keeps this module from being unloaded.
///
/// # Invariants
///
/// There is a reference to give back.
pub(crate) struct ModuleReference(());

impl ModuleReference {
    /// `ENODEV` when the module is being unloaded.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: May be called at any time.
        if unsafe { bli_module_get() } {
            // INVARIANT: It was just taken.
            Ok(Self(()))
        } else {
            Err(ENODEV)
        }
    }

    /// One that was taken and never dropped.
    ///
    /// # Safety
    ///
    /// There must be one, which nobody else gives back.
    pub(super) unsafe fn left() -> Self {
        // INVARIANT: By the caller.
        Self(())
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bli_module_put() };
    }
}
