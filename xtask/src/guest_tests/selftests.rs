//! `cargo xtask selftests`: the kernel's own tests of VFIO and IOMMUFD, with the stock driver and
//! with ours. A test that passes with the one passes with the other.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use barlease_lab::debug::Watch;
use barlease_lab::kmod::DRIVER;
use barlease_lab::machine::Machine;
use barlease_lab::prepare::{Prepared, Request, prepare};
use barlease_lab::preset::Preset;
use barlease_lab::report::Step;
use barlease_lab::run::{Output, Run};
use barlease_lab::selftests::{self, Program, Verdict};
use clap::Args;

use super::pool;
use super::said::{Results, Said, read};
use crate::kmod;
use crate::steps::Count;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The newest kernel whose release begins so; most of the tests want the IOMMUFD of the debug
    /// kernel
    #[arg(
        long,
        value_name = "RELEASE",
        env = "BARLEASE_KERNEL",
        hide_env_values = true,
        default_value = "debug"
    )]
    kernel: String,
    /// Only what is quick: what `cargo xtask test` runs
    #[arg(long)]
    quick: bool,
    /// Name also the tests that fail with both drivers, with what they say
    #[arg(long, short)]
    verbose: bool,
    /// Run only programs that have this in `DEVICE PROGRAM`, such as `igb` or
    /// `vfio_pci_driver_test`
    filter: Option<String>,
}

/// Which of the programs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice<'a> {
    /// Only those of [`Case::is_quick`].
    pub(crate) quick: bool,
    /// Words that `DEVICE PROGRAM` must have in it.
    pub(crate) filter: Option<&'a str>,
    /// Whether to name those that fail with both.
    pub(crate) verbose: bool,
}

impl Choice<'_> {
    /// Those of `cargo xtask test`.
    pub(crate) const QUICK: Self = Self {
        quick: true,
        filter: None,
        verbose: false,
    };

    fn has(&self, case: &Case) -> bool {
        let named = |filter| case.name().contains(filter);
        (!self.quick || case.is_quick()) && self.filter.is_none_or(named)
    }
}

/// The kernel's own driver.
const STOCK: &str = "vfio-pci";

/// Devices that the tests get, each by itself. The tests have a driver for igb, which moves data
/// and raises interrupts; igb has virtual functions too. nvme has MSI-X and a reset, edu has MSI,
/// the BARs of display and testdev are memory. The shared memory devices are left out: the tests
/// map every BAR that can be mapped, and expect whole pages.
const DEVICES: &[&str] = &["igb", "nvme", "edu", "display", "testdev"];

/// The one program that takes several devices at once.
const TOGETHER: &str = "vfio_pci_device_init_perf_test";

/// How long a guest may take: far more than what it takes.
const TIMEOUT: Duration = Duration::from_secs(5400);

/// How often a test runs at most that is worse with ours: only what is worse each time is our
/// fault.
const RUNS: usize = 3;

/// MiB of a guest. Two of the tests use a GiB each: a huge page that is set aside at boot, and
/// ordinary memory.
const MEMORY: u32 = 4096;
const HUGE_PAGES: &[&str] = &[
    "hugepagesz=1G",
    "hugepages=1",
    "hugepagesz=2M",
    "hugepages=64",
];

/// The memory of the host that such a guest takes, in MiB.
const HOST_MEMORY: u32 = MEMORY + 1024;

/// Runs what `run DEVICE PROGRAM ARGUMENT…` says in the lines after it.
const SCRIPT: &str = r#"
# An ordinary GiB of shared memory is 512 pages then, and not 262144.
echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled
for module in vfio_pci barlease_vfio_pci; do
    switch=/sys/module/$module/parameters/enable_sriov
    [ ! -e $switch ] || echo Y >$switch
done

run() {
    echo "+++ $1 $2"
    echo "barlease-lab: selftest $1 $2" >/dev/kmsg
    program=/lab/bin/$2
    shift 2
    for address; do
        driver=$(readlink "/sys/bus/pci/devices/$address/driver")
        if [ "${driver##*/}" != "$VFIO_SELFTESTS_DRIVER" ]; then
            echo "$address is bound to ${driver:-nothing}"
            exit 1
        fi
    done
    read -r from rest </proc/uptime
    "$program" "$@" >/tmp/said 2>&1
    code=$?
    read -r to rest </proc/uptime
    cat /tmp/said
    echo
    echo "--- $code $from $to"
}
"#;

/// A program in a guest, with what it is given.
#[derive(Clone, Debug)]
struct Case {
    /// The devices' names, `all` for several, `-` for none.
    devices: String,
    program: Program,
    addresses: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let prepared = prepare(&Request {
        kernel: Some(options.kernel.clone()),
        update: false,
    })?;
    let choice = Choice {
        quick: options.quick,
        filter: options.filter.as_deref(),
        verbose: options.verbose,
    };
    let (count, result) = compare(&prepared, choice);
    result?;
    println!(
        "\n{} tests, none of them worse with {DRIVER} than with {STOCK}",
        count.passed
    );
    Ok(ExitCode::SUCCESS)
}

/// Runs the tests with the stock driver and with ours, shows both, and counts those as failed that
/// are worse with ours.
pub(crate) fn compare(prepared: &Prepared, choice: Choice<'_>) -> (Count, Result<()>) {
    let mut count = Count::default();
    let result = try_compare(prepared, choice, &mut count);
    (count, result)
}

fn try_compare(prepared: &Prepared, choice: Choice<'_>, count: &mut Count) -> Result<()> {
    let mut cases = cases(&selftests::programs(prepared)?)?;
    cases.retain(|case| choice.has(case));
    ensure!(!cases.is_empty(), "there is no such `DEVICE PROGRAM`");
    let guests = Guests {
        prepared,
        module: kmod::build(prepared, true)?,
    };
    // Debian's kernels have no IOMMUFD.
    let has_all = prepared.kernel.watches() == Some(Watch::Memory);
    let mut both = guests.both(&cases)?;
    for _ in 1..RUNS {
        let mut again = cases.clone();
        again.retain(|case| {
            let name = case.name();
            let worse = both.worse(&name).len();
            let void = has_all && both.is_void(&name);
            if void {
                println!("once more, since nothing passes with {STOCK}: {name}");
            } else if worse > 0 {
                println!("once more, since {worse} of its tests are worse: {name}");
            }
            void || worse > 0
        });
        if again.is_empty() {
            break;
        }
        both.add(guests.both(&again)?);
    }
    both.show(&cases, choice.verbose, count);
    let worse: Vec<_> = cases
        .iter()
        .flat_map(|case| {
            let name = case.name();
            let tests = both.worse(&name).into_iter();
            tests.map(move |test| format!("{name} {test}"))
        })
        .collect();
    ensure!(
        worse.is_empty(),
        "worse than with the stock driver: {}",
        worse.join(", ")
    );
    let names = cases.iter().map(Case::name);
    let void: Vec<_> = names.filter(|name| both.is_void(name)).collect();
    ensure!(
        void.is_empty() || !has_all && void.len() < cases.len(),
        "all fails with the stock driver, so nothing was compared: {}",
        void.join(", ")
    );
    Ok(())
}

/// The parts of a guest.
struct Guests<'a> {
    prepared: &'a Prepared,
    module: PathBuf,
}

impl Guests<'_> {
    /// Runs them with each driver, side by side when there is room.
    fn both(&self, cases: &[Case]) -> Result<Both> {
        let step = Step::start(format!("the kernel's own tests, {} programs", cases.len()));
        let of = |driver| {
            self.one(cases, driver)
                .with_context(|| format!("the kernel's own tests with {driver}"))
        };
        let (stock, ours) = if pool::guests_of(HOST_MEMORY) < 2 {
            (of(STOCK)?, of(DRIVER)?)
        } else {
            thread::scope(|scope| {
                let stock = scope.spawn(|| of(STOCK));
                let ours = of(DRIVER);
                let stock = stock.join().unwrap_or_else(|panic| resume_unwind(panic));
                anyhow::Ok((stock?, ours?))
            })?
        };
        step.done();
        Ok(Both { stock, ours })
    }

    fn one(&self, cases: &[Case], driver: &str) -> Result<Results> {
        let mut script = SCRIPT.to_owned();
        let mut programs = BTreeMap::new();
        for case in cases {
            script += &format!("run {} {}\n", case.name(), case.addresses.join(" "));
            programs.insert(&case.program.name, &case.program.file);
        }
        let run = Run::new(self.prepared, machine()).module(&self.module);
        let run = programs.into_iter().fold(run, |run, (name, file)| {
            run.file(file, format!("/lab/bin/{name}"))
        });
        let outcome = run
            .bind(driver)
            .env("VFIO_SELFTESTS_DRIVER", driver)
            .command(["sh", "-c", &script])
            .output(Output::Capture)
            .timeout(TIMEOUT)
            .run()?;
        let output = String::from_utf8_lossy(&outcome.output);
        ensure!(outcome.code == 0, "exit code {}:\n{output}", outcome.code);
        let results = read(&output)?;
        let absent = cases
            .iter()
            .find(|case| !results.contains_key(&case.name()));
        ensure!(absent.is_none(), "not every program was run:\n{output}");
        Ok(results)
    }
}

/// The results with each driver, of the same programs.
#[derive(Debug, Default)]
struct Both {
    stock: Results,
    ours: Results,
}

impl Both {
    /// The tests of a program that have a worse verdict with ours. One that is absent has not
    /// passed.
    fn worse(&self, program: &str) -> Vec<&str> {
        let (Some(stock), Some(ours)) = (self.stock.get(program), self.ours.get(program)) else {
            return Vec::new();
        };
        let tests = stock.tests.iter();
        tests
            .filter(|(test, (before, _))| ours.verdict(test) < *before)
            .map(|(test, _)| test.as_str())
            .collect()
    }

    /// Keeps the better verdict of each test.
    fn add(&mut self, more: Self) {
        for (results, more) in [(&mut self.stock, more.stock), (&mut self.ours, more.ours)] {
            for (name, said) in more {
                results.entry(name).or_default().add(said);
            }
        }
    }

    /// Whether nothing could be compared, since all of a program fails with the stock driver.
    fn is_void(&self, program: &str) -> bool {
        let of_use = |said: &Said| said.count(Verdict::Passed) + said.count(Verdict::Skipped) > 0;
        !self.stock.get(program).is_some_and(of_use)
    }

    fn show(&self, cases: &[Case], verbose: bool, count: &mut Count) {
        println!("\n{:40} {STOCK:36} {DRIVER}", "");
        for case in cases {
            let name = case.name();
            let (stock, ours) = (&self.stock[&name], &self.ours[&name]);
            println!("{name:40} {:36} {}", stock.in_short(), ours.in_short());
            let worse = self.worse(&name);
            for (test, (before, _)) in &stock.tests {
                let after = ours.verdict(test);
                let is_worse = worse.contains(&test.as_str());
                let both_fail = after == Verdict::Failed && *before == after;
                if after != *before || both_fail && verbose {
                    let mark = if is_worse { "WORSE: " } else { "" };
                    let (before, after) = (before.word(), after.word());
                    println!("    {mark}{before}, {after}: {test}");
                    if is_worse || verbose {
                        print!("{}", indented(ours.text(test)));
                    }
                }
            }
            count.failed += worse.len();
            count.passed += ours.count(Verdict::Passed);
        }
    }
}

fn indented(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.is_empty());
    lines.map(|line| format!("        {line}\n")).collect()
}

fn machine() -> Machine {
    let append = HUGE_PAGES.iter().map(|word| (*word).to_owned());
    Machine {
        memory: MEMORY,
        append: append.collect(),
        ..Preset::Full.machine()
    }
}

/// Each program of VFIO's with each device, and IOMMUFD's, which bring their own.
fn cases(programs: &[Program]) -> Result<Vec<Case>> {
    let (of_vfio, others): (Vec<_>, Vec<_>) = programs
        .iter()
        .partition(|program| program.name.starts_with("vfio_"));
    ensure!(
        !of_vfio.is_empty(),
        "the kernel's source has no tests of VFIO"
    );
    let addresses = DEVICES
        .iter()
        .map(|name| bdf(name))
        .collect::<Result<Vec<_>>>()?;
    let case = |devices: &str, program: &Program, addresses: &[String]| Case {
        devices: devices.to_owned(),
        program: program.clone(),
        addresses: addresses.to_vec(),
    };
    let mut cases = Vec::new();
    for (device, address) in DEVICES.iter().zip(&addresses) {
        let each = of_vfio.iter();
        cases.extend(each.map(|program| case(device, program, std::slice::from_ref(address))));
    }
    let together = of_vfio.iter().filter(|program| program.name == TOGETHER);
    cases.extend(together.map(|program| case("all", program, &addresses)));
    cases.extend(others.iter().map(|program| case("-", program, &[])));
    Ok(cases)
}

fn bdf(name: &str) -> Result<String> {
    let devices = Preset::Full.machine().devices;
    let device = devices.into_iter().find(|device| device.name == name);
    device
        .and_then(|device| device.bdf)
        .with_context(|| format!("the preset has no device {name}"))
}

impl Case {
    /// Programs that open a device a few times only, and of the rest those that map memory for one
    /// device.
    fn is_quick(&self) -> bool {
        matches!(
            (self.devices.as_str(), self.program.name.as_str()),
            (
                "igb",
                "vfio_dma_mapping_test" | "vfio_dma_mapping_mmio_test"
            ) | (
                "igb" | "nvme",
                "vfio_iommufd_setup_test" | "vfio_pci_device_test"
            )
        )
    }

    fn name(&self) -> String {
        format!("{} {}", self.devices, self.program.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_tests::said::TO_ITS_END;

    fn of(text: &str) -> Said {
        let text = format!("+++ igb a\n{text}\n--- 0 1.5 3.75\n");
        read(&text).unwrap().remove("igb a").unwrap()
    }

    fn both(stock: &str, ours: &str) -> Both {
        let results = |text| Results::from([("igb a".to_owned(), of(text))]);
        Both {
            stock: results(stock),
            ours: results(ours),
        }
    }

    #[test]
    fn results_are_those_of_each_program() {
        let output = "bound:\n  igb\n+++ igb a\nTAP version 13\n1..2\n# Starting\r\nok 1 x\r\n# because\nnot ok 2 y\n\n\
                      --- 1 10.00 12.50\n+++ - b\n1..1\nok 1 x # SKIP no device\n\n--- 0 12.50 13.00\n";
        let results = read(output).unwrap();
        let a = &results["igb a"];
        assert_eq!(a.verdict("x"), Verdict::Passed);
        assert_eq!(a.verdict("y"), Verdict::Failed);
        assert_eq!(a.text("y"), "# because\n");
        assert_eq!(a.verdict(TO_ITS_END), Verdict::Passed);
        assert_eq!(a.in_short(), "1 ok, 1 failed, 2.5 s");
        assert_eq!(results["- b"].verdict("x"), Verdict::Skipped);
        assert_eq!(results["- b"].in_short(), "1 skipped, 0.5 s");
    }

    #[test]
    fn a_program_that_dies_has_not_passed() {
        assert_eq!(of("1..2\nok 1 x").verdict(TO_ITS_END), Verdict::Failed);
        assert_eq!(
            of("Segmentation fault").verdict(TO_ITS_END),
            Verdict::Failed
        );
        let skipped = read("+++ igb a\nNo driver found\n\n--- 4 1.0 1.0\n").unwrap();
        assert_eq!(skipped["igb a"].verdict(TO_ITS_END), Verdict::Skipped);
        assert!(read("+++ igb a\n1..1\nok 1 x\n").is_err());
        assert!(read("+++ igb a\n--- what\n").is_err());
    }

    #[test]
    fn what_passes_with_the_stock_driver_must_pass_with_ours() {
        let worse = |stock, ours| !both(stock, ours).worse("igb a").is_empty();
        let (passed, failed) = ("1..1\nok 1 x", "1..1\nnot ok 1 x");
        let skipped = "1..1\nok 1 x # SKIP why";
        assert!(!worse(passed, passed));
        assert!(!worse(failed, failed));
        assert!(!worse(failed, passed));
        assert!(!worse(skipped, passed));
        assert!(worse(passed, failed));
        assert!(worse(passed, skipped));
        assert!(worse(passed, "1..0"));
        assert!(worse(passed, "Segmentation fault"));
        assert!(worse("1..2\nok 1 x\nnot ok 2 y", "1..2\nok 1 x"));
    }

    #[test]
    fn of_several_runs_the_best_counts() {
        let (passed, failed) = ("1..1\nok 1 x", "1..1\nnot ok 1 x");
        let mut runs = both(passed, failed);
        runs.add(both(failed, failed));
        assert_eq!(
            runs.worse("igb a"),
            ["x"],
            "only once with the stock driver"
        );
        runs.add(both(failed, passed));
        assert!(runs.worse("igb a").is_empty());
    }

    #[test]
    fn nothing_is_compared_where_everything_fails_with_the_stock_driver() {
        let (passed, failed) = ("1..1\nok 1 x", "1..1\nnot ok 1 x");
        assert!(both(failed, passed).is_void("igb a"));
        assert!(both("Segmentation fault", passed).is_void("igb a"));
        assert!(!both(passed, failed).is_void("igb a"));
        assert!(!both("1..1\nok 1 x # SKIP why", passed).is_void("igb a"));
        assert!(Both::default().is_void("igb a"));
    }

    #[test]
    fn every_device_gets_every_program_of_vfio() {
        let programs = ["iommufd", "vfio_a", TOGETHER].map(|name| Program {
            name: name.to_owned(),
            file: name.into(),
        });
        let cases = cases(&programs).unwrap();
        let names: Vec<_> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), 2 * DEVICES.len() + 2);
        assert!(names.contains(&"testdev vfio_a".to_owned()));
        assert_eq!(names.last().unwrap(), "- iommufd");
        let all = cases.iter().find(|case| case.devices == "all").unwrap();
        assert_eq!(all.addresses.len(), DEVICES.len());
    }
}
