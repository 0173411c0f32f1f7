//! Devices that the daemon has: listened to, left with the manager, and let go with the process
//! that has handed one over.

use std::io;
use std::sync::Arc;

use barlease::EventFd;
use rustix::event::epoll;

use crate::device::Device;
use crate::peer;
use crate::recovery;
use crate::recovery::Owner;
use crate::server::Server;
use crate::server::Source;

impl Server<'_> {
    /// Has a device, and leaves it with the manager. It is not had if that is not possible: its
    /// leases would be lost by a restart, those of others not.
    pub(crate) fn take(
        &mut self,
        name: &Arc<str>,
        device: Device,
        owner: Option<Owner>,
    ) -> io::Result<Result<(), String>> {
        // One that is gone already, or does not answer, is not the end of the service.
        if let Err(error) = device.facts() {
            return Ok(Err(error.report().to_string()));
        }
        let stored = recovery::name_of(name, owner);
        if let Err(why) = self.manager.store(&stored, &device) {
            return Ok(Err(why));
        }
        self.service.open(name, device)?;
        self.listen_to_device(name)?;
        if let Some(owner) = owner {
            self.watch_owner(name, owner)?;
        }
        Ok(Ok(()))
    }

    pub(crate) fn listen_to_device(&mut self, name: &Arc<str>) -> io::Result<()> {
        let clone = |event: &EventFd| event.try_clone().map_err(io::Error::other);
        let Some(device) = self.service.device(name) else {
            return Ok(());
        };
        let events = clone(&device.events)?;
        let request = device.request.as_ref().map(clone).transpose()?;
        self.listen_to(&events, Source::Events(name.clone()))?;
        if let Some(request) = request {
            self.listen_to(&request, Source::Request(name.clone()))?;
        }
        Ok(())
    }

    /// Tells the manager how things are, with a remark.
    pub(crate) fn tell_status(&self, remark: &str) {
        let devices = self.service.devices().len();
        let kept = match self.manager.stores() {
            true => "leases outlive a restart",
            false => "not restartable: nothing keeps descriptors",
        };
        let plural = if devices == 1 { "" } else { "s" };
        self.manager
            .tell(&format!("STATUS={devices} device{plural}, {kept}{remark}"));
    }

    /// Watches the process that has handed a device over.
    pub(crate) fn watch_owner(&mut self, name: &Arc<str>, owner: Owner) -> io::Result<()> {
        let Some(process) = peer::open(owner.pid, owner.process) else {
            return self.owner_gone(name);
        };
        let number = self.listen_to(&process, Source::Owner(name.clone()))?;
        self.owners.insert(name.clone(), (number, process, owner));
        Ok(())
    }

    pub(crate) fn unwatch_owner(&mut self, name: &str) -> Option<Owner> {
        let (number, process, owner) = self.owners.remove(name)?;
        self.sources.remove(&number);
        let _ = epoll::delete(&self.epoll, &process);
        Some(owner)
    }

    /// The process that has handed a device over has died.
    pub(crate) fn owner_gone(&mut self, name: &Arc<str>) -> io::Result<()> {
        self.unwatch_owner(name);
        eprintln!("barleased: {name}: the process that has handed it over has ended");
        self.let_go(name, None)
    }
}
