//! The changes since the results that the documentation has.

use std::fmt::Write;

use anyhow::Result;
use barlease_bench::report::{Point, Report};

use super::page;
use crate::checkout;

/// A ratio that differs by less is called the same.
const SAME: f64 = 0.02;

/// A point that both reports have.
#[derive(Debug, PartialEq)]
struct Change {
    place: String,
    then: f64,
    now: f64,
}

impl Change {
    /// How much greater the ratio is than it was: 0.1 is a tenth.
    fn growth(&self) -> f64 {
        self.now / self.then - 1.0
    }
}

/// Says how the ratios of `now` differ from those in `docs/benchmarks`.
pub(super) fn print(now: &Report) -> Result<()> {
    let name = format!("docs/benchmarks/{}.json", page::name(now.system.clock));
    let then = super::read(&checkout::top().join(&name))?;
    println!("{}", text_of(&name, &changes(&then, now)));
    Ok(())
}

/// The points that both have, in the order of `now`.
fn changes(then: &Report, now: &Report) -> Vec<Change> {
    let mut changes = Vec::new();
    for measure in &now.measures {
        let Some(old) = then.measures.iter().find(|old| old.name == measure.name) else {
            continue;
        };
        for point in &measure.points {
            let is_it = |old: &&Point| old.curve == point.curve && old.x == point.x;
            let Some(old) = old.points.iter().find(is_it) else {
                continue;
            };
            if let (Some(then), Some(now)) = (old.ratio, point.ratio) {
                let x = point.x.map_or(String::new(), |x| format!(", {x}"));
                changes.push(Change {
                    place: format!("{}: {}{x}", measure.name, point.curve),
                    then: then.median,
                    now: now.median,
                });
            }
        }
    }
    changes
}

fn text_of(name: &str, changes: &[Change]) -> String {
    let mut text = format!("Ratios to stock, and what {name} has:\n");
    for change in changes {
        let growth = change.growth();
        let verdict = if growth > SAME {
            "  more than it was"
        } else if growth < -SAME {
            "  less than it was"
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "  {:<60} {:>8.4} {:>8.4} {:>+7.1} %{verdict}",
            change.place,
            change.now,
            change.then,
            100.0 * growth
        );
    }
    let more = changes.iter().filter(|change| change.growth() > SAME);
    let _ = write!(
        text,
        "{} of {} ratios are more than {:.0} % greater than they were.",
        more.count(),
        changes.len(),
        100.0 * SAME
    );
    text
}

#[cfg(test)]
mod tests {
    use barlease_bench::report::{Measure, System, Unit};
    use barlease_bench::statistics::Summary;

    use super::*;

    fn report(points: &[(u64, f64)]) -> Report {
        let points = points.iter().map(|&(x, ratio)| Point {
            curve: "one".to_owned(),
            x: Some(x),
            ours: Summary::of(&[ratio]).unwrap(),
            theirs: Summary::of(&[1.0]),
            ratio: Summary::of(&[ratio]),
            goal: None,
        });
        Report {
            system: System::default(),
            measures: vec![Measure {
                name: "export".to_owned(),
                title: String::new(),
                baseline: String::new(),
                unit: Unit::Nanoseconds,
                axis: None,
                points: points.collect(),
            }],
        }
    }

    #[test]
    fn points_that_both_have_are_compared() {
        let then = report(&[(1, 1.0), (64, 2.0), (4096, 3.0)]);
        let now = report(&[(1, 1.01), (2, 5.0), (64, 2.2)]);
        let changes = changes(&then, &now);
        let places: Vec<_> = changes.iter().map(|change| &change.place).collect();
        assert_eq!(places, ["export: one, 1", "export: one, 64"]);
        let text = text_of("before", &changes);
        assert!(text.contains("+10.0 %  more than it was"), "{text}");
        assert!(text.ends_with("1 of 2 ratios are more than 2 % greater than they were."));
    }
}
