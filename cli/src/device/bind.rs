//! `barlease device bind` and `unbind`: all of the devices or none.
//!
//! All steps are undone when one of them fails, and when a signal comes. A driver that lets go
//! cannot be interrupted, so the signal is heeded between the steps.

use std::io;
use std::process::Command;

use barlease::Bdf;
use barlease::pci::Pci;
use barlease::pci::PciDevice;
use serde::Serialize;

use super::in_use::Host;
use super::interrupt::Interrupt;
use super::interrupt::patiently;
use super::persist;
use super::persist::Rule;
use crate::args::BindArgs;
use crate::args::UnbindArgs;
use crate::failure::Failure;
use crate::output::Output;

/// The module of our driver, and its name as a driver.
const MODULE: &str = "barlease_vfio_pci";
const DRIVER: &str = "barlease-vfio-pci";
/// Of class codes: bridges. Their driver may stay when the rest of a group goes.
const BRIDGES: u32 = 0x06;

/// One device, as it ended.
#[derive(Debug, Serialize)]
struct Changed {
    bdf: Bdf,
    before: Option<String>,
    driver: Option<String>,
    persistent: bool,
}

/// One device that was changed before something failed.
#[derive(Debug, Serialize)]
struct Undone {
    bdf: Bdf,
    driver: Option<String>,
    error: Option<String>,
}

/// The steps that were done until now.
struct Steps<'a> {
    pci: &'a Pci,
    operation: &'static str,
    interrupt: Interrupt,
    done: Vec<Step>,
}

struct Step {
    before: PciDevice,
    /// Virtual functions that were ended.
    functions: u32,
    /// How it was bound at each boot, if that was changed.
    rule: Option<Rule>,
}

pub(super) fn bind(pci: &Pci, args: &BindArgs, output: Output) -> Result<(), Failure> {
    let driver = args.driver.as_str();
    let mut devices = devices(pci, &args.bdf)?;
    if args.group {
        add_groups(pci, &mut devices, |other| other.class >> 16 != BRIDGES);
    }
    let is_other = |device: &&PciDevice| device.driver.as_deref() != Some(driver);
    if !args.force {
        for device in devices.iter().filter(is_other) {
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
    if args.persist {
        persist::is_possible()?;
    }
    let is_loaded = || pci.root().join("bus/pci/drivers").join(driver).is_dir();
    if !is_loaded() {
        // Other drivers are called as their modules.
        load(if driver == DRIVER { MODULE } else { driver })?;
    }
    if !is_loaded() {
        return Err(Failure::unsupported(format!(
            "bind: the driver {driver} is not loaded: load its module"
        )));
    }
    let mut steps = Steps::new(pci, "bind")?;
    for device in devices.iter().filter(is_other) {
        let functions = Host::default().end_functions(device.bdf);
        steps.did(device, functions);
        steps.take(|steps| {
            patiently("bind", device.bdf, &steps.interrupt, || {
                pci.bind(device.bdf, driver)
            })
        })?;
    }
    if args.persist {
        for device in &devices {
            steps.keep(device, |device| Rule::write(device, driver))?;
        }
    }
    for device in &devices {
        warn_of_group(pci, device);
    }
    told(pci, &devices, output)
}

pub(super) fn unbind(pci: &Pci, args: &UnbindArgs, output: Output) -> Result<(), Failure> {
    let mut devices = devices(pci, &args.bdf)?;
    if args.group {
        add_groups(pci, &mut devices, PciDevice::is_vfio);
    }
    for device in &devices {
        // Before the first one is let go of.
        if let (Some(driver), false) = (&device.driver, device.is_vfio()) {
            return Err(Failure::unsupported(format!(
                "unbind: {}: bound to {driver}, which is not a vfio driver",
                device.bdf
            )));
        }
    }
    let mut steps = Steps::new(pci, "unbind")?;
    for device in &devices {
        if args.persist {
            steps.keep(device, |device| Rule::remove(device.bdf))?;
        }
        steps.did(device, 0);
        steps.take(|steps| {
            patiently("unbind", device.bdf, &steps.interrupt, || {
                pci.unbind(device.bdf)
            })
        })?;
        if !args.persist && persist::is_kept(device.bdf) {
            eprintln!(
                "barlease: unbind: {}: it is bound again at the next boot (`unbind --persist` ends \
                 that)",
                device.bdf
            );
        }
    }
    told(pci, &devices, output)
}

/// Each once.
fn devices(pci: &Pci, bdfs: &[Bdf]) -> Result<Vec<PciDevice>, Failure> {
    let mut devices: Vec<PciDevice> = Vec::new();
    for bdf in bdfs {
        if devices.iter().all(|known| known.bdf != *bdf) {
            devices.push(pci.device(*bdf)?);
        }
    }
    Ok(devices)
}

/// Adds the other functions of their IOMMU groups that are `wanted`.
fn add_groups(pci: &Pci, devices: &mut Vec<PciDevice>, wanted: impl Fn(&PciDevice) -> bool) {
    let groups: Vec<u32> = devices.iter().filter_map(|it| it.iommu_group).collect();
    for other in groups.into_iter().flat_map(|group| pci.group(group)) {
        if wanted(&other) && devices.iter().all(|known| known.bdf != other.bdf) {
            devices.push(other);
        }
    }
}

/// A device can be bound and yet not be opened: while the host has others of its group.
fn warn_of_group(pci: &Pci, device: &PciDevice) {
    let Some(group) = device.iommu_group else {
        return;
    };
    let others: Vec<String> = pci
        .group_obstacles(group)
        .into_iter()
        .map(|other| format!("{} ({})", other.bdf, other.driver.unwrap_or_default()))
        .collect();
    if !others.is_empty() {
        eprintln!(
            "barlease: bind: {}: it can be opened only when the host gives up what else is in \
             IOMMU group {group}: {} (`bind --group` takes all of it)",
            device.bdf,
            others.join(", ")
        );
    }
}

fn told(pci: &Pci, before: &[PciDevice], output: Output) -> Result<(), Failure> {
    if !output.is_json() {
        return Ok(());
    }
    let changed = before.iter().map(|before| Changed {
        bdf: before.bdf,
        before: before.driver.clone(),
        driver: pci.device(before.bdf).ok().and_then(|it| it.driver),
        persistent: persist::is_kept(before.bdf),
    });
    Ok(output.document(&changed.collect::<Vec<_>>())?)
}

impl<'a> Steps<'a> {
    fn new(pci: &'a Pci, operation: &'static str) -> Result<Self, Failure> {
        Ok(Self {
            pci,
            operation,
            interrupt: Interrupt::new(operation)?,
            done: Vec::new(),
        })
    }

    /// The next step is of this device.
    fn did(&mut self, before: &PciDevice, functions: u32) {
        self.done.push(Step {
            before: before.clone(),
            functions,
            rule: None,
        });
    }

    /// Changes how a device is bound at each boot.
    fn keep(
        &mut self,
        device: &PciDevice,
        change: impl FnOnce(&PciDevice) -> Result<Rule, Failure>,
    ) -> Result<(), Failure> {
        match change(device) {
            Ok(rule) => {
                self.did(device, 0);
                if let Some(step) = self.done.last_mut() {
                    step.rule = Some(rule);
                }
                self.take(|_| Ok(()))
            }
            Err(failure) => Err(self.undo(failure)),
        }
    }

    /// Takes a step. When it fails, or a signal has come by its end, all are undone.
    fn take(&mut self, step: impl FnOnce(&Self) -> barlease::Result<()>) -> Result<(), Failure> {
        let failure = match step(self) {
            Err(error) => error.into(),
            Ok(()) => match self.interrupt.signal() {
                None => return Ok(()),
                Some(signal) => Failure::interrupted(self.operation, signal),
            },
        };
        Err(self.undo(failure))
    }

    /// As good as possible, and said.
    fn undo(&mut self, failure: Failure) -> Failure {
        let mut undone: Vec<Undone> = Vec::new();
        for step in self.done.drain(..).rev() {
            let bdf = step.before.bdf;
            let mut errors: Vec<String> = Vec::new();
            if let Some(rule) = step.rule {
                errors.extend(rule.undo().err().map(|error| error.to_string()));
            } else {
                let back = self.pci.put_back(&step.before);
                errors.extend(back.err().map(|error| error.report().to_string()));
                if step.functions > 0 {
                    let again = Host::default().make_functions(bdf, step.functions);
                    errors.extend(again.err().map(|error| error.to_string()));
                }
            }
            let error = (!errors.is_empty()).then(|| errors.join("; "));
            match undone.iter_mut().find(|it| it.bdf == bdf) {
                Some(it) => it.error = it.error.take().or(error),
                None => undone.push(Undone {
                    bdf,
                    driver: step.before.driver,
                    error,
                }),
            }
        }
        failure.undone(
            &undone.iter().map(Undone::text).collect::<Vec<_>>(),
            &undone,
        )
    }
}

impl Undone {
    fn text(&self) -> String {
        let back = match &self.driver {
            Some(driver) => format!("{} is with {driver} again", self.bdf),
            None => format!("{} has no driver again", self.bdf),
        };
        match &self.error {
            None => back,
            Some(error) => format!("{}: not given back: {error}", self.bdf),
        }
    }
}

fn load(module: &str) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(format!(
            "bind: the module {module} is not loaded, and only root may load it (run as root)"
        )));
    }
    let failed = |reason: &str| {
        Failure::unsupported(format!(
            "bind: the module {module} is not loaded, and cannot be: {reason} (`barlease doctor`)"
        ))
    };
    log::debug!("run modprobe -q {module}");
    // Not in the PATH of everybody.
    let run = |program| Command::new(program).args(["-q", module]).output();
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
