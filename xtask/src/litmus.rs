//! `cargo xtask litmus`: the order of memory beyond locks, by the kernel's memory model
//! (`model/litmus/README.md`).

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use barlease_lab::litmus::{Herd, Observation};
use barlease_lab::prepare::{Prepared, Request, prepare};

use crate::checkout;
use crate::steps::Count;

/// A test, and the bugs that can be planted in it.
#[derive(Debug, PartialEq, Eq)]
struct Litmus<'a> {
    /// The claim about the code.
    comment: &'a str,
    code: &'a str,
    result: Observation,
    weaker: Vec<(&'a str, &'a str)>,
}

pub(crate) fn run() -> Result<ExitCode> {
    let (count, result) = judge(&prepare(&Request::default())?);
    result?;
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(ExitCode::SUCCESS)
}

/// Judges every test, and every bug planted in one.
pub(crate) fn judge(prepared: &Prepared) -> (Count, Result<()>) {
    let mut count = Count::default();
    let result = judge_all(prepared, &mut count);
    (count, result)
}

fn judge_all(prepared: &Prepared, count: &mut Count) -> Result<()> {
    let herd = Herd::prepare(prepared)?;
    let folder = checkout::top().join("model/litmus");
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let file = entry?.path();
        if file.extension().is_some_and(|ending| ending == "litmus") {
            files.push(file);
        }
    }
    ensure!(!files.is_empty(), "no tests in {}", folder.display());
    files.sort();
    for file in files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let litmus = Litmus::parse(&text).with_context(|| format!("litmus test {name}"))?;
        for (what, code, expected) in litmus.variants()? {
            let seen = herd
                .observe(&code)
                .with_context(|| format!("{name}, {what}"))?;
            if seen == expected {
                count.passed += 1;
                println!("{name}, {what}: {seen:?}");
            } else {
                count.failed += 1;
                println!("{name}, {what}: {seen:?}, not {expected:?}");
            }
        }
    }
    ensure!(count.failed == 0, "{} litmus tests failed", count.failed);
    Ok(())
}

impl<'a> Litmus<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let (comment, code) = text
            .split_once("*)")
            .context("it has no comment with a result")?;
        let mut result = None;
        let mut weaker = Vec::new();
        for line in comment
            .lines()
            .map(|line| line.trim_start_matches([' ', '*']))
        {
            if let Some(word) = line.strip_prefix("Result: ") {
                result = Observation::parse(word);
            } else if let Some(change) = line.strip_prefix("Weaker: ") {
                weaker.push(change.split_once(" -> ").context("a change is `A -> B`")?);
            }
        }
        let result = result.context("its comment has no `Result: Never`")?;
        ensure!(
            !weaker.is_empty(),
            "its comment names no weaker form: it could not be seen to fail"
        );
        Ok(Self {
            comment,
            code,
            result,
            weaker,
        })
    }

    /// The test, and the test with each bug: a name, the text, the result.
    fn variants(&self) -> Result<Vec<(String, String, Observation)>> {
        let whole = |code: &str| format!("{}*){code}", self.comment);
        let mut variants = vec![("as it is".to_owned(), whole(self.code), self.result)];
        for (from, to) in &self.weaker {
            if !self.code.contains(from) {
                bail!("`{from}`, which is to become weaker, is not in the test");
            }
            let weak = whole(&self.code.replace(from, to));
            variants.push((format!("with {to}"), weak, Observation::Sometimes));
        }
        Ok(variants)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bugs_are_planted_in_the_code_and_not_in_the_comment() {
        let text = "C x\n(*\n * Result: Never\n * Weaker: xchg( -> xchg_relaxed(\n *)\nxchg(a)\n";
        let litmus = Litmus::parse(text).unwrap();
        let variants = litmus.variants().unwrap();
        assert_eq!(
            variants[0],
            ("as it is".into(), text.into(), Observation::Never)
        );
        let (name, planted, expected) = &variants[1];
        assert_eq!(name, "with xchg_relaxed(");
        assert!(planted.ends_with("*)\nxchg_relaxed(a)\n"));
        assert!(planted.contains("Weaker: xchg( ->"));
        assert_eq!(*expected, Observation::Sometimes);
    }

    #[test]
    fn a_test_that_cannot_fail_is_refused() {
        for text in [
            "no comment",
            "(*\n * Result: Never\n *)\n",
            "(*\n * Weaker: a -> b\n *)\na",
        ] {
            assert!(Litmus::parse(text).is_err(), "{text}");
        }
        let gone = Litmus::parse("(*\n * Result: Never\n * Weaker: a -> b\n *)\nc").unwrap();
        assert!(gone.variants().is_err());
    }
}
