//! Registers whose loss is an error.

use std::marker::PhantomData;
use std::time::Duration;

use super::RegisterValue;
use super::decode;
use super::encode;
use super::poll;
use crate::GuardedMapping;
use crate::GuardedRegister;
use crate::GuardedWindow;
use crate::Lost;
use crate::Result;

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

    /// See [`TypedRegister::modify`](super::TypedRegister::modify).
    ///
    /// Errors: [`Lost`].
    #[inline(always)]
    pub fn modify(&self, change: impl FnOnce(T) -> T) -> Result<(), Lost> {
        self.write(change(self.read()?))
    }

    /// See [`TypedRegister::poll_until`](super::TypedRegister::poll_until).
    ///
    /// Errors: [`Error::Revoked`](crate::Error::Revoked); [`Error::Io`](crate::Error::Io), and
    /// [`Error::is_timed_out`](crate::Error::is_timed_out) says so.
    pub fn poll_until(&self, mask: T::Raw, value: T::Raw, timeout: Duration) -> Result<T> {
        self.poll(timeout, |read| read.into_raw() & mask == value)
    }

    /// See [`TypedRegister::poll`](super::TypedRegister::poll). A loss ends it.
    ///
    /// Errors: [`Error::Revoked`](crate::Error::Revoked); [`Error::Io`](crate::Error::Io), and
    /// [`Error::is_timed_out`](crate::Error::is_timed_out) says so.
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
    /// Errors: [`Error::OutOfBounds`](crate::Error::OutOfBounds),
    /// [`Error::Misaligned`](crate::Error::Misaligned),
    /// [`Error::ReadOnly`](crate::Error::ReadOnly).
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::Lease;
    use rustix::io::Errno;

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
}
