//! The process that has a lease, as /proc of this host tells.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use barlease_proto::Holder;

/// The program of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Program {
    /// Its file; of processes of others for root only.
    pub(crate) exe: Option<String>,
    /// The name of the process.
    pub(crate) command: Option<String>,
}

impl Program {
    /// For people.
    pub(crate) fn shown(&self) -> String {
        match (&self.exe, &self.command) {
            (Some(exe), _) => exe.clone(),
            (None, Some(command)) => format!("[{command}]"),
            (None, None) => "-".to_owned(),
        }
    }
}

/// The program of a holder whose lease is from `since`, in milliseconds since boot. Nothing, if the
/// process of that number is another one: of another user, or younger than the lease.
pub(crate) fn program(holder: &Holder, since: u64) -> Program {
    program_in(Path::new("/proc"), holder, since)
}

fn program_in(proc: &Path, holder: &Holder, since: u64) -> Program {
    let folder = proc.join(holder.pid.to_string());
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let found = || {
        let is_its = fs::metadata(&folder).ok()?.uid() == holder.uid;
        let began = began(&read("stat")?)?;
        (is_its && began <= since).then(|| Program {
            exe: fs::read_link(folder.join("exe"))
                .ok()
                .map(|path| path.display().to_string()),
            command: read("comm").map(|name| name.trim_end().to_owned()),
        })
    };
    found().unwrap_or_default()
}

/// The start of a process in milliseconds since boot: field 22, in ticks. The name, which is the
/// second, may have anything in it.
fn began(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let ticks: u64 = rest.split(' ').nth(19)?.parse().ok()?;
    Some(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> Holder {
        Holder {
            uid: rustix::process::geteuid().as_raw(),
            gid: 0,
            pid: std::process::id(),
            unit: None,
            claim: None,
        }
    }

    #[test]
    fn the_program_of_a_process_is_known_if_it_is_the_holder() {
        let now = super::super::now();
        let program = program_in(Path::new("/proc"), &me(), now);
        let exe = std::env::current_exe().unwrap();
        assert_eq!(program.exe, Some(exe.display().to_string()));
        assert!(program.command.is_some());
        // The number is another process's now.
        let other = Holder {
            uid: me().uid + 1,
            ..me()
        };
        assert_eq!(
            program_in(Path::new("/proc"), &other, now),
            Program::default()
        );
        assert_eq!(program_in(Path::new("/proc"), &me(), 0), Program::default());
    }

    #[test]
    fn a_name_may_look_like_fields() {
        let fields = "S 1 1 1 0 -1 4194560 1 1 0 0 1 1 0 0 20 0 1 0 500 1 1";
        let ticks = rustix::param::clock_ticks_per_second();
        let stat = format!("7 (a) b (c) {fields}");
        assert_eq!(began(&stat), Some(500 * 1000 / ticks));
    }
}
