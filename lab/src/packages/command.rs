//! Running other programs: with errors that say what was tried, and so that none outlives us.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};

/// Where system programs are, for users whose `PATH` lacks the `sbin` folders.
pub(crate) const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds a program in `PATH` or the system's folders.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(std::env::split_paths(SYSTEM_PATH))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// Fails with the remedy when a program is missing.
pub(crate) fn need(program: &str, package: &str) -> Result<PathBuf> {
    find(program).with_context(|| {
        format!(
            "`{program}` is not installed. The lab needs a Debian-like machine; there: apt-get install {package}"
        )
    })
}

/// A command whose process is killed when we end, however we end (Ctrl-C, SIGKILL).
///
/// Start it from a thread that waits for it: the kernel looks at the thread that started it, not at
/// the process.
pub(crate) fn tied(program: impl AsRef<OsStr>) -> Command {
    static SETPRIV: LazyLock<Option<PathBuf>> = LazyLock::new(|| find("setpriv"));
    match &*SETPRIV {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Runs a command and returns its standard output; on failure says what it said.
pub(crate) fn output(command: &mut Command, what: &str) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{what}: start {}", shown(command)))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        let said = if said.trim().is_empty() {
            String::from_utf8_lossy(&done.stdout)
        } else {
            said
        };
        bail!(
            "{what}: {} ended with {}\n{}",
            shown(command),
            done.status,
            tail(&said, 25)
        );
    }
    String::from_utf8(done.stdout)
        .with_context(|| format!("{what}: {} printed no UTF-8", shown(command)))
}

/// Runs a command for its effect.
pub(crate) fn run(command: &mut Command, what: &str) -> Result<()> {
    output(command, what).map(drop)
}

fn shown(command: &Command) -> String {
    let name = |part: &OsStr| {
        PathBuf::from(part)
            .file_name()
            .unwrap_or(part)
            .to_string_lossy()
            .into_owned()
    };
    let program = name(command.get_program());
    if program != "setpriv" {
        return format!("`{program}`");
    }
    let inner = command.get_args().nth(3).map(name);
    format!("`{}`", inner.unwrap_or(program))
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_was_tried_and_what_was_said() {
        let error = output(
            tied("sh").args(["-c", "echo too bad >&2; exit 3"]),
            "ask the shell",
        )
        .unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("ask the shell") && text.contains("`sh`"),
            "{text}"
        );
        assert!(text.contains("too bad") && text.contains('3'), "{text}");
    }

    #[test]
    fn a_missing_program_comes_with_its_remedy() {
        let text = format!("{:#}", need("no-such-program", "some-package").unwrap_err());
        assert!(text.contains("apt-get install some-package"), "{text}");
    }

    #[test]
    fn the_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
    }
}
