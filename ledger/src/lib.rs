//! The core of the Barlease service: who may have which ranges of a BAR, who has them, and until
//! when.
//!
//! It has no I/O, no clock and no threads. [`Core::handle`](core::Core::handle) takes an event and
//! the time, and returns actions, which the daemon carries out in their order. All that can be
//! decided without the operating system is decided here, where every order of a small world can be
//! tried.
//!
//! | module | what |
//! |---|---|
//! | [`types`] | numbers that mean something, ranges, what can be asked for |
//! | [`allocator`] | which units of a pool are in use |
//! | [`policy`] | drop-in files, and the decision |
//! | [`record`] | the ledger: records, and the file that they are in |
//! | [`core`] | the machine: requests, states, ends, recovery |
//!
//! Not allowed here: descriptors, sockets, names of files, `unsafe`, panics on any input.
//!
//! # States of a lease
//!
//! ```text
//! in line ─► Scrubbing ─► Exporting ─► Granted ─► Reclaiming ─► Revoking ─► (gone)
//!                │            │           │  └────────────────────▲           ▲
//!                └─ Cancelled ┴───────────┼───────────────────────┘           │
//!                                         └── the kernel has it no more ──────┘
//! ```
//!
//! A request in line is no lease. There is no state for one that ended: it is gone. Side states of
//! `Granted`: suspended by the kernel (`reasons`), and orphaned by a restart (`resume_by`).
//!
//! # Invariants
//!
//! 1. **A unit is free only when the kernel has nothing that reaches it**: a lease leaves the table
//!    when its revocation has drained, its buffer is gone, or its device was closed. A revocation
//!    that hangs keeps its range, and nothing else.
//! 2. **The ledger is ahead of the world**: the intent is appended before the export, the grant
//!    before the answer, the beginning of an end before the revocation, and the end after it.
//! 3. **The kernel's LIST is the truth**: what it has not is over; what it has and nobody knows is
//!    revoked, and meanwhile blocks the range that was intended for it, or its BAR.
//! 4. **An end that has begun is not undone**, by a restart neither.
//! 5. **The first in line is the first served.** A request that does not fit keeps the ranges that
//!    it names, or stops all behind it if it names none: a large one is not starved by small ones.
//!    One that leases of its own holder are in the way of does neither: nobody else can serve it,
//!    and so it holds nobody up (`core/line.rs`).
//! 6. Maps, counts, lists and timers are derived from the leases: made anew they are the same.
//!
//! # What the daemon must do
//!
//! - Carry out actions in their order, and give their answers as events. A record that was given
//!   with [`Append`](core::Action::Append) is in the file before anything else is done that the
//!   kernel or a client could notice. Nothing else is given before all actions are carried out; but [`Scrub`](core::Action::Scrub) is only begun, and answered when it is
//!   done.
//! - Ask LIST only with nothing left to do, and give its answer as the next event.
//! - Keep the descriptor of an exported buffer until the answer to its request is sent, then close
//!   it; close it when the request is refused.
//! - On a killed daemon's successor: take the device descriptors and the ledger, LIST, then
//!   [`Core::recover`](core::Core::recover); connect clients only after its actions are carried
//!   out.
//!
//! # Checked by
//!
//! - `world.rs`: two clients, two units, a kernel, and a daemon that is killed anywhere, in every
//!   order; each of the bugs that can be planted is found;
//! - the allocator in every state of up to 7 units, and by property tests;
//! - property tests of the machine, the records, the patterns and the policy's index.

#![forbid(unsafe_code)]

pub mod allocator;
pub mod core;
pub mod policy;
pub mod record;
pub mod types;

#[cfg(test)]
mod world;
