//! `cargo xtask vm`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use barlease_lab::cache::Cache;
use barlease_lab::debug::Watch;
use barlease_lab::kmod::DRIVER;
use barlease_lab::plan::Plan;
use barlease_lab::prepare::{self, Prepared, Request, prepare};
use barlease_lab::preset::Preset;
use barlease_lab::run::{Run, accel};
use clap::{Args, Subcommand};

use crate::choice::{KernelChoice, MachineChoice};
use crate::guest::{Placed, finish, in_lab, with_environment, with_module};
use crate::{checkout, guest_tests, system};

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Download and build what guests and the module need
    Prepare {
        #[command(flatten)]
        kernel: KernelChoice,
        /// Look again at what the mirror has, and take the newest
        #[arg(long)]
        update: bool,
    },
    /// Run a command in a guest, and end with its exit code
    Exec(Exec),
    /// Run a test binary in a guest: what cargo's runner calls
    Test(Test),
    /// Run some of the test binaries in one guest, one after the other, as `cargo xtask test` does
    Together {
        #[command(flatten)]
        kernel: KernelChoice,
        /// Files of guest-tests/tests, without .rs; the machine is that of the first
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// A shell in a guest, with the module loaded and all devices bound
    Shell {
        #[command(flatten)]
        machine: MachineChoice,
    },
    /// A shell, or a command, in a guest whose root is a fresh Debian sid with systemd; the module
    /// is loaded
    System(system::Options),
    /// List the machines, and the kernels that the cache has
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove everything from the cache
    Clean,
}

#[derive(Args, Debug)]
pub(crate) struct Exec {
    #[command(flatten)]
    machine: MachineChoice,
    /// Put a file into the guest, at /lab/bin when no place is given
    #[arg(long = "file", value_name = "FILE[:PLACE]")]
    files: Vec<Placed>,
    /// Seconds that the guest may take, boot and all [default: 360, and 1800 on a debug kernel]
    #[arg(long)]
    timeout: Option<u64>,
    /// Without our module
    #[arg(long)]
    stock: bool,
    /// Bind all devices before the command starts, to vfio-pci with --stock
    #[arg(long)]
    bind: bool,
    /// Parameters for our module, such as msix_export=always
    #[arg(long, default_value = "", value_name = "WORDS")]
    module_parameters: String,
    /// The folder for screenshots
    #[arg(long, value_name = "FOLDER")]
    screenshots: Option<PathBuf>,
    /// The command. A path of the host names a program that is copied into the guest; it must
    /// be statically linked
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Test {
    /// The test binary, statically linked
    binary: PathBuf,
    /// Arguments for it, as libtest takes them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) arguments: Vec<String>,
}

pub(crate) fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Prepare { kernel, update } => {
            let prepared = prepare(&Request {
                kernel: kernel.kernel,
                update,
            })?;
            let accel = accel(&prepared)?;
            println!("kernel   {}", prepared.kernel.name);
            println!("compiler {}", prepared.rustc);
            println!("guests   {}", accel.name());
            let against = if prepared.kernel.watches().is_some() {
                "build   "
            } else {
                "overlay "
            };
            println!("{against} {}", prepared.overlay.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Exec(options) => exec(&options),
        Task::Test(options) => guest_tests::one(&options.binary, &options.arguments),
        Task::Together { kernel, names } => guest_tests::together(kernel.kernel, names),
        Task::Shell { machine } => shell(&machine),
        Task::System(options) => system::run(&options),
        Task::List { json } => list(json),
        Task::Clean => {
            Cache::open()?.clean()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn exec(options: &Exec) -> Result<ExitCode> {
    let mut command = options.command.clone();
    let program = program_to_copy(&command[0])?;
    let prepared = options.machine.prepare()?;
    let mut run = Run::new(&prepared, options.machine.preset.machine());
    if let Some(seconds) = options.timeout {
        run = run.timeout(Duration::from_secs(seconds));
    }
    if !options.stock {
        run = with_module(run, &prepared)?.module_parameters(&options.module_parameters);
    }
    if options.bind {
        run = run.bind(if options.stock { "vfio-pci" } else { DRIVER });
    }
    if let Some(program) = program {
        command[0] = in_lab(&program)?;
        run = run.file(program, &command[0]);
    }
    for placed in &options.files {
        run = run.file(&placed.file, &placed.place);
    }
    if let Some(folder) = &options.screenshots {
        run = run.screenshots(folder);
    }
    finish(&with_environment(run).command(command).run()?)
}

/// The program that a command's first word names on the host, if it names one by a path.
fn program_to_copy(word: &str) -> Result<Option<PathBuf>> {
    let path = PathBuf::from(word);
    if !word.contains('/') || !path.is_file() {
        return Ok(None);
    }
    let content = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    if barlease_lab::programs::needs_libraries(&content) {
        bail!(
            "{} is linked dynamically and the guest has no libraries: build it with \
             RUSTFLAGS='-C target-feature=+crt-static' --target x86_64-unknown-linux-gnu. \
             (The guest's own commands are named without a path: `ls`.)",
            path.display()
        );
    }
    Ok(Some(path))
}

fn shell(choice: &MachineChoice) -> Result<ExitCode> {
    let prepared = choice.prepare()?;
    let machine = choice.preset.machine();
    let banner = banner(&prepared);
    let command = checkout::guest_program(&prepared, "barlease-cli", "barlease")?;
    let run = with_module(Run::new(&prepared, machine), &prepared)?
        .file(command, "/lab/bin/barlease")
        .bind(DRIVER)
        .shell(banner);
    finish(&run.run()?)
}

fn banner(prepared: &Prepared) -> String {
    format!(
        "\n{} with barlease_vfio_pci loaded. Try\n\
         \x20 barlease --help                     what can be leased, and how\n\
         \x20 cat /lab/devices                    what is there, and what it is good for\n\
         \x20 ls /sys/bus/pci/drivers/{DRIVER}\n\
         \x20 ls /sys/kernel/debug                barlease has its own folder here\n\
         \x20 dmesg | tail\n\
         \x20 su holder1                          as a user without rights; also holder2, holder3, owner\n\
         \x20 exit                                powers off\n\n",
        prepared.kernel.release
    )
}

fn list(json: bool) -> Result<ExitCode> {
    let cache = Cache::open()?;
    let plan = prepare::plan(&cache);
    let machines: Vec<_> = Preset::ALL.map(|preset| (preset, preset.machine())).into();
    if json {
        let kernels: Vec<_> = plan
            .iter()
            .flat_map(|plan| plan.kernels.iter().map(move |kernel| (plan, kernel)))
            .map(|(plan, kernel)| {
                serde_json::json!({
                    "release": kernel.release,
                    "version": kernel.version,
                    "refusal": kernel.refusal,
                    "ready": prepare::is_ready(&cache, plan, kernel),
                })
            })
            .chain(
                debug_kernels(&cache, plan.as_ref())
                    .into_iter()
                    .map(|(name, _, ready)| serde_json::json!({"release": name, "ready": ready})),
            )
            .collect();
        let presets: Vec<_> = machines
            .iter()
            .map(|(preset, machine)| serde_json::json!({"preset": preset, "machine": machine}))
            .collect();
        println!(
            "{}",
            serde_json::json!({"cache": cache.path(""), "kernels": kernels, "presets": presets})
        );
        return Ok(ExitCode::SUCCESS);
    }
    println!("cache: {}", cache.path("").display());
    match &plan {
        None => println!("kernels: none yet, `cargo xtask vm prepare` gets one"),
        Some(plan) => {
            println!("compiler: {}\nkernels:", plan.rustc);
            for kernel in &plan.kernels {
                let ready = if prepare::is_ready(&cache, plan, kernel) {
                    ", ready"
                } else {
                    ""
                };
                println!("{}{ready}", kernel.verdict());
            }
            for (name, watch, ready) in debug_kernels(&cache, Some(plan)) {
                let ready = if ready { ", ready" } else { "" };
                println!(
                    "  {name} (built here, {}): can be used{ready}",
                    watch.means()
                );
            }
        }
    }
    for (preset, machine) in machines {
        println!(
            "preset {preset}: {} processors, {} MiB",
            machine.processors, machine.memory
        );
        for device in machine.devices {
            if let Some(bdf) = device.bdf {
                println!("  {bdf}  {:8}  {}", device.name, device.about);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The lab's own kernels from the newest source: name, what it watches or lacks, and whether it is
/// ready.
fn debug_kernels(cache: &Cache, plan: Option<&Plan>) -> Vec<(String, Watch, bool)> {
    let newest = plan.and_then(|plan| Some((plan, plan.kernel(None).ok()?)));
    let Some((plan, kernel)) = newest else {
        return Vec::new();
    };
    let describe = |watch| {
        let ready = prepare::is_debug_ready(cache, plan, kernel, watch);
        (watch.kernel_name(kernel), watch, ready)
    };
    Watch::ALL.map(describe).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_of_the_guest_is_not_copied() {
        assert_eq!(program_to_copy("ls").unwrap(), None);
        assert_eq!(program_to_copy("/lab/bin/no-such-file").unwrap(), None);
    }
}
