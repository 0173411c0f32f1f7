//! Defects of the kernel that the stock driver meets: each in a guest of its own, since it may not
//! survive it.

use std::path::Path;

use anyhow::{Context, Result, bail};
use barlease_lab::prepare::Prepared;
use barlease_lab::preset::Preset;
use barlease_lab::run::{Failure, Output, Run};

use super::binary::{as_tests_run, called};
use super::pool;
use crate::guest::in_lab;
use crate::kmod;
use crate::steps::Count;

/// The test binary.
const BINARY: &str = "kernel_defects";

/// A test of that binary, and what comes of it.
struct Defect {
    test: &'static str,
    sign: Sign,
}

/// How a kernel shows that it has a defect.
enum Sign {
    /// A line of its log has the first, and what is around it the other.
    Log(&'static str, &'static str),
    /// The test fails, and says this.
    Test(&'static str),
}

const DEFECTS: &[Defect] = &[
    Defect {
        test: "stock_moves_a_mapping_with_its_entries",
        sign: Sign::Log(": bad pud ", ""),
    },
    Defect {
        test: "stock_unmaps_a_page_inside_of_a_gib",
        sign: Sign::Log("BUG: unable to handle page fault", "split_huge_pmd"),
    },
    Defect {
        test: "stock_serves_a_store_while_stores_are_tracked",
        sign: Sign::Test("left: Signal(14)"),
    },
];

/// Runs a guest for each defect. A kernel that has it not passes, and that is said.
pub(crate) fn run(prepared: &Prepared) -> (Count, Result<()>) {
    let binary = match called(prepared, BINARY) {
        Ok(binary) => binary,
        Err(error) => return (Count::default(), Err(error)),
    };
    pool::checks(
        DEFECTS,
        |defect| defect.test.to_owned(),
        |defect| defect.run(prepared, &binary),
        "something else came of these",
    )
}

impl Defect {
    fn run(&self, prepared: &Prepared, binary: &Path) -> Result<String> {
        let place = in_lab(binary)?;
        let run = Run::new(prepared, Preset::of_tests(BINARY).machine()).file(binary, &place);
        let words = [&place, "--ignored", "--exact", self.test].map(str::to_owned);
        let run = as_tests_run(run, &kmod::build(prepared, false)?)?
            .command(words)
            .output(Output::Capture)
            .run();
        match (run, &self.sign) {
            (Ok(outcome), _) if outcome.code == 0 => {
                let output = String::from_utf8_lossy(&outcome.output).into_owned();
                if !output.contains("1 passed") {
                    bail!("there is no such test:\n{output}");
                }
                Ok(
                    "not on this kernel, or no more: does docs/kernel-defects.md say so?"
                        .to_owned(),
                )
            }
            (Ok(outcome), Sign::Test(sign)) => {
                let output = String::from_utf8_lossy(&outcome.output).into_owned();
                if !output.contains(sign) {
                    bail!("exit code {}:\n{output}", outcome.code);
                }
                Ok(format!("seen: {sign}"))
            }
            (Ok(outcome), Sign::Log(..)) => {
                let output = String::from_utf8_lossy(&outcome.output).into_owned();
                bail!(
                    "exit code {}, and nothing in the log:\n{output}",
                    outcome.code
                );
            }
            (Err(error), sign) => {
                let failure = error.downcast::<Failure>().context("start a guest")?;
                match (&failure, sign) {
                    (Failure::Splat { splat, .. }, Sign::Log(line, around))
                        if splat.line.contains(line) && splat.excerpt.contains(around) =>
                    {
                        Ok(format!("seen: {}", splat.line.trim()))
                    }
                    _ => bail!("{failure}"),
                }
            }
        }
    }
}
