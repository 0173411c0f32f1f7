// SPDX-License-Identifier: GPL-2.0

//! The kernel's own bindings, and those of vfio that it lacks.

#![cfg_attr(CONFIG_RUSTC_HAS_UNNECESSARY_TRANSMUTES, allow(unnecessary_transmutes))]
#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ptr_cast_constness,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    unsafe_op_in_unsafe_fn,
    improper_ctypes,
    unreachable_pub,
    dead_code,
    unused_imports
)]

pub(crate) use kernel::bindings::*;
use kernel::ffi;
use pin_init::MaybeZeroable;

include!("vfio_generated.rs");

// Types that vfio's headers only point to. Where the kernel's bindings have them, these stand in
// front: nothing here looks inside.
macro_rules! opaque {
    ($($name:ident),*) => {
        $(
            #[repr(C)]
            pub struct $name {
                _opaque: [u8; 0],
            }
        )*
    };
}

opaque!(kvm, iommufd_access, iommufd_device, virqfd, perm_bits);
