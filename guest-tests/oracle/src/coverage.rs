//! How often what came of which operation.

use std::{collections::BTreeMap, fmt};

use crate::{Kind, Outcome, Step};

/// How a step was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct How {
    under_fire: bool,
    waited: bool,
}

/// Counters.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    counts: BTreeMap<(Kind, How, String), u64>,
}

impl Coverage {
    /// Counts a step; `waited` is whether it had to wait for an importer.
    pub fn add(&mut self, step: &Step, waited: bool, outcome: &Outcome) {
        let how = How {
            under_fire: step.under_fire,
            waited,
        };
        let key = (step.op.kind(), how, outcome.name());
        *self.counts.entry(key).or_default() += 1;
    }

    /// How often an operation ran.
    #[must_use]
    pub fn of(&self, kind: Kind) -> u64 {
        let counts = self.counts.iter();
        counts
            .filter(|((of, ..), _)| *of == kind)
            .map(|(_, count)| count)
            .sum()
    }

    /// How many steps had to wait for an importer.
    #[must_use]
    pub fn waited(&self) -> u64 {
        let counts = self.counts.iter();
        counts
            .filter(|((_, how, _), _)| how.waited)
            .map(|(_, count)| count)
            .sum()
    }

    /// The operations that never ran.
    #[must_use]
    pub fn missing(&self) -> Vec<Kind> {
        let all = Kind::ALL.iter().copied();
        all.filter(|&kind| self.of(kind) == 0).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &kind in Kind::ALL {
            write!(f, "{:16}", format!("{kind:?}"))?;
            if self.of(kind) == 0 {
                write!(f, " never")?;
            }
            for ((of, how, outcome), count) in &self.counts {
                if *of == kind {
                    let waited = if how.waited { " after waiting" } else { "" };
                    let fire = if how.under_fire { " under fire" } else { "" };
                    write!(f, " {outcome}{waited}{fire}: {count};")?;
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
