// SPDX-License-Identifier: GPL-2.0

//! Lists that are made at once and stay as they are.

use core::{num::NonZeroU8, ops::Deref, result::Result};
use kernel::prelude::*;

/// A few items, which cost no allocation, or any number of them.
pub(crate) enum Items<T> {
    /// At most [`FEW`].
    Few(Few<T>),
    /// So many.
    Many(KVVec<T>),
}

/// How many items are a few.
pub(crate) const FEW: usize = 4;

/// At least one item, and at most [`FEW`].
pub(crate) struct Few<T> {
    items: [T; FEW],
    // Never 0, so that `Items` takes no more room.
    length: NonZeroU8,
}

impl<T: Copy> Few<T> {
    /// One.
    pub(crate) fn one(item: T) -> Self {
        Self {
            items: [item; FEW],
            length: NonZeroU8::MIN,
        }
    }

    /// The items that `make` makes of `sources`, or its first error; `None` where that are none, or
    /// too many.
    #[inline]
    pub(crate) fn of<S, E>(
        sources: &[S],
        mut make: impl FnMut(&S) -> Result<T, E>,
    ) -> Result<Option<Self>, E> {
        let Some((first, rest)) = sources.split_first() else {
            return Ok(None);
        };
        let mut few = Self::one(make(first)?);
        for source in rest {
            let Some(place) = few.items.get_mut(usize::from(few.length.get())) else {
                return Ok(None);
            };
            *place = make(source)?;
            few.length = few.length.saturating_add(1);
        }
        Ok(Some(few))
    }
}

/// Appends what `make` makes of each of `sources`, up to its first error, to a list with room for
/// them.
pub(crate) fn append<T: Copy, S, E>(
    items: &mut KVVec<T>,
    sources: &[S],
    mut make: impl FnMut(&S) -> Result<T, E>,
) -> Result<(), E> {
    let mut made = 0;
    let mut result = Ok(());
    for (place, source) in items.spare_capacity_mut().iter_mut().zip(sources) {
        match make(source) {
            Ok(item) => place.write(item),
            Err(error) => {
                result = Err(error);
                break;
            }
        };
        made += 1;
    }
    // SAFETY: So many places of the spare capacity were written.
    unsafe { items.inc_len(made) };
    result
}

impl<T> Deref for Items<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Few(few) => few
                .items
                .get(..usize::from(few.length.get()))
                .unwrap_or(&[]),
            Self::Many(items) => items,
        }
    }
}
