//! The command `barlease`. Everything is in the library beside it, so that completions and manual
//! pages can be made from the same definitions.

use std::process::ExitCode;

fn main() -> ExitCode {
    barlease_cli::main()
}
