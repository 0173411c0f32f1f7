//! The daemon.

use std::process::ExitCode;

use barleased::Passed;
use barleased::Surroundings;

fn main() -> ExitCode {
    let passed = match passed() {
        Ok(passed) => passed,
        Err(error) => {
            eprintln!("barleased: {}", error.report());
            return ExitCode::FAILURE;
        }
    };
    let surroundings = Surroundings {
        passed,
        ..Surroundings::new(&barleased::device::open)
    };
    barleased::run_in(std::env::args_os(), surroundings)
}

/// The descriptors that systemd has passed.
#[allow(
    unsafe_code,
    reason = "takes over descriptors that are known by number only"
)]
fn passed() -> barlease::Result<Vec<Passed>> {
    // SAFETY: `main` begins with it: there is no other thread, and nothing has taken the files.
    let files = unsafe { barlease::take_listen_fds(true) }?;
    let passed = files.into_iter().map(|file| Passed {
        name: file.name,
        fd: file.fd,
    });
    Ok(passed.collect())
}
