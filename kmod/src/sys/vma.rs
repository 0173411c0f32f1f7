// SPDX-License-Identifier: GPL-2.0

//! Mappings of device memory into processes.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::bindings;
use core::marker::PhantomData;
use kernel::{
    mm::virt::VmaRef,
    prelude::*,
    sync::{Arc, ArcBorrow},
    types::ForeignOwnable,
};

/// Order of an entry of one level above pages (2 MiB on x86-64).
pub(crate) const PMD_ORDER: u32 = bindings::PMD_ORDER;

/// Something whose pages are inserted by its fault handler.
///
/// Each VMA holds one reference.
pub(crate) trait Mapped: Send + Sync + Sized + 'static {
    /// A page of `fault` is missing: inserts an entry of `order`, or says why not.
    fn fault(&self, fault: &Fault<'_>, order: u32) -> Outcome;

    /// One VMA more maps this, by mmap, fork, split or mremap.
    fn vma_opened(&self);

    /// One VMA less; its entries are gone.
    fn vma_closed(&self);
}

/// Answer of a fault handler.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome(bindings::vm_fault_t);

impl Outcome {
    /// The process gets SIGBUS.
    pub(crate) const SIGBUS: Self = Self(bindings::vm_fault_reason_VM_FAULT_SIGBUS);
    /// Try again with a smaller entry.
    pub(crate) const FALLBACK: Self = Self(bindings::vm_fault_reason_VM_FAULT_FALLBACK);
}

/// A page fault that is being handled.
pub(crate) struct Fault<'a> {
    vmf: *mut bindings::vm_fault,
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

    /// Inserts an entry of `order` (0 or [`PMD_ORDER`]) that begins with the frame `pfn`.
    ///
    /// `pfn` must be a multiple of `2^order`, and the entry must lie inside the VMA.
    pub(crate) fn insert(&self, pfn: u64, order: u32) -> Outcome {
        let pfn = pfn as usize;
        if order == 0 {
            // SAFETY: The VMA is that of the fault and was made by `NewVma::map_io`, which set
            // VM_PFNMAP; any frame may be inserted into such a VMA.
            Outcome(unsafe { bindings::vmf_insert_pfn(self.vma(), self.address() as usize, pfn) })
        } else if order == PMD_ORDER && cfg!(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP) {
            // SAFETY: `vmf` is valid during the fault; the VMA has VM_PFNMAP (see above).
            Outcome(unsafe { bindings::vmf_insert_pfn_pmd(self.vmf, pfn, false) })
        } else {
            Outcome::FALLBACK
        }
    }
}

/// The VMA operations of `T`.
///
/// Entries are at most of [`PMD_ORDER`]: splitting a larger one oopses on Linux 7.3-rc7
/// (`__split_huge_pmd` from `vma_adjust_trans_huge` does not look for a leaf above).
struct Vtable<T>(PhantomData<T>);

impl<T: Mapped> Vtable<T> {
    const OPS: bindings::vm_operations_struct = bindings::vm_operations_struct {
        open: Some(Self::open),
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
        mapped.vma_opened();
        // SAFETY: `vma` is valid during the call and nobody else writes to it.
        unsafe { (*vma).vm_private_data = mapped.into_foreign() };
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
        mapped.vma_closed();
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

    /// Makes it an uncached mapping of device memory whose pages `mapped` inserts.
    pub(crate) fn map_io<T: Mapped>(self, mapped: Arc<T>) {
        // SAFETY: `vma` is valid and locked for writing during mmap.
        unsafe { bindings::bl_vma_set_io(self.vma) };
        mapped.vma_opened();
        // SAFETY: As above; the reference belongs to the VMA from here on.
        unsafe { (*self.vma).vm_private_data = mapped.into_foreign() };
        // SAFETY: As above.
        unsafe { (*self.vma).vm_ops = &Vtable::<T>::OPS };
    }
}
