//! The lines that a person reads while the demo runs.

use std::time::{Duration, Instant};

/// Prints who does what, and when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transcript {
    start: Instant,
}

impl Transcript {
    /// The clock starts now.
    pub(crate) fn start() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    /// One line.
    pub(crate) fn say(&self, who: &str, what: &str) {
        let time = self.start.elapsed().as_secs_f64();
        println!("{time:8.3} s  {who:<18} {what}");
    }

    /// A headline.
    pub(crate) fn part(&self, title: &str) {
        println!("\n{title}");
    }
}

/// Runs `f` and says how long it took.
pub(crate) fn timed<R>(f: impl FnOnce() -> R) -> (R, Duration) {
    let start = Instant::now();
    let result = f();
    (result, start.elapsed())
}

/// A duration in the unit that fits.
pub(crate) fn human(time: Duration) -> String {
    match time.as_micros() {
        micros if micros < 10_000 => format!("{micros} us"),
        _ => format!("{} ms", time.as_millis()),
    }
}
