//! The kernel's own tests of VFIO and IOMMUFD, built from the source package of the kernel that
//! they are to run on.
//!
//! They are C programs of `tools/testing/selftests` that print their results as KTAP
//! (`Documentation/dev-tools/ktap.rst` of the kernel). They are linked statically, since guests
//! have no libraries.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::kernels::debug;
use crate::kernels::prepare::{self, Prepared};
use crate::kernels::source::SourceBuild;
use crate::packages::apt::{Apt, Package};
use crate::packages::arch::Arch;
use crate::packages::cache::{self, Stamp, fingerprint};
use crate::packages::extra::Extra;
use crate::packages::report::Step;
use crate::packages::sysroot::logged;

/// The libraries that they use: tokens of virtual functions, capabilities.
const LIBRARIES: &[&str] = &["libcap-dev", "uuid-dev"];

/// The parts of the source that neither headers nor tests are made of. Tests use headers of
/// drivers.
const LEFT_OUT: [&str; 10] = [
    "Documentation/*",
    "arch/*.dts*",
    "drivers/*.c",
    "drivers/gpu/*",
    "fs/*.c",
    "kernel/*.c",
    "lib/*.c",
    "mm/*.c",
    "net/*.c",
    "sound/*",
];

/// Two things are changed. The test of virtual functions wants them to be bound to the driver of
/// the physical function, and knows one name for it: here it is told the name. A test has half a
/// minute, which says little of a guest without KVM on a busy machine: here it has twenty times
/// that.
const BUILD: &str = r#"
exec 2>&1
set -eu
cd /work/src
tests=tools/testing/selftests
change() {
    grep -qF "$2" "$1" || sed -i "s/$3/$2/" "$1"
    grep -qF "$2" "$1" || { echo "$1 has changed: no $3 in it"; exit 1; }
}
change $tests/kselftest_harness.h 't->timeout * 20 * 1000' 't->timeout \* 1000'
if [ -e $tests/vfio/vfio_pci_sriov_uapi_test.c ]; then
    change $tests/vfio/vfio_pci_sriov_uapi_test.c 'strcmp(vf_driver, getenv("VFIO_SELFTESTS_DRIVER"))' \
        'strcmp(vf_driver, "vfio-pci")'
fi
make headers
rm -rf /work/out
mkdir /work/out
for target in vfio iommu; do
    make -C $tests/$target -j"$(nproc)" top_srcdir=/work/src KHDR_INCLUDES='-isystem /work/src/usr/include' \
        LDFLAGS='-static -pthread'
    find $tests/$target -maxdepth 1 -type f -perm -u+x ! -name '*.sh' -exec cp -t /work/out {} +
done
strip /work/out/*
"#;

/// A program with tests in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name, such as `vfio_pci_device_test`.
    pub name: String,
    /// Where it is.
    pub file: PathBuf,
}

/// The tests that belong to a kernel, by name. Builds them if need be.
///
/// # Errors
///
/// When the source cannot be had, or the tests not be built.
pub fn programs(prepared: &Prepared) -> Result<Vec<Program>> {
    let folder = build(prepared)?;
    let mut programs = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let file = entry?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name != STAMP {
            let name = name.into_owned();
            programs.push(Program { name, file });
        }
    }
    if programs.is_empty() {
        bail!("the kernel's source has no tests of VFIO and IOMMUFD");
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

const STAMP: &str = "stamp.json";

fn build(prepared: &Prepared) -> Result<PathBuf> {
    let cache = &prepared.cache;
    let plan = prepare::plan(cache).context("read the plan from the cache")?;
    let release = match debug::asked_for(&prepared.kernel.name) {
        Some((_, release)) => release,
        None => Some(prepared.kernel.name.as_str()),
    };
    let source = &plan.kernel(release)?.source;
    let libraries = Extra {
        plan: &plan,
        sysroot: &prepared.sysroot,
        names: LIBRARIES,
        note: "selftest-libraries.json",
        what: "libraries of the kernel's tests",
        purpose: "to build the kernel's own tests",
    };
    let folder = cache.path("selftests").join(source.file_name());
    let fits = |libraries: &[Package]| stamp(source, libraries).fits(&folder.join(STAMP));
    if libraries.added().is_some_and(|added| fits(&added)) {
        return Ok(folder);
    }
    let _turn = cache.lock("prepare", "preparing the kernel's own tests")?;
    let apt = Apt::set_up(cache, Arch::Amd64)?.0;
    let added = libraries.add(&apt)?;
    if fits(&added) {
        return Ok(folder);
    }
    let left_out = LEFT_OUT.map(str::to_owned);
    let name = format!("selftests-{}", source.name);
    let build = SourceBuild::of_tools(cache, &prepared.sysroot, &name, &left_out);
    build.fetch(&apt, source, "to build the kernel's own tests")?;
    let step = Step::start(format!(
        "building the kernel's own tests from {}",
        source.name
    ));
    logged(
        &mut build.command(BUILD)?,
        &build.log,
        "build the kernel's own tests",
    )?;
    let out = build.folder.join("out");
    cache::write_json(&out.join(STAMP), &stamp(source, &added))?;
    cache::remove(&folder)?;
    fs::create_dir_all(cache.path("selftests"))?;
    fs::rename(out, &folder).with_context(|| format!("keep {}", folder.display()))?;
    cache::remove(&build.folder)?;
    step.done();
    Ok(folder)
}

fn stamp(source: &Package, libraries: &[Package]) -> Stamp {
    let libraries = libraries.iter().map(Package::file_name);
    Stamp::of(libraries.chain([source.file_name(), fingerprint([BUILD])]))
}

/// The result of one test; the better is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It failed.
    Failed,
    /// It cannot run here.
    Skipped,
    /// It passed.
    Passed,
}

impl Verdict {
    /// In a word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Passed => "ok",
            Self::Skipped => "skipped",
            Self::Failed => "FAILED",
        }
    }
}

/// The results in a line of KTAP's, such as `not ok 3 suite.test` or `ok 4 suite.test # SKIP why`.
#[must_use]
pub fn result(line: &str) -> Option<(&str, Verdict)> {
    let (line, passed) = match line.strip_prefix("not ") {
        Some(rest) => (rest, false),
        None => (line, true),
    };
    let (number, rest) = line.strip_prefix("ok ")?.split_once(' ')?;
    number.parse::<u32>().ok()?;
    let (name, directive) = rest.split_once(" #").unwrap_or((rest, ""));
    let verdict = match (passed, directive.trim_start().starts_with("SKIP")) {
        (_, true) => Verdict::Skipped,
        (true, false) => Verdict::Passed,
        (false, false) => Verdict::Failed,
    };
    Some((name.trim(), verdict))
}

/// How many tests there will be, when a line says that: `1..15`.
#[must_use]
pub fn planned(line: &str) -> Option<usize> {
    line.strip_prefix("1..")?.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_as_the_kernels_harness_writes_them() {
        assert_eq!(
            result("ok 1 vfio_pci_device_test.reset"),
            Some(("vfio_pci_device_test.reset", Verdict::Passed))
        );
        assert_eq!(
            result("not ok 12 iommufd.dirty_tracking"),
            Some(("iommufd.dirty_tracking", Verdict::Failed))
        );
        assert_eq!(
            result("ok 3 a.b.c # SKIP Device does not support reset"),
            Some(("a.b.c", Verdict::Skipped))
        );
        for line in [
            "# ok 1 a",
            "#  RUN  a ...",
            "ok",
            "ok then",
            "TAP version 13",
        ] {
            assert_eq!(result(line), None, "{line}");
        }
    }

    #[test]
    fn the_plan_is_read() {
        assert_eq!(planned("1..15"), Some(15));
        assert_eq!(planned("# 1..15"), None);
        assert_eq!(planned("1..x"), None);
    }
}
