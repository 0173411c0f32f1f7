//! A PCIe endpoint of our own, served to QEMU's `vfio-user-pci` over a socket.
//!
//! It has what no device that QEMU emulates has, by [`Options`]: it completes requests with
//! steering tags, a reset of it takes a while or fails, it can play dead, and it keeps a
//! [log](log::Log) of every access that reaches it, with the state that it was in. That log is the
//! witness of tests that claim that nothing reached the device.
//!
//! | region | what |
//! |---|---|
//! | BAR0 | memory, 64-bit and prefetchable; trapped (every access is in the log) or mapped |
//! | BAR2 | [registers], always trapped; the MSI-X table may be in it |
//! | config space | PM (D3hot, and D1 and D2 if asked for), PCIe (function-level reset, steering tags), MSI-X, TPH requester |
//!
//! Some accesses QEMU keeps to itself, and they never get here: the MSI-X table is QEMU's own, and
//! an access to a BAR whose decoding is off, or that is not in D0, ends in QEMU (`-d invalid_mem`
//! shows it).
//!
//! ```no_run
//! use barlease_device::{Options, Server};
//!
//! # fn main() -> anyhow::Result<()> {
//! let server = Server::start("/tmp/device.sock".as_ref(), &Options::default(), None)?;
//! // qemu-system-x86_64 … -machine q35,memory-backend=mem -object memory-backend-memfd,id=mem,size=1G,share=on
//! //   -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/device.sock"}}'
//! println!("{}", server.ask(r#"{"query":{"region":0}}"#));
//! # Ok(())
//! # }
//! ```

pub mod config;
mod control;
mod device;
pub mod log;
mod server;

use serde::{Deserialize, Serialize};

pub use server::Server;

/// The properties of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Size of BAR0 in MiB, a power of two.
    pub memory_mib: u32,
    /// Whether accesses to BAR0 come to the device one by one, rather than to memory that QEMU
    /// maps.
    pub trapped: bool,
    /// Where the MSI-X table is.
    pub msix: Msix,
    /// Bits 13:12 of Device Capabilities 2: 0 completes no steering tags, 1 those of 8 bits, 3 also
    /// those of 16; 2 is reserved.
    pub completer: u8,
    /// Whether it has the capability of a TPH requester.
    pub requester: bool,
    /// Whether it has the power states D1 and D2.
    pub d1_d2: bool,
    /// Whether it has another power-management capability, which does nothing.
    pub second_pm: bool,
    /// How long a reset takes.
    pub reset_ms: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 16,
            trapped: true,
            msix: Msix::Registers,
            completer: 3,
            requester: true,
            d1_d2: false,
            second_pm: false,
            reset_ms: 0,
        }
    }
}

/// Where the MSI-X table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Msix {
    /// Nowhere: the device has no interrupts.
    None,
    /// In the last 8 KiB of BAR0.
    Memory,
    /// In BAR2.
    Registers,
}

/// Offsets of BAR2's registers, each of 4 bytes.
pub mod registers {
    /// Bytes of BAR2.
    pub const LENGTH: u64 = 0x4000;
    /// Reads as [`ID_VALUE`].
    pub const ID: u64 = 0x00;
    /// The value that [`ID`] reads as.
    pub const ID_VALUE: u32 = 0xba5e_1ea5;
    /// Keeps what is written to it. A write is a mark in the log, in order with the writer's other
    /// accesses.
    pub const MARK: u64 = 0x08;
    /// A write signals the MSI-X vector of that number.
    pub const SIGNAL: u64 = 0x10;
    /// The MSI-X table, if it is here.
    pub const MSIX_TABLE: u64 = 0x2000;
    /// The MSI-X pending bits, if they are here.
    pub const MSIX_PENDING: u64 = 0x3000;
}

/// Vectors of the MSI-X table.
pub const VECTORS: u16 = 4;
