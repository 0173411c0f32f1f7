// SPDX-License-Identifier: GPL-2.0

//! A buffer: ranges of one BAR, exported as a dma-buf.

use crate::{
    PAGE_SHIFT, abi,
    leases::Leases,
    model::{
        access::{Epoch, State},
        batch,
        ranges::{self, Mapping, Misfit, Segment},
        tph::Tph,
    },
    sys::{
        dma_buf::{DmaBuf, Exporter, Fence, Live, MappedInode, NAME_LEN, Operations},
        errno,
        flag::peek,
        idle::Outstanding,
        items::Items,
        p2p::{Importer, Mapped, Run},
        rwsem::RwSem,
        vma::{self, Fault, HAS_PMD_ENTRIES, MemoryType, NewVma, OpenFile, Outcome, PMD_ORDER},
    },
    table::Number,
};
use kernel::{
    prelude::*,
    str::BStr,
    sync::{
        Arc, ArcBorrow,
        atomic::{Atomic, Full, Relaxed},
    },
};

/// What a buffer holds.
pub(crate) struct Contents {
    /// The BAR.
    pub(crate) bar: u32,
    /// Bytes: the sum of the segments.
    pub(crate) size: u64,
    /// Where its pages are.
    pub(crate) segments: Items<Segment>,
}

/// Ranges of one BAR, exported as a dma-buf.
///
/// Referenced by its dma-buf, by each VMA that maps it and by the table of its [`Leases`]. It does
/// not lead to the device: once its epoch is over it is a dead shell.
///
/// A mapping of a BAR through the device fd is a buffer too, an internal one of exactly the mapped
/// span, so that one mechanism takes everything away. No fd of it exists.
#[pin_data]
pub(crate) struct Buffer {
    leases: Arc<Leases>,
    epoch: Epoch,
    contents: Contents,
    /// The page offset that a mapping of its first page has: not 0 for a mapping through the device
    /// fd, which shows the offset that the user passed.
    first_page: u64,
    /// Keeps the device open while a BAR is mapped through its fd.
    device_file: Option<OpenFile>,
    /// Whether it was revoked for good: 1, or 0.
    revoked: Atomic<u32>,
    /// Held by a fault from its look at the state until its entry is in, so who takes memory away waits for the faults of
    /// this buffer, and not for those of others.
    #[pin]
    gate: RwSem<()>,
    /// `MEMATTR_*` that the next mapping gets.
    memattr: Atomic<u32>,
    /// VMAs that map it.
    vmas: Atomic<i64>,
    /// Those of them that are write-combining: each keeps the type that it was made with.
    wc_vmas: Atomic<i64>,
    /// Importers attached.
    attachments: Atomic<i32>,
    /// Mappings that importers have. Changed with the reservation lock held.
    mappings: Outstanding,
    inode: MappedInode,
    number: Number,
    /// Locked by what looks at the dma-buf; its release locks it first.
    #[pin]
    live: Live<Guarded>,
}

/// What the reservation lock of a buffer's dma-buf guards.
pub(crate) struct Guarded {
    /// Steering tags for importers.
    pub(crate) tph: Tph,
}

/// How long to wait for an importer before it is named in the log, and again each time after that.
const PATIENCE_MS: u32 = 10_000;

static OPERATIONS: Operations<Buffer> = Operations::new();

impl Buffer {
    /// The dma-buf, with the open flags `flags`, of a buffer that is a lease.
    pub(crate) fn export(leases: &Arc<Leases>, contents: Contents, flags: u32) -> Result<DmaBuf> {
        Self::make(leases, contents, MemoryType::Uncached, flags, None)
    }

    /// Makes `vma`, a mapping of a BAR through the device fd, a mapping of an internal buffer of
    /// what it maps.
    pub(crate) fn map_bar(
        leases: &Arc<Leases>,
        contents: Contents,
        memory_type: MemoryType,
        vma: NewVma<'_>,
    ) -> Result {
        let flags = kernel::bindings::O_RDWR;
        let dmabuf = Self::make(leases, contents, memory_type, flags, Some(&vma))?;
        let buffer: Arc<Self> = dmabuf.exported::<Self>().ok_or(EINVAL)?.into();
        // The VMA keeps the dma-buf from here on, and the buffer keeps the device.
        dmabuf.become_file_of(&vma);
        vma.map_io(buffer, memory_type);
        Ok(())
    }

    fn make(
        leases: &Arc<Leases>,
        contents: Contents,
        memory_type: MemoryType,
        flags: u32,
        vma: Option<&NewVma<'_>>,
    ) -> Result<DmaBuf> {
        let epoch = leases.epoch()?;
        let name = leases.names().of(contents.bar, memory_type);
        let dmabuf = DmaBuf::export(contents.size, flags, &name, |dmabuf| {
            Arc::pin_init(
                pin_init!(Self {
                    leases: leases.clone(),
                    epoch,
                    contents,
                    first_page: vma.map_or(0, NewVma::page_offset),
                    device_file: vma.map(NewVma::file),
                    revoked: Atomic::new(0),
                    gate <- RwSem::new(()),
                    memattr: Atomic::new(memattr_of(memory_type)),
                    vmas: Atomic::new(0),
                    wc_vmas: Atomic::new(0),
                    attachments: Atomic::new(0),
                    mappings: Outstanding::none(),
                    inode: dmabuf.inode(),
                    number: Number::new(),
                    live <- dmabuf.live(Guarded { tph: Tph::NONE }),
                }),
                GFP_KERNEL_ACCOUNT,
            )
        })?;
        leases.add(dmabuf.exported::<Self>().ok_or(EINVAL)?.into())?;
        Ok(dmabuf)
    }

    /// Its place in the table of its [`Leases`].
    pub(crate) fn number(&self) -> &Number {
        &self.number
    }

    /// Whether it belongs to the latest open of the device of `leases`: the current one, for who
    /// comes through the device fd.
    pub(crate) fn is_of(&self, leases: &Arc<Leases>) -> bool {
        Arc::ptr_eq(&self.leases, leases) && leases.is_latest(self.epoch)
    }

    /// Whether it is a mapping of a BAR through the device fd.
    pub(crate) fn is_internal(&self) -> bool {
        self.device_file.is_some()
    }

    /// Revokes it for good: neither a process nor a device can reach it when this returns. `EBADFD`
    /// when that was done before.
    pub(crate) fn revoke(&self) -> Result {
        let first = self.revoked.xchg(1, Full) == 0;
        if self.is_mapped() {
            self.zap();
        }
        if self.is_attached() && self.invalidate() {
            self.wait();
        }
        if first {
            Ok(())
        } else {
            Err(errno::EBADFD.into())
        }
    }

    fn is_revoked(&self) -> bool {
        peek(&self.revoked) != 0
    }

    /// Whether it is accessible. For whom that holds how long is said in [`leases`](crate::leases).
    fn is_reachable(&self) -> bool {
        !self.is_revoked() && self.leases.is_reachable(self.epoch)
    }

    /// `ENODEV` when it is dead.
    pub(crate) fn alive(&self) -> Result {
        match self.state() {
            State::Ok | State::Revoked(_) => Ok(()),
            State::Dead => Err(ENODEV),
        }
    }

    /// Sets the memory type of later mappings. `ENODEV` when it is dead.
    pub(crate) fn set_memattr(&self, memattr: u32) -> Result {
        self.alive()?;
        self.memattr.store(memattr, Relaxed);
        Ok(())
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
            memattr: self.memattr.load(Relaxed),
            region_index: self.contents.bar,
            size: self.contents.size,
            nr_ranges: self.contents.segments.len() as u32,
            nr_attachments: self.attachments.load(Relaxed) as u32,
        }
    }

    /// VMAs that map it.
    pub(crate) fn vmas(&self) -> i64 {
        peek(&self.vmas)
    }

    /// Those of them that are write-combining.
    pub(crate) fn wc_vmas(&self) -> i64 {
        self.wc_vmas.load(Relaxed)
    }

    /// Its name, filled up with NUL; `None` while somebody else looks at the dma-buf.
    pub(crate) fn name(&self) -> Option<[u8; NAME_LEN]> {
        self.live.try_lock().map(|live| live.name())
    }

    /// Whether a process maps it.
    pub(crate) fn is_mapped(&self) -> bool {
        self.vmas() != 0
    }

    /// Takes it out of the page tables of all processes, once its state lets no fault bring it in.
    pub(crate) fn zap(&self) {
        // A fault that saw another state is over then.
        drop(self.gate.write());
        self.inode.zap();
    }

    /// Whether it has importers.
    pub(crate) fn is_attached(&self) -> bool {
        peek(&self.attachments) != 0
    }

    /// Tells its importers that their mappings are to go: whether something is left to wait for. What
    /// has no mapping is not told: there is nothing to undo, and a pinned importer may take it as
    /// final.
    pub(crate) fn invalidate(&self) -> bool {
        self.live.lock().invalidate(|| self.mappings.any())
    }

    /// Waits until its importers have ended what they do and undone their mappings, however long
    /// that takes: until then their devices reach the memory.
    pub(crate) fn wait(&self) {
        // `live` is not locked meanwhile: an event has other importers to tell, and must not wait
        // for this one before it does.
        while let Some(fence) = self.pending_fence() {
            if !fence.wait(PATIENCE_MS) {
                self.complain("to end its work");
            }
        }
        while !self.mappings.wait(PATIENCE_MS) {
            self.complain("to undo its mapping");
        }
    }

    fn pending_fence(&self) -> Option<Fence> {
        self.live.lock().pending_fence()
    }

    fn complain(&self, what: &str) {
        let live = self.live.lock();
        let (bdf, bar, size) = (self.leases.bdf(), self.contents.bar, self.contents.size);
        let name = live.name();
        let name = BStr::from_bytes(name.split(|&byte| byte == 0).next().unwrap_or(&[]));
        live.for_each_importer(|importer| {
            pr_warn!(
                "{bdf}: revoking {name} (BAR {bar}, {size:#x} bytes) waits for {importer} {what}\n"
            );
        });
    }

    /// What an importer maps: the ranges, those that touch as one.
    fn runs(&self) -> impl Iterator<Item = Run> + Clone + '_ {
        ranges::runs(&self.contents.segments, PAGE_SHIFT)
            .map(|(address, length)| Run { address, length })
    }

    fn state(&self) -> State {
        self.leases.state(self.epoch, self.is_revoked())
    }

    /// Serves a fault while the buffer is accessible.
    ///
    /// An entry above a page is uncached: write-combining ones are made a page at a time, since
    /// the kernel gives no way to make others. Where no entry above a page is possible, now or
    /// later, one fault brings in what such an entry would have.
    // Once for each memory type, which then is a constant.
    #[inline(always)]
    fn insert(&self, fault: &Fault<'_>, order: u32) -> Outcome {
        let span = fault.span();
        let Some(page_offset) = span.page_offset.checked_sub(self.first_page) else {
            return Outcome::SIGBUS;
        };
        let mapping = Mapping {
            start: span.start,
            end: span.end,
            page_offset,
        };
        let segments = &self.contents.segments;
        let address = fault.address();
        let large = match fault.memory_type() {
            MemoryType::Uncached if HAS_PMD_ENTRIES => {
                ranges::entry_for(segments, &mapping, address, PMD_ORDER, PAGE_SHIFT)
            }
            MemoryType::Uncached | MemoryType::WriteCombining => Err(Misfit::Order),
        };
        match (order, large) {
            (_, Err(Misfit::Outside)) => Outcome::SIGBUS,
            (PMD_ORDER, Ok(pfn)) => fault.insert(pfn, PMD_ORDER),
            (0, Ok(_)) => match ranges::entry_for(segments, &mapping, address, 0, PAGE_SHIFT) {
                Ok(pfn) => fault.insert(pfn, 0),
                Err(_) => Outcome::SIGBUS,
            },
            (0, Err(Misfit::Order)) => {
                match batch::batch_for(segments, &mapping, address, PMD_ORDER, PAGE_SHIFT) {
                    Ok(run) => fault.insert_run(run.address, run.pfn, run.pages),
                    Err(_) => Outcome::SIGBUS,
                }
            }
            _ => Outcome::FALLBACK,
        }
    }
}

/// The names of a function's dma-bufs: `barlease:<BDF>/<bar>`, with `+wc` behind it where it is that; cut where such a name
/// ends.
pub(crate) struct Names {
    /// What they begin with.
    start: [u8; NAME_LEN],
    length: usize,
}

impl Names {
    /// Those of the function `bdf`.
    pub(crate) fn new(bdf: &CStr) -> Self {
        let mut this = Self {
            start: [0; NAME_LEN],
            length: 0,
        };
        let parts = [b"barlease:", bdf.to_bytes(), b"/"];
        // Not the last: it stays NUL.
        let places = this.start.iter_mut().take(NAME_LEN - 1);
        for (place, byte) in places.zip(parts.into_iter().flatten()) {
            *place = *byte;
            this.length += 1;
        }
        this
    }

    fn of(&self, bar: u32, memory_type: MemoryType) -> [u8; NAME_LEN] {
        let suffix: &[u8] = match memory_type {
            MemoryType::Uncached => b"",
            MemoryType::WriteCombining => b"+wc",
        };
        let mut name = self.start;
        if let Some(place) = name.get_mut(self.length) {
            // A BAR has one digit.
            *place = b'0'.wrapping_add(bar as u8);
        }
        let places = name.iter_mut().skip(self.length + 1);
        for (place, byte) in places.zip(suffix) {
            *place = *byte;
        }
        name
    }
}

/// The uAPI's number of a memory type.
fn memattr_of(memory_type: MemoryType) -> u32 {
    match memory_type {
        MemoryType::Uncached => abi::MEMATTR_NC,
        MemoryType::WriteCombining => abi::MEMATTR_WC,
    }
}

#[expect(
    unsafe_code,
    reason = "a promise about `operations` and `live`, kept below"
)]
// SAFETY: `OPERATIONS` is a static and `live` a field. `Buffer::export` makes the value for the
// dma-buf that is being exported, and gives it away to it.
unsafe impl Exporter for Buffer {
    type UnderResv = Guarded;

    fn operations() -> &'static Operations<Self> {
        &OPERATIONS
    }

    fn live(&self) -> &Live<Guarded> {
        &self.live
    }

    fn mmap(this: ArcBorrow<'_, Self>, vma: NewVma<'_>) -> Result {
        if !vma.is_shared() {
            return Err(EINVAL);
        }
        // Only a first look: what is dead stays dead. The fault handler decides.
        if this.is_internal() {
            return Err(ENODEV);
        }
        this.alive()?;
        let memory_type = match this.memattr.load(Relaxed) {
            abi::MEMATTR_WC if !vma::write_combining_is_real() => {
                return Err(errno::EOPNOTSUPP.into());
            }
            abi::MEMATTR_WC => MemoryType::WriteCombining,
            _ => MemoryType::Uncached,
        };
        vma.map_io(Arc::<Self>::from(this), memory_type);
        Ok(())
    }

    fn attach(&self) -> Result {
        self.attachments.fetch_add(1, Relaxed);
        self.leases.attached();
        let provider = self.leases.providers().check(self.contents.bar);
        if self.is_reachable() && provider.is_ok() {
            return Ok(());
        }
        self.detach();
        // Before the provider, which a device that was closed, meanwhile too, no longer has.
        self.alive()?;
        provider.and(Err(ENODEV))
    }

    fn detach(&self) {
        self.attachments.fetch_sub(1, Relaxed);
        self.leases.detached();
    }

    fn map(&self, importer: &mut Importer<'_>) -> Result<Mapped> {
        // Who takes memory away after this look needs the reservation lock to tell the importer,
        // and so waits for the mapping that is being made.
        if !self.is_reachable() {
            return Err(ENODEV);
        }
        let Contents { bar, size, .. } = self.contents;
        let mapped = importer.map(self.leases.providers(), bar, self.runs(), size)?;
        self.mappings.begin();
        Ok(mapped)
    }

    fn unmap(&self, importer: &mut Importer<'_>, mapped: Mapped) {
        importer.unmap(mapped, self.runs());
        self.mappings.end();
    }

    fn release(this: Arc<Self>) {
        this.leases.remove(&this.number);
    }
}

impl vma::Mapped for Buffer {
    #[inline(always)]
    fn fault(&self, fault: &Fault<'_>, order: u32) -> Outcome {
        if order > PMD_ORDER {
            return Outcome::FALLBACK;
        }
        // The state holds until the entry is in: who takes memory away waits for that, and zaps.
        let gate = self.gate.read();
        let outcome = if self.is_reachable() {
            self.insert(fault, order)
        } else {
            Outcome::SIGBUS
        };
        drop(gate);
        outcome
    }

    fn vma_opened(&self, memory_type: MemoryType) {
        self.vmas.fetch_add(1, Relaxed);
        self.leases.vma_opened();
        if memory_type == MemoryType::WriteCombining {
            self.wc_vmas.fetch_add(1, Relaxed);
        }
    }

    fn vma_closed(&self, memory_type: MemoryType) {
        self.vmas.fetch_sub(1, Relaxed);
        self.leases.vma_closed();
        if memory_type == MemoryType::WriteCombining {
            self.wc_vmas.fetch_sub(1, Relaxed);
        }
    }
}
