//! The loop that serves holders and revokes.
//!
//! Nothing in it waits but poll: a holder that does not read costs a connection for some seconds,
//! an importer that does not let go costs nobody else anything.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

use barlease::Bdf;
use barlease::Device;
use barlease::EventFd;
use barlease::InterruptKind;
use barlease::Lease;
use barlease::LeaseId;
use barlease::Peer;
use barlease::Sender;
use nix::sys::signalfd::SignalFd;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

use super::Event;
use super::Socket;
use super::control;
use super::control::Answer;
use super::control::Asked;
use super::lines;
use super::lines::Lines;
use super::lines::Typed;
use super::spec::Spec;
use crate::failure::Failure;
use crate::output::Output;

/// How long a holder may take to receive its lease.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait after a connection that could not be accepted: it may last, as when there are
/// too many descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Connections in which a lease is still on its way.
const MOST_CONNECTIONS: usize = 128;
/// How often to look whether a terminal has put this process into its foreground: nothing says so.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Where the loop is told to end.
pub(crate) struct Inputs {
    pub(crate) signals: Option<SignalFd>,
    pub(crate) stdin: bool,
}

pub(super) struct Owned {
    /// `None`: closed.
    pub(super) device: Option<Device>,
    pub(super) bdf: Bdf,
    /// Signalled when the kernel wants the device back.
    pub(super) request: Option<EventFd>,
    /// Signalled when a lease has drained. Older modules have none.
    pub(super) events: Option<EventFd>,
    pub(super) wanted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Granted,
    /// Revoked; an importer has still to let go.
    Draining(Instant),
    Ended,
}

pub(super) struct Granted {
    pub(super) spec: Spec,
    /// Place of its device.
    pub(super) owned: usize,
    /// As long as the process lives: a message that is being sent borrows it.
    pub(super) lease: &'static Lease,
    pub(super) id: LeaseId,
    pub(super) socket: Option<Socket>,
    /// `None`: its path is too long, or cannot be listened at.
    pub(super) control: Option<Socket>,
    /// The answer to those that ask for its end, once it has ended.
    pub(super) answer: Answer,
    pub(super) expires: Option<Instant>,
    pub(super) state: State,
}

/// A holder that has its lease, or a part of its description, still to receive.
pub(super) struct Connection {
    pub(super) granted: usize,
    stream: UnixStream,
    peer: Peer,
    sender: Sender<'static>,
    deadline: Instant,
}

/// The events that poll has found.
#[derive(Default)]
struct Ready {
    signal: bool,
    requests: Vec<usize>,
    events: bool,
    listeners: Vec<usize>,
    controls: Vec<usize>,
    connections: bool,
    typed: bool,
}

/// The meaning of an entry of the poll set.
#[derive(Clone, Copy)]
enum Source {
    Signal,
    Request(usize),
    Events,
    Listener(usize),
    Control(usize),
    Asked,
    Connection,
    Stdin,
}

pub(crate) struct Server {
    output: Output,
    pub(super) lines: Lines,
    pub(super) inputs: Inputs,
    typed: Typed,
    pub(super) devices: Vec<Owned>,
    pub(super) granted: Vec<Granted>,
    pub(super) connections: Vec<Connection>,
    asked: Vec<Asked>,
    accept_from: Option<Instant>,
    /// A lease ended otherwise than by `revoke`.
    pub(super) failed: Option<Failure>,
}

impl Server {
    pub(crate) fn new(output: Output, inputs: Inputs) -> Result<Self, Failure> {
        let lines = Lines::new().map_err(|e| Failure::new(format!("grant: output: {e}")))?;
        Ok(Self {
            output,
            lines,
            inputs,
            typed: Typed::default(),
            devices: Vec::new(),
            granted: Vec::new(),
            connections: Vec::new(),
            asked: Vec::new(),
            accept_from: None,
            failed: None,
        })
    }

    /// Grants a lease. Any failure ends those that were granted before, with the process.
    pub(crate) fn grant(
        &mut self,
        spec: Spec,
        open: &mut dyn FnMut(&Spec) -> Result<Device, Failure>,
    ) -> Result<(), Failure> {
        let owned = match self.devices.iter().position(|owned| owned.bdf == spec.bdf) {
            Some(place) => place,
            None => {
                let device = open(&spec)?;
                self.devices.push(Owned {
                    request: device.enable_interrupt(InterruptKind::Request).ok(),
                    events: device.leases().events().ok(),
                    device: Some(device),
                    bdf: spec.bdf,
                    wanted: false,
                });
                self.devices.len() - 1
            }
        };
        let device = self
            .devices
            .get(owned)
            .and_then(|owned| owned.device.as_ref());
        let device = device.ok_or_else(|| Failure::new("grant: the device is closed"))?;
        let lease = export(device, &spec)?;
        let info = lease
            .info()
            .ok_or_else(|| Failure::new("grant: lease: nothing is known of it"))?;
        let socket = Socket::bind(&spec.socket, spec.is_shared())?;
        let id = LeaseId::of(&lease)?;
        let control = Socket::bind(&control::path(&spec.socket), false);
        let control = control
            .inspect_err(|_| {
                let path = spec.socket.display();
                self.warn(&format!(
                    "grant: {path}: not for `lease revoke`, no control socket"
                ));
            })
            .ok();
        self.say(&Event::Granted {
            info: &info,
            id,
            socket: &spec.socket,
        });
        self.granted.push(Granted {
            owned,
            lease: Box::leak(Box::new(lease)),
            id,
            socket: Some(socket),
            control,
            answer: Answer::Draining,
            expires: spec
                .terms
                .term
                .and_then(|term| Instant::now().checked_add(term)),
            state: State::Granted,
            spec,
        });
        Ok(())
    }

    pub(super) fn say(&self, event: &Event<'_>) {
        self.lines.say(self.output.line(event, &event.text()));
    }

    /// Reports a failure that ends nothing: on standard error, or as an event where events are
    /// JSON.
    pub(super) fn warn(&self, error: &str) {
        let event = Event::Error { error };
        match self.output.is_json() {
            true => self.say(&event),
            false => self.lines.warn(event.text()),
        }
    }

    /// Says which process goes on in the background, and has all that was said written.
    pub(crate) fn say_detached(&self) {
        let paths = self.granted.iter().map(|it| it.spec.socket.as_path());
        self.say(&Event::Detached {
            pid: std::process::id(),
            sockets: &paths.collect::<Vec<_>>(),
        });
        self.lines.flush();
    }

    /// Until nothing is granted any more.
    pub(crate) fn serve(mut self) -> Result<(), Failure> {
        while self.is_busy() {
            let ready = self.wait()?;
            if ready.signal && self.signalled()? {
                break;
            }
            for place in ready.requests {
                self.requested(place);
            }
            if ready.events || self.granted.iter().any(|it| it.state != State::Granted) {
                self.look_at_draining();
            }
            self.expire();
            if ready.typed {
                self.read_typed();
            }
            for place in ready.listeners {
                self.accept(place);
            }
            for place in ready.controls {
                self.accept_control(place);
            }
            self.answer();
            if ready.connections || !self.connections.is_empty() {
                self.send();
            }
            self.close_wanted();
        }
        self.failed.map_or(Ok(()), Err)
    }

    fn is_busy(&self) -> bool {
        self.granted.iter().any(|it| it.state != State::Ended)
    }

    fn wait(&mut self) -> Result<Ready, Failure> {
        let now = Instant::now();
        let reads = self.inputs.stdin;
        let may_read = reads && lines::may_read();
        let accepts = self.accept_from.is_none_or(|from| from <= now)
            && self.connections.len() < MOST_CONNECTIONS;
        let mut set: Vec<(Source, BorrowedFd<'_>, PollFlags)> = Vec::new();
        if let Some(signals) = &self.inputs.signals {
            set.push((Source::Signal, signals.as_fd(), PollFlags::IN));
        }
        for (place, owned) in self.devices.iter().enumerate() {
            if let (Some(request), false) = (&owned.request, owned.wanted) {
                set.push((Source::Request(place), request.as_fd(), PollFlags::IN));
            }
            if let Some(events) = &owned.events {
                set.push((Source::Events, events.as_fd(), PollFlags::IN));
            }
        }
        let listeners = self.granted.iter().enumerate().filter(|_| accepts);
        for (place, granted) in listeners {
            if let Some(socket) = &granted.socket {
                let listener = socket.listener.as_fd();
                set.push((Source::Listener(place), listener, PollFlags::IN));
            }
        }
        for connection in &self.connections {
            let stream = connection.stream.as_fd();
            set.push((Source::Connection, stream, PollFlags::OUT));
        }
        for (place, granted) in self.granted.iter().enumerate() {
            if let (Some(control), true) = (&granted.control, self.asked.len() < control::MOST) {
                let listener = control.listener.as_fd();
                set.push((Source::Control(place), listener, PollFlags::IN));
            }
        }
        for asked in self.asked.iter().filter(|asked| !asked.waits) {
            set.push((Source::Asked, asked.stream.as_fd(), PollFlags::IN));
        }
        let stdin = io::stdin();
        if may_read {
            set.push((Source::Stdin, stdin.as_fd(), PollFlags::IN));
        }

        let mut until: Vec<Instant> = self.connections.iter().map(|it| it.deadline).collect();
        until.extend(self.asked.iter().filter_map(Asked::deadline));
        let live = self.granted.iter().filter(|it| it.state == State::Granted);
        until.extend(live.filter_map(|it| it.expires));
        until.extend(self.accept_from.filter(|from| *from > now));
        if (reads && !may_read) || self.granted.iter().any(|it| it.is_draining()) {
            until.push(now + LOOK_AGAIN);
        }
        let timeout = until
            .iter()
            .min()
            .map(|at| at.saturating_duration_since(now));
        // A deadline that has passed when poll returns, not one that is about to.
        let timeout = timeout.map(|it| it + Duration::from_millis(1));
        let timeout = timeout.and_then(|it| Timespec::try_from(it).ok());
        let mut fds: Vec<PollFd<'_>> = set
            .iter()
            .map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(errno) => return Err(Failure::new(format!("grant: wait: {errno}"))),
        }
        let mut ready = Ready::default();
        let found = set
            .iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty());
        for ((source, ..), _) in found {
            match source {
                Source::Signal => ready.signal = true,
                Source::Request(place) => ready.requests.push(*place),
                Source::Events => ready.events = true,
                Source::Listener(place) => ready.listeners.push(*place),
                Source::Control(place) => ready.controls.push(*place),
                // Each is looked at whenever poll returns.
                Source::Asked => {}
                Source::Connection => ready.connections = true,
                Source::Stdin => ready.typed = true,
            }
        }
        Ok(ready)
    }

    fn accept_control(&mut self, place: usize) {
        let control = self.granted.get(place).and_then(|it| it.control.as_ref());
        // A peer that is gone again, or that may not ask, is not worth a word.
        if let Some(Ok(Some(asked))) = control.map(|control| Asked::accept(control, place)) {
            self.asked.push(asked);
        }
    }

    /// Does what is asked through control sockets.
    fn answer(&mut self) {
        for mut asked in std::mem::take(&mut self.asked) {
            if !asked.waits && !asked.read() {
                continue;
            }
            if asked.waits {
                self.revoke(asked.granted);
            }
            let keeps = match self.granted.get(asked.granted) {
                Some(granted) if asked.waits => asked.tell(&granted.answer),
                granted => granted.is_some(),
            };
            if keeps {
                self.asked.push(asked);
            }
        }
    }

    fn read_typed(&mut self) {
        let Some(lines) = self.typed.read() else {
            self.inputs.stdin = false;
            return;
        };
        for line in lines {
            let (word, name) = line.split_once(' ').unwrap_or((&line, ""));
            match (word, name.trim()) {
                ("", _) => {}
                ("revoke" | "quit", "") => self.revoke_all(),
                ("revoke", name) => match self.named(name) {
                    Some(place) => self.revoke(place),
                    None => self.warn(&format!("no lease is called {name:?}")),
                },
                ("status", "") => self.status(),
                _ => self.warn(&format!("{line:?} is neither `revoke [NAME]` nor `status`")),
            }
        }
    }

    /// By its name or its socket.
    fn named(&self, name: &str) -> Option<usize> {
        self.granted.iter().position(|granted| {
            granted.spec.terms.name.as_deref() == Some(name)
                || granted.spec.socket.as_os_str() == name
        })
    }

    fn status(&self) {
        for granted in &self.granted {
            let owned = self.devices.get(granted.owned);
            let Some(device) = owned.and_then(|owned| owned.device.as_ref()) else {
                continue;
            };
            match device.status(granted.lease) {
                Ok(status) => self.say(&Event::Status {
                    socket: &granted.spec.socket,
                    status,
                }),
                Err(error) => self.warn(&error.report().to_string()),
            }
        }
    }

    /// Takes a connection. A peer that misbehaves is reported and ends nothing.
    fn accept(&mut self, place: usize) {
        let Some(granted) = self.granted.get(place) else {
            return;
        };
        let Some(socket) = &granted.socket else {
            return;
        };
        let stream = match socket.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                let path = granted.spec.socket.display();
                self.warn(&format!("accept: {path}: {error}"));
                self.accept_from = Instant::now().checked_add(ACCEPT_AGAIN);
                return;
            }
        };
        let peer = match Peer::of(&stream) {
            Ok(peer) => peer,
            Err(error) => return self.warn(&error.report().to_string()),
        };
        if !granted.spec.is_for(&peer) {
            return self.refuse(peer, "not the user that the lease is for");
        }
        match Sender::new(granted.lease) {
            Ok(sender) => self.connections.push(Connection {
                granted: place,
                stream,
                peer,
                sender,
                deadline: Instant::now() + SEND_TIMEOUT,
            }),
            Err(error) => self.refuse(peer, &error.report().to_string()),
        }
    }

    fn refuse(&self, Peer { pid, uid, .. }: Peer, reason: &str) {
        self.say(&Event::Refused { pid, uid, reason });
    }

    /// Sends as much as goes without waiting.
    fn send(&mut self) {
        let now = Instant::now();
        for mut connection in std::mem::take(&mut self.connections) {
            let granted = self.granted.get(connection.granted);
            if granted.is_none_or(|granted| granted.socket.is_none()) {
                continue;
            }
            let Peer { pid, uid, .. } = connection.peer;
            match connection.sender.poll(&connection.stream) {
                Ok(true) => {
                    self.say(&Event::Served { pid, uid });
                    let granted = self.granted.get_mut(connection.granted);
                    if let Some(granted) = granted.filter(|granted| granted.spec.terms.once) {
                        granted.socket = None;
                    }
                }
                Ok(false) if connection.deadline <= now => {
                    self.refuse(connection.peer, "it did not read its lease in time");
                }
                Ok(false) => self.connections.push(connection),
                Err(error) => self.refuse(connection.peer, &error.report().to_string()),
            }
        }
    }
}

impl Granted {
    fn is_draining(&self) -> bool {
        matches!(self.state, State::Draining(_))
    }
}

fn export(device: &Device, spec: &Spec) -> Result<Lease, Failure> {
    let mut builder = device
        .export(spec.bar)
        .ranges(spec.terms.ranges.iter().copied());
    if spec.terms.read_only {
        builder = builder.read_only();
    }
    let lease = builder.export()?;
    if spec.terms.memory_type != barlease::MemoryType::Nc {
        device.set_memory_type(&lease, spec.terms.memory_type)?;
    }
    if let Some(tph) = spec.terms.tph {
        device.set_tph(&lease, tph)?;
    }
    if let Some(name) = &spec.terms.name {
        lease.set_name(name)?;
    }
    Ok(lease)
}
