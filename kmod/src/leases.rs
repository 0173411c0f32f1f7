// SPDX-License-Identifier: GPL-2.0

//! The leases of a bound function, and whether its memory may be touched.
//!
//! # Lock order
//!
//! From the outermost to the innermost:
//!
//! 1. the core's `memory_lock`, often held when we are called; in an mmap and in the close of a VMA
//!    the `mmap_lock`, and under it [`Leases::bar_maps`], which is held while an internal buffer is
//!    made;
//! 2. [`Buffer::live`](crate::buffer::Buffer), one a buffer: what looks at its dma-buf and its
//!    release exclude each other with. Not held while importers are waited for;
//! 3. the reservation lock of a dma-buf, often held by importers when we are called;
//! 4. [`Leases::table`], to add, remove and look up buffers only: never held across a drain, a copy
//!    from or to user memory, an allocation, or a fault;
//! 5. the P2P providers of the device, read while an importer finds out how it reaches the device;
//! 6. [`Buffer::gate`](crate::buffer::Buffer), one a buffer: read by its faults, which already hold
//!    the `mmap_lock` or the lock of a VMA; written, with nothing called meanwhile, by a
//!    thread that waits for the faults that have begun;
//! 7. [`Leases::access`]: to change it and to ask for it, with nothing called meanwhile.
//!
//! Never taken: `memory_lock` in mmap, fault and `reset_prepare`, and never waited for in
//! `reset_done` (a reader of it may be waiting for the `mmap_lock`, and a reset may come with it
//! held); `access` by a thread that holds it.
//!
//! No tenant's fault takes a lock that another tenant's takes: the thread that holds it may have
//! lost its processor.
//!
//! # Taking memory away
//!
//! An event source begins its event, which shuts the door to new entries in page tables and new
//! mappings of importers; drains what is there; lets the event happen; and ends it.
//!
//! The door is a word, [`Leases::reachable`], and one a buffer, whether it was revoked for good.
//! The thread that takes memory away, the taker, writes them before it looks for what there is.
//! They are read
//!
//! - by a fault with the gate of its buffer held until its entry is in. The taker passes the gate
//!   before it zaps: a fault that came first is over then, one that comes later sees the word;
//! - by an importer that maps with the reservation lock held until its mapping is counted, which
//!   the taker takes too, before it asks whether there is one.
//!
//! A buffer that nobody maps and nobody is attached to is passed over, by the counts of the
//! buffers, and of all of them together. So these counts go up before the word is read, the word is
//! written before they are read, and between the two there is a full barrier on either side
//! (`Full`): one of the two sees the other.

use crate::{
    buffer::{BarMaps, Buffer, Names, PATIENCE_MS},
    model::access::{Access, Epoch, Event, NOTHING, Reasons, Sampled, State},
    sys::{
        delayed::Later,
        eventfd::EventSlot,
        fence::{Fence, FenceWatch},
        flag::{Flag, peek},
        p2p::Providers,
        ratelimit::Ratelimit,
        shortage::{pause, until_there_is_memory},
        tree::Tree,
    },
};
use kernel::{
    new_mutex,
    prelude::*,
    str::CString,
    sync::{
        Arc, Mutex,
        atomic::{Atomic, Full, Relaxed, Release},
    },
};

/// All buffers of one bound function.
///
/// Lives as long as the last of them, which may be longer than the function is bound: nothing here
/// leads to the device.
#[pin_data]
pub(crate) struct Leases {
    bdf: CString,
    names: Names,
    providers: Arc<Providers>,
    #[pin]
    access: Mutex<Access>,
    /// [`Access::reachable`] of `access`, with which it is written.
    reachable: Atomic<u64>,
    /// [`Access::word`], likewise.
    epoch: Atomic<u64>,
    /// How often the door was opened.
    openings: Atomic<u64>,
    /// [`Access::is_stale`] of `access`, likewise. Each access through the device fd reads it, and
    /// is to pay nothing where nothing sleeps.
    asleep: Flag,
    #[pin]
    table: Mutex<Tree<Buffer>>,
    #[pin]
    bar_maps: Mutex<BarMaps>,
    /// The eventfd of the open, which hears of every change.
    events: Arc<EventSlot>,
    /// [`Look::ending`]. Written with `access` locked.
    ending: Flag,
    /// See [`Self::has_untold`].
    untold: Flag,
    /// VMAs that map its buffers, and importers attached to them: each is the sum of what the
    /// buffers count.
    vmas: Atomic<i64>,
    attachments: Atomic<i64>,
    #[pin]
    log_limit: Ratelimit,
    /// Of its own: a process that is refused often must not keep warnings of importers out of the
    /// log.
    #[pin]
    complaint_limit: Ratelimit,
}

/// The result of one look at the state of a buffer.
pub(crate) struct Look {
    /// The state.
    pub(crate) state: State,
    /// Whether the device was closed or pulled out, so that its buffers are dead, and a thread has
    /// not yet taken them from all processes and told all importers.
    pub(crate) ending: bool,
}

/// Whether the importers that are told to let go are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// They are: nothing reaches the memory after that.
    Yes,
    /// They are told, and let go when they do. The caller holds what others need.
    No,
}

/// How many buffers are looked up at a time.
pub(crate) const BATCH: usize = 16;

/// How many are looked at, at the most, with the table locked.
const LOOKS: usize = 64;

impl Leases {
    /// No leases of the function `bdf`, which is not open.
    pub(crate) fn new(bdf: &CStr, providers: Arc<Providers>) -> Result<Arc<Self>> {
        let bdf = CString::try_from_fmt(fmt!("{bdf}"))?;
        let events = Arc::pin_init(EventSlot::new(), GFP_KERNEL)?;
        Arc::pin_init(
            try_pin_init!(Self {
                names: Names::new(&bdf),
                bdf,
                providers,
                access <- new_mutex!(Access::new(), "barlease::access"),
                reachable: Atomic::new(NOTHING),
                epoch: Atomic::new(NOTHING),
                openings: Atomic::new(0),
                asleep: Flag::new(),
                table <- new_mutex!(Tree::new(), "barlease::table"),
                bar_maps <- new_mutex!(BarMaps::default(), "barlease::bar_maps"),
                events,
                ending: Flag::new(),
                untold: Flag::new(),
                vmas: Atomic::new(0),
                attachments: Atomic::new(0),
                log_limit <- Ratelimit::new(),
                complaint_limit <- Ratelimit::new(),
            }),
            GFP_KERNEL,
        )
    }

    /// Name of the function.
    pub(crate) fn bdf(&self) -> &CStr {
        &self.bdf
    }

    /// The names of its dma-bufs.
    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// The P2P providers by which importers reach its BARs.
    pub(crate) fn providers(&self) -> &Providers {
        &self.providers
    }

    /// The internal buffers of mappings through the device fd.
    pub(crate) fn bar_maps(&self) -> &Mutex<BarMaps> {
        &self.bar_maps
    }

    /// The eventfd of the open.
    pub(crate) fn events(&self) -> &Arc<EventSlot> {
        &self.events
    }

    /// Something has changed that the owner may want to ask about.
    #[inline]
    pub(crate) fn notify(&self) {
        self.events.signal();
    }

    /// Whether a message that a user causes may be logged now.
    pub(crate) fn may_log(&self) -> bool {
        self.log_limit.allows()
    }

    /// Whether a warning of an importer that is waited for may be logged now.
    pub(crate) fn may_complain(&self) -> bool {
        self.complaint_limit.allows()
    }

    /// The device is about to be opened.
    pub(crate) fn opening(&self) {
        self.access.lock().opening();
    }

    /// The device was opened. `sample` is as for [`Self::update`].
    pub(crate) fn open(&self, sample: impl FnOnce(&Access) -> Sampled) {
        self.update(|access| {
            let sampled = sample(access);
            let _epoch = access.open(sampled);
            self.epoch.store(access.word(), Relaxed);
        });
    }

    /// The device is being closed, or is gone: all its buffers are dead when this returns.
    ///
    /// As for an event, in phases. But since what is dead stays dead, each buffer keeps what its
    /// importers still do: the owner of a device that was pulled out can ask about it.
    pub(crate) fn close(&self) {
        let mut first = false;
        self.shut_door(|access| {
            first = access.epoch().is_some();
            if first {
                self.ending.set(true);
            }
            access.close();
            self.epoch.store(NOTHING, Relaxed);
        });
        self.zap();
        let has_importers = peek(&self.attachments) != 0;
        if has_importers {
            let untold = |buffer: &Buffer| buffer.is_attached() && !buffer.is_told();
            self.for_each(untold, |buffer| {
                let Ok(()) = buffer.tell_and_watch(pause);
            });
        }
        if first {
            let access = self.access.lock();
            self.ending.set(false);
            drop(access);
            self.notify();
        }
        if has_importers {
            // An importer may have detached meanwhile, and still be at work.
            let at_work = |buffer: &Buffer| buffer.is_waited_for() || buffer.is_left_by_close();
            self.for_each(at_work, |buffer| buffer.wait());
        }
    }

    /// The current epoch; `ENODEV` when the device is not open.
    pub(crate) fn epoch(&self) -> Result<Epoch> {
        Epoch::of_word(peek(&self.epoch)).ok_or(ENODEV)
    }

    /// Whether `epoch` is that of the last open of the device, which may be over.
    pub(crate) fn is_latest(&self, epoch: Epoch) -> bool {
        self.access.lock().is_latest(epoch)
    }

    /// The epoch of the last open of the device, which may be over; `None` when it was never open.
    pub(crate) fn latest_epoch(&self) -> Option<Epoch> {
        self.access.lock().latest()
    }

    /// `event` begins: nothing of this device can be reached when this returns, but for what
    /// importers have mapped that are not waited for.
    pub(crate) fn begin(&self, event: Event, wait: Wait) {
        self.shut(|access| access.begin(event), wait);
    }

    /// Recovery from an error has failed. As for `begin`.
    pub(crate) fn fail(&self, wait: Wait) {
        self.shut(Access::fail, wait);
    }

    /// Makes a change after which nothing may be reached, and takes away what is there.
    fn shut(&self, change: impl FnOnce(&mut Access), wait: Wait) {
        self.shut_door(change);
        self.drain(wait);
    }

    /// Makes a change after which nothing new may be reached.
    fn shut_door(&self, change: impl FnOnce(&mut Access)) {
        let mut access = self.access.lock();
        change(&mut access);
        self.reachable.xchg(NOTHING, Full);
        drop(access);
        self.notify();
    }

    /// Changes the state of access in one step, which `change` computes: to end an event, and to
    /// say what the device says now. `change` may sample the device, so that samples are in the
    /// order of their taking.
    #[inline]
    pub(crate) fn update(&self, change: impl FnOnce(&mut Access)) {
        let mut access = self.access.lock();
        // An owner that did not ask to hear of changes pays for one look. One that asks just now
        // looks at the state after that, and so with `access` locked after this.
        let before = self.events.is_set().then(|| access.clone());
        change(&mut access);
        self.asleep.set(access.is_stale());
        // When an open door is seen does not matter.
        let reachable = access.reachable();
        self.reachable.store(reachable, Release);
        if reachable != NOTHING {
            self.openings.fetch_add(1, Relaxed);
        }
        let changed = before.is_some_and(|before| before != *access);
        drop(access);
        if changed {
            self.notify();
        }
    }

    /// Lets `act` happen, which may lend the memory bit of the hardware's COMMAND.
    pub(crate) fn lending<R>(&self, act: impl FnOnce() -> R) -> R {
        self.access.lock().lend();
        let result = act();
        self.access.lock().give_back();
        result
    }

    /// Whether the device may say something else by now than it did when it was asked last: because
    /// it slept then, or was half awake.
    pub(crate) fn is_asleep(&self) -> bool {
        self.asleep.get()
    }

    /// Looks at the state of a buffer of `epoch`.
    pub(crate) fn look(&self, epoch: Epoch, revoked: bool) -> Look {
        let access = self.access.lock();
        Look {
            state: access.state(epoch, revoked),
            ending: self.ending.get(),
        }
    }

    /// Whether the buffers of `epoch` may be touched, but for those that were revoked for good.
    /// Whose answer that is for how long is said above.
    #[inline]
    pub(crate) fn is_reachable(&self, epoch: Epoch) -> bool {
        epoch.is_reachable(peek(&self.reachable))
    }

    /// Whether nothing of the device may be touched, as far as can be seen without a lock.
    #[inline]
    pub(crate) fn is_shut(&self) -> bool {
        peek(&self.reachable) == NOTHING
    }

    /// How often the door was opened: a thread that sees another number than before knows that it
    /// was open meanwhile.
    pub(crate) fn openings(&self) -> u64 {
        self.openings.load(Relaxed)
    }

    /// Why the owner of the device may not touch its memory while it is held awake.
    pub(crate) fn reasons_when_awake(&self) -> Reasons {
        self.access.lock().reasons_when_awake()
    }

    /// One of its buffers has a VMA more, which it has counted; what is looked at after this is
    /// looked at after both.
    pub(crate) fn vma_opened(&self) {
        self.vmas.fetch_add(1, Full);
    }

    /// One of its buffers has a VMA less.
    pub(crate) fn vma_closed(&self) {
        self.vmas.fetch_sub(1, Relaxed);
    }

    /// One of its buffers has an importer more, which it has counted. As for `vma_opened`.
    pub(crate) fn attached(&self) {
        self.attachments.fetch_add(1, Full);
    }

    /// One of its buffers has an importer less.
    pub(crate) fn detached(&self) {
        self.attachments.fetch_sub(1, Relaxed);
    }

    /// Adds a buffer, which every drain from here on finds.
    pub(crate) fn add(&self, buffer: Arc<Buffer>) -> Result {
        let added = self.table.lock().insert(buffer);
        // One that was not added is dropped without the lock. The kernel gives no inode number
        // twice.
        added.map_err(|_| EEXIST)
    }

    /// Takes a buffer out, if it was ever added.
    pub(crate) fn remove(&self, id: u64) {
        let removed = self.table.lock().remove(id);
        // The last reference to it may be dropped here: without the lock.
        drop(removed);
        self.notify();
    }

    /// The buffer with this id.
    pub(crate) fn find(&self, id: u64) -> Option<Arc<Buffer>> {
        self.table.lock().get(id).map(Into::into)
    }

    /// Calls `f` with each buffer that is `wanted`, without a lock; `wanted` is asked with the
    /// table locked. Buffers that are added meanwhile may be left out. Allocates nothing, since it
    /// must not fail.
    #[inline]
    pub(crate) fn for_each(
        &self,
        mut wanted: impl FnMut(&Buffer) -> bool,
        mut f: impl FnMut(&Arc<Buffer>),
    ) {
        // Often there is one, or none: it costs no batch.
        let mut first = [None];
        let next = self.look_up(0, &mut wanted, &mut first);
        if let [Some(buffer)] = first {
            f(&buffer);
        }
        if let Some(from) = next {
            self.for_each_from(from, wanted, f);
        }
    }

    /// The same, from an id on.
    #[inline(never)]
    fn for_each_from(
        &self,
        from: u64,
        mut wanted: impl FnMut(&Buffer) -> bool,
        mut f: impl FnMut(&Arc<Buffer>),
    ) {
        let mut batch = [const { None }; BATCH];
        let mut next = Some(from);
        while let Some(from) = next {
            next = self.look_up(from, &mut wanted, &mut batch);
            for place in &mut batch {
                let Some(buffer) = place.take() else { break };
                f(&buffer);
            }
        }
    }

    /// Fills `batch`, from its first place on, with buffers that are `wanted`, in ascending order
    /// of their ids, from the id `from` on: the id to go on from, unless there are no more buffers.
    /// Looks at a few only, so that an export or the end of a buffer does not wait long for the
    /// table.
    #[inline]
    pub(crate) fn look_up(
        &self,
        from: u64,
        wanted: &mut impl FnMut(&Buffer) -> bool,
        batch: &mut [Option<Arc<Buffer>>],
    ) -> Option<u64> {
        let mut places = batch.iter_mut();
        let mut place = places.next();
        let table = self.table.lock();
        for (seen, buffer) in table.iter_from(from).enumerate() {
            let Some(vacant) = place.take().filter(|_| seen < LOOKS) else {
                return Some(buffer.id());
            };
            place = if wanted(&buffer) {
                *vacant = Some(buffer.into());
                places.next()
            } else {
                Some(vacant)
            };
        }
        None
    }

    /// Takes away what each buffer has, where its state says that nothing new can come.
    ///
    /// In phases, so that it takes as long as the slowest importer and not the sum, and CPU access
    /// waits for no importer.
    fn drain(&self, wait: Wait) {
        self.zap();
        if peek(&self.attachments) != 0 {
            self.drain_importers(wait);
        }
    }

    /// Takes each buffer out of the page tables of all processes.
    fn zap(&self) {
        if peek(&self.vmas) != 0 {
            self.for_each(Buffer::is_mapped, |buffer| buffer.zap());
        }
    }

    /// Tells the importers of every buffer, and then waits for the fences that were there and for
    /// the mappings that have to go.
    ///
    /// A fence that somebody adds later is not waited for, so nobody can make this last for ever.
    /// The importers of a buffer that was revoked have been told, and its fences were looked at
    /// then: the rest of those is waited for, and nothing that a holder adds to a dead lease.
    #[inline(never)]
    fn drain_importers(&self, wait: Wait) {
        let mut fences = KVVec::new();
        let mut at_work = false;
        self.for_each(Buffer::is_attached, |buffer| {
            if !buffer.is_told() {
                if wait == Wait::Yes {
                    let Ok(fence) = buffer.tell_and_look(pause);
                    if let Some(fence) = fence {
                        watch(buffer, fence, &mut fences);
                    }
                } else if !buffer.try_tell() {
                    self.untold.set(true);
                }
            }
            // Those that let go when they are told are most. None begins anything after that.
            at_work |= buffer.is_in_use();
        });
        if wait == Wait::No {
            return;
        }
        for watched in &fences {
            watched.wait();
        }
        if at_work {
            self.for_each(Buffer::is_waited_for, |buffer| buffer.wait());
        }
    }

    /// Whether importers are to be told that the thread which took memory away could not tell
    /// without waiting for a lock that a process may hold.
    pub(crate) fn has_untold(&self) -> bool {
        self.untold.get()
    }

    /// Tells them, unless the memory may be touched again.
    fn tell_untold(&self) {
        if !self.untold.get() {
            return;
        }
        self.untold.set(false);
        self.for_each(Buffer::is_attached, |buffer| {
            if !buffer.is_reachable() {
                buffer.tell();
            }
        });
    }

    /// Tells the importers of buffers whose revocation was killed while memory was short, if there
    /// is some now.
    fn tell_left(&self) {
        self.for_each(Buffer::is_left_untold, |buffer| {
            // One for which memory is short now is tried again the next time.
            let _ = buffer.tell_and_watch(|| Err(ENOMEM));
        });
    }

    /// Warns of the revoked buffers that nobody waits for and that an importer still uses: whether
    /// there are any.
    pub(crate) fn warn_of_draining(&self) -> bool {
        let mut any = false;
        self.for_each(Buffer::is_left_draining, |buffer| {
            any = true;
            buffer.complain();
        });
        any
    }
}

/// The fences that a buffer had when an event began.
#[pin_data]
struct Watched {
    #[pin]
    watch: FenceWatch,
    buffer: Arc<Buffer>,
}

impl Watched {
    fn wait(&self) {
        while !self.watch.pending().wait(PATIENCE_MS) {
            self.buffer.complain();
        }
    }
}

/// Adds `fence`, that of `buffer`, to those that are waited for.
///
/// Taking away must not fail: where memory is short, this waits for some.
#[cold]
fn watch(buffer: &Arc<Buffer>, fence: Fence, fences: &mut KVVec<Pin<KBox<Watched>>>) {
    let Ok(watched) = until_there_is_memory(pause, || {
        fences.reserve(1, GFP_KERNEL)?;
        KBox::pin_init(
            pin_init!(Watched {
                watch <- FenceWatch::new(None),
                buffer: buffer.clone(),
            }),
            GFP_KERNEL,
        )
    });
    watched.watch.arm(fence);
    // There is room.
    let _ = fences.push_within_capacity(watched);
}

impl Later for Leases {
    const MILLISECONDS: u32 = PATIENCE_MS;

    fn run(&self) -> bool {
        self.tell_untold();
        self.tell_left();
        self.warn_of_draining()
    }
}
