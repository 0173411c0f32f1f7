//! QEMU's machine protocol, as far as a test needs it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// A connection to QEMU.
#[derive(Debug)]
pub(crate) struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Greets.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let mut monitor = Self {
            lines: BufReader::new(stream),
        };
        let greeting = monitor.read()?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU's monitor greeted with {greeting}");
        }
        monitor.run(&json!({"execute": "qmp_capabilities"}))?;
        Ok(monitor)
    }

    /// Runs a command and gives what it returns.
    pub(crate) fn run(&mut self, command: &Value) -> Result<Value> {
        let mut line = command.to_string();
        line.push('\n');
        self.lines
            .get_mut()
            .write_all(line.as_bytes())
            .context("write to QEMU's monitor")?;
        loop {
            let mut reply = self.read()?;
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = reply.get("error") {
                let text = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .map_or_else(|| error.to_string(), str::to_owned);
                return Err(anyhow!("QEMU: {text}"));
            }
            // Anything else is an event.
        }
    }

    /// Writes a picture of a display.
    pub(crate) fn screenshot(&mut self, device: &str, path: &Path) -> Result<()> {
        let arguments = json!({"filename": path, "device": device, "format": "png"});
        self.run(&json!({"execute": "screendump", "arguments": arguments}))
            .map(drop)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self
            .lines
            .read_line(&mut line)
            .context("read from QEMU's monitor")?
            == 0
        {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU's monitor said: {line}"))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn with_replies(replies: &'static str) -> (UnixStream, thread::JoinHandle<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            theirs
                .write_all(b"{\"QMP\":{}}\n{\"return\":{}}\n")
                .unwrap();
            theirs.write_all(replies.as_bytes()).unwrap();
            let mut sink = String::new();
            let _ = std::io::Read::read_to_string(&mut theirs, &mut sink);
        });
        (ours, server)
    }

    #[test]
    fn events_are_passed_over() {
        let (stream, server) =
            with_replies("{\"event\":\"RTC_CHANGE\"}\n{\"return\":{\"running\":true}}\n");
        let mut monitor = Monitor::new(stream).unwrap();
        assert_eq!(
            monitor.run(&json!({"execute": "query-status"})).unwrap(),
            json!({"running": true})
        );
        drop(monitor);
        server.join().unwrap();
    }

    #[test]
    fn an_error_is_one() {
        let (stream, server) =
            with_replies("{\"error\":{\"class\":\"GenericError\",\"desc\":\"no display\"}}\n");
        let mut monitor = Monitor::new(stream).unwrap();
        let error = monitor
            .screenshot("display", Path::new("/x.png"))
            .unwrap_err();
        assert_eq!(error.to_string(), "QEMU: no display");
        drop(monitor);
        server.join().unwrap();
    }
}
