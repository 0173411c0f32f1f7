//! The changes that a step makes, and the outcome that it must have.

use std::{fmt, ops::RangeInclusive};

use barlease_abi::{MEMATTR_NC, MEMATTR_WC, TPH_ST, TPH_ST_EXT};

use crate::{
    Attachment, Buffer, LowPower, MAIN, Mapping, NoBuffer, Op, Oracle, Outcome, PAGE, Protection,
    Record, Seen, Severity, State, TRANSFER, Target, WrongMap,
};

/// The outcome that a step must have.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expected {
    /// This.
    Exactly(Outcome),
    /// The contents of a device's memory from an offset on, so many words.
    Words(usize, u64, u64),
    /// An open device.
    Opened(usize),
    /// The buffers of a device.
    Listed(usize),
}

/// Something else came of a step than must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objection(String);

impl fmt::Display for Objection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Objection {}

const DONE: Expected = Expected::Exactly(Outcome::Done);

fn refused(errno: i32) -> Expected {
    Expected::Exactly(Outcome::Refused(errno))
}

impl Oracle {
    /// A step was made, and this came of it.
    ///
    /// # Errors
    ///
    /// When that must not be.
    pub fn step(&mut self, op: &Op, seen: &Outcome) -> Result<(), Objection> {
        let expected = self.apply(op);
        self.prune();
        let object = |wanted: String| Err(Objection(format!("{seen:?} instead of {wanted}")));
        match (expected, seen) {
            (Expected::Exactly(expected), seen) if expected == *seen => Ok(()),
            (Expected::Exactly(expected), _) => object(format!("{expected:?}")),
            (Expected::Opened(device), Outcome::Opened(memory)) => {
                self.devices[device].memory = *memory;
                Ok(())
            }
            (Expected::Opened(_), _) => object("an open device".to_owned()),
            (Expected::Words(device, at, count), Outcome::Words(words))
                if count == words.len() as u64 =>
            {
                self.learn(device, at, words)
            }
            (Expected::Words(..), _) => object("what is there".to_owned()),
            (Expected::Listed(device), Outcome::Listed(records)) => self.compare(device, records),
            (Expected::Listed(_), _) => object("a list".to_owned()),
        }
    }

    /// The outcome that a step must have; 0 where it is not known.
    #[must_use]
    pub fn predict(&self, op: &Op) -> Outcome {
        let mut after = self.clone();
        match after.apply(op) {
            Expected::Exactly(outcome) => outcome,
            Expected::Opened(_) => Outcome::Opened(true),
            Expected::Listed(device) => Outcome::Listed(after.records(device)),
            Expected::Words(device, at, count) => {
                let known = &self.devices[device].words;
                let word = |word| known.get(&(at + 4 * word)).copied().unwrap_or(0);
                Outcome::Words((0..count).map(word).collect())
            }
        }
    }

    /// Words that were read: known ones must be those, and the others are known from now on.
    ///
    /// # Errors
    ///
    /// When a known one is another.
    pub fn learn(&mut self, device: usize, at: u64, words: &[u32]) -> Result<(), Objection> {
        let device = &mut self.devices[device];
        for (number, &seen) in words.iter().enumerate() {
            let place = at + 4 * number as u64;
            let known = *device.words.entry(place).or_insert(seen);
            if known != seen {
                let name = device.spec.name;
                return Err(Objection(format!(
                    "{seen:#x} instead of {known:#x} at {place:#x} of {name}"
                )));
            }
        }
        Ok(())
    }

    /// Whether a list is that of the buffers of a device. How many internal ones there are is not
    /// said, but of what they are.
    fn compare(&self, device: usize, records: &[Record]) -> Result<(), Objection> {
        let all = self.buffers.iter();
        let its = all.filter(|(_, b)| b.device == device && self.is_current(b));
        let its: Vec<_> = its.map(|(&number, _)| number).collect();
        let listed: Vec<_> = records.iter().filter_map(|record| record.buffer).collect();
        if listed != its {
            return Err(Objection(format!("buffers {listed:?} instead of {its:?}")));
        }
        for record in records {
            let Some(number) = record.buffer else {
                continue;
            };
            let of = self.attachments.values().filter(|a| a.buffer == number);
            let target = Target::Buffer(number);
            let right = record.seen == self.status(number)
                && record.mappings == of.filter(|a| a.mapped).count() as u32
                && record.writable == self.buffers[&number].writable
                && !record.draining
                && self.vmas(target, false).contains(&record.vmas)
                && self.vmas(target, true).contains(&record.combining);
            if !right {
                return Err(Objection(format!(
                    "{record:?} instead of {:?}, {:?} mappings of processes, {:?} of them combining",
                    self.status(number),
                    self.vmas(target, false),
                    self.vmas(target, true)
                )));
            }
        }
        let internal = || records.iter().filter(|record| record.buffer.is_none());
        let this = &self.devices[device];
        let state = self.state_of_bar(device);
        let is_right = |record: &Record| {
            let Seen {
                state: its,
                region,
                attachments,
                ..
            } = record.seen;
            (its, region, attachments) == (state, this.spec.bar, 0)
                && (record.mappings, record.draining) == (0, false)
        };
        if let Some(wrong) = internal().find(|record| !is_right(record)) {
            return Err(Objection(format!("{wrong:?} instead of one in {state:?}")));
        }
        let target = Target::Bar(device);
        let vmas: u32 = internal().map(|record| record.vmas).sum();
        let combining: u32 = internal().map(|record| record.combining).sum();
        let right = self.vmas(target, false).contains(&vmas)
            && self.vmas(target, true).contains(&combining);
        if !right {
            return Err(Objection(format!(
                "{vmas} mappings of the BAR, {combining} of them combining, instead of {:?}, {:?}",
                self.vmas(target, false),
                self.vmas(target, true)
            )));
        }
        Ok(())
    }

    /// A list that there may be of the buffers of a device.
    fn records(&self, device: usize) -> Vec<Record> {
        let vmas = |target, combining| *self.vmas(target, combining).start();
        let all = self.buffers.iter();
        let its = all.filter(|(_, b)| b.device == device && self.is_current(b));
        let records = its.map(|(&number, buffer)| {
            let of = self.attachments.values().filter(|a| a.buffer == number);
            let target = Target::Buffer(number);
            Record {
                buffer: Some(number),
                seen: self.status(number),
                draining: false,
                mappings: of.filter(|a| a.mapped).count() as u32,
                vmas: vmas(target, false),
                combining: vmas(target, true),
                writable: buffer.writable,
            }
        });
        let target = Target::Bar(device);
        let this = &self.devices[device];
        let internal = || Record {
            buffer: None,
            seen: Seen {
                state: self.state_of_bar(device),
                memattr: MEMATTR_NC,
                region: this.spec.bar,
                size: this.spec.size,
                ranges: 1,
                attachments: 0,
            },
            draining: false,
            mappings: 0,
            vmas: vmas(target, false),
            combining: vmas(target, true),
            writable: true,
        };
        let is_mapped = !self.bar_mappings(device).is_empty();
        records.chain(is_mapped.then(internal)).collect()
    }

    /// The state of a mapping of the BAR, which keeps the device open.
    fn state_of_bar(&self, device: usize) -> State {
        match self.reasons(device) {
            _ if self.devices[device].gone => State::Dead,
            0 => State::Ok,
            reasons => State::Revoked(reasons),
        }
    }

    /// How many VMAs there may be of `target`, or how many write-combining ones: parts of a mapping
    /// that was split are one or several.
    fn vmas(&self, target: Target, combining: bool) -> RangeInclusive<u32> {
        let mut range = (0, 0u32);
        for mapping in self.mappings.values() {
            if mapping.target != target || (combining && !mapping.combining) {
                continue;
            }
            let pages = &mapping.pages;
            let begins = |at: usize| pages[at].is_some() && (at == 0 || pages[at] != pages[at - 1]);
            range.0 += (0..pages.len()).filter(|&at| begins(at)).count() as u32;
            range.1 = range
                .1
                .saturating_add(if mapping.split { u32::MAX } else { 1 });
        }
        range.0..=range.1
    }

    /// A device is accessed through its fd, which wakes it if it was to sleep until then.
    fn access(&mut self, device: usize) {
        let device = &mut self.devices[device];
        if device.low == LowPower::UntilWakeUp {
            device.low = LowPower::No;
            device.wake_ups += 1;
        }
    }

    fn take(&mut self, op: &Op) {
        let taken = self.taken_by(op);
        self.drain(|buffer| taken.contains(&buffer));
    }

    /// Importers are told, and give up what they do not hold.
    fn tell(&mut self, op: &Op) {
        let taken = self.taken_by(op);
        for attachment in self.attachments.values_mut() {
            if taken.contains(&attachment.buffer) && !attachment.hold {
                attachment.mapped = false;
            }
        }
    }

    fn drain(&mut self, is_taken: impl Fn(usize) -> bool) {
        for attachment in self.attachments.values_mut() {
            if is_taken(attachment.buffer) {
                attachment.mapped = false;
                attachment.fence = false;
            }
        }
    }

    /// Closes a device that nothing keeps open any more.
    fn maybe_close(&mut self, device: usize) {
        if self.devices[device].fd || !self.bar_mappings(device).is_empty() {
            return;
        }
        let of = self.buffers.iter().filter(|(_, b)| b.device == device);
        let of: Vec<_> = of.map(|(&number, _)| number).collect();
        self.drain(|buffer| of.contains(&buffer));
        let device = &mut self.devices[device];
        device.open = false;
        device.low = LowPower::No;
        device.power = 0;
    }

    /// The errno with which a device refuses a buffer that is not its own.
    fn foreign(&self, device: usize, buffer: usize) -> Option<Expected> {
        let buffer = &self.buffers[&buffer];
        let own = buffer.device == device && self.is_current(buffer);
        (!own).then(|| refused(libc::ENODEV))
    }

    #[expect(clippy::too_many_lines, reason = "one arm an operation")]
    fn apply(&mut self, op: &Op) -> Expected {
        self.wake_by(op);
        match *op {
            Op::Open { device } => {
                let this = &mut self.devices[device];
                this.fd = true;
                if this.open {
                    return Expected::Exactly(Outcome::Opened(this.memory));
                }
                this.open = true;
                this.epoch += 1;
                this.alias = false;
                this.armed = false;
                Expected::Opened(device)
            }
            Op::Close { device } => {
                self.take(op);
                self.devices[device].fd = false;
                self.maybe_close(device);
                DONE
            }
            Op::Rebind { device } => {
                for member in self.devices[device].spec.set.clone() {
                    self.devices[member].epoch += 1;
                }
                DONE
            }
            Op::Export {
                device,
                ref ranges,
                writable,
            } => {
                if self.devices[device].gone {
                    return refused(libc::ENODEV);
                }
                let number = self.number();
                let buffer = Buffer {
                    device,
                    epoch: self.devices[device].epoch,
                    ranges: ranges.clone(),
                    writable,
                    revoked: false,
                    memattr: MEMATTR_NC,
                    tags: [None; 2],
                    hint: 0,
                    holders: [MAIN].into(),
                };
                self.buffers.insert(number, buffer);
                DONE
            }
            Op::ExportSpoilt { spoil, .. } => refused(spoil.errno()),
            Op::Revoke { device, buffer } => {
                if let Some(refused) = self.foreign(device, buffer) {
                    return refused;
                }
                self.take(op);
                let buffer = self.buffer(buffer);
                if std::mem::replace(&mut buffer.revoked, true) {
                    return refused(libc::EBADFD);
                }
                DONE
            }
            Op::RevokeId {
                device,
                buffer,
                nowait,
            } => {
                if self.foreign(device, buffer).is_some() {
                    return refused(libc::ENOENT);
                }
                let is_left = !self.told_late_by(op).is_empty();
                self.take(op);
                let buffer = self.buffer(buffer);
                if std::mem::replace(&mut buffer.revoked, true) {
                    return refused(libc::EBADFD);
                }
                if nowait && is_left {
                    return refused(libc::EINPROGRESS);
                }
                DONE
            }
            Op::List { device, .. } => Expected::Listed(device),
            Op::Events { device, armed } => {
                self.devices[device].armed = armed;
                DONE
            }
            Op::RevokeNothing { what, .. } => refused(match what {
                NoBuffer::Closed => libc::EBADF,
                NoBuffer::Other => libc::EINVAL,
            }),
            Op::Status { device, buffer } => match self.foreign(device, buffer) {
                Some(refused) => refused,
                None => Expected::Exactly(Outcome::Status(self.status(buffer))),
            },
            Op::MemoryType {
                device,
                buffer,
                value,
            } => {
                if value != MEMATTR_NC && value != MEMATTR_WC {
                    return refused(libc::ENOENT);
                }
                if let Some(refused) = self.foreign(device, buffer) {
                    return refused;
                }
                if self.state(buffer) == State::Dead {
                    return refused(libc::ENODEV);
                }
                self.buffer(buffer).memattr = value;
                DONE
            }
            Op::SteeringTags {
                device,
                buffer,
                flags,
                tag,
                extended,
                hint,
            } => {
                if !self.devices[device].spec.tags {
                    return refused(libc::EOPNOTSUPP);
                }
                let [plain, long] = [TPH_ST, TPH_ST_EXT].map(|flag| flags & flag != 0);
                if flags & !(TPH_ST | TPH_ST_EXT) != 0
                    || hint > 3
                    || (tag != 0 && !plain)
                    || (extended != 0 && !long)
                {
                    return refused(libc::EINVAL);
                }
                if let Some(refused) = self.foreign(device, buffer) {
                    return refused;
                }
                if self.state(buffer) == State::Dead {
                    return refused(libc::ENODEV);
                }
                let buffer = self.buffer(buffer);
                buffer.tags = [plain.then_some(u16::from(tag)), long.then_some(extended)];
                buffer.hint = hint;
                DONE
            }
            Op::ReadTag { buffer, extended } => {
                let buffer = &self.buffers[&buffer];
                match buffer.tags[usize::from(extended)] {
                    Some(tag) => Expected::Exactly(Outcome::Tag(tag, buffer.hint)),
                    None => refused(libc::EOPNOTSUPP),
                }
            }
            Op::CloseBuffer { buffer, process } => {
                self.buffer(buffer).holders.remove(&process);
                DONE
            }
            Op::Send { buffer, process } => {
                self.buffer(buffer).holders.insert(process);
                DONE
            }
            Op::Map {
                buffer,
                process,
                offset,
                length,
                protection,
                ..
            } => {
                if self.state(buffer) == State::Dead {
                    return refused(libc::ENODEV);
                }
                let mapping = Mapping {
                    process,
                    target: Target::Buffer(buffer),
                    offset,
                    pages: vec![Some(protection); (length / PAGE) as usize],
                    may_write: self.buffers[&buffer].writable,
                    combining: self.is_combining(buffer),
                    split: false,
                };
                let number = self.number();
                self.mappings.insert(number, mapping);
                DONE
            }
            Op::MapSpoilt { how, .. } => refused(match how {
                WrongMap::Private | WrongMap::PastEnd => libc::EINVAL,
                WrongMap::Writable => libc::EACCES,
            }),
            Op::MapBar {
                device,
                alias,
                offset,
                length,
            } => {
                if self.devices[device].gone {
                    return refused(libc::ENODEV);
                }
                let mapping = Mapping {
                    process: MAIN,
                    target: Target::Bar(device),
                    offset,
                    pages: vec![Some(Protection::ReadWrite); (length / PAGE) as usize],
                    may_write: true,
                    combining: alias,
                    split: false,
                };
                let number = self.number();
                self.mappings.insert(number, mapping);
                DONE
            }
            Op::Alias { device } => {
                self.devices[device].alias = true;
                DONE
            }
            Op::AliasSpoilt { of_alias, .. } => {
                refused(if of_alias { libc::EINVAL } else { libc::ENODEV })
            }
            Op::Unmap { mapping } => {
                self.unmap(mapping);
                DONE
            }
            Op::UnmapPart {
                mapping,
                first,
                pages,
            } => {
                let this = self.mapping(mapping);
                this.split = true;
                this.pages[first as usize..][..pages as usize].fill(None);
                if this.pages.iter().all(Option::is_none) {
                    self.unmap(mapping);
                }
                DONE
            }
            Op::Protect {
                mapping,
                first,
                pages,
                protection,
            } => {
                let this = self.mapping(mapping);
                if protection == Protection::ReadWrite && !this.may_write {
                    return refused(libc::EACCES);
                }
                this.split = true;
                this.pages[first as usize..][..pages as usize].fill(Some(protection));
                DONE
            }
            Op::Move { .. } | Op::Fork { .. } => DONE,
            Op::Spawn => {
                let process = self.number();
                self.processes.insert(process);
                for (number, of) in self.copies_from(self.next) {
                    let mapping = Mapping {
                        process,
                        ..self.mappings[&of].clone()
                    };
                    self.mappings.insert(number, mapping);
                    self.next = number + 1;
                }
                DONE
            }
            Op::Kill { process } => {
                self.processes.remove(&process);
                for buffer in self.buffers.values_mut() {
                    buffer.holders.remove(&process);
                }
                let its = self.mappings.iter().filter(|(_, m)| m.process == process);
                let its: Vec<_> = its.map(|(&number, _)| number).collect();
                its.into_iter().for_each(|mapping| self.unmap(mapping));
                DONE
            }
            Op::Read { mapping, at } => {
                if !self.is_accessible(mapping) {
                    return Expected::Exactly(Outcome::Sigbus);
                }
                Expected::Words(self.device_of(mapping), self.place(mapping, at), 1)
            }
            Op::Write { mapping, at, value } => {
                if !self.is_accessible(mapping) {
                    return Expected::Exactly(Outcome::Sigbus);
                }
                let place = self.place(mapping, at);
                let device = self.device_of(mapping);
                self.devices[device].words.insert(place, value);
                DONE
            }
            Op::ReadFd { device, at, .. } => {
                if self.reasons(device) != 0 {
                    return refused(libc::EIO);
                }
                Expected::Words(device, at, 1)
            }
            Op::WriteFd {
                device, at, value, ..
            } => {
                if self.reasons(device) != 0 {
                    return refused(libc::EIO);
                }
                self.devices[device].words.insert(at, value);
                DONE
            }
            Op::Attach { buffer } => {
                if self.state(buffer) != State::Ok {
                    return refused(libc::ENODEV);
                }
                let attachment = Attachment {
                    buffer,
                    mapped: false,
                    hold: false,
                    fence: false,
                };
                let number = self.number();
                self.attachments.insert(number, attachment);
                DONE
            }
            Op::AttachSpoilt { .. } => refused(libc::EOPNOTSUPP),
            Op::Detach { attachment } => {
                self.attachments.remove(&attachment);
                DONE
            }
            Op::MapDma { attachment } => {
                let this = self.attachments[&attachment];
                if this.mapped {
                    return refused(libc::EBUSY);
                }
                if self.state(this.buffer) != State::Ok {
                    return refused(libc::ENODEV);
                }
                let buffer = &self.buffers[&this.buffer];
                if buffer.size() > 2 * self.devices[buffer.device].spec.size {
                    return refused(libc::EINVAL);
                }
                self.attachment(attachment).mapped = true;
                DONE
            }
            Op::UnmapDma { attachment } => {
                let this = self.attachment(attachment);
                if !std::mem::replace(&mut this.mapped, false) {
                    return refused(libc::ENXIO);
                }
                DONE
            }
            Op::Hold { attachment, hold } => {
                self.attachment(attachment).hold = hold;
                DONE
            }
            Op::Fence { attachment } => {
                if std::mem::replace(&mut self.attachment(attachment).fence, true) {
                    return refused(libc::EBUSY);
                }
                DONE
            }
            Op::Signal { attachment } => {
                if !std::mem::replace(&mut self.attachment(attachment).fence, false) {
                    return refused(libc::ENXIO);
                }
                DONE
            }
            Op::ReadDma { attachment, at } => match self.dma_place(attachment, at) {
                Some((device, place)) => Expected::Words(device, place, TRANSFER / 4),
                None => refused(libc::ENXIO),
            },
            Op::WriteDma {
                attachment,
                at,
                value,
            } => match self.dma_place(attachment, at) {
                Some((device, place)) => {
                    for word in 0..TRANSFER / 4 {
                        let value = value.wrapping_add(word as u32);
                        self.devices[device].words.insert(place + 4 * word, value);
                    }
                    DONE
                }
                None => refused(libc::ENXIO),
            },
            Op::Memory { device, on, .. } => {
                self.take(op);
                self.devices[device].memory = on;
                DONE
            }
            Op::Master { .. } | Op::Sleep => {
                self.take(op);
                DONE
            }
            Op::Power { device, state } => {
                self.take(op);
                let device = &mut self.devices[device];
                if matches!(state, 0 | 3) || device.spec.d1_d2 {
                    device.power = state;
                }
                DONE
            }
            Op::EnterLowPower { device, wake_up } => {
                if self.devices[device].low != LowPower::No {
                    return refused(libc::EINVAL);
                }
                self.take(op);
                let device = &mut self.devices[device];
                // It is woken from D3hot to be put to sleep.
                device.power = 0;
                device.low = if wake_up {
                    LowPower::UntilWakeUp
                } else {
                    LowPower::Plain
                };
                DONE
            }
            Op::LeaveLowPower { device } => {
                self.devices[device].low = LowPower::No;
                DONE
            }
            Op::Access { .. } => DONE,
            Op::Reset { device } if !self.devices[device].spec.resets => refused(libc::EINVAL),
            Op::Reset { device } | Op::SysfsReset { device } | Op::FunctionReset { device } => {
                self.take(op);
                self.devices[device].power = 0;
                DONE
            }
            Op::HotReset { device } | Op::BusReset { device } => {
                self.take(op);
                for member in self.devices[device].spec.set.clone() {
                    self.devices[member].power = 0;
                }
                DONE
            }
            Op::Error { device, severity } => {
                self.tell(op);
                if severity != Severity::Corrected {
                    for member in self.devices[device].spec.set.clone() {
                        self.access(member);
                    }
                }
                DONE
            }
            Op::Pull { device } | Op::PullInStorm { device, .. } => {
                self.take(op);
                self.devices[device].gone = true;
                DONE
            }
            Op::Plug { device } => {
                let this = &mut self.devices[device];
                this.gone = false;
                this.words.clear();
                DONE
            }
            Op::Storm { device, .. } => {
                self.take(op);
                let device = &mut self.devices[device];
                device.power = 0;
                device.low = LowPower::No;
                device.memory = true;
                DONE
            }
        }
    }

    /// The devices that `op` accesses through their fds, or that the test does right after it: only
    /// then the module learns that somebody else woke them.
    fn wake_by(&mut self, op: &Op) {
        match *op {
            Op::Open { device }
            | Op::Export { device, .. }
            | Op::ExportSpoilt { device, .. }
            | Op::Revoke { device, .. }
            | Op::RevokeNothing { device, .. }
            | Op::RevokeId { device, .. }
            | Op::List { device, .. }
            | Op::Events { device, .. }
            | Op::Status { device, .. }
            | Op::MemoryType { device, .. }
            | Op::SteeringTags { device, .. }
            | Op::Alias { device }
            | Op::AliasSpoilt { device, .. }
            | Op::ReadFd { device, .. }
            | Op::WriteFd { device, .. }
            | Op::Memory { device, .. }
            | Op::Master { device, .. }
            | Op::Power { device, .. }
            | Op::EnterLowPower { device, .. }
            | Op::LeaveLowPower { device }
            | Op::Access { device }
            | Op::Reset { device }
            | Op::SysfsReset { device }
            | Op::FunctionReset { device }
            | Op::Storm { device, .. }
            | Op::PullInStorm { device, .. } => self.access(device),
            Op::HotReset { device } | Op::BusReset { device } => {
                for member in self.devices[device].spec.set.clone() {
                    self.access(member);
                }
            }
            _ => {}
        }
    }

    /// The answer that STATUS must give for a buffer.
    #[must_use]
    pub fn status(&self, buffer: usize) -> Seen {
        let state = self.state(buffer);
        let attachments = self.attached(buffer);
        let buffer = &self.buffers[&buffer];
        Seen {
            state,
            memattr: buffer.memattr,
            region: self.devices[buffer.device].spec.bar,
            size: buffer.size(),
            ranges: buffer.ranges.len() as u32,
            attachments,
        }
    }

    /// The mappings that a process made now would have: their numbers from `next` on, and of what
    /// they are copies.
    #[must_use]
    pub fn copies_from(&self, next: usize) -> Vec<(usize, usize)> {
        let ours = self.mappings.iter().filter(|(_, m)| m.process == MAIN);
        let ours = ours.map(|(&number, _)| number);
        ours.enumerate().map(|(i, of)| (next + i, of)).collect()
    }

    fn dma_place(&self, attachment: usize, at: u64) -> Option<(usize, u64)> {
        let attachment = &self.attachments[&attachment];
        let buffer = &self.buffers[&attachment.buffer];
        let place = buffer.place(at).filter(|_| attachment.mapped)?;
        Some((buffer.device, place))
    }

    fn unmap(&mut self, mapping: usize) {
        if let Some(mapping) = self.mappings.remove(&mapping) {
            if let Target::Bar(device) = mapping.target {
                self.maybe_close(device);
            }
        }
    }

    fn buffer(&mut self, number: usize) -> &mut Buffer {
        let buffer = self.buffers.get_mut(&number);
        buffer.expect("a buffer that there is")
    }

    fn mapping(&mut self, number: usize) -> &mut Mapping {
        let mapping = self.mappings.get_mut(&number);
        mapping.expect("a mapping that there is")
    }

    fn attachment(&mut self, number: usize) -> &mut Attachment {
        let attachment = self.attachments.get_mut(&number);
        attachment.expect("an attachment that there is")
    }
}
