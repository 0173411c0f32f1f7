//! `barlease lease grant`.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use barlease::Bdf;
use barlease::Device;
use barlease::Error;
use barlease::Lease;
use barlease::LeaseInfo;
use barlease::Peer;
use barlease::Status;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::fs::Mode;
use serde::Serialize;

use crate::args::GrantArgs;
use crate::failure::Failure;
use crate::output::Output;

/// How long a holder may take to receive its lease.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait after a connection that could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What happens, one line each.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Granted {
        #[serde(flatten)]
        info: &'a LeaseInfo,
        socket: &'a Path,
    },
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
        #[serde(flatten)]
        status: Status,
    },
    Revoked {
        bdf: Bdf,
        microseconds: u128,
    },
    /// The driver cannot revoke; the lease ends with the device.
    Closed {
        bdf: Bdf,
        reason: &'a str,
    },
}

impl Event<'_> {
    fn text(&self) -> String {
        match self {
            Self::Granted { info, socket } => {
                let ranges: Vec<String> = info.ranges.iter().map(ToString::to_string).collect();
                format!(
                    "granted {} BAR {} {} ({:#x} bytes, {}, {}) at {}",
                    info.bdf,
                    info.bar,
                    ranges.join(" "),
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
            Self::Served { pid, uid } => format!("served pid {} uid {uid}", shown(*pid)),
            Self::Refused { pid, uid, reason } => {
                format!("refused pid {} uid {uid}: {reason}", shown(*pid))
            }
            Self::Status { status } => format!(
                "status {} reasons {} attachments {}",
                status.state, status.reasons, status.attachments
            ),
            Self::Revoked { bdf, microseconds } => {
                format!("revoked lease of {bdf} in {microseconds} us")
            }
            Self::Closed { bdf, reason } => format!("closed {bdf}: {reason}"),
        }
    }
}

fn shown(pid: Option<u32>) -> String {
    pid.map_or_else(|| "of another namespace".to_owned(), |pid| pid.to_string())
}

pub(crate) fn run(args: &GrantArgs, output: Output) -> Result<(), Failure> {
    // Before anything is granted, so that no signal ends the process without a word.
    let signals = signals()?;
    let device = Device::open(args.bdf)?;
    let lease = export(&device, args)?;
    let socket = Socket::bind(&args.socket, args.uid.is_some())?;
    let info = lease
        .info()
        .ok_or_else(|| Failure::new("grant: lease: nothing is known of it"))?;
    let grant = Grant {
        device,
        lease,
        args,
        output,
    };
    grant.say(&Event::Granted {
        info: &info,
        socket: &args.socket,
    })?;
    grant.serve(socket, &signals)?;
    grant.revoke()
}

fn export(device: &Device, args: &GrantArgs) -> Result<Lease, Failure> {
    let mut builder = device.export(args.bar).ranges(args.range.iter().copied());
    if args.read_only {
        builder = builder.read_only();
    }
    let lease = builder.export()?;
    let memory_type = args.memory_type.into();
    if memory_type != barlease::MemoryType::Nc {
        device.set_memory_type(&lease, memory_type)?;
    }
    if let Some(tph) = args.tph.tph() {
        device.set_tph(&lease, tph)?;
    }
    if let Some(name) = &args.name {
        lease.set_name(name)?;
    }
    Ok(lease)
}

/// A stream that gets a byte for each SIGINT or SIGTERM.
fn signals() -> Result<UnixStream, Failure> {
    let make = || {
        let (read, write) = UnixStream::pair()?;
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        Ok(read)
    };
    make().map_err(|error: io::Error| Failure::new(format!("grant: signals: {error}")))
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

struct Grant<'a> {
    device: Device,
    lease: Lease,
    args: &'a GrantArgs,
    output: Output,
}

/// What a line on standard input asks for.
enum Asked {
    Nothing,
    End,
    Closed,
}

impl Grant<'_> {
    fn say(&self, event: &Event<'_>) -> Result<(), Failure> {
        Ok(self.output.event(event, &event.text())?)
    }

    /// Until it is to be revoked.
    fn serve(&self, socket: Socket, signals: &UnixStream) -> Result<(), Failure> {
        let mut socket = Some(socket);
        let mut stdin = Some(io::stdin());
        let mut line = Vec::new();
        loop {
            let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
            let listener = socket.as_ref().map(|socket| &socket.listener);
            fds.extend(listener.map(|fd| PollFd::new(fd, PollFlags::IN)));
            fds.extend(stdin.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(Failure::new(format!("grant: wait: {errno}"))),
            }
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            let signalled = ready.next().unwrap_or(false);
            let connected = listener.is_some() && ready.next().unwrap_or(false);
            let typed = stdin.is_some() && ready.next().unwrap_or(false);

            if signalled {
                return Ok(());
            }
            if let (true, Some(listener)) = (connected, listener) {
                let served = self.accept(listener)?;
                if served && self.args.once {
                    socket = None;
                }
            }
            if typed {
                match self.read_line(&mut line)? {
                    Asked::Nothing => {}
                    Asked::End => return Ok(()),
                    Asked::Closed => stdin = None,
                }
            }
        }
    }

    /// Serves whoever is waiting. A peer that misbehaves is reported and does not end the grant.
    fn accept(&self, listener: &UnixListener) -> Result<bool, Failure> {
        let peer = match listener.accept() {
            Ok((peer, _)) => peer,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => {
                let path = self.args.socket.display();
                eprintln!("barlease: accept: {path}: {error}");
                // It may last, as when there are too many descriptors.
                std::thread::sleep(ACCEPT_AGAIN);
                return Ok(false);
            }
        };
        let Peer { pid, uid, .. } = match Peer::of(&peer) {
            Ok(credentials) => credentials,
            Err(error) => {
                eprintln!("barlease: {}", error.report());
                return Ok(false);
            }
        };
        if !self.is_for(uid) {
            let reason = "not the user that the lease is for";
            self.say(&Event::Refused { pid, uid, reason })?;
            return Ok(false);
        }
        match self.lease.send_within(&peer, SEND_TIMEOUT) {
            Ok(()) => {
                self.say(&Event::Served { pid, uid })?;
                Ok(true)
            }
            Err(error) => {
                let reason = error.report().to_string();
                let reason = reason.as_str();
                self.say(&Event::Refused { pid, uid, reason })?;
                Ok(false)
            }
        }
    }

    /// Whether the lease is for this user: the one that was named, else this one and root.
    fn is_for(&self, uid: u32) -> bool {
        match self.args.uid {
            Some(wanted) => wanted == uid,
            None => uid == 0 || uid == rustix::process::geteuid().as_raw(),
        }
    }

    /// Reads what there is of standard input, and does what complete lines ask for.
    fn read_line(&self, line: &mut Vec<u8>) -> Result<Asked, Failure> {
        let mut bytes = [0; 256];
        // Not through the buffer of `Stdin`, which poll does not see into.
        let count = match rustix::io::read(io::stdin().as_fd(), &mut bytes) {
            Ok(0) => return Ok(Asked::Closed),
            Ok(count) => count,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(Asked::Nothing),
            Err(_) => return Ok(Asked::Closed),
        };
        for byte in bytes.iter().take(count) {
            if *byte != b'\n' {
                line.push(*byte);
                continue;
            }
            let text = String::from_utf8_lossy(&std::mem::take(line))
                .trim()
                .to_owned();
            match text.as_str() {
                "revoke" | "quit" => return Ok(Asked::End),
                "status" => {
                    let status = self.device.status(&self.lease)?;
                    self.say(&Event::Status { status })?;
                }
                "" => {}
                other => eprintln!("barlease: {other:?} is neither `revoke` nor `status`"),
            }
        }
        Ok(Asked::Nothing)
    }

    fn revoke(self) -> Result<(), Failure> {
        let bdf = self.args.bdf;
        let start = std::time::Instant::now();
        match self.device.revoke(&self.lease) {
            Ok(()) => self.say(&Event::Revoked {
                bdf,
                microseconds: start.elapsed().as_micros(),
            }),
            Err(error @ Error::Unsupported { .. }) => {
                let reason = error.report().to_string();
                self.say(&Event::Closed {
                    bdf,
                    reason: &reason,
                })
            }
            Err(error) => Err(error.into()),
        }
    }
}
