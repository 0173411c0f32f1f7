//! Steps drawn from a seed, each judged by what the contract says of it. Run on the machine
//! `random`.
//!
//! `BARLEASE_TEST_SEED` repeats a run, `BARLEASE_TEST_SECONDS` says how long it is; see
//! docs/testing.md.
#![cfg(barlease_guest)]

use barlease_guest_tests::{
    importer,
    random::{self, Options},
};

#[test]
fn whatever_is_done_what_may_be_accessible_is_what_is() {
    random::run(Options::of_environment());
    let names: Vec<_> = random::specs().iter().map(|spec| spec.name).collect();
    importer::check_that_nothing_is_left(&names);
}
