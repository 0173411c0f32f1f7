// SPDX-License-Identifier: GPL-2.0

//! System sleep.
//!
//! A driver's own suspend operations are not to be had: the core replaces the driver's `pm` when a
//! device is registered. The notifiers run before user space is frozen.
//!
//! C header: [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use super::bindings;
use kernel::{prelude::*, types::Opaque};

/// The two events that a notifier is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SystemSleep {
    /// The system is about to sleep, hibernate, or restore an image.
    Begins,
    /// It is awake again, or did not fall asleep after all.
    Ends,
}

impl SystemSleep {
    /// Which of the two the kernel's `event` is, if either.
    pub(super) fn of(event: c_ulong) -> Option<Self> {
        match event as u32 {
            bindings::PM_SUSPEND_PREPARE
            | bindings::PM_HIBERNATION_PREPARE
            | bindings::PM_RESTORE_PREPARE => Some(Self::Begins),
            bindings::PM_POST_SUSPEND
            | bindings::PM_POST_HIBERNATION
            | bindings::PM_POST_RESTORE => Some(Self::Ends),
            _ => None,
        }
    }
}

/// The operation of a notifier: its block, the event, nothing.
pub(super) type Call =
    unsafe extern "C" fn(*mut bindings::notifier_block, c_ulong, *mut c_void) -> c_int;

/// A notifier. All zeroes is one that is not registered.
#[repr(transparent)]
pub(super) struct Notifier(Opaque<bindings::notifier_block>);

impl Notifier {
    /// Has `call` called.
    ///
    /// # Safety
    ///
    /// The notifier must not be registered, and must stay where it is until [`Self::unregister`].
    /// `call` may be called until then, with its block.
    pub(super) unsafe fn register(&self, call: Call) -> c_int {
        // SAFETY: By the caller nobody else knows the block.
        unsafe { (*self.0.get()).notifier_call = Some(call) };
        // SAFETY: The block is filled in, and stays where it is by the caller.
        unsafe { bindings::bl_register_pm_notifier(self.0.get()) }
    }

    /// Undoes [`Self::register`]; nothing is called any more when this returns.
    ///
    /// # Safety
    ///
    /// The notifier must be registered.
    pub(super) unsafe fn unregister(&self) {
        // SAFETY: By the caller.
        unsafe { bindings::bl_unregister_pm_notifier(self.0.get()) };
    }

    /// The notifier that a block is that of.
    pub(super) fn from_block(block: *mut bindings::notifier_block) -> *const Self {
        block.cast_const().cast()
    }
}
