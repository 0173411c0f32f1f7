//! Whether a device can be opened: the nodes, the group, the permission.

use std::fs;
use std::path::PathBuf;

use super::Check;
use super::Doctor;
use super::fail;
use super::has_option;
use super::ok;
use super::skip;
use super::warn;
use crate::device::permission_remedy;
use crate::pci::Pci;
use crate::pci::PciDevice;

impl Doctor {
    /// The ways to open a VFIO device.
    pub(super) fn nodes(&self) -> Check {
        const NAME: &str = "vfio";
        let group = self.dev.join("vfio/vfio").exists();
        let iommufd = self.dev.join("iommu").exists();
        let config = self.config().unwrap_or_default();
        // The folder comes with the first device that is bound.
        let cdev = has_option(&config, "CONFIG_VFIO_DEVICE_CDEV")
            || self.dev.join("vfio/devices").exists();
        match (group, iommufd && cdev) {
            (true, true) => ok(NAME, "character devices with iommufd, and groups"),
            (false, true) => ok(NAME, "character devices with iommufd"),
            (true, false) => ok(NAME, "groups and containers"),
            (false, false) if !config.is_empty() && !has_option(&config, "CONFIG_VFIO") => fail(
                NAME,
                "the kernel is built without CONFIG_VFIO",
                "boot a kernel of 7.2 or later that has it, such as Debian's",
            ),
            (false, false) => fail(
                NAME,
                "neither /dev/vfio/vfio nor character devices with /dev/iommu exist",
                "modprobe vfio_iommu_type1",
            ),
        }
    }

    pub(super) fn group(&self, pci: &Pci, device: &PciDevice) -> Check {
        let Some(group) = device.iommu_group else {
            return fail(
                "group",
                "the device is in no IOMMU group",
                "turn the IOMMU on: in the firmware, and on Intel with intel_iommu=on",
            );
        };
        let obstacles: Vec<String> = pci
            .group_obstacles(group)
            .into_iter()
            .filter(|other| other.bdf != device.bdf)
            .map(|other| other.bdf.to_string())
            .collect();
        let attribute = |name: &str| {
            let path = self
                .sysfs
                .join(format!("kernel/iommu_groups/{group}/{name}"));
            let text = fs::read_to_string(path).unwrap_or_default();
            text.trim().to_owned()
        };
        if attribute("name") == "vfio-noiommu" {
            return warn(
                "group",
                format!("group {group} is one without an IOMMU: its DMA reaches all memory"),
                "turn the IOMMU on, and vfio's enable_unsafe_noiommu_mode off",
            );
        }
        if obstacles.is_empty() {
            // That of the host's own driver. VFIO makes a domain of its own.
            let domain = match attribute("type").as_str() {
                "" => String::new(),
                kind => format!(" (domain type {kind})"),
            };
            return ok("group", format!("IOMMU group {group}{domain} is viable"));
        }
        let list = obstacles.join(" ");
        fail(
            "group",
            format!("IOMMU group {group} has devices in use by the host: {list}"),
            &format!("barlease device bind {list}"),
        )
    }

    /// Whether this user may open all that is opened for it.
    pub(super) fn permission(&self, device: &PciDevice) -> Check {
        const NAME: &str = "permission";
        let iommufd = self.dev.join("iommu");
        let cdev = device
            .vfio
            .as_ref()
            .map(|vfio| self.dev.join("vfio/devices").join(vfio));
        let cdev = cdev.filter(|node| node.exists() && iommufd.exists());
        let nodes: Vec<PathBuf> = match (cdev, device.iommu_group) {
            (Some(node), _) => vec![node, iommufd],
            (None, Some(group)) => {
                let folder = self.dev.join("vfio");
                vec![folder.join(group.to_string()), folder.join("vfio")]
            }
            (None, None) => return skip(NAME, "there is no device node"),
        };
        let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
        let shown: Vec<String> = nodes
            .iter()
            .map(|node| node.display().to_string())
            .collect();
        for node in &nodes {
            if !node.exists() {
                return skip(NAME, format!("{} does not exist", node.display()));
            }
            if rustix::fs::access(node, access).is_err() {
                let found = format!("{} cannot be opened", node.display());
                return fail(NAME, found, &permission_remedy(node));
            }
        }
        ok(NAME, format!("{} can be opened", shown.join(" and ")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_group_tells_its_domain_and_whether_there_is_an_iommu() {
        let root = tempfile::tempdir().unwrap();
        let sys = root.path().join("sys");
        let bdf = "00:05.0".parse().unwrap();
        let device = sys.join("bus/pci/devices/0000:00:05.0");
        let group = sys.join("kernel/iommu_groups/7");
        fs::create_dir_all(&device).unwrap();
        fs::create_dir_all(group.join("devices/0000:00:05.0")).unwrap();
        for (file, text) in [("vendor", "0x1af4\n"), ("device", "0x1110\n")] {
            fs::write(device.join(file), text).unwrap();
        }
        std::os::unix::fs::symlink(&group, device.join("iommu_group")).unwrap();
        fs::write(group.join("type"), "DMA-FQ\n").unwrap();
        let pci = Pci::at(&sys);
        let doctor = Doctor::at(root.path());
        let check = || doctor.group(&pci, &pci.device(bdf).unwrap());
        assert_eq!(
            check().found,
            "IOMMU group 7 (domain type DMA-FQ) is viable"
        );
        fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
        assert_eq!(check().verdict, Verdict::Warn);
    }

    #[test]
    fn character_devices_are_there_where_the_kernel_has_them() {
        let root = tempfile::tempdir().unwrap();
        let doctor = Doctor::at(root.path());
        let put = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(doctor.nodes().remedy.unwrap(), "modprobe vfio_iommu_type1");
        put(doctor.configs[0].clone(), "# CONFIG_VFIO is not set\n");
        assert!(doctor.nodes().found.contains("without CONFIG_VFIO"));
        // iommufd alone opens no device.
        put(doctor.dev.join("iommu"), "");
        put(doctor.configs[0].clone(), "CONFIG_VFIO=m\n");
        assert_eq!(doctor.nodes().verdict, Verdict::Fail);
        put(doctor.dev.join("vfio/vfio"), "");
        assert_eq!(doctor.nodes().found, "groups and containers");
        put(
            doctor.configs[0].clone(),
            "CONFIG_VFIO=m\nCONFIG_VFIO_DEVICE_CDEV=y\n",
        );
        assert_eq!(
            doctor.nodes().found,
            "character devices with iommufd, and groups"
        );
    }

    #[test]
    fn each_node_that_is_opened_is_looked_at() {
        let root = tempfile::tempdir().unwrap();
        let doctor = Doctor::at(root.path());
        let device = root.path().join("sys/bus/pci/devices/0000:00:05.0");
        let put = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put(device.join("vendor"), "0x1af4\n");
        put(device.join("device"), "0x1110\n");
        put(device.join("vfio-dev/vfio0/dev"), "");
        let pci = Pci::at(root.path().join("sys"));
        let check = || doctor.permission(&pci.device("00:05.0".parse().unwrap()).unwrap());
        assert_eq!(check().verdict, Verdict::Skip);
        put(doctor.dev.join("vfio/devices/vfio0"), "");
        assert_eq!(check().found, "there is no device node");
        put(doctor.dev.join("iommu"), "");
        let found = check().found;
        assert!(
            found.contains("vfio0 and ") && found.ends_with("iommu can be opened"),
            "{found}"
        );
    }
}
