//! The test binaries of `guest-tests/`: built, found, and given what tests have in a guest.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use barlease_lab::prepare::Prepared;
use barlease_lab::run::Run;
use serde_json::Value;

use crate::checkout;
use crate::guest::{with_environment, with_modules_of};

/// A test binary that runs in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Binary {
    /// The file in `guest-tests/tests/` without `.rs`, or the name of the package for its unit
    /// tests.
    pub(crate) name: String,
    pub(super) path: PathBuf,
}

/// Builds the guest tests for guests with that kernel; only those of these names, if there are any.
///
/// # Errors
///
/// When they do not build; the compiler's messages have been shown.
pub(crate) fn binaries(prepared: &Prepared, only: &[&str]) -> Result<Vec<Binary>> {
    let output = checkout::guest_cargo(prepared, "test")?
        .args(only.iter().flat_map(|name| ["--test", name]))
        .args(["--no-run", "--message-format", "json-render-diagnostics"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo")?;
    if !output.status.success() {
        bail!("cargo ended with {}", output.status);
    }
    let messages = String::from_utf8(output.stdout).context("read what cargo says")?;
    let mut binaries: Vec<_> = messages.lines().filter_map(binary).collect();
    for binary in &mut binaries {
        binary.path = checkout::outside(prepared, &binary.path)?;
    }
    if binaries.is_empty() {
        bail!("cargo has built no guest test");
    }
    Ok(binaries)
}

/// Builds one of the guest tests for guests with that kernel, and returns its path.
///
/// # Errors
///
/// As [`binaries`].
pub(crate) fn called(prepared: &Prepared, name: &str) -> Result<PathBuf> {
    let mut binaries = binaries(prepared, &[name])?;
    let place = binaries.iter().position(|binary| binary.name == name);
    let place = place.with_context(|| format!("there is no test binary {name}"))?;
    Ok(binaries.swap_remove(place).path)
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

/// Whether a test binary has tests that these arguments leave. A binary that does not run here is
/// taken to have some.
pub(crate) fn has_tests(
    binary: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> bool {
    let mut list = Command::new(binary);
    list.args(arguments).args(["--list", "--format", "terse"]);
    let listed = list.output();
    !listed.is_ok_and(|listed| listed.status.success() && listed.stdout.is_empty())
}

/// With our modules, and with variables and a time limit as tests have them.
pub(crate) fn as_tests_run<'a>(run: Run<'a>, module: &Path) -> Result<Run<'a>> {
    let threads = std::env::var("RUST_TEST_THREADS").unwrap_or_else(|_| "1".to_owned());
    let run = with_modules_of(run, module)?
        .env("RUST_TEST_THREADS", threads)
        // Without restartable sequences: where their page cannot be copied after a fork, for want
        // of memory, the kernel kills the process when it was interrupted
        // (`__rseq_handle_slowpath`), and tests have allocations fail.
        .env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    let run = match test_timeout()? {
        Some(limit) => run.timeout(limit),
        None => run,
    };
    Ok(with_environment(run))
}

fn test_timeout() -> Result<Option<Duration>> {
    match std::env::var("BARLEASE_TIMEOUT") {
        Ok(text) => {
            let seconds = text
                .parse()
                .with_context(|| format!("BARLEASE_TIMEOUT is seconds, not `{text}`"))?;
            Ok(Some(Duration::from_secs(seconds)))
        }
        Err(_) => Ok(None),
    }
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
}
