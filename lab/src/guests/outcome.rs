//! How a run went, or why it has failed.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::guests::splat::{INIT_STARTED, Splat};
use crate::packages::command;
use crate::packages::report::seconds;

/// Lines of a log that are shown when there is nothing better.
pub(crate) const TAIL: usize = 60;

/// How a run went whose guest came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The command's exit code; 128 + n when a signal ended it.
    pub code: i32,
    /// The kernel's log.
    pub log: PathBuf,
    /// Pictures that were taken, in order.
    pub screenshots: Vec<PathBuf>,
    /// The command's output, when it was captured.
    pub output: Vec<u8>,
    /// From the start of the emulator until the command started.
    pub boot: Duration,
    /// From the start of the emulator to its end.
    pub total: Duration,
}

/// Why a run has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The kernel complained.
    Splat {
        /// Its output.
        splat: Splat,
        /// Its log.
        log: PathBuf,
    },
    /// The guest took too long.
    Timeout {
        /// The time it had, for its work or to power off.
        limit: Duration,
        /// The end of the kernel's log.
        tail: String,
        /// The kernel's log.
        log: PathBuf,
    },
    /// The guest's kernel never came as far as init, so nothing of ours has run.
    NoInit {
        /// The time it had, less when it had stopped to say anything.
        limit: Duration,
        /// The end of the kernel's log.
        tail: String,
        /// The kernel's log.
        log: PathBuf,
    },
    /// The guest ended, but never said how the command did.
    NoVerdict {
        /// The emulator's output.
        emulator: String,
        /// The end of the kernel's log.
        tail: String,
        /// The kernel's log.
        log: PathBuf,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Splat { splat, log } => {
                let more = if splat.total > 1 {
                    format!(" (the first of {})", splat.total)
                } else {
                    String::new()
                };
                write!(
                    f,
                    "the guest's kernel complained: {}{more}\n{}\nlog: {}",
                    splat.line,
                    splat.excerpt,
                    log.display()
                )
            }
            Self::Timeout { limit, tail, log } => {
                let limit = seconds(*limit);
                write!(
                    f,
                    "the guest took longer than {limit} and was stopped; the end of its log:\n{tail}\nlog: {}",
                    log.display()
                )
            }
            Self::NoInit { limit, tail, log } => write!(
                f,
                "the guest's kernel was not up after {} and was stopped; the end of its log:\n{tail}\nlog: {}",
                seconds(*limit),
                log.display()
            ),
            Self::NoVerdict {
                emulator,
                tail,
                log,
            } => write!(
                f,
                "the guest ended without saying how the command did. The emulator said:\n{emulator}\n\
                 The end of the guest's log:\n{tail}\nlog: {}",
                log.display()
            ),
        }
    }
}

impl std::error::Error for Failure {}

/// The emulator's own failure, if it was that.
pub(crate) fn emulator_fault(result: &Result<Outcome>) -> Option<&'static str> {
    match result.as_ref().err()?.downcast_ref()? {
        Failure::Splat { splat, .. } if splat.emulator_fault => {
            Some("Oops: int3 before init has started")
        }
        Failure::NoInit { .. } => Some("it stands still before init has started"),
        _ => None,
    }
}

/// The output after init had started, if it had.
pub(crate) fn since_init(log: &str) -> &str {
    log.find(INIT_STARTED).map_or(log, |at| &log[at..])
}

/// The emulator's output, without what it always says about features of processors.
pub(crate) fn remarks(emulator: &str) -> String {
    let lines = emulator
        .lines()
        .filter(|line| !line.contains("support requested feature"));
    match command::tail(&lines.collect::<Vec<_>>().join("\n"), 10) {
        said if said.is_empty() => "(nothing)".to_owned(),
        said => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guests::splat;

    #[test]
    fn only_remarks_of_interest_are_shown() {
        let said =
            "qemu: warning: TCG doesn't support requested feature: X\nqemu: no such device\n";
        assert_eq!(remarks(said), "qemu: no such device");
        assert_eq!(remarks(""), "(nothing)");
    }

    #[test]
    fn the_tail_begins_where_init_does() {
        assert!(since_init("boot\nbarlease-lab: init started\nmore\n").starts_with("barlease-lab"));
        assert_eq!(since_init("boot\n"), "boot\n");
    }

    #[test]
    fn only_the_emulators_fault_is_tried_again() {
        let failed = |log: &str| {
            let splat = splat::scan(log).unwrap();
            Err(Failure::Splat {
                splat,
                log: PathBuf::new(),
            }
            .into())
        };
        assert!(emulator_fault(&failed("Oops: int3: 0000 [#1]\n")).is_some());
        let after_init = failed("barlease-lab: init started\nOops: int3: 0000 [#1]\n");
        assert_eq!(emulator_fault(&after_init), None);
        assert_eq!(emulator_fault(&failed("Oops: 0002 [#1]\n")), None);
        let late = Failure::Timeout {
            limit: Duration::from_secs(1),
            tail: String::new(),
            log: PathBuf::new(),
        };
        assert_eq!(emulator_fault(&Err(late.into())), None);
        let still = Failure::NoInit {
            limit: Duration::from_secs(1),
            tail: String::new(),
            log: PathBuf::new(),
        };
        assert!(emulator_fault(&Err(still.into())).is_some());
    }

    #[test]
    fn a_failure_names_its_log() {
        let splat = splat::scan("WARNING: x\n").unwrap();
        let text = Failure::Splat {
            splat,
            log: PathBuf::from("/run/console.log"),
        }
        .to_string();
        assert!(
            text.contains("/run/console.log") && text.contains("WARNING: x"),
            "{text}"
        );
    }
}
