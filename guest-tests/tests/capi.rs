//! The example of the C interface, run as it is: an owner and a holder in C, on the real kernel.
#![cfg(barlease_guest)]
#![allow(unsafe_code, reason = "a program in C")]

use std::ffi::{CString, c_char, c_int};

use barlease::pci::Pci;
use barlease_guest_tests::{
    observe,
    pci::{BARLEASE, Function, STOCK},
    process::{Child, End},
};

// Its functions, which the program in C calls.
#[path = "../../capi/src/lib.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, reason = "it is a library")]
mod capi;

#[link(name = "barlease_example", kind = "static")]
unsafe extern "C" {
    /// `main` of `capi/examples/lease.c`.
    fn barlease_example_main(argc: c_int, argv: *const *const c_char) -> c_int;
}

/// Runs the program in a process of its own: how it ended.
fn run(arguments: &[&str]) -> End {
    let arguments: Vec<_> = ["lease"]
        .iter()
        .chain(arguments)
        .map(|argument| CString::new(*argument).unwrap())
        .collect();
    let mut child = Child::start(&[], |_| {
        let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
        pointers.push(std::ptr::null());
        // SAFETY: As any `main` is called: the arguments, and a null pointer behind them.
        let code = unsafe { barlease_example_main(arguments.len() as c_int, pointers.as_ptr()) };
        assert_eq!(code, 0, "the program failed");
    });
    child.wait()
}

fn bdf(driver: &str) -> String {
    observe::mark_test();
    let bdf = Function::named("display").bdf;
    Pci::system().bind(bdf.parse().unwrap(), driver).unwrap();
    bdf
}

#[test]
fn a_lease_is_taken_from_a_holder_in_c() {
    assert_eq!(run(&[&bdf(BARLEASE), "0"]), End::Code(0));
}

#[test]
fn an_owner_in_c_learns_that_the_stock_driver_cannot() {
    assert_ne!(run(&[&bdf(STOCK), "0"]), End::Code(0));
}

#[test]
fn a_holder_in_c_survives_the_loss_of_a_file() {
    assert_eq!(run(&[]), End::Code(0));
}
