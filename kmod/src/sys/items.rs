// SPDX-License-Identifier: GPL-2.0

//! Lists that are made at once and stay as they are.

use core::{ops::Deref, result::Result};
use kernel::prelude::*;

/// One item, which costs no allocation, or any number of them.
pub(crate) enum Items<T> {
    /// One.
    One(T),
    /// So many.
    Many(KVVec<T>),
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
            Self::One(item) => core::slice::from_ref(item),
            Self::Many(items) => items,
        }
    }
}
