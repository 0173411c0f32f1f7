// SPDX-License-Identifier: GPL-2.0

//! The functions that the module exports to other modules; the C side is `symbols.c`.
//!
//! The one place below `sys` that knows the driver's types: a symbol has no parameter for them.

use super::{bindings, dma_buf::DmaBufRef, errno};
use crate::buffer::Buffer;
use kernel::{error::from_result, prelude::*};

/// Reads the steering tag of a namespace.
///
/// # Safety
///
/// `dmabuf` must be valid, its reservation lock held, and the places for the answer valid for
/// writes.
#[no_mangle]
unsafe extern "C" fn bl_rust_get_tph(
    dmabuf: *mut bindings::dma_buf,
    extended: bool,
    steering_tag: *mut u16,
    hint: *mut u8,
) -> c_int {
    from_result(|| {
        // SAFETY: By the caller.
        let dmabuf = unsafe { DmaBufRef::with_resv_held(dmabuf) };
        let guarded = dmabuf.under_resv::<Buffer>();
        let (tag, ph) = guarded
            .and_then(|guarded| guarded.tph.get(extended))
            .ok_or(errno::EOPNOTSUPP)?;
        // SAFETY: By the caller.
        unsafe { steering_tag.write(tag) };
        // SAFETY: By the caller.
        unsafe { hint.write(ph) };
        Ok(0)
    })
}
