//! The error of a single access.

use std::num::NonZeroU8;

use super::Error;
use super::Object;

/// An access through a [`GuardedRegister`](crate::GuardedRegister) that did not reach the device,
/// because the lease is revoked: [`Error::Revoked`], small enough for the fast path.
///
/// `?` makes an [`Error`] of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("access: {width} bytes at offset {offset:#x}: revoked")]
pub struct Lost {
    offset: u64,
    // Never 0, so that a result is not larger for it.
    width: NonZeroU8,
}

impl Lost {
    /// An access of a `T`.
    pub(crate) fn of<T>(offset: u64) -> Self {
        let width = u8::try_from(size_of::<T>()).ok().and_then(NonZeroU8::new);
        Self {
            offset,
            width: width.unwrap_or(NonZeroU8::MIN),
        }
    }

    /// Where the access was in the lease or BAR, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes it was about: 1, 2, 4 or 8, of which none was read or written.
    #[must_use]
    pub fn width(&self) -> u8 {
        self.width.get()
    }
}

impl From<Lost> for Error {
    #[cold]
    fn from(lost: Lost) -> Self {
        Self::Revoked {
            operation: "access",
            object: Object::Mapping {
                offset: lost.offset,
                length: lost.width.get().into(),
            },
            done: 0,
            source: None,
        }
    }
}
