//! Builds the kernel module of a checkout for a kernel.
//!
//! The sources are copied into a work folder in the cache, one for each checkout and kernel, so
//! that builds leave nothing in the checkout and several kernels keep their products. The module's
//! `make` runs in the sysroot.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::kernels::prepare::Prepared;
use crate::packages::cache::{self, fingerprint};
use crate::packages::command;
use crate::packages::report::Step;

/// The module's file.
pub const MODULE: &str = "barlease_vfio_pci.ko";

/// The file of the same sources built as [`Task::BuildAsStock`].
const AS_STOCK: &str = "vfio-pci.ko";

/// The name that its driver has on the PCI bus.
pub const DRIVER: &str = "barlease-vfio-pci";

/// The sources of the module, from the top of the checkout.
const SOURCES: &[&str] = &["kmod", "model/src", "abi/src"];

/// The files that builds leave behind, if somebody has built in the checkout.
const PRODUCTS: &[&str] = &[
    "o", "ko", "mod", "cmd", "rmeta", "d", "order", "symvers", "tmp",
];

/// The modules in their order: importers are linked against the first one's symbols.
const MODULES: &str = ". importer probe canary examples";

/// Takes the modules, and then arguments for each make.
const RECIPE: &str = r#"
exec 2>&1
modules=$1; shift
for module in $modules; do
    make -C "/work/kmod/$module" "$@" || exit
done
"#;

/// The work to do with the sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Build the module.
    Build,
    /// Build it under the name of the stock module, whose place it then takes; no other module.
    BuildAsStock,
    /// Check it with the kernel's clippy settings.
    Clippy,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The module, for [`Task::Build`].
    pub module: PathBuf,
    /// Other modules of the same build, such as those for tests only.
    pub others: Vec<PathBuf>,
    /// Warnings of compilers and of `modpost`.
    pub warnings: Vec<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    /// Copied files and their content's fingerprint.
    files: BTreeMap<PathBuf, String>,
    /// The fingerprint of all that the last complete build was made from.
    built_from: String,
    warnings: Vec<String>,
}

/// Builds or checks the module of a checkout.
///
/// # Errors
///
/// When the build fails; the compiler's messages have been shown.
pub fn build(prepared: &Prepared, checkout: &Path, task: Task) -> Result<Built> {
    let checkout = checkout
        .canonicalize()
        .with_context(|| format!("find the checkout {}", checkout.display()))?;
    if !checkout.join("kmod/Makefile").exists() {
        bail!(
            "there is no kmod/Makefile in {}: is this the checkout?",
            checkout.display()
        );
    }
    let id = fingerprint([checkout.as_os_str().as_bytes()]);
    let place = format!(
        "{id}-{}{}",
        prepared.kernel.name,
        match task {
            Task::Build => "",
            Task::BuildAsStock => "-as-stock",
            Task::Clippy => "-clippy",
        }
    );
    fs::create_dir_all(prepared.cache.path("work")).context("make the work folder")?;
    let _turn = prepared
        .cache
        .lock(&format!("work/{place}"), "building the module")?;
    Work {
        prepared,
        task,
        folder: prepared.cache.path("work").join(place),
    }
    .build(&checkout)
}

struct Work<'a> {
    prepared: &'a Prepared,
    task: Task,
    folder: PathBuf,
}

impl Work<'_> {
    fn build(&self, checkout: &Path) -> Result<Built> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("make {}", self.folder.display()))?;
        let state_file = self.folder.join("state.json");
        let mut state: State = cache::read_json(&state_file).unwrap_or_default();
        let files = read_sources(checkout)?;
        let built_from = self.fingerprint(&files)?;
        if state.built_from == built_from && (self.task == Task::Clippy || self.module().exists()) {
            show(&state.warnings);
            return self.result(state.warnings);
        }
        if !state.warnings.is_empty() || state.built_from.is_empty() {
            // A file that is not compiled again would not warn again.
            cache::remove(&self.folder.join("tree"))?;
            state.files.clear();
        }
        self.sync(&files, &mut state)?;
        state.built_from.clear();
        cache::write_json(&state_file, &state)?;
        state.warnings = self.make()?;
        state.built_from = built_from;
        cache::write_json(&state_file, &state)?;
        self.result(state.warnings)
    }

    fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    fn module(&self) -> PathBuf {
        self.tree().join("kmod").join(self.file())
    }

    fn file(&self) -> &'static str {
        match self.task {
            Task::BuildAsStock => AS_STOCK,
            Task::Build | Task::Clippy => MODULE,
        }
    }

    fn result(&self, warnings: Vec<String>) -> Result<Built> {
        let module = self.module();
        if self.task != Task::Clippy && !module.exists() {
            bail!("the build has made no kmod/{}", self.file());
        }
        let mut others = Vec::new();
        for file in walk(&self.tree().join("kmod"))? {
            if file.extension().is_some_and(|extension| extension == "ko") && file != module {
                others.push(file);
            }
        }
        Ok(Built {
            module,
            others,
            warnings,
        })
    }

    fn fingerprint(&self, files: &BTreeMap<PathBuf, Vec<u8>>) -> Result<String> {
        let stamp = &self.prepared.stamp;
        let stamp = fs::read(stamp).with_context(|| format!("read {}", stamp.display()))?;
        let sysroot = self.prepared.sysroot.path("");
        let mut parts = vec![
            stamp,
            sysroot.as_os_str().as_bytes().to_vec(),
            RECIPE.as_bytes().to_vec(),
            MODULES.as_bytes().to_vec(),
        ];
        for (path, content) in files {
            parts.push(path.as_os_str().as_bytes().to_vec());
            parts.push(content.clone());
        }
        Ok(fingerprint(parts))
    }

    /// Copies what has changed, so that make sees only that.
    fn sync(&self, files: &BTreeMap<PathBuf, Vec<u8>>, state: &mut State) -> Result<()> {
        let tree = self.tree();
        for gone in state.files.keys().filter(|path| !files.contains_key(*path)) {
            cache::remove(&tree.join(gone))?;
        }
        let mut now = BTreeMap::new();
        for (path, content) in files {
            let print = fingerprint([content]);
            let to = tree.join(path);
            if state.files.get(path) != Some(&print) || !to.exists() {
                if let Some(parent) = to.parent() {
                    fs::create_dir_all(parent)
                        .with_context(|| format!("make {}", parent.display()))?;
                }
                fs::write(&to, content).with_context(|| format!("write {}", to.display()))?;
            }
            now.insert(path.clone(), print);
        }
        state.files = now;
        Ok(())
    }

    fn make(&self) -> Result<Vec<String>> {
        let kernel = &self.prepared.kernel;
        let what = match self.task {
            Task::Build => "building the module",
            Task::BuildAsStock => "building the module in the stock one's name",
            Task::Clippy => "checking the module with clippy",
        };
        let step = Step::start(format!("{what} for {}", kernel.name));
        let mut binds = vec![(self.tree(), "/work")];
        binds.extend(kernel.build_bind());
        let binds: Vec<_> = binds
            .iter()
            .map(|(from, to)| (from.as_path(), *to))
            .collect();
        let mut make = self.prepared.sysroot.enter(&binds)?;
        let jobs = std::thread::available_parallelism().map_or(2, usize::from);
        let as_stock = self.task == Task::BuildAsStock;
        let modules = if as_stock { "." } else { MODULES };
        make.args(["sh", "-c", RECIPE, "make", modules, &format!("-j{jobs}")]);
        make.arg(format!("KDIR={}", kernel.build_folder()))
            .args(kernel.make_arguments());
        match self.task {
            Task::Build => {}
            Task::BuildAsStock => drop(make.arg("NAME=vfio-pci")),
            Task::Clippy => drop(make.arg("CLIPPY=1")),
        }
        let log = self.folder.join("make.log");
        let text = self.follow(&mut make, &step, &log)?;
        step.done();
        let warnings = warnings(&text);
        if !warnings.is_empty() {
            eprintln!("{}", without_chatter(&text));
        }
        Ok(warnings)
    }

    fn follow(&self, make: &mut std::process::Command, step: &Step, log: &Path) -> Result<String> {
        let mut child = make
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start make")?;
        let mut text = String::new();
        if let Some(output) = child.stdout.take() {
            let mut lines = BufReader::new(output);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line)? > 0 {
                let decoded = String::from_utf8_lossy(&line).replace("/work/", "");
                step.doing(decoded.trim());
                text.push_str(&decoded);
                line.clear();
            }
        }
        let status = child.wait().context("wait for make")?;
        cache::write(log, &text)?;
        if !status.success() {
            bail!(
                "the module does not build:\n{}\nlog: {}",
                without_chatter(&text),
                log.display()
            );
        }
        Ok(text)
    }
}

/// Says again what an earlier build of the same sources has warned of.
fn show(warnings: &[String]) {
    for warning in warnings {
        eprintln!("{warning}");
    }
}

/// Source files by their path in the checkout.
fn read_sources(checkout: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for folder in SOURCES
        .iter()
        .map(|folder| checkout.join(folder))
        .filter(|folder| folder.is_dir())
    {
        for path in walk(&folder)? {
            if !is_product(&path) {
                let content =
                    fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                let name = path.strip_prefix(checkout).unwrap_or(&path).to_owned();
                files.insert(name, content);
            }
        }
    }
    Ok(files)
}

fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder)
            .with_context(|| format!("read the folder {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

fn is_product(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    PRODUCTS.contains(&extension.as_ref())
        || name.ends_with(".mod.c")
        || name.ends_with("_generated.rs")
}

/// The first lines of warnings.
fn warnings(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| {
            line.starts_with("warning:")
                || line.contains(": warning: ")
                || line.starts_with("WARNING:")
        })
        // A summary, not one of its own.
        .filter(|line| !(line.contains(" warning emitted") || line.contains(" warnings emitted")))
        .filter(|line| !HARMLESS.iter().any(|harmless| line.contains(harmless)))
        .map(str::to_owned)
        .collect()
}

/// Warnings of make itself that say nothing about the module.
const HARMLESS: &[&str] = &[
    // The kernel was built with another revision of the same compiler; Debian's packages are one
    // suite.
    "the compiler differs from the one used to build the kernel",
    // Times of files that were unpacked a moment ago.
    "Clock skew detected",
    "modification time",
];

/// Make's output without the lines that only say what it does.
fn without_chatter(text: &str) -> String {
    let chatter = |line: &&str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let quiet = line.starts_with("  ")
            && words
                .first()
                .is_some_and(|word| word.chars().all(|c| c.is_ascii_uppercase()));
        !(quiet || line.starts_with("make") && !line.contains("***"))
    };
    text.lines().filter(chatter).collect::<Vec<_>>().join("\n")
}

/// Formats the module's Rust files with the host's rustfmt, or says whether they are formatted.
///
/// # Errors
///
/// When rustfmt is missing, fails, or (for a check) would change something.
pub fn format(checkout: &Path, check: bool) -> Result<()> {
    let files: Vec<_> = walk(&checkout.join("kmod"))?
        .into_iter()
        .filter(|path| {
            path.extension().is_some_and(|extension| extension == "rs") && !is_product(path)
        })
        .collect();
    if files.is_empty() {
        return Ok(());
    }
    let mut rustfmt = command::tied("rustfmt");
    rustfmt
        .current_dir(checkout)
        .args(["--edition", "2021"])
        .args(check.then_some("--check"))
        .args(&files);
    let status = rustfmt
        .status()
        .context("start rustfmt (rustup component add rustfmt)")?;
    if !status.success() {
        bail!("kmod/ is not formatted: `cargo xtask kmod fmt` does it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_of_all_tools_count_and_summaries_do_not() {
        let text = "  RUSTC [M] thing.o\nwarning: unused variable: `x`\n --> thing.rs:1:1\n\
                    helpers.c:3:1: warning: unused function\nWARNING: modpost: missing MODULE_DESCRIPTION()\n\
                    warning: 1 warning emitted\nwarning: the compiler differs from the one used to build the kernel\n";
        assert_eq!(warnings(text).len(), 3);
        assert!(warnings("  CC [M] warning.o\n").is_empty());
    }

    #[test]
    fn messages_stay_when_chatter_goes() {
        let text = "make: Entering directory '/work'\n  RUSTC [M] thing.o\nerror: no\n   |\nmake[1]: *** [x] Error 1\n";
        assert_eq!(
            without_chatter(text),
            "error: no\n   |\nmake[1]: *** [x] Error 1"
        );
    }

    #[test]
    fn products_in_the_checkout_are_not_copied() {
        for name in [
            "a.o",
            ".a.o.cmd",
            "a.mod.c",
            "a.ko",
            "Module.symvers",
            "vfio_generated.rs",
            "modules.order",
        ] {
            assert!(is_product(Path::new(name)), "{name}");
        }
        for name in [
            "a.rs",
            "Makefile",
            "Kbuild",
            "helpers.c",
            "a.h",
            "dkms.conf",
        ] {
            assert!(!is_product(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn sources_are_read_from_all_their_folders() {
        let checkout = tempfile::tempdir().unwrap();
        for file in [
            "kmod/lib.rs",
            "kmod/sub/x.c",
            "kmod/x.o",
            "model/src/lib.rs",
            "model/tests/t.rs",
        ] {
            let path = checkout.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        let files = read_sources(checkout.path()).unwrap();
        let names: Vec<_> = files.keys().filter_map(|path| path.to_str()).collect();
        assert_eq!(names, ["kmod/lib.rs", "kmod/sub/x.c", "model/src/lib.rs"]);
    }
}
