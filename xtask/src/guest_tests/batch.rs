//! Which test binaries share a guest, and what came of each when the guest is done.

use std::cmp::Reverse;

use barlease_lab::preset::Preset;
use barlease_lab::series::{Listener, UNTIDY};

use crate::steps::{Count, parse_result};

/// Binaries that have a guest to themselves, and why.
const ALONE: &[(&str, &str)] = &[
    ("as_stock", "it unloads the stock module"),
    ("fault_injection", "it counts what the kernel has allocated"),
    (
        "random",
        "only a fresh guest does the same for the same seed",
    ),
];

/// Binaries that are the last in their guest, and why.
const LAST: &[(&str, &str)] = &[
    (
        "aer",
        "a function that nobody has open loses its BARs when the link is reset",
    ),
    (
        "driver",
        "it resets a slot, after which lockdep reports the kernel's own inversion when an error is \
         recovered from (docs/testing.md)",
    ),
    (
        "lifetime",
        "devices that it takes from the bus come back elsewhere",
    ),
    ("removal", "devices that it pulls out come back elsewhere"),
    (
        "stress",
        "a device that is reset while it is opened may lose its BARs",
    ),
];

/// How a kernel was built, as far as that says how long tests take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speed {
    /// As Debian's.
    Stock,
    /// It watches itself.
    Watched,
}

/// Seconds on a kernel of Debian's, and on the debug kernel, two guests at a time without KVM.
#[derive(Clone, Copy, Debug)]
struct Cost(u32, u32);

impl Cost {
    fn at(self, speed: Speed) -> u32 {
        match speed {
            Speed::Stock => self.0,
            Speed::Watched => self.1,
        }
    }
}

/// The time that a guest takes to come up.
const BOOT: Cost = Cost(6, 16);

/// The time of a binary that [`COSTS`] does not name.
const SHORT: Cost = Cost(4, 12);

/// The time of a binary: guests are planned with it. A value that is out of date only makes them
/// less even.
const COSTS: &[(&str, Cost)] = &[
    ("aer", Cost(6, 19)),
    ("alias", Cost(7, 20)),
    ("as_stock", Cost(26, 1)),
    ("driver", Cost(10, 30)),
    ("events", Cost(28, 57)),
    ("events_fd", Cost(36, 45)),
    ("export", Cost(6, 26)),
    ("fault_injection", Cost(3, 144)),
    ("faults_hostile", Cost(28, 10)),
    ("gigantic", Cost(16, 60)),
    ("hostile_fences", Cost(104, 130)),
    ("importer", Cost(18, 42)),
    ("importer_events", Cost(54, 72)),
    ("importer_slow", Cost(18, 22)),
    ("list", Cost(7, 25)),
    ("memory_type", Cost(7, 43)),
    ("parity", Cost(40, 130)),
    ("random", Cost(31, 124)),
    ("removal", Cost(19, 28)),
    ("reset", Cost(9, 20)),
    ("revoke_id", Cost(32, 45)),
    ("splits", Cost(16, 39)),
    ("stock", Cost(6, 34)),
    ("stress", Cost(20, 31)),
    ("tph", Cost(11, 20)),
    ("witness", Cost(100, 140)),
];

fn cost(name: &str, speed: Speed) -> u32 {
    let found = COSTS.iter().find(|(binary, _)| *binary == name);
    found.map_or(SHORT, |(_, cost)| *cost).at(speed)
}

/// Test binaries that a guest runs one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) preset: Preset,
    /// Their names.
    pub(crate) names: Vec<String>,
}

impl Batch {
    pub(super) fn cost(&self, speed: Speed) -> u32 {
        let costs = self.names.iter().map(|name| cost(name, speed));
        BOOT.at(speed) + costs.sum::<u32>()
    }
}

/// Spreads binaries over guests of which `jobs` run at a time: few, since each has to boot, but
/// enough to keep all jobs busy until the end. The same for the same binaries; the longest comes
/// first.
pub(crate) fn plan(names: &[&str], jobs: usize, speed: Speed) -> Vec<Batch> {
    let cost = |name: &str| cost(name, speed);
    let total: u32 = names.iter().map(|name| cost(name)).sum();
    let parts = u32::try_from(2 * jobs).unwrap_or(u32::MAX);
    let limit = total.div_ceil(parts).max(1);
    let mut batches = Vec::new();
    for preset in Preset::ALL {
        let of_preset = names
            .iter()
            .copied()
            .filter(|name| Preset::of_tests(name) == preset);
        let (alone, mut shared): (Vec<_>, Vec<_>) = of_preset.partition(|name| is_alone(name));
        batches.extend(alone.into_iter().map(|name| Batch {
            preset,
            names: vec![name.to_owned()],
        }));
        let sum: u32 = shared.iter().map(|name| cost(name)).sum();
        let last = shared.iter().filter(|name| is_last(name)).count();
        let guests = sum
            .div_ceil(limit)
            .max(u32::try_from(last).unwrap_or(u32::MAX));
        let mut guests: Vec<_> = (0..guests)
            .map(|_| Batch {
                preset,
                names: Vec::new(),
            })
            .collect();
        shared.sort_by_key(|name| (!is_last(name), Reverse(cost(name)), *name));
        for name in shared {
            let free = guests.iter_mut();
            let free = free.filter(|batch| !is_last(name) || batch.names.is_empty());
            if let Some(least) = free.min_by_key(|batch| batch.cost(speed)) {
                least.names.push(name.to_owned());
            }
        }
        for batch in &mut guests {
            batch.names.sort_by_key(|name| is_last(name));
        }
        batches.extend(guests.into_iter().filter(|batch| !batch.names.is_empty()));
    }
    batches.sort_by_key(|batch| Reverse(batch.cost(speed)));
    batches
}

fn is_alone(name: &str) -> bool {
    ALONE.iter().any(|(alone, _)| *alone == name)
}

fn is_last(name: &str) -> bool {
    LAST.iter().any(|(last, _)| *last == name)
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself, with an exit code.
    Code(i32),
    /// It failed, for this reason; a complaint of the kernel's came during the named binary.
    Failed(String, Option<String>),
}

/// The outcome of a binary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) count: Count,
    /// Why it failed, if it did.
    pub(crate) failure: Option<String>,
}

/// The outcome of a batch: that of each binary in order as far as that counts, and the names of
/// those that must run in another guest, since this one was not fit for them any more.
pub(crate) fn judge(names: &[String], heard: &Listener, end: &End) -> (Vec<Outcome>, Vec<String>) {
    let mut outcomes = Vec::new();
    for (name, part) in names.iter().zip(&heard.parts) {
        let count: Count = part.output.lines().filter_map(parse_result).sum();
        // Its end was not heard, as that of those after it, but all of them ended well: the first
        // that does not would be the guest's exit code. A test that was not heard of runs in
        // another guest.
        let is_silent =
            part.code.is_none() && *end == End::Code(0) && count.passed > 0 && count.failed == 0;
        let complaint = match end {
            End::Failed(reason, Some(during)) if during == name => Some(reason.clone()),
            _ => None,
        };
        let failure = match (part.code, end) {
            (Some(0), _) => None,
            _ if is_silent => None,
            (Some(code), _) => Some(ended_with(code)),
            (None, End::Failed(reason, _)) if complaint.is_none() => Some(reason.clone()),
            (None, End::Failed(..)) => None,
            (None, End::Code(code)) => Some(format!("the guest ended before it did ({code})")),
        };
        let reasons: Vec<_> = failure.into_iter().chain(complaint).collect();
        let failure = (!reasons.is_empty()).then(|| reasons.join("\n"));
        let is_last = failure.is_some() || is_silent;
        outcomes.push(Outcome {
            name: name.clone(),
            count,
            failure,
        });
        if is_last {
            break;
        }
    }
    // A failure that is nobody's in particular, such as a guest that does not boot or does not
    // power off.
    if outcomes.iter().all(|outcome| outcome.failure.is_none()) {
        let reason = match end {
            End::Failed(reason, _) => Some(reason.clone()),
            // The guest was not fit for more, and that is nobody's fault.
            End::Code(0) if !outcomes.is_empty() => None,
            End::Code(code) if outcomes.len() < names.len() => Some(format!(
                "the guest ended with {code} before it began\n{}",
                heard.before
            )),
            End::Code(_) => None,
        };
        if reason.is_some() && outcomes.is_empty() {
            outcomes.extend(names.first().map(|name| Outcome {
                name: name.clone(),
                count: Count::default(),
                failure: None,
            }));
        }
        if let Some(last) = outcomes.last_mut() {
            last.failure = reason;
        }
    }
    let rest = names[outcomes.len()..].to_vec();
    (outcomes, rest)
}

fn ended_with(code: i32) -> String {
    match code {
        UNTIDY => format!("exit code {code}: the guest cannot be made ready for another one"),
        129.. => format!("ended by signal {}", code - 128),
        _ => format!("exit code {code}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;
    use crate::checkout;

    /// The names of all test binaries.
    fn all() -> Vec<String> {
        let folder = fs::read_dir(checkout::top().join("guest-tests/tests")).unwrap();
        let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names
            .filter_map(|name| Some(name.strip_suffix(".rs")?.to_owned()))
            .collect();
        names.sort();
        names
    }

    fn planned(jobs: usize, speed: Speed) -> Vec<Batch> {
        let names = all();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        plan(&names, jobs, speed)
    }

    #[test]
    fn each_binary_is_in_one_batch_on_the_machine_that_it_is_written_for() {
        for jobs in [1, 2, 3, 8, 64] {
            let batches = planned(jobs, Speed::Stock);
            let mut planned: Vec<_> = batches.iter().flat_map(|batch| &batch.names).collect();
            planned.sort();
            assert!(planned.into_iter().eq(&all()), "{jobs} jobs");
            for batch in batches {
                for name in &batch.names {
                    assert_eq!(Preset::of_tests(name), batch.preset, "{name}");
                    assert!(batch.names.len() == 1 || !is_alone(name), "{name}");
                }
                let (_, others) = batch.names.split_last().unwrap();
                assert!(!others.iter().any(|name| is_last(name)), "{batch:?}");
            }
        }
    }

    #[test]
    fn tables_name_binaries_that_there_are() {
        let all: BTreeSet<_> = all().into_iter().collect();
        let alone = ALONE.iter().chain(LAST).map(|(name, _)| *name);
        for name in alone.chain(COSTS.iter().map(|(name, _)| *name)) {
            assert!(all.contains(name), "{name}");
        }
    }

    #[test]
    fn jobs_are_busy_until_the_end() {
        for (jobs, speed) in [
            (1, Speed::Stock),
            (2, Speed::Stock),
            (3, Speed::Stock),
            (2, Speed::Watched),
        ] {
            let batches = planned(jobs, speed);
            assert!(batches.is_sorted_by_key(|batch| Reverse(batch.cost(speed))));
            let mut ends = vec![0; jobs];
            for batch in &batches {
                *ends.iter_mut().min().unwrap() += batch.cost(speed);
            }
            let (least, most) = (ends.iter().min().unwrap(), ends.iter().max().unwrap());
            assert!(most - least <= most / 8, "{ends:?}: {batches:?}");
            assert!(batches.len() <= 11 + 2 * jobs, "{batches:?}");
        }
    }

    #[test]
    fn a_plan_of_nothing_is_empty() {
        assert_eq!(plan(&[], 2, Speed::Stock), []);
        assert_eq!(plan(&["nopat"], 2, Speed::Stock).len(), 1);
    }

    /// The output of a guest whose parts ended with these codes. Each has a test that passes or
    /// fails.
    fn heard(codes: &[Option<i32>]) -> Listener {
        let mut listener = Listener::default();
        for (code, name) in codes.iter().zip(NAMES) {
            listener.line(&format!("\u{1}begins {name}"));
            let result = match code {
                Some(0) => "test result: ok. 1 passed; 0 failed; 0 ignored",
                Some(101) => "test result: FAILED. 2 passed; 1 failed; 0 ignored",
                _ => "test half_way",
            };
            listener.line(result);
            if let Some(code) = code {
                listener.line(&format!("\u{1}ends {code}"));
            }
        }
        listener
    }

    const NAMES: [&str; 3] = ["a", "b", "c"];

    fn judged(codes: &[Option<i32>], end: End) -> (Vec<(usize, Option<String>)>, Vec<String>) {
        let (outcomes, rest) = judge(&NAMES.map(str::to_owned), &heard(codes), &end);
        let names = outcomes.iter().map(|outcome| outcome.name.as_str());
        assert!(names.eq(NAMES.into_iter().take(outcomes.len())));
        let outcomes = outcomes.into_iter();
        let outcomes = outcomes.map(|outcome| (outcome.count.passed, outcome.failure));
        (outcomes.collect(), rest)
    }

    fn failed(reason: &str) -> Option<String> {
        Some(reason.to_owned())
    }

    #[test]
    fn all_that_pass_pass() {
        let (outcomes, rest) = judged(&[Some(0); 3], End::Code(0));
        assert_eq!(outcomes, [(1, None), (1, None), (1, None)]);
        assert!(rest.is_empty());
    }

    #[test]
    fn a_guest_that_is_not_fit_for_more_is_nobodys_failure() {
        let (outcomes, rest) = judged(&[Some(0); 2], End::Code(0));
        assert_eq!(outcomes, [(1, None), (1, None)]);
        assert_eq!(rest, ["c"]);
        let (outcomes, rest) = judged(&[], End::Code(0));
        assert!(matches!(&outcomes[..], [(0, Some(_))]), "{outcomes:?}");
        assert_eq!(rest, ["b", "c"]);
    }

    #[test]
    fn an_end_that_was_not_heard_is_no_failure_where_the_guest_ended_well() {
        let mut heard = heard(&[Some(0)]);
        heard.line("\u{1}begins b");
        heard.line("test result: ok. 1 passed; 0 failed; 0 ignored");
        let names = NAMES.map(str::to_owned);
        let (outcomes, rest) = judge(&names, &heard, &End::Code(0));
        assert_eq!(outcomes.len(), 2);
        assert!(outcomes.iter().all(|outcome| outcome.failure.is_none()));
        assert_eq!(rest, ["c"]);
        let (outcomes, _) = judge(&names, &heard, &End::Code(1));
        assert!(outcomes[1].failure.is_some(), "{outcomes:?}");
    }

    #[test]
    fn after_one_that_fails_the_others_need_another_guest() {
        let (outcomes, rest) = judged(&[Some(0), Some(101)], End::Code(101));
        assert_eq!(outcomes, [(1, None), (2, failed("exit code 101"))]);
        assert_eq!(rest, ["c"]);
        let (outcomes, rest) = judged(&[Some(139)], End::Code(139));
        assert_eq!(outcomes, [(0, failed("ended by signal 11"))]);
        assert_eq!(rest, ["b", "c"]);
    }

    #[test]
    fn the_one_with_which_the_guest_dies_has_failed() {
        let end = End::Failed("dead".to_owned(), None);
        let (outcomes, rest) = judged(&[Some(0), None], end);
        assert_eq!(outcomes, [(1, None), (0, failed("dead"))]);
        assert_eq!(rest, ["c"]);
    }

    #[test]
    fn a_complaint_of_the_kernels_is_that_ones_and_what_came_after_it_does_not_count() {
        let end = End::Failed("WARNING".to_owned(), failed("b"));
        for codes in [
            &[Some(0); 3][..],
            &[Some(0), Some(0), Some(101)],
            &[Some(0), Some(0), None],
        ] {
            let (outcomes, rest) = judged(codes, end.clone());
            assert_eq!(outcomes, [(1, None), (1, failed("WARNING"))]);
            assert_eq!(rest, ["c"]);
        }
        let (outcomes, _) = judged(&[Some(0), None], end.clone());
        assert_eq!(outcomes[1], (0, failed("WARNING")));
        let (outcomes, _) = judged(&[Some(0), Some(101)], end);
        assert_eq!(outcomes[1], (2, failed("exit code 101\nWARNING")));
    }

    #[test]
    fn a_guest_that_does_not_come_up_is_the_first_ones_failure() {
        for end in [End::Failed("no boot".to_owned(), None), End::Code(125)] {
            let (outcomes, rest) = judged(&[], end);
            assert!(matches!(&outcomes[..], [(0, Some(_))]), "{outcomes:?}");
            assert_eq!(rest, ["b", "c"]);
        }
    }

    #[test]
    fn a_guest_that_does_not_go_down_is_the_last_ones_failure() {
        let end = End::Failed("stuck".to_owned(), None);
        let (outcomes, rest) = judged(&[Some(0); 3], end);
        assert_eq!(outcomes[2], (1, failed("stuck")));
        assert!(rest.is_empty());
    }
}
