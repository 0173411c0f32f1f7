//! How a command fails.

use std::fmt;
use std::io;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::Value;
use serde_json::json;

use crate::output::Output;

/// Exit code of a failure.
const FAILURE: u8 = 1;
/// Exit code of wrong usage.
const USAGE: u8 = 2;
/// Exit code when the driver, kernel or device does not have what is asked for.
const UNSUPPORTED: u8 = 3;
/// Exit code of a command that a signal ended, less the number of the signal.
const SIGNALS: u8 = 128;
/// Exit code when nobody reads the output any more, as a shell gives to programs that SIGPIPE
/// ends.
const UNREAD: u8 = 141;

/// Why a command failed: the text `operation: object: cause (remedy)`, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    code: u8,
    /// The steps that were undone because of it, as lines for people and as JSON.
    undone: Option<Box<(Vec<String>, Value)>>,
    /// It is a part of what was printed.
    is_said: bool,
    /// For programs.
    details: Option<Value>,
}

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self::coded(FAILURE, text)
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::coded(USAGE, text)
    }

    pub(crate) fn unsupported(text: impl Into<String>) -> Self {
        Self::coded(UNSUPPORTED, text)
    }

    /// A signal ended it: exits as a shell says of programs that the signal ends at once.
    pub(crate) fn interrupted(operation: &str, signal: Signal) -> Self {
        let code = u8::try_from(signal as i32).map_or(FAILURE, |number| SIGNALS + number);
        Self::coded(code, format!("{operation}: interrupted by {signal}"))
    }

    fn coded(code: u8, text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            code,
            undone: None,
            details: None,
            is_said: false,
        }
    }

    /// The same, with what was undone.
    pub(crate) fn undone(mut self, lines: &[String], list: &impl Serialize) -> Self {
        let list = serde_json::to_value(list).unwrap_or_default();
        self.undone = Some(Box::new((lines.to_vec(), list)));
        self
    }

    /// Its keys in JSON, for an object that is being printed when it happens.
    pub(crate) fn keys(&mut self) -> String {
        self.is_said = true;
        format!("\"error\":{},\"exit_code\":{}", json!(self.text), self.code)
    }

    /// Facts for programs, in the key `details`.
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
        let mut document = json!({"error": self.text, "exit_code": self.code});
        if let Some(details) = self.details {
            document["details"] = details;
        }
        let mut lines = vec![self.text];
        if let Some((more, list)) = self.undone.map(|undone| *undone) {
            document["undone"] = list;
            lines.extend(more.into_iter().map(|line| format!("undone: {line}")));
        }
        let said = match (self.code, output.is_json()) {
            (UNREAD, _) => true,
            _ if self.is_said => true,
            (_, true) => output.document(&document).is_ok(),
            (_, false) => false,
        };
        for line in lines.iter().filter(|_| !said) {
            // There is nobody to tell that it cannot be said.
            let _ = writeln!(io::stderr(), "barlease: {line}");
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
            return Self::coded(UNREAD, "");
        }
        Self::new(format!("print: standard output: {error}"))
    }
}
