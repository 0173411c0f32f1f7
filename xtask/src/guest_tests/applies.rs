//! Guest tests that do not apply on an architecture, and why. A run says what it leaves out.

use barlease_lab::arch::Arch;

/// A test binary, or some of its tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeftOut {
    arch: Arch,
    /// The file in `guest-tests/tests/` without `.rs`.
    pub(crate) binary: &'static str,
    /// Parts of the names of its tests; all of them when empty.
    pub(crate) tests: &'static [&'static str],
    pub(crate) why: &'static str,
}

/// The kernel has no peer-to-peer DMA through the host bridge of QEMU's machine, which is on none
/// of its lists (`pci_p2pdma_distance`); with the stock driver, too.
const NO_PEER: &str = "the kernel does not know that machine's host bridge as one that passes \
                       peer-to-peer DMA on";

const LIST: &[LeftOut] = &[
    LeftOut {
        arch: Arch::Arm64,
        binary: "nopat",
        tests: &[],
        why: "the page attribute table is x86's",
    },
    LeftOut {
        arch: Arch::Arm64,
        binary: "p2p_route",
        tests: &[],
        why: "a second host bridge is found by firmware only, which that machine boots without",
    },
    LeftOut {
        arch: Arch::Arm64,
        binary: "importer",
        tests: &[],
        why: NO_PEER,
    },
];

/// What is left out of a binary.
pub(crate) fn left_out(arch: Arch, binary: &str) -> impl Iterator<Item = &'static LeftOut> {
    LIST.iter()
        .filter(move |it| it.arch == arch && it.binary == binary)
}

/// Why a binary does not apply at all.
pub(crate) fn refusal(arch: Arch, binary: &str) -> Option<&'static str> {
    let mut all = left_out(arch, binary).filter(|it| it.tests.is_empty());
    all.next().map(|it| it.why)
}

/// libtest's arguments that leave out what does not apply.
pub(crate) fn arguments(arch: Arch, binary: &str) -> Vec<String> {
    let tests = left_out(arch, binary).flat_map(|it| it.tests);
    tests
        .flat_map(|test| ["--skip", test])
        .map(str::to_owned)
        .collect()
}

/// A line for each thing that is left out of these binaries.
pub(crate) fn remarks(arch: Arch, binaries: &[&str]) -> String {
    let all = binaries.iter().flat_map(|binary| left_out(arch, binary));
    all.map(|it| {
        let tests = if it.tests.is_empty() {
            String::new()
        } else {
            format!(": {}", it.tests.join(", "))
        };
        format!("left out: {}{tests}: {}\n", it.binary, it.why)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::checkout;

    #[test]
    fn what_is_left_out_exists() {
        for it in LIST {
            let file = format!("guest-tests/tests/{}.rs", it.binary);
            let text = fs::read_to_string(checkout::top().join(&file)).expect(&file);
            for test in it.tests {
                assert!(text.contains(&format!("fn {test}")), "{file}: {test}");
            }
        }
    }

    #[test]
    fn nothing_is_left_out_on_this_machines_architecture() {
        assert!(LIST.iter().all(|it| !it.arch.is_native()));
    }

    #[test]
    fn some_tests_are_skipped_by_their_names_and_others_with_their_binary() {
        assert!(refusal(Arch::Arm64, "nopat").is_some());
        assert!(refusal(Arch::Amd64, "nopat").is_none());
        assert!(arguments(Arch::Arm64, "nopat").is_empty());
        let text = remarks(Arch::Arm64, &["nopat", "smoke"]);
        assert!(text.contains("left out: nopat: the page"), "{text}");
        assert!(!text.contains("smoke"), "{text}");
    }
}
