//! The varlink interface `io.barlease.Leases` of the service `barleased`, as [IDL], as types,
//! and as a small blocking [`Client`].
//!
//! Varlink is JSON over a unix stream socket, each message ended by a NUL byte. File descriptors
//! are sent with the message, as sd-varlink does: as `SCM_RIGHTS` with its first byte, named in the
//! message by their number. So `varlinkctl` talks to the service, too.
//!
//! Not allowed here: an async runtime, VFIO, policy.
//!
//! ```no_run
//! use barlease_proto::Access;
//! use barlease_proto::Acquire;
//! use barlease_proto::Client;
//!
//! # fn main() -> barlease_proto::Result<()> {
//! let mut service = Client::connect("/run/barleased/leases.sock")?;
//! let (lease, fd) = service.acquire(&Acquire::of_pool("rows", 64 << 10, Access::ReadWrite))?;
//! println!("lease {} of {} bytes", lease.lease, lease.size);
//! # drop(fd);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod client;
mod error;
mod types;
mod wire;

pub use self::client::Client;
pub use self::client::Stream;
pub use self::error::Error;
pub use self::error::Refusal;
pub use self::error::Result;
pub use self::types::*;
pub use self::wire::Call;
pub use self::wire::MAX_MESSAGE;
pub use self::wire::Message;
pub use self::wire::Reply;
pub use self::wire::Wire;

/// The interface, as the service tells it.
pub const IDL: &str = include_str!("io.barlease.Leases.varlink");

/// Its name.
pub const INTERFACE: &str = "io.barlease.Leases";

/// Where the service listens.
pub const SOCKET: &str = "/run/barleased/leases.sock";

#[cfg(test)]
mod tests;
