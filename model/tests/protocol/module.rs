// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! The steps of the module, in the order of its code. Each function here has the name of the one in
//! `kmod/src` that it mirrors, and is to be changed with it. The real `barlease_model::access`
//! decides.
//!
//! An action under one lock that nobody can see half of is one step: a look into the table of
//! buffers, a count.

use barlease_model::access::Event;

use crate::machine::{
    Act, BUFFERS, Change, Change2, Cond, Failure, Instr, Lock, Look, Mode, Program, Sight, Uses,
    VMAS,
};

/// A bug that is planted into the module's programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A fault looks at the state, and inserts without the lock.
    FaultInsertsWithoutTheLock,
    /// An event zaps before it shuts the door.
    ZapBeforeBegin,
    /// REVOKE zaps before it marks the buffer.
    ZapBeforeMark,
    /// A drain zaps one VMA of a buffer only.
    ZapOfOneVma,
    /// An importer's mapping is made after a look without the reservation lock.
    MapLooksBeforeTheLock,
    /// `map` does not look at the state.
    MapDoesNotLook,
    /// Importers are told, and not waited for.
    NoWait,
    /// Fences are not waited for.
    NoWaitForFences,
    /// A buffer that is revoked by an event is not waited for by REVOKE although the event still
    /// waits.
    RevokeTrustsTheEvent,
    /// The end of an event ends all.
    EndOfAll,
    /// The end of one config write is the end of all that overlap it.
    NoNesting,
    /// The device is sampled before the lock is taken.
    SampleBeforeTheLock,
    /// An open samples the device before it takes the lock, and then trusts that.
    OpenSamplesBeforeTheLock,
    /// A thread that had an access does not notice that the device was woken.
    NoNotice,
    /// Nobody hears that run-time power management has woken the device.
    WakeUpUnheard,
    /// A wake-up gives back without asking the device.
    WakeUpDoesNotAsk,
    /// A device that is half awake is taken for awake.
    HalfAwakeIsAwake,
    /// That a device was seen half awake is not remembered.
    HalfAwakeIsForgotten,
    /// A thread that cannot have `memory_lock` believes a bit that is lent.
    LentIsBelieved,
    /// A thread that had an access asks without `memory_lock`.
    AskDoesNotLock,
    /// The end of a bracket asks without it.
    BracketDoesNotLock,
    /// A lender does not ask when it is done.
    LenderDoesNotAsk,
    /// The end of low power asks only if nobody has `memory_lock`.
    ExitTriesTheLock,
    /// A function is asked while it is in reset.
    AsksInReset,
    /// Opening the device ends an error.
    OpenEndsErrors,
    /// Recovery that has failed ends the error, and that is all.
    FailureIsForgotten,
    /// It ends the error never.
    FailureIsForGood,
    /// `error_detected` waits for importers.
    ErrorWaits,
    /// The end of system sleep does not ask the device.
    SystemWakeUpDoesNotAsk,
    /// A wait for fences looks for more when those are signalled that it has found.
    FencesAreWaitedForInALoop,
    /// A fault allocates in the gate.
    FaultAllocatesInTheGate,
    /// A fault looks at the door before it is counted.
    FaultEntersAfterItsLook,
    /// Drains pass over what was revoked for good, though REVOKE did not wait for it.
    DrainSkipsTheDead,
    /// They do so where there is no mapping, though one may be made just now.
    DrainTrustsTheCount,
    /// REVOKE that does not wait zaps nothing either.
    NoWaitZapsNothing,
    /// A reset does not keep the device awake.
    ResetDoesNotHold,
    /// It does, but does not wait for a sleep that has begun.
    HoldDoesNotWait,
    /// A device that was pulled out is left to its owner.
    UnbindingLeavesIt,
    /// A device that was pulled out is noted as having memory off, which the next sample takes
    /// back.
    UnbindingSaysMemoryOff,
    /// An open does not look whether the device was pulled out.
    OpenedDoesNotLook,
    /// Whether the device sleeps is written down when others may have changed it.
    AsleepStoredLate,
    /// Access is locked during a drain, and while an importer maps.
    DrainLocksAccess,
    /// The thread that takes memory away does not wait for faults that have begun.
    ZapPassesNoGate,
    /// The word of access is written when others may have changed it.
    PublishedLate,
    /// It is written down when all is drained.
    PublishedAfterTheDrain,
    /// A buffer whose importers have fences is not waited for.
    FencesAreNothingToWaitFor,
    /// A fault takes `memory_lock`, as stock vfio-pci's does, and mmap too.
    FaultTakesMemoryLock,
    /// Close drains after the core has disabled the function.
    CloseDrainsLate,
    /// A reset begins before the drain is over.
    ResetBeforeDrain,
    /// The end of a reset does not look whether the function was woken.
    ResetForgetsPower,
    /// A release does not wait for who looks at the dma-buf.
    ReleaseDoesNotLock,
}

/// The state that all programs share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// The bug that is planted.
    pub(crate) bug: Option<Bug>,
    /// Whether some thread enters low power.
    pub(crate) sleeps: bool,
}

/// Writes programs.
#[derive(Debug)]
pub(crate) struct Builder {
    bug: Option<Bug>,
    /// Some thread lets run-time power management put the device to sleep. Where none does, each
    /// finds it awake, and the steps of run-time power management are left out.
    sleeps: bool,
    of: Vec<&'static str>,
    steps: Vec<(Instr, &'static str)>,
}

/// Whether importers are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Yes,
    No,
}

/// A place that is jumped to and not known yet.
struct Later(usize);

impl Builder {
    fn new(setting: Setting) -> Self {
        Self {
            bug: setting.bug,
            sleeps: setting.sleeps,
            of: vec![""],
            steps: Vec::new(),
        }
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    fn here(&self) -> usize {
        self.steps.len()
    }

    fn put(&mut self, instr: Instr) {
        let of = self.of.last().copied().unwrap_or("");
        self.steps.push((instr, of));
    }

    /// The steps of a function of the module.
    fn within(&mut self, name: &'static str, f: impl FnOnce(&mut Self)) {
        self.of.push(name);
        f(self);
        self.of.pop();
    }

    fn act(&mut self, act: Act) {
        self.put(Instr::Do(act));
    }

    fn unless(&mut self, cond: Cond) -> Later {
        self.put(Instr::Unless(cond, usize::MAX));
        Later(self.here() - 1)
    }

    fn goto(&mut self) -> Later {
        self.put(Instr::Goto(usize::MAX));
        Later(self.here() - 1)
    }

    /// Resolves a jump: its target is here.
    fn land(&mut self, later: Later) {
        let here = self.here();
        match &mut self.steps[later.0].0 {
            Instr::Unless(_, at) | Instr::Goto(at) | Instr::TryTake(_, _, at) => *at = here,
            other => panic!("{other:?} does not jump"),
        }
    }

    fn locked(&mut self, lock: Lock, mode: Mode, f: impl FnOnce(&mut Self)) {
        self.put(Instr::Take(lock, mode));
        f(self);
        self.put(Instr::Give(lock));
    }

    /// `f` with a lock if it can be had now, or without.
    fn tried(&mut self, lock: Lock, mode: Mode, f: impl Fn(&mut Self, bool)) {
        self.put(Instr::TryTake(lock, mode, usize::MAX));
        let busy = Later(self.here() - 1);
        f(self, true);
        self.put(Instr::Give(lock));
        let done = self.goto();
        self.land(busy);
        f(self, false);
        self.land(done);
    }

    fn end(self, name: &str, uses: Uses) -> Program {
        // A thread's place is kept in a byte.
        assert!(self.steps.len() < 256, "{name} is too long");
        Program {
            name: name.to_owned(),
            steps: self.steps,
            uses,
        }
    }
}

// ---- kmod/src/leases.rs, taking.rs --------------------------------------------------------------

impl Builder {
    /// `Leases::begin`.
    fn begin(&mut self, event: Event) {
        if self.has(Bug::ZapBeforeBegin) {
            (0..BUFFERS).for_each(|buffer| self.zap(buffer));
        }
        self.within("Leases::begin", |this| {
            this.shut(Change::Begin(event), Wait::Yes)
        });
    }

    /// `Leases::begin` that does not wait.
    fn begin_unwaited(&mut self, event: Event) {
        let wait = if self.has(Bug::ErrorWaits) {
            Wait::Yes
        } else {
            Wait::No
        };
        self.within("Leases::begin", |this| {
            this.shut(Change::Begin(event), wait)
        });
    }

    /// `Leases::fail`.
    fn fail(&mut self) {
        let failure = match self.bug {
            Some(Bug::FailureIsForgotten) => Failure::Forgotten,
            Some(Bug::FailureIsForGood) => Failure::ForGood,
            _ => Failure::UntilOpened,
        };
        let change = Change::Fail(failure);
        self.within("Leases::fail", |this| this.shut(change, Wait::No));
    }

    /// `Leases::shut_door` and `Leases::shut`: the change and the word in `access`, then a drain.
    fn shut(&mut self, change: Change, wait: Wait) {
        let late = self.has(Bug::PublishedAfterTheDrain);
        self.locked(Lock::Access, Mode::Write, |this| {
            this.act(Act::Access(change));
            if !late {
                this.act(Act::Publish);
            }
            if this.has(Bug::DrainLocksAccess) {
                this.drain(wait);
            }
        });
        if self.has(Bug::CloseDrainsLate) && matches!(change, Change::Close) {
            self.act(Act::Disabled(true));
        }
        if !self.has(Bug::DrainLocksAccess) {
            self.drain(wait);
        }
        if late {
            self.locked(Lock::Access, Mode::Write, |this| this.act(Act::Publish));
        }
    }

    /// `Leases::update`: `asleep` and the word are read without a lock, and written with it.
    fn update(&mut self, change: Change) {
        let late = self.has(Bug::AsleepStoredLate);
        let published_late = self.has(Bug::PublishedLate);
        self.within("Leases::update", |this| {
            this.locked(Lock::Access, Mode::Write, |this| {
                this.act(Act::Access(change));
                this.act(if late {
                    Act::NoteLevels
                } else if this.has(Bug::HalfAwakeIsForgotten) {
                    Act::StoreAsleepOnly
                } else {
                    Act::StoreAsleep
                });
                this.act(if published_late {
                    Act::NoteReachable
                } else {
                    Act::Publish
                });
            });
            if late {
                this.act(Act::StoreNoted);
            }
            if published_late {
                this.act(Act::PublishNoted);
            }
        });
    }

    /// `Leases::close`: the steps of an event. That each buffer keeps the fences which were seen is
    /// for LIST, and changes none of them.
    fn close(&mut self) {
        self.within("Leases::close", |this| this.shut(Change::Close, Wait::Yes));
    }

    /// `Leases::lending`.
    fn lending(&mut self, f: impl FnOnce(&mut Self)) {
        self.within("Leases::lending", |this| {
            let access = |this: &mut Self, change| {
                this.locked(Lock::Access, Mode::Write, |this| {
                    this.act(Act::Access(change))
                });
            };
            access(this, Change::Lend);
            f(this);
            access(this, Change::GiveBack);
        });
    }

    /// `Leases::drain`: zap all that is mapped; tell all that is attached, and see which fences
    /// they have; then wait for all, if that is left to do.
    fn drain(&mut self, wait: Wait) {
        self.within("Leases::drain", |this| {
            let unmapped = this.unless(Cond::AnyVmas);
            this.for_each(|this, buffer| {
                if !this.has(Bug::ZapBeforeBegin) {
                    this.zap_if_mapped(buffer);
                }
            });
            this.land(unmapped);
            let nothing = this.unless(Cond::AnyAttached);
            this.for_each(|this, buffer| {
                let nobody = this.unless(Cond::IsAttached(buffer));
                let drained = match this.bug {
                    Some(Bug::DrainSkipsTheDead) => this.unless(Cond::IsNotRevoked(buffer)),
                    Some(Bug::DrainTrustsTheCount) => this.unless(Cond::SeemsToDrain(buffer)),
                    _ => this.unless(Cond::MayDrain(buffer)),
                };
                this.invalidate(buffer);
                this.land(drained);
                this.land(nobody);
            });
            let done = this.unless(Cond::NotedWaits);
            if !this.has(Bug::NoWait) && wait == Wait::Yes {
                this.wait_for_fences(None);
                for buffer in 0..BUFFERS {
                    let nobody = this.unless(Cond::IsAttached(buffer));
                    this.put(Instr::Await(Cond::HasNoMappings(buffer)));
                    this.land(nobody);
                }
            }
            this.land(done);
            this.land(nothing);
            // The ghost of it: whoever was told before was waited for now.
            this.act(match wait {
                Wait::Yes => Act::Unexcuse,
                Wait::No => Act::Excuse(None),
            });
            this.act(Act::NoteNothing);
        });
    }

    /// `Leases::for_each`: looks up so many buffers at a time that here it is all, and holds no
    /// lock while it has them.
    fn for_each(&mut self, f: impl Fn(&mut Self, usize)) {
        self.act(Act::LookUp);
        for buffer in 0..BUFFERS {
            let absent = self.unless(Cond::InBatch(buffer));
            f(self, buffer);
            self.land(absent);
        }
    }
}

// ---- kmod/src/buffer.rs -------------------------------------------------------------------------

impl Builder {
    /// `Buffer::zap`: waits for faults; then `unmap_mapping_range` goes from one VMA to the next.
    fn zap(&mut self, buffer: usize) {
        self.within("Buffer::zap", |this| {
            if !this.has(Bug::ZapPassesNoGate) {
                this.put(Instr::Await(Cond::NobodyInside(buffer)));
            }
            let vmas = if this.has(Bug::ZapOfOneVma) { 1 } else { VMAS };
            for vma in 0..vmas {
                this.act(Act::Entry {
                    buffer,
                    vma,
                    there: false,
                });
            }
        });
    }

    /// `Buffer::invalidate`, and `LiveGuard::invalidate` with what it asks; what it says is noted.
    fn invalidate(&mut self, buffer: usize) {
        self.within("Buffer::invalidate", |this| {
            this.put(Instr::Take(Lock::Live(buffer), Mode::Write));
            let released = this.unless(Cond::IsLive(buffer));
            this.act(Act::Look(buffer));
            this.locked(Lock::Resv(buffer), Mode::Write, |this| {
                let idle = this.unless(Cond::HasMappings(buffer));
                this.act(Act::Invalidate(buffer));
                this.land(idle);
                if this.has(Bug::FencesAreNothingToWaitFor) {
                    let unmapped = this.unless(Cond::HasMappings(buffer));
                    this.act(Act::NoteWaits(buffer));
                    this.land(unmapped);
                } else {
                    this.act(Act::NoteWaits(buffer));
                }
                // All that is waited for of fences.
                this.act(Act::Snapshot(buffer));
            });
            this.land(released);
            this.put(Instr::Give(Lock::Live(buffer)));
        });
    }

    /// Waits for the fences of the snapshot.
    fn wait_for_fences(&mut self, killable: Option<usize>) {
        if self.has(Bug::NoWaitForFences) {
            return;
        }
        self.put(Instr::Await(match killable {
            Some(_) => Cond::SnapshotSignalledOrKilled,
            None => Cond::SnapshotSignalled,
        }));
        if self.has(Bug::FencesAreWaitedForInALoop) {
            for buffer in 0..BUFFERS {
                let signalled = self.unless(Cond::FencePending(buffer));
                self.act(Act::Endless);
                self.put(Instr::Await(Cond::FencesSignalled(buffer)));
                self.land(signalled);
            }
        }
    }

    /// `Buffer::wait`: for the fences of the snapshot, then until there are no mappings; or until
    /// the process is killed.
    fn wait(&mut self, buffer: usize) {
        self.within("Buffer::wait", |this| {
            this.wait_for_fences(Some(buffer));
            this.put(Instr::Await(Cond::HasNoMappingsOrKilled(buffer)));
        });
    }

    /// `Buffer::revoke`. It returns when nobody reaches the buffer, or without a wait for
    /// importers: because it is not to wait, or its process was killed.
    ///
    /// A REVOKE that leaves before it has told importers, since one of them keeps a lock, is to
    /// events one that has not come so far yet, which is here: the module's own work tells for it.
    fn revoke(&mut self, buffer: usize, waits: bool) {
        self.within("Buffer::revoke", |this| {
            let early = this.has(Bug::ZapBeforeMark);
            if early {
                this.zap_if_mapped(buffer);
            }
            let trusts = this.has(Bug::RevokeTrustsTheEvent).then(|| {
                let ok = this.unless(Cond::Reachable(buffer));
                let go_on = this.goto();
                this.land(ok);
                this.act(Act::MarkRevoked(buffer));
                let done = this.goto();
                this.land(go_on);
                done
            });
            this.act(Act::MarkRevoked(buffer));
            if !early && (waits || !this.has(Bug::NoWaitZapsNothing)) {
                this.zap_if_mapped(buffer);
            }
            let nobody = this.unless(Cond::IsAttached(buffer));
            this.invalidate(buffer);
            let nothing = this.unless(Cond::NotedWaits);
            let left = if waits {
                this.wait(buffer);
                let alive = this.unless(Cond::IsKilled);
                // The process is gone; the ghost of it.
                this.act(Act::Leaving(buffer));
                let left = this.goto();
                this.land(alive);
                left
            } else {
                this.act(Act::Leaving(buffer));
                this.goto()
            };
            this.land(nothing);
            this.act(Act::Drained(buffer));
            this.land(nobody);
            if let Some(done) = trusts {
                this.land(done);
            }
            this.act(Act::Gone(buffer));
            this.land(left);
            this.act(Act::NoteNothing);
        });
    }

    fn zap_if_mapped(&mut self, buffer: usize) {
        let unmapped = self.unless(Cond::HasVmas(buffer));
        self.zap(buffer);
        self.land(unmapped);
    }

    /// `Buffer::fault`, in a VMA that is locked: the state holds until the entry is in.
    fn fault(&mut self, buffer: usize, vma: usize) {
        let stock = self.has(Bug::FaultTakesMemoryLock);
        self.within("Buffer::fault", |this| {
            if stock {
                this.put(Instr::Take(Lock::Memory, Mode::Read));
            }
            // Page tables.
            let late = this.has(Bug::FaultAllocatesInTheGate);
            if !late {
                this.act(Act::Alloc);
            }
            let shut = if this.has(Bug::FaultEntersAfterItsLook) {
                let shut = this.unless(Cond::Reachable(buffer));
                this.put(Instr::Take(Lock::Gate(buffer), Mode::Read));
                shut
            } else {
                this.put(Instr::Take(Lock::Gate(buffer), Mode::Read));
                if late {
                    this.act(Act::Alloc);
                }
                this.unless(Cond::Reachable(buffer))
            };
            if this.has(Bug::FaultInsertsWithoutTheLock) {
                this.put(Instr::Give(Lock::Gate(buffer)));
            }
            this.act(Act::Entry {
                buffer,
                vma,
                there: true,
            });
            if !this.has(Bug::FaultInsertsWithoutTheLock) {
                this.put(Instr::Give(Lock::Gate(buffer)));
            }
            this.act(Act::Saw(Sight::Entry));
            let done = this.goto();
            this.land(shut);
            if !this.has(Bug::FaultEntersAfterItsLook) {
                this.put(Instr::Give(Lock::Gate(buffer)));
            }
            this.act(Act::Saw(Sight::Sigbus));
            this.land(done);
            if stock {
                this.put(Instr::Give(Lock::Memory));
            }
        });
    }

    /// `Buffer::mmap`: a first look, then `vma_opened`, with the `mmap_lock` held; `then` is what
    /// is done with the mapping.
    fn mmap(&mut self, buffer: usize, then: impl FnOnce(&mut Self)) {
        self.within("Buffer::mmap", |this| {
            this.put(Instr::Take(Lock::Mmap, Mode::Write));
            if this.has(Bug::FaultTakesMemoryLock) {
                this.locked(Lock::Memory, Mode::Read, |_| {});
            }
            this.put(Instr::Take(Lock::Access, Mode::Write));
            let dead = this.unless(Cond::Alive(buffer));
            this.put(Instr::Give(Lock::Access));
            this.act(Act::Vma {
                buffer,
                opened: true,
            });
            this.put(Instr::Give(Lock::Mmap));
            then(this);
            let over = this.goto();
            this.land(dead);
            this.put(Instr::Give(Lock::Access));
            this.put(Instr::Give(Lock::Mmap));
            this.land(over);
        });
    }

    /// `Buffer::attach`; `then` is what an importer does that is attached.
    fn attach(&mut self, buffer: usize, then: impl FnOnce(&mut Self)) {
        self.within("Buffer::attach", |this| {
            this.act(Act::Attached { buffer, yes: true });
            let shut = this.unless(Cond::Reachable(buffer));
            this.within("importer", then);
            this.land(shut);
            // `detach`.
            this.act(Act::Attached { buffer, yes: false });
        });
    }

    /// `Buffer::map`, which the core calls with the reservation lock held; `then` is what an
    /// importer does that has mapped.
    fn map(&mut self, buffer: usize, importer: usize, fence: bool, then: impl FnOnce(&mut Self)) {
        self.within("Buffer::map", |this| {
            let early = this.has(Bug::MapLooksBeforeTheLock);
            if !early {
                this.put(Instr::Take(Lock::Resv(buffer), Mode::Write));
            }
            if this.has(Bug::DrainLocksAccess) {
                this.locked(Lock::Access, Mode::Write, |_| {});
            }
            let look = !this.has(Bug::MapDoesNotLook);
            let shut = look.then(|| this.unless(Cond::Reachable(buffer)));
            if early {
                this.put(Instr::Take(Lock::Resv(buffer), Mode::Write));
            }
            this.act(Act::Mapped {
                importer,
                yes: true,
            });
            if fence {
                this.act(Act::Fence {
                    importer,
                    pending: true,
                });
            }
            this.act(Act::Saw(Sight::Mapped));
            this.put(Instr::Give(Lock::Resv(buffer)));
            then(this);
            let over = this.goto();
            if let Some(shut) = shut {
                this.land(shut);
            }
            if !early {
                this.put(Instr::Give(Lock::Resv(buffer)));
            }
            this.land(over);
        });
    }

    /// `Buffer::release`, after `Operations::release` has closed the way to the dma-buf.
    fn release(&mut self, buffer: usize) {
        self.within("Buffer::release", |this| {
            if this.has(Bug::ReleaseDoesNotLock) {
                this.act(Act::Unlive(buffer));
            } else {
                this.locked(Lock::Live(buffer), Mode::Write, |this| {
                    this.act(Act::Unlive(buffer));
                });
            }
            this.act(Act::Remove(buffer));
        });
    }
}

// ---- kmod/src/driver.rs -------------------------------------------------------------------------

impl Builder {
    /// `sampling::bracketed`: `act` in an event, then what the device says now.
    fn bracketed(&mut self, event: Event, act: impl FnOnce(&mut Self)) {
        self.within("sampling::bracketed", |this| {
            this.begin(event);
            act(this);
            if this.has(Bug::SampleBeforeTheLock) {
                this.locked(Lock::Memory, Mode::Read, |this| this.act(Act::Sample));
                this.update(Change::SetAndEnd(event));
                return;
            }
            if this.has(Bug::BracketDoesNotLock) {
                this.update(Change::SampleAndEnd(event, Look::Careless));
                return;
            }
            let change = match this.bug {
                Some(Bug::EndOfAll) => Change::EndEverything,
                Some(Bug::NoNesting) => Change::SampleAndEndAll(event),
                _ => Change::SampleAndEnd(event, this.look()),
            };
            // "Memory is off" is believed without the lock.
            let off = this.unless(Cond::MemoryIsOff);
            this.update(match change {
                Change::SampleAndEnd(event, _) => Change::SampleAndEnd(event, Look::Counted),
                planted => planted,
            });
            let over = this.goto();
            this.land(off);
            this.locked(Lock::Memory, Mode::Read, |this| this.update(change));
            this.land(over);
        });
    }

    /// How a sample is taken with `memory_lock` held.
    fn look(&self) -> Look {
        if self.has(Bug::AsksInReset) {
            Look::Always
        } else {
            Look::Locked
        }
    }

    /// `sampling::notice_wake_up`, `sampling::ask`.
    fn notice_wake_up(&mut self) {
        if self.has(Bug::NoNotice) {
            return;
        }
        self.within("sampling::notice_wake_up", |this| {
            let awake = this.unless(Cond::IsAsleep);
            if this.has(Bug::AskDoesNotLock) {
                this.update(Change::Sample(Look::Careless));
            } else {
                let look = this.look();
                this.tried(Lock::Memory, Mode::Read, |this, locked| {
                    if locked {
                        this.update(Change::Sample(look));
                    }
                });
            }
            this.land(awake);
        });
    }

    /// `sampling::ask` after LOW_POWER_EXIT, which waits for the lock.
    fn ask(&mut self) {
        if self.has(Bug::NoNotice) || self.has(Bug::ExitTriesTheLock) {
            return self.notice_wake_up();
        }
        self.within("sampling::ask", |this| {
            let look = this.look();
            this.locked(Lock::Memory, Mode::Read, |this| {
                this.update(Change::Sample(look));
            });
        });
    }

    /// The end of an event whose caller must not wait: `sampling::resample` with the lock, or with
    /// lenders counted.
    fn end_and_resample(&mut self, event: Event) {
        let half = self.has(Bug::HalfAwakeIsAwake);
        let careless = self.has(Bug::LentIsBelieved);
        let always = self.look();
        self.tried(Lock::Memory, Mode::Read, |this, locked| {
            let look = match locked {
                true => always,
                false if careless => Look::Careless,
                false => Look::Counted,
            };
            this.update(if half {
                Change::EndAndForget(event)
            } else {
                Change::EndAndResample(event, look)
            });
        });
    }

    /// `driver::unbinding`; the device lock is held. The ghost of it: nothing may reach from here
    /// on what was pulled out.
    fn unbinding(&mut self) {
        self.within("Barlease::unbinding", |this| {
            let there = this.unless(Cond::IsGone);
            match this.bug {
                Some(Bug::UnbindingLeavesIt) => {}
                Some(Bug::UnbindingSaysMemoryOff) => {
                    this.update(Change::MemoryOff);
                    this.drain(Wait::Yes);
                }
                _ => this.close(),
            }
            this.act(Act::Device(Change2::Removed));
            this.land(there);
        });
    }

    /// `Barlease::opening`.
    fn opening(&mut self) {
        self.within("Barlease::opening", |this| {
            this.locked(Lock::Access, Mode::Write, |this| {
                this.act(Act::Access(Change::Opening));
            });
        });
    }

    /// `driver::opened`; `unbinding` may have come before.
    fn opened(&mut self) {
        self.within("Barlease::opened", |this| {
            let open = if this.has(Bug::OpenEndsErrors) {
                Change::OpenEndsErrors
            } else {
                Change::Open
            };
            if this.has(Bug::OpenSamplesBeforeTheLock) {
                this.locked(Lock::Memory, Mode::Read, |this| this.act(Act::Sample));
                this.update(Change::SetAndOpen);
            } else {
                this.locked(Lock::Memory, Mode::Read, |this| this.update(open));
            }
            if !this.has(Bug::OpenedDoesNotLook) {
                this.unbinding();
            }
        });
    }

    /// `reset_prepare`, the reset, and `reset_done`, as the PCI core calls them.
    fn reset(&mut self) {
        let early = self.has(Bug::ResetBeforeDrain);
        if early {
            self.act(Act::Device(Change2::InReset(true)));
        }
        self.begin(Event::Reset);
        self.hold_awake();
        // `pci_dev_save_and_disable`. A function that loses its config space when it is woken would
        // be saved without it, and wait for its user to restore it: this one does not.
        self.act(Act::Device(Change2::Awake));
        if self.sleeps {
            self.act(Act::Device(Change2::Saved));
        }
        if !early {
            self.act(Act::Device(Change2::InReset(true)));
        }
        self.act(Act::Device(Change2::InReset(false)));
        self.within("Barlease::reset_done", |this| {
            if this.has(Bug::ResetForgetsPower) {
                this.update(Change::End(Event::Reset));
            } else {
                this.end_and_resample(Event::Reset);
            }
        });
        self.let_sleep();
    }
}

// ---- kmod/src/sys/wake.rs, and what stands around it --------------------------------------------

impl Builder {
    /// `Awake::hold`.
    fn hold_awake(&mut self) {
        if !self.sleeps || self.has(Bug::ResetDoesNotHold) {
            return;
        }
        self.within("Awake::hold", |this| {
            this.act(Act::Device(Change2::Held(true)));
            if this.has(Bug::HoldDoesNotWait) {
                return;
            }
            let active = this.unless(Cond::IsInactive);
            // `pm_runtime_barrier`.
            this.locked(Lock::Transition, Mode::Write, |_| {});
            this.land(active);
        });
    }

    /// `Awake::release`.
    fn let_sleep(&mut self) {
        if self.sleeps && !self.has(Bug::ResetDoesNotHold) {
            self.within("Awake::release", |this| {
                this.act(Act::Device(Change2::Held(false)));
            });
        }
    }

    /// `f` with the device awake: `pm_runtime_resume_and_get` and `pm_runtime_put`, which the vfio
    /// core has around an ioctl and the vfio-pci core around a read or a write.
    fn awake(&mut self, f: impl FnOnce(&mut Self)) {
        if !self.sleeps {
            return f(self);
        }
        self.act(Act::Device(Change2::Held(true)));
        self.resume();
        f(self);
        self.act(Act::Device(Change2::Held(false)));
    }

    /// `rpm_resume`, which calls the domain's operation: `Vtable::runtime_resume`.
    fn resume(&mut self) {
        self.put(Instr::Take(Lock::Transition, Mode::Write));
        let awake = self.unless(Cond::IsSuspended);
        self.within("Vtable::runtime_resume", |this| {
            // `pci_pm_runtime_resume`, then `vfio_pci_core_runtime_resume`.
            this.act(Act::Device(Change2::HalfAwake));
            this.act(Act::Device(Change2::Restored));
            this.locked(Lock::Memory, Mode::Write, |this| {
                this.act(Act::Device(Change2::WakeUp));
            });
            this.woken();
        });
        self.act(Act::Device(Change2::Suspended(false)));
        self.land(awake);
        self.put(Instr::Give(Lock::Transition));
    }

    /// `driver::woken`. Low power is looked at before `access` is locked: who changes it asks
    /// again.
    fn woken(&mut self) {
        let change = match self.bug {
            Some(Bug::WakeUpUnheard) => return,
            Some(Bug::WakeUpDoesNotAsk) => Change::WokenForGood,
            _ => Change::Woken,
        };
        self.within("Barlease::woken", |this| {
            this.act(Act::NoteLowPower);
            this.locked(Lock::Memory, Mode::Read, |this| this.update(change));
        });
    }

    /// `rpm_suspend`, which run-time power management calls some time, or never, when nobody keeps
    /// the device awake: `vfio_pci_core_runtime_suspend`, then `pci_pm_runtime_suspend`.
    fn suspend(&mut self) {
        self.within("rpm_suspend", |this| {
            this.put(Instr::Take(Lock::Transition, Mode::Write));
            let held = this.unless(Cond::MaySuspend);
            this.locked(Lock::Memory, Mode::Write, Self::set_d0);
            this.act(Act::Device(Change2::Saved));
            this.act(Act::Device(Change2::FallAsleep));
            this.act(Act::Device(Change2::Suspended(true)));
            this.land(held);
            this.put(Instr::Give(Lock::Transition));
        });
    }

    /// `vfio_pci_set_power_state` to D0, with `memory_lock` held.
    fn set_d0(&mut self) {
        self.act(Act::Device(Change2::HalfAwake));
        self.act(Act::Device(Change2::Restored));
    }
}

// ---- The threads --------------------------------------------------------------------------------

/// A process that touches a VMA of a buffer twice, and unmaps it.
pub(crate) fn toucher(setting: Setting, buffer: usize, vma: usize) -> Program {
    let mut this = Builder::new(setting);
    map_and_touch(&mut this, buffer, vma);
    this.act(Act::Done(buffer));
    this.end(&format!("toucher of {buffer}.{vma}"), Uses::Nothing)
}

/// Faults and munmap are with the `mmap_lock` held, or the lock of the VMA, which excludes the
/// same.
fn map_and_touch(this: &mut Builder, buffer: usize, vma: usize) {
    this.mmap(buffer, |this| {
        for _ in 0..2 {
            this.locked(Lock::Mmap, Mode::Read, |this| this.fault(buffer, vma));
        }
        // munmap: entries go first, then `vma_closed`.
        this.act(Act::Entry {
            buffer,
            vma,
            there: false,
        });
        this.act(Act::Vma {
            buffer,
            opened: false,
        });
    });
}

/// A process that exports a buffer, and touches it.
pub(crate) fn exporter(setting: Setting, buffer: usize, vma: usize) -> Program {
    let mut this = Builder::new(setting);
    export_and_touch(&mut this, buffer, vma);
    this.end(&format!("exporter of {buffer}"), Uses::Fd)
}

/// `Buffer::make`, and touches of what was made.
fn export_and_touch(this: &mut Builder, buffer: usize, vma: usize) {
    this.put(Instr::Take(Lock::Access, Mode::Write));
    let closed = this.unless(Cond::IsOpen);
    this.act(Act::Make(buffer));
    this.put(Instr::Give(Lock::Access));
    this.act(Act::Add(buffer));
    map_and_touch(this, buffer, vma);
    let done = this.goto();
    this.land(closed);
    this.put(Instr::Give(Lock::Access));
    this.land(done);
    this.act(Act::Done(buffer));
}

/// The use that an importer makes of its mapping before it undoes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Undoes it when it is told.
    Quick,
    /// Some time after it is told.
    Slow,
    /// Undoes it when it is told, and has a fence that it signals some time after it.
    Fenced,
}

/// An importer that attaches, maps, and undoes that some time.
pub(crate) fn importer(setting: Setting, importer: usize, buffer: usize, kind: Kind) -> Program {
    let mut this = Builder::new(setting);
    this.attach(buffer, |this| {
        this.map(buffer, importer, kind == Kind::Fenced, |this| {
            this.put(Instr::Take(Lock::Resv(buffer), Mode::Write));
            let gone = this.unless(Cond::IsMapped(importer));
            // `Buffer::unmap`.
            this.act(Act::Mapped {
                importer,
                yes: false,
            });
            this.land(gone);
            this.put(Instr::Give(Lock::Resv(buffer)));
            if kind == Kind::Fenced {
                this.act(Act::Fence {
                    importer,
                    pending: false,
                });
            }
        });
    });
    this.act(Act::Done(buffer));
    this.end(
        &format!("importer {importer}, {kind:?}, of {buffer}"),
        Uses::Nothing,
    )
}

/// REVOKE. The ghost of it: from here on nothing may reach the buffer.
pub(crate) fn revoker(setting: Setting, buffer: usize) -> Program {
    let mut this = Builder::new(setting);
    this.revoke(buffer, true);
    this.act(Act::Done(buffer));
    this.end(&format!("revoker of {buffer}"), Uses::Fd)
}

/// REVOKE_ID with NOWAIT.
pub(crate) fn hasty_revoker(setting: Setting, buffer: usize) -> Program {
    let mut this = Builder::new(setting);
    this.revoke(buffer, false);
    this.act(Act::Done(buffer));
    this.end(&format!("hasty revoker of {buffer}"), Uses::Fd)
}

/// The process that waits in REVOKE is killed.
pub(crate) fn killer(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.act(Act::Kill);
    this.end("killer", Uses::Nothing)
}

/// Somebody who adds fences to a buffer, one after the other, whenever its reservation lock is
/// free.
pub(crate) fn fencer(setting: Setting, buffer: usize) -> Program {
    let mut this = Builder::new(setting);
    for _ in 0..2 {
        this.locked(Lock::Resv(buffer), Mode::Write, |this| {
            this.act(Act::Added {
                buffer,
                pending: true,
            });
        });
        this.act(Act::Added {
            buffer,
            pending: false,
        });
    }
    this.act(Act::Done(buffer));
    this.end(&format!("fencer of {buffer}"), Uses::Nothing)
}

/// Interrupts are set up (`Barlease::ioctl`): the core lends the memory bit meanwhile.
pub(crate) fn lender(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.awake(|this| {
        this.lending(|this| {
            this.locked(Lock::Memory, Mode::Write, |this| {
                this.act(Act::Device(Change2::Lent(true)));
                this.act(Act::Device(Change2::Lent(false)));
            });
        });
        if !this.has(Bug::LenderDoesNotAsk) {
            this.notice_wake_up();
        }
    });
    this.end("lender", Uses::Fd)
}

/// A reset through sysfs, of the function (`reset_store`): without `memory_lock`.
pub(crate) fn sysfs_reset(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.awake(|this| this.locked(Lock::Device, Mode::Write, Builder::reset));
    this.end("reset through sysfs", Uses::Nothing)
}

/// A reset through sysfs, of the bridge above (`reset_subordinate_store`): without `memory_lock`,
/// and nothing is woken.
pub(crate) fn bus_reset(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.locked(Lock::Device, Mode::Write, Builder::reset);
    this.end("reset of the bridge", Uses::Nothing)
}

/// A hot reset through the fd of another function of the set: with `memory_lock` of this one, and
/// its run-time power management held; nobody asks afterwards.
pub(crate) fn hot_reset(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.awake(|this| {
        this.put(Instr::TryTake(Lock::Memory, Mode::Write, usize::MAX));
        let busy = Later(this.here() - 1);
        this.set_d0();
        // `pci_bus_trylock`.
        this.put(Instr::TryTake(Lock::Device, Mode::Write, usize::MAX));
        let locked = Later(this.here() - 1);
        this.reset();
        this.put(Instr::Give(Lock::Device));
        this.land(locked);
        this.put(Instr::Give(Lock::Memory));
        this.land(busy);
    });
    this.end("hot reset", Uses::Nothing)
}

/// `VFIO_DEVICE_RESET`, or a function-level reset through config space: with `memory_lock`, and not
/// if the PCI core resets it already (`vfio_pci_ioctl_reset`, `pci_try_reset_function`).
pub(crate) fn vfio_reset(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.awake(|this| {
        this.put(Instr::Take(Lock::Memory, Mode::Write));
        this.set_d0();
        this.put(Instr::TryTake(Lock::Device, Mode::Write, usize::MAX));
        let busy = Later(this.here() - 1);
        this.reset();
        this.put(Instr::Give(Lock::Device));
        this.land(busy);
        this.put(Instr::Give(Lock::Memory));
        this.notice_wake_up();
    });
    this.end("VFIO reset", Uses::Fd)
}

/// A write to COMMAND (`driver::write_config`).
pub(crate) fn command(setting: Setting, on: bool) -> Program {
    let mut this = Builder::new(setting);
    this.bracketed(Event::ConfigWrite, |this| {
        this.awake(|this| {
            this.locked(Lock::Memory, Mode::Write, |this| {
                this.act(Act::Device(Change2::Memory(on)));
            });
        });
    });
    this.notice_wake_up();
    let name = if on { "memory on" } else { "memory off" };
    this.end(name, Uses::Fd)
}

/// A write to PMCSR: D3hot, or D0.
pub(crate) fn power(setting: Setting, sleeping: bool) -> Program {
    let mut this = Builder::new(setting);
    this.bracketed(Event::ConfigWrite, |this| {
        this.awake(|this| {
            this.locked(Lock::Memory, Mode::Write, |this| {
                if sleeping {
                    this.act(Act::Device(Change2::FallAsleep));
                } else {
                    this.set_d0();
                }
            });
        });
    });
    this.notice_wake_up();
    this.end(if sleeping { "D3hot" } else { "D0" }, Uses::Fd)
}

/// Enters low power, until its end or until a wake-up (`Barlease::feature`). Run-time power
/// management may put the device to sleep after that. Then it `leaves`, if it does.
pub(crate) fn low_power(setting: Setting, until_wake_up: bool, leaves: bool) -> Program {
    let mut this = Builder::new(setting);
    this.awake(|this| {
        this.notice_wake_up();
        this.bracketed(Event::LowPower, |this| {
            this.locked(Lock::Memory, Mode::Write, |this| {
                this.act(Act::Device(Change2::LowPower { until_wake_up }));
            });
        });
    });
    this.suspend();
    if leaves {
        this.awake(|this| {
            this.notice_wake_up();
            this.locked(Lock::Memory, Mode::Write, |this| {
                this.act(Act::Device(Change2::LeaveLowPower));
            });
            this.ask();
        });
    }
    this.end("low power", Uses::Fd)
}

/// An access through the device fd, which wakes the device (`Barlease::read`, `read_further`): it
/// is asked after that, if it slept before.
pub(crate) fn access(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    let awake = this.unless(Cond::IsAsleep);
    this.awake(|_| {});
    this.notice_wake_up();
    let done = this.goto();
    this.land(awake);
    this.awake(|_| {});
    this.land(done);
    this.end("access", Uses::Fd)
}

/// The host wakes the device (`power/control`, PME), and lets it sleep again.
pub(crate) fn host_wake_up(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.awake(|_| {});
    this.end("wake-up by the host", Uses::Nothing)
}

/// System sleep (`Barlease::system_falls_asleep`, `system_woke_up`). The PCI core wakes the device
/// while user space is frozen: nobody is in the middle of anything.
pub(crate) fn sleep(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.begin(Event::Sleep);
    this.act(Act::SystemResume);
    if this.has(Bug::SystemWakeUpDoesNotAsk) {
        this.update(Change::End(Event::Sleep));
    } else {
        this.end_and_resample(Event::Sleep);
    }
    this.end("system sleep", Uses::Nothing)
}

/// How an error ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The device goes on.
    Recovered,
    /// After a reset of its link.
    LinkReset,
    /// Not at all.
    Failed,
}

/// A device error and its recovery (`Barlease::error_detected`, `error_resume`), each with the
/// device lock and `pci_bus_sem` held (`report_error_detected`, `report_resume`,
/// `report_perm_failure_detected`).
pub(crate) fn error(setting: Setting, outcome: Outcome) -> Program {
    let mut this = Builder::new(setting);
    let reported = |this: &mut Builder, f: &dyn Fn(&mut Builder)| {
        this.locked(Lock::Bus, Mode::Read, |this| {
            this.locked(Lock::Device, Mode::Write, f);
        });
    };
    reported(&mut this, &|this| {
        this.begin_unwaited(Event::Error);
        this.act(Act::Device(Change2::Recovering(true)));
    });
    if outcome == Outcome::LinkReset {
        this.locked(Lock::Device, Mode::Write, |this| {
            this.act(Act::Device(Change2::LinkReset(true)));
            this.act(Act::Device(Change2::LinkReset(false)));
        });
    }
    reported(&mut this, &|this| {
        if outcome == Outcome::Failed {
            this.fail();
            this.act(Act::Device(Change2::Failed));
        } else {
            this.act(Act::Device(Change2::Recovering(false)));
            this.end_and_resample(Event::Error);
        }
    });
    this.end(&format!("error, {outcome:?}"), Uses::Nothing)
}

/// The last fd is closed, when nobody uses it; then what `and_then` says.
pub(crate) fn close(setting: Setting, and_then: Next) -> Program {
    let mut this = Builder::new(setting);
    this.put(Instr::Await(Cond::FdIdle));
    closing(&mut this);
    if and_then != Next::Nothing {
        // `Vtable::open_device`.
        this.opening();
        this.act(Act::Disabled(false));
        this.opened();
    }
    if let Next::OpenAndExport { buffer, vma } = and_then {
        export_and_touch(&mut this, buffer, vma);
    }
    this.end("close", Uses::Open)
}

/// The event after a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing.
    Nothing,
    /// The device is opened.
    Open,
    /// And something is exported through the new fd.
    OpenAndExport { buffer: usize, vma: usize },
}

/// `Vtable::close_device`: `Barlease::closing`, then the core ends low power
/// (`vfio_pci_core_disable`), and disables the function.
fn closing(this: &mut Builder) {
    this.within("Vtable::close_device", |this| {
        this.close();
        if this.sleeps {
            this.locked(Lock::Memory, Mode::Write, |this| {
                this.act(Act::Device(Change2::LeaveLowPower));
            });
            this.resume();
        }
        this.act(Act::Disabled(true));
    });
}

/// The driver is unbound (`Vtable::remove`), with the device lock held: what was pulled out is
/// taken away at once, what was not when its owner, who is asked to, closes it.
pub(crate) fn removal(setting: Setting, pulled_out: bool) -> Program {
    let mut this = Builder::new(setting);
    if pulled_out {
        this.act(Act::Device(Change2::Gone));
    }
    this.locked(Lock::Device, Mode::Write, |this| {
        this.unbinding();
        // `vfio_unregister_group_dev`.
        this.put(Instr::Await(Cond::OwnersGone));
        closing(this);
    });
    let name = if pulled_out { "pulled out" } else { "unbound" };
    this.end(name, Uses::Nothing)
}

/// The last reference to a buffer's dma-buf goes.
pub(crate) fn releaser(setting: Setting, buffer: usize) -> Program {
    let mut this = Builder::new(setting);
    this.put(Instr::Await(Cond::Unused(buffer)));
    this.release(buffer);
    this.end(&format!("release of {buffer}"), Uses::Nothing)
}

/// A read through the device fd that copies to user memory with `memory_lock` held, and faults
/// there: on ordinary memory.
pub(crate) fn reader(setting: Setting) -> Program {
    let mut this = Builder::new(setting);
    this.locked(Lock::Memory, Mode::Read, |this| {
        this.locked(Lock::Mmap, Mode::Read, |_| {});
    });
    this.end("read that faults", Uses::Fd)
}
