// SPDX-License-Identifier: GPL-2.0

//! Parameters of the module. They are C's (`params.c`): Linux 7.2 has no boolean ones for Rust.

use super::bindings;

/// Where ranges that overlap the MSI-X table or PBA are exported.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum MsixExport {
    /// Where the device's MSIs are isolated.
    Auto,
    /// Everywhere.
    Always,
    /// Nowhere.
    Never,
}

/// The parameter `msix_export`.
pub(crate) fn msix_export() -> MsixExport {
    // SAFETY: Reads a number; always allowed.
    match unsafe { bindings::bl_msix_export() } {
        bindings::BL_MSIX_EXPORT_AUTO => MsixExport::Auto,
        bindings::BL_MSIX_EXPORT_ALWAYS => MsixExport::Always,
        _ => MsixExport::Never,
    }
}

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
    /// Whether virtual functions of bound physical ones may be made.
    enable_sriov = bl_enable_sriov;
    /// Whether functions with known exploitable errata are taken.
    disable_denylist = bl_disable_denylist;
    /// Whether feature 11 is the stock exporter's.
    stock_dma_buf = bl_stock_dma_buf;
}
