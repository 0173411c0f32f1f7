// SPDX-License-Identifier: GPL-2.0

//! Work that is done a while later, by a thread of the kernel.
//!
//! `kernel::workqueue` lets queued work own its object; this one ends with its object instead,
//! which must not outlive the module.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use super::bindings;
use kernel::{container_of, prelude::*, sync::Arc, types::Opaque};

/// Something to do, later and again.
pub(crate) trait Later: Send + Sync + 'static {
    /// How many milliseconds later, the first time.
    const MILLISECONDS: u32;

    /// Does it: in how many milliseconds to do it again.
    fn run(&self) -> Option<u32>;
}

/// Does something a while after it was started, until there is no more to do or this is dropped.
///
/// # Invariants
///
/// `work` is initialized.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Delayed<T: Later> {
    #[pin]
    work: Opaque<bindings::delayed_work>,
    target: Arc<T>,
}

// SAFETY: Work may be queued and cancelled on any thread, and the target may be used there.
unsafe impl<T: Later> Send for Delayed<T> {}
// SAFETY: As above.
unsafe impl<T: Later> Sync for Delayed<T> {}

impl<T: Later> Delayed<T> {
    /// Not started.
    pub(crate) fn new(target: Arc<T>) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes and stays where it is; all of it is initialized.
            work <- Opaque::ffi_init(|slot| unsafe {
                bindings::bl_delayed_init(slot, Some(Self::call))
            }),
            target,
        })
    }

    /// Starts, unless it is started.
    pub(crate) fn start(&self) {
        self.go_on(T::MILLISECONDS);
    }

    /// Goes on in a while.
    fn go_on(&self, milliseconds: u32) {
        // SAFETY: By the type invariant the work is initialized; `drop` waits for it.
        unsafe { bindings::bl_delayed_start(self.work.get(), milliseconds) };
    }

    /// Has it done as soon as may be, whether it was started or not.
    pub(crate) fn start_now(&self) {
        // SAFETY: By the type invariant the work is initialized; `drop` waits for it.
        unsafe { bindings::bl_delayed_start_now(self.work.get()) };
    }

    /// Stops, and waits until what runs is over.
    pub(crate) fn stop(&self) {
        // SAFETY: By the type invariant the work is initialized.
        unsafe { bindings::bl_delayed_cancel(self.work.get()) };
    }

    /// # Safety
    ///
    /// To be called by the work queue only, with the work of a [`Delayed`] of `T`.
    unsafe extern "C" fn call(work: *mut bindings::work_struct) {
        // SAFETY: The work is that of a delayed one, by the caller.
        let work = unsafe { container_of!(work, bindings::delayed_work, work) };
        let work = Opaque::cast_from(work.cast_const());
        // SAFETY: That is a field of `Self`, whose `drop` waits for this call.
        let this = unsafe { &*container_of!(work, Self, work) };
        if let Some(milliseconds) = this.target.run() {
            this.go_on(milliseconds);
        }
    }
}

#[pinned_drop]
impl<T: Later> PinnedDrop for Delayed<T> {
    fn drop(self: Pin<&mut Self>) {
        self.stop();
    }
}
