//! Guests side by side, each of which runs some test binaries; what a binary says is shown in one
//! piece.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use barlease_lab::debug::Watch;
use barlease_lab::prepare::Prepared;
use barlease_lab::run::{Failure, Output, Run};
use barlease_lab::series::{Listener, Part};

use super::applies;
use super::batch::{Batch, End, Outcome, Speed, judge, plan};
use super::binary::{Binary, as_tests_run, has_tests};
use crate::guest;
use crate::steps::Count;

/// The memory of the host that the guest of a test takes, in MiB: 1 GiB of its own, and what
/// QEMU needs.
const MEMORY: u32 = 2048;

/// The test binaries of `guest-tests/` to run on a kernel.
pub(crate) struct Lane<'a> {
    pub(crate) binaries: &'a [Binary],
    pub(crate) prepared: &'a Prepared,
    /// Our module, built for that kernel.
    pub(crate) module: &'a Path,
}

/// Guests of some kernels, side by side: where one lane has few left, another has its longest.
pub(crate) struct Pool<'a> {
    pub(crate) lanes: Vec<Lane<'a>>,
    pub(crate) filter: Option<&'a str>,
    /// How many guests at a time.
    pub(crate) jobs: usize,
}

/// As many guests as there are processors, and as fit into memory. Tests wait more than they
/// compute, so more may be quicker: `--jobs`.
pub(crate) fn jobs() -> usize {
    guests_of(MEMORY)
}

/// How many guests can run at a time, each of which takes so many MiB.
pub(crate) fn guests_of(memory: u32) -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let fit = available(&info).map_or(processors, |bytes| {
        usize::try_from(bytes / (u64::from(memory) << 20)).unwrap_or(usize::MAX)
    });
    processors.min(fit).max(1)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(info: &str) -> Option<u64> {
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes << 10)
}

impl Pool<'_> {
    /// Runs all of them, and says what failed.
    pub(crate) fn run(&self) -> (Count, Result<()>) {
        let mut batches: Vec<_> = self
            .lanes
            .iter()
            .flat_map(|lane| {
                let speed = lane.speed();
                let planned = plan(&lane.names(self.filter), self.jobs, speed);
                planned
                    .into_iter()
                    .map(move |batch| (batch.cost(speed), lane, batch))
            })
            .collect();
        batches.sort_by_key(|(cost, ..)| Reverse(*cost));
        let batches = batches.into_iter().map(|(_, lane, batch)| (lane, batch));
        run_batches(batches.collect(), self.filter, self.jobs)
    }
}

/// Runs these batches, `jobs` at a time, and says what failed.
pub(super) fn run_batches(
    batches: VecDeque<(&Lane<'_>, Batch)>,
    filter: Option<&str>,
    jobs: usize,
) -> (Count, Result<()>) {
    let queue = Mutex::new(batches);
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((lane, batch)) = next(&queue) {
                    let (outcomes, rest) = lane.guest(&batch, filter);
                    locked(&done).extend(outcomes.into_iter().map(|outcome| (lane, outcome)));
                    if !rest.is_empty() {
                        let names = rest;
                        locked(&queue).push_front((lane, Batch { names, ..batch }));
                    }
                }
            });
        }
    });
    let mut count = Count::default();
    let mut failed = Vec::new();
    for (lane, outcome) in locked(&done).drain(..) {
        count = count + outcome.count;
        if let Some(reason) = outcome.failure {
            let (name, kernel) = (outcome.name, &lane.prepared.kernel.name);
            let reason = reason.lines().next().unwrap_or_default();
            println!("{name} on {kernel}: {reason}; again:");
            println!("  cd guest-tests && BARLEASE_KERNEL={kernel} cargo test --test {name}");
            failed.push(format!("{name} on {kernel}"));
        }
    }
    failed.sort_unstable();
    if failed.is_empty() {
        return (count, Ok(()));
    }
    (
        count,
        Err(anyhow::anyhow!("these failed: {}", failed.join(", "))),
    )
}

impl Lane<'_> {
    fn speed(&self) -> Speed {
        match self.prepared.kernel.watches() {
            None | Some(Watch::Nothing(_)) => Speed::Stock,
            Some(Watch::Memory | Watch::Races) => Speed::Watched,
        }
    }

    /// The binaries that apply and have tests that the filter leaves; says which do not apply.
    fn names(&self, filter: Option<&str>) -> Vec<&str> {
        let has_tests = |binary: &&Binary| has_tests(&binary.path, filter);
        let binaries = self.binaries.iter().filter(has_tests);
        let names: Vec<_> = binaries.map(|binary| binary.name.as_str()).collect();
        let lacks = applies::lacks(&self.prepared.kernel);
        print!("{}", applies::remarks(&lacks, &names));
        names
            .into_iter()
            .filter(|name| applies::refusal(&lacks, name).is_none())
            .collect()
    }

    /// Runs a batch in a guest. The output of a binary is shown when it has ended.
    fn guest(&self, batch: &Batch, filter: Option<&str>) -> (Vec<Outcome>, Vec<String>) {
        let listener = Arc::new(Mutex::new(Listener::default()));
        let kernel = self.prepared.kernel.name.clone();
        let shown = kernel.clone();
        let listens = Arc::clone(&listener);
        let output = Output::Lines(Box::new(move |line| {
            if let Some(part) = locked(&listens).line(line) {
                show(&format!("{} on {shown}", part.name), &part.output);
            }
        }));
        let result = self
            .series(batch, filter)
            .and_then(|run| run.output(output).run());
        let heard = locked(&listener);
        let end = match &result {
            Ok(outcome) => End::Code(outcome.code),
            Err(error) => End::of(error),
        };
        let (outcomes, rest) = judge(&batch.names, &heard, &end);
        let title = format!("guest of {} on {kernel}", batch.names.join(", "));
        let mut text = String::new();
        if let Ok(outcome) = &result {
            text += &guest::remarks(outcome);
        }
        for Outcome { name, failure, .. } in &outcomes {
            let part = heard.parts.iter().find(|part| part.name == *name);
            if let Some(part) = part.filter(|part| part.code.is_none()) {
                text += &format!("what {name} said until the guest ended:\n{}", part.output);
            }
            if let Some(reason) = failure {
                let before = batch.names.iter().take_while(|before| *before != name);
                let before: Vec<_> = before.map(String::as_str).collect();
                if !before.is_empty() {
                    text += &format!("{name} ran after {}\n", before.join(", "));
                }
                text += &format!("{name} FAILED: {reason}\n");
            }
        }
        if !rest.is_empty() {
            let rest = rest.join(", ");
            text += &format!("what counts of these comes from another guest: {rest}\n");
        }
        show(&title, &text);
        (outcomes, rest)
    }

    fn series(&self, batch: &Batch, filter: Option<&str>) -> Result<Run<'_>> {
        let mut run = Run::new(self.prepared, batch.preset.machine());
        let mut parts = Vec::new();
        let lacks = applies::lacks(&self.prepared.kernel);
        for name in &batch.names {
            let binary = self.binaries.iter().find(|binary| binary.name == *name);
            let binary = binary.with_context(|| format!("there is no binary {name}"))?;
            let place = format!("/lab/bin/{name}");
            run = run.file(&binary.path, &place);
            let mut words = vec![place];
            words.extend(filter.map(str::to_owned));
            words.extend(applies::arguments(&lacks, name));
            parts.push(Part {
                name: name.clone(),
                words,
            });
        }
        as_tests_run(run, self.module).map(|run| run.series(parts))
    }
}

impl End {
    fn of(error: &anyhow::Error) -> Self {
        let part = match error.downcast_ref() {
            Some(Failure::Splat { splat, .. }) => splat.part.clone(),
            _ => None,
        };
        Self::Failed(format!("{error:#}"), part)
    }
}

/// Runs checks in guests of their own, as many at a time as there may be, and says what came of
/// each. `wrong` is said of those that fail.
pub(super) fn checks<T: Sync>(
    all: &[T],
    name: impl Fn(&T) -> String,
    check: impl Fn(&T) -> Result<String> + Sync,
    wrong: &str,
) -> (Count, Result<()>) {
    let mut count = Count::default();
    let mut failed = Vec::new();
    for side_by_side in all.chunks(jobs()) {
        thread::scope(|scope| {
            let check = &check;
            let start = |one| (one, scope.spawn(move || check(one)));
            let guests: Vec<_> = side_by_side.iter().map(start).collect();
            for (one, guest) in guests {
                let panicked = |_| Err(anyhow::anyhow!("the lab panicked"));
                match guest.join().unwrap_or_else(panicked) {
                    Ok(said) => {
                        println!("{} ... {said}", name(one));
                        count.passed += 1;
                    }
                    Err(error) => {
                        println!("{} ... FAILED: {error:#}", name(one));
                        failed.push(name(one));
                        count.failed += 1;
                    }
                }
            }
        });
    }
    if failed.is_empty() {
        return (count, Ok(()));
    }
    (
        count,
        Err(anyhow::anyhow!("{wrong}: {}", failed.join(", "))),
    )
}

/// Shows in one piece what guests that run side by side say.
fn show(title: &str, text: &str) {
    let mut out = io::stdout().lock();
    let _ = write!(out, "\n--- {title}\n{text}");
    let _ = out.flush();
}

fn next<T>(queue: &Mutex<VecDeque<T>>) -> Option<T> {
    locked(queue).pop_front()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let info = "MemTotal: 24 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(available(info), Some(8 << 20));
        assert_eq!(available("MemTotal: 24 kB\n"), None);
    }
}
