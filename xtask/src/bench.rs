//! `cargo xtask bench`: stock vfio-pci and Barlease side by side, in a guest.

mod compare;
mod page;
mod plot;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use barlease_bench::report::{Clock, Report};
use barlease_lab::emulator::Accel;
use barlease_lab::prepare::{Prepared, Request, prepare};
use barlease_lab::preset::Preset;
use barlease_lab::report::seconds;
use barlease_lab::run::{Output, Run, accel};
use barlease_lab::system::Root;
use clap::{Args, ValueEnum};

use crate::choice::KernelChoice;
use crate::system::with_service;
use crate::{checkout, kmod};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    kernel: KernelChoice,
    /// Fewer rounds and shorter curves, to see that all works
    #[arg(long)]
    quick: bool,
    /// Only measures whose name has one of these in it, such as `export,touch`
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Only with this clock [default: both, one guest each]
    #[arg(long)]
    clock: Option<ClockChoice>,
    /// Put the results where the documentation has them, instead of the target folder; with
    /// `--clock`, those of the other one stay
    #[arg(long, conflicts_with_all = ["quick", "only", "compare"])]
    publish: bool,
    /// Show in which of the kernel's functions the two sides differ, for each point that is timed
    #[arg(long, conflicts_with_all = ["publish", "compare"])]
    profile: bool,
    /// Say how the ratios differ from those that the documentation has
    #[arg(long)]
    compare: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ClockChoice {
    /// Time; under emulation other work of the host shows
    Time,
    /// Instructions of the guest, always emulated; repeatable, and blind to what devices cost
    Instructions,
}

/// Far more than what it takes.
const LIMIT: Duration = Duration::from_secs(1800);

/// The set that is taken in a guest with systemd, and what it runs there: the program that installs
/// the service for the device `big`, and then ours.
const MANAGER: &str = "service-manager";
const INSTALLED: [&str; 6] = [
    "/lab/bin/lab_service",
    "0000:00:04.0",
    "/lab/service",
    "run",
    "/lab/bin/barlease-bench",
    "system",
];

/// The measures of [`regressions`]: cheap, and the same each time when instructions are counted.
const REPEATABLE: &[&str] = &["export", "importer", "touch", "take-away", "descriptor"];

/// Measures what is repeatable, counted in instructions, and says how it differs from what the
/// documentation has.
pub(crate) fn regressions(prepared: &Prepared) -> Result<()> {
    let module = kmod::build(prepared, false)?;
    let program = checkout::guest_program(prepared, "barlease-bench", "barlease-bench")?;
    let options = Options {
        kernel: KernelChoice { kernel: None },
        quick: true,
        only: REPEATABLE.iter().copied().map(str::to_owned).collect(),
        clock: Some(ClockChoice::Instructions),
        publish: false,
        profile: false,
        compare: true,
    };
    let report = in_guest(&options, prepared, &module, &program, Clock::Instructions)?;
    compare::print(&report)
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    let prepared = prepare(&Request {
        kernel: options.kernel.kernel.clone(),
        update: false,
    })?;
    let module = kmod::build(&prepared, false)?;
    let program = checkout::guest_program(&prepared, "barlease-bench", "barlease-bench")?;
    let folder = if options.publish {
        checkout::top().join("docs/benchmarks")
    } else {
        checkout::target().join("bench")
    };
    fs::create_dir_all(&folder).with_context(|| format!("make the folder {}", folder.display()))?;

    let mut reports = Vec::new();
    for (choice, clock) in [
        (ClockChoice::Time, Clock::Time),
        (ClockChoice::Instructions, Clock::Instructions),
    ] {
        let path = folder.join(format!("{}.json", page::name(clock)));
        if options.clock.is_some_and(|wanted| wanted != choice) {
            if options.publish {
                reports.push(read(&path)?);
            }
            continue;
        }
        let mut report = in_guest(options, &prepared, &module, &program, clock)?;
        if clock == Clock::Time {
            println!("\nWhat needs no device is measured here.");
            let service = checkout::guest_program(
                &prepared,
                "barlease-bench-service",
                "barlease-bench-service",
            )?;
            for mut run in [native(&program), Command::new(&service)] {
                let measured = on_host(options, &mut run)?;
                report.measures.extend(measured.measures);
            }
        }
        if clock == Clock::Instructions && wants_manager(options) {
            let measured = in_system(options, &prepared, &module, &program)?;
            report.measures.extend(measured.measures);
        }
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(&path, text + "\n").with_context(|| format!("write {}", path.display()))?;
        reports.push(report);
    }
    for report in &reports {
        plot::all(report, &folder)?;
    }
    let text = page::results(&reports);
    fs::write(folder.join("results.md"), &text)?;
    println!("\n{}", page::summary(&reports));
    if options.compare {
        reports.iter().try_for_each(compare::print)?;
    }
    println!(
        "Tables, plots and JSON: {}\nAll of it took {}.",
        folder.display(),
        seconds(start.elapsed())
    );
    Ok(ExitCode::SUCCESS)
}

/// The report in a file.
fn read(path: &Path) -> Result<Report> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("read the report in {}", path.display()))
}

fn arguments(options: &Options) -> Vec<String> {
    let mut words = Vec::new();
    if options.quick {
        words.push("--quick".to_owned());
    }
    if options.profile {
        words.push("--profile".to_owned());
    }
    for only in &options.only {
        words.extend(["--only".to_owned(), only.clone()]);
    }
    words
}

/// Runs the program in a guest.
fn in_guest(
    options: &Options,
    prepared: &Prepared,
    module: &Path,
    program: &Path,
    clock: Clock,
) -> Result<Report> {
    let accel = match clock {
        Clock::Time => accel(prepared)?,
        Clock::Instructions => Accel::Counting,
    };
    println!(
        "\nA guest with the unmodified kernel {} boots ({}); its clock counts {}.",
        prepared.kernel.release,
        accel.name(),
        page::name(clock)
    );
    let run = guest(prepared, module, program)
        .file(importer(module)?, "/lib/modules/barlease_importer.ko")
        .accel(accel);
    let mut all = vec!["/lab/bin/barlease-bench".to_owned()];
    all.extend(arguments(options));
    let mut report = reported(run, all)?;
    report.system.acceleration = accel.name().to_owned();
    report.system.clock = clock;
    Ok(report)
}

/// Whether the set for a guest with systemd is wanted.
fn wants_manager(options: &Options) -> bool {
    let mut only = options.only.iter();
    only.len() == 0 || only.any(|wanted| MANAGER.contains(wanted.as_str()))
}

/// Runs the program in a guest with systemd and the service, whose clock counts instructions.
fn in_system(
    options: &Options,
    prepared: &Prepared,
    module: &Path,
    program: &Path,
) -> Result<Report> {
    println!("\nA guest with systemd boots.");
    let disk = Root::prepare(prepared, &["python3"])?.disk();
    let command = checkout::guest_program(prepared, "barlease-cli", "barlease")?;
    let run = guest(prepared, module, program)
        .system(&disk)
        .file(command, "/lab/bin/barlease")
        .accel(Accel::Counting);
    let mut all = INSTALLED.map(str::to_owned).to_vec();
    all.extend(arguments(options));
    reported(with_service(run, prepared)?, all)
}

fn guest<'a>(prepared: &'a Prepared, module: &Path, program: &Path) -> Run<'a> {
    Run::new(prepared, Preset::Bench.machine())
        .module(module)
        .file(program, "/lab/bin/barlease-bench")
        .timeout(LIMIT)
}

/// Has a guest run these words, and takes the report from what it says.
fn reported(run: Run<'_>, words: Vec<String>) -> Result<Report> {
    let report = Arc::new(Mutex::new(String::new()));
    let line = Arc::clone(&report);
    let outcome = run
        .output(Output::Lines(Box::new(move |text| {
            if text.starts_with('{') {
                *line.lock().unwrap_or_else(PoisonError::into_inner) = text.to_owned();
            } else {
                println!("{text}");
            }
        })))
        .command(words)
        .run()?;
    if outcome.code != 0 {
        bail!(
            "the benchmarks ended with exit code {}; log: {}",
            outcome.code,
            outcome.log.display()
        );
    }
    let text = report.lock().unwrap_or_else(PoisonError::into_inner);
    serde_json::from_str(&text).context("read the report")
}

/// The importer's module, of the same build.
fn importer(module: &Path) -> Result<PathBuf> {
    let folder = module.parent().context("the module is in a folder")?;
    Ok(folder.join("barlease_importer.ko"))
}

/// The part of the program that needs no device.
fn native(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("native");
    command
}

/// Runs a program that needs no device, here.
fn on_host(options: &Options, command: &mut Command) -> Result<Report> {
    let output = command
        .args(arguments(options))
        .output()
        .with_context(|| format!("start {}", command.get_program().to_string_lossy()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("the benchmarks ended with {}", output.status);
    }
    let mut report = None;
    for line in text.lines() {
        if line.starts_with('{') {
            report = Some(serde_json::from_str(line).context("read the report")?);
        } else {
            println!("{line}");
        }
    }
    report.context("the benchmarks have said nothing")
}
