//! Litmus tests of the order of memory, judged by the kernel's own memory model.
//!
//! `herd7` tries every execution of a few lines of C; the rules are in `tools/memory-model` of the
//! kernel's source, which is all of it that is kept.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::kernels::prepare::{self, Prepared};
use crate::kernels::source::SourceBuild;
use crate::packages::apt::{Apt, Package};
use crate::packages::arch::Arch;
use crate::packages::cache::{self, Stamp, fingerprint};
use crate::packages::command;
use crate::packages::extra::Extra;
use crate::packages::sysroot::Sysroot;

/// All of the source but the model, which has neither of these.
const LEFT_OUT: [&str; 6] = ["*.c", "*.h", "*.rs", "*.rst", "*.dts*", "*.json"];

const STAMP: &str = "stamp.json";

/// The judge.
#[derive(Debug)]
pub struct Herd {
    sysroot: Sysroot,
    /// `tools/memory-model`.
    model: PathBuf,
}

/// Whether what a test asks for happens in its executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// In none.
    Never,
    /// In some, not in all.
    Sometimes,
    /// In all.
    Always,
}

impl Observation {
    /// The word that herd7 has for it.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "Never" => Some(Self::Never),
            "Sometimes" => Some(Self::Sometimes),
            "Always" => Some(Self::Always),
            _ => None,
        }
    }
}

impl Herd {
    /// Takes what it needs from the cache, or brings it there.
    ///
    /// # Errors
    ///
    /// When herd7 or the kernel's source cannot be had.
    pub fn prepare(prepared: &Prepared) -> Result<Self> {
        let cache = &prepared.cache;
        let plan = prepare::plan(cache).context("read the plan from the cache")?;
        let source = &plan.kernel(None)?.source;
        let tools = Extra {
            plan: &plan,
            sysroot: &prepared.sysroot,
            names: &["herdtools7"],
            note: "litmus-tools.json",
            what: "herd7",
            purpose: "to judge litmus tests",
        };
        let herd = Self {
            sysroot: prepared.sysroot.clone(),
            model: cache.path("memory-model").join(source.file_name()),
        };
        if tools.added().is_some() && stamp(source).fits(&herd.model.join(STAMP)) {
            return Ok(herd);
        }
        let _turn = cache.lock("prepare", "preparing the kernel's memory model")?;
        let apt = Apt::set_up(cache, Arch::Amd64)?.0;
        tools.add(&apt)?;
        if stamp(source).fits(&herd.model.join(STAMP)) {
            return Ok(herd);
        }
        let left_out = LEFT_OUT.map(str::to_owned);
        let name = format!("memory-model-{}", source.name);
        let build = SourceBuild::of_tools(cache, &prepared.sysroot, &name, &left_out);
        build.fetch(&apt, source, "for the kernel's memory model")?;
        let model = build.folder.join("src/tools/memory-model");
        cache::write_json(&model.join(STAMP), &stamp(source))?;
        cache::remove(&herd.model)?;
        fs::create_dir_all(cache.path("memory-model"))?;
        fs::rename(&model, &herd.model)
            .with_context(|| format!("keep {}", herd.model.display()))?;
        cache::remove(&build.folder)?;
        Ok(herd)
    }

    /// Tries every execution of a test.
    ///
    /// # Errors
    ///
    /// When herd7 does not understand the test.
    pub fn observe(&self, test: &str) -> Result<Observation> {
        let file = tempfile::Builder::new().suffix(".litmus").tempfile()?;
        fs::write(&file, test).context("write the litmus test")?;
        let mut herd = self.sysroot.program("usr/bin/herd7");
        herd.current_dir(&self.model)
            .arg("-set-libdir")
            .arg(self.sysroot.path("usr/share/herdtools7/herd"))
            .args(["-conf", "linux-kernel.cfg"])
            .arg(file.path());
        let said = command::output(&mut herd, "judge a litmus test with herd7")?;
        let observation = said
            .lines()
            .find_map(|line| line.strip_prefix("Observation "))
            .and_then(|rest| Observation::parse(rest.split(' ').nth(1)?));
        let Some(observation) = observation else {
            bail!("herd7 gives no verdict: {said}");
        };
        Ok(observation)
    }
}

fn stamp(source: &Package) -> Stamp {
    Stamp::of([source.file_name(), fingerprint(LEFT_OUT)])
}
