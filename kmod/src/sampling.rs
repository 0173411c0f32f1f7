// SPDX-License-Identifier: GPL-2.0

//! Asking the device whether its memory may be touched: see the table of registers in
//! [`model::access`](crate::model::access).

use crate::{
    bound::Barlease,
    model::access::{Access, Event, Sampled},
    sys::vfio_pci::{Device, Function, MemoryRead},
    taking::Wait,
};

/// Whether the hardware's COMMAND lacks the memory bit. A function that sleeps, or is in reset, is
/// not asked: the thread that wakes it or ends the reset asks it.
///
/// With the core's lock held the core has not lent the bit. Without it, the thread that may have
/// lent it is counted; nothing good is believed then, and the lender asks when it is done.
fn is_undecoded(function: &Function<'_>, access: &Access, lock: Option<&MemoryRead<'_>>) -> bool {
    if function.is_sleeping() || !access.may_ask() {
        return access.sampled().undecoded;
    }
    lock.is_none() && access.is_lent() || !function.decodes_memory()
}

/// Samples the hardware again: COMMAND and the power state. The virtual COMMAND and the request for
/// low power do not change here, and close may be freeing the virtual config space. A closed device
/// is sampled by `opened`.
pub(crate) fn resample(
    function: &Function<'_>,
    access: &mut Access,
    lock: Option<&MemoryRead<'_>>,
) {
    if access.epoch().is_none() {
        return;
    }
    access.set_sampled(Sampled {
        undecoded: is_undecoded(function, access, lock),
        sleeping: function.is_sleeping(),
        ..access.sampled()
    });
}

/// Samples everything.
pub(crate) fn sample(
    device: &Device<'_, Barlease>,
    access: &Access,
    lock: Option<&MemoryRead<'_>>,
) -> Sampled {
    let function = device.function();
    let memory_off = device.memory_is_off();
    Sampled {
        memory_off,
        // Not asked where it makes no difference: it is a read from the bus.
        undecoded: !memory_off && is_undecoded(&function, access, lock),
        sleeping: function.is_sleeping(),
        low_power: device.is_in_low_power(),
    }
}

/// Lets `act` happen with no memory of the device reachable, then asks the device what is so now.
pub(crate) fn bracketed<R>(
    device: &Device<'_, Barlease>,
    event: Event,
    act: impl FnOnce() -> R,
) -> R {
    let leases = device.driver().leases();
    leases.begin(event, Wait::Yes);
    let result = act();
    // "Memory is off" is believed without the lock: a thread that turns it on again has a bracket of
    // its own, and samples after this. Else the lock is waited for: unless the core refused it, `act`
    // had it for writing, and waited as long for it.
    let lock = (!device.memory_is_off()).then(|| device.memory().read());
    leases.update(|access| {
        let sampled = sample(device, access, lock.as_ref());
        access.set_sampled(sampled);
        access.end(event);
    });
    result
}

/// Resets, hot resets and `sriov_configure` set D0, and LOW_POWER_EXIT ends low power, without a
/// callback. So every access through the fd samples again afterwards if the last sample said
/// "asleep". A device that was awake then cannot have slept and been woken since without
/// `runtime_resume`.
pub(crate) fn notice_wake_up(device: &Device<'_, Barlease>) {
    if device.driver().leases().is_asleep() {
        try_to_ask(*device);
    }
}

#[cold]
fn try_to_ask(device: Device<'_, Barlease>) {
    // A thread that has the lock for writing asks when its own operation ends. To wait for it here
    // would tie REVOKE of one lease to the importer of another, which a reset may be waiting for.
    if let Some(lock) = device.memory().try_read() {
        ask(device, &lock);
    }
}

pub(crate) fn ask(device: Device<'_, Barlease>, lock: &MemoryRead<'_>) {
    let leases = device.driver().leases();
    leases.update(|access| {
        let sampled = sample(&device, access, Some(lock));
        access.set_sampled(sampled);
    });
}
