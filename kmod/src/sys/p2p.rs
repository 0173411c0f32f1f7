// SPDX-License-Identifier: GPL-2.0

//! Peer-to-peer DMA: the device memory of one function, mapped for another device.
//!
//! The stock helper `dma_buf_phys_vec_to_sgt()` is not used for the mappings themselves. Of several
//! ranges it links each at offset 0 of the IOVA (Linux 7.2 and 7.3-rc7: `EADDRINUSE` from the second
//! on). And when it undoes a mapping, Linux 7.2 leaves the translations to a lazy IOMMU, the usual
//! kind, for 10 ms: DMA that is under way still lands. Here a mapping that was undone is blocked.
//!
//! How a pair of devices reaches each other only the stock helper can tell (its
//! `pci_p2pdma_map_type()` is not exported): one page is mapped by it, and the address that comes out
//! says which way it is. That is remembered by the address of the importer's function while the device
//! is open, as the kernel itself does for longer (`map_types` in `drivers/pci/p2pdma.c`).
//!
//! C headers: [`include/linux/pci-p2pdma.h`](srctree/include/linux/pci-p2pdma.h),
//! [`include/linux/dma-buf-mapping.h`](srctree/include/linux/dma-buf-mapping.h)

use super::{bindings, errno, rwsem::ReadGuard, rwsem::RwSem};
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, to_result},
    prelude::*,
    sync::{
        Arc,
        atomic::{Atomic, Relaxed},
    },
};

const BARS: usize = bindings::PCI_STD_NUM_BARS as usize;
const PAGE_SIZE: usize = kernel::page::PAGE_SIZE;
/// Most bytes of one entry of a scatter table, whose lengths are `unsigned int`.
const MAX_ENTRY: usize = u32::MAX as usize & !(PAGE_SIZE - 1);
const MMIO: usize = bindings::DMA_ATTR_MMIO as usize;

struct Provider(NonNull<bindings::p2pdma_provider>);

// SAFETY: A provider may be used from any thread.
unsafe impl Send for Provider {}
// SAFETY: A provider may be used from any thread; nobody writes to it.
unsafe impl Sync for Provider {}

/// The P2P providers of the BARs of a function, while the device is open.
///
/// # Invariants
///
/// What is in it is valid: it is filled when the device is opened and emptied before it is closed,
/// and providers live until the function is unbound.
#[pin_data]
pub(crate) struct Providers {
    #[pin]
    bars: RwSem<[Option<Provider>; BARS]>,
    /// Which BARs have one, a bit each: a first look without the lock.
    present: Atomic<u32>,
    known: Known,
}

/// How importers reach the function, of the last few that were asked for.
///
/// A word each: [`Known::SET`], [`Known::BUS`] if by the addresses of the bus, and which client.
struct Known([Atomic<u64>; 8]);

impl Known {
    const SET: u64 = 1 << 0;
    const BUS: u64 = 1 << 1;

    /// No client. A client is a PCI domain of 32 bits and 16 bits of bus, device and function.
    const NOBODY: u64 = u64::MAX;

    fn new() -> Self {
        Self([const { Atomic::new(0) }; 8])
    }

    fn word(&self, client: u64) -> Option<&Atomic<u64>> {
        // Functions of one device, and devices of one bus, have words of their own.
        let place = (client ^ (client >> 3)) % self.0.len() as u64;
        self.0.get(place as usize)
    }

    /// Whether `client` reaches the function by the addresses of the bus, if that is known.
    fn is_by_bus(&self, client: u64) -> Option<bool> {
        let word = self.word(client)?.load(Relaxed);
        let is_its = word & Self::SET != 0 && word >> 2 == client;
        is_its.then_some(word & Self::BUS != 0)
    }

    fn set(&self, client: u64, by_bus: bool) {
        if client == Self::NOBODY {
            return;
        }
        if let Some(word) = self.word(client) {
            let by_bus = if by_bus { Self::BUS } else { 0 };
            word.store(client << 2 | by_bus | Self::SET, Relaxed);
        }
    }

    fn clear(&self) {
        for word in &self.0 {
            word.store(0, Relaxed);
        }
    }
}

impl Providers {
    /// None.
    pub(super) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                bars <- RwSem::new([const { None }; BARS]),
                present: Atomic::new(0),
                known: Known::new(),
            }),
            GFP_KERNEL,
        )
    }

    /// # Safety
    ///
    /// The function must be bound, and stay so until `clear` is called.
    pub(super) unsafe fn fill(&self, pdev: *mut bindings::pci_dev) {
        let mut present = 0;
        for (index, slot) in self.bars.write().iter_mut().enumerate() {
            // SAFETY: `pdev` is valid by the caller.
            let provider = unsafe { bindings::bl_p2p_provider(pdev, index as c_int) };
            // INVARIANT: The caller promises that it stays valid until `clear`.
            *slot = NonNull::new(provider).map(Provider);
            present |= u32::from(slot.is_some()) << index;
        }
        self.present.store(present, Relaxed);
    }

    /// Waits for who uses a provider, and makes all other use impossible.
    pub(super) fn clear(&self) {
        let mut bars = self.bars.write();
        *bars = [const { None }; BARS];
        self.present.store(0, Relaxed);
        // Who learns something holds `bars` for reading.
        self.known.clear();
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
        if bars.get(bar).is_some_and(Option::is_some) {
            Ok(BarProvider { bars, bar })
        } else {
            Err(errno::EOPNOTSUPP.into())
        }
    }
}

/// The provider of one BAR.
struct BarProvider<'a> {
    bars: ReadGuard<'a, [Option<Provider>; BARS]>,
    bar: usize,
}

impl BarProvider<'_> {
    fn get(&self) -> Result<NonNull<bindings::p2pdma_provider>> {
        match self.bars.get(self.bar) {
            Some(Some(provider)) => Ok(provider.0),
            _ => Err(errno::EOPNOTSUPP.into()),
        }
    }

    /// What is added to an address of the CPU's to get one of the bus.
    fn bus_offset(&self) -> Result<u64> {
        let provider = self.get()?;
        // SAFETY: The provider is valid while `bars` is locked.
        Ok(unsafe { provider.as_ref().bus_offset })
    }
}

/// Contiguous device memory, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    /// Physical address.
    pub(crate) address: u64,
    /// Length, not 0.
    pub(crate) length: u64,
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

impl Route {
    /// As a number of a pointer's size, other than that of no route.
    fn number(self) -> usize {
        match self {
            Self::Bus => 1,
            Self::Iova => 2,
            Self::Direct => 3,
        }
    }
}

/// One importer that maps or unmaps, with the reservation lock held.
///
/// The `priv` of the attachment is the number of its route, once that is known: no memory.
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
    size: usize,
    /// The entry, where one is enough.
    only: bindings::scatterlist,
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

    /// The route that was found when it mapped first.
    fn route(&self) -> Option<Route> {
        // SAFETY: The attachment is valid; `priv` is the exporter's, and the reservation lock guards it.
        let number = unsafe { (*self.attachment).priv_ }.addr();
        [Route::Bus, Route::Iova, Route::Direct]
            .into_iter()
            .find(|route| route.number() == number)
    }

    fn set_route(&mut self, route: Route) {
        let number = core::ptr::without_provenance_mut(route.number());
        // SAFETY: As for `route`.
        unsafe { (*self.attachment).priv_ = number };
    }

    /// Maps `runs`, of `size` bytes in all, of a BAR.
    ///
    /// The device must not be closed meanwhile: who closes it waits for the reservation lock.
    pub(crate) fn map(
        &mut self,
        providers: &Providers,
        bar: u32,
        runs: impl Iterator<Item = Run> + Clone,
        size: u64,
    ) -> Result<Mapped> {
        let size = usize::try_from(size).map_err(|_| EINVAL)?;
        let route = match self.route() {
            Some(route) => route,
            None => {
                let first = runs.clone().next().ok_or(EINVAL)?;
                let route = self.find_route(providers, bar, first.address)?;
                self.set_route(route);
                route
            }
        };
        let bus_offset = match route {
            Route::Bus => providers.get(bar)?.bus_offset()?,
            Route::Iova | Route::Direct => 0,
        };
        self.map_runs(bus_offset, route, runs, size)
    }

    /// Undoes `map` of the same runs.
    pub(crate) fn unmap(&mut self, mapped: Mapped, mut runs: impl Iterator<Item = Run> + Clone) {
        // SAFETY: The mapping was made by `map_runs`, which leaked the table.
        let mut table = unsafe { KBox::from_raw(mapped.0.cast::<Table>()) };
        self.undo(&mut table, &mut runs, usize::MAX);
    }

    /// Maps a run by the stock helper.
    fn map_stock(
        &self,
        provider: NonNull<bindings::p2pdma_provider>,
        run: Run,
    ) -> Result<*mut bindings::sg_table> {
        let length = run.length as usize;
        let mut vector = bindings::phys_vec {
            paddr: run.address,
            len: length,
        };
        // SAFETY: The attachment and the provider are valid, and the reservation lock is held.
        from_err_ptr(unsafe {
            bindings::dma_buf_phys_vec_to_sgt(
                self.attachment,
                provider.as_ptr(),
                &mut vector,
                1,
                length,
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
    }

    /// How the importer reaches a BAR, which has a page at `address`.
    fn find_route(&self, providers: &Providers, bar: u32, address: u64) -> Result<Route> {
        // SAFETY: The device of an attachment is valid.
        let translated = unsafe { bindings::bl_uses_dma_iommu(self.device()) };
        // SAFETY: As above.
        let client = unsafe { bindings::bl_pci_client(self.device()) };
        // Only a client that is translated is remembered, and only while it is.
        if translated {
            if let Some(by_bus) = providers.known.is_by_bus(client) {
                return Ok(if by_bus { Route::Bus } else { Route::Iova });
            }
        }
        let provider = providers.get(bar)?;
        let bus_offset = provider.bus_offset()?;
        let by_bus = self.try_bus_address(provider.get()?, address, bus_offset)?;
        if translated {
            providers.known.set(client, by_bus);
        }
        Ok(match (translated, by_bus) {
            (true, false) => Route::Iova,
            (true, true) => Route::Bus,
            // Without translation and without an offset both addresses are the same, and the DMA
            // API makes it.
            (false, true) if bus_offset != 0 => Route::Bus,
            (false, _) => Route::Direct,
        })
    }

    /// Maps a page by the stock helper, to see whether what comes out is its address of the bus.
    fn try_bus_address(
        &self,
        provider: NonNull<bindings::p2pdma_provider>,
        address: u64,
        bus_offset: u64,
    ) -> Result<bool> {
        let page = Run {
            address,
            length: PAGE_SIZE as u64,
        };
        let entries = self.map_stock(provider, page)?;
        // SAFETY: The table has an entry.
        let mapped = unsafe { (*(*entries).sgl).dma_address };
        self.unmap_stock(entries);
        // An IOVA is never an address of the bus: the windows of host bridges are reserved.
        Ok(mapped == address.wrapping_add(bus_offset))
    }

    fn map_runs(
        &self,
        bus_offset: u64,
        route: Route,
        runs: impl Iterator<Item = Run> + Clone,
        size: usize,
    ) -> Result<Mapped> {
        let device = self.device();
        let mut table = KBox::new(
            Table {
                entries: bindings::sg_table::default(),
                iova: bindings::dma_iova_state::default(),
                route,
                size,
                only: bindings::scatterlist::default(),
            },
            GFP_KERNEL,
        )?;
        if route == Route::Iova {
            // SAFETY: The device is valid and the state is zeroed.
            let found = unsafe { bindings::bl_iova_try_alloc(device, &mut table.iova, size) };
            if !found {
                table.route = Route::Direct;
            }
        }
        let count = if table.route == Route::Iova {
            size.div_ceil(MAX_ENTRY)
        } else {
            runs.clone()
                .map(|run| (run.length as usize).div_ceil(MAX_ENTRY))
                .sum()
        };
        if let Err(error) = table.allocate(count) {
            if table.route == Route::Iova {
                // SAFETY: The state was allocated and nothing is linked.
                unsafe { bindings::bl_iova_free(device, &mut table.iova) };
            }
            return Err(error);
        }
        if let Err((error, done)) = self.link(bus_offset, &mut table, runs.clone()) {
            self.undo(&mut table, &mut runs.clone(), done);
            return Err(error);
        }
        let table = KBox::into_raw(table);
        Ok(Mapped(table.cast()))
    }

    /// Fills in the entries. On error also how many runs were linked.
    fn link(
        &self,
        bus_offset: u64,
        table: &mut Table,
        runs: impl Iterator<Item = Run>,
    ) -> core::result::Result<(), (Error, usize)> {
        let device = self.device();
        let mut entry = table.entries.sgl;
        let mut offset = 0;
        for (done, run) in runs.enumerate() {
            let length = run.length as usize;
            match table.route {
                Route::Iova => {
                    // SAFETY: The device is valid, and the state was allocated for the size of all
                    // runs, of which this is the next.
                    let result = unsafe {
                        bindings::bl_iova_link(
                            device,
                            &mut table.iova,
                            run.address,
                            offset,
                            length,
                            self.direction,
                        )
                    };
                    to_result(result).map_err(|error| (error, done))?;
                    offset += length;
                }
                Route::Bus => {
                    entry = fill(entry, run.address.wrapping_add(bus_offset), length);
                }
                Route::Direct => {
                    // SAFETY: The device is valid, and the run is device memory.
                    let address = unsafe {
                        bindings::dma_map_phys(device, run.address, length, self.direction, MMIO)
                    };
                    // SAFETY: The device is valid.
                    let result = unsafe { bindings::bl_dma_mapping_error(device, address) };
                    to_result(result).map_err(|error| (error, done))?;
                    entry = fill(entry, address, length);
                }
            }
        }
        if table.route == Route::Iova {
            // SAFETY: All runs are linked.
            let result = unsafe { bindings::bl_iova_sync(device, &mut table.iova, offset) };
            to_result(result).map_err(|error| (error, usize::MAX))?;
            fill(entry, table.iova.addr, offset);
        }
        // Says that there are no pages behind the entries; `Table::free` frees `nents` of them.
        table.entries.orig_nents = 0;
        Ok(())
    }

    /// Undoes `link` of the first `done` runs, and the allocation of the entries.
    fn undo(&self, table: &mut Table, runs: &mut (impl Iterator<Item = Run> + Clone), done: usize) {
        let device = self.device();
        match table.route {
            Route::Bus => {}
            Route::Iova => {
                let linked = if done == usize::MAX {
                    table.size
                } else {
                    runs.take(done).map(|run| run.length as usize).sum()
                };
                // SAFETY: So much was linked, from the beginning.
                unsafe {
                    bindings::bl_iova_destroy(device, &mut table.iova, linked, self.direction)
                };
            }
            Route::Direct => {
                let mut entry = table.entries.sgl;
                for run in runs.take(done) {
                    // SAFETY: The entry is the first of this run.
                    let address = unsafe { (*entry).dma_address };
                    let length = run.length as usize;
                    // SAFETY: The run was mapped to this address.
                    unsafe {
                        bindings::dma_unmap_phys(device, address, length, self.direction, MMIO)
                    };
                    for _ in 0..length.div_ceil(MAX_ENTRY) {
                        // SAFETY: There is an entry for each piece of each run.
                        entry = unsafe { bindings::sg_next(entry) };
                    }
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
            // SAFETY: There is one entry.
            unsafe { bindings::sg_init_table(&mut self.only, 1) };
            self.entries.sgl = &raw mut self.only;
            self.entries.nents = 1;
            return Ok(());
        }
        let count = u32::try_from(count).map_err(|_| EINVAL)?;
        // SAFETY: The table is zeroed.
        to_result(unsafe {
            bindings::sg_alloc_table(&mut self.entries, count, bindings::GFP_KERNEL)
        })
    }

    fn free(&mut self) {
        if core::ptr::eq(self.entries.sgl, &raw const self.only) {
            return;
        }
        self.entries.orig_nents = self.entries.nents;
        // SAFETY: The table was allocated with so many entries.
        unsafe { bindings::sg_free_table(&mut self.entries) };
    }
}

/// Fills in as many entries as `length` bytes from `address` on take. The entry after them.
fn fill(
    mut entry: *mut bindings::scatterlist,
    mut address: u64,
    mut length: usize,
) -> *mut bindings::scatterlist {
    while length != 0 {
        let piece = length.min(MAX_ENTRY);
        // SAFETY: There is an entry for each piece of each run.
        unsafe { bindings::bl_sg_fill(entry, address, piece as u32) };
        address += piece as u64;
        length -= piece;
        // SAFETY: As above; null after the last.
        entry = unsafe { bindings::sg_next(entry) };
    }
    entry
}
