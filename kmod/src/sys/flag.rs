// SPDX-License-Identifier: GPL-2.0

//! Flags that are read much more often than they change.
//!
//! A load of the kernel's atomic types is a call of a C function, which on a path of a thousand
//! instructions shows. This one is `READ_ONCE` and `WRITE_ONCE`: a volatile access
//! (`include/asm-generic/rwonce.h`).

use core::cell::UnsafeCell;
use kernel::sync::atomic::{Atomic, AtomicType};

/// Reads an atomic as `READ_ONCE` does: [`Atomic::load`] with `Relaxed`, in place.
#[inline]
pub(crate) fn peek<T: AtomicType>(atomic: &Atomic<T>) -> T {
    // SAFETY: The pointer is valid. The kernel's memory model has a volatile access of a word as a
    // marked one, which may be beside atomic ones.
    unsafe { atomic.as_ptr().read_volatile() }
}

/// A flag. It orders nothing around it.
pub(crate) struct Flag(UnsafeCell<bool>);

// SAFETY: A byte is read and written as a whole, by volatile accesses, which the kernel's memory
// model has as marked accesses: concurrent ones are no data race.
unsafe impl Sync for Flag {}

impl Flag {
    /// Not set.
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new(false))
    }

    /// Whether it is set.
    #[inline]
    pub(crate) fn get(&self) -> bool {
        // SAFETY: The pointer is valid; see above.
        unsafe { self.0.get().read_volatile() }
    }

    /// Sets or clears it.
    pub(crate) fn set(&self, value: bool) {
        // SAFETY: The pointer is valid; see above.
        unsafe { self.0.get().write_volatile(value) };
    }
}
