//! The terminal of a guest's command: its output to where it is wanted, and what is typed to it.

use std::fmt;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Instant;

/// Where the command's output goes.
pub enum Output {
    /// To our standard output, as it comes.
    Inherit,
    /// Into [`Outcome::output`](super::outcome::Outcome::output).
    Capture,
    /// To a function, line by line.
    Lines(Box<dyn FnMut(&str) + Send>),
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inherit => "Inherit",
            Self::Capture => "Capture",
            Self::Lines(_) => "Lines",
        })
    }
}

/// The output that [`copy_output`] has read, once there is no more.
pub(crate) struct Copied {
    /// The bytes, if they are captured.
    pub(crate) captured: Vec<u8>,
    /// How it ended: 0 bytes when the other side closed it.
    pub(crate) end: io::Result<usize>,
    pub(crate) at: Instant,
}

/// Gives what comes to where it is wanted, and all of it to `log`.
pub(crate) fn copy_output(
    mut from: &UnixStream,
    output: &mut Output,
    mut log: impl Write,
) -> Copied {
    let mut captured = Vec::new();
    let mut partial = Vec::new();
    let mut buffer = [0; 4096];
    let end = loop {
        let length = match from.read(&mut buffer) {
            Ok(length @ 1..) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            end => break end,
        };
        let bytes = &buffer[..length];
        // The log only helps a person to find a fault of the lab's.
        let _ = log.write_all(bytes);
        match output {
            Output::Capture => captured.extend_from_slice(bytes),
            Output::Inherit => {
                let mut out = std::io::stdout().lock();
                let _ = out.write_all(bytes).and_then(|()| out.flush());
            }
            Output::Lines(take) => {
                partial.extend_from_slice(bytes);
                while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<_> = partial.drain(..=end).collect();
                    take(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
                }
            }
        }
    };
    let at = Instant::now();
    if let (Output::Lines(take), false) = (output, partial.is_empty()) {
        take(&String::from_utf8_lossy(&partial));
    }
    Copied { captured, end, at }
}

/// Sends what is typed to the guest, for as long as the process lives: a read of a terminal cannot
/// be called off.
pub(crate) fn forward_input(to: &UnixStream) -> Option<JoinHandle<()>> {
    /// The byte that a terminal makes an end of input of.
    const END: &[u8] = b"\x04";
    let mut to = to.try_clone().ok()?;
    Some(thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = [0; 1024];
        while let Ok(length @ 1..) = input.read(&mut buffer) {
            if to.write_all(&buffer[..length]).is_err() {
                return;
            }
        }
        if !std::io::stdin().is_terminal() {
            let _ = to.write_all(END);
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn output_is_given_line_by_line() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"one\r\ntwo\npart").unwrap();
        drop(ours);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let mut output = Output::Lines(Box::new(move |line| {
            seen.lock().unwrap().push(line.to_owned())
        }));
        let mut log = Vec::new();
        let copied = copy_output(&theirs, &mut output, &mut log);
        assert_eq!(*lines.lock().unwrap(), ["one", "two", "part"]);
        assert_eq!(log, b"one\r\ntwo\npart");
        assert!(matches!(copied.end, Ok(0)));
    }
}
