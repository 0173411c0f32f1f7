//! Errors of the library as numbers, with a text for each thread.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_char, c_int};
use std::io;

use barlease::Error;

pub(super) const EPERM: c_int = 1;
pub(super) const ENXIO: c_int = 6;
pub(super) const EIO: c_int = 5;
pub(super) const EBADF: c_int = 9;
pub(super) const EACCES: c_int = 13;
pub(super) const EFAULT: c_int = 14;
pub(super) const EBUSY: c_int = 16;
pub(super) const EXDEV: c_int = 18;
pub(super) const ENODEV: c_int = 19;
pub(super) const EINVAL: c_int = 22;
pub(super) const EROFS: c_int = 30;
pub(super) const ERANGE: c_int = 34;
pub(super) const EPROTO: c_int = 71;
pub(super) const EOPNOTSUPP: c_int = 95;
pub(super) const ETIMEDOUT: c_int = 110;
pub(super) const EINPROGRESS: c_int = 115;
pub(super) const ESTALE: c_int = 116;
pub(super) const EREMOTEIO: c_int = 121;
pub(super) const EMEDIUMTYPE: c_int = 124;

thread_local! {
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
    /// How many bytes of a block were copied before the last failure.
    static DONE: Cell<usize> = const { Cell::new(0) };
}

/// Why a function fails: its errno, and the text.
#[derive(Debug)]
pub(super) struct Failure {
    errno: c_int,
    text: String,
    /// Bytes of a block that were copied.
    done: usize,
}

impl Failure {
    pub(super) fn new(errno: c_int, text: impl Into<String>) -> Self {
        Self {
            errno,
            text: text.into(),
            done: 0,
        }
    }

    pub(super) fn from_io(error: &io::Error, what: impl std::fmt::Display) -> Self {
        Self::new(errno_of(error), format!("{what}: {error}"))
    }
}

fn errno_of(error: &io::Error) -> c_int {
    match (error.raw_os_error(), error.kind()) {
        (Some(errno), _) if errno > 0 => errno,
        (_, io::ErrorKind::TimedOut) => ETIMEDOUT,
        _ => EIO,
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let errno = match &error {
            Error::Revoked { .. } => EREMOTEIO,
            Error::Dead { .. } => ESTALE,
            Error::WrongDevice { .. } => EXDEV,
            Error::NotALease { .. } => EMEDIUMTYPE,
            Error::Unsupported { .. } | Error::NoIommuGroup { .. } => EOPNOTSUPP,
            Error::NoDevice { .. } => ENODEV,
            Error::NotBound { .. } => ENXIO,
            Error::GroupNotViable { .. } => EPERM,
            Error::Busy { .. } => EBUSY,
            Error::OutOfBounds { .. } => ERANGE,
            Error::ReadOnly { .. } => EROFS,
            Error::Misaligned { .. } | Error::Invalid { .. } => EINVAL,
            Error::Malformed { .. } => EPROTO,
            Error::Denied { source, .. } if source.raw_os_error() == Some(EPERM) => EPERM,
            Error::Denied { .. } => EACCES,
            Error::Io { source, .. } => errno_of(source),
            other => other.errno().filter(|errno| *errno > 0).unwrap_or(EIO),
        };
        let done = match &error {
            Error::Revoked { done, .. } => usize::try_from(*done).unwrap_or(0),
            _ => 0,
        };
        Self {
            done,
            ..Self::new(errno, error.report().to_string())
        }
    }
}

/// The return value of a function: `Ok` as it is, or the negative errno. Keeps the text.
pub(super) fn answer(result: Result<c_int, Failure>) -> c_int {
    match result {
        Ok(value) => value,
        Err(failure) => {
            // No text of the library has a NUL, but for names that come from elsewhere.
            let text = failure.text.replace('\0', "?");
            let text = CString::new(text).unwrap_or_default();
            // Not while the thread ends: then nobody asks for the text.
            let _ = LAST.try_with(|last| last.replace(Some(text)));
            let _ = DONE.try_with(|done| done.set(failure.done));
            -failure.errno
        }
    }
}

/// The text of the thread's last failure.
pub(super) fn last() -> *const c_char {
    let pointer = LAST.try_with(|last| last.borrow().as_ref().map(|text| text.as_ptr()));
    pointer.ok().flatten().unwrap_or(c"".as_ptr())
}

/// Bytes of a block that the thread's last failure had copied.
pub(super) fn last_done() -> usize {
    DONE.try_with(Cell::get).unwrap_or(0)
}
