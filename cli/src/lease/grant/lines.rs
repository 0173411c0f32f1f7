//! Lines of output, which a thread of its own writes, and lines that are typed.
//!
//! Nobody may stop the loop that revokes by not reading what it says, and no terminal may stop the
//! process because it reads in the background.

use std::io;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

/// Lines that wait to be written. More are dropped.
const WAITING: usize = 1024;
/// How long the last lines may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where a line goes.
enum Line {
    Out(String),
    Err(String),
    /// Those before it are written.
    Written(mpsc::Sender<()>),
}

/// Standard output and standard error.
pub(crate) struct Lines {
    queue: Option<SyncSender<Line>>,
    ended: mpsc::Receiver<()>,
}

impl Lines {
    pub(crate) fn new() -> io::Result<Self> {
        let (queue, waiting) = mpsc::sync_channel(WAITING);
        let (end, ended) = mpsc::channel();
        std::thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                for line in waiting {
                    // A reader that is gone does not want to know.
                    let _ = match line {
                        Line::Out(text) => put(&mut io::stdout(), &text),
                        Line::Err(text) => put(&mut io::stderr(), &text),
                        Line::Written(answer) => answer.send(()).map_err(io::Error::other),
                    };
                }
                let _ = end.send(());
            })?;
        Ok(Self {
            queue: Some(queue),
            ended,
        })
    }

    pub(crate) fn say(&self, text: String) {
        self.queue(Line::Out(text));
    }

    pub(crate) fn warn(&self, text: String) {
        self.queue(Line::Err(text));
    }

    /// Waits until what was said is written, unless nobody reads it.
    pub(crate) fn flush(&self) {
        let (answer, written) = mpsc::channel();
        self.queue(Line::Written(answer));
        let _ = written.recv_timeout(PATIENCE);
    }

    fn queue(&self, line: Line) {
        if let Some(queue) = &self.queue {
            // Full: nobody reads.
            let _ = queue.try_send(line);
        }
    }
}

fn put(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(format!("{text}\n").as_bytes())?;
    out.flush()
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.queue = None;
        let _ = self.ended.recv_timeout(PATIENCE);
    }
}

/// Whether standard input may be read: a terminal only in the foreground. `None`: never again.
pub(crate) fn may_read() -> bool {
    match rustix::termios::tcgetpgrp(io::stdin().as_fd()) {
        Ok(foreground) => foreground == rustix::process::getpgrp(),
        Err(rustix::io::Errno::NOTTY | rustix::io::Errno::INVAL) => true,
        Err(_) => false,
    }
}

/// Complete lines of standard input; the beginning of one waits for its rest.
#[derive(Default)]
pub(crate) struct Typed {
    line: Vec<u8>,
}

/// A line is no longer than this; its rest is dropped.
const LONGEST: usize = 4096;

impl Typed {
    /// `None` at the end of it. Call it when there is something.
    pub(crate) fn read(&mut self) -> Option<Vec<String>> {
        let mut bytes = [0; 256];
        // Not through the buffer of `Stdin`, which poll does not see into.
        let count = match rustix::io::read(io::stdin().as_fd(), &mut bytes) {
            Ok(0) => return None,
            Ok(count) => count,
            // EIO: of a terminal that has other things in its foreground by now.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN | rustix::io::Errno::IO) => {
                return Some(Vec::new());
            }
            Err(_) => return None,
        };
        let mut lines = Vec::new();
        for byte in bytes.iter().take(count) {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                lines.push(String::from_utf8_lossy(&line).trim().to_owned());
            } else if self.line.len() < LONGEST {
                self.line.push(*byte);
            }
        }
        Some(lines)
    }
}
