//! The daemon `barleased`: it owns devices, and leases ranges of their BARs to many processes.
//!
//! All decisions are those of `barlease_ledger`; here they are carried out.
//!
//! | module | what |
//! |---|---|
//! | `server` | the loop: sockets, signals, devices, processes and time |
//! | `calls` | the methods of the interface |
//! | `connection` | what was received from a client, and what is left to send |
//! | `peer` | the process that connected |
//! | `service` | the core, and what it has done with ledger and devices |
//! | [`device`] | a device: found, opened, listed, exported from, revoked |
//! | [`policy`] | the policy's files |
//! | `hold` | devices: listened to, left with the manager, let go |
//! | `recovery` | what an earlier daemon has left |
//! | `manager` | what systemd is told, and keeps |
//! | [`keep`] | a parent that does what systemd would |
//! | [`store`] | the file of the ledger: append, compact, read back after a kill |
//! | [`words`] | the words of the protocol and those of the core |

#![forbid(unsafe_code)]

mod calls;
mod connection;
pub mod device;
mod hold;
pub mod keep;
mod manager;
mod peer;
pub mod policy;
mod recovery;
mod server;
mod service;
mod socket;
pub mod store;
pub mod words;

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitCode;

use barlease_ledger::types::Millis;
use barlease_proto::Client;
use barlease_proto::Drain;
use barlease_proto::Reload;
use clap::Parser;
use signal_hook::consts::SIGHUP;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::pipe;

use self::keep::Keeper;
use self::manager::Manager;
pub use self::manager::Passed;
use self::recovery::Left;
use self::server::AtStop;
pub use self::server::Opener;
use self::server::Server;
use self::server::Signals;
use self::service::Service;
use self::socket::Lock;
use self::socket::Socket;
use self::store::Store;

/// Leases ranges of the BARs of PCI devices to many processes, by a policy.
///
/// SIGHUP reads the policy again. On SIGTERM it ends: leases live on where systemd keeps the
/// devices; else they are reclaimed, with the grace that the policy gives, and a second SIGTERM
/// ends it at once.
#[derive(Debug, Parser)]
#[command(name = "barleased", version)]
pub struct Options {
    /// Directory of the policy: all its *.toml are read as one.
    #[arg(long, default_value = "/etc/barlease/policy.d")]
    policy: PathBuf,
    /// Directory of the socket, `leases.sock`, which is made if need be.
    #[arg(long, default_value = "/run/barleased")]
    socket: PathBuf,
    /// What becomes of leases at SIGTERM; without it they are kept where systemd keeps the devices.
    #[arg(long, value_name = "WHAT")]
    at_stop: Option<AtStop>,
    /// Seconds in which clients come back for their leases after a restart.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = seconds)]
    resume: f64,
    /// Run the daemon as a child, which is started again whenever it fails and goes on with its
    /// devices and leases: for hosts without systemd.
    #[arg(long, conflicts_with = "at_stop")]
    keep: bool,
    /// The child of `--keep`: descriptors come over standard input.
    #[arg(long, hide = true, conflicts_with = "keep")]
    kept: bool,
    #[command(subcommand)]
    request: Option<Request>,
}

/// Something that the daemon that runs is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Subcommand)]
enum Request {
    /// Have the daemon that runs reclaim all leases, with grace, and close all devices, so that
    /// nothing outlives it. `reload` opens them again.
    Drain,
    /// Have the daemon that runs read its policy again. It fails, and says why, if the old one stays
    /// in force.
    Reload,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("not a number of seconds up to a day".to_owned()),
    }
}

/// What the daemon has around it: tests give it other things.
pub struct Surroundings<'a> {
    /// Opens devices.
    pub opener: &'a Opener<'a>,
    /// What systemd has passed.
    pub passed: Vec<Passed>,
    /// Called before each action that the core asks for: a place to be killed at.
    pub before_action: Box<dyn Fn()>,
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings")
            .field("passed", &self.passed)
            .finish_non_exhaustive()
    }
}

impl<'a> Surroundings<'a> {
    /// Those of a daemon that nobody has passed anything.
    pub fn new(opener: &'a Opener<'a>) -> Self {
        Self {
            opener,
            passed: Vec::new(),
            before_action: Box::new(|| {}),
        }
    }
}

/// Runs the daemon, without anything that systemd has passed.
pub fn run<T: Into<OsString> + Clone>(
    args: impl IntoIterator<Item = T>,
    opener: &Opener<'_>,
) -> ExitCode {
    run_in(args, Surroundings::new(opener))
}

/// Runs the daemon.
pub fn run_in<T: Into<OsString> + Clone>(
    args: impl IntoIterator<Item = T>,
    surroundings: Surroundings<'_>,
) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let options = match Options::try_parse_from(&args) {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let done = match options.request {
        Some(request) => ask(request, &options.socket),
        None if options.keep => return keep(&args, &options.socket),
        None => serve(options, surroundings),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("barleased: {error}");
            ExitCode::FAILURE
        }
    }
}

fn ask(request: Request, directory: &Path) -> io::Result<()> {
    let asked = || {
        let mut client = Client::connect(directory.join("leases.sock"))?;
        match request {
            Request::Drain => client.call(&Drain {
                device: None,
                grace: None,
            }),
            Request::Reload => client.call(&Reload {}),
        }
    };
    asked().map(drop).map_err(io::Error::other)
}

/// Runs the daemon with the same arguments, as a child.
fn keep(args: &[OsString], directory: &Path) -> ExitCode {
    let command = || -> io::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        let others = args.iter().skip(1).filter(|arg| *arg != "--keep");
        command.args(others).arg("--kept");
        Ok(command)
    };
    match Keeper::new(directory, Box::new(command)).and_then(Keeper::run) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("barleased: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: Options, surroundings: Surroundings<'_>) -> io::Result<()> {
    let signals = signals()?;
    if options.kept {
        keep::end_with_parent()?;
    }
    let directory = &options.socket;
    let lock = Lock::take(directory)?;
    let policy = policy::read(&options.policy)
        .map_err(|errors| io::Error::other(format!("the policy: {}", errors.join("\n"))))?;
    let mut manager = Manager::of_environment()?;
    if options.at_stop == Some(AtStop::Keep) && !manager.stores() {
        let error = "--at-stop keep: nothing here stores descriptors (systemd with \
                     FileDescriptorStoreMax does), and leases end with those of their device";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
    }
    let passed = match options.kept {
        true => keep::receive()?,
        false => surroundings.passed,
    };
    let left = Left::take(passed, &mut manager)?;
    let again = left
        .listener
        .and_then(|(listener, activated)| match activated {
            true => Some(Socket::activated(listener)),
            false => Socket::again(directory, listener),
        });
    let mut socket = match again {
        Some(socket) => socket,
        None => {
            manager.remove(recovery::LISTENER);
            let socket = Socket::bind(directory, &lock)?;
            // Without it those that come while no daemon is there are turned away, and no more.
            let _ = manager.store(recovery::LISTENER, socket.listener()?);
            socket
        }
    };
    let listener = socket.listener()?;
    let ledger = match left.ledger {
        Some(ledger) => ledger,
        None => (Store::create()?, Vec::new()),
    };
    manager
        .store(recovery::LEDGER, &ledger.0)
        .map_err(io::Error::other)?;
    let owners = left.devices.iter();
    let owners = owners
        .filter_map(|kept| Some((kept.found.device.clone(), kept.owner?)))
        .collect();
    // The end of the keeper is the end of what it keeps.
    let outlived = manager.stores() && !options.kept;
    let at_stop = options.at_stop.unwrap_or(match outlived {
        true => AtStop::Keep,
        false => AtStop::Reclaim,
    });
    let service = Service::recover(
        policy,
        ledger,
        left.devices,
        Millis((options.resume * 1000.0) as u64),
        surroundings.before_action,
    )?;
    let mut server = Server::new(
        options.policy,
        service,
        surroundings.opener,
        listener,
        signals,
        (manager, at_stop),
        owners,
    )?;
    server.run()?;
    if server.leaves_leases() {
        socket.leave();
    }
    Ok(())
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
