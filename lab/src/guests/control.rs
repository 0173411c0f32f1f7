//! The control channel: what a guest asks of the host, and what it says of its progress.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::guests::machine::{Device, Machine};
use crate::guests::monitor::Monitor;
use crate::guests::output::forward_input;
use crate::guests::served::Served;

/// The messages of the control channel so far.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) ready: Option<Instant>,
    /// When the last part of a series that has begun did so.
    pub(crate) part: Option<Instant>,
    pub(crate) verdict: Option<i32>,
    pub(crate) screenshots: Vec<PathBuf>,
}

/// The host's end of the channel.
pub(crate) struct Control<'a> {
    pub(crate) channel: &'a UnixStream,
    /// The emulator's monitor.
    pub(crate) monitor: &'a UnixStream,
    /// The terminal of the command; what is typed goes there, if anything does.
    pub(crate) payload: Option<&'a UnixStream>,
    pub(crate) machine: &'a Machine,
    pub(crate) served: &'a Served,
    pub(crate) screenshots: &'a Path,
    pub(crate) progress: &'a Mutex<Progress>,
}

impl Control<'_> {
    /// Answers the control channel until the guest is gone.
    pub(crate) fn serve(&self) {
        let Ok(monitor) = self.monitor.try_clone() else {
            return;
        };
        let Ok(mut monitor) = Monitor::new(monitor) else {
            return;
        };
        let mut lines = BufReader::new(self.channel);
        let mut line = Vec::new();
        thread::scope(|scope| {
            let mut waking: Option<(mpsc::Sender<()>, ScopedJoinHandle<'_, ()>)> = None;
            while lines
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                if let Ok(message) = serde_json::from_slice::<Value>(&line) {
                    if message.get("sleeps").is_some() {
                        let (awake, is_awake) = mpsc::channel();
                        let waker = scope.spawn(move || wake(self.channel, &is_awake));
                        waking = Some((awake, waker));
                    }
                    if message.get("awake").is_some() {
                        if let Some((awake, waker)) = waking.take() {
                            drop(awake);
                            let _ = waker.join();
                        }
                    }
                    let reply = self.answer(&message, &mut monitor);
                    if let (Some(payload), true) = (self.payload, message.get("ready").is_some()) {
                        forward_input(payload);
                    }
                    if let Some(reply) = reply {
                        let _ = { self.channel }.write_all(format!("{reply}\n").as_bytes());
                    }
                }
                line.clear();
            }
        });
    }

    fn answer(&self, message: &Value, monitor: &mut Monitor) -> Option<Value> {
        // Not held while QEMU works: whoever watches the time must not wait for it.
        let progress = || self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if message.get("ready").is_some() {
            progress().ready = Some(Instant::now());
            return None;
        }
        if message.get("part").is_some() {
            progress().part = Some(Instant::now());
            return None;
        }
        if let Some(code) = message.get("exit").and_then(Value::as_i64) {
            progress().verdict = i32::try_from(code).ok();
            return None;
        }
        if let Some(command) = message.get("qmp") {
            return Some(
                monitor
                    .run(command)
                    .map_or_else(refusal, |value| json!({"return": value})),
            );
        }
        if message.get("sleeps").is_some() {
            return None;
        }
        if message.get("awake").is_some() {
            return Some(json!({"ok": ""}));
        }
        if let Some(request) = message.get("device") {
            return Some(self.served.answer(request));
        }
        if let Some(name) = message.get("screenshot").and_then(Value::as_str) {
            let taken = self.screenshot(name, monitor);
            if let Ok(path) = &taken {
                progress().screenshots.push(path.clone());
            }
            return Some(taken.map_or_else(refusal, |path| json!({"ok": path})));
        }
        Some(json!({"error": "unknown request"}))
    }

    fn screenshot(&self, name: &str, monitor: &mut Monitor) -> Result<PathBuf> {
        if !is_plain(name) {
            bail!(
                "a screenshot's name has letters, digits, `-`, `_` and `.` only, this one is `{name}`"
            );
        }
        let display =
            |device: &&Device| device.arguments.iter().any(|word| word.contains("display"));
        let device = self
            .machine
            .devices
            .iter()
            .find(display)
            .context("this machine has no display")?;
        fs::create_dir_all(self.screenshots)
            .with_context(|| format!("make {}", self.screenshots.display()))?;
        let path = std::path::absolute(self.screenshots.join(format!("{name}.png")))?;
        monitor.screenshot(&device.name, &path)?;
        Ok(path)
    }
}

/// Wakes a guest that sleeps, or is about to, by empty lines until it says that it is awake: one
/// that comes too early wakes nobody. Less and less often, so that a guest that is slow falls
/// asleep in between.
fn wake(mut control: &UnixStream, is_awake: &mpsc::Receiver<()>) {
    let mut pause = Duration::from_millis(250);
    while is_awake.recv_timeout(pause) == Err(mpsc::RecvTimeoutError::Timeout) {
        if control.write_all(b"\n").is_err() {
            return;
        }
        pause = (pause * 2).min(Duration::from_secs(16));
    }
}

fn refusal(error: anyhow::Error) -> Value {
    json!({"error": format!("{error:#}")})
}

fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_screenshots_stay_in_their_folder() {
        assert!(is_plain("after-revoke_2.x"));
        for name in ["", "../x", "a/b", ".hidden", "a b"] {
            assert!(!is_plain(name), "{name}");
        }
    }
}
