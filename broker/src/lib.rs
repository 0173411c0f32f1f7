//! The daemon `barleased`: it owns devices, and leases ranges of their BARs to many processes.
//!
//! All decisions are those of `barlease_ledger`; here they are carried out.
//!
//! | module | what |
//! |---|---|
//! | `server` | the loop: sockets, signals, devices, processes and time |
//! | `calls` | the methods of the interface |
//! | `questions` | List, Explain and Devices |
//! | `records` | all that happens: to the journal, and to those who monitor |
//! | `connection` | what was received from a client, and what is left to send |
//! | `metrics` | numbers for Prometheus, and their ways out |
//! | `peer` | the process that connected |
//! | `service` | the core, and what it has done with ledger and devices |
//! | [`device`] | a device: found, opened, listed, exported from, revoked |
//! | [`policy`] | the policy's files |
//! | [`store`] | the file of the ledger: append, compact, read back after a kill |
//! | [`words`] | the words of the protocol and those of the core |

#![forbid(unsafe_code)]

mod calls;
mod connection;
pub mod device;
mod metrics;
mod peer;
pub mod policy;
mod questions;
mod records;
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

use clap::CommandFactory;
use clap::Parser;
use signal_hook::consts::SIGHUP;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::pipe;

use self::metrics::door::Door;
use self::records::Log;
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
    /// Directory of the socket, `leases.sock`, which is made if need be.
    #[arg(long, default_value = "/run/barleased")]
    socket: PathBuf,
    /// The journal's socket. Without one, records are lines on standard error.
    #[arg(long, default_value = records::JOURNAL)]
    journal: PathBuf,
    /// Write the metrics to this file every 15 seconds, for node_exporter's textfile collector.
    #[arg(long, value_name = "FILE.prom", value_parser = prom)]
    metrics_file: Option<PathBuf>,
    /// Answer `GET /metrics` on this unix socket.
    #[arg(long, value_name = "SOCKET")]
    metrics_socket: Option<PathBuf>,
}

/// A name that the textfile collector reads.
fn prom(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension() {
        Some(end) if end == "prom" => Ok(path),
        _ => Err("the collector reads files that end with .prom only".to_owned()),
    }
}

/// The definition of the command line, for completions and manual pages.
#[must_use]
pub fn command() -> clap::Command {
    Options::command()
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
    let policy = policy::read(&options.policy)
        .map_err(|errors| io::Error::other(format!("the policy: {}", errors.join("\n"))))?;
    let socket = Socket::bind(&options.socket)?;
    let listener = socket.listener()?;
    let service = Service::new(policy)?;
    let door = Door::open(options.metrics_file, options.metrics_socket.as_deref())?;
    let log = Log::start(&options.journal)?;
    Server::new(
        options.policy,
        service,
        opener,
        listener,
        signals,
        log,
        door,
    )?
    .run()
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
