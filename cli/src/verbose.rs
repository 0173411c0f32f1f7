//! `--verbose`: messages of library and command to the crate `log` go to standard error.

use std::io;
use std::io::Write;

use log::LevelFilter;
use log::Log;
use log::Metadata;
use log::Record;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

/// How long a line may wait for somebody to read those before it: nothing may stop the loop of
/// `lease grant`.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("barlease")
    }

    fn log(&self, record: &Record<'_>) {
        let mut stderr = io::stderr();
        let mut room = [PollFd::new(&stderr, PollFlags::OUT)];
        let there_is = rustix::event::poll(&mut room, Some(&PATIENCE)) == Ok(1);
        if there_is && self.enabled(record.metadata()) {
            // A reader that is gone does not want to know.
            let _ = writeln!(stderr, "barlease: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Once: each step. Twice: each ioctl, too.
pub(crate) fn begin(times: u8) {
    let level = match times {
        0 => return,
        1 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    // Somebody that calls this crate's functions may have one of its own, which stays.
    let _ = log::set_logger(&Stderr);
    log::set_max_level(level);
}
