// SPDX-License-Identifier: GPL-2.0

//! Reader-writer semaphores.
//!
//! C header: [`include/linux/rwsem.h`](srctree/include/linux/rwsem.h)

use super::bindings;
use core::{
    cell::UnsafeCell,
    marker::PhantomData,
    ops::{Deref, DerefMut},
};
use kernel::{prelude::*, types::NotThreadSafe, types::Opaque};

/// Data that many may read or one may write. Sleeps.
///
/// All are of one lock class: do not hold two at a time.
#[pin_data]
pub(crate) struct RwSem<T> {
    #[pin]
    sem: Opaque<bindings::rw_semaphore>,
    data: UnsafeCell<T>,
}

// SAFETY: The semaphore may be used from any thread, and sending it sends the data.
unsafe impl<T: Send> Send for RwSem<T> {}

// SAFETY: Shared access to the data is guarded by the semaphore: readers get `&T` at the same time
// (`T: Sync`), a writer gets `&mut T` on whatever thread it runs (`T: Send`).
unsafe impl<T: Send + Sync> Sync for RwSem<T> {}

impl<T> RwSem<T> {
    /// An unlocked semaphore around `data`.
    pub(crate) fn new(data: T) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes and stays where it is; `init_rwsem` initializes
            // all of it.
            sem <- Opaque::ffi_init(|slot| unsafe { bindings::bl_init_rwsem(slot) }),
            data: UnsafeCell::new(data),
        })
    }

    /// Waits for writers and locks for reading.
    pub(crate) fn read(&self) -> ReadGuard<'_, T> {
        // SAFETY: The semaphore was initialized by `new` and is pinned.
        unsafe { bindings::down_read(self.sem.get()) };
        // INVARIANT: The semaphore was just locked for reading.
        ReadGuard {
            lock: self,
            _not_send: NotThreadSafe,
        }
    }

    /// Waits for everybody else and locks for writing.
    pub(crate) fn write(&self) -> WriteGuard<'_, T> {
        // SAFETY: The semaphore was initialized by `new` and is pinned.
        unsafe { bindings::down_write(self.sem.get()) };
        // INVARIANT: The semaphore was just locked for writing.
        WriteGuard {
            lock: self,
            _not_send: NotThreadSafe,
            _exclusive: PhantomData,
        }
    }
}

/// A lock for reading; unlocks when dropped.
///
/// # Invariants
///
/// The current thread holds `lock` for reading.
#[must_use]
pub(crate) struct ReadGuard<'a, T> {
    lock: &'a RwSem<T>,
    _not_send: NotThreadSafe,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: By the type invariant nobody writes while the guard lives.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this thread holds the semaphore for reading.
        unsafe { bindings::up_read(self.lock.sem.get()) };
    }
}

/// A lock for writing; unlocks when dropped.
///
/// # Invariants
///
/// The current thread holds `lock` for writing.
#[must_use]
pub(crate) struct WriteGuard<'a, T> {
    lock: &'a RwSem<T>,
    _not_send: NotThreadSafe,
    _exclusive: PhantomData<&'a mut T>,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: By the type invariant nobody else reaches the data while the guard lives.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: By the type invariant nobody else reaches the data while the guard lives.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this thread holds the semaphore for writing.
        unsafe { bindings::up_write(self.lock.sem.get()) };
    }
}
