// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Entries of 1 GiB against cuts, in every order of their steps: `kmod/src/sys/gigantic.rs`, step
//! by step, with one order of memory.
//!
//! Processes map one buffer. In each, a thread faults, and another one cuts the mapping (or moves
//! or copies it, which is the same here). When it does, its own page table must have no entry of
//! 1 GiB, and no page table may have one from then on. Bugs are planted, and each must be found.

use stateright::{Checker, Model, Property};

const PROCESSES: usize = 2;

/// A bug that is planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    /// A fault looks at the state before it enters the gate.
    LooksOutside,
    /// A thread that ends it does not wait at the gate.
    DoesNotWait,
    /// It waits, and only then says so.
    WaitsFirst,
    /// A thread that finds another one at it goes on.
    LeavesItToTheOther,
    /// It says that all is done before that is so.
    SaysSoEarly,
    /// A fault that inserts the first one does not say so.
    InsertsUnsaid,
}

const BUGS: [Bug; 6] = [
    Bug::LooksOutside,
    Bug::DoesNotWait,
    Bug::WaitsFirst,
    Bug::LeavesItToTheOther,
    Bug::SaysSoEarly,
    Bug::InsertsUnsaid,
];

/// As in the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Hash)]
enum State {
    Unused,
    Used,
    Ending,
    Ended,
}

use State::{Ended, Ending, Unused, Used};

/// Where a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fault {
    /// `EntryGate::enter`
    Enter,
    /// The load of `Inside::permit`
    Look,
    /// Its exchange
    Claim,
    /// `Fault::insert_gigantic`
    Insert,
    Leave,
    Done,
}

/// Where a thread is that cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Cut {
    /// The load of `EntryGate::end_gigantic`
    Look,
    /// The first exchange
    Forbid,
    /// The second one
    Begin,
    Wait,
    /// Takes the entries of one process away after the other.
    Zap(usize),
    Say,
    /// The kernel cuts.
    Split,
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    state: State,
    inside: usize,
    /// By process.
    entries: [bool; PROCESSES],
    faults: [Fault; PROCESSES],
    cuts: [Cut; PROCESSES],
    /// A thread has cut where there was an entry.
    oops: bool,
}

/// A thread makes its next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Fault(usize),
    Cut(usize),
}

struct Protocol(Option<Bug>);

impl Protocol {
    fn has(&self, bug: Bug) -> bool {
        self.0 == Some(bug)
    }

    fn fault(&self, world: &mut World, process: usize) {
        let next = match world.faults[process] {
            Fault::Enter => {
                world.inside += 1;
                if self.has(Bug::LooksOutside) {
                    Fault::Insert
                } else {
                    Fault::Look
                }
            }
            Fault::Look => match world.state {
                Unused if self.has(Bug::InsertsUnsaid) => Fault::Insert,
                Unused => Fault::Claim,
                Used if self.has(Bug::LooksOutside) => Fault::Enter,
                Used => Fault::Insert,
                Ending | Ended if self.has(Bug::LooksOutside) => Fault::Done,
                Ending | Ended => Fault::Leave,
            },
            Fault::Claim => {
                if world.state == Unused {
                    world.state = Used;
                }
                match world.state {
                    Used if self.has(Bug::LooksOutside) => Fault::Enter,
                    Used => Fault::Insert,
                    _ if self.has(Bug::LooksOutside) => Fault::Done,
                    _ => Fault::Leave,
                }
            }
            Fault::Insert => {
                world.entries[process] = true;
                Fault::Leave
            }
            Fault::Leave => {
                world.inside -= 1;
                // Another one, once.
                Fault::Done
            }
            Fault::Done => return,
        };
        world.faults[process] = next;
    }

    /// Whether it could make its step.
    fn cut(&self, world: &mut World, process: usize) -> bool {
        let next = match world.cuts[process] {
            Cut::Look if world.state == Ended => Cut::Split,
            Cut::Look => Cut::Forbid,
            Cut::Forbid if world.state == Unused => {
                world.state = Ended;
                Cut::Split
            }
            Cut::Forbid if self.has(Bug::WaitsFirst) => Cut::Wait,
            Cut::Forbid => Cut::Begin,
            Cut::Begin => {
                let before = world.state;
                world.state = if self.has(Bug::SaysSoEarly) {
                    Ended
                } else {
                    Ending
                };
                match before {
                    Ending | Ended if self.has(Bug::LeavesItToTheOther) => Cut::Split,
                    _ if self.has(Bug::DoesNotWait) || self.has(Bug::WaitsFirst) => Cut::Zap(0),
                    _ => Cut::Wait,
                }
            }
            Cut::Wait if world.inside != 0 => return false,
            Cut::Wait if self.has(Bug::WaitsFirst) => Cut::Begin,
            Cut::Wait => Cut::Zap(0),
            Cut::Zap(other) => {
                world.entries[other] = false;
                if other + 1 == PROCESSES {
                    Cut::Say
                } else {
                    Cut::Zap(other + 1)
                }
            }
            Cut::Say => {
                world.state = Ended;
                Cut::Split
            }
            Cut::Split => {
                world.oops |= world.entries[process];
                Cut::Done
            }
            Cut::Done => return false,
        };
        world.cuts[process] = next;
        true
    }
}

impl Model for Protocol {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let first = if self.has(Bug::LooksOutside) {
            Fault::Look
        } else {
            Fault::Enter
        };
        vec![World {
            state: Unused,
            inside: 0,
            entries: [false; PROCESSES],
            faults: [first; PROCESSES],
            cuts: [Cut::Look; PROCESSES],
            oops: false,
        }]
    }

    fn actions(&self, _: &World, actions: &mut Vec<Action>) {
        let processes = 0..PROCESSES;
        actions
            .extend(processes.flat_map(|process| [Action::Fault(process), Action::Cut(process)]));
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Fault(process) => {
                // One fault after the other: a process may go on as long as it likes.
                if world.faults[process] == Fault::Done {
                    world.faults[process] = self.init_states().remove(0).faults[process];
                } else {
                    self.fault(&mut world, process);
                }
            }
            Action::Cut(process) => {
                if !self.cut(&mut world, process) {
                    return None;
                }
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "no mapping is cut that has an entry of 1 GiB",
                |_, world: &World| !world.oops,
            ),
            Property::always("none comes back", |_, world: &World| {
                let done = world.cuts.contains(&Cut::Done);
                !(done && world.entries.contains(&true))
            }),
            Property::sometimes("there are some", |_, world: &World| {
                world.entries.contains(&true)
            }),
            Property::sometimes("one is cut while another begins", |_, world: &World| {
                world.cuts == [Cut::Done, Cut::Look]
            }),
            Property::sometimes("all are cut", |_, world: &World| {
                world.cuts == [Cut::Done; PROCESSES]
            }),
        ]
    }
}

#[test]
fn no_mapping_is_cut_that_has_one() {
    let checker = Protocol(None).checker().spawn_bfs().join();
    checker.assert_properties();
    println!("{} states", checker.unique_state_count());
}

#[test]
fn each_planted_bug_is_found() {
    for bug in BUGS {
        let checker = Protocol(Some(bug)).checker().spawn_bfs().join();
        let path = checker.discoveries();
        let found = [
            "no mapping is cut that has an entry of 1 GiB",
            "none comes back",
        ]
        .into_iter()
        .find_map(|name| path.get(name));
        let found = found.unwrap_or_else(|| panic!("not found: {bug:?}"));
        println!("{bug:?}: {:?}", found.clone().into_actions());
    }
}
