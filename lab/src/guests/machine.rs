//! Machines: which devices a guest has, and at which addresses.

use barlease_device::Options;
use serde::Serialize;

/// A machine to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Memory in MiB.
    pub memory: u32,
    /// Number of processors.
    pub processors: u32,
    /// Words added to the kernel's command line.
    pub append: Vec<String>,
    /// Stock modules that are put into the guest and loaded, besides those of VFIO.
    pub modules: Vec<String>,
    /// The same, where the kernel and the processor have them.
    pub wanted: Vec<String>,
    /// QEMU's arguments for the machine itself.
    #[serde(skip)]
    pub arguments: Vec<String>,
    /// Whether the guest's kernel itself looks after slots, and not its firmware.
    pub native_ports: bool,
    /// Whether BARs are below 4 GiB, as far as the emulator can be told: edu reaches no further.
    pub low_memory: bool,
    /// The devices.
    pub devices: Vec<Device>,
}

/// A device of a machine, or a bridge for others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name in the guest and its QEMU id.
    pub name: String,
    /// Its full PCI address in the guest; `None` for a bridge.
    pub bdf: Option<String>,
    /// Its purpose.
    pub about: String,
    /// QEMU's arguments for it.
    #[serde(skip)]
    pub arguments: Vec<String>,
    /// Its properties, when it is served by us.
    #[serde(skip)]
    pub served: Option<Options>,
}

impl Device {
    /// An endpoint with its QEMU device description, such as `edu,bus=pcie.0,addr=06`. The id is
    /// added.
    #[must_use]
    pub fn new(name: &str, bdf: &str, about: &str, device: &str) -> Self {
        Self {
            name: name.to_owned(),
            bdf: Some(bdf.to_owned()),
            about: about.to_owned(),
            arguments: vec!["-device".to_owned(), format!("{device},id={name}")],
            served: None,
        }
    }

    /// The placeholder of its server's address in the arguments of a device that is served.
    pub(crate) const SOCKET: &str = "\"SOCKET\"";

    /// An endpoint of our own, alone behind the root port `bus`.
    #[must_use]
    pub fn served(name: &str, bdf: &str, about: &str, bus: &str, options: Options) -> Self {
        let socket = Self::SOCKET;
        let device = format!(
            r#"{{"driver":"vfio-user-pci","id":"{name}","bus":"{bus}","addr":"00.0","socket":{socket}}}"#
        );
        Self {
            name: name.to_owned(),
            bdf: Some(bdf.to_owned()),
            about: about.to_owned(),
            arguments: vec!["-device".to_owned(), device],
            served: Some(options),
        }
    }

    /// A root port in a slot of the root bus. The first has bus 1 behind it, the next bus 2, and so
    /// on.
    ///
    /// Only with a link speed does QEMU's port carry out a bus reset.
    #[must_use]
    pub fn root_port(name: &str, slot: u8) -> Self {
        let port = format!(
            "pcie-root-port,id={name},bus=pcie.0,addr={slot:02x},chassis={slot},slot={slot},x-speed=5"
        );
        Self {
            name: name.to_owned(),
            bdf: None,
            about: "root port".to_owned(),
            arguments: vec!["-device".to_owned(), port],
            served: None,
        }
    }

    /// Adds arguments before those of the device, such as a back end.
    #[must_use]
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments.splice(
            0..0,
            arguments.iter().map(|argument| (*argument).to_owned()),
        );
        self
    }

    /// Shared memory as BAR2, of so many MiB.
    #[must_use]
    pub fn memory(name: &str, bdf: &str, about: &str, mib: u32, place: &str) -> Self {
        let backend =
            format!("memory-backend-memfd,id={name}-memory,size={mib}M,share=on,reserve=off");
        Self::new(
            name,
            bdf,
            about,
            &format!("ivshmem-plain,memdev={name}-memory,{place}"),
        )
        .with(&["-object", &backend])
    }
}

impl Machine {
    /// A machine with these devices, and otherwise what guest tests use.
    #[must_use]
    pub fn new(devices: Vec<Device>) -> Self {
        Self {
            memory: 1024,
            processors: 2,
            append: Vec::new(),
            modules: Vec::new(),
            wanted: Vec::new(),
            arguments: Vec::new(),
            native_ports: false,
            low_memory: false,
            devices,
        }
    }

    /// The same with ports that the kernel itself looks after.
    pub(super) fn with_native_ports(devices: Vec<Device>) -> Self {
        Self {
            // A kernel without ASPM does not ask the firmware for ports.
            append: vec!["pcie_ports=native".to_owned()],
            native_ports: true,
            ..Self::new(devices)
        }
    }

    /// Lines `BDF NAME TEXT`, as the guest reads them.
    #[must_use]
    pub fn describe(&self) -> String {
        let line = |device: &Device| {
            Some(format!(
                "{} {} {}\n",
                device.bdf.as_ref()?,
                device.name,
                device.about
            ))
        };
        self.devices.iter().filter_map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_ends_come_before_their_device() {
        let device = Device::memory("m", "0000:01:00.0", "", 16, "bus=rp1");
        assert_eq!(device.arguments[0], "-object");
        assert!(device.arguments[1].contains("id=m-memory,size=16M"));
        assert_eq!(
            device.arguments[3],
            "ivshmem-plain,memdev=m-memory,bus=rp1,id=m"
        );
    }
}
