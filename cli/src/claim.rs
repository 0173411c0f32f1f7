//! Claims of the service: directories with a socket, for containers.

use std::io;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use barlease_proto::Claims;
use barlease_proto::Client;
use barlease_proto::EndClaim;
use barlease_proto::Method;
use barlease_proto::OpenClaim;
use serde_json::json;

use crate::args::ClaimCommand;
use crate::failure::Failure;
use crate::output::Output;
use crate::output::table;

pub(crate) fn run(command: ClaimCommand, output: Output) -> Result<ExitCode, Failure> {
    match command {
        ClaimCommand::Show { service } => {
            let claims = call(&service, "list claims", &Claims {})?.claims;
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
            let operation = format!("end claim {claim}");
            let leases = call(&service, &operation, &EndClaim { claim })?.leases;
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
pub(crate) fn open(service: &Path, claim: &str) -> Result<String, Failure> {
    let operation = format!("open claim {claim}");
    let claim = claim.to_owned();
    Ok(call(service, &operation, &OpenClaim { claim })?.directory)
}

fn call<M: Method>(service: &Path, operation: &str, method: &M) -> Result<M::Reply, Failure> {
    let failed = |error: barlease_proto::Error| {
        use std::error::Error;
        let cause = error.source().map(|cause| format!(": {cause}"));
        let cause = cause.unwrap_or_default();
        let place = service.display();
        Failure::new(format!("{operation}: {place}: {error}{cause}"))
    };
    let mut client = Client::connect(service).map_err(failed)?;
    client.call(method).map_err(failed)
}
