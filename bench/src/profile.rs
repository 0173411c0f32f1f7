//! Where the kernel is while something is measured: samples of its call chain, by
//! `perf_event_open`, on the guest's clock.
//!
//! The clock event interrupts the processor (`PERF_COUNT_SW_CPU_CLOCK`, a high-resolution timer),
//! so what runs with interrupts off is counted where they are turned on again. The interrupts make
//! what is measured slower, and are themselves not in the samples: a function's value is its share
//! of the samples, of the time measured without them.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::Write;
use std::fs;
use std::io;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use perf_event::data::Record;
use perf_event::events::Software;
use perf_event::{Builder, SampleFlag, Sampler};

/// The shortest time between two samples: several times as long as it takes to make one. A sample
/// that is still on its way when the next is due would be seen twice.
const PERIOD: Duration = Duration::from_micros(50);

/// How many samples to wait for, and how long.
const ENOUGH: u64 = 200;
const PATIENCE: Duration = Duration::from_secs(1);

/// Pages for samples that have not been read: a power of two.
const PAGES: usize = 1 << 8;

/// A value above this in a call chain is a mark (`PERF_CONTEXT_*`), not an address.
const MARKS: u64 = -4095_i64 as u64;

/// Functions that a table shows.
const SHOWN: usize = 30;

static ACTIVE: OnceLock<()> = OnceLock::new();

thread_local! {
    static NUMBER: Cell<u64> = const { Cell::new(0) };
}

/// Has [`sampled`] take samples from here on.
///
/// # Errors
///
/// When the kernel's settings, which only root can change, do not let it.
pub fn activate() -> io::Result<()> {
    let settings = [
        // Addresses in /proc/kallsyms.
        ("kptr_restrict", "0"),
        ("perf_event_max_sample_rate", "100000"),
        // Else the kernel lowers the rate where samples take long, as emulated ones do.
        ("perf_cpu_time_max_percent", "0"),
    ];
    for (name, value) in settings {
        fs::write(format!("/proc/sys/kernel/{name}"), value)?;
    }
    let _ = ACTIVE.set(());
    Ok(())
}

/// How often each call chain was seen; innermost address first, 0 for all of user space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples(HashMap<Vec<u64>, u64>);

impl Samples {
    /// Adds others.
    pub fn merge(&mut self, others: Self) {
        for (chain, count) in others.0 {
            *self.0.entry(chain).or_default() += count;
        }
    }

    /// Takes what the kernel has written.
    fn take(&mut self, sampler: &mut Sampler) {
        while let Some(record) = sampler.next_record() {
            if let Ok(Record::Sample(sample)) = record.parse_record() {
                let chain = sample.callchain().unwrap_or_default();
                let mut chain: Vec<_> = chain.iter().copied().filter(|&at| at < MARKS).collect();
                if chain.is_empty() {
                    chain.push(0);
                }
                *self.0.entry(chain).or_default() += 1;
            }
        }
    }

    fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// Runs `f` again and again, and returns samples of this thread meanwhile; `None` when they were
/// not asked for.
///
/// # Panics
///
/// When the kernel has no such event.
pub fn sampled(mut f: impl FnMut()) -> Option<Samples> {
    ACTIVE.get()?;
    let period = period();
    let mut sampler = Builder::new(Software::CPU_CLOCK)
        .include_kernel()
        .sample_period(period.as_nanos() as u64)
        .sample(SampleFlag::CALLCHAIN)
        .exclude_callchain_user(true)
        .build()
        .and_then(|counter| counter.sampled(PAGES))
        .expect("a clock event");
    let mut samples = Samples::default();
    let start = Instant::now();
    while samples.total() < ENOUGH && start.elapsed() < PATIENCE {
        let turn = Instant::now();
        sampler.enable().expect("enable the event");
        while turn.elapsed() < 20 * period {
            f();
        }
        sampler.disable().expect("disable the event");
        samples.take(&mut sampler);
    }
    Some(samples)
}

/// Another one each time: where instructions are counted all calls are the same, and one period
/// would always meet the same ones of them.
fn period() -> Duration {
    let number = NUMBER.get();
    NUMBER.set(number + 1);
    PERIOD + Duration::from_nanos(number * 30_900 % 50_000)
}

/// The names of the kernel's functions.
#[derive(Debug)]
pub struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// Those that there are now, with those of modules.
    #[must_use]
    pub fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/kallsyms").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let mut symbols: Vec<_> = text.lines().filter_map(symbol).collect();
        symbols.sort();
        Self(symbols)
    }

    fn name(&self, address: u64) -> &str {
        if address == 0 {
            return "(user space)";
        }
        let behind = self.0.partition_point(|(start, _)| *start <= address);
        let found = behind.checked_sub(1).and_then(|at| self.0.get(at));
        found.map_or("(unknown)", |(_, name)| name)
    }
}

/// `ffffffff81000000 T _stext`, with the module behind it if it is in one.
fn symbol(line: &str) -> Option<(u64, String)> {
    let mut words = line.split_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    if !words.next()?.eq_ignore_ascii_case("t") {
        return None;
    }
    let name = format!("{:#}", rustc_demangle::demangle(words.next()?));
    let module = words.next().map(|module| format!(" {module}"));
    Some((address, name + &module.unwrap_or_default()))
}

/// The share of a function in a call, in the unit of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Cost {
    alone: f64,
    with_callees: f64,
}

fn costs(samples: &Samples, whole: f64, symbols: &Symbols) -> HashMap<String, Cost> {
    let each = whole / samples.total().max(1) as f64;
    let mut costs: HashMap<String, Cost> = HashMap::new();
    for (chain, &count) in &samples.0 {
        let cost = each * count as f64;
        // A function that calls itself counts once.
        let mut names: Vec<_> = chain.iter().map(|&at| symbols.name(at)).collect();
        if let Some(&innermost) = names.first() {
            costs.entry(innermost.to_owned()).or_default().alone += cost;
        }
        names.sort_unstable();
        names.dedup();
        for name in names {
            costs.entry(name.to_owned()).or_default().with_callees += cost;
        }
    }
    costs
}

/// A table of the functions in which two sides differ most. Each side is its samples and what a
/// call takes without them.
#[must_use]
pub fn table(
    title: &str,
    ours: (&Samples, f64),
    theirs: (&Samples, f64),
    symbols: &Symbols,
) -> String {
    let (mine, other) = (
        costs(ours.0, ours.1, symbols),
        costs(theirs.0, theirs.1, symbols),
    );
    let mut names: Vec<_> = mine.keys().chain(other.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let of =
        |costs: &HashMap<String, Cost>, name: &String| costs.get(name).copied().unwrap_or_default();
    let mut rows: Vec<_> = names
        .into_iter()
        .map(|name| (name, of(&mine, name), of(&other, name)))
        .collect();
    rows.sort_by(|(_, a, b), (_, c, d)| {
        (c.alone - d.alone)
            .abs()
            .total_cmp(&(a.alone - b.alone).abs())
    });
    let mut text = format!(
        "profile: {title}: {:.0} against {:.0} a call; {} and {} samples\n\
         {:>10} {:>10} {:>10}   with what it calls   function\n",
        ours.1,
        theirs.1,
        ours.0.total(),
        theirs.0.total(),
        "more",
        "Barlease",
        "baseline",
    );
    for (name, mine, other) in rows.into_iter().take(SHOWN) {
        let _ = writeln!(
            text,
            "{:>10.0} {:>10.0} {:>10.0} {:>10.0} {:>10.0}   {name}",
            mine.alone - other.alone,
            mine.alone,
            other.alone,
            mine.with_callees,
            other.with_callees,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
ffffffff81000000 T outer
ffffffff81000100 t inner
ffffffff81000200 D data
ffffffffc0000000 t _RNvCs1234_7example4main\t[example]
";

    #[test]
    fn addresses_have_names() {
        let symbols = Symbols::parse(TEXT);
        let name = |address| symbols.name(address);
        assert_eq!(name(0xffff_ffff_8100_00ff), "outer");
        assert_eq!(name(0xffff_ffff_8100_0100), "inner");
        assert_eq!(name(0xffff_ffff_c000_0010), "example::main [example]");
        assert_eq!(name(0x10), "(unknown)");
        assert_eq!(name(0), "(user space)");
    }

    #[test]
    fn a_function_costs_its_share_of_the_whole() {
        let (outer, inner) = (0xffff_ffff_8100_0010, 0xffff_ffff_8100_0110);
        let samples = Samples(HashMap::from([
            (vec![outer], 1),
            // Twice in one chain.
            (vec![inner, outer, outer], 3),
        ]));
        let costs = costs(&samples, 400.0, &Symbols::parse(TEXT));
        let cost = |alone, with_callees| Cost {
            alone,
            with_callees,
        };
        assert_eq!(costs["outer"], cost(100.0, 400.0));
        assert_eq!(costs["inner"], cost(300.0, 300.0));
    }

    #[test]
    fn what_differs_most_comes_first() {
        let (outer, inner) = (0xffff_ffff_8100_0010, 0xffff_ffff_8100_0110);
        let ours = Samples(HashMap::from([(vec![outer], 2), (vec![inner], 6)]));
        let theirs = Samples(HashMap::from([(vec![outer], 1)]));
        let text = table("t", (&ours, 80.0), (&theirs, 15.0), &Symbols::parse(TEXT));
        let rows: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(
            rows[0].split_whitespace().collect::<Vec<_>>(),
            ["60", "60", "0", "60", "0", "inner"]
        );
        assert_eq!(
            rows[1].split_whitespace().collect::<Vec<_>>(),
            ["5", "20", "15", "20", "15", "outer"]
        );
    }

    #[test]
    fn nothing_is_sampled_unless_asked_for() {
        let mut ran = false;
        assert_eq!(sampled(|| ran = true), None);
        assert!(!ran);
    }
}
