//! Steps that can be made, drawn from a seed.

use std::collections::BTreeMap;

use barlease_abi::{TPH_ST, TPH_ST_EXT};
use fastrand::Rng;

use crate::{
    HUGE, Kind, LowPower, MAIN, NoBuffer, Op, Oracle, PAGE, Protection, Severity, Spoil, State,
    Step, TRANSFER, WrongMap,
};

/// Most of what there may be at a time.
const MOST_BUFFERS: usize = 16;
const MOST_MAPPINGS: usize = 28;
const MOST_ATTACHMENTS: usize = 6;
const MOST_PROCESSES: usize = 4;
const MOST_BARS: usize = 2;

/// How many pages of a BAR leases are made of mostly, so that they overlap.
const CROWDED: u64 = 48;

/// Draws steps.
#[derive(Clone, Debug)]
pub struct Generator {
    rng: Rng,
    /// How often each operation was drawn.
    drawn: BTreeMap<Kind, u64>,
    /// Whether the system can pretend to sleep.
    can_sleep: bool,
}

impl Generator {
    /// The same steps for the same seed, if the same comes of them.
    #[must_use]
    pub fn new(seed: u64, can_sleep: bool) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            drawn: BTreeMap::new(),
            can_sleep,
        }
    }

    /// A step that can be made.
    pub fn draw(&mut self, oracle: &Oracle) -> Step {
        let mut possible: Vec<Op> = Kind::ALL
            .iter()
            .filter_map(|&kind| self.candidate(kind, oracle))
            .collect();
        // The operation that was done least, now and then: nothing is left out for long.
        let mend = self.mend(oracle).filter(|_| self.rng.u8(..) < 48);
        // Few devices have these, and most of the time nobody would notice.
        let rare = match self.rng.u8(..) {
            0..16 => Some(Kind::Error),
            16..22 => Some(Kind::Pull),
            _ => None,
        };
        let meets = |op: &Op| Some(op.kind()) == rare && !oracle.mappings_taken_by(op).is_empty();
        let rare = possible.iter().position(meets);
        let op = if let Some(op) = mend {
            op
        } else if let Some(index) = rare {
            possible.swap_remove(index)
        } else if self.rng.u8(..) < 40 {
            let drawn =
                |op: &Op| self.drawn.get(&op.kind()).copied().unwrap_or(0) * cost(op.kind());
            let least = possible.iter().enumerate().min_by_key(|(_, op)| drawn(op));
            let (index, _) = least.expect("a step that can be made");
            possible.swap_remove(index)
        } else {
            let total: u32 = possible.iter().map(|op| weight(op.kind())).sum();
            let mut left = self.rng.u32(..total);
            let index = possible.iter().position(|op| {
                let weight = weight(op.kind());
                let this = left < weight;
                left = left.saturating_sub(weight);
                this
            });
            possible.swap_remove(index.expect("weights add up"))
        };
        *self.drawn.entry(op.kind()).or_default() += 1;
        let fire = can_be_under_fire(op.kind()) && !oracle.mappings.is_empty();
        Step {
            under_fire: fire && self.rng.u8(..) < 80,
            op,
        }
    }

    /// A step towards a device that can be used: else most of them would mostly be off.
    fn mend(&mut self, oracle: &Oracle) -> Option<Op> {
        let all = 0..oracle.devices.len();
        let gone = self.pick(all.filter(|&device| oracle.devices[device].gone));
        if let Some(device) = gone.filter(|_| self.rng.bool()) {
            let this = &oracle.devices[device];
            let bar = oracle.bar_mappings(device).first().copied();
            let op = match bar {
                _ if !this.open => Op::Plug { device },
                _ if this.fd => Op::Close { device },
                Some(mapping) => Op::Unmap { mapping },
                None => return None,
            };
            return self.is_fair(&op, oracle).then_some(op);
        }
        let device = self.open_device(oracle)?;
        let this = &oracle.devices[device];
        if this.low != LowPower::No {
            Some(Op::LeaveLowPower { device })
        } else if this.power != 0 {
            Some(Op::Power { device, state: 0 })
        } else if !this.memory {
            Some(Op::Memory {
                device,
                on: true,
                long: false,
            })
        } else {
            None
        }
    }

    fn pick<T: Copy>(&mut self, from: impl IntoIterator<Item = T>) -> Option<T> {
        let from: Vec<T> = from.into_iter().collect();
        self.rng.choice(from.iter().copied())
    }

    fn open_device(&mut self, oracle: &Oracle) -> Option<usize> {
        let all = 0..oracle.devices.len();
        self.pick(all.filter(|&device| oracle.is_usable(device)))
    }

    /// A device that we have an fd of; it may have been pulled out.
    fn device_with_fd(&mut self, oracle: &Oracle) -> Option<usize> {
        let all = 0..oracle.devices.len();
        self.pick(all.filter(|&device| oracle.devices[device].fd))
    }

    /// An open device to reset: as often as not one that is not as it usually is.
    fn device_to_reset(&mut self, oracle: &Oracle) -> Option<usize> {
        let all = 0..oracle.devices.len();
        let unusual = all.filter(|&number| oracle.is_usable(number) && oracle.reasons(number) != 0);
        let unusual: Vec<_> = unusual.collect();
        if unusual.is_empty() || self.rng.bool() {
            return self.open_device(oracle);
        }
        self.pick(unusual)
    }

    /// An open device to put to sleep; now and then one that sleeps.
    fn device_to_sleep(&mut self, oracle: &Oracle) -> Option<usize> {
        let all = 0..oracle.devices.len();
        let sleeps = |&number: &usize| {
            oracle.is_usable(number) && oracle.devices[number].low != LowPower::No
        };
        let asleep = self.pick(all.filter(sleeps));
        if asleep.is_none() || self.rng.u8(..) < 200 {
            return self.open_device(oracle);
        }
        asleep
    }

    /// One of these, mostly one that `is_good`.
    fn prefer(&mut self, from: Vec<usize>, is_good: impl Fn(usize) -> bool) -> Option<usize> {
        let good: Vec<_> = from.iter().copied().filter(|&item| is_good(item)).collect();
        if good.is_empty() || self.rng.u8(..) < 40 {
            self.pick(from)
        } else {
            self.pick(good)
        }
    }

    /// A buffer that this process has an fd of, mostly one that lives.
    fn buffer(&mut self, oracle: &Oracle) -> Option<usize> {
        let all = oracle.buffers.iter();
        let ours = all.filter(|(_, b)| b.holders.contains(&MAIN));
        let ours = ours.map(|(&number, _)| number).collect();
        self.prefer(ours, |number| oracle.state(number) != State::Dead)
    }

    /// A device and a buffer, mostly its own.
    fn device_and_buffer(&mut self, oracle: &Oracle) -> Option<(usize, usize)> {
        let buffer = self.buffer(oracle)?;
        let own = oracle.buffers[&buffer].device;
        let device = if self.rng.u8(..) < 24 || !oracle.devices[own].fd {
            self.open_device(oracle)?
        } else {
            own
        };
        Some((device, buffer))
    }

    /// A mapping, mostly one that can be touched.
    fn mapping(&mut self, oracle: &Oracle) -> Option<usize> {
        let all = oracle.mappings.keys().copied().collect();
        self.prefer(all, |number| oracle.is_accessible(number))
    }

    /// An attachment, mostly to a buffer that is accessible.
    fn attachment(&mut self, oracle: &Oracle) -> Option<usize> {
        let all = oracle.attachments.keys().copied().collect();
        let buffer = |number| oracle.attachments[&number].buffer;
        self.prefer(all, |number| oracle.state(buffer(number)) == State::Ok)
    }

    /// A word of a page.
    fn word(&mut self) -> u64 {
        4 * self.rng.u64(..4)
    }

    /// A word of a mapping that may be loaded, or stored.
    fn place(&mut self, oracle: &Oracle, store: bool) -> Option<(usize, u64)> {
        let mapping = self.mapping(oracle)?;
        let pages = oracle.mappings[&mapping].pages.iter().enumerate();
        let fits = |page: &Option<Protection>| match page {
            Some(Protection::ReadWrite) => true,
            Some(Protection::Read) => !store,
            Some(Protection::None) | None => false,
        };
        if store && oracle.devices[oracle.device_of(mapping)].spec.registers {
            return None;
        }
        let page = self.pick(pages.filter(|(_, page)| fits(page)).map(|(n, _)| n))?;
        Some((mapping, page as u64 * PAGE + self.word()))
    }

    /// Pages of a mapping, none of which is unmapped: first and number.
    fn span(&mut self, oracle: &Oracle, mapping: usize) -> Option<(u64, u64)> {
        let pages = &oracle.mappings[&mapping].pages;
        let first = self.rng.usize(..pages.len());
        let there = pages[first..].iter().take_while(|page| page.is_some());
        let there = there.count();
        if there == 0 {
            return None;
        }
        Some((first as u64, 1 + self.rng.u64(..there as u64)))
    }

    fn ranges(&mut self, oracle: &Oracle, device: usize) -> Vec<(u64, u64)> {
        let pages = oracle.devices[device].spec.size / PAGE;
        match self.rng.u8(..10) {
            _ if pages < CROWDED => (0..self.rng.u64(1..=3))
                .map(|_| {
                    let first = self.rng.u64(..pages);
                    (first * PAGE, self.rng.u64(1..=pages - first) * PAGE)
                })
                .collect(),
            // Large entries.
            0 | 1 => {
                let first = self.rng.u64(..pages / 512 - 2) * HUGE;
                vec![(first, HUGE * self.rng.u64(1..=2))]
            }
            // A large one between small ones.
            2 => {
                let first = self.rng.u64(..pages / 512 - 2) * HUGE;
                vec![(0, PAGE), (first, HUGE), (first + PAGE, PAGE)]
            }
            _ => (0..self.rng.u64(1..=5))
                .map(|_| {
                    let first = self.rng.u64(..CROWDED);
                    (first * PAGE, self.rng.u64(1..=6) * PAGE)
                })
                .collect(),
        }
    }

    /// Offset and length of a part of something of `size` bytes.
    fn part(&mut self, size: u64) -> (u64, u64) {
        let pages = size / PAGE;
        if self.rng.bool() {
            return (0, size);
        }
        let first = self.rng.u64(..pages);
        (first * PAGE, self.rng.u64(1..=pages - first) * PAGE)
    }

    #[expect(clippy::too_many_lines, reason = "one arm an operation")]
    fn candidate(&mut self, kind: Kind, oracle: &Oracle) -> Option<Op> {
        let op = match kind {
            Kind::Open => {
                let all = 0..oracle.devices.len();
                let closed = |device: &usize| {
                    let device = &oracle.devices[*device];
                    !device.fd && !device.gone
                };
                Op::Open {
                    device: self.pick(all.filter(closed))?,
                }
            }
            Kind::Close => {
                let all = 0..oracle.devices.len();
                let open = all.filter(|&device| oracle.devices[device].fd).collect();
                Op::Close {
                    device: self.prefer(open, |device| oracle.bar_mappings(device).is_empty())?,
                }
            }
            Kind::Rebind => {
                let is_closed = |device: &usize| {
                    let mut set = oracle.devices[*device].spec.set.iter();
                    set.all(|&member| {
                        let member = &oracle.devices[member];
                        !member.open && !member.gone
                    })
                };
                let all = 0..oracle.devices.len();
                Op::Rebind {
                    device: self.pick(all.filter(is_closed))?,
                }
            }
            Kind::Export => {
                if oracle.buffers.len() >= MOST_BUFFERS {
                    return None;
                }
                let device = self.device_with_fd(oracle)?;
                Op::Export {
                    device,
                    ranges: self.ranges(oracle, device),
                    writable: self.rng.u8(..) > 40,
                }
            }
            Kind::ExportSpoilt => {
                let device = self.open_device(oracle)?;
                let has_msix = oracle.devices[device].spec.msix.is_some();
                let all = Spoil::ALL.into_iter();
                let spoil = self.pick(all.filter(|&spoil| spoil != Spoil::Msix || has_msix))?;
                Op::ExportSpoilt { device, spoil }
            }
            Kind::Revoke => {
                let (device, buffer) = self.device_and_buffer(oracle)?;
                Op::Revoke { device, buffer }
            }
            Kind::RevokeId => {
                let all = oracle.buffers.keys().copied().collect();
                let nowait = self.rng.bool();
                // Few have importers that are still to end something.
                let is_good = |number: usize| {
                    let its = oracle.attachments.values().filter(|a| a.buffer == number);
                    let mut late = its.map(|a| a.fence || (a.hold && a.mapped));
                    oracle.state(number) != State::Dead && (!nowait || late.any(|late| late))
                };
                let buffer = self.prefer(all, is_good)?;
                let own = oracle.buffers[&buffer].device;
                let device = if self.rng.u8(..) < 24 || !oracle.devices[own].fd {
                    self.open_device(oracle)?
                } else {
                    own
                };
                Op::RevokeId {
                    device,
                    buffer,
                    nowait,
                }
            }
            Kind::List => Op::List {
                device: self.device_with_fd(oracle)?,
                at_a_time: self.rng.u32(1..=6),
            },
            Kind::Events => Op::Events {
                device: self.open_device(oracle)?,
                armed: self.rng.u8(..) < 220,
            },
            Kind::RevokeNothing => Op::RevokeNothing {
                device: self.open_device(oracle)?,
                what: if self.rng.bool() {
                    NoBuffer::Closed
                } else {
                    NoBuffer::Other
                },
            },
            Kind::Status => {
                let (device, buffer) = self.device_and_buffer(oracle)?;
                Op::Status { device, buffer }
            }
            Kind::MemoryType => {
                let (device, buffer) = self.device_and_buffer(oracle)?;
                Op::MemoryType {
                    device,
                    buffer,
                    value: self.rng.u32(..3),
                }
            }
            Kind::SteeringTags => {
                let (mut device, mut buffer) = self.device_and_buffer(oracle)?;
                if self.rng.bool() {
                    // Most devices take none.
                    let all = oracle.buffers.iter().filter(|(_, b)| {
                        let device = &oracle.devices[b.device];
                        device.spec.tags && device.fd && b.holders.contains(&MAIN)
                    });
                    buffer = self.pick(all.map(|(&number, _)| number))?;
                    device = oracle.buffers[&buffer].device;
                }
                let flags = if self.rng.u8(..) < 20 {
                    4
                } else {
                    self.rng.u32(..4)
                };
                // A tag without its flag is refused.
                let wrong = self.rng.u8(..) < 40;
                let [tag, extended] = [TPH_ST, TPH_ST_EXT].map(|flag| {
                    if flags & flag != 0 || wrong {
                        self.rng.u16(..)
                    } else {
                        0
                    }
                });
                Op::SteeringTags {
                    device,
                    buffer,
                    flags,
                    tag: tag as u8,
                    extended,
                    hint: self.rng.u8(..=if wrong { 4 } else { 3 }),
                }
            }
            Kind::ReadTag => {
                let all = oracle.buffers.iter();
                let ours = all.filter(|(_, b)| b.holders.contains(&MAIN));
                let ours = ours.map(|(&number, _)| number).collect();
                let is_set = |number| oracle.buffers[&number].tags != [None; 2];
                Op::ReadTag {
                    buffer: self.prefer(ours, is_set)?,
                    extended: self.rng.bool(),
                }
            }
            Kind::CloseBuffer => {
                let all = oracle.buffers.iter();
                let held = all.filter(|(_, b)| !b.holders.is_empty());
                let held = held.map(|(&number, _)| number).collect();
                let buffer = self.prefer(held, |number| oracle.state(number) == State::Dead)?;
                let process = self.pick(oracle.buffers[&buffer].holders.iter().copied())?;
                Op::CloseBuffer { buffer, process }
            }
            Kind::Send => {
                let buffer = self.buffer(oracle)?;
                let holders = &oracle.buffers[&buffer].holders;
                let others = oracle.processes.iter().copied();
                let process = self.pick(others.filter(|process| !holders.contains(process)))?;
                Op::Send { buffer, process }
            }
            Kind::Map => {
                if oracle.mappings.len() >= MOST_MAPPINGS {
                    return None;
                }
                let all = oracle.buffers.iter();
                let held = all.filter(|(_, b)| !b.holders.is_empty());
                let held = held.map(|(&number, _)| number).collect();
                let buffer = self.prefer(held, |number| oracle.state(number) != State::Dead)?;
                let this = &oracle.buffers[&buffer];
                let process = self.pick(this.holders.iter().copied())?;
                let (offset, length) = self.part(this.size());
                let protection = if this.writable && self.rng.u8(..) > 40 {
                    Protection::ReadWrite
                } else {
                    Protection::Read
                };
                Op::Map {
                    buffer,
                    process,
                    offset,
                    length,
                    protection,
                    large: length >= HUGE && self.rng.bool(),
                }
            }
            Kind::MapSpoilt => {
                let buffer = self.buffer(oracle)?;
                let ways = [WrongMap::Private, WrongMap::PastEnd, WrongMap::Writable];
                let writable = oracle.buffers[&buffer].writable;
                let how = self.pick(
                    ways.into_iter()
                        .filter(|&how| how != WrongMap::Writable || !writable),
                )?;
                Op::MapSpoilt { buffer, how }
            }
            Kind::MapBar => {
                if oracle.mappings.len() >= MOST_MAPPINGS {
                    return None;
                }
                let device = self.device_with_fd(oracle)?;
                // They keep it open.
                if oracle.bar_mappings(device).len() >= MOST_BARS {
                    return None;
                }
                let pages = oracle.devices[device].spec.size / PAGE;
                let first = self.rng.u64(..CROWDED.min(pages));
                let length = if pages > CROWDED && self.rng.u8(..) < 60 {
                    HUGE
                } else {
                    self.rng.u64(1..8.min(pages - first + 1)) * PAGE
                };
                Op::MapBar {
                    device,
                    alias: oracle.devices[device].alias && self.rng.bool(),
                    offset: first * PAGE,
                    length,
                }
            }
            Kind::Alias => Op::Alias {
                device: self.open_device(oracle)?,
            },
            Kind::AliasSpoilt => {
                let device = self.open_device(oracle)?;
                Op::AliasSpoilt {
                    device,
                    of_alias: oracle.devices[device].alias && self.rng.bool(),
                }
            }
            Kind::Unmap => {
                let all = oracle.mappings.keys().copied().collect();
                // Nobody has use for it, or it keeps a device open that has no fd.
                let mapping = self.prefer(all, |number| {
                    !oracle.is_accessible(number) || !oracle.devices[oracle.device_of(number)].fd
                })?;
                Op::Unmap { mapping }
            }
            Kind::UnmapPart => {
                let mapping = self.mapping(oracle)?;
                let (first, pages) = self.span(oracle, mapping)?;
                let left = oracle.mappings[&mapping].pages.iter().flatten().count() as u64;
                if left == pages {
                    return None;
                }
                Op::UnmapPart {
                    mapping,
                    first,
                    pages,
                }
            }
            Kind::Protect => {
                let mapping = self.mapping(oracle)?;
                let (first, pages) = self.span(oracle, mapping)?;
                let all = [Protection::None, Protection::Read, Protection::ReadWrite];
                Op::Protect {
                    mapping,
                    first,
                    pages,
                    protection: self.pick(all)?,
                }
            }
            Kind::Move => {
                let all = oracle.mappings.iter().filter(|(_, m)| !m.split);
                Op::Move {
                    mapping: self.pick(all.map(|(&number, _)| number))?,
                }
            }
            Kind::Fork => {
                let mut touches = Vec::new();
                for _ in 0..4 {
                    let (mapping, at) = self.place(oracle, false)?;
                    if oracle.mappings[&mapping].process == MAIN {
                        touches.push((mapping, at));
                    }
                }
                if touches.is_empty() {
                    return None;
                }
                Op::Fork { touches }
            }
            Kind::Spawn => {
                let ours = oracle.mappings.values().filter(|m| m.process == MAIN);
                let bars = |device| oracle.bar_mappings(device).len();
                if oracle.processes.len() >= MOST_PROCESSES
                    || (0..oracle.devices.len()).any(|device| bars(device) > MOST_BARS)
                    || oracle.mappings.len() + ours.count() > 2 * MOST_MAPPINGS
                {
                    return None;
                }
                Op::Spawn
            }
            Kind::Kill => {
                let others = oracle.processes.iter().copied();
                Op::Kill {
                    process: self.pick(others.filter(|&process| process != MAIN))?,
                }
            }
            Kind::Read => {
                let (mapping, at) = self.place(oracle, false)?;
                Op::Read { mapping, at }
            }
            Kind::Write => {
                let (mapping, at) = self.place(oracle, true)?;
                Op::Write {
                    mapping,
                    at,
                    value: self.rng.u32(..),
                }
            }
            Kind::ReadFd | Kind::WriteFd => {
                let device = self.open_device(oracle)?;
                // In low power the core wakes the device for it.
                let this = &oracle.devices[device];
                if this.low != LowPower::No {
                    return None;
                }
                if kind == Kind::WriteFd && this.spec.registers {
                    return None;
                }
                let pages = this.spec.size / PAGE;
                let alias = oracle.devices[device].alias && self.rng.bool();
                let at = self.rng.u64(..CROWDED.min(pages)) * PAGE + self.word();
                if kind == Kind::ReadFd {
                    Op::ReadFd { device, alias, at }
                } else {
                    let value = self.rng.u32(..);
                    Op::WriteFd {
                        device,
                        alias,
                        at,
                        value,
                    }
                }
            }
            Kind::Attach => {
                if oracle.attachments.len() >= MOST_ATTACHMENTS {
                    return None;
                }
                Op::Attach {
                    buffer: self.buffer(oracle)?,
                }
            }
            Kind::AttachSpoilt => Op::AttachSpoilt {
                buffer: self.buffer(oracle)?,
                peer_to_peer: self.rng.bool(),
            },
            Kind::Detach => {
                let all = oracle.attachments.keys().copied().collect();
                let buffer = |number| oracle.attachments[&number].buffer;
                let attachment =
                    self.prefer(all, |number| oracle.state(buffer(number)) == State::Dead)?;
                Op::Detach { attachment }
            }
            Kind::MapDma => {
                let all = oracle.attachments.keys().copied().collect();
                let could = |number| {
                    let attachment = &oracle.attachments[&number];
                    !attachment.mapped && oracle.state(attachment.buffer) == State::Ok
                };
                Op::MapDma {
                    attachment: self.prefer(all, could)?,
                }
            }
            Kind::UnmapDma => Op::UnmapDma {
                attachment: self.attachment(oracle)?,
            },
            Kind::Hold => Op::Hold {
                attachment: self.attachment(oracle)?,
                hold: self.rng.u8(..) < 200,
            },
            Kind::Fence => {
                let attachment = self.attachment(oracle)?;
                // On a buffer that is taken away it would be another event's wait.
                if oracle.state(oracle.attachments[&attachment].buffer) != State::Ok {
                    return None;
                }
                Op::Fence { attachment }
            }
            Kind::Signal => Op::Signal {
                attachment: self.attachment(oracle)?,
            },
            Kind::ReadDma | Kind::WriteDma => {
                let attachment = self.attachment(oracle)?;
                let buffer = oracle.attachments[&attachment].buffer;
                if oracle.devices[oracle.buffers[&buffer].device]
                    .spec
                    .registers
                {
                    return None;
                }
                let pages = oracle.buffers[&buffer].size() / PAGE;
                let at = self.rng.u64(..pages) * PAGE + TRANSFER * self.rng.u64(..2);
                if kind == Kind::ReadDma {
                    Op::ReadDma { attachment, at }
                } else {
                    let value = self.rng.u32(..);
                    Op::WriteDma {
                        attachment,
                        at,
                        value,
                    }
                }
            }
            Kind::Memory => {
                let device = self.open_device(oracle)?;
                // Mostly on: what is off for long is not worth much.
                let on = !oracle.devices[device].memory || self.rng.u8(..) < 60;
                Op::Memory {
                    device,
                    on,
                    long: self.rng.u8(..) < 60,
                }
            }
            Kind::Master => Op::Master {
                device: self.open_device(oracle)?,
                on: self.rng.bool(),
            },
            Kind::Power => {
                let device = self.open_device(oracle)?;
                let this = &oracle.devices[device];
                if !this.spec.d3hot || this.low != LowPower::No {
                    return None;
                }
                let state = match this.power {
                    0 => self.pick([0, 1, 2, 3, 3, 3])?,
                    _ => self.pick([0, 0, 3])?,
                };
                Op::Power { device, state }
            }
            Kind::EnterLowPower => Op::EnterLowPower {
                device: self.device_to_sleep(oracle)?,
                wake_up: self.rng.bool(),
            },
            Kind::LeaveLowPower => Op::LeaveLowPower {
                device: self.open_device(oracle)?,
            },
            Kind::Access => Op::Access {
                device: self.open_device(oracle)?,
            },
            Kind::Reset => Op::Reset {
                device: self.device_to_reset(oracle)?,
            },
            Kind::SysfsReset => {
                let device = self.device_to_reset(oracle)?;
                if !oracle.devices[device].spec.resets {
                    return None;
                }
                Op::SysfsReset { device }
            }
            Kind::FunctionReset => {
                let device = self.device_to_reset(oracle)?;
                if !oracle.devices[device].spec.function_reset {
                    return None;
                }
                Op::FunctionReset { device }
            }
            Kind::HotReset | Kind::BusReset => {
                let device = self.device_to_reset(oracle)?;
                let this = &oracle.devices[device];
                // Those that are woken by it are looked at through their fds.
                let mut set = this.spec.set.iter().map(|&member| &oracle.devices[member]);
                if !this.spec.bus_reset || set.any(|member| member.open && !member.fd) {
                    return None;
                }
                if kind == Kind::HotReset {
                    Op::HotReset { device }
                } else {
                    Op::BusReset { device }
                }
            }
            Kind::Error => {
                // Those that are woken by it are looked at through their fds.
                let ready = |device: &usize| {
                    let spec = &oracle.devices[*device].spec;
                    let mut set = spec.set.iter().map(|&member| &oracle.devices[member]);
                    spec.reports && set.all(|member| member.fd || !member.open)
                };
                let all = (0..oracle.devices.len()).filter(ready).collect();
                Op::Error {
                    device: self.prefer(all, |device| oracle.devices[device].open)?,
                    severity: if self.rng.u8(..) < 48 {
                        Severity::Corrected
                    } else {
                        Severity::NonFatal
                    },
                }
            }
            Kind::Pull => {
                // To take it away the kernel would wake it.
                let ready = |device: &usize| {
                    let device = &oracle.devices[*device];
                    device.spec.slot && !device.gone && device.low == LowPower::No
                };
                let all = (0..oracle.devices.len()).filter(ready).collect();
                Op::Pull {
                    device: self.prefer(all, |device| oracle.devices[device].open)?,
                }
            }
            Kind::Plug => {
                let all = oracle.devices.iter().enumerate();
                let empty = all.filter(|(_, device)| device.gone && !device.open);
                Op::Plug {
                    device: self.pick(empty.map(|(number, _)| number))?,
                }
            }
            Kind::PullInStorm => {
                let device = self.open_device(oracle)?;
                let rounds = self.rng.u32(1..4);
                let op = Op::PullInStorm { device, rounds };
                let this = &oracle.devices[device];
                let ready = this.spec.slot && this.low == LowPower::No;
                if !ready || !oracle.waited_for(&op).is_empty() {
                    return None;
                }
                op
            }
            Kind::Sleep => {
                if !self.can_sleep || !oracle.waited_for(&Op::Sleep).is_empty() {
                    return None;
                }
                Op::Sleep
            }
            Kind::Storm => {
                let device = self.open_device(oracle)?;
                let rounds = self.rng.u32(2..8);
                let op = Op::Storm { device, rounds };
                let mut set = oracle.devices[device].spec.set.iter();
                let ready = set.all(|&member| {
                    let this = &oracle.devices[member];
                    // A reset of the bus, if it comes about at all, wakes others.
                    let awake = member == device || this.power == 0;
                    awake && this.low == LowPower::No && (this.fd || !this.open)
                });
                if !ready || !oracle.waited_for(&op).is_empty() {
                    return None;
                }
                op
            }
        };
        self.is_fair(&op, oracle).then_some(op)
    }

    /// Whether the end of the last mapping that keeps a device open would wait for an importer:
    /// whoever makes that step cannot do it in a thread of its own.
    fn is_fair(&self, op: &Op, oracle: &Oracle) -> bool {
        let ends: Vec<usize> = match *op {
            Op::Unmap { mapping } => vec![mapping],
            Op::Kill { process } => {
                let all = oracle.mappings.iter();
                all.filter(|(_, m)| m.process == process)
                    .map(|(&n, _)| n)
                    .collect()
            }
            _ => return true,
        };
        let mut devices = oracle.devices.iter().enumerate();
        !devices.any(|(number, device)| {
            let bars = oracle.bar_mappings(number);
            let closes = device.open && !device.fd && bars.iter().all(|bar| ends.contains(bar));
            let mut attachments = oracle.attachments.values();
            closes
                && attachments.any(|attachment| {
                    oracle.buffers[&attachment.buffer].device == number
                        && (attachment.hold || attachment.fence)
                })
        })
    }
}

fn weight(kind: Kind) -> u32 {
    match kind {
        Kind::Open | Kind::Export | Kind::Read | Kind::Write => 30,
        Kind::Map => 40,
        Kind::Send | Kind::Attach | Kind::MapDma => 20,
        Kind::Memory | Kind::Revoke => 12,
        // Slow, or the end of much.
        Kind::MapBar
        | Kind::ReadDma
        | Kind::WriteDma
        | Kind::Close
        | Kind::Kill
        | Kind::EnterLowPower => 4,
        Kind::Sleep | Kind::Storm | Kind::PullInStorm => 1,
        _ => 8,
    }
}

/// How slow an operation is, compared with others: a DMA transfer takes 0.2 s, sleep more than a
/// second.
fn cost(kind: Kind) -> u64 {
    match kind {
        Kind::Sleep => 30,
        Kind::Storm | Kind::PullInStorm => 6,
        // The kernel waits a second before a slot is used again.
        Kind::Pull | Kind::Plug => 3,
        Kind::ReadDma | Kind::WriteDma => 2,
        _ => 1,
    }
}

/// Operations that change nothing of what is mapped where, and what is in memory.
fn can_be_under_fire(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Close
            | Kind::Export
            | Kind::Revoke
            | Kind::RevokeId
            | Kind::List
            | Kind::Events
            | Kind::Status
            | Kind::Memory
            | Kind::Master
            | Kind::Power
            | Kind::EnterLowPower
            | Kind::LeaveLowPower
            | Kind::Access
            | Kind::Reset
            | Kind::SysfsReset
            | Kind::FunctionReset
            | Kind::HotReset
            | Kind::BusReset
            | Kind::Error
            | Kind::Pull
            | Kind::MapDma
            | Kind::UnmapDma
    )
}
