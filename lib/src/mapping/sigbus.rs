//! The process-wide SIGBUS handler.
//!
//! The first guarded mapping installs it. A fault (`BUS_ADRERR`, or `BUS_OBJERR`, which aarch64
//! has for external aborts) of an instruction in the table of [`fixup`] is a guarded access: the
//! handler moves the program counter to the entry's recovery address. A fault at an address of a
//! scratch mapping is that mapping's loss ([`super::slots`]). Every other SIGBUS gets what it would
//! have got without us: the previous handler is called, or, where there was none, the process dies
//! of SIGBUS.
//!
//! # Others that install handlers
//!
//! A handler that somebody installs over ours may pass on to ours what it does not know. If ours is
//! then put over that one, and it passes on to it, the two would call each other for ever. So there
//! are [`GENERATIONS`] entry points, each with a previous action of its own; whenever ours has to
//! be put over another *handler* ([`arm`]) the next entry point is used, and a chain of calls
//! always goes down. Over the default action or an ignored signal the latest entry point is put
//! again.
//!
//! [`arm`] is called for each new mapping, and by the handler itself when a handler that it called
//! for a signal that somebody *sent* has replaced it: the standard library's does so, by the
//! default action, for every SIGBUS that is no overflow of a stack. Otherwise one `kill -BUS` would
//! disarm all mappings of a process without a word.
//!
//! Another copy of this crate in the process chains properly; it is known by the mask of its
//! action, which leaves out the five signals of [`SIGNATURE`].
//!
//! # Async-signal safety
//!
//! The handler loads and stores atomics and reads the table; for a scratch mapping it makes two
//! system calls that change mappings, and may wait for another thread that does so; when it passes
//! the signal on it calls `sigaction`, `pthread_sigmask` and `raise`. It takes no lock, allocates
//! nothing, does not panic (there is nothing in it that can) and preserves `errno`. All signals are
//! blocked in it; the previous handler runs with the mask and on the stack that it asked for.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::fixup;
use super::slots;

/// How often ours can be put over somebody else's handler.
const GENERATIONS: usize = 16;

/// Real-time signals that our action does not block: it is known by this. A thread that sends one
/// of them to interrupt our handler interrupts nothing that could be left half done but the loss of
/// a scratch mapping, which other threads then wait for.
const SIGNATURE: [c_int; 5] = [41, 43, 47, 53, 59];

/// A handler. It may unwind, as handlers of C++ programs do.
type Handler = extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut c_void);
/// A handler without `SA_SIGINFO`.
type PlainHandler = extern "C-unwind" fn(c_int);

/// One entry point's previous action.
struct Generation {
    /// `DEFAULT`, `IGNORE`, or the address of `storage`.
    previous: AtomicUsize,
    storage: UnsafeCell<MaybeUninit<libc::sigaction>>,
}

const DEFAULT: usize = 0;
const IGNORE: usize = 1;

// SAFETY: `storage` is written once, by whoever has taken the generation, before its address is
// published in `previous`; from then on it is only read.
unsafe impl Sync for Generation {}

static TABLE: [Generation; GENERATIONS] = [const {
    Generation {
        previous: AtomicUsize::new(DEFAULT),
        storage: UnsafeCell::new(MaybeUninit::uninit()),
    }
}; GENERATIONS];

/// The next generation to take.
static NEXT: AtomicUsize = AtomicUsize::new(0);

extern "C-unwind" fn entry<const N: usize>(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    if let Some(generation) = TABLE.get(N) {
        on_sigbus(generation, signal, info, context);
    }
}

/// The entry points. Only the addresses in here are installed and compared with.
static ENTRIES: [Handler; GENERATIONS] = [
    entry::<0>,
    entry::<1>,
    entry::<2>,
    entry::<3>,
    entry::<4>,
    entry::<5>,
    entry::<6>,
    entry::<7>,
    entry::<8>,
    entry::<9>,
    entry::<10>,
    entry::<11>,
    entry::<12>,
    entry::<13>,
    entry::<14>,
    entry::<15>,
];

/// Whether this thread's guarded accesses are guarded: the handler is in place, and the signal is
/// not blocked.
pub(super) fn is_armed() -> bool {
    exchange(None).is_ok_and(|current| is_ours(&current)) && !is_blocked()
}

/// Puts the handler in place if it is not. `EBUSY`: others were put over it too often.
pub(super) fn arm() -> Result<(), Errno> {
    let current = exchange(None)?;
    // A copy that was there before us does not know of us.
    if is_mine(&current) || (is_ours(&current) && NEXT.load(Ordering::Acquire) > 0) {
        return Ok(());
    }
    put_over(&current)
}

/// As [`arm`], for the handler. Another copy of the crate may just have armed itself over an action
/// that leads to nowhere, so that it is no proof of anything here.
fn arm_again() -> Result<(), Errno> {
    let current = exchange(None)?;
    if is_mine(&current) {
        return Ok(());
    }
    put_over(&current)
}

/// Puts the handler over `current`. Async-signal-safe.
fn put_over(current: &libc::sigaction) -> Result<(), Errno> {
    let mut current = *current;
    // Each turn but the last is for somebody who put another handler in place meanwhile.
    loop {
        let taken = NEXT.load(Ordering::Acquire);
        let number = if is_handler(&current) || taken == 0 {
            take_generation()?
        } else {
            taken - 1
        };
        let (Some(generation), Some(entry)) = (TABLE.get(number), ENTRIES.get(number)) else {
            return Err(Errno::BUSY);
        };
        // Before the handler is in place, so that it never finds nothing.
        generation.publish(&current);
        let replaced = exchange(Some(&ours(*entry, &current)))?;
        if replaced.sa_sigaction == current.sa_sigaction || is_mine(&replaced) {
            return Ok(());
        }
        current = replaced;
    }
}

/// Whether the action is a function.
fn is_handler(action: &libc::sigaction) -> bool {
    !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN)
}

fn take_generation() -> Result<usize, Errno> {
    NEXT.fetch_update(Ordering::AcqRel, Ordering::Acquire, |next| {
        (next < GENERATIONS).then_some(next + 1)
    })
    .map_err(|_| Errno::BUSY)
}

impl Generation {
    /// Remembers the action; if it is a handler, once only, by the taker of the generation.
    fn publish(&self, action: &libc::sigaction) {
        let word = match action.sa_sigaction {
            libc::SIG_DFL => DEFAULT,
            libc::SIG_IGN => IGNORE,
            _ => {
                let place = self.storage.get();
                // SAFETY: a handler is published only by `put_over`, to a generation that it has
                // just taken, so once only, and nobody has the address yet.
                unsafe { place.write(MaybeUninit::new(*action)) };
                place.expose_provenance()
            }
        };
        self.previous.store(word, Ordering::Release);
    }

    /// The action that was remembered.
    fn previous(&self) -> Previous<'_> {
        match self.previous.load(Ordering::Acquire) {
            DEFAULT => Previous::Default,
            IGNORE => Previous::Ignore,
            address => {
                let place = ptr::with_exposed_provenance::<libc::sigaction>(address);
                // SAFETY: `publish` stored the address of `storage` after it wrote it,
                // and nobody writes it again.
                Previous::Handler(unsafe { &*place })
            }
        }
    }
}

enum Previous<'a> {
    Default,
    Ignore,
    Handler(&'a libc::sigaction),
}

/// The action that we install over `previous`.
fn ours(entry: Handler, previous: &libc::sigaction) -> libc::sigaction {
    // SAFETY: all zeroes is a valid action.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = entry as usize;
    action.sa_flags = libc::SA_SIGINFO;
    let is_handler = is_handler(previous);
    // On the alternate stack only if the handler that we call expects that: the stack that the
    // standard library provides is too small for some.
    if !is_handler || previous.sa_flags & libc::SA_ONSTACK != 0 {
        action.sa_flags |= libc::SA_ONSTACK;
    }
    if !is_handler || previous.sa_flags & libc::SA_RESTART != 0 {
        action.sa_flags |= libc::SA_RESTART;
    }
    // SAFETY: the pointer is to a set of ours.
    unsafe { libc::sigfillset(&mut action.sa_mask) };
    for signal in SIGNATURE {
        // SAFETY: as above.
        unsafe { libc::sigdelset(&mut action.sa_mask, signal) };
    }
    action
}

/// Whether the action is one of our entry points.
fn is_mine(action: &libc::sigaction) -> bool {
    let handler = action.sa_sigaction;
    ENTRIES.iter().any(|entry| *entry as usize == handler)
}

/// Whether the action is ours, or that of another copy of this crate.
fn is_ours(action: &libc::sigaction) -> bool {
    if is_mine(action) {
        return true;
    }
    // All but the signature, and but those that a C library or the kernel leaves out.
    (1..=64)
        .filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP | 32..=34))
        .all(|signal| {
            // SAFETY: the pointer is to a live set.
            let blocked = unsafe { libc::sigismember(&action.sa_mask, signal) } == 1;
            blocked != SIGNATURE.contains(&signal)
        })
}

/// Whether this thread blocks SIGBUS: then the kernel ends the process at the first fault.
fn is_blocked() -> bool {
    let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: no new mask; there is room for the old one.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), mask.as_mut_ptr()) };
    // SAFETY: the pointer is to a set, of zeroes at the worst.
    unsafe { libc::sigismember(mask.as_ptr(), libc::SIGBUS) == 1 }
}

/// Sets the action for SIGBUS, or only asks for it. Answers the one before.
fn exchange(new: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `new` is null or to a live action whose handler, if any, is an entry point or the
    // default; `old` has room for an action.
    let answer = unsafe { libc::sigaction(libc::SIGBUS, new, old.as_mut_ptr()) };
    if answer != 0 {
        return Err(crate::sys::last_errno());
    }
    // SAFETY: all zeroes is a valid action, and `sigaction` succeeded and stored one.
    Ok(unsafe { old.assume_init() })
}

/// The handler.
fn on_sigbus(
    generation: &Generation,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: the location of this thread's errno is always valid.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above, and nothing refers to it.
    let saved = unsafe { errno.read() };

    if !handled(info, context) {
        pass_on(generation, signal, info, context);
    }

    // SAFETY: as above.
    unsafe { errno.write(saved) };
}

/// Handles the signal if it is ours.
fn handled(info: *mut libc::siginfo_t, context: *mut c_void) -> bool {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid pointer, to what is its alone.
    let info = unsafe { &*info };
    // Only a fault has an address; a signal that somebody sent has other fields in its place, and
    // interrupts the thread anywhere.
    if !matches!(info.si_code, libc::BUS_ADRERR | libc::BUS_OBJERR) {
        return false;
    }
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid context, to what is its alone.
    if let Some(pc) = unsafe { program_counter(context) } {
        if let Some(resume) = fixup::find(*pc as usize) {
            *pc = resume as _;
            return true;
        }
    }
    // SAFETY: these two codes carry the address.
    let address = unsafe { info.si_addr() };
    slots::lose(address.addr())
}

/// The type of a program counter in the context.
#[cfg(target_arch = "x86_64")]
type Counter = libc::greg_t;
#[cfg(not(target_arch = "x86_64"))]
type Counter = libc::c_ulonglong;

/// The program counter that the thread goes on from when the handler returns.
///
/// # Safety
///
/// `context` is what the kernel gave the handler, and the result is used within the handler only.
unsafe fn program_counter<'a>(context: *mut c_void) -> Option<&'a mut Counter> {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the caller says so.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    let context = unsafe { context.as_mut() }?;
    #[cfg(target_arch = "x86_64")]
    return context.uc_mcontext.gregs.get_mut(libc::REG_RIP as usize);
    #[cfg(target_arch = "aarch64")]
    return Some(&mut context.uc_mcontext.pc);
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return None;
}

/// Does what would have been done without us.
fn pass_on(
    generation: &Generation,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    match generation.previous() {
        Previous::Default => default_action(info),
        // The kernel kills a process that ignores a fault, too.
        Previous::Ignore if is_fault(info) => default_action(info),
        Previous::Ignore => {}
        Previous::Handler(previous) => {
            let handler = previous.sa_sigaction;
            let flags = previous.sa_flags;
            if flags & libc::SA_RESETHAND != 0 {
                generation.previous.store(DEFAULT, Ordering::Release);
            }
            restore_mask(previous, context);
            call(handler, flags, signal, info, context);
            // Of a fault it may have wished exactly that: to meet it again without a handler.
            if !is_fault(info) {
                // If it fails the guard is gone, as `is_armed` tells.
                let _ = arm_again();
            }
        }
    }
}

/// Gives the thread the mask with which the kernel would have called the handler.
fn restore_mask(previous: &libc::sigaction, context: *mut c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: all zeroes is the empty set.
    let mut mask = unsafe { MaybeUninit::<libc::sigset_t>::zeroed().assume_init() };
    // The kernel's set has 64 bits, the C library's more: what lies behind is something else.
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid context.
    let interrupted = unsafe { &raw const (*context).uc_sigmask };
    // SAFETY: both have 8 bytes, and do not overlap.
    unsafe { ptr::copy_nonoverlapping(interrupted.cast::<u8>(), (&raw mut mask).cast(), 8) };
    for number in 1..=64 {
        // SAFETY: the pointer is to a live set.
        if unsafe { libc::sigismember(&previous.sa_mask, number) } == 1 {
            // SAFETY: as above.
            unsafe { libc::sigaddset(&mut mask, number) };
        }
    }
    if previous.sa_flags & libc::SA_NODEFER == 0 {
        // SAFETY: as above.
        unsafe { libc::sigaddset(&mut mask, libc::SIGBUS) };
    }
    // SAFETY: the pointer is to a live set; the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &mask, ptr::null_mut()) };
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
        // SAFETY: with SA_SIGINFO the field is the address of such a function.
        let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
        handler(signal, info, context);
    } else {
        // SAFETY: without SA_SIGINFO, and neither SIG_DFL nor SIG_IGN, it is one of these.
        let handler = unsafe { std::mem::transmute::<usize, PlainHandler>(handler) };
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
