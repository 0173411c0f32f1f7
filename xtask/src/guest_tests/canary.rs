//! Planted bugs: a kernel that does not report them would not report ours either.

use std::path::Path;

use anyhow::{Context, Result, bail};
use barlease_lab::debug::Watch;
use barlease_lab::prepare::Prepared;
use barlease_lab::preset::Preset;
use barlease_lab::run::{Failure, Output, Run};

use super::pool;
use crate::kmod;
use crate::steps::Count;

/// A bug of `kmod/canary`, and what the run must fail with.
struct Canary {
    /// The file that brings it about.
    bug: &'static str,
    /// Words of the report's first line.
    sign: &'static str,
    /// The function that the report names.
    culprit: &'static str,
    /// How many processes it takes.
    processes: usize,
    /// Which kernels see it: those that watch this, or all.
    only: Option<Watch>,
}

const CANARIES: &[Canary] = &[
    Canary {
        bug: "warning",
        sign: "WARNING:",
        culprit: "barlease_canary",
        processes: 1,
        only: None,
    },
    Canary {
        bug: "use_after_free",
        sign: "BUG: KASAN: slab-use-after-free",
        culprit: "barlease_canary",
        processes: 1,
        only: Some(Watch::Memory),
    },
    Canary {
        bug: "lock_inversion",
        sign: "WARNING: possible circular locking dependency detected",
        culprit: "canary_other",
        processes: 1,
        only: Some(Watch::Memory),
    },
    Canary {
        bug: "data_race",
        sign: "BUG: KCSAN: data-race",
        culprit: "[barlease_canary]",
        processes: 2,
        only: Some(Watch::Races),
    },
];

/// Runs a guest for each bug, and one without any.
pub(crate) fn run(prepared: &Prepared) -> (Count, Result<()>) {
    let module = match kmod::build(prepared, true) {
        Ok(module) => module.with_file_name("barlease_canary.ko"),
        Err(error) => return (Count::default(), Err(error)),
    };
    let watches = prepared.kernel.watches();
    let seen = |canary: &&Canary| canary.only.is_none_or(|watch| watches == Some(watch));
    let canaries = CANARIES.iter().filter(seen).map(Some);
    let runs: Vec<_> = [None].into_iter().chain(canaries).collect();
    pool::checks(
        &runs,
        |canary| {
            format!(
                "canary {}",
                canary.map_or("without a bug", |canary| canary.bug)
            )
        },
        |canary| match canary {
            None => without(prepared, &module),
            Some(canary) => canary.run(prepared, &module),
        },
        "the lab gets these wrong",
    )
}

fn guest<'a>(prepared: &'a Prepared, module: &Path, script: String) -> Run<'a> {
    Run::new(prepared, Preset::Display.machine())
        .module(module)
        .command(["sh".to_owned(), "-c".to_owned(), script])
        .output(Output::Capture)
}

/// The same guest must pass when nothing is asked for: else the others prove nothing.
fn without(prepared: &Prepared, module: &Path) -> Result<String> {
    let script = "ls /sys/kernel/debug/barlease_canary".to_owned();
    let outcome = guest(prepared, module, script).run()?;
    let listed = String::from_utf8_lossy(&outcome.output).into_owned();
    let absent = CANARIES.iter().find(|canary| !listed.contains(canary.bug));
    match (outcome.code, absent) {
        (0, None) => Ok("passes".to_owned()),
        (0, Some(canary)) => bail!("the module has no bug called {}", canary.bug),
        (code, _) => bail!("exit code {code}"),
    }
}

impl Canary {
    fn run(&self, prepared: &Prepared, module: &Path) -> Result<String> {
        let bug = format!("echo 1 >/sys/kernel/debug/barlease_canary/{} &", self.bug);
        let script = [bug.repeat(self.processes), "wait".to_owned()].join("\n");
        let error = match guest(prepared, module, script).run() {
            Ok(outcome) => bail!("nothing was reported, exit code {}", outcome.code),
            Err(error) => error,
        };
        let failure = error.downcast::<Failure>().context("start a guest")?;
        let Failure::Splat { splat, log } = failure else {
            bail!("the run failed for another reason: {failure}");
        };
        if !splat.line.contains(self.sign) || !splat.excerpt.contains(self.culprit) {
            bail!(
                "reported was something else (log: {}):\n{}",
                log.display(),
                splat.excerpt
            );
        }
        Ok(format!("reported: {}", splat.line.trim()))
    }
}
