//! Architectures: all that differs between a guest of the host's own and one of another
//! machine's.
//!
//! The tool chain and the emulator run on amd64. A guest of another architecture gets its kernel
//! from Debian, its modules and programs from cross compilers, and is always emulated.

use serde::{Deserialize, Serialize};

/// An architecture of guests, by Debian's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// x86-64.
    #[default]
    Amd64,
    /// 64-bit ARM.
    Arm64,
}

/// Names of the serial ports of a guest: `/dev/lab-payload` and `/dev/lab-control` are links
/// to them.
pub(crate) struct Ports {
    pub(crate) console: &'static str,
    pub(crate) payload: &'static str,
    pub(crate) control: &'static str,
}

impl Arch {
    /// Debian's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Whether its programs run on the host.
    #[must_use]
    pub fn is_native(self) -> bool {
        self == Self::Amd64
    }

    /// Rust's name for programs of it.
    #[must_use]
    pub fn rust_target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Arguments for the kernel's `make` to build for it.
    pub(crate) fn make_arguments(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &[],
            Self::Arm64 => &["ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-"],
        }
    }

    /// The folder of `arch/` in the kernel's source.
    pub(crate) fn source_folder(self) -> &'static str {
        match self {
            Self::Amd64 => "x86",
            Self::Arm64 => "arm64",
        }
    }

    /// Packages of amd64 that compile for it and emulate it, besides the tool chain.
    pub(crate) fn tools(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &[],
            Self::Arm64 => &[
                "cargo",
                "gcc-aarch64-linux-gnu",
                "libc6-dev-arm64-cross",
                "qemu-system-arm",
            ],
        }
    }

    /// The emulator, in the tool chain.
    pub(crate) fn emulator(self) -> &'static str {
        match self {
            Self::Amd64 => "usr/bin/qemu-system-x86_64",
            Self::Arm64 => "usr/bin/qemu-system-aarch64",
        }
    }

    /// The emulator's arguments for a machine with an IOMMU in front of all devices.
    pub(crate) fn machine(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &[
                "-machine",
                "q35,kernel-irqchip=split",
                "-cpu",
                "EPYC",
                "-device",
                "intel-iommu,intremap=on,caching-mode=on",
            ],
            Self::Arm64 => &[
                "-machine",
                "virt,gic-version=3,iommu=smmuv3",
                "-cpu",
                "neoverse-n1",
            ],
        }
    }

    /// The emulator's arguments for the serial ports whose character devices have these names.
    pub(crate) fn serial_ports(self) -> &'static [&'static str] {
        match self {
            // The third port would share the first one's interrupt line.
            Self::Amd64 => &[
                "-device",
                "isa-serial,chardev=console,index=0",
                "-device",
                "isa-serial,chardev=payload,index=1",
                "-device",
                "isa-serial,chardev=control,index=2,irq=5",
            ],
            // The machine has two of its own. A guest that sleeps is woken by what comes from the
            // control channel, which a port on the PCI bus cannot do.
            Self::Arm64 => &[
                "-serial",
                "chardev:console",
                "-serial",
                "chardev:control",
                "-device",
                "pci-serial,chardev=payload,bus=pcie.0,addr=1d",
            ],
        }
    }

    /// The names that the guest's kernel has for these ports.
    pub(crate) fn ports(self) -> Ports {
        match self {
            Self::Amd64 => Ports {
                console: "ttyS0",
                payload: "ttyS1",
                control: "ttyS2",
            },
            Self::Arm64 => Ports {
                console: "ttyAMA0",
                payload: "ttyS0",
                control: "ttyAMA1",
            },
        }
    }

    /// Words of the kernel's command line: devices see memory through the IOMMU only, and what was
    /// unmapped is gone at once.
    pub(crate) fn command_line(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &[
                "intel_iommu=on",
                "iommu=nopt",
                // At boot the kernel waits ten ticks for the timer and panics when none came; an
                // emulator that does not get the processor for so long fails that.
                "no_timer_check",
            ],
            Self::Arm64 => &["iommu.passthrough=0", "iommu.strict=1"],
        }
    }

    /// The emulator's arguments for BARs below 4 GiB. The firmware of amd64 places small ones
    /// there.
    pub(crate) fn low_memory(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &[],
            Self::Arm64 => &["-machine", "highmem-mmio=off"],
        }
    }

    /// The emulator's arguments for slots that the guest's kernel itself looks after, not its
    /// firmware.
    pub(crate) fn native_ports(self) -> &'static [&'static str] {
        match self {
            // Else QEMU has ACPI look after slots, which takes a device away in order only.
            Self::Amd64 => &[
                "-global",
                "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
            ],
            Self::Arm64 => &[],
        }
    }
}
