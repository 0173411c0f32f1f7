//! The outcome that the contract demands of each step of the random test.
//!
//! [`Generator`] draws [steps](Step) from a seed; the guest test (`guest-tests/src/random/`) makes
//! them on the real kernel; [`Oracle`] knows by the contract alone what may be seen then, and
//! objects to anything else.
//!
//! Nothing here is the module's code, `barlease-model` included: an error there must not be one
//! here. No system call is made, so this is tested on the host.

mod coverage;
mod fire;
mod generate;
mod judge;
mod op;
mod world;

pub use coverage::Coverage;
pub use fire::{During, Shot};
pub use generate::Generator;
pub use judge::Objection;
pub use op::{Kind, NoBuffer, Op, Outcome, Record, Seen, Severity, Spoil, Step, WrongMap};
pub use world::{
    Attachment, Buffer, Device, LowPower, MAIN, Mapping, Oracle, Page, Protection, Spec, State,
    Target,
};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of an entry of one level above pages.
pub const HUGE: u64 = 2 << 20;

/// Bytes that one DMA transfer moves.
pub const TRANSFER: u64 = 64;
