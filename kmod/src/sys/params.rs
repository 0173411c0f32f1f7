// SPDX-License-Identifier: GPL-2.0

//! Parameters of the module. They are C's (`params.c`): Linux 7.2 has no boolean ones for Rust.

use super::bindings;

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident = $getter:ident;)*) => {
        $(
            $(#[$doc])*
            pub(crate) fn $name() -> bool {
                // SAFETY: Reads a flag; always allowed.
                unsafe { bindings::$getter() }
            }
        )*
    };
}

params! {
    /// Whether ranges that overlap the MSI-X table or PBA may be exported.
    allow_msix_export = bl_allow_msix_export;
    /// Whether virtual functions of bound physical ones may be made.
    enable_sriov = bl_enable_sriov;
    /// Whether functions with known exploitable errata are taken.
    disable_denylist = bl_disable_denylist;
    /// Whether feature 11 is the stock exporter's.
    stock_dma_buf = bl_stock_dma_buf;
}
