//! Finds in a kernel's log what must never be there.

/// Where the guest's init has taken over; it writes this line first.
pub(crate) const INIT_STARTED: &str = "barlease-lab: init started";

/// What makes a run fail when it is in a line of the log.
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

/// Lines before and after a sign that are shown.
const BEFORE: usize = 2;
/// KASAN says where memory was allocated and freed, lockdep where each lock was taken: these are long.
const AFTER: usize = 120;

/// What reports end with.
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
    /// How many lines with signs the log has.
    pub total: usize,
    /// Whether it is the known fault of the emulator: an `Oops: int3` before init has started.
    pub emulator_fault: bool,
}

/// Looks through a log.
#[must_use]
pub fn scan(log: &str) -> Option<Splat> {
    let lines: Vec<_> = log.lines().map(str::trim_end).collect();
    let found: Vec<_> = (0..lines.len()).filter(|at| is_splat(lines[*at])).collect();
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
        total: found.len(),
        emulator_fault: started.is_none() && lines[first].contains("Oops: int3"),
    })
}

fn is_splat(line: &str) -> bool {
    SIGNS.iter().any(|sign| line.contains(sign))
        && !HARMLESS.iter().any(|harmless| line.contains(harmless))
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
        ] {
            let log = format!("{QUIET}[    1.0] {line}\n[    1.1] Call Trace:\n");
            let splat = scan(&log).unwrap_or_else(|| panic!("not found: {line}"));
            assert!(splat.excerpt.contains("Call Trace:"));
            assert!(!splat.emulator_fault, "{line}");
        }
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
