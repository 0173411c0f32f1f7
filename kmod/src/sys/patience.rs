// SPDX-License-Identifier: GPL-2.0

//! Going on where memory is short, or where somebody has a lock: what takes a device's memory away
//! must not fail.

use super::{
    bindings,
    dma_buf::{Live, LiveGuard},
};
use core::{convert::Infallible, result::Result};
use kernel::{
    error::to_result,
    prelude::*,
    time::{Delta, delay::fsleep},
};

/// How long a thread waits before it tries again.
const PAUSE_MS: u32 = 10;

/// The patience of a thread while it tells importers, and its reason to give up.
pub(crate) trait Patience {
    /// The reason.
    type Error;

    /// Waits a while, before it tries again.
    fn pause(&mut self) -> Result<(), Self::Error>;

    /// Locks the way to a dma-buf. Another thread that has it may be waiting for the reservation
    /// lock.
    fn live<'a, U: Send>(&mut self, live: &'a Live<U>) -> Result<LiveGuard<'a>, Self::Error> {
        loop {
            if let Some(guard) = live.try_lock() {
                return Ok(guard);
            }
            self.pause()?;
        }
    }

    /// Takes a reservation lock, which an importer may keep as long as it likes.
    ///
    /// # Safety
    ///
    /// `resv` must be valid, and not locked by this thread.
    unsafe fn lock(&mut self, resv: *mut bindings::dma_resv) -> Result<(), Self::Error>;
}

/// Goes on for ever.
pub(crate) struct Endless;

impl Patience for Endless {
    type Error = Infallible;

    fn pause(&mut self) -> Result<(), Infallible> {
        fsleep(Delta::from_millis(i64::from(PAUSE_MS)));
        Ok(())
    }

    fn live<'a, U: Send>(&mut self, live: &'a Live<U>) -> Result<LiveGuard<'a>, Infallible> {
        Ok(live.lock())
    }

    unsafe fn lock(&mut self, resv: *mut bindings::dma_resv) -> Result<(), Infallible> {
        // SAFETY: By the caller. Without an acquire context locking cannot fail.
        unsafe { bindings::dma_resv_lock(resv, core::ptr::null_mut()) };
        Ok(())
    }
}

/// Goes on until a fatal signal comes: `EINTR`. For a system call.
pub(crate) struct UntilKilled;

impl Patience for UntilKilled {
    type Error = Error;

    fn pause(&mut self) -> Result<(), Error> {
        // SAFETY: A system call may sleep.
        to_result(unsafe { bindings::bl_sleep_killable(PAUSE_MS) })
    }

    unsafe fn lock(&mut self, resv: *mut bindings::dma_resv) -> Result<(), Error> {
        // SAFETY: By the caller.
        to_result(unsafe { bindings::bl_resv_lock_killable(resv) })
    }
}

/// Gives up after so many pauses: `EBUSY`.
pub(crate) struct Pauses(pub(crate) u32);

impl Patience for Pauses {
    type Error = Error;

    fn pause(&mut self) -> Result<(), Error> {
        self.0 = self.0.checked_sub(1).ok_or(EBUSY)?;
        let Ok(()) = Endless.pause();
        Ok(())
    }

    unsafe fn lock(&mut self, resv: *mut bindings::dma_resv) -> Result<(), Error> {
        // SAFETY: By the caller.
        while !unsafe { bindings::bl_resv_trylock(resv) } {
            self.pause()?;
        }
        Ok(())
    }
}

/// Runs `f` until it does not fail for want of memory.
pub(crate) fn until_there_is_memory<T, P: Patience>(
    patience: &mut P,
    mut f: impl FnMut(&mut P) -> Result<Result<T, Error>, P::Error>,
) -> Result<T, P::Error> {
    loop {
        if let Ok(value) = f(patience)? {
            return Ok(value);
        }
        patience.pause()?;
    }
}
