// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Whether the memory of a device may be touched.
//!
//! A device has a set of [`Reasons`] why it may not. An event source that is about to take memory
//! away *begins* its reason, drains every buffer, lets the event happen, and *ends* its reason,
//! telling at the same time what the device says now ([`Sampled`]). Reasons that have a beginning
//! and an end are counted, so concurrent events nest; there are no booleans to re-arm.
//!
//! # Samples of the device
//!
//! COMMAND and PMCSR decide, and each is kept in two places that may differ:
//!
//! | where | says | changed by |
//! |---|---|---|
//! | virtual COMMAND (`vconfig`) | [`Sampled::memory_off`]: what the user reads | config writes |
//! | hardware COMMAND | [`Sampled::undecoded`]: what is decoded | the same; resets; the core |
//! | PMCSR | the power state | config writes; resets; power management |
//! | `pdev->current_state` | [`Sampled::sleeping`]: what the kernel believes | the kernel |
//!
//! - Virtual COMMAND has the memory bit and hardware COMMAND lacks it: the function is `undecoded`.
//!   It was reset, or woken from D3hot, and nobody has given back what it lost.
//! - An `undecoded` function may only have been seen half awake. `VFIO_DEVICE_RESET` sets D0 before
//!   `reset_prepare`, and restores config space after that; no event tells of either. A sample
//!   between the two sees D0 and no memory bit. So the next access through the device fd samples
//!   again ([`Access::is_stale`]).
//! - PMCSR may say D3hot while `current_state` says D0 (`Device::wake_if_unnoticed` in
//!   `kmod/src/sys/vfio_pci.rs`): the driver looks after each write of PMCSR, and wakes the
//!   function.
//!
//! The core lends the memory bit of the hardware's COMMAND for the time of some operations
//! (`vfio_pci_memory_lock_and_enable`), with its `memory_lock` held for writing. A bit that is lent
//! must not be believed. So the thread that samples holds that lock for reading. Where it cannot be
//! had, the sampler relies on the lenders having been counted ([`Access::lend`]), and believes
//! nothing good while there is one ([`Access::is_lent`]).
//!
//! A buffer belongs to one [`Epoch`], the time from an open of the device to its close, and is
//! dead once that epoch is over.

/// A set of reasons why memory is inaccessible; the values are those of the uAPI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasons(u32);

impl Reasons {
    /// No reason: accessible.
    pub const NONE: Self = Self(0);
    /// The memory bit of COMMAND is clear.
    pub const MEMORY_OFF: Self = Self(1 << 0);
    /// The device is in reset.
    pub const RESET: Self = Self(1 << 1);
    /// D1, D2, D3hot, low-power feature or system sleep.
    pub const LOW_POWER: Self = Self(1 << 2);
    /// A device error that is not yet recovered.
    pub const ERROR: Self = Self(1 << 3);
    /// A config-space write that may turn memory off is in progress.
    pub const CONFIG_WRITE: Self = Self(1 << 4);

    /// The bits of the uAPI.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether there is no reason.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Both sets together.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all reasons of `other` are in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    fn with(self, other: Self, condition: bool) -> Self {
        if condition { self.union(other) } else { self }
    }
}

/// An event that takes memory away between its beginning and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A reset of the function.
    Reset,
    /// Entry into the low-power feature.
    LowPower,
    /// System sleep.
    Sleep,
    /// A device error, until recovery.
    Error,
    /// A write to COMMAND or PMCSR.
    ConfigWrite,
}

const EVENTS: usize = 5;

impl Event {
    /// Every event.
    pub const ALL: [Self; EVENTS] = [
        Self::Reset,
        Self::LowPower,
        Self::Sleep,
        Self::Error,
        Self::ConfigWrite,
    ];

    /// The reason that holds while the event lasts.
    pub const fn reason(self) -> Reasons {
        match self {
            Self::Reset => Reasons::RESET,
            Self::LowPower | Self::Sleep => Reasons::LOW_POWER,
            Self::Error => Reasons::ERROR,
            Self::ConfigWrite => Reasons::CONFIG_WRITE,
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::Reset => 0,
            Self::LowPower => 1,
            Self::Sleep => 2,
            Self::Error => 3,
            Self::ConfigWrite => 4,
        }
    }
}

/// The device's own statement about its memory, sampled at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sampled {
    /// The memory bit of COMMAND, as the user reads it, is clear, and counts (it does not for a
    /// virtual function).
    pub memory_off: bool,
    /// The memory bit of the hardware's COMMAND is clear, whatever the user reads. Where
    /// `memory_off` holds, it need not be known.
    pub undecoded: bool,
    /// The kernel takes the function for one in D1 or deeper.
    pub sleeping: bool,
    /// The user asked for low power and has not asked to leave it.
    pub low_power: bool,
}

impl Sampled {
    const fn reasons(self) -> Reasons {
        let mut reasons = Reasons::NONE;
        if self.memory_off || self.undecoded {
            reasons = reasons.union(Reasons::MEMORY_OFF);
        }
        if self.sleeping || self.low_power {
            reasons = reasons.union(Reasons::LOW_POWER);
        }
        reasons
    }
}

/// The time from one open of a device to its close. Never used twice by one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(u64);

impl Epoch {
    /// The epoch that is open, as [`Access::word`] said it.
    #[inline]
    pub const fn of_word(word: u64) -> Option<Self> {
        match word {
            NOTHING => None,
            epoch => Some(Self(epoch)),
        }
    }

    /// Whether its buffers may be touched, as a word says that [`Access::reachable`] gave.
    #[inline]
    pub const fn is_reachable(self, word: u64) -> bool {
        self.0 == word
    }
}

/// The word for no epoch. None has this number.
pub const NOTHING: u64 = 0;

/// State of a buffer, as the uAPI has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Accessible.
    Ok,
    /// Inaccessible for these reasons, never empty.
    Revoked(Reasons),
    /// Inaccessible for ever.
    Dead,
}

/// Access to the memory of one device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    epoch: u64,
    open: bool,
    events: [u32; EVENTS],
    sampled: Sampled,
    /// Operations that may have lent the memory bit of the hardware's COMMAND.
    lenders: u32,
    /// Recovery from an error has failed.
    failed: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self::new()
    }
}

impl Access {
    /// A device that was never open.
    pub const fn new() -> Self {
        Self {
            epoch: 0,
            open: false,
            events: [0; EVENTS],
            sampled: Sampled {
                memory_off: false,
                undecoded: false,
                sleeping: false,
                low_power: false,
            },
            lenders: 0,
            failed: false,
        }
    }

    /// The device is about to be opened: the function will be enabled and reset, so a recovery that
    /// has failed before does not matter any more.
    pub fn opening(&mut self) {
        self.failed = false;
    }

    /// The device was opened, and says this; starts an epoch. No event ends: a recovery may be
    /// between two of its phases.
    pub fn open(&mut self, sampled: Sampled) -> Epoch {
        self.epoch = self.epoch.wrapping_add(1).max(1);
        self.open = true;
        self.sampled = sampled;
        Epoch(self.epoch)
    }

    /// The device is about to be closed; ends the epoch, and with it the life of its buffers.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// The current epoch; `None` when the device is not open.
    pub fn epoch(&self) -> Option<Epoch> {
        self.open.then_some(Epoch(self.epoch))
    }

    /// Whether `epoch` is the latest, which may be over.
    pub fn is_latest(&self, epoch: Epoch) -> bool {
        epoch.0 == self.epoch
    }

    /// The latest epoch, which may be over; `None` when the device was never open.
    pub fn latest(&self) -> Option<Epoch> {
        Epoch::of_word(self.epoch)
    }

    /// `event` begins. The caller drains after this and before it lets the event happen.
    pub fn begin(&mut self, event: Event) {
        self.set(event, self.count(event).saturating_add(1));
    }

    /// `event` is over. Without its beginning this is nothing: system sleep may have begun before
    /// the driver was bound.
    pub fn end(&mut self, event: Event) {
        self.set(event, self.count(event).saturating_sub(1));
    }

    /// `event` is over, however often it began: one recovery ends all errors before it.
    pub fn end_all(&mut self, event: Event) {
        self.set(event, 0);
    }

    /// Recovery from the errors that were reported has failed: until `opening`. The caller drains
    /// after this, as after `begin`.
    pub fn fail(&mut self) {
        self.end_all(Event::Error);
        self.failed = true;
    }

    /// Whether the function's config space may be read from the bus. A function that is in reset,
    /// or whose link may be, does not answer, and that is an error of its port. The thread that
    /// ends the event asks.
    pub fn may_ask(&self) -> bool {
        self.count(Event::Reset) == 0 && self.count(Event::Error) == 0
    }

    /// An operation of the core begins that may lend the memory bit of the hardware's COMMAND.
    pub fn lend(&mut self) {
        self.lenders = self.lenders.saturating_add(1);
    }

    /// The operation is over. The thread that made it asks the device then, if what is known [is
    /// stale](Self::is_stale).
    pub fn give_back(&mut self) {
        self.lenders = self.lenders.saturating_sub(1);
    }

    /// Whether the bit may be lent.
    pub fn is_lent(&self) -> bool {
        self.lenders != 0
    }

    /// The device says this now.
    pub fn set_sampled(&mut self, sampled: Sampled) {
        self.sampled = sampled;
    }

    /// The device said this last.
    pub fn sampled(&self) -> Sampled {
        self.sampled
    }

    /// Whether the device may say something else by now although no event has told us: whoever has
    /// had an access through the device fd then asks it.
    ///
    /// - Resets set D0, and LOW_POWER_EXIT ends low power, without a callback.
    /// - A device that was `undecoded` may have been half awake, or not to be believed.
    pub fn is_stale(&self) -> bool {
        let Sampled {
            memory_off,
            undecoded,
            sleeping,
            low_power,
        } = self.sampled;
        sleeping || low_power || undecoded && !memory_off
    }

    /// Why memory may not be touched, whoever asks.
    pub fn reasons(&self) -> Reasons {
        let levels = self.sampled.reasons().with(Reasons::ERROR, self.failed);
        Event::ALL.iter().fold(levels, |reasons, &event| {
            reasons.with(event.reason(), self.count(event) != 0)
        })
    }

    /// Why memory may not be touched by the owner of the device while something keeps the device
    /// awake: low power that the owner asked for is suspended for that time, and its beginning
    /// waits for it.
    pub fn reasons_when_awake(&self) -> Reasons {
        let awake = Sampled {
            low_power: false,
            ..self.sampled
        };
        let levels = awake.reasons().with(Reasons::ERROR, self.failed);
        Event::ALL
            .iter()
            .filter(|event| **event != Event::LowPower)
            .fold(levels, |reasons, &event| {
                reasons.with(event.reason(), self.count(event) != 0)
            })
    }

    /// Which epoch is open, in a word, for a look without a lock: [`Epoch::of_word`].
    pub const fn word(&self) -> u64 {
        if self.open { self.epoch } else { NOTHING }
    }

    /// Which epoch's buffers may be touched now, in a word, for a look without a lock:
    /// [`Epoch::is_reachable`]. A buffer that was revoked for good may not be touched whatever it
    /// says.
    pub fn reachable(&self) -> u64 {
        let events = self.events.iter().fold(0, |all, count| all | count);
        if self.open && events == 0 && !self.failed && self.sampled == Sampled::default() {
            self.epoch
        } else {
            NOTHING
        }
    }

    /// The state of a buffer of `epoch` that was, or was not, `revoked` for good.
    pub fn state(&self, epoch: Epoch, revoked: bool) -> State {
        if revoked || self.epoch() != Some(epoch) {
            return State::Dead;
        }
        match self.reasons() {
            Reasons::NONE => State::Ok,
            reasons => State::Revoked(reasons),
        }
    }

    fn count(&self, event: Event) -> u32 {
        self.events.get(event.index()).copied().unwrap_or(0)
    }

    fn set(&mut self, event: Event, count: u32) {
        if let Some(slot) = self.events.get_mut(event.index()) {
            *slot = count;
        }
    }
}
