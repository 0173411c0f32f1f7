//! Clients are served in turns, answered, and given up.
//!
//! One call of a connection at a time, and one of each connection a turn. A call is begun when
//! nothing is left to send, and when the client has read the descriptor that it was sent last: one
//! that is not read counts against the daemon (see `unread`).

use std::io;
use std::os::fd::OwnedFd;

use barlease_ledger::core::Event;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::RequestId;
use barlease_ledger::types::Time;
use rustix::event::epoll;
use rustix::event::epoll::EventData;
use rustix::event::epoll::EventFlags;

use crate::connection::Busy;
use crate::connection::Outgoing;
use crate::server::Server;
use crate::service::now;

/// How long a client may take nothing of what is sent to it.
const PATIENCE: u64 = 10_000;
/// How long until what the kernel did not take for want of room is sent again.
const PAUSE: u64 = 100;

impl Server<'_> {
    pub(crate) fn stirred(&mut self, id: ConnectionId, flags: EventFlags) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let waits = connection.waits();
        let ended = if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            true
        } else if waits {
            // Its next call is not read before this one is answered.
            flags.contains(EventFlags::RDHUP)
        } else if flags.contains(EventFlags::IN) && !connection.has_input() {
            !matches!(connection.receive(&mut self.chunk), Ok(true))
        } else {
            false
        };
        if ended || !self.weigh(id) {
            return self.gone(id);
        }
        self.ready.insert(id);
        Ok(())
    }

    /// Does what there is to do for connections, and outside of the service: of each connection one
    /// call, so that whoever sends many at once gets no more than others.
    pub(crate) fn settle(&mut self) -> io::Result<()> {
        self.effects()?;
        for begins in [true, false] {
            for id in std::mem::take(&mut self.ready) {
                self.advance(id, begins)?;
                self.effects()?;
            }
        }
        Ok(())
    }

    fn effects(&mut self) -> io::Result<()> {
        while let Some(effect) = self.service.next_effect() {
            self.effect(effect)?;
        }
        Ok(())
    }

    /// Sends what a client takes, and begins its next call, if it may, when there is nothing left
    /// to send.
    fn advance(&mut self, id: ConnectionId, begins: bool) -> io::Result<()> {
        let mut begins = begins;
        loop {
            let Some(connection) = self.connections.get_mut(&id) else {
                return Ok(());
            };
            let Ok(any) = connection.send() else {
                return self.gone(id);
            };
            let sending = connection.is_sending();
            if connection.stalled {
                self.stalled.insert(id);
                self.send_again.get_or_insert(Time(now().0 + PAUSE));
            }
            // One that does not read what it has is as deaf as one that takes nothing more.
            let holds_up = sending || connection.is_deaf();
            if (any || !holds_up)
                && let Some(time) = connection.give_up.take()
            {
                self.give_ups.remove(&(time, id));
            }
            if holds_up && connection.give_up.is_none() {
                let time = Time(now().0 + PATIENCE);
                connection.give_up = Some(time);
                self.give_ups.insert((time, id));
            }
            // From here on only this turn puts it there again.
            self.ready.remove(&id);
            let lists = matches!(connection.busy, Some(Busy::List { .. }));
            let calls = connection.busy.is_none() && connection.has_input();
            let calls = calls && (sending || connection.has_read());
            match (sending, std::mem::take(&mut begins)) {
                (false, true) if lists => self.list_on(id)?,
                (false, true) if calls => match connection.next_call() {
                    Ok(Some(call)) => {
                        self.call(id, &call)?;
                        self.effects()?;
                    }
                    Ok(None) => break,
                    Err(_) => return self.gone(id),
                },
                (false, false) if lists || calls => {
                    self.ready.insert(id);
                    break;
                }
                _ => break,
            }
        }
        if !self.weigh(id) {
            return self.gone(id);
        }
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let mut flags = EventFlags::RDHUP;
        let sends = connection.is_sending() && !connection.stalled;
        let is_deaf = connection.is_deaf();
        flags.set(EventFlags::OUT, sends || is_deaf);
        // There is room to send all the time: each time that the client reads is an edge.
        flags.set(EventFlags::ET, is_deaf);
        let waits = connection.waits();
        // The daemon takes bytes when there is a turn for them, and not before: a client that sends
        // faster than it is served fills its own socket.
        flags.set(EventFlags::IN, !waits && !connection.has_input());
        if connection.armed != flags {
            connection.armed = flags;
            epoll::modify(&self.epoll, connection, EventData::new_u64(id.0), flags)?;
        }
        Ok(())
    }

    /// A client is not there any more, or is not worth it.
    pub(crate) fn gone(&mut self, id: ConnectionId) -> io::Result<()> {
        let Some(connection) = self.connections.remove(&id) else {
            return Ok(());
        };
        let _ = epoll::delete(&self.epoll, &connection);
        self.sources.remove(&id.0);
        self.monitors.remove(&id);
        self.stalled.remove(&id);
        if let Some(time) = connection.give_up {
            self.give_ups.remove(&(time, id));
        }
        if let Some(request) = connection.request {
            self.requests.remove(&request);
        }
        let peer = &connection.peer;
        if let Some(process) = peer.process {
            self.callers.remove(&(process, id));
        }
        let peer = peer.clone();
        let undelivered: Vec<LeaseId> = connection.undelivered().collect();
        let bytes = connection.counted;
        let unread = connection.into_unread();
        self.shares.disconnect(&peer, bytes, unread);
        for lease in undelivered {
            self.service.give(Event::Undelivered(lease))?;
        }
        self.service.give(Event::PeerGone(id))?;
        self.listen_again()
    }

    pub(crate) fn give_up(&mut self) -> io::Result<()> {
        while let Some((time, id)) = self.give_ups.first().copied() {
            if time > now() {
                break;
            }
            self.gone(id)?;
        }
        Ok(())
    }

    /// Answers a request for good.
    pub(crate) fn answer(
        &mut self,
        request: RequestId,
        message: Vec<u8>,
        lease: Option<(LeaseId, OwnedFd)>,
    ) -> io::Result<()> {
        let id = self.requests.remove(&request);
        let connection = id.and_then(|id| Some((id, self.connections.get_mut(&id)?)));
        let Some((id, connection)) = connection else {
            return self.undelivered(lease);
        };
        let oneway = matches!(connection.busy, Some(Busy::Call { oneway: true }));
        connection.busy = None;
        connection.request = None;
        connection.asked = None;
        self.ready.insert(id);
        if oneway {
            return self.undelivered(lease);
        }
        self.push(id, message, lease)
    }

    /// Measures how long an Acquire took.
    pub(crate) fn time_grant(&self, request: RequestId, granted: bool) {
        let id = self.requests.get(&request);
        let connection = id.and_then(|id| self.connections.get(id));
        let asked = connection.and_then(|connection| connection.asked.as_ref());
        if let (Some(asked), true) = (asked, granted) {
            self.metrics.granted(asked.began.elapsed());
        }
    }

    fn undelivered(&mut self, lease: Option<(LeaseId, OwnedFd)>) -> io::Result<()> {
        match lease {
            Some((lease, _)) => self.service.give(Event::Undelivered(lease)),
            None => Ok(()),
        }
    }

    /// Sends a message.
    pub(crate) fn push(
        &mut self,
        id: ConnectionId,
        bytes: Vec<u8>,
        lease: Option<(LeaseId, OwnedFd)>,
    ) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        self.ready.insert(id);
        match connection.push(Outgoing { bytes, lease }) {
            Ok(()) => Ok(()),
            Err(_) => self.gone(id),
        }
    }

    /// Sends again what the kernel did not take, when it is time.
    pub(crate) fn send_again(&mut self) {
        if self.send_again.is_some_and(|time| time <= now()) {
            self.send_again = None;
            self.ready.append(&mut self.stalled);
        }
    }

    /// Counts the bytes that are kept for a connection; `false`: its user has too many.
    fn weigh(&mut self, id: ConnectionId) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else {
            return true;
        };
        let weight = connection.weight();
        let before = std::mem::replace(&mut connection.counted, weight);
        self.shares.weigh(&connection.peer, before, weight)
    }

    /// A number for a request of a connection.
    pub(crate) fn request_of(&mut self, id: ConnectionId) -> RequestId {
        self.last_request += 1;
        let request = RequestId(self.last_request);
        self.requests.insert(request, id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.request = Some(request);
        }
        request
    }
}
