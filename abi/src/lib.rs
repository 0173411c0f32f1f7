// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! The uAPI of the kernel module `barlease_vfio_pci`, as Rust types and constants.
//!
//! No logic lives here: layouts and numbers only. The C twin is `include/barlease.h`, which also
//! says what each operation refuses; `tests/layout.rs` asserts that the two agree. The module and
//! the library both build on this crate and share nothing else.
#![no_std]

mod types;
pub use types::*;
