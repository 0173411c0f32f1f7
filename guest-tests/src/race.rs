//! Threads that do one thing again and again while a test does another.

use std::{
    hint,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

/// The work that a thread does again and again.
pub type Loop<'a> = &'a (dyn Fn() + Sync);

/// Runs `body`, and meanwhile each of `loops` again and again in a thread of its own, at least
/// once.
///
/// # Panics
///
/// When `body` or one of the loops does.
pub fn meanwhile<R>(loops: &[Loop<'_>], body: impl FnOnce() -> R) -> R {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Also when `body` panics: a scope waits for its threads.
        let _ends = Ends(&over);
        for &this in loops {
            let over = &over;
            scope.spawn(move || {
                loop {
                    this();
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        body()
    })
}

/// For a moment, in which another processor can meet what was just stored: two stores in a row it
/// would hardly ever.
pub fn stay() {
    for _ in 0..100 {
        hint::spin_loop();
    }
}

/// For loops to which it does not matter what came out.
pub fn whatever<T>(_: T) {}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A time in which something must not work, for a thread that tries it all the time.
///
/// A try counts when it began and ended in the same time.
#[derive(Debug, Default)]
pub struct Window(AtomicU64);

impl Window {
    /// None has begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From here until `body` is done, it must not work.
    pub fn shut(&self, body: impl FnOnce()) {
        self.0.fetch_add(1, Ordering::SeqCst);
        body();
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Tries it; says whether it worked.
    ///
    /// # Panics
    ///
    /// When it worked and must not have.
    pub fn check(&self, attempt: impl FnOnce() -> bool) -> bool {
        let before = self.0.load(Ordering::SeqCst);
        let worked = attempt();
        let after = self.0.load(Ordering::SeqCst);
        let shut = before % 2 == 1 && before == after;
        assert!(!(worked && shut), "it worked when it must not");
        worked
    }
}
