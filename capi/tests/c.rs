//! The C library as it is installed: its symbols, and the example in C against it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where the tests build.
fn tmp() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("capi")
}

/// Where cargo does, which has most of it already.
fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

#[track_caller]
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// Installs the library, once. `None`, and the test is skipped, where there is no make.
fn installed() -> Option<&'static Path> {
    static INSTALLED: OnceLock<PathBuf> = OnceLock::new();
    if !has("make") {
        eprintln!("skipped: make is not installed");
        return None;
    }
    Some(INSTALLED.get_or_init(|| {
        let prefix = tmp().join("installed");
        let _ = std::fs::remove_dir_all(&prefix);
        run(Command::new("make")
            .arg("-C")
            .arg(top())
            .arg("install")
            .arg(format!("BUILD={}", tmp().display()))
            .arg(format!("TARGET={}", target().display()))
            .arg(format!("CARGO={}", env!("CARGO")))
            .arg("PROFILE=dev")
            .arg(format!("prefix={}", prefix.display())));
        prefix
    }))
}

/// Compiles the example, as somebody who has the library would.
fn example(name: &str, flags: &[&str]) -> Option<PathBuf> {
    let prefix = installed()?;
    let program = tmp().join(name);
    let mut command = Command::new("cc");
    command
        .args(["-std=c11", "-g", "-Wall", "-Wextra", "-Werror"])
        .args(flags)
        .arg("-o")
        .arg(&program)
        .arg(top().join("examples/lease.c"));
    if has("pkg-config") {
        let pkg_config = run(Command::new("pkg-config")
            .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"))
            .args(["--cflags", "--libs", &format!("barlease = {VERSION}")]));
        let text = String::from_utf8(pkg_config.stdout).unwrap();
        command.args(text.split_whitespace());
    } else {
        command.arg(format!("-I{}/include", prefix.display()));
        command.arg(format!("-L{}/lib", prefix.display()));
        command.arg("-lbarlease");
    }
    command.arg(format!("-Wl,-rpath,{}/lib", prefix.display()));
    run(&mut command);
    Some(program)
}

#[test]
fn the_example_survives_the_loss_of_what_it_uses() {
    let Some(program) = example("lease", &[]) else {
        return;
    };
    let output = run(&mut Command::new(program));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("holder: access: ") && text.contains("revoked"),
        "{text}"
    );
}

#[test]
fn the_example_is_clean_under_the_sanitizers() {
    let probe =
        "echo 'int main(void){return 0;}' | cc -fsanitize=address,undefined -x c - -o /dev/null";
    let probe = Command::new("sh").args(["-c", probe]).output().unwrap();
    if !probe.status.success() {
        eprintln!("skipped: the C compiler has no sanitizers");
        return;
    }
    let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let Some(program) = example("lease-asan", &flags) else {
        return;
    };
    let output = run(&mut Command::new(program));
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn the_example_is_clean_under_valgrind() {
    if !has("valgrind") {
        eprintln!("skipped: valgrind is not installed");
        return;
    }
    let Some(program) = example("lease-valgrind", &[]) else {
        return;
    };
    let output = run(Command::new("valgrind")
        .args(["--quiet", "--error-exitcode=9", "--leak-check=full"])
        .args([
            "--show-leak-kinds=all",
            "--errors-for-leak-kinds=definite,indirect,possible",
        ])
        .arg(program)
        .arg("keep"));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("definitely lost"));
}

#[test]
fn the_shared_library_has_its_symbols_and_no_others() {
    let Some(prefix) = installed() else {
        return;
    };
    let library = prefix.join(format!("lib/libbarlease.so.{VERSION}"));
    let nm = run(Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(&library));
    let symbols: BTreeSet<_> = String::from_utf8(nm.stdout)
        .unwrap()
        .lines()
        .filter(|line| line.contains(" T "))
        .map(|line| line.rsplit(' ').next().unwrap().to_owned())
        .collect();
    let versions = std::fs::read_to_string(top().join("libbarlease.map")).unwrap();
    let wanted: BTreeSet<_> = versions
        .lines()
        .filter_map(|line| line.trim().strip_suffix(';'))
        .filter(|line| line.starts_with("barlease"))
        .map(|name| format!("{name}@@BARLEASE_0.1"))
        .collect();
    assert_eq!(symbols, wanted);

    let readelf = run(Command::new("readelf").arg("-dW").arg(&library));
    let text = String::from_utf8(readelf.stdout).unwrap();
    assert!(text.contains("[libbarlease.so.0]"), "{text}");
    // The handler of SIGBUS stays.
    assert!(text.contains("NODELETE"), "{text}");
    let example = example("lease-needed", &[]);
    let readelf = run(Command::new("readelf").arg("-dW").args(example));
    let text = String::from_utf8(readelf.stdout).unwrap();
    assert!(
        text.contains("NEEDED") && text.contains("[libbarlease.so.0]"),
        "{text}"
    );
}
