//! Leases of the service that end: `barlease lease revoke`, `release` and `renew`.

use std::io;
use std::io::Write;
use std::time::Duration;

use barlease_proto::Renew;
use barlease_proto::Revoke;
use serde_json::json;

use super::args::RevokeArgs;
use super::args::Service;
use super::args::milliseconds;
use super::span;
use crate::failure::Failure;
use crate::output::Output;

/// For administrators. The arguments give the number of a lease, or say whose leases.
pub(crate) fn revoke(args: &RevokeArgs, output: Output) -> Result<(), Failure> {
    let whose = &args.whose;
    let number = whose.what.as_ref().and_then(|what| what.to_str());
    let revoke = Revoke {
        lease: number.and_then(|number| number.parse().ok()),
        uid: whose.user,
        pid: whose.pid,
        unit: whose.unit.clone(),
        claim: whose.claim.clone(),
        pool: whose.pool.clone(),
        all: whose.all.then_some(true),
        grace: args.grace.map(milliseconds),
    };
    let mut client = super::connect(&args.service.socket)?;
    let revoked = client
        .call(&revoke)
        .map_err(|error| super::failed("revoke", "leases", error))?;
    let leases = revoked.leases;
    let told = json!({"event": "revoking", "leases": leases});
    let text = format!("revoking {leases} leases");
    Ok(writeln!(io::stdout(), "{}", output.line(&told, &text))?)
}

/// Gives a lease of one's own back.
pub(crate) fn release(lease: u64, service: &Service) -> Result<(), Failure> {
    super::connect(&service.socket)?
        .release(lease)
        .map_err(|error| super::failed("release", &format!("lease {lease}"), error))
}

/// Has a lease of one's own live longer.
pub(crate) fn renew(
    lease: u64,
    ttl: Option<Duration>,
    service: &Service,
    output: Output,
) -> Result<(), Failure> {
    let ttl = ttl.map(milliseconds);
    let renewed = super::connect(&service.socket)?
        .call(&Renew { lease, ttl })
        .map_err(|error| super::failed("renew", &format!("lease {lease}"), error))?;
    let left = renewed.expires.map(|at| at.saturating_sub(super::now()));
    let told = json!({"event": "renewed", "lease": lease, "ttl_ms": left});
    let text = match left {
        Some(left) => format!("lease {lease} lives for {}", span(left)),
        None => format!("lease {lease} has no time limit"),
    };
    Ok(writeln!(io::stdout(), "{}", output.line(&told, &text))?)
}
