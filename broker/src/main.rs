//! The daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    barleased::run(std::env::args_os(), &barleased::device::open)
}
