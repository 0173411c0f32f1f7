//! `barlease lease acquire`.

use std::ffi::OsString;
use std::io;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use barlease_proto as proto;
use barlease_proto::Acquire;
use barlease_proto::Acquired;
use barlease_proto::Client;
use barlease_proto::Event;
use barlease_proto::Notice;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use rustix::io::FdFlags;
use serde_json::json;

use super::args::AcquireArgs;
use super::args::Lifetime;
use super::args::WhatArgs;
use super::args::milliseconds;
use super::news;
use super::word;
use crate::args::MemoryType;
use crate::failure::Failure;
use crate::output::Output;

/// The variable with the number of the lease.
const LEASE_VARIABLE: &str = "BARLEASE_LEASE";

impl From<Lifetime> for proto::Lifetime {
    fn from(lifetime: Lifetime) -> Self {
        match lifetime {
            Lifetime::Connection => Self::Connection,
            Lifetime::Process => Self::Process,
            Lifetime::Cgroup => Self::Cgroup,
            Lifetime::Claim => Self::Claim,
            Lifetime::Holders => Self::Holders,
        }
    }
}

impl WhatArgs {
    /// The request, without the fields that only an Acquire has.
    pub(crate) fn request(&self) -> Acquire {
        let ranges = self.range.iter().map(|range| proto::Range {
            offset: range.offset,
            length: range.length,
        });
        Acquire {
            pool: self.pool.clone(),
            size: self.size,
            device: self.device.clone(),
            bar: self.bar,
            ranges: self.device.is_some().then(|| ranges.collect()),
            access: match self.read_only {
                true => proto::Access::Read,
                false => proto::Access::ReadWrite,
            },
            memory_type: None,
            steering_tag: None,
            lifetime: Some(self.lifetime.into()),
            ttl: None,
            wait: None,
        }
    }

    /// Its name in a message.
    pub(crate) fn object(&self) -> &str {
        let what = self.pool.as_ref().or(self.device.as_ref());
        what.map_or("lease", |what| what)
    }
}

/// Becomes the command, or holds the lease until a signal comes.
pub(crate) fn acquire(args: &AcquireArgs, output: Output) -> Result<(), Failure> {
    let acquire = Acquire {
        memory_type: Some(match args.memory_type {
            MemoryType::Nc => proto::MemoryType::Nc,
            MemoryType::Wc => proto::MemoryType::Wc,
        }),
        steering_tag: args.tph.tph().map(|tph| proto::SteeringTag {
            tag: tph.steering_tag,
            extended: tph.steering_tag_ext,
            hint: tph.processing_hint,
        }),
        ttl: args.ttl.map(milliseconds),
        wait: args.wait.map(milliseconds),
        ..args.what.request()
    };
    let mut client = super::connect(&args.service.socket)?;
    let object = args.what.object();
    let mut take = || {
        client
            .acquire(&acquire)
            .map_err(|error| super::failed("acquire", object, error))
    };
    if args.command.is_empty() {
        // Before the lease is there, so that none of its news is missed.
        let news = Held::listen(&args.service.socket)?;
        let (acquired, fd) = take()?;
        return news.hold(client, &acquired, fd, output);
    }
    let (acquired, fd) = take()?;
    become_command(&args.command, &client, &acquired, &fd)
}

/// Returns only on failure. The command inherits the connection as well, since the lease may live
/// by it.
fn become_command(
    command: &[OsString],
    client: &Client,
    acquired: &Acquired,
    fd: &OwnedFd,
) -> Result<(), Failure> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(Failure::new("acquire: no command"));
    };
    for inherited in [fd.as_fd(), client.as_fd()] {
        rustix::io::fcntl_setfd(inherited, FdFlags::empty())
            .map_err(|errno| Failure::new(format!("acquire: lease: {errno}")))?;
    }
    let error = Command::new(program)
        .args(arguments)
        .env(barlease::FD_VARIABLE, fd.as_raw_fd().to_string())
        .env(LEASE_VARIABLE, acquired.lease.to_string())
        .exec();
    Err(Failure::file("run", Path::new(program), &error))
}

/// Something that a held lease is told.
enum Told {
    Signal,
    News(Notice),
    /// The service does not tell any more.
    Silence(proto::Error),
}

/// A lease that this process holds, and its news.
struct Held {
    told: mpsc::Receiver<Told>,
}

impl Held {
    fn listen(socket: &Path) -> Result<Self, Failure> {
        let failed = |errno: io::Error| Failure::new(format!("acquire: signals: {errno}"));
        let mut ends = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            ends.add(signal);
        }
        // In all threads.
        ends.thread_block().map_err(|errno| failed(errno.into()))?;
        let notices = super::connect(socket)?
            .watch(false)
            .map_err(|error| super::failed("watch", "leases", error))?;
        let (sender, told) = mpsc::channel();
        let signals = sender.clone();
        thread::Builder::new()
            .spawn(move || {
                if ends.wait().is_ok() {
                    // The receiver ends with the process.
                    let _ = signals.send(Told::Signal);
                }
            })
            .map_err(failed)?;
        thread::Builder::new()
            .spawn(move || {
                for notice in notices {
                    let _ = sender.send(match notice {
                        Ok(notice) => Told::News(notice),
                        Err(error) => Told::Silence(error),
                    });
                }
            })
            .map_err(failed)?;
        Ok(Self { told })
    }

    /// Until a signal comes, or it is over. A signal gives it back.
    fn hold(
        self,
        mut client: Client,
        acquired: &Acquired,
        fd: OwnedFd,
        output: Output,
    ) -> Result<(), Failure> {
        let lease = acquired.lease;
        writeln!(io::stdout(), "{}", granted(acquired, output))?;
        for told in self.told {
            match told {
                Told::Signal => {
                    // Before the descriptor is closed, with which it would end by itself.
                    let released = client.release(lease);
                    drop(fd);
                    return released.map_err(|error| {
                        super::failed("release", &format!("lease {lease}"), error)
                    });
                }
                Told::News(notice) if notice.lease != lease => {}
                // It is said already.
                Told::News(notice) if notice.event == Event::Granted => {}
                Told::News(notice) => {
                    writeln!(io::stdout(), "{}", news::line(&notice, output))?;
                    if notice.event == Event::Revoked || notice.event == Event::Ended {
                        let why = notice.reason.as_ref().map(word).unwrap_or_default();
                        return Err(Failure::new(format!("acquire: lease {lease}: {why}")));
                    }
                }
                Told::Silence(error) => {
                    return Err(super::failed("acquire", &format!("lease {lease}"), error));
                }
            }
        }
        Ok(())
    }
}

fn granted(acquired: &Acquired, output: Output) -> String {
    let left = acquired.expires.map(|at| at.saturating_sub(super::now()));
    let told = json!({
        "event": "granted",
        "lease": acquired.lease,
        "device": acquired.device,
        "bar": acquired.bar,
        "ranges": acquired.ranges,
        "size": acquired.size,
        "access": word(&acquired.access),
        "memory_type": word(&acquired.memory_type),
        "ttl_ms": left,
        "grace_ms": acquired.grace,
    });
    let text = format!(
        "granted lease {} of {} BAR {} {} ({:#x} bytes, {}, {})",
        acquired.lease,
        acquired.device,
        acquired.bar,
        super::list::ranges(&acquired.ranges),
        acquired.size,
        word(&acquired.memory_type),
        word(&acquired.access),
    );
    output.line(&told, &text)
}
