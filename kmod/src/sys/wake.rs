// SPDX-License-Identifier: GPL-2.0

//! Run-time power management of a device: noticing that it was woken, and keeping it from falling
//! asleep.
//!
//! A driver's own run-time operations are not to be had: the core replaces the driver's `pm` when a
//! device is registered, for all its devices. A PM domain stands before the bus's operations, which
//! call the driver's, and each device may have its own (`RPM_GET_CALLBACK` in
//! `drivers/base/power/runtime.c`). This one has the bus's operations, but for one. The mei driver
//! does the same for the same reason (`mei_me_set_pm_domain` in `drivers/misc/mei/pci-me.c`).
//!
//! C header: [`include/linux/pm_domain.h`](srctree/include/linux/pm_domain.h)

use super::bindings;
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
    types::Opaque,
};

/// The PM domain of one device. All zeroes is one that is not set.
#[repr(transparent)]
pub(super) struct Domain(Opaque<bindings::dev_pm_domain>);

/// A function that is called in the place of the bus's `runtime_resume`, and calls that
/// ([`bus_runtime_resume`]).
pub(super) type Resume = unsafe extern "C" fn(*mut bindings::device) -> c_int;

impl Domain {
    /// Has `resume` called in the place of the bus's `runtime_resume` of `dev`.
    ///
    /// Does nothing where the device has a PM domain already, which no PCI device without a driver
    /// has, and where the bus has no such operations: on a kernel without `CONFIG_PM` nothing wakes
    /// devices, nor puts them to sleep.
    ///
    /// # Safety
    ///
    /// The driver of `dev` must be probing it. The domain must stay where it is, and not be used
    /// otherwise, until [`Self::clear`].
    pub(super) unsafe fn set(&self, dev: *mut bindings::device, resume: Resume) {
        // SAFETY: `dev` is valid; nobody changes its domain while it is being probed.
        if !unsafe { (*dev).pm_domain }.is_null() {
            return;
        }
        // SAFETY: A device that is being probed has a bus.
        let bus = unsafe { (*dev).bus };
        // SAFETY: As above.
        let ops = unsafe { (*bus).pm };
        if ops.is_null() {
            return;
        }
        // SAFETY: The operations of a bus are static.
        let mut ops = unsafe { *ops };
        ops.runtime_resume = Some(resume);
        // SAFETY: Nobody else knows the domain yet.
        unsafe { (*self.0.get()).ops = ops };
        // SAFETY: The device is being probed and so not bound yet, and the domain is filled in.
        unsafe { bindings::bl_pm_domain_set(dev, self.0.get()) };
    }

    /// Undoes [`Self::set`].
    ///
    /// # Safety
    ///
    /// The driver of `dev` must be probing or removing it, with its run-time power management held.
    pub(super) unsafe fn clear(&self, dev: *mut bindings::device) {
        // SAFETY: As in `set`.
        if unsafe { (*dev).pm_domain } != self.0.get() {
            return;
        }
        // SAFETY: No operation of the domain is running, and none begins after this.
        unsafe { bindings::bl_pm_domain_set(dev, core::ptr::null_mut()) };
    }
}

/// Holds that keep one device from falling asleep, for the time of a reset. All zeroes is none.
///
/// Falling asleep saves the device's config space (`pci_pm_runtime_suspend`). In the middle of a
/// reset that is what the reset has left of it, which the reset's end then restores: base addresses
/// of zero. The kernel keeps a function awake while that function alone is reset, and while a hot
/// reset is made through the device fd; but not the functions behind a bridge that is reset
/// (`reset_subordinate` of sysfs).
#[repr(transparent)]
pub(super) struct Awake(Atomic<u32>);

impl Awake {
    /// Keeps `dev` from falling asleep until [`Self::release`]. If it is about to, waits until it
    /// is done with that. One that sleeps is not woken.
    ///
    /// # Safety
    ///
    /// `dev` must be valid. The lock of the device must be held, and no lock that its run-time
    /// operations take, unless it is held awake already.
    pub(super) unsafe fn hold(&self, dev: *mut bindings::device) {
        // SAFETY: `dev` is valid by the caller.
        unsafe { bindings::bl_pm_runtime_get_noresume(dev) };
        // With the usage count raised, an RPM_ACTIVE device cannot start to suspend (rpm_suspend()
        // checks the count under power.lock). A transition that is running is waited for. Pending
        // work of an active device is not flushed: it may need a lock that our caller holds.
        // SAFETY: As above.
        if !unsafe { bindings::bl_pm_runtime_is_active(dev) } {
            // SAFETY: As above. It was not held awake, so the caller has no lock that matters.
            unsafe { bindings::bl_pm_runtime_barrier(dev) };
        }
        self.0.fetch_add(1, Relaxed);
    }

    /// Undoes one [`Self::hold`]; nothing if there was none.
    ///
    /// # Safety
    ///
    /// `dev` must be that of `hold`, and its lock must be held.
    pub(super) unsafe fn release(&self, dev: *mut bindings::device) {
        // The device's lock is held, so nobody is in between.
        let holds = self.0.load(Relaxed);
        if holds != 0 {
            self.0.store(holds - 1, Relaxed);
            // SAFETY: `dev` is valid by the caller. Gives back what `hold` took.
            unsafe { bindings::bl_pm_runtime_put(dev) };
        }
    }
}

/// The bus's `runtime_resume`.
///
/// # Safety
///
/// To be called by a [`Resume`] only, with its device.
pub(super) unsafe fn bus_runtime_resume(dev: *mut bindings::device) -> c_int {
    // SAFETY: A device with a driver has a bus.
    let bus = unsafe { (*dev).bus };
    // SAFETY: As above; `Domain::set` read these operations, so they are there, and do not change.
    match unsafe { (*(*bus).pm).runtime_resume } {
        // SAFETY: This is the call that `resume` stands in for.
        Some(resume) => unsafe { resume(dev) },
        None => 0,
    }
}
