// SPDX-License-Identifier: GPL-2.0

//! Mappings of device memory into processes.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::{bar::Bar, bindings, gigantic::Permit};
use core::marker::PhantomData;
use kernel::{
    error::to_result,
    mm::virt::{VmaRef, flags},
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    sync::{Arc, ArcBorrow},
    types::ForeignOwnable,
};

/// Order of an entry of one level above pages (2 MiB on x86-64).
pub(crate) const PMD_ORDER: u32 = bindings::BL_PMD_ORDER;
/// Whether entries of that order can be had for device memory.
pub(crate) const HAS_PMD_ENTRIES: bool = cfg!(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP);
/// Order of an entry of two levels above pages (1 GiB), on x86-64; 0 where there is none.
pub(crate) const GIGANTIC_ORDER: u32 = bindings::BL_GIGANTIC_ORDER;
/// Order of the most pages that one fault may insert: as many as there are in 2 MiB on x86-64, also
/// where a table has more, since the lock of the table is held meanwhile.
pub(crate) const RUN_ORDER: u32 = if PMD_ORDER < 9 { PMD_ORDER } else { 9 };

/// Something whose pages are inserted by its fault handler.
///
/// Each VMA holds one reference.
pub(crate) trait Mapped: Send + Sync + Sized + 'static {
    /// A page of `fault` is missing: inserts an entry of `order`, or says why not.
    fn fault(&self, fault: &Fault<'_>, order: u32) -> Outcome;

    /// A VMA that maps this is about to be cut, or to be moved or copied by what follows. When this
    /// returns, no page table has an entry of [`GIGANTIC_ORDER`], and none will have one.
    fn vma_changes(&self);

    /// One VMA more maps this, by mmap, fork, split or mremap.
    fn vma_opened(&self, memory_type: MemoryType);

    /// One VMA less; its entries are gone.
    fn vma_closed(&self, memory_type: MemoryType);
}

/// How a mapping is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryType {
    /// Uncached.
    Uncached,
    /// Write-combining.
    WriteCombining,
}

/// Whether a page-table entry that asks for write-combining is write-combining here.
///
/// On x86 that takes PAT. The type on record for the BAR does not matter: see
/// [`Fault::insert_run`].
pub(crate) fn write_combining_is_real() -> bool {
    // SAFETY: Reads what the CPU can do; always allowed.
    unsafe { bindings::bl_write_combining_is_real() }
}

/// Whether entries of [`GIGANTIC_ORDER`] can be had for device memory: by kernel and CPU.
pub(crate) fn has_gigantic_entries() -> bool {
    // SAFETY: Reads what the CPU can do; always allowed.
    unsafe { bindings::bl_has_gigantic_entries() }
}

/// Answer of a fault handler.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome(bindings::vm_fault_t);

impl Outcome {
    /// The process gets SIGBUS.
    pub(crate) const SIGBUS: Self = Self(bindings::vm_fault_reason_VM_FAULT_SIGBUS);
    /// Done, or to be tried again.
    pub(crate) const NOPAGE: Self = Self(bindings::vm_fault_reason_VM_FAULT_NOPAGE);
    /// Try again with a smaller entry.
    pub(crate) const FALLBACK: Self = Self(bindings::vm_fault_reason_VM_FAULT_FALLBACK);
}

/// The entry above that of a page (PMD).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum PmdEntry {
    /// None.
    None,
    /// It leads to a table of pages.
    Table,
    /// It is one for memory, of order [`PMD_ORDER`].
    Large,
}

/// A page fault that is being handled.
pub(crate) struct Fault<'a> {
    vmf: *mut bindings::vm_fault,
    memory_type: MemoryType,
    _call: PhantomData<&'a ()>,
}

/// Where a VMA is, at the time of a fault. Addresses in bytes.
pub(crate) struct Span {
    /// First address.
    pub(crate) start: u64,
    /// Address after the last byte.
    pub(crate) end: u64,
    /// Offset of `start` in the file, in pages.
    pub(crate) page_offset: u64,
}

impl Fault<'_> {
    /// How the VMA is cached.
    #[inline]
    pub(crate) fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    /// The page-aligned address that faulted.
    pub(crate) fn address(&self) -> u64 {
        // SAFETY: `vmf` is valid during the fault.
        unsafe { (*self.vmf).__bindgen_anon_1.address as u64 }
    }

    fn vma(&self) -> *mut bindings::vm_area_struct {
        // SAFETY: `vmf` is valid during the fault.
        unsafe { (*self.vmf).__bindgen_anon_1.vma }
    }

    /// The VMA's place; it cannot change during the fault.
    pub(crate) fn span(&self) -> Span {
        // SAFETY: The VMA of a fault is valid and locked against change during the fault.
        let vma = unsafe { VmaRef::from_raw(self.vma()) };
        // SAFETY: As above.
        let page_offset = unsafe { (*vma.as_ptr()).vm_pgoff };
        Span {
            start: vma.start() as u64,
            end: vma.end() as u64,
            page_offset: page_offset as u64,
        }
    }

    /// The entry above that of the page that faulted. If it leads to a table, and the fault is of
    /// order 0, it stays so while that is handled: a thread that frees tables has the `mmap_lock`
    /// for writing.
    pub(crate) fn pmd_entry(&self) -> PmdEntry {
        // SAFETY: `vmf` is valid during the fault.
        match unsafe { bindings::bl_table_of(self.vmf) } {
            bindings::BL_NO_TABLE => PmdEntry::None,
            bindings::BL_LARGE_ENTRY => PmdEntry::Large,
            _ => PmdEntry::Table,
        }
    }

    /// Makes the table of pages that the address is in, if there is none. This allocates, so it may
    /// wait as long as the memory control group of the process has it wait.
    ///
    /// For a fault of order 0, and where no entry above a page can be: the kernel warns of one that
    /// it finds there.
    pub(crate) fn make_table(&self) -> core::result::Result<(), Outcome> {
        // SAFETY: `vmf` is valid during the fault.
        match Outcome(unsafe { bindings::bl_make_table(self.vmf) }) {
            Outcome::NOPAGE => Ok(()),
            outcome => Err(outcome),
        }
    }

    /// Whether `pages` pages from `address` on are in the VMA.
    fn has(&self, address: u64, pages: u64) -> bool {
        let span = self.span();
        let left = span.end.checked_sub(address);
        address >= span.start
            && address & (PAGE_SIZE as u64 - 1) == 0
            && left.is_some_and(|left| pages <= left >> PAGE_SHIFT)
    }

    /// Inserts an uncached entry of `order` (0 or [`PMD_ORDER`]) around the address for the pages
    /// of `bar` from `page` on. SIGBUS where these are not in the BAR, or the entry is not in the
    /// VMA or not aligned.
    pub(crate) fn insert(&self, bar: &Bar, page: u64, order: u32) -> Outcome {
        if order == 0 {
            let Some(frame) = bar.frame_of(page, 1) else {
                return Outcome::SIGBUS;
            };
            let address = self.address() as usize;
            // SAFETY: The VMA is that of the fault, which has the address, and was made by
            // `NewVma::map_io`, which set VM_PFNMAP; the frame is one of a BAR.
            Outcome(unsafe { bindings::bl_insert_page(self.vma(), address, frame as usize) })
        } else if order == PMD_ORDER && HAS_PMD_ENTRIES {
            let pages = 1u64 << PMD_ORDER;
            let first = self.address() & !((pages << PAGE_SHIFT) - 1);
            match bar.frame_of(page, pages) {
                Some(frame) if frame & (pages - 1) == 0 && self.has(first, pages) => {
                    // SAFETY: `vmf` is valid during the fault, and its VMA has VM_PFNMAP (see
                    // above) and all of the entry; the frames are those of a BAR.
                    Outcome(unsafe { bindings::bl_insert_large(self.vmf, frame as usize) })
                }
                _ => Outcome::SIGBUS,
            }
        } else {
            Outcome::FALLBACK
        }
    }

    /// Inserts an uncached entry of [`GIGANTIC_ORDER`] around the address for the pages of `bar`
    /// from `page` on, of a fault of that order. SIGBUS as for [`Self::insert`]; FALLBACK where
    /// smaller ones have to serve.
    pub(crate) fn insert_gigantic(&self, bar: &Bar, page: u64, _permit: &Permit<'_>) -> Outcome {
        let pages = 1u64 << GIGANTIC_ORDER;
        let first = self.address() & !((pages << PAGE_SHIFT) - 1);
        match bar.frame_of(page, pages) {
            Some(frame) if frame & (pages - 1) == 0 && self.has(first, pages) => {
                // SAFETY: `vmf` is valid during the fault, and its VMA has VM_PFNMAP, since it was
                // made by `NewVma::map_io`, and all of the entry; the frames are those of a BAR.
                Outcome(unsafe { bindings::bl_insert_gigantic(self.vmf, frame as usize) })
            }
            _ => Outcome::SIGBUS,
        }
    }

    /// Inserts `pages` entries of the VMA's memory type from `address` on, where there are none,
    /// for the pages of `bar` from `page` on. SIGBUS where these are not in the BAR or not in the
    /// VMA.
    ///
    /// The run should lie in a part of the VMA where no entry above a page can be: the kernel warns
    /// of one that it finds there. Unlike [`Self::insert`] this keeps the memory type that was
    /// asked for, where x86 overrides it with the one that the BAR was mapped with first
    /// (`vmf_insert_pfn` and all others that look it up).
    pub(crate) fn insert_run(&self, bar: &Bar, address: u64, page: u64, pages: u64) -> Outcome {
        match bar.frame_of(page, pages) {
            Some(frame) if self.has(address, pages) => {
                let (address, frame, pages) = (address as usize, frame as usize, pages as usize);
                let wc = self.memory_type == MemoryType::WriteCombining;
                // SAFETY: The VMA is that of the fault, has these addresses and was made by
                // `NewVma::map_io`, which set VM_PFNMAP; the frames are those of a BAR.
                Outcome(unsafe { bindings::bl_insert_run(self.vma(), address, frame, pages, wc) })
            }
            _ => Outcome::SIGBUS,
        }
    }
}

/// The VMA operations of `T`, for write-combining mappings or for uncached ones.
///
/// The kernel can neither cut an entry of [`GIGANTIC_ORDER`] nor move it. Before it cuts a VMA, or
/// decides to move a part of one, it calls `may_split`; before it moves all of one, `open` of the
/// new VMA, as well as before it copies one for a child. Up to then nothing has been changed, and
/// no lock is held but those of the process's memory (`mmap_lock` for writing) and of the VMA.
/// Write-combining mappings have no such entries.
struct Vtable<T, const WC: bool>(PhantomData<T>);

impl<T: Mapped, const WC: bool> Vtable<T, WC> {
    const MEMORY_TYPE: MemoryType = if WC {
        MemoryType::WriteCombining
    } else {
        MemoryType::Uncached
    };

    const OPS: &'static bindings::vm_operations_struct = &bindings::vm_operations_struct {
        open: Some(Self::open),
        may_split: Some(Self::may_split),
        mprotect: Some(Self::mprotect),
        close: Some(Self::close),
        fault: Some(Self::fault),
        huge_fault: Some(Self::huge_fault),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `vma` must be a VMA with these operations.
    unsafe fn borrow<'a>(vma: *mut bindings::vm_area_struct) -> ArcBorrow<'a, T> {
        // SAFETY: `vma` is valid by the caller.
        let private = unsafe { (*vma).vm_private_data };
        // SAFETY: `NewVma::map_io` and `open` store a reference for each VMA with these operations,
        // which only `close` takes away.
        unsafe { Arc::borrow(private) }
    }

    /// # Safety
    ///
    /// To be called by the memory management only, as `vm_operations_struct.open` of a VMA
    /// with these operations.
    unsafe extern "C" fn open(vma: *mut bindings::vm_area_struct) {
        // SAFETY: The new VMA was copied from one with these operations, whose reference keeps the
        // object alive while the copy takes its own.
        let mapped: Arc<T> = unsafe { Self::borrow(vma) }.into();
        if !WC {
            mapped.vma_changes();
        }
        mapped.vma_opened(Self::MEMORY_TYPE);
        // SAFETY: `vma` is valid during the call and nobody else writes to it.
        unsafe { (*vma).vm_private_data = mapped.into_foreign() };
    }

    /// # Safety
    ///
    /// To be called by the memory management only, as `vm_operations_struct.may_split` of a VMA
    /// with these operations.
    unsafe extern "C" fn may_split(vma: *mut bindings::vm_area_struct, _address: c_ulong) -> c_int {
        if !WC {
            // Wherever it is cut: the next time it may be cut elsewhere.
            // SAFETY: The VMA has these operations.
            unsafe { Self::borrow(vma) }.vma_changes();
        }
        0
    }

    /// # Safety
    ///
    /// To be called by the memory management only, as `vm_operations_struct.mprotect` of a VMA
    /// with these operations.
    unsafe extern "C" fn mprotect(
        vma: *mut bindings::vm_area_struct,
        _start: c_ulong,
        _end: c_ulong,
        new_flags: c_ulong,
    ) -> c_int {
        // To the kernel an entry of that size that allows nothing is none (`pud_present`), and it
        // warns when its protection changes again (`pudp_invalidate`).
        if !WC && new_flags & (flags::READ | flags::WRITE | flags::EXEC) == 0 {
            // SAFETY: The VMA has these operations.
            unsafe { Self::borrow(vma) }.vma_changes();
        }
        0
    }

    /// # Safety
    ///
    /// To be called by the memory management only, as `vm_operations_struct.close` of a VMA
    /// with these operations.
    unsafe extern "C" fn close(vma: *mut bindings::vm_area_struct) {
        // SAFETY: `vma` is valid during the call.
        let private = unsafe { (*vma).vm_private_data };
        // SAFETY: The reference was stored by `map_io` or `open`; `close` is called once a VMA and
        // is its last operation.
        let mapped = unsafe { Arc::<T>::from_foreign(private) };
        mapped.vma_closed(Self::MEMORY_TYPE);
    }

    /// # Safety
    ///
    /// To be called by the memory management only, as `vm_operations_struct.fault` of a VMA
    /// with these operations.
    unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: Same requirements.
        unsafe { Self::huge_fault(vmf, 0) }
    }

    /// # Safety
    ///
    /// To be called by the memory management only, as `vm_operations_struct.huge_fault` of a VMA
    /// with these operations.
    unsafe extern "C" fn huge_fault(
        vmf: *mut bindings::vm_fault,
        order: c_uint,
    ) -> bindings::vm_fault_t {
        let fault = Fault {
            vmf,
            memory_type: Self::MEMORY_TYPE,
            _call: PhantomData,
        };
        // SAFETY: The VMA of the fault has these operations.
        let mapped = unsafe { Self::borrow(fault.vma()) };
        mapped.fault(&fault, order).0
    }
}

/// A VMA in its file's mmap operation.
pub(crate) struct NewVma<'a> {
    vma: *mut bindings::vm_area_struct,
    _call: PhantomData<&'a ()>,
}

impl NewVma<'_> {
    /// # Safety
    ///
    /// `vma` must be the argument of the mmap operation that is running.
    pub(super) unsafe fn from_raw(vma: *mut bindings::vm_area_struct) -> Self {
        Self {
            vma,
            _call: PhantomData,
        }
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::vm_area_struct {
        self.vma
    }

    /// Whether it was asked for with `MAP_SHARED`.
    ///
    /// The kernel clears VM_SHARED for a shared mapping of a read-only fd; VM_MAYSHARE stays. Its
    /// Rust constant has the value of VM_MAYEXEC on Linux 7.2 and 7.3-rc7
    /// (`rust/bindings/bindings_helper.h`), so C is asked.
    pub(crate) fn is_shared(&self) -> bool {
        // SAFETY: `vma` is valid and locked for writing during mmap.
        unsafe { bindings::bl_vma_may_share(self.vma) }
    }

    /// Lets it allow no more than `file` does; `EACCES` when it is to be written and the file is
    /// not.
    pub(super) fn allow_no_more_than(&self, file: *const bindings::file) -> Result {
        // SAFETY: `vma` is valid and locked for writing during mmap; the file is valid by the
        // caller.
        to_result(unsafe { bindings::bl_vma_no_more_than(self.vma, file) })
    }

    /// Offset of its first byte in the file, in pages.
    pub(crate) fn page_offset(&self) -> u64 {
        // SAFETY: `vma` is valid during mmap.
        unsafe { (*self.vma).vm_pgoff as u64 }
    }

    /// Runs `f` with another offset in its place.
    pub(crate) fn with_page_offset<R>(&self, offset: u64, f: impl FnOnce() -> R) -> R {
        let real = self.page_offset();
        // SAFETY: `vma` is valid and locked for writing during mmap, and in no tree yet.
        unsafe { (*self.vma).vm_pgoff = offset as usize };
        let result = f();
        // SAFETY: As above.
        unsafe { (*self.vma).vm_pgoff = real as usize };
        result
    }

    /// The file that is mapped.
    pub(crate) fn file(&self) -> OpenFile {
        // SAFETY: The VMA has a file, which is valid during mmap.
        let file = unsafe { bindings::get_file((*self.vma).vm_file) };
        // INVARIANT: The reference was just taken.
        OpenFile(file)
    }

    /// Makes it a mapping of `file`.
    pub(super) fn set_file(&self, file: *mut bindings::file) {
        // SAFETY: Allowed in an mmap operation; takes a reference and gives back the old one.
        unsafe { bindings::vma_set_file(self.vma, file) };
    }

    /// Makes it a mapping of device memory of type `memory_type` whose pages `mapped` inserts.
    pub(crate) fn map_io<T: Mapped>(self, mapped: Arc<T>, memory_type: MemoryType) {
        let wc = memory_type == MemoryType::WriteCombining;
        let ops = if wc {
            Vtable::<T, true>::OPS
        } else {
            Vtable::<T, false>::OPS
        };
        // SAFETY: `vma` is valid and locked for writing during mmap.
        unsafe { bindings::bl_vma_set_io(self.vma, wc) };
        mapped.vma_opened(memory_type);
        // SAFETY: As above; the reference belongs to the VMA from here on.
        unsafe { (*self.vma).vm_private_data = mapped.into_foreign() };
        // SAFETY: As above; the operations are static, and find what they want in
        // `vm_private_data`.
        unsafe { (*self.vma).vm_ops = ops };
    }
}

/// A reference to an open file, which keeps it open.
///
/// # Invariants
///
/// The pointer is valid and owns a reference.
pub(crate) struct OpenFile(*mut bindings::file);

// SAFETY: All that is done with the file is to give back a reference, whose count is atomic.
unsafe impl Send for OpenFile {}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bindings::fput(self.0) };
    }
}
