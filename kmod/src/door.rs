// SPDX-License-Identifier: GPL-2.0

//! The door for reads and writes through the device fd: they reach a BAR when leases of it may be
//! touched.
//!
//! The core looks at its own copy of COMMAND and at D3hot only, so it would let an access through
//! in D1 and D2, in a reset through sysfs, and between an error and the end of its recovery. A
//! refusal here is the core's own answer, `EIO`, in the core's own order: another fault of the
//! access comes first, as it does there (`vfio_pci_bar_rw`,
//! `vfio_pci_core_do_io_rw`).
//!
//! An access that saw an open door may still be on its way when the event begins.

use crate::{
    bound::Barlease,
    model::access::Reasons,
    sampling,
    sys::vfio_pci::{Answer, BARS, Device, OFFSET_SHIFT, UserBuffer},
};
use kernel::{
    prelude::*,
    time::{Delta, delay::fsleep},
};

/// The region index at a position in the device fd.
pub(crate) fn region_of(position: i64) -> u64 {
    position as u64 >> OFFSET_SHIFT
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// To the process.
    Read,
    /// To the device.
    Write,
}

impl Way {
    fn pass(self, device: &Device<'_, Barlease>, buffer: UserBuffer, position: &mut i64) -> Answer {
        match self {
            Self::Read => device.core_read(buffer, position),
            Self::Write => device.core_write(buffer, position),
        }
    }
}

/// How long an access waits for a config write that is going on, in steps of a millisecond. Only
/// one that has importers to wait for takes as long.
const PATIENCE: u32 = 100;

/// A read or a write at a position in the device fd that is in no alias.
pub(crate) fn access(
    device: &Device<'_, Barlease>,
    buffer: UserBuffer,
    position: &mut i64,
    way: Way,
) -> Answer {
    let region = region_of(*position);
    if region >= u64::from(BARS) || !device.driver().leases().is_shut() {
        return way.pass(device, buffer, position);
    }
    // An access ends low power for its time: the core wakes the device for it. So does this, since
    // the device is to be asked when it is awake. If that fails it fails in the core, too.
    let _awake = device.wake();
    sampling::notice_wake_up(device);
    if is_open(device) {
        return way.pass(device, buffer, position);
    }
    // CAST: Below the number of BARs.
    refuse(device, region as u32, buffer, position, way)
}

/// Whether the memory of a device that is awake may be touched, or might have been since this was
/// called.
fn is_open(device: &Device<'_, Barlease>) -> bool {
    let leases = device.driver().leases();
    let openings = leases.openings();
    for _ in 0..PATIENCE {
        match leases.reasons_when_awake() {
            Reasons::NONE => return true,
            // Most config writes leave memory on, and are over at once. Stock vfio-pci has accesses
            // wait for them. Another one may have begun by the time at which this thread looks.
            Reasons::CONFIG_WRITE if leases.openings() != openings => return true,
            Reasons::CONFIG_WRITE => fsleep(Delta::from_millis(1)),
            _ => return false,
        }
    }
    false
}

/// The core's answer to an access of a BAR that may not be touched.
fn refuse(
    device: &Device<'_, Barlease>,
    bar: u32,
    buffer: UserBuffer,
    position: &mut i64,
    way: Way,
) -> Answer {
    let offset = *position as u64 & ((1 << OFFSET_SHIFT) - 1);
    let left = match device.bar(bar) {
        Ok(bar) => bar.length().saturating_sub(offset),
        // No memory: not there, or port numbers.
        Err(_) => 0,
    };
    let len = left.min(buffer.len() as u64);
    if len == 0 {
        return way.pass(device, buffer, position);
    }
    let hole = device.hole(bar);
    let mut skipped = 0;
    if hole.contains(&offset) {
        // This part reaches nothing.
        skipped = len.min(hole.end - offset);
        let mut at = *position;
        let answer = way.pass(device, buffer.part(0, skipped as usize), &mut at);
        if skipped == len {
            *position = at;
            return answer;
        }
        if let Err(error) = answer.into_result() {
            return Err(error).into();
        }
    }
    // The core reads what is to be written, as much of it as goes to the device at once, before it
    // looks whether it may.
    let first = first_access(offset + skipped, len - skipped, hole.start);
    let readable = buffer.is_readable(skipped as usize, first as usize);
    if way == Way::Write && !readable {
        return Err(EFAULT).into();
    }
    Err(EIO).into()
}

/// Bytes of the first of the accesses to the device that the core makes of one, where `hole` is the
/// next offset that is left out.
fn first_access(offset: u64, len: u64, hole: u64) -> u64 {
    let len = match hole.checked_sub(offset) {
        Some(before) if before != 0 => len.min(before),
        _ => len,
    };
    let fits = |size: &u64| *size <= len && offset % size == 0;
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}
