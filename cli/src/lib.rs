//! The command `barlease`: objects and commands in the manner of bpftool and devlink.
//!
//! `barlease OBJECT [COMMAND]`, where `show` is the default command of objects that have it. The
//! library `barlease` does the work; here are arguments, output and exit codes only.

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
mod process;
mod service;
mod top;
mod verbose;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::Parser;

use args::Args;
use args::ClaimCommand;
use args::Object;
use failure::Failure;
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
    let words: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let args = match Args::try_parse_from(&words) {
        Ok(args) => args,
        Err(error) => return misused(&error, &words),
    };
    let output = Output::new(args.json, args.pretty);
    verbose::begin(args.verbose);
    let answer = match args.object {
        Object::Device { command } => device::run(command.unwrap_or_default(), output),
        Object::Lease { command } => lease::run(command.unwrap_or_default(), output),
        Object::Claim { command, service } => {
            claim::run(command.unwrap_or(ClaimCommand::Show { service }), output)
        }
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
        Object::Doctor { bdf, peer } => doctor::run(bdf, peer, output),
    };
    match answer {
        Ok(code) => code,
        Err(failure) => failure.exit(output),
    }
}

/// Help, the version, or a wrong command line, whose options tell nothing yet but whether they ask
/// for JSON.
fn misused(error: &clap::Error, words: &[OsString]) -> ExitCode {
    let words = words.iter().skip(1).take_while(|word| *word != "--");
    let words: Vec<&str> = words.filter_map(|word| word.to_str()).collect();
    let asks = |long: &str, short: char| {
        let is_short = |word: &str| word.starts_with('-') && !word.starts_with("--");
        let has = |word: &&str| is_short(word) && word.contains(short);
        words.contains(&long) || words.iter().any(has)
    };
    let output = Output::new(asks("--json", 'j'), asks("--pretty", 'p'));
    if error.use_stderr() && output.is_json() {
        let text = error.render().to_string();
        // The usage follows.
        let text = text.split("\n\n").next().unwrap_or_default();
        return Failure::usage(text.trim_start_matches("error: ")).exit(output);
    }
    // There is nobody to tell that it cannot be said.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
}
