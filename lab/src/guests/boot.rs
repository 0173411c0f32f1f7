//! One boot: starts the emulator, waits for the guest's end or brings it about, and judges it.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};

use crate::guests::control::{Control, Progress};
use crate::guests::emulator::{Accel, comma_safe};
use crate::guests::machine::Machine;
use crate::guests::outcome::{Failure, Outcome, TAIL, remarks, since_init};
use crate::guests::output::{Copied, Output, copy_output};
use crate::guests::served::{self, Served};
use crate::guests::splat::{self, INIT_STARTED};
use crate::guests::terminal::RawTerminal;
use crate::kernels::prepare::Prepared;
use crate::packages::arch::Arch;
use crate::packages::command;

/// QEMU's names of its sockets, and the descriptors that it has them as.
const SOCKETS: [(&str, RawFd); 3] = [("payload", 3), ("control", 4), ("monitor", 5)];

/// How long a guest may take until its init starts, on a kernel of Debian's; twice that on a debug
/// kernel, which takes 20 s. Of some hundred guests an emulated one stands still while it brings up
/// its second processor.
const BOOT: Duration = Duration::from_secs(120);

/// How long a guest may say nothing until its init starts, unless it cannot be booted again; twice
/// that on a debug kernel. One that stands still is found out by that sooner than by the time that
/// it takes.
const SILENCE: Duration = Duration::from_secs(30);

/// One boot.
pub(crate) struct Guest<'a> {
    pub(crate) prepared: &'a Prepared,
    pub(crate) machine: &'a Machine,
    pub(crate) accel: Accel,
    pub(crate) folder: &'a Path,
    /// QEMU's arguments for the kernel, or for firmware that loads it.
    pub(crate) loader: &'a [OsString],
    /// Whether that is firmware, which takes its time.
    pub(crate) by_firmware: bool,
    pub(crate) screenshots: &'a Path,
    pub(crate) interactive: bool,
    pub(crate) timeout: Option<Duration>,
    /// The time that it has to power off, on a kernel that does not watch itself.
    pub(crate) power_off: Duration,
    /// Whether it is booted again when its init does not start.
    pub(crate) can_retry: bool,
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

/// Our ends of the three sockets.
struct Sockets {
    payload: UnixStream,
    control: UnixStream,
    monitor: UnixStream,
}

impl Guest<'_> {
    /// Boots it, and waits for its end.
    pub(crate) fn boot(&self, output: &mut Output) -> Result<Outcome> {
        let started = Instant::now();
        let served = Served::start(self.machine, self.folder)?;
        let log = fs::File::create(self.folder.join("payload.log"))?;
        let (mut child, sockets) = self.start(&served)?;
        let progress = Mutex::new(Progress::default());
        let control = Control {
            channel: &sockets.control,
            monitor: &sockets.monitor,
            payload: self.interactive.then_some(&sockets.payload),
            machine: self.machine,
            served: &served,
            screenshots: self.screenshots,
            progress: &progress,
        };
        let terminal = if self.interactive {
            RawTerminal::take()?
        } else {
            None
        };
        let captured = thread::scope(|scope| -> Result<_> {
            let copy = scope.spawn(|| copy_output(&sockets.payload, output, log));
            scope.spawn(|| control.serve());
            let waited = self.wait(&mut child, &progress, started);
            if waited.is_err() {
                let _ = child.kill();
                let _ = child.wait();
            }
            let gone = Instant::now();
            let copied = copy.join();
            if let Ok(copied) = &copied {
                self.note_early_end(copied, gone);
            }
            waited.map(|end| {
                (
                    copied.map_or_else(|_| Vec::new(), |copied| copied.captured),
                    end,
                )
            })
        });
        drop(terminal);
        let (output, end) = captured?;
        let progress =
            std::mem::take(&mut *progress.lock().unwrap_or_else(PoisonError::into_inner));
        self.judge(progress, output, end, started)
    }

    /// Says in the emulator's log that the command's port was closed while the guest ran: what the
    /// guest wrote to it from then on is lost.
    fn note_early_end(&self, copied: &Copied, gone: Instant) {
        let early = gone.saturating_duration_since(copied.at);
        if early < Duration::from_secs(1) {
            return;
        }
        let how = match &copied.end {
            Ok(_) => "the emulator closed it".to_owned(),
            Err(error) => format!("reading it failed: {error}"),
        };
        let note =
            format!("barlease-lab: the command's port ended {early:.1?} before the guest: {how}");
        eprintln!("{note}");
        let log = fs::OpenOptions::new()
            .append(true)
            .open(self.emulator_log());
        let _ = log.and_then(|mut log| writeln!(log, "{note}"));
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
        let mut emulator = self.emulator();
        // No other child of this process gets them, be it started at the same time: a socket ends
        // when the last process that has it does.
        let ends = [payload_end, control_end, monitor_end];
        let mappings = SOCKETS.iter().zip(ends);
        let mappings = mappings.map(|((_, child_fd), parent_fd)| FdMapping {
            parent_fd,
            child_fd: *child_fd,
        });
        emulator
            .fd_mappings(mappings.collect())
            .context("give QEMU its sockets")?;
        let child = emulator
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

    fn emulator(&self) -> Command {
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
        for (id, fd) in SOCKETS {
            command.args(["-chardev", &format!("socket,id={id},fd={fd}")]);
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
}

pub(crate) fn command_line(machine: &Machine, arch: Arch) -> String {
    let console = format!("console={}", arch.ports().console);
    // A kernel that has oopsed is of no use to a test: it ends at once.
    let mut words = vec![console.as_str(), "panic=-1", "oops=panic"];
    words.extend(arch.command_line());
    words.extend(machine.append.iter().map(String::as_str));
    words.join(" ")
}

/// A socket for us, and its other end for QEMU.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
    Ok((ours, theirs.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
