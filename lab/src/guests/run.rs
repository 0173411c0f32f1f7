//! Prepares a run: one boot of a guest, with one command or a series of them in it.
//!
//! ```no_run
//! use barlease_lab::preset::Preset;
//! use barlease_lab::prepare::{Request, prepare};
//! use barlease_lab::run::{Output, Run};
//!
//! # fn main() -> anyhow::Result<()> {
//! let prepared = prepare(&Request::default())?;
//! let outcome = Run::new(&prepared, Preset::Display.machine())
//!     .file("README.md", "/root/README.md")
//!     .command(["cat", "/root/README.md"])
//!     .output(Output::Lines(Box::new(|line| println!("guest says {line}"))))
//!     .run()?;
//! assert_eq!(outcome.code, 0);
//! # Ok(())
//! # }
//! ```
//!
//! A run fails, whatever the command said, when the kernel's log has a [splat](super::splat), when
//! the guest ends without a verdict, or when it takes too long. The log is kept and its path is
//! part of the failure.

use std::ffi::OsString;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guests::boot::{Guest, command_line};
use crate::guests::emulator::{self, Accel};
use crate::guests::initramfs::{Initramfs, quoted};
use crate::guests::machine::Machine;
use crate::guests::outcome;
use crate::guests::secure_boot::Firmware;
use crate::guests::series::{self, Part};
use crate::guests::system::{self, Disk};
use crate::guests::terminal;
use crate::kernels::kernel::STOCK;
use crate::kernels::prepare::Prepared;
use crate::packages::report::Step;

pub use crate::guests::outcome::{Failure, Outcome};
pub use crate::guests::output::Output;

/// How long a guest may take on a kernel of Debian's, unless said otherwise. On a debug kernel it
/// is five times that.
pub const TIMEOUT: Duration = Duration::from_secs(360);

/// How often a guest is booted again after a fault of the emulator.
const RETRIES: u32 = 2;

/// How many folders of earlier runs are kept.
const RUNS_KEPT: usize = 30;

/// A younger run may still be going on, beside this one.
const RUN_LASTS: Duration = Duration::from_secs(2 * 3600);

/// How long before its time is up a guest lists its blocked tasks.
const LAST_WORDS: Duration = Duration::from_secs(20);

#[derive(Debug)]
enum Payload {
    Command(Vec<String>),
    Series(Vec<Part>),
    Shell { banner: String },
}

/// A run in preparation.
#[derive(Debug)]
pub struct Run<'a> {
    prepared: &'a Prepared,
    machine: Machine,
    module: Option<PathBuf>,
    module_parameters: String,
    with_modules: bool,
    system: Option<Disk>,
    firmware: Option<Firmware>,
    driver: Option<String>,
    files: Vec<(PathBuf, String)>,
    environment: Vec<(String, String)>,
    payload: Payload,
    output: Output,
    screenshots: Option<PathBuf>,
    accel: Option<Accel>,
    timeout: Option<Duration>,
}

impl<'a> Run<'a> {
    /// A run on that machine, with the stock VFIO modules loaded and nothing bound.
    #[must_use]
    pub fn new(prepared: &'a Prepared, machine: Machine) -> Self {
        Self {
            prepared,
            machine,
            module: None,
            module_parameters: String::new(),
            with_modules: true,
            system: None,
            firmware: None,
            driver: None,
            files: Vec::new(),
            environment: Vec::new(),
            payload: Payload::Command(vec!["true".to_owned()]),
            output: Output::Inherit,
            screenshots: None,
            accel: None,
            timeout: Some(TIMEOUT * prepared.kernel.slowness()),
        }
    }

    /// Loads this module after the stock ones. Its file is in `/lib/modules` of the guest.
    #[must_use]
    pub fn module(mut self, file: impl Into<PathBuf>) -> Self {
        self.module = Some(file.into());
        self
    }

    /// Parameters for that module, such as `msix_export=always`.
    #[must_use]
    pub fn module_parameters(mut self, parameters: impl Into<String>) -> Self {
        self.module_parameters = parameters.into();
        self
    }

    /// Puts no module into the guest, not even the stock ones.
    #[must_use]
    pub fn without_modules(mut self) -> Self {
        self.with_modules = false;
        self
    }

    /// Boots the Debian system on that disk, instead of the small one in memory. Modules are loaded
    /// and endpoints bound before systemd starts; the command starts when that has no job left.
    /// Files are put onto the disk, where `/lab` is a folder in memory.
    #[must_use]
    pub fn system(mut self, disk: &Disk) -> Self {
        self.machine.memory = self.machine.memory.max(system::MEMORY);
        self.machine.arguments.extend(disk.arguments());
        self.system = Some(disk.clone());
        self
    }

    /// Boots by this firmware, with Secure Boot, in place of QEMU's own loader.
    #[must_use]
    pub fn firmware(mut self, firmware: &Firmware) -> Self {
        self.firmware = Some(firmware.clone());
        self
    }

    /// Binds every endpoint to that driver before the command starts.
    #[must_use]
    pub fn bind(mut self, driver: impl Into<String>) -> Self {
        self.driver = Some(driver.into());
        self
    }

    /// Puts a copy of a file into the guest.
    #[must_use]
    pub fn file(mut self, from: impl Into<PathBuf>, to: impl Into<String>) -> Self {
        self.files.push((from.into(), to.into()));
        self
    }

    /// Sets a variable for the command.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The program to run, looked up in `/lab/bin` and busybox when it has no slash.
    #[must_use]
    pub fn command(mut self, words: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.payload = Payload::Command(words.into_iter().map(Into::into).collect());
        self
    }

    /// Runs these one after the other instead, until one fails, as [`series`] says.
    /// [`series::Listener`] takes their output apart.
    #[must_use]
    pub fn series(mut self, parts: Vec<Part>) -> Self {
        self.payload = Payload::Series(parts);
        self
    }

    /// An interactive shell on our terminal instead of a command, without a time limit.
    #[must_use]
    pub fn shell(mut self, banner: impl Into<String>) -> Self {
        self.payload = Payload::Shell {
            banner: banner.into(),
        };
        self.timeout = None;
        self
    }

    /// Where the output goes; our standard output when not said.
    #[must_use]
    pub fn output(mut self, output: Output) -> Self {
        self.output = output;
        self
    }

    /// The folder for screenshots; the run's own when not said.
    #[must_use]
    pub fn screenshots(mut self, folder: impl Into<PathBuf>) -> Self {
        self.screenshots = Some(folder.into());
        self
    }

    /// The acceleration; found out when not said.
    #[must_use]
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// How long it may take, boot and all; each part of a series has that for itself.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// Boots, runs, judges.
    ///
    /// # Errors
    ///
    /// [`Failure`] as described there, or when the guest could not be started at all.
    pub fn run(mut self) -> Result<Outcome> {
        let accel = match self.accel {
            Some(accel) => accel,
            None => accel(self.prepared)?,
        };
        let folder = run_folder(self.prepared)?;
        let screenshots = self
            .screenshots
            .take()
            .unwrap_or_else(|| folder.join("screenshots"));
        let archive = folder.join("initramfs.cpio");
        self.write_archive(&archive)?;
        let command_line = command_line(&self.machine, self.prepared.kernel.arch());
        let loader: Vec<OsString> = match &self.firmware {
            Some(firmware) => {
                let image = self.prepared.kernel.signed_image();
                firmware.lay_out(&folder, &image, &archive, &command_line)?
            }
            None => vec![
                "-kernel".into(),
                self.prepared.kernel.image(&self.prepared.sysroot)?.into(),
                "-initrd".into(),
                archive.clone().into(),
                "-append".into(),
                command_line.into(),
            ],
        };
        let mut output = std::mem::replace(&mut self.output, Output::Capture);
        let mut retries = RETRIES;
        loop {
            let guest = Guest {
                prepared: self.prepared,
                machine: &self.machine,
                accel,
                folder: &folder,
                loader: &loader,
                by_firmware: self.firmware.is_some(),
                screenshots: &screenshots,
                interactive: matches!(self.payload, Payload::Shell { .. }),
                timeout: self.timeout,
                // A system stops its services first.
                power_off: Duration::from_secs(if self.system.is_some() { 120 } else { 20 }),
                can_retry: retries > 0,
            };
            let result = guest.boot(&mut output);
            if let Some(fault) = outcome::emulator_fault(&result).filter(|_| retries > 0) {
                let kept = folder.join(format!("console.{retries}.log"));
                retries -= 1;
                fs::rename(folder.join("console.log"), &kept)?;
                eprintln!(
                    "the emulator's known fault ({fault}); booting again. log: {}",
                    kept.display()
                );
                continue;
            }
            let _ = fs::remove_file(&archive);
            return result;
        }
    }

    fn write_archive(&self, path: &Path) -> Result<()> {
        let file = fs::File::create(path).with_context(|| format!("make {}", path.display()))?;
        let busybox = self.prepared.kernel.busybox(&self.prepared.sysroot);
        let mut archive = Initramfs::new(BufWriter::new(file), &busybox)?;
        let ports = self.prepared.kernel.arch().ports();
        let ports = format!("{} {}\n", ports.payload, ports.control);
        archive.file("lab/ports", ports, 0o644)?;
        self.add_modules(&mut archive)?;
        archive.file("lab/devices", self.machine.describe(), 0o644)?;
        let patience = self
            .timeout
            .map(|limit| limit.saturating_sub(LAST_WORDS).as_secs().max(1));
        // Each part of a series has its own.
        if let (Some(seconds), false) = (patience, matches!(self.payload, Payload::Series(_))) {
            archive.file("lab/patience", format!("{seconds}\n"), 0o644)?;
        }
        if let Some(driver) = &self.driver {
            archive.file("lab/driver", format!("{driver}\n"), 0o644)?;
        }
        let mut places = String::new();
        for (number, (from, to)) in self.files.iter().enumerate() {
            if self.system.is_some() {
                archive.copy(&format!("files/{number}"), from)?;
                places.push_str(&format!("{number} {to}\n"));
            } else {
                archive.copy(to, from)?;
            }
        }
        if self.system.is_some() {
            archive.file("files/places", places, 0o644)?;
            archive.file("lab/agent", system::AGENT, 0o644)?;
        }
        match &self.payload {
            Payload::Command(words) => archive.file("lab/command", self.script(words), 0o644)?,
            Payload::Series(_) if self.system.is_some() => {
                bail!("a series of commands runs in the small guest only")
            }
            Payload::Series(parts) => {
                let module = self.module.as_deref().map(file_name).transpose()?;
                let module = module.map(|name| format!("/lib/modules/{name}"));
                let module = module
                    .as_deref()
                    .map(|file| (file, &*self.module_parameters));
                let script = self.exports() + &series::script(parts, module, patience);
                archive.file("lab/command", script, 0o644)?;
            }
            Payload::Shell { banner } => {
                archive.file("lab/banner", banner, 0o644)?;
                if let Some((rows, columns)) = terminal::size() {
                    archive.file(
                        "lab/terminal",
                        format!("rows {rows} cols {columns}\n"),
                        0o644,
                    )?;
                }
            }
        }
        archive.finish()?;
        Ok(())
    }

    /// Modules whose absence, or refusal to be loaded, is no failure: init knows them by the dash.
    fn add_wanted<W: Write>(&self, archive: &mut Initramfs<W>, list: &mut String) -> Result<()> {
        let kernel = &self.prepared.kernel;
        for name in &self.machine.wanted {
            let Ok(files) = kernel.modules(&[name], &self.prepared.sysroot) else {
                continue;
            };
            for file in files {
                let name = file_name(&file)?;
                let line = format!("{name}\n");
                if !list.contains(&line) {
                    archive.copy(&format!("lib/modules/{name}"), &file)?;
                    list.push('-');
                    list.push_str(&line);
                }
            }
        }
        Ok(())
    }

    fn add_modules<W: Write>(&self, archive: &mut Initramfs<W>) -> Result<()> {
        let mut list = String::new();
        let mut names: Vec<&str> = Vec::new();
        if self.system.is_some() {
            names.extend(system::MODULES);
        }
        if self.with_modules {
            names.extend(STOCK);
            names.extend(self.machine.modules.iter().map(String::as_str));
        }
        if !names.is_empty() {
            for file in self
                .prepared
                .kernel
                .modules(&names, &self.prepared.sysroot)?
            {
                let name = file_name(&file)?;
                archive.copy(&format!("lib/modules/{name}"), &file)?;
                list.push_str(&format!("{name}\n"));
            }
        }
        self.add_wanted(archive, &mut list)?;
        if let Some(module) = &self.module {
            let name = file_name(module)?;
            archive.copy(&format!("lib/modules/{name}"), module)?;
            list.push_str(&format!("{name} {}\n", self.module_parameters));
        }
        archive.file("lab/modules", list, 0o644)
    }

    fn script(&self, words: &[String]) -> String {
        let mut script = String::from("cd /root\n") + &self.exports();
        let words: Vec<_> = words.iter().map(|word| quoted(word)).collect();
        // A command of its own, so that its death by a signal is seen.
        script.push_str(&format!("{}\nexit $?\n", words.join(" ")));
        script
    }

    fn exports(&self) -> String {
        let export =
            |(name, value): &(String, String)| format!("export {name}={}\n", quoted(value));
        self.environment.iter().map(export).collect()
    }
}

/// The acceleration to use here: `BARLEASE_ACCEL`, or what was found out by booting a guest, once
/// after each start of the host.
///
/// # Errors
///
/// When `BARLEASE_ACCEL` is none of the names of [`Accel`].
pub fn accel(prepared: &Prepared) -> Result<Accel> {
    emulator::accel(prepared, |accel, patience| {
        let step = Step::start(
            "trying whether guests boot with KVM here (once after each start of the host)",
        );
        let run = Run::new(prepared, Machine::new(Vec::new()))
            .command(["true"])
            .without_modules()
            .accel(accel)
            .timeout(patience)
            .output(Output::Capture);
        let boots = run.run().is_ok_and(|outcome| outcome.code == 0);
        step.done();
        boots
    })
}

fn file_name(path: &Path) -> Result<String> {
    let name = path
        .file_name()
        .with_context(|| format!("{} names no file", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}

/// A folder of its own for a run, `runs/<time>-<process>`; those of long ago are removed.
fn run_folder(prepared: &Prepared) -> Result<PathBuf> {
    let runs = prepared.cache.path("runs");
    fs::create_dir_all(&runs).with_context(|| format!("make the folder {}", runs.display()))?;
    let folder = new_folder(&runs)?;
    let mut all: Vec<_> = fs::read_dir(&runs)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    all.sort();
    for old in all.iter().take(all.len().saturating_sub(RUNS_KEPT)) {
        let modified = fs::metadata(old).and_then(|folder| folder.modified());
        if modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > RUN_LASTS)) {
            let _ = fs::remove_dir_all(old);
        }
    }
    Ok(folder)
}

/// A process may start two runs at the same time.
fn new_folder(runs: &Path) -> Result<PathBuf> {
    loop {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let folder = runs.join(format!("{}-{}", now.as_millis(), std::process::id()));
        match fs::create_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                thread::sleep(Duration::from_millis(1));
            }
            made => {
                made.with_context(|| format!("make the run's folder {}", folder.display()))?;
                return Ok(folder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_start_at_once_have_folders_of_their_own() {
        let runs = tempfile::tempdir().unwrap();
        let folders: std::collections::BTreeSet<_> =
            (0..20).map(|_| new_folder(runs.path()).unwrap()).collect();
        assert_eq!(folders.len(), 20);
    }
}
