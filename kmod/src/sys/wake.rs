// SPDX-License-Identifier: GPL-2.0

//! Wake-ups: run-time power management has brought a device back.
//!
//! A driver's own run-time operations are not to be had: the core replaces the driver's `pm` when a
//! device is registered, for all its devices. A PM domain stands before the bus's operations, which
//! call the driver's, and each device may have its own (`RPM_GET_CALLBACK` in
//! `drivers/base/power/runtime.c`). This one has the bus's operations, but for one.
//!
//! C header: [`include/linux/pm_domain.h`](srctree/include/linux/pm_domain.h)

use super::bindings;
use kernel::{prelude::*, types::Opaque};

/// The PM domain of one device. All zeroes is a domain that no device has.
#[repr(transparent)]
pub(super) struct Domain(Opaque<bindings::dev_pm_domain>);

/// What stands for the bus's `runtime_resume`, which it calls ([`bus_runtime_resume`]).
pub(super) type Resume = unsafe extern "C" fn(*mut bindings::device) -> c_int;

impl Domain {
    /// Has `resume` called in the place of the bus's `runtime_resume` of `dev`.
    ///
    /// Does nothing where the device has a PM domain already, which no PCI device without a driver
    /// has.
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
        // SAFETY: As above; the PCI bus has such operations.
        let mut ops = unsafe { *(*bus).pm };
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

/// The bus's `runtime_resume`.
///
/// # Safety
///
/// To be called by a [`Resume`] only, with its device.
pub(super) unsafe fn bus_runtime_resume(dev: *mut bindings::device) -> c_int {
    // SAFETY: A device with a driver has a bus.
    let bus = unsafe { (*dev).bus };
    // SAFETY: As above; `Domain::set` read these operations, which do not change.
    match unsafe { (*(*bus).pm).runtime_resume } {
        // SAFETY: This is the call that `resume` stands in for.
        Some(resume) => unsafe { resume(dev) },
        None => 0,
    }
}
