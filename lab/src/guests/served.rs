//! Devices of our own in a guest: started with it, asked by it, gone with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use barlease_device::Server;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::guests::machine::{Device, Machine};

/// The devices that a machine has of us, each served by a thread.
#[derive(Debug)]
pub(crate) struct Served {
    servers: BTreeMap<String, Server>,
    /// Where QEMU says which accesses it kept from all devices.
    stray: PathBuf,
}

/// A request of the guest.
#[derive(Debug, Deserialize)]
struct Request {
    /// The device's name.
    name: String,
    /// For its server; or `{"stray":[FROM,TO]}`, answered with how many accesses to these physical
    /// addresses have reached no device.
    request: Value,
}

impl Served {
    /// Starts the servers of a machine's devices, with sockets and logs in `folder`.
    pub(crate) fn start(machine: &Machine, folder: &Path) -> Result<Self> {
        let served = Self {
            servers: BTreeMap::new(),
            stray: folder.join("stray.log"),
        };
        machine
            .devices
            .iter()
            .try_fold(served, |mut served, device| {
                if let Some(options) = &device.served {
                    let log = folder.join(format!("device-{}.jsonl", device.name));
                    let server = Server::start(&socket(folder, device), options, Some(&log))
                        .with_context(|| format!("serve the device {}", device.name))?;
                    served.servers.insert(device.name.clone(), server);
                }
                Ok(served)
            })
    }

    /// QEMU's arguments that all of them need.
    pub(crate) fn arguments(&self, machine: &Machine) -> Vec<String> {
        if self.servers.is_empty() {
            return Vec::new();
        }
        let memory = machine.memory;
        [
            "-object",
            // The memory that the guest shares with them is no copy.
            &format!("memory-backend-memfd,id=shared-memory,size={memory}M,share=on"),
            "-machine",
            "memory-backend=shared-memory",
            "-d",
            "invalid_mem",
            "-D",
            &self.stray.to_string_lossy(),
        ]
        .map(str::to_owned)
        .into()
    }

    /// Answers a request of the guest.
    pub(crate) fn answer(&self, request: &Value) -> Value {
        self.ask(request)
            .unwrap_or_else(|error| json!({"error": format!("{error:#}")}))
    }

    fn ask(&self, request: &Value) -> Result<Value> {
        let Request { name, request } =
            Request::deserialize(request).context("read the request to a device")?;
        let Some(server) = self.servers.get(&name) else {
            bail!("`{name}` is no device of our own");
        };
        if let Some(range) = request.get("stray") {
            let (from, to) = Deserialize::deserialize(range).context("read the range")?;
            return Ok(json!({"count": self.stray(from, to)?}));
        }
        serde_json::from_str(&server.ask(&request.to_string())).context("read the reply")
    }

    fn stray(&self, from: u64, to: u64) -> Result<usize> {
        if !self.stray.exists() {
            // QEMU makes it with the first line.
            return Ok(0);
        }
        let text = fs::read_to_string(&self.stray).context("read QEMU's log")?;
        let addresses = text.lines().filter_map(stray_address);
        Ok(addresses
            .filter(|address| (from..to).contains(address))
            .count())
    }
}

/// `Invalid write at addr 0xFE000000, size 4, region '(null)', reason: rejected`
fn stray_address(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("at addr 0x")?;
    let (address, _) = rest.split_once(',')?;
    u64::from_str_radix(address, 16).ok()
}

/// The arguments of a device, with its socket in `folder` if it is served.
pub(crate) fn arguments_of(device: &Device, folder: &Path) -> Vec<String> {
    let mut arguments = device.arguments.clone();
    if device.served.is_some() {
        let socket = json!({"type": "unix", "path": socket(folder, device)});
        for argument in &mut arguments {
            *argument = argument.replace(Device::SOCKET, &socket.to_string());
        }
    }
    arguments
}

fn socket(folder: &Path, device: &Device) -> PathBuf {
    folder.join(format!("{}.sock", device.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guests::preset::Preset;

    #[test]
    fn stray_accesses_are_told_by_their_address() {
        let line = "Invalid write at addr 0xFE00001C, size 4, region '(null)', reason: rejected";
        assert_eq!(stray_address(line), Some(0xfe00_001c));
        assert_eq!(stray_address("something else"), None);
    }

    #[test]
    fn a_machine_without_such_devices_needs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let machine = Preset::Full.machine();
        let served = Served::start(&machine, folder.path()).unwrap();
        assert!(served.arguments(&machine).is_empty());
        let reply = served.answer(&json!({"name": "display", "request": "state"}));
        assert!(reply["error"].as_str().unwrap().contains("display"));
    }

    #[test]
    fn devices_are_served_asked_and_gone() {
        let folder = tempfile::tempdir().unwrap();
        let machine = Preset::Device.machine();
        let served = Served::start(&machine, folder.path()).unwrap();
        let device = machine
            .devices
            .iter()
            .find(|device| device.name == "trapped");
        let arguments = arguments_of(device.unwrap(), folder.path());
        let described: Value = serde_json::from_str(&arguments[1]).unwrap();
        assert_eq!(described["driver"], "vfio-user-pci");
        let socket = PathBuf::from(described["socket"]["path"].as_str().unwrap());
        assert!(socket.exists());
        let reply = served.answer(&json!({"name": "trapped", "request": {"mark": "here"}}));
        assert_eq!(reply, json!({"seq": 1}));
        let reply = served.answer(&json!({"name": "trapped", "request": {"stray": [0, 10]}}));
        assert_eq!(reply, json!({"count": 0}));
        drop(served);
        assert!(!socket.exists());
    }
}
