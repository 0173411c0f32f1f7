//! Mappings of leases and BARs, and access to device memory through them.

/// The methods that a mapping passes on to the plain one in it.
macro_rules! extent {
    () => {
        /// Length in bytes; see [`Mapping::len`](crate::Mapping::len).
        #[must_use]
        pub fn len(&self) -> usize {
            self.plain.len()
        }

        /// Never: there are no mappings of 0 bytes.
        #[must_use]
        pub fn is_empty(&self) -> bool {
            self.plain.is_empty()
        }

        /// Where the mapping begins in the lease or BAR, in bytes.
        #[must_use]
        pub fn offset(&self) -> u64 {
            self.plain.offset()
        }

        /// Whether it can be written.
        #[must_use]
        pub fn is_writable(&self) -> bool {
            self.plain.is_writable()
        }
    };
}

mod block;
mod guarded;
mod options;

#[allow(unsafe_code, reason = "accesses in assembly, and the table of them")]
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    path = "fixup_none.rs"
)]
mod fixup;

#[allow(unsafe_code, reason = "addresses that the SIGBUS handler uses")]
mod scratch;

#[allow(unsafe_code, reason = "as above")]
mod slots;
mod state;

/// The types that `state` is made of. Elsewhere it is made of others: see fuzz/tests/orders.rs.
mod atomic {
    pub(super) use std::sync::atomic::AtomicU32;
    pub(super) use std::sync::atomic::Ordering;
    pub(super) use std::sync::atomic::fence;
}

#[allow(
    unsafe_code,
    reason = "the one place where device memory is dereferenced"
)]
mod raw;

#[allow(unsafe_code, reason = "a signal handler")]
mod sigbus;

use std::marker::PhantomData;
use std::ops::Bound;
use std::ops::Range;
use std::ops::RangeBounds;

use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::sys::memory::Area;

pub use guarded::GuardedMapping;
pub use guarded::GuardedReadOnlyRegister;
pub use guarded::GuardedRegister;
pub use guarded::GuardedWindow;
pub use options::MapOptions;
pub(crate) use options::Source;
pub use raw::Value;
pub use scratch::ScratchMapping;

use block::BlockError;
use block::Plain;
use raw::Cell;
use raw::Span;
use raw::SpanError;

/// A mapping of a lease or of a BAR.
///
/// Accesses are bare loads and stores. If the lease is revoked, the next one raises SIGBUS and, as
/// nobody handles it, ends the process; use a [`GuardedMapping`] to get an error instead.
///
/// Offsets are in bytes from the start of the mapping. The mapping stays when the lease, the
/// device and their file descriptors are dropped.
///
/// # Examples
///
/// ```no_run
/// # fn example(lease: &barlease::Lease) -> barlease::Result<()> {
/// let mapping = lease.map()?;
/// let doorbell = mapping.register::<u32>(0x1000)?;
/// doorbell.write(1);
/// while doorbell.read() != 0 {}
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Mapping {
    area: Area,
    offset: u64,
    writable: bool,
}

impl Mapping {
    pub(crate) fn new(area: Area, offset: u64, writable: bool) -> Self {
        Self {
            area,
            offset,
            writable,
        }
    }

    /// Length in bytes: that of the range that was mapped. It is a multiple of the page size unless
    /// all of something smaller was mapped, such as a BAR of 256 bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.area.length()
    }

    /// Never: there are no mappings of 0 bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the mapping begins in the lease or BAR, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether it can be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Address of the first byte.
    ///
    /// For interfaces that take an address. A caller that dereferences it must keep the mapping
    /// alive, must use volatile accesses and must make no reference.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.area.start().as_ptr()
    }

    /// All of it, as a window.
    #[must_use]
    pub fn as_window(&self) -> Window<'_> {
        Window {
            span: Span::new(&self.area),
            offset: self.offset,
            writable: self.writable,
        }
    }

    /// See [`Window::window`].
    pub fn window(&self, range: impl RangeBounds<usize>) -> Result<Window<'_>> {
        self.as_window().window(range)
    }

    /// See [`Window::register`].
    pub fn register<T: Value>(&self, offset: usize) -> Result<Register<'_, T>> {
        self.as_window().register(offset)
    }

    /// See [`Window::read_only_register`].
    pub fn read_only_register<T: Value>(&self, offset: usize) -> Result<ReadOnlyRegister<'_, T>> {
        self.as_window().read_only_register(offset)
    }

    /// See [`Window::read`].
    pub fn read<T: Value>(&self, offset: usize) -> Result<T> {
        self.as_window().read(offset)
    }

    /// See [`Window::write`].
    pub fn write<T: Value>(&self, offset: usize, value: T) -> Result<()> {
        self.as_window().write(offset, value)
    }

    /// See [`Window::copy_from`].
    pub fn copy_from(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.as_window().copy_from(offset, source)
    }

    /// See [`Window::copy_to`].
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        self.as_window().copy_to(offset, target)
    }

    /// See [`Window::fill`].
    pub fn fill(&self, range: impl RangeBounds<usize>, value: u8) -> Result<()> {
        self.as_window().fill(range, value)
    }
}

/// A part of a [`Mapping`], with offsets of its own.
#[derive(Clone, Copy, Debug)]
pub struct Window<'m> {
    span: Span<'m>,
    /// Offset of the window in the lease or BAR.
    offset: u64,
    writable: bool,
}

impl<'m> Window<'m> {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.span.length()
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of the first byte; see [`Mapping::as_ptr`].
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.span.as_ptr()
    }

    pub(crate) fn object(&self) -> Object {
        object(self.offset, self.span)
    }

    /// Where in the lease or BAR an offset is.
    pub(crate) fn place(&self, offset: usize) -> u64 {
        self.offset.saturating_add(offset as u64)
    }

    fn part(&self, offset: usize, length: usize) -> Result<Span<'m>> {
        self.span
            .part(offset, length)
            .map_err(|error| refuse(error, self.object(), offset, length))
    }

    fn cell<T: Value>(&self, offset: usize) -> Result<Cell<'m, T>> {
        self.span
            .cell(offset)
            .map_err(|error| refuse(error, self.object(), offset, size_of::<T>()))
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::ReadOnly {
            operation: "write",
            object: self.object(),
        })
    }

    #[cold]
    fn block_error(
        &self,
        operation: &'static str,
        error: BlockError,
        offset: usize,
        length: usize,
    ) -> Error {
        match error {
            BlockError::Span(error) => refuse(error, self.object(), offset, length),
            BlockError::Lost(unit) => Error::Revoked {
                operation,
                object: Object::Mapping {
                    offset: self.place(offset).saturating_add(unit as u64),
                    length: (length - unit.min(length)) as u64,
                },
                done: unit as u64,
                source: None,
            },
        }
    }

    /// The bytes of `range`, as a window.
    ///
    /// Errors: [`Error::OutOfBounds`].
    pub fn window(&self, range: impl RangeBounds<usize>) -> Result<Window<'m>> {
        let range = resolve(range, self.len(), || self.object())?;
        Ok(Self {
            span: self.part(range.start, range.len())?,
            offset: self.place(range.start),
            writable: self.writable,
        })
    }

    /// The register at `offset`. Bounds, alignment and permission are checked here, so that
    /// accesses check nothing.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::ReadOnly`].
    pub fn register<T: Value>(&self, offset: usize) -> Result<Register<'m, T>> {
        self.check_writable()?;
        Ok(Register {
            cell: self.cell(offset)?,
            _mapping: PhantomData,
        })
    }

    /// The register at `offset`, for reading only.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn read_only_register<T: Value>(&self, offset: usize) -> Result<ReadOnlyRegister<'m, T>> {
        Ok(ReadOnlyRegister {
            cell: self.cell(offset)?,
            _mapping: PhantomData,
        })
    }

    /// One load at `offset`.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn read<T: Value>(&self, offset: usize) -> Result<T> {
        Ok(self.cell(offset)?.load())
    }

    /// One store at `offset`.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::ReadOnly`].
    pub fn write<T: Value>(&self, offset: usize, value: T) -> Result<()> {
        self.check_writable()?;
        self.cell(offset)?.store(value);
        Ok(())
    }

    /// Copies `source` to `offset`, with the widest aligned stores.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::ReadOnly`]; then nothing was written.
    pub fn copy_from(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.check_writable()?;
        let part = self.part(offset, source.len())?;
        block::write::<Plain>(part, source)
            .map_err(|error| self.block_error("write", error, offset, source.len()))
    }

    /// Copies from `offset` to `target`, with the widest aligned loads.
    ///
    /// Errors: [`Error::OutOfBounds`]; then nothing was read.
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        let length = target.len();
        let part = self.part(offset, length)?;
        block::read::<Plain>(part, target)
            .map_err(|error| self.block_error("read", error, offset, length))
    }

    /// Stores `value` in every byte of `range`, with the widest aligned stores.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::ReadOnly`]; then nothing was written.
    pub fn fill(&self, range: impl RangeBounds<usize>, value: u8) -> Result<()> {
        self.check_writable()?;
        let range = resolve(range, self.len(), || self.object())?;
        let part = self.part(range.start, range.len())?;
        block::fill::<Plain>(part, value)
            .map_err(|error| self.block_error("write", error, range.start, range.len()))
    }
}

/// A register of device memory. Accesses are one load or store each and check nothing.
#[derive(Clone, Copy, Debug)]
pub struct Register<'m, T> {
    cell: Cell<'m, T>,
    _mapping: PhantomData<&'m Mapping>,
}

impl<T: Value> Register<'_, T> {
    /// One load.
    #[inline(always)]
    #[must_use = "to read for the effect of it, say `let _ =`"]
    pub fn read(&self) -> T {
        self.cell.load()
    }

    /// One store.
    #[inline(always)]
    pub fn write(&self, value: T) {
        self.cell.store(value);
    }
}

/// A register that can be read only.
#[derive(Clone, Copy, Debug)]
pub struct ReadOnlyRegister<'m, T> {
    cell: Cell<'m, T>,
    _mapping: PhantomData<&'m Mapping>,
}

impl<T: Value> ReadOnlyRegister<'_, T> {
    /// One load.
    #[inline(always)]
    #[must_use = "to read for the effect of it, say `let _ =`"]
    pub fn read(&self) -> T {
        self.cell.load()
    }
}

fn object(offset: u64, span: Span<'_>) -> Object {
    Object::Mapping {
        offset,
        length: span.length() as u64,
    }
}

/// The range of something of `length` bytes. Whether it is within is for others to check.
fn resolve(
    range: impl RangeBounds<usize>,
    length: usize,
    object: impl FnOnce() -> Object,
) -> Result<Range<usize>> {
    let start = match range.start_bound() {
        Bound::Included(start) => Some(*start),
        Bound::Excluded(before) => before.checked_add(1),
        Bound::Unbounded => Some(0),
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.checked_add(1),
        Bound::Excluded(end) => Some(*end),
        Bound::Unbounded => Some(length),
    };
    match (start, end) {
        (Some(start), Some(end)) if start <= end => Ok(start..end),
        _ => Err(Error::invalid(
            "access",
            object(),
            format!(
                "the range from {:?} to {:?} is backwards",
                range.start_bound(),
                range.end_bound()
            ),
        )),
    }
}

#[cold]
fn refuse(error: SpanError, object: Object, offset: usize, length: usize) -> Error {
    match error {
        SpanError::OutOfBounds => Error::OutOfBounds {
            object,
            offset: offset as u64,
            length: length as u64,
        },
        SpanError::Misaligned => Error::Misaligned {
            object,
            offset: offset as u64,
            align: length as u64,
        },
    }
}
