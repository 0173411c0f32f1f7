//! Bindings that survive a reboot: a rule of udev for each device.
//!
//! The rule names the device by its address and its ids, so that another device that has got the
//! address by then is left alone. It sets `driver_override` before a driver is loaded for the
//! device, and then has this command bind it, which loads the module and takes the device from a
//! driver that was there earlier, as that of an initramfs, unless the host uses it.

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use barlease::Bdf;
use barlease::pci::PciDevice;

use crate::failure::Failure;

const RULES: &str = "/etc/udev/rules.d";
/// Where udev is, when it runs.
const UDEV: [&str; 2] = ["/run/udev", RULES];
/// Where udev listens, while it runs.
const CONTROL: &str = "/run/udev/control";

/// The file of a rule, and its content before it was changed.
pub(super) struct Rule {
    path: PathBuf,
    before: Option<String>,
}

fn path(bdf: Bdf) -> PathBuf {
    Path::new(RULES).join(format!("70-barlease-{bdf}.rules"))
}

/// Whether a device is bound at each boot.
pub(super) fn is_kept(bdf: Bdf) -> bool {
    path(bdf).exists()
}

pub(super) fn is_possible() -> Result<(), Failure> {
    if UDEV.iter().any(|path| Path::new(path).is_dir()) {
        return Ok(());
    }
    Err(Failure::unsupported(
        "bind: --persist: there is no udev, which would bind at each boot (bind without --persist \
         in a script of the boot)",
    ))
}

/// The text of a rule.
fn text(device: &PciDevice, driver: &str, program: &str) -> String {
    let PciDevice {
        bdf,
        vendor,
        device: id,
        ..
    } = device;
    format!(
        "# Made by `barlease device bind --persist`; `barlease device unbind --persist {bdf}` \
         removes it.\n\
         ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"{bdf}\", \
         ATTR{{vendor}}==\"0x{vendor:04x}\", ATTR{{device}}==\"0x{id:04x}\", \
         ATTR{{driver_override}}=\"{driver}\", \
         RUN+=\"{program} device bind {bdf} --driver {driver}\"\n"
    )
}

/// Has udev read its rules. By itself it looks for a change at most every three seconds, and a
/// device may come earlier. Where udev does not run there is nothing to do: it reads them when it
/// starts.
fn reload() {
    if !Path::new(CONTROL).exists() {
        return;
    }
    let mut udevadm = Command::new("udevadm");
    udevadm
        .args(["control", "--reload"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    match udevadm.status() {
        Ok(status) if status.success() => {}
        Ok(status) => log::warn!("udevadm control --reload: {status}"),
        Err(error) => log::warn!("udevadm control --reload: {error}"),
    }
}

impl Rule {
    pub(super) fn write(device: &PciDevice, driver: &str) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::new(format!("bind: --persist: {error}")))?;
        // Characters that a rule can have without escaping.
        let plain = |text: &str| {
            let special = |c: char| c.is_whitespace() || "\"\\$%".contains(c);
            (!text.contains(special)).then(|| text.to_owned())
        };
        let program = program.to_str().and_then(plain).ok_or_else(|| {
            let path = program.display();
            Failure::new(format!("bind: --persist: no rule of udev can name {path}"))
        })?;
        let path = path(device.bdf);
        let failed = |error: io::Error| Failure::file("bind", &path, &error);
        fs::create_dir_all(RULES).map_err(failed)?;
        let before = fs::read_to_string(&path).ok();
        // udev may read the folder at any time: it sees the whole file or none.
        log::debug!("write {}", path.display());
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, text(device, driver, &program))
            .and_then(|()| fs::rename(&unfinished, &path))
            .map_err(failed)?;
        reload();
        Ok(Self { path, before })
    }

    /// Nothing is changed where there is none.
    pub(super) fn remove(bdf: Bdf) -> Result<Self, Failure> {
        let path = path(bdf);
        let before = fs::read_to_string(&path).ok();
        log::debug!("remove {}", path.display());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Failure::file("unbind", &path, &error))
            }
            _ => {
                if before.is_some() {
                    reload();
                }
                Ok(Self { path, before })
            }
        }
    }

    pub(super) fn undo(&self) -> io::Result<()> {
        let undone = match &self.before {
            Some(text) => fs::write(&self.path, text),
            None => match fs::remove_file(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                answer => answer,
            },
        };
        reload();
        undone
    }
}
