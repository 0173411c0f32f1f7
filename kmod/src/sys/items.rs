// SPDX-License-Identifier: GPL-2.0

//! Lists that are made at once and stay as they are.

use core::ops::Deref;
use kernel::{
    alloc::{AllocError, Flags},
    prelude::*,
};

/// One item, which costs no allocation, or any number of them.
pub(crate) enum Items<T> {
    /// One.
    One(T),
    /// So many.
    Many(KVVec<T>),
}

impl<T: Copy> Items<T> {
    /// What `make` makes of each of `sources`; its first error, or that there is no memory.
    pub(crate) fn of<S, E: From<AllocError>>(
        sources: &[S],
        flags: Flags,
        mut make: impl FnMut(&S) -> core::result::Result<T, E>,
    ) -> core::result::Result<Self, E> {
        if let [only] = sources {
            return Ok(Self::One(make(only)?));
        }
        let mut items = KVVec::with_capacity(sources.len(), flags)?;
        for (place, source) in items.spare_capacity_mut().iter_mut().zip(sources) {
            place.write(make(source)?);
        }
        // SAFETY: There is room for as many as there are sources, and each place was written.
        unsafe { items.inc_len(sources.len()) };
        Ok(Self::Many(items))
    }
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
