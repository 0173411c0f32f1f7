//! Threads that do one thing again and again while a test does another.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

/// What a thread does again and again.
pub type Loop<'a> = &'a (dyn Fn() + Sync);

/// Runs `body`, and meanwhile each of `loops` again and again in a thread of its own, at least once.
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

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
