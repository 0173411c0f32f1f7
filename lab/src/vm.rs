//! Boots a guest, runs one command in it, and judges how it went.
//!
//! ```no_run
//! use barlease_lab::machine::Preset;
//! use barlease_lab::prepare::{Request, prepare};
//! use barlease_lab::vm::{Output, Run};
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
//! A run fails, whatever the command said, when the kernel's log has a [splat], when the guest ends
//! without a verdict, or when it takes too long. The log is kept and its path is part of the
//! failure.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::FdFlags;
use serde_json::{Value, json};

use crate::arch::Arch;
use crate::command;
use crate::emulator::{self, Accel};
use crate::initramfs::{Initramfs, quoted};
use crate::kernel::STOCK;
use crate::machine::Machine;
use crate::monitor::Monitor;
use crate::prepare::Prepared;
use crate::report::seconds;
use crate::secure_boot::Firmware;
use crate::series::{self, Part};
use crate::served::{self, Served};
use crate::splat::{self, INIT_STARTED, Splat};
use crate::system::{self, Disk};
use crate::terminal::RawTerminal;

/// How long a guest may take on a kernel of Debian's, unless said otherwise. On a debug kernel it
/// is five times that.
pub const TIMEOUT: Duration = Duration::from_secs(360);

/// How long a guest may take until its init starts, on a kernel of Debian's; twice that on a debug
/// kernel, which takes 20 s. Of some hundred guests an emulated one stands still while it brings up
/// its second processor.
const BOOT: Duration = Duration::from_secs(120);

/// How long a guest may say nothing until its init starts, unless it cannot be booted again; twice
/// that on a debug kernel. One that stands still is found out by that sooner than by the time that
/// it takes.
const SILENCE: Duration = Duration::from_secs(30);

/// How often a guest is booted again after a fault of the emulator.
const RETRIES: u32 = 2;

/// How many folders of earlier runs are kept.
const RUNS_KEPT: usize = 30;

/// A younger run may still be going on, beside this one.
const RUN_LASTS: Duration = Duration::from_secs(2 * 3600);

/// Lines of a log that are shown when there is nothing better.
const TAIL: usize = 60;

/// How long before its time is up a guest lists its blocked tasks.
const LAST_WORDS: Duration = Duration::from_secs(20);

/// Where the command's output goes.
pub enum Output {
    /// To our standard output, as it comes.
    Inherit,
    /// Into [`Outcome::output`].
    Capture,
    /// To a function, line by line.
    Lines(Box<dyn FnMut(&str) + Send>),
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inherit => "Inherit",
            Self::Capture => "Capture",
            Self::Lines(_) => "Lines",
        })
    }
}

/// How a run went whose guest came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The command's exit code; 128 + n when a signal ended it.
    pub code: i32,
    /// The kernel's log.
    pub log: PathBuf,
    /// Pictures that were taken, in order.
    pub screenshots: Vec<PathBuf>,
    /// The command's output, when it was captured.
    pub output: Vec<u8>,
    /// From the start of the emulator until the command started.
    pub boot: Duration,
    /// From the start of the emulator to its end.
    pub total: Duration,
}

/// Why a run has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The kernel complained.
    Splat {
        /// Its output.
        splat: Splat,
        /// Its log.
        log: PathBuf,
    },
    /// The guest took too long.
    Timeout {
        /// The time it had, for its work or to power off.
        limit: Duration,
        /// The end of the kernel's log.
        tail: String,
        /// The kernel's log.
        log: PathBuf,
    },
    /// The guest's kernel never came as far as init, so nothing of ours has run.
    NoInit {
        /// The time it had, less when it had stopped to say anything.
        limit: Duration,
        /// The end of the kernel's log.
        tail: String,
        /// The kernel's log.
        log: PathBuf,
    },
    /// The guest ended, but never said how the command did.
    NoVerdict {
        /// The emulator's output.
        emulator: String,
        /// The end of the kernel's log.
        tail: String,
        /// The kernel's log.
        log: PathBuf,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Splat { splat, log } => {
                let more = if splat.total > 1 {
                    format!(" (the first of {})", splat.total)
                } else {
                    String::new()
                };
                write!(
                    f,
                    "the guest's kernel complained: {}{more}\n{}\nlog: {}",
                    splat.line,
                    splat.excerpt,
                    log.display()
                )
            }
            Self::Timeout { limit, tail, log } => {
                let limit = seconds(*limit);
                write!(
                    f,
                    "the guest took longer than {limit} and was stopped; the end of its log:\n{tail}\nlog: {}",
                    log.display()
                )
            }
            Self::NoInit { limit, tail, log } => write!(
                f,
                "the guest's kernel was not up after {} and was stopped; the end of its log:\n{tail}\nlog: {}",
                seconds(*limit),
                log.display()
            ),
            Self::NoVerdict {
                emulator,
                tail,
                log,
            } => write!(
                f,
                "the guest ended without saying how the command did. The emulator said:\n{emulator}\n\
                 The end of the guest's log:\n{tail}\nlog: {}",
                log.display()
            ),
        }
    }
}

impl std::error::Error for Failure {}

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

    /// Runs these one after the other instead, until one fails, as [`series`] says. What comes out
    /// of it can be taken apart with [`series::Listener`].
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
            None => emulator::accel(self.prepared)?,
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
            if let Some(fault) = emulator_fault(&result).filter(|_| retries > 0) {
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
                if let Some((rows, columns)) = crate::terminal::size() {
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

/// The emulator's own failure, if it was that.
fn emulator_fault(result: &Result<Outcome>) -> Option<&'static str> {
    match result.as_ref().err()?.downcast_ref()? {
        Failure::Splat { splat, .. } if splat.emulator_fault => {
            Some("Oops: int3 before init has started")
        }
        Failure::NoInit { .. } => Some("it stands still before init has started"),
        _ => None,
    }
}

fn file_name(path: &Path) -> Result<String> {
    let name = path
        .file_name()
        .with_context(|| format!("{} names no file", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}

/// The output after init had started, if it had.
fn since_init(log: &str) -> &str {
    log.find(INIT_STARTED).map_or(log, |at| &log[at..])
}

/// The emulator's output, without what it always says about features of processors.
fn remarks(emulator: &str) -> String {
    let lines = emulator
        .lines()
        .filter(|line| !line.contains("support requested feature"));
    match command::tail(&lines.collect::<Vec<_>>().join("\n"), 10) {
        said if said.is_empty() => "(nothing)".to_owned(),
        said => said,
    }
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

/// One boot.
struct Guest<'a> {
    prepared: &'a Prepared,
    machine: &'a Machine,
    accel: Accel,
    folder: &'a Path,
    /// QEMU's arguments for the kernel, or for firmware that loads it.
    loader: &'a [OsString],
    /// Whether that is firmware, which takes its time.
    by_firmware: bool,
    screenshots: &'a Path,
    interactive: bool,
    timeout: Option<Duration>,
    /// The time that it has to power off, on a kernel that does not watch itself.
    power_off: Duration,
    /// Whether it is booted again when its init does not start.
    can_retry: bool,
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By itself.
    Itself,
    /// We stopped it, since this time was up: that for its work, or that to power off.
    Late(Duration),
    /// We stopped it, since its init had not started.
    NoInit,
}

/// The messages of the control channel so far.
#[derive(Debug, Default)]
struct Progress {
    ready: Option<Instant>,
    /// When the last part of a series that has begun did so.
    part: Option<Instant>,
    verdict: Option<i32>,
    screenshots: Vec<PathBuf>,
}

/// Our ends of the three sockets.
struct Sockets {
    payload: UnixStream,
    control: UnixStream,
    monitor: UnixStream,
}

impl Guest<'_> {
    fn boot(&self, output: &mut Output) -> Result<Outcome> {
        let started = Instant::now();
        let served = Served::start(self.machine, self.folder)?;
        let (mut child, sockets) = self.start(&served)?;
        let progress = Arc::new(Mutex::new(Progress::default()));
        let terminal = if self.interactive {
            RawTerminal::take()?
        } else {
            None
        };
        let captured = thread::scope(|scope| -> Result<_> {
            let copy = scope.spawn(|| copy_output(&sockets.payload, output));
            scope.spawn(|| self.serve(&sockets, &served, &progress));
            let waited = self.wait(&mut child, &progress, started);
            if waited.is_err() {
                let _ = child.kill();
                let _ = child.wait();
            }
            let captured = copy.join().unwrap_or_default();
            waited.map(|end| (captured, end))
        });
        drop(terminal);
        let (output, end) = captured?;
        let progress =
            std::mem::take(&mut *progress.lock().unwrap_or_else(PoisonError::into_inner));
        self.judge(progress, output, end, started)
    }

    fn log(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    fn emulator_log(&self) -> PathBuf {
        self.folder.join("emulator.log")
    }

    fn start(&self, served: &Served) -> Result<(Child, Sockets)> {
        let (payload, payload_end) = pair()?;
        let (control, control_end) = pair()?;
        let (monitor, monitor_end) = pair()?;
        let errors = fs::File::create(self.emulator_log())?;
        let child = self
            .emulator(&payload_end, &control_end, &monitor_end)
            .args(served.arguments(self.machine))
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()
            .context("start QEMU")?;
        Ok((
            child,
            Sockets {
                payload,
                control,
                monitor,
            },
        ))
    }

    fn emulator(&self, payload: &OwnedFd, control: &OwnedFd, monitor: &OwnedFd) -> Command {
        let sysroot = &self.prepared.sysroot;
        let arch = self.prepared.kernel.arch();
        let mut command = sysroot.program(arch.emulator());
        command.env(
            "QEMU_MODULE_DIR",
            sysroot.path("usr/lib/x86_64-linux-gnu/qemu"),
        );
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(sysroot.path(firmware));
        }
        let machine = self.machine;
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
        command.args(arch.machine());
        command.args(self.accel.arguments());
        command.args([
            "-m",
            &format!("{}M", machine.memory),
            "-smp",
            &machine.processors.to_string(),
        ]);
        command.args(self.loader);
        command.args([
            "-chardev",
            &format!("file,id=console,path={}", comma_safe(&self.log())),
        ]);
        for (id, fd) in [
            ("payload", payload),
            ("control", control),
            ("monitor", monitor),
        ] {
            command.args(["-chardev", &format!("socket,id={id},fd={}", fd.as_raw_fd())]);
        }
        command.args(["-object", "monitor-qmp,id=qmp,chardev=monitor"]);
        command.args(arch.serial_ports());
        if machine.low_memory {
            command.args(arch.low_memory());
        }
        if machine.native_ports {
            command.args(arch.native_ports());
        }
        command.args(&machine.arguments);
        for device in &machine.devices {
            command.args(served::arguments_of(device, self.folder));
        }
        command
    }

    /// How long it may take until its init starts.
    fn boot_limit(&self) -> Duration {
        self.times(BOOT)
    }

    /// That much longer as a boot takes on this kernel, and in this way.
    fn times(&self, time: Duration) -> Duration {
        let way = if self.by_firmware { 4 } else { 1 };
        time * self.prepared.kernel.slowness().min(2) * way
    }

    /// Whether its init has said that it started.
    fn has_init(&self) -> bool {
        let log = fs::read(self.log()).unwrap_or_default();
        String::from_utf8_lossy(&log).contains(INIT_STARTED)
    }

    /// Waits for the guest's end, or brings it about.
    fn wait(&self, child: &mut Child, progress: &Mutex<Progress>, started: Instant) -> Result<End> {
        // After its verdict a guest only has to power off.
        let grace = self.power_off * self.prepared.kernel.slowness();
        let mut verdict_at = None;
        let mut is_up = false;
        let mut said = (0, Instant::now());
        loop {
            if child.try_wait().context("wait for QEMU")?.is_some() {
                return Ok(End::Itself);
            }
            let (part, verdict) = {
                let progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                (progress.part.unwrap_or(started), progress.verdict)
            };
            if verdict_at.is_none() && verdict.is_some() {
                verdict_at = Some(Instant::now());
            }
            let late = self.timeout.is_some_and(|limit| part.elapsed() > limit);
            let stuck = verdict_at.is_some_and(|at: Instant| at.elapsed() > grace);
            if !is_up {
                let length = fs::metadata(self.log()).map_or(0, |log| log.len());
                if length != said.0 {
                    said = (length, Instant::now());
                    is_up = self.has_init();
                }
            }
            let silent = self.can_retry && said.1.elapsed() > self.times(SILENCE);
            let still = !is_up && (silent || started.elapsed() > self.boot_limit());
            if late || stuck || still {
                child.kill().context("stop QEMU")?;
                child.wait().context("wait for QEMU")?;
                return Ok(match (late, stuck) {
                    (true, _) => End::Late(self.timeout.unwrap_or_default()),
                    (_, true) => End::Late(grace),
                    _ => End::NoInit,
                });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn judge(
        &self,
        progress: Progress,
        output: Vec<u8>,
        end: End,
        started: Instant,
    ) -> Result<Outcome> {
        let log = self.log();
        let text = match fs::read(&log) {
            Ok(text) => text,
            // An emulator that did not start has made none.
            Err(_) if progress.verdict.is_none() => Vec::new(),
            // The part that was not read may have had a splat.
            Err(error) => return Err(error).with_context(|| format!("read {}", log.display())),
        };
        let text = String::from_utf8_lossy(&text);
        if let Some(splat) = splat::scan(&text) {
            return Err(Failure::Splat { splat, log }.into());
        }
        let tail = command::tail(since_init(&text), TAIL);
        match end {
            End::Itself => {}
            End::Late(limit) => {
                return Err(Failure::Timeout { limit, tail, log }.into());
            }
            End::NoInit => {
                let limit = started.elapsed();
                return Err(Failure::NoInit { limit, tail, log }.into());
            }
        }
        let Some(code) = progress.verdict else {
            let emulator = fs::read_to_string(self.emulator_log()).unwrap_or_default();
            return Err(Failure::NoVerdict {
                emulator: remarks(&emulator),
                tail,
                log,
            }
            .into());
        };
        let boot = progress
            .ready
            .map_or(Duration::ZERO, |ready| ready - started);
        Ok(Outcome {
            code,
            log,
            screenshots: progress.screenshots,
            output,
            boot,
            total: started.elapsed(),
        })
    }

    /// Answers the control channel until the guest is gone.
    fn serve(&self, sockets: &Sockets, served: &Served, progress: &Mutex<Progress>) {
        let Ok(monitor) = sockets.monitor.try_clone() else {
            return;
        };
        let Ok(mut monitor) = Monitor::new(monitor) else {
            return;
        };
        let mut lines = BufReader::new(&sockets.control);
        let mut line = Vec::new();
        thread::scope(|scope| {
            let mut waking: Option<(mpsc::Sender<()>, ScopedJoinHandle<'_, ()>)> = None;
            while lines
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                if let Ok(message) = serde_json::from_slice::<Value>(&line) {
                    if message.get("sleeps").is_some() {
                        let (awake, is_awake) = mpsc::channel();
                        let waker = scope.spawn(move || wake(&sockets.control, &is_awake));
                        waking = Some((awake, waker));
                    }
                    if message.get("awake").is_some() {
                        if let Some((awake, waker)) = waking.take() {
                            drop(awake);
                            let _ = waker.join();
                        }
                    }
                    let reply = self.answer(&message, &mut monitor, served, progress);
                    if message.get("ready").is_some() && self.interactive {
                        forward_input(&sockets.payload);
                    }
                    if let Some(reply) = reply {
                        let _ = (&sockets.control).write_all(format!("{reply}\n").as_bytes());
                    }
                }
                line.clear();
            }
        });
    }

    fn answer(
        &self,
        message: &Value,
        monitor: &mut Monitor,
        served: &Served,
        progress: &Mutex<Progress>,
    ) -> Option<Value> {
        // Not held while QEMU works: whoever watches the time must not wait for it.
        let progress = || progress.lock().unwrap_or_else(PoisonError::into_inner);
        if message.get("ready").is_some() {
            progress().ready = Some(Instant::now());
            return None;
        }
        if message.get("part").is_some() {
            progress().part = Some(Instant::now());
            return None;
        }
        if let Some(code) = message.get("exit").and_then(Value::as_i64) {
            progress().verdict = i32::try_from(code).ok();
            return None;
        }
        if let Some(command) = message.get("qmp") {
            return Some(
                monitor
                    .run(command)
                    .map_or_else(refusal, |value| json!({"return": value})),
            );
        }
        if message.get("sleeps").is_some() {
            return None;
        }
        if message.get("awake").is_some() {
            return Some(json!({"ok": ""}));
        }
        if let Some(request) = message.get("device") {
            return Some(served.answer(request));
        }
        if let Some(name) = message.get("screenshot").and_then(Value::as_str) {
            let taken = self.screenshot(name, monitor);
            if let Ok(path) = &taken {
                progress().screenshots.push(path.clone());
            }
            return Some(taken.map_or_else(refusal, |path| json!({"ok": path})));
        }
        Some(json!({"error": "unknown request"}))
    }

    fn screenshot(&self, name: &str, monitor: &mut Monitor) -> Result<PathBuf> {
        if !is_plain(name) {
            bail!(
                "a screenshot's name has letters, digits, `-`, `_` and `.` only, this one is `{name}`"
            );
        }
        let display = |device: &&crate::machine::Device| {
            device.arguments.iter().any(|word| word.contains("display"))
        };
        let device = self
            .machine
            .devices
            .iter()
            .find(display)
            .context("this machine has no display")?;
        fs::create_dir_all(self.screenshots)
            .with_context(|| format!("make {}", self.screenshots.display()))?;
        let path = std::path::absolute(self.screenshots.join(format!("{name}.png")))?;
        monitor.screenshot(&device.name, &path)?;
        Ok(path)
    }
}

/// Whether a program asks for a dynamic loader, which no guest has.
#[must_use]
pub fn needs_libraries(program: &[u8]) -> bool {
    /// The type of the program header that names the loader.
    const INTERPRETER: u32 = 3;
    let word = |at: usize| {
        Some(u16::from_le_bytes(
            program.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let long = |at: usize| {
        Some(u32::from_le_bytes(
            program.get(at..at + 4)?.try_into().ok()?,
        ))
    };
    let read = || -> Option<bool> {
        // A 64-bit ELF file: header table at 32, size of an entry at 54, number of entries at 56.
        if !program.starts_with(b"\x7fELF\x02") {
            return None;
        }
        let table = long(32)? as usize;
        let (size, count) = (usize::from(word(54)?), usize::from(word(56)?));
        Some((0..count).any(|entry| long(table + entry * size) == Some(INTERPRETER)))
    };
    read().unwrap_or(false)
}

/// Wakes a guest that sleeps, or is about to, by empty lines until it says that it is awake: one
/// that comes too early wakes nobody. Less and less often, so that a guest that is slow falls
/// asleep in between.
fn wake(mut control: &UnixStream, is_awake: &mpsc::Receiver<()>) {
    let mut pause = Duration::from_millis(250);
    while is_awake.recv_timeout(pause) == Err(mpsc::RecvTimeoutError::Timeout) {
        if control.write_all(b"\n").is_err() {
            return;
        }
        pause = (pause * 2).min(Duration::from_secs(16));
    }
}

fn refusal(error: anyhow::Error) -> Value {
    json!({"error": format!("{error:#}")})
}

fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

fn command_line(machine: &Machine, arch: Arch) -> String {
    let console = format!("console={}", arch.ports().console);
    // A kernel that has oopsed is of no use to a test: it ends at once.
    let mut words = vec![console.as_str(), "panic=-1", "oops=panic"];
    words.extend(arch.command_line());
    words.extend(machine.append.iter().map(String::as_str));
    words.join(" ")
}

/// QEMU takes a doubled comma for one that separates nothing.
pub(crate) fn comma_safe(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// A socket for us, and its other end for QEMU to inherit.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
    let theirs = OwnedFd::from(theirs);
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).context("let QEMU inherit a socket")?;
    Ok((ours, theirs))
}

fn copy_output(mut from: &UnixStream, output: &mut Output) -> Vec<u8> {
    let mut captured = Vec::new();
    let mut partial = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..length];
        match output {
            Output::Capture => captured.extend_from_slice(bytes),
            Output::Inherit => {
                let mut out = std::io::stdout().lock();
                let _ = out.write_all(bytes).and_then(|()| out.flush());
            }
            Output::Lines(take) => {
                partial.extend_from_slice(bytes);
                while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<_> = partial.drain(..=end).collect();
                    take(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
                }
            }
        }
    }
    if let (Output::Lines(take), false) = (output, partial.is_empty()) {
        take(&String::from_utf8_lossy(&partial));
    }
    captured
}

/// Sends what is typed to the guest, for as long as the process lives: a read of a terminal cannot
/// be called off.
fn forward_input(to: &UnixStream) -> Option<JoinHandle<()>> {
    /// The byte that a terminal makes an end of input of.
    const END: &[u8] = b"\x04";
    let mut to = to.try_clone().ok()?;
    Some(thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = [0; 1024];
        while let Ok(length @ 1..) = input.read(&mut buffer) {
            if to.write_all(&buffer[..length]).is_err() {
                return;
            }
        }
        if !std::io::stdin().is_terminal() {
            let _ = to.write_all(END);
        }
    }))
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

    #[test]
    fn names_of_screenshots_stay_in_their_folder() {
        assert!(is_plain("after-revoke_2.x"));
        for name in ["", "../x", "a/b", ".hidden", "a b"] {
            assert!(!is_plain(name), "{name}");
        }
    }

    #[test]
    fn this_test_needs_libraries_and_a_script_does_not() {
        let this = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(needs_libraries(&this), !cfg!(target_feature = "crt-static"));
        assert!(!needs_libraries(b"#!/bin/sh\n"));
        assert!(!needs_libraries(b"\x7fELF\x02"));
    }

    #[test]
    fn output_is_given_line_by_line() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"one\r\ntwo\npart").unwrap();
        drop(ours);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let mut output = Output::Lines(Box::new(move |line| {
            seen.lock().unwrap().push(line.to_owned())
        }));
        copy_output(&theirs, &mut output);
        assert_eq!(*lines.lock().unwrap(), ["one", "two", "part"]);
    }

    #[test]
    fn the_kernel_stops_at_its_first_oops_and_sees_devices_through_the_iommu() {
        let mut machine = Machine::new(Vec::new());
        machine.append.push("extra=1".to_owned());
        let has = |arch, word| {
            let line = command_line(&machine, arch);
            assert!(line.split(' ').any(|have| have == word), "{line}: {word}");
        };
        for word in ["oops=panic", "intel_iommu=on", "iommu=nopt", "extra=1"] {
            has(Arch::Amd64, word);
        }
        for word in ["oops=panic", "iommu.passthrough=0", "extra=1"] {
            has(Arch::Arm64, word);
        }
    }

    #[test]
    fn only_remarks_of_interest_are_shown() {
        let said =
            "qemu: warning: TCG doesn't support requested feature: X\nqemu: no such device\n";
        assert_eq!(remarks(said), "qemu: no such device");
        assert_eq!(remarks(""), "(nothing)");
    }

    #[test]
    fn the_tail_begins_where_init_does() {
        assert!(since_init("boot\nbarlease-lab: init started\nmore\n").starts_with("barlease-lab"));
        assert_eq!(since_init("boot\n"), "boot\n");
    }

    #[test]
    fn only_the_emulators_fault_is_tried_again() {
        let failed = |log: &str| {
            let splat = splat::scan(log).unwrap();
            Err(Failure::Splat {
                splat,
                log: PathBuf::new(),
            }
            .into())
        };
        assert!(emulator_fault(&failed("Oops: int3: 0000 [#1]\n")).is_some());
        let after_init = failed("barlease-lab: init started\nOops: int3: 0000 [#1]\n");
        assert_eq!(emulator_fault(&after_init), None);
        assert_eq!(emulator_fault(&failed("Oops: 0002 [#1]\n")), None);
        let late = Failure::Timeout {
            limit: TIMEOUT,
            tail: String::new(),
            log: PathBuf::new(),
        };
        assert_eq!(emulator_fault(&Err(late.into())), None);
        let still = Failure::NoInit {
            limit: BOOT,
            tail: String::new(),
            log: PathBuf::new(),
        };
        assert!(emulator_fault(&Err(still.into())).is_some());
    }

    #[test]
    fn a_failure_names_its_log() {
        let splat = splat::scan("WARNING: x\n").unwrap();
        let text = Failure::Splat {
            splat,
            log: PathBuf::from("/run/console.log"),
        }
        .to_string();
        assert!(
            text.contains("/run/console.log") && text.contains("WARNING: x"),
            "{text}"
        );
    }
}
