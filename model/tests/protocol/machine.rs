// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Threads, locks and what they share, as a `stateright` model.
//!
//! Each thread runs a program of instructions, of which each is one atomic step, together with the
//! locks that it gives back after it; every order of the steps of all threads is tried. A lock is
//! as strict as the kernel's may be: a writer that waits keeps readers out that come after it.

use barlease_model::access::{Access, Epoch, Event, Sampled, State};
use stateright::{Model, Property};

/// Buffers.
pub(crate) const BUFFERS: usize = 2;
/// VMAs of a buffer.
pub(crate) const VMAS: usize = 2;
/// Importers.
pub(crate) const IMPORTERS: usize = 2;

/// A lock. The order in `kmod/src/leases.rs` is not assumed: breaking it is what a deadlock would
/// come of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lock {
    /// A process's `mmap_lock`.
    Mmap,
    /// The PCI core's device lock: one reset of a function at a time.
    Device,
    /// The vfio core's `memory_lock`.
    Memory,
    /// The PCI core's `pci_bus_sem`, which every hot-plug takes.
    Bus,
    /// Not a lock of the kernel's, but as one: a run-time sleep or wake-up of the device is under
    /// way (`RPM_SUSPENDING`, `RPM_RESUMING`), and whoever wants to wake it waits for that.
    Transition,
    /// `Buffer::live`.
    Live(usize),
    /// The reservation lock of a buffer's dma-buf.
    Resv(usize),
    /// `Buffer::gate`, which faults are inside of as readers. Nobody writes it: a thread that takes
    /// memory away waits until nobody is inside, and keeps nobody out.
    Gate(usize),
    /// `Leases::access`.
    Access,
}

impl Lock {
    const COUNT: usize = 6 + 3 * BUFFERS;

    fn index(self) -> usize {
        match self {
            Self::Mmap => 0,
            Self::Device => 1,
            Self::Memory => 2,
            Self::Access => 3,
            Self::Transition => 4,
            Self::Bus => 5,
            Self::Live(buffer) => 6 + buffer,
            Self::Resv(buffer) => 6 + BUFFERS + buffer,
            Self::Gate(buffer) => 6 + 2 * BUFFERS + buffer,
        }
    }
}

/// How a lock is taken. A mutex is always written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// With other readers.
    Read,
    /// Alone.
    Write,
}

/// One atomic step of a thread.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Instr {
    /// Takes a lock when that can be had.
    Take(Lock, Mode),
    /// Takes a lock, or goes elsewhere if that cannot be had.
    TryTake(Lock, Mode, usize),
    /// Gives a lock back.
    Give(Lock),
    /// Changes something.
    Do(Act),
    /// Goes elsewhere unless something is so.
    Unless(Cond, usize),
    /// Goes elsewhere.
    Goto(usize),
    /// Waits until something is so.
    Await(Cond),
}

/// The state that a step changes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// A change of `Access`, with its lock held for writing.
    Access(Change),
    /// A thread looks at what the device says, to set it later (a planted bug).
    Sample,
    /// An allocation, which may wait as long as it likes.
    Alloc,
    /// `vmas` of a buffer, and of the leases, is counted up or down.
    Vma { buffer: usize, opened: bool },
    /// A page-table entry.
    Entry {
        buffer: usize,
        vma: usize,
        there: bool,
    },
    /// `attachments` of both is counted up or down.
    Attached { buffer: usize, yes: bool },
    /// An importer's mapping, which `mappings` counts.
    Mapped { importer: usize, yes: bool },
    /// An importer's fence.
    Fence { importer: usize, pending: bool },
    /// A fence that somebody adds who has no mapping.
    Added { buffer: usize, pending: bool },
    /// Takes a snapshot of the fences that a buffer has.
    Snapshot(usize),
    /// Waits for fences that were added after that (a planted bug).
    Endless,
    /// A process is killed.
    Kill,
    /// The PCI core wakes the device after system sleep, unless somebody is at it.
    SystemResume,
    /// A buffer that is revoked for good has nothing left that is to be waited for.
    Drained(usize),
    /// Importers that have a mapping were told, and will not be waited for.
    Excuse(Option<usize>),
    /// They were waited for.
    Unexcuse,
    /// `dma_buf_invalidate_mappings`: importers that are quick undo their mappings here.
    Invalidate(usize),
    /// A look at the dma-buf of a buffer.
    Look(usize),
    /// A buffer is marked revoked.
    MarkRevoked(usize),
    /// Writes down what may be touched, as `Access` says.
    Publish,
    /// Notes that, to write it down later (a planted bug).
    NoteReachable,
    /// Writes that down.
    PublishNoted,
    /// A buffer is made, of the epoch that is now.
    Make(usize),
    /// It is in the table.
    Add(usize),
    /// The way to its dma-buf is closed.
    Unlive(usize),
    /// It is in the table no more.
    Remove(usize),
    /// `waits |= invalidate()` of a drain, and of a revocation.
    NoteWaits(usize),
    /// Forgets that, and what was looked up.
    NoteNothing,
    /// Looks up which buffers are in the table.
    LookUp,
    /// Writes down whether the device sleeps, as `Access` says.
    StoreAsleep,
    /// The same, but what decodes nothing does not count (a planted bug).
    StoreAsleepOnly,
    /// Notes whether the core has the device in low power, to set it later.
    NoteLowPower,
    /// Notes what `Access` says the device said, with its lock held, to write it down later (a
    /// planted bug).
    NoteLevels,
    /// Writes that down.
    StoreNoted,
    /// A change of the hardware, or of what the core keeps of it.
    Device(Change2),
    /// REVOKE has returned: the buffer is gone for good.
    Gone(usize),
    /// It has returned without waiting.
    Leaving(usize),
    /// The core closed the device.
    Disabled(bool),
    /// A user of a buffer, who has a reference to its dma-buf, has none any more.
    Done(usize),
    /// Something that must be possible was.
    Saw(Sight),
}

/// The knowledge of a thread that samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// It holds `memory_lock`.
    Locked,
    /// It relies on lenders being counted.
    Counted,
    /// Nothing, and believes what it sees (a planted bug).
    Careless,
    /// It holds the lock, and asks a function that is in reset, too (a planted bug).
    Always,
}

/// The outcome of a recovery that has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    UntilOpened,
    /// The error is over (a planted bug).
    Forgotten,
    /// It is never over (a planted bug).
    ForGood,
}

/// A change of `Access`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Begin(Event),
    End(Event),
    /// Samples the device and ends an event.
    SampleAndEnd(Event, Look),
    /// Samples the device and ends an event however often it began (a planted bug).
    SampleAndEndAll(Event),
    /// Sets what was sampled before and ends an event (a planted bug).
    SetAndEnd(Event),
    /// Samples the device.
    Sample(Look),
    /// Ends an event, and samples what it may have changed of the hardware.
    EndAndResample(Event, Look),
    /// The same, with no look whether the device decodes (a planted bug).
    EndAndForget(Event),
    /// The work of `woken`: samples the hardware, and sets whether low power was noted to go on.
    Woken,
    /// Takes the device for awake, whatever it says (a planted bug).
    WokenForGood,
    /// Recovery has failed.
    Fail(Failure),
    /// Says that memory is off (a planted bug).
    MemoryOff,
    /// Ends every event at once (a planted bug).
    EndEverything,
    /// A lender begins, and ends.
    Lend,
    GiveBack,
    Opening,
    Open,
    /// Ends errors, too (a planted bug).
    OpenEndsErrors,
    /// Sets what was sampled before (a planted bug).
    SetAndOpen,
    Close,
}

/// A change of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change2 {
    /// The core writes COMMAND, both of it.
    Memory(bool),
    InReset(bool),
    /// The link is reset, without a word to the driver; what it loses nobody restores.
    LinkReset(bool),
    /// Between `error_detected` and the end of recovery.
    Recovering(bool),
    /// Recovery has failed.
    Failed,
    /// The core lends the memory bit, and takes it back.
    Lent(bool),
    /// The core's low power begins: until a wake-up, or until its user ends it.
    LowPower {
        until_wake_up: bool,
    },
    /// It ends.
    LeaveLowPower,
    /// It ends if it was until a wake-up.
    WakeUp,
    /// D3hot.
    FallAsleep,
    /// D0. A device that has slept decodes nothing yet.
    HalfAwake,
    /// It has back what it lost by its sleep.
    Restored,
    /// D0, of a function that loses nothing by its sleep.
    Awake,
    /// Run-time power management has put it to sleep, or has woken it.
    Suspended(bool),
    /// Config space is saved, for whoever restores it next.
    Saved,
    /// Somebody keeps it awake, or does so no more.
    Held(bool),
    /// It was pulled out.
    Gone,
    /// The memory of a device that was pulled out was taken away from everybody.
    Removed,
}

/// Something that is so or not.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cond {
    /// `Buffer::is_reachable`; `access` need not be locked.
    Reachable(usize),
    /// It is not `Dead`; the lock is held.
    Alive(usize),
    /// There is an epoch; the lock is held.
    IsOpen,
    /// `is_asleep()`; no lock is held.
    IsAsleep,
    /// The virtual COMMAND says that memory is off.
    MemoryIsOff,
    HasVmas(usize),
    IsAttached(usize),
    /// `mappings` is not 0.
    HasMappings(usize),
    HasNoMappings(usize),
    /// There is a fence that has not signalled.
    FencePending(usize),
    /// None.
    FencesSignalled(usize),
    /// All of the snapshot have.
    SnapshotSignalled,
    /// Or the process was killed.
    SnapshotSignalledOrKilled,
    HasNoMappingsOrKilled(usize),
    IsKilled,
    IsNotRevoked(usize),
    /// It is not known to have drained.
    MayDrain(usize),
    /// It is not revoked for good, or has mappings (a planted bug).
    SeemsToDrain(usize),
    IsLive(usize),
    /// It was in the table when this thread looked.
    InBatch(usize),
    IsMapped(usize),
    /// `Leases::vmas` is not 0.
    AnyVmas,
    /// `Leases::attachments` is not 0.
    AnyAttached,
    /// The drain of this thread has something left to wait for.
    NotedWaits,
    /// No thread uses the fd of the device.
    FdIdle,
    /// Nor will any open it.
    OwnersGone,
    /// No fault is inside of the gate of a buffer.
    NobodyInside(usize),
    /// Run-time power management may put the device to sleep.
    MaySuspend,
    /// It has done so.
    IsSuspended,
    /// It has done so or is about to, or is about to wake it: not `RPM_ACTIVE`.
    IsInactive,
    /// `is_gone()`.
    IsGone,
    /// Nobody has a reference to a buffer's dma-buf.
    Unused(usize),
}

/// Things that must be possible: else the model would prove nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sight {
    Entry,
    Sigbus,
    Mapped,
    Told,
}

/// A buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Buffer {
    pub(crate) epoch: Option<Epoch>,
    pub(crate) revoked: bool,
    pub(crate) vmas: u8,
    pub(crate) entries: [bool; VMAS],
    pub(crate) attachments: u8,
    pub(crate) mappings: u8,
    pub(crate) in_table: bool,
    pub(crate) live: bool,
    /// References to its dma-buf.
    pub(crate) users: u8,
    /// Somebody's REVOKE has returned.
    pub(crate) gone: bool,
    /// Nothing is left that its REVOKE would wait for.
    pub(crate) drained: bool,
    /// A fence of somebody who has no mapping.
    pub(crate) added: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Importer {
    pub(crate) buffer: usize,
    /// Undoes its mapping when it is told.
    pub(crate) quick: bool,
    pub(crate) mapped: bool,
    pub(crate) fence: bool,
    /// It was told by somebody who does not wait for it.
    pub(crate) excused: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Semaphore {
    /// Which threads hold it, a bit each.
    readers: u8,
    writer: Option<u8>,
    /// Which threads wait to write.
    waiting: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Thread {
    at: u8,
    /// The buffers that it has looked up.
    batch: [bool; BUFFERS],
    /// Whether something is left to wait for.
    waits: bool,
    /// The fences that it waits for, a bit each: those of importers, those added to buffers.
    snapshot: u8,
    /// The state that it sampled.
    levels: Sampled,
    /// The state that it noted.
    reachable: u64,
    stale: bool,
}

/// The device as it really is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device {
    /// The memory bit of the virtual COMMAND.
    memory: bool,
    /// That of the hardware's, as it will be when nothing is lent.
    hardware: bool,
    /// It is lent.
    lent: bool,
    /// The part that D3hot has left of it.
    saved: bool,
    in_reset: bool,
    link_reset: bool,
    recovering: bool,
    /// Recovery has failed, and the device was not opened since; and that is known.
    failing: bool,
    failed: bool,
    /// The core's `pm_runtime_engaged`.
    low_power: bool,
    until_wake_up: bool,
    sleeping: bool,
    /// It is awake, and was not given back yet what it lost by its sleep.
    half_awake: bool,
    /// `RPM_SUSPENDED`.
    suspended: bool,
    /// The threads that keep it awake, but for the core as long as it is not in low power.
    holds: u8,
    /// The saved config space is the one that a reset has left.
    saved_nothing: bool,
    /// And that was restored.
    lost: bool,
    /// It was pulled out.
    gone: bool,
    /// And taken away: its addresses may be given to something else.
    removed: bool,
    /// The function is enabled: open, as the core sees it.
    enabled: bool,
}

impl Device {
    /// Whether it decodes memory, and goes on to.
    fn decodes(&self) -> bool {
        self.hardware && !self.is_deaf() && !self.half_awake && !self.lost
    }

    /// Whether it answers nobody.
    fn is_deaf(&self) -> bool {
        self.in_reset || self.link_reset
    }

    /// Whether the device says that it decodes memory. One that was pulled out says nothing, but
    /// not each is asked: a virtual function has no memory bit (`Function::decodes_memory`).
    fn says_it_decodes(&self) -> bool {
        self.decodes() || self.lent && !self.is_deaf()
    }

    fn change(&mut self, change: Change2) {
        match change {
            Change2::Memory(on) => {
                self.memory = on;
                self.hardware = on;
            }
            Change2::InReset(true) => self.in_reset = true,
            Change2::InReset(false) => {
                self.in_reset = false;
                self.lost |= self.saved_nothing;
            }
            Change2::LinkReset(begins) => {
                self.link_reset = begins;
                self.hardware = false;
            }
            Change2::Recovering(yes) => self.recovering = yes,
            Change2::Failed => self.failed = self.failing,
            Change2::Lent(yes) => self.lent = yes,
            Change2::LowPower { until_wake_up } => {
                self.low_power = true;
                self.until_wake_up = until_wake_up;
            }
            Change2::LeaveLowPower => self.low_power = false,
            Change2::WakeUp => self.low_power &= !self.until_wake_up,
            Change2::FallAsleep => {
                if !self.sleeping {
                    self.saved = self.hardware;
                }
                self.sleeping = true;
            }
            Change2::HalfAwake => {
                self.half_awake = self.sleeping;
                self.sleeping = false;
            }
            Change2::Restored => {
                if self.half_awake {
                    self.hardware = self.saved;
                }
                self.half_awake = false;
            }
            Change2::Awake => self.sleeping = false,
            Change2::Suspended(yes) => self.suspended = yes,
            Change2::Saved => self.saved_nothing = self.in_reset,
            Change2::Held(yes) => count(&mut self.holds, yes),
            Change2::Gone => self.gone = true,
            Change2::Removed => self.removed = self.gone,
        }
    }
}

/// The use that a thread makes of the device fd, which is closed when nobody uses it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Uses {
    /// Nothing.
    Nothing,
    /// It uses it.
    Fd,
    /// It closes it, and may open it again.
    Open,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    access: Access,
    /// `Leases::reachable`.
    reachable: u64,
    /// `Leases::asleep`.
    asleep: bool,
    locks: [Semaphore; Lock::COUNT],
    pub(crate) buffers: [Buffer; BUFFERS],
    pub(crate) importers: [Importer; IMPORTERS],
    pub(crate) device: Device,
    threads: Vec<Thread>,
    sights: [bool; 4],
    /// Somebody was killed.
    killed: bool,
    /// Somebody looked at a dma-buf after its release.
    dangling: bool,
    /// Somebody asked a function that was in reset.
    asked_the_deaf: bool,
    /// Somebody made others wait who must not.
    tied: bool,
    /// Somebody waited for a fence that was added after it had begun to.
    endless: bool,
}

/// A thread's program.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// The name, for traces.
    pub(crate) name: String,
    /// Its program, one step after the other.
    pub(crate) steps: Vec<(Instr, &'static str)>,
    /// Its use of the device fd.
    pub(crate) uses: Uses,
}

/// Programs that run at once, from a device that is open and usable, with buffers that are or are
/// to be exported.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    /// The threads.
    pub(crate) programs: Vec<Program>,
    /// How everything is at first.
    pub(crate) start: World,
}

impl World {
    /// An open device with memory on, and no buffers.
    pub(crate) fn new() -> Self {
        let mut access = Access::new();
        access.open(Sampled::default());
        Self {
            reachable: access.reachable(),
            access,
            asleep: false,
            locks: Default::default(),
            buffers: Default::default(),
            importers: Default::default(),
            device: Device {
                memory: true,
                hardware: true,
                lent: false,
                saved: true,
                in_reset: false,
                link_reset: false,
                recovering: false,
                failing: false,
                failed: false,
                low_power: false,
                until_wake_up: false,
                sleeping: false,
                half_awake: false,
                suspended: false,
                holds: 0,
                saved_nothing: false,
                lost: false,
                gone: false,
                removed: false,
                enabled: true,
            },
            threads: Vec::new(),
            sights: [false; 4],
            killed: false,
            dangling: false,
            asked_the_deaf: false,
            tied: false,
            endless: false,
        }
    }

    /// The device was reset and not restored, which is known.
    pub(crate) fn undecoded(&mut self) {
        self.device.hardware = false;
        self.access.set_sampled(Sampled {
            undecoded: true,
            ..Sampled::default()
        });
        self.asleep = self.access.is_stale();
        self.reachable = self.access.reachable();
    }

    /// A buffer that is exported.
    pub(crate) fn export(&mut self, buffer: usize) {
        let this = &mut self.buffers[buffer];
        this.epoch = self.access.epoch();
        this.live = true;
        this.in_table = true;
    }

    /// `sampling::is_undecoded`.
    fn is_undecoded(&mut self, look: Look) -> bool {
        let asks = !self.device.sleeping && self.access.may_ask();
        if !asks && look != Look::Always {
            return self.access.sampled().undecoded;
        }
        self.asked_the_deaf |= self.device.is_deaf();
        look == Look::Counted && self.access.is_lent() || !self.device.says_it_decodes()
    }

    /// `sampling::sample`.
    fn sample(&mut self, look: Look) -> Sampled {
        let memory_off = !self.device.memory;
        Sampled {
            memory_off,
            undecoded: !memory_off && self.is_undecoded(look),
            sleeping: self.device.sleeping,
            low_power: self.device.low_power,
        }
    }

    /// `sampling::resample`.
    fn resample(&mut self, look: Look) {
        if self.access.epoch().is_none() {
            return;
        }
        let sampled = Sampled {
            undecoded: self.is_undecoded(look),
            sleeping: self.device.sleeping,
            ..self.access.sampled()
        };
        self.access.set_sampled(sampled);
    }

    fn set_sample(&mut self, look: Look) {
        let sampled = self.sample(look);
        self.access.set_sampled(sampled);
    }

    fn state(&self, buffer: usize) -> State {
        let this = &self.buffers[buffer];
        match this.epoch {
            Some(epoch) => self.access.state(epoch, this.revoked),
            None => State::Dead,
        }
    }

    /// Whether the memory may be reached, as the hardware is.
    fn usable(&self) -> bool {
        let device = &self.device;
        let there = device.enabled && !device.removed && !device.recovering && !device.failed;
        there && device.memory && device.decodes() && !device.low_power && !device.sleeping
    }

    /// Whether a process or a device reaches a buffer.
    fn reached(&self, buffer: usize) -> bool {
        let entries = self.buffers[buffer].entries.contains(&true);
        let mut importers = self.importers.iter();
        entries || importers.any(|i| i.buffer == buffer && (i.mapped || i.fence) && !i.excused)
    }

    fn is(&self, thread: usize, cond: Cond, programs: &[Program]) -> bool {
        let buffers = &self.buffers;
        match cond {
            Cond::Reachable(buffer) => {
                let this = &buffers[buffer];
                let epoch = this.epoch;
                !this.revoked && epoch.is_some_and(|epoch| epoch.is_reachable(self.reachable))
            }
            Cond::Alive(buffer) => self.state(buffer) != State::Dead,
            Cond::IsOpen => self.access.epoch().is_some(),
            Cond::IsAsleep => self.asleep,
            Cond::MemoryIsOff => !self.device.memory,
            Cond::HasVmas(buffer) => buffers[buffer].vmas != 0,
            Cond::IsAttached(buffer) => buffers[buffer].attachments != 0,
            Cond::HasMappings(buffer) => buffers[buffer].mappings != 0,
            Cond::HasNoMappings(buffer) => buffers[buffer].mappings == 0,
            Cond::FencePending(buffer) => self.fence_pending(buffer),
            Cond::FencesSignalled(buffer) => !self.fence_pending(buffer),
            Cond::SnapshotSignalled => self.threads[thread].snapshot == 0,
            Cond::SnapshotSignalledOrKilled => self.threads[thread].snapshot == 0 || self.killed,
            Cond::HasNoMappingsOrKilled(buffer) => buffers[buffer].mappings == 0 || self.killed,
            Cond::IsKilled => self.killed,
            Cond::IsNotRevoked(buffer) => !buffers[buffer].revoked,
            Cond::MayDrain(buffer) => !buffers[buffer].drained,
            Cond::SeemsToDrain(buffer) => !buffers[buffer].revoked || buffers[buffer].mappings != 0,
            Cond::IsLive(buffer) => buffers[buffer].live,
            Cond::InBatch(buffer) => self.threads[thread].batch[buffer],
            Cond::IsMapped(importer) => self.importers[importer].mapped,
            Cond::AnyVmas => buffers.iter().any(|buffer| buffer.vmas != 0),
            Cond::AnyAttached => buffers.iter().any(|buffer| buffer.attachments != 0),
            Cond::NotedWaits => self.threads[thread].waits,
            Cond::FdIdle => self.are_over(programs, |uses| uses == Uses::Fd),
            Cond::OwnersGone => self.are_over(programs, |uses| uses != Uses::Nothing),
            Cond::NobodyInside(buffer) => self.locks[Lock::Gate(buffer).index()].readers == 0,
            Cond::MaySuspend => self.device.low_power && self.device.holds == 0,
            Cond::IsSuspended => self.device.suspended,
            Cond::IsInactive => {
                let transition = &self.locks[Lock::Transition.index()];
                self.device.suspended || transition.writer.is_some()
            }
            Cond::IsGone => self.device.gone,
            Cond::Unused(buffer) => buffers[buffer].users == 0,
        }
    }

    /// Whether every thread is that uses the fd in such a way.
    fn are_over(&self, programs: &[Program], which: impl Fn(Uses) -> bool) -> bool {
        let mut threads = self.threads.iter().zip(programs);
        threads.all(|(thread, program)| {
            !which(program.uses) || usize::from(thread.at) == program.steps.len()
        })
    }

    fn fence_pending(&self, buffer: usize) -> bool {
        let mut importers = self.importers.iter();
        let added = self.buffers[buffer].added;
        added || importers.any(|importer| importer.buffer == buffer && importer.fence)
    }

    /// The bit of a fence in a snapshot.
    fn fence_of_importer(importer: usize) -> u8 {
        1 << importer
    }

    fn fence_added(buffer: usize) -> u8 {
        1 << (IMPORTERS + buffer)
    }

    /// A fence is there, or signals: then nobody waits for it any more.
    fn set_fence(&mut self, bit: u8, pending: bool) {
        if !pending {
            for thread in &mut self.threads {
                thread.snapshot &= !bit;
            }
        }
    }

    fn make(&mut self, thread: usize, act: Act) {
        match act {
            Act::Access(change) => self.change(thread, change),
            Act::Sample => self.threads[thread].levels = self.sample(Look::Locked),
            Act::Alloc => {
                let gates = (0..BUFFERS).map(Lock::Gate);
                self.tied |= gates.into_iter().any(|gate| self.holds(thread, gate));
            }
            Act::Vma { buffer, opened } => count(&mut self.buffers[buffer].vmas, opened),
            Act::Entry { buffer, vma, there } => self.buffers[buffer].entries[vma] = there,
            Act::Attached { buffer, yes } => count(&mut self.buffers[buffer].attachments, yes),
            Act::Mapped { importer, yes } => self.set_mapped(importer, yes),
            Act::Fence { importer, pending } => {
                self.set_fence(Self::fence_of_importer(importer), pending);
                let this = &mut self.importers[importer];
                this.fence = pending;
                this.excused &= this.mapped || this.fence;
            }
            Act::Added { buffer, pending } => {
                self.set_fence(Self::fence_added(buffer), pending);
                self.buffers[buffer].added = pending;
            }
            Act::Snapshot(buffer) => {
                let mut snapshot = 0;
                for (number, importer) in self.importers.iter().enumerate() {
                    if importer.buffer == buffer && importer.fence {
                        snapshot |= Self::fence_of_importer(number);
                    }
                }
                if self.buffers[buffer].added {
                    snapshot |= Self::fence_added(buffer);
                }
                self.threads[thread].snapshot |= snapshot;
            }
            Act::Endless => self.endless = true,
            Act::Kill => self.killed = true,
            Act::SystemResume => {
                let idle = |lock: Lock| {
                    let semaphore = &self.locks[lock.index()];
                    semaphore.writer.is_none() && semaphore.readers == 0
                };
                let locks = [Lock::Memory, Lock::Device, Lock::Transition];
                if locks.into_iter().all(idle) && !self.device.suspended {
                    self.device.change(Change2::HalfAwake);
                    self.device.change(Change2::Restored);
                }
            }
            Act::Drained(buffer) => self.buffers[buffer].drained = true,
            Act::Excuse(buffer) => {
                for importer in &mut self.importers {
                    let told = buffer.is_none_or(|buffer| buffer == importer.buffer);
                    importer.excused |= told && (importer.mapped || importer.fence);
                }
            }
            Act::Unexcuse => self.importers.iter_mut().for_each(|i| i.excused = false),
            Act::Invalidate(buffer) => {
                for importer in 0..IMPORTERS {
                    let this = &self.importers[importer];
                    if this.buffer == buffer && this.quick && this.mapped {
                        self.set_mapped(importer, false);
                    }
                }
                self.sights[Sight::Told as usize] = true;
            }
            Act::Look(buffer) => self.dangling |= !self.buffers[buffer].live,
            Act::MarkRevoked(buffer) => self.buffers[buffer].revoked = true,
            Act::Make(buffer) => {
                self.buffers[buffer].epoch = self.access.epoch();
                self.buffers[buffer].live = true;
            }
            Act::Add(buffer) => self.buffers[buffer].in_table = true,
            Act::Unlive(buffer) => self.buffers[buffer].live = false,
            Act::Remove(buffer) => self.buffers[buffer].in_table = false,
            Act::NoteWaits(buffer) => {
                let waits = self.buffers[buffer].mappings != 0 || self.fence_pending(buffer);
                self.threads[thread].waits |= waits;
            }
            Act::Publish => self.reachable = self.access.reachable(),
            Act::NoteReachable => self.threads[thread].reachable = self.access.reachable(),
            Act::PublishNoted => self.reachable = self.threads[thread].reachable,
            Act::NoteNothing => {
                self.threads[thread].waits = false;
                self.threads[thread].snapshot = 0;
                self.threads[thread].batch = [false; BUFFERS];
            }
            Act::LookUp => {
                for buffer in 0..BUFFERS {
                    self.threads[thread].batch[buffer] = self.buffers[buffer].in_table;
                }
            }
            Act::StoreAsleep => self.asleep = self.access.is_stale(),
            Act::StoreAsleepOnly => {
                let levels = self.access.sampled();
                self.asleep = levels.sleeping || levels.low_power;
            }
            Act::NoteLevels => self.threads[thread].stale = self.access.is_stale(),
            Act::NoteLowPower => self.threads[thread].levels.low_power = self.device.low_power,
            Act::StoreNoted => self.asleep = self.threads[thread].stale,
            Act::Device(change) => self.device.change(change),
            Act::Gone(buffer) => self.buffers[buffer].gone = true,
            Act::Leaving(buffer) => {
                self.make(thread, Act::Excuse(Some(buffer)));
                self.buffers[buffer].gone = true;
            }
            Act::Disabled(yes) => {
                self.device.enabled = !yes;
                if !yes {
                    self.device.memory = true;
                    self.device.hardware = true;
                    self.device.low_power = false;
                    self.device.sleeping = false;
                    self.device.half_awake = false;
                }
            }
            Act::Done(buffer) => count(&mut self.buffers[buffer].users, false),
            Act::Saw(sight) => self.sights[sight as usize] = true,
        }
    }

    fn change(&mut self, thread: usize, change: Change) {
        let sampled = self.threads[thread].levels;
        match change {
            Change::Begin(event) => self.access.begin(event),
            Change::End(event) => self.access.end(event),
            Change::SampleAndEnd(event, look) => {
                self.set_sample(look);
                self.access.end(event);
            }
            Change::SampleAndEndAll(event) => {
                self.set_sample(Look::Locked);
                self.access.end_all(event);
            }
            Change::SetAndEnd(event) => {
                self.access.set_sampled(sampled);
                self.access.end(event);
            }
            Change::Sample(look) => self.set_sample(look),
            Change::EndAndResample(event, look) => {
                self.end(event);
                self.resample(look);
            }
            Change::EndAndForget(event) => {
                self.end(event);
                self.resample(Look::Locked);
                self.access.set_sampled(Sampled {
                    undecoded: false,
                    ..self.access.sampled()
                });
            }
            // Of a device that is not open nothing is noted but that: it counts for nothing.
            Change::Woken => {
                self.resample(Look::Locked);
                self.access.set_sampled(Sampled {
                    low_power: sampled.low_power,
                    ..self.access.sampled()
                });
            }
            Change::WokenForGood => self.access.set_sampled(Sampled {
                memory_off: !self.device.memory,
                ..Sampled::default()
            }),
            Change::Fail(failure) => {
                self.device.recovering = false;
                self.device.failing = true;
                match failure {
                    Failure::UntilOpened => self.access.fail(),
                    Failure::Forgotten => self.access.end_all(Event::Error),
                    Failure::ForGood => self.access.begin(Event::Error),
                }
            }
            Change::Opening => {
                self.device.failing = false;
                self.device.failed = false;
                self.access.opening();
            }
            Change::MemoryOff => self.access.set_sampled(Sampled {
                memory_off: true,
                ..self.access.sampled()
            }),
            Change::EndEverything => {
                self.set_sample(Look::Locked);
                let access = &mut self.access;
                Event::ALL.iter().for_each(|&event| access.end_all(event));
            }
            Change::Lend => self.access.lend(),
            Change::GiveBack => self.access.give_back(),
            Change::Open => {
                let sampled = self.sample(Look::Locked);
                self.access.open(sampled);
            }
            Change::SetAndOpen => {
                self.access.open(sampled);
            }
            Change::OpenEndsErrors => {
                let sampled = self.sample(Look::Locked);
                self.access.open(sampled);
                self.access.end_all(Event::Error);
            }
            Change::Close => self.access.close(),
        }
    }

    /// One recovery ends all errors; of everything else one end ends one.
    fn end(&mut self, event: Event) {
        match event {
            Event::Error => self.access.end_all(event),
            _ => self.access.end(event),
        }
    }

    fn holds(&self, thread: usize, lock: Lock) -> bool {
        let semaphore = &self.locks[lock.index()];
        semaphore.writer == Some(thread as u8) || semaphore.readers & 1 << thread != 0
    }

    /// `Buffer::map` and `Buffer::unmap`, as far as they count.
    fn set_mapped(&mut self, importer: usize, yes: bool) {
        let this = &mut self.importers[importer];
        this.mapped = yes;
        this.excused &= this.mapped || this.fence;
        let buffer = &mut self.buffers[self.importers[importer].buffer];
        count(&mut buffer.mappings, yes);
    }
}

/// Whether a step can be made together with the one before it: nobody can see the difference, but
/// that a lock is free earlier.
fn is_free(instr: Instr) -> bool {
    matches!(
        instr,
        Instr::Goto(_) | Instr::Give(_) | Instr::Do(Act::Saw(_) | Act::NoteNothing)
    )
}

fn count(number: &mut u8, up: bool) {
    *number = if up { *number + 1 } else { *number - 1 };
}

impl Protocol {
    fn can_take(semaphore: &Semaphore, thread: usize, mode: Mode) -> bool {
        let others = !(1 << thread);
        match mode {
            Mode::Read => semaphore.writer.is_none() && semaphore.waiting & others == 0,
            Mode::Write => semaphore.writer.is_none() && semaphore.readers == 0,
        }
    }

    fn instr(&self, world: &World, thread: usize) -> Option<Instr> {
        let at = usize::from(world.threads[thread].at);
        self.programs[thread].steps.get(at).map(|(instr, _)| *instr)
    }

    fn is_over(&self, world: &World) -> bool {
        (0..self.programs.len()).all(|thread| self.instr(world, thread).is_none())
    }

    /// Whether a thread has a step to make.
    fn can_step(&self, world: &World, thread: usize) -> bool {
        match self.instr(world, thread) {
            None => false,
            Some(Instr::Take(lock, mode)) => {
                let semaphore = &world.locks[lock.index()];
                // Or it joins those who wait.
                Self::can_take(semaphore, thread, mode)
                    || (mode == Mode::Write && semaphore.waiting & 1 << thread == 0)
            }
            Some(Instr::Await(cond)) => world.is(thread, cond, &self.programs),
            Some(_) => true,
        }
    }

    fn step(&self, world: &mut World, thread: usize) {
        let Some(instr) = self.instr(world, thread) else {
            return;
        };
        let mut next = usize::from(world.threads[thread].at) + 1;
        match instr {
            Instr::Take(lock, mode) => {
                let semaphore = &mut world.locks[lock.index()];
                if !Self::can_take(semaphore, thread, mode) {
                    semaphore.waiting |= 1 << thread;
                    return;
                }
                semaphore.waiting &= !(1 << thread);
                match mode {
                    Mode::Read => semaphore.readers |= 1 << thread,
                    Mode::Write => semaphore.writer = Some(thread as u8),
                }
            }
            Instr::TryTake(lock, mode, elsewhere) => {
                let semaphore = &mut world.locks[lock.index()];
                match mode {
                    _ if !Self::can_take(semaphore, thread, mode) => next = elsewhere,
                    Mode::Read => semaphore.readers |= 1 << thread,
                    Mode::Write => semaphore.writer = Some(thread as u8),
                }
            }
            Instr::Give(lock) => {
                let semaphore = &mut world.locks[lock.index()];
                if semaphore.writer == Some(thread as u8) {
                    semaphore.writer = None;
                } else {
                    assert!(semaphore.readers & 1 << thread != 0, "{lock:?} is not held");
                    semaphore.readers &= !(1 << thread);
                }
            }
            Instr::Do(act) => world.make(thread, act),
            Instr::Unless(cond, elsewhere) => {
                if !world.is(thread, cond, &self.programs) {
                    next = elsewhere;
                }
            }
            Instr::Goto(elsewhere) => next = elsewhere,
            // Of a fault, which is over in a moment.
            Instr::Await(Cond::NobodyInside(_)) => {}
            // Of an importer, who may take as long as it likes.
            Instr::Await(_) => world.tied |= world.holds(thread, Lock::Bus),
        }
        world.threads[thread].at = next as u8;
    }

    /// The next step of a thread, in words.
    pub(crate) fn describe(&self, world: &World, thread: usize) -> String {
        let at = usize::from(world.threads[thread].at);
        let (instr, of) = &self.programs[thread].steps[at];
        format!("{} [{of}] {instr:?}", self.programs[thread].name)
    }
}

/// Nothing is reached that is not usable, or was revoked.
pub(crate) const INACCESSIBLE: &str = "never accessible after a taker-away returned";
/// In the end a buffer is accessible if nothing speaks against it.
pub(crate) const NOT_STUCK: &str = "never stuck revoked when no reason holds";
/// Somebody can go on until all are done.
pub(crate) const NO_DEADLOCK: &str = "no deadlock";

/// A dma-buf is looked at only where its release waits for that.
pub(crate) const NOT_DANGLING: &str = "no look at a dma-buf after its release";

/// A function in reset does not answer, and that is an error of its port.
pub(crate) const NOT_ASKED: &str = "no read of the config space of a function in reset";
/// Nobody waits for an importer with `pci_bus_sem` held, nor for an allocation in a gate.
pub(crate) const NOT_TIED: &str = "nobody makes others wait who must not";
/// A process that adds fences does not keep REVOKE from returning.
pub(crate) const ENDS: &str = "no wait for fences that were added after it had begun";

impl Model for Protocol {
    type State = World;
    type Action = usize;

    fn init_states(&self) -> Vec<World> {
        let mut world = self.start.clone();
        world.threads = vec![Thread::default(); self.programs.len()];
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Self::Action>) {
        for thread in 0..self.programs.len() {
            if self.can_step(world, thread) {
                actions.push(thread);
            }
        }
    }

    fn next_state(&self, world: &World, thread: usize) -> Option<World> {
        let mut next = world.clone();
        self.step(&mut next, thread);
        while self.instr(&next, thread).is_some_and(is_free) {
            self.step(&mut next, thread);
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(INACCESSIBLE, |_, world: &World| {
                (0..BUFFERS).all(|buffer| {
                    let may = world.usable() && !world.buffers[buffer].gone;
                    may || !world.reached(buffer)
                })
            }),
            Property::always(NOT_STUCK, |protocol: &Self, world| {
                let ended = protocol.is_over(world);
                !ended
                    || (0..BUFFERS).all(|buffer| {
                        let this = &world.buffers[buffer];
                        let current = this.epoch.is_some() && this.epoch == world.access.epoch();
                        // A wrongly restored register is stuck, though the state says so.
                        let may = (world.usable() || world.device.lost) && current && !this.revoked;
                        may == (world.state(buffer) == State::Ok)
                    })
            }),
            Property::always(NO_DEADLOCK, |protocol: &Self, world| {
                let mut threads = 0..protocol.programs.len();
                protocol.is_over(world) || threads.any(|thread| protocol.can_step(world, thread))
            }),
            Property::always(NOT_DANGLING, |_, world: &World| !world.dangling),
            Property::always(NOT_ASKED, |_, world: &World| !world.asked_the_deaf),
            Property::always(NOT_TIED, |_, world: &World| !world.tied),
            Property::always(ENDS, |_, world: &World| !world.endless),
            Property::sometimes("a fault brings a page in", |_, world: &World| {
                world.sights[Sight::Entry as usize]
            }),
            Property::sometimes("a fault gives SIGBUS", |_, world: &World| {
                world.sights[Sight::Sigbus as usize]
            }),
            Property::sometimes("an importer maps", |_, world: &World| {
                world.sights[Sight::Mapped as usize]
            }),
            Property::sometimes("an importer is told", |_, world: &World| {
                world.sights[Sight::Told as usize]
            }),
        ]
    }
}
