//! Registers with a type, on top of [`Register`](crate::Register).

mod array;
mod guarded;
mod value;

use std::marker::PhantomData;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;

use crate::Error;
use crate::Mapping;
use crate::ReadOnlyRegister;
use crate::Register;
use crate::Result;
use crate::Window;
use crate::error::Object;

pub use array::RegisterArray;
pub use guarded::GuardedTypedRegister;
pub use value::Bits;
pub use value::RegisterValue;
use value::decode;
use value::encode;

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

    pub(super) fn mapping() -> Mapping {
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
