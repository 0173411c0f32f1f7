// SPDX-License-Identifier: GPL-2.0

//! What a bound function has leased, and whether its memory may be touched.
//!
//! # Lock order
//!
//! From the outermost to the innermost:
//!
//! 1. the core's `memory_lock`, often held when we are called;
//! 2. [`Buffer::live`](crate::buffer::Buffer), one a buffer: what looks at its dma-buf and its
//!    release exclude each other with. Not held while importers are waited for;
//! 3. the reservation lock of a dma-buf, often held by importers when we are called;
//! 4. [`Leases::table`], to add, remove and look up buffers only: never held across a drain, a copy
//!    from or to user memory, or a fault;
//! 5. the P2P providers of the device, read while an importer maps;
//! 6. whether one buffer was revoked: read by its faults, written by its revocation only, with
//!    nothing called meanwhile;
//! 7. [`Leases::access`]: read by faults, which already hold the `mmap_lock` or the lock of a VMA;
//!    written only to change it, with nothing called meanwhile.
//!
//! Never taken: `memory_lock` in mmap, fault, `reset_prepare` and `reset_done` (a reader of it may
//! be waiting for the `mmap_lock`, and a reset may come with it held); `access` by a thread that
//! holds it.
//!
//! A revocation does not write `access`: who holds it for reading may have lost its processor to the
//! revoking process, and who wants to read it then would wait behind the writer, faults of every
//! other buffer among them.
//!
//! # Taking memory away
//!
//! An event source begins its event, which shuts the door to new entries in page tables, drains
//! what is there, lets the event happen, and ends it. A fault that came first holds `access`, and the
//! lock of its buffer, until its entry is in, so the zap that follows finds it.

use crate::{
    buffer::{Buffer, Names},
    model::access::{Access, Epoch, Event, Levels, State},
    sys::{flag::Flag, p2p::Providers, ratelimit::Ratelimit, rwsem::RwSem, sleep::Sleeper},
};
use kernel::{
    new_mutex,
    prelude::*,
    rbtree::{RBTree, RBTreeNodeReservation},
    str::CString,
    sync::{
        Arc, Mutex,
        atomic::{Atomic, Relaxed},
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
    access: RwSem<Access>,
    /// Whether the device sleeps, or was seen half awake, as `access` says. Written with `access` locked for writing, read
    /// by whoever had an access through the device fd, who is to pay nothing where nothing sleeps.
    asleep: Flag,
    #[pin]
    table: Mutex<Table>,
    /// Buffers in the table, or a few more. Needs no order of its own: what has an entry in a page table, or a mapping of an
    /// importer, was counted before, and got that with `access` locked, which a drain comes after.
    count: Atomic<i64>,
    /// How many tickets were drawn.
    tickets: Atomic<u64>,
    #[pin]
    log_limit: Ratelimit,
}

/// Buffers that have not been released, in the order of their tickets.
struct Table {
    buffers: RBTree<u64, Arc<Buffer>>,
}

/// How many buffers are looked up at a time.
const BATCH: usize = 16;

/// A place in the table, and the right to take one buffer out of it.
pub(crate) struct Ticket(u64);

impl Leases {
    /// No leases of the function `bdf`, which is not open.
    pub(crate) fn new(bdf: &CStr, providers: Arc<Providers>) -> Result<Arc<Self>> {
        let bdf = CString::try_from_fmt(fmt!("{bdf}"))?;
        Arc::pin_init(
            try_pin_init!(Self {
                names: Names::new(&bdf),
                bdf,
                providers,
                access <- RwSem::new(Access::new()),
                asleep: Flag::new(),
                table <- new_mutex!(
                    Table { buffers: RBTree::new() },
                    "barlease::table"
                ),
                count: Atomic::new(0),
                tickets: Atomic::new(0),
                log_limit <- Ratelimit::new(),
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

    /// What importers reach its BARs by.
    pub(crate) fn providers(&self) -> &Providers {
        &self.providers
    }

    /// Whether a message that a user causes may be logged now.
    pub(crate) fn may_log(&self) -> bool {
        self.log_limit.allows()
    }

    /// The device was opened.
    pub(crate) fn open(&self, levels: Levels) {
        self.update(|access| {
            let _epoch = access.open(levels);
        });
    }

    /// The device is being closed, or is gone: all its buffers are dead when this returns.
    pub(crate) fn close(&self) {
        self.access.write().close();
        self.drain();
    }

    /// The current epoch; `ENODEV` when the device is not open.
    pub(crate) fn epoch(&self) -> Result<Epoch> {
        self.access.read().epoch().ok_or(ENODEV)
    }

    /// Whether `epoch` is that of the last open of the device, which may be over.
    pub(crate) fn is_latest(&self, epoch: Epoch) -> bool {
        self.access.read().is_latest(epoch)
    }

    /// `event` begins: nothing of this device can be reached when this returns.
    pub(crate) fn begin(&self, event: Event) {
        self.access.write().begin(event);
        self.drain();
    }

    /// Changes the state of access in one step, which `change` computes: to end an event, and to
    /// say what the device says now. `change` may sample the device, so that samples are in the
    /// order of their taking.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Access)) {
        let mut access = self.access.write();
        change(&mut access);
        let levels = access.levels();
        // Before a reset the core wakes the device outside of any event, and then restores it. An event that ends between
        // the two finds a device that is awake and decodes nothing.
        let half_awake = levels.undecoded && !levels.memory_off;
        self.asleep
            .set(levels.sleeping || levels.low_power || half_awake);
    }

    /// Whether the device slept, or was half awake, when it was asked last.
    pub(crate) fn is_asleep(&self) -> bool {
        self.asleep.get()
    }

    /// Runs `f` with the state of a buffer of `epoch`, which does not change until `f` is done.
    pub(crate) fn with_state<R>(
        &self,
        epoch: Epoch,
        revoked: bool,
        f: impl FnOnce(State) -> R,
    ) -> R {
        let access = self.access.read();
        f(access.state(epoch, revoked))
    }

    /// A ticket, for one buffer.
    pub(crate) fn ticket(&self) -> Ticket {
        Ticket(self.tickets.fetch_add(1, Relaxed))
    }

    /// Adds the buffer of that ticket, which every drain from here on finds.
    pub(crate) fn add(&self, ticket: &Ticket, buffer: Arc<Buffer>) -> Result {
        let node = RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?.into_node(ticket.0, buffer);
        self.count.fetch_add(1, Relaxed);
        self.table.lock().buffers.insert(node);
        Ok(())
    }

    /// Takes a buffer out, if it was ever added.
    pub(crate) fn remove(&self, ticket: &Ticket) {
        let node = self.table.lock().buffers.remove_node(&ticket.0);
        if node.is_some() {
            self.count.fetch_sub(1, Relaxed);
        }
        // What this may drop last is dropped without the lock.
        drop(node);
    }

    /// Calls `f` with each buffer, without a lock. Buffers that are added meanwhile may be left
    /// out. Allocates nothing, since it must not fail.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&Buffer)) {
        let mut next = (self.count.load(Relaxed) != 0).then_some(0);
        while let Some(id) = next {
            let mut batch = [const { None }; BATCH];
            next = self.at_or_after(id, &mut batch);
            for buffer in batch.iter().map_while(Option::as_ref) {
                f(buffer);
            }
        }
    }

    /// Fills `batch`, from its first place on, with the buffers from `id` on; where to go on, unless there are no more.
    fn at_or_after(&self, id: u64, batch: &mut [Option<Arc<Buffer>>; BATCH]) -> Option<u64> {
        let mut table = self.table.lock();
        let mut cursor = table.buffers.cursor_lower_bound_mut(&id)?;
        for place in batch {
            *place = Some(cursor.current().1.clone());
            cursor = cursor.move_next()?;
        }
        Some(*cursor.current().0)
    }

    /// Takes away what each buffer has, where its state says that nothing new can come.
    ///
    /// In phases, so that it takes as long as the slowest importer and not the sum, and CPU access
    /// waits for no importer.
    fn drain(&self) {
        let mut attached = false;
        self.for_each(|buffer| {
            buffer.zap();
            attached |= buffer.is_attached();
        });
        if attached {
            self.for_each(Buffer::invalidate);
            self.for_each(Buffer::wait);
        }
    }
}

impl Sleeper for Leases {
    fn fall_asleep(&self) {
        self.begin(Event::Sleep);
    }

    fn wake_up(&self) {
        self.update(|access| access.end(Event::Sleep));
    }
}
