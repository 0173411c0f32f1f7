//! How often a function of the kernel is called, by a probe at its beginning
//! (`Documentation/trace/kprobetrace.rst`).

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::Path,
};

use crate::allocations::tracing;

/// Counts the calls of one function, on all processors.
#[derive(Debug)]
pub struct Calls(&'static str);

impl Calls {
    /// From now on. `None` where the kernel has no such probes.
    ///
    /// # Panics
    ///
    /// When it has, and not such a function.
    #[must_use]
    pub fn of(function: &'static str) -> Option<Self> {
        let tracing = tracing()?;
        if !tracing.join("kprobe_events").exists() {
            return None;
        }
        say(&tracing, &format!("p:barlease/{function} {function}"));
        let this = Self(function);
        this.enable("1");
        Some(this)
    }

    /// How many there were.
    ///
    /// # Panics
    ///
    /// When the kernel does not say it.
    #[must_use]
    pub fn count(&self) -> u64 {
        let profile = tracing().expect("tracing").join("kprobe_profile");
        let text = fs::read_to_string(profile).expect("kprobe_profile");
        let mut lines = text.lines().map(|line| line.split_whitespace());
        let hits = lines.find_map(|mut words| (words.next() == Some(self.0)).then(|| words.next()));
        hits.flatten()
            .and_then(|hits| hits.parse().ok())
            .expect("a number of hits")
    }

    fn enable(&self, value: &str) {
        let event = format!("events/barlease/{}/enable", self.0);
        let path = tracing().expect("tracing").join(event);
        fs::write(path, value).expect("a probe");
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.enable("0");
        say(
            &tracing().expect("tracing"),
            &format!("-:barlease/{}", self.0),
        );
    }
}

fn say(tracing: &Path, line: &str) {
    let path = tracing.join("kprobe_events");
    let file = OpenOptions::new().append(true).open(path);
    let mut file = file.expect("kprobe_events");
    file.write_all(line.as_bytes()).expect(line);
}
