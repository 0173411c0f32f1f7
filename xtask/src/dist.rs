//! `cargo xtask dist`: packages for a user's own host.
//!
//! | file | what |
//! |---|---|
//! | [`stage`] | a folder that becomes a package: files, modes, one time stamp for all |
//! | [`deb`] | Debian packages, by `dpkg-deb` |
//! | [`command`] | the programs: static binaries, completions, licences of what is linked in |
//! | [`manuals`] | its manual pages |
//! | [`contents`] | what goes where in the packages of the command, and in the tarball |
//! | [`modules`] | the same of the module's packages |
//! | [`programs`] | the same of the service and of the C library |
//! | [`source`] | the source package, whose rules call this tool |
//! | [`buildpackage`] | builds from it as Debian does |
//! | [`verify`] | builds, loads and uses what was packaged |
//! | [`install`] | installs, upgrades and removes the packages in guests with systemd |
//!
//! # Why `dpkg-deb`
//!
//! `cargo-deb` packages what cargo builds, which is two of the packages here; the others hold the
//! sources of a kernel module, files that the kernel's build made, and a library that is linked for
//! C. It would also have to be installed first. `dpkg-deb` is on every Debian machine (the lab
//! needs it anyway), honours `SOURCE_DATE_EPOCH`, sorts, and sets the owner; what is left to do for
//! us is a control file from a template in `dist/debian/`.

mod buildpackage;
mod command;
mod contents;
mod deb;
mod install;
mod manuals;
mod modules;
mod programs;
mod source;
mod stage;
mod tarball;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use barlease_lab::prepare::{Prepared, Request, prepare};
use barlease_lab::report::{megabytes, seconds};
use clap::{Args, ValueEnum};

use crate::checkout;
use crate::choice::KernelChoice;

/// The version of everything in the workspace.
const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    kernel: KernelChoice,
    /// The packages to make [default: all but the source package]
    what: Vec<What>,
    /// The folder that they are made in [default: target/dist]
    #[arg(long, value_name = "FOLDER")]
    into: Option<PathBuf>,
    /// Only say what there is to make
    #[arg(long)]
    list: bool,
    /// Then use them: build the module from its package, load it in a guest, lease with the
    /// packaged command; and in guests with systemd install, upgrade, remove and purge them all.
    /// Takes a while
    #[arg(long, conflicts_with_all = ["list", "what"])]
    verify: bool,
    /// Then build the packages from the source package, with `dpkg-buildpackage` in a fresh Debian
    /// without a network, and have lintian read all that was made. As root. Takes a while
    #[arg(long, conflicts_with_all = ["list", "verify"])]
    build: bool,
    /// Of `--verify`, only the installation from this part on, with the disk and the packages that a
    /// run which failed in this part has left
    #[arg(long, value_name = "PART", requires = "verify")]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=install::PARTS.len() as i64))]
    from: Option<u8>,
}

/// A thing that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// barlease: the command, its manual pages and completions
    Command,
    /// barleased: the service, its units and its policy
    Service,
    /// barlease-dkms: the module's sources, built by DKMS for each kernel
    Dkms,
    /// barlease-dkms-vfio-pci: the same, built to take the place of vfio-pci
    DkmsVfioPci,
    /// barlease-dev: what drivers in the kernel need that import leases
    Importers,
    /// barlease-rust-overlay-<kernel>: what Debian's headers of a kernel lack for modules in Rust
    Overlay,
    /// libbarlease0, libbarlease-dev: the library for C
    Library,
    /// barlease_<version>.dsc: the source package, of the last commit, with all crates
    Source,
    /// barlease-<version>.tar.zst: command and module, for other distributions
    Tarball,
}

impl What {
    /// Its description, from its own help.
    fn about(self) -> String {
        let value = self.to_possible_value();
        value
            .and_then(|value| value.get_help().map(ToString::to_string))
            .unwrap_or_default()
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        list();
        return Ok(ExitCode::SUCCESS);
    }
    let start = Instant::now();
    let all = What::value_variants();
    let what = if options.what.is_empty() {
        // Packing all crates takes minutes.
        let binary = all.iter().copied().filter(|what| *what != What::Source);
        binary.collect()
    } else {
        options.what.clone()
    };
    let what = &what[..];
    let maker = Maker::new(options.into.clone().unwrap_or_else(folder))?;
    let resumes = options.from.is_some_and(|part| part > 1);
    let built = Built::make(
        &maker,
        if resumes { &[What::Overlay] } else { what },
        &options.kernel,
    )?;
    if resumes {
        install::run(&maker, &built, options.from.map(usize::from))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut made = Vec::new();
    for thing in all.iter().filter(|thing| what.contains(thing)) {
        let files = built.package(&maker, *thing)?;
        print(&files);
        if options.build && *thing == What::Source {
            let from_source = buildpackage::run(&maker, &files)?;
            print(&from_source);
            made.extend(from_source);
        }
        made.extend(files);
    }
    if options.build {
        buildpackage::lint(&made)?;
    }
    if options.verify {
        if options.from.is_none() {
            verify::run(&maker, built.prepared()?)?;
        }
        install::run(&maker, &built, options.from.map(usize::from))?;
    }
    eprintln!("done after {}", seconds(start.elapsed()));
    Ok(ExitCode::SUCCESS)
}

fn print(files: &[PathBuf]) {
    for file in files {
        let size = fs::metadata(file).map_or(0, |meta| meta.len());
        println!("{}  {}", file.display(), shown(size));
    }
}

fn list() {
    for thing in What::value_variants() {
        if let Some(value) = thing.to_possible_value() {
            println!("{:8}  {}", value.get_name(), thing.about());
        }
    }
    println!("into {}", folder().display());
}

fn shown(size: u64) -> String {
    if size < 1_000_000 {
        return format!("{} kB", size.div_ceil(1000));
    }
    megabytes(size)
}

/// Where packages go.
fn folder() -> PathBuf {
    checkout::target().join("dist")
}

/// The place and date of the packages to make.
#[derive(Clone, Debug)]
struct Maker {
    out: PathBuf,
    /// Seconds since 1970 that every file in a package carries.
    epoch: u64,
    /// The version of the packages.
    version: String,
}

impl Maker {
    fn new(out: PathBuf) -> Result<Self> {
        need("dpkg-deb", "dpkg")?;
        need("zstd", "zstd")?;
        fs::create_dir_all(&out).with_context(|| format!("make {}", out.display()))?;
        let out = fs::canonicalize(&out)?;
        let epoch = epoch()?;
        Ok(Self {
            version: package_version(epoch)?,
            epoch,
            out,
        })
    }
}

/// The parts of packages that take a build.
struct Built {
    command: Option<command::Built>,
    service: Option<command::Program>,
    /// Tool chain, kernel and overlay; only the overlay's package needs them.
    prepared: Option<Prepared>,
}

impl Built {
    fn make(maker: &Maker, what: &[What], kernel: &KernelChoice) -> Result<Self> {
        let with = |thing| what.contains(&thing);
        let command = with(What::Command) || with(What::Tarball);
        let command = command.then(|| command::build(&maker.out.join("command")));
        let service = with(What::Service).then(command::service);
        let request = Request {
            kernel: kernel.kernel.clone(),
            update: false,
        };
        let prepared = with(What::Overlay).then(|| prepare(&request));
        Ok(Self {
            command: command.transpose()?,
            service: service.transpose()?,
            prepared: prepared.transpose()?,
        })
    }

    fn command(&self) -> Result<&command::Built> {
        self.command.as_ref().context("the command is not built")
    }

    fn service(&self) -> Result<&command::Program> {
        self.service.as_ref().context("the service is not built")
    }

    fn prepared(&self) -> Result<&Prepared> {
        self.prepared.as_ref().context("no kernel is prepared")
    }

    /// The files of the packages of a thing.
    fn package(&self, maker: &Maker, what: What) -> Result<Vec<PathBuf>> {
        let made = match what {
            What::Command => contents::command(maker, self.command()?)?,
            What::Service => programs::service(maker, self.service()?)?,
            What::Dkms => modules::dkms(maker, modules::BESIDE)?,
            What::DkmsVfioPci => modules::dkms(maker, modules::AS_STOCK)?,
            What::Importers => modules::importers(maker)?,
            What::Overlay => modules::overlay(maker, self.prepared()?)?,
            What::Library => return programs::library(maker),
            What::Source => return source::source(maker),
            What::Tarball => tarball::make(maker, self.command()?)?,
        };
        Ok(vec![made])
    }
}

/// `SOURCE_DATE_EPOCH`, or the time of the last commit, so that the same sources give the same
/// packages.
fn epoch() -> Result<u64> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        return text
            .trim()
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH is seconds since 1970, not `{text}`"));
    }
    let mut git = Command::new("git");
    git.current_dir(checkout::top())
        .args(["log", "-1", "--format=%ct"]);
    let text = output(&mut git, "ask git for the time of the last commit")
        .context("outside of a git checkout set SOURCE_DATE_EPOCH")?;
    text.trim()
        .parse()
        .context("git prints the time of a commit in seconds")
}

/// A version that grows with each commit, and is less than that of the release that it leads to.
///
/// The time of the commit makes it grow: unlike the number of commits it is known in a shallow
/// clone. Outside of git it is `SOURCE_DATE_EPOCH`. Sources with changes that are not committed say
/// so.
fn package_version(epoch: u64) -> Result<String> {
    if let Some(version) = source_version()? {
        return Ok(version);
    }
    let commit = commit();
    let seconds = match &commit {
        Some((seconds, _)) => *seconds,
        None => epoch,
    };
    let time = date(seconds, "+%Y%m%d.%H%M%S")?;
    Ok(version_of(&time, commit.as_ref().map(|(_, name)| &**name)))
}

/// The version of the source package, when that is what this is.
fn source_version() -> Result<Option<String>> {
    let changelog = checkout::top().join("debian/changelog");
    if !changelog.exists() {
        return Ok(None);
    }
    let text =
        fs::read_to_string(&changelog).with_context(|| format!("read {}", changelog.display()))?;
    let version = text.split(['(', ')']).nth(1);
    let version = version.context("debian/changelog begins with a version in parentheses")?;
    Ok(Some(version.to_owned()))
}

fn version_of(time: &str, commit: Option<&str>) -> String {
    let commit = commit.map(|name| format!(".{name}")).unwrap_or_default();
    format!("{VERSION}~git{time}{commit}")
}

/// The time of the last commit and its short name, when this is a git checkout of Barlease itself.
fn commit() -> Option<(u64, String)> {
    let top = checkout::top();
    if !top.join(".git").exists() {
        return None;
    }
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.current_dir(&top).args(arguments);
        output(&mut git, "ask git for the last commit").ok()
    };
    let time = git(&["log", "-1", "--format=%ct"])?;
    let name = git(&[
        "describe",
        "--always",
        "--abbrev=10",
        "--exclude=*",
        "--dirty=.changed",
    ])?;
    Some((time.trim().parse().ok()?, name.trim().to_owned()))
}

/// A time in UTC, as `date` formats it.
fn date(seconds: u64, format: &str) -> Result<String> {
    let mut date = Command::new("date");
    date.env("LC_ALL", "C")
        .args(["--utc", &format!("--date=@{seconds}"), format]);
    Ok(output(&mut date, "format a time")?.trim().to_owned())
}

/// Fails with the remedy when a program is missing.
fn need(program: &str, package: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|folder| folder.join(program).is_file()) {
        return Ok(());
    }
    bail!("`{program}` is not installed: apt-get install {package}")
}

/// Runs a command and returns what it printed; on failure says what it said.
fn output(command: &mut Command, what: &str) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{what}: start {}", command.get_program().to_string_lossy()))?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("{what}: {}\n{text}{said}", done.status);
    }
    Ok(text)
}

/// Fills the words `@NAME@` of a template in `dist/`.
fn fill(template: &Path, words: &[(&str, &str)]) -> Result<String> {
    let path = checkout::top().join("dist").join(template);
    let mut text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    for (name, value) in words {
        text = text.replace(&format!("@{name}@"), value);
    }
    match unfilled(&text) {
        Some(word) => bail!("{}: nobody fills in {word}", path.display()),
        None => Ok(text),
    }
}

/// The first word `@NAME@` in a text.
fn unfilled(text: &str) -> Option<&str> {
    let is_name =
        |word: &&str| !word.is_empty() && word.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    text.split('@').skip(1).step_by(2).find(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forgotten_word_is_found() {
        assert_eq!(unfilled("Version: @VERSION@\n"), Some("VERSION"));
        assert_eq!(unfilled("@leases soft\n@leases hard\n"), None);
        assert_eq!(unfilled("Version: 1\n"), None);
    }

    #[test]
    fn versions_grow_up_to_the_release() {
        let at = |seconds, commit| version_of(&date(seconds, "+%Y%m%d.%H%M%S").unwrap(), commit);
        assert_eq!(at(0, None), format!("{VERSION}~git19700101.000000"));
        let growing = [
            at(1_796_000_000, Some("f000000000")),
            at(1_796_000_001, Some("0000000000")),
            at(1_796_000_001, Some("0000000000.changed")),
            VERSION.to_owned(),
        ];
        for pair in growing.windows(2) {
            let mut compare = Command::new("dpkg");
            compare.args(["--compare-versions", &pair[0], "lt", &pair[1]]);
            assert!(compare.status().unwrap().success(), "{pair:?}");
        }
    }

    #[test]
    fn each_thing_says_what_it_is() {
        for thing in What::value_variants() {
            assert!(!thing.about().is_empty(), "{thing:?}");
        }
    }

    #[test]
    fn the_module_has_the_version_of_the_workspace() {
        let path = checkout::top().join("kmod/src/sys/helpers.c");
        let text = fs::read_to_string(path).unwrap();
        let line = format!("MODULE_VERSION(\"{VERSION}\");");
        assert!(text.contains(&line), "no {line} in helpers.c");
    }
}
