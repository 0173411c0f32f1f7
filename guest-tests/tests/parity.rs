//! To a program that uses nothing of ours every answer is stock's, byte for byte:
//! `barlease_guest_tests::parity` asks.
#![cfg(barlease_guest)]

use barlease_guest_tests::{
    parity::{answers, compare},
    pci::{BARLEASE, STOCK},
};

fn is_the_same(name: &str) {
    compare(name, &answers(name, STOCK), &answers(name, BARLEASE));
}

#[test]
fn a_display_answers_as_with_stock() {
    is_the_same("display");
}

#[test]
fn shared_memory_answers_as_with_stock() {
    is_the_same("memory");
}

#[test]
fn an_nvme_device_answers_as_with_stock() {
    is_the_same("nvme");
}

#[test]
fn a_network_adapter_answers_as_with_stock() {
    is_the_same("igb");
}

#[test]
fn edu_answers_as_with_stock() {
    is_the_same("edu");
}
