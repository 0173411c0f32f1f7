//! The inheritance of an earlier daemon: its devices, its ledger, its socket.
//!
//! Each is a descriptor that the manager was given to keep, by one name: `ledger`, `listener`,
//! `policy-0` or `policy-1`, `device-NAME`, and `adopted-PID.ID-NAME` for a device that a process
//! has handed over. `leases` is the name of the socket in the manager's own unit; it may have
//! others for metrics.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use barlease_ledger::core::Found;
use barlease_ledger::record::Record;
use barlease_ledger::types::ProcessId;

use crate::device::Device;
use crate::manager::Manager;
use crate::manager::Passed;
use crate::metrics::door::Ways;
use crate::policy;
use crate::policy::Kept as KeptPolicy;
use crate::store::Store;

/// The ledger's name.
pub(crate) const LEDGER: &str = "ledger";
/// That of a socket that the daemon has made.
pub(crate) const LISTENER: &str = "listener";
/// That of a socket that the manager has made.
pub(crate) const ACTIVATED: &str = "leases";
/// Of such sockets for metrics: by HTTP, and for systemd-report.
const METRICS: &str = "metrics";
const REPORT: &str = "report";

/// A device that outlived the daemon that had it.
pub(crate) struct Kept {
    pub(crate) device: Device,
    pub(crate) owner: Option<Owner>,
    pub(crate) found: Found,
}

/// The process that has handed a device over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    pub(crate) process: ProcessId,
}

/// Everything that was left.
#[derive(Default)]
pub(crate) struct Left {
    pub(crate) ledger: Option<(Store, Vec<Record>)>,
    pub(crate) devices: Vec<Kept>,
    /// The socket, and whether the manager has made it.
    pub(crate) listener: Option<(UnixListener, bool)>,
    /// Sockets for metrics.
    pub(crate) metrics: Ways,
    /// The policy that was in force last.
    pub(crate) policy: Option<KeptPolicy>,
}

/// The name by which a device's descriptor is stored.
pub(crate) fn name_of(device: &str, owner: Option<Owner>) -> String {
    match owner {
        None => format!("device-{device}"),
        Some(owner) => format!("adopted-{}.{}-{device}", owner.pid, owner.process),
    }
}

fn read_name(name: &str) -> Option<(&str, Option<Owner>)> {
    if let Some(device) = name.strip_prefix("device-") {
        return Some((device, None));
    }
    let (owner, device) = name.strip_prefix("adopted-")?.split_once('-')?;
    let (pid, process) = owner.split_once('.')?;
    let owner = Owner {
        pid: pid.parse().ok()?,
        process: ProcessId(process.parse().ok()?),
    };
    Some((device, Some(owner)))
}

impl Left {
    /// Takes over what was passed. A descriptor that cannot be used is reported, and given up: the
    /// leases of a device that cannot be listed are dead, or it is not one of ours.
    pub(crate) fn take(passed: Vec<Passed>, manager: &mut Manager) -> io::Result<Self> {
        let mut left = Self::default();
        for Passed { name, fd } in passed {
            if name == ACTIVATED {
                left.listener = Some((fd.into(), true));
                continue;
            }
            if let Some(sockets) = match &*name {
                METRICS => Some(&mut left.metrics.http),
                REPORT => Some(&mut left.metrics.report),
                _ => None,
            } {
                sockets.push(fd);
                continue;
            }
            manager.has(&name);
            let useless = if name == LISTENER {
                // That of the manager's unit is better.
                left.listener.get_or_insert((fd.into(), false));
                None
            } else if name == LEDGER {
                match Store::open(fd) {
                    Ok(ledger) => {
                        left.ledger = Some(ledger);
                        None
                    }
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        Some(error.to_string())
                    }
                    Err(error) => return Err(error),
                }
            } else if let Some(place) = policy::place(&name) {
                match KeptPolicy::read(place, fd) {
                    Ok(kept) => left.keep_newer(kept, manager),
                    Err(error) => Some(error.to_string()),
                }
            } else if let Some((device, owner)) = read_name(&name) {
                let opened = barlease::Device::from_fd(fd).and_then(Device::new);
                match opened.and_then(|open| kept(device.into(), owner, open)) {
                    Ok(kept) => {
                        left.devices.push(kept);
                        None
                    }
                    Err(error) if error.errno().is_some_and(passes) => {
                        return Err(io::Error::other(format!("{name}: {}", error.report())));
                    }
                    Err(error) => Some(error.report().to_string()),
                }
            } else {
                Some("nothing here has that name".to_owned())
            };
            if let Some(why) = useless {
                eprintln!("barleased: {name}, which was kept, is of no use: {why}");
                manager.remove(&name);
            }
        }
        Ok(left)
    }
}

impl Left {
    /// A daemon that was killed while it stored another policy has left two.
    fn keep_newer(&mut self, kept: KeptPolicy, manager: &mut Manager) -> Option<String> {
        let (newer, older) = match self.policy.take() {
            Some(other) if other.time > kept.time => (other, Some(kept)),
            other => (kept, other),
        };
        self.policy = Some(newer);
        if let Some(older) = older {
            manager.remove(policy::NAMES[older.place]);
        }
        None
    }
}

/// Whether an error is one of this moment: the daemon ends, and is started again.
fn passes(errno: i32) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_raw_os_error(errno);
    matches!(
        errno,
        Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::INTR
    )
}

fn kept(name: Arc<str>, owner: Option<Owner>, device: Device) -> barlease::Result<Kept> {
    let found = Found {
        device: name,
        facts: device.facts()?,
        buffers: device.list()?,
    };
    Ok(Kept {
        device,
        owner,
        found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let owner = Owner {
            pid: 12,
            process: ProcessId(345),
        };
        for (device, owner) in [("card", None), ("a-b", Some(owner)), ("1-2", None)] {
            let name = name_of(device, owner);
            assert_eq!(read_name(&name), Some((device, owner)));
        }
        for name in ["card", "adopted-1-card", "adopted-x.1-card", "adopted-1.2"] {
            assert_eq!(read_name(name), None, "{name}");
        }
    }
}
