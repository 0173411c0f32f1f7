//! The one door to everything a developer does: `cargo xtask …`.
//!
//! Only the command line is here; the work is done by the crate `barlease-lab`.

mod bench;
mod checkout;
mod checks;
mod choice;
mod clients;
mod demo;
mod dist;
mod guest;
mod guest_tests;
mod kmod;
mod litmus;
mod masks;
mod random;
mod steps;
mod system;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Everything a developer of Barlease does.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// See the main job: a frame buffer leased to other processes, and taken back
    Demo(demo::Options),
    /// Run every check and every test, on the host and in guests.
    Test(test::Options),
    /// Measure stock vfio-pci and Barlease side by side
    Bench(bench::Options),
    /// The random test: steps drawn from a seed, in a guest, each judged by the contract
    Random(random::Options),
    /// The kernel's own tests of VFIO and IOMMUFD, with the stock driver and with ours, side by
    /// side
    Selftests(guest_tests::SelftestOptions),
    /// Programs that others wrote, with stock vfio-pci and with ours, side by side
    Clients(clients::Options),
    /// Judge the order of memory that the module relies on by the kernel's memory model
    Litmus,
    /// Build, check or format the kernel module.
    Kmod(kmod::Options),
    /// Make packages: the command, the module for DKMS, what Debian's kernel headers lack
    Dist(dist::Options),
    /// Prepare and run guests.
    #[command(subcommand)]
    Vm(vm::Task),
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            // Without the backtrace that RUST_BACKTRACE would add: these errors are for people who
            // use the command.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Demo(options) => demo::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Random(options) => random::run(&options),
        Task::Clients(options) => clients::run(&options),
        Task::Selftests(options) => guest_tests::selftests(&options),
        Task::Litmus => litmus::run(),
        Task::Kmod(options) => kmod::run(&options),
        Task::Dist(options) => dist::run(&options),
        Task::Vm(task) => vm::run(task),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn words_after_the_binary_belong_to_the_test() {
        let words = [
            "xtask",
            "vm",
            "test",
            "/t/smoke-1",
            "--nocapture",
            "filter",
            "--skip",
            "x",
        ];
        let Task::Vm(vm::Task::Test(options)) = Cli::try_parse_from(words).unwrap().task else {
            panic!()
        };
        assert_eq!(options.arguments, ["--nocapture", "filter", "--skip", "x"]);
    }
}
