//! Commands that go to the service `barleased`.

mod acquire;
pub(crate) mod args;
mod broker;
pub(crate) mod holder;
mod list;
mod news;
mod revoke;

use std::io;
use std::path::Path;

use barlease_proto::Client;
use barlease_proto::Error;
use barlease_proto::Refusal;
use rustix::io::Errno;

pub(crate) use self::acquire::acquire;
pub(crate) use self::broker::broker;
pub(crate) use self::list::list;
pub(crate) use self::news::monitor;
pub(crate) use self::news::watch;
pub(crate) use self::revoke::release;
pub(crate) use self::revoke::renew;
pub(crate) use self::revoke::revoke;
use crate::failure::Failure;

/// Connects to the service.
pub(crate) fn connect(socket: &Path) -> Result<Client, Failure> {
    Client::connect(socket).map_err(|error| {
        let Error::Io { source, .. } = error else {
            return failed("connect", &socket.display().to_string(), error);
        };
        let remedy = match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                "barleased does not serve there (systemctl status barleased; --service says where)"
            }
            io::ErrorKind::PermissionDenied => {
                "only administrators may look into the folder of a claim that is not theirs"
            }
            _ => return Failure::file("connect", socket, &source),
        };
        Failure::new(format!("connect: {}: {source}: {remedy}", socket.display()))
    })
}

/// A call that failed.
pub(crate) fn failed(operation: &str, object: &str, error: Error) -> Failure {
    match error {
        Error::Refused(refusal) => {
            let remedy = match *refusal {
                Refusal::NotAdministrator {} => " (run as root, or as the user of barleased)",
                Refusal::NotAllowed { .. } | Refusal::LimitReached { .. } => {
                    " (`barlease policy explain` says what each rule answers)"
                }
                _ => "",
            };
            let text = format!("{operation}: {object}: {refusal}{remedy}");
            let details = serde_json::to_value(&*refusal).unwrap_or_default();
            Failure::new(text).with_details(details)
        }
        Error::Io {
            operation: call,
            source,
        } => {
            let remedy = match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::MFILE) => " (raise the limit of open files, `ulimit -n`)",
                _ => "",
            };
            Failure::new(format!("{operation}: {object}: {call}: {source}{remedy}"))
        }
        Error::Other { name, .. } if name.ends_with("NotImplemented") => Failure::unsupported(
            format!("{operation}: {object}: barleased has no such method"),
        ),
        error => Failure::new(format!("{operation}: {object}: {error}")),
    }
}

/// Milliseconds since boot, as the service counts.
pub(crate) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let [seconds, nanoseconds] = [now.tv_sec, now.tv_nsec].map(|it| u64::try_from(it).unwrap_or(0));
    seconds * 1000 + nanoseconds / 1_000_000
}

/// A span for people: two digits or three, and a unit.
pub(crate) fn span(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    match seconds {
        0..10 => format!("{}.{}s", seconds, milliseconds % 1000 / 100),
        10..120 => format!("{seconds}s"),
        120..7200 => format!("{}min", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A value of an enumeration as the protocol writes it.
pub(crate) fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text.replace('_', "-"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_few_digits() {
        for (milliseconds, text) in [
            (0, "0.0s"),
            (9_990, "9.9s"),
            (10_000, "10s"),
            (119_000, "119s"),
            (120_000, "2min"),
            (7_200_000, "2h"),
            (172_800_000, "2d"),
        ] {
            assert_eq!(span(milliseconds), text);
        }
    }
}
