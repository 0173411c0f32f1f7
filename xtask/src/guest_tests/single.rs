//! One test binary in a guest, as cargo's runner asks for it, and some in one guest.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use barlease_lab::prepare::{Request, prepare};
use barlease_lab::preset::Preset;
use barlease_lab::run::Run;

use super::applies;
use super::batch::Batch;
use super::binary::{as_tests_run, binaries, called, has_tests};
use super::pool::{Lane, run_batches};
use crate::guest::{finish, in_lab};
use crate::kmod;

/// Runs a test binary of cargo's in a guest, with these arguments for it. One that would only list
/// its tests runs here.
pub(crate) fn one(file: &Path, arguments: &[String]) -> Result<ExitCode> {
    let name = name_of(file);
    if runs_nothing(file, arguments) {
        let status = Command::new(file).args(arguments).status();
        let status = status.with_context(|| format!("start {}", file.display()))?;
        return Ok(ExitCode::from(
            status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(u8::MAX),
        ));
    }
    let preset = match std::env::var("BARLEASE_PRESET") {
        Ok(name) => name.parse()?,
        Err(_) => Preset::of_tests(&file_stem(file)),
    };
    let prepared = prepare(&Request::default())?;
    let lacks = applies::lacks(&prepared.kernel);
    eprint!("{}", applies::remarks(&lacks, &[&name]));
    if applies::refusal(&lacks, &name).is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    // Cargo has built it for the host.
    let binary = if prepared.kernel.arch().is_native() {
        file.to_owned()
    } else {
        called(&prepared, &name)?
    };
    let place = in_lab(&binary)?;
    let run = Run::new(&prepared, preset.machine()).file(&binary, &place);
    if file_stem(file).starts_with("as_stock") && prepared.kernel.watches().is_none() {
        kmod::build_as_stock(&prepared, false)?;
    }
    let run = as_tests_run(run, &kmod::build(&prepared, false)?)?.command(
        [place]
            .into_iter()
            .chain(arguments.iter().cloned())
            .chain(applies::arguments(&lacks, &name)),
    );
    finish(&run.run()?)
}

/// Runs some of the test binaries in one guest, one after the other; the machine is that of the
/// first.
pub(crate) fn together(kernel: Option<String>, names: Vec<String>) -> Result<ExitCode> {
    let prepared = prepare(&Request {
        kernel,
        update: false,
    })?;
    let only: Vec<_> = names.iter().map(String::as_str).collect();
    let binaries = binaries(&prepared, &only)?;
    let lane = Lane {
        binaries: &binaries,
        prepared: &prepared,
        module: &kmod::build(&prepared, false)?,
    };
    let preset = Preset::of_tests(&names[0]);
    let (_, result) = run_batches([(&lane, Batch { preset, names })].into(), None, 1);
    result.map(|()| ExitCode::SUCCESS)
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
fn runs_nothing(file: &Path, arguments: &[String]) -> bool {
    let lists = |argument: &String| argument == "--list" || argument == "--help";
    arguments.iter().any(lists) || !has_tests(file, arguments)
}
