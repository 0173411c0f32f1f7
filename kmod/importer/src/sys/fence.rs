// SPDX-License-Identifier: GPL-2.0

//! Fences: work of a device that is not done yet.
//!
//! C headers: [`include/linux/dma-fence.h`](srctree/include/linux/dma-fence.h),
//! [`include/linux/hrtimer.h`](srctree/include/linux/hrtimer.h)

use super::module::ModuleReference;
use core::{mem::ManuallyDrop, ptr::NonNull};
use kernel::{bindings, prelude::*};

// Types without fields, such as that of lockdep when it is off, are behind pointers only.
#[allow(improper_ctypes)]
extern "C" {
    fn bli_dma_fence_put(fence: *mut bindings::dma_fence);
}

/// The way in which a wait for a fence ends.
#[derive(Clone, Copy)]
pub(crate) enum Wait {
    /// The core's own way.
    Usual,
    /// When the time is over, `ETIME`.
    TimeError,
    /// `EDEADLK` at once, until it has signalled.
    Deadlock,
}

impl Wait {
    fn operations(self) -> &'static bindings::dma_fence_ops {
        static USUAL: bindings::dma_fence_ops = bindings::dma_fence_ops {
            get_driver_name: Some(name),
            get_timeline_name: Some(name),
            ..pin_init::zeroed()
        };
        // The core looks at the operations of these even after they have signalled.
        static TIME_ERROR: bindings::dma_fence_ops = bindings::dma_fence_ops {
            get_driver_name: Some(name),
            get_timeline_name: Some(name),
            wait: Some(wait_or_time_error),
            release: Some(release),
            ..pin_init::zeroed()
        };
        static DEADLOCK: bindings::dma_fence_ops = bindings::dma_fence_ops {
            get_driver_name: Some(name),
            get_timeline_name: Some(name),
            wait: Some(wait_or_deadlock),
            release: Some(release),
            ..pin_init::zeroed()
        };
        match self {
            Self::Usual => &USUAL,
            Self::TimeError => &TIME_ERROR,
            Self::Deadlock => &DEADLOCK,
        }
    }
}

/// A fence, and what signals it. The fence is the first field: the core frees the one by the address of the other.
#[repr(C)]
struct Timed {
    fence: bindings::dma_fence,
    timer: bindings::hrtimer,
}

/// A fence that signals when it is dropped, or before that by its timer.
///
/// # Invariants
///
/// The pointer is valid and owns a reference to the fence in it. The timer is set up, and the fence has not been given
/// back while it may run.
pub(super) struct Fence(NonNull<Timed>);

// SAFETY: A fence may be signalled, and a timer cancelled, by any thread.
unsafe impl Send for Fence {}

impl Fence {
    /// A fence that its timer signals after so many milliseconds, or none if that is 0.
    pub(super) fn new(wait: Wait, milliseconds: u32) -> Result<Self> {
        let module = match wait {
            Wait::Usual => None,
            Wait::TimeError | Wait::Deadlock => Some(ModuleReference::new()?),
        };
        // SAFETY: Takes no pointers.
        let context = unsafe { bindings::dma_fence_context_alloc(1) };
        // Freed by `dma_fence_free()`, by the address of its first field.
        let timed = KBox::<Timed>::new_uninit(GFP_KERNEL)?;
        let timed: *mut Timed = KBox::into_raw(timed).cast();
        // `release` gives it back.
        let _ = ManuallyDrop::new(module);
        // SAFETY: A field of memory that is valid for writes.
        let timer = unsafe { &raw mut (*timed).timer };
        let mode = bindings::hrtimer_mode_HRTIMER_MODE_REL;
        let clock = bindings::CLOCK_MONOTONIC as bindings::clockid_t;
        // SAFETY: The memory is valid for writes.
        unsafe { bindings::hrtimer_setup(timer, Some(on_time), clock, mode) };
        let (fence, none) = (timed.cast(), core::ptr::null_mut());
        // SAFETY: The memory is valid for writes; the operations are static. A fence without a lock
        // of its creator's has one of its own.
        unsafe { bindings::dma_fence_init(fence, wait.operations(), none, context, 1) };
        // INVARIANT: `dma_fence_init` made the first reference, and the timer was set up.
        let this = Self(NonNull::new(timed).ok_or(ENOMEM)?);
        if milliseconds != 0 {
            let time = i64::from(milliseconds) * 1_000_000;
            // SAFETY: The timer is set up; `drop` cancels it before the fence is given back.
            unsafe { bindings::hrtimer_start_range_ns(timer, time, 0, mode) };
        }
        Ok(this)
    }

    /// The fence.
    pub(super) fn as_ptr(&self) -> *mut bindings::dma_fence {
        self.0.as_ptr().cast()
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is valid.
        let timer = unsafe { &raw mut (*self.0.as_ptr()).timer };
        // SAFETY: By the type invariant it is set up. Nothing that is locked here is taken by it.
        unsafe { bindings::hrtimer_cancel(timer) };
        // SAFETY: By the type invariant the fence is valid.
        unsafe { bindings::dma_fence_signal(self.as_ptr()) };
        // SAFETY: By the type invariant there is a reference to give back, and the timer runs no more.
        unsafe { bli_dma_fence_put(self.as_ptr()) };
    }
}

/// # Safety
///
/// To be called by the timer of a [`Timed`] only.
unsafe extern "C" fn on_time(timer: *mut bindings::hrtimer) -> bindings::hrtimer_restart {
    // SAFETY: By the caller it is the timer of a `Timed`.
    let timed = unsafe { kernel::container_of!(timer, Timed, timer) };
    // SAFETY: A `Fence` has a reference until it has cancelled the timer.
    unsafe { bindings::dma_fence_signal(timed.cast::<bindings::dma_fence>()) };
    bindings::hrtimer_restart_HRTIMER_NORESTART
}

/// # Safety
///
/// None: looks at nothing.
unsafe extern "C" fn name(_fence: *mut bindings::dma_fence) -> *const c_char {
    c"barlease_importer".as_char_ptr()
}

/// # Safety
///
/// To be called by the core only, as `dma_fence_ops.wait`.
unsafe extern "C" fn wait_or_time_error(
    fence: *mut bindings::dma_fence,
    interruptible: bool,
    timeout: c_long,
) -> c_long {
    // SAFETY: By the caller the fence is valid.
    match unsafe { bindings::dma_fence_default_wait(fence, interruptible, timeout) } {
        0 => -(bindings::ETIME as c_long),
        other => other,
    }
}

/// # Safety
///
/// To be called by the core only, as `dma_fence_ops.wait`.
unsafe extern "C" fn wait_or_deadlock(
    fence: *mut bindings::dma_fence,
    interruptible: bool,
    timeout: c_long,
) -> c_long {
    // SAFETY: By the caller the fence is valid. Without time it only looks.
    match unsafe { bindings::dma_fence_default_wait(fence, interruptible, 0) } {
        0 => -(bindings::EDEADLK as c_long),
        _ => timeout.max(1),
    }
}

/// # Safety
///
/// To be called by the core only, as `dma_fence_ops.release` of a fence that [`Fence::new`] made with a reference to the
/// module.
unsafe extern "C" fn release(fence: *mut bindings::dma_fence) {
    // SAFETY: By the caller nobody refers to it any more.
    unsafe { bindings::dma_fence_free(fence) };
    // SAFETY: `Fence::new` left it to this. The core calls with RCU read-locked, for which an unload waits.
    drop(unsafe { ModuleReference::left() });
}
