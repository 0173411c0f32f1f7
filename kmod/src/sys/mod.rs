// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over what the `kernel` crate does not cover.
//!
//! All `unsafe` of the module lives below this folder; the driver body beside it has none. Nothing
//! here knows what a lease is: one file per kernel concept, named as in C.

#![allow(unsafe_code)]

mod bindings;
mod symbols;
mod wake;

pub(crate) mod bar;
pub(crate) mod debugfs_root;
pub(crate) mod delayed;
pub(crate) mod dma_buf;
pub(crate) mod errno;
pub(crate) mod eventfd;
pub(crate) mod fence;
pub(crate) mod flag;
pub(crate) mod gigantic;
pub(crate) mod idle;
pub(crate) mod items;
pub(crate) mod nospec;
pub(crate) mod p2p;
pub(crate) mod params;
pub(crate) mod patience;
pub(crate) mod payload;
pub(crate) mod ratelimit;
pub(crate) mod rwsem;
pub(crate) mod sleep;
pub(crate) mod tree;
pub(crate) mod vfio_pci;
pub(crate) mod vma;
