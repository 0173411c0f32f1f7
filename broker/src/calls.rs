//! The methods of the interface, as events of the core and its answers as messages.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use barlease::pci::Pci;
use barlease_ledger::core::Event;
use barlease_ledger::core::News;
use barlease_ledger::core::Reply as CoreReply;
use barlease_ledger::core::Selector;
use barlease_ledger::policy::OwnerDies;
use barlease_ledger::types::ConnectionId;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::Millis;
use barlease_ledger::types::Peer;
use barlease_ledger::types::RequestId;
use barlease_proto as proto;
use barlease_proto::Call;
use barlease_proto::IDL;
use barlease_proto::INTERFACE;
use barlease_proto::Refusal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::json;

use crate::connection::Asked;
use crate::connection::Busy;
use crate::connection::Listing;
use crate::connection::Next;
use crate::device::Device;
use crate::find;
use crate::records;
use crate::recovery::Owner;
use crate::server::Server;
use crate::words;

/// Bytes of the name of a pool or a device.
const MAX_NAME: usize = 255;
/// The interface that each varlink service has.
const VARLINK: &str = "org.varlink.service";

/// Why a call is not carried out.
pub(crate) enum Failure {
    Refused(Refusal),
    /// An error of varlink's own.
    Varlink(&'static str, Value),
    Fatal(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Fatal(error)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// The outcome of a call.
pub(crate) enum Then {
    /// This answer.
    Answer(Value),
    /// One that comes later.
    Later,
}

/// Whether a peer may do what is for administrators. A peer that speaks for a claim may not, even
/// as root of a container.
pub(crate) fn is_administrator(peer: &Peer) -> bool {
    let is_ours = peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw();
    is_ours && peer.claim.is_none()
}

/// A message without an error.
pub(crate) fn message(parameters: &impl Serialize, continues: bool) -> Vec<u8> {
    /// A [`proto::Reply`] whose parameters are written as they are.
    #[derive(Serialize)]
    struct Told<'a, T> {
        parameters: &'a T,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        continues: bool,
    }
    let told = Told {
        parameters,
        continues,
    };
    // No answer has a map with keys that are not text.
    let mut bytes = serde_json::to_vec(&told).unwrap_or_default();
    bytes.push(0);
    bytes
}

fn bytes(reply: &proto::Reply) -> Vec<u8> {
    let mut bytes = json!(reply).to_string().into_bytes();
    bytes.push(0);
    bytes
}

/// The answer without anything in it.
pub(crate) fn done() -> Vec<u8> {
    message(&proto::Nothing {}, false)
}

/// An answer of the core.
pub(crate) fn reply(answer: Result<CoreReply, Refusal>) -> Vec<u8> {
    match answer {
        Ok(CoreReply::Granted(grant)) => {
            let ranges = grant.ranges.as_slice();
            message(
                &proto::Acquired {
                    lease: grant.lease.0,
                    file_descriptor: 0,
                    device: grant.device.to_string(),
                    bar: grant.bar,
                    ranges: ranges.iter().map(words::range).collect(),
                    size: grant.ranges.size(),
                    access: words::access(grant.access),
                    memory_type: words::memory_type(grant.memory_type),
                    expires: words::time(grant.expires),
                    grace: grant.grace.0,
                },
                false,
            )
        }
        Ok(CoreReply::Released) => done(),
        Ok(CoreReply::Renewed(time)) => message(
            &proto::Renewed {
                expires: words::time(time),
            },
            false,
        ),
        Ok(CoreReply::Resumed(leases)) => message(
            &proto::Resumed {
                leases: leases.iter().map(|lease| lease.0).collect(),
            },
            false,
        ),
        Ok(CoreReply::Revoking(leases)) => message(
            &proto::Revoked {
                leases: leases as u64,
            },
            false,
        ),
        Err(refusal) => refused(refusal),
    }
}

fn refused(refusal: Refusal) -> Vec<u8> {
    let mut written = json!(refusal);
    let name = written["error"].as_str().unwrap_or_default();
    let error = Some(format!("{INTERFACE}.{name}"));
    bytes(&proto::Reply {
        parameters: written["parameters"].take(),
        continues: false,
        error,
    })
}

/// News for a watch.
pub(crate) fn notice(lease: LeaseId, news: News) -> Vec<u8> {
    message(&words::notice(lease, news), true)
}

impl Server<'_> {
    /// Carries out a call, or begins to.
    pub(crate) fn call(&mut self, id: ConnectionId, json: &[u8]) -> io::Result<()> {
        let Ok(call) = serde_json::from_slice::<Call>(json) else {
            // There is nothing that an answer would be for.
            return self.gone(id);
        };
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        connection.busy = Some(Busy::Call {
            oneway: call.oneway,
        });
        let peer = connection.peer.clone();
        let files = connection.take_files();
        let request = self.request_of(id);
        let answer = match self.dispatch(id, request, &peer, call, files) {
            Ok(Then::Later) => return Ok(()),
            Ok(Then::Answer(value)) => message(&value, false),
            Err(Failure::Refused(refusal)) => {
                self.record_refusal(id, &refusal)?;
                refused(refusal)
            }
            Err(Failure::Varlink(name, parameters)) => bytes(&proto::Reply {
                parameters,
                continues: false,
                error: Some(format!("{VARLINK}.{name}")),
            }),
            Err(Failure::Fatal(error)) => return Err(error),
        };
        self.answer(request, answer, None)
    }

    fn dispatch(
        &mut self,
        id: ConnectionId,
        request: RequestId,
        peer: &Peer,
        call: Call,
        files: Vec<OwnedFd>,
    ) -> Result<Then, Failure> {
        let (interface, method) = call.method.rsplit_once('.').unwrap_or_default();
        if interface == VARLINK {
            return service(method, call.parameters);
        }
        if interface != INTERFACE {
            return Err(Failure::Varlink(
                "InterfaceNotFound",
                json!({"interface": interface}),
            ));
        }
        let admin = is_administrator(peer);
        let for_admins = matches!(
            method,
            "Revoke"
                | "Drain"
                | "Reload"
                | "Devices"
                | "OpenClaim"
                | "EndClaim"
                | "Claims"
                | "Adopt"
                | "Monitor"
        );
        if for_admins && !admin {
            return Err(Refusal::NotAdministrator {}.into());
        }
        if matches!(method, "Watch" | "List" | "Monitor") && !call.more {
            return Err(Failure::Varlink("ExpectedMore", json!({})));
        }
        let given = call.parameters;
        match method {
            "Acquire" => {
                let acquire: proto::Acquire = parameters(given)?;
                // They come into records, and so to whoever monitors.
                let mut names = acquire.pool.iter().chain(&acquire.device);
                if names.any(|name| name.len() > MAX_NAME) {
                    let reason = format!("a name has at most {MAX_NAME} bytes");
                    return Err(Refusal::Invalid { reason }.into());
                }
                self.asks(id, &acquire);
                let ask = words::ask(acquire)?;
                self.service.give(Event::Acquire {
                    connection: id,
                    request,
                    ask,
                })?;
            }
            "Release" => {
                let release: proto::Release = parameters(given)?;
                self.service.give(Event::Release {
                    connection: id,
                    request,
                    lease: LeaseId(release.lease),
                })?;
            }
            "Renew" => {
                let renew: proto::Renew = parameters(given)?;
                self.service.give(Event::Renew {
                    connection: id,
                    request,
                    lease: LeaseId(renew.lease),
                    ttl: renew.ttl.map(Millis),
                })?;
            }
            "Watch" => {
                let watch: proto::Watch = parameters(given)?;
                let all = watch.all.unwrap_or(false);
                if all && !admin {
                    return Err(Refusal::NotAdministrator {}.into());
                }
                self.is_at(id, Busy::Watch);
                self.service.give(Event::Watch {
                    connection: id,
                    request,
                    all,
                })?;
            }
            "List" => {
                let list: proto::List = parameters(given)?;
                self.requests.remove(&request);
                let usage = list.usage.unwrap_or(false);
                let listing = Listing {
                    next: Next::Leases(LeaseId(0)),
                    pool: list.pool,
                    usage: usage.then(|| self.service.usage()),
                };
                self.is_at(id, Busy::List(listing));
            }
            "Monitor" => {
                self.is_at(id, Busy::Watch);
                self.monitors.insert(id);
            }
            "Explain" => return self.explain(peer, admin, parameters(given)?),
            "Revoke" => {
                let revoke: proto::Revoke = parameters(given)?;
                let grace = revoke.grace.map(Millis);
                self.record(records::revoke_asked(peer, &revoke))?;
                self.service.give(Event::Revoke {
                    request,
                    selector: selector(revoke)?,
                    grace,
                })?;
            }
            "Drain" => return self.drain(request, peer, parameters(given)?),
            "Reload" => {
                self.reload()?
                    .map_err(|errors| Refusal::PolicyInvalid { errors })?;
                return Ok(Then::Answer(json!(proto::Nothing {})));
            }
            "OpenClaim" => {
                let opened = self.open_claim(&parameters(given)?)??;
                return Ok(Then::Answer(json!(opened)));
            }
            "EndClaim" => self.end_claim(request, &parameters(given)?)??,
            "Claims" => {
                let names = self.claims.iter().flat_map(|claims| claims.names());
                let claims = names.map(ToString::to_string).collect();
                return Ok(Then::Answer(json!(proto::ClaimList { claims })));
            }
            "Devices" => {
                let devices = self.device_list();
                let policy_errors = self.written.errors.clone();
                let list = proto::DeviceList {
                    devices,
                    policy_errors: Some(policy_errors).filter(|errors| !errors.is_empty()),
                };
                return Ok(Then::Answer(json!(list)));
            }
            "Token" => {
                let connection = self.connections.get(&id);
                let token = connection.map_or(0, |connection| connection.token);
                return Ok(Then::Answer(json!(proto::Secret {
                    token: format!("{token:032x}"),
                })));
            }
            "Resume" => {
                let resume: proto::Resume = parameters(given)?;
                // A text that is no secret is nobody's.
                let token = u128::from_str_radix(&resume.token, 16).unwrap_or(0);
                self.service.give(Event::Resume {
                    connection: id,
                    request,
                    token,
                })?;
            }
            "Adopt" => return self.adopt(peer, files, parameters(given)?),
            _ => {
                return Err(Failure::Varlink(
                    "MethodNotFound",
                    json!({"method": call.method}),
                ));
            }
        }
        Ok(Then::Later)
    }

    /// Remembers what a client asks for, for the record and how long it takes.
    fn asks(&mut self, id: ConnectionId, acquire: &proto::Acquire) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let ranges = acquire.ranges.as_ref();
            let length = |ranges: &Vec<proto::Range>| {
                ranges
                    .iter()
                    .fold(0, |sum: u64, range| sum.saturating_add(range.length))
            };
            connection.asked = Some(Asked {
                began: Instant::now(),
                pool: acquire.pool.clone(),
                device: acquire.device.clone(),
                bar: acquire.bar,
                size: acquire.size.or_else(|| ranges.map(length)),
            });
        }
    }

    fn is_at(&mut self, id: ConnectionId, busy: Busy) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.busy = Some(busy);
        }
    }

    fn drain(
        &mut self,
        request: RequestId,
        peer: &Peer,
        drain: proto::Drain,
    ) -> Result<Then, Failure> {
        let open = self.service.devices();
        let chosen: BTreeSet<_> = match &drain.device {
            None => open.into_iter().chain(self.closing.clone()).collect(),
            Some(name) => {
                let known = open.into_iter().chain(self.closing.clone());
                let found: BTreeSet<_> = known.filter(|one| **one == **name).collect();
                if found.is_empty() {
                    return Err(Refusal::NoSuchDevice {
                        device: name.clone(),
                    }
                    .into());
                }
                found
            }
        };
        if chosen.is_empty() {
            return Ok(Then::Answer(json!(proto::Nothing {})));
        }
        self.record(records::drain_asked(peer, &drain))?;
        self.drains.push((request, chosen.clone()));
        for name in chosen {
            if !self.closing.contains(&name) {
                self.let_go(&name, drain.grace)?;
            }
        }
        Ok(Then::Later)
    }

    /// Takes over a device that another process has open.
    fn adopt(
        &mut self,
        peer: &Peer,
        files: Vec<OwnedFd>,
        adopt: proto::Adopt,
    ) -> Result<Then, Failure> {
        let invalid = |reason: String| Failure::Refused(Refusal::Invalid { reason });
        let policy = self.service.core().policy();
        let wanted = policy
            .devices()
            .iter()
            .find(|device| *device.name == adopt.device)
            .cloned();
        let Some(wanted) = wanted else {
            return Err(Refusal::NoSuchDevice {
                device: adopt.device,
            }
            .into());
        };
        let name = &wanted.name;
        if self.service.device(name).is_some() || self.closing.contains(name) {
            return Err(invalid(format!("{name} is open already: drain it first")));
        }
        let place = usize::try_from(adopt.file_descriptor).unwrap_or(usize::MAX);
        let file = files
            .into_iter()
            .nth(place)
            .ok_or_else(|| invalid(format!("no descriptor {place} came with the call")))?;
        let device = barlease::Device::from_fd(file).and_then(Device::new);
        let device = device.map_err(|error| invalid(error.report().to_string()))?;
        find::is(&Pci::system(), &wanted, &device).map_err(|why| {
            let address = device.address();
            invalid(format!("{name} is another one than {address}: {why}"))
        })?;
        let owner = match (wanted.owner_dies, peer.process) {
            (OwnerDies::Keep, _) => None,
            (OwnerDies::Revoke, Some(process)) => Some(Owner {
                pid: peer.pid,
                process,
            }),
            (OwnerDies::Revoke, None) => {
                let reason = "the kernel does not say which process hands it over, and so \
                              its end cannot be noticed: say `owner-dies = \"keep\"`";
                return Err(invalid(reason.to_owned()));
            }
        };
        let listed = name.clone();
        self.take(name, device, owner)?.map_err(invalid)?;
        // Leases that it made before are nobody's here.
        self.service.list(listed)?;
        Ok(Then::Answer(json!(proto::Nothing {})))
    }
}

fn parameters<T: DeserializeOwned>(value: Value) -> Result<T, Failure> {
    let value = match value {
        Value::Null => json!({}),
        value => value,
    };
    serde_json::from_value(value).map_err(|error| {
        Failure::Refused(Refusal::Invalid {
            reason: error.to_string(),
        })
    })
}

/// The methods of each varlink service.
fn service(method: &str, given: Value) -> Result<Then, Failure> {
    #[derive(serde::Deserialize)]
    struct Wanted {
        interface: String,
    }
    match method {
        "GetInfo" => Ok(Then::Answer(json!({
            "vendor": "Barlease",
            "product": "barleased",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "",
            "interfaces": [VARLINK, INTERFACE],
        }))),
        "GetInterfaceDescription" => {
            let wanted: Wanted = parameters(given)?;
            if wanted.interface != INTERFACE {
                return Err(Failure::Varlink(
                    "InterfaceNotFound",
                    json!({"interface": wanted.interface}),
                ));
            }
            Ok(Then::Answer(json!({"description": IDL})))
        }
        _ => Err(Failure::Varlink(
            "MethodNotFound",
            json!({"method": format!("{VARLINK}.{method}")}),
        )),
    }
}

fn selector(revoke: proto::Revoke) -> Result<Selector, Refusal> {
    let all = revoke.all.unwrap_or(false).then_some(Selector::All);
    let mut given = [
        revoke.lease.map(|lease| Selector::Lease(LeaseId(lease))),
        revoke.uid.map(Selector::User),
        revoke.pid.map(Selector::Pid),
        revoke.unit.map(|unit| Selector::Unit(unit.into())),
        revoke.claim.map(|claim| Selector::Claim(claim.into())),
        revoke.pool.map(|pool| Selector::Pool(pool.into())),
        all,
    ]
    .into_iter()
    .flatten();
    match (given.next(), given.next()) {
        (Some(one), None) => Ok(one),
        _ => Err(Refusal::Invalid {
            reason: "say exactly one of lease, uid, pid, unit, claim, pool, all".to_owned(),
        }),
    }
}
