//! Which packages and which kernels: resolved once from the mirror's lists, then kept until an
//! update is asked for.
//!
//! A kernel qualifies when it was built with Rust and by exactly the `rustc` of the suite: only
//! then do the symbols that it exports match what this `rustc` makes of its `rust/` folder.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::packages::apt::{Package, Record};
use crate::packages::version;

/// The packages of the tool chain. `dwarves` and the `-dev` packages are what the kernel's
/// `modules_prepare` needs.
const TOOLS: &[&str] = &[
    "base-files",
    "bash",
    "bc",
    "bindgen",
    "binutils",
    "bison",
    "bzip2",
    "coreutils",
    "cpio",
    "dash",
    "diffutils",
    "dpkg",
    "dwarves",
    "findutils",
    "flex",
    "gawk",
    "gcc",
    "grep",
    "gzip",
    "kmod",
    "libc6-dev",
    "libdw-dev",
    "libelf-dev",
    "libssl-dev",
    "make",
    "patch",
    "perl",
    "python3",
    "rust-clippy",
    "rust-src",
    "rustc",
    "rustfmt",
    "sed",
    "tar",
    "util-linux",
    "xz-utils",
    "zlib1g-dev",
    "zstd",
];

/// The packages of the guest.
const MACHINE: &[&str] = &["busybox-static", "qemu-system-x86"];

/// The package with Rust's standard library for an architecture; the compiler is of the same
/// version.
const RUST_LIBRARY: &str = "libstd-rust-dev";

/// The packages of another architecture that its guests and programs are made of, at versions that
/// fit the tool chain.
///
/// # Errors
///
/// When the mirror has none that fit.
pub(crate) fn userland(records: &[Record], tools: &[Package]) -> Result<Vec<Package>> {
    let rust = tools.iter().find(|package| package.name == RUST_LIBRARY);
    let Some(rust) = rust else {
        bail!("the tool chain has no {RUST_LIBRARY}");
    };
    let newest = |name: &str| {
        let named = records.iter().filter(|record| record.package.name == name);
        named.max_by(|a, b| version::compare(&a.package.version, &b.package.version))
    };
    let library = records.iter().find(|record| {
        record.package.name == RUST_LIBRARY && record.package.version == rust.version
    });
    match (library, newest("busybox-static")) {
        (Some(library), Some(busybox)) => {
            Ok(vec![library.package.clone(), busybox.package.clone()])
        }
        (None, _) => bail!(
            "the mirror no longer has {RUST_LIBRARY} {} for that architecture, the version of the tool chain's compiler: \
             run `cargo xtask vm prepare --update`",
            rust.version
        ),
        (_, None) => bail!("the mirror has no busybox-static for that architecture"),
    }
}

/// The packages that [`userland`] chooses from.
pub(crate) fn userland_packages() -> Vec<String> {
    [RUST_LIBRARY, "busybox-static"].map(str::to_owned).into()
}

/// The plan, as it is kept in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The mirror that it was made from.
    pub mirror: String,
    /// The packages that tool chain and emulator were resolved from.
    pub asked: Vec<String>,
    /// Tool chain and emulator.
    pub tools: Vec<Package>,
    /// The name that `rustc` gives itself; empty until it has been asked.
    pub rustc: String,
    /// The kernels that the mirror has, newest first.
    pub kernels: Vec<KernelPlan>,
}

/// A kernel that the mirror has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelPlan {
    /// The answer of `uname -r` on it, such as `7.3-amd64`.
    pub release: String,
    /// The version of its packages.
    pub version: String,
    /// Headers: `linux-headers-…`, its common part and `linux-kbuild-…`.
    pub headers: Vec<Package>,
    /// The image and the modules.
    pub image: Vec<Package>,
    /// `linux-source-…`.
    pub source: Package,
    /// For another architecture: what its guests and programs have besides the kernel.
    #[serde(default)]
    pub userland: Vec<Package>,
    /// Why it cannot be used; `None` when it can.
    pub refusal: Option<String>,
}

impl Plan {
    /// The newest kernel that can be used, or the newest such whose release begins with `wanted`.
    ///
    /// # Errors
    ///
    /// When there is none; the message says why each was refused.
    pub fn kernel(&self, wanted: Option<&str>) -> Result<&KernelPlan> {
        let fits =
            |kernel: &&KernelPlan| wanted.is_none_or(|prefix| matches(&kernel.release, prefix));
        if let Some(kernel) = self
            .kernels
            .iter()
            .filter(fits)
            .find(|kernel| kernel.refusal.is_none())
        {
            return Ok(kernel);
        }
        let asked = wanted.map_or_else(String::new, |prefix| {
            format!(" that begins with `{prefix}`")
        });
        bail!(
            "the mirror has no kernel{asked} that can be used with its compiler ({}).\n{}\n\
             Its kernels may have been built by a newer or older compiler; try again later with --update, \
             or name another mirror with BARLEASE_MIRROR.",
            self.rustc,
            self.kernels
                .iter()
                .map(KernelPlan::verdict)
                .collect::<Vec<_>>()
                .join("\n")
        );
    }
}

impl KernelPlan {
    /// A line that says whether it can be used, and why not.
    #[must_use]
    pub fn verdict(&self) -> String {
        let reason = self.refusal.as_deref().unwrap_or("can be used");
        format!("  {} ({}): {reason}", self.release, self.version)
    }
}

/// `7.2` means 7.2.13 but not 7.20.
fn matches(release: &str, prefix: &str) -> bool {
    release
        .strip_prefix(prefix)
        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// The releases of a flavour, which has this suffix, among the names of header packages.
pub(crate) fn releases(names: &[String], flavour: &str) -> BTreeSet<String> {
    let has_flavour = |release: &&str| {
        release.split_once('-').is_some_and(|(base, rest)| {
            base.starts_with(|c: char| c.is_ascii_digit()) && rest == flavour
        })
    };
    names
        .iter()
        .filter_map(|name| name.strip_prefix("linux-headers-"))
        .filter(has_flavour)
        .map(str::to_owned)
        .collect()
}

/// A release without its flavour.
fn base(release: &str) -> &str {
    release.split_once('-').map_or(release, |(base, _)| base)
}

/// `7.2.13+deb14` has its source in `linux-source-7.2`.
fn source_name(release: &str) -> String {
    let numbers: Vec<_> = base(release).split(['.', '+', '~']).take(2).collect();
    format!("linux-source-{}", numbers.join("."))
}

fn header_names(release: &str) -> [String; 3] {
    let base = base(release);
    [
        format!("linux-headers-{release}"),
        format!("linux-headers-{base}-common"),
        format!("linux-kbuild-{base}"),
    ]
}

fn image_names(release: &str) -> [String; 2] {
    [
        format!("linux-binary-{release}"),
        format!("linux-modules-{release}"),
    ]
}

/// Every package whose description the plan of this kernel needs.
pub(crate) fn kernel_packages(release: &str) -> Vec<String> {
    let mut names = Vec::from(header_names(release));
    names.extend(image_names(release));
    names.push(source_name(release));
    names
}

/// Makes kernel plans from package descriptions, newest first; kernels whose packages are not all
/// of one version are refused.
pub(crate) fn kernels(releases: &BTreeSet<String>, records: &[Record]) -> Vec<KernelPlan> {
    let mut by_name: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in records {
        by_name
            .entry(&record.package.name)
            .or_default()
            .push(record);
    }
    let mut plans: Vec<_> = releases
        .iter()
        .filter_map(|release| kernel(release, &by_name))
        .collect();
    plans.sort_by(|a, b| newest_first(&a.version, &b.version));
    plans
}

fn newest_first(a: &str, b: &str) -> Ordering {
    version::compare(b, a)
}

fn kernel(release: &str, records: &BTreeMap<&str, Vec<&Record>>) -> Option<KernelPlan> {
    let versions = records.get(format!("linux-headers-{release}").as_str())?;
    let newest = versions
        .iter()
        .max_by(|a, b| version::compare(&a.package.version, &b.package.version))?;
    let wanted = &newest.package.version;
    let mut absent = Vec::new();
    let mut find = |name: &str| {
        let found = records
            .get(name)
            .into_iter()
            .flatten()
            .find(|record| record.package.version == *wanted);
        if found.is_none() {
            absent.push(name.to_owned());
        }
        found.map_or_else(|| unknown(name, wanted), |record| record.package.clone())
    };
    let headers = header_names(release)
        .iter()
        .map(|name| find(name))
        .collect();
    let image = image_names(release).iter().map(|name| find(name)).collect();
    let source = find(&source_name(release));
    let refusal = (!absent.is_empty())
        .then(|| format!("the mirror lacks {} of this version", absent.join(", ")));
    Some(KernelPlan {
        release: release.to_owned(),
        version: wanted.clone(),
        headers,
        image,
        source,
        userland: Vec::new(),
        refusal,
    })
}

fn unknown(name: &str, version: &str) -> Package {
    Package {
        name: name.to_owned(),
        version: version.to_owned(),
        arch: String::new(),
    }
}

/// The packages asked for on all machines; a plan made for others is out of date.
pub(crate) fn asked() -> Vec<String> {
    TOOLS
        .iter()
        .chain(MACHINE)
        .map(|name| (*name).to_owned())
        .collect()
}

/// The tool chain's packages by name, with the compilers that these kernels were built by.
pub(crate) fn tools(records: &[Record]) -> Vec<String> {
    let mut names: BTreeSet<String> = asked().into_iter().collect();
    for record in records
        .iter()
        .filter(|record| record.package.name.starts_with("linux-headers-"))
    {
        names.extend(compilers(&record.depends));
    }
    names.into_iter().collect()
}

/// `gcc-16-for-host, linux-base` → `gcc-16-for-host`, `gcc-16`.
fn compilers(depends: &str) -> Vec<String> {
    depends
        .split(',')
        .filter_map(|dependency| dependency.split_whitespace().next())
        .filter(|name| name.starts_with("gcc-") && name.ends_with("-for-host"))
        .flat_map(|name| {
            [
                name.to_owned(),
                name.trim_end_matches("-for-host").to_owned(),
            ]
        })
        .collect()
}

/// Compares a kernel's configuration with the compiler; says why it cannot be used.
pub(crate) fn judge(config: &str, rustc: &str) -> Option<String> {
    let value = |name: &str| {
        config
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"'))
    };
    if value("CONFIG_RUST") != Some("y") {
        return Some("was built without Rust (CONFIG_RUST)".to_owned());
    }
    match value("CONFIG_RUSTC_VERSION_TEXT") {
        Some(built_by) if built_by == rustc => None,
        Some(built_by) => Some(format!("was built by another compiler ({built_by})")),
        None => Some("does not say which rustc it was built by".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUSTC: &str = "rustc 1.97.1 (8bab26f4f 2026-07-14) (built from a source tarball)";

    fn record(name: &str, version: &str) -> Record {
        Record {
            package: Package {
                name: name.to_owned(),
                version: version.to_owned(),
                arch: "amd64".to_owned(),
            },
            depends: "gcc-16-for-host, linux-base (>= 4.12~)".to_owned(),
            size: 1,
        }
    }

    fn mirror() -> Vec<KernelPlan> {
        let releases: BTreeSet<_> = ["7.2.13+deb14-amd64", "7.3-amd64"]
            .map(str::to_owned)
            .into();
        let mut records = Vec::new();
        for name in kernel_packages("7.2.13+deb14-amd64") {
            records.push(record(&name, "7.2.13-1"));
        }
        for name in kernel_packages("7.3-amd64") {
            records.push(record(&name, "7.3~rc7-1~exp1"));
        }
        kernels(&releases, &records)
    }

    fn plan(kernels: Vec<KernelPlan>) -> Plan {
        Plan {
            mirror: String::new(),
            asked: asked(),
            tools: Vec::new(),
            rustc: RUSTC.to_owned(),
            kernels,
        }
    }

    #[test]
    fn the_library_for_another_architecture_is_of_the_compilers_version() {
        let tools = [record(RUST_LIBRARY, "1.97.1-1").package];
        let busybox = [
            record("busybox-static", "1:1.37-1"),
            record("busybox-static", "1:1.38-3"),
        ];
        let with = |library: &str| {
            let mut records = busybox.to_vec();
            records.push(record(RUST_LIBRARY, "1.98.0-1"));
            records.push(record(RUST_LIBRARY, library));
            userland(&records, &tools)
        };
        let found = with("1.97.1-1").unwrap();
        let versions: Vec<_> = found.iter().map(|it| it.version.as_str()).collect();
        assert_eq!(versions, ["1.97.1-1", "1:1.38-3"]);
        let text = with("1.96.0-1").unwrap_err().to_string();
        assert!(
            text.contains("1.97.1-1") && text.contains("--update"),
            "{text}"
        );
        assert!(userland(&busybox[..0], &tools).is_err());
    }

    #[test]
    fn releases_are_of_a_flavour_and_meta_packages_are_none() {
        let names = [
            "linux-headers-7.3-amd64",
            "linux-headers-7.3-rt-amd64",
            "linux-headers-7.3-cloud-amd64",
            "linux-headers-7.3-common",
            "linux-headers-amd64",
            "linux-headers-7.2.13+deb14-amd64",
            "linux-headers-7.3-arm64",
            "linux-headers-7.3-arm64-16k",
        ]
        .map(str::to_owned);
        let found = |flavour| releases(&names, flavour).into_iter().collect::<Vec<_>>();
        assert_eq!(found("amd64"), ["7.2.13+deb14-amd64", "7.3-amd64"]);
        assert_eq!(found("rt-amd64"), ["7.3-rt-amd64"]);
        assert_eq!(found("cloud-amd64"), ["7.3-cloud-amd64"]);
        assert_eq!(found("arm64"), ["7.3-arm64"]);
        assert_eq!(found("arm64-16k"), ["7.3-arm64-16k"]);
    }

    #[test]
    fn package_names_follow_from_the_release() {
        let names = kernel_packages("7.2.13+deb14-amd64");
        assert!(names.contains(&"linux-headers-7.2.13+deb14-common".to_owned()));
        assert!(names.contains(&"linux-modules-7.2.13+deb14-amd64".to_owned()));
        assert!(names.contains(&"linux-source-7.2".to_owned()));
        assert_eq!(source_name("7.3-amd64"), "linux-source-7.3");
        assert_eq!(source_name("7.3-rt-amd64"), "linux-source-7.3");
        assert_eq!(mirror()[1].source.name, "linux-source-7.2");
    }

    #[test]
    fn the_newest_usable_kernel_is_taken() {
        let mut kernels = mirror();
        assert_eq!(
            plan(kernels.clone()).kernel(None).unwrap().release,
            "7.3-amd64"
        );
        kernels[0].refusal = Some("no".to_owned());
        assert_eq!(
            plan(kernels).kernel(None).unwrap().release,
            "7.2.13+deb14-amd64"
        );
    }

    #[test]
    fn a_kernel_is_chosen_by_the_beginning_of_its_release() {
        let plan = plan(mirror());
        assert_eq!(
            plan.kernel(Some("7.2")).unwrap().release,
            "7.2.13+deb14-amd64"
        );
        assert_eq!(
            plan.kernel(Some("7.2.13+deb14-amd64")).unwrap().release,
            "7.2.13+deb14-amd64"
        );
        assert!(!matches("7.20-amd64", "7.2"));
    }

    #[test]
    fn without_a_kernel_every_refusal_is_said() {
        let mut kernels = mirror();
        kernels[0].refusal = Some("was built without Rust".to_owned());
        let text = plan(kernels).kernel(Some("7.3")).unwrap_err().to_string();
        assert!(
            text.contains("7.3-amd64") && text.contains("without Rust"),
            "{text}"
        );
    }

    #[test]
    fn a_kernel_with_a_package_missing_is_refused() {
        let releases: BTreeSet<_> = ["7.3-amd64".to_owned()].into();
        let found = kernels(&releases, &[record("linux-headers-7.3-amd64", "7.3-1")]);
        assert!(
            found[0]
                .refusal
                .as_ref()
                .unwrap()
                .contains("linux-modules-7.3-amd64")
        );
    }

    #[test]
    fn compiler_and_kernel_must_agree() {
        let config =
            |rustc: &str| format!("CONFIG_RUST=y\nCONFIG_RUSTC_VERSION_TEXT=\"{rustc}\"\n");
        assert_eq!(judge(&config(RUSTC), RUSTC), None);
        assert!(
            judge(&config("rustc 1.96.0"), RUSTC)
                .unwrap()
                .contains("1.96.0")
        );
        assert!(
            judge("# CONFIG_RUST is not set\n", RUSTC)
                .unwrap()
                .contains("without Rust")
        );
    }

    #[test]
    fn the_compiler_of_the_kernels_is_installed() {
        let names = tools(&[record("linux-headers-7.3-amd64", "7.3-1")]);
        assert!(
            names.contains(&"gcc-16".to_owned()) && names.contains(&"gcc-16-for-host".to_owned())
        );
    }
}
