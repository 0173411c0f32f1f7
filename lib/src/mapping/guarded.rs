//! Mappings whose loss is an error and not a signal.

use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::Window;
use super::block;
use super::length;
use super::options::Source;
use super::raw::Cell;
use super::raw::Span;
use super::raw::SpanError;
use super::raw::Value;
use super::refuse;
use super::sigbus;
use super::slots::Claim;
use super::slots::Recovery;
use super::slots::Slot;
use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::sys::memory::Area;
use crate::sys::memory::Request;

/// A mapping through which the loss of the lease is [`Error::Revoked`] and not SIGBUS.
///
/// The first guarded mapping of a process installs a SIGBUS handler. When an access faults because
/// the lease is revoked, the handler puts private memory in the place of the mapping, so that the
/// access can finish, and marks the mapping as lost; the access and all later ones answer
/// [`Error::Revoked`]. The address range stays reserved. [`GuardedMapping::recover`] maps the lease
/// again. A SIGBUS of anything else is passed to the handler that was there before, or ends the
/// process as it would have.
///
/// What an answer means:
///
/// - `Ok` of a write: it was made through a mapping of the lease, never to the private memory.
/// - `Err(Revoked)` of a write: it may or may not have reached the device.
/// - `Ok` of a read: the value came from the lease.
///
/// The cost of a guarded access is two loads and a comparison, and behind a store a full memory
/// fence; block copies pay once for a block.
///
/// All threads may share it. A program must not install a SIGBUS handler later that does not pass
/// on what is not its own.
///
/// # Examples
///
/// ```no_run
/// # fn example(lease: &barlease::Lease) -> barlease::Result<()> {
/// use barlease::Error;
///
/// let mapping = lease.map_guarded()?;
/// match mapping.write(0, 0x00ff_ffffu32) {
///     Ok(()) => {}
///     Err(Error::Revoked { .. }) => println!("the owner took it back"),
///     Err(error) => return Err(error),
/// }
/// # Ok(())
/// # }
/// ```
///
/// A register cannot outlive its mapping:
///
/// ```compile_fail
/// # fn example(lease: &barlease::Lease) -> barlease::Result<()> {
/// let mapping = lease.map_guarded()?;
/// let register = mapping.register::<u32>(0)?;
/// drop(mapping);
/// register.write(1)
/// # }
/// ```
#[derive(Debug)]
pub struct GuardedMapping {
    // Dropped in this order: the handler forgets the range before it is unmapped.
    claim: Claim,
    area: Area,
    again: OwnedFd,
    request: Request,
    offset: u64,
    object: Object,
    explain: fn(&'static str, Object, Errno) -> Error,
}

impl GuardedMapping {
    /// `again` is the file that `area` maps, as `request` says.
    pub(crate) fn new(
        area: Area,
        again: OwnedFd,
        request: Request,
        source: &Source<'_>,
    ) -> Result<Self> {
        sigbus::install()
            .map_err(|errno| Error::from_errno("map", source.object.clone(), errno))?;
        // The kernel maps whole pages, and a fault may be anywhere in them.
        let page = rustix::param::page_size();
        let claim = Claim::new(area.address(), area.length().next_multiple_of(page));
        Ok(Self {
            claim,
            area,
            again,
            request,
            offset: request.offset - source.file_offset,
            object: source.object.clone(),
            explain: source.explain,
        })
    }

    /// Length in bytes.
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
        self.request.writable
    }

    /// Address of the first byte. An access through it is guarded from SIGBUS, but does not tell
    /// whether it was lost: compare [`GuardedMapping::is_lost`] after it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.area.start().as_ptr()
    }

    /// Whether an access found the lease revoked, and [`GuardedMapping::recover`] has not mapped
    /// it again. Touches nothing: a lease can be revoked without any access having noticed yet.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        !self.claim.slot().is_live()
    }

    /// Maps the lease again, at the same address, after it was lost. Windows and registers go on
    /// working. Does nothing if the mapping is not lost.
    ///
    /// `Ok` says that the lease is mapped; if it is still revoked the next access is lost again.
    /// Not for signal handlers.
    ///
    /// Errors: [`Error::Dead`] if the lease is revoked for good; then the mapping stays lost.
    pub fn recover(&self) -> Result<()> {
        let slot = self.claim.slot();
        loop {
            match slot.begin_recovery() {
                Recovery::NotNeeded => return Ok(()),
                Recovery::Ours => break,
                Recovery::Wait => std::thread::yield_now(),
            }
        }
        let answer = self.area.replace(self.again.as_fd(), self.request);
        slot.end_recovery(answer.is_ok());
        answer.map_err(|errno| (self.explain)("recover", self.object.clone(), errno))
    }

    /// All of it, as a window.
    #[must_use]
    pub fn as_window(&self) -> GuardedWindow<'_> {
        GuardedWindow {
            plain: Window {
                span: Span::new(&self.area),
                offset: self.offset,
                writable: self.request.writable,
            },
            slot: self.claim.slot(),
        }
    }

    /// See [`GuardedWindow::window`].
    pub fn window(&self, range: Range<usize>) -> Result<GuardedWindow<'_>> {
        self.as_window().window(range)
    }

    /// See [`GuardedWindow::register`].
    pub fn register<T: Value>(&self, offset: usize) -> Result<GuardedRegister<'_, T>> {
        self.as_window().register(offset)
    }

    /// See [`GuardedWindow::read_only_register`].
    pub fn read_only_register<T: Value>(
        &self,
        offset: usize,
    ) -> Result<GuardedReadOnlyRegister<'_, T>> {
        self.as_window().read_only_register(offset)
    }

    /// See [`GuardedWindow::read`].
    pub fn read<T: Value>(&self, offset: usize) -> Result<T> {
        self.as_window().read(offset)
    }

    /// See [`GuardedWindow::write`].
    pub fn write<T: Value>(&self, offset: usize, value: T) -> Result<()> {
        self.as_window().write(offset, value)
    }

    /// See [`GuardedWindow::copy_from`].
    pub fn copy_from(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.as_window().copy_from(offset, source)
    }

    /// See [`GuardedWindow::copy_to`].
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        self.as_window().copy_to(offset, target)
    }

    /// See [`GuardedWindow::fill`].
    pub fn fill(&self, range: Range<usize>, value: u8) -> Result<()> {
        self.as_window().fill(range, value)
    }
}

/// A part of a [`GuardedMapping`], with offsets of its own.
#[derive(Clone, Copy, Debug)]
pub struct GuardedWindow<'m> {
    plain: Window<'m>,
    slot: &'m Slot,
}

impl<'m> GuardedWindow<'m> {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.plain.len()
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.plain.is_empty()
    }

    /// The bytes of `range`, as a window.
    ///
    /// Errors: [`Error::OutOfBounds`].
    pub fn window(&self, range: Range<usize>) -> Result<GuardedWindow<'m>> {
        Ok(Self {
            plain: self.plain.window(range)?,
            slot: self.slot,
        })
    }

    /// The register at `offset`. Bounds, alignment and permission are checked here; accesses check
    /// for loss only.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::ReadOnly`].
    pub fn register<T: Value>(&self, offset: usize) -> Result<GuardedRegister<'m, T>> {
        self.plain.check_writable()?;
        Ok(GuardedRegister(self.read_only_register(offset)?))
    }

    /// The register at `offset`, for reading only.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn read_only_register<T: Value>(
        &self,
        offset: usize,
    ) -> Result<GuardedReadOnlyRegister<'m, T>> {
        Ok(GuardedReadOnlyRegister {
            cell: self.plain.cell(offset)?,
            slot: self.slot,
            offset: self.plain.offset.saturating_add(offset as u64),
            _mapping: PhantomData,
        })
    }

    /// One load at `offset`.
    ///
    /// Errors: [`Error::Revoked`], [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn read<T: Value>(&self, offset: usize) -> Result<T> {
        self.read_only_register(offset)?.read()
    }

    /// One store at `offset`.
    ///
    /// Errors: [`Error::Revoked`], [`Error::OutOfBounds`], [`Error::Misaligned`],
    /// [`Error::ReadOnly`].
    pub fn write<T: Value>(&self, offset: usize, value: T) -> Result<()> {
        self.register(offset)?.write(value)
    }

    /// Copies `source` to `offset`, with the widest aligned stores.
    ///
    /// Errors: [`Error::Revoked`]: some or all of it may not have reached the device.
    /// [`Error::OutOfBounds`], [`Error::ReadOnly`]: nothing was written.
    pub fn copy_from(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.plain.check_writable()?;
        let part = self.plain.part(offset, source.len())?;
        let answer = self.slot.store(|| block::write(part, source));
        self.block("write", answer, offset, source.len())
    }

    /// Copies from `offset` to `target`, with the widest aligned loads.
    ///
    /// Errors: [`Error::Revoked`]: what is in `target` must not be used. [`Error::OutOfBounds`]:
    /// nothing was read.
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        let length = target.len();
        let part = self.plain.part(offset, length)?;
        let answer = self.slot.load(|| block::read(part, target));
        self.block("read", answer, offset, length)
    }

    /// Stores `value` in every byte of `range`, with the widest aligned stores.
    ///
    /// Errors: as for [`GuardedWindow::copy_from`].
    pub fn fill(&self, range: Range<usize>, value: u8) -> Result<()> {
        self.plain.check_writable()?;
        let length = length(&range, || self.plain.object())?;
        let part = self.plain.part(range.start, length)?;
        let answer = self.slot.store(|| block::fill(part, value));
        self.block("write", answer, range.start, length)
    }

    fn block(
        &self,
        operation: &'static str,
        answer: Option<Result<(), SpanError>>,
        offset: usize,
        length: usize,
    ) -> Result<()> {
        match answer {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(refuse(error, self.plain.object(), offset, length)),
            None => Err(revoked(
                operation,
                self.plain.offset.saturating_add(offset as u64),
                length,
            )),
        }
    }
}

/// A register of device memory. Each access is one load or store, and tells whether it was lost.
#[derive(Clone, Copy, Debug)]
pub struct GuardedRegister<'m, T>(GuardedReadOnlyRegister<'m, T>);

impl<T: Value> GuardedRegister<'_, T> {
    /// One load.
    ///
    /// Errors: [`Error::Revoked`].
    #[inline(always)]
    pub fn read(&self) -> Result<T> {
        self.0.read()
    }

    /// One store.
    ///
    /// Errors: [`Error::Revoked`]: it may or may not have reached the device.
    #[inline(always)]
    pub fn write(&self, value: T) -> Result<()> {
        match self.0.slot.store(|| self.0.cell.store(value)) {
            Some(()) => Ok(()),
            None => Err(revoked("write", self.0.offset, size_of::<T>())),
        }
    }
}

/// A register that can be read only.
#[derive(Clone, Copy, Debug)]
pub struct GuardedReadOnlyRegister<'m, T> {
    cell: Cell<'m, T>,
    slot: &'m Slot,
    /// Offset in the lease or BAR, for errors.
    offset: u64,
    _mapping: PhantomData<&'m GuardedMapping>,
}

impl<T: Value> GuardedReadOnlyRegister<'_, T> {
    /// One load.
    ///
    /// Errors: [`Error::Revoked`].
    #[inline(always)]
    pub fn read(&self) -> Result<T> {
        match self.slot.load(|| self.cell.load()) {
            Some(value) => Ok(value),
            None => Err(revoked("read", self.offset, size_of::<T>())),
        }
    }
}

#[cold]
fn revoked(operation: &'static str, offset: u64, length: usize) -> Error {
    Error::Revoked {
        operation,
        object: Object::Mapping {
            offset,
            length: length as u64,
        },
        source: None,
    }
}
