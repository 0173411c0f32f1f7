//! Guests side by side: each test binary has one, and what it says is shown in one piece.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use barlease_lab::prepare::Prepared;
use serde_json::Value;

use crate::checkout;
use crate::test::{Count, parse_result};

/// What the guest of a test takes of this machine's memory, in MiB: 1 GiB of its own, and what QEMU needs.
const MEMORY: u32 = 2048;

/// The test binaries of `guest-tests/` and the guest tests to run on a kernel.
pub(crate) struct Pool<'a> {
    pub(crate) binaries: &'a [Binary],
    pub(crate) prepared: &'a Prepared,
    pub(crate) filter: Option<&'a str>,
    /// How many guests at a time.
    pub(crate) jobs: usize,
}

/// A test binary that runs in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Binary {
    /// The file in `guest-tests/tests/` without `.rs`, or the name of the package for its unit tests.
    name: String,
    path: PathBuf,
}

/// As many guests as there are processors, and as fit into memory.
pub(crate) fn jobs() -> usize {
    guests_of(MEMORY)
}

/// How many guests can run at a time, each of which takes so many MiB.
pub(crate) fn guests_of(memory: u32) -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let fit = available(&info).map_or(processors, |bytes| {
        usize::try_from(bytes / (u64::from(memory) << 20)).unwrap_or(usize::MAX)
    });
    processors.min(fit).max(1)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(info: &str) -> Option<u64> {
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes << 10)
}

/// Builds the guest tests.
///
/// # Errors
///
/// When they do not build; the compiler's messages have been shown.
pub(crate) fn binaries() -> Result<Vec<Binary>> {
    let output = checkout::cargo("guest-tests")
        .args([
            "test",
            "--no-run",
            "--message-format",
            "json-render-diagnostics",
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo")?;
    if !output.status.success() {
        bail!("cargo ended with {}", output.status);
    }
    let messages = String::from_utf8(output.stdout).context("read what cargo says")?;
    let binaries: Vec<_> = messages.lines().filter_map(binary).collect();
    if binaries.is_empty() {
        bail!("cargo has built no guest test");
    }
    Ok(binaries)
}

/// The test binary that a message of cargo's is about.
fn binary(message: &str) -> Option<Binary> {
    let message: Value = serde_json::from_str(message).ok()?;
    let is_test = message["reason"] == "compiler-artifact" && message["profile"]["test"] == true;
    is_test.then_some(())?;
    Some(Binary {
        name: message["target"]["name"].as_str()?.to_owned(),
        path: message["executable"].as_str()?.into(),
    })
}

/// What came of a binary.
struct Outcome {
    count: Count,
    result: Result<()>,
}

impl Pool<'_> {
    /// Runs all of them, and says what failed.
    pub(crate) fn run(&self) -> (Count, Result<()>) {
        let this = match std::env::current_exe() {
            Ok(this) => this,
            Err(error) => return (Count::default(), Err(error.into())),
        };
        let queue: Mutex<VecDeque<_>> = Mutex::new(self.binaries.iter().collect());
        let done = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| {
                    while let Some(binary) = next(&queue) {
                        let outcome = self.one(&this, binary);
                        locked(&done).push((binary, outcome));
                    }
                });
            }
        });
        let mut count = Count::default();
        let mut failed = Vec::new();
        for (binary, outcome) in locked(&done).drain(..) {
            count.passed += outcome.count.passed;
            count.failed += outcome.count.failed;
            if let Err(error) = outcome.result {
                println!("{}: {error:#}; again:", binary.name);
                println!("  {}", self.again(binary));
                failed.push(binary.name.as_str());
            }
        }
        failed.sort_unstable();
        if failed.is_empty() {
            return (count, Ok(()));
        }
        (
            count,
            Err(anyhow::anyhow!("these failed: {}", failed.join(", "))),
        )
    }

    /// How a person runs that binary again.
    fn again(&self, binary: &Binary) -> String {
        format!(
            "cd guest-tests && BARLEASE_KERNEL={} cargo test --test {}",
            self.prepared.kernel.name, binary.name
        )
    }

    fn one(&self, this: &Path, binary: &Binary) -> Outcome {
        let mut said = Vec::new();
        let mut command = Command::new(this);
        command
            .args(["vm", "test"])
            .arg(&binary.path)
            .args(self.filter)
            .current_dir(checkout::top().join("guest-tests"))
            .env("BARLEASE_KERNEL", &self.prepared.kernel.name)
            .stdin(Stdio::null());
        let result = run(&mut command, &mut said);
        let mut count = Count::default();
        for line in String::from_utf8_lossy(&said).lines() {
            if let Some(more) = parse_result(line) {
                count.passed += more.passed;
                count.failed += more.failed;
            }
        }
        if count != Count::default() || result.is_err() {
            let mut out = io::stdout().lock();
            let title = format!("\n--- {} on {}\n", binary.name, self.prepared.kernel.name);
            let _ = out.write_all(title.as_bytes());
            let _ = out.write_all(&said);
            let _ = out.flush();
        }
        Outcome { count, result }
    }
}

/// Runs a command, and takes down what it says on both outputs.
fn run(command: &mut Command, said: &mut Vec<u8>) -> Result<()> {
    let said = Mutex::new(said);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start a guest")?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| take_down(output, &said));
        scope.spawn(|| take_down(errors, &said));
    });
    let status = child.wait().context("wait for a guest")?;
    if !status.success() {
        bail!("ended with {status}");
    }
    Ok(())
}

/// Line by line, so that the two outputs mix only between lines.
fn take_down(output: Option<impl Read>, said: &Mutex<&mut Vec<u8>>) {
    let Some(output) = output else { return };
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    while lines
        .read_until(b'\n', &mut line)
        .is_ok_and(|length| length > 0)
    {
        locked(said).append(&mut line);
    }
}

fn next<T>(queue: &Mutex<VecDeque<T>>) -> Option<T> {
    locked(queue).pop_front()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_binaries_are_found_among_cargos_messages() {
        let message = |kind: &str, test: bool| {
            serde_json::json!({
                "reason": "compiler-artifact",
                "target": {"kind": [kind], "name": "mmap"},
                "profile": {"test": test},
                "executable": "/t/mmap-1",
            })
            .to_string()
        };
        let found = Binary {
            name: "mmap".to_owned(),
            path: "/t/mmap-1".into(),
        };
        assert_eq!(binary(&message("test", true)), Some(found.clone()));
        // Unit tests of what the tests share.
        assert_eq!(binary(&message("lib", true)), Some(found));
        assert_eq!(binary(&message("test", false)), None);
        assert_eq!(
            binary(r#"{"reason":"build-finished","success":true}"#),
            None
        );
        assert_eq!(binary("error: no json"), None);
    }

    #[test]
    fn available_memory_is_read() {
        let info = "MemTotal: 24 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(available(info), Some(8 << 20));
        assert_eq!(available("MemTotal: 24 kB\n"), None);
    }

    #[test]
    fn both_outputs_and_the_exit_code_are_taken_down() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo out; echo err >&2; exit 3"]);
        let mut said = Vec::new();
        let error = run(&mut shell, &mut said).unwrap_err().to_string();
        assert!(error.contains('3'), "{error}");
        let said = String::from_utf8(said).unwrap();
        let mut lines: Vec<_> = said.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["err", "out"]);
    }
}
