//! `cargo xtask vm system`: a guest whose root is a fresh Debian sid with systemd.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use barlease_lab::cache::Cache;
use barlease_lab::prepare::Prepared;
use barlease_lab::report::seconds;
use barlease_lab::run::{Output, Run};
use barlease_lab::system::{Disk, Root};
use clap::{Args, ValueEnum};

use crate::checkout;
use crate::choice::MachineChoice;
use crate::guest::{Placed, finish, remarks, with_environment, with_module};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    machine: MachineChoice,
    /// Packages of Debian sid to install beside systemd
    #[arg(long = "package", value_name = "NAME")]
    packages: Vec<String>,
    /// A file for the disk, made when it is not there; without one all changes are gone at the end
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Put a file into the guest, at /lab/bin when no place is given
    #[arg(long = "file", value_name = "FILE[:PLACE]")]
    files: Vec<Placed>,
    /// Without our module
    #[arg(long)]
    stock: bool,
    /// Seconds that the guest may take, boot and all
    #[arg(long)]
    timeout: Option<u64>,
    /// Test what needs such a guest: all of it, or a part
    #[arg(long, value_name = "PART", num_args = 0..=1, value_delimiter = ',',
          conflicts_with_all = ["packages", "disk", "files", "stock", "command"])]
    check: Option<Vec<Part>>,
    /// The command; a shell when there is none
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The guest itself: systemd is up without a failure, a lease is taken, a reboot finds what was
    /// written
    Boots,
    /// barleased from its units, through kills, restarts and whatever else happens to a service
    Service,
    /// Containers of podman, and of containerd through CRI, that lease by claims
    Containers,
}

/// The machine that is checked has a device with memory here.
const FIRST: &str = r#"
set -eu
test "$(cat /proc/1/comm)" = systemd
systemctl is-system-running || { systemctl --failed --no-pager; exit 1; }
barlease device bind 0000:01:00.0
barlease lease grant 0000:01:00.0 --bar 2 --range 4K+8K --uid 1001 --socket /tmp/lease </dev/null &
until [ -S /tmp/lease ]; do sleep 0.1; done
runuser -u holder1 -- barlease lease write /tmp/lease 0 0x6c656173
runuser -u holder1 -- barlease lease dump /tmp/lease --range 0+4
kill -TERM $!
wait $! || true
test ! -e /var/lib/kept
uname -r >/var/lib/kept
driver() { basename "$(readlink /sys/bus/pci/devices/0000:01:00.0/driver || true)"; }
barlease device unbind 0000:01:00.0
barlease device bind --persist 0000:01:00.0
barlease device unbind 0000:01:00.0
test "$(driver)" = ""
udevadm trigger --action=add /sys/bus/pci/devices/0000:01:00.0
udevadm settle
test "$(driver)" = barlease-vfio-pci
"#;

const SECOND: &str = r#"
set -eu
systemctl is-system-running
test "$(cat /var/lib/kept)" = "$(uname -r)"
# An emulated machine is up before udev has looked at all devices.
udevadm settle --timeout=300
driver() { basename "$(readlink /sys/bus/pci/devices/0000:01:00.0/driver || true)"; }
test "$(driver)" = barlease-vfio-pci
barlease device unbind --persist 0000:01:00.0
udevadm trigger --action=add /sys/bus/pci/devices/0000:01:00.0
udevadm settle
test "$(driver)" = ""
echo found what was kept
exit 7
"#;

/// `broker/examples/lab_service` says what these do.
const SERVICE: &str = "lab_service 0000:01:00.0 /lab/service";
const CONTAINERS: &str = "lab_service 0000:01:00.0 /lab/service containers";
/// They take some minutes on a machine that does nothing else.
const SERVICE_LASTS: Duration = Duration::from_secs(1800);
/// How long the other parts of the check may take: twice what they do on a busy machine.
const BOOT_LASTS: Duration = Duration::from_secs(900);

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let prepared = options.machine.prepare()?;
    if let Some(parts) = &options.check {
        let all = Part::value_variants();
        let parts = if parts.is_empty() { all } else { parts };
        for part in parts {
            check(options, &prepared, *part)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let packages: Vec<_> = options.packages.iter().map(String::as_str).collect();
    let disk = match &options.disk {
        None => Root::prepare(&prepared, &packages)?.disk(),
        Some(path) if path.exists() => Disk::at(path),
        Some(path) => Root::prepare(&prepared, &packages)?.copy_to(path)?,
    };
    let mut run = guest(options, &prepared, &disk)?;
    if !options.stock {
        run = with_module(run, &prepared)?;
    }
    for placed in &options.files {
        run = run.file(&placed.file, &placed.place);
    }
    let run = if options.command.is_empty() {
        run.shell(format!(
            "\nDebian with systemd on {}; barlease is in /lab/bin, its devices are in /lab/devices. \
             exit powers off\n\n",
            prepared.kernel.release
        ))
    } else {
        with_environment(run).command(&options.command)
    };
    finish(&run.run()?)
}

fn guest<'a>(options: &Options, prepared: &'a Prepared, disk: &Disk) -> Result<Run<'a>> {
    let command = checkout::guest_program(prepared, "barlease-cli", "barlease")?;
    let run = Run::new(prepared, options.machine.preset.machine())
        .system(disk)
        .file(command, "/lab/bin/barlease");
    Ok(match options.timeout {
        Some(seconds) => run.timeout(Duration::from_secs(seconds)),
        None => run,
    })
}

/// barleased and what its package has.
pub(crate) fn with_service<'a>(mut run: Run<'a>, prepared: &Prepared) -> Result<Run<'a>> {
    let units = checkout::top().join("dist/systemd");
    for entry in std::fs::read_dir(units)?.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        run = run.file(entry.path(), format!("/lab/service/{name}"));
    }
    let daemon = checkout::guest_program(prepared, "barleased", "barleased")?;
    let example = checkout::guest_example(prepared, "barleased", "lab_service")?;
    Ok(run
        .file(daemon, "/lab/service/barleased")
        .file(example, "/lab/bin/lab_service"))
}

impl Part {
    /// Packages of Debian's that it needs beside systemd.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Boots => &[],
            // For a program in another language, and for whoever collects metrics.
            Self::Service => &["python3", "systemd-report"],
            Self::Containers => &[
                "busybox-static",
                "containerd",
                "crun",
                "podman",
                "python3-grpcio",
                "runc",
            ],
        }
    }

    /// The command of each boot, its exit code, and the text that it has to print.
    fn boots(self) -> &'static [(&'static str, i32, &'static str)] {
        match self {
            Self::Boots => &[
                (FIRST, 0, "73 61 65 6c"),
                (SECOND, 7, "found what was kept"),
            ],
            Self::Service => &[(SERVICE, 0, "all of it works")],
            Self::Containers => &[(CONTAINERS, 0, "all of it works")],
        }
    }

    fn lasts(self) -> Duration {
        match self {
            Self::Boots => BOOT_LASTS,
            Self::Service | Self::Containers => SERVICE_LASTS,
        }
    }
}

/// Removes the disks of checks that were interrupted.
fn remove_left(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)?.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let of = name
            .strip_prefix("check-")
            .and_then(|name| name.strip_suffix(".img"));
        if of.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn check(options: &Options, prepared: &Prepared, part: Part) -> Result<()> {
    let folder = Cache::open()?.path("systems");
    let root = Root::prepare(prepared, part.packages())?;
    remove_left(&folder)?;
    let path = folder.join(format!("check-{}.img", std::process::id()));
    let disk = root.copy_to(&path)?;
    let boot = |(script, code, expected): &(&str, i32, &str)| {
        let mut run = with_module(guest(options, prepared, &disk)?, prepared)?;
        if part != Part::Boots {
            run = with_service(run, prepared)?;
        }
        let lasts = options.timeout.map_or(part.lasts(), Duration::from_secs);
        let said = Arc::new(Mutex::new(String::new()));
        let saying = Arc::clone(&said);
        let outcome = run
            .output(Output::Lines(Box::new(move |line| {
                println!("{line}");
                let mut said = saying.lock().unwrap_or_else(PoisonError::into_inner);
                *said += line;
            })))
            .timeout(lasts)
            .command(["sh", "-c", script])
            .run()?;
        let said = said.lock().unwrap_or_else(PoisonError::into_inner);
        eprint!("{}", remarks(&outcome));
        if outcome.code != *code || !said.contains(expected) {
            bail!("exit code {code} and `{expected}` were expected");
        }
        Ok(())
    };
    let start = Instant::now();
    let checked = part.boots().iter().try_for_each(boot);
    std::fs::remove_file(&path)?;
    println!("{part:?}: {}", seconds(start.elapsed()));
    checked
}
