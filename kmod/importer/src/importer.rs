// SPDX-License-Identifier: GPL-2.0

//! `barlease_importer`: an importer of dma-bufs, to test `barlease_vfio_pci` with. Never packaged.
//!
//! It drives the DMA engine of QEMU's `edu` device and does what a test tells it to, as slowly or
//! as wrongly as the test likes. [`abi`] has the requests.
//!
//! - [`file`]: answers the requests of one open file;
//! - [`attachments`]: who has attached what, and what goes when;
//! - [`edu`]: the DMA engine;
//! - [`sys`]: the C side. All `unsafe` is there, but for two promises that only its users can make.
//!
//! # Lock order
//!
//! 1. [`edu::EDU`]: the device, while something is attached or transferred;
//! 2. the reservation lock of a dma-buf: everything about a mapping. The exporter holds it when it
//!    invalidates, and nothing else is locked then;
//! 3. [`attachments::ATTACHMENTS`]: to look up only.

#![deny(unsafe_code)]

use kernel::prelude::*;

#[path = "../abi.rs"]
// `pub` is for the tests that share the file.
#[allow(dead_code, unreachable_pub)]
mod abi;
mod attachments;
mod edu;
mod file;
mod sys;

module! {
    type: Module,
    name: "barlease_importer",
    authors: ["The Barlease authors"],
    description: "Importer of dma-bufs that drives QEMU's edu device, for tests only",
    license: "GPL",
    imports_ns: ["DMA_BUF"],
}

/// The loaded module.
#[pin_data]
struct Module {
    // Dropped first: nobody opens it any more when the driver goes.
    #[pin]
    _file: file::Registration,
    #[pin]
    _driver: sys::pci::Registration<edu::Driver>,
}

impl kernel::InPlaceModule for Module {
    #[allow(unsafe_code)] // No other way is given to begin a global lock.
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        // SAFETY: Called once, here.
        unsafe { edu::EDU.init() };
        // SAFETY: Called once, here.
        unsafe { attachments::ATTACHMENTS.init() };
        try_pin_init!(Self {
            _driver <- sys::pci::Registration::new(module),
            _file <- file::register(),
        })
    }
}
