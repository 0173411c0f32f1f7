// SPDX-License-Identifier: GPL-2.0

//! Fences: what devices still do with the memory of a dma-buf.
//!
//! A fence is waited for by a callback of ours and never by its driver's own `wait`, whose answers
//! differ: i915 says `-ETIME` for a time-out, radeon `-EDEADLK` while it is to be reset.
//!
//! C header: [`include/linux/dma-fence.h`](srctree/include/linux/dma-fence.h)

use super::{bindings, eventfd::EventSlot, idle::Outstanding};
use core::{cell::UnsafeCell, ptr::NonNull};
use kernel::{
    container_of,
    prelude::*,
    sync::{
        Arc,
        atomic::{Acquire, Atomic, Full, Relaxed},
    },
    time::{Delta, delay::fsleep},
    types::Opaque,
};

/// A reference to a fence.
///
/// # Invariants
///
/// The pointer is valid and owns a reference.
pub(crate) struct Fence(NonNull<bindings::dma_fence>);

// SAFETY: A fence may be used from any thread; its lock guards it.
unsafe impl Send for Fence {}
// SAFETY: As above.
unsafe impl Sync for Fence {}

impl Fence {
    /// # Safety
    ///
    /// `fence` must be null, or valid with a reference that the caller gives up.
    pub(super) unsafe fn from_raw(fence: *mut bindings::dma_fence) -> Option<Self> {
        // INVARIANT: By the caller.
        NonNull::new(fence).map(Self)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bindings::bl_dma_fence_put(self.0.as_ptr()) };
    }
}

/// Waits for one fence.
///
/// # Invariants
///
/// `fence` is written once, by the thread that made `armed` 1, before `callback` is handed to the
/// fence, and is read by `drop` only.
#[pin_data(PinnedDrop)]
#[repr(C)]
pub(crate) struct FenceWatch {
    #[pin]
    callback: Opaque<bindings::dma_fence_cb>,
    fence: UnsafeCell<Option<Fence>>,
    armed: Atomic<u32>,
    /// 1 from [`Self::arm`] until the fence has signalled.
    pending: Outstanding,
    /// Signalled after that.
    events: Option<Arc<EventSlot>>,
}

// SAFETY: By the type invariant no two threads touch `fence` at a time. The lock of the fence
// guards `callback`.
unsafe impl Send for FenceWatch {}
// SAFETY: As above.
unsafe impl Sync for FenceWatch {}

impl FenceWatch {
    /// Without a fence. `events` is signalled when the one that it gets has signalled.
    pub(crate) fn new(events: Option<Arc<EventSlot>>) -> impl PinInit<Self> {
        pin_init!(Self {
            callback: Opaque::zeroed(),
            fence: UnsafeCell::new(None),
            armed: Atomic::new(0),
            pending: Outstanding::none(),
            events,
        })
    }

    /// Begins to watch `fence`. One that is watching, or was, ignores it.
    pub(crate) fn arm(&self, fence: Fence) {
        if self.armed.xchg(1, Relaxed) != 0 {
            return;
        }
        let raw = fence.0.as_ptr();
        self.pending.begin();
        // INVARIANT: `armed` was 0.
        // SAFETY: By the type invariant nobody else touches it now.
        unsafe { *self.fence.get() = Some(fence) };
        // SAFETY: The fence is valid, and stays so until `drop`, which takes the callback back. The
        // callback is given to one fence only, and stays where it is: a watch is only made in
        // place.
        let result = unsafe {
            bindings::dma_fence_add_callback(raw, self.callback.get(), Some(Self::signalled))
        };
        if result != 0 {
            // It has signalled before: the callback is not called.
            self.end();
        }
    }

    /// One thing less is under way, and the owner may ask about it.
    fn end(&self) {
        self.pending.end();
        if let Some(events) = &self.events {
            events.signal();
        }
    }

    /// # Safety
    ///
    /// To be called by the fence only that the callback of a watch was given to.
    unsafe extern "C" fn signalled(
        _fence: *mut bindings::dma_fence,
        callback: *mut bindings::dma_fence_cb,
    ) {
        let callback = Opaque::cast_from(callback);
        // SAFETY: The callback is a field of a watch. The lock of the fence is held, which `drop`
        // takes before the watch goes away.
        let this = unsafe { &*container_of!(callback, Self, callback) };
        this.end();
    }

    /// The work that the fence stands for: 1 until it has signalled, then 0.
    pub(crate) fn pending(&self) -> &Outstanding {
        &self.pending
    }
}

#[pinned_drop]
impl PinnedDrop for FenceWatch {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Nobody else has the watch any more but the fence, which does not touch this.
        let Some(fence) = (unsafe { &*self.fence.get() }) else {
            return;
        };
        // SAFETY: The callback was given to this fence, or refused by it, which makes an empty list
        // of it. A callback that runs holds the lock that is taken here.
        unsafe { bindings::dma_fence_remove_callback(fence.0.as_ptr(), self.callback.get()) };
    }
}

/// The fence that one look has found, if there was one: written once, and read at any time.
///
/// # Invariants
///
/// `watch` is written once, by the thread that made `state` [`CLAIMED`], and is read by others only
/// when `state` is [`FOUND`], after which it does not change.
pub(crate) struct Found {
    watch: UnsafeCell<Option<Pin<KBox<FenceWatch>>>>,
    state: Atomic<u32>,
}

/// Nobody has looked.
const UNKNOWN: u32 = 0;
/// A thread writes what it has found.
const CLAIMED: u32 = 1;
/// That is there.
const FOUND: u32 = 2;

// SAFETY: By the type invariant no two threads touch `watch` at a time while it changes; a watch
// may be sent and shared.
unsafe impl Sync for Found {}

impl Found {
    /// Nobody has looked.
    pub(crate) fn unknown() -> Self {
        Self {
            watch: UnsafeCell::new(None),
            state: Atomic::new(UNKNOWN),
        }
    }

    /// Publishes what the look has found: a watch that is armed, or nothing. A full barrier. Only
    /// the first look counts; it is there when this returns.
    pub(crate) fn publish(&self, watch: Option<Pin<KBox<FenceWatch>>>) {
        if self.state.cmpxchg(UNKNOWN, CLAIMED, Relaxed).is_err() {
            while !self.is_known() {
                // Another thread is a few instructions away from that.
                fsleep(Delta::from_millis(1));
            }
            return;
        }
        // INVARIANT: This thread made it `CLAIMED`.
        // SAFETY: By the type invariant nobody else touches it now.
        unsafe { *self.watch.get() = watch };
        self.state.xchg(FOUND, Full);
    }

    /// Whether somebody has looked.
    pub(crate) fn is_known(&self) -> bool {
        self.state.load(Acquire) == FOUND
    }

    /// The work of the fence that was found; `None` where nobody has looked, or there was none.
    pub(crate) fn pending(&self) -> Option<&Outstanding> {
        if !self.is_known() {
            return None;
        }
        // SAFETY: By the type invariant nobody writes it any more.
        let watch = unsafe { &*self.watch.get() };
        watch.as_ref().map(|watch| watch.pending())
    }
}
