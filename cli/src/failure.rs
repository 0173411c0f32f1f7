//! How a command fails.

use std::fmt;
use std::io;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde_json::Value;
use serde_json::json;

use crate::output::Output;

/// Exit code of a failure.
const FAILURE: u8 = 1;
/// Exit code of wrong usage.
const USAGE: u8 = 2;
/// Exit code when the driver, kernel or device does not have what is asked for.
const UNSUPPORTED: u8 = 3;
/// Exit code when nobody reads the output any more: what a shell says of programs that SIGPIPE ends.
const UNREAD: u8 = 141;

/// Why a command failed: the text `operation: object: cause (remedy)`, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    code: u8,
    /// For programs.
    details: Option<Value>,
}

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code: FAILURE,
            details: None,
        }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code: USAGE,
            details: None,
        }
    }

    pub(crate) fn unsupported(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code: UNSUPPORTED,
            details: None,
        }
    }

    /// What programs are told in the key `details`.
    pub(crate) fn with_details(mut self, details: Value) -> Self {
        self.details = Some(details);
        self
    }

    /// A system call on a file failed.
    pub(crate) fn file(operation: &str, path: &Path, error: &io::Error) -> Self {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => " (run as root)",
            _ => "",
        };
        Self::new(format!("{operation}: {}: {error}{remedy}", path.display()))
    }

    /// Says it: on standard output as `{"error", "exit_code"}` where JSON is asked for, else on
    /// standard error.
    pub(crate) fn exit(self, output: Output) -> ExitCode {
        let said = match (self.code, output.is_json()) {
            (UNREAD, _) => true,
            (_, true) => {
                let mut told = json!({"error": self.text, "exit_code": self.code});
                if let Some(details) = self.details {
                    told["details"] = details;
                }
                output.document(&told).is_ok()
            }
            (_, false) => false,
        };
        if !said {
            // There is nobody to tell that it cannot be said.
            let _ = writeln!(io::stderr(), "barlease: {}", self.text);
        }
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<barlease::Error> for Failure {
    fn from(error: barlease::Error) -> Self {
        let text = error.report().to_string();
        match error {
            barlease::Error::Unsupported { .. }
            | barlease::Error::NotBound { .. }
            | barlease::Error::NoIommuGroup { .. } => Self::unsupported(text),
            _ => Self::new(text),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self {
                text: String::new(),
                code: UNREAD,
                details: None,
            };
        }
        Self::new(format!("print: standard output: {error}"))
    }
}
