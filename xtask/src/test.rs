//! `cargo xtask test`: every check and every test, in order.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use barlease_lab::arch::Arch;
use barlease_lab::debug::Watch;
use barlease_lab::kmod as lab_kmod;
use barlease_lab::prepare::{self, Prepared, Request, prepare};
use clap::Args;

use crate::steps::Steps;
use crate::{bench, checkout, checks, guest_tests, kmod, litmus, masks};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Kernels to test on, by the beginning of their release; `all` of Debian's that can be used;
    /// `debug` for the one with KASAN and lockdep: `all,debug` is everything; `kcsan` for the one
    /// that finds data races [default: the newest of Debian's]
    #[arg(long, value_name = "RELEASE", value_delimiter = ',')]
    kernel: Vec<String>,
    /// Kernels to run a short selection of the guest tests on, after those; alone without --kernel
    #[arg(long, value_name = "RELEASE", value_delimiter = ',')]
    short: Vec<String>,
    /// Without module and guests
    #[arg(long, conflicts_with = "guest_only")]
    host_only: bool,
    /// Only the module and the guests
    #[arg(long)]
    guest_only: bool,
    /// Guests at a time [default: one for each processor, and no more than memory allows]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Run only those guest tests whose name has this in it; `canaries` are the planted bugs,
    /// `defects` what the stock driver does to the kernel, `selftests` the kernel's own tests, `instructions` what operations cost compared with the
    /// published results
    filter: Option<String>,
}

impl Options {
    /// Whether the filter lets a step of that name pass.
    fn has(&self, name: &str) -> bool {
        let filter = self.filter.as_deref();
        filter.is_none_or(|filter| name.contains(filter))
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut steps = Steps::default();
    if !options.guest_only {
        host(&mut steps);
    }
    if !options.host_only {
        guests(&mut steps, options)?;
    }
    Ok(steps.summary())
}

/// Packages whose tests run on the host: all but the guest tests.
const HOST: &[&str] = &["--workspace", "--exclude", "barlease-guest-tests"];

fn host(steps: &mut Steps) {
    steps.cargo("formatting", "", &["fmt", "--all", "--check"]);
    steps.make("formatting of the module", || {
        lab_kmod::format(&checkout::top(), true)
    });
    let clippy: Vec<_> = [
        &["clippy", "--quiet", "--all-targets"],
        HOST,
        &["--", "-D", "warnings"],
    ]
    .concat();
    steps.cargo("clippy", "", &clippy);
    steps.cargo(
        "clippy on the guest tests",
        "guest-tests",
        &["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"],
    );
    let test: Vec<_> = [
        &["test", "--no-fail-fast"],
        HOST,
        &["--exclude", "barlease"],
    ]
    .concat();
    steps.cargo("host tests", "", &test);
    checks::library(steps);
    steps.cargo("fuzz targets, a short run", "fuzz", &["test", "--quiet"]);
    checks::host(steps);
}

/// Test binaries of a short run: one of each kind of promise that depends on the kernel's own code.
const SHORT: &[&str] = &["smoke", "revoke", "mmap", "memory_type", "export"];

fn guests(steps: &mut Steps, options: &Options) -> Result<()> {
    let mut lanes = Vec::new();
    if options.short.is_empty() || !options.kernel.is_empty() {
        let wanted = kernels(&options.kernel)?.into_iter();
        lanes.extend(wanted.map(|wanted| (wanted, false)));
    }
    let short = options.short.iter().cloned();
    lanes.extend(short.map(|wanted| (Some(wanted), true)));
    let mut built_for: Vec<(Arch, bool, Vec<guest_tests::Binary>)> = Vec::new();
    for (place, (wanted, is_short)) in lanes.into_iter().enumerate() {
        let prepared = prepare(&Request {
            kernel: wanted,
            update: false,
        })?;
        let arch = prepared.kernel.arch();
        let fits = |built: &&(Arch, bool, Vec<_>)| built.0 == arch && (is_short || !built.1);
        if built_for.iter().all(|built| !fits(&built)) {
            let mut binaries = Vec::new();
            let only = if is_short { SHORT } else { &[] };
            steps.make(&format!("guest tests: build for {}", arch.name()), || {
                binaries = guest_tests::binaries(&prepared, only)?;
                Ok(())
            });
            built_for.push((arch, is_short, binaries));
        }
        let binaries = built_for.iter().find(fits).map(|built| &built.2[..]);
        let lane = Lane {
            options,
            prepared: &prepared,
            binaries: binaries.unwrap_or_default(),
            is_first: place == 0,
        };
        if is_short {
            lane.run_short(steps);
        } else {
            lane.run(steps);
        }
    }
    Ok(())
}

/// All that runs on one kernel.
struct Lane<'a> {
    options: &'a Options,
    prepared: &'a Prepared,
    binaries: &'a [guest_tests::Binary],
    /// Whether it is the one with which that runs which one kernel is enough for.
    is_first: bool,
}

impl Lane<'_> {
    fn run_short(&self, steps: &mut Steps) {
        let kernel = &self.prepared.kernel.name;
        let mut module = PathBuf::new();
        let built = steps.make(&format!("module for {kernel}"), || {
            module = kmod::build(self.prepared, true)?;
            Ok(())
        });
        let chosen: Vec<_> = self
            .binaries
            .iter()
            .filter(|binary| SHORT.contains(&binary.name.as_str()))
            .cloned()
            .collect();
        let name = format!("a selection of the guest tests on {kernel}");
        self.guest_tests(steps, &name, &chosen, built.then_some(&module));
    }

    fn guest_tests(
        &self,
        steps: &mut Steps,
        name: &str,
        binaries: &[guest_tests::Binary],
        module: Option<&PathBuf>,
    ) {
        let Some(module) = module else {
            steps.skip(name, "the module does not build");
            return;
        };
        steps.step(name, || {
            guest_tests::Pool {
                binaries,
                prepared: self.prepared,
                module,
                filter: self.options.filter.as_deref(),
                jobs: self
                    .options
                    .jobs
                    .map_or_else(guest_tests::jobs, usize::from),
            }
            .run()
        });
    }

    fn run(&self, steps: &mut Steps) {
        let (options, prepared) = (self.options, self.prepared);
        let kernel = &prepared.kernel.name;
        // Once: their rules are those of one source, and hold for every kernel.
        if self.is_first && options.has("litmus") {
            steps.step("litmus tests", || litmus::judge(prepared));
        }
        let mut module = PathBuf::new();
        let built = steps.make(&format!("module for {kernel}"), || {
            module = kmod::build(prepared, true)?;
            // Kernels that we build have the stock driver built in, which keeps its place.
            if prepared.kernel.watches().is_none() {
                kmod::build_as_stock(prepared, true)?;
            }
            Ok(())
        });
        if built {
            steps.make(
                &format!("masked indexes in the module for {kernel}"),
                || masks::check(prepared, &module),
            );
        }
        steps.make(&format!("clippy on the module for {kernel}"), || {
            kmod::clippy(prepared, true)
        });
        let name = format!("canaries on {kernel}");
        if built && options.has("canaries") {
            steps.step(&name, || guest_tests::canaries(prepared));
        }
        let name = format!("defects of the kernel on {kernel}");
        // A kernel with other checks shows them otherwise.
        let is_usual = prepared.kernel.watches().is_none() && prepared.kernel.arch().is_native();
        if built && options.has("defects") && is_usual {
            steps.step(&name, || guest_tests::defects(prepared));
        }
        let name = format!("selftests of the kernel on {kernel}");
        // They need IOMMUFD, which Debian's kernels do not have.
        if built && options.has("selftests") && prepared.kernel.watches() == Some(Watch::Memory) {
            steps.step(&name, || {
                guest_tests::compare(prepared, guest_tests::Selftests::QUICK)
            });
        }
        let name = format!("guest tests on {kernel}");
        self.guest_tests(steps, &name, self.binaries, built.then_some(&module));
        // Once: the published results are those of one kernel.
        let is_published =
            prepared.kernel.arch().is_native() && prepared.kernel.watches().is_none();
        if built && self.is_first && options.has("instructions") && is_published {
            steps.report(&format!("instructions on {kernel}"), || {
                bench::regressions(prepared)
            });
        }
    }
}

/// The lanes that were asked for, in the form of requests.
fn kernels(wanted: &[String]) -> Result<Vec<Option<String>>> {
    if wanted.is_empty() {
        return Ok(vec![None]);
    }
    let mut kernels = Vec::new();
    for kernel in wanted {
        if kernel == "all" {
            kernels.extend(stock()?);
        } else {
            kernels.push(kernel.clone());
        }
    }
    Ok(kernels.into_iter().map(Some).collect())
}

/// The kernels of Debian's that can be used.
fn stock() -> Result<Vec<String>> {
    let prepared = prepare(&Request::default())?;
    let plan = prepare::plan(&prepared.cache).context("read the plan from the cache")?;
    let usable = plan
        .kernels
        .into_iter()
        .filter(|kernel| kernel.refusal.is_none());
    Ok(usable.map(|kernel| kernel.release).collect())
}
