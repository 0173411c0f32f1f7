//! Kills of the daemon.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use rustix::process::Signal;

/// What the daemon does before each action: it dies there, if that is wanted.
pub(crate) fn before_action(directory: &Path) -> Box<dyn Fn()> {
    let Ok(wanted) = std::env::var(super::DIE) else {
        return Box::new(|| {});
    };
    let died = directory.join("died");
    let once: u64 = wanted.parse().unwrap();
    let count = Cell::new(0);
    Box::new(move || {
        if count.replace(count.get() + 1) == once && !died.exists() {
            fs::write(&died, "").unwrap();
            die();
        }
    })
}

fn die() -> ! {
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, Signal::KILL).unwrap();
    unreachable!("killed");
}
