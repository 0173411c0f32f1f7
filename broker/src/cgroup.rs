//! Control groups: the one that a process is in, and the end of its last process.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;
use std::sync::OnceLock;

use barlease_ledger::types::CgroupId;
use rustix::fs::inotify;
use rustix::fs::inotify::CreateFlags;
use rustix::fs::inotify::ReadFlags;
use rustix::fs::inotify::WatchFlags;
use rustix::io::Errno;

/// The file that changes when a group gets its first process, or loses its last.
const EVENTS: &str = "cgroup.events";

/// The hierarchy of version 2, if this host has one: where only that of version 1 is, or none of
/// its groups has processes, or the kernel does not tell of changes, no lease can live by a group.
fn hierarchy() -> Option<&'static Path> {
    static ROOT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let read = || {
        inotify::init(CreateFlags::CLOEXEC).ok()?;
        find_hierarchy(&fs::read_to_string("/proc/self/mountinfo").ok()?)
    };
    ROOT.get_or_init(read).as_deref()
}

/// Where the whole of it is mounted.
fn find_hierarchy(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        let is_it = after.split(' ').next() == Some("cgroup2") && root == "/";
        is_it.then(|| place.into())
    })
}

/// The directory of a group. Not of the root, which is never empty, nor of what is outside of this
/// process's namespace of groups.
fn directory(path: &str) -> Option<PathBuf> {
    let relative = Path::new(path.strip_prefix('/')?);
    let inside = |part| matches!(part, Component::Normal(_));
    let is_below = relative.components().all(inside) && !relative.as_os_str().is_empty();
    is_below.then_some(hierarchy()?.join(relative))
}

/// The id of a group, if a lease can live by it.
pub(crate) fn id(path: &str) -> Option<CgroupId> {
    let directory = directory(path)?;
    if !directory.join(EVENTS).exists() {
        return None;
    }
    // The number of its inode, which no other group has until the next boot.
    Some(CgroupId(fs::metadata(directory).ok()?.ino()))
}

/// Whether there is a process in the group, or in a group in it.
fn is_populated(directory: &Path) -> bool {
    // It is gone, or going, when this cannot be read.
    let events = fs::read_to_string(directory.join(EVENTS)).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}

#[derive(Debug)]
struct Watched {
    directory: PathBuf,
    /// Numbers of the watches of its file, and of the directory that it is in.
    numbers: [i32; 2],
}

impl Watched {
    fn is_over(&self, id: CgroupId) -> bool {
        let is_it = fs::metadata(&self.directory).is_ok_and(|found| found.ino() == id.0);
        !is_it || !is_populated(&self.directory)
    }
}

/// The groups that leases live by.
///
/// The end of the last process is told by a group's file, unless the group is removed within 10 ms
/// of an earlier change: the kernel tells of those at most so often, and forgets what it had still
/// to tell. Then the directory tells that it lost the group.
#[derive(Debug)]
pub(crate) struct Cgroups {
    /// `None` where the kernel has none.
    inotify: Option<OwnedFd>,
    watched: BTreeMap<CgroupId, Watched>,
    /// Groups by the number of a watch.
    groups: BTreeMap<i32, BTreeSet<CgroupId>>,
}

impl Cgroups {
    pub(crate) fn new() -> io::Result<Self> {
        let inotify = match inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK) {
            Err(Errno::NOSYS) => None,
            made => Some(made?),
        };
        Ok(Self {
            inotify,
            watched: BTreeMap::new(),
            groups: BTreeMap::new(),
        })
    }

    /// Readable when something has happened.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Watches a group. `NotFound`, too, if it is empty, or another group has its path by now. Other
    /// errors do not say that it is gone.
    pub(crate) fn watch(&mut self, id: CgroupId, path: &str) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let directory = directory(path).ok_or_else(gone)?;
        let parent = directory.parent().ok_or_else(gone)?;
        let file = directory.join(EVENTS);
        let inotify = self.inotify.as_ref().ok_or_else(gone)?;
        let numbers = inotify::add_watch(inotify, file, WatchFlags::MODIFY).and_then(|number| {
            let flags = WatchFlags::DELETE | WatchFlags::ONLYDIR;
            Ok([number, inotify::add_watch(inotify, parent, flags)?])
        });
        let numbers = match numbers {
            Ok(numbers) => numbers,
            Err(error) => {
                // Where no more can be watched, it is at least looked at.
                let numbers = [-1, -1];
                let is_over = Watched { directory, numbers }.is_over(id);
                return Err(if is_over { gone() } else { error.into() });
            }
        };
        for number in numbers {
            self.groups.entry(number).or_default().insert(id);
        }
        let watched = Watched { directory, numbers };
        // After the watches have begun, so that no end is missed.
        let is_over = watched.is_over(id);
        self.watched.insert(id, watched);
        if is_over {
            self.unwatch(id);
            return Err(gone());
        }
        Ok(())
    }

    pub(crate) fn unwatch(&mut self, id: CgroupId) {
        for number in self.watched.remove(&id).into_iter().flat_map(|w| w.numbers) {
            if let Some(groups) = self.groups.get_mut(&number) {
                groups.remove(&id);
                if groups.is_empty() {
                    self.groups.remove(&number);
                    // It may be gone with the group.
                    if let Some(inotify) = &self.inotify {
                        let _ = inotify::remove_watch(inotify, number);
                    }
                }
            }
        }
    }

    /// The groups that are over by now, of those that something happened to. They are watched no
    /// longer.
    pub(crate) fn ended(&mut self) -> Vec<CgroupId> {
        let Some(inotify) = &self.inotify else {
            return Vec::new();
        };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        let mut stirred = BTreeSet::new();
        while let Ok(event) = reader.next() {
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                stirred.extend(self.watched.keys());
            }
            stirred.extend(self.groups.get(&event.wd()).into_iter().flatten());
        }
        let is_over = |id: &CgroupId| self.watched.get(id).is_some_and(|w| w.is_over(*id));
        stirred.retain(is_over);
        for id in &stirred {
            self.unwatch(*id);
        }
        stirred.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
        29 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n\
        30 29 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n\
        31 29 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
    const VERSION_1: &str = "31 29 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const PART: &str = "30 29 0:27 /box /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_hierarchy_of_version_2_is_found_and_no_other() {
        let unified = Some("/sys/fs/cgroup/unified".into());
        assert_eq!(find_hierarchy(HYBRID), unified);
        assert_eq!(find_hierarchy(VERSION_1), None);
        assert_eq!(find_hierarchy(PART), None);
    }

    #[test]
    fn the_root_and_what_is_outside_are_no_groups_to_live_by() {
        for path in ["", "/", "/..", "/../x", "x", "/no-such-group-of-anybody"] {
            assert_eq!(id(path), None, "{path}");
        }
    }
}
