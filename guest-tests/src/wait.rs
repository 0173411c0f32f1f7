//! Waiting for what must come, without a claim about time: a machine may be emulated, and busy.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Longer than anything takes that happens at all.
pub const LONG: Duration = Duration::from_secs(60);

/// How long a test looks on whether something happens that must not: what is to be waited for would
/// take a fraction of that.
pub const A_WHILE: Duration = Duration::from_millis(300);

/// Waits until that is so.
///
/// # Panics
///
/// When it is not so for [`LONG`].
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !so() {
        assert!(Instant::now() < end, "waited for {what} for {LONG:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Does what must come to its end although somebody else does not, and ends the whole test binary
/// when it does not come to its end for [`LONG`]: a thread that hangs in the kernel cannot be
/// stopped.
///
/// # Panics
///
/// When `body` does.
pub fn at_once<R>(what: &str, body: impl FnOnce() -> R) -> R {
    let (done, guard) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if guard.recv_timeout(LONG) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{what} has not come to its end for {LONG:?}");
                process::exit(101);
            }
        });
        // Disconnected when `body` is done, or panics.
        let _done = done;
        body()
    })
}

/// Runs `wait`, which must not be over while `meanwhile` runs nor for [`A_WHILE`] after it, and
/// must come to its end after `let_go`.
///
/// # Panics
///
/// When `wait` is over early, or when one of the three panics.
pub fn waits_for<R: Send>(
    wait: impl FnOnce() -> R + Send,
    meanwhile: impl FnOnce(),
    let_go: impl FnOnce(),
) -> R {
    thread::scope(|scope| {
        let waiting = scope.spawn(wait);
        let held = catch_unwind(AssertUnwindSafe(|| {
            meanwhile();
            thread::sleep(A_WHILE);
            assert!(!waiting.is_finished(), "it did not wait");
        }));
        // Also after a panic: a scope waits for its threads.
        let result = at_once("what waits", || {
            let_go();
            waiting.join()
        });
        match (held, result) {
            (Ok(()), Ok(result)) => result,
            (Err(panic), _) | (_, Err(panic)) => resume_unwind(panic),
        }
    })
}

/// Runs `act`, which must come to its end by itself. When it has not for [`LONG`], the test has
/// failed, and `let_go` is called, so that no thread is left in the kernel.
///
/// # Panics
///
/// When it did not end by itself, or one of the two panics.
pub fn ends_by_itself<R: Send>(
    what: &str,
    act: impl FnOnce() -> R + Send,
    let_go: impl FnOnce(),
) -> R {
    thread::scope(|scope| {
        let acting = scope.spawn(act);
        let end = Instant::now() + LONG;
        while !acting.is_finished() && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        let ended = acting.is_finished();
        if !ended {
            eprintln!("{what} waits for what it must not wait for");
            let_go();
        }
        match at_once(what, || acting.join()) {
            Ok(result) => {
                assert!(ended, "{what} waited for what it must not wait for");
                result
            }
            Err(panic) => resume_unwind(panic),
        }
    })
}
