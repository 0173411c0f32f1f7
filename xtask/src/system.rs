//! `cargo xtask vm system`: a guest whose root is a fresh Debian sid with systemd.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use barlease_lab::cache::Cache;
use barlease_lab::prepare::Prepared;
use barlease_lab::run::{Output, Run};
use barlease_lab::system::{Disk, Root};
use clap::Args;

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
    /// Test the guest itself: systemd is up without a failure, a lease is taken, a reboot finds
    /// what was written; and barleased from its units, through kills, restarts and whatever else
    /// happens to a service
    #[arg(long, conflicts_with_all = ["packages", "disk", "files", "stock", "command"])]
    check: bool,
    /// The command; a shell when there is none
    #[arg(last = true)]
    command: Vec<String>,
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
driver() { basename "$(readlink /sys/bus/pci/devices/0000:01:00.0/driver || true)"; }
test "$(driver)" = barlease-vfio-pci
barlease device unbind --persist 0000:01:00.0
udevadm trigger --action=add /sys/bus/pci/devices/0000:01:00.0
udevadm settle
test "$(driver)" = ""
echo found what was kept
exit 7
"#;

/// `broker/examples/lab_service.rs` says what it does.
const SERVICE: &str = "lab_service 0000:01:00.0 /lab/service";
/// It takes two minutes on a machine that does nothing else.
const SERVICE_LASTS: Duration = Duration::from_secs(1800);
/// How long the other parts of the check may take: twice what they do on a busy machine.
const BOOT_LASTS: Duration = Duration::from_secs(900);

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let prepared = options.machine.prepare()?;
    if options.check {
        return check(options, &prepared);
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
fn with_service<'a>(mut run: Run<'a>, prepared: &Prepared) -> Result<Run<'a>> {
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

fn check(options: &Options, prepared: &Prepared) -> Result<ExitCode> {
    let folder = Cache::open()?.path("systems");
    // Of another language.
    let root = Root::prepare(prepared, &["python3"])?;
    let path = folder.join(format!("check-{}.img", std::process::id()));
    let disk = root.copy_to(&path)?;
    let boots = [
        (FIRST, 0, "73 61 65 6c"),
        (SECOND, 7, "found what was kept"),
        (SERVICE, 0, "all of it works"),
    ];
    let checked = boots.into_iter().try_for_each(|(script, code, expected)| {
        let mut run = with_module(guest(options, prepared, &disk)?, prepared)?;
        let mut lasts = BOOT_LASTS;
        if script == SERVICE {
            run = with_service(run, prepared)?;
            lasts = SERVICE_LASTS;
        }
        let outcome = run
            .output(Output::Capture)
            .timeout(options.timeout.map_or(lasts, Duration::from_secs))
            .command(["sh", "-c", script])
            .run()?;
        let said = String::from_utf8_lossy(&outcome.output);
        print!("{said}");
        eprint!("{}", remarks(&outcome));
        if outcome.code != code || !said.contains(expected) {
            bail!("exit code {code} and `{expected}` were expected");
        }
        Ok(())
    });
    std::fs::remove_file(&path)?;
    checked.map(|()| ExitCode::SUCCESS)
}
