//! How leases end: all the ways to it lead to `revoke`, and from there to `ended`.

use std::time::Instant;

use barlease::Error;
use barlease::Revoked;

use super::Event;
use super::control::Answer;
use super::serve::Granted;
use super::serve::Server;
use super::serve::State;
use crate::failure::Failure;

impl Server {
    /// The first time: revokes all. Then: whether to wait no longer.
    pub(super) fn signalled(&mut self) -> Result<bool, Failure> {
        if let Some(signals) = &self.inputs.signals {
            while let Ok(Some(_)) = signals.read_signal() {}
        }
        if self.granted.iter().any(|it| it.state == State::Granted) {
            self.revoke_all();
            return Ok(false);
        }
        Err(Failure::new(
            "revoke: an importer has not let go; the device is closed all the same",
        ))
    }

    pub(super) fn revoke_all(&mut self) {
        for place in 0..self.granted.len() {
            self.revoke(place);
        }
    }

    /// The kernel wants a device back: its leases end, and then it is closed.
    pub(super) fn requested(&mut self, place: usize) {
        let Some(owned) = self.devices.get_mut(place) else {
            return;
        };
        owned.wanted = true;
        let bdf = owned.bdf;
        self.say(&Event::Requested { bdf });
        for granted in 0..self.granted.len() {
            if self
                .granted
                .get(granted)
                .is_some_and(|it| it.owned == place)
            {
                self.revoke(granted);
            }
        }
    }

    pub(super) fn close_wanted(&mut self) {
        for place in 0..self.devices.len() {
            let mut its = self.granted.iter().filter(|it| it.owned == place);
            if its.any(|it| it.state != State::Ended) {
                continue;
            }
            let Some(owned) = self.devices.get_mut(place).filter(|owned| owned.wanted) else {
                continue;
            };
            let bdf = owned.bdf;
            owned.request = None;
            owned.events = None;
            if owned.device.take().is_some() {
                let reason = "the kernel asked for it";
                self.say(&Event::Closed { bdf, reason });
            }
        }
    }

    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        for place in 0..self.granted.len() {
            let over = |it: &&Granted| {
                it.state == State::Granted && it.expires.is_some_and(|end| end <= now)
            };
            if let Some(granted) = self.granted.get(place).filter(over) {
                self.say(&Event::Expired {
                    bdf: granted.spec.bdf,
                    socket: &granted.spec.socket,
                });
                self.revoke(place);
            }
        }
    }

    /// Takes a lease away. An importer that does not let go is not waited for here.
    pub(super) fn revoke(&mut self, place: usize) {
        let Some(granted) = self.granted.get_mut(place) else {
            return;
        };
        if granted.state != State::Granted {
            return;
        }
        // Nobody else gets it.
        granted.socket = None;
        granted.state = State::Ended;
        self.connections
            .retain(|connection| connection.granted != place);
        let Some(granted) = self.granted.get(place) else {
            return;
        };
        let owned = self.devices.get(granted.owned);
        let Some(device) = owned.and_then(|owned| owned.device.as_ref()) else {
            return;
        };
        let (bdf, socket) = (granted.spec.bdf, &granted.spec.socket);
        let start = Instant::now();
        let answer = match device.leases().revoke_id_nowait(granted.id) {
            // A module without revocation by id.
            Err(Error::Unsupported { .. }) => device.revoke(granted.lease).map(|()| Revoked::Done),
            answer => answer,
        };
        match answer {
            Ok(Revoked::Done) | Err(Error::Dead { .. }) => {
                self.revoked(place, start);
            }
            Ok(Revoked::Draining) => {
                self.say(&Event::Draining { bdf, socket });
                if let Some(granted) = self.granted.get_mut(place) {
                    granted.state = State::Draining(start);
                }
            }
            Err(error @ Error::Unsupported { .. }) => {
                let reason = error.report().to_string();
                self.say(&Event::Closed {
                    bdf,
                    reason: &reason,
                });
                self.ended(place, Answer::Closed { reason });
            }
            Err(error) => {
                let reason = error.report().to_string();
                self.warn(&reason);
                self.ended(place, Answer::Failed { reason });
                self.failed = Some(error.into());
            }
        }
    }

    /// Whether importers have let go by now.
    pub(super) fn look_at_draining(&mut self) {
        for owned in &self.devices {
            if let Some(events) = &owned.events {
                let _ = events.take();
            }
        }
        for place in 0..self.granted.len() {
            let Some(granted) = self.granted.get(place) else {
                continue;
            };
            let State::Draining(start) = granted.state else {
                continue;
            };
            let owned = self.devices.get(granted.owned);
            let Some(device) = owned.and_then(|owned| owned.device.as_ref()) else {
                continue;
            };
            let mut records = device.leases().list();
            let drains = records.any(|record| match record {
                Ok(record) => record.id == granted.id && record.draining,
                // It cannot be told: go on waiting.
                Err(_) => true,
            });
            if drains {
                continue;
            }
            self.revoked(place, start);
        }
    }

    fn revoked(&mut self, place: usize, start: Instant) {
        let microseconds = start.elapsed().as_micros();
        if let Some(granted) = self.granted.get(place) {
            self.say(&Event::Revoked {
                bdf: granted.spec.bdf,
                socket: &granted.spec.socket,
                microseconds,
            });
        }
        let microseconds = u64::try_from(microseconds).unwrap_or(u64::MAX);
        self.ended(place, Answer::Revoked { microseconds });
    }

    fn ended(&mut self, place: usize, answer: Answer) {
        if let Some(granted) = self.granted.get_mut(place) {
            granted.state = State::Ended;
            granted.control = None;
            granted.answer = answer;
        }
    }
}
