// SPDX-License-Identifier: GPL-2.0

//! The importer's side of dma-bufs.
//!
//! C header: [`include/linux/dma-buf.h`](srctree/include/linux/dma-buf.h)

use super::{
    fence::{Fence, Wait},
    pci::Function,
};
use crate::abi::{BIDIRECTIONAL, Entry, FROM_DEVICE, TO_DEVICE};
use core::{cell::UnsafeCell, ptr::NonNull};
use kernel::{
    bindings,
    error::{from_err_ptr, to_result},
    mm::virt::VmaNew,
    prelude::*,
    sync::{
        Arc,
        atomic::{Atomic, Relaxed},
    },
    time::{Delta, delay::fsleep},
};

// Types without fields, such as that of lockdep when it is off, are behind pointers only.
#[allow(improper_ctypes)]
extern "C" {
    // kmod/include/barlease_kernel.h
    fn barlease_dma_buf_get_tph(
        dmabuf: *mut bindings::dma_buf,
        extended: bool,
        steering_tag: *mut u16,
        ph: *mut u8,
    ) -> c_int;
}

/// A reference to a dma-buf.
///
/// # Invariants
///
/// The pointer is valid and owns a reference to the dma-buf's file.
pub(crate) struct DmaBuf(NonNull<bindings::dma_buf>);

impl DmaBuf {
    /// The dma-buf behind `fd`. `EBADF` when there is no such fd, `EINVAL` when it is something
    /// else.
    pub(crate) fn get(fd: i32) -> Result<Self> {
        // SAFETY: Any number may be asked for.
        let dmabuf = from_err_ptr(unsafe { bindings::dma_buf_get(fd) })?;
        // INVARIANT: `dma_buf_get` returned a reference.
        NonNull::new(dmabuf).map(Self).ok_or(EBADF)
    }

    /// The steering tag of a namespace, and the processing hint.
    pub(crate) fn steering_tag(&self, extended: bool) -> Result<(u16, u8)> {
        let _lock = ReservationLock::new(self);
        let (mut tag, mut ph) = (0, 0);
        // SAFETY: By the type invariant the dma-buf is valid, and its reservation lock is held.
        to_result(unsafe {
            barlease_dma_buf_get_tph(self.0.as_ptr(), extended, &mut tag, &mut ph)
        })?;
        Ok((tag, ph))
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bindings::dma_buf_put(self.0.as_ptr()) };
    }
}

/// The reservation lock of a dma-buf, held.
struct ReservationLock<'a>(&'a DmaBuf);

impl<'a> ReservationLock<'a> {
    fn new(dmabuf: &'a DmaBuf) -> Self {
        let lock = Self(dmabuf);
        // SAFETY: The dma-buf is valid. Without an acquire context locking cannot fail.
        unsafe { bindings::dma_resv_lock(lock.resv(), core::ptr::null_mut()) };
        lock
    }

    fn resv(&self) -> *mut bindings::dma_resv {
        // SAFETY: The dma-buf is valid.
        unsafe { self.0.0.as_ref().resv }
    }
}

impl Drop for ReservationLock<'_> {
    fn drop(&mut self) {
        // SAFETY: `new` locked it.
        unsafe { bindings::dma_resv_unlock(self.resv()) };
    }
}

/// The page offset that a process has passed to mmap.
pub(crate) fn page_offset(vma: &VmaNew) -> u64 {
    // SAFETY: The VMA is being made, and nobody else changes it.
    unsafe { (*vma.as_ptr()).vm_pgoff as u64 }
}

/// A kind of importer.
pub(crate) enum Kind {
    /// As `dma_buf_attach()` makes it.
    Static,
    /// As `dma_buf_dynamic_attach()` makes it.
    Dynamic {
        /// Whether it takes device memory.
        peer_to_peer: bool,
        /// Whether it can be told to undo its mapping.
        invalidate: bool,
    },
}

impl Kind {
    fn operations(&self) -> *const bindings::dma_buf_attach_ops {
        const fn dynamic(peer_to_peer: bool, invalidate: bool) -> bindings::dma_buf_attach_ops {
            bindings::dma_buf_attach_ops {
                allow_peer2peer: peer_to_peer,
                invalidate_mappings: if invalidate {
                    Some(Attachment::on_invalidate)
                } else {
                    None
                },
            }
        }
        static DYNAMIC: [bindings::dma_buf_attach_ops; 4] = [
            dynamic(false, false),
            dynamic(false, true),
            dynamic(true, false),
            dynamic(true, true),
        ];
        match *self {
            Self::Static => core::ptr::null(),
            Self::Dynamic {
                peer_to_peer,
                invalidate,
            } => &raw const DYNAMIC[usize::from(peer_to_peer) << 1 | usize::from(invalidate)],
        }
    }
}

/// A function attached to a dma-buf.
///
/// # Invariants
///
/// `inner` is touched only with the reservation lock of the dma-buf held. While the attachment in
/// it is not null, it is one of `dmabuf` whose private data points to this.
pub(crate) struct Attachment {
    dmabuf: DmaBuf,
    hold: Atomic<u32>,
    /// 1 while somebody has the reservation lock and keeps it.
    occupied: Atomic<u32>,
    invalidations: Atomic<u32>,
    interruptions: Atomic<u32>,
    inner: UnsafeCell<Inner>,
}

// SAFETY: All that is in it may be used from any thread.
unsafe impl Send for Attachment {}
// SAFETY: By the type invariant a lock guards what is not atomic.
unsafe impl Sync for Attachment {}

struct Inner {
    /// Null when detached.
    attachment: *mut bindings::dma_buf_attachment,
    mapping: Option<Mapping>,
    /// With their numbers: 0 is the one that is meant by none.
    fences: KVec<(u32, Fence)>,
    /// Numbers that were given to fences.
    numbers: u32,
    /// Of the last mapping.
    entries: KVVec<Entry>,
}

struct Mapping {
    table: NonNull<bindings::sg_table>,
    direction: bindings::dma_data_direction,
}

impl Attachment {
    /// Attaches `function`, which must be detached before it is unbound.
    pub(crate) fn new(dmabuf: DmaBuf, function: &Function, kind: Kind) -> Result<Arc<Self>> {
        let raw = dmabuf.0.as_ptr();
        let this = Arc::new(
            Self {
                dmabuf,
                hold: Atomic::new(0),
                occupied: Atomic::new(0),
                invalidations: Atomic::new(0),
                interruptions: Atomic::new(0),
                inner: UnsafeCell::new(Inner {
                    attachment: core::ptr::null_mut(),
                    mapping: None,
                    fences: KVec::new(),
                    numbers: 0,
                    entries: KVVec::new(),
                }),
            },
            GFP_KERNEL,
        )?;
        let private = (&raw const *this).cast_mut().cast();
        let device = function.device();
        let attachment = match kind {
            // SAFETY: The dma-buf and the device are valid.
            Kind::Static => unsafe { bindings::dma_buf_attach(raw, device) },
            // SAFETY: As above; the operations are static, and `this` is detached before it goes.
            Kind::Dynamic { .. } => unsafe {
                bindings::dma_buf_dynamic_attach(raw, device, kind.operations(), private)
            },
        };
        let attachment = from_err_ptr(attachment)?;
        // INVARIANT: Of this dma-buf, and with this as private data where anybody looks at that.
        this.lock().inner().attachment = attachment;
        Ok(this)
    }

    /// Makes `vma`, a mapping of a file of ours, one of the dma-buf, from its first page on.
    pub(crate) fn mmap(&self, vma: &VmaNew) -> Result {
        // SAFETY: The dma-buf is valid, and the VMA is being made.
        to_result(unsafe { bindings::dma_buf_mmap(self.dmabuf.0.as_ptr(), vma.as_ptr(), 0) })
    }

    /// Locks the reservation lock of the dma-buf.
    pub(crate) fn lock(&self) -> Locked<'_> {
        Locked {
            attachment: self,
            _lock: ReservationLock::new(&self.dmabuf),
        }
    }

    /// Leaves mappings alone when an invalidation comes, or undoes them.
    pub(crate) fn set_hold(&self, hold: bool) {
        self.hold.store(hold.into(), Relaxed);
    }

    /// Invalidations that came, and those of them that came while it was mapped.
    pub(crate) fn invalidations(&self) -> (u32, u32) {
        (
            self.invalidations.load(Relaxed),
            self.interruptions.load(Relaxed),
        )
    }

    /// Takes the reservation lock and keeps it until [`Attachment::vacate`], or a signal.
    pub(crate) fn occupy(&self) {
        let _lock = ReservationLock::new(&self.dmabuf);
        self.occupied.store(1, Relaxed);
        while self.occupied.load(Relaxed) == 1 && !kernel::current!().signal_pending() {
            fsleep(Delta::from_millis(1));
        }
        self.occupied.store(0, Relaxed);
    }

    /// Has whoever keeps the reservation lock give it back. `ENXIO` when nobody does.
    pub(crate) fn vacate(&self) -> Result {
        if self.occupied.xchg(2, Relaxed) == 0 {
            self.occupied.store(0, Relaxed);
            return Err(ENXIO);
        }
        Ok(())
    }

    /// `ENXIO` when nobody keeps the reservation lock.
    pub(crate) fn is_occupied(&self) -> Result {
        if self.occupied.load(Relaxed) == 1 {
            Ok(())
        } else {
            Err(ENXIO)
        }
    }

    /// Undoes the mapping, signals the fences and detaches, unless that was done.
    pub(crate) fn detach(&self) {
        let attachment = {
            let mut locked = self.lock();
            let _ = locked.unmap();
            locked.inner().fences = KVec::new();
            core::mem::replace(&mut locked.inner().attachment, core::ptr::null_mut())
        };
        if !attachment.is_null() {
            // SAFETY: By the type invariant it was attached to this dma-buf; it has no mapping.
            unsafe { bindings::dma_buf_detach(self.dmabuf.0.as_ptr(), attachment) };
        }
    }

    /// # Safety
    ///
    /// To be called by the dma-buf core only, as `dma_buf_attach_ops.invalidate_mappings` of an
    /// attachment that [`Attachment::new`] made.
    unsafe extern "C" fn on_invalidate(attachment: *mut bindings::dma_buf_attachment) {
        // SAFETY: The attachment is valid until this returns.
        let this = unsafe { (*attachment).importer_priv }.cast::<Self>();
        // SAFETY: `new` has set it, and what it points to detaches before it goes.
        let this = unsafe { &*this };
        this.invalidations.fetch_add(1, Relaxed);
        // SAFETY: The exporter that invalidates holds the reservation lock.
        let inner = unsafe { &mut *this.inner.get() };
        if inner.mapping.is_none() {
            return;
        }
        this.interruptions.fetch_add(1, Relaxed);
        if this.hold.load(Relaxed) == 0 {
            let _ = inner.unmap();
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.detach();
    }
}

impl Inner {
    /// The reservation lock must be held. `ENXIO` when there is no mapping.
    fn unmap(&mut self) -> Result {
        let mapping = self.mapping.take().ok_or(ENXIO)?;
        // SAFETY: By the type invariant of `Attachment` it is attached, and the lock is held by the
        // caller.
        unsafe {
            bindings::dma_buf_unmap_attachment(
                self.attachment,
                mapping.table.as_ptr(),
                mapping.direction,
            );
        }
        Ok(())
    }
}

/// An [`Attachment`] whose dma-buf's reservation lock is held.
pub(crate) struct Locked<'a> {
    attachment: &'a Attachment,
    _lock: ReservationLock<'a>,
}

impl Locked<'_> {
    fn get(&self) -> &Inner {
        // SAFETY: The reservation lock is held, and changes need `&mut self`.
        unsafe { &*self.attachment.inner.get() }
    }

    fn inner(&mut self) -> &mut Inner {
        // SAFETY: The reservation lock is held.
        unsafe { &mut *self.attachment.inner.get() }
    }

    fn attached(&self) -> Result<*mut bindings::dma_buf_attachment> {
        let attachment = self.get().attachment;
        if attachment.is_null() {
            return Err(ENODEV);
        }
        Ok(attachment)
    }

    /// Whether there is a mapping.
    pub(crate) fn is_mapped(&self) -> bool {
        self.get().mapping.is_some()
    }

    /// Maps, in a direction of the uAPI.
    pub(crate) fn map(&mut self, direction: u32) -> Result {
        let attachment = self.attached()?;
        let direction = match direction {
            BIDIRECTIONAL => bindings::dma_data_direction_DMA_BIDIRECTIONAL,
            TO_DEVICE => bindings::dma_data_direction_DMA_TO_DEVICE,
            FROM_DEVICE => bindings::dma_data_direction_DMA_FROM_DEVICE,
            _ => return Err(EINVAL),
        };
        if self.is_mapped() {
            return Err(EBUSY);
        }
        // SAFETY: It is attached, and the reservation lock is held.
        let table = unsafe { bindings::dma_buf_map_attachment(attachment, direction) };
        let table = NonNull::new(from_err_ptr(table)?).ok_or(ENOMEM)?;
        let inner = self.inner();
        inner.mapping = Some(Mapping { table, direction });
        // SAFETY: The table is that of a mapping.
        match unsafe { entries_of(table) } {
            Ok(entries) => inner.entries = entries,
            Err(error) => {
                inner.unmap()?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Undoes the mapping. `ENXIO` when there is none.
    pub(crate) fn unmap(&mut self) -> Result {
        self.inner().unmap()
    }

    /// Pins.
    pub(crate) fn pin(&mut self) -> Result {
        let attachment = self.dynamic()?;
        // SAFETY: It is attached, dynamically, and the reservation lock is held.
        to_result(unsafe { bindings::dma_buf_pin(attachment) })
    }

    /// Unpins.
    pub(crate) fn unpin(&mut self) -> Result {
        let attachment = self.dynamic()?;
        // SAFETY: It is attached, dynamically, and the reservation lock is held.
        unsafe { bindings::dma_buf_unpin(attachment) };
        Ok(())
    }

    fn dynamic(&self) -> Result<*mut bindings::dma_buf_attachment> {
        let attachment = self.attached()?;
        // SAFETY: It is attached.
        if unsafe { (*attachment).importer_ops }.is_null() {
            return Err(EINVAL);
        }
        Ok(attachment)
    }

    /// Adds a fence that says that the device uses the dma-buf: number 0. `EBUSY` when there is
    /// that.
    pub(crate) fn add_fence(&mut self) -> Result {
        self.attached()?;
        if self.get().fences.iter().any(|(number, _)| *number == 0) {
            return Err(EBUSY);
        }
        let usage = bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP;
        self.add(0, Fence::new(Wait::Usual, 0)?, usage)
    }

    /// Adds a further fence: its number. A user can get at one that `shows`; a timer signals it
    /// after so many milliseconds, unless that is 0.
    pub(crate) fn add_further_fence(
        &mut self,
        wait: Wait,
        shows: bool,
        milliseconds: u32,
    ) -> Result<u32> {
        self.attached()?;
        let usage = if shows {
            bindings::dma_resv_usage_DMA_RESV_USAGE_READ
        } else {
            bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP
        };
        let number = self.get().numbers.checked_add(1).ok_or(EOVERFLOW)?;
        self.add(number, Fence::new(wait, milliseconds)?, usage)?;
        self.inner().numbers = number;
        Ok(number)
    }

    fn add(&mut self, number: u32, fence: Fence, usage: bindings::dma_resv_usage) -> Result {
        let resv = self._lock.resv();
        self.inner().fences.reserve(1, GFP_KERNEL)?;
        // SAFETY: The reservation lock is held.
        to_result(unsafe { bindings::dma_resv_reserve_fences(resv, 1) })?;
        // SAFETY: The lock is held and room was reserved; a reference to the fence is taken.
        unsafe { bindings::dma_resv_add_fence(resv, fence.as_ptr(), usage) };
        self.inner().fences.push((number, fence), GFP_KERNEL)?;
        Ok(())
    }

    /// Signals the fence of that number. `ENXIO` when there is none.
    pub(crate) fn signal_fence(&mut self, number: u32) -> Result {
        let fences = &mut self.inner().fences;
        let index = fences.iter().position(|(its, _)| *its == number);
        drop(fences.remove(index.ok_or(ENXIO)?).map_err(|_| ENXIO)?);
        Ok(())
    }

    /// The entries of the last mapping.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.get().entries
    }

    /// The address of an offset in the last mapping. `EINVAL` outside of it.
    pub(crate) fn address(&self, offset: u64) -> Result<u64> {
        let pieces = self.pieces(offset, 1)?;
        Ok(pieces.first().ok_or(EINVAL)?.address)
    }

    /// Where `length` bytes from `offset` on of the last mapping are. `EINVAL` outside of it.
    pub(crate) fn pieces(&self, offset: u64, length: u64) -> Result<KVVec<Entry>> {
        let mut pieces = KVVec::new();
        let (mut skip, mut left) = (offset, length);
        for entry in self.entries() {
            if left == 0 {
                break;
            }
            if skip >= entry.length {
                skip -= entry.length;
                continue;
            }
            let piece = Entry {
                address: entry.address + skip,
                length: left.min(entry.length - skip),
            };
            left -= piece.length;
            skip = 0;
            pieces.push(piece, GFP_KERNEL)?;
        }
        if left == 0 { Ok(pieces) } else { Err(EINVAL) }
    }
}

/// The entries of a table.
///
/// # Safety
///
/// `table` must be that of a mapping.
unsafe fn entries_of(table: NonNull<bindings::sg_table>) -> Result<KVVec<Entry>> {
    // SAFETY: By the caller.
    let (mut entry, count) = unsafe { (table.as_ref().sgl, table.as_ref().nents) };
    let mut entries = KVVec::with_capacity(count as usize, GFP_KERNEL)?;
    for _ in 0..count {
        if entry.is_null() {
            return Err(EIO);
        }
        // SAFETY: One of the entries of the table.
        let address = unsafe { bindings::sg_dma_address(entry) };
        // SAFETY: As above.
        let length = unsafe { bindings::sg_dma_len(entry) };
        entries.push(
            Entry {
                address,
                length: length.into(),
            },
            GFP_KERNEL,
        )?;
        // SAFETY: As above.
        entry = unsafe { bindings::sg_next(entry) };
    }
    Ok(entries)
}
