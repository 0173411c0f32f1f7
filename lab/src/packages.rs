//! The first room: packages of Debian's and the cache they go to.
//!
//! Knows no kernel: which packages there are, which a plan takes, how they are fetched, unpacked
//! and run from.

pub(crate) mod apt;
pub mod arch;
pub mod cache;
pub(crate) mod command;
pub(crate) mod extra;
pub mod plan;
pub mod report;
pub mod sysroot;
pub mod version;
