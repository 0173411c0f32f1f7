//! The kernel's own view of itself: debugfs, `/proc/PID/maps`, page faults.

use std::{
    cell::RefCell,
    fs::{self, File},
    io::Read,
    mem,
    path::Path,
    process::Command,
    thread,
};

use barlease_lab::guest;

use crate::{
    errno::EBUSY,
    pci::{self, Function},
    wait,
};

/// Whether the kernel has lockdep, as the debug kernel does.
#[must_use]
pub fn locks_are_watched() -> bool {
    Path::new("/proc/lockdep").exists()
}

/// Writes the name of the test that runs into the kernel's log, once a test.
pub fn mark_test() {
    thread_local! {
        static MARKED: RefCell<bool> = const { RefCell::new(false) };
    }
    // Each test has a thread of its own, named after it.
    if !MARKED.replace(true) {
        let thread = thread::current();
        mark(&format!("test {}", thread.name().unwrap_or("?")));
    }
}

/// Writes a line into the kernel's log.
pub fn mark(text: &str) {
    let _ = barlease_lab::guest::mark(text);
}

/// A line of the `buffers` file, as its header has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its columns.
    pub columns: Vec<(String, String)>,
}

impl Line {
    /// The contents of a column.
    ///
    /// # Panics
    ///
    /// When there is no such column.
    #[must_use]
    pub fn get(&self, column: &str) -> &str {
        let found = self.columns.iter().find(|(name, _)| name == column);
        match found {
            Some((_, value)) => value,
            None => panic!("no column {column}: {self:?}"),
        }
    }
}

/// The text of `/sys/kernel/debug/barlease/<BDF>/buffers`.
///
/// # Panics
///
/// When it is not there.
#[must_use]
pub fn buffers_text(function: &Function) -> String {
    let path = format!("/sys/kernel/debug/barlease/{}/buffers", function.bdf);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The lines of the `buffers` file.
///
/// # Panics
///
/// When it is not there, or a line has other columns than the header.
#[must_use]
pub fn buffers(function: &Function) -> Vec<Line> {
    let text = buffers_text(function);
    let mut lines = text.lines();
    let header: Vec<_> = lines
        .next()
        .expect("a header")
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    lines
        .map(|line| {
            let values: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            assert_eq!(values.len(), header.len(), "{line}");
            Line {
                columns: header.iter().cloned().zip(values).collect(),
            }
        })
        .collect()
}

/// Waits until a function has so many buffers: the last reference to a file may be dropped a little
/// after the call that gave it up.
///
/// # Panics
///
/// When that takes [long](wait::LONG).
pub fn wait_for_buffers(function: &Function, number: usize) {
    wait::until(&format!("{number} buffers"), || {
        buffers(function).len() == number
    });
}

/// The line of `/proc/self/maps` of the mapping at an address.
///
/// # Panics
///
/// When there is none.
#[must_use]
pub fn maps_line(address: usize) -> String {
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    let begins = format!("{address:x}-");
    let line = maps.lines().find(|line| line.starts_with(&begins));
    line.unwrap_or_else(|| panic!("no mapping begins at {address:x}"))
        .to_owned()
}

/// Minor page faults of this thread.
#[must_use]
pub fn faults() -> i64 {
    // SAFETY: All zeroes is valid.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: `usage` is valid for writes.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_minflt
}

/// The faults that `f` causes.
pub fn faults_of(mut f: impl FnMut()) -> i64 {
    let before = faults();
    f();
    faults() - before
}

/// Whether the kernel has page-table entries one level above pages for device memory: a real-time
/// kernel has none.
#[must_use]
pub fn has_entries_above_pages() -> bool {
    Path::new("/sys/kernel/mm/transparent_hugepage").exists()
}

/// Whether the kernel and the CPU have entries of 1 GiB for device memory.
///
/// # Panics
///
/// When the kernel does not tell about the CPU.
#[must_use]
pub fn has_entries_of_1_gib() -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").expect("cpuinfo");
    has_entries_above_pages() && cpu.split_whitespace().any(|flag| flag == "pdpe1gb")
}

/// Whether the kernel is one of the lab's own making without this option: those say what they have.
///
/// # Panics
///
/// When what it says cannot be read.
#[must_use]
pub fn kernel_lacks(option: &str) -> bool {
    const CONFIGURATION: &str = "/proc/config.gz";
    if !Path::new(CONFIGURATION).exists() {
        return false;
    }
    let output = Command::new("zcat").arg(CONFIGURATION).output();
    let text = String::from_utf8(output.expect("zcat").stdout).expect("text");
    assert!(text.contains("CONFIG_VFIO"), "{text}");
    !text
        .lines()
        .any(|line| line == format!("CONFIG_{option}=y"))
}

/// KiB of page tables of this process.
///
/// # Panics
///
/// When `/proc` does not say.
#[must_use]
pub fn page_tables() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .expect("VmPTE")
}

/// The kernel's log.
///
/// # Panics
///
/// When it cannot be read.
#[must_use]
pub fn kernel_log() -> String {
    let output = std::process::Command::new("dmesg").output();
    let output = output.expect("dmesg").stdout;
    String::from_utf8_lossy(&output).into_owned()
}

/// Random bytes.
///
/// # Panics
///
/// When there are none.
#[must_use]
pub fn random() -> u64 {
    let mut bytes = [0; 8];
    let mut file = File::open("/dev/urandom").expect("random numbers");
    file.read_exact(&mut bytes).expect("random numbers");
    u64::from_ne_bytes(bytes)
}

/// Has the system go to sleep as far as to freeze all processes, for a second. False where the
/// kernel cannot.
///
/// # Panics
///
/// When it can and does not.
pub fn pretend_to_sleep() -> bool {
    pretend_to_sleep_as_far_as("freezer")
}

/// The same, as far as a step that `/sys/power/pm_test` has, such as `devices`: these sleep, too,
/// and wake up.
///
/// # Panics
///
/// When the kernel can and does not.
pub fn pretend_to_sleep_as_far_as(step: &str) -> bool {
    if fs::write("/sys/power/pm_test", step).is_err() {
        return false;
    }
    let _ = fs::write("/sys/module/suspend/parameters/pm_test_delay", "1");
    fs::write("/sys/power/state", "mem").expect("sleep");
    fs::write("/sys/power/pm_test", "none").expect("no test of sleep");
    true
}

/// Has the system sleep (to idle: all devices sleep, processors too, until an interrupt wakes
/// them), and woken by the host.
///
/// # Panics
///
/// When it does not.
pub fn sleep() {
    let number = || fs::read_to_string("/sys/power/suspend_stats/success").expect("a number");
    let before = number();
    // Woken before it slept, it did not.
    wait::until("sleep", || {
        let slept =
            guest::woken_by_the_host(|| pci::write(Path::new("/sys/power/state"), "freeze"));
        match slept.expect("the host") {
            Ok(()) | Err(EBUSY) => number() != before,
            Err(errno) => panic!("sleep: {errno:?}"),
        }
    });
}
