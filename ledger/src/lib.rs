//! The core of the service.
#![forbid(unsafe_code)]
pub mod allocator;
pub mod policy;
pub mod types;
