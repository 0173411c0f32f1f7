//! The packages of the service and of the C library.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use barlease_lab::cache;
use barlease_lab::report::Step;

use super::command::{Program, gzip, licences as linked_in, without_paths};
use super::contents::{UNIT_PLACE, UNITS, copyright, documents, licences};
use super::deb::Deb;
use super::stage::Stage;
use super::{Maker, fill, need, output};
use crate::checkout;

/// The kind of a file of the service in `dist/systemd`, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Unit,
    Users,
    Folders,
    Rules,
    /// An example of a policy.
    Policy,
    /// The command's, not the service's.
    Other,
}

impl Part {
    fn of(name: &str) -> Option<Self> {
        let kind = Path::new(name).extension()?.to_str()?;
        Some(match kind {
            _ if name.starts_with("barlease-bind@") => Self::Other,
            "service" | "socket" => Self::Unit,
            "sysusers" => Self::Users,
            "tmpfiles" => Self::Folders,
            "rules" => Self::Rules,
            "toml" => Self::Policy,
            _ => return None,
        })
    }

    /// Where it is on the host.
    fn place(self, name: &str) -> Option<PathBuf> {
        Some(match self {
            Self::Unit => Path::new(UNIT_PLACE).join(name),
            Self::Users => PathBuf::from("usr/lib/sysusers.d/barleased.conf"),
            Self::Folders => PathBuf::from("usr/lib/tmpfiles.d/barleased.conf"),
            Self::Rules => Path::new("usr/lib/udev/rules.d").join(name),
            Self::Policy => Path::new("usr/share/doc/barleased/examples").join(name),
            Self::Other => return None,
        })
    }
}

const POLICY: &str = "etc/barlease/policy.d/50-local.toml";

/// The service: program, units, user, folders, policy.
pub(super) fn service(maker: &Maker, program: &Program) -> Result<PathBuf> {
    let stage = Stage::new(maker.out.join("stage-barleased"))?;
    stage.program("usr/sbin/barleased", fs::read(&program.file)?)?;
    let mut units = Vec::new();
    for path in super::contents::pages(&checkout::top().join(UNITS))? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(part) = Part::of(&name) else {
            bail!("{}: nobody knows where it goes on a host", path.display());
        };
        if let Some(place) = part.place(&name) {
            stage.copy(&path, place)?;
        }
        if part == Part::Unit {
            units.push(name.into_owned());
        }
    }
    // Sockets first: a service that is started by its own does not wait for them.
    units.sort_by_key(|unit| !unit.ends_with(".socket"));
    stage.write(POLICY, fill(Path::new("service/50-local.toml"), &[])?)?;
    stage.write("DEBIAN/conffiles", format!("/{POLICY}\n"))?;
    let doc = Path::new("usr/share/doc/barleased");
    documents(&stage, doc)?;
    let top = checkout::top();
    stage.copy(&top.join("docs/service.md"), doc.join("service.md"))?;
    manual(&top.join("dist/service/barleased.8"), program, &stage)?;
    stage.copy(
        &top.join("dist/journal/barleased.catalog"),
        "usr/lib/systemd/catalog/barleased.catalog",
    )?;
    stage.copy(
        &top.join("dist/grafana/barleased.json"),
        doc.join("examples/grafana.json"),
    )?;
    stage.write(
        doc.join("copyright"),
        copyright("debian/copyright-service")?,
    )?;
    stage.write(doc.join("third-party-licences"), &program.licences)?;
    let units = units.join(" ");
    Deb::new("barleased", &maker.version).pack(maker, &stage, &[("UNITS", &units)])
}

/// Packs the manual page of the service, which must name each option and command that it has.
fn manual(page: &Path, program: &Program, stage: &Stage) -> Result<()> {
    let text = fs::read_to_string(page).with_context(|| format!("read {}", page.display()))?;
    let mut help = Command::new(&program.file);
    help.arg("--help").env("COLUMNS", "200");
    let help = output(&mut help, "ask barleased for its options")?;
    if let Some(word) = unnamed(&help, &text) {
        bail!("{}: nothing is said of `{word}`", page.display());
    }
    stage.write("usr/share/man/man8/barleased.8.gz", gzip(page)?)
}

/// The first option or command of a help that a manual page does not name.
fn unnamed<'a>(help: &'a str, page: &str) -> Option<&'a str> {
    let page = page.replace("\\-", "-");
    let commands = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next());
    let options = help
        .split_whitespace()
        .filter(|word| word.starts_with("--") && word.len() > 2);
    commands
        .chain(options)
        .map(|word| word.trim_end_matches(['`', ',', '.', ';']))
        .filter(|word| !["help", "--help", "--version"].contains(word))
        .find(|word| !page.contains(word))
}

const LIBRARY: &str = "usr/lib/x86_64-linux-gnu";

/// The C library: what programs need to run, and what is needed to build them.
pub(super) fn library(maker: &Maker) -> Result<Vec<PathBuf>> {
    need("make", "make")?;
    need("cc", "gcc")?;
    need("dpkg-shlibdeps", "dpkg-dev")?;
    let all = build(maker)?;
    let at = |name: &str| all.join(LIBRARY).join(name);
    let text = linked_in("barlease-capi")?;
    let documented = |stage: &Stage, package: &str| -> Result<PathBuf> {
        let doc = Path::new("usr/share/doc").join(package);
        licences(stage, &doc)?;
        stage.write(doc.join("copyright"), copyright("debian/copyright-c")?)?;
        stage.write(doc.join("third-party-licences"), &text)?;
        Ok(doc)
    };

    let name = "libbarlease0";
    let stage = Stage::new(maker.out.join("stage-libbarlease0"))?;
    let (short, long) = (
        "libbarlease.so.0",
        format!("libbarlease.so.{}", super::VERSION),
    );
    stage.copy(&at(&long), Path::new(LIBRARY).join(&long))?;
    stage.link(&long, Path::new(LIBRARY).join(short))?;
    documented(&stage, name)?;
    let depends = depends(maker, &stage, &Path::new(LIBRARY).join(&long))?;
    symbols(maker, &stage)?;
    stage.write("DEBIAN/shlibs", "libbarlease 0 libbarlease0 (>= 0.1.0~)\n")?;
    stage.write("DEBIAN/triggers", "activate-noawait ldconfig\n")?;
    let words = [("DEPENDS", depends.as_str())];
    let runtime = Deb::new(name, &maker.version).pack(maker, &stage, &words)?;

    let name = "libbarlease-dev";
    let stage = Stage::new(maker.out.join("stage-libbarlease-dev"))?;
    let top = checkout::top();
    for header in ["capi/include/barlease-lib.h", "abi/include/barlease.h"] {
        let file = Path::new(header).file_name().unwrap_or_default();
        stage.copy(&top.join(header), Path::new("usr/include").join(file))?;
    }
    for file in ["libbarlease.a", "pkgconfig/barlease.pc"] {
        stage.copy(&at(file), Path::new(LIBRARY).join(file))?;
    }
    stage.link(short, Path::new(LIBRARY).join("libbarlease.so"))?;
    let doc = documented(&stage, name)?;
    stage.copy(&top.join("docs/c.md"), doc.join("c.md"))?;
    stage.copy(
        &top.join("capi/examples/lease.c"),
        doc.join("examples/lease.c"),
    )?;
    let development = Deb::new(name, &maker.version).pack(maker, &stage, &[])?;
    cache::remove(&all)?;
    Ok(vec![runtime, development])
}

/// Installs the library into a folder, by its own Makefile, without what only debuggers read.
fn build(maker: &Maker) -> Result<PathBuf> {
    let step = Step::start("building the C library");
    let (top, all) = (checkout::top(), maker.out.join("c-library"));
    cache::remove(&all)?;
    let target = checkout::target();
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(top.join("capi"))
        .arg("install")
        .arg(format!("DESTDIR={}", all.display()))
        .arg(format!("BUILD={}", target.join("dist-build/c").display()))
        .arg(format!("TARGET={}", target.join("dist-build").display()))
        .arg("prefix=/usr")
        .arg(format!("libdir=/{LIBRARY}"))
        .env("CARGO_ENCODED_RUSTFLAGS", without_paths().join("\x1f"));
    output(&mut make, "build the C library")?;
    for (file, what) in [
        (
            format!("libbarlease.so.{}", super::VERSION),
            "--strip-unneeded",
        ),
        ("libbarlease.a".to_owned(), "--strip-debug"),
    ] {
        let mut strip = Command::new("strip");
        strip
            .args([what, "--enable-deterministic-archives"])
            .arg(all.join(LIBRARY).join(file));
        output(&mut strip, "strip the C library")?;
    }
    step.done();
    Ok(all)
}

/// Runs a tool of dpkg-dev's, which wants the control file of a source package beside it.
fn tool(maker: &Maker, program: &str, arguments: &[&str]) -> Result<String> {
    let folder = maker.out.join("dpkg-dev");
    cache::remove(&folder)?;
    let control = "Source: barlease\n\nPackage: libbarlease0\nArchitecture: any\n";
    fs::create_dir_all(folder.join("debian"))
        .and_then(|()| fs::write(folder.join("debian/control"), control))
        .with_context(|| format!("make {}", folder.display()))?;
    let mut tool = Command::new(program);
    tool.args(arguments).current_dir(&folder);
    let said = output(&mut tool, &format!("run {program}"))?;
    cache::remove(&folder)?;
    Ok(said)
}

/// The packages that a library of ours needs, as `Depends` has it.
fn depends(maker: &Maker, stage: &Stage, file: &Path) -> Result<String> {
    let path = stage.root().join(file);
    let path = path.to_string_lossy();
    let said = tool(maker, "dpkg-shlibdeps", &["-O", &format!("-e{path}")])?;
    let line = said.trim().strip_prefix("shlibs:Depends=");
    Ok(line.context("dpkg-shlibdeps names no package")?.to_owned())
}

/// Checks that each symbol is in the list that says since when, and none is gone; packs the list.
fn symbols(maker: &Maker, stage: &Stage) -> Result<()> {
    let list = checkout::top().join("dist/debian/libbarlease0.symbols");
    let (root, made) = (stage.root(), stage.folder("DEBIAN")?.join("symbols"));
    tool(
        maker,
        "dpkg-gensymbols",
        &[
            "-c4",
            "-plibbarlease0",
            &format!("-v{}", maker.version),
            &format!("-P{}", root.display()),
            &format!("-I{}", list.display()),
            &format!("-O{}", made.display()),
        ],
    )?;
    stage.write("DEBIAN/symbols", fs::read(&made)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_for_systemd_has_a_place() {
        for path in super::super::contents::pages(&checkout::top().join(UNITS)).unwrap() {
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(Part::of(name).is_some(), "{name}");
        }
        assert_eq!(Part::of("barleased.socket"), Some(Part::Unit));
        assert_eq!(Part::of("barlease-bind@.service"), Some(Part::Other));
        assert_eq!(Part::of("README"), None);
    }

    #[test]
    fn an_option_that_the_manual_forgets_is_found() {
        let help =
            "Usage\n\nCommands:\n  drain  Ends\n\nOptions:\n      --keep <X>  As `--at-stop`.\n";
        assert_eq!(unnamed(help, "drain \\-\\-keep \\-\\-at\\-stop"), None);
        assert_eq!(unnamed(help, "drain --at-stop"), Some("--keep"));
        assert_eq!(unnamed(help, "--keep --at-stop"), Some("drain"));
    }

    #[test]
    fn debians_list_has_the_symbols_of_the_library() {
        let names = |file: &str, in_line: fn(&str) -> Option<&str>| -> Vec<String> {
            let text = fs::read_to_string(checkout::top().join(file)).unwrap();
            let mut names: Vec<_> = text
                .lines()
                .filter_map(in_line)
                .map(str::to_owned)
                .collect();
            names.sort();
            names
        };
        let listed = names("dist/debian/libbarlease0.symbols", |line| {
            let (name, _) = line.trim().split_once('@')?;
            name.starts_with("barlease").then_some(name)
        });
        let exported = names("capi/libbarlease.map", |line| {
            let name = line.trim().strip_suffix(';')?;
            name.starts_with("barlease").then_some(name)
        });
        assert!(exported.len() > 20, "{exported:?}");
        assert_eq!(listed, exported);
    }
}
