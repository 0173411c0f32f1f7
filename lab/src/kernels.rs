//! The second room: kernels that are ready to boot, and what is built for them.
//!
//! Made of [packages](crate::packages); knows no guest.

pub mod debug;
pub mod flavour;
mod foreign;
pub mod kernel;
pub mod kmod;
pub mod litmus;
mod overlay;
pub mod prepare;
pub mod selftests;
mod source;
pub mod without;
