//! Clients come: by the socket of the service, or by that of a claim.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use barlease_ledger::core::Event;
use barlease_ledger::core::Selector;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::Millis;
use barlease_ledger::types::RequestId;
use barlease_proto as proto;
use barlease_proto::Refusal;
use rustix::event::epoll;
use rustix::event::epoll::EventData;
use rustix::event::epoll::EventFlags;

use crate::calls;
use crate::claims::Claims;
use crate::claims::is_name;
use crate::connection::Connection;
use crate::peer;
use crate::server::Server;
use crate::server::Source;
use crate::server::token;

impl Server<'_> {
    /// Takes clients, and serves the claims that there are.
    pub(crate) fn serve_on(
        &mut self,
        listener: UnixListener,
        claims: Option<Claims>,
    ) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        self.listener = Some(listener);
        self.listen_on(None)?;
        let Some(claims) = claims else {
            return Ok(());
        };
        let names: Vec<_> = claims.names().cloned().collect();
        // A claim whose directory is gone has ended while no daemon was there.
        let leases = self.service.core().leases();
        let ended: BTreeSet<Arc<str>> = leases
            .filter_map(|lease| lease.peer.claim.clone())
            .filter(|claim| claims.listener(claim).is_none())
            .collect();
        self.claims = Some(claims);
        for claim in ended {
            self.revoke_claim(RequestId(0), &claim)?;
        }
        for name in names {
            self.listen_on(Some(name))?;
        }
        Ok(())
    }

    fn listener_of(&self, claim: Option<&Arc<str>>) -> Option<&UnixListener> {
        match claim {
            None => self.listener.as_ref(),
            Some(claim) => self.claims.as_ref()?.listener(claim),
        }
    }

    /// Listens for clients of a claim, or of the service.
    pub(crate) fn listen_on(&mut self, claim: Option<Arc<str>>) -> io::Result<()> {
        let Some(listener) = self.listener_of(claim.as_ref()) else {
            return Ok(());
        };
        let number = self.last_source + 1;
        epoll::add(
            &self.epoll,
            listener,
            EventData::new_u64(number),
            EventFlags::IN,
        )?;
        self.last_source = number;
        self.sources.insert(number, Source::Listener(claim));
        Ok(())
    }

    /// Takes a client that has come.
    pub(crate) fn accept(&mut self, number: u64, claim: Option<Arc<str>>) -> io::Result<()> {
        let Some(listener) = self.listener_of(claim.as_ref()) else {
            self.sources.remove(&number);
            return Ok(());
        };
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) => {
                let errno = rustix::io::Errno::from_io_error(&error);
                if matches!(
                    errno,
                    Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)
                ) {
                    // Until a connection ends, or this would be told again and again.
                    eprintln!("barleased: no descriptors are left for clients: {error}");
                    epoll::delete(&self.epoll, listener)?;
                    self.sources.remove(&number);
                    self.paused.push(claim);
                }
                return Ok(());
            }
        };
        // A listener of somebody else's making may have it, and a client in another PID namespace
        // is process 0 then, which rustix takes for impossible.
        if rustix::net::sockopt::set_socket_passcred(&socket, false).is_err() {
            return Ok(());
        }
        let peer = peer::of(&socket, claim.clone()).or_else(|_| {
            // The last descriptor went to the client: its process is asked for with the spare one.
            self.spare = None;
            peer::of(&socket, claim)
        });
        if self.spare.is_none() {
            self.spare = self.epoll.try_clone().ok();
        }
        let Ok(peer) = peer else {
            return Ok(());
        };
        let most = self.service.core().policy().totals().connections;
        if !self.shares.connect(&peer, most) {
            return Ok(());
        }
        // The number that it gets in the epoll.
        let id = ConnectionId(self.last_source + 1);
        let token = token()?;
        let event = Event::Connected {
            connection: id,
            peer: peer.clone(),
            token,
            administrator: calls::is_administrator(&peer),
        };
        if let Err(error) = self.listen_to(&socket, Source::Connection(id)) {
            eprintln!("barleased: a client is turned away: {error}");
            self.shares.disconnect(&peer, 0, None);
            return Ok(());
        }
        if let Some(process) = peer.process {
            self.callers.insert((process, id));
        }
        self.connections
            .insert(id, Connection::new(socket, peer, token));
        self.service.give(event)
    }

    /// Takes no more clients. The sockets stay open elsewhere, and would be told of as long as
    /// somebody waits there.
    pub(crate) fn listen_no_more(&mut self) {
        let claims = self.claims.iter().flat_map(|claims| claims.listeners());
        for listener in self.listener.iter().chain(claims) {
            // It may be paused.
            let _ = epoll::delete(&self.epoll, listener);
        }
        let is_listener = |source: &Source| matches!(source, Source::Listener(_));
        self.sources.retain(|_, source| !is_listener(source));
        self.paused.clear();
        self.listener = None;
        self.claims = None;
    }

    /// Takes clients again, now that there is a descriptor for one.
    pub(crate) fn listen_again(&mut self) -> io::Result<()> {
        for claim in std::mem::take(&mut self.paused) {
            self.listen_on(claim)?;
        }
        Ok(())
    }

    /// Makes the directory of a claim.
    pub(crate) fn open_claim(
        &mut self,
        call: &proto::OpenClaim,
    ) -> io::Result<Result<proto::Claim, Refusal>> {
        let name = &call.claim;
        let invalid = |reason: String| Ok(Err(Refusal::Invalid { reason }));
        if !is_name(name) {
            return invalid(format!(
                "{name:?} is no name of a claim: it has 1 to 64 letters, digits, `-`, `_` or `.`, \
                 and begins and ends with a letter or digit"
            ));
        }
        let Some(claims) = &mut self.claims else {
            return invalid("the service has no directory for claims".to_owned());
        };
        match claims.open(name) {
            Ok(is_new) => {
                let directory = claims.directory_of(name).display().to_string();
                if is_new {
                    self.listen_on(Some(name.as_str().into()))?;
                }
                Ok(Ok(proto::Claim { directory }))
            }
            Err(error) => Ok(Err(Refusal::Failed {
                operation: format!("make the directory of claim {name}"),
                errno: error.raw_os_error().unwrap_or(0),
            })),
        }
    }

    /// Revokes all leases of a claim, whatever they live by.
    fn revoke_claim(&mut self, request: RequestId, claim: &Arc<str>) -> io::Result<()> {
        // First, since the answer says how many there were.
        self.service.give(Event::Revoke {
            request,
            selector: Selector::Claim(claim.clone()),
            grace: Some(Millis(0)),
        })?;
        self.service.give(Event::ClaimEnded(claim.clone()))
    }

    /// Ends a claim, with all that it has.
    pub(crate) fn end_claim(
        &mut self,
        request: RequestId,
        call: &proto::EndClaim,
    ) -> io::Result<Result<(), Refusal>> {
        let name: Arc<str> = call.claim.as_str().into();
        let listener = self.claims.as_mut().and_then(|claims| claims.end(&name));
        let Some(listener) = listener else {
            return Ok(Err(Refusal::NoSuchClaim {
                claim: call.claim.clone(),
            }));
        };
        let is_its = |source: &Source| matches!(source, Source::Listener(Some(it)) if *it == name);
        self.sources.retain(|_, source| !is_its(source));
        self.paused.retain(|claim| claim.as_ref() != Some(&name));
        drop(listener);
        self.revoke_claim(request, &name)?;
        let speaks = |connection: &Connection| connection.peer.claim.as_ref() == Some(&name);
        let connections = self.connections.iter();
        let gone: Vec<_> = connections
            .filter(|(_, connection)| speaks(connection))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.gone(id)?;
        }
        Ok(Ok(()))
    }
}
