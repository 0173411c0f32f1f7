//! `barlease lease revoke`.

use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::json;

use super::grant::control;
use super::grant::control::Answer;
use crate::failure::Failure;
use crate::output::Output;

/// Has the process that granted a lease revoke it, and waits for the end, or not for importers.
pub(crate) fn run(socket: &Path, no_wait: bool, output: Output) -> Result<(), Failure> {
    let path = control::path(socket);
    let mut stream = UnixStream::connect(&path).map_err(|error| refused(&path, &error))?;
    let failed = |error: io::Error| Failure::file("revoke", &path, &error);
    stream
        .write_all(format!("{}\n", control::REVOKE).as_bytes())
        .map_err(failed)?;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(failed)?;
        let answer = serde_json::from_str(&line)
            .map_err(|error| Failure::new(format!("revoke: {}: {error}", path.display())))?;
        let socket = socket.display();
        match answer {
            Answer::Draining if no_wait && output.is_json() => {
                let told = json!({"event": "draining", "socket": socket.to_string()});
                return Ok(output.document(&told)?);
            }
            Answer::Draining if no_wait => {
                writeln!(
                    io::stdout(),
                    "draining lease at {socket}: revoked, but an importer has still to let go of it"
                )?;
                return Ok(());
            }
            Answer::Draining => eprintln!(
                "barlease: revoke: {socket}: nobody has it any more; waiting for an importer to \
                 let go of it"
            ),
            Answer::Revoked { microseconds } if output.is_json() => {
                let socket = socket.to_string();
                let event = "revoked";
                let told = json!({"event": event, "socket": socket, "microseconds": microseconds});
                return Ok(output.document(&told)?);
            }
            Answer::Revoked { microseconds } => {
                writeln!(
                    io::stdout(),
                    "revoked lease at {socket} in {microseconds} us"
                )?;
                return Ok(());
            }
            Answer::Closed { reason } | Answer::Failed { reason } => {
                return Err(Failure::new(format!("revoke: {socket}: {reason}")));
            }
        }
    }
    Err(Failure::new(format!(
        "revoke: {}: no answer: you are not the user that granted it, or its process has ended",
        path.display()
    )))
}

fn refused(path: &Path, error: &io::Error) -> Failure {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "nobody grants a lease there (the argument is the socket of `barlease lease grant`)"
        }
        io::ErrorKind::PermissionDenied => "for the user that granted it and root only",
        _ => return Failure::file("revoke", path, error),
    };
    Failure::new(format!("revoke: {}: {error}: {remedy}", path.display()))
}
