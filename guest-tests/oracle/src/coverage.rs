//! How often what came of which operation.

use std::{collections::BTreeMap, fmt};

use crate::{Kind, Outcome, Step};

/// Counters.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    counts: BTreeMap<(Kind, bool, String), u64>,
}

impl Coverage {
    /// Counts a step.
    pub fn add(&mut self, step: &Step, outcome: &Outcome) {
        let key = (step.op.kind(), step.under_fire, outcome.name());
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
            for ((of, fire, outcome), count) in &self.counts {
                if *of == kind {
                    let fire = if *fire { " under fire" } else { "" };
                    write!(f, " {outcome}{fire}: {count};")?;
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
