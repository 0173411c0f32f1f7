// SPDX-License-Identifier: GPL-2.0

//! A buffer: ranges of one BAR, exported as a dma-buf.

use crate::{
    PAGE_SHIFT, abi,
    leases::{Leases, Ticket},
    model::{
        access::{Epoch, State},
        ranges::{self, Mapping, Misfit, Segment},
    },
    sys::{
        dma_buf::{DmaBuf, Exporter, Live, MappedInode, NAME_LEN, Operations},
        errno,
        vma::{Fault, Mapped, NewVma, Outcome, PMD_ORDER},
    },
};
use kernel::{
    prelude::*,
    str::CString,
    sync::{
        Arc, ArcBorrow, SetOnce,
        atomic::{Atomic, Relaxed},
    },
};

/// Ranges of one BAR, exported as a dma-buf.
///
/// Referenced by its dma-buf, by each VMA that maps it and by the table of its [`Leases`]. It does
/// not lead to the device: once its epoch is over it is a dead shell.
#[pin_data]
pub(crate) struct Buffer {
    leases: Arc<Leases>,
    epoch: Epoch,
    bar: u32,
    size: u64,
    segments: KVVec<Segment>,
    /// Whether it was revoked for good. Changed only with the access of `leases` locked for
    /// writing, read with it locked.
    revoked: Atomic<u32>,
    /// VMAs that map it.
    vmas: Atomic<i64>,
    inode: SetOnce<MappedInode>,
    ticket: SetOnce<Ticket>,
    /// Held while it is drained; its release takes it first.
    #[pin]
    live: Live,
}

static OPERATIONS: Operations<Buffer> = Operations::new();

impl Buffer {
    /// Makes a buffer of the ranges `segments` of `bar`, of `size` bytes in all, and a dma-buf with
    /// the open flags `flags` that exports it.
    pub(crate) fn export(
        leases: &Arc<Leases>,
        bar: u32,
        size: u64,
        segments: KVVec<Segment>,
        flags: u32,
    ) -> Result<DmaBuf> {
        let epoch = leases.epoch()?;
        let name = CString::try_from_fmt(fmt!("barlease:{}/{bar}", leases.bdf()))?;
        let buffer = Arc::pin_init(
            pin_init!(Self {
                leases: leases.clone(),
                epoch,
                bar,
                size,
                segments,
                revoked: Atomic::new(0),
                vmas: Atomic::new(0),
                inode: SetOnce::new(),
                ticket: SetOnce::new(),
                live <- Live::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let mut dmabuf = DmaBuf::export(buffer.clone(), size, flags)?;
        dmabuf.set_name(&name)?;
        buffer.inode.populate(dmabuf.inode());
        let ticket = leases.add(buffer.clone())?;
        buffer.ticket.populate(ticket);
        Ok(dmabuf)
    }

    /// Whether it belongs to the current open of the device of `leases`.
    pub(crate) fn is_of(&self, leases: &Arc<Leases>) -> bool {
        Arc::ptr_eq(&self.leases, leases) && leases.epoch() == Ok(self.epoch)
    }

    /// Revokes it for good: no process can reach it when this returns. `EBADFD` when that was done
    /// before.
    pub(crate) fn revoke(&self) -> Result {
        let first = self
            .leases
            .exclusively(|_| self.revoked.xchg(1, Relaxed) == 0);
        let live = self.live.lock();
        self.zap();
        drop(live);
        if first {
            Ok(())
        } else {
            Err(errno::EBADFD.into())
        }
    }

    /// Its state as the uAPI has it.
    pub(crate) fn status(&self) -> abi::DmaBufStatus {
        let (state, reasons) = match self.state() {
            State::Ok => (abi::STATE_OK, 0),
            State::Revoked(reasons) => (abi::STATE_REVOKED, reasons.bits()),
            State::Dead => (abi::STATE_DEAD, 0),
        };
        abi::DmaBufStatus {
            dmabuf_fd: 0,
            reserved: 0,
            state,
            reasons,
            memattr: abi::MEMATTR_NC,
            region_index: self.bar,
            size: self.size,
            nr_ranges: self.segments.len() as u32,
            nr_attachments: 0,
        }
    }

    /// VMAs that map it.
    pub(crate) fn vmas(&self) -> i64 {
        self.vmas.load(Relaxed)
    }

    /// Its name, filled up with NUL; `None` while it is being drained.
    pub(crate) fn name(&self) -> Option<[u8; NAME_LEN]> {
        self.live.try_lock().map(|live| live.name())
    }

    /// Takes it out of the page tables of all processes.
    ///
    /// The count of VMAs needs no order of its own: a VMA that had an entry before the door was
    /// shut was counted before its fault released the access lock that shut it.
    pub(crate) fn zap(&self) {
        if self.vmas() == 0 {
            return;
        }
        if let Some(inode) = self.inode.as_ref() {
            inode.zap();
        }
    }

    fn state(&self) -> State {
        self.leases
            .with_state(self.epoch, || self.is_revoked(), |state| state)
    }

    fn is_revoked(&self) -> bool {
        self.revoked.load(Relaxed) != 0
    }
}

impl Exporter for Buffer {
    fn operations() -> &'static Operations<Self> {
        &OPERATIONS
    }

    fn live(&self) -> &Live {
        &self.live
    }

    fn mmap(this: ArcBorrow<'_, Self>, vma: NewVma<'_>) -> Result {
        if !vma.is_shared() {
            return Err(EINVAL);
        }
        // Only a first look: what is dead stays dead. The fault handler decides.
        if this.state() == State::Dead {
            return Err(ENODEV);
        }
        vma.map_io(Arc::<Self>::from(this));
        Ok(())
    }

    fn release(this: Arc<Self>) {
        if let Some(ticket) = this.ticket.as_ref() {
            this.leases.remove(ticket);
        }
    }
}

impl Mapped for Buffer {
    fn fault(&self, fault: &Fault<'_>, order: u32) -> Outcome {
        if order != 0 && order != PMD_ORDER {
            return Outcome::FALLBACK;
        }
        let span = fault.span();
        let mapping = Mapping {
            start: span.start,
            end: span.end,
            page_offset: span.page_offset,
        };
        let entry = ranges::entry_for(&self.segments, &mapping, fault.address(), order, PAGE_SHIFT);
        let pfn = match entry {
            Ok(pfn) => pfn,
            Err(Misfit::Order) => return Outcome::FALLBACK,
            Err(Misfit::Outside) => return Outcome::SIGBUS,
        };
        // The state holds until the entry is in: who takes memory away waits for that, and zaps.
        self.leases.with_state(
            self.epoch,
            || self.is_revoked(),
            |state| match state {
                State::Ok => fault.insert(pfn, order),
                State::Revoked(_) | State::Dead => Outcome::SIGBUS,
            },
        )
    }

    fn vma_opened(&self) {
        self.vmas.fetch_add(1, Relaxed);
    }

    fn vma_closed(&self) {
        self.vmas.fetch_sub(1, Relaxed);
    }
}
