// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over the C side, no wider than this module needs them.
//!
//! The kernel crate's abstractions of PCI drivers and of coherent memory differ between the
//! supported kernels, and it has none of the importer's side of dma-bufs: these are written against
//! its bindings.

#![allow(unsafe_code)]

pub(crate) mod dma_buf;
pub(crate) mod fence;
pub(crate) mod module;
pub(crate) mod pci;
pub(crate) mod user;
