//! Serves the device to a QEMU that somebody else started: `barlease-device SOCKET [OPTIONS]`.
//!
//! The options are a JSON object, such as `{"trapped":false}`. Requests come on the standard input,
//! one JSON object per line, and are answered on the standard output. Ends with the client's
//! connection.

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use barlease_device::{Options, Server};

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (socket, options) = match &arguments[..] {
        [socket] => (socket, Options::default()),
        [socket, options] => (
            socket,
            serde_json::from_str(options).context("read the options")?,
        ),
        _ => bail!("usage: barlease-device SOCKET [OPTIONS AS JSON]"),
    };
    let server = Arc::new(Server::start(Path::new(socket), &options, None)?);
    let asked = Arc::clone(&server);
    // Ends with the process: a read of the standard input cannot be called off.
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let _ = writeln!(std::io::stdout(), "{}", asked.ask(&line));
        }
    });
    server.wait();
    Ok(())
}
