// SPDX-License-Identifier: GPL-2.0

//! The module's directory in debugfs, which functions find when they are bound.

use kernel::{debugfs::Dir, prelude::*};

kernel::sync::global_lock! {
    // SAFETY: Initialized by `Root::new`, before the driver that looks for it is registered.
    unsafe(uninit) static ROOT: Mutex<Option<Dir>> = None;
}

/// Keeps the directory; removes it when dropped.
pub(crate) struct Root(());

impl Root {
    /// To be called once, by the module's init.
    pub(crate) fn new(dir: Dir) -> Self {
        // SAFETY: The module's init calls this, once.
        unsafe { ROOT.init() };
        *ROOT.lock() = Some(dir);
        Self(())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        *ROOT.lock() = None;
    }
}

/// The directory `name` in it.
pub(crate) fn subdir(name: &CStr) -> Option<Dir> {
    ROOT.lock().as_ref().map(|root| root.subdir(name))
}
