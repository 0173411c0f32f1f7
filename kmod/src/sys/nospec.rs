// SPDX-License-Identifier: GPL-2.0

//! Array indexes that a user chose.
//!
//! C header: [`include/linux/nospec.h`](srctree/include/linux/nospec.h)

use super::bindings;

/// `index` if it is below `size`; also where the processor only guesses that it is
/// (`array_index_nospec`).
pub(crate) fn checked(index: usize, size: usize) -> Option<usize> {
    // SAFETY: Computes with two numbers; always allowed.
    (index < size).then(|| unsafe { bindings::bl_array_index_nospec(index, size) })
}
