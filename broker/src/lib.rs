//! The daemon `barleased`: it owns devices, and leases ranges of their BARs to many processes.
//!
//! All decisions are those of `barlease_ledger`; here they are carried out.
//!
//! | module | what |
//! |---|---|
//! | `server` | the loop: sockets, signals, devices, processes and time |
//! | `accept` | clients come |
//! | `calls` | the methods of the interface |
//! | `claims` | a directory with a socket for each claim |
//! | `cgroup` | control groups, and their ends |
//! | `connection` | what was received from a client, and what is left to send |
//! | `peer` | the process that connected |
//! | `service` | the core, and what it has done with ledger and devices |
//! | [`device`] | a device: opened, listed, exported from, revoked |
//! | `find` | the device that a policy means |
//! | `scrub` | clearing, beside the loop |
//! | `finished` | what was done beside the loop |
//! | [`policy`] | the policy's files |
//! | [`store`] | the file of the ledger: append, compact, read back after a kill |
//! | [`words`] | the words of the protocol and those of the core |

#![forbid(unsafe_code)]

mod accept;
mod calls;
mod cgroup;
mod claims;
mod connection;
pub mod device;
mod find;
mod finished;
mod peer;
pub mod policy;
mod scrub;
mod server;
mod service;
mod socket;
pub mod store;
pub mod words;

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use rustix::process::Resource;
use rustix::process::getrlimit;
use rustix::process::setrlimit;
use signal_hook::consts::SIGHUP;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::pipe;

use self::claims::Claims;
use self::finished::Inbox;
pub use self::server::Opener;
use self::server::Server;
use self::server::Signals;
use self::service::Service;
use self::socket::Socket;

/// Leases ranges of the BARs of PCI devices to many processes, by a policy.
///
/// SIGHUP reads the policy again. SIGTERM reclaims all leases, with the grace that the policy
/// gives, and ends; a second one ends at once.
#[derive(Debug, Parser)]
#[command(name = "barleased", version)]
pub struct Options {
    /// Directory of the policy: all its *.toml are read as one.
    #[arg(long, default_value = "/etc/barlease/policy.d")]
    policy: PathBuf,
    /// Directory of the socket, `leases.sock`, and of those of claims, which is made if need be.
    #[arg(long, default_value = "/run/barleased")]
    socket: PathBuf,
}

/// Runs the daemon.
pub fn run<T: Into<OsString> + Clone>(
    args: impl IntoIterator<Item = T>,
    opener: &Opener<'_>,
) -> ExitCode {
    let options = match Options::try_parse_from(args) {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match serve(options, opener) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("barleased: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: Options, opener: &Opener<'_>) -> io::Result<()> {
    let signals = signals()?;
    // Each client is a descriptor.
    let mut descriptors = getrlimit(Resource::Nofile);
    descriptors.current = descriptors.maximum;
    setrlimit(Resource::Nofile, descriptors)?;
    let policy = policy::read(&options.policy)
        .map_err(|errors| io::Error::other(format!("the policy: {}", errors.join("\n"))))?;
    let socket = Socket::bind(&options.socket)?;
    let listener = socket.listener()?;
    let (inbox, finished) = Inbox::new()?;
    let service = Service::new(policy, finished.clone())?;
    let claims = Claims::in_directory(&options.socket)?;
    let mut server = Server::new(
        options.policy,
        service,
        opener,
        listener,
        signals,
        (inbox, finished),
    )?;
    server.serve_claims(claims)?;
    server.run()
}

fn signals() -> io::Result<Signals> {
    let (end, end_sender) = UnixStream::pair()?;
    let (reload, reload_sender) = UnixStream::pair()?;
    for socket in [&end, &reload] {
        socket.set_nonblocking(true)?;
    }
    pipe::register(SIGINT, end_sender.try_clone()?)?;
    pipe::register(SIGTERM, end_sender)?;
    pipe::register(SIGHUP, reload_sender)?;
    Ok(Signals { end, reload })
}
