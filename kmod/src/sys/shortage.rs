// SPDX-License-Identifier: GPL-2.0

//! Doing without failing what needs a little memory, where memory is short: what takes a device's
//! memory away must not fail.

use super::bindings;
use core::convert::Infallible;
use kernel::{
    error::to_result,
    prelude::*,
    time::{Delta, delay::fsleep},
};

/// How long a thread waits for memory before it tries again.
const PAUSE_MS: u32 = 10;

/// Runs `f` until it does not fail for want of memory; `pause` waits in between, or gives up.
pub(crate) fn until_there_is_memory<T, E>(
    mut pause: impl FnMut() -> Result<(), E>,
    mut f: impl FnMut() -> Result<T>,
) -> Result<T, E> {
    loop {
        if let Ok(value) = f() {
            return Ok(value);
        }
        pause()?;
    }
}

/// Waits a while.
pub(crate) fn pause() -> Result<(), Infallible> {
    fsleep(Delta::from_millis(i64::from(PAUSE_MS)));
    Ok(())
}

/// Waits a while. `EINTR` when a fatal signal has come.
pub(crate) fn pause_unless_killed() -> Result {
    // SAFETY: The caller is a system call, which may sleep.
    to_result(unsafe { bindings::bl_sleep_killable(PAUSE_MS) })
}
