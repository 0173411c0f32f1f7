//! `barlease lease`.

mod access;
mod grant;
pub(crate) mod holders;
mod revoke;
mod show;
mod take;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use barlease::Lease;
use barlease::Receiver;

use crate::args::LeaseCommand;
use crate::args::Source;
use crate::failure::Failure;
use crate::output::Output;
use crate::service;

/// How long an owner may take to send its lease.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn run(command: LeaseCommand, output: Output) -> Result<ExitCode, Failure> {
    match command {
        LeaseCommand::Show { bdf } => show::run(bdf, output),
        LeaseCommand::Grant(args) => return grant::run(&args, output),
        LeaseCommand::Revoke(args) => match &args.whose.what {
            // A number is a lease of the service's.
            Some(socket) if socket.to_str().is_none_or(|it| it.parse::<u64>().is_err()) => {
                if args.grace.is_some() {
                    return Err(Failure::usage(
                        "revoke: --grace is for leases of barleased: a socket's is revoked at once",
                    ));
                }
                revoke::run(socket, args.no_wait, output)
            }
            _ if args.no_wait => Err(Failure::usage(
                "revoke: --no-wait is for the socket of a `lease grant`: barleased waits for no \
                 importer",
            )),
            _ => service::revoke(&args, output),
        },
        LeaseCommand::Acquire(args) => service::acquire(&args, output),
        LeaseCommand::List(args) => service::list(&args, output),
        LeaseCommand::Watch(args) => service::watch(&args, output),
        LeaseCommand::Release { lease, service } => service::release(lease, &service),
        LeaseCommand::Renew {
            lease,
            ttl,
            service,
        } => service::renew(lease, ttl, &service, output),
        LeaseCommand::Holders { what } => holders::run(what.as_deref(), output),
        LeaseCommand::Take { socket, command } => take::run(&socket, &command),
        LeaseCommand::Dump {
            source,
            range,
            width,
        } => access::dump(&source.source(), range, width, output),
        LeaseCommand::Read {
            source,
            offset,
            width,
        } => access::read(&source, offset, width, output),
        LeaseCommand::Fill {
            source,
            value,
            range,
            width,
        } => access::fill(&source, range, value, width),
        LeaseCommand::Write {
            source,
            offset,
            value,
            width,
        } => access::write(&source, offset, value, width),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Nobody answers at the socket of a lease.
fn unreachable(path: &Path, error: &io::Error) -> Failure {
    let reason = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "nobody grants a lease there (the argument is the socket of `barlease lease grant`)"
        }
        io::ErrorKind::PermissionDenied => "the lease is for other users (`lease grant --user`)",
        _ => return Failure::file("connect", path, error),
    };
    Failure::new(format!("connect: {}: {error}: {reason}", path.display()))
}

/// Gets hold of a lease.
fn receive(source: &Source) -> Result<Lease, Failure> {
    match source {
        Source::Fd(fd) => Ok(Lease::from_inherited(*fd)?),
        Source::Socket(path) => {
            let socket = UnixStream::connect(path).map_err(|error| unreachable(path, &error))?;
            let mut receiver = Receiver::new();
            // For tests, which have no dma-buf.
            if std::env::var_os("BARLEASE_ANY_FILE").is_some() {
                receiver = receiver.any_file();
            }
            Ok(receiver.receive_within(&socket, RECEIVE_TIMEOUT)?)
        }
    }
}
