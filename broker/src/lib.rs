//! The daemon `barleased`: it owns devices, and leases ranges of their BARs to many processes.
//!
//! All decisions are those of `barlease_ledger`; here they are carried out.
//!
//! | module | what |
//! |---|---|
//! | `server` | the loop: sockets, signals, devices, processes and time |
//! | `accept` | clients come |
//! | `clients` | clients are served in turns, answered, and given up |
//! | `shares` | what tenants have of the daemon itself |
//! | `unread` | whether a client has read what it was sent |
//! | `watched` | processes and control groups that leases live by |
//! | `calls` | the methods of the interface |
//! | `claims` | a directory with a socket for each claim |
//! | `cgroup` | control groups, and their ends |
//! | `questions` | List, Explain and Devices |
//! | `records` | all that happens: to the journal, and to those who monitor |
//! | `connection` | what was received from a client, and what is left to send |
//! | `metrics` | numbers for Prometheus, and their ways out |
//! | `peer` | the process that connected |
//! | `service` | the core, and what it has done with ledger and devices |
//! | [`device`] | a device: opened, listed, exported from, revoked |
//! | `find` | the device that a policy means |
//! | `scrub` | clearing, beside the loop |
//! | `finished` | what was done beside the loop |
//! | `policy` | the policy's files, and the policy that was in force last |
//! | `hold` | devices: listened to, left with the manager, let go |
//! | `recovery` | what an earlier daemon has left |
//! | `manager` | what systemd is told, and keeps |
//! | [`keep`] | a parent that does what systemd would |
//! | [`store`] | the file of the ledger: append, compact, read back after a kill |
//! | [`words`] | the words of the protocol and those of the core |

mod accept;
mod calls;
mod cgroup;
mod claims;
mod clients;
mod connection;
pub mod device;
mod find;
mod finished;
mod hold;
pub mod keep;
mod manager;
mod metrics;
mod peer;
mod policy;
mod questions;
mod records;
mod recovery;
mod scrub;
mod server;
mod service;
mod shares;
mod socket;
pub mod store;
mod unread;
mod watched;
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
use clap::CommandFactory;
use clap::Parser;
use nix::sys::resource::Resource;
use nix::sys::resource::getrlimit;
use nix::sys::resource::setrlimit;
use signal_hook::consts::SIGHUP;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::pipe;

use self::claims::Claims;
use self::finished::Inbox;
use self::keep::Keeper;
use self::manager::Manager;
pub use self::manager::Passed;
use self::metrics::door::Door;
use self::metrics::door::Ways;
use self::records::Log;
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
    /// Directory of the socket, `leases.sock`, and of those of claims, which is made if need be.
    #[arg(long, default_value = "/run/barleased")]
    socket: PathBuf,
    /// Keep or reclaim leases at SIGTERM; without it they are kept where systemd keeps the devices.
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
    /// The journal's socket. Without one, records are lines on standard error.
    #[arg(long, default_value = records::JOURNAL)]
    journal: PathBuf,
    /// Write the metrics to this file every 15 seconds, for node_exporter's textfile collector.
    #[arg(long, value_name = "FILE.prom", value_parser = prom)]
    metrics_file: Option<PathBuf>,
    /// Answer `GET /metrics` on this unix socket.
    #[arg(long, value_name = "SOCKET")]
    metrics_socket: Option<PathBuf>,
    #[command(subcommand)]
    request: Option<Request>,
}

/// A name that the textfile collector reads.
fn prom(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension() {
        Some(end) if end == "prom" => Ok(path),
        _ => Err("the collector reads files that end with .prom only".to_owned()),
    }
}

/// Something that the daemon that runs is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Subcommand)]
enum Request {
    /// Have the daemon that runs reclaim all leases, with grace, and close all devices, so that
    /// nothing outlives it. `reload` opens them again.
    Drain,
    /// Have the daemon that runs read its policy again. It fails, and says why, if the old one
    /// stays in force.
    Reload,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("not a number of seconds up to a day".to_owned()),
    }
}

/// The surroundings of the daemon: tests give it other things.
pub struct Surroundings<'a> {
    /// Opens devices.
    pub opener: &'a Opener<'a>,
    /// The descriptors that systemd has passed.
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

/// The definition of the command line, for completions and manual pages.
#[must_use]
pub fn command() -> clap::Command {
    Options::command()
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
    raise_limit();
    if options.kept {
        keep::end_with_parent()?;
    }
    let directory = &options.socket;
    let lock = Lock::take(directory)?;
    // Before the service's own socket is there: whoever can connect to that can to these.
    let claims = Claims::in_directory(directory)
        .inspect_err(|error| eprintln!("barleased: there will be no claims: {error}"))
        .ok();
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
    let mut left = Left::take(passed, &mut manager)?;
    let (policy, written) = policy::begin(options.policy, &mut left)?;
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
    let door = Door::open(Ways {
        file: options.metrics_file,
        socket: options.metrics_socket,
        ..left.metrics
    })?;
    let log = Log::start(&options.journal)?;
    let (inbox, finished) = Inbox::new()?;
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
        finished.clone(),
    )?;
    let mut server = Server::new(
        written,
        service,
        surroundings.opener,
        signals,
        (inbox, finished),
        (manager, at_stop, owners),
        (log, door),
    )?;
    server.serve_on(listener, claims)?;
    server.run()?;
    if server.leaves_leases() {
        socket.leave();
    }
    Ok(())
}

/// Each client is a descriptor: as many as may be. A unit that forbids the call says itself how
/// many.
fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(now, most)| match now < most {
        true => setrlimit(Resource::RLIMIT_NOFILE, most, most),
        false => Ok(()),
    });
    if let Err(errno) = raised {
        eprintln!("barleased: the limit of descriptors stays as it is: {errno}");
    }
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
