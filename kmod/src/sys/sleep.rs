// SPDX-License-Identifier: GPL-2.0

//! System sleep.
//!
//! A driver's own suspend operations are not to be had: the core replaces the driver's `pm` when a
//! device is registered. The notifiers run before user space is frozen.
//!
//! C header: [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use super::bindings;
use kernel::{container_of, error::to_result, prelude::*, sync::Arc, types::Opaque};

/// Who is told.
pub(crate) trait Sleeper: Send + Sync + 'static {
    /// The system is about to sleep, hibernate, or restore an image.
    fn fall_asleep(&self);

    /// It is awake again, or did not fall asleep after all. Once for each `fall_asleep`.
    fn wake_up(&self);
}

/// Tells a [`Sleeper`] until it is dropped.
///
/// # Invariants
///
/// `block` is registered.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct SleepNotifier<T: Sleeper> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    sleeper: Arc<T>,
}

// SAFETY: Notifiers are called and unregistered on any thread, and the sleeper may be used there.
unsafe impl<T: Sleeper> Send for SleepNotifier<T> {}
// SAFETY: As above.
unsafe impl<T: Sleeper> Sync for SleepNotifier<T> {}

impl<T: Sleeper> SleepNotifier<T> {
    /// Begins to tell.
    pub(crate) fn new(sleeper: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            sleeper,
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                let block = bindings::notifier_block {
                    notifier_call: Some(Self::call),
                    ..pin_init::zeroed()
                };
                // SAFETY: `slot` is valid for writes.
                unsafe { slot.write(block) };
                // SAFETY: The block is filled in, stays where it is, and is unregistered before it
                // goes away. The sleeper behind it is there already.
                to_result(unsafe { bindings::bl_register_pm_notifier(slot) })
            }),
        })
    }

    /// # Safety
    ///
    /// To be called by the PM core only, with the block of a notifier of `T`.
    unsafe extern "C" fn call(
        block: *mut bindings::notifier_block,
        event: c_ulong,
        _data: *mut c_void,
    ) -> c_int {
        let block = Opaque::cast_from(block);
        // SAFETY: The block is a member of a notifier.
        let notifier = unsafe { &*container_of!(block, Self, block) };
        match event as u32 {
            bindings::PM_SUSPEND_PREPARE
            | bindings::PM_HIBERNATION_PREPARE
            | bindings::PM_RESTORE_PREPARE => notifier.sleeper.fall_asleep(),
            bindings::PM_POST_SUSPEND
            | bindings::PM_POST_HIBERNATION
            | bindings::PM_POST_RESTORE => notifier.sleeper.wake_up(),
            _ => {}
        }
        bindings::NOTIFY_DONE as c_int
    }
}

#[pinned_drop]
impl<T: Sleeper> PinnedDrop for SleepNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the block is registered.
        unsafe { bindings::bl_unregister_pm_notifier(self.block.get()) };
    }
}
