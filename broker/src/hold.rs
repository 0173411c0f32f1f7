//! Devices that the daemon has: listened to, left with the manager, and let go with the process
//! that has handed one over.

use std::io;
use std::sync::Arc;

use crate::calls;
use crate::device::Device;
use crate::records;
use crate::recovery;
use crate::recovery::Owner;
use crate::server::Server;
use crate::server::Source;
use barlease::EventFd;
use barlease_ledger::core::Event;

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

    /// Opens those devices of the policy that are not open.
    pub(crate) fn open_devices(&mut self) -> io::Result<()> {
        for wanted in self.service.core().policy().devices().to_vec() {
            let name = &wanted.name;
            if self.service.device(name).is_some() || self.closing.contains(name) {
                continue;
            }
            let opened = (self.opener)(&wanted)
                .and_then(|device| Device::new(device).map_err(|e| e.report().to_string()));
            let taken = match opened {
                Ok(device) => self.take(name, device, None)?,
                Err(error) => Err(error),
            };
            match taken {
                Ok(()) => self.record(records::device_opened(name))?,
                Err(error) => self.record(records::device_absent(name, &error))?,
            }
        }
        self.tell_status();
        Ok(())
    }

    /// Reclaims all leases of a device, and closes it after that.
    pub(crate) fn let_go(&mut self, name: &Arc<str>, grace: Option<u64>) -> io::Result<()> {
        self.going.insert(name.clone());
        self.service.give(Event::DeviceGoing {
            device: name.clone(),
            grace: grace.map(barlease_ledger::types::Millis),
        })?;
        self.service.cancel_scrubs(name);
        Ok(())
    }

    pub(crate) fn device_closed(&mut self, name: &Arc<str>) -> io::Result<()> {
        self.closing.remove(name);
        self.going.remove(name);
        self.record(records::device_closed(name))?;
        self.service.give(Event::DeviceClosed(name.clone()))?;
        for (_, devices) in &mut self.drains {
            devices.remove(name);
        }
        let (done, rest) = std::mem::take(&mut self.drains)
            .into_iter()
            .partition(|(_, devices)| devices.is_empty());
        self.drains = rest;
        for (request, _) in done {
            self.answer(request, calls::done(), None)?;
        }
        Ok(())
    }

    /// Tells the manager how things are.
    pub(crate) fn tell_status(&self) {
        let devices = self.service.devices().len();
        let kept = match self.manager.stores() {
            true => "leases outlive a restart",
            false => "not restartable: nothing keeps descriptors",
        };
        let plural = if devices == 1 { "" } else { "s" };
        let policy = match self.written.errors.first() {
            Some(error) => {
                format!("; the policy's files are wrong ({error}): an older one is in force")
            }
            None => String::new(),
        };
        self.manager
            .tell(&format!("STATUS={devices} device{plural}, {kept}{policy}"));
    }

    /// The process that has handed a device over has died.
    pub(crate) fn owner_gone(&mut self, name: &Arc<str>) -> io::Result<()> {
        self.unwatch_owner(name);
        eprintln!("barleased: {name}: the process that has handed it over has ended");
        self.let_go(name, None)
    }
}
