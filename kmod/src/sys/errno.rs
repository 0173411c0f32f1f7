// SPDX-License-Identifier: GPL-2.0

//! Error numbers that the `kernel` crate of some supported kernel lacks.

use super::bindings;
use kernel::error::Error;

/// File descriptor in bad state.
pub(crate) const EBADFD: Errno = Errno(bindings::EBADFD);

/// Operation now in progress.
pub(crate) const EINPROGRESS: Errno = Errno(bindings::EINPROGRESS);

/// Operation not supported.
pub(crate) const EOPNOTSUPP: Errno = Errno(bindings::EOPNOTSUPP);

/// An error number, to be made an [`Error`] where it is used: that is not `const`.
#[derive(Clone, Copy)]
pub(crate) struct Errno(u32);

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::from_errno(-(errno.0 as i32))
    }
}
