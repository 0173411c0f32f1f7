//! The command `barlease`: objects and commands in the manner of bpftool and devlink.
//!
//! `barlease OBJECT [COMMAND]`, where `show` is the default command. The library `barlease` does the
//! work; here are arguments, output and exit codes only.

mod args;
mod buffers;
mod cdi;
mod claim;
mod device;
mod doctor;
mod failure;
mod lease;
pub mod manual;
mod names;
mod number;
mod output;
mod policy;
mod service;
mod top;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::Parser;

use args::Args;
use args::Object;
use output::Output;
use service::args::BrokerCommand;

/// The definition of the command line, for completions and manual pages.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Runs the command with the arguments of the process.
#[must_use]
pub fn main() -> ExitCode {
    run(std::env::args_os())
}

/// Runs the command with these arguments, the first of which is its name.
#[must_use]
pub fn run<T: Into<OsString> + Clone>(args: impl IntoIterator<Item = T>) -> ExitCode {
    // Usage errors end the process with code 2 in here.
    let args = Args::parse_from(args);
    let output = Output::new(args.json, args.pretty);
    let answer = match args.object {
        Object::Device { command } => device::run(command.unwrap_or_default(), output),
        Object::Lease { command } => lease::run(command.unwrap_or_default(), output),
        Object::Claim { command } => claim::run(command, output),
        Object::Cdi { command } => cdi::run(command, output),
        Object::Broker { command, service } => {
            let command = command.unwrap_or(BrokerCommand::Show { service });
            service::broker(command, output).map(|()| ExitCode::SUCCESS)
        }
        Object::Policy { command } => {
            policy::run(command, output).map(|good| ExitCode::from(u8::from(!good)))
        }
        Object::Top(args) => top::run(&args, output).map(|()| ExitCode::SUCCESS),
        Object::Monitor { service } => service::monitor(&service).map(|()| ExitCode::SUCCESS),
        Object::Doctor { bdf } => doctor::run(bdf, output),
    };
    match answer {
        Ok(code) => code,
        Err(failure) => failure.exit(output),
    }
}
