//! Processes and control groups that leases live by, and processes that have handed a device over.
//!
//! A process that cannot be watched for want of descriptors or memory is not taken for gone: the
//! daemon looks at it again, until it can watch it or it is gone.

use std::io;
use std::sync::Arc;

use barlease_ledger::core::Event;
use barlease_ledger::types::CgroupId;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::ProcessId;
use barlease_ledger::types::Time;
use rustix::event::epoll;

use crate::peer;
use crate::recovery::Owner;
use crate::server::Server;
use crate::server::Source;
use crate::service::now;

/// Time between two looks.
const PAUSE: u64 = 1000;

/// Something that could not be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unwatched {
    /// A process, with its number.
    Process(ProcessId, u32),
    /// A control group, with its path.
    Cgroup(CgroupId, Arc<str>),
    /// The process that has handed this device over.
    Owner(Arc<str>, Owner),
}

impl Server<'_> {
    /// Watches a process that a lease lives by.
    pub(crate) fn watch(&mut self, process: ProcessId) -> io::Result<()> {
        let all = (process, ConnectionId(0))..=(process, ConnectionId(u64::MAX));
        let caller = self.callers.range(all).next();
        let pid = match caller.and_then(|(_, id)| self.connections.get(id)) {
            Some(connection) => Some(connection.peer.pid),
            None => self.service.pid_of(process),
        };
        match pid {
            Some(pid) => self.watch_number(process, pid),
            None => self.service.give(Event::ProcessGone(process)),
        }
    }

    fn watch_number(&mut self, process: ProcessId, pid: u32) -> io::Result<()> {
        let watched = match peer::open(pid, process) {
            Ok(None) => return self.service.give(Event::ProcessGone(process)),
            Ok(Some(pidfd)) => self
                .listen_to(&pidfd, Source::Process(process))
                .map(|number| (number, pidfd)),
            Err(error) => Err(error.into()),
        };
        match watched {
            Ok(watched) => {
                self.processes.insert(process, watched);
            }
            Err(error) => self.watch_later(Unwatched::Process(process, pid), &error),
        }
        Ok(())
    }

    pub(crate) fn unwatch(&mut self, process: ProcessId) {
        if let Some((number, _)) = self.processes.remove(&process) {
            self.sources.remove(&number);
        }
        let is_it = |it: &Unwatched| matches!(it, Unwatched::Process(id, _) if *id == process);
        self.unwatched.retain(|it| !is_it(it));
    }

    /// Watches a control group that a lease lives by.
    pub(crate) fn watch_cgroup(&mut self, cgroup: CgroupId, path: Arc<str>) -> io::Result<()> {
        match self.cgroups.watch(cgroup, &path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.service.give(Event::CgroupEmpty(cgroup))
            }
            Err(error) => {
                self.watch_later(Unwatched::Cgroup(cgroup, path), &error);
                Ok(())
            }
        }
    }

    pub(crate) fn unwatch_cgroup(&mut self, cgroup: CgroupId) {
        self.cgroups.unwatch(cgroup);
        let is_it = |it: &Unwatched| matches!(it, Unwatched::Cgroup(id, _) if *id == cgroup);
        self.unwatched.retain(|it| !is_it(it));
    }

    /// Watches the process that has handed a device over.
    pub(crate) fn watch_owner(&mut self, name: &Arc<str>, owner: Owner) -> io::Result<()> {
        let watched = match peer::open(owner.pid, owner.process) {
            Ok(None) => return self.owner_gone(name),
            Ok(Some(process)) => self
                .listen_to(&process, Source::Owner(name.clone()))
                .map(|number| (Some((number, process)), owner)),
            Err(error) => Err(error.into()),
        };
        let watched = watched.unwrap_or_else(|error| {
            self.watch_later(Unwatched::Owner(name.clone(), owner), &error);
            (None, owner)
        });
        self.owners.insert(name.clone(), watched);
        Ok(())
    }

    pub(crate) fn unwatch_owner(&mut self, name: &str) -> Option<Owner> {
        let is_it = |it: &Unwatched| matches!(it, Unwatched::Owner(it, _) if **it == *name);
        self.unwatched.retain(|it| !is_it(it));
        let (watched, owner) = self.owners.remove(name)?;
        if let Some((number, process)) = watched {
            self.sources.remove(&number);
            let _ = epoll::delete(&self.epoll, &process);
        }
        Some(owner)
    }

    fn watch_later(&mut self, what: Unwatched, error: &io::Error) {
        if self.watch_again.is_none() {
            eprintln!("barleased: watch {what:?}: {error}: it is tried again");
        }
        self.unwatched.push(what);
        self.watch_again = Some(Time(now().0 + PAUSE));
    }

    /// Looks again at what could not be watched, when it is time.
    pub(crate) fn watch_again(&mut self) -> io::Result<()> {
        if self.watch_again.is_none_or(|time| time > now()) {
            return Ok(());
        }
        let unwatched = std::mem::take(&mut self.unwatched);
        for what in unwatched {
            match what {
                Unwatched::Process(process, pid) => self.watch_number(process, pid)?,
                Unwatched::Cgroup(cgroup, path) => self.watch_cgroup(cgroup, path)?,
                Unwatched::Owner(name, owner) => self.watch_owner(&name, owner)?,
            }
        }
        if self.unwatched.is_empty() {
            self.watch_again = None;
        }
        Ok(())
    }
}
