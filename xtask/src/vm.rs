//! `cargo xtask vm`

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use barlease_lab::cache::Cache;
use barlease_lab::debug::Watch;
use barlease_lab::emulator::accel;
use barlease_lab::kmod::DRIVER;
use barlease_lab::machine::Preset;
use barlease_lab::plan::Plan;
use barlease_lab::prepare::{self, Prepared, Request, prepare};
use barlease_lab::report::seconds;
use barlease_lab::splat;
use barlease_lab::vm::{Outcome, Run};
use clap::{Args, Subcommand};

use crate::batch::Batch;
use crate::{KernelChoice, applies, checkout, kmod, pool, system};

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

#[derive(Args, Clone, Debug)]
pub(crate) struct MachineChoice {
    #[command(flatten)]
    kernel: KernelChoice,
    /// The machine, see `cargo xtask vm list`
    #[arg(
        long,
        default_value = "full",
        env = "BARLEASE_PRESET",
        hide_env_values = true
    )]
    pub(crate) preset: Preset,
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
    /// The command. A path of this machine names a program that is copied into the guest; it must
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

/// A file and its place in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) file: PathBuf,
    pub(crate) place: String,
}

impl FromStr for Placed {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (file, place) = match text.rsplit_once(':') {
            Some((file, place)) => (PathBuf::from(file), place.to_owned()),
            None => (PathBuf::from(text), in_lab(Path::new(text))?),
        };
        if !place.starts_with('/') {
            bail!("the place in the guest is a full path, not `{place}`");
        }
        Ok(Self { file, place })
    }
}

fn in_lab(file: &Path) -> Result<String> {
    let name = file
        .file_name()
        .with_context(|| format!("{} names no file", file.display()))?;
    Ok(format!("/lab/bin/{}", name.to_string_lossy()))
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
        Task::Test(options) => test(&options),
        Task::Together { kernel, names } => together(kernel, names),
        Task::Shell { machine } => shell(&machine),
        Task::System(options) => system::run(&options),
        Task::List { json } => list(json),
        Task::Clean => {
            Cache::open()?.clean()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl MachineChoice {
    pub(crate) fn prepare(&self) -> Result<Prepared> {
        prepare(&Request {
            kernel: self.kernel.kernel.clone(),
            update: false,
        })
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

/// The program that a command's first word names on this machine, if it names one by a path.
fn program_to_copy(word: &str) -> Result<Option<PathBuf>> {
    let path = PathBuf::from(word);
    if !word.contains('/') || !path.is_file() {
        return Ok(None);
    }
    let content = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    if barlease_lab::vm::needs_libraries(&content) {
        bail!(
            "{} is linked dynamically and the guest has no libraries: build it with \
             RUSTFLAGS='-C target-feature=+crt-static' --target x86_64-unknown-linux-gnu. \
             (The guest's own commands are named without a path: `ls`.)",
            path.display()
        );
    }
    Ok(Some(path))
}

/// Our module, and those of the same build beside it without loading them.
pub(crate) fn with_module<'a>(run: Run<'a>, prepared: &Prepared) -> Result<Run<'a>> {
    with_modules_of(run, &kmod::build(prepared, false)?)
}

/// The same, of a build that has been made.
fn with_modules_of<'a>(mut run: Run<'a>, module: &Path) -> Result<Run<'a>> {
    let folder = module.parent().unwrap_or(Path::new("."));
    for entry in std::fs::read_dir(folder)?.filter_map(Result::ok) {
        let path = entry.path();
        if path != module && path.extension().is_some_and(|extension| extension == "ko") {
            let name = entry.file_name().to_string_lossy().into_owned();
            run = run.file(path, format!("/lib/modules/{name}"));
        }
    }
    Ok(run.module(module))
}

/// Variables that mean the same in the guest.
pub(crate) fn with_environment(mut run: Run<'_>) -> Run<'_> {
    for (name, value) in std::env::vars() {
        if name.starts_with("BARLEASE_TEST_")
            || ["CI", "RUST_BACKTRACE", "RUST_LOG", "RUST_TEST_NOCAPTURE"].contains(&name.as_str())
        {
            run = run.env(name, value);
        }
    }
    run
}

pub(crate) fn finish(outcome: &Outcome) -> Result<ExitCode> {
    eprint!("{}", remarks(outcome));
    Ok(ExitCode::from(
        u8::try_from(outcome.code).unwrap_or(u8::MAX),
    ))
}

/// The message about a guest at its end.
pub(crate) fn remarks(outcome: &Outcome) -> String {
    let mut said = String::new();
    for path in &outcome.screenshots {
        said += &format!("screenshot: {}\n", path.display());
    }
    let log = fs::read(&outcome.log).unwrap_or_default();
    let races = splat::races_of_others(&String::from_utf8_lossy(&log));
    if races != 0 {
        said += &format!(
            "data races of the kernel's own code, without us: {races} reports in {}\n",
            outcome.log.display()
        );
    }
    said += &format!(
        "guest: up after {}, done after {}, exit code {}\n",
        seconds(outcome.boot),
        seconds(outcome.total),
        outcome.code
    );
    said
}

fn test(options: &Test) -> Result<ExitCode> {
    let name = name_of(&options.binary);
    if runs_nothing(options) {
        let status = Command::new(&options.binary)
            .args(&options.arguments)
            .status();
        let status = status.with_context(|| format!("start {}", options.binary.display()))?;
        return Ok(ExitCode::from(
            status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(u8::MAX),
        ));
    }
    let choice = MachineChoice {
        kernel: KernelChoice { kernel: None },
        preset: match std::env::var("BARLEASE_PRESET") {
            Ok(name) => name.parse()?,
            Err(_) => Preset::of_tests(&file_stem(&options.binary)),
        },
    };
    let prepared = choice.prepare()?;
    let lacks = applies::lacks(&prepared.kernel);
    eprint!("{}", applies::remarks(&lacks, &[&name]));
    if applies::refusal(&lacks, &name).is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    // Cargo has built it for this machine.
    let binary = if prepared.kernel.arch().is_native() {
        options.binary.clone()
    } else {
        pool::binary_called(&prepared, &name)?
    };
    let place = in_lab(&binary)?;
    let run = Run::new(&prepared, choice.preset.machine()).file(&binary, &place);
    if file_stem(&options.binary).starts_with("as_stock") && prepared.kernel.watches().is_none() {
        kmod::build_as_stock(&prepared, false)?;
    }
    let run = as_tests_run(run, &kmod::build(&prepared, false)?)?.command(
        [place]
            .into_iter()
            .chain(options.arguments.iter().cloned())
            .chain(applies::arguments(&lacks, &name)),
    );
    finish(&run.run()?)
}

fn together(kernel: KernelChoice, names: Vec<String>) -> Result<ExitCode> {
    let prepared = prepare(&Request {
        kernel: kernel.kernel,
        update: false,
    })?;
    let only: Vec<_> = names.iter().map(String::as_str).collect();
    let binaries = pool::binaries(&prepared, &only)?;
    let pool = pool::Pool {
        binaries: &binaries,
        prepared: &prepared,
        module: &kmod::build(&prepared, false)?,
        filter: None,
        jobs: 1,
    };
    let preset = Preset::of_tests(&names[0]);
    let (_, result) = pool.run_batches(vec![Batch { preset, names }]);
    result.map(|()| ExitCode::SUCCESS)
}

/// With our modules, and with variables and a time limit as tests have them.
pub(crate) fn as_tests_run<'a>(run: Run<'a>, module: &Path) -> Result<Run<'a>> {
    let threads = std::env::var("RUST_TEST_THREADS").unwrap_or_else(|_| "1".to_owned());
    let run = with_modules_of(run, module)?
        .env("RUST_TEST_THREADS", threads)
        // Without restartable sequences: where their page cannot be copied after a fork, for want
        // of memory, the kernel kills the process when it was interrupted
        // (`__rseq_handle_slowpath`), and tests have allocations fail.
        .env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    let run = match test_timeout()? {
        Some(limit) => run.timeout(limit),
        None => run,
    };
    Ok(with_environment(run))
}

/// The name of a test binary, without the hash that cargo adds.
fn name_of(binary: &Path) -> String {
    let stem = file_stem(binary);
    stem.rsplit_once('-')
        .map_or(stem.as_str(), |(name, _)| name)
        .to_owned()
}

fn file_stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Whether the binary would only list its tests, or has none that fit: no guest is needed for that.
fn runs_nothing(options: &Test) -> bool {
    let lists = |argument: &String| argument == "--list" || argument == "--help";
    options.arguments.iter().any(lists) || !has_tests(&options.binary, &options.arguments)
}

/// Whether a test binary has tests that these arguments leave. What does not run here is taken to
/// have some.
pub(crate) fn has_tests(
    binary: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> bool {
    let mut list = Command::new(binary);
    list.args(arguments).args(["--list", "--format", "terse"]);
    let listed = list.output();
    !listed.is_ok_and(|listed| listed.status.success() && listed.stdout.is_empty())
}

fn test_timeout() -> Result<Option<Duration>> {
    match std::env::var("BARLEASE_TIMEOUT") {
        Ok(text) => {
            let seconds = text
                .parse()
                .with_context(|| format!("BARLEASE_TIMEOUT is seconds, not `{text}`"))?;
            Ok(Some(Duration::from_secs(seconds)))
        }
        Err(_) => Ok(None),
    }
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
        (kernel.debug_name(watch), watch, ready)
    };
    Watch::ALL.map(describe).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_a_place() {
        let placed: Placed = "/tmp/a".parse().unwrap();
        assert_eq!(placed.place, "/lab/bin/a");
        let placed: Placed = "x/a:/root/b".parse().unwrap();
        assert_eq!(
            (placed.file.to_str(), placed.place.as_str()),
            (Some("x/a"), "/root/b")
        );
        assert!("a:b".parse::<Placed>().is_err());
    }

    #[test]
    fn a_command_of_the_guest_is_not_copied() {
        assert_eq!(program_to_copy("ls").unwrap(), None);
        assert_eq!(program_to_copy("/lab/bin/no-such-file").unwrap(), None);
    }
}
