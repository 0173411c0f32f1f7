//! The main job of Barlease, to look at.
//!
//! An owner process holds a display adapter through VFIO and leases rows of its frame buffer to
//! processes of other users, which draw in them through mappings of their own. Then it takes one
//! lease back while its holder is drawing, and leases the same rows to somebody else. In the second
//! act the daemon `barleased` has the adapter, and tenants of other users ask it for rows.
//!
//! Runs as root in a guest of the lab: `cargo xtask demo`. The holders are this same program,
//! started again as other users with a socket as their standard input.

mod adapter;
mod holder;
mod owner;
mod picture;
mod service;
mod transcript;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::var_os(service::DAEMON).is_some() {
        return service::daemon();
    }
    let role = std::env::args().nth(1);
    let done = match role.as_deref() {
        Some("holder") => holder::run(),
        Some("tenant") => holder::tenant(),
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
