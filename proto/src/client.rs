//! A client that waits for its answers.

use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::INTERFACE;
use crate::error::Error;
use crate::error::Refusal;
use crate::error::Result;
use crate::types::Acquire;
use crate::types::Acquired;
use crate::types::Adopt;
use crate::types::LeaseInfo;
use crate::types::List;
use crate::types::Method;
use crate::types::Monitor;
use crate::types::Notice;
use crate::types::Record;
use crate::types::Release;
use crate::types::Resume;
use crate::types::Token;
use crate::types::Watch;
use crate::wire::Call;
use crate::wire::Message;
use crate::wire::Reply;
use crate::wire::Wire;
use crate::wire::parameters;

/// A connection to the service. Leases that live by it end with it.
#[derive(Debug)]
pub struct Client {
    wire: Wire,
}

impl Client {
    /// Connects to the service's socket, by default [`crate::SOCKET`].
    ///
    /// Errors: [`Error::Io`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let socket = UnixStream::connect(path).map_err(|error| Error::io("connect", error))?;
        Ok(Self::new(socket))
    }

    /// Talks over a socket that is connected.
    #[must_use]
    pub fn new(socket: UnixStream) -> Self {
        Self {
            wire: Wire::new(socket),
        }
    }

    /// How long an answer may take; for ever without a time. An Acquire that waits in line takes as
    /// long as it waits. After a time-out the connection is of no use: a late answer would be taken
    /// for that of the next call.
    ///
    /// Errors: [`Error::Io`] if the time is 0.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<()> {
        let socket = self.wire.socket();
        let set = |result: std::io::Result<()>| result.map_err(|e| Error::io("set time-out", e));
        set(socket.set_read_timeout(timeout))?;
        set(socket.set_write_timeout(timeout))
    }

    /// Asks for a lease, and gets its descriptor with it.
    ///
    /// Errors: [`Error::Refused`] with the reason, and all others. [`Error::Io`] with `EMFILE` when
    /// this process has as many descriptors as it may have (`ulimit -n`): the lease was given back
    /// then, and the connection can be used on.
    pub fn acquire(&mut self, acquire: &Acquire) -> Result<(Acquired, OwnedFd)> {
        self.send(acquire, false, &[])?;
        let (acquired, _, message) = self.receive::<Acquire>()?;
        let place = usize::try_from(acquired.file_descriptor).unwrap_or(usize::MAX);
        if let Some(fd) = message.fds.into_iter().nth(place) {
            return Ok((acquired, fd));
        }
        let Some(source) = message.lost else {
            let what = format!("there is no descriptor {place} in the message");
            return Err(Error::Malformed(what));
        };
        // It may have ended already, with the descriptor.
        let _ = self.release(acquired.lease);
        Err(Error::io("receive the descriptor of a lease", source))
    }

    /// Gives a lease back. When it returns nothing reaches it through its mappings any more.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn release(&mut self, lease: u64) -> Result<()> {
        self.call(&Release { lease }).map(drop)
    }

    /// The secret of this connection: after a restart of the service another one has with it the
    /// leases that were asked for over this one. To be asked for before that, and kept.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn token(&mut self) -> Result<String> {
        self.call(&Token {}).map(|secret| secret.token)
    }

    /// Has the leases of an earlier connection, which live by this one from now on, and says which.
    /// They are of the earlier secret still: after the next restart both are to be said.
    ///
    /// Errors: as [`Client::acquire`]; the service gives them up some seconds after its restart.
    pub fn resume(&mut self, token: impl Into<String>) -> Result<Vec<u64>> {
        let token = token.into();
        self.call(&Resume { token }).map(|resumed| resumed.leases)
    }

    /// Hands over a device.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn adopt(&mut self, device: impl Into<String>, fd: impl AsFd) -> Result<()> {
        let adopt = Adopt {
            device: device.into(),
            file_descriptor: 0,
        };
        self.send(&adopt, false, &[fd.as_fd()])?;
        self.receive::<Adopt>().map(drop)
    }

    /// The leases, of a pool or all.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn list(&mut self, pool: Option<String>) -> Result<Vec<LeaseInfo>> {
        let stream = self.stream(&List { pool, usage: None })?;
        stream
            .filter_map(|listed| listed.map(|listed| listed.lease).transpose())
            .collect()
    }

    /// News of leases from now on, until the service ends. Takes the connection for it.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn watch(mut self, all: bool) -> Result<impl Iterator<Item = Result<Notice>>> {
        self.send(&Watch { all: Some(all) }, true, &[])?;
        let mut done = false;
        Ok(std::iter::from_fn(move || self.next::<Watch>(&mut done)))
    }

    /// All that happens, for administrators, until the service ends. Takes the connection for it.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn monitor(mut self) -> Result<impl Iterator<Item = Result<Record>>> {
        self.send(&Monitor {}, true, &[])?;
        let mut done = false;
        Ok(std::iter::from_fn(move || {
            let told = self.next::<Monitor>(&mut done)?;
            Some(told.map(|told| told.record))
        }))
    }

    /// Any call with one answer and without descriptors.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn call<M: Method>(&mut self, method: &M) -> Result<M::Reply> {
        self.send(method, false, &[])?;
        Ok(self.receive::<M>()?.0)
    }

    /// Any call with several answers. It must be read to its end before the next call.
    ///
    /// Errors: as [`Client::acquire`].
    pub fn stream<M: Method>(&mut self, method: &M) -> Result<Stream<'_, M>> {
        self.send(method, true, &[])?;
        Ok(Stream {
            client: self,
            done: false,
            method: PhantomData,
        })
    }

    fn send<M: Method>(&mut self, method: &M, more: bool, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let call = Call {
            method: format!("{INTERFACE}.{}", M::NAME),
            parameters: serde_json::to_value(method).map_err(|e| Error::io("send", e.into()))?,
            more,
            oneway: false,
        };
        self.wire.send(&call, fds)
    }

    /// A reply, whether further ones come, and the message that it came with.
    fn receive<M: Method>(&mut self) -> Result<(M::Reply, bool, Message)> {
        let message = self.wire.receive()?.ok_or(Error::Closed)?;
        let reply: Reply = serde_json::from_slice(&message.json)
            .map_err(|error| Error::Malformed(error.to_string()))?;
        if let Some(name) = reply.error {
            return Err(refused(name, reply.parameters));
        }
        Ok((parameters(reply.parameters)?, reply.continues, message))
    }

    fn next<M: Method>(&mut self, done: &mut bool) -> Option<Result<M::Reply>> {
        if *done {
            return None;
        }
        let received = self.receive::<M>();
        *done = !matches!(received, Ok((_, true, _)));
        Some(received.map(|(reply, _, _)| reply))
    }
}

impl AsFd for Client {
    /// The connection: whoever inherits it keeps the leases that live by it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.socket().as_fd()
    }
}

/// The answers of a call.
#[derive(Debug)]
pub struct Stream<'a, M> {
    client: &'a mut Client,
    done: bool,
    method: PhantomData<M>,
}

impl<M: Method> Iterator for Stream<'_, M> {
    type Item = Result<M::Reply>;

    fn next(&mut self) -> Option<Self::Item> {
        self.client.next::<M>(&mut self.done)
    }
}

fn refused(name: String, parameters: Value) -> Error {
    let known = name
        .strip_prefix(INTERFACE)
        .and_then(|rest| rest.strip_prefix('.'));
    let whole = |parameters: Value| match parameters {
        Value::Null => Value::Object(serde_json::Map::new()),
        parameters => parameters,
    };
    let refusal = known.and_then(|known| {
        let value = serde_json::json!({
            "error": known,
            "parameters": whole(parameters.clone()),
        });
        serde_json::from_value::<Refusal>(value).ok()
    });
    match refusal {
        Some(refusal) => Error::Refused(Box::new(refusal)),
        None => Error::Other { name, parameters },
    }
}
