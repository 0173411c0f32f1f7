//! `barlease policy`: files of a policy, without the service.

mod explain;
mod files;

use std::io;
use std::io::Write;
use std::path::PathBuf;

use barlease_proto::SOCKET;
use clap::Subcommand;
use serde_json::json;

use self::files::Files;
use crate::failure::Failure;
use crate::names;
use crate::output::Output;
use crate::service::args::WhatArgs;

/// Where the policy is.
const DIRECTORY: &str = "/etc/barlease/policy.d";

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Check files of a policy, read as one: each error with its file, line and key
    ///
    /// Names of users and groups are those of this host. JSON has valid, errors (a list of file,
    /// line, key, message), devices and pools.
    Check {
        /// Files, or directories whose *.toml are read
        #[arg(default_value = DIRECTORY)]
        files: Vec<PathBuf>,
    },
    /// Say which rule allows or refuses a request, of the service or of files
    ///
    /// Asks the service, which also knows what is leased just now and says who holds it; with
    /// --policy, only files are read, and no service is needed. Exit code 1 if it is refused.
    Explain(ExplainArgs),
    /// Print the JSON schema of a file of a policy, for editors
    Schema,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    what: WhatArgs,
    /// Instead of asking the service: read these files, or the *.toml of these directories
    #[arg(long, value_name = "FILE")]
    policy: Vec<PathBuf>,
    /// For this user, by name or number; else for the user that asks
    #[arg(long, value_name = "USER", value_parser = names::user)]
    as_uid: Option<u32>,
    /// For a process of this unit of the system's manager
    #[arg(long, value_name = "UNIT")]
    unit: Option<String>,
    /// For a process in this control group, as a path from the root of the hierarchy
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// For a connection through the socket of this claim
    #[arg(long, value_name = "NAME")]
    claim: Option<String>,
    /// Socket of barleased
    #[arg(long = "service", value_name = "SOCKET", env = "BARLEASE_SOCKET")]
    #[arg(default_value = SOCKET)]
    socket: PathBuf,
}

/// A check and an explanation say in their exit code how it is.
pub(crate) fn run(command: PolicyCommand, output: Output) -> Result<bool, Failure> {
    match command {
        PolicyCommand::Check { files } => check(&files, output),
        PolicyCommand::Explain(args) if args.policy.is_empty() => explain::ask(&args, output),
        PolicyCommand::Explain(args) => explain::read(&args, output),
        PolicyCommand::Schema => {
            let schema = barlease_ledger::policy::schema();
            let text = serde_json::to_string_pretty(&schema).unwrap_or_default();
            writeln!(io::stdout(), "{text}")?;
            Ok(true)
        }
    }
}

fn check(files: &[PathBuf], output: Output) -> Result<bool, Failure> {
    let files = Files::read(files)?;
    let policy = files.parse();
    if output.is_json() {
        let told = match &policy {
            Ok(policy) => {
                let devices = policy.devices().iter().map(|device| &*device.name);
                let pools = policy.pools().iter().map(|pool| &*pool.name);
                json!({
                    "valid": true,
                    "errors": [],
                    "devices": devices.collect::<Vec<_>>(),
                    "pools": pools.collect::<Vec<_>>(),
                })
            }
            Err(errors) => {
                let error = |error: &barlease_ledger::policy::PolicyError| {
                    json!({
                        "file": &*error.place.file,
                        "line": error.place.line,
                        "key": error.key,
                        "message": error.message,
                    })
                };
                json!({
                    "valid": false,
                    "errors": errors.iter().map(error).collect::<Vec<_>>(),
                    "devices": null,
                    "pools": null,
                })
            }
        };
        output.document(&told)?;
        return Ok(policy.is_ok());
    }
    match policy {
        Ok(policy) => {
            let (devices, pools) = (policy.devices().len(), policy.pools().len());
            let count = files.count();
            writeln!(
                io::stdout(),
                "valid: {count} files, {devices} devices, {pools} pools"
            )?;
            Ok(true)
        }
        Err(errors) => {
            for error in errors {
                writeln!(io::stdout(), "{error}")?;
            }
            Ok(false)
        }
    }
}
