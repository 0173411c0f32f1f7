//! The output of the kernel's own tests in a guest: which verdict each came to.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use barlease_lab::report::seconds;
use barlease_lab::selftests::{self, Verdict};

/// A program that skips all of its tests ends so (`KSFT_SKIP`).
const SKIPPED: i32 = 4;

/// Whether a program has said as many results as it had announced: one that dies has not passed.
pub(super) const TO_ITS_END: &str = "runs to its end";

/// The outcome of a program.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Said {
    /// The verdict on each test, and what was said before it.
    pub(super) tests: BTreeMap<String, (Verdict, String)>,
    pub(super) taken: Duration,
}

/// The outcomes of programs, by `DEVICE PROGRAM`.
pub(super) type Results = BTreeMap<String, Said>;

impl Said {
    /// A test that is absent has not passed.
    pub(super) fn verdict(&self, test: &str) -> Verdict {
        self.tests
            .get(test)
            .map_or(Verdict::Failed, |(verdict, _)| *verdict)
    }

    pub(super) fn text(&self, test: &str) -> &str {
        self.tests
            .get(test)
            .map_or("it did not run", |(_, text)| text.as_str())
    }

    /// How many tests have that verdict; that all of them came to one is no test of the kernel's.
    pub(super) fn count(&self, wanted: Verdict) -> usize {
        let tests = self.tests.iter();
        tests
            .filter(|(test, (verdict, _))| {
                *verdict == wanted && (test.as_str() != TO_ITS_END || wanted != Verdict::Passed)
            })
            .count()
    }

    /// Keeps the better verdict of each test.
    pub(super) fn add(&mut self, more: Self) {
        for (test, new) in more.tests {
            if self.tests.get(&test).is_none_or(|old| old.0 < new.0) {
                self.tests.insert(test, new);
            }
        }
        self.taken += more.taken;
    }

    /// `7 ok, 1 failed, 2 skipped`, and how long they took.
    pub(super) fn in_short(&self) -> String {
        let verdicts = [
            (Verdict::Passed, "ok"),
            (Verdict::Failed, "failed"),
            (Verdict::Skipped, "skipped"),
        ];
        let mut parts: Vec<_> = verdicts
            .into_iter()
            .map(|(verdict, word)| (self.count(verdict), word))
            .filter(|(count, _)| *count > 0)
            .map(|(count, word)| format!("{count} {word}"))
            .collect();
        parts.push(seconds(self.taken));
        parts.join(", ")
    }
}

/// The results in the output of several programs, each between a line with its name and one with
/// its exit code and the times of its beginning and its end.
pub(super) fn read(output: &str) -> Result<Results> {
    let mut results = Results::new();
    let mut lines = output.lines().map(str::trim_end);
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_prefix("+++ ") else {
            continue;
        };
        let mut said = Said::default();
        let (mut planned, mut text) = (None, String::new());
        let end = loop {
            let line = lines.next().with_context(|| format!("{name} has no end"))?;
            if let Some(end) = line.strip_prefix("--- ") {
                break end;
            }
            planned = planned.or(selftests::planned(line));
            match selftests::result(line) {
                Some((test, verdict)) => {
                    let text = std::mem::take(&mut text);
                    said.tests.insert(test.to_owned(), (verdict, text));
                }
                None => {
                    text += line;
                    text.push('\n');
                }
            }
        };
        let (code, taken) = ending(end).with_context(|| format!("{name} ends with `{end}`"))?;
        said.taken = taken;
        let whole = match planned {
            _ if code == SKIPPED && said.tests.is_empty() => Verdict::Skipped,
            Some(planned) if planned == said.tests.len() => Verdict::Passed,
            _ => Verdict::Failed,
        };
        said.tests.insert(TO_ITS_END.to_owned(), (whole, text));
        results.insert(name.to_owned(), said);
    }
    Ok(results)
}

/// `EXIT-CODE FROM TO`, in seconds.
fn ending(text: &str) -> Option<(i32, Duration)> {
    let mut words = text.split(' ');
    let code = words.next()?.parse().ok()?;
    let from: f64 = words.next()?.parse().ok()?;
    let to: f64 = words.next()?.parse().ok()?;
    Some((code, Duration::try_from_secs_f64(to - from).ok()?))
}
