// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Access against an oracle that remembers the whole history and reads the answer off it.

use barlease_model::access::{Access, Epoch, Event, NOTHING, Reasons, Sampled, State};
use proptest::{collection::vec, prelude::*, sample::select};

/// An event of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Open(Sampled),
    Close,
    Begin(Event),
    End(Event),
    EndAll(Event),
    Sample(Sampled),
    Fail,
    Opening,
    Lend,
    GiveBack,
}

use Step::{Begin, Close, End, EndAll, Fail, GiveBack, Lend, Open, Opening, Sample};

const MEMORY_ON: Sampled = Sampled {
    memory_off: false,
    undecoded: false,
    sleeping: false,
    low_power: false,
};
const MEMORY_OFF: Sampled = Sampled {
    memory_off: true,
    ..MEMORY_ON
};

fn all_levels() -> Vec<Sampled> {
    (0..16)
        .map(|bits| Sampled {
            memory_off: bits & 1 != 0,
            sleeping: bits & 2 != 0,
            low_power: bits & 4 != 0,
            undecoded: bits & 8 != 0,
        })
        .collect()
}

fn all_steps() -> Vec<Step> {
    let mut steps = vec![Close, Fail, Opening, Lend, GiveBack];
    for event in Event::ALL {
        steps.extend([Begin(event), End(event), EndAll(event)]);
    }
    for levels in all_levels() {
        steps.extend([Open(levels), Sample(levels)]);
    }
    steps
}

/// A device, and everything that ever happened to it.
#[derive(Clone)]
struct Traced {
    access: Access,
    history: Vec<Step>,
    epochs: Vec<Epoch>,
}

impl Traced {
    fn new() -> Self {
        Self {
            access: Access::new(),
            history: Vec::new(),
            epochs: Vec::new(),
        }
    }

    fn after(mut self, step: Step) -> Self {
        match step {
            Open(levels) => self.epochs.push(self.access.open(levels)),
            Close => self.access.close(),
            Begin(event) => self.access.begin(event),
            End(event) => self.access.end(event),
            EndAll(event) => self.access.end_all(event),
            Sample(levels) => self.access.set_sampled(levels),
            Lend => self.access.lend(),
            GiveBack => self.access.give_back(),
            Fail => self.access.fail(),
            Opening => self.access.opening(),
        }
        self.history.push(step);
        self
    }

    /// Beginnings of `event` without an end.
    fn pending(&self, event: Event) -> usize {
        self.history
            .iter()
            .fold(0usize, |pending, step| match step {
                Begin(e) if *e == event => pending + 1,
                End(e) if *e == event => pending.saturating_sub(1),
                EndAll(e) if *e == event => 0,
                Fail if event == Event::Error => 0,
                _ => pending,
            })
    }

    fn levels(&self) -> Sampled {
        let said = |step: &Step| match step {
            Open(levels) | Sample(levels) => Some(*levels),
            _ => None,
        };
        self.history.iter().rev().find_map(said).unwrap_or_default()
    }

    /// Whether recovery has failed since the device was last about to be opened.
    fn failed(&self) -> bool {
        let mut last = self.history.iter().rev();
        let last = last.find(|step| matches!(step, Fail | Opening));
        matches!(last, Some(Fail))
    }

    /// Lenders that have not given back.
    fn lenders(&self) -> usize {
        let count = |lenders: usize, step: &Step| match step {
            Lend => lenders + 1,
            GiveBack => lenders.saturating_sub(1),
            _ => lenders,
        };
        self.history.iter().fold(0, count)
    }

    /// The bits of the uAPI, spelt out.
    fn reason_bits(&self) -> u32 {
        let levels = self.levels();
        let pending = |event| self.pending(event) > 0;
        let mut bits = 0;
        if levels.memory_off || levels.undecoded {
            bits |= barlease_abi::REASON_MEMORY_OFF;
        }
        if pending(Event::Reset) {
            bits |= barlease_abi::REASON_RESET;
        }
        if levels.sleeping || levels.low_power || pending(Event::LowPower) || pending(Event::Sleep)
        {
            bits |= barlease_abi::REASON_LOW_POWER;
        }
        if pending(Event::Error) || self.failed() {
            bits |= barlease_abi::REASON_ERROR;
        }
        if pending(Event::ConfigWrite) {
            bits |= barlease_abi::REASON_CONFIG_WRITE;
        }
        bits
    }

    fn is_open(&self) -> bool {
        let toggles = |step: &&Step| matches!(step, Open(_) | Close);
        matches!(self.history.iter().rev().find(toggles), Some(Open(_)))
    }

    fn check(&self) {
        let access = &self.access;
        let history = &self.history;
        let levels = self.levels();
        assert_eq!(access.sampled(), levels, "{history:?}");
        let asks = self.pending(Event::Reset) + self.pending(Event::Error) == 0;
        assert_eq!(access.may_ask(), asks, "{history:?}");
        let half_awake = levels.undecoded && !levels.memory_off;
        let stale = levels.sleeping || levels.low_power || half_awake;
        assert_eq!(access.is_stale(), stale, "{history:?}");
        assert_eq!(access.is_lent(), self.lenders() != 0, "{history:?}");
        assert_eq!(access.reasons().bits(), self.reason_bits(), "{history:?}");
        let current = self.epochs.last().copied().filter(|_| self.is_open());
        assert_eq!(access.epoch(), current, "{history:?}");
        assert_eq!(Epoch::of_word(access.word()), current, "{history:?}");
        for (index, &epoch) in self.epochs.iter().enumerate() {
            let latest = index + 1 == self.epochs.len();
            assert_eq!(access.is_latest(epoch), latest, "{history:?}");
            let alive = self.is_open() && latest;
            let expected = match (alive, self.reason_bits()) {
                (false, _) => State::Dead,
                (true, 0) => State::Ok,
                (true, _) => State::Revoked(access.reasons()),
            };
            assert_eq!(access.state(epoch, false), expected, "{history:?}");
            assert_eq!(access.state(epoch, true), State::Dead, "{history:?}");
            let glance = epoch.is_reachable(access.reachable());
            assert_eq!(glance, expected == State::Ok, "{history:?}");
        }
    }
}

/// Every history of `steps` up to `depth` steps, after `traced`.
fn explore(traced: &Traced, steps: &[Step], depth: usize) {
    traced.check();
    if depth == 0 {
        return;
    }
    for &step in steps {
        explore(&traced.clone().after(step), steps, depth - 1);
    }
}

#[test]
fn every_history_of_three_steps() {
    explore(&Traced::new(), &all_steps(), 3);
}

#[test]
fn every_history_of_three_steps_of_an_open_device() {
    explore(&Traced::new().after(Open(MEMORY_ON)), &all_steps(), 3);
}

#[test]
fn every_history_of_five_steps_that_nest() {
    let steps = [
        Open(MEMORY_ON),
        Close,
        Begin(Event::Reset),
        End(Event::Reset),
        Begin(Event::ConfigWrite),
        End(Event::ConfigWrite),
        Begin(Event::Error),
        EndAll(Event::Error),
        Fail,
        Sample(MEMORY_OFF),
        Sample(MEMORY_ON),
    ];
    explore(&Traced::new(), &steps, 5);
}

#[test]
fn the_reasons_are_those_of_the_uapi() {
    let pairs = [
        (Reasons::NONE, 0),
        (Reasons::MEMORY_OFF, barlease_abi::REASON_MEMORY_OFF),
        (Reasons::RESET, barlease_abi::REASON_RESET),
        (Reasons::LOW_POWER, barlease_abi::REASON_LOW_POWER),
        (Reasons::ERROR, barlease_abi::REASON_ERROR),
        (Reasons::CONFIG_WRITE, barlease_abi::REASON_CONFIG_WRITE),
    ];
    for (reasons, bits) in pairs {
        assert_eq!(reasons.bits(), bits);
        assert_eq!(reasons.is_empty(), bits == 0);
    }
    let all = pairs
        .iter()
        .fold(Reasons::NONE, |all, (reasons, _)| all.union(*reasons));
    assert_eq!(all.bits(), 0x1f);
    for (reasons, _) in pairs {
        assert!(all.contains(reasons));
        assert!(reasons.contains(Reasons::NONE));
        assert_eq!(reasons.contains(all), reasons == all);
    }
}

#[test]
fn each_event_has_its_reason() {
    let reasons = Event::ALL.map(|event| event.reason());
    assert_eq!(
        reasons,
        [
            Reasons::RESET,
            Reasons::LOW_POWER,
            Reasons::LOW_POWER,
            Reasons::ERROR,
            Reasons::CONFIG_WRITE,
        ]
    );
}

#[test]
fn a_device_that_was_never_open_has_no_epoch_and_no_reason() {
    for access in [Access::new(), Access::default()] {
        assert_eq!(access.epoch(), None);
        assert!(access.reasons().is_empty());
        assert_eq!(access.reachable(), NOTHING);
    }
}

#[test]
fn concurrent_events_nest() {
    let mut access = Access::new();
    let epoch = access.open(MEMORY_ON);
    access.begin(Event::Reset);
    access.begin(Event::Reset);
    access.end(Event::Reset);
    assert_eq!(access.state(epoch, false), State::Revoked(Reasons::RESET));
    access.end(Event::Reset);
    assert_eq!(access.state(epoch, false), State::Ok);
}

#[test]
fn sleep_and_low_power_are_one_reason_and_two_events() {
    let mut access = Access::new();
    let epoch = access.open(MEMORY_ON);
    access.begin(Event::Sleep);
    access.begin(Event::LowPower);
    access.end(Event::Sleep);
    assert_eq!(
        access.state(epoch, false),
        State::Revoked(Reasons::LOW_POWER)
    );
    access.end(Event::LowPower);
    assert_eq!(access.state(epoch, false), State::Ok);
}

#[test]
fn low_power_that_was_asked_for_is_no_reason_while_the_device_is_kept_awake() {
    for levels in all_levels() {
        for event in [None].into_iter().chain(Event::ALL.map(Some)) {
            let mut access = Access::new();
            let _epoch = access.open(levels);
            if let Some(event) = event {
                access.begin(event);
            }
            let power = levels.sleeping || event == Some(Event::Sleep);
            let wanted = [
                (Reasons::MEMORY_OFF, levels.memory_off || levels.undecoded),
                (Reasons::LOW_POWER, power),
                (Reasons::RESET, event == Some(Event::Reset)),
                (Reasons::ERROR, event == Some(Event::Error)),
                (Reasons::CONFIG_WRITE, event == Some(Event::ConfigWrite)),
            ];
            let reasons = access.reasons_when_awake();
            for (reason, holds) in wanted {
                assert_eq!(
                    reasons.contains(reason),
                    holds,
                    "{levels:?} {event:?} {reason:?}"
                );
            }
            // It is never wider than what shuts leases.
            assert!(access.reasons().contains(reasons));
        }
    }
}

#[test]
fn an_end_without_a_beginning_is_nothing() {
    for event in Event::ALL {
        let mut access = Access::new();
        let epoch = access.open(MEMORY_ON);
        access.end(event);
        access.begin(event);
        assert_eq!(access.state(epoch, false), State::Revoked(event.reason()));
    }
}

#[test]
fn opening_ends_no_event() {
    for event in Event::ALL {
        let mut access = Access::new();
        access.open(MEMORY_ON);
        access.begin(event);
        access.close();
        let epoch = access.open(MEMORY_ON);
        let expected = State::Revoked(event.reason());
        assert_eq!(access.state(epoch, false), expected, "{event:?}");
    }
}

#[test]
fn a_failed_recovery_lasts_until_the_next_open() {
    let mut access = Access::new();
    let epoch = access.open(MEMORY_ON);
    access.begin(Event::Error);
    access.begin(Event::Error);
    access.fail();
    access.set_sampled(MEMORY_ON);
    // A recovery after it does not mend what came before.
    access.begin(Event::Error);
    access.end_all(Event::Error);
    assert_eq!(access.state(epoch, false), State::Revoked(Reasons::ERROR));
    access.close();
    access.opening();
    let epoch = access.open(MEMORY_ON);
    assert_eq!(access.state(epoch, false), State::Ok);
    // One that fails while the device is being opened is of that open.
    access.close();
    access.opening();
    access.fail();
    let epoch = access.open(MEMORY_ON);
    assert_eq!(access.state(epoch, false), State::Revoked(Reasons::ERROR));
}

#[test]
fn one_recovery_ends_all_errors() {
    let mut access = Access::new();
    let epoch = access.open(MEMORY_ON);
    access.begin(Event::Error);
    access.begin(Event::Error);
    access.end_all(Event::Error);
    assert_eq!(access.state(epoch, false), State::Ok);
}

#[test]
fn a_buffer_of_an_earlier_epoch_is_dead() {
    let mut access = Access::new();
    let first = access.open(MEMORY_ON);
    access.close();
    assert_eq!(access.state(first, false), State::Dead);
    let second = access.open(MEMORY_ON);
    assert_ne!(first, second);
    assert_eq!(access.state(first, false), State::Dead);
    assert_eq!(access.state(second, false), State::Ok);
}

#[test]
fn a_revoked_buffer_is_dead_whatever_happens() {
    for levels in all_levels() {
        let mut access = Access::new();
        let epoch = access.open(levels);
        assert_eq!(access.state(epoch, true), State::Dead);
        access.begin(Event::Reset);
        assert_eq!(access.state(epoch, true), State::Dead);
    }
}

fn step() -> impl Strategy<Value = Step> {
    select(all_steps())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn long_histories(steps in vec(step(), 0..60)) {
        let mut traced = Traced::new();
        for step in steps {
            traced = traced.after(step);
            traced.check();
        }
    }

    #[test]
    fn brackets_that_nest_leave_nothing(
        events in vec(select(Event::ALL.to_vec()), 0..40),
        order in any::<proptest::sample::Index>(),
    ) {
        // Begun in one order, ended in another, however often each.
        let mut access = Access::new();
        let epoch = access.open(MEMORY_ON);
        for &event in &events {
            access.begin(event);
        }
        for i in 0..events.len() {
            let at = (i + order.index(events.len())) % events.len();
            prop_assert_ne!(access.state(epoch, false), State::Ok);
            access.end(events[at]);
        }
        prop_assert_eq!(access.state(epoch, false), State::Ok);
    }
}
