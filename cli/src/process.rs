//! The identity of a process, from /proc; facts that may not be read are left out.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    pub(crate) command: String,
    /// Its program. Of another user's process root alone may know it.
    pub(crate) exe: Option<String>,
    /// The unit of systemd that it is of: a service or a scope.
    pub(crate) unit: Option<String>,
    /// The container that it is in: the id or name that its engine gave.
    pub(crate) container: Option<String>,
}

impl Process {
    pub(crate) fn of(proc: &Path, pid: u32) -> Self {
        let folder = proc.join(pid.to_string());
        let text = |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default();
        let exe = fs::read_link(folder.join("exe")).ok();
        let cgroup = text("cgroup");
        Self {
            pid,
            uid: fs::metadata(&folder).map_or(u32::MAX, |it| it.uid()),
            command: text("comm").trim().to_owned(),
            exe: exe.map(|path| path.display().to_string()),
            unit: unit(&cgroup),
            container: container(&cgroup),
        }
    }
}

/// Path in the one hierarchy of version 2, or that of systemd in version 1.
fn path(cgroup: &str) -> Option<&str> {
    let line = |start: &str| cgroup.lines().find_map(|line| line.strip_prefix(start));
    let named = || {
        let lines = cgroup.lines();
        let mut named = lines.filter_map(|line| line.split_once(":name=systemd:"));
        named.next().map(|(_, path)| path)
    };
    line("0::").filter(|path| *path != "/").or_else(named)
}

/// The innermost unit: a service may have groups of its own below it.
fn unit(cgroup: &str) -> Option<String> {
    let mut parts = path(cgroup)?.rsplit('/');
    let is_unit = |part: &&str| part.ends_with(".service") || part.ends_with(".scope");
    parts.find(is_unit).map(str::to_owned)
}

/// By the names that engines give to groups: `docker-ID.scope`, `libpod-ID.scope`,
/// `cri-containerd-ID.scope`, `crio-ID.scope`, `/docker/ID`, `/lxc/NAME`, `lxc.payload.NAME`, and
/// `machine-NAME.scope` of systemd's.
fn container(cgroup: &str) -> Option<String> {
    let parts: Vec<&str> = path(cgroup)?.split('/').collect();
    for (n, part) in parts.iter().enumerate().rev() {
        let scope = part.strip_suffix(".scope");
        let engine = ["docker-", "libpod-", "cri-containerd-", "crio-", "machine-"];
        let name = engine
            .iter()
            .find_map(|engine| scope?.strip_prefix(engine))
            .or_else(|| part.strip_prefix("lxc.payload."));
        let folder = n.checked_sub(1).and_then(|n| parts.get(n));
        let name = name
            .or_else(|| matches!(folder, Some(&"docker" | &"lxc" | &"libpod")).then_some(*part));
        if let Some(name) = name.filter(|name| !name.is_empty() && !name.starts_with("conmon")) {
            // As systemd escapes what a name may not have.
            return Some(name.replace("\\x2d", "-"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_containers_are_told_by_their_groups() {
        let told = |text: &str| (unit(text), container(text));
        let some = |text: &str| Some(text.to_owned());
        for (text, wanted) in [
            ("0::/\n", (None, None)),
            ("", (None, None)),
            (
                "0::/system.slice/ovs.service/dpdk\n",
                (some("ovs.service"), None),
            ),
            (
                "0::/user.slice/user-0.slice/session-3.scope\n",
                (some("session-3.scope"), None),
            ),
            (
                "0::/system.slice/docker-0123abcd.scope\n",
                (some("docker-0123abcd.scope"), some("0123abcd")),
            ),
            (
                "0::/machine.slice/libpod-77.scope/container\n",
                (some("libpod-77.scope"), some("77")),
            ),
            (
                "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-9f.scope\n",
                (some("cri-containerd-9f.scope"), some("9f")),
            ),
            ("0::/docker/0123abcd\n", (None, some("0123abcd"))),
            (
                "0::/lxc.payload.web/init.scope\n",
                (some("init.scope"), some("web")),
            ),
            (
                "0::/machine.slice/machine-a\\x2db.scope\n",
                (some("machine-a\\x2db.scope"), some("a-b")),
            ),
            (
                "12:pids:/x\n1:name=systemd:/system.slice/a.service\n0::/\n",
                (some("a.service"), None),
            ),
        ] {
            assert_eq!(told(text), wanted, "{text}");
        }
    }

    #[test]
    fn a_process_says_who_it_is() {
        let us = Process::of(Path::new("/proc"), std::process::id());
        let exe = std::env::current_exe().unwrap();
        assert_eq!(us.exe, Some(exe.display().to_string()));
        assert!(!us.command.is_empty());
    }
}
