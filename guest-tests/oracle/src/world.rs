//! The state of devices, buffers and mappings, as far as the contract goes.

use std::collections::{BTreeMap, BTreeSet};

use barlease_abi::{MEMATTR_WC, REASON_LOW_POWER, REASON_MEMORY_OFF};

use crate::{Op, PAGE, Severity};

/// The properties of a device of the machine.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name.
    pub name: &'static str,
    /// The BAR that is leased. Its contents survive resets.
    pub bar: u32,
    /// Whether it is registers that keep what they have as long as nobody writes them, and not
    /// memory.
    pub registers: bool,
    /// Bytes of the BAR.
    pub size: u64,
    /// Whether it can be reset by itself.
    pub resets: bool,
    /// Whether it has function-level reset.
    pub function_reset: bool,
    /// Whether it has D3hot.
    pub d3hot: bool,
    /// Whether it has D1 and D2, too.
    pub d1_d2: bool,
    /// Whether it completes steering tags, both kinds.
    pub tags: bool,
    /// Where the MSI-X table is: region and offset.
    pub msix: Option<(u32, u64)>,
    /// The devices that a hot reset of this one resets, and that are bound together. Itself among
    /// them.
    pub set: Vec<usize>,
    /// Whether the bus that it is on can be reset.
    pub bus_reset: bool,
    /// Whether it reports errors. Recovery is for the whole set.
    pub reports: bool,
    /// Whether it can be pulled out of its slot, in which it is alone.
    pub slot: bool,
}

/// Whether a device is in low power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowPower {
    /// It is not.
    No,
    /// Until it is told to leave.
    Plain,
    /// Until the next access through its fd.
    UntilWakeUp,
}

/// A device.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its properties.
    pub spec: Spec,
    /// Whether it was pulled out. Its users may still have it open.
    pub gone: bool,
    /// Whether we have its fd.
    pub fd: bool,
    /// Counts opens.
    pub epoch: u64,
    /// Whether it is open: by its fd, or by a mapping.
    pub open: bool,
    /// The memory bit of COMMAND.
    pub memory: bool,
    /// The power state.
    pub power: u8,
    /// Whether it is in low power.
    pub low: LowPower,
    /// How often it was woken from low power.
    pub wake_ups: u64,
    /// Whether it has an alias.
    pub alias: bool,
    /// Whether it has an eventfd for changes.
    pub armed: bool,
    /// The contents of its memory, by offset of the word, as far as is known.
    pub words: BTreeMap<u64, u32>,
}

/// A buffer that somebody refers to.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// The device.
    pub device: usize,
    /// When it was exported.
    pub epoch: u64,
    /// Its ranges: offset in the BAR and length.
    pub ranges: Vec<(u64, u64)>,
    /// Whether its fds can be written to.
    pub writable: bool,
    /// Whether it was revoked for good.
    pub revoked: bool,
    /// The memory type of later mappings.
    pub memattr: u32,
    /// Steering tags: that of 8 bits, that of 16.
    pub tags: [Option<u16>; 2],
    /// The hint with them.
    pub hint: u8,
    /// The processes that have an fd of it.
    pub holders: BTreeSet<usize>,
}

impl Buffer {
    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|(_, length)| length).sum()
    }

    /// The offset in the BAR of an offset in the buffer.
    #[must_use]
    pub fn place(&self, mut at: u64) -> Option<u64> {
        for &(offset, length) in &self.ranges {
            if at < length {
                return Some(offset + at);
            }
            at -= length;
        }
        None
    }
}

/// The memory that a mapping maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A buffer.
    Buffer(usize),
    /// The BAR of a device, through its fd.
    Bar(usize),
}

/// The accesses that a page of a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing.
    None,
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

/// A page of a mapping; `None` where it was unmapped.
pub type Page = Option<Protection>;

/// A mapping.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// The process that has it.
    pub process: usize,
    /// The memory that it maps.
    pub target: Target,
    /// Offset in the buffer or BAR.
    pub offset: u64,
    /// Its pages.
    pub pages: Vec<Page>,
    /// Whether it may be made writable.
    pub may_write: bool,
    /// Whether it is write-combining.
    pub combining: bool,
    /// Whether it is of several parts now, or was.
    pub split: bool,
}

/// The importer, attached.
#[derive(Clone, Copy, Debug)]
pub struct Attachment {
    /// To this buffer.
    pub buffer: usize,
    /// Whether it has a mapping.
    pub mapped: bool,
    /// Whether it keeps it when it is told to give it up.
    pub hold: bool,
    /// Whether it has a fence that is not signalled.
    pub fence: bool,
}

/// State of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Accessible.
    Ok,
    /// For these reasons not accessible.
    Revoked(u32),
    /// Never accessible again.
    Dead,
}

/// This process.
pub const MAIN: usize = 0;

/// Everything that the contract says about what has been done so far.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    /// The devices.
    pub devices: Vec<Device>,
    /// The buffers that somebody refers to.
    pub buffers: BTreeMap<usize, Buffer>,
    /// The mappings.
    pub mappings: BTreeMap<usize, Mapping>,
    /// The attachments.
    pub attachments: BTreeMap<usize, Attachment>,
    /// The processes.
    pub processes: BTreeSet<usize>,
    /// The number that the next new thing gets.
    pub next: usize,
}

impl Oracle {
    /// A machine with these devices, bound and not open, and no process but this.
    #[must_use]
    pub fn new(specs: Vec<Spec>) -> Self {
        let devices = specs.into_iter().map(|spec| Device {
            spec,
            gone: false,
            fd: false,
            epoch: 0,
            open: false,
            memory: false,
            power: 0,
            low: LowPower::No,
            wake_ups: 0,
            alias: false,
            armed: false,
            words: BTreeMap::new(),
        });
        Self {
            devices: devices.collect(),
            processes: BTreeSet::from([MAIN]),
            next: 1,
            ..Self::default()
        }
    }

    pub(crate) fn number(&mut self) -> usize {
        self.next += 1;
        self.next - 1
    }

    /// Why the memory of a device may not be touched.
    #[must_use]
    pub fn reasons(&self, device: usize) -> u32 {
        let device = &self.devices[device];
        let mut reasons = 0;
        if !device.memory {
            reasons |= REASON_MEMORY_OFF;
        }
        if device.power != 0 || device.low != LowPower::No {
            reasons |= REASON_LOW_POWER;
        }
        reasons
    }

    /// Whether a device is there, and we have its fd.
    #[must_use]
    pub fn is_usable(&self, device: usize) -> bool {
        let device = &self.devices[device];
        device.fd && !device.gone
    }

    /// The devices that `op` ends the last use of after they were pulled out, or that are pulled
    /// out when nobody uses them: their slots become empty.
    #[must_use]
    pub fn let_go_by(&self, op: &Op) -> Vec<usize> {
        let mut after = self.clone();
        // Its outcome is of no interest here.
        let _ = after.step(op, &self.predict(op));
        let is_empty = |of: &Self, device: usize| {
            let device = &of.devices[device];
            device.gone && !device.open
        };
        let all = 0..self.devices.len();
        all.filter(|&device| is_empty(&after, device) && !is_empty(self, device))
            .collect()
    }

    /// The state of a buffer.
    #[must_use]
    pub fn state(&self, buffer: usize) -> State {
        let buffer = &self.buffers[&buffer];
        let device = &self.devices[buffer.device];
        if buffer.revoked || device.gone || !self.is_current(buffer) {
            return State::Dead;
        }
        debug_assert!(device.open);
        match self.reasons(buffer.device) {
            0 => State::Ok,
            reasons => State::Revoked(reasons),
        }
    }

    /// Whether a buffer is of the present open of its device.
    #[must_use]
    pub fn is_current(&self, buffer: &Buffer) -> bool {
        let device = &self.devices[buffer.device];
        device.open && device.epoch == buffer.epoch
    }

    /// Whether a touch of a mapping works.
    #[must_use]
    pub fn is_accessible(&self, mapping: usize) -> bool {
        match self.mappings[&mapping].target {
            Target::Buffer(buffer) => self.state(buffer) == State::Ok,
            // The mapping keeps the device open.
            Target::Bar(device) => !self.devices[device].gone && self.reasons(device) == 0,
        }
    }

    /// The device that a mapping is of.
    #[must_use]
    pub fn device_of(&self, mapping: usize) -> usize {
        match self.mappings[&mapping].target {
            Target::Buffer(buffer) => self.buffers[&buffer].device,
            Target::Bar(device) => device,
        }
    }

    /// The offset in the BAR of an offset in a mapping.
    ///
    /// # Panics
    ///
    /// When it is not in the mapping.
    #[must_use]
    pub fn place(&self, mapping: usize, at: u64) -> u64 {
        let mapping = &self.mappings[&mapping];
        assert!(at / PAGE < mapping.pages.len() as u64);
        match mapping.target {
            Target::Buffer(buffer) => {
                let place = self.buffers[&buffer].place(mapping.offset + at);
                place.expect("a mapping lies in its buffer")
            }
            Target::Bar(_) => mapping.offset + at,
        }
    }

    /// The value that must be read at an offset of a mapping, if that is known.
    #[must_use]
    pub fn word(&self, mapping: usize, at: u64) -> Option<u32> {
        let device = &self.devices[self.device_of(mapping)];
        device.words.get(&self.place(mapping, at)).copied()
    }

    /// Mappings that keep a device open.
    #[must_use]
    pub fn bar_mappings(&self, device: usize) -> Vec<usize> {
        let mappings = self.mappings.iter();
        mappings
            .filter(|(_, mapping)| mapping.target == Target::Bar(device))
            .map(|(&number, _)| number)
            .collect()
    }

    /// Importers attached to a buffer.
    #[must_use]
    pub fn attached(&self, buffer: usize) -> u32 {
        let all = self.attachments.values();
        all.filter(|attachment| attachment.buffer == buffer).count() as u32
    }

    /// The buffers whose mappings and DMA mappings `op` takes away, if only for a moment; all of a
    /// device where it is an event of that.
    #[must_use]
    pub fn taken_by(&self, op: &Op) -> Vec<usize> {
        if let Op::Revoke { device, buffer } | Op::RevokeId { device, buffer, .. } = *op {
            return if self.revocable(device, buffer) {
                vec![buffer]
            } else {
                Vec::new()
            };
        }
        let devices = self.devices_hit_by(op);
        let all = self.buffers.iter();
        all.filter(|(_, buffer)| devices.contains(&buffer.device))
            .map(|(&number, _)| number)
            .filter(|&number| self.state(number) == State::Ok)
            .collect()
    }

    /// The mappings that `op` takes away, if only for a moment.
    #[must_use]
    pub fn mappings_taken_by(&self, op: &Op) -> Vec<usize> {
        let devices = self.devices_hit_by(op);
        let buffers = self.taken_by(op);
        let all = self.mappings.iter();
        all.filter(|(_, mapping)| match mapping.target {
            Target::Buffer(buffer) => buffers.contains(&buffer),
            Target::Bar(device) => devices.contains(&device),
        })
        .map(|(&number, _)| number)
        .collect()
    }

    /// The devices of which `op` takes everything away.
    fn devices_hit_by(&self, op: &Op) -> Vec<usize> {
        match *op {
            Op::Memory { device, .. }
            | Op::Master { device, .. }
            | Op::Power { device, .. }
            | Op::EnterLowPower { device, .. }
            | Op::FunctionReset { device }
            | Op::Pull { device }
            | Op::PullInStorm { device, .. } => vec![device],
            Op::Reset { device } | Op::SysfsReset { device }
                if self.devices[device].spec.resets =>
            {
                vec![device]
            }
            Op::Close { device } if self.bar_mappings(device).is_empty() => vec![device],
            Op::HotReset { device }
            | Op::BusReset { device }
            | Op::Storm { device, .. }
            | Op::Error {
                device,
                severity: Severity::NonFatal,
            } => self.devices[device].spec.set.clone(),
            Op::Sleep => (0..self.devices.len()).collect(),
            _ => Vec::new(),
        }
    }

    fn revocable(&self, device: usize, buffer: usize) -> bool {
        let buffer = &self.buffers[&buffer];
        buffer.device == device && self.is_current(buffer) && !buffer.revoked
    }

    /// The importers that `op` must wait for: they hold a mapping, or have a fence.
    #[must_use]
    pub fn waited_for(&self, op: &Op) -> Vec<usize> {
        match *op {
            Op::Error { .. } | Op::RevokeId { nowait: true, .. } => Vec::new(),
            _ => self.told_late_by(op),
        }
    }

    /// The importers that `op` tells, and that have something that is still to end then.
    #[must_use]
    pub fn told_late_by(&self, op: &Op) -> Vec<usize> {
        let taken = self.taken_by(op);
        let all = self.attachments.iter();
        all.filter(|(_, attachment)| taken.contains(&attachment.buffer))
            .filter(|(_, attachment)| (attachment.mapped && attachment.hold) || attachment.fence)
            .map(|(&number, _)| number)
            .collect()
    }

    /// Whether the memory of a device can be reached.
    fn is_reachable(&self, device: usize) -> bool {
        let this = &self.devices[device];
        this.open && !this.gone && self.reasons(device) == 0
    }

    /// The devices whose eventfd must have been signalled by `op`, after which everything is as in
    /// `after`.
    #[must_use]
    pub fn signalled_by(&self, op: &Op, after: &Self) -> Vec<usize> {
        let is_for_a_moment = |device: usize| match *op {
            Op::Reset { .. }
            | Op::SysfsReset { .. }
            | Op::FunctionReset { .. }
            | Op::HotReset { .. }
            | Op::BusReset { .. }
            | Op::Error { .. }
            | Op::Sleep => self.devices_hit_by(op).contains(&device),
            Op::Storm { device: of, .. } => of == device,
            _ => false,
        };
        let lasts = |device: usize| {
            let [before, after] = [self, after].map(|world| &world.devices[device]);
            let same = before.epoch == after.epoch && before.open && after.open;
            before.armed && after.armed && same
        };
        let is_another = |number: usize| {
            let there = after.buffers.contains_key(&number);
            let kind = |world: &Self| std::mem::discriminant(&world.state(number));
            !there || kind(self) != kind(after)
        };
        let changes = |device: usize| {
            let buffers = self.buffers.iter();
            let mut its = buffers.filter(|(_, b)| b.device == device && self.is_current(b));
            let reachable = self.is_reachable(device);
            reachable != after.is_reachable(device)
                || (reachable && is_for_a_moment(device))
                || its.any(|(&number, _)| is_another(number))
        };
        let is_set = |device: usize| matches!(*op, Op::Events { device: of, .. } if of == device);
        let all = 0..self.devices.len();
        all.filter(|&device| lasts(device) && !is_set(device) && changes(device))
            .collect()
    }

    /// Whether a mapping of this buffer made now is write-combining.
    #[must_use]
    pub fn is_combining(&self, buffer: usize) -> bool {
        self.buffers[&buffer].memattr == MEMATTR_WC
    }

    /// Forgets buffers that nobody refers to.
    pub(crate) fn prune(&mut self) {
        let mapped = |number: usize| {
            let mut mappings = self.mappings.values();
            mappings.any(|mapping| mapping.target == Target::Buffer(number))
        };
        let attached = |number: usize| self.attached(number) > 0;
        let gone: Vec<_> = self
            .buffers
            .iter()
            .filter(|(number, buffer)| {
                buffer.holders.is_empty() && !mapped(**number) && !attached(**number)
            })
            .map(|(&number, _)| number)
            .collect();
        for number in gone {
            self.buffers.remove(&number);
        }
    }
}
