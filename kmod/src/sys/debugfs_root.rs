// SPDX-License-Identifier: GPL-2.0

//! The module's directory in debugfs, which functions find when they are bound.

use kernel::{
    debugfs::Dir,
    prelude::*,
    sync::atomic::{Acquire, Atomic, Relaxed, Release},
};

kernel::sync::global_lock! {
    // SAFETY: Nobody takes the lock before `STATE` is READY, which `Root::new` sets after it has
    // initialized the lock.
    unsafe(uninit) static ROOT: Mutex<Option<Dir>> = None;
}

/// Of `ROOT`: 0 untouched, then [`CLAIMED`], then [`READY`].
static STATE: Atomic<i32> = Atomic::new(0);
/// One thread initializes it, or has done so.
const CLAIMED: i32 = 1;
/// It can be used.
const READY: i32 = 2;

/// Keeps the directory; removes it when dropped.
pub(crate) struct Root(());

impl Root {
    /// Makes `dir` the module's directory. `EBUSY` after the first time.
    pub(crate) fn new(dir: Dir) -> Result<Self> {
        if STATE.cmpxchg(0, CLAIMED, Relaxed).is_err() {
            return Err(EBUSY);
        }
        // SAFETY: Of all calls of this function only one gets here.
        unsafe { ROOT.init() };
        *ROOT.lock() = Some(dir);
        STATE.store(READY, Release);
        Ok(Self(()))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // There is a value only after `new` has made ROOT ready.
        *ROOT.lock() = None;
    }
}

/// The directory `name` in it.
pub(crate) fn subdir(name: &CStr) -> Option<Dir> {
    if STATE.load(Acquire) != READY {
        return None;
    }
    ROOT.lock().as_ref().map(|root| root.subdir(name))
}
