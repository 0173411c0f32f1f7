//! Finds what is missing for leases to work, in the order in which to mend it.

mod device;
mod kernels;
mod mappings;
mod opening;
mod route;
mod signature;

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use barlease_abi as abi;
use rustix::process::Resource;
use serde::Serialize;

use crate::Bdf;
use crate::pci::Pci;
use crate::pci::PciDevice;

/// Outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, with a limit.
    Warn,
    /// Does not work.
    Fail,
    /// Could not be found out, or needs an earlier check to succeed.
    Skip,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// The name of the check, short and stable.
    pub name: &'static str,
    /// The outcome.
    pub verdict: Verdict,
    /// The finding.
    pub found: String,
    /// The remedy.
    pub remedy: Option<String>,
}

/// Where to look.
#[derive(Clone, Debug)]
pub struct Doctor {
    sysfs: PathBuf,
    dev: PathBuf,
    /// Where distributions put the kernel's configuration.
    configs: Vec<PathBuf>,
    /// Where the kernel has it itself, compressed.
    own_config: PathBuf,
    modules: PathBuf,
    cpuinfo: PathBuf,
    iomem: PathBuf,
    /// Of the kernel that runs.
    release: String,
    root: PathBuf,
}

/// A parameter of the module.
struct Parameter {
    name: &'static str,
    default: &'static str,
    /// A value, and what may come of it.
    danger: Option<(&'static str, &'static str)>,
}

const PARAMETERS: &[Parameter] = &[
    Parameter {
        name: "msix_export",
        default: "auto",
        danger: Some((
            "always",
            "a holder that can write an MSI-X table can raise any interrupt of the host where the \
             IOMMU does not isolate them",
        )),
    },
    Parameter {
        name: "enable_sriov",
        default: "N",
        danger: None,
    },
    Parameter {
        name: "disable_denylist",
        default: "N",
        danger: Some(("Y", "devices that are known to harm the host can be bound")),
    },
    Parameter {
        name: "stock_dma_buf",
        default: "N",
        danger: Some((
            "Y",
            "exports are the kernel's own: they cannot be mapped or revoked",
        )),
    },
];

impl Default for Doctor {
    fn default() -> Self {
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        Self {
            sysfs: "/sys".into(),
            dev: "/dev".into(),
            configs: [
                format!("/boot/config-{release}"),
                format!("/lib/modules/{release}/config"),
                // Of systems whose /boot is not mounted, or is of the boot loader alone.
                format!("/usr/lib/ostree-boot/config-{release}"),
                format!("/usr/lib/kernel/config-{release}"),
                format!("/lib/modules/{release}/build/.config"),
                format!("/lib/modules/{release}/source/.config"),
            ]
            .map(PathBuf::from)
            .into(),
            own_config: "/proc/config.gz".into(),
            modules: format!("/lib/modules/{release}").into(),
            cpuinfo: "/proc/cpuinfo".into(),
            iomem: "/proc/iomem".into(),
            root: "/".into(),
            release,
        }
    }
}

impl Doctor {
    /// This system.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A system below another root, such as a container image or a test's directory.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        let system = Self::default();
        let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        Self {
            sysfs: below(&system.sysfs),
            dev: below(&system.dev),
            configs: system.configs.iter().map(|path| below(path)).collect(),
            own_config: below(&system.own_config),
            modules: below(&system.modules),
            cpuinfo: below(&system.cpuinfo),
            iomem: below(&system.iomem),
            root: root.to_owned(),
            release: system.release,
        }
    }

    /// Checks the system, and a device if one is given.
    #[must_use]
    pub fn examine(&self, bdf: Option<Bdf>) -> Vec<Check> {
        let pci = Pci::at(&self.sysfs);
        let mut checks = vec![
            self.kernel(),
            self.module(&pci),
            self.signature(&pci),
            self.dkms(&pci),
            self.next_kernel(),
            self.parameters(),
            iommu(&pci),
            self.nodes(),
            memlock(),
            self.write_combining(),
        ];
        if let Some(bdf) = bdf {
            checks.extend(self.device(&pci, bdf));
        }
        checks
    }

    /// Parameters of the module that are not as they are by default.
    fn parameters(&self) -> Check {
        const NAME: &str = "parameters";
        let folder = [abi::MODULE_NAME, "vfio_pci"]
            .map(|name| self.sysfs.join("module").join(name).join("parameters"))
            .into_iter()
            .find(|folder| folder.join("msix_export").exists());
        let Some(folder) = folder else {
            return skip(NAME, "the module is not loaded");
        };
        let value = |name: &str| {
            let text = fs::read_to_string(folder.join(name)).unwrap_or_default();
            text.trim().to_owned()
        };
        let mut set = Vec::new();
        let mut warnings = Vec::new();
        for parameter in PARAMETERS {
            let (name, value) = (parameter.name, value(parameter.name));
            if value.is_empty() || value == parameter.default {
                continue;
            }
            set.push(format!("{name}={value}"));
            if let Some((_, what)) = parameter.danger.filter(|(bad, _)| *bad == value) {
                warnings.push(format!("{name}={value}: {what}"));
            }
        }
        match (set.is_empty(), warnings.is_empty()) {
            (true, _) => ok(NAME, "all as by default"),
            (false, true) => ok(NAME, set.join(" ")),
            (false, false) => warn(
                NAME,
                warnings.join("; "),
                &format!(
                    "echo DEFAULT > {}/NAME, and look into /etc/modprobe.d",
                    folder.display()
                ),
            ),
        }
    }

    /// The running kernel's own configuration, which no file of another one can belie.
    fn own_config(&self) -> Option<String> {
        if !self.own_config.exists() {
            return None;
        }
        let gzip = Command::new("gzip")
            .arg("-dc")
            .arg(&self.own_config)
            .output();
        let text = gzip.ok().filter(|gzip| gzip.status.success())?.stdout;
        String::from_utf8(text).ok()
    }

    fn config(&self) -> Option<String> {
        let files = self.configs.iter();
        self.own_config().or_else(|| {
            files
                .filter_map(|path| fs::read_to_string(path).ok())
                .next()
        })
    }

    /// The options that the module needs.
    fn kernel(&self) -> Check {
        let Some(config) = self.config() else {
            return skip(
                "kernel",
                format!(
                    "the kernel's configuration is neither at {} nor at the places of distributions",
                    self.own_config.display()
                ),
            );
        };
        let missing: Vec<&str> = [
            "CONFIG_RUST",
            "CONFIG_VFIO_PCI_CORE",
            "CONFIG_DMA_SHARED_BUFFER",
        ]
        .into_iter()
        .filter(|option| !has_option(&config, option))
        .collect();
        if !missing.is_empty() {
            return fail(
                "kernel",
                format!("built without {}", missing.join(", ")),
                "boot a kernel of 7.2 or later that has them, such as Debian's",
            );
        }
        if !has_option(&config, "CONFIG_PCI_P2PDMA") {
            return warn(
                "kernel",
                "built without CONFIG_PCI_P2PDMA: leases can be mapped, not imported by devices",
                "boot a kernel that has it, if devices are to reach leases",
            );
        }
        ok("kernel", "has what the module needs")
    }

    fn module(&self, pci: &Pci) -> Check {
        if let Some(module) = pci.module() {
            let version = module.version.unwrap_or_else(|| "unknown".to_owned());
            return ok("module", format!("loaded, version {version}"));
        }
        if kernels::has_module(&self.modules) {
            return fail(
                "module",
                "installed, not loaded",
                &format!("modprobe {}", self.origin().module()),
            );
        }
        fail(
            "module",
            "not installed for this kernel",
            &self.origin().build(&self.release),
        )
    }

    /// Whether a mapping that asks for write-combining gets it. On x86 that takes PAT, and the
    /// kernel shows its list of memory types only where PAT is on.
    fn write_combining(&self) -> Check {
        const NAME: &str = "write-combining";
        let folder = self.sysfs.join("kernel/debug/x86");
        if fs::read_dir(&folder).is_err() {
            return skip(NAME, format!("{} cannot be read", folder.display()));
        }
        if folder.join("pat_memtype_list").exists() {
            return ok(NAME, "real: PAT is on");
        }
        warn(
            NAME,
            "refused: PAT is off",
            "boot without nopat; a hypervisor may have to show PAT to its guest",
        )
    }

    fn device_file(&self, bdf: Bdf, name: &str) -> PathBuf {
        let devices = self.sysfs.join("bus/pci/devices");
        devices.join(bdf.to_string()).join(name)
    }

    fn device(&self, pci: &Pci, bdf: Bdf) -> Vec<Check> {
        let device = match pci.device(bdf) {
            Ok(device) => device,
            Err(error) => {
                return vec![fail(
                    "device",
                    error.to_string(),
                    "`barlease device` lists them",
                )];
            }
        };
        let mut checks = vec![
            driver(&device),
            self.group(pci, &device),
            self.permission(&device),
            self.mappings(bdf),
        ];
        checks.extend(self.memory(pci, bdf));
        checks
    }
}

fn driver(device: &PciDevice) -> Check {
    let bind = format!("barlease device bind {}", device.bdf);
    match device.driver.as_deref() {
        Some(driver) if device.is_barlease() => ok("driver", driver),
        Some(driver) if device.is_vfio() => warn(
            "driver",
            format!("bound to {driver}: leases can be neither mapped nor revoked"),
            &bind,
        ),
        Some(driver) => fail(
            "driver",
            format!("bound to {driver}, which is not a vfio driver"),
            &bind,
        ),
        None => fail("driver", "bound to no driver", &bind),
    }
}

fn iommu(pci: &Pci) -> Check {
    if pci.has_iommu() {
        return ok("iommu", "on");
    }
    fail(
        "iommu",
        "off: there are no IOMMU groups",
        "turn it on in the firmware and boot an Intel machine with intel_iommu=on",
    )
}

/// Memory that is mapped for DMA counts against it; leases alone need none.
fn memlock() -> Check {
    match rustix::process::getrlimit(Resource::Memlock).current {
        None => ok("memlock", "unlimited"),
        Some(limit) if limit >= 64 << 20 => ok("memlock", format!("{} MiB", limit >> 20)),
        Some(limit) => warn(
            "memlock",
            format!("{} KiB: little memory can be mapped for DMA", limit >> 10),
            "ulimit -l unlimited",
        ),
    }
}

/// Built in or a module.
fn has_option(config: &str, option: &str) -> bool {
    config.lines().any(|line| {
        line.strip_prefix(option)
            .is_some_and(|rest| rest == "=y" || rest == "=m")
    })
}

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Ok,
        found: found.into(),
        remedy: None,
    }
}

fn skip(name: &'static str, found: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Skip,
        found: found.into(),
        remedy: None,
    }
}

fn warn(name: &'static str, found: impl Into<String>, remedy: &str) -> Check {
    Check {
        name,
        verdict: Verdict::Warn,
        found: found.into(),
        remedy: Some(remedy.to_owned()),
    }
}

fn fail(name: &'static str, found: impl Into<String>, remedy: &str) -> Check {
    Check {
        name,
        verdict: Verdict::Fail,
        found: found.into(),
        remedy: Some(remedy.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_system_fails_in_order_with_remedies() {
        let root = tempfile::tempdir().unwrap();
        let checks = Doctor::at(root.path()).examine("00:05.0".parse().ok());
        let names: Vec<_> = checks.iter().map(|check| check.name).collect();
        assert_eq!(
            names,
            [
                "kernel",
                "module",
                "signature",
                "dkms",
                "next-kernel",
                "parameters",
                "iommu",
                "vfio",
                "memlock",
                "write-combining",
                "device"
            ]
        );
        for check in &checks {
            assert!(
                check.verdict != Verdict::Fail || check.remedy.is_some(),
                "{check:?}"
            );
        }
        assert_eq!(checks[10].verdict, Verdict::Fail);
    }

    #[test]
    fn the_configuration_is_found_wherever_it_is() {
        const ALL: &str = "CONFIG_RUST=y\nCONFIG_VFIO_PCI_CORE=m\nCONFIG_DMA_SHARED_BUFFER=y\n\
                           CONFIG_PCI_P2PDMA=y\n";
        let root = tempfile::tempdir().unwrap();
        let doctor = Doctor::at(root.path());
        assert_eq!(doctor.kernel().verdict, Verdict::Skip);
        for path in &doctor.configs {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, ALL).unwrap();
            assert_eq!(doctor.kernel().verdict, Verdict::Ok, "{}", path.display());
            fs::remove_file(path).unwrap();
        }
        // The kernel's own configuration goes before a file.
        fs::write(&doctor.configs[0], ALL).unwrap();
        let plain = root.path().join("config");
        fs::write(&plain, "CONFIG_RUST=y\n").unwrap();
        let gzip = Command::new("gzip").arg("-c").arg(&plain).output().unwrap();
        fs::create_dir_all(doctor.own_config.parent().unwrap()).unwrap();
        fs::write(&doctor.own_config, gzip.stdout).unwrap();
        let check = doctor.kernel();
        assert_eq!(check.verdict, Verdict::Fail, "{check:?}");
        assert!(check.found.contains("CONFIG_VFIO_PCI_CORE"), "{check:?}");
    }

    #[test]
    fn parameters_that_are_dangerous_are_said() {
        let root = tempfile::tempdir().unwrap();
        let doctor = Doctor::at(root.path());
        assert_eq!(doctor.parameters().verdict, Verdict::Skip);
        let folder = root.path().join("sys/module/barlease_vfio_pci/parameters");
        fs::create_dir_all(&folder).unwrap();
        let put = |name: &str, value: &str| fs::write(folder.join(name), value).unwrap();
        put("msix_export", "auto\n");
        put("enable_sriov", "N\n");
        assert_eq!(doctor.parameters().found, "all as by default");
        put("enable_sriov", "Y\n");
        assert_eq!(doctor.parameters().found, "enable_sriov=Y");
        put("msix_export", "always\n");
        let check = doctor.parameters();
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.found.starts_with("msix_export=always: "), "{check:?}");
    }

    #[test]
    fn write_combining_is_real_where_the_kernel_lists_memory_types() {
        let root = tempfile::tempdir().unwrap();
        let verdict = || Doctor::at(root.path()).write_combining().verdict;
        assert_eq!(verdict(), Verdict::Skip);
        let folder = root.path().join("sys/kernel/debug/x86");
        fs::create_dir_all(&folder).unwrap();
        assert_eq!(verdict(), Verdict::Warn);
        fs::write(folder.join("pat_memtype_list"), "").unwrap();
        assert_eq!(verdict(), Verdict::Ok);
    }

    #[test]
    fn an_option_is_set_only_if_it_is_y_or_m() {
        let config = "CONFIG_RUST=y\nCONFIG_VFIO_PCI=m\n# CONFIG_X is not set\nCONFIG_RUSTY=n\n";
        assert!(has_option(config, "CONFIG_RUST"));
        assert!(has_option(config, "CONFIG_VFIO_PCI"));
        assert!(!has_option(config, "CONFIG_X"));
        assert!(!has_option(config, "CONFIG_RUSTY"));
    }
}
