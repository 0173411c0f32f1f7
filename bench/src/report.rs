//! The results of a run, as JSON.

use serde::{Deserialize, Serialize};

use crate::statistics::{Summary, exponent};

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The machine that it ran on.
    pub system: System,
    /// The measures, in the order of their run.
    pub measures: Vec<Measure>,
}

/// The machine of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct System {
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Version of the module.
    pub module: String,
    /// How the guest's processors are made, such as `tcg`; filled in by the host.
    pub acceleration: String,
    /// The meaning of a nanosecond of the guest's clock; filled in by the host.
    pub clock: Clock,
    /// Processors of the guest.
    pub processors: usize,
    /// Whether it was a short run.
    pub quick: bool,
}

/// The unit that the guest's clock counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Time.
    #[default]
    Time,
    /// Instructions of the guest, one a nanosecond.
    Instructions,
}

/// The kind of the values of a measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Nanoseconds of the guest's clock.
    Nanoseconds,
    /// Nanoseconds of the host's clock, outside of any guest.
    Native,
    /// Things that were counted.
    Count,
    /// Bytes.
    Bytes,
    /// Things a second.
    Rate,
}

/// One measure: one or more curves, or single values.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measure {
    /// Its name for `--only`.
    pub name: String,
    /// The operation that is measured, in words.
    pub title: String,
    /// The operation that it is compared with, in words.
    pub baseline: String,
    /// The kind of its values.
    pub unit: Unit,
    /// The label of the horizontal axis of its curves.
    pub axis: Option<String>,
    /// The values.
    pub points: Vec<Point>,
}

/// One value, ours and what it is measured against.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    /// The curve that it is on.
    pub curve: String,
    /// Where on the curve, if that is one.
    pub x: Option<u64>,
    /// With Barlease.
    pub ours: Summary,
    /// With what it is measured against, where that can do it.
    pub theirs: Option<Summary>,
    /// Ours divided by theirs, of each round.
    pub ratio: Option<Summary>,
    /// The goal of the ratio.
    pub goal: Option<Goal>,
}

/// The goal of a ratio, or of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// A ratio of at most this.
    AtMost(f64),
    /// A ratio of at least this.
    AtLeast(f64),
    /// Ours is at most so much more than theirs, in the measure's unit.
    More(f64),
}

impl Point {
    /// Whether the goal is met, if there is one and something to compare with.
    #[must_use]
    pub fn is_met(&self) -> Option<bool> {
        Some(match self.goal? {
            Goal::AtMost(most) => self.ratio?.median <= most,
            Goal::AtLeast(least) => self.ratio?.median >= least,
            Goal::More(more) => self.ours.median - self.theirs?.median <= more,
        })
    }
}

/// How the values of a curve grow.
#[derive(Clone, Debug, PartialEq)]
pub struct Growth {
    /// The curve.
    pub curve: String,
    /// The exponent with Barlease.
    pub ours: Option<f64>,
    /// The exponent of what it is measured against.
    pub theirs: Option<f64>,
}

impl Measure {
    /// The names of the curves, in the order of their first points.
    #[must_use]
    pub fn curves(&self) -> Vec<&str> {
        let mut curves: Vec<&str> = Vec::new();
        for point in &self.points {
            if !curves.contains(&point.curve.as_str()) {
                curves.push(&point.curve);
            }
        }
        curves
    }

    /// The points of a curve.
    pub fn points_of<'a>(&'a self, curve: &'a str) -> impl Iterator<Item = &'a Point> {
        self.points.iter().filter(move |point| point.curve == curve)
    }

    /// How each curve grows.
    #[must_use]
    pub fn growth(&self) -> Vec<Growth> {
        let of = |curve: &str, value: fn(&Point) -> Option<f64>| {
            let points = self.points_of(curve);
            let pairs: Vec<_> = points
                .filter_map(|point| Some((point.x? as f64, value(point)?)))
                .collect();
            exponent(&pairs)
        };
        let growth = self.curves().into_iter().map(|curve| Growth {
            curve: curve.to_owned(),
            ours: of(curve, |point| Some(point.ours.median)),
            theirs: of(curve, |point| Some(point.theirs?.median)),
        });
        growth.filter(|growth| growth.ours.is_some()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(median: f64) -> Summary {
        Summary::of(&[median]).unwrap()
    }

    fn point(x: u64, ours: f64, theirs: f64, goal: Option<Goal>) -> Point {
        Point {
            curve: "c".to_owned(),
            x: Some(x),
            ours: summary(ours),
            theirs: Some(summary(theirs)),
            ratio: Some(summary(ours / theirs)),
            goal,
        }
    }

    #[test]
    fn a_goal_is_met_or_missed() {
        let is_met = |ours, theirs, goal| point(1, ours, theirs, goal).is_met();
        assert_eq!(is_met(9.0, 10.0, Some(Goal::AtMost(1.0))), Some(true));
        assert_eq!(is_met(11.0, 10.0, Some(Goal::AtMost(1.0))), Some(false));
        assert_eq!(is_met(9.0, 10.0, Some(Goal::AtLeast(0.95))), Some(false));
        assert_eq!(is_met(14.0, 10.0, Some(Goal::More(5.0))), Some(true));
        assert_eq!(is_met(16.0, 10.0, Some(Goal::More(5.0))), Some(false));
        assert_eq!(is_met(1.0, 1.0, None), None);
        let alone = Point {
            theirs: None,
            ratio: None,
            ..point(1, 1.0, 1.0, Some(Goal::AtMost(1.0)))
        };
        assert_eq!(alone.is_met(), None);
    }

    #[test]
    fn growth_is_of_each_side() {
        let points = [1, 10, 100, 1000].map(|x| point(x, x as f64, 5.0, None));
        let measure = Measure {
            name: "m".to_owned(),
            title: String::new(),
            baseline: String::new(),
            unit: Unit::Count,
            axis: Some("x".to_owned()),
            points: points.into(),
        };
        let [growth] = &measure.growth()[..] else {
            panic!()
        };
        assert!((growth.ours.unwrap() - 1.0).abs() < 1e-9);
        assert!(growth.theirs.unwrap().abs() < 1e-9);
    }

    #[test]
    fn a_report_survives_its_json() {
        let report = Report {
            system: System::default(),
            measures: vec![Measure {
                name: "m".to_owned(),
                title: "t".to_owned(),
                baseline: "stock".to_owned(),
                unit: Unit::Nanoseconds,
                axis: None,
                points: vec![point(1, 2.0, 3.0, Some(Goal::More(5.0)))],
            }],
        };
        let text = serde_json::to_string(&report).unwrap();
        let back: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
    }
}
