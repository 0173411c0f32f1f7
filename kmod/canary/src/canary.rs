// SPDX-License-Identifier: GPL-2.0

//! `barlease_canary`: bugs on request, to test that a run with such a bug fails. Never packaged.
//!
//! A write of anything to `/sys/kernel/debug/barlease_canary/<BUG>` has the bug:
//!
//! | file | bug | found by |
//! |---|---|---|
//! | `warning` | a condition that never holds, does | every kernel |
//! | `use_after_free` | memory is read after it was freed | KASAN |
//! | `lock_inversion` | two locks are taken in both orders | lockdep |
//! | `data_race` | two processes that write here count with no lock; the first waits for the second | KCSAN |

#![deny(unsafe_code)]

use core::cell::UnsafeCell;
use kernel::{
    debugfs::{Dir, File},
    new_mutex,
    prelude::*,
    sync::{
        Mutex,
        atomic::{Atomic, Relaxed},
    },
    time::{Delta, delay::fsleep},
    uaccess::UserSliceReader,
    warn_on,
};

module! {
    type: Module,
    name: "barlease_canary",
    authors: ["The Barlease authors"],
    description: "Bugs on request, for tests of the tests only",
    license: "GPL",
}

/// The loaded module.
#[pin_data]
struct Module {
    #[pin]
    _warning: File<()>,
    #[pin]
    _use_after_free: File<()>,
    #[pin]
    _lock_inversion: File<Locks>,
    #[pin]
    _data_race: File<Counter>,
    // Dropped last: removes what is left in it.
    _dir: Dir,
}

impl kernel::InPlaceModule for Module {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let dir = Dir::new(c"barlease_canary");
        try_pin_init!(Self {
            _warning <- dir.write_callback_file(c"warning", (), &warning),
            _use_after_free <- dir.write_callback_file(c"use_after_free", (), &use_after_free),
            _lock_inversion <-
                dir.write_callback_file(c"lock_inversion", Locks::new(), &lock_inversion),
            _data_race <- dir.write_callback_file(c"data_race", Counter::new(), &data_race),
            _dir: dir.clone(),
        })
    }
}

fn warning((): &(), _: &mut UserSliceReader) -> Result {
    warn_on!(core::hint::black_box(true));
    Ok(())
}

#[allow(unsafe_code)] // It is the bug.
fn use_after_free((): &(), _: &mut UserSliceReader) -> Result {
    let stale: *mut u64 = KBox::into_raw(KBox::new(1, GFP_KERNEL)?);
    // SAFETY: It came from `into_raw` a line above.
    drop(unsafe { KBox::from_raw(stale) });
    // SAFETY: None. The memory is freed, and this read is what must be reported.
    let value = unsafe { stale.read_volatile() };
    pr_info!("read {value} from freed memory\n");
    Ok(())
}

/// Two locks without an order.
#[pin_data]
struct Locks {
    #[pin]
    one: Mutex<()>,
    #[pin]
    other: Mutex<()>,
}

impl Locks {
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            one <- new_mutex!((), "canary_one"),
            other <- new_mutex!((), "canary_other"),
        })
    }
}

/// Takes the locks in one order, and then in the other: nothing waits here, but two threads could.
fn lock_inversion(locks: &Locks, _: &mut UserSliceReader) -> Result {
    {
        let _one = locks.one.lock();
        let _other = locks.other.lock();
    }
    let _other = locks.other.lock();
    let _one = locks.one.lock();
    Ok(())
}

/// A number that is not guarded.
struct Counter {
    counting: Atomic<i32>,
    value: UnsafeCell<u64>,
}

impl Counter {
    fn new() -> Self {
        Self {
            counting: Atomic::new(0),
            value: UnsafeCell::new(0),
        }
    }
}

#[allow(unsafe_code)] // It is the bug.
// SAFETY: None. Two threads that count at a time are what must be reported.
unsafe impl Sync for Counter {}

/// How often it counts: KCSAN looks at one access of some thousands.
const TIMES: u32 = 2_000_000;

#[allow(unsafe_code)] // It is the bug.
fn data_race(counter: &Counter, _: &mut UserSliceReader) -> Result {
    counter.counting.fetch_add(1, Relaxed);
    while counter.counting.load(Relaxed) < 2 {
        fsleep(Delta::from_millis(1));
    }
    for _ in 0..TIMES {
        // As if it were another place each time: else the loop would become one addition.
        let value = core::hint::black_box(counter.value.get());
        // SAFETY: None. The other thread counts, too.
        unsafe { *value = (*value).wrapping_add(1) };
    }
    Ok(())
}
