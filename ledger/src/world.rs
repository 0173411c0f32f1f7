//! A small world, in every order of what can happen in it: two clients, a pool of two units, a
//! kernel, and a daemon that is killed between any two of its actions.
//!
//! The properties:
//!
//! - a unit is in one living or draining buffer of the kernel at most;
//! - whoever has a lease keeps it, whatever happens to the daemon, until it does something that
//!   ends it;
//! - in each state in which the daemon has nothing to do, and after a restart in each other one:
//!   every living buffer is that of a lease whose holder is there, and a unit that the kernel does
//!   not use is free;
//! - after a restart, when the time to come back is over, nobody has what nobody came back for.
//!
//! Each [`Bug`] that is planted in the core must be found.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::Arc;

use stateright::Checker;
use stateright::Model;
use stateright::Property;

use crate::core::Action;
use crate::core::Buffer;
use crate::core::Bug;
use crate::core::Core;
use crate::core::Event;
use crate::core::Facts;
use crate::core::Found;
use crate::core::Reply;
use crate::core::RevokeAnswer;
use crate::core::State;
use crate::policy::NoNames;
use crate::policy::Policy;
use crate::record::Record;
use crate::types::Access;
use crate::types::Ask;
use crate::types::BufferId;
use crate::types::ConnectionId;
use crate::types::LeaseId;
use crate::types::Lifetime;
use crate::types::MemoryType;
use crate::types::Millis;
use crate::types::Peer;
use crate::types::ProcessId;
use crate::types::Range;
use crate::types::RequestId;
use crate::types::Time;
use crate::types::What;

const UNIT: u64 = 4096;
const RESUME: Millis = Millis(10);
const CARD: &str = "card";

/// A holder of a reference to a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Has {
    /// The daemon, until it has sent it.
    Daemon,
    /// A daemon that was killed: its descriptors are closed some time.
    DeadDaemon,
    Client(usize),
    Importer,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct KernelBuffer {
    ranges: Vec<Range>,
    dead: bool,
    /// An importer has not let go.
    draining: bool,
    refs: Vec<Has>,
    /// The client that has it rightly: it was answered, and did nothing that ends it.
    rightly: Option<usize>,
}

impl KernelBuffer {
    fn reaches(&self, unit: u64) -> bool {
        let unit = Range {
            offset: unit * UNIT,
            length: UNIT,
        };
        (!self.dead || self.draining) && self.ranges.iter().any(|range| range.overlaps(&unit))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Client {
    alive: bool,
    connection: Option<ConnectionId>,
    asks: u8,
    /// How often it may yet come back.
    comes_back: u8,
    lease: Option<LeaseId>,
    /// Its request that has no answer: the how manieth of all.
    asking: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    time: u64,
    core: Option<Core>,
    /// Actions that the daemon has still to carry out.
    pending: VecDeque<Action>,
    answer: Option<Event>,
    ledger: File,
    kernel: BTreeMap<BufferId, KernelBuffer>,
    buffers: u64,
    clients: Vec<Client>,
    connections: u64,
    /// Requests so far.
    asked: u8,
    kills: u8,
    /// Whether the daemon ends the old records before it writes new ones behind them.
    gap: bool,
    /// A second answer to one request, or an answer to nobody.
    wrong: bool,
}

/// The ledger's file: records, and gaps that end them for whoever reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct File {
    entries: Vec<Option<Record>>,
    /// Where the header says that they begin.
    start: usize,
    /// The writes that are still to come of what the daemon is at.
    writes: VecDeque<Write>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Write {
    Entry(Option<Record>),
    Header(usize),
}

impl File {
    fn compact(&mut self, records: Vec<Record>, gap: bool) {
        if gap {
            self.writes.push_back(Write::Entry(None));
        }
        let start = self.entries.len() + self.writes.len();
        let entries = records.into_iter().map(|record| Write::Entry(Some(record)));
        self.writes.extend(entries);
        self.writes.push_back(Write::Header(start));
    }

    fn write(&mut self) {
        match self.writes.pop_front() {
            Some(Write::Entry(entry)) => self.entries.push(entry),
            Some(Write::Header(start)) => {
                // The space before is given back.
                self.entries.drain(..start);
                self.start = 0;
            }
            None => {}
        }
    }

    /// The records that the next daemon reads; it cuts off the rest.
    fn read(&mut self) -> Vec<Record> {
        let records: Vec<_> = self.entries[self.start..]
            .iter()
            .cloned()
            .map_while(|r| r)
            .collect();
        self.entries.truncate(self.start + records.len());
        records
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Carry,
    Answer,
    Ask(usize),
    Release(usize),
    HangUp(usize),
    Die(usize),
    /// The client closes its descriptor.
    Drop(usize),
    Import(BufferId),
    LetGo(BufferId),
    /// The kernel closes the descriptors of the daemon that was killed.
    Exit,
    List,
    Timer,
    Kill,
    Restart,
    Resume(usize),
}

/// A request of a client.
#[derive(Clone, Copy, Debug)]
struct Wish {
    units: u64,
    /// The unit that it must be.
    named: Option<u64>,
    lifetime: Lifetime,
    wait: Millis,
}

struct Setting {
    wishes: Vec<Wish>,
    /// How often each asks.
    asks: Vec<u8>,
    /// Whether devices attach what clients have.
    importers: bool,
    kills: u8,
    bug: Option<Bug>,
    compacts_often: bool,
    policy: Arc<Policy>,
}

fn policy() -> Arc<Policy> {
    let text = r#"
        [device.card]
        match = "0000:01:00.0"
        [pool.rows]
        device = "card"
        bar = 0
        unit = 4096
        contents = "memory"
        [[allow]]
        pools = ["rows"]
        who = { user = "*" }
        access = "read-write"
        lifetime = ["connection", "process"]
        queue = "1h"
        max-leases = 2
    "#;
    Arc::new(Policy::parse(&[("p", text)], &NoNames).unwrap())
}

fn facts() -> Facts {
    Facts {
        bars: [2 * UNIT, 0, 0, 0, 0, 0],
        reserved: Vec::new(),
    }
}

fn peer(client: usize) -> Peer {
    Peer {
        uid: client as u32,
        gid: 0,
        groups: [].into(),
        pid: client as u32,
        process: Some(ProcessId(client as u64)),
        cgroup: None,
        cgroup_path: "".into(),
        unit: "".into(),
        claim: None,
    }
}

fn token(client: usize) -> u128 {
    client as u128 + 1
}

/// Requests are named after the connection, which asks once at a time.
fn request(connection: ConnectionId) -> RequestId {
    RequestId(connection.0)
}

impl Setting {
    fn new(wishes: Vec<Wish>, asks: u8, kills: u8, bug: Option<Bug>) -> Self {
        Self {
            asks: vec![asks; wishes.len()],
            importers: true,
            wishes,
            kills,
            bug,
            compacts_often: false,
            policy: policy(),
        }
    }

    fn core(&self, time: u64) -> Core {
        let mut core = Core::new(self.policy.clone(), Time(time));
        core.plant(self.bug);
        if self.compacts_often {
            core.compact_often();
        }
        core
    }

    fn start(&self) -> World {
        let mut world = World {
            time: 1,
            core: Some(self.core(1)),
            pending: VecDeque::new(),
            answer: None,
            ledger: File::default(),
            gap: self.bug != Some(Bug::NoGap),
            kernel: BTreeMap::new(),
            buffers: 0,
            clients: self
                .asks
                .iter()
                .map(|asks| Client {
                    alive: true,
                    connection: None,
                    asks: *asks,
                    comes_back: self.kills,
                    lease: None,
                    asking: None,
                })
                .collect(),
            connections: 0,
            asked: 0,
            kills: self.kills,
            wrong: false,
        };
        world.give(Event::DeviceOpened {
            device: CARD.into(),
            facts: facts(),
        });
        for client in 0..world.clients.len() {
            world.connect(client);
        }
        world.carry_all();
        world
    }

    fn restart(&self, world: &mut World) {
        let found = Found {
            device: CARD.into(),
            facts: facts(),
            buffers: world.list(),
        };
        let ledger = world.ledger.read();
        let (core, actions) = self.core(world.time).go_on(ledger, vec![found], RESUME);
        world.core = Some(core);
        world.pending = actions.into();
    }
}

impl World {
    fn idle(&self) -> bool {
        let writes = &self.ledger.writes;
        self.core.is_some() && self.pending.is_empty() && self.answer.is_none() && writes.is_empty()
    }

    fn give(&mut self, event: Event) {
        if let Some(core) = &mut self.core {
            self.pending.extend(core.handle(Time(self.time), event));
        }
    }

    fn connect(&mut self, client: usize) {
        self.connections += 1;
        let connection = ConnectionId(self.connections);
        self.clients[client].connection = Some(connection);
        let event = Event::Connected {
            connection,
            peer: peer(client),
            token: token(client),
            administrator: false,
        };
        self.give(event);
    }

    fn list(&self) -> Vec<Buffer> {
        let record = |(id, buffer): (&BufferId, &KernelBuffer)| Buffer {
            id: *id,
            bar: 0,
            size: buffer.ranges.iter().map(|range| range.length).sum(),
            nr_ranges: buffer.ranges.len() as u32,
            dead: buffer.dead,
            draining: buffer.draining,
            reasons: 0,
            internal: false,
        };
        self.kernel.iter().map(record).collect()
    }

    fn drop_refs(&mut self, gone: impl Fn(BufferId, Has) -> bool) {
        for (id, buffer) in &mut self.kernel {
            buffer.refs.retain(|has| !gone(*id, *has));
        }
        self.kernel.retain(|_, buffer| !buffer.refs.is_empty());
    }

    fn no_longer_rightly(&mut self, client: usize, lifetime: Option<Lifetime>, wish: Lifetime) {
        if lifetime.is_none_or(|lifetime| lifetime == wish) {
            for buffer in self.kernel.values_mut() {
                if buffer.rightly == Some(client) {
                    buffer.rightly = None;
                }
            }
        }
    }

    fn of_connection(&self, request: RequestId) -> Option<usize> {
        self.clients
            .iter()
            .position(|client| client.connection.map(self::request) == Some(request))
    }

    fn carry_all(&mut self) {
        while self.core.is_some() && !self.idle() {
            match self.answer.take() {
                Some(event) => self.give(event),
                None => self.carry(),
            }
        }
    }

    /// Carries out one action, or a part of one that another kill can come between.
    fn carry(&mut self) {
        if !self.ledger.writes.is_empty() {
            return self.ledger.write();
        }
        let Some(action) = self.pending.pop_front() else {
            return;
        };
        match action {
            Action::Append(record) => self.ledger.entries.push(Some(record)),
            Action::Compact(records) => self.ledger.compact(records, self.gap),
            Action::Export(export) => {
                self.buffers += 1;
                let id = BufferId(self.buffers);
                let buffer = KernelBuffer {
                    ranges: export.ranges.as_slice().to_vec(),
                    dead: false,
                    draining: false,
                    refs: vec![Has::Daemon],
                    rightly: None,
                };
                self.kernel.insert(id, buffer);
                self.answer = Some(Event::Exported {
                    lease: export.lease,
                    result: Ok(id),
                });
            }
            Action::Revoke { buffer: id, .. } => {
                let answer = match self.kernel.get_mut(&id) {
                    None => RevokeAnswer::Unknown,
                    Some(buffer) if buffer.dead => RevokeAnswer::Before,
                    Some(buffer) => {
                        buffer.dead = true;
                        buffer.draining = buffer.refs.contains(&Has::Importer);
                        if buffer.draining {
                            RevokeAnswer::InProgress
                        } else {
                            RevokeAnswer::Done
                        }
                    }
                };
                self.answer = Some(Event::Revoked { buffer: id, answer });
            }
            Action::List(device) => {
                self.answer = Some(Event::Listed {
                    device,
                    buffers: self.list(),
                });
            }
            Action::Reply {
                request,
                reply: Reply::Granted(grant),
            } => {
                let client = self
                    .of_connection(request)
                    .filter(|client| self.clients[*client].alive);
                match client {
                    Some(client) => {
                        self.wrong |= self.overtakes(client);
                        self.clients[client].asking = None;
                        if let Some(buffer) = self.kernel.get_mut(&grant.buffer) {
                            buffer.refs.push(Has::Client(client));
                            buffer.rightly = Some(client);
                        } else {
                            self.wrong = true;
                        }
                        self.clients[client].lease = Some(grant.lease);
                    }
                    None => self.answer = Some(Event::Undelivered(grant.lease)),
                }
                self.drop_refs(|id, has| id == grant.buffer && has == Has::Daemon);
            }
            Action::WatchProcess(process) if !self.clients[process.0 as usize].alive => {
                self.answer = Some(Event::ProcessGone(process));
            }
            Action::Refuse { request, .. } => {
                if let Some(client) = self.of_connection(request) {
                    self.clients[client].asking = None;
                }
                // The daemon closes what it has not sent.
                if self.pending.is_empty() {
                    self.drop_refs(|_, has| has == Has::Daemon);
                }
            }
            _ => {}
        }
    }

    /// Whether a client is served before one that has asked earlier, for any units, and could be
    /// served if others gave back what they have.
    fn overtakes(&self, client: usize) -> bool {
        let Some(core) = &self.core else {
            return false;
        };
        let of = |peer: &Peer| peer.uid as usize;
        core.waiters().any(|waiter| {
            let other = of(waiter.peer);
            let has = core.leases().any(|lease| of(lease.peer) == other);
            let earlier = self.clients[other].asking < self.clients[client].asking;
            matches!(waiter.ask.what, What::Pool { .. }) && !has && earlier
        })
    }

    /// Whether somebody waits for one unit while one is free, without need: nobody before it has
    /// named that unit, or wants any, without having something already.
    fn waits_in_vain(&self) -> bool {
        let Some(core) = &self.core else {
            return false;
        };
        let taken = |unit: u64| {
            let unit_range = Range {
                offset: unit * UNIT,
                length: UNIT,
            };
            let overlaps = |range: &Range| range.overlaps(&unit_range);
            let leased = core.leases().any(|lease| lease.ranges.iter().any(overlaps));
            leased || self.kernel.values().any(|buffer| buffer.reaches(unit))
        };
        let has = |peer: &Peer| core.leases().any(|lease| lease.peer.uid == peer.uid);
        let mut before: Vec<crate::core::WaiterView<'_>> = Vec::new();
        for waiter in core.waiters() {
            let one = matches!(
                waiter.ask.what,
                What::Pool {
                    size: Some(UNIT),
                    ..
                }
            );
            let needed = before.iter().any(|earlier| !has(earlier.peer));
            if one && !needed && (0..2).any(|unit| !taken(unit)) {
                return true;
            }
            before.push(waiter);
        }
        false
    }

    /// The world after the daemon has done all that it has to, and asked LIST.
    fn settled(&self) -> Self {
        let mut world = self.clone();
        world.carry_all();
        for client in 0..world.clients.len() {
            if !world.clients[client].alive {
                if let Some(connection) = world.clients[client].connection.take() {
                    world.give(Event::PeerGone(connection));
                }
                world.give(Event::ProcessGone(ProcessId(client as u64)));
                world.carry_all();
            }
        }
        // Twice: what the first one revokes may be gone in the second.
        for _ in 0..2 {
            let event = Event::Listed {
                device: CARD.into(),
                buffers: world.list(),
            };
            world.give(event);
            world.carry_all();
        }
        world
    }

    /// Core and kernel agree.
    fn agree(&self, wishes: &[Wish]) -> bool {
        let Some(core) = &self.core else {
            return false;
        };
        let mut used = 0;
        for (id, buffer) in &self.kernel {
            let lease = core.leases().find(|lease| match *lease.state {
                State::Granted { buffer, .. } | State::Reclaiming { buffer, .. } => buffer == *id,
                State::Revoking { buffer, .. } => buffer == Some(*id),
                _ => false,
            });
            if !buffer.dead {
                // A lease, granted, whose holder is there or may come back.
                let Some(lease) = lease else {
                    return false;
                };
                let client = lease.peer.uid as usize;
                let may_come_back = match *lease.state {
                    State::Granted { resume_by, .. } => resume_by != Time::NEVER,
                    _ => return false,
                };
                let there = match wishes[client].lifetime {
                    Lifetime::Connection => {
                        self.clients[client].connection.is_some() || may_come_back
                    }
                    _ => self.clients[client].alive,
                };
                if !there || lease.ranges != buffer.ranges {
                    return false;
                }
            }
        }
        for unit in 0..2 {
            let reached = self.kernel.values().any(|buffer| buffer.reaches(unit));
            used += u64::from(reached || self.is_held(core, unit));
        }
        core.room("rows") == Some(((2 - used) * UNIT, 2 * UNIT))
    }

    /// Whether a lease whose export was cut short keeps the unit, for a buffer of its shape that
    /// nobody knows: LIST does not say which of several such leases it is of.
    fn is_held(&self, core: &Core, unit: u64) -> bool {
        let unit = Range {
            offset: unit * UNIT,
            length: UNIT,
        };
        let unknown = |id: &BufferId, buffer: &KernelBuffer| {
            let ours = core.leases().any(|lease| match *lease.state {
                State::Revoking { buffer, .. } => buffer == Some(*id),
                State::Granted { buffer, .. } | State::Reclaiming { buffer, .. } => buffer == *id,
                _ => false,
            });
            !ours && (!buffer.dead || buffer.draining)
        };
        let size = |ranges: &[Range]| ranges.iter().map(|range| range.length).sum::<u64>();
        core.leases().any(|lease| {
            matches!(lease.state, State::Revoking { buffer: None, .. })
                && lease.ranges.iter().any(|range| range.overlaps(&unit))
                && self.kernel.iter().any(|(id, buffer)| {
                    unknown(id, buffer)
                        && size(&buffer.ranges) == size(lease.ranges)
                        && buffer.ranges.len() == lease.ranges.len()
                })
        })
    }

    fn restarted(&self, setting: &Setting) -> Self {
        let mut world = self.clone();
        world.kill();
        setting.restart(&mut world);
        world.settled()
    }

    fn kill(&mut self) {
        self.core = None;
        self.pending.clear();
        self.ledger.writes.clear();
        self.answer = None;
        for buffer in self.kernel.values_mut() {
            for has in &mut buffer.refs {
                if *has == Has::Daemon {
                    *has = Has::DeadDaemon;
                }
            }
        }
        for client in &mut self.clients {
            client.connection = None;
            client.asking = None;
        }
    }
}

impl Model for Setting {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.start()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.answer.is_some() {
            steps.push(Step::Answer);
        } else if !world.pending.is_empty() || !world.ledger.writes.is_empty() {
            steps.push(Step::Carry);
        }
        if world.core.is_none() {
            steps.push(Step::Restart);
        } else if world.kills > 0 {
            steps.push(Step::Kill);
        }
        for (id, buffer) in &world.kernel {
            // A buffer of a killed daemon may have gone to an importer by another way.
            let held = buffer
                .refs
                .iter()
                .any(|has| matches!(has, Has::Client(_) | Has::DeadDaemon));
            if self.importers && held && !buffer.dead && !buffer.refs.contains(&Has::Importer) {
                steps.push(Step::Import(*id));
            }
            if buffer.refs.contains(&Has::Importer) {
                steps.push(Step::LetGo(*id));
            }
        }
        if world
            .kernel
            .values()
            .any(|buffer| buffer.refs.contains(&Has::DeadDaemon))
        {
            steps.push(Step::Exit);
        }
        for (number, client) in world.clients.iter().enumerate() {
            if !client.alive {
                // The daemon finds out.
                if world.idle() && client.connection.is_some() {
                    steps.push(Step::HangUp(number));
                }
                continue;
            }
            steps.push(Step::Die(number));
            let has = |buffer: &KernelBuffer| buffer.refs.contains(&Has::Client(number));
            if world.kernel.values().any(has) {
                steps.push(Step::Drop(number));
            }
            if !world.idle() {
                continue;
            }
            match client.connection {
                Some(_) => {
                    steps.push(Step::HangUp(number));
                    if client.asks > 0 && client.asking.is_none() {
                        steps.push(Step::Ask(number));
                    }
                    if client.lease.is_some() {
                        steps.push(Step::Release(number));
                    }
                }
                None if client.comes_back > 0 => steps.push(Step::Resume(number)),
                None => {}
            }
        }
        if world.idle() {
            steps.push(Step::List);
            steps.push(Step::Timer);
        }
    }

    fn next_state(&self, last: &World, step: Step) -> Option<World> {
        let mut world = last.clone();
        match step {
            Step::Carry => world.carry(),
            Step::Answer => {
                let event = world.answer.take()?;
                world.give(event);
            }
            Step::Ask(client) => {
                let wish = self.wishes[client];
                let connection = world.clients[client].connection?;
                world.clients[client].asks -= 1;
                world.asked += 1;
                world.clients[client].asking = Some(world.asked);
                let what = match wish.named {
                    None => What::Pool {
                        pool: "rows".into(),
                        size: Some(wish.units * UNIT),
                    },
                    Some(unit) => What::Ranges {
                        device: CARD.into(),
                        bar: 0,
                        ranges: vec![Range {
                            offset: unit * UNIT,
                            length: UNIT,
                        }],
                    },
                };
                let ask = Ask {
                    what,
                    access: Access::ReadWrite,
                    memory_type: MemoryType::Uncached,
                    tph: None,
                    lifetime: wish.lifetime,
                    ttl: None,
                    wait: wish.wait,
                };
                world.give(Event::Acquire {
                    connection,
                    request: request(connection),
                    ask,
                });
            }
            Step::Release(client) => {
                let lease = world.clients[client].lease.take()?;
                let connection = world.clients[client].connection?;
                let wish = self.wishes[client].lifetime;
                world.no_longer_rightly(client, None, wish);
                world.give(Event::Release {
                    connection,
                    request: request(connection),
                    lease,
                });
            }
            Step::HangUp(client) => {
                let connection = world.clients[client].connection.take()?;
                world.clients[client].asking = None;
                let wish = self.wishes[client].lifetime;
                world.no_longer_rightly(client, Some(Lifetime::Connection), wish);
                world.give(Event::PeerGone(connection));
                if !world.clients[client].alive {
                    world.give(Event::ProcessGone(ProcessId(client as u64)));
                }
            }
            Step::Die(client) => {
                world.clients[client].alive = false;
                let wish = self.wishes[client].lifetime;
                world.no_longer_rightly(client, None, wish);
                world.drop_refs(|_, has| has == Has::Client(client));
            }
            Step::Drop(client) => {
                let wish = self.wishes[client].lifetime;
                world.no_longer_rightly(client, None, wish);
                world.drop_refs(|_, has| has == Has::Client(client));
            }
            Step::Import(id) => world.kernel.get_mut(&id)?.refs.push(Has::Importer),
            Step::LetGo(id) => {
                world.kernel.get_mut(&id)?.draining = false;
                world.drop_refs(|buffer, has| buffer == id && has == Has::Importer);
            }
            Step::Exit => world.drop_refs(|_, has| has == Has::DeadDaemon),
            Step::List => {
                let event = Event::Listed {
                    device: CARD.into(),
                    buffers: world.list(),
                };
                world.give(event);
            }
            Step::Timer => {
                // A client that has not come back by now is late.
                let late = world.time + RESUME.0;
                world.time = late;
                for client in 0..self.wishes.len() {
                    if world.clients[client].connection.is_none() {
                        let wish = self.wishes[client].lifetime;
                        world.no_longer_rightly(client, Some(Lifetime::Connection), wish);
                    }
                }
                let before = last.core.as_ref()?;
                world.give(Event::Tick);
                if world.pending.is_empty() && Some(before) != world.core.as_ref() {
                    // Nothing was due: time alone makes no new state.
                    return None;
                }
            }
            Step::Kill => {
                world.kills -= 1;
                world.kill();
            }
            Step::Restart => self.restart(&mut world),
            Step::Resume(client) => {
                world.clients[client].comes_back -= 1;
                world.connect(client);
                let connection = world.clients[client].connection?;
                let token = token(client);
                world.give(Event::Resume {
                    connection,
                    request: request(connection),
                    token,
                });
            }
        }
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a unit is in one buffer at most", |_, world: &World| {
                let reaching = |unit| {
                    let buffers = world.kernel.values();
                    buffers.filter(|buffer| buffer.reaches(unit)).count()
                };
                (0..2).all(|unit| reaching(unit) <= 1)
            }),
            Property::always(
                "whoever has a lease keeps it",
                |setting: &Self, world: &World| {
                    let kept = |world: &World| {
                        let mut buffers = world.kernel.values();
                        buffers.all(|buffer| buffer.rightly.is_none() || !buffer.dead)
                    };
                    !world.wrong && kept(world) && kept(&world.restarted(setting))
                },
            ),
            Property::always("nobody waits in vain", |_, world: &World| {
                !world.idle() || !world.waits_in_vain()
            }),
            Property::always("core and kernel agree", |setting: &Self, world: &World| {
                !world.idle() || world.settled().agree(&setting.wishes)
            }),
            Property::always(
                "they agree after a restart",
                |setting: &Self, world: &World| world.restarted(setting).agree(&setting.wishes),
            ),
            Property::always(
                "who does not come back has nothing",
                |setting: &Self, world: &World| {
                    let mut late = world.restarted(setting);
                    late.time += RESUME.0;
                    late.give(Event::Tick);
                    let late = late.settled();
                    let living = late.kernel.values().filter(|buffer| !buffer.dead);
                    late.agree(&setting.wishes)
                        && living
                            .flat_map(|buffer| buffer.refs.iter())
                            .all(|has| match has {
                                Has::Client(client) => {
                                    setting.wishes[*client].lifetime == Lifetime::Process
                                }
                                _ => true,
                            })
                },
            ),
            // So that what is checked is not an empty world.
            Property::sometimes(BOTH, |_, world: &World| {
                let has = |client| world.kernel.values().any(|b| b.rightly == Some(client));
                has(0) && has(1)
            }),
            Property::sometimes(STRAY, |_, world: &World| {
                world.core.is_none()
                    && world.kernel.keys().any(|id| {
                        let granted = |record: &Record| {
                            matches!(record, Record::Granted { buffer, .. } if buffer == id)
                        };
                        !world.ledger.entries.iter().flatten().any(granted)
                    })
            }),
        ]
    }
}

fn wish(units: u64, lifetime: Lifetime, wait: u64) -> Wish {
    Wish {
        units,
        named: None,
        lifetime,
        wait: Millis(wait),
    }
}

/// A client asks for the unit that it has, or for two units and more, and another for one or two.
fn in_line(named: Option<u64>, units: u64, bug: Option<Bug>) -> Setting {
    let one = Wish {
        named,
        ..wish(1, Lifetime::Connection, 1000)
    };
    let wishes = vec![one, wish(units, Lifetime::Connection, 1000)];
    Setting {
        asks: vec![2, 1],
        importers: false,
        ..Setting::new(wishes, 0, 0, bug)
    }
}

#[test]
fn a_request_that_its_own_lease_is_in_the_way_of_holds_nobody_up() {
    passes("aside", in_line(Some(0), 1, None), &[BOTH]);
}

#[test]
fn nobody_overtakes_whoever_wants_more() {
    passes("in order", in_line(None, 2, None), &[]);
}

fn check(setting: Setting) -> impl Checker<Setting> {
    setting.checker().threads(2).spawn_bfs().join()
}

/// Properties that show that the world is not empty.
const SOMETIMES: [&str; 2] = [BOTH, STRAY];
const BOTH: &str = "both have a lease";
const STRAY: &str = "a restart meets a buffer that nobody knows";

/// Without kills that the world goes on after, a restart is still looked at in each state.
fn passes(name: &str, setting: Setting, met: &[&'static str]) {
    let checker = check(setting);
    println!("{name}: {} states", checker.unique_state_count());
    for (property, path) in checker.discoveries() {
        let expected = SOMETIMES.contains(&property);
        assert!(expected, "{property}:\n{:#?}", path.into_actions());
    }
    for property in met {
        assert!(checker.discovery(property).is_some(), "{property}: never");
    }
}

#[test]
fn one_unit_each() {
    let one = wish(1, Lifetime::Connection, 0);
    let other = wish(1, Lifetime::Process, 0);
    // Kills that two clients go on after make millions of states: minutes.
    let kills = std::env::var("BARLEASE_WORLD_KILLS").map_or(0, |kills| kills.parse().unwrap());
    let setting = Setting::new(vec![one, other], 1, kills, None);
    passes("one unit each", setting, &[BOTH]);
}

#[test]
fn the_second_waits_for_all_of_it() {
    let one = wish(1, Lifetime::Process, 0);
    let other = wish(2, Lifetime::Connection, 1000);
    let setting = Setting::new(vec![one, other], 1, 0, None);
    passes("the second waits", setting, &[]);
}

#[test]
fn killed_and_killed_again() {
    let wishes = vec![wish(2, Lifetime::Connection, 0)];
    passes("killed twice", Setting::new(wishes, 2, 1, None), &[STRAY]);
}

/// A kill comes between any two records of those that take the place of all others.
fn compacted(bug: Option<Bug>) -> Setting {
    Setting {
        compacts_often: true,
        ..Setting::new(vec![wish(1, Lifetime::Connection, 0)], 2, 0, bug)
    }
}

#[test]
fn killed_while_the_ledger_is_compacted() {
    passes("compacted", compacted(None), &[]);
    for bug in [Bug::NoGap, Bug::StaysRecorded] {
        let found = check(compacted(Some(bug))).discoveries();
        let found: Vec<_> = found
            .into_keys()
            .filter(|n| !SOMETIMES.contains(n))
            .collect();
        println!("{bug:?}: {found:?}");
        assert!(!found.is_empty(), "{bug:?} is not found");
    }
}

#[test]
fn every_planted_bug_of_the_line_is_found() {
    for (bug, setting) in [
        (Bug::NeverAside, in_line(Some(0), 1, Some(Bug::NeverAside))),
        (Bug::Overtakes, in_line(None, 2, Some(Bug::Overtakes))),
    ] {
        let checker = setting
            .checker()
            .threads(2)
            .finish_when(stateright::HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let found: Vec<_> = checker
            .discoveries()
            .into_keys()
            .filter(|name| !SOMETIMES.contains(name))
            .collect();
        println!("{bug:?}: {found:?}");
        assert!(!found.is_empty(), "{bug:?} is not found");
    }
}

#[test]
fn every_planted_bug_is_found() {
    let bugs = [
        Bug::FreeBeforeDrained,
        Bug::AnswerBeforeRecord,
        Bug::KeepStrays,
        Bug::ForgetHeld,
        Bug::OrphansForEver,
        Bug::KeepGone,
        Bug::EmptyMap,
        Bug::ForgetPeer,
    ];
    for bug in bugs {
        let one = wish(1, Lifetime::Connection, 0);
        let other = wish(2, Lifetime::Process, 0);
        // A killed daemon is needed for an importer that has what nobody knows.
        let kills = u8::from(bug == Bug::ForgetHeld);
        let checker = Setting::new(vec![one, other], 1, kills, Some(bug))
            .checker()
            .threads(2)
            .finish_when(stateright::HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let found = checker.discoveries();
        let names: Vec<_> = found
            .keys()
            .filter(|name| !SOMETIMES.contains(*name))
            .collect();
        println!(
            "{bug:?}: {names:?}, {} states",
            checker.unique_state_count()
        );
        assert!(!names.is_empty(), "{bug:?} is not found");
    }
}
