//! A private apt: the host's own mirror and proxy settings, other suites, nothing of the host
//! changed.
//!
//! It has its own folder, its own sources and an empty dpkg status, so that `install
//! --download-only` resolves a complete set of packages for an empty system. It needs no root.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::packages::arch::Arch;
use crate::packages::cache::{self, Cache};
use crate::packages::command::{self, need, tied};
use crate::packages::report::{Step, megabytes};

/// The suite that tool chain and emulator come from. Kernels come from it or from [`NEXT`].
pub(crate) const SUITE: &str = "sid";
/// The suite that has kernels before they are released.
pub(crate) const NEXT: &str = "experimental";

/// A package at one version.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// Its version, with the epoch.
    pub version: String,
    /// Its architecture, such as `amd64`, or `all`.
    pub arch: String,
}

impl Package {
    /// The name that apt gives to the downloaded file.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!(
            "{}_{}_{}.deb",
            self.name,
            self.version.replace(':', "%3a"),
            self.arch
        )
    }
}

/// The entry of apt's lists for a package at one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) package: Package,
    pub(crate) depends: String,
    pub(crate) size: u64,
}

/// The private apt.
#[derive(Clone, Debug)]
pub(crate) struct Apt {
    conf: PathBuf,
    archives: PathBuf,
}

impl Apt {
    /// Writes the configuration (again) and says which mirror it uses. It has the packages of
    /// `arch` only.
    pub(crate) fn set_up(cache: &Cache, arch: Arch) -> Result<(Self, String)> {
        need("apt-get", "apt")?;
        need("dpkg-deb", "dpkg")?;
        let mirror = mirror()?;
        let keyring = keyring()?;
        let dir = cache.path(if arch.is_native() {
            "apt".to_owned()
        } else {
            format!("apt-{}", arch.name())
        });
        let archives = cache.path("archives");
        let folders = [
            "etc/apt.conf.d",
            "etc/preferences.d",
            "etc/trusted.gpg.d",
            "state/lists/partial",
            "cache",
            "dpkg",
        ];
        for folder in folders {
            fs::create_dir_all(dir.join(folder))
                .with_context(|| format!("make {}/{folder}", dir.display()))?;
        }
        fs::create_dir_all(archives.join("partial"))?;
        cache::write(&dir.join("dpkg/status"), "")?;
        cache::write(&dir.join("etc/sources.list"), sources(&mirror, &keyring))?;
        let settings = command::output(
            Command::new("apt-config").arg("dump"),
            "read the host's apt settings",
        )?;
        cache::write(
            &dir.join("apt.conf"),
            configuration(&dir, &archives, arch, &settings),
        )?;
        Ok((
            Self {
                conf: dir.join("apt.conf"),
                archives,
            },
            mirror,
        ))
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = tied(program);
        command
            .env("APT_CONFIG", &self.conf)
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Fetches the package lists.
    pub(crate) fn update(&self) -> Result<()> {
        let step = Step::start(format!("fetching the package lists of {SUITE} and {NEXT}"));
        command::run(
            self.tool("apt-get").args(["update", "-q"]),
            "fetch the package lists",
        )
        .context(
            "is the mirror reachable? BARLEASE_MIRROR=<URL of a Debian mirror> chooses another one",
        )?;
        step.done();
        Ok(())
    }

    /// Whether package lists were fetched.
    pub(crate) fn has_lists(&self) -> bool {
        let lists = self.conf.with_file_name("state/lists");
        fs::read_dir(lists).is_ok_and(|entries| {
            let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            names.any(|name| name.ends_with("_Packages"))
        })
    }

    /// All packages that an empty system needs so that `wanted` are installed.
    pub(crate) fn closure(&self, wanted: &[String]) -> Result<Vec<Package>> {
        let mut command = self.tool("apt-get");
        command
            .args([
                "install",
                "--simulate",
                "-q",
                "-y",
                "--no-install-recommends",
                "-t",
                SUITE,
            ])
            .args(wanted);
        let text = command::output(&mut command, "resolve packages")?;
        let packages: Vec<_> = text.lines().filter_map(parse_inst).collect();
        if packages.is_empty() {
            bail!(
                "apt resolved what was asked for to no package at all:\n{}",
                command::tail(&text, 10)
            );
        }
        Ok(packages)
    }

    /// The names of all packages that begin so.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let text = command::output(
            self.tool("apt-cache").args(["pkgnames", prefix]),
            "list package names",
        )?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// All versions of the packages named; those unknown to apt are left out.
    pub(crate) fn show(&self, names: &[String]) -> Result<Vec<Record>> {
        let mut known = HashSet::new();
        for prefix in ["linux-", "gcc-", "busybox-", "libstd-rust-"] {
            known.extend(self.names(prefix)?);
        }
        let names: Vec<_> = names.iter().filter(|name| known.contains(*name)).collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let text = command::output(
            self.tool("apt-cache").arg("show").args(names),
            "read package descriptions",
        )?;
        Ok(text.split("\n\n").filter_map(parse_record).collect())
    }

    /// The path of a downloaded package.
    pub(crate) fn file(&self, package: &Package) -> PathBuf {
        self.archives.join(package.file_name())
    }

    /// Downloads what is not there yet.
    pub(crate) fn download(&self, packages: &[Package], why: &str) -> Result<()> {
        let missing: Vec<_> = packages
            .iter()
            .filter(|package| !self.file(package).exists())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = missing
            .iter()
            .map(|package| format!("{}={}", package.name, package.version))
            .collect();
        let total = self.sizes(&names)?;
        let step = Step::bytes(
            format!(
                "downloading {} packages, {}, {why}",
                missing.len(),
                megabytes(total)
            ),
            total,
        );
        let files: Vec<_> = missing.iter().map(|package| package.file_name()).collect();
        self.download_files(&names, &files, &step)?;
        if let Some(absent) = missing.iter().find(|package| !self.file(package).exists()) {
            bail!(
                "apt said it had downloaded {}, but {} is not there",
                absent.name,
                self.file(absent).display()
            );
        }
        step.done();
        Ok(())
    }

    fn download_files(&self, names: &[String], files: &[String], step: &Step) -> Result<()> {
        // Into a folder of its own first: apt writes in place, and a file in `archives` counts as
        // complete.
        let here = self.archives.join("partial");
        let mut child = self
            .tool("apt-get")
            .args(["download", "-q"])
            .args(names)
            .current_dir(&here)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start `apt-get download`")?;
        let stderr = child.stderr.take();
        let said = thread::spawn(move || {
            stderr
                .and_then(|pipe| std::io::read_to_string(pipe).ok())
                .unwrap_or_default()
        });
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            step.at(size_of_files(&here, files));
            thread::sleep(Duration::from_millis(150));
        };
        let said = said.join().unwrap_or_default();
        if !status.success() {
            bail!(
                "`apt-get download` ended with {status}:\n{}\nWhen the mirror no longer has these versions, run \
                 `cargo xtask vm prepare --update`; what was downloaded is kept.",
                command::tail(&said, 15)
            );
        }
        for file in files {
            let from = here.join(file);
            if from.exists() {
                fs::rename(&from, self.archives.join(file))
                    .with_context(|| format!("keep the package {file}"))?;
            }
        }
        Ok(())
    }

    fn sizes(&self, names: &[String]) -> Result<u64> {
        let mut command = self.tool("apt-get");
        command.args(["download", "--print-uris", "-q"]).args(names);
        let text = command::output(&mut command, "look up the sizes of packages").context(
            "when these versions are unknown to the lists, run `cargo xtask vm prepare --update`",
        )?;
        Ok(text.lines().filter_map(parse_size).sum())
    }

    /// Removes downloaded packages that are unpacked by now.
    pub(crate) fn forget(&self, packages: &[Package]) -> Result<()> {
        packages
            .iter()
            .try_for_each(|package| cache::remove(&self.file(package)))
    }
}

fn size_of_files(folder: &Path, files: &[String]) -> u64 {
    let size = |path: PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
    files
        .iter()
        .map(|file| size(folder.join(file)).max(size(folder.join("partial").join(file))))
        .sum()
}

fn sources(mirror: &str, keyring: &Path) -> String {
    let keyring = keyring.display();
    [SUITE, NEXT]
        .map(|suite| format!("deb [signed-by={keyring}] {mirror} {suite} main\n"))
        .concat()
}

fn configuration(dir: &Path, archives: &Path, arch: Arch, machine: &str) -> String {
    let mut text = format!(
        "Dir \"{dir}\";\n\
         Dir::Etc \"etc\";\n\
         Dir::Etc::sourcelist \"sources.list\";\n\
         Dir::Etc::sourceparts \"/dev/null\";\n\
         Dir::Etc::netrc \"/etc/apt/auth.conf\";\n\
         Dir::Etc::netrcparts \"/etc/apt/auth.conf.d\";\n\
         Dir::State \"state\";\n\
         Dir::State::status \"{dir}/dpkg/status\";\n\
         Dir::Cache \"cache\";\n\
         Dir::Cache::archives \"{archives}\";\n\
         APT::Architecture \"{arch}\";\n\
         APT::Architectures {{ \"{arch}\"; }};\n\
         APT::Sandbox::User \"root\";\n\
         // A mirror may be behind on the Release file of a suite that nobody installs from.\n\
         Acquire::Check-Valid-Until \"false\";\n\
         Acquire::Languages \"none\";\n\
         // Old lists are no substitute for those that were asked for.\n\
         APT::Update::Error-Mode \"any\";\n\
         Acquire::Retries \"3\";\n",
        dir = dir.display(),
        arch = arch.name(),
        archives = archives.display(),
    );
    // How the host reaches its mirror: proxies, certificates, time-outs.
    for line in machine.lines() {
        if ["Acquire::http:", "Acquire::https:", "Acquire::ftp:"]
            .iter()
            .any(|prefix| line.starts_with(prefix))
        {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// The mirror that the host installs Debian from, or the one that `BARLEASE_MIRROR` names.
fn mirror() -> Result<String> {
    if let Some(mirror) = std::env::var("BARLEASE_MIRROR")
        .ok()
        .filter(|mirror| !mirror.is_empty())
    {
        return Ok(mirror);
    }
    let text = command::output(
        Command::new("apt-get").args(["update", "--print-uris"]),
        "read the host's apt sources",
    )?;
    choose_mirror(&text).context(
        "the host's apt sources name no Debian mirror: set BARLEASE_MIRROR to the URL of one \
         (the part before /dists)",
    )
}

/// Chooses from what `apt-get update --print-uris` prints.
fn choose_mirror(uris: &str) -> Option<String> {
    uris.lines()
        .filter_map(|line| {
            line.strip_prefix('\'')?
                .split_once("'")?
                .0
                .split_once("/dists/")
        })
        .map(|(base, _)| base)
        .find(|base| base.rsplit('/').next() == Some("debian"))
        .map(str::to_owned)
}

fn keyring() -> Result<PathBuf> {
    ["gpg", "pgp"]
        .iter()
        .map(|extension| {
            PathBuf::from(format!(
                "/usr/share/keyrings/debian-archive-keyring.{extension}"
            ))
        })
        .find(|path| path.exists())
        .context(
            "Debian's archive keys are not installed, so packages cannot be verified: \
             apt-get install debian-archive-keyring",
        )
}

/// `Inst libc6 (2.43-1 Debian:unstable [amd64]) [...]`
fn parse_inst(line: &str) -> Option<Package> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
    let inside = rest.split_once(')')?.0;
    let version = inside.split_once(' ')?.0;
    let arch = inside.rsplit_once('[')?.1.trim_end_matches(']');
    Some(Package {
        name: name.to_owned(),
        version: version.to_owned(),
        arch: arch.to_owned(),
    })
}

/// `'URI' FILE SIZE HASH`
fn parse_size(line: &str) -> Option<u64> {
    line.strip_prefix('\'')?
        .split_whitespace()
        .nth(2)?
        .parse()
        .ok()
}

fn parse_record(text: &str) -> Option<Record> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .map(str::trim)
    };
    Some(Record {
        package: Package {
            name: field("Package")?.to_owned(),
            version: field("Version")?.to_owned(),
            arch: field("Architecture")?.to_owned(),
        },
        depends: field("Depends").unwrap_or_default().to_owned(),
        size: field("Size")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_of_debian_itself() {
        let uris = "'http://mirror.example/debian-security/dists/bookworm-security/InRelease' a 0 \n\
                    'http://other.example/ubuntu/dists/noble/InRelease' b 0 \n\
                    'http://mirror.example/pub/debian/dists/bookworm/InRelease' c 0 \n";
        assert_eq!(
            choose_mirror(uris).as_deref(),
            Some("http://mirror.example/pub/debian")
        );
        assert_eq!(
            choose_mirror("'http://other.example/ubuntu/dists/noble/InRelease' b 0 "),
            None
        );
    }

    #[test]
    fn a_simulated_installation_gives_packages() {
        let package = parse_inst("Inst bc (1.07.1-4 Debian:unstable [amd64]) []").unwrap();
        assert_eq!(package.file_name(), "bc_1.07.1-4_amd64.deb");
        let package =
            parse_inst("Inst libc6 (1:2.43-1+b1 Debian:14.0/unstable, Debian:x [amd64])").unwrap();
        assert_eq!(package.file_name(), "libc6_1%3a2.43-1+b1_amd64.deb");
        assert_eq!(
            parse_inst("Conf bc (1.07.1-4 Debian:unstable [amd64])"),
            None
        );
    }

    #[test]
    fn a_size_is_the_third_word() {
        assert_eq!(
            parse_size("'http://mirror.example/x.deb' x_1_all.deb 166042412 SHA256:00"),
            Some(166_042_412)
        );
        assert_eq!(parse_size("Reading package lists..."), None);
    }

    #[test]
    fn a_record_has_its_fields() {
        let text = "Package: linux-headers-7.3-amd64\nVersion: 7.3~rc7-1~exp1\nArchitecture: amd64\n\
                    Depends: gcc-16-for-host, linux-base\nDescription-en: Size: none\n more\nSize: 1789528";
        let record = parse_record(text).unwrap();
        assert_eq!(record.depends, "gcc-16-for-host, linux-base");
        assert_eq!(record.size, 1_789_528);
    }

    #[test]
    fn proxies_of_the_machine_are_kept() {
        let machine = "Acquire::http::Proxy \"http://proxy.example:3128\";\nDir \"/\";\n";
        let text = configuration(
            Path::new("/c/apt"),
            Path::new("/c/archives"),
            Arch::Arm64,
            machine,
        );
        assert!(text.contains("proxy.example"));
        assert!(text.contains("APT::Architecture \"arm64\";"));
        assert!(!text.contains("Dir \"/\";"));
    }
}
