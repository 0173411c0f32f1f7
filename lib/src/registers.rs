//! Registers with a type, on top of [`Register`](crate::Register).

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;

use crate::Error;
use crate::GuardedMapping;
use crate::GuardedRegister;
use crate::GuardedWindow;
use crate::Lost;
use crate::Mapping;
use crate::ReadOnlyRegister;
use crate::Register;
use crate::Result;
use crate::Value;
use crate::Window;
use crate::error::Object;

/// The content of a register: a number, or a type of yours that is made of one.
///
/// The bits are those of the device, which is little-endian as PCI has it; values are in the byte
/// order of the CPU.
///
/// # Examples
///
/// ```
/// use barlease::RegisterValue;
///
/// /// Controller configuration of an NVMe device.
/// #[derive(Clone, Copy, PartialEq)]
/// struct Configuration(u32);
///
/// impl Configuration {
///     const ENABLE: u32 = 1;
///
///     fn with_enable(self, on: bool) -> Self {
///         Self(self.0 & !Self::ENABLE | u32::from(on))
///     }
/// }
///
/// impl RegisterValue for Configuration {
///     type Raw = u32;
///
///     fn from_raw(raw: u32) -> Self {
///         Self(raw)
///     }
///
///     fn into_raw(self) -> u32 {
///         self.0
///     }
/// }
/// # let path = std::env::temp_dir().join(format!("barlease-registers-{}", std::process::id()));
/// # let file = std::fs::File::options().read(true).write(true).create(true).open(&path).unwrap();
/// # std::fs::remove_file(&path).unwrap();
/// # file.set_len(4096).unwrap();
/// # let mapping = barlease::Lease::from_fd(file)?.map()?;
///
/// let configuration = mapping.typed::<Configuration>(0x14)?;
/// configuration.modify(|value| value.with_enable(true));
/// assert!(configuration.read() == Configuration(1));
/// # Ok::<(), barlease::Error>(())
/// ```
pub trait RegisterValue: Copy {
    /// How wide it is.
    type Raw: Bits;

    /// From what was read.
    fn from_raw(raw: Self::Raw) -> Self;

    /// To what is written.
    fn into_raw(self) -> Self::Raw;
}

/// A [`Value`] whose bits can be taken apart: each of them.
pub trait Bits:
    Value + PartialEq + fmt::LowerHex + std::ops::BitAnd<Output = Self> + sealed::Little
{
}

mod sealed {
    /// Between the byte orders of the device and of the CPU: either way it is the same.
    pub trait Little {
        fn little(self) -> Self;
    }
}

macro_rules! bits {
    ($($type:ty),+) => {$(
        impl sealed::Little for $type {
            #[inline(always)]
            fn little(self) -> Self {
                self.to_le()
            }
        }

        impl Bits for $type {}

        impl RegisterValue for $type {
            type Raw = Self;

            #[inline(always)]
            fn from_raw(raw: Self) -> Self {
                raw
            }

            #[inline(always)]
            fn into_raw(self) -> Self {
                self
            }
        }
    )+};
}

bits!(u8, u16, u32);
#[cfg(target_pointer_width = "64")]
bits!(u64);

#[inline(always)]
fn decode<T: RegisterValue>(raw: T::Raw) -> T {
    T::from_raw(sealed::Little::little(raw))
}

#[inline(always)]
fn encode<T: RegisterValue>(value: T) -> T::Raw {
    sealed::Little::little(value.into_raw())
}

/// A register that is read and written as a `T`. One load or store each, nothing is checked.
#[derive(Clone, Copy, Debug)]
pub struct TypedRegister<'m, T: RegisterValue> {
    register: Register<'m, T::Raw>,
    /// Where it is in the lease or BAR, for errors.
    place: u64,
    _value: PhantomData<T>,
}

impl<T: RegisterValue> TypedRegister<'_, T> {
    /// One load.
    #[inline(always)]
    #[must_use = "to read for the effect of it, say `let _ =`"]
    pub fn read(&self) -> T {
        decode(self.register.read())
    }

    /// One store.
    #[inline(always)]
    pub fn write(&self, value: T) {
        self.register.write(encode(value));
    }

    /// One load, and one store of what `change` makes of it. Nothing keeps another thread, or the
    /// device, from changing the register in between.
    #[inline(always)]
    pub fn modify(&self, change: impl FnOnce(T) -> T) {
        self.write(change(self.read()));
    }

    /// Reads until the bits of `mask` are those of `value`, and answers what was read; see
    /// [`TypedRegister::poll`].
    ///
    /// Errors: [`Error::Io`], and [`Error::is_timed_out`] says so.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(registers: &barlease::Mapping) -> barlease::Result<()> {
    /// use std::time::Duration;
    ///
    /// // NVMe: until the controller is ready.
    /// let status = registers.typed::<u32>(0x1c)?;
    /// status.poll_until(1, 1, Duration::from_secs(5))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn poll_until(&self, mask: T::Raw, value: T::Raw, timeout: Duration) -> Result<T> {
        self.poll(timeout, |read| read.into_raw() & mask == value)
    }

    /// Reads until `done` says so of what was read, and answers that. Spins for some microseconds,
    /// and sleeps between reads then, up to a millisecond. Looks once more after the time is up.
    ///
    /// Errors: [`Error::Io`], and [`Error::is_timed_out`] says so.
    pub fn poll(&self, timeout: Duration, done: impl FnMut(T) -> bool) -> Result<T> {
        poll::<T::Raw, _>(self.place, timeout, || self.read(), done)
    }
}

/// A register of a [`GuardedMapping`] that is read and written as a `T`: each access answers
/// [`Lost`] instead of raising SIGBUS.
#[derive(Clone, Copy, Debug)]
pub struct GuardedTypedRegister<'m, T: RegisterValue> {
    register: GuardedRegister<'m, T::Raw>,
    /// As above.
    place: u64,
    _value: PhantomData<T>,
}

impl<T: RegisterValue> GuardedTypedRegister<'_, T> {
    /// One load.
    ///
    /// Errors: [`Lost`].
    #[inline(always)]
    pub fn read(&self) -> Result<T, Lost> {
        self.register.read().map(decode)
    }

    /// One store.
    ///
    /// Errors: [`Lost`].
    #[inline(always)]
    pub fn write(&self, value: T) -> Result<(), Lost> {
        self.register.write(encode(value))
    }

    /// See [`TypedRegister::modify`].
    ///
    /// Errors: [`Lost`].
    #[inline(always)]
    pub fn modify(&self, change: impl FnOnce(T) -> T) -> Result<(), Lost> {
        self.write(change(self.read()?))
    }

    /// See [`TypedRegister::poll_until`].
    ///
    /// Errors: [`Error::Revoked`]; [`Error::Io`], and [`Error::is_timed_out`] says so.
    pub fn poll_until(&self, mask: T::Raw, value: T::Raw, timeout: Duration) -> Result<T> {
        self.poll(timeout, |read| read.into_raw() & mask == value)
    }

    /// See [`TypedRegister::poll`]. A loss ends it.
    ///
    /// Errors: [`Error::Revoked`]; [`Error::Io`], and [`Error::is_timed_out`] says so.
    pub fn poll(&self, timeout: Duration, mut done: impl FnMut(T) -> bool) -> Result<T> {
        let done = |read: Result<T, Lost>| read.map_or(true, &mut done);
        Ok(poll::<T::Raw, _>(
            self.place,
            timeout,
            || self.read(),
            done,
        )??)
    }
}

impl<'m> GuardedWindow<'m> {
    /// The register at `offset`, as a `T`: see [`RegisterValue`].
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::ReadOnly`].
    pub fn typed<T: RegisterValue>(&self, offset: usize) -> Result<GuardedTypedRegister<'m, T>> {
        Ok(GuardedTypedRegister {
            register: self.register(offset)?,
            place: self.place(offset),
            _value: PhantomData,
        })
    }
}

impl GuardedMapping {
    /// See [`GuardedWindow::typed`].
    pub fn typed<T: RegisterValue>(&self, offset: usize) -> Result<GuardedTypedRegister<'_, T>> {
        self.as_window().typed(offset)
    }
}

/// A register that is read as a `T` and never written.
#[derive(Clone, Copy, Debug)]
pub struct TypedReadOnlyRegister<'m, T: RegisterValue> {
    register: ReadOnlyRegister<'m, T::Raw>,
    /// As above.
    place: u64,
    _value: PhantomData<T>,
}

impl<T: RegisterValue> TypedReadOnlyRegister<'_, T> {
    /// One load.
    #[inline(always)]
    #[must_use = "to read for the effect of it, say `let _ =`"]
    pub fn read(&self) -> T {
        decode(self.register.read())
    }

    /// See [`TypedRegister::poll_until`].
    ///
    /// Errors: [`Error::Io`], and [`Error::is_timed_out`] says so.
    pub fn poll_until(&self, mask: T::Raw, value: T::Raw, timeout: Duration) -> Result<T> {
        self.poll(timeout, |read| read.into_raw() & mask == value)
    }

    /// See [`TypedRegister::poll`].
    ///
    /// Errors: [`Error::Io`], and [`Error::is_timed_out`] says so.
    pub fn poll(&self, timeout: Duration, done: impl FnMut(T) -> bool) -> Result<T> {
        poll::<T::Raw, _>(self.place, timeout, || self.read(), done)
    }
}

/// A register that is written as a `T` and never read, as a doorbell or one whose set bits are
/// cleared by writing them.
#[derive(Clone, Copy, Debug)]
pub struct WriteOnlyRegister<'m, T: RegisterValue> {
    register: Register<'m, T::Raw>,
    _value: PhantomData<T>,
}

impl<T: RegisterValue> WriteOnlyRegister<'_, T> {
    /// One store.
    #[inline(always)]
    pub fn write(&self, value: T) {
        self.register.write(encode(value));
    }
}

/// Registers of one kind, the same distance from each other, as doorbells or vectors of a table.
#[derive(Clone, Copy, Debug)]
pub struct RegisterArray<'m, T: RegisterValue> {
    window: Window<'m>,
    stride: usize,
    count: usize,
    _value: PhantomData<T>,
}

impl<'m, T: RegisterValue> RegisterArray<'m, T> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn offset(&self, index: usize) -> Result<usize> {
        // Within the window, which was checked when the array was made.
        if index < self.count {
            return Ok(index * self.stride);
        }
        Err(Error::OutOfBounds {
            object: self.window.object(),
            offset: (index as u64).saturating_mul(self.stride as u64),
            length: size_of::<T::Raw>() as u64,
        })
    }

    /// That with this number.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::ReadOnly`].
    pub fn get(&self, index: usize) -> Result<TypedRegister<'m, T>> {
        self.window.typed(self.offset(index)?)
    }

    /// That with this number, for reading only.
    ///
    /// Errors: [`Error::OutOfBounds`].
    pub fn get_read_only(&self, index: usize) -> Result<TypedReadOnlyRegister<'m, T>> {
        self.window.typed_read_only(self.offset(index)?)
    }

    /// That with this number, for writing only.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::ReadOnly`].
    pub fn get_write_only(&self, index: usize) -> Result<WriteOnlyRegister<'m, T>> {
        self.window.write_only(self.offset(index)?)
    }
}

impl<'m> Window<'m> {
    /// The register at `offset`, as a `T`: see [`RegisterValue`].
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::ReadOnly`].
    pub fn typed<T: RegisterValue>(&self, offset: usize) -> Result<TypedRegister<'m, T>> {
        Ok(TypedRegister {
            register: self.register(offset)?,
            place: self.place(offset),
            _value: PhantomData,
        })
    }

    /// The register at `offset`, as a `T` and for reading only.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn typed_read_only<T: RegisterValue>(
        &self,
        offset: usize,
    ) -> Result<TypedReadOnlyRegister<'m, T>> {
        Ok(TypedReadOnlyRegister {
            register: self.read_only_register(offset)?,
            place: self.place(offset),
            _value: PhantomData,
        })
    }

    /// The register at `offset`, as a `T` and for writing only.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::ReadOnly`].
    pub fn write_only<T: RegisterValue>(&self, offset: usize) -> Result<WriteOnlyRegister<'m, T>> {
        Ok(WriteOnlyRegister {
            register: self.register(offset)?,
            _value: PhantomData,
        })
    }

    /// `count` registers from `offset` on, each `stride` bytes after the one before.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`] (offset or stride).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(registers: &barlease::Mapping) -> barlease::Result<()> {
    /// // NVMe: the tail doorbells of 8 submission queues, for a stride of 4 bytes.
    /// let tails = registers.array::<u32>(0x1000, 8, 2 * 4)?;
    /// tails.get_write_only(1)?.write(5);
    /// # Ok(())
    /// # }
    /// ```
    pub fn array<T: RegisterValue>(
        &self,
        offset: usize,
        count: usize,
        stride: usize,
    ) -> Result<RegisterArray<'m, T>> {
        let width = size_of::<T::Raw>();
        let length = match count.checked_sub(1) {
            None => Some(0),
            Some(steps) => steps
                .checked_mul(stride)
                .and_then(|last| last.checked_add(width)),
        };
        let end = length.and_then(|length| offset.checked_add(length));
        // An offset that overflows is out of bounds as well.
        let window = self.window(offset..end.unwrap_or(usize::MAX))?;
        if count > 0 {
            // Bounds and alignment of the first one are those of all, if the stride is aligned.
            window.read_only_register::<T::Raw>(0)?;
        }
        if stride % width != 0 {
            return Err(Error::Misaligned {
                object: window.object(),
                offset: stride as u64,
                align: width as u64,
            });
        }
        Ok(RegisterArray {
            window,
            stride,
            count,
            _value: PhantomData,
        })
    }
}

impl Mapping {
    /// See [`Window::typed`].
    pub fn typed<T: RegisterValue>(&self, offset: usize) -> Result<TypedRegister<'_, T>> {
        self.as_window().typed(offset)
    }

    /// See [`Window::typed_read_only`].
    pub fn typed_read_only<T: RegisterValue>(
        &self,
        offset: usize,
    ) -> Result<TypedReadOnlyRegister<'_, T>> {
        self.as_window().typed_read_only(offset)
    }

    /// See [`Window::write_only`].
    pub fn write_only<T: RegisterValue>(&self, offset: usize) -> Result<WriteOnlyRegister<'_, T>> {
        self.as_window().write_only(offset)
    }

    /// See [`Window::array`].
    pub fn array<T: RegisterValue>(
        &self,
        offset: usize,
        count: usize,
        stride: usize,
    ) -> Result<RegisterArray<'_, T>> {
        self.as_window().array(offset, count, stride)
    }

    /// A structure of registers at `offset`, in the manner of the crate `safe-mmio`: fields are
    /// `ReadPure`, `WriteOnly` and so on. While it is there, nothing else of this mapping is.
    ///
    /// Errors: [`Error::OutOfBounds`], [`Error::Misaligned`], [`Error::ReadOnly`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(mapping: &mut barlease::Mapping) -> barlease::Result<()> {
    /// use safe_mmio::fields::{ReadPure, ReadPureWrite};
    /// use safe_mmio::field;
    /// use zerocopy::FromBytes;
    ///
    /// #[derive(FromBytes)]
    /// #[repr(C)]
    /// struct Registers {
    ///     identification: ReadPure<u32>,
    ///     liveness: ReadPureWrite<u32>,
    /// }
    ///
    /// let mut registers = mapping.mmio::<Registers>(0)?;
    /// field!(registers, liveness).write(5);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "safe-mmio")]
    #[allow(unsafe_code, reason = "the pointer is proved unique by the borrow")]
    pub fn mmio<T: zerocopy::FromBytes>(
        &mut self,
        offset: usize,
    ) -> Result<safe_mmio::UniqueMmioPointer<'_, T>> {
        if !self.is_writable() {
            return Err(Error::ReadOnly {
                operation: "write",
                object: Object::Mapping {
                    offset: self.offset(),
                    length: self.len() as u64,
                },
            });
        }
        let end = offset.saturating_add(size_of::<T>());
        let place = self.window(offset..end)?.as_ptr().cast::<T>();
        match std::ptr::NonNull::new(place) {
            Some(place) if place.is_aligned() => {
                // SAFETY: mapped, for reading and writing, as long as the mapping is borrowed; in
                // bounds and aligned; every bit pattern is a valid value; and the mapping, borrowed
                // mutably, gives nobody else an access meanwhile. (What other mappings of the same
                // device do is the device's affair: accesses are volatile.)
                Ok(unsafe { safe_mmio::UniqueMmioPointer::new(place) })
            }
            _ => Err(Error::Misaligned {
                object: Object::Mapping {
                    offset: self.offset(),
                    length: self.len() as u64,
                },
                offset: offset as u64,
                align: align_of::<T>() as u64,
            }),
        }
    }
}

/// Reads until it is done.
fn poll<Raw, T: Copy>(
    offset: u64,
    timeout: Duration,
    read: impl Fn() -> T,
    mut done: impl FnMut(T) -> bool,
) -> Result<T> {
    const SPINS: u64 = 64;
    let deadline = Instant::now().checked_add(timeout);
    let mut pause = Duration::from_micros(4);
    for turn in 0u64.. {
        // Before the look, so that a thread that was not run for long looks all the same.
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let value = read();
        if done(value) {
            return Ok(value);
        }
        if late {
            break;
        }
        if turn < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }
    let object = Object::Mapping {
        offset,
        length: size_of::<Raw>() as u64,
    };
    Err(Error::from_errno("poll", object, Errno::TIMEDOUT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lease;

    fn mapping() -> Mapping {
        let fd = rustix::fs::memfd_create("registers", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        Lease::from_fd(fd).unwrap().map().unwrap()
    }

    #[test]
    fn values_are_little_endian() {
        let mapping = mapping();
        mapping.typed::<u32>(0).unwrap().write(0x0102_0304);
        assert_eq!(mapping.read::<u8>(0).unwrap(), 4);
        let register = mapping.typed::<u16>(0).unwrap();
        assert_eq!(register.read(), 0x0304);
        register.modify(|value| value | 0x8000);
        assert_eq!(mapping.typed_read_only::<u16>(0).unwrap().read(), 0x8304);
    }

    #[test]
    fn an_array_has_a_stride_and_an_end() {
        let mapping = mapping();
        let array = mapping.array::<u32>(0x100, 4, 16).unwrap();
        assert_eq!(array.len(), 4);
        array.get_write_only(3).unwrap().write(9);
        assert_eq!(mapping.read::<u32>(0x130).unwrap(), 9);
        assert_eq!(array.get_read_only(3).unwrap().read(), 9);
        assert!(matches!(array.get(4), Err(Error::OutOfBounds { .. })));
        assert!(matches!(
            array.get(usize::MAX),
            Err(Error::OutOfBounds { .. })
        ));
        for (offset, count, stride) in [
            (0x100, 1 << 20, 16),
            (4096, 1, 4),
            (0, usize::MAX, usize::MAX),
            (usize::MAX, 2, 4),
        ] {
            let array = mapping.array::<u32>(offset, count, stride);
            assert!(matches!(array, Err(Error::OutOfBounds { .. })), "{array:?}");
        }
        for (offset, stride) in [(2, 4), (0, 6)] {
            let array = mapping.array::<u32>(offset, 2, stride);
            assert!(matches!(array, Err(Error::Misaligned { .. })), "{array:?}");
        }
        // The last one ends with the mapping.
        assert!(mapping.array::<u64>(0, 512, 8).is_ok());
        assert!(mapping.array::<u64>(0, 0, 8).unwrap().is_empty());
    }

    #[test]
    fn polling_ends_with_the_value_or_with_the_time() {
        let mapping = mapping();
        let register = mapping.typed::<u32>(8).unwrap();
        let error = register
            .poll_until(1, 1, Duration::from_millis(1))
            .unwrap_err();
        assert_eq!(error.errno(), Some(Errno::TIMEDOUT.raw_os_error()));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(2));
                register.write(0x81);
            });
            let read = register.poll_until(0x80, 0x80, Duration::from_secs(60));
            assert_eq!(read.unwrap(), 0x81);
        });
        // Done already: no time is needed.
        assert!(register.poll(Duration::ZERO, |value| value == 0x81).is_ok());
    }

    #[test]
    fn a_guarded_register_answers_its_loss() {
        let fd = rustix::fs::memfd_create("registers", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let lease = Lease::from_fd(fd).unwrap();
        let mapping = lease.map_guarded().unwrap();
        let register = mapping.typed::<u32>(8).unwrap();
        register.write(3).unwrap();
        register.modify(|value| value << 1).unwrap();
        assert_eq!(register.poll_until(4, 4, Duration::ZERO).unwrap(), 6);
        let error = register.poll_until(1, 1, Duration::from_millis(1));
        assert_eq!(
            error.unwrap_err().errno(),
            Some(Errno::TIMEDOUT.raw_os_error())
        );
        rustix::fs::ftruncate(&lease, 0).unwrap();
        assert!(register.read().is_err() && register.write(1).is_err());
        // Long before the time is up.
        let error = register.poll_until(1, 1, Duration::from_secs(600));
        assert!(matches!(error, Err(Error::Revoked { .. })), "{error:?}");
    }

    #[cfg(feature = "safe-mmio")]
    #[test]
    fn a_structure_of_registers_is_checked_once() {
        use safe_mmio::field;
        use safe_mmio::fields::ReadPureWrite;

        #[derive(zerocopy::FromBytes)]
        #[repr(C)]
        struct Registers {
            first: ReadPureWrite<u32>,
            second: ReadPureWrite<u32>,
        }

        let mut mapping = mapping();
        let mut registers = mapping.mmio::<Registers>(0x10).unwrap();
        field!(registers, first).write(1);
        field!(registers, second).write(2);
        assert_eq!(mapping.read::<u32>(0x14).unwrap(), 2);
        assert!(mapping.mmio::<Registers>(0x12).is_err());
        assert!(mapping.mmio::<Registers>(0x1000).is_err());
        assert!(mapping.mmio::<Registers>(usize::MAX).is_err());
    }
}
