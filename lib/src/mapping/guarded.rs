//! Mappings whose loss is an error and not a signal.

use std::marker::PhantomData;
use std::ops::RangeBounds;

use rustix::io::Errno;

use super::Mapping;
use super::Window;
use super::block;
use super::block::Guarded;
use super::options::Source;
use super::raw::Cell;
use super::raw::Value;
use super::resolve;
use super::sigbus;
use crate::Error;
use crate::Lost;
use crate::Result;
use crate::error::Object;

/// A mapping through which the loss of the lease is [`Error::Revoked`] and not SIGBUS.
///
/// Each access is one instruction that is known to the process-wide SIGBUS handler, which the first
/// guarded mapping installs. When it faults because the lease is revoked the handler goes on behind
/// it, and the access answers that it was lost. Nothing else happens: there is nothing to recover,
/// and as soon as the lease is accessible again accesses are made again. A SIGBUS of anything else
/// is passed to the handler that was there before, or ends the process as it would have.
///
/// The answers mean:
///
/// - `Ok` of a write: it was made through a mapping of the lease.
/// - `Err` of a write: it was not made. (A block: what is before the offset in the error was.)
/// - `Ok` of a read: the value came from the lease.
///
/// The cost of a guarded access is three instructions that touch no memory. There is no fence among
/// them, so that stores to write-combining memory combine. Like bare accesses to a device, they are
/// ordered by the memory type of the mapping and by the CPU; loads from write-combining memory may
/// be made in any order.
///
/// All threads may share it.
///
/// # What the guard needs
///
/// - A thread that accesses the lease must not block SIGBUS: the kernel answers a fault whose
///   signal is blocked with the end of the process. Threads that block all signals (for
///   `signalfd` or `sigwait`, threads of virtual CPUs, signal handlers with a full `sa_mask`)
///   unblock this one.
/// - A SIGBUS handler that the program installs later passes on what is not its own.
///   [`MapOptions::map_guarded`](crate::MapOptions::map_guarded) puts the guard over a handler that
///   it finds, and passes on to that.
/// - A shared object that contains the crate is linked with `-z nodelete`, as the handler stays.
///
/// [`GuardedMapping::is_armed`] tells whether the first two hold.
///
/// The guard is for accesses through this type. An access through [`GuardedMapping::as_ptr`] raises
/// SIGBUS; see [`ScratchMapping`](crate::ScratchMapping) for code that must have an address.
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
/// register.write(1)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GuardedMapping {
    plain: Mapping,
}

/// Installs the handler, or puts it in place again.
pub(super) fn arm(source: &Source<'_>) -> Result<()> {
    if cfg!(not(any(target_arch = "x86_64", target_arch = "aarch64"))) {
        return Err(Error::unsupported(
            "map",
            source.object.clone(),
            "the guard exists on x86-64 and aarch64: use a plain mapping",
        ));
    }
    sigbus::arm().map_err(|errno| match errno {
        Errno::BUSY => Error::from_errno("install a SIGBUS handler", Object::Process, errno)
            .if_busy(
                "other handlers were installed over it too often: install them once, before \
                 the first guarded mapping",
            ),
        errno => Error::from_errno("install a SIGBUS handler", Object::Process, errno),
    })
}

impl GuardedMapping {
    /// The handler must be in place; see [`arm`].
    pub(super) fn new(plain: Mapping) -> Self {
        Self { plain }
    }

    extent!();

    /// Address of the first byte; see [`Mapping::as_ptr`]. An access through it is not guarded.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.plain.as_ptr()
    }

    /// Whether an access by this thread would be guarded now: the handler of this library, or
    /// another one over it that was put there by this library too, is in place, and the thread does
    /// not block SIGBUS.
    ///
    /// A foreign handler over it that passes on faithfully guards as well, but that cannot be
    /// seen: then the answer is false, until the next guarded mapping is made.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        sigbus::is_armed()
    }

    /// All of it, as a window.
    #[must_use]
    pub fn as_window(&self) -> GuardedWindow<'_> {
        GuardedWindow {
            plain: self.plain.as_window(),
        }
    }

    /// See [`GuardedWindow::window`].
    pub fn window(&self, range: impl RangeBounds<usize>) -> Result<GuardedWindow<'_>> {
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
    pub fn fill(&self, range: impl RangeBounds<usize>, value: u8) -> Result<()> {
        self.as_window().fill(range, value)
    }
}

/// A part of a [`GuardedMapping`], with offsets of its own.
#[derive(Clone, Copy, Debug)]
pub struct GuardedWindow<'m> {
    plain: Window<'m>,
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

    pub(crate) fn place(&self, offset: usize) -> u64 {
        self.plain.place(offset)
    }

    /// The bytes of `range`, as a window.
    ///
    /// Errors: [`Error::OutOfBounds`].
    pub fn window(&self, range: impl RangeBounds<usize>) -> Result<GuardedWindow<'m>> {
        Ok(Self {
            plain: self.plain.window(range)?,
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
            offset: self.plain.place(offset),
            _mapping: PhantomData,
        })
    }

    /// One load at `offset`.
    ///
    /// Errors: [`Error::Revoked`], [`Error::OutOfBounds`], [`Error::Misaligned`].
    #[inline]
    pub fn read<T: Value>(&self, offset: usize) -> Result<T> {
        Ok(self.read_only_register(offset)?.read()?)
    }

    /// One store at `offset`.
    ///
    /// Errors: [`Error::Revoked`], [`Error::OutOfBounds`], [`Error::Misaligned`],
    /// [`Error::ReadOnly`].
    #[inline]
    pub fn write<T: Value>(&self, offset: usize, value: T) -> Result<()> {
        Ok(self.register(offset)?.write(value)?)
    }

    /// Copies `source` to `offset`, with the widest aligned stores, until one is lost.
    ///
    /// Errors: [`Error::Revoked`], with the part that was not written, and how much was.
    /// [`Error::OutOfBounds`],
    /// [`Error::ReadOnly`]: nothing was written.
    pub fn copy_from(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.plain.check_writable()?;
        let part = self.plain.part(offset, source.len())?;
        block::write::<Guarded>(part, source)
            .map_err(|error| self.plain.block_error("write", error, offset, source.len()))
    }

    /// Copies from `offset` to `target`, with the widest aligned loads, until one is lost.
    ///
    /// Errors: [`Error::Revoked`], with the part that was not read. [`Error::OutOfBounds`]: nothing
    /// was read.
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        let length = target.len();
        let part = self.plain.part(offset, length)?;
        block::read::<Guarded>(part, target)
            .map_err(|error| self.plain.block_error("read", error, offset, length))
    }

    /// Stores `value` in every byte of `range`, with the widest aligned stores, until one is lost.
    ///
    /// Errors: as for [`GuardedWindow::copy_from`].
    pub fn fill(&self, range: impl RangeBounds<usize>, value: u8) -> Result<()> {
        self.plain.check_writable()?;
        let range = resolve(range, self.len(), || self.plain.object())?;
        let part = self.plain.part(range.start, range.len())?;
        block::fill::<Guarded>(part, value).map_err(|error| {
            self.plain
                .block_error("write", error, range.start, range.len())
        })
    }
}

/// A register of device memory. Each access is one load or store, and tells whether it was lost.
#[derive(Clone, Copy, Debug)]
pub struct GuardedRegister<'m, T>(GuardedReadOnlyRegister<'m, T>);

impl<T: Value> GuardedRegister<'_, T> {
    /// One load.
    ///
    /// Errors: [`Lost`]; `?` makes [`Error::Revoked`] of it.
    #[inline(always)]
    pub fn read(&self) -> Result<T, Lost> {
        self.0.read()
    }

    /// One store.
    ///
    /// Errors: [`Lost`]: it was not made.
    #[inline(always)]
    pub fn write(&self, value: T) -> Result<(), Lost> {
        if self.0.cell.store_guarded(value) {
            return Ok(());
        }
        Err(self.0.lost())
    }
}

/// A register that can be read only.
#[derive(Clone, Copy, Debug)]
pub struct GuardedReadOnlyRegister<'m, T> {
    cell: Cell<'m, T>,
    /// Offset in the lease or BAR, for errors.
    offset: u64,
    _mapping: PhantomData<&'m GuardedMapping>,
}

impl<T: Value> GuardedReadOnlyRegister<'_, T> {
    /// One load.
    ///
    /// Errors: [`Lost`]; `?` makes [`Error::Revoked`] of it.
    #[inline(always)]
    pub fn read(&self) -> Result<T, Lost> {
        match self.cell.load_guarded() {
            Some(value) => Ok(value),
            None => Err(self.lost()),
        }
    }

    #[cold]
    fn lost(&self) -> Lost {
        Lost::of::<T>(self.offset)
    }
}
