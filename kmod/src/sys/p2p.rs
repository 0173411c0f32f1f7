// SPDX-License-Identifier: GPL-2.0

//! Peer-to-peer DMA: the device memory of one function, mapped for another device.
//!
//! The stock helper `dma_buf_phys_vec_to_sgt()` is not used for the mappings themselves. Of several
//! ranges it links each at offset 0 of the IOVA (Linux 7.2 and 7.3-rc7: `EADDRINUSE` from the
//! second on). And when it undoes a mapping, Linux 7.2 leaves the translations to a lazy IOMMU, the
//! usual kind, for 10 ms: DMA that is under way still lands. Here a mapping that was undone is
//! blocked.
//!
//! Two devices with no PCI bridge above both reach each other through host bridges or not at all:
//! `pci_p2pdma_distance()` says which. That is a property of the host bridges, so it is asked once
//! for the importers behind one of them. Where there is a bridge above both, only the stock helper
//! can tell (its `pci_p2pdma_map_type()` is not exported): one page is mapped by it. The result
//! is an I/O virtual address if the IOMMU leads it to that page, and an address of the bus if it
//! does not. The number itself says nothing: behind another host bridge the addresses of a BAR are
//! free for the importer's IOMMU to be used. That is done once an attachment.
//!
//! C headers: [`include/linux/pci-p2pdma.h`](srctree/include/linux/pci-p2pdma.h),
//! [`include/linux/dma-buf-mapping.h`](srctree/include/linux/dma-buf-mapping.h)

use super::{
    bar::Bar, bindings, errno, flag::peek, rwsem::ReadGuard, rwsem::RwSem, vma::PMD_ORDER,
};
use crate::model::ranges::Run;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, to_result},
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        Arc,
        atomic::{Atomic, Relaxed},
    },
    types::Opaque,
};

const BARS: usize = bindings::PCI_STD_NUM_BARS as usize;
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;
/// Most bytes of one entry of a scatter table, whose lengths are `unsigned int`.
const MAX_ENTRY: usize = u32::MAX as usize & !(PAGE_SIZE - 1);
/// Bytes of an entry above a page, also of an IOMMU.
const LARGE: usize = PAGE_SIZE << PMD_ORDER;
const MMIO: usize = bindings::DMA_ATTR_MMIO as usize;

struct Provider(NonNull<bindings::p2pdma_provider>);

// SAFETY: A pointer to what is valid as long as the function is bound, whichever thread has it.
unsafe impl Send for Provider {}
// SAFETY: The kernel writes the fields of a provider before it gives it away, and never after that.
unsafe impl Sync for Provider {}

struct Bars {
    providers: [Option<Provider>; BARS],
    host: HostBridge,
}

impl Bars {
    const fn none() -> Self {
        Self {
            providers: [const { None }; BARS],
            host: HostBridge::unknown(),
        }
    }
}

/// A host bridge that was found to lead to the function, if one was.
///
/// # Invariants
///
/// Null, or a valid device with a reference that is ours.
struct HostBridge(Atomic<*mut bindings::device>);

impl HostBridge {
    const fn unknown() -> Self {
        // INVARIANT: Null.
        Self(Atomic::new(core::ptr::null_mut()))
    }
}

impl Drop for HostBridge {
    fn drop(&mut self) {
        let host = peek(&self.0);
        if !host.is_null() {
            // SAFETY: By the type invariant there is a reference to give back.
            unsafe { bindings::put_device(host) };
        }
    }
}

/// The P2P providers of the BARs of a function, while the device is open.
///
/// # Invariants
///
/// Each provider in it is valid: they are filled in when the device is opened and emptied before it
/// is closed, and providers live until the function is unbound.
#[pin_data]
pub(crate) struct Providers {
    #[pin]
    bars: RwSem<Bars>,
    /// Which BARs have one, a bit each: a first look without the lock.
    present: Atomic<u32>,
}

impl Providers {
    /// None.
    pub(super) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                bars <- RwSem::new(Bars::none()),
                present: Atomic::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// # Safety
    ///
    /// The function must be bound, and stay so until `clear` is called.
    pub(super) unsafe fn fill(&self, pdev: *mut bindings::pci_dev) {
        let mut present = 0;
        for (index, slot) in self.bars.write().providers.iter_mut().enumerate() {
            // SAFETY: `pdev` is valid by the caller.
            let provider = unsafe { bindings::bl_p2p_provider(pdev, index as c_int) };
            // INVARIANT: The caller promises that it stays valid until `clear`.
            *slot = NonNull::new(provider).map(Provider);
            present |= u32::from(slot.is_some()) << index;
        }
        self.present.store(present, Relaxed);
    }

    /// Waits for the threads that use a provider, and makes all other use impossible.
    pub(super) fn clear(&self) {
        let mut bars = self.bars.write();
        *bars = Bars::none();
        self.present.store(0, Relaxed);
    }

    /// `EOPNOTSUPP` where kernel or device has no provider of a BAR.
    pub(crate) fn check(&self, bar: u32) -> Result {
        let bit = 1u32.checked_shl(bar).unwrap_or(0);
        if self.present.load(Relaxed) & bit == 0 {
            return Err(errno::EOPNOTSUPP.into());
        }
        Ok(())
    }

    /// The provider of a BAR; `EOPNOTSUPP` where kernel or device has none. While it is held the
    /// device is not closed: not for long.
    fn get(&self, bar: u32) -> Result<BarProvider<'_>> {
        let bars = self.bars.read();
        let bar = bar as usize;
        if bars.providers.get(bar).is_some_and(Option::is_some) {
            Ok(BarProvider { bars, bar })
        } else {
            Err(errno::EOPNOTSUPP.into())
        }
    }
}

/// The provider of one BAR.
struct BarProvider<'a> {
    bars: ReadGuard<'a, Bars>,
    bar: usize,
}

impl BarProvider<'_> {
    fn get(&self) -> Result<NonNull<bindings::p2pdma_provider>> {
        match self.bars.providers.get(self.bar) {
            Some(Some(provider)) => Ok(provider.0),
            _ => Err(errno::EOPNOTSUPP.into()),
        }
    }

    /// The difference between an address on the bus and the CPU's address of the same byte.
    fn bus_offset(&self) -> Result<u64> {
        let provider = self.get()?;
        // SAFETY: The provider is valid while `bars` is locked.
        Ok(unsafe { provider.as_ref().bus_offset })
    }
}

/// Device memory that is contiguous.
///
/// # Invariants
///
/// All of it is in a BAR.
struct Piece {
    /// Physical address.
    address: u64,
    /// Bytes, not 0.
    length: usize,
}

impl Piece {
    /// A run of pages of `bar`; `EINVAL` where they are not all in it.
    fn of(bar: &Bar, run: Run) -> Result<Self> {
        let frame = bar.frame_of(run.page, run.pages).ok_or(EINVAL)?;
        // INVARIANT: The BAR has these pages. So neither shift overflows.
        Ok(Self {
            address: frame << PAGE_SHIFT,
            length: (run.pages << PAGE_SHIFT) as usize,
        })
    }

    /// The address of its last byte.
    fn last(&self) -> u64 {
        self.address.wrapping_add(self.length as u64 - 1)
    }

    /// Its beginning, of at most `length` bytes; the rest is left in it.
    fn split(&mut self, length: usize) -> Option<Self> {
        let length = self.length.min(length);
        if length == 0 {
            return None;
        }
        // INVARIANT: Parts of what is in the BAR.
        let first = Self {
            address: self.address,
            length,
        };
        self.address = self.address.wrapping_add(length as u64);
        self.length -= length;
        Some(first)
    }
}

/// How an importer reaches the function.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Route {
    /// By the addresses of the bus: a switch between them routes.
    Bus,
    /// By an I/O virtual address.
    Iova,
    /// By addresses that the DMA API makes of physical ones, a run at a time.
    Direct,
}

/// A note about an attachment, a number in its `priv`: it takes no memory.
///
/// Its low two bits are the route, once that is known; the others count its mappings. Zero is that
/// of a new attachment. The reservation lock guards it.
#[derive(Clone, Copy)]
pub(super) struct Note(usize);

impl Note {
    const ROUTE: usize = 0b11;
    const MAPPING: usize = 0b100;

    /// # Safety
    ///
    /// `attachment` must be valid, of a dma-buf of ours, and its reservation lock held.
    pub(super) unsafe fn of(attachment: *const bindings::dma_buf_attachment) -> Self {
        // SAFETY: The attachment is valid; `priv` is the exporter's.
        Self(unsafe { (*attachment).priv_ }.addr())
    }

    /// Whether the importer has a mapping.
    pub(super) fn is_mapped(self) -> bool {
        self.0 >= Self::MAPPING
    }

    fn route(self) -> Option<Route> {
        match self.0 & Self::ROUTE {
            1 => Some(Route::Bus),
            2 => Some(Route::Iova),
            3 => Some(Route::Direct),
            _ => None,
        }
    }

    /// With that route, and a mapping more.
    fn mapped_by(self, route: Route) -> Self {
        let route = match route {
            Route::Bus => 1,
            Route::Iova => 2,
            Route::Direct => 3,
        };
        Self((self.0 & !Self::ROUTE | route).wrapping_add(Self::MAPPING))
    }

    /// With a mapping less.
    fn unmapped(self) -> Self {
        Self(self.0.wrapping_sub(Self::MAPPING))
    }
}

/// One importer that maps or unmaps, with the reservation lock held.
///
/// The [`Note`] of the attachment remembers earlier calls.
pub(crate) struct Importer<'a> {
    attachment: *mut bindings::dma_buf_attachment,
    direction: bindings::dma_data_direction,
    _call: PhantomData<&'a ()>,
}

/// A mapping for an importer, as the dma-buf core passes it around.
pub(crate) struct Mapped(pub(super) *mut bindings::sg_table);

/// The scatter table of a mapping, and what it takes to undo it.
#[repr(C)]
struct Table {
    /// First, so that a pointer to it is one to the whole.
    entries: bindings::sg_table,
    iova: bindings::dma_iova_state,
    route: Route,
    /// Bytes of the IOVA before the first run: it is as far from a multiple of [`LARGE`] as the
    /// memory.
    offset: usize,
    /// Bytes that are mapped, or entries where there is no IOVA: what is to be undone.
    done: usize,
    /// The entry, where one is enough. `entries` leads to it.
    only: Opaque<bindings::scatterlist>,
}

impl<'a> Importer<'a> {
    /// # Safety
    ///
    /// `attachment` must be valid and its reservation lock held, for `'a`.
    pub(super) unsafe fn from_raw(
        attachment: *mut bindings::dma_buf_attachment,
        direction: bindings::dma_data_direction,
    ) -> Self {
        Self {
            attachment,
            direction,
            _call: PhantomData,
        }
    }

    fn device(&self) -> *mut bindings::device {
        // SAFETY: The attachment is valid.
        unsafe { (*self.attachment).dev }
    }

    /// The note about the attachment.
    fn note(&self) -> Note {
        // SAFETY: The attachment is valid, and the reservation lock is held.
        unsafe { Note::of(self.attachment) }
    }

    fn set_note(&mut self, note: Note) {
        let number = core::ptr::without_provenance_mut(note.0);
        // SAFETY: The attachment is valid; `priv` is the exporter's, and the reservation lock
        // guards it.
        unsafe { (*self.attachment).priv_ = number };
    }

    /// Maps `runs` of `bar`. `EINVAL` where a run is not in it, where the importer cannot name its
    /// addresses, or where its IOMMU cannot map single pages.
    ///
    /// The device must not be closed meanwhile: a close waits for the reservation lock.
    pub(crate) fn map(
        &mut self,
        providers: &Providers,
        bar: &Bar,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<Mapped> {
        let mut last = 0;
        for run in runs.clone() {
            last = Piece::of(bar, run)?.last().max(last);
        }
        let route = match self.note().route() {
            Some(route) => route,
            None => {
                let first = runs.clone().next().ok_or(EINVAL)?;
                self.find_route(providers, bar, first.page, last)?
            }
        };
        let bus_offset = match route {
            Route::Bus => providers.get(bar.index())?.bus_offset()?,
            Route::Iova | Route::Direct => 0,
        };
        if route != Route::Iova {
            self.check_reach(last.wrapping_add(bus_offset))?;
        }
        let mapped = self.map_runs(bus_offset, route, bar, runs)?;
        self.set_note(self.note().mapped_by(route));
        Ok(mapped)
    }

    /// Undoes `map`.
    pub(crate) fn unmap(&mut self, mapped: Mapped) {
        self.set_note(self.note().unmapped());
        // SAFETY: The mapping was made by `map_runs`, which leaked the table.
        let mut table = unsafe { KBox::from_raw(mapped.0.cast::<Table>()) };
        self.undo(&mut table);
    }

    /// Whether an IOMMU translates the importer's addresses.
    fn is_translated(&self) -> bool {
        // SAFETY: The device of an attachment is valid.
        unsafe { bindings::bl_uses_dma_iommu(self.device()) }
    }

    /// `EINVAL` where the importer has no address as high as `last`: the DMA API would warn of
    /// that.
    fn check_reach(&self, last: u64) -> Result {
        // SAFETY: The device of an attachment is valid.
        if last > unsafe { bindings::bl_dma_reach(self.device()) } {
            return Err(EINVAL);
        }
        Ok(())
    }

    /// Maps a page by the stock helper.
    fn map_stock(
        &self,
        provider: NonNull<bindings::p2pdma_provider>,
        page: &Piece,
    ) -> Result<*mut bindings::sg_table> {
        let mut vector = bindings::phys_vec {
            paddr: page.address,
            len: page.length,
        };
        // SAFETY: The attachment and the provider are valid, and the reservation lock is held.
        from_err_ptr(unsafe {
            bindings::dma_buf_phys_vec_to_sgt(
                self.attachment,
                provider.as_ptr(),
                &mut vector,
                1,
                page.length,
                self.direction,
            )
        })
    }

    fn unmap_stock(&self, entries: *mut bindings::sg_table) {
        // The helper sets `orig_nents` to 0, to say that there are no pages, and then frees as many
        // entries as that says: none.
        // SAFETY: The table is valid and of the stock helper, which made as many entries as it has.
        unsafe { (*entries).orig_nents = (*entries).nents };
        // SAFETY: The mapping was made by the stock helper for this attachment and direction, and
        // the reservation lock is held.
        unsafe { bindings::dma_buf_free_sgt(self.attachment, entries, self.direction) };
        // A lazy IOMMU still has its address.
        // SAFETY: The device of an attachment is valid.
        unsafe { bindings::bl_forget_translations(self.device()) };
    }

    /// How the importer reaches `bar`, of which it is to map `page` and bytes up to the address
    /// `last`.
    fn find_route(&self, providers: &Providers, bar: &Bar, page: u64, last: u64) -> Result<Route> {
        let translated = self.is_translated();
        if translated {
            // SAFETY: The device of an attachment is valid.
            if !unsafe { bindings::bl_iommu_has_pages(self.device()) } {
                return Err(EINVAL);
            }
        } else {
            // For either route: the page is mapped by its physical address if need be.
            self.check_reach(last)?;
        }
        let provider = providers.get(bar.index())?;
        let bus_offset = provider.bus_offset()?;
        let owner = provider.get()?.as_ptr();
        let host = provider.bars.host.0.as_ptr();
        // SAFETY: The provider is valid while it is held, and the device of an attachment is valid.
        // The result for `host` has the reference that the invariant of `HostBridge` wants.
        match unsafe { bindings::bl_p2p_through_host(owner, self.device(), host) } {
            ..0 => return Err(EINVAL),
            0 => {}
            1.. if translated => return Ok(Route::Iova),
            1.. => return Ok(Route::Direct),
        }
        let page = Piece::of(bar, Run { page, pages: 1 })?;
        let entries = self.map_stock(provider.get()?, &page)?;
        // SAFETY: The table has an entry.
        let mapped = unsafe { (*(*entries).sgl).dma_address };
        let route = if translated {
            // SAFETY: The device of an attachment is valid.
            if unsafe { bindings::bl_iommu_leads(self.device(), mapped, page.address) } {
                Route::Iova
            } else {
                Route::Bus
            }
        } else if bus_offset != 0 && mapped == page.address.wrapping_add(bus_offset) {
            Route::Bus
        } else {
            // Where there is no offset either, both addresses are the same, and the DMA API makes
            // it.
            Route::Direct
        };
        self.unmap_stock(entries);
        Ok(route)
    }

    fn map_runs(
        &self,
        bus_offset: u64,
        route: Route,
        bar: &Bar,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<Mapped> {
        let mut table = KBox::new(
            Table {
                entries: bindings::sg_table::default(),
                iova: bindings::dma_iova_state::default(),
                route,
                offset: 0,
                done: 0,
                only: Opaque::new(bindings::scatterlist::default()),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let (mut size, mut first) = (0usize, None);
        for run in runs.clone() {
            let piece = Piece::of(bar, run)?;
            size = size.checked_add(piece.length).ok_or(EINVAL)?;
            first = first.or(Some(piece.address));
        }
        if table.route == Route::Iova && !self.find_iova(&mut table, first.ok_or(EINVAL)?, size) {
            table.route = Route::Direct;
        }
        if let Err(error) = self.link(bus_offset, &mut table, bar, runs, size) {
            self.undo(&mut table);
            return Err(error);
        }
        let table = KBox::into_raw(table);
        Ok(Mapped(table.cast()))
    }

    /// Allocates an IOVA of `size` bytes for memory that begins at `first`: so that larger entries
    /// are possible in the IOMMU, if there is one so large, else anywhere.
    fn find_iova(&self, table: &mut Table, first: u64, size: usize) -> bool {
        let inside = first as usize & (LARGE - 1);
        let offsets = if size > 2 * LARGE {
            [inside, 0]
        } else {
            [0, 0]
        };
        for offset in offsets {
            let Some(size) = size.checked_add(offset) else {
                continue;
            };
            table.offset = offset;
            // SAFETY: The device is valid, and the state is not in use.
            if unsafe { bindings::bl_iova_try_alloc(self.device(), &mut table.iova, size) } {
                return true;
            }
        }
        false
    }

    /// Makes the entries and fills them in. On error too `table` says what is to be undone.
    fn link(
        &self,
        bus_offset: u64,
        table: &mut Table,
        bar: &Bar,
        runs: impl Iterator<Item = Run> + Clone,
        size: usize,
    ) -> Result {
        let device = self.device();
        if table.route == Route::Iova {
            table.allocate(size.div_ceil(MAX_ENTRY))?;
            for run in runs {
                let piece = Piece::of(bar, run)?;
                if piece.length > size - table.done {
                    return Err(EINVAL);
                }
                // SAFETY: The device is valid; the state was allocated for `size` bytes behind the
                // offset, of which so many are left.
                to_result(unsafe {
                    bindings::bl_iova_link(
                        device,
                        &mut table.iova,
                        piece.address,
                        table.offset + table.done,
                        piece.length,
                        self.direction,
                    )
                })?;
                table.done += piece.length;
                pause();
            }
            // SAFETY: So much is linked.
            to_result(unsafe {
                bindings::bl_iova_sync(device, &mut table.iova, table.offset, table.done)
            })?;
            let mut address = table.iova.addr.wrapping_add(table.offset as u64);
            let (mut entry, mut left) = (table.entries.sgl, table.done);
            while left != 0 {
                let length = left.min(MAX_ENTRY);
                entry = fill(entry, address, length)?;
                address = address.wrapping_add(length as u64);
                left -= length;
            }
        } else {
            let mut count = 0usize;
            for run in runs.clone() {
                count += Piece::of(bar, run)?.length.div_ceil(MAX_ENTRY);
            }
            table.allocate(count)?;
            let mut entry = table.entries.sgl;
            for run in runs {
                let mut rest = Piece::of(bar, run)?;
                while let Some(piece) = rest.split(MAX_ENTRY) {
                    let address = self.address_of(table.route, bus_offset, &piece)?;
                    entry = match fill(entry, address, piece.length) {
                        Ok(next) => next,
                        Err(error) => {
                            self.give_back(table.route, address, piece.length);
                            return Err(error);
                        }
                    };
                    table.done += 1;
                }
                pause();
            }
        }
        // Says that there are no pages behind the entries; `Table::free` frees `nents` of them.
        table.entries.orig_nents = 0;
        Ok(())
    }

    /// The address by which the importer reaches a piece where it has no IOVA for all.
    fn address_of(&self, route: Route, bus_offset: u64, piece: &Piece) -> Result<u64> {
        if route == Route::Bus {
            return Ok(piece.address.wrapping_add(bus_offset));
        }
        let device = self.device();
        let (address, length) = (piece.address, piece.length);
        // SAFETY: The device is valid, and the piece is memory of a BAR.
        let address =
            unsafe { bindings::dma_map_phys(device, address, length, self.direction, MMIO) };
        // SAFETY: The device is valid.
        to_result(unsafe { bindings::bl_dma_mapping_error(device, address) })?;
        Ok(address)
    }

    /// Undoes `address_of` of so many bytes.
    fn give_back(&self, route: Route, address: u64, length: usize) {
        if route == Route::Direct {
            let device = self.device();
            // SAFETY: The piece was mapped to this address.
            unsafe { bindings::dma_unmap_phys(device, address, length, self.direction, MMIO) };
        }
    }

    /// Undoes `link`, as far as it came, and what was allocated for it.
    fn undo(&self, table: &mut Table) {
        let device = self.device();
        match table.route {
            Route::Bus => {}
            Route::Iova => {
                // SAFETY: So much was linked, behind the offset.
                unsafe {
                    bindings::bl_iova_destroy(
                        device,
                        &mut table.iova,
                        table.offset,
                        table.done,
                        self.direction,
                    )
                };
            }
            Route::Direct => {
                let mut entry = table.entries.sgl;
                for _ in 0..table.done {
                    // SAFETY: So many entries were filled in.
                    let address = unsafe { (*entry).dma_address };
                    // SAFETY: As above.
                    let length = unsafe { bindings::bl_sg_length(entry) };
                    self.give_back(table.route, address, length as usize);
                    // SAFETY: As above; null after the last.
                    entry = unsafe { bindings::sg_next(entry) };
                    pause();
                }
                // SAFETY: The device is valid.
                unsafe { bindings::bl_forget_translations(device) };
            }
        }
        table.free();
    }
}

impl Table {
    /// Makes `count` entries. From here on the table must stay where it is.
    fn allocate(&mut self, count: usize) -> Result {
        if count == 1 {
            let only = self.only.get();
            // SAFETY: There is one entry.
            unsafe { bindings::sg_init_table(only, 1) };
            self.entries.sgl = only;
            self.entries.nents = 1;
            return Ok(());
        }
        let count = u32::try_from(count).map_err(|_| EINVAL)?;
        // SAFETY: The table is zeroed.
        to_result(unsafe {
            bindings::sg_alloc_table(&mut self.entries, count, bindings::GFP_KERNEL_ACCOUNT)
        })
    }

    fn free(&mut self) {
        if core::ptr::eq(self.entries.sgl, self.only.get()) {
            return;
        }
        self.entries.orig_nents = self.entries.nents;
        // SAFETY: The table is empty or was allocated with so many entries.
        unsafe { bindings::sg_free_table(&mut self.entries) };
    }
}

/// Fills in an entry; the one after it. `EINVAL` where there is none.
fn fill(
    entry: *mut bindings::scatterlist,
    address: u64,
    length: usize,
) -> Result<*mut bindings::scatterlist> {
    let length = u32::try_from(length).map_err(|_| EINVAL)?;
    if entry.is_null() {
        return Err(EINVAL);
    }
    // SAFETY: It is an entry of a table.
    unsafe { bindings::bl_sg_fill(entry, address, length) };
    // SAFETY: As above; null after the last.
    Ok(unsafe { bindings::sg_next(entry) })
}

/// Lets others have the processor: there may be 65,536 runs. The reservation lock, which is held,
/// is one that sleeps.
fn pause() {
    // SAFETY: Allowed wherever sleeping is.
    unsafe { bindings::bl_cond_resched() };
}
