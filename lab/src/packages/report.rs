//! The view that the user has while something takes time: a bar or spinner on a terminal, plain
//! lines elsewhere.
//!
//! All of it goes to the standard error output.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A step in progress. Ends with [`Step::done`]; when it is dropped before, nothing more is said.
#[derive(Debug)]
pub struct Step {
    what: String,
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Step {
    /// Announces a step whose end is not known beforehand.
    #[must_use]
    pub fn start(what: impl Into<String>) -> Self {
        Self::with(
            what.into(),
            ProgressBar::new_spinner(),
            "{spinner} {wide_msg} {elapsed}",
        )
    }

    /// Announces a step over so many bytes.
    #[must_use]
    pub fn bytes(what: impl Into<String>, total: u64) -> Self {
        let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        Self::with(what.into(), ProgressBar::new(total), template)
    }

    /// Announces a step over so many things.
    #[must_use]
    pub fn count(what: impl Into<String>, total: usize) -> Self {
        Self::with(
            what.into(),
            ProgressBar::new(total as u64),
            "{msg} [{bar:30}] {pos}/{len} {elapsed}",
        )
    }

    fn with(what: String, bar: ProgressBar, template: &str) -> Self {
        let bar = if std::io::stderr().is_terminal() {
            bar.set_style(
                ProgressStyle::with_template(template)
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            Some(bar)
        } else {
            eprintln!("{what} ...");
            None
        };
        Self {
            what,
            bar,
            started: Instant::now(),
        }
    }

    /// Says how far it is.
    pub fn at(&self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }

    /// Says what is being done now, within the step.
    pub fn doing(&self, detail: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {detail}", self.what));
        }
    }

    /// Says something where there is no terminal, so that a long step is not taken for one that
    /// hangs.
    pub fn say(&self, detail: &str) {
        if self.bar.is_none() {
            eprintln!("{}: {detail}", self.what);
        }
    }

    /// Ends the step and says how long it took.
    pub fn done(mut self) {
        let taken = seconds(self.started.elapsed());
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        eprintln!("{}: done in {taken}", self.what);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// A time as people read it.
#[must_use]
pub fn seconds(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s < 60.0 => format!("{s:.1} s"),
        s => format!("{:.0} min {:02.0} s", (s / 60.0).floor(), s % 60.0),
    }
}

/// A size in megabytes as people read it.
#[must_use]
pub fn megabytes(bytes: u64) -> String {
    format!("{} MB", bytes.div_ceil(1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_well() {
        assert_eq!(seconds(Duration::from_millis(4321)), "4.3 s");
        assert_eq!(seconds(Duration::from_secs(75)), "1 min 15 s");
        assert_eq!(megabytes(373_000_001), "374 MB");
    }
}
