//! `barlease lease grant`.
//!
//! One process grants any number of leases. [`spec`] is what is asked for, [`serve`] the loop,
//! [`ending`] how leases end, [`detach`] the way to the background, and [`lines`] what is said and
//! typed.

pub(crate) mod control;
mod detach;
mod ending;
mod lines;
mod serve;
mod spec;

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use barlease::Bdf;
use barlease::Device;
use barlease::Iommu;
use barlease::LeaseId;
use barlease::LeaseInfo;
use barlease::OpenOptions;
use barlease::Status;
use barlease::pci::Pci;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SfdFlags;
use nix::sys::signalfd::SignalFd;
use rustix::fs::Mode;
use serde::Serialize;

use self::detach::Side;
use self::serve::Inputs;
use self::serve::Server;
use self::spec::Spec;
use crate::args::GrantArgs;
use crate::failure::Failure;
use crate::output::Output;

/// More ranges than these are counted only, in what is for people.
const SHOWN: usize = 8;

/// Events, one line each.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Granted {
        #[serde(flatten)]
        info: &'a LeaseInfo,
        id: LeaseId,
        socket: &'a Path,
    },
    /// In the background from here on.
    Detached { pid: u32, sockets: &'a [&'a Path] },
    Served {
        /// `None`: of a PID namespace that this process does not see into.
        pid: Option<u32>,
        uid: u32,
    },
    Refused {
        pid: Option<u32>,
        uid: u32,
        reason: &'a str,
    },
    Status {
        socket: &'a Path,
        #[serde(flatten)]
        status: Status,
    },
    /// The kernel wants the device back, as to unbind it or to unplug it.
    Requested { bdf: Bdf },
    /// A term has come to its end.
    Expired { bdf: Bdf, socket: &'a Path },
    /// An importer has still to let go.
    Draining { bdf: Bdf, socket: &'a Path },
    Revoked {
        bdf: Bdf,
        socket: &'a Path,
        microseconds: u128,
    },
    /// Something failed, and the rest goes on.
    Error { error: &'a str },
    /// A device; leases that its driver cannot revoke end with it.
    Closed { bdf: Bdf, reason: &'a str },
}

impl Event<'_> {
    fn text(&self) -> String {
        match self {
            Self::Granted { info, socket, .. } => {
                let shown: Vec<String> = info.ranges.iter().map(ToString::to_string).collect();
                let ranges = match shown.len() {
                    0..=SHOWN => shown.join(" "),
                    many => format!("{many} ranges"),
                };
                format!(
                    "granted {} BAR {} {} ({:#x} bytes, {}, {}) at {}",
                    info.bdf,
                    info.bar,
                    ranges,
                    info.size,
                    info.memory_type,
                    if info.writable {
                        "writable"
                    } else {
                        "read-only"
                    },
                    socket.display()
                )
            }
            Self::Detached { pid, sockets } => {
                let path = |path: &&Path| path.display().to_string();
                let one = sockets.first().map(path).unwrap_or_default();
                if sockets.len() > 1 {
                    format!(
                        "detached as pid {pid} (`barlease lease revoke {one}` ends that lease, \
                         `kill {pid}` all)"
                    )
                } else {
                    format!("detached as pid {pid} (`barlease lease revoke {one}` ends it)")
                }
            }
            Self::Served { pid, uid } => format!("served pid {} uid {uid}", shown(*pid)),
            Self::Refused { pid, uid, reason } => {
                format!("refused pid {} uid {uid}: {reason}", shown(*pid))
            }
            Self::Status { status, socket } => format!(
                "status {} reasons {} attachments {} at {}",
                status.state,
                status.reasons,
                status.attachments,
                socket.display()
            ),
            Self::Requested { bdf } => format!("the kernel asks for {bdf}"),
            Self::Expired { bdf, socket } => {
                format!(
                    "the term of the lease of {bdf} at {} is over",
                    socket.display()
                )
            }
            Self::Draining { bdf, socket } => format!(
                "revoked lease of {bdf} at {}; waiting for an importer to let go of it (a second \
                 signal ends the waiting)",
                socket.display()
            ),
            Self::Revoked {
                bdf, microseconds, ..
            } => {
                format!("revoked lease of {bdf} in {microseconds} us")
            }
            Self::Error { error } => format!("barlease: {error}"),
            Self::Closed { bdf, reason } => format!("closed {bdf}: {reason}"),
        }
    }
}

fn shown(pid: Option<u32>) -> String {
    pid.map_or_else(|| "of another namespace".to_owned(), |pid| pid.to_string())
}

pub(crate) fn run(args: &GrantArgs, output: Output) -> Result<ExitCode, Failure> {
    let specs = Spec::all(args)?;
    let waiting = match args.detach {
        true => match detach::split()? {
            Side::Shell(code) => return Ok(code),
            Side::Background(waiting) => Some(waiting),
        },
        false => None,
    };
    // Before anything is granted, so that no signal ends the process without a word.
    let inputs = Inputs {
        signals: Some(signals()?),
        stdin: !args.detach,
    };
    let mut server = Server::new(output, inputs)?;
    let mut opened = Vec::new();
    for spec in specs {
        server.grant(spec, &mut |spec| open(spec, &mut opened))?;
    }
    if let Some(waiting) = waiting {
        server.say_detached();
        waiting.release()?;
    }
    server.serve()?;
    Ok(ExitCode::SUCCESS)
}

/// Opens a device; functions of one IOMMU group are in one address space.
fn open(spec: &Spec, opened: &mut Vec<(u32, Iommu)>) -> Result<Device, Failure> {
    let bdf = spec.bdf;
    let group = Pci::system().device(bdf)?.iommu_group;
    let mut options = OpenOptions::new();
    if let Some((_, iommu)) = opened.iter().find(|(number, _)| Some(*number) == group) {
        options = options.iommu(iommu);
    }
    if let Some(token) = spec.terms.vf_token {
        options = options.vf_token(token);
    }
    let device = options.open(bdf)?;
    if let (Some(group), Some(iommu)) = (group, device.iommu()) {
        opened.push((group, iommu.clone()));
    }
    Ok(device)
}

/// Those that end the process, from now on to be read here. Reading a terminal in the background,
/// and writing to one that is told so, stops the process no more.
fn signals() -> Result<SignalFd, Failure> {
    let failed = |errno| Failure::new(format!("grant: signals: {errno}"));
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGINT);
    ends.add(Signal::SIGTERM);
    // One that is ignored, as by nohup, would come all the same once it is blocked.
    if !ignores_hangup() {
        ends.add(Signal::SIGHUP);
    }
    let mut blocked = ends;
    blocked.add(Signal::SIGTTIN);
    blocked.add(Signal::SIGTTOU);
    blocked.thread_block().map_err(failed)?;
    SignalFd::with_flags(&ends, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(failed)
}

fn ignores_hangup() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    ignored.is_some_and(|set| set & 1 << (Signal::SIGHUP as u32 - 1) != 0)
}

/// The socket's file, removed when it is dropped.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// `shared`: any user may connect, as each one is asked for its identity.
    fn bind(path: &Path, shared: bool) -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::file("listen", path, &error);
        // Left over by somebody who cannot listen any more.
        let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
        if is_socket && UnixStream::connect(path).is_err() {
            fs::remove_file(path).map_err(failed)?;
        }
        // Nobody else may connect before the mode is set.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(path);
        rustix::process::umask(umask);
        let listener = listener.map_err(failed)?;
        let socket = Self {
            listener,
            path: path.to_owned(),
        };
        let mode = if shared { 0o666 } else { 0o600 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
        // A peer that gives up between poll and accept must not make us wait.
        socket.listener.set_nonblocking(true).map_err(failed)?;
        Ok(socket)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nothing to be done about it.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests;
