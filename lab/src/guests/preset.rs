//! The machines of tests, demo and benchmarks.

use std::fmt;
use std::str::FromStr;

use anyhow::bail;
use barlease_device::Options;
use serde::Serialize;

use crate::guests::machine::{Device, Machine};

/// Machines that are ready to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// One display adapter: the demo.
    Display,
    /// One device of each kind that behaves in its own way: the tests.
    Full,
    /// The same with devices of our own, which say what reached them.
    Device,
    /// The same with a device that reports errors, and with slots that the kernel itself looks
    /// after.
    Ports,
    /// As `device`, with what `ports` has more.
    Random,
    /// As `full` without page attributes, so without write-combining, and without isolated
    /// interrupts.
    NoPat,
    /// The machine of the benchmarks. No device can be reset, so opening one does not wait for its
    /// reset.
    Bench,
    /// As `device`, with a kernel that keeps who has allocated what.
    Tracked,
    /// Two host bridges: devices with memory behind one of them, the importer behind the other; and
    /// a VGA adapter.
    Bridges,
    /// A switch with a device with memory and two importers below it, and another such device
    /// apart.
    Switch,
    /// As `full`, with drivers of the kernel's that use mappings and dma-bufs: KVM, vgem.
    Users,
}

impl Preset {
    /// All presets.
    pub const ALL: [Self; 11] = [
        Self::Display,
        Self::Full,
        Self::Device,
        Self::Ports,
        Self::Random,
        Self::NoPat,
        Self::Bench,
        Self::Tracked,
        Self::Bridges,
        Self::Switch,
        Self::Users,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Display => "display",
            Self::Full => "full",
            Self::Device => "device",
            Self::Ports => "ports",
            Self::Random => "random",
            Self::NoPat => "nopat",
            Self::Bench => "bench",
            Self::Tracked => "tracked",
            Self::Bridges => "bridges",
            Self::Switch => "switch",
            Self::Users => "users",
        }
    }

    /// The machine.
    #[must_use]
    pub fn machine(self) -> Machine {
        match self {
            Self::Display => Machine::new(vec![display()]),
            Self::Full => Machine::new(full()),
            Self::Device => Machine::new(own()),
            Self::Ports => Machine::with_native_ports(ports()),
            Self::Random => Machine::with_native_ports(random()),
            Self::NoPat => Machine {
                append: ["nopat", "intremap=off", "clearcpuid=pdpe1gb"]
                    .map(str::to_owned)
                    .into(),
                ..Machine::new(full())
            },
            Self::Bench => Machine {
                // Where the machine is busy, the kernel takes the clock of an emulated processor
                // for unstable, and changes to one that takes longer to read than what is measured.
                append: vec!["tsc=reliable".to_owned()],
                ..Machine::new(bench())
            },
            Self::Bridges => Machine::new(bridges()),
            Self::Switch => Machine {
                low_memory: true,
                ..Machine::new(switch())
            },
            Self::Users => Machine {
                wanted: ["kvm-amd", "vgem"].map(str::to_owned).into(),
                ..Machine::new(full())
            },
            Self::Tracked => Machine {
                // The lists that it makes of that need long pieces of memory.
                memory: 2048,
                append: vec!["slab_debug=U".to_owned()],
                ..Machine::new(own())
            },
        }
    }

    /// The machine that the tests in a binary are written for, by the name of the binary.
    #[must_use]
    pub fn of_tests(binary: &str) -> Self {
        // Cargo adds `-` and a hash.
        match binary.rsplit_once('-').map_or(binary, |(name, _)| name) {
            "command" | "door" | "splits" | "tph" | "witness" => Self::Device,
            "aer" | "driver" | "removal" => Self::Ports,
            "random" => Self::Random,
            "nopat" => Self::NoPat,
            "kernel_users" => Self::Users,
            "fault_injection" => Self::Tracked,
            "p2p_route" | "vga" => Self::Bridges,
            "p2p_switch" => Self::Switch,
            _ => Self::Full,
        }
    }
}

impl FromStr for Preset {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match Self::ALL.into_iter().find(|preset| preset.name() == name) {
            Some(preset) => Ok(preset),
            None => bail!(
                "no preset is called `{name}`: there are {}",
                Self::ALL.map(Self::name).join(", ")
            ),
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn display() -> Device {
    // Without the option ROM: nobody needs a text mode, and its emulation takes a while.
    let device = "bochs-display,bus=pcie.0,addr=02,vgamem=64M,romfile=";
    Device::new(
        "display",
        "0000:00:02.0",
        "bochs-display: BAR0 is the frame buffer, 64 MiB; BAR2 its registers",
        device,
    )
}

fn own() -> Vec<Device> {
    let trapped = Options {
        d1_d2: true,
        ..Options::default()
    };
    let mapped = Options {
        trapped: false,
        second_pm: true,
        ..trapped.clone()
    };
    let mut devices = full();
    devices.extend([
        Device::root_port("rp5", 10),
        Device::served(
            "trapped",
            "0000:05:00.0",
            "our own: BAR0 is 16 MiB of memory, every access to it is logged; steering tags, function-level reset, D1 and D2, MSI-X in BAR2",
            "rp5",
            trapped,
        ),
        Device::root_port("rp6", 11),
        Device::served(
            "mapped",
            "0000:06:00.0",
            "our own: as the other, with a BAR0 that is mapped and two power-management capabilities",
            "rp6",
            mapped,
        ),
    ]);
    devices
}

fn ports() -> Vec<Device> {
    let mut devices = full();
    devices.push(Device::root_port("rp5", 10));
    devices.extend(reporting("rp5", "0000:05:00"));
    devices.push(Device::root_port("rp6", 11));
    devices.push(card("rp6", "0000:06:00.0"));
    devices
}

fn random() -> Vec<Device> {
    let mut devices = own();
    devices.push(Device::root_port("rp7", 12));
    devices.extend(reporting("rp7", "0000:07:00"));
    // A reset of the bus behind a port with a slot is one of the slot, which takes the kernel's
    // locks in another order than a removal does. So only the card has one.
    for device in devices.iter_mut().filter(|device| device.bdf.is_none()) {
        let arguments = device.arguments.last_mut().expect("a port's arguments");
        arguments.push_str(",hotplug=off");
    }
    devices.push(Device::root_port("rp8", 13));
    devices.push(card("rp8", "0000:08:00.0"));
    devices
}

/// A device that reports errors, and its other function.
fn reporting(bus: &str, bdf: &str) -> [Device; 2] {
    [
        Device::new(
            "virtio",
            &format!("{bdf}.0"),
            "virtio-rng: BAR4 is 16 KiB of registers; Advanced Error Reporting, function-level reset",
            &format!("virtio-rng-pci,bus={bus},addr=00.0,multifunction=on,aer=on,rng=virtio-source"),
        )
        .with(&["-object", "rng-builtin,id=virtio-source"]),
        Device::new(
            "neighbour",
            &format!("{bdf}.1"),
            "virtio-rng: the other function of the device that reports errors; it reports none",
            &format!("virtio-rng-pci,bus={bus},addr=00.1,rng=virtio-source"),
        ),
    ]
}

/// A device to be pulled out. It takes the back end of those that report errors.
fn card(bus: &str, bdf: &str) -> Device {
    Device::new(
        "card",
        bdf,
        "virtio-rng: BAR4 is 16 KiB of registers; function-level reset; alone in a slot, so it can be pulled out",
        &format!("virtio-rng-pci,bus={bus},addr=00.0,rng=virtio-source"),
    )
}

fn edu() -> Device {
    edu_at("0000:00:06.0", "bus=pcie.0,addr=06")
}

fn edu_at(bdf: &str, place: &str) -> Device {
    let device = format!("edu,{place},dma_mask=0xffffffff");
    Device::new("edu", bdf, "edu: a DMA engine, 32 bits", &device)
}

/// The BARs are so small that they lie below 4 GiB, where the IOMMU looks for addresses first.
fn bridges() -> Vec<Device> {
    let bridge = |name: &str, device: &str| Device {
        bdf: None,
        ..Device::new(name, "", "bridge", device)
    };
    vec![
        Device::root_port("rp1", 3),
        Device::memory(
            "memory",
            "0000:01:00.0",
            "ivshmem: BAR2 is 64 MiB of memory; behind the first host bridge",
            64,
            "bus=rp1,addr=00.0",
        ),
        Device::root_port("rp2", 4),
        Device::memory(
            "filler",
            "0000:02:00.0",
            "ivshmem: BAR2 is 64 MiB of memory; behind the first host bridge",
            64,
            "bus=rp2,addr=00.0",
        ),
        bridge("second", "pxb-pcie,bus=pcie.0,addr=05,bus_nr=64"),
        bridge("rp3", "pcie-root-port,bus=second,addr=00,chassis=5,slot=5"),
        edu_at("0000:41:00.0", "bus=rp3,addr=00.0"),
        Device::new(
            "vga",
            "0000:00:06.0",
            "a display adapter that decodes VGA's own addresses",
            "VGA,bus=pcie.0,addr=06,romfile=",
        ),
    ]
}

/// QEMU's downstream ports have no ACS: they send from one to the other. Its root ports have
/// it, and do as well below an upstream port: the kernel goes by the capability.
fn switch() -> Vec<Device> {
    let port = |name: &str, device: &str| Device {
        bdf: None,
        ..Device::new(name, "", "port of a switch", device)
    };
    vec![
        Device::root_port("rp1", 3),
        port("up", "x3130-upstream,bus=rp1,addr=00"),
        port(
            "down1",
            "xio3130-downstream,bus=up,addr=00,chassis=21,slot=21",
        ),
        port(
            "down2",
            "xio3130-downstream,bus=up,addr=01,chassis=22,slot=22",
        ),
        Device::memory(
            "memory",
            "0000:03:00.0",
            "ivshmem: BAR2 is 64 MiB of memory; behind the switch",
            64,
            "bus=down1,addr=00.0",
        ),
        edu_at("0000:04:00.0", "bus=down2,addr=00.0"),
        port("down3", "pcie-root-port,bus=up,addr=02,chassis=23,slot=23"),
        Device::new(
            "isolated",
            "0000:05:00.0",
            "edu: a DMA engine, 32 bits; behind a port of the switch that has ACS",
            "edu,bus=down3,addr=00.0,dma_mask=0xffffffff",
        ),
        Device::root_port("rp2", 4),
        Device::memory(
            "apart",
            "0000:06:00.0",
            "ivshmem: BAR2 is 64 MiB of memory; not behind the switch",
            64,
            "bus=rp2,addr=00.0",
        ),
    ]
}

fn bench() -> Vec<Device> {
    vec![
        Device::memory(
            "memory",
            "0000:00:03.0",
            "ivshmem: BAR2 is 64 MiB of memory",
            64,
            "bus=pcie.0,addr=03",
        ),
        Device::memory(
            "big",
            "0000:00:04.0",
            "ivshmem: BAR2 is 1 GiB of memory",
            1024,
            "bus=pcie.0,addr=04",
        ),
        edu(),
        Device::new(
            "interrupts",
            "0000:00:07.0",
            "edu: raises its MSI when it is told to",
            "edu,bus=pcie.0,addr=07",
        ),
    ]
}

fn full() -> Vec<Device> {
    vec![
        display(),
        Device::root_port("rp1", 3),
        Device::memory(
            "memory",
            "0000:01:00.0",
            "ivshmem: BAR2 is 64 MiB of memory, BAR0 256 bytes; alone behind a root port, so it can be reset",
            64,
            "bus=rp1,addr=00.0",
        ),
        Device::root_port("rp2", 4),
        Device::memory(
            "pair0",
            "0000:02:00.0",
            "ivshmem: BAR2 is 16 MiB; one of two functions, so a hot reset hits both",
            16,
            "bus=rp2,addr=00.0,multifunction=on",
        ),
        Device::memory(
            "pair1",
            "0000:02:00.1",
            "ivshmem: the other function of the pair",
            16,
            "bus=rp2,addr=00.1",
        ),
        Device::new(
            "nvme",
            "0000:00:05.0",
            "NVMe: function-level reset, MSI-X, BAR2 is a controller memory buffer of 64 MiB",
            "nvme,bus=pcie.0,addr=05,serial=barlease,cmb_size_mb=64,drive=nvme-disk",
        )
        .with(&[
            "-blockdev",
            "driver=null-co,node-name=nvme-disk,size=67108864,read-zeroes=on",
        ]),
        edu(),
        Device::new(
            "testdev",
            "0000:00:07.0",
            "pci-testdev: BAR2 is 16 MiB of memory",
            "pci-testdev,bus=pcie.0,addr=07,membar=16M,membar-backed=on",
        ),
        Device::root_port("rp3", 8),
        Device::new(
            "igb",
            "0000:03:00.0",
            "igb: network adapter with function-level reset, MSI-X and SR-IOV",
            "igb,bus=rp3,addr=00.0,netdev=igb-net,romfile=",
        )
        .with(&["-netdev", "user,id=igb-net,restrict=on"]),
        Device::root_port("rp4", 9),
        Device::memory(
            "big",
            "0000:04:00.0",
            "ivshmem: BAR2 is 4 GiB",
            4096,
            "bus=rp4,addr=00.0",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_and_addresses_are_unique() {
        for preset in Preset::ALL {
            let devices = preset.machine().devices;
            let names: BTreeSet<_> = devices.iter().map(|device| &device.name).collect();
            assert_eq!(names.len(), devices.len(), "{preset}");
            let endpoints: Vec<_> = devices
                .iter()
                .filter_map(|device| device.bdf.as_ref())
                .collect();
            assert_eq!(
                endpoints.iter().collect::<BTreeSet<_>>().len(),
                endpoints.len(),
                "{preset}"
            );
        }
    }

    #[test]
    fn a_preset_is_found_by_name() {
        assert_eq!("full".parse::<Preset>().unwrap(), Preset::Full);
        let text = "fully".parse::<Preset>().unwrap_err().to_string();
        assert!(text.contains("display, full"), "{text}");
    }

    #[test]
    fn tests_are_run_on_the_machine_that_they_are_written_for() {
        assert_eq!(Preset::of_tests("witness-0f2a"), Preset::Device);
        assert_eq!(Preset::of_tests("witness"), Preset::Device);
        assert_eq!(Preset::of_tests("memory_type-0f2a"), Preset::Full);
        assert_eq!(Preset::of_tests("p2p_route-0f2a"), Preset::Bridges);
    }

    #[test]
    fn the_guest_reads_one_line_per_endpoint() {
        let text = Preset::Full.machine().describe();
        assert!(text.contains("0000:00:06.0 edu edu: a DMA engine"));
        assert!(!text.contains("rp1"));
    }
}
