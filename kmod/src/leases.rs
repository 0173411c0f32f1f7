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
//! 6. [`Leases::access`]: to change it and to ask for it, with nothing called meanwhile.
//!
//! Never taken: `memory_lock` in mmap, fault and `reset_prepare`, and never waited for in
//! `reset_done` (a reader of it may be waiting for the `mmap_lock`, and a reset may come with it
//! held); `access` by a thread that holds it.
//!
//! No tenant's fault takes a lock that another tenant's takes: the thread that holds it may have
//! lost its processor. [`Buffer::gate`](crate::buffer::Buffer) is no lock: a fault is counted there
//! while it inserts its entry, for which it takes the kernel's locks of page tables and nothing
//! else. A thread that waits for that may hold anything that is named above.
//!
//! # Taking memory away
//!
//! An event source begins its event, which shuts the door to new entries in page tables and new
//! mappings of importers; drains what is there; lets the event happen; and ends it. The code is in
//! [`taking`](crate::taking).
//!
//! The door is a word, [`Leases::reachable`], and one a buffer, whether it was revoked for good.
//! The thread that takes memory away, the taker, writes them before it looks for what there is.
//! They are read
//!
//! - by a fault that is counted at the gate of its buffer until its entry is in. The taker waits
//!   there before it zaps: a fault that came first is over then, one that comes later sees the
//!   word;
//! - by an importer that maps with the reservation lock held until its mapping is counted, which
//!   the taker takes too, before it asks whether there is one.
//!
//! A buffer that nobody maps and nobody is attached to is passed over, by the counts of the
//! buffers, and of all of them together. So these counts go up before the word is read, the word is
//! written before they are read, and between the two there is a full barrier on either side
//! (`Full`): one of the two sees the other. So it is at the gate.

use crate::{
    bar_maps::BarMaps,
    model::access::{Access, Epoch, NOTHING, Reasons, Sampled, State},
    names::Names,
    sys::{
        eventfd::EventSlot,
        flag::{Flag, peek},
        p2p::Providers,
        ratelimit::Ratelimit,
        tree::{Item, Tree},
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
/// leads to the device. Nothing here knows what a buffer is either, beyond its key, since a buffer
/// refers to this; what is done with buffers, an owner of both does ([`taking`](crate::taking)).
#[pin_data]
pub(crate) struct Leases<B: Item> {
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
    table: Mutex<Tree<B>>,
    #[pin]
    bar_maps: Mutex<BarMaps>,
    /// The eventfd of the open, which hears of every change.
    events: Arc<EventSlot>,
    /// [`Look::ending`]. Written with `access` locked.
    ending: Flag,
    /// See [`Self::untold`].
    untold: Flag,
    /// How often what is left was looked at.
    runs: Atomic<u32>,
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

/// How long to wait for an importer before it is named in the log, and again each time after that.
pub(crate) const PATIENCE_MS: u32 = 10_000;

/// How many buffers are looked up at a time.
pub(crate) const BATCH: usize = 16;

/// How many are looked at, at the most, with the table locked.
const LOOKS: usize = 64;

impl<B: Item> Leases<B> {
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
                runs: Atomic::new(0),
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

    /// The device is being closed, or is gone: nothing may be reached any more, and all buffers are
    /// dead. Whether it was open, so that [`Self::has_ended`] is to follow.
    pub(crate) fn shut_for_good(&self) -> bool {
        let mut first = false;
        self.shut_door(|access| {
            first = access.epoch().is_some();
            if first {
                self.ending.set(true);
            }
            access.close();
            self.epoch.store(NOTHING, Relaxed);
        });
        first
    }

    /// Every buffer was taken from all processes, and its importers were told.
    pub(crate) fn has_ended(&self) {
        let access = self.access.lock();
        self.ending.set(false);
        drop(access);
        self.notify();
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

    /// Makes a change after which nothing new may be reached.
    pub(crate) fn shut_door(&self, change: impl FnOnce(&mut Access)) {
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

    /// Has the rest of earlier events looked at once more: how often it was before.
    pub(crate) fn look_again(&self) -> u32 {
        self.runs.fetch_add(1, Relaxed)
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
    /// The comment above says whose answer that is, for how long.
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

    /// Whether any of its buffers is mapped.
    pub(crate) fn is_mapped(&self) -> bool {
        peek(&self.vmas) != 0
    }

    /// Whether any of its buffers has an importer.
    pub(crate) fn is_attached(&self) -> bool {
        peek(&self.attachments) != 0
    }

    /// Whether importers are to be told that the thread which took memory away could not tell
    /// without waiting for a lock that a process may hold.
    pub(crate) fn untold(&self) -> &Flag {
        &self.untold
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
    pub(crate) fn add(&self, buffer: Arc<B>) -> Result {
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
    pub(crate) fn find(&self, id: u64) -> Option<Arc<B>> {
        self.table.lock().get(id).map(Into::into)
    }

    /// Calls `f` with each buffer that is `wanted`, without a lock; `wanted` is asked with the
    /// table locked. Buffers that are added meanwhile may be left out. Allocates nothing, since it
    /// must not fail.
    #[inline]
    pub(crate) fn for_each(&self, mut wanted: impl FnMut(&B) -> bool, mut f: impl FnMut(&Arc<B>)) {
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
        mut wanted: impl FnMut(&B) -> bool,
        mut f: impl FnMut(&Arc<B>),
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
        wanted: &mut impl FnMut(&B) -> bool,
        batch: &mut [Option<Arc<B>>],
    ) -> Option<u64> {
        let mut places = batch.iter_mut();
        let mut place = places.next();
        let table = self.table.lock();
        for (seen, buffer) in table.iter_from(from).enumerate() {
            let Some(vacant) = place.take().filter(|_| seen < LOOKS) else {
                return Some(buffer.key());
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
}
