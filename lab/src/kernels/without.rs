//! Kernels without something that all of Debian's have: the module must build and serve there, too.
//!
//! They are built as the debug kernels are, from the same options without what watches, and from
//! scratch: an option that is off is off in all of the kernel, which no module can play.

use crate::packages::arch::Arch;

/// The lack of a kernel of the lab's own making.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Without {
    /// No `CONFIG_PCI_P2PDMA`, so no dma-bufs of the stock driver's either.
    PeerToPeer,
    /// No `CONFIG_PM`: devices have no power management at all.
    PowerManagement,
    /// `CONFIG_PM`, but no `CONFIG_PM_SLEEP`: devices sleep, the system does not.
    Sleep,
    /// None of these.
    All,
    /// 64-bit ARM with no pages below 64 KiB.
    SmallPages,
}

/// Options that the machine of the lab's x86-64 guests needs, and no other has.
const OF_X86: &[&str] = &[
    "64BIT",
    "ACPI",
    "CPU_SUP_AMD",
    "CPU_SUP_INTEL",
    "HYPERVISOR_GUEST",
    "INTEL_IOMMU",
    "INTEL_IOMMU_DEFAULT_ON",
    "IRQ_REMAP",
    "KVM_GUEST",
    "MTRR",
    "PCI_MMCONFIG",
    "PNP",
    "PVH",
    "SERIAL_8250_PNP",
    "UNWINDER_ORC",
    "VGA_ARB",
    "X86_MSR",
    "X86_PAT",
    "X86_X2APIC",
    "CPU_MITIGATIONS",
];

/// Options that guests of tests do without: the build takes half as long.
const UNUSED: &[&str] = &[
    "9P_FS",
    "AIO",
    "BLK_DEV",
    "BLK_DEV_NVME",
    "BLOCK",
    "INET",
    "IO_URING",
    "NETWORK_FILESYSTEMS",
    "NET_9P",
    "NET_9P_VIRTIO",
    "VIRTIO",
    "VIRTIO_MENU",
    "VIRTIO_PCI",
];

impl Without {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::PeerToPeer,
        Self::PowerManagement,
        Self::Sleep,
        Self::All,
        Self::SmallPages,
    ];

    /// The name of such kernels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PeerToPeer => "no-p2pdma",
            Self::PowerManagement => "no-pm",
            Self::Sleep => "no-sleep",
            Self::All => "minimal",
            Self::SmallPages => "arm64-64k",
        }
    }

    /// A short description.
    #[must_use]
    pub fn means(self) -> &'static str {
        match self {
            Self::PeerToPeer => "without peer-to-peer DMA",
            Self::PowerManagement => "without power management",
            Self::Sleep => "without system sleep",
            Self::All => "without peer-to-peer DMA and power management",
            Self::SmallPages => "for 64-bit ARM with pages of 64 KiB",
        }
    }

    /// The architecture.
    #[must_use]
    pub fn arch(self) -> Arch {
        match self {
            Self::SmallPages => Arch::Arm64,
            _ => Arch::Amd64,
        }
    }

    /// The options that are off.
    fn off(self) -> &'static [&'static str] {
        match self {
            Self::PeerToPeer => &["PCI_P2PDMA", "VFIO_PCI_DMABUF"],
            Self::PowerManagement => &["PM", "PM_SLEEP", "SUSPEND"],
            Self::Sleep => &["PM_SLEEP", "SUSPEND"],
            Self::All => &["PCI_P2PDMA", "VFIO_PCI_DMABUF", "PM", "PM_SLEEP", "SUSPEND"],
            Self::SmallPages => &[],
        }
    }

    /// The options of the kernel, from those of one that has everything.
    pub(crate) fn options(self, base: &str) -> [String; 2] {
        let local = format!("\"-{}\"", self.name());
        let base = base.replace("\"-debug\"", &local);
        let of_machine = match self.arch() {
            Arch::Amd64 => &[][..],
            Arch::Arm64 => OF_X86,
        };
        let names = |line: &str, names: &[&str]| {
            let name = option_of(line);
            name.is_some_and(|name| names.contains(&name))
        };
        let kept = base.lines().filter(|line| {
            ![self.off(), of_machine, UNUSED]
                .iter()
                .any(|off| names(line, off))
        });
        let mut base: String = kept.flat_map(|line| [line, "\n"]).collect();
        let more = match self.arch() {
            Arch::Amd64 => String::new(),
            Arch::Arm64 => include_str!("../../debug/arm64-64k.config").to_owned(),
        };
        for name in self.off() {
            base += &format!("# CONFIG_{name} is not set\n");
        }
        [base, more]
    }
}

/// The option that a line of a configuration is about.
fn option_of(line: &str) -> Option<&str> {
    let line = line.strip_prefix("# ").unwrap_or(line);
    line.strip_prefix("CONFIG_")?.split(['=', ' ']).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "# Comment\nCONFIG_LOCALVERSION=\"-debug\"\nCONFIG_PM=y\nCONFIG_PM_SLEEP=y\nCONFIG_PM_OTHER=y\nCONFIG_MTRR=y\n# CONFIG_NUMA is not set\n";

    #[test]
    fn what_a_kernel_is_without_is_off_and_the_rest_stays() {
        let [options, more] = Without::Sleep.options(BASE);
        assert!(more.is_empty());
        let has = |line: &str| options.lines().any(|have| have == line);
        assert!(has("CONFIG_LOCALVERSION=\"-no-sleep\""), "{options}");
        assert!(has("CONFIG_PM=y") && has("CONFIG_PM_OTHER=y"), "{options}");
        assert!(has("# CONFIG_PM_SLEEP is not set"), "{options}");
        assert!(!has("CONFIG_PM_SLEEP=y") && has("# CONFIG_NUMA is not set"));
        let [options, _] = Without::PowerManagement.options(BASE);
        assert!(!options.contains("CONFIG_PM=y"), "{options}");
        assert!(options.contains("CONFIG_PM_OTHER=y"), "{options}");
    }

    #[test]
    fn another_machine_has_nothing_of_this_ones() {
        let [options, more] = Without::SmallPages.options(BASE);
        assert!(!options.contains("MTRR"), "{options}");
        assert!(more.contains("CONFIG_ARM64_64K_PAGES=y"));
    }
}
