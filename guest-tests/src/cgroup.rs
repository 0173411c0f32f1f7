//! Memory control groups (`Documentation/admin-guide/cgroup-v2.rst`).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{errno::EBUSY, pci::write, wait};

const ROOT: &str = "/sys/fs/cgroup";

/// A memory control group, removed when dropped: nobody may be in it then.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// A new one. `None` where the kernel has no such thing.
    ///
    /// # Panics
    ///
    /// When it has, and that does not work.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let root = Path::new(ROOT);
        if !root.exists() {
            return None;
        }
        if !root.join("cgroup.procs").exists() {
            let mut mount = Command::new("mount");
            let status = mount.args(["-t", "cgroup2", "none", ROOT]).status();
            assert!(status.expect("mount").success());
        }
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).expect("controllers");
        if !controllers.split_whitespace().any(|name| name == "memory") {
            return None;
        }
        write(&root.join("cgroup.subtree_control"), "+memory").expect("the memory controller");
        let group = root.join(name);
        fs::create_dir(&group).expect("a control group");
        Some(Self(group))
    }

    /// Puts this process into it.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn enter(&self) {
        write(&self.0.join("cgroup.procs"), "0").expect("enter a control group");
    }

    /// Sets a value, such as that of `memory.high`.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn set(&self, file: &str, value: &str) {
        write(&self.0.join(file), value).expect("set a value");
    }

    /// How often something has happened, by its name in `memory.events`.
    ///
    /// # Panics
    ///
    /// When the kernel does not say.
    #[must_use]
    pub fn events(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.0.join("memory.events")).expect("memory.events");
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        let number = lines.find(|line| line.0 == name).map(|line| line.1);
        number.expect("a count").parse().expect("a number")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has ended may be in it for a moment.
        wait::until("an empty control group", || match fs::remove_dir(&self.0) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(crate::errno::Errno::of(&error), EBUSY);
                false
            }
        });
    }
}
