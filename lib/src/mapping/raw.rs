//! Volatile access to mapped device memory: the one place where the library dereferences it.
//!
//! Device memory is not memory: what is read need not be what was written, an access can have
//! effects, and its width matters. So it is reached through [`Cell`], which makes exactly one load
//! or store of its width for each call, and no reference or slice to it is ever made.

use std::marker::PhantomData;
use std::ptr::NonNull;

use crate::sys::memory::Area;

pub(super) mod sealed {
    /// Accesses that survive a SIGBUS: see [`super::super::fixup`].
    pub trait Sealed: Sized {
        /// One load. `None`: it raised SIGBUS.
        ///
        /// # Safety
        ///
        /// The place is aligned, and can be read or faults with SIGBUS. The SIGBUS handler is in
        /// place, or else the process dies of that.
        unsafe fn load_guarded(place: *const Self) -> Option<Self>;

        /// One store. False: it raised SIGBUS.
        ///
        /// # Safety
        ///
        /// As for `load_guarded`; that the place may be written is not needed, as a SIGSEGV is no
        /// undefined behaviour.
        unsafe fn store_guarded(place: *mut Self, value: Self) -> bool;
    }
}

/// A width in which device memory can be accessed: `u8`, `u16`, `u32`, `u64`.
///
/// Values are in the byte order of the CPU; PCI devices are little-endian, so on a big-endian CPU
/// use `to_le` and `from_le`.
#[diagnostic::on_unimplemented(
    message = "device memory is not accessed as a `{Self}`",
    label = "accesses are of `u8`, `u16`, `u32` or `u64`: a number needs its type, as in `5_u32`"
)]
pub trait Value: sealed::Sealed + Copy + Send + Sync + 'static {}

// Their accesses are in `fixup`.
impl Value for u8 {}
impl Value for u16 {}
impl Value for u32 {}
// One access of 8 bytes exists on 64-bit CPUs only.
#[cfg(target_pointer_width = "64")]
impl Value for u64 {}

/// A part of an [`Area`], borrowed for `'m`.
///
/// # Invariants
///
/// `[start, start + length)` lies in an area that is mapped, readable, and not unmapped during
/// `'m`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<'m> {
    start: NonNull<u8>,
    length: usize,
    _area: PhantomData<&'m Area>,
}

// SAFETY: a span is an address; the accesses that it leads to are volatile and of single
// locations, which the hardware allows from any CPU.
unsafe impl Send for Span<'_> {}
// SAFETY: as above.
unsafe impl Sync for Span<'_> {}

/// Why a [`Span`] has no such part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpanError {
    /// It goes past the end.
    OutOfBounds,
    /// The address is not a multiple of the width.
    Misaligned,
}

impl<'m> Span<'m> {
    /// The whole of an area.
    pub(crate) fn new(area: &'m Area) -> Self {
        // INVARIANT: an area is mapped while it is borrowed. (One that is abandoned belongs to a
        // scratch mapping, which has no spans.)
        Self {
            start: area.start(),
            length: area.length(),
            _area: PhantomData,
        }
    }

    /// First address.
    pub(crate) fn as_ptr(self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes.
    pub(crate) fn length(self) -> usize {
        self.length
    }

    /// `length` bytes from `offset` on.
    pub(crate) fn part(self, offset: usize, length: usize) -> Result<Self, SpanError> {
        let end = offset.checked_add(length).ok_or(SpanError::OutOfBounds)?;
        if end > self.length {
            return Err(SpanError::OutOfBounds);
        }
        // SAFETY: `offset <= self.length`, so the result is in the area or one past its end.
        let start = unsafe { self.start.add(offset) };
        // INVARIANT: a part of what we have, for the same time.
        Ok(Self {
            start,
            length,
            _area: PhantomData,
        })
    }

    /// The location at `offset`.
    pub(crate) fn cell<T: Value>(self, offset: usize) -> Result<Cell<'m, T>, SpanError> {
        let place = self.part(offset, size_of::<T>())?.start.cast::<T>();
        if !place.is_aligned() {
            return Err(SpanError::Misaligned);
        }
        // INVARIANT: bounds and alignment were checked just now.
        Ok(Cell {
            place,
            _area: PhantomData,
        })
    }
}

/// One location of device memory.
///
/// # Invariants
///
/// `place` is aligned and, for `'m`, in an area that is mapped and readable. The code that made the
/// cell available for [`Cell::store`] knows that the area is writable too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell<'m, T> {
    place: NonNull<T>,
    _area: PhantomData<&'m Area>,
}

// SAFETY: see `Span`.
unsafe impl<T: Value> Send for Cell<'_, T> {}
// SAFETY: see `Span`.
unsafe impl<T: Value> Sync for Cell<'_, T> {}

impl<T: Value> Cell<'_, T> {
    /// One load.
    ///
    /// Several threads may access one location, which for memory that Rust knows would be a data
    /// race. Mapped memory is in no Rust allocation, and the accesses of devices and other
    /// processes have no place in Rust's memory model anyway: as in every driver, a volatile
    /// access of a register's width is one access of the CPU, and the CPU's rules hold. Loads from
    /// write-combining memory may be made in any order.
    #[inline(always)]
    pub(crate) fn load(self) -> T {
        // An instruction that no hypervisor has to decode in its stranger forms: the compiler may
        // choose one with write-back for a volatile access.
        #[cfg(target_arch = "aarch64")]
        if let Some(value) = self.load_guarded() {
            return value;
        }
        // SAFETY: aligned and mapped by the invariant, every bit pattern is valid. Where the lease
        // was revoked this is a SIGBUS, which is not undefined.
        unsafe { self.place.as_ptr().read_volatile() }
    }

    /// One store. On a mapping that is not writable this is a SIGSEGV.
    #[inline(always)]
    pub(crate) fn store(self, value: T) {
        #[cfg(target_arch = "aarch64")]
        if self.store_guarded(value) {
            return;
        }
        // SAFETY: as for `load`.
        unsafe { self.place.as_ptr().write_volatile(value) }
    }

    /// One load. `None`: it was lost.
    #[inline(always)]
    pub(crate) fn load_guarded(self) -> Option<T> {
        // SAFETY: aligned and mapped by the invariant. Where the lease was revoked this is a
        // SIGBUS.
        unsafe { T::load_guarded(self.place.as_ptr()) }
    }

    /// One store. False: it was lost.
    #[inline(always)]
    #[must_use]
    pub(crate) fn store_guarded(self, value: T) -> bool {
        // SAFETY: as for `load_guarded`.
        unsafe { T::store_guarded(self.place.as_ptr(), value) }
    }
}
