//! How a command fails.

use std::io;
use std::path::Path;
use std::process::ExitCode;

/// Exit code of a failure.
const FAILURE: u8 = 1;
/// Exit code of wrong usage.
const USAGE: u8 = 2;
/// Exit code when the driver, kernel or device does not have what is asked for.
const UNSUPPORTED: u8 = 3;

/// Why a command failed: the text `operation: object: cause (remedy)`, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    code: u8,
}

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code: FAILURE,
        }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code: USAGE,
        }
    }

    pub(crate) fn unsupported(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code: UNSUPPORTED,
        }
    }

    /// A system call on a file failed.
    pub(crate) fn file(operation: &str, path: &Path, error: &io::Error) -> Self {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => " (run as root)",
            _ => "",
        };
        Self::new(format!("{operation}: {}: {error}{remedy}", path.display()))
    }

    /// Says it on standard error.
    pub(crate) fn exit(self) -> ExitCode {
        eprintln!("barlease: {}", self.text);
        ExitCode::from(self.code)
    }
}

impl From<barlease::Error> for Failure {
    fn from(error: barlease::Error) -> Self {
        let text = error.report().to_string();
        match error {
            barlease::Error::Unsupported { .. } => Self::unsupported(text),
            _ => Self::new(text),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(format!("print: standard output: {error}"))
    }
}
