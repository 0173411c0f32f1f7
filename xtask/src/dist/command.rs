//! The programs, command and service, and what is made from the definition of the command's line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::programs::needs_libraries;
use barlease_lab::report::Step;
use clap_complete::Shell;
use serde_json::Value;

use super::{VERSION, output};
use crate::checkout;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program, statically linked.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) file: PathBuf,
    /// The licences of all crates that are linked in, with their texts.
    pub(super) licences: String,
}

/// The files that were made of the command.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) program: Program,
    /// A folder of manual pages.
    pub(super) manuals: PathBuf,
    /// Completions, by shell.
    pub(super) bash: PathBuf,
    pub(super) zsh: PathBuf,
    pub(super) fish: PathBuf,
}

/// Builds the command into a folder.
pub(super) fn build(folder: &Path) -> Result<Built> {
    cache::remove(folder)?;
    let step = Step::start("building the command barlease");
    let program = program("barlease-cli", "barlease")?;
    let (manuals, completions) = (folder.join("man"), folder.join("completions"));
    fs::create_dir_all(&manuals)
        .and_then(|()| fs::create_dir_all(&completions))
        .with_context(|| format!("make folders in {}", folder.display()))?;
    // `help` would give a page for each page.
    let line = barlease_cli::command()
        .version(VERSION)
        .disable_help_subcommand(true);
    super::manuals::write(line.clone(), &manuals)?;
    let complete = |shell| {
        clap_complete::generate_to(shell, &mut line.clone(), "barlease", &completions)
            .with_context(|| format!("write completions for {shell}"))
    };
    let built = Built {
        program,
        bash: complete(Shell::Bash)?,
        zsh: complete(Shell::Zsh)?,
        fish: complete(Shell::Fish)?,
        manuals,
    };
    step.done();
    Ok(built)
}

/// Builds the service.
pub(super) fn service() -> Result<Program> {
    let step = Step::start("building the service barleased");
    let program = program("barleased", "barleased")?;
    step.done();
    Ok(program)
}

/// Flags of the compiler that keep paths of the host out of what it makes.
pub(super) fn without_paths() -> [String; 2] {
    let cargo_home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
    };
    [
        format!("--remap-path-prefix={}=cargo", cargo_home.display()),
        format!("--remap-path-prefix={}=barlease", checkout::top().display()),
    ]
}

/// Builds a program so that it runs on any distribution: with the C library in it.
fn program(package: &str, name: &str) -> Result<Program> {
    let mut flags = vec![
        "-Ctarget-feature=+crt-static".to_owned(),
        "-Cstrip=symbols".to_owned(),
    ];
    flags.extend(without_paths());
    let mut build = checkout::cargo(".");
    build
        .args(["build", "--quiet", "--release", "--locked"])
        .args(["--package", package, "--bin", name, "--target", TARGET])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // Beside the builds with other flags, so that neither makes the other build again.
        .env("CARGO_TARGET_DIR", checkout::target().join("dist-build"));
    output(&mut build, &format!("build {name}"))?;
    let built = checkout::target()
        .join("dist-build")
        .join(TARGET)
        .join("release")
        .join(name);
    let content = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    if needs_libraries(&content) {
        bail!("{} is linked dynamically", built.display());
    }
    Ok(Program {
        file: built,
        licences: licences(package)?,
    })
}

/// Name, licence and licence texts of each crate that is linked into what a package of ours makes.
pub(super) fn licences(package: &str) -> Result<String> {
    let mut metadata = checkout::cargo(".");
    metadata.args(["metadata", "--format-version", "1", "--locked"]);
    metadata.args(["--filter-platform", TARGET]);
    let text = output(&mut metadata, "ask cargo what is linked in")?;
    let metadata: Value = serde_json::from_str(&text).context("read what cargo says")?;
    let packages: BTreeMap<&str, &Value> = items(&metadata["packages"])
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();

    let mut text = String::from("Linked in are these libraries.\n");
    let mut seen = BTreeMap::new();
    for id in linked(package, &metadata, &packages) {
        let package = packages[id];
        let field = |name: &str| package[name].as_str().unwrap_or_default();
        let name = format!("{} {}", field("name"), field("version"));
        write!(text, "\n==== {name}: {}\n", field("license"))?;
        let folder = Path::new(field("manifest_path")).parent();
        for file in licence_files(folder.unwrap_or(Path::new("/")))? {
            let content = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
            let content = String::from_utf8_lossy(&content).trim().to_owned();
            let file = file.file_name().unwrap_or_default().to_string_lossy();
            match seen.get(&content) {
                Some(earlier) => write!(text, "\n-- {file}: the same as {earlier}\n")?,
                None => {
                    write!(text, "\n-- {file}\n\n{content}\n")?;
                    seen.insert(content, format!("{file} of {name}"));
                }
            }
        }
    }
    Ok(text)
}

/// The ids of all crates from elsewhere that a package of ours needs at run time, sorted.
fn linked<'a>(
    ours: &str,
    metadata: &'a Value,
    packages: &BTreeMap<&str, &'a Value>,
) -> BTreeSet<&'a str> {
    let nodes: BTreeMap<&str, &Value> = items(&metadata["resolve"]["nodes"])
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let root = |id: &&&str| {
        packages
            .get(**id)
            .is_some_and(|package| package["name"] == ours)
    };
    let mut open: Vec<&str> = nodes.keys().filter(root).copied().collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        let normal = |dependency: &&Value| {
            items(&dependency["dep_kinds"]).any(|kind| kind["kind"].is_null())
        };
        let dependencies = nodes.get(id).map(|node| items(&node["deps"]));
        open.extend(
            dependencies
                .into_iter()
                .flatten()
                .filter(normal)
                .filter_map(|dependency| dependency["pkg"].as_str()),
        );
    }
    seen.retain(|id| {
        packages
            .get(id)
            .is_some_and(|package| !package["source"].is_null())
    });
    seen
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn licence_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_licence = |path: &PathBuf| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_uppercase();
        path.is_file()
            && ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
    };
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(is_licence)
        .collect();
    files.sort();
    Ok(files)
}

/// Packs a file as Debian wants manual pages.
pub(super) fn gzip(file: &Path) -> Result<Vec<u8>> {
    let mut gzip = Command::new("gzip");
    gzip.args(["-9", "--no-name", "--stdout"]).arg(file);
    let done = gzip.output().context("start gzip")?;
    if !done.status.success() {
        bail!("gzip {}: {}", file.display(), done.status);
    }
    Ok(done.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_of_tests_and_our_own_are_not_counted() {
        let metadata = serde_json::json!({
            "packages": [
                {"id": "cli", "name": "ours", "source": null},
                {"id": "lib", "name": "barlease", "source": null},
                {"id": "a", "name": "a", "source": "registry"},
                {"id": "b", "name": "b", "source": "registry"},
            ],
            "resolve": {"nodes": [
                {"id": "cli", "deps": [
                    {"pkg": "lib", "dep_kinds": [{"kind": null}]},
                    {"pkg": "b", "dep_kinds": [{"kind": "dev"}]},
                ]},
                {"id": "lib", "deps": [{"pkg": "a", "dep_kinds": [{"kind": "build"}, {"kind": null}]}]},
                {"id": "a", "deps": []},
            ]},
        });
        let packages = items(&metadata["packages"])
            .filter_map(|package| Some((package["id"].as_str()?, package)))
            .collect();
        assert_eq!(linked("ours", &metadata, &packages), BTreeSet::from(["a"]));
    }
}
