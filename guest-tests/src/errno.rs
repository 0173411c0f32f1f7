//! Error numbers with their names.

use std::{fmt, io};

/// The answer of a system call.
pub type Answer<T> = Result<T, Errno>;

/// An error number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

macro_rules! names {
    ($($name:ident)+) => {
        $(#[doc = concat!("`", stringify!($name), "`")]
        pub const $name: Errno = Errno(libc::$name);)+

        impl fmt::Debug for Errno {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $($name => f.write_str(stringify!($name)),)+
                    Errno(number) => write!(f, "errno {number}"),
                }
            }
        }
    };
}

names! {
    EPERM ENOENT EIO E2BIG EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY ENODEV EINVAL ENOTTY ENOSPC
    EOVERFLOW EBADFD EOPNOTSUPP ENXIO EINPROGRESS EINTR
}

impl Errno {
    /// That of the last system call of this thread.
    #[must_use]
    pub fn last() -> Self {
        Self::of(&io::Error::last_os_error())
    }

    /// That of an error of std.
    ///
    /// # Panics
    ///
    /// When it does not come from the system.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => Self(number),
            None => panic!("not an error of the system: {error}"),
        }
    }
}

/// The answer of a system call that returns -1 on error.
///
/// # Errors
///
/// That of the call.
pub fn answer<T: Copy + PartialEq + From<i8>>(result: T) -> Answer<T> {
    if result == T::from(-1) {
        Err(Errno::last())
    } else {
        Ok(result)
    }
}
