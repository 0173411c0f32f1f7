//! Guest tests that do not apply on a kernel or its machine, and why. A run says what it leaves
//! out.

use barlease_lab::arch::Arch;
use barlease_lab::debug::Watch;
use barlease_lab::kernel::Kernel;
use barlease_lab::without::Without;

/// A thing that a kernel and its machine lack, and the usual ones have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lack {
    /// An x86 machine.
    X86,
    /// Pages of 4 KiB.
    SmallPages,
    /// Peer-to-peer DMA.
    PeerToPeer,
    /// Power management of devices.
    PowerManagement,
    /// Sleep of the system.
    Sleep,
}

/// The things that a kernel lacks.
pub(crate) fn lacks(kernel: &Kernel) -> Vec<Lack> {
    let without = match kernel.watches() {
        Some(Watch::Nothing(without)) => Some(without),
        _ => None,
    };
    let has_large_pages = kernel.release.contains("-16k") || without == Some(Without::SmallPages);
    let no_p2p = matches!(without, Some(Without::PeerToPeer | Without::All));
    let no_pm = matches!(without, Some(Without::PowerManagement | Without::All));
    let all = [
        (Lack::X86, kernel.arch() == Arch::Arm64),
        (Lack::SmallPages, has_large_pages),
        (Lack::PeerToPeer, no_p2p),
        (Lack::PowerManagement, no_pm),
        (Lack::Sleep, no_pm || without == Some(Without::Sleep)),
    ];
    let lacking = all.into_iter().filter(|(_, lacks)| *lacks);
    lacking.map(|(lack, _)| lack).collect()
}

/// A test binary, or some of its tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeftOut {
    lack: Lack,
    /// The file in `guest-tests/tests/` without `.rs`.
    pub(crate) binary: &'static str,
    /// Parts of the names of its tests; all of them when empty.
    pub(crate) tests: &'static [&'static str],
    pub(crate) why: &'static str,
}

const fn all_of(lack: Lack, binary: &'static str, why: &'static str) -> LeftOut {
    LeftOut {
        lack,
        binary,
        tests: &[],
        why,
    }
}

const fn some_of(
    lack: Lack,
    binary: &'static str,
    tests: &'static [&'static str],
    why: &'static str,
) -> LeftOut {
    LeftOut {
        lack,
        binary,
        tests,
        why,
    }
}

const NO_IMPORTER: &str = "no importer gets a lease";

const NO_ROOM: &str = "the BARs of the lab's devices have no room for so many entries above a page";

const LIST: &[LeftOut] = &[
    all_of(Lack::X86, "nopat", "the page attribute table is x86's"),
    all_of(
        Lack::X86,
        "gigantic",
        "entries of 1 GiB for device memory are x86-64's",
    ),
    all_of(
        Lack::X86,
        "p2p_route",
        "a second host bridge is found by firmware only, which that machine boots without",
    ),
    some_of(
        Lack::X86,
        "importer",
        &["what_does_not_fit_in_one_piece_is_mapped_in_several"],
        "on that machine the addresses below 4 GiB have room for all of it in one piece",
    ),
    some_of(
        Lack::SmallPages,
        "revoke",
        &["status_tells_the_bar"],
        "a BAR that is smaller than a page cannot be leased",
    ),
    some_of(
        Lack::SmallPages,
        "revoke",
        &[
            "a_buffer_of_another_device_is_enodev_and_unharmed",
            "bar_mappings_are_untouched",
            "other_buffers_are_untouched",
        ],
        NO_ROOM,
    ),
    some_of(
        Lack::SmallPages,
        "memory_type",
        &[
            "a_fault_brings_in_2_mib_write_combining",
            "a_mapping_is_uncached_unless_asked",
            "it_is_write_combining_after_a_page_was_unmapped",
            "ranges_in_any_order_are_all_write_combining",
            "write_combining_is_real_from_the_first_fault_on",
        ],
        NO_ROOM,
    ),
    some_of(
        Lack::SmallPages,
        "importer",
        &["edu_reads_and_writes_"],
        "edu moves 4 KiB at a time, which is less than a page",
    ),
    some_of(
        Lack::SmallPages,
        "importer",
        &[
            "a_device_without_translation_gets_entries_for_each_run_of_neighbours",
            "every_page_of_many_ranges_leads_where_it_must",
        ],
        "4096 ranges of such pages are more than twice the BAR, which importers are refused",
    ),
    all_of(Lack::PeerToPeer, "importer", NO_IMPORTER),
    all_of(Lack::PeerToPeer, "importer_events", NO_IMPORTER),
    all_of(Lack::PeerToPeer, "importer_example", NO_IMPORTER),
    all_of(Lack::PeerToPeer, "importer_slow", NO_IMPORTER),
    all_of(Lack::PeerToPeer, "importer_stock", NO_IMPORTER),
    all_of(Lack::PeerToPeer, "p2p_route", NO_IMPORTER),
    all_of(Lack::PeerToPeer, "p2p_switch", NO_IMPORTER),
    all_of(Lack::PeerToPeer, "played", NO_IMPORTER),
];

/// The tests that are left out of a binary.
fn left_out(lacks: &[Lack], binary: &str) -> impl Iterator<Item = &'static LeftOut> {
    LIST.iter()
        .filter(move |it| lacks.contains(&it.lack) && it.binary == binary)
}

/// Why a binary does not apply at all.
pub(crate) fn refusal(lacks: &[Lack], binary: &str) -> Option<&'static str> {
    let mut all = left_out(lacks, binary).filter(|it| it.tests.is_empty());
    all.next().map(|it| it.why)
}

/// libtest's arguments that leave out what does not apply.
pub(crate) fn arguments(lacks: &[Lack], binary: &str) -> Vec<String> {
    let tests = left_out(lacks, binary).flat_map(|it| it.tests);
    tests
        .flat_map(|test| ["--skip", test])
        .map(str::to_owned)
        .collect()
}

/// A line for each thing that is left out of these binaries.
pub(crate) fn remarks(lacks: &[Lack], binaries: &[&str]) -> String {
    let all = binaries.iter().flat_map(|binary| left_out(lacks, binary));
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
    fn nothing_is_left_out_where_nothing_is_lacking() {
        for it in LIST {
            assert!(refusal(&[], it.binary).is_none() && arguments(&[], it.binary).is_empty());
        }
    }

    #[test]
    fn some_tests_are_skipped_by_their_names_and_others_with_their_binary() {
        assert!(refusal(&[Lack::X86], "nopat").is_some());
        assert!(refusal(&[], "nopat").is_none());
        assert!(arguments(&[Lack::X86], "nopat").is_empty());
        let text = remarks(&[Lack::X86], &["nopat", "smoke"]);
        assert!(text.contains("left out: nopat: the page"), "{text}");
        assert!(!text.contains("smoke"), "{text}");
    }
}
