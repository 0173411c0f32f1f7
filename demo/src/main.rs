//! The main job of Barlease, to look at.
//!
//! An owner process holds a display adapter through VFIO and leases rows of its frame buffer to
//! processes of other users, which draw in them through mappings of their own. Then it takes one
//! lease back while its holder is drawing, and leases the same rows to somebody else.
//!
//! Runs as root in a guest of the lab: `cargo xtask demo`. The holders are this same program,
//! started again as other users with a socket as their standard input.

mod adapter;
mod holder;
mod owner;
mod picture;
mod transcript;

use std::process::ExitCode;

fn main() -> ExitCode {
    let role = std::env::args().nth(1);
    let done = match role.as_deref() {
        Some("holder") => holder::run(),
        _ => owner::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
