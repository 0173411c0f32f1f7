// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Every decision of the kernel module that needs no kernel.
//!
//! - [`ranges`]: validation of the ranges of a buffer, and the look-up from an offset in the buffer
//!   to a page of the BAR;
//! - [`access`]: whether the memory of a device may be touched, and why not;
//! - [`alias`]: further region indexes of BARs;
//! - [`batch`]: which pages one fault brings in;
//! - [`tph`]: steering tags;
//! - [`config`]: which part of a config-space write may take memory away.
//!
//! Nothing here allocates, locks, does I/O, panics or is `unsafe`. The module compiles this file as
//! one of its own (`cfg(MODULE)`); the tests beside it run on the host.

#![cfg_attr(not(MODULE), no_std)]
#![forbid(unsafe_code)]

pub mod access;
pub mod alias;
pub mod batch;
pub mod config;
pub mod ranges;
pub mod tph;
