//! The random test: steps drawn from a seed, made on the real kernel, and judged by
//! `barlease-oracle`.
//!
//! - [`holder`]: fds and mappings of one process, this one or another, which is asked by words;
//! - [`machine`]: makes a step;
//! - [`fire`]: touches while a step is made;
//! - [`storm`]: everything at once;
//! - [`check`]: looks at what is there after a step.
//!
//! One step after the other is deterministic: the same seed, the same steps. Within a step that is
//! made under fire, or that waits for an importer, or that is a storm, threads race; what must hold
//! then holds in whatever order.

pub mod check;
pub mod fire;
pub mod holder;
pub mod machine;
pub mod storm;

use std::{
    collections::VecDeque,
    fmt::Write as _,
    io::Write as _,
    thread,
    time::{Duration, Instant},
};

use barlease_oracle::{Coverage, Generator, Op, Oracle, Spec};

use barlease_lab::guest;

use crate::{PAGE, aer, observe, pci::Function, slot};

/// How many of the last steps are told.
const TRAIL: usize = 40;

/// From so many steps on, each operation must have come.
const LONG: u64 = 3000;

/// The devices of the machine `random` that take part.
#[must_use]
pub fn specs() -> Vec<Spec> {
    const MIB: u64 = 1 << 20;
    let none = Spec {
        name: "",
        bar: 2,
        registers: false,
        size: 16 * MIB,
        resets: false,
        function_reset: false,
        d3hot: false,
        d1_d2: false,
        tags: false,
        msix: None,
        set: Vec::new(),
        bus_reset: false,
        reports: false,
        slot: false,
    };
    let registers = Spec {
        bar: aer::BAR,
        registers: true,
        size: 4 * PAGE,
        resets: true,
        function_reset: true,
        d3hot: true,
        ..none.clone()
    };
    vec![
        Spec {
            name: "memory",
            resets: true,
            bus_reset: true,
            set: vec![0],
            ..none.clone()
        },
        Spec {
            name: "mapped",
            bar: 0,
            resets: true,
            function_reset: true,
            d3hot: true,
            d1_d2: true,
            tags: true,
            msix: Some((2, 0x2000)),
            set: vec![1],
            ..none.clone()
        },
        Spec {
            name: "pair0",
            bus_reset: true,
            set: vec![2, 3],
            ..none.clone()
        },
        Spec {
            name: "pair1",
            bus_reset: true,
            set: vec![2, 3],
            ..none.clone()
        },
        Spec {
            name: "display",
            bar: 0,
            set: vec![4],
            ..none
        },
        Spec {
            name: aer::DEVICE,
            set: vec![5, 6],
            bus_reset: true,
            reports: true,
            ..registers.clone()
        },
        Spec {
            name: aer::NEIGHBOUR,
            set: vec![5, 6],
            bus_reset: true,
            ..registers.clone()
        },
        Spec {
            name: slot::DEVICE,
            set: vec![7],
            slot: true,
            ..registers
        },
    ]
}

/// The run to make.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The seed that the steps are drawn from.
    pub seed: u64,
    /// For how long.
    pub time: Duration,
    /// The step to end with, whatever the time.
    pub steps: Option<u64>,
}

impl Options {
    /// Those of the environment: `BARLEASE_TEST_SEED`, or a fresh one; `BARLEASE_TEST_SECONDS`, or
    /// 120 where `CI` is `true` and the kernel watches locks, or 30 where `CI` is `true`, or 20;
    /// `BARLEASE_TEST_STEPS`.
    ///
    /// # Panics
    ///
    /// When one of them is no number.
    #[must_use]
    pub fn of_environment() -> Self {
        let number = |name: &str| -> Option<u64> {
            let text = std::env::var(name).ok()?;
            Some(
                text.parse()
                    .unwrap_or_else(|_| panic!("{name} is a number, not `{text}`")),
            )
        };
        let ci = std::env::var("CI").is_ok_and(|value| value == "true");
        let default = match (ci, observe::locks_are_watched()) {
            (true, true) => 120,
            (true, false) => 30,
            (false, _) => 20,
        };
        let seconds = number("BARLEASE_TEST_SECONDS").unwrap_or(default);
        Self {
            // Short enough to be typed.
            seed: number("BARLEASE_TEST_SEED").unwrap_or_else(|| observe::random() % 1_000_000_000),
            time: Duration::from_secs(seconds),
            steps: number("BARLEASE_TEST_STEPS"),
        }
    }
}

/// The last steps; told when the thread panics.
struct Trail {
    seed: u64,
    number: u64,
    steps: VecDeque<String>,
}

impl Drop for Trail {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut text = format!(
                "\nrandom test: failed at step {} of seed {}; the steps before:\n",
                self.number, self.seed
            );
            for step in &self.steps {
                let _ = writeln!(text, "  {step}");
            }
            for Spec { name, .. } in specs() {
                let function = Function::named(name);
                if !function.exists() {
                    let _ = writeln!(text, "  {name} is not there");
                    continue;
                }
                let _ = writeln!(text, "  {name}: {}", circumstances(&function));
            }
            let _ = writeln!(
                text,
                "again: cargo xtask random --seed {} (steps that race may take another course)",
                self.seed
            );
            tell(&text);
        }
    }
}

/// The registers that decide whether a function's memory is decoded, as its config space has them.
fn circumstances(function: &Function) -> String {
    let config = function.config();
    format!(
        "{}, COMMAND {:02x?}, base addresses {:02x?}",
        function.power_state(),
        &config[4..6],
        &config[0x10..0x28]
    )
}

/// Where the emulator has the BARs of all functions: all ones for what it keeps from everybody,
/// whatever config space says.
fn decoded_by_the_emulator() -> String {
    match guest::monitor("info pci") {
        Ok(answer) => answer.replace("\\r\\n", "\n"),
        Err(error) => error.to_string(),
    }
}

/// Says something whether libtest shows output or not.
fn tell(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Makes steps until the time is up, and then looks whether everything goes away.
///
/// # Panics
///
/// When something comes of a step that must not, or is there after it that must not be.
pub fn run(options: Options) -> Coverage {
    let seed = options.seed;
    tell(&format!(
        "random test: seed {seed}, {} s; again: cargo xtask random --seed {seed}\n",
        options.time.as_secs()
    ));
    let mut trail = Trail {
        seed,
        number: 0,
        steps: VecDeque::new(),
    };
    let mut oracle = Oracle::new(specs());
    let mut machine = machine::Machine::new(specs(), seed);
    let mut generator = Generator::new(seed, machine.can_sleep());
    let mut coverage = Coverage::default();
    let end = Instant::now() + options.time;
    while Instant::now() < end && options.steps.is_none_or(|steps| trail.number < steps) {
        let step = generator.draw(&oracle);
        let number = trail.number;
        if number % 50 == 0 {
            observe::mark(&format!("random test: seed {seed}, step {number}"));
        }
        if trail.steps.len() == TRAIL {
            trail.steps.pop_front();
        }
        let fire = if step.under_fire { ", under fire" } else { "" };
        trail
            .steps
            .push_back(format!("{number}: {:?}{fire}", step.op));
        let waited = !oracle.waited_for(&step.op).is_empty();
        let taken = oracle.mappings_taken_by(&step.op);
        let before = oracle.clone();
        let outcome = machine.make(&step, &oracle);
        if let Some(line) = trail.steps.back_mut() {
            let _ = write!(line, " -> {}", outcome.name());
        }
        if let Err(objection) = oracle.step(&step.op, &outcome) {
            panic!("step {number}, {:?}: {objection}", step.op);
        }
        coverage.add(&step, waited, &outcome);
        machine.check_signals(&before.signalled_by(&step.op, &oracle), &step.op);
        // Nobody touches meanwhile.
        let is_storm = matches!(step.op, Op::Storm { .. } | Op::PullInStorm { .. });
        if !step.under_fire && !is_storm {
            machine.check_taken(&oracle, &taken, &step.op);
        }
        machine.check(&mut oracle, &step.op);
        trail.number += 1;
    }
    machine.finish(&oracle);
    tell(&format!(
        "random test: {} steps of seed {seed} are as they must be\n{coverage}",
        trail.number
    ));
    if trail.number >= LONG {
        let missing = coverage.missing();
        let excused: &[_] = if machine.can_sleep() {
            &[]
        } else {
            &[barlease_oracle::Kind::Sleep]
        };
        assert_eq!(missing, excused, "operations that never came");
    }
    coverage
}
