//! Signals that end a command, and its words while it waits.

use std::cell::Cell;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use barlease::Bdf;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SfdFlags;
use nix::sys::signalfd::SignalFd;

use crate::failure::Failure;

/// How long to wait in silence.
const PATIENCE: Duration = Duration::from_secs(3);
/// How soon a signal is answered while a driver lets go.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// SIGINT, SIGTERM and SIGHUP, which end nothing any more: they are asked for.
pub(super) struct Interrupt {
    signals: SignalFd,
    came: Cell<Option<Signal>>,
}

impl Interrupt {
    pub(super) fn new(operation: &str) -> Result<Self, Failure> {
        let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        let signals = set
            .thread_block()
            .and_then(|()| {
                SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            })
            .map_err(|errno| Failure::new(format!("{operation}: signals: {errno}")))?;
        Ok(Self {
            signals,
            came: Cell::new(None),
        })
    }

    /// The first that has come.
    pub(super) fn signal(&self) -> Option<Signal> {
        if self.came.get().is_none() {
            let read = self.signals.read_signal().ok().flatten();
            let number = read.and_then(|signal| i32::try_from(signal.ssi_signo).ok());
            self.came
                .set(number.and_then(|it| Signal::try_from(it).ok()));
        }
        self.came.get()
    }
}

/// Does what may take long in a thread, and says what it is waiting for: a vfio driver lets go only
/// when nobody has the device open.
pub(super) fn patiently(
    operation: &str,
    bdf: Bdf,
    interrupt: &Interrupt,
    work: impl FnOnce() -> barlease::Result<()> + Send,
) -> barlease::Result<()> {
    std::thread::scope(|scope| {
        let (done, wait) = mpsc::channel();
        scope.spawn(move || done.send(work()));
        let begin = Instant::now();
        let (mut waits, mut interrupted) = (false, false);
        loop {
            match wait.recv_timeout(LOOK_AGAIN) {
                Ok(answer) => return answer,
                // It cannot end without an answer but by a panic, which the scope passes on.
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if !waits && begin.elapsed() >= PATIENCE {
                waits = true;
                eprintln!(
                    "barlease: {operation}: {bdf}: waiting for its driver to let go (`barlease \
                     lease holders {bdf}`)"
                );
            }
            if !interrupted && interrupt.signal().is_some() {
                interrupted = true;
                eprintln!(
                    "barlease: {operation}: {bdf}: interrupted: all is undone as soon as its \
                     driver has let go, which nothing can stop (`barlease lease holders {bdf}`)"
                );
            }
        }
    })
}
