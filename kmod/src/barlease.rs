// SPDX-License-Identifier: GPL-2.0

//! `barlease_vfio_pci`: a vfio-pci variant driver that leases ranges of BARs.
//!
//! A lease is a dma-buf that its holder maps, and that its grantor revokes: on request for good,
//! and for as long as an event takes the device's memory away. The contract is
//! `abi/include/barlease.h`.
//!
//! The parts, from the outside in:
//!
//! - [`driver`]: which operation of a device does what to its leases;
//! - [`features`]: the private features that are about one buffer, and EVENTS;
//! - [`sampling`]: what the device says of its memory, and when it is asked;
//! - [`bound`]: the state of a function from its bind to its unbind;
//! - [`door`]: whether a read or a write through the device fd may reach a BAR;
//! - [`export`]: makes a buffer of what a process asks for;
//! - [`regions`]: mmap of BARs through the device fd, and aliases;
//! - [`buffer`]: a lease: its dma-buf, its mappings, its faults, its revocation;
//! - [`leases`]: all buffers of a function and the state of access; **the lock order is there**;
//! - [`list`]: tells the owner of the device of its buffers;
//! - [`model`]: every decision that needs no kernel, tested on the host;
//! - [`sys`]: safe abstractions over the C side. All `unsafe` is there.

#![deny(unsafe_code)]

use kernel::{debugfs::Dir, prelude::*};

#[path = "../../abi/src/lib.rs"]
// `pub` is for the crate that the same source is.
#[allow(dead_code, unreachable_pub)]
mod abi;
#[path = "../../model/src/lib.rs"]
// `pub` is for the crate that the same source is.
#[allow(dead_code, unreachable_pub)]
mod model;

mod bar_maps;
mod bound;
mod buffer;
mod debugfs;
mod denylist;
mod door;
mod driver;
mod export;
mod features;
mod leases;
mod list;
mod msix;
mod names;
mod regions;
mod sampling;
mod sys;
mod taking;

use sys::vfio_pci::Registration;

/// Bytes of a page.
const PAGE_SIZE: u64 = kernel::page::PAGE_SIZE as u64;
/// Shift from bytes to pages.
const PAGE_SHIFT: u32 = kernel::page::PAGE_SHIFT as u32;

macro_rules! this_module {
    ($name:tt) => {
        module! {
            type: Module,
            name: $name,
            authors: ["The Barlease authors"],
            description: "VFIO PCI driver that leases ranges of BARs as revocable dma-bufs",
            license: "GPL",
            imports_ns: ["DMA_BUF"],
        }
    };
}

#[cfg(not(BARLEASE_AS_STOCK))]
this_module!("barlease_vfio_pci");
// `make NAME=vfio-pci`: in the place of the kernel's own.
#[cfg(BARLEASE_AS_STOCK)]
this_module!("vfio_pci");

/// The loaded module.
#[pin_data]
struct Module {
    #[pin]
    registration: Registration<bound::Barlease>,
    // Dropped last: its files are those of bound functions.
    _debugfs: sys::debugfs_root::Root,
}

impl kernel::InPlaceModule for Module {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _debugfs: sys::debugfs_root::Root::new(Dir::new(c"barlease"))?,
            registration <- Registration::new(module),
        })
    }
}

/// Refuses what a user asks for: logs why, not too often, and is the error.
#[macro_export]
macro_rules! refuse {
    ($leases:expr, $errno:expr, $($why:tt)+) => {{
        let errno: ::kernel::error::Error = $errno;
        let leases = $leases;
        if leases.may_log() {
            ::kernel::pr_notice!(
                "{}: refused ({errno:?}): {}\n",
                leases.bdf(),
                ::kernel::prelude::fmt!($($why)+)
            );
        }
        Err(errno)
    }};
}
