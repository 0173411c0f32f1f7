//! Parts that guests of several tasks have: files, our modules, variables, and a message at their
//! end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use barlease_lab::prepare::Prepared;
use barlease_lab::report::seconds;
use barlease_lab::run::{Outcome, Run};
use barlease_lab::splat;

use crate::kmod;

/// A file and its place in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) file: PathBuf,
    pub(crate) place: String,
}

impl FromStr for Placed {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (file, place) = match text.rsplit_once(':') {
            Some((file, place)) => (PathBuf::from(file), place.to_owned()),
            None => (PathBuf::from(text), in_lab(Path::new(text))?),
        };
        if !place.starts_with('/') {
            bail!("the place in the guest is a full path, not `{place}`");
        }
        Ok(Self { file, place })
    }
}

/// The place of a program in a guest.
pub(crate) fn in_lab(file: &Path) -> Result<String> {
    let name = file
        .file_name()
        .with_context(|| format!("{} names no file", file.display()))?;
    Ok(format!("/lab/bin/{}", name.to_string_lossy()))
}

/// Our module, and those of the same build beside it without loading them.
pub(crate) fn with_module<'a>(run: Run<'a>, prepared: &Prepared) -> Result<Run<'a>> {
    with_modules_of(run, &kmod::build(prepared, false)?)
}

/// The same, of a build that has been made.
pub(crate) fn with_modules_of<'a>(mut run: Run<'a>, module: &Path) -> Result<Run<'a>> {
    let folder = module.parent().unwrap_or(Path::new("."));
    for entry in std::fs::read_dir(folder)?.filter_map(Result::ok) {
        let path = entry.path();
        if path != module && path.extension().is_some_and(|extension| extension == "ko") {
            let name = entry.file_name().to_string_lossy().into_owned();
            run = run.file(path, format!("/lib/modules/{name}"));
        }
    }
    Ok(run.module(module))
}

/// Variables that mean the same in the guest.
pub(crate) fn with_environment(mut run: Run<'_>) -> Run<'_> {
    for (name, value) in std::env::vars() {
        if name.starts_with("BARLEASE_TEST_")
            || ["CI", "RUST_BACKTRACE", "RUST_LOG", "RUST_TEST_NOCAPTURE"].contains(&name.as_str())
        {
            run = run.env(name, value);
        }
    }
    run
}

pub(crate) fn finish(outcome: &Outcome) -> Result<ExitCode> {
    eprint!("{}", remarks(outcome));
    Ok(ExitCode::from(
        u8::try_from(outcome.code).unwrap_or(u8::MAX),
    ))
}

/// The message about a guest at its end.
pub(crate) fn remarks(outcome: &Outcome) -> String {
    let mut said = String::new();
    for path in &outcome.screenshots {
        said += &format!("screenshot: {}\n", path.display());
    }
    let log = fs::read(&outcome.log).unwrap_or_default();
    let races = splat::races_of_others(&String::from_utf8_lossy(&log));
    if races != 0 {
        said += &format!(
            "data races of the kernel's own code, without us: {races} reports in {}\n",
            outcome.log.display()
        );
    }
    said += &format!(
        "guest: up after {}, done after {}, exit code {}\n",
        seconds(outcome.boot),
        seconds(outcome.total),
        outcome.code
    );
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_a_place() {
        let placed: Placed = "/tmp/a".parse().unwrap();
        assert_eq!(placed.place, "/lab/bin/a");
        let placed: Placed = "x/a:/root/b".parse().unwrap();
        assert_eq!(
            (placed.file.to_str(), placed.place.as_str()),
            (Some("x/a"), "/root/b")
        );
        assert!("a:b".parse::<Placed>().is_err());
    }
}
