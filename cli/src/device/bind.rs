//! `barlease device bind`.

use std::io;
use std::process::Command;

use barlease::Bdf;
use barlease::pci::Pci;
use barlease::pci::PciDevice;

use super::in_use::Host;
use super::patiently;
use crate::failure::Failure;

/// The module of our driver, and its name as a driver.
const MODULE: &str = "barlease_vfio_pci";
const DRIVER: &str = "barlease-vfio-pci";

/// All of them or none: what was done is undone when one fails.
pub(crate) fn bind(pci: &Pci, bdfs: &[Bdf], driver: &str, force: bool) -> Result<(), Failure> {
    let devices = bdfs.iter().map(|bdf| pci.device(*bdf));
    let devices: Vec<PciDevice> = devices.collect::<Result<_, _>>()?;
    let others: Vec<&PciDevice> = devices
        .iter()
        .filter(|device| device.driver.as_deref() != Some(driver))
        .collect();
    if !force {
        for device in &others {
            let uses = Host::default().uses(device.bdf);
            if !uses.is_empty() {
                return Err(Failure::new(format!(
                    "bind: {}: in use: {} (stop that, or --force)",
                    device.bdf,
                    uses.join(", ")
                )));
            }
        }
    }
    if !others.is_empty() && driver == DRIVER && pci.module().is_none() {
        load()?;
    }
    let mut done: Vec<&PciDevice> = Vec::new();
    for device in others {
        Host::default().end_functions(device.bdf);
        if let Err(error) = patiently("bind", device.bdf, || pci.bind(device.bdf, driver)) {
            undo(pci, &done);
            return Err(error.into());
        }
        done.push(device);
    }
    Ok(())
}

fn load() -> Result<(), Failure> {
    let failed = |reason: &str| {
        Failure::unsupported(format!(
            "bind: the module {MODULE} is not loaded, and cannot be: {reason} (`barlease doctor`)"
        ))
    };
    // Not in the PATH of everybody.
    let run = |program| Command::new(program).args(["-q", MODULE]).output();
    let answer = match run("modprobe") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => run("/usr/sbin/modprobe"),
        answer => answer,
    };
    match answer {
        Ok(answer) if answer.status.success() => Ok(()),
        Ok(answer) => {
            let said = String::from_utf8_lossy(&answer.stderr);
            let said = said.trim();
            Err(failed(if said.is_empty() {
                "modprobe finds none"
            } else {
                said
            }))
        }
        Err(error) => Err(failed(&format!("modprobe: {error}"))),
    }
}

/// As good as possible, and said.
fn undo(pci: &Pci, done: &[&PciDevice]) {
    for device in done.iter().rev() {
        let bdf = device.bdf;
        let back = pci.unbind(bdf).and_then(|()| match &device.driver {
            Some(driver) if pci.device(bdf)?.driver.as_ref() != Some(driver) => {
                pci.bind(bdf, driver)
            }
            _ => Ok(()),
        });
        match back {
            Ok(()) => eprintln!("barlease: bind: {bdf}: given back"),
            Err(error) => eprintln!("barlease: bind: {bdf}: not given back: {}", error.report()),
        }
    }
}
