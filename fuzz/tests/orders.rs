//! The state of a scratch mapping, with every order of the threads' steps and every value that the
//! memory model lets them see, by loom.
//!
//! A variable here stands for the mapping. A handler and a recovery change it between two fences,
//! as the system calls that they make change page tables; an access sees it with no order of its
//! own.

#![allow(dead_code, reason = "the state is the library's, with all that it has")]

use loom::sync::Arc;
use loom::thread;

mod atomic {
    pub(super) use loom::sync::atomic::AtomicU32;
    pub(super) use loom::sync::atomic::Ordering;
    pub(super) use loom::sync::atomic::fence;
}

#[path = "../../lib/src/mapping/state.rs"]
mod state;

use atomic::AtomicU32;
use atomic::Ordering;
use atomic::fence;
use state::Loss;
use state::Recovery;
use state::State;

const LEASE: u32 = 0;
const SCRATCH: u32 = 1;

struct Mapping {
    state: State,
    mapped: AtomicU32,
}

impl Mapping {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: State(AtomicU32::new(0)),
            mapped: AtomicU32::new(LEASE),
        })
    }

    fn map(&self, what: u32) {
        fence(Ordering::SeqCst);
        self.mapped.store(what, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// A fault, as often as it takes until the access can be made.
    fn lose(&self) {
        loop {
            match self.state.begin_loss() {
                Loss::Done => return,
                Loss::Wait(_) => thread::yield_now(),
                Loss::Ours => {
                    self.map(SCRATCH);
                    self.state.end_loss();
                    return;
                }
            }
        }
    }

    fn recover(&self, mapped: bool) {
        loop {
            match self.state.begin_recovery() {
                Recovery::NotNeeded => return,
                Recovery::Wait(_) => thread::yield_now(),
                Recovery::Ours => {
                    if mapped {
                        self.map(LEASE);
                    }
                    self.state.end_recovery(mapped);
                    return;
                }
            }
        }
    }

    /// A section that is reported as done went to the lease.
    fn access(&self) {
        let seen = self.state.section(|| self.mapped.load(Ordering::Relaxed));
        assert_ne!(seen, Some(SCRATCH));
    }
}

fn together(others: &'static [fn(&Mapping)], here: fn(&Mapping)) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let mapping = Mapping::new();
        let threads: Vec<_> = others
            .iter()
            .map(|other| {
                let mapping = mapping.clone();
                thread::spawn(move || other(&mapping))
            })
            .collect();
        here(&mapping);
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_section_beside_a_loss() {
    together(&[|m| m.lose()], |m| {
        m.access();
        m.access();
    });
}

#[test]
fn a_section_beside_a_loss_and_a_recovery() {
    together(
        &[|m| {
            m.lose();
            m.recover(true);
            m.lose();
        }],
        |m| {
            m.access();
            m.access();
        },
    );
}

#[test]
fn a_section_beside_two_that_lose_and_recover() {
    together(&[|m| m.lose(), |m| m.recover(true)], |m| m.access());
}

#[test]
fn two_that_recover_and_one_that_fails() {
    together(
        &[
            |m| {
                m.lose();
                m.recover(false);
            },
            |m| m.recover(true),
        ],
        |m| m.access(),
    );
}
