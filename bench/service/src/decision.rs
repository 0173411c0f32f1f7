//! The cost of the policy: a decision among many rules.

use std::fmt::Write;
use std::hint::black_box;

use barlease_bench::report::Goal;
use barlease_bench::report::Measure;
use barlease_bench::report::Unit;
use barlease_bench::rounds::Rounds;
use barlease_bench::rounds::Side;
use barlease_ledger::policy::NoNames;
use barlease_ledger::policy::Policy;
use barlease_ledger::policy::Question;
use barlease_ledger::types::Access;
use barlease_ledger::types::Lifetime;
use barlease_ledger::types::Peer;

/// A policy with so many rules, of all kinds.
fn policy(rules: u32) -> Policy {
    let mut text = String::from(
        "[device.card]\nmatch = \"0000:00:01.0\"\n\
         [pool.rows]\ndevice = \"card\"\nbar = 2\nunit = \"4K\"\n",
    );
    for rule in 0..rules {
        let who = match rule % 5 {
            0 => format!("user = {rule}"),
            1 => format!("group = {rule}"),
            2 => format!("unit = \"app{rule}@*.service\""),
            3 => format!("cgroup = \"/pods/{rule}/**\""),
            _ => format!("claim = \"claim-{rule}-*\""),
        };
        let _ = write!(
            text,
            "[[allow]]\npools = [\"ro*\"]\nwho = {{ {who} }}\naccess = \"read-write\"\nmax-leases = 4\n"
        );
    }
    Policy::parse(&[("rules.toml", &text)], &NoNames).expect("a policy")
}

const RULES: u32 = 1000;
/// Nanoseconds of a decision at most.
const MOST: f64 = 20_000.0;

pub(crate) fn take(quick: bool) -> Vec<Measure> {
    let policies = [policy(RULES), policy(5)];
    let last = RULES - 1;
    let peer = |rule: u32| Peer {
        uid: rule - rule % 5,
        gid: 1,
        groups: (0..32).collect(),
        pid: 1,
        process: None,
        cgroup: None,
        cgroup_path: format!("/pods/{}/box", rule - rule % 5 + 3).into(),
        unit: format!("app{}@7.service", rule - rule % 5 + 2).into(),
        claim: Some(format!("claim-{}-x", rule - rule % 5 + 4).into()),
    };
    let peers = [peer(last), peer(4)];
    let rounds = if quick { 5 } else { 21 };
    let measure = Rounds::new(
        "service-decision",
        "A decision of the policy among 1,000 rules, four of which allow it",
        "among 5 rules",
        Unit::Native,
    )
    .run(rounds, |side, batch| {
        let which = usize::from(side == Side::Theirs);
        let question = Question {
            peer: &peers[which],
            pool: 0,
            access: Access::ReadWrite,
            lifetime: Lifetime::Connection,
            steering_tags: false,
        };
        batch.time("decision", None, 9, 1000, || {
            let terms = policies[which].decide(black_box(&question));
            assert!(black_box(terms).is_some());
        });
    })
    .finish(|_, _| Some(Goal::More(MOST)));
    vec![measure]
}
