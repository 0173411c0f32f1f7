// SPDX-License-Identifier: GPL-2.0

//! A buffer: ranges of one BAR, exported as a dma-buf.

use crate::{
    PAGE_SHIFT, abi,
    bar_maps::{BarMap, BarMaps},
    leases::{Leases, Look, PATIENCE_MS},
    model::{
        access::{Epoch, State},
        batch::{self, Batch},
        ranges::{self, Mapping, Misfit, Run, Segment},
        tph::Tph,
    },
    refuse,
    sys::{
        bar::Bar,
        dma_buf::{DmaBuf, Exporter, Live, MappedInode, NAME_LEN, Operations},
        errno,
        fence::{Fence, FenceWatch, Found},
        flag::{Flag, peek},
        gigantic::EntryGate,
        idle::Outstanding,
        items::Items,
        p2p::{Importer, Mapped},
        patience::{Patience, Pauses, until_there_is_memory},
        tree::{self, Links},
        vma::{
            self, Fault, GIGANTIC_ORDER, HAS_PMD_ENTRIES, MemoryType, NewVma, Outcome, PMD_ORDER,
            PmdEntry, RUN_ORDER,
        },
    },
};
use kernel::{
    bindings,
    prelude::*,
    str::BStr,
    sync::{
        Arc, ArcBorrow,
        atomic::{Atomic, Full, Relaxed},
    },
};

/// The memory of a buffer.
pub(crate) struct Contents {
    /// The BAR.
    pub(crate) memory: Bar,
    /// Where its pages are.
    pub(crate) segments: Items<Segment>,
}

impl Contents {
    /// Which BAR it is.
    fn bar(&self) -> u32 {
        self.memory.index()
    }

    /// Bytes.
    fn size(&self) -> u64 {
        self.segments
            .last()
            .map_or(0, |last| last.end << PAGE_SHIFT)
    }
}

/// Ranges of one BAR, exported as a dma-buf.
///
/// Referenced by its dma-buf, by each VMA that maps it and by the table of its [`Leases`]. It does
/// not lead to the device: once its epoch is over it is a dead shell.
///
/// The mappings of a BAR through the device fd are those of a buffer, too, an internal one of the
/// whole BAR ([`BarMaps`]), so that one mechanism takes everything away. No fd of it exists.
#[pin_data]
pub(crate) struct Buffer {
    leases: Arc<Leases<Self>>,
    epoch: Epoch,
    contents: Contents,
    /// The page offset that a mapping of its first page has: not 0 for a mapping through the device
    /// fd, which shows the offset that the user passed.
    first_page: u64,
    /// Whether it is that of the mappings of a BAR through the device fd.
    internal: bool,
    /// `O_ACCMODE` of its open flags.
    access: u8,
    /// Whether it was revoked for good.
    revoked: Atomic<bool>,
    /// A fault is inside from its look at the state until its entry is in. So a thread that takes
    /// memory away waits for the faults of this buffer, and not for those of others. It says, too,
    /// whether they may insert entries of 1 GiB.
    gate: EntryGate,
    /// `MEMATTR_*` that the next mapping gets.
    memattr: Atomic<u32>,
    /// VMAs that map it. So many that this wraps do not fit into the memory of a machine.
    vmas: Atomic<i32>,
    /// Those of them that are write-combining: each keeps the type that it was made with.
    wc_vmas: Atomic<i32>,
    /// Importers attached.
    attachments: Atomic<i32>,
    /// Mappings that importers have. Changed with the reservation lock held.
    mappings: Outstanding,
    inode: MappedInode,
    /// Its place in the table of its [`Leases`].
    links: Links<Buffer>,
    /// The fences that it had when it died: when it was revoked, or when its device was closed or
    /// pulled out. Known once its importers have been told of that: no mapping of it can be in the
    /// making after that.
    revocation: Found,
    /// Whether it was revoked, and nobody waits for the importers that it had then.
    left: Flag,
    /// Locked by what looks at the dma-buf; its release locks it first.
    #[pin]
    live: Live<Guarded>,
}

/// The data that the reservation lock of a buffer's dma-buf guards.
pub(crate) struct Guarded {
    /// Steering tags for importers.
    pub(crate) tph: Tph,
}

/// With the count of its [`Arc`] it is to fit into an allocation of 256 bytes: a function may have
/// many. Locks that are debugged, or may sleep as those of a real-time kernel do, are larger.
#[cfg(not(any(
    CONFIG_DEBUG_LOCK_ALLOC,
    CONFIG_DEBUG_MUTEXES,
    CONFIG_DEBUG_RWSEMS,
    CONFIG_DEBUG_SPINLOCK,
    CONFIG_PREEMPT_RT
)))]
const _: () = assert!(core::mem::size_of::<Buffer>() <= 248);

static OPERATIONS: Operations<Buffer> = Operations::new();

impl Buffer {
    /// The dma-buf, with the open flags `flags`, of a buffer that is a lease.
    pub(crate) fn export(
        leases: &Arc<Leases<Self>>,
        contents: Contents,
        flags: u32,
    ) -> Result<DmaBuf> {
        Self::make(leases, contents, MemoryType::Uncached, flags, None)
    }

    /// Makes `vma`, a mapping of a BAR through the device fd, a mapping of the internal buffer of
    /// that BAR and memory type. `contents` is the whole BAR, whose first page is at the page
    /// offset `first_page` of the device fd.
    pub(crate) fn map_bar(
        leases: &Arc<Leases<Self>>,
        contents: Contents,
        memory_type: MemoryType,
        first_page: u64,
        vma: NewVma<'_>,
    ) -> Result {
        let bar = contents.bar();
        let mut maps = leases.bar_maps().lock();
        let place = maps.place(bar, memory_type).ok_or(EINVAL)?;
        if place.is_none() {
            let internal = Some(first_page);
            let dmabuf = Self::make(leases, contents, memory_type, bindings::O_RDWR, internal)?;
            *place = Some(BarMap {
                dmabuf,
                _device_file: vma.file(),
            });
        }
        let map = place.as_ref().ok_or(EINVAL)?;
        let buffer: Arc<Self> = map.dmabuf.exported::<Self>().ok_or(EINVAL)?.into();
        // The device may have gone away with its fd still open.
        if let Err(error) = buffer.alive() {
            let unused = buffer.take_unused(&mut maps, memory_type);
            drop(maps);
            drop(unused);
            return Err(error);
        }
        // The VMA keeps the dma-buf from here on, and `maps` keeps the device open for all of them.
        map.dmabuf.become_file_of(&vma);
        vma.map_io(buffer, memory_type);
        Ok(())
    }

    /// Takes its mappings out of `maps`, if there are none any more. VMAs are added with the maps
    /// locked, or made of others.
    fn take_unused(&self, maps: &mut BarMaps, memory_type: MemoryType) -> Option<BarMap> {
        let place = maps.place(self.contents.bar(), memory_type)?;
        let is_its = |map: &mut BarMap| {
            let found = map.dmabuf.exported::<Self>();
            found.is_some_and(|found| core::ptr::eq(&*found, self))
        };
        if self.is_mapped() {
            return None;
        }
        place.take_if(is_its)
    }

    /// `internal` is the page offset of the first page in the device fd, of a buffer that is no
    /// lease.
    fn make(
        leases: &Arc<Leases<Self>>,
        contents: Contents,
        memory_type: MemoryType,
        flags: u32,
        internal: Option<u64>,
    ) -> Result<DmaBuf> {
        let epoch = leases.epoch()?;
        let name = leases.names().of(contents.bar(), memory_type);
        let gigantic = contents.size() >> PAGE_SHIFT >> GIGANTIC_ORDER != 0
            && GIGANTIC_ORDER != 0
            && vma::has_gigantic_entries();
        let dmabuf = DmaBuf::export(contents.size(), flags, &name, |dmabuf| {
            Arc::pin_init(
                pin_init!(Self {
                    leases: leases.clone(),
                    epoch,
                    contents,
                    first_page: internal.unwrap_or(0),
                    internal: internal.is_some(),
                    // CAST: Two bits.
                    access: (flags & bindings::O_ACCMODE) as u8,
                    revoked: Atomic::new(false),
                    gate: EntryGate::new(gigantic),
                    memattr: Atomic::new(memattr_of(memory_type)),
                    vmas: Atomic::new(0),
                    wc_vmas: Atomic::new(0),
                    attachments: Atomic::new(0),
                    mappings: Outstanding::none(),
                    inode: dmabuf.inode(),
                    links: Links::new(),
                    revocation: Found::unknown(),
                    left: Flag::new(),
                    live <- dmabuf.live(Guarded { tph: Tph::NONE }),
                }),
                GFP_KERNEL_ACCOUNT,
            )
        })?;
        leases.add(dmabuf.exported::<Self>().ok_or(EINVAL)?.into())?;
        Ok(dmabuf)
    }

    /// Its id: what the uAPI names it by.
    pub(crate) fn id(&self) -> u64 {
        self.inode.number()
    }

    /// Whether it belongs to the latest open of the device of `leases`: the current one, if the
    /// caller comes through the device fd.
    pub(crate) fn is_of(&self, leases: &Arc<Leases<Self>>) -> bool {
        Arc::ptr_eq(&self.leases, leases) && leases.is_latest(self.epoch)
    }

    /// Whether it was made in `epoch`.
    pub(crate) fn is_of_epoch(&self, epoch: Option<Epoch>) -> bool {
        epoch == Some(self.epoch)
    }

    /// Whether it is that of the mappings of a BAR through the device fd.
    pub(crate) fn is_internal(&self) -> bool {
        self.internal
    }

    /// Makes it dead for good, and takes it from all processes; its importers are yet to be told.
    /// `EBADFD` when that was done before.
    pub(crate) fn kill(&self) -> Result {
        let first = !self.revoked.xchg(true, Full);
        self.leases.notify();
        if self.is_mapped() {
            self.zap();
        }
        if first {
            Ok(())
        } else {
            Err(errno::EBADFD.into())
        }
    }

    /// Tells its importers that it is dead, and watches what they still do with it; of each end of
    /// that the owner is to hear. Fails when its patience is over.
    pub(crate) fn tell_and_watch<P: Patience>(&self, patience: &mut P) -> Result<(), P::Error> {
        let mut watch = None;
        if self.is_attached() {
            if let Some(fence) = self.tell_and_look(patience)? {
                watch = Some(self.watch(fence, patience)?);
            }
        }
        self.revocation.publish(watch);
        // Without the full barrier of that, this could find no eventfd for an owner that has set
        // one and then seen the old state.
        self.leases.notify();
        Ok(())
    }

    /// Begins to watch `fence`.
    #[cold]
    fn watch<P: Patience>(
        &self,
        fence: Fence,
        patience: &mut P,
    ) -> Result<Pin<KBox<FenceWatch>>, P::Error> {
        let watch = until_there_is_memory(patience, |_| {
            let events = Some(self.leases.events().clone());
            Ok(KBox::pin_init(FenceWatch::new(events), GFP_KERNEL))
        })?;
        watch.arm(fence);
        Ok(watch)
    }

    /// Whether it is dead, its importers were told, and their fences and mappings are counted.
    /// Until then one may be about to count a mapping that it has made.
    pub(crate) fn is_told(&self) -> bool {
        self.revocation.is_known()
    }

    /// Waits until it drains no more. `EINTR` when a fatal signal comes meanwhile.
    pub(crate) fn wait_killable(&self) -> Result {
        for outstanding in self.outstanding() {
            while !outstanding.wait_killable(PATIENCE_MS)? {
                self.complain();
            }
        }
        Ok(())
    }

    /// Nobody waits for its importers from here on.
    pub(crate) fn leave_draining(&self) {
        self.left.set(true);
    }

    /// Whether its importers are yet to be told that it is dead, and nobody else does.
    pub(crate) fn is_left_untold(&self) -> bool {
        self.left.get() && !self.is_told()
    }

    /// Whether it drains, and nobody waits for that.
    pub(crate) fn is_left_draining(&self) -> bool {
        self.left.get() && self.is_draining()
    }

    /// Whether it is dead, and something that it had before may still reach the memory: an importer
    /// has yet to end what it does or to undo its mapping, or nobody has looked yet whether one
    /// has, or the entries of processes have yet to go.
    pub(crate) fn is_draining(&self) -> bool {
        self.drains_in(&self.look())
    }

    /// The same as of that look at the state.
    fn drains_in(&self, look: &Look) -> bool {
        // A thread that closes the device passes over buffers that have no importer.
        let untold = !self.is_told() && (self.is_revoked() || look.ending);
        look.state == State::Dead && (untold || self.is_in_use())
    }

    /// The counts of the fences and mappings by which its importers may still reach the memory.
    fn outstanding(&self) -> impl Iterator<Item = &Outstanding> {
        let all = [self.revocation.pending(), Some(&self.mappings)];
        all.into_iter().flatten()
    }

    /// Whether an importer may still reach the memory.
    pub(crate) fn is_in_use(&self) -> bool {
        self.outstanding().any(Outstanding::any)
    }

    /// Whether it was revoked for good.
    pub(crate) fn is_revoked(&self) -> bool {
        peek(&self.revoked)
    }

    /// Whether it is accessible. For whom that holds how long is said in [`leases`](crate::leases).
    pub(crate) fn is_reachable(&self) -> bool {
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

    /// The answer of STATUS.
    pub(crate) fn status(&self) -> abi::DmaBufStatus {
        self.status_in(self.state())
    }

    /// The same, once its state was found to be `state`.
    fn status_in(&self, state: State) -> abi::DmaBufStatus {
        let (state, reasons) = match state {
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
            region_index: self.contents.bar(),
            size: self.contents.size(),
            nr_ranges: self.contents.segments.len() as u32,
            nr_attachments: self.attachments.load(Relaxed) as u32,
        }
    }

    /// Its record in LIST.
    pub(crate) fn record(&self) -> abi::DmaBufRecord {
        // Looked at once: a record must not say of one moment what is so in another.
        let look = self.look();
        let status = self.status_in(look.state);
        let name = self.name();
        let flag = |set, flag| if set { flag } else { 0 };
        abi::DmaBufRecord {
            id: self.id(),
            size: status.size,
            region_index: status.region_index,
            nr_ranges: status.nr_ranges,
            memattr: status.memattr,
            state: status.state,
            reasons: status.reasons,
            flags: flag(self.internal, abi::BUFFER_INTERNAL)
                | flag(self.drains_in(&look), abi::BUFFER_DRAINING)
                | flag(name.is_none(), abi::BUFFER_NAME_BUSY),
            nr_attachments: status.nr_attachments,
            nr_mappings: self.mappings.count(),
            nr_vmas: self.vmas() as u32,
            nr_wc_vmas: self.wc_vmas() as u32,
            access: self.access.into(),
            reserved: 0,
            name: name.unwrap_or([0; NAME_LEN]),
        }
    }

    /// VMAs that map it.
    pub(crate) fn vmas(&self) -> i32 {
        peek(&self.vmas)
    }

    /// Those of them that are write-combining.
    pub(crate) fn wc_vmas(&self) -> i32 {
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
        // A fault that saw another state is over then. A full barrier stands between the change of
        // state and this: a call of `xchg`.
        self.gate.wait();
        self.inode.zap();
    }

    /// Whether it has importers.
    pub(crate) fn is_attached(&self) -> bool {
        peek(&self.attachments) != 0
    }

    /// Tells its importers that their mappings are to go, unless another thread has one of the
    /// locks that this takes: whether it was done. An importer that has no mapping is not told:
    /// there is nothing to undo, and a pinned importer may take it as final.
    pub(crate) fn try_tell(&self) -> bool {
        let patience = &mut Pauses(0);
        let live = patience.live(&self.live);
        live.is_ok_and(|live| live.invalidate(patience, || self.mappings.any()).is_ok())
    }

    /// Tells its importers as `try_tell`: one fence for all that they, and those that were told
    /// before, still do with it.
    ///
    /// Fences are looked at once in each event that takes the memory away: a process can go on
    /// adding some for ever (`DMA_BUF_IOCTL_IMPORT_SYNC_FILE`), and need not even be an importer
    /// for it.
    ///
    /// Fails when its patience is over.
    pub(crate) fn tell_and_look<P: Patience>(
        &self,
        patience: &mut P,
    ) -> Result<Option<Fence>, P::Error> {
        let live = patience.live(&self.live)?;
        let look = live.invalidate_and_look(patience, || self.mappings.any())?;
        drop(live);
        match look {
            Ok(fence) => Ok(fence),
            Err(_) => until_there_is_memory(patience, |patience| {
                let live = patience.live(&self.live)?;
                live.fences(patience)
            }),
        }
    }

    /// Waits until its importers have undone their mappings, and, of a buffer that was revoked,
    /// until they have ended what they did then: until then their devices reach the memory, however
    /// long that takes.
    pub(crate) fn wait(&self) {
        // `live` is not locked meanwhile: an event has other importers to tell, and must not wait
        // for this one before it does.
        for outstanding in self.outstanding() {
            while !outstanding.wait(PATIENCE_MS) {
                self.complain();
            }
        }
    }

    /// Whether there is something to wait for, once its importers have been told.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.is_attached() && self.is_in_use()
    }

    /// Whether its importers were told when the device was closed, and there is something to wait
    /// for.
    pub(crate) fn is_left_by_close(&self) -> bool {
        !self.is_revoked() && self.is_told() && self.is_in_use()
    }

    /// Says in the log which importers are waited for, a line, not too often.
    pub(crate) fn complain(&self) {
        // No waiting for a buffer that cannot be looked at just now: this thread may be one that
        // is to end when it is killed.
        let Some((name, importers)) = self.live.try_lock().and_then(|live| {
            let importers = live.importers()?;
            Some((live.name(), importers))
        }) else {
            return;
        };
        if !self.leases.may_complain() {
            return;
        }
        let name = BStr::from_bytes(name.split(|&byte| byte == 0).next().unwrap_or(&[]));
        let (bdf, bar, size) = (self.leases.bdf(), self.contents.bar(), self.contents.size());
        let what = if self.mappings.any() {
            "to undo its mapping"
        } else {
            "to end its work"
        };
        pr_warn!(
            "{bdf}: taking away {name} (BAR {bar}, {size:#x} bytes) waits for {importers} {what}\n"
        );
    }

    /// The runs of pages that an importer maps: ranges that touch are one.
    fn runs(&self) -> impl Iterator<Item = Run> + Clone + '_ {
        ranges::runs(&self.contents.segments)
    }

    fn state(&self) -> State {
        self.look().state
    }

    fn look(&self) -> Look {
        self.leases.look(self.epoch, self.is_revoked())
    }

    /// The entries that a fault is to insert while the buffer is accessible, or its outcome.
    /// Allocates the table that they go into.
    ///
    /// An entry above a page is uncached: write-combining ones are made a page at a time, since the
    /// kernel gives no way to make others. Where no entry above a page is possible, now or later,
    /// one fault brings in what such an entry would have, at most 512 pages. Where one is, a fault
    /// for a page (the process has turned off huge pages for its own memory) brings it in, too, if
    /// there is no table of pages yet: to make one there could meet such an entry of another
    /// thread.
    // Once for each memory type, which then is a constant.
    #[inline(always)]
    fn plan(&self, fault: &Fault<'_>, order: u32) -> core::result::Result<Plan, Outcome> {
        let mapping = self.mapping(fault)?;
        let segments = &self.contents.segments;
        let address = fault.address();
        let entry_for = |order| self.entry_for(&mapping, address, order);
        let large = match fault.memory_type() {
            MemoryType::Uncached if HAS_PMD_ENTRIES => entry_for(PMD_ORDER),
            MemoryType::Uncached | MemoryType::WriteCombining => Err(Misfit::Order),
        };
        match (order, large) {
            (_, Err(Misfit::Outside)) => Err(Outcome::SIGBUS),
            (PMD_ORDER, Ok(page)) => Ok(Plan::Large(page)),
            (0, Ok(page)) => match fault.pmd_entry() {
                PmdEntry::None => Ok(Plan::Large(page)),
                PmdEntry::Table => entry_for(0).map(Plan::Page).map_err(|_| Outcome::SIGBUS),
                PmdEntry::Large => Err(Outcome::NOPAGE),
            },
            (0, Err(Misfit::Order)) => {
                let run = batch::batch_for(segments, &mapping, address, RUN_ORDER, PAGE_SHIFT);
                let run = run.map_err(|_| Outcome::SIGBUS)?;
                if fault.pmd_entry() == PmdEntry::None {
                    fault.make_table()?;
                }
                Ok(Plan::Run(run))
            }
            _ => Err(Outcome::FALLBACK),
        }
    }

    /// How the VMA of a fault maps this.
    #[inline(always)]
    fn mapping(&self, fault: &Fault<'_>) -> core::result::Result<Mapping, Outcome> {
        let span = fault.span();
        let page_offset = span.page_offset.checked_sub(self.first_page);
        Ok(Mapping {
            start: span.start,
            end: span.end,
            page_offset: page_offset.ok_or(Outcome::SIGBUS)?,
        })
    }

    /// The first page of the BAR of the entry of `order` that has `address`.
    #[inline(always)]
    fn entry_for(
        &self,
        mapping: &Mapping,
        address: u64,
        order: u32,
    ) -> core::result::Result<u64, Misfit> {
        let (segments, frame) = (&self.contents.segments, self.contents.memory.first_frame());
        ranges::entry_for(segments, mapping, address, order, PAGE_SHIFT, frame)
    }

    /// A fault for which the kernel wants an entry of [`GIGANTIC_ORDER`]. It allocates nothing.
    fn gigantic_fault(&self, fault: &Fault<'_>) -> Outcome {
        if fault.memory_type() != MemoryType::Uncached || !self.gate.may_be_gigantic() {
            return Outcome::FALLBACK;
        }
        let mapping = match self.mapping(fault) {
            Ok(mapping) => mapping,
            Err(outcome) => return outcome,
        };
        let page = match self.entry_for(&mapping, fault.address(), GIGANTIC_ORDER) {
            Ok(page) => page,
            Err(Misfit::Outside) => return Outcome::SIGBUS,
            Err(Misfit::Order) => return Outcome::FALLBACK,
        };
        // As for other entries.
        if !self.is_reachable() {
            return Outcome::SIGBUS;
        }
        let inside = self.gate.enter();
        if !self.is_reachable() {
            return Outcome::SIGBUS;
        }
        match inside.permit() {
            Some(permit) => fault.insert_gigantic(&self.contents.memory, page, &permit),
            None => Outcome::FALLBACK,
        }
    }

    /// Inserts what was planned. Allocates nothing.
    #[inline(always)]
    fn insert(&self, fault: &Fault<'_>, plan: Plan) -> Outcome {
        let bar = &self.contents.memory;
        match plan {
            Plan::Page(page) => fault.insert(bar, page, 0),
            Plan::Large(page) => fault.insert(bar, page, PMD_ORDER),
            Plan::Run(run) => fault.insert_run(bar, run.address, run.page, run.pages),
        }
    }
}

/// The entries that a fault is to insert.
enum Plan {
    /// This page of the BAR.
    Page(u64),
    /// An entry of [`PMD_ORDER`] that begins with this page of the BAR.
    Large(u64),
    /// Pages.
    Run(Batch),
}

/// The uAPI's number of a memory type.
fn memattr_of(memory_type: MemoryType) -> u32 {
    match memory_type {
        MemoryType::Uncached => abi::MEMATTR_NC,
        MemoryType::WriteCombining => abi::MEMATTR_WC,
    }
}

impl tree::Item for Buffer {
    fn links(&self) -> &Links<Self> {
        &self.links
    }

    fn key(&self) -> u64 {
        self.id()
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
        let provider = self.leases.providers().check(self.contents.bar());
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
        // A thread that takes memory away after this look needs the reservation lock to tell the
        // importer, and so waits for the mapping that is being made.
        if !self.is_reachable() {
            return Err(ENODEV);
        }
        let memory = &self.contents.memory;
        let size = self.contents.size();
        // The IOMMU's page tables are charged to nobody.
        if size.div_ceil(2) > memory.length() {
            return refuse!(
                &self.leases,
                EINVAL,
                "map: {size:#x} bytes are more than twice BAR {}, which has {:#x}",
                memory.index(),
                memory.length()
            );
        }
        let mapped = importer.map(self.leases.providers(), memory, self.runs())?;
        self.mappings.begin();
        Ok(mapped)
    }

    fn unmap(&self, importer: &mut Importer<'_>, mapped: Mapped) {
        importer.unmap(mapped);
        self.mappings.end();
        // The reservation lock is held, which whoever takes memory away takes to tell importers: it
        // has, or will find no mapping. A buffer whose device was pulled out drains, too.
        if !self.is_reachable() {
            self.leases.notify();
        }
    }

    fn release(this: Arc<Self>) {
        this.leases.remove(this.id());
    }
}

impl vma::Mapped for Buffer {
    #[inline(always)]
    fn fault(&self, fault: &Fault<'_>, order: u32) -> Outcome {
        if order > PMD_ORDER {
            return if order == GIGANTIC_ORDER {
                self.gigantic_fault(fault)
            } else {
                Outcome::FALLBACK
            };
        }
        // A thread that takes memory away must not wait for an allocation, which may take seconds:
        // so it is made before the gate, and only while the door is open.
        if !self.is_reachable() {
            return Outcome::SIGBUS;
        }
        let plan = match self.plan(fault, order) {
            Ok(plan) => plan,
            Err(outcome) => return outcome,
        };
        // `plan` may have taken a while. Whom the door keeps out keeps nobody waiting at the gate.
        if !self.is_reachable() {
            return Outcome::SIGBUS;
        }
        // The state holds until the entry is in: a thread that takes memory away waits at the gate,
        // and zaps after that.
        let inside = self.gate.enter();
        let outcome = if self.is_reachable() {
            self.insert(fault, plan)
        } else {
            Outcome::SIGBUS
        };
        drop(inside);
        outcome
    }

    fn vma_changes(&self) {
        self.gate.end_gigantic(|| self.inode.zap());
    }

    fn vma_opened(&self, memory_type: MemoryType) {
        self.vmas.fetch_add(1, Relaxed);
        self.leases.vma_opened();
        if memory_type == MemoryType::WriteCombining {
            self.wc_vmas.fetch_add(1, Relaxed);
        }
    }

    fn vma_closed(&self, memory_type: MemoryType) {
        let last = self.vmas.fetch_sub(1, Relaxed) == 1;
        self.leases.vma_closed();
        if memory_type == MemoryType::WriteCombining {
            self.wc_vmas.fetch_sub(1, Relaxed);
        }
        if last && self.internal {
            let unused = self.take_unused(&mut self.leases.bar_maps().lock(), memory_type);
            // This may drop the last reference to the device fd: without the lock.
            drop(unused);
        }
    }
}
