// SPDX-License-Identifier: GPL-2.0

//! The exporter's side of dma-bufs.
//!
//! C header: [`include/linux/dma-buf.h`](srctree/include/linux/dma-buf.h)

use super::{
    bindings, errno,
    fence::Fence,
    p2p::{Importer, Mapped, Note},
    patience::{Patience, Pauses},
    vma::NewVma,
};
use core::{cell::UnsafeCell, marker::PhantomData, ptr::NonNull};
use kernel::{
    container_of,
    error::{from_err_ptr, from_result, to_result},
    fmt, new_mutex,
    prelude::*,
    str::BStr,
    sync::{Arc, ArcBorrow, Mutex, lock::mutex::MutexGuard},
    types::ForeignOwnable,
};

/// Bytes of a dma-buf's name, the terminating NUL included.
pub(crate) const NAME_LEN: usize = bindings::BL_DMA_BUF_NAME_LEN as usize;

/// An object that a dma-buf exports.
///
/// # Safety
///
/// [`Self::operations`] must return the same `static` each time, and [`Self::live`] the same one
/// for a value. A value must be exported by one dma-buf only: what `make` returns to
/// [`DmaBuf::export`] is new, and its `live` leads to the dma-buf that it was made for.
pub(crate) unsafe trait Exporter: Send + Sync + Sized + 'static {
    /// The data that the reservation lock of the dma-buf guards.
    type UnderResv: Send + 'static;

    /// The operations, by whose address a dma-buf is recognised as one of `Self`.
    fn operations() -> &'static Operations<Self>;

    /// The way back to the dma-buf.
    fn live(&self) -> &Live<Self::UnderResv>;

    /// A process maps the dma-buf. Offset and length are within its size.
    fn mmap(this: ArcBorrow<'_, Self>, vma: NewVma<'_>) -> Result;

    /// An importer that does peer-to-peer DMA and takes revocation attaches.
    fn attach(&self) -> Result;

    /// An importer that attached detaches; it has no mapping.
    fn detach(&self);

    /// An importer maps. The reservation lock is held.
    fn map(&self, importer: &mut Importer<'_>) -> Result<Mapped>;

    /// An importer undoes a mapping. The reservation lock is held.
    fn unmap(&self, importer: &mut Importer<'_>, mapped: Mapped);

    /// The last reference to the dma-buf is gone, and so is what `live` led to.
    fn release(this: Arc<Self>);
}

/// The operations of dma-bufs that export a `T`. Must be a `static`.
#[repr(transparent)]
pub(crate) struct Operations<T>(bindings::dma_buf_ops, PhantomData<fn() -> T>);

impl<T: Exporter> Operations<T> {
    /// The operations of `T`.
    pub(crate) const fn new() -> Self {
        Self(
            bindings::dma_buf_ops {
                attach: Some(Self::attach),
                detach: Some(Self::detach),
                map_dma_buf: Some(Self::map),
                unmap_dma_buf: Some(Self::unmap),
                release: Some(Self::release),
                mmap: Some(Self::mmap),
                ..pin_init::zeroed()
            },
            PhantomData,
        )
    }

    /// A value for `priv`, which the dma-buf core wants not to be null, before there is an object to
    /// export.
    fn unfinished() -> *mut c_void {
        (&raw const T::operations().0).cast_mut().cast()
    }

    /// # Safety
    ///
    /// `dmabuf` must be valid, not released, have these operations, and be what `DmaBuf::export`
    /// returned.
    unsafe fn borrow<'a>(dmabuf: *mut bindings::dma_buf) -> ArcBorrow<'a, T> {
        // SAFETY: `dmabuf` is valid by the caller.
        let private = unsafe { (*dmabuf).priv_ };
        // SAFETY: `DmaBuf::export` stored a reference, which only `release` takes away.
        unsafe { Arc::borrow(private) }
    }

    /// # Safety
    ///
    /// To be called by the dma-buf core only, as `dma_buf_ops.attach` of a dma-buf of `T`.
    unsafe extern "C" fn attach(
        dmabuf: *mut bindings::dma_buf,
        attachment: *mut bindings::dma_buf_attachment,
    ) -> c_int {
        from_result(|| {
            // SAFETY: The attachment is valid and nobody else knows it yet.
            let peer_to_peer = unsafe { (*attachment).peer2peer };
            // SAFETY: As above.
            if !peer_to_peer || !unsafe { bindings::dma_buf_attach_revocable(attachment) } {
                return Err(errno::EOPNOTSUPP.into());
            }
            // SAFETY: The importer that attaches has a reference to the dma-buf, whose operations
            // are these.
            unsafe { Self::borrow(dmabuf) }.attach()?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// To be called by the dma-buf core only, as `dma_buf_ops.detach` of a dma-buf of `T`.
    unsafe extern "C" fn detach(
        dmabuf: *mut bindings::dma_buf,
        _attachment: *mut bindings::dma_buf_attachment,
    ) {
        // SAFETY: The importer that detaches has a reference to the dma-buf, whose operations are
        // these.
        unsafe { Self::borrow(dmabuf) }.detach();
    }

    /// # Safety
    ///
    /// To be called by the dma-buf core only, as `dma_buf_ops.map_dma_buf` of a dma-buf of `T`.
    unsafe extern "C" fn map(
        attachment: *mut bindings::dma_buf_attachment,
        direction: bindings::dma_data_direction,
    ) -> *mut bindings::sg_table {
        // SAFETY: The attachment keeps the dma-buf alive, whose operations are these.
        let exported = unsafe { Self::borrow((*attachment).dmabuf) };
        // SAFETY: The attachment was attached, and the core holds the reservation lock.
        let mut importer = unsafe { Importer::from_raw(attachment, direction) };
        match exported.map(&mut importer) {
            Ok(mapped) => mapped.0,
            Err(error) => error.to_ptr(),
        }
    }

    /// # Safety
    ///
    /// To be called by the dma-buf core only, as `dma_buf_ops.unmap_dma_buf` of a dma-buf of `T`.
    unsafe extern "C" fn unmap(
        attachment: *mut bindings::dma_buf_attachment,
        table: *mut bindings::sg_table,
        direction: bindings::dma_data_direction,
    ) {
        // SAFETY: The attachment keeps the dma-buf alive, whose operations are these.
        let exported = unsafe { Self::borrow((*attachment).dmabuf) };
        // SAFETY: The attachment was attached, and the core holds the reservation lock.
        let mut importer = unsafe { Importer::from_raw(attachment, direction) };
        exported.unmap(&mut importer, Mapped(table));
    }

    /// # Safety
    ///
    /// To be called by the dma-buf core only, as `dma_buf_ops.mmap` of a dma-buf of `T`.
    unsafe extern "C" fn mmap(
        dmabuf: *mut bindings::dma_buf,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: `vma` is the argument of the mmap operation that is running.
        let vma = unsafe { NewVma::from_raw(vma) };
        from_result(|| {
            // SAFETY: The file that is mapped keeps the dma-buf, and with it its own file, alive.
            vma.allow_no_more_than(unsafe { (*dmabuf).file })?;
            // SAFETY: The file that is mapped keeps the dma-buf alive, whose operations are these.
            T::mmap(unsafe { Self::borrow(dmabuf) }, vma)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// To be called by the dma-buf core only, as `dma_buf_ops.release` of a dma-buf of `T`.
    unsafe extern "C" fn release(dmabuf: *mut bindings::dma_buf) {
        // SAFETY: `dmabuf` is valid until this returns.
        let private = unsafe { (*dmabuf).priv_ };
        if core::ptr::eq(private, Self::unfinished()) {
            return;
        }
        // SAFETY: The reference was stored by `DmaBuf::export`; release is the last operation.
        let exported: Arc<T> = unsafe { Arc::from_foreign(private) };
        *exported.live().dmabuf.lock() = None;
        T::release(exported);
    }
}

/// A reference to the file of a dma-buf of any exporter.
///
/// # Invariants
///
/// The pointer is valid and owns a reference to the dma-buf's file.
pub(crate) struct DmaBuf(NonNull<bindings::dma_buf>);

// SAFETY: The reference is to a file, whose count is atomic: it may be given back on any thread.
unsafe impl Send for DmaBuf {}

impl DmaBuf {
    /// A new dma-buf of `size` bytes with that name and the open flags `flags`, which exports what
    /// `make` makes for it. The last byte of `name` does not count.
    pub(crate) fn export<T: Exporter>(
        size: u64,
        flags: u32,
        name: &[u8; NAME_LEN],
        make: impl FnOnce(&NewDmaBuf<'_>) -> Result<Arc<T>>,
    ) -> Result<Self> {
        let size = usize::try_from(size).map_err(|_| EINVAL)?;
        let info = bindings::dma_buf_export_info {
            exp_name: c"barlease".as_char_ptr(),
            // SAFETY: Always valid.
            owner: unsafe { bindings::bl_this_module() },
            ops: &raw const T::operations().0,
            size,
            flags: flags as c_int,
            resv: core::ptr::null_mut(),
            priv_: Operations::<T>::unfinished(),
        };
        // SAFETY: `info` is filled in; the operations are static and their owner is this module.
        // All that can happen to a dma-buf that is in no descriptor table is its release, which
        // looks whether there is something exported.
        let dmabuf = from_err_ptr(unsafe { bindings::dma_buf_export(&info) })?;
        // INVARIANT: `dma_buf_export` returned the first reference.
        let mut this = Self(NonNull::new(dmabuf).ok_or(ENOMEM)?);
        // SAFETY: `name` is as long as a name is at most. The dma-buf is in the kernel's list of
        // all, and what walks that looks at names under their lock and at a pointer to one that is
        // complete; nobody else has a reference, so nobody else changes the name.
        if !unsafe { bindings::bl_dma_buf_name_new(this.0.as_ptr(), name.as_ptr().cast()) } {
            return Err(ENOMEM);
        }
        let exported = make(&NewDmaBuf(&this))?;
        // SAFETY: By the type invariant the dma-buf is valid, and nobody else knows it.
        unsafe { this.0.as_mut().priv_ = exported.into_foreign() };
        Ok(this)
    }

    /// The dma-buf behind `fd`. `EBADF` when there is no such fd, `EINVAL` when it is something
    /// else.
    pub(crate) fn get(fd: i32) -> Result<Self> {
        // SAFETY: Any number may be asked for.
        let dmabuf = from_err_ptr(unsafe { bindings::dma_buf_get(fd) })?;
        // INVARIANT: `dma_buf_get` returned a reference.
        NonNull::new(dmabuf).map(Self).ok_or(EBADF)
    }

    /// The object that it exports, if that is a `T`.
    pub(crate) fn exported<T: Exporter>(&self) -> Option<ArcBorrow<'_, T>> {
        // SAFETY: By the type invariant the dma-buf is valid.
        let operations = unsafe { self.0.as_ref().ops };
        if !core::ptr::eq(operations, &raw const T::operations().0) {
            return None;
        }
        // SAFETY: The dma-buf has the operations of `T`, and a reference to its file keeps it from
        // being released.
        Some(unsafe { Operations::<T>::borrow(self.0.as_ptr()) })
    }

    /// Runs `f` with the reservation lock held; `None` if it exports something else.
    pub(crate) fn with_resv<T: Exporter, R>(
        &self,
        f: impl FnOnce(&mut T::UnderResv) -> R,
    ) -> Option<R> {
        let exported = self.exported::<T>()?;
        // SAFETY: By the type invariant the dma-buf is valid.
        let resv = unsafe { self.0.as_ref().resv };
        // SAFETY: As above. Without an acquire context locking cannot fail.
        unsafe { bindings::dma_resv_lock(resv, core::ptr::null_mut()) };
        // SAFETY: The reservation lock is held.
        let result = f(unsafe { &mut *exported.live().under_resv.get() });
        // SAFETY: Locked above.
        unsafe { bindings::dma_resv_unlock(resv) };
        Some(result)
    }

    /// Makes it the file of `vma`, which gives up the one that it had.
    pub(crate) fn become_file_of(&self, vma: &NewVma<'_>) {
        // SAFETY: By the type invariant the dma-buf is valid.
        vma.set_file(unsafe { self.0.as_ref().file });
    }

    /// Installs it as a new fd of the current process. Another thread may have closed it again
    /// when this returns.
    pub(crate) fn into_fd(self, flags: u32) -> Result<i32> {
        // SAFETY: By the type invariant the dma-buf is valid. Its reference is consumed on success
        // only.
        let fd = unsafe { bindings::dma_buf_fd(self.0.as_ptr(), flags as c_int) };
        to_result(fd)?;
        core::mem::forget(self);
        Ok(fd)
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bindings::dma_buf_put(self.0.as_ptr()) };
    }
}

/// A dma-buf that exports nothing yet, and that nobody but its maker knows.
pub(crate) struct NewDmaBuf<'a>(&'a DmaBuf);

impl NewDmaBuf<'_> {
    /// The inode whose pages the mappings of the dma-buf are.
    pub(crate) fn inode(&self) -> MappedInode {
        // SAFETY: The dma-buf and its file are valid.
        let inode = unsafe { (*self.0.0.as_ref().file).f_inode };
        // SAFETY: The file holds a reference to the inode.
        unsafe { bindings::ihold(inode) };
        // INVARIANT: The reference was just taken.
        MappedInode(inode)
    }

    /// The way to the dma-buf, for the object that it is to export; its reservation lock will guard
    /// `under_resv`.
    pub(crate) fn live<U: Send>(&self, under_resv: U) -> impl PinInit<Live<U>> {
        let dmabuf = Unreleased(self.0.0);
        // INVARIANT: Nobody else knows of either.
        pin_init!(Live {
            dmabuf <- new_mutex!(Some(dmabuf), "barlease::live"),
            under_resv: UnsafeCell::new(under_resv),
        })
    }
}

/// The way from an exported object to its dma-buf, for as long as that exists.
///
/// A dma-buf cannot go away while its `Live` is locked: its release locks it first. It may have no
/// file any more (an `O_PATH` descriptor holds the inode only), so nothing here looks at the file.
///
/// # Invariants
///
/// `under_resv` is touched only with the reservation lock of the dma-buf held.
#[pin_data]
pub(crate) struct Live<U> {
    #[pin]
    dmabuf: Mutex<Option<Unreleased>>,
    under_resv: UnsafeCell<U>,
}

// SAFETY: By the type invariant a lock guards `under_resv`, which may be sent.
unsafe impl<U: Send> Sync for Live<U> {}

struct Unreleased(NonNull<bindings::dma_buf>);

// SAFETY: It is used only while the `Live` that it is in is locked, and by functions of the dma-buf
// core that take the dma-buf's own locks.
unsafe impl Send for Unreleased {}

impl<U: Send> Live<U> {
    /// Waits for the thread that has it locked.
    pub(crate) fn lock(&self) -> LiveGuard<'_> {
        LiveGuard(self.dmabuf.lock())
    }

    /// Locks it unless somebody else has.
    pub(crate) fn try_lock(&self) -> Option<LiveGuard<'_>> {
        self.dmabuf.try_lock().map(LiveGuard)
    }
}

/// A locked [`Live`].
pub(crate) struct LiveGuard<'a>(MutexGuard<'a, Option<Unreleased>>);

impl LiveGuard<'_> {
    /// The name of the dma-buf, filled up with NUL; empty when it is gone.
    pub(crate) fn name(&self) -> [u8; NAME_LEN] {
        let mut name = [0; NAME_LEN];
        if let Some(dmabuf) = &*self.0 {
            // SAFETY: The dma-buf is not released while this is locked; `name` has the size that a
            // dma-buf's name has at most.
            unsafe { bindings::bl_dma_buf_name(dmabuf.0.as_ptr(), name.as_mut_ptr().cast()) };
        }
        name
    }

    /// Tells every importer that its mappings are to go, if there are any; `is_mapped` is asked
    /// with the reservation lock held, when no mapping is being made.
    pub(crate) fn invalidate<P: Patience>(
        &self,
        patience: &mut P,
        is_mapped: impl FnOnce() -> bool,
    ) -> Result<(), P::Error> {
        let told = self.with_resv_locked(patience, |dmabuf| {
            // SAFETY: The dma-buf is not released while this is locked, and its reservation lock is
            // held.
            unsafe { tell_importers(dmabuf, is_mapped) };
        });
        told.map(|_| ())
    }

    /// Tells every importer as `invalidate`, and then says what `fences` says.
    pub(crate) fn invalidate_and_look<P: Patience>(
        &self,
        patience: &mut P,
        is_mapped: impl FnOnce() -> bool,
    ) -> Result<Result<Option<Fence>>, P::Error> {
        // SAFETY: The dma-buf is not released while this is locked, and its reservation lock is held.
        self.look_after(patience, |dmabuf| unsafe {
            tell_importers(dmabuf, is_mapped)
        })
    }

    /// One fence that stands for all that are there and have not signalled: what devices still do
    /// with the memory. The inner error is `ENOMEM`.
    pub(crate) fn fences<P: Patience>(
        &self,
        patience: &mut P,
    ) -> Result<Result<Option<Fence>>, P::Error> {
        self.look_after(patience, |_| {})
    }

    /// Does `first` and looks at the fences, with the reservation lock held.
    fn look_after<P: Patience>(
        &self,
        patience: &mut P,
        first: impl FnOnce(*mut bindings::dma_buf),
    ) -> Result<Result<Option<Fence>>, P::Error> {
        let fence = self.with_resv_locked(patience, |dmabuf| {
            first(dmabuf);
            let usage = bindings::dma_resv_usage_DMA_RESV_USAGE_BOOKKEEP;
            // SAFETY: The dma-buf is not released while this is locked.
            let resv = unsafe { (*dmabuf).resv };
            // SAFETY: As above.
            if unsafe { bindings::dma_resv_test_signaled(resv, usage) } {
                return Ok(None);
            }
            let mut fence = core::ptr::null_mut();
            // SAFETY: As above; `fence` is a place for the result. Nobody adds a fence meanwhile.
            to_result(unsafe { bindings::dma_resv_get_singleton(resv, usage, &mut fence) })?;
            // SAFETY: `dma_resv_get_singleton` returned null or a reference.
            Ok(unsafe { Fence::from_raw(fence) })
        })?;
        Ok(fence.unwrap_or(Ok(None)))
    }

    /// Its importers that have mappings, or all of them where none has; `None` while somebody has the
    /// reservation lock.
    pub(crate) fn importers(&self) -> Option<Importers> {
        let mapped = self.importers_that(Note::is_mapped)?;
        if mapped.count == 0 {
            return self.importers_that(|_| true);
        }
        Some(mapped)
    }

    fn importers_that(&self, wanted: impl Fn(Note) -> bool) -> Option<Importers> {
        let mut importers = Importers::default();
        let looked = self.with_resv_locked(&mut Pauses(0), |dmabuf| {
            // SAFETY: Computes an address inside of the dma-buf.
            let head = unsafe { &raw const (*dmabuf).attachments };
            // SAFETY: The reservation lock guards the list.
            let mut node = unsafe { (*head).next }.cast_const();
            while !core::ptr::eq(node, head) {
                // SAFETY: Every node but the head is that of an attachment.
                let attachment = unsafe { container_of!(node, bindings::dma_buf_attachment, node) };
                // SAFETY: The attachment is one of a dma-buf of ours, whose reservation lock is
                // held.
                if wanted(unsafe { Note::of(attachment) }) {
                    // SAFETY: The device of an attachment is valid.
                    let name = unsafe { bindings::dev_name((*attachment).dev) };
                    // SAFETY: The name is a C string.
                    importers.add(unsafe { CStr::from_char_ptr(name) });
                }
                // SAFETY: The reservation lock guards the list.
                node = unsafe { (*node).next }.cast_const();
            }
        });
        looked.is_ok().then_some(importers)
    }

    /// `None` when the dma-buf is gone.
    fn with_resv_locked<R, P: Patience>(
        &self,
        patience: &mut P,
        f: impl FnOnce(*mut bindings::dma_buf) -> R,
    ) -> Result<Option<R>, P::Error> {
        let Some(dmabuf) = self.0.as_ref() else {
            return Ok(None);
        };
        let dmabuf = dmabuf.0.as_ptr();
        // SAFETY: The dma-buf is not released while this is locked.
        let resv = unsafe { (*dmabuf).resv };
        // SAFETY: As above. Nothing here locks it twice.
        unsafe { patience.lock(resv) }?;
        let result = f(dmabuf);
        // SAFETY: Locked above.
        unsafe { bindings::dma_resv_unlock(resv) };
        Ok(Some(result))
    }
}

/// Tells every importer that its mappings are to go, if there are any.
///
/// # Safety
///
/// `dmabuf` must be valid and not released, and its reservation lock held.
unsafe fn tell_importers(dmabuf: *mut bindings::dma_buf, is_mapped: impl FnOnce() -> bool) {
    if is_mapped() {
        // SAFETY: By the caller.
        unsafe { bindings::dma_buf_invalidate_mappings(dmabuf) };
    }
}

/// The names of a few importers, each cut where it does not fit, and how many there are.
#[derive(Default)]
pub(crate) struct Importers {
    names: [[u8; 32]; 3],
    count: usize,
}

impl Importers {
    fn add(&mut self, name: &CStr) {
        if let Some(place) = self.names.get_mut(self.count) {
            for (place, byte) in place.iter_mut().zip(name.to_bytes()) {
                *place = *byte;
            }
        }
        self.count += 1;
    }
}

impl fmt::Display for Importers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, name) in self.names.iter().take(self.count).enumerate() {
            let name = name.split(|&byte| byte == 0).next().unwrap_or(&[]);
            let before = if number == 0 { "" } else { ", " };
            f.write_str(before)?;
            f.write_fmt(fmt!("{}", BStr::from_bytes(name)))?;
        }
        match self.count.saturating_sub(self.names.len()) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// A dma-buf of any exporter whose reservation lock is held.
pub(super) struct DmaBufRef<'a>(&'a bindings::dma_buf);

impl<'a> DmaBufRef<'a> {
    /// # Safety
    ///
    /// `dmabuf` must be valid and its reservation lock held for `'a`.
    pub(super) unsafe fn with_resv_held(dmabuf: *mut bindings::dma_buf) -> Self {
        // SAFETY: By the caller.
        Self(unsafe { &*dmabuf })
    }

    /// The data that the lock guards, if the dma-buf exports a `T`.
    pub(super) fn under_resv<T: Exporter>(&self) -> Option<&T::UnderResv> {
        if !core::ptr::eq(self.0.ops, &raw const T::operations().0) {
            return None;
        }
        // SAFETY: The dma-buf is valid and has the operations of `T`.
        let exported = unsafe { Operations::<T>::borrow((&raw const *self.0).cast_mut()) };
        let cell = exported.live().under_resv.get();
        // SAFETY: The reservation lock is held, and the dma-buf keeps the object alive.
        Some(unsafe { &*cell })
    }
}

/// An inode that is mapped into processes.
///
/// # Invariants
///
/// The pointer is valid and owns a reference.
pub(crate) struct MappedInode(*mut bindings::inode);

// SAFETY: The reference is counted with the inode's own lock: it may be given back on any thread.
unsafe impl Send for MappedInode {}
// SAFETY: Through a shared one the number is read, which does not change, and entries are taken out,
// for which the kernel takes the mapping's own lock.
unsafe impl Sync for MappedInode {}

impl MappedInode {
    /// Its number: of a dma-buf's inode one that no other has until the next boot.
    pub(crate) fn number(&self) -> u64 {
        // SAFETY: By the type invariant the inode is valid; its number does not change.
        let number = unsafe { (*self.0).i_ino };
        // CAST: An `unsigned long` on Linux 7.2, an `u64` on 7.3.
        #[allow(clippy::unnecessary_cast)]
        let number = number as u64;
        number
    }

    /// Takes every entry for this inode out of the page tables of all processes. Entries that are
    /// inserted at the same time may stay.
    pub(crate) fn zap(&self) {
        // SAFETY: By the type invariant the inode is valid.
        let mapping = unsafe { (*self.0).i_mapping };
        // SAFETY: The mapping of a valid inode is valid; 0 pages from the first on means all.
        unsafe { bindings::unmap_mapping_pages(mapping, 0, 0, true) };
    }
}

impl Drop for MappedInode {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bindings::iput(self.0) };
    }
}
