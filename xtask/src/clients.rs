//! `cargo xtask clients`: programs that nobody here wrote, with stock vfio-pci and with our driver.
//!
//! Each program does the same with each driver, in a guest with a Debian system of its own. The
//! comparison fails when a check passes with the stock driver and not with ours, or when a program
//! gets other answers, but for the differences in [`KNOWN`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use barlease_lab::prepare::{Prepared, Request, prepare};
use barlease_lab::preset::Preset;
use barlease_lab::run::{Output, Run};
use barlease_lab::system::Root;
use clap::Args;

use crate::choice::KernelChoice;
use crate::guest::{remarks, with_environment, with_module};
use crate::{checkout, kmod};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    kernel: KernelChoice,
    /// Only these
    #[arg(value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(NAMES))]
    names: Vec<String>,
    /// Show the words of each check
    #[arg(long)]
    all: bool,
}

const NAMES: [&str; 5] = ["rust", "driverctl", "qemu", "dpdk", "libvirt"];

/// A program or a family of them.
struct Client {
    name: &'static str,
    /// Packages of Debian sid that have it.
    packages: &'static [&'static str],
    /// Its checks, after `common.sh`.
    script: &'static str,
}

/// The smallest first: a client's system has the packages of those that are asked for.
const CLIENTS: [Client; NAMES.len()] = [
    Client {
        name: NAMES[0],
        packages: &[],
        script: include_str!("clients/rust.sh"),
    },
    Client {
        name: NAMES[1],
        packages: &["driverctl"],
        script: include_str!("clients/driverctl.sh"),
    },
    Client {
        name: NAMES[2],
        packages: &["qemu-system-x86"],
        script: include_str!("clients/qemu.sh"),
    },
    Client {
        name: NAMES[3],
        packages: &["dpdk", "dpdk-dev"],
        script: include_str!("clients/dpdk.sh"),
    },
    Client {
        name: NAMES[4],
        packages: &[
            "libvirt-clients",
            "libvirt-daemon",
            "libvirt-daemon-driver-nodedev",
            "libvirt-daemon-driver-qemu",
            "libvirt-daemon-system",
            "qemu-system-x86",
        ],
        script: include_str!("clients/libvirt.sh"),
    },
];

const COMMON: &str = include_str!("clients/common.sh");
const TESTPMD: &str = include_str!("clients/testpmd");

/// How devices get a driver that leases, or the stock one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Stock,
    Ours,
    /// Our module under the name of the stock one, whose place it takes.
    InPlace,
}

impl Way {
    const ALL: [Self; 3] = [Self::Stock, Self::Ours, Self::InPlace];

    fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Ours => "ours",
            Self::InPlace => "in-place",
        }
    }

    fn driver(self) -> &'static str {
        match self {
            Self::Stock | Self::InPlace => "vfio-pci",
            Self::Ours => "barlease-vfio-pci",
        }
    }
}

/// Where ours may be worse than stock, and why.
const KNOWN: &[(Way, &str, &str)] = &[
    (
        Way::Ours,
        "DPDK: dpdk-devbind.py",
        "its list of drivers is fixed: it counts ours among the kernel's own",
    ),
    (
        Way::Ours,
        "DPDK: testpmd sends",
        "it takes a device only from a driver called vfio-pci",
    ),
];

/// A check of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Check {
    /// Whether its words are to be the same with every driver.
    same: bool,
    code: Option<i32>,
    words: String,
}

impl Check {
    fn passed(&self) -> bool {
        self.code == Some(0)
    }
}

/// The checks that a run has made, by name, and their order.
type Checks = (Vec<String>, BTreeMap<String, Check>);

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let prepared = prepare(&Request {
        kernel: options.kernel.kernel.clone(),
        update: false,
    })?;
    if prepared.kernel.watches().is_some() {
        bail!("a kernel of the lab's own has the stock driver built in: choose one of Debian's");
    }
    let is_wanted = |client: &&Client| {
        options.names.is_empty() || options.names.iter().any(|n| n == client.name)
    };
    let clients: Vec<_> = CLIENTS.iter().filter(is_wanted).collect();
    let mut results = BTreeMap::new();
    for way in Way::ALL {
        println!("\n=== {} ({})", way.name(), way.driver());
        let checks = guest(&prepared, &clients, way)?;
        for name in &checks.0 {
            let check = &checks.1[name];
            let verdict = if check.passed() { "ok" } else { "FAILED" };
            println!("{verdict:>6}  {name}");
            if options.all || !check.passed() {
                for line in check.words.lines() {
                    println!("        | {line}");
                }
            }
        }
        results.insert(way, checks);
    }
    let (table, worse) = compare(&results);
    println!("\n{table}");
    if worse.is_empty() {
        println!("no client sees a difference that is not known");
        return Ok(ExitCode::SUCCESS);
    }
    for line in worse {
        println!("{line}");
    }
    Ok(ExitCode::FAILURE)
}

/// Runs the clients with a driver.
fn guest(prepared: &Prepared, clients: &[&Client], way: Way) -> Result<Checks> {
    let mut packages: Vec<_> = clients.iter().flat_map(|c| c.packages).copied().collect();
    packages.sort_unstable();
    packages.dedup();
    let root = Root::prepare(prepared, &packages)?;
    let folder = checkout::target().join("clients").join(way.name());
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let put = |name: &str, text: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    };

    let mut machine = Preset::Full.machine();
    machine.memory = 2048;
    let mut run = Run::new(prepared, machine)
        .system(&root.disk())
        .file(put("common.sh", COMMON)?, "/lab/clients/common.sh")
        .file(put("testpmd", TESTPMD)?, "/lab/clients/testpmd")
        .env("WAY", way.name())
        .env("DRIVER", way.driver())
        .timeout(std::time::Duration::from_secs(3600))
        .output(Output::Capture);
    let mut script = ". /lab/clients/common.sh\n".to_owned();
    match way {
        Way::Stock => {}
        Way::Ours => run = with_module(run, prepared)?,
        Way::InPlace => {
            let module = kmod::build_as_stock(prepared, false)?;
            run = run.file(module, "/lab/clients/vfio-pci.ko");
            script += "rmmod vfio_pci && insmod /lab/clients/vfio-pci.ko || exit\n";
        }
    }
    for client in clients {
        if client.name == "rust" {
            run = run.file(program()?, "/lab/clients/barlease-clients");
        }
        let place = format!("/lab/clients/{}.sh", client.name);
        run = run.file(put(&format!("{}.sh", client.name), client.script)?, &place);
        script += &format!(". {place}\n");
    }
    let run = run.file(put("all.sh", &script)?, "/lab/clients/all.sh");
    let outcome = with_environment(run)
        .command(["bash", "/lab/clients/all.sh"])
        .run()?;
    let said = String::from_utf8_lossy(&outcome.output).replace('\r', "");
    eprint!("{}", remarks(&outcome));
    let checks = parse(&said);
    if outcome.code != 0 && checks.0.is_empty() {
        bail!("the guest ended with {}:\n{said}", outcome.code);
    }
    Ok(checks)
}

/// The programs on other crates.
fn program() -> Result<PathBuf> {
    let status = checkout::cargo("clients")
        .args(["build", "--quiet", "--target-dir"])
        .arg(checkout::target().join("clients"))
        .status()
        .context("start cargo")?;
    if !status.success() {
        bail!("the programs in clients/ do not build");
    }
    Ok(checkout::target().join("clients/debug/barlease-clients"))
}

/// The checks in the output of a run.
fn parse(said: &str) -> Checks {
    let mut order = Vec::new();
    let mut checks = BTreeMap::new();
    let mut current: Option<(String, Check)> = None;
    for line in said.lines() {
        if let Some((name, kind)) = line
            .strip_prefix("@begin ")
            .and_then(|rest| rest.rsplit_once(' '))
        {
            let check = Check {
                same: kind == "same",
                code: None,
                words: String::new(),
            };
            order.push(name.to_owned());
            checks.insert(name.to_owned(), check.clone());
            current = Some((name.to_owned(), check));
        } else if let Some((_, code)) = line
            .strip_prefix("@end ")
            .and_then(|rest| rest.rsplit_once(' '))
        {
            if let Some((name, mut check)) = current.take() {
                check.code = code.parse().ok();
                checks.insert(name, check);
            }
        } else if let Some((_, check)) = &mut current {
            check.words += line;
            check.words.push('\n');
        }
    }
    // The guest ended in the midst of it.
    if let Some((name, check)) = current {
        checks.insert(name, check);
    }
    (order, checks)
}

/// A table of verdicts, and where ours is worse than stock.
fn compare(results: &BTreeMap<Way, Checks>) -> (String, Vec<String>) {
    let mut table =
        "| check | stock vfio-pci | barlease-vfio-pci | in its place |\n|---|---|---|---|\n"
            .to_owned();
    let mut worse = Vec::new();
    let (order, stock) = &results[&Way::Stock];
    for name in order {
        let before = &stock[name];
        let mut cells = vec![if before.passed() { "ok" } else { "fails" }.to_owned()];
        for way in [Way::Ours, Way::InPlace] {
            let now = results.get(&way).and_then(|(_, checks)| checks.get(name));
            let fault = match now {
                None => Some("not run".to_owned()),
                Some(now) if before.passed() && !now.passed() => Some("fails".to_owned()),
                Some(now) if before.same && now.passed() && now.words != before.words => {
                    Some("other answers".to_owned())
                }
                Some(_) => None,
            };
            let known = KNOWN
                .iter()
                .find(|known| (known.0, known.1) == (way, name.as_str()));
            cells.push(match (&fault, known, now) {
                (None, _, Some(now)) if now.passed() => "ok".to_owned(),
                (None, ..) => "fails".to_owned(),
                (Some(fault), Some((_, _, reason)), _) => format!("{fault}: {reason}"),
                (Some(fault), None, _) => {
                    let words = now.map_or("", |now| now.words.as_str());
                    worse.push(format!(
                        "{name} with {}: {fault}\n{}",
                        way.name(),
                        differences(&before.words, words)
                    ));
                    fault.clone()
                }
            });
        }
        table += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    (table, worse)
}

/// The lines that only one of them has.
fn differences(stock: &str, here: &str) -> String {
    let only = |these: &str, others: &str, mark: &str| -> String {
        let others: Vec<_> = others.lines().collect();
        let lines = these.lines().filter(|line| !others.contains(line));
        lines.map(|line| format!("  {mark} {line}\n")).collect()
    };
    only(stock, here, "stock:") + &only(here, stock, "here: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: &str, kind: &str, words: &str, code: i32) -> String {
        format!("@begin {name} {kind}\n{words}\n@end {name} {code}\n")
    }

    fn results(stock: &str, ours: &str, in_place: &str) -> BTreeMap<Way, Checks> {
        let parsed = [stock, ours, in_place].map(parse);
        Way::ALL.into_iter().zip(parsed).collect()
    }

    #[test]
    fn clients_have_their_names() {
        assert_eq!(CLIENTS.map(|client| client.name), NAMES);
    }

    #[test]
    fn checks_are_read() {
        let (order, checks) =
            parse("noise\n@begin a b: c same\n1\n2\n@end a b: c 3\n@begin d free\nx\n");
        assert_eq!(order, ["a b: c", "d"]);
        assert!(checks["a b: c"].same && checks["a b: c"].code == Some(3));
        assert_eq!(checks["a b: c"].words, "1\n2\n");
        assert!(!checks["d"].same && checks["d"].code.is_none());
        assert_eq!(checks["d"].words, "x\n");
    }

    #[test]
    fn whatever_is_worse_than_stock_is_found() {
        let good = said("x", "same", "1", 0);
        let worse = |ours: &str| compare(&results(&good, ours, &good)).1.len();
        assert_eq!(worse(&good), 0);
        assert_eq!(worse(&said("x", "same", "1", 1)), 1);
        assert_eq!(worse(&said("x", "same", "2", 0)), 1);
        assert_eq!(worse(""), 1);
        // The same failure, and other words where they are free.
        let bad = said("x", "free", "1", 1);
        assert_eq!(compare(&results(&bad, &bad, &bad)).1, [""; 0]);
        let free = |words: &str| said("x", "free", words, 0);
        assert_eq!(
            compare(&results(&free("1"), &free("2"), &free("3"))).1,
            [""; 0]
        );
    }

    #[test]
    fn only_lines_that_differ_are_shown() {
        assert_eq!(differences("a\nb\n", "a\nc\n"), "  stock: b\n  here:  c\n");
    }

    #[test]
    fn a_known_difference_is_said_and_does_not_count() {
        let (way, name, reason) = KNOWN[0];
        let (good, bad) = (said(name, "free", "", 0), said(name, "free", "", 1));
        assert_eq!(way, Way::Ours);
        let (table, worse) = compare(&results(&good, &bad, &good));
        assert!(worse.is_empty() && table.contains(reason), "{table}");
        assert_eq!(compare(&results(&good, &good, &bad)).1.len(), 1);
    }
}
