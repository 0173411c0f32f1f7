//! The guest's side: what a program inside a guest can ask of the host.
//!
//! Needs nothing but std, so that a test or demo program can link it without the rest of this crate
//! (`default-features = false`).
//!
//! The control channel is a serial port of the guest: one JSON object per line, each request
//! answered by one line before the next is sent. Requests of several processes take turns.
//!
//! ```no_run
//! use barlease_lab::guest;
//!
//! guest::mark("the lease is drawn")?;
//! let picture = guest::screenshot("after-drawing")?;
//! println!("on the host: {picture}");
//! # Ok::<(), std::io::Error>(())
//! ```

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// A link to the port.
const CHANNEL: &str = "/dev/lab-control";
const INSIDE: &str = "/lab/devices";

/// A device of the machine, as the host described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Full PCI address, such as `0000:00:02.0`.
    pub bdf: String,
    /// The name that the preset gave it, also its QEMU id.
    pub name: String,
    /// Its purpose, in words.
    pub about: String,
}

/// Whether this program runs inside a guest of the lab.
#[must_use]
pub fn inside() -> bool {
    Path::new(INSIDE).exists()
}

/// The devices that the machine's preset put there, in the order of the preset.
///
/// # Errors
///
/// `NotFound` outside of a guest.
pub fn devices() -> io::Result<Vec<Device>> {
    let text = std::fs::read_to_string(INSIDE)?;
    Ok(text.lines().filter_map(parse_device).collect())
}

/// The device of that name.
///
/// # Errors
///
/// `NotFound` when the machine has none of that name, or outside of a guest.
pub fn device(name: &str) -> io::Result<Device> {
    devices()?
        .into_iter()
        .find(|device| device.name == name)
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("this machine has no device called `{name}` (see `cargo xtask vm list`)"),
            )
        })
}

/// Writes a line into the kernel's log, to find the place in the console log later.
///
/// # Errors
///
/// The answer of opening or writing `/dev/kmsg`.
pub fn mark(text: &str) -> io::Result<()> {
    let mut kmsg = OpenOptions::new().write(true).open("/dev/kmsg")?;
    kmsg.write_all(format!("barlease-lab: {text}\n").as_bytes())
}

/// Takes a picture of the guest's display as `NAME.png` and returns its path on the host.
///
/// # Errors
///
/// `Other` with the host's reason: the machine has no display, or the name has characters other
/// than letters, digits, `-`, `_` and `.`.
pub fn screenshot(name: &str) -> io::Result<String> {
    let reply = request(&format!("{{\"screenshot\":{}}}", quote(name)))?;
    match string_member(&reply, "ok") {
        Some(path) => Ok(path),
        None => Err(refused(&reply)),
    }
}

/// Runs a command of QEMU's machine protocol, given as JSON (`{"execute":…,"arguments":…}`), and
/// returns the JSON reply `{"return":…}`.
///
/// # Errors
///
/// `Other` with the host's or QEMU's reason.
pub fn qmp(command: &str) -> io::Result<String> {
    let reply = request(&format!("{{\"qmp\":{command}}}"))?;
    if reply.trim_start().starts_with("{\"return\"") {
        Ok(reply)
    } else {
        Err(refused(&reply))
    }
}

/// Runs a command of QEMU's monitor for people (`info pci`), and returns what it says, as JSON.
///
/// # Errors
///
/// As [`qmp`].
pub fn monitor(line: &str) -> io::Result<String> {
    let line = quote(line);
    qmp(&format!(
        "{{\"execute\":\"human-monitor-command\",\"arguments\":{{\"command-line\":{line}}}}}"
    ))
}

/// Runs `sleep`, which puts the whole guest to sleep (to idle), and has the host wake it: by what
/// it sends to the serial port of the control channel. The port stays open meanwhile, since the
/// kernel turns off one that nobody uses.
///
/// # Errors
///
/// `Other` with the host's reason, or that of sysfs or of the channel.
pub fn woken_by_the_host<R>(sleep: impl FnOnce() -> R) -> io::Result<R> {
    let port = fs::canonicalize(CHANNEL)?;
    let port = port.file_name().unwrap_or_default();
    let port = Path::new("/sys/class/tty").join(port);
    fs::write(port.join("power/wakeup"), "enabled")?;
    let _turn = Turn::take()?;
    let mut channel = OpenOptions::new().read(true).write(true).open(CHANNEL)?;
    channel.write_all(b"{\"sleeps\":true}\n")?;
    let result = sleep();
    channel.write_all(b"{\"awake\":true}\n")?;
    loop {
        let line = read_line(&mut channel)?;
        if !line.trim().is_empty() {
            return match string_member(&line, "ok") {
                Some(_) => Ok(result),
                None => Err(refused(&line)),
            };
        }
    }
}

/// Asks the server of a device of our own, such as `trapped`, and returns its reply. Request and
/// reply are JSON; the requests are in the doc of `Server::ask` of `barlease-device`.
/// `{"stray":[FROM,TO]}` is answered by the lab, with `{"count":N}`: how many accesses to these
/// physical addresses QEMU has kept from all devices since it was started.
///
/// # Errors
///
/// `Other` with the host's reason.
pub fn ask_device(name: &str, request_text: &str) -> io::Result<String> {
    let name = quote(name);
    let reply = request(&format!(
        "{{\"device\":{{\"name\":{name},\"request\":{request_text}}}}}"
    ))?;
    if reply.trim_start().starts_with("{\"error\"") {
        Err(refused(&reply))
    } else {
        Ok(reply)
    }
}

fn refused(reply: &str) -> io::Error {
    let reason = string_member(reply, "error").unwrap_or_else(|| reply.trim().to_owned());
    io::Error::other(format!("the host refused: {reason}"))
}

fn request(line: &str) -> io::Result<String> {
    if line.contains('\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a request is one line",
        ));
    }
    let _turn = Turn::take()?;
    let mut channel = OpenOptions::new().read(true).write(true).open(CHANNEL)?;
    channel.write_all(format!("{line}\n").as_bytes())?;
    read_line(&mut channel)
}

/// Holds the turn on the control channel.
///
/// An abstract socket name has one owner at a time, whatever its uid, and none once that process is
/// gone.
struct Turn {
    _owner: UnixListener,
}

impl Turn {
    fn take() -> io::Result<Self> {
        let name = SocketAddr::from_abstract_name(b"barlease-control")?;
        loop {
            match UnixListener::bind_addr(&name) {
                Ok(owner) => return Ok(Self { _owner: owner }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    thread::sleep(Duration::from_millis(2))
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Reads a reply. After its line nothing comes until the next request; before it there may be empty
/// ones, which are to wake a guest.
fn read_line(channel: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut part = [0; 512];
    loop {
        match channel.read(&mut part)? {
            0 => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the control channel is closed",
                ));
            }
            length => line.extend_from_slice(&part[..length]),
        }
        if let Some(line) = line.strip_suffix(b"\n") {
            return Ok(String::from_utf8_lossy(line).trim_start().to_owned());
        }
    }
}

fn parse_device(line: &str) -> Option<Device> {
    let mut words = line.splitn(3, ' ');
    Some(Device {
        bdf: words.next()?.to_owned(),
        name: words.next()?.to_owned(),
        about: words.next().unwrap_or_default().to_owned(),
    })
}

/// A JSON string literal.
fn quote(text: &str) -> String {
    let mut literal = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => literal.extend(['\\', c]),
            c if c.is_control() => literal.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => literal.push(c),
        }
    }
    literal.push('"');
    literal
}

/// The value of `{"name":"value"}`; the replies have no other shape.
fn string_member(object: &str, name: &str) -> Option<String> {
    let rest = object.trim().strip_prefix(&format!("{{{}:", quote(name)))?;
    let mut chars = rest.trim_start().strip_prefix('"')?.chars();
    let mut value = String::new();
    loop {
        match chars.next()? {
            '"' => return Some(value),
            '\\' => match chars.next()? {
                'n' => value.push('\n'),
                't' => value.push('\t'),
                'u' => {
                    let digits: String = chars.by_ref().take(4).collect();
                    value.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
                }
                c => value.push(c),
            },
            c => value.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_line_has_address_name_and_text() {
        let device = parse_device("0000:00:02.0 display a picture").unwrap();
        assert_eq!(
            (device.bdf.as_str(), device.name.as_str()),
            ("0000:00:02.0", "display")
        );
        assert_eq!(device.about, "a picture");
        assert_eq!(parse_device("0000:00:02.0"), None);
    }

    #[test]
    fn strings_survive_quoting() {
        for text in [
            "plain",
            "a \"quoted\" \\ one",
            "line\nbreak",
            "tab\tand \u{1}",
        ] {
            let object = format!("{{\"ok\":{}}}", quote(text));
            assert_eq!(string_member(&object, "ok").as_deref(), Some(text));
        }
    }

    #[test]
    fn a_reply_is_a_line_however_it_comes() {
        // As a serial port gives it: some bytes at a time.
        let mut parts = (&b"{\"re"[..]).chain(&b"turn\":"[..]).chain(&b"{}}\n"[..]);
        assert_eq!(read_line(&mut parts).unwrap(), "{\"return\":{}}");
        assert_eq!(read_line(&mut &b"\n\n{}\n"[..]).unwrap(), "{}");
        assert_eq!(read_line(&mut &b"\n"[..]).unwrap(), "");
        let error = read_line(&mut &b"half"[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn another_member_is_not_taken() {
        assert_eq!(string_member("{\"error\":\"no\"}", "ok"), None);
    }

    #[test]
    fn a_truncated_reply_is_none() {
        assert_eq!(string_member("{\"ok\":\"half", "ok"), None);
    }
}
