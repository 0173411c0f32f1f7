//! Numbers of Barlease beside those of stock vfio-pci: what a benchmark run says, and how it is
//! summed up.
//!
//! The program of this crate takes the numbers in a guest ([`measures`]) and prints a
//! [`report::Report`] as JSON; `cargo xtask bench` starts it and makes tables and plots of that.
//!
//! Nothing in here is known to the module or the library: what is measured are the binaries and
//! defaults that users get.

pub mod measures;
pub mod profile;
pub mod report;
pub mod rounds;
pub mod statistics;
