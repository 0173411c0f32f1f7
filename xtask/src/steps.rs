//! Steps of a run of tests: what each came to, and what libtest counted in it.

use std::io::{self, BufRead, BufReader, Write};
use std::iter::Sum;
use std::ops::Add;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use barlease_lab::report::seconds;

use crate::checkout;

/// Results of libtest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

impl Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
        }
    }
}

impl Sum for Count {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}

/// A step that has been made.
#[derive(Debug)]
struct Done {
    name: String,
    taken: Duration,
    count: Count,
    verdict: Verdict,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Skipped(String),
    Failed(String),
}

#[derive(Debug, Default)]
pub(crate) struct Steps {
    done: Vec<Done>,
}

impl Steps {
    pub(crate) fn cargo(&mut self, name: &str, folder: &str, arguments: &[&str]) {
        self.command(name, checkout::cargo(folder).args(arguments));
    }

    pub(crate) fn command(&mut self, name: &str, command: &mut Command) {
        self.step(name, || counted(command, &mut io::stdout()));
    }

    pub(crate) fn make<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> bool {
        self.step(name, || (Count::default(), work().map(drop)))
    }

    /// A result that says something and proves nothing: it cannot fail.
    pub(crate) fn report(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        println!("\n=== {name}");
        let started = Instant::now();
        let verdict = match work() {
            Ok(()) => Verdict::Passed,
            Err(error) => {
                println!("no report: {error:#}");
                Verdict::Skipped("no report".to_owned())
            }
        };
        self.note(name, started.elapsed(), Count::default(), verdict);
    }

    pub(crate) fn step(&mut self, name: &str, work: impl FnOnce() -> (Count, Result<()>)) -> bool {
        println!("\n=== {name}");
        let started = Instant::now();
        let (count, result) = work();
        let verdict = match result {
            Ok(()) => Verdict::Passed,
            Err(error) => {
                eprintln!("error: {error:#}");
                Verdict::Failed(
                    error
                        .to_string()
                        .lines()
                        .next()
                        .unwrap_or_default()
                        .to_owned(),
                )
            }
        };
        let passed = verdict == Verdict::Passed;
        self.note(name, started.elapsed(), count, verdict);
        passed
    }

    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        println!("\n=== {name}\nskipped: {reason}");
        let verdict = Verdict::Skipped(reason.to_owned());
        self.note(name, Duration::ZERO, Count::default(), verdict);
    }

    fn note(&mut self, name: &str, taken: Duration, count: Count, verdict: Verdict) {
        self.done.push(Done {
            name: name.to_owned(),
            taken,
            count,
            verdict,
        });
    }

    pub(crate) fn summary(&self) -> ExitCode {
        println!("\n=== summary");
        for step in &self.done {
            let verdict = match &step.verdict {
                Verdict::Passed => "ok".to_owned(),
                Verdict::Skipped(reason) => format!("skipped: {reason}"),
                Verdict::Failed(reason) => format!("FAILED: {reason}"),
            };
            println!("{:>9}  {}: {verdict}", seconds(step.taken), step.name);
        }
        let total = self.total();
        println!("{} passed, {} failed", total.passed, total.failed);
        if total.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// A step that failed without a failed test (it does not build, the guest's log has a splat) is
    /// one failure.
    fn total(&self) -> Count {
        let mut total = Count::default();
        for step in &self.done {
            total.passed += step.count.passed;
            let failed = matches!(step.verdict, Verdict::Failed(_));
            total.failed += step.count.failed.max(usize::from(failed));
        }
        total
    }
}

/// Runs a command with its output passed on, and adds up what libtest says in it.
fn counted(command: &mut Command, out: &mut impl Write) -> (Count, Result<()>) {
    let mut count = Count::default();
    let result = watch(command, out, |line| {
        if let Some(more) = parse_result(line) {
            count.passed += more.passed;
            count.failed += more.failed;
        }
    });
    (count, result)
}

fn watch(command: &mut Command, out: &mut impl Write, mut each: impl FnMut(&str)) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start cargo")?;
    if let Some(output) = child.stdout.take() {
        let mut lines = BufReader::new(output);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            out.write_all(&line)?;
            out.flush()?;
            each(&String::from_utf8_lossy(&line));
            line.clear();
        }
    }
    let status = child.wait().context("wait for cargo")?;
    if !status.success() {
        bail!("cargo ended with {status}");
    }
    Ok(())
}

/// `test result: ok. 3 passed; 0 failed; …`
pub(crate) fn parse_result(line: &str) -> Option<Count> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut words = rest.split(' ');
    let passed = words.next()?.parse().ok()?;
    let failed = words.nth(1)?.parse().ok()?;
    Some(Count { passed, failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_libtest_are_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";
        assert_eq!(
            parse_result(line),
            Some(Count {
                passed: 12,
                failed: 3
            })
        );
        assert_eq!(parse_result("test a_test ... ok"), None);
    }

    #[test]
    fn a_step_that_fails_without_a_failed_test_counts_once() {
        let mut steps = Steps::default();
        steps.step("build", || {
            (Count::default(), Err(anyhow::anyhow!("does not build")))
        });
        steps.step("tests", || {
            (
                Count {
                    passed: 2,
                    failed: 3,
                },
                Err(anyhow::anyhow!("cargo ended")),
            )
        });
        steps.step("more", || {
            (
                Count {
                    passed: 5,
                    failed: 0,
                },
                Ok(()),
            )
        });
        steps.skip("other", "no");
        assert_eq!(
            steps.total(),
            Count {
                passed: 7,
                failed: 4
            }
        );
    }

    #[test]
    fn output_is_counted_as_it_passes() {
        let mut shell = Command::new("sh");
        shell.args([
            "-c",
            "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; exit 1",
        ]);
        // Not our own output: whoever runs this test may count, too.
        let mut passed_on = Vec::new();
        let (count, result) = counted(&mut shell, &mut passed_on);
        assert!(passed_on.starts_with(b"test result"));
        assert_eq!(
            count,
            Count {
                passed: 2,
                failed: 0
            }
        );
        assert!(result.is_err());
    }
}
