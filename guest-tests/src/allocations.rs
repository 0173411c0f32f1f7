//! The memory that the kernel allocates for this process, from its trace.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: [&str; 4] = ["kmalloc", "kmem_cache_alloc", "kfree", "kmem_cache_free"];

/// The kernel's trace of the allocations of this thread, which is on for the time of one call. One
/// at a time.
#[derive(Debug)]
pub struct Trace(());

/// The memory that something keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kept {
    /// Bytes, as the allocators round them up.
    pub bytes: u64,
    /// Allocations.
    pub allocations: usize,
}

impl Trace {
    /// Gets the trace ready; `None` where the kernel has none.
    ///
    /// # Panics
    ///
    /// When it has one that does not work.
    #[must_use]
    pub fn new() -> Option<Self> {
        if !Path::new(TRACING).exists() {
            return None;
        }
        if !Path::new(TRACING).join("tracing_on").exists() {
            let mut mount = Command::new("mount");
            let status = mount.args(["-t", "tracefs", "tracefs", TRACING]).status();
            assert!(status.expect("mount").success());
        }
        // SAFETY: Has no argument.
        let thread = unsafe { libc::gettid() };
        write("tracing_on", "0");
        write("set_event_pid", &thread.to_string());
        for event in EVENTS {
            write(&format!("events/kmem/{event}/enable"), "1");
        }
        Some(Self(()))
    }

    /// The memory that the kernel allocates while `make` runs and has not freed at its end.
    ///
    /// # Panics
    ///
    /// When the trace cannot be read.
    pub fn of<T>(&self, make: impl FnOnce() -> T) -> (T, Kept) {
        write("trace", "");
        write("tracing_on", "1");
        let made = make();
        write("tracing_on", "0");
        let text = fs::read_to_string(Path::new(TRACING).join("trace")).expect("a trace");
        (made, kept(&text))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        write("events/kmem/enable", "0");
        write("set_event_pid", "");
    }
}

fn write(file: &str, text: &str) {
    let path = Path::new(TRACING).join(file);
    fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// The allocations of a trace that were not freed.
fn kept(trace: &str) -> Kept {
    let mut live = BTreeMap::new();
    let lines = trace.lines().filter(|line| !line.starts_with('#'));
    for line in lines {
        let field = |name: &str| {
            let word = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name));
            word.map(str::to_owned)
        };
        // Other files of tracing are opened and closed by this process, too.
        let Some(address) = field("ptr=") else {
            continue;
        };
        match field("bytes_alloc=").and_then(|bytes| bytes.parse::<u64>().ok()) {
            Some(bytes) => live.insert(address, bytes),
            None => live.remove(&address),
        };
    }
    Kept {
        allocations: live.len(),
        bytes: live.values().sum(),
    }
}
