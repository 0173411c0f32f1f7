//! The process-wide SIGBUS handler.
//!
//! It is installed once, on the first guarded mapping, and stays. A SIGBUS of a memory access
//! (`BUS_ADRERR`) at an address in a guarded mapping is ours: see [`super::slots`] for what is done
//! about it. Every other SIGBUS gets what it would have got without us: the previous handler is
//! called, or, where there was none, the process dies of SIGBUS.
//!
//! # Async-signal safety
//!
//! The handler loads and stores atomics, makes at most one `mmap`, and, when it passes the signal
//! on, calls `sigaction` and `raise`. It takes no lock, allocates nothing, does not panic (there
//! is nothing in it that can) and preserves `errno`. It runs with `SA_ONSTACK`, as the handler of
//! the standard library for stack overflows must.
//!
//! # What a program must not do
//!
//! Install a SIGBUS handler later that does not pass on what is not its own; `fork` without `exec`
//! while other threads are inside accesses to guarded mappings, and go on using these mappings in
//! the child.

use std::ffi::c_int;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::slots;
use super::slots::Loss;
use crate::sys::memory;

/// What was installed before us; null stands for the default action.
///
/// # Invariants
///
/// Null, or from a `Box` that was leaked.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// Installs the handler if it is not yet installed.
pub(super) fn install() -> Result<(), Errno> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        let previous = exchange(None)?;
        // Before the handler is in place, so that it never finds nothing.
        PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::Release);
        exchange(Some(&ours(&previous))).map(drop)
    })
}

/// The action that we install: what the previous handler asked for holds while we call it, too.
fn ours(previous: &libc::sigaction) -> libc::sigaction {
    let mut action = *previous;
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO
        | libc::SA_ONSTACK
        | (previous.sa_flags & (libc::SA_RESTART | libc::SA_NODEFER));
    action
}

/// Sets the action for SIGBUS, or only asks for it. Answers the one before.
fn exchange(new: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `new` is null or to a live action whose handler, if any, is `on_sigbus` or the
    // default; `old` has room for an action.
    let answer = unsafe { libc::sigaction(libc::SIGBUS, new, old.as_mut_ptr()) };
    if answer != 0 {
        return Err(Errno::INVAL);
    }
    // SAFETY: all zeroes is a valid action, and `sigaction` succeeded and stored one.
    Ok(unsafe { old.assume_init() })
}

/// The handler.
extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the location of this thread's errno is always valid.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above, and nothing refers to it.
    let saved = unsafe { errno.read() };

    if !handled(info) {
        pass_on(signal, info, context);
    }

    // SAFETY: as above.
    unsafe { errno.write(saved) };
}

/// Handles the signal if it is ours.
fn handled(info: *mut libc::siginfo_t) -> bool {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid pointer, to what is its alone.
    let info = unsafe { &*info };
    // Only a fault has an address; a signal that somebody sent has other fields in its place.
    if info.si_code != libc::BUS_ADRERR {
        return false;
    }
    // SAFETY: a BUS_ADRERR carries the address.
    let address = unsafe { info.si_addr() };
    let Some((slot, start, length)) = slots::find(address.addr()) else {
        return false;
    };
    match slot.lose() {
        Loss::Theirs => true,
        Loss::Hopeless => false,
        Loss::Ours => {
            // SAFETY: the slot publishes the range of an area that is alive: the faulting access
            // borrows it. It is not abandoned: the slot of such an area is not LIVE.
            let in_place = unsafe { memory::put_scratch(start, length) };
            slot.lost(in_place);
            in_place
        }
    }
}

/// Does what would have been done without us.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: null or to a leaked box, by the invariant.
    let previous = unsafe { PREVIOUS.load(Ordering::Acquire).as_ref() };
    let Some(previous) = previous else {
        return default_action(info);
    };
    match previous.sa_sigaction {
        libc::SIG_DFL => default_action(info),
        // The kernel kills a process that ignores a fault, too.
        libc::SIG_IGN if is_fault(info) => default_action(info),
        libc::SIG_IGN => {}
        handler => {
            if previous.sa_flags & libc::SA_RESETHAND != 0 {
                PREVIOUS.store(ptr::null_mut(), Ordering::Release);
            }
            call(handler, previous.sa_flags, signal, info, context);
        }
    }
}

/// Calls a handler that somebody else installed.
fn call(
    handler: usize,
    flags: c_int,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    if flags & libc::SA_SIGINFO != 0 {
        type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
        // SAFETY: with SA_SIGINFO the field is the address of such a function.
        let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
        handler(signal, info, context);
    } else {
        type Handler = extern "C" fn(c_int);
        // SAFETY: without SA_SIGINFO, and neither SIG_DFL nor SIG_IGN, it is one of these.
        let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
        handler(signal);
    }
}

/// Whether the instruction that raised the signal is executed again when the handler returns.
fn is_fault(info: *mut libc::siginfo_t) -> bool {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid pointer.
    let code = unsafe { (*info).si_code };
    matches!(
        code,
        libc::BUS_ADRALN | libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR
    )
}

/// Ends the process by SIGBUS, as soon as the handler returns.
fn default_action(info: *mut libc::siginfo_t) {
    // SAFETY: all zeroes is the default action with an empty mask and no flags.
    let action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    let changed = exchange(Some(&action));
    // A fault repeats itself on return and meets the default action then, with its own siginfo.
    if changed.is_err() || !is_fault(info) {
        // SAFETY: `raise` takes no pointer and may be called in a handler.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}
