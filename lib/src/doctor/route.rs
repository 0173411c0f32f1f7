//! Whether another device reaches the memory of a device, and by which way: the kernel's rules for
//! peer-to-peer DMA, as far as sysfs shows what they look at.
//!
//! Linux 7.2 and 7.3 (`drivers/pci/p2pdma.c`): devices below a common bridge reach each other by
//! that bridge, unless Access Control Services of a bridge on the way send what they say up to the
//! host. Then, and where no bridge is common, they need a processor or a host bridge that the
//! kernel trusts to pass it on.

use std::fs;
use std::path::PathBuf;

use super::Check;
use super::Doctor;
use super::fail;
use super::ok;
use super::skip;
use super::warn;
use crate::Bdf;
use crate::pci::Pci;

const NAME: &str = "p2p-route";

/// Host bridges that the kernel trusts: vendor, device (`None`: all), and whether only between
/// devices behind the same one. Those of Linux 7.2 and 7.3.
const TRUSTED: &[(u16, Option<u16>, bool)] = &[
    (0x8086, Some(0x3c00), true),
    (0x8086, Some(0x3c01), true),
    (0x8086, Some(0x2f00), true),
    (0x8086, Some(0x2f01), true),
    (0x8086, Some(0x2030), false),
    (0x8086, Some(0x2031), false),
    (0x8086, Some(0x2032), false),
    (0x8086, Some(0x2033), false),
    (0x8086, Some(0x2020), false),
    (0x8086, Some(0x09a2), false),
    (0x8086, Some(0x0b25), false),
    (0x8086, Some(0x0cfe), false),
    (0x8086, Some(0x11fb), false),
    (0x8086, Some(0x1212), false),
    (0x8086, Some(0x1216), false),
    (0x8086, Some(0x4940), false),
    (0x8086, Some(0x4942), false),
    (0x8086, Some(0x4944), false),
    (0x8086, Some(0x4946), false),
    (0x8086, Some(0x4948), false),
    (0x1ae0, None, false),
    // From 7.3 on.
    (0x10de, Some(0x2f95), false),
    (0x10de, Some(0x2f96), false),
    (0x10de, Some(0x2f97), false),
    (0x10de, Some(0x2f98), false),
];

/// Access Control Services, an extended capability: its id, its control register, and the bits by
/// which requests, completions and egress go up.
const ACS: u16 = 0x0d;
const CONTROL: usize = 6;
const REDIRECTS: u16 = 1 << 2 | 1 << 3 | 1 << 5;
/// Extended capabilities, each of 4 bytes at least.
const FIRST: usize = 0x100;
const MOST: usize = (0x1000 - FIRST) / 4;

/// Where a device is: its host bridge, and the bridges and the device below it.
struct Place {
    host: String,
    path: Vec<Bdf>,
}

impl Doctor {
    /// Checks whether `importer` can reach leases of `exporter`.
    #[must_use]
    pub fn examine_route(&self, exporter: Bdf, importer: Bdf) -> Vec<Check> {
        let pci = Pci::at(&self.sysfs);
        for bdf in [exporter, importer] {
            if let Err(error) = pci.device(bdf) {
                return vec![fail(
                    NAME,
                    error.to_string(),
                    "`barlease device` lists them",
                )];
            }
        }
        let (Some(from), Some(to)) = (self.place(exporter), self.place(importer)) else {
            return vec![skip(NAME, "sysfs does not say where the devices are")];
        };
        vec![self.route(&from, &to), self.translation(&pci, importer)]
    }

    fn place(&self, bdf: Bdf) -> Option<Place> {
        let path = fs::canonicalize(self.device_file(bdf, "")).ok()?;
        let parts = path.iter().filter_map(|part| part.to_str());
        let mut parts = parts.skip_while(|part| !part.starts_with("pci"));
        Some(Place {
            host: parts.next()?.to_owned(),
            path: parts.map_while(|part| part.parse().ok()).collect(),
        })
    }

    fn route(&self, from: &Place, to: &Place) -> Check {
        let common = from.path.iter().zip(&to.path).take_while(|(a, b)| a == b);
        let count = if from.host == to.host {
            common.count()
        } else {
            0
        };
        let through_host = |reason: String| self.host(from, to, &reason);
        let Some(bridge) = count.checked_sub(1).and_then(|at| from.path.get(at)) else {
            return through_host("no bridge is above both".to_owned());
        };
        if count == from.path.len() && count == to.path.len() {
            return ok(NAME, "it is the same device");
        }
        // That of the common bridge itself counts.
        let below = from
            .path
            .iter()
            .skip(count - 1)
            .chain(to.path.iter().skip(count));
        let mut unknown = Vec::new();
        for bdf in below {
            match self.redirects(*bdf) {
                Some(true) => {
                    return through_host(format!(
                        "{bridge} is above both, and ACS of {bdf} sends what they say up to the host"
                    ));
                }
                Some(false) => {}
                None => unknown.push(bdf.to_string()),
            }
        }
        if !unknown.is_empty() {
            return skip(
                NAME,
                format!(
                    "{bridge} is above both; root can see whether ACS of {} sends what they say up",
                    unknown.join(" ")
                ),
            );
        }
        warn(
            NAME,
            format!(
                "{bridge} is above both and passes it on by addresses of the bus: no IOMMU stops a \
                 device that goes on after its lease was revoked"
            ),
            "boot without pci=disable_acs_redir=, so that ACS sends it through the IOMMU; or import \
             with drivers that are trusted to stop",
        )
    }

    /// Through the root complex, for this reason.
    fn host(&self, from: &Place, to: &Place, reason: &str) -> Check {
        let same = from.host == to.host;
        let between = if same {
            format!("through the host bridge {}", from.host)
        } else {
            format!("between the host bridges {} and {}", from.host, to.host)
        };
        if self.is_zen() {
            return ok(
                NAME,
                format!("{between}, as any AMD Zen passes it on: {reason}"),
            );
        }
        let hosts = if same { vec![from] } else { vec![from, to] };
        for place in hosts {
            let bridge = self.host_device(&place.host);
            let entry = bridge.and_then(|(vendor, device)| {
                TRUSTED
                    .iter()
                    .find(|(its, id, _)| *its == vendor && id.is_none_or(|id| id == device))
            });
            let (vendor, device) = bridge.unwrap_or_default();
            match entry {
                Some((.., only_same)) if same || !only_same => {}
                Some(_) => {
                    return fail(
                        NAME,
                        format!(
                            "{between}: the kernel trusts {vendor:04x}:{device:04x} between devices \
                             behind the same one only"
                        ),
                        "put both cards behind the same host bridge: into slots of the same socket",
                    );
                }
                None => {
                    return fail(
                        NAME,
                        format!(
                            "{between}: {reason}, and {vendor:04x}:{device:04x} of {} is not among the \
                             host bridges that the kernel trusts to pass it on",
                            place.host
                        ),
                        "put both cards behind one PCIe switch, or into a machine with AMD Zen or a \
                         server processor of Intel's",
                    );
                }
            }
        }
        ok(
            NAME,
            format!("{between}, which the kernel trusts: {reason}"),
        )
    }

    /// Vendor and device of what stands for a host bridge: function 0 of its bus, or its first
    /// root port.
    fn host_device(&self, host: &str) -> Option<(u16, u16)> {
        let bus = host.strip_prefix("pci")?;
        let devices = fs::read_dir(self.sysfs.join("bus/pci/devices")).ok()?;
        let names = devices.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names
            .filter(|name| name.strip_prefix(bus).is_some_and(|it| it.starts_with(':')))
            .collect();
        names.sort_unstable();
        let device = Pci::at(&self.sysfs)
            .device(names.first()?.parse().ok()?)
            .ok()?;
        let is_port = device.class >> 8 == 0x0604;
        let stands = is_port || names.first()?.ends_with(":00.0");
        stands.then_some((device.vendor, device.device))
    }

    /// Whether a function sends what is said between devices below it up to the host. `None`: only
    /// root may see it.
    fn redirects(&self, bdf: Bdf) -> Option<bool> {
        let config = fs::read(self.device_file(bdf, "config")).ok()?;
        let half = |at: usize| Some(u16::from_le_bytes([*config.get(at)?, *config.get(at + 1)?]));
        if config.len() <= 64 {
            return None;
        }
        let mut at = FIRST;
        for _ in 0..MOST {
            // Conventional PCI has none.
            let (Some(id), Some(next)) = (half(at), half(at + 2)) else {
                return Some(false);
            };
            if id == ACS {
                return Some(half(at + CONTROL)? & REDIRECTS != 0);
            }
            at = usize::from(next >> 4) & !0b11;
            if at < FIRST || id == u16::MAX {
                return Some(false);
            }
        }
        Some(false)
    }

    fn is_zen(&self) -> bool {
        let text = fs::read_to_string(&self.cpuinfo).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.map(|rest| rest.trim_start_matches(['\t', ' ', ':']).trim().to_owned())
        };
        let family = field("cpu family").and_then(|it| it.parse::<u32>().ok());
        field("vendor_id").as_deref() == Some("AuthenticAMD") && family >= Some(0x17)
    }

    /// A revocation stops what an IOMMU translates.
    fn translation(&self, pci: &Pci, importer: Bdf) -> Check {
        const NAME: &str = "p2p-translation";
        let group = pci.device(importer).ok().and_then(|it| it.iommu_group);
        let Some(group) = group else {
            return warn(
                NAME,
                format!("{importer} is in no IOMMU group: nothing stops its DMA but its driver"),
                "turn the IOMMU on: in the firmware, and on Intel with intel_iommu=on",
            );
        };
        let path: PathBuf = self.sysfs.join(format!("kernel/iommu_groups/{group}/type"));
        match fs::read_to_string(&path).unwrap_or_default().trim() {
            "" => skip(NAME, format!("{} cannot be read", path.display())),
            "identity" => warn(
                NAME,
                format!("the DMA of {importer} is not translated: nothing stops it but its driver"),
                &format!(
                    "boot without iommu=pt; or unbind {importer} and: echo DMA > {}",
                    path.display()
                ),
            ),
            kind => ok(
                NAME,
                format!("the DMA of {importer} is translated ({kind})"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::super::Verdict;
    use super::*;

    const INTEL: &str = "vendor_id\t: GenuineIntel\ncpu family\t: 6\n";

    /// A machine below a folder.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new(cpu: &str) -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            machine.put(Path::new("proc/cpuinfo"), cpu.as_bytes());
            machine
        }

        fn put(&self, path: &Path, bytes: &[u8]) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }

        /// Adds what the path leads to: `pci0000:00/0000:00:01.0/0000:01:00.0`.
        fn add(&self, path: &str, id: (u16, u16), class: u32, acs: Option<u16>) {
            let folder = Path::new("sys/devices").join(path);
            self.put(
                &folder.join("vendor"),
                format!("0x{:04x}\n", id.0).as_bytes(),
            );
            self.put(
                &folder.join("device"),
                format!("0x{:04x}\n", id.1).as_bytes(),
            );
            self.put(&folder.join("class"), format!("0x{class:06x}\n").as_bytes());
            let mut config = vec![0; 4096];
            // A capability of another kind comes before.
            config[0x100..0x104].copy_from_slice(&[1, 0, 1, 0x14]);
            if let Some(control) = acs {
                config[0x140] = 0x0d;
                config[0x146..0x148].copy_from_slice(&control.to_le_bytes());
            }
            self.put(&folder.join("config"), &config);
            let devices = self.0.path().join("sys/bus/pci/devices");
            fs::create_dir_all(&devices).unwrap();
            let name = path.rsplit('/').next().unwrap();
            symlink(self.0.path().join(&folder), devices.join(name)).unwrap();
        }

        fn route(&self, from: &str, to: &str) -> (Verdict, String) {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let checks = Doctor::at(self.0.path()).examine_route(from, to);
            (checks[0].verdict, checks[0].found.clone())
        }
    }

    /// A switch with two cards, and a card at a port of its own. `acs`: of the switch's ports.
    fn switch(cpu: &str, host: (u16, u16), acs: u16) -> Machine {
        let machine = Machine::new(cpu);
        let card = (0x1af4, 0x1110);
        let port = (0x104c, 0x8232);
        machine.add("pci0000:00/0000:00:00.0", host, 0x06_0000, None);
        machine.add("pci0000:00/0000:00:01.0", port, 0x06_0400, Some(0));
        let top = "pci0000:00/0000:00:01.0/0000:01:00.0";
        machine.add(top, port, 0x06_0400, None);
        for (n, bus) in [(0, "03"), (1, "04")] {
            let down = format!("{top}/0000:02:0{n}.0");
            machine.add(&down, port, 0x06_0400, Some(acs));
            machine.add(&format!("{down}/0000:{bus}:00.0"), card, 0x05_0000, None);
        }
        machine.add("pci0000:00/0000:00:02.0", port, 0x06_0400, Some(0x1d));
        machine.add(
            "pci0000:00/0000:00:02.0/0000:05:00.0",
            card,
            0x05_0000,
            None,
        );
        machine.add("pci0000:40/0000:40:00.0", host, 0x06_0000, None);
        machine.add("pci0000:40/0000:40:01.0", card, 0x05_0000, None);
        machine
    }

    #[test]
    fn a_switch_passes_on_what_acs_does_not_send_up() {
        let machine = switch(INTEL, (0x8086, 0x29c0), 0);
        let (verdict, found) = machine.route("03:00.0", "04:00.0");
        assert_eq!(verdict, Verdict::Warn, "{found}");
        assert!(
            found.starts_with("0000:01:00.0 is above both and passes"),
            "{found}"
        );
        assert_eq!(
            machine.route("03:00.0", "03:00.0").1,
            "it is the same device"
        );

        let machine = switch(INTEL, (0x8086, 0x29c0), 0x1d);
        let (verdict, found) = machine.route("03:00.0", "04:00.0");
        assert_eq!(verdict, Verdict::Fail, "{found}");
        for word in ["ACS of 0000:02:00.0", "8086:29c0", "pci0000:00"] {
            assert!(found.contains(word), "{found}");
        }
        let machine = switch(INTEL, (0x8086, 0x09a2), 0x1d);
        assert_eq!(machine.route("03:00.0", "04:00.0").0, Verdict::Ok);
    }

    #[test]
    fn host_bridges_pass_it_on_where_the_kernel_trusts_them() {
        for (cpu, host, near, far) in [
            (INTEL, (0x8086, 0x29c0), Verdict::Fail, Verdict::Fail),
            (INTEL, (0x8086, 0x3c00), Verdict::Ok, Verdict::Fail),
            (INTEL, (0x8086, 0x2020), Verdict::Ok, Verdict::Ok),
            (INTEL, (0x1ae0, 0x1234), Verdict::Ok, Verdict::Ok),
            (
                "vendor_id\t: AuthenticAMD\ncpu family\t: 23\n",
                (0x1022, 0x1450),
                Verdict::Ok,
                Verdict::Ok,
            ),
            (
                "vendor_id\t: AuthenticAMD\ncpu family\t: 22\n",
                (0x1022, 0x1450),
                Verdict::Fail,
                Verdict::Fail,
            ),
        ] {
            let machine = switch(cpu, host, 0);
            let (verdict, found) = machine.route("03:00.0", "05:00.0");
            assert_eq!(verdict, near, "{host:x?}: {found}");
            let (verdict, found) = machine.route("40:01.0", "05:00.0");
            assert_eq!(verdict, far, "{host:x?}: {found}");
        }
    }

    #[test]
    fn what_only_root_sees_is_not_guessed() {
        let machine = switch(INTEL, (0x8086, 0x29c0), 0);
        let config = "sys/bus/pci/devices/0000:02:01.0/config";
        machine.put(Path::new(config), &[0; 64]);
        let (verdict, found) = machine.route("03:00.0", "04:00.0");
        assert_eq!(verdict, Verdict::Skip);
        assert!(found.contains("root can see"), "{found}");
        let (verdict, _) = machine.route("03:00.0", "06:00.0");
        assert_eq!(verdict, Verdict::Fail);
    }

    #[test]
    fn dma_that_is_not_translated_is_said() {
        let machine = switch(INTEL, (0x8086, 0x2020), 0);
        let bdf: Bdf = "05:00.0".parse().unwrap();
        let check = || {
            Doctor::at(machine.0.path())
                .examine_route(bdf, bdf)
                .remove(1)
        };
        assert_eq!(check().verdict, Verdict::Warn);
        let root = machine.0.path();
        let group = root.join("sys/kernel/iommu_groups/7");
        fs::create_dir_all(&group).unwrap();
        let link = root.join("sys/bus/pci/devices/0000:05:00.0/iommu_group");
        symlink(&group, link).unwrap();
        assert_eq!(check().verdict, Verdict::Skip);
        fs::write(group.join("type"), "identity\n").unwrap();
        assert!(check().found.contains("not translated"));
        fs::write(group.join("type"), "DMA-FQ\n").unwrap();
        assert_eq!(check().verdict, Verdict::Ok);
    }
}
