//! Finds in a kernel's log what must never be there.

use crate::guests::series::BEGINS;

/// Where the guest's init has taken over; it writes this line first.
pub(crate) const INIT_STARTED: &str = "barlease-lab: init started";

/// Words that make a run fail when they are in a line of the log.
const SIGNS: &[&str] = &[
    "BUG:",
    "Oops:",
    "WARNING:",
    "KASAN:",
    "KCSAN:",
    "KFENCE:",
    "UBSAN:",
    "possible circular locking dependency",
    "possible recursive locking",
    "possible irq lock inversion",
    "possible deadlock",
    "inconsistent lock state",
    "suspicious RCU usage",
    "bad unlock balance",
    "held lock freed",
    "trying to register non-static key",
    "turning off the locking correctness validator",
    "lock held when returning to user space",
    "general protection fault",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "self-detected stall",
    "detected stalls on CPUs",
    "detected expedited stalls",
    "refcount_t:",
    "scheduling while atomic",
    "sleeping function called from invalid context",
    "Kernel panic",
    "kernel BUG at",
    // An entry of a page table that is none.
    ": bad pgd ",
    ": bad p4d ",
    ": bad pud ",
    ": bad pmd ",
    "list_add corruption",
    "list_del corruption",
    "rust_kernel: panicked",
    "unreferenced object",
];

/// Lines with a sign that are harmless, with the reason of each.
const HARMLESS: &[&str] = &[
    // A test that marks its name in the log may have such a word in it.
    "barlease-lab: ",
];

/// The line of a kernel with KCSAN at boot.
const WATCHES_RACES: &str = "kcsan: enabled";
/// Lines with a sign that are harmless there, with the reason of each. In the middle of an access
/// KCSAN waits, so races of the kernel's own come true that nobody meets elsewhere.
const HARMLESS_WITH_KCSAN: &[&str] = &[
    // `pci_cfg_access_lock` sets a bit of `struct pci_dev` under `pci_lock`, and
    // `pci_clear_master`, called by `vfio_pci_core_enable`, clears its neighbour without: a reset
    // through sysfs during an open loses the lock's bit.
    "WARNING: at pci_cfg_access_unlock+",
];

/// How KCSAN's reports begin. It watches the whole kernel, whose own code has data races: a report
/// counts when one of our modules is in one of its traces, and had not passed on an operation to
/// the kernel's own driver.
const RACE: &str = "BUG: KCSAN:";
/// The mark of our modules in a trace.
const OURS: &str = "[barlease";

/// The operations of the stock driver, and of the PCI bus, that ours passes on. They do
/// the same with the stock driver, under the same locks.
const PASSED_ON: &[&str] = &[
    "pci_pm_runtime_resume",
    "vfio_pci_core_aer_err_detected",
    "vfio_pci_core_close_device",
    "vfio_pci_core_enable",
    "vfio_pci_core_finish_enable",
    "vfio_pci_core_init_dev",
    "vfio_pci_core_ioctl",
    "vfio_pci_core_ioctl_feature",
    "vfio_pci_core_mmap",
    "vfio_pci_core_read",
    "vfio_pci_core_register_device",
    "vfio_pci_core_release_dev",
    "vfio_pci_core_sriov_configure",
    "vfio_pci_core_unregister_device",
    "vfio_pci_core_write",
    "vfio_pci_ioctl_get_region_info",
];

/// Functions of the kernel whose own accesses race with each other, whoever calls them.
///
/// A new file takes a reference to its maker's credentials: `get_cred_many`, inlined there, writes
/// 0 to `non_rcu` each time.
const RACE_WITH_EACH_OTHER: &[&str] = &["alloc_empty_file"];

/// Lines before and after a sign that are shown.
const BEFORE: usize = 2;
/// KASAN says where memory was allocated and freed, lockdep where each lock was taken: these are
/// long.
const AFTER: usize = 120;

/// The end of a report.
const ENDS: &[&str] = &[
    "---[ end trace",
    "==================================================================",
];

/// The first thing found in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splat {
    /// The line that has the sign.
    pub line: String,
    /// That line with what is around it.
    pub excerpt: String,
    /// The [part](crate::guests::series) during which it came, in a guest that runs several.
    pub part: Option<String>,
    /// How many lines with signs the log has.
    pub total: usize,
    /// Whether it is the known fault of the emulator: an `Oops: int3` before init has started.
    pub emulator_fault: bool,
}

/// Looks through a log.
#[must_use]
pub fn scan(log: &str) -> Option<Splat> {
    let lines: Vec<_> = log.lines().map(str::trim_end).collect();
    let kcsan = lines.iter().any(|line| line.contains(WATCHES_RACES));
    let excused: &[&str] = if kcsan { HARMLESS_WITH_KCSAN } else { &[] };
    let found: Vec<_> = (0..lines.len())
        .filter(|at| is_splat(lines[*at]) && !is_race_of_others(&lines[*at..]))
        .filter(|at| !excused.iter().any(|excuse| lines[*at].contains(excuse)))
        .collect();
    let first = *found.first()?;
    let started = lines.iter().position(|line| line.contains(INIT_STARTED));
    let end = lines[first..]
        .iter()
        .position(|line| ENDS.iter().any(|end| line.contains(end)))
        .map_or(AFTER, |n| n.min(AFTER));
    let from = first.saturating_sub(BEFORE);
    let to = lines.len().min(first + end + 1);
    Some(Splat {
        line: lines[first].to_owned(),
        excerpt: lines[from..to].join("\n"),
        part: lines[..first].iter().rev().find_map(|line| part(line)),
        total: found.len(),
        emulator_fault: started.is_none() && lines[first].contains("Oops: int3"),
    })
}

/// The part that begins with this line.
fn part(line: &str) -> Option<String> {
    let (_, name) = line.split_once(BEGINS)?;
    Some(name.to_owned())
}

fn is_splat(line: &str) -> bool {
    SIGNS.iter().any(|sign| line.contains(sign))
        && !HARMLESS.iter().any(|harmless| line.contains(harmless))
}

/// How many data races of the kernel's own code a log has.
#[must_use]
pub fn races_of_others(log: &str) -> usize {
    let lines: Vec<_> = log.lines().map(str::trim_end).collect();
    let is_one = |at: &usize| lines[*at].contains(RACE) && is_race_of_others(&lines[*at..]);
    (0..lines.len()).filter(is_one).count()
}

/// Whether a report of KCSAN's that begins with the first line is not ours.
fn is_race_of_others(report: &[&str]) -> bool {
    let end = |line: &&str| ENDS.iter().any(|end| line.contains(end));
    let body = report.iter().position(end).unwrap_or(report.len());
    report[0].contains(RACE)
        && !report[..body]
            .split(|line| frame(line).is_none())
            .any(is_ours)
}

/// Whether an access with this trace, from the innermost function on, is ours. An access
/// in an interrupt is not one of the code that was interrupted.
fn is_ours(trace: &[&str]) -> bool {
    let is_entry = |line: &&str| frame(line).is_some_and(is_interrupt);
    let end = trace.iter().position(is_entry).unwrap_or(trace.len());
    let Some(at) = trace[..end].iter().position(|line| line.contains(OURS)) else {
        return false;
    };
    let innermost = frame(trace[0]);
    if innermost.is_some_and(|innermost| RACE_WITH_EACH_OTHER.contains(&innermost)) {
        return false;
    }
    let called = at.checked_sub(1).and_then(|at| frame(trace[at]));
    !called.is_some_and(|called| PASSED_ON.contains(&called))
}

/// Whether this is where the processor enters the kernel for an interrupt.
fn is_interrupt(function: &str) -> bool {
    function.starts_with("asm_sysvec_") || function == "asm_common_interrupt"
}

/// The function in a line of a trace.
fn frame(line: &str) -> Option<&str> {
    let (before, offset) = line.split_once("+0x")?;
    let is_trace = !line.contains("KCSAN") && offset.contains("/0x");
    is_trace.then(|| before.rsplit(' ').next().unwrap_or(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: &str = "[    0.0] Linux version 7.3-amd64\n\
                         [    0.1] Spectre V2 : Mitigation: Retpolines\n\
                         [    0.2] barlease-lab: init started\n\
                         [    0.3] barlease-lab: test a_WARNING:_is_reported\n\
                         [    0.4] reboot: Power down\n";

    #[test]
    fn a_quiet_log_has_none() {
        assert_eq!(scan(QUIET), None);
        assert_eq!(scan(""), None);
    }

    #[test]
    fn each_sign_is_found_in_a_line_as_the_kernel_writes_it() {
        for line in [
            "WARNING: drivers/x.c:1 at thing+0x1/0x2, CPU#0: sh/1",
            "WARNING: possible circular locking dependency detected",
            "BUG: KASAN: slab-use-after-free in thing+0x1/0x2",
            "BUG: sleeping function called from invalid context at x.c:1",
            "Oops: general protection fault, probably for non-canonical address 0x1",
            "UBSAN: array-index-out-of-bounds in x.c:1:2",
            "INFO: task sh:1 blocked for more than 120 seconds.",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:1]",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "refcount_t: underflow; use-after-free.",
            "Kernel panic - not syncing: Attempted to kill init!",
            "WARNING: suspicious RCU usage",
            "mm/pgtable-generic.c:42: bad pud 00000000a1b2c3d4(8000000380000be7)",
        ] {
            let log = format!("{QUIET}[    1.0] {line}\n[    1.1] Call Trace:\n");
            let splat = scan(&log).unwrap_or_else(|| panic!("not found: {line}"));
            assert!(splat.excerpt.contains("Call Trace:"));
            assert!(!splat.emulator_fault, "{line}");
        }
    }

    #[test]
    fn the_part_during_which_it_came_is_named() {
        let log = "[    1.0] barlease-lab: begins first\n\
                   [    2.0] barlease-lab: begins second\n\
                   [    2.1] WARNING: here\n\
                   [    3.0] barlease-lab: begins third\n\
                   [    3.1] WARNING: there\n";
        assert_eq!(scan(log).unwrap().part.as_deref(), Some("second"));
        assert_eq!(scan("WARNING: here\n").unwrap().part, None);
    }

    #[test]
    fn the_excerpt_ends_with_the_trace() {
        let log = "before\nWARNING: here\nbody\n---[ end trace 0 ]---\nafter\n";
        let splat = scan(log).unwrap();
        assert_eq!(
            splat.excerpt,
            "before\nWARNING: here\nbody\n---[ end trace 0 ]---"
        );
        assert_eq!(splat.line, "WARNING: here");
    }

    #[test]
    fn a_data_race_counts_when_one_of_our_modules_has_made_an_access() {
        let report = |trace: &[&str]| {
            let frames: Vec<_> = trace
                .iter()
                .map(|frame| format!("[    1.0]  {frame}\n"))
                .collect();
            format!(
                "==================================================================\n\
                 [    1.0] BUG: KCSAN: data-race in f / g\n\
                 [    1.0]\n\
                 [    1.0] write to 0xffff888008fc55f0 of 8 bytes by task 71 on cpu 0:\n\
                 [    1.0]  f+0x1/0x2\n\
                 [    1.0]\n\
                 [    1.0] read to 0xffff888008fc55f0 of 8 bytes by task 72 on cpu 1:\n\
                 {}\
                 [    1.0]\n\
                 [    1.0] Modules linked in: barlease_vfio_pci(O) [last unloaded: barlease_importer(O)]\n\
                 ==================================================================\n",
                frames.concat()
            )
        };
        let ioctl = "barlease_ioctl+0x1/0x2 [barlease_vfio_pci]";
        let others = [
            report(&["g+0x1/0x2", "x64_sys_call+0x1/0x2"]),
            report(&["g+0x1/0x2", "vfio_pci_core_ioctl+0x1/0x2", ioctl]),
            report(&["vfio_pci_core_ioctl+0x1/0x2", ioctl]),
            report(&[
                "g+0x1/0x2",
                "asm_sysvec_apic_timer_interrupt+0x1/0x2",
                ioctl,
            ]),
            report(&["g+0x1/0x2", "asm_common_interrupt+0x1/0x2", ioctl]),
            report(&["alloc_empty_file+0x1/0x2", "dma_buf_export+0x1/0x2", ioctl]),
        ];
        for log in &others {
            assert_eq!(scan(log), None, "{log}");
            assert_eq!(races_of_others(log), 1, "{log}");
        }
        let ours = [
            report(&[ioctl]),
            report(&["down_read+0x1/0x2", ioctl]),
            report(&["g+0x1/0x2", "alloc_empty_file+0x1/0x2", ioctl]),
            report(&["down_read+0x1/0x2", ioctl, "asm_exc_page_fault+0x1/0x2"]),
            report(&["vfio_pci_core_ioctl+0x1/0x2", "down_read+0x1/0x2", ioctl]),
            report(&[ioctl, "vfio_pci_core_ioctl+0x1/0x2", ioctl]),
        ];
        for log in &ours {
            assert_eq!(scan(log).map(|splat| splat.total), Some(1), "{log}");
            assert_eq!(races_of_others(log), 0, "{log}");
        }
        let all = [others.concat(), ours.concat(), others.concat()].concat();
        assert_eq!(scan(&all).map(|splat| splat.total), Some(ours.len()));
        assert_eq!(races_of_others(&all), 2 * others.len());
    }

    #[test]
    fn what_only_kcsan_brings_about_is_harmless_there_only() {
        let log = "[    1.0] WARNING: at pci_cfg_access_unlock+0x6f/0x80, CPU#0: x/1\n";
        assert!(scan(log).is_some());
        let there = format!("[    0.1] kcsan: enabled early\n{log}");
        assert_eq!(scan(&there), None);
        let other = format!("{there}[    2.0] WARNING: at pci_disable+0x1/0x2, CPU#0: x/1\n");
        assert_eq!(scan(&other).map(|splat| splat.total), Some(1));
    }

    #[test]
    fn only_the_int3_oops_before_init_is_the_emulators() {
        let oops = "[    0.1] Oops: int3: 0000 [#1] SMP NOPTI\n";
        assert!(scan(oops).unwrap().emulator_fault);
        assert!(!scan(&format!("{QUIET}{oops}")).unwrap().emulator_fault);
        assert!(
            !scan(&format!("WARNING: first\n{oops}"))
                .unwrap()
                .emulator_fault
        );
        assert!(!scan("[    0.1] Oops: 0000 [#1]\n").unwrap().emulator_fault);
    }
}
