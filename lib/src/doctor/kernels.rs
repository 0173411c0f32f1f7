//! How Barlease came onto the machine, and whether the module is there for the kernels that it
//! boots: this one and the next.

use std::cmp::Ordering;
use std::fmt;
use std::fs;
use std::path::Path;

use barlease_abi as abi;

use super::Check;
use super::Doctor;
use super::fail;
use super::ok;
use super::skip;
use super::warn;
use crate::pci::Pci;

/// DKMS's names of the sources, with the names of their modules.
const SOURCES: [(&str, &str); 2] = [
    ("barlease", abi::MODULE_NAME),
    // In the place of the stock module, which lies elsewhere.
    (AS_STOCK, "updates/dkms/vfio-pci"),
];
const AS_STOCK: &str = "barlease-vfio-pci";

/// Sources for DKMS.
#[derive(Clone, Debug)]
pub(super) struct Sources {
    name: &'static str,
    version: String,
}

impl Sources {
    /// Those in a folder of `/usr/src`.
    fn of(folder: &str) -> Option<Self> {
        SOURCES.iter().find_map(|(name, _)| {
            let version = folder.strip_prefix(name)?.strip_prefix('-')?;
            let version = version
                .starts_with(|c: char| c.is_ascii_digit())
                .then_some(version)?;
            Some(Self {
                name,
                version: version.to_owned(),
            })
        })
    }
}

impl fmt::Display for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.version)
    }
}

/// The builder of the module.
pub(super) enum Origin {
    /// DKMS, from the package barlease-dkms, or barlease-dkms-vfio-pci.
    Package(Sources),
    /// DKMS, from sources that were put there by hand.
    Dkms(Sources),
    /// Nothing yet: the package of the command is there, and no sources of the module.
    Nothing,
    /// Somebody with make.
    Make,
}

impl Origin {
    /// The name that modprobe knows the module by.
    pub(super) fn module(&self) -> &'static str {
        match self {
            Self::Package(sources) | Self::Dkms(sources) if sources.name == AS_STOCK => "vfio-pci",
            _ => abi::MODULE_NAME,
        }
    }

    /// The command that makes the module for a kernel.
    pub(super) fn build(&self, release: &str) -> String {
        match self {
            Self::Package(sources) => format!(
                "apt-get install linux-headers-{release}, and barlease-rust-overlay-{release} \
                 (`cargo xtask dist overlay --kernel {release}` makes it); then {}",
                Self::install(sources, release)
            ),
            Self::Dkms(sources) => Self::install(sources, release),
            Self::Nothing => format!(
                "install the packages barlease-dkms and barlease-rust-overlay-{release}: \
                 `cargo xtask dist --kernel {release}` makes them"
            ),
            Self::Make => format!(
                "in the unpacked tarball: make install-module KDIR=/lib/modules/{release}/build; in a \
                 checkout: make -C kmod KDIR=/lib/modules/{release}/build, and the same with \
                 modules_install"
            ),
        }
    }

    fn install(sources: &Sources, release: &str) -> String {
        let Sources { name, version } = sources;
        format!(
            "dkms install {sources} -k {release}; /usr/src/{name}-{version}/check-kernel \
             /lib/modules/{release}/build {release} says what is missing"
        )
    }
}

impl Doctor {
    pub(super) fn origin(&self) -> Origin {
        let sources = self.root.join("usr/src");
        let names = fs::read_dir(sources).into_iter().flatten();
        let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut all: Vec<Sources> = names
            .filter(|name| {
                let file = format!("usr/src/{name}/dkms.conf");
                self.root.join(file).is_file()
            })
            .filter_map(|name| Sources::of(&name))
            .collect();
        all.sort_unstable_by(|a, b| compare(&a.version, &b.version));
        let has_package = |name: &str| {
            let list = format!("var/lib/dpkg/info/{name}.list");
            self.root.join(list).is_file()
        };
        let is_package = has_package("barlease-dkms") || has_package("barlease-dkms-vfio-pci");
        match all.pop() {
            Some(sources) if is_package => Origin::Package(sources),
            Some(sources) => Origin::Dkms(sources),
            None if has_package("barlease") => Origin::Nothing,
            None => Origin::Make,
        }
    }

    /// Checks the module that DKMS has built for the kernel that runs.
    pub(super) fn dkms(&self, pci: &Pci) -> Check {
        const NAME: &str = "dkms";
        let (Origin::Package(sources) | Origin::Dkms(sources)) = self.origin() else {
            return skip(NAME, "DKMS has no sources of it");
        };
        let version = &sources.version;
        let tree = self.root.join("var/lib/dkms").join(sources.name);
        let release = &self.release;
        let built = tree.join(version).join(release);
        let found = |state: &str| format!("{sources}, {release}: {state}");
        if !tree.join(version).is_dir() {
            return warn(
                NAME,
                found("not added"),
                &format!("dkms install {sources} -k {release}"),
            );
        }
        // A link to what is installed: `kernel-RELEASE-ARCH`.
        let link = format!("kernel-{release}-");
        let links = fs::read_dir(&tree).into_iter().flatten().flatten();
        let installed = links
            .filter(|entry| {
                entry
                    .file_name()
                    .to_str()
                    .is_some_and(|it| it.starts_with(&link))
            })
            .find_map(|entry| fs::read_link(entry.path()).ok());
        match installed {
            Some(target) if is_of(&target, version) => ok(NAME, found("installed")),
            Some(target) => warn(
                NAME,
                format!(
                    "{}; installed is {}",
                    found("not installed"),
                    target.display()
                ),
                &format!("dkms install {sources} -k {release}"),
            ),
            None if built.is_dir() => warn(
                NAME,
                found("built, not installed"),
                &format!("dkms install {sources} -k {release}"),
            ),
            // Somebody may have put it there otherwise.
            None if pci.module().is_some() => ok(NAME, found("added; the module is loaded")),
            None => fail(
                NAME,
                found("added, not built"),
                &self.origin().build(release),
            ),
        }
    }

    /// The kernels that are newer than the one that runs: a machine boots the newest.
    pub(super) fn next_kernel(&self) -> Check {
        const NAME: &str = "next-kernel";
        let folder = self.root.join("lib/modules");
        let names = fs::read_dir(&folder).into_iter().flatten();
        let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut newer: Vec<String> = names
            .filter(|release| compare(release, &self.release) == Ordering::Greater)
            .filter(|release| self.boots(release))
            .collect();
        newer.sort_unstable_by(|a, b| compare(a, b));
        let Some(newest) = newer.last() else {
            return ok(
                NAME,
                format!("{} is the newest that is installed", self.release),
            );
        };
        let lacking: Vec<&str> = newer
            .iter()
            .filter(|release| !has_module(&folder.join(release)))
            .map(String::as_str)
            .collect();
        match lacking.last() {
            None => ok(NAME, format!("{newest} has the module, too")),
            Some(release) => warn(
                NAME,
                format!(
                    "installed without the module: {}; a boot into it has no Barlease",
                    lacking.join(", ")
                ),
                &self.origin().build(release),
            ),
        }
    }

    /// Whether there is a kernel, and not only headers or what a removal has left.
    fn boots(&self, release: &str) -> bool {
        let modules = self.root.join("lib/modules").join(release);
        let image = self.root.join(format!("boot/vmlinuz-{release}"));
        image.exists() || modules.join("vmlinuz").exists()
    }
}

/// DKMS writes the target from its tree's top, or whole.
fn is_of(target: &Path, version: &str) -> bool {
    target.iter().any(|part| part == version)
}

/// In the lists of depmod, which are made after the module is put there.
pub(super) fn has_module(modules: &Path) -> bool {
    ["modules.dep", "modules.order"].iter().any(|list| {
        fs::read_to_string(modules.join(list)).is_ok_and(|text| {
            let has = |module: &str| text.contains(&format!("{module}.ko"));
            SOURCES.iter().any(|(_, module)| has(module))
        })
    })
}

/// Versions, number by number; what is before a `~` is older with it than without.
fn compare(a: &str, b: &str) -> Ordering {
    let pieces = |text: &str| {
        let mut pieces: Vec<(u8, u64, String)> = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let is_digit = first.is_ascii_digit();
            let end = rest
                .find(|c: char| c.is_ascii_digit() != is_digit || (c == '~' && first != '~'))
                .unwrap_or(rest.len());
            let (piece, tail) = rest.split_at(end.max(first.len_utf8()));
            pieces.push(match is_digit {
                true => (2, piece.parse().unwrap_or(u64::MAX), String::new()),
                false => (u8::from(first != '~') * 3, 0, piece.to_owned()),
            });
            rest = tail;
        }
        // The end: after a `~`, before all else.
        pieces.push((1, 0, String::new()));
        pieces
    };
    pieces(a).cmp(&pieces(b))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::Verdict;
    use super::*;

    fn put(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn versions_grow_as_a_distribution_counts() {
        let order = [
            "6.12.48+deb13-amd64",
            "7.2.9-amd64",
            "7.2.13+deb14-amd64",
            "7.3~rc7-amd64",
            "7.3-amd64",
            "7.3.1-amd64",
            "7.10-amd64",
        ];
        for (n, a) in order.iter().enumerate() {
            for (m, b) in order.iter().enumerate() {
                assert_eq!(compare(a, b), n.cmp(&m), "{a} {b}");
            }
        }
    }

    #[test]
    fn the_next_kernel_is_one_that_boots_and_has_no_module() {
        let root = tempfile::tempdir().unwrap();
        let mut doctor = Doctor::at(root.path());
        doctor.release = "7.2.13-amd64".to_owned();
        let modules = root.path().join("lib/modules");
        for release in ["7.2.13-amd64", "7.3-amd64", "7.2.9-amd64"] {
            put(&modules.join(release).join("modules.dep"), "");
        }
        let check = || doctor.next_kernel();
        // Without an image nothing boots it.
        assert_eq!(check().verdict, Verdict::Ok, "{:?}", check());
        put(&root.path().join("boot/vmlinuz-7.2.9-amd64"), "");
        assert_eq!(check().verdict, Verdict::Ok);
        put(&root.path().join("boot/vmlinuz-7.3-amd64"), "");
        let lacks = check();
        assert_eq!(lacks.verdict, Verdict::Warn);
        assert!(lacks.found.contains("7.3-amd64"), "{lacks:?}");
        let remedy = lacks.remedy.unwrap();
        assert!(
            remedy.contains("make install-module KDIR=/lib/modules/7.3-amd64/build"),
            "{remedy}"
        );
        put(&root.path().join("var/lib/dpkg/info/barlease.list"), "");
        assert!(
            check()
                .remedy
                .unwrap()
                .contains("packages barlease-dkms and")
        );
        put(
            &modules.join("7.3-amd64/modules.dep"),
            "updates/barlease_vfio_pci.ko: x\n",
        );
        assert_eq!(check().found, "7.3-amd64 has the module, too");
    }

    #[test]
    fn remedies_fit_how_it_was_installed() {
        let root = tempfile::tempdir().unwrap();
        let mut doctor = Doctor::at(root.path());
        doctor.release = "7.3-amd64".to_owned();
        let pci = Pci::at(root.path().join("sys"));
        let at = |path: &str| root.path().join(path);
        assert_eq!(doctor.dkms(&pci).verdict, Verdict::Skip);
        assert!(doctor.module(&pci).remedy.unwrap().contains("make "));
        for version in ["0.1.0~git1.a", "0.1.0~git2.b"] {
            put(&at(&format!("usr/src/barlease-{version}/dkms.conf")), "");
        }
        put(&at("usr/src/barlease-vfio-pci-1/kmod"), "");
        assert_eq!(
            doctor.dkms(&pci).found,
            "barlease/0.1.0~git2.b, 7.3-amd64: not added"
        );
        let tree = at("var/lib/dkms/barlease/0.1.0~git2.b");
        fs::create_dir_all(&tree).unwrap();
        let check = doctor.dkms(&pci);
        assert_eq!(check.verdict, Verdict::Fail);
        let remedy = check.remedy.unwrap();
        assert!(
            remedy.starts_with("dkms install barlease/0.1.0~git2.b -k 7.3-amd64"),
            "{remedy}"
        );
        put(&at("var/lib/dpkg/info/barlease-dkms.list"), "");
        let remedy = doctor.module(&pci).remedy.unwrap();
        assert!(
            remedy.contains("apt-get install linux-headers-7.3-amd64"),
            "{remedy}"
        );

        fs::create_dir_all(tree.join("7.3-amd64/x86_64")).unwrap();
        assert!(doctor.dkms(&pci).found.ends_with("built, not installed"));
        let link = at("var/lib/dkms/barlease/kernel-7.3-amd64-x86_64");
        symlink("0.1.0~git1.a/7.3-amd64/x86_64", &link).unwrap();
        assert_eq!(doctor.dkms(&pci).verdict, Verdict::Warn);
        fs::remove_file(&link).unwrap();
        symlink("0.1.0~git2.b/7.3-amd64/x86_64", &link).unwrap();
        assert_eq!(
            doctor.dkms(&pci).found,
            "barlease/0.1.0~git2.b, 7.3-amd64: installed"
        );
    }

    #[test]
    fn the_module_in_the_stock_one_s_place_goes_by_its_own_names() {
        let root = tempfile::tempdir().unwrap();
        let mut doctor = Doctor::at(root.path());
        doctor.release = "7.3-amd64".to_owned();
        let at = |path: &str| root.path().join(path);
        put(&at("usr/src/barlease-vfio-pci-0.1.0/dkms.conf"), "");
        let pci = Pci::at(at("sys"));
        let found = doctor.dkms(&pci).found;
        assert_eq!(found, "barlease-vfio-pci/0.1.0, 7.3-amd64: not added");
        let remedy = doctor.module(&pci).remedy.unwrap();
        assert!(
            remedy.contains("/usr/src/barlease-vfio-pci-0.1.0/check-kernel"),
            "{remedy}"
        );
        let list = doctor.modules.join("modules.dep");
        put(&list, "kernel/drivers/vfio/pci/vfio-pci.ko.xz: x\n");
        assert_eq!(doctor.module(&pci).found, "not installed for this kernel");
        put(&list, "updates/dkms/vfio-pci.ko.xz: x\n");
        let remedy = doctor.module(&pci).remedy.unwrap();
        assert_eq!(remedy, "modprobe vfio-pci");
    }
}
