//! `cargo xtask test`: every check and every test, in order.

use std::io::{self, BufRead, BufReader, Write};
use std::iter::Sum;
use std::ops::Add;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use barlease_lab::arch::Arch;
use barlease_lab::debug::Watch;
use barlease_lab::kmod as lab_kmod;
use barlease_lab::prepare::{self, Prepared, Request, prepare};
use barlease_lab::report::seconds;
use clap::Args;

use crate::{bench, canary, checkout, checks, kmod, litmus, masks, pool, selftests};

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
    /// `selftests` the kernel's own tests, `instructions` what operations cost compared with the
    /// published results
    filter: Option<String>,
}

impl Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
        }
    }
}

impl Sum for Count {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}

impl Options {
    /// Whether the filter lets a step of that name pass.
    fn has(&self, name: &str) -> bool {
        let filter = self.filter.as_deref();
        filter.is_none_or(|filter| name.contains(filter))
    }
}

/// Results of libtest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

/// A step that has been made.
#[derive(Debug)]
struct Done {
    name: String,
    taken: Duration,
    count: Count,
    verdict: Verdict,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Skipped(String),
    Failed(String),
}

#[derive(Debug, Default)]
pub(crate) struct Steps {
    done: Vec<Done>,
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
    let mut built_for: Vec<(Arch, bool, Vec<pool::Binary>)> = Vec::new();
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
                binaries = pool::binaries(&prepared, only)?;
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

/// What runs on one kernel.
struct Lane<'a> {
    options: &'a Options,
    prepared: &'a Prepared,
    binaries: &'a [pool::Binary],
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
        binaries: &[pool::Binary],
        module: Option<&PathBuf>,
    ) {
        let Some(module) = module else {
            steps.skip(name, "the module does not build");
            return;
        };
        steps.step(name, || {
            pool::Pool {
                binaries,
                prepared: self.prepared,
                module,
                filter: self.options.filter.as_deref(),
                jobs: self.options.jobs.map_or_else(pool::jobs, usize::from),
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
            steps.step(&name, || canary::run(prepared));
        }
        let name = format!("selftests of the kernel on {kernel}");
        // They need IOMMUFD, which Debian's kernels do not have.
        if built && options.has("selftests") && prepared.kernel.watches() == Some(Watch::Memory) {
            steps.step(&name, || {
                selftests::compare(prepared, selftests::Choice::QUICK)
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

impl Steps {
    pub(crate) fn cargo(&mut self, name: &str, folder: &str, arguments: &[&str]) {
        self.command(name, checkout::cargo(folder).args(arguments));
    }

    pub(crate) fn command(&mut self, name: &str, command: &mut Command) {
        self.step(name, || counted(command, &mut io::stdout()));
    }

    fn make<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> bool {
        self.step(name, || (Count::default(), work().map(drop)))
    }

    /// A result that says something and proves nothing: it cannot fail.
    fn report(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        println!("\n=== {name}");
        let started = Instant::now();
        let verdict = match work() {
            Ok(()) => Verdict::Passed,
            Err(error) => {
                println!("no report: {error:#}");
                Verdict::Skipped("no report".to_owned())
            }
        };
        self.note(name, started.elapsed(), Count::default(), verdict);
    }

    fn step(&mut self, name: &str, work: impl FnOnce() -> (Count, Result<()>)) -> bool {
        println!("\n=== {name}");
        let started = Instant::now();
        let (count, result) = work();
        let verdict = match result {
            Ok(()) => Verdict::Passed,
            Err(error) => {
                eprintln!("error: {error:#}");
                Verdict::Failed(
                    error
                        .to_string()
                        .lines()
                        .next()
                        .unwrap_or_default()
                        .to_owned(),
                )
            }
        };
        let passed = verdict == Verdict::Passed;
        self.note(name, started.elapsed(), count, verdict);
        passed
    }

    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        println!("\n=== {name}\nskipped: {reason}");
        let verdict = Verdict::Skipped(reason.to_owned());
        self.note(name, Duration::ZERO, Count::default(), verdict);
    }

    fn note(&mut self, name: &str, taken: Duration, count: Count, verdict: Verdict) {
        self.done.push(Done {
            name: name.to_owned(),
            taken,
            count,
            verdict,
        });
    }

    fn summary(&self) -> ExitCode {
        println!("\n=== summary");
        for step in &self.done {
            let verdict = match &step.verdict {
                Verdict::Passed => "ok".to_owned(),
                Verdict::Skipped(reason) => format!("skipped: {reason}"),
                Verdict::Failed(reason) => format!("FAILED: {reason}"),
            };
            println!("{:>9}  {}: {verdict}", seconds(step.taken), step.name);
        }
        let total = self.total();
        println!("{} passed, {} failed", total.passed, total.failed);
        if total.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// A step that failed without a failed test (it does not build, the guest's log has a splat) is
    /// one failure.
    fn total(&self) -> Count {
        let mut total = Count::default();
        for step in &self.done {
            total.passed += step.count.passed;
            let failed = matches!(step.verdict, Verdict::Failed(_));
            total.failed += step.count.failed.max(usize::from(failed));
        }
        total
    }
}

/// Runs a command with its output passed on, and adds up what libtest says in it.
fn counted(command: &mut Command, out: &mut impl Write) -> (Count, Result<()>) {
    let mut count = Count::default();
    let result = watch(command, out, |line| {
        if let Some(more) = parse_result(line) {
            count.passed += more.passed;
            count.failed += more.failed;
        }
    });
    (count, result)
}

fn watch(command: &mut Command, out: &mut impl Write, mut each: impl FnMut(&str)) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start cargo")?;
    if let Some(output) = child.stdout.take() {
        let mut lines = BufReader::new(output);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            out.write_all(&line)?;
            out.flush()?;
            each(&String::from_utf8_lossy(&line));
            line.clear();
        }
    }
    let status = child.wait().context("wait for cargo")?;
    if !status.success() {
        bail!("cargo ended with {status}");
    }
    Ok(())
}

/// `test result: ok. 3 passed; 0 failed; …`
pub(crate) fn parse_result(line: &str) -> Option<Count> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut words = rest.split(' ');
    let passed = words.next()?.parse().ok()?;
    let failed = words.nth(1)?.parse().ok()?;
    Some(Count { passed, failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_libtest_are_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";
        assert_eq!(
            parse_result(line),
            Some(Count {
                passed: 12,
                failed: 3
            })
        );
        assert_eq!(parse_result("test a_test ... ok"), None);
    }

    #[test]
    fn a_step_that_fails_without_a_failed_test_counts_once() {
        let mut steps = Steps::default();
        steps.step("build", || {
            (Count::default(), Err(anyhow::anyhow!("does not build")))
        });
        steps.step("tests", || {
            (
                Count {
                    passed: 2,
                    failed: 3,
                },
                Err(anyhow::anyhow!("cargo ended")),
            )
        });
        steps.step("more", || {
            (
                Count {
                    passed: 5,
                    failed: 0,
                },
                Ok(()),
            )
        });
        steps.skip("other", "no");
        assert_eq!(
            steps.total(),
            Count {
                passed: 7,
                failed: 4
            }
        );
    }

    #[test]
    fn output_is_counted_as_it_passes() {
        let mut shell = Command::new("sh");
        shell.args([
            "-c",
            "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; exit 1",
        ]);
        // Not our own output: whoever runs this test may count, too.
        let mut passed_on = Vec::new();
        let (count, result) = counted(&mut shell, &mut passed_on);
        assert!(passed_on.starts_with(b"test result"));
        assert_eq!(
            count,
            Count {
                passed: 2,
                failed: 0
            }
        );
        assert!(result.is_err());
    }
}
