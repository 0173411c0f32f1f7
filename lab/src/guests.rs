//! The third room: guests, from the devices of their machine to the judgement of a run.
//!
//! Boots [kernels](crate::kernels).

pub mod guest;

#[cfg(feature = "host")]
mod boot;
#[cfg(feature = "host")]
mod control;
#[cfg(feature = "host")]
pub mod emulator;
#[cfg(feature = "host")]
mod initramfs;
#[cfg(feature = "host")]
pub mod machine;
#[cfg(feature = "host")]
mod monitor;
#[cfg(feature = "host")]
mod outcome;
#[cfg(feature = "host")]
mod output;
#[cfg(feature = "host")]
pub mod preset;
#[cfg(feature = "host")]
pub mod programs;
#[cfg(feature = "host")]
pub mod run;
#[cfg(feature = "host")]
pub mod secure_boot;
#[cfg(feature = "host")]
pub mod series;
#[cfg(feature = "host")]
mod served;
#[cfg(feature = "host")]
pub mod splat;
#[cfg(feature = "host")]
pub mod system;
#[cfg(feature = "host")]
mod terminal;
