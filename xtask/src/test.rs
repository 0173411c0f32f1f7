//! `cargo xtask test`: every check and every test, in order.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

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
    /// `defects` what the stock driver does to the kernel, `selftests` the kernel's own tests,
    /// `instructions` what operations cost compared with the published results
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
    let mut wanted = Vec::new();
    if options.short.is_empty() || !options.kernel.is_empty() {
        let kernels = kernels(&options.kernel)?.into_iter();
        wanted.extend(kernels.map(|kernel| (kernel, false)));
    }
    let short = options.short.iter().cloned();
    wanted.extend(short.map(|kernel| (Some(kernel), true)));
    let mut lanes = Vec::new();
    for (kernel, is_short) in wanted {
        let request = Request {
            kernel,
            update: false,
        };
        lanes.push((prepare(&request)?, is_short));
    }
    let mut built_for: Vec<(Arch, bool, Vec<guest_tests::Binary>)> = Vec::new();
    for (prepared, is_short) in &lanes {
        let (arch, is_short) = (prepared.kernel.arch(), *is_short);
        if built_for.iter().any(|built| fits(built, arch, is_short)) {
            continue;
        }
        let mut binaries = Vec::new();
        let only = if is_short { SHORT } else { &[] };
        steps.make(&format!("guest tests: build for {}", arch.name()), || {
            binaries = guest_tests::binaries(prepared, only)?;
            Ok(())
        });
        built_for.push((arch, is_short, binaries));
    }
    let lanes: Vec<_> = lanes
        .iter()
        .map(|(prepared, is_short)| {
            let arch = prepared.kernel.arch();
            let built = built_for.iter();
            let mut built = built.filter(|built| fits(built, arch, *is_short));
            let all = built.next().map_or(&[][..], |built| &built.2);
            let chosen =
                |binary: &&guest_tests::Binary| !is_short || SHORT.contains(&binary.name.as_str());
            Lane {
                prepared,
                is_short: *is_short,
                binaries: all.iter().filter(chosen).cloned().collect(),
            }
        })
        .collect();
    let modules = modules(steps, &lanes);
    // Once: their rules are those of one source, and hold for every kernel.
    if let (true, Some(first)) = (
        options.has("litmus"),
        lanes.iter().find(|lane| !lane.is_short),
    ) {
        steps.step("litmus tests", || litmus::judge(first.prepared));
    }
    for (place, (lane, module)) in lanes.iter().zip(&modules).enumerate() {
        if module.is_some() && !lane.is_short {
            lane.watchers(steps, options, place == 0);
        }
    }
    let built = lanes.iter().zip(&modules);
    let built = built.filter(|(lane, _)| !lane.binaries.is_empty());
    let built = built.filter_map(|(lane, module)| Some((lane, module.as_deref()?)));
    let pool = guest_tests::Pool {
        lanes: built
            .map(|(lane, module)| guest_tests::Lane {
                binaries: &lane.binaries,
                prepared: lane.prepared,
                module,
            })
            .collect(),
        filter: options.filter.as_deref(),
        jobs: options.jobs.map_or_else(guest_tests::jobs, usize::from),
    };
    let names = pool.lanes.iter().map(|lane| &*lane.prepared.kernel.name);
    let name = format!("guest tests on {}", names.collect::<Vec<_>>().join(", "));
    if pool.lanes.is_empty() {
        steps.skip("guest tests", "they or the module do not build");
    } else {
        steps.step(&name, || pool.run());
    }
    Ok(())
}

/// Whether binaries that were built for an architecture, only those of a short run or all, do for a
/// lane.
fn fits(built: &(Arch, bool, Vec<guest_tests::Binary>), arch: Arch, is_short: bool) -> bool {
    built.0 == arch && (is_short || !built.1)
}

/// All that runs on one kernel.
struct Lane<'a> {
    prepared: &'a Prepared,
    is_short: bool,
    binaries: Vec<guest_tests::Binary>,
}

/// Builds the module for each lane, side by side, since a compiler uses one processor; and clippy's
/// look at it. The paths of those that were built.
fn modules(steps: &mut Steps, lanes: &[Lane<'_>]) -> Vec<Option<PathBuf>> {
    let names: Vec<_> = lanes
        .iter()
        .map(|lane| &*lane.prepared.kernel.name)
        .collect();
    let names = names.join(", ");
    let built = Mutex::new(vec![None; lanes.len()]);
    steps.make(&format!("module for {names}"), || {
        side_by_side(lanes, |place, lane| {
            let module = lane.module()?;
            built.lock().unwrap_or_else(PoisonError::into_inner)[place] = Some(module);
            Ok(())
        })
    });
    let built = built.into_inner().unwrap_or_else(PoisonError::into_inner);
    steps.make(&format!("masked indexes in the module for {names}"), || {
        let both = lanes.iter().zip(&built);
        let both = both.filter_map(|(lane, module)| Some((lane, module.as_ref()?)));
        both.filter(|(lane, _)| !lane.is_short)
            .try_for_each(|(lane, module)| masks::check(lane.prepared, module))
    });
    steps.make(&format!("clippy on the module for {names}"), || {
        side_by_side(lanes, |_, lane| {
            if lane.is_short {
                return Ok(());
            }
            kmod::clippy(lane.prepared, true)
        })
    });
    built
}

/// Does `work` for all lanes, on as many threads as there are processors; the error of the first
/// that fails.
fn side_by_side(
    lanes: &[Lane<'_>],
    work: impl Fn(usize, &Lane<'_>) -> Result<()> + Sync,
) -> Result<()> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut result = Ok(());
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(lane) = lanes.get(place) else {
                return result;
            };
            let kernel = &lane.prepared.kernel.name;
            let done = work(place, lane).with_context(|| format!("for {kernel}"));
            result = result.and(done);
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..processors).map(|_| scope.spawn(worker)).collect();
        let mut results = threads.into_iter().map(|thread| {
            let panicked = |_| Err(anyhow::anyhow!("the build panicked"));
            thread.join().unwrap_or_else(panicked)
        });
        results.try_for_each(|result| result)
    })
}

impl Lane<'_> {
    fn module(&self) -> Result<PathBuf> {
        let module = kmod::build(self.prepared, true)?;
        // Kernels that we build have the stock driver built in, which keeps its place.
        if !self.is_short && self.prepared.kernel.watches().is_none() {
            kmod::build_as_stock(self.prepared, true)?;
        }
        Ok(module)
    }

    /// Planted bugs and known defects, which a guest must report, and comparisons with stock.
    fn watchers(&self, steps: &mut Steps, options: &Options, is_first: bool) {
        let prepared = self.prepared;
        let kernel = &prepared.kernel.name;
        if options.has("canaries") {
            let name = format!("canaries on {kernel}");
            steps.step(&name, || guest_tests::canaries(prepared));
        }
        // A kernel with other checks shows them otherwise.
        let is_usual = prepared.kernel.watches().is_none() && prepared.kernel.arch().is_native();
        if options.has("defects") && is_usual {
            let name = format!("defects of the kernel on {kernel}");
            steps.step(&name, || guest_tests::defects(prepared));
        }
        // They need IOMMUFD, which Debian's kernels do not have.
        if options.has("selftests") && prepared.kernel.watches() == Some(Watch::Memory) {
            let name = format!("selftests of the kernel on {kernel}");
            steps.step(&name, || {
                guest_tests::compare(prepared, guest_tests::Selftests::QUICK)
            });
        }
        // Once: the published results are those of one kernel.
        let is_published =
            prepared.kernel.arch().is_native() && prepared.kernel.watches().is_none();
        if is_first && options.has("instructions") && is_published {
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
