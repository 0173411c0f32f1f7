//! The host's uses of a device, which would be lost if its driver were taken away.

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use barlease::Bdf;

/// Of class codes.
const BRIDGES: &str = "0x06";

/// Where to look.
pub(crate) struct Host {
    pub(crate) sysfs: PathBuf,
    pub(crate) proc: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            sysfs: "/sys".into(),
            proc: "/proc".into(),
        }
    }
}

impl Host {
    /// Each use, named. Empty: none is known.
    pub(crate) fn uses(&self, bdf: Bdf) -> Vec<String> {
        let path = self.sysfs.join("bus/pci/devices").join(bdf.to_string());
        let Ok(device) = fs::canonicalize(&path) else {
            return Vec::new();
        };
        let mut uses = Vec::new();
        if text(&device.join("class")).starts_with(BRIDGES) {
            uses.push("it is a bridge".to_owned());
        }
        for (name, _) in self.of_class("block", &device) {
            self.block(&name, &mut uses);
        }
        for (name, path) in self.of_class("net", &device) {
            let flags = text(&path.join("flags"));
            let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap_or(0);
            // IFF_UP
            if flags & 1 != 0 {
                uses.push(format!("the network interface {name} is up"));
            }
        }
        let vfs = text(&path.join("sriov_numvfs"));
        if !matches!(&*vfs, "" | "0") {
            uses.push(format!("it has {vfs} virtual functions"));
        }
        uses.sort();
        uses.dedup();
        uses
    }

    /// Ends its virtual functions, if it has any, as far as its driver lets that be. How many.
    ///
    /// A vfio driver that is unbound ends them too, but without the kernel's lock of rescans
    /// (`vfio_pci_core_unregister_device`, Linux 7.3), of which lockdep warns.
    pub(crate) fn end_functions(&self, bdf: Bdf) -> u32 {
        let number = self.functions(bdf);
        let count = text(&number).parse().unwrap_or(0);
        if count > 0 {
            log::debug!("write \"0\" to {}", number.display());
            // Functions that are left then end with the driver.
            let _ = fs::write(number, "0");
        }
        count
    }

    /// Makes virtual functions again that were ended.
    pub(crate) fn make_functions(&self, bdf: Bdf, count: u32) -> io::Result<()> {
        let number = self.functions(bdf);
        log::debug!("write \"{count}\" to {}", number.display());
        fs::write(number, count.to_string())
    }

    fn functions(&self, bdf: Bdf) -> PathBuf {
        let path = self.sysfs.join("bus/pci/devices").join(bdf.to_string());
        path.join("sriov_numvfs")
    }

    /// The entries of a class that are of the device.
    fn of_class(&self, class: &str, device: &Path) -> Vec<(String, PathBuf)> {
        let entries = fs::read_dir(self.sysfs.join("class").join(class));
        let entries = entries.into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let path = fs::canonicalize(entry.path()).ok()?;
                let name = entry.file_name().into_string().ok()?;
                path.starts_with(device).then_some((name, path))
            })
            .collect()
    }

    /// Of a disk or a partition, and of what is made of it, as a volume of LVM.
    fn block(&self, name: &str, uses: &mut Vec<String>) {
        let path = self.sysfs.join("class/block").join(name);
        let number = text(&path.join("dev"));
        let node = format!("/dev/{name}");
        for line in text(&self.proc.join("self/mountinfo")).lines() {
            let mut fields = line.split(' ');
            let (its, place) = (fields.nth(2), fields.nth(1));
            // Some file systems have numbers of their own, and name what they are on.
            let source = line.split(" - ").nth(1).and_then(|it| it.split(' ').nth(1));
            if its == Some(number.as_str()) || source == Some(node.as_str()) {
                let place = place.unwrap_or("?");
                uses.push(format!("{name} is mounted at {place}"));
            }
        }
        let swaps = text(&self.proc.join("swaps"));
        if swaps
            .lines()
            .any(|line| line.split_whitespace().next() == Some(&node))
        {
            uses.push(format!("{name} is swap"));
        }
        let holders = fs::read_dir(path.join("holders"));
        for holder in holders.into_iter().flatten().flatten() {
            let Ok(holder) = holder.file_name().into_string() else {
                continue;
            };
            uses.push(format!("{holder} is made of {name}"));
            self.block(&holder, uses);
        }
    }
}

fn text(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn put(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn each_use_is_named() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let host = Host {
            sysfs: at("sys"),
            proc: at("proc"),
        };
        let bdf = "00:05.0".parse().unwrap();
        let device = "sys/devices/pci0000:00/0000:00:05.0";
        put(at(device).join("nvme/nvme0/nvme0n1/dev"), "259:0\n");
        put(at(device).join("nvme/nvme0/nvme0n1/holders/dm-0/x"), "");
        put(at(device).join("net/eth0/flags"), "0x1002\n");
        put(at(device).join("sriov_numvfs"), "0\n");
        put(at("sys/devices/virtual/block/dm-0/dev"), "253:0\n");
        for folder in ["bus/pci/devices", "class/block", "class/net"] {
            fs::create_dir_all(at("sys").join(folder)).unwrap();
        }
        symlink(at(device), at("sys/bus/pci/devices/0000:00:05.0")).unwrap();
        let disk = at(device).join("nvme/nvme0/nvme0n1");
        symlink(disk, at("sys/class/block/nvme0n1")).unwrap();
        let volume = at("sys/devices/virtual/block/dm-0");
        symlink(volume, at("sys/class/block/dm-0")).unwrap();
        symlink(at(device).join("net/eth0"), at("sys/class/net/eth0")).unwrap();
        put(
            at("proc/self/mountinfo"),
            "22 1 259:9 / /other rw - ext4 /dev/sda1 rw\n",
        );
        assert_eq!(host.uses(bdf), ["dm-0 is made of nvme0n1"]);

        put(
            at("proc/self/mountinfo"),
            "22 1 253:0 / /home rw - ext4 /dev/mapper/home rw\n\
             23 1 0:30 / /data rw - btrfs /dev/nvme0n1 rw\n",
        );
        put(
            at("proc/swaps"),
            "Filename Type\n/dev/nvme0n1 partition 1 0 -2\n",
        );
        put(at(device).join("net/eth0/flags"), "0x1003\n");
        put(at(device).join("sriov_numvfs"), "2\n");
        assert_eq!(
            host.uses(bdf),
            [
                "dm-0 is made of nvme0n1",
                "dm-0 is mounted at /home",
                "it has 2 virtual functions",
                "nvme0n1 is mounted at /data",
                "nvme0n1 is swap",
                "the network interface eth0 is up",
            ]
        );
        assert_eq!(host.end_functions(bdf), 2);
        assert_eq!(text(&at(device).join("sriov_numvfs")), "0");
        host.make_functions(bdf, 2).unwrap();
        assert_eq!(text(&at(device).join("sriov_numvfs")), "2");
        assert!(host.uses("00:06.0".parse().unwrap()).is_empty());
    }
}
