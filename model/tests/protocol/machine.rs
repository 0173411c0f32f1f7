// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Threads, locks and what they share, as a `stateright` model.
//!
//! Each thread runs a program of instructions, of which each is one atomic step, together with the locks that it gives back
//! after it; every order of the steps of all threads is tried. A lock is as strict as the kernel's may be: a writer that waits keeps readers out that come after it.

use barlease_model::access::{Access, Epoch, Event, Levels, State};
use stateright::{Model, Property};

/// Buffers.
pub(crate) const BUFFERS: usize = 2;
/// VMAs of a buffer.
pub(crate) const VMAS: usize = 2;
/// Importers.
pub(crate) const IMPORTERS: usize = 2;

/// A lock. The order in `kmod/src/leases.rs` is not assumed: breaking it is what a deadlock would come of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lock {
    /// A process's `mmap_lock`.
    Mmap,
    /// The PCI core's device lock: one reset of a function at a time.
    Device,
    /// The vfio core's `memory_lock`.
    Memory,
    /// Not a lock of the kernel's, but as one: a run-time sleep or wake-up of the device is under way
    /// (`RPM_SUSPENDING`, `RPM_RESUMING`), and whoever wants to wake it waits for that.
    Transition,
    /// `Buffer::live`.
    Live(usize),
    /// The reservation lock of a buffer's dma-buf.
    Resv(usize),
    /// `Buffer::gate`.
    Gate(usize),
    /// `Leases::access`.
    Access,
}

impl Lock {
    const COUNT: usize = 5 + 3 * BUFFERS;

    fn index(self) -> usize {
        match self {
            Self::Mmap => 0,
            Self::Device => 1,
            Self::Memory => 2,
            Self::Access => 3,
            Self::Transition => 4,
            Self::Live(buffer) => 5 + buffer,
            Self::Resv(buffer) => 5 + BUFFERS + buffer,
            Self::Gate(buffer) => 5 + 2 * BUFFERS + buffer,
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
    /// Takes a lock for writing, or goes elsewhere if that cannot be had.
    TryTake(Lock, usize),
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

/// What a step changes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// A change of `Access`, with its lock held for writing.
    Access(Change),
    /// A thread looks at what the device says, to set it later (a planted bug).
    Sample,
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
    /// The same, but what was seen half awake does not count (a planted bug).
    StoreAsleepOnly,
    /// Notes whether the core has the device in low power, to set it later.
    NoteLowPower,
    /// Notes what `Access` says the device said, with its lock held, to write it down later (a planted bug).
    NoteLevels,
    /// Writes that down.
    StoreNoted,
    /// A change of the hardware, or of what the core keeps of it.
    Device(Change2),
    /// REVOKE has returned: the buffer is gone for good.
    Gone(usize),
    /// The core closed the device.
    Disabled(bool),
    /// A user of a buffer, who has a reference to its dma-buf, has none any more.
    Done(usize),
    /// Something that must be possible was.
    Saw(Sight),
}

/// A change of `Access`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Begin(Event),
    End(Event),
    /// Samples the device and ends an event.
    SampleAndEnd(Event),
    /// Samples the device and ends an event however often it began (a planted bug).
    SampleAndEndAll(Event),
    /// Sets what was sampled before and ends an event (a planted bug).
    SetAndEnd(Event),
    /// Samples the device.
    Sample,
    /// What `reset_done` does: notes what a reset changes, and ends it.
    ResetDone,
    /// The same, with no look whether the device decodes (a planted bug).
    ResetDoneHalf,
    /// What `error_resume` does.
    ErrorResume,
    /// The same, with no look whether the device decodes (a planted bug).
    ErrorResumeHalf,
    /// What `woken` does: notes what a wake-up changes, and whether low power was noted to go on.
    Woken,
    /// Takes the device for awake, whatever it says (a planted bug).
    WokenForGood,
    /// Says that memory is off (a planted bug).
    MemoryOff,
    /// Ends every event at once (a planted bug).
    EndEverything,
    Open,
    Close,
}

/// A change of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change2 {
    Memory(bool),
    InReset(bool),
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
    /// D0. What has slept decodes nothing yet.
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
    /// What was pulled out was taken away from everybody.
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
    HasVmas(usize),
    IsAttached(usize),
    /// `mappings` is not 0.
    HasMappings(usize),
    HasNoMappings(usize),
    /// There is a fence that has not signalled.
    FencePending(usize),
    /// None.
    FencesSignalled(usize),
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
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Importer {
    pub(crate) buffer: usize,
    /// Undoes its mapping when it is told.
    pub(crate) quick: bool,
    pub(crate) mapped: bool,
    pub(crate) fence: bool,
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
    /// What it sampled.
    levels: Levels,
    /// What it noted.
    reachable: u64,
}

/// The device as it really is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device {
    memory: bool,
    in_reset: bool,
    /// The core's `pm_runtime_engaged`.
    low_power: bool,
    until_wake_up: bool,
    sleeping: bool,
    /// It is awake, and was not given back yet what it lost by its sleep.
    half_awake: bool,
    /// `RPM_SUSPENDED`.
    suspended: bool,
    /// Who keeps it awake, but for the core as long as it is not in low power.
    holds: u8,
    /// What is saved of config space is what a reset has left of it.
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
    /// Whether the device says that it decodes memory. One that was pulled out says nothing, but not each is asked: a
    /// virtual function has no memory bit (`Function::decodes_memory`).
    fn decodes(&self) -> bool {
        self.memory && !self.in_reset && !self.half_awake && !self.lost
    }

    fn change(&mut self, change: Change2) {
        match change {
            Change2::Memory(on) => self.memory = on,
            Change2::InReset(true) => self.in_reset = true,
            Change2::InReset(false) => {
                self.in_reset = false;
                self.lost |= self.saved_nothing;
            }
            Change2::LowPower { until_wake_up } => {
                self.low_power = true;
                self.until_wake_up = until_wake_up;
            }
            Change2::LeaveLowPower => self.low_power = false,
            Change2::WakeUp => self.low_power &= !self.until_wake_up,
            Change2::FallAsleep => self.sleeping = true,
            Change2::HalfAwake => {
                self.half_awake = self.sleeping;
                self.sleeping = false;
            }
            Change2::Restored => self.half_awake = false,
            Change2::Awake => self.sleeping = false,
            Change2::Suspended(yes) => self.suspended = yes,
            Change2::Saved => self.saved_nothing = self.in_reset,
            Change2::Held(yes) => count(&mut self.holds, yes),
            Change2::Gone => self.gone = true,
            Change2::Removed => self.removed = self.gone,
        }
    }
}

/// What a thread does with the fd of the device, which is closed when nobody uses it any more.
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
    /// Somebody looked at a dma-buf after its release.
    dangling: bool,
}

/// A thread's program.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// The name, for traces.
    pub(crate) name: String,
    /// What it does, one step after the other.
    pub(crate) steps: Vec<(Instr, &'static str)>,
    /// What it does with the fd of the device.
    pub(crate) uses: Uses,
}

/// Programs that run at once, from a device that is open and usable, with buffers that are or are to be exported.
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
        access.open(Levels::default());
        Self {
            reachable: access.reachable(),
            access,
            asleep: false,
            locks: Default::default(),
            buffers: Default::default(),
            importers: Default::default(),
            device: Device {
                memory: true,
                in_reset: false,
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
            dangling: false,
        }
    }

    /// A buffer that is exported.
    pub(crate) fn export(&mut self, buffer: usize) {
        let this = &mut self.buffers[buffer];
        this.epoch = self.access.epoch();
        this.live = true;
        this.in_table = true;
    }

    /// What the device says (`Device::levels`).
    fn levels(&self) -> Levels {
        Levels {
            memory_off: !self.device.memory,
            undecoded: self.device.memory && !self.device.decodes(),
            sleeping: self.device.sleeping,
            low_power: self.device.low_power,
        }
    }

    /// What resets and wake-ups change of it (`driver::note_state_of`).
    fn noted(&self) -> Levels {
        if self.access.epoch().is_none() {
            return self.access.levels();
        }
        Levels {
            undecoded: !self.device.decodes(),
            sleeping: self.device.sleeping,
            ..self.access.levels()
        }
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
        let there = device.enabled && !device.removed;
        there && device.decodes() && !device.low_power && !device.sleeping
    }

    /// Whether a process or a device reaches a buffer.
    fn reached(&self, buffer: usize) -> bool {
        let entries = self.buffers[buffer].entries.contains(&true);
        let mut importers = self.importers.iter();
        entries || importers.any(|i| i.buffer == buffer && (i.mapped || i.fence))
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
            Cond::HasVmas(buffer) => buffers[buffer].vmas != 0,
            Cond::IsAttached(buffer) => buffers[buffer].attachments != 0,
            Cond::HasMappings(buffer) => buffers[buffer].mappings != 0,
            Cond::HasNoMappings(buffer) => buffers[buffer].mappings == 0,
            Cond::FencePending(buffer) => self.fence_pending(buffer),
            Cond::FencesSignalled(buffer) => !self.fence_pending(buffer),
            Cond::IsLive(buffer) => buffers[buffer].live,
            Cond::InBatch(buffer) => self.threads[thread].batch[buffer],
            Cond::IsMapped(importer) => self.importers[importer].mapped,
            Cond::AnyVmas => buffers.iter().any(|buffer| buffer.vmas != 0),
            Cond::AnyAttached => buffers.iter().any(|buffer| buffer.attachments != 0),
            Cond::NotedWaits => self.threads[thread].waits,
            Cond::FdIdle => self.are_over(programs, |uses| uses == Uses::Fd),
            Cond::OwnersGone => self.are_over(programs, |uses| uses != Uses::Nothing),
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
        importers.any(|importer| importer.buffer == buffer && importer.fence)
    }

    fn make(&mut self, thread: usize, act: Act) {
        match act {
            Act::Access(change) => self.change(thread, change),
            Act::Sample => self.threads[thread].levels = self.levels(),
            Act::Vma { buffer, opened } => count(&mut self.buffers[buffer].vmas, opened),
            Act::Entry { buffer, vma, there } => self.buffers[buffer].entries[vma] = there,
            Act::Attached { buffer, yes } => count(&mut self.buffers[buffer].attachments, yes),
            Act::Mapped { importer, yes } => self.set_mapped(importer, yes),
            Act::Fence { importer, pending } => self.importers[importer].fence = pending,
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
                self.threads[thread].batch = [false; BUFFERS];
            }
            Act::LookUp => {
                for buffer in 0..BUFFERS {
                    self.threads[thread].batch[buffer] = self.buffers[buffer].in_table;
                }
            }
            Act::StoreAsleep => self.asleep = sleeps(self.access.levels()),
            Act::StoreAsleepOnly => {
                let levels = self.access.levels();
                self.asleep = levels.sleeping || levels.low_power;
            }
            Act::NoteLevels => self.threads[thread].levels = self.access.levels(),
            Act::NoteLowPower => self.threads[thread].levels.low_power = self.device.low_power,
            Act::StoreNoted => self.asleep = sleeps(self.threads[thread].levels),
            Act::Device(change) => self.device.change(change),
            Act::Gone(buffer) => self.buffers[buffer].gone = true,
            Act::Disabled(yes) => {
                self.device.enabled = !yes;
                if !yes {
                    self.device.memory = true;
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
        let now = self.levels();
        let noted = self.noted();
        let sampled = self.threads[thread].levels;
        let access = &mut self.access;
        match change {
            Change::Begin(event) => access.begin(event),
            Change::End(event) => access.end(event),
            Change::SampleAndEnd(event) => {
                access.set_levels(now);
                access.end(event);
            }
            Change::SampleAndEndAll(event) => {
                access.set_levels(now);
                access.end_all(event);
            }
            Change::SetAndEnd(event) => {
                access.set_levels(sampled);
                access.end(event);
            }
            Change::Sample => access.set_levels(now),
            Change::ResetDone => {
                access.set_levels(noted);
                access.end(Event::Reset);
            }
            Change::ResetDoneHalf => {
                access.set_levels(Levels {
                    undecoded: false,
                    ..noted
                });
                access.end(Event::Reset);
            }
            Change::ErrorResume => {
                access.set_levels(noted);
                access.end_all(Event::Error);
            }
            Change::ErrorResumeHalf => {
                access.set_levels(Levels {
                    undecoded: false,
                    ..noted
                });
                access.end_all(Event::Error);
            }
            // Of a device that is not open nothing is noted but that: it counts for nothing.
            Change::Woken => access.set_levels(Levels {
                low_power: sampled.low_power,
                ..noted
            }),
            Change::WokenForGood => access.set_levels(Levels {
                memory_off: now.memory_off,
                ..Levels::default()
            }),
            Change::MemoryOff => access.set_levels(Levels {
                memory_off: true,
                ..access.levels()
            }),
            Change::EndEverything => {
                access.set_levels(now);
                Event::ALL.iter().for_each(|&event| access.end_all(event));
            }
            Change::Open => drop(access.open(now)),
            Change::Close => access.close(),
        }
    }

    /// `Buffer::map` and `Buffer::unmap`, as far as they count.
    fn set_mapped(&mut self, importer: usize, yes: bool) {
        self.importers[importer].mapped = yes;
        let buffer = &mut self.buffers[self.importers[importer].buffer];
        count(&mut buffer.mappings, yes);
    }
}

/// Whether a step can be made together with the one before it: nobody can see the difference, but that a lock is free
/// earlier.
fn is_free(instr: Instr) -> bool {
    matches!(
        instr,
        Instr::Goto(_) | Instr::Give(_) | Instr::Do(Act::Saw(_) | Act::NoteNothing)
    )
}

fn sleeps(levels: Levels) -> bool {
    levels.sleeping || levels.low_power || levels.undecoded && !levels.memory_off
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
            Instr::TryTake(lock, elsewhere) => {
                let semaphore = &mut world.locks[lock.index()];
                if Self::can_take(semaphore, thread, Mode::Write) {
                    semaphore.writer = Some(thread as u8);
                } else {
                    next = elsewhere;
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
            Instr::Await(_) => {}
        }
        world.threads[thread].at = next as u8;
    }

    /// What a thread does next, in words.
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
                        // What was restored wrongly is stuck, though the state says so.
                        let may = (world.usable() || world.device.lost) && current && !this.revoked;
                        may == (world.state(buffer) == State::Ok)
                    })
            }),
            Property::always(NO_DEADLOCK, |protocol: &Self, world| {
                let mut threads = 0..protocol.programs.len();
                protocol.is_over(world) || threads.any(|thread| protocol.can_step(world, thread))
            }),
            Property::always(NOT_DANGLING, |_, world: &World| !world.dangling),
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
