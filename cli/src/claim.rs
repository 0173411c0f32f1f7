//! Claims of the service: directories with a socket, for containers.

use std::io;
use std::io::Write;
use std::process::ExitCode;

use barlease_proto::Claims;
use barlease_proto::EndClaim;
use barlease_proto::Method;
use barlease_proto::OpenClaim;
use serde_json::json;

use crate::args::ClaimCommand;
use crate::failure::Failure;
use crate::output::Output;
use crate::output::table;
use crate::service;
use crate::service::args::Service;

pub(crate) fn run(command: ClaimCommand, output: Output) -> Result<ExitCode, Failure> {
    match command {
        ClaimCommand::Show { service } => {
            let claims = call(&service, "show", "claims", &Claims {})?.claims;
            if output.is_json() {
                output.document(&claims)?;
            } else {
                let mut rows = table(["CLAIM"]);
                rows.add_rows(claims.iter().map(|claim| [claim]));
                crate::output::print(&rows)?;
            }
        }
        ClaimCommand::Open { claim, service } => {
            let directory = open(&service, &claim)?;
            if output.is_json() {
                output.document(&json!({"claim": claim, "directory": directory}))?;
            } else {
                writeln!(io::stdout(), "{directory}")?;
            }
        }
        ClaimCommand::End { claim, service } => {
            let object = format!("claim {claim}");
            let leases = call(&service, "end", &object, &EndClaim { claim })?.leases;
            if output.is_json() {
                output.document(&json!({"leases": leases}))?;
            } else {
                writeln!(io::stdout(), "{leases} leases revoked")?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The directory of a claim, which is made if need be.
pub(crate) fn open(service: &Service, claim: &str) -> Result<String, Failure> {
    let object = format!("claim {claim}");
    let claim = claim.to_owned();
    Ok(call(service, "open", &object, &OpenClaim { claim })?.directory)
}

fn call<M: Method>(
    service: &Service,
    operation: &str,
    object: &str,
    method: &M,
) -> Result<M::Reply, Failure> {
    service::connect(&service.socket)?
        .call(method)
        .map_err(|error| service::failed(operation, object, error))
}
