//! `barlease doctor`.

use std::process::ExitCode;

use barlease::Bdf;
use barlease::doctor::Doctor;
use barlease::doctor::Verdict;

use crate::failure::Failure;
use crate::output::Output;
use crate::output::print;
use crate::output::table;

/// Exit code 1 if anything fails.
pub(crate) fn run(
    bdf: Option<Bdf>,
    peer: Option<Bdf>,
    output: Output,
) -> Result<ExitCode, Failure> {
    let mut checks = Doctor::new().examine(bdf);
    if let (Some(bdf), Some(peer)) = (bdf, peer) {
        checks.extend(Doctor::new().examine_route(bdf, peer));
    }
    if output.is_json() {
        output.document(&checks)?;
    } else {
        let mut table = table(["CHECK", "VERDICT", "FOUND", "REMEDY"]);
        for check in &checks {
            let verdict = match check.verdict {
                Verdict::Ok => "ok",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
                _ => "skip",
            };
            table.add_row([
                check.name,
                verdict,
                &check.found,
                check.remedy.as_deref().unwrap_or_default(),
            ]);
        }
        print(&table)?;
    }
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    Ok(ExitCode::from(u8::from(failed)))
}
